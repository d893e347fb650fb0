"""Contenders on one case of an operator: built, checked against float64, weighed, timed in turns; one row each.

A case says what goes in, what the exact result is and how much work it is; a contender is one way to compute it. What
cannot be built or run keeps its row, with the reason. ``forward`` runs without gradients, ``backward`` on a fresh
graph whose forward pass is not timed, ``forward+backward`` is both; gradients end contiguous, as the next operation
needs them, and that is timed.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mmbase_bench.ceilings import Ceilings
from mmbase_bench.harness import Call, Measurement, Staged, Timing, Work, ratio, reason, release, time_alternating
from mmbase_bench.memory import cuda_peak

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
DIRECTIONS = (BOTH, FORWARD, BACKWARD)
MOST_SETS = 8


@dataclass(frozen=True)
class Inputs:
    """One set of inputs, and the gradients that come back to the outputs."""

    rows: tuple[Tensor, ...]
    """Differentiated."""
    parameters: tuple[Tensor, ...]
    """Differentiated; arguments after `rows`, unless the contender keeps its own."""
    gradients: tuple[Tensor, ...]
    """One for each output, contiguous."""


@dataclass(frozen=True)
class Built:
    """A contender made ready for a case."""

    function: Callable[..., Any]
    """(rows, parameters) to one output or a tuple of them; without the parameters where it keeps its own."""
    own: tuple[Tensor, ...] | None = None
    """Its own parameters, equal to the inputs' and in their order."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case."""

    name: str
    build: Callable[[Any, torch.device, str], Built]
    """(case, device, torch.compile's mode); raises where it cannot run."""
    rival: bool = True
    """Whether ours is compared to it where the best of the others is asked for."""
    compiled: bool = False
    note: str = ""


