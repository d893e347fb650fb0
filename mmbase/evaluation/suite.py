"""Evaluate a model on tasks: zero-shot, retrieval, breakdowns, latency, size; keep every prediction for the report.

Legend of shape suffixes: N samples, C classes, M distinct captions, D width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmbase.errors import MmbaseError, nearest
from mmbase.evaluation.latency import measure_latency, model_size
from mmbase.evaluation.protocol import ImageTextModel
from mmbase.evaluation.retrieval import retrieval_metrics, unique_captions
from mmbase.evaluation.run_folder import to_json
from mmbase.evaluation.templates import resolve_templates
from mmbase.evaluation.zeroshot import Classifier, ClassNames, resolve_class_names, top_indices, zeroshot_metrics
from mmbase.files import write_atomically

_KEPT_LABELS = 5
_RETRIEVAL_EXAMPLES = 8
_ROWS_AT_ONCE = 2048  # sorting all labels of 50,000 images at once would take gigabytes


@dataclass(frozen=True)
class EvaluationTask:
    """One set of samples and what is asked of it.

    Attributes:
        name: short and unique within a suite; the key of its results.
        samples: dicts with ``key`` (str), ``image`` (path, PIL image or array), ``caption`` (str) and, if there is
            any, ``meta`` (dict: group, vendor, ...). A sample's class is the one that its caption names.
        class_names: labels (synonyms as lists) or a published set's name; None for retrieval only.
        templates: a set's name, one template or a list.
        breakdown: fields of ``meta`` to give top-1 and top-5 by. A sample whose value is a list counts under each.
        retrieval: measure retrieval between the images and their distinct captions.
        title: heading in the report; the name where empty.
        description: one or two sentences for the report: what is measured, and on what.

    Raises:
        MmbaseError: no samples, a sample without an image or caption, a caption that is no label, unknown template
            set or breakdown field.
    """

    name: str
    samples: Sequence[dict[str, Any]]
    class_names: ClassNames | None = None
    templates: str | Sequence[str] = "none"
    breakdown: Sequence[str] = ()
    retrieval: bool = True
    title: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if not len(self.samples):
            raise MmbaseError(f"task {self.name!r} has no samples; give at least one")
        for position, sample in enumerate(self.samples):
            missing = [field for field in ("key", "image", "caption") if sample.get(field) is None]
            if missing:
                raise MmbaseError(f"sample {position} of task {self.name!r} has no {missing[0]!r}; give it one")
        resolve_templates(self.templates)
        if self.class_names is not None:
            self.targets()
        fields = {field for sample in self.samples for field in sample.get("meta") or {}}
        for field in self.breakdown:
            if field not in fields:
                raise MmbaseError(
                    f"task {self.name!r} has no meta field {field!r}{nearest(field, fields) or ';'} "
                    f"known: {', '.join(sorted(fields)) or 'none'}"
                )

    @property
    def heading(self) -> str:
        """Title, or the name where there is none."""
        return self.title or self.name

    def labels(self) -> list[str]:
        """One label per class."""
        return [names[0] for names in resolve_class_names(self.class_names or ())]

    def targets(self) -> np.ndarray:
        """Class index of each sample, int64 [N]."""
        classes = resolve_class_names(self.class_names or ())
        index = {name: position for position, names in reversed(list(enumerate(classes))) for name in names}
        for sample in self.samples:
            if sample["caption"] not in index:
                raise MmbaseError(
                    f"caption {sample['caption']!r} of sample {sample['key']!r} is none of the {len(classes)} labels "
                    f"of task {self.name!r}{nearest(sample['caption'], index) or '; add it to class_names'}"
                )
        return np.array([index[sample["caption"]] for sample in self.samples], dtype=np.int64)


def _breakdown(task: EvaluationTask, scores_NC: np.ndarray, targets_N: np.ndarray) -> dict[str, dict[str, Any]]:
    """Zero-shot metrics by each value of each breakdown field, values with the most samples first."""
    result: dict[str, dict[str, Any]] = {}
    for field in task.breakdown:
        members: dict[str, list[int]] = {}
        for position, sample in enumerate(task.samples):
            value = (sample.get("meta") or {}).get(field, "(none)")
            for item in value if isinstance(value, list | tuple) else [value]:
                members.setdefault(str(item), []).append(position)
        ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
        result[field] = {value: zeroshot_metrics(scores_NC[rows], targets_N[rows]) for value, rows in ordered}
    return result


def _predictions(task: EvaluationTask, classifier: Classifier, image_features_ND: np.ndarray) -> list[dict[str, Any]]:
    """Key, true label and the likeliest labels with their probabilities of every sample, in the samples' order."""
    tops: list[list[tuple[str, float]]] = []
    for first in range(0, len(image_features_ND), _ROWS_AT_ONCE):
        probabilities_NC = classifier.probabilities(image_features_ND[first : first + _ROWS_AT_ONCE])
        tops.extend(classifier.top(probabilities_NC, _KEPT_LABELS))
    labels = [classifier.labels[target] for target in task.targets()]
    return [
        {"key": sample["key"], "label": label, "top": [[name, probability] for name, probability in top]}
        for sample, label, top in zip(task.samples, labels, tops)
    ]


