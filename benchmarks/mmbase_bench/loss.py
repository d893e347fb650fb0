"""The contrastive losses: ours against OpenCLIP's, a hand-written one-GEMM loss, siglip-kernel and memeff.

Every contender is first checked against float64 at the very size that is timed, then its peak memory is measured, then
all are timed in turns in one process. A contender that cannot run keeps its row, with the reason. "x floor" is the
median time over the least that the method's FLOPs and bytes allow at this machine's measured ceilings; "x base" is the
time over OpenCLIP's eager loss. On a CPU the defaults take a few minutes, most of it torch.compile's; the project's
figures there are of --sizes 16384.

    mmbase bench loss
    mmbase bench loss --sizes 16384 --contenders openclip mmbase-torch --output results
    mmbase bench loss --device cuda --sizes 32768 65536 --widths 512 768 1024 --dtypes bf16 fp16
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbase_bench.ceilings import Ceilings, measure_ceilings
from mmbase_bench.harness import Measurement, Timing, ratio, reason, release, time_alternating
from mmbase_bench.loss_contenders import BASELINE, CONTENDERS, DIRECTIONS, KINDS, Case, Loss, step
from mmbase_bench.loss_reference import float64_loss, relative_errors
from mmbase_bench.memory import Peak, cpu_peaks, cuda_peak
from mmbase_bench.options import DTYPES, Parser, check_at_least, check_names, device_of, run
from mmbase_bench.report import record_environment, table, write_results

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"sizes": [2048], "widths": [512], "dtypes": ["fp32"], "repeats": 5},
    "cuda": {"sizes": [65536], "widths": [768], "dtypes": ["bf16"], "repeats": 6},
}
CHILD_SECONDS = 1800.0
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked, defaults of the device filled in."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", help="images, and as many texts; 2048, on a GPU 65536")
    parser.add_argument("--widths", type=int, nargs="+", help="feature widths; 512, on a GPU 768")
    parser.add_argument("--dtypes", nargs="+", help="fp32, fp16, bf16; fp32, on a GPU bf16")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="softmax, sigmoid; both")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), help="forward+backward, forward; both")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--repeats", type=int, help="timed rounds, at least 2: 5 of one call; on a GPU 6 of five calls")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compile-mode", default="default", help="torch.compile's mode, such as max-autotune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for loss.csv, loss.json and loss.png")
    options = parser.parse(arguments)
    options.device = device_of(options.device)
    for name, value in DEFAULTS[options.device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_names("--dtypes", options.dtypes, DTYPES)
    check_names("--kinds", options.kinds, KINDS)
    check_names("--directions", options.directions, DIRECTIONS)
    check_names("--contenders", options.contenders, CONTENDERS)
    check_at_least(1, "--sizes", options.sizes)
    check_at_least(1, "--widths", options.widths)
    check_at_least(1, "--threads", [options.threads])
    check_at_least(2, "--repeats", [options.repeats])
    return options


def measure(case: Case, options: argparse.Namespace) -> tuple[list[Measurement], Ceilings]:
    """Check, weigh and time the contenders on one kind, size, width and dtype, in each direction asked for."""
    device: torch.device = options.device
    torch._dynamo.reset()  # past its limit of recompilations it would fall back to eager in silence
    losses, unbuilt = build(case, options)
    peaks = {} if device.type == "cuda" else _cpu_peaks(case, losses, options)
    sets = input_sets(case, device, options.seed)
    ceilings = measure_ceilings(device, DTYPES[case.dtype], case.size, case.width, torch.get_num_threads())
    expected = float64_loss(case.kind, *sets[0])
    measurements = []
    for direction in options.directions:
        now = replace(case, direction=direction)
        rows = {name: _row(now, name, ceilings, unbuilt.get(name, "")) for name in _of_kind(case.kind, options)}
        if device.type != "cuda":  # measured already: what takes too much memory has failed in its child
            _fill_peaks(rows, peaks[direction])
        for name, found in check(now, _runnable(losses, rows), sets[0], expected).items():
            if isinstance(found, dict):
                rows[name].set_errors(found)
            else:
                rows[name].problem = found
        runnable = {name: loss for name, loss in losses.items() if rows[name].errors}
        if device.type == "cuda":
            _fill_peaks(rows, _cuda_peaks(now, runnable, sets[0]))
        for name, timing in time_calls(now, runnable, sets, options).items():
            if isinstance(timing, Timing):
                rows[name].timing = timing
            else:
                rows[name].problem = timing
        _compare(rows)
        measurements += rows.values()
    return measurements, ceilings


def _of_kind(kind: str, options: argparse.Namespace) -> list[str]:
    return [name for name in options.contenders if kind in CONTENDERS[name].kinds]


def _runnable(losses: dict[str, Loss], rows: dict[str, Measurement]) -> dict[str, Loss]:
    return {name: loss for name, loss in losses.items() if not rows[name].problem}


def _fill_peaks(rows: dict[str, Measurement], peaks: Mapping[str, Peak]) -> None:
    for name, found in peaks.items():
        if isinstance(found, str):
            rows[name].problem = found
        elif found is None:
            rows[name].note = "; ".join(filter(None, (rows[name].note, "peak memory cannot be read on this system")))
        else:
            rows[name].peak_bytes = found


def input_sets(case: Case, device: torch.device, seed: int) -> list[Inputs]:
    """Input sets that together are larger than twice the GPU's L2 cache; two at least."""
    one = 2 * case.size * case.width * DTYPES[case.dtype].itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [case.inputs(device, seed + index) for index in range(max(2, min(16, 1 + 2 * cache // one)))]


def build(case: Case, options: argparse.Namespace) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses that can be built here by name, and why the others cannot."""
    losses: dict[str, Loss] = {}
    problems: dict[str, str] = {}
    for name in options.contenders:
        if case.kind in CONTENDERS[name].kinds:
            try:
                losses[name] = CONTENDERS[name].build(case.kind, options.device, options.compile_mode)
            except Exception as error:
                missing = isinstance(error, ImportError)
                problems[name] = reason(error) + "; benchmarks/peers.sh installs the peers" * missing
    return losses, problems


def check(
    case: Case, losses: dict[str, Loss], inputs: Inputs, expected: Sequence[Tensor]
) -> dict[str, dict[str, float] | str]:
    """Relative errors against float64 of each loss and of the gradients that it gives, or why there are none."""
    results: dict[str, dict[str, float] | str] = {}
    for name, loss in losses.items():
        try:
            results[name] = relative_errors(step(loss, case, inputs), expected)
        except Exception as error:
            results[name] = reason(error)
            release(inputs[0].device)
        gc.collect()
    return results


def time_calls(
    case: Case, losses: dict[str, Loss], sets: Sequence[Inputs], options: argparse.Namespace
) -> dict[str, Timing | str]:
    """Time the losses in turns on rotating inputs."""

    def call(loss: Loss, index: int) -> None:
        step(loss, case, sets[index % len(sets)])

    calls = {name: partial(call, loss) for name, loss in losses.items()}
    warmup = 3 if options.device.type == "cuda" else 1
    return time_alternating(calls, device=options.device, rounds=options.repeats, warmup=warmup)


def _cpu_peaks(case: Case, losses: dict[str, Loss], options: argparse.Namespace) -> dict[str, dict[str, Peak]]:
    """By direction and name; one child for all, so that imports and compilation are paid once."""
    arguments = {"case": asdict(case), "threads": options.threads, "seed": options.seed, "mode": options.compile_mode}
    labels = [f"{direction} {name}" for name in losses for direction in options.directions]
    found = cpu_peaks("mmbase_bench.loss_contenders:calls", arguments, labels, CHILD_SECONDS)
    return {direction: {name: found[f"{direction} {name}"] for name in losses} for direction in options.directions}


def _cuda_peaks(case: Case, losses: dict[str, Loss], inputs: Inputs) -> dict[str, Peak]:
    peaks: dict[str, Peak] = {}
    for name, loss in losses.items():
        try:
            step(loss, case, inputs)  # compiles where this direction is new
            peaks[name] = cuda_peak(partial(step, loss, case, inputs), inputs[0].device)
        except Exception as error:
            peaks[name] = reason(error)
            release(inputs[0].device)
    return peaks


def _row(case: Case, name: str, ceilings: Ceilings, problem: str) -> Measurement:
    contender = CONTENDERS[name]
    labels = {"kind": case.kind, "size": case.size, "width": case.width, "dtype": case.dtype}
    row = Measurement("loss", {**labels, "direction": case.direction}, name, problem=problem, note=contender.note)
    row.set_floor(case.work(contender.keeps_logits), ceilings)
    return row


def _compare(rows: dict[str, Measurement]) -> None:
    """Fill in the ratio to the baseline."""
    baseline = rows[BASELINE].timing if BASELINE in rows else None
    for row in rows.values():
        if baseline and row.timing:
            row.ratio_to_baseline = ratio(row.timing, baseline)


def main() -> None:
    """Measure every case, print its table, and write the files where ``--output`` names a folder."""
    options = parse()
    torch.set_num_threads(options.threads)
    device: torch.device = options.device
    about = record_environment(device)
    where = f"{about['device_name']}, torch {about['versions']['torch']}, triton {about['versions']['triton']}"
    remark = "on a GPU"
    if device.type != "cuda":
        remark = (
            f"on a CPU, {options.threads} threads: mmbase's torch path against OpenCLIP's; no GPU kernel is measured"
        )
    print(f"contrastive losses {remark}\n{where}, commit {about['commit']}", flush=True)
    everything: list[Measurement] = []
    ceilings: dict[str, Any] = {}
    header = {"measures": f"contrastive losses {remark}", "environment": about, "ceilings": ceilings}
    written: list[Path] = []
    for case in cases(options):
        rows, found = measure(case, options)
        everything += rows
        ceilings[f"{case.dtype} {case.size}x{case.width}"] = asdict(found)
        _print_case(rows, found)
        if options.output:  # case by case: what a time limit cuts off loses only the rest
            title = f"Contrastive losses {remark}\n{where}"
            written = write_results(options.output, "loss", everything, header, title)
    for path in written:
        print(f"wrote {path}")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination asked for."""
    for dtype, width, size, kind in product(options.dtypes, options.widths, options.sizes, options.kinds):
        yield Case(kind, size, width, dtype)


def _print_case(rows: Sequence[Measurement], ceilings: Ceilings) -> None:
    for direction in dict.fromkeys(row.case["direction"] for row in rows):
        some = [row for row in rows if row.case["direction"] == direction]
        case = some[0].case
        floors = " / ".join(dict.fromkeys(f"{row.floor_ms:.3g}" for row in some))
        print(f"\n{case['kind']} {case['size']} x {case['size']} x {case['width']} {case['dtype']}, {direction}")
        print(
            f"floor {floors} ms: matmul {ceilings.matmul_flops / 1e12:.3g} TFLOP/s, "
            f"copy {ceilings.copy_bytes / 1e9:.3g} GB/s"
        )
        print(table(some), flush=True)


if __name__ == "__main__":
    run(main)
