"""What jaxgen does, in a few minutes on a laptop: `python -m train.demo` (or `make demo`).

Draws emoji with the shipped models, captions from training beside combinations that training never
contained; draws some again with both models sharing the steps; does sums with two diffusion
language models, one of which keeps what the other throws away; then trains a model from scratch for
a minute with INT8 attention. Pictures and a report go to one folder.
"""

import dataclasses
import html
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from jaxgen.pictures import image_grid
from jaxgen.pipelines import TextToImage
from train import demo_samplers, demo_sums, openmoji
from train.metrics import Row
from train.text_to_image import train
from train.text_to_image_config import Config as TrainConfig
from train.text_to_image_parts import load_pictures


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw with the shipped models, alone and together, do sums, then train for a minute."""

    output: Path = Path("demo_output")
    """Folder that gets the pictures and the report."""
    weights: Path = Path("weights")
    """Folder of the shipped models."""
    captions: int = 9
    """Captions of the grid; the last third are held-out combinations."""
    sampler_captions: int = 4
    """Captions that every sampler draws, chosen likewise."""
    steps: int = 20
    """Euler steps a picture."""
    sums: int = 64
    """Problems for the two language models."""
    train_seconds: float = 75.0
    """Time for training from scratch, compilation (about 20 seconds of it) included."""
    train_model: str = "openmoji-32"
    """Preset that is trained."""

    def __post_init__(self):
        least = (("captions", 3), ("sampler_captions", 3), ("steps", 10), ("sums", 3))
        for name, smallest in least:
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures of one model, in the order of the captions, for two seeds."""

    name: str
    parameters: int
    pictures: np.ndarray
    seconds_to_compile: float
    seconds_a_picture: float


def choose_rows(emojis: openmoji.Emojis, count: int) -> list[int]:
    """Return evenly spaced emoji: things and people that were trained on, and held-out people."""
    trained, people = ~emojis.held_out, emojis.composed
    groups = (trained & ~people, trained & people, emojis.held_out)
    chosen: list[int] = []
    for index, group in enumerate(groups):
        number = (count + 2 - index) // 3
        rows = np.flatnonzero(group)
        chosen += rows[(np.linspace(0.06, 0.94, number) * (len(rows) - 1)).astype(int)].tolist()
    return chosen


def draw(name: str, folder: Path, captions: list[str], steps: int) -> Drawn:
    """Draw the captions twice, with different noise; the second time is the one measured."""
    pipeline = TextToImage.from_pretrained(folder)
    started = time.perf_counter()
    first = pipeline(captions, steps=steps, seed=0)
    compiled = time.perf_counter()
    second = pipeline(captions, steps=steps, seed=1)
    seconds = time.perf_counter() - compiled
    parts = (pipeline.transformer, pipeline.text_encoder)
    parameters = sum(x.size for part in parts for x in jax.tree.leaves(nnx.state(part, nnx.Param)))
    return Drawn(
        name,
        parameters,
        np.stack([first, second]),
        max(compiled - started - seconds, 0.0),
        seconds / len(captions),
    )


def labelled_grid(emojis: openmoji.Emojis, rows: list[int], drawn: list[Drawn]) -> Image.Image:
    """Lay out one column a caption: the real emoji, then what each model drew."""
    size = drawn[0].pictures.shape[2]
    real = [Image.fromarray(emojis.images[row]).resize((size, size), Image.Resampling.BOX)
            for row in rows]  # fmt: skip
    lines = {"OpenMoji": np.stack([np.asarray(picture) for picture in real])}
    for one in drawn:
        lines |= {f"{one.name}, seed {seed}": one.pictures[seed] for seed in (0, 1)}
    captions = [label for label in lines for _ in rows]
    pictures = np.concatenate(list(lines.values()))
    return image_grid(pictures, captions, headings=headings(emojis, rows), picture_size=112)


def headings(emojis: openmoji.Emojis, rows: list[int]) -> list[str]:
    """Return captions, those marked that no picture in training had."""
    return [
        emojis.captions[row] + (" (never trained on)" if emojis.held_out[row] else "")
        for row in rows
    ]


