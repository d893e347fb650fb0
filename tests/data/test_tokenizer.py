"""CLIP's token ids against OpenCLIP's, on ordinary captions and on hostile text."""

from __future__ import annotations

import html
import multiprocessing
import random
import string
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmbase.data.clip_tokenizer import _ASCII_WORD, _clip_chunks, _ClipChunks, _unicode_word
from mmbase.data.tokenizer import CLEANERS, ClipTokenizer
from mmbase.errors import MmbaseError

# ------------------------------------------------------------------------------------------- hostile text

_WORDS = [
    *("a", "photo", "of", "the", "dog's", "house", "in", "New", "York,", "they're", "we've"),
    *("I'm", "don't", "he'd", "you'll", "U.S.A.", "co-op", "x86", "3rd", "1,024"),
]
_PIECES = [
    *("<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "<End_Of_Text>", "<start_of", "<|endoftext|>", "</w>"),
    *("&amp;", "&amp;amp;lt;", "&eacute;", "&EACUTE;", "&notit;", "&not", "&#233;", "&#x1F600;", "&#0;", "&#128;"),
    *("&#xD800;", "&#1;", "&", "& ", "&;", "&#", "&#;", "<b>", "<", "&lt;start_of_text&gt;", "&nbsp;", "&#13;"),
    *("\x1b[31m", "\x1b[0m", "\x1b", "\x00", "\x07", "\x0b", "\x0c", "\x1c", "\x1f", "\x7f", "\x80", "\x85", "\x9b"),
    *(
        "\r\n",
        "\r",
        "\n",
        "\t",
        "\u2028",
        "\u2029",
        "\u00a0",
        "\u1680",
        "\u2003",
        "\u200b",
        "\u3000",
        "\ufeff",
        "\u180e",
    ),
    *("\ud83d\ude00", "\ud83d", "\udca9", "\udca9\ud83d"),
    *("²", "½", "①", "Ⅷ", "٣", "৪", "〇", "㊿", "𝟘", "𐄇", "一"),
    *("e\u0301", "\u0301", "n\u0303o", "\u0e33", "ก็", "क्षि", "\u20dd", "Å", "\u212b", "가", "\u1100\u1161"),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "🏴\U000e0067\U000e0062\U000e007f", "☺️", "1️⃣"),
    *(
        "schÃ¶n",
        "voilÃ\xa0 le",
        "â€œquoteâ€\x9d",
        "Ã©",
        "ÃƒÂ©",
        "â€™s",
        "ðŸ˜€",
        "ï¿½",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "l’humanitÃ©",
        "æ–‡å—",
    ),
    *(
        "‘s",
        "’s",
        "'ſ",
        "'S",
        "'LL",
        "'Ve",
        "ʼs",
        "'''",
        "“curly”",
        "ﬁ",
        "ﬆ",
        "ＬＯＵＤ",
        "ｶﾞ",
        "İstanbul",
        "ΣΑΣ",
        "ß",
        "ẞ",
        "Ω",
        "K",
    ),
    *("\ufffd", "\ufffe", "\uffff", "\U0001fbff", "\u0378", "\U000e0fff", "\ue000", "\U0010ffff", "\u0530", "\u2fe0"),
    *("!!!", "...", "--", "_under_score_", "#tag", "@me", "http://a.b/c?d=e&f=g", "😀😀", "¯\\_(ツ)_/¯", "…", "—"),
]
_PLANES = [
    (0x20, 0x7F),
    (0, 0x20),
    (0x80, 0x250),
    (0x250, 0x1000),
    (0x1000, 0x3000),
    (0x3000, 0xD800),
    (0xD800, 0xE000),
]
_PLANES += [(0xE000, 0x10000), (0x10000, 0x1F000), (0x1F000, 0x20000), (0x20000, 0x110000)]


def _character(rng: random.Random) -> str:
    return chr(rng.randrange(*rng.choice(_PLANES)))


