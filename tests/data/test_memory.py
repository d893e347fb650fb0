"""Resident memory of the loader and its workers over twenty epochs."""

import os
import subprocess
import sys

import numpy as np
import pytest

from .little_shards import write_shards

EPOCHS = 20
SCRIPT = """
import sys
from mmbase.data import loader

def resident(process):
    pages = dict(line.split(":", 1) for line in open(f"/proc/{process}/smaps_rollup") if ":" in line)
    return int(pages["Pss"].split()[0]) / 1024

stream = loader(sys.argv[1], image_size=64, batch_size=50, workers=int(sys.argv[2]), max_bad_share=1,
                tokenizer={"kind": "clip", "context_length": 77}, quarantine=sys.argv[3])
for epoch in range(int(sys.argv[4])):
    while stream.position < (epoch + 1) * stream.samples:
        batch = next(stream)
    processes = ["self", *(stream._pool.processes() if stream._pool else [])]
    print(sum(map(resident, processes)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_flat_over_twenty_epochs(tmp_path, workers):
    folder = write_shards(tmp_path, [100] * 20)
    for shard in (3, 7):  # some that fail every epoch, whose account must not grow either
        path = folder / f"{shard:03d}.tar"
        path.write_bytes(path.read_bytes().replace(b"JFIF", b"\0\0\0\0").replace(b"\xff\xda", b"\xff\x00"))
    command = [sys.executable, "-c", SCRIPT, str(folder), str(workers), str(tmp_path / "q.jsonl"), str(EPOCHS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    megabytes = np.array([float(line) for line in done.stdout.split()])
    print(f"\n{workers} workers, MiB after each epoch: {megabytes.round(1).tolist()}")
    growth = np.polyfit(np.arange(EPOCHS - 5), megabytes[5:], 1)[0]
    assert len(megabytes) == EPOCHS and growth < 0.25, f"{growth:.2f} MiB an epoch"
    assert megabytes[-5:].mean() < 1.03 * megabytes[4:9].mean() + 1
