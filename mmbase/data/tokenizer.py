"""Text to token ids: CLIP's BPE, Hugging Face tokenizers, and small vocabularies of our own behind one call.

``tokenizer(texts) -> int64 array [B, T]``; B texts, T context length. Rows are padded with ``pad_id`` and a
row that is too long is cut, its last id being the end-of-text id, as in OpenCLIP. Every tokenizer can be
pickled (data-loading workers), described by a JSON-able ``config`` and rebuilt from it.

Importing this module loads neither torch, transformers, open_clip, ftfy nor regex.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmbase.data.clip_tokenizer import ClipTokenizer
from mmbase.data.file_tokenizer import FileTokenizer, train_tokenizer
from mmbase.data.tokenizer_base import CLEANERS, Tokenizer
from mmbase.errors import MmbaseError

__all__ = [
    "CLEANERS",
    "ClipTokenizer",
    "FileTokenizer",
    "HfTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]


class HfTokenizer(Tokenizer):
    """A tokenizer of the ``transformers`` library, cleaned, cut and padded as OpenCLIP's ``HFTokenizer``.

    ``source`` is a local folder or a hub name (the library downloads). ``strip_sep_token`` replaces the
    separator by 0 (CLIPA); ``mode="clips"`` puts the class token last (CLIPS); ``language`` is for NLLB.
    """

    kind = "hf"
    options = ("source", "context_length", "clean", "strip_sep_token", "language", "mode")

    def __init__(
        self,
        source: str,
        context_length: int = 77,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
        language: str | None = None,
        mode: str | None = None,
    ) -> None:
        super().__init__(context_length, clean)
        if mode not in (None, "clips"):
            raise MmbaseError(f"unknown tokenizer mode {mode!r}; leave it out, or use 'clips'")
        self.source, self.strip_sep_token, self.language, self.mode = str(source), strip_sep_token, language, mode
        self._library = _load_transformers_tokenizer(self.source)
        if language is not None:
            if not hasattr(self._library, "set_src_lang_special_tokens"):
                raise MmbaseError(f"the tokenizer {self.source!r} has no languages; leave language={language!r} out")
            self._library.set_src_lang_special_tokens(language)
        self.vocab_size = len(self._library)
        self.pad_id = self._library.pad_token_id
        self.sot_id = _first(self._library.bos_token_id, self._library.cls_token_id)
        self.eot_id = _first(self._library.eos_token_id, self._library.sep_token_id)

    def _batch(self, texts: list[str], length: int) -> np.ndarray:
        if not texts:
            return np.zeros((0, length), np.int64)
        cleaned = [CLEANERS[self.clean](text) for text in texts]
        if self.mode == "clips":
            return self._batch_clips(cleaned, length)
        encoded = self._library(cleaned, max_length=length, padding="max_length", truncation=True)
        ids = np.array(encoded["input_ids"], np.int64).reshape(len(texts), length)
        return np.where(ids == self._library.sep_token_id, 0, ids) if self.strip_sep_token else ids

    def _batch_clips(self, cleaned: list[str], length: int) -> np.ndarray:
        if length < 3:
            raise MmbaseError(f"mode 'clips' needs a context_length of at least 3, not {length}")
        library = self._library
        rows = np.full((len(cleaned), length), library.pad_token_id, np.int64)
        for row, ids in zip(rows, library(cleaned, add_special_tokens=False)["input_ids"]):
            ids = [library.bos_token_id, *ids[: length - 3], library.eos_token_id]
            row[: len(ids)] = ids
            row[-1] = library.cls_token_id
        return rows

    def encode(self, text: str) -> list[int]:  # noqa: D102
        return list(self._library(CLEANERS[self.clean](text), add_special_tokens=False)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:  # noqa: D102
        return str(
            self._library.decode(self.text_ids(ids, {self.sot_id, self.pad_id}), skip_special_tokens=True)
        ).strip()

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Any]:  # noqa: D102
        self._library.save_pretrained(str(Path(folder) / "tokenizer"))
        return self.config | {"source": "tokenizer"}


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _load_transformers_tokenizer(source: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MmbaseError(
            f"the tokenizer {source!r} needs the transformers library; pip install 'mmbase[hub]'"
        ) from None
    # workers fork after the first batch, and Rust threads do not survive a fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MmbaseError(
            f"no tokenizer at {source!r}: {reason} Give a folder with tokenizer.json or a hub name"
        ) from error


def load_tokenizer(description: Tokenizer | dict[str, Any] | str | os.PathLike[str] = "clip") -> Tokenizer:
    """A tokenizer from what a user may write.

    ``"clip"``; a config (dict); the path of a ``tokenizer.json``; a folder that ``transformers`` can load;
    ``"hf:org/name"`` for the hub; a tokenizer is returned as it is. Raises :class:`MmbaseError` otherwise.
    """
    if isinstance(description, Tokenizer):
        return description
    if isinstance(description, dict):
        return Tokenizer.from_config(description)
    name = str(description)
    if name == "clip":
        return ClipTokenizer()
    if name.startswith("hf:"):
        return HfTokenizer(name.removeprefix("hf:"))
    if Path(name).is_dir():
        return HfTokenizer(name)
    if name.endswith(".json"):
        return FileTokenizer(name)
    raise MmbaseError(
        f"unknown tokenizer {name!r}; use 'clip', the path of a tokenizer.json, a folder, or 'hf:org/name'"
    )
