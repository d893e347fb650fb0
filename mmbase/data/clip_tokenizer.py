"""CLIP's byte-pair encoding, with ids equal to OpenCLIP's and most of the work done by a cache of chunks.

Plain ASCII texts need neither ftfy nor regex, so that a command line that tokenizes a few labels starts fast.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import re
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmbase.data.tokenizer_base import CLEANERS, Tokenizer
from mmbase.errors import MmbaseError

_CLIP_MERGES = 49152 - 256 - 2
_CLIP_SPECIAL = {"<start_of_text>": 49406, "<end_of_text>": 49407}
_TYPE = "I"  # unsigned int: rows are assembled as bytes of this type, since joining bytes beats joining lists
_ID = np.dtype(_TYPE)

# The words of CLIP's pre-tokenizer: letters, single digits, English contractions, runs of the rest. None
# contains whitespace, so a text may be split at spaces first and each chunk looked up in a cache.
_ASCII_WORD = re.compile(r"(?i)[a-z]+|[0-9]|'(?:s|t|re|ve|m|ll|d)|<(?:start|end)_of_text>|[^a-z0-9]+", re.ASCII)


@functools.cache
def _unicode_word() -> Any:
    import regex  # its \p classes and case folding define the ids; re and Rust's classes differ from them

    classes = r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    return regex.compile(rf"<start_of_text>|<end_of_text>|'(?:s|t|re|ve|m|ll|d)|{classes}", regex.IGNORECASE)


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, in vocabulary order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class _ClipChunks(dict[str, bytes]):
    """Chunk of cleaned text without spaces -> its ids as bytes; a miss runs the BPE.

    The vocabulary is read on the first miss. Bounded, so that memory stays flat over billions of captions.
    """

    limit = 1 << 17
    longest = 64

    def __init__(self) -> None:
        super().__init__()
        self._symbols = _byte_symbols()

    @functools.cached_property
    def merges(self) -> list[tuple[str, str]]:
        spec = importlib.util.find_spec("open_clip")  # finds the package without running it
        if spec is None or not spec.submodule_search_locations:
            raise MmbaseError(
                "CLIP's vocabulary comes with open_clip, which is not installed; pip install open-clip-torch"
            )
        path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
        with gzip.open(path) as file:
            file.readline()  # a version line
            lines = itertools.islice(file.read(1 << 20).decode("utf-8", "ignore").split("\n"), _CLIP_MERGES)
            return [(first, second) for first, second in map(str.split, lines)]

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        bytes_ = list(self._symbols.values())
        tokens = [*bytes_, *(symbol + "</w>" for symbol in bytes_), *map("".join, self.merges), *_CLIP_SPECIAL]
        return {token: index for index, token in enumerate(tokens)}

    @functools.cached_property
    def tokens(self) -> list[str]:
        return list(self.vocabulary)

    @functools.cached_property
    def _bpe(self) -> Any:
        import tokenizers

        # The model alone, without the pipeline around it: a word costs half, and no thread pool is ever started, which
        # would not survive the fork of a worker.
        return tokenizers.models.BPE(vocab=self.vocabulary, merges=self.merges, end_of_word_suffix="</w>")

    def __missing__(self, chunk: str) -> bytes:
        if chunk.isascii() and chunk.isalpha():  # one word, its bytes their own symbols
            ids = [token.id for token in self._bpe.tokenize(chunk)]
        else:
            ids = self._ids(chunk)
        value = array(_TYPE, ids).tobytes()
        if len(chunk) <= self.longest:
            if len(self) >= self.limit:
                self.clear()
            self[chunk] = value
        return value

    def _ids(self, chunk: str) -> list[int]:
        plain = chunk.isascii() and chunk.isprintable()
        words: list[str] = (_ASCII_WORD if plain else _unicode_word()).findall(chunk)
        ids: list[int] = []
        for word in words:
            symbols = word if plain else word.encode().decode("latin-1").translate(self._symbols)
            special = _CLIP_SPECIAL.get(symbols)
            if special is not None:
                ids.append(special)
            else:
                ids += [token.id for token in self._bpe.tokenize(symbols)]
        return ids


_clip_chunks = _ClipChunks()


class ClipTokenizer(Tokenizer):
    """CLIP's lower-cased byte-pair encoding; ids equal to ``open_clip.SimpleTokenizer`` on any string.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". The
    vocabulary of 49,408 is read from the installed open_clip package.
    """

    kind = "clip"
    options = ("context_length", "clean")

    vocab_size = 49408
    pad_id = 0  # also the id of "!" inside a text, as in OpenCLIP: tell padding by its place after eot_id
    sot_id = _CLIP_SPECIAL["<start_of_text>"]
    eot_id = _CLIP_SPECIAL["<end_of_text>"]

    def __init__(self, context_length: int = 77, clean: str = "lower") -> None:
        super().__init__(context_length, clean)

    def _text_bytes(self, text: str) -> bytes:
        return b"".join(map(_clip_chunks.__getitem__, CLEANERS[self.clean](text).split()))

    def _batch(self, texts: list[str], length: int) -> np.ndarray:
        start, end = (np.array(token, _ID).tobytes() for token in (self.sot_id, self.eot_id))
        row_bytes, room = length * _ID.itemsize, (length - 1) * _ID.itemsize
        rows = [((start + self._text_bytes(text))[:room] + end).ljust(row_bytes, b"\0") for text in texts]
        return np.frombuffer(b"".join(rows), _ID).reshape(len(texts), length).astype(np.int64)

    def encode(self, text: str) -> list[int]:  # noqa: D102
        return np.frombuffer(self._text_bytes(text), _ID).tolist()

    def decode(self, ids: Iterable[int]) -> str:  # noqa: D102
        symbols = "".join(_clip_chunks.tokens[token] for token in self.text_ids(ids, {self.sot_id}))
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        return bytes(byte_of[symbol] for symbol in symbols).decode("utf-8", "replace").replace("</w>", " ").strip()
