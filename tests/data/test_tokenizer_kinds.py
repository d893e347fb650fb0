"""Hugging Face and file tokenizers, configs, and what is said of mistakes."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmbase.data.tokenizer import (
    CLEANERS,
    ClipTokenizer,
    FileTokenizer,
    HfTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from mmbase.errors import MmbaseError


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rng = random.Random(5)
    nouns, colours = ["cat", "face", "grinning face", "house", "éclair"], ["red", "blue", "dark green"]
    return [f"a {rng.choice(colours)} {rng.choice(nouns)} with {rng.choice(nouns)}s" for _ in range(400)]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    """A WordPiece tokenizer as the hub stores BERT's."""
    transformers = pytest.importorskip("transformers")
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "cat",
        "dog",
        "the",
        "photo",
        "of",
        "##s",
        "##ing",
        "red",
        ",",
        ".",
        "'",
        "x",
    ]
    library = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special)
    folder = tmp_path_factory.mktemp("bert")
    fast.save_pretrained(str(folder))
    return folder


_HF_TEXTS = ["a photo of the cat", "", "Red DOGS,  &amp; cat's", "a cat " * 30, "a_cat. the dog!", "schÃ¶n"]


@pytest.mark.parametrize("options", [{}, {"clean": "canonicalize"}, {"clean": "lower"}, {"strip_sep_token": True}])
@pytest.mark.parametrize("length", [2, 12, 77])
def test_hf_ids_equal_open_clip(open_clip, bert_folder, options, length):
    theirs = open_clip.tokenizer.HFTokenizer(str(bert_folder), context_length=length, **options)(_HF_TEXTS)
    np.testing.assert_array_equal(HfTokenizer(str(bert_folder), length, **options)(_HF_TEXTS), theirs.numpy())


def test_hf_clips_mode_equals_open_clip(open_clip, bert_folder):
    theirs = open_clip.tokenizer.HFTokenizer(str(bert_folder), context_length=9, tokenizer_mode="clips")(_HF_TEXTS)
    np.testing.assert_array_equal(HfTokenizer(str(bert_folder), 9, mode="clips")(_HF_TEXTS), theirs.numpy())


def test_hf_attributes_decode_and_save(bert_folder, tmp_path):
    tokenizer = load_tokenizer(bert_folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eot_id) == (17, 0, 3)
    assert tokenizer.decode(tokenizer("the red cat")[0]) == "the red cat"
    config = tokenizer.save(tmp_path)
    again = Tokenizer.from_config(json.loads(json.dumps(config)), tmp_path)
    np.testing.assert_array_equal(again(_HF_TEXTS), tokenizer(_HF_TEXTS))
    assert tokenizer([]).shape == (0, 77)


def test_trained_tokenizer_round_trips_any_text(captions):
    tokenizer = train_tokenizer(captions, 400, context_length=64)
    assert tokenizer.vocab_size <= 400
    assert (tokenizer.pad_id, tokenizer.eot_id) == (0, tokenizer.vocab_size - 1)
    for text in [*captions[:20], "never seen: zebra 🦓 日本", "", "[EOS] [PAD] [BOS]", "a\ud83db"]:
        row = tokenizer(text)[0]
        end = list(row).index(tokenizer.eot_id)
        assert row[0] == tokenizer.sot_id and (row[end + 1 :] == tokenizer.pad_id).all()
        assert row.argmax() == end
        assert tokenizer.decode(row) == CLEANERS["lower"](text)
    assert len(tokenizer.encode("a dark green grinning face")) <= 6
    assert tokenizer(captions[0], context_length=4).tolist()[0][-1] == tokenizer.eot_id


def test_training_a_tokenizer_is_deterministic(captions):
    shuffled = random.Random(6).sample(captions, len(captions))
    code = (
        "import json, sys; from mmbase.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(json.load(sys.stdin), 350).content, end='')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(shuffled), capture_output=True, text=True, check=True
    )
    assert run.stdout == train_tokenizer(captions, 350).content


