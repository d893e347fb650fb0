"""Fetching ahead: the first needed first, and no thread lost to an error of any kind."""

import threading
import time

from mmbase.data.prefetching import Prefetcher


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_what_is_wanted_last_is_fetched_in_its_order():
    begun, go = [], threading.Event()

    def fetch(url):
        begun.append(url)
        go.wait(10)

    prefetcher = Prefetcher(fetch, 1)
    prefetcher.want(["a", "b"])
    wait_until(lambda: begun == ["a"])
    prefetcher.want(["d", "c", "d", "a"])
    go.set()
    wait_until(lambda: begun == ["a", "d", "c"])


def test_an_error_of_any_kind_costs_one_shard_and_no_thread(monkeypatch):
    fetched, died = [], []
    monkeypatch.setattr(threading, "excepthook", died.append)

    def fetch(url):
        fetched.append(url)
        if fetched.count(url) == 1:
            raise PermissionError(13, "cannot make the folder")

    prefetcher = Prefetcher(fetch, 2)
    for _ in range(2):
        prefetcher.want(["a", "b", "c", "d"])
        wait_until(lambda: not prefetcher._busy and not prefetcher._wanted)
    assert sorted(fetched) == sorted("abcd" * 2) and not died
