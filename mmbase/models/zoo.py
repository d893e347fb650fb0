"""The zoo: OpenCLIP's model names, configs and pretrained tags, read from its installed files.

Imports neither torch nor open_clip: the JSON configs are read as data, and of OpenCLIP's registry of weights only the
table is evaluated.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmbase.errors import MmbaseError, nearest
from mmbase.models.config import CLIPConfig, TextConfig, VisionConfig
from mmbase.models.openclip_config import NotCovered, from_openclip_config, tokenizer_of

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class ModelEntry:
    """One of OpenCLIP's models."""

    name: str
    route: Literal["native", "adapter"]
    """``native``: our towers; ``adapter``: open_clip's own model behind the same interface."""
    reason: str
    """Which of OpenCLIP's kinds it is, or why our towers do not cover it."""
    needs_hub: str | None
    """The files a hub has to supply, such as ``tokenizer timm/ViT-B-16-SigLIP``; None where nothing is needed."""
    image_size: int
    context_length: int
    parameters: int | None
    """Number of parameters; None for models that only open_clip itself can build."""
    pretrained: tuple[str, ...]
    """Tags of the weights OpenCLIP knows."""


def list_models() -> list[ModelEntry]:
    """All models of the installed OpenCLIP, in the natural order of their names."""
    return [model_entry(name) for name in sorted(_configs(), key=_natural)]


def model_entry(name: str) -> ModelEntry:
    """What is known of one model.

    Raises:
        MmbaseError: an unknown name; the nearest ones are given.
    """
    name = canonical_name(name)
    model_cfg = _configs()[name]
    config, reason = _convert(name)
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    return ModelEntry(
        name=name,
        route="adapter" if config is None else "native",
        reason=reason,
        needs_hub=_hub_files(text),
        image_size=vision["image_size"],
        context_length=text.get("context_length", 77),
        parameters=None if config is None else count_parameters(config),
        pretrained=tuple(pretrained_tags(name)),
    )


def canonical_name(name: str) -> str:
    """OpenCLIP's spelling of a model's name; ``ViT-B/32`` is accepted for ``ViT-B-32``.

    Raises:
        MmbaseError: an unknown name; the nearest ones are given.
    """
    spelt = name.replace("/", "-")
    if spelt not in _configs():
        raise MmbaseError(
            f"unknown model {name!r}{nearest(spelt, _configs())} (`mmbase models` lists all {len(_configs())})"
        )
    return spelt


def is_known(name: str) -> bool:
    """Whether this is a name of OpenCLIP's, in either spelling."""
    return name.replace("/", "-") in _configs()


def openclip_config_of(name: str) -> dict[str, Any]:
    """OpenCLIP's own config of a model, a fresh copy. Raises `MmbaseError` for an unknown name."""
    return copy.deepcopy(_configs()[canonical_name(name)])


def config_of(name: str) -> CLIPConfig | None:
    """Our config of one of OpenCLIP's models, or None where it goes through the adapter.

    Raises:
        MmbaseError: an unknown name; the nearest ones are given.
    """
    config = _convert(canonical_name(name))[0]
    return None if config is None else config.model_copy(deep=True)


def native_names() -> list[str]:
    """Names of the models our own towers cover."""
    return [name for name in sorted(_configs(), key=_natural) if _convert(name)[0] is not None]


def pretrained_tags(name: str) -> list[str]:
    """Tags of the weights that OpenCLIP knows for a model. Raises `MmbaseError` for an unknown name."""
    return list(_registry().get(canonical_name(name), {}))


def pretrained_of(name: str, tag: str) -> dict[str, Any]:
    """OpenCLIP's entry of one tag: where the weights are and how images are to be prepared.

    Raises:
        MmbaseError: an unknown name or tag; the nearest tags are given.
    """
    name = canonical_name(name)
    tags = _registry().get(name, {})
    spelt = tag.lower().replace("-", "_")
    if spelt not in tags:
        known = f"known: {', '.join(tags)}" if tags else "OpenCLIP knows no weights of this model"
        raise MmbaseError(f"{name} has no pretrained weights {tag!r}{nearest(spelt, tags)}; {known}, or give a file")
    return dict(tags[spelt])


