"""What ``impl="auto"`` takes: MMBASE_KERNELS, the table of measurements, and what a run says of both."""

from pathlib import Path

import pytest
import torch

from mmbase_kernels import (
    add_layer_norm,
    attention,
    banner,
    bias_activation,
    choice,
    clip_loss,
    dispatch,
    head,
    layer_norm,
    sigmoid_loss,
)
from mmbase_kernels.choice import ENVIRONMENT, Win, measured_faster
from mmbase_kernels.tuning import ARCHITECTURES

from .pairs import pair

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
CUDA = torch.device("cuda")
WIN = Win("attention", "sm_90", torch.bfloat16, "", 64, 50, 197, True, "attention.csv")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture
def h200(monkeypatch):
    """An H200 is asked after, and every kernel would run on it."""
    for module in (choice, banner):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    for module in (dispatch, banner):
        monkeypatch.setattr(module, "hindrance", lambda device: "")


def faster(length, dtype=torch.bfloat16, **fields):
    return measured_faster(
        **{"operator": "attention", "device": CUDA, "dtype": dtype, "width": 64, **fields}, size=length
    )


def test_triton_is_taken_only_where_it_was_measured_to_be_faster(h200, monkeypatch):
    monkeypatch.setattr(choice, "WINS", ())
    assert not faster(100)
    monkeypatch.setattr(choice, "WINS", (WIN,))
    assert [n for n in (49, 50, 197, 198) if faster(n)] == [50, 197]
    assert not faster(100, torch.float16)
    for other in ({"case": "causal"}, {"width": 72}, {"operator": "head"}):
        assert not faster(100, **other)
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_80")
    assert not faster(100)


def test_a_row_may_be_open_above(h200, monkeypatch):
    monkeypatch.setattr(choice, "WINS", (Win("head", "sm_90", torch.bfloat16, "", 64, 50, None, True, "head.csv"),))
    assert faster(10**9, operator="head") and not faster(49, operator="head")


def test_a_compiled_graph_takes_what_was_faster_than_the_compiler(monkeypatch):
    def function(x):
        return x + faster(x.shape[0], device=x.device)  # the CPU reads the row of an H200

    for compiled in (False, True):
        torch._dynamo.reset()
        win = Win("attention", "sm_90", torch.bfloat16, "", 64, 50, 60, compiled, "attention.csv")
        monkeypatch.setattr(choice, "WINS", (win,))
        graph = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
        for rows in (49, 50, 60, 61):
            assert bool(function(torch.zeros(rows))[0]) == (rows in (50, 60))
            assert bool(graph(torch.zeros(rows))[0]) == (compiled and rows in (50, 60))


def test_every_row_names_a_committed_result():
    for win in choice.WINS:
        assert win.operator in choice.OPERATORS and win.architecture in ARCHITECTURES
        assert win.largest is None or win.smallest <= win.largest
        assert (RESULTS / win.result).is_file(), win


@pytest.mark.parametrize("value", [None, ""])
def test_unset_or_empty_it_asks_for_nothing(value, monkeypatch):
    if value is not None:
        monkeypatch.setenv(ENVIRONMENT, value)
    assert choice.preferred() is None
    assert choice.asked("auto", dispatch.IMPLEMENTATIONS) == ("auto", "impl='auto'")


def calls(impl):
    """Every operator of this package that takes an ``impl``, at inputs that its Triton kernels take."""
    images, texts = pair(60, 60, 16, seed=0)
    qkv = torch.randn(2, 5, 3, 2, 32, generator=torch.Generator().manual_seed(1))
    x, bias = qkv.flatten(2), torch.randn(192, generator=torch.Generator().manual_seed(2))
    return {
        "attention": lambda: attention(qkv, causal=True, impl=impl),
        "clip_loss": lambda: clip_loss(images, texts, 9.0, impl=impl),
        "sigmoid_loss": lambda: sigmoid_loss(images, texts, 9.0, -4.0, impl=impl),
        "activation": lambda: bias_activation(x, bias, "gelu", impl=impl),
        "layer_norm": lambda: layer_norm(x, bias, bias, impl=impl),
        "add_layer_norm": lambda: torch.stack(add_layer_norm(x, x, bias, bias, impl=impl)),
        "head": lambda: head(x, 2, bias, bias, None, None, impl=impl),
    }


