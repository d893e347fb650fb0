"""Checkpoints of a run: written whole or not at all, restored bit for bit."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmbase.errors import MmbaseError
from mmbase.training.optim import Optimizers, WeightAverage

MODEL_FILE, AVERAGE_FILE, STATE_FILE = "model.safetensors", "average.safetensors", "state.pt"


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0


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
        _sync(temporary)
        temporary.replace(path)
    except Exception as error:  # safetensors raises its own kind for an OSError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise MmbaseError(
            f"cannot write {str(path)!r}: {_reason(error)}; free space or choose another output="
        ) from error


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizers,
    average: WeightAverage | None,
    progress: Progress,
    keep: int,
) -> Path:
    """Write ``folder/STEP`` (weights, averaged weights, optimiser, random state, progress) and drop the oldest.

    The folder appears under its name only when everything in it is on the disk.

    Raises:
        MmbaseError: it cannot be written; earlier checkpoints stay as they are.
    """
    final = folder / f"{progress.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        save_weights(model.state_dict(), temporary / MODEL_FILE)
        state: dict[str, Any] = {
            "optimizer": optimizer.state_dict(),
            "progress": progress._asdict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if average:
            save_weights(average.averaged, temporary / AVERAGE_FILE)
            state["average_updates"] = average.updates
        torch.save(state, temporary / STATE_FILE)
        _sync(temporary / STATE_FILE)
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise MmbaseError(
            f"cannot write the checkpoint {str(final)!r}: {_reason(error)}; free space, then run the same command "
            "again to resume"
        ) from error
    except MmbaseError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def remove_torn(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizers, average: WeightAverage | None) -> Progress:
    """Restore everything :func:`save_checkpoint` wrote.

    Raises:
        MmbaseError: a file is damaged or does not fit the configured model.
    """
    try:
        model.load_state_dict(load_file(path / MODEL_FILE))
        state = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        if average:
            saved = load_file(path / AVERAGE_FILE)
            for name, value in average.averaged.items():
                value.copy_(saved[name])
            average.updates = state["average_updates"]
    except Exception as error:  # the readers raise kinds of their own
        raise MmbaseError(
            f"the checkpoint {str(path)!r} cannot be read: {_reason(error)}; remove that folder to resume from the one "
            "before, or choose another output="
        ) from error
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    return Progress(**state["progress"])


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return getattr(error, "strerror", None) or text or type(error).__name__
