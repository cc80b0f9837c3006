"""The latent diffusion step: what is trained, what is frozen, and the numbers of the loss."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastldm.diffusion import NoiseSchedule, hybrid_loss, simple_loss
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models.conditioners import ClassConditioner, Conditioning
from fastldm.models.vq_model import VQModel
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.data import StreamSampler, batches
from fastldm.training.datasets import CaptionedShapes, export_image_folder
from fastldm.training.latent_diffusion import LatentDiffusionTask, latent_diffusion_loss
from fastldm.training.loop import train

CPU = torch.device("cpu")


class Linear(nn.Module):
    """A denoiser that the test can compute by hand: w x_t + mean of the context."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))
        self.dtype = dtype
        self.calls = []

    def forward(self, x, t, encoder_hidden_states=None):
        self.calls.append(SimpleNamespace(x=x.detach(), t=t, context=encoder_hidden_states))
        bias = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return SimpleNamespace(sample=(self.w * x + bias).to(self.dtype))


class Labels(nn.Module):
    """tau_theta of integer labels: label k to the token (k, k); null = -1."""

    def forward(self, labels):
        return Conditioning(context=labels.float()[:, None, None].expand(-1, 1, 2))

    def null_like(self, labels):
        return torch.full_like(labels, -1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(task):
    """What the loop does before the first step; returns the first batch."""
    task.to(CPU)
    stream = batches(task.dataset, StreamSampler(len(task.dataset), 4, seed=0))
    batch = next(stream)
    task.start(batch)
    return batch


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_of_what_is_predicted(prediction_type):
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    unet, z, labels = Linear(), torch.randn(5, 4, 8, 8), torch.arange(5)
    loss = latent_diffusion_loss(
        unet, Labels(), schedule, z, labels, generator=generator(), condition_dropout=0.0
    )
    call = unet.calls[0]
    a = schedule.alphas_cumprod[call.t][:, None, None, None].double()
    noise = (call.x.double() - a.sqrt() * z) / (1 - a).sqrt()
    target = {"epsilon": noise, "sample": z.double(), "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * z}
    predicted = 0.7 * call.x.double() + labels[:, None, None, None]
    expected = (predicted - target[prediction_type]).square().mean()
    # Dividing by sqrt(1 - abar) >= 0.029 to get the noise back costs up to 1/0.029 float32 roundings.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.2


def test_timesteps_are_uniform_and_reproducible():
    schedule = NoiseSchedule.cosine(20)
    unet, z, labels = Linear(), torch.zeros(4000, 1, 2, 2), torch.zeros(4000, dtype=torch.int64)
    for _ in range(2):
        latent_diffusion_loss(unet, Labels(), schedule, z, labels, generator=generator(3))
    one, other = unet.calls
    assert torch.equal(one.t, other.t)
    assert torch.equal(one.x, other.x)
    counts = torch.bincount(one.t, minlength=20)
    # 200 expected each, standard deviation sqrt(200 * 0.95) = 13.8: five of them.
    assert (counts - 200).abs().max() < 69


def test_conditions_are_dropped_with_the_given_probability():
    schedule, labels = NoiseSchedule.cosine(), torch.arange(1, 4001)
    z = torch.zeros(4000, 1, 2, 2)
    for probability, low, high in ((0.0, 0, 0), (0.1, 305, 495), (1.0, 4000, 4000)):
        unet = Linear()
        latent_diffusion_loss(
            unet, Labels(), schedule, z, labels, generator=generator(), condition_dropout=probability
        )
        context = unet.calls[0].context[:, 0, 0]
        dropped = context == -1
        # 400 expected at p = 0.1, standard deviation sqrt(4000 * 0.09) = 19: five of them.
        assert low <= int(dropped.sum()) <= high
        assert torch.equal(context[~dropped], labels[~dropped].float())


def test_the_loss_is_float32_where_the_denoiser_answers_in_half():
    schedule = NoiseSchedule.cosine(prediction_type="sample")
    # 300^2 = 90000 is beyond float16, and 300 + 1/8 is not a bfloat16.
    z = torch.full((2, 1, 2, 2), 300.125)
    unet = Linear(torch.float16)
    nn.init.zeros_(unet.w)
    with torch.autocast("cpu", torch.bfloat16):
        loss = latent_diffusion_loss(
            unet, Labels(), schedule, z, torch.zeros(2, dtype=torch.int64), generator=generator()
        )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(300.125**2, rel=2e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_make_one_loss_of_all_prediction_types(prediction_type):
    """min(SNR, gamma) ||x0 - x0_hat||^2 for each type (Hang et al. 2023, section 3.4)."""
    gamma, schedule = 5.0, NoiseSchedule.cosine(prediction_type=prediction_type)
    unet, z, labels = Linear(), torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64)
    loss = latent_diffusion_loss(
        unet, Labels(), schedule, z, labels, generator=generator(5), condition_dropout=0.0, snr_gamma=gamma
    )
    call = unet.calls[0]
    a = schedule.alphas_cumprod[call.t].double()
    x, output = call.x.double(), 0.7 * call.x.double()
    x0 = {
        "epsilon": (x - (1 - a).sqrt() * output) / a.sqrt(),
        "sample": output,
        "v_prediction": a.sqrt() * x - (1 - a).sqrt() * output,
    }[prediction_type]
    expected = torch.clamp(a / (1 - a), max=gamma) * (z - x0).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


class LinearWithVariance(Linear):
    """And v = u x_t."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, encoder_hidden_states=None):
        first = super().forward(x, t, encoder_hidden_states).sample
        return SimpleNamespace(sample=torch.cat([first, self.u * x], dim=1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_learned_variance_trains_with_the_hybrid_loss(prediction_type):
    schedule = NoiseSchedule.cosine(prediction_type=prediction_type, variance_type="learned_range")
    unet, z, labels = LinearWithVariance(), torch.randn(5, 4, 8, 8), torch.zeros(5, dtype=torch.int64)
    settings = {"generator": generator(), "condition_dropout": 0.0, "snr_gamma": 5.0}
    loss = latent_diffusion_loss(unet, Labels(), schedule, z, labels, **settings)
    loss.backward()
    t, x = unet.calls[0].t, unet.calls[0].x
    a = schedule.alphas_cumprod[t][:, None, None, None]
    noise = (x - a.sqrt() * z) / (1 - a).sqrt()
    output = torch.cat([0.7 * x, 0.3 * x], dim=1)
    expected = hybrid_loss(output, z, noise, t, schedule, snr_gamma=5.0).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    # the bound leaves the first half to the squared error
    simple = simple_loss(torch.cat([unet.w * x, x], dim=1), z, noise, t, schedule, snr_gamma=5.0).mean()
    (of_w,) = torch.autograd.grad(simple, unet.w)
    assert unet.w.grad.item() == pytest.approx(of_w.item(), rel=1e-4)
    assert unet.u.grad.item() != 0


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_the_configuration_s_variance_type_reaches_the_denoiser_and_the_export(ldm_config, sampler):
    config = ldm_config("schedule.variance_type=learned_range", f"sampling.sampler={sampler}", "max_steps=2")
    tasks = []

    def build():
        tasks.append(LatentDiffusionTask(config))
        tasks[0].fresh = tasks[0].module.unet.conv_out.weight.detach().clone()
        return tasks[0]

    folder = train(config, build, progress=False)
    moved = (tasks[0].module.unet.conv_out.weight != tasks[0].fresh).flatten(1).any(dim=1)
    assert moved.tolist() == [True] * 8
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    assert pipeline.schedule.variance_type == "learned_range"
    assert pipeline.sampler == sampler
    picture = pipeline("a red circle", num_inference_steps=2, output_type="pt", progress=False).images
    assert picture.isfinite().all()
    with pytest.raises(ConfigError, match=r"out_channels is 4, but latents of 4 .*'learned_range' need 8"):
        LatentDiffusionTask(ldm_config("schedule.variance_type=learned_range", "unet.out_channels=4"))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_configuration_says_how_often_conditions_are_dropped(ldm_config, probability):
    task, seen = LatentDiffusionTask(ldm_config(f"condition_dropout={probability}")), []
    prepared = task.prepare(start(task), generator())
    conditioner = task.module.conditioner
    conditioner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for seed in range(10):
        task.module(prepared, step=0, generator=generator(seed))
    given = prepared["condition"]
    wanted = conditioner.null_like(given) if probability else given
    assert not torch.equal(given, conditioner.null_like(given))
    assert len(seen) == 10
    assert all(torch.equal(condition, wanted) for condition in seen)


def test_the_configuration_says_the_gamma_of_the_min_snr_weights(ldm_config):
    task = LatentDiffusionTask(ldm_config("snr_gamma=0.5"))
    prepared = task.prepare(start(task), generator())
    module = task.module.eval()
    found, _ = module(prepared, step=0, generator=generator(1))
    weighted, plain = (
        latent_diffusion_loss(
            module.unet,
            module.conditioner,
            task.schedule,
            prepared["latents"],
            prepared["condition"],
            generator=generator(1),
            condition_dropout=0.5,
            snr_gamma=gamma,
        )
        for gamma in (0.5, None)
    )
    assert found.item() == pytest.approx(weighted.item(), rel=1e-5)
    assert found.item() != pytest.approx(plain.item(), rel=1e-2)


@pytest.mark.parametrize("cached", [False, True])
def test_latents_of_a_kl_stage_are_drawn(ldm_config, first_stages, cached):
    config = ldm_config(
        f"first_stage.path={first_stages / 'kl'}", "first_stage.scaling_factor=0.5", f"cache_latents={cached}"
    )
    task = LatentDiffusionTask(config)
    batch = start(task)
    found = task.prepare(batch, generator(7))["latents"]
    pictures = next(batches(task.pictures, StreamSampler(len(task.pictures), 4, seed=0)))["image"]
    posterior = task.first_stage.model.encode(pictures).latent_dist
    # With the cache the same convolutions run over batches of another size.
    torch.testing.assert_close(found, 0.5 * posterior.sample(generator(7)), rtol=1e-4, atol=1e-5)
    assert (found - 0.5 * posterior.mode()).std() > 0.1


@pytest.mark.parametrize("stage", ["vq", "kl"])
@pytest.mark.parametrize("cached", [False, True])
def test_first_stage_is_frozen_and_tau_and_denoiser_learn_together(ldm_config, first_stages, stage, cached):
    config = ldm_config(f"first_stage.path={first_stages / stage}", f"cache_latents={cached}", "max_steps=2")
    tasks = []

    def build():
        task = LatentDiffusionTask(config)
        task.frozen = {k: v.clone() for k, v in task.first_stage.model.state_dict().items()}
        task.fresh = {k: v.clone() for k, v in task.module.named_parameters()}
        tasks.append(task)
        return task

    train(config, build, progress=False)
    task = tasks[0]
    assert not task.first_stage.model.training
    assert not any(p.requires_grad or p.grad is not None for p in task.first_stage.model.parameters())
    assert all(torch.equal(v, task.frozen[k]) for k, v in task.first_stage.model.state_dict().items())
    ours = {id(p) for p in task.module.parameters()}
    assert not any(id(p) in ours for p in task.first_stage.model.parameters())

    moved = {k for k, v in task.module.named_parameters() if not torch.equal(v, task.fresh[k])}
    still = {k for k, v in task.module.named_parameters() if k not in moved}
    assert {k.partition(".")[0] for k in moved} == {"unet", "conditioner"}
    # LDMBert's output layer is in the folder format but takes no part; null rows may hide rarely used words.
    assert {k for k in still if task.module.get_parameter(k).requires_grad} == set()


def test_no_gradient_reaches_the_first_stage_and_one_reaches_tau(ldm_config):
    task = LatentDiffusionTask(ldm_config())
    batch = start(task)
    task.first_stage.model.requires_grad_(True)  # even then: z is computed without a graph
    prepared = task.prepare(batch, generator())
    assert not prepared["latents"].requires_grad
    loss, _ = task.module(prepared, step=0, generator=generator())
    loss.backward()
    assert all(p.grad is None for p in task.first_stage.model.parameters())
    tau = [p.grad for p in task.module.conditioner.parameters() if p.requires_grad]
    assert tau
    assert all(grad is not None and grad.abs().sum() > 0 for grad in tau)


@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_the_scaling_factor_is_one_over_the_deviation_of_the_first_batch(ldm_config, first_stages, stage):
    task = LatentDiffusionTask(ldm_config(f"first_stage.path={first_stages / stage}"))
    batch = start(task)
    z = task.prepare(batch, generator(0))["latents"]
    # A KL stage draws again: 4096 values, whose deviation varies by 1 / sqrt(2 * 4096) = 1.1%.
    assert z.std().item() == pytest.approx(1.0, rel=1e-5 if stage == "vq" else 0.08)
    assert task.pipeline().scaling_factor == task.first_stage.scaling_factor


def test_a_constant_scaling_factor_is_used_as_it_is(ldm_config):
    task = LatentDiffusionTask(ldm_config("first_stage.scaling_factor=0.25"))
    batch = start(task)
    expected = task.first_stage.model.encode(batch["image"]).latents * 0.25
    assert torch.equal(task.prepare(batch, generator())["latents"], expected)


def test_resuming_on_another_first_stage_is_refused(ldm_config, first_stages, tmp_path):
    stage = tmp_path / "stage"
    shutil.copytree(first_stages / "vq", stage)

    def run(steps):
        config = ldm_config(f"first_stage.path={stage}", f"max_steps={steps}")
        return train(config, lambda: LatentDiffusionTask(config), resume=True, progress=False)

    run(2)
    run(3)
    weights = stage / VQModel.weights_name
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"stage holds other weights than when this run began") as caught:
        run(4)
    assert "\n" not in str(caught.value)
    weights.write_bytes(before)
    run(4)


@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_cached_latents_give_the_same_batches(ldm_config, first_stages, stage):
    prepared = []
    for cached in (False, True):
        task = LatentDiffusionTask(
            ldm_config(f"first_stage.path={first_stages / stage}", f"cache_latents={cached}")
        )
        prepared.append(task.prepare(start(task), generator(7)))
    assert torch.equal(prepared[0]["condition"], prepared[1]["condition"])
    # The same convolutions over batches of another size: a few float32 roundings of values around 1.
    torch.testing.assert_close(prepared[0]["latents"], prepared[1]["latents"], rtol=1e-4, atol=1e-5)


def test_labels_and_pictures_as_conditions(ldm_config):
    by_class = ldm_config("name=class", "conditioner.kind=class", "sampling.prompts=[0, 5]", "max_steps=1")
    by_class.conditioner.config = {"num_classes": 24, "embed_dim": 16}
    folder = train(by_class, lambda: LatentDiffusionTask(by_class), progress=False)
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline.conditioner, ClassConditioner)
    assert len(pipeline([3, 4], progress=False).images) == 2

    by_class.sampling.prompts = [24]
    with pytest.raises(ConfigError, match=r"^sampling\.prompts do not fit the data: .*24"):
        LatentDiffusionTask(by_class)

    by_picture = ldm_config("name=image", "conditioner.kind=image", "sampling.prompts=[]", "max_steps=1")
    by_picture.conditioner.config = {"in_channels": 3, "out_channels": 3, "n_stages": 1}
    by_picture.unet["down_block_types"] = ["DownBlock2D", "DownBlock2D"]
    by_picture.unet["up_block_types"] = ["UpBlock2D", "UpBlock2D"]
    by_picture.unet["mid_block_type"] = None
    folder = train(by_picture, lambda: LatentDiffusionTask(by_picture), progress=False)
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    assert pipeline.unet.config.in_channels == 4 + 3
    assert pipeline(torch.zeros(2, 3, 32, 32), progress=False).images[1].size == (32, 32)


def test_an_image_folder_trains_with_its_captions_or_its_classes(ldm_config, tmp_path):
    export_image_folder(CaptionedShapes(kind="one", size=32, length=6), tmp_path / "captions")
    data = ["data.source=image_folder", f"data.path={tmp_path / 'captions'}"]
    task = LatentDiffusionTask(ldm_config(*data, "sampling.prompts=[]"))
    words = {word for i in range(6) for word in task.pictures[i]["caption"].lower().split()}
    assert words <= set(task.module.conditioner.tokenizer.words)
    loss, _ = task.module(task.prepare(start(task), generator()), step=0, generator=generator())
    assert loss.isfinite()
    with pytest.raises(ConfigError, match="kind=class needs a label"):
        LatentDiffusionTask(ldm_config(*data, "conditioner.kind=class"))


def test_what_is_cut_of_captions_is_said_once(ldm_config, said_of_captions):
    config = ldm_config("conditioner.max_length=5", "max_steps=2")
    (said,) = said_of_captions(lambda: train(config, lambda: LatentDiffusionTask(config), progress=False))
    # Shapes are drawn as they are asked for; this data set has 24 of them.
    assert re.match(r"\d+ of 24 captions are longer .*; see conditioner.max_length$", said)


def test_what_cannot_work_is_refused_before_training(ldm_config, tmp_path):
    cases = [
        (ConfigError, "first_stage.path is not set", ["first_stage.path=''"]),
        (CheckpointError, "cannot read the first stage", [f"first_stage.path={tmp_path / 'absent'}"]),
        (CheckpointError, r"first_stage\.path=shapes .*=pixels", [f"first_stage.path={tmp_path / 'absent'}"]),
        (ConfigError, r"data\.num_workers=99999 for \d+ cores; give at most", ["data.num_workers=99999"]),
        (ConfigError, r"^sampling\.prompts .*zebra.* sampling\.prompts=\[\]", ["sampling.prompts=[zebra]"]),
        (InputError, "num_inference_steps=2000", ["sampling.num_inference_steps=2000"]),
        (InputError, "use 1 to 999", ["sampling.num_inference_steps=1000", "sampling.sampler=unipc"]),
        (ConfigError, "in_channels is 9", ["unet.in_channels=9"]),
        (ConfigError, "block_widths", ["unet.block_widths=3"]),
        (
            ConfigError,
            "prompts has no meaning",
            ["conditioner.kind=image", "conditioner.config={}", "unet.cross_attention_dim=16"],
        ),
        (ConfigError, "data.path", ["data.source=image_folder"]),
        (ConfigError, "no single class", ["conditioner.kind=class", "data.kind=two"]),
    ]
    for error, message, overrides in cases:
        with pytest.raises(error, match=message) as caught:
            LatentDiffusionTask(ldm_config(*overrides))
        assert "\n" not in str(caught.value)

    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ConfigError, match="holds a UNet2DConditionModel"):
        LatentDiffusionTask(ldm_config(f"first_stage.path={tmp_path}"))
