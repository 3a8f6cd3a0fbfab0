"""Which block of threads computes what, when each one computes several blocks of queries.

The end of one block and the beginning of the next then overlap, which the GPU's own scheduler
does not do where shared memory has room for one only.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.sage_attention.problem import Problem


def processors() -> int:
    """Returns how many streaming multiprocessors the GPU has; without one, those of an H100."""
    return getattr(jax.devices()[0], "core_count", None) or 132


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Deals blocks of queries out to blocks of threads ("workers").

    Attributes:
        batch: number of sequences.
        heads: heads of the query.
        blocks: blocks of queries in a head.
        workers: blocks of threads.
        longest_first: whether later blocks of queries take longer and so come first.
    """

    batch: int
    heads: int
    blocks: int
    workers: int
    longest_first: bool

    @classmethod
    def of(cls, problem: Problem, blocks: int) -> "Schedule":
        """Returns one worker for each processor where the time that a block takes is known.

        Where lengths or segments decide, each block has a worker, and the GPU deals them out.
        """
        count = problem.batch * problem.heads * blocks
        known = not (problem.ragged_queries or problem.ragged_keys or problem.segmented)
        workers = min(count, processors()) if known else count
        return cls(problem.batch, problem.heads, blocks, workers, problem.later_see_more)

    @property
    def count(self) -> int:
        """Blocks of queries in all."""
        return self.batch * self.heads * self.blocks

    def rounds(self, worker: jax.Array) -> jax.Array:
        """Returns how many blocks a worker has."""
        whole, rest = divmod(self.count, self.workers)
        if not rest:
            return jnp.int32(whole)
        return whole + (self._index(jnp.int32(whole), worker) < self.count).astype(jnp.int32)

    def place(self, item: jax.Array, worker: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns sequence, head and block of queries of a worker's item, counted from 0."""
        index, heads = self._index(item, worker), jnp.int32(self.heads)
        if self.longest_first:
            pairs = jnp.int32(self.batch * self.heads)
            block, index = self.blocks - 1 - lax.div(index, pairs), lax.rem(index, pairs)
        else:
            blocks = jnp.int32(self.blocks)
            block, index = lax.rem(index, blocks), lax.div(index, blocks)
        return lax.div(index, heads), lax.rem(index, heads), block

    def _index(self, item, worker):
        if self.longest_first:
            # There and back, so that nobody has the longest block of every round.
            odd = lax.rem(item, jnp.int32(2)) == 1
            worker = jnp.where(odd, self.workers - 1 - worker, worker)
        return item * self.workers + worker
