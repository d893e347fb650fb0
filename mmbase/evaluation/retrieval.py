"""Image-to-text and text-to-image retrieval: recall at k and median rank, with memory that does not grow with N x M.

Legend of shape suffixes: N images, M texts, Q queries, K candidates, D width of the joint embedding, B one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmbase.errors import MmbaseError


def unique_captions(captions: Sequence[str | Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """Each distinct caption once, and which image has which: ``(texts [M], pairs int64 [pairs, 2])``.

    A caption that several images share becomes one text with several right images; an image with several captions
    has several right texts. ``pairs`` holds (image, text), each once.
    """
    index: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    for image, entry in enumerate(captions):
        for caption in [entry] if isinstance(entry, str) else entry:
            pairs[(image, index.setdefault(caption, len(index)))] = None
    return list(index), np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


def _positives(queries: np.ndarray, candidates: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right candidates sorted by query, and where each query's begin: compressed rows, [pairs] and [count + 1]."""
    order = np.lexsort((candidates, queries))
    starts = np.searchsorted(queries[order], np.arange(count + 1))
    return candidates[order], starts


def retrieval_ranks(
    query_features_QD: np.ndarray,
    candidate_features_KD: np.ndarray,
    positive_K: np.ndarray,
    starts_Q: np.ndarray,
    chunk_size: int = 256,
) -> np.ndarray:
    """How many candidates come before the best right one, for each query: 0 is a hit at 1. int64 [Q].

    Query q's right candidates are ``positive_K[starts_Q[q]:starts_Q[q + 1]]``; a query with none gets -1. Equal
    scores go to the lower index; a NaN score comes last, and a query that is NaN itself ranks K. Holds
    ``chunk_size x K`` scores at a time.
    """
    candidates = len(candidate_features_KD)
    index_K = np.arange(candidates)
    ranks_Q = np.full(len(query_features_QD), -1, dtype=np.int64)
    for first in range(0, len(query_features_QD), chunk_size):
        scores_BK = query_features_QD[first : first + chunk_size] @ candidate_features_KD.T
        broken_BK = np.isnan(scores_BK)
        scores_BK[broken_BK] = -np.inf
        last = first + len(scores_BK)
        counts_B = np.diff(starts_Q[first : last + 1])
        rows = np.repeat(np.arange(len(scores_BK)), counts_B)
        columns = positive_K[starts_Q[first] : starts_Q[last]]
        positive_BK = np.zeros(scores_BK.shape, dtype=bool)
        positive_BK[rows, columns] = True
        best_B1 = np.where(positive_BK, scores_BK, -np.inf).max(axis=1, keepdims=True)
        # argmax takes the first: the right candidate with the best score and, among equals, the lowest index.
        where_B1 = (positive_BK & (scores_BK == best_B1)).argmax(axis=1)[:, None]
        before_BK = (scores_BK > best_B1) | ((scores_BK == best_B1) & (index_K < where_B1))
        ranks_B = np.where(broken_BK.all(axis=1), candidates, before_BK.sum(axis=1))
        ranks_Q[first:last] = np.where(counts_B > 0, ranks_B, -1)
    return ranks_Q


def _chance(positives_Q: np.ndarray, candidates: int, k: int) -> float:
    """Expected recall at k of a random order: one minus the chance that k draws miss all p right ones of K."""
    if k >= candidates:
        return 1.0
    miss_Q = np.ones(len(positives_Q))
    for draw in range(k):
        miss_Q *= np.clip((candidates - positives_Q - draw) / (candidates - draw), 0.0, 1.0)
    return float(1.0 - miss_Q.mean())


def _direction(ranks_Q: np.ndarray, starts_Q: np.ndarray, candidates: int, k: Sequence[int]) -> dict[str, Any]:
    asked_Q = ranks_Q >= 0
    positives_Q = np.diff(starts_Q)[asked_Q]
    ranks_Q = ranks_Q[asked_Q]
    result: dict[str, Any] = {f"recall@{top}": float((ranks_Q < min(top, candidates)).mean()) for top in k}
    result |= {f"recall@{top}_chance": _chance(positives_Q, candidates, top) for top in k}
    result["median_rank"] = float(np.median(ranks_Q)) + 1.0
    result["queries"] = int(asked_Q.sum())
    result["candidates"] = candidates
    return result


def retrieval_metrics(
    image_features_ND: np.ndarray,
    text_features_MD: np.ndarray,
    pairs: np.ndarray | None = None,
    k: Sequence[int] = (1, 5, 10),
    chunk_size: int = 256,
) -> dict[str, dict[str, Any]]:
    """Recall at k and median rank in both directions; any right candidate counts.

    Args:
        image_features_ND: float32, unit length.
        text_features_MD: float32, unit length; each distinct caption once (see ``unique_captions``), else doubles of
            a caption push other captions down the list.
        pairs: int [pairs, 2] of (image, text) that belong together; None where image i has text i alone.
        k: cut-offs.
        chunk_size: queries scored at a time.

    Returns:
        ``image_to_text`` and ``text_to_image``, each with ``recall@k`` and ``recall@k_chance`` in [0, 1],
        ``median_rank`` (1 is best), ``queries`` (those with a right candidate) and ``candidates`` (all).

    Raises:
        MmbaseError: nothing to retrieve, shapes that do not fit, or a pair outside the features.
    """
    images, texts = len(image_features_ND), len(text_features_MD)
    if pairs is None:
        if images != texts:
            raise MmbaseError(f"{images} images and {texts} texts; give pairs=[[image, text], ...] to say what belongs")
        pairs = np.stack([np.arange(images)] * 2, axis=1)
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    if not len(pairs):
        raise MmbaseError("retrieval has no pair of an image and a text; give at least one")
    if image_features_ND.shape[1] != text_features_MD.shape[1]:
        raise MmbaseError(
            f"image features are {image_features_ND.shape[1]} wide and text features {text_features_MD.shape[1]}; "
            f"encode both with the same model"
        )
    if pairs.min() < 0 or pairs[:, 0].max() >= images or pairs[:, 1].max() >= texts:
        raise MmbaseError(f"a pair points outside {images} images and {texts} texts; indices start at 0")
    if not k or min(k) < 1:
        raise MmbaseError(f"k is {list(k)!r}; ask for at least recall@1")
    pairs = np.unique(pairs, axis=0)
    result: dict[str, dict[str, Any]] = {}
    for name, queries_QD, candidates_KD, columns in (
        ("image_to_text", image_features_ND, text_features_MD, (0, 1)),
        ("text_to_image", text_features_MD, image_features_ND, (1, 0)),
    ):
        positive_K, starts_Q = _positives(pairs[:, columns[0]], pairs[:, columns[1]], len(queries_QD))
        ranks_Q = retrieval_ranks(queries_QD, candidates_KD, positive_K, starts_Q, chunk_size)
        result[name] = _direction(ranks_Q, starts_Q, len(candidates_KD), k)
    return result
