"""What replacing self-attention is made of: the layers, the two losses, errors of attention."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from jaxgen.layers import (
    BasisParam,
    MixingParam,
    ProjectionParam,
    RouterParam,
    SLA1Attention,
    SparseLinearAttention,
    exact_attention,
    mixing_of_sums,
)
from jaxgen.models.wan import Attend, WanConfig
from jaxgen.sampling import LogitNormal, add_noise
from train.clips import Batch
from train.sla2_config import METHODS, Config
from train.state import Arrays, Loss, Skeleton, names_of, take_apart
from train.text_to_video_parts import (
    Models,
    as_pictures,
    load_export,
    predict,
    to_floats,
)

type _Inputs = tuple[Array, Array, Array]
type Statistic = Callable[[Attend, _Inputs, Array], Any]

_TEACHER = "teacher."


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A pretrained model whose self-attention was replaced.

    Attributes:
        stage1: Its skeleton with a soft choice of blocks, where there are routers.
        stage2: With the hard choice, as it is fine-tuned.
        evaluation: As it is validated.
        arrays: The arrays of all three, by name.
        routers: Names of the routers, and of the bases of heads.
        bases: Names of the latter.
        projections: Names of the projections of SLA.
        mixing: Names of the mixing logits, block by block.
    """

    stage1: Skeleton
    stage2: Skeleton
    evaluation: Skeleton
    arrays: Arrays
    routers: frozenset[str]
    bases: frozenset[str]
    projections: frozenset[str]
    mixing: tuple[str, ...]


def attention_factory(config: Config, model: WanConfig, tokens: int) -> Callable[[int], Attend]:
    """Return what makes the self-attention of a block, as it is fine-tuned.

    Args:
        config: The experiment.
        model: The pretrained model.
        tokens: Tokens of a clip.
    """
    method = METHODS[config.method]
    cut = {"kept_fraction": config.kept_fraction, "quantize": method.quantize}
    cut |= {"block_q": config.block_q, "block_k": config.block_k}

    def make(number: int) -> Attend:
        match method.kind:
            case "full":
                return exact_attention
            case "sla1":
                sla1 = {"feature_map": config.feature_map, "complement": config.complement}
                return SLA1Attention(model.head_dim, **cut, **sla1)
            case _:
                return SparseLinearAttention(
                    model.num_heads,
                    model.head_dim,
                    tokens,
                    initial_logit=method.initial_logit,
                    per_head_routers=config.per_head_routers,
                    learn_basis=config.learn_basis,
                    gradient_scores=config.gradient_scores,
                    **cut,
                )

    return make


def replace_attention(config: Config, teacher: Models, shape: tuple[int, int, int]) -> Replaced:
    """Load the pretrained model with another self-attention.

    Args:
        config: The experiment.
        teacher: The pretrained model as it is.
        shape: Frames, height and width of the clips.
    """
    model = teacher.transformer.config
    tokens = int(np.prod(shape)) // model.patch_pixels
    attend = attention_factory(config, model, tokens)
    models, _, _ = load_export(config.pretrained, precision=config.precision, attend=attend)
    cube = model.token_cube if config.token_cube is None else config.token_cube
    options = {"remat": config.remat, "scan": config.scan_stage2, "token_cube": cube}
    models = _changed(models, options)
    skeleton, arrays = take_apart(models)
    mixing = names_of(models, MixingParam)
    evaluated = {"quantize": METHODS[config.method].quantize_evaluation}
    scan = {"scan": config.scan}
    return Replaced(
        stage1=take_apart(_changed(models, scan, selection="soft"))[0],
        stage2=skeleton,
        evaluation=take_apart(_changed(models, scan, **evaluated))[0],
        arrays=arrays,
        routers=names_of(models, RouterParam),
        bases=names_of(models, BasisParam),
        projections=names_of(models, ProjectionParam),
        mixing=tuple(name for name in skeleton.names if name in mixing),
    )


def _changed(models: Models, transformer_options: dict[str, Any], **options: Any) -> Models:
    """Return models whose SLA2 layers have other options; full attention and SLA as they are."""
    models = nnx.clone(models)
    transformer = models.transformer
    transformer.config = dataclasses.replace(transformer.config, **transformer_options)
    for block in transformer.blocks:
        layer = block.self_attention.attend
        if isinstance(layer, SparseLinearAttention):
            block.self_attention.attend = nnx.data(layer.with_options(**options))
    return models


class _Recorder(nnx.Module):
    """Full attention that keeps what a function makes of a layer, its inputs and the result."""

    def __init__(self, layer: Attend, statistic: Statistic):
        self.layer, self.statistic = layer, statistic

    def __call__(self, query: Array, key: Array, value: Array) -> Array:
        full = exact_attention(query, key, value)
        self.found = nnx.Intermediate(self.statistic(self.layer, (query, key, value), full))
        return full


def statistics_of_attention(
    models: Models, statistic: Statistic, noisy: Array, sigma: Array, tokens: Array
) -> Any:
    """Run the models with full attention and look at the layers that are to replace it.

    Args:
        models: Whose blocks have those layers; they are replaced.
        statistic: Called with a layer, its query, key and value, and full attention of these.
        noisy: Clips.
        sigma: Their noise levels.
        tokens: Their captions.

    Returns:
        What `statistic` returned, stacked over the blocks.
    """
    blocks = list(models.transformer.blocks)
    for block in blocks:
        block.self_attention.attend = _Recorder(block.self_attention.attend, statistic)
    predict(models, noisy, sigma, tokens)
    found = [block.self_attention.attend.found.get_value() for block in blocks]
    return jax.tree.map(lambda *values: jnp.stack(values), *found)


