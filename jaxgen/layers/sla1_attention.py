"""The attention of SLA (arXiv 2509.24006), the predecessor of SLA2, and its released weights."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxgen.layers.sparse_linear_attention import (
    ALL_SPARSE,
    Settings,
    check_fraction,
    check_sizes,
    choose_blocks,
)
from kernels_pallas import sparse_linear_attention
from kernels_pallas.sparse_linear_attention.api import ImplementationName
from kernels_pallas.sparse_linear_attention.blocks import Blocks

FeatureMap = Literal["softmax", "elu", "relu"]

_SETTINGS = ("kept_fraction", "block_q", "block_k", "feature_map", "complement")
_OURS, _TURBO_DIFFUSION = ".attn1.attend.", ".self_attn.attn_op.local_attn.proj_l."


class ProjectionParam(nnx.Param):
    """A part of the projection of linear attention, so that training can tell it apart."""


class Projection(nnx.Module):
    """`x W' + b` in float32 with W as torch stores it, (out, in); zero at the start."""

    def __init__(self, dim: int):
        self.weight = ProjectionParam(jnp.zeros((dim, dim), jnp.float32))
        self.bias = ProjectionParam(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Projects the last axis."""
        product = jnp.einsum("...d,ed->...e", x, self.weight[...])
        return product + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


