"""The 64-pixel model `openmoji-small`, with the frozen text encoder of `openmoji-large`.

Command    python -m train.configs.openmoji_small, after openmoji_large
Hardware   one H100 is what the settings are meant for
Outcome    not run yet
"""

from pathlib import Path

from train.text_to_image import run_command
from train.text_to_image_config import Config

CONFIG = Config(
    output=Path("runs/openmoji-small"),
    model="openmoji-small",
    text_encoder_from=Path("runs/openmoji-large/export"),
    attention="int8",
    steps=20_000,
    batch_size=256,
    learning_rate=1e-3,
    save_every=5000,
    sample_every=5000,
)

if __name__ == "__main__":
    run_command(CONFIG)
