"""What every tokenizer shares: cleaning of text, checks, configs, and the call that gives int64 [B, T]."""

from __future__ import annotations

import functools
import html
import itertools
import os
import re
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmbase.errors import MmbaseError, nearest

# ASCII text that ftfy or html.unescape might change: control characters that ftfy removes (tab, line feed,
# form feed and carriage return stay, and are whitespace to str.split) and ampersands that may open an
# entity. Mojibake, quotes, ligatures, widths, surrogates and normalisation concern non-ASCII text only.
_ASCII_TO_REPAIR = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]|&[^\t\n\f <&;]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.cache
def _to_repair() -> re.Pattern[str]:
    """What ftfy or html.unescape might change in one character, or takes for the end of a line, in any script."""
    from ftfy import chardata

    touched = {*chardata.CONTROL_CHARS, *chardata.LIGATURES, *chardata.WIDTH_MAP, *map(ord, "\n\f\r\u2028\u2029")}
    touched |= {*range(0x80, 0xA0), *range(0xD800, 0xE000)}  # C1 controls and surrogates
    return re.compile("[" + "".join(f"\\U{code:08x}" for code in sorted(touched)) + r"]|&[^ <&;]")


def _straightened(text: str) -> str | None:
    """What ftfy makes of a text that needs nothing but straight quotes, at half its cost; ``None`` for any other.

    ftfy repeats its steps until nothing changes: mojibake is looked for before and after the quotes change.
    """
    from ftfy.badness import is_bad
    from ftfy.fixes import uncurl_quotes

    if _to_repair().search(text) or is_bad(text):
        return None
    straight = uncurl_quotes(text)
    if not unicodedata.is_normalized("NFC", straight):
        return None
    return None if straight != text and not straight.isascii() and is_bad(straight) else straight


def _repair(text: str) -> str:
    """Undo mojibake and HTML escapes with ftfy and two passes of ``html.unescape``, as OpenCLIP does."""
    if text.isascii():
        if not _ASCII_TO_REPAIR.search(text):
            return text
    elif (straight := _straightened(text)) is not None:
        return straight
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _clean_whitespace(text: str) -> str:
    return " ".join(_repair(text).split())


def _clean_lower(text: str) -> str:
    return _clean_whitespace(text).lower()


def _clean_canonicalize(text: str) -> str:
    # SigLIP's: underscores are spaces, ASCII punctuation goes, lower case (big_vision, prompt_engineering.py)
    return " ".join(_repair(text).replace("_", " ").translate(_PUNCTUATION).lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "lower": _clean_lower,
    "whitespace": _clean_whitespace,
    "canonicalize": _clean_canonicalize,
}


class Tokenizer(ABC):
    """What every tokenizer offers; build one with :func:`load_tokenizer` or :meth:`from_config`.

    Attributes: ``context_length`` (T unless a call says otherwise), ``vocab_size`` (ids are below it),
    ``pad_id``, ``sot_id`` and ``eot_id`` (``None`` where the vocabulary has no such token).
    """

    kinds: ClassVar[dict[str, type[Tokenizer]]] = {}
    kind: ClassVar[str]
    options: ClassVar[tuple[str, ...]]

    context_length: int
    vocab_size: int
    pad_id: int | None
    sot_id: int | None
    eot_id: int | None
    clean: str

    def __init_subclass__(cls) -> None:
        Tokenizer.kinds[cls.kind] = cls

    def __init__(self, context_length: int, clean: str) -> None:
        if clean not in CLEANERS:
            raise MmbaseError(
                f"unknown text cleaning {clean!r}{nearest(clean, CLEANERS)} (known: {', '.join(CLEANERS)})"
            )
        self.context_length = checked_length(context_length)
        self.clean = clean

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> np.ndarray:
        """Token ids of ``texts`` as int64 [B, T]; a single string is a batch of one.

        Raises :class:`MmbaseError` for anything that is not a string, and for a context length below 1.
        """
        length = self.context_length if context_length is None else checked_length(context_length)
        return self._batch(checked_texts(texts), length)

    @abstractmethod
    def _batch(self, texts: list[str], length: int) -> np.ndarray:
        """Ids int64 [len(texts), length] of texts not yet cleaned."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """All ids of one text, cleaned, without start, end or padding."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of a row of ids: up to the first end-of-text id, without special tokens."""

    @property
    def config(self) -> dict[str, Any]:
        """A JSON-able description: ``{"kind": ..., "context_length": ..., "clean": ..., ...}``."""
        return {"kind": self.kind} | {name: getattr(self, name) for name in self.options}

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Write the files this tokenizer needs into ``folder``; its config, with paths relative to ``folder``."""
        return self.config

    @staticmethod
    def from_config(config: dict[str, Any], folder: str | os.PathLike[str] | None = None) -> Tokenizer:
        """The tokenizer that ``config`` describes; relative paths in it are looked up in ``folder``."""
        import mmbase.data.tokenizer  # noqa: F401  (registers every kind)

        options = dict(config)
        kind = str(options.pop("kind", "clip"))
        if kind not in Tokenizer.kinds:
            known = ", ".join(Tokenizer.kinds)
            raise MmbaseError(f"unknown tokenizer kind {kind!r}{nearest(kind, Tokenizer.kinds)} (known: {known})")
        made = Tokenizer.kinds[kind]
        for name in options:
            if name not in made.options:
                raise MmbaseError(f"unknown key {name!r} in a {kind} tokenizer{nearest(name, made.options)}")
        for name in ("path", "source"):
            # a source that is no folder beside the config is a hub name
            if folder is not None and name in options and (name == "path" or (Path(folder) / options[name]).exists()):
                options[name] = str(Path(folder) / options[name])
        return made(**options)

    def text_ids(self, ids: Iterable[int], skipped: set[int | None]) -> list[int]:
        """``ids`` up to the first end-of-text id, without the ``skipped`` ones; refuses ids out of the vocabulary."""
        row = [int(token) for token in ids]
        row = row[1:] if row[:1] == [self.sot_id] else row  # some vocabularies start and end with the same id
        before_end = itertools.takewhile(lambda token: token != self.eot_id, row)
        kept = [token for token in before_end if token not in skipped]
        for token in kept:
            if not 0 <= token < self.vocab_size:
                raise MmbaseError(
                    f"token id {token} is outside the vocabulary of {self.vocab_size}; pass one row of ids"
                )
        return kept


def checked_length(context_length: int) -> int:
    """``context_length``, or :class:`MmbaseError` if it is no whole number of at least 1."""
    if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 1:
        raise MmbaseError(f"context_length must be a whole number of at least 1, not {context_length!r}")
    return context_length


def checked_texts(texts: str | Sequence[str]) -> list[str]:
    """``texts`` as a list of strings, or :class:`MmbaseError` naming the first that is none."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | bytearray) or not isinstance(texts, Iterable):
        raise MmbaseError(f"texts must be a string or a list of strings, not {type(texts).__name__}")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise MmbaseError(
                f"text {index} is of type {type(text).__name__}, not a string; decode or convert it first"
            )
    return texts
