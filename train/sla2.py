"""Replace self-attention by SLA2 and fine-tune, in two stages: `python -m train.sla2 --help`.

SLA2 (arXiv 2602.12675), section 5 and Algorithm 1. What the paper leaves open is decided by the
options' defaults; the other methods are its baselines and what it has no ablation of.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.checkpoints import write_json
from jaxgen.text import WordTokenizer
from train import loop, run_folder
from train.clips import Batch, ClipBatches, Clips, render
from train.metrics import Row, final_loss
from train.run import Finished, Plan, as_command, carry_out, mesh_of, parse, printer
from train.sla2_config import METHODS, Config
from train.sla2_parts import (
    Replaced,
    attention_errors,
    calibrated,
    make_distillation_loss,
    make_router_loss,
    make_router_optimizer,
    replace_attention,
    with_teacher,
)
from train.state import Arrays, make_optimizer, take_apart
from train.text_to_video_config import Config as VideoConfig
from train.text_to_video_parts import (
    Validation,
    choose_captions,
    clips_of,
    draw_clips,
    load_export,
    make_loss,
    open_clips,
    save_export,
    save_samples,
)

type Report = dict[str, Any]


def train(
    config: Config,
    *,
    clips: Mapping[str, Clips] | None = None,
    on_row: Callable[[Row], None] | None = None,
    show_progress: bool = True,
) -> Report | loop.StopReason:
    """Do what is left of both stages, validate, export and report.

    Args:
        config: The experiment.
        clips: The splits train, validation and held_out; those of the pretrained run by default.
        on_row: Called with each row of metrics of both stages.
        show_progress: Say what happens and show progress bars, on stderr.

    Returns:
        What `report.json` holds; or why training stopped before its end: "time limit", "SIGINT" or
        "SIGTERM".

    Raises:
        ValueError: The batch does not fit the devices, or the folder holds another experiment.
        FileNotFoundError: There is no pretrained model.
        FloatingPointError: `config.skips_in_a_row` updates in a row were not finite.
    """
    started, say = time.monotonic(), printer(show_progress)
    mesh_of(config)
    report_path = config.output / "report.json"
    teacher, tokenizer, card = load_export(config.pretrained, precision=config.precision)
    of_clips = clips_of(card)
    shape = of_clips["frames"], of_clips["size"], of_clips["size"]
    if clips is None:
        clips = open_clips(VideoConfig(**of_clips))
    replaced = replace_attention(config, teacher, shape)
    validation = Validation(
        {split: clips[split] for split in ("validation", "held_out")},
        tokenizer,
        count=config.validation_clips,
        levels=config.validation_levels,
        distribution=config.noise_levels(),
    )
    options = {"on_row": on_row, "show_progress": show_progress}
    left = lambda: (
        None
        if config.time_limit is None
        else max(0.0, config.time_limit - (time.monotonic() - started))
    )

    first, arrays, errors = None, replaced.arrays, {}
    if replaced.mixing or replaced.projections:
        fit = first_clips(clips["train"], tokenizer, config.calibration_clips)
        check = first_clips(clips["validation"], tokenizer, config.router_batch_size)
        measure = lambda arrays: attention_errors(config, replaced, arrays, check)
        errors = {"new": measure(arrays)}
        if METHODS[config.method].trains_mixing:
            arrays = calibrated(config, replaced, arrays, fit)
            errors["least_squares"] = measure(arrays)
        first = _stage1(config, replaced, arrays, clips, tokenizer, left(), options)
        if first is not None:
            if first.stopped != "finished":
                return first.stopped
            arrays = first.arrays
            errors["stage1"] = measure(arrays)
            if METHODS[config.method].trains_mixing and config.recalibrate:
                arrays = calibrated(config, replaced, arrays, fit)
                errors["recalibrated"] = measure(arrays)
            say(f"relative error of attention: {_means(errors)}")
    at_start = validation(replaced.evaluation, arrays)
    say(f"before fine-tuning: {at_start}")

    second = _stage2(config, replaced, arrays, teacher, clips, tokenizer, left(), options)
    if second.stopped != "finished":
        return second.stopped
    arrays = {name: second.arrays[name] for name in replaced.evaluation.names}
    report = {
        "method": config.method,
        "kept_fraction": config.kept_fraction,
        "seed": config.seed,
        "config": run_folder.to_json(config) | of_clips,
        "pretrained": {name: card[name] for name in ("name", "steps", "validation")},
        "attention_error": _means(errors),
        "attention_error_by_block": errors,
        "at_start": at_start,
        "finished": validation(replaced.evaluation, arrays),
        "stage1": _summary(first),
        "stage2": _summary(second),
        "hardware": f"{second.devices} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    models = replaced.evaluation.join(jax.device_put(arrays))
    new_card = _card(config, card) | report
    save_export(config.output / "export", models, tokenizer, new_card, config.export_dtype)
    if config.samples:
        captions = choose_captions(clips)
        videos = draw_clips(config, models, tokenizer, captions, shape)
        save_samples(videos, captions, config.output / "samples")
    write_json(report_path, report)
    say(f"after fine-tuning: {report['finished']}; wrote {report_path}")
    return report


def _card(config: Config, pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the card of the pretrained model says of the new one, too."""
    kept = {
        name: pretrained[name] for name in ("task", "data", "attribution") if name in pretrained
    }
    name = f"{pretrained['name']}-{config.method}"
    return {"name": name} | kept | {"command": config.command()}


