"""State dicts: reading weight files safely, and moving tensors between our names and those of other libraries.

Shapes: N tokens, D width.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmbase.errors import MmbaseError, nearest
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.models.positions import resize_grid, resize_sequence

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours is found in another library's state dict."""

    keys: tuple[str, ...]
    """Their names; several are concatenated along the first axis (separate query, key and value projections)."""
    transpose: bool = False
    """They keep [in, out] where we keep [out, in]."""
    unit_axes: int = 0
    """Axes of size one that they put in front."""


def read_state_dict(path: str | Path) -> StateDict:
    """Tensors of a ``.safetensors`` file, or of a pickle that needs nothing but tensors to be read.

    Training checkpoints (``{"state_dict": ...}``) and the prefixes that wrappers leave (``module.``, ``_orig_mod.``)
    are taken off.

    Raises:
        MmbaseError: no such file, damaged, a TorchScript archive, a pickle that would run code, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise MmbaseError(f"no weights file {str(path)!r}; check the path")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    entries = loaded.items() if isinstance(loaded, dict) else ()
    state = {key: value for key, value in entries if isinstance(value, Tensor)}
    if not state:
        raise MmbaseError(f"{str(path)!r} holds no state dict (names to tensors); save model.state_dict() instead")
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_into(config: CLIPConfig, table: dict[str, Source], state: StateDict, origin: str) -> CLIP:
    """A model with another library's weights, in fp32; fp32 tensors are taken over, not copied.

    Position embeddings of another image size or context length are resampled as OpenCLIP does.

    Args:
        config: the model to build.
        table: for every tensor of ours where it is found.
        state: their tensors.
        origin: what the weights are called in messages.

    Raises:
        MmbaseError: a tensor that is missing, left over, or of the wrong shape.
    """
    with torch.device("meta"):
        model = CLIP(config)
    left = dict(state)
    ours: StateDict = {}
    for name, wanted in model.state_dict().items():
        tensor = _take(left, table[name], wanted.shape, origin)
        if name.endswith("positional_embedding") and tensor.shape != wanted.shape:
            tensor = _resize_positions(name, tensor.reshape(tensor.shape[-2:]), config, origin)
        if tensor.shape != wanted.shape:
            raise MmbaseError(
                f"{origin}: {table[name].keys[0]!r} has shape {list(tensor.shape)} but the model needs "
                f"{list(wanted.shape)}; is it another model's?"
            )
        ours[name] = tensor
    if left:
        raise MmbaseError(f"{origin} has {len(left)} tensors this model has no place for, such as {next(iter(left))!r}")
    model.load_state_dict(ours, assign=True)
    return model


def to_theirs(model: CLIP, table: dict[str, Source]) -> StateDict:
    """Our tensors under another library's names, contiguous."""
    theirs: StateDict = {}
    for name, tensor in model.state_dict().items():
        source = table[name]
        tensor = tensor.detach()
        tensor = tensor.T if source.transpose else tensor[(None,) * source.unit_axes]
        for key, part in zip(source.keys, tensor.chunk(len(source.keys)) if len(source.keys) > 1 else [tensor]):
            theirs[key] = part.contiguous()
    return theirs


def parameter_names(config: CLIPConfig) -> list[str]:
    """Names of all tensors of our model."""
    with torch.device("meta"):
        return list(CLIP(config).state_dict())


def _take(left: StateDict, source: Source, shape: torch.Size, origin: str) -> Tensor:
    """Take a tensor of ours out of their state dict, in fp32; axes of size one are set as in ``shape``."""
    missing = [key for key in source.keys if key not in left]
    if missing:
        raise MmbaseError(f"{origin} lacks {missing[0]!r}{nearest(missing[0], left)}; is it another model's?")
    parts = [left.pop(key).float() for key in source.keys]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if source.transpose:
        return tensor.T.contiguous()
    same_but_units = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    return tensor.reshape(shape) if same_but_units else tensor


def _resize_positions(name: str, table_ND: Tensor, config: CLIPConfig, origin: str) -> Tensor:
    if name.startswith("text"):
        return resize_sequence(table_ND, config.text.context_length)
    patches = table_ND.shape[0] - int(config.vision.class_token)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise MmbaseError(
            f"{origin}: cannot resample position embeddings of {patches} patches, which are no square grid; "
            f"set the image size they were trained with"
        )
    return resize_grid(table_ND, (side, side), config.vision.grid_hw)


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MmbaseError(f"cannot read {str(path)!r}: {error}; the file is damaged or no safetensors file") from error


def _read_pickle(path: Path) -> object:
    if _is_torchscript(path):
        raise MmbaseError(
            f"{str(path)!r} is a TorchScript archive, which may run code; save its state dict with torch.save("
            "torch.jit.load(path).state_dict(), ...) where you trust it"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MmbaseError(
            f"{str(path)!r} is no pickle of plain tensors, and mmbase opens no other; save model.state_dict() with "
            "torch.save or as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MmbaseError(
            f"cannot read {str(path)!r}: {reason}; the file is damaged or no PyTorch checkpoint"
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
