"""Moving emoji: figures, motions, occlusion, captions, the split, determinism, files."""

import dataclasses
import hashlib
import itertools
import pickle
import re
import subprocess
import sys
from collections import Counter

import grain
import numpy as np
import pytest
from PIL import Image

from jaxgen.text import WordTokenizer, split_words
from train import moving_emoji_figures
from train.moving_emoji import SPLITS, MovingEmoji, contact_sheet, save_gif
from train.moving_emoji_figures import CATALOG, Figures, Pose, load_figures
from train.moving_emoji_scenes import (
    COLORS,
    MOTIONS,
    PATTERNS,
    RELATIONS,
    VOCABULARY,
    Actor,
    Background,
    Scene,
    held_out_motions,
)
from train.openmoji import svg_paths

LIMIT = 24
SCENES = 400


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def figures(cache):
    return load_figures(LIMIT, cache)


@pytest.fixture(scope="module")
def make(cache):
    return lambda **options: MovingEmoji(**{"limit": LIMIT, "cache_dir": cache, **options})


@pytest.fixture(scope="module")
def name(figures):
    """A figure that looks left as drawn."""
    return next(name for name in figures.names if CATALOG[name].facing < 0)


def digest(video):
    return hashlib.sha256(video.tobytes()).hexdigest()


def alpha_of(figures, actor, frames=16, size=64):
    """How much of each pixel a figure covers: what it takes from white and leaves of black."""
    black, white = (np.full((frames, size, size, 3), shade, np.float32) for shade in (0, 255))
    figures.draw(black, actor.figure, actor.pose(frames))
    figures.draw(white, actor.figure, actor.pose(frames))
    return 1 - (white - black).mean(-1) / 255


def centroid(alpha):
    """Columns and rows, in units of the frame."""
    side, area = alpha.shape[1], alpha.sum((1, 2))
    along = (np.arange(side) + 0.5) / side
    return alpha.sum(1) @ along / area, alpha.sum(2) @ along / area


# Figures


def test_catalog(figures):
    assert 190 <= len(CATALOG) <= 230
    assert len({figure.emoji for figure in CATALOG.values()}) == len(CATALOG)
    assert len(svg_paths([figure.emoji for figure in CATALOG.values()])) == len(CATALOG)
    assert len(figures.names) == LIMIT
    assert set(figures.names) < set(CATALOG)


def test_pictures_are_multiplied_by_alpha_and_fill_their_square(figures):
    colors, alpha = figures.pixels[..., :3], figures.pixels[..., 3]
    assert (colors <= alpha[..., None]).all()
    seen = alpha > 0
    touching = [seen[:, [0, 0, 1], :], seen[:, [-1, -1, -2], :]]
    rows = np.logical_and(*(part.any((1, 2)) for part in touching))
    columns = seen[:, :, :2].any((1, 2)) & seen[:, :, -2:].any((1, 2))
    assert (rows | columns).all()
    assert (alpha == 0).any((1, 2)).all()
    assert ((alpha == 255).mean((1, 2)) > 0.1).all()


def test_second_load_reads_the_cache(figures, cache, monkeypatch):
    monkeypatch.setattr(moving_emoji_figures, "_draw", None)
    np.testing.assert_array_equal(load_figures(LIMIT, cache).pixels, figures.pixels)


def test_damaged_cache_is_drawn_again(tmp_path):
    good = load_figures(2, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="cannot be used and is built again"):
        again = load_figures(2, tmp_path)
    np.testing.assert_array_equal(again.pixels, good.pixels)


