"""What a clip of `train.moving_emoji` shows: figures, their motions, who is in front, a background.

A `Scene` is an exact record. Caption and pixels both follow from it, so a caption never says more
than the clip shows, and every word of it can be checked:

    a red car moves right behind a turning pizza on blue stripes

**Motions.** A figure moves left, right, up or down at constant speed; circles once, clockwise;
bounces twice; turns clockwise; grows or shrinks at constant speed; or stays. Figures drawn from the
side look where they go when they move left or right.

**Backgrounds** are two shades of one color, mixed by a pattern with soft edges of about a pixel.

**Held out** are about 5 % of the pairs (figure, motion), at most two a figure, chosen by SHA-256 of
their names: no random generator decides, and a pair keeps its side when figures are added.
"""

import dataclasses
import functools
import hashlib
import math

import numpy as np
from jaxtyping import Float, Float32, UInt8

from jaxgen.text import split_words
from train.moving_emoji_figures import CATALOG, Figures, Pose

# How captions say what the first figure does, and what the second one is doing.
_DOING = {
    "moves left": "{} moving left",
    "moves right": "{} moving right",
    "moves up": "{} moving up",
    "moves down": "{} moving down",
    "circles": "circling {}",
    "bounces": "bouncing {}",
    "turns": "turning {}",
    "grows": "growing {}",
    "shrinks": "shrinking {}",
    "stays": "still {}",
}
MOTIONS = tuple(_DOING)
DIRECTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
"""Right and down, a unit each, of the motions that go in a straight line."""
RELATIONS = ("behind", "in front of", "above", "below", "beside")
_NOT_AN = ("unicorn",)  # the first letter misleads
_HELD_OUT_SHARE = 0.05
_MOST_HELD_OUT = 2  # motions a figure may lose

_SHADES = {
    "red": ((252, 192, 186), (232, 110, 104)),
    "orange": ((255, 216, 168), (248, 172, 96)),
    "yellow": ((255, 246, 184), (242, 214, 100)),
    "green": ((204, 238, 192), (136, 204, 124)),
    "teal": ((190, 238, 232), (100, 196, 188)),
    "blue": ((192, 222, 252), (118, 172, 234)),
    "purple": ((226, 206, 248), (178, 140, 224)),
    "pink": ((255, 224, 238), (246, 168, 206)),
    "brown": ((228, 208, 186), (182, 146, 110)),
    "gray": ((230, 230, 232), (176, 178, 184)),
}
COLORS = tuple(_SHADES)
_KNOTS = 9  # of the clouds, a side
PATTERNS = ("stripes", "checks", "dots", "waves", "clouds", "gradient")


@dataclasses.dataclass(frozen=True)
class Actor:
    """A figure and what it does, in units of the frame's side (y downward) and of the clip.

    Attributes:
        figure: A name in `CATALOG`.
        motion: One of `MOTIONS`.
        x: Middle of the path.
        y: Middle of the path.
        side: Larger of the figure's width and height, at its largest.
        amount: Length of a straight path, diameter of a circle, height of a bounce, number of
            turns, or the smallest size as a share of `side`; figures that stay ignore it.
        phase: Where on a circle the figure starts, as a share of it clockwise from the right.

    Raises:
        ValueError: If figure or motion is not known, or `side` is not positive.
    """

    figure: str
    motion: str
    x: float
    y: float
    side: float
    amount: float = 0.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        if self.figure not in CATALOG:
            raise ValueError(f"figure must be a name in CATALOG, got {self.figure!r}")
        if self.motion not in MOTIONS:
            raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {self.motion!r}")
        if not self.side > 0:
            raise ValueError(f"side must be positive, got {self.side}")

    def pose(self, frames: int) -> Pose:
        """Where the figure is in each frame; the first shows the start, the last the end.

        Args:
            frames: Number of frames, at least 2.

        Returns:
            The poses.
        """
        time = np.linspace(0, 1, frames)
        x, y, scale, angle = (np.full(frames, value, float) for value in (self.x, self.y, 1.0, 0.0))
        if self.motion in DIRECTIONS:
            right, down = DIRECTIONS[self.motion]
            x += right * self.amount * (time - 0.5)
            y += down * self.amount * (time - 0.5)
        elif self.motion == "circles":
            x += self.amount / 2 * np.cos(2 * math.pi * (time + self.phase))
            y += self.amount / 2 * np.sin(2 * math.pi * (time + self.phase))
        elif self.motion == "bounces":
            hop = 2 * time % 1
            y += self.amount * (0.5 - 4 * hop * (1 - hop))
        elif self.motion == "turns":
            angle = 2 * math.pi * self.amount * time
        elif self.motion in ("grows", "shrinks"):
            scale = self.amount + (1 - self.amount) * (time if self.motion == "grows" else 1 - time)
        facing = CATALOG[self.figure].facing
        mirrored = facing * DIRECTIONS.get(self.motion, (0, 0))[0] < 0
        return Pose(x, y, self.side * scale, angle, mirrored)


