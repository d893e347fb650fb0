"""The text of a training pair: one of several weighted templates over a sample's fields."""

from __future__ import annotations

import bisect
import itertools
import string
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmbase.errors import MmbaseError

_EMPTY = (None, "", [])


class CaptionTemplate(BaseModel):
    """One way to word a sample."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field("{caption}", description="text with fields of the sample in braces, e.g. '{caption}'")
    field: str | None = Field(
        None,
        description="instead of a template: a field as it is, 'txt' for the .txt member; of a list, one entry drawn",
    )
    weight: float = Field(1.0, ge=0, description="how often, relative to the other templates")
    most: int = Field(3, ge=1, description="of a field that is a list, at most this many entries, drawn and shuffled")

    @field_validator("template")
    @classmethod
    def _has_field(cls, template: str) -> str:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        except ValueError as error:
            raise ValueError(f"the caption template {template!r} is malformed: {error}") from error
        if not names:
            raise ValueError(f"the caption template {template!r} names no field; write for example '{{caption}}'")
        return template

    @model_validator(mode="after")
    def _one_way(self) -> CaptionTemplate:
        if self.field is not None and self.template != "{caption}":
            raise ValueError(f"give a template or a field, not both: {self.template!r} and {self.field!r}")
        return self


class CaptionSampler:
    """Draws the wording of a sample.

    A template whose fields a sample lacks, or holds empty, is passed over for that sample.
    """

    def __init__(self, templates: list[CaptionTemplate]) -> None:
        self.templates = [template for template in templates if template.weight > 0]
        if not self.templates:
            raise MmbaseError(
                "data.captions has no template of positive weight; add for example {template: '{caption}'}"
            )
        self._names = [_fields_named(template) for template in self.templates]
        self.needs_caption = all({"caption", "txt"} & set(names) for names in self._names)
        """whether no wording does without the caption"""

    def __call__(self, fields: dict[str, Any], rng: np.random.Generator) -> str:
        """One wording of the sample with these fields; draws from ``rng`` the same number of times for the same fields.

        Raises:
            MmbaseError: none of the templates fits the sample.
        """
        fitting = [i for i, names in enumerate(self._names) if all(_field(n, fields) not in _EMPTY for n in names)]
        while fitting:
            totals = list(itertools.accumulate(self.templates[i].weight for i in fitting))
            # one template asks for no draw: most datasets have one caption
            drawn = bisect.bisect_right(totals, rng.random() * totals[-1]) if len(fitting) > 1 else 0
            chosen = fitting[min(drawn, len(fitting) - 1)]
            try:
                return self._worded(chosen, fields, rng)
            except (KeyError, ValueError, IndexError, AttributeError, TypeError):
                fitting.remove(chosen)  # such as {caption.length}
        raise MmbaseError(
            f"no template of data.captions fits a sample with the fields {', '.join(sorted(fields))}; "
            "name one of them in braces"
        )

    def _worded(self, chosen: int, fields: dict[str, Any], rng: np.random.Generator) -> str:
        template, names = self.templates[chosen], self._names[chosen]
        if template.field is not None:
            value = _field(template.field, fields)
            return str(value[int(rng.integers(len(value)))] if isinstance(value, list) else value)
        words = {name: _word(fields[name], template.most, rng) for name in names}
        return template.template.format_map(words)


def _fields_named(template: CaptionTemplate) -> tuple[str, ...]:
    """The fields of a sample that a template needs, each once."""
    if template.field is not None:
        return (template.field,)
    named = (name for _, name, _, _ in string.Formatter().parse(template.template) if name is not None)
    return tuple(dict.fromkeys(name.partition(".")[0].partition("[")[0] for name in named))


def _field(name: str, fields: dict[str, Any]) -> Any:
    return fields.get("caption") if name == "txt" and name not in fields else fields.get(name)


def _word(value: Any, most: int, rng: np.random.Generator) -> str:
    if not isinstance(value, list):
        return str(value)
    count = int(rng.integers(1, min(most, len(value)) + 1)) if value else 0
    return ", ".join(str(value[i]) for i in rng.permutation(len(value))[:count])
