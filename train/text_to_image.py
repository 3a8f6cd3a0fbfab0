"""Train a text-to-image diffusion transformer on OpenMoji: `python -m train.text_to_image --help`.

A run lives in one folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `samples/*.png` and, at
the end, `export/`, which `jaxgen.pipelines.TextToImage.from_pretrained` loads. Running the same
command again resumes from the newest checkpoint, exactly; SIGINT and SIGTERM save one first.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.pipelines import TextToImage
from jaxgen.text import WordTokenizer
from train import loop, openmoji
from train.data import batches
from train.metrics import Row
from train.run import Hook, Plan, as_command, carry_out, mesh_of, needs_export, parse, printer
from train.state import Arrays, TrainState, make_optimizer, take_apart
from train.text_to_image_config import Config
from train.text_to_image_parts import (
    assemble,
    choose_captions,
    draw_grid,
    load_pictures,
    make_card,
    make_loss,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        folder: The run's folder.
        step: Steps done in total.
        stopped: "finished", "time limit", "SIGINT" or "SIGTERM".
        rows: The rows of `metrics.jsonl`.
        pipeline: The averaged weights, ready to draw.
        state: The last training state, on the mesh.
    """

    folder: Path
    step: int
    stopped: loop.StopReason
    rows: list[Row]
    pipeline: TextToImage
    state: TrainState = dataclasses.field(repr=False)


def train(
    config: Config,
    *,
    emojis: openmoji.Emojis | None = None,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Result:
    """Train, resuming if the folder holds a run, and export unless a signal arrived.

    Args:
        config: The experiment.
        emojis: The data, at the model's resolution; OpenMoji by default.
        on_row: Called with each row of metrics as it is written.
        show_progress: Say what happens and show a progress bar, on stderr.

    Raises:
        ValueError: The batch does not fit the devices or the data, the data do not fit the model,
            or the folder holds a run with another configuration; the message is then a diff.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite.
        NotImplementedError: JAX was started with several processes.
    """
    started = time.monotonic()
    mesh_of(config)  # refuses before anything is made
    emojis = load_pictures(config, emojis)
    borrowed = None
    if config.text_encoder_from is not None:
        borrowed = TextToImage.from_pretrained(config.text_encoder_from)
    tokenizer = borrowed.tokenizer if borrowed else WordTokenizer.from_captions(emojis.captions)
    skeleton, build, given = assemble(config, tokenizer, borrowed)
    stream = batches(
        emojis.train,
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
    )
    plan = Plan(
        title=f"{config.model}, {config.attention} attention, {len(emojis.train)} pictures",
        skeleton=skeleton,
        shapes=take_apart(nnx.eval_shape(build))[1],
        # Built eagerly: one program that draws every weight takes XLA longer to compile.
        make=lambda: take_apart(build())[1] | given,
        trained=skeleton.trained - given.keys(),
        loss=make_loss(config, skeleton),
        optimizer=functools.partial(
            make_optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        ),
    )

    def pipeline_of(arrays: Arrays, card: dict[str, Any]) -> TextToImage:
        models = skeleton.join(jax.device_put(arrays))
        return TextToImage(models.transformer, models.text_encoder, tokenizer, card)

    def draw(step: int, arrays: Arrays) -> None:
        folder = config.output / "samples"
        folder.mkdir(exist_ok=True)
        captions = config.sample_captions or choose_captions(emojis)
        draw_grid(pipeline_of(arrays, {}), captions, config).save(folder / f"{step:07d}.png")

    run = carry_out(
        config,
        plan,
        stream,
        hooks=[Hook(config.sample_every, draw)],
        started=started,
        on_row=on_row,
        show_progress=show_progress,
    )
    card = make_card(config, emojis, run.rows, run.step, run.seconds, run.devices)
    pipeline, export = pipeline_of(run.arrays, card), run.folder / "export"
    if needs_export(config, run):
        pipeline.save_pretrained(export, dtype=jnp.bfloat16)
        printer(show_progress)(f"exported {export}")
    return Result(run.folder, run.step, run.stopped, run.rows, pipeline, run.state)


def run_command(config: Config) -> None:
    """Train as a command: the exit code tells how it ended, see `run.as_command`."""
    as_command(lambda: train(config).stopped)


def main() -> None:
    """Parse the command line and train."""
    run_command(parse(Config))


if __name__ == "__main__":
    main()
