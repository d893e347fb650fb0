"""Self-attention of both towers on the packed projection: ours against every way that PyTorch has, pinned one by one.

Shapes are those of a layer of ViT-B/32, B/16, L/14, L/14 at 336 pixels, H/14 and of text, padded and end to end.
Everybody starts from the packed projection and ends at its packed gradient. The first and the last sequences are
checked against float64, then peak memory is measured (on a GPU), then all are timed in turns in one process. A
contender that cannot run keeps its row, with the reason. "x floor" is the median time over the least that FLOPs and
bytes allow at this machine's measured ceilings; "x base" is the time over the fastest of PyTorch's. On a CPU the
defaults compare scaled_dot_product_attention with our CPU path at a small batch.

    mmbase bench attention
    mmbase bench attention --device cuda --dtypes bf16 fp16 --shapes vit-b-16 vit-b-32 --output results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from mmbase_bench.attention_contenders import DENSE, VARLEN, Case
from mmbase_bench.options import Parser, check_at_least, check_names, run
from mmbase_bench.session import Row, add_options, check_options, run_cases, settings_of
from mmbase_bench.side_by_side import Settings
from mmbase_bench.verdict import OURS_COMPILED, Place, Rivals, against_best, judge, summary
from mmbase_kernels.tuning import architecture

SHAPES = {
    case.shape: case
    for case in (
        Case("vit-b-32", 4096, 12, 50, 64),
        Case("vit-b-16", 1024, 12, 197, 64),
        Case("text", 4096, 8, 77, 64, causal=True),
        Case("vit-l-14", 1024, 16, 257, 64),
        Case("text-captions", 4096, 8, 77, 64, causal=True, drawn="captions"),
        Case("vit-h-14", 512, 16, 257, 80),
        Case("vit-l-14-336", 256, 16, 577, 64),
        Case("text-uniform", 4096, 8, 77, 64, causal=True, drawn="uniform"),
    )
}
"""In the order of their importance, with the batch that fills a large GPU."""
ON_A_CPU = {"vit-b-32": 8, "vit-b-16": 4, "text": 16, "text-captions": 64}
"""Shapes and batches that run unless others are asked for."""
ON_A_CPU_TOO = ("sdpa-flash", "sdpa-math", "padded-flash", "mmbase-sdpa", "mmbase-auto")
OF_TORCH = [name for name, contender in (DENSE | VARLEN).items() if contender.rival]
CONTENDERS = {
    "all": list(DENSE | VARLEN),
    "cuda": list(DENSE | VARLEN),
    "cpu": [name for name in DENSE | VARLEN if name in ON_A_CPU_TOO],
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked, defaults of the device filled in."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", help=", ".join(SHAPES))
    parser.add_argument("--batch", type=int, help="sequences, in place of each shape's own number")
    add_options(parser, CONTENDERS["all"])
    options = parser.parse(arguments)
    check_options(options, CONTENDERS)
    cpu = options.device.type == "cpu"
    options.shapes = options.shapes or list(ON_A_CPU if cpu else SHAPES)
    check_names("--shapes", options.shapes, SHAPES)
    if options.batch is not None:
        check_at_least(1, "--batch", [options.batch])
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination asked for."""
    found = []
    for dtype, name in product(options.dtypes, options.shapes):
        batch = options.batch or (ON_A_CPU.get(name, 4) if options.device.type == "cpu" else SHAPES[name].batch)
        found.append(replace(SHAPES[name], batch=batch, dtype=dtype))
    return found


def place_of(row: Row) -> Place:
    """A row's place in the table of choices."""
    return Place("attention", row["mask"], row["width"], row["longest"])


def verdict(rows: Sequence[Row], settings: Settings, result: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Rows of the table of choices that the result justifies, and how much faster ours is in all."""
    on = architecture(settings.device) if settings.device.type == "cuda" else ""
    others = [*OF_TORCH, "mmbase-sdpa"]  # the last is what auto would take instead
    rivals = Rivals(others, others, ours_compiled=OURS_COMPILED, grows=False)
    lines, wins = judge(rows, place_of, rivals, on, result)
    for ours in ("mmbase-triton", "mmbase-auto"):
        for title, some in _groups(rows):
            lines += summary(against_best(some, ours, OF_TORCH), ours, f"the fastest of PyTorch's{title}")
    return lines, wins


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    short = [row for row in rows if row["longest"] <= 257]
    return [("", list(rows))] + ([(", up to 257 tokens", short)] if len(short) < len(rows) else [])


def main() -> None:
    """Measure every case, print its tables and the verdict, write the files where ``--output`` names a folder."""
    options = parse()
    run_cases("attention", settings_of("attention", options), cases(options), options, verdict)


if __name__ == "__main__":
    run(main)
