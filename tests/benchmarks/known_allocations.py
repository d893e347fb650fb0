"""For test_memory.py: calls whose peak memory is known, imported by the child process that measures them."""

import os

import torch

MEGABYTE = 1 << 20


def calls(contenders, megabytes):
    def allocate(count):
        return torch.ones(count * MEGABYTE // 4).sum()

    def twice():
        allocate(megabytes)
        allocate(megabytes)

    table = {
        "once": lambda: allocate(megabytes),
        "one after the other": twice,
        "small": lambda: allocate(40),
        "raises": lambda: 1 / 0,
        "dies": lambda: os._exit(3),
        "more than there is": lambda: torch.ones(1 << 45),
    }
    for name in contenders:
        yield name, table[name]