class SLA1Attention(nnx.Module):
    """SLA, the predecessor: sparse attention plus a projection of linear attention.

    `sparse + proj_l(linear)`, where the router compares block means as they are and the feature map
    sees the keys as they are. There is no class of blocks that are skipped, as in the public code.
    The released weights (`proj_l.weight`, `proj_l.bias`) have these names here.

    Args:
        head_dim: size of a head; heads share the projection.
        kept_fraction: share of the blocks of keys that get softmax attention.
        block_q: queries in a block.
        block_k: keys in a block.
        feature_map: "softmax" over channels, "elu" (plus one) or "relu".
        complement: linear attention to the blocks that are not chosen, as in the paper (branch
            SLA-1 of the public code); False: to all keys (branch main).
        quantize: compute the scores of the sparse branch from INT8 codes.
        implementation: of the sparse branch, as for `kernels_pallas.sparse_linear_attention`.
        rngs: not used.

    Raises:
        ValueError: another feature map, a size below 1, or `kept_fraction` out of range.
    """

    PARAMETERS: ClassVar[frozenset[str]] = frozenset({"proj_l.weight", "proj_l.bias", "settings"})
    """Names of what a checkpoint holds."""
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    """Names of what it may hold besides."""

    def __init__(
        self,
        head_dim: int,
        *,
        kept_fraction: float = 0.05,
        block_q: int = 128,
        block_k: int = 64,
        feature_map: FeatureMap = "softmax",
        complement: bool = True,
        quantize: bool = False,
        implementation: ImplementationName | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        check_sizes(head_dim=head_dim, block_q=block_q, block_k=block_k)
        check_fraction(kept_fraction)
        maps = get_args(FeatureMap)
        if feature_map not in maps:
            raise ValueError(f"feature_map must be one of {', '.join(maps)}, got {feature_map!r}")
        self.proj_l = Projection(head_dim)
        self.kept_fraction, self.block_q, self.block_k = kept_fraction, block_q, block_k
        self.feature_map, self.complement = feature_map, complement
        self.quantize = quantize
        self.implementation: ImplementationName | None = implementation
        self.settings = Settings.of(
            kept_fraction=kept_fraction,
            block_q=block_q,
            block_k=block_k,
            feature_map=maps.index(feature_map),
            complement=complement,
        )

    @classmethod
    def of_parameters(cls, shapes: Mapping[str, Any], settings: ArrayLike) -> Self:
        """Makes a module for parameters from a file, as `SparseLinearAttention.of_parameters`."""
        found, maps = Settings.read(_SETTINGS, settings), get_args(FeatureMap)
        number = found.pop("feature_map")
        if not 0 <= number < len(maps):
            raise ValueError(f"feature_map must be from 0 to {len(maps) - 1}, got {number}")
        found["complement"] = bool(found["complement"])
        head_dim = shapes["proj_l.bias"].shape[-1]
        return cls(head_dim, feature_map=maps[number], **found)

    def __call__(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
    ) -> Float[Array, "batch queries heads head_dim"]:
        """Attends; raises what `kernels_pallas.sparse_linear_attention` raises."""
        cut = {"kept_fraction": self.kept_fraction, "block_q": self.block_q}
        cut |= {"block_k": self.block_k}
        sparse = sparse_linear_attention(
            query,
            key,
            value,
            jnp.full(query.shape[-2:-1], ALL_SPARSE, jnp.float32),
            quantize=self.quantize,
            smooth_features=False,
            implementation=self.implementation,
            **cut,
        )
        blocks = Blocks(query.shape[1], key.shape[1], **cut)
        if self.complement:
            left = ~choose_blocks(blocks, query, key)
        else:
            blocks = Blocks(blocks.queries, blocks.keys, blocks.queries, blocks.keys, 1.0)
            left = jnp.ones((query.shape[0], query.shape[2], 1, 1), jnp.bool_)
        linear = self.proj_l(_linear(blocks, self._features, query, key, value, left))
        return (sparse.astype(jnp.float32) + linear).astype(query.dtype)

    def _features(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        match self.feature_map:
            case "softmax":
                return jax.nn.softmax(wide, axis=-1)
            case "elu":
                return jax.nn.elu(wide) + 1
            case _:
                return jax.nn.relu(wide)


def sla1_from_turbodiffusion(
    arrays: Mapping[str, Any], attention: SLA1Attention
) -> dict[str, np.ndarray]:
    """Picks the projections of SLA out of released weights, under the names of `load_wan`.

    Args:
        arrays: `blocks.N.self_attn.attn_op.local_attn.proj_l.weight` and `.bias`; others are left
            out.
        attention: a layer with the settings that the weights were trained with, which they do not
            record themselves.

    Returns:
        `blocks.N.attn1.attend.proj_l.weight` and `.bias`, and the settings.
    """
    found = {}
    for name, array in arrays.items():
        block, there, parameter = name.partition(_TURBO_DIFFUSION)
        if there:
            found[block + _OURS + "proj_l." + parameter] = np.asarray(array)
            found[block + _OURS + "settings"] = np.asarray(attention.settings[...])
    return found


def sla1_to_turbodiffusion(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Undoes `sla1_from_turbodiffusion`: returns the projections by their released names."""
    found = {}
    for name, array in arrays.items():
        block, there, parameter = name.partition(_OURS + "proj_l.")
        if there:
            found[block + _TURBO_DIFFUSION + parameter] = np.asarray(array)
    return found


def _linear(blocks: Blocks, features, query, key, value, left) -> Array:
    """Returns linear attention, float32, to the blocks of keys that `left` names."""

    def product(subscripts, *arrays):
        return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)

    # Padding is added after the feature map, which would not leave it zero.
    q_BHIqD = blocks.split_queries(features(query).astype(query.dtype))
    k_BHJsD, v_BHJsE = blocks.split_keys(features(key).astype(key.dtype)), blocks.split_keys(value)
    weights = left.astype(jnp.float32)
    h_BHJDE = product("bhjsd,bhjse->bhjde", k_BHJsD, v_BHJsE)
    h_BHIDE = product("bhij,bhjde->bhide", weights, h_BHJDE)
    z_BHID = product("bhij,bhjd->bhid", weights, jnp.sum(k_BHJsD.astype(jnp.float32), axis=3))
    out = product("bhiqd,bhide->bhiqe", q_BHIqD, h_BHIDE.astype(query.dtype))
    total = product("bhiqd,bhid->bhiq", q_BHIqD.astype(jnp.float32), z_BHID)[..., None]
    # Nothing is left where all blocks are chosen, or where no feature of a key is positive.
    return blocks.join_queries(jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0))
