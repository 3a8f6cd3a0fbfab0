"""What every OpenMoji picture is called, what it shows, and which pictures training never sees.

**Captions** are the short names of the Unicode standard, as the package `emoji` has them, in plain
lower-case words with the skin tone last: "man firefighter medium dark skin tone". Two-tone couples
name both, left to right: "... dark and light skin tone". Flags become "flag of kenya", the zodiac
"leo zodiac sign". No two pictures share a caption. Left out are swatches of skin and hair, and the
two-tone "people wrestling" and "people with bunny ears", which OpenMoji 17 draws plain yellow.

The reverse, one picture under several captions, is common and stays: OpenMoji mostly draws a man
for both "firefighter" and "man firefighter", so gender is certain only where it is male or female.

**Attributes** are read off the words. `concept` is the caption without the words for gender and
skin tone ("firefighter"; man, woman and person are the concept "person"; boy, girl and child are
"child"). `gender` is "none" unless the picture shows people; "neutral" where the caption leaves it
open ("firefighter", "person biking", "family"); "mixed" for a woman and a man together.
`skin_tone` is "none" for the yellow default and for things, else one of five, or "mixed".

**Split.** The unit is a pair (concept, skin tone) of a concept that shows one person and exists in
all five tones. SHA-256 of the pair's name decides, so the split depends on no random generator and
a pair keeps its side when emojis are added. A concept gives away at most two of its five tones. A
figure "facing right" is its mirror image's concept here, or training would see the held-out picture
reversed. All genders of a held-out pair are held out together.
"""

import dataclasses
import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

from jaxgen.text import split_words

GENDERS = ("none", "neutral", "male", "female", "mixed")
SKIN_TONES = ("none", "light", "medium light", "medium", "medium dark", "dark", "mixed")
FIVE_SKIN_TONES = SKIN_TONES[1:-1]
"""The tones that one person can have: what the split combines with concepts."""

_HELD_OUT_SHARE = 0.115
_SALT = "split 7"  # of 39 tried, the one that takes about equally many concepts from each tone
_MOST_HELD_OUT_TONES = 2

