"""The options of `python -m train.text_to_image`, one frozen dataclass."""

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import optax

from jaxgen.models.mmdit import MMDIT_PRESETS

PIXEL_MODELS = tuple(name for name, preset in MMDIT_PRESETS.items() if preset.in_channels == 3)
"""Presets that read and write RGB pictures."""

MAY_CHANGE = frozenset(
    {
        "devices",
        "fsdp",
        "guidance_scale",
        "keep",
        "log_every",
        "sample_captions",
        "sample_every",
        "sample_steps",
        "save_every",
        "skips_in_a_row",
        "tensorboard",
        "time_limit",
    }
)
"""Options that a resumed run may change: none decides which updates are made."""


@dataclass(frozen=True)
class Config:
    """Train a text-to-image diffusion transformer on OpenMoji.

    The same command resumes a stopped run. The defaults train the large model on one GPU.
    """

    # --- where ---
    output: Path = Path("runs/text-to-image")
    """Folder of the run: config, metrics, checkpoints, samples, export."""

    # --- model ---
    model: str = "openmoji-large"
    """Preset: openmoji-large, openmoji-small; at 32 pixels openmoji-32, -32-small; or tiny."""
    attention: Literal["exact", "int8"] = "exact"
    """Arithmetic of the attention, forward and backward."""
    text_encoder_from: Path | None = None
    """Exported model whose tokenizer and text encoder are used, frozen, instead of new ones."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters, norms, loss and optimizer are float32 always."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    # --- data ---
    subset: Literal["all", "people"] = "all"
    """people: one person with a skin tone each, to study new combinations of known words."""
    pictures: int | None = None
    """Use so many emoji only, for quick tries."""
    batch_size: int = 256
    """Pictures a step, over all devices."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    seed: int = 0
    """Decides initialization, order of the data, noise and noise levels."""

    # --- optimization ---
    steps: int = 20_000
    """Number of updates; the learning rate's schedule spans them."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to 0, or constant and then linear to 0."""
    decay_steps: int = 0
    """Length of the linear decay at the end of the constant schedule; 0: a fifth of the steps."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors do not decay."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradients."""
    ema_decay: float = 0.999
    """Largest decay of the averaged weights, which are the ones exported."""
    sigma_mean: float = 0.0
    """Mean of the logit-normal noise levels; positive trains more on noisy pictures."""
    sigma_std: float = 1.0
    """Standard deviation of the logit-normal noise levels."""
    sigma_shift: float = 1.0
    """Shift of the noise levels towards 1."""

    # --- devices ---
    devices: int = 0
    """Use so many devices; 0: all."""
    fsdp: int = 1
    """Devices that share one copy of parameters and optimizer; the others repeat it."""

    # --- stopping and saving ---
    time_limit: float | None = None
    """Seconds after which to stop, save and export; the schedule does not depend on it."""
    skips_in_a_row: int = 20
    """Abort after so many updates in a row that were not finite and were skipped."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints kept."""

    # --- watching ---
    log_every: int = 50
    """Steps a row of metrics."""
    tensorboard: bool = False
    """Write TensorBoard event files, too."""
    sample_every: int = 2000
    """Steps between picture grids; 0: none."""
    sample_captions: tuple[str, ...] = ()
    """Captions of the grids; by default eight that were trained on and eight held out."""
    sample_steps: int = 28
    """Euler steps of the grids."""
    guidance_scale: float = 4.0
    """Guidance of the grids."""

    def __post_init__(self):
        if self.model not in PIXEL_MODELS:
            raise ValueError(f"model must be one of {', '.join(PIXEL_MODELS)}, got {self.model!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {name}={value}")
        for name in _FINITE:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {name}={getattr(self, name)}")
        for name in ("gradient_clip", "sigma_std", "sigma_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got betas={self.betas}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{field.name} must be an int, got {field.name}={value!r}")
        for name in ("caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {name}={getattr(self, name)}")
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
        """Return the shell command that trains this configuration."""
        words = ["python", "-m", "train.text_to_image"]
        for field in dataclasses.fields(self):
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


_FINITE = (
    "learning_rate",
    "weight_decay",
    "gradient_clip",
    "sigma_mean",
    "sigma_std",
    "sigma_shift",
    "guidance_scale",
)
_CHOICES = {
    "attention": ("exact", "int8"),
    "precision": ("float32", "bfloat16"),
    "schedule": ("cosine", "constant"),
    "subset": ("all", "people"),
}
_SMALLEST = {
    "pictures": 1,
    "batch_size": 1,
    "seed": 0,
    "steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "weight_decay": 0,
    "devices": 0,
    "fsdp": 1,
    "time_limit": 0,
    "skips_in_a_row": 1,
    "save_every": 1,
    "keep": 1,
    "log_every": 1,
    "sample_every": 0,
    "sample_steps": 1,
}
