"""CLIP: an image tower and a text tower into one space (Radford et al. 2021).

Keys, `config.json` and outputs are those of transformers' CLIPModel; folders load in both directions.
`fastldm.models.clip_openai` reads and writes OpenAI's own layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.models.base import Model, configurable
from fastldm.models.clip_towers import BOOKKEEPING, CLIPTextModel, CLIPTowerOutput, CLIPVisionModel
from fastldm.models.outputs import Output

C = TypeVar("C", bound="CLIPModel")

MAX_LOGIT_SCALE = math.log(100.0)
"""Training keeps logit_scale at or below this: logits are at most 100 times a cosine (section 2.5)."""


@dataclass
class CLIPOutput(Output):
    """Of B_i pictures and B_t texts.

    loss: scalar, or None; logits_per_image: (B_i, B_t), exp(logit_scale) times the cosines, and its
    transpose; text_embeds: (B_t, projection_dim) and image_embeds: (B_i, projection_dim), of unit length; the
    outputs of the towers.
    """

    loss: Tensor | None
    logits_per_image: Tensor
    logits_per_text: Tensor
    text_embeds: Tensor
    image_embeds: Tensor
    text_model_output: CLIPTowerOutput
    vision_model_output: CLIPTowerOutput


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """The symmetric loss of B pairs, a float32 scalar (Radford et al. 2021, figure 3).

    The mean of two cross entropies: of each picture (row) over all texts, and of each text over all pictures.

    Args:
        logits_per_image: (B, B); picture i belongs to text i.

    Raises:
        InputError: if there are not as many texts as pictures.
    """
    if logits_per_image.ndim != 2 or logits_per_image.shape[0] != logits_per_image.shape[1]:
        shape = tuple(logits_per_image.shape)
        raise InputError(f"logits {shape}: the contrastive loss needs one text per picture")
    logits = logits_per_image.float()
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


class CLIPModel(Model):
    """The two towers, their projections into the common space, and the learned temperature.

    Args:
        text_config, vision_config: fields of CLIPTextModel and of CLIPVisionModel; what is left out is at its
            default.
        projection_dim: width of the common space.
        logit_scale_init_value: log of the first inverse temperature, log(1 / 0.07) in the paper.
        initializer_factor: scales the first weights of the projections.
    """

    weights_name: ClassVar[str] = "model.safetensors"
    pickled_weights_name: ClassVar[str] = "pytorch_model.bin"
    peer_defaults: ClassVar[Mapping[str, Any]] = {
        "is_encoder_decoder": False,
        "model_type": "clip",
        "output_attentions": False,
        "output_hidden_states": False,
    }
    ignored_config_keys: ClassVar[frozenset[str]] = BOOKKEEPING

    @configurable
    def __init__(
        self,
        text_config: Mapping[str, Any] | None = None,
        vision_config: Mapping[str, Any] | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        initializer_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.text_model = CLIPTextModel.from_config(text_config or {})
        self.vision_model = CLIPVisionModel.from_config(vision_config or {})
        text_width, vision_width = self.text_model.config.hidden_size, self.vision_model.config.hidden_size
        self.visual_projection = nn.Linear(vision_width, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale_init_value)))
        nn.init.normal_(self.visual_projection.weight, std=vision_width**-0.5 * initializer_factor)
        nn.init.normal_(self.text_projection.weight, std=text_width**-0.5 * initializer_factor)

    @classmethod
    def from_config(cls: type[C], config: Mapping[str, Any]) -> C:
        """As `Model.from_config`; of a tower that old files state twice, the `_dict` counts."""
        config = dict(config)
        for name in ("text_config", "vision_config"):
            stated = config.pop(f"{name}_dict", None)
            if stated is not None:
                config[name] = stated
        return super().from_config(config)

    def _exported_config(self) -> dict[str, Any]:
        return {
            **self.config,
            "text_config": self.text_model._exported_config(),
            "vision_config": self.vision_model._exported_config(),
            "model_type": "clip",
            "architectures": ["CLIPModel"],
        }

    def _convert_old_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if not k.endswith("embeddings.position_ids")}

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> CLIPTowerOutput | tuple[Tensor, Tensor]:
        """The text tower's output with `pooler_output` projected, (B, projection_dim), not normalised.

        Arguments and errors are those of `CLIPTextModel.forward`.
        """
        output = self.text_model(input_ids, attention_mask, position_ids)
        output = CLIPTowerOutput(output.last_hidden_state, self.text_projection(output.pooler_output))
        return output if return_dict else output.to_tuple()

    def get_image_features(
        self, pixel_values: Tensor, timestep: Tensor | int | None = None, return_dict: bool = True
    ) -> CLIPTowerOutput | tuple[Tensor, Tensor]:
        """The image tower's output with `pooler_output` projected, (B, projection_dim), not normalised.

        Arguments and errors are those of `CLIPVisionModel.forward`.
        """
        output = self.vision_model(pixel_values, timestep)
        output = CLIPTowerOutput(output.last_hidden_state, self.visual_projection(output.pooler_output))
        return output if return_dict else output.to_tuple()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = False,
        timestep: Tensor | int | None = None,
        return_dict: bool = True,
    ) -> CLIPOutput | tuple:
        """Compare every picture with every text.

        Args:
            input_ids, attention_mask, position_ids: see `CLIPTextModel.forward`.
            pixel_values, timestep: see `CLIPVisionModel.forward`.
            return_loss: also compute `contrastive_loss`, of as many texts as pictures.

        Returns:
            CLIPOutput, or the tuple of its fields without those that are None.
        """
        vision = self.get_image_features(pixel_values, timestep)
        text = self.get_text_features(input_ids, attention_mask, position_ids)
        image_embeds, text_embeds = normalised(vision.pooler_output), normalised(text.pooler_output)
        logits = image_embeds @ text_embeds.T * self.logit_scale.exp()
        loss = contrastive_loss(logits) if return_loss else None
        output = CLIPOutput(loss, logits, logits.T, text_embeds, image_embeds, text, vision)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the learned temperature back to exp(logit_scale) <= 100, in place."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def normalised(embeds: Tensor) -> Tensor:
    """(..., D) at unit length."""
    return embeds / embeds.norm(dim=-1, keepdim=True)
