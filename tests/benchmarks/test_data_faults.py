"""The benchmark of failing servers: its options, and one epoch through each kind of fault, from a folder."""

import sys

import pytest

from mmbase import cli
from mmbase.data.cache_config import CacheConfig
from mmbase_bench import data_faults
from mmbase_bench.fault_server import FAULTS, FaultServer, Plan, folder
from mmbase_bench.photo_shards import photo_shards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--servers", "ngnix"], "--servers='ngnix' is not one of nginx, s3; did you mean 'nginx'"),
        (["--faults", "stal"], "did you mean 'stall'"),
        (["--share", "1.5"], "--share=1.5 must lie between 0 and 1"),
        (["--samples", "100"], "--samples=100 must be a multiple of --batch-size=64"),
        (["--servers", "nginx", "--faults", "corrupt"], "nginx tells no checksum"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mmbase", "bench", "data_faults", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_an_epoch_through_every_fault_is_that_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["data_faults", "--samples", "48", "--batch-size", "16", "--workers", "0", "--image-size", "32"]
    )
    options = data_faults.parse()
    (tmp_path / "shards").mkdir()
    photo_shards(tmp_path / "shards", samples=48, shards=8)
    expected, shown, faulty, reason = data_faults.epoch(
        str(tmp_path / "shards"), options, CacheConfig(folder=str(tmp_path / "a"))
    )
    assert (shown, faulty, reason) == (48, 0, "")
    plan = Plan(seconds=1.0, only=r"\.tar$")
    plan.script = list(FAULTS)
    config = CacheConfig(folder=str(tmp_path / "b"), backoff=0.01, first_byte_timeout=0.5, stall_timeout=0.5)
    with FaultServer(folder(tmp_path / "shards", md5=True), plan) as server:
        result = data_faults.epoch(f"{server.url}/{{00000..00007}}.tar", options, config)
        assert result == (expected, 48, 0, "") and not plan.script
        server.plan.gone = {f"/{number:05d}.tar" for number in range(8)}
        gone = data_faults.epoch(
            f"{server.url}/{{00000..00007}}.tar", options, CacheConfig(folder=str(tmp_path / "c"), attempts=1)
        )
        assert gone[0] == "" and "404" in gone[3]
