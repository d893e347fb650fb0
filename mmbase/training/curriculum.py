"""Curricula: what a step looks like as a pure function of the samples seen, and what that costs. Torch-free.

Small pictures, few patches and short texts first train the same model for a fraction of the work: CLIPA
(arXiv:2305.07017), FLIP (arXiv:2212.00794), RECLIP (arXiv:2304.06028). Since a stage follows from the samples alone, a
resumed run is in the right one, on any number of ranks.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmbase.errors import MmbaseError
from mmbase.models.config import CLIPConfig
from mmbase.training.config import TrainingConfig
from mmbase.training.curriculum_config import Schedule, Shape, What, value_at
from mmbase.training.flops import Shapes, groups, step_work
from mmbase.training.units import say_count, say_flops

_PLACES = 256
"""Places at which a curriculum is looked at for where its stages begin, beside the points of its schedules."""

_MOST_LINES = 8
"""Stages that the banner prints one by one; a ramp of more is summed up."""


class Stage(NamedTuple):
    """How a step is taken."""

    image_size: tuple[int, int]
    """height and width in pixels"""
    patch_keep: float
    """share of the patches that are not dropped"""
    text_length: int
    """tokens that texts are cut to"""
    batch_size: int
    """pairs of all ranks together"""
    learning_rate: float
    """factor on the schedule's"""
    lock_vision: int
    """groups of the image tower that are locked, from the input: stem, each block, head"""
    lock_text: int
    """groups of the text tower that are locked: embeddings, each block, head"""


class Step(NamedTuple):
    """One step of a training."""

    step: int
    """from 0"""
    samples: int
    """seen before it"""
    batch_size: int
    """pairs of all ranks together"""


class Segment(NamedTuple):
    """Samples that are trained on alike, the learning rate aside."""

    start: int
    stop: int
    stage: Stage
    flops: float
    """of all its samples"""


