"""The head through PyTorch's operations, the reference, what is asked of the table of measurements, and refusals."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mmbase_kernels import head

from .rows import NARROW, assert_close_to_float64, head_case

module = sys.modules[head.__module__]  # the package's attribute of that name is the function
DTYPES = [torch.float32, *NARROW]
TOKENS = torch.tensor([4, 0, 2])
PLACES = torch.tensor([11, 3, 5, 3])
"""Of a packed batch; one of them twice."""
KINDS = {
    "tokens": ((3, 5), TOKENS),
    "narrow tokens": ((3, 5), TOKENS.int()),
    "first": ((3, 5), 0),
    "last": ((3, 5), -1),
    "packed": ((12,), PLACES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
def test_error_against_float64(kind, dtype, impl, normalize):
    shape, token = KINDS[kind]
    case = head_case(shape, 100, 33, token, dtype, normalize=normalize)
    assert_close_to_float64(case, impl=impl)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_is_pytorchs_to_the_bit(kind):
    shape, token = KINDS[kind]
    for dtype in DTYPES:
        case = head_case(shape, 64, 32, token, dtype)
        for ours, theirs in zip(case.run(), case.by_pytorch(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("embed", "bias", "eps"), [(None, True, 1e-5), (24, False, 0.2), (None, False, 1e-5)])
def test_without_a_projection_or_biases(impl, embed, bias, eps):
    assert_close_to_float64(head_case((3, 5), 40, embed, TOKENS, torch.float32, bias=bias, eps=eps), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_features_are_float32_and_of_unit_length(impl):
    for dtype in (*DTYPES, torch.float64):
        case = head_case((3, 5), 40, 24, TOKENS, dtype)
        features = case.run(impl=impl)[0]
        assert features.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(features.double().norm(dim=1), torch.ones(3).double(), rtol=0, atol=1e-6)
        assert case.operator(*case.leaves, token=TOKENS, normalize=False, impl=impl).dtype == dtype


def test_autocast_projects_in_16_bits():
    case = head_case((3, 5), 40, 24, TOKENS, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.operator(*case.leaves, token=0, normalize=False).dtype == torch.bfloat16
        assert case.operator(*case.leaves, token=0).dtype == torch.float32


def test_no_sequences():
    for shape, token in (((0, 5), 1), ((0, 5), TOKENS[:0]), ((7,), TOKENS[:0])):
        for impl in ("torch", "reference"):
            out, grad_x, *_ = head_case(shape, 16, 8, token, torch.float32).run(impl=impl)
            assert out.shape == (0, 8) and not grad_x.any()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_compiles_as_one_graph_and_exports(impl):
    torch._dynamo.reset()
    case = head_case((3, 5), 40, 24, TOKENS, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x, token, *weights):
            return head(x, token, *weights, impl=impl) + head(x, 0, *weights, impl=impl)

    x, *weights = case.leaves
    want = Layer()(x, TOKENS, *weights)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    batch = {0: torch.export.Dim("batch")}
    shapes = {"x": batch, "token": batch, "weights": (None,) * len(weights)}
    program = torch.export.export(Layer(), (x, TOKENS, *weights), dynamic_shapes=shapes)
    for got in (compiled(x, TOKENS, *weights), program.module()(x, TOKENS, *weights)):
        torch.testing.assert_close(got, want)
    fewer = x[:2], TOKENS[:2], *weights
    torch.testing.assert_close(program.module()(*fewer), Layer()(*fewer))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_table_of_measurements_is_asked(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "choose_measured", lambda *a, **k: asked.append((a, k)) or "torch")
    shape, token = KINDS[kind]
    head_case(shape, 16, 8, token, torch.float32).run()
    ((operator, impl, x), rest), *_ = asked
    assert (operator, impl, x.shape[-1]) == ("head", "auto", 16)
    assert rest == {"size": 4 if kind == "packed" else 3, "obstacle": ""}


X, NORM, PROJECTION = torch.zeros(3, 5, 16), torch.ones(16), torch.ones(8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(16)}, r"x must be \[B, N, D\], or \[P, D\] of a packed batch, not \[16\]"),
        ({"token": 5}, "token must be one of the 5 of a sequence, not 5"),
        ({"token": -6}, "token must be one of the 5 of a sequence, not -6"),
        ({"x": torch.zeros(3, 0, 16)}, "token must be one of the 0 of a sequence, not 0"),
        ({"x": X[0]}, r"token must be a tensor of places in the packed x \[5, 16\], not 0"),
        ({"x": X[0], "token": TOKENS[None]}, r"token must be \[B\], one place of each sequence, not \[1, 3\]"),
        ({"token": TOKENS[:2]}, r"token must be \[3\], one of each sequence, not \[2\]"),
        ({"token": TOKENS.float()}, r"token must be int64 or int32, not torch.float32: convert it with .long\(\)"),
        ({"token": TOKENS.to("meta")}, "devices differ: token on meta, x on cpu; move one of them"),
        ({"token": TOKENS + 1}, r"token must be from 0 to 4, the last of x \[3, 5, 16\], not 5"),
        ({"token": TOKENS - 1}, "token must be from 0 to 4, .* not -1"),
        ({"x": X[0], "token": PLACES}, r"token must be from 0 to 4, the last of x \[5, 16\], not 11"),
        ({"norm_weight": torch.ones(8)}, r"weight must be \[16\], as wide as x \[3, 5, 16\], not \[8\]"),
        ({"projection_weight": torch.ones(16, 8)}, r"projection_weight must be \[E, 16\], as wide as x .* \[16, 8\]"),
        ({"projection_weight": PROJECTION.to("meta")}, "devices differ: projection_weight on meta, x on cpu"),
        ({"projection_bias": torch.ones(16)}, r"projection_bias must be \[8\], not \[16\]"),
        (
            {"projection_weight": None, "projection_bias": torch.ones(8)},
            r"projection_bias \[8\] goes with projection_w",
        ),
        ({"impl": "cublas"}, "impl must be one of auto, triton, torch, reference, not 'cublas'"),
        ({"impl": "triton"}, "impl='triton' cannot run: it needs a CUDA device"),
    ],
)
def test_bad_input_is_named(arguments, message):
    defaults = {"x": X, "token": 0, "norm_weight": NORM, "norm_bias": None, "projection_weight": PROJECTION}
    with pytest.raises(ValueError, match=message) as caught:
        head(**defaults | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "embed"), [(100, 33), (768, 512), (1664, 1280), (512, None)])
@pytest.mark.parametrize("normalize", [True, False])
def test_triton_on_a_gpu(kind, dtype, width, embed, normalize):
    shape, token = KINDS[kind]
    case = head_case(shape, width, embed, token, dtype, normalize=normalize, device="cuda")
    assert_close_to_float64(case, impl="triton")
    for a, b in zip(case.run(impl="triton"), case.run(impl="triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_token_beyond_its_sequence_on_a_gpu():
    case = head_case((3, 5), 64, 32, TOKENS + 2, torch.bfloat16, device="cuda")
    features = case.operator(*case.leaves, token=(TOKENS + 2).cuda(), impl="triton")
    assert features[0].isnan().all() and features[1:].isfinite().all()


@pytest.mark.gpu
def test_autocast_with_float32_weights_on_a_gpu():
    case = head_case((3, 5), 64, 32, TOKENS, torch.float32, device="cuda")
    x = case.leaves[0].bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = (case.operator(x, *case.leaves[1:], token=TOKENS.cuda(), impl=i) for i in ("triton", "torch"))
    assert ours.dtype == theirs.dtype == torch.float32
    assert F.cosine_similarity(ours, theirs).min() >= 0.9999