def plot_losses(rows: list[Row], path: Path) -> None:
    """Plot the loss over the steps."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="flow matching loss", yscale="log")
    axes.set_title("training from scratch with INT8 attention")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=120)


def train_from_scratch(config: Config, folder: Path) -> tuple[list[Row], Path]:
    """Train for the time given; return the rows of metrics and the last picture grid."""
    settings = TrainConfig(
        output=folder / "run",
        model=config.train_model,
        subset="people",
        attention="int8",
        precision="float32",
        batch_size=32,
        steps=100_000,
        schedule="constant",
        warmup_steps=20,
        learning_rate=2e-3,
        ema_decay=0.98,
        time_limit=config.train_seconds,
        log_every=5,
        sample_every=100_000,
        sample_steps=12,
    )
    result = train(settings)
    if result.stopped not in ("finished", "time limit"):
        raise SystemExit(f"the demo was interrupted ({result.stopped})")
    return result.rows, max((folder / "run" / "samples").glob("*.png"))


def write_report(config: Config, drawn: list[Drawn], sections: str, rows: list[Row]) -> Path:
    """Write one HTML page that shows everything; `sections` are its middle."""
    models = "".join(
        f"<tr><td>{html.escape(one.name)}<td>{one.parameters / 1e6:.1f} M"
        f"<td>{one.seconds_to_compile:.0f} s<td>{one.seconds_a_picture:.2f} s"
        for one in drawn
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>jaxgen demo</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100% }} td, th {{ padding: 0.2rem 1rem 0.2rem 0; text-align: left }}
</style>
<h1>jaxgen demo</h1>
<h2>Captions in, pictures out</h2>
<p>First the real emoji, then what each model drew from the caption alone, with two seeds
({config.steps} Euler steps, guidance 4). The last third are combinations of concept and skin
tone that no picture in training showed.</p>
<table><tr><th>model<th>parameters<th>compilation<th>time a picture</tr>{models}</table>
<p>On {html.escape(jax.devices()[0].device_kind)}.</p>
<p><img src="grid.png" alt="grid of captions and models"></p>
{sections}<h2>Training from scratch with INT8 attention</h2>
<p>{rows[-1]["step"]} steps in {config.train_seconds:.0f} seconds, compilation included. The loss
went from {_show(rows[0]["loss"])} to {_show(rows[-1]["loss"])}.</p>
<p><img src="loss.png" alt="loss over steps"></p>
<p>What this model draws so far:</p>
<p><img src="after_a_minute.png" alt="samples"></p>
<p><small>{html.escape(openmoji.ATTRIBUTION)}</small></p>
</html>
"""
    path = config.output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _show(loss: float | None) -> str:
    """A loss in three digits; a row whose steps were all skipped has none."""
    return "none" if loss is None else f"{loss:.3f}"


def run(config: Config) -> Path:
    """Do everything and return the path of the report.

    Raises:
        FileNotFoundError: There is no model in `config.weights`.
    """
    folders = {
        name: config.weights / f"openmoji-{name}"
        for name in ("large", "small")
        if (config.weights / f"openmoji-{name}").is_dir()
    }
    if not folders:
        raise FileNotFoundError(
            f"{config.weights.absolute()} holds no model (openmoji-large, openmoji-small); "
            "run the demo from the root of the repository or name the folder with --weights"
        )
    print(f"jaxgen demo on {jax.devices()[0].device_kind}. Everything goes to {config.output}/.")
    config.output.mkdir(parents=True, exist_ok=True)
    emojis = openmoji.load(64)
    load_pictures(
        TrainConfig(model=config.train_model)
    )  # drawn before the clock of training starts
    rows = choose_rows(emojis, config.captions)
    captions = [emojis.captions[row] for row in rows]

    print(f"1. Drawing {len(captions)} captions with the shipped models, twice each:")
    drawn = []
    for name, folder in folders.items():
        one = draw(name, folder, captions, config.steps)
        drawn.append(one)
        print(
            f"   {name}: {one.parameters / 1e6:.1f} M parameters, compiled in "
            f"{one.seconds_to_compile:.0f} s, {one.seconds_a_picture:.2f} s a picture"
        )
    labelled_grid(emojis, rows, drawn).save(config.output / "grid.png")
    print(f"   wrote {config.output / 'grid.png'}")

    rows = choose_rows(emojis, config.sampler_captions)
    captions = [emojis.captions[row] for row in rows]
    print(f"2. Drawing {len(captions)} captions with both models sharing the steps:")
    samplers = demo_samplers.show(
        folders, captions, headings(emojis, rows), config.steps, config.output
    )

    print(f"3. {config.sums} sums by two diffusion language models:")
    sums = demo_sums.show(config.weights, config.sums)

    print(f"4. Training from scratch with INT8 attention for {config.train_seconds:.0f} s:")
    with tempfile.TemporaryDirectory() as temporary:
        history, samples = train_from_scratch(config, Path(temporary))
        shutil.copy(samples, config.output / "after_a_minute.png")
    plot_losses(history, config.output / "loss.png")
    print(f"   loss {_show(history[0]['loss'])} -> {_show(history[-1]['loss'])}")
    report = write_report(config, drawn, samplers + sums, history)
    print(f"Done. Open {report} in a browser.")
    return report


def main() -> None:
    """Parse the command line and run."""
    import tyro

    run(tyro.cli(Config, prog="python -m train.demo"))


if __name__ == "__main__":
    main()
