"""Whole towers through every Triton kernel, in Triton's interpreter; run by test_integration.py."""

from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch.utils._python_dispatch import TorchDispatchMode

from ..tiny import assert_equal_to_rounding, step, tiny_batch, tiny_model

PLAIN = {}, {}
OTHER = {"pool": "attention", "activation": "quick_gelu"}, {"pool": "mean", "activation": "gelu_tanh"}
FORWARD = {"attention", "layer_norm", "add_layer_norm", "bias_activation", "gather_layer_norm", "unit_length"}
BACKWARD = {f"{name}_backward" for name in FORWARD - {"add_layer_norm"}}


class Operators(TorchDispatchMode):
    """Counts our operators."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmbase_kernels":
            self.seen[function._opname] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def stepped(monkeypatch):
    """``stepped(preference, model, run, batch)``: a step under a preference for kernels, and what operators it took."""

    def take(preference, model, run, batch):
        monkeypatch.setenv("MMBASE_KERNELS", preference)
        with Operators() as operators:
            found = step(model, run, batch)
        return found, operators.seen

    return take


@pytest.mark.parametrize(("way", "vision", "text"), [("dense", *PLAIN), ("packed", *PLAIN), ("packed", *OTHER)])
def test_features_and_gradients(stepped, way, vision, text):
    model = tiny_model(vision, text)
    batch = tiny_batch(model, way, rows=2)
    expected, none = stepped("torch", model, model, batch)
    found, seen = stepped("triton", model, model, batch)
    assert not none
    heads = {"gather_layer_norm", "gather_layer_norm_backward", "unit_length", "unit_length_backward"}
    assert seen.keys() == (FORWARD | BACKWARD) - (heads if vision else set())  # only a pooled token has a head
    assert_equal_to_rounding(found, expected, 1e-5)


def test_compiled_as_one_graph(stepped, monkeypatch):
    """The operators stay whole in the graph: AOTAutograd sees their fake versions and their backward."""
    model, seen = tiny_model(), set()
    batch = tiny_batch(model, "packed", rows=2)
    expected, _ = stepped("triton", model, model, batch)

    def look(graph, inputs):
        nodes = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        seen.update(target._opname for target in nodes if target.namespace == "mmbase_kernels")
        return graph.forward

    backend = aot_autograd(fw_compiler=make_boxed_compiler(look))
    found = step(model, torch.compile(model, fullgraph=True, backend=backend), batch)
    assert seen == FORWARD | BACKWARD
    assert_equal_to_rounding(found, expected, 2e-6)


def test_activation_checkpointing(stepped):
    found = []
    for flag in (False, True):
        options = {"checkpoint_activations": flag, "drop_path": 0.3}
        model = tiny_model(options, options).train()
        torch.manual_seed(2)
        found.append(stepped("triton", model, model, tiny_batch(model, "packed", rows=2))[0])
    assert_equal_to_rounding(found[1], found[0], 0)


def test_half_precision_weights(stepped):
    """In float16, which the interpreter multiplies rightly: as near to float32 as PyTorch's operations are."""
    model = tiny_model()
    images, texts = tiny_batch(model, "packed", rows=2)
    exact, _ = stepped("torch", model, model, (images, texts))
    model.half()
    batch = [image.half() for image in images], texts
    features = {}
    for preference in ("torch", "triton"):
        found, _ = stepped(preference, model, model, batch)
        features[preference] = [found[k] - exact[k] for k in ("image_features", "text_features")]
    for ours, theirs in zip(features["triton"], features["torch"]):
        assert ours.norm() <= 1.5 * theirs.norm() + 1e-4
