"""The classifier against a float64 oracle of the formulas, its pooling against PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import ADMClassifier
from fastldm.models.adm_configs import ADM_CLASSIFIERS
from fastldm.models.classifier import AttentionPool2d
from tests.models.adm_oracle import Oracle, close, randomised

TINY = {
    "image_size": 16,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}


def build(**fields):
    return randomised(ADMClassifier(**{**TINY, **fields}))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_new_attention_order": True, "channel_mult": (1, 2, 3), "attention_resolutions": (16, 4)},
        {"resblock_updown": False, "use_scale_shift_norm": False, "num_res_blocks": 2},
        {"resblock_updown": False, "conv_resample": False, "in_channels": 4},
    ],
    ids=["plain", "new_order", "convolutions", "pooling"],
)
def test_logits_are_the_formula_s(fields, pool):
    model = build(**fields, pool=pool)
    x, t = torch.randn(3, model.config.in_channels, 16, 16), torch.tensor([0.0, 412.5, 999.0])
    oracle = Oracle(model.state_dict(), model.config)
    wanted = oracle.classify(x, t)
    assert wanted.std() > 0.1
    close(model(x, t).logits, wanted)
    assert oracle.seen == set(model.state_dict())
    close(model(x, 7).logits, oracle.classify(x, torch.full((3,), 7)))


@torch.no_grad()
def test_pooling_by_means_takes_any_size():
    model, x = build(pool="spatial"), torch.randn(2, 3, 8, 12)
    close(model(x, 7).logits, Oracle(model.state_dict(), model.config).classify(x, torch.tensor([7, 7])))


@torch.no_grad()
def test_the_pooling_is_multi_head_attention_of_the_mean():
    pool, x = AttentionPool2d(12, 32, 8, 7), torch.randn(2, 32, 3, 4)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], -1) + pool.positional_embedding
    tokens = tokens.permute(2, 0, 1)
    rows = pool.qkv_proj.weight.squeeze(-1), pool.qkv_proj.bias
    last = pool.c_proj.weight.squeeze(-1), pool.c_proj.bias
    options = (None, None, False, 0.0)
    wanted, _ = F.multi_head_attention_forward(
        tokens, tokens, tokens, 32, 4, *rows, *options, *last, need_weights=False
    )
    close(pool(x), wanted[0])


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("64x64_classifier", 65_438_568, 307),
        ("128x128_classifier", 42_568_040, 221),
        ("256x256_classifier", 54_096_360, 249),
        ("512x512_classifier", 54_448_360, 281),
    ],
)
def test_the_published_classifiers_have_their_sizes_and_keys(name, parameters, keys):
    with torch.device("meta"):
        model = ADMClassifier(**ADM_CLASSIFIERS[name])
    state = model.state_dict()
    assert (sum(p.numel() for p in model.parameters()), len(state)) == (parameters, keys)
    pool = {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith("out.2.")}
    assert pool == {
        "out.2.positional_embedding": (512, 65),
        "out.2.qkv_proj.weight": (1536, 512, 1),
        "out.2.qkv_proj.bias": (1536,),
        "out.2.c_proj.weight": (1000, 512, 1),
        "out.2.c_proj.bias": (1000,),
    }


@torch.no_grad()
def test_openai_files_load_as_they_are(tmp_path):
    model, x = build(), torch.randn(2, 3, 16, 16)
    torch.save(model.state_dict(), tmp_path / "classifier.pt")
    loaded = ADMClassifier.from_openai(tmp_path / "classifier.pt", **TINY)
    assert torch.equal(loaded(x, 5).logits, model(x, 5).logits)
    torch.save(build(pool="spatial").state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"5 missing .*out.2.*; 2 unexpected .*; 2 of another shape"):
        ADMClassifier.from_openai(tmp_path / "other.pt", **TINY)


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
    model = ADMClassifier(**{**TINY, "out_channels": 2})
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
    model, x = build(), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = ADMClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 5).logits, model(x, 5).logits)
    assert not torch.equal(loaded(x, 500).logits, model(x, 5).logits)
    assert model(x, 5, return_dict=False)[0].shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_half_precision_stays_near(dtype, pool):
    model, x = build(pool=pool), torch.randn(2, 3, 16, 16)
    wanted = model(x, 5).logits
    found = model.to(dtype)(x.to(dtype), 5).logits
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() < 40 * torch.finfo(dtype).eps * wanted.abs().max()


@torch.no_grad()
def test_it_compiles_to_one_graph():
    model, x, t = build(), torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x, t).logits, model(x, t).logits)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pool": "max"}, "pool='max'"),
        ({"num_head_channels": -1}, "needs num_head_channels"),
        ({"model_channels": 48}, "multiple of 32"),
        ({"image_size": 17}, "multiple of 2"),
        ({"num_head_channels": 24}, "num_head_channels=24"),
        ({"attention_resolutions": (4,)}, r"\[4\]"),
        ({"num_classes": 5}, "num_classes"),
    ],
)
def test_unusable_configurations_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        ADMClassifier.from_config({**TINY, **fields})


def test_another_size_is_refused():
    with pytest.raises(InputError, match=r"\(1, 3, 32, 32\).*16x16"):
        build()(torch.zeros(1, 3, 32, 32), 0)
    with pytest.raises(InputError, match="multiples of 2"):
        build(pool="adaptive")(torch.zeros(1, 3, 15, 16), 0)
