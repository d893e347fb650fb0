"""Pictures that look the same: a small signature of a picture, and the search for an earlier one close to it.

A signature is 128 bits of brightness gradients (the "difference hash" of N. Krawetz, 2013, in both directions on an
8 x 8 grid), which survive scaling, re-encoding and small changes, and a 4 x 4 thumbnail in colour, which keeps apart
what differs in colour alone (hearts, flags, blank cards).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from PIL import Image

from mmbase.data.image import to_rgb

SIGNATURE_BYTES = 16 + 48
MOST_BITS = 6
"""Gradient bits that may differ between pictures that look the same; 7 is the most that 8 bands can promise to find."""
MOST_COLOUR = 20
"""Levels (of 255) by which any cell of the thumbnails may differ."""
_BANDS = 8
_GREY = (128, 128, 128)


def signature(image: Image.Image) -> bytes:
    """The signature of a decoded picture, 64 bytes; transparent pixels are shown on grey."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*_GREY, 255)), layer)
    small = to_rgb(image).resize((36, 36), Image.Resampling.BOX, reducing_gap=2.0)
    grey = small.convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])
    return np.packbits(bits).tobytes() + np.asarray(small.resize((4, 4), Image.Resampling.BOX)).tobytes()


def look_the_same(one: bytes, other: bytes) -> bool:
    """Whether two signatures are of pictures that look the same."""
    if (int.from_bytes(one[:16]) ^ int.from_bytes(other[:16])).bit_count() > MOST_BITS:
        return False
    a, b = (np.frombuffer(s, np.uint8, offset=16).astype(np.int16) for s in (one, other))
    return bool(np.abs(a - b).max() <= MOST_COLOUR)


class NearDuplicates:
    """Finds, among the signatures added before, the first that looks the same.

    The 128 bits are cut into 8 bands: two signatures at most 7 bits apart agree in one band at least, so only those
    that share a band are compared. Memory: about 0.6 kB a picture.
    """

    def __init__(self) -> None:
        self._signatures: list[bytes] = []
        self._bands: list[defaultdict[bytes, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]

    def __len__(self) -> int:
        return len(self._signatures)

    def find(self, new: bytes) -> int | None:
        """Number (in order of adding) of the first earlier picture that looks the same; None: there is none."""
        bits = int.from_bytes(new[:16])
        found: int | None = None
        for band, key in zip(self._bands, _keys(new)):
            for number in band.get(key, ()):
                if found is not None and number >= found:
                    break  # numbers ascend within a band
                other = self._signatures[number]
                if (bits ^ int.from_bytes(other[:16])).bit_count() <= MOST_BITS and look_the_same(new, other):
                    found = number
                    break
        return found

    def add(self, new: bytes) -> int:
        """Remember a signature; its number."""
        number = len(self._signatures)
        self._signatures.append(new)
        for band, key in zip(self._bands, _keys(new)):
            band[key].append(number)
        return number


def _keys(signature: bytes) -> list[bytes]:
    return [signature[2 * i : 2 * i + 2] for i in range(_BANDS)]
