"""One rank of the tests of towers over gloo; started by test_parallel.py, which compares what it saves.

python parallel_worker.py FOLDER
"""

import datetime
import importlib
import multiprocessing
import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WORLD, ROWS = 2, 4
CASES = [
    "ddp", "ddp, checkpointed", "ddp, compiled", "ddp, reference",
    "fsdp", "fsdp, checkpointed", "fsdp, compiled", "fsdp, reference", "fsdp, torch", "fsdp, bf16",
]  # fmt: skip
"""How a model is run, and what else; reference and torch are values of MMBASE_KERNELS."""


def load_tiny():
    """tiny.py of this folder, whichever way this file was started."""
    package = types.ModuleType("towers")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules.setdefault("towers", package)
    return importlib.import_module("towers.tiny")


tiny = load_tiny()


def model_of(case):
    options = {"checkpoint_activations": "checkpointed" in case}
    return tiny.tiny_model(options, options).train()


def batch_of(model, way, ranks):
    """The images and texts of some ranks, each of whose rows are a batch of its own; sizes differ between ranks."""
    parts = [tiny.tiny_batch(model, "dense", ROWS, seed=1 + rank) for rank in ranks]
    images = [image for part in parts for image in part[0]]
    ids = torch.cat([part[1] for part in parts])
    if way == "dense":
        return torch.stack(images), ids
    sizes = [tiny.SIZES[row % 4] if row % 3 else (8, 8 + 8 * row) for rank in ranks for row in range(rank, rank + ROWS)]
    images = [image.repeat(1, 2, 5)[:, :height, :width] for image, (height, width) in zip(images, sizes)]
    return images, model.text.pack(ids)


def wrapped(model, case):
    """What is called in place of the model. FSDP2 takes no parameters without an axis: it gets the towers."""
    if "ddp" in case:
        run = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bf16" in case else MixedPrecisionPolicy()
        mesh = init_device_mesh("cpu", (WORLD,))
        for tower in (model.visual, model.text):
            for block in tower.transformer.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(tower, mesh=mesh, mp_policy=policy)
        run = model
    return torch.compile(run, backend="eager") if "compiled" in case else run


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_case(case, way, rank):
    """Features of this rank, and the gradients that all ranks share."""
    torch._dynamo.reset()
    preference = [name for name in ("reference", "torch") if name in case]
    os.environ["MMBASE_KERNELS"] = "".join(preference)
    model = model_of(case)
    batch = batch_of(model, way, [rank])
    run = wrapped(model, case)
    out = run(*batch)
    tiny.loss_of(out).backward()
    if "fsdp" in case:  # nobody else averages the gradient of what is not sharded
        dist.all_reduce(model.logit_scale.grad)
        model.logit_scale.grad /= WORLD
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    return {key: out[key].detach() for key in ("image_features", "text_features")} | gradients


def run_rank(rank, folder):
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timeout)
    found = {(case, way): run_case(case, way, rank) for case in CASES for way in tiny.WAYS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main():
    """Fork the ranks from this process, which has imported everything once; end with the first that fails."""
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
    failed = [process.exitcode for process in ranks if process.exitcode != 0]
    for process in ranks:
        if process.is_alive():
            process.terminate()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
