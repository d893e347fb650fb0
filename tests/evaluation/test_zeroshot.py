import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmbase.errors import MmbaseError
from mmbase.evaluation.protocol import ImageTextModel
from mmbase.evaluation.templates import resolve_templates
from mmbase.evaluation.zeroshot import (
    Classifier,
    classifier_weights,
    resolve_class_names,
    top_indices,
    wilson_interval,
    zeroshot_metrics,
)

LABELS = ["red apple", "dog", "house", "grinning face", "car"]


def test_the_fake_model_has_what_the_protocol_asks(model):
    assert isinstance(model, ImageTextModel)


def test_weights_equal_openclip_for_the_imagenet_templates(model):
    import open_clip
    import torch

    class Texts(list):
        def to(self, device):
            return self

    class TheirModel:
        def encode_text(self, texts, normalize):
            assert normalize
            return torch.from_numpy(model.encode_text(texts))

    templates = [(lambda name, t=t: t.replace("{}", name)) for t in resolve_templates("imagenet")]
    theirs = open_clip.build_zero_shot_classifier(TheirModel(), Texts, LABELS, templates, num_classes_per_batch=2)
    ours = classifier_weights(model, LABELS, "imagenet")
    assert ours.dtype == np.float32
    assert ours.shape == (24, len(LABELS))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


def test_synonyms_and_templates_are_averaged_after_normalising(model):
    names, templates = ["dog", "hound"], ["{}", "a {}"]
    prompts = [t.replace("{}", n) for n in names for t in templates]
    mean = model.encode_text(prompts).astype(np.float64).mean(axis=0)
    weights = classifier_weights(model, [names, "cat"], templates)
    np.testing.assert_allclose(weights[:, 0], mean / np.linalg.norm(mean), atol=1e-6)


def test_many_classes_are_encoded_in_bounded_groups_and_nothing_changes(model, monkeypatch):
    whole = classifier_weights(model, LABELS, "imagenet-simple")
    monkeypatch.setattr("mmbase.evaluation.zeroshot._PROMPTS_AT_ONCE", 15)
    model.text_calls.clear()
    np.testing.assert_array_equal(classifier_weights(model, LABELS, "imagenet-simple"), whole)
    assert model.text_calls == [14, 14, 7]


def test_published_classes_keep_their_order_and_doubles(model):
    classifier = Classifier(model, "imagenet")
    assert len(classifier.labels) == 1000
    assert classifier.labels.count("missile") == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels is empty"),
        (["a", ""], "label 1"),
        (["a", []], "label 1"),
        (["a", 3], None),
        (["cat", "dog", "cat"], "'cat' stands at positions 0 and 2"),
        (["cat", ["dog", "cat"]], "'cat' stands at positions 0 and 1"),
    ],
)
def test_unusable_labels(labels, message):
    with pytest.raises((MmbaseError, TypeError) if message is None else MmbaseError, match=message):
        resolve_class_names(labels)


def test_probabilities_are_the_softmax_of_scaled_cosines(model, emoji_samples):
    images = [sample["image"] for sample in emoji_samples]
    classifier = Classifier(model, LABELS)
    probabilities = classifier(images)
    logits = 20.0 * model.encode_image(images).astype(np.float64) @ classifier.weights_DC.astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert probabilities.shape == (40, 5)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=2e-5)


def test_softmax_ignores_the_bias_and_survives_a_huge_scale(model, sigmoid_model, emoji_samples):
    images = [sample["image"] for sample in emoji_samples]
    np.testing.assert_allclose(Classifier(sigmoid_model, LABELS)(images), Classifier(model, LABELS)(images), rtol=1e-4)
    model.logit_scale = 1e6
    probabilities = Classifier(model, LABELS)(images)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-6)


def test_sigmoid_judges_each_label_by_itself(sigmoid_model, emoji_samples):
    images = [sample["image"] for sample in emoji_samples]
    classifier = Classifier(sigmoid_model, LABELS, activation="sigmoid")
    logits = 20.0 * sigmoid_model.encode_image(images).astype(np.float64) @ classifier.weights_DC - 10.0
    np.testing.assert_allclose(classifier(images), 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-7)


