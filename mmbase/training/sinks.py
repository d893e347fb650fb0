"""Further places for the rows of metrics.jsonl: TensorBoard and Weights & Biases, imported only where asked for.

A place that fails while training goes on is given up with one warning: it never stops a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from mmbase.errors import MmbaseError
from mmbase.training.tracking_config import TrackingConfig, WandbConfig


class Sink(Protocol):
    """A place for rows."""

    name: str

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Take the numbers of one row of metrics.jsonl."""
        ...

    def rewind(self, step: int) -> None:
        """Rows after ``step`` do not hold any more."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class TensorBoard:
    """Scalars by step in a folder of event files.

    Args:
        folder: where; an earlier part of the run may lie there.
        step: the run goes on after this step: what is there beyond it is hidden.

    Raises:
        MmbaseError: the package tensorboard is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MmbaseError(
                f"tracking.tensorboard=true needs tensorboard ({error}): pip install 'mmbase[track]'"
            ) from error
        self.folder, self._writer_of = folder, SummaryWriter
        self._writer = self._open(step)

    def _open(self, step: int) -> Any:
        return self._writer_of(str(self.folder), purge_step=step + 1 if step else None)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Add a scalar for each number."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Start a file that hides what came after ``step``."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, drawn over ``samples``; the same folder continues the same run.

    Its own step only rises, so after a rewind the repeated rows follow the earlier ones.

    Raises:
        MmbaseError: the package wandb is not installed, or it refuses to start (no account, no network).
    """

    name = "Weights & Biases"

    def __init__(self, config: WandbConfig, folder: Path, values: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyrefly: ignore[missing-import]
        except ImportError as error:
            raise MmbaseError(f"tracking.wandb needs wandb ({error}): pip install 'mmbase[track]'") from error
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or folder.name,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                mode=config.mode,
                tags=config.tags or None,
                dir=str(folder),
                config=dict(values),
            )
        except Exception as error:
            raise MmbaseError(
                f"Weights & Biases does not start ({error}); run `wandb login`, or set tracking.wandb.mode=offline"
            ) from error
        self._run.define_metric("*", step_metric="samples")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Send one row."""
        self._run.log({**row, "step": step})

    def rewind(self, step: int) -> None:
        """Nothing: see the class."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Guarded:
    """A sink whose failures are said once and then let be."""

    def __init__(self, sink: Sink, console: Console) -> None:
        self.name, self._sink, self._console = sink.name, sink, console
        self._works = True

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """As the sink does."""
        self._try("write", step, row)

    def rewind(self, step: int) -> None:
        """As the sink does."""
        self._try("rewind", step)

    def close(self) -> None:
        """As the sink does."""
        self._try("close")

    def _try(self, name: str, *args: Any) -> None:
        if not self._works:
            return
        try:
            getattr(self._sink, name)(*args)
        except Exception as error:
            self._works = False
            self._console.print(
                f"warning: {self.name} failed ({type(error).__name__}: {error}) and is left out from here on; "
                "metrics.jsonl goes on",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )


def open_sinks(
    config: TrackingConfig, folder: Path, console: Console, *, step: int, values: Mapping[str, Any]
) -> list[Sink]:
    """The configured places; call it on rank 0 alone.

    Args:
        config: which.
        folder: of the run.
        console: takes warnings.
        step: after which the run goes on.
        values: the resolved configuration, for those that keep it.

    Raises:
        MmbaseError: a package that is not installed, or a service that does not start.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", step))
    if config.wandb:
        sinks.append(Wandb(config.wandb, folder, values))
    return [Guarded(sink, console) for sink in sinks]
