"""The configuration of a run: assembled from the components' own, read from YAML, overridden, validated, dumped.

Torch-free, so that a misspelt key is answered at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmbase.data.augment_config import AugmentConfig
from mmbase.data.config import DataConfig
from mmbase.data.image import PreprocessConfig
from mmbase.errors import MmbaseError, nearest
from mmbase.evaluation.config import EvaluationConfig
from mmbase.models.config import CLIPConfig
from mmbase.training.config import TrainingConfig
from mmbase.training.tracking_config import TrackingConfig


class ModelConfig(BaseModel):
    """Which towers: a name of OpenCLIP's, our own fields, or a name with some fields replaced."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="an OpenCLIP name such as ViT-B-32; null: the fields below")
    pretrained: str | None = Field(None, description="starting weights: a tag of OpenCLIP or a file; null: random")
    embed_dim: int | None = Field(None, ge=1, description="width of the shared space")
    vision: dict[str, Any] = Field(default_factory=dict, description="image tower: fields of VisionConfig")
    text: dict[str, Any] = Field(default_factory=dict, description="text tower: fields of TextConfig")
    init_logit_scale: float | None = Field(None, description="log of the first logit scale; null: log(1/0.07)")
    init_logit_bias: float | None = Field(None, description="first logit bias (sigmoid loss: -10); null: no bias")

    def resolve(self) -> CLIPConfig:
        """The complete model configuration.

        Raises:
            MmbaseError: an unknown name, or a name that runs through OpenCLIP's own model and so takes no fields.
        """
        base: dict[str, Any] = {}
        if self.name:
            from mmbase.models.zoo import config_of

            named = config_of(self.name)
            if named is None:
                raise MmbaseError(
                    f"model.name={self.name!r} runs through OpenCLIP's own model, which mmbase does not train yet; "
                    "`mmbase models` lists the native ones"
                )
            base = named.model_dump()
        own = self.model_dump(exclude={"name", "pretrained"}, exclude_none=True)
        return CLIPConfig.model_validate(merge(base, own))


class TokenizerConfig(BaseModel):
    """How text becomes numbers; further keys go to the tokenizer of that kind."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["clip", "hf", "file", "learned"] = Field(
        "clip", description="clip: OpenCLIP's BPE; hf: Hugging Face; file: a tokenizer.json; learned: from the captions"
    )


class RunConfig(BaseModel):
    """Everything a run is made of."""

    model_config = ConfigDict(extra="forbid")

    output: str = Field("runs/run", description="the run's folder; the same folder resumes")
    seed: int = Field(0, ge=0, description="of weights, order and augmentation")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    devices: int | Literal["auto"] | None = Field(
        None,
        description="processes to start on this machine; auto: one per GPU; null: one, or those of a launcher",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the towers")
    preprocess: PreprocessConfig = Field(
        default_factory=PreprocessConfig, description="pixels to tensors, training and use; the size is the model's"
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="text to token ids")
    data: DataConfig = Field(description="what is trained on")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="how pictures are varied")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="loop, optimiser, schedule")
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="where numbers go, beside metrics.jsonl"
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is measured at the end")

    @model_validator(mode="after")
    def _model_is_complete(self) -> RunConfig:
        self.model.resolve()
        return self


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``over`` on top, mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everyone expects; YAML 1.1 wants 1.0e-3."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
# Integers are tried first, so that 12 stays whole.
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _resolvers.sort(key=lambda pair: pair[0] == "tag:yaml.org,2002:float")


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document; ``source`` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise MmbaseError(f"{source} is not valid YAML{place}: {getattr(error, 'problem', None) or error}") from error


def recipes() -> dict[str, Path]:
    """The recipes that come with mmbase, by name."""
    here = Path(__file__).parent
    # In a checkout (and an editable install) configs/ lies beside the package; in a wheel inside it.
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a recipe's name or a YAML file, with ``key=value`` overrides on top.

    Raises:
        MmbaseError: an unknown recipe, a missing file, bad YAML, an unknown key (with the nearest), a wrong value.
    """
    path = Path(source)
    known = recipes()
    if str(source) in known:
        path = known[str(source)]
    elif not path.is_file():
        raise MmbaseError(
            f"there is no recipe or file {str(source)!r}{nearest(str(source), known) or ''} "
            f"(recipes: {', '.join(known)}; or give a .yaml file)"
        )
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise MmbaseError(f"{str(path)!r} must hold a mapping of keys to values, not {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(values)


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one ``a.b.c=value`` into nested mappings and lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MmbaseError(f"{override!r} is no override; write key=value, such as training.steps=50")
    parts = key.strip().split(".")
    place: Any = values
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise MmbaseError(
                    f"{key!r}: {'.'.join(parts[:position])} is a list of {len(place)}; use 0 to {len(place) - 1}"
                )
            part = int(part)
        elif not isinstance(place, dict):
            raise MmbaseError(f"{key!r}: {'.'.join(parts[:position])} holds {place!r} and has no keys below it")
        if last:
            place[part] = parse_yaml(text, override)
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            place = place[part]


def validate(values: Mapping[str, Any]) -> RunConfig:
    """The validated configuration; the first mistake as one line.

    Raises:
        MmbaseError: names the key, the value and what would do.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise MmbaseError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if where and where[0] not in RunConfig.model_fields and where[0] in CLIPConfig.model_fields:
        where = ["model", *where]  # found when the towers were put together
    key = ".".join(where)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(RunConfig, where[:-1])
        prefix = ".".join(where[:-1])
        close = nearest(where[-1], fields)
        return f"unknown key {key!r}{close or ''} (keys{' of ' + prefix if prefix else ''}: {', '.join(fields)})"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; add it to the YAML file or give {key}=..."
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first.get("input"), dict | list) else f" (given: {first.get('input')!r})"
    return f"{key}: {message[0].lower()}{message[1:]}{value}" if key else message


def _fields_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Field names of the config that lies at ``path`` below ``model``."""
    for part in path:
        if part.isdigit():
            continue
        nested = _nested(model, part)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _nested(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The config class of a field, or None; a run's model takes the fields of the towers."""
    if model is ModelConfig and name in ("vision", "text"):
        model = CLIPConfig
    field = model.model_fields.get(name)
    types = _leaf_types(field.annotation) if field else []
    return next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _leaf_types(annotation: Any) -> list[Any]:
    parts = get_args(annotation)
    return [leaf for part in parts for leaf in _leaf_types(part)] if parts else [annotation]


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML: every key, in the order of the classes."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> str | None:
    """The dotted name of the first key at which two nested mappings differ, or None."""
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = first_difference(a, b, f"{prefix}{key}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{key}"
    return None


def describe_keys() -> list[tuple[str, str, str]]:
    """Every key of a run: dotted name, default, meaning."""
    return _describe(RunConfig, "")


def _describe(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else "" if field.default_factory else json.dumps(field.default)
        rows.append((prefix + name, default, field.description or ""))
        nested = _nested(model, name)
        if nested:
            rows.extend(_describe(nested, f"{prefix}{name}."))
    return rows
