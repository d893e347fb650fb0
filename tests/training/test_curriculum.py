"""Curricula: values over samples, steps of changing batches, resuming, cost, and what is refused."""

import itertools
import math

import pytest
import torch

from mmbase.data.mixture import MixtureOrder
from mmbase.data.order import SampleOrder
from mmbase.errors import MmbaseError
from mmbase.models.clip import CLIP
from mmbase.models.config import CLIPConfig, TextConfig
from mmbase.training.config import TrainingConfig
from mmbase.training.curriculum import Curriculum
from mmbase.training.curriculum_config import Schedule
from mmbase.training.flops import Shapes, step_work
from mmbase.training.schedule import learning_rate_factor
from mmbase.training.shorten import shorten

MODEL = CLIPConfig.model_validate(
    {
        "embed_dim": 16,
        "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2},
        "text": {"width": 32, "layers": 2, "heads": 2, "context_length": 16, "vocab_size": 50},
    }
)


def make(*schedules, steps=100, batch_size=64, model=MODEL, **settings):
    config = TrainingConfig(steps=steps, batch_size=batch_size, warmup_steps=0, **settings)
    return Curriculum([Schedule.model_validate(schedule) for schedule in schedules], model, config)


def test_values_over_samples():
    stages = make(
        {"what": "image_size", "values": [[0, 16], [0.5, 32]]},
        {"what": "patch_keep", "shape": "linear", "values": [[0, 0.25], [3200, 1]], "multiple": 0.25},
        {"what": "text_length", "shape": "cosine", "values": [[1600, 4], [4800, 16]]},
        {"what": "learning_rate", "shape": "linear", "values": [[0.8, 1], [1, 0]]},
        {"what": "lock_vision", "values": [[0, "all"], [3200, 1], [4800, 0]]},
        {"what": "lock_text", "shape": "constant", "values": 2},
    )
    assert stages.total == 6400
    at = stages.at
    assert [at(n).image_size for n in (0, 3199, 3200, 9999)] == [(16, 16), (16, 16), (32, 32), (32, 32)]
    assert [at(n).patch_keep for n in (0, 500, 1600, 3200)] == [0.25, 0.25, 0.75, 1.0]
    assert [at(n).text_length for n in (0, 1600, 3200, 4799, 4800)] == [4, 4, 10, 16, 16]
    assert [at(n).learning_rate for n in (0, 5120, 5760, 6400, 7000)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert [at(n).lock_vision for n in (0, 3200, 4800)] == [4, 1, 0]
    assert at(0).lock_text == 2 and at(0).batch_size == 64


def test_nothing_scheduled_is_the_model_itself():
    stages = make()
    assert stages.constant and stages.at(123)[:4] == ((32, 32), 1.0, 16, 64)
    assert list(itertools.islice(stages.steps(), 2)) == [(0, 0, 64), (1, 64, 64)]
    assert stages.step_count() == 100 and stages.loader_batch(2) == 64 and len(stages.describe()) == 1


def test_resume_continues_the_same_steps():
    stages = make({"what": "batch_size", "shape": "linear", "values": [[0, 16], [0.5, 64]], "multiple": 8})
    whole = list(stages.steps())
    sizes = [step.batch_size for step in whole]
    assert sizes == sorted(sizes) and set(sizes) == set(range(16, 65, 8)) and len(whole) == stages.step_count() > 100
    assert all(b.samples == a.samples + a.batch_size and b.step == a.step + 1 for a, b in itertools.pairwise(whole))
    assert whole[-1].samples < stages.total <= whole[-1].samples + whole[-1].batch_size
    for place in (0, 1, 40, len(whole) - 1):
        assert list(stages.steps(whole[place].samples)) == whole[place:]
    with pytest.raises(MmbaseError, match="no step of this curriculum begins after 17 samples"):
        next(stages.steps(17))


def test_streams_keep_one_batch_size():
    stages = make({"what": "batch_size", "values": [[0, 32], [0.25, 48], [0.5, 64]]})
    assert stages.loader_batch(1) == 16 and stages.loader_batch(4) == 16
    assert all(step.batch_size % 16 == 0 for step in stages.steps())
    with pytest.raises(MmbaseError, match="32 pairs cannot be divided among 3 ranks"):
        stages.loader_batch(3)


def test_image_sizes_are_a_schedule():
    settings = {"image_sizes": [{"until": 0.3, "size": 16}, {"until": 0.6, "size": 24}]}
    stages = make(**settings)
    for step in range(100):
        side = 16 if step < 30 else 24 if step < 60 else 32
        assert stages.at(step * 64).image_size == (side, side), step
    with pytest.raises(MmbaseError, match=r"image_size has two schedules \(training.image_sizes is one\)"):
        make({"what": "image_size", "values": [[0, 16]]}, **settings)


def test_other_proportions_are_kept():
    model = MODEL.model_copy(update={"vision": MODEL.vision.model_copy(update={"image_size": (32, 64)})})
    stages = make({"what": "image_size", "values": [[0, 16], [0.5, 32]]}, model=model)
    assert stages.at(0).image_size == (16, 32) and stages.at(6000).image_size == (32, 64)


def test_cost_is_that_of_the_steps():
    stages = make(
        {"what": "image_size", "shape": "linear", "values": [[0, 16], [0.7, 32]]},
        {"what": "patch_keep", "values": [[0, 0.5], [0.5, 1]]},
        {"what": "lock_vision", "values": [[0, 4], [0.25, 0]]},
    )
    steps = sum(
        step_work(MODEL, Shapes(64, stage.image_size, stage.patch_keep, 16, False, stage.lock_vision)).total.both
        for stage in (stages.at(step.samples) for step in stages.steps())
    )
    assert stages.flops_until(stages.total) == pytest.approx(steps, rel=0.01)  # stages may end within a step
    assert stages.flops_until(0) == 0 < stages.flops_until(64) < stages.flops_until(128)
    lines = stages.describe()
    share = stages.flops_until(stages.total) / make().flops_until(stages.total)
    assert f"{share:.2f} x that of the model's own sizes" in lines[-1] and share < 0.8
    assert "image tower locked" in lines[0] and "16 px, 50% of patches" in lines[0]


def test_cost_of_packed_texts():
    stages, packed = make(), make()
    packed.set_text_tokens(5.0)
    shapes = Shapes(64, (32, 32), text_length=5, packed=True)
    assert packed.flops_until(64) == step_work(MODEL, shapes).total.both < stages.flops_until(64)


def test_stages_run():
    stages = make(
        {"what": "image_size", "values": [[0, 16], [0.5, 32]]},
        {"what": "patch_keep", "values": [[0, 0.5], [0.5, 1]]},
        {"what": "text_length", "values": [[0, 5], [0.5, 16]]},
    )
    model = CLIP(MODEL).train()
    ids = torch.randint(1, 49, (2, 16))
    ids[:, -1] = 49
    for samples, tokens in ((0, 3), (6000, 17)):
        stage = stages.at(samples)
        model.visual.patch_dropout.rate = 1 - stage.patch_keep
        image, text = torch.randn(2, 3, *stage.image_size), shorten(ids, stage.text_length, MODEL.text)
        assert model.visual.embed(image).shape[1] == tokens and text.shape[1] == stage.text_length
        assert all(value.isfinite().all() for value in model(image, text).values())


def test_weights_of_a_mixture():
    stages = make(
        {"what": "source_weight", "source": 0, "shape": "constant", "values": 1.0},
        {"what": "source_weight", "source": 1, "values": [[0, 0.5], [0.5, 2.0]]},
        {"what": "source_weight", "source": 2, "shape": "cosine", "values": [[0, 1.0], [1.0, 0.0]]},
        steps=1000,
    )
    total, weights = stages.total, stages.source_weights()
    orders = [SampleOrder([100] * 2, seed=0, first_shard=2 * n) for n in range(3)]
    mixed = MixtureOrder(orders, [[(p * total, w) for p, w in weights[n]] for n in range(3)])
    for place in (0, total // 4, total // 2 - 1, total // 2, total // 2 + 1, total - 1):
        wave = (1 + math.cos(math.pi * place / total)) / 2
        expected = [1.0, 0.5 if place < total // 2 else 2.0, wave]
        got = mixed.shares(torch.tensor([place]).numpy(), normalised=False)[:, 0]
        assert got == pytest.approx(expected, abs=3e-3)


def test_learning_rate_over_samples():
    config = TrainingConfig(steps=100, batch_size=64, warmup_steps=10)
    for step in range(100):
        assert learning_rate_factor(step * 64 / 64, config) == learning_rate_factor(step, config)
    factors = [learning_rate_factor(samples / 64, config) for samples in range(0, 6400, 16)]
    assert max(factors) == 1.0 and factors[:37] == sorted(factors[:37]) and factors[40:] == sorted(factors[40:])[::-1]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"what": "image_size", "shape": "constant", "values": [[0, 16]]}, "takes one number"),
        ({"what": "image_size", "values": 16}, "takes points"),
        ({"what": "image_size", "values": [[0, 16], [0, 32]]}, "must rise"),
        ({"what": "image_size", "values": [[0, 16.5]]}, "whole numbers"),
        ({"what": "patch_keep", "values": [[0, 0]]}, "above 0 and at most 1"),
        ({"what": "batch_size", "values": [[0, 0]]}, "1 or more"),
        ({"what": "batch_size", "values": [[0, "all"]]}, "value of lock_vision"),
        ({"what": "lock_text", "shape": "linear", "values": [[0, 2], [1, 0]]}, "goes in steps"),
        ({"what": "source_weight", "values": [[0, 1]]}, "source names a part"),
        ({"what": "image_size", "source": 0, "values": [[0, 16]]}, "source names a part"),
        ({"what": "image_sizes", "values": [[0, 16]]}, "Input should be"),
    ],
)
def test_schedules_that_make_no_sense(schedule, message):
    with pytest.raises(ValueError, match=message):
        Schedule.model_validate(schedule)


