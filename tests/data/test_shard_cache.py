"""Shards from elsewhere arrive whole through every fault; the cache stays within its bounds, between processes too."""

import base64
import bz2
import fcntl
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmbase.data.cache_config import CacheConfig
from mmbase.data.checksums import told_by
from mmbase.data.remote import RemoteError, read_small, source_of
from mmbase.data.shard_cache import CacheFull, ShardCache, release
from mmbase.errors import MmbaseError
from mmbase_bench.fault_server import FAULTS, FaultServer, Plan, folder

from .little_shards import write_shards

QUICK = {"backoff": 0.01, "connect_timeout": 2, "first_byte_timeout": 0.5, "stall_timeout": 0.4, "total_timeout": 30}
CLOSE = 10.0
"""Seconds beyond a time-out after which something hangs."""


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("web"), [6, 5, 7, 4])


@pytest.fixture
def serve(web):
    servers = []

    def start(root=web, plan=None, **options):
        servers.append(FaultServer(folder(root, **options), plan or Plan(seconds=1.0)).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def cache(tmp_path):
    def make(**options):
        return ShardCache(CacheConfig(folder=str(tmp_path / "cache"), **QUICK | options))

    return make


def content_of(cache, url, timeout=30.0):
    descriptor = cache.open(url, timeout)
    try:
        return os.pread(descriptor, 1 << 30, 0)
    finally:
        release(descriptor)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_shard_comes_whole_through_each_fault(kind, web, serve, cache):
    server = serve(md5=kind == "corrupt")
    server.plan.script = [kind, kind]
    kept = cache()
    assert content_of(kept, f"{server.url}/000.tar") == (web / "000.tar").read_bytes()
    assert server.counts[kind] == 2 and kept.counts["fetched"] == 1
    offsets = [asked for method, _, asked in server.requests if method == "GET"]
    resumed = kind in ("stall", "cut", "truncate", "trickle")
    assert (offsets[1] != "bytes=0-") == resumed == bool(kept.counts["resumed"])
    assert content_of(kept, f"{server.url}/000.tar") and len(server.requests) == 3, "kept: not asked for again"


def test_servers_without_ranges_or_validators(web, serve, cache):
    for options in ({"ranges": False}, {"etag": False}):
        server = serve(**options)
        server.plan.script = ["cut", "cut"]
        assert content_of(cache(), f"{server.url}/000.tar") == (web / "000.tar").read_bytes()


def test_a_file_that_changes_during_the_fetch_is_fetched_anew(web, tmp_path, serve, cache):
    (tmp_path / "x.tar").write_bytes((web / "000.tar").read_bytes())
    server = serve(tmp_path)
    server.plan.script = ["cut"]
    backend = server.backend

    def swapping(method, path, headers):
        if len(server.requests) == 2:
            (tmp_path / "x.tar").write_bytes((web / "002.tar").read_bytes())
        return backend(method, path, headers)

    server.backend = swapping
    assert content_of(cache(), f"{server.url}/x.tar") == (web / "002.tar").read_bytes()


def test_what_is_gone_is_said_at_once_and_remembered(serve, cache):
    server = serve()
    kept = cache()
    for _ in range(3):
        with pytest.raises(RemoteError, match=r"the shard 'http.*/absent.tar' cannot be had: HTTP 404"):
            kept.open(f"{server.url}/absent.tar", 10)
    assert len(server.requests) == 1


def test_giving_up_says_after_what(serve, cache, caplog):
    server = serve(plan=Plan(share=1.0, kinds=["error"], in_a_row=99))
    with pytest.raises(RemoteError, match=r"failed 3 times in a row, last: HTTP 50[03]"):
        cache(attempts=3).open(f"{server.url}/000.tar", 10)
    assert len(server.requests) == 3
    assert "000.tar': HTTP 50" in caplog.text and "trying again, 3 times in all" in caplog.text
    server = serve(plan=Plan(share=1.0, kinds=["stall"], in_a_row=99, seconds=5))
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"did not come within 1 s"):
        cache(attempts=99).open(f"{server.url}/001.tar", 1.0)
    assert time.monotonic() - begun < 1.0 + CLOSE
    with pytest.raises(RemoteError, match=r"no connection: .*refused"):
        cache(attempts=2).open("http://127.0.0.1:9/x.tar", 10)
    with pytest.raises(RemoteError, match=r"came 3 times with a wrong checksum|failed"):
        server = serve(plan=Plan(share=1.0, kinds=["corrupt"], in_a_row=99), md5=True)
        cache().open(f"{server.url}/000.tar", 10)
    with pytest.raises(RemoteError, match=r"bad URL"):
        cache().open("http://[oops/x.tar", 10)


