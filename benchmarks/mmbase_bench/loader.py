"""Samples per second of our loader beside OpenCLIP's own pipeline, on the same shards of photographs.

Both run in processes of their own, OpenCLIP's (``get_wds_dataset``, its training transform and tokenizer) in the
interpreter that has the webdataset it needs: see benchmarks/peers.sh. They take turns; who is not on turn is stopped,
so that its workers cost nothing. Same shards, batch size, number of workers, crops and output size. OpenCLIP's batches
are float32 and normalised, ours uint8, normalised on the device; ``mmbase_float`` normalises them in the training
process.

    mmbase bench loader --peer-python peers/bin/python --workers 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mmbase.data.decode import describe_decoders
from mmbase.errors import MmbaseError
from mmbase_bench import loader_turns
from mmbase_bench.options import Parser, check_at_least, check_names, run
from mmbase_bench.photo_shards import photo_shards
from mmbase_bench.report import align, record_environment, write_rows

BASELINE = "openclip"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """What one contender did in one turn."""

    samples_per_s: float
    cpu_ms: float
    """Processor time of all its processes per sample."""


@dataclass(frozen=True)
class Result:
    """One contender with one number of workers; medians over the turns."""

    contender: str
    workers: int
    batch: int
    image_size: int
    samples_per_s: float
    ratio: float
    """Median over rounds of its samples per second divided by OpenCLIP's."""
    lowest_ratio: float
    cpu_ms: float
    cpu_ratio: float
    """Median over rounds of OpenCLIP's processor time per sample divided by its own."""
    noise: float
    """Median over rounds of its rate divided by that of the round before, less 1, without sign."""
    first_batch_s: float
    """From an imported library to the first batch: workers started, shards opened, buffers filled."""
    described: str


