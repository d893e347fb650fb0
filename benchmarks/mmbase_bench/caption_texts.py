"""Captions to measure with: worded by rule where no file of real ones is given.

A third are the little words of English, the others whole words of CLIP's vocabulary by Zipf's law. Its merges stand in
the order of their frequency in captions, so that common words are common here too, and rare ones, names and numbers
still turn up that no cache has seen.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mmbase.errors import MmbaseError

KINDS = {
    "ordinary": "words by Zipf's law with names, numbers and punctuation; one in twenty with characters beyond ASCII",
    "templates": "ImageNet's class names in OpenAI's 80 templates",
    "unicode": "every caption with curly quotes, accents, other scripts or emoji",
    "markup": "every caption with HTML entities or broken encoding, which ftfy repairs",
}
MEDIAN_WORDS, WORDS_SIGMA, MOST_WORDS = 9, 0.45, 60
"""Words of a caption: the median and the standard deviation of the logarithm, and the most."""

_LITTLE_WORDS = ("a", "the", "of", "in", "on", "and", "with", "to", "for", "at", "is", "by", "from", "an")
_SHORTEST_WORD = 4
"""Shorter entries of the vocabulary are mostly endings."""

_BEYOND_ASCII = ("“{}”", "{}’s", "café {}", "{} – über", "{} 🌸", "{} 写真", "señor {}", "{}… naïve", "фото {}")
_MARKUP = ("{} &amp; co", "&quot;{}&quot;", "{}&nbsp;&#39;s", "schÃ¶n {}", "{}â€™s", "l’humanitÃ© {}", "<b>{}</b>&lt;")


def captions(kind: str, count: int, seed: int) -> list[str]:
    """``count`` captions of a kind; the same for the same seed.

    Raises:
        MmbaseError: no such kind.
    """
    if kind not in KINDS:
        raise MmbaseError(f"there are no captions {kind!r}; use {', '.join(KINDS)}")
    rng = np.random.default_rng((seed, *kind.encode()))
    if kind == "templates":
        return _templated(count, rng)
    share = {"ordinary": 0.05, "unicode": 1.0, "markup": 1.0}[kind]
    patterns = _MARKUP if kind == "markup" else _BEYOND_ASCII
    chosen = rng.random(count) < share
    return [_caption(rng, patterns if special else ()) for special in chosen]


def captions_of_file(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        MmbaseError: there is no such file, or nothing in it.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise MmbaseError(f"cannot read the captions {str(path)!r}: {error.strerror}") from error
    if not lines:
        raise MmbaseError(f"the file {str(path)!r} holds no captions; one a line")
    return lines


def _templated(count: int, rng: np.random.Generator) -> list[str]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    names, templates = rng.integers(len(IMAGENET_CLASSNAMES), size=count), rng.integers(80, size=count)
    return [OPENAI_IMAGENET_TEMPLATES[t](IMAGENET_CLASSNAMES[n]) for n, t in zip(names, templates)]


def _caption(rng: np.random.Generator, patterns: tuple[str, ...]) -> str:
    length = int(np.clip(round(math.exp(math.log(MEDIAN_WORDS) + WORDS_SIGMA * rng.standard_normal())), 2, MOST_WORDS))
    words = [_word(rng) for _ in range(length)]
    if patterns:
        place = int(rng.integers(length))
        words[place] = patterns[rng.integers(len(patterns))].format(words[place])
    if rng.random() < 0.5:
        words[0] = words[0][:1].upper() + words[0][1:]
    return " ".join(words) + str(rng.choice(["", ".", "!", " - 4K", ", 1920x1080"], p=[0.6, 0.3, 0.04, 0.03, 0.03]))


def _word(rng: np.random.Generator) -> str:
    if rng.random() < 1 / 3:
        return str(rng.choice(_LITTLE_WORDS))
    words = _vocabulary()
    kind = rng.random()
    if kind < 0.02:  # a name that nobody has seen
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(4, 11)))).capitalize()
    if kind < 0.04:
        return str(rng.integers(1, 3000))
    word = words[int(len(words) ** rng.random()) - 1]  # rank by Zipf's law: uniform in its logarithm
    return word + "," if kind < 0.1 else word


_words: list[str] = []


def _vocabulary() -> list[str]:
    """Whole words of CLIP's vocabulary, the most frequent first."""
    if not _words:
        from open_clip.tokenizer import SimpleTokenizer

        tokens = [token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>")]
        _words.extend(t for t in tokens if len(t) >= _SHORTEST_WORD and t.isascii() and t.isalpha())
    return _words