def test_wrong_figures_are_refused(figures, tmp_path):
    with pytest.raises(ValueError, match=f"limit must be from 2 to {len(CATALOG)} or None, got 1"):
        load_figures(1, tmp_path)
    with pytest.raises(ValueError, match=r"pixels must be uint8 of shape \(1, 96, 96, 4\), got"):
        Figures(("cat",), figures.pixels)
    canvas = np.zeros((8, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match=f"one of the {LIMIT} figures, got 'a thing'"):
        figures.draw(canvas, "a thing", Actor("cat", "stays", 0, 0, 1).pose(8))
    with pytest.raises(ValueError, match="captions must be those of OpenMoji pictures, got no cat"):
        svg_paths(["cat", "no cat"])


def test_aligned_drawing_is_exact(figures, name):
    # 48 pixels from 8 to 56: no interpolation. 48 is half of the stored 96.
    canvas = np.zeros((8, 64, 64, 3), np.float32)
    figures.draw(canvas, name, Actor(name, "stays", 0.5, 0.5, 0.75).pose(8))
    pixels = figures.pixels[figures.names.index(name), ..., :3].astype(np.float32)
    half = pixels.reshape(48, 2, 48, 2, 3).mean((1, 3))
    np.testing.assert_allclose(canvas[3, 8:56, 8:56], half, atol=1.01)  # two roundings
    canvas[:, 8:56, 8:56] = 0
    assert not canvas.any()


def test_drawing_stops_at_the_border(figures, name):
    alpha = {
        x: alpha_of(figures, Actor(name, "stays", x, 0.5, 0.5)) for x in (0.0, 0.5, 1.0, -0.5, 1.5)
    }
    np.testing.assert_allclose(alpha[0.0][:, :, :32], alpha[0.5][:, :, 32:], atol=1e-5)
    np.testing.assert_allclose(alpha[1.0][:, :, 32:], alpha[0.5][:, :, :32], atol=1e-5)
    assert np.abs(alpha[-0.5]).max() < 1e-5
    assert np.abs(alpha[1.5]).max() < 1e-5


# Motions


@pytest.mark.parametrize(
    ("motion", "right", "down"),
    [
        ("moves right", 1, 0),
        ("moves left", -1, 0),
        ("moves down", 0, 1),
        ("moves up", 0, -1),
    ],
)
def test_moving(figures, name, motion, right, down):
    x, y = centroid(alpha_of(figures, Actor(name, motion, 0.5, 0.5, 0.4, amount=0.5)))
    np.testing.assert_allclose(np.diff(x), right * 0.5 / 15, atol=2e-3)
    np.testing.assert_allclose(np.diff(y), down * 0.5 / 15, atol=2e-3)


def test_figures_look_where_they_go(figures, name):
    left, right = (
        alpha_of(figures, Actor(name, motion, 0.5, 0.5, 0.5, amount=0))
        for motion in ("moves left", "moves right")
    )
    upright = alpha_of(figures, Actor(name, "stays", 0.5, 0.5, 0.5))
    np.testing.assert_array_equal(left, upright)
    np.testing.assert_allclose(right, upright[:, :, ::-1], atol=1e-3)
    assert np.abs(right - left).max() > 0.5


def test_staying(figures, name):
    alpha = alpha_of(figures, Actor(name, "stays", 0.5, 0.5, 0.5))
    assert (alpha == alpha[0]).all()


def test_circling(figures, name):
    actor = Actor(name, "circles", 0.5, 0.5, 0.4, amount=0.4, phase=0.25)
    x, y = centroid(alpha_of(figures, actor, frames=17))
    x, y = x - x.mean(), y - y.mean()
    np.testing.assert_allclose(np.hypot(x[:16], y[:16]), 0.2, atol=0.02)
    turn = np.diff(np.unwrap(np.arctan2(y, x)))  # y goes down: a positive turn is clockwise
    np.testing.assert_allclose(turn, 2 * np.pi / 16, atol=0.1)
    assert y[0] == y.max()  # a quarter clockwise from the right is the bottom


def test_bouncing(figures, name):
    actor = Actor(name, "bounces", 0.5, 0.5, 0.4, amount=0.4)
    x, y = centroid(alpha_of(figures, actor, frames=17))
    assert np.ptp(x) < 2e-3
    np.testing.assert_allclose(y[[0, 8, 16]] - y[4], 0.4, atol=2e-3)  # the floor, below the top
    np.testing.assert_allclose(y[12], y[4], atol=2e-3)
    assert list(np.sign(np.diff(y))) == [*[-1] * 4, *[1] * 4] * 2


def test_turning(figures, name):
    alpha = alpha_of(figures, Actor(name, "turns", 0.5, 0.5, 0.6, amount=1), frames=17)
    for frame, quarters in ((0, 0), (4, 1), (8, 2), (12, 3), (16, 4)):
        clockwise = np.rot90(alpha[0], -quarters)
        np.testing.assert_allclose(alpha[frame], clockwise, atol=0.02)
    assert np.abs(alpha[4] - alpha[0]).mean() > 0.02
    np.testing.assert_allclose(alpha.sum((1, 2)), alpha[0].sum(), rtol=0.03)


@pytest.mark.parametrize(("motion", "order"), [("grows", 1), ("shrinks", -1)])
def test_growing_and_shrinking(figures, name, motion, order):
    alpha = alpha_of(figures, Actor(name, motion, 0.5, 0.5, 0.8, amount=0.5), frames=9)[::order]
    area = alpha.sum((1, 2))
    assert (np.diff(area) > 0).all()
    np.testing.assert_allclose(area / area[-1], np.linspace(0.5, 1, 9) ** 2, rtol=0.08)
    for center in centroid(alpha):
        assert np.ptp(center) < 0.05


def test_every_figure_shows_its_turns(figures):
    for name in figures.names:
        canvas = np.full((17, 64, 64, 3), 128, np.float32)
        figures.draw(canvas, name, Actor(name, "turns", 0.5, 0.5, 0.6, amount=1).pose(17))
        assert np.abs(canvas[5] - canvas[0]).mean() > 3


# Scenes


def overlapping(relation, figures):
    first, second = figures.names[:2]
    actors = (
        Actor(first, "moves right", 0.5, 0.5, 0.6, amount=0.6),
        Actor(second, "stays", 0.5, 0.5, 0.6),
    )
    return Scene(actors, Background("blue", "stripes", 3), relation)


@pytest.mark.parametrize(("relation", "front"), [("in front of", 0), ("behind", 1)])
def test_occlusion(figures, relation, front):
    scene = overlapping(relation, figures)
    covered = [alpha_of(figures, actor) > 0.999 for actor in scene.actors]
    both = covered[0] & covered[1]
    assert both.sum((1, 2)).max() > 100
    alone = Scene((scene.actors[front],), scene.background).render(figures, 16, 64)
    video = scene.render(figures, 16, 64)
    np.testing.assert_allclose(video[both].astype(int), alone[both].astype(int), atol=1)
    hidden = Scene((scene.actors[1 - front],), scene.background).render(figures, 16, 64)
    assert (video[both] != hidden[both]).any(-1).mean() > 0.5
    free = alpha_of(figures, scene.actors[front]) < 1e-4
    np.testing.assert_allclose(video[free].astype(int), hidden[free].astype(int), atol=1)


def test_two_that_cross_overlap(make, figures):
    scenes = (make().scene(index) for index in range(SCENES))
    crossing = [scene for scene in scenes if scene.relation in ("behind", "in front of")][:40]
    for scene in crossing:
        masks = [alpha_of(figures, actor) > 0.5 for actor in scene.actors]
        shared = (masks[0] & masks[1]).sum((1, 2)) / np.minimum(*(m.sum((1, 2)) for m in masks))
        assert shared.max() > 0.2, scene.caption
        assert any(actor.motion.startswith("moves") for actor in scene.actors)


def test_two_apart_are_where_the_caption_says(make):
    places = Counter()
    for scene in map(make().scene, range(SCENES)):
        if scene.relation in ("above", "below", "beside"):
            (first, second), _ = scene.actors, places.update([scene.relation])
            if scene.relation == "beside":
                assert abs(first.x - second.x) > 0.2
            else:
                assert (second.y - first.y) * (1 if scene.relation == "above" else -1) > 0.2
    assert set(places) == {"above", "below", "beside"}


def test_figures_are_large_and_mostly_inside(make):
    for scene in map(make().scene, range(SCENES)):
        for actor in scene.actors:
            pose = actor.pose(16)
            assert 20 <= 64 * actor.side <= 46
            for center in (pose.x, pose.y):
                assert -0.05 < center.min() <= center.max() < 1.05, scene.caption


def test_backgrounds():
    pictures = {
        (color, pattern): Background(color, pattern, 5).paint(64)
        for color, pattern in itertools.product(COLORS, PATTERNS)
    }
    for picture in pictures.values():
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.float32
        assert 0 <= picture.min() <= picture.max() <= 255
        assert picture.std((0, 1)).max() > 8  # textured
    for left, right in itertools.combinations(pictures.values(), 2):
        assert np.abs(left - right).mean() > 2
    large = Background("red", "waves", 5).paint(128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - pictures["red", "waves"]).mean() < 2
    assert (Background("red", "dots", 6).paint(64) != pictures["red", "dots"]).any()


CAPTION = re.compile(
    r"(?P<first>an? .+?) (?P<motion>moves (?:left|right|up|down)|circles|bounces|turns|grows"
    r"|shrinks|stays)(?: (?P<relation>behind|in front of|above|below|beside) (?P<second>an? .+?))?"
    r" on (?P<background>.+)"
)
PARTICIPLES = {
    "circling": "circles",
    "bouncing": "bounces",
    "turning": "turns",
    "growing": "grows",
    "shrinking": "shrinks",
    "still": "stays",
}


def bare(words):
    """Words without their article, which must be the right one."""
    article, rest = words.split(" ", 1)
    assert article == ("an" if rest[0] in "aeiou" and not rest.startswith("unicorn") else "a")
    return rest


def understand(caption):
    """What a caption says, read without the code that wrote it."""
    match = CAPTION.fullmatch(caption)
    assert match, caption
    said = [(bare(match["first"]), match["motion"])]
    if match["second"]:
        words = bare(match["second"])
        if moving := re.fullmatch("(.+) moving (left|right|up|down)", words):
            said.append((moving[1], f"moves {moving[2]}"))
        else:
            participle, figure = words.split(" ", 1)
            said.append((figure, PARTICIPLES[participle]))
    background = match["background"]
    background = bare(background) if background.endswith("gradient") else background
    return said, match["relation"], tuple(background.split(" "))


def test_captions_say_what_scenes_hold(cache):
    captions = set()
    for scene in map(MovingEmoji(cache_dir=cache).scene, range(2 * SCENES)):
        said, relation, background = understand(scene.caption)
        assert said == [(actor.figure, actor.motion) for actor in scene.actors]
        assert relation == scene.relation
        assert background == (scene.background.color, scene.background.pattern)
        assert len(split_words(scene.caption)) <= 24
        assert set(split_words(scene.caption)) <= set(VOCABULARY)
        captions.add(scene.caption)
    assert len(captions) > 1.9 * SCENES


def test_longest_caption_fits():
    longest = max(CATALOG, key=lambda figure: len(split_words(figure)))
    actor = Actor(longest, "moves right", 0.5, 0.5, 0.5)
    scene = Scene((actor, actor), Background("blue", "gradient", 0), "in front of")
    assert len(split_words(scene.caption)) <= 24


def test_vocabulary_makes_a_tokenizer():
    tokenizer = WordTokenizer(VOCABULARY, 24)
    assert tokenizer.encode(["an old man circles beside a still unicorn on a red gradient"])[0, 11]
    assert len(VOCABULARY) < 400


@pytest.mark.parametrize(
    ("actors", "relation", "caption"),
    [
        ([("red car", "moves right")], None, "a red car moves right on an orange gradient"),
        (
            [("cat", "turns"), ("ambulance", "stays")],
            "behind",
            "a cat turns behind a still ambulance on an orange gradient",
        ),
        (
            [("unicorn", "stays"), ("unicorn", "moves up")],
            "in front of",
            "a unicorn stays in front of a unicorn moving up on an orange gradient",
        ),
    ],
)
def test_captions(actors, relation, caption):
    actors = tuple(Actor(figure, motion, 0.5, 0.5, 0.5) for figure, motion in actors)
    assert Scene(actors, Background("orange", "gradient", 0), relation).caption == caption


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a, b: dataclasses.replace(a, figure="thing"), "name in CATALOG, got 'thing'"),
        (lambda a, b: dataclasses.replace(a, motion="flies"), "one of moves left, .*, got 'flies'"),
        (lambda a, b: dataclasses.replace(a, side=0), "side must be positive, got 0"),
        (lambda a, b: dataclasses.replace(b, color="black"), "color must be one of red, .*'black'"),
        (lambda a, b: dataclasses.replace(b, pattern="fur"), "pattern must be one of str.*'fur'"),
        (lambda a, b: Scene((), b), "actors must be one or two, got 0"),
        (lambda a, b: Scene((a,), b, "above"), "must be one of None for 1 actors, got 'above'"),
        (lambda a, b: Scene((a, a), b, "near"), "one of behind, .* for 2 actors, got 'near'"),
        (lambda a, b: Scene((a, a), b), "one of behind, .* for 2 actors, got None"),
    ],
)
def test_wrong_scenes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(Actor("cat", "stays", 0.5, 0.5, 0.5), Background("blue", "dots", 0))