_TONE = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
_LOOKS = re.compile(r"^(man|woman|person) ((?:red|curly|white|blond) hair|beard)$")
_SUBJECT = re.compile(r"^(man|woman|person|men|women|people)(?: (.+))?$")
_FLAG = re.compile(r"^1F1[EF][0-9A-F]-1F1[EF][0-9A-F]$|^1F3F4-E0067-")
_ZODIAC = re.compile(r"^(264[89A-F]|265[0-3]|26CE)$")
_GENDER_OF = {
    **dict.fromkeys(("person", "people", "child", "adult"), "neutral"),
    **dict.fromkeys(("man", "men", "boy"), "male"),
    **dict.fromkeys(("woman", "women", "girl"), "female"),
}
_GROUPS = ("couple with heart", "kiss", "family")
_PAIRS = ("holding hands", "hugging", "wrestling", "with bunny ears")
_IRREGULAR = {
    **{name: ("child", _GENDER_OF[name]) for name in ("child", "boy", "girl")},
    **{
        f"{prefix} {name}": (f"{prefix} person", _GENDER_OF[name])
        for prefix in ("deaf", "pregnant")
        for name in ("person", "man", "woman")
    },
    "older person": ("older person", "neutral"),
    "old man": ("older person", "male"),
    "old woman": ("older person", "female"),
    "person with crown": ("with crown", "neutral"),
    "prince": ("with crown", "male"),
    "princess": ("with crown", "female"),
    "merperson": ("merperson", "neutral"),
    "merman": ("merperson", "male"),
    "mermaid": ("merperson", "female"),
    "mx claus": ("claus", "neutral"),
    "santa claus": ("claus", "male"),
    "mrs claus": ("claus", "female"),
    "bald man": ("bald", "male"),
    "bald woman": ("bald", "female"),
    "bald person": ("bald", "neutral"),
    "woman and man holding hands": ("holding hands", "mixed"),
    "breast feeding": ("breast feeding", "female"),
}
# OpenMoji 17 repeats the yellow picture for these, whatever the two tones.
_NOT_AS_DRAWN = frozenset(
    (concept, "neutral", "mixed") for concept in ("wrestling", "with bunny ears")
)
# People without a man's and a woman's picture beside them, so that the words alone do not tell.
_MORE_PEOPLE = frozenset(
    ("baby", "baby angel", "ballet dancer", "horse racing", "ninja", "skier", "snowboarder")
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture of OpenMoji.

    Attributes:
        file: Name of the SVG without its suffix: code points in hexadecimal.
        caption: Plain lower-case words.
        concept: The caption without gender and skin tone.
        gender: One of `GENDERS`.
        skin_tone: One of `SKIN_TONES`.
        held_out: Whether the pair (concept, skin tone) never occurs in training.
    """

    file: str
    caption: str
    concept: str
    gender: str
    skin_tone: str
    held_out: bool = False


def shows_one_person(concept: str, gender: str) -> bool:
    """Whether a picture with these attributes shows one person (not a couple, family or thing).

    Args:
        concept: A concept as in `Entry`.
        gender: One of `GENDERS`.

    Returns:
        True for one person.
    """
    return gender not in ("none", "mixed") and concept not in (*_GROUPS, *_PAIRS)


def clean_caption(file: str, name: str) -> str:
    """Turns an emoji's short name into a caption.

    Args:
        file: Code points in hexadecimal, as in `Entry`.
        name: The short name as the package `emoji` writes it (":man_red_hair:").

    Returns:
        Plain lower-case words, the skin tone last.
    """
    text = name.strip(":").replace("_", " ").replace("&", " and ").replace(".", "")
    text = text.replace("keycap #", "keycap hash").replace("keycap *", "keycap asterisk")
    tones = _TONE.findall(text)
    text = " ".join(_TONE.sub(" ", text).split())
    text = _LOOKS.sub(r"\1 with \2", text)
    text = re.sub(r"^(man|woman|person) bald$", r"bald \1", text)
    if _FLAG.match(file):
        text = f"flag of {text}"
    elif _ZODIAC.match(file):
        text = f"{text} zodiac sign"
    if tones:
        text = f"{text} {' and '.join(tones)} skin tone"
    return " ".join(split_words(text))


def catalog(names: Iterable[tuple[str, str]]) -> tuple[Entry, ...]:
    """Describes and splits a set of pictures.

    Args:
        names: Pairs (file, short name) of all pictures: `Entry.file` and the name in `emoji`.

    Returns:
        One entry for each that shows what its name says, sorted by file.

    Raises:
        ValueError: If two pictures get one caption.
    """
    captions = {file: clean_caption(file, name) for file, name in sorted(names)}
    owner: dict[str, str] = {}
    for file, caption in captions.items():
        if owner.setdefault(caption, file) != file:
            raise ValueError(
                f"captions must be unique, got {caption!r} for {owner[caption]}, {file}"
            )
    bodies = {file: _split_tone(caption) for file, caption in captions.items()}
    parsed = {body: _parse(body) for body, _ in bodies.values()}
    people = {concept for concept, gender in parsed.values() if gender != "none"} | _MORE_PEOPLE
    entries = []
    for file, (body, tone) in bodies.items():
        concept, gender = parsed[body]
        if gender == "none" and concept in people:
            gender = "neutral"  # "firefighter" beside "man firefighter"
        if (concept, gender, tone) not in _NOT_AS_DRAWN:
            entries.append(Entry(file, captions[file], concept, gender, tone))
    held_out = held_out_pairs(entries)
    return tuple(
        dataclasses.replace(entry, held_out=(entry.concept, entry.skin_tone) in held_out)
        for entry in entries
    )


def held_out_pairs(entries: Iterable[Entry]) -> frozenset[tuple[str, str]]:
    """Chooses the pairs (concept, skin tone) that training never sees.

    Args:
        entries: All pictures.

    Returns:
        The held-out pairs.
    """
    tones: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if shows_one_person(entry.concept, entry.gender):
            tones[entry.concept].add(entry.skin_tone)
    chosen = set()
    for concept, present in tones.items():
        if present.issuperset(FIVE_SKIN_TONES):
            figure = concept.removesuffix(" facing right")
            lowest = sorted((_share(figure, tone), tone) for tone in FIVE_SKIN_TONES)
            for share, tone in lowest[:_MOST_HELD_OUT_TONES]:
                if share < _HELD_OUT_SHARE:
                    chosen.add((concept, tone))
    return frozenset(chosen)


def _share(concept: str, tone: str) -> float:
    """A number in [0, 1) that belongs to the pair: the first 8 bytes of its SHA-256."""
    digest = hashlib.sha256(f"{concept}, {tone} skin tone, {_SALT}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_tone(caption: str) -> tuple[str, str]:
    """Separates "... dark skin tone" into the rest and one of SKIN_TONES."""
    if not caption.endswith(" skin tone"):
        return caption, "none"
    words = caption.removesuffix(" skin tone")
    one = r"(?:medium light|medium dark|light|medium|dark)"
    match = re.search(rf"^(.+?) ({one})( and {one})?$", words)
    if match is None:
        return caption, "none"
    return match[1], "mixed" if match[3] else match[2]


@functools.cache
def _parse(body: str) -> tuple[str, str]:
    """Concept and gender of a caption without its skin tone."""
    if body in _IRREGULAR:
        return _IRREGULAR[body]
    for group in _GROUPS:
        members = body.removeprefix(group).split()
        if body.startswith(group) and all(word in _GENDER_OF for word in members):
            genders = {_GENDER_OF[word] for word in members} - {"neutral"}
            return group, genders.pop() if len(genders) == 1 else "mixed" if genders else "neutral"
    if match := _SUBJECT.match(body):
        return match[2] or "person", _GENDER_OF[match[1]]
    return body, "none"
