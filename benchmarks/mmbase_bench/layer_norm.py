"""What lies between a tower's matrix products: ours against PyTorch's lines, eager and compiled.

Operators: the residual addition with the LayerNorm after it, LayerNorm alone, the activation of the MLP with its bias
(whose gradient is part of the work), and the head: one token of each sequence, LayerNorm, projection, unit length.
Forward, backward and both; 16 bits as under autocast. Everybody is checked against float64, then peak memory is
measured (on a GPU), then all are timed in turns in one process. "x floor" is the median time over the least that the
bytes allow at the measured ceiling; "x base" is the time over the fastest of PyTorch's ways.

    mmbase bench layer_norm
    mmbase bench layer_norm --device cuda --operators gelu quick_gelu --shapes vit-b-16 --output results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mmbase_bench.layer_norm_contenders import NORMS, OPERATORS, OTHERS, Case
from mmbase_bench.options import Parser, check_at_least, check_names, run
from mmbase_bench.session import Row, add_options, check_options, run_cases, settings_of
from mmbase_bench.side_by_side import Settings
from mmbase_bench.verdict import OURS, Place, Rivals, against_best, judge, summary
from mmbase_kernels.activation import ACTIVATIONS
from mmbase_kernels.tuning import architecture


@dataclass(frozen=True)
class Shape:
    """The tokens of one tower."""

    batch: int
    tokens: int
    width: int
    features: int
    each: bool = False


SHAPES = {
    "vit-b-16": Shape(1024, 197, 768, 512),
    "text": Shape(4096, 77, 512, 512, each=True),
    "vit-l-14": Shape(1024, 257, 1024, 768),
    "vit-b-16-small": Shape(64, 197, 768, 512),
    "vit-h-14": Shape(512, 257, 1280, 1024),
    "vit-l-14-small": Shape(64, 257, 1024, 768),
    "text-small": Shape(256, 77, 512, 512, each=True),
    "vit-h-14-small": Shape(32, 257, 1280, 1024),
}
"""In the order of their importance, with a batch that fills a large GPU and with one that hardly does."""
ON_A_CPU = {"vit-b-16": 32, "text": 64}
"""Shapes and batches that run unless others are asked for."""
USUAL = ("add_layer_norm", "gelu", "quick_gelu", "layer_norm", "head")
EVERYBODY = list(NORMS | OTHERS)
CONTENDERS = {"all": EVERYBODY, "cuda": EVERYBODY, "cpu": ["eager", "mmbase-torch", "mmbase-auto"]}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked, defaults of the device filled in."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--operators", nargs="+", default=list(USUAL), help=", ".join(OPERATORS))
    parser.add_argument("--shapes", nargs="+", help=", ".join(SHAPES))
    parser.add_argument("--batch", type=int, help="sequences, in place of each shape's own number")
    add_options(parser, EVERYBODY)
    options = parser.parse(arguments)
    check_options(options, CONTENDERS)
    options.shapes = options.shapes or list(ON_A_CPU if options.device.type == "cpu" else SHAPES)
    check_names("--operators", options.operators, OPERATORS)
    check_names("--shapes", options.shapes, SHAPES)
    if options.batch is not None:
        check_at_least(1, "--batch", [options.batch])
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination asked for, all operators at a shape before the next shape."""
    found = []
    for dtype, name, operator in product(options.dtypes, options.shapes, options.operators):
        shape = SHAPES[name]
        batch = options.batch or (ON_A_CPU.get(name, 4) if options.device.type == "cpu" else shape.batch)
        found.append(Case(operator, name, batch, shape.tokens, shape.width, shape.features, shape.each, dtype))
    return found


def place_of(row: Row) -> Place:
    """A row's place in the table of choices."""
    operator, width, rows = row["operator"], row["width"], row["batch"] * row["tokens"]
    if operator == "head":
        return Place("head", "", width, row["batch"])
    if operator in ACTIVATIONS:
        return Place("activation", operator, width, rows)
    return Place("layer_norm", {"layer_norm": "plain", "add_layer_norm": "add"}[operator], width, rows)


def verdict(rows: Sequence[Row], settings: Settings, result: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Rows of the table of choices that the result justifies, and how much faster ours is by operator."""
    on = architecture(settings.device) if settings.device.type == "cuda" else ""
    lines, wins = judge(rows, place_of, Rivals(["eager", "mmbase-torch"], ["compiled"]), on, result)
    for operator in dict.fromkeys(row["operator"] for row in rows):
        some = [row for row in rows if row["operator"] == operator]
        for rival in ("eager", "compiled"):
            lines += summary(against_best(some, OURS, [rival]), f"{operator}: {OURS}", rival)
    return lines, wins


def main() -> None:
    """Measure every case, print its tables and the verdict, write the files where ``--output`` names a folder."""
    options = parse()
    what = "LayerNorm, activation and head"
    run_cases(what, settings_of("layer_norm", options), cases(options), options, verdict)


if __name__ == "__main__":
    run(main)
