"""Sampler steps and whole loops against diffusers' DDPM and DDIM schedulers, and against closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastldm.diffusion import NoiseSchedule, ddim_step, ddpm_step, sample_ddim, sample_ddpm
from fastldm.diffusion.samplers import randn
from fastldm.errors import InputError

STEPS = 10
LINEAR = {"beta_schedule": "linear"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**SCALED, "rescale_betas_zero_snr": True}
BETAS = {"linear": LINEAR, "scaled_linear": SCALED, "cosine": COSINE, "zero_snr": ZERO_SNR}
BOUNDS = {
    "free": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 1.3},
    "threshold": {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9},
}
CASES = [
    pytest.param(
        {**betas, **bound, "prediction_type": kind, "timestep_spacing": spacing},
        id=f"{b}-{c}-{kind}-{spacing}",
    )
    for b, betas in BETAS.items()
    for c, bound in BOUNDS.items()
    for kind in ("epsilon", "sample", "v_prediction")
    for spacing in ("leading", "trailing", "linspace")
    if not (b == "zero_snr" and kind == "epsilon")
]


def near(actual, expected):
    """1e-5 of the result's size: epsilon at the noisy end of the cosine schedule makes x0 as large as 2e4."""
    atol = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def denoiser(x, t):
    """A stand-in for a network: smooth, and different at every timestep."""
    return torch.tanh(x * 0.7 + t.reshape(-1, 1, 1, 1) / 500 - 1) + 0.1 * x


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("fields", CASES)
def test_ddim_step_is_the_peer_s(fields, set_alpha_to_one):
    peer = DDIMScheduler(**fields, set_alpha_to_one=set_alpha_to_one)
    peer.set_timesteps(STEPS)
    schedule = NoiseSchedule.from_config(peer.config)
    for t in (peer.timesteps[0], peer.timesteps[STEPS // 2], peer.timesteps[-1]):
        # at zero SNR and eta 1 the peer takes the root of -1e-9; ours is tested below
        for eta in (0.0, 0.3) if schedule.alphas_cumprod[t] == 0 else (0.0, 0.3, 1.0):
            x, output, noise = torch.randn(3, 2, 3, 4, 4)
            theirs = peer.step(output, int(t), x, eta=eta, variance_noise=noise)
            ours = ddim_step(output, int(t), int(t) - 1000 // STEPS, x, schedule, eta=eta, noise=noise)
            near(ours.prev_sample, theirs.prev_sample)
            near(ours.pred_original_sample, theirs.pred_original_sample)


def test_ddim_at_zero_snr_and_full_eta_draws_the_marginal():
    """From abar = 0 with eta = 1 the step forgets x and draws q(x_prev | x0)."""
    schedule = NoiseSchedule(**ZERO_SNR, prediction_type="sample")
    x, x0, noise = torch.randn(3, 2, 3, 4, 4)
    for prev_t in range(900, 999):
        out = ddim_step(x0, 999, prev_t, x, schedule, eta=1.0, noise=noise).prev_sample
        # the direction towards x has a weight of sqrt(a float32 rounding of 1) at most
        expected = schedule.add_noise(x0, noise, torch.tensor([prev_t, prev_t]))
        torch.testing.assert_close(out, expected, atol=4 * 2**-12, rtol=0)


def test_dynamic_thresholding_never_enlarges():
    """A sample whose quantile is below 1 stays as it is, but for the few numbers beyond 1."""
    fields = {**LINEAR, **BOUNDS["threshold"], "prediction_type": "sample"}
    peer = DDIMScheduler(**fields)
    peer.set_timesteps(STEPS)
    schedule = NoiseSchedule.from_config(peer.config)
    x, output = 0.5 * torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    output[0, 0, 0, 0] = 1.7
    assert torch.quantile(output.abs().flatten(1), 0.9, dim=1).max() < 1
    t = int(peer.timesteps[3])
    bounded = ddim_step(output, t, t - 1000 // STEPS, x, schedule).pred_original_sample
    assert torch.equal(bounded, output.clamp(-1, 1))
    near(bounded, peer.step(output, t, x).pred_original_sample)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("fields", CASES)
def test_ddpm_step_is_the_peer_s(fields, variance_type):
    peer = DDPMScheduler(**fields, variance_type=variance_type)
    peer.set_timesteps(STEPS)
    schedule = NoiseSchedule.from_config(peer.config)
    for i in (0, STEPS // 2, STEPS - 1):
        t = int(peer.timesteps[i])
        prev_t = int(peer.timesteps[i + 1]) if i + 1 < STEPS else -1
        x, output = torch.randn(2, 2, 3, 4, 4)
        theirs = peer.step(output, t, x, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) if t > 0 else None
        ours = ddpm_step(output, t, prev_t, x, schedule, noise=noise)
        near(ours.prev_sample, theirs.prev_sample)
        near(ours.pred_original_sample, theirs.pred_original_sample)


def peer_loop(peer, x, generator, **step):
    peer.set_timesteps(STEPS)
    for t in peer.timesteps:
        output = denoiser(x, t.expand(len(x)))
        x = peer.step(output, t, x, generator=generator, **step).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_loop_is_the_peer_s(kind, spacing, eta):
    fields = {
        "prediction_type": kind,
        "timestep_spacing": spacing,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    peer = DDIMScheduler(**SCALED, **fields, clip_sample=False)
    schedule = NoiseSchedule.from_config(peer.config)
    x = torch.randn(2, 3, 4, 4)
    expected = peer_loop(peer, x, torch.Generator().manual_seed(5), eta=eta)
    generator = torch.Generator().manual_seed(5)
    near(
        sample_ddim(denoiser, x, schedule, schedule.timesteps(STEPS), eta=eta, generator=generator), expected
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddpm_loop_is_the_peer_s(kind, spacing):
    peer = DDPMScheduler(**SCALED, prediction_type=kind, timestep_spacing=spacing, clip_sample=False)
    schedule = NoiseSchedule.from_config(peer.config)
    x = torch.randn(2, 3, 4, 4)
    expected = peer_loop(peer, x, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    near(sample_ddpm(denoiser, x, schedule, schedule.timesteps(STEPS), generator=generator), expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_walks_exactly_the_timesteps_it_is_given(spacing):
    """With the true noise as prediction every step lands on the straight line of that x0 and noise, so a
    walk that
    took a wrong noise level anywhere would miss x0."""
    schedule = NoiseSchedule.linear()
    x0, noise = torch.randn(2, 2, 3, 4, 4)
    timesteps = schedule.timesteps(7, spacing=spacing)
    x = schedule.add_noise(x0, noise, timesteps[:1].expand(2))
    seen = []

    def callback(i, t, x, pred_x0):
        if i + 1 < len(timesteps):
            line = schedule.add_noise(x0, noise, timesteps[i + 1].expand(2))
            torch.testing.assert_close(x, line, atol=2e-4, rtol=0)
        seen.append((i, t))

    # 2e-4: float32 roundings of the first step's noise (up to 4), magnified by 1 / sqrt(abar_999) = 158
    out = sample_ddim(lambda x, t: noise, x, schedule, timesteps, callback=callback)
    torch.testing.assert_close(out, x0, atol=2e-4, rtol=0)
    assert seen == list(enumerate(timesteps.tolist()))


@pytest.mark.parametrize("sampler", [sample_ddim, sample_ddpm])
def test_a_gaussian_is_sampled(sampler):
    """x0 ~ N(2, 0.5^2) has a known ideal denoiser; both samplers must bring out that mean and deviation."""
    schedule = NoiseSchedule.cosine()

    def ideal(x, t):
        a = schedule.alphas_cumprod[t].reshape(-1, 1)
        x0 = 2 + a.sqrt() * 0.25 / (a * 0.25 + 1 - a) * (x - a.sqrt() * 2)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    out = sampler(ideal, torch.randn(200, 50), schedule, schedule.timesteps(200))
    # 1e4 draws: standard errors 0.005 and 0.0035; 200 steps in place of a continuum cost about 0.01
    assert abs(out.mean() - 2) < 0.03
    assert abs(out.std() - 0.5) < 0.03


def test_the_denoiser_gets_int64_timesteps_per_sample():
    schedule = NoiseSchedule.linear()
    got = []

    def spy(x, t):
        got.append((t.dtype, t.tolist()))
        return x

    sample_ddpm(spy, torch.randn(3, 2), schedule, [600, 20])
    assert got == [(torch.int64, [600] * 3), (torch.int64, [20] * 3)]


@pytest.mark.parametrize("sampler", [sample_ddim, sample_ddpm])
def test_a_seed_gives_one_picture_alone_and_in_a_batch(sampler):
    schedule = NoiseSchedule.scaled_linear()
    options = {"eta": 1.0} if sampler is sample_ddim else {}

    def pictures(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = randn((len(seeds), 3, 4, 4), generators)
        return sampler(denoiser, x, schedule, schedule.timesteps(5), generator=generators, **options)

    batch = pictures([3, 1, 4])
    assert torch.equal(batch, pictures([3, 1, 4]))
    for i, seed in enumerate((3, 1, 4)):
        torch.testing.assert_close(batch[i : i + 1], pictures([seed]), atol=1e-6, rtol=0)
    assert not torch.equal(batch[0], batch[1])


def test_ddim_without_eta_draws_nothing():
    schedule = NoiseSchedule.scaled_linear()
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sample_ddim(denoiser, torch.randn(1, 3, 4, 4), schedule, schedule.timesteps(3), generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_callback_can_replace_x():
    schedule = NoiseSchedule.linear()
    out = sample_ddim(
        denoiser, torch.randn(1, 3, 4, 4), schedule, [500, 0], callback=lambda i, t, x, x0: x * 0
    )
    assert torch.equal(out, torch.zeros_like(out))


def test_wrong_input_is_refused():
    schedule, x = NoiseSchedule.linear(), torch.randn(2, 3)
    with pytest.raises(InputError, match="eta=2"):
        sample_ddim(denoiser, x, schedule, [5], eta=2)
    with pytest.raises(InputError, match="1 generators for a batch of 2"):
        randn((2, 3), [torch.Generator()])
