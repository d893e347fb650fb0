"""Command line options whose mistakes are one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch

from mmbase.errors import MmbaseError, nearest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`mmbase.errors.MmbaseError` in place of usage and exit."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """Parse `arguments` (the process's own by default); an unknown option gets the nearest names."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [text for action in self._actions for text in action.option_strings]
            raise MmbaseError(f"unknown option {unknown[0]!r}{nearest(unknown[0], known)}; --help lists all")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise MmbaseError(f"{message}; --help lists the options")


def check_names(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a value that is not among the `known` ones.

    Raises:
        MmbaseError: names the value and those nearest to it.
    """
    known = list(known)
    for value in given:
        if value not in known:
            raise MmbaseError(f"{option}={value!r} is not one of {', '.join(known)}{nearest(value, known)}")


def check_at_least(least: int, option: str, given: Iterable[int]) -> None:
    """Refuse numbers below `least`.

    Raises:
        MmbaseError: names the option and the value.
    """
    for value in given:
        if value < least:
            raise MmbaseError(f"{option}={value} must be at least {least}")


def device_of(name: str) -> torch.device:
    """The device called `name`, made the current one; ``auto`` is the GPU where there is one.

    Raises:
        MmbaseError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MmbaseError(f"--device={name!r} is no device; use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise MmbaseError(f"--device={name!r}: only cpu and cuda are benchmarked")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MmbaseError(f"--device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def run(main: Callable[[], None]) -> None:
    """Entry point of ``python -m mmbase_bench.SUBJECT``: a mistake is one line on stderr and exit code 2."""
    try:
        main()
    except MmbaseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
