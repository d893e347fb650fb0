import numpy as np
from PIL import Image

from mmbase.evaluation.contact_sheet import _font, _wrap, pick_examples, write_contact_sheet
from mmbase.evaluation.suite import EvaluationTask, evaluate


def prediction(label, said, probability):
    return {"key": "k", "label": label, "top": [[said, probability]]}


def test_the_most_confident_wrong_and_random_right_ones():
    predictions = [prediction("a", "a", 0.1 * i) for i in range(8)]
    predictions += [prediction("a", "b", p) for p in (0.2, 0.9, float("nan"), 0.9, 0.5)]
    right, wrong = pick_examples(predictions, 4, seed=0)
    assert len(set(right)) == 4
    assert set(right) <= set(range(8))
    assert wrong == [9, 11, 12, 8]
    assert pick_examples(predictions, 99)[1][-1] == 10
    assert pick_examples(predictions, 4, seed=0) == (right, wrong)
    assert any(pick_examples(predictions, 4, seed=seed)[0] != right for seed in range(1, 5))
    assert pick_examples([], 4) == ([], [])


def test_text_is_wrapped_into_its_width():
    font = _font(14)
    text = "family: man, woman, girl, boy and a supercalifragilisticexpialidocious dog"
    lines = _wrap(text, font, 150, 2)
    assert len(lines) == 2
    assert all(font.getlength(line) <= 150 for line in lines)
    assert lines[-1].endswith("…")
    assert _wrap("cat", font, 150, 2) == ["cat"]
    assert _wrap("", font, 150) == [""]


def test_sheet_shows_the_pictures(model, emoji_samples, tmp_path):
    task = EvaluationTask("t", emoji_samples, [sample["caption"] for sample in emoji_samples])
    results = evaluate(model, [task], latency=False)
    path = write_contact_sheet(tmp_path / "sheet.png", [task], results)
    with Image.open(path) as sheet:
        assert sheet.width == 1600
        assert 300 < sheet.height < 800
        # Eight coloured pictures and their words, not an empty page.
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 2000


def test_no_sheet_without_predictions(model, emoji_samples, tmp_path):
    task = EvaluationTask("t", emoji_samples)
    assert write_contact_sheet(tmp_path / "sheet.png", [task], evaluate(model, [task], latency=False)) is None
    assert list(tmp_path.iterdir()) == []
