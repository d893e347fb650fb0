"""OpenCLIP's state dicts and folders, both ways.

Two layouts exist: ``CLIP``, where the text tower's tensors lie at the top, and ``CustomTextCLIP``, where they lie under
``text.``. SigLIP's image tower has timm's names. All of it is renaming, transposing and adding axes of size one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmbase.errors import MmbaseError
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.models.openclip_config import from_openclip_config, to_openclip_config
from mmbase.models.state_dicts import Source, StateDict, load_into, parameter_names, to_theirs

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
METADATA = {"input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"}

BLOCK = {
    "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "branch1.scale": "ls_1", "branch2.scale": "ls_2",
}  # fmt: skip
VISUAL = {"stem": "conv1", "norm_pre": "ln_pre", "norm": "ln_post"}
TIMM = {"stem": "patch_embed.proj", "positional_embedding": "pos_embed", "attention_pool.query": "attn_pool.latent",
        "attention_pool": "attn_pool"}  # fmt: skip
TEXT = {"norm": "ln_final", "proj": "text_projection"}


def from_openclip(config: dict[str, Any] | CLIPConfig, state: StateDict, origin: str = "the state dict") -> CLIP:
    """A model of ours with an OpenCLIP model's weights, of either layout; fp32 tensors are taken over, not copied.

    Args:
        config: OpenCLIP's ``model_cfg``, or ours.
        state: the state dict of OpenCLIP's model. Position embeddings of another size are resampled.
        origin: what the weights are called in messages.

    Raises:
        NotCovered: a model our towers cannot express.
        MmbaseError: a tensor that is missing, left over, or of the wrong shape.
    """
    if not isinstance(config, CLIPConfig):
        config = from_openclip_config(config)
    state = {key: tensor for key, tensor in state.items() if key not in METADATA}
    custom_text = any(key.startswith("text.") for key in state)
    if config.init_logit_bias is not None and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = state["logit_scale"].new_zeros(())  # a softmax model, to be trained on as a sigmoid model
    return load_into(config, openclip_table(config, custom_text=custom_text), state, origin)


def to_openclip(model: CLIP, tokenizer: dict[str, Any] | None = None) -> tuple[dict[str, Any], StateDict]:
    """OpenCLIP's ``model_cfg`` and state dict of our model.

    Raises:
        MmbaseError: a field of the config that OpenCLIP has no equivalent of.
    """
    return to_openclip_config(model.config, tokenizer), to_openclip_state(model)


def to_openclip_state(model: CLIP) -> StateDict:
    """Our weights under OpenCLIP's names: the ``CLIP`` layout; for SigLIP ``CustomTextCLIP``'s, with timm's names."""
    return to_theirs(model, openclip_table(model.config, custom_text=model.config.vision.pool == "attention"))


def save_openclip(
    model: CLIP, folder: str | Path, preprocess: dict[str, Any], tokenizer: dict[str, Any] | None = None
) -> None:
    """Write a folder that ``open_clip.create_model("local-dir:...")`` and the hub understand.

    Args:
        model: ours; dropout and stochastic depth are not written.
        folder: made if it is missing.
        preprocess: size, mean, std, interpolation, resize_mode.
        tokenizer: its description. OpenCLIP looks for a Hugging Face tokenizer's files in the same folder.

    Raises:
        MmbaseError: a field of the config that OpenCLIP has no equivalent of; nothing is written then.
    """
    from safetensors.torch import save_file

    model_cfg, state = to_openclip(model, tokenizer)
    described = {"model_cfg": model_cfg, "preprocess_cfg": {"mode": "RGB", **preprocess}}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_openclip_config(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``model_cfg`` and ``preprocess_cfg`` of an ``open_clip_config.json``.

    Raises:
        MmbaseError: no JSON, or no model in it.
    """
    try:
        described = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MmbaseError(f"cannot read {str(path)!r}: {error}") from error
    model_cfg = described.get("model_cfg") if isinstance(described, dict) else None
    if not isinstance(model_cfg, dict):
        raise MmbaseError(f"{str(path)!r} has no 'model_cfg'; is it OpenCLIP's?")
    return model_cfg, described.get("preprocess_cfg") or {}


def openclip_table(config: CLIPConfig, *, custom_text: bool) -> dict[str, Source]:
    """For every tensor of ours, where it is found in OpenCLIP's state dict."""
    timm = config.vision.pool == "attention"
    table = {}
    for name in parameter_names(config):
        tower, _, rest = name.partition(".")
        if tower == "visual" and timm:
            table[name] = _timm_source(rest)
        elif tower == "visual":
            transpose = rest == "proj.weight"
            table[name] = Source(("visual.proj" if transpose else f"visual.{_rename(rest, VISUAL)}",), transpose)
        elif tower == "text":
            transpose = rest == "proj.weight" and not config.text.projection_bias
            theirs = "text_projection" if transpose else _rename(rest, TEXT)
            table[name] = Source((f"text.{theirs}" if custom_text else theirs,), transpose)
        else:
            table[name] = Source((name,))
    return table


def _timm_source(rest: str) -> Source:
    if rest.startswith("transformer.blocks."):
        return Source((f"visual.trunk.{rest.removeprefix('transformer.')}",))
    unit_axes = {"positional_embedding": 1, "attention_pool.query": 2}.get(rest, 0)
    return Source((f"visual.trunk.{_replace_prefix(rest, TIMM)}",), unit_axes=unit_axes)


def _rename(rest: str, names: dict[str, str]) -> str:
    if not rest.startswith("transformer.blocks."):
        return _replace_prefix(rest, names)
    _, _, index, inner = rest.split(".", 3)
    return f"transformer.resblocks.{index}.{_replace_prefix(inner, BLOCK)}"


def _replace_prefix(name: str, names: dict[str, str]) -> str:
    """Replace the first of ``names`` that ``name`` is, or begins with followed by a dot."""
    for ours, theirs in names.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return name
