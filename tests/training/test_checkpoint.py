"""When checkpoints are written, which stay, what they hold, and where copies go."""

import json
import random
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

import mmbase.training.checkpoint as checkpoint
from mmbase.errors import MmbaseError
from mmbase.training.checkpoint import Checkpointer, Progress
from mmbase.training.checkpoint_config import CheckpointConfig
from mmbase.training.checkpoint_state import TrainState, random_state, restore_random_state
from mmbase.training.checkpoint_store import Entry, Store, Torn, decode, encode, kept, read_entry, verify
from mmbase.training.distributed import Ranks

CPU = torch.device("cpu")


def entry(step, samples=None, score=None):
    return Entry(step, 10 * step if samples is None else samples, 1.5, 1, score, {"model.safetensors": (3, "ab")})


def small_run(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**seed))


def checkpointer(folder, lines=None, **policy):
    return Checkpointer(folder, Ranks(), CheckpointConfig(**policy), (lines if lines is not None else []).append)


# ----------------------------------------------------------------------------------------------------------- the store


def test_which_checkpoints_stay():
    entries = [
        entry(step, score=score) for step, score in [(1, 0.2), (2, 0.9), (3, None), (4, 0.9), (5, 0.1), (6, None)]
    ]

    def steps(**policy):
        return [e.step for e in kept(entries, CheckpointConfig(**policy))]

    assert steps(keep_last=1, keep_best=0) == [6]
    assert steps(keep_last=2, keep_best=1) == [2, 5, 6], "of equal scores the earlier"
    assert steps(keep_last=1, keep_best=2) == [2, 4, 6]
    assert steps(keep_last=1, keep_best=0, keep_every=20) == [2, 4, 6], "samples 20, 40 and 60"
    assert steps(keep_last=1, keep_best=0, keep_every=35) == [4, 6], "the first at or past 35 samples"
    # Removing what does not stay changes nothing about what does.
    again = kept(kept(entries, CheckpointConfig(keep_every=20)), CheckpointConfig(keep_every=20))
    assert again == kept(entries, CheckpointConfig(keep_every=20))


def test_a_manifest_says_itself_whether_it_is_whole():
    manifest = encode(entry(7, score=0.25))
    assert decode(manifest) == entry(7, score=0.25)
    for place in range(0, len(manifest), 7):
        altered = bytearray(manifest)
        altered[place] ^= 1
        if json_equal(altered, manifest):
            continue  # white space
        with pytest.raises(Torn):
            decode(bytes(altered))
    with pytest.raises(Torn, match="cannot be read"):
        decode(manifest[:40])


def json_equal(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_a_checkpoint_under_another_name_or_without_manifest_is_none(tmp_path):
    with checkpointer(tmp_path) as saver:
        saver.save(small_run(), Progress(3, 30))
        saver.finish()
    path = tmp_path / "00000003"
    assert verify(path).samples == 30
    path.rename(tmp_path / "00000004")
    with pytest.raises(Torn, match="is that of step 3"):
        verify(tmp_path / "00000004")
    (tmp_path / "00000005").mkdir()
    with pytest.raises(Torn, match=r"manifest\.json: No such file"):
        verify(tmp_path / "00000005")


def test_killed_at_any_moment_of_a_commit_an_older_one_stays_whole(tmp_path, monkeypatch):
    """Every rename and removal in turn is the last thing that happens."""

    class Killed(BaseException):
        pass

    real = {name: getattr(Path, name) for name in ("replace", "mkdir")}
    for moment in range(1, 12):
        folder = tmp_path / str(moment)
        store = Store(folder)
        write(store, 1)
        write(store, 2)
        calls = 0

        def counted(name, moment=moment):
            def act(self, *arguments, **options):
                nonlocal calls
                calls += 1
                if calls == moment:
                    raise Killed
                return real[name](self, *arguments, **options)

            return act

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, counted(name))
            try:
                write(store, 2)  # the same step once more
                write(store, 3)
                store.prune(CheckpointConfig(keep_last=1, keep_best=0))
                finished = True
            except Killed:
                finished = False
        store.clean()
        whole = [verify(path).step for path in store.paths()]  # raises for one that only looks whole
        assert 3 in whole or whole[:1] == [1], f"after moment {moment} there is {whole}"
        assert whole == [3] or not finished
    assert finished, "all moments were tried"


def write(store, step):
    temporary = store.begin(step)
    (temporary / "weights").write_bytes(b"x" * step)
    store.commit(temporary, entry(step)._replace(files=checkpoint.seal_files(temporary, ["weights"])))


# ------------------------------------------------------------------------------------------------------------ policies


def test_due_by_samples_and_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with checkpointer(tmp_path, every_samples=100, every_seconds=60) as saver:
        assert [samples for samples in range(0, 260, 26) if saver.is_due(samples)] == [104, 130, 156, 182, 208, 234]
        saver.save(small_run(), Progress(4, 104))
        assert not saver.is_due(182) and saver.is_due(208)
        assert not saver.time_is_up()
        now[0] += 61
        assert saver.time_is_up()
        saver.save(small_run(), Progress(5, 130))
        assert not saver.time_is_up()
    with checkpointer(tmp_path / "never", every_samples=None, every_seconds=None) as saver:
        now[0] += 10**9
        assert not saver.is_due(10**12) and not saver.time_is_up()


