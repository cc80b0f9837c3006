"""Whole walks of every sampler, step by step against diffusers' schedulers and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from fastldm.diffusion import (
    NoiseLevels,
    NoiseSchedule,
    dpmpp_2m_step,
    euler_ancestral_step,
    euler_step,
    flow_euler_step,
    flow_sigmas,
    heun_step,
    karras_sigmas,
    noise_levels,
    plms_step,
    sample_euler,
    sample_flow_euler,
    sample_plms,
    sample_unipc,
    shift_sigmas,
)
from fastldm.diffusion.samplers import DRAWING, SAMPLERS
from fastldm.errors import InputError

PEERS = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
DISCRETE_PEERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "plms": PNDMScheduler}
# diffusers' EulerAncestralDiscreteScheduler has no Karras levels.
WITH_KARRAS = [
    pytest.param(sampler, karras, id=f"{sampler}-{'karras' if karras else 'plain'}")
    for sampler in PEERS
    for karras in (False, True)
    if not (karras and sampler == "euler_ancestral")
]
# Those that carry x sqrt(1 + sigma^2).
VARIANCE_EXPLODING = ("euler", "euler_ancestral", "heun")
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
LIMIT = 1e-5


def toy(kind):
    """A stand-in for a network: not linear in x, different at every timestep, and x0 in the range of data."""
    schedule = NoiseSchedule(**STABLE_DIFFUSION)

    def denoiser(x, t):
        alpha_bar = schedule.alpha_bar(x, t).to(x.dtype)
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x0 = torch.tanh(1.3 * x + 0.4 * torch.sin(t.reshape(-1, 1, 1, 1).to(x.dtype) / 90)) + 0.2 * x
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]

    return denoiser


denoiser = toy("epsilon")


def near(actual, expected, what="", limit=LIMIT):
    assert actual.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    difference = (actual - expected).abs().max().item()
    assert difference <= limit, f"{what}: {difference:.2e} apart"


def limit_of_step(sampler, sigma, next_sigma):
    """1e-5, but for Heun steps that fall a hundredfold at once (2 of "linspace", from 14.6 to 0.03).

    They divide a difference of float32 numbers as large as sigma by next_sigma, and the peer keeps its sigmas
    in float32 for float64 samples too.
    """
    if sampler == "heun" and next_sigma > 0 and sigma > 100 * next_sigma:
        return 2 * torch.finfo(torch.float32).eps * sigma * sigma / next_sigma
    return LIMIT


def record(sampler, x, schedule, levels, generator=None, denoiser=denoiser):
    """x after each step, and the predicted x0 of each step."""
    steps = []
    options = {} if levels.sigmas is None else {"sigmas": levels.sigmas}
    if sampler in DRAWING and generator is not None:
        options["generator"] = generator

    def callback(i, t, x, x0):
        steps.append((x, x0))

    out = SAMPLERS[sampler](denoiser, x, schedule, levels.timesteps, callback=callback, **options)
    assert out is steps[-1][0]
    return steps


def peer_steps(sampler, peer, x, generator=None, denoiser=denoiser):
    """x after each step of diffusers' loop, in the scale of the schedule, from the same start."""
    steps = []
    exploding = sampler in VARIANCE_EXPLODING
    if exploding:
        x = x * (1 + peer.sigmas[0] ** 2).sqrt().to(x.dtype)
    for i, t in enumerate(peer.timesteps):
        output = denoiser(peer.scale_model_input(x, t), t.expand(len(x)))
        options = {} if generator is None else {"generator": generator}
        x = peer.step(output, t, x, **options).prev_sample
        steps.append(x / (1 + peer.sigmas[i + 1] ** 2).sqrt().to(x.dtype) if exploding else x)
    # Heun's first stage of each but the last step is not a step of its own
    return steps[1::2] + steps[-1:] if sampler == "heun" else steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# From 15 steps on the last one of DPM-Solver++ 2M is of second order where it does not go to 0.
