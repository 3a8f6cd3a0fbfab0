"""How much faster is a denoising step with sparse attention? Wan2.1 1.3B, 81 frames of 480 x 832.

Weights are random: a step takes as long with any. Everything counts, from patches to velocity;
the text encoder and the VAE do not, since they run once a video.

Command    python -m train.configs.wan_speed --output runs/wan-speed.json
Hardware   one H100 80 GB, jax 0.11.2
Outcome    523 ms with full attention (cuDNN); 206 with 3 % of the blocks, 213 with 5, 234 with 10:
           2.54, 2.45 and 2.24 times as fast.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.checkpoints import write_json
from jaxgen.layers import SparseLinearAttention, exact_attention
from jaxgen.models import WAN_PRESETS, Wan, WanConfig
from kernels_pallas.bench import milliseconds
from train.configs.random_weights import with_random_weights

_TEXT_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time a denoising step of Wan with full and with sparse-linear attention.

    A step is one forward pass; guidance needs two.
    """

    model: str = "wan2.1-t2v-1.3b"
    """Preset."""
    frames: int = 21
    """Latent frames; 21 are 81 frames."""
    height: int = 60
    """Latent rows, 8 pixels each."""
    width: int = 104
    """Latent columns, 8 pixels each."""
    kept_fractions: tuple[float, ...] = (0.03, 0.05, 0.1)
    """Shares of the blocks of keys that get softmax attention."""
    runs: int = 3
    """Steps in a timed program."""
    layers: int | None = None
    """Blocks of the model, for a quick try; None: all."""
    output: Path | None = None
    """Write the records there, as JSON."""

    def __post_init__(self):
        if self.model not in WAN_PRESETS:
            raise ValueError(f"model must be one of {', '.join(WAN_PRESETS)}, got {self.model!r}")
        if not self.kept_fractions or not all(0 < kept < 1 for kept in self.kept_fractions):
            raise ValueError(f"kept_fractions must be between 0 and 1, got {self.kept_fractions}")
        if self.runs < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}")

    def config(self) -> WanConfig:
        """Return the model's configuration."""
        config = WAN_PRESETS[self.model]
        layers = config.num_layers if self.layers is None else self.layers
        narrow: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return dataclasses.replace(config, num_layers=layers, scan=True, **narrow)


def measure(speed: Speed) -> list[dict[str, Any]]:
    """Return a record for full attention and for each share of blocks."""
    config = speed.config()
    grid = (speed.frames, speed.height, speed.width)
    tokens = speed.frames * speed.height * speed.width // config.patch_pixels
    keys = jax.random.split(jax.random.key(0), 2)
    latents = jax.random.normal(keys[0], (1, *grid, config.in_channels), jnp.bfloat16)
    context = jax.random.normal(keys[1], (1, _TEXT_TOKENS, config.text_dim), jnp.bfloat16)
    records, full = [], None
    for kept in (1.0, *speed.kept_fractions):
        # Parameters of self-attention differ, so each model is made anew.
        make = lambda number, kept=kept: (
            exact_attention
            if kept == 1
            else SparseLinearAttention(
                config.num_heads, config.head_dim, tokens, kept_fraction=kept
            )
        )
        model = with_random_weights(functools.partial(Wan, config, attend=make))
        graph, state = nnx.split(model)
        leaves, structure = jax.tree.flatten(state)

        def step(latents, context, *leaves, graph=graph, structure=structure):
            model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
            return model(latents, jnp.full((1,), 500.0), context)

        ms = milliseconds(step, latents, context, *leaves, runs=speed.runs)
        full = ms if full is None else full
        records.append(
            {
                "model": speed.model,
                "layers": config.num_layers,
                "tokens": tokens,
                "kept_fraction": kept,
                "ms": round(ms, 2),
                "ratio": round(full / ms, 3),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
        )
        print(records[-1], file=sys.stderr, flush=True)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| attention | step | against full |", "| --- | --- | --- |"]
    for record in records:
        kept = record["kept_fraction"]
        name = "full" if kept == 1 else f"SLA2, {1 - kept:.0%} sparse"
        lines.append(f"| {name} | {record['ms']:.0f} ms | {record['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take the options, measure, print the table."""
    import tyro

    speed = tyro.cli(Speed, prog="python -m train.configs.wan_speed")
    records = measure(speed)
    if speed.output is not None:
        write_json(speed.output, records)
    print(table(records))


if __name__ == "__main__":
    main()
