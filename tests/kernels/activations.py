"""Numbers to activate, and what is demanded of an implementation."""

import math

import torch

from mmbase_kernels.activation import activate, bias_activation

from .sequences import TOLERANCE

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
NAMES = ("output", "gradient to x", "gradient to the bias")


def numbers(shape, dtype, *, seed=0, scale=2.0, bias_dtype=None, device="cpu"):
    """Input ``[*shape]``, bias of its last axis, and a gradient to the output."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(*shape, generator=generator) for _ in range(2))
    bias = torch.randn(shape[-1], generator=generator)
    return (scale * x).to(device, dtype), bias.to(device, bias_dtype or dtype), grad.to(device, dtype)


def output_and_gradients(x, bias, grad, activation, of=bias_activation, **options):
    """Output and gradients to x and, if there is one, to the bias."""
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in (x, bias)]
    out = of(*leaves, activation, **options)
    return out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)


def equation(x, bias, activation):
    """In float64, written independently of the package."""
    h = x.double() if bias is None else x.double() + bias.double()
    if activation == "gelu":
        return h / 2 * torch.erfc(-h / math.sqrt(2))
    share = 1.702 * h if activation == "quick_gelu" else math.sqrt(8 / math.pi) * (h + 0.044715 * h**3)
    return h * torch.sigmoid(share)


def pytorch(x, bias, activation):
    """PyTorch's operations in the dtype of x."""
    return activate(x if bias is None else x + bias.to(x.dtype), activation)


def exact(x, bias, grad, activation):
    bias = None if bias is None else bias.double()
    return output_and_gradients(x.double(), bias, grad.double(), activation, of=equation)


def assert_close_to_float64(x, bias, grad, activation, *, impl):
    """Within TOLERANCE of float64 and, of ``triton``, within 1.5 times PyTorch's error and a tenth of TOLERANCE.

    A bias's gradient may cancel: a hundredth of what its terms amount to counts then.
    """
    got = output_and_gradients(x, bias, grad, activation, impl=impl)
    peer = output_and_gradients(x, bias, grad, activation, of=pytorch)
    want = exact(x, bias, grad, activation)
    for name, ours, other, b in zip(NAMES, got, peer, want):
        dtype = bias.dtype if name == NAMES[2] else x.dtype
        assert ours.dtype == dtype and ours.shape == b.shape, name
        error, theirs = (float((tensor.double() - b).norm()) for tensor in (ours, other))
        bound = max(TOLERANCE[x.dtype], TOLERANCE[dtype]) * max(float(b.norm()), 0.01 * float(grad.double().norm()))
        assert error <= bound, (name, error, bound)
        if impl == "triton":
            assert error <= 1.5 * theirs + 0.1 * bound, (name, error, theirs, bound)
