"""Zero-shot classification: a classifier from class names and prompt templates, and the metrics of its scores.

Legend of shape suffixes: N images, C classes, D width of the joint embedding, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from mmbase.errors import MmbaseError
from mmbase.evaluation.protocol import ImageTextModel
from mmbase.evaluation.templates import class_names as class_names_of_set
from mmbase.evaluation.templates import fill, resolve_templates

ClassNames = str | Sequence[str | Sequence[str]]

_PROMPTS_AT_ONCE = 4096  # bounds the features held while 1,000 classes meet 80 templates


def resolve_class_names(class_names: ClassNames, *, unique: bool = True) -> list[tuple[str, ...]]:
    """One tuple of names per class; the first name is the label.

    Args:
        class_names: a published set's name (``"imagenet"``), or one entry per class: a name, or a list of synonyms.
        unique: refuse a name that stands in two classes. Published sets keep their order and their doubles.

    Raises:
        MmbaseError: no classes, an empty or non-string name, or one name in two classes.
    """
    if isinstance(class_names, str):
        return [(name,) for name in class_names_of_set(class_names)]
    classes = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in class_names]
    if not classes:
        raise MmbaseError("the list of labels is empty; give at least one label, as in ['cat', 'dog']")
    owner: dict[str, int] = {}
    for index, names in enumerate(classes):
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise MmbaseError(f"label {index} is {list(names)!r}; a label is a non-empty string or a list of synonyms")
        for name in dict.fromkeys(names):
            if unique and name in owner:
                raise MmbaseError(f"label {name!r} stands at positions {owner[name]} and {index}; give each label once")
            owner[name] = index
    return [tuple(dict.fromkeys(names)) for names in classes]


def _normalise(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _class_groups(classes: Sequence[tuple[str, ...]], templates: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    """Consecutive classes whose prompts together number at most ``_PROMPTS_AT_ONCE`` (or one class)."""
    group: list[tuple[str, ...]] = []
    prompts = 0
    for names in classes:
        more = len(names) * len(templates)
        if group and prompts + more > _PROMPTS_AT_ONCE:
            yield group
            group, prompts = [], 0
        group.append(names)
        prompts += more
    yield group


def classifier_weights(
    model: ImageTextModel,
    class_names: ClassNames,
    templates: str | Sequence[str] = "none",
    *,
    batch_size: int = 256,
    unique: bool = True,
) -> np.ndarray:
    """Text features of the classes, as the columns of a linear classifier: [D, C] float32, columns of unit length.

    Ensembling as in CLIP (Radford et al. 2021, section 3.1.4): every prompt's features are normalised, a class's are
    averaged over its templates and synonyms, and the mean is normalised again.

    Raises:
        MmbaseError: see ``resolve_class_names`` and ``resolve_templates``.
    """
    classes = resolve_class_names(class_names, unique=unique)
    prompts = resolve_templates(templates)
    columns: list[np.ndarray] = []
    for group in _class_groups(classes, prompts):
        texts = [fill(template, name) for names in group for name in names for template in prompts]
        features_PD = _normalise(np.asarray(model.encode_text(texts, batch_size=batch_size), dtype=np.float32))
        ends = np.cumsum([len(names) * len(prompts) for names in group])
        columns.extend(part.mean(axis=0) for part in np.split(features_PD, ends[:-1]))
    return np.ascontiguousarray(_normalise(np.stack(columns)).T)


class Classifier:
    """A zero-shot classifier, built once and called on images: ``clf(images) -> probabilities [N, C]``.

    With ``activation="softmax"`` (the default, for every model) the probabilities say which *one* of the labels fits
    best and each row sums to one; a logit bias shifts all logits alike and so changes nothing.
    With ``activation="sigmoid"`` each label is judged by itself and rows need not sum to one, as in SigLIP (Zhai et
    al. 2023); that means something only for a model trained with the sigmoid loss, so a model without ``logit_bias``
    is refused.

    Args:
        model: see ``ImageTextModel``; kept by reference, ``logit_scale`` and ``logit_bias`` are read when called.
        class_names: labels, synonyms (the first one names the class) or a published set's name.
        templates: a set's name, one template or a list; see ``resolve_templates``.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Attributes:
        labels: one name per class, [C].
        weights_DC: float32, columns of unit length.

    Raises:
        MmbaseError: unusable labels or templates; sigmoid asked of a model without a logit bias.
    """

    def __init__(
        self,
        model: ImageTextModel,
        class_names: ClassNames,
        templates: str | Sequence[str] = "none",
        *,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        batch_size: int = 256,
        unique: bool = True,
    ) -> None:
        if activation not in ("softmax", "sigmoid"):
            raise MmbaseError(f"activation {activation!r} is not known; use 'softmax' or 'sigmoid'")
        if activation == "sigmoid" and model.logit_bias is None:
            raise MmbaseError(
                f"model {model.name!r} has no logit bias, so a sigmoid of its logits is no probability; "
                f"use activation='softmax'"
            )
        self.model = model
        self.activation = activation
        self.labels = [names[0] for names in resolve_class_names(class_names, unique=unique)]
        self.weights_DC = classifier_weights(model, class_names, templates, batch_size=batch_size, unique=unique)

    def logits(self, image_features_ND: np.ndarray) -> np.ndarray:
        """``logit_scale * cos + logit_bias`` of features already encoded: [N, C] float32."""
        cosine_NC = np.asarray(image_features_ND, dtype=np.float32) @ self.weights_DC
        return np.float32(self.model.logit_scale) * cosine_NC + np.float32(self.model.logit_bias or 0.0)

    def probabilities(self, image_features_ND: np.ndarray) -> np.ndarray:
        """Probabilities [N, C] float32 of features already encoded."""
        logits_NC = self.logits(image_features_ND)
        if self.activation == "sigmoid":
            # The tanh form of the sigmoid does not overflow.
            return 0.5 * (1.0 + np.tanh(0.5 * logits_NC))
        odds_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        return odds_NC / odds_NC.sum(axis=1, keepdims=True)

    def __call__(self, images: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        """Probabilities [N, C] float32; columns as ``labels``. ``images``: what the model's ``encode_image`` takes."""
        return self.probabilities(self.model.encode_image(images, batch_size=batch_size))

    def predict(self, images: Sequence[Any], k: int = 1, batch_size: int = 64) -> list[list[tuple[str, float]]]:
        """For each image the ``k`` likeliest labels with their probabilities, likeliest first."""
        return self.top(self(images, batch_size=batch_size), k)

    def top(self, probabilities_NC: np.ndarray, k: int = 1) -> list[list[tuple[str, float]]]:
        """The ``k`` largest of each row as (label, probability); equal ones in the order of the labels."""
        if k < 1:
            raise MmbaseError(f"k is {k}; ask for at least 1 label")
        order_NK = top_indices(probabilities_NC, k)
        return [
            [(self.labels[column], float(row[column])) for column in order]
            for row, order in zip(probabilities_NC, order_NK)
        ]


