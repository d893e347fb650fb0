"""OpenCLIP's own models behind our interface, for those our towers do not cover (ResNet, timm, Hugging Face, CoCa).

Shapes: B batch, C channels, H/W pixels, T tokens, E embedding width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmbase.errors import MmbaseError
from mmbase.models.state_dicts import read_state_dict


class OpenClipAdapter(nn.Module):
    """An open_clip model with the methods of `mmbase.models.clip.CLIP`."""

    def __init__(self, model_cfg: dict[str, Any]) -> None:
        """Build open_clip's model with random weights; no tower is downloaded.

        Args:
            model_cfg: OpenCLIP's config.

        Raises:
            MmbaseError: a Hugging Face text tower whose config is not on this machine and cannot be fetched, or a
                config that open_clip refuses.
        """
        super().__init__()
        self.model_cfg = copy.deepcopy(model_cfg)
        self.model: Any = _build_openclip(model_cfg)
        self.embed_dim: int = model_cfg["embed_dim"]
        size = model_cfg["vision_cfg"].get("image_size", 224)
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.context_length: int = model_cfg["text_cfg"].get("context_length", 77)

    @property
    def logit_scale(self) -> Tensor:
        """Log of the factor from cosine similarity to logit."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """Offset of the logits, or None."""
        return getattr(self.model, "logit_bias", None)

    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor:
        """Features_BE of normalised pixels; unit length with ``normalize``."""
        return self.model.encode_image(image_BCHW, normalize=normalize)

    def encode_text(self, text_BT: Tensor, normalize: bool = False) -> Tensor:
        """Features_BE of token ids; unit length with ``normalize``."""
        features_BE = self.model.encode_text(text_BT, normalize=False)
        return F.normalize(features_BE, dim=-1) if normalize else features_BE

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """As `mmbase.models.clip.CLIP.forward`: image_features, text_features, logit_scale and, if any, logit_bias."""
        out = {}
        if image is not None:
            out["image_features"] = self.encode_image(image, normalize=True)
        if text is not None:
            out["text_features"] = self.encode_text(text, normalize=True)
        out["logit_scale"] = self.model.logit_scale.exp()
        if getattr(self.model, "logit_bias", None) is not None:
            out["logit_bias"] = self.model.logit_bias
        return out

    def load_file(self, path: str | Path) -> OpenClipAdapter:
        """Load an OpenCLIP state dict from a ``.pt`` or ``.safetensors`` file; returns the adapter itself.

        Raises:
            MmbaseError: no such file, an unsafe or damaged one, or another model's weights.
        """
        read_state_dict(path)  # refuses what is unsafe or damaged, with a message of its own
        from open_clip import load_checkpoint

        try:
            load_checkpoint(self.model, str(path), weights_only=True)
        except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
            raise MmbaseError(f"{str(path)!r} does not fit this model: {_one_line(error)}") from error
        return self


def _build_openclip(model_cfg: dict[str, Any]) -> nn.Module:
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    options = copy.deepcopy(model_cfg)
    custom_text = options.pop("custom_text", False)
    text = options["text_cfg"]
    tower = text.get("hf_model_name")
    if tower:
        text["hf_model_pretrained"] = False
    if options["vision_cfg"].get("timm_model_name"):
        options["vision_cfg"]["timm_model_pretrained"] = False
    kind: Any = CoCa if "multimodal_cfg" in options else CustomTextCLIP if custom_text or tower else CLIP
    try:
        return kind(**options)
    except OSError as error:  # what transformers raises where a file is neither cached nor to be fetched
        raise MmbaseError(
            f"the text tower needs config.json of {tower!r} from the Hugging Face hub: connect once, or name a local "
            "folder that holds it in text_cfg.hf_model_name"
        ) from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise MmbaseError(f"open_clip cannot build this model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The message of an error in one line, without the tail of long lists."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]
