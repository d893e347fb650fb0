"""Triton kernels of mmbase and their PyTorch equivalents; imports torch and triton only."""

from mmbase_kernels.attention import attention
from mmbase_kernels.contrastive import clip_loss
from mmbase_kernels.sigmoid import sigmoid_loss

__all__ = ["attention", "clip_loss", "sigmoid_loss"]
