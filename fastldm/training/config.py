"""Training configurations: dataclasses filled from YAML files and `key=value` overrides, every key checked.

`TrainingConfig` holds what every run needs (data, optimiser, loop); `FirstStageConfig`,
`LatentDiffusionConfig`, `CLIPTrainingConfig`, `ClassifierConfig` and `GlideConfig` add the model and the
loss. The fields that hold a network's own configuration (`model.config`, `unet`, ...) are plain mappings: the
network checks them when it is built.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastldm.checks import did_you_mean, type_in_words
from fastldm.errors import ConfigError
from fastldm.training.extras import require

T = TypeVar("T")


@dataclass
class DataConfig:
    """What to train on: the built-in captioned shapes or a folder of pictures with `metadata.jsonl`."""

    source: Literal["shapes", "image_folder"] = "shapes"
    path: str | None = None
    """Folder of pictures (`source: image_folder`)."""
    size: int = 64
    """Side of the square training picture in pixels."""
    length: int = 16384
    """Number of pictures drawn for `source: shapes`."""
    kind: Literal["one", "two", "mixed"] = "mixed"
    """`source: shapes`: one object, two objects with a relation, or both."""
    attributes: list[Literal["colour", "shape", "size", "place", "relation"]] | None = None
    """`source: shapes`: what canonical captions say; null = everything, two in five in other words."""
    random_flip: bool = False
    """Mirror half of the pictures (`source: image_folder`); wrong for captions that say left or right."""
    num_workers: int = 0
    """Processes that read pictures; 0 reads them in the training process."""

    def __post_init__(self) -> None:
        _require("data.size", self.size, at_least=1)
        _require("data.length", self.length, at_least=1)
        _require("data.num_workers", self.num_workers, at_least=0)
        if self.source == "shapes" and (self.path is not None or self.random_flip):
            key = "data.path" if self.path is not None else "data.random_flip"
            raise ConfigError(f"{key} is for folders of pictures; add data.source=image_folder")


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) with linear warmup."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    """Learning rate that the cosine reaches at the last step."""
    max_grad_norm: float | None = 1.0
    """Norm to which the gradient of all trained parameters together is clipped; null = never."""

    def __post_init__(self) -> None:
        _require("optimizer.lr", self.lr, above=0)
        _require("optimizer.weight_decay", self.weight_decay, at_least=0)
        _require("optimizer.eps", self.eps, above=0)
        _require("optimizer.warmup_steps", self.warmup_steps, at_least=0)
        _require("optimizer.final_lr", self.final_lr, at_least=0)
        for beta in self.betas:
            _require("optimizer.betas", beta, at_least=0, below=1)
        if self.max_grad_norm is not None:
            _require("optimizer.max_grad_norm", self.max_grad_norm, above=0)


@dataclass
class EMAConfig:
    """Exponential moving average of the trained weights, used for samples and for the export."""

    enabled: bool = True
    decay: float = 0.9999
    """Upper bound; at update n the decay is min(decay, (1 + n) / (10 + n))."""

    def __post_init__(self) -> None:
        _require("ema.decay", self.decay, at_least=0, below=1)


@dataclass
class TrainingConfig:
    """What every run needs."""

    name: str = "run"
    output_dir: str = "runs"
    """The run writes to output_dir/name."""
    seed: int = 0
    max_steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Pictures per process and micro-step."""
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are removed once a newer one is complete."""
    sample_every: int = 500
    """Steps between two picture grids; 0 = none."""
    compile: bool = False
    """torch.compile the trained networks."""
    gradient_checkpointing: bool = False
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(
                f"name={self.name!r} must be the name of one folder; put its parent in output_dir"
            )
        for key in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
        ):
            _require(key, getattr(self, key), at_least=1)
        _require("keep_checkpoints", self.keep_checkpoints, at_least=1)
        _require("sample_every", self.sample_every, at_least=0)
        _require("seed", self.seed, at_least=0, below=2**63)


@dataclass
class FirstStageModelConfig:
    kind: Literal["vq", "kl"] = "vq"
    """`vq`: VQModel, `kl`: AutoencoderKL."""
    config: dict[str, Any] = field(default_factory=dict)
    """The model's own config.json fields."""
    ema_codebook_decay: float | None = None
    """Decay of the EMA codebook (van den Oord et al. 2017, appendix A.1); null = trained by its loss."""
    revive_below: float = 0.0
    """EMA codebook: a code with a smaller mean count per batch moves onto an encoder output; 0 = never."""

    def __post_init__(self) -> None:
        if self.kind == "kl" and (self.ema_codebook_decay is not None or self.revive_below):
            raise ConfigError("model.ema_codebook_decay and model.revive_below are for model.kind=vq")


