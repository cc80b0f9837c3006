"""What every model shares: a configuration, and a folder of `config.json` and safetensors it is kept in.

The folders are those of diffusers, both ways: `from_pretrained` reads what diffusers wrote, and diffusers
reads what `save_pretrained` writes.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastldm.checks import did_you_mean, is_of_type, type_in_words, with_article
from fastldm.errors import CheckpointError, ConfigError
from fastldm.io import write_json
from fastldm.models import weights

M = TypeVar("M", bound="Model")

# The names that diffusers' first autoencoders gave the projections of an attention layer.
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


class Config(Mapping[str, Any]):
    """A read-only mapping whose entries are attributes too: `config.dropout` is `config["dropout"]`."""

    def __init__(self, values: Mapping[str, Any]):
        object.__setattr__(self, "_values", dict(values))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for attributes before __init__ has run
        if not name.startswith("_") and name in self._values:
            return self._values[name]
        raise AttributeError(f"the configuration has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a model's configuration is read-only; build another model to change {name!r}")

    def __repr__(self) -> str:
        return f"Config({self._values!r})"


def configurable(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a model's `__init__`: its arguments, defaults included, become `self.config`.

    Keywords that the model does not take are checked against `peer_defaults`, so that a peer's whole
    configuration can be passed as it is; anything else raises `ConfigError`, and so does a value of another
    type than its argument is annotated with.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Model, *args: Any, **kwargs: Any) -> None:
        for name in [name for name in kwargs if name not in signature.parameters]:
            self._check_foreign_field(name, kwargs.pop(name))
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from None
        _check_types(type(self), typing.get_type_hints(init), bound.arguments)
        bound.apply_defaults()
        values = dict(bound.arguments)
        del values[next(iter(signature.parameters))]
        # a subclass whose __init__ is decorated too has already set its own, larger configuration
        if "config" not in self.__dict__:
            object.__setattr__(self, "config", Config(values))
        init(self, *args, **kwargs)

    return wrapped


class Model(nn.Module):
    """Base class of the networks. Subclasses decorate `__init__` with `configurable`."""

    config: Config
    config_name: ClassVar[str] = "config.json"
    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    """The safetensors file; pickled weights are looked for under `pickled_weights_name` after it."""
    pickled_weights_name: ClassVar[str] = "diffusion_pytorch_model.bin"
    peer_defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields of the peer's configuration that have no meaning here, and the only value accepted for each."""
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset()
    """Bookkeeping of the peer in `config.json` beyond the keys that begin with an underscore."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters (of the first floating one)."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the parameters (of the first one)."""
        return next(self.parameters()).device

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time per step."""
        switches = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]
        if not switches:
            raise ConfigError(f"{type(self).__name__} has no layer that supports gradient checkpointing")
        for module in switches:
            module.gradient_checkpointing = enabled

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any]) -> M:
        """A model with fresh weights from a mapping, such as a parsed `config.json`.

        Raises `ConfigError` for unknown fields, and for fields of the peer alone that are not at its default.
        """
        peer_class = config.get("_class_name", cls.__name__)
        if peer_class != cls.__name__:
            raise ConfigError(
                f"the configuration is of {with_article(peer_class)}, not of {with_article(cls.__name__)}; "
                "load it with that class"
            )
        ignored = cls.ignored_config_keys
        fields = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}
        try:
            return cls(**fields)
        except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = " ".join(str(error).split())
            raise ConfigError(f"no {cls.__name__} can be built from this configuration: {reason}") from error

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> M:
        """Load a model from a folder, in evaluation mode, on the CPU.

        Args:
            path: a folder, or a name on the Hugging Face hub if `huggingface_hub` is installed.
            subfolder: the folder inside it that holds the model, for a whole pipeline.
            torch_dtype: of the parameters; None means float32 whatever is stored.
            variant: reads `<name>.<variant>.safetensors`, e.g. "fp16".

        Raises `CheckpointError` for a missing or unreadable file and for weights that do not fit,
        `ConfigError` for a configuration that is not this class's.
        """
        folder = weights.resolve_folder(path, subfolder, cls.config_name)
        config = weights.read_json(folder / cls.config_name)
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"torch_dtype={torch_dtype!r}: give a floating dtype, such as torch.float16")
        with weights.SkipInit():
            model = cls.from_config(config)
        source = weights.find_weights(folder, (cls.weights_name, cls.pickled_weights_name), variant)
        state = model._convert_old_keys(weights.read_state_dict(source, dtype))
        model.load_checked(state, source=source)
        return model.to(dtype).eval()

    def save_pretrained(
        self, path: str | os.PathLike, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and the weights into the folder `path`, made if needed.

        Each file is replaced in one step: a full disk or a kill leaves the one that was there. `dtype`
        converts the floating weights on the way out; `variant` names the file: `<name>.fp16.safetensors`.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / weights.with_variant(self.weights_name, variant)
            state = {self._file_key(key): tensor for key, tensor in self._exported_state_dict().items()}
            weights.write_safetensors(file, state, dtype)
            write_json(folder / self.config_name, self._exported_config())
        except OSError as error:
            raise CheckpointError(f"cannot save {type(self).__name__} to {folder}: {error}") from error

    def load_checked(self, state: Mapping[str, torch.Tensor], *, source: str | os.PathLike) -> None:
        """Take over the tensors of `state`, or raise `CheckpointError` saying how `source` does not fit."""
        own = self.state_dict()
        required = self._exported_state_dict().keys()
        missing = [key for key in required if key not in state]
        unexpected = [key for key in state if key not in own]
        reshaped = [
            f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in state
            if key in own and state[key].shape != own[key].shape
        ]
        problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
        if any(keys for _, keys in problems):
            report = "; ".join(f"{len(keys)} {kind}{_some(keys)}" for kind, keys in problems if keys)
            raise CheckpointError(f"{source} does not fit {type(self).__name__}: {report}")
        self.load_state_dict(dict(state), strict=False, assign=True)

    def _exported_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that are saved and that a checkpoint must have; training state can be left out."""
        return self.state_dict()

    def _file_key(self, key: str) -> str:
        """The name in files of what is called `key` here; `_convert_old_keys` leads back."""
        return key

    def _exported_config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"_class_name": type(self).__name__, **self.config}

    def _convert_old_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename keys of older checkpoints to today's; extend it for a model with a history of its own."""
        renamed = {}
        for key, tensor in state.items():
            match = _OLD_ATTENTION_KEY.fullmatch(key)
            if match is not None:
                path, name, kind = match.groups()
                key = f"{path}.{_OLD_ATTENTION_NAMES[name]}.{kind}"
            renamed[key] = tensor
        return renamed

    @classmethod
    def _check_foreign_field(cls, name: str, value: Any) -> None:
        """Accept a peer's field at its default; `ConfigError` for another value or an unknown field."""
        if name not in cls.peer_defaults:
            known = [field for field in inspect.signature(cls.__init__).parameters if field != "self"]
            hint = did_you_mean(name, known, "remove it")
            raise ConfigError(f"{cls.__name__} has no configuration field {name!r} (given {value!r}); {hint}")
        if value != cls.peer_defaults[name]:
            raise ConfigError(
                f"{cls.__name__} supports {name} only at {cls.peer_defaults[name]!r}, and {value!r} was given"
            )


def _check_types(cls: type[Model], hints: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in hints and not is_of_type(value, hints[name]):
            raise ConfigError(
                f"no {cls.__name__} can be built from this configuration: {name} takes "
                f"{type_in_words(hints[name])}, got {value!r}"
            )


def _some(keys: list[str], limit: int = 3) -> str:
    """The first few of a list, in brackets."""
    return f" ({', '.join(keys[:limit])}{', ...' if len(keys) > limit else ''})"