# The split


def test_held_out_share():
    held_out = [(name, motion) for name in CATALOG for motion in held_out_motions(name)]
    assert 0.045 <= len(held_out) / (len(CATALOG) * len(MOTIONS)) <= 0.055
    assert max(Counter(name for name, _ in held_out).values()) <= 2
    by_motion = Counter(motion for _, motion in held_out)
    assert set(by_motion) == set(MOTIONS)
    assert max(by_motion.values()) <= 0.1 * len(CATALOG)


def test_splits_share_no_held_out_pair(cache):
    pairs, scenes = {}, {}
    for split in SPLITS:
        data = MovingEmoji(split=split, cache_dir=cache)
        scenes[split] = [data.scene(index) for index in range(512)]
        pairs[split] = {(a.figure, a.motion) for scene in scenes[split] for a in scene.actors}
    for name, motion in pairs["train"] | pairs["validation"]:
        assert motion not in held_out_motions(name)
    for scene in scenes["held_out"]:
        assert sum(a.motion in held_out_motions(a.figure) for a in scene.actors) == 1
    new = pairs["held_out"] - pairs["train"] - pairs["validation"]
    every = {(name, motion) for name in CATALOG for motion in held_out_motions(name)}
    assert every <= new
    stars = Counter(
        (actor.figure, actor.motion)
        for scene in scenes["held_out"]
        for actor in scene.actors
        if actor.motion in held_out_motions(actor.figure)
    )
    assert max(stars.values()) - min(stars.values()) <= 1
    assert {scene.caption for scene in scenes["train"]}.isdisjoint(
        scene.caption for scene in scenes["held_out"]
    )