def test_a_server_that_never_accepts(cache):
    import socket

    with socket.socket() as listening:  # a full backlog: connections are not answered
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=r"timed out: waited 0.3 s for (a connection|the first byte)"):
            cache(attempts=1, connect_timeout=0.3, first_byte_timeout=0.3).open(f"http://127.0.0.1:{port}/x.tar", 10)
        assert time.monotonic() - begun < CLOSE
        for filler in fillers:
            filler.close()


def test_the_least_recently_used_give_way_and_what_is_in_use_stays(web, serve, cache):
    server = serve()
    urls = [f"{server.url}/00{i}.tar" for i in range(4)]
    sizes = [(web / f"00{i}.tar").stat().st_size for i in range(4)]
    kept = cache(max_bytes=1 << 20)
    kept.config = kept.config.model_copy(update={"max_bytes": sizes[0] + sizes[1] + sizes[2]})
    in_use = kept.open(urls[0], 10)
    content_of(kept, urls[1])
    content_of(kept, urls[2])
    content_of(kept, urls[1])  # now 2 is the least recently used but 0, which is open
    content_of(kept, urls[3])
    assert [kept.has(url) for url in urls] == [True, True, False, True] and kept.counts["evicted"] == 1
    others = [kept.open(url, 10) for url in (urls[1], urls[3])]
    with pytest.raises(CacheFull, match=r"holds only shards in use; raise data.cache.max_bytes"):
        kept.open(urls[2], 10)
    release(others[0])
    assert content_of(kept, urls[2]) == (web / "002.tar").read_bytes() and not kept.has(urls[1])
    kept.config = kept.config.model_copy(update={"max_bytes": sizes[1] - 1})
    with pytest.raises(MmbaseError, match=r"is larger than the cache"):
        kept.open(urls[1], 10)
    for descriptor in (in_use, others[1]):
        release(descriptor)


WORKER = """
import os, sys
from mmbase.data.cache_config import CacheConfig
from mmbase.data.shard_cache import ShardCache, release
cache = ShardCache(CacheConfig(folder=sys.argv[1], backoff=0.01, stall_timeout=20))
print("begun", flush=True)
for url in sys.argv[2:]:
    descriptor = cache.open(url, 30)
    print(os.fstat(descriptor).st_size, flush=True)
    release(descriptor)
"""


def start_worker(tmp_path, *urls):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "cache"), *urls]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_one_fetch(web, tmp_path, serve):
    server = serve()
    urls = [f"{server.url}/00{i}.tar" for i in range(4)]
    workers = [start_worker(tmp_path, *urls[i:], *urls[:i]) for i in range(3)]
    expected = sorted(str((web / f"00{i}.tar").stat().st_size) for i in range(4))
    for worker in workers:
        assert sorted(worker.communicate(timeout=60)[0].split()[1:]) == expected
    assert server.counts["requests"] == 4


def test_the_next_process_goes_on_where_a_killed_one_was(web, tmp_path, serve, cache):
    server = serve(plan=Plan(seconds=30))
    server.plan.script = ["stall"]
    worker = start_worker(tmp_path, f"{server.url}/000.tar")
    kept = cache()
    part = kept.place(f"{server.url}/000.tar").part
    half = (web / "000.tar").stat().st_size // 2
    until = time.monotonic() + 30
    while time.monotonic() < until and not (part.exists() and part.stat().st_size >= half):
        time.sleep(0.02)
    with pytest.raises(RemoteError, match=r"waited 0 s for another process to fetch"):
        kept.fetch(f"{server.url}/000.tar", 0.1)
    assert kept.fetch(f"{server.url}/000.tar", 1, wait=False) is False
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert content_of(kept, f"{server.url}/000.tar") == (web / "000.tar").read_bytes()
    assert server.requests[-1][2] == f"bytes={half}-"
    left = {file.suffix for file in part.parent.iterdir()}
    assert left == {".tar", ".json", ".lock"}


