"""Epochs from servers that fail: nginx and an S3 server (moto) behind a proxy that cuts, stalls, lies and refuses.

For each server and each kind of fault, the loader reads an epoch with an empty cache; its keys, pixels and tokens must
be those of the same shards on the disk. Faults are dealt to GETs of shards by chance, with a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmbase.data import loader
from mmbase.data.cache_config import CacheConfig
from mmbase.errors import MmbaseError
from mmbase_bench.fault_server import FAULTS, FaultServer, Plan, upstream
from mmbase_bench.options import Parser, check_at_least, check_names, run
from mmbase_bench.photo_shards import photo_shards
from mmbase_bench.report import align, record_environment, write_rows

SERVERS = ("nginx", "s3")
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@dataclass(frozen=True)
class Result:
    """One epoch."""

    server: str
    fault: str
    """a kind, ``none``, or ``all`` of them mixed"""
    share: float
    """of the shards' GETs that were to fail"""
    requests: int
    injected: int
    injected_by_kind: dict[str, int]
    samples: int
    same: bool
    """keys, pixels and tokens are those of the local shards"""
    faulty_samples: int
    """replaced because they could not be had"""
    seconds: float
    reason: str = ""
    """why the epoch did not complete"""


def main() -> None:
    """Run the epochs, print the table, and write the files where ``--output`` names a folder."""
    options = parse()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        shards.mkdir()
        made = photo_shards(shards, samples=options.samples, shards=options.shard_count, seed=options.seed)
        expected = epoch(str(shards), options, CacheConfig(folder=f"{scratch}/cache"))[0]
        print(f"{made.describe()}; {options.workers} workers, batches of {options.batch_size}")
        for server in options.servers:
            with start(server, shards, Path(scratch)) as (host, port, pattern):
                for fault in [fault for fault in options.faults if (server, fault) != ("nginx", "corrupt")]:
                    results.append(measure(server, host, port, pattern, fault, expected, options))
                    print(" ".join(_cells(results[-1])), flush=True)
    heads = ["server", "fault", "requests", "injected", "samples", "same", "replaced", "seconds"]
    print(align([heads, *map(_cells, results)]))
    if options.output:
        header = {"measures": "epochs from failing servers", "environment": record_environment(torch.device("cpu"))}
        header |= {"shards": asdict(made), "faults": FAULTS, "hold_seconds": options.hold}
        for path in write_rows(options.output, "data_faults", [asdict(result) for result in results], header):
            print(f"wrote {path}")
    if not all(result.same for result in results):
        raise MmbaseError("not every epoch showed the samples of the local shards; see the table")


def measure(
    server: str, host: str, port: int, pattern: str, fault: str, expected: str, options: argparse.Namespace
) -> Result:
    """An epoch through the proxy with one kind of fault."""
    # nginx tells no checksum, so nothing could notice a changed byte there.
    kinds = [kind for kind in FAULTS if kind != "corrupt" or server != "nginx"] if fault == "all" else [fault]
    share = 0.0 if fault == "none" else options.share
    plan = Plan(share=share, kinds=kinds, seconds=options.hold, seed=options.seed, only=r"\.tar$")
    with FaultServer(upstream(host, port), plan) as proxy, tempfile.TemporaryDirectory() as folder:
        patience = options.hold / 2
        config = CacheConfig(
            folder=folder,
            backoff=0.05,
            connect_timeout=patience,
            first_byte_timeout=patience,
            stall_timeout=patience,
            storage_options={"endpoint_url": proxy.url} if server == "s3" else {},
        )
        spec = pattern.replace("PROXY", proxy.url)
        begun = time.perf_counter()
        digest, samples, faulty, reason = epoch(spec, options, config)
        seconds = time.perf_counter() - begun
        injected = {kind: proxy.counts[kind] for kind in FAULTS if proxy.counts[kind]}
        requests = proxy.counts["requests"]
    same = digest == expected and not faulty
    return Result(
        server, fault, share, requests, sum(injected.values()), injected, samples, same, faulty, seconds, reason
    )


