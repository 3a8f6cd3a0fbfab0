"""The options of `python -m train.language_model`, one frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

from jaxgen.models import LANGUAGE_MODEL_PRESETS, LanguageModelConfig
from jaxgen.models.language_model import Remat
from train.options import Options

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


def preset(model: str) -> LanguageModelConfig:
    """Return the configuration of a preset.

    Raises:
        ValueError: There is none of this name.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    return MODELS[model]


@dataclass(frozen=True)
class Config(Options):
    """Pretrain a language model, with attention in bfloat16 or in INT8 (SageBwd).

    A Llama-style decoder predicts the next token of text packed into rows, without attention
    across documents. The text is yours, or Python source found on this machine.

    The same command resumes a stopped run with the same state and batches; with --time-limit a long
    training can be cut into pieces. It runs on one device or many (--fsdp, --tensor,
    --context-parallel), of one process or of several (--coordinator). To try it on a CPU in a
    minute:

        python -m train.language_model --output runs/try --model tiny --context 128 --batch-size 8
            --precision float32 --steps 100 --warmup-steps 10
    """

    program: ClassVar[str] = "train.language_model"

    # --- where ---
    output: Path = Path("runs/language-model")
    """Folder of the run: config, metrics, validation, checkpoints, export."""

    # --- model ---
    model: str = "10m"
    """Preset: 10m, 125m, 325m (SageBwd's), 1b, 8b or tiny; the vocabulary is the tokenizer's."""
    attention: Literal["exact", "int8"] = "exact"
    """Arithmetic of attention."""
    smooth_keys: bool = True
    """Quantize keys less their mean in INT8 attention, which needs it; off for experiments."""
    smooth_queries: bool = False
    """Quantize queries less their mean, too; for experiments, without kernels."""
    qk_norm: bool = True
    """RMS-normalize queries and keys, which INT8 attention needs at large batches."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters, norms, loss and optimizer are float32 always."""
    remat: Remat = "none"
    """What the backward pass computes again to save memory: all of a block; keep_attention, all but
    attention; keep_products, only what is cheap, which is most of the memory."""
    scan: bool = False
    """Compile one block and loop over the weights of all."""

    # --- data ---
    data: Path | None = None
    """File or folder of text, JSONL or Parquet; None: Python source found on this machine."""
    kind: Literal["text", "jsonl", "parquet"] | None = None
    """What the files hold: a text each, a JSON object a line, or Parquet; None: what their suffixes
    say, of which a folder must have one kind (README, LICENSE and the like beside data are no
    data)."""
    pattern: str | None = None
    """Files of the folder to read, such as "**/*.tex"; None: those with a suffix of the kind."""
    field: str = "text"
    """Field of JSONL, column of Parquet."""
    tokenizer: Path | None = None
    """Folder of a released tokenizer, or its tokenizer.json; None: bytes."""
    end_token: str | None = None
    """Token that ends a document, such as "<|endoftext|>"; None: what the folder says."""
    vocabulary_multiple: int = 128
    """Round the vocabulary up to a multiple of it, so that tiles of the head are whole."""
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
    tensor: int = 1
    """Devices that share the heads and the hidden units of each sequence."""
    context_parallel: int = 1
    """Devices that share the tokens of each sequence; tensor times this divides the key heads."""
    coordinator: str | None = None
    """Several processes, one a host: HOST:PORT of process 0, or "auto": as SLURM, Open MPI or
    Kubernetes say. Start the same command in each."""
    processes: int = 1
    """Number of processes; not with "auto"."""
    process: int = 0
    """Which of them this one is, from 0; not with "auto"."""
    peak_teraflops: float = 989.0
    """Dense bfloat16 speed of a device, for the MFU in the metrics; 989 is an H100's."""

    # --- stopping and saving ---
    time_limit: float | None = None
    """Seconds after which to stop, save and export; the schedule does not depend on it."""
    skips_in_a_row: int = 20
    """Abort after so many updates in a row that were skipped, not being finite or spiking."""
    spike_factor: float = 0.0
    """Skip an update whose gradient norm is more than this times its running average; 0: none."""
    hung_after: float | None = 600.0
    """Report after so many seconds without a step's result where the program stands; None: never.
    One process of several then ends, after as long again, with exit code 75."""
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
    statistics_every: int = 0
    """Steps between rows of attention.jsonl, which also follow the last step: for each layer sigma
    of queries and keys, and the errors of INT8 attention on a few rows of held-out text; 0: none.
    """
    profile_steps: tuple[int, int] | None = None
    """First and last step of a trace in the folder profile, for ui.perfetto.dev or TensorBoard."""

    def __post_init__(self):
        preset(self.model)
        self.check(
            choices=_CHOICES,
            smallest=_SMALLEST,
            positive=("gradient_clip", "peak_teraflops"),
            finite=(
                "learning_rate",
                "weight_decay",
                "gradient_clip",
                "peak_teraflops",
                "spike_factor",
            ),
            shares=("ema_decay", "held_out"),
        )
        if self.data is None and (self.kind, self.pattern) != (None, None):
            raise ValueError(
                f"kind and pattern need data, got kind={self.kind} and pattern={self.pattern}"
            )
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor must be more than 1, or 0, got spike_factor={self.spike_factor}"
            )
        if self.held_out >= 1:
            raise ValueError(f"held_out must be less than 1, got held_out={self.held_out}")
        if self.validate_every and not self.held_out:
            raise ValueError("validation needs held_out above 0, or validate_every=0")
        if self.statistics_every and not self.held_out:
            raise ValueError("statistics need held_out above 0, or statistics_every=0")
        if self.batch_size % self.accumulate:
            raise ValueError(
                "accumulate must divide batch_size, got "
                f"accumulate={self.accumulate} and batch_size={self.batch_size}"
            )


_CHOICES = {
    "kind": (None, "text", "jsonl", "parquet"),
    "attention": ("exact", "int8"),
    "precision": ("float32", "bfloat16"),
    "remat": get_args(Remat),
    "damaged": ("refuse", "skip"),
    "schedule": ("cosine", "constant"),
    "export_dtype": ("float32", "bfloat16"),
}
_SMALLEST = {
    "vocabulary_multiple": 1,
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
    "tensor": 1,
    "context_parallel": 1,
    "processes": 1,
    "process": 0,
    "time_limit": 0,
    "skips_in_a_row": 1,
    "spike_factor": 0,
    "save_every": 1,
    "keep": 1,
    "log_every": 1,
    "validate_every": 0,
    "statistics_every": 0,
    "validation_batches": 1,
}
