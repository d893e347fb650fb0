"""Configurations: every mistake is one line that names the key, the value and the remedy."""

import pytest
import yaml

from mmbase.config import describe_keys, dump, first_difference, load_config, recipes, validate
from mmbase.errors import MmbaseError


def test_recipe_loads_and_its_dump_loads_equal(tmp_path):
    config = load_config("emoji", ["training.steps=50", "seed=7", "training.warmup_steps=10"])
    assert (config.training.steps, config.seed) == (50, 7)
    path = tmp_path / "again.yaml"
    path.write_text(dump(config))
    assert load_config(path) == config


def test_scientific_notation_is_a_number():
    config = load_config("emoji", ["training.learning_rate=1e-3", "training.epsilon=1e-8"])
    assert (config.training.learning_rate, config.training.epsilon) == (1e-3, 1e-8)


def test_override_into_a_list():
    assert load_config("emoji", ["data.captions.1.weight=9"]).data.captions[1].weight == 9


def test_a_name_of_openclip_with_a_change():
    config = load_config("emoji", ["model={name: ViT-B-32, vision: {patch_dropout: 0.5}}"]).model.resolve()
    assert (config.vision.width, config.vision.patch_size, config.vision.patch_dropout) == (768, 32, 0.5)
    assert config.text.vocab_size == 49408


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.setps=3", r"unknown key 'training.setps'; did you mean 'steps'"),
        ("trainig.steps=3", r"unknown key 'trainig'; did you mean 'training'"),
        ("model.vision.widht=3", r"unknown key .*widht'; did you mean 'width'"),
        ("data.captions.0.wieght=3", r"did you mean 'weight'"),
        ("training.steps=many", r"training.steps: .*integer.*'many'"),
        ("training.steps=0", r"training.steps: .*greater than or equal to 1.*0"),
        ("training.precision=fp17", r"training.precision: .*'fp32'.*'fp17'"),
        ("training.warmup_steps=9999", r"warmup_steps=9999 exceeds steps"),
        ("model.vision.heads=5", r"heads=5 does not divide width=256"),
        ("model.name=ViT-B-23", r"ViT-B-32"),
        ("model.name=RN50", r"OpenCLIP's own model"),
        ("data.captions.9.weight=1", r"list of 5"),
        ("seed.x=1", r"seed holds 0"),
        ("steps", r"no override"),
        ("data.captions=[{template: nothing}]", r"names no field"),
        ("training={", r"not valid YAML"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(MmbaseError, match=message) as caught:
        load_config("emoji", [override])
    assert "\n" not in str(caught.value)


def test_missing_recipe_and_missing_key():
    with pytest.raises(MmbaseError, match="no recipe or file 'emojy'; did you mean 'emoji'"):
        load_config("emojy")
    with pytest.raises(MmbaseError, match=r"'data' is missing"):
        validate({"output": "runs/x"})


def test_every_key_has_a_meaning():
    rows = describe_keys()
    assert len(rows) > 80
    assert [name for name, _, meaning in rows if not meaning] == []
    assert {"training.steps", "model.vision.width", "data.holdout.fraction"} <= {name for name, _, _ in rows}


def test_every_recipe_is_valid_and_commented():
    for name, path in recipes().items():
        assert load_config(name).output == f"runs/{name}"
        assert yaml.safe_load(path.read_text())
        assert path.read_text().count("#") >= 5


def test_first_difference():
    assert first_difference({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b"
    assert first_difference({}, {"z": 0}) == "z"
