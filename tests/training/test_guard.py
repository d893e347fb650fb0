"""What is not finite or spikes: left out exactly, seen without waiting, named by key, got over."""

import json
import math
import signal

import numpy as np
import pytest
import stand_in
import torch
from stand_in import BATCH, key_of
from torch import nn

from mmbase.errors import MmbaseError
from mmbase.training.distributed import Ranks
from mmbase.training.guard import Guard, RollBack, Skipped, suspicious
from mmbase.training.guard_config import GuardConfig
from mmbase.training.spikes import RunningLimit

STEPS, AT = 60, 40
"""Steps of a run, and the one in which something is wrong."""


def guard(tmp_path, lines=None, overflow_is_usual=False, **config):
    report = (lines if lines is not None else []).append
    config = {"warmup": 8, "lag": 2} | config
    return Guard(GuardConfig(**config), Ranks(), tmp_path / "guard.jsonl", report, overflow_is_usual=overflow_is_usual)


def feed(watcher, losses, norms=None, start=0, size=4):
    """Judge and watch steps with these numbers; the verdicts by the step in which they came."""
    verdicts = {}
    for step, loss in enumerate(losses, start):
        norm = 1.0 if norms is None else norms[step - start]
        watcher.judge(torch.tensor(loss), torch.tensor(norm))
        keys = [f"{step}/{row}" for row in range(size)]
        if verdict := watcher.watch(step, step * size, (step + 1) * size, keys):
            verdicts[step] = verdict
    return verdicts


def calm(count, seed=0):
    return (1.0 + 0.05 * np.random.default_rng(seed).standard_normal(count)).tolist()


# ------------------------------------------------------------------------------------------------------------ the limit


def test_limit_is_the_formula_and_ignores_outliers():
    values = calm(60)
    limit = RunningLimit(8.0, 32, 16, logarithmic=False, floor=0.0)
    for value in values:
        limit.add(value)
    deviations = np.array([v - np.median(values[max(0, i - 16) : i]) for i, v in enumerate(values) if i])[-32:]
    sigma = 1.4826 * np.median(np.abs(deviations - np.median(deviations)))
    assert limit.limit == pytest.approx(np.median(values[-16:]) + 8 * sigma)
    before = limit.limit
    for _ in range(4):
        limit.add(1e6)
    assert limit.limit < 2 * before


def test_limit_of_a_falling_loss_stays_near_it():
    limit = RunningLimit(8.0, 128, 32, logarithmic=False, floor=0.01)
    falling = [5.0 * math.exp(-step / 60) + 0.3 for step in range(100)]
    for value in falling:
        assert value <= limit.limit
        limit.add(value)
    assert limit.limit < 2.5 * falling[-1]


def test_limit_waits_for_its_warmup_and_takes_logarithms():
    limit = RunningLimit(8.0, 128, 32, logarithmic=True, floor=0.05)
    for step in range(33):
        assert limit.limit == math.inf
        limit.add(10.0 ** (step % 3))
    assert 100 < limit.limit < math.inf
    copy = RunningLimit(8.0, 128, 32, logarithmic=True, floor=0.05)
    copy.load_state_dict(limit.state_dict())
    assert copy.limit == limit.limit
    limit.forget()
    assert limit.limit == math.inf


# ---------------------------------------------------------------------------------------------------------- the device


def test_an_update_left_out_never_happened(tmp_path):
    """Weights, moments and step counts, bit for bit, with gradients that are not numbers."""

    def run(bad_step):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        watcher = guard(tmp_path, spike_score=None)
        for step in range(6):
            draw = torch.Generator().manual_seed(min(step, 100))
            loss = model(torch.randn(4, 5, generator=draw)).square().mean()
            if step == bad_step:
                loss = loss * torch.nan
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step == 3 and bad_step is None:
                continue
            optimizer.found_inf = watcher.judge(loss, norm)
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()["state"]

    (weights, state), (expected, expected_state) = run(3), run(None)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for index, values in expected_state.items():
        assert all(torch.equal(state[index][name], value) for name, value in values.items())


