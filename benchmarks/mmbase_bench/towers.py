"""Each tower's forward and backward, ours against OpenCLIP's: same weights, inputs, precision and threads.

The two alternate in one process, in swapped order from pair to pair, so that a machine whose speed swings slows both
alike; the ratio of a pair is what is compared. Every pair has new captions, of lengths such as people's captions have:
start and end token counted, exp(N(ln 12, 0.45)) rounded and held to 5..40, then padded to the context length.

    mmbase bench towers --precisions fp32 bf16 --pairs 10 --threads 2
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor, nn

from mmbase.models.clip import CLIP
from mmbase.models.config import TextConfig
from mmbase_bench.harness import synchronise
from mmbase_bench.options import Parser, check_at_least, check_names, device_of, run
from mmbase_bench.report import align, record_environment, write_rows
from mmbase_bench.train_step import build_pair

TOWERS = ("image", "text")
PRECISIONS = ("fp32", "bf16")
MEDIAN_LENGTH, LENGTH_SIGMA, LENGTHS = 12, 0.45, (5, 40)
"""Tokens of a caption: the median and the standard deviation of the logarithm, and the bounds they are held to."""

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """One tower in one precision; medians over the pairs."""

    model: str
    tower: str
    precision: str
    batch: int
    openclip_ms: float
    ours_ms: float
    ratio: float
    """Median over pairs of our time divided by OpenCLIP's; below 1 ours is faster."""
    cpu_ratio: float
    """The same of the processor time of all threads, which other programs on the machine disturb less."""
    noise: float
    """Median over pairs of OpenCLIP's time divided by its time in the pair before, less 1, without sign."""
    difference: float
    """|ours - OpenCLIP's| / |OpenCLIP's| of the features."""


def caption_lengths(batch: int, context_length: int) -> Tensor:
    """Random lengths of `batch` captions in tokens, as the head of this file has them, at most `context_length`."""
    drawn = torch.exp(math.log(MEDIAN_LENGTH) + LENGTH_SIGMA * torch.randn(batch))
    return drawn.round().long().clamp(*LENGTHS).clamp(max=context_length)


def captions(batch: int, config: TextConfig) -> Tensor:
    """Random ids [batch, context_length] of such lengths, each ended by the id that the tower pools at."""
    length_B1 = caption_lengths(batch, config.context_length)[:, None]
    end = config.eos_id if config.pool == "eos" else config.vocab_size - 1
    text_BT = torch.randint(3, config.vocab_size - 2, (batch, config.context_length))
    column_T = torch.arange(config.context_length)
    text_BT = text_BT.masked_fill(column_T == length_B1 - 1, end)
    return text_BT.masked_fill(column_T >= length_B1, config.pad_id)