def test_sigmoid_needs_a_bias(model):
    with pytest.raises(MmbaseError, match="no logit bias"):
        Classifier(model, LABELS, activation="sigmoid")
    with pytest.raises(MmbaseError, match="'tanh'"):
        Classifier(model, LABELS, activation="tanh")


def test_predict_gives_the_likeliest_labels_in_order(model, emoji_samples):
    images = [sample["image"] for sample in emoji_samples[:6]]
    classifier = Classifier(model, LABELS)
    probabilities = classifier(images)
    predicted = classifier.predict(images, k=3)
    for row, top in zip(probabilities, predicted):
        expected = sorted(zip(LABELS, row), key=lambda item: -item[1])[:3]
        assert [label for label, _ in top] == [label for label, _ in expected]
        assert [p for _, p in top] == pytest.approx([float(p) for _, p in expected])
    assert len(classifier.predict(images, k=99)[0]) == len(LABELS)
    with pytest.raises(MmbaseError, match="k is 0"):
        classifier.predict(images, k=0)


scores_and_targets = st.integers(1, 6).flatmap(
    lambda classes: st.integers(1, 12).flatmap(
        lambda samples: st.tuples(
            # Few values, so that ties are common.
            hnp.arrays(np.float32, (samples, classes), elements=st.sampled_from([-1.0, 0.0, 1.0, np.inf, -np.inf])),
            hnp.arrays(np.int64, (samples,), elements=st.integers(0, classes - 1)),
        )
    )
)


@settings(max_examples=80, deadline=None)
@given(scores_and_targets)
def test_metrics_equal_a_plain_count_with_ties(case):
    scores, targets = case
    samples, classes = scores.shape
    ranking = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in scores.tolist()]
    metrics = zeroshot_metrics(scores, targets, k=(1, 2, 5))
    for k in (1, 2, 5):
        right = sum(target in order[:k] for order, target in zip(ranking, targets))
        assert metrics[f"top{k}"] == pytest.approx(right / samples)
        assert metrics[f"top{k}_chance"] == min(1.0, k / classes)
        low, high = metrics[f"top{k}_ci95"]
        assert 0 <= low <= metrics[f"top{k}"] + 1e-12
        assert metrics[f"top{k}"] - 1e-12 <= high <= 1
    recalls = []
    for c in sorted(set(targets.tolist())):
        rows = [order[0] == c for order, target in zip(ranking, targets) if target == c]
        recalls.append(sum(rows) / len(rows))
    assert metrics["mean_per_class_recall"] == pytest.approx(sum(recalls) / len(recalls))
    assert (metrics["samples"], metrics["classes"], metrics["classes_present"]) == (samples, classes, len(recalls))
    assert top_indices(scores, 5).tolist() == [order[:5] for order in ranking]


def test_a_row_with_nan_is_wrong_at_every_k_and_counted():
    scores = np.array([[0.9, 0.1], [np.nan, 0.1], [0.9, np.nan], [np.nan, np.nan]])
    metrics = zeroshot_metrics(scores, [0, 0, 0, 0], k=(1, 5))
    assert metrics["top1"] == metrics["top5"] == 0.25
    assert metrics["not_finite"] == 3


@pytest.mark.parametrize(
    ("scores", "targets", "k", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), (1,), "nothing to score"),
        (np.zeros((2, 3)), [0], (1,), "do not fit"),
        (np.zeros((2, 3)), [0, 3], (1,), "from 0 to 2"),
        (np.zeros((2, 3)), [-1, 0], (1,), "from 0 to 2"),
        (np.zeros((2, 3)), [0.0, 1.0], (1,), "float64"),
        (np.zeros((2, 3)), [0, 1], (0,), "top-1"),
    ],
)
def test_metrics_refuse_what_does_not_fit(scores, targets, k, message):
    with pytest.raises(MmbaseError, match=message):
        zeroshot_metrics(scores, targets, k)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case):
    successes, trials = case
    share = successes / trials
    for bound in wilson_interval(successes, trials):
        if 0 < bound < 1:
            # The bound is the proportion under which what was seen lies 1.96 standard errors away.
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / trials), rel=1e-4)


def test_wilson_of_nothing_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