@pytest.mark.parametrize("count", [1, 2, 5, 14, 15, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "karras"), WITH_KARRAS)
def test_every_step_is_the_peer_s(sampler, kind, spacing, karras, count, dtype):
    fields = {**STABLE_DIFFUSION, "prediction_type": kind, "timestep_spacing": spacing}
    schedule = NoiseSchedule(**fields)
    peer = PEERS[sampler](**fields, **({"use_karras_sigmas": True} if karras else {}))
    peer.set_timesteps(count)
    levels = noise_levels(schedule, sampler, count, karras=karras)
    keep = slice(None)
    if sampler == "heun":
        keep = [0, *range(1, 2 * count - 1, 2)]
    torch.testing.assert_close(levels.timesteps.double(), peer.timesteps[keep].double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        levels.sigmas, peer.sigmas[[*keep, -1] if sampler == "heun" else keep], atol=0, rtol=1e-6
    )

    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    seeded = [torch.Generator().manual_seed(5) if sampler in DRAWING else None for _ in range(2)]
    expected = peer_steps(sampler, peer, x, seeded[0], toy(kind))
    ours = record(sampler, x, schedule, levels, seeded[1], toy(kind))
    assert len(ours) == len(expected) == count
    limit = 0.0
    for i, ((out, x0), theirs) in enumerate(zip(ours, expected)):
        limit = max(limit, limit_of_step(sampler, *levels.sigmas[i : i + 2].tolist()))
        near(out, theirs, f"step {i}", limit)
        assert torch.isfinite(x0).all()
    assert torch.equal(ours[-1][0], ours[-1][1]), "a step to sigma 0 gives the predicted x0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "plms"])
def test_every_step_on_timesteps_of_training_is_the_peer_s(sampler, kind, spacing, count, dtype):
    """Spacing "linspace" for DDPM alone: the other peers step down by 1000 // count, past its timesteps."""
    if spacing == "linspace" and sampler != "ddpm":
        spacing, count = "leading", {1: 3, 2: 7, 4: 9}.get(count, count)
    fields = {**STABLE_DIFFUSION, "prediction_type": kind, "timestep_spacing": spacing}
    own = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False, "set_alpha_to_one": False}}
    peer = DISCRETE_PEERS[sampler](**fields, **own.get(sampler, {"skip_prk_steps": True}))
    peer.set_timesteps(count)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    seeded = [torch.Generator().manual_seed(5) if sampler == "ddpm" else None for _ in range(2)]
    expected = peer_steps(sampler, peer, x, seeded[0], toy(kind))
    if sampler == "plms" and count > 1:
        del expected[0]
    schedule = NoiseSchedule(**fields, set_alpha_to_one=False)
    levels = noise_levels(schedule, sampler, count)
    ours = record(sampler, x, schedule, levels, seeded[1], denoiser=toy(kind))
    assert len(ours) == len(expected) == count
    for i, ((out, _), theirs) in enumerate(zip(ours, expected)):
        near(out, theirs, f"step {i}")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("karras", [False, True], ids=["plain", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc"])
def test_every_step_from_a_predicted_sample_is_the_peer_s(sampler, karras, spacing):
    """Of those peers that take one."""
    fields = {**STABLE_DIFFUSION, "prediction_type": "sample", "timestep_spacing": spacing}
    peer = PEERS[sampler](**fields, use_karras_sigmas=karras)
    peer.set_timesteps(6)
    x, schedule = torch.randn(2, 3, 4, 4), NoiseSchedule(**fields)
    expected = peer_steps(sampler, peer, x, denoiser=toy("sample"))
    levels = noise_levels(schedule, sampler, 6, karras=karras)
    ours = record(sampler, x, schedule, levels, denoiser=toy("sample"))
    assert len(ours) == len(expected) == 6
    for i, ((out, _), theirs) in enumerate(zip(ours, expected)):
        near(out, theirs, f"step {i}")


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler != "plms"])
def test_what_is_predicted_changes_no_walk(sampler, spacing, learned):
    """But for PLMS, which combines predictions as they are."""
    walks = []
    for kind in ("epsilon", "sample", "v_prediction"):
        variance = {"variance_type": "learned_range"} if learned else {}
        fields = {**STABLE_DIFFUSION, "timestep_spacing": spacing, "prediction_type": kind, **variance}
        schedule, predicted = NoiseSchedule(**fields), toy(kind)

        def denoiser(x, t, predicted=predicted):
            return torch.cat([predicted(x, t), x.cos()], dim=1) if learned else predicted(x, t)

        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        levels = noise_levels(schedule, sampler, 4)
        noise = torch.Generator().manual_seed(2) if sampler in DRAWING else None
        walks.append(record(sampler, x, schedule, levels, noise, denoiser)[-1][0])
    near(walks[1], walks[0], "sample")
    near(walks[2], walks[0], "v_prediction")