@dataclasses.dataclass(frozen=True)
class Background:
    """A still, textured background.

    Attributes:
        color: One of `COLORS`.
        pattern: One of `PATTERNS`.
        seed: Decides what captions do not tell: width, direction and position of the pattern.

    Raises:
        ValueError: If color or pattern is not known.
    """

    color: str
    pattern: str
    seed: int

    def __post_init__(self) -> None:
        for name, allowed in (("color", COLORS), ("pattern", PATTERNS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    def paint(self, size: int) -> Float32[np.ndarray, "size size 3"]:
        """Paints the background.

        Args:
            size: Side in pixels; every size shows the same picture.

        Returns:
            Colors from 0 to 255, float32.
        """
        light, dark = np.array(_SHADES[self.color], np.float32)
        mix = _mix(self.pattern, np.random.default_rng(self.seed), size)
        return light + (dark - light) * np.clip(mix, 0, 1).astype(np.float32)[:, :, None]


def _mix(pattern: str, generator: np.random.Generator, size: int) -> np.ndarray:
    """Where a background has its dark shade: (size, size), 1 for dark; values beyond are cut."""
    period, phase, other_phase = generator.uniform((0.14, 0, 0), (0.26, 1, 1))
    angle = generator.uniform(0, 2 * math.pi)
    along = (np.arange(size) + 0.5) / size - 0.5
    x = along * math.cos(angle) + along[:, None] * math.sin(angle)
    y = along[:, None] * math.cos(angle) - along * math.sin(angle)
    if pattern == "gradient":
        return 0.5 + x
    if pattern == "clouds":
        weights = _spline_weights(size)
        return weights @ generator.uniform(-2, 3, (_KNOTS, _KNOTS)) @ weights.T
    sharpness = period * size / (2 * math.pi)  # makes edges about a pixel wide
    u, v = x / period + phase, y / period + other_phase
    if pattern == "stripes":
        return 0.5 + sharpness * np.sin(2 * math.pi * u)
    if pattern == "waves":
        return 0.5 + sharpness * np.sin(2 * math.pi * (u + 0.3 * np.sin(math.pi * v)))
    if pattern == "checks":
        return 0.5 + 2 * sharpness * np.sin(math.pi * u) * np.sin(math.pi * v)
    u = u + 0.5 * (np.floor(v) % 2)  # dots, every other row shifted
    return 0.5 + (0.3 - np.hypot(u % 1 - 0.5, v % 1 - 0.5)) * period * size


@functools.cache
def _spline_weights(size: int) -> Float[np.ndarray, "size knots"]:
    """The cubic B-spline of each knot at each pixel."""
    position = (np.arange(size) + 0.5) / size * (_KNOTS - 3) + 1  # whole splines at the edges too
    distance = np.abs(position[:, None] - np.arange(_KNOTS))
    near = 2 / 3 - distance**2 + distance**3 / 2
    return np.where(distance < 1, near, np.maximum(2 - distance, 0) ** 3 / 6)


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a clip shows.

    Attributes:
        actors: One or two figures, in the order in which the caption names them.
        background: What is behind them.
        relation: Where the first figure is as seen from the second, one of `RELATIONS`; None for a
            figure alone.

    Raises:
        ValueError: If there are more or fewer actors, or the relation does not fit their number.
    """

    actors: tuple[Actor, ...]
    background: Background
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.actors) not in (1, 2):
            raise ValueError(f"actors must be one or two, got {len(self.actors)}")
        allowed = (None,) if len(self.actors) == 1 else RELATIONS
        if self.relation not in allowed:
            raise ValueError(
                f"relation must be one of {', '.join(map(str, allowed))} "
                f"for {len(self.actors)} actors, got {self.relation!r}"
            )

    @property
    def caption(self) -> str:
        """What happens, in at most 24 words of `VOCABULARY`."""
        first, *others = self.actors
        words = [_with_article(first.figure), first.motion]
        for actor in others:
            doing = _DOING[actor.motion].format(actor.figure)
            words += [str(self.relation), _with_article(doing)]
        pattern = f"{self.background.color} {self.background.pattern}"
        plural = self.background.pattern.endswith("s")
        return " ".join([*words, "on", pattern if plural else _with_article(pattern)])

    def render(
        self, figures: Figures, frames: int, size: int
    ) -> UInt8[np.ndarray, "f size size 3"]:
        """Draws the clip.

        Args:
            figures: The figures, among them those of the actors.
            frames: Number of frames, at least 2.
            size: Side of a frame in pixels.

        Returns:
            The clip, uint8.
        """
        canvas = np.repeat(self.background.paint(size)[None], frames, axis=0)
        back_to_front = self.actors[::-1] if self.relation == "in front of" else self.actors
        for actor in back_to_front:
            figures.draw(canvas, actor.figure, actor.pose(frames))
        canvas += np.float32(0.5)
        return canvas.astype(np.uint8)


def _with_article(words: str) -> str:
    """Puts "a" or "an" in front."""
    article = "an" if words[0] in "aeiou" and not words.startswith(_NOT_AN) else "a"
    return f"{article} {words}"


_PHRASES = (*CATALOG, *_DOING, *_DOING.values(), *RELATIONS, *COLORS, *PATTERNS, "a an on")
VOCABULARY = tuple(sorted({word for phrase in _PHRASES for word in split_words(phrase)}))
"""Every word of every caption, sorted."""


@functools.cache
def held_out_motions(figure: str) -> frozenset[str]:
    """The motions that a figure never shows in training.

    Args:
        figure: A name in `CATALOG`.

    Returns:
        None to two of `MOTIONS`, the same whichever figures are loaded.
    """
    shares = {}
    for motion in MOTIONS:
        digest = hashlib.sha256(f"{figure} {motion}".encode()).digest()
        shares[motion] = int.from_bytes(digest[:8], "big") / 2**64
    lowest = sorted(MOTIONS, key=shares.__getitem__)[:_MOST_HELD_OUT]
    return frozenset(motion for motion in lowest if shares[motion] < _HELD_OUT_SHARE)
