"""The benchmark of a whole block: the float64 result against OpenCLIP's block, contenders, MMBASE_KERNELS, a run."""

import json
import os
import sys

import pytest
import torch

from mmbase_bench import block
from mmbase_bench.block import BASELINE, CONTENDERS, Case, preference
from mmbase_bench.side_by_side import both, relative_errors

CPU = torch.device("cpu")
TINY = Case("tiny", 3, 5, 32, 2)


def test_float64_is_openclips_block():
    inputs = TINY.inputs(CPU, 1)
    module = block.openclip(TINY)
    module.load_state_dict({theirs: weight for (theirs, _), weight in zip(block.PLACES, TINY.weights, strict=True)})
    module = module.double().train()
    x = inputs.rows[0].detach().double().requires_grad_()
    out = module(x)
    weights = [dict(module.named_parameters())[name] for name, _ in block.PLACES]
    gradients = torch.autograd.grad(out, [x, *weights], inputs.gradients[0].double())
    found, exact = TINY.observed((out,), gradients), TINY.exact(inputs)
    assert [name for name, _ in exact] == ["out", "dx", *["dweights"] * 12]
    for ours, (_, wanted) in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-6), ("bf16", 3e-2)])
@pytest.mark.parametrize("name", ["openclip", "mmbase"])
def test_contenders_compute_the_same(name, dtype, tolerance):
    case = Case("tiny", 3, 5, 32, 2, dtype)
    inputs = case.inputs(CPU, 1)
    outputs, gradients = both(CONTENDERS[name].build(case, CPU, "default"), inputs)
    assert outputs[0].dtype == inputs.rows[0].dtype and gradients[1].dtype == torch.float32
    errors = relative_errors(case.observed(outputs, gradients), case.exact(inputs))
    assert set(errors) == {"out", "dx", "dweights"} and max(errors.values()) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openclip-compiled", "mmbase-compiled"])
def test_compiled_contenders(name):
    inputs = TINY.inputs(CPU, 1)
    outputs, gradients = both(CONTENDERS[name].build(TINY, CPU, "default"), inputs)
    assert max(relative_errors(TINY.observed(outputs, gradients), TINY.exact(inputs)).values()) < 2e-6


@pytest.mark.parametrize("before", [None, "reference"])
def test_preference_is_put_back(before, monkeypatch):
    monkeypatch.delenv(block.ENVIRONMENT, raising=False)
    if before:
        monkeypatch.setenv(block.ENVIRONMENT, before)
    with preference("triton"):
        assert os.environ[block.ENVIRONMENT] == "triton"
    with preference(None):
        assert block.ENVIRONMENT not in os.environ
    assert os.environ.get(block.ENVIRONMENT) == before


def test_what_is_measured_is_what_its_name_says(monkeypatch):
    """Each contender runs under its own MMBASE_KERNELS, and each compiled one under a code object of its own."""
    seen, codes = [], []

    def module(case):
        inner = block.Block(case.width, case.heads)
        inner.register_forward_pre_hook(lambda *_: seen.append(os.environ.get(block.ENVIRONMENT)))
        return inner

    def compiled(function, **options):
        codes.append(function.__code__)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setenv(block.ENVIRONMENT, "reference")
    inputs = TINY.inputs(CPU, 0)
    for kernels in (None, "torch"):
        for is_compiled in (False, True):
            both(block.built(module, compiled=is_compiled, kernels=kernels)(TINY, CPU, "default"), inputs)
    assert seen == [None, None, "torch", "torch"] and os.environ[block.ENVIRONMENT] == "reference"
    assert len(codes) == 2 and codes[0] != codes[1]


def test_work_is_that_of_the_products():
    rows, width = 3 * 5, 32
    linear, attention = 2 * rows * 12 * width**2, 2 * rows * 5 * width
    assert TINY.work("forward").flops == linear + 2 * attention
    assert TINY.work("backward").flops == 2 * linear + 5 * attention
    assert TINY.work("forward+backward").flops == 3 * linear + 7 * attention


def test_a_run_and_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(block.SHAPES, "vit-b-32", TINY)
    arguments = ["--shapes", "vit-b-32", "--batch", "2", "--repeats", "2", "--threads", "1", "--device", "cpu"]
    arguments += ["--contenders", "openclip", "mmbase", "mmbase-triton", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["block", *arguments])
    threads = torch.get_num_threads()
    try:
        block.main()
    finally:
        torch.set_num_threads(threads)
    record, printed = json.loads((tmp_path / "block.json").read_text()), capsys.readouterr().out
    assert "transformer block on a CPU (cpu), 1 threads" in record["measures"]
    rows = {(row["direction"], row["contender"]): row for row in record["results"]}
    assert len(rows) == 9 and (tmp_path / "block.csv").exists() and (tmp_path / "block.png").exists()
    for (_, contender), row in rows.items():
        assert row["problem"].startswith("ValueError: MMBASE_KERNELS=triton") == (contender == "mmbase-triton")
        assert contender == "mmbase-triton" or row["baseline"] == BASELINE
    assert "mmbase over openclip, forward+backward: " in printed and record["verdict"]
