"""What a run of `train.diffusion_lm` is made of: models, loss, tests, the export."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.checkpoints import (
    diffusion_lm_config_from_json,
    load_diffusion_lm_folder,
    parse_json_object,
    save_diffusion_lm_folder,
    write_atomically,
    write_json,
)
from jaxgen.models import DiffusionLM, DiffusionLMConfig
from jaxgen.pipelines.chat import CHATML, LLADA
from jaxgen.pipelines.text_folder import check_mask, check_tokenizer
from jaxgen.sampling import (
    BlockDiffusion,
    MaskedDiffusion,
    ResidualContext,
    Sight,
    Unmasking,
    decode,
    diffusion_lm_loss,
)
from jaxgen.tokenizers import TextTokenizer
from train.diffusion_lm_config import MODELS, Config
from train.problem_data import Table, verdict
from train.problems import EOS
from train.rows import Rows
from train.state import Loss, Skeleton
from train.text_data import read_rows

_CARD = "card.json"
_ENDS = ("eos_token_id", "pad_token_id")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


class Models(nnx.Module):
    """The model that is trained and, for RCD, the frozen one whose predictions are fed back."""

    def __init__(self, target: DiffusionLM, reference: DiffusionLM | None = None):
        self.target = target
        self.reference = reference


def make_models(config: Config) -> Models:
    """Returns new models; a reference, and what is fine-tuned, have the shape of their folder."""
    options: dict[str, Any] = {"dtype": config.precision}
    trained: dict[str, Any] = options | {"remat": config.remat, "attention": config.attention}
    rngs, target = nnx.Rngs(config.seed), MODELS[config.model]
    if config.task == "text" and config.start_from is not None:
        target = shape_of(config.start_from, config.mask_id)
    target = DiffusionLM(dataclasses.replace(target, **trained), rngs=rngs)
    if config.reference is None:
        return Models(target)
    shape = dataclasses.replace(shape_of(config.reference, config.mask_id), **options)
    return Models(target, DiffusionLM(shape, rngs=rngs))


def shape_of(folder: Path, mask_id: int | None = None) -> DiffusionLMConfig:
    """Returns the configuration of the model in a folder, with another mask token if one is given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged one, or one without a mask token.
    """
    path = folder / "config.json"
    return diffusion_lm_config_from_json(path.read_bytes(), str(path), mask_id=mask_id)


def make_loss(skeleton: Skeleton, training: MaskedDiffusion) -> Loss:
    """Returns the loss of a batch of `tokens`, `maskable` and `lengths`."""

    def loss(params, frozen, batch, key):
        models = skeleton.join(params | frozen)
        return diffusion_lm_loss(
            key,
            models.target,
            batch["tokens"],
            batch["maskable"],
            training,
            lengths=batch["lengths"],
            reference=models.reference,
        )

    return loss


def mean_loss(skeleton: Skeleton, training: MaskedDiffusion, arrays: Any, rows: Rows) -> float:
    """Returns the mean loss of rows, one after the other, with masks that are always the same."""
    total = 0.0
    for number in range(len(rows)):
        batch = rows[number : number + 1].batch()
        total += float(_one_loss(skeleton, training, arrays, batch, jax.random.key(number)))
    return total / len(rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_loss(skeleton: Skeleton, training: MaskedDiffusion, arrays, batch, key) -> jax.Array:
    return make_loss(skeleton, training)(arrays, {}, batch, key)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What became of the problems of a table.

    Attributes:
        correct: whether the final answer is right.
        steps_correct: whether the steps that lead there are.
        tokens: the answers, the end of the text after their ends.
        lengths: tokens of each, with the end.
        steps: steps of each: predictions after which tokens were settled, those that fill its last
            block with ends of text among them, and with a residual whose `init` is "self" or
            "reference" the pass before the first of each block.
    """

    correct: np.ndarray
    steps_correct: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    steps: np.ndarray

    def summary(self) -> dict[str, float]:
        """Returns shares and means: accuracy, steps of an answer, tokens of a step."""
        return {
            "accuracy": float(self.correct.mean()),
            "steps_correct": float(self.steps_correct.mean()),
            "steps": float(self.steps.mean()),
            "tokens_per_step": float(self.lengths.sum() / self.steps.sum()),
        }


def make_decoder(
    sight: Sight, block_length: int, threshold: float, residual: ResidualContext | None
) -> BlockDiffusion:
    """Returns how problems are answered: greedily, tokens surer than a threshold at once.

    Args:
        sight: what the model saw when it was trained.
        block_length: likewise.
        threshold: at least one token is settled at each step; 1 settles no more.
        residual: what is fed back.
    """
    return BlockDiffusion(
        block_length=block_length,
        sight=sight,
        unmasking=Unmasking(threshold=threshold),
        residual=residual,
        stop_ids=(EOS,),
        pad_id=EOS,
    )


