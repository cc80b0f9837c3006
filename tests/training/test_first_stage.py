from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import AutoencoderKL, VQModel
from fastldm.training.discriminator import NLayerDiscriminator
from fastldm.training.first_stage import (
    FirstStageLoss,
    adaptive_weight,
    first_stage_forward,
    first_stage_step,
    initialize_codebook,
    psnr,
)
from fastldm.training.lpips import LPIPS

SMALL = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
STAGES = ([0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28])  # convolutions of VGG16 between poolings
ADVERSARIAL = {"disc_weight": 0.5, "disc_channels": 4, "disc_layers": 2}


def vq_model() -> VQModel:
    return VQModel(**SMALL, num_vq_embeddings=32)


def kl_model() -> AutoencoderKL:
    return AutoencoderKL(**SMALL)


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16) * 2 - 1


def test_vq_loss_against_the_formula():
    model, x = vq_model(), pictures()
    criterion = FirstStageLoss(l1_weight=0.7, l2_weight=0.2, codebook_weight=3.0)
    loss, logs = first_stage_step(model, criterion, x, step=0)

    z = model.encode(x).latents
    z_q, codebook_loss, (perplexity, _, indices) = model.quantize(z)
    y = model.decoder(model.post_quant_conv(z_q)).double()
    expected = 0.7 * (x - y).abs().mean() + 0.2 * (x - y).square().mean() + 3.0 * codebook_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["psnr"].item() == pytest.approx(
        10 * torch.log10(4 / (x - y.clamp(-1, 1)).square().mean()).item(), rel=1e-4
    )
    assert logs["codebook_loss"].item() == pytest.approx(codebook_loss.item())
    assert logs["codebook_usage"].item() == pytest.approx(len(indices.unique()) / 32)
    assert logs["perplexity"].item() == pytest.approx(perplexity.item())
    assert all(v.dtype == torch.float32 and v.dim() == 0 and not v.requires_grad for v in logs.values())


def test_kl_loss_against_the_formula():
    model, x = kl_model(), pictures()
    criterion = FirstStageLoss(kl_weight=0.3)
    torch.manual_seed(5)
    loss, logs = first_stage_step(model, criterion, x, step=0)

    torch.manual_seed(5)
    posterior = model.encode(x).latent_dist
    y = model.decode(posterior.sample()).sample.double()
    mean, logvar = posterior.mean.double(), posterior.logvar.double()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2  # per picture
    assert loss.item() == pytest.approx(((x - y).abs().mean() + 0.3 * kl / (3 * 16 * 16)).item(), rel=1e-5)
    assert logs["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert "perplexity" not in logs


def test_the_posterior_is_sampled_in_training():
    model, x = kl_model(), pictures()
    assert not torch.equal(first_stage_forward(model, x).sample, first_stage_forward(model, x).sample)


@pytest.mark.parametrize("make", [vq_model, kl_model])
@pytest.mark.parametrize("adversarial", [False, True])
def test_every_parameter_gets_a_gradient_from_its_own_loss_only(make, adversarial):
    model, x = make(), pictures()
    if make is vq_model:
        initialize_codebook(model, x)
    criterion = FirstStageLoss(**(ADVERSARIAL if adversarial else {}))
    output = first_stage_forward(model, x)
    loss, _ = first_stage_step(model, criterion, x, step=0, output=output)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad is None and p.requires_grad for p in criterion.parameters())
    if adversarial:
        before = [p.grad.clone() for p in model.parameters()]
        criterion.discriminator_loss(output, x)[0].backward()
        assert all(p.grad.abs().sum() > 0 for p in criterion.discriminator.parameters() if p.dim() == 4)
        assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters()))


@pytest.mark.parametrize("make", [vq_model, kl_model])
def test_losses_are_float32_under_bfloat16_autocast(make):
    model, x = make(), pictures()
    criterion = FirstStageLoss(**ADVERSARIAL)
    with torch.autocast("cpu", torch.bfloat16):
        output = first_stage_forward(model, x)
        assert output.sample.dtype == torch.bfloat16
        loss, logs = first_stage_step(model, criterion, x, step=0, output=output)
        other, more = criterion.discriminator_loss(output, x)
    (loss + other).backward()
    assert {v.dtype for v in (loss, other, *logs.values(), *more.values())} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [vq_model, kl_model])
