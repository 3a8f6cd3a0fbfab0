"""Does INT8 attention change training? The same run twice, with exact and with INT8 attention.

Command    python -m train.configs.int8_against_exact --help
Outcome    on one H100 (80 GB, jax 0.11.2), as below: mean loss of the last 200 of 2,000 steps
           0.1839 exact, 0.1855 INT8, 0.87 % apart; one seed.
           At 32 pixels on two CPU cores, with the options --model openmoji-32-small --subset people
           --precision float32 --batch-size 64 --learning-rate 1e-3: 0.2624 exact, 0.2638 INT8,
           0.55 % apart; one seed. Other jobs ran beside both: no measure of speed.
           Both with one scale for a tile of P and dS in the backward pass, and the reference
           implementation; it has finer scales since.
"""

import dataclasses
import json
from pathlib import Path

from train.metrics import final_loss
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


def compare(config: Config) -> dict[str, float]:
    """Train twice from the same seed and compare the mean losses of the last 200 steps.

    Raises:
        RuntimeError: A run did not reach its last step, so there is nothing to compare.
    """
    losses = {}
    for attention in ("exact", "int8"):
        output = config.output / attention
        result = train(dataclasses.replace(config, attention=attention, output=output))
        loss = final_loss(result.rows)
        if result.stopped != "finished" or loss is None:
            raise RuntimeError(
                f"the {attention} run stopped at step {result.step} ({result.stopped}); "
                "run the same command again to go on"
            )
        losses[attention] = loss
    return losses | {"relative_difference": abs(losses["int8"] / losses["exact"] - 1)}


def main() -> None:
    """Take any option of `train.text_to_image` on top of `CONFIG`; print the losses as JSON."""
    import tyro

    config = tyro.cli(Config, default=CONFIG, prog="python -m train.configs.int8_against_exact")
    print(json.dumps(compare(config), indent=2))


if __name__ == "__main__":
    main()