def _retrieval_examples(
    image_features_ND: np.ndarray, text_features_MD: np.ndarray, texts: list[str], pairs: np.ndarray, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """A few random queries of each direction with their best matches; images are given by sample position."""
    random = np.random.default_rng(seed)
    belongs = {(int(image), int(text)) for image, text in pairs}
    examples: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    count = min(_RETRIEVAL_EXAMPLES, len(texts), len(image_features_ND))
    for text in sorted(random.choice(len(texts), count, replace=False).tolist()):
        cosine_N = image_features_ND @ text_features_MD[text]
        matches = [
            {"sample": int(image), "cosine": float(cosine_N[image]), "right": (int(image), text) in belongs}
            for image in top_indices(cosine_N[None], 5)[0]
        ]
        examples["text_to_image"].append({"text": texts[text], "matches": matches})
    for image in sorted(random.choice(len(image_features_ND), count, replace=False).tolist()):
        cosine_M = text_features_MD @ image_features_ND[image]
        matches = [
            {"text": texts[text], "cosine": float(cosine_M[text]), "right": (image, int(text)) in belongs}
            for text in top_indices(cosine_M[None], 5)[0]
        ]
        examples["image_to_text"].append({"sample": image, "matches": matches})
    return examples


def evaluate_task(
    model: ImageTextModel, task: EvaluationTask, *, batch_size: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Results of one task: ``samples``, ``zero_shot``, ``breakdown``, ``retrieval``, ``predictions``, ``examples``.

    Images are encoded once for everything. Zero-shot uses the task's templates, retrieval the bare captions.
    """
    image_features_ND = model.encode_image([sample["image"] for sample in task.samples], batch_size=batch_size)
    result: dict[str, Any] = {"title": task.heading, "description": task.description, "samples": len(task.samples)}
    if task.class_names is not None:
        classifier = Classifier(model, task.class_names, task.templates)
        scores_NC = classifier.logits(image_features_ND)
        result["templates"] = resolve_templates(task.templates)
        result["zero_shot"] = zeroshot_metrics(scores_NC, task.targets())
        result["breakdown"] = _breakdown(task, scores_NC, task.targets())
        result["predictions"] = _predictions(task, classifier, image_features_ND)
    if task.retrieval:
        texts, pairs = unique_captions([sample["caption"] for sample in task.samples])
        text_features_MD = model.encode_text(texts)
        result["retrieval"] = retrieval_metrics(image_features_ND, text_features_MD, pairs)
        result["examples"] = _retrieval_examples(image_features_ND, text_features_MD, texts, pairs, seed)
    return result


def describe_model(model: ImageTextModel) -> dict[str, Any]:
    """``model`` and ``size`` of :func:`evaluate`, and no tasks."""
    image_size = model.image_size
    return {
        "model": {
            "name": model.name,
            "image_size": image_size if isinstance(image_size, int) else list(image_size),
            "logit_scale": float(model.logit_scale),
            "logit_bias": None if model.logit_bias is None else float(model.logit_bias),
        },
        "size": model_size(model.parameter_counts()),
        "tasks": {},
    }


def evaluate(
    model: ImageTextModel,
    tasks: Sequence[EvaluationTask],
    out_dir: str | Path | None = None,
    *,
    batch_size: int = 64,
    latency: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Run every task on ``model``, time it, and write ``metrics.json`` and ``predictions.jsonl``.

    Args:
        model: see ``ImageTextModel``.
        tasks: with distinct names.
        out_dir: where the two files go, each whole or not at all; None writes nothing.
        batch_size: images encoded at a time.
        latency: time the encoders (a few seconds for a small model).
        seed: picks the retrieval examples.

    Returns:
        ``model`` (name, image_size, logit_scale, logit_bias), ``size`` (``model_size``), ``latency``
        (``measure_latency``; absent when not asked for) and ``tasks``: name -> ``evaluate_task``. ``metrics.json``
        holds the same but the predictions and examples.

    Raises:
        MmbaseError: no tasks, two of one name, or files that cannot be written.
    """
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise MmbaseError(f"tasks are {names!r}; give at least one, each with a name of its own")
    results = describe_model(model)
    results["tasks"] = {task.name: evaluate_task(model, task, batch_size=batch_size, seed=seed) for task in tasks}
    if latency:
        samples = tasks[0].samples
        images = [sample["image"] for sample in samples[:32]]
        results["latency"] = measure_latency(model, images, [samples[0]["caption"]])
    if out_dir is not None:
        _write_results(Path(out_dir), results)
    return results


def _write_results(out_dir: Path, results: dict[str, Any]) -> None:
    kept = ("predictions", "examples")
    tasks = {
        name: {key: value for key, value in task.items() if key not in kept} for name, task in results["tasks"].items()
    }
    lines = [
        to_json({"task": name, **prediction}) + "\n"
        for name, task in results["tasks"].items()
        for prediction in task.get("predictions", ())
    ]
    write_atomically(out_dir / "predictions.jsonl", "".join(lines))
    write_atomically(out_dir / "metrics.json", to_json({**results, "tasks": tasks}, indent=2) + "\n")
