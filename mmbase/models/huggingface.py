"""Hugging Face folders (``config.json`` and ``model.safetensors``): ``CLIPModel`` both ways, ``SiglipModel`` to read.

``transformers`` is not imported: the formats are plain JSON and tensors, and tests hold them against its classes.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmbase.errors import MmbaseError
from mmbase.models.clip import CLIP
from mmbase.models.config import Activation, CLIPConfig, TextConfig, VisionConfig
from mmbase.models.state_dicts import Source, StateDict, load_into, parameter_names, to_theirs
from mmbase.models.zoo import openclip_package

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CLIP_VOCABULARY = 49408
ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}

BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "attn.proj": "self_attn.out_proj",
}  # fmt: skip
VISUAL = {
    "stem": "vision_model.embeddings.patch_embedding",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "norm_pre": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
    "proj": "visual_projection",
    "attention_pool.query": "vision_model.head.probe",
    "attention_pool.q": "vision_model.head.attention.q",
    "attention_pool.kv": "vision_model.head.attention.kv",
    "attention_pool.proj": "vision_model.head.attention.out_proj",
    "attention_pool.norm": "vision_model.head.layernorm",
    "attention_pool.mlp": "vision_model.head.mlp",
}
TEXT = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "norm": "text_model.final_layer_norm",
}


def from_huggingface(config: dict[str, Any], state: StateDict, origin: str = "the state dict") -> CLIP:
    """A model of ours with a ``CLIPModel``'s or ``SiglipModel``'s weights; fp32 tensors are taken over, not copied.

    Args:
        config: the content of ``config.json``.
        state: the model's state dict.
        origin: what the weights are called in messages.

    Raises:
        MmbaseError: another kind of model, or tensors that do not fit the config.
    """
    ours = from_huggingface_config(config)
    state = {key: tensor for key, tensor in state.items() if not key.endswith(".position_ids")}
    for kind in ("weight", "bias"):  # one packed projection there, query apart from key and value here
        packed = state.pop(f"vision_model.head.attention.in_proj_{kind}", None)
        if packed is not None:
            width = packed.shape[0] // 3
            state[f"vision_model.head.attention.q.{kind}"] = packed[:width]
            state[f"vision_model.head.attention.kv.{kind}"] = packed[width:]
    return load_into(ours, huggingface_table(ours), state, origin)


def from_huggingface_config(config: dict[str, Any]) -> CLIPConfig:
    """Our config of a ``CLIPModel``'s or ``SiglipModel``'s ``config.json``.

    Raises:
        MmbaseError: another kind of model, or values our towers cannot express.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise MmbaseError(f"config.json describes model_type={kind!r}; only 'clip' and 'siglip' can be loaded")
    try:
        return _clip_config(config) if kind == "clip" else _siglip_config(config)
    except (ValidationError, KeyError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise MmbaseError(f"this {kind} config.json cannot be expressed: {reason}") from error


def to_huggingface(model: CLIP) -> tuple[dict[str, Any], StateDict]:
    """The ``config.json`` and state dict of a ``transformers.CLIPModel`` that gives our features.

    Raises:
        MmbaseError: a field of the config that ``CLIPModel`` has no equivalent of.
    """
    config = model.config
    _check_expressible(config)
    hugging_face = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        "vision_config": _tower(config.vision)
        | {"model_type": "clip_vision_model", "image_size": config.vision.image_hw[0],
           "patch_size": config.vision.patch_hw[0], "num_channels": 3, "projection_dim": config.embed_dim},
        "text_config": _tower(config.text) | _text_tokens(config.text)
        | {"model_type": "clip_text_model", "max_position_embeddings": config.text.context_length,
           "vocab_size": config.text.vocab_size, "projection_dim": config.embed_dim},
    }  # fmt: skip
    return hugging_face, to_theirs(model, huggingface_table(config))


