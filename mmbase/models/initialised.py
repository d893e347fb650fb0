"""Parameters, linear layers and embedding tables with the initial values that CLIP's towers take, drawn once."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def draw_normal(weight: Tensor, std: float) -> None:
    """Fill with draws from N(0, std²). Tensors on the meta device stay: torch would load its compiler for them."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std²)."""
    parameter = nn.Parameter(torch.empty(*shape))
    draw_normal(parameter, std)
    return parameter


class Linear(nn.Linear):
    """Linear layer that draws its weight from N(0, std²) and zeroes its bias: initialised once, not twice."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        draw_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Embedding table drawn from N(0, std²)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        draw_normal(self.weight, self.std)
