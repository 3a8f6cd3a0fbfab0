"""Train a text-to-image diffusion transformer on OpenMoji: `python -m train.text_to_image --help`.

A run lives in one folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `samples/*.png` and, at
the end, `export/`, which `jaxgen.pipelines.TextToImage.from_pretrained` loads. Running the same
command again resumes from the newest checkpoint, exactly; SIGINT and SIGTERM save one first.
"""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.pipelines import TextToImage
from jaxgen.text import WordTokenizer
from train import loop, openmoji, run_folder
from train.checkpoint import Checkpoints, abstract
from train.data import batches
from train.metrics import JsonLines, Meter, Row, TensorBoard, Writer, read_rows
from train.sharding import BATCH_SPEC, gather, make_mesh, place_batch, state_shardings
from train.state import (
    Arrays,
    TrainState,
    create_state,
    make_optimizer,
    make_train_step,
    take_apart,
)
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
    say = _printer(show_progress)
    if jax.process_count() > 1:
        raise NotImplementedError(f"training runs in one process, got {jax.process_count()}")
    if config.devices > jax.device_count():
        raise ValueError(f"there are {jax.device_count()} devices, got devices={config.devices}")
    mesh = make_mesh(config.fsdp, jax.devices()[: config.devices or None])
    if config.batch_size % mesh.size:
        raise ValueError(
            "batch_size must be a multiple of the number of devices, got "
            f"batch_size={config.batch_size} and {mesh.size} devices"
        )

    # What is trained, on what.
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
    folder = run_folder.claim(config)

    # How: one compiled step, whose state stays where the mesh wants it.
    rate = config.learning_rate_schedule()
    optimizer = make_optimizer(
        rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        gradient_clip=config.gradient_clip,
    )

    def initialize(arrays: Arrays) -> TrainState:
        trained = skeleton.trained - given.keys()
        params = {name: array for name, array in arrays.items() if name in trained}
        frozen = {name: array for name, array in arrays.items() if name not in trained}
        return create_state(params, frozen, optimizer)

    shapes = jax.eval_shape(lambda: initialize(take_apart(build())[1]))
    shardings = state_shardings(shapes, mesh)
    train_step = jax.jit(
        make_train_step(
            make_loss(config, skeleton),
            optimizer,
            learning_rate=rate,
            ema_decay=config.ema_decay,
            seed=config.seed,
        ),
        in_shardings=(shardings, jax.NamedSharding(mesh, BATCH_SPEC)),
        out_shardings=(shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )

    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints:
        restored = checkpoints.restore(abstract(shapes, shardings))
        if restored:
            state, extra = restored
            stream.set_state(extra["data"])
            say(f"resuming {folder} at step {int(state.step)} of {config.steps}")
        else:
            # Built eagerly: one program that draws every weight takes XLA longer to compile.
            arrays = take_apart(build())[1] | given
            state, extra = jax.jit(initialize, out_shardings=shardings)(arrays), {"seconds": 0.0}
        first_step = int(state.step)

        def seconds() -> float:
            return extra["seconds"] + time.monotonic() - started

        def pipeline_of(state: TrainState) -> TextToImage:
            models = skeleton.join(jax.device_put(gather(state.ema | state.frozen, mesh)))
            step, rows = int(state.step), read_rows(folder / "metrics.jsonl")
            card = make_card(config, emojis, rows, step, seconds(), mesh.size)
            return TextToImage(models.transformer, models.text_encoder, tokenizer, card)

        def draw(step: int, state: TrainState) -> None:
            (folder / "samples").mkdir(exist_ok=True)
            captions = config.sample_captions or choose_captions(emojis)
            grid = draw_grid(pipeline_of(state), captions, config)
            grid.save(folder / "samples" / f"{step:07d}.png")

        writers: list[Writer] = [JsonLines(folder / "metrics.jsonl", first_step)]
        if config.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard", first_step))
        parameters = sum(array.size for array in shapes.params.values())
        say(
            f"{config.model}: {parameters / 1e6:.2f} M parameters, {config.attention} attention, "
            f"{len(emojis.train)} pictures, {mesh.size} x {jax.devices()[0].device_kind}; "
            "compiling the training step"
        )
        try:
            with jax.set_mesh(mesh):
                state, stopped = loop.run(
                    state,
                    train_step,
                    stream,
                    lambda batch: place_batch(batch, mesh),
                    limits=loop.Limits(
                        steps=config.steps,
                        save_every=config.save_every,
                        skips_in_a_row=config.skips_in_a_row,
                        deadline=None if config.time_limit is None else started + config.time_limit,
                    ),
                    checkpoints=checkpoints,
                    meter=Meter(config.batch_size, config.log_every),
                    writers=writers,
                    hooks=[loop.Hook(config.sample_every, draw)],
                    extra=lambda: {"seconds": seconds()},
                    on_row=on_row,
                    show_progress=show_progress,
                )
        finally:
            for writer in writers:
                writer.close()

        pipeline = pipeline_of(state)
        export = folder / "export"
        made_steps = int(state.step) > first_step  # a finished run keeps what was added to its card
        if stopped in ("finished", "time limit") and (made_steps or not export.exists()):
            pipeline.save_pretrained(export, dtype=jnp.bfloat16)
            say(f"exported {export}")
        say(f"stopped ({stopped}) at step {int(state.step)} after {seconds():.0f} s")
    rows = read_rows(folder / "metrics.jsonl")
    return Result(folder, int(state.step), stopped, rows, pipeline, state)


def _printer(show: bool) -> Callable[[str], Any]:
    """Return a function that prints to stderr, or does nothing."""
    if show:
        return lambda message: print(message, file=sys.stderr, flush=True)
    return lambda message: None


def run_command(config: Config) -> None:
    """Train as a command: the exit code tells how it ended.

    0 when finished or out of time, 128 + the signal's number after a signal.
    """
    try:
        result = train(config)
    except run_folder.ConfigChangedError as error:
        raise SystemExit(str(error)) from None
    if result.stopped in ("SIGINT", "SIGTERM"):
        raise SystemExit(128 + signal.Signals[result.stopped])


def main() -> None:
    """Parse the command line and train."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError('the command line needs tyro: pip install "jaxgen[train]"') from error

    run_command(tyro.cli(Config, prog="python -m train.text_to_image"))


if __name__ == "__main__":
    main()
