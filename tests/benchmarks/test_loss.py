"""The loss benchmark: its float64 reference, every contender that runs on a CPU, and a whole run with its files."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from PIL import Image

from mmbase_bench import loss, loss_reference
from mmbase_bench.loss_contenders import CONTENDERS, KINDS, Case, step

CPU = torch.device("cpu")


def dense(kind, image, text, scale, bias):
    leaves = [t.detach().double().requires_grad_() for t in (image, text, scale, bias) if t is not None]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    if kind == "softmax":
        labels = torch.arange(len(logits))
        value = (
            torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
        ) / 2
    else:
        sign = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
        value = -torch.nn.functional.logsigmoid(sign * (logits + leaves[3])).sum() / len(logits)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("kind", KINDS)
def test_float64_reference_in_chunks_is_the_equation(kind, monkeypatch):
    inputs = Case(kind, 45, 24, "fp32").inputs(CPU, seed=3)
    monkeypatch.setitem(loss_reference.CHUNK_BYTES, "cpu", 8 * 45 * 7)
    found, expected = loss_reference.float64_loss(kind, *inputs), dense(kind, *inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["openclip", "one-gemm", "mmbase-torch", "mmbase-torch-stash", "mmbase-auto"])
def test_contenders_compute_the_same_loss(kind, name):
    if kind not in CONTENDERS[name].kinds:
        assert (kind, name) == ("sigmoid", "mmbase-torch-stash")
        return
    case = Case(kind, 50, 40, "fp32")
    inputs = case.inputs(CPU, seed=1)
    function = CONTENDERS[name].build(kind, CPU, "default")
    errors = loss_reference.relative_errors(step(function, case, inputs), loss_reference.float64_loss(kind, *inputs))
    assert set(errors) == {"loss", "image", "text", "scale"} | ({"bias"} if kind == "sigmoid" else set())
    assert max(errors.values()) < 2e-5, errors


def peer_like():
    """The conventions of siglip-kernel 0.1.2 and memeff 0.3.1 as their source has them, in plain PyTorch."""

    def fused_siglip_loss(image, text, log_temperature, bias):
        return SigLipLoss()(image, text, log_temperature.exp(), bias)

    class MemoryEfficientCLIPLoss(torch.nn.Module):
        def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
            super().__init__()
            assert normalized_inputs and not stable
            self.temperature = temperature

        def forward(self, image, text):
            return ClipLoss()(image, text, 1 / self.temperature)

    return SimpleNamespace(fused_siglip_loss=fused_siglip_loss, MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss)


@pytest.mark.parametrize(("kind", "name"), [("softmax", "memeff"), ("sigmoid", "siglip-kernel")])
def test_adapters_of_peers_that_need_a_gpu(kind, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), peer_like())
    case = Case(kind, 50, 40, "fp32")
    inputs = case.inputs(CPU, seed=2)
    found = step(CONTENDERS[name].build(kind, CPU, "default"), case, inputs)
    errors = loss_reference.relative_errors(found, loss_reference.float64_loss(kind, *inputs))
    assert set(errors) == {"loss", "image", "text"} | ({"scale", "bias"} if kind == "sigmoid" else set())
    assert max(errors.values()) < 2e-5, errors


def test_work_of_the_methods():
    """The multiples of MND that docs and tables state."""
    mnd = 64.0 * 64 * 16
    both, alone = Case("softmax", 64, 16, "fp16"), Case("softmax", 64, 16, "fp16", "forward")
    assert both.work(keeps_logits=False).flops == 8 * mnd and both.work(keeps_logits=True).flops == 6 * mnd
    assert alone.work(keeps_logits=False).flops == 2 * mnd
    assert Case("sigmoid", 64, 16, "fp16").work(keeps_logits=False).flops == 6 * mnd
    assert both.work(keeps_logits=True).bytes - both.work(keeps_logits=False).bytes == 2 * 64 * 64 * 2
    assert both.work(keeps_logits=False).bytes == 2 * alone.work(keeps_logits=False).bytes == 4 * 64 * 16 * 2


def test_a_run_and_its_files(tmp_path, monkeypatch, capsys):
    contenders = ["openclip", "one-gemm", "siglip-kernel", "memeff", "mmbase-triton", "mmbase-torch"]
    threads = torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "memeff", None)
    arguments = ["--sizes", "300", "--widths", "64", "--repeats", "2", "--threads", "1", "--device", "cpu"]
    arguments += ["--kinds", "softmax"]
    monkeypatch.setattr(sys, "argv", ["x/loss", *arguments, "--contenders", *contenders, "--output", str(tmp_path)])
    try:
        loss.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "on a CPU, 1 threads: mmbase's torch path against OpenCLIP's" in printed
    record = json.loads((tmp_path / "loss.json").read_text())
    assert "on a CPU" in record["measures"] and record["environment"]["command"].startswith("loss --sizes 300")
    assert record["ceilings"]["fp32 300x64"]["matmul_flops"] > 0
    rows = {(row["kind"], row["direction"], row["contender"]): row for row in record["results"]}
    assert len(rows) == len(record["results"]) == 2 * 5  # siglip-kernel has no softmax
    for (_, direction, contender), row in rows.items():
        assert contender in printed
        if contender in ("memeff", "mmbase-triton"):
            assert row["p50_ms"] is None and row["peak_bytes"] is None
            assert ("CUDA" if contender == "mmbase-triton" else "peers.sh") in row["problem"]
            continue
        assert row["problem"] == "" and len(row["rounds_ms"]) == 2
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["noise"] >= 0
        assert row["ratio_to_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
        assert row["loss_error"] < 1e-5
        assert ("image_error" in row) == (direction == "forward+backward")
        assert (contender != "openclip") or row["ratio_to_baseline"] == 1
    both = {name: rows["softmax", "forward+backward", name] for name in ("openclip", "mmbase-torch")}
    assert both["mmbase-torch"]["floor_ms"] == pytest.approx(both["openclip"]["floor_ms"] * 8 / 6)
    assert both["openclip"]["peak_bytes"] > 3 * 4 * 300 * 300
    with (tmp_path / "loss.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["contender"] for row in table] == [row["contender"] for row in record["results"]]
    assert float(table[0]["p50_ms"]) == record["results"][0]["p50_ms"]
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
