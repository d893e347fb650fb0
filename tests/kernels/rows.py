"""Rows to normalise for tests of LayerNorm and of the head, and what is demanded of an implementation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmbase_kernels import add_layer_norm, head, layer_norm

from .sequences import TOLERANCE

WIDTHS = [1, 7, 33, 100, 768, 1000, 1280, 1664, 4096]
NARROW = [torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """An operator's leaves by name, the gradients to its outputs, and its equation in PyTorch."""

    names: tuple[str, ...]
    leaves: list[torch.Tensor | None]
    grads: list[torch.Tensor]
    operator: Callable
    equation: Callable
    constants: dict = {}  # noqa: RUF012 (a NamedTuple's default)

    def run(self, **options):
        """Outputs, then the gradients to the leaves that there are."""
        return outputs_and_gradients(
            lambda *leaves: self.operator(*leaves, **self.constants, **options), self.leaves, self.grads
        )

    def by_pytorch(self):
        """The same with PyTorch's operations at the same dtype."""
        return outputs_and_gradients(lambda *leaves: self.equation(*leaves, **self.constants), self.leaves, self.grads)

    def exactly(self):
        """The same in float64."""
        leaves = [None if leaf is None else leaf.double() for leaf in self.leaves]
        dtype = self.leaves[0].dtype

        def equation(*leaves):
            return self.equation(*leaves, **self.constants, rounded=dtype)

        return outputs_and_gradients(equation, leaves, self.grads)


def outputs_and_gradients(function, leaves, grads):
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs)])
    return [o.detach() for o in outs] + list(gradients)


def norm_equation(x, weight, bias, *, eps=1e-5, rounded=None):
    """PyTorch's, in float32 where a device has none for different dtypes."""
    if weight.dtype != x.dtype:
        bias = None if bias is None else bias.float()
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias, eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_norm_equation(x, branch, weight, bias, *, eps=1e-5, rounded=None):
    """The sum is normalised as it is rounded to ``rounded``, through which gradients pass."""
    total = x + branch
    if rounded is not None:
        total = total + (total.to(rounded).to(total.dtype) - total).detach()
    return total, norm_equation(total, weight, bias, eps=eps)


def head_equation(
    x, norm_weight, norm_bias, weight, bias, *, token, rounded=None, eps=1e-5, normalize=True
):  # fmt: skip
    """As a tower without fused operations has it."""
    if x.ndim == 2:
        picked = x.index_select(0, token)
    else:
        picked = x[torch.arange(len(x), device=x.device), token] if isinstance(token, torch.Tensor) else x[:, token]
    features = norm_equation(picked, norm_weight, norm_bias, eps=eps)
    if weight is not None:
        features = F.linear(features, weight, bias)
    return (
        F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1) if normalize else features
    )


def norm_case(shape, width, dtype, *, add, seed=0, mean=0.5, bias=True, weights=None, device="cpu", **constants):
    """LayerNorm of unit normal rows about ``mean``, with ``add`` of the sum of two."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, about=0.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator) + about).to(device, dtype)

    weights = weights or dtype
    rows = [("x", draw(*shape, width, about=mean)), ("branch", draw(*shape, width))][: 1 + add]
    leaves = [*rows, ("weight", draw(width, about=1.0, dtype=weights)), ("bias", draw(width, dtype=weights))]
    names = tuple(name for name, _ in leaves if bias or name != "bias")
    leaves = [leaf if name in names else None for name, leaf in leaves]
    grads = [draw(*shape, width) for _ in range(1 + add)]
    operator, equation = (add_layer_norm, add_norm_equation) if add else (layer_norm, norm_equation)
    return Case(names, leaves, grads, operator, equation, constants)


def head_case(
    x_shape, width, embed, token, dtype, *, seed=0, bias=True, weights=None, device="cpu", **constants
):  # fmt: skip
    """The head of tokens [*x_shape, width]; with ``embed`` None without a projection."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, about=0.0, scale=1.0, dtype=dtype):
        return (scale * torch.randn(*shape, generator=generator) + about).to(device, dtype)

    weights = weights or dtype
    leaves = {
        "x": draw(*x_shape, width, about=0.5),
        "norm_weight": draw(width, about=1.0, dtype=weights),
        "norm_bias": draw(width, dtype=weights) if bias else None,
        "projection_weight": None if embed is None else draw(embed, width, scale=width**-0.5),
        "projection_bias": None if embed is None or not bias else draw(embed, scale=0.1),
    }
    batch = len(token) if isinstance(token, torch.Tensor) else x_shape[0]
    grads = [draw(batch, embed or width, dtype=torch.float32)]
    names = tuple(name for name, leaf in leaves.items() if leaf is not None)
    constants["token"] = token.to(device) if isinstance(token, torch.Tensor) else token
    return Case(names, list(leaves.values()), grads, _head, head_equation, constants)


def _head(x, norm_weight, norm_bias, weight, bias, *, token, **options):
    return head(x, token, norm_weight, norm_bias, weight, bias, **options)


def assert_close_to_float64(case, *, impl, tolerance=None):
    """Outputs and gradients within TOLERANCE of float64 and, of ``triton``, within 1.5 times PyTorch's error.

    To the second bound comes a tenth of TOLERANCE: where PyTorch happens to be exact, nobody else need be. To both
    comes what a gradient that cancels to nothing, as one column's, leaves of its terms.
    """
    dtype = case.leaves[0].dtype
    got, want, peer = case.run(impl=impl), case.exactly(), case.by_pytorch()
    outputs = tuple(f"output {i}" for i in range(len(case.grads)))
    terms = max(float(grad.double().norm()) for grad in case.grads)
    for name, ours, b, other in zip((*outputs, *case.names), got, want, peer, strict=True):
        assert ours.dtype == other.dtype and ours.shape == b.shape, name
        error, theirs = (float((x.double() - b).norm()) for x in (ours, other))
        norm = float(b.norm())
        demanded = tolerance or max(TOLERANCE[dtype], TOLERANCE[ours.dtype])
        bound = demanded * max(norm, 0.0 if name in outputs else 1e-2 * terms)
        assert error <= bound, (name, error / max(norm, 1e-30), theirs / max(norm, 1e-30))
        if impl == "triton":
            assert error <= 1.5 * theirs + 0.1 * bound, (name, error, theirs, norm)
