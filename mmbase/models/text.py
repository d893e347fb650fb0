"""The text tower: a transformer over token ids, causal as in CLIP or bidirectional as in SigLIP.

Captions are far shorter than the context, so tokens that no feature depends on are left out before the blocks wherever
that changes no feature: see `TextTransformer.pack`.

Shapes: B batch, T tokens, P packed tokens, D width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from mmbase.errors import MmbaseError
from mmbase.keyed import draw
from mmbase.models.config import TextConfig
from mmbase.models.initialised import Embedding, Linear, normal_parameter
from mmbase.models.layers import LayerNorm, Transformer, project_token, unit_length
from mmbase.models.noise import Dropout
from mmbase.models.packing import Packed, Packing

__all__ = ["PackedText", "TextConfig", "TextTransformer"]

_DROPOUT = -1
"""Place of a text's key; the blocks take those from 1 on."""


@dataclass(frozen=True, eq=False)
class PackedText(Packed):
    """Texts of a batch end to end, without the tokens that no feature depends on: made by `TextTransformer.pack`.

    Towers take it in place of ids; it moves to a device as they do (``to``, ``pin_memory``).
    """

    text_P: Tensor
    """Ids of the tokens that are left."""
    packing: Packing
    """Where they come from."""
    token_B: Tensor | None
    """Where the token that is pooled lies among them, for each text; None where all are pooled."""

    def __len__(self) -> int:
        """Number of texts."""
        return self.packing.rows


register_dataclass(PackedText, serialized_type_name="mmbase.models.text.PackedText")


