"""Tiny clips for the tests of video training: a square of a color moves along one of two axes."""

import numpy as np

from jaxgen.text import WordTokenizer

FRAMES, SIZE = 4, 16
COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
AXES = ("down", "right")
WAYS = [(color, axis) for color in COLORS for axis in AXES]


class Squares:
    """A data set with the interface of `train.moving_emoji.MovingEmoji`."""

    def __init__(self, first, count, ways=WAYS[:-1]):
        self.first, self.count, self.ways = first, count, ways

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        color, axis = self.ways[index % len(self.ways)]
        across = int(np.random.default_rng(self.first + index).integers(0, SIZE - 6))
        video = np.full((FRAMES, SIZE, SIZE, 3), 255, np.uint8)
        for frame in range(FRAMES):
            along = slice(3 * frame, 3 * frame + 6)
            place = (along, slice(across, across + 6))
            video[(frame, *(place if axis == "down" else place[::-1]))] = COLORS[color]
        return {"video": video, "caption": f"a {color} square moves {axis}"}


CLIPS = {
    "train": Squares(0, 64),
    "validation": Squares(100, 5),
    "held_out": Squares(200, 4, WAYS[-1:]),
}
TOKENIZER = WordTokenizer.from_captions(
    [f"a {color} square moves {axis}" for color, axis in WAYS], max_tokens=6
)
