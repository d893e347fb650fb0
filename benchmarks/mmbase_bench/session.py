"""A run of a benchmark over many cases: a time budget, files after every case, going on where the last run stopped.

A contender that leaves the GPU unusable costs its own row: the run writes down what happened, starts anew in a fresh
process and goes on without it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from mmbase.errors import MmbaseError
from mmbase.files import write_atomically
from mmbase_bench.ceilings import Ceilings, measure_ceilings
from mmbase_bench.harness import Measurement, reason
from mmbase_bench.options import DTYPES, Parser, check_at_least, check_names, device_of
from mmbase_bench.ratio_plot import plot_ratios
from mmbase_bench.report import record_environment, table, write_rows
from mmbase_bench.side_by_side import DIRECTIONS, Case, DeviceLostError, Settings, measure

SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrix products whose rate is the ceiling: large enough that nothing else shows."""
LEFT = 3
"""Exit code of a run that --seconds ended before its last case."""
Row = dict[str, Any]
Verdict = Callable[[Sequence[Row], Settings, str], tuple[list[str], list[Row]]]
"""(rows, settings, name of the result file) to lines for people and rows of the table of choices."""


def add_options(parser: Parser, contenders: Iterable[str], dtypes: Iterable[str] = DTYPES) -> None:
    """The options that all such benchmarks have."""
    parser.add_argument("--dtypes", nargs="+", help=f"{', '.join(dtypes)}; fp32, on a GPU bf16")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), help=f"{', '.join(DIRECTIONS)}; all")
    parser.add_argument("--contenders", nargs="+", help=", ".join(contenders))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--repeats", type=int, help="timed rounds, at least 2: 5 of one call; on a GPU 6 of five calls")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compile-mode", default="default", help="torch.compile's, such as max-autotune-no-cudagraphs")
    parser.add_argument("--seconds", type=float, help=f"begin no case after so many; exit code {LEFT} if any is left")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the output's JSON has already")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the CSV, the JSON and the plot")


def check_options(
    options: argparse.Namespace, contenders: Mapping[str, Sequence[str]], dtypes: Iterable[str] = DTYPES
) -> None:
    """Fill in the defaults of the device and refuse what there is not.

    Args:
        options: what :func:`add_options` parsed; changed in place.
        contenders: by type of device, those that run unless others are named; ``all``: those that there are.
        dtypes: those that the benchmark takes.
    """
    options.device = device_of(options.device)
    cuda = options.device.type == "cuda"
    options.dtypes = options.dtypes or ["bf16" if cuda else "fp32"]
    options.contenders = options.contenders or list(contenders[options.device.type])
    options.repeats = options.repeats if options.repeats is not None else 6 if cuda else 5
    check_names("--dtypes", options.dtypes, dtypes)
    check_names("--directions", options.directions, DIRECTIONS)
    check_names("--contenders", options.contenders, contenders["all"])
    check_at_least(1, "--threads", [options.threads])
    check_at_least(2, "--repeats", [options.repeats])
    if options.resume and options.output is None:
        raise MmbaseError("--resume goes on from the JSON in --output, which is missing: name the folder")


def settings_of(subject: str, options: argparse.Namespace, baseline: str | None = None) -> Settings:
    """What holds for every case of the run."""
    return Settings(
        subject,
        options.device,
        contenders=tuple(options.contenders),
        directions=tuple(name for name in DIRECTIONS if name in options.directions),
        rounds=options.repeats,
        mode=options.compile_mode,
        seed=options.seed,
        baseline=baseline,
    )


