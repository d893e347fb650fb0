"""What goes around a tower: compilation, checkpointing, autocast, export, hooks; with each preference for kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mmbase.models.initialised import Linear
from mmbase.models.layers import LayerNorm, untouched
from mmbase_kernels import dispatch

from .shrunk import relative
from .tiny import WAYS, assert_equal_to_rounding, loss_of, step, tiny_batch, tiny_model

VARIANTS = [
    ({}, {}),
    (
        {"pool": "attention", "norm_after_pool": True, "activation": "quick_gelu"},
        {"pool": "mean", "causal": False, "mask_padding": True, "activation": "gelu_tanh", "layer_scale": 0.5},
    ),
    ({"pool": "average", "class_token": False, "projection_bias": True}, {"pool": "eos", "eos_id": 49}),
]


@pytest.fixture(params=[None, "torch", "reference"], autouse=True)
def preference(request, monkeypatch) -> str | None:
    """MMBASE_KERNELS unset, and as each of what a CPU can run."""
    if request.param is None:
        monkeypatch.delenv("MMBASE_KERNELS", raising=False)
    else:
        monkeypatch.setenv("MMBASE_KERNELS", request.param)
    torch._dynamo.reset()
    return request.param


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("vision", "text"), VARIANTS)
def test_every_preference_has_the_same_features_and_gradients(vision, text, way, preference, monkeypatch) -> None:
    model = tiny_model(vision, text)
    batch = tiny_batch(model, way)
    found = step(model, model, batch)
    monkeypatch.delenv("MMBASE_KERNELS", raising=False)
    expected = step(model, model, batch)
    assert_equal_to_rounding(found, expected, 3e-6 if preference == "reference" else 0)


@pytest.mark.parametrize(("way", "vision", "text"), [("dense", *VARIANTS[0]), ("packed", *VARIANTS[1])])
def test_compiles_as_one_graph(way, vision, text) -> None:
    """Forward and backward of the whole model, without a graph break."""
    model = tiny_model(vision, text)
    batch = tiny_batch(model, way)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_equal_to_rounding(step(model, compiled, batch), step(model, model, batch), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_compiles_with_inductor(way) -> None:
    model = tiny_model({"checkpoint_activations": True}, {})
    batch = tiny_batch(model, way)
    compiled = torch.compile(model, fullgraph=True)
    assert_equal_to_rounding(step(model, compiled, batch), step(model, model, batch), 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("vision", "text"), VARIANTS)
def test_activation_checkpointing_changes_nothing(vision, text, way) -> None:
    """To the bit, with dropout and stochastic depth, whose draws are repeated."""
    random, found = {"dropout": 0.1, "drop_path": 0.2}, []
    for flag in (False, True):
        extra = random | {"checkpoint_activations": flag}
        model = tiny_model(vision | extra, text | extra).train()
        torch.manual_seed(5)
        found.append(step(model, model, tiny_batch(model, way)))
    assert_equal_to_rounding(found[1], found[0], 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_near_float32(way, compiled) -> None:
    """Features to the rounding of bfloat16; every parameter has its gradient, in float32."""
    model = tiny_model()
    batch = tiny_batch(model, way)
    expected = step(model, model, batch)
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, run, batch)
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float32 for value in found.values())
    for key in ("image_features", "text_features"):
        assert relative(found[key], expected[key]) <= 0.02
    gradients = [
        torch.cat([v.flatten() for k, v in found_.items() if "features" not in k]) for found_ in (found, expected)
    ]
    assert relative(*gradients) <= 0.05


@pytest.mark.parametrize("way", WAYS)
def test_exports(way, preference) -> None:
    model = tiny_model().eval()
    program = torch.export.export(model, tiny_batch(model, way)).module()
    images, texts = tiny_batch(model, way)
    others = [-image for image in images] if way == "packed" else -images
    found, expected = program(others, texts), model(others, texts)
    assert all(relative(found[key], expected[key]) <= 3e-6 for key in expected)


def test_exports_any_number_of_rows() -> None:
    model, rows = tiny_model().eval(), {0: torch.export.Dim("rows", min=2, max=64)}
    program = torch.export.export(model, tiny_batch(model, "dense"), dynamic_shapes=(rows, rows)).module()
    batch = tiny_batch(model, "dense", rows=7, seed=3)
    found, expected = program(*batch), model(*batch)
    assert all(relative(found[key], expected[key]) <= 3e-6 for key in expected)


class LowRank(nn.Module):
    """What LoRA does to a linear layer: the layer wrapped, and a product of two thin matrices added."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("way", WAYS)