def _stage1(
    config: Config,
    replaced: Replaced,
    arrays: Arrays,
    clips: Mapping[str, Clips],
    tokenizer: WordTokenizer,
    time_limit: float | None,
    options: Mapping[str, Any],
) -> Finished | None:
    """Fit what the method fits to full attention; None if that is nothing."""
    method = METHODS[config.method]
    trained = frozenset().union(
        replaced.routers if method.trains_routers else (),
        replaced.projections if method.trains_projections else (),
        replaced.mixing if method.trains_mixing else (),
    )
    if not trained or not config.router_steps:
        return None
    stage = dataclasses.replace(
        config,
        output=config.output / "stage1",
        steps=config.router_steps,
        batch_size=config.router_batch_size,
        learning_rate=config.router_learning_rate,
        warmup_steps=0,
        schedule="constant",
        decay_steps=max(1, config.router_steps // 5),
        time_limit=time_limit,
    )
    plan = Plan(
        title=f"{config.method}, stage 1",
        skeleton=replaced.stage1,
        shapes=_shapes(arrays),
        make=lambda: arrays,
        trained=trained,
        loss=make_router_loss(replaced.stage1, config.noise_levels()),
        optimizer=lambda rate: make_router_optimizer(
            config, replaced.routers - replaced.bases, rate
        ),
    )
    with _stream(stage, clips, tokenizer) as stream:
        return carry_out(stage, plan, stream, **options)


def _stage2(
    config: Config,
    replaced: Replaced,
    arrays: Arrays,
    teacher: Any,
    clips: Mapping[str, Clips],
    tokenizer: WordTokenizer,
    time_limit: float | None,
    options: Mapping[str, Any],
) -> Finished:
    """Fine-tune all weights but the routers, and the mixing logits unless they are fixed."""
    stage = dataclasses.replace(config, output=config.output / "stage2", time_limit=time_limit)
    mixing = frozenset(replaced.mixing)
    fixed = replaced.routers | (frozenset() if METHODS[config.method].trains_mixing else mixing)
    loss = make_loss(replaced.stage2, config.noise_levels())
    if config.objective == "distillation":
        skeleton, weights = take_apart(teacher)
        arrays = with_teacher(arrays, weights)
        loss = make_distillation_loss(replaced.stage2, skeleton, config.noise_levels())
    plan = Plan(
        title=f"{config.method}, stage 2",
        skeleton=replaced.stage2,
        shapes=_shapes(arrays),
        make=lambda: arrays,
        trained=replaced.stage2.trained - fixed,
        loss=loss,
        optimizer=lambda rate: make_optimizer(
            rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
            undecayed=mixing,
        ),
    )
    with _stream(stage, clips, tokenizer) as stream:
        return carry_out(stage, plan, stream, **options)


def _stream(config: Config, clips: Mapping[str, Clips], tokenizer: WordTokenizer) -> ClipBatches:
    return ClipBatches(
        clips["train"],
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        workers=config.workers,
    )


def first_clips(clips: Clips, tokenizer: WordTokenizer, count: int) -> Batch:
    """Return the first so many clips and the ids of their captions."""
    videos, captions = render(clips, range(min(count, len(clips))))
    return {"video": videos, "tokens": tokenizer.encode(captions)}


def _shapes(arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def _means(errors: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in errors.items()}


def _summary(stage: Finished | None) -> Report | None:
    """Return what is worth keeping of a stage."""
    if stage is None:
        return None
    speeds = [row["examples_per_second"] for row in stage.rows if row["examples_per_second"]]
    return {
        "steps": stage.step,
        "seconds": round(stage.seconds, 1),
        "final_loss": final_loss(stage.rows),
        "first_loss": stage.rows[0]["loss"] if stage.rows else None,
        "clips_per_second": float(np.median(speeds)) if speeds else None,
        "skipped": stage.rows[-1]["skipped"] if stage.rows else 0,
    }


def main() -> None:
    """Parse the command line and train; print the report's losses as JSON.

    The exit code tells how it ended, see `run.as_command`.
    """
    config = parse(Config)

    def run() -> loop.StopReason:
        result = train(config)
        if isinstance(result, str):
            return result
        shown = ("method", "kept_fraction", "seed", "attention_error", "at_start", "finished")
        print(json.dumps({name: result[name] for name in shown}, indent=2))
        return "finished"

    as_command(run)


if __name__ == "__main__":
    main()