@pytest.mark.parametrize("count", [2, 10, 20])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc"])
def test_a_walk_may_end_above_0(sampler, count):
    peer = PEERS[sampler](
        **{**STABLE_DIFFUSION, "timestep_spacing": "trailing"}, final_sigmas_type="sigma_min"
    )
    peer.set_timesteps(count)
    schedule = NoiseSchedule(**{**STABLE_DIFFUSION, "timestep_spacing": "trailing"})
    x, levels = torch.randn(2, 3, 4, 4), noise_levels(schedule, sampler, count)
    levels.sigmas[-1] = ((1 - schedule.alphas_cumprod[0]) / schedule.alphas_cumprod[0]) ** 0.5
    expected = peer_steps(sampler, peer, x)
    for i, ((out, _), theirs) in enumerate(zip(record(sampler, x, schedule, levels), expected)):
        near(out, theirs, f"step {i}")
    assert i == count - 1


def velocity(x, t):
    return torch.tanh(x * 0.7 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 500 - 1) + 0.1 * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 5, 28])
@pytest.mark.parametrize("karras", [False, True], ids=["plain", "karras"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_flow_matching_step_is_the_peer_s(shift, karras, count, dtype):
    peer = FlowMatchEulerDiscreteScheduler(shift=shift, use_karras_sigmas=karras)
    peer.set_timesteps(count)
    sigmas = flow_sigmas(count, shift)
    if karras and count > 1:
        even = karras_sigmas(sigmas[0].item(), sigmas[-2].item(), count)
        sigmas = torch.cat([even, even.new_zeros(1)]).float()
    torch.testing.assert_close(sigmas, peer.sigmas, atol=1e-7, rtol=1e-6)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    expected = peer_steps_of_flow(peer, x)
    ours = []
    sample_flow_euler(velocity, x, sigmas, callback=lambda i, t, x, x0: ours.append((x, x0)))
    assert len(ours) == count
    for i, ((out, _), theirs) in enumerate(zip(ours, expected)):
        near(out, theirs, f"step {i}")
    torch.testing.assert_close(ours[-1][0], ours[-1][1])


def peer_steps_of_flow(peer, x):
    steps = []
    for t in peer.timesteps:
        x = peer.step(velocity(x, t.expand(len(x))), t, x).prev_sample
        steps.append(x)
    return steps


def test_the_shift_of_a_mu_is_the_peer_s():
    peer = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    peer.set_timesteps(sigmas=[1.0, 0.6, 0.3], mu=1.15)
    shifted = shift_sigmas(torch.tensor([1.0, 0.6, 0.3]), math.exp(1.15))
    torch.testing.assert_close(shifted, peer.sigmas[:-1])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "heun", "euler"])
