"""Reasons for a bad sample, gathered into kinds that can be counted."""

from __future__ import annotations

import re

_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b0x[0-9a-f]+\b|(?<![\w-])\d[\d,.]*(?<![.,])")
_SUBJECT = re.compile(r"^(the picture of N bytes|a picture of N x N pixels|…) (is|has) ")
_REMEDY = re.compile(r"; (check|make|give|use|cut|replace|set|name|convert)\b.*$")


def kind_of(reason: str) -> str:
    """``reason`` without names, numbers and remedies, so that equal troubles count as one kind.

    ``"the picture of 812 bytes is corrupt or truncated: image file is truncated (3 bytes not processed)"`` becomes
    ``"corrupt or truncated: image file is truncated (N bytes not processed)"``.
    """
    text = " ".join(reason.split())
    text = _VARIABLE.sub(lambda match: "…" if match[0][0] in "'\"" else "N", text)
    text = _REMEDY.sub("", _SUBJECT.sub("", text))
    return text[:160]
