"""The classifier: its way down against diffusers' UNet2DModel, its pooling against PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError, InputError
from fastldm.models import NoisyClassifier
from fastldm.models.classifier import AttentionPool2d

WAY_DOWN = {
    "sample_size": 16,
    "in_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 2,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}


def build(**fields):
    return NoisyClassifier(**{**WAY_DOWN, "num_classes": 5, **fields})


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_the_way_down_is_the_peer_s(norm):
    up = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    options = {"up_block_types": up, "resnet_time_scale_shift": norm, "attn_norm_num_groups": 8}
    peer = UNet2DModel(**WAY_DOWN, **options).eval()
    ours = build(resnet_time_scale_shift=norm).eval()
    shared = {k: v for k, v in peer.state_dict().items() if k.startswith(("conv_in", "time", "down", "mid"))}
    missing, unexpected = ours.load_state_dict(shared, strict=False)
    assert {key.split(".")[0] for key in missing} == {"conv_norm_out", "pool"}
    assert not unexpected
    seen = {}
    for name, model in (("ours", ours), ("peer", peer)):
        model.mid_block.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 400, 999])
    ours(x, t), peer(x, t)
    close(seen["ours"], seen["peer"])
    ours(x, 7), peer(x, 7)
    close(seen["ours"], seen["peer"])


@torch.no_grad()
def test_the_pooling_is_multi_head_attention_of_the_mean():
    pool, x = AttentionPool2d(12, 32, 8, 7), torch.randn(2, 32, 3, 4)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], -1) + pool.positional_embedding
    tokens = tokens.permute(2, 0, 1)
    weights = (pool.qkv_proj.weight, pool.qkv_proj.bias, None, None, False, 0.0)
    wanted, _ = F.multi_head_attention_forward(
        tokens, tokens, tokens, 32, 4, *weights, pool.c_proj.weight, pool.c_proj.bias, need_weights=False
    )
    close(pool(x), wanted[0])


def test_every_weight_and_the_input_get_a_gradient_and_checkpointing_keeps_it():
    model = build()
    x, t = torch.randn(2, 3, 16, 16, requires_grad=True), torch.tensor([3, 900])
    grads = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        model.zero_grad()
        # Classifier guidance differentiates the log probability of a class with respect to x_t.
        (grad,) = torch.autograd.grad(model(x, t).logits.log_softmax(-1)[:, 2].sum(), x, retain_graph=True)
        model(x, t).logits.log_softmax(-1)[:, 2].sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        grads.append(grad)
    close(*grads)
    assert grads[0].flatten(1).norm(dim=1).min() > 0


def test_it_learns_classes_of_noisy_pictures():
    """Two classes, dark and bright pictures, at every timestep of a schedule that leaves some signal."""
    schedule = NoiseSchedule.cosine(100)
    model = build(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def batch(size):
        labels = torch.randint(2, (size,))
        x0 = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
        t = torch.randint(90, (size,))
        return schedule.add_noise(x0, torch.randn(size, 3, 16, 16), t), t, labels

    for _ in range(20):
        x, t, labels = batch(16)
        loss = F.cross_entropy(model(x, t).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, t, labels = batch(64)
    with torch.no_grad():
        right = (model.eval()(x, t).logits.argmax(1) == labels).float().mean()
    assert right > 0.9


@torch.no_grad()
def test_a_folder_comes_back(tmp_path):
    model, x = build().eval(), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = NoisyClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 5).logits, model(x, 5).logits)
    assert not torch.equal(loaded(x, 500).logits, model(x, 5).logits)
    assert model(x, 5, return_dict=False)[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "one per width"),
        ({"down_block_types": ("CrossAttnDownBlock2D",) * 3}, "AttnDownBlock2D"),
        ({"norm_num_groups": 32}, "norm_num_groups 32"),
        ({"sample_size": 18}, "multiple of 4"),
        ({"attention_head_dim": 20}, "attention_head_dim=20"),
        ({"attention_head_dim": 32}, "divides 48"),
        ({"center_input_sample": True}, "center_input_sample"),
    ],
)
def test_unusable_configurations_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        NoisyClassifier.from_config({**WAY_DOWN, **fields})


def test_another_size_is_refused():
    with pytest.raises(InputError, match=r"\(1, 3, 32, 32\)"):
        build()(torch.zeros(1, 3, 32, 32), 0)
