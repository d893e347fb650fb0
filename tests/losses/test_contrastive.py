"""The loss that training calls, in one process. Over ranks: test_distributed.py."""

import pytest
import torch
import torch.nn.functional as F

import mmbase.losses.contrastive
from mmbase.errors import MmbaseError
from mmbase.losses import ContrastiveLoss
from mmbase_kernels import clip_loss, sigmoid_loss


def output(rows=10, width=16, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {
        "image_features": F.normalize(torch.randn(rows, width, generator=draw), dim=1).to(dtype).requires_grad_(),
        "text_features": F.normalize(torch.randn(rows, width, generator=draw), dim=1).to(dtype).requires_grad_(),
        "logit_scale": torch.tensor(7.0, requires_grad=True),
        "logit_bias": torch.tensor(-3.0, requires_grad=True),
    }


@pytest.mark.parametrize("with_ids", [False, True])
def test_calls_the_kernels(with_ids):
    ids = torch.arange(10) % 7 if with_ids else None
    batch = output()
    want = clip_loss(**batch, image_ids=ids, text_ids=ids, label_smoothing=0.1)
    assert torch.equal(ContrastiveLoss("softmax", 0.1)(**batch, image_ids=ids, text_ids=ids), want)
    want = sigmoid_loss(**batch, image_ids=ids, text_ids=ids)
    assert torch.equal(ContrastiveLoss("sigmoid")(**batch, image_ids=ids, text_ids=ids), want)


def test_a_bias_takes_a_gradient_of_zero_under_a_softmax():
    batch = output()
    ContrastiveLoss()(**batch).backward()
    assert batch["logit_bias"].grad == 0


@pytest.mark.parametrize(
    ("device", "autocast", "dtype", "want"),
    [
        ("cuda", torch.bfloat16, torch.float32, torch.float16),
        ("cuda", torch.float16, torch.float32, torch.float16),
        ("cuda", torch.bfloat16, torch.bfloat16, None),
        ("cuda", None, torch.float32, None),
        ("cpu", torch.bfloat16, torch.float32, None),
    ],
)
def test_dtype_of_the_products(device, autocast, dtype, want, monkeypatch):
    """float32 unit vectors in float16 where autocast asks for 16 bits on a GPU; their own dtype everywhere else."""

    class Features:
        def __init__(self):
            self.device, self.dtype = torch.device(device), dtype

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == device and autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: autocast)
    assert mmbase.losses.contrastive.product_dtype(Features()) == want


def test_float32_products_under_autocast_on_a_cpu():
    batch = output()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ContrastiveLoss()(**batch)
    assert torch.equal(loss, ContrastiveLoss()(**batch))


@pytest.mark.gpu
def test_gradients_stay_float32_under_autocast_on_a_gpu():
    found = []
    for device, enabled in (("cpu", False), ("cuda", True)):
        batch = {name: tensor.detach().to(device).requires_grad_() for name, tensor in output(64, 64).items()}
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            ContrastiveLoss()(**batch).backward()
        found.append(batch["image_features"].grad)
    assert found[1].dtype == torch.float32
    assert (found[1].cpu() - found[0]).norm() <= 2e-3 * found[0].norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContrastiveLoss("sofmax"), "'sofmax'; did you mean 'softmax'"),
        (lambda: ContrastiveLoss(exchange="rings"), "'rings'; did you mean 'ring'"),
        (lambda: ContrastiveLoss("softmax", 1.0), r"must be in \[0, 1\), not 1.0"),
        (lambda: ContrastiveLoss("sigmoid", 0.1), "label_smoothing=0.1 is for the softmax loss"),
        (lambda: ContrastiveLoss("sigmoid")(**output() | {"logit_bias": None}), "model.init_logit_bias=-10"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(MmbaseError, match=message):
        make()
