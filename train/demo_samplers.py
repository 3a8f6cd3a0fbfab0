"""The part of the demo that compares samplers: who predicts which step, what it saves and costs.

Each sampler draws the same captions from the same noise, one picture at a time, with the settings
of `python -m train.stitching --quick`, which measures the same on more captions.
"""

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxgen.pictures import image_grid
from jaxgen.pipelines import StitchedTextToImage, TextToImage
from jaxgen.sampling import Alone, Policy
from train import stitching, stitching_report
from train.scores import peak_signal_to_noise

PICTURE = "samplers.png"
"""File of the grid in the demo's folder."""

RECONSTRUCTION = (
    "HybridStitch is a reconstruction from the abstract of its paper (arXiv 2603.07815)"
)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What one sampler drew, beside what the large model alone drew.

    Attributes:
        policy: The sampler.
        pictures: One for each caption.
        seconds: Median time a picture takes, compilation not counted.
        speed_up: Over the large model alone.
        decibels: Peak signal-to-noise ratio of each picture against the large model's; at most
            100, which equal pictures have.
    """

    policy: Policy
    pictures: UInt8[np.ndarray, "captions height width 3"]
    seconds: float
    speed_up: float
    decibels: Float[np.ndarray, "captions"]

    @property
    def name(self) -> str:
        """The sampler without its settings."""
        return self.described.partition(",")[0]

    @property
    def described(self) -> str:
        """The sampler and its settings."""
        method = stitching_report.METHODS[type(self.policy)]
        return stitching_report.describe(method, dataclasses.asdict(self.policy))

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """A row of the table: sampler, time a picture, speed-up and mean PSNR."""
        same = self.policy == Alone()
        decibels = "" if same else f"{self.decibels.mean():.1f} dB"
        return self.described, f"{self.seconds:.2f} s", f"{self.speed_up:.2f}", decibels


def compare(
    pair: StitchedTextToImage, captions: Sequence[str], steps: int = 20
) -> Iterator[Sampled]:
    """Draw the captions by each sampler, the large model alone first.

    Args:
        pair: The models.
        captions: What to draw.
        steps: Euler steps, at least 10.
    """
    config = stitching.Config(steps=steps, batch_size=1, quick=True)
    wanted, whole = None, 0.0
    for policy in config.policies():
        if policy == Alone("small"):
            continue
        pictures, seconds = stitching.draw(pair, policy, captions, config)
        if wanted is None:
            wanted, whole = pictures, seconds
        decibels = peak_signal_to_noise(pictures, wanted)
        yield Sampled(policy, pictures, seconds, whole / seconds, decibels)


def grid(samples: Sequence[Sampled], headings: Sequence[str]) -> Image.Image:
    """Lay out one row a sampler and one column a caption."""
    labels = [
        one.name if one.policy == Alone() else f"{one.name}, {one.speed_up:.1f}x, {decibels:.0f} dB"
        for one in samples
        for decibels in one.decibels
    ]
    pictures = np.concatenate([one.pictures for one in samples])
    return image_grid(pictures, labels, headings=headings, picture_size=176)


def section(samples: Sequence[Sampled], steps: int) -> str:
    """Return the part of the report, as HTML."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in one.cells) for one in samples
    )
    return f"""<h2>Two models for one picture</h2>
<p>The large model alone, and three ways to share its {steps} steps with the small one, from the
same noise. T-Stitch begins with the small model and ends with the large one, SRDiffusion the other
way round. HybridStitch begins with the large model and ends with the small one; in between (from
one share of the steps to another) the large model goes on with a share of the patches only, those
that still change most. Where the small model ends, fine details are its own.</p>
<table><tr><th>sampler<th>time a picture<th>speed-up<th>PSNR</tr>{rows}</table>
<p>Times are medians over {len(samples[0].pictures)} pictures, drawn one by one, compilation not
counted; speed-up is over the large model alone. PSNR is the mean against the large model's
pictures: higher is closer. {RECONSTRUCTION}; what the abstract leaves open is our choice.</p>
<p><img src="{PICTURE}" alt="grid of captions and samplers"></p>
"""


def show(
    folders: Mapping[str, Path],
    captions: Sequence[str],
    headings: Sequence[str],
    steps: int,
    output: Path,
) -> str:
    """Compare the samplers, print a row for each as it is done, and write the grid.

    Args:
        folders: Of the models "large" and "small".
        captions: What to draw.
        headings: Captions as the grid is to show them.
        steps: Euler steps, at least 10.
        output: Folder that gets the grid.

    Returns:
        The part of the report, as HTML; empty unless there are both models.
    """
    for name in ("large", "small"):
        if name not in folders:
            print(f"   skipped, there is no {name} model")
            return ""
    models = (TextToImage.from_pretrained(folders[name]) for name in ("large", "small"))
    _print_row("sampler", "a picture", "speed-up", "PSNR")
    samples = []
    for one in compare(StitchedTextToImage(*models), captions, steps):
        samples.append(one)
        _print_row(*one.cells)
    print("   Compilation is not counted; PSNR is against the pictures of the large model.")
    print(f"   {RECONSTRUCTION}.")
    grid(samples, headings).save(output / PICTURE)
    print(f"   wrote {output / PICTURE}")
    return section(samples, steps)


def _print_row(sampler: str, seconds: str, speed_up: str, decibels: str) -> None:
    row = f"   {sampler:<40}{seconds:>10}{speed_up:>10}{decibels:>10}"
    print(row.rstrip(), flush=True)
