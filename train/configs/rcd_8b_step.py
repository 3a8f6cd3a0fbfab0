"""One training step of RCD at the size of SDAR-8B: does it fit, and how long does it take?

Weights are random; a step takes as long with any. SDAR-1.7B is the frozen reference, as in the
paper. Parameters and gradients are bfloat16, blocks are recomputed in the backward pass, logits are
made some positions at a time, and Adafactor (arXiv:1804.04235) keeps rows and columns of second
moments only. What training with averages, checkpoints and float32 masters takes is not this.

Command    python -m train.configs.rcd_8b_step --output runs/rcd-8b-step.json
Hardware   one H100 80 GB, jax 0.11.2
Outcome    0.58 s a step (3,540 tokens a second), at most 27.7 GiB in use; results/rcd_8b_step.json.
           The program came from a compilation cache there; compiling it takes about two minutes.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh

from jaxgen.checkpoints import decoder_sharding, write_json
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLM, DiffusionLMConfig
from jaxgen.sampling import MaskedDiffusion, ResidualContext, diffusion_lm_loss
from train.configs.random_weights import with_random_weights


@dataclasses.dataclass(frozen=True)
class Step:
    """Take training steps of RCD and record memory and time."""

    model: str = "sdar-8b"
    """Preset that is trained."""
    reference: str = "sdar-1.7b"
    """Preset whose predictions are fed back."""
    tokens: int = 2048
    """Tokens of a sequence; the model sees a noisy and a clean copy."""
    batch: int = 1
    """Sequences of a step."""
    block_length: int = 64
    """Tokens of a block."""
    chunk: int = 512
    """Positions whose logits are made at a time."""
    learning_rate: float = 1e-5
    """Learning rate."""
    steps: int = 3
    """Timed steps, after one that compiles."""
    fsdp: int = 1
    """Devices over which parameters and the batch are split."""
    layers: int | None = None
    """Blocks of both models, for a quick try; None: all."""
    output: Path | None = None
    """Write the record there, as JSON."""

    def __post_init__(self):
        for name in (self.model, self.reference):
            if name not in DIFFUSION_LM_PRESETS:
                allowed = ", ".join(DIFFUSION_LM_PRESETS)
                raise ValueError(f"models must be among {allowed}, got {name!r}")
        for name in ("tokens", "batch", "block_length", "chunk", "steps", "fsdp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.fsdp:
            raise ValueError(
                f"batch must be a multiple of fsdp, got batch={self.batch} and fsdp={self.fsdp}"
            )

    def config(self, name: str) -> DiffusionLMConfig:
        """Return a model's configuration."""
        config = DIFFUSION_LM_PRESETS[name]
        layers = config.num_layers if self.layers is None else self.layers
        narrow: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return dataclasses.replace(config, num_layers=layers, remat=True, **narrow)

    def training(self) -> MaskedDiffusion:
        """Return the objective."""
        return MaskedDiffusion(
            block_length=self.block_length, residual=ResidualContext(), chunk=self.chunk
        )


def make_optimizer(step: Step) -> optax.GradientTransformation:
    """Return Adafactor without momentum; second moments of matrices are rows and columns."""
    return optax.adafactor(step.learning_rate, multiply_by_parameter_scale=False)


def make_step(step: Step, graph: Any, reference_graph: Any, shardings: Any) -> Any:
    """Return the compiled step: parameters, optimizer and reference in, the first two out.

    Shardings are those of the first two. Left to the compiler, the results of the first step would
    have others than its arguments, and the second one would be compiled anew.
    """
    optimizer, training = make_optimizer(step), step.training()

    def update(params, state, reference, tokens, maskable, key):
        def loss(params):
            models = nnx.merge(graph, params), nnx.merge(reference_graph, reference)
            return diffusion_lm_loss(
                key, models[0], tokens, maskable, training, reference=models[1]
            )

        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, value

    return jax.jit(update, donate_argnums=(0, 1), out_shardings=(*shardings, None))


def measure(step: Step) -> dict[str, Any]:
    """Take the steps and return what they needed."""
    devices, kinds = jax.devices()[: step.fsdp], (AxisType.Auto,)
    mesh = jax.make_mesh((step.fsdp,), ("fsdp",), kinds, devices=devices)
    models = [
        sharded(with_random_weights(functools.partial(DiffusionLM, step.config(name))), mesh)
        for name in (step.model, step.reference)
    ]
    (graph, params), (reference_graph, reference) = map(nnx.split, models)
    del models
    everywhere = jax.NamedSharding(mesh, jax.P())
    state = jax.jit(make_optimizer(step).init)(params)
    shardings = jax.tree.map(
        lambda array: s if isinstance(s := array.sharding, jax.NamedSharding) else everywhere,
        (params, state),
    )
    state = jax.device_put(state, shardings[1])
    run = make_step(step, graph, reference_graph, shardings)
    shape = (step.batch, step.tokens)
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    vocabulary = DIFFUSION_LM_PRESETS[step.model].mask_id
    tokens = jax.device_put(jax.random.randint(jax.random.key(2), shape, 0, vocabulary), rows)
    maskable = jax.device_put(np.ones(shape, bool), rows)
    seconds, losses = [], []
    for number in range(step.steps + 1):
        started = time.perf_counter()
        key = jax.random.key(number)
        params, state, loss = run(params, state, reference, tokens, maskable, key)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
        print(f"step {number}: loss {losses[-1]:.3f}, {seconds[-1]:.2f} s", file=sys.stderr)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    median = statistics.median(seconds[1:])
    options = dataclasses.asdict(step)
    del options["output"], options["steps"]
    return options | {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "losses": [round(loss, 4) for loss in losses],
        "seconds": round(median, 3),
        "tokens_per_second": round(step.batch * step.tokens / median, 1),
        "first_step_seconds": round(seconds[0], 1),
        "peak_gib": None if peak is None else round(peak / 2**30, 2),
        "device": f"{step.fsdp} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def sharded(model: DiffusionLM, mesh: Mesh) -> DiffusionLM:
    """Return a model whose arrays are split over the mesh."""
    choose = decoder_sharding(mesh)
    graph, state = nnx.split(model)
    placed = [
        (
            path,
            variable.replace(jax.device_put(value, choose(".".join(map(str, path)), value.shape))),
        )
        for path, variable in nnx.to_flat_state(state)
        for value in [variable.get_raw_value()]
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def main() -> None:
    """Take the options, measure, print the record."""
    import tyro

    step = tyro.cli(Step, prog="python -m train.configs.rcd_8b_step")
    record = measure(step)
    print(json.dumps(record, indent=2))
    if step.output is not None:
        write_json(step.output, record)


if __name__ == "__main__":
    main()
