"""Where training meets the data: streamed runs, what they write down, and what a resume may change."""

import io
import json
import tarfile

import pytest
from rich.console import Console

import mmbase
from mmbase.errors import MmbaseError
from mmbase.training.checkpoint import Checkpointer

STREAMED = ["data.memory=never", "evaluation.tasks=[]", "training.steps=12", "training.warmup_steps=1"]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_after(steps, monkeypatch):
    """Interrupt training when the checkpoint after so many steps is written."""
    real = Checkpointer.save

    def save(self, state, progress, score=None):
        real(self, state, progress, score)
        if progress.step == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save", save)


def test_a_resume_may_change_workers_and_gives_the_same_bits(recipe, tmp_path, monkeypatch):
    whole = mmbase.train(recipe, f"output={tmp_path / 'whole'}", *STREAMED)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            mmbase.train(recipe, f"output={tmp_path / 'split'}", *STREAMED)
    split = mmbase.train(recipe, f"output={tmp_path / 'split'}", *STREAMED, "data.workers=2", "data.prefetch=3")
    assert (whole / "model.safetensors").read_bytes() == (split / "model.safetensors").read_bytes()
    stages = {"data_read", "data_decode", "data_tokenise", "data_collate", "data_wait", "data_bad"}
    assert all(stages <= set(row) and row["data_bad"] == 0 for row in rows(split))


def test_bad_samples_are_counted_and_kept_in_the_runs_folder(recipe, shapes, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, data in (("bad.png", b"no picture"), ("bad.json", b'{"caption": "bad", "unicode": "bad"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards = f"data.shards=[{shapes / 'vendor-0.tar'}, {shapes / 'vendor-1.tar'}, {tmp_path / 'bad.tar'}]"
    run = mmbase.train(recipe, *STREAMED, shards, "data.max_bad_share=0.5", "data.holdout=null")
    told = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in told] == ["bad"] and "not a picture" in told[0]["reason"]
    assert rows(run)[-1]["data_bad"] >= 3
    assert sum(json.loads((run / "environment.json").read_text())["bad_samples"].values()) >= 3
    strict = [f"output={tmp_path / 'strict'}", "data.errors=raise", "data.holdout=null"]
    with pytest.raises(MmbaseError, match=r"sample 'bad' of '.*bad.tar'"):
        mmbase.train(recipe, *STREAMED, shards, *strict)


def test_other_shards_are_not_resumed_into(recipe, shapes, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for vendor in range(2):
        (tmp_path / "data" / f"{vendor}.tar").write_bytes((shapes / f"vendor-{vendor}.tar").read_bytes())
    options = [*STREAMED, f"data.shards={tmp_path / 'data'}", "data.holdout=null"]
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            mmbase.train(recipe, *options)
    (tmp_path / "data" / "2.tar").write_bytes((shapes / "vendor-2.tar").read_bytes())
    with pytest.raises(MmbaseError, match=r"24 samples then, 36 now.*restore them"):
        mmbase.train(recipe, *options)
    (tmp_path / "data" / "2.tar").unlink()
    mmbase.train(recipe, *options)


def test_a_mixture_with_weights_that_change_and_captions_of_several_fields(recipe, shapes, tmp_path):
    parts = [
        {"shards": str(shapes / "vendor-0.tar"), "weight": [[0.0, 1.0], [0.5, 0.0]]},
        {"shards": [str(shapes / "vendor-1.tar")], "weight": [[0.0, 0.0], [0.5, 1.0]]},
    ]
    captions = [{"field": "caption", "weight": 0.7}, {"field": "keywords", "weight": 0.3}]
    output = io.StringIO()
    run = mmbase.train(
        recipe,
        *STREAMED,
        "data.shards=[]",
        f"data.mixture={json.dumps(parts)}",
        f"data.captions={json.dumps(captions)}",
        "data.filters=[{field: group, none_of: [bar]}]",
        "data.holdout=null",
        console=Console(file=output, width=200),
    )
    assert (run / "model.safetensors").exists()
    told = output.getvalue()
    assert "mixture: 8 samples weighted" in told and "group one of bar" in told and "order: exact" in told
