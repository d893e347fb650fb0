"""Running statistics of normalisation layers: a forward pass moves them, before anybody knows whether it went wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Puts buffers back as they were before a step that is left out; nobody waits for the device.

    Args:
        model: whose floating buffers are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    @torch.no_grad()
    def remember(self) -> None:
        """Call before the forward pass."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    @torch.no_grad()
    def undo_where(self, bad: Tensor | None) -> None:
        """Call after it.

        Args:
            bad: scalar on the device: 1 where the step is left out, 0 or None where it counts.
        """
        if bad is None:
            return
        for buffer, before in zip(self._buffers, self._before):
            buffer.copy_(torch.where(bad > 0, before, buffer))
