"""Guidance by gradients against closed forms on Gaussian data, and what the formulas share with the peers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastldm import ops
from fastldm.diffusion import (
    NoiseSchedule,
    classifier_free,
    classifier_gradient,
    clip_gradient,
    ddim_step,
    ddpm_step,
    dynamic_threshold,
    gradient_guided,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    score_gradient,
)
from fastldm.diffusion.predictions import to_eps, to_x0
from fastldm.errors import InputError

KINDS = ("epsilon", "sample", "v_prediction")
MEANS = torch.tensor([-1.0, 2.0], dtype=torch.float64)
STD = 0.5


class Mixture:
    """x0 ~ N(MEANS[y], STD^2), y a fair coin: everything about x_t is known in closed form."""

    def __init__(self, kind="epsilon"):
        self.schedule = NoiseSchedule.scaled_linear(prediction_type=kind)

    def moments(self, x, t):
        """sqrt(abar) MEANS (B, 1, 2) and the variance of x_t given y, (B, 1, 1)."""
        alpha_bar = self.schedule.alpha_bar(x, t).double()[..., None]
        return alpha_bar**0.5 * MEANS, alpha_bar * STD**2 + 1 - alpha_bar

    def classifier(self, x, t):
        """log p(x_t | y) summed over the independent dimensions of x (B, D): logits of p(y | x_t), (B, 2)."""
        means, variance = self.moments(x, t)
        return (-((x[..., None] - means) ** 2) / (2 * variance)).sum(1)

    def score(self, x, t, weights):
        """Of sum_y weights[y] log p(x_t | y): the gradient in x. weights (B, 2) or (2,)."""
        means, variance = self.moments(x, t)
        return ((means - x[..., None]) / variance * torch.as_tensor(weights).reshape(-1, 1, 2)).sum(-1)

    def output(self, x, t, score):
        """The model's output whose noise is -sqrt(1 - abar) score."""
        alpha_bar = self.schedule.alpha_bar(x, t).to(x.dtype)
        eps = -((1 - alpha_bar) ** 0.5) * score
        x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        v = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0
        return {"epsilon": eps, "sample": x0, "v_prediction": v}[self.schedule.prediction_type]

    def denoiser(self, x, t):
        """Knows nothing of y: the score of the mixture."""
        return self.output(x, t, self.score(x, t, self.classifier(x, t).softmax(1)))


def points(count=6, dims=3):
    return 2 * torch.randn(count, dims, dtype=torch.float64), torch.randint(1, 999, (count,))


