import json
import re
from html.parser import HTMLParser

import pytest

from mmbase.errors import MmbaseError
from mmbase.evaluation.report import duration, milliseconds, percent, timing_name, write_report
from mmbase.evaluation.suite import EvaluationTask, evaluate

EVIL = "<script>alert('\"&x')</script>"
VOID = {"meta", "link", "img", "br", "path"}


class Page(HTMLParser):
    """Reads the page back: tags must nest, and everything is remembered."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], "", set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.ids |= {value for name, value in attributes if name == "id"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "emoji"
    folder.mkdir()
    lines = [
        {"step": s, "samples": 4 * s, "loss": 3 / s, "logit_scale": 14.0 + s, "time": 0.5 * s} for s in range(1, 60)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    (folder / "config.yaml").write_text(f'seed: 0\nnote: "{EVIL.replace(chr(34), "")}"\n')
    (folder / "environment.json").write_text(json.dumps({"device": EVIL, "versions": {"torch": "2.11.0"}}))
    return folder


@pytest.fixture
def evaluated(model, emoji_samples):
    samples = [dict(sample) for sample in emoji_samples]
    samples[0] = dict(samples[0], caption=EVIL, meta=dict(samples[0]["meta"], group=EVIL))
    model.name = EVIL
    labels = [sample["caption"] for sample in samples]
    tasks = [
        EvaluationTask("a", samples, labels, ["{}", f"{EVIL} {{}}"], ["group"], title=EVIL, description=EVIL),
        EvaluationTask("b", samples, title="Retrieval only"),
    ]
    return evaluate(model, tasks), tasks


SOURCES = [{"name": "Noto", "licence": "Apache-2.0", "source": "https://example.org/noto"},
           {"name": EVIL, "attribution": "© X", "source": "javascript:alert(1)"}]  # fmt: skip


def test_page_is_well_formed_self_contained_and_escaped(run, evaluated):
    results, tasks = evaluated
    text = write_report(run, results, tasks, sources=SOURCES, name=EVIL).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert EVIL not in text
    assert page.text.count("alert(") >= 8  # it is shown, as text
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "data", "action"):
            assert value.startswith("data:image/webp;base64,")
        if name == "href":
            assert value.startswith("#") or (tag, value) in {("link", "data:,"), ("a", "https://example.org/noto")}
    assert not re.search(r"@import|url\(", text)
    links = {value[1:] for tag, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert links == page.ids & links


def test_page_shows_what_was_measured(run, evaluated):
    results, tasks = evaluated
    page = Page(write_report(run, results, tasks, sources=SOURCES, date="2030-01-02").read_text())
    zero_shot = results["tasks"]["a"]["zero_shot"]
    for expected in (
        percent(zero_shot["top1"]),
        percent(zero_shot["top5_chance"]),
        milliseconds(results["latency"]["timings"]["image_batch_32"]["median_ms"]),
        "4,608",
        "2030-01-02",
        "2.11.0",
        "Retrieval only",
        "Apache-2.0",
        "travel-places",
        "Logit scale",
    ):
        assert expected in page.text
    shown = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    right = sum(p["top"][0][0] == p["label"] for p in results["tasks"]["a"]["predictions"])
    # Task a: right and wrong ones, and retrieval (8 queries x 5 + 8); task b: retrieval.
    assert len(shown) == min(right, 16) + 16 + 2 * 48
    assert len(page.text) > 2000


def test_pngs_come_with_it(run, evaluated):
    results, tasks = evaluated
    write_report(run, results, tasks)
    for name in ("report.html", "contact_sheet.png", "curves.png"):
        assert (run / name).stat().st_size > 5000


def test_a_bare_folder_gives_a_report_without_curves(tmp_path, model, emoji_samples):
    task = EvaluationTask("t", emoji_samples, [sample["caption"] for sample in emoji_samples], retrieval=False)
    results = evaluate(model, [task], latency=False)
    page = Page(write_report(tmp_path / "new", results, [task]).read_text())
    assert "training" not in page.ids
    assert "retrieval" not in page.ids
    assert "predictions" in page.ids
    assert not (tmp_path / "new" / "curves.png").exists()


def test_scores_that_are_nan_are_shown_as_such(tmp_path, model, emoji_samples):
    encode = model.encode_image
    model.encode_image = lambda images, batch_size=64: encode(images) * float("nan")
    task = EvaluationTask("t", emoji_samples, [sample["caption"] for sample in emoji_samples])
    page = Page(write_report(tmp_path, evaluate(model, [task], latency=False), [task]).read_text())
    assert "40 pictures had NaN scores" in page.text


def test_tasks_must_be_those_evaluated(tmp_path, evaluated, emoji_samples):
    results, _ = evaluated
    with pytest.raises(MmbaseError, match="no results for task 'other'"):
        write_report(tmp_path, results, [EvaluationTask("other", emoji_samples)])


def test_numbers_as_people_write_them():
    assert [percent(x) for x in (0.0, 0.0021, 0.55, 1.0)] == [
        "0.0\u00a0%",
        "0.21\u00a0%",
        "55.0\u00a0%",
        "100.0\u00a0%",
    ]
    assert percent(None) == percent(float("nan")) == "–"
    assert [milliseconds(x) for x in (0.1239, 3.414, 128.4, 2500.0)] == ["0.124 ms", "3.41 ms", "128 ms", "2,500 ms"]
    assert [duration(x) for x in (0.4, 59.6, 432, 11105)] == ["0 s", "1 min 00 s", "7 min 12 s", "3 h 05 min"]
    assert timing_name("image_batch_8") == "Images, batch of 8"
    assert timing_name("another") == "another"
