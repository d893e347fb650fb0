"""The tokenizers' benchmark: its captions, and a whole run at a small size with its files."""

import json
import sys

import pytest

from mmbase.errors import MmbaseError
from mmbase_bench import tokenizer
from mmbase_bench.caption_texts import KINDS, captions, captions_of_file


@pytest.mark.parametrize("kind", KINDS)
def test_captions_follow_from_the_seed(kind):
    texts = captions(kind, 200, 1)
    assert texts == captions(kind, 200, 1) != captions(kind, 200, 2)
    assert len(texts) == 200 and all(text == text.strip() and text for text in texts)
    beyond = sum(not text.isascii() for text in texts)
    assert {"ordinary": 0 < beyond < 40, "templates": beyond < 20, "unicode": beyond == 200}.get(kind, True)
    if kind == "markup":
        assert sum("&" in text or "Ã" in text or "â€" in text for text in texts) == 200


def test_ordinary_captions_look_like_captions():
    texts = captions("ordinary", 500, 0)
    words = [len(text.split()) for text in texts]
    assert 8 <= sorted(words)[250] <= 11 and min(words) >= 2
    every = [word.strip(".,!").lower() for text in texts for word in text.split()]
    assert len(set(every)) > 1000 and every.count("the") > 50


def test_captions_of_a_file(tmp_path):
    (tmp_path / "some.txt").write_text("a cat\n\n a dog\n")
    assert captions_of_file(tmp_path / "some.txt") == ["a cat", " a dog"]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(MmbaseError, match="holds no captions"):
        captions_of_file(tmp_path / "none.txt")
    with pytest.raises(MmbaseError, match=r"cannot read the captions .*missing\.txt"):
        captions_of_file(tmp_path / "missing.txt")


def test_a_run_and_its_files(tmp_path, monkeypatch, capsys):
    file = tmp_path / "real.txt"
    file.write_text("\n".join(f"picture number {n}" for n in range(9)))
    arguments = ["--batch", "8", "--rounds", "2", "--file", str(file), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["mmbase bench tokenizer", *arguments])
    tokenizer.main()
    assert "x OpenCLIP" in capsys.readouterr().out
    rows = json.loads((tmp_path / "tokenizer.json").read_text())["results"]
    assert {row["captions"] for row in rows} == {*KINDS, "real.txt"}
    assert {row["contender"] for row in rows} == {"openclip", "openclip_batch", "mmbase"}
    assert all(row["differing"] == 0 and row["captions_per_s"] > 0 for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["contender"] == "openclip")
