"""Clips of OpenMoji figures that move, turn, grow and pass behind each other, with captions.

`train.moving_emoji_scenes` says what clips show and how captions put it,
`train.moving_emoji_figures` where the figures come from (their license: `train.openmoji`). Here
scenes are drawn by lot:

    one figure   35 % of the clips
    crossing     45 %: two figures meet in the middle of the clip, one passes in front of or behind
                 the other, and at least one of them moves in a straight line
    apart        20 %: two figures above or beside each other, each in its half of the frame

A clip is a function of seed, split and index and of nothing else: loading can resume anywhere and
be sharded in any way. One core of an Intel Xeon (2 virtual cores, shared) makes 285 clips a second
of 16 frames at 64 pixels, 190 of 32 frames, 90 at 128 pixels, over 500 clips or more.

    clips = MovingEmoji()
    save_gif(clips[0]["video"], "clip.gif")
    dataset = grain.MapDataset.source(clips).shuffle(seed=0)
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import UInt8

from jaxgen.pictures import image_grid
from train.cached_arrays import cache_folder
from train.moving_emoji_figures import Figures, load_figures
from train.moving_emoji_scenes import (
    COLORS,
    DIRECTIONS,
    MOTIONS,
    PATTERNS,
    Actor,
    Background,
    Scene,
    held_out_motions,
)

if TYPE_CHECKING:
    from PIL import Image

SPLITS = {"train": 1_000_000, "validation": 512, "held_out": 512}
"""The splits and how many clips each has."""

_ALONE, _CROSSING = 0.35, 0.45
_FRAME = (0.0, 1.0, 0.0, 1.0)
_BEYOND = 0.05  # how far figures may leave the place given to them, so that they also reach borders

type _Pair = tuple[str, str]  # figure and motion
type _Box = tuple[float, float, float, float]  # left, right, top, bottom
type _Arranged = tuple[tuple[Actor, ...], str | None]


class Clip(TypedDict):
    """One element of the data set: `video`, uint8 (frames, size, size, 3), and its `caption`."""

    video: UInt8[np.ndarray, "frames size size 3"]
    caption: str


@dataclasses.dataclass(frozen=True)
class MovingEmoji:
    """The data set: clips by index, a random-access source for Grain.

    Attributes:
        frames: Frames a clip, from 8 to 32; more frames show the same motion in smaller steps.
        size: Side of a frame in pixels, from 32 to 128.
        seed: Not negative; another seed gives other clips of the same split.
        split: "train"; "validation", the same pairs of figure and motion in other clips; or
            "held_out", where every clip shows a pair that the others never show, and any second
            figure does something from training.
        limit: Use only this many figures, as in `load_figures` (for tests).
        cache_dir: Folder of the cache, as in `load_figures`.

    Raises:
        ValueError: If an argument is out of range, or none of the figures has a held-out motion.
        ImportError: If a package of the extra `train` is missing.
    """

    frames: int = 16
    size: int = 64
    seed: int = 0
    split: str = "train"
    limit: int | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("frames", 8, 32), ("size", 32, 128)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if not self._starring:
            raise ValueError(
                "split held_out needs a figure with a held-out motion, and none is among "
                f"the first {self.limit}; raise limit"
            )

    def __len__(self) -> int:
        """Number of clips."""
        return SPLITS[self.split]

    def __getitem__(self, index: SupportsIndex) -> Clip:
        """One clip.

        Args:
            index: From 0 to len - 1, or negative from the end.

        Returns:
            `video`, uint8 (frames, size, size, 3), and `caption`.

        Raises:
            IndexError: If the index is out of range.
        """
        scene = self.scene(index)
        video = scene.render(self.figures, self.frames, self.size)
        return {"video": video, "caption": scene.caption}

    @property
    def figures(self) -> Figures:
        """The figures, shared by the data sets of a process and not pickled with them."""
        return _load_once(self.limit, cache_folder(self.cache_dir))

    @functools.cached_property
    def _trained(self) -> list[_Pair]:
        """The pairs of figure and motion that training shows."""
        return [
            (name, motion)
            for name in self.figures.names
            for motion in MOTIONS
            if motion not in held_out_motions(name)
        ]

    @functools.cached_property
    def _starring(self) -> list[_Pair]:
        """The pairs of which every clip shows one."""
        if self.split != "held_out":
            return self._trained
        return [
            (name, motion)
            for name in self.figures.names
            for motion in MOTIONS
            if motion in held_out_motions(name)
        ]

    def scene(self, index: SupportsIndex) -> Scene:
        """What a clip shows.

        Args:
            index: As for indexing.

        Returns:
            The scene.

        Raises:
            IndexError: If the index is out of range.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(
                f"index must be from {-len(self)} to {len(self) - 1} in split {self.split}, "
                f"got {number}"
            )
        number %= len(self)
        stream = (self.seed, tuple(SPLITS).index(self.split), number)
        generator = np.random.default_rng(stream)
        background = Background(
            _choose(COLORS, generator), _choose(PATTERNS, generator), int(generator.integers(2**32))
        )
        star, kind = _choose(self._starring, generator), generator.random()
        if self.split == "held_out":  # every held-out pair equally often
            star = self._starring[number % len(self._starring)]
        if kind < _ALONE:
            actor = _actor(star, generator, sides=(0.46, 0.62), straight=0.55, curved=0.36)
            return Scene(_place([actor], _FRAME, generator), background)
        arrange = _crossing if kind < _ALONE + _CROSSING else _apart
        while True:  # until two motions go together
            pairs = [star, _choose(self._trained, generator)]
            if generator.random() < 0.5:
                pairs.reverse()
            arranged = arrange(pairs, generator) if pairs[0][0] != pairs[1][0] else None
            if arranged is not None:
                actors, relation = arranged
                return Scene(actors, background, relation)


