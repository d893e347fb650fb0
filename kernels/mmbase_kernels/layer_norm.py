"""LayerNorm over the last axis, alone or of the sum that a residual branch is added into.

Shapes: ``...`` any leading axes, R the rows they make, D width.

Source: Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450), equations 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_kernels.dispatch import choose_measured, refuse_forward_mode
from mmbase_kernels.layer_norm_tuning import WIDEST


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    r"""``(x - mean) / sqrt(variance + eps) * weight + bias``, with mean and variance of each row of the last axis.

    Args:
        x: ``[..., D]``, floating point; Triton takes float32, float16 and bfloat16.
        weight: ``[D]``, floating point, on the device of x; float32 may go with 16-bit x.
        bias: ``[D]``, the dtype of the weight, or None.
        eps: added to the variance, not negative.
        impl: ``triton`` (CUDA, D up to 8,192; statistics and sums in float32, two runs are bitwise equal), ``torch``
            (PyTorch's ``layer_norm``, any device), ``reference`` (the equation as written, in float64), ``auto`` (what
            MMBASE_KERNELS asks for, else ``triton`` where a checked-in measurement says that it is faster, else
            ``torch``).

    Returns:
        ``[..., D]`` in the dtype of x, also under autocast. A second derivative of ``triton`` raises RuntimeError.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit.
    """
    check_norm(x, weight, bias, eps)
    chosen = _choose("plain", impl, x)
    if chosen == "reference":
        return exact_layer_norm(x, weight, bias, eps)
    if chosen == "torch":
        return torch_layer_norm(x, weight, bias, eps)
    refuse_forward_mode("layer_norm", x, weight, *(() if bias is None else (bias,)))
    return _layer_norm_op(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``x + branch`` and its :func:`layer_norm`, which normalises the sum as it is rounded.

    Args:
        x: ``[..., D]``, floating point: the residual stream.
        branch: what is added to it, of the same shape and dtype.
        weight: as in :func:`layer_norm`.
        bias: as in :func:`layer_norm`.
        eps: as in :func:`layer_norm`.
        impl: as in :func:`layer_norm`; ``torch`` is the addition and ``layer_norm`` of PyTorch, to the bit.

    Returns:
        The sum and its LayerNorm, ``[..., D]`` in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit.
    """
    check_norm(x, weight, bias, eps)
    _check_branch(x, branch)
    chosen = _choose("add", impl, x)
    if chosen == "triton":
        refuse_forward_mode("add_layer_norm", x, branch, weight, *(() if bias is None else (bias,)))
        return _add_layer_norm_op(x, branch, weight, bias, eps)[:2]
    total = x + branch
    norm = exact_layer_norm if chosen == "reference" else torch_layer_norm
    return total, norm(total, weight, bias, eps)


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The equation in float64; returned in the dtype of x."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return (out if bias is None else out + bias.double()).to(x.dtype)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's, in the dtype of x also under autocast. On a CPU it takes float32 weights with 16-bit x itself."""
    if weight.dtype != x.dtype and not _takes_mixed(x, weight):
        wide = torch.promote_types(x.dtype, weight.dtype)
        bias = None if bias is None else bias.to(wide)
        return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)


