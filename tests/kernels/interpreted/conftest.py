"""What checks of the kernels in Triton's interpreter share."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel forgot to write is NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
