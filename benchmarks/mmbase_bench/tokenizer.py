"""Captions per second of CLIP's tokenizer, ours against OpenCLIP's, in one process; ids are checked to be equal.

Every round has captions that neither has seen, so that what either keeps of earlier texts helps as it does in training.
Contenders take turns, in swapped order from round to round; the ratio of a round is what is compared. OpenCLIP's loader
tokenizes one caption a call (``openclip``); ``openclip_batch`` is given the whole batch.

    mmbase bench tokenizer --captions ordinary unicode --file captions.txt
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mmbase.data.tokenizer import ClipTokenizer
from mmbase_bench.caption_texts import KINDS, captions, captions_of_file
from mmbase_bench.options import Parser, check_at_least, check_names, run
from mmbase_bench.report import align, record_environment, write_rows

BASELINE = "openclip"
Tokenize = Callable[[list[str]], np.ndarray]
"""Texts to ids int64 [B, T]."""


@dataclass(frozen=True)
class Result:
    """One contender on one kind of captions; medians over the rounds."""

    captions: str
    contender: str
    captions_per_s: float
    us_per_caption: float
    ratio: float
    """Median over rounds of OpenCLIP's time divided by its own; above 1 it is faster."""
    lowest_ratio: float
    noise: float
    """Median over rounds of its time divided by that of the round before, less 1, without sign."""
    mean_ids: float
    """Ids of a caption with its start and end."""
    differing: int
    """Rows whose ids are not OpenCLIP's."""


def contenders() -> dict[str, Tokenize]:
    """Fresh tokenizers: nothing is kept from earlier measurements."""
    import open_clip

    theirs = open_clip.SimpleTokenizer()

    def one_by_one(texts: list[str]) -> np.ndarray:
        return torch.stack([theirs(text)[0] for text in texts]).numpy()

    return {
        BASELINE: one_by_one,
        "openclip_batch": lambda texts: theirs(texts).numpy(),
        "mmbase": ClipTokenizer(),
    }


def measure(kind: str, batches: list[list[str]]) -> list[Result]:
    """Time the contenders on each batch; the first is not counted."""
    tokenize = contenders()
    times: dict[str, list[float]] = {name: [] for name in tokenize}
    differing = dict.fromkeys(tokenize, 0)
    ids = 0
    for index, texts in enumerate(batches):
        rows = {}
        for name in list(tokenize)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            rows[name] = tokenize[name](texts)
            if index:
                times[name].append((time.perf_counter() - start) / len(texts))
        for name in tokenize:
            differing[name] += int((rows[name] != rows[BASELINE]).any(1).sum())
        ids += int((rows[BASELINE].argmax(1) + 1).sum())
    return [
        Result(
            kind,
            name,
            captions_per_s=1 / statistics.median(taken),
            us_per_caption=1e6 * statistics.median(taken),
            ratio=statistics.median(theirs / mine for mine, theirs in zip(taken, times[BASELINE])),
            lowest_ratio=min(theirs / mine for mine, theirs in zip(taken, times[BASELINE])),
            noise=statistics.median(abs(after / before - 1) for before, after in pairwise(taken)),
            mean_ids=ids / sum(map(len, batches)),
            differing=differing[name],
        )
        for name, taken in times.items()
    ]


def main() -> None:
    """Measure, print the table, and write the files where ``--output`` names a folder."""
    options = parse()
    torch.set_num_threads(1)
    count = (options.rounds + 1) * options.batch
    results: list[Result] = []
    for kind in options.captions:
        results += measure(kind, _batches(captions(kind, count, options.seed), options.batch))
    if options.file:
        results += measure(options.file.name, _batches(captions_of_file(options.file), options.batch))
    heads = ["captions", "tokenizer", "captions/s", "us each", "x OpenCLIP", "lowest", "noise", "ids", "differing"]
    print(align([heads, *map(_cells, results)], left=2))
    if options.output:
        header = {"measures": "CLIP's tokenizer on one core", "environment": record_environment(torch.device("cpu"))}
        header |= {"batch": options.batch, "rounds": options.rounds, "captions": KINDS}
        for path in write_rows(options.output, "tokenizer", [asdict(result) for result in results], header):
            print(f"wrote {path}")


def parse() -> argparse.Namespace:
    """The options, checked.

    Raises:
        MmbaseError: an option or a value that does not exist.
    """
    parser = Parser(__doc__ or "")
    parser.add_argument("--captions", nargs="+", default=list(KINDS), help=f"{', '.join(KINDS)}; all")
    parser.add_argument("--file", type=Path, help="real captions as well, one a line")
    parser.add_argument("--batch", type=int, default=512, help="captions per round (512)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for tokenizer.csv and tokenizer.json")
    options = parser.parse()
    check_names("--captions", options.captions, KINDS)
    check_at_least(1, "--batch", [options.batch])
    check_at_least(2, "--rounds", [options.rounds])
    return options


def _batches(texts: list[str], size: int) -> list[list[str]]:
    """Runs of ``size`` texts, at least three; a short last one is left out."""
    size = max(1, min(size, len(texts) // 3))
    return [texts[first : first + size] for first in range(0, len(texts) - size + 1, size)]


def _cells(result: Result) -> list[str]:
    return [
        result.captions,
        result.contender,
        f"{result.captions_per_s:.0f}",
        f"{result.us_per_caption:.1f}",
        f"{result.ratio:.2f}",
        f"{result.lowest_ratio:.2f}",
        f"{result.noise:.1%}",
        f"{result.mean_ids:.1f}",
        str(result.differing),
    ]


if __name__ == "__main__":
    run(main)
