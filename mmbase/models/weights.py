"""Where models come from: `build` with random weights, `load_weights` from a name and a tag, a file, a folder or a hub.

Both return the module and what belongs to it: ``{"name", "preprocess", "tokenizer", "source"}``, plain data.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from mmbase.errors import MmbaseError, nearest
from mmbase.models import huggingface, openclip, zoo
from mmbase.models.adapter import OpenClipAdapter
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig, TextConfig, VisionConfig
from mmbase.models.openclip_config import NotCovered, from_openclip_config, tokenizer_of
from mmbase.models.state_dicts import Source, StateDict, load_into, parameter_names, read_state_dict

HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
PREFERRED_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")

Info = dict[str, Any]


def build(name_or_config: str | CLIPConfig | dict[str, Any]) -> tuple[CLIP | OpenClipAdapter, Info]:
    """A model with random weights.

    Args:
        name_or_config: one of OpenCLIP's names (``ViT-B-32``; those our towers do not cover run through the adapter),
            or a config of ours.

    Raises:
        MmbaseError: an unknown name (the nearest are given), or a config that does not hold together.
    """
    if isinstance(name_or_config, str):
        name = zoo.canonical_name(name_or_config)
        config = zoo.config_of(name)
        module = OpenClipAdapter(zoo.openclip_config_of(name)) if config is None else CLIP(config)
        return module, _info(name, zoo.preprocess_of(name), zoo.tokenizer_description(name), "random weights")
    config = _checked(name_or_config)
    tokenizer = {"kind": "clip", "context_length": config.text.context_length}
    return CLIP(config), _info("custom", {"size": config.vision.image_size}, tokenizer, "random weights")


def load_weights(source: str | Path, pretrained: str | Path | None = None) -> tuple[CLIP | OpenClipAdapter, Info]:
    """A model with trained weights, in fp32 on the CPU.

    Args:
        source: one of OpenCLIP's names; ``hf-hub:org/name``; a folder (or ``local-dir:folder``) with
            ``open_clip_config.json`` or a Hugging Face ``config.json``; or an OpenCLIP ``.pt`` or ``.safetensors``
            file, whose shapes then have to tell which model it is.
        pretrained: with a name: a tag of OpenCLIP's registry, which is downloaded, or a state dict's file.

    Raises:
        MmbaseError: nothing there, an unknown name or tag (the nearest are given), unsafe or damaged weights, or
            weights of another model.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        _refuse_pretrained(text, pretrained)
        return _load_hub(text.removeprefix(HUB_PREFIX))
    path = Path(text.removeprefix(FOLDER_PREFIX))
    if path.is_dir() or text.startswith(FOLDER_PREFIX):
        _refuse_pretrained(text, pretrained)
        return _load_folder(path)
    if path.suffix in WEIGHT_SUFFIXES:
        _refuse_pretrained(text, pretrained if str(pretrained) != text else None)
        return _load_file(path)
    if "/" in text and not zoo.is_known(text):
        raise MmbaseError(f"no file or folder {text!r}, and no model of that name; `mmbase models` lists the names")
    return _load_named(zoo.canonical_name(text), None if pretrained is None else str(pretrained))


def _load_named(name: str, pretrained: str | None) -> tuple[CLIP | OpenClipAdapter, Info]:
    tags = zoo.pretrained_tags(name)
    if pretrained is None:
        offer = f"pretrained={tags[0]!r} (of {len(tags)} tags) or " if tags else ""
        raise MmbaseError(f"which weights of {name}? give {offer}a file; mmbase.create({name!r}) makes random weights")
    path, tag = Path(pretrained), None
    if path.suffix in WEIGHT_SUFFIXES or path.is_file():
        if not path.is_file():
            raise MmbaseError(f"no weights file {pretrained!r}; check the path")
    else:
        entry, tag = zoo.pretrained_of(name, pretrained), pretrained
        quick_gelu = zoo.openclip_config_of(name).get("quick_gelu", False)
        if entry.get("quick_gelu", False) != quick_gelu:
            other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
            warnings.warn(
                f"{pretrained!r} was trained with{'out' if quick_gelu else ''} QuickGELU and {name} is "
                f"with{'' if quick_gelu else 'out'}; {other} has the right activation",
                stacklevel=4,
            )
        path = _download_tag(name, tag, entry)
    config = zoo.config_of(name)
    module: nn.Module
    if config is None:
        module = OpenClipAdapter(zoo.openclip_config_of(name)).load_file(path)
    else:
        module = _load_native(config, read_state_dict(path), str(path))
    return module, _info(name, zoo.preprocess_of(name, tag), zoo.tokenizer_description(name), f"{name} {pretrained}")


