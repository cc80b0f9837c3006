"""Every scheduler class that is read: its defaults, its file both ways, and the settings that are refused."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from fastldm.diffusion import NoiseSchedule
from fastldm.diffusion.samplers import SAMPLERS
from fastldm.diffusion.scheduler_config import class_of, sampler_of, takes_karras
from fastldm.errors import ConfigError

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# The only setting whose default is one that our sampler does not work by.
NEEDED = {"plms": {"skip_prk_steps": True}}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def peer_of(sampler, **fields):
    return getattr(diffusers, CLASSES[sampler])(**NEEDED.get(sampler, {}), **fields)


def file_of(peer):
    return json.loads(peer.to_json_string())


def test_every_sampler_has_its_class():
    assert {sampler: class_of(sampler) for sampler in SAMPLERS} == CLASSES


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_absent_fields_are_the_class_s_defaults(sampler):
    peer = peer_of(sampler)
    config = {"_class_name": CLASSES[sampler], **NEEDED.get(sampler, {})}
    schedule = NoiseSchedule.from_config(config)
    known = schedule.to_fields()
    theirs = {key: value for key, value in peer.config.items() if key in known and value is not None}
    assert {key: known[key] for key in theirs} == theirs
    assert schedule.to_fields() == NoiseSchedule.from_config(file_of(peer)).to_fields()
    bounded = sampler in ("ddim", "ddpm")
    assert (schedule.clip_sample, schedule.thresholding) == (bounded, False)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_file_goes_both_ways(sampler, tmp_path):
    fields = {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "steps_offset": 1}
    fields |= {"prediction_type": "v_prediction", "num_train_timesteps": 500}
    config = file_of(peer_of(sampler, **fields))
    ours = NoiseSchedule.from_config(config)
    assert sampler_of(config) == (sampler, False)
    written = ours.to_config(CLASSES[sampler])
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    back = file_of(getattr(diffusers, CLASSES[sampler]).from_pretrained(tmp_path))
    assert back == config
    assert {key: written[key] for key in fields} == fields


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if takes_karras(sampler)])
def test_karras_levels_are_read(sampler):
    config = file_of(peer_of(sampler, use_karras_sigmas=True))
    NoiseSchedule.from_config(config)
    assert sampler_of(config) == (sampler, True)


def test_only_classes_with_karras_levels_take_them():
    assert list(filter(takes_karras, SAMPLERS)) == ["euler", "heun", "dpmpp_2m", "unipc"]
    carried_along = {"_class_name": "DDIMScheduler", "use_karras_sigmas": True}
    assert sampler_of(carried_along) == ("ddim", False)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_config_made_from_another_class_s_is_read_as_the_peer_reads_it(sampler):
    """diffusers carries the fields of every class before along, without effect."""
    peer = diffusers.DDPMScheduler(**STABLE_DIFFUSION, clip_sample=True, thresholding=True)
    for other in (*SAMPLERS, sampler):
        peer = getattr(diffusers, CLASSES[other]).from_config(peer.config, **NEEDED.get(other, {}))
    config = file_of(peer)
    assert "skip_prk_steps" in config
    ours = NoiseSchedule.from_config(config)
    assert ours.clip_sample == (sampler in ("ddim", "ddpm", "heun"))
    assert ours.thresholding == (sampler in ("ddim", "ddpm", "dpmpp_2m", "unipc"))
    assert torch.equal(ours.alphas_cumprod, peer.alphas_cumprod)


def test_a_published_config_is_read():
    """Of the fields that Stable Diffusion XL's file has, three are of other classes; and a fourth."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        **STABLE_DIFFUSION,
        "clip_sample": True,
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 3,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    }
    schedule = NoiseSchedule.from_config(config)
    assert (schedule.steps_offset, schedule.timestep_spacing, schedule.clip_sample) == (1, "leading", False)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_learned_range_stays_whatever_the_class(sampler):
    schedule = NoiseSchedule.linear(variance_type="learned_range")
    config = schedule.to_config(CLASSES[sampler])
    assert config["variance_type"] == "learned_range"
    assert NoiseSchedule.from_config(config).variance_type == "learned_range"
    fixed = NoiseSchedule.linear(variance_type="fixed_large")
    written = fixed.to_config(CLASSES[sampler])
    assert ("variance_type" in written) == (sampler == "ddpm")


@pytest.mark.parametrize(
    ("sampler", "fields", "said"),
    [
        (
            "plms",
            {"skip_prk_steps": False},
            "PNDMScheduler with skip_prk_steps=False is not offered; use True",
        ),
        ("plms", {}, "skip_prk_steps=False"),
        ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True .* use False"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear' .* use 'linear'"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ("euler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min' .* use 'zero'"),
        ("euler", {"sigma_max": 80.0}, r"sigma_max=80\.0"),
        ("heun", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("heun", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order=3 .* use 2"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type='sde-dpmsolver\+\+'"),
        ("dpmpp_2m", {"solver_type": "heun"}, "solver_type='heun' .* use 'midpoint'"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("dpmpp_2m", {"variance_type": "learned"}, "variance_type='learned' .* or 'learned_range'"),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}, r"lambda_min_clipped=-5\.1"),
        ("unipc", {"solver_type": "bh1"}, "solver_type='bh1' .* use 'bh2'"),
        ("unipc", {"solver_order": 3}, "solver_order=3"),
        ("unipc", {"predict_x0": False}, "predict_x0=False"),
        ("unipc", {"lower_order_final": False}, "lower_order_final=False"),
        ("unipc", {"disable_corrector": [0]}, r"disable_corrector=\[0\]"),
        ("unipc", {"solver_ordre": 2}, "unknown scheduler field.* solver_ordre; did you mean solver_order"),
        ("ddpm", {"variance_type": "fixed_small_log"}, "fixed_small, fixed_large, learned_range"),
    ],
)
def test_settings_that_the_sampler_does_not_work_by_are_refused(sampler, fields, said):
    with pytest.raises(ConfigError, match=said) as caught:
        NoiseSchedule.from_config({"_class_name": CLASSES[sampler], **fields})
    assert "\n" not in str(caught.value)


def test_settings_without_a_class_or_for_one_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="solver_order"):
        NoiseSchedule.from_config({"solver_order": 2})
    for use in (sampler_of, NoiseSchedule.from_config):
        with pytest.raises(ConfigError, match="LMSDiscreteScheduler is not offered; use DDIMScheduler or"):
            use({"_class_name": "LMSDiscreteScheduler"})
    with pytest.raises(ConfigError, match="LMSDiscreteScheduler is not offered"):
        NoiseSchedule.linear().to_config("LMSDiscreteScheduler")


@pytest.mark.parametrize("setting", ["lower_order_final", "euler_at_final"])
@pytest.mark.parametrize("count", [5, 20])
def test_the_settings_of_any_value_change_nothing(setting, count):
    """The last step of DPM-Solver++ goes to 0: of first order, whatever these say."""
    walks = []
    for value in (False, True):
        peer = diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **{setting: value})
        NoiseSchedule.from_config(file_of(peer))
        peer.set_timesteps(count)
        x = torch.ones(1, 3, 4, 4)
        for t in peer.timesteps:
            x = peer.step(torch.tanh(x + t / 500), t, x).prev_sample
        walks.append(x)
    assert torch.equal(*walks)
