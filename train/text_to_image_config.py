"""The options of `python -m train.text_to_image`, one frozen dataclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from jaxgen.models.mmdit import MMDIT_PRESETS
from train.options import Options

PIXEL_MODELS = tuple(name for name, preset in MMDIT_PRESETS.items() if preset.in_channels == 3)
"""Presets that read and write RGB pictures."""


@dataclass(frozen=True)
class Config(Options):
    """Train a text-to-image diffusion transformer on OpenMoji.

    The same command resumes a stopped run. The defaults train the large model on one GPU.
    """

    program: ClassVar[str] = "train.text_to_image"

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
    hung_after: float | None = 600.0
    """Report after so many seconds without a step's result where the program stands; None: never.
    """
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints kept."""

    # --- watching ---
    log_every: int = 50
    """Steps a row of metrics."""
    tensorboard: bool = False
    """Write TensorBoard event files, too."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a trace in the folder profile, for ui.perfetto.dev or TensorBoard."""
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
        self.check(
            choices=_CHOICES,
            smallest=_SMALLEST,
            positive=("gradient_clip", "sigma_std", "sigma_shift"),
            finite=_FINITE,
            shares=("caption_dropout", "ema_decay"),
        )


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
