"""What a run of `train.diffusion_lm` is made of: models, loss, tests, the export."""

import dataclasses
import json
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
)
from jaxgen.models import DiffusionLM
from jaxgen.sampling import (
    BlockDiffusion,
    MaskedDiffusion,
    ResidualContext,
    Sight,
    Unmasking,
    decode,
    diffusion_lm_loss,
)
from train.diffusion_lm_config import MODELS, Config
from train.problem_data import Table, verdict
from train.problems import EOS, Vocabulary
from train.state import Loss, Skeleton

_CARD = "card.json"


class Models(nnx.Module):
    """The model that is trained and, for RCD, the frozen one whose predictions are fed back."""

    def __init__(self, target: DiffusionLM, reference: DiffusionLM | None = None):
        self.target = target
        self.reference = reference


def make_models(config: Config) -> Models:
    """Returns new models, the reference of the shape that its folder says."""
    options: dict[str, Any] = {"dtype": config.precision}
    trained: dict[str, Any] = options | {"remat": config.remat, "attention": config.attention}
    rngs = nnx.Rngs(config.seed)
    target = DiffusionLM(dataclasses.replace(MODELS[config.model], **trained), rngs=rngs)
    if config.reference is None:
        return Models(target)
    path = config.reference / "config.json"
    shape = diffusion_lm_config_from_json(path.read_bytes(), str(path))
    return Models(target, DiffusionLM(dataclasses.replace(shape, **options), rngs=rngs))


def make_loss(skeleton: Skeleton, training: MaskedDiffusion) -> Loss:
    """Returns the loss of a batch of `tokens` and `maskable`."""

    def loss(params, frozen, batch, key):
        models = skeleton.join(params | frozen)
        return diffusion_lm_loss(
            key,
            models.target,
            batch["tokens"],
            batch["maskable"],
            training,
            reference=models.reference,
        )

    return loss


@dataclasses.dataclass(frozen=True)
class Answers:
    """What became of the problems of a table.

    Attributes:
        correct: whether the final answer is right.
        steps_correct: whether the steps that lead there are.
        tokens: the answers, the end of the text after their ends.
        lengths: tokens of each, with the end.
        steps: steps of each: predictions after which tokens were settled.
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
        for rows, part in zip((tokens, lengths, steps), decoded, strict=False):
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


def save_export(folder: Path, model: DiffusionLM, card: Mapping[str, Any], dtype: str) -> None:
    """Writes a model as transformers names its parts, with a card beside it."""
    graph, state = nnx.split(model)
    cast = nnx.merge(graph, jax.tree.map(lambda array: array.astype(dtype), state))
    save_diffusion_lm_folder(folder, cast)
    write_atomically(folder / _CARD, [(json.dumps(card, indent=2) + "\n").encode()])


def load_export(folder: Path, *, precision: str) -> tuple[DiffusionLM, dict[str, Any]]:
    """Reads what `save_export` wrote, with float32 parameters: a model and its card.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, or a model with another vocabulary.
    """
    folder = Path(folder)
    model = load_diffusion_lm_folder(folder, dtype=precision, param_dtype=jnp.float32)
    if model.config.vocabulary_size != Vocabulary.size:
        raise ValueError(
            f"{folder}: a model of problems has {Vocabulary.size} tokens, "
            f"got {model.config.vocabulary_size}"
        )
    card = parse_json_object((folder / _CARD).read_bytes(), str(folder / _CARD))
    return model, card