class Contender:
    """A loader in a process of its own, stopped whenever it is not on turn."""

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        self.name, self.batch, self.ahead = name, settings["batch_size"], 2 * settings["workers"] + 2
        self.process = subprocess.Popen(
            [python, "-P", loader_turns.__file__, name, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if name == BASELINE else None,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,  # a group of its own, so that it can be stopped with its workers
        )
        ready = self._answer()
        self.described, self.first_batch_s = ready["described"], ready["first_batch_s"]
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Turn:
        """Batches for so many seconds."""
        assert self.process.stdin
        self._signal(signal.SIGCONT)
        before = self._cpu_seconds()
        self.process.stdin.write(f"{self.ahead} {seconds}\n")
        self.process.stdin.flush()
        answer = self._answer()
        cpu = self._cpu_seconds() - before
        self._signal(signal.SIGSTOP)
        # processor time is counted from the first batch taken, the clock after those that lay ready: nearly the same
        # work, since as many lie ready at the end
        taken = answer["batches"] + self.ahead
        return Turn(answer["batches"] * self.batch / answer["seconds"], 1e3 * cpu / (taken * self.batch))

    def close(self) -> None:
        """End it and its workers."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        errors = self.process.stderr.read().strip().splitlines() if self.process.stderr else []
        reason = errors[-1] if errors else f"exit code {self.process.wait()}, see above"
        hint = "; build the peers' environment with benchmarks/peers.sh and name it with --peer-python"
        raise MmbaseError(f"{self.name} failed: {reason[:300]}{hint if self.name == BASELINE else ''}")

    def _cpu_seconds(self) -> float:
        """Of all processes of the group so far."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[2]) == self.process.pid:
                total += int(fields[11]) + int(fields[12])
        return total / _TICKS


@contextmanager
def _contenders(options: argparse.Namespace, settings: dict[str, Any]) -> Iterator[list[Contender]]:
    started: list[Contender] = []
    try:
        for name in options.contenders:
            python = options.peer_python if name == BASELINE else sys.executable
            started.append(Contender(name, python, settings))
        yield started
    finally:
        for contender in started:
            contender.close()


def measure(options: argparse.Namespace, shards: str, workers: int) -> list[Result]:
    """All contenders with one number of workers, in swapped order from round to round; a round more comes first."""
    settings = {"shards": shards, "workers": workers, "batch_size": options.batch_size, "seed": options.seed}
    settings["image_size"] = options.image_size
    turns: dict[str, list[Turn]] = {name: [] for name in options.contenders}
    with _contenders(options, settings) as contenders:
        for index in range(-1, options.rounds):
            for contender in contenders if index % 2 else reversed(contenders):
                turn = contender.turn(options.seconds)
                if index >= 0:
                    turns[contender.name].append(turn)
        return [_result(one, turns, options, workers) for one in contenders]


def _result(one: Contender, turns: dict[str, list[Turn]], options: argparse.Namespace, workers: int) -> Result:
    pairs = list(zip(turns[one.name], turns[BASELINE], strict=True))
    ratios = [mine.samples_per_s / theirs.samples_per_s for mine, theirs in pairs]
    rates = [turn.samples_per_s for turn in turns[one.name]]
    return Result(
        one.name,
        workers,
        options.batch_size,
        options.image_size,
        samples_per_s=statistics.median(rates),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        cpu_ms=statistics.median(turn.cpu_ms for turn in turns[one.name]),
        cpu_ratio=statistics.median(theirs.cpu_ms / mine.cpu_ms for mine, theirs in pairs),
        noise=statistics.median(abs(after / before - 1) for before, after in pairwise(rates)),
        first_batch_s=one.first_batch_s,
        described=one.described,
    )


def main() -> None:
    """Build the shards, measure, print the table, and write the files where ``--output`` names a folder."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.shards or Path(scratch)
        made = photo_shards(
            folder,
            samples=options.samples,
            shards=options.shard_count,
            seed=options.seed,
            qualities=options.qualities,
        )
        print(f"{made.describe()}; batches of {options.batch_size} at {options.image_size} px; {describe_decoders()}")
        for shard in folder.glob("*.tar"):
            shard.read_bytes()  # into the page cache: it is not the disk that is measured
        results = [row for workers in options.workers for row in measure(options, made.urls(folder), workers)]
    heads = ["loader", "workers", "samples/s", "x OpenCLIP", "lowest", "CPU ms", "x OpenCLIP", "noise", "first batch s"]
    print(align([heads, *map(_cells, results)]))
    for name in options.contenders:
        print(f"{name}: {next(row.described for row in results if row.contender == name)}")
    if options.output:
        header = {"measures": "samples per second", "environment": record_environment(torch.device("cpu"))}
        header |= {"shards": asdict(made), "rounds": options.rounds, "seconds": options.seconds}
        for path in write_rows(options.output, "loader", [asdict(result) for result in results], header):
            print(f"wrote {path}")


def parse() -> argparse.Namespace:
    """The options, checked.

    Raises:
        MmbaseError: an option or a value that does not exist.
    """
    parser = Parser(__doc__ or "")
    parser.add_argument("--contenders", nargs="+", default=list(loader_turns.LOADERS), help="openclip and any others")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes (1 2)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per batch (64)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the result in pixels (224)")
    parser.add_argument("--samples", type=int, default=2048, help="pictures in the shards (2048)")
    parser.add_argument("--shard-count", type=int, default=4, help="shards (4)")
    parser.add_argument(
        "--qualities", type=int, nargs="+", default=[75], help="of the JPEGs, drawn evenly (75, Pillow's own default)"
    )
    parser.add_argument("--shards", type=Path, help="folder where the shards are kept; else a temporary one")
    parser.add_argument("--rounds", type=int, default=6, help="timed turns of each (6)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (3)")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help="interpreter with open_clip_train and webdataset 0.2.86 (this one)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for loader.csv and loader.json")
    options = parser.parse()
    check_names("--contenders", options.contenders, loader_turns.LOADERS)
    if BASELINE not in options.contenders:
        raise MmbaseError(f"--contenders must include {BASELINE}: everything is set against it")
    for name in ("batch-size", "image-size", "samples"):
        check_at_least(1, f"--{name}", [getattr(options, name.replace("-", "_"))])
    check_at_least(1, "--workers", options.workers)
    check_at_least(1, "--qualities", options.qualities)
    check_at_least(2, "--rounds", [options.rounds])
    check_at_least(max(options.workers), "--shard-count", [options.shard_count])
    return options


def _cells(result: Result) -> list[str]:
    return [
        result.contender,
        str(result.workers),
        f"{result.samples_per_s:.0f}",
        f"{result.ratio:.2f}",
        f"{result.lowest_ratio:.2f}",
        f"{result.cpu_ms:.2f}",
        f"{result.cpu_ratio:.2f}",
        f"{result.noise:.1%}",
        f"{result.first_batch_s:.1f}",
    ]


if __name__ == "__main__":
    run(main)