def run_cases(
    what: str, settings: Settings, cases: Sequence[Case], options: argparse.Namespace, verdict: Verdict | None = None
) -> list[Row]:
    """Measure the cases, print their tables and the verdict, and write the files where there is a folder for them.

    Args:
        what: the subject in words, for titles.
        settings: of the run.
        cases: in the order of their importance; time may end before they do.
        options: ``output``, ``resume``, ``seconds``, ``threads`` are read.
        verdict: what the rows justify.

    Returns:
        The rows, those that were kept from before included.

    Raises:
        SystemExit: with LEFT, after all else, where time ended before the cases.
    """
    begun = time.monotonic()
    torch.set_num_threads(options.threads)
    about = record_environment(settings.device)
    where = f"{about['device_name']}, torch {about['versions']['torch']}, triton {about['versions']['triton']}"
    remark = "on a GPU"
    if settings.device.type != "cuda":
        remark = f"on a CPU (cpu), {options.threads} threads: PyTorch's paths only; no GPU kernel is measured"
    print(f"{what} {remark}\n{where}, commit {about['commit']}", flush=True)
    head: dict[str, Any] = {"measures": f"{what} {remark}", "environment": about, "settings": _signature(settings)}
    kept = _kept(settings, options, head)
    head |= {"ceilings": {}, "lost": kept.get("lost", []), "wins": [], "verdict": []}
    settings = replace(settings, lost={(case, contender): why for case, contender, why in head["lost"]})
    rows: list[Row] = []
    done: set[str] = set()
    for row in kept.get("results", []):
        rows.append(row)
        done.add(row["in_case"])
    result = f"benchmarks/results/{options.output.resolve().name if options.output else '...'}/{settings.subject}.json"
    head["ceilings"] |= kept.get("ceilings", {})
    left = ""
    for index, case in enumerate(cases):
        if case.title in done:
            print(f"\n{case.title}: measured before, kept")
            continue
        if options.seconds is not None and time.monotonic() - begun > options.seconds:
            left = ", ".join(case.title for case in cases[index:] if case.title not in done)
            print(f"\nnot measured, for --seconds={options.seconds:g} are over: {left}; --resume goes on with them")
            break
        dtype = str(case.labels()["dtype"])
        try:
            ceilings = _ceilings(settings.device, dtype)
            found = measure(case, settings, ceilings)
        except DeviceLostError as lost:
            _start_anew(settings, options, head, rows, [case.title, lost.contender, str(lost)], begun)
        head["ceilings"][dtype] = asdict(ceilings)
        _print_case(case, found, ceilings)
        rows += [row.flat() | _rounds(row) | {"in_case": case.title} for row in found]
        if options.output:
            write_rows(options.output, settings.subject, rows, head)
    if verdict:
        head["verdict"], head["wins"] = verdict(rows, settings, result if options.output else "")
        print("\n" + "\n".join(head["verdict"]))
    if options.output and rows:
        written = write_rows(options.output, settings.subject, rows, head)
        try:
            title = f"{what} {remark}\n{where}"
            path = options.output / f"{settings.subject}.png"
            written.append(write_atomically(path, lambda file: plot_ratios(file, rows, title)))
        except ImportError as error:  # the figures stand without it
            print(f"no plot: {reason(error)}")
        print("\n" + "\n".join(f"wrote {path}" for path in written))
    if left:
        sys.exit(LEFT)
    return rows


def _ceilings(device: torch.device, dtype: str) -> Ceilings:
    side = SIDE[device.type]
    return measure_ceilings(device, DTYPES[dtype], side, side, torch.get_num_threads())


def _signature(settings: Settings) -> dict[str, Any]:
    """What must be the same for results to stand in one file."""
    values = asdict(replace(settings, lost={}))
    return json.loads(json.dumps(values | {"device": settings.device.type, "lost": None}))


def _kept(settings: Settings, options: argparse.Namespace, head: dict[str, Any]) -> dict[str, Any]:
    """The result file that is gone on from, or nothing."""
    path = options.output / f"{settings.subject}.json" if options.output else None
    if not (options.resume and path and path.exists()):
        return {}
    try:
        before = json.loads(path.read_text())
        same = {
            "settings": before["settings"] == head["settings"],
            **{
                key: before["environment"][key] == head["environment"][key]
                for key in ("commit", "device_name", "versions")
            },
        }
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path} is begun anew: it cannot be read ({reason(error)})")
        return {}
    if not all(same.values()):
        print(f"{path} is begun anew: it was measured with another {', '.join(k for k, v in same.items() if not v)}")
        return {}
    return before


def _start_anew(
    settings: Settings,
    options: argparse.Namespace,
    head: dict[str, Any],
    rows: list[Row],
    lost: list[str],
    begun: float,
) -> NoReturn:
    """Replace this process, whose GPU is lost, by one that goes on without the contender.

    Raises:
        MmbaseError: there is no folder to note it in.
    """
    if options.output is None:
        raise MmbaseError(f"{lost[0]}: {lost[2]}; with --output the run would go on without it")
    if lost[:2] in [before[:2] for before in head["lost"]]:
        raise MmbaseError(f"{lost[0]}: {lost[2]}, for the second time; look at the GPU")
    print(f"\n{lost[0]}: {lost[2]}; going on without it in a new process", flush=True)
    head["lost"].append(lost)
    write_rows(options.output, settings.subject, rows, head)
    again = [argument for argument in sys.argv[1:] if argument != "--resume"]
    if options.seconds is not None:
        again += ["--seconds", str(max(0.0, options.seconds - (time.monotonic() - begun)))]
    replace_process([sys.executable, "-m", f"mmbase_bench.{settings.subject}", *again, "--resume"])


def replace_process(command: Sequence[str]) -> NoReturn:
    """Become `command`; files are closed before, so that the driver lets go of what this process had on the GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.execv(command[0], list(command))


def _rounds(measurement: Measurement) -> Row:
    return {"rounds_ms": list(measurement.timing.rounds_ms)} if measurement.timing else {}


def _print_case(case: Case, rows: Sequence[Measurement], ceilings: Ceilings) -> None:
    for direction in dict.fromkeys(row.case["direction"] for row in rows):
        some = [row for row in rows if row.case["direction"] == direction]
        baseline = next((row.baseline for row in some if row.baseline), "")
        print(f"\n{case.title}, {direction}" + (f"; x base: over {baseline}" if baseline else ""))
        print(
            f"floor {some[0].floor_ms:.3g} ms ({some[0].floor_by}): matmul {ceilings.matmul_flops / 1e12:.3g} TFLOP/s, "
            f"copy {ceilings.copy_bytes / 1e9:.3g} GB/s"
        )
        print(table(some), flush=True)
