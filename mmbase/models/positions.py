"""Absolute position embeddings: fixed sine-cosine grids, and resampling of learnt ones to another size.

Shapes: N tokens (a class token, where there is one, comes first), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(grid_hw: tuple[int, int], width: int, *, class_token: bool) -> Tensor:
    """2-D sine-cosine embedding as in MoCo v3: table_ND in fp32; half the width for columns, half for rows.

    Row n is patch (n // columns, n % columns); the class token's row, if any, is zero.
    """
    rows, columns = grid_hw
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angle_x, angle_y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    table_ND = torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1).float()
    return torch.cat([torch.zeros(1, width), table_ND]) if class_token else table_ND


def resize_grid(table_ND: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """Resample a position table to another patch grid: bicubic with antialiasing, as OpenCLIP does.

    Rows beyond the grid's (a class token) come first and are kept as they are.
    """
    if old_hw == new_hw:
        return table_ND
    extra = table_ND.shape[0] - old_hw[0] * old_hw[1]
    grid = table_ND[extra:].unflatten(0, old_hw).permute(2, 0, 1)[None]
    grid = F.interpolate(grid.float(), size=new_hw, mode="bicubic", antialias=True, align_corners=False)
    grid_ND = grid[0].permute(1, 2, 0).flatten(0, 1).to(table_ND.dtype)
    return torch.cat([table_ND[:extra], grid_ND])


def resize_sequence(table_ND: Tensor, length: int) -> Tensor:
    """Resample a text position table linearly to another context length, as OpenCLIP does."""
    if table_ND.shape[0] == length:
        return table_ND
    line = F.interpolate(table_ND.float().T[None], size=length, mode="linear", align_corners=False)
    return line[0].T.to(table_ND.dtype)