def test_retention_and_best(tmp_path):
    lines = []
    with checkpointer(tmp_path, lines, keep_last=2, keep_best=1) as saver:
        for step, score in [(1, 0.5), (2, 0.8), (3, None), (4, 0.7), (5, None)]:
            saver.save(small_run(), Progress(step, 10 * step), score)
        saver.finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000004", "00000005"]
        assert saver.best() == tmp_path / "00000002"
    assert sum("written:" in line for line in lines) == 5


# ------------------------------------------------------------------------------------------------- in the background


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    gate, real = threading.Event(), checkpoint.seal_files

    def slow(folder, names):
        assert gate.wait(30)
        return real(folder, names)

    monkeypatch.setattr(checkpoint, "seal_files", slow)
    run, other = small_run(), small_run(1)
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}
    moment = run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with checkpointer(tmp_path) as saver:
        saver.save(run, Progress(1, 10))
        with torch.no_grad():  # the next step, before a byte is on the disk
            for parameter in run.model.parameters():
                parameter.add_(1)
            run.optimizer.state_dict()["state"][0]["exp_avg"].zero_()
        assert not (tmp_path / "00000001").exists()
        gate.set()
        saver.finish()
        assert saver.restore(other) == Progress(1, 10, 0.0)
    assert all(torch.equal(other.model.state_dict()[name], value) for name, value in expected.items())
    assert torch.equal(other.optimizer.state_dict()["state"][0]["exp_avg"], moment)
    assert other.scaler.get_scale() == 1.0


def test_a_failure_in_the_background_is_not_lost(tmp_path, monkeypatch):
    def full(folder, names):
        raise OSError(28, "No space left on device")

    lines = []
    with checkpointer(tmp_path, lines, on_error="continue") as saver:
        saver.save(small_run(), Progress(1, 10))
        saver._settle(strict=True)
        monkeypatch.setattr(checkpoint, "seal_files", full)
        saver.save(small_run(), Progress(2, 20))
        saver.save(small_run(), Progress(3, 30))
        with pytest.raises(MmbaseError, match=r"00000003': No space left on device; free space"):
            saver.finish()
    assert [line for line in lines if "00000002" in line and "earlier ones are untouched" in line]
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"], "nothing half-written stays"
    with checkpointer(tmp_path, on_error="stop") as saver:
        saver.save(small_run(), Progress(4, 40))
        with pytest.raises(MmbaseError, match=r"00000004': No space left"):
            saver.save(small_run(), Progress(5, 50))
    with (
        checkpointer(tmp_path, on_error="stop", background=False) as saver,
        pytest.raises(MmbaseError, match="00000006"),
    ):
        saver.save(small_run(), Progress(6, 60))


def test_a_disk_without_room_is_not_filled_to_the_brim(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with checkpointer(tmp_path) as saver:
        saver.save(small_run(), Progress(1, 10))
        with pytest.raises(MmbaseError, match=r"No space left on device \(0\.0 MB and more to write"):
            saver.finish()
    assert list(tmp_path.iterdir()) == []


def test_memory_layout_is_kept(tmp_path):
    """Fused optimisers walk through weights and moments as they lie in memory."""
    conv = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters(), fused=True)
    conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    run = TrainState(conv, optimizer)
    with checkpointer(tmp_path) as saver:
        saver.save(run, Progress(1, 10))
        saver.restore(run)
    moment = optimizer.state[conv.weight]["exp_avg"]
    assert moment.stride() == conv.weight.stride() and moment.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------ restoring


def test_nothing_to_restore(tmp_path):
    with checkpointer(tmp_path) as saver:
        assert saver.restore(small_run()) is None


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    with checkpointer(tmp_path) as saver:
        saver.save(small_run(), Progress(1, 10))
        saver.finish()
        model = nn.Linear(5, 3)
        other = TrainState(model, torch.optim.AdamW(model.parameters()))
        with pytest.raises(MmbaseError, match=r"is whole but does not fit this run: .*; restore the configuration"):
            saver.restore(other)
    assert verify(tmp_path / "00000001").step == 1


def test_going_back_removes_what_is_newer(tmp_path):
    lines = []
    with checkpointer(tmp_path, lines, keep_last=9) as saver:
        for step in range(5):
            saver.save(small_run(step), Progress(step, 10 * step))
        assert saver.restore(small_run(), before=29) == Progress(2, 20, 0.0)
        assert [path.name for path in Store(tmp_path).paths()] == ["00000000", "00000001", "00000002"]
        for path in Store(tmp_path).paths()[:2]:
            Store(tmp_path).remove(path)
        saver.save(small_run(), Progress(3, 30))
        assert saver.restore(small_run(), before=19) == Progress(2, 20, 0.0), "rather than from the beginning"
        assert [path.name for path in Store(tmp_path).paths()] == ["00000002"]
    assert any("no checkpoint is from before sample 19; taking the oldest, 00000002" in line for line in lines)