def preprocess_of(name: str, tag: str | None = None) -> dict[str, Any]:
    """How images are prepared for a model: size, mean, std, interpolation, resize_mode.

    With a tag, as OpenCLIP's registry has it. Without one, what all of the model's tags agree on, and CLIP's settings
    otherwise: so SigLIP's mean and squashing also apply to a SigLIP model whose weights come from a file.

    Raises:
        MmbaseError: an unknown name or tag.
    """
    name = canonical_name(name)
    if tag is not None:
        entries = [pretrained_of(name, tag)]
    else:
        entries = list(_registry().get(name, {}).values())
    settings: dict[str, Any] = {
        "size": _configs()[name]["vision_cfg"]["image_size"],
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    for key in PREPROCESS_KEYS:
        values = [entry[key] for entry in entries if key in entry]
        if values and all(value == values[0] for value in values):
            settings[key] = values[0]
    return settings


def tokenizer_description(name: str) -> dict[str, Any]:
    """Description of a model's tokenizer, as `mmbase.data.tokenizer` takes it. Raises `MmbaseError`."""
    return tokenizer_of(openclip_config_of(name)["text_cfg"])


@functools.cache
def openclip_package() -> Path:
    """Folder of the installed open_clip, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise MmbaseError("OpenCLIP is not installed; run `pip install open-clip-torch`")
    return Path(next(iter(spec.submodule_search_locations)))


def count_parameters(config: CLIPConfig) -> int:
    """Number of parameters of our model with a patch stem, from the config alone."""
    vision, text, dim = config.vision, config.text, config.embed_dim
    grid = vision.grid_hw[0] * vision.grid_hw[1]
    total = 1 + int(config.init_logit_bias is not None) + _tower_parameters(vision, dim) + _tower_parameters(text, dim)
    total += vision.width * (3 * vision.patch_hw[0] * vision.patch_hw[1] + vision.patch_bias)
    total += vision.width * (grid + 2 * vision.class_token + 2 * vision.norm_pre)
    if vision.pool == "attention":
        hidden = int(vision.width * vision.mlp_ratio)
        total += 4 * vision.width * vision.width + 7 * vision.width + 2 * vision.width * hidden + hidden + vision.width
    return total + text.width * (text.vocab_size + text.context_length)


def _tower_parameters(tower: VisionConfig | TextConfig, embed_dim: int) -> int:
    """Blocks, final norm and projection."""
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    block += 2 * width * (tower.layer_scale is not None)
    projection = tower.projection * (width + tower.projection_bias) * embed_dim
    return tower.layers * block + 2 * width + projection


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    files = (openclip_package() / "model_configs").glob("*.json")
    configs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    return {name: cfg for name, cfg in configs.items() if {"embed_dim", "vision_cfg", "text_cfg"} <= cfg.keys()}


@functools.cache
def _convert(name: str) -> tuple[CLIPConfig | None, str]:
    """Our config and the kind, or None and why not."""
    try:
        config = from_openclip_config(_configs()[name])
    except NotCovered as error:
        return None, str(error)
    return config, "SigLIP" if config.vision.pool == "attention" else "CLIP"


@functools.cache
def _registry() -> dict[str, dict[str, dict[str, Any]]]:
    """OpenCLIP's table of pretrained weights: model name, tag, settings.

    Its module imports torch, so only the table is evaluated: the assignments, the loop that adds the QuickGELU names,
    and the small functions that return one entry.
    """
    namespace: dict[str, Any] = {"copy": copy}
    exec((openclip_package() / "constants.py").read_text(encoding="utf-8"), namespace)
    tree = ast.parse((openclip_package() / "pretrained.py").read_text(encoding="utf-8"))
    table = [node for node in tree.body if isinstance(node, ast.Assign | ast.For | ast.Expr) or _returns_dict(node)]
    exec(compile(ast.Module(table, type_ignores=[]), "pretrained.py", "exec"), namespace)
    return namespace["_PRETRAINED"]


def _returns_dict(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.FunctionDef)
        and len(node.body) == 1
        and isinstance(node.body[0], ast.Return)
        and isinstance(node.body[0].value, ast.Dict)
        and node.name.endswith("cfg")
    )


def _hub_files(text_cfg: dict[str, Any]) -> str | None:
    tower, tokenizer = text_cfg.get("hf_model_name"), text_cfg.get("hf_tokenizer_name")
    if tower:
        return f"text tower and tokenizer {tower}"
    return f"tokenizer {tokenizer}" if tokenizer else None


def _natural(name: str) -> list[Any]:
    """Sort key that takes runs of digits as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]
