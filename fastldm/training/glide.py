"""Training GLIDE's networks (Nichol et al. 2022): a base network on small pictures, or an upsampler on large
ones beside what is left of them when they are made small.

At a uniform t the network, told the caption, predicts the noise of x_t and the variance of the step, and the
hybrid loss of Nichol and Dhariwal 2021 trains both. A share of the captions is emptied, for classifier-free
guidance. Small pictures are means over the pixels of each place; as in the paper, nothing is added to them.

For inpainting a region of each picture is erased, and the network is shown the rest and where it is. The loss
is that of the whole picture. An upsampler always sees the whole small picture.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastldm.diffusion import NoiseSchedule, drop_condition, hybrid_loss, simple_loss
from fastldm.errors import ConfigError
from fastldm.models.glide import GlideUNet, glide_inpainting
from fastldm.models.glide_tokenizer import GlideTokenizer
from fastldm.pictures import grid
from fastldm.systems.glide import GlidePipeline
from fastldm.systems.glide_stage import BASE_NOISE, UPSAMPLER_NOISE, GlideStage
from fastldm.training.config import GlideConfig
from fastldm.training.data import build_dataset, captions_of, warn_of_long_captions

# So that a network that inpaints can still make a picture from nothing.
_ERASED_WHOLE = 1 / 8


def glide_loss(
    unet: nn.Module,
    schedule: NoiseSchedule,
    images: Tensor,
    texts: Tensor,
    null_text: Tensor,
    *,
    generator: torch.Generator,
    condition_dropout: float = 0.2,
    low_res: Tensor | None = None,
    inpainting: bool = False,
) -> Tensor:
    """The loss of one batch, a float32 scalar.

    Args:
        unet: a GlideUNet.
        images: (B, C, H, W) in [-1, 1].
        texts: int64 (B, 2, S), token ids and their mask, see `stacked`.
        null_text: int64 (1, 2, S), of the empty caption.
        generator: on the device of the images; draws t, the noise, the captions to empty, then the regions to
            erase.
        condition_dropout: probability with which a caption is emptied.
        low_res: (B, C, h, w), for an upsampler.
        inpainting: erase regions, and show the network the rest.
    """
    steps, device = schedule.num_train_timesteps, images.device
    t = torch.randint(steps, (len(images),), generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
    tokens, mask = drop_condition(texts, null_text, condition_dropout, generator).unbind(1)
    pictures = {} if low_res is None else {"low_res": low_res}
    if inpainting:
        known = ~random_regions(images.shape, generator)
        pictures |= {"inpaint_image": images, "inpaint_mask": known.to(images.dtype)}
    mask = mask.bool() if unet.config.xf_padding else None
    predicted = unet(schedule.add_noise(images, noise, t), t, tokens, mask, **pictures).sample
    loss = hybrid_loss if schedule.variance_type == "learned_range" else simple_loss
    return loss(predicted, images, noise, t, schedule).mean()


def stacked(tokens: Tensor, mask: Tensor) -> Tensor:
    """What a `GlideTokenizer` gives as one tensor, int64 (B, 2, S)."""
    return torch.stack([tokens, mask.long()], dim=1)


def random_regions(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where pictures (B, C, H, W) are erased, bool (B, 1, H, W): a rectangle of each, some as a whole.

    The paper erases "random regions". Sides are uniform from 1 pixel to the picture's, and so is the place.
    """
    count, _, *sides = shape
    draws = torch.rand(5, count, generator=generator, device=generator.device)
    whole = draws[4] < _ERASED_WHOLE
    inside = []
    for side, length_draw, start_draw in zip(sides, draws[:2], draws[2:4]):
        length = torch.where(whole, side, (length_draw * side).floor() + 1)
        start = (start_draw * (side - length + 1)).floor()
        place = torch.arange(side, device=generator.device)
        inside.append((place >= start[:, None]) & (place < (start + length)[:, None]))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]


