"""How large should the blocks of SLA2 be? Error of attention and loss before any fine-tuning.

A block of keys is taken or left as a whole, so it must be small beside the video, and hold tokens
that are looked at together. This tries sizes of blocks and orders of tokens on a pretrained model:
routers are new, mixing ratios their least squares, nothing is trained.

Command    python -m train.configs.sla2_blocks --output runs/sla2-blocks.json
               --each.pretrained runs/moving-emoji/export
Hardware   not measured yet
Outcome    not measured yet
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoints import write_json
from train.sla2 import first_clips
from train.sla2_config import Config
from train.sla2_parts import attention_errors, calibrated, replace_attention
from train.text_to_video_config import Config as VideoConfig
from train.text_to_video_parts import Validation, clips_of, load_export, open_clips

type Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Compare sizes of blocks and orders of tokens on a pretrained video model.

    A setting is `block_q x block_k` and the cube whose tokens follow each other, for instance
    "32x16:4,2,2": 32 queries, 16 keys, cubes of 4 frames, 2 rows and 2 columns of patches.
    """

    each: Config
    """Options of all: pretrained, precision, noise levels, clips. Method, blocks, cube and kept
    fraction are replaced."""
    settings: tuple[str, ...] = (
        "128x64:1,1,1",
        "128x64:4,4,4",
        "64x32:4,4,4",
        "32x16:4,2,2",
        "16x8:2,2,2",
    )
    """What to compare."""
    kept_fractions: tuple[float, ...] = (0.03, 0.05)
    """Shares of the blocks of keys that get softmax attention."""
    output: Path | None = None
    """Write the records there, as JSON."""

    def __post_init__(self):
        for setting in self.settings:
            self.parsed(setting)

    @staticmethod
    def parsed(setting: str) -> dict[str, Any]:
        """Return block_q, block_k and token_cube of a setting.

        Raises:
            ValueError: It is not written like "32x16:4,2,2".
        """
        try:
            sizes, _, cube = setting.partition(":")
            block_q, block_k = map(int, sizes.split("x"))
            frames, rows, columns = map(int, cube.split(","))
        except ValueError:
            raise ValueError(
                f'settings must be written like "32x16:4,2,2", got {setting!r}'
            ) from None
        return {"block_q": block_q, "block_k": block_k, "token_cube": (frames, rows, columns)}

    def configs(self) -> list[Config]:
        """Return the experiments: full attention, then every setting with every share."""
        full = dataclasses.replace(self.each, method="full", kept_fraction=1.0)
        return [full] + [
            dataclasses.replace(
                self.each, method="sla2", kept_fraction=kept, **self.parsed(setting)
            )
            for setting in self.settings
            for kept in self.kept_fractions
        ]


def measure(blocks: Blocks, *, clips: Any = None) -> list[Record]:
    """Return a record for full attention and for each setting and share.

    Args:
        blocks: What to compare.
        clips: The splits train and validation; those of the pretrained run by default.
    """
    each = blocks.each
    teacher, tokenizer, card = load_export(each.pretrained, precision=each.precision)
    of_clips = clips_of(card)
    shape = of_clips["frames"], of_clips["size"], of_clips["size"]
    if clips is None:
        clips = open_clips(VideoConfig(**of_clips))
    validation = Validation(
        {"loss": clips["validation"]},
        tokenizer,
        count=each.validation_clips,
        levels=each.validation_levels,
        distribution=each.noise_levels(),
    )
    fit = first_clips(clips["train"], tokenizer, each.calibration_clips)
    check = first_clips(clips["validation"], tokenizer, each.router_batch_size)
    records = []
    for config in blocks.configs():
        replaced = replace_attention(config, teacher, shape)
        arrays, errors = replaced.arrays, [0.0]
        if config.method != "full":
            arrays = calibrated(config, replaced, arrays, fit)
            errors = attention_errors(config, replaced, arrays, check)
        records.append(
            {
                "block_q": config.block_q,
                "block_k": config.block_k,
                "token_cube": config.token_cube,
                "kept_fraction": config.kept_fraction,
                "error": float(np.mean(errors)),
                **validation(replaced.evaluation, arrays),
            }
        )
        print(records[-1], file=sys.stderr, flush=True)
    return records


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table; the first record is full attention."""
    full, *sparse = records
    lines = [
        "| queries x keys | cube | kept | error of attention | loss | over full |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| full attention |  |  |  | {full['loss']:.4f} |  |",
    ]
    for record in sparse:
        cube = " x ".join(map(str, record["token_cube"]))
        lines.append(
            f"| {record['block_q']} x {record['block_k']} | {cube} | {record['kept_fraction']:.0%} "
            f"| {record['error']:.3f} | {record['loss']:.4f} "
            f"| {100 * (record['loss'] / full['loss'] - 1):+.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take the options, measure, print the table."""
    import tyro

    blocks = tyro.cli(Blocks, prog="python -m train.configs.sla2_blocks")
    records = measure(blocks)
    if blocks.output is not None:
        write_json(blocks.output, records)
    print(table(records))


if __name__ == "__main__":
    main()