def _takes_mixed(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's kernel is given 16-bit x and float32 weights: on a CPU, which saves two copies.

    Not where weights are learnt: that kernel adds up their gradients in 16 bits, 2 to 6 % off over 400 to 6,304 rows.
    """
    learnt = torch.is_grad_enabled() and weight.requires_grad
    return x.device.type == "cpu" and weight.dtype == torch.float32 and not learnt


def _choose(case: str, impl: str, x: Tensor) -> str:
    """The implementation for ``impl``."""
    width = x.shape[-1]
    obstacle = f"takes up to {WIDEST:,} columns, not {width:,}" if width > WIDEST else ""
    return choose_measured("layer_norm", impl, x, size=x.numel() // width, case=case, obstacle=obstacle)


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """Refuse what cannot be normalised, or not by these weights.

    Raises:
        ValueError: names the shape, dtype, device or value.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        raise ValueError(f"x must be a dense tensor, not {getattr(x, 'layout', type(x))}")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x must be [..., D] with a width, not {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}: convert it")
    for name, value in (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(value)}")
        if value.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [{x.shape[-1]}], as wide as x {list(x.shape)}, not {list(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {value.dtype}: convert it")
        if value.device != x.device:
            raise ValueError(f"devices differ: {name} on {value.device}, x on {x.device}; move one of them")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"dtypes differ: weight {weight.dtype}, bias {bias.dtype}; convert one of them")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, not {eps}: 1e-5 is usual")


def _check_branch(x: Tensor, branch: Tensor) -> None:
    if not isinstance(branch, Tensor) or branch.layout != torch.strided:
        raise ValueError(f"branch must be a dense tensor, not {getattr(branch, 'layout', type(branch))}")
    if branch.shape != x.shape:
        raise ValueError(f"shapes differ: x {list(x.shape)}, branch {list(branch.shape)}; they are added without more")
    if branch.dtype != x.dtype:
        raise ValueError(f"dtypes differ: x {x.dtype}, branch {branch.dtype}; convert one of them")
    if branch.device != x.device:
        raise ValueError(f"devices differ: branch on {branch.device}, x on {x.device}; move one of them")


@torch.library.custom_op("mmbase_kernels::layer_norm", mutates_args=())
def _layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm [..., D], means and reciprocal deviations [...]."""
    from mmbase_kernels import layer_norm_triton

    return layer_norm_triton.forward(x, None, weight, bias, eps)[1:]


@_layer_norm_op.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), *(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("mmbase_kernels::add_layer_norm", mutates_args=())
def _add_layer_norm_op(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and its LayerNorm [..., D], means and reciprocal deviations [...]."""
    from mmbase_kernels import layer_norm_triton

    total, out, mean, rstd = layer_norm_triton.forward(x, branch, weight, bias, eps)
    assert total is not None  # there is a branch
    return total, out, mean, rstd


@_add_layer_norm_op.register_fake
def _(x, branch, weight, bias, eps):
    return x.new_empty(x.shape), *_layer_norm_op(x, weight, bias, eps)


@torch.library.custom_op("mmbase_kernels::layer_norm_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, kinds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to what was normalised, x, and to weight and bias; with ``kinds`` 0 or 1 the rest is empty."""
    from mmbase_kernels import layer_norm_triton

    return layer_norm_triton.backward(grad_out, grad_total, x, weight, mean, rstd, kinds)


@_backward_op.register_fake
def _(grad_out, grad_total, x, weight, mean, rstd, kinds):
    return x.new_empty(x.shape), *(weight.new_empty(weight.shape if i < kinds else 0) for i in range(2))


def wanted_sums(weight: bool, bias: bool) -> int:
    """How many of the gradients to weight and bias are computed, in that order."""
    return 2 if bias else int(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _, weight_needed, bias_needed, _ = ctx.needs_input_grad
    kinds = wanted_sums(weight_needed, bias_needed)
    grad_x, grad_weight, grad_bias = _backward_op(grad_out, None, *ctx.saved_tensors, kinds)
    return grad_x, grad_weight if weight_needed else None, grad_bias if bias_needed else None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, inputs[2], mean, rstd)


def _backward_sum(ctx: Any, grad_total: Tensor | None, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Both addends have the same gradient; it is that of the sum alone where its LayerNorm is not used."""
    if grad_out is None:
        return grad_total, grad_total, None, None, None
    weight_needed, bias_needed = ctx.needs_input_grad[2:4]
    kinds = wanted_sums(weight_needed, bias_needed)
    grad_x, grad_weight, grad_bias = _backward_op(grad_out, grad_total, *ctx.saved_tensors, kinds)
    return grad_x, grad_x, grad_weight if weight_needed else None, grad_bias if bias_needed else None, None


def refuse_second_derivative(what: str) -> Callable[..., Any]:
    """The derivative of a backward operator: RuntimeError."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{what} with impl='triton' has no second derivative; impl='torch' has one")

    return refuse


_layer_norm_op.register_autograd(_backward, setup_context=_save)
_add_layer_norm_op.register_autograd(_backward_sum, setup_context=_save_sum)
_backward_op.register_autograd(refuse_second_derivative("layer_norm"))
