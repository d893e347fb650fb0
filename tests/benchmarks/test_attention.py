"""The attention benchmark: its float64 result, every contender that runs on a CPU, and a whole run with its files."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmbase_bench import attention
from mmbase_bench.attention_contenders import DENSE, SAMPLED, VARLEN, boundaries
from mmbase_bench.side_by_side import Built, Inputs, backward, both, inference, relative_errors

CPU = torch.device("cpu")


def case_of(name, batch, tokens=None, dtype="fp32"):
    shape = attention.SHAPES[name]
    return replace(shape, batch=batch, tokens=tokens or shape.tokens, heads=2, width=16, dtype=dtype)


def by_hand(case, inputs):
    """Output and gradient in float64, sequence by sequence."""
    leaf = inputs.rows[0].detach().double().requires_grad_()
    outs = []
    for row in leaf.split(case.lengths) if case.varlen else leaf.unbind(0):
        q, k, v = row.unbind(1)
        scores = torch.einsum("mhd,nhd->hmn", q, k) / case.width**0.5
        if case.causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        outs.append(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v))
    out = torch.cat(outs) if case.varlen else torch.stack(outs)
    return out.detach(), torch.autograd.grad(out, leaf, inputs.gradients[0].double())[0]


@pytest.mark.parametrize("name", ["vit-b-32", "text", "text-captions", "text-uniform"])
@pytest.mark.parametrize("batch", [3, 2 * SAMPLED + 5])
def test_the_sample_is_compared_with_the_equation(name, batch):
    case = case_of(name, batch, tokens=13)
    inputs = case.inputs(CPU, 1)
    found = case.observed(*[(tensor,) for tensor in by_hand(case, inputs)])
    sequences = min(batch, 2 * SAMPLED)
    assert len(found[0]) == (sum(case._sampled_lengths()) if case.varlen else sequences)
    for ours, (_, exact) in zip(found, case.exact(inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "contender"),
    [
        *(("vit-b-32", name) for name in ("sdpa-flash", "sdpa-math", "mmbase-sdpa", "mmbase-auto")),
        *(("text", name) for name in ("sdpa-flash", "sdpa-math", "mmbase-sdpa", "mmbase-auto")),
        *(("text-captions", name) for name in ("padded-flash", "mmbase-sdpa", "mmbase-auto")),
    ],
)
def test_contenders_compute_the_same(name, contender):
    case = case_of(name, 5, tokens=20)
    inputs = case.inputs(CPU, 1)
    built = case.contenders(CPU)[contender].build(case, CPU, "default")
    outputs, gradients = both(built, inputs)
    errors = relative_errors(case.observed(outputs, gradients), case.exact(inputs))
    assert set(errors) == {"out", "dqkv"} and max(errors.values()) < 1e-6
    assert outputs[0].is_contiguous() and gradients[0].is_contiguous()
    assert gradients[0].shape == inputs.rows[0].shape
    torch.testing.assert_close(inference(built, inputs)[0], outputs[0].detach(), rtol=1e-5, atol=1e-6)


def test_gradients_of_the_three_are_stacked_once():
    """What PyTorch's ways are timed with is their best: the packed gradient comes contiguous, without another copy."""
    case = case_of("vit-b-32", 3)
    inputs = case.inputs(CPU, 0)
    built = DENSE["sdpa-flash"].build(case, CPU, "default")
    (gradient,) = torch.autograd.grad(built.function(*inputs.rows), inputs.rows, inputs.gradients)
    assert gradient.is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-b-32", "text", "text-captions"])
def test_flex_attention_forward(name):
    case = case_of(name, 5, tokens=20)
    inputs = case.inputs(CPU, 1)
    built = case.contenders(CPU)["flex"].build(case, CPU, "default")
    found = case.observed(inference(built, inputs), ())
    assert relative_errors(found, case.exact(inputs))["out"] < 1e-6


@pytest.mark.parametrize("windowed", [True, False])
def test_varlen_is_told_of_causality_in_the_words_of_its_version(windowed, monkeypatch):
    from torch.nn.attention import varlen

    told = []

    def attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, causal):
        told.append((cu_seq_q.tolist(), max_q, causal))
        outs = []
        for q_, k_, v_ in zip(*(x.split(cu_seq_q.diff().tolist()) for x in (q, k, v))):
            scores = torch.einsum("mhd,nhd->hmn", q_, k_) / q.shape[-1] ** 0.5
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            outs.append(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v_))
        return torch.cat(outs)

    def old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)

    def new(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        """Follows sdpa_kernel."""
        return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size)

    monkeypatch.setattr(varlen, "varlen_attn", new if windowed else old)
    case = case_of("text-captions", 6)
    inputs = case.inputs(CPU, 0)
    outputs, gradients = both(VARLEN["varlen-flash"].build(case, CPU, "default"), inputs)
    assert max(relative_errors(case.observed(outputs, gradients), case.exact(inputs)).values()) < 1e-6
    assert told == [(boundaries(case.lengths, CPU).tolist(), case.longest, (-1, 0) if windowed else True)]
    if windowed:
        VARLEN["varlen-cudnn"].build(case, CPU, "default")
    else:
        with pytest.raises(NotImplementedError, match="the flash backend alone"):
            VARLEN["varlen-cudnn"].build(case, CPU, "default")


