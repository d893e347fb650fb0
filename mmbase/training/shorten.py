"""Texts cut to fewer tokens, as a model would have got them from a tokenizer of that length.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmbase.models.config import TextConfig


def shorten(text_BT: Tensor, length: int, config: TextConfig) -> Tensor:
    """The first ``length`` tokens of each text, the end token kept as the last one where it is what is pooled.

    Call it where the ids lie on the CPU and before ``model.text.pack``.

    Args:
        text_BT: token ids.
        length: tokens; texts of no more are returned as they are.
        config: the tower's: ``eot`` and ``eos`` pool the end token, ``last`` whatever stands last.
    """
    if text_BT.shape[1] <= length:
        return text_BT
    cut_BT = text_BT[:, :length].clone()
    if config.pool in ("eot", "eos"):
        end_B = text_BT.amax(1) if config.pool == "eot" else torch.full_like(text_BT[:, 0], config.eos_id)
        ended_B = (cut_BT == end_B[:, None]).any(1)
        cut_BT[:, -1] = torch.where(ended_B, cut_BT[:, -1], end_B)
    return cut_BT
