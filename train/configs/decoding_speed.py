"""What does RCD cost at each step, and how fast is decoding? LLaDA-8B and SDAR-8B, random weights.

A step takes as long with any weights, and one token is settled at each, so that every method makes
equally many steps. Everything counts from prompts to answers. The plain PyTorch loop to compare
with is `train.configs.decoding_speed_torch`, a process of its own.

Command    python -m train.configs.decoding_speed --output runs/decoding-speed.json
           python -m train.configs.decoding_speed_torch --output runs/decoding-speed-torch.json
Hardware   one H100 80 GB, jax 0.11.2; 128 tokens after a prompt of 512, blocks of 64, medians
Outcome    SDAR-8B, ms a step: batch 1 8.65, with RCD 9.22 (+6.7 %), with its 8-bit table the same;
           batch 8 19.59, 20.84 (+6.4 %), 21.26 (+8.5 %). LLaDA-8B without a cache: batch 1 18.98,
           with RCD 19.29 (+1.6 %); batch 8 118.9, 120.3 (+1.2 %; another H100); with two caches
           7.96, 8.19 (+2.8 %) and 20.30, 21.26 (+4.7 %). Programs came from a compilation cache.
           Every record is in results/decoding_speed.json.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.checkpoints import write_json
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLM, DiffusionLMConfig
from jaxgen.sampling import BlockDiffusion, ResidualContext, Unmasking, decode
from train.configs.random_weights import with_random_weights

type Record = dict[str, Any]

METHODS = ("block", "none", "prefix", "dual")
"""SDAR's blocks; LLaDA without a cache and with the two of Fast-dLLM."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time decoding with and without Residual Context Diffusion, one token a step."""

    sdar: str = "sdar-8b"
    """Preset that decodes block by block."""
    llada: str = "llada-8b"
    """Preset that sees everything."""
    methods: tuple[str, ...] = METHODS
    """What to time: block (the first model), none, prefix, dual (caches of the second one)."""
    batches: tuple[int, ...] = (1, 8)
    """Rows decoded at once."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    new_tokens: int = 128
    """Tokens of an answer, and steps."""
    block_length: int = 64
    """Tokens of a block."""
    runs: int = 3
    """Timed answers, of which the median counts."""
    layers: int | None = None
    """Blocks of the models, for a quick try; None: all."""
    output: Path | None = None
    """Write the records there, as JSON, after each."""

    def __post_init__(self):
        for name in (self.sdar, self.llada):
            if name not in DIFFUSION_LM_PRESETS:
                allowed = ", ".join(DIFFUSION_LM_PRESETS)
                raise ValueError(f"models must be among {allowed}, got {name!r}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {unknown}")
        sizes = {name: getattr(self, name) for name in ("prompt_tokens", "new_tokens")}
        sizes |= {"block_length": self.block_length, "runs": self.runs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

    def config(self, name: str) -> DiffusionLMConfig:
        """Return a model's configuration."""
        config = DIFFUSION_LM_PRESETS[name]
        layers = config.num_layers if self.layers is None else self.layers
        narrow: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return dataclasses.replace(config, num_layers=layers, **narrow)

    def decoder(self, method: str, residual: ResidualContext | None) -> BlockDiffusion:
        """Return how answers are decoded."""
        sight = "block_causal" if method == "block" else "bidirectional"
        return BlockDiffusion(
            block_length=self.block_length,
            sight=sight,
            cache="none" if method == "block" else method,  # pyright: ignore[reportArgumentType]
            unmasking=Unmasking(),
            residual=residual,
        )


def measure(speed: Speed) -> list[Record]:
    """Return a record for each method and batch: plain, RCD, and RCD with a narrow table."""
    records: list[Record] = []
    model, loaded = None, ""
    for method in speed.methods:
        name = speed.sdar if method == "block" else speed.llada
        if name != loaded:
            model = None  # before the next one is made
            model = with_random_weights(functools.partial(DiffusionLM, speed.config(name)))
            loaded = name
        assert model is not None
        for batch in speed.batches:
            plain = None
            for residual in (None, ResidualContext(), ResidualContext(table="int8")):
                record = timed(speed, model, method, batch, residual)
                plain = record["ms_a_step"] if plain is None else plain
                record["over_plain"] = round(record["ms_a_step"] / plain - 1, 4)
                records.append({"model": name} | record)
                print(records[-1], file=sys.stderr, flush=True)
                if speed.output is not None:
                    write_json(speed.output, records)
    return records


def timed(
    speed: Speed,
    model: DiffusionLM,
    method: str,
    batch: int,
    residual: ResidualContext | None,
) -> Record:
    """Return the time of a step, of which every answer has `new_tokens`."""
    shape = (batch, speed.prompt_tokens)
    prompts = jax.random.randint(jax.random.key(1), shape, 0, model.config.mask_id)
    run = functools.partial(
        decode, model, prompts, speed.decoder(method, residual), new_tokens=speed.new_tokens
    )
    started = time.perf_counter()
    decoded = jax.block_until_ready(run())
    first = time.perf_counter() - started
    seconds = []
    for seed in range(speed.runs):
        started = time.perf_counter()
        jax.block_until_ready(run(seeds=seed))
        seconds.append(time.perf_counter() - started)
    median, steps = statistics.median(seconds), int(decoded.steps[0])
    return {
        "method": method,
        "batch": batch,
        "rcd": residual is not None,
        "table": None if residual is None else residual.table,
        "prompt_tokens": speed.prompt_tokens,
        "new_tokens": speed.new_tokens,
        "block_length": speed.block_length,
        "steps": steps,
        "passes": int(decoded.passes),
        "ms_a_step": round(1000 * median / steps, 3),
        "tokens_per_second": round(batch * speed.new_tokens / median, 1),
        "first_call_seconds": round(first, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table."""
    lines = [
        "| model | cache | rows | RCD, table | a step | over plain | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        cells = [
            record["model"],
            record["method"],
            str(record["batch"]),
            record["table"] or "no",
            f"{record['ms_a_step']:.2f} ms",
            f"{record['over_plain']:+.1%}" if record["rcd"] else "",
            f"{record['tokens_per_second']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take the options, measure, print the table."""
    import tyro

    speed = tyro.cli(Speed, prog="python -m train.configs.decoding_speed")
    print(table(measure(speed)))


if __name__ == "__main__":
    main()
