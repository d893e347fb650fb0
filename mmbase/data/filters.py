"""Which samples are trained on, told by the fields they declare: width, similarity, language, licence, ... Torch-free.

A filter is a requirement on one field. A sample that fails one is left out and counted under that filter's reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmbase.errors import MmbaseError, nearest

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "width": ("original_width", "image_width"),
    "height": ("original_height", "image_height"),
    "similarity": ("clip_similarity", "clip_l14_similarity_score", "clip_b32_similarity_score", "clip_score"),
    "language": ("lang", "detected_language"),
    "nsfw": ("punsafe", "nsfw_score", "nsfw_prediction"),
    "watermark": ("pwatermark", "watermark_score"),
    "aesthetic": ("aesthetic_score", "aesthetics_score"),
    "licence": ("license", "license_name", "licence_name", "license_id"),
    "caption": ("txt", "text", "alt_text"),
}
"""A field's name here, and what img2dataset, LAION and DataComp call it; letter case is ignored everywhere."""

DERIVED: dict[str, str] = {
    "aspect": "longer side over shorter side, at least 1",
    "shorter_side": "the smaller of width and height, in pixels",
    "pixels": "width times height",
    "caption_length": "characters of the caption",
    "caption_words": "words of the caption, split at white space",
}
"""Fields that are computed where a sample does not declare them."""


class Selection(Protocol):
    """Decides which samples of a dataset are used; applied once, where the index of the shards is built."""

    @property
    def digest(self) -> str:
        """Equal for equal decisions; names the cached result."""
        ...

    def reason(self, fields: Mapping[str, Any]) -> str | None:
        """Why a sample with these fields is left out; None: it is used."""
        ...


class FilterConfig(BaseModel):
    """One requirement on a declared field; several conditions in one filter must all hold."""

    model_config = ConfigDict(extra="forbid")

    field: str = Field(
        description="a JSON field under its own name or a usual one (width, height, similarity, language, nsfw, "
        "watermark, aesthetic, licence, caption), or computed: aspect, shorter_side, pixels, caption_length, "
        "caption_words"
    )
    min: float | None = Field(None, description="smallest value kept")
    max: float | None = Field(None, description="largest value kept")
    one_of: list[str | int | float | bool] | None = Field(
        None, description="values kept; letter case aside; of a list, any entry"
    )
    none_of: list[str | int | float | bool] | None = Field(
        None, description="values left out; letter case aside; of a list, any entry"
    )
    matches: str | None = Field(
        None, description="regular expression found in the values kept; letter case aside; of a list, in any entry"
    )
    missing: Literal["drop", "keep"] = Field(
        "drop", description="samples without the field: drop, since nothing shows that they qualify, or keep"
    )

    @field_validator("matches")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    @field_validator("one_of", "none_of")
    @classmethod
    def _listed(cls, values: list[Any] | None) -> list[Any] | None:
        if values == []:
            raise ValueError("is an empty list; name the values, or leave the key out")
        if values and any(isinstance(v, bool) for v in values) and any(isinstance(v, str) for v in values):
            raise ValueError(f"mixes texts and true/false: {values}; YAML reads a bare no or on as one, so quote it")
        return values

    @model_validator(mode="after")
    def _asks_something(self) -> FilterConfig:
        if not self.field.strip():
            raise ValueError("the filter names no field; set field, for example field: similarity")
        if all(v is None for v in (self.min, self.max, self.one_of, self.none_of, self.matches)):
            raise ValueError(f"the filter on {self.field!r} asks nothing; give it min, max, one_of, none_of or matches")
        for name, bound in (("min", self.min), ("max", self.max)):
            if bound is not None and not math.isfinite(bound):
                raise ValueError(f"{name}={bound} of the filter on {self.field!r} is not finite; leave it out instead")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min:g} is above max={self.max:g} in the filter on {self.field!r}; swap them")
        return self


