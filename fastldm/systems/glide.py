"""GLIDE (Nichol et al. 2022): captions to small pictures, guided, and these to large ones; inpainting too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastldm.checks import described, is_count, is_number, with_article
from fastldm.diffusion.guidance import Gradient
from fastldm.diffusion.samplers import SAMPLERS, Generators, check_generators
from fastldm.diffusion.scheduler_config import sampler_of
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models.adm_configs import GLIDE
from fastldm.models.captions import as_captions
from fastldm.models.glide import GlideUNet
from fastldm.models.glide_tokenizer import GlideTokenizer
from fastldm.pictures import check_range
from fastldm.systems import folders
from fastldm.systems.glide_stage import BASE_NOISE, FAST27, PUBLISHED_LOW_RES, UPSAMPLER_NOISE, GlideStage
from fastldm.systems.guides import Guide, check_gradient
from fastldm.systems.inpainting import Known, pictures_of, read_known
from fastldm.systems.sampling import (
    ImagePipelineOutput,
    StepCallback,
    as_output,
    check_call,
    check_sampler,
    evaluating,
    first_noise,
    step_callback,
    with_defaults,
)

# Those of glide-text2im's notebooks.
DEFAULTS = {
    "num_inference_steps": 100,
    "guidance_scale": 3.0,
    "upsampler_steps": FAST27,
    "upsampler_temperature": 0.997,
}
_CLASS = "GlidePipeline"
# The key of `model_index.json` for what the upsampler's network does not say.
_LOW_RES = "_low_res"
# The folders of each stage's network and schedule.
_PARTS = {"base": ("unet", "scheduler"), "upsampler": ("upsampler", "upsampler_scheduler")}


class GlidePipeline:
    """GLIDE: a base network, an upsampler, or both.

    Args:
        tokenizer: of both networks.
        base: makes pictures of captions; None for an upsampler alone.
        upsampler: enlarges them; None for a base alone.
        sampler: of the base, what a call uses by default: a name of `fastldm.diffusion.samplers.SAMPLERS`.
        karras: whether it does so on Karras' noise levels.
        upsampler_sampler: of the upsampler, by default.
        defaults: `num_inference_steps`, `guidance_scale`, `upsampler_steps` and `upsampler_temperature` that
            a call uses by default; stored with the model.

    Raises:
        ConfigError: if the parts do not fit each other.
    """

    def __init__(
        self,
        tokenizer: GlideTokenizer,
        base: GlideStage | None,
        upsampler: GlideStage | None = None,
        *,
        sampler: str = "ddpm",
        karras: bool = False,
        upsampler_sampler: str = "ddim",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        check_sampler(sampler, karras)
        check_sampler(upsampler_sampler, False)
        self.tokenizer, self.base, self.upsampler = tokenizer, base, upsampler
        self.sampler, self.karras, self.upsampler_sampler = sampler, karras, upsampler_sampler
        self.defaults = with_defaults(DEFAULTS, defaults)
        _check_temperature(self.defaults["upsampler_temperature"], ConfigError)
        if (steps := self.defaults["upsampler_steps"]) != FAST27 and not is_count(steps):
            raise ConfigError(
                f"the default upsampler_steps must be a whole number from 1, or {FAST27!r}, got {steps!r}"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        if not self._stages:
            raise ConfigError("GLIDE needs a base network, an upsampler, or both; none is given")
        for name, stage in self._stages.items():
            config = stage.unet.config
            if config.super_res != (name == "upsampler"):
                kind = "an upsampler" if config.super_res else "no upsampler"
                raise ConfigError(f"the network given as {name} is {kind} (super_res={config.super_res})")
            if self.tokenizer.vocab_size > config.n_vocab or self.tokenizer.text_ctx != config.text_ctx:
                raise ConfigError(
                    f"the tokenizer makes {self.tokenizer.text_ctx} tokens of {self.tokenizer.vocab_size} "
                    f"kinds, the network given as {name} takes {config.text_ctx} of {config.n_vocab}; use "
                    "the tokenizer it was trained with"
                )
        if self.base is not None and self.upsampler is not None:
            small, large = self.base.shape, self.upsampler.shape
            if large[0] != small[0] or large[1] % small[1]:
                raise ConfigError(
                    f"the base makes pictures {small}, which the upsampler does not enlarge to {large}: the "
                    "channels must be the same, and the size a multiple"
                )
            if self.upsampler.low_res not in (None, small[1]):
                raise ConfigError(
                    f"the base makes pictures of {small[1]} pixels, but the upsampler was trained to enlarge "
                    f"those of {self.upsampler.low_res}; train one with low_res={small[1]}"
                )

    @property
    def _stages(self) -> dict[str, GlideStage]:
        """Those that are there, by name."""
        stages = {"base": self.base, "upsampler": self.upsampler}
        return {name: stage for name, stage in stages.items() if stage is not None}

    @property
    def networks(self) -> list[nn.Module]:
        """Every part with weights."""
        return [stage.unet for stage in self._stages.values()]

    @property
    def size(self) -> int:
        """Side of the pictures that come out."""
        return (self.upsampler or self.base).shape[-1]

    @property
    def device(self) -> torch.device:
        return self.networks[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.networks[0].dtype

    def to(self, *args: Any, **kwargs: Any) -> GlidePipeline:
        """Move or convert every network, as `torch.nn.Module.to`; returns self."""
        for network in self.networks:
            network.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        sampler: str | None = None,
        progress: bool = True,
        karras: bool | None = None,
        gradient: Guide | Gradient | None = None,
        gradient_scale: float | None = None,
        upsampler_steps: int | str | None = None,
        upsampler_temperature: float | None = None,
        upsampler_sampler: str | None = None,
        image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
        mask: Image.Image | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures. Each network reads the captions once.

        Args:
            prompt: caption(s).
            num_inference_steps, guidance_scale: of the base; None = the model's own defaults. A scale of 1 is
                no guidance, and 0 the noise of the empty caption. The variance is the prompt's at any scale.
            negative_prompt: what guidance leads away from, one or one per prompt; None = the empty caption.
            num_images_per_prompt: the pictures of one prompt come one after another.
            eta: randomness of the base's DDIM, 0 to 1.
            generator: one, or a list with one per picture: then a picture does not depend on its batch.
            latents: the first noise of the base (B, C, H, W) instead of a drawn one.
            output_type: "pil", "np", "pt", or "latent" for float (B, C, H, W) in [-1, 1].
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": x}); may return a mapping
                whose "latents" replace x. The steps of the upsampler count on from those of the base.
            sampler: of the base, see `LatentDiffusionPipeline.__call__`. "ddpm" takes the variance that the
                network has learned.
            progress: show a progress bar.
            karras: as in `LatentDiffusionPipeline.__call__`.
            gradient: guidance of the base by another model, on top of `guidance_scale`: of a noised CLIP
                (section 2.4) by `CLIPScorer.gradient(captions)`, of a classifier, or any (x, t) -> gradient.
            gradient_scale: multiplies the gradient; None = 1.
            upsampler_steps: a number, or "fast27", glide-text2im's timesteps.
            upsampler_temperature: multiplies the first noise of the upsampler; less is smoother.
            upsampler_sampler: a name as `sampler`. The upsampler is not guided.
            image, mask: see `inpaint`.

        Raises:
            InputError: for anything that cannot be used, before sampling starts. What has no effect is said
                in a warning.
        """
        if self.base is None:
            raise InputError(
                "this model is an upsampler alone; join it with a base by GlidePipeline.from_parts, or call "
                "`upsample`"
            )
        steps = self._or_default("num_inference_steps", num_inference_steps)
        scale = self._or_default("guidance_scale", guidance_scale)
        sampler = sampler or self.sampler
        karras = (self.karras and sampler == self.sampler) if karras is None else karras
        check_call(
            output_type,
            sampler,
            guidance_scale=scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            gradient=gradient,
            gradient_scale=gradient_scale,
            callback_on_step_end=callback_on_step_end,
        )
        levels = self.base.levels(sampler, steps, karras=karras)
        prompts = as_captions("prompt", prompt)
        negatives = as_captions("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) not in (1, len(prompts)):
            raise InputError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one per prompt"
            )
        count = len(prompts) * num_images_per_prompt
        shape = (count, *self.base.shape)
        if gradient is not None:
            check_gradient(gradient, shape, None, self.base.schedule, len(prompts))
        x = first_noise(shape, generator, latents, self.device)
        known = self._known(list(self._stages.values()), image, mask, len(prompts), num_images_per_prompt)
        of_upsampler = {
            "steps": upsampler_steps,
            "temperature": upsampler_temperature,
            "sampler": upsampler_sampler,
        }
        if self.upsampler is not None:
            enlarge = self._upsampling(prompts, num_images_per_prompt, **of_upsampler)
        else:
            enlarge = None
            for name in (name for name, value in of_upsampler.items() if value is not None):
                warnings.warn(f"upsampler_{name} has no effect without an upsampler", stacklevel=3)

        with evaluating(self.networks):
            texts, null = self._read(
                self.base, prompts, negatives if scale != 1 else (), num_images_per_prompt
            )
            x = self.base.sample(
                x,
                texts,
                null,
                scale,
                sampler,
                levels,
                known=None if known is None else known.shrunk(self.base.shape[-1]),
                gradient=gradient,
                gradient_scale=1.0 if gradient_scale is None else gradient_scale,
                eta=eta,
                generator=generator,
                callback=step_callback(self, callback_on_step_end),
                progress=progress,
            )
            if enlarge is not None:
                callback = step_callback(self, callback_on_step_end, first_step=len(levels.timesteps))
                x = enlarge(x, known=known, generator=generator, callback=callback, progress=progress)
        images = x if output_type == "latent" else as_output(x, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image] | Tensor,
        mask: Image.Image | Tensor,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Make a part of a picture anew, as the prompt says (Nichol et al. 2022, "Image inpainting").

        Networks that were trained to (`inpaint`) see the rest of the picture, and for the base and the
        upsampler alike it stands in the predicted picture at each step, as in glide-text2im. What comes out
        is the given picture outside the mask, exactly.

        Args:
            image: PIL, one or one per prompt, squeezed or stretched to a square of the pipeline's `size`; or
                float (B, C, size, size) in [-1, 1], B being 1 or the number of prompts.
            mask: where to paint, as in diffusers: white in a PIL image of any size, or True or 1 in a tensor
                (H, W) or (B, 1, H, W), of the base's or the pipeline's size. The base paints every place of
                which a part is masked.
            options: as in a call.

        Raises:
            InputError: for anything that cannot be used, or a base that was not trained to inpaint.
        """
        for name, given in (("image", image), ("mask", mask)):
            if given is None:
                raise InputError(f"there is no {name} to inpaint; without both, call the pipeline")
        return self(prompt, image=image, mask=mask, **options)

    @torch.no_grad()
    def upsample(
        self,
        prompt: str | Sequence[str],
        low_res: Image.Image | Sequence[Image.Image] | Tensor,
        *,
        generator: Generators = None,
        output_type: str = "pil",
        progress: bool = True,
        upsampler_steps: int | str | None = None,
        upsampler_temperature: float | None = None,
        upsampler_sampler: str | None = None,
        image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
        mask: Image.Image | Tensor | None = None,
    ) -> ImagePipelineOutput:
        """Enlarge pictures: the second half of a call.

        Args:
            prompt: what they show, a caption for each picture.
            low_res: PIL image(s), made squares of the side that the upsampler was trained on, or, where that
                is not known, of the first one's width; or float (B, C, h, w) in [-1, 1].
            image, mask: what is known of the large pictures, see `inpaint`.

        The rest is as in a call.

        Raises:
            InputError: for anything that cannot be used, or a model without an upsampler.
        """
        if self.upsampler is None:
            raise InputError("this model has no upsampler; join one by GlidePipeline.from_parts")
        check_call(output_type, self.sampler)
        prompts = as_captions("prompt", prompt)
        check_generators(generator, len(prompts))
        if not isinstance(low_res, Tensor):
            low_res = pictures_of("low_res", low_res, self.upsampler.low_res)
        wanted = len(prompts), self.upsampler.shape[0]
        fits = low_res.ndim == 4 and low_res.shape[:2] == wanted and 0 not in low_res.shape
        if not fits or not low_res.is_floating_point():
            raise InputError(
                f"low_res is {described(low_res)} for {len(prompts)} prompts: give float "
                f"({wanted[0]}, {wanted[1]}, h, w) in [-1, 1]"
            )
        side = self.upsampler.low_res
        if side is not None and low_res.shape[2:] != (side, side):
            raise InputError(
                f"low_res is {described(low_res)}, but this upsampler was trained to enlarge {side}x{side} "
                "pixels"
            )
        check_range("the pixels of low_res", low_res)
        enlarge = self._upsampling(prompts, 1, upsampler_steps, upsampler_temperature, upsampler_sampler)
        known = self._known([self.upsampler], image, mask, len(prompts), 1)
        with evaluating(self.networks):
            x = enlarge(low_res.to(self.device), known=known, generator=generator, progress=progress)
        return ImagePipelineOutput(x if output_type == "latent" else as_output(x, output_type))

    def _upsampling(
        self,
        prompts: Sequence[str],
        repeats: int,
        steps: int | str | None,
        temperature: float | None,
        sampler: str | None,
    ) -> Any:
        """Checks the arguments; (low_res, generator, ...) -> pictures, to be called later."""
        stage, sampler = self.upsampler, sampler or self.upsampler_sampler
        if sampler not in SAMPLERS:
            raise InputError(
                f"upsampler_sampler={sampler!r} is not offered; use one of {', '.join(SAMPLERS)}"
            )
        levels = stage.levels(sampler, self._or_default("upsampler_steps", steps), name="upsampler_steps")
        temperature = self._or_default("upsampler_temperature", temperature)
        _check_temperature(temperature, InputError)

        def enlarge(low_res: Tensor, *, generator: Generators, **options: Any) -> Tensor:
            texts, _ = self._read(stage, prompts, (), repeats)
            x = first_noise((len(low_res), *stage.shape), generator, None, self.device) * temperature
            # glide-text2im: the picture of 8 bits that a user would see.
            low_res = ((low_res + 1) * 127.5).round() / 127.5 - 1
            return stage.sample(
                x, texts, None, 1.0, sampler, levels, low_res=low_res, generator=generator, **options
            )

        return enlarge

    def _or_default(self, name: str, value: Any) -> Any:
        return self.defaults[name] if value is None else value

    def _read(
        self, stage: GlideStage, prompts: Sequence[str], negatives: Sequence[str], repeats: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What a stage reads in the prompts and, if there are any, in the negative ones; one per picture."""
        read = stage.read(*self.tokenizer([*negatives, *prompts]))
        own = {key: value[len(negatives) :].repeat_interleave(repeats, dim=0) for key, value in read.items()}
        if not negatives:
            return own, None
        null = {key: value[: len(negatives)] for key, value in read.items()}
        each = len(prompts) // len(negatives) * repeats
        return own, {key: value.repeat_interleave(each, dim=0) for key, value in null.items()}

    def _known(
        self, stages: Sequence[GlideStage], image: Any, mask: Any, prompts: int, repeats: int
    ) -> Known | None:
        """What these stages keep in inpainting, at the size of the pictures that come out."""
        if image is None and mask is None:
            return None
        if image is None or mask is None:
            raise InputError("image and mask go together: give both to inpaint, or neither")
        if not stages[0].unet.config.inpaint:
            raise InputError(
                "this model was not trained to inpaint; train it further with inpainting=true "
                "(`fastldm train glide`)"
            )
        sizes = [stage.shape[-1] for stage in stages]
        known = read_known(image, mask, stages[-1].shape, sizes, prompts).repeated(repeats)
        return Known(known.image.to(self.device), known.mask.to(self.device))

    def save_pretrained(
        self, path: str | os.PathLike, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the folder, all or nothing. `variant`, `dtype`: as `Model.save_pretrained`."""
        index: dict[str, Any] = {"_class_name": _CLASS, "_defaults": self.defaults}
        walks = {"base": (self.sampler, self.karras), "upsampler": (self.upsampler_sampler, False)}
        with folders.writing_pipeline(path, index) as folder:
            self.tokenizer.save_pretrained(folder / "tokenizer")
            index["tokenizer"] = ["fastldm", "GlideTokenizer"]
            for name, stage in self._stages.items():
                network, scheduler = _PARTS[name]
                stage.unet.save_pretrained(folder / network, variant=variant, dtype=dtype)
                index[network] = ["fastldm", "GlideUNet"]
                config, lost = folders.scheduler_config(stage.schedule, *walks[name])
                folders.write_scheduler(folder / scheduler, config)
                index[scheduler] = ["diffusers", config["_class_name"]]
                if lost:
                    index[folders.lost_fields(scheduler)] = lost
                if stage.low_res is not None:
                    index[_LOW_RES] = stage.low_res

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> GlidePipeline:
        """Load a folder of `save_pretrained`; arguments as `LatentDiffusionPipeline.from_pretrained`.

        Raises:
            CheckpointError: if a part is missing or does not fit the others, or it is another pipeline's.
        """
        folder = folders.find_pipeline(path)
        index = folders.read_index(folder)
        if index.get("_class_name") != _CLASS:
            raise CheckpointError(
                f"{folder} holds {with_article(str(index.get('_class_name')))}, not a {_CLASS}; load it with "
                "that class"
            )
        how = {"torch_dtype": torch_dtype, "variant": variant}
        stages, walks = {}, {}
        try:
            for name, (network, scheduler) in _PARTS.items():
                if folders.part_class(index, network) is None:
                    continue
                unet = folders.load_part(folder, index, (network,), {"GlideUNet": GlideUNet}, how)
                schedule, config = folders.read_scheduler(folder, index, scheduler)
                low_res = index.get(_LOW_RES) if name == "upsampler" else None
                stages[name], walks[name] = GlideStage(unet, schedule, low_res), sampler_of(config)
            sampler, karras = walks.get("base", ("ddpm", False))
            return cls(
                GlideTokenizer.from_pretrained(folder, subfolder="tokenizer"),
                stages.get("base"),
                stages.get("upsampler"),
                sampler=sampler,
                karras=karras,
                upsampler_sampler=walks.get("upsampler", ("ddim", False))[0],
                defaults=index.get("_defaults"),
            )
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    @classmethod
    def from_parts(
        cls,
        base: str | os.PathLike | GlidePipeline,
        upsampler: str | os.PathLike | GlidePipeline,
        *,
        torch_dtype: torch.dtype | None = None,
    ) -> GlidePipeline:
        """A base and an upsampler that were trained apart, as folders of `fastldm train glide` or pipelines.

        Raises:
            CheckpointError: as `from_pretrained`.
            ConfigError: if one of them lacks the part that is wanted of it, or they do not fit.
        """
        first, second = (
            part if isinstance(part, cls) else cls.from_pretrained(part, torch_dtype=torch_dtype)
            for part in (base, upsampler)
        )
        if first.base is None or second.upsampler is None:
            lacking = "first has no base network" if first.base is None else "second has no upsampler"
            raise ConfigError(f"the {lacking}; give the base first and the upsampler second")
        one, other = first.tokenizer, second.tokenizer
        if (one.vocab, one.merges, one.text_ctx) != (other.vocab, other.merges, other.text_ctx):
            what = f"of {one.text_ctx} and {other.text_ctx} tokens per caption"
            if one.text_ctx == other.text_ctx:
                what = "which have learned from other captions"
            raise ConfigError(
                f"the two were trained with different tokenizers, {what}; train the upsampler with "
                "`tokenizer` the tokenizer folder of the base, and its `max_length`"
            )
        of_second = ("upsampler_steps", "upsampler_temperature")
        return cls(
            first.tokenizer,
            first.base,
            second.upsampler,
            sampler=first.sampler,
            karras=first.karras,
            upsampler_sampler=second.upsampler_sampler,
            defaults={**first.defaults, **{name: second.defaults[name] for name in of_second}},
        )

    @classmethod
    def from_openai(
        cls,
        base: str | os.PathLike | None,
        upsampler: str | os.PathLike | None,
        vocabulary: str | os.PathLike,
        *,
        inpaint: bool = False,
        torch_dtype: torch.dtype | None = None,
        base_config: Mapping[str, Any] | None = None,
        upsampler_config: Mapping[str, Any] | None = None,
    ) -> GlidePipeline:
        """From the files of glide-text2im, with the noise and the fields that were published with them.

        Args:
            base, upsampler: `base.pt` and `upsample.pt`, or those for inpainting; None for neither.
            vocabulary: `vocab.bpe.gz` of glide-text2im, or `vocab.bpe` of GPT-2.
            inpaint: the files are `base_inpaint.pt` and `upsample_inpaint.pt`.
            torch_dtype: of the parameters; None = float32.
            base_config, upsampler_config: fields of `GlideUNet` for files of other networks.

        Raises:
            CheckpointError: a file cannot be read, or its weights are not those of such a network.
            ConfigError: if the parts do not fit each other.
        """
        if inpaint and not (base_config is None and upsampler_config is None):
            raise ConfigError(
                "inpaint=True chooses published fields; say it in your own by inpaint=True there"
            )
        kind = "_inpaint" if inpaint else ""
        base_fields = GLIDE[f"base{kind}"] if base_config is None else base_config
        upsampler_fields = GLIDE[f"upsample{kind}"] if upsampler_config is None else upsampler_config
        enlarged = PUBLISHED_LOW_RES if upsampler_config is None else None
        wanted = {
            "base": (base, base_fields, BASE_NOISE, None),
            "upsampler": (upsampler, upsampler_fields, UPSAMPLER_NOISE, enlarged),
        }
        stages = {
            name: GlideStage(
                GlideUNet.from_openai(Path(path), torch_dtype=torch_dtype, **config),
                NoiseSchedule(**noise),
                low_res,
            )
            for name, (path, config, noise, low_res) in wanted.items()
            if path is not None
        }
        if not stages:
            raise ConfigError(
                "GLIDE needs the file of a base network, of an upsampler, or both; none is given"
            )
        window = next(iter(stages.values())).unet.config.text_ctx
        tokenizer = GlideTokenizer.from_openai(vocabulary, window)
        return cls(tokenizer, stages.get("base"), stages.get("upsampler"))


def _check_temperature(value: Any, error: type[Exception]) -> None:
    if not is_number(value) or value < 0:
        raise error(f"upsampler_temperature={value!r}: give a number from 0, such as 0.997")
