"""Ranks: how they are found, started, watched and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmbase.errors import MmbaseError
from mmbase.training.distributed import Place, device_of, find_place, first_host, open_ranks, tasks_per_node
from mmbase.training.hang_watch import Beat, Watch, judge
from mmbase.training.spawn import RankError, count_devices, run_over, spawn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],other",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "1",
}


@pytest.fixture
def targets(monkeypatch):
    """The functions that ranks run; started with one thread each."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for folder in (ROOT, ROOT / "kernels"):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import spawn_targets

    return spawn_targets


# ------------------------------------------------------------------------------------------------------- finding


def test_torchrun_says_the_place_and_goes_before_srun():
    place = find_place(SRUN | TORCHRUN)
    assert place == Place(5, 8, 1, 4, "torchrun", "node0", 29501, True, "2")


def test_srun_says_the_place():
    place = find_place(SRUN)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (6, 7, 2, 3)
    assert (place.launcher, place.address, place.hosted) == ("srun", "gpu007", False)
    others = [find_place(SRUN | change) for change in ({"SLURM_STEP_ID": "2"}, {"SLURM_JOB_ID": "1235"})]
    assert len({place.port, *(other.port for other in others if other)}) == 3  # jobs of one node do not meet


def test_a_batch_script_and_a_shell_are_alone():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1234", "SLURM_LOCALID": "0"}
    assert find_place(batch) is None and find_place({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"RANK": "x"}, "RANK='x'"), ({"RANK": "8"}, "rank 8 of 8"), ({"LOCAL_RANK": None}, "LOCAL_RANK=None")],
)
def test_variables_that_cannot_be(change, message):
    environment = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(MmbaseError, match=message):
        find_place(environment)


def test_lists_of_slurm():
    names = {"a": "a", "n[3-5,9],m": "n3", "r[01-02]n[07,09]": "r01n07", "x,y": "x", "gpu-a[1]": "gpu-a1"}
    assert {text: first_host(text) for text in names} == names
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(MmbaseError, match="launch with torchrun"):
        tasks_per_node("2x3")


def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    place = find_place(TORCHRUN)
    assert place is not None and device_of(place, "cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mmbase.training.distributed.choose_device", torch.device)
    for count, expected in ((4, "cuda:1"), (2, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device_of(place, "auto") == torch.device(expected)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MmbaseError, match=r"rank 5 is number 1 of 4 on .* which has 1 GPU;"):
        device_of(place, "cuda")
    bound = find_place(SRUN)
    assert bound is not None and device_of(bound, "auto") == torch.device("cuda:0")
    with pytest.raises(MmbaseError, match="each takes its own"):
        device_of(place, "cuda:1")


def test_one_process_is_trivial():
    with open_ranks("cpu") as ranks, Watch(ranks, hang_seconds=0.01) as watch:
        watch.at(0, "alone")
        ranks.barrier("nothing")
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        assert ranks.broadcast_object("x") == "x" and ranks.gather_objects("x") == ["x"]
        total = ranks.all_reduce_sum(ones := torch.ones(2))
        assert torch.equal(total, ones) and total is not ones


def test_devices_are_counted(monkeypatch):
    assert count_devices(None, "cpu") == count_devices("auto", "cpu") == 1 and count_devices(3, "cpu") == 3
    with pytest.raises(MmbaseError, match="at least 1"):
        count_devices(0, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_devices("auto", "auto") == 4 and count_devices("auto", "cuda:1") == count_devices("auto", "cpu") == 1
    with pytest.raises(MmbaseError, match="devices=5, but this machine shows 4 GPUs"):
        count_devices(5, "auto")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert count_devices("auto", "auto") == count_devices(4, "auto") == 1
    with pytest.raises(MmbaseError, match="devices=2 beside torchrun, which has started 4"):
        count_devices(2, "auto")


# ------------------------------------------------------------------------------------------------------- judging


def beats(*marks_and_seconds, limit=60.0):
    return [
        Beat(1, marks, 120, "data wait" if marks == 1 else "exchange", seconds, limit, "node", 7)
        for marks, seconds in marks_and_seconds
    ]


def test_the_rank_that_is_behind_is_named():
    told = judge(beats((2, 62), (2, 61), (1, 64), (2, 63)), [0, 0, 1, 0], 60, 4)
    assert told == (
        "rank 2 (node, process 7) has been in 'data wait' of step 120 for 65 s; ranks 0, 1, 3 wait for it",
        [2],
    )


def test_who_waits_is_not_named_and_who_came_late_has_time():
    assert judge(beats((2, 600), (1, 50)), [0, 0], 60, 2) is None
    assert judge(beats((1, 600), (1, 50)), [0, 0], 60, 2) is None
    assert judge(beats((2, 600), (1, 500), limit=1000), [0, 0], 60, 2) is None


def test_silence_and_a_standstill_of_all():
    told = judge(beats((2, 10), (2, 10)), [0, 61], 60, 2)
    assert told and "rank 1" in told[0] and "not been heard of for 61 s" in told[0] and told[1] == [1]
    told = judge(beats((2, 70), (2, 80)), [0, 0], 60, 2)
    assert told and told[0].startswith("all ranks have been in 'exchange' of step 120 for 70 s") and told[1] == [0, 1]
    assert judge(beats((2, 70)), [0], 60, 2) is None  # what rank 1 sees: only whether rank 0 is there
    assert judge(beats((2, 70)), [61], 60, 2) is not None


# ------------------------------------------------------------------------------------------------------- spawning


@gloo
def test_ranks_speak_with_one_another(targets):
    found = run_over(2, "cpu", targets.talk, "said")
    assert found["ranks"] == [(0, 0, 2, "cpu"), (1, 1, 2, "cpu")]
    assert found["told"] == "said" and found["sum"] == [2.0, 1.0]
    assert "rank 1 did not reach nowhere within 0.2 s; rank 0 waited" in found["missing"]


@gloo
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("mistake", MmbaseError, r"^rank 1 of 2: training.steps=none is no number$"),
        pytest.param(
            "error", RankError, r"(?s)^rank 1 of 2 failed\n.*ZeroDivisionError: of rank 1", marks=pytest.mark.slow
        ),
        ("kill", MmbaseError, r"^rank 1 of 2 was ended by SIGKILL"),
    ],
)
def test_a_rank_that_fails_is_named_and_none_is_left(targets, tmp_path, how, kind, message):
    with pytest.raises(kind, match=message):
        spawn(2, targets.fail, how, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if alive(int(path.read_text()))]


