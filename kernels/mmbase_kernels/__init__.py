"""Triton kernels of mmbase and their PyTorch equivalents; imports torch and triton only."""

from mmbase_kernels.activation import bias_activation
from mmbase_kernels.attention import attention
from mmbase_kernels.contrastive import clip_loss
from mmbase_kernels.head import head
from mmbase_kernels.layer_norm import add_layer_norm, layer_norm
from mmbase_kernels.sigmoid import sigmoid_loss

__all__ = ["add_layer_norm", "attention", "bias_activation", "clip_loss", "head", "layer_norm", "sigmoid_loss"]
