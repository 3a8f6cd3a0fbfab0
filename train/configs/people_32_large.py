"""A large model for machines without a GPU: people at 32 pixels.

Command    python -m train.configs.people_32_large
Hardware   two cores of an x86-64 server, which other jobs shared most of the time
Seeds      one
Outcome    final loss 0.0261 after 60 minutes; attribute accuracy 97.8 % on training
           combinations, 93.0 % on held-out ones (608 pictures each), judged by the result of
           python -m train.attribute_classifier --resolution 32 --subset people --steps 1200
           --batch-size 128
           (started as `python -m train.text_to_image` with these settings and another --output,
           before the command line's checks and the resume code were last changed)
"""

from pathlib import Path

from train.text_to_image import run_command
from train.text_to_image_config import Config

CONFIG = Config(
    output=Path("runs/people-32/large"),
    model="openmoji-32",
    subset="people",
    precision="float32",
    batch_size=64,
    steps=9000,
    warmup_steps=300,
    learning_rate=1e-3,
    sample_every=1000,
)

if __name__ == "__main__":
    run_command(CONFIG)
