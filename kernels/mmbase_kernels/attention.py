"""Self-attention on the packed projection, for the short sequences of image and text towers.

Letters: B sequences, N tokens of each, T tokens of all, H heads, D head width.

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmbase_kernels.attention_sdpa import packed_attention, varlen_attention
from mmbase_kernels.dispatch import choose_measured, refuse_forward_mode

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "reference")
NARROWEST, WIDEST, STEP = 32, 128, 8
"""Head widths of the Triton kernels: 16 bytes of 16-bit numbers are copied at a time."""
LONGEST = 1024
"""Tokens of a sequence that the Triton kernels are made and checked for."""


def attention(
    qkv: Tensor,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Scaled dot-product self-attention, ``softmax(scale * Q K^T) V`` for each head of each sequence.

    Sequences of one length come as a batch. Sequences of different lengths come end to end, without padding: sequence
    ``i`` is ``qkv[cu_seqlens[i]:cu_seqlens[i + 1]]``.

    Args:
        qkv: ``[B, N, 3, H, D]``, or with ``cu_seqlens`` ``[total, 3, H, D]``: queries, keys and values of a fused
            projection. Floating point; Triton takes float32 (exactly, without TF32), float16 and bfloat16.
        causal: token ``i`` of a sequence attends to its tokens ``0..i`` only.
        cu_seqlens: int32 ``[B + 1]`` on the device of ``qkv``: 0, then the ends of the sequences. Sequences may be
            empty.
        max_seqlen: length of the longest sequence, or more; None: read from ``cu_seqlens``, for which a GPU must be
            waited for and a graph cannot be compiled. Only with ``cu_seqlens``.
        scale: positive factor of the logits; None: ``D ** -0.5``.
        impl: ``triton`` (CUDA, D of 32 to 128 in steps of 8, up to 1,024 tokens a sequence; the gradient is written
            packed, two runs are bitwise equal), ``sdpa`` (PyTorch's ``scaled_dot_product_attention``, any device and
            shape), ``reference`` (the equation as written, in float64, O(total ** 2) memory with ``cu_seqlens``),
            ``auto`` (what MMBASE_KERNELS asks for, else ``triton`` where a checked-in measurement says that it is
            faster, else ``sdpa``).

    Returns:
        ``[B, N, H, D]`` or ``[total, H, D]``, in the dtype of ``qkv``. A second derivative of ``triton`` raises
        RuntimeError.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit; the values of ``cu_seqlens`` are read on the CPU
            only. On a GPU wrong ones stop the program by a device-side assertion, and while a graph is compiled they
            are not looked at.
    """
    _check_qkv(qkv, cu_seqlens)
    if cu_seqlens is not None:
        max_seqlen = _check_cu_seqlens(cu_seqlens, max_seqlen, qkv)
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen={max_seqlen} goes with cu_seqlens: leave it out, or give cu_seqlens")
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    elif not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, not {scale}: negate the queries for a negative one")
    length = qkv.shape[1] if max_seqlen is None else max_seqlen
    chosen = _choose(impl, qkv, length, causal, cu_seqlens is not None)
    if chosen == "reference":
        return _reference(qkv, cu_seqlens, causal, scale)
    if chosen == "triton":
        refuse_forward_mode("attention", qkv)
        qkv_T3HD = qkv if cu_seqlens is not None else qkv.flatten(0, 1)
        out_THD, _ = _forward_op(qkv_T3HD, cu_seqlens, length, causal, scale)
        return out_THD if cu_seqlens is not None else out_THD.unflatten(0, qkv.shape[:2])
    if cu_seqlens is None:
        return packed_attention(qkv, causal=causal, scale=scale)
    return varlen_attention(qkv, cu_seqlens, length, causal=causal, scale=scale)


def _choose(impl: str, qkv: Tensor, length: int, causal: bool, varlen: bool) -> str:
    """The implementation for ``impl``."""
    width, obstacle = qkv.shape[-1], ""
    if not (NARROWEST <= width <= WIDEST and width % STEP == 0):
        obstacle = f"takes head widths of 32 to 128 in steps of 8, not {width}"
    elif length > LONGEST:
        obstacle = f"takes up to {LONGEST} tokens a sequence, not {length}"
    case = "causal" * causal + " " * (causal and varlen) + "varlen" * varlen
    return choose_measured("attention", impl, qkv, size=length, case=case, obstacle=obstacle, names=IMPLEMENTATIONS)


def _check_qkv(qkv: Tensor, cu_seqlens: Tensor | None) -> None:
    if not isinstance(qkv, Tensor) or qkv.layout != torch.strided:
        raise ValueError(f"qkv must be a dense tensor, not {getattr(qkv, 'layout', type(qkv))}")
    shape = "[B, N, 3, H, D]" if cu_seqlens is None else "[total, 3, H, D], with cu_seqlens,"
    if qkv.ndim != (5 if cu_seqlens is None else 4) or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must be {shape} not {list(qkv.shape)}: unflatten the projection's last axis")
    if 0 in qkv.shape[-2:]:
        raise ValueError(f"qkv must have heads and a width, not {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point, not {qkv.dtype}: convert it")