def test_every_motion_relation_and_background_occurs(make):
    scenes = [make().scene(index) for index in range(SCENES)]
    assert {actor.motion for scene in scenes for actor in scene.actors} == set(MOTIONS)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.background.color for scene in scenes} == set(COLORS)
    assert {scene.background.pattern for scene in scenes} == set(PATTERNS)


# The data set


def test_clips(make):
    data = make()
    assert len(data) == 1_000_000
    assert len(make(split="validation")) == len(make(split="held_out")) == 512
    clip = data[0]
    assert clip.keys() == {"video", "caption"}
    assert clip["caption"] == data.scene(0).caption
    np.testing.assert_array_equal(data[-1]["video"], data[999_999]["video"])
    np.testing.assert_array_equal(data[np.int64(7)]["video"], data[7]["video"])


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (16, 64), (17, 50), (32, 128)])
def test_shapes(make, frames, size):
    for index in range(3):
        video = make(frames=frames, size=size)[index]["video"]
        assert video.shape == (frames, size, size, 3)
        assert video.dtype == np.uint8


def test_every_size_and_rate_shows_the_same_scene(make):
    small, large, fast = make(), make(size=128), make(frames=31)
    for index in range(6):
        assert small.scene(index) == large.scene(index) == fast.scene(index)
        video = small[index]["video"].astype(float)
        halved = large[index]["video"].reshape(16, 64, 2, 64, 2, 3).mean((2, 4))
        assert np.abs(video - halved).mean() < 4
        np.testing.assert_array_equal(fast[index]["video"][[0, -1]], small[index]["video"][[0, -1]])


