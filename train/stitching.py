"""Four ways to share the steps between two models, compared: `python -m train.stitching --help`.

Draws the same captions with the same noise by every policy, and measures how far each picture is
from the large model's, how often the classifier sees what the caption says, how the pictures are
distributed, and how long a picture takes. Writes `stitching.json`, `stitching.png` (distance over
speed-up) and grids of the first pictures.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxgen.checkpoints import write_json
from jaxgen.pictures import image_grid
from jaxgen.pipelines import StitchedTextToImage, TextToImage
from jaxgen.sampling import (
    Alone,
    HybridStitch,
    Policy,
    SRDiffusion,
    TStitch,
)
from train import openmoji
from train.evaluate import check_classes, choose_rows
from train.scores import (
    AttributeScorer,
    acceptable_genders,
    attribute_accuracy,
    bootstrap_interval,
    frechet_distance,
    peak_signal_to_noise,
    structural_similarity,
)
from train.stitching_report import METHODS, Record, at_equal_cost, describe, plot, table


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare large only, small only, T-Stitch, SRDiffusion and HybridStitch on OpenMoji."""

    large: Path = Path("weights/openmoji-large")
    """Folder of the large model."""
    small: Path = Path("weights/openmoji-small")
    """Folder of the small model."""
    classifier: Path = Path("weights/openmoji-classifier")
    """Folder of the attribute classifier."""
    output: Path = Path("runs/stitching")
    """Folder of the results."""
    captions: int = 208
    """Captions, half of them combinations from training and half held-out ones."""
    prompts: Literal["captions", "empty"] = "captions"
    """What the models are told. A caption of OpenMoji leaves one picture, whatever the noise; with
    empty prompts the noise decides, so the first steps count as they do with real photographs."""
    steps: int = 50
    """Euler steps."""
    guidance_scale: float = 4.0
    """Of both models."""
    batch_size: int = 52
    """Pictures drawn at once."""
    seed: int = 0
    """Of the noise."""
    quick: bool = False
    """One setting of each policy only."""

    def __post_init__(self):
        for name, smallest in (("captions", 4), ("steps", 10), ("batch_size", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")

    def policies(self) -> tuple[Policy, ...]:
        """Return what is compared; the large model alone comes first."""
        whole = (Alone(), Alone("small"))
        if self.quick:
            return (*whole, TStitch(), SRDiffusion(0.5), HybridStitch())
        # Most are about 1.5 or 1.83 times cheaper than the large model; see TARGETS.
        stitched = [TStitch(share) for share in (0.2, 0.42, 0.56, 0.7)]
        rendered = [SRDiffusion(switch) for switch in (0.8, 0.58, 0.44, 0.3)]
        splits = {
            0.3: ((0.2, 0.78), (0.3, 0.64), (0.4, 0.5), (0.3, 0.98), (0.4, 0.84), (0.22, 0.52)),
            0.5: ((0.2, 0.56), (0.3, 0.52), (0.2, 0.8), (0.3, 0.74), (0.4, 0.68)),
        }
        hybrid = [
            HybridStitch(start, end, share, score=score)
            for share, pairs in splits.items()
            for start, end in pairs
            for score in ("x0_diff", "model_diff")
        ]
        kept = [
            HybridStitch(0.2, end, share, score="model_diff", keep_text=True)
            for end, share in ((0.88, 0.3), (0.6, 0.5), (0.86, 0.5))
        ]
        return (*whole, *stitched, *rendered, SRDiffusion(), *hybrid, *kept)


def draw(
    pair: StitchedTextToImage, policy: Policy, captions: Sequence[str], config: Config
) -> tuple[np.ndarray, float]:
    """Return one picture a caption, and the seconds a picture takes once all is compiled."""
    size = min(config.batch_size, len(captions))
    pictures, seconds = [], []
    starts = range(0, len(captions), size)
    for start in (0, *starts):  # the first batch twice: it compiles
        part = list(captions[start : start + size])
        seeds = [config.seed * 1_000_003 + start + i for i in range(size)]
        part += part[:1] * (size - len(part))
        began = time.perf_counter()
        drawn = pair(
            part,
            policy=policy,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            seed=[seed % 2**32 for seed in seeds],
        )
        seconds.append(time.perf_counter() - began)
        pictures.append(drawn[: len(captions) - start])
    return np.concatenate(pictures[1:]), float(np.median(seconds[1:])) / size


def compare(
    pair: StitchedTextToImage,
    scorer: AttributeScorer,
    emojis: openmoji.Emojis,
    config: Config,
    on_record: Callable[[Record, np.ndarray, list[str]], None] | None = None,
) -> list[Record]:
    """Draw and measure by every policy; return a record for each.

    Args:
        pair: The models.
        scorer: The classifier.
        emojis: Where captions come from.
        config: What to do.
        on_record: Called with each record, its pictures and their prompts.
    """
    check_classes(scorer, emojis)
    groups = choose_rows(emojis, config.captions // 2)
    rows = np.concatenate([groups["train"], groups["held_out"]])
    captions = [emojis.captions[row] for row in rows]
    prompts = captions if config.prompts == "captions" else [""] * len(captions)
    genders = acceptable_genders(emojis)
    _, real = scorer.read(emojis.images[np.unique(rows)])
    records: list[Record] = []
    wanted = features_wanted = None
    for policy in config.policies():
        pictures, seconds = draw(pair, policy, prompts, config)
        ids, features = scorer.read(pictures)
        if wanted is None or features_wanted is None:
            wanted, features_wanted = pictures, features
        distances = perceptual_distance(features, features_wanted)
        record = {
            "method": METHODS[type(policy)],
            "policy": dataclasses.asdict(policy),
            "seconds_a_picture": seconds,
            "speed_up": records[0]["seconds_a_picture"] / seconds if records else 1.0,
            "speed_up_in_operations": 1 / pair.cost(policy, config.steps),
            "distance": float(distances.mean()),
            "distances": [round(float(distance), 5) for distance in distances],
            "distance_interval": bootstrap_interval(distances),
            "psnr": float(peak_signal_to_noise(pictures, wanted).mean()),
            "ssim": float(structural_similarity(pictures, wanted).mean()),
            "accuracy": attribute_accuracy(ids, emojis, rows, genders) if any(prompts) else None,
            "frechet_distance": frechet_distance(features, real),
        }
        records.append(record)
        if on_record:
            on_record(record, pictures, prompts)
    return records


def perceptual_distance(features: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the distance of the classifier's features, as a share of their length."""
    length = np.linalg.norm(wanted, axis=1)
    return np.linalg.norm(features - wanted, axis=1) / np.maximum(length, 1e-9)


def main() -> None:
    """Parse the command line, compare, write and print the table."""
    import tyro

    config = tyro.cli(Config, prog="python -m train.stitching")
    pair = StitchedTextToImage(*map(TextToImage.from_pretrained, (config.large, config.small)))
    emojis = openmoji.load(pair.large.transformer.config.sample_size)
    config.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, np.ndarray] = {}
    result = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "hardware": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "records": [],
    }

    def save(record: Record, pictures: np.ndarray, captions: list[str]) -> None:
        name = describe(record["method"], record["policy"])
        print(name, file=sys.stderr, flush=True)
        result["records"].append(record)
        path = config.output / "stitching.json"
        write_json(path, result)
        rows[name] = pictures[:8]
        labels = [label for label in rows for _ in range(len(rows[label]))]
        grid = image_grid(np.concatenate(list(rows.values())), labels, headings=captions[:8])
        grid.save(config.output / "pictures.png")

    records = compare(pair, AttributeScorer.load(config.classifier), emojis, config, save)
    plot({f"prompts: {config.prompts}": records}, config.output / "stitching.png")
    print(table(records))
    print(at_equal_cost(records))


if __name__ == "__main__":
    main()
