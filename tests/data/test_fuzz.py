"""A thousand mutated tars: each is indexed and read without a hang or a crash, and spoils nothing before its damage."""

import io
import os
import random
import tarfile
import time

import pytest

from mmbase.data.compressed import decompress, is_compressed
from mmbase.data.open_tar import OpenTar
from mmbase.data.samples import SampleFault, fields_of
from mmbase.data.tar_index import BLOCK, scan_tar

from .little_shards import add

FIELDS = {"name": (0, 100), "size": (124, 136), "checksum": (148, 156), "type": (156, 157), "magic": (257, 265)}


def seal(block):
    """Give a header the checksum that its bytes have, so that what it says is believed."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)


def whole_tar(rng):
    """A tar of a few samples in a format by chance, with names long and short."""
    buffer = io.BytesIO()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice(formats)) as tar:
        long = "y" * 120 if tar.format != tarfile.USTAR_FORMAT and rng.random() < 0.5 else ""
        for i in range(rng.randint(1, 8)):
            for extension in ("jpg", "txt", "json"):
                add(tar, f"{long}{i:03d}.{extension}", rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])))
    return bytearray(buffer.getvalue())


def mutate(rng, content):
    """Damage of one kind; returns the first byte that differs."""
    kind = rng.choice(["cut", "bytes", "field", "sealed field", "size", "type", "block", "swap", "insert", "zeros"])
    at = rng.randrange(len(content))
    block = at // BLOCK * BLOCK
    if kind == "cut":
        del content[at:]
        return at
    if kind == "bytes":
        for _ in range(rng.randint(1, 20)):
            content[min(at + rng.randrange(600), len(content) - 1)] = rng.randrange(256)
        return at
    if kind in ("field", "sealed field", "size", "type"):
        name = kind if kind in FIELDS else rng.choice(list(FIELDS))
        begin, end = FIELDS[name]
        header = content[block : block + BLOCK]
        if kind == "size":
            sizes = [
                b"77777777777\0",
                b"\xff" * 12,
                b"\x80" + b"\xff" * 11,
                b"-0000000001\0",
                b"00000000001\0",
                b" " * 12,
            ]
            header[begin:end] = rng.choice(sizes)
        elif kind == "type":
            header[begin:end] = bytes([rng.choice(b"0\x001234567gxLKSVNMDQ\xff")])
        else:
            header[begin:end] = rng.randbytes(end - begin)
        if kind != "field":
            seal(header)
        content[block : block + BLOCK] = header
        return block
    other = rng.randrange(len(content)) // BLOCK * BLOCK
    if kind == "block":
        content[block : block + BLOCK] = rng.randbytes(BLOCK)
    elif kind == "swap":
        one, two = content[block : block + BLOCK], content[other : other + BLOCK]
        content[block : block + BLOCK], content[other : other + BLOCK] = two, one
        return min(block, other)
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randint(1, 2000))
        return at
    else:
        content[block : block + BLOCK * rng.randint(1, 3)] = bytes(BLOCK)
    return block


def read(path):
    """All that can be read of a tar, as (key, members, end of the last member)."""
    index = scan_tar(path)
    tar = OpenTar(str(path), os.open(path, os.O_RDONLY), index, None, 1 << 20)
    rows = []
    try:
        for row in range(len(tar)):
            try:
                sample = tar.sample(row)
                rows.append((sample.key, sample.members, max(m.offset + m.size for m in index.members(row))))
                fields_of(sample)
            except SampleFault as fault:
                assert str(fault)
    finally:
        tar.close()
    return rows


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_tars(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "fuzzed.tar"
    slowest = 0.0
    for _ in range(100):
        content = whole_tar(rng)
        path.write_bytes(content)
        good = read(path)
        begin = min(mutate(rng, content) for _ in range(rng.choice([1, 1, 1, 2, 5])) if content)
        path.write_bytes(content)
        begun = time.perf_counter()
        rows = read(path)
        slowest = max(slowest, time.perf_counter() - begun)
        # A row is safe where the next header, which may add a member to it, comes before the damage.
        safe = [row[:2] for row in good if row[2] + 2 * BLOCK <= begin][:-1]
        assert [row[:2] for row in rows[: len(safe)]] == safe
    assert slowest < 5, "a few kilobytes take no time"


def test_compressed_rubbish(tmp_path):
    rng = random.Random(0)
    packed, plain = tmp_path / "x.tar.gz", tmp_path / "x.tar"
    for number in range(60):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=("w:gz", "w:bz2", "w:xz")[number % 3]) as tar:
            add(tar, "a.txt", rng.randbytes(3000))
        content = bytearray(buffer.getvalue())
        for _ in range(rng.randint(0, 4)):
            content[rng.randrange(6, len(content))] = rng.randrange(256)
        packed.write_bytes(content[: rng.randint(8, len(content))])
        assert is_compressed(packed)
        decompress(packed, plain, lambda size: None)
        read(plain)
