"""Does INT8 attention change training? The same run twice, with exact and with INT8 attention.

Command    python -m train.configs.int8_against_exact --help
Outcome    see `RECORD` at the end of this file
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from train.text_to_image import train
from train.text_to_image_config import Config

CONFIG = Config(
    output=Path("runs/int8-against-exact"),
    model="openmoji-small",
    steps=2000,
    batch_size=256,
    warmup_steps=200,
    sample_every=0,
    save_every=1000,
    log_every=20,
)


def compare(config: Config, window: int = 200) -> dict[str, float]:
    """Train twice from the same seed and compare the mean losses of the last `window` steps."""
    losses = {}
    for attention in ("exact", "int8"):
        output = config.output / attention
        result = train(dataclasses.replace(config, attention=attention, output=output))
        rows = [row for row in result.rows if row["step"] > config.steps - window]
        losses[attention] = float(np.mean([row["loss"] for row in rows]))
    return losses | {"relative_difference": abs(losses["int8"] / losses["exact"] - 1)}


def main() -> None:
    """Take any option of `train.text_to_image` on top of `CONFIG`; print the losses as JSON."""
    import tyro

    config = tyro.cli(Config, default=CONFIG, prog="python -m train.configs.int8_against_exact")
    print(json.dumps(compare(config), indent=2))


if __name__ == "__main__":
    main()