def test_wrapped_layers_are_not_passed_by(way) -> None:
    """Every linear layer of both towers adapted: each adapter gets a gradient, also where an operator would stand."""
    model = tiny_model().requires_grad_(False)
    plain = model(*tiny_batch(model, way))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(parent, LowRank):
                setattr(parent, name, LowRank(child))
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    assert len(adapters) == 2 * (2 * 4 + 1)
    out = model(*tiny_batch(model, way))
    loss_of(out).backward()
    assert all(p.grad is not None and p.grad.any() for a in adapters for p in (a.down.weight, a.up.weight))
    assert relative(out["image_features"], plain["image_features"]) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_hooks_on_every_layer_run(way) -> None:
    model, seen = tiny_model(), Counter()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LayerNorm | Linear)}
    assert len(layers) == 2 * (2 * 6 + 2) + 1
    expected = step(model, model, tiny_batch(model, way))
    for name, module in layers.items():
        module.register_forward_hook(lambda module, inputs, out, name=name: seen.update([name]))
    assert_equal_to_rounding(step(model, model, tiny_batch(model, way)), expected, 3e-6)
    assert seen == Counter(list(layers))


def test_what_counts_as_untouched() -> None:
    assert untouched(Linear(4, 4, std=1.0), Linear)
    assert not untouched(nn.Linear(4, 4), Linear)
    assert not untouched(torch.nn.utils.parametrizations.weight_norm(Linear(4, 4, std=1.0)), Linear)
    for register in ("forward_pre", "forward", "full_backward", "full_backward_pre"):
        layer = Linear(4, 4, std=1.0)
        getattr(layer, f"register_{register}_hook")(lambda *_: None)
        assert not untouched(layer, Linear), register
    layer = Linear(4, 4, std=1.0)
    layer.forward = lambda x: x
    assert not untouched(layer, Linear)


@pytest.mark.parametrize("preference", ["torch"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_and_exported_for_a_gpu_that_is_not_there(way, monkeypatch) -> None:
    """Fake tensors on CUDA, MMBASE_KERNELS=triton: every operator is in the one graph, and nothing is launched."""
    triton = pytest.importorskip("mmbase_kernels.attention_triton", reason="Triton exists for Linux only")
    monkeypatch.setenv("MMBASE_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "hindrance", lambda device: "")
    monkeypatch.setattr(triton, "architecture", lambda device: "sm_90")
    model = tiny_model()
    batch = tiny_batch(model, way)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def on_cuda(part):
        return torch.empty(part.shape, dtype=part.dtype, device="cuda") if isinstance(part, Tensor) else part

    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = type(model)(model.config).requires_grad_(False)
        batch = torch.utils._pytree.tree_map(on_cuda, batch)
        out = torch.compile(model, fullgraph=True, backend=backend)(*batch)
    program = torch.export.export(model, batch)
    assert out["image_features"].shape == out["text_features"].shape == (4, 16)
    assert out["image_features"].device.type == "cuda" and len(graphs) == 1
    wanted = {"layer_norm": 5, "add_layer_norm": 4, "bias_activation": 4, "gather_layer_norm": 2, "unit_length": 2}
    wanted["attention"] = 4 if way == "packed" else 2  # in the last block of a dense batch only the pooled token asks
    for graph in (graphs[0], program.graph_module):
        names = Counter(str(node.target).removeprefix("mmbase_kernels.").removesuffix(".default")
                        for node in graph.graph.nodes if "mmbase_kernels" in str(node.target))  # fmt: skip
        assert names == wanted


@pytest.mark.parametrize("preference", [None], indirect=True)
def test_towers_through_every_kernel_in_the_interpreter() -> None:
    """In a process of its own: Triton's interpreter must be asked for before Triton is imported."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    check = Path(__file__).parent / "interpreted" / "check_towers.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(check)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=check.parents[3])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