def _mojibake(rng: random.Random) -> str:
    text = "".join(rng.choice("éüñçß€“”’—日本語привет😀") for _ in range(rng.randint(1, 6)))
    for _ in range(rng.randint(1, 2)):
        text = text.encode("utf-8").decode(rng.choice(["latin-1", "cp1252", "cp1251", "mac_roman"]), "replace")
    return text


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(_WORDS)
    if kind < 0.7:
        return rng.choice(_PIECES)
    if kind < 0.8:
        return "".join(_character(rng) for _ in range(rng.randint(1, 6)))
    if kind < 0.85:
        return _mojibake(rng)
    if kind < 0.9:
        return html.escape(rng.choice(_PIECES))
    if kind < 0.95:
        return "".join(rng.choice(string.printable) for _ in range(rng.randint(1, 8)))
    return unicodedata.normalize(rng.choice(["NFD", "NFKD"]), rng.choice(["éà", "ﬃ", "한국", "ｶﾞ"])).upper()


def hostile_texts(count: int, seed: int) -> list[str]:
    """Texts of words, entities, mojibake, controls, marks, surrogates, unassigned code points; empty and long ones."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        pieces = [_piece(rng) for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 8, 13, 40]))]
        texts.append(rng.choice(["", " ", " ", " ", "  "]).join(pieces))
    return texts


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


def assert_same_ids(open_clip, texts: list[str], clean: str = "lower", context_length: int = 77) -> None:
    ours = ClipTokenizer(context_length, clean)(texts)
    theirs = open_clip.SimpleTokenizer(context_length=context_length, clean=clean)(texts).numpy()
    assert ours.dtype == np.int64 and ours.shape == theirs.shape
    differing = np.flatnonzero((ours != theirs).any(1))
    assert not len(differing), f"{len(differing)} of {len(texts)} differ, the first: {texts[differing[0]]!a}"


def test_ids_equal_open_clip_on_each_piece_in_every_cleaning(open_clip):
    texts = [*_PIECES, *(f"a {piece}b{piece}, C" for piece in _PIECES), "", " ", "\n"]
    for clean in CLEANERS:
        assert_same_ids(open_clip, texts, clean)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_equal_open_clip_on_hostile_text(open_clip, clean):
    assert_same_ids(open_clip, hostile_texts(12_000 if clean == "lower" else 1_500, seed=1), clean)


@pytest.mark.slow
def test_ids_equal_open_clip_on_100_000_hostile_texts(open_clip):
    assert_same_ids(open_clip, hostile_texts(100_000, seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_equal_open_clip_for_every_code_point(open_clip, clean):
    texts = [" ".join(f"a{chr(code + i)}b'{chr(code + i)}" for i in range(8)) for code in range(0, 0x110000, 8)]
    assert_same_ids(open_clip, texts, clean, 200)


def test_ids_equal_open_clip_for_every_ascii_pair(open_clip):
    texts = [f"{chr(first)}{chr(second)}a'{chr(first)}" for first in range(128) for second in range(128)]
    assert_same_ids(open_clip, texts, context_length=16)


def test_ascii_that_skips_ftfy_is_unchanged_by_it():
    from mmbase.data.tokenizer_base import _repair

    ftfy = pytest.importorskip("ftfy")
    rng = random.Random(3)
    skipped = 0
    for _ in range(4_000):
        text = "".join(chr(rng.randrange(128)) if rng.random() < 0.1 else rng.choice("ab &;#x9<\n") for _ in range(12))
        fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
        skipped += _repair(text) is text
        assert _repair(text).replace("\r\n", "\n").replace("\r", "\n") == fixed, ascii(text)
    assert skipped > 400


def test_texts_that_skip_ftfy_come_out_as_from_it():
    from mmbase.data.tokenizer_base import _straightened

    ftfy = pytest.importorskip("ftfy")
    rng = random.Random(8)
    characters = "abcdefgh     éüñÃ©â€™œ‘’“”—…日本é́\xa0🙂&;©°" + "".join(map(chr, range(0xA0, 0x180)))
    texts = ["".join(rng.choice(characters[: rng.choice([20, 40, 300])]) for _ in range(12)) for _ in range(4_000)]
    skipped = [(text, straight) for text in texts if (straight := _straightened(text)) is not None]
    assert len(skipped) > 400 and sum(text != straight for text, straight in skipped) > 50
    for text, straight in skipped:
        assert straight == html.unescape(html.unescape(ftfy.fix_text(text))), ascii(text)


def test_ascii_words_are_the_words_of_the_unicode_pattern():
    rng = random.Random(4)
    letters = "abSTD'<>_&19.- " + string.ascii_letters
    for _ in range(5_000):
        chunk = "".join(rng.choice(letters) for _ in range(rng.randint(1, 10))).replace(" ", "<start_of_text>")
        assert _ASCII_WORD.findall(chunk) == _unicode_word().findall(chunk), chunk


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 77, 200])
def test_truncation_ends_with_end_of_text(open_clip, length):
    texts = ["", "cat", "a photo of a cat, sitting on the red mat!", "word " * 300, "!" * 500, "日本語" * 100]
    assert_same_ids(open_clip, texts, context_length=length)
    assert (ClipTokenizer(length)(texts)[1:] == ClipTokenizer.eot_id).sum(1).min() == 1


def test_very_long_words_take_linear_time(open_clip):
    assert_same_ids(open_clip, ["ab" * 1000, "é" * 500, "…" * 500 + "x"])
    start = time.perf_counter()
    assert len(ClipTokenizer().encode("x!" + "qzj" * 100_000)) > 100_000
    assert time.perf_counter() - start < 5


def test_the_cache_is_bounded_and_does_not_change_ids():
    chunks = _ClipChunks()
    chunks.limit = 5
    words = ["cat", "dog", "bird,", "fish!", "naïve", "x1", "cat", "🙂", "bird,"]
    ids = [chunks[word] for word in words]
    assert len(chunks) <= 5
    assert ids == [_ClipChunks()[word] for word in words]
    long = "a" * (chunks.longest + 1)
    assert chunks[long] and long not in chunks


def test_forked_workers_and_threads_tokenize_as_their_parent_does():
    """Rust's thread pools do not survive a fork: none may have been started by tokenizing."""
    tokenizer = ClipTokenizer()
    texts = [f"{text} {n}" for n, text in enumerate(hostile_texts(300, seed=11))]
    expected = tokenizer(texts)
    with ThreadPoolExecutor(4) as pool:
        for ids in pool.map(lambda _: ClipTokenizer()(texts), range(8)):
            np.testing.assert_array_equal(ids, expected)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    _clip_chunks.clear()  # so that the child has words to merge
    worker = multiprocessing.get_context("fork").Process(target=lambda: sender.send(tokenizer(texts)), daemon=True)
    worker.start()
    assert receiver.poll(60), "the forked worker hangs"
    np.testing.assert_array_equal(receiver.recv(), expected)
    worker.join(10)
    assert worker.exitcode == 0


def test_decode_returns_the_text(open_clip):
    tokenizer, reference = ClipTokenizer(), open_clip.SimpleTokenizer()
    for text in ["a photo of a cat, really!", "naïve 日本語 🙂", "", "12 x ! !"]:
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text)).strip()
        assert tokenizer.decode(tokenizer(text)[0]) == tokenizer.decode(tokenizer.encode(text))
    with pytest.raises(MmbaseError, match="49408 is outside the vocabulary"):
        tokenizer.decode([49408])


def test_importing_and_using_clip_on_ascii_loads_nothing_heavy():
    code = (
        "import sys; from mmbase.data.tokenizer import load_tokenizer; load_tokenizer()(['a cat', 'black & white']);"
        "print([name for name in ('torch', 'transformers', 'open_clip', 'ftfy', 'regex') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
