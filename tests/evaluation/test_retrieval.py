import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbase.errors import MmbaseError
from mmbase.evaluation.retrieval import retrieval_metrics, unique_captions


def plain_direction(scores, positives, k):
    """Recall and median rank by sorting every row, over the queries that have a right candidate."""
    ranks = []
    for query, row in enumerate(scores.tolist()):
        if not positives[query]:
            continue
        order = sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))
        ranks.append(min(order.index(candidate) for candidate in positives[query]))
    recall = {f"recall@{top}": sum(rank < top for rank in ranks) / len(ranks) for top in k}
    return recall | {"median_rank": float(np.median(ranks)) + 1, "queries": len(ranks), "candidates": scores.shape[1]}


def random_case(seed):
    """Features of small integers, so that float32 products are exact and ties frequent; random pairs."""
    random = np.random.default_rng(seed)
    images, texts = random.integers(1, 14, 2)
    image_features = random.integers(-1, 2, (images, 3)).astype(np.float32)
    text_features = random.integers(-1, 2, (texts, 3)).astype(np.float32)
    count = random.integers(1, 2 * images + 1)
    pairs = np.stack([random.integers(0, images, count), random.integers(0, texts, count)], axis=1)
    return image_features, text_features, pairs


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 256]))
def test_equals_a_plain_sort_with_several_right_answers_and_ties(seed, chunk_size):
    image_features, text_features, pairs = random_case(seed)
    scores = image_features @ text_features.T
    texts_of = [{int(t) for i, t in pairs if i == image} for image in range(len(image_features))]
    images_of = [{int(i) for i, t in pairs if t == text} for text in range(len(text_features))]
    k = (1, 5, 10)
    result = retrieval_metrics(image_features, text_features, pairs, k, chunk_size)
    for direction, expected in (
        ("image_to_text", plain_direction(scores, texts_of, k)),
        ("text_to_image", plain_direction(scores.T, images_of, k)),
    ):
        got = {key: value for key, value in result[direction].items() if not key.endswith("_chance")}
        assert got == pytest.approx(expected)


def test_chance_is_the_expectation_of_a_random_order():
    random = np.random.default_rng(0)
    image_features = random.standard_normal((12, 4)).astype(np.float32)
    text_features = random.standard_normal((9, 4)).astype(np.float32)
    pairs = [(i, i % 9) for i in range(12)] + [(0, 5), (0, 7)]
    result = retrieval_metrics(image_features, text_features, np.array(pairs), (1, 5, 10))
    counts = [len({t for i, t in pairs if i == image}) for image in range(12)]
    for k in (1, 5):
        expected = np.mean([1 - math.comb(9 - p, k) / math.comb(9, k) for p in counts])
        assert result["image_to_text"][f"recall@{k}_chance"] == pytest.approx(expected)
    assert result["image_to_text"]["recall@10_chance"] == 1.0


def test_duplicate_captions_become_one_text_with_several_images():
    texts, pairs = unique_captions(["a dog", ["a cat", "a tabby"], "a dog", ["a cat", "a cat"]])
    assert texts == ["a dog", "a cat", "a tabby"]
    assert pairs.tolist() == [[0, 0], [1, 1], [1, 2], [2, 0], [3, 1]]


def test_any_image_of_a_shared_caption_counts():
    features = np.eye(3, dtype=np.float32)
    # Images 0 and 1 share text 0, which lies on image 1; alone, image 0 would be missed.
    image_features = features[[0, 1, 2]]
    text_features = features[[1, 2]]
    result = retrieval_metrics(image_features, text_features, np.array([[0, 0], [1, 0], [2, 1]]), (1,))
    assert result["text_to_image"]["recall@1"] == 1.0
    assert result["image_to_text"]["recall@1"] == 1.0  # image 0 ties at 0.0 and the lower text comes first


def test_texts_without_an_image_are_distractors_only():
    features = np.eye(3, dtype=np.float32)
    result = retrieval_metrics(features[:2], features, np.array([[0, 0], [1, 1]]), (1,))
    assert result["text_to_image"]["queries"] == 2
    assert result["image_to_text"]["candidates"] == 3


def test_nan_features_are_misses():
    features = np.eye(4, dtype=np.float32)
    broken = features.copy()
    broken[0] = np.nan
    result = retrieval_metrics(broken, features, None, (1, 10))
    assert result["image_to_text"]["recall@1"] == 0.75
    assert result["image_to_text"]["recall@10"] == 0.75
    assert result["text_to_image"]["recall@1"] == 0.75


def test_memory_stays_at_a_chunk():
    random = np.random.default_rng(0)
    image_features = random.standard_normal((4000, 8)).astype(np.float32)
    text_features = random.standard_normal((4000, 8)).astype(np.float32)
    tracemalloc.start()
    retrieval_metrics(image_features, text_features, chunk_size=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # the whole matrix of scores would be 64 MB


@pytest.mark.parametrize(
    ("images", "texts", "pairs", "k", "message"),
    [
        (2, 3, None, (1,), "2 images and 3 texts"),
        (2, 2, np.zeros((0, 2)), (1,), "no pair"),
        (2, 2, [[0, 2]], (1,), "outside"),
        (2, 2, [[-1, 0]], (1,), "outside"),
        (2, 2, None, (), "recall@1"),
    ],
)
def test_what_does_not_fit_is_refused(images, texts, pairs, k, message):
    with pytest.raises(MmbaseError, match=message):
        retrieval_metrics(np.ones((images, 3), np.float32), np.ones((texts, 3), np.float32), pairs, k)


def test_features_of_two_models_are_refused():
    with pytest.raises(MmbaseError, match="same model"):
        retrieval_metrics(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))