def test_a_few_steps_lower_the_error(make):
    model, x = make(), pictures(4)
    x = F.interpolate(F.avg_pool2d(x, 8), scale_factor=8) * 3  # 2 x 2 plain patches
    if make is vq_model:
        initialize_codebook(model, x)
    criterion = FirstStageLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for step in range(40):
        loss, logs = first_stage_step(model, criterion, x, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(logs["l1"].item())
    assert min(errors[-5:]) < 0.5 * errors[0]


class Wrapper(nn.Module):
    """As DistributedDataParallel: the network is `module`, and only calls of the wrapper count."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("make", [vq_model, kl_model])
def test_a_wrapped_model_is_called_through_its_wrapper(make):
    model, x = Wrapper(make()), pictures()
    _, logs = first_stage_step(model, FirstStageLoss(), x, step=0)
    assert model.calls == 1
    assert ("perplexity" in logs) == (make is vq_model)


def test_codebook_starts_at_encoder_outputs():
    model, x = vq_model(), pictures()
    initialize_codebook(model, x)
    assert first_stage_step(model, FirstStageLoss(), x, step=0)[1]["codebook_usage"] > 0.9


def test_adaptive_weight_against_autograd_by_hand():
    """The weight of the adversarial term, from gradients worked out without torch.autograd.grad on a linear
    layer."""
    layer = torch.randn(3, 4, requires_grad=True)
    hidden, target, direction = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3)
    y = hidden @ layer.T
    nll, generator_loss = (y - target).square().mean(), -(y @ direction).mean()
    nll_gradient = (2 / 15 * (y - target)).T @ hidden
    generator_gradient = -direction[:, None] * hidden.mean(0)
    expected = nll_gradient.norm() / (generator_gradient.norm() + 1e-4)
    torch.testing.assert_close(adaptive_weight(nll, generator_loss, layer), expected.detach())
    assert adaptive_weight(nll * 1e9, generator_loss, layer) == 1e4
    assert not adaptive_weight(nll, generator_loss, layer).requires_grad


def test_adversarial_term_enters_with_its_adaptive_weight():
    model, x = vq_model().eval(), pictures()
    criterion = FirstStageLoss(**ADVERSARIAL).eval()
    output = first_stage_forward(model, x)
    loss, logs = first_stage_step(model, criterion, x, step=0, output=output)
    plain, _ = first_stage_step(model, FirstStageLoss(), x, step=0, output=output)
    generator_loss = -criterion.discriminator(output.sample).mean()
    weight = adaptive_weight((output.sample - x).abs().mean(), generator_loss, model.decoder.conv_out.weight)
    torch.testing.assert_close(loss, plain + 0.5 * weight * generator_loss)
    torch.testing.assert_close(logs["disc_weight"], 0.5 * weight)


def test_discriminator_waits_for_its_start():
    model, x = vq_model(), pictures()
    criterion = FirstStageLoss(**ADVERSARIAL, disc_start=10)
    assert [criterion.adversarial(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert "generator_loss" not in first_stage_step(model, criterion, x, step=9)[1]
    assert "generator_loss" in first_stage_step(model, criterion, x, step=10)[1]
    assert not FirstStageLoss().adversarial(10**9)


def test_validation_needs_no_gradient():
    model, x = vq_model().eval(), pictures()
    with torch.no_grad():
        loss, logs = first_stage_step(model, FirstStageLoss(**ADVERSARIAL), x, step=0)
    assert loss.isfinite()
    assert "generator_loss" in logs


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_discriminator_loss_against_the_formula(name):
    model, x = vq_model(), pictures()
    criterion = FirstStageLoss(**ADVERSARIAL, disc_loss=name).eval()
    output = first_stage_forward(model, x)
    loss, logs = criterion.discriminator_loss(output, x)
    real, fake = (criterion.discriminator(images).double() for images in (x, output.sample))
    if name == "hinge":
        expected = ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2
    else:
        expected = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["logits_real"].item() == pytest.approx(real.mean().item(), abs=1e-6)


def test_discriminator_has_the_shape_and_names_of_taming_transformers():
    network = NLayerDiscriminator()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 1, 6, 6)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert {name for name, _ in network.named_parameters() if "bias" in name} == {
        "main.0.bias", "main.3.bias", "main.6.bias", "main.9.bias", "main.11.bias",
    }  # fmt: skip


def test_an_unknown_discriminator_loss_is_refused():
    with pytest.raises(ConfigError, match="'wgan'; accepted: hinge, vanilla"):
        FirstStageLoss(disc_loss="wgan")


def test_psnr():
    target = torch.zeros(1, 3, 4, 4)
    assert psnr(target + 0.2, target).item() == pytest.approx(20.0)  # peak to peak 2, error 0.2
    assert psnr(target + 7.0, target).item() == pytest.approx(10 * torch.tensor(4.0).log10().item())
    assert psnr(target, target).item() == pytest.approx(100.0)


def test_without_lpips_weights_one_warning_and_no_perceptual_term():
    with pytest.warns(UserWarning, match="training without the perceptual") as caught:
        criterion = FirstStageLoss(perceptual_weight=1.0)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    model, x = vq_model(), pictures()
    output = first_stage_forward(model, x)
    loss, logs = first_stage_step(model, criterion, x, step=0, output=output)
    assert "lpips" not in logs
    assert torch.equal(loss, first_stage_step(model, FirstStageLoss(), x, step=0, output=output)[0])


@pytest.fixture(scope="module")
def vgg() -> dict[str, torch.Tensor]:
    """Random weights in this library's names; halves, to be quick to write."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in LPIPS().state_dict().items():
        fan_in = max(value[0].numel(), 1)
        weights[name] = (torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5).half()
    for stage in range(5):
        weights[f"lin{stage}.weight"] = weights[f"lin{stage}.weight"].abs()
    return weights


def lpips_by_hand(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The distance in float64, convolution by convolution."""
    shift, scale = (
        torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).double().view(2, 1, 3, 1, 1)
    )
    hidden = [(images.double() - shift) / scale for images in (x, y)]
    total = 0.0
    for stage, convolutions in enumerate(STAGES):
        if stage:
            hidden = [F.max_pool2d(h, 2) for h in hidden]
        for i in convolutions:
            w, b = weights[f"features.{i}.weight"].double(), weights[f"features.{i}.bias"].double()
            hidden = [F.conv2d(h, w, b, padding=1).clamp_min(0) for h in hidden]
        a, b = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10) for h in hidden)
        total = total + F.conv2d((a - b) ** 2, weights[f"lin{stage}.weight"].double()).mean((1, 2, 3))
    return total


def test_lpips_from_the_files_there_are(tmp_path, vgg):
    x, y = pictures(), pictures()
    expected = lpips_by_hand(vgg, x, y).float()
    features = {k: v for k, v in vgg.items() if k.startswith("features")}
    linear = {re.sub(r"(lin\d)", r"\1.model.1", k): v for k, v in vgg.items() if k.startswith("lin")}
    torch.save({**features, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "linear.pth")
    model = LPIPS.from_files([tmp_path / "vgg16.pth", tmp_path / "linear.pth"])
    torch.testing.assert_close(model(x, y), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(x, x), torch.zeros(2))

    stage_of = {i: stage for stage, convolutions in enumerate(STAGES, start=1) for i in convolutions}
    taming = {
        f"net.slice{stage_of[int(k.split('.')[1])]}.{k.removeprefix('features.')}": v
        for k, v in features.items()
    }
    torch.save({**taming, **linear, "scaling_layer.shift": torch.zeros(1)}, tmp_path / "lpips.pth")
    torch.testing.assert_close(LPIPS.from_files(tmp_path / "lpips.pth")(x, y), expected, rtol=1e-4, atol=1e-6)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion = FirstStageLoss(perceptual_weight=0.5, lpips_weights=str(tmp_path / "lpips.pth"))
    network = vq_model()
    output = first_stage_forward(network, x)
    loss, logs = first_stage_step(network, criterion, x, step=0, output=output)
    plain, _ = first_stage_step(network, FirstStageLoss(), x, step=0, output=output)
    torch.testing.assert_close(
        logs["lpips"], lpips_by_hand(vgg, output.sample, x).mean().float(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(loss, plain + 0.5 * logs["lpips"])
    loss.backward()
    assert all(p.grad is None for p in criterion.parameters())
    assert not criterion.train().lpips.training

    with pytest.raises(CheckpointError, match=r"lack 5 of 31 tensors .*lin0\.weight"):
        LPIPS.from_files(tmp_path / "vgg16.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read LPIPS weights"):
        LPIPS.from_files(tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="cannot read LPIPS weights"):
        LPIPS.from_files(tmp_path / "missing.pth")
