"""The losses over 1, 2 and 4 processes: equal to one process with the whole batch, and to OpenCLIP's own classes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmbase.losses import distributed_clip_loss, distributed_sigmoid_loss
from mmbase_kernels import clip_loss, sigmoid_loss

from ..worlds import run_worker
from . import gloo_worker as worker

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """``ranks(world_size)``: what every rank found, from one start of all processes."""
    return run_worker(Path(worker.__file__), tmp_path_factory.mktemp("gloo"), WORLDS, timeout=240)


def float64_loss(kind, images, texts, scale, bias, ids, smoothing):
    logits = scale * images @ texts.T + bias
    match = torch.eye(len(images), dtype=torch.bool) if ids is None else ids[:, None] == ids
    if kind == "sigmoid":
        return -F.logsigmoid(torch.where(match, 1.0, -1.0) * logits).sum() / len(logits)
    target = (1 - smoothing) * match.double() / match.sum(1, keepdim=True) + smoothing / len(images)
    return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum() / len(images) / 2


def relative(got, want):
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def scale_error(got, want, images, grad_images):
    """Error of the scale's gradient, relative to the sum of the magnitudes of what it sums over images.

    Positives and negatives pull at the scale with opposite signs: relative to the sum itself any error can be large.
    """
    terms = (images.double() * grad_images.double()).sum(1) / worker.SCALE
    return float((got.double() - want.double()).abs() / terms.abs().sum())


def over_ranks(results, *keys):
    """Values of a case on all ranks: features' gradients one below the other, the rest as a list."""
    cases = []
    for result in results:
        for key in keys:
            result = result[key]
        cases.append(result)
    return {
        name: torch.cat([case[name] for case in cases]) if name in ("image", "text") else [case[name] for case in cases]
        for name in cases[0]
    }