class Case(Protocol):
    """One operator at one size and dtype."""

    @property
    def title(self) -> str:
        """The case in a line; no two of a run have the same."""
        ...

    def labels(self) -> dict[str, Any]:
        """Columns of the result that tell the case from others."""
        ...

    def contenders(self, device: torch.device) -> Mapping[str, Contender]:
        """Those that there are for this operator, the peers first."""
        ...

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        """Random inputs; parameters are the same for every seed."""
        ...

    def exact(self, inputs: Inputs) -> Sequence[tuple[str, Tensor]]:
        """Outputs, then gradients, in float64, by name; large ones in a sample."""
        ...

    def observed(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same quantities of a contender; without gradients the outputs alone."""
        ...

    def work(self, direction: str) -> Work:
        """The least that any method has to do."""
        ...


class DeviceLostError(RuntimeError):
    """The GPU answers no more in this process, since this contender ran."""

    def __init__(self, contender: str, why: str) -> None:
        super().__init__(f"{contender} lost the device: {why}")
        self.contender, self.why = contender, why


@dataclass(frozen=True)
class Settings:
    """What holds for every case of a run."""

    subject: str
    device: torch.device
    contenders: tuple[str, ...]
    directions: tuple[str, ...] = DIRECTIONS
    rounds: int = 6
    mode: str = "default"
    """torch.compile's."""
    seed: int = 0
    baseline: str | None = None
    """Whom ratios are taken to; None: the fastest rival of each case."""
    lost: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(case, contender) that may not run again, and why."""


def tuple_of(outputs: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def forward(built: Built, inputs: Inputs) -> tuple[Tensor, ...]:
    """Outputs of one call."""
    arguments = inputs.rows if built.own is not None else inputs.rows + inputs.parameters
    return tuple_of(built.function(*arguments))


def inference(built: Built, inputs: Inputs) -> tuple[Tensor, ...]:
    """Outputs without a graph."""
    rows, parameters = (tuple(tensor.detach() for tensor in some) for some in (inputs.rows, inputs.parameters))
    with torch.no_grad():
        return forward(built, Inputs(rows, parameters, inputs.gradients))


def backward(built: Built, inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients to rows and parameters, contiguous."""
    leaves = inputs.rows + (inputs.parameters if built.own is None else built.own)
    return tuple(g.contiguous() for g in torch.autograd.grad(outputs, leaves, inputs.gradients))


def both(built: Built, inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients."""
    outputs = forward(built, inputs)
    return outputs, backward(built, inputs, outputs)


def call_of(direction: str, built: Built, sets: Sequence[Inputs]) -> Call:
    """What is timed in a direction, on the input sets in turns."""

    def pick(index: int) -> Inputs:
        return sets[index % len(sets)]

    if direction == FORWARD:
        return lambda index: inference(built, pick(index))
    if direction == BOTH:
        return lambda index: both(built, pick(index))
    return Staged(
        lambda index: (pick(index), forward(built, pick(index))), lambda state: backward(built, state[0], state[1])
    )


def input_sets(case: Case, device: torch.device, seed: int) -> list[Inputs]:
    """Sets that together are larger than twice the GPU's L2 cache; two at least."""
    first = case.inputs(device, seed)
    size = sum(tensor.nbytes for tensor in first.rows + first.gradients)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = max(2, min(MOST_SETS, 1 + 2 * cache // max(size, 1)))
    return [first, *(case.inputs(device, seed + index) for index in range(1, count))]


def measure(case: Case, settings: Settings, ceilings: Ceilings) -> list[Measurement]:
    """Rows of all contenders in every direction.

    Raises:
        DeviceLostError: a contender left the GPU in a state in which nothing runs.
    """
    device = settings.device
    torch._dynamo.reset()  # past its limit of recompilations it would fall back to eager in silence
    known = case.contenders(device)
    names = [name for name in known if name in settings.contenders]
    rows = {
        direction: {name: _row(settings.subject, case, direction, known[name], ceilings) for name in names}
        for direction in DIRECTIONS
    }
    built: dict[str, Built] = {}
    try:
        sets = input_sets(case, device, settings.seed)
        wanted = case.exact(sets[0])
        for name in names:
            _check(name, case, settings, sets[0], wanted, rows, built)
        for direction in settings.directions:
            _time(direction, case, settings, sets, rows[direction], built)
    except DeviceLostError:
        raise
    except Exception as error:  # of the case itself: no memory for its inputs or the float64 result
        _require_device(device, "the inputs", error)
        for some in rows.values():
            for row in some.values():
                row.problem = row.problem or f"the case could not be set up: {reason(error)}"
    built.clear()
    gc.collect()
    release(device)
    for direction in settings.directions:
        compare(list(rows[direction].values()), known, settings.baseline)
    return [row for direction in settings.directions for row in rows[direction].values()]


def compare(rows: Sequence[Measurement], known: Mapping[str, Contender], baseline: str | None) -> None:
    """Fill in the ratio to the baseline, by default to the fastest rival."""
    timed = {row.contender: row.timing for row in rows if row.timing}
    if baseline is None:
        rivals = {name: timing.p50_ms for name, timing in timed.items() if known[name].rival}
        baseline = min(rivals, key=lambda name: rivals[name], default=None)
    if baseline in timed:
        for row in rows:
            if row.timing:
                row.ratio_to_baseline = ratio(row.timing, timed[baseline])
                row.baseline = baseline


def relative_errors(found: Sequence[Tensor], wanted: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    """``|found - wanted| / |wanted|`` by name; quantities of one name are taken together."""
    squares: dict[str, list[float]] = {}
    for ours, (name, exact) in zip(found, wanted):
        if ours.shape != exact.shape:
            raise ValueError(f"{name} has shape {list(ours.shape)}, not {list(exact.shape)}")
        sums = squares.setdefault(name, [0.0, 0.0])
        sums[0] += float((ours.double() - exact).square().sum())
        sums[1] += float(exact.square().sum())
    return {name: (off / max(norm, 1e-300)) ** 0.5 for name, (off, norm) in squares.items()}


def _row(subject: str, case: Case, direction: str, contender: Contender, ceilings: Ceilings) -> Measurement:
    row = Measurement(subject, {**case.labels(), "direction": direction}, contender.name, note=contender.note)
    row.set_floor(case.work(direction), ceilings)
    return row


def _check(
    name: str,
    case: Case,
    settings: Settings,
    inputs: Inputs,
    wanted: Sequence[tuple[str, Tensor]],
    rows: dict[str, dict[str, Measurement]],
    built: dict[str, Built],
) -> None:
    """Build a contender, compare it with the exact result, and weigh it; what fails is said in its rows."""
    device = settings.device
    directions = set(settings.directions)
    if lost := settings.lost.get((case.title, name)):
        for some in rows.values():
            some[name].problem = lost
        return
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings_kept() as caught:
            made = case.contenders(device)[name].build(case, device, settings.mode)
            poison(inputs)
            outputs = inference(made, inputs)
            _fill_errors([rows[FORWARD][name]], case, outputs, (), wanted)
            if device.type == "cuda" and FORWARD in directions:
                rows[FORWARD][name].peak_bytes = cuda_peak(partial(inference, made, inputs), device)
            del outputs
    except Exception as error:
        _require_device(device, name, error)
        for some in rows.values():
            some[name].problem = why(error, caught)
        release(device)
        return
    built[name] = made
    if directions == {FORWARD}:
        return
    try:
        with warnings_kept() as caught:
            poison(inputs)
            outputs, gradients = both(made, inputs)
            _fill_errors([rows[BOTH][name], rows[BACKWARD][name]], case, outputs, gradients, wanted)
            del outputs, gradients
            if device.type == "cuda":
                rows[BOTH][name].peak_bytes = cuda_peak(partial(both, made, inputs), device)
    except Exception as error:
        _require_device(device, name, error)
        for direction in (BOTH, BACKWARD):
            rows[direction][name].problem = why(error, caught)
        release(device)


def _fill_errors(
    rows: Sequence[Measurement],
    case: Case,
    outputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    wanted: Sequence[tuple[str, Tensor]],
) -> None:
    """Errors of a sample, and whether everything is finite."""
    errors = relative_errors(case.observed(outputs, gradients), wanted)
    if not all(bool(tensor.isfinite().all()) for tensor in (*outputs, *gradients)):
        errors = dict.fromkeys(errors, float("nan"))
    for row in rows:
        row.set_errors(errors)


def _time(
    direction: str,
    case: Case,
    settings: Settings,
    sets: Sequence[Inputs],
    rows: dict[str, Measurement],
    built: Mapping[str, Built],
) -> None:
    """Time those that ran in this direction, in turns."""
    calls = {name: call_of(direction, built[name], sets) for name, row in rows.items() if row.errors}
    warmup = 3 if settings.device.type == "cuda" else 1
    timings = time_alternating(calls, device=settings.device, rounds=settings.rounds, warmup=warmup)
    failed = {name: found for name, found in timings.items() if isinstance(found, str)}
    if failed:  # of several, the kernels that are new
        name = next((name for name in failed if name.startswith("mmbase-triton")), next(iter(failed)))
        _require_device(settings.device, name, RuntimeError(failed[name]))
    for name, found in timings.items():
        if isinstance(found, Timing):
            rows[name].timing = found
        else:
            rows[name].problem = found


def poison(inputs: Inputs) -> None:
    """Leave NaN in the memory that the outputs and gradients will be given: what is not written shows."""
    tensors = inputs.rows + inputs.gradients
    held = [torch.full_like(tensor, torch.nan, requires_grad=False) for tensor in (*tensors, *tensors)]
    del held


@contextmanager
def warnings_kept() -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings: PyTorch tells why a pinned backend did not take the inputs in no other way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def why(error: Exception, caught: Sequence[warnings.WarningMessage]) -> str:
    """An exception as one line, with what PyTorch warned of before if no backend took the inputs."""
    text = reason(error)
    if not any(words in text for words in ("No available kernel", "No viable backend")):
        return text
    lines = [str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught]
    told = [
        line.splitlines()[0]
        for line in dict.fromkeys(lines)
        if line and not line.endswith("because:") and "runtime disabled" not in line
    ]
    return text.split(". This is likely")[0] + "".join(f"; {line}" for line in told[:2])[:300]


def _require_device(device: torch.device, suspect: str, error: BaseException) -> None:
    """Go on only with a GPU that still answers."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as dead:
            raise DeviceLostError(suspect, f"{reason(error)} ({reason(dead)})") from error
