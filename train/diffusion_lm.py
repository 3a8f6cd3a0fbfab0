"""Train a diffusion language model on problems or text: `python -m train.diffusion_lm --help`.

A run lives in one folder: `config.json`, `metrics.jsonl`, `validation.jsonl`, `checkpoints/` and,
at the end, `export/`. Running the same command again resumes from the newest checkpoint, exactly;
SIGINT and SIGTERM save one first.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from train.diffusion_lm_config import Config
from train.diffusion_lm_parts import (
    answer,
    load_export,
    make_decoder,
    make_loss,
    make_models,
    mean_loss,
    open_rows,
    save_export,
)
from train.metrics import JsonLines, Row
from train.problem_data import Table, make_table
from train.rows import RowBatches, Rows
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

_TARGET, _REFERENCE = "target.", "reference."


def train(
    config: Config,
    *,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Finished:
    """Train, resuming if the folder holds a run, and export unless a signal arrived.

    Args:
        config: The experiment.
        on_row: Called with each row of metrics as it is written.
        show_progress: Say what happens and show a progress bar, on stderr.

    Raises:
        ValueError: The batch does not fit the devices or the data, the export to start from is
            another model, or the folder holds a run with another configuration.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite.
        NotImplementedError: JAX was started with several processes.
    """
    started = time.monotonic()
    mesh_of(config)  # refuses before anything is made
    say = printer(show_progress)
    build = functools.partial(make_models, config)
    skeleton, shapes = take_apart(nnx.eval_shape(build))
    trained = frozenset(name for name in skeleton.trained if name.startswith(_TARGET))

    def make() -> Arrays:
        arrays = take_apart(build())[1]
        for option, prefix in {"start_from": _TARGET, "reference": _REFERENCE}.items():
            folder = getattr(config, option)
            if folder is not None:
                arrays |= exported_arrays(folder, prefix, shapes, config)
        return arrays

    if config.task == "text":
        rows, held_out, dropped = open_rows(config)
        say(
            f"{len(rows):,} texts to learn from, {len(held_out):,} to test, {dropped:,} longer "
            f"than max_tokens={config.max_tokens} left out"
        )
    else:
        say(f"making {config.problems:,} problems of {config.task}")
        made = make_table(
            config.task,
            config.levels,
            config.problems,
            workers=config.workers,
            block_length=config.row_block,
        )
        rows, held_out = made.rows(), None
    kind = "RCD" if config.feeds_back else "standard"
    plan = Plan(
        title=f"{config.task}, {config.sight}, {kind}",
        skeleton=skeleton,
        shapes=shapes,
        make=make,
        trained=trained,
        loss=make_loss(skeleton, config.training()),
        optimizer=functools.partial(
            make_optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        ),
    )
    stream = RowBatches(rows, batch_size=config.batch_size, seed=config.seed)
    validate = validation_hook(config, skeleton, held_out)
    result = carry_out(
        config,
        plan,
        stream,
        hooks=[Hook(config.validate_every, validate)],
        started=started,
        on_row=on_row,
        show_progress=show_progress,
    )
    export = result.folder / "export"
    if needs_export(config, result):
        models = skeleton.join(jax.device_put(result.arrays))
        save_export(
            export,
            models.target,
            make_card(config, result),
            config.export_dtype,
            beside=config.start_from if config.task == "text" else None,
            block_length=config.block_length if config.sight == "block_causal" else None,
        )
        say(f"exported {export}")
    return result


def exported_arrays(folder: Path, prefix: str, shapes: Mapping[str, Any], config: Config) -> Arrays:
    """Return the arrays of an export under the names of a part of the models.

    Args:
        folder: The folder `export` of a run.
        prefix: "target." or "reference.".
        shapes: What that part, among others, consists of.
        config: Says the dtype of the computation and the mask token.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A damaged file, or another model.
    """
    model, _ = load_export(folder, precision=config.precision, mask_id=config.mask_id)
    arrays = take_apart(model)[1]
    named = {prefix + name: array for name, array in arrays.items()}
    wanted = {name: shape.shape for name, shape in shapes.items() if name.startswith(prefix)}
    if wanted != {name: array.shape for name, array in named.items()}:
        raise ValueError(f"{folder} holds a model of another shape than the one that is trained")
    return named


def validation_hook(
    config: Config, skeleton: Skeleton, held_out: Rows | None
) -> Callable[[int, Arrays], None]:
    """Return a hook that writes a row of `validation.jsonl`.

    Args:
        config: The experiment.
        skeleton: Of the models.
        held_out: Texts whose loss is measured; None: answers to problems are checked.
    """

    @functools.cache
    def table() -> Table:
        return make_table(
            config.task,
            config.levels,
            config.test_problems,
            split="validation",
            workers=config.workers,
            block_length=config.row_block,
        )

    # What is fed back is that of training; the first step of a block is a plain one.
    training = config.training()
    decoder = make_decoder(
        config.sight, config.block_length, config.test_threshold, training.residual
    )

    def validate(step: int, arrays: Arrays) -> None:
        arrays = jax.device_put({name: arrays[name] for name in skeleton.names})
        if held_out is None:
            found = answer(skeleton.join(arrays).target, table(), decoder).summary()
        else:
            last_pass = dataclasses.replace(training, learn_every_pass=False)
            found = {"validation": mean_loss(skeleton, last_pass, arrays, held_out)}
        writer = JsonLines(config.output / "validation.jsonl", step - 1)
        writer.write({"step": step} | found)
        writer.close()

    return validate


def make_card(config: Config, result: Finished) -> dict[str, Any]:
    """Return the model card: what was trained on what, how, how long, and what it reached."""
    levels = ", ".join(map(str, config.levels))
    return {
        "name": result.folder.name if config.task == "text" else config.model,
        "task": "text-to-text",
        "data": "text" if config.task == "text" else f"generated {config.task}, levels {levels}",
    } | run_record(config, result)


def main() -> None:
    """Parse the command line and train; the exit code tells how it ended, see `run.as_command`."""
    config = parse(Config)
    as_command(lambda: train(config).stopped)


if __name__ == "__main__":
    main()