def noised(clips: Array, key: Array, levels: LogitNormal) -> tuple[Array, Array, Array]:
    """Return noisy clips, noise and noise levels."""
    sigma_key, noise_key = jax.random.split(key)
    sigma = levels.sample(sigma_key, len(clips))
    noise = jax.random.normal(noise_key, clips.shape, jnp.float32)
    noisy = add_noise(as_pictures(clips), as_pictures(noise), sigma)
    return noisy.reshape(clips.shape), noise, sigma


def _relative(found: Array, wanted: Array) -> Array:
    """Return the squared error as a share of what was wanted."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.mean(jnp.square(found - wanted)) / jnp.mean(jnp.square(wanted))


def make_router_loss(skeleton: Skeleton, levels: LogitNormal) -> Loss:
    """Return the loss of stage 1: the mean over blocks of the relative squared error of attention.

    It is the squared error of the paper, each block divided by the size of its full attention, so
    that the number means something; the blocks share no parameter.
    """

    def loss(params, frozen, batch, key):
        models = skeleton.join(params | frozen)
        noisy, _, sigma = noised(to_floats(batch["video"]), key, levels)
        tokens = batch["tokens"]
        return jnp.mean(statistics_of_attention(models, _remat_error, noisy, sigma, tokens))

    return loss


def make_router_optimizer(
    config: Config, routers: frozenset[str], rate: optax.Schedule
) -> optax.GradientTransformation:
    """Return Adam with a smaller rate for the routers; nothing decays."""

    def is_router(params: Any) -> Any:
        return {name: name in routers for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adam(rate, b1=config.betas[0], b2=config.betas[1]),
        optax.masked(optax.scale(config.router_projection_rate), is_router),
    )


def attention_errors(
    config: Config, replaced: Replaced, arrays: Arrays, batch: Batch
) -> list[float]:
    """Return the relative L2 error of attention in each block, on fixed noise.

    Args:
        config: The experiment.
        replaced: The model; the inputs of attention are those of full attention.
        arrays: Its arrays.
        batch: `video` and `tokens`.
    """
    squares, _ = _measure(replaced.evaluation, config.noise_levels(), arrays, dict(batch), 0)
    return np.sqrt(np.asarray(squares)).tolist()


def calibrated(config: Config, replaced: Replaced, arrays: Arrays, clips: Batch) -> Arrays:
    """Return the arrays with the mixing logits of least squares.

    Args:
        config: The experiment; `router_batch_size` clips are computed at once.
        replaced: The model; the inputs of attention are those of full attention.
        arrays: Its arrays.
        clips: `video` and `tokens`, of which whole batches are used. Ratios of single blocks of
            queries need many.
    """
    skeleton, levels = replaced.evaluation, config.noise_levels()
    size, sums = min(config.router_batch_size, len(clips["video"])), None
    for portion in range(len(clips["video"]) // size):
        part = {name: x[portion * size :][:size] for name, x in clips.items()}
        _, found = _measure(skeleton, levels, arrays, part, config.seed + portion)
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    assert sums is not None  # there is a clip
    best = mixing_of_sums(*sums)
    blocks = [int(name.split(".blocks.")[1].split(".")[0]) for name in replaced.mixing]
    return arrays | {name: best[block] for name, block in zip(replaced.mixing, blocks, strict=True)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(skeleton: Skeleton, levels: LogitNormal, arrays, batch, seed) -> tuple[Array, Any]:
    """Return squared relative errors and the sums of least squares; one program for both."""
    noisy, _, sigma = noised(to_floats(batch["video"]), jax.random.key(seed), levels)
    models = skeleton.join(arrays)
    return statistics_of_attention(models, _error_and_sums, noisy, sigma, batch["tokens"])


def _error(layer: Attend, inputs: _Inputs, full: Array) -> Array:
    return _relative(layer(*inputs), full)


def _remat_error(layer: Attend, inputs: _Inputs, full: Array) -> Array:
    """Return the error, so that a backward pass keeps one block's activations at a time."""
    return jax.checkpoint(lambda full, *inputs: _error(layer, inputs, full))(full, *inputs)


def _error_and_sums(layer: Attend, inputs: _Inputs, full: Array) -> tuple[Array, Any]:
    sums = ()
    if isinstance(layer, SparseLinearAttention):
        sums = layer.mixing_sums(*inputs, full)
    return _error(layer, inputs, full), sums


def with_teacher(arrays: Arrays, teacher: Arrays) -> Arrays:
    """Return the arrays of student and teacher together."""
    return arrays | {_TEACHER + name: array for name, array in teacher.items()}


def make_distillation_loss(student: Skeleton, teacher: Skeleton, levels: LogitNormal) -> Loss:
    """Return the mean squared distance from the velocity of the teacher, on noisy clips."""

    def loss(params, frozen, batch, key):
        arrays = params | frozen
        noisy, _, sigma = noised(to_floats(batch["video"]), key, levels)
        before = teacher.join({name: arrays[_TEACHER + name] for name in teacher.names})
        wanted = jax.lax.stop_gradient(predict(before, noisy, sigma, batch["tokens"]))
        found = predict(student.join(arrays), noisy, sigma, batch["tokens"])
        return jnp.mean(jnp.square(found.astype(jnp.float32) - wanted.astype(jnp.float32)))

    return loss