def test_dropout_depends_on_text_and_seed_alone(captions):
    tokenizer = train_tokenizer(captions, 400, context_length=64)
    seeds = list(range(len(captions)))
    np.testing.assert_array_equal(tokenizer.sample(captions, seeds, 0.0), tokenizer(captions))
    sampled = tokenizer.sample(captions, seeds, 0.3)
    assert (sampled != tokenizer(captions)).any(1).mean() > 0.5
    order = random.Random(7).sample(seeds, 50)
    again = pickle.loads(pickle.dumps(tokenizer)).sample([captions[i] for i in order], order, 0.3)
    np.testing.assert_array_equal(again, sampled[order])
    assert {tokenizer.decode(row) for row in sampled} == set(captions)
    assert len(np.unique(tokenizer.sample([captions[0]] * 50, range(50), 0.3), axis=0)) > 5
    bytes_only = tokenizer.sample(captions[:1], [0], 1.0, context_length=80)[0]
    assert list(bytes_only).index(tokenizer.eot_id) == len(f" {captions[0]}".encode()) + 1


@pytest.mark.parametrize("kind", ["clip", "clip-whitespace", "file", "hf"])
def test_config_and_pickle_give_the_same_ids(kind, captions, bert_folder, tmp_path):
    tokenizer = {
        "clip": lambda: ClipTokenizer(20),
        "clip-whitespace": lambda: ClipTokenizer(clean="whitespace"),
        "file": lambda: train_tokenizer(captions, 300),
        "hf": lambda: HfTokenizer(str(bert_folder)),
    }[kind]()
    texts = ["A Cat", "naïve & co", *captions[:5]]
    config = json.loads(json.dumps(tokenizer.save(tmp_path)))
    for again in (Tokenizer.from_config(config, tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(again) is type(tokenizer) and again.context_length == tokenizer.context_length
        np.testing.assert_array_equal(again(texts), tokenizer(texts))


def test_a_foreign_tokenizer_file_with_padding_and_template(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    library = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "cat": 3, "?": 4}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    library.enable_padding(length=30)
    library.enable_truncation(3)
    library.save(str(tmp_path / "words.json"))
    options = {"context_length": 6, "pad_token": "<pad>", "start_token": None, "end_token": "</s>"}
    tokenizer = FileTokenizer(tmp_path / "words.json", **options)
    assert tokenizer(["A cat", "a a a a a a a"]).tolist() == [[2, 3, 1, 0, 0, 0], [2, 2, 2, 2, 2, 1]]
    with pytest.raises(MmbaseError, match="dropout needs a byte-level BPE"):
        tokenizer.sample(["a"], [0])


def test_saving_is_all_or_nothing(captions, tmp_path):
    made = train_tokenizer(captions, 300)
    made.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(MmbaseError, match=r"cannot write '.*missing/tokenizer\.json': No such file"):
        made.save(tmp_path / "missing")


def test_load_tokenizer_accepts_what_a_user_writes(captions, tmp_path):
    made = train_tokenizer(captions, 300)
    made.save(tmp_path)
    assert isinstance(load_tokenizer(str(tmp_path / "tokenizer.json")), FileTokenizer)
    assert load_tokenizer(made) is made
    assert load_tokenizer({"kind": "clip", "context_length": 9}).context_length == 9
    assert isinstance(load_tokenizer(), ClipTokenizer)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: load_tokenizer("klip"), "unknown tokenizer 'klip'"),
        (lambda: load_tokenizer({"kind": "flie"}), "did you mean 'file'"),
        (lambda: load_tokenizer({"kind": "clip", "context_lenght": 3}), "did you mean 'context_length'"),
        (lambda: load_tokenizer("missing/tokenizer.json"), "cannot read the tokenizer file 'missing/tokenizer.json'"),
        (lambda: FileTokenizer(content="{}"), "not a tokenizer.json"),
        (lambda: ClipTokenizer(clean="lowr"), "did you mean 'lower'"),
        (lambda: ClipTokenizer(0), "context_length must be a whole number of at least 1, not 0"),
        (lambda: ClipTokenizer()("a", context_length=0), "context_length must be"),
        (lambda: ClipTokenizer()(["a", None]), "text 1 is of type NoneType"),
        (lambda: ClipTokenizer()(b"bytes"), "a string or a list of strings, not bytes"),
        (lambda: ClipTokenizer()(3), "a string or a list of strings, not int"),
        (lambda: train_tokenizer(["a"], 100), "vocab_size must be at least 259"),
        (lambda: train_tokenizer(["", " "], 300), "no text to train"),
        (lambda: train_tokenizer(["cat"], 300).sample(["a"], [0], 2.0), "dropout must be between 0 and 1"),
        (lambda: train_tokenizer(["cat"], 300).sample(["a", "b"], [0]), "2 texts need as many seeds"),
    ],
)
def test_mistakes_are_explained(mistake, message):
    with pytest.raises(MmbaseError, match=message) as caught:
        mistake()
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_explained(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(MmbaseError, match="no tokenizer at") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
