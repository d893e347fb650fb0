"""The towers' benchmark: its captions, and a whole run at a small size with its files."""

import csv
import json
import sys

import pytest
import torch

from mmbase.errors import MmbaseError
from mmbase.models.config import TextConfig
from mmbase_bench import towers


def test_captions_have_the_lengths_that_are_stated():
    torch.manual_seed(0)
    config = TextConfig()
    text = towers.captions(4000, config)
    lengths = text.argmax(1) + 1
    assert text.shape == (4000, 77) and text[0].max() == config.vocab_size - 1
    assert (int(lengths.min()), int(lengths.max())) == (5, 40)
    assert lengths.double().median() == 12
    assert 12.5 < lengths.double().mean() < 14
    assert ((text != 0).sum(1) == lengths).all()
    short = TextConfig(context_length=9, pool="eos", eos_id=7, pad_id=1, vocab_size=30)
    text = towers.captions(200, short)
    assert text.shape == (200, 9) and (text == 7).any(1).all() and bool((text[text != 1] > 2).all())


def test_a_run_and_its_files(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    arguments = ["--models", "ViT-S-32-alt", "--pairs", "2", "--threads", "1"]
    arguments += ["--image-batch", "1", "--text-batch", "3"]
    monkeypatch.setattr(sys, "argv", ["x/towers", *arguments, "--output", str(tmp_path)])
    try:
        towers.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "towers.json").read_text())
    assert record["environment"]["command"].startswith("towers --models") and 12.5 < record["mean_caption_length"] < 14
    rows = record["results"]
    assert [(row["tower"], row["precision"]) for row in rows] == [
        ("image", "fp32"), ("image", "bf16"), ("text", "fp32"), ("text", "bf16")]  # fmt: skip
    for row in rows:
        assert row["ours_ms"] > 0 and row["openclip_ms"] > 0 and row["noise"] >= 0
        assert f"{row['ratio']:.3f}" in printed and row["cpu_ratio"] > 0
        assert row["difference"] < (1e-5 if row["precision"] == "fp32" else 2e-2)
    with (tmp_path / "towers.csv").open() as file:
        assert [row["tower"] for row in csv.DictReader(file)] == ["image", "image", "text", "text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "ViT-B-33"], "did you mean 'ViT-B-32"),
        (["--towers", "txt"], "--towers='txt' is not one of image, text; did you mean 'text'"),
        (["--pairs", "1"], "--pairs=1 must be at least 2"),
        (["--text-batch", "0"], "--text-batch=0 must be at least 1"),
    ],
)
def test_mistakes(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["towers", *arguments])
    with pytest.raises(MmbaseError) as raised:
        towers.main()
    assert message in str(raised.value)
