"""Training configurations: files, overrides, checks."""

from __future__ import annotations

import sys

import pytest

from fastldm.diffusion.samplers import SAMPLERS
from fastldm.errors import ConfigError, FastLDMError
from fastldm.training.annotated import annotated_yaml
from fastldm.training.config import (
    ClassifierConfig,
    CLIPTrainingConfig,
    FirstStageConfig,
    GlideConfig,
    LatentDiffusionConfig,
    differing_keys,
    from_mapping,
    load_config,
    shipped_configs,
    to_mapping,
    to_yaml,
)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_and_survive_being_written(name, tmp_path):
    kinds = {
        "ldm": LatentDiffusionConfig,
        "clip": CLIPTrainingConfig,
        "classifier": ClassifierConfig,
        "glide": GlideConfig,
        "upsampler": GlideConfig,
        "text": LatentDiffusionConfig,
    }
    cls = kinds.get(name.rpartition("-")[2], FirstStageConfig)
    config = load_config(cls, name)
    assert config.name == name
    file = tmp_path / "config.yaml"
    for text in (to_yaml(config), annotated_yaml(config)):
        file.write_text(text)
        assert load_config(cls, file) == config


def test_keys_are_shown_below_what_they_mean():
    lines = annotated_yaml(load_config(GlideConfig, {"unet": {"dropout": 0.5}})).splitlines()

    def above(line):
        return lines[lines.index(line) - 1]

    assert above("max_length: 12") == "# Tokens per caption."
    assert above("batch_size: 64") == "# Pictures per process and micro-step."  # inherited
    assert above("  size: 64") == "  # Side of the square training picture in pixels."
    # Over two lines in the code, and wrapped again here.
    start = lines.index("start_from: null")
    said = " ".join(line.removeprefix("# ") for line in lines[start - 2 : start])
    assert said.startswith("Folder of a trained GLIDE to train further: its network, tokenizer and schedule")
    # Without a docstring there is no comment.
    assert above("seed: 0") == "output_dir: runs"
    assert above("  dropout: 0.5") == "unet:"
    assert all(len(line) <= 114 for line in lines)


def test_the_two_configurations_of_the_shipped_model_are_there():
    assert {"shapes-vq", "shapes-ldm"} <= set(shipped_configs())


def test_overrides_reach_nested_keys_and_free_mappings():
    config = load_config(
        LatentDiffusionConfig,
        {"unet": {"layers_per_block": 2}},
        [
            "optimizer.lr=3e-4",
            "ema.enabled=false",
            "unet.block_out_channels=[32, 64]",
            "mixed_precision=no",
            "first_stage.scaling_factor=0.5",
            "optimizer.max_grad_norm=null",
            "optimizer.betas=[0.5, 0.9]",
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert config.ema.enabled is False
    assert config.unet == {"layers_per_block": 2, "block_out_channels": [32, 64]}
    assert config.mixed_precision == "no"
    assert config.first_stage.scaling_factor == 0.5
    assert config.optimizer.max_grad_norm is None
    assert config.optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 4}, r"'batchsize'; did you mean batch_size"),
        ({"optimizer": {"learning_rate": 1}}, r"'optimizer.learning_rate'; (did you mean|accepted here)"),
        ({"optimizer": {"lrr": 1}}, r"did you mean lr"),
        ({"zzz": 1}, r"'zzz'; accepted here: .*batch_size"),
        ({"batch_size": "many"}, r"'batch_size' takes int, got 'many'"),
        ({"batch_size": 2.5}, r"'batch_size' takes int"),
        ({"batch_size": True}, r"'batch_size' takes int"),
        ({"batch_size": 0}, r"'batch_size' must be at least 1, got 0"),
        ({"mixed_precision": "bf32"}, r"'no' or 'bf16' or 'fp16', got 'bf32'"),
        ({"optimizer": 3}, r"'optimizer' needs keys of its own"),
        ({"optimizer": {"lr": -1}}, r"'optimizer.lr' must be above 0"),
        ({"optimizer": {"betas": [0.9]}}, r"'optimizer.betas' takes a tuple of float, float"),
        ({"ema": {"decay": 1.0}}, r"'ema.decay' must be at least 0 and below 1"),
        ({"condition_dropout": 1.5}, r"'condition_dropout' must be at least 0 and at most 1"),
        ({"first_stage": {"scaling_factor": "mean"}}, r"float or 'std' or null, got 'mean'"),
        ({"sampling": {"prompts": "a red circle"}}, r"'sampling.prompts' takes a list"),
        ({"sampling": {"sampler": "dpm"}}, r"'sampling.sampler' takes 'ddim' or .* or 'unipc', got 'dpm'"),
        ({"name": "a/b"}, r"name='a/b' must be the name of one folder"),
    ],
)
def test_a_wrong_key_or_value_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(LatentDiffusionConfig, values)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_during_training_come_from_any_sampler(sampler):
    config = load_config(LatentDiffusionConfig, {}, [f"sampling.sampler={sampler}"])
    assert config.sampling.sampler == sampler


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "name.first=x", "name=[1"])
def test_an_override_that_cannot_be_read_is_named(override):
    with pytest.raises(ConfigError, match=r"override|name\.first"):
        load_config(FirstStageConfig, {"name": "run"}, [override])


def test_a_missing_file_names_the_shipped_configurations(tmp_path):
    with pytest.raises(ConfigError, match="shapes-ldm"):
        load_config(FirstStageConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(FirstStageConfig, file)


def test_mapping_round_trip_and_differences():
    config = load_config(FirstStageConfig, {"optimizer": {"betas": [0.5, 0.9]}})
    plain = to_mapping(config)
    assert from_mapping(FirstStageConfig, plain) == config
    other = load_config(FirstStageConfig, plain, ["optimizer.lr=1.0", "batch_size=3"])
    assert differing_keys(plain, to_mapping(other)) == ["batch_size", "optimizer.lr"]


def test_without_the_train_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(FastLDMError, match=r"pip install 'fastldm\[train\]'") as caught:
        load_config(FirstStageConfig, "shapes-vq")
    assert "\n" not in str(caught.value)
