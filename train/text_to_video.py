"""Train a text-to-video diffusion transformer: `python -m train.text_to_video --help`.

A run lives in one folder: `config.json`, `metrics.jsonl`, `validation.jsonl`, `checkpoints/`,
`samples/*.gif`, `samples/*.png` and, at the end, `export/`. Running the same command again resumes
from the newest checkpoint, exactly; SIGINT and SIGTERM save one first.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxgen.text import WordTokenizer
from train import openmoji
from train.clips import ClipBatches, Clips
from train.metrics import JsonLines, Row
from train.run import (
    Finished,
    Hook,
    Plan,
    as_command,
    carry_out,
    mesh_of,
    needs_export,
    parse,
    printer,
    run_record,
)
from train.state import Arrays, Skeleton, make_optimizer, take_apart
from train.text_to_video_config import Config
from train.text_to_video_parts import (
    Validation,
    choose_captions,
    draw_clips,
    load_export,
    make_loss,
    make_models,
    make_tokenizer,
    open_clips,
    save_export,
    save_samples,
)


def train(
    config: Config,
    *,
    clips: Mapping[str, Clips] | None = None,
    tokenizer: WordTokenizer | None = None,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Finished:
    """Train, resuming if the folder holds a run, and export unless a signal arrived.

    Args:
        config: The experiment.
        clips: The splits train, validation and held_out; moving emoji by default.
        tokenizer: Encodes their captions; that of moving emoji by default.
        on_row: Called with each row of metrics as it is written.
        show_progress: Say what happens and show a progress bar, on stderr.

    Raises:
        ValueError: The batch does not fit the devices, clips have another shape, or the folder
            holds a run with another configuration; the message is then a diff.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite.
        NotImplementedError: JAX was started with several processes.
    """
    started = time.monotonic()
    mesh_of(config)  # refuses before anything is made
    clips = open_clips(config) if clips is None else clips
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    shape = clips["train"][0]["video"].shape
    if shape != (config.frames, config.size, config.size, 3):
        raise ValueError(
            f"clips must have shape {(config.frames, config.size, config.size, 3)}, got {shape}"
        )
    build = functools.partial(make_models, config, tokenizer)

    def make() -> Arrays:
        if config.start_from is None:
            return take_apart(build())[1]
        return take_apart(load_export(config.start_from, precision=config.precision)[0])[1]

    skeleton, shapes = take_apart(nnx.eval_shape(build))
    plan = Plan(
        title=f"{config.model}, {config.attention} attention",
        skeleton=skeleton,
        shapes=shapes,
        make=make,
        trained=skeleton.trained,
        loss=make_loss(skeleton, config.noise_levels()),
        optimizer=functools.partial(
            make_optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        ),
    )
    stream = ClipBatches(
        clips["train"],
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        workers=config.workers,
    )
    hooks = [
        Hook(config.validate_every, validation_hook(config, clips, tokenizer, skeleton)),
        Hook(config.sample_every, sample_hook(config, clips, tokenizer, skeleton)),
    ]
    with stream:
        result = carry_out(
            config,
            plan,
            stream,
            hooks=hooks,
            started=started,
            on_row=on_row,
            show_progress=show_progress,
        )
    export = result.folder / "export"
    if needs_export(config, result):
        models = skeleton.join(jax.device_put(result.arrays))
        save_export(export, models, tokenizer, make_card(config, result), config.export_dtype)
        printer(show_progress)(f"exported {export}")
    return result


def validation_hook(
    config: Config, clips: Mapping[str, Clips], tokenizer: WordTokenizer, skeleton: Skeleton
) -> Callable[[int, Arrays], None]:
    """Return a hook that appends losses on fixed clips and noise to `validation.jsonl`."""
    parts = {split: clips[split] for split in ("validation", "held_out")}

    @functools.cache
    def validation() -> Validation:
        return Validation(
            parts,
            tokenizer,
            count=config.validation_clips,
            levels=config.validation_levels,
            distribution=config.noise_levels(),
        )

    def validate(step: int, arrays: Arrays) -> None:
        writer = JsonLines(config.output / "validation.jsonl", step - 1)
        writer.write({"step": step} | validation()(skeleton, arrays))
        writer.close()

    return validate


def sample_hook(
    config: Config, clips: Mapping[str, Clips], tokenizer: WordTokenizer, skeleton: Skeleton
) -> Callable[[int, Arrays], None]:
    """Return a hook that draws some captions to `samples`."""
    captions = config.sample_captions or choose_captions(clips)
    shape = config.frames, config.size, config.size

    def draw(step: int, arrays: Arrays) -> None:
        models = skeleton.join(jax.device_put({name: arrays[name] for name in skeleton.names}))
        videos = draw_clips(config, models, tokenizer, captions, shape)
        save_samples(videos, captions, config.output / "samples" / f"{step:07d}")

    return draw


def make_card(config: Config, result: Finished) -> dict[str, Any]:
    """Return the model card: what was trained on what, how, how long, and the losses it reached."""
    return {
        "name": config.model,
        "task": "text-to-video",
        "data": "OpenMoji, moving",
        "attribution": openmoji.ATTRIBUTION,
    } | run_record(config, result)


def main() -> None:
    """Parse the command line and train; the exit code tells how it ended, see `run.as_command`."""
    config = parse(Config)
    as_command(lambda: train(config).stopped)


if __name__ == "__main__":
    main()