def measure(model: str, both: tuple[CLIP, nn.Module], tower: str, precision: str, *, batch: int, pairs: int) -> Result:
    """Time `pairs` alternating forwards and backwards of one tower of our model and of OpenCLIP's.

    One pair more comes first and is not counted.
    """
    ours, theirs = both
    contenders = {name: (net, getattr(net, f"encode_{tower}")) for name, net in (("ours", ours), ("openclip", theirs))}
    device = ours.logit_scale.device
    gradient_BE = torch.randn(batch, ours.embed_dim, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    difference = math.nan
    for pair in range(pairs + 1):
        if tower == "image":
            inputs = torch.randn(batch, 3, *ours.image_size, device=device)
        else:
            inputs = captions(batch, ours.config.text).to(device)
        features = {}
        for name in ("ours", "openclip") if pair % 2 else ("openclip", "ours"):
            features[name], *taken = step(*contenders[name], inputs, gradient_BE, precision)
            if pair:
                times[name].append((taken[0], taken[1]))
        difference = float((features["ours"] - features["openclip"]).norm() / features["openclip"].norm())
    timed = list(zip(times["ours"], times["openclip"], strict=True))
    walls = [wall for wall, _ in times["openclip"]]
    return Result(
        model,
        tower,
        precision,
        batch,
        openclip_ms=1e3 * statistics.median(walls),
        ours_ms=1e3 * statistics.median(wall for wall, _ in times["ours"]),
        ratio=statistics.median(mine[0] / peers[0] for mine, peers in timed),
        cpu_ratio=statistics.median(mine[1] / peers[1] for mine, peers in timed),
        noise=statistics.median(abs(after / before - 1) for before, after in pairwise(walls)),
        difference=difference,
    )


def step(
    model: nn.Module, encode: Encode, inputs: Tensor, gradient_BE: Tensor, precision: str
) -> tuple[Tensor, float, float]:
    """Forward and backward once: the features, and the seconds by the clock and of the processor."""
    synchronise(inputs.device)
    start, start_cpu = time.perf_counter(), time.process_time()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features_BE = encode(inputs)
    features_BE.backward(gradient_BE.to(features_BE.dtype))
    synchronise(inputs.device)
    taken = time.perf_counter() - start, time.process_time() - start_cpu
    model.zero_grad(set_to_none=True)
    return features_BE.detach().float(), *taken


def main() -> None:
    """Measure, print the table, and write the files where ``--output`` names a folder."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    lengths = caption_lengths(10_000, 77).double()
    print(
        f"forward+backward of each tower, {options.threads} threads; captions of {lengths.mean():.1f} tokens on "
        f"average ({lengths.quantile(0.05):.0f} to {lengths.quantile(0.95):.0f} in nine of ten)",
        flush=True,
    )
    batches = {"image": options.image_batch, "text": options.text_batch}
    results: list[Result] = []
    for model in options.models:
        ours, theirs = build_pair(model, str(options.device))
        assert isinstance(ours, CLIP)
        for tower, precision in product(options.towers, options.precisions):
            results.append(measure(model, (ours, theirs), tower, precision, batch=batches[tower], pairs=options.pairs))
    heads = ["model", "tower", "dtype", "batch", "OpenCLIP ms", "ours ms", "ratio", "CPU ratio", "noise", "difference"]
    print(align([heads, *map(_cells, results)], left=3))
    if options.output:
        header = {"measures": "forward+backward of each tower", "environment": record_environment(options.device)}
        header |= {"threads": options.threads, "pairs": options.pairs, "mean_caption_length": float(lengths.mean())}
        for path in write_rows(options.output, "towers", [asdict(result) for result in results], header):
            print(f"wrote {path}")


def parse() -> argparse.Namespace:
    """The options, checked.

    Raises:
        MmbaseError: an option or a value that does not exist.
    """
    from mmbase.models.zoo import native_names

    parser = Parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"], help="names of OpenCLIP's (ViT-B-32)")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), help="image, text; both")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="fp32, bf16 (autocast); both")
    parser.add_argument("--image-batch", type=int, default=8, help="images per step (8)")
    parser.add_argument("--text-batch", type=int, default=64, help="captions per step (64)")
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of steps (10)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for towers.csv and towers.json")
    options = parser.parse()
    check_names("--models", options.models, native_names())
    check_names("--towers", options.towers, TOWERS)
    check_names("--precisions", options.precisions, PRECISIONS)
    for name in ("image-batch", "text-batch", "threads"):
        check_at_least(1, f"--{name}", [getattr(options, name.replace("-", "_"))])
    check_at_least(2, "--pairs", [options.pairs])
    options.device = device_of(options.device)
    return options


def _cells(result: Result) -> list[str]:
    return [
        result.model,
        result.tower,
        result.precision,
        str(result.batch),
        f"{result.openclip_ms:.0f}",
        f"{result.ours_ms:.0f}",
        f"{result.ratio:.3f}",
        f"{result.cpu_ratio:.3f}",
        f"{result.noise:.1%}",
        f"{result.difference:.1e}",
    ]


if __name__ == "__main__":
    run(main)