def test_judging_reads_nothing_back(tmp_path):
    """Tensors without data: whoever looked at a value would fail."""
    watcher = guard(tmp_path)
    feed(watcher, calm(40))
    loss, norm = torch.empty((), device="meta"), torch.empty((), device="meta")
    for step in range(40, 42):  # two steps are on their way, and none of them is waited for
        assert watcher.judge(loss, norm).device.type == "meta"
        assert watcher.watch(step, 4 * step, 4 * step + 4) is None
    watcher.judge(loss, norm)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        watcher.watch(42, 168, 172)


def test_the_limit_on_the_device_is_that_of_the_host(tmp_path):
    watcher = guard(tmp_path)
    feed(watcher, calm(40))
    limit = watcher._loss.limit
    norm = torch.tensor(1.0)
    assert float(watcher.judge(torch.tensor(0.999 * limit), norm)) == 0
    assert float(watcher.judge(torch.tensor(1.001 * limit), norm)) == 1
    for broken in (math.nan, math.inf, -math.inf):
        assert float(watcher.judge(torch.tensor(broken), norm)) == 1
        assert float(watcher.judge(torch.tensor(1.0), torch.tensor(broken))) == 1
    assert float(watcher.judge(torch.tensor(1.0), torch.tensor(1e4))) == 1
    assert guard(tmp_path, policy="off").judge(torch.tensor(math.nan), norm) is None


