"""The options of `python -m train.diffusion_lm`, one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from jaxgen.models import DiffusionLMConfig
from jaxgen.sampling import MaskedDiffusion, ResidualContext
from train.options import WATCHING, Options
from train.problem_data import TASKS, Layout
from train.problems import MASK, Vocabulary


def _preset(
    num_layers: int, num_heads: int, ffn_dim: int, *, head_dim: int = 64, num_kv_heads: int = 0
) -> DiffusionLMConfig:
    return DiffusionLMConfig(
        num_layers=num_layers,
        width=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocabulary_size=Vocabulary.size,
        mask_id=MASK,
        qk_norm=True,
    )


MODELS: Mapping[str, DiffusionLMConfig] = MappingProxyType(
    {
        "tiny": _preset(2, 4, 128, head_dim=16, num_kv_heads=2),
        "small": _preset(4, 4, 384, head_dim=32),
        "medium": _preset(6, 4, 704),
        "shallow-medium": _preset(3, 6, 896),
        "shallow": _preset(3, 9, 1536),
        "shallowest": _preset(2, 11, 1856),
        "base": _preset(6, 6, 1024),
    }
)
"""Models for problems: tiny, small, medium and base of 0.1, 0.9, 4.8 and 10.6 million parameters.

The shallow ones have 3 layers and 4.9 and 12.0 million, the shallowest 2 and 11.8: so few that one
pass cannot work out everything.
"""


@dataclass(frozen=True)
class Config(Options):
    """Train a diffusion language model on problems that are generated and checked exactly.

    Problems are several steps of arithmetic with every step written out, or Sudokus. The model is
    the transformer of SDAR and LLaDA, small, one token a character. Trained as SDAR is (the
    default), it answers block by block; --sight bidirectional trains as LLaDA is. --task text
    fine-tunes a released model (--start-from its folder) on prompts and answers of your own.

    Residual Context Diffusion takes two runs. The first makes a standard model; the second starts
    from its export and mixes its predictions into the inputs (--reference). The baseline of equal
    data and steps is the second run without --reference:

        python -m train.diffusion_lm --output runs/first
        python -m train.diffusion_lm --output runs/rcd --start-from runs/first/export
            --reference runs/first/export
        python -m train.diffusion_lm --output runs/seqd --start-from runs/first/export

    What gained most on these problems takes no reference (docs/residual_context.md):

        python -m train.diffusion_lm --output runs/rcd --start-from runs/first/export
            --own-passes 2 --learn-every-pass --weighting one --stale-share 1

    The same command resumes a stopped run with the same state, batches and masks. To try it on a
    CPU in a minute:

        python -m train.diffusion_lm --output runs/try --model tiny --levels 1 --problems 2000
            --precision float32 --steps 200 --warmup-steps 20 --batch-size 32 --test-problems 64
    """

    program: ClassVar[str] = "train.diffusion_lm"
    may_change: ClassVar[frozenset[str]] = WATCHING | {"test_problems"}

    # --- where ---
    output: Path = Path("runs/diffusion-lm")
    """Folder of the run: config, metrics, validation, checkpoints, export."""

    # --- model ---
    model: str = "base"
    """Preset: base (10.6 million parameters), medium (4.8), small (0.9) or tiny (0.1), of 6, 6, 4
    and 2 layers; shallow (12.0) and shallow-medium (4.9) have 3, shallowest (11.8) has 2. For
    --task text that of --start-from is taken."""
    attention: Literal["exact", "int8"] = "exact"
    """Arithmetic of the attention of --sight bidirectional; block_causal is exact always."""
    start_from: Path | None = None
    """Export of another run whose weights are the start, with a new optimizer; None: new ones."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters, norms, loss and optimizer are float32 always."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    # --- objective ---
    sight: Literal["block_causal", "bidirectional"] = "block_causal"
    """What a token sees: its block and those before (SDAR), or everything (LLaDA)."""
    block_length: int = 32
    """Tokens of a block, counted from the start of the prompt; for block_causal. Answers to
    problems end with a whole block: the model learns the ends of text that fill it."""
    rate_per_block: bool = False
    """A mask rate for each block (BD3-LM) instead of one for each row (SDAR, LLaDA)."""
    average: Literal["row", "token"] = "token"
    """Average of the loss: within rows first (LLaDA), or over all tokens (SDAR, BD3-LM)."""
    reference: Path | None = None
    """Export of the frozen model whose predictions are fed back (RCD); None: a standard model,
    unless own_passes feeds back its own."""
    own_passes: int = 0
    """Feed back what the model itself predicts, in up to so many passes before the one that
    learns, instead of a reference; 0: it does not."""
    learn_every_pass: bool = False
    """Those passes learn, too: the loss is the mean over all, and a step costs as much as
    own_passes + 1 of a standard model."""
    weighting: Literal[
        "entropy", "confidence", "fixed", "one", "one_minus_entropy", "one_minus_confidence"
    ] = "entropy"
    """Weight of what is fed back; the others are ablations."""
    source: Literal["full", "top1"] = "full"
    """Feed back the whole prediction, or the likeliest token."""
    stop_vector: bool = False
    """No gradient to the embeddings through what is fed back."""
    cold_share: float = 0.0
    """Share of the problems that are fed back nothing, as at the first step of a block: 0 is the
    paper's. Models of few tokens, whose residuals are large, need it to start from nothing."""
    stale_share: float = 0.0
    """Hide up to so large a share of the known tokens from that prediction, as decoding feeds back
    what was predicted before the last tokens were settled; 0 is the paper's."""

    # --- data ---
    task: Literal["arithmetic", "sudoku", "text"] = "arithmetic"
    """What the problems are; text: prompts and answers from --data."""
    data: Path | None = None
    """File of text: a JSON object on each line, with the strings prompt and answer."""
    chat: bool = True
    """Prompts of text are a user's messages, in the chat format of the model."""
    mask_id: int | None = None
    """The token of --task text that stands for one not known yet, where the configuration of
    --start-from names none: that of a Qwen3, an autoregressive model made a diffusion model."""
    max_tokens: int = 2048
    """Longer texts are left out."""
    levels: tuple[int, ...] = (1, 2, 3, 4)
    """Levels of the problems: operations of arithmetic (1 to 6), or from easy to hard Sudokus
    (1 to 5); equally many problems of each."""
    problems: int = 200_000
    """Number of problems to train on, epoch after epoch; made when the run starts."""
    batch_size: int = 256
    """Problems a step, over all devices."""
    workers: int = 0
    """Processes that make problems; 0: the main one does."""
    seed: int = 0
    """Decides initialization, order and masks; the problems are always the same."""

    # --- optimization ---
    steps: int = 10_000
    """Number of updates; the learning rate's schedule spans them."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
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
    """Largest decay of the averaged weights, which are the ones tested and exported."""

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
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the exported weights."""

    # --- watching ---
    log_every: int = 50
    """Steps a row of metrics."""
    tensorboard: bool = False
    """Write TensorBoard event files, too."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a trace in the folder profile, for ui.perfetto.dev or TensorBoard."""
    validate_every: int = 2000
    """Steps between tests on problems of the split validation, also at the end; 0: none."""
    test_problems: int = 512
    """Number of these problems; of text, which is tested by its loss, the last so many are held
    out."""
    test_threshold: float = 0.9
    """Tokens surer than this are settled at once when they are answered."""

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.task in TASKS:
            Layout.of(self.task, self.levels)
        elif self.task == "text" and None in (self.data, self.start_from):
            raise ValueError(
                "task=text needs data and start_from, got "
                f"data={self.data} and start_from={self.start_from}"
            )
        self.check(
            choices=_CHOICES,
            smallest=_SMALLEST,
            finite=("learning_rate", "weight_decay", "gradient_clip", "test_threshold"),
            shares=("cold_share", "stale_share", "ema_decay", "test_threshold"),
        )
        if self.mask_id is not None and self.task != "text":
            raise ValueError(f"mask_id is of task=text, got mask_id={self.mask_id}")
        if self.attention != "exact" and self.sight == "block_causal":
            raise ValueError(
                'attention="int8" needs sight="bidirectional": the attention that trains blocks '
                "is exact"
            )
        if self.own_passes and self.reference is not None:
            raise ValueError(
                f"own_passes={self.own_passes} takes no reference, got reference={self.reference}"
            )
        if not self.feeds_back:
            given = [name for name in _FED_BACK if getattr(self, name) != _FED_BACK[name]]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} decide what is fed back, got reference=None and "
                    "own_passes=0"
                )
        self.training()

    @property
    def feeds_back(self) -> bool:
        """Whether predictions are mixed into the inputs: RCD."""
        return self.own_passes > 0 or self.reference is not None

    @property
    def row_block(self) -> int:
        """Problems fill rows up to a multiple of so many tokens."""
        return self.block_length if self.sight == "block_causal" else 1

    def training(self) -> MaskedDiffusion:
        """Returns the objective."""
        residual = None
        if self.feeds_back:
            residual = ResidualContext(weighting=self.weighting, source=self.source)
        return MaskedDiffusion(
            sight=self.sight,
            block_length=self.block_length,
            rate_per_block=self.rate_per_block,
            average=self.average,
            residual=residual,
            stop_vector=self.stop_vector,
            own_passes=self.own_passes,
            learn_every_pass=self.learn_every_pass,
            cold_share=self.cold_share,
            stale_share=self.stale_share,
        )


_FED_BACK = {
    "weighting": "entropy",
    "source": "full",
    "stop_vector": False,
    "learn_every_pass": False,
    "cold_share": 0.0,
    "stale_share": 0.0,
}
_CHOICES = {
    "attention": ("exact", "int8"),
    "precision": ("float32", "bfloat16"),
    "task": (*TASKS, "text"),
    "schedule": ("cosine", "constant"),
    "export_dtype": ("float32", "bfloat16"),
}
_SMALLEST = {
    "own_passes": 0,
    "problems": 1,
    "max_tokens": 1,
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
    "test_problems": 1,
}