@pytest.mark.parametrize("label", [0, 1])
def test_the_classifier_s_gradient_is_the_closed_form(label):
    """grad log p(y | x) = score(x | y) - score(x)."""
    data, (x, t) = Mixture(), points()
    one = torch.eye(2, dtype=torch.float64)[label]
    expected = data.score(x, t, one) - data.score(x, t, data.classifier(x, t).softmax(1))
    found = classifier_gradient(data.classifier, torch.full((6,), label))(x, t)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_guided_output_is_the_closed_form(kind, scale):
    """Score form: (1 - scale) score(x) + scale score(x | y); at scale 1 the model of one class alone."""
    data, (x, t), labels = Mixture(kind), points(), torch.tensor([0, 1, 0, 1, 1, 0])
    guided = gradient_guided(
        data.denoiser, classifier_gradient(data.classifier, labels), scale, data.schedule
    )
    of_class = torch.eye(2, dtype=torch.float64)[labels]
    of_all = data.classifier(x, t).softmax(1)
    expected = data.output(x, t, data.score(x, t, scale * of_class + (1 - scale) * of_all))
    torch.testing.assert_close(guided(x, t), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_form_moves_the_noise_as_guided_diffusion_does(kind):
    """condition_score: eps - sqrt(1 - abar) grad, and x0 made of that eps; then DDIM as ever."""
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    x, output, gradient = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    t, scale = 640, 1.7
    guided = gradient_guided(lambda x, t: output, lambda x, t: gradient, scale, schedule)
    moved = guided(x, torch.tensor([t, t]))
    alpha_bar = schedule.alphas_cumprod[t].double()
    eps = to_eps(output, x, alpha_bar, kind) - scale * (1 - alpha_bar).sqrt() * gradient
    x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    torch.testing.assert_close(to_eps(moved, x, alpha_bar, kind), eps, atol=1e-9, rtol=0)
    torch.testing.assert_close(to_x0(moved, x, alpha_bar, kind), x0, atol=1e-9, rtol=0)
    peer = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    peer.set_timesteps(10)
    theirs = peer.step(eps, t, x).prev_sample
    torch.testing.assert_close(
        ddim_step(moved, t, t - 100, x, schedule).prev_sample, theirs, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_form_moves_the_mean_by_variance_times_gradient(kind, variance_type):
    """condition_mean of guided-diffusion, with the peer's variance."""
    fields = {"beta_schedule": "scaled_linear", "prediction_type": kind, "variance_type": variance_type}
    peer = DDPMScheduler(**fields, clip_sample=False)
    peer.set_timesteps(10)
    schedule = NoiseSchedule.from_config(peer.config)
    x, output, gradient, noise = torch.randn(4, 2, 3, 4, 4)
    for t in (900, 500, 100):
        plain = ddpm_step(output, t, t - 100, x, schedule, noise=noise).prev_sample
        moved = ddpm_step(output, t, t - 100, x, schedule, noise=noise, gradient=2.5 * gradient).prev_sample
        variance = peer._get_variance(t, variance_type=variance_type)
        torch.testing.assert_close(moved - plain, variance * 2.5 * gradient, atol=1e-5, rtol=0)
    end = ddpm_step(output, 0, -1, x, schedule, gradient=gradient).prev_sample
    if variance_type == "fixed_small":
        torch.testing.assert_close(end, ddpm_step(output, 0, -1, x, schedule).prev_sample)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sample_ddpm_guides_every_mean(scale):
    schedule, x = NoiseSchedule.scaled_linear(), torch.randn(2, 3)
    seen = []

    def gradient(x, t):
        seen.append((x, t.tolist()))
        return torch.cos(x)

    def denoiser(x, t):
        return 0.3 * x

    out = sample_ddpm(
        denoiser,
        x,
        schedule,
        [700, 300],
        guidance=gradient,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
    )
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    middle = ddpm_step(0.3 * x, 700, 300, x, schedule, noise=noise, gradient=scale * torch.cos(x)).prev_sample
    end = ddpm_step(0.3 * middle, 300, -1, middle, schedule, gradient=scale * torch.cos(middle)).prev_sample
    assert [t for _, t in seen] == [[700] * 2, [300] * 2]
    assert torch.equal(out, end)


@pytest.mark.parametrize("form", ["mean", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("label", [0, 1])
def test_guided_samples_have_the_distribution_of_their_class(form, label):
    """At scale 1 with the exact classifier, guidance by its gradient is sampling of that class."""
    data = Mixture()
    gradient = classifier_gradient(data.classifier, torch.full((2000,), label))
    x = torch.randn(2000, 1, dtype=torch.float64)
    guided = gradient_guided(data.denoiser, gradient, 1.0, data.schedule)
    if form == "mean":
        out = sample_ddpm(data.denoiser, x, data.schedule, data.schedule.timesteps(200), guidance=gradient)
    elif form == "ddim":
        out = sample_ddim(guided, x, data.schedule, data.schedule.timesteps(200))
    else:
        out = sample_dpmpp_2m(guided, x, data.schedule, data.schedule.timesteps(40))
    # 2000 draws: standard errors 0.011 and 0.008; the steps cost about 0.02
    assert abs(out.mean().item() - MEANS[label].item()) < 0.08
    assert abs(out.std().item() - STD) < 0.06


def test_the_clip_gradient_is_the_closed_form():
    """f(x) = x W: the gradient of exp(s) x^T W g / |x^T W| by hand."""
    x, t = points(4, 5)
    weight, text = torch.randn(5, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    found = clip_gradient(lambda x, t: x @ weight, text, math.log(14.0))(x, t)
    features = x @ weight
    length = features.norm(dim=1, keepdim=True)
    direction, caption = features / length, text / text.norm(dim=1, keepdim=True)
    along = caption - (caption * direction).sum(1, keepdim=True) * direction
    torch.testing.assert_close(found, 14.0 * (along / length) @ weight.T, atol=1e-10, rtol=0)
    one = clip_gradient(lambda x, t: x @ weight, text[:1], torch.tensor(0.0))(x, t)
    torch.testing.assert_close(one[:1] * 14, found[:1], atol=1e-9, rtol=0)


class Network(torch.nn.Module):
    """A classifier of this library's own operations: group norm with SiLU, attention, and the timestep."""

    def __init__(self, attention, group_norm):
        super().__init__()
        self.attention, self.group_norm = attention, group_norm
        self.qkv = torch.nn.Conv2d(8, 48, 1, dtype=torch.float64)
        self.into = torch.nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float64)
        self.out = torch.nn.Linear(16, 5, dtype=torch.float64)

    def forward(self, x, t):
        hidden = self.into(x) * (1 + t.reshape(-1, 1, 1, 1) / 1000)
        hidden = self.group_norm(hidden, torch.linspace(0.5, 2, 8, dtype=x.dtype))
        q, k, v = self.qkv(hidden).flatten(2).reshape(len(x), 3, 2, 8, -1).transpose(-1, -2).unbind(1)
        return self.out(self.attention(q, k, v).mean(2).flatten(1))


def own():
    torch.manual_seed(1)
    return Network(
        ops.attention, lambda x, w: ops.group_norm(x, 4, w, torch.zeros_like(w), activation="silu")
    )


def plain():
    torch.manual_seed(1)
    return Network(
        torch.nn.functional.scaled_dot_product_attention,
        lambda x, w: torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, w, torch.zeros_like(w))),
    )


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_pass_through_the_library_s_operations(context):
    """Against PyTorch's own operations and against central differences, where samplers run."""
    ours, theirs = own(), plain()
    with context():
        labels = torch.tensor([3, 0])
        x, t = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.tensor([700, 20])
        text = torch.randn(1, 5, dtype=torch.float64)
        for make in (
            lambda network: classifier_gradient(network, labels),
            lambda network: clip_gradient(network, text, 1.0),
        ):
            found = make(ours)(x, t)
            assert not found.requires_grad
            torch.testing.assert_close(found, make(theirs)(x, t), atol=1e-10, rtol=0)

        def log_probability(x):
            return ours(x, t).log_softmax(1)[[0, 1], labels]

        direction, step = torch.randn_like(x), 1e-5
        slope = (log_probability(x + step * direction) - log_probability(x - step * direction)) / (2 * step)
        along = (classifier_gradient(ours, labels)(x, t) * direction).sum((1, 2, 3))
    torch.testing.assert_close(along, slope, atol=1e-8, rtol=0)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_free_guidance_guides_the_noise_alike_for_every_prediction(kind):
    data, (x, t) = Mixture(kind), points()

    def model(x, t, y):
        return data.output(x, t, data.score(x, t, y))

    of_class, of_all = torch.rand(2, 6, 2, dtype=torch.float64)
    guided = classifier_free(model, {"y": of_class}, {"y": of_all}, 3.5)(x, t)
    expected = data.output(x, t, data.score(x, t, of_all + 3.5 * (of_class - of_all)))
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_learned_variance_is_the_conditional_one_unguided(rescale):
    """As in GLIDE and DiT: the first C channels are guided, and alone measured by the rescaling."""

    def model(x, t, y):
        return torch.cat([x * y, 7 * y.expand_as(x)], dim=1)

    x, t = torch.randn(2, 3, 4, 4), torch.tensor([5, 6])
    y, null = torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    guided = classifier_free(model, {"y": y}, {"y": null}, 4.0, rescale=rescale)(x, t)
    without = classifier_free(
        lambda x, t, y: model(x, t, y)[:, :3], {"y": y}, {"y": null}, 4.0, rescale=rescale
    )(x, t)
    torch.testing.assert_close(guided[:, :3], without)
    torch.testing.assert_close(guided[:, 3:], 7 * y.expand(2, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("ratio", "max_value"), [(0.9, 3.0), (0.995, 1.5), (0.5, 1.0), (1.0, 100.0)])
def test_dynamic_thresholding_is_the_peer_s(ratio, max_value, dtype):
    x0 = (3 * torch.randn(3, 3, 8, 8)).to(dtype)
    peer = DDPMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=max_value)
    ours = dynamic_threshold(x0, ratio, max_value)
    assert ours.dtype == dtype
    assert ours.abs().max() <= 1
    torch.testing.assert_close(ours, peer._threshold_sample(x0))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_pure_noise_is_not_guided(kind):
    """At zero SNR the noise does not say x0, and p(y | x_t) does not depend on x_t."""
    schedule = NoiseSchedule.linear(rescale_betas_zero_snr=True, prediction_type=kind)
    x, steps = torch.randn(3, 4, 2, 2), torch.tensor([999, 998, 0])
    for t in (steps, steps.float()):
        guided = gradient_guided(lambda x, t: x, lambda x, t: torch.ones_like(x), 1.0, schedule)(x, t)
        assert torch.equal(guided[0], x[0])
        assert ((guided - x)[1:].abs().flatten(1).min(dim=1).values > 0).all()
        assert guided.isfinite().all()


def test_wrong_guidance_is_refused():
    schedule, (x, _) = NoiseSchedule.linear(), points(2)
    gradient = classifier_gradient(Mixture().classifier, torch.tensor([0, 1]))
    for scale in (math.nan, math.inf):
        with pytest.raises(InputError, match="give a finite number"):
            gradient_guided(Mixture().denoiser, gradient, scale, schedule)
        with pytest.raises(InputError, match="give a finite number"):
            classifier_free(lambda x, t: x, {}, {}, scale)
        with pytest.raises(InputError, match="guidance_scale="):
            sample_ddpm(lambda x, t: x, x, schedule, [5], guidance=gradient, guidance_scale=scale)
        with pytest.raises(InputError, match="logit_scale="):
            clip_gradient(lambda x, t: x, x, scale)
    with pytest.raises(InputError, match="guidance_rescale=nan"):
        classifier_free(lambda x, t: x, {}, {}, 2.0, rescale=math.nan)
    with pytest.raises(InputError, match=r"condition 'y' is \(2, 3\), but its null condition None"):
        classifier_free(lambda x, t, y: x, {"y": x}, {}, 2.0)
    with pytest.raises(InputError, match=r"use a ratio in \[0, 1\]"):
        dynamic_threshold(x, 1.5)
    with pytest.raises(InputError, match="max_value above 0"):
        dynamic_threshold(x, 0.9, math.nan)


def test_wrong_scores_are_refused():
    x, t = points(2)
    with pytest.raises(InputError, match="one number per sample"):
        score_gradient(lambda x, t: x)(x, t)
    with pytest.raises(InputError, match="does not depend on x"):
        score_gradient(lambda x, t: t.double())(x, t)
    with pytest.raises(InputError, match="does not depend on x"):
        score_gradient(lambda x, t: torch.ones(2, requires_grad=True))(x, t)
    with pytest.raises(InputError, match="labels are float64"):
        classifier_gradient(Mixture().classifier, x[0])
    with pytest.raises(InputError, match="one label per sample"):
        classifier_gradient(Mixture().classifier, torch.tensor([0]))(x, t)
    for wrong in ([0, 2], [-1, 0]):
        with pytest.raises(InputError, match="for 2 classes: use 0 to 1"):
            classifier_gradient(Mixture().classifier, torch.tensor(wrong))(x, t)
    with pytest.raises(InputError, match=r"need \(B, E\) of one width"):
        clip_gradient(lambda x, t: x, x[:, :2], 0.0)(x, t)


def test_nan_in_a_sample_leaves_the_others_guided():
    data, (x, t) = Mixture(), points(3)
    guided = gradient_guided(
        data.denoiser, classifier_gradient(data.classifier, torch.tensor([0, 1, 0])), 2.0, data.schedule
    )
    clean = guided(x, t)
    x[1] = math.nan
    assert guided(x, t)[1].isnan().all()
    torch.testing.assert_close(guided(x, t)[[0, 2]], clean[[0, 2]])