def save_huggingface(
    model: CLIP, folder: str | Path, preprocess: dict[str, Any], tokenizer: dict[str, Any] | None = None
) -> None:
    """Write a folder that ``transformers.CLIPModel`` loads, and ``CLIPProcessor`` if the tokenizer is CLIP's.

    Args:
        model: ours.
        folder: made if it is missing.
        preprocess: size, mean, std, interpolation, resize_mode.
        tokenizer: its description.

    Raises:
        MmbaseError: a field of the config or a way of resizing without an equivalent; nothing is written then.
    """
    from safetensors.torch import save_file

    config, state = to_huggingface(model)
    processor = _image_processor(preprocess, model.image_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / "preprocessor_config.json", processor)
    if tokenizer is not None and tokenizer.get("kind") == "clip":
        _write_clip_tokenizer(folder, model.context_length)


def huggingface_table(config: CLIPConfig) -> dict[str, Source]:
    """For every tensor of ours, where it is found in the state dict of a ``CLIPModel`` or ``SiglipModel``."""
    siglip = config.vision.pool == "attention"
    table = {}
    for name in parameter_names(config):
        tower, _, rest = name.partition(".")
        unit_axes = {"logit_scale": 1, "logit_bias": 1, "visual.attention_pool.query": 2}.get(name, 0) if siglip else 0
        if tower not in ("visual", "text"):
            table[name] = Source((name,), unit_axes=unit_axes)
        elif rest.startswith("transformer.blocks."):
            _, _, index, inner = rest.split(".", 3)
            layer = f"{'vision' if tower == 'visual' else 'text'}_model.encoder.layers.{index}"
            table[name] = Source(tuple(f"{layer}.{key}" for key in _block_keys(inner)))
        else:
            names = VISUAL if tower == "visual" else TEXT | {"proj": "text_model.head" if siglip else "text_projection"}
            ours = max((n for n in names if rest == n or rest.startswith(n + ".")), key=len)
            table[name] = Source((names[ours] + rest[len(ours) :],), unit_axes=unit_axes)
    return table


