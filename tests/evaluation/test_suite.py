import json
import os

import numpy as np
import pytest

from mmbase.errors import MmbaseError
from mmbase.evaluation.retrieval import retrieval_metrics
from mmbase.evaluation.suite import EvaluationTask, evaluate
from mmbase.evaluation.zeroshot import Classifier, zeroshot_metrics


@pytest.fixture
def task(emoji_samples):
    return EvaluationTask(
        name="fxemoji",
        samples=emoji_samples,
        class_names=[sample["caption"] for sample in emoji_samples],
        templates="emoji",
        breakdown=("group", "keywords"),
        title="A vendor",
    )


def test_results_agree_with_the_parts(model, task, emoji_samples, tmp_path):
    results = evaluate(model, [task], tmp_path, latency=False)
    result = results["tasks"]["fxemoji"]
    images = [sample["image"] for sample in emoji_samples]
    classifier = Classifier(model, task.class_names, "emoji")
    probabilities = classifier(images)
    assert result["zero_shot"] == zeroshot_metrics(probabilities, np.arange(40))
    captions = model.encode_text([sample["caption"] for sample in emoji_samples])
    assert result["retrieval"] == retrieval_metrics(model.encode_image(images), captions)
    for position, prediction in enumerate(result["predictions"]):
        assert prediction["key"] == emoji_samples[position]["key"]
        assert prediction["label"] == emoji_samples[position]["caption"]
        assert [label for label, _ in prediction["top"]] == [
            classifier.labels[column] for column in np.argsort(-probabilities[position], kind="stable")[:5]
        ]
    right = sum(prediction["top"][0][0] == prediction["label"] for prediction in result["predictions"])
    assert right / 40 == result["zero_shot"]["top1"]


def test_breakdowns_add_up_and_lists_count_under_each_value(model, task, emoji_samples):
    result = evaluate(model, [task], latency=False)["tasks"]["fxemoji"]
    groups = result["breakdown"]["group"]
    assert sum(values["samples"] for values in groups.values()) == 40
    weighted = sum(values["samples"] * values["top5"] for values in groups.values()) / 40
    assert weighted == pytest.approx(result["zero_shot"]["top5"])
    assert all(values["classes"] == 40 for values in groups.values())
    keyword = emoji_samples[0]["meta"]["keywords"][0]
    expected = sum(keyword in sample["meta"]["keywords"] for sample in emoji_samples)
    assert result["breakdown"]["keywords"][keyword]["samples"] == expected
    sizes = [values["samples"] for values in groups.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_files_are_whole_and_hold_what_was_returned(model, task, tmp_path):
    results = evaluate(model, [task], tmp_path, latency=True)
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "predictions.jsonl"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["tasks"]["fxemoji"]["zero_shot"] == results["tasks"]["fxemoji"]["zero_shot"]
    assert "predictions" not in metrics["tasks"]["fxemoji"]
    assert metrics["model"] == {"name": "fake", "image_size": 8, "logit_scale": 20.0, "logit_bias": None}
    assert metrics["size"]["total"] == 4608
    assert metrics["latency"]["timings"]["text_batch_1"]["median_ms"] > 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert lines[0] == {"task": "fxemoji", **results["tasks"]["fxemoji"]["predictions"][0]}


def test_the_same_seed_gives_the_same_results(model, task):
    first, second = (evaluate(model, [task], latency=False, seed=3) for _ in range(2))
    assert first == second
    other = evaluate(model, [task], latency=False, seed=4)
    assert other["tasks"]["fxemoji"]["examples"] != first["tasks"]["fxemoji"]["examples"]
    assert other["tasks"]["fxemoji"]["zero_shot"] == first["tasks"]["fxemoji"]["zero_shot"]


def test_images_are_encoded_once(model, task):
    evaluate(model, [task], latency=False)
    assert model.image_calls == [40]


def test_synonyms_share_a_class(model, emoji_samples):
    a, b, c = (dict(sample) for sample in emoji_samples[:3])
    task = EvaluationTask("t", [a, b, c], [[a["caption"], b["caption"]], c["caption"]])
    assert task.targets().tolist() == [0, 0, 1]
    assert task.labels() == [a["caption"], c["caption"]]


def test_retrieval_examples_mark_every_image_of_a_shared_caption(model, emoji_samples):
    samples = [dict(sample, caption="same") for sample in emoji_samples[:5]]
    task = EvaluationTask("t", samples)
    result = evaluate(model, [task], latency=False)["tasks"]["t"]
    assert "zero_shot" not in result
    assert result["retrieval"]["text_to_image"]["candidates"] == 5
    assert result["retrieval"]["image_to_text"]["candidates"] == 1
    (query,) = result["examples"]["text_to_image"]
    assert all(match["right"] for match in query["matches"])
    cosines = [match["cosine"] for match in query["matches"]]
    assert cosines == sorted(cosines, reverse=True)


def test_nan_features_give_zero_and_valid_json(model, task, tmp_path):
    encode = model.encode_image
    model.encode_image = lambda images, batch_size=64: encode(images) * np.float32("nan")
    results = evaluate(model, [task], tmp_path, latency=False)
    assert results["tasks"]["fxemoji"]["zero_shot"]["top5"] == 0.0
    assert results["tasks"]["fxemoji"]["zero_shot"]["not_finite"] == 40
    assert "NaN" not in (tmp_path / "predictions.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, "no samples"),
        ({"class_names": []}, "labels is empty"),
        ({"class_names": ["nothing"]}, "is none of the 1 labels"),
        ({"breakdown": ("grop",)}, "did you mean 'group'"),
        ({"templates": "imagnet"}, "unknown template set"),
        ({"samples": [{"key": "a", "image": None, "caption": "x"}]}, "sample 0 of task 't' has no 'image'"),
    ],
)
def test_unusable_tasks_are_explained(emoji_samples, changes, message):
    captions = [sample["caption"] for sample in emoji_samples]
    with pytest.raises(MmbaseError, match=message) as error:
        EvaluationTask(**({"name": "t", "samples": emoji_samples, "class_names": captions} | changes))
    assert "\n" not in str(error.value)


def test_tasks_need_names_of_their_own(model, task):
    for tasks in ([], [task, task]):
        with pytest.raises(MmbaseError, match="name of its own"):
            evaluate(model, tasks)
