"""Losses against torch.distributions in float64, the exact bound of Gaussian data, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastldm.diffusion import NoiseSchedule, hybrid_loss, simple_loss, vlb_prior, vlb_terms
from fastldm.errors import InputError

KINDS = ("epsilon", "sample", "v_prediction")
TIMES = torch.tensor([0, 1, 2, 57, 500, 998, 999])


def schedule_of(kind="epsilon", variance_type="learned_range", **fields):
    return NoiseSchedule.scaled_linear(prediction_type=kind, variance_type=variance_type, **fields)


def example(channels=6, dtype=torch.float64):
    """8-bit pictures with some values at the ends, noise, and an output near the target's size."""
    x0 = torch.randint(0, 256, (len(TIMES), 3, 4, 4)).to(dtype) / 127.5 - 1
    x0[:, :, 0, 0], x0[:, :, 0, 1] = -1, 1
    noise = torch.randn(x0.shape, dtype=dtype)
    output = torch.randn(len(TIMES), channels, 4, 4, dtype=dtype)
    return x0, noise, output


def near_target(schedule, x0, noise, output, size=0.02):
    """`output` with its first half that near the target: errors of the likelihood's own scale at t = 0."""
    target = schedule.training_target(x0, noise, TIMES)
    return torch.cat([target + size * output[:, :3], output[:, 3:]], dim=1)


