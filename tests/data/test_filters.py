import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmbase.data.filters import (
    AllOf,
    FieldFilters,
    FilterConfig,
    HeldOut,
    explain_removed,
    find_field,
    parse_filter,
    select,
)
from mmbase.errors import MmbaseError


def reason(fields, **filter):
    return FieldFilters([FilterConfig(**filter)]).reason(fields)


def test_bounds():
    assert reason({"similarity": 0.3}, field="similarity", min=0.28) is None
    assert reason({"similarity": 0.28}, field="similarity", min=0.28) is None
    assert reason({"similarity": 0.2}, field="similarity", min=0.28) == "similarity below 0.28"
    assert reason({"similarity": "0.2"}, field="similarity", min=0.28) == "similarity below 0.28"
    assert reason({"width": 5000}, field="width", max=4096) == "width above 4096"
    assert reason({"similarity": "high"}, field="similarity", min=0.28) == "similarity not a number"
    assert reason({"similarity": True}, field="similarity", min=0.28) == "similarity not a number"


@pytest.mark.parametrize("absent", [{}, {"similarity": None}, {"similarity": ""}, {"similarity": float("nan")}])
def test_missing(absent):
    assert reason(absent, field="similarity", min=0.28) == "similarity missing"
    assert reason(absent, field="similarity", min=0.28, missing="keep") is None


@pytest.mark.parametrize(
    ("name", "fields", "value"),
    [
        ("similarity", {"clip_l14_similarity_score": 0.3}, 0.3),
        ("similarity", {"SIMILARITY": 0.3}, 0.3),
        ("nsfw", {"punsafe": 0.1}, 0.1),
        ("watermark", {"pwatermark": 0.4}, 0.4),
        ("language", {"LANGUAGE": "en"}, "en"),
        ("licence", {"License": "CC0-1.0"}, "CC0-1.0"),
        ("width", {"width": 10, "original_width": 99}, 10),
        ("original_width", {"width": 10, "original_width": 99}, 99),
        ("aspect", {"WIDTH": 100, "HEIGHT": 300}, 3.0),
        ("aspect", {"width": 100, "height": 0}, None),
        ("aspect", {"aspect": 7}, 7),
        ("shorter_side", {"width": 100, "height": 300}, 100),
        ("pixels", {"width": "100", "height": "300"}, 30000),
        ("caption_words", {"caption": "a cat  sits"}, 3),
        ("caption_length", {"TEXT": "a cat"}, 5),
        ("nothing", {"caption": "a"}, None),
    ],
)
def test_usual_and_computed_fields(name, fields, value):
    assert find_field(name, fields) == value


def test_values():
    assert reason({"language": "EN"}, field="language", one_of=["en", "de"]) is None
    assert reason({"language": "fr"}, field="language", one_of=["en", "de"]) == "language not one of en, de"
    assert reason({"language": ["fr", "de"]}, field="language", one_of=["en", "de"]) is None
    assert reason({"status": 2.0}, field="status", one_of=[2]) is None
    assert reason({"status": 0.1234567}, field="status", one_of=[0.1234568]) is not None
    assert reason({"nsfw": "NSFW"}, field="nsfw", none_of=["nsfw", "unsure"]) == "nsfw one of nsfw, unsure"
    assert reason({"licence": "CC-BY-4.0"}, field="licence", matches="^cc-by") is None
    assert reason({"licence": "GPL"}, field="licence", matches="^cc-by") == "licence does not match ^cc-by"


def test_the_first_failed_requirement_counts():
    filters = FieldFilters([FilterConfig(field="width", min=200), FilterConfig(field="language", one_of=["en"])])
    assert filters.reason({"width": 100, "language": "de"}) == "width below 200"
    assert filters.reason({"width": 300, "language": "de"}) == "language not one of en"
    assert filters.reason({"width": 300, "language": "en"}) is None