def _check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int | None, qkv: Tensor) -> int:
    """Refuse boundaries that do not fit ``qkv``; returns the length of the longest sequence."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
        raise ValueError(f"cu_seqlens must be an int32 tensor, not {got}: convert it with .int()")
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"cu_seqlens must be [B + 1], not {list(cu_seqlens.shape)}: 0, then the sequences' ends")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"devices differ: cu_seqlens on {cu_seqlens.device}, qkv on {qkv.device}; move one of them")
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, not {max_seqlen}")
    if torch.compiler.is_compiling():
        if max_seqlen is None:
            raise ValueError("a compiled graph needs max_seqlen, which is None: give the longest sequence's length")
        return max_seqlen
    if cu_seqlens.device.type == "cpu":
        return _check_boundaries(cu_seqlens.tolist(), max_seqlen, qkv.shape[0])
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    if cu_seqlens.device.type == "cuda":
        _assert_boundaries(cu_seqlens, max_seqlen, qkv.shape[0])
    return max_seqlen


_ASSERTED = WeakTensorKeyDictionary()
"""What was last asserted of a tensor: the layers of a tower share theirs."""


def _assert_boundaries(cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """Have the device stop the program at wrong boundaries, without waiting for it."""
    case = None if cu_seqlens.is_inference() else (cu_seqlens._version, max_seqlen, total)
    if case is None or _ASSERTED.get(cu_seqlens) != case:
        lengths = cu_seqlens.diff()
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & ((lengths >= 0) & (lengths <= max_seqlen)).all()
        torch._assert_async(good, "cu_seqlens must rise from 0 to the total, in steps of at most max_seqlen")
        if case is not None:
            _ASSERTED[cu_seqlens] = case


def _check_boundaries(boundaries: list[int], max_seqlen: int | None, total: int) -> int:
    if boundaries[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, not at {boundaries[0]}: prepend 0 to the sequences' ends")
    lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
    for place, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"cu_seqlens must not decrease, as from {boundaries[place]} to {boundaries[place + 1]} at {place + 1}: "
                "it is the running sum of the lengths"
            )
    if boundaries[-1] != total:
        raise ValueError(f"cu_seqlens ends at {boundaries[-1]}, but qkv has {total} tokens: the two must be equal")
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}, but a sequence has {longest} tokens: give at least that")
    return longest if max_seqlen is None else max_seqlen


def _reference(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The equation in float64; returned in the dtype of ``qkv``."""
    q_BHND, k_BHND, v_BHND = (qkv if cu_seqlens is None else qkv[None]).double().permute(2, 0, 3, 1, 4)
    token_N = torch.arange(q_BHND.shape[2], device=qkv.device)
    keep_NN = token_N[:, None] >= token_N if causal else token_N[:, None] >= 0
    if cu_seqlens is not None:
        sequence_N = torch.searchsorted(cu_seqlens[1:].contiguous(), token_N, right=True)
        keep_NN = keep_NN & (sequence_N[:, None] == sequence_N)
    logits_BHNN = (scale * q_BHND @ k_BHND.mT).masked_fill(~keep_NN, -torch.inf)
    out_BNHD = (logits_BHNN.softmax(-1) @ v_BHND).transpose(1, 2).to(qkv.dtype)
    return out_BNHD if cu_seqlens is None else out_BNHD[0]


@torch.library.custom_op("mmbase_kernels::attention", mutates_args=())
def _forward_op(
    qkv_T3HD: Tensor, cu_seqlens: Tensor | None, length: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exps [H, T], empty where the backward pass computes them again.

    Without ``cu_seqlens`` all sequences have ``length`` tokens, with it at most so many.
    """
    from mmbase_kernels import attention_triton

    return attention_triton.forward(qkv_T3HD, cu_seqlens, length, causal=causal, scale=scale)


@_forward_op.register_fake
def _(qkv_T3HD, cu_seqlens, length, causal, scale):
    from mmbase_kernels import attention_triton

    tokens, _, heads, width = qkv_T3HD.shape
    kept = attention_triton.keeps_statistics(qkv_T3HD, length, ragged=causal or cu_seqlens is not None)
    statistics = qkv_T3HD.new_empty((heads, tokens) if kept else (0,), dtype=torch.float32)
    return qkv_T3HD.new_empty((tokens, heads, width)), statistics


@torch.library.custom_op("mmbase_kernels::attention_backward", mutates_args=())
def _backward_op(
    grad_THD: Tensor,
    out_THD: Tensor | None,
    lse_HT: Tensor,
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor | None,
    length: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """Gradient [T, 3, H, D]; the output is needed where there are log-sum-exps."""
    from mmbase_kernels import attention_triton

    return attention_triton.backward(
        grad_THD, out_THD, lse_HT, qkv_T3HD, cu_seqlens, length, causal=causal, scale=scale
    )


@_backward_op.register_fake
def _(grad_THD, out_THD, lse_HT, qkv_T3HD, *rest):
    return torch.empty_like(qkv_T3HD, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_T3HD, cu_seqlens, *constants = inputs
    out_THD, lse_HT = output
    ctx.mark_non_differentiable(lse_HT)
    ctx.save_for_backward(out_THD if lse_HT.ndim == 2 else None, lse_HT, qkv_T3HD, cu_seqlens)
    ctx.constants = constants


def _backward(ctx: Any, grad_THD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return _backward_op(grad_THD, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def _refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("attention with impl='triton' has no second derivative; impl='reference' has one")


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_refuse_second_derivative)
