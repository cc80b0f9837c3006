"""Classifier-free guidance and condition dropout."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from fastldm.diffusion import classifier_free, drop_condition, rescale_guidance
from fastldm.errors import InputError


class Model:
    """Linear in the condition; remembers the batches it saw."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, context, concat):
        self.batches.append((len(x), t.tolist()))
        return x * 0.5 + context.mean(1)[..., None, None] + t.reshape(-1, 1, 1, 1) + concat


def conditions(batch=2):
    return {"context": torch.randn(batch, 5, 3), "concat": torch.randn(batch, 3, 4, 4)}


@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0])
def test_guidance_is_the_formula_on_one_doubled_batch(scale):
    model, cond, null = Model(), conditions(), conditions()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([7, 8])
    guided = classifier_free(model, cond, null, scale)(x, t)
    assert model.batches == [(4, [7, 8, 7, 8])]
    e_c, e_u = model(x, t, **cond), model(x, t, **null)
    torch.testing.assert_close(guided, e_u + scale * (e_c - e_u), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_a_learned_variance_is_that_under_the_condition(scale):
    def model(x, t, context):
        return torch.cat([x + context, 7 * context.expand_as(x)], dim=1)

    cond, null = ({"context": torch.randn(2, 3, 1, 1)} for _ in range(2))
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([7, 8])
    prediction, v = classifier_free(model, cond, null, scale)(x, t).chunk(2, dim=1)
    guided = (1 - scale) * null["context"] + scale * cond["context"]
    # Rounding of float32, of values up to about 10.
    torch.testing.assert_close(prediction, x + guided, atol=1e-5, rtol=0)
    assert torch.equal(v, 7 * cond["context"].expand_as(x))


def test_the_doubled_batch_is_unconditional_first():
    seen = []

    def model(x, t, context):
        seen.append(context.flatten().tolist())
        return x

    classifier_free(model, {"context": torch.ones(1, 1)}, {"context": torch.zeros(1, 1)}, 3)(
        torch.zeros(1), torch.zeros(1)
    )
    assert seen == [[0, 1]]


def test_scale_one_skips_the_unconditional_half():
    model, cond = Model(), conditions()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([7, 8])
    assert torch.equal(classifier_free(model, cond, None, 1.0)(x, t), Model()(x, t, **cond))
    assert model.batches == [(2, [7, 8])]


def test_absent_conditions_stay_absent():
    def model(x, t, context, concat):
        assert concat is None
        return x + context

    context = torch.ones(2, 1)
    guided = classifier_free(
        model, {"context": context, "concat": None}, {"context": context * 0, "concat": None}, 2.0
    )
    assert torch.equal(guided(torch.zeros(2, 1), torch.zeros(2)), torch.full((2, 1), 2.0))


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
def test_rescale_is_the_peer_s(strength):
    guided, conditional = torch.randn(2, 3, 4, 8, 8) * torch.tensor([5.0, 1.0]).reshape(2, 1, 1, 1, 1)
    expected = rescale_noise_cfg(guided, conditional, guidance_rescale=strength)
    torch.testing.assert_close(rescale_guidance(guided, conditional, strength), expected)


def test_an_output_without_deviation_is_not_rescaled():
    guided, conditional = torch.randn(2, 2, 3, 4, 4)
    guided[0] = 0.25
    found = rescale_guidance(guided, conditional, 0.7)
    torch.testing.assert_close(found[0], guided[0])
    torch.testing.assert_close(found[1:], rescale_guidance(guided[1:], conditional[1:], 0.7))
    assert (found[1] - guided[1]).abs().max() > 1e-3


def test_rescale_is_applied_to_the_guided_output():
    model, cond, null = Model(), conditions(), conditions()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([7, 8])
    plain = classifier_free(model, cond, null, 4.0)(x, t)
    rescaled = classifier_free(model, cond, null, 4.0, rescale=0.6)(x, t)
    expected = rescale_noise_cfg(plain, model(x, t, **cond), guidance_rescale=0.6)
    torch.testing.assert_close(rescaled, expected, atol=1e-5, rtol=1e-5)


def test_wrong_guidance_is_refused():
    with pytest.raises(InputError, match="between 0 and 1"):
        classifier_free(Model(), conditions(), conditions(), 2.0, rescale=1.5)
    with pytest.raises(InputError, match="null conditions"):
        classifier_free(Model(), conditions(), None, 2.0)


@pytest.mark.parametrize("shape", [(4000,), (4000, 6), (4000, 2, 3, 3)])
def test_dropout_drops_whole_samples_at_its_rate(shape):
    condition, null = torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    kept = drop_condition(condition, null, 0.1, torch.Generator().manual_seed(0))
    assert kept.dtype == torch.int64
    per_sample = kept.reshape(4000, -1)
    assert (per_sample == per_sample[:, :1]).all()
    # binomial, 4000 draws at 0.1: standard deviation 0.0047; five of them
    assert abs((per_sample[:, 0] == 0).float().mean() - 0.1) < 0.024


def test_dropout_at_its_ends_and_by_seed():
    condition, null = torch.arange(1, 9), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(drop_condition(condition, null, 0.0), condition)
    assert torch.equal(drop_condition(condition, null, 1.0), torch.zeros(8, dtype=torch.int64))
    first, again = (drop_condition(condition, null, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("value", [5, -0.1, "1", True, math.nan])
def test_strengths_and_probabilities_are_fractions(value):
    x = torch.randn(2, 3)
    with pytest.raises(InputError, match=r"strength=.*between 0 and 1"):
        rescale_guidance(x, x, value)
    with pytest.raises(InputError, match=r"probability=.*between 0 and 1"):
        drop_condition(x, x, value)
    with pytest.raises(InputError, match=r"guidance_rescale=.*between 0 and 1"):
        classifier_free(lambda x, t: x, {}, {}, 2.0, rescale=value)
    assert torch.equal(drop_condition(x, 0 * x, torch.tensor(1.0)), 0 * x)
