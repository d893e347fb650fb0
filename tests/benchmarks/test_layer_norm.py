"""The benchmark of what lies between matrix products: float64 results, contenders, work, places in the table."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmbase_bench import layer_norm
from mmbase_bench.layer_norm_contenders import OPERATORS, Case
from mmbase_bench.side_by_side import both, inference, relative_errors
from mmbase_bench.verdict import Place

CPU = torch.device("cpu")


def case_of(operator, batch=3, dtype="fp32", each=False):
    return Case(operator, "tiny", batch, 5, 16, 12, each, dtype)


def by_hand(case, inputs):
    """Outputs and gradients in float64 by PyTorch's own operations, on the whole batch at once."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (*inputs.rows, *inputs.parameters)]
    x, *rest = leaves
    if case.operator == "layer_norm":
        outputs = (F.layer_norm(x, (16,), *rest),)
    elif case.operator == "add_layer_norm":
        outputs = (x + rest[0], F.layer_norm(x + rest[0], (16,), *rest[1:]))
    elif case.operator == "head":
        token = case.token if case.each else torch.zeros(len(x), dtype=torch.long)
        chosen = F.layer_norm(x[torch.arange(len(x)), token], (16,), *rest[:2])
        outputs = (F.normalize(F.linear(chosen, rest[2]), dim=-1),)
    else:
        h = x + rest[0]
        approximate = "tanh" if case.operator == "gelu_tanh" else "none"
        outputs = (
            h * torch.sigmoid(1.702 * h) if case.operator == "quick_gelu" else F.gelu(h, approximate=approximate),
        )
    gradients = torch.autograd.grad(outputs, leaves, [gradient.double() for gradient in inputs.gradients])
    return [out.detach() for out in outputs], gradients


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_float64_is_the_equation(operator, each):
    case = case_of(operator, batch=21, each=each)
    inputs = case.inputs(CPU, 1)
    found, exact = case.observed(*by_hand(case, inputs)), case.exact(inputs)
    assert [name for name, _ in exact][-1] in ("dbias", "dprojection")
    for ours, (_, wanted) in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-6), ("bf16", 3e-2)])
@pytest.mark.parametrize("contender", ["eager", "eager-16-bit", "mmbase-torch", "mmbase-auto"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_contenders_compute_the_same(operator, contender, dtype, tolerance):
    case = case_of(operator, dtype=dtype, each=True)
    if contender not in case.contenders(CPU):
        assert contender == "eager-16-bit" and "norm" not in operator
        return
    if contender == "eager-16-bit" and dtype == "fp32":
        with pytest.raises(ValueError, match="the same as eager"):
            case.contenders(CPU)[contender].build(case, CPU, "default")
        return
    built = case.contenders(CPU)[contender].build(case, CPU, "default")
    for seed in (1, 2):  # the second input set is another tensor
        inputs = case.inputs(CPU, seed)
        outputs, gradients = both(built, inputs)
        errors = relative_errors(case.observed(outputs, gradients), case.exact(inputs))
        assert max(errors.values()) < tolerance, errors
        assert outputs[-1].dtype == (torch.float32 if operator == "head" else inputs.rows[0].dtype)
        assert [g.dtype for g in gradients] == [leaf.dtype for leaf in (*inputs.rows, *inputs.parameters)]
        assert not inference(built, inputs)[0].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["add_layer_norm", "gelu", "quick_gelu", "head"])
def test_compiled_lines(operator):
    case = case_of(operator, dtype="bf16")
    inputs = case.inputs(CPU, 1)
    outputs, gradients = both(case.contenders(CPU)["compiled"].build(case, CPU, "default"), inputs)
    assert max(relative_errors(case.observed(outputs, gradients), case.exact(inputs)).values()) < 3e-2


def test_work_counts_each_tensor_once_a_pass():
    unit = 3 * 5 * 16 * 2.0
    moved = {"add_layer_norm": (4, 4), "layer_norm": (2, 3), "gelu": (8, 12)}  # the activation is four times as wide
    for operator, (forward, backward) in moved.items():
        case = case_of(operator, dtype="bf16")
        assert (case.work("forward").bytes, case.work("backward").bytes) == (forward * unit, backward * unit)
        assert case.work("forward+backward").bytes == (forward + backward) * unit
    head = case_of("head", dtype="bf16")
    assert head.work("forward").flops == 2 * 3 * 16 * 12 and head.work("backward").bytes > unit


@pytest.mark.parametrize(
    ("operator", "place"),
    [
        ("add_layer_norm", Place("layer_norm", "add", 16, 15)),
        ("layer_norm", Place("layer_norm", "plain", 16, 15)),
        ("quick_gelu", Place("activation", "quick_gelu", 64, 15)),
        ("head", Place("head", "", 16, 3)),
    ],
)
def test_places_in_the_table_of_choices(operator, place):
    assert layer_norm.place_of(case_of(operator).labels()) == place


def test_the_verdict_on_a_gpu(monkeypatch):
    def row(contender, ms, direction):
        case = replace(case_of("gelu"), dtype="bf16")
        figures = {"p50_ms": ms, "rounds_ms": [ms, ms], "noise": 0.0, "problem": "", "dbias_error": 1e-3}
        return case.labels() | {"contender": contender, "direction": direction, "in_case": case.title} | figures

    times = {"eager": 2.0, "compiled": 0.9, "mmbase-triton": 1.0}
    found = [row(name, ms, way) for name, ms in times.items() for way in ("forward", "forward+backward")]
    monkeypatch.setattr(layer_norm, "architecture", lambda device: "sm_90")
    settings = replace(
        layer_norm.settings_of("layer_norm", layer_norm.parse(["--device", "cpu"])), device=torch.device("cuda")
    )
    lines, _ = layer_norm.verdict(found, settings, "benchmarks/results/h200/layer_norm.json")
    assert (
        '    Win("activation", "sm_90", torch.bfloat16, "gelu", 64, 15, None, False, '
        '"benchmarks/results/h200/layer_norm.json"),' in lines
    )
    assert any(line.startswith("gelu: mmbase-triton over compiled") and "0.90 x as fast" in line for line in lines)


def test_a_run_and_its_files(tmp_path, monkeypatch, capsys):
    arguments = ["--shapes", "text", "--batch", "2", "--repeats", "2", "--threads", "1", "--device", "cpu"]
    arguments += ["--operators", "add_layer_norm", "gelu", "--contenders", "eager", "mmbase-auto", "mmbase-triton"]
    monkeypatch.setattr(sys, "argv", ["layer_norm", *arguments, "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        layer_norm.main()
    finally:
        torch.set_num_threads(threads)
    record, printed = json.loads((tmp_path / "layer_norm.json").read_text()), capsys.readouterr().out
    assert "on a CPU (cpu), 1 threads" in record["measures"] and "no GPU kernel is measured" in printed
    assert len(record["results"]) == 2 * 3 * 3 and record["wins"] == []
    for row in record["results"]:
        assert (row["p50_ms"] is None) == (row["contender"] == "mmbase-triton") == bool(row["problem"])
    assert (tmp_path / "layer_norm.png").exists() and "add_layer_norm text 2 x 77 x 512 fp32, backward" in printed
