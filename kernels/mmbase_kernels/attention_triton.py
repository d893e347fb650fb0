"""Attention in Triton: launches of the kernels. All memory they are given is written once, without atomics.

Letters: T tokens of all sequences, H heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbase_kernels.attention_backward_tiles import (
    backward_queries_kernel,
    backward_tile_kernel,
    grad_keys_kernel,
    grad_queries_kernel,
)
from mmbase_kernels.attention_tiles import forward_kernel, forward_loop_kernel
from mmbase_kernels.attention_tuning import Plan, padded, plan, recomputed
from mmbase_kernels.launch import LOG2E, dense, on_device
from mmbase_kernels.tuning import architecture


class _Problem(NamedTuple):
    """Sequences as the kernels read them."""

    qkv_T3HD: Tensor
    """Contiguous, base aligned to 16 bytes."""
    cu_seqlens: Tensor | None
    length: int
    """Tokens of every sequence, with ``cu_seqlens`` of the longest."""
    causal: bool
    scale: float

    @property
    def ragged(self) -> bool:
        return self.causal or self.cu_seqlens is not None

    @property
    def programs(self) -> int:
        """Sequences times heads."""
        tokens, _, heads, _ = self.qkv_T3HD.shape
        return heads * (tokens // self.length if self.cu_seqlens is None else len(self.cu_seqlens) - 1)

    def plan(self, step: str) -> Plan:
        qkv = self.qkv_T3HD
        return plan(step, qkv.dtype, qkv.shape[-1], self.length, architecture(qkv.device), ragged=self.ragged)

    def arguments(self, *, always: bool) -> dict[str, Any]:
        """What all kernels take; ``always``: also where sequences are not ragged the kernel has that argument."""
        tokens, _, heads, width = self.qkv_T3HD.shape
        boundaries = None if self.cu_seqlens is None else dense(self.cu_seqlens)
        if boundaries is None and (self.ragged or always):
            boundaries = self.qkv_T3HD.new_empty(1, dtype=torch.int32)  # a pointer that is not followed
        return {
            "qkv": self.qkv_T3HD,
            "cu_seqlens": boundaries,
            "slope": self.scale * LOG2E,
            "scale": self.scale,
            "length": self.length,
            "varlen": int(self.cu_seqlens is not None),
            "causal": int(self.causal),
            "tokens": tokens,
            "heads": heads,
            "D": width,
            "WIDTH": padded(width),
        }


def _launch(kernel: Any, problem: _Problem, plan: Plan, tiles_of: str | None = None, **tensors: Tensor | None) -> None:
    """Run a kernel over all heads and, if named, over the tiles of a block of the plan."""
    names = kernel.arg_names
    arguments = {**problem.arguments(always="RAGGED" not in names), **tensors, "RAGGED": problem.ragged, **plan.blocks}
    grid = (problem.programs,) if tiles_of is None else (problem.programs, -(-problem.length // plan.blocks[tiles_of]))
    kernel[grid](**{name: arguments[name] for name in names}, **plan.options())


def keeps_statistics(qkv_T3HD: Tensor, length: int, *, ragged: bool) -> bool:
    """Whether the backward pass reads log-sum-exps, rather than computing the softmax again."""
    name = architecture(qkv_T3HD.device)
    return not recomputed(plan("backward", qkv_T3HD.dtype, qkv_T3HD.shape[-1], length, name, ragged=ragged))


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor | None, length: int, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], and log-sum-exps in powers of two, float32 [H, T], or an empty tensor.

    Args:
        qkv_T3HD: float32, float16 or bfloat16; copied if not contiguous.
        cu_seqlens: int32 [B + 1], or None: sequences of ``length`` tokens each.
        length: with ``cu_seqlens`` of the longest sequence.
        causal: token i attends to tokens 0..i only.
        scale: positive factor of the logits.
    """
    tokens, _, heads, width = qkv_T3HD.shape
    out_THD = qkv_T3HD.new_empty((tokens, heads, width))
    problem = _Problem(dense(qkv_T3HD), cu_seqlens, length, causal, scale)
    kept = keeps_statistics(qkv_T3HD, length, ragged=problem.ragged)
    lse_HT = qkv_T3HD.new_empty((heads, tokens) if kept else (0,), dtype=torch.float32)
    if not tokens:
        return out_THD, lse_HT
    plan = problem.plan("forward")
    with on_device(qkv_T3HD):
        tensors = {"out": out_THD, "lse": lse_HT if kept else None}
        if plan.kernel == "forward":
            _launch(forward_kernel, problem, plan, **tensors)
        else:
            _launch(forward_loop_kernel, problem, plan, "BLOCK_M", **tensors)
    return out_THD, lse_HT


def backward(
    grad_THD: Tensor,
    out_THD: Tensor | None,
    lse_HT: Tensor,
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor | None,
    length: int,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Gradient [T, 3, H, D] to the packed projection, contiguous.

    Args:
        grad_THD: gradient to the output.
        out_THD: the output; may be None where :func:`forward` kept no log-sum-exps.
        lse_HT: the second result of :func:`forward`.
        qkv_T3HD: as in :func:`forward`.
        cu_seqlens: as in :func:`forward`.
        length: as in :func:`forward`.
        causal: as in :func:`forward`.
        scale: as in :func:`forward`.
    """
    problem = _Problem(dense(qkv_T3HD), cu_seqlens, length, causal, scale)
    grad_qkv_T3HD = torch.empty_like(problem.qkv_T3HD)
    if not len(qkv_T3HD):
        return grad_qkv_T3HD
    plan = problem.plan("backward")
    tensors = {"grad": dense(grad_THD), "grad_qkv": grad_qkv_T3HD}
    with on_device(qkv_T3HD):
        if plan.kernel == "backward_tile":
            _launch(backward_tile_kernel, problem, plan, **tensors)
        elif plan.kernel == "backward_queries":
            _launch(backward_queries_kernel, problem, plan, out=out_THD, lse=lse_HT, **tensors)
        else:
            delta_HT = torch.empty_like(lse_HT)
            tensors |= {"lse": lse_HT, "delta": delta_HT}
            _launch(grad_queries_kernel, problem, plan, "BLOCK_M", out=out_THD, **tensors)
            _launch(grad_keys_kernel, problem, problem.plan("grad_keys"), "BLOCK_N", **tensors)
    return grad_qkv_T3HD
