"""The options of `python -m train.text_to_video`, one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from jaxgen.models import WAN_PRESETS, WanConfig
from jaxgen.sampling import LogitNormal
from train.options import Options

MODELS: Mapping[str, WanConfig] = MappingProxyType(
    {
        "moving-emoji": WAN_PRESETS["moving-emoji"],
        "tiny": WanConfig(
            num_layers=2,
            num_heads=2,
            ffn_dim=32,
            patch_size=(1, 4, 4),
            in_channels=3,
            head_dim=8,
            text_dim=16,
            freq_dim=16,
        ),
    }
)
"""Models of videos in pixels: the one to train, and one to try out a command with."""


@dataclass(frozen=True)
class Config(Options):
    """Train a text-to-video diffusion transformer on clips of moving emoji, with full attention.

    Clips are drawn on the fly; a caption such as "a red car moves right behind a turning pizza on
    blue stripes" says all that happens in one. The model is that of Wan2.1, small, in pixel space:
    16 frames of 64 x 64 pixels are 4,096 tokens, enough for sparse attention to matter
    (`train.sla2` takes the export of such a run).

    The same command resumes a stopped run with the same state, clips and noise, on the CPU bit for
    bit (not checked for cuDNN's attention); with --time-limit a long training can be cut into
    pieces. To try it on a CPU in a minute:

        python -m train.text_to_video --output runs/try --model tiny --frames 8 --size 32
            --precision float32 --steps 20 --warmup-steps 5 --batch-size 4 --workers 0
            --validation-clips 8
    """

    program: ClassVar[str] = "train.text_to_video"

    # --- where ---
    output: Path = Path("runs/text-to-video")
    """Folder of the run: config, metrics, validation losses, checkpoints, samples, export."""

    # --- model ---
    model: str = "moving-emoji"
    """Preset: moving-emoji (5.6 million parameters with its text encoder) or tiny."""
    attention: Literal["exact", "int8"] = "exact"
    """Arithmetic of the self-attention; both are full attention."""
    qk_gain: float = 1.0
    """Initial gain of the norms of queries and keys of self-attention. Large video models attend
    sharply; small ones, trained for minutes, stay near the mean of all tokens in many heads. With a
    gain of 1.7 scores of random directions have a standard deviation of 3, and if they are normal a
    twentieth of the keys has nine tenths of the weight."""
    start_from: Path | None = None
    """Export of another run whose weights are the start, with a new optimizer; None: new ones."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters, norms, loss and optimizer are float32 always."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    # --- data ---
    frames: int = 16
    """Frames a clip, 8 to 32."""
    size: int = 64
    """Side of a frame in pixels, 32 to 128, a multiple of 4."""
    figures: int | None = None
    """Use so many figures only, for quick tries."""
    batch_size: int = 64
    """Clips a step, over all devices."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    workers: int = 8
    """Processes that draw clips; 0: draw in the main one."""
    seed: int = 0
    """Decides initialization, dropped captions, noise and noise levels."""

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
    """Largest decay of the averaged weights, which are the ones validated and exported."""
    sigma_mean: float = 0.0
    """Mean of the logit-normal noise levels; positive trains more on noisy clips."""
    sigma_std: float = 1.0
    """Standard deviation of the logit-normal noise levels."""
    sigma_shift: float = 5.0
    """Shift of the noise levels towards 1; 5 as Wan2.1 samples with."""

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
    keep: int = 1
    """Number of newest checkpoints kept."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the exported weights."""

    # --- watching ---
    log_every: int = 50
    """Steps a row of metrics."""
    tensorboard: bool = False
    """Write TensorBoard event files, too."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a trace in the folder profile, for ui.perfetto.dev or TensorBoard."""
    validate_every: int = 2000
    """Steps between validations, which also follow the last step; 0: none."""
    validation_clips: int = 256
    """Clips of each of the splits validation and held_out."""
    validation_levels: int = 4
    """Noise levels a validation clip."""
    sample_every: int = 5000
    """Steps between samples, which also follow the last step; 0: none."""
    sample_captions: tuple[str, ...] = ()
    """Captions of the samples; by default four of the split validation and four held out."""
    sample_steps: int = 28
    """Euler steps of the samples."""
    guidance_scale: float = 4.0
    """Guidance of the samples."""

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        self.check(
            choices=_CHOICES,
            smallest=_SMALLEST,
            positive=("gradient_clip", "qk_gain", "sigma_std", "sigma_shift"),
            finite=_FINITE,
            shares=("caption_dropout", "ema_decay"),
        )
        frames, rows, columns = MODELS[self.model].patch_size
        if self.frames % frames or self.size % rows or self.size % columns:
            raise ValueError(
                f"patches of {frames} frames and {rows} x {columns} pixels must fill the clip, "
                f"got frames={self.frames} and size={self.size}"
            )

    def noise_levels(self) -> LogitNormal:
        """Return the distribution of the noise levels."""
        return LogitNormal(self.sigma_mean, self.sigma_std, self.sigma_shift)


_FINITE = (
    "learning_rate",
    "weight_decay",
    "gradient_clip",
    "sigma_mean",
    "sigma_std",
    "sigma_shift",
    "qk_gain",
    "guidance_scale",
)
_CHOICES = {
    "attention": ("exact", "int8"),
    "precision": ("float32", "bfloat16"),
    "schedule": ("cosine", "constant"),
    "export_dtype": ("float32", "bfloat16"),
}
_SMALLEST = {
    "frames": 1,
    "size": 1,
    "figures": 1,
    "batch_size": 1,
    "workers": 0,
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
    "validate_every": 0,
    "validation_clips": 1,
    "validation_levels": 1,
    "sample_every": 0,
    "sample_steps": 1,
}
