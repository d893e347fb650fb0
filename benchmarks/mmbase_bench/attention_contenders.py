"""Who is compared on attention, on which shapes, and the work it is.

Everybody starts from the packed projection and ends at its packed, contiguous gradient; the output is contiguous too,
as the projection after it reads it. Sequences of different lengths come end to end.

Letters: B sequences, N tokens of each (the longest), T tokens of all, H heads, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmbase_bench.harness import Work
from mmbase_bench.options import DTYPES
from mmbase_bench.side_by_side import BOTH, FORWARD, Built, Contender, Inputs
from mmbase_bench.towers import caption_lengths
from mmbase_kernels import attention

SAMPLED = 8
"""Sequences at either end of the batch that are compared with float64: the last ones have the largest offsets."""
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Self-attention of one tower's layer."""

    shape: str
    batch: int
    heads: int
    tokens: int
    width: int
    causal: bool = False
    drawn: str = ""
    """Lengths of sequences that differ: ``captions`` as people write them (13 tokens on average, up to 40) or
    ``uniform``, from 5 tokens to `tokens`."""
    dtype: str = "fp32"

    @property
    def varlen(self) -> bool:
        """Whether lengths differ."""
        return bool(self.drawn)

    @property
    def mask(self) -> str:
        """What tells calls apart besides numbers: the name that the table of choices has for it."""
        return " ".join(filter(None, ("causal" * self.causal, "varlen" * self.varlen)))

    @property
    def title(self) -> str:
        """The case in a line."""
        sizes = f"{self.batch} x {self.heads} x {self.longest} x {self.width}"
        return " ".join(filter(None, (self.shape, sizes, self.mask, self.dtype)))

    def labels(self) -> dict[str, Any]:
        """Columns of the result."""
        return {
            "shape": self.shape,
            "batch": self.batch,
            "heads": self.heads,
            "tokens": self.tokens,
            "longest": self.longest,
            "width": self.width,
            "mask": self.mask,
            "dtype": self.dtype,
        }

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, the same for every seed."""
        if not self.varlen:
            return [self.tokens] * self.batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.drawn == "captions":
                return caption_lengths(self.batch, self.tokens).tolist()
            return torch.randint(min(5, self.tokens), self.tokens + 1, (self.batch,)).tolist()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def contenders(self, device: torch.device) -> Mapping[str, Contender]:
        """Those for sequences of one length, or those for different ones."""
        return VARLEN if self.varlen else DENSE

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        """Unit normal numbers: projections of a normalised stream are about that."""
        generator = torch.Generator(device).manual_seed(seed)
        tokens = (sum(self.lengths),) if self.varlen else (self.batch, self.tokens)

        def draw(*last: int) -> Tensor:
            return torch.randn(*tokens, *last, device=device, dtype=DTYPES[self.dtype], generator=generator)

        return Inputs((draw(3, self.heads, self.width).requires_grad_(),), (), (draw(self.heads, self.width),))

    def exact(self, inputs: Inputs) -> list[tuple[str, Tensor]]:
        """Output and gradient of the sampled sequences in float64, by the equation."""
        qkv, grad = self._sample(inputs.rows[0].detach()), self._sample(inputs.gradients[0])
        leaf = qkv.double().requires_grad_()
        out = attention(leaf, impl="reference", **self._options(qkv.device, self._sampled_lengths()))
        return [("out", out.detach()), ("dqkv", torch.autograd.grad(out, leaf, grad.double())[0])]

    def observed(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Output and, if there is one, gradient of the sampled sequences."""
        return [self._sample(tensor.detach()) for tensor in (*outputs, *gradients)]

    def work(self, direction: str) -> Work:
        """Two products forward and five backward, one of them the scores again; each tensor moved once a pass."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        product = 2.0 * pairs * self.heads * self.width
        unit = float(sum(self.lengths) * self.heads * self.width * DTYPES[self.dtype].itemsize)
        forward, backward = Work(2 * product, 4 * unit), Work(5 * product, 7 * unit)
        if direction == BOTH:
            return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return forward if direction == FORWARD else backward

    def options(self, device: torch.device) -> dict[str, Any]:
        """Arguments of our operator besides the projection and ``impl``."""
        return self._options(device, self.lengths)

    def _options(self, device: torch.device, lengths: Sequence[int]) -> dict[str, Any]:
        if not self.varlen:
            return {"causal": self.causal}
        return {"causal": self.causal, "cu_seqlens": boundaries(lengths, device), "max_seqlen": max(lengths)}

    def _sampled_lengths(self) -> list[int]:
        return self.lengths if self.batch <= 2 * SAMPLED else self.lengths[:SAMPLED] + self.lengths[-SAMPLED:]

    def _sample(self, rows: Tensor) -> Tensor:
        if self.batch <= 2 * SAMPLED:
            return rows
        first, last = (sum(self.lengths[:SAMPLED]), sum(self.lengths[-SAMPLED:])) if self.varlen else (SAMPLED, SAMPLED)
        return torch.cat([rows[:first], rows[len(rows) - last :]])


def boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The running sum of lengths, int32 [B + 1]."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def heads_first(qkv: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values, each a view [B, H, N, D].

    Unbound along the packed axis itself: the gradients of the three are then stacked into a contiguous packed one.
    """
    return [part.transpose(1, 2) for part in qkv.unbind(2)]