def preprocess_of_folder(folder: str | Path, image_size: tuple[int, int]) -> dict[str, Any]:
    """Our preprocessing from ``preprocessor_config.json``; CLIP's own where there is none."""
    path = Path(folder) / "preprocessor_config.json"
    given = _read_json(path) if path.is_file() else {}
    kept: dict[str, Any] = {key: tuple(given[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in given}
    filters = {number: name for name, number in RESAMPLE.items()}
    if given.get("resample") in filters:
        kept["interpolation"] = filters[given["resample"]]
    squash = given.get("do_center_crop") is False or "height" in (given.get("size") or {})
    return {"size": image_size, "resize_mode": "squash" if squash else "shortest", **kept}


def read_huggingface_config(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's ``config.json``. Raises `MmbaseError` where it cannot be read."""
    return _read_json(Path(folder) / CONFIG_FILE)


def _block_keys(inner: str) -> list[str]:
    if inner.startswith("attn.qkv."):
        return [f"self_attn.{part}_proj.{inner.removeprefix('attn.qkv.')}" for part in "qkv"]
    module, _, kind = inner.rpartition(".")
    return [f"{BLOCK[module]}.{kind}"]


def _common(tower: dict[str, Any], default_width: int, default_heads: int) -> dict[str, Any]:
    """Fields both towers share; the defaults are those of Hugging Face's classes, which leave them out of the file."""
    width = tower.get("hidden_size", default_width)
    activation = tower.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise MmbaseError(f"hidden_act={activation!r} is not supported; only {', '.join(ACTIVATIONS)} are")
    return {
        "width": width,
        "layers": tower.get("num_hidden_layers", 12),
        "heads": tower.get("num_attention_heads", default_heads),
        "mlp_ratio": tower.get("intermediate_size", 4 * default_width) / width,
        "activation": ACTIVATIONS[activation],
        "norm_eps": tower.get("layer_norm_eps", 1e-5),
    }


def _clip_config(config: dict[str, Any]) -> CLIPConfig:
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    eos_id = text.get("eos_token_id", 49407)
    return CLIPConfig(
        embed_dim=config.get("projection_dim", 512),
        init_logit_scale=config.get("logit_scale_init_value", 2.6592),
        vision=VisionConfig(
            **_common(vision, 768, 12),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 32),
        ),
        text=TextConfig(
            **_common(text, 512, 8),
            context_length=text.get("max_position_embeddings", 77),
            vocab_size=text.get("vocab_size", CLIP_VOCABULARY),
            pool="eot" if eos_id == 2 else "eos",  # 2 means the highest id there, whatever the tokenizer
            eos_id=eos_id,
        ),
    )


def _siglip_config(config: dict[str, Any]) -> CLIPConfig:
    tower = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    vision, text = tower | (config.get("vision_config") or {}), tower | (config.get("text_config") or {})
    vision_fields = _common(vision, 768, 12)
    return CLIPConfig(
        embed_dim=vision_fields["width"],
        init_logit_bias=-10.0,
        vision=VisionConfig(
            **vision_fields,
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            patch_bias=True,
            class_token=False,
            norm_pre=False,
            pool="attention",
            projection=False,
        ),
        text=TextConfig(
            **_common(text, 768, 12),
            context_length=text.get("max_position_embeddings", 64),
            vocab_size=text.get("vocab_size", 32000),
            causal=False,
            pool="last",
            projection_bias=True,
        ),
    )


def _check_expressible(config: CLIPConfig) -> None:
    vision, text = config.vision, config.text
    needed = {
        "vision": {"stem": "patch", "patch_bias": False, "class_token": True, "norm_pre": True, "pool": "class",
                   "projection": True, "projection_bias": False, "layer_scale": None},
        "text": {"causal": True, "projection": True, "projection_bias": False, "layer_scale": None,
                 "mask_padding": False},
    }  # fmt: skip
    for name, tower in (("vision", vision), ("text", text)):
        for field, value in needed[name].items():
            if getattr(tower, field) != value:
                raise _no_equivalent(f"{name}.{field}", getattr(tower, field))
    if text.pool not in ("eot", "eos"):
        raise _no_equivalent("text.pool", text.pool)
    for field, pair in (("vision.image_size", vision.image_hw), ("vision.patch_size", vision.patch_hw)):
        if pair[0] != pair[1]:
            raise _no_equivalent(field, pair)
    if config.init_logit_bias is not None:
        raise _no_equivalent("init_logit_bias", config.init_logit_bias)


def _no_equivalent(field: str, value: object) -> MmbaseError:
    return MmbaseError(
        f"{field}={value!r} has no equivalent in transformers.CLIPModel; keep this model in mmbase's format"
    )


def _tower(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def _text_tokens(text: TextConfig) -> dict[str, Any]:
    """Special ids: pooling at the first end token, or at the highest id, which Hugging Face spells eos_token_id=2."""
    if text.pool == "eot" and text.vocab_size == CLIP_VOCABULARY:
        return {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    if text.pool == "eos" and text.eos_id == 2:
        raise MmbaseError("text.eos_id=2 cannot be written: transformers.CLIPModel takes it for the highest id")
    return {"bos_token_id": 0, "eos_token_id": 2 if text.pool == "eot" else text.eos_id, "pad_token_id": text.pad_id}


def _image_processor(preprocess: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash"):
        raise MmbaseError(f"preprocess.resize_mode={mode!r} has no equivalent in CLIPImageProcessor; use 'shortest'")
    sides = {"height": image_size[0], "width": image_size[1]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size[0]} if mode == "shortest" else sides,
        "resample": RESAMPLE.get(interpolation, 3),
        "do_center_crop": mode == "shortest",
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "do_convert_rgb": True,
    }


def _write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """``vocab.json`` and ``merges.txt`` from the vocabulary file that OpenCLIP ships."""
    packed = (openclip_package() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : CLIP_VOCABULARY - 256 * 2 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}  # fmt: skip
    _write_json(
        folder / "tokenizer_config.json",
        special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MmbaseError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise MmbaseError(f"{str(path)!r} holds no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
