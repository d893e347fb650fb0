"""Who is compared on what lies between the matrix products of a tower, and the bytes that it moves.

16-bit contenders run under autocast with float32 parameters, as in training.

Letters: B sequences, N tokens of each, D width, E width of the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_bench.harness import Work
from mmbase_bench.options import DTYPES
from mmbase_bench.row_case import Quantities, RowCase
from mmbase_bench.side_by_side import BOTH, FORWARD, Built, Contender, Inputs
from mmbase_kernels import add_layer_norm, head, layer_norm
from mmbase_kernels.activation import ACTIVATIONS, activate, bias_activation

EPS = 1e-5
OPERATORS = ("add_layer_norm", "layer_norm", *ACTIVATIONS, "head")


@dataclass(frozen=True)
class Case(RowCase):
    """One of these operators on the tokens of one tower."""

    operator: str
    shape: str
    batch: int
    tokens: int
    width: int
    """Of the tokens; the activation's input is four times as wide."""
    features: int
    """Of the head."""
    each: bool = False
    """Whether every sequence has its own token for the head, as texts do."""
    dtype: str = "fp32"

    @property
    def last(self) -> int:
        """The last axis of the operator's input."""
        return 4 * self.width if self.operator in ACTIVATIONS else self.width

    @property
    def title(self) -> str:
        """The case in a line."""
        return f"{self.operator} {self.shape} {self.batch} x {self.tokens} x {self.last} {self.dtype}"

    def labels(self) -> dict[str, Any]:
        """Columns of the result."""
        return {
            "operator": self.operator,
            "shape": self.shape,
            "batch": self.batch,
            "tokens": self.tokens,
            "width": self.last,
            "dtype": self.dtype,
        }

    def contenders(self, device: torch.device) -> Mapping[str, Contender]:
        """Those for this operator."""
        return NORMS if "norm" in self.operator else OTHERS

    def quantities(self) -> Quantities:
        """The names of its outputs and gradients."""
        if self.operator in ACTIVATIONS:
            return Quantities(("out",), ("dx",), ("dbias",))
        if self.operator == "add_layer_norm":
            return Quantities(("sum", "out"), ("dx", "dbranch"), ("dweight", "dbias"))
        projected = ("dprojection",) if self.operator == "head" else ()
        return Quantities(("out",), ("dx",), ("dweight", "dbias", *projected))

    @cached_property
    def token(self) -> Tensor | int:
        """The one that the head takes: the first, or int64 [B] on the CPU."""
        if not self.each:
            return 0
        return torch.randint(self.tokens, (self.batch,), generator=torch.Generator().manual_seed(0))

    def token_on(self, device: torch.device) -> Tensor | int:
        """The same on a device."""
        return self.token.to(device) if isinstance(self.token, Tensor) else self.token

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        """Normal numbers: tokens of mean 0.5, as a residual stream has one; weights near 1, biases near 0."""
        generator = torch.Generator(device).manual_seed(seed)

        def rows(*shape: int, mean: float = 0.0) -> Tensor:
            drawn = torch.randn(self.batch, *shape, device=device, dtype=DTYPES[self.dtype], generator=generator)
            return drawn + mean if mean else drawn

        fixed = torch.Generator(device).manual_seed(1)
        drawn = [0.1 * torch.randn(self.last, device=device, generator=fixed) for _ in range(2)]
        parameters = [drawn[0]] if self.operator in ACTIVATIONS else [1 + drawn[0], drawn[1]]
        x = rows(self.tokens, self.last, mean=0.5)
        gradients = [rows(self.tokens, self.last)]
        tokens = [x]
        if self.operator == "add_layer_norm":
            tokens.append(rows(self.tokens, self.last))
            gradients.append(rows(self.tokens, self.last))
        if self.operator == "head":
            projection = torch.randn(self.features, self.width, device=device, generator=fixed)
            parameters.append(projection / self.width**0.5)
            gradients = [rows(self.features).float()]
        for tensor in (*tokens, *parameters):
            tensor.requires_grad_()
        return Inputs(tuple(tokens), tuple(parameters), tuple(gradients))

    def equation(self, index: Tensor, *leaves: Tensor) -> Any:
        """The operator as it is defined."""
        x, *rest = leaves
        if self.operator in ACTIVATIONS:
            return _activation(x + rest[0], self.operator)
        if self.operator == "add_layer_norm":
            branch, weight, bias = rest
            return x + branch, _norm(x + branch, weight, bias)
        if self.operator == "layer_norm":
            return _norm(x, *rest)
        weight, bias, projection_ED = rest
        token = self.token_on(x.device)
        chosen_BD = x[:, token] if isinstance(token, int) else x[torch.arange(len(x), device=x.device), token[index]]
        features_BE = _norm(chosen_BD, weight, bias) @ projection_ED.T
        return features_BE / features_BE.norm(dim=-1, keepdim=True)

    def scratch(self, inputs: Inputs) -> int:
        """About ten float64 tensors of a row's size."""
        return 10 * 8 * self.tokens * self.last

    def work(self, direction: str) -> Work:
        """Each tensor moved once a pass; of the head all of the tokens' gradient, most of it zeros."""
        item = DTYPES[self.dtype].itemsize
        unit = float(self.batch * self.tokens * self.last * item)
        if self.operator == "head":
            product = 2.0 * self.batch * self.width * self.features
            small = float(self.batch * (self.width * item + self.features * 4) + self.features * self.width * 4)
            forward, backward = Work(product, small), Work(2 * product, unit + 2 * small)
        else:
            moved = {"add_layer_norm": (4, 4)}.get(self.operator, (2, 3))
            forward, backward = (Work(0.0, count * unit) for count in moved)
        if direction == BOTH:
            return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return forward if direction == FORWARD else backward


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def _activation(h: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h * torch.sigmoid(1.702 * h)


class _BiasOfProduct(torch.autograd.Function):
    """A bias that the matrix product before has added at no cost; its gradient is summed as a linear layer's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_D: Tensor, biased: Tensor) -> Tensor:
        ctx.dtype = bias_D.dtype
        return biased.view_as(biased)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        return grad, grad.flatten(0, -2).sum(0).to(ctx.dtype), None


Function = Callable[..., Any]


def lines(case: Case, device: torch.device) -> Function:
    """The operator in PyTorch's operations, as a tower without kernels of its own has them."""
    token, dtype = case.token_on(device), DTYPES[case.dtype]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS).to(dtype)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm(x, weight, bias)

    def add(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch
        return total, norm(total, weight, bias)

    def features(x: Tensor, weight: Tensor, bias: Tensor, projection_ED: Tensor) -> Tensor:
        chosen_BD = x[:, token] if isinstance(token, int) else x[torch.arange(len(x), device=device), token]
        return F.normalize(F.linear(norm(chosen_BD, weight, bias), projection_ED).float(), dim=-1)

    def activated(x: Tensor, bias_D: Tensor) -> Tensor:
        return activate(x + bias_D.to(dtype), case.operator)

    return {"layer_norm": plain, "add_layer_norm": add, "head": features}.get(case.operator, activated)


def under_autocast(case: Case, device: torch.device, function: Function) -> Built:
    """As a training step calls it."""

    def call(*leaves: Tensor) -> Any:
        with torch.autocast(device.type, DTYPES[case.dtype], enabled=case.dtype != "fp32"):
            return function(*leaves)

    return Built(call)


def eager(case: Case, device: torch.device, mode: str) -> Built:
    """The lines as they are; of an activation with the bias already added, as a linear layer does."""
    if case.operator not in ACTIVATIONS:
        return under_autocast(case, device, lines(case, device))
    biased: dict[int, Tensor] = {}

    def activated(x: Tensor, bias_D: Tensor) -> Tensor:
        if x.data_ptr() not in biased:  # once for each input set, which outlive this
            biased[x.data_ptr()] = (x + bias_D.to(x.dtype)).detach()
        return activate(_BiasOfProduct.apply(x, bias_D, biased[x.data_ptr()]), case.operator)

    return under_autocast(case, device, activated)


def narrow(case: Case, device: torch.device, mode: str) -> Built:
    """LayerNorm with weights of the tokens' own 16 bits, outside autocast."""
    if case.dtype == "fp32":
        raise ValueError("in fp32 it is the same as eager")
    function, dtype = lines(case, device), DTYPES[case.dtype]
    return Built(lambda *leaves: function(*(leaf.to(dtype) for leaf in leaves)))


def compiled(case: Case, device: torch.device, mode: str) -> Built:
    """What torch.compile makes of the lines."""
    function = torch.compile(lines(case, device), dynamic=False, fullgraph=True, mode=mode)
    return under_autocast(case, device, function)


def mmbase(impl: str) -> Callable[[Case, torch.device, str], Built]:
    """Our operator."""

    def build(case: Case, device: torch.device, mode: str) -> Built:
        token = case.token_on(device)

        def features(x: Tensor, weight: Tensor, bias: Tensor, projection_ED: Tensor) -> Tensor:
            return head(x, token, weight, bias, projection_ED, eps=EPS, impl=impl)

        def activated(x: Tensor, bias_D: Tensor) -> Tensor:
            return bias_activation(x, bias_D, case.operator, impl=impl)

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return layer_norm(x, weight, bias, eps=EPS, impl=impl)

        def add(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return add_layer_norm(x, branch, weight, bias, eps=EPS, impl=impl)

        named: dict[str, Function] = {"layer_norm": plain, "add_layer_norm": add, "head": features}
        return under_autocast(case, device, named.get(case.operator, activated))

    return build


EAGER = Contender("eager", eager)
COMPILED = Contender("compiled", compiled, compiled=True)
OURS = (
    Contender("mmbase-torch", mmbase("torch"), rival=False),
    Contender("mmbase-triton", mmbase("triton"), rival=False),
    Contender("mmbase-auto", mmbase("auto"), rival=False),
)
NORMS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        EAGER,
        Contender("eager-16-bit", narrow, rival=False, note="weights rounded to 16 bits"),
        COMPILED,
        *OURS,
    )
}
OTHERS: dict[str, Contender] = {contender.name: contender for contender in (EAGER, COMPILED, *OURS)}