def test_a_clip_depends_on_seed_split_and_index_only(make):
    videos = {
        (seed, split, index): make(seed=seed, split=split)[index]["video"]
        for seed in (0, 1)
        for split in SPLITS
        for index in (0, 1)
    }
    assert len({digest(video) for video in videos.values()}) == len(videos)
    for (seed, split, index), video in reversed(videos.items()):
        np.testing.assert_array_equal(make(seed=seed, split=split)[index]["video"], video)


def test_another_process_in_another_order_makes_the_same_clips(make, cache):
    code = (
        "import sys, pathlib, hashlib; from train.moving_emoji import MovingEmoji\n"
        f"data = MovingEmoji(limit={LIMIT}, cache_dir=pathlib.Path(sys.argv[1]))\n"
        "for i in (900_000, 3, 2, 1, 0):\n"
        "    clip = data[i]\n"
        "    print(hashlib.sha256(clip['video'].tobytes()).hexdigest(), clip['caption'])"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(cache)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    data = make()
    clips = [data[index] for index in (0, 1, 2, 3, 900_000)]
    expected = [f"{digest(clip['video'])} {clip['caption']}" for clip in clips]
    assert lines.splitlines()[::-1] == expected


def test_grain_reads_it(make):
    data = make(split="validation")
    dataset = grain.MapDataset.source(data).shuffle(seed=3)
    clips = [dataset[index] for index in range(4)]
    assert len({clip["caption"] for clip in clips}) == 4
    every = {data.scene(index).caption: index for index in range(512)}
    for clip in clips:
        np.testing.assert_array_equal(clip["video"], data[every[clip["caption"]]]["video"])


def test_pickles_are_small(make):
    data = make()
    first = data[5]
    content = pickle.dumps(data)
    assert len(content) < 50_000  # no pictures in it
    np.testing.assert_array_equal(pickle.loads(content)[5]["video"], first["video"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 7}, "frames must be from 8 to 32, got 7"),
        ({"frames": 33}, "frames must be from 8 to 32, got 33"),
        ({"size": 31}, "size must be from 32 to 128, got 31"),
        ({"size": 129}, "size must be from 32 to 128, got 129"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"split": "test"}, "split must be one of train, validation, held_out, got 'test'"),
        ({"limit": 0}, f"limit must be from 2 to {len(CATALOG)} or None, got 0"),
    ],
)
def test_wrong_arguments_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_split_without_held_out_figures_is_refused(make, monkeypatch):
    monkeypatch.setattr("train.moving_emoji.held_out_motions", lambda _: frozenset())
    with pytest.raises(ValueError, match=f"none is among the first {LIMIT}; raise limit"):
        make(split="held_out")


