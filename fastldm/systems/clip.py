"""CLIP at work (Radford et al. 2021): the loss it is trained by, and scores of pictures against captions.

With a noise schedule it is noised CLIP (Nichol et al. 2022, section 2.4), which sees x_t ~ q(x_t | x_0); it
may also have been trained on the latents of a first stage, to guide diffusion there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastldm.checks import described
from fastldm.diffusion.guidance import Gradient, clip_gradient
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.io import write_json
from fastldm.models.captions import as_captions
from fastldm.models.clip import CLIPModel, contrastive_loss, normalised
from fastldm.models.clip_tokenizer import CLIPTokenizer
from fastldm.models.weights import read_json, resolve_folder
from fastldm.pictures import as_pictures, as_rgb
from fastldm.systems.guides import Guide, GuideSpace, Latents, read_latents, read_schedule

# Of the pictures that OpenAI trained on, per channel of [0, 1].
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_PREPROCESSOR = "preprocessor_config.json"
# What is in [-1, 1], or a latent, goes into the tower as it is.
_HALF = 0.5
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric contrastive loss of B pairs, and how many pictures in B have their own text first.

    Computed in float32, also under autocast: logits reach 100, where a bfloat16 is off by up to 0.25.

    Args:
        image_embeds, text_embeds: (B, D) of any length; picture i belongs to text i and to no other.
        logit_scale: log of the inverse temperature, a scalar. See `CLIPModel.clamp_logit_scale`.

    Returns:
        The loss and the fraction, float32 scalars; the fraction has no gradient.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = normalised(image_embeds.float()), normalised(text_embeds.float())
        logits = images @ texts.T * logit_scale.float().exp()
        loss = contrastive_loss(logits)
    own = torch.arange(len(logits), device=logits.device)
    return loss, (logits.detach().argmax(dim=1) == own).float().mean()


class CLIPScorer:
    """Pictures against captions, without training on the captions' classes (section 3.1, zero-shot transfer).

    Args:
        model: the towers, in evaluation mode.
        tokenizer: fits the text tower.
        image_mean, image_std: per channel of pictures in [0, 1].
        schedule: of noised CLIP, whose pictures are x_t; None for pictures without noise.
        latents: those that the image tower takes in the place of pictures; they have no mean or deviation.

    Raises:
        ConfigError: if the parts do not fit each other.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
        schedule: NoiseSchedule | None = None,
        latents: Latents | None = None,
    ) -> None:
        text, vision = model.text_model.config, model.vision_model.config
        if tokenizer.max_length > text.max_position_embeddings or tokenizer.vocab_size > text.vocab_size:
            raise ConfigError(
                f"the tokenizer makes up to {tokenizer.max_length} tokens of {tokenizer.vocab_size} kinds, "
                f"the text tower takes {text.max_position_embeddings} of {text.vocab_size}; give its own"
            )
        if latents is not None:
            image_mean = image_std = (_HALF,) * vision.num_channels
        if not len(image_mean) == len(image_std) == vision.num_channels:
            raise ConfigError(
                f"{len(image_mean)} means and {len(image_std)} deviations for {vision.num_channels} channels"
            )
        if (schedule is not None) != vision.timestep_conditioning:
            raise ConfigError(
                "an image tower with timestep_conditioning=True goes with the noise schedule it was trained "
                f"on, any other with none: timestep_conditioning={vision.timestep_conditioning}, and a "
                f"schedule is {'missing' if schedule is None else 'given'}"
            )
        self.model, self.tokenizer, self.schedule, self.latents = model, tokenizer, schedule, latents
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

    def to(self, *args, **kwargs) -> CLIPScorer:
        """Move the model, as `nn.Module.to`; returns the scorer."""
        self.model.to(*args, **kwargs)
        return self

    def prepare(self, pictures: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """What the image tower takes, float32 (B, C, image_size, image_size) on the model's device.

        Args:
            pictures: PIL images of any size, whose shorter side is made image_size (bicubic) and whose centre
                is cut out; or float (B, C, image_size, image_size) in [-1, 1]. A CLIP of latents takes scaled
                latents (B, C, image_size, image_size), as `LatentDiffusionPipeline.encode` gives them.

        Raises:
            InputError: for anything else.
        """
        if isinstance(pictures, Tensor):
            if pictures.ndim != 4 or not len(pictures) or not pictures.is_floating_point():
                raise InputError(
                    f"pictures are {described(pictures)}: give float (B, C, H, W) in [-1, 1], at least one"
                )
            unit = (pictures.float() + 1) / 2
        else:
            self.space.check_takes_pictures("CLIP")
            side = self.model.vision_model.config.image_size
            unit = torch.stack([_to_unit(p, side) for p in as_pictures("pictures", pictures)])
        unit = unit.to(self.model.device)
        mean, std = (unit.new_tensor(v)[:, None, None] for v in (self.image_mean, self.image_std))
        if unit.shape[1] != len(mean):
            raise InputError(f"pictures of {unit.shape[1]} channels, but the model takes {len(mean)}")
        return (unit - mean) / std

    @torch.no_grad()
    def encode_images(
        self, pictures: Image.Image | Sequence[Image.Image] | Tensor, timestep: Tensor | int | None = None
    ) -> Tensor:
        """Unit vectors, float32 (B, projection_dim).

        Args:
            pictures: see `prepare`.
            timestep: of noised CLIP, which needs it, and of no other: how noisy the pictures are, one number
                or (B,); 0 for pictures without noise.

        Raises:
            InputError: for pictures or a timestep that the model does not take.
        """
        prepared = self.prepare(pictures)
        timestep = self.space.checked_timestep(timestep, len(prepared))
        features = self.model.get_image_features(prepared, timestep)
        return normalised(features.pooler_output.float())

    @torch.no_grad()
    def encode_texts(self, captions: str | Sequence[str]) -> Tensor:
        """Unit vectors, float32 (B, projection_dim)."""
        ids = self.tokenizer(as_captions("captions", captions)).to(self.model.device)
        return normalised(self.model.get_text_features(ids).pooler_output.float())

    @torch.no_grad()
    def scores(
        self,
        pictures: Image.Image | Sequence[Image.Image] | Tensor,
        captions: str | Sequence[str],
        timestep: Tensor | int | None = None,
    ) -> Tensor:
        """exp(logit_scale) times the cosine of every picture with every caption, float32 (B_i, B_t).

        A softmax over the captions gives how probable each is among them. For `timestep` see `encode_images`.
        """
        similarity = self.encode_images(pictures, timestep) @ self.encode_texts(captions).T
        return similarity * self.model.logit_scale.float().exp()

    def classify(
        self,
        pictures: Image.Image | Sequence[Image.Image] | Tensor,
        labels: Sequence[str],
        templates: Sequence[str] = ("{}",),
        timestep: Tensor | int | None = None,
    ) -> Tensor:
        """Probabilities of the labels, float32 (B, number of labels): zero-shot classification.

        Args:
            labels: one caption or name per class.
            templates: such as "a photo of a {}."; a class is the mean of the vectors of its captions, made
                unit again (section 3.1.4).
            pictures, timestep: see `encode_images`.

        Raises:
            InputError: without labels, for a template without "{}", and as `encode_images`.
        """
        for name, given in (("labels", labels), ("templates", templates)):
            if isinstance(given, str):
                raise InputError(f"{name} must be a list of at least one, such as [{given!r}]")
        labels = as_captions("labels", labels, noun="name")
        templates = as_captions("templates", templates, noun="template")
        if any("{}" not in template for template in templates):
            raise InputError(f"templates {templates!r}: each needs {{}} where the label goes")
        captions = [template.replace("{}", label) for label in labels for template in templates]
        classes = self.encode_texts(captions).unflatten(0, (len(labels), -1)).mean(dim=1)
        with torch.no_grad():
            similarity = self.encode_images(pictures, timestep) @ normalised(classes).T
            return (similarity * self.model.logit_scale.float().exp()).softmax(dim=-1)

    @property
    def space(self) -> GuideSpace:
        """What the image tower was trained on."""
        vision = self.model.vision_model.config
        side = vision.image_size
        return GuideSpace((vision.num_channels, side, side), self.latents, self.schedule)

    def gradient(self, captions: str | Sequence[str]) -> Guide:
        """The gradient of exp(logit_scale) f(x_t) . g(caption), to guide diffusion (`clip_gradient`).

        Noised CLIP is told t. Another one takes x_t for a picture without noise and guides worse.

        Args:
            captions: one, or one per prompt.
        """

        def features(x: Tensor, t: Tensor) -> Tensor:
            timestep = None if self.schedule is None else t.to(self.model.device)
            return self.model.get_image_features(self.prepare(x), timestep).pooler_output

        def bind(texts: Tensor) -> Gradient:
            return clip_gradient(features, texts, self.model.logit_scale.detach())

        return Guide(bind, self.encode_texts(captions), self.space)

    def save_pretrained(self, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
        """Write the folder of a CLIP: model, tokenizer and `preprocessor_config.json`, as transformers reads
        them; noised CLIP, which transformers does not know, also has its `scheduler_config.json`, and one of
        latents `latents.json` in the place of a preprocessor."""
        folder, side = Path(path), self.model.vision_model.config.image_size
        config = {
            "image_processor_type": "CLIPImageProcessor",
            **dict.fromkeys(_STEPS, True),
            "do_convert_rgb": True,
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "resample": int(Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        self.model.save_pretrained(folder, dtype=dtype)
        try:
            self.tokenizer.save_pretrained(folder)
            if self.latents is None:
                write_json(folder / _PREPROCESSOR, config)
            self.space.save(folder)
        except OSError as error:
            raise CheckpointError(f"cannot save CLIP to {folder}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, torch_dtype: torch.dtype | None = None, variant: str | None = None
    ) -> CLIPScorer:
        """Load a folder: ours, or that of transformers' CLIPModel with its tokenizer.

        Args:
            path, torch_dtype, variant: see `Model.from_pretrained`. A folder without preprocessor_config.json
                is taken for one of OpenAI's pictures.

        Raises:
            CheckpointError: a part is missing or does not fit; pictures are prepared in another way.
        """
        folder = resolve_folder(path, None, CLIPModel.config_name)
        model = CLIPModel.from_pretrained(folder, torch_dtype=torch_dtype, variant=variant)
        window = model.text_model.config.max_position_embeddings
        tokenizer = CLIPTokenizer.from_pretrained(folder, max_length=window)
        mean, std = _read_preprocessor(folder / _PREPROCESSOR, model.vision_model.config.image_size)
        latents = read_latents(folder)
        try:
            return cls(model, tokenizer, mean, std, read_schedule(folder), latents)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error


def _to_unit(picture: Image.Image, side: int) -> Tensor:
    """(3, side, side) in [0, 1]: the centre of the picture, its shorter side resized to `side`."""
    picture = as_rgb(picture)
    width, height = picture.size
    short = min(width, height)
    size = (int(side * width / short), int(side * height / short))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    picture = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return pixels.permute(2, 0, 1).float() / 255


def _read_preprocessor(file: Path, side: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation; refuses what `CLIPScorer.prepare` does not do."""
    if not file.is_file():
        return OPENAI_MEAN, OPENAI_STD
    config = read_json(file)
    skipped = [step for step in _STEPS if not config.get(step, True)]
    crop, size = config.get("crop_size", side), config.get("size", side)
    crop = crop.get("height") if isinstance(crop, dict) else crop
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if skipped or (crop, size) != (side, side) or config.get("resample", 3) != Image.Resampling.BICUBIC:
        raise CheckpointError(
            f"{file} asks for {', '.join(f'{s}=false' for s in skipped) or 'another size or resampling'}; "
            f"fastldm resizes (bicubic) and crops to {side} and normalises"
        )
    return config.get("image_mean", OPENAI_MEAN), config.get("image_std", OPENAI_STD)
