"""Noise of the towers by key: the hash itself, and the same noise in every way of running a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.keyed import counted, draw, unit
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.models.noise import Dropout, DropPath, PatchDropout

from .shrunk import randomise, relative

ROWS = 6
NOISE = {"dropout": 0.2, "drop_path": 0.5}


def tiny(vision: dict | None = None, **both: object) -> CLIP:
    torch.manual_seed(0)
    tower = {"width": 30, "heads": 2, "layers": 2} | NOISE | both  # a width that is no multiple of four
    config = {
        "embed_dim": 16,
        "vision": tower | {"image_size": 16, "patch_size": 4, "patch_dropout": 0.5} | (vision or {}),
        "text": tower | {"vocab_size": 50, "context_length": 9},
    }
    return randomise(CLIP(CLIPConfig.model_validate(config))).train()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 49, (ROWS, 9), generator=generator)
    for row in range(ROWS):
        text[row, 2 + row], text[row, 3 + row :] = 49, 0
    keys = torch.randint(-(1 << 62), 1 << 62, (ROWS,), generator=generator)
    return {"image": torch.randn(ROWS, 3, 16, 16, generator=generator), "text": text, "keys": keys}


def features(model: CLIP, **inputs: object) -> Tensor:
    out = model(**inputs)  # pyrefly: ignore[bad-argument-type]
    return torch.cat([out["image_features"], out["text_features"]], dim=1)


def gradients(model: CLIP, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = {name: value for name, value in found.items() if name != "logit_scale"}  # has none, or zeros if compiled
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-6 * scale, name


def test_the_hash_is_splitmix64() -> None:
    mask = (1 << 64) - 1

    def reference(key: int, place: int) -> int:
        z = (key + place * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    # of a generator seeded with 1234567, as its author publishes it
    assert reference(1234567, 1) == 6457827717110365317
    keys, places = [0, 1, -1, 1234567, -(1 << 63), (1 << 63) - 1], [1, 2, 77, -2, 1 << 40]
    expected = np.array([[reference(k & mask, p) for p in places] for k in keys], np.uint64).view(np.int64)
    found = draw(torch.tensor(keys)[:, None], torch.tensor(places))
    assert found.tolist() == expected.tolist()
    assert [draw(torch.tensor(keys), place).tolist() for place in places] == expected.T.tolist()


def test_numbers_are_uniform_and_unrelated() -> None:
    numbers = unit(counted(torch.arange(400), 400)).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.005)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.002)
    for other in (numbers.roll(1, 0), numbers.roll(1, 1), numbers.T):
        assert abs(torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1]) < 0.01


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_dropout_has_its_rate_everywhere(rate: float) -> None:
    keys = torch.arange(100)
    out = Dropout(rate)(torch.ones(100, 50, 66), None, keys)
    kept = (out != 0).double()
    deviation = (rate * (1 - rate)) ** 0.5
    for axes in ((1, 2), (0, 2), (0, 1)):
        count = kept.mean(axes).shape[0]
        error = (kept.mean(axes) - (1 - rate)).abs().max()
        assert error < 5 * deviation * (count / kept.numel()) ** 0.5 + 1e-5
    assert out.mean().item() == pytest.approx(1.0, abs=6 * (rate / (1 - rate) / kept.numel()) ** 0.5)
    assert Dropout(rate).eval()(out, None, keys) is out


def test_drop_path_and_patch_dropout_have_their_rates() -> None:
    keys = draw(torch.arange(20000), 5)
    assert DropPath(0.25)(torch.ones(20000, 1, 1), None, keys).mean().item() == pytest.approx(1.0, abs=0.02)
    x = torch.arange(20.0).view(1, 20, 1).expand(2000, 20, 1)
    kept = PatchDropout(0.6)(x, keys[:2000])
    assert kept.shape == (2000, 8, 1)
    assert all(len(set(row)) == 8 for row in kept[:, :, 0].tolist())
    assert (kept[:, :, 0].long().flatten().bincount() / 2000 - 0.4).abs().max() < 0.05


def test_noise_is_the_samples_own() -> None:
    model, whole = tiny(), batch()
    state = torch.get_rng_state()
    out = features(model, **whole)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is left alone"
    expected = gradients(model, out)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    parts = [{name: value[rows] for name, value in whole.items()} for rows in order.split([1, 3, 2])]
    split = torch.cat([features(model, **part) for part in parts])[order.argsort()]
    assert relative(split, out) <= 2e-6
    assert_same(gradients(model, split), expected)
    other = features(model, **(whole | {"keys": whole["keys"] + 1}))
    assert all(relative(other[row], out[row]) > 0.01 for row in range(ROWS))
    model.eval()
    assert torch.equal(features(model, **whole), features(model, **(whole | {"keys": None})))


def test_towers_and_layers_draw_different_numbers() -> None:
    """Every draw of a sample has a place of its own."""
    model, whole = tiny(), batch()
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Dropout | DropPath | PatchDropout):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[-1].clone()))
    model(**whole)
    assert len(seen) == 1 + 2 * (1 + 2 + 4), "patches; each tower's dropout, that of 2 blocks, drop paths of the second"
    assert len(torch.cat(seen).unique()) == len(seen) * ROWS


@pytest.mark.parametrize("pool", ["class", "average"])
def test_packed_images_and_texts_meet_the_same_noise(pool: str) -> None:
    model, whole = tiny({"pool": pool}), batch()
    out = features(model, **whole)
    ids = whole["text"]
    padded = model.text(torch.cat([ids]).as_subclass(Unpacked), normalize=True, keys_B=draw(whole["keys"], 202))
    assert relative(out[:, 16:], padded.as_subclass(Tensor)) <= 2e-6
    packed = features(model, image=list(whole["image"]), text=model.text.pack(ids), keys=whole["keys"])
    assert relative(packed, out) <= 2e-6
    assert_same(gradients(model, packed), gradients(model, features(model, **whole)))


class Unpacked(Tensor):
    """Ids that the tower does not pack by itself."""


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_noise_repeats_where_it_is_computed_in_another_way(way: str) -> None:
    model, whole = tiny(), batch()
    whole["text"] = model.text.pack(whole["text"])
    out = features(model, **whole)
    expected = gradients(model, out)
    run = model
    if way == "checkpointed":
        for tower in (model.visual, model.text):
            tower.transformer.checkpoint_activations = True
    else:
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = features(run, **whole)
    assert relative(again, out) <= 2e-6
    assert_same(gradients(model, again), expected)


@pytest.mark.parametrize("keys", [torch.zeros(1, dtype=torch.int64), torch.zeros(ROWS)])
def test_keys_that_are_none(keys: Tensor) -> None:
    with pytest.raises(MmbaseError, match=r"keys must be int64 of shape \[6\]"):
        tiny()(**(batch() | {"keys": keys}))