@pytest.mark.parametrize("bound", ["clip", "threshold"])
def test_the_predicted_x0_is_bounded_as_the_peer_bounds_it(sampler, bound):
    fields = {
        "clip": {"clip_sample": True, "clip_sample_range": 0.8},
        "threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    }[bound]
    has = {"clip": ("heun",), "threshold": ("dpmpp_2m", "unipc")}[bound]
    schedule = NoiseSchedule(**STABLE_DIFFUSION, **fields)
    x, levels = torch.randn(2, 3, 4, 4), noise_levels(schedule, sampler, 6)
    ours = record(sampler, x, schedule, levels)
    assert all(x0.abs().max() <= 1 for _, x0 in ours)
    if sampler in has:
        peer = PEERS[sampler](**STABLE_DIFFUSION, **fields)
        peer.set_timesteps(6)
        for (out, _), theirs in zip(ours, peer_steps(sampler, peer, x)):
            near(out, theirs)


@pytest.mark.parametrize("sampler", [name for name in PEERS if name != "heun"])
def test_zero_snr_is_the_peer_s(sampler):
    """But for Heun, whose peer does not know zero SNR."""
    fields = {
        **STABLE_DIFFUSION,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    schedule = NoiseSchedule(**fields)
    peer = PEERS[sampler](**fields)
    peer.set_timesteps(10)
    seeded = [torch.Generator().manual_seed(5) if sampler in DRAWING else None for _ in range(2)]
    x, levels = torch.randn(2, 3, 4, 4), noise_levels(schedule, sampler, 10)
    expected = peer_steps(sampler, peer, x, seeded[0], toy("v_prediction"))
    ours = record(sampler, x, schedule, levels, seeded[1], toy("v_prediction"))
    for i, ((out, _), theirs) in enumerate(zip(ours, expected)):
        # sigma 4096 and float32: the peer's x0 carries roundings of 4096 eps
        torch.testing.assert_close(out, theirs, atol=2e-4, rtol=0, msg=lambda m, i=i: f"step {i}: {m}")


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in ("ddpm", "euler_ancestral")])
def test_solvers_converge_to_the_exact_solution_at_their_order(sampler):
    """Gaussian data N(m, s^2): the flow keeps (x - m) / sqrt(s^2 + sigma^2), x unscaled, as it is."""
    schedule = NoiseSchedule(**{**STABLE_DIFFUSION, "steps_offset": 0})
    mean, std = 0.7, 0.5
    sigma_of = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod) ** 0.5

    def ideal(x, t):
        a = schedule.alphas_cumprod[t].double().reshape(-1, 1)
        x0 = mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x - a.sqrt() * mean)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    def error(stride):
        timesteps = torch.arange(900, 99, -stride)
        sigmas = sigma_of[timesteps].double()
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        if sampler in ("ddim", "plms"):
            out = record(sampler, x, schedule, NoiseLevels(timesteps, None), denoiser=ideal)[-2][0]
        else:
            out = SAMPLERS[sampler](ideal, x, schedule, timesteps[:-1], sigmas=sigmas)
        start, end = sigmas[0], sigmas[-1]
        plain = mean + (x * (1 + start**2).sqrt() - mean) * ((std**2 + end**2) / (std**2 + start**2)).sqrt()
        return (out - plain / (1 + end**2).sqrt()).abs().max().item()

    order = math.log2(error(20) / error(10))
    assert order > {"ddim": 0.9, "euler": 0.9}.get(sampler, 1.6), f"order {order:.2f}"


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_nan_stays_in_its_sample(sampler):
    schedule = NoiseSchedule(**STABLE_DIFFUSION)
    levels = noise_levels(schedule, sampler, 4)
    x = torch.randn(3, 3, 4, 4)
    clean = record(sampler, x, schedule, levels, [torch.Generator().manual_seed(i) for i in range(3)])
    x[1, 0, 0, 0] = math.nan
    broken = record(sampler, x, schedule, levels, [torch.Generator().manual_seed(i) for i in range(3)])
    assert broken[-1][0][1].isnan().any()
    assert torch.equal(broken[-1][0][[0, 2]], clean[-1][0][[0, 2]])


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_same_call_gives_the_same_bits_and_a_callback_replaces_x(sampler):
    schedule = NoiseSchedule(**STABLE_DIFFUSION)
    levels = noise_levels(schedule, sampler, 4)
    options = {} if levels.sigmas is None else {"sigmas": levels.sigmas}
    x = torch.randn(2, 3, 4, 4)

    def sample(callback=None):
        seed = {"generator": torch.Generator().manual_seed(1)} if sampler in DRAWING else {}
        return SAMPLERS[sampler](
            denoiser, x, schedule, levels.timesteps, callback=callback, **options, **seed
        )

    assert torch.equal(sample(), sample())
    seen = []

    def at_zero(x, t):
        seen.append(x.abs().max().item())
        return denoiser(x, t)

    SAMPLERS[sampler](at_zero, x, schedule, levels.timesteps, callback=lambda i, t, x, x0: x * 0, **options)
    assert seen[-1] == 0
    assert torch.equal(sample(lambda i, t, x, x0: x * 0), x * 0)