class Curriculum:
    """The schedules of a training, put together.

    Args:
        schedules: at most one for each quantity, for ``source_weight`` one for each part of the mixture.
        model: the towers, whose own values hold where there is no schedule.
        settings: batch size, length, and stages of ``image_sizes``.
        text_tokens: mean tokens of a text once packed, for the cost; None: the whole context.

    Attributes:
        total: samples of the training, ``steps`` times ``batch_size`` of the settings. With other batch sizes the
            number of steps changes, not this.

    Raises:
        MmbaseError: two schedules for one thing, values that the model cannot take.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule],
        model: CLIPConfig,
        settings: TrainingConfig,
        *,
        text_tokens: float | None = None,
    ) -> None:
        self.model, self.total = model, settings.steps * settings.batch_size
        self.base = Stage(
            model.vision.image_hw,
            1.0 - model.vision.patch_dropout,
            model.text.context_length,
            settings.batch_size,
            1.0,
            0,
            0,
        )
        schedules = [*schedules, *_of_image_sizes(settings, model)]
        self._schedules: dict[tuple[What, int | None], Schedule] = {}
        for schedule in schedules:
            key = schedule.what, schedule.source
            if key in self._schedules:
                also = (
                    " (training.image_sizes is one)" if schedule.what == "image_size" and settings.image_sizes else ""
                )
                raise MmbaseError(f"curriculum: {schedule.what} has two schedules{also}; put their points into one")
            self._schedules[key] = schedule
        try:
            self._points = {key: schedule.sample_points(self.total) for key, schedule in self._schedules.items()}
        except ValueError as error:
            raise MmbaseError(str(error)) from error
        self._multiples: dict[What, float] = {
            "image_size": float(max(model.vision.patch_hw)),
            "patch_keep": 1 / 16,
            "batch_size": float(math.gcd(settings.batch_size, 64)),
            "text_length": 1.0,
        }
        self._check()
        self.set_text_tokens(text_tokens)

    # -------------------------------------------------------------------------------------------------- over samples

    def at(self, samples: int) -> Stage:
        """How the step is taken before which ``samples`` samples were seen."""
        base = self.base
        return Stage(
            image_size=self._image_size(self._or("image_size", samples, base.image_size[0])),
            patch_keep=self._or("patch_keep", samples, base.patch_keep),
            text_length=int(self._or("text_length", samples, base.text_length)),
            batch_size=int(self._or("batch_size", samples, base.batch_size)),
            learning_rate=self._or("learning_rate", samples, 1.0),
            lock_vision=int(min(self._or("lock_vision", samples, 0), groups(self.model.vision))),
            lock_text=int(min(self._or("lock_text", samples, 0), groups(self.model.text))),
        )

    def steps(self, start_samples: int = 0, total_samples: int | None = None) -> Iterator[Step]:
        """The steps from ``start_samples`` on: every batch is whole, the last step is the first to reach the end.

        Args:
            start_samples: seen before, a place where a step begins, such as a checkpoint's.
            total_samples: where to end; None: at the end of the training.

        Raises:
            MmbaseError: no step begins at ``start_samples``: the run began with other batch sizes.
        """
        total = self.total if total_samples is None else total_samples
        step, samples = 0, 0
        if not self._changing("batch_size"):
            step, samples = divmod(start_samples, self.base.batch_size)
            samples = start_samples - samples
        while samples < start_samples:
            samples += self.at_batch(samples)
            step += 1
        if samples != start_samples:
            raise MmbaseError(
                f"no step of this curriculum begins after {start_samples:,} samples: the checkpoint is from a run with "
                "other batch sizes; put training.batch_size and its schedule back, or choose another output="
            )
        while samples < total:
            batch = self.at_batch(samples)
            yield Step(step, samples, batch)
            samples += batch
            step += 1

    def at_batch(self, samples: int) -> int:
        """``at(samples).batch_size``, and nothing else computed."""
        return int(self._or("batch_size", samples, self.base.batch_size))

    def step_count(self) -> int:
        """Steps of the whole training."""
        if not self._changing("batch_size"):
            return -(-self.total // self.base.batch_size)
        return sum(1 for _ in self.steps())

    def loader_batch(self, world_size: int = 1) -> int:
        """Pairs of all ranks that the stream gives at a time: a step takes ``batch_size // loader_batch`` of these.

        Streams keep one batch size, so this is the largest that all batches of the training are multiples of.

        Raises:
            MmbaseError: batches that cannot be divided among the ranks.
        """
        sizes = {self.base.batch_size}
        if schedule := self._schedules.get(("batch_size", None)):
            sizes = {int(value) for _, value in self._points["batch_size", None]}
            if schedule.shape in ("linear", "cosine"):
                sizes.add(int(schedule.multiple or self._multiples["batch_size"]))
        if bad := [size for size in sorted(sizes) if size % world_size]:
            raise MmbaseError(
                f"a batch of {bad[0]} pairs cannot be divided among {world_size} ranks; make training.batch_size and "
                f"all batch sizes of the curriculum (and their multiple) multiples of {world_size}"
            )
        return math.gcd(*sizes)

    def source_weights(self) -> dict[int, list[tuple[float, float]]]:
        """For each part of the mixture with a schedule: points (share of the training, weight), in straight lines.

        That is the form of ``data.mixture[i].weight``, which the order of samples is computed from.
        """
        weights: dict[int, list[tuple[float, float]]] = {}
        for (what, source), points in self._points.items():
            if what == "source_weight" and source is not None:
                shape = self._schedules[what, source].shape
                weights[source] = [(place / self.total, weight) for place, weight in _straight(shape, points)]
        return weights

    # ---------------------------------------------------------------------------------------------------------- cost

    def set_text_tokens(self, tokens: float | None) -> None:
        """Count the cost anew for packed texts of so many tokens on average, such as those of the first batch."""
        self.text_tokens = tokens
        self.segments = self._find_segments()
        self._starts = [segment.start for segment in self.segments]
        self._before = [0.0, *itertools.accumulate(segment.flops for segment in self.segments)]

    def shapes(self, stage: Stage) -> Shapes:
        """What the FLOPs of a step of ``stage`` depend on."""
        length = stage.text_length if self.text_tokens is None else min(stage.text_length, self.text_tokens)
        return Shapes(
            stage.batch_size,
            stage.image_size,
            stage.patch_keep,
            length,
            self.text_tokens is not None,
            stage.lock_vision,
            stage.lock_text,
        )

    def flops_per_sample(self, stage: Stage) -> float:
        """Matrix FLOPs, forward and backward, that one pair costs in a step of ``stage``."""
        return step_work(self.model, self.shapes(stage)).total.both / stage.batch_size

    def flops_until(self, samples: float) -> float:
        """Matrix FLOPs of the first ``samples`` samples of the training."""
        if samples <= 0:
            return 0.0
        place = bisect_right(self._starts, samples) - 1
        segment = self.segments[place]
        share = (samples - segment.start) / (segment.stop - segment.start)
        return self._before[place] + segment.flops * share

    @property
    def constant(self) -> bool:
        """Whether every step costs the same."""
        return len(self.segments) == 1

    def describe(self) -> list[str]:
        """The plan and its cost, a line for each stage, for the banner and ``mmbase plan``."""
        total = self._before[-1]
        lines = [self._line(part, total) for part in self._parts()]
        full = self._full_cost()
        if len(lines) > 1 and full:
            ratio = total / full
            lines.append(f"in all {say_flops(total)}, {ratio:.2f} x that of the model's own sizes all along")
        lines += [self._describe_factor(key) for key in self._schedules if key[0] in ("learning_rate", "source_weight")]
        return lines

    def _full_cost(self) -> float:
        return self.flops_per_sample(self.base) * self.total

    def _describe_factor(self, key: tuple[What, int | None]) -> str:
        what, source = key
        name = "learning rate x" if what == "learning_rate" else f"weight of data.mixture.{source}"
        points = ", ".join(f"{value:g} from {say_count(place)}" for place, value in self._points[key])
        return f"{name} {points} ({self._schedules[key].shape})"

    def _parts(self) -> list[list[Segment]]:
        """The segments one by one, or where they are many those between two points of the schedules together."""
        if len(self.segments) <= _MOST_LINES:
            return [[segment] for segment in self.segments]
        places = sorted({place for points in self._points.values() for place, _ in points})
        grouped = itertools.groupby(self.segments, lambda segment: bisect_right(places, segment.start))
        return [list(part) for _, part in grouped]

    def _line(self, part: list[Segment], total: float) -> str:
        """One line of the banner: samples, how they are trained on, what that costs."""
        flops, samples = sum(segment.flops for segment in part), part[-1].stop - part[0].start
        first, last = self._words(part[0].stage), self._words(part[-1].stage)
        words = [now if now == then else f"{now.split()[0]} to {then}" for now, then in zip(first, last)]
        whole = "" if flops == total else f" ({flops / total:.0%})"
        return (
            f"{say_count(part[0].start)} to {say_count(part[-1].stop)} samples: {', '.join(filter(None, words))}: "
            f"{say_flops(flops / samples)} a pair, {say_flops(flops)}{whole}"
        )

    def _words(self, stage: Stage) -> list[str]:
        """A stage in words; empty ones for what the model does by itself."""
        height, width = stage.image_size
        kept = f"{stage.patch_keep:.0%} of patches" if self._changing("patch_keep") or stage.patch_keep < 1 else ""
        words = [f"{height if height == width else f'{height}x{width}'} px", kept, f"{stage.text_length} tokens"]
        words.append(f"{stage.batch_size:,} pairs")
        for name, tower, locked in (
            ("image", self.model.vision, stage.lock_vision),
            ("text", self.model.text, stage.lock_text),
        ):
            much = "locked" if locked == groups(tower) else f"locked up to group {locked} of {groups(tower)}"
            words.append(f"{name} tower {much}" if locked else "")
        return words

    # ------------------------------------------------------------------------------------------------------- how made

    def _changing(self, what: What) -> bool:
        return (what, None) in self._schedules

    def _or(self, what: What, samples: float, otherwise: float) -> float:
        value = self._value(what, samples)
        return otherwise if value is None else value

    def _value(self, what: What, samples: float) -> float | None:
        """A schedule's value, rounded where it lies between two points; None: there is no schedule."""
        schedule = self._schedules.get((what, None))
        if schedule is None:
            return None
        points = self._points[what, None]
        value = value_at(schedule.shape, points, samples)
        multiple = schedule.multiple or self._multiples.get(what)
        if multiple is None or any(value == given for _, given in points):
            return value
        return max(multiple, multiple * math.floor(value / multiple + 0.5))

    def _image_size(self, height: float) -> tuple[int, int]:
        """Height and width in the proportions of the model's, the width of whole patches."""
        base, patch = self.base.image_size, self.model.vision.patch_hw[1]
        if base[0] == base[1]:
            return int(height), int(height)
        if height == base[0]:
            return base
        return int(height), max(patch, round(height * base[1] / base[0] / patch) * patch)

    def _check(self) -> None:
        """Refuse what the model cannot take, before anything is loaded."""
        patch, context = max(self.model.vision.patch_hw), self.model.text.context_length
        for (what, _), points in self._points.items():
            values = [value for _, value in points]
            if what == "image_size" and min(values) < patch:
                raise MmbaseError(f"curriculum: image_size={min(values):.0f} is smaller than a patch of {patch} pixels")
            if what == "text_length" and max(values) > context:
                raise MmbaseError(
                    f"curriculum: text_length={max(values):.0f} exceeds the model's context_length of {context}"
                )

    def _find_segments(self) -> list[Segment]:
        """Where the stage changes, the learning rate aside."""
        places = {place for points in self._points.values() for place, _ in points if 0 < place < self.total}
        if any(schedule.shape in ("linear", "cosine") for schedule in self._schedules.values()):
            places |= {round(self.total * i / _PLACES) for i in range(1, _PLACES)}
        segments: list[Segment] = []
        start, stage = 0, self._cost_stage(0)
        for place in [*sorted(places), self.total]:
            new = None if place == self.total else self._cost_stage(place)
            if new == stage:
                continue
            if start < place:
                cost = self.flops_per_sample(stage) * (place - start)
                segments.append(Segment(start, place, stage, cost))
            if new is not None:
                start, stage = place, new
        return segments

    def _cost_stage(self, samples: int) -> Stage:
        return self.at(samples)._replace(learning_rate=1.0)


def _of_image_sizes(settings: TrainingConfig, model: CLIPConfig) -> list[Schedule]:
    """``training.image_sizes`` as a schedule; after its last stage the model's own size holds."""
    stages = settings.image_sizes
    if not stages:
        return []
    values: list[tuple[float, float]] = []
    start = 0.0
    for stage in stages:
        values.append((start, float(stage.size)))
        start = stage.until
    if start < 1:
        values.append((start, float(model.vision.image_hw[0])))
    return [Schedule.model_validate({"what": "image_size", "values": values})]


def _straight(shape: Shape, points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Points between which straight lines go as ``shape`` does: exactly, a half wave to a 500th of its height."""
    if shape in ("linear", "constant"):
        return [(float(place), value) for place, value in points]
    straight: list[tuple[float, float]] = [points[0]]
    for (first, low), (last, high) in itertools.pairwise(points):
        if shape == "steps":
            straight += [(last - 0.5, low), (last, high)]  # positions are whole
        else:
            places = [first + (last - first) * i / 16 for i in range(1, 17)]
            straight += [(place, value_at(shape, [(first, low), (last, high)], place)) for place in places]
    return straight
