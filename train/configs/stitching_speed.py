"""How long does a picture take when two models share its steps? SD3.5-Large with SD3-Medium.

Weights are random: a step takes as long with any. Everything counts from noise to pixels, all steps
and the decoding; the text encoders do not, since every sampler needs them alike. What a sampler
draws with these weights says nothing, so a switch that is found while sampling is not measured:
SRDiffusion switches half-way.

Command    python -m train.configs.stitching_speed --output runs/stitching-speed.json
               --splits 0.18 0.48 0.16 0.46 0.14 0.44
Hardware   one H100 80 GB, jax 0.11.2
Outcome    large alone 6.59 s a picture, small alone 2.23, T-Stitch 4.85, SRDiffusion 4.43,
           HybridStitch by default 4.06 (1.62 times as fast), with the text kept 3.80 (1.73), from
           16 to 46 % of the steps 3.78 (1.74) and 3.61 (1.83); results/stitching_speed.json. With
           --scan large alone 7.03, HybridStitch 4.74; results/stitching_speed_scan.json
"""

import dataclasses
import functools
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxgen.checkpoints import write_json
from jaxgen.layers import AttentionName
from jaxgen.models import AUTOENCODER_PRESETS, MMDIT_PRESETS, Autoencoder, MMDiT, MMDiTConfig
from jaxgen.pipelines import stitched_cost
from jaxgen.pipelines.text_to_image import to_pixels
from jaxgen.sampling import (
    Alone,
    Conditioning,
    FlowMatchingSchedule,
    Guided,
    HybridStitch,
    Policy,
    SRDiffusion,
    TStitch,
    stitch,
)
from jaxgen.sampling.devices import home_of, meet
from train.configs.random_weights import normal, with_random_weights
from train.stitching_report import METHODS, describe

type Record = dict[str, Any]

POLICIES = ("large", "small", "t-stitch", "srdiffusion", "hybridstitch")
"""What can be measured, in this order."""