def parse_filter(text: str) -> FilterConfig:
    """A filter as one writes it on a command line.

    ``similarity>=0.28``, ``aspect<=3``, ``language=en,de`` (one of), ``licence!=unknown`` (none of), ``caption~cat``
    (matches); a ``?`` after the field (``similarity?>=0.28``) keeps samples without it.

    Raises:
        MmbaseError: anything else.
    """
    found = re.fullmatch(r"\s*([\w.\- ]+?)\s*(\?)?\s*(>=|<=|!=|=|~)\s*(.+?)\s*", text, re.DOTALL)
    if not found:
        raise MmbaseError(
            f"{text!r} is no filter; write for example 'similarity>=0.28', 'language=en,de', 'caption~cat'"
        )
    field, keep, operator, value = found.groups()
    given: dict[str, Any] = {"field": field, "missing": "keep" if keep else "drop"}
    if operator in (">=", "<="):
        number = as_number(value)
        if number is None:
            raise MmbaseError(f"{value!r} in the filter {text!r} is not a number")
        given["min" if operator == ">=" else "max"] = number
    elif operator == "~":
        given["matches"] = value
    else:
        given["one_of" if operator == "=" else "none_of"] = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return FilterConfig.model_validate(given)
    except ValueError as error:
        errors = getattr(error, "errors", list)()
        message = errors[0]["msg"].removeprefix("Value error, ") if errors else str(error)
        raise MmbaseError(f"the filter {text!r}: {message}") from error


def find_field(name: str, fields: Mapping[str, Any]) -> Any:
    """The value of ``name`` among a sample's fields: exact, letter case aside, a usual name, or computed; else None.

    An empty string or list, and a number that is not finite, count as missing.
    """
    value = _declared(name, fields)
    if value is None and (derive := _DERIVE.get(name.lower())):
        value = derive(fields)
    return value


def _declared(name: str, fields: Mapping[str, Any]) -> Any:
    if _present(value := fields.get(name)):
        return value
    wanted = name.lower()
    lowered = {str(key).lower(): value for key, value in fields.items()}
    for candidate in (wanted, *USUAL_NAMES.get(wanted, ())):
        if _present(value := lowered.get(candidate)):
            return value
    return None


def _present(value: Any) -> bool:
    return value not in (None, "", []) and not (isinstance(value, float) and not math.isfinite(value))


def as_number(value: Any) -> float | None:
    """``value`` as a finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _sides(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    width, height = (as_number(_declared(name, fields)) for name in ("width", "height"))
    return (width, height) if width and height and width > 0 and height > 0 else None


def _of_sides(compute: Callable[[float, float], float]) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda fields: compute(*sides) if (sides := _sides(fields)) else None


def _of_caption(compute: Callable[[str], int]) -> Callable[[Mapping[str, Any]], int | None]:
    return lambda fields: compute(str(caption)) if (caption := _declared("caption", fields)) is not None else None


_DERIVE: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "aspect": _of_sides(lambda w, h: max(w, h) / min(w, h)),
    "shorter_side": _of_sides(min),
    "pixels": _of_sides(lambda w, h: w * h),
    "caption_length": _of_caption(len),
    "caption_words": _of_caption(lambda text: len(text.split())),
}


class FieldFilters:
    """Several filters; a sample is used when it fulfils them all. A :class:`Selection`."""

    def __init__(self, filters: Sequence[FilterConfig]) -> None:
        self.filters = list(filters)
        described = json.dumps([f.model_dump(mode="json") for f in self.filters], sort_keys=True)
        self._digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        self._checks = [_Check(f) for f in self.filters]

    @property
    def digest(self) -> str:
        """Equal for equal filters."""
        return self._digest

    def reason(self, fields: Mapping[str, Any]) -> str | None:
        """The first requirement that the sample fails, such as ``"similarity below 0.28"``; None: it fulfils all."""
        for check in self._checks:
            if (why := check(fields)) is not None:
                return why
        return None


class _Check:
    """A filter made ready: patterns compiled, values folded."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.kept = None if config.one_of is None else {_folded(v) for v in config.one_of}
        self.refused = {_folded(v) for v in config.none_of or ()}
        self.pattern = None if config.matches is None else re.compile(config.matches, re.IGNORECASE)

    def __call__(self, fields: Mapping[str, Any]) -> str | None:
        config, name = self.config, self.config.field
        value = find_field(name, fields)
        if value is None:
            return f"{name} missing" if config.missing == "drop" else None
        if config.min is not None or config.max is not None:
            number = as_number(value)
            if number is None:
                return f"{name} not a number"
            if config.min is not None and number < config.min:
                return f"{name} below {config.min:g}"
            if config.max is not None and number > config.max:
                return f"{name} above {config.max:g}"
        entries = value if isinstance(value, list) else [value]
        folded = {_folded(entry) for entry in entries}
        if self.kept is not None and not folded & self.kept:
            return f"{name} not one of {_shown(config.one_of)}"
        if folded & self.refused:
            return f"{name} one of {_shown(config.none_of)}"
        if self.pattern is not None and not any(self.pattern.search(str(entry)) for entry in entries):
            return f"{name} does not match {config.matches}"
        return None