def top_indices(scores_NC: np.ndarray, k: int) -> np.ndarray:
    """Columns [N, min(k, C)] of each row's largest scores, largest first; ties by lower column, NaN last."""
    return np.argsort(-scores_NC, axis=1, kind="stable")[:, :k]


def target_ranks(scores_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """How many classes come before the target of each row: 0 is right. int64 [N].

    Ties go to the lower column, as in ``top_indices``. A row with a NaN ranks C, behind every class: a broken score
    is a wrong answer, never a lucky one.
    """
    columns_C = np.arange(scores_NC.shape[1])
    target_N1 = targets_N[:, None]
    target_scores_N1 = np.take_along_axis(scores_NC, target_N1, axis=1)
    before_NC = (scores_NC > target_scores_N1) | ((scores_NC == target_scores_N1) & (columns_C < target_N1))
    return np.where(np.isnan(scores_NC).any(axis=1), scores_NC.shape[1], before_NC.sum(axis=1))


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default; (0, 1) where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    proportion = successes / trials
    centre = proportion + z * z / (2 * trials)
    half = z * math.sqrt(proportion * (1 - proportion) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At the extremes one bound is exact; the formula would give it up to rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high


def zeroshot_metrics(
    scores_NC: np.ndarray, targets: Sequence[int] | np.ndarray, k: Sequence[int] = (1, 5)
) -> dict[str, Any]:
    """Accuracy of scores (logits or probabilities, any monotone ones) against class indices.

    Returns:
        ``top{k}`` in [0, 1], ``top{k}_ci95`` (Wilson) and ``top{k}_chance`` for each k; ``mean_per_class_recall``
        (top-1, over the classes that occur); ``samples``; ``classes``; ``classes_present``; ``not_finite``, the
        number of rows with a NaN, which count as wrong. Plain Python numbers, ready for JSON.

    Raises:
        MmbaseError: no samples, shapes that do not fit, a target outside the classes, or k below 1.
    """
    scores_NC = np.asarray(scores_NC)
    targets_N = np.asarray(targets)
    if scores_NC.ndim != 2 or targets_N.shape != scores_NC.shape[:1]:
        raise MmbaseError(f"scores {scores_NC.shape} and targets {targets_N.shape} do not fit; give [N, C] and [N]")
    samples, classes = scores_NC.shape
    if samples == 0 or classes == 0:
        raise MmbaseError(f"nothing to score: {samples} samples and {classes} classes; give at least one of each")
    if not np.issubdtype(targets_N.dtype, np.integer) or targets_N.min() < 0 or targets_N.max() >= classes:
        got = f"{targets_N.min()} to {targets_N.max()} ({targets_N.dtype})"
        raise MmbaseError(f"targets run from {got}; they must be class indices from 0 to {classes - 1}")
    if not k or min(k) < 1:
        raise MmbaseError(f"k is {list(k)!r}; ask for at least top-1")
    targets_N = targets_N.astype(np.int64)
    ranks_N = target_ranks(scores_NC, targets_N)
    metrics: dict[str, Any] = {}
    for top in k:
        right = int((ranks_N < min(top, classes)).sum())
        metrics[f"top{top}"] = right / samples
        metrics[f"top{top}_ci95"] = list(wilson_interval(right, samples))
        metrics[f"top{top}_chance"] = min(1.0, top / classes)
    count_C = np.bincount(targets_N, minlength=classes)
    right_C = np.bincount(targets_N, weights=ranks_N == 0, minlength=classes)
    present_C = count_C > 0
    metrics["mean_per_class_recall"] = float((right_C[present_C] / count_C[present_C]).mean())
    metrics["samples"] = samples
    metrics["classes"] = classes
    metrics["classes_present"] = int(present_C.sum())
    metrics["not_finite"] = int(np.isnan(scores_NC).any(axis=1).sum())
    return metrics
