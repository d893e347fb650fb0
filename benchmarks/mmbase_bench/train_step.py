"""One training step, ours against OpenCLIP's: the same ViT config, weights, batch, precision and threads.

A step is forward of both towers, loss (each library's own) and backward. The two alternate in one process, in swapped
order from pair to pair, so that a machine whose speed swings slows both alike; the ratio of a pair is what is compared.

    python -m mmbase_bench.train_step --models ViT-B-32 ViT-S-16 --batch 8 --pairs 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmbase.files import write_atomically
from mmbase.training.run import environment
from mmbase_bench.harness import synchronise


@dataclass(frozen=True)
class Result:
    """Medians over the pairs."""

    model: str
    precision: str
    batch: int
    openclip_s: float
    ours_s: float
    ratio: float
    """Median over pairs of our time divided by OpenCLIP's; below 1 ours is faster."""
    cpu_ratio: float
    """The same of the processor time of all threads, which other programs on the machine disturb less."""


def measure(name: str, *, batch: int, precision: str, pairs: int, device: str = "cpu") -> Result:
    """Time `pairs` alternating steps of one model in ``fp32`` or ``bf16`` (autocast); the first pair is not counted."""
    ours, theirs = build_pair(name, device)
    image, text = batch_of(name, batch, device)
    steps = {"ours": step_of(ours, our_loss()), "openclip": step_of(theirs, openclip_loss())}
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "openclip": []}
    for pair in range(pairs + 1):
        order = ("ours", "openclip") if pair % 2 else ("openclip", "ours")
        for which in order:
            taken = steps[which](image, text, precision)
            if pair:
                times[which].append(taken)
    both = list(zip(times["ours"], times["openclip"], strict=True))
    return Result(
        name,
        precision,
        batch,
        openclip_s=statistics.median(wall for wall, _ in times["openclip"]),
        ours_s=statistics.median(wall for wall, _ in times["ours"]),
        ratio=statistics.median(ours[0] / theirs[0] for ours, theirs in both),
        cpu_ratio=statistics.median(ours[1] / theirs[1] for ours, theirs in both),
    )


def build_pair(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """Our model and OpenCLIP's with the same weights, in training mode."""
    import open_clip

    from mmbase.models.openclip import from_openclip
    from mmbase.models.zoo import openclip_config_of

    theirs = open_clip.create_model(name, output_dict=True)
    copied = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    ours = from_openclip(openclip_config_of(name), copied)
    return ours.to(device).train(), theirs.to(device).train()


def batch_of(name: str, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Random pixels, and random texts of full length that end with the highest id."""
    from mmbase.models.zoo import config_of

    config = config_of(name)
    if config is None:
        raise SystemExit(f"{name} runs through the adapter: there is nothing to compare")
    image = torch.randn(batch, 3, *config.vision.image_hw, device=device)
    text = torch.randint(1, config.text.vocab_size - 1, (batch, config.text.context_length), device=device)
    text[:, -1] = config.text.eos_id if config.text.pool == "eos" else config.text.vocab_size - 1
    return image, text


def our_loss() -> nn.Module:
    """InfoNCE of mmbase."""
    from mmbase.losses.contrastive import ContrastiveLoss

    return ContrastiveLoss()


def openclip_loss() -> nn.Module:
    """InfoNCE of OpenCLIP."""
    from open_clip.loss import ClipLoss

    return ClipLoss()


def step_of(model: nn.Module, loss: nn.Module) -> Callable[[Tensor, Tensor, str], tuple[float, float]]:
    """A function that runs one step; its seconds by the clock and of the processor, without dropping gradients."""

    def step(image: Tensor, text: Tensor, precision: str) -> tuple[float, float]:
        synchronise(image.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(**model(image, text))
        value.backward()
        synchronise(image.device)
        taken = time.perf_counter() - start, time.process_time() - start_cpu
        model.zero_grad(set_to_none=True)
        return taken

    return step


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-S-16"], help="names of OpenCLIP's")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=8, help="image-text pairs per step")
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures and the machine they are of")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: list[Result] = []
    print("| model | precision | batch | OpenCLIP, s | ours, s | ratio | CPU ratio |\n|---|---|---|---|---|---|---|")
    for name in options.models:
        for precision in options.precisions:
            result = measure(name, batch=options.batch, precision=precision, pairs=options.pairs, device=options.device)
            results.append(result)
            print(
                f"| {name} | {precision} | {result.batch} | {result.openclip_s:.3f} | {result.ours_s:.3f} "
                f"| {result.ratio:.2f} | {result.cpu_ratio:.2f} |",
                flush=True,
            )
    if options.output:
        record = {
            "command": "python -m mmbase_bench.train_step " + " ".join(sys.argv[1:]),
            "environment": environment(torch.device(options.device)),
            "results": [asdict(result) for result in results],
        }
        write_atomically(options.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
