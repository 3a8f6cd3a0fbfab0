import numpy as np
import pytest

from jaxgen.pictures import image_grid


def solid(*colors, size=8):
    return np.stack([np.full((size, size, 3), color, np.uint8) for color in colors])


def test_pictures_lie_row_by_row():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grid = np.asarray(image_grid(solid(*colors), columns=2, picture_size=16))
    centers = [(16, 16), (16, 40), (40, 16)]  # 8 pixels of margin around each
    for (y, x), color in zip(centers, colors, strict=True):
        assert tuple(grid[y, x]) == color
    assert tuple(grid[40, 40]) == (255, 255, 255)


def test_captions_take_room_and_ink():
    plain = image_grid(solid((255, 255, 255)))
    labelled = image_grid(solid((255, 255, 255)), ["woman firefighter medium dark skin tone"])
    assert labelled.width == plain.width
    assert labelled.height >= plain.height + 2 * 16  # wrapped
    assert np.asarray(plain).min() == 255
    assert np.asarray(labelled).min() < 100


def test_headings_decide_the_columns():
    grid = image_grid(solid(*[(255, 255, 255)] * 4), headings=["large", "small"], picture_size=64)
    assert grid.width == 8 + 2 * (64 + 8)
    assert np.asarray(grid)[:20].min() < 100


def test_keeps_the_aspect_ratio():
    grid = image_grid(np.zeros((1, 8, 16, 3), np.uint8), picture_size=32)
    dark = (np.asarray(grid).max(-1) == 0).nonzero()
    assert np.ptp(dark[0]) + 1 == 16
    assert np.ptp(dark[1]) + 1 == 32


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 8, 8)), {}, "images must be uint8, got float64"),
        (np.zeros((8, 8, 3), np.uint8), {}, r"\(count, height, width, 3\), got \(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, r"got \(0, 8, 8, 3\)"),
        (solid(0, 0), {"captions": ["one"]}, "got 1 captions and 2 images"),
        (solid(0), {"columns": 0}, "columns must be at least 1, got 0"),
        (solid(0), {"picture_size": 0}, "picture_size must be at least 1, got 0"),
        (solid(0, 0), {"columns": 2, "headings": ["a"]}, "got 1 headings and 2 columns"),
    ],
)
def test_refuses(images, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        image_grid(images, **options)
