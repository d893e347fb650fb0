"""Evaluation between steps, shared by all ranks: each encodes its part, and all learn the same numbers.

What is asked, tasks with their pictures and metrics, comes from above (``mmbase.pipeline``): training knows nothing of
evaluation but this model to be asked and the numbers that come back.

Letters: B images or texts of all ranks, R of this one, E embedding width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmbase.data.image import PreprocessConfig, eval_transform, normalise, open_image
from mmbase.data.tokenizer import Tokenizer
from mmbase.models.clip import CLIP
from mmbase.training.distributed import Ranks
from mmbase.training.matrices import local
from mmbase.training.optim import WeightAverage
from mmbase.training.precision import Precision


class SharedModel:
    """The model under training as evaluation asks for one; every method that encodes is called by all ranks alike.

    Args:
        model: plain, wrapped by DistributedDataParallel, or sharded by FSDP2: then towers gather in every batch.
        preprocess: the evaluation transform.
        tokenizer: text to ids.
        ranks: who share the work.
        precision: what the towers run in.
        name: what to call it.
    """

    def __init__(
        self,
        model: CLIP,
        preprocess: PreprocessConfig,
        tokenizer: Tokenizer,
        ranks: Ranks,
        precision: Precision,
        name: str = "",
    ) -> None:
        self.model, self.tokenizer, self.ranks, self.precision, self.name = model, tokenizer, ranks, precision, name
        self._preprocess = preprocess

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.ranks.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.model.image_size

    @property
    def logit_scale(self) -> float:
        """Factor from cosine similarity to logit."""
        return float(local(self.model.logit_scale.detach()).exp())

    @property
    def logit_bias(self) -> float | None:
        """Offset of the logits, in models trained with the sigmoid loss."""
        bias = self.model.logit_bias
        return None if bias is None else float(local(bias.detach()))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the image tower, the text tower and all."""
        image, text, total = (
            sum(parameter.numel() for parameter in part.parameters())
            for part in (self.model.visual, self.model.text, self.model)
        )
        return {"image": image, "text": text, "total": total}

    def encode_image(self, images: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        """Features of unit length, float32 ``[B, E]``, the same on all ranks."""

        def prepare(chunk: Sequence[Any]) -> np.ndarray:
            shown = [eval_transform(open_image(image), self._preprocess) for image in chunk]
            return np.stack([normalise(picture, self._preprocess) for picture in shown])

        return self._features(list(images), batch_size, prepare, self.model.encode_image)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Features of unit length, float32 ``[B, E]``, the same on all ranks."""
        return self._features(list(texts), batch_size, self.tokenizer, self.model.encode_text)

    @torch.no_grad()
    def _features(
        self,
        items: list[Any],
        batch_size: int,
        prepare: Callable[[list[Any]], np.ndarray],
        encode: Callable[..., Tensor],
    ) -> np.ndarray:
        """Equal stretches of the items by rank, the last ones filled up so that all call the towers equally often."""
        world = self.ranks.world_size
        share = math.ceil(len(items) / world)
        mine = items[self.ranks.rank * share : (self.ranks.rank + 1) * share]
        mine += items[-1:] * (share - len(mine))
        parts: list[Tensor] = []
        for first in range(0, share, batch_size):
            batch = torch.from_numpy(prepare(mine[first : first + batch_size])).to(self.device)
            with self.precision.autocast(self.device):
                parts.append(encode(batch, normalize=True).float())
        features_RE = torch.cat(parts)
        if world == 1:
            return features_RE.cpu().numpy()
        features_BE = features_RE.new_empty(world * share, features_RE.shape[1])
        dist.all_gather_into_tensor(features_BE, features_RE)
        return features_BE[: len(items)].cpu().numpy()


class Evaluation:
    """When a run is evaluated, what came of it, and whether it still gets better.

    Args:
        measure: what is measured of the model as it is, names to numbers, ``score`` among them (higher is better);
            called by all ranks alike. None: nothing ever is.
        model: whose weights.
        average: whose weights are measured where a run averages them.
        every: samples between evaluations; None: there are none.
        patience: evaluations without a better score after which the run is :attr:`over`; None: it never is.
        report: gets a line of each evaluation, and of the end for want of a better score.
    """

    def __init__(
        self,
        measure: Callable[[], Mapping[str, float]] | None,
        model: CLIP,
        average: WeightAverage | None,
        *,
        every: int | None,
        patience: int | None,
        report: Callable[[str], None] = print,
    ) -> None:
        self._report = report
        self.measure, self.model, self.average = measure, model, average
        self.every, self.patience = every if measure else None, patience
        self.best: float | None = None
        self.without_better = 0

    @property
    def over(self) -> bool:
        """Whether the score has not risen for as many evaluations as there is patience for."""
        return self.patience is not None and self.without_better >= self.patience

    def is_due(self, before: int, after: int, is_last: bool = False) -> bool:
        """Whether a step from ``before`` samples to ``after`` is followed by an evaluation, as the last one is."""
        return self.every is not None and (is_last or after // self.every > before // self.every)

    def run(self, step: int) -> dict[str, float]:
        """Measure after ``step`` steps, by all ranks; the model is left in evaluation mode."""
        assert self.measure is not None  # else it is never due
        self.model.eval()
        with self._averaged():
            found = dict(self.measure())
        if self.best is None or found["score"] > self.best:
            self.best, self.without_better = found["score"], 0
        else:
            self.without_better += 1
        numbers = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
        self._report(f"after step {step}: {numbers}" + " (the best so far)" * (not self.without_better))
        if self.over:
            self._report(f"no better score in {self.without_better} evaluations: training ends, the best weights stay")
        return found

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place; exactly undone."""
        if self.average is None:
            yield
            return
        self._swap(self.average)
        try:
            yield
        finally:
            self._swap(self.average)

    @torch.no_grad()
    def _swap(self, average: WeightAverage) -> None:
        for name, value in self.model.state_dict().items():
            ours, theirs = local(value), local(average.averaged[name])
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The best score, and evaluations since."""
        return {"best": self.best, "without_better": self.without_better}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.best, self.without_better = state["best"], int(state["without_better"])
