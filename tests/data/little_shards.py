"""Little shards of real JPEGs and PNGs for tests of the loader."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from mmbase.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer([f"a picture of thing {i}" for i in range(100)], 300, context_length=12)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def picture(number, format="JPEG", size=(40, 30)):
    """Bytes of a picture that is smooth, coloured and different for every number."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def write_shards(folder, sizes, first=0):
    """Shards 000.tar, 001.tar, ... with so many samples each; their keys count through."""
    number = first
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                png = number % 5 == 0
                add(tar, f"{number:05d}.{'png' if png else 'jpg'}", picture(number, "PNG" if png else "JPEG"))
                add(tar, f"{number:05d}.txt", f"a picture of thing {number}".encode())
                fields = {"short": f"thing {number}", "width": 40, "height": 30, "number": number}
                add(tar, f"{number:05d}.json", json.dumps(fields).encode())
                number += 1
    return folder
