"""Packed projections for tests of attention, and what is demanded of an implementation."""

import torch
import torch.nn.functional as F

from mmbase_kernels.attention import attention

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def qkv_and_gradient(shape, heads, width, dtype, seed=0, device="cpu"):
    """Packed projection ``[*shape, 3, heads, width]`` and a gradient to the output, both of unit normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(*shape, 3, heads, width, generator=generator)
    grad = torch.randn(*shape, heads, width, generator=generator)
    return qkv.to(device, dtype), grad.to(device, dtype)


def boundaries(lengths, device="cpu"):
    """``cu_seqlens`` of lengths."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0)).to(device, torch.int32)


def output_and_gradient(qkv, grad, of=attention, **options):
    """Output, and gradient to the packed projection."""
    leaf = qkv.detach().requires_grad_()
    out = of(leaf, **options)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def exact(qkv, grad, *, causal=False, cu_seqlens=None, max_seqlen=None, scale=None):
    """The same in float64, sequence by sequence: independent of the package."""
    leaf = qkv.detach().double().requires_grad_()
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        rows = leaf.unbind(0)
    else:
        rows = leaf.split(cu_seqlens.diff().tolist())
    outs = []
    for q, k, v in (row.unbind(1) for row in rows):
        logits = scale * torch.einsum("mhd,nhd->hmn", q, k)
        if causal:
            logits = logits + torch.full_like(logits, -torch.inf).triu(1)
        outs.append(torch.einsum("hmn,nhd->mhd", logits.softmax(-1), v))
    out = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)
    return out.detach(), torch.autograd.grad(out, leaf, grad.double())[0]


def pytorch(qkv, *, causal=False, cu_seqlens=None, max_seqlen=None, scale=None):
    """PyTorch's own fused attention in the dtype of ``qkv``, sequence by sequence."""
    rows = qkv.unbind(0) if cu_seqlens is None else qkv.split(cu_seqlens.diff().tolist())
    outs = []
    for row in rows:
        q, k, v = (x.transpose(0, 1)[None] for x in row.unbind(1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale) if len(row) else q
        outs.append(out[0].transpose(0, 1))
    return torch.stack(outs) if cu_seqlens is None else torch.cat(outs)


def assert_close_to_float64(qkv, grad, *, impl, tolerance=None, **options):
    """Output and gradient within TOLERANCE of float64 and, of ``triton``, within 1.5 times PyTorch's error.

    To that comes a tenth of TOLERANCE: where PyTorch happens to be exact, as with one token, nobody else need be.
    """
    tolerance = tolerance or TOLERANCE[qkv.dtype]
    got = output_and_gradient(qkv, grad, impl=impl, **options)
    want = exact(qkv, grad, **options)
    peer = output_and_gradient(qkv, grad, of=pytorch, **options)
    for name, ours, other, b in zip(("output", "gradient"), got, peer, want):
        assert ours.dtype == qkv.dtype and ours.shape == b.shape, name
        error, theirs = (float((x.double() - b).norm()) for x in (ours, other))
        norm = float(b.norm())
        assert error <= tolerance * norm, (name, error / max(norm, 1e-30))
        if impl == "triton":
            assert error <= 1.5 * theirs + 0.1 * tolerance * norm, (name, error, theirs, norm)
