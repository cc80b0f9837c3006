"""Model folders: configuration, weights in every form they come in, and files that are never half written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastldm import io
from fastldm.checks import with_article
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import weights
from fastldm.models.base import Config, Model, configurable


class Small(Model):
    """A linear layer and a buffer, enough to save and load."""

    peer_defaults: ClassVar = {"groups": 1, "names": None}

    @configurable
    def __init__(self, width: int = 3, widths: tuple[int, ...] = (1, 2), bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(width, 4, bias=bias)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("table", torch.linspace(0, 1, width), persistent=False)


class Derived(Small):
    @configurable
    def __init__(self, extra: int = 7):
        super().__init__(width=extra)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Small(5)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_config_holds_arguments_and_defaults():
    config = Small(5, bias=False).config
    assert dict(config) == {"width": 5, "widths": (1, 2), "bias": False}
    assert config.width == 5
    assert config.get("absent", 9) == 9
    assert not hasattr(config, "absent")
    with pytest.raises(AttributeError, match="read-only"):
        config.width = 6
    with pytest.raises(TypeError):
        config["width"] = 6
    assert dict(pickle.loads(pickle.dumps(Config({"a": 1})))) == {"a": 1}
    assert dict(Derived().config) == {"extra": 7}


def test_config_fields_are_checked():
    assert (
        Small.from_config({"width": 2, "groups": 1, "_class_name": "Small", "_version": 3}).config.width == 2
    )
    with pytest.raises(ConfigError, match="no configuration field 'height'"):
        Small.from_config({"height": 2})
    with pytest.raises(ConfigError, match="groups only at 1, and 2 was given"):
        Small(groups=2)
    with pytest.raises(ConfigError, match="of a UNet2DModel, not of a Small"):
        Small.from_config({"_class_name": "UNet2DModel"})
    with pytest.raises(ConfigError, match="too many positional"):
        Small(1, (2,), True, 4)


def test_round_trip(saved):
    model, folder = saved
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    assert json.loads((folder / "config.json").read_text()) == {
        "_class_name": "Small",
        "width": 5,
        "widths": [1, 2],
        "bias": True,
    }
    again = Small.from_pretrained(str(folder))
    assert not again.training
    assert (again.dtype, again.device) == (torch.float32, torch.device("cpu"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert torch.equal(again.table, model.table), "a buffer that is not saved is computed, not left empty"
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_loading_draws_no_random_numbers(saved):
    _, folder = saved
    state = torch.get_rng_state()
    Small.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_loaded_weights_survive_the_file_being_overwritten(saved):
    model, folder = saved
    again = Small.from_pretrained(folder)
    with open(folder / WEIGHTS, "r+b") as file:  # in place, as other libraries save
        file.truncate(8)
    assert torch.equal(again.linear.weight, model.linear.weight)


def test_dtypes_and_variants(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(folder, variant="fp16", dtype=torch.float16)
    stored = load_file(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert stored["linear.weight"].dtype == torch.float16
    assert stored["steps"].dtype == torch.int64
    assert model.linear.weight.dtype == torch.float32
    again = Small.from_pretrained(folder, variant="fp16")
    assert again.dtype == torch.float32
    assert torch.equal(again.linear.weight, model.linear.weight.half().float())
    half = Small.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert (half.dtype, half.table.dtype, half.steps.dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)
    with pytest.raises(
        CheckpointError, match=r"no diffusion_pytorch_model\.int8\.safetensors .*weights there: "
    ):
        Small.from_pretrained(folder, variant="int8")


def test_subfolder(saved):
    model, folder = saved
    again = Small.from_pretrained(folder.parent, subfolder="model")
    assert torch.equal(again.linear.weight, model.linear.weight)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Small.from_pretrained(folder.parent, subfolder="unet")
    with pytest.raises(CheckpointError, match=r"holds no config\.json; did you mean .*model\?"):
        Small.from_pretrained(folder.parent)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(saved, variant):
    model, folder = saved
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    index = "diffusion_pytorch_model.safetensors.index" + (f".{variant}" if variant else "") + ".json"
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {key: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(state))}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    again = Small.from_pretrained(folder, variant=variant)
    assert torch.equal(again.linear.weight, model.linear.weight)
    content = b"".join((folder / name).read_bytes() for name in sorted(set(names.values())))
    assert weights.sha256(folder / index) == hashlib.sha256(content).hexdigest()

    (folder / index).write_text(json.dumps({"weight_map": {"linear.weight": f"../{WEIGHTS}"}}))
    with pytest.raises(CheckpointError, match="in its own folder"):
        Small.from_pretrained(folder, variant=variant)


def test_shards_as_diffusers_writes_them(tmp_path):
    from diffusers import UNet2DConditionModel as PeerUNet

    from fastldm.models import UNet2DConditionModel

    config = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    peer = PeerUNet(**config)
    peer.save_pretrained(tmp_path, max_shard_size="400KB", variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    ours = UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16")
    for key, tensor in peer.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


def test_pickled_weights(saved):
    model, folder = saved
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    again = Small.from_pretrained(folder)
    assert torch.equal(again.linear.weight, model.linear.weight)


def test_pickled_code_is_refused(saved):
    _, folder = saved

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    torch.save({"linear.weight": Payload()}, folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        Small.from_pretrained(folder)
    assert not (folder / "owned").exists()


def test_weights_that_do_not_fit_are_named(saved):
    _, folder = saved
    state = load_file(folder / WEIGHTS)
    state["linear.weight"] = torch.zeros(4, 2)
    state["conv.weight"] = state.pop("linear.bias")
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        Small.from_pretrained(folder)
    message = str(caught.value)
    assert "1 missing (linear.bias); 1 unexpected (conv.weight)" in message
    assert "1 of another shape (linear.weight is (4, 2), not (4, 5))" in message
    assert "\n" not in message


def test_unreadable_files_are_named(saved, tmp_path, monkeypatch):
    _, folder = saved
    with pytest.raises(CheckpointError, match=r"nowhere does not exist here; give the folder"):
        Small.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="some/name does not exist here and the hub did not give it"):
        Small.from_pretrained("some/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="install huggingface_hub"):
        Small.from_pretrained("some/name")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        Small.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="weights there: none"):
        Small.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"cannot read .*config\.json: it is no JSON file, or not a whole"
    ):
        Small.from_pretrained(folder)
    (folder / "config.json").write_text("")
    with pytest.raises(CheckpointError, match=r"config\.json: it is empty; download or save it again"):
        Small.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Small.from_pretrained(folder)


def test_old_attention_names_are_renamed():
    keys = ["mid_block.attentions.0.query.weight", "up.attentions.1.proj_attn.bias", "class.query.weight"]
    converted = Small()._convert_old_keys({key: torch.zeros(1) for key in keys})
    assert list(converted) == [
        "mid_block.attentions.0.to_q.weight",
        "up.attentions.1.to_out.0.bias",
        "class.query.weight",
    ]


def test_gradient_checkpointing_needs_a_layer_that_has_it():
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        Small().enable_gradient_checkpointing()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_file(saved, monkeypatch, error):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def write_half(_state, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(weights, "save_file", write_half)
    with torch.no_grad():
        model.linear.weight.zero_()
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot save Small to"):
        Small().save_pretrained(tmp_path / "file")


def test_killed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "state"
    target.write_text("old")
    script = (
        "import os, sys\nfrom fastldm import io\n"
        "with io.atomic_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == 9
    assert target.read_text() == "old"


def test_atomic_write(tmp_path):
    io.atomic_write(tmp_path / "a", "ä")
    io.atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_folder(tmp_path, monkeypatch):
    target = tmp_path / "run" / "checkpoint"
    for content in ("first", "second"):
        with io.atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(content)
        assert (target / "sub" / "file").read_text() == content
        assert os.listdir(target.parent) == ["checkpoint"]

    def stop_half_way():
        with io.atomic_folder(target) as folder:
            (folder / "file").write_text("third")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert (target / "sub" / "file").read_text() == "second"
    assert os.listdir(target.parent) == ["checkpoint"]

    replace = os.replace

    def fail_on_new(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError("cannot rename")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_on_new)
    with pytest.raises(OSError, match="cannot rename"), io.atomic_folder(target) as folder:
        (folder / "file").write_text("third")
    monkeypatch.undo()
    assert (target / "sub" / "file").read_text() == "second"
    assert os.listdir(target.parent) == ["checkpoint"]

    target.rename(target.with_name(".checkpoint.old"))  # as a kill between the two renames leaves it
    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert (target / "sub" / "file").read_text() == "second"


def test_saved_files_have_the_permissions_of_ordinary_files(tmp_path):
    (tmp_path / "ordinary").touch()
    wanted = (tmp_path / "ordinary").stat().st_mode
    Small().save_pretrained(tmp_path / "net")
    assert {path.stat().st_mode for path in (tmp_path / "net").iterdir()} == {wanted}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": "four"}, "no Tiny can be built from this configuration: width takes int, got 'four'"),
        ({"width": True}, "width takes int, got True"),
        ({"width": 4.5}, "width takes int, got 4.5"),
        ({"widht": 4}, r"Tiny has no configuration field 'widht' \(given 4\); did you mean width\?"),
        ({"xyzzy": 4}, "'xyzzy' .*; remove it"),
    ],
)
def test_fields_of_another_type_or_name_are_said_before_the_network_is_built(fields, said):
    class Tiny(Model):
        @configurable
        def __init__(
            self,
            width: int = 4,
            rate: float | None = 0.5,
            sizes: Sequence[int] = (1, 2),
            kinds: Sequence[str] = ("a",),
        ) -> None:
            super().__init__()
            assert isinstance(width, int)

    with pytest.raises(ConfigError, match=said):
        Tiny.from_config(fields)
    with pytest.raises(ConfigError, match="rate takes float or null, got '1'"):
        Tiny(rate="1")
    for sizes in ("12", 3, [1, "2"]):
        with pytest.raises(ConfigError, match="sizes takes a list of int"):
            Tiny(sizes=sizes)
    with pytest.raises(ConfigError, match="kinds takes a list of str, got 'DownBlock2D'"):
        Tiny(kinds="DownBlock2D")
    assert Tiny(width=2, rate=1, sizes=[3]).config.rate == 1
    assert Tiny(rate=None).config.rate is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ADMClassifier", "an ADMClassifier"),
        ("AutoencoderKL", "an AutoencoderKL"),
        ("LDMBertModel", "an LDMBertModel"),
        ("UNet2DConditionModel", "a UNet2DConditionModel"),
        ("VQModel", "a VQModel"),
        ("LatentDiffusionPipeline", "a LatentDiffusionPipeline"),
        ("int", "an int"),
        ("str", "a str"),
    ],
)
def test_names_have_the_article_they_are_said_with(name, said):
    assert with_article(name) == said


def test_the_name_of_a_model_is_not_empty():
    with pytest.raises(CheckpointError, match="the name of the model is empty"):
        Small.from_pretrained("")


class Listed(Sequence):
    """A sequence that is neither list nor tuple, as configuration libraries have them."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, index):
        return self.values[index]

    def __len__(self):
        return len(self.values)


@pytest.mark.parametrize("widths", [(np.int32(1), torch.tensor(2).item()), Listed(np.int64(1), 2)])
def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path, widths):
    Small(np.int64(5), widths=widths).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "_class_name": "Small",
        "width": 5,
        "widths": [1, 2],
        "bias": True,
    }
    assert Small.from_pretrained(tmp_path).config.widths == [1, 2]


def test_what_json_does_not_hold_is_refused_and_the_old_file_stays(tmp_path):
    file = tmp_path / "file.json"
    io.write_json(file, {"a": np.float32(0.5), "b": torch.tensor(2), "c": Config({"d": np.arange(2)})})
    assert json.loads(file.read_text()) == {"a": 0.5, "b": 2, "c": {"d": [0, 1]}}
    with pytest.raises(TypeError, match="JSON holds no set"):
        io.write_json(file, {"a": {1}})
    assert json.loads(file.read_text())["a"] == 0.5
    assert os.listdir(tmp_path) == ["file.json"]
