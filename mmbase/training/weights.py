"""Files of weights: written whole or not at all, and found in a checkpoint."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmbase.errors import MmbaseError
from mmbase.training.checkpoint_store import sync

MODEL_FILE, AVERAGE_FILE = "model.safetensors", "average.safetensors"


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors, through a temporary file beside ``path`` that replaces it at the end.

    Raises:
        MmbaseError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.detach().contiguous().cpu() for name, value in weights.items()}, temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner reads
        sync(temporary)
        temporary.replace(path)
    except Exception as error:  # safetensors raises its own kind for an OSError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise MmbaseError(
            f"cannot write {str(path)!r}: {reason_of(error)}; free space or choose another output="
        ) from error


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint is evaluated by: averaged ones where it has them."""
    average = checkpoint / AVERAGE_FILE
    return load_file(average if average.exists() else checkpoint / MODEL_FILE)


def reason_of(error: BaseException) -> str:
    """In a few words, those of the system where an error of it lies at the bottom."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text or type(error).__name__
