"""Labelled grids of pictures, for notebooks, reports and a look at a training run."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_FONT_SIZE = 13
_LINE_HEIGHT = 16
_MARGIN = 8
_INK = (40, 40, 40)


def image_grid(
    images: UInt8[np.ndarray, "count height width 3"],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    headings: Sequence[str] | None = None,
    picture_size: int = 128,
) -> Image.Image:
    """Lay pictures out row by row, each with its caption below.

    Args:
        images: Pictures, uint8 RGB.
        captions: One for each picture; long ones are wrapped.
        columns: Pictures a row; by default the number of headings, or else a grid about as wide
            as high.
        headings: One for each column, written above it.
        picture_size: Width of a picture in the grid, in pixels; pictures are scaled to it.

    Returns:
        An RGB picture on white.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: A wrong shape, or numbers of captions, headings and columns that do not fit.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (count, height, width, 3), got {images.shape}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(
            f"there must be one caption for each image, got {len(captions)} captions "
            f"and {len(images)} images"
        )
    if picture_size < 1:
        raise ValueError(f"picture_size must be at least 1, got {picture_size}")
    if columns is None:
        columns = len(headings) if headings else int(np.ceil(np.sqrt(len(images))))
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if headings is not None and len(headings) != columns:
        raise ValueError(
            f"there must be one heading for each column, got {len(headings)} headings "
            f"and {columns} columns"
        )

    font = ImageFont.load_default(_FONT_SIZE)
    width = picture_size
    height = max(1, round(picture_size * images.shape[1] / images.shape[2]))
    labels = [_wrap(caption, width, font) for caption in captions or []]
    label_height = _LINE_HEIGHT * max((len(lines) for lines in labels), default=0)
    titles = [_wrap(heading, width, font) for heading in headings or []]
    top = _MARGIN + _LINE_HEIGHT * max((len(lines) for lines in titles), default=0)
    rows = -(-len(images) // columns)
    column_width, row_height = width + _MARGIN, height + label_height + _MARGIN
    size = (_MARGIN + columns * column_width, top + rows * row_height)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)

    def write(lines: list[str], column: int, y: int) -> None:
        middle = _MARGIN + column * column_width + width / 2
        for number, line in enumerate(lines):
            draw.text((middle, y + number * _LINE_HEIGHT), line, _INK, font, anchor="ma")

    for column, lines in enumerate(titles):
        write(lines, column, _MARGIN // 2)
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        y = top + row * row_height
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        grid.paste(picture, (_MARGIN + column * column_width, y))
        if labels:
            write(labels[index], column, y + height + 2)
    return grid


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text into lines that fit; a single word may stick out."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
