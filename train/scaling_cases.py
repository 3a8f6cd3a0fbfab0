"""The cases of `train.scaling`: what is run on one device and on several, and what is compared."""

import contextlib
import dataclasses
import functools
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

import jaxgen
from jaxgen.layers import attend_to_gathered
from jaxgen.sampling import HybridStitch
from kernels_pallas import sage_attention
from train.configs import stitching_speed
from train.language_model import train
from train.language_model_config import Config, preset
from train.metrics import Row

type Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Train and sample on several devices of one host, each case beside one device."""

    cases: tuple[str, ...] = ("weak", "losses", "context", "resume", "hybrid")
    """weak: rows and devices grow together; losses: tensors and tokens divided; context: one long
    sequence, keys and values as INT8 or not on the wire; resume: a run that changes its devices
    twice; hybrid: two diffusion models on a device each."""
    devices: int = 2
    """Devices of the host that take part."""
    model: str = "325m"
    """Language model of "weak"."""
    rows: int = 8
    """Rows of a device there."""
    context: int = 4096
    """Tokens of a row there."""
    steps: int = 30
    """Updates there, of which the last third is timed."""
    small_model: str = "10m"
    """Language model of "losses" and "resume"."""
    small_context: int = 1024
    """Tokens of a row there; 8 rows."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation."""
    long_context: int = 65_536
    """Tokens of "context"."""
    heads: int = 16
    """Heads there, of queries and of keys."""
    head_dim: int = 64
    """Size of a head there."""
    stitching: stitching_speed.Speed = dataclasses.field(
        default_factory=lambda: stitching_speed.Speed(
            policies=("large", "hybridstitch"), splits=(), keep_text=(False,), runs=2, scan=True
        )
    )
    """Options of "hybrid"; small_device and output are replaced."""
    output: Path | None = None
    """Write the records there, as JSON, after each case, and a plot beside it. Cases that are there
    already, measured with the same settings and devices, are not measured again."""

    def __post_init__(self):
        if unknown := [case for case in self.cases if case not in CASES]:
            raise ValueError(f"cases must be among {', '.join(CASES)}, got {unknown}")
        if self.output and self.output.suffix == ".png":
            raise ValueError(f"output must not be a .png, which the plot is, got {self.output}")
        if not 1 < self.devices <= jax.device_count():
            raise ValueError(
                f"devices must be from 2 to the {jax.device_count()} of this machine, "
                f"got {self.devices}"
            )
        drawn = sum(isinstance(policy, HybridStitch) for policy in self.stitching.samplers())
        if "hybrid" in self.cases and drawn != 1:
            raise ValueError(
                "stitching must draw by one HybridStitch (hybridstitch among the policies, no "
                f"splits, one keep_text), got {drawn}"
            )
        heads = preset(self.small_model).num_kv_heads
        if heads % self.devices:
            raise ValueError(
                f"devices must divide the key heads of small_model={self.small_model}, {heads}, "
                f"got {self.devices}"
            )
        if self.long_context % self.devices or 8 % self.devices:
            raise ValueError(
                f"devices must divide long_context={self.long_context} and 8 rows, "
                f"got {self.devices}"
            )


def weak(scaling: Scaling) -> list[Record]:
    """Pretrain with as many rows a device on one device and on all; tokens a second."""
    ways = {"one device": {"devices": 1}, "data parallel": {}, "FSDP": {"fsdp": scaling.devices}}
    records: list[Record] = []
    for name, changes in ways.items():
        devices = changes.get("devices", scaling.devices)
        rows = _pretrain(
            scaling,
            model=scaling.model,
            context=scaling.context,
            batch_size=scaling.rows * devices,
            steps=scaling.steps,
            log_every=max(1, scaling.steps // 3),
            **{"devices": devices} | changes,
        )
        speed = rows[-1]["tokens_per_second"]
        alone = records[0]["tokens_per_second"] if records else speed
        records.append(
            {"way": name, "devices": devices, "tokens_per_second": speed, "mfu": rows[-1]["mfu"]}
            | {"of_ideal": speed / (devices * alone), "loss": rows[-1]["loss"]}
        )
    return records


def losses(scaling: Scaling) -> list[Record]:
    """Take a few updates with heads or tokens divided, and compare losses and gradients.

    Those of the first forward and backward pass agree up to rounding. Later losses move apart: in
    its first updates Adam divides small gradients by their own size, and turns their last bits into
    steps.
    """
    count = scaling.devices
    ways: dict[str, dict[str, Any]] = {
        "one device": {"devices": 1},
        "tensor parallel": {"tensor": count},
        "context parallel": {"context_parallel": count},
    }
    records: list[Record] = []
    for name, changes in ways.items():
        place: dict[str, Any] = {"devices": count} | changes
        rows = _small(scaling, 6, **place)
        found, norm = [row["loss"] for row in rows], rows[0]["gradient_norm"]
        first = records[0] if records else {"losses": found, "gradient_norm": norm}
        apart = np.abs(np.subtract(found, first["losses"]))
        records.append(
            {"way": name, "devices": changes.get("devices", count), "losses": found}
            | {"gradient_norm": norm, "difference": float(apart[0]), "later": float(apart[-1])}
            | {"gradient_difference": abs(norm / first["gradient_norm"] - 1)}
        )
    return records


def context(scaling: Scaling) -> list[Record]:
    """Attend over one long sequence, forward and backward; milliseconds, and what rounding does."""
    shape = (1, scaling.long_context, scaling.heads, scaling.head_dim)
    arrays = [
        jax.random.normal(jax.random.key(number), shape, scaling.precision) for number in range(4)
    ]

    def full(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return cast(jax.Array, sage_attention(query, key, value))

    def both(attend: Callable[..., jax.Array], *arrays: jax.Array) -> Any:
        out, pull = jax.vjp(attend, *arrays[:3])
        return out, pull(arrays[3])

    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((scaling.devices,), ("context",), kinds, devices=_devices(scaling))
    spec = jax.P(None, "context")
    ways = {"one device": None, "16 bits on the wire": "exact", "INT8 on the wire": "int8"}
    records, wanted = [], None
    for name, wire in ways.items():
        attend, given = full, jax.device_put(arrays, _devices(scaling)[0])
        if wire:
            part = functools.partial(attend_to_gathered, full, wire=wire)
            attend = jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
            given = jax.device_put(arrays, NamedSharding(mesh, spec))
        run = jax.jit(functools.partial(both, attend))
        found, seconds = jax.block_until_ready(run(*given)), []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(run(*given))
            seconds.append(time.perf_counter() - started)
        found = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found)]
        wanted = found if wanted is None else wanted
        pairs = zip(found, wanted, strict=True)
        errors = [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in pairs]
        records.append(
            {"way": name, "devices": scaling.devices if wire else 1}
            | {"ms": 1000 * statistics.median(seconds), "error": float(max(errors))}
        )
    return records