# --------------------------------------------------------------------------------------------------------- the verdicts


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_a_bad_step_is_told_lag_steps_later_with_its_keys(lag, tmp_path):
    lines = []
    losses = calm(40)
    losses[30] = math.nan
    verdicts = feed(guard(tmp_path, lines, lag=lag), losses)
    assert verdicts == {30 + lag: Skipped([30], "the loss is nan", ["30/0", "30/1", "30/2", "30/3"])}
    (row,) = [json.loads(line) for line in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert row["samples"] == [120, 124] and row["action"] == "skip" and row["keys"] == ["30/0", "30/1", "30/2", "30/3"]
    assert lines == ["step 30: the loss is nan; update left out; samples 30/0, 30/1, 30/2, 30/3"]


def test_spikes_of_loss_and_norm(tmp_path):
    losses, norms = calm(60), [math.exp(x) for x in calm(60, 1)]
    losses[30], norms[50] = 4.0, 400.0
    verdicts = feed(guard(tmp_path), losses, norms)
    assert [verdict.steps for verdict in verdicts.values()] == [[30], [50]]
    assert "the loss is 4, a spike from 1." in verdicts[32].reason
    assert "the gradient norm is 400, a spike from " in verdicts[52].reason
    assert feed(guard(tmp_path, spike_score=None), losses, norms) == {}


def test_calm_noise_is_no_spike(tmp_path):
    for seed in range(3):
        assert feed(guard(tmp_path), calm(1000, seed), [math.exp(0.3 * x) for x in calm(1000, 10 + seed)]) == {}


def test_a_new_level_is_accepted_and_what_stays_broken_stops(tmp_path):
    lines = []
    verdicts = feed(guard(tmp_path, lines, patience=4), calm(30) + [3.0 + x for x in calm(30, 1)])
    # Four until it is noticed, and the two that the device had judged by then.
    assert [verdict.steps for verdict in verdicts.values()] == [[step] for step in range(30, 36)]
    assert sum("4 spikes in a row: taken for the new level" in line for line in lines) == 1
    with pytest.raises(MmbaseError, match=r"step 33: the loss is nan, as in the 3 steps before it; lower training"):
        feed(guard(tmp_path, patience=4), calm(30) + [math.nan] * 10)


def test_stop(tmp_path):
    losses = calm(40)
    losses[30] = math.inf
    with pytest.raises(MmbaseError, match=r"step 30: the loss is inf; samples 30/0.*; see .*guard\.jsonl.*policy=skip"):
        feed(guard(tmp_path, policy="stop"), losses)


def test_overflow_under_a_scaler_is_usual_until_it_stays(tmp_path):
    norms = [math.inf, math.inf, 1.0, math.inf] + [1.0] * 20
    assert feed(guard(tmp_path, overflow_is_usual=True), calm(24), norms) == {}
    with pytest.raises(MmbaseError, match="the gradient norm is inf, as in the 7 steps before"):
        feed(guard(tmp_path, overflow_is_usual=True), calm(24), [1.0] * 10 + [math.inf] * 14)
    losses = calm(24)
    losses[5] = math.nan
    assert len(feed(guard(tmp_path, overflow_is_usual=True), losses)) == 1


def test_rollback_windows_and_their_limit(tmp_path):
    losses = calm(40)
    losses[30] = 5.0
    watcher = guard(tmp_path, policy="rollback", before=2, after=1)
    verdicts = feed(watcher, losses[:33])
    assert set(verdicts) == {32}
    verdict = verdicts[32]
    assert isinstance(verdict, RollBack) and verdict.to_samples == 112 and verdict.window == (112, 128)
    assert verdict.keys == [f"{step}/{row}" for step in (28, 29, 30, 31) for row in range(4)]
    assert watcher.steps_over(124, 130) and watcher.steps_over(100, 113)
    assert not watcher.steps_over(128, 132) and not watcher.steps_over(108, 112)
    # Killed here, before any checkpoint: the next process knows.
    assert guard(tmp_path, policy="rollback").steps_over(112, 116)
    with (tmp_path / "guard.jsonl").open("a") as file:
        file.write('{"action": "rollb')  # torn by a kill
    assert guard(tmp_path, policy="rollback").steps_over(112, 116)
    for count in range(2):
        feed(watcher, [math.nan], start=50 + count)
        assert isinstance(watcher.settle(), RollBack)
    watcher.config.max_rollbacks = 3
    feed(watcher, [math.nan], start=60)
    with pytest.raises(MmbaseError, match=r"the 4th window of data .*guard\.max_rollbacks=3"):
        watcher.settle()


def test_no_checkpoint_holds_a_step_nobody_looked_at(tmp_path):
    watcher = guard(tmp_path, policy="rollback")
    assert feed(watcher, [*calm(30), math.nan]) == {}
    assert isinstance(watcher.settle(), RollBack)
    watcher = guard(tmp_path)
    assert feed(watcher, [*calm(30), math.nan]) == {}
    assert watcher.settle() is None, "an update left out does no harm to a checkpoint"
    assert watcher.settle(end=True).steps == [30]


def test_a_resumed_guard_decides_as_the_old_one(tmp_path):
    losses = [1.0 + 0.4 * math.sin(step) + x - 1 for step, x in enumerate(calm(200))]
    losses[101], losses[150] = 30.0, 2.9
    for cut in (60, 100, 102, 140):
        whole, first = guard(tmp_path), guard(tmp_path)
        expected = feed(whole, losses)
        found = feed(first, losses[:cut])
        state = torch.load(saved(first.state_dict(), tmp_path), weights_only=True)
        second = guard(tmp_path)
        second.load_state_dict(state)
        found |= feed(second, losses[cut:], start=cut)
        assert [(step, v.steps, v.reason) for step, v in found.items()] == [
            (step, v.steps, v.reason) for step, v in expected.items()
        ]
        assert second._loss.limit == whole._loss.limit and second._norm.limit == whole._norm.limit
    assert 103 in expected


def saved(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def test_suspicious_rows():
    image, text = torch.ones(4, 3), torch.ones(4, 3)
    image[1, 2], text[3, 0] = math.nan, math.inf
    assert suspicious({"image_features": image, "text_features": text}).tolist() == [False, True, False, True]


# ------------------------------------------------------------------------------------------------------ in whole runs


def rows(folder):
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.load(folder / "final.pt", weights_only=True)["model"]


def last_loss(folder):
    """Mean over the last ten steps."""
    lines = (folder / "steps-0.jsonl").read_text().splitlines()
    return sum(json.loads(line)["loss"] for line in lines[-10:]) / 10


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    stand_in.train(folder, Ranks(), steps=STEPS, dropout=0.0)
    assert not (folder / "guard.jsonl").exists()
    return folder


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_broken_sample_is_found_and_got_over(policy, clean, tmp_path):
    position = AT * BATCH + 5
    stand_in.train(tmp_path, Ranks(), steps=STEPS, dropout=0.0, guard={"policy": policy}, faults={"nan_at": [position]})
    (row,) = rows(tmp_path)
    assert row["step"] == AT and row["action"] == policy and row["suspects"] == [key_of(position)]
    assert last_loss(tmp_path) == pytest.approx(last_loss(clean), rel=0.05)


def test_leaving_a_step_out_and_going_back_past_it_are_the_same(tmp_path):
    for policy in ("skip", "rollback"):
        options = {"guard": {"policy": policy}, "faults": {"nan_at": [AT * BATCH]}}
        stand_in.train(tmp_path / policy, Ranks(), steps=STEPS, dropout=0.0, **options)
    one, other = weights(tmp_path / "skip"), weights(tmp_path / "rollback")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_spike_is_found_and_got_over(policy, clean, tmp_path):
    positions = list(range(AT * BATCH, (AT + 1) * BATCH))
    config = {"policy": policy, "spike_score": 6.0, "warmup": 16}
    stand_in.train(tmp_path, Ranks(), steps=STEPS, dropout=0.0, guard=config, faults={"spike_at": positions})
    (row,) = rows(tmp_path)
    assert row["step"] == AT and row["action"] == policy and "the loss is" in row["reason"]
    assert {key_of(position) for position in positions} <= set(row["keys"])
    assert last_loss(tmp_path) == pytest.approx(last_loss(clean), rel=0.1)


def test_ranks_decide_as_one_and_name_the_samples_of_all(run_ranks, tmp_path):
    position = AT * BATCH + 12  # of rank 1
    options = {"steps": STEPS, "dropout": 0.0, "faults": {"nan_at": [position]}}
    one = tmp_path / "one"
    stand_in.train(one, Ranks(), **options, guard={"policy": "rollback"})
    for kind in ("none", "fsdp"):
        two = tmp_path / kind
        assert run_ranks(two, 2, **options, kind=kind, guard={"policy": "rollback"}) == [0, 0]
        (row,) = rows(two)
        assert row["suspects"] == [key_of(position)]
        assert row["keys"] == [key_of(place) for place in range(AT * BATCH, (AT + 1) * BATCH)]
        for name, value in weights(one).items():
            assert torch.allclose(weights(two)[name], value, rtol=1e-4, atol=1e-5), (kind, name)


def test_killed_after_going_back_the_window_stays_behind(run_ranks, tmp_path):
    """No checkpoint since then tells of it: the record does."""
    options = {"steps": STEPS, "guard": {"policy": "rollback"}, "checkpoints": {"every_samples": 20 * BATCH}}
    faults = {"nan_at": [AT * BATCH]}
    assert run_ranks(tmp_path / "whole", 2, **options, faults=faults) == [0, 0]
    codes = run_ranks(tmp_path / "killed", 2, **options, faults=faults | {"kill": [[0, AT + 3], [1, AT + 3]]})
    assert codes == [-signal.SIGKILL] * 2
    assert len(rows(tmp_path / "killed")) == 1, "it went back before it was killed"
    assert run_ranks(tmp_path / "killed", 2, **options, faults=faults) == [0, 0]
    assert len(rows(tmp_path / "killed")) == 1, "and did not stumble again"
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
