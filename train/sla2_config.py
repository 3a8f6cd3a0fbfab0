"""The options of `python -m train.sla2`, and the methods that it compares."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from jaxgen.layers import ALL_SPARSE
from jaxgen.sampling import LogitNormal
from train.options import Options

type AttentionKind = Literal["full", "sla1", "sla2"]


@dataclass(frozen=True)
class Method:
    """A way to replace self-attention, and how it is trained.

    Attributes:
        kind: Which layer takes the place of self-attention.
        trains_routers: Stage 1 trains the routers; otherwise they stay the identity.
        trains_projections: Stage 1 trains the projections of SLA, which has no such stage.
        trains_mixing: Least squares, stage 1 and stage 2 set the mixing ratios; otherwise they stay
            what `initial_logit` says.
        initial_logit: Mixing logit of a new layer.
        quantize: Scores come from INT8 codes while fine-tuning.
        quantize_evaluation: They do when the result is validated.
    """

    kind: AttentionKind
    trains_routers: bool = False
    trains_projections: bool = False
    trains_mixing: bool = False
    initial_logit: float = 2.0
    quantize: bool = False
    quantize_evaluation: bool = False


_SLA2 = {"kind": "sla2", "quantize": True, "quantize_evaluation": True}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method("full"),
        # What the linear branch is worth: none of it, with the router of SLA.
        "sparse": Method(**_SLA2, initial_logit=ALL_SPARSE),
        "sla1": Method("sla1"),
        "sla1-fitted": Method("sla1", trains_projections=True),
        "sla2": Method(**_SLA2, trains_routers=True, trains_mixing=True),
        "sla2-untrained-router": Method(**_SLA2, trains_mixing=True),
        # The mean of both branches, half their plain sum: what mixing knows without a parameter.
        "sla2-fixed-alpha": Method(**_SLA2, trains_routers=True, initial_logit=0.0),
        "sla2-without-qat": Method(
            "sla2", trains_routers=True, trains_mixing=True, quantize_evaluation=True
        ),
    }
)
"""The methods by name."""


@dataclass(frozen=True)
class Config(Options):
    """Replace the self-attention of a trained video model by sparse-linear attention (SLA2).

    Mixing ratios start at their least squares. Stage 1 fits them and the routers, layer by layer,
    to what full attention gives for the queries, keys and values of the trained model at random
    noise levels, with a soft choice of blocks. Stage 2 fine-tunes the
    whole model with the blocks chosen hard, scores quantized and routers frozen. Every method,
    full attention included, gets the same clips, noise and number of steps in stage 2, and the
    same clips, noise and noise levels decide the losses in `report.json`.

        full                   full attention, fine-tuned like the others
        sparse                 the chosen blocks alone; router of SLA
        sla1                   SLA: sparse attention + a projection of linear attention; not
                               quantized
        sla1-fitted            SLA after a stage 1 for its projections, as they start from zero
        sla2                   the method
        sla2-untrained-router  with the router of SLA
        sla2-fixed-alpha       with the mean of both branches instead of a trained ratio
        sla2-without-qat       fine-tuned without quantization, validated with it

    The same command resumes. The two stages are runs in `stage1` and `stage2` below --output;
    `export` holds the result; `jaxgen.pipelines.TextToVideo` loads it with its attention.
    """

    program: ClassVar[str] = "train.sla2"

    # --- where ---
    pretrained: Path
    """Export of a run of `train.text_to_video`: its folder `export`."""
    output: Path = Path("runs/sla2")
    """Folder of the run: both stages, report.json, samples, export."""

    # --- method ---
    method: str = "sla2"
    """One of those above."""
    kept_fraction: float = 0.05
    """Share of the blocks of keys that get softmax attention."""
    block_q: int = 128
    """Queries in a block."""
    block_k: int = 64
    """Keys in a block."""
    token_cube: tuple[int, int, int] | None = None
    """Frames, rows and columns of patches whose tokens follow each other, so that a block of tokens
    is a compact piece of the video; None: as in the pretrained model. Full attention gives the same
    in any order."""
    per_head_routers: bool = False
    """Give each head a router of its own; the paper has one a layer."""
    learn_basis: bool = False
    """Train a basis of each head in stage 1, in which linear attention comes closer to full
    attention; not in the paper."""
    gradient_scores: Literal["exact", "int8"] = "exact"
    """Scores of the backward pass: from Q and K, or from their INT8 codes."""
    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    """Feature map of sla1."""
    complement: bool = True
    """Linear attention of sla1 sees the blocks not chosen (the paper), not all (public code)."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters, norms, loss and optimizer are float32 always."""
    remat: bool = False
    """Recompute each block in the backward pass of stage 2."""
    scan: bool = True
    """Compile one block and loop over the weights of all, in stage 1 and to validate."""
    scan_stage2: bool = False
    """In stage 2, too: compiles several times as fast and keeps about twice the activations."""

    # --- stage 1: routers and mixing ratios ---
    router_steps: int = 200
    """Updates of stage 1; 0 leaves routers alone and mixing ratios at their least squares."""
    router_batch_size: int = 4
    """Clips a step of stage 1."""
    router_learning_rate: float = 1e-2
    """Learning rate of mixing logits and bases; Adam, linear to 0 in the last fifth."""
    router_projection_rate: float = 0.1
    """Learning rate of the routers as a share of that of the logits."""
    calibration_clips: int = 64
    """Clips of which the least squares of the mixing ratios are, whole batches of stage 1."""
    recalibrate: bool = True
    """Set the mixing ratios by least squares once more after stage 1: its soft choice of blocks
    moves them away from what suits the hard choice. The paper does not."""

    # --- stage 2: everything but the routers ---
    objective: Literal["diffusion", "distillation"] = "diffusion"
    """Loss: flow matching on clips, or the distance from the velocity of the pretrained model."""
    steps: int = 500
    """Updates of stage 2."""
    batch_size: int = 64
    """Clips a step, over all devices."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to 0, or constant and then linear to 0."""
    decay_steps: int = 0
    """Length of the linear decay at the end of the constant schedule; 0: a fifth of the steps."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors and mixing logits do not decay."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradients."""
    ema_decay: float = 0.99
    """Largest decay of the averaged weights, which are the ones validated and exported."""
    sigma_mean: float = 0.0
    """Mean of the logit-normal noise levels of both stages."""
    sigma_std: float = 1.0
    """Their standard deviation."""
    sigma_shift: float = 5.0
    """Their shift towards 1."""
    seed: int = 0
    """Decides dropped captions, noise and noise levels; the clips are always the same."""

    # --- devices ---
    workers: int = 8
    """Processes that draw clips; 0: draw in the main one."""
    devices: int = 0
    """Use so many devices; 0: all."""
    fsdp: int = 1
    """Devices that share one copy of parameters and optimizer."""

    # --- stopping and saving ---
    time_limit: float | None = None
    """Seconds after which to stop and save; run the command again to go on."""
    skips_in_a_row: int = 20
    """Abort after so many updates in a row that were not finite and were skipped."""
    hung_after: float | None = 600.0
    """Report after so many seconds without a step's result where the program stands; None: never.
    """
    save_every: int = 1000
    """Steps between checkpoints; the last step has one always."""
    keep: int = 1
    """Number of newest checkpoints kept."""
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the exported weights."""

    # --- watching ---
    log_every: int = 20
    """Steps a row of metrics."""
    tensorboard: bool = False
    """Write TensorBoard event files, too."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a trace in the folder profile of each stage, for ui.perfetto.dev or
    TensorBoard."""
    validation_clips: int = 256
    """Clips of each of the splits validation and held_out."""
    validation_levels: int = 4
    """Noise levels a validation clip."""
    samples: bool = True
    """Draw some captions at the end."""
    sample_steps: int = 28
    """Euler steps of the samples."""
    guidance_scale: float = 4.0
    """Guidance of the samples."""

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0 < self.kept_fraction <= 1:
            raise ValueError(
                f"kept_fraction must be more than 0 and at most 1, got {self.kept_fraction}"
            )
        self.check(
            choices=_CHOICES,
            smallest=_SMALLEST,
            positive=("gradient_clip", "sigma_std", "sigma_shift", "router_projection_rate"),
            finite=_FINITE,
            shares=("caption_dropout", "ema_decay"),
        )

    def noise_levels(self) -> LogitNormal:
        """Return the distribution of the noise levels."""
        return LogitNormal(self.sigma_mean, self.sigma_std, self.sigma_shift)


_FINITE = (
    "learning_rate",
    "router_learning_rate",
    "router_projection_rate",
    "weight_decay",
    "gradient_clip",
    "sigma_mean",
    "sigma_std",
    "sigma_shift",
    "guidance_scale",
)
_CHOICES = {
    "gradient_scores": ("exact", "int8"),
    "feature_map": ("softmax", "elu", "relu"),
    "objective": ("diffusion", "distillation"),
    "precision": ("float32", "bfloat16"),
    "schedule": ("cosine", "constant"),
    "export_dtype": ("float32", "bfloat16"),
}
_SMALLEST = {
    "block_q": 1,
    "block_k": 1,
    "router_steps": 0,
    "router_batch_size": 1,
    "calibration_clips": 1,
    "router_learning_rate": 0,
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    "workers": 0,
    "devices": 0,
    "fsdp": 1,
    "time_limit": 0,
    "skips_in_a_row": 1,
    "save_every": 1,
    "keep": 1,
    "log_every": 1,
    "validation_clips": 1,
    "validation_levels": 1,
    "sample_steps": 1,
}