def test_a_forked_child_does_not_keep_a_lock(tmp_path, serve, cache):
    server = serve()
    kept = cache()
    descriptor = kept.open(f"{server.url}/000.tar", 10)
    child = os.fork()
    if not child:
        time.sleep(5)
        os._exit(0)
    release(descriptor)
    other = os.open(kept.place(f"{server.url}/000.tar").data, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_kept_shard_is_asked_about_when_it_is_time(web, tmp_path, serve, cache, caplog):
    (tmp_path / "x.tar").write_bytes((web / "000.tar").read_bytes())
    server = serve(tmp_path)
    url = f"{server.url}/x.tar"
    assert content_of(cache(), url) == (web / "000.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes((web / "001.tar").read_bytes())
    assert content_of(cache(), url) == (web / "000.tar").read_bytes()
    assert content_of(cache(revalidate=0), url) == (web / "001.tar").read_bytes()
    server.__exit__()
    assert content_of(cache(revalidate=0, attempts=1), url) == (web / "001.tar").read_bytes()
    assert "using the kept copy" in caplog.text


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_compressed_shards(pack, web, tmp_path, serve, cache):
    plain = (web / "000.tar").read_bytes()
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(pack(plain))
    kept = cache()
    assert content_of(kept, str(packed)) == plain
    server = serve(tmp_path)
    server.plan.script = ["cut"]
    assert content_of(kept, f"{server.url}/x.tar.gz") == plain
    packed.write_bytes(pack(plain[:5120]))
    assert content_of(kept, str(packed)) == plain[:5120], "made anew, since the file is another"
    packed.write_bytes(pack(plain)[:-200])
    cut = content_of(kept, str(packed))
    assert len(cut) < len(plain) and plain.startswith(cut)


def test_a_bomb_ends_at_the_bound(tmp_path, cache):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(80 << 20)))
    kept = cache(max_bytes=1 << 20)
    with pytest.raises(MmbaseError, match=r"of over \d+ bytes is larger than the cache"):
        kept.open(str(tmp_path / "x.tar.gz"), 20)
    kept.config = kept.config.model_copy(update={"max_bytes": 1 << 30})
    assert len(content_of(kept, str(tmp_path / "x.tar.gz"))) == 80 << 20


def test_commands(web, tmp_path, cache):
    kept = cache(attempts=2)
    assert content_of(kept, f"pipe:cat {web}/000.tar") == (web / "000.tar").read_bytes()
    assert content_of(kept, f"pipe:gzip -c {web}/000.tar | cat") == (web / "000.tar").read_bytes()
    once = tmp_path / "once"
    flaky = f"pipe:if [ -e {once} ]; then cat {web}/001.tar; else touch {once}; head -c 700 {web}/001.tar; exit 3; fi"
    assert content_of(kept, flaky) == (web / "001.tar").read_bytes()
    for command, reason in {
        "pipe:echo half; echo no such bucket >&2; exit 5": r"failed 2 times in a row, last: exit 5: no such bucket",
        "pipe:no-such-program-anywhere x.tar": r"cannot be had: the command cannot be run \(exit 127\)",
        "pipe:echo a; sleep 60": r"stalled: no byte of the command's output for 0.4 s",
    }.items():
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=reason):
            kept.open(command, 20)
        assert time.monotonic() - begun < 2 + CLOSE
    sleeping = subprocess.run(["pgrep", "-f", "^sleep 60$"], capture_output=True, text=True).stdout
    assert not sleeping, "what a command started ends with it"


def test_small_files(web, serve):
    server = serve(md5=True)
    server.plan.script = ["cut", "error", "truncate", "corrupt"]
    config = CacheConfig(**QUICK)
    assert read_small(f"{server.url}/000.tar", config) == (web / "000.tar").read_bytes()
    assert read_small(f"{server.url}/sizes.json", config) is None
    with pytest.raises(RemoteError, match="longer than 10 bytes"):
        read_small(f"{server.url}/000.tar", config, limit=10)