def answer(
    model: DiffusionLM,
    table: Table,
    decoder: BlockDiffusion,
    *,
    seed: int = 0,
    batch_size: int = 512,
    reference: DiffusionLM | None = None,
) -> Answers:
    """Answers all problems of a table and checks each answer.

    Args:
        model: predicts tokens.
        table: the problems.
        decoder: how they are answered.
        seed: for decoders that draw; a problem keeps its number whatever the batch.
        batch_size: problems at a time.
        reference: for residuals that begin with another model's predictions.
    """
    count = len(table.problems)
    batch_size = min(batch_size, count)
    tokens, lengths, steps = [], [], []
    for first in range(0, count, batch_size):
        # The last batch begins early enough to be whole: a program is for one shape.
        first = min(first, count - batch_size)
        fresh = slice(len(tokens) * batch_size - first, None)
        decoded = decode(
            model,
            jnp.asarray(table.prompts[first : first + batch_size]),
            decoder,
            new_tokens=table.layout.answer,
            seeds=seed + first,
            reference=reference,
        )
        counted = decoded.steps + _passes_before(decoder, table.layout.prompt, decoded.lengths)
        parts = (decoded.tokens, decoded.lengths, counted)
        for rows, part in zip((tokens, lengths, steps), parts, strict=True):
            rows.append(np.asarray(part)[fresh])
    answers = np.concatenate(tokens)
    verdicts = [verdict(problem, row) for problem, row in zip(table.problems, answers, strict=True)]
    return Answers(
        np.array([verdict.correct for verdict in verdicts]),
        np.array([verdict.steps_correct for verdict in verdicts]),
        answers,
        np.concatenate(lengths),
        np.concatenate(steps),
    )


def _passes_before(decoder: BlockDiffusion, prompt: int, lengths: jax.Array) -> jax.Array:
    """Returns for answers of these lengths the passes that only make the first residuals."""
    if decoder.residual is None or decoder.residual.init not in ("self", "reference"):
        return jnp.zeros_like(lengths)
    block = decoder.block_length
    known = prompt % block if decoder.sight == "block_causal" else 0
    return -(-(known + jnp.maximum(lengths, 1)) // block)


def save_export(
    folder: Path,
    model: DiffusionLM,
    card: Mapping[str, Any],
    dtype: str,
    *,
    beside: Path | None = None,
    block_length: int | None = None,
) -> None:
    """Writes a model as transformers names its parts, with a card.

    Args:
        folder: where to.
        model: what was trained.
        card: what is to be known of it.
        dtype: of the weights.
        beside: a folder whose tokenizer, ends and padding belong to the model.
        block_length: tokens of a block, for who decodes; None: nothing is said of it.
    """
    graph, state = nnx.split(model)
    cast = nnx.merge(graph, jax.tree.map(lambda array: array.astype(dtype), state))
    save_diffusion_lm_folder(folder, cast)
    _add_to_config(folder, beside, block_length)
    for name in _TOKENIZER_FILES if beside is not None else ():
        if beside is not None and (beside / name).is_file():
            write_atomically(folder / name, [(beside / name).read_bytes()])
    write_json(folder / _CARD, card)


def _add_to_config(folder: Path, beside: Path | None, block_length: int | None) -> None:
    """Adds to `config.json` what decoding a model needs to know besides its shape."""
    path = folder / "config.json"
    values = parse_json_object(path.read_bytes(), str(path))
    if beside is not None:
        theirs = parse_json_object((beside / path.name).read_bytes(), str(beside / path.name))
        values |= {name: theirs[name] for name in _ENDS if name in theirs}
    if block_length is not None:
        values["block_size"] = block_length
    write_json(path, values)


def load_export(
    folder: Path, *, precision: str, mask_id: int | None = None
) -> tuple[DiffusionLM, dict[str, Any]]:
    """Reads what `save_export` wrote, or a released model, with float32 parameters.

    Args:
        folder: of either.
        precision: dtype of the computation.
        mask_id: the mask token of a folder that names none.

    Returns:
        The model and its card, empty for a released one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file.
    """
    folder = Path(folder)
    model = load_diffusion_lm_folder(
        folder, dtype=precision, param_dtype=jnp.float32, mask_id=mask_id
    )
    path = folder / _CARD
    return model, parse_json_object(path.read_bytes(), str(path)) if path.is_file() else {}


def open_rows(config: Config) -> tuple[Rows, Rows, int]:
    """Returns what a run on text learns from, what it does not, and how many were left out.

    The last texts of the file are not learned. Those that are too long are left out.

    Raises:
        FileNotFoundError: no such file, or a model without a tokenizer.
        ValueError: a damaged file, fewer texts than are held out, a tokenizer that is not the
            model's, or a `sight` that the model is not decoded with.
    """
    assert config.data is not None
    assert config.start_from is not None
    shape = shape_of(config.start_from, config.mask_id)
    sight = "block_causal" if shape.qk_norm else "bidirectional"
    if config.sight != sight:
        raise ValueError(
            f"the model in {config.start_from} answers with sight={sight!r} and is to be trained "
            f"so, got sight={config.sight!r}"
        )
    tokenizer = TextTokenizer.from_folder(config.start_from)
    check_tokenizer(shape, tokenizer)
    check_mask(shape, tokenizer)
    chat = CHATML if shape.qk_norm else LLADA
    rows, dropped = read_rows(
        config.data,
        tokenizer,
        max_tokens=config.max_tokens,
        block_length=config.block_length,
        chat=chat if config.chat else None,
        mask_id=shape.mask_id,
    )
    kept = len(rows) - config.test_problems
    if kept < 1:
        raise ValueError(
            f"{config.data} has {len(rows)} texts of at most max_tokens={config.max_tokens} tokens "
            f"({dropped} longer ones), not more than test_problems={config.test_problems}"
        )
    return rows[:kept], rows[kept:], dropped
