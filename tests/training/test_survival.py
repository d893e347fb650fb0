"""What a run goes through: killed, asked to stop, out of disk, given damaged files, moved to other ranks."""

import json
import random
import signal
import time

import pytest
import real_parts
import stand_in
import torch
from stand_in import BATCH, key_of

from mmbase.errors import MmbaseError
from mmbase.training.checkpoint_store import Store, read_entry
from mmbase.training.distributed import Ranks
from mmbase.training.interrupt import REQUEUE_CODE

pytestmark = pytest.mark.slow


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


def same_bits(one, other):
    a, b = final(one), final(other)
    return all(torch.equal(a[part][name], b[part][name]) for part in ("model", "average") for name in a[part])


def console(folder, rank=0):
    return (folder / f"console-{rank}.txt").read_text()


def log(folder, rank=0):
    return [json.loads(line) for line in (folder / f"steps-{rank}.jsonl").read_text().splitlines()]


def errors(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("errors-*.txt")))


@pytest.fixture(scope="module")
def unbroken(run_ranks, tmp_path_factory):
    """Two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_ranks(folder, 2) == [0, 0], errors(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    stand_in.train(folder, Ranks())
    return folder


def repeated(folder, before):
    """Steps that were done twice, of those done up to step ``before``."""
    steps = [row["step"] for row in log(folder)]
    return sorted({step for step in steps if steps.count(step) > 1 and step < before})


@pytest.mark.parametrize("killed", [[[1, 13]], [[0, 13]], [[0, 13], [1, 13]]], ids=["rank 1", "rank 0", "all"])
def test_killed_ranks_and_a_resume_give_the_same_bits(killed, run_ranks, unbroken, tmp_path):
    codes = run_ranks(tmp_path, 2, faults={"kill": killed})
    assert all(codes[rank] == -signal.SIGKILL for rank, _ in killed)
    assert all(codes), "a rank whose peer is gone must not end as if all were well"
    assert not (tmp_path / "final.pt").exists()
    assert run_ranks(tmp_path, 2) == [0, 0], errors(tmp_path)
    assert same_bits(tmp_path, unbroken)
    # Checkpoints come every three steps: the one after step 12 may be lost while it is written, the one before not.
    assert set(repeated(tmp_path, 13)) <= {9, 10, 11, 12}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_and_asks_to_be_requeued(name, run_ranks, unbroken, tmp_path):
    codes = run_ranks(tmp_path, 2, faults={"terminate": [[1, 7]], "signal": name})
    assert codes == [REQUEUE_CODE, REQUEUE_CODE], errors(tmp_path)
    # What one rank knows the others know a step later.
    assert Store(tmp_path / "checkpoints").entries()[-1].step in (8, 9)
    assert run_ranks(tmp_path, 2) == [0, 0], errors(tmp_path)
    assert same_bits(tmp_path, unbroken)
    assert repeated(tmp_path, 20) == [], "nothing is done twice"


def test_a_second_signal_ends_at_once(start_ranks, tmp_path):
    """The step is slow and somebody is impatient."""
    (rank,) = start_ranks(tmp_path, 1, faults={"slow": [[0, 5]]})
    deadline = time.monotonic() + 60
    while not (tmp_path / "steps-0.jsonl").exists() or len(log(tmp_path)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank.terminate()
    rank.join(0.2)
    rank.terminate()  # an echo, as of a launcher that passes on what its children got as well
    rank.join(3.5)
    assert rank.exitcode is None, "the step is finished first"
    rank.terminate()
    rank.join(30)
    assert rank.exitcode == -signal.SIGTERM


@pytest.mark.slow
def test_killed_over_and_over_at_any_moment(start_ranks, run_ranks, unbroken, tmp_path):
    """A checkpoint every step, and the run is killed, mostly while one is written, as often as it takes."""
    draw, options = random.Random(0), {"checkpoints": {"every_samples": BATCH}}
    kills = 0
    while not (tmp_path / "final.pt").exists() and kills < 40:
        seen = len(log(tmp_path)) if (tmp_path / "steps-0.jsonl").exists() else 0
        ranks = start_ranks(tmp_path, 2, **options)
        while all(rank.is_alive() for rank in ranks):
            if (tmp_path / "steps-0.jsonl").exists() and len(log(tmp_path)) > seen + 1:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        kills += 1
    assert kills >= 3
    assert run_ranks(tmp_path, 2, **options) == [0, 0], errors(tmp_path)
    assert same_bits(tmp_path, unbroken)
    told = console(tmp_path)
    assert "damaged" not in told, "what appears is whole"
    print(f"{kills} kills, {told.count('resuming')} resumes, {len(repeated(tmp_path, 20))} steps done twice")


def test_a_full_disk_is_told_and_training_goes_on(run_ranks, alone, tmp_path):
    codes = run_ranks(tmp_path, 1, faults={"disk_full": [[0, 7]], "disk_free": [[0, 14]]})
    assert codes == [0], errors(tmp_path)
    told = console(tmp_path)
    for step in ("00000009", "00000012"):
        assert f"cannot write the checkpoint '{tmp_path / 'checkpoints' / step}': File too large" in told
    assert "earlier ones are untouched" in told and "checkpoint 00000015 written" in told
    assert same_bits(tmp_path, alone)


def test_a_disk_that_stays_full_fails_in_the_end_and_loses_nothing(run_ranks, alone, tmp_path):
    assert run_ranks(tmp_path, 1, faults={"disk_full": [[0, 7]]}) == [1]
    assert "free space, then run the same command again to resume" in errors(tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000003", "00000006"]
    assert run_ranks(tmp_path, 1) == [0], errors(tmp_path)
    assert same_bits(tmp_path, alone)


def test_a_full_disk_stops_all_ranks_where_the_policy_says_so(run_ranks, tmp_path):
    codes = run_ranks(tmp_path, 2, faults={"disk_full": [[0, 7]]}, checkpoints={"on_error": "stop"})
    assert codes == [1, 1]
    assert errors(tmp_path).count("MmbaseError: cannot write the checkpoint") == 2
    assert log(tmp_path)[-1]["step"] == 11, "the failure is known when the next checkpoint is due"


def test_a_flipped_bit_in_the_newest_checkpoint(alone, tmp_path):
    for name in ("model.safetensors", "average.safetensors", "state.pt", "manifest.json"):
        folder = tmp_path / name
        stand_in.train(folder, Ranks(), steps=12)
        newest = folder / "checkpoints" / "00000012" / name
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 0x10
        newest.write_bytes(content)
        stand_in.train(folder, Ranks())
        told = console(folder)
        assert f"checkpoint 00000012 is damaged: {name}" in told and "00000012.damaged" in told
        assert "resuming at step 9 (144 samples)" in told
        assert same_bits(folder, alone)


def test_a_torn_newest_checkpoint(alone, tmp_path):
    stand_in.train(tmp_path, Ranks(), steps=12)
    newest = tmp_path / "checkpoints" / "00000012" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "checkpoints" / ".00000015.writing").mkdir()
    (tmp_path / "checkpoints" / ".00000015.writing" / "model.safetensors").write_bytes(b"half")
    stand_in.train(tmp_path, Ranks())
    assert "00000012 is damaged: state.pt has" in console(tmp_path)
    assert same_bits(tmp_path, alone)


def test_when_no_checkpoint_is_whole_nothing_begins_anew(tmp_path):
    stand_in.train(tmp_path, Ranks(), steps=6)
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "state.pt").unlink()
    with pytest.raises(MmbaseError, match=r"none of the checkpoints .* is whole \(00000003, 00000006 damaged\)"):
        stand_in.train(tmp_path, Ranks())


@pytest.mark.parametrize("kind", ["none", "fsdp"])
def test_four_ranks_go_on_as_two(kind, run_ranks, tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    stand_in.train(one, Ranks(), dropout=0.0)
    assert run_ranks(moved, 4, steps=12, dropout=0.0, kind=kind) == [0] * 4, errors(moved)
    assert (moved / "checkpoints" / "00000012" / "shards").exists() == (kind == "fsdp")
    assert run_ranks(moved, 2, dropout=0.0, kind=kind) == [0, 0], errors(moved)
    assert "written by 4 ranks" in console(moved)

    seen: dict[int, list[str]] = {}
    for rank in range(4):
        for row in log(moved, rank):
            seen.setdefault(row["samples"], []).extend(row["keys"])
    assert seen == {first: [key_of(p) for p in range(first, first + BATCH)] for first in range(0, 20 * BATCH, BATCH)}
    expected, found = final(one)["model"], final(moved)["model"]
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def test_sharded_ranks_go_on_to_the_same_bits(run_ranks, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert run_ranks(whole, 2, kind="fsdp") == [0, 0], errors(whole)
    assert run_ranks(split, 2, steps=12, kind="fsdp") == [0, 0], errors(split)
    assert run_ranks(split, 2, kind="fsdp") == [0, 0], errors(split)
    assert same_bits(whole, split)
    newest = Store(split / "checkpoints").paths()[-1]
    shard = sorted((newest / "shards").glob("*.distcp"))[1]
    assert f"shards/{shard.name}" in read_entry(newest).files
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run_ranks(split, 2, kind="fsdp", whole_states=True) == [0, 0], errors(split)
    assert f"damaged: shards/{shard.name}" in console(split) and same_bits(whole, split)


def test_sharded_ranks_go_on_as_one_process_and_the_other_way_round(run_ranks, tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    stand_in.train(one, Ranks(), dropout=0.0)
    assert run_ranks(moved, 2, steps=6, dropout=0.0, kind="fsdp") == [0, 0], errors(moved)
    stand_in.train(moved, Ranks(), steps=12, dropout=0.0)
    assert run_ranks(moved, 2, dropout=0.0, kind="fsdp") == [0, 0], errors(moved)
    expected, found = final(one), final(moved)
    for part in ("model", "average"):
        for name, value in expected[part].items():
            assert torch.allclose(found[part][name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_parts_of_real_training_move_between_kinds(optimizer, run_ranks, tmp_path):
    """One process, FSDP2 on two ranks, DistributedDataParallel on two, one process: as one process all the way."""
    from safetensors.torch import load_file

    whole, moved = tmp_path / "whole", tmp_path / "moved"
    real_parts.train(whole, Ranks(), optimizer=optimizer, steps=8)
    real_parts.train(moved, Ranks(), optimizer=optimizer, steps=8, until=2)
    for kind, until in (("fsdp", 4), ("ddp", 6)):
        options = {"kind": kind, "optimizer": optimizer, "until": until, "steps": 8}
        assert run_ranks(moved, 2, loop="real_parts", **options) == [0, 0], errors(moved)
    real_parts.train(moved, Ranks(), optimizer=optimizer, steps=8)
    for name in ("model", "average"):
        expected, found = (load_file(f / "checkpoints" / "00000008" / f"{name}.safetensors") for f in (whole, moved))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5), (
                name,
                key,
                (found[key] - value).abs().max(),
            )


@pytest.mark.parametrize("kind", ["none", "ddp", "fsdp"])
def test_a_resume_of_real_parts_gives_the_same_bits_and_a_spoilt_step_none(kind, run_ranks, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    for folder, untils in ((whole, [None]), (split, [2, 4, None])):
        for until in untils:
            if kind == "none":
                real_parts.train(folder, Ranks(), until=until, spoil=3)
            else:
                options = {"kind": kind, "until": until, "spoil": 3}
                assert run_ranks(folder, 2, loop="real_parts", **options) == [0, 0], errors(folder)
    for name in ("model", "average"):
        one, other = ((f / "checkpoints" / "00000006" / f"{name}.safetensors").read_bytes() for f in (whole, split))
        assert one == other
    assert "step 3: the loss is nan; update left out" in console(whole)
