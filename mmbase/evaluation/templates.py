"""Prompt templates and class names by set. Imports no torch: OpenCLIP's lists are read from its one metadata file."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from mmbase.errors import MmbaseError, nearest

_OWN_TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "photo": ("a photo of a {}.", "a close-up of a {}.", "a photo with a {} in it.", "{}"),
    "emoji": ("{}", "an emoji of {}", "{} emoji", "a small picture of {}"),
    "drawing": ("{}", "a drawing of {}", "an illustration of {}", "clip art of {}"),
}
# Set name -> the tuple of OpenCLIP's metadata that it stands for.
_OPENCLIP_TEMPLATES = {
    "openai": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet-simple": "SIMPLE_IMAGENET_TEMPLATES",
}
_OPENCLIP_CLASS_NAMES = {"imagenet": "IMAGENET_CLASSNAMES"}


@functools.cache
def _openclip_metadata() -> ModuleType:
    """OpenCLIP's ``zero_shot_metadata.py``, executed alone: importing its package would import torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise MmbaseError("OpenCLIP's template and class lists need open-clip-torch; run `pip install open-clip-torch`")
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("_mmbase_openclip_zero_shot_metadata", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise MmbaseError(f"this open-clip-torch has no {path.name} in {path.parent}; install open-clip-torch>=3.3,<4")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _openclip_list(attribute: str) -> tuple:
    value = getattr(_openclip_metadata(), attribute, None)
    if value is None:
        raise MmbaseError(f"this open-clip-torch has no list {attribute}; install open-clip-torch>=3.3,<4")
    return tuple(value)


def template_sets() -> list[str]:
    """Names that ``resolve_templates`` knows."""
    return [*_OWN_TEMPLATES, *_OPENCLIP_TEMPLATES]


def class_name_sets() -> list[str]:
    """Names that ``class_names`` knows."""
    return list(_OPENCLIP_CLASS_NAMES)


def class_names(name: str) -> list[str]:
    """The class names of a published set, in the order of its class indices.

    ``"imagenet"`` is OpenCLIP's list of 1,000 names, in which two names stand for two classes each
    (``missile``, ``sunglasses``).

    Raises:
        MmbaseError: the set is unknown.
    """
    if name not in _OPENCLIP_CLASS_NAMES:
        hint = nearest(name, _OPENCLIP_CLASS_NAMES)
        raise MmbaseError(
            f"unknown set of class names {name!r}{hint or ';'} known: {', '.join(_OPENCLIP_CLASS_NAMES)}; "
            f"or give the labels themselves as a list"
        )
    return [str(label) for label in _openclip_list(_OPENCLIP_CLASS_NAMES[name])]


def resolve_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates, each with exactly one ``{}`` where the class name goes.

    Args:
        templates: a set's name (``template_sets()``: ``"none"`` is the bare name, ``"openai"`` and ``"imagenet"``
            the 80 prompts of CLIP [Radford et al. 2021], ``"imagenet-simple"`` 7 of them), one template, or a list.

    Raises:
        MmbaseError: unknown set, empty list, or a template without exactly one ``{}``.
    """
    if isinstance(templates, str):
        if templates in _OWN_TEMPLATES:
            return list(_OWN_TEMPLATES[templates])
        if templates in _OPENCLIP_TEMPLATES:
            return [template("{}") for template in _openclip_list(_OPENCLIP_TEMPLATES[templates])]
        if "{" not in templates:
            raise MmbaseError(
                f"unknown template set {templates!r}{nearest(templates, template_sets()) or ';'} known: "
                f"{', '.join(template_sets())}; a template of your own needs '{{}}' where the class name goes, "
                f"as in 'a photo of a {{}}.'"
            )
        templates = [templates]
    resolved = list(templates)
    if not resolved:
        raise MmbaseError("the list of templates is empty; give at least one, or 'none' for the bare class names")
    for template in resolved:
        if not isinstance(template, str) or template.count("{}") != 1:
            count = template.count("{}") if isinstance(template, str) else 0
            raise MmbaseError(
                f"template {template!r} has {count} times '{{}}'; write it exactly once, where the class name goes, "
                f"as in 'a photo of a {{}}.'"
            )
    return resolved


def fill(template: str, class_name: str) -> str:
    """``template`` with ``class_name`` for its ``{}``. Braces in a class name stay as they are."""
    return template.replace("{}", class_name, 1)