def test_what_the_model_cannot_take():
    with pytest.raises(MmbaseError, match="image_size=4 is smaller than a patch of 8"):
        make({"what": "image_size", "values": [[0, 4]]})
    with pytest.raises(MmbaseError, match="text_length=20 exceeds the model's context_length of 16"):
        make({"what": "text_length", "values": [[0, 20]]})
    with pytest.raises(MmbaseError, match=r"points at \[3200, 2000\] of 6400 samples"):
        make({"what": "text_length", "values": [[0.5, 8], [2000, 16]]})


def test_texts_are_cut_before_their_end_token():
    ids = torch.tensor([[40, 1, 2, 3, 4, 49], [40, 5, 49, 0, 0, 0]])
    eot = TextConfig(vocab_size=50, context_length=6)
    assert shorten(ids, 4, eot).tolist() == [[40, 1, 2, 49], [40, 5, 49, 0]]
    eos = TextConfig(vocab_size=50, context_length=6, pool="eos", eos_id=4)
    assert shorten(torch.tensor([[7, 9, 9, 9, 4]]), 3, eos).tolist() == [[7, 9, 4]]
    mean = TextConfig(vocab_size=50, context_length=6, pool="mean")
    assert shorten(ids, 4, mean).tolist() == ids[:, :4].tolist()
    assert shorten(ids, 6, eot) is ids
    assert ids[0].tolist() == [40, 1, 2, 3, 4, 49]  # not changed in place