def test_digest_names_the_decision():
    one, same = (FieldFilters([FilterConfig(field="width", min=200)]) for _ in range(2))
    assert one.digest == same.digest != FieldFilters([FilterConfig(field="width", min=201)]).digest
    assert HeldOut("a", ["x", "y"]).digest == HeldOut("a", ["y", "x"]).digest != HeldOut("b", ["y", "x"]).digest
    assert AllOf([one, HeldOut("a", ["x"])]).digest != AllOf([HeldOut("a", ["x"]), one]).digest


def test_selections_combine():
    held_out = HeldOut("unicode", {"1F600"})
    assert select([]) is None and select([], None) is None
    assert select([], held_out) is held_out
    both = select([FilterConfig(field="width", min=200)], held_out)
    assert both is not None
    assert both.reason({"width": 300, "unicode": "1F600"}) == "held out"
    assert both.reason({"width": 100, "unicode": "1F600"}) == "width below 200"
    assert both.reason({"width": 300, "unicode": "1F601"}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("similarity>=0.28", {"field": "similarity", "min": 0.28}),
        ("aspect <= 3", {"field": "aspect", "max": 3}),
        ("language=en,de", {"field": "language", "one_of": ["en", "de"]}),
        ("licence != unknown", {"field": "licence", "none_of": ["unknown"]}),
        ("caption~a=b", {"field": "caption", "matches": "a=b"}),
        ("similarity?>=0.28", {"field": "similarity", "min": 0.28, "missing": "keep"}),
    ],
)
def test_filters_of_a_command_line(text, expected):
    assert parse_filter(text) == FilterConfig(**expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("similarity", "is no filter"),
        ("similarity>=high", "'high' in the filter"),
        ("caption~(", "no regular expression"),
        ("language=,", "empty list"),
        (">=3", "is no filter"),
    ],
)
def test_bad_filters_of_a_command_line(text, message):
    with pytest.raises(MmbaseError, match=message) as caught:
        parse_filter(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"field": "width"}, "asks nothing"),
        ({"field": " ", "min": 1}, "names no field"),
        ({"field": "width", "min": 3, "max": 2}, "min=3 is above max=2"),
        ({"field": "width", "min": float("nan")}, "not finite"),
        ({"field": "language", "one_of": []}, "empty list"),
        ({"field": "language", "one_of": ["en", False]}, "quote it"),
        ({"field": "language", "matches": "("}, "regular expression"),
        ({"field": "language", "max": 1, "missing": "maybe"}, "drop"),
        ({"field": "language", "maximum": 1}, "maximum"),
    ],
)
def test_bad_configs(filter, message):
    with pytest.raises(ValidationError, match=message):
        FilterConfig(**filter)


def test_explanation():
    line = explain_removed({"width below 200": 30, "language missing": 70}, 900)
    assert line == "900 of 1,000 samples kept (90.0%); left out: 70 language missing, 30 width below 200"
    assert explain_removed({}, 5) == "5 of 5 samples kept (100.0%)"
    with pytest.raises(MmbaseError, match=r"did you mean 'similarity'.*fields: caption, similarity"):
        explain_removed({"similarty missing": 10}, 0, ["caption", "similarity"])
    with pytest.raises(MmbaseError, match="leave none of 10 samples: 10 width below 9; loosen"):
        explain_removed({"width below 9": 10}, 0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["width", "HEIGHT", "similarity", "lang", "caption", "x"]), json_values))
def test_any_fields_get_a_short_answer_of_few_kinds(fields):
    asked = [("aspect", {"max": 3.0}), ("similarity", {"min": 0.2}), ("language", {"one_of": ["en", 1]}),
             ("caption", {"matches": "cat"}), ("caption_words", {"min": 2}), ("x", {"none_of": [True]})]  # fmt: skip
    for name, condition in asked:
        answer = reason(fields, field=name, **condition)
        assert answer is None or answer.startswith(name)
        json.dumps(answer)
