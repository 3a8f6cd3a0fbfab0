"""The options of `python -m train.language_model`, one frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from jaxgen.models import LANGUAGE_MODEL_PRESETS, LanguageModelConfig
from train.options import WATCHING, Options

MODELS: Mapping[str, LanguageModelConfig] = MappingProxyType(
    {
        **LANGUAGE_MODEL_PRESETS,
        "tiny": dataclasses.replace(
            LANGUAGE_MODEL_PRESETS["10m"],
            num_layers=2,
            width=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            ffn_dim=128,
        ),
    }
)
"""The presets, and one to try out a command with."""


@dataclass(frozen=True)
class Config(Options):
    """Pretrain a language model, with attention in bfloat16 or in INT8 (SageBwd).

    A Llama-style decoder predicts the next token of text packed into rows, without attention
    across documents. The text is yours, or Python source found on this machine.

    The same command resumes a stopped run with the same state and batches; with --time-limit a long
    training can be cut into pieces. One process, on one device or several (--fsdp). To try it on a
    CPU in a minute:

        python -m train.language_model --output runs/try --model tiny --context 128 --batch-size 8
            --precision float32 --steps 100 --warmup-steps 10
    """

    program: ClassVar[str] = "train.language_model"
    may_change: ClassVar[frozenset[str]] = WATCHING | {
        "export_dtype",
        "validate_every",
        "validation_batches",
        "workers",
    }

    # --- where ---
    output: Path = Path("runs/language-model")
    """Folder of the run: config, metrics, validation, checkpoints, export."""

    # --- model ---
    model: str = "10m"
    """Preset: 10m, 125m, 325m (SageBwd's), 1b, 8b or tiny; the vocabulary is the tokenizer's."""
    attention: Literal["exact", "int8"] = "exact"
    """Arithmetic of attention."""
    qk_norm: bool = True
    """RMS-normalize queries and keys, which INT8 attention needs at large batches."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters, norms, loss and optimizer are float32 always."""
    remat: Literal["none", "block", "keep_attention"] = "none"
    """What the backward pass computes again; keep_attention keeps what INT8 attention needs."""
    scan: bool = False
    """Compile one block and loop over the weights of all."""

    # --- data ---
    data: Path | None = None
    """File or folder of text, JSONL or Parquet; None: Python source found on this machine."""
    field: str = "text"
    """Field of JSONL, column of Parquet."""
    tokenizer: Path | None = None
    """Folder of a released tokenizer, or its tokenizer.json; None: bytes."""
    end_token: str | None = None
    """Token that ends a document, such as "<|endoftext|>"; None: what the folder says."""
    context: int = 1024
    """Tokens of a row."""
    batch_size: int = 32
    """Rows of an update, over all devices."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, to need less memory."""
    whole_documents: bool = False
    """Do not divide documents that fit a row; some padding is left."""
    across_documents: bool = False
    """Let tokens attend to the documents before theirs in a row."""
    held_out: float = 0.01
    """Share of the documents to validate with."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """What to do about files and lines that cannot be read."""
    workers: int = 0
    """Processes that encode text once, before the first run; 0: the main one does."""
    seed: int = 0
    """Decides initialization and order."""

    # --- optimization ---
    steps: int = 5000
    """Number of updates; the learning rate's schedule spans them."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to 0, or constant and then linear to 0."""
    decay_steps: int = 0
    """Length of the linear decay at the end of the constant schedule; 0: a fifth of the steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors do not decay."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradients."""
    ema_decay: float = 0.0
    """Largest decay of the averaged weights, which are validated and exported; 0: the last ones."""
    chunk: int = 4096
    """Positions whose logits are computed at a time."""

    # --- devices ---
    devices: int = 0
    """Use so many devices; 0: all."""
    fsdp: int = 1
    """Devices that share one copy of parameters and optimizer; the others repeat it."""
    peak_teraflops: float = 989.0
    """Dense bfloat16 speed of a device, for the MFU in the metrics; 989 is an H100's."""

    # --- stopping and saving ---
    time_limit: float | None = None
    """Seconds after which to stop, save and export; the schedule does not depend on it."""
    skips_in_a_row: int = 20
    """Abort after so many updates in a row that were not finite and were skipped."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints kept."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the exported weights."""

    # --- watching ---
    log_every: int = 20
    """Steps a row of metrics."""
    tensorboard: bool = False
    """Write TensorBoard event files, too."""
    validate_every: int = 1000
    """Steps between validations, which also follow the last step; 0: none."""
    validation_batches: int = 16
    """Batches of held-out text."""

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        self.check(
            choices=_CHOICES,
            smallest=_SMALLEST,
            positive=("gradient_clip", "peak_teraflops"),
            finite=("learning_rate", "weight_decay", "gradient_clip", "peak_teraflops"),
            shares=("ema_decay", "held_out"),
        )
        if self.held_out >= 1:
            raise ValueError(f"held_out must be less than 1, got held_out={self.held_out}")
        if self.validate_every and not self.held_out:
            raise ValueError("validation needs held_out above 0, or validate_every=0")
        if self.batch_size % self.accumulate:
            raise ValueError(
                "accumulate must divide batch_size, got "
                f"accumulate={self.accumulate} and batch_size={self.batch_size}"
            )


_CHOICES = {
    "attention": ("exact", "int8"),
    "precision": ("float32", "bfloat16"),
    "remat": ("none", "block", "keep_attention"),
    "damaged": ("refuse", "skip"),
    "schedule": ("cosine", "constant"),
    "export_dtype": ("float32", "bfloat16"),
}
_SMALLEST = {
    "context": 1,
    "batch_size": 1,
    "accumulate": 1,
    "workers": 0,
    "seed": 0,
    "steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "weight_decay": 0,
    "chunk": 1,
    "devices": 0,
    "fsdp": 1,
    "time_limit": 0,
    "skips_in_a_row": 1,
    "save_every": 1,
    "keep": 1,
    "log_every": 1,
    "validate_every": 0,
    "validation_batches": 1,
}