_NARROW: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
_AUTOENCODER = "stable-diffusion-3"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time a picture by the large model, the small one, T-Stitch, SRDiffusion and HybridStitch.

    Both models stay in memory, in bfloat16.
    """

    large: str = "sd3.5-large"
    """Preset of the large model."""
    small: str = "sd3-medium"
    """Preset of the small model."""
    pixels: int = 1024
    """Side of the pictures."""
    steps: int = 50
    """Euler steps."""
    text_tokens: int = 333
    """Tokens of the text; 77 of CLIP and 256 of T5 are 333."""
    guidance_scale: float = 4.5
    """Of both models; guidance doubles the batch, whatever its scale."""
    attention: AttentionName = "exact"
    """Arithmetic of attention."""
    batch: int = 1
    """Pictures drawn at once."""
    runs: int = 3
    """Pictures, or batches of them, of which the median counts."""
    policies: tuple[str, ...] = POLICIES
    """Samplers: large, small, t-stitch, srdiffusion, hybridstitch."""
    splits: tuple[tuple[float, float], ...] = tuple(
        (start / 100, (start + 30) / 100) for start in (20, 18, 16, 14, 12)
    )
    """Where the hybrid stage starts and ends, as shares of the steps. HybridStitch is measured with
    its default first, then with each of these."""
    keep_text: tuple[bool, ...] = (False, True)
    """Whether the large model remembers the text in hybrid steps; each is measured."""
    target: float = 1.83
    """Speed-up for which a split is looked for."""
    scan: bool = False
    """Compile one block instead of all."""
    small_device: int = 0
    """Number of the device of the small model; the large one and the autoencoder are on 0. In a
    hybrid step both then predict at the same time. Memory is that of device 0."""
    layers: int | None = None
    """Blocks of both models, for a quick try; None: all."""
    output: Path | None = None
    """Write settings and records there, as JSON, after each record."""

    def __post_init__(self):
        for name in ("large", "small"):
            if (preset := getattr(self, name)) not in MMDIT_PRESETS:
                raise ValueError(
                    f"{name} must be one of {', '.join(MMDIT_PRESETS)}, got {preset!r}"
                )
        for name in ("pixels", "steps", "text_tokens", "batch", "runs", "layers"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 <= self.small_device < len(jax.devices()):
            raise ValueError(
                f"small_device must be below the number of devices, {len(jax.devices())}, "
                f"got {self.small_device}"
            )
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown:
            raise ValueError(f"policies must be among {', '.join(POLICIES)}, got {unknown}")
        if "large" not in self.policies:
            raise ValueError(
                "policies must include 'large', with which the others are compared, "
                f"got {self.policies}"
            )
        large, small = self.config("large"), self.config("small")
        latents = AUTOENCODER_PRESETS[_AUTOENCODER].latent_channels
        for name, one, other in (
            ("latent channels, as the autoencoder", large.in_channels, latents),
            ("latent channels", large.in_channels, small.in_channels),
            ("joint_attention_dim", large.joint_attention_dim, small.joint_attention_dim),
            ("pooled_projection_dim", large.pooled_projection_dim, small.pooled_projection_dim),
            ("patch_size", large.patch_size, small.patch_size),
        ):
            if one != other:
                raise ValueError(
                    f"large and small must have the same {name}, got {one} and {other}"
                )
        unit = AUTOENCODER_PRESETS[_AUTOENCODER].downscale * large.patch_size
        most = unit * min(large.pos_embed_max_size, small.pos_embed_max_size)
        if self.pixels % unit or self.pixels > most:
            raise ValueError(
                f"pixels must be a multiple of {unit} and at most {most}, got {self.pixels}"
            )
        for policy in self.samplers():
            policy.stages(self.steps)

    def config(self, role: str) -> MMDiTConfig:
        """Return the configuration of "large" or "small"."""
        config = MMDIT_PRESETS[getattr(self, role)]
        layers = config.num_layers if self.layers is None else min(self.layers, config.num_layers)
        dual = tuple(number for number in config.dual_attention_layers if number < layers)
        return dataclasses.replace(
            config,
            num_layers=layers,
            dual_attention_layers=dual,
            attention=self.attention,
            scan=self.scan,
            **_NARROW,
        )

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        unit = AUTOENCODER_PRESETS[_AUTOENCODER].downscale * self.config("large").patch_size
        return (self.pixels // unit) ** 2

    def samplers(self) -> tuple[Policy, ...]:
        """Return what is measured; the large model alone comes first."""
        default = HybridStitch()
        splits = (default.start, default.end), *self.splits
        kinds: dict[str, tuple[Policy, ...]] = {
            "large": (Alone(),),
            "small": (Alone("small"),),
            "t-stitch": (TStitch(),),
            "srdiffusion": (SRDiffusion(0.5),),
            "hybridstitch": tuple(
                HybridStitch(*split, keep_text=kept) for kept in self.keep_text for split in splits
            ),
        }
        return tuple(policy for kind in POLICIES if kind in self.policies for policy in kinds[kind])


def measure(speed: Speed, alone: float | None = None) -> Iterator[Record]:
    """Draw by each sampler in turn and yield a record as soon as there is one.

    Seconds are those of one picture, and `seconds_of_stages` and `seconds_decoding`, the
    autoencoder's, parts of them; `seconds_of_runs` are for a batch. `seconds_compiling` is what the
    first run took longer; programs of earlier samplers are not compiled again. Operations are those
    of the steps alone. `gib` is the most memory in use during the runs (see `Memory`), less the
    weights of a model that this sampler does not use; `gib_of_process` is the device's mark, with
    everything before.

    Args:
        speed: What to measure.
        alone: Seconds of a picture by the large model, if they are known: it does not draw alone
            then.
    """
    autoencoder = AUTOENCODER_PRESETS[_AUTOENCODER]
    large = speed.config("large")
    conditional, unconditional = (
        Conditioning(
            normal(2 * half, shape=(speed.batch, speed.text_tokens, large.joint_attention_dim)),
            normal(2 * half + 1, shape=(speed.batch, large.pooled_projection_dim)),
        )
        for half in range(2)
    )
    models = {
        role: Guided.of(
            with_random_weights(functools.partial(MMDiT, speed.config(role))),
            conditional,
            unconditional,
            speed.guidance_scale,
        )
        for role in ("large", "small")
    }
    if speed.small_device:
        place = SingleDeviceSharding(jax.devices()[speed.small_device])
        models["small"] = jax.device_put(models["small"], place)
    decoder = with_random_weights(
        functools.partial(Autoencoder, dataclasses.replace(autoencoder, **_NARROW))
    )
    side = speed.pixels // autoencoder.downscale
    noise = normal(4, shape=(speed.batch, side, side, large.in_channels), dtype=jnp.float32)
    sigmas = FlowMatchingSchedule().sigmas(speed.steps)
    for policy in speed.samplers():
        if alone and policy == Alone():
            continue
        steps = _steps_of(policy, speed.steps)
        used = {
            role: model if steps[role] or steps["hybrid"] else None
            for role, model in models.items()
        }
        here = ("large", "small") if not speed.small_device else ("large",)
        unused = sum(_bytes(models[role].weights) for role in here if not used[role])
        draw = functools.partial(_seconds, used, policy, noise, sigmas, decoder)
        first = sum(draw().values())
        gc.collect()  # of what compiling left behind: 0.2 s in the middle of a picture
        with Memory() as memory:
            timed = [draw() for _ in range(speed.runs)]
        runs = [sum(parts.values()) for parts in timed]
        seconds = statistics.median(runs) / speed.batch
        middle = {
            part: statistics.median(parts[part] for parts in timed) / speed.batch
            for part in timed[0]
        }
        alone = seconds if alone is None else alone
        yield {
            "method": METHODS[type(policy)],
            "policy": dataclasses.asdict(policy),
            "steps": steps,
            "seconds_a_picture": seconds,
            "seconds_of_runs": runs,
            "seconds_decoding": middle.pop("decoding"),
            "seconds_of_stages": middle,
            "seconds_compiling": max(0.0, first - seconds * speed.batch),
            "speed_up": alone / seconds,
            "speed_up_in_operations": 1 / cost_of(speed, policy),
            "gib": None if memory.bytes is None else (memory.bytes - unused) / 2**30,
            "gib_of_process": None if memory.mark is None else memory.mark / 2**30,
        }


def cost_of(speed: Speed, policy: Policy) -> float:
    """Return the operations of all steps as a share of the large model's alone."""
    return stitched_cost(
        policy,
        speed.steps,
        large=speed.config("large"),
        small=speed.config("small"),
        patches=(speed.patches, speed.patches),
        text_tokens=speed.text_tokens,
    )


