"""A learned variance: DDPM's steps against both of diffusers' schedulers that know it, and other samplers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler

from fastldm.diffusion import (
    NoiseSchedule,
    classifier_free,
    ddim_step,
    ddpm_step,
    euler_step,
    gradient_guided,
    noise_levels,
    plms_step,
    sample_ddpm,
    sample_flow_euler,
    split_variance,
)
from fastldm.diffusion.samplers import DRAWING, SAMPLERS
from fastldm.diffusion.variance import learned_log_variance
from fastldm.errors import InputError

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": SCALED,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {**SCALED, "rescale_betas_zero_snr": True},
}
LEARNED = [
    pytest.param({**betas, "prediction_type": kind}, id=f"{name}-{kind}")
    for name, betas in BETAS.items()
    for kind in ("epsilon", "sample", "v_prediction")
    if not (name == "zero_snr" and kind == "epsilon")
]


def near(actual, expected, limit=1e-5):
    """1e-5 of the result's size: epsilon at the noisy end of the cosine schedule makes x0 as large as 2e4."""
    assert actual.dtype == expected.dtype
    atol = limit * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def some_of(steps):
    """Each timestep of a walk with the next one; of a long walk every ninth, and the last three."""
    pairs = list(zip(steps, [*steps[1:], -1]))
    return pairs if len(pairs) < 100 else pairs[:-3:9] + pairs[-3:]


def drawn(t, dtype=torch.float32):
    """x, an output whose v goes a little beyond [-1, 1], and the noise that the peer draws."""
    x, prediction = torch.randn(2, 2, 3, 4, 4, dtype=dtype)
    v = 2.2 * torch.rand(2, 3, 4, 4, dtype=dtype) - 1.1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=dtype)
    return x, torch.cat([prediction, v], dim=1), noise


@pytest.mark.parametrize(("count", "spacing"), [(1000, "leading"), (50, "leading"), (7, "linspace")])
@pytest.mark.parametrize("fields", LEARNED)
def test_every_ddpm_step_is_the_peer_s(fields, count, spacing):
    peer = DDPMScheduler(**fields, variance_type="learned_range", timestep_spacing=spacing, clip_sample=False)
    peer.set_timesteps(count)
    schedule = NoiseSchedule.from_config(peer.config)
    steps = schedule.timesteps(count).tolist()
    assert steps == peer.timesteps.tolist()
    for t, prev_t in some_of(steps):
        x, output, noise = drawn(t)
        theirs = peer.step(output, t, x, generator=torch.Generator().manual_seed(t))
        ours = ddpm_step(output, t, prev_t, x, schedule, noise=noise if t > 0 else None)
        near(ours.prev_sample, theirs.prev_sample)
        near(ours.pred_original_sample, theirs.pred_original_sample)


@pytest.mark.parametrize("count", [1000, 27])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_every_ddpm_step_is_unclip_s(kind, clip, count):
    peer = UnCLIPScheduler(variance_type="learned_range", prediction_type=kind, clip_sample=clip)
    peer.set_timesteps(count)
    # To t - 1 it takes beta_t from the table, not from abar: in float32 that alone moves x by up to 6e-4.
    abar = peer.alphas_cumprod
    peer.betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    peer.alphas = 1 - peer.betas
    schedule = NoiseSchedule.cosine(
        variance_type="learned_range",
        prediction_type=kind,
        clip_sample=clip,
        timestep_spacing="linspace",
    )
    steps = schedule.timesteps(count).tolist()
    assert steps == peer.timesteps.tolist()
    for t, prev_t in some_of(steps):
        x, output, _ = drawn(t)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t)) if t > 0 else None
        theirs = peer.step(output, t, x, prev_t, generator=torch.Generator().manual_seed(t))
        ours = ddpm_step(output, t, prev_t, x, schedule, noise=noise)
        # It has alpha as 1 - (1 - alpha): of the 6e-7 from 999 to 961 that leaves one digit.
        near(ours.prev_sample, theirs.prev_sample, 1e-4 if t - prev_t > 1 and t == 999 else 1e-5)
        near(ours.pred_original_sample, theirs.pred_original_sample)