def test_all_generators_come_back():
    def draw():
        return random.random(), np.random.normal(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.rand()

    draw()
    random.gauss(0, 1)  # leaves half of a pair behind, which is state too
    state = [random_state(CPU)]
    expected = draw()
    restore_random_state(state, 0, 1, CPU)
    assert draw() == expected
    torch.save(state, buffer := __import__("io").BytesIO())
    buffer.seek(0)
    restore_random_state(torch.load(buffer, weights_only=True), 0, 1, CPU)
    assert draw() == expected
    # On three ranks instead of one: three streams, none of them the old one, the same every time.
    streams = []
    for rank in (0, 1, 2, 0):
        restore_random_state(state, rank, 3, CPU)
        streams.append(draw())
    assert streams[0] == streams[3] and len(set(map(str, [*streams[:3], expected]))) == 4


def test_weights_are_readable_by_others_and_by_safetensors(tmp_path):
    from safetensors.torch import load_file

    run = small_run()
    with checkpointer(tmp_path) as saver:
        saver.save(run, Progress(1, 10))
        saver.finish()
    file = tmp_path / "00000001" / "model.safetensors"
    assert file.stat().st_mode == (tmp_path / "00000001" / "state.pt").stat().st_mode
    assert torch.equal(load_file(file)["weight"], run.model.weight)


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def test_a_new_machine_takes_the_copy(tmp_path, bucket):
    run, policy = small_run(), {"upload": "memory://bucket/run", "keep_last": 2}
    lines = []
    with checkpointer(tmp_path / "old", lines, **policy) as saver:
        for step in range(1, 5):
            saver.save(run, Progress(step, 10 * step))
            saver.finish()
    assert sorted(Path(path).name for path in bucket.ls("/bucket/run", detail=False)) == ["00000003", "00000004"]
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["00000003", "00000004"]

    content = bytearray(bucket.cat_file("/bucket/run/00000004/state.pt"))
    content[len(content) // 2] ^= 1
    bucket.pipe_file("/bucket/run/00000004/state.pt", bytes(content))
    other = small_run(3)
    with checkpointer(tmp_path / "new", lines, **policy) as saver:
        assert saver.restore(other) == Progress(3, 30, 0.0)
    assert any("the copy 00000004 at memory://bucket/run is damaged: state.pt does not agree" in line for line in lines)
    assert torch.equal(other.model.weight, run.model.weight)
    assert read_entry(tmp_path / "new" / "00000003").samples == 30


def test_a_copy_without_manifest_is_not_there(tmp_path, bucket):
    with checkpointer(tmp_path / "old", upload="memory://bucket/run") as saver:
        saver.save(small_run(), Progress(1, 10))
        saver.finish()
    bucket.rm_file("/bucket/run/00000001/manifest.json")
    with checkpointer(tmp_path / "new", upload="memory://bucket/run") as saver:
        assert saver.restore(small_run()) is None


def test_a_line_that_is_down_delays_and_loses_nothing(tmp_path, bucket, monkeypatch):
    lines = []

    def down(*arguments, **options):
        raise ConnectionError("the line is down")

    with checkpointer(tmp_path, lines, upload="memory://bucket/run", keep_last=1) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(type(bucket), "put_file", down)
            saver.save(small_run(), Progress(1, 10))
            saver.finish()
        assert any("00000001 was not copied to memory://bucket/run: the line is down" in line for line in lines)
        saver.save(small_run(), Progress(2, 20))
        saver.finish()
    assert [Path(path).name for path in bucket.ls("/bucket/run", detail=False)] == ["00000002"]
    assert saver._uploader.failed is None


def test_what_is_being_copied_is_not_removed_and_what_is_stale_not_copied(tmp_path, bucket, monkeypatch):
    gate, begun, real, copied = threading.Event(), threading.Event(), type(bucket).put_file, []

    def slow(self, source, target, **options):
        copied.append(Path(source).parent.name)
        begun.set()
        assert gate.wait(30)
        return real(self, source, target, **options)

    monkeypatch.setattr(type(bucket), "put_file", slow)
    with checkpointer(tmp_path, upload="memory://bucket/run", keep_last=1, keep_best=0) as saver:
        saver.save(small_run(), Progress(1, 10))
        assert begun.wait(30)
        began = time.monotonic()
        for step in (2, 3, 4):
            saver.save(small_run(), Progress(step, 10 * step))
        saver._settle(strict=True)
        assert time.monotonic() - began < 20, "saving does not wait for the line"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000004"]
        gate.set()
        saver.finish()
    assert set(copied) == {"00000001", "00000004"}


def test_unknown_file_systems_are_refused(tmp_path):
    with pytest.raises(MmbaseError, match=r"checkpoints\.upload='nosuch://x' cannot be used: Protocol not known"):
        checkpointer(tmp_path, upload="nosuch://x")