class Memory:
    """The most bytes of the first device in use at once, looked at a few hundred times a second.

    The device's own high-water mark never falls, so it is that of the hungriest sampler so far, or
    of the compiler, which tries algorithms on the device.

    Attributes:
        bytes: What was seen; None where the device does not say, as on CPUs.
        mark: The device's mark.
    """

    def __init__(self):
        self.bytes: int | None = None
        self.mark: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while stats := jax.local_devices()[0].memory_stats():
            self.bytes = max(self.bytes or 0, stats["bytes_in_use"])
            self.mark = stats.get("peak_bytes_in_use")
            if self._over.wait(0.003):
                break


def reaching(records: Sequence[Record], target: float) -> Record | None:
    """Return the HybridStitch with most work for the large model that reaches a speed-up."""
    fast = [r for r in records if r["method"] == "HybridStitch" and r["speed_up"] >= target]
    return min(fast, key=lambda record: record["speed_up_in_operations"], default=None)


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table."""
    lines = [
        "| sampler | large + hybrid + small steps | a picture | compiling | speed-up "
        "| in operations | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        cells = [
            describe(record["method"], record["policy"]),
            " + ".join(str(record["steps"][kind]) for kind in ("large", "hybrid", "small")),
            f"{record['seconds_a_picture']:.2f} s",
            f"{record['seconds_compiling']:.0f} s",
            f"{record['speed_up']:.2f}",
            f"{record['speed_up_in_operations']:.2f}",
            "" if record["gib"] is None else f"{record['gib']:.1f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(records: Sequence[Record], target: float) -> str:
    """Return which split reaches the target, in a sentence."""
    found = reaching(records, target)
    if found is None:
        return f"No split of HybridStitch that was measured is {target:g} times as fast."
    steps = " + ".join(str(found["steps"][kind]) for kind in ("large", "hybrid", "small"))
    return (
        f"HybridStitch with {steps} steps is {found['speed_up']:.2f} times as fast, and of the "
        f"splits that reach {target:g} it leaves most to the large model."
    )


def save(speed: Speed, records: Sequence[Record]) -> None:
    """Write settings and records to the output, if there is one."""
    if speed.output is None:
        return
    result = {
        "settings": {**dataclasses.asdict(speed), "output": str(speed.output)},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "records": list(records),
    }
    write_json(speed.output, result)


def carry_out(speed: Speed) -> list[Record]:
    """Measure, report each record at once, and write what there is after each."""
    records = []
    for record in measure(speed):
        records.append(record)
        save(speed, records)
        print(json.dumps(record), file=sys.stderr, flush=True)
    return records


@jax.jit
def _decode(autoencoder: Autoencoder, latents: jax.Array) -> jax.Array:
    return to_pixels(autoencoder.decode(latents))


def _seconds(
    models: Mapping[str, Guided | None],
    policy: Policy,
    noise: jax.Array,
    sigmas: jax.Array,
    autoencoder: Autoencoder,
) -> dict[str, float]:
    """Return the seconds of each stage, by its kind, and of "decoding"; their sum is all."""
    seconds, latents, began = {}, noise, time.perf_counter()
    for progress in stitch(models["large"], models["small"], policy, noise, sigmas):
        latents = jax.block_until_ready(progress.latents)
        seconds[progress.stage.kind] = time.perf_counter() - began - sum(seconds.values())
    latents = meet(latents, home_of(nnx.state(autoencoder)))
    jax.block_until_ready(_decode(autoencoder, latents))
    return seconds | {"decoding": time.perf_counter() - began - sum(seconds.values())}


def _steps_of(policy: Policy, steps: int) -> dict[str, int]:
    """Return how many steps are predicted by the large model, by both and by the small one."""
    counts = {"large": 0, "hybrid": 0, "small": 0}
    for stage in policy.stages(steps):
        counts[stage.kind] += stage.last - stage.first
    return counts


def _bytes(arrays: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


def main() -> None:
    """Take the options, measure, print the table."""
    import tyro

    speed = tyro.cli(Speed, prog="python -m train.configs.stitching_speed")
    records = carry_out(speed)
    print(table(records))
    print(verdict(records, speed.target))


if __name__ == "__main__":
    main()
