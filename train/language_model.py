"""Pretrain a language model: `python -m train.language_model --help`.

A run lives in one folder: `config.json`, `metrics.jsonl`, `validation.jsonl`, `checkpoints/` and,
at the end, `export/`. Running the same command again resumes from the newest checkpoint, exactly;
SIGINT and SIGTERM save one first.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxgen.checkpoints import decoder_sharding
from jaxgen.models import LanguageModel
from train import distributed
from train.attention_statistics import warning_of, write_statistics
from train.corpus import Batches, Documents
from train.language_model_config import Config
from train.language_model_parts import (
    make_loss,
    make_tokenizer,
    model_config,
    open_documents,
    save_export,
    statistics_batch,
    validate,
)
from train.metrics import JsonLines, Row, writing
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
from train.sharding import rows_shared
from train.state import Arrays, make_optimizer, take_apart


def train(
    config: Config,
    *,
    documents: Documents | None = None,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Finished:
    """Train, resuming if the folder holds a run, and export unless a signal arrived.

    Args:
        config: The experiment.
        documents: The text as tokens of the configured tokenizer; what the options say by default.
        on_row: Called with each row of metrics as it is written.
        show_progress: Say what happens and show a progress bar, on stderr.

    Raises:
        ValueError: The batch does not fit the devices, the text is no text, or the folder holds a
            run with another configuration or of another text.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite or spiking.
        OutputError: The folder cannot be written.
    """
    started = time.monotonic()
    mesh = mesh_of(config)  # refuses before anything is made
    with writing(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
    if config.batch_size % (rows_shared(mesh) * config.accumulate):
        raise ValueError(
            "batch_size must be a multiple of the devices that share its rows times accumulate, "
            f"got batch_size={config.batch_size}, {rows_shared(mesh)} devices and "
            f"accumulate={config.accumulate}"
        )
    if config.context % config.context_parallel:
        raise ValueError(
            "context must be a multiple of context_parallel, got "
            f"context={config.context} and context_parallel={config.context_parallel}"
        )
    say, tokenizer = printer(show_progress), make_tokenizer(config)
    documents = open_documents(config, tokenizer) if documents is None else documents
    learned = documents.part("train", config.held_out)
    require_enough(config, documents, learned)
    say(f"{learned.token_count:,} tokens of {len(learned):,} documents to learn from")
    shape = model_config(config, tokenizer.size)
    build = lambda: LanguageModel(shape, rngs=nnx.Rngs(config.seed))
    skeleton, shapes = take_apart(nnx.eval_shape(build))
    operations = 3 * shape.operations(config.context)
    plan = Plan(
        title=f"{config.model}, {config.attention} attention",
        skeleton=skeleton,
        shapes=shapes,
        make=lambda: take_apart(build())[1],
        trained=skeleton.trained,
        loss=make_loss(skeleton, across_documents=config.across_documents, chunk=config.chunk),
        optimizer=functools.partial(
            make_optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        ),
        accumulate=config.accumulate,
        per_example={
            "tokens_per_second": config.context,
            "mfu": operations / (config.peak_teraflops * 1e12 * mesh.size),
        },
        place=decoder_sharding,
        traceable=True,
    )
    stream = Batches(
        learned,
        context=config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        split=not config.whole_documents,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )

    def check(step: int, arrays: Arrays) -> None:
        held_out = documents.part("validation", config.held_out)
        arrays = jax.device_put({name: arrays[name] for name in skeleton.names})
        writer = JsonLines(config.output / "validation.jsonl", step - 1)
        writer.write({"step": step} | validate(skeleton, config, arrays, held_out))
        writer.close()

    def measure(step: int, arrays: Arrays) -> None:
        model = skeleton.join(jax.device_put({name: arrays[name] for name in skeleton.names}))
        batch = statistics_batch(config, documents.part("validation", config.held_out))
        rows = write_statistics(
            config.output / "attention.jsonl",
            step,
            model,
            batch,
            across_documents=config.across_documents,
            chunk=config.chunk,
        )
        if config.attention == "int8" and (warning := warning_of(rows)):
            say(warning)

    result = carry_out(
        config,
        plan,
        stream,
        hooks=[Hook(config.validate_every, check), Hook(config.statistics_every, measure)],
        started=started,
        on_row=on_row,
        show_progress=show_progress,
    )
    export = result.folder / "export"
    if distributed.first() and needs_export(config, result):
        model = skeleton.join(jax.device_put(result.arrays))
        save_export(export, model, make_card(config, result, learned), config.export_dtype)
        say(f"exported {export}")
    return result


def require_enough(config: Config, documents: Documents, learned: Documents) -> None:
    """Refuse text that does not suffice, now rather than with the first validation.

    Args:
        config: The experiment.
        documents: All of them.
        learned: Those to learn from.

    Raises:
        ValueError: None is held out though some are needed, or a row has more tokens than all that
            are learned from.
    """
    if config.context > learned.token_count:
        raise ValueError(
            "context must not exceed the tokens to learn from, got "
            f"context={config.context} and {learned.token_count} tokens"
        )
    if config.validate_every or config.statistics_every:
        try:
            documents.part("validation", config.held_out)
        except ValueError as error:
            raise ValueError(
                f"{error}: give more documents or a larger --held-out, or do without by "
                "--validate-every 0 --statistics-every 0"
            ) from error


def make_card(config: Config, result: Finished, documents: Documents) -> dict[str, Any]:
    """Return the model card: what was trained on what, how, how long, and the losses it reached."""
    return {
        "name": config.model,
        "task": "language-model",
        "data": "Python source" if config.data is None else config.data.name,
        "corpus": documents.digest,
        "tokens": documents.token_count,
        "tokens_seen": result.step * config.batch_size * config.context,
    } | run_record(config, result)


def main() -> None:
    """Parse the command line and train; the exit code tells how it ended, see `run.as_command`."""
    config = parse(Config)
    distributed.start(config)
    as_command(lambda: train(config).stopped)


if __name__ == "__main__":
    main()
