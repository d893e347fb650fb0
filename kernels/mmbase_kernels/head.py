"""From the tokens of a tower to its features: one token of each sequence, LayerNorm, projection, unit length.

Letters: B sequences, N tokens of each, P tokens of a packed batch, D width, E width of the features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_kernels.dispatch import choose_measured, refuse_forward_mode
from mmbase_kernels.layer_norm import (
    check_norm,
    exact_layer_norm,
    layer_norm,
    refuse_second_derivative,
    torch_layer_norm,
    wanted_sums,
)
from mmbase_kernels.layer_norm_tuning import WIDEST


def head(
    x: Tensor,
    token: Tensor | int,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Features of each sequence: its end-of-text or class token, normalised, projected and brought to unit length.

    The product is PyTorch's in every implementation, and follows its autocast and TF32 settings.

    Args:
        x: ``[B, N, D]``, or ``[P, D]`` of a packed batch. Floating point; Triton takes float32, float16 and bfloat16.
        token: position in its sequence of the token that is taken: one for all, where -1 is the last, or int64 or int32
            ``[B]`` of each; of a packed batch ``[B]`` places among the P.
        norm_weight: ``[D]``; float32 may go with 16-bit x.
        norm_bias: ``[D]``, or None.
        projection_weight: ``[E, D]``, or None: the features are the normalised tokens.
        projection_bias: ``[E]``, or None.
        eps: added to the variance of LayerNorm.
        normalize: divide by the length, at least 1e-12, in float32.
        impl: ``triton`` (CUDA, D and E up to 8,192; two runs are bitwise equal), ``torch`` (any device), ``reference``
            (as written, in float64), ``auto`` (what MMBASE_KERNELS asks for, else ``triton`` where a checked-in
            measurement says that it is faster, else ``torch``).

    Returns:
        ``[B, E]``: with ``normalize`` float32, or float64 of float64; without it what the projection gives.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit; the values of ``token`` are read on the CPU only.
            On a GPU a token beyond its sequence gives features that are NaN with ``triton``, and stops the program by a
            device-side assertion otherwise.
    """
    check_norm(x, norm_weight, norm_bias, eps)
    token = _check_token(x, token)
    _check_projection(x, projection_weight, projection_bias)
    chosen = _choose(impl, x, token, projection_weight)
    if chosen == "reference":
        weight, bias = (None if value is None else value.double() for value in (projection_weight, projection_bias))
        rows_BD = exact_layer_norm(_take(x, token).double(), norm_weight, norm_bias, eps)
        features_BE = _project(rows_BD, weight, bias)
        features_BE = F.normalize(features_BE, dim=-1) if normalize else features_BE
        return features_BE.to(torch.promote_types(x.dtype, torch.float32) if normalize else x.dtype)
    if chosen == "torch":
        rows_BD = torch_layer_norm(_take(x, token), norm_weight, norm_bias, eps)
        features_BE = _project(rows_BD, projection_weight, projection_bias)
        if not normalize:
            return features_BE
        return F.normalize(features_BE.to(torch.promote_types(features_BE.dtype, torch.float32)), dim=-1)
    leaves = x, norm_weight, norm_bias, projection_weight, projection_bias
    refuse_forward_mode("head", *(leaf for leaf in leaves if leaf is not None))
    if x.ndim == 2:  # places may repeat: indexing adds up their gradients, in order
        rows_BD = layer_norm(_take(x, token), norm_weight, norm_bias, eps=eps, impl="triton")
    else:
        tokens_B, one = (token, 0) if isinstance(token, Tensor) else (None, token)
        rows_BD, *_ = _gather_op(x, tokens_B, one, norm_weight, norm_bias, eps)
    features_BE = _project(rows_BD, projection_weight, projection_bias)
    return _unit_length_op(features_BE)[0] if normalize else features_BE


def _take(x: Tensor, token: Tensor | int) -> Tensor:
    """The tokens [B, D] that are taken."""
    if x.ndim == 2:
        return x[token]
    if isinstance(token, Tensor):
        return x[torch.arange(x.shape[0], device=x.device), token]
    return x[:, token]