class TextTransformer(nn.Module):
    """Token ids to features."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, std = config.width, config.width**-0.5
        self.token_embedding = Embedding(config.vocab_size, width, std=0.02)
        self.positional_embedding = normal_parameter(config.context_length, width, std=0.01)
        self.dropout = Dropout(config.dropout)
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            config.mlp_ratio,
            config.activation,
            norm_eps=config.norm_eps,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            dropout=config.dropout,
            branch_init=config.branch_init,
            checkpoint_activations=config.checkpoint_activations,
        )
        self.norm = LayerNorm(width, eps=config.norm_eps)
        self.proj = (
            Linear(width, embed_dim, bias=config.projection_bias, std=std) if config.projection else nn.Identity()
        )

    def forward(self, text: Tensor | PackedText, *, normalize: bool = False, keys_B: Tensor | None = None) -> Tensor:
        """Token ids, at most context_length of them, to features_BE.

        Fewer than context_length tokens take the first positions. With a causal tower and eot or eos pooling that
        changes nothing: what follows the end token is never looked at.

        Args:
            text: ids_BT, or what `pack` makes of them, which has the same features and gradients with less work. Ids on
                a CPU are packed here where that can be; elsewhere padding is computed too.
            normalize: features of unit length, in float32.
            keys_B: int64, a key for each text to draw its noise in training from; None: torch's generator.

        Raises:
            MmbaseError: texts longer than context_length.
        """
        if isinstance(text, PackedText):
            return self._encode_packed(text, normalize, keys_B)
        length = self._checked_length(text)
        token, keep_BT = self._pooled_token(text), self._keep(text)
        if _packable(text) and (packed := self._pack(text, token, keep_BT)) is not None:
            return self._encode_packed(packed, normalize, keys_B)
        x_BTD = self.token_embedding(text) + self.positional_embedding[:length]
        x_BTD = self.dropout(x_BTD, None, None if keys_B is None else draw(keys_B, _DROPOUT))
        x_BTD = self.transformer(x_BTD, causal=self.config.causal, keep_BN=keep_BT, token=token, keys_B=keys_B)
        if token is not None:
            return project_token(x_BTD, self.norm, self.proj, normalize=normalize)
        weight_BT1 = (text != self.config.pad_id).to(x_BTD.dtype)[:, :, None]
        features_BE = self.proj((self.norm(x_BTD) * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1))
        return unit_length(features_BE) if normalize else features_BE

    def _encode_packed(self, text: PackedText, normalize: bool, keys_B: Tensor | None) -> Tensor:
        """The features_BE, computed from the packed tokens alone."""
        packing = text.packing
        x_PD = self.token_embedding(text.text_P) + F.embedding(packing.position_P, self.positional_embedding)
        x_PD = self.dropout(x_PD, packing, None if keys_B is None else draw(keys_B, _DROPOUT))
        x_PD = self.transformer(x_PD, causal=self.config.causal, token=text.token_B, packing=packing, keys_B=keys_B)
        if text.token_B is not None:
            return project_token(x_PD, self.norm, self.proj, normalize=normalize)
        features_BE = self.proj(packing.means(self.norm(x_PD), text.text_P != self.config.pad_id))
        return unit_length(features_BE) if normalize else features_BE

    def pack(self, text_BT: Tensor) -> Tensor | PackedText:
        """Leave out every token that no feature depends on; features and gradients stay the same to rounding.

        Only a causal tower, or one that masks padding, has such tokens; for others, and where there is none to leave
        out, the ids are returned as they are. Looks at the ids, so call it where they lie on the CPU, before they are
        copied to a GPU and outside of compiled code::

            text = model.text.pack(ids).to("cuda", non_blocking=True)  # the tower then waits for nothing
            features = model.encode_text(text)

        A graph compiled for one packed batch serves others too: their sizes are dynamic.

        Raises:
            MmbaseError: texts longer than context_length.
        """
        self._checked_length(text_BT)
        packed = self._pack(text_BT, self._pooled_token(text_BT), self._keep(text_BT))
        return text_BT if packed is None else packed

    def _pack(self, text_BT: Tensor, token: Tensor | int | None, keep_BT: Tensor | None) -> PackedText | None:
        """The tokens that features depend on; None where these are all."""
        if not self._skips_padding:
            return None
        needed_BT = self._needed(text_BT, token, keep_BT)
        if needed_BT.all():
            return None
        packing = Packing.of(needed_BT)
        token_B = None
        if token is not None:
            column_B1 = token[:, None] if isinstance(token, Tensor) else torch.full_like(text_BT[:, :1], token)
            token_B = packing.start_B + needed_BT.cumsum(1).gather(1, column_B1)[:, 0] - 1
        return PackedText(text_BT[packing.row_P, packing.position_P], packing, token_B)

    def _checked_length(self, text_BT: Tensor) -> int:
        length, limit = text_BT.shape[1], self.config.context_length
        if length > limit:
            raise MmbaseError(f"texts have {length} tokens but the model's context_length is {limit}; cut them to that")
        return length

    def trim(self, text_BT: Tensor) -> Tensor:
        """Drop the trailing columns that no feature depends on; features stay the same. `pack` leaves out more.

        As for `pack`, call it where the ids lie on the CPU, before the model and outside of compiled code.
        """
        if not self._skips_padding:
            return text_BT
        needed_BT = self._needed(text_BT, self._pooled_token(text_BT), self._keep(text_BT))
        return text_BT[:, : int(needed_BT.any(0).nonzero().max()) + 1]

    @property
    def _skips_padding(self) -> bool:
        """Whether features stay the same when tokens are left out: when no token that is pooled attends to them.

        That is so where later tokens are out of sight (causal) or padding is (mask_padding), but not where a tower sees
        padding as it sees words, as SigLIP's does. Nor with pool=last: that token stands behind the padding, or is
        padding itself, and sees what precedes it.
        """
        return (self.config.causal or self.config.mask_padding) and self.config.pool != "last"

    def _needed(self, text_BT: Tensor, token: Tensor | int | None, keep_BT: Tensor | None) -> Tensor:
        """True for the tokens that features depend on; the first of each row is always one of them."""
        if not self.config.causal:
            assert keep_BT is not None  # _skips_padding
            return keep_BT
        column_T = torch.arange(text_BT.shape[1], device=text_BT.device)
        if token is None:  # mean: up to the last token that is not padding
            last_B1 = ((text_BT != self.config.pad_id) * column_T).amax(1, keepdim=True)
        else:
            last_B1 = token[:, None] if isinstance(token, Tensor) else torch.full_like(text_BT[:, :1], token)
        needed_BT = column_T <= last_B1
        return needed_BT if keep_BT is None else needed_BT & keep_BT

    def _keep(self, text_BT: Tensor) -> Tensor | None:
        """True for tokens that may be attended to; None where all may."""
        config = self.config
        if not config.mask_padding:
            return None
        keep_BT = text_BT != config.pad_id
        keep_BT[:, 0] = True  # a row of nothing but padding attends to its first token rather than to nothing
        if config.pool in ("eot", "eos"):  # the end token is no padding, even where both have one id
            keep_BT = keep_BT.scatter(1, _end_token(text_BT, config)[:, None], True)
        return keep_BT

    def _pooled_token(self, text_BT: Tensor) -> Tensor | int | None:
        """Position of the one token that is pooled, or None where all are."""
        match self.config.pool:
            case "eot" | "eos":
                return _end_token(text_BT, self.config)
            case "last":
                return text_BT.shape[1] - 1
            case "first":
                return 0
            case _:
                return None


def _packable(text_BT: Tensor) -> bool:
    """Whether ids can be packed here: it makes sizes depend on them, so they have to be at hand, on the CPU.

    Elsewhere the padded path runs to the same features, unless the caller has packed them: under torch.compile,
    torch.export and tracing, for which sizes must not depend on data; with meta and fake tensors, which have no data;
    and on a GPU, which would be waited for.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and type(text_BT) is Tensor and text_BT.device.type == "cpu"


def _end_token(text_BT: Tensor, config: TextConfig) -> Tensor:
    """Where each text ends: at its highest id (CLIP's tokenizer), or at the first eos_id."""
    if config.pool == "eot":
        return text_BT.argmax(dim=1)
    return (text_BT == config.eos_id).to(torch.int32).argmax(dim=1)
