"""The stand-ins for OpenCLIP's losses in one process: arguments, calls, mistakes. Over ranks: test_distributed.py."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from open_clip import loss as openclip

import mmbase.losses
from mmbase.errors import MmbaseError
from mmbase.losses import ClipLoss, SigLipLoss

PAIRS = [(ClipLoss, openclip.ClipLoss), (SigLipLoss, openclip.SigLipLoss)]


def features(rows=12, width=24, dtypes=(torch.float32, torch.float32)):
    draw = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(rows, width, generator=draw), dim=1)
    texts = F.normalize(images + torch.randn(rows, width, generator=draw), dim=1)
    return [tensor.to(dtype).requires_grad_() for tensor, dtype in zip((images, texts), dtypes)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_arguments_are_openclips(ours, theirs):
    """Every parameter of theirs is one of ours, at the same place, of the same default, and kept as an attribute."""
    for method in ("__init__", "forward"):
        mine = list(inspect.signature(getattr(ours, method)).parameters.values())
        for place, parameter in enumerate(inspect.signature(getattr(theirs, method)).parameters.values()):
            assert mine[place].name == parameter.name
            assert parameter.default in (mine[place].default, inspect.Parameter.empty)
    assert {"rank", "world_size", "cache_labels"} <= vars(ours()).keys()
    assert vars(ours(rank=0, world_size=1)).items() >= {"rank": 0, "world_size": 1}.items()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("scale", [torch.tensor(9.0), torch.tensor([9.0]), 9.0])
@pytest.mark.parametrize("bias", [None, torch.tensor(-2.0)])
def test_calls(ours, theirs, scale, bias):
    results = []
    for loss in (ours(), theirs()):
        leaves = features()
        out = loss(*leaves, scale, bias, output_dict=True)
        assert out.keys() == {"contrastive_loss"}
        out["contrastive_loss"].backward()
        results.append([out["contrastive_loss"].detach(), *(leaf.grad for leaf in leaves)])
        assert torch.equal(loss(*leaves, logit_scale=scale, logit_bias=bias), out["contrastive_loss"])
    for mine, other in zip(*results):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_features_of_two_dtypes_under_autocast(ours, theirs):
    """Autocast may leave one tower's features in float32: OpenCLIP's product is in bfloat16 then, ours in float32."""
    results = []
    for loss in (ours(), theirs()):
        leaves = features(dtypes=(torch.bfloat16, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            out = loss(*leaves, torch.tensor(9.0), torch.tensor(-2.0))
        out.backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for mine, other in zip(*results):
        assert (mine - other).norm() <= 2e-2 * other.norm()
    assert [gradient.dtype for gradient in results[0]] == [torch.float32, torch.bfloat16, torch.float32]
    with pytest.raises(ValueError, match="dtypes differ"):
        ours()(*features(dtypes=(torch.bfloat16, torch.float32)), torch.tensor(9.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod=True is not supported: .* torchrun"),
        (lambda: ClipLoss(rank=2, world_size=2), "rank=2 is no rank of world_size=2"),
        (lambda: ClipLoss(exchange="rnig"), "not 'rnig'; did you mean 'ring'"),
        (
            lambda: SigLipLoss(dist_impl="bidirectional"),
            "dist_impl must be one of .*'bidirectional'; did you mean 'bidir'",
        ),
        (lambda: SigLipLoss(world_size=0), "world_size=0"),
        (lambda: ClipLoss(world_size=2)(*features(), 1.0), "world_size=2 needs torch.distributed: call"),
        (lambda: SigLipLoss(world_size=2)(*features(), 1.0, 0.0), "world_size=2 needs torch.distributed: call"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(MmbaseError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_names_of_the_package():
    assert set(mmbase.losses.__all__) == set(dir(mmbase.losses))
    for name in mmbase.losses.__all__:
        assert getattr(mmbase.losses, name).__name__ == name
    with pytest.raises(AttributeError, match="CoCaLoss"):
        mmbase.losses.CoCaLoss  # noqa: B018