@pytest.mark.parametrize("index", [512, -513])
def test_wrong_index_is_refused(make, index):
    data = make(split="held_out")
    with pytest.raises(IndexError, match=f"from -512 to 511 in split held_out, got {index}"):
        data[index]
    with pytest.raises(TypeError):
        data[1.5]


# Files


@pytest.mark.parametrize("fps", [8, 25])
def test_gif(make, tmp_path, fps):
    index = next(i for i in range(99) if make().scene(i).actors[0].motion == "moves right")
    video = make()[index]["video"]
    save_gif(video, tmp_path / "clip.gif", fps=fps)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (16, (64, 64), 0)
        for number, frame in enumerate(video):
            gif.seek(number)
            assert gif.info["duration"] == round(100 / fps) * 10
            assert np.abs(np.asarray(gif.convert("RGB")).astype(float) - frame).max() < 16


def test_still_gif_is_one_long_frame(figures, name, tmp_path):
    scene = Scene((Actor(name, "stays", 0.5, 0.5, 0.5),), Background("teal", "dots", 0))
    save_gif(scene.render(figures, 8, 32), tmp_path / "clip.gif", fps=10)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.info["duration"] * gif.n_frames == 800


def test_contact_sheet(make):
    sheet = contact_sheet(make()[0]["video"], columns=5)
    assert sheet.mode == "RGB"
    assert sheet.width >= 5 * 64
    assert sheet.height >= 4 * 64
    assert sheet.width < 7 * 64


def test_wrong_videos_are_refused(tmp_path):
    video = np.zeros((8, 32, 32, 3), np.uint8)
    for write in (contact_sheet, lambda wrong: save_gif(wrong, tmp_path / "clip.gif")):
        with pytest.raises(ValueError, match=r"video must be uint8 of shape .*, got float64"):
            write(video / 255)
        with pytest.raises(ValueError, match=r"got uint8 of shape \(32, 32, 3\)"):
            write(video[0])
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        contact_sheet(video, columns=0)
    for fps in (0, 51):
        with pytest.raises(ValueError, match=f"fps must be above 0 and at most 50, got {fps}"):
            save_gif(video, tmp_path / "clip.gif", fps=fps)
    assert not list(tmp_path.iterdir())


def test_pose_is_a_plain_record():
    pose = Actor("cat", "moves right", 0.5, 0.25, 0.5, amount=0.5).pose(3)
    assert isinstance(pose, Pose)
    np.testing.assert_allclose(pose.x, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(pose.y, 0.25)
    assert pose.mirrored