def _project(rows_BD: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return rows_BD if weight is None else F.linear(rows_BD, weight, bias)


def _choose(impl: str, x: Tensor, token: Tensor | int, projection_weight: Tensor | None) -> str:
    """The implementation for ``impl``."""
    width = x.shape[-1] if projection_weight is None else max(x.shape[-1], projection_weight.shape[0])
    obstacle = f"takes up to {WIDEST:,} columns, not {width:,}" if width > WIDEST else ""
    rows = token.shape[0] if isinstance(token, Tensor) else x.shape[0]
    return choose_measured("head", impl, x, size=rows, obstacle=obstacle)


def _check_token(x: Tensor, token: Tensor | int) -> Tensor | int:
    """The token, counted from the start."""
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be [B, N, D], or [P, D] of a packed batch, not {list(x.shape)}")
    tokens = x.shape[-2]
    if not isinstance(token, Tensor):
        if x.ndim == 2:
            raise ValueError(f"token must be a tensor of places in the packed x {list(x.shape)}, not {token!r}")
        if not -tokens <= token < tokens:
            raise ValueError(f"token must be one of the {tokens} of a sequence, not {token}")
        return token % tokens
    if token.ndim != 1 or (x.ndim == 3 and token.shape[0] != x.shape[0]):
        wanted = f"[{x.shape[0]}], one of each sequence" if x.ndim == 3 else "[B], one place of each sequence"
        raise ValueError(f"token must be {wanted}, not {list(token.shape)}")
    if token.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token must be int64 or int32, not {token.dtype}: convert it with .long()")
    if token.device != x.device:
        raise ValueError(f"devices differ: token on {token.device}, x on {x.device}; move one of them")
    at_hand = type(token) is Tensor and token.device.type == "cpu" and not torch.compiler.is_compiling()
    if at_hand and (wrong := token[(token < 0) | (token >= tokens)]).numel():
        raise ValueError(f"token must be from 0 to {tokens - 1}, the last of x {list(x.shape)}, not {int(wrong[0])}")
    return token


def _check_projection(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is None:
        if bias is not None:
            raise ValueError(f"projection_bias {list(bias.shape)} goes with projection_weight, which is None")
        return
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"projection_weight must be [E, {x.shape[-1]}], as wide as x {list(x.shape)}, not {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"projection_bias must be [{weight.shape[0]}], not {list(bias.shape)}")
    for name, value in (("projection_weight", weight), ("projection_bias", bias)):
        if value is not None and value.device != x.device:
            raise ValueError(f"devices differ: {name} on {value.device}, x on {x.device}; move one of them")


@torch.library.custom_op("mmbase_kernels::gather_layer_norm", mutates_args=())
def _gather_op(
    x_BND: Tensor, tokens_B: Tensor | None, token: int, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of one token of each sequence [B, D]; means and reciprocal deviations [B].

    Without ``tokens_B`` the token of every sequence is ``token``.
    """
    from mmbase_kernels import layer_norm_triton

    gather = layer_norm_triton.Gather.of(x_BND, tokens_B, token)
    return layer_norm_triton.forward(x_BND, None, weight, bias, eps, gather)[1:]


@_gather_op.register_fake
def _(x_BND, tokens_B, token, weight, bias, eps):
    batch, _, width = x_BND.shape
    return x_BND.new_empty((batch, width)), *(x_BND.new_empty(batch, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("mmbase_kernels::gather_layer_norm_backward", mutates_args=())
def _gather_backward_op(
    grad_BD: Tensor,
    x_BND: Tensor,
    tokens_B: Tensor | None,
    token: int,
    weight: Tensor,
    mean_B: Tensor,
    rstd_B: Tensor,
    kinds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x_BND, weight and bias; with ``kinds`` 0 or 1 the rest is empty."""
    from mmbase_kernels import layer_norm_triton

    gather = layer_norm_triton.Gather.of(x_BND, tokens_B, token)
    return layer_norm_triton.backward(grad_BD, None, x_BND, weight, mean_B, rstd_B, kinds, gather)


@_gather_backward_op.register_fake
def _(grad_BD, x_BND, tokens_B, token, weight, mean_B, rstd_B, kinds):
    return x_BND.new_empty(x_BND.shape), *(weight.new_empty(weight.shape if i < kinds else 0) for i in range(2))


@torch.library.custom_op("mmbase_kernels::unit_length", mutates_args=())
def _unit_length_op(x_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length and what the backward pass needs of their lengths, float32 [B, E] and [B]."""
    from mmbase_kernels import head_triton

    return head_triton.unit_length(x_BE)


@_unit_length_op.register_fake
def _(x_BE):
    return x_BE.new_empty(x_BE.shape, dtype=torch.float32), x_BE.new_empty(x_BE.shape[0], dtype=torch.float32)


@torch.library.custom_op("mmbase_kernels::unit_length_backward", mutates_args=())
def _unit_length_backward_op(grad_BE: Tensor, x_BE: Tensor, inverse_B: Tensor) -> Tensor:
    """Gradient to the rows, in their dtype."""
    from mmbase_kernels import head_triton

    return head_triton.backward(grad_BE, x_BE, inverse_B)


@_unit_length_backward_op.register_fake
def _(grad_BE, x_BE, inverse_B):
    return x_BE.new_empty(x_BE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BND, tokens_B, ctx.token, weight, *_ = inputs
    _, mean_B, rstd_B = output
    ctx.mark_non_differentiable(mean_B, rstd_B)
    ctx.save_for_backward(x_BND, tokens_B, weight, mean_B, rstd_B)


def _backward(ctx: Any, grad_BD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x_BND, tokens_B, weight, mean_B, rstd_B = ctx.saved_tensors
    weight_needed, bias_needed = ctx.needs_input_grad[3:5]
    kinds = wanted_sums(weight_needed, bias_needed)
    grad_x, grad_weight, grad_bias = _gather_backward_op(
        grad_BD, x_BND, tokens_B, ctx.token, weight, mean_B, rstd_B, kinds
    )
    return grad_x, None, None, grad_weight if weight_needed else None, grad_bias if bias_needed else None, None


def _save_lengths(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _backward_lengths(ctx: Any, grad_BE: Tensor, _: Any) -> Tensor:
    return _unit_length_backward_op(grad_BE, *ctx.saved_tensors)


_gather_op.register_autograd(_backward, setup_context=_save)
_gather_backward_op.register_autograd(refuse_second_derivative("head"))
_unit_length_op.register_autograd(_backward_lengths, setup_context=_save_lengths)
_unit_length_backward_op.register_autograd(refuse_second_derivative("head"))
