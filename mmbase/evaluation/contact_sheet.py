"""Which predictions a report shows, right and wrong, and the contact sheet of them as a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmbase.evaluation.suite import EvaluationTask
from mmbase.evaluation.thumbnails import as_pil
from mmbase.files import write_atomically

_PAPER, _TILE, _EDGE, _INK, _MUTED = "#fbfaf8", "#ffffff", "#e4e1da", "#1d1c1a", "#6f6b64"
_RIGHT, _WRONG = "#14746f", "#c2410c"
_COLUMNS, _CELL, _PICTURE, _GAP, _MARGIN = 8, 176, 112, 16, 40
_CELL_HEIGHT = _PICTURE + 108


def pick_examples(
    predictions: Sequence[Mapping[str, Any]], count: int = 16, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Positions of at most ``count`` right predictions, drawn at random, and of as many most confident wrong ones.

    Equal confidences keep the order of the samples; a probability that is NaN counts as no confidence.
    """
    right = [position for position, item in enumerate(predictions) if item["top"][0][0] == item["label"]]
    wrong = [position for position, item in enumerate(predictions) if item["top"][0][0] != item["label"]]
    chosen = np.random.default_rng(seed).permutation(len(right))[:count]
    confidence = np.nan_to_num([predictions[position]["top"][0][1] for position in wrong], nan=-1.0)
    surest = np.argsort(-confidence, kind="stable")[:count]
    return sorted(right[index] for index in chosen), [wrong[index] for index in surest]


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: it covers most of the scripts that captions are written in."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 1) -> list[str]:
    """``text`` on at most ``lines`` lines of ``width`` pixels, with an ellipsis where that is too little."""
    wrapped = [""]
    words = text.split()
    for position, word in enumerate(words):
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        elif len(wrapped) < lines:
            wrapped.append(word)
        else:
            wrapped[-1] = " ".join([wrapped[-1], *words[position:]])
            break
    return [_shorten(line, font, width) for line in wrapped]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def _paste(sheet: Image.Image, image: Any, x: int, y: int) -> None:
    """The picture, fitted into and centred in a square of ``_PICTURE`` pixels, over the tile's white."""
    picture = as_pil(image).convert("RGBA")
    scale = _PICTURE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (x + (_PICTURE - size[0]) // 2, y + (_PICTURE - size[1]) // 2), picture)


def _draw_tile(sheet: Image.Image, x: int, y: int, image: Any, prediction: Mapping[str, Any]) -> None:
    draw = ImageDraw.Draw(sheet)
    said, probability = prediction["top"][0]
    right = said == prediction["label"]
    draw.rounded_rectangle((x, y, x + _CELL, y + _CELL_HEIGHT), 12, fill=_TILE, outline=_EDGE, width=2)
    _paste(sheet, image, x + (_CELL - _PICTURE) // 2, y + 12)
    bold, plain = _font(14, bold=True), _font(13)
    note = f"{100 * np.nan_to_num(probability):.0f} %" + ("" if right else f", true: {prediction['label']}")
    y += _PICTURE + 22
    for line in _wrap(f"{'✓' if right else '✗'} {said}", bold, _CELL - 24, 2):
        draw.text((x + 12, y), line, font=bold, fill=_RIGHT if right else _WRONG)
        y += 19
    for line in _wrap(note, plain, _CELL - 24, 2):
        draw.text((x + 12, y + 3), line, font=plain, fill=_MUTED)
        y += 18


def _draw_row(sheet: Image.Image, y: int, heading: str, positions: Sequence[int], task: EvaluationTask,
              predictions: Sequence[Mapping[str, Any]]) -> int:  # fmt: skip
    """Draw a heading and one or more rows of tiles from ``y`` on; returns where the next thing may start."""
    ImageDraw.Draw(sheet).text((_MARGIN, y), heading, font=_font(17), fill=_MUTED)
    y += 34
    for start in range(0, len(positions), _COLUMNS):
        for column, position in enumerate(positions[start : start + _COLUMNS]):
            x = _MARGIN + column * (_CELL + _GAP)
            _draw_tile(sheet, x, y, task.samples[position]["image"], predictions[position])
        y += _CELL_HEIGHT + _GAP
    return y + 10


def write_contact_sheet(
    path: str | Path, tasks: Sequence[EvaluationTask], results: Mapping[str, Any], count: int = 8, seed: int = 0
) -> Path | None:
    """Draw right and wrong predictions of every zero-shot task into one PNG, 1,600 pixels wide.

    Args:
        path: the PNG, written whole or not at all.
        tasks: what was evaluated; images are taken from the samples.
        results: of ``mmbase.evaluation.suite.evaluate``.
        count: at most so many right ones and so many wrong ones per task.
        seed: draws the right ones.

    Returns:
        ``path``, or None where no task has predictions.
    """
    shown = [task for task in tasks if results["tasks"][task.name].get("predictions")]
    if not shown:
        return None
    rows = -(-count // _COLUMNS)
    height = 2 * _MARGIN + len(shown) * (56 + 2 * (44 + rows * (_CELL_HEIGHT + _GAP)))
    sheet = Image.new("RGB", (2 * _MARGIN + _COLUMNS * (_CELL + _GAP) - _GAP, height), _PAPER)
    y = _MARGIN
    for task in shown:
        result = results["tasks"][task.name]
        right, wrong = pick_examples(result["predictions"], count, seed)
        scores = result["zero_shot"]
        title = f"{task.heading}: {100 * scores['top1']:.1f} % right among {scores['classes']:,} labels"
        font = _font(24, bold=True)
        title = _shorten(title, font, sheet.width - 2 * _MARGIN)
        ImageDraw.Draw(sheet).text((_MARGIN, y), title, font=font, fill=_INK)
        y += 48
        for heading, positions in (("Right, drawn at random", right), ("Wrong, the most confident first", wrong)):
            if positions:
                y = _draw_row(sheet, y, heading, positions, task, result["predictions"])
    sheet = sheet.crop((0, 0, sheet.width, min(sheet.height, y - 26 + _MARGIN)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return write_atomically(path, buffer.getvalue())