def _load_native(config: CLIPConfig, state: StateDict, origin: str) -> CLIP:
    """Weights under OpenCLIP's names, or under ours."""
    if "visual.stem.weight" in state:
        return load_into(config, {name: Source((name,)) for name in parameter_names(config)}, state, origin)
    return openclip.from_openclip(config, state, origin)


def _load_folder(folder: Path) -> tuple[CLIP | OpenClipAdapter, Info]:
    if not folder.is_dir():
        raise MmbaseError(f"no folder {str(folder)!r}; check the path")
    if (folder / openclip.CONFIG_FILE).is_file():
        tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else None
        return _load_openclip_files(folder / openclip.CONFIG_FILE, _weights_in(folder), folder.name, tokenizer_folder)
    if (folder / huggingface.CONFIG_FILE).is_file():
        return _load_huggingface_folder(folder)
    raise MmbaseError(
        f"{str(folder)!r} holds no model: no {openclip.CONFIG_FILE} (OpenCLIP), no {huggingface.CONFIG_FILE} (Hugging "
        "Face), and it is no run of mmbase"
    )


def _load_openclip_files(
    config_file: Path, weights: Path, name: str, tokenizer_folder: Path | None
) -> tuple[CLIP | OpenClipAdapter, Info]:
    model_cfg, preprocess_cfg = openclip.read_openclip_config(config_file)
    module: nn.Module
    try:
        config = from_openclip_config(model_cfg)
    except NotCovered:
        module = OpenClipAdapter(model_cfg).load_file(weights)
    else:
        module = _load_native(config, read_state_dict(weights), str(weights))
    preprocess = {"size": model_cfg["vision_cfg"].get("image_size", 224)}
    preprocess |= {key: preprocess_cfg[key] for key in PREPROCESS_KEYS if preprocess_cfg.get(key) is not None}
    tokenizer = tokenizer_of(model_cfg["text_cfg"], None if tokenizer_folder is None else str(tokenizer_folder))
    return module, _info(name, preprocess, tokenizer, str(weights))


def _load_huggingface_folder(folder: Path) -> tuple[CLIP | OpenClipAdapter, Info]:
    config = huggingface.read_huggingface_config(folder)
    huggingface.from_huggingface_config(config)  # refuse another kind of model before looking for its weights
    weights = _weights_in(folder)
    module = huggingface.from_huggingface(config, read_state_dict(weights), str(weights))
    if config["model_type"] == "clip" and module.config.text.vocab_size == huggingface.CLIP_VOCABULARY:
        tokenizer: Info = {"kind": "clip", "context_length": module.context_length}
    else:
        clean = {"clean": "canonicalize"} if config["model_type"] == "siglip" else {}
        tokenizer = {"kind": "hf", "source": str(folder), "context_length": module.context_length, **clean}
    preprocess = huggingface.preprocess_of_folder(folder, module.image_size)
    return module, _info(folder.name, preprocess, tokenizer, str(weights))


def _load_file(path: Path) -> tuple[CLIP | OpenClipAdapter, Info]:
    """A bare weights file: described by a config beside it, or recognised by its shapes."""
    if not path.is_file():
        raise MmbaseError(f"no weights file {str(path)!r}; check the path")
    if (path.parent / openclip.CONFIG_FILE).is_file():
        return _load_openclip_files(path.parent / openclip.CONFIG_FILE, path, path.stem, None)
    state = read_state_dict(path)
    configs = {name: zoo.config_of(name) for name in zoo.native_names()}
    names = [name for name, config in configs.items() if config is not None and _fits(config, state)]
    if len(names) != 1:
        which = " or ".join(names[:6]) if names else "one of `mmbase models`"
        raise MmbaseError(
            f"{str(path)!r} does not say which model it is; give its name ({which}) and the file as pretrained"
        )
    module = openclip.from_openclip(zoo.openclip_config_of(names[0]), state, str(path))
    return module, _info(names[0], zoo.preprocess_of(names[0]), zoo.tokenizer_description(names[0]), str(path))


