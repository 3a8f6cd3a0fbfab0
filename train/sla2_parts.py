"""What replacing self-attention is made of: the layers, the two losses, errors of attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from jaxgen.layers import (
    MixingParam,
    ProjectionParam,
    RouterParam,
    SLA1Attention,
    SparseLinearAttention,
)
from jaxgen.models.wan import Attend, WanConfig
from jaxgen.sampling import LogitNormal, add_noise
from train.clips import Batch
from train.sla2_config import METHODS, Config
from train.state import Arrays, Loss, Skeleton, names_of, take_apart
from train.text_to_video_parts import (
    Models,
    as_pictures,
    full_attention,
    load_export,
    predict,
    to_floats,
)

_TEACHER = "teacher."


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A pretrained model whose self-attention was replaced.

    Attributes:
        stage1: Its skeleton with a soft choice of blocks, where there are routers.
        stage2: With the hard choice, as it is fine-tuned.
        evaluation: As it is validated.
        arrays: The arrays of all three, by name.
        routers: Names of the routers.
        projections: Names of the projections of SLA.
        mixing: Names of the mixing logits, block by block.
    """

    stage1: Skeleton
    stage2: Skeleton
    evaluation: Skeleton
    arrays: Arrays
    routers: frozenset[str]
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
                return full_attention
            case "sla1":
                sla1 = {"feature_map": config.feature_map, "complement": config.complement}
                return SLA1Attention(model.head_dim, **cut, **sla1)
            case _:
                return SparseLinearAttention(
                    model.num_heads,
                    model.head_dim,
                    tokens,
                    initial_logit=method.initial_logit,
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
    skeleton, arrays = take_apart(_changed(models, remat=config.remat))
    mixing = names_of(models, MixingParam)
    method = METHODS[config.method]
    return Replaced(
        stage1=take_apart(_changed(models, selection="soft"))[0],
        stage2=skeleton,
        evaluation=take_apart(_changed(models, quantize=method.quantize_evaluation))[0],
        arrays=arrays,
        routers=names_of(models, RouterParam),
        projections=names_of(models, ProjectionParam),
        mixing=tuple(name for name in skeleton.names if name in mixing),
    )


def _changed(models: Models, *, remat: bool = False, **options: Any) -> Models:
    """Return models whose SLA2 layers have other options; full attention and SLA as they are."""
    models = nnx.merge(*nnx.split(models))
    models.transformer.config = dataclasses.replace(models.transformer.config, remat=remat)
    for block in models.transformer.blocks:
        layer = block.self_attention.attend
        if isinstance(layer, SparseLinearAttention):
            block.self_attention.attend = nnx.data(layer.with_options(**options))
    return models


def recorded_attention(
    models: Models, noisy: Array, sigma: Array, tokens: Array
) -> list[tuple[Any, tuple[Array, Array, Array], Array]]:
    """Run the models with full attention.

    Returns:
        The layer, its query, key and value, and full attention of these, for each block.
    """
    found: list[tuple[Any, tuple[Array, Array, Array], Array]] = []
    for block in models.transformer.blocks:

        def record(query, key, value, layer=block.self_attention.attend):
            found.append((layer, (query, key, value), full_attention(query, key, value)))
            return found[-1][-1]

        block.self_attention.attend = record
    predict(models, noisy, sigma, tokens)
    return found


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
        # One block at a time is differentiated, so that no more than its activations are kept.
        errors = [
            jax.checkpoint(lambda *inputs, layer=layer: _relative(layer(*inputs[:3]), inputs[3]))(
                *inputs, full
            )
            for layer, inputs, full in recorded_attention(models, noisy, sigma, batch["tokens"])
        ]
        return jnp.mean(jnp.stack(errors))

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


def attention_errors(skeleton: Skeleton, arrays: Arrays, batch: Batch) -> list[float]:
    """Return the relative L2 error of attention in each block, on fixed noise.

    Args:
        skeleton: Of the replaced model; the inputs of attention are those of full attention.
        arrays: Its arrays.
        batch: `video` and `tokens`.
    """

    @jax.jit
    def errors(arrays, video, tokens):
        models = skeleton.join(arrays)
        noisy, _, sigma = noised(to_floats(video), jax.random.key(0), LogitNormal())
        found = recorded_attention(models, noisy, sigma, tokens)
        squares = [_relative(layer(*inputs), full) for layer, inputs, full in found]
        return jnp.sqrt(jnp.stack(squares))

    return np.asarray(errors(arrays, batch["video"], batch["tokens"])).tolist()


def calibrated(config: Config, replaced: Replaced, arrays: Arrays, batch: Batch) -> Arrays:
    """Return the arrays with the mixing logits of least squares on one batch."""

    @jax.jit
    def logits(arrays, video, tokens):
        models = replaced.evaluation.join(arrays)
        levels = LogitNormal(config.sigma_mean, config.sigma_std, config.sigma_shift)
        noisy, _, sigma = noised(to_floats(video), jax.random.key(config.seed), levels)
        found = recorded_attention(models, noisy, sigma, tokens)
        return [layer.calibrate_mixing(*inputs, full) for layer, inputs, full in found]

    found = logits(arrays, batch["video"], batch["tokens"])
    blocks = [int(name.split(".blocks.")[1].split(".")[0]) for name in replaced.mixing]
    return arrays | {
        name: found[block] for name, block in zip(replaced.mixing, blocks, strict=True)
    }


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
