"""A split batch has the gradients of the whole one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mmbase.errors import MmbaseError
from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.big_batch import contrastive_step

PAIRS = 12


def build(loss: str = "softmax", text: dict | None = None, **vision: object) -> CLIP:
    torch.manual_seed(0)
    bias = -10.0 if loss == "sigmoid" else None
    tower = {"width": 32, "layers": 2, "heads": 2}
    config = CLIPConfig.model_validate(
        {
            "embed_dim": 16,
            "vision": tower | {"image_size": 16, "patch_size": 4} | vision,
            "text": tower | {"vocab_size": 50, "context_length": 8} | (text or {}),
            "init_logit_bias": bias,
        }
    )
    return CLIP(config).train()


def inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(PAIRS, 3, 16, 16, generator=draw),
        "text": torch.randint(1, 50, (PAIRS, 8), generator=draw),
    }


def split(sizes: list[int], ids: torch.Tensor | None = None) -> list[dict]:
    whole = inputs()
    pieces = zip(whole["image"].split(sizes), whole["text"].split(sizes))
    parts: list[dict] = [{"inputs": {"image": image, "text": text}} for image, text in pieces]
    if ids is not None:
        for part, piece in zip(parts, ids.split(sizes)):
            part["ids"] = piece
    return parts


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each gradient's largest number, or of a hundredth of all gradients' where that is larger."""
    assert found.keys() == expected.keys()
    floor = 0.01 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=floor)
        assert error <= 1e-5, f"{name}: {error}"


def gradients(model: CLIP) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ids", [None, torch.arange(PAIRS) // 2], ids=["no ids", "ids"])
def test_a_split_batch_has_the_gradients_of_the_whole(loss, ids):
    model, compute_loss = build(loss), ContrastiveLoss(loss)
    whole = contrastive_step(model, split([PAIRS], ids), compute_loss)
    expected = gradients(model)
    for sizes in ([4, 4, 4], [5, 5, 2], [1] * PAIRS):
        model.zero_grad()
        step = contrastive_step(model, split(sizes, ids), compute_loss)
        assert step.loss == pytest.approx(whole.loss.item(), rel=1e-6)
        assert step.logit_scale == whole.logit_scale
        assert_equal(gradients(model), expected)


def test_dropped_patches_are_dropped_again():
    """Gradients of what was drawn in the first pass: compared with one graph over all parts, drawn from one state."""
    model, compute_loss = build(patch_dropout=0.5), ContrastiveLoss()
    parts = split([4, 4, 4])
    torch.manual_seed(3)
    outputs = [model(**part["inputs"]) for part in parts]
    features = {name: torch.cat([o[name] for o in outputs]) for name in ("image_features", "text_features")}
    expected_loss = compute_loss(**features, logit_scale=outputs[0]["logit_scale"])
    expected_loss.backward()
    after = torch.get_rng_state()
    expected = gradients(model)

    model.zero_grad()
    torch.manual_seed(3)
    step = contrastive_step(model, parts, compute_loss)
    assert step.loss == pytest.approx(expected_loss.item(), rel=1e-6)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn later must not depend on the split"
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_noise_by_key_is_that_of_the_whole_batch(checkpoint_activations):
    """Patch dropout, drop path and dropout: a split batch has the gradients of the whole one, which packs otherwise."""
    noise = {"dropout": 0.1, "drop_path": 0.5, "checkpoint_activations": checkpoint_activations}
    model, compute_loss = build(patch_dropout=0.5, text=noise, **noise), ContrastiveLoss()
    keys = torch.randint(-(1 << 62), 1 << 62, (PAIRS,), generator=torch.Generator().manual_seed(2))

    def keyed(sizes: list[int]) -> list[dict]:
        parts = split(sizes)
        for part, piece in zip(parts, keys.split(sizes)):
            part["inputs"] |= {"keys": piece, "text": model.text.pack(part["inputs"]["text"])}
        return parts

    whole = contrastive_step(model, keyed([PAIRS]), compute_loss)
    expected = gradients(model)
    for sizes in ([5, 5, 2], [1] * PAIRS):
        model.zero_grad()
        assert contrastive_step(model, keyed(sizes), compute_loss).loss == pytest.approx(whole.loss.item(), rel=1e-6)
        assert_equal(gradients(model), expected)
    model.zero_grad()
    keys += 1
    contrastive_step(model, keyed([PAIRS]), compute_loss)
    with pytest.raises(AssertionError):
        assert_equal(gradients(model), expected)


def test_only_the_last_part_exchanges_gradients():
    told: list[bool] = []

    @contextlib.contextmanager
    def accumulating(last: bool):
        told.append(last)
        yield

    contrastive_step(build(), split([4, 4, 4]), ContrastiveLoss(), accumulating=accumulating)
    assert told == [False, False, True]


def test_gradients_are_added_and_scaled():
    model, compute_loss = build(), ContrastiveLoss()
    contrastive_step(model, split([6, 6]), compute_loss)
    once = gradients(model)
    contrastive_step(model, split([6, 6]), compute_loss, scale_loss=lambda loss: 8 * loss)
    assert_equal(gradients(model), {name: 9 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize(("locked", "other"), [("visual", "text"), ("text", "visual")])
def test_a_locked_tower_gets_no_gradient_and_is_not_run_twice(locked, other):
    model = build()
    getattr(model, locked).requires_grad_(False)
    contrastive_step(model, split([PAIRS]), ContrastiveLoss())
    expected = gradients(model)
    model.zero_grad()
    calls = dict.fromkeys((locked, other), 0)
    for name in calls:
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    contrastive_step(model, split([4, 4, 4]), ContrastiveLoss())
    assert calls == {locked: 3 + 1, other: 3 + 3}, "the first part tells that there is no gradient"
    assert_equal(gradients(model), expected)
    assert all(p.grad is None for p in getattr(model, locked).parameters())
    assert all(p.grad is not None for p in getattr(model, other).parameters())


def test_generators_of_the_device_are_found_in_lists_and_packed_texts():
    from mmbase.training.big_batch import _device

    model, meta = build(), torch.device("meta")
    packed = model.text.pack(torch.tensor([[3, 49, 0], [3, 4, 49]])).to(meta)
    assert _device([packed]) == _device([[torch.zeros(3, 4, 4, device=meta)]]) == meta
    assert _device([None]) == torch.device("cpu")


def test_batch_normalisation_is_refused():
    model = build(stem="conv", stem_channels=[8, 8], stem_blocks=[1, 1], stem_norm="batch")
    with pytest.raises(MmbaseError, match=r"visual\.stem.*normalises as a whole.*stem_norm=group"):
        contrastive_step(model, split([6, 6]), ContrastiveLoss())
    contrastive_step(model, split([PAIRS]), ContrastiveLoss())


def test_no_parts():
    with pytest.raises(MmbaseError, match="at least one part"):
        contrastive_step(build(), [], ContrastiveLoss())
