"""What the options of all training programs share: checks, the learning rate, the command line."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import optax

WATCHING = frozenset(
    {
        "context_parallel",
        "coordinator",
        "damaged",
        "devices",
        "export_dtype",
        "fsdp",
        "guidance_scale",
        "hung_after",
        "keep",
        "log_every",
        "peak_teraflops",
        "process",
        "processes",
        "profile_steps",
        "sample_captions",
        "sample_every",
        "sample_steps",
        "samples",
        "save_every",
        "skips_in_a_row",
        "statistics_every",
        "tensor",
        "tensorboard",
        "test_threshold",
        "time_limit",
        "validate_every",
        "validation_batches",
        "workers",
    }
)
"""Options that a resumed run may change: none decides which updates are made.

`damaged` could, but a resumed run refuses another text.
"""


class Options:
    """Base of the frozen dataclasses of options, which declare the fields that are named here."""

    program: ClassVar[str]
    """What `python -m` starts."""
    may_change: ClassVar[frozenset[str]] = WATCHING
    """Options that a resumed run may change."""

    output: Path
    batch_size: int
    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    decay_steps: int
    betas: tuple[float, float]
    weight_decay: float
    gradient_clip: float
    ema_decay: float
    devices: int
    fsdp: int
    tensor: int = 1
    context_parallel: int = 1
    coordinator: str | None = None
    processes: int = 1
    process: int = 0
    time_limit: float | None
    skips_in_a_row: int
    spike_factor: float = 0.0
    hung_after: float | None = None
    save_every: int
    keep: int
    log_every: int
    tensorboard: bool
    profile_steps: tuple[int, int] | None = None

    def check(
        self,
        *,
        choices: Mapping[str, Sequence[Any]],
        smallest: Mapping[str, float],
        positive: Sequence[str] = ("gradient_clip",),
        finite: Sequence[str] = ("learning_rate", "weight_decay", "gradient_clip"),
        shares: Sequence[str] = ("ema_decay",),
    ) -> None:
        """Refuse values out of range.

        Args:
            choices: The values allowed for an option.
            smallest: The smallest value allowed for an option; None is always allowed.
            positive: Options that must be positive.
            finite: Options that must be finite.
            shares: Options that must be from 0 to 1.

        Raises:
            ValueError: An option out of range; the message names it.
        """
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in {**smallest, "hung_after": 1}.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {name}={value}")
        for name in finite:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {name}={getattr(self, name)}")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got betas={self.betas}")
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{field.name} must be an int, got {field.name}={value!r}")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {name}={getattr(self, name)}")
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                "profile_steps must be the first and the last of some steps from 1, got "
                f"profile_steps={self.profile_steps}"
            )
        if self.warmup_steps + self.linear_decay_steps > self.steps:
            raise ValueError(
                f"warm-up and decay must fit into the steps, got "
                f"warmup_steps={self.warmup_steps}, decay_steps={self.linear_decay_steps}, "
                f"steps={self.steps}"
            )

    @property
    def linear_decay_steps(self) -> int:
        """Steps of the final linear decay; 0 for the cosine schedule."""
        return 0 if self.schedule == "cosine" else self.decay_steps or self.steps // 5

    def learning_rate_schedule(self) -> optax.Schedule:
        """Return the learning rate as a function of the number of updates made."""
        peak, warmup, decay = self.learning_rate, self.warmup_steps, self.linear_decay_steps
        if self.schedule == "cosine":
            rest = [optax.cosine_decay_schedule(peak, max(self.steps - warmup, 1))]
            ends = [warmup]
        else:
            rest = [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)]
            ends = [warmup, self.steps - decay]
        # One step more than warm-up has: the first update should not be lost on a rate of 0.
        start = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
        joined = optax.join_schedules([start, *rest], ends)
        return lambda count: jnp.asarray(joined(count), jnp.float32)

    def command(self) -> str:
        """Return the shell command that runs this configuration."""
        words = ["python", "-m", self.program]
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, flag = getattr(self, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                words += [f"--{flag}", *map(str, value)]
            else:
                words += [f"--{flag}", str(value)]
        return shlex.join(words)
