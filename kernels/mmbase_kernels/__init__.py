"""Triton kernels of mmbase and their PyTorch equivalents; imports torch and triton only."""

from mmbase_kernels.contrastive import clip_loss
from mmbase_kernels.sigmoid import sigmoid_loss

__all__ = ["clip_loss", "sigmoid_loss"]
