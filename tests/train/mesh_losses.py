"""Run by `test_meshes.py` with 8 fake devices: losses of a few steps on several meshes, as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from train import language_model_config, language_model_parts
from train.language_model import train
from train.language_model_config import Config

MESHES = {
    "one": {"devices": 1},
    "data x fsdp x tensor": {"fsdp": 2, "tensor": 2},
    "data x tensor x context": {"tensor": 2, "context_parallel": 2},
    "fsdp x context": {"fsdp": 2, "context_parallel": 4},
}
ROWS, CONTEXT = 8, 32


def main(folder: Path) -> None:
    """Train on every mesh with both kinds of attention; the text is in `folder`/text."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    tiny = language_model_config.MODELS["tiny"]
    heads = dataclasses.replace(tiny, num_heads=8, num_kv_heads=4, head_dim=8)
    models = dict(language_model_config.MODELS) | {"heads": heads}
    language_model_config.MODELS = language_model_parts.MODELS = models
    losses = {}
    for attention in ("exact", "int8"):
        for name, mesh in MESHES.items():
            config = Config(
                output=folder / f"{attention} {name}", data=folder / "text", model="heads",
                attention=attention, precision="float32", context=CONTEXT, batch_size=ROWS,
                steps=3, warmup_steps=1, learning_rate=3e-3, held_out=0.2, log_every=1,
                validate_every=0, chunk=64, **mesh,
            )  # fmt: skip
            rows = train(config, show_progress=False).rows
            losses[f"{attention} {name}"] = [row["loss"] for row in rows]
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
