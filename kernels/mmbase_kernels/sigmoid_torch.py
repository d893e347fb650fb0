"""The sigmoid loss in PyTorch operations over tiles of logits: CPU and any other device.

Letters: M image rows, N text rows, D width, R rows and C columns of one tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbase_kernels.bands import Bands, Tile, add_product
from mmbase_kernels.sigmoid_pass import SigmoidPass


def sigmoid_pass(
    image_MD: Tensor,
    text_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    image_ids_M: Tensor | None = None,
    text_ids_N: Tensor | None = None,
    offset: int = 0,
    gradients: bool,
) -> SigmoidPass:
    """See :func:`mmbase_kernels.sigmoid_pass.sigmoid_pass`."""
    zero = image_MD.new_zeros((), dtype=torch.float32)
    loss, grad_scale, grad_bias = zero.clone(), zero.clone(), zero.clone()
    grad_image_MD = zero.new_zeros(image_MD.shape if gradients else 0)
    grad_text_ND = zero.new_zeros(text_ND.shape if gradients else 0)
    bands = Bands(image_MD, text_ND, scale)
    half = bands.text_ND.dtype == torch.float16
    factor = 1 / 16384 if half else 1.0  # values up to 1 and small ones alike stay normal numbers of float16
    for rows, band_RD in bands:
        for tile in bands.tiles(rows, band_RD):
            tile.buffer_RC.add_(bias)
            _negate_matches(tile, image_ids_M, text_ids_N, offset)
            loss += F.softplus(tile.buffer_RC).sum()
            if not gradients:
                continue
            tile.buffer_RC.sigmoid_()
            _negate_matches(tile, image_ids_M, text_ids_N, offset)
            grad_bias += tile.buffer_RC.sum()
            grad_RC = (tile.buffer_RC * (1 / factor) if half else tile.buffer_RC).to(band_RD.dtype)
            add_product(grad_image_MD[rows], grad_RC, bands.text_ND[tile.columns])
            add_product(grad_text_ND[tile.columns], grad_RC.T, band_RD)
        if gradients:
            grad_scale += (grad_image_MD[rows] * band_RD).sum()
    if not gradients:
        return SigmoidPass(loss, grad_image_MD, grad_text_ND, zero.new_empty(0), zero.new_empty(0))
    return SigmoidPass(
        loss, grad_image_MD.mul_(scale * factor), grad_text_ND.mul_(scale * factor), grad_scale * factor, grad_bias
    )


def _negate_matches(tile: Tile, image_ids_M: Tensor | None, text_ids_N: Tensor | None, offset: int) -> None:
    """Change the sign of the matches, in place: of the logits before the softplus, of its derivative after it."""
    if image_ids_M is None or text_ids_N is None:
        tile.diagonal(offset).neg_()
    else:
        match_RC = image_ids_M[tile.rows, None] == text_ids_N[tile.columns]
        torch.where(match_RC, -tile.buffer_RC, tile.buffer_RC, out=tile.buffer_RC)
