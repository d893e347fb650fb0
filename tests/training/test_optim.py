"""Schedule, optimiser groups, Muon and the average of weights."""

import itertools
import math

import pytest
import torch
from torch import nn

from mmbase.training.config import TrainingConfig
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


def test_image_size_stages():
    config = TrainingConfig(image_sizes=[{"until": 0.25, "size": 16}, {"until": 0.5, "size": 24}])
    assert [config.image_size_at(p) for p in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [16, 16, 24, 24, None, None]
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