@dataclass
class FirstStageConfig(TrainingConfig):
    """`fastldm train vq`: a VQ-VAE or a KL autoencoder on pictures."""

    name: str = "vq"
    model: FirstStageModelConfig = field(default_factory=FirstStageModelConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    """Arguments of fastldm.training.first_stage.FirstStageLoss."""
    init_codebook: bool = True
    """Start every code at an encoder output of the first pictures instead of U(-1/K, 1/K)."""


@dataclass
class FrozenFirstStageConfig:
    path: str = ""
    """Folder of a trained VQModel or AutoencoderKL (the `model` folder of a `train vq` run); folder or
    shipped name ("shapes") of a whole pipeline, to take its first stage; or "pixels": no first stage."""
    scaling_factor: float | Literal["std"] | None = None
    """Multiplies the latents; "std" = 1 / standard deviation of the first batch (Rombach et al. 2022); null =
    the factor of a pipeline, 1 in pixels, else "std"."""

    def __post_init__(self) -> None:
        if isinstance(self.scaling_factor, float):
            _require("first_stage.scaling_factor", self.scaling_factor, above=0)


def _pixels() -> FrozenFirstStageConfig:
    return FrozenFirstStageConfig(path="pixels")


@dataclass
class ConditionerConfig:
    """tau_theta: what turns a condition into cross-attention tokens or extra input channels."""

    kind: Literal["text", "class", "image"] = "text"
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the text encoder (LDMBertModel), or arguments of ClassConditioner or SpatialConditioner."""
    tokenizer: str | None = None
    """Text: a tokenizer folder or file; null = a word-level one made from the captions of the data."""
    max_length: int = 24
    """Text: tokens per caption of a tokenizer made from the captions, start and end included."""

    def __post_init__(self) -> None:
        _require("conditioner.max_length", self.max_length, at_least=3)


@dataclass
class SamplingConfig:
    """How the pictures during training are made; stored in the export as the model's defaults."""

    prompts: list[str | int] = field(default_factory=list)
    """Captions (text) or labels (class); empty = the first conditions of the data."""
    num_images: int = 8
    """Pictures when `prompts` is empty."""
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    sampler: Literal["ddim", "ddpm", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"] = "ddim"

    def __post_init__(self) -> None:
        _require("sampling.num_images", self.num_images, at_least=1)
        _require("sampling.num_inference_steps", self.num_inference_steps, at_least=1)
        _require("sampling.guidance_scale", self.guidance_scale, above=-math.inf)


@dataclass
class LatentDiffusionConfig(TrainingConfig):
    """`fastldm train ldm`: the denoiser and tau_theta, jointly, on the latents of a frozen first stage."""

    name: str = "ldm"
    first_stage: FrozenFirstStageConfig = field(default_factory=FrozenFirstStageConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    unet: dict[str, Any] = field(default_factory=dict)
    """config.json fields of UNet2DConditionModel."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Fields of scheduler_config.json: beta_schedule, beta_start, beta_end, num_train_timesteps, ..."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    condition_dropout: float = 0.1
    """Probability with which a sample is trained on the null condition (classifier-free guidance)."""
    snr_gamma: float | None = None
    """Min-SNR loss weighting (Hang et al. 2023) with this gamma; null = plain mean squared error. With
    schedule.rescale_betas_zero_snr the last timestep has weight 0 and is not trained."""
    cache_latents: bool = False
    """Encode the data once, before training: the same losses as encoding each batch, up to rounding. In
    pixels there is nothing to encode, and it changes nothing."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("condition_dropout", self.condition_dropout, at_least=0, at_most=1)
        if self.snr_gamma is not None:
            _require("snr_gamma", self.snr_gamma, above=0)
        if self.schedule.get("prediction_type", self.prediction_type) != self.prediction_type:
            raise ConfigError(
                f"schedule.prediction_type={self.schedule['prediction_type']!r}, but "
                f"prediction_type={self.prediction_type!r}: set prediction_type, and leave the other out"
            )


@dataclass
class CLIPTrainingConfig(TrainingConfig):
    """`fastldm train clip`: an image and a text tower on captioned pictures, also noised ones."""

    name: str = "clip"
    model: dict[str, Any] = field(default_factory=dict)
    """config.json fields of CLIPModel; sizes of pictures and of the vocabulary follow from the data."""
    tokenizer: str | None = None
    """Folder of a CLIPTokenizer; null = one that learns from the captions of the data."""
    max_length: int = 24
    """Tokens per caption, start and end included."""
    merges: int = 1024
    """Most merges of a tokenizer that learns from the captions."""
    noised: bool = False
    """Train on x_t ~ q(x_t | x_0) at uniform t, which the image tower is told (Nichol et al. 2022)."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """`noised`: fields of scheduler_config.json, those of the diffusion that the model will guide; empty =
    the schedule of the pipeline at first_stage.path, else diffusers' defaults."""
    first_stage: FrozenFirstStageConfig = field(default_factory=_pixels)
    """Where the image tower is trained: in pixels, or on the latents of a first stage."""
    cache_latents: bool = False
    """Encode the data once, before training; in pixels it changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("max_length", self.max_length, at_least=3)
        _require("merges", self.merges, at_least=0)
        _require("batch_size", self.batch_size, at_least=2)
        if self.schedule and not self.noised:
            raise ConfigError("schedule is for noised CLIP; add noised=true")


@dataclass
class ClassifierConfig(TrainingConfig):
    """`fastldm train classifier`: classes of x_t ~ q(x_t | x_0) at uniform t (Dhariwal & Nichol 2021)."""

    name: str = "classifier"
    model: dict[str, Any] = field(default_factory=dict)
    """config.json fields of the classifier; the sizes of its input and output follow from the data."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Fields of scheduler_config.json, those of the diffusion that the classifier will guide; empty = the
    schedule of the pipeline at first_stage.path, else diffusers' defaults."""
    first_stage: FrozenFirstStageConfig = field(default_factory=_pixels)
    """Where the classifier is trained: in pixels, or on the latents of a first stage."""
    cache_latents: bool = False
    """Encode the data once, before training; in pixels it changes nothing."""


@dataclass
class GlideConfig(TrainingConfig):
    """`fastldm train glide`: GLIDE's base network or its upsampler, in pixels (Nichol et al. 2022)."""

    name: str = "glide"
    low_res: int | None = None
    """Side of the small pictures that an upsampler enlarges to data.size; null = a base network."""
    inpainting: bool = False
    """Train on pictures of which random regions are erased, and show the network the rest."""
    start_from: str | None = None
    """Folder of a trained GLIDE to train further: its network, tokenizer and schedule count then. With
    `inpainting` it is given the input channels for that, which start at zero."""
    unet: dict[str, Any] = field(default_factory=dict)
    """config.json fields of GlideUNet; sizes of pictures and of texts follow from the rest."""
    tokenizer: str | None = None
    """Folder of a GlideTokenizer; null = one that learns from the captions of the data."""
    max_length: int = 12
    """Tokens per caption."""
    merges: int = 1024
    """Most merges of a tokenizer that learns from the captions."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Fields of scheduler_config.json where they are not GLIDE's: cosine betas for a base and linear ones for
    an upsampler, with a learned variance."""
    condition_dropout: float = 0.2
    """Probability with which a sample is trained on the empty caption (classifier-free guidance)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """`prompts` are for a base that does not inpaint; the others show pictures of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("condition_dropout", self.condition_dropout, at_least=0, at_most=1)
        _require("max_length", self.max_length, at_least=1)
        _require("merges", self.merges, at_least=0)
        if self.low_res is not None:
            _require("low_res", self.low_res, at_least=1, below=self.data.size)
        given = [key for key in ("unet", "tokenizer", "schedule") if getattr(self, key)]
        if self.start_from is not None and given:
            raise ConfigError(
                f"{', '.join(given)} with start_from={self.start_from}: those of that folder are used; leave "
                "them out"
            )
        if self.sampling.prompts and (self.low_res is not None or self.inpainting):
            raise ConfigError(
                "sampling.prompts are for a base network that does not inpaint; leave them empty, and the "
                "first pictures of the data are shown"
            )


def shipped_configs() -> list[str]:
    """Names accepted by `load_config` besides paths."""
    folder = resources.files("fastldm") / "configs"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(cls: type[T], source: str | Path | Mapping, overrides: Sequence[str] = ()) -> T:
    """Fill `cls` from a YAML file, the name of a shipped configuration, or a mapping.

    Args:
        cls: FirstStageConfig, LatentDiffusionConfig, CLIPTrainingConfig, ClassifierConfig or GlideConfig.
        source: path of a YAML file, a name of `shipped_configs()`, or a mapping.
        overrides: "dotted.key=value" strings, the value in YAML ("optimizer.lr=3e-4", "ema.enabled=false").

    Raises:
        ConfigError: no such file, YAML that does not parse, unknown key, value of the wrong type.
    """
    values = source if isinstance(source, Mapping) else _read_yaml(str(source))
    values = _plain(values)
    for override in overrides:
        _override(values, override)
    return from_mapping(cls, values)


def from_mapping(cls: type[T], values: Mapping, where: str = "") -> T:
    """Fill the dataclass `cls`; nested dataclasses from nested mappings."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(_unknown_key(f"{where}{key}", str(key), hints))
        arguments[key] = _convert(value, hints[key], f"{where}{key}")
    return cls(**arguments)


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a configuration, the inverse of `from_mapping`."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    yaml = require("yaml")
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def differing_keys(one: Mapping, other: Mapping, where: str = "") -> list[str]:
    """Dotted names of the leaves in which two plain configurations differ."""
    names = []
    for key in sorted({*one, *other}):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing_keys(left, right, f"{where}{key}.")
        elif left != right:
            names.append(f"{where}{key}")
    return names


def checked_arguments(function: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The mapping as keyword arguments of `function`; ConfigError for a key that it does not take, and for a
    value of another type than its annotation."""
    known = inspect.signature(function).parameters
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for key in arguments:
        if key not in known:
            raise ConfigError(_unknown_key(f"{where}.{key}", str(key), known))
    return {key: _convert(value, hints[key], f"{where}.{key}") for key, value in arguments.items()}


def _read_yaml(source: str) -> dict:
    yaml = require("yaml")
    if source in shipped_configs():
        text = (resources.files("fastldm") / "configs" / f"{source}.yaml").read_text("utf-8")
    else:
        try:
            text = Path(source).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            names = ", ".join(shipped_configs())
            raise ConfigError(
                f"cannot read the configuration {source!r}: {reason}; give a YAML file or one of {names}"
            ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the configuration {source!r} is not valid YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"the configuration {source!r} holds a {type(values).__name__}, not keys with values"
        )
    return values


def _override(values: dict, override: str) -> None:
    yaml = require("yaml")
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"cannot read the override {override!r}; write key=value, for example optimizer.lr=3e-4"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in the override {override!r} is not valid YAML") from error
    *parents, last = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"cannot set {name!r}: {parent!r} has no keys of its own")
    values[last] = value


def _require(
    key: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """ConfigError unless above < value < below and at_least <= value <= at_most."""
    if above < value < below and at_least <= value <= at_most:
        return
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    accepted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    raise ConfigError(f"configuration key {key!r} must be {accepted}, got {value!r}")


def _unknown_key(name: str, key: str, known: Mapping) -> str:
    hint = did_you_mean(key, known, f"accepted here: {', '.join(sorted(known))}")
    return f"unknown configuration key {name!r}; {hint}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"configuration key {where!r} needs keys of its own, got {value!r}")
        return from_mapping(hint, value, f"{where}.")
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(value, option, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value is False and "no" in arguments:  # YAML 1.1 reads a bare `no` as false
            return "no"
        if value in arguments and not isinstance(value, bool):
            return value
    elif origin in (list, tuple, Sequence):
        items = arguments[:1] * len(value) if origin is not tuple and isinstance(value, list) else arguments
        if isinstance(value, (list, tuple)) and len(value) == len(items):
            return (tuple if origin is tuple else list)(
                _convert(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, items))
            )
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        # YAML 1.1 reads 1e-4 (no dot) as text.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif (hint is type(None) and value is None) or (hint is not type(None) and type(value) is hint):
        return value
    raise ConfigError(f"configuration key {where!r} takes {type_in_words(hint)}, got {value!r}")


def _plain(value: Any) -> Any:
    """Deep copy of dictionaries and lists only: YAML writes it, and a tuple equals the list it came from."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
