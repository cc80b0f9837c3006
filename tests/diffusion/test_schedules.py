"""Noise schedules against diffusers' schedulers: betas, timesteps, the config file, noising."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError, InputError

SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"beta_schedule": "linear", "num_train_timesteps": 37},
    "zero_snr": {
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "trained_betas": {"trained_betas": [0.1, 0.2, 0.35], "num_train_timesteps": 3},
}


@pytest.mark.parametrize("peer", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("fields", SCHEDULES.values(), ids=SCHEDULES)
def test_betas_and_alphas_are_the_peer_s(fields, peer):
    ours, theirs = NoiseSchedule(**fields), peer(**fields)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_final_alpha_is_the_peer_s(set_alpha_to_one):
    ours = NoiseSchedule.linear(set_alpha_to_one=set_alpha_to_one)
    theirs = DDIMScheduler(set_alpha_to_one=set_alpha_to_one)
    assert ours.final_alpha_cumprod == theirs.final_alpha_cumprod


def test_constructors_name_the_schedules():
    assert torch.equal(
        NoiseSchedule.scaled_linear().betas,
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).betas,
    )
    assert torch.equal(NoiseSchedule.linear(100).betas, DDIMScheduler(num_train_timesteps=100).betas)
    assert NoiseSchedule.cosine(prediction_type="sample").prediction_type == "sample"


def test_cosine_betas_end_at_the_cap():
    betas = NoiseSchedule.cosine().betas
    assert betas[-1] == torch.tensor(0.999)
    assert (betas[:-1] < 0.999).all()


def test_zero_terminal_snr_keeps_the_first_step():
    plain = NoiseSchedule.scaled_linear()
    rescaled = NoiseSchedule.scaled_linear(rescale_betas_zero_snr=True, prediction_type="sample")
    assert rescaled.alphas_cumprod[-1] == 0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1000, 37])
def test_timesteps_are_the_peer_s_for_every_count(spacing, total):
    for offset in (0, 1):
        fields = {"num_train_timesteps": total, "timestep_spacing": spacing, "steps_offset": offset}
        ours, theirs = NoiseSchedule(**fields), DDIMScheduler(**fields)
        for count in range(1, total + (0 if offset else 1)):
            if spacing == "leading" and total // count * (count - 1) + offset >= total:
                continue  # the peer hands out a timestep that it has no beta for; ours is tested below
            theirs.set_timesteps(count)
            # for some counts the peer's "trailing" ends with one timestep too many, -1
            assert ours.timesteps(count).tolist() == theirs.timesteps[:count].tolist()
    assert ours.timesteps(3).dtype == torch.int64


def test_timesteps_take_another_spacing():
    schedule = NoiseSchedule.linear()
    assert schedule.timesteps(4).tolist() == [750, 500, 250, 0]
    assert schedule.timesteps(4, steps_offset=1).tolist() == [751, 501, 251, 1]
    assert schedule.timesteps(4, spacing="trailing").tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_inference_steps": 0}, "use 1 to 1000"),
        ({"num_inference_steps": 1001}, "use 1 to 1000"),
        ({"num_inference_steps": 4.5}, "use 1 to 1000"),
        ({"num_inference_steps": 1000, "steps_offset": 1}, "steps_offset"),
        ({"num_inference_steps": 10, "spacing": "even"}, "leading, trailing, linspace"),
    ],
)
def test_timesteps_refuse_what_does_not_exist(arguments, said):
    with pytest.raises(InputError, match=said):
        NoiseSchedule.linear().timesteps(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noising_and_velocity_are_the_peer_s(dtype):
    schedule, peer = (
        NoiseSchedule.scaled_linear(),
        DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=dtype)
    t = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), peer.add_noise(x0, noise, t))
    torch.testing.assert_close(schedule.velocity(x0, noise, t), peer.get_velocity(x0, noise, t))


def test_noising_halves_rounds_once():
    """The factors stay float32: the result is the float32 one, rounded."""
    schedule = NoiseSchedule.scaled_linear()
    x0, noise = torch.randn(2, 64, 8, dtype=torch.bfloat16)
    t = torch.randint(1000, (64,))
    exact = schedule.add_noise(x0.float(), noise.float(), t)
    assert torch.equal(schedule.add_noise(x0, noise, t), exact.bfloat16())


def fields_of(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("peer", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("fields", SCHEDULES.values(), ids=SCHEDULES)
def test_config_goes_both_ways(fields, peer, tmp_path):
    theirs = peer(**fields, timestep_spacing="trailing", clip_sample_range=2.5, steps_offset=1)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    ours = NoiseSchedule.from_config(config)
    written = ours.to_config(peer.__name__)
    assert {k: v for k, v in config.items() if k != "_diffusers_version"} == written
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    back = peer.from_pretrained(tmp_path)
    assert fields_of(back) == fields_of(theirs)
    assert torch.equal(back.alphas_cumprod, ours.alphas_cumprod)


def test_absent_config_fields_are_the_peer_s_defaults():
    ours, theirs = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"}), DDIMScheduler()
    assert {key: getattr(ours, key) for key in fields_of(theirs)} == fields_of(theirs)


def test_a_config_of_2022_loads():
    config = {
        "_class_name": "DDIMScheduler",
        "timestep_values": None,
        "skip_prk_steps": True,
        "tensor_format": "pt",
    }
    assert NoiseSchedule.from_config(config).to_config() == NoiseSchedule.from_config({}).to_config()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler is not offered"),
        ({"beta_shedule": "linear"}, "beta_shedule"),
        ({"timestep_values": [1, 2]}, "timestep_values"),
        ({"beta_schedule": "sigmoid"}, "linear, scaled_linear, squaredcos_cap_v2"),
        ({"prediction_type": "eps"}, "epsilon, sample, v_prediction"),
        ({"variance_type": "learned"}, "fixed_small, fixed_large, learned_range"),
        ({"timestep_spacing": "even"}, "leading, trailing, linspace"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: give a whole number from 1"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps=1000.0"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"steps_offset": 0.7}, "steps_offset=0.7: give a whole number from 0"),
        ({"steps_offset": -3}, "steps_offset=-3"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 2.0}, r"use a ratio in \[0, 1\]"),
        ({"thresholding": True, "sample_max_value": 0}, "a max_value above 0"),
        ({"trained_betas": [0.1, 0.5, 1.0], "num_train_timesteps": 3}, "holds no picture"),
        (
            {"rescale_betas_zero_snr": True, "num_train_timesteps": 1, "prediction_type": "sample"},
            "cannot be rescaled",
        ),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"trained_betas": [0.1], "num_train_timesteps": 2}, "trained_betas has 1 values"),
        ({"trained_betas": [0.1, math.nan], "num_train_timesteps": 2}, "trained_betas has values that are"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "give numbers from 0 to 1"),
        ({"trained_betas": [-0.1, 0.5], "num_train_timesteps": 2}, "give numbers from 0 to 1"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range=-1.0: use a number above 0"),
        ({"rescale_betas_zero_snr": True}, "zero SNR"),
    ],
)
def test_unusable_configs_are_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        NoiseSchedule.from_config(config)


def test_abar_between_timesteps_has_its_sigma_on_the_line():
    schedule = NoiseSchedule.scaled_linear()
    alpha_bar = schedule.alpha_bar(torch.zeros(3, 2, 2), torch.tensor([0.0, 600.25, 999.0]))
    assert alpha_bar.shape == (3, 1, 1)
    sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod) ** 0.5
    expected = torch.stack([sigmas[0], 0.75 * sigmas[600] + 0.25 * sigmas[601], sigmas[999]])
    torch.testing.assert_close(((1 - alpha_bar) / alpha_bar).flatten() ** 0.5, expected, atol=0, rtol=1e-5)


def test_sections_are_those_of_the_published_respacing():
    schedule = NoiseSchedule.linear()
    fast = schedule.sections([10, 10, 3, 2, 2]).tolist()
    assert fast == [
        *[999, 800, 799, 600, 599, 500, 400],
        *[399, 377, 355, 333, 311, 288, 266, 244, 222, 200],
        *[199, 177, 155, 133, 111, 88, 66, 44, 22, 0],
    ]
    assert schedule.sections([100]).tolist() == schedule.timesteps(100, "linspace").tolist()
    # 10 = 4 + 3 + 3.
    assert NoiseSchedule.linear(10).sections([2, 3, 1]).tolist() == [7, 6, 5, 4, 3, 0]
    for counts, said in (
        ([], "counts is empty"),
        ([5, 0], r"part 2 has 5 .*use 1 to 5"),
        ([11], "use 1 to 10"),
    ):
        with pytest.raises(InputError, match=said):
            NoiseSchedule.linear(10).sections(counts)


def test_one_timestep_may_be_for_all_samples_and_a_graph_may_hold_it():
    schedule, x0, noise = NoiseSchedule.linear(), torch.randn(2, 3), torch.randn(2, 3)
    wanted = schedule.add_noise(x0, noise, torch.tensor([9, 9]))
    assert torch.equal(schedule.add_noise(x0, noise, torch.tensor(9)), wanted)
    compiled = torch.compile(schedule.add_noise, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x0, noise, torch.tensor([9, 9])), wanted)
