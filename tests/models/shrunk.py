"""OpenCLIP's configs shrunk in depth, width and image size, their structure kept; and its models built from them."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mmbase.models import zoo
from mmbase.models.config import CLIPConfig
from mmbase.models.openclip_config import SIGLIP_TOWERS, from_openclip_config

VOCABULARY, CONTEXT = 97, 11
SIGLIP_WIDTH, SIGLIP_HEADS, SIGLIP_LAYERS = 24, 2, 2


def shrunk_config(name: str) -> dict[str, Any]:
    """A native model's config, small: two heads of the same width, two blocks, a grid of 2 x 2 patches."""
    cfg = copy.deepcopy(zoo.openclip_config_of(name))
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    text.update(
        width=text["width"] // text["heads"] * 2, heads=2, layers=2, vocab_size=VOCABULARY, context_length=CONTEXT
    )
    if "timm_model_name" in vision:
        tower = SIGLIP_TOWERS[vision["timm_model_name"]]
        vision["image_size"] = 2 * tower.patch_size + tower.image_size % tower.patch_size
        cfg["embed_dim"] = SIGLIP_WIDTH
        text.update(width=SIGLIP_WIDTH)
    else:
        vision.update(width=vision.get("head_width", 64) * 2, layers=2, image_size=2 * vision["patch_size"])
        cfg["embed_dim"] = 24
    return cfg


def our_config(cfg: dict[str, Any]) -> CLIPConfig:
    """Our config of a shrunk one; timm's tower has the size that `build_openclip` gives it."""
    if "timm_model_name" not in cfg["vision_cfg"]:
        return from_openclip_config(cfg)
    tower = SIGLIP_TOWERS[cfg["vision_cfg"]["timm_model_name"]]
    projected = cfg["text_cfg"] | {"proj_type": "linear"}
    full = from_openclip_config(cfg | {"embed_dim": tower.width, "text_cfg": projected})
    text = full.text.model_copy(update={"projection": cfg["text_cfg"].get("proj_type") != "none"})
    vision = full.vision.model_copy(update={"width": SIGLIP_WIDTH, "heads": SIGLIP_HEADS, "layers": SIGLIP_LAYERS})
    return full.model_copy(update={"embed_dim": SIGLIP_WIDTH, "vision": vision, "text": text})


def build_openclip(cfg: dict[str, Any], **timm_options: Any) -> nn.Module:
    """OpenCLIP's model of a config, in eval mode, every parameter moved off its initial value."""
    import timm
    from open_clip.model import CLIP, CustomTextCLIP

    cfg = copy.deepcopy(cfg)
    kind = CustomTextCLIP if cfg.pop("custom_text", False) else CLIP
    options = {"embed_dim": SIGLIP_WIDTH, "num_heads": SIGLIP_HEADS, "depth": SIGLIP_LAYERS,
               "img_size": cfg["vision_cfg"]["image_size"]} | timm_options  # fmt: skip
    create = timm.create_model
    with mock.patch("timm.create_model", lambda name, **given: create(name, **(given | options))):
        model = kind(**cfg)
    return randomise(model).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Add noise to every parameter, so that none is at zero or one and every one matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def inputs(image_hw: tuple[int, int], text: Any, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Random pixels, and random ids, each row with one end token somewhere."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, *image_hw, generator=generator)
    ids = torch.randint(3, text.vocab_size - 1, (batch, text.context_length), generator=generator)
    end = text.eos_id if text.pool == "eos" else text.vocab_size - 1
    ids[torch.arange(batch), torch.randint(1, text.context_length, (batch,), generator=generator)] = end
    return image, ids


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()