def test_lengths_of_captions_are_the_same_every_time_and_disturb_no_generator():
    before = torch.get_rng_state()
    case = case_of("text-captions", 4096)
    assert case.lengths == case_of("text-captions", 4096).lengths and torch.equal(before, torch.get_rng_state())
    assert 12 < sum(case.lengths) / 4096 < 14.5 and min(case.lengths) >= 5 and case.longest <= 40
    uniform = case_of("text-uniform", 4096)
    assert min(uniform.lengths) == 5 and uniform.longest == 77


def test_work_is_that_of_the_floors_that_docs_state():
    """KERNELS: milliseconds at 790 TFLOP/s and 4.3 TB/s."""
    for name, forward, back in (
        ("vit-b-16", 0.289, 0.504),
        ("vit-b-32", 0.295, 0.512),
        ("text", 0.303, 0.526),
        ("vit-l-14", 0.505, 0.877),
        ("vit-l-14-336", 0.442, 1.10),
    ):
        case = replace(attention.SHAPES[name], dtype="bf16")
        for direction, wanted in (("forward", forward), ("backward", back)):
            work = case.work(direction)
            assert 1e3 * max(work.flops / 790e12, work.bytes / 4.3e12) == pytest.approx(wanted, rel=0.02)
        whole = case.work("forward+backward")
        assert whole.bytes == case.work("forward").bytes + case.work("backward").bytes
        assert whole.flops == case.work("forward").flops + case.work("backward").flops


def test_the_verdict_knows_the_table_of_choices(monkeypatch):
    def row(contender, ms, direction):
        case = replace(attention.SHAPES["text-captions"], dtype="bf16")
        figures = {"p50_ms": ms, "rounds_ms": [ms, ms], "noise": 0.0, "problem": "", "out_error": 1e-3}
        return case.labels() | {"contender": contender, "direction": direction, "in_case": case.title} | figures

    times = {"varlen-flash": 2.0, "mmbase-sdpa": 3.0, "mmbase-triton": 1.0, "mmbase-triton-compiled": 1.1}
    found = [row(name, ms, way) for name, ms in times.items() for way in ("forward", "forward+backward")]
    monkeypatch.setattr(attention, "architecture", lambda device: "sm_90")
    options = attention.parse(["--device", "cpu"])
    settings = replace(attention.settings_of("attention", options), device=torch.device("cuda"))
    lines, wins = attention.verdict(found, settings, "benchmarks/results/h200/attention.json")
    longest = found[0]["longest"]
    assert (
        f'    Win("attention", "sm_90", torch.bfloat16, "causal varlen", 64, {longest}, {longest}, True, '
        '"benchmarks/results/h200/attention.json"),' in lines
    )
    assert wins[0]["smallest"] == wins[0]["largest"] == longest
    assert any("mmbase-triton over the fastest of PyTorch's" in line and "2.00 x" in line for line in lines)


def test_a_run_and_its_files(tmp_path, monkeypatch, capsys):
    contenders = ["sdpa-flash", "sdpa-cudnn", "sdpa-math", "nested-flash", "mmbase-sdpa", "mmbase-auto"]
    contenders += ["padded-flash", "mmbase-triton"]
    arguments = ["--shapes", "vit-b-32", "text-captions", "--batch", "3", "--repeats", "2", "--threads", "1"]
    arguments += ["--device", "cpu", "--contenders", *contenders, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["attention", *arguments])
    threads = torch.get_num_threads()
    try:
        attention.main()
    finally:
        torch.set_num_threads(threads)
    record, printed = json.loads((tmp_path / "attention.json").read_text()), capsys.readouterr().out
    assert "on a CPU (cpu), 1 threads" in record["measures"] and "only a GPU's result justifies one" in printed
    rows = {(row["shape"], row["direction"], row["contender"]): row for row in record["results"]}
    assert len(rows) == len(record["results"]) == 3 * (6 + 5)
    for (_, direction, contender), row in rows.items():
        if contender in ("sdpa-cudnn", "nested-flash", "mmbase-triton"):
            assert row["p50_ms"] is None and row["problem"]
            assert ("CUDA" in row["problem"]) == (contender == "mmbase-triton")
            continue
        assert row["problem"] == "" and row["floor_ms"] > 0 and row["ratio_to_baseline"] > 0
        assert row["ratio_to_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
        assert row["out_error"] < 1e-6 and ("dqkv_error" in row) == (direction != "forward")
    assert rows["text-captions", "forward", "mmbase-auto"]["mask"] == "causal varlen" and record["wins"] == []
    assert (tmp_path / "attention.csv").read_text().count("\n") == 34
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_gradients_end_contiguous_however_they_come():
    inputs = Inputs((torch.randn(3, 4, requires_grad=True),), (), (torch.randn(4, 3).T,))
    (gradient,) = backward(Built(lambda x: x * 1), inputs, (inputs.rows[0] * 1,))
    assert gradient.is_contiguous()
