"""The text of a training pair: one of several weighted templates over a sample's fields."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmbase.errors import MmbaseError


class CaptionTemplate(BaseModel):
    """One way to word a sample."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field("{caption}", description="text with fields of the sample in braces, e.g. '{caption}'")
    weight: float = Field(1.0, ge=0, description="how often, relative to the other templates")
    most: int = Field(3, ge=1, description="of a field that is a list, at most this many entries, drawn and shuffled")

    @field_validator("template")
    @classmethod
    def _has_field(cls, template: str) -> str:
        if "{" not in template:
            raise ValueError(f"the caption template {template!r} names no field; write for example '{{caption}}'")
        return template


class CaptionSampler:
    """Draws the wording of a sample.

    A template whose fields a sample lacks, or holds empty, is passed over for that sample.
    """

    def __init__(self, templates: list[CaptionTemplate]) -> None:
        if not any(template.weight > 0 for template in templates):
            raise MmbaseError(
                "data.captions has no template of positive weight; add for example {template: '{caption}'}"
            )
        self.templates = templates

    def __call__(self, fields: dict[str, Any], rng: np.random.Generator) -> str:
        """One wording of the sample with these fields; draws from ``rng`` the same number of times for the same fields.

        Raises:
            MmbaseError: none of the templates fits the sample.
        """
        fitting = [t for t in self.templates if t.weight > 0 and self._fits(t.template, fields)]
        if not fitting:
            raise MmbaseError(
                f"no template of data.captions fits a sample with the fields {', '.join(sorted(fields))}; "
                "name one of them in braces"
            )
        weights = np.cumsum([t.weight for t in fitting])
        chosen = fitting[
            int(np.searchsorted(weights, rng.random() * weights[-1], side="right").clip(max=len(fitting) - 1))
        ]
        return chosen.template.format_map({name: _word(value, chosen.most, rng) for name, value in fields.items()})

    @staticmethod
    def _fits(template: str, fields: dict[str, Any]) -> bool:
        try:
            template.format_map({name: value for name, value in fields.items() if value not in (None, "", [])})
        except (KeyError, ValueError, IndexError):
            return False
        return True


def _word(value: Any, most: int, rng: np.random.Generator) -> str:
    if not isinstance(value, list):
        return str(value)
    count = int(rng.integers(1, min(most, len(value)) + 1)) if value else 0
    return ", ".join(str(value[i]) for i in rng.permutation(len(value))[:count])