def _folded(value: Any) -> str:
    """Texts letter case aside; 1, 1.0 and "1" are one value."""
    number = as_number(value)
    return str(value).strip().casefold() if number is None else repr(number)


def _shown(values: Sequence[Any] | None, most: int = 5) -> str:
    values = values or ()
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


class HeldOut:
    """Leaves out the samples whose ``field`` has one of the held-out ``values``. A :class:`Selection`."""

    def __init__(self, field: str, values: Collection[str]) -> None:
        self.field, self.values = field, frozenset(values)
        described = json.dumps([field, sorted(self.values)])
        self._digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    @property
    def digest(self) -> str:
        """Equal for the same field and values."""
        return self._digest

    def reason(self, fields: Mapping[str, Any]) -> str | None:
        """``"held out"``, or None."""
        return "held out" if str(fields.get(self.field)) in self.values else None


class AllOf:
    """Several selections; the first that leaves a sample out gives the reason. A :class:`Selection`."""

    def __init__(self, selections: Sequence[Selection]) -> None:
        self.selections = list(selections)
        digests = "\n".join(selection.digest for selection in self.selections)
        self._digest = hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()

    @property
    def digest(self) -> str:
        """Equal for equal selections in the same order."""
        return self._digest

    def reason(self, fields: Mapping[str, Any]) -> str | None:
        """Why a sample is left out; None: every selection keeps it."""
        return next((why for selection in self.selections if (why := selection.reason(fields)) is not None), None)


def select(filters: Sequence[FilterConfig], *others: Selection | None) -> Selection | None:
    """One selection of filters and further selections; None where there is nothing to ask."""
    parts: list[Selection] = [FieldFilters(filters)] if filters else []
    parts += [other for other in others if other is not None]
    return AllOf(parts) if len(parts) > 1 else parts[0] if parts else None


def explain_removed(removed: Mapping[str, int], kept: int, known: Collection[str] = ()) -> str:
    """One line: how many samples the filters left, and what each took, most first.

    Args:
        removed: reason to number of samples.
        kept: samples left.
        known: names of fields that samples have, to suggest one where a filter's is missing everywhere.

    Raises:
        MmbaseError: nothing is left.
    """
    total = kept + sum(removed.values())
    parts = [f"{count:,} {why}" for why, count in sorted(removed.items(), key=lambda item: (-item[1], item[0]))]
    if removed and not kept:
        message = f"the filters leave none of {total:,} samples: {', '.join(parts)}"
        for why, count in removed.items():
            if why.endswith(" missing") and count == total:
                name = why.removesuffix(" missing")
                have = f" (fields: {', '.join(sorted(known))})" if known else ""
                raise MmbaseError(
                    f"no sample has the field {name!r} that a filter asks for{nearest(name, known)}{have}"
                )
        raise MmbaseError(f"{message}; loosen them")
    share = f" ({kept / total:.1%})" if total else ""
    return f"{kept:,} of {total:,} samples kept{share}" + (f"; left out: {', '.join(parts)}" if parts else "")
