"""Shard lists: what a specification of files, folders, patterns and URLs names, in order."""

from __future__ import annotations

import glob
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmbase.errors import MmbaseError, nearest

EMBEDDED = {"emoji": Path(__file__).parent / "emoji"}
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """Shard paths and URLs of one or several specifications, in order.

    A specification is a tar file (``.tar``, ``.tar.gz``, ``.tgz``), a folder (all its shards in name order),
    ``emoji:NAME`` for a shard that comes with mmbase (``emoji:`` alone for all), a ``file:`` or any other URL that
    fsspec knows (``https:``, ``s3:``, ``gs:``; one that ends in ``/`` is a folder, save for ``http:``), or
    ``pipe:COMMAND`` whose output is a tar. Each may hold brace patterns such as ``noto-{000..001}.tar``, paths also
    ``*`` and ``?``; ``::`` between two of them, as OpenCLIP writes, is a list as well.

    Raises:
        MmbaseError: a file or folder that does not exist, a folder without shards, an empty list.
    """
    shards: list[str] = []
    for name in _names(spec):
        scheme = scheme_of(name)
        if scheme == "pipe":
            shards.append(name)
        elif scheme in EMBEDDED:
            rest = name.partition(":")[2]
            shards.extend(_local_shards(EMBEDDED[scheme] / rest if rest else EMBEDDED[scheme]))
        elif not scheme or scheme == "file":
            shards.extend(_local_shards(local_path(name)))
        elif name.endswith("/"):
            shards.extend(_remote_folder(name))
        else:
            shards.append(name)
    if not shards:
        raise MmbaseError("no shards given: name tar files or a folder of them, such as data.shards=shards/")
    return shards


def scheme_of(name: str) -> str:
    """``"s3"`` of ``"s3://bucket/x.tar"``; empty for a path (a single letter is a Windows drive)."""
    scheme, colon, _ = name.partition(":")
    return scheme if colon and len(scheme) > 1 and scheme.replace("+", "").isalnum() else ""


def local_path(name: str) -> Path:
    """The path that a path or ``file:`` URL names."""
    if scheme_of(name) == "file":
        rest = name.partition(":")[2]
        rest = rest.removeprefix("//localhost") if rest.startswith("//localhost/") else rest.removeprefix("//")
        name = urllib.parse.unquote(rest)
    return Path(name).expanduser()


def _names(spec: str | Sequence[str]) -> Iterator[str]:
    import braceexpand

    for item in [spec] if isinstance(spec, (str, Path)) else spec:
        text = str(item)
        for part in [text] if text.startswith("pipe:") else text.split("::"):
            if part:
                yield from braceexpand.braceexpand(part)


def _local_shards(path: Path) -> list[str]:
    path = path.expanduser()
    if path.is_dir():
        found = sorted(str(p) for p in path.iterdir() if p.name.endswith(SHARD_SUFFIXES) and p.is_file())
        if not found:
            raise MmbaseError(f"the folder {str(path)!r} holds no .tar shards; name a folder of WebDataset tars")
        return found
    if path.is_file():
        return [str(path)]
    if path.exists():
        raise MmbaseError(f"the shard {str(path)!r} is neither a file nor a folder; name a tar, or pipe:COMMAND")
    matches = sorted(glob.glob(str(path))) if any(sign in str(path) for sign in "*?[") else []
    if matches:
        return matches
    beside = [p.name for p in path.parent.glob("*.tar*")] if path.parent.is_dir() else []
    raise MmbaseError(f"there is no shard {str(path)!r}{nearest(path.name, beside) or '; check the path'}")


def _remote_folder(url: str) -> list[str]:
    if url.startswith(("http:", "https:")):
        raise MmbaseError(
            f"{url!r}: an HTTP server lists no folders; name its shards, such as {url}{{00000..00099}}.tar"
        )
    from mmbase.data.remote import list_folder

    found = [name for name in list_folder(url) if name.endswith(SHARD_SUFFIXES)]
    if not found:
        raise MmbaseError(f"the folder {url!r} holds no .tar shards; check the URL")
    return found
