"""A whole transformer block of a vision tower, ours against OpenCLIP's, eager and compiled, with the same weights.

16 bits as in training: under autocast, float32 weights, a 16-bit residual stream. Everybody is checked against
float64, then peak memory is measured (on a GPU), then all are timed in turns in one process. "mmbase" runs what a user
gets; "mmbase-triton" with MMBASE_KERNELS=triton. "x floor" is the median time over the least that FLOPs and bytes
allow at the measured ceilings; "x base" is the time over OpenCLIP's block, eager.

    mmbase bench block
    mmbase bench block --device cuda --shapes vit-b-16 --dtypes bf16 --output results
"""

from __future__ import annotations

import argparse
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbase.models.layers import Block
from mmbase_bench.harness import Work
from mmbase_bench.options import DTYPES, Parser, check_at_least, check_names, run
from mmbase_bench.row_case import Quantities, RowCase
from mmbase_bench.session import Row, add_options, check_options, run_cases, settings_of
from mmbase_bench.side_by_side import BOTH, FORWARD, Built, Contender, Inputs, Settings
from mmbase_bench.verdict import against_best, summary
from mmbase_kernels.choice import ENVIRONMENT

PLACES = (
    ("ln_1.weight", "norm1.weight"),
    ("ln_1.bias", "norm1.bias"),
    ("attn.in_proj_weight", "attn.qkv.weight"),
    ("attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.out_proj.weight", "attn.proj.weight"),
    ("attn.out_proj.bias", "attn.proj.bias"),
    ("ln_2.weight", "norm2.weight"),
    ("ln_2.bias", "norm2.bias"),
    ("mlp.c_fc.weight", "mlp.fc1.weight"),
    ("mlp.c_fc.bias", "mlp.fc1.bias"),
    ("mlp.c_proj.weight", "mlp.fc2.weight"),
    ("mlp.c_proj.bias", "mlp.fc2.bias"),
)
"""A block's parameters by OpenCLIP's names and by ours, in the order of the inputs' parameters."""


@dataclass(frozen=True)
class Case(RowCase):
    """One block; B images, N tokens of each, H heads, D width."""

    shape: str
    batch: int
    tokens: int
    width: int
    heads: int
    dtype: str = "fp32"

    @property
    def title(self) -> str:
        """The case in a line."""
        return f"block {self.shape} {self.batch} x {self.tokens} x {self.width} {self.dtype}"

    def labels(self) -> dict[str, Any]:
        """Columns of the result."""
        return {
            "shape": self.shape,
            "batch": self.batch,
            "tokens": self.tokens,
            "width": self.width,
            "heads": self.heads,
            "dtype": self.dtype,
        }

    def contenders(self, device: torch.device) -> Mapping[str, Contender]:
        """All there are."""
        return CONTENDERS

    def quantities(self) -> Quantities:
        """All weights' gradients are measured together."""
        return Quantities(("out",), ("dx",), ("dweights",) * len(PLACES))

    @cached_property
    def weights(self) -> list[Tensor]:
        """Parameters on the CPU in the order of PLACES, drawn so that no branch is small or large."""
        width, generator = self.width, torch.Generator().manual_seed(1)
        shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        return [
            weight / weight.shape[1] ** 0.5 if weight.ndim == 2 else 0.1 * weight + ("weight" in name)
            for weight, (name, _) in zip(drawn, PLACES)
        ]

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        """Normal numbers for the residual stream and the gradient that comes back."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = self.batch, self.tokens, self.width
        x_BND, grad_BND = (
            torch.randn(shape, device=device, dtype=DTYPES[self.dtype], generator=generator) for _ in range(2)
        )
        parameters = tuple(weight.to(device).requires_grad_() for weight in self.weights)
        return Inputs((x_BND.requires_grad_(),), parameters, (grad_BND,))

    def equation(self, index: Tensor, *leaves: Tensor) -> Tensor:
        """A pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)), with GELU."""
        x_BND, gain1, shift1, qkv, qkv_bias, proj, proj_bias, gain2, shift2, fc1, fc1_bias, fc2, fc2_bias = leaves
        normed = F.layer_norm(x_BND, gain1.shape, gain1, shift1, 1e-5)
        packed = (normed @ qkv.T + qkv_bias).unflatten(-1, (3, self.heads, -1))
        q_BHND, k_BHND, v_BHND = packed.permute(2, 0, 3, 1, 4)
        scores = (q_BHND @ k_BHND.mT / q_BHND.shape[-1] ** 0.5).softmax(-1)
        x_BND = x_BND + (scores @ v_BHND).transpose(1, 2).flatten(2) @ proj.T + proj_bias
        normed = F.layer_norm(x_BND, gain2.shape, gain2, shift2, 1e-5)
        return x_BND + F.gelu(normed @ fc1.T + fc1_bias) @ fc2.T + fc2_bias

    def scratch(self, inputs: Inputs) -> int:
        """About forty tensors of a row's size and six matrices of scores."""
        return 8 * (40 * self.tokens * self.width + 6 * self.heads * self.tokens**2)

    def work(self, direction: str) -> Work:
        """Linear layers (12 D**2 weights) and attention's products; stream, output and weights moved once a pass."""
        rows, item = float(self.batch * self.tokens), DTYPES[self.dtype].itemsize
        linear, pairs = 2 * rows * 12 * self.width**2, 2 * rows * self.tokens * self.width
        stream, weights = rows * self.width * item, 4.0 * 12 * self.width**2
        forward = Work(linear + 2 * pairs, 2 * stream + weights)
        backward = Work(2 * linear + 5 * pairs, 3 * stream + 2 * weights)
        if direction == BOTH:
            return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return forward if direction == FORWARD else backward


