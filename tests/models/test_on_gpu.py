"""Whole models on a CUDA device against the same on a CPU: padded and packed, by every kernel, compiled."""

import pytest
import torch

from .tiny import WAYS, assert_equal_to_rounding, step, tiny_batch, tiny_model

pytestmark = pytest.mark.gpu


def moved(batch):
    """The batch on the device, a list of images too."""
    images, texts = batch
    images = images.cuda() if isinstance(images, torch.Tensor) else [image.cuda() for image in images]
    return images, texts.to("cuda")


def on_cpu(tensors):
    return {name: value.float().cpu() for name, value in tensors.items()}


@pytest.fixture
def exact_products():
    """Without TF32, which convolutions take by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", ["", "triton", "torch", "reference"])
def test_float32_equals_the_cpu(way, kernels, monkeypatch, exact_products):
    model = tiny_model()
    batch = tiny_batch(model, way, rows=6)
    expected = step(model, model, batch)
    monkeypatch.setenv("MMBASE_KERNELS", kernels)
    model.cuda()
    assert_equal_to_rounding(on_cpu(step(model, model, moved(batch))), expected, 1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_near_float32(dtype, way, kernels, monkeypatch):
    model = tiny_model()
    batch = tiny_batch(model, way, rows=6)
    expected = step(model, model, batch)
    monkeypatch.setenv("MMBASE_KERNELS", kernels)
    model.cuda()

    def run(images, texts):
        with torch.autocast("cuda", dtype):
            return model(images, texts)

    found = on_cpu(step(model, run, moved(batch)))
    features = {name: expected[name] for name in ("image_features", "text_features")}
    assert_equal_to_rounding({name: found[name] for name in features}, features, 3e-2)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_compiled_equals_eager(kernels, monkeypatch, exact_products):
    """By Inductor; padded, for which the whole model is one graph."""
    monkeypatch.setenv("MMBASE_KERNELS", kernels)
    model = tiny_model().cuda()
    batch = moved(tiny_batch(model, "dense", rows=6))
    expected = step(model, model, batch)
    found = step(model, torch.compile(model, fullgraph=True), batch)
    assert_equal_to_rounding(on_cpu(found), on_cpu(expected), 1e-4)