TRAINING_CASES = [
    f"{kind}, {exchange}, {shape}, {extra}"
    for kind in ("softmax", "sigmoid")
    for exchange in ("gather", "ring", "two-way ring")
    for shape in ("even", "uneven")
    for extra in ("plain", "ids", "smoothing", "ids and smoothing")
    if kind == "softmax" or "smoothing" not in extra
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", TRAINING_CASES)
def test_equal_to_one_process(ranks, world, case):
    """Loss and averaged gradients of our own loss against float64 of the concatenated batch."""
    got = over_ranks(ranks(world), "training", case)
    rows = (worker.UNEVEN if "uneven" in case else worker.EVEN)[:world]
    images, texts, ids = worker.whole_batch(rows)
    values = [images, texts, torch.tensor(worker.SCALE), torch.tensor(worker.BIAS)]
    leaves = [value.double().requires_grad_() for value in values]
    want = float64_loss(
        case.partition(",")[0], *leaves, ids if "ids" in case else None, 0.1 if "smoothing" in case else 0.0
    )
    (3 * want).backward()
    for loss in got["loss"]:
        assert relative(loss, want.detach()) <= 1e-6
    # Data-parallel training divides the sum of the ranks' parameter gradients by their number.
    assert relative(got["image"] / world, leaves[0].grad) <= 1e-6
    assert relative(got["text"] / world, leaves[1].grad) <= 1e-6
    assert scale_error(torch.stack(got["scale"]).mean(), leaves[2].grad, images, leaves[0].grad) <= 1e-6
    if "sigmoid" in case:
        assert relative(torch.stack(got["bias"]).mean(), leaves[3].grad) <= 1e-6
    else:
        assert all(bias == 0 for bias in got["bias"])


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_trap_6_parameters_under_distributed_data_parallel(ranks, world, exchange, kind):
    images, texts, ids = worker.whole_batch(worker.UNEVEN[:world])
    model = worker.Towers().double()
    output = model(images.double(), texts.double())
    want = float64_loss(kind, *output.values(), ids, 0.0)
    want.backward()
    for result in ranks(world):
        got = result["data parallel"][f"{kind}, {exchange}"]
        assert relative(got["loss"], want.detach()) <= 1e-6
        for name, parameter in model.named_parameters():
            if (kind, name) == ("softmax", "bias"):
                assert got[name] == 0
            else:
                assert relative(got[name], parameter.grad) <= 2e-6, name


CLIP_CASES = [
    (local_loss, gather_with_grad, exchange)
    for local_loss in (False, True)
    for gather_with_grad in (False, True)
    for exchange in ("gather", "ring", "two-way ring")
    if exchange == "gather" or gather_with_grad or not local_loss
]
# OpenCLIP rounds logits, and the gradients to them, to bfloat16; we do not.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("local_loss", "gather_with_grad", "exchange"), CLIP_CASES)
def test_clip_loss_is_openclips(ranks, world, dtype, local_loss, gather_with_grad, exchange):
    case = f"ClipLoss, {dtype}, {local_loss}, {gather_with_grad}, {exchange}"
    pairs = [result["openclip"][case] for result in ranks(world)]
    images = worker.whole_batch(worker.EVEN[:world])[0].split(9)
    for image, (ours, theirs) in zip(images, pairs):
        for name in ("loss", "image", "text"):
            assert relative(ours[name], theirs[name]) <= TOLERANCE[dtype], name
            assert name == "loss" or ours[name].dtype == dtype
        if not (local_loss and gather_with_grad):
            assert scale_error(ours["scale"], theirs["scale"], image, theirs["image"]) <= TOLERANCE[dtype]
        assert ours["bias"] == 0 and theirs["bias"].abs() <= 0.1
    # In that one case ours is the mean over ranks at once.
    ours, theirs = (torch.stack([pair[whose]["scale"] for pair in pairs]) for whose in (0, 1))
    grad_images = torch.cat([pair[1]["image"] for pair in pairs]) / world
    assert scale_error(ours.mean(), theirs.mean(), torch.cat(images), grad_images) <= TOLERANCE[dtype]
    if local_loss and gather_with_grad:
        assert torch.equal(ours, ours[:1].expand_as(ours))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dist_impl", [None, "bidir", "shift", "reduce", "gather"])
def test_siglip_loss_is_openclips(ranks, world, dtype, dist_impl):
    images = worker.whole_batch(worker.EVEN[:world])[0].split(9)
    for image, result in zip(images, ranks(world)):
        ours, theirs = result["openclip"][f"SigLipLoss, {dtype}, {dist_impl}"]
        for name in ("loss", "image", "text", "bias"):
            assert relative(ours[name], theirs[name]) <= TOLERANCE[dtype], name
        assert scale_error(ours["scale"], theirs["scale"], image, theirs["image"]) <= TOLERANCE[dtype]


def counts(ranks, world, case):
    """Of the rank that sends and computes most."""
    found = [result["counted"][case] for result in ranks(world)]
    return {name: max(each[name] for each in found) for name in ("bytes", "flops", "largest")}


@pytest.mark.parametrize("world", WORLDS[1:])
def test_half_of_openclips_work_and_traffic(ranks, world):
    """Against ``--local-loss --gather-with-grad``: exactly counted, the few bytes of statistics and sizes included."""
    rows, width = worker.COUNTED_ROWS, worker.COUNTED_WIDTH
    product = 2 * rows * (world * rows) * width
    features = (world - 1) * rows * width
    for name, size in (("", 4), (", bfloat16", 2)):
        ours, theirs = counts(ranks, world, f"gather{name}"), counts(ranks, world, f"OpenCLIP{name}")
        assert theirs["flops"] == 6 * product
        assert ours["flops"] == 3 * product  # the logits are kept: they fit into the default budget
        assert theirs["bytes"] == 4 * features * size  # images and texts, there and back
        # Texts there and back, a float64 log-sum-exp of a column there and back, and eight numbers of 8 bytes.
        statistics = 16 * (world - 1) * rows
        assert 2 * features * size <= ours["bytes"] <= 2 * features * size + statistics + 64 * world
        print(
            f"{world} ranks{name}: {ours['flops'] / theirs['flops']:.3f} of the FLOPs, "
            f"{ours['bytes'] / theirs['bytes']:.4f} of the bytes"
        )
    assert counts(ranks, world, "gather, no stash")["flops"] == 4 * product
    assert counts(ranks, world, "gather, no grad")["flops"] == product


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("dist_impl", ["gather", "shift", "bidir"])
def test_work_and_traffic_of_the_sigmoid_loss(ranks, world, dist_impl):
    rows, width = worker.COUNTED_ROWS, worker.COUNTED_WIDTH
    product = 2 * rows * (world * rows) * width
    features = 4 * (world - 1) * rows * width
    ours, theirs = (counts(ranks, world, f"{whose}sigmoid {dist_impl}") for whose in ("", "OpenCLIP "))
    assert ours["flops"] == 3 * product
    # With "gather" OpenCLIP computes a rank's own block a second time and multiplies it by zero.
    assert theirs["flops"] == (3 * product * (world + 1) // world if dist_impl == "gather" else 3 * product)
    assert ours["bytes"] <= 2 * features + 64 * world and theirs["bytes"] >= 2 * features * (world - 1) / world
    assert counts(ranks, world, f"sigmoid {dist_impl}, no grad")["flops"] == product


@pytest.mark.parametrize("world", WORLDS)
def test_memory_of_a_rank(ranks, world):
    """Largest tensor of all: the gathered features, not the logits; on a ring nothing that grows with the ranks."""
    rows, width = worker.COUNTED_ROWS, worker.COUNTED_WIDTH
    gathered, own = world * rows * width, rows * width
    assert gathered < world * rows * rows and own < rows * rows  # a rectangle of logits would be seen
    for case in ("gather, no stash", "gather, no grad", "sigmoid gather"):
        assert counts(ranks, world, case)["largest"] <= gathered, case
    for case in ("ring", "two-way ring", "sigmoid shift", "sigmoid bidir"):
        assert counts(ranks, world, case)["largest"] <= own, case
    if world > 1:
        assert counts(ranks, world, "OpenCLIP")["largest"] == world * rows * rows


@pytest.mark.parametrize("world", WORLDS[1:])
def test_processes_in_groups(ranks, world):
    """Ranks 0 and 1 share a batch, 2 and 3 another."""
    images, texts, _ = worker.whole_batch(worker.EVEN[:world])
    for first in range(0, world, 2):
        got = over_ranks(ranks(world)[first : first + 2], "other", "pairs")
        part = slice(first * 9, first * 9 + 18)
        leaves = [images[part].double().requires_grad_(), texts[part].double().requires_grad_()]
        want = float64_loss("softmax", *leaves, worker.SCALE, 0.0, None, 0.0)
        want.backward()
        assert relative(got["loss"][0], want.detach()) <= 1e-6
        assert relative(got["image"] / 2, leaves[0].grad) <= 1e-6
        assert relative(got["text"] / 2, leaves[1].grad) <= 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_other_uses(ranks, world):
    results = ranks(world)
    locked, whole = over_ranks_without_text(results), over_ranks(results, "training", "softmax, gather, even, plain")
    assert relative(3 * locked, whole["image"]) <= 1e-6
    for result in results:
        other = result["other"]
        assert other["twice"] == dict.fromkeys(other["twice"], True) and len(other["twice"]) == 4
        assert other["equal rows"] == {"equal": True, "saved": 64 * (world - 1)}
        assert len(other["refused"]) == 4 and all("once_differentiable" in text for text in other["refused"].values())
        assert all((other["zero"][name] == 0).all() for name in ("image", "text", "scale"))
        assert all(other["nan"][name].isnan().any() for name in ("loss", "image", "text", "scale"))


def over_ranks_without_text(results):
    for result in results:
        assert result["other"]["locked texts"]["text"] is None
    return torch.cat([result["other"]["locked texts"]["image"] for result in results])


@pytest.mark.parametrize("world", WORLDS[1:])
def test_mistakes_on_one_rank_raise_on_all(ranks, world):
    for result in ranks(world):
        messages = result["other"]["messages"]
        assert "rank 0 has no image features" in messages["empty rank"]
        assert f"world_size={world + 1}, but this process is rank" in messages["wrong world"]
        assert "ranks hold" in messages["unpaired"]
        assert "widths differ" in messages["widths"]
        for name, found in {
            "dtype": "torch.float16, torch.bfloat16)",
            "ids": "none, given)",
            "gradients": "texts, images)",
        }.items():
            assert f"ranks differ in {name}" in messages[name] and found in messages[name]
    last = world - 1
    for name, own in {"vector": "with no empty side", "ids alone": "or neither"}.items():
        *others, odd = (result["other"]["messages"][name] for result in ranks(world))
        assert own in odd and all(f"rank {last} was given what it cannot use" in other for other in others)
    assert all(
        "not in the loss's process group" in result["other"]["messages"]["outside"] for result in ranks(world)[1:]
    )


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_gradients_of_the_whole_sigmoid_loss_that_differ_between_ranks(ranks, world, exchange):
    got = over_ranks(ranks(world), "other", f"sigmoid factors, {exchange}")
    images, texts, _ = worker.whole_batch(worker.EVEN[:world])
    values = [images, texts, torch.tensor(worker.SCALE), torch.tensor(worker.BIAS)]
    leaves = [value.double().requires_grad_() for value in values]
    (sum((1.0, -0.5, 2.0, 0.25)[:world]) * float64_loss("sigmoid", *leaves, None, 0.0)).backward()
    assert relative(got["image"], leaves[0].grad) <= 1e-6
    assert relative(got["text"], leaves[1].grad) <= 1e-6
    assert scale_error(sum(got["scale"]), leaves[2].grad, images, leaves[0].grad) <= 1e-6
    assert relative(sum(got["bias"]), leaves[3].grad) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_nccl_with_one_process(tmp_path, kind, exchange):
    """The collectives that only NCCL takes, as far as one GPU shows them."""
    dist.init_process_group("nccl", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        images, texts, _ = worker.whole_batch((200,), width=64)
        scalars = [torch.tensor(worker.SCALE), torch.tensor(worker.BIAS)]
        found = []
        for whole in (clip_loss, sigmoid_loss), (distributed_clip_loss, distributed_sigmoid_loss):
            leaves = [tensor.cuda().bfloat16().requires_grad_() for tensor in (images, texts)]
            function = whole[kind == "sigmoid"]
            options = {"exchange": exchange} if function.__name__.startswith("distributed") else {}
            loss = function(*leaves, scalars[0].cuda(), logit_bias=scalars[1].cuda(), **options)
            loss.backward()
            found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for got, want in zip(found[1], found[0]):
            assert relative(got, want) <= 1e-5
    finally:
        dist.destroy_process_group()