_load_once = functools.lru_cache(maxsize=2)(load_figures)


def _choose[T](options: Sequence[T], generator: np.random.Generator) -> T:
    """One option, all equally likely."""
    return options[int(generator.integers(len(options)))]


def _crossing(pairs: Sequence[_Pair], generator: np.random.Generator) -> _Arranged | None:
    """Two figures that meet in the middle of the clip; None if these two motions never cross."""
    motions = [motion for _, motion in pairs]
    if motions[0] == motions[1] or not any(motion in DIRECTIONS for motion in motions):
        return None
    actors = []
    for pair in pairs:
        actor = _actor(pair, generator, sides=(0.38, 0.48), straight=0.7, curved=0.45)
        middle, miss = actor.pose(3), generator.uniform(-0.04, 0.04, 2)
        actors.append(_shift(actor, miss[0] - middle.x[1], miss[1] - middle.y[1]))
    return _place(actors, _FRAME, generator), _choose(("behind", "in front of"), generator)


def _apart(pairs: Sequence[_Pair], generator: np.random.Generator) -> _Arranged | None:
    """Two figures in two halves of the frame; None if both motions fit no halves."""
    straight = [DIRECTIONS[motion] for _, motion in pairs if motion in DIRECTIONS]
    vertical = {down != 0 for _, down in straight}
    if len(vertical) == 2:
        return None
    beside = vertical.pop() if vertical else generator.random() < 0.5
    swapped = generator.random() < 0.5
    halves = [(0.0, 0.5, 0.0, 1.0), (0.5, 1.0, 0.0, 1.0)]
    if not beside:
        halves = [(0.0, 1.0, 0.0, 0.5), (0.0, 1.0, 0.5, 1.0)]
    actors = ()
    for pair, half in zip(pairs, halves[::-1] if swapped else halves, strict=True):
        actor = _actor(pair, generator, sides=(0.36, 0.42), straight=0.5, curved=0.22)
        actors += _place([actor], half, generator)
    return actors, "beside" if beside else "below" if swapped else "above"


def _actor(
    pair: _Pair,
    generator: np.random.Generator,
    *,
    sides: tuple[float, float],
    straight: float,
    curved: float,
) -> Actor:
    """A figure around the origin, its side from a range, its path about as long as told."""
    figure, motion = pair
    side, vary, phase = generator.uniform((sides[0], -1, 0), (sides[1], 1, 1)).tolist()
    if motion in DIRECTIONS:
        amount = straight * (1 + 0.1 * vary)
    elif motion in ("circles", "bounces"):
        amount = curved * (1 + 0.1 * vary)
    elif motion == "turns":
        amount = 1 + 0.15 * vary
    else:
        side *= 1 if motion == "stays" else 1.15
        amount = 0.42 + 0.08 * vary
    return Actor(figure, motion, 0, 0, side, amount, phase)


def _shift(actor: Actor, right: float, down: float) -> Actor:
    """Moves an actor's whole path."""
    return dataclasses.replace(actor, x=float(actor.x + right), y=float(actor.y + down))


def _place(actors: Sequence[Actor], box: _Box, generator: np.random.Generator) -> tuple[Actor, ...]:
    """Moves actors together to a random place in a box that holds their paths."""
    poses = [actor.pose(17) for actor in actors]
    shifts = []
    for axis, low, high in (("x", *box[:2]), ("y", *box[2:])):
        first = min(np.min(getattr(pose, axis) - pose.side / 2) for pose in poses)
        last = max(np.max(getattr(pose, axis) + pose.side / 2) for pose in poses)
        # What is too large for the box sticks out on both sides alike.
        free = max(0.0, ((high - low) - (last - first)) / 2 + _BEYOND)
        shifts.append((low + high - first - last) / 2 + generator.uniform(-free, free))
    return tuple(_shift(actor, *shifts) for actor in actors)


def contact_sheet(
    video: UInt8[np.ndarray, "frames height width 3"], columns: int = 8
) -> "Image.Image":
    """Lays the frames of a clip out row by row.

    Args:
        video: The clip, uint8.
        columns: Frames a row.

    Returns:
        An RGB picture on white, the frames at their size.

    Raises:
        ValueError: If `video` has another dtype or shape, or `columns` is not positive.
    """
    _check(video)
    return image_grid(video, columns=columns, picture_size=video.shape[2])


def save_gif(
    video: UInt8[np.ndarray, "frames height width 3"], path: str | Path, fps: float = 8
) -> None:
    """Writes a clip as an animated GIF that repeats, with one palette for all frames.

    A frame that equals the one before is not stored; the one before is shown longer.

    Args:
        video: The clip, uint8.
        path: The file to write or replace.
        fps: Frames a second, up to 50; a GIF counts time in 1/100 s.

    Raises:
        ValueError: If `video` has another dtype or shape, or `fps` is out of range.
    """
    from PIL import Image

    _check(video)
    if not 0 < fps <= 50:
        raise ValueError(f"fps must be above 0 and at most 50, got {fps}")
    frames, height, width, _ = video.shape
    strip = Image.fromarray(video.reshape(frames * height, width, 3))
    # Median cut gives the background most colors and leaves figures dull.
    strip = strip.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    tops = range(0, frames * height, height)
    first, *others = (strip.crop((0, top, width, top + height)) for top in tops)
    duration = round(100 / fps) * 10
    first.save(path, "GIF", save_all=True, append_images=others, duration=duration, loop=0)


def _check(video: np.ndarray) -> None:
    """Refuses what is no clip."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(
            "video must be uint8 of shape (frames, height, width, 3), "
            f"got {video.dtype} of shape {video.shape}"
        )
