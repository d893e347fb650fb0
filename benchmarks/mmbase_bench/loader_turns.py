"""What a loader under measurement runs: batches on command, counted and timed. Needs the standard library alone.

It is run by the interpreter of whoever is measured, as a script: ``PYTHON loader_turns.py NAME SETTINGS``. Each line on
standard input, ``SKIP SECONDS``, is a turn: so many batches are taken before the clock starts (those that lay ready
since the last turn), then batches until the seconds are over. The answer is one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


def openclip(settings: dict[str, Any]) -> tuple[Iterator[Any], str]:
    """OpenCLIP's ``get_wds_dataset`` with its training transform and tokenizer, as its trainer sets them up."""
    import open_clip
    import open_clip_train.data
    import torch
    import webdataset
    from open_clip.transform import image_transform

    torch.set_num_threads(1)
    arguments = SimpleNamespace(
        train_data=settings["shards"],
        val_data=None,
        train_num_samples=1 << 40,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=settings["seed"],
        workers=settings["workers"],
        world_size=1,
        batch_size=settings["batch_size"],
    )
    transform = image_transform(settings["image_size"], is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = open_clip_train.data.get_wds_dataset(arguments, transform, True, tokenizer=tokenizer)
    versions = f"open_clip {open_clip.__version__}, webdataset {webdataset.__version__}, torch {torch.__version__}"
    return iter(data.dataloader), versions


def mmbase(settings: dict[str, Any]) -> tuple[Iterator[Any], str]:
    """Our loader with the same crops: uint8, to be normalised on the device."""
    import torch

    from mmbase.data import loader

    torch.set_num_threads(1)
    stream = loader(
        settings["shards"],
        image_size=settings["image_size"],
        batch_size=settings["batch_size"],
        workers=settings["workers"],
        seed=settings["seed"],
        crop_scale=(0.9, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
    )
    return iter(stream), "; ".join(stream.describe())


def mmbase_float(settings: dict[str, Any]) -> tuple[Iterator[Any], str]:
    """The same, with the training process normalising every batch to float32, as OpenCLIP's workers do."""
    import torch

    batches, versions = mmbase(settings)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1) * 255)
    return (batch | {"image": (batch["image"] - mean).mul_(scale)} for batch in batches), versions


LOADERS = {"openclip": openclip, "mmbase": mmbase, "mmbase_float": mmbase_float}


def main() -> None:
    """Build the loader, say what it is, then take turns until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    settings = json.loads(sys.argv[2])
    start = time.perf_counter()
    batches, described = LOADERS[sys.argv[1]](settings)
    next(batches)
    print(json.dumps({"described": described, "first_batch_s": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        skip, seconds = line.split()
        for _ in range(int(skip)):
            next(batches)
        start, taken = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < float(seconds):
            next(batches)
            taken += 1
        print(json.dumps({"batches": taken, "seconds": elapsed}), file=answers)
    answers.close()
    os._exit(0)  # whatever the loader's workers are doing


if __name__ == "__main__":
    main()