def epoch(spec: str, options: argparse.Namespace, config: CacheConfig) -> tuple[str, int, int, str]:
    """Digest of an epoch's keys, pixels and tokens, samples shown, samples replaced, and what ended it early."""
    digest, shown = hashlib.blake2b(digest_size=16), 0
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("image_size", "batch_size", "workers", "seed")
    }
    try:
        with loader(spec, **settings, cache=config) as batches:
            for batch in batches:
                digest.update("\n".join(batch["key"]).encode())
                digest.update(batch["image"].contiguous().numpy().tobytes() + batch["text"].numpy().tobytes())
                shown += len(batch["key"])
                if shown >= options.samples:
                    break
            faulty = batches.counts["bad"]
    except MmbaseError as error:
        return "", shown, 0, str(error)
    return digest.hexdigest(), shown, faulty, ""


@contextlib.contextmanager
def start(server: str, shards: Path, scratch: Path) -> Iterator[tuple[str, int, str]]:
    """Start a server of the shards on this machine: its host, its port, and the shards' URLs with PROXY for the host.

    Raises:
        MmbaseError: it is not installed, or does not answer.
    """
    port = _free_port()
    braces = f"{{00000..{len(list(shards.glob('*.tar'))) - 1:05d}}}.tar"
    if server == "nginx":
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if program is None:
            raise MmbaseError("nginx is not installed; install it, or leave it out: --servers s3")
        config = scratch / "nginx.conf"
        shards.chmod(0o755)
        scratch.chmod(0o755)
        config.write_text(NGINX.format(folder=scratch, port=port, root=shards))
        command = [program, "-e", f"{scratch}/error.log", "-p", str(scratch), "-c", str(config)]
        with _running(command, port):
            yield "127.0.0.1", port, f"PROXY/{braces}"
        return
    if shutil.which("moto_server", path=str(Path(sys.executable).parent)) is None:
        raise MmbaseError("moto is not installed; pip install 'mmbase[bench]', or leave it out: --servers nginx")
    os.environ.update(KEYS)
    with _running([str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port):
        import boto3  # pyrefly: ignore[missing-import]

        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="pairs")
        for file in [*sorted(shards.glob("*.tar")), shards / "sizes.json"]:
            client.put_object(Bucket="pairs", Key=file.name, Body=file.read_bytes())
        yield "127.0.0.1", port, f"s3://pairs/{braces}"


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise MmbaseError(f"{command[0]!r} does not answer on port {port} (exit {process.poll()})")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse() -> argparse.Namespace:
    """The options, checked.

    Raises:
        MmbaseError: an option or a value that does not exist.
    """
    every = ["none", *FAULTS, "all"]
    parser = Parser(__doc__ or "")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), help="nginx, s3; both")
    parser.add_argument("--faults", nargs="+", default=every, help=f"{', '.join(every)}; each in turn")
    parser.add_argument("--share", type=float, default=0.4, help="of the shards' GETs that fail (0.4)")
    parser.add_argument(
        "--hold",
        type=float,
        default=6.0,
        help="seconds a stall lasts, twice the loader's patience (6)",
    )
    parser.add_argument("--samples", type=int, default=768, help="pictures in the shards (768)")
    parser.add_argument("--shard-count", type=int, default=24, help="shards (24)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per batch (64)")
    parser.add_argument("--image-size", type=int, default=64, help="side of the result in pixels (64)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for data_faults.csv and data_faults.json")
    options = parser.parse()
    check_names("--servers", options.servers, SERVERS)
    check_names("--faults", options.faults, every)
    for name in ("samples", "shard-count", "batch-size", "image-size"):
        check_at_least(1, f"--{name}", [getattr(options, name.replace("-", "_"))])
    check_at_least(0, "--workers", [options.workers])
    if not 0 < options.share < 1:
        raise MmbaseError(f"--share={options.share} must lie between 0 and 1")
    if options.servers == ["nginx"] and options.faults == ["corrupt"]:
        raise MmbaseError("--faults corrupt: nginx tells no checksum, so that nobody could notice; use --servers s3")
    if options.samples % options.batch_size:
        raise MmbaseError(f"--samples={options.samples} must be a multiple of --batch-size={options.batch_size}")
    return options


def _cells(result: Result) -> list[str]:
    return [
        result.server,
        result.fault,
        str(result.requests),
        str(result.injected),
        str(result.samples),
        "yes" if result.same else f"NO {result.reason}",
        str(result.faulty_samples),
        f"{result.seconds:.1f}",
    ]


if __name__ == "__main__":
    run(main)
