"""Schedule, optimiser groups, Muon and the average of weights."""

import itertools
import math

import pytest
import torch
from torch import nn

from mmbase.losses.contrastive import ContrastiveLoss
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig
from mmbase.training.big_batch import contrastive_step
from mmbase.training.config import TrainingConfig
from mmbase.training.depth import TowerLocks, depth_of
from mmbase.training.muon import Muon, orthogonalise
from mmbase.training.optim import WeightAverage, build_optimizer
from mmbase.training.schedule import learning_rate_factor


def test_schedule_rises_peaks_and_ends():
    config = TrainingConfig(steps=100, warmup_steps=10, final_share=0.1)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert learning_rate_factor(99, config.model_copy(update={"schedule": "constant"})) == 1.0
    assert learning_rate_factor(55, config.model_copy(update={"schedule": "linear"})) == pytest.approx(0.55)


def test_image_size_stages_must_rise():
    with pytest.raises(ValueError, match="end later"):
        TrainingConfig(image_sizes=[{"until": 0.5, "size": 16}, {"until": 0.5, "size": 24}])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.positional_embedding = nn.Parameter(torch.zeros(7, 4))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups(optimizer):
    model = Small()
    parts = build_optimizer(model, TrainingConfig(optimizer=optimizer, weight_decay=0.3)).parts
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for part in parts for g in part.param_groups for p in g["params"]}
    assert {n for n, value in decay.items() if value} == {"embedding.weight", "conv.weight"}
    assert set(decay) == set(names.values()) - {"frozen"}
    muon = [p for part in parts if isinstance(part, Muon) for g in part.param_groups for p in g["params"]]
    assert [names[id(p)] for p in muon] == (["conv.weight"] if optimizer == "muon" else [])


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalised_singular_values_are_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(matrix, torch.float32)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (out * (left @ right)).sum() / (out.norm() * (left @ right).norm()) > 0.95