@contextmanager
def preference(value: str | None) -> Iterator[None]:
    """MMBASE_KERNELS as given, meanwhile; None: unset."""
    before = os.environ.pop(ENVIRONMENT, None)
    if value is not None:
        os.environ[ENVIRONMENT] = value
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def built(make: Callable[[Case], nn.Module], *, compiled: bool = False, kernels: str | None = None) -> Any:
    """A contender's way to be built: a module with the case's weights, called as a training step calls it."""

    def build(case: Case, device: torch.device, mode: str) -> Built:
        module = make(case)
        names = [names[isinstance(module, Block)] for names in PLACES]
        module.load_state_dict(dict(zip(names, case.weights)), strict=True)
        module = module.to(device).train()
        parameters = dict(module.named_parameters())

        def block(x_BND: Tensor) -> Tensor:
            return module(x_BND)

        function: Callable[[Tensor], Tensor] = block
        if compiled:
            # graphs are kept by code object, and guarded by what a module is like, not by which one it is
            code = block.__code__.replace(co_name=f"block_{make.__name__}_{kernels}")
            named = types.FunctionType(code, globals(), code.co_name, None, block.__closure__)
            function = torch.compile(named, dynamic=False, fullgraph=True, mode=mode)

        def call(x_BND: Tensor) -> Tensor:
            enabled = case.dtype != "fp32"
            with preference(kernels), torch.autocast(device.type, DTYPES[case.dtype], enabled=enabled):
                return function(x_BND)

        return Built(call, own=tuple(parameters[name] for name in names))

    return build


def openclip(case: Case) -> nn.Module:
    """OpenCLIP's."""
    from open_clip.transformer import ResidualAttentionBlock

    return ResidualAttentionBlock(case.width, case.heads)


def mmbase(case: Case) -> nn.Module:
    """Ours."""
    return Block(case.width, case.heads)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("openclip", built(openclip)),
        Contender("openclip-compiled", built(openclip, compiled=True), compiled=True),
        Contender("mmbase", built(mmbase), rival=False),
        Contender("mmbase-compiled", built(mmbase, compiled=True), rival=False, compiled=True),
        Contender("mmbase-triton", built(mmbase, kernels="triton"), rival=False),
        Contender("mmbase-triton-compiled", built(mmbase, compiled=True, kernels="triton"), rival=False, compiled=True),
    )
}
BASELINE = "openclip"
RUN = {"all": list(CONTENDERS), "cuda": list(CONTENDERS), "cpu": ["openclip", "mmbase"]}
SHAPES = {
    case.shape: case
    for case in (
        Case("vit-b-16", 1024, 197, 768, 12),
        Case("vit-b-32", 4096, 50, 768, 12),
        Case("vit-l-14", 512, 257, 1024, 16),
    )
}
"""In the order of their importance, with the batch that fills a large GPU."""
ON_A_CPU = {"vit-b-16": 4, "vit-b-32": 8}
"""Shapes and batches that run unless others are asked for."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked, defaults of the device filled in."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", help=", ".join(SHAPES))
    parser.add_argument("--batch", type=int, help="images, in place of each shape's own number")
    add_options(parser, CONTENDERS)
    options = parser.parse(arguments)
    check_options(options, RUN)
    options.shapes = options.shapes or list(ON_A_CPU if options.device.type == "cpu" else SHAPES)
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


def verdict(rows: Sequence[Row], settings: Settings, result: str) -> tuple[list[str], list[Row]]:
    """How much faster ours is, eager against eager and compiled against compiled; a block has no row in the table."""
    lines = []
    for ours in CONTENDERS:
        if ours.startswith("mmbase"):
            theirs = "openclip-compiled" if CONTENDERS[ours].compiled else "openclip"
            lines += summary(against_best(rows, ours, [theirs]), ours, theirs)
    return lines, []


def main() -> None:
    """Measure every case, print its tables and the verdict, write the files where ``--output`` names a folder."""
    options = parse()
    run_cases("transformer block", settings_of("block", options, BASELINE), cases(options), options, verdict)


if __name__ == "__main__":
    run(main)
