"""Finding, reading and writing the files of a model folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from fastldm.checks import is_number, with_article
from fastldm.errors import CheckpointError
from fastldm.io import atomic_file

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_AGAIN = "download or save it again"
_RANDOM_FILLS = {
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
}


class SkipInit(TorchFunctionMode):
    """Leave parameters unfilled where random values would be drawn only to be overwritten.

    Their memory is then never touched, and what is computed rather than drawn (tables in buffers) is right.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def resolve_folder(path: str | os.PathLike, subfolder: str | None, config_name: str) -> Path:
    """The local folder that holds `config_name`, fetched from the hub where `path` is a name there."""
    if not os.fspath(path):
        raise CheckpointError("the name of the model is empty; give the folder of a saved model")
    folder = Path(path)
    if not folder.exists():
        folder = _fetch(os.fspath(path), subfolder)
    folder = folder / subfolder if subfolder else folder
    if not (folder / config_name).is_file():
        # A run of `fastldm train` keeps its model in a folder below.
        below = (folder / "model" / config_name).is_file()
        advice = f"did you mean {folder / 'model'}?" if below else "give the folder of a saved model"
        raise CheckpointError(f"{folder} holds no {config_name}; {advice}")
    return folder


def _fetch(name: str, subfolder: str | None) -> Path:
    missing = f"{name} does not exist here"
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{missing}; give the folder of a saved model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}; if it is a name on the Hugging Face hub, install huggingface_hub"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        return Path(snapshot_download(name, allow_patterns=[f"{prefix}*.json", f"{prefix}*.safetensors"]))
    except Exception as error:  # whatever the hub's client raises: no network, no such name, no access
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{missing} and the hub did not give it: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {_not_whole(path, 'JSON')}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {with_article(type(content).__name__)}, not a JSON object; {_AGAIN}"
        )
    return content


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, if the folder has one. `model_max_length` in it is a number, or None."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    length = config.get("model_max_length")
    if length is not None and not (is_number(length) and length >= 1):
        raise CheckpointError(f"{file}: model_max_length is {length!r}; use a number from 1, or leave it out")
    return config


def with_variant(name: str, variant: str | None) -> str:
    """`a.safetensors` to `a.fp16.safetensors`; the index of shards to `a.safetensors.index.fp16.json`."""
    stem, dot, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}{dot}{suffix}"


def find_weights(folder: Path, names: tuple[str, ...], variant: str | None) -> Path:
    """The first of `names`, whole or as the index of its shards, that the folder has."""
    candidates = [with_variant(n, variant) for name in names for n in (name, f"{name}.index.json")]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    suffixes = (".safetensors", ".bin", ".index.json")
    present = sorted(file.name for file in folder.iterdir() if file.name.endswith(suffixes))
    raise CheckpointError(
        f"{folder} holds no {' or '.join(candidates)}; weights there: {', '.join(present) or 'none'}"
    )


def read_state_dict(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of all the files of an index, floating ones as `dtype`.

    They are copies: the files can be overwritten afterwards. One tensor at a time is held twice.
    """
    state: dict[str, torch.Tensor] = {}
    for file in _files(path):
        state |= _read_file(file, dtype)
    return state


def sha256(path: Path) -> str:
    """Hash of a file, or of all the files of an index one after the other."""
    digest = hashlib.sha256()
    try:
        for name in _files(path):
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights in {path}: {error}") from error
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """A file itself, or the files that an index names, in the order of their names."""
    if not path.name.endswith(".json"):
        return [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or any(Path(name).name != name for name in shards.values()):
        raise CheckpointError(f"{path} holds no weight_map of file names in its own folder")
    return [path.parent / name for name in sorted(set(shards.values()))]


def _read_file(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                keys = file.keys()
                return {key: _own(file.get_tensor(key), dtype) for key in keys}
        # Files from before PyTorch 1.6 are no archives, and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a truncated or foreign file fails in as many ways as there are readers
        raise CheckpointError(f"cannot read the weights in {path}: {_reason(path, error)}") from error
    return {key: _own(tensor, dtype) for key, tensor in _tensors_of(pickled, path).items()}


def _reason(path: Path, error: Exception) -> str:
    """Why a file of weights could not be read, in the place of its reader's own words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it is a pickle of more than tensors ({foreign[1]}); save model.state_dict() alone"
    return _not_whole(path, "safetensors" if path.suffix == ".safetensors" else "PyTorch")


def _not_whole(path: Path, kind: str) -> str:
    """What is wrong with a file that its reader does not understand, and what to do."""
    wrong = "it is empty" if path.stat().st_size == 0 else f"it is no {kind} file, or not a whole one"
    return f"{wrong}; {_AGAIN}"


def _tensors_of(pickled: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """The weights in what a file held: tensors by name, or these under `state_dict`, as trainers do."""
    if isinstance(pickled, Mapping) and isinstance(pickled.get("state_dict"), Mapping):
        pickled = pickled["state_dict"]
    if not isinstance(pickled, Mapping):
        raise CheckpointError(f"{path} holds {with_article(type(pickled).__name__)}, not tensors by name")
    for key, value in pickled.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} holds {with_article(type(value).__name__)} under {key!r}, where weights are tensors "
                "by name; save model.state_dict() alone"
            )
    return pickled


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy outside the mapped file, which another program may overwrite in place."""
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def write_safetensors(path: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Write tensors to `path` in one step, floating ones as `dtype`; `CheckpointError` if it cannot."""
    state = {
        key: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for key, tensor in state.items()
    }
    try:
        with atomic_file(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