def toy(x, t):
    """A stand-in for a network with a learned variance; its x0 is in the range of data."""
    shift = t.reshape(-1, 1, 1, 1).to(x.dtype) / 500 - 1
    return torch.cat([torch.tanh(0.7 * x + shift), torch.sin(3 * x + shift)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_the_whole_walk_is_the_peer_s(spacing, dtype):
    fields = {**SCALED, "prediction_type": "sample", "timestep_spacing": spacing, "clip_sample": False}
    peer = DDPMScheduler(**fields, variance_type="learned_range")
    peer.set_timesteps(20)
    schedule = NoiseSchedule.from_config(peer.config)
    x = start = torch.randn(2, 3, 4, 4, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for t in peer.timesteps:
        x = peer.step(toy(x, t.expand(2)), int(t), x, generator=generator).prev_sample
    found = sample_ddpm(
        toy, start, schedule, schedule.timesteps(20), generator=torch.Generator().manual_seed(5)
    )
    near(found, x)


def posterior_variance(schedule, t, prev_t):
    a, prev = (schedule.alphas_cumprod[i].double() if i >= 0 else 1.0 for i in (t, prev_t))
    return float((1 - prev) / (1 - a) * (1 - a / prev))


def test_guidance_moves_the_mean_by_the_learned_variance_of_x_t():
    """mu + s Sigma grad, written out for respaced steps; at the end the range begins at the step before's."""
    schedule = NoiseSchedule(**SCALED, variance_type="learned_range", prediction_type="sample")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    timesteps, scale, asked = [700, 300, 40], 2.5, []

    def gradient(x, t):
        asked.append((x.clone(), t.tolist()))
        return torch.cos(5 * x)

    seen, expected = [x], []
    sample_ddpm(
        toy,
        x,
        schedule,
        timesteps,
        guidance=gradient,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        callback=lambda i, t, x, x0: seen.append(x),
    )
    generator = torch.Generator().manual_seed(3)
    for i, (t, prev_t) in enumerate([(700, 300), (300, 40), (40, -1)]):
        x = seen[i]
        x0, v = toy(x, torch.tensor([t, t])).chunk(2, dim=1)
        a, prev = (schedule.alphas_cumprod[i].double() if i >= 0 else torch.tensor(1.0) for i in (t, prev_t))
        beta = 1 - a / prev
        mean = prev.sqrt() * beta / (1 - a) * x0 + (a / prev).sqrt() * (1 - prev) / (1 - a) * x
        low = posterior_variance(schedule, *((t, prev_t) if prev_t >= 0 else (300, 40)))
        variance = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * math.log(low))
        out = mean + scale * variance * torch.cos(5 * x)
        if prev_t >= 0:
            out = out + variance.sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        expected.append(out)
        assert torch.equal(asked[i][0], x)
        assert asked[i][1] == [t, t]
    for out, theirs in zip(seen[1:], expected, strict=True):
        torch.testing.assert_close(out, theirs, atol=1e-6, rtol=0)
        assert (out - theirs).abs().max() < 1e-3 * (scale * variance).abs().max()


def test_the_end_of_all_timesteps_begins_at_the_variance_of_t_1():
    """guided-diffusion's clipped posterior: at t = 0 and v = -1 a gradient of 1 moves x by that of t = 1."""
    schedule = NoiseSchedule.linear(variance_type="learned_range", prediction_type="sample")
    x, gradient = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    lowest = torch.cat([x, x - 1], dim=1)
    highest = torch.cat([x, x + 1], dim=1)
    moved = ddpm_step(lowest, 0, -1, x, schedule, gradient=gradient).prev_sample
    torch.testing.assert_close(
        moved, torch.full_like(x, posterior_variance(schedule, 1, 0)), atol=0, rtol=2e-3
    )
    moved = ddpm_step(highest, 0, -1, x, schedule, gradient=gradient).prev_sample
    torch.testing.assert_close(moved, torch.full_like(x, schedule.betas[0].item()), atol=0, rtol=1e-3)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_single_step_from_the_last_timestep_has_the_variance_beta(zero_snr):
    schedule = NoiseSchedule.linear(
        variance_type="learned_range", prediction_type="sample", rescale_betas_zero_snr=zero_snr
    )
    x, gradient = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    out = sample_ddpm(lambda x, t: torch.cat([x, x], 1), x, schedule, [999], guidance=lambda x, t: gradient)
    torch.testing.assert_close(out, (1 - schedule.alphas_cumprod[999]).expand_as(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_other_samplers_use_the_first_half(sampler):
    fixed = NoiseSchedule(**SCALED, prediction_type="sample")
    learned = NoiseSchedule(**SCALED, prediction_type="sample", variance_type="learned_range")
    levels = noise_levels(fixed, sampler, 5)
    x = torch.randn(2, 3, 4, 4)

    def walk(denoiser, schedule):
        options = {} if levels.sigmas is None else {"sigmas": levels.sigmas}
        if sampler in DRAWING:
            options["generator"] = torch.Generator().manual_seed(1)
        return SAMPLERS[sampler](denoiser, x, schedule, levels.timesteps, **options)

    assert torch.equal(walk(toy, learned), walk(lambda x, t: toy(x, t).chunk(2, dim=1)[0], fixed))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_gradient_guidance_moves_the_first_half_alone(kind):
    fixed = NoiseSchedule(**SCALED, prediction_type=kind)
    learned = NoiseSchedule(**SCALED, prediction_type=kind, variance_type="learned_range")
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([5, 800])
    prediction, v = toy(x, t).chunk(2, dim=1)
    moved = gradient_guided(toy, lambda x, t: torch.cos(x), 1.5, learned)(x, t)
    alone = gradient_guided(lambda x, t: prediction, lambda x, t: torch.cos(x), 1.5, fixed)(x, t)
    assert torch.equal(moved, torch.cat([alone, v], dim=1))
    assert not torch.equal(alone, prediction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_keep_their_dtype_and_extremes_stay_finite(dtype):
    schedule = NoiseSchedule.linear(variance_type="learned_range", prediction_type="sample")
    x, output, noise = (value.to(dtype) for value in drawn(500))
    exact = ddpm_step(output.float(), 500, 480, x.float(), schedule, noise=noise.float()).prev_sample
    found = ddpm_step(output, 500, 480, x, schedule, noise=noise).prev_sample
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=0.02 if dtype == torch.bfloat16 else 0.003, rtol=0)
    extremes = torch.tensor([-6e4, 6e4, -1.0, 1.0]).to(dtype)
    log_variance = learned_log_variance(extremes, torch.tensor(1e-20), torch.tensor(0.02))
    assert log_variance.dtype == torch.float32
    assert log_variance.exp().isfinite().all()
    assert (-log_variance).exp().isfinite().all()


def test_outputs_of_another_shape_are_refused():
    fixed = NoiseSchedule.linear()
    learned = NoiseSchedule.linear(variance_type="learned_range")
    x, both = torch.randn(1, 3, 4, 4), torch.randn(1, 6, 4, 4)
    steps = [
        lambda output, schedule: ddim_step(output, 9, 5, x, schedule),
        lambda output, schedule: ddpm_step(output, 9, 5, x, schedule),
        lambda output, schedule: plms_step([output], 9, 5, x, schedule),
        lambda output, schedule: euler_step(output, 2.0, 1.0, x, schedule),
        lambda output, schedule: gradient_guided(lambda x, t: output, lambda x, t: x, 1.0, schedule)(
            x, torch.tensor([9])
        ),
        *(
            lambda output, schedule, sampler=sampler: sampler(lambda x, t: output, x, schedule, [9])
            for sampler in SAMPLERS.values()
        ),
    ]
    for step in steps:
        with pytest.raises(InputError, match=r"gave \(1, 6, 4, 4\) .*'fixed_small' needs \(1, 3, 4, 4\)"):
            step(both, fixed)
        with pytest.raises(InputError, match=r"gave \(1, 3, 4, 4\) .*'learned_range' needs \(1, 6, 4, 4\)"):
            step(x, learned)
        with pytest.raises(InputError, match=r"gave \(1, 9, 4, 4\)") as caught:
            step(torch.randn(1, 9, 4, 4), learned)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="double the channels for a learned variance"):
        classifier_free(lambda x, t: torch.cat([x, x, x], 1), {}, {}, 2.0)(x, torch.tensor([9]))
    with pytest.raises(InputError, match=r"guidance: \(1, 6, 4, 4\) for x"):
        sample_ddpm(lambda x, t: x, x, fixed, [9], guidance=lambda x, t: both)
    with pytest.raises(InputError, match=r"denoiser: \(1, 6, 4, 4\) for x"):
        sample_flow_euler(lambda x, t: both, x, [1.0, 0.0])
    with pytest.raises(InputError, match=r"gradient: \(1, 6, 4, 4\) for x"):
        gradient_guided(lambda x, t: x, lambda x, t: both, 1.0, fixed)(x, torch.tensor([9]))
    for extra in ({"gradient": both}, {"noise": both}):
        with pytest.raises(InputError, match=r"\(1, 6, 4, 4\)"):
            ddpm_step(x, 9, 5, x, fixed, **extra)
    with pytest.raises(InputError, match="needs None"):
        split_variance(torch.randn(5), torch.randn(5), learned)
