"""The whole model: two towers, one embedding space, a learnt temperature.

Shapes: B batch, C channels, H/W pixels, T tokens, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbase.errors import MmbaseError
from mmbase.keyed import IMAGE, TEXT, draw
from mmbase.models.config import CLIPConfig
from mmbase.models.text import PackedText, TextTransformer
from mmbase.models.vision import VisionTransformer

__all__ = ["CLIP", "CLIPConfig"]


class CLIP(nn.Module):
    """Contrastive image-text model (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343).

    ``logit_scale`` is kept as a logarithm; `forward` returns its exponential.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision, config.embed_dim)
        self.text = TextTransformer(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return self.config.embed_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.config.vision.image_hw

    @property
    def context_length(self) -> int:
        """Longest text in tokens."""
        return self.config.text.context_length

    def encode_image(self, images: Tensor | Sequence[Tensor], normalize: bool = False) -> Tensor:
        """Features_BE of normalised pixels; unit length with ``normalize``.

        Args:
            images: image_BCHW, or a list of images_CHW of any sizes, packed into one sequence: see
                `VisionTransformer.forward`.
            normalize: features of unit length, in float32.
        """
        return self.visual(images, normalize=normalize)

    def encode_text(self, text: Tensor | PackedText, normalize: bool = False) -> Tensor:
        """Features_BE of token ids; unit length with ``normalize``.

        Args:
            text: ids_BT, or what ``model.text.pack`` makes of them: the same features, with no work for padding.
            normalize: features of unit length, in float32.
        """
        return self.text(text, normalize=normalize)

    def forward(
        self,
        image: Tensor | Sequence[Tensor] | None = None,
        text: Tensor | PackedText | None = None,
        *,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features of unit length and the scale they are to be multiplied with.

        Args:
            image: as for `encode_image`.
            text: as for `encode_text`.
            keys: int64 [B], a key for each pair, from which its patch dropout, drop path and dropout are drawn in
                training: the same in any split of a batch. None: torch's generator draws.

        Returns:
            image_features and text_features (of what was given), logit_scale (exponentiated, a scalar) and, in a
            model that has one, logit_bias: OpenCLIP's names, so its losses take the dict as keyword arguments.

        Raises:
            MmbaseError: keys that are not one int64 number for each pair; and what the towers raise.
        """
        _check_keys(keys, image, text)
        image_keys, text_keys = (None, None) if keys is None else (draw(keys, IMAGE), draw(keys, TEXT))
        out = {}
        if image is not None:
            out["image_features"] = self.visual(image, normalize=True, keys_B=image_keys)
        if text is not None:
            out["text_features"] = self.text(text, normalize=True, keys_B=text_keys)
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out


def _check_keys(keys: Tensor | None, *inputs: Tensor | Sequence[Tensor] | PackedText | None) -> None:
    """Refuse keys that would be broadcast over pairs, or be no hash at all."""
    for given in inputs:
        if keys is not None and given is not None and (keys.dtype != torch.int64 or keys.shape != (len(given),)):
            raise MmbaseError(
                f"keys must be int64 of shape [{len(given)}], a key for each pair, not {keys.dtype} of "
                f"{list(keys.shape)}; pass batch['draw']"
            )