def hybrid(scaling: Scaling) -> list[Record]:
    """Draw a picture by HybridStitch with both models on one device and on one each; seconds."""
    records, alone = [], None
    for name, device in (("both on one device", 0), ("a device each", 1)):
        speed = dataclasses.replace(scaling.stitching, small_device=device, output=None)
        drawn = list(stitching_speed.measure(speed, alone))
        # The large model alone comes first, HybridStitch last.
        alone = alone or drawn[0]["seconds_a_picture"]
        seconds = ("seconds_a_picture", "seconds_of_stages", "seconds_compiling")
        kept = (*seconds, "speed_up", "steps", "gib")
        records.append({"way": name, "devices": device + 1} | {key: drawn[-1][key] for key in kept})
    return records


def resume(scaling: Scaling) -> list[Record]:
    """Train on all devices, on one, and on all again; how far losses are from an unbroken run."""
    steps, count = 18, scaling.devices
    whole = _small(scaling, steps, devices=count, fsdp=count)
    with tempfile.TemporaryDirectory() as folder:
        every = {"devices": count, "fsdp": count}
        places = every, {"devices": 1}, every
        rows, taken = [], []
        for stop, place in zip((steps // 3, 2 * steps // 3, None), places, strict=True):
            rows = _small(scaling, steps, Path(folder), stop, **place)
            taken.append(int(rows[-1]["step"]))
    pairs = zip(rows, whole, strict=True)
    difference = max(abs(one["loss"] - other["loss"]) for one, other in pairs)
    return [
        {"way": f"{count}, 1, {count} devices", "devices": count, "changed_after": taken[:-1]}
        | {"losses": [row["loss"] for row in rows], "difference": difference}
    ]


CASES: Mapping[str, Callable[[Scaling], list[Record]]] = {
    "weak": weak, "losses": losses, "context": context, "resume": resume, "hybrid": hybrid,
}  # fmt: skip


def _small(
    scaling: Scaling, steps: int, folder: Path | None = None, stop: int | None = None, **changes
) -> list[Row]:
    """Take a few updates with the small model; a row for each."""
    sizes = {"model": scaling.small_model, "context": scaling.small_context, "batch_size": 8}
    return _pretrain(scaling, folder, stop, steps=steps, log_every=1, **sizes | changes)


def _pretrain(
    scaling: Scaling, folder: Path | None = None, stop: int | None = None, **options: Any
) -> list[Row]:
    """Pretrain on this package's source with INT8 attention, and stop after a step if asked to.

    Without a folder nothing is saved.
    """
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        if stop is not None and row["step"] == stop:
            signal.raise_signal(signal.SIGTERM)
        if folder is None and row["step"] == options["steps"]:
            raise _MeasuredError

    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(_MeasuredError):
        config = Config(
            output=folder or Path(temporary),
            attention="int8",
            remat="keep_products",
            precision=scaling.precision,
            scan=True,
            across_documents=True,
            data=Path(jaxgen.__file__).parent,
            warmup_steps=options["steps"] // 2,
            validate_every=0,
            **options,
        )
        return train(config, on_row=on_row, show_progress=False).rows
    return rows


class _MeasuredError(Exception):
    """The last row is there, and the run of no further use."""


def _devices(scaling: Scaling) -> list[Any]:
    return jax.devices()[: scaling.devices]
