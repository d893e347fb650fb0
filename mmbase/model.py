"""What people use: a model with its preprocessing and tokenizer attached, and the ways to get one.

Letters: B images or texts, D embedding width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmbase.data.image import PreprocessConfig, eval_transform, normalise, open_image
from mmbase.data.tokenizer import Tokenizer
from mmbase.errors import MmbaseError, nearest
from mmbase.evaluation.zeroshot import Classifier, ClassNames
from mmbase.models.adapter import OpenClipAdapter
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.checkpoint_store import Store
from mmbase.training.precision import choose_device
from mmbase.training.weights import AVERAGE_FILE, MODEL_FILE

MODEL_JSON = "model.json"
Towers = CLIP | OpenClipAdapter


class ImageTextModel:
    """Two towers in evaluation mode, with the preprocessing and the tokenizer they were made for.

    Args:
        module: a ``mmbase.models.clip.CLIP`` or an adapter with the same methods.
        preprocess: pixels to the towers' input.
        tokenizer: text to ids.
        name: what to call it in tables.
        device: where the towers run; ``auto`` takes a GPU where there is one.
    """

    def __init__(
        self, module: Towers, preprocess: PreprocessConfig, tokenizer: Tokenizer, name: str, device: str = "auto"
    ) -> None:
        self.device = choose_device(device)
        self.module = module.to(self.device).eval().requires_grad_(False)
        self.preprocess_config, self.tokenizer, self.name = preprocess, tokenizer, name

    def __repr__(self) -> str:
        return f"ImageTextModel({self.name!r}, {self.image_size} px, {self.embed_dim}-d, {self.device})"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.module.image_size

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return self.module.embed_dim

    @property
    def logit_scale(self) -> float:
        """Factor from cosine similarity to logit."""
        return float(self.module.logit_scale.exp())

    @property
    def logit_bias(self) -> float | None:
        """Offset of the logits, in models trained with the sigmoid loss."""
        bias = self.module.logit_bias
        return None if bias is None else float(bias)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the image tower, the text tower and all."""
        total = sum(p.numel() for p in self.module.parameters())
        image = sum(p.numel() for n, p in self.module.named_parameters() if ".visual." in f".{n}")
        scalars = sum(p.numel() for n, p in self.module.named_parameters() if "logit_" in n)
        return {"image": image, "text": total - image - scalars, "total": total}

    def preprocess(self, image: Any) -> np.ndarray:
        """One image as the towers want it: float32 ``[3, H, W]``, normalised.

        Args:
            image: a path, bytes, PIL image, array ``[H, W, 3]`` or tensor ``[3, H, W]`` (uint8, or float in 0..1).

        Raises:
            MmbaseError: no such file, no image, a shape or type that is none.
        """
        return normalise(eval_transform(open_image(image), self.preprocess_config), self.preprocess_config)

    def encode_image(self, images: Any, batch_size: int = 64) -> np.ndarray:
        """Features of unit length, float32 ``[B, D]``.

        Args:
            images: one image or a sequence of them (see :meth:`preprocess`), or a tensor or array of a whole batch.
            batch_size: images per pass.

        Raises:
            MmbaseError: as :meth:`preprocess`, or an empty sequence.
        """
        items = _image_list(images)
        if not items:
            raise MmbaseError("no images given; pass at least one")
        batches = (np.stack([self.preprocess(image) for image in chunk]) for chunk in _chunks(items, batch_size))
        return self._features(batches, self.module.encode_image)

    def encode_text(self, texts: str | Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Features of unit length, float32 ``[B, D]``, of one text or several.

        Raises:
            MmbaseError: no texts, or something that is no string.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        if not items:
            raise MmbaseError("no texts given; pass at least one")
        batches = (self.tokenizer(chunk) for chunk in _chunks(items, batch_size))
        return self._features(batches, self.module.encode_text)

    def _features(self, batches: Iterator[np.ndarray], encode: Any) -> np.ndarray:
        parts: list[Tensor] = []
        with torch.inference_mode():
            for batch in batches:
                features_BD = encode(torch.from_numpy(batch).to(self.device), normalize=True)
                parts.append(features_BD.float().cpu())
        return torch.cat(parts).numpy()

    def classifier(self, labels: ClassNames, templates: str | Sequence[str] = "none") -> Classifier:
        """A classifier over ``labels``, built once: ``clf(images)`` gives probabilities ``[images, labels]``.

        Args:
            labels: class names, or the name of a published set (``imagenet``).
            templates: prompts to average over: a set's name (``imagenet``), one template with ``{}``, or a list.

        Raises:
            MmbaseError: no labels, or a template without ``{}``.
        """
        return Classifier(self, labels, templates)

    def classify(
        self, images: Any, labels: ClassNames, templates: str | Sequence[str] = "none", k: int | None = None
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Labels with their probabilities, likeliest first: one list for one image, a list of lists for several.

        Args:
            images: one image or a list of them, as for :meth:`encode_image`.
            labels: class names.
            templates: as for :meth:`classifier`.
            k: only the ``k`` likeliest; None for all.
        """
        single = _is_single(images)
        classifier = self.classifier(labels, templates)
        predicted = classifier.predict(_image_list(images), k or len(classifier.labels))
        return predicted[0] if single else predicted

    def export(self, format: str, folder: str | Path) -> Path:
        """Write a folder that another library loads with equal features.

        Args:
            format: ``openclip`` (``open_clip.create_model("local-dir:FOLDER")``) or ``huggingface``
                (``transformers.CLIPModel.from_pretrained(FOLDER)``).
            folder: where; must not hold files yet.

        Raises:
            MmbaseError: a model with parts that the format has no words for (named), or a folder in use.
        """
        from mmbase.models.huggingface import save_huggingface
        from mmbase.models.openclip import save_openclip

        writers = {"openclip": save_openclip, "huggingface": save_huggingface}
        if format not in writers:
            raise MmbaseError(f"unknown export format {format!r}{nearest(format, writers)} (openclip or huggingface)")
        if not isinstance(self.module, CLIP):
            raise MmbaseError(
                f"{self.name!r} runs through OpenCLIP's own model already; only native models are exported"
            )
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise MmbaseError(f"{str(folder)!r} exists and is not empty; choose another --output")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            writers[format](
                self.module, temporary, self.preprocess_config.model_dump(mode="json"), self.tokenizer.config
            )
            temporary.replace(folder)
        except OSError as error:
            raise MmbaseError(f"cannot write {str(folder)!r}: {error.strerror}; choose another --output") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


def load(source: str | Path, pretrained: str | Path | None = None, *, device: str = "auto") -> ImageTextModel:
    """A model ready to use, from wherever it is.

    Args:
        source: a run's folder, one of its checkpoints, an OpenCLIP name such as ``ViT-B-32``, ``hf-hub:org/name``,
            an OpenCLIP or Hugging Face CLIP folder, or a weights file.
        pretrained: with an OpenCLIP name: one of OpenCLIP's tags (``laion2b_s34b_b79k``; the library downloads) or a
            local ``.pt`` or ``.safetensors`` state dict.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        MmbaseError: nothing there, an unknown name or tag (with the nearest), damaged or unsafe weights.
    """
    run = _run_parts(Path(source))
    if run is not None:
        if pretrained is not None:
            raise MmbaseError(f"{str(source)!r} is a run and has its own weights; leave pretrained={pretrained!r} out")
        return _load_run(*run, device=device)
    from mmbase.models.weights import load_weights

    module, info = load_weights(str(source), None if pretrained is None else str(pretrained))
    return _assemble(module, info, device)


def create(name_or_config: str | CLIPConfig | dict[str, Any], *, device: str = "auto") -> ImageTextModel:
    """A model with random weights, from an OpenCLIP name or a configuration.

    Raises:
        MmbaseError: an unknown name (with the nearest) or a configuration that does not hold together.
    """
    from mmbase.models.weights import build

    module, info = build(name_or_config)
    return _assemble(module, info, device)


def _assemble(module: Towers, info: dict[str, Any], device: str) -> ImageTextModel:
    preprocess = PreprocessConfig.model_validate(info["preprocess"])
    return ImageTextModel(module, preprocess, Tokenizer.from_config(info["tokenizer"]), info["name"], device)


def _run_parts(path: Path) -> tuple[Path, Path] | None:
    """The run's folder and the weights file that ``path`` means, or None where it is no run of ours.

    Raises:
        MmbaseError: a run without weights yet.
    """
    if path.is_file() and path.suffix == ".safetensors":
        folder, weights = path.parent, path
    elif path.is_dir():
        folder = path
        weights = next((path / n for n in (AVERAGE_FILE, MODEL_FILE) if (path / n).is_file()), None)
    else:
        return None
    if not (folder / MODEL_JSON).is_file() and folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if not (folder / MODEL_JSON).is_file():
        return None
    if weights is None:
        checkpoints = Store(folder / "checkpoints").paths()
        if not checkpoints:
            raise MmbaseError(
                f"the run {str(path)!r} has no weights yet; run `mmbase train` until its first checkpoint"
            )
        return _run_parts(checkpoints[-1])
    return folder, weights


def _load_run(folder: Path, weights: Path, *, device: str) -> ImageTextModel:
    from safetensors.torch import load_file

    try:
        described = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
        with torch.device("meta"):
            module = CLIP(CLIPConfig.model_validate(described["model"]))
        module.load_state_dict(load_file(weights), assign=True)
    except Exception as error:  # JSON, pydantic, safetensors and torch raise kinds of their own
        reason = str(error).strip().splitlines()[0]
        raise MmbaseError(
            f"cannot load {str(weights)!r}: {reason}; train the run again or take another checkpoint"
        ) from error
    tokenizer = Tokenizer.from_config(described["tokenizer"], folder)
    return ImageTextModel(
        module, PreprocessConfig.model_validate(described["preprocess"]), tokenizer, folder.name, device
    )


def _is_single(images: Any) -> bool:
    """Whether this is one image rather than a sequence or a batch."""
    if isinstance(images, str | bytes | Path):
        return True
    shape = getattr(images, "shape", None)
    if shape is not None:
        return len(shape) < 4
    return not isinstance(images, Sequence)


def _image_list(images: Any) -> list[Any]:
    return [images] if _is_single(images) else list(images)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