def pinned(backend: SDPBackend) -> Callable[[Case, torch.device, str], Built]:
    """``scaled_dot_product_attention`` that may use one backend only."""

    def build(case: Case, device: torch.device, mode: str) -> Built:
        def attend(qkv_BN3HD: Tensor) -> Tensor:
            q_BHND, k_BHND, v_BHND = heads_first(qkv_BN3HD)
            with sdpa_kernel(backend):
                out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=case.causal)
            return out_BHND.transpose(1, 2).contiguous()

        return Built(attend)

    return build


def flex(case: Case, device: torch.device, mode: str) -> Built:
    """FlexAttention, compiled together with what surrounds it; the mask of blocks is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total, mask = sum(case.lengths) if case.varlen else case.tokens, None
    sequence_T = torch.repeat_interleave(torch.tensor(case.lengths)).to(device) if case.varlen else None

    def keep(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = query >= key if case.causal else query >= 0
        return kept if sequence_T is None else kept & (sequence_T[query] == sequence_T[key])

    if case.causal or case.varlen:
        on_gpu = device.type == "cuda"  # compiled: the mask of all pairs of tokens would not fit
        mask = create_block_mask(keep, None, None, total, total, device=device, _compile=on_gpu)

    def attend(qkv: Tensor) -> Tensor:
        q_BHND, k_BHND, v_BHND = heads_first(qkv[None] if case.varlen else qkv)
        out_BHND = flex_attention(q_BHND, k_BHND, v_BHND, block_mask=mask)
        out_BNHD = out_BHND.transpose(1, 2).contiguous()
        return out_BNHD[0] if case.varlen else out_BNHD

    return Built(torch.compile(attend, dynamic=False, fullgraph=True, mode=mode))


def nested(case: Case, device: torch.device, mode: str) -> Built:
    """Jagged nested tensors under the flash backend, which wants queries, keys and values copied apart."""
    offsets = boundaries(case.lengths, device).long()

    def attend(qkv_T3HD: Tensor) -> Tensor:
        q_BHND, k_BHND, v_BHND = (
            torch.nested.nested_tensor_from_jagged(
                part_THD.contiguous(), offsets, min_seqlen=min(case.lengths), max_seqlen=case.longest
            ).transpose(1, 2)
            for part_THD in qkv_T3HD.unbind(1)
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=case.causal)
        return out_BHND.transpose(1, 2).values().contiguous()

    return Built(attend)


def padded(case: Case, device: torch.device, mode: str) -> Built:
    """The flash backend on sequences padded to the longest, as a tower that knows of no other way computes them."""
    if not case.causal:
        raise NotImplementedError(
            "padding is harmless to the flash backend, which takes no mask, under causality alone"
        )
    starts = range(0, case.batch * case.longest, case.longest)
    place_T = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, case.lengths)]).to(device)

    def attend(qkv_T3HD: Tensor) -> Tensor:
        rows = qkv_T3HD.new_zeros(case.batch * case.longest, *qkv_T3HD.shape[1:]).index_copy(0, place_T, qkv_T3HD)
        q_BHND, k_BHND, v_BHND = heads_first(rows.unflatten(0, (case.batch, case.longest)))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True)
        return out_BHND.transpose(1, 2).flatten(0, 1).index_select(0, place_T)

    return Built(attend)


def varlen(backend: SDPBackend) -> Callable[[Case, torch.device, str], Built]:
    """``torch.nn.attention.varlen``, one backend allowed; how it is told of causality depends on the version."""

    def build(case: Case, device: torch.device, mode: str) -> Built:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = boundaries(case.lengths, device), case.longest
        windowed = "window_size" in inspect.signature(varlen_attn).parameters
        if backend == SDPBackend.CUDNN_ATTENTION and "sdpa_kernel" not in (varlen_attn.__doc__ or ""):
            raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has the flash backend alone")
        told: dict[str, Any] = {}
        if case.causal:
            told = {"window_size": (-1, 0)} if windowed else {"is_causal": True}

        def attend(qkv_T3HD: Tensor) -> Tensor:
            q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
            with sdpa_kernel(backend):
                out_THD = varlen_attn(q_THD, k_THD, v_THD, ends, ends, longest, longest, **told)
            assert isinstance(out_THD, Tensor)
            return out_THD.contiguous()

        return Built(attend)

    return build


def mmbase(impl: str, *, compiled: bool = False) -> Callable[[Case, torch.device, str], Built]:
    """Our operator."""

    def build(case: Case, device: torch.device, mode: str) -> Built:
        options = case.options(device)

        def attend(qkv: Tensor) -> Tensor:
            return attention(qkv, impl=impl, **options).contiguous()

        return Built(torch.compile(attend, dynamic=False, fullgraph=True, mode=mode) if compiled else attend)

    return build


OURS = (
    Contender("mmbase-triton", mmbase("triton"), rival=False),
    Contender("mmbase-triton-compiled", mmbase("triton", compiled=True), rival=False, compiled=True),
    Contender("mmbase-auto", mmbase("auto"), rival=False),
)
DENSE: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("sdpa-flash", pinned(SDPBackend.FLASH_ATTENTION)),
        Contender("sdpa-cudnn", pinned(SDPBackend.CUDNN_ATTENTION)),
        Contender("sdpa-efficient", pinned(SDPBackend.EFFICIENT_ATTENTION)),
        Contender("sdpa-math", pinned(SDPBackend.MATH)),
        Contender("flex", flex, rival=False, compiled=True),
        Contender("mmbase-sdpa", mmbase("sdpa"), rival=False, note="PyTorch's choice among its backends"),
        *OURS,
    )
}
"""For sequences of one length. Rivals are PyTorch's own kernels."""
VARLEN: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("varlen-flash", varlen(SDPBackend.FLASH_ATTENTION)),
        Contender("varlen-cudnn", varlen(SDPBackend.CUDNN_ATTENTION)),
        Contender("nested-flash", nested),
        Contender("padded-flash", padded, note="padding and its removal counted in"),
        Contender("flex", flex, rival=False, compiled=True),
        Contender("mmbase-sdpa", mmbase("sdpa"), rival=False, note="padded; on a CPU in groups of equal length"),
        *OURS,
    )
}
"""For sequences end to end."""
