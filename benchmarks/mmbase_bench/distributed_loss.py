"""What a rank of a distributed loss sends and computes, beside OpenCLIP's: counts, which no noise can trip.

Processes talk over gloo on this machine. Counted per rank, forward and backward: bytes that have to leave the rank
(:class:`mmbase.losses.traffic.Traffic`) and FLOPs of its matrix products (PyTorch's profiler). Gradients are checked
against float64 on the whole batch: the mean over ranks of the losses is the loss of the whole batch.

    mmbase bench distributed_loss --processes 1 2 4 --rows 256 --width 512 --output results
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmbase_bench.harness import reason
from mmbase_bench.loss_contenders import KINDS, Case
from mmbase_bench.loss_reference import float64_loss, relative_errors
from mmbase_bench.options import Parser, check_at_least, check_names, run
from mmbase_bench.report import align, record_environment, write_rows

OPENCLIP = "openclip"
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Matrix products of ATen, and which of their arguments is the left factor; the right one follows."""
TIMEOUT = timedelta(seconds=120)


def losses(kind: str, rank: int, world: int) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What is compared, by name; each with the arguments that serve it best."""
    from open_clip import loss as theirs

    from mmbase import losses as ours

    place: dict[str, Any] = {"rank": rank, "world_size": world}
    if kind == "softmax":
        gathered: dict[str, Any] = {"local_loss": True, "gather_with_grad": True} | place
        return {
            OPENCLIP: lambda: theirs.ClipLoss(**gathered),
            "mmbase": lambda: ours.ClipLoss(**gathered),
            "mmbase-no-stash": lambda: partial(
                ours.distributed_clip_loss, local_value=True, sum_gradients=True, stash_bytes=0
            ),
            "mmbase-ring": lambda: ours.ClipLoss(**gathered, exchange="ring"),
        }
    return {
        OPENCLIP: lambda: theirs.SigLipLoss(**place),
        "openclip-gather": lambda: theirs.SigLipLoss(**place, dist_impl="gather"),
        "mmbase": lambda: ours.SigLipLoss(**place),
        "mmbase-gather": lambda: ours.SigLipLoss(**place, dist_impl="gather"),
    }


def count(module: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[dict[str, int], float, list[Tensor]]:
    """Bytes sent by operation, matrix FLOPs and (loss, gradients) of one forward and backward pass on this rank.

    Two passes: under a dispatch mode such as Traffic a profile shows every product twice.
    """
    from mmbase.losses.traffic import Traffic

    with Traffic() as traffic:
        loss = module(*inputs)
        gradients = torch.autograd.grad(loss, inputs)
    with (
        silent_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
    ):
        torch.autograd.grad(module(*inputs), inputs)
    return dict(traffic.by_operation), matrix_flops(profile), [loss.detach(), *gradients]


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what is written to file descriptor 2: the profiler's library announces every start and stop there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def matrix_flops(profile: torch.profiler.profile) -> float:
    """FLOPs of the matrix products that a profile with shapes recorded, inside custom operators too."""
    total = 0.0
    for event in profile.events() or []:
        place = PRODUCTS.get(event.name.removeprefix("aten::"))
        if place is not None:
            left, right = event.input_shapes[place : place + 2]
            total += 2.0 * torch.Size(left).numel() * right[-1]
    return total


def worker(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    """One process: every loss on its share of the batch; its counts go to ``folder/RANK.json``."""
    warnings.simplefilter("ignore", FutureWarning)  # of the collectives that OpenCLIP calls
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        image, text, scale, bias = Case(kind, world * options.rows, options.width, "fp32").inputs(
            torch.device("cpu"), options.seed
        )
        own = slice(rank * options.rows, (rank + 1) * options.rows)
        # The sum over ranks of the losses is differentiated; it is `world` times the loss of the whole batch.
        expected = [each * world for each in float64_loss(kind, image, text, scale, bias)][1:3]
        mine = [each.detach()[own].clone().requires_grad_() for each in (image, text)]
        inputs = (*mine, scale) if bias is None else (*mine, scale, bias)
        for name, build in losses(kind, rank, world).items():
            row: dict[str, Any] = {"kind": kind, "processes": world, "contender": name}
            try:
                sent, flops, (_, image_grad, text_grad, *_) = count(build(), inputs)
                errors = relative_errors([None, image_grad, text_grad], [image, *(each[own] for each in expected)])
                row |= {"bytes_sent": sum(sent.values()), "flops": flops, "by_operation": sent}
                row |= {"image_error": errors["image"], "text_error": errors["text"]}
            except Exception as error:
                row["problem"] = reason(error)
            rows.append(row)
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(world: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `world` processes; a row per loss with the counts of the rank that has most, and ratios to OpenCLIP's."""
    with tempfile.TemporaryDirectory(prefix="mmbase-bench-") as folder:
        torch.multiprocessing.spawn(worker, (world, folder, options), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    rows = []
    for same in zip(*ranks, strict=True):
        row = max(same, key=lambda each: each.get("bytes_sent", -1))
        for key in ("flops", "image_error", "text_error"):
            if key in row:
                row[key] = max(each.get(key, 0.0) for each in same)
        row["problem"] = next((each["problem"] for each in same if "problem" in each), "")
        rows.append(row)
    for row in rows:
        base = next(each for each in rows if each["kind"] == row["kind"] and each["contender"] == OPENCLIP)
        for key in ("bytes_sent", "flops"):
            row[f"{key}_ratio"] = row[key] / base[key] if row.get(key) is not None and base.get(key) else None
    return rows


def main() -> None:
    """Count, print the table, and write the files where ``--output`` names a folder."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--rows", type=int, default=256, help="pairs per rank")
    parser.add_argument("--width", type=int, default=512, help="feature width")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="softmax, sigmoid; both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for distributed_loss.csv and distributed_loss.json")
    options = parser.parse()
    check_names("--kinds", options.kinds, KINDS)
    check_at_least(1, "--processes", options.processes)
    check_at_least(1, "--rows", [options.rows])
    check_at_least(1, "--width", [options.width])
    print(f"per rank, {options.rows} pairs of width {options.width} on each, fp32, forward+backward, gloo", flush=True)
    rows = [row for world in options.processes for row in measure(world, options)]
    heads = ["kind", "ranks", "contender", "MB sent", "x openclip", "GFLOP", "x openclip", "image err", "text err"]
    print(align([heads, *map(_cells, rows)], left=3))
    if options.output:
        header = {"measures": "bytes sent and matrix FLOPs per rank", "environment": record_environment(_CPU)}
        header |= {"rows": options.rows, "width": options.width}
        for path in write_rows(options.output, "distributed_loss", rows, header):
            print(f"wrote {path}")


_CPU = torch.device("cpu")


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str, unit: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] / unit, form)

    return [
        row["kind"],
        str(row["processes"]),
        row["contender"],
        number("bytes_sent", ".3f", 1e6),
        number("bytes_sent_ratio", ".3f"),
        number("flops", ".3f", 1e9),
        number("flops_ratio", ".3f"),
        number("image_error", ".1e"),
        number("text_error", ".1e"),
        row["problem"],
    ]


if __name__ == "__main__":
    run(main)
