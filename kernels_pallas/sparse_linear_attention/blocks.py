"""How tokens are cut into blocks, and how many blocks of keys a block of queries keeps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of queries and of keys; the last one of each may be shorter.

    Attributes:
        queries: tokens of the query.
        keys: tokens of key and value.
        block_q: queries in a block.
        block_k: keys in a block.
        kept_fraction: the share of the blocks of keys that a block of queries attends to exactly.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    kept_fraction: float

    @property
    def query_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.keys // self.block_k)

    @property
    def kept(self) -> int:
        """Blocks of keys that each block of queries attends to exactly, at least one."""
        # A product such as 0.29 * 100 = 28.999… means 29.
        return max(1, math.floor(self.kept_fraction * self.key_blocks * (1 + 1e-12)))

    @property
    def dense(self) -> bool:
        """Whether all are kept, so that nothing is left for the linear branch."""
        return self.kept == self.key_blocks

    def split_queries(self, x: jax.Array) -> jax.Array:
        """Cuts (batch, queries, heads, ...) into (batch, heads, blocks, block_q, ...), padded."""
        return _split(x, self.block_q)

    def split_keys(self, x: jax.Array) -> jax.Array:
        """Cuts (batch, keys, heads, ...) into (batch, heads, blocks, block_k, ...), padded."""
        return _split(x, self.block_k)

    def join_queries(self, x: jax.Array) -> jax.Array:
        """Undoes `split_queries`."""
        return _join(x, self.queries)

    def join_keys(self, x: jax.Array) -> jax.Array:
        """Undoes `split_keys`."""
        return _join(x, self.keys)

    def query_inside(self) -> np.ndarray:
        """Which queries of the blocks are not padding, bool (query_blocks, block_q)."""
        return _inside(self.queries, self.block_q)

    def key_inside(self) -> np.ndarray:
        """The same for keys."""
        return _inside(self.keys, self.block_k)


def _split(x, block):
    batch, tokens, heads, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -tokens % block)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, block, heads, *rest), 3, 1)


def _join(x, tokens):
    batch, heads, blocks, block, *rest = x.shape
    return jnp.moveaxis(x, 1, 3).reshape(batch, blocks * block, heads, *rest)[:, :tokens]


def _inside(tokens, block):
    count = -(-tokens // block)
    return (np.arange(count * block) < tokens).reshape(count, block)