class GlideModule(nn.Module):
    """The network with its loss, so that one data-parallel wrapper covers both."""

    def __init__(self, stage: GlideStage, null_text: Tensor, config: GlideConfig) -> None:
        super().__init__()
        self.unet, self.schedule = stage.unet, stage.schedule
        self.condition_dropout, self.inpainting = config.condition_dropout, config.inpainting
        self.register_buffer("null_text", null_text, persistent=False)

    def forward(
        self, batch: dict, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = glide_loss(
            self.unet,
            self.schedule,
            batch["image"],
            batch["text"],
            self.null_text,
            generator=generator,
            condition_dropout=self.condition_dropout,
            low_res=batch.get("low_res"),
            inpainting=self.inpainting,
        )
        return loss, {}


class GlideTask:
    """See fastldm.training.loop.Task."""

    def __init__(self, config: GlideConfig) -> None:
        self.config = config
        self.dataset = build_dataset(config.data, config.seed)
        if "caption" not in self.dataset[0]:
            raise ConfigError(
                f"GLIDE needs a caption for each picture, and {config.data.path} has none: add metadata.jsonl"
            )
        self.tokenizer, self.stage = build_stage(config, self.dataset)
        fixed = f"the window of the model in start_from={config.start_from} stays as it was trained"
        remedy = "see max_length" if config.start_from is None else fixed
        warn_of_long_captions(self.dataset, self.tokenizer, remedy)
        if config.gradient_checkpointing:
            self.stage.unet.enable_gradient_checkpointing()
        if config.compile:
            self.stage.unet.compile()
        self.module = GlideModule(self.stage, stacked(*self.tokenizer("")), config)
        self.averaged = self.module
        self.adversary = None
        self.every_step_trains_all = True
        self._check_sampling()

    def to(self, device: torch.device) -> None:
        self.device = device

    def start(self, batch: dict) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def prepare(self, batch: dict, generator: torch.Generator) -> dict:
        prepared = {
            "image": batch["image"].to(self.device),
            "text": stacked(*self.tokenizer(batch["caption"])).to(self.device),
        }
        if self.config.low_res is not None:
            prepared["low_res"] = self._small(prepared["image"])
        return prepared

    def picture(self, seed: int) -> Image.Image:
        """Captions drawn, or pictures of the data enlarged or inpainted, as the network does it now."""
        sampling, pipeline = self.config.sampling, self.pipeline()
        items = [self.dataset[i] for i in range(min(sampling.num_images, len(self.dataset)))]
        batch = default_collate(items)
        captions = sampling.prompts or batch["caption"]
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "progress": False}
        if self.config.inpainting:
            # The middle, a quarter of the picture.
            mask = torch.zeros(self.stage.shape[1:])
            quarter = len(mask) // 4
            mask[quarter : len(mask) - quarter, quarter : len(mask) - quarter] = 1
            options |= {"image": batch["image"], "mask": mask}
        if self.config.low_res is not None:
            images = pipeline.upsample(captions, self._small(batch["image"]), **options).images
        else:
            images = pipeline(captions, **options).images
        return grid(images, captions, columns=4)

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        self.pipeline().save_pretrained(folder, dtype=dtype)

    def pipeline(self) -> GlidePipeline:
        """The network as it is now, shared, not copied, as a base or an upsampler alone."""
        sampling = self.config.sampling
        if self.config.low_res is not None:
            return GlidePipeline(
                self.tokenizer,
                None,
                self.stage,
                upsampler_sampler=sampling.sampler,
                defaults={"upsampler_steps": sampling.num_inference_steps},
            )
        return GlidePipeline(
            self.tokenizer,
            self.stage,
            sampler=sampling.sampler,
            defaults={
                "num_inference_steps": sampling.num_inference_steps,
                "guidance_scale": sampling.guidance_scale,
            },
        )

    def _small(self, images: Tensor) -> Tensor:
        return F.interpolate(images, (self.config.low_res, self.config.low_res), mode="area")

    def _check_sampling(self) -> None:
        """Whatever would only fail at the first picture grid: parts that do not fit, prompts, steps."""
        sampling = self.config.sampling
        self.pipeline()
        if not all(isinstance(prompt, str) for prompt in sampling.prompts):
            raise ConfigError(f"sampling.prompts {sampling.prompts} must be captions")
        self.stage.levels(sampling.sampler, sampling.num_inference_steps)


def build_stage(config: GlideConfig, pictures: Any) -> tuple[GlideTokenizer, GlideStage]:
    """The tokenizer and the network to train: fresh ones, or those of `start_from`.

    Raises:
        ConfigError: for fields that do not fit together or to the data, or a folder without such a network.
        CheckpointError: the folder cannot be read.
    """
    upsampler = config.low_res is not None
    if config.start_from is not None:
        return _trained(config, upsampler)
    if config.tokenizer is not None:
        tokenizer = GlideTokenizer.from_pretrained(config.tokenizer, text_ctx=config.max_length)
    else:
        captions = captions_of(pictures)
        tokenizer = GlideTokenizer.from_captions(captions, config.max_length, merges=config.merges)
    noise = UPSAMPLER_NOISE if upsampler else BASE_NOISE
    schedule = NoiseSchedule.from_config({**noise, **config.schedule})
    derived = {
        "image_size": config.data.size,
        "n_vocab": tokenizer.vocab_size,
        "text_ctx": tokenizer.text_ctx,
        "learn_sigma": schedule.variance_type == "learned_range",
        "super_res": upsampler,
        "inpaint": config.inpainting,
    }
    for key, value in derived.items():
        if config.unet.get(key, value) != value:
            raise ConfigError(f"unet.{key}={config.unet[key]!r}, but the rest says {value}; leave it out")
    network = GlideUNet.from_config({**config.unet, **derived})
    return tokenizer, GlideStage(network, schedule, config.low_res)


def _trained(config: GlideConfig, upsampler: bool) -> tuple[GlideTokenizer, GlideStage]:
    pipeline = GlidePipeline.from_pretrained(config.start_from)
    stage = pipeline.upsampler if upsampler else pipeline.base
    where = f"start_from={config.start_from}"
    if stage is None:
        kind, fix = ("no upsampler", "leave low_res out") if upsampler else ("no base network", "set low_res")
        raise ConfigError(f"{where} has {kind}; {fix}, or give another folder")
    if stage.shape[-1] != config.data.size:
        raise ConfigError(f"{where} makes pictures of {stage.shape[-1]} pixels; set data.size to that")
    if stage.low_res not in (None, config.low_res):
        raise ConfigError(f"{where} enlarges pictures of {stage.low_res} pixels; set low_res to that")
    if stage.unet.config.inpaint and not config.inpainting:
        raise ConfigError(f"{where} inpaints; add inpainting=true")
    stage = dataclasses.replace(stage, low_res=config.low_res)
    if config.inpainting and not stage.unet.config.inpaint:
        stage = dataclasses.replace(stage, unet=glide_inpainting(stage.unet))
    return pipeline.tokenizer, stage
