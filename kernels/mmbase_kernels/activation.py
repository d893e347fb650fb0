"""The activation of a transformer's MLP with the bias before it, whose gradient then costs no pass of its own.

Letters: R rows, D width.

Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2; the last two are their approximations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_kernels.choice import nearest
from mmbase_kernels.dispatch import choose_measured, refuse_forward_mode

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def bias_activation(x: Tensor, bias: Tensor | None, activation: str, *, impl: str = "auto") -> Tensor:
    r"""``activation(x + bias)``, of a matrix product that has left its bias to this.

    .. math:: \mathrm{gelu}(h) = h\, \Phi(h), \quad
              \mathrm{gelu\_tanh}(h) = \tfrac h2 \Big(1 + \tanh\sqrt{\tfrac 2\pi}\,(h + 0.044715\, h^3)\Big), \quad
              \mathrm{quick\_gelu}(h) = h\, \sigma(1.702\, h)

    Args:
        x: ``[..., D]``, floating point; Triton takes float32, float16 and bfloat16, and computes in float32.
        bias: ``[D]``, floating point of any width, on the device of ``x``; or None.
        activation: ``gelu``, ``gelu_tanh`` or ``quick_gelu``.
        impl: ``triton`` (CUDA; both gradients in one pass over ``x`` and the incoming one, two runs are bitwise equal),
            ``torch`` (PyTorch's operations, any device), ``reference`` (the equation in float64), ``auto`` (what
            MMBASE_KERNELS asks for, else ``triton`` where a checked-in measurement says that it is faster, else
            ``torch``).

    Returns:
        The shape and dtype of ``x``. A second derivative of ``triton`` raises RuntimeError.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
    """
    _check(x, bias, activation)
    width = x.shape[-1]
    chosen = choose_measured("activation", impl, x, size=x.numel() // width, case=activation)
    if chosen == "triton":
        refuse_forward_mode("bias_activation", *(tensor for tensor in (x, bias) if tensor is not None))
        return _forward_op(x.reshape(-1, width), bias, activation).view(x.shape)
    if chosen == "reference":
        return _reference(x.double() if bias is None else x.double() + bias.double(), activation).to(x.dtype)
    return activate(x if bias is None else x + bias.to(x.dtype), activation)


def uses_fused(x: Tensor, activation: str, *, width: int, impl: str = "auto") -> bool:
    """Whether a linear layer should leave its bias to :func:`bias_activation`, rather than add it itself.

    It should not where that would run PyTorch's operations: a matrix product adds a bias at no cost.

    Args:
        x: input of the linear layer, ``[..., any]``; under autocast its output has autocast's dtype.
        activation: as in :func:`bias_activation`.
        width: of the layer's output.
        impl: as in :func:`bias_activation`.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot run.
    """
    _check_name(activation)
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    rows = math.prod(x.shape[:-1])
    return choose_measured("activation", impl, x, size=rows, case=activation, dtype=dtype, width=width) != "torch"


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation in PyTorch's operations, which ``torch.compile`` fuses with what is around them."""
    if activation == "quick_gelu":
        return F.silu(1.702 * x) / 1.702  # the same function, with fewer tensors kept for backward
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _check(x: Tensor, bias: Tensor | None, activation: str) -> None:
    _check_name(activation)
    for name, tensor in (("x", x),) if bias is None else (("x", x), ("bias", bias)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, not {getattr(tensor, 'layout', type(tensor))}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}: convert it")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x must be [..., D] with a width, not {list(x.shape)}")
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be [{x.shape[-1]}], as the last axis of x {list(x.shape)}, not {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"devices differ: bias on {bias.device}, x on {x.device}; move one of them")


def _check_name(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}{nearest(activation, ACTIVATIONS)}"
        )


def _reference(h: Tensor, activation: str) -> Tensor:
    """The equations, of float64 numbers."""
    if activation == "gelu":
        return h * torch.special.ndtr(h)
    if activation == "gelu_tanh":
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h * torch.sigmoid(1.702 * h)


@torch.library.custom_op("mmbase_kernels::bias_activation", mutates_args=())
def _forward_op(x_RD: Tensor, bias_D: Tensor | None, activation: str) -> Tensor:
    from mmbase_kernels import activation_triton

    return activation_triton.forward(x_RD, bias_D, activation)


@_forward_op.register_fake
def _(x_RD, bias_D, activation):
    return x_RD.new_empty(x_RD.shape)


@torch.library.custom_op("mmbase_kernels::bias_activation_backward", mutates_args=())
def _backward_op(
    grad_RD: Tensor, x_RD: Tensor, bias_D: Tensor | None, activation: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to x and to the bias, the latter empty unless asked for."""
    from mmbase_kernels import activation_triton

    return activation_triton.backward(grad_RD, x_RD, bias_D, activation, bias_gradient=bias_gradient)


@_backward_op.register_fake
def _(grad_RD, x_RD, bias_D, activation, bias_gradient):
    wanted = bias_D.new_empty(bias_D.shape) if bias_gradient else x_RD.new_empty(0)
    return x_RD.new_empty(x_RD.shape), wanted


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RD, bias_D, ctx.activation = inputs
    ctx.save_for_backward(x_RD, bias_D)


def _backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, bias_D = ctx.saved_tensors
    wanted = bias_D is not None and ctx.needs_input_grad[1]
    grad_x_RD, grad_bias_D = _backward_op(grad_RD, x_RD, bias_D, ctx.activation, wanted)
    return grad_x_RD, grad_bias_D if wanted else None, None


def _refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("bias_activation with impl='triton' has no second derivative; impl='reference' has one")


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_refuse_second_derivative)
