"""Datasheets: what they say, how they are read, and the provenance that follows from them."""

import json
import tarfile

import pytest

from mmbase.data.datasheet import (
    Datasheet,
    DataSource,
    ShardFacts,
    provenance_of,
    read_datasheet,
    render_datasheet,
    without_licence,
    write_datasheet,
)
from mmbase.data.datasheet_scan import describe_shards, index_shards, local_tars, scan_shards
from mmbase.data.shards import Shards, expand_shards
from mmbase.data.statistics import Statistics, quantiles
from mmbase.errors import MmbaseError


def sheet(**changes):
    values = {
        "name": "two | vendors",
        "sources": [
            DataSource(name="a", licence="MIT", shards=["a-*.tar"]),
            DataSource(name="b", licence="CC-BY-4.0", attribution="© <b>", shards=["b-*.tar"]),
        ],
        "shards": {
            "a-0.tar": ShardFacts(samples=3),
            "a-1.tar": ShardFacts(samples=4),
            "b-0.tar": ShardFacts(samples=5),
        },
    }
    return Datasheet(**{**values, **changes})


def test_the_embedded_emoji_tell_their_licences():
    rows = provenance_of(expand_shards(["emoji:noto-{000..001}.tar", "emoji:fluentflat-000.tar"]))
    assert [(row["name"], row["licence"], row["pictures"]) for row in rows] == [
        ("noto", "Apache-2.0", 1906), ("fluentflat", "MIT", 797),
    ]  # fmt: skip
    assert "© Google" in rows[0]["attribution"] and not without_licence(rows)
    found = read_datasheet(expand_shards("emoji:")[0].rpartition("/")[0])
    scanned, statistics = scan_shards([*map(_path, expand_shards("emoji:"))])
    assert found.shards == {shard.path.name: shard.facts for shard in scanned}, "the shipped shards are those described"
    assert found.statistics == statistics.summary()


def _path(name):
    return local_tars(name, "a test")[0]


def test_written_and_read_again(tmp_path):
    written = write_datasheet(sheet(), tmp_path)
    assert [path.name for path in written] == ["datasheet.json", "DATASHEET.md"]
    assert read_datasheet(tmp_path) == sheet()
    before = written[0].read_bytes(), written[1].read_bytes()
    write_datasheet(sheet(), tmp_path)
    assert (written[0].read_bytes(), written[1].read_bytes()) == before
    written[1].write_text("# By hand")
    assert [path.name for path in write_datasheet(sheet(name="new"), tmp_path)] == ["datasheet.json"]
    assert written[1].read_text() == "# By hand"
    assert read_datasheet(tmp_path / "nowhere") is None


def test_markdown_keeps_its_tables():
    statistics = Statistics()
    statistics.add(
        extension="jpeg", size=1234, width=10, height=20, caption="a | b", fields={"x|y": 1, "licence": "CC0"}
    )
    text = render_datasheet(sheet(statistics=statistics.summary(), removed={"no | caption": 3}))
    assert "# two \\| vendors" in text and "© &lt;b&gt;" in text and "12 image-text pairs in 3 shards" in text
    assert "| no \\| caption | 3 |" in text and "| x\\|y | 1 |" in text and "| CC0 | 1 |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
    assert "unknown" in render_datasheet(Datasheet(name="x"))


@pytest.mark.parametrize("content", ["{", "[]", '{"name": 3}', '{"name": "x", "shards": {"a": {"samples": -1}}}'])
def test_a_broken_datasheet_is_named(tmp_path, content):
    (tmp_path / "datasheet.json").write_text(content)
    with pytest.raises(MmbaseError, match="is no datasheet") as caught:
        provenance_of([str(tmp_path / "0.tar")])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_provenance(tmp_path):
    write_datasheet(sheet(), tmp_path / "one")
    write_datasheet(Datasheet(name="plain", shards={"0.tar": ShardFacts(samples=7)}), tmp_path / "two")
    rows = provenance_of([f"{tmp_path}/one/a-0.tar", f"{tmp_path}/one/a-1.tar", f"file:{tmp_path}/two/0.tar"])
    assert [(row["name"], row["licence"], row.get("pictures")) for row in rows] == [
        ("a", "MIT", 7), ("plain", "unknown", 7),
    ]  # fmt: skip
    assert rows[0]["datasheet"] == sheet().digest
    rows = provenance_of([f"{tmp_path}/one/c-0.tar", f"{tmp_path}/three/0.tar", "pipe:cat /x/0.tar"])
    assert all(row["licence"] == "unknown" for row in rows) and len(without_licence(rows)) == 3