def test_muon_fits_a_matrix_and_refuses_vectors():
    torch.manual_seed(0)
    weight, target = nn.Parameter(torch.zeros(6, 9)), torch.randn(6, 9)
    optimizer = Muon([weight], lr=0.1, dtype=torch.float32)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).norm() < 0.05 * target.norm()
    with pytest.raises(ValueError, match=r"\[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_average_of_weights_follows_the_formula():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, decay=0.9)
    expected = model.weight.detach().clone()
    for count, value in enumerate((2.0, 3.0, 5.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        model.num_batches_tracked += 1
        average.update(model)
        decay = min(0.9, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(average.averaged["weight"], expected)
    assert int(average.averaged["num_batches_tracked"]) == 3
    assert math.isclose(float(average.averaged["bias"].sum()), 0.0)


def test_average_of_weights_is_saved_and_restored():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(4.0)
    average.update(model)
    other = WeightAverage(nn.BatchNorm1d(2), decay=0.9)
    other.load_state_dict(average.state_dict())
    assert other.updates == 1
    assert all(torch.equal(other.averaged[name], value) for name, value in average.averaged.items())
    assert other.averaged["weight"] is not average.averaged["weight"]


def tiny(**vision):
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 2, "heads": 2}
    config = {
        "embed_dim": 16,
        "vision": tower | {"image_size": 16, "patch_size": 8} | vision,
        "text": tower | {"vocab_size": 50, "context_length": 8},
    }
    return CLIP(CLIPConfig.model_validate(config)).train()


def backward(model):
    draw = torch.Generator().manual_seed(1)
    inputs = {"image": torch.randn(6, 3, 16, 16, generator=draw), "text": torch.randint(1, 50, (6, 8), generator=draw)}
    contrastive_step(model, [{"inputs": inputs}], ContrastiveLoss())


def snapshot(model, optimizers):
    """Weights and everything the optimisers keep."""
    states = [
        value for state in optimizers.state_dict() for entry in state["state"].values() for value in entry.values()
    ]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *states)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_no_bit(optimizer):
    """Whatever the gradients hold; and the next step is the one that would have come without it."""
    config = TrainingConfig(optimizer=optimizer, warmup_steps=0)
    model, reference = tiny(), tiny()
    optimizers, untouched = build_optimizer(model, config), build_optimizer(reference, config)
    for each, parts in ((model, optimizers), (reference, untouched)):
        backward(each)
        parts.skip_where(torch.tensor(0.0))
        parts.step()
    before = snapshot(model, optimizers)
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    optimizers.skip_where(torch.tensor(1.0))
    optimizers.step()
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(model, optimizers), strict=True))
    for each, parts in ((model, optimizers), (reference, untouched)):
        each.zero_grad()
        backward(each)
        parts.step()  # what was said of the step before does not hold for this one
    after, expected = snapshot(model, optimizers), snapshot(reference, untouched)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, expected, strict=True))
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_depths():
    model = tiny()
    found = {name: depth_of(model, name) for name, _ in model.named_parameters()}
    assert found.pop("logit_scale") is None
    assert all(depth.groups == 4 for depth in found.values())
    groups = {name: (depth.tower, depth.group) for name, depth in found.items()}
    for name in ("class_embedding", "positional_embedding", "stem.weight", "norm_pre.weight"):
        assert groups[f"visual.{name}"] == ("vision", 0)
    assert groups["text.token_embedding.weight"] == ("text", 0)
    assert groups["visual.transformer.blocks.0.norm1.weight"] == ("vision", 1)
    assert groups["text.transformer.blocks.1.mlp.fc2.bias"] == ("text", 2)
    for name in ("visual.norm.weight", "visual.proj.weight"):
        assert groups[name] == ("vision", 3)
    assert found["visual.transformer.blocks.0.norm1.weight"].above == 2
    pooled = tiny(class_token=False, pool="attention")
    assert depth_of(pooled, "visual.attention_pool.query").group == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_fall_towards_the_input(optimizer):
    model = tiny()
    config = TrainingConfig(optimizer=optimizer, learning_rate=1e-3, muon_learning_rate=1e-2)
    optimizers = build_optimizer(model, config, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["initial_lr"] for g in optimizers.groups() for p in g["params"]}
    assert set(rates) == set(names.values())
    hidden = 1e-2 if optimizer == "muon" else 1e-3
    assert rates["logit_scale"] == rates["visual.proj.weight"] == rates["text.norm.bias"] == 1e-3
    assert rates["visual.transformer.blocks.1.attn.qkv.weight"] == pytest.approx(hidden / 2)
    assert rates["visual.transformer.blocks.0.attn.qkv.weight"] == pytest.approx(hidden / 4)
    assert rates["visual.class_embedding"] == rates["text.token_embedding.weight"] == pytest.approx(1e-3 / 8)
    optimizers.scale_learning_rates(0.1)
    assert {names[id(p)]: g["lr"] for g in optimizers.groups() for p in g["params"]} == pytest.approx(
        {name: 0.1 * rate for name, rate in rates.items()}
    )
    alike = build_optimizer(model, config, layer_decay=1.0)
    assert sum(1 for _ in alike.groups()) == sum(1 for _ in build_optimizer(model, config).groups())


def test_locks_come_and_go_between_steps():
    model = tiny(stem="conv", stem_channels=[8], stem_blocks=[1], stem_norm="batch", position_embedding="sincos")
    assert not model.visual.positional_embedding.requires_grad
    locks, optimizers = TowerLocks(model), build_optimizer(model, TrainingConfig(optimizer="muon"))

    def step(vision, text):
        model.train()  # as evaluation within training leaves it
        changed = locks.set(vision, text)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizers.zero_grad()
        backward(model)
        optimizers.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        return changed, moved

    buffers = {name for name, _ in model.named_buffers()}
    everything = set(model.state_dict()) - {"visual.positional_embedding"}
    assert step(0, 0) == (False, everything)
    changed, moved = step(2, 4)
    assert changed
    free = ("logit_scale", "visual.transformer.blocks.1.", "visual.norm.", "visual.proj.")
    assert moved == {name for name in everything if name.startswith(free)}
    assert step(2, 4) == (False, moved)
    assert all(p.grad is None for p in model.text.parameters())
    assert step(0, 0) == (True, everything), "and what was never trained stays locked"
    assert buffers <= everything
