"""OpenCLIP's model configs and ours, both ways. Torch-free.

OpenCLIP describes a model by ``embed_dim``, ``vision_cfg``, ``text_cfg`` and a few flags (the files of its
``model_configs`` folder, and ``model_cfg`` in an ``open_clip_config.json``). Our towers cover its own ViTs with
CLIP-style text, and SigLIP's ViTs, which it builds from timm by name.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from pydantic import ValidationError

from mmbase.errors import MmbaseError, nearest
from mmbase.models.config import Activation, CLIPConfig, TextConfig, VisionConfig


class NotCovered(MmbaseError):
    """An OpenCLIP model that our towers cannot express; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class SiglipTower:
    """One of SigLIP's image towers as timm builds it (LayerNorm epsilon 1e-6, no class token, attention pooling)."""

    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    mlp_ratio: float
    activation: Activation


def _siglip_towers() -> dict[str, SiglipTower]:
    """timm's names: vit_{base,large,so400m,giantopt}_patch{N}_siglip_{size}."""
    shapes = {
        "base": (768, 12, 12, 4.0),
        "large": (1024, 24, 16, 4.0),
        "so400m": (1152, 27, 16, 3.7362),
        "giantopt": (1536, 40, 16, 4.0),
    }
    sizes = {
        "base_patch32": [256],
        "base_patch16": [224, 256, 384, 512],
        "large_patch16": [256, 384, 512],
        "so400m_patch14": [224, 378, 384],
        "so400m_patch16": [256, 384, 512],
        "giantopt_patch16": [256, 384],
    }
    all_tanh = {"base_patch32", "so400m_patch16", "giantopt_patch16"}
    towers = {}
    for prefix, image_sizes in sizes.items():
        size, patch = prefix.split("_patch")
        width, layers, heads, mlp_ratio = shapes[size]
        for image_size in image_sizes:
            tanh = prefix in all_tanh or (prefix, image_size) == ("large_patch16", 512)
            towers[f"vit_{prefix}_siglip_{image_size}"] = SiglipTower(
                width, layers, heads, int(patch), image_size, mlp_ratio, "gelu_tanh" if tanh else "gelu"
            )
    return towers


SIGLIP_TOWERS = _siglip_towers()

CUSTOM_BLOCK = (
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
)
TOP_KEYS = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale",
    "custom_text", "multimodal_cfg",
}  # fmt: skip
VISION_KEYS = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "patch_dropout",
    "attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type",
    "final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs", "timm_model_name",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", *CUSTOM_BLOCK,
}  # fmt: skip
TEXT_KEYS = {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "width", "heads",
    "layers", "mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "eos_id", "no_causal_mask", "final_ln_after_pool",
    "pool_type", "proj_bias", "proj_type", "output_tokens", "act_kwargs", "norm_kwargs", "hf_model_name",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", *CUSTOM_BLOCK,
}  # fmt: skip
TEXT_POOLS: dict[str, Literal["eot", "eos", "last", "first"]] = {
    "argmax": "eot",
    "eos": "eos",
    "last": "last",
    "first": "first",
}


def from_openclip_config(model_cfg: dict[str, Any]) -> CLIPConfig:
    """Our config of an OpenCLIP model.

    Raises:
        NotCovered: a model that runs through the adapter; the message says why.
        MmbaseError: a key that OpenCLIP does not know, or values that do not fit together.
    """
    _check_keys(model_cfg)
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    _check_covered(model_cfg, vision, text)
    activation: Activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    try:
        return CLIPConfig(
            embed_dim=model_cfg["embed_dim"],
            vision=_siglip_vision(vision) if vision.get("timm_model_name") else _vision(vision, activation),
            text=_text(text, activation),
            init_logit_scale=model_cfg.get("init_logit_scale", math.log(1 / 0.07)),
            init_logit_bias=model_cfg.get("init_logit_bias"),
        )
    except ValidationError as error:
        raise MmbaseError(f"this OpenCLIP config does not hold together: {error.errors()[0]['msg']}") from error