def _fits(config: CLIPConfig, state: StateDict) -> bool:
    """Whether a state dict in OpenCLIP's layout can be this model's, by the shapes that tell models apart."""
    siglip = config.vision.pool == "attention"
    stem = state.get("visual.trunk.patch_embed.proj.weight" if siglip else "visual.conv1.weight")
    positions = state.get("visual.trunk.pos_embed" if siglip else "visual.positional_embedding")
    prefix = "text." if "text.token_embedding.weight" in state else ""
    tokens, text_positions = (state.get(prefix + key) for key in ("token_embedding.weight", "positional_embedding"))
    if stem is None or positions is None or tokens is None or text_positions is None:
        return False
    vision, text = config.vision, config.text
    blocks = "visual.trunk.blocks." if siglip else "visual.transformer.resblocks."
    return (
        stem.shape == (vision.width, 3, *vision.patch_hw)
        and positions.shape[-2] == vision.grid_hw[0] * vision.grid_hw[1] + vision.class_token
        and tokens.shape == (text.vocab_size, text.width)
        and text_positions.shape[0] == text.context_length
        and _depth(state, blocks) == vision.layers
        and _depth(state, f"{prefix}transformer.resblocks.") == text.layers
    )


def _depth(state: StateDict, blocks: str) -> int:
    """Number of blocks whose tensors' names begin with ``blocks`` and an index."""
    return len({key.removeprefix(blocks).split(".")[0] for key in state if key.startswith(blocks)})


def _load_hub(model_id: str) -> tuple[CLIP | OpenClipAdapter, Info]:
    """A model of the Hugging Face hub, fetched by OpenCLIP's own downloader."""
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        config_file = Path(download_pretrained_from_hf(model_id, filename=openclip.CONFIG_FILE))
        weights = Path(download_pretrained_from_hf(model_id))
    except Exception as error:  # the hub's library raises many kinds
        raise MmbaseError(f"cannot fetch {model_id!r} from the Hugging Face hub: {_reason(error)}") from error
    module, info = _load_openclip_files(config_file, weights, model_id, None)
    return module, info | {"source": HUB_PREFIX + model_id}


def _download_tag(name: str, tag: str, entry: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(entry))
    except Exception as error:  # the hub's library and urllib raise many kinds
        raise MmbaseError(
            f"cannot download {tag!r} of {name}: {_reason(error)}; fetch the file by hand and give its path"
        ) from error


def _weights_in(folder: Path) -> Path:
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES}
    for name in PREFERRED_FILES:
        if name in files:
            return files[name]
    if len(files) != 1:
        found = f"{len(files)} weight files" if files else "no weight file"
        raise MmbaseError(f"{str(folder)!r} holds {found}; name it {PREFERRED_FILES[0]}")
    return next(iter(files.values()))


def _checked(config: CLIPConfig | dict[str, Any]) -> CLIPConfig:
    if isinstance(config, CLIPConfig):
        return config
    try:
        return CLIPConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            sections = {"vision": VisionConfig.model_fields, "text": TextConfig.model_fields}
            known = sections.get(str(first["loc"][0]), CLIPConfig.model_fields)
            message = f"there is no such key{nearest(str(first['loc'][-1]), known)}"
        raise MmbaseError(f"model config, {where or 'top level'}: {message}") from error


def _refuse_pretrained(source: str, pretrained: str | Path | None) -> None:
    if pretrained is not None:
        raise MmbaseError(f"{source!r} has its own weights; leave pretrained={str(pretrained)!r} out")


def _info(name: str, preprocess: Info, tokenizer: Info, source: str) -> Info:
    return {"name": name, "preprocess": preprocess, "tokenizer": tokenizer, "source": source}


def _reason(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]
