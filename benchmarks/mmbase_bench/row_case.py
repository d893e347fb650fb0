"""Cases whose rows are independent of one another: their float64 results in chunks, at the very size that is timed.

Outputs and gradients to rows are compared for the first and the last rows, whose offsets are the largest; gradients to
parameters, which are sums over all rows, entirely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbase_bench.side_by_side import Inputs

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
SAMPLED = 8
"""Rows (along the first axis) at either end that are compared."""


class Quantities(NamedTuple):
    """Names of what is compared; quantities of one name are measured together."""

    outputs: tuple[str, ...]
    row_gradients: tuple[str, ...]
    parameter_gradients: tuple[str, ...]


class RowCase:
    """What such cases have in common; rows, outputs and gradients to them agree in the first axis."""

    def quantities(self) -> Quantities:
        """The names of its outputs and gradients."""
        raise NotImplementedError

    def equation(self, index: Tensor, *leaves: Tensor) -> Any:
        """The outputs of some rows, in the dtype of the leaves; `index` says which rows of the batch they are."""
        raise NotImplementedError

    def scratch(self, inputs: Inputs) -> int:
        """Bytes that the equation takes in float64 for one row, its gradient included."""
        raise NotImplementedError

    def exact(self, inputs: Inputs) -> list[tuple[str, Tensor]]:
        """Float64 by name: sampled outputs, sampled gradients to rows, gradients to parameters."""
        names, device, batch = self.quantities(), inputs.rows[0].device, inputs.rows[0].shape[0]
        rows = max(1, CHUNK_BYTES[device.type] // max(1, self.scratch(inputs)))
        sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in inputs.parameters]
        if sums:
            for index in torch.arange(batch, device=device).split(rows):
                for total, part in zip(sums, self._float64(inputs, index)[1][len(inputs.rows) :]):
                    total += part
        outputs, gradients = self._float64(inputs, sampled(batch, device))
        named = [*zip(names.outputs, outputs), *zip(names.row_gradients, gradients)]
        return [*named, *zip(names.parameter_gradients, sums)]

    def observed(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The same of a contender."""
        index, rows = sampled(outputs[0].shape[0], outputs[0].device), len(self.quantities().row_gradients)
        picked = [tensor.detach().index_select(0, index) for tensor in (*outputs, *gradients[:rows])]
        return [*picked, *gradients[rows:]]

    def _float64(self, inputs: Inputs, index: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Outputs, and gradients to rows and parameters, of some rows."""
        rows = [row.detach().index_select(0, index) for row in inputs.rows]
        leaves = [leaf.detach().double().requires_grad_() for leaf in (*rows, *inputs.parameters)]
        outputs = self.equation(index, *leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        gradients = [gradient.index_select(0, index).double() for gradient in inputs.gradients]
        return [out.detach() for out in outputs], torch.autograd.grad(outputs, leaves, gradients)


def sampled(batch: int, device: torch.device) -> Tensor:
    """Which rows of a batch are compared."""
    index_B = torch.arange(batch, device=device)
    return index_B if batch <= 2 * SAMPLED else torch.cat([index_B[:SAMPLED], index_B[-SAMPLED:]])