def to_openclip_config(config: CLIPConfig, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """OpenCLIP's ``model_cfg`` of our config; dropout and stochastic depth, which change no features, are left out.

    Args:
        config: ours.
        tokenizer: a tokenizer's description; one of kind ``hf`` or ``file`` is named in the config.

    Raises:
        MmbaseError: a field of ours that OpenCLIP has no equivalent of.
    """
    siglip = config.vision.pool == "attention"
    model_cfg: dict[str, Any] = {"embed_dim": config.embed_dim}
    if "quick_gelu" in (config.vision.activation, config.text.activation):
        if config.text.activation != "quick_gelu" or (config.vision.activation != "quick_gelu" and not siglip):
            raise _no_equivalent("vision.activation", config.vision.activation, "with text.activation another; use one")
        model_cfg["quick_gelu"] = True
    model_cfg["vision_cfg"] = _to_siglip_vision(config.vision) if siglip else _to_vision(config.vision)
    model_cfg["text_cfg"] = _to_text(config.text, tokenizer)
    if siglip:
        model_cfg["custom_text"] = True
    model_cfg["init_logit_scale"] = config.init_logit_scale
    if config.init_logit_bias is not None:
        model_cfg["init_logit_bias"] = config.init_logit_bias
    return model_cfg


def tokenizer_of(text_cfg: dict[str, Any], folder: str | None = None) -> dict[str, Any]:
    """Description of the tokenizer an OpenCLIP ``text_cfg`` asks for: CLIP's, or a Hugging Face one.

    ``folder`` replaces the hub name of the latter by a local folder that holds its files.
    """
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    context_length = text_cfg.get("context_length", 77)
    name = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if not name:
        return {"kind": "clip", "context_length": context_length} | options
    mode = text_cfg.get("tokenizer_mode")
    options |= {"mode": mode} if mode else {}
    return {"kind": "hf", "source": folder or name, "context_length": context_length} | options


def _check_keys(model_cfg: dict[str, Any]) -> None:
    for required in ("embed_dim", "vision_cfg", "text_cfg"):
        if required not in model_cfg:
            raise MmbaseError(f"an OpenCLIP config needs the key {required!r}; this one has {sorted(model_cfg)}")
    sections = (("", model_cfg, TOP_KEYS), ("vision_cfg.", model_cfg["vision_cfg"], VISION_KEYS),
                ("text_cfg.", model_cfg["text_cfg"], TEXT_KEYS))  # fmt: skip
    for prefix, section, known in sections:
        for key in section:
            if key not in known:
                raise MmbaseError(f"unknown key {prefix + key!r} in an OpenCLIP config{nearest(key, known)}")


def _check_covered(model_cfg: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> None:
    if "multimodal_cfg" in model_cfg:
        raise NotCovered("captioning decoder (CoCa)")
    if text.get("hf_model_name"):
        raise NotCovered(f"Hugging Face text tower {text['hf_model_name']}")
    timm = vision.get("timm_model_name")
    if timm and (timm not in SIGLIP_TOWERS or vision.get("timm_pool") != "map" or vision.get("timm_proj") != "none"):
        raise NotCovered(f"timm image tower {timm}")
    if isinstance(vision.get("layers"), list | tuple):
        raise NotCovered("ResNet image tower")
    if vision.get("attentional_pool"):
        raise NotCovered("attentional pooler of several queries")
    for name, section in (("image", vision), ("text", text)):
        custom = [key for key in CUSTOM_BLOCK if section.get(key) not in (None, False, "default")]
        if custom:
            raise NotCovered(f"custom attention blocks in the {name} tower ({', '.join(custom)})")
        if section.get("output_tokens"):
            raise NotCovered(f"{name} tower that returns tokens")
    if text.get("embed_cls"):
        raise NotCovered("class token in the text tower")
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        raise NotCovered(f"image pooling {vision['pool_type']!r}")
    if text.get("pool_type", "argmax") not in TEXT_POOLS:
        raise NotCovered(f"text pooling {text['pool_type']!r}")


def _activation(section: dict[str, Any], default: Activation) -> Activation:
    tanh = (section.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "gelu_tanh" if tanh and default == "gelu" else default


def _eps(section: dict[str, Any]) -> float:
    return (section.get("norm_kwargs") or {}).get("eps", 1e-5)


def _vision(vision: dict[str, Any], activation: Activation) -> VisionConfig:
    width = vision.get("width", 768)
    return VisionConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16),
        width=width,
        layers=vision.get("layers", 12),
        heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        activation=_activation(vision, activation),
        norm_eps=_eps(vision),
        layer_scale=vision.get("ls_init_value"),
        position_embedding="sincos" if vision.get("pos_embed_type", "learnable") == "sin_cos_2d" else "learnable",
        norm_pre=not vision.get("no_ln_pre", False),
        norm_after_pool=vision.get("final_ln_after_pool", False),
        pool="average" if vision.get("pool_type", "tok") == "avg" else "class",
        patch_dropout=vision.get("patch_dropout", 0.0),
    )


def _siglip_vision(vision: dict[str, Any]) -> VisionConfig:
    tower = SIGLIP_TOWERS[vision["timm_model_name"]]
    return VisionConfig(
        image_size=vision.get("image_size", tower.image_size),
        patch_size=tower.patch_size,
        patch_bias=True,
        width=tower.width,
        layers=tower.layers,
        heads=tower.heads,
        mlp_ratio=tower.mlp_ratio,
        activation=tower.activation,
        norm_eps=1e-6,
        class_token=False,
        norm_pre=False,
        pool="attention",
        patch_dropout=vision.get("patch_dropout", 0.0),
        drop_path=vision.get("timm_drop_path") or 0.0,
        projection=False,
    )


def _text(text: dict[str, Any], activation: Activation) -> TextConfig:
    return TextConfig(
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        width=text.get("width", 512),
        heads=text.get("heads", 8),
        layers=text.get("layers", 12),
        mlp_ratio=text.get("mlp_ratio", 4.0),
        activation=_activation(text, activation),
        norm_eps=_eps(text),
        layer_scale=text.get("ls_init_value"),
        causal=not text.get("no_causal_mask", False),
        pool=TEXT_POOLS[text.get("pool_type", "argmax")],
        eos_id=text.get("eos_id", 2),
        pad_id=text.get("pad_id", 0),
        projection=text.get("proj_type", "linear") != "none",
        projection_bias=text.get("proj_bias", False),
    )


def _no_equivalent(field: str, value: object, remedy: str) -> MmbaseError:
    return MmbaseError(f"{field}={value!r} has no OpenCLIP equivalent {remedy}")


def _norm_and_activation(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if tower.norm_eps != 1e-5:
        section["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        section["act_kwargs"] = {"approximate": "tanh"}
    if tower.layer_scale is not None:
        section["ls_init_value"] = tower.layer_scale
    return section


def _to_vision(vision: VisionConfig) -> dict[str, Any]:
    remedy = "for its own ViTs; keep this model in mmbase's format"
    needed = {"stem": "patch", "patch_bias": False, "class_token": True, "projection": True, "projection_bias": False}
    for field, value in needed.items():
        if getattr(vision, field) != value:
            raise _no_equivalent(f"vision.{field}", getattr(vision, field), remedy)
    if vision.patch_hw[0] != vision.patch_hw[1]:
        raise _no_equivalent("vision.patch_size", vision.patch_size, remedy)
    section: dict[str, Any] = {
        "image_size": vision.image_size,
        "layers": vision.layers,
        "width": vision.width,
        "head_width": vision.width // vision.heads,
        "patch_size": vision.patch_hw[0],
        "mlp_ratio": vision.mlp_ratio,
        "patch_dropout": vision.patch_dropout,
    }
    if not vision.norm_pre:
        section["no_ln_pre"] = True
    if vision.position_embedding == "sincos":
        section["pos_embed_type"] = "sin_cos_2d"
    if vision.norm_after_pool:
        section["final_ln_after_pool"] = True
    if vision.pool == "average":
        section["pool_type"] = "avg"
    return section | _norm_and_activation(vision)


def _to_siglip_vision(vision: VisionConfig) -> dict[str, Any]:
    plain = VisionConfig()
    training_only = ("patch_dropout", "drop_path", "dropout", "branch_init", "checkpoint_activations")
    inference = vision.model_copy(update={field: getattr(plain, field) for field in training_only})
    for name, tower in SIGLIP_TOWERS.items():
        section = {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        if vision.image_size == tower.image_size and _siglip_vision(section) == inference:
            return section
    raise _no_equivalent("vision.pool", vision.pool, f"but in SigLIP's own sizes: {', '.join(SIGLIP_TOWERS)}")


def _to_text(text: TextConfig, tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    remedy = "; keep this model in mmbase's format"
    if text.pool == "mean":
        raise _no_equivalent("text.pool", text.pool, remedy)
    if text.mask_padding:
        raise _no_equivalent("text.mask_padding", text.mask_padding, remedy)
    section: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": text.mlp_ratio,
        "pool_type": {ours: theirs for theirs, ours in TEXT_POOLS.items()}[text.pool],
    }
    if not text.causal:
        section["no_causal_mask"] = True
    if text.pool == "eos":
        section["eos_id"] = text.eos_id
    if text.pad_id != 0:
        section["pad_id"] = text.pad_id
    if text.projection_bias:
        section["proj_bias"] = True
    if not text.projection:
        section["proj_type"] = "none"
    if tokenizer and tokenizer["kind"] != "clip":
        section["hf_tokenizer_name"] = tokenizer.get("source") or "tokenizer"
        kept = {key: tokenizer[key] for key in ("clean", "strip_sep_token", "language") if tokenizer.get(key)}
        section |= {"tokenizer_kwargs": kept} if kept else {}
    elif tokenizer and tokenizer.get("clean", "lower") != "lower":
        section["tokenizer_kwargs"] = {"clean": tokenizer["clean"]}
    return section | _norm_and_activation(text)