def test_provenance_of_a_server(tmp_path):
    import functools
    import http.server
    import threading

    write_datasheet(sheet(), tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        (row,) = provenance_of([f"{base}/a-0.tar?signature=1"])
        assert row["licence"] == "MIT"
        assert provenance_of([f"{base}/elsewhere/a-0.tar"])[0]["licence"] == "unknown"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_sources_that_share_shards_are_not_counted():
    mixed = sheet(sources=[DataSource(name="a", licence="MIT"), DataSource(name="b", licence="CC0-1.0")])
    from mmbase.data.datasheet import _rows_of

    assert [row.get("pictures") for row in _rows_of(mixed, ["a-0.tar"])] == [None, None]


def test_scan_is_the_same_for_any_number_of_threads(shapes):
    paths = local_tars(str(shapes), "a test")
    one, four = (scan_shards(paths, workers=workers) for workers in (1, 4))
    assert one[0] == four[0] and one[1].summary() == four[1].summary()
    assert one[1].samples == 36 and one[1].summary()["width"]["max"] == 32
    assert [shard.facts.samples for shard in one[0]] == [12, 12, 12]


def test_card_keeps_what_was_said(shapes, tmp_path):
    for path in shapes.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    paths = local_tars(str(tmp_path), "a test")
    first, _ = describe_shards(paths, tmp_path, {"licence": "MIT", "source": "drawn"}, description="Shapes.")
    assert first.sources == [DataSource(name=tmp_path.name, source="drawn", licence="MIT")] and first.samples == 36
    second, _ = describe_shards(paths, tmp_path, {"name": "shapes", "attribution": "me"})
    assert second.description == "Shapes." and second.name == "shapes"
    assert second.sources[0].model_dump(exclude={"shards"}) == {
        "name": "shapes", "source": "drawn", "licence": "MIT", "attribution": "me",
    }  # fmt: skip
    with pytest.raises(MmbaseError, match=r"other shards too.*--output"):
        describe_shards(paths[:1], tmp_path, {})
    write_datasheet(sheet(), tmp_path)
    with pytest.raises(MmbaseError, match="names 2 sources; change their licence in that file"):
        describe_shards(paths, tmp_path, {"licence": "MIT"})
    assert len(describe_shards(paths, tmp_path, {})[0].sources) == 2


def test_index(shapes, tmp_path):
    for path in shapes.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sizes.json").write_text('{"vendor-0.tar": 99, "gone.tar": 5}')
    scanned = index_shards(local_tars(str(tmp_path), "a test"))
    assert json.loads((tmp_path / "sizes.json").read_text()) == {
        "gone.tar": 5, "vendor-0.tar": 12, "vendor-1.tar": 12, "vendor-2.tar": 12,
    }  # fmt: skip
    assert all(not shard.faults and shard.damage is None for shard in scanned)
    assert Shards.open(str(tmp_path)).sizes.tolist() == [12, 12, 12]
    whole = (tmp_path / "vendor-1.tar").read_bytes()
    (tmp_path / "vendor-1.tar").write_bytes(whole[:5000])
    assert "cut off" in index_shards([tmp_path / "vendor-1.tar"])[0].damage
    (tmp_path / "sizes.json").write_text("[1]")
    with pytest.raises(MmbaseError, match="no table of sizes"):
        index_shards(local_tars(str(tmp_path), "a test"))


def test_faults_are_counted_and_the_rest_is_described(shapes, tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(shapes / "vendor-0.tar") as source, tarfile.open(path, "w") as target:
        for number, member in enumerate(source.getmembers()):
            data = source.extractfile(member).read()
            if number == 0:
                data = b"no picture"
            elif number == 3:
                data = b"{"
            member.size = len(data)
            target.addfile(member, __import__("io").BytesIO(data))
    (shard,), statistics = scan_shards([path])
    assert statistics.samples == 10 and sum(shard.faults.values()) == 2 and shard.facts.samples == 12


@pytest.mark.parametrize(
    ("spec", "message"),
    [("https://example.com/0.tar", "reads local shards"), ("nowhere.tar", "there is no shard")],
)
def test_shards_that_cannot_be_described(spec, message):
    with pytest.raises(MmbaseError, match=message):
        local_tars(spec, "mmbase data card")


def test_quantiles_against_a_list():
    values = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    counted = {value: values.count(value) for value in values}
    assert quantiles(counted) == {"min": 1, "p5": 1, "median": 4, "mean": 4.0, "p95": 9, "max": 9}
    assert quantiles({7: 1}) == {"min": 7, "p5": 7, "median": 7, "mean": 7.0, "p95": 7, "max": 7}


def test_statistics_survive_their_state():
    statistics = Statistics()
    for i in range(1500):
        statistics.add(extension="png", size=i, width=i, height=3, caption="x " * i, fields={f"f{i}": 1, "LANG": "en"})
    again = Statistics.restored(json.loads(json.dumps(statistics.state())))
    assert again.summary() == statistics.summary()
    assert statistics.summary()["field"]["(others)"] > 500 and statistics.summary()["language"] == {"en": 1500}
