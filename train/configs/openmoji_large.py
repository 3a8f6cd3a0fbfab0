"""The 64-pixel model `openmoji-large`, for one GPU.

Command    python -m train.configs.openmoji_large
Hardware   one H100 is what the settings are meant for
Outcome    not run yet
"""

from pathlib import Path

from train.text_to_image import run_command
from train.text_to_image_config import Config

CONFIG = Config(
    output=Path("runs/openmoji-large"),
    model="openmoji-large",
    attention="int8",
    steps=30_000,
    batch_size=256,
    learning_rate=5e-4,
    save_every=5000,
    sample_every=5000,
)

if __name__ == "__main__":
    run_command(CONFIG)
