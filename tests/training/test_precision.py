"""Precisions: what is chosen and refused, the scaled loss of float16, float8 through a stand-in for torchao."""

import math
import sys
import types

import pytest
import torch
from torch import nn

from mmbase.errors import MmbaseError
from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.big_batch import contrastive_step
from mmbase.training.config import TrainingConfig
from mmbase.training.optim import build_optimizer
from mmbase.training.precision import LossScaler, check_fp8, choose_precision, use_fp8

CPU = torch.device("cpu")


def tiny(width=32):
    torch.manual_seed(0)
    tower = {"width": width, "layers": 2, "heads": 2}
    config = {
        "embed_dim": 16,
        "vision": tower | {"image_size": 16, "patch_size": 8},
        "text": tower | {"vocab_size": 50, "context_length": 8},
    }
    return CLIP(CLIPConfig.model_validate(config)).train()


def parts():
    draw = torch.Generator().manual_seed(1)
    image, text = torch.randn(8, 3, 16, 16, generator=draw), torch.randint(1, 50, (8, 8), generator=draw)
    return [{"inputs": {"image": i, "text": t}} for i, t in zip(image.split(4), text.split(4))]


def test_names():
    assert choose_precision("fp32", CPU).dtype is None
    assert choose_precision("bf16", CPU).dtype == torch.bfloat16
    half = choose_precision("fp16", CPU)
    assert half.dtype == torch.float16 and half.needs_scaler
    assert not choose_precision("bf16", CPU).needs_scaler
    with pytest.raises(MmbaseError, match=r"must be one of auto, fp32, bf16, fp16, fp8, not 'fp61'.*'fp16'"):
        choose_precision("fp61", CPU)


def test_float16_gradients_are_those_of_float32():
    expected = tiny()
    contrastive_step(expected, parts(), ContrastiveLoss())
    model, scaler, precision = tiny(), LossScaler(CPU, factor=1024.0), choose_precision("fp16", CPU)
    contrastive_step(
        model, parts(), ContrastiveLoss(), autocast=lambda: precision.autocast(CPU), scale_loss=scaler.scale
    )
    scaler.unscale(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in expected.parameters()])
    for (name, ours), exact in zip(model.named_parameters(), expected.parameters()):
        assert (ours.grad - exact.grad).norm() <= 0.02 * exact.grad.norm() + 1e-4 * norm, name


def test_the_factor_falls_with_overflows_and_rises_after_steps_without():
    scaler, fine, over = LossScaler(CPU, factor=8.0, interval=3), torch.tensor(1.0), torch.tensor(math.inf)
    told, factors = [], []
    for norm in (over, fine, fine, fine, fine, torch.tensor(math.nan), fine, fine, fine):
        told.append(float(scaler.update(norm)))
        factors.append(float(scaler.factor))
    assert told == [1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert factors == [4, 4, 4, 8, 8, 4, 4, 4, 8]
    assert float(scaler.update(fine, torch.tensor(1.0))) == 1.0, "left out for another reason"
    other = LossScaler(CPU, interval=3)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict() == {"factor": 8.0, "good_steps": 1}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_overflows_changes_the_factor_alone(optimizer):
    model, scaler, precision = tiny(), LossScaler(CPU, factor=2.0**24), choose_precision("fp16", CPU)
    optimizers = build_optimizer(model, TrainingConfig(optimizer=optimizer, warmup_steps=0))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    changed = []
    for _ in range(24):
        contrastive_step(
            model,
            parts(),
            # Gradients that no float16 holds until the factor has fallen.
            lambda **output: 4096 * ContrastiveLoss()(**output),
            autocast=lambda: precision.autocast(CPU),
            scale_loss=scaler.scale,
        )
        scaler.unscale(model.parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = float(scaler.factor)
        optimizers.skip_where(scaler.update(norm))
        optimizers.step()
        optimizers.zero_grad()
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        changed.append(any(not torch.equal(value, start[name]) for name, value in model.state_dict().items()))
        assert changed[-1] or float(scaler.factor) == before / 2
        if changed[-1]:
            break
    assert changed[0] is False and changed[-1] is True


# ---------------------------------------------------------------------------------------------------------- float8


class Float8Linear(nn.Linear):
    """What torchao puts in place of a linear layer, without its arithmetic."""

    @classmethod
    def from_float(cls, module):
        with torch.device("meta"):
            new = cls(module.in_features, module.out_features, bias=False)
        new.weight, new.bias = module.weight, module.bias
        return new


@pytest.fixture
def torchao(monkeypatch):
    """A stand-in with the functions that are called, and their names for arguments."""
    stand_in, recipes = types.ModuleType("torchao.float8"), []

    class Float8LinearConfig:
        @classmethod
        def from_recipe_name(cls, recipe_name):
            recipes.append(recipe_name)
            return cls()

    def convert_to_float8_training(module, *, module_filter_fn=None, config=None):
        assert isinstance(config, Float8LinearConfig)
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.Linear) and module_filter_fn(child, name):
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, Float8Linear.from_float(child))
        return module

    stand_in.Float8LinearConfig = Float8LinearConfig
    stand_in.convert_to_float8_training = convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)
    return recipes


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_float8_in_the_blocks_alone(torchao, monkeypatch):
    on_a_gpu(monkeypatch, (9, 0))
    precision = choose_precision("fp8", torch.device("cuda"))
    assert precision.fp8 and precision.dtype == torch.bfloat16 and not precision.needs_scaler
    model, expected = tiny(), tiny()
    assert use_fp8(model) == 2 * 2 * 4 and torchao == ["rowwise"]
    changed = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert {name.rpartition(".")[2] for name in changed} == {"qkv", "proj", "fc1", "fc2"}
    assert all(".blocks." in name for name in changed)
    assert list(model.state_dict()) == list(expected.state_dict()), "checkpoints keep their names"
    for each in (model, expected):
        contrastive_step(each, parts(), ContrastiveLoss())
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(MmbaseError, match="multiples of 16"):
        use_fp8(tiny(width=36))


def test_float8_is_refused_where_it_cannot_be(monkeypatch):
    with pytest.raises(MmbaseError, match=r"needs a GPU .*, not cpu; use training\.precision=bf16"):
        choose_precision("fp8", CPU)
    on_a_gpu(monkeypatch, (8, 0))
    with pytest.raises(MmbaseError, match=r"8\.9 or more.*a GPU has 8\.0"):
        check_fp8(torch.device("cuda"))
    on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MmbaseError, match=r"needs torchao.*pip install torchao"):
        check_fp8(torch.device("cuda"))
