"""What is known of the clean sample, told to a sampler."""

from __future__ import annotations

import pytest
import torch

from fastldm.diffusion import NoiseSchedule, projected, sample_ddim, sample_ddpm


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_without_a_bound_the_projected_denoiser_walks_as_the_own(kind):
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind, variance_type="learned_range")

    def denoiser(x, t):
        return torch.cat([x.sin(), x.cos()], dim=1)

    x, steps = torch.randn(2, 3, 4, 4), schedule.timesteps(5)
    for as_noise in (False, True):
        other, says_so = projected(denoiser, schedule, as_noise=as_noise)
        found = sample_ddim(other, x, says_so, steps)
        torch.testing.assert_close(found, sample_ddim(denoiser, x, schedule, steps), atol=1e-5, rtol=1e-5)
        assert torch.equal(other(x, steps[:2])[:, 3:], x.cos())


def test_every_step_believes_in_the_projected_sample():
    schedule = NoiseSchedule.linear(clip_sample=True)
    seen = []

    def project(x0):
        assert x0.abs().max() <= 1
        return torch.cat([torch.full_like(x0[:, :1], 0.5), x0[:, 1:]], dim=1)

    denoiser, says_so = projected(lambda x, t: x.sin(), schedule, project)
    x = sample_ddpm(
        denoiser,
        torch.randn(2, 3, 4, 4),
        says_so,
        schedule.timesteps(5),
        generator=torch.Generator().manual_seed(0),
        callback=lambda i, t, x, x0: seen.append(x0),
    )
    assert all((x0[:, 0] == 0.5).all() and (x0[:, 1:] != 0.5).any() for x0 in seen)
    assert (x[:, 0] == 0.5).all()


def test_ddim_s_noise_is_what_the_projected_sample_leaves():
    schedule = NoiseSchedule.linear(clip_sample=True)
    x, t = torch.randn(2, 3, 4, 4).double(), [600, 200]
    denoiser, says_so = projected(lambda x, t: x / 2, schedule)
    found = sample_ddim(denoiser, x, says_so, t)
    a = schedule.alphas_cumprod.double()[t]
    x0 = ((x - (1 - a[0]).sqrt() * x / 2) / a[0].sqrt()).clamp(-1, 1)
    x = a[1].sqrt() * x0 + (1 - a[1]).sqrt() * (x - a[0].sqrt() * x0) / (1 - a[0]).sqrt()
    wanted = ((x - (1 - a[1]).sqrt() * x / 2) / a[1].sqrt()).clamp(-1, 1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