OPERATORS = tuple(calls("auto"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_it_stands_in_for_auto_alone(operator, monkeypatch):
    plain = "sdpa" if operator == "attention" else "torch"
    want = {impl: calls(impl)[operator]() for impl in (plain, "reference")}
    for value, impl in (("torch", plain), ("reference", "reference")):
        monkeypatch.setenv(ENVIRONMENT, value)
        assert torch.equal(calls("auto")[operator](), want[impl])
        for named in (plain, "reference"):
            assert torch.equal(calls(named)[operator](), want[named])


def test_what_is_chosen(monkeypatch):
    x = torch.zeros(2, 3)
    for value, chosen in ((None, "torch"), ("torch", "torch"), ("reference", "reference")):
        if value:
            monkeypatch.setenv(ENVIRONMENT, value)
        assert dispatch.choose("auto", x) == dispatch.choose_measured("head", "auto", x, size=2) == chosen
        assert dispatch.choose("torch", x) == dispatch.choose_measured("head", "torch", x, size=2) == "torch"
        sdpa = dispatch.choose_measured("attention", "auto", x, size=2, names=("auto", "triton", "sdpa", "reference"))
        assert sdpa == ("reference" if value == "reference" else "sdpa")


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_falls_back_silently(operator, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(
        ValueError, match=f"^{ENVIRONMENT}=triton cannot run: it needs a CUDA device.*; use {ENVIRONMENT}=torch"
    ):
        calls("auto")[operator]()
    with pytest.raises(ValueError, match=r"^impl='triton' cannot run: it needs a CUDA device.*or 'auto'$"):
        calls("triton")[operator]()


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_there_is_not_is_named_with_the_nearest(operator, monkeypatch):
    with pytest.raises(
        ValueError, match=r"^impl must be one of auto, triton, .*, not 'tritn'; did you mean 'triton'\?$"
    ):
        calls("tritn")[operator]()
    monkeypatch.setenv(ENVIRONMENT, "Torch!")
    with pytest.raises(
        ValueError, match=f"^{ENVIRONMENT} must be triton, torch or reference, not 'Torch!'; did you mean 'torch'"
    ) as caught:
        calls("auto")[operator]()
    assert "\n" not in str(caught.value)
    calls("reference")[operator]()


def test_what_the_kernels_do_not_take_is_said(h200, monkeypatch):
    x = torch.zeros(2, 3)
    options = {"size": 2, "obstacle": "takes up to 2 columns, not 3"}
    with pytest.raises(ValueError, match=r"^impl='triton' takes up to 2 columns, not 3: use impl='torch' or 'auto'$"):
        dispatch.choose_measured("head", "triton", x, **options)
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(
        ValueError, match=f"^{ENVIRONMENT}=triton takes up to 2 columns, not 3: use {ENVIRONMENT}=torch or unset it$"
    ):
        dispatch.choose_measured("head", "auto", x, **options)
    with pytest.raises(ValueError, match=r"takes float32, float16 or bfloat16, not torch\.float64"):
        dispatch.choose_measured("head", "auto", x.double(), size=2)


@pytest.mark.parametrize("value", [None, "torch", "reference"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_as_one_graph(operator, value, monkeypatch):
    torch._dynamo.reset()
    if value is not None:
        monkeypatch.setenv(ENVIRONMENT, value)
    function = calls("auto")[operator]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), function())


def test_a_run_says_what_was_chosen_and_why(h200, monkeypatch):
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert banner.describe(cpu, torch.float32) == [
        "attention: sdpa (Triton kernels need a CUDA device, not cpu)",
        "layer norm, activation, head: torch (Triton kernels need a CUDA device, not cpu)",
    ]
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.zeros(0))
    assert banner.describe(CUDA, bf16)[0] == "attention: sdpa (no measurement for sm_90 yet)"
    monkeypatch.setattr(choice, "WINS", (WIN,))
    monkeypatch.setattr(banner, "WINS", (WIN,))
    assert banner.describe(CUDA, bf16) == [
        "attention: triton where it was faster, else sdpa (attention.csv)",
        "layer norm, activation, head: torch (no measurement for sm_90 yet)",
    ]
    assert banner.describe(CUDA, torch.float16)[0] == "attention: sdpa (not faster in float16 on sm_90)"
    assert banner.describe(CUDA, torch.float64)[0] == "attention: sdpa (Triton kernels take no float64)"
    monkeypatch.setenv(ENVIRONMENT, "triton")
    assert banner.describe(CUDA, bf16) == ["attention, layer norm, activation, head: triton (MMBASE_KERNELS=triton)"]
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert banner.describe(CUDA, bf16)[0] == "attention: sdpa (MMBASE_KERNELS=torch)"
    monkeypatch.setattr(banner, "hindrance", lambda device: "before triton 3.9 it does not compile")
    monkeypatch.delenv(ENVIRONMENT)
    assert banner.describe(CUDA, bf16)[0] == "attention: sdpa (before triton 3.9 it does not compile)"


def test_what_cannot_run_stops_a_run_at_once(monkeypatch):
    for value, message in (("triton", "triton cannot run: it needs a CUDA device"), ("x", "not 'x'; unset it")):
        monkeypatch.setenv(ENVIRONMENT, value)
        with pytest.raises(ValueError, match=message):
            banner.describe(torch.device("cpu"), torch.float32)