def test_unipc_does_not_correct_a_replaced_x_away():
    """After a replacement by r the next prediction starts at r: with x0 = 0 predicted it is r, scaled."""
    schedule = NoiseSchedule(**STABLE_DIFFUSION, prediction_type="sample")
    r, seen = torch.randn(2, 3), []

    def callback(i, t, x, x0):
        seen.append(x)
        return r if i == 0 else None

    sigmas = [8.0, 4.0, 2.0, 0.0]
    sample_unipc(
        lambda x, t: x * 0, torch.randn(2, 3), schedule, [900, 700, 500], sigmas=sigmas, callback=callback
    )
    torch.testing.assert_close(seen[1], r * 2 / 4 * (17 / 5) ** 0.5)


def test_fractional_timesteps_reach_the_denoiser():
    schedule, got = NoiseSchedule(**STABLE_DIFFUSION), []

    def spy(x, t):
        got.append((t.dtype, t.tolist()))
        return x

    sample_euler(spy, torch.randn(2, 3), schedule, [600.5, 20.25])
    sample_euler(spy, torch.randn(2, 3), schedule, [600, 20])
    assert got == [
        (torch.float32, [600.5] * 2),
        (torch.float32, [20.25] * 2),
        (torch.int64, [600] * 2),
        (torch.int64, [20] * 2),
    ]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_whole_timesteps_of_numpy_and_torch_are_whole(sampler):
    schedule, got = NoiseSchedule(**STABLE_DIFFUSION), []

    def spy(x, t):
        got.append(t.dtype)
        return x

    for timesteps in (np.array([600, 20]), [torch.tensor(600), np.int32(20)], torch.tensor([600, 20])):
        SAMPLERS[sampler](spy, torch.randn(2, 3), schedule, timesteps)
    assert set(got) == {torch.int64}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize(
    ("timesteps", "said"),
    [
        ([], "no timesteps: give at least one"),
        ([1000], "each must be in 0 to 999"),
        ([500, -1], "each must be in 0 to 999"),
        ([math.nan], "timesteps nan: each must be in"),
        ([20, 600], "must fall"),
        ([20, 20], "must fall"),
    ],
)
def test_wrong_timesteps_are_refused(sampler, timesteps, said):
    with pytest.raises(InputError, match=said):
        SAMPLERS[sampler](denoiser, torch.randn(1, 3, 4, 4), NoiseSchedule.linear(), timesteps)


@pytest.mark.parametrize("sampler", list(PEERS))
@pytest.mark.parametrize(
    ("sigmas", "said"),
    [
        ([5.0, 0.0], "2 sigmas: give 3 for 2 timesteps"),
        ([5.0, math.nan, 0.0], "each must be finite"),
        ([math.inf, 1.0, 0.0], "each must be finite"),
        ([5.0, 1.0, -1.0], "not below 0"),
        ([5.0, 5.0, 0.0], "must fall"),
    ],
)
def test_wrong_sigmas_are_refused(sampler, sigmas, said):
    with pytest.raises(InputError, match=said):
        SAMPLERS[sampler](denoiser, torch.randn(1, 3, 4, 4), NoiseSchedule.linear(), [9, 5], sigmas=sigmas)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_wrong_tensors_are_refused(sampler):
    schedule = NoiseSchedule.linear()
    with pytest.raises(InputError, match=r"x is torch\.int64"):
        SAMPLERS[sampler](denoiser, torch.ones(1, 3, 4, 4, dtype=torch.int64), schedule, [9])
    with pytest.raises(InputError, match=r"gave \(1, 6, 4, 4\) for x \(1, 3, 4, 4\)"):
        SAMPLERS[sampler](lambda x, t: torch.cat([x, x], 1), torch.ones(1, 3, 4, 4), schedule, [9])


