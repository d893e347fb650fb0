"""One rank of the tests over gloo: runs every case, saves what it found. Started by test_distributed.py.

python gloo_worker.py FOLDER WORLD [WORLD ...]
"""

import datetime
import importlib.util
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mmbase_kernels.bands
from mmbase.errors import MmbaseError
from mmbase.losses import (
    ClipLoss,
    ContrastiveLoss,
    SigLipLoss,
    Traffic,
    distributed_clip_loss,
    distributed_sigmoid_loss,
)

WIDTH = 48
EVEN, UNEVEN = (9, 9, 9, 9), (7, 3, 10, 1)
SCALE, BIAS = 6.0, -3.0
COUNTED_ROWS, COUNTED_WIDTH = 256, 128


def openclip_losses():
    """The module that holds OpenCLIP's losses, without the rest of the package, which takes seconds to import."""
    folder = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("openclip_losses", folder / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole_batch(rows, width=WIDTH, seed=0):
    """Features and ids of all ranks: texts near their images, a duplicate, captions that stand twice or thrice."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(rows)
    images = F.normalize(torch.randn(count, width, generator=draw), dim=1)
    texts = F.normalize(images + 0.3 * torch.randn(count, width, generator=draw), dim=1)
    texts[count // 2] = texts[0]
    ids = torch.randint(0, 2 * count // 3 + 1, (count,), generator=draw)
    return images, texts, ids


def own_part(tensor, rows, rank):
    return tensor.split(list(rows))[rank].clone()


def leaves(rows, rank, dtype=torch.float32, seed=0, width=WIDTH):
    images, texts, _ = whole_batch(rows, width, seed)
    tensors = [own_part(images, rows, rank).to(dtype), own_part(texts, rows, rank).to(dtype)]
    tensors += [torch.tensor(SCALE), torch.tensor(BIAS)]
    return [tensor.requires_grad_() for tensor in tensors]


def found(loss, tensors, factor):
    (factor * loss).backward()
    names = ("image", "text", "scale", "bias")
    return {"loss": loss.detach()} | {name: tensor.grad for name, tensor in zip(names, tensors)}


def training_cases(rank, world):
    """Our own loss, as training uses it."""
    for kind in ("softmax", "sigmoid"):
        for exchange in ("gather", "ring", "two-way ring"):
            for shape, all_rows in (("even", EVEN), ("uneven", UNEVEN)):
                for extra in ("plain", "ids", "smoothing", "ids and smoothing"):
                    if kind == "sigmoid" and "smoothing" in extra:
                        continue
                    rows = all_rows[:world]
                    tensors = leaves(rows, rank)
                    ids = own_part(whole_batch(rows)[2], rows, rank) if "ids" in extra else None
                    loss = ContrastiveLoss(kind, 0.1 if "smoothing" in extra else 0.0, exchange=exchange)
                    yield (
                        f"{kind}, {exchange}, {shape}, {extra}",
                        found(loss(*tensors, image_ids=ids, text_ids=ids), tensors, 3.0),
                    )


def openclip_cases(rank, world, theirs):
    """OpenCLIP's classes and ours in one process, a different factor on every rank's loss."""
    rows, factor = EVEN[:world], (1.0, -0.5, 2.0, 0.25)[rank]
    place = {"rank": rank, "world_size": world}
    for dtype in (torch.float32, torch.bfloat16):
        for local_loss in (False, True):
            for gather_with_grad in (False, True):
                options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, **place}
                for exchange in ("gather", "ring", "two-way ring"):
                    if exchange != "gather" and local_loss and not gather_with_grad:
                        continue
                    pair = []
                    for loss in (ClipLoss(**options, exchange=exchange), theirs.ClipLoss(**options)):
                        tensors = leaves(rows, rank, dtype)
                        out = loss(*tensors, output_dict=True)["contrastive_loss"]
                        pair.append(found(out, tensors, factor))
                    yield f"ClipLoss, {dtype}, {local_loss}, {gather_with_grad}, {exchange}", pair
        for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
            pair = []
            for loss in (SigLipLoss(dist_impl=dist_impl, **place), theirs.SigLipLoss(dist_impl=dist_impl, **place)):
                tensors = leaves(rows, rank, dtype)
                pair.append(found(loss(*tensors), tensors, factor))
            yield f"SigLipLoss, {dtype}, {dist_impl}", pair


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def counted(loss, rank, world, sigmoid=False, train=True, dtype=torch.float32):
    """Bytes sent, FLOPs of matrix products and the largest tensor of one forward and backward pass."""
    tensors = leaves((COUNTED_ROWS,) * world, rank, dtype, width=COUNTED_WIDTH)
    with Traffic() as traffic, FlopCounterMode(display=False) as flops, Largest() as largest:
        with nullcontext() if train else torch.no_grad():
            out = loss(*tensors[: 4 if sigmoid else 3])
        if train:
            out.backward()
    return {
        "bytes": traffic.bytes,
        "by_operation": dict(traffic.by_operation),
        "flops": flops.get_total_flops(),
        "largest": largest.elements,
    }


def counted_cases(rank, world, theirs):
    place = {"rank": rank, "world_size": world}
    best = {"local_loss": True, "gather_with_grad": True, **place}
    for name, dtype in (("", torch.float32), (", bfloat16", torch.bfloat16)):
        yield f"OpenCLIP{name}", counted(theirs.ClipLoss(**best), rank, world, dtype=dtype)
        yield f"gather{name}", counted(ClipLoss(**best), rank, world, dtype=dtype)

    def softmax(exchange, stash_bytes):
        def loss(image, text, scale):
            return distributed_clip_loss(
                image, text, scale, exchange=exchange, local_value=True, stash_bytes=stash_bytes
            )

        return loss

    yield "gather, no stash", counted(softmax("gather", 0), rank, world)
    yield "gather, no grad", counted(softmax("gather", None), rank, world, train=False)
    for exchange in ("ring", "two-way ring"):
        yield exchange, counted(softmax(exchange, None), rank, world)
    for dist_impl in ("gather", "shift", "bidir"):
        for whose, module in (("OpenCLIP ", theirs.SigLipLoss), ("", SigLipLoss)):
            loss = module(dist_impl=dist_impl, **place)
            yield f"{whose}sigmoid {dist_impl}", counted(loss, rank, world, sigmoid=True)
            if not whose:
                yield f"sigmoid {dist_impl}, no grad", counted(loss, rank, world, sigmoid=True, train=False)


class Towers(nn.Module):
    """Two linear towers, a scale and a bias: what DistributedDataParallel wraps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, images, texts):
        return {
            "image_features": F.normalize(self.image(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.log_scale.exp(),
            "logit_bias": self.bias,
        }


def data_parallel_cases(rank, world):
    """Averaged gradients of the parameters under DistributedDataParallel, uneven batches."""
    rows = UNEVEN[:world]
    images, texts, ids = (own_part(tensor, rows, rank) for tensor in whole_batch(rows))
    for kind in ("softmax", "sigmoid"):
        for exchange in ("gather", "ring"):
            model = nn.parallel.DistributedDataParallel(Towers())
            loss = ContrastiveLoss(kind, exchange=exchange)(**model(images, texts), image_ids=ids, text_ids=ids)
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
            yield f"{kind}, {exchange}", gradients | {"loss": loss.detach()}


def other_cases(rank, world):
    rows = EVEN[:world]
    image, text, scale, bias = leaves(rows, rank)
    # Processes that share a batch may be fewer than all: neighbours in pairs.
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world - 1, 2)]
    if pairs:
        loss = ContrastiveLoss(group=pairs[rank // 2], exchange="ring")
        yield "pairs", found(loss(image, text, scale), [image, text, scale], 1.0)

    # The texts' tower is locked: nothing is computed or sent for it.
    image, text, scale, bias = leaves(rows, rank)
    locked = distributed_clip_loss(image, text.detach(), scale)
    yield "locked texts", found(locked, [image, text.detach(), scale], 1.0)

    # One graph, two backward passes.
    twice = {}
    for exchange in ("gather", "ring"):
        for name, function in (("softmax", distributed_clip_loss), ("sigmoid", distributed_sigmoid_loss)):
            image, text, scale, bias = leaves(rows, rank)
            loss = function(image, text, scale, logit_bias=bias, exchange=exchange)
            first = torch.autograd.grad(loss, [image, text, scale], retain_graph=True)
            second = torch.autograd.grad(loss, [image, text, scale], retain_graph=True)
            image2, text2, scale2, bias2 = leaves(rows, rank)
            again = function(image2, text2, scale2, logit_bias=bias2, exchange=exchange)
            third = torch.autograd.grad(again, [image2, text2, scale2])
            twice[f"{name}, {exchange}"] = all(
                torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third)
            )
    yield "twice", twice

    # Sizes that need not be asked for.
    image, text, scale, bias = leaves(rows, rank)
    losses, bytes_sent = [], []
    for options in ({}, {"equal_rows": True}):
        with Traffic() as traffic:
            losses.append(distributed_clip_loss(image, text, scale, **options).detach())
        bytes_sent.append(traffic.bytes)
    yield "equal rows", {"equal": torch.equal(*losses), "saved": bytes_sent[0] - bytes_sent[1]}

    # Second derivatives are refused.
    image, text, scale, bias = leaves(rows, rank)
    refused = {}
    for exchange in ("gather", "ring"):
        for name, function in (("softmax", distributed_clip_loss), ("sigmoid", distributed_sigmoid_loss)):
            loss = function(image, text, scale, logit_bias=bias, exchange=exchange)
            (gradient,) = torch.autograd.grad(loss**2, image, create_graph=True)
            try:
                gradient.sum().backward()
            except RuntimeError as error:
                refused[f"{name}, {exchange}"] = str(error)
    yield "refused", refused

    # A factor of zero, and one that is not a number.
    image, text, scale, bias = leaves(rows, rank)
    yield "zero", found(distributed_clip_loss(image, text, scale, local_value=True), [image, text, scale], 0.0)
    image, text, scale, bias = leaves(rows, rank)
    with torch.no_grad():
        image[0, 0] = torch.nan
    yield "nan", found(distributed_clip_loss(image, text, scale, exchange="ring"), [image, text, scale], 1.0)

    # What reaches the ranks' losses differs, the loss is that of the whole batch: its gradient times their sum.
    for exchange in ("gather", "ring"):
        tensors = leaves(rows, rank)
        loss = distributed_sigmoid_loss(*tensors, exchange=exchange)
        yield f"sigmoid factors, {exchange}", found(loss, tensors, (1.0, -0.5, 2.0, 0.25)[rank])

    messages = {}
    odd, ids = rank == world - 1, torch.arange(len(image))
    first = dist.new_group([0])
    narrow = torch.bfloat16 if odd else torch.float16
    for name, call in {
        "empty rank": lambda: distributed_clip_loss(image[: len(image) * (rank > 0)], text, scale),
        "wrong world": lambda: ClipLoss(rank=rank, world_size=world + 1)(image, text, scale),
        "unpaired": lambda: distributed_clip_loss(image, text[: len(text) - rank], scale),
        "widths": lambda: distributed_clip_loss(image, text[:, rank:], scale),
        "dtype": lambda: distributed_clip_loss(image.to(narrow), text.to(narrow), scale),
        "ids": lambda: distributed_clip_loss(
            image, text, scale, **({"image_ids": ids, "text_ids": ids} if odd else {})
        ),
        "gradients": lambda: distributed_clip_loss(image, text.detach() if odd else text, scale),
        "vector": lambda: distributed_clip_loss(image[0] if odd else image, text, scale),
        "ids alone": lambda: distributed_clip_loss(image, text, scale, image_ids=ids if odd else None),
        "outside": lambda: distributed_clip_loss(image, text, scale, group=first) if rank else None,
    }.items():
        try:
            call()
        except MmbaseError as error:
            messages[name] = str(error)
        except ValueError as error:
            messages[name] = f"ValueError {error}"
    yield "messages", messages


def run_rank(rank, world, folder):
    dist.init_process_group(
        "gloo",
        init_method=(folder / f"rendezvous{world}").as_uri(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    theirs = openclip_losses()
    mmbase_kernels.bands.CPU_SIDE = 64  # many tiles even of the few rows here
    results = {
        "training": dict(training_cases(rank, world)),
        "openclip": dict(openclip_cases(rank, world, theirs)),
        "counted": dict(counted_cases(rank, world, theirs)),
        "data parallel": dict(data_parallel_cases(rank, world)),
        "other": dict(other_cases(rank, world)),
    }
    torch.save(results, folder / f"{rank} of {world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    from worlds import main

    main(run_rank)
