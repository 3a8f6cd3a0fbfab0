"""The figures that `train.moving_emoji` films: OpenMoji pictures with transparency.

They are drawn once by resvg, cut to their outline, and kept at several sizes, each about
1.4 times the next (a mipmap, Williams 1983). A clip reads every frame from the smallest size that
is at least as large as the figure there, so that one bilinear look-up a pixel neither blurs nor
flickers. Colors are stored multiplied by alpha, without which interpolation would mix the color of
transparent pixels into outlines.
"""

import dataclasses
import functools
import math
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt32

from train.cached_arrays import cache_folder, read_cache, write_cache
from train.openmoji import (
    cache_recipe,
    missing_package,
    rasterize,
    svg_paths,
)

# What moves, as OpenMoji calls it and, behind "=", as captions call it where that is another name.
# Figures seen from the side look left (<) or right (>) as drawn; others have no mark.
_CATALOG = """
bat, bear, <beaver, >honeybee=bee, >bird, >bison, bug=caterpillar, butterfly, <camel, <cat,
baby chick=chick, <cow, crab, >crocodile, <deer, <dog, <dolphin, >dragon, <duck, <eagle, <elephant,
<ewe=sheep, >fish, fox, frog, <giraffe, <goat, <gorilla, hamster, <hedgehog, <hippopotamus=hippo,
<horse, jellyfish, koala, lady beetle=ladybug, <leopard, lion, lobster, <monkey, <mouse, octopus,
owl, panda, peacock, penguin, phoenix, <pig, <polar bear, <rabbit, >raccoon, <rhinoceros=rhino,
<rooster, >sauropod=dinosaur, >shark, >snail, >snake, <swan, <tiger, >tropical fish, <turtle,
<unicorn, <whale, wolf, <zebra,

airplane, <ambulance, <articulated lorry=truck, <automobile=red car, <bicycle, <bullet train, <bus,
<fire engine=fire truck, flying saucer, >helicopter, <locomotive, <motor scooter=scooter,
<motorcycle, parachute, <police car, <racing car, rocket, >roller skate, sailboat, <speedboat,
<sport utility vehicle=jeep, <taxi, <tractor, railway car,

avocado, banana, beer mug, birthday cake, bubble tea, candy, carrot, cheese wedge, chocolate bar,
cookie, croissant, cucumber, cupcake, doughnut, eggplant, green apple, hamburger, honey pot,
hot dog, soft ice cream=ice cream, kiwi fruit=kiwi, lemon, lollipop, mushroom, peach, pear, pie,
pineapple, pizza, pretzel, red apple, sandwich, strawberry, taco, tangerine, teapot, tomato,
watermelon,

alien, astronaut, baby, clown face=clown, construction worker=builder, cook, detective, farmer,
firefighter, ghost, mage=wizard, mermaid, ninja, old man, old woman, pilot, police officer, prince,
princess, robot, santa claus, scientist, snowman, superhero, teddy bear, troll, vampire, zombie,

accordion, alarm clock, backpack, balloon, basketball, bell, billed cap=cap, bomb, bone,
>womans boot=boot, briefcase, bucket, cactus, camera, castle, christmas tree, coin, compass, crown,
crystal ball, deciduous tree=tree, door, drum, envelope, fire=flame, american football=football,
gem stone=gem, handbag, house, key, light bulb, locked=lock, maple leaf, mobile phone=phone,
money bag, palm tree, pencil, pinata, potted plant, jack o lantern=pumpkin, puzzle piece, rainbow,
red heart, ringed planet=planet, scroll, >running shoe=shoe, skull, soccer ball, star, stop sign,
sunflower, telephone, t shirt=shirt, top hat, treasure chest, trophy, umbrella, volcano,
wrapped gift=gift, crescent moon=moon
"""
_FACING = {"<": -1, ">": 1}
_PIXELS = 96  # side of a stored figure
_SIDES = (8, 12, 17, 24, 34, 48, 68, _PIXELS)
_OPAQUE = 8  # alpha from which a pixel counts as part of the figure
# Raise it with every change to how figures are drawn: it retires old caches.
_RECIPE = 1


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one figure is called and where it looks.

    Attributes:
        name: Its name in captions.
        emoji: Its caption in `train.openmoji`.
        facing: -1 if it looks to the left as drawn, 1 to the right, 0 if neither.
    """

    name: str
    emoji: str
    facing: int


def _parse(mention: str) -> Figure:
    """Reads one mention of the catalog."""
    emoji, _, name = mention.lstrip("<>").partition("=")
    return Figure(name or emoji, emoji, _FACING.get(mention[0], 0))


CATALOG = {figure.name: figure for figure in map(_parse, " ".join(_CATALOG.split()).split(", "))}
"""All figures by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pose:
    """Where a figure is in each frame, in units of the frame's side, y downward.

    Attributes:
        x: Center, float, (frames,).
        y: Center, float, (frames,).
        side: Larger of the upright figure's width and height, float, (frames,).
        angle: Clockwise turn from upright in radians, float, (frames,).
        mirrored: Whether left and right are swapped, in all frames.
    """

    x: Float[np.ndarray, " frames"]
    y: Float[np.ndarray, " frames"]
    side: Float[np.ndarray, " frames"]
    angle: Float[np.ndarray, " frames"]
    mirrored: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """Figures with transparency, ready to be drawn.

    Attributes:
        names: One a figure.
        pixels: Colors multiplied by alpha, and alpha, uint8, (figure, row, column, channel). A
            figure touches two opposite borders.

    Raises:
        ValueError: If `pixels` has another dtype or shape.
    """

    names: tuple[str, ...]
    pixels: UInt8[np.ndarray, "figure 96 96 4"]

    def __post_init__(self) -> None:
        shape = (len(self.names), _PIXELS, _PIXELS, 4)
        if self.pixels.dtype != np.uint8 or self.pixels.shape != shape:
            raise ValueError(
                f"pixels must be uint8 of shape {shape}, "
                f"got {self.pixels.dtype} of shape {self.pixels.shape}"
            )

    @functools.cached_property
    def _texels(self) -> dict[str, UInt32[np.ndarray, " texel"]]:
        """Every figure at all sizes, each with a transparent border of one pixel, in one row."""
        return {name: _mipmap(pixels) for name, pixels in zip(self.names, self.pixels, strict=True)}

    def draw(
        self, canvas: Float32[np.ndarray, "frames size size 3"], name: str, pose: Pose
    ) -> None:
        """Draws one figure into every frame, over what is there.

        Args:
            canvas: Colors from 0 to 255, float32; changed in place.
            name: The figure.
            pose: Where it is; parts outside the frame are cut off.

        Raises:
            ValueError: If there is no such figure.
        """
        if name not in self._texels:
            raise ValueError(f"name must be one of the {len(self.names)} figures, got {name!r}")
        size = canvas.shape[1]
        color, top, left = self._warp(name, pose, size)
        through = 1 - color[..., 3:] / np.float32(255)
        for frame, (y, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
            inside = (
                frame,
                slice(max(-y, 0), max(size - y, 0)),
                slice(max(-x, 0), max(size - x, 0)),
            )
            over = color[inside]
            part = canvas[frame, max(y, 0) :, max(x, 0) :][: over.shape[0], : over.shape[1]]
            part *= through[inside]
            part += over[..., :3]

    def _warp(self, name: str, pose: Pose, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The figure in a window around its center, and the window's first row and column.

        The window has the same shape in every frame: (frames, window, window, 4), float32.
        """
        turned = bool(np.any(pose.angle))
        window = math.ceil(pose.side.max() * size * (math.sqrt(2) if turned else 1)) + 2
        side = pose.side * size
        left, x = _around(pose.x * size, side, window)
        top, y = _around(pose.y * size, side, window)
        x, y = x[:, None, :], y[:, :, None]  # upright, columns and rows stay apart: far less work
        if turned:
            cosine = np.cos(pose.angle).astype(np.float32)[:, None, None]
            sine = np.sin(pose.angle).astype(np.float32)[:, None, None]
            x, y = x * cosine + y * sine, y * cosine - x * sine
        if pose.mirrored:
            x = -x

        level = np.minimum(np.searchsorted(_SIDES, side), len(_SIDES) - 1)
        pixels = np.array(_SIDES)[level][:, None, None]
        stride = pixels + 2
        start = _STARTS[level][:, None, None]
        column, right = _split((x + np.float32(0.5)) * pixels.astype(np.float32), pixels)
        row, down = _split((y + np.float32(0.5)) * pixels.astype(np.float32), pixels)
        index = start + row * stride + column
        texels = self._texels[name]

        def look_up(index: np.ndarray) -> np.ndarray:
            bytes_ = texels[index].view(np.uint8).reshape(*index.shape, 4)
            return bytes_.astype(np.float32)

        color, below = look_up(index), look_up(index + stride)
        color += (look_up(index + 1) - color) * right[..., None]
        below += (look_up(index + stride + 1) - below) * right[..., None]
        color += (below - color) * down[..., None]
        return color, top, left


_STARTS = np.cumsum([0, *((side + 2) ** 2 for side in _SIDES[:-1])])


def _around(
    center: np.ndarray, side: np.ndarray, window: int
) -> tuple[np.ndarray, Float32[np.ndarray, "frames window"]]:
    """First pixel of a window around a center, and its pixels in figure sides from the center."""
    first = np.rint(center - window / 2).astype(np.int64)
    pixels = first[:, None] + np.arange(window) + 0.5
    return first, ((pixels - center[:, None]) / side[:, None]).astype(np.float32)


def _split(position: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A position along a stored figure as the texel before it and the way to the next."""
    # Texel k, counted with the border, has its center at k - 0.5.
    limit = (pixels + 1).astype(np.float32) - np.float32(1e-3)
    position = np.clip(position + np.float32(0.5), np.float32(0), limit)
    whole = position.astype(np.int64)
    return whole, position - whole.astype(np.float32)


def _mipmap(pixels: UInt8[np.ndarray, "96 96 4"]) -> UInt32[np.ndarray, " texel"]:
    """One figure at all sizes, smallest first, each with a border, four bytes in one number."""
    from PIL import Image

    picture = Image.fromarray(pixels).copy()
    rows = []
    for side in _SIDES:
        # Four independent channels: Pillow would divide and multiply "RGBA" by alpha once more.
        channels = [
            np.asarray(channel.resize((side, side), Image.Resampling.BOX))
            for channel in picture.split()
        ]
        rows.append(np.pad(np.stack(channels, -1), ((1, 1), (1, 1), (0, 0))).reshape(-1))
    return np.concatenate(rows).view(np.uint32)


def load_figures(limit: int | None = None, cache_dir: Path | None = None) -> Figures:
    """Loads the figures, from a cache on disk once they were drawn.

    Args:
        limit: Keep only this many figures, a fixed mixture of all kinds (for tests).
        cache_dir: Folder of the cache, as in `train.openmoji.load`.

    Returns:
        The figures, in the order of the catalog.

    Raises:
        ValueError: If `limit` is out of range.
        ImportError: If a package of the extra `train` is missing.

    Warns:
        UserWarning: If the cache was damaged and is built again, or cannot be written.
    """
    if limit is not None and not 2 <= limit <= len(CATALOG):
        raise ValueError(f"limit must be from 2 to {len(CATALOG)} or None, got {limit!r}")
    names = tuple(CATALOG)
    if limit is not None:
        mixed = sorted(names, key=lambda name: zlib.crc32(name.encode()))
        names = tuple(name for name in names if name in mixed[:limit])
    file = "moving-emoji" + (f"-limit{limit}" if limit else "") + ".npz"
    path = cache_folder(cache_dir) / file
    recipe = cache_recipe(recipe=_RECIPE, figures=[CATALOG[name].emoji for name in names])
    figures = read_cache(path, recipe, lambda content: Figures(names, content["pixels"]))
    if figures is None:
        paths = svg_paths([CATALOG[name].emoji for name in names])
        figures = Figures(names, np.stack([_draw(path) for path in paths]))
        write_cache(path, recipe, {"pixels": figures.pixels})
    return figures


def _draw(path: Path) -> UInt8[np.ndarray, "96 96 4"]:
    """Draws one SVG, cut to the smallest square around the figure."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_package(str(error.name)) from error

    picture = rasterize(path)
    box = (
        picture.getchannel("A").point([255 * (alpha >= _OPAQUE) for alpha in range(256)]).getbbox()
    )
    if box is None:
        raise ValueError(f"{path.name} shows nothing")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    square = picture.crop((left, top, left + side, top + side)).convert("RGBa")
    return np.asarray(square.resize((_PIXELS, _PIXELS), Image.Resampling.HAMMING))