def test_wrong_steps_and_levels_are_refused():
    schedule, x = NoiseSchedule.linear(), torch.randn(2, 3)
    for sigma, next_sigma in ((1.0, 2.0), (0.0, 0.0), (math.nan, 0.0), (1.0, -1.0), (math.inf, 1.0)):
        with pytest.raises(InputError, match="sigma must be finite"):
            euler_step(x, sigma, next_sigma, x, schedule)
        with pytest.raises(InputError, match="sigma must be finite"):
            euler_ancestral_step(x, sigma, next_sigma, x, schedule, noise=x)
        with pytest.raises(InputError, match="sigma must be finite"):
            dpmpp_2m_step(x, sigma, next_sigma, x, schedule, previous=(x, 5.0))
        with pytest.raises(InputError, match="need 1 >= sigma"):
            flow_euler_step(x, sigma, next_sigma, x)
    with pytest.raises(InputError, match="step before was at sigma 1"):
        dpmpp_2m_step(x, 2.0, 1.0, x, schedule, previous=(x, 1.0))
    with pytest.raises(InputError, match="noise: got none"):
        euler_ancestral_step(x, 2.0, 1.0, x, schedule)
    with pytest.raises(InputError, match="use euler_step"):
        heun_step(x, x, 2.0, 0.0, x, schedule)
    with pytest.raises(InputError, match="model_outputs is empty"):
        plms_step([], 9, 5, x, schedule)
    with pytest.raises(InputError, match="fractional: this sampler takes whole ones"):
        sample_plms(denoiser, x, schedule, [9.5])
    with pytest.raises(InputError, match="karras=True with sampler 'plms'"):
        noise_levels(schedule, "plms", 5, karras=True)
    with pytest.raises(InputError, match="sampler='dpm' is not offered"):
        noise_levels(schedule, "dpm", 5)
    for sampler in PEERS:
        with pytest.raises(InputError, match="num_inference_steps=0"):
            noise_levels(schedule, sampler, 0)
        with pytest.raises(InputError, match="spacing='even' is not offered"):
            noise_levels(schedule, sampler, 5, spacing="even")
    with pytest.raises(InputError, match="use 1 to 999"):
        noise_levels(schedule, "unipc", 1000)
    with pytest.raises(InputError, match="need 0 < sigma_min < sigma_max"):
        karras_sigmas(1.0, 2.0, 5)
    with pytest.raises(InputError, match="shift=nan"):
        flow_sigmas(5, math.nan)
    with pytest.raises(InputError, match="num_inference_steps=0"):
        flow_sigmas(0)
    with pytest.raises(InputError, match="first sigma is 2"):
        sample_flow_euler(denoiser, x, [2.0, 0.0])
    with pytest.raises(InputError, match="1 sigmas: give at least 2"):
        sample_flow_euler(denoiser, x, [1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_x_keeps_its_dtype_whatever_the_denoiser_answers_in(sampler, dtype):
    schedule = NoiseSchedule(**STABLE_DIFFUSION)
    levels = noise_levels(schedule, sampler, 5)
    x = torch.randn(2, 3, 4, 4).to(dtype)
    for found, _ in record(sampler, x, schedule, levels, denoiser=lambda x, t: denoiser(x, t).float()):
        assert found.dtype == dtype


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_heun_stays_within_float16_where_the_noise_is_strong(kind):
    schedule = NoiseSchedule.cosine(prediction_type=kind, clip_sample=True)
    levels = noise_levels(schedule, "heun", 10)
    x = torch.randn(2, 3, 4, 4).half()
    out = SAMPLERS["heun"](lambda x, t: x / 2, x, schedule, levels.timesteps, sigmas=levels.sigmas)
    assert out.isfinite().all()


def test_what_is_no_row_of_numbers_is_refused():
    schedule, x = NoiseSchedule.linear(), torch.randn(2, 3)
    levels = noise_levels(schedule, "euler", 5)
    for timesteps in (levels, torch.tensor([[9, 5]]), torch.tensor(9), 9, ["9"]):
        with pytest.raises(InputError, match=r"timesteps are .*: give numbers in one row"):
            SAMPLERS["ddim"](denoiser, x, schedule, timesteps)
    with pytest.raises(InputError, match="sigmas are int: give numbers in one row"):
        sample_flow_euler(denoiser, x, 5)
    with pytest.raises(InputError, match="gave NoneType; it must give a tensor"):
        SAMPLERS["ddim"](lambda x, t: None, x, schedule, [9])
    for wrong in (-1, 1000):
        with pytest.raises(InputError, match="each must be in 0 to 999"):
            schedule.add_noise(x, x, torch.tensor([5, wrong]))