def reverse_step(schedule, prediction, x_t, t, log_variance):
    """p(x_{t-1} | x_t) and q(x_{t-1} | x_t, x0) as a function of x0, written out from the betas."""
    beta = schedule.betas.double()
    a = torch.cumprod(1 - beta, 0)
    prev = a[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
    x0_hat = {
        "epsilon": (x_t - (1 - a[t]).sqrt() * prediction) / a[t].sqrt(),
        "sample": prediction,
        "v_prediction": a[t].sqrt() * x_t - (1 - a[t]).sqrt() * prediction,
    }[schedule.prediction_type]

    def mean(x0):
        return (prev.sqrt() * beta[t] * x0 + (1 - beta[t]).sqrt() * (1 - prev) * x_t) / (1 - a[t])

    return Normal(mean(x0_hat), (0.5 * log_variance).exp()), mean


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_term_is_the_one_of_torch_distributions(kind, variance_type):
    schedule = schedule_of(kind, variance_type)
    x0, noise, output = example()
    output = near_target(schedule, x0, noise, output)
    x_t = schedule.add_noise(x0, noise, TIMES)
    beta = schedule.betas.double()
    a = torch.cumprod(1 - beta, 0)
    given = output if variance_type == "learned_range" else output[:, :3]
    terms = vlb_terms(given, x0, x_t, TIMES, schedule)
    assert terms.shape == (len(TIMES),)
    assert terms.dtype == torch.float64
    for i, t in enumerate(TIMES.tolist()):
        low = beta[max(t, 1)] * (1 - a[max(t, 1) - 1]) / (1 - a[max(t, 1)])
        v = {"learned_range": output[i, 3:], "fixed_small": -1.0, "fixed_large": 1.0 if t > 0 else -1.0}[
            variance_type
        ]
        log_variance = (v + 1) / 2 * beta[t].log() + (1 - (v + 1) / 2) * low.log()
        model, mean = reverse_step(schedule, output[i, :3], x_t[i], t, torch.as_tensor(log_variance))
        if t > 0:
            expected = kl_divergence(Normal(mean(x0[i]), low.sqrt()), model)
        else:
            upper = torch.where(x0[i] > 0.999, 1.0, model.cdf(x0[i] + 1 / 255))
            lower = torch.where(x0[i] < -0.999, 0.0, model.cdf(x0[i] - 1 / 255))
            expected = -(upper - lower).log()
        # abar in the noising is float32, the betas' product here is not: 1e-7 of x_t over a deviation of 0.01
        torch.testing.assert_close(terms[i], expected.mean() / math.log(2), atol=1e-5, rtol=1e-4)


def test_the_first_term_keeps_its_digits_far_from_the_mean():
    """-log mass of a bin 20 to 400 deviations away, where its two distribution functions are both 0 or 1."""
    schedule = schedule_of("sample", "fixed_small")
    x0 = torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    deviation = math.sqrt(_lowest(schedule))
    for sign in (1, -1):
        far = sign * torch.tensor([20.0, 50.0, 100.0, 400.0], dtype=torch.float64).reshape(4, 1, 1, 1)
        terms = vlb_terms(far * deviation, x0, x0, torch.zeros(4, dtype=torch.int64), schedule) * math.log(2)
        # the bin's nearest edge leads: -log(phi(z) / z) with z the edge's distance
        z = far.abs().flatten() - (1 / 255) / deviation
        expected = z**2 / 2 + 0.5 * math.log(2 * math.pi) + z.log()
        torch.testing.assert_close(terms, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deviation", [0.1, 0.5, 0.9, 3.0, 1e3, 1e6])
def test_the_first_term_keeps_its_digits_where_the_bin_is_narrow(deviation, dtype):
    """Of a wide Gaussian's bin, density times width, to the second order (z^2 - 1) width^2 / 24."""
    schedule = schedule_of("sample")
    lowest, beta = math.log(_lowest(schedule)), math.log(schedule.betas[0].item())
    v = 2 * (2 * math.log(deviation) - lowest) / (beta - lowest) - 1
    x0 = torch.zeros(4, 1, 1, 1, dtype=dtype)
    z = torch.tensor([0.0, 0.4, -1.5, 3.0], dtype=dtype).reshape(4, 1, 1, 1)
    output = torch.cat([-z * deviation, torch.full_like(z, v)], dim=1).requires_grad_()
    terms = vlb_terms(output, x0, x0, torch.zeros(4, dtype=torch.int64), schedule) * math.log(2)
    z, width = z.flatten(), 2 / 255 / deviation
    expected = (z**2 + math.log(2 * math.pi)) / 2 - math.log(width) - (z**2 - 1) * width**2 / 24
    # v of a hundred costs float32 the last digits of the deviation; the slope leaves the second order out
    torch.testing.assert_close(terms, expected, atol=1e-4, rtol=0)
    (gradient,) = torch.autograd.grad(terms.sum(), output)
    slope = (1 - z**2) / 2 * (beta - lowest) / 2
    torch.testing.assert_close(gradient[:, 1].flatten(), slope, atol=5e-3, rtol=0)


def _lowest(schedule):
    beta = schedule.betas.double()
    return (beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_all_t_is_the_entropy_of_gaussian_data(kind):
    """x0 ~ N(m, s^2): with the ideal mean and variance every reverse step is exact, and so is the bound.

    L_t is quadratic in x0 and the noise, so its mean over the two-point rule (+-1, +-1) is its expectation.
    """
    mean, std, steps = 0.1, 0.25, 60
    schedule = NoiseSchedule.linear(steps, 0.02, 0.2, prediction_type=kind, variance_type="learned_range")
    beta = schedule.betas.double()
    a = torch.cumprod(1 - beta, 0)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    x0, noise = (mean + std * signs[:, :1]), signs[:, 1:]
    total = vlb_prior(x0, schedule).mean()
    terms = []
    for t in range(steps):
        times = torch.full((4,), t)
        x_t = schedule.add_noise(x0, noise, times)
        prev = a[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
        marginal = a[t] * std**2 + 1 - a[t]
        guess = mean + a[t].sqrt() * std**2 / marginal * (x_t - a[t].sqrt() * mean)
        rest = std**2 * (1 - a[t]) / marginal
        posterior = beta[t] * (1 - prev) / (1 - a[t])
        variance = posterior + (prev.sqrt() * beta[t] / (1 - a[t])) ** 2 * rest
        low = posterior if t > 0 else beta[1] * (1 - a[0]) / (1 - a[1])
        v = 2 * (variance / low).log() / (beta[t] / low).log() - 1
        assert t == 0 or -1 < v < 1
        eps = (x_t - a[t].sqrt() * guess) / (1 - a[t]).sqrt()
        output = {
            "epsilon": eps,
            "sample": guess,
            "v_prediction": a[t].sqrt() * eps - (1 - a[t]).sqrt() * guess,
        }
        given = torch.cat([output[kind], v.expand(4, 1)], dim=1)
        terms.append(vlb_terms(given, x0, x_t, times, schedule).mean())
    total = total + sum(terms)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2)
    # a bin of 2 / 255 for a density; it is 1/15 of the last step's deviation, which costs 1e-4
    assert total.item() == pytest.approx(entropy + math.log2(255 / 2), abs=5e-4)
    assert sum(terms[1:]).item() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_half_gets_the_gradient_of_its_own_loss(kind):
    schedule = schedule_of(kind)
    x0, noise, output = example()
    output = near_target(schedule, x0, noise, output).requires_grad_()
    x_t = schedule.add_noise(x0, noise, TIMES)

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), output)[0].chunk(2, dim=1)

    simple = gradient(simple_loss(output, x0, noise, TIMES, schedule))
    hybrid = gradient(hybrid_loss(output, x0, noise, TIMES, schedule))
    bound = gradient(vlb_terms(output, x0, x_t, TIMES, schedule))
    assert not simple[1].any()
    assert torch.equal(hybrid[0], simple[0])
    # lambda L_vlb with 1000 equally likely t: L_t counts 1e-3 * 1000 times
    torch.testing.assert_close(hybrid[1], bound[1])
    assert (bound[1].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert (bound[0].abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("steps", [1000, 250])
def test_the_hybrid_is_simple_plus_lambda_times_the_sum_over_all_timesteps(steps):
    schedule = NoiseSchedule.cosine(steps, variance_type="learned_range")
    x0, noise, output = example()
    times = TIMES * (steps - 1) // 999
    x_t = schedule.add_noise(x0, noise, times)
    for weight in (1e-3, 0.5):
        found = hybrid_loss(output, x0, noise, times, schedule, vlb_weight=weight, snr_gamma=5.0)
        simple = simple_loss(output, x0, noise, times, schedule, snr_gamma=5.0)
        torch.testing.assert_close(
            found, simple + weight * steps * vlb_terms(output, x0, x_t, times, schedule)
        )
    assert torch.equal(
        hybrid_loss(output, x0, noise, times, schedule),
        hybrid_loss(output, x0, noise, times, schedule, vlb_weight=1e-3),
    )


def test_the_gradient_of_the_bound_is_that_of_differences():
    schedule = schedule_of("v_prediction")
    x0, noise, output = example()
    output = near_target(schedule, x0, noise, output).requires_grad_()
    x_t = schedule.add_noise(x0, noise, TIMES)
    # an error of exactly 0 has a kink that is none in the sum of its halves
    assert torch.autograd.gradcheck(lambda o: vlb_terms(o, x0, x_t, TIMES, schedule), output, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [NoiseSchedule.cosine, NoiseSchedule.scaled_linear])
def test_extremes_stay_finite_with_their_gradients(make, kind, dtype):
    schedule = make(prediction_type=kind, variance_type="learned_range")
    x0, noise, _ = (value.to(dtype) for value in example())
    for prediction in (0.0, 6e4, -6e4):
        for v in (-6e4, -30.0, 0.0, 30.0, 6e4):
            output = torch.full((len(TIMES), 6, 4, 4), prediction, dtype=dtype)
            output[:, 3:] = v
            output.requires_grad_()
            loss = hybrid_loss(output, x0, noise, TIMES, schedule)
            assert loss.dtype == torch.float32
            assert loss.isfinite().all()
            # what a half cannot hold of a finite gradient is for the loss scaler to see
            gradient = torch.autograd.grad(loss.sum(), output)[0]
            assert not gradient.isnan().any()
            if dtype == torch.float32:
                assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_float32(dtype):
    schedule = schedule_of("sample")
    x0, noise, output = (value.to(dtype) for value in example())
    arguments = x0.float(), noise.float(), TIMES, schedule
    # the target is x0 in its own dtype, so only x_t is rounded
    found, exact = simple_loss(output, x0, noise, TIMES, schedule), simple_loss(output.float(), *arguments)
    assert torch.equal(found, exact)
    assert found.dtype == torch.float32
    terms = vlb_terms(output, x0, noise, TIMES, schedule)
    assert torch.equal(terms, vlb_terms(output.float(), x0.float(), noise.float(), TIMES, schedule))


def test_zero_snr_has_a_bound_for_every_term():
    schedule = schedule_of("v_prediction", rescale_betas_zero_snr=True)
    x0, noise, output = example()
    terms = vlb_terms(output, x0, schedule.add_noise(x0, noise, TIMES), TIMES, schedule)
    assert terms.isfinite().all()
    assert vlb_prior(x0, schedule).abs().max() == 0


def test_what_learns_no_variance_is_refused():
    x0, noise, output = example()
    with pytest.raises(InputError, match="the hybrid loss with variance_type='fixed_small'"):
        hybrid_loss(output[:, :3], x0, noise, TIMES, schedule_of(variance_type="fixed_small"))
    for loss in (simple_loss, vlb_terms, hybrid_loss):
        arguments = (x0, noise, TIMES)
        with pytest.raises(InputError, match="'learned_range' needs"):
            loss(output[:, :3], *arguments, schedule_of())
        if loss is not hybrid_loss:
            with pytest.raises(InputError, match="'fixed_large' needs"):
                loss(output, *arguments, schedule_of(variance_type="fixed_large"))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_of_every_timestep(kind):
    """min(SNR, gamma) ||x0 - x0_hat||^2 of each type (Hang et al. 2023, section 3.4)."""
    gamma, schedule, t = 5.0, NoiseSchedule.cosine(prediction_type=kind), torch.arange(1000)
    output, x0, noise = torch.zeros(1000, 1), torch.randn(1000, 1), torch.randn(1000, 1)
    plain, weighted = (
        simple_loss(output, x0, noise, t, schedule, snr_gamma=weight).double() for weight in (None, gamma)
    )
    alpha_bar = schedule.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    of_x0 = {"epsilon": 1 / snr, "sample": torch.ones(1000), "v_prediction": 1 / (snr + 1)}[kind]
    torch.testing.assert_close(weighted, plain * snr.clamp(max=gamma) * of_x0, atol=0, rtol=1e-4)
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(InputError, match="give a number above 0"):
            simple_loss(output, x0, noise, t, schedule, snr_gamma=wrong)
    with pytest.raises(InputError, match=r"noise: \(1, 1\) for x"):
        simple_loss(output, x0, noise[:1], t, schedule)
