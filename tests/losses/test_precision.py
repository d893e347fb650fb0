"""What a run says of the losses' products."""

import pytest
import torch

from mmbase.losses.precision import describe_products


def test_what_the_environment_asks_for_is_said(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("MMBASE_KERNELS", raising=False)
    assert describe_products(cpu, torch.bfloat16) == "PyTorch operations, products in float32"
    monkeypatch.setenv("MMBASE_KERNELS", "torch")
    assert describe_products(cpu, None) == "PyTorch operations, products in float32 (MMBASE_KERNELS=torch)"
    monkeypatch.setenv("MMBASE_KERNELS", "reference")
    assert describe_products(cpu, None) == "reference, products in float64 (MMBASE_KERNELS=reference)"
    monkeypatch.setenv("MMBASE_KERNELS", "triton")
    with pytest.raises(ValueError, match="MMBASE_KERNELS=triton cannot run: it needs a CUDA device"):
        describe_products(cpu, None)
