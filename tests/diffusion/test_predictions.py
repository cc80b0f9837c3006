"""Epsilon, x0 and v predictions stand for each other."""

from __future__ import annotations

import pytest
import torch

from fastldm.diffusion import NoiseSchedule
from fastldm.diffusion.predictions import PREDICTION_TYPES, target, to_eps, to_x0
from fastldm.errors import ConfigError


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
def test_the_training_target_gives_x0_and_the_noise_back_at_every_t(make, prediction_type):
    schedule = make(prediction_type=prediction_type)
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 3, 2, 2, dtype=torch.float64)
    x_t = schedule.add_noise(x0, noise, t)
    wanted = schedule.training_target(x0, noise, t)
    alpha_bar = schedule.alphas_cumprod.double().reshape(-1, 1, 1, 1)
    # float64 roundings of 1e-16, magnified by 1 / sqrt(abar) <= 2e4 and 1 / sqrt(1 - abar) <= 160
    torch.testing.assert_close(to_x0(wanted, x_t, alpha_bar, prediction_type), x0, atol=1e-10, rtol=0)
    torch.testing.assert_close(to_eps(wanted, x_t, alpha_bar, prediction_type), noise, atol=1e-10, rtol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_works_without_epsilon(prediction_type):
    schedule = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    x0, noise = torch.randn(2, 1, 3, 2, 2)
    t = torch.tensor([999])
    x_t = schedule.add_noise(x0, noise, t)
    assert torch.equal(x_t, noise)
    wanted = schedule.training_target(x0, noise, t)
    assert torch.equal(wanted, x0 if prediction_type == "sample" else -x0)
    assert torch.equal(to_x0(wanted, x_t, schedule.alphas_cumprod[999], prediction_type), x0)


def test_zero_terminal_snr_refuses_epsilon():
    with pytest.raises(ConfigError, match="v_prediction"):
        NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True, prediction_type="epsilon")


def test_unknown_prediction_types_are_refused():
    x = torch.zeros(1)
    for function in (target, to_x0, to_eps):
        with pytest.raises(ConfigError, match="epsilon, sample, v_prediction"):
            function(x, x, torch.tensor(0.5), "score")
