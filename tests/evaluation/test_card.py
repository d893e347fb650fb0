import json

import pytest
import yaml
from huggingface_hub import ModelCard

from mmbase.errors import MmbaseError
from mmbase.evaluation.card import write_model_card
from mmbase.evaluation.suite import EvaluationTask, evaluate

SOURCES = [
    {"name": "Noto | Emoji", "licence": "Apache-2.0", "attribution": "Noto <b>Emoji</b>\n© Google"},
    {"name": "Twemoji", "licence": "CC-BY-4.0", "attribution": "Twemoji © Twitter", "samples": 1906},
]


@pytest.fixture
def results(model, emoji_samples):
    labels = [sample["caption"] for sample in emoji_samples]
    return evaluate(model, [EvaluationTask("fxemoji", emoji_samples, labels, title="FxEmoji: a vendor")])


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "emoji"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 800, "samples": 204800, "time": 432.0}\n')
    (folder / "config.yaml").write_text("seed: 0\ntraining:\n  steps: 800\n")
    environment = {"device": "cpu", "device_name": "A laptop", "versions": {"torch": "2.11.0"}, "commit": "abc123"}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_front_matter_is_what_the_hub_reads(run, results):
    path = write_model_card(run, results, licence="apache-2.0", tags=["emoji"], datasets=["emoji"])
    assert path == run / "README.md"
    data = ModelCard(path.read_text()).data
    assert data.license == "apache-2.0"
    assert data.library_name == "mmbase"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.datasets == ["emoji"]
    assert "emoji" in data.tags
    by_name = {result.metric_name: result for result in data.eval_results}
    expected = round(100 * results["tasks"]["fxemoji"]["zero_shot"]["top5"], 2)
    assert by_name["zero-shot top-5"].metric_value == expected
    assert by_name["zero-shot top-5"].dataset_name == "FxEmoji: a vendor"


def test_card_tells_use_data_results_and_environment(run, results):
    text = write_model_card(run, results, sources=SOURCES, location="runs/emoji").read_text()
    for expected in (
        'mmbase.load("runs/emoji")',
        "## Intended use",
        "## Limits",
        "CC-BY-4.0",
        "Twemoji © Twitter",
        "7 min 12 s (432 s)",
        "204,800",
        "A laptop",
        "2.11.0",
        "abc123",
        "Configuration (SHA-256)",
        "steps: 800",
        "FxEmoji: a vendor",
        "picture to text",
    ):
        assert expected in text
    assert "contact_sheet.png" not in text
    (run / "contact_sheet.png").write_bytes(b"")
    assert "![contact sheet](contact_sheet.png)" in write_model_card(run, results).read_text()


def test_tables_stay_tables_whatever_the_cells_hold(run, results):
    text = write_model_card(run, results, sources=SOURCES).read_text()
    rows = [line for line in text.split("## Data")[1].splitlines() if line.startswith("|")][:4]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}
    assert "Noto \\| Emoji" in rows[2]
    assert "Noto &lt;b&gt;Emoji&lt;/b&gt; © Google" in rows[2]


def test_front_matter_survives_strange_names(run, results):
    text = write_model_card(run, results, name='a: "b" # c\n---', datasets=["x: y"]).read_text()
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front["datasets"] == ["x: y"]
    assert front["model-index"][0]["name"] == 'a: "b" # c\n---'


def test_a_licence_is_needed(run, results):
    with pytest.raises(MmbaseError, match="no licence"):
        write_model_card(run, results, licence="")
    assert not (run / "README.md").exists()
