import json

import pytest

from mmbase.errors import MmbaseError
from mmbase.evaluation.facts import config_hash, gather_facts, source_table
from mmbase.evaluation.run_folder import read_config, read_environment, read_history, to_json


def test_json_has_no_nan():
    text = to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("é", True)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": ["é", True]}
    assert "é" in text


def test_history_survives_torn_lines_and_resumes(tmp_path):
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.0, "time": 1.0}',
        "",
        "[1, 2]",
        '{"loss": 9.0}',
        '{"step": 2, "loss": 1.5}',
        '{"step": 3, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_history(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5, "time": 1.0}]
    assert read_history(tmp_path / "elsewhere") == []


def test_config_and_environment(tmp_path):
    assert read_config(tmp_path) == {} == read_environment(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    (tmp_path / "environment.json").write_text('{"versions": {"torch": "2.11"}}')
    assert read_config(tmp_path) == {"seed": 3}
    assert read_environment(tmp_path) == {"versions": {"torch": "2.11"}}
    (tmp_path / "config.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(MmbaseError, match=r"config\.yaml") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_facts_come_from_the_files_and_may_be_overridden(tmp_path):
    run = tmp_path / "emoji"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5, "samples": 40, "time": 2.5}\n{"step": 6, "loss": 1.0}\n')
    (run / "environment.json").write_text('{"device": "cpu", "versions": {"torch": "2.11", "mmbase": null}}')
    facts = gather_facts(run, config={"seed": 1}, date="today")
    assert (facts.name, facts.date, facts.steps, facts.samples, facts.seconds) == ("emoji", "today", 6, 40, 2.5)
    assert facts.find("torch") == "2.11"
    assert facts.find("gpu", "device") == "cpu"
    assert facts.find("mmbase") == ""
    assert gather_facts(run, environment={"training_seconds": 9.0}).seconds == 9.0


def test_provenance_leaves_out_columns_that_nobody_fills():
    sources = [{"name": "a", "url": None, "note": ""}, {"name": "b", "pictures": 0, "url": None}]
    assert source_table(sources) == (["name", "pictures"], [["a", ""], ["b", 0]])
    assert source_table([]) == ([], [])


def test_config_hash_ignores_the_order_of_keys():
    assert config_hash({"a": 1, "b": {"c": 2}}) == config_hash({"b": {"c": 2}, "a": 1}) != config_hash({"a": 2})
