"""Watches loss and gradient norm: what is not finite or spikes does no harm, is named by its samples, and is got over.

The device judges each step by itself, against limits that the host worked out from earlier steps, and leaves a bad
update out: no host waits for it. The host reads the verdicts some steps later and acts on them. All ranks judge by the
same numbers, averaged over the ranks, so that all decide alike.

Source of going back and past the data: Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311), section 5.1.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.training.agreement import Agreement
from mmbase.training.distributed import Ranks
from mmbase.training.guard_config import GuardConfig
from mmbase.training.spikes import RunningLimit

_SHOWN = 5
"""Keys in a line for the console; the file has them all."""


class Skipped(NamedTuple):
    """Updates that were left out, and why."""

    steps: list[int]
    reason: str
    keys: list[str]
    """of the samples, of all ranks; the suspects alone where there are any"""


class RollBack(NamedTuple):
    """Go back to a checkpoint of at most ``to_samples`` and step over ``window``."""

    to_samples: int
    window: tuple[int, int]
    """positions in the data, the last exclusive"""
    reason: str
    keys: list[str]


Verdict = Skipped | RollBack


class _Numbers(NamedTuple):
    """By which a step was judged."""

    loss: float
    norm: float
    loss_limit: float
    norm_limit: float
    bad: float


@dataclass
class _Step:
    """What is known of a step."""

    step: int
    first: int
    """position of its first sample"""
    last: int
    """position after its last sample"""
    values: Tensor
    """float32 [5] on the host, complete once ``copied``: loss, norm, their limits, 1 where the update was left out"""
    copied: torch.cuda.Event | None
    keys: Sequence[str] = ()
    suspects: Tensor | None = None
    """bool [B], on the device"""


@dataclass
class _Record:
    """Windows of data that are never trained on again, and bad steps in a row."""

    windows: list[tuple[int, int]] = field(default_factory=list)
    in_a_row: int = 0


class Guard:
    """Judges every step; called by all ranks alike.

    A loop uses it so::

        if past := guard.steps_over(samples, samples + batch_size): ...   # go on with the next batch
        ...backward...
        norm = clip()
        optimizers.skip_where(guard.judge(loss, norm))
        optimizers.step()
        verdict = guard.watch(step, samples, samples + batch_size, keys)

    Args:
        config: what to do.
        ranks: this process among the others.
        record: a file of JSON lines that tells every event; windows to step over are read from it, so that a run
            killed between going back and its next checkpoint still knows them.
        report: gets lines for the console, on rank 0.
        overflow_is_usual: gradients overflow now and then by design (float16 with a scaler, which leaves such updates
            out itself): they are an event only after ``patience`` in a row.
    """

    def __init__(
        self,
        config: GuardConfig,
        ranks: Ranks,
        record: Path,
        report: Callable[[str], None] = print,
        *,
        overflow_is_usual: bool = False,
    ) -> None:
        self.config, self.ranks, self.record = config, ranks, record
        self.overflow_is_usual = overflow_is_usual
        self._report = report
        self._agreement = Agreement(ranks)
        score = config.spike_score or math.inf
        self._loss = RunningLimit(score, config.window, config.warmup, logarithmic=False, floor=0.01)
        self._norm = RunningLimit(score, config.window, config.warmup, logarithmic=True, floor=0.05)
        self._judged: Tensor | None = None
        self._pending: deque[_Step] = deque()
        self._seen: deque[_Step] = deque(maxlen=config.before)
        self._known = _Record()
        self._known.windows = self._agreement.first_says(self._read_record() if ranks.rank == 0 else None)

    # --------------------------------------------------------------------------------------------- before the update

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor | None:
        """Whether this step's update is to be left out, decided on the device; nobody waits.

        Args:
            loss: scalar, of this rank or of all.
            norm: scalar, of all gradients before clipping.

        Returns:
            Scalar float32 on the device: 1 leave it out, 0 go ahead; what fused optimisers of torch take as
            ``found_inf``. None with policy ``off``.
        """
        if self.config.policy == "off":
            return None
        values = torch.stack([loss.detach().float().reshape(()), norm.detach().float().reshape(())])
        if self.ranks.world_size > 1:
            # After this the ranks hold the same bits, whatever rounding made of their losses.
            dist.all_reduce(values)
            values /= self.ranks.world_size
        limits = torch.tensor([self._loss.limit, self._norm.limit], dtype=torch.float32)
        if values.is_cuda:
            limits = limits.pin_memory()
        limits = limits.to(values.device, non_blocking=True)
        # A value that is not a number is not below its limit either.
        good = torch.isfinite(values).all() & (values <= limits).all()
        bad = 1.0 - good.float()
        self._judged = torch.cat([values, limits, bad.reshape(1)])
        return bad

    def steps_over(self, first: int, last: int) -> bool:
        """Whether a batch of positions ``first`` to ``last`` (exclusive) touches a window that is stepped over."""
        return any(first < end and begin < last for begin, end in self._known.windows)

    # ---------------------------------------------------------------------------------------------- after the update

    def watch(
        self, step: int, first: int, last: int, keys: Sequence[str] = (), suspects: Tensor | None = None
    ) -> Verdict | None:
        """Note the step just judged, and read the verdict on the one ``lag`` steps before it.

        Args:
            step: its number.
            first: position of the batch's first sample, of all ranks together.
            last: position after its last.
            keys: of this rank's samples.
            suspects: bool ``[B]`` on the device, this rank's samples that look wrong by themselves: see
                :func:`suspicious`.

        Raises:
            MmbaseError: a bad step and policy ``stop``; or more of them than the policy puts up with.
        """
        if self._judged is None:
            return None
        host, copied = self._judged, None
        if host.is_cuda:
            host = torch.empty_like(self._judged, device="cpu", pin_memory=True)
            host.copy_(self._judged, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Step(step, first, last, host, copied, keys, suspects))
        self._judged = None
        if len(self._pending) <= self.config.lag:
            return None
        return self._read(self._pending.popleft())

    def settle(self, *, end: bool = False) -> Verdict | None:
        """Look at the steps not yet read, so that no checkpoint holds a step nobody looked at.

        A step that was left out did no harm, so that with policy ``skip`` this waits until the ``end`` of the run, when
        all are read; limits move with :meth:`watch` alone, and no decision depends on when somebody settles.

        Raises:
            MmbaseError: see :meth:`watch`.
        """
        if end:
            verdicts = [self._read(self._pending.popleft()) for _ in range(len(self._pending))]
            return next((verdict for verdict in verdicts if verdict), None)
        if self.config.policy == "skip":
            return None
        for place, pending in enumerate(self._pending):
            found = _on_host(pending)
            if found.bad and not self._is_usual(found):
                for _ in range(place):
                    self._learn(self._pending.popleft())
                return self._read(self._pending.popleft())
        return None

    def new_level(self) -> None:
        """Forget what is usual: the loop changes batch size, picture size or whatever else moves the loss."""
        self._loss.forget()
        self._norm.forget()

    # ------------------------------------------------------------------------------------------------------- verdicts

    def _read(self, step: _Step) -> Verdict | None:
        found = _on_host(step)
        if not found.bad:
            self._known.in_a_row = 0
            self._learn(step)
            return None
        self._known.in_a_row += 1
        many = self._known.in_a_row >= self.config.patience
        if self._is_usual(found) and not many:
            return None
        finite, reason = math.isfinite(found.loss) and math.isfinite(found.norm), _explain(found)
        if self.config.policy == "rollback":
            return self._roll_back(step, reason, finite)
        keys, suspects = self._keys([step])
        self._write(step, [step.first, step.last], "skip", reason, keys, suspects)
        where = f"step {step.step}: {reason}"
        if self.config.policy == "stop":
            raise MmbaseError(f"{where}; {_shown(keys, suspects)}; see {str(self.record)!r}, or set guard.policy=skip")
        if many and not finite:
            raise MmbaseError(
                f"{where}, as in the {self._known.in_a_row - 1} steps before it; lower training.learning_rate or set "
                "training.precision=fp32"
            )
        self._tell(f"{where}; update left out; {_shown(keys, suspects)}")
        if many:
            self._tell(f"{self._known.in_a_row} spikes in a row: taken for the new level")
            self.new_level()
            self._known.in_a_row = 0
        return Skipped([step.step], reason, suspects or keys)

    def _roll_back(self, step: _Step, reason: str, finite: bool) -> RollBack:
        """Going back undoes every later step too, so what is pending is dropped."""
        steps, (first, last) = [step], (step.first, step.last)
        if finite:  # a spike may come of the step before it, and what made it may go on
            size = last - first
            first, last = max(0, first - self.config.before * size), last + self.config.after * size
            steps = [s for s in (*self._seen, step, *self._pending) if first <= s.first < last]
        keys, suspects = self._keys(steps)
        self._known.windows.append((first, last))
        self._known.in_a_row = 0
        self._pending.clear()
        self._seen.clear()
        self.new_level()
        self._write(step, [first, last], "rollback", reason, keys, suspects)
        if len(self._known.windows) > self.config.max_rollbacks:
            raise MmbaseError(
                f"step {step.step}: {reason}, the {len(self._known.windows)}th window of data that would be stepped "
                f"over (guard.max_rollbacks={self.config.max_rollbacks}); lower training.learning_rate"
            )
        self._tell(
            f"step {step.step}: {reason}; going back to before sample {first:,} and past sample {last:,}; "
            + _shown(keys, suspects)
        )
        return RollBack(first, (first, last), reason, suspects or keys)

    def _is_usual(self, found: _Numbers) -> bool:
        """Whether a bad step is none to speak of: gradients overflowed under a scaler, the loss did not."""
        return self.overflow_is_usual and math.isfinite(found.loss) and not math.isfinite(found.norm)

    def _learn(self, step: _Step) -> None:
        found = _on_host(step)
        self._loss.add(found.loss)
        self._norm.add(found.norm)
        self._seen.append(step)

    # --------------------------------------------------------------------------------------------- samples, and telling

    def _keys(self, steps: list[_Step]) -> tuple[list[str], list[str]]:
        """Keys of the steps' samples of all ranks, and of those among them that look wrong by themselves."""
        keys = [key for step in steps for key in step.keys]
        suspects = [
            key
            for step in steps
            if step.suspects is not None
            for key, suspect in zip(step.keys, step.suspects.tolist(), strict=True)
            if suspect
        ]
        told = self._agreement.gather((keys, suspects))
        return [key for mine, _ in told for key in mine], [key for _, mine in told for key in mine]

    def _write(
        self, step: _Step, samples: list[int], action: str, reason: str, keys: list[str], suspects: list[str]
    ) -> None:
        if self.ranks.rank:
            return
        row = {"step": step.step, "samples": samples, "action": action, "reason": reason}
        try:
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"suspects": suspects, "keys": keys}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._tell(f"cannot write {str(self.record)!r}: {error.strerror}")

    def _read_record(self) -> list[tuple[int, int]]:
        if not self.record.exists():
            return []
        windows = []
        for line in self.record.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["action"] == "rollback":
                    windows.append((int(row["samples"][0]), int(row["samples"][1])))
            except (ValueError, KeyError, TypeError, IndexError):
                continue  # a line torn by a kill
        return windows

    def _tell(self, line: str) -> None:
        if self.ranks.rank == 0:
            self._report(line)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is usual, the steps not yet read, the windows stepped over: a resumed run decides as this one would."""
        pending = [[step.step, step.first, step.last, *_on_host(step)] for step in self._pending]
        return {
            "loss": self._loss.state_dict(),
            "norm": self._norm.state_dict(),
            "pending": pending,
            "windows": [list(window) for window in self._known.windows],
            "in_a_row": self._known.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; windows that this guard knows beside them stay."""
        self._loss.load_state_dict(state["loss"])
        self._norm.load_state_dict(state["norm"])
        self._seen.clear()
        self._judged = None
        self._pending = deque(
            _Step(int(step), int(first), int(last), torch.tensor(values), None)
            for step, first, last, *values in state["pending"]
        )
        known = [(int(first), int(last)) for first, last in state["windows"]]
        self._known.windows = list(dict.fromkeys([*known, *self._known.windows]))
        self._known.in_a_row = int(state["in_a_row"])


def suspicious(output: dict[str, Tensor]) -> Tensor:
    """bool ``[B]``: samples whose features, ``image_features`` or ``text_features`` ``[B, D]``, are not finite."""
    image, text = output["image_features"].detach(), output["text_features"].detach()
    return ~(torch.isfinite(image).all(1) & torch.isfinite(text).all(1))


def _on_host(step: _Step) -> _Numbers:
    """The numbers of a step; waits for their copy if it is still on its way."""
    if step.copied:
        step.copied.synchronize()
    return _Numbers(*step.values.tolist())


def _explain(found: _Numbers) -> str:
    for name, value in (("loss", found.loss), ("gradient norm", found.norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    if found.loss > found.loss_limit:
        return f"the loss is {found.loss:.4g}, a spike from {found.loss_limit:.4g} on"
    return f"the gradient norm is {found.norm:.4g}, a spike from {found.norm_limit:.4g} on"


def _shown(keys: list[str], suspects: list[str]) -> str:
    names, what = (suspects, "its features are not finite") if suspects else (keys, "")
    if not names:
        return "keys of the samples are not known"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = ", ".join(names[:_SHOWN]) + more
    return f"sample {listed}: {what}" if suspects else f"samples {listed}"