def test_file_systems_of_fsspec_and_one_that_hangs(web, cache, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    fsspec.filesystem("memory").pipe("/bucket/x.tar", (web / "000.tar").read_bytes())
    kept = cache(attempts=2, first_byte_timeout=0.3)
    assert content_of(kept, "memory://bucket/x.tar") == (web / "000.tar").read_bytes()
    with pytest.raises(RemoteError, match=r"cannot be had: FileNotFoundError"):
        kept.open("memory://bucket/absent.tar", 10)
    with pytest.raises(MmbaseError, match=r"of no kind that fsspec knows"):
        kept.open("nosuch://bucket/x.tar", 10)
    whole = MemoryFileSystem.cat_file
    answers = [lambda *_: b"cut", lambda *_: time.sleep(3), OSError("reset"), None]

    def cat_file(self, path, start=None, end=None, **options):
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer() if answer else whole(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    fsspec.filesystem("memory").pipe("/bucket/y.tar", (web / "001.tar").read_bytes())
    begun = time.monotonic()
    assert content_of(cache(first_byte_timeout=0.3), "memory://bucket/y.tar") == (web / "001.tar").read_bytes()
    assert not answers and time.monotonic() - begun < CLOSE


def test_s3_through_faults(web, cache, monkeypatch):
    boto3, server_of = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from mmbase_bench.fault_server import upstream

    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    moto = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="pairs")
        client.put_object(Bucket="pairs", Key="000.tar", Body=(web / "000.tar").read_bytes())
        with FaultServer(upstream(host, port), Plan(seconds=1.0)) as proxy:
            proxy.plan.script = ["cut", "error", "corrupt"]
            kept = cache(storage_options={"endpoint_url": proxy.url}, first_byte_timeout=10)
            assert content_of(kept, "s3://pairs/000.tar") == (web / "000.tar").read_bytes()
            assert [proxy.counts[kind] for kind in ("cut", "error", "corrupt")] == [1, 1, 1]
            assert source_of("s3://pairs/000.tar", kept.config).facts().checksums, "an ETag is an MD5 there"
            with pytest.raises(RemoteError, match="FileNotFoundError"):
                kept.open("s3://pairs/absent.tar", 30)
    finally:
        moto.stop()


def test_checksums_that_servers_tell():
    md5 = hashlib.md5(b"x").digest()
    text = base64.b64encode(md5).decode()
    assert told_by({"Content-MD5": text}) == {"md5": md5}
    assert told_by({"Content-MD5": text, "Content-Range": "bytes 1-2/3"}) == {}
    assert told_by({"x-goog-hash": f"crc32c=AAAAAA==, md5={text}"}) == {"crc32c": bytes(4), "md5": md5}
    assert told_by({"X-Amz-Checksum-Crc32": "AAAAAA=="}) == {"crc32": bytes(4)}
    assert told_by({"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-type": "COMPOSITE"}) == {}
    etag = {"ETag": f'"{md5.hex()}"'}
    assert told_by(etag) == {}, "only S3 says an MD5 so"
    amazon = {**etag, "x-amz-request-id": "1"}
    assert told_by(amazon) == {"md5": md5}
    assert told_by({**amazon, "x-amz-server-side-encryption": "aws:kms"}) == {}
    assert told_by({**amazon, "ETag": f'"{md5.hex()}-3"'}) == {}, "of several parts"
    assert told_by({"Content-MD5": "%%%"}) == {}


def test_a_folder_that_cannot_be_written(serve, tmp_path):
    (tmp_path / "file").write_text("in the way")
    server = serve()
    with pytest.raises(MmbaseError, match=r"cannot keep the shard|cannot"):
        ShardCache(CacheConfig(folder=str(tmp_path / "file"), **QUICK)).open(f"{server.url}/000.tar", 5)


def test_places_are_told_apart_and_stay_in_the_folder(cache, tmp_path):
    kept = cache()
    urls = [
        "http://a/x.tar",
        "http://b/x.tar",
        "http://a/../../x.tar?sig=../..",
        "pipe:cat /a/b.tar | tee ../x",
        "x.tar",
    ]
    places = [kept.place(url).data for url in urls]
    assert len(set(places)) == len(urls)
    assert all(Path(os.path.abspath(place)).is_relative_to(tmp_path / "cache") for place in places)