def test_what_all_say_is_said_once(targets):
    with pytest.raises(MmbaseError, match=r"^the same on all$"):
        spawn(2, targets.all_mistaken)


@gloo
def test_a_signal_reaches_all_and_their_code_is_the_runs(targets, tmp_path):
    def send():
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as left:
        spawn(2, targets.leave_on_signal, str(tmp_path))
    assert left.value.code == 75


@gloo
def test_ranks_end_with_the_process_that_started_them(targets, tmp_path):
    imports = "from mmbase.training.spawn import spawn; import spawn_targets"
    code = f"{imports}; spawn(2, spawn_targets.leave_on_signal, {str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        wait_for(lambda: len([path for path in tmp_path.iterdir() if path.read_text()]) == 2)
    finally:
        parent.kill()
        parent.wait()
    processes = [int(path.read_text()) for path in tmp_path.iterdir()]
    wait_for(lambda: not any(map(alive, processes)), 10)


@gloo
@pytest.mark.parametrize("how", ["sleep", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_in_time(targets, capfd, how):
    started = time.monotonic()
    expected = "has been in 'data wait' of step 3 for" if how == "sleep" else "has not been heard of for"
    with pytest.raises(MmbaseError, match=rf"^rank 1 \(.*, process \d+\) {expected} .*; rank 0 waits for it; run the"):
        spawn(2, targets.hang, how, 3.0)
    assert time.monotonic() - started < 90  # starting two interpreters included; gloo alone waits for 30 minutes
    told = capfd.readouterr().err
    assert "mmbase: rank 0: rank 1 (" in told
    if how == "sleep":
        assert "mmbase: rank 1 is here:" in told and "in hang" in told


@gloo
@pytest.mark.slow
def test_a_phase_may_take_longer_and_the_watch_ends_together(targets):
    assert spawn(2, targets.slow, 1.0) == "done"


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_launchers(targets, launcher):
    """torchrun itself; srun by its variables, where rank 0 keeps the store and so has to leave last."""
    code = "import spawn_targets; found = spawn_targets.talk('said'); print('found', found.get('missing'), flush=True)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if launcher == "torchrun":
        script = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python", sys.executable]
        commands = [([sys.executable, *script, "-c", code], environment)]
    else:
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
        step |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
        places = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        commands = [([sys.executable, "-c", code], environment | step | place) for place in places]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env=env, **pipe) for command, env in commands]
    told = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    assert "".join(told).count("found") == 2 and "found rank 1 did not reach nowhere within 0.2 s" in "".join(told)


def test_the_main_programs_functions_are_refused():
    def local() -> None: ...

    local.__module__ = "__main__"
    with pytest.raises(MmbaseError, match="must lie in a module"):
        spawn(2, local)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
