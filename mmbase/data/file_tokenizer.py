"""Small byte-level BPE vocabularies of our own: trained on captions, stored with a run, sampled for regularisation."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmbase.data.tokenizer_base import CLEANERS, Tokenizer, checked_length, checked_texts
from mmbase.errors import MmbaseError, nearest


class FileTokenizer(Tokenizer):
    """A vocabulary in one ``tokenizer.json`` of the ``tokenizers`` library, stored beside a run's weights.

    ``path`` is that file (or pass its content as ``content``). A row is start, ids, end, padding; a special
    token written out in a caption is read as plain text.
    """

    kind = "file"
    options = ("path", "context_length", "clean", "pad_token", "start_token", "end_token")

    def __init__(
        self,
        path: str | os.PathLike[str] = "tokenizer.json",
        context_length: int = 32,
        clean: str = "lower",
        pad_token: str = "[PAD]",
        start_token: str | None = "[BOS]",
        end_token: str = "[EOS]",
        *,
        content: str | None = None,
    ) -> None:
        super().__init__(context_length, clean)
        self.path, self.pad_token, self.start_token, self.end_token = str(path), pad_token, start_token, end_token
        self.content = _read_tokenizer_file(self.path) if content is None else content
        import tokenizers

        try:
            self._library = tokenizers.Tokenizer.from_str(self.content)
        except Exception as error:  # the Rust library raises bare Exception
            raise MmbaseError(f"{self.path!r} is not a tokenizer.json of the tokenizers library: {error}") from error
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        self._ids = functools.lru_cache(1 << 15)(self._encoded)  # the captions of a small dataset come back each epoch
        self._words = functools.lru_cache(1 << 15)(self._pre_tokens)
        self.vocab_size = max(self._library.get_vocab().values()) + 1
        self._pad, self._end = self._special_id(pad_token), self._special_id(end_token)
        self.pad_id, self.eot_id = self._pad, self._end
        self.sot_id = None if start_token is None else self._special_id(start_token)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {name: getattr(self, name) for name in self.options}
        return functools.partial(FileTokenizer, content=self.content, **options), ()

    def _special_id(self, token: str) -> int:
        index = self._library.token_to_id(token)
        if index is None:
            similar = nearest(token, self._library.get_vocab())
            raise MmbaseError(f"the tokenizer {self.path!r} has no token {token!r}{similar}")
        return index

    def _rows(self, texts_ids: Iterable[Sequence[int]], count: int, length: int) -> np.ndarray:
        rows = np.full((count, length), self._pad, np.int64)
        start = [] if self.sot_id is None else [self.sot_id]
        for row, ids in zip(rows, texts_ids):
            ids = [*start, *ids][: length - 1]
            row[: len(ids)] = ids
            row[len(ids)] = self._end
        return rows

    def _batch(self, texts: list[str], length: int) -> np.ndarray:
        # one text a call keeps Rust's thread pool out of it: it would not survive the fork of a worker
        return self._rows(map(self._ids, texts), len(texts), length)

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._library.encode(CLEANERS[self.clean](text), add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:  # noqa: D102
        return list(self._ids(text))

    def decode(self, ids: Iterable[int]) -> str:  # noqa: D102
        return self._library.decode(self.text_ids(ids, {self.sot_id, self.pad_id}), skip_special_tokens=False).strip()

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Any]:  # noqa: D102
        path = Path(folder) / "tokenizer.json"
        partial = path.with_name(f".tokenizer.json.{os.getpid()}")  # renamed when whole: a kill leaves no half file
        try:
            partial.write_text(self.content, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise MmbaseError(f"cannot write {str(path)!r}: {error.strerror}; check the folder and the disk") from error
        return self.config | {"path": "tokenizer.json"}

    def sample(
        self, texts: Sequence[str], seeds: Sequence[int], dropout: float = 0.1, context_length: int | None = None
    ) -> np.ndarray:
        """Ids int64 [B, T] under BPE-dropout: each merge is left out with probability ``dropout``.

        Provilkov et al. 2020, "BPE-Dropout: Simple and Effective Subword Regularization". Row i depends on
        ``texts[i]`` and ``seeds[i]`` alone, whatever the batch, the worker or the machine, so a resumed run
        repeats its ids. (The Rust library has dropout too, drawn from a generator that cannot be seeded.)
        """
        texts = checked_texts(texts)
        if not 0.0 <= dropout <= 1.0:
            raise MmbaseError(f"dropout must be between 0 and 1, not {dropout!r}")
        if len(seeds) != len(texts):
            raise MmbaseError(f"{len(texts)} texts need as many seeds, not {len(seeds)}")
        length = self.context_length if context_length is None else checked_length(context_length)
        sampled = (self._sampled_ids(text, random.Random(int(seed)), dropout) for text, seed in zip(texts, seeds))
        return self._rows(sampled, len(texts), length)

    @functools.cached_property
    def _merges(self) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        """Rank of each pair of symbols, and the vocabulary."""
        model = json.loads(self.content)["model"]
        supported = model["type"] == "BPE" and not model.get("continuing_subword_prefix")
        if not supported or model.get("end_of_word_suffix") or not self._library.pre_tokenizer:
            raise MmbaseError(f"dropout needs a byte-level BPE tokenizer, which {self.path!r} is not; set dropout to 0")
        # older files write a merge as "a b", newer ones as ["a", "b"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        return {(first, second): rank for rank, (first, second) in enumerate(pairs)}, model["vocab"]

    def _pre_tokens(self, text: str) -> tuple[str, ...]:
        text = CLEANERS[self.clean](text)
        if self._library.normalizer is not None:
            text = self._library.normalizer.normalize_str(text)
        return tuple(word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(text))

    def _sampled_ids(self, text: str, rng: random.Random, dropout: float) -> list[int]:
        ranks, vocabulary = self._merges
        symbols = (_merge_with_dropout(list(word), ranks, rng, dropout) for word in self._words(text))
        return [vocabulary[symbol] for symbol in itertools.chain.from_iterable(symbols)]


def _merge_with_dropout(
    symbols: list[str], ranks: dict[tuple[str, str], int], rng: random.Random, dropout: float
) -> list[str]:
    """Byte-pair merges of one word; at every step each possible merge is left out with probability ``dropout``."""
    while True:
        possible = ((ranks.get(pair), place) for place, pair in enumerate(itertools.pairwise(symbols)))
        kept = [(rank, place) for rank, place in possible if rank is not None and rng.random() >= dropout]
        if not kept:
            return symbols
        _, place = min(kept)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def _read_tokenizer_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise MmbaseError(
            f"cannot read the tokenizer file {path!r}: {reason}; give the path of a tokenizer.json"
        ) from error


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context_length: int = 32, clean: str = "lower", min_frequency: int = 2
) -> FileTokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids learned from ``texts``; the same texts give the same ids.

    Bytes are the alphabet, so no text is unknown. Padding is id 0 and end-of-text the highest id: a text
    tower that pools at the largest id, as OpenCLIP's, finds it. Fewer merges than asked for are learned where
    no pair occurs ``min_frequency`` times.
    """
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteLevel

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 3:
        raise MmbaseError(f"vocab_size must be at least {len(alphabet) + 3} (256 bytes, 3 special), not {vocab_size}")
    cleaned = [CLEANERS[clean](text) for text in checked_texts(list(texts))]
    if not any(cleaned):
        raise MmbaseError("no text to train a tokenizer on: all captions are empty")

    def library(model: models.BPE) -> Library:
        made = Library(model)
        made.normalizer = normalizers.NFC()
        # a leading space makes a word one token wherever it stands
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
        made.decoder = ByteLevel()
        return made

    learner = library(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3, min_frequency=min_frequency, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(cleaned, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    tokens = ["[PAD]", *(token for token, _ in learned), "[BOS]", "[EOS]"]
    final = library(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    final.add_special_tokens([AddedToken(name, special=True) for name in ("[PAD]", "[BOS]", "[EOS]")])
    return FileTokenizer(context_length=context_length, clean=clean, content=final.to_str())
