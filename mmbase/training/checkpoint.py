"""Checkpoints of a run: written beside training, whole or not at all, restored bit for bit on any number of ranks."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh

from mmbase.errors import MmbaseError
from mmbase.training.agreement import Agreement
from mmbase.training.checkpoint_config import CheckpointConfig
from mmbase.training.checkpoint_state import (
    StateTaker,
    Taken,
    TrainState,
    random_state,
    restore_random_state,
    undescribe_shards,
)
from mmbase.training.checkpoint_store import Entry, Store, Torn, name_of, read_entry, seal_files, verify
from mmbase.training.checkpoint_upload import Remote, Uploader
from mmbase.training.distributed import Ranks
from mmbase.training.weights import AVERAGE_FILE, MODEL_FILE, reason_of

T = TypeVar("T")

STATE_FILE, SHARDS = "state.pt", "shards"


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    samples: int = 0
    """consumed by all ranks together: the position in the data"""
    seconds: float = 0.0


class Checkpointer:
    """Writes and restores the checkpoints of one run. Methods are called by all ranks, but for those that say not.

    A save copies the state to the processor's memory and returns; a thread of rank 0 writes the copy (of all ranks,
    where tensors are sharded) while training goes on. One checkpoint is written at a time: a save waits for the one
    before it.

    Args:
        folder: where they lie; with several machines on a file system that all of them see.
        ranks: this process among the others.
        policy: when, how many, where to, and what happens when one cannot be written.
        report: gets lines for the console, on rank 0.

    Raises:
        MmbaseError: ``policy.upload`` cannot be used.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, policy: CheckpointConfig, report: Callable[[str], None] = print
    ) -> None:
        self.folder, self.ranks, self.policy = folder, ranks, policy
        self.first = ranks.rank == 0
        self.store = Store(folder)
        self._tell = report if self.first else _silent
        self._agreement = Agreement(ranks)
        self._taker = StateTaker(self.first)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[str | None] | None = None
        self._uploader: Uploader | None = None
        if policy.upload and self.first:
            self._uploader = Uploader(Remote(policy.upload, policy.upload_options), policy, self._tell)
        self._saved_samples = 0
        self._saved_time = time.monotonic()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------------- when

    def is_due(self, samples: int) -> bool:
        """Whether ``every_samples`` asks for a checkpoint after so many samples. Sends nothing."""
        every = self.policy.every_samples
        return every is not None and samples // every > self._saved_samples // every

    def time_is_up(self) -> bool:
        """Whether ``every_seconds`` have passed by this rank's clock. Sends nothing: see :meth:`Agreement.any`."""
        every = self.policy.every_seconds
        return self.first and every is not None and time.monotonic() - self._saved_time >= every

    # ---------------------------------------------------------------------------------------------------------- save

    def save(self, state: TrainState, progress: Progress, score: float | None = None) -> None:
        """Take the state as it is now, and have it written.

        Args:
            state: of the run.
            progress: how far it is.
            score: of an evaluation of these very weights, higher is better.

        Raises:
            MmbaseError: the save before this one failed and ``policy.on_error`` is ``stop``.
        """
        self._settle(strict=self.policy.on_error == "stop")
        taken = self._taker.take(state, self._agreement.gather(random_state(self.ranks.device)))
        entry = Entry(progress.step, progress.samples, progress.seconds, self.ranks.world_size, score, {})
        self._saved_samples, self._saved_time = progress.samples, time.monotonic()
        if taken.shards or self.first:
            self._job = self._thread.submit(partial(self._write, taken, entry))
        if not self.policy.background:
            self._settle(strict=self.policy.on_error == "stop")

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk, and its copy where ``policy.upload`` says.

        Raises:
            MmbaseError: it could not be written; whatever ``policy.on_error`` says, for nothing follows it.
        """
        self._settle(strict=True)
        if self._uploader:
            self._uploader.wait()

    def close(self) -> None:
        """End the threads; what they are writing they finish. Sends nothing and raises nothing."""
        self._thread.shutdown(wait=True)
        if self._uploader:
            self._uploader.close()

    def _settle(self, strict: bool) -> None:
        """Wait for the save under way; all ranks learn whether it failed."""
        job, self._job = self._job, None
        reason = self._agreement.first_says(job.result() if job else None)
        if reason and strict:
            raise MmbaseError(f"{reason}; free space, then run the same command again to resume")

    def _write(self, taken: Taken, entry: Entry) -> str | None:
        """Runs in the thread, on the ranks that have something to write; why it failed, or None."""
        began, final = time.monotonic(), self.folder / name_of(entry.step)
        several = bool(taken.shards) and self._agreement.group is not None
        temporary: Path | None = None
        reason: str | None = None
        try:
            if self.first:
                self._has_room(taken)
                temporary = self.store.begin(entry.step)
                _write_parts(taken, temporary)
        except Exception as error:  # writers raise kinds of their own
            reason = reason_of(error)
        if several:
            temporary, reason = self._agreement.first_says((temporary, reason))
        if taken.shards and temporary and not reason:
            reason = self._write_shards(taken, temporary)
        if not self.first:
            return reason
        if not reason and temporary:
            try:
                names = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
                entry = entry._replace(files=seal_files(temporary, names))
                self.store.commit(temporary, entry)
            except OSError as error:
                reason = reason_of(error)
        if reason:
            if temporary:
                self.store.abandon(temporary)
            reason = f"cannot write the checkpoint {str(final)!r}: {reason}"
            self._tell(f"{reason}; earlier ones are untouched")
            return reason
        self._after(final, entry, time.monotonic() - began)
        return None

    def _write_shards(self, taken: Taken, temporary: Path) -> str | None:
        """Every rank writes its part; all learn why one of them could not."""
        try:
            writer = dcp.FileSystemWriter(temporary / SHARDS, sync_files=True)
            group = self._agreement.group
            dcp.save(dict(taken.shards), storage_writer=writer, process_group=group, no_dist=group is None)
        except Exception as error:  # CheckpointException of whichever rank it was
            return reason_of(error)
        return None

    def _has_room(self, taken: Taken) -> None:
        """Refuse before the disk is filled to the brim, on which others, such as metrics.jsonl, write too."""
        tensors = [tensor for part in taken.weights.values() for tensor in part.values()] + list(taken.shards.values())
        needed = sum(tensor.nbytes for tensor in tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                28, f"No space left on device ({needed / 1e6:,.1f} MB and more to write, {free / 1e6:,.1f} free)"
            )

    def _after(self, final: Path, entry: Entry, seconds: float) -> None:
        """A new checkpoint stands: copy it, drop what the policy does not keep. Failing here loses nothing."""
        size = sum(size for size, _ in entry.files.values())
        self._tell(f"checkpoint {final.name} written: {size / 1e6:,.2f} MB in {seconds:.1f} s")
        if self._uploader:
            self._uploader.submit(final)
        try:
            self.store.prune(self.policy, self._uploader.protected if self._uploader else ())
        except OSError as error:
            self._tell(f"old checkpoints cannot be removed: {reason_of(error)}")

    # ------------------------------------------------------------------------------------------------------- restore

    def restore(
        self, state: TrainState, *, before: int | None = None, mesh: DeviceMesh | None = None
    ) -> Progress | None:
        """Put back the newest checkpoint that is whole; how far the run was, or None where there is none yet.

        One that is torn or damaged is named with the reason and set aside, and the one before it is taken. On another
        number of ranks than wrote it everything comes back but the generators, which start from new seeds.

        Args:
            state: of the run, built as for a new one.
            before: only checkpoints of at most so many samples; newer ones are removed, for a run that goes back.
            mesh: over which the run's parameters are sharded; None: they are not.

        Raises:
            MmbaseError: there are checkpoints but none is whole, or the run's parts do not take what it holds.
        """
        self._settle(strict=False)
        found: Entry | MmbaseError | None = None
        if self.first:
            try:
                found = self._newest_whole(before)
            except Exception as error:  # file systems of copies raise kinds of their own; the others must hear of it
                mine = (
                    f"cannot look for checkpoints in {str(self.folder)!r}: {reason_of(error)}; mend that and run again"
                )
                found = error if isinstance(error, MmbaseError) else MmbaseError(mine)
        found = self._agreement.first_says(found)
        if isinstance(found, MmbaseError):
            raise found
        if found is None:
            return None
        path = self.store.path(found)
        parts = self._alike(lambda: self._read(path, mesh), f"the checkpoint {str(path)!r} is whole but cannot be read")
        mistake = f"the checkpoint {str(path)!r} is whole but does not fit this run"
        self._alike(lambda: self._put_back(parts, state), mistake)
        self._saved_samples, self._saved_time = found.samples, time.monotonic()
        self._tell(
            f"resuming at step {found.step} ({found.samples:,} samples) from {path}"
            + (f", written by {found.world_size} ranks" if found.world_size != self.ranks.world_size else "")
        )
        return Progress(found.step, found.samples, found.seconds)

    def go_back(self, state: TrainState, samples: int, *, mesh: DeviceMesh | None = None) -> Progress:
        """Put back the newest checkpoint of at most ``samples`` samples; newer ones are removed.

        Raises:
            MmbaseError: there is none at all, and see :meth:`restore`.
        """
        progress = self.restore(state, before=samples, mesh=mesh)
        if progress is None:
            raise MmbaseError(f"there is no checkpoint in {str(self.folder)!r} to go back to; start the run anew")
        return progress

    def best(self) -> Path | None:
        """The checkpoint with the highest score, or None where none has one. Sends nothing."""
        scored = [entry for entry in self.store.entries() if entry.score is not None]
        return self.store.path(max(scored, key=lambda entry: entry.score or 0.0)) if scored else None

    def _newest_whole(self, before: int | None) -> Entry | None:
        """Looks on the disk first, then where copies are."""
        self.store.clean()
        found: Entry | None = None
        newer, damaged = [], []
        for path in reversed(self.store.paths()):
            try:
                if before is not None and read_entry(path).samples > before:
                    newer.insert(0, path)
                    continue
                found = verify(path)
                break
            except Torn as error:
                damaged.append(self._set_aside(path, error))
        found = self._newer_copy(found, before)
        while found is None and newer:  # none is old enough: the least new one, rather than the beginning
            path = newer.pop(0)
            try:
                found = verify(path)
                self._tell(f"no checkpoint is from before sample {before:,}; taking the oldest, {path.name}")
            except Torn as error:
                damaged.append(self._set_aside(path, error))
        if found is None and damaged:
            raise MmbaseError(
                f"none of the checkpoints in {str(self.folder)!r} is whole ({', '.join(reversed(damaged))} damaged); "
                "restore one from elsewhere, or delete the folder to train anew"
            )
        for path in newer:
            self.store.remove(path)
        return found

    def _set_aside(self, path: Path, error: Torn) -> str:
        aside = self.store.set_aside(path)
        self._tell(f"checkpoint {path.name} is damaged: {error}; set aside as {aside.name}, taking the one before it")
        return path.name

    def _newer_copy(self, here: Entry | None, before: int | None) -> Entry | None:
        """``here``, or a newer one fetched from where copies are: a new machine's disk is empty."""
        if not self._uploader:
            return here
        self._uploader.wait()
        remote = self._uploader.remote
        for entry in reversed(remote.entries()):
            if here is not None and entry.samples <= here.samples:
                break
            if before is not None and entry.samples > before:
                remote.remove(name_of(entry.step))
                continue
            try:
                return verify(remote.fetch(entry, self.store))
            except (Torn, OSError) as error:
                self._tell(
                    f"the copy {name_of(entry.step)} at {remote.url} is damaged: {error}; taking the one before it"
                )
        return here

    def _read(self, path: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
        """All that a verified checkpoint holds, weights mapped into memory; nothing of the run is touched."""
        if not path.is_dir():
            raise FileNotFoundError(
                f"rank {self.ranks.rank} does not see it; put output= on a file system that all machines share"
            )
        parts = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
        shards: dict[str, torch.Tensor] = {}
        parts["optimizer"] = undescribe_shards(parts["optimizer"], mesh, shards)
        if shards:
            with warnings.catch_warnings():  # that one process is alone is no news
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(dict(shards), storage_reader=dcp.FileSystemReader(path / SHARDS), no_dist=True)
        parts["model"] = load_file(path / MODEL_FILE)
        if "average" in parts:
            parts["average"]["averaged"] = load_file(path / AVERAGE_FILE)
        return parts

    def _put_back(self, parts: dict[str, Any], state: TrainState) -> None:
        state.model.load_state_dict(parts["model"])
        state.optimizer.load_state_dict(parts["optimizer"])
        if state.average:
            if "average" not in parts:
                raise ValueError("it holds no average of the weights")
            state.average.load_state_dict(parts["average"])
        if state.scaler and "scaler" in parts:
            state.scaler.load_state_dict(parts["scaler"])
        for name, part in state.others.items():
            if name in parts["others"]:
                part.load_state_dict(parts["others"][name])
        restore_random_state(parts["rng"], self.ranks.rank, self.ranks.world_size, self.ranks.device)

    def _alike(self, act: Callable[[], T], mistake: str) -> T:
        """Do something on all ranks; if one of them cannot, all raise."""
        result, reason = None, None
        try:
            result = act()
        except Exception as error:  # readers and parts raise kinds of their own
            reason = reason_of(error)
        if reason := next(filter(None, self._agreement.gather(reason)), None):
            raise MmbaseError(
                f"{mistake}: {reason}; restore the configuration it was made with, or choose another output="
            )
        return cast(T, result)


def _write_parts(taken: Taken, folder: Path) -> None:
    with (folder / STATE_FILE).open("wb") as file:  # Python's own file says why it cannot be written; torch's does not
        torch.save(taken.rest, file)
    for name, tensors in taken.weights.items():
        save_file(tensors, folder / f"{name}.safetensors")
        # safetensors makes files that only their owner reads.
        shutil.copymode(folder / STATE_FILE, folder / f"{name}.safetensors")


def _silent(line: str) -> None:
    """Ranks other than the first have no console."""
