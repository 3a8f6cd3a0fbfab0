"""Matrices of all heads in a few arrays rather than one, each for some of the heads.

For every block of keys there is a matrix of features times values; at head_dim 128 all together are
twice as large as the keys. One array of them would fit where no other array was, and decide how
much memory a pass needs. A few arrays take the places of others, and each is forgotten before the
next is made.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

_LARGE = 2**26
_GROUPS = 4


def cut(heads: int, size: int) -> tuple[range, ...]:
    """Cuts heads into groups: one, or a few of nearly equal size.

    Args:
        heads: how many there are.
        size: bytes of the matrices of all of them.
    """
    count = 1 if size <= _LARGE else min(heads, _GROUPS)
    bounds = [heads * i // count for i in range(count + 1)]
    return tuple(range(*pair) for pair in itertools.pairwise(bounds))


def pick(
    arrays: Sequence[Any], batch: jax.Array, head: jax.Array, use: Callable[[Any], None]
) -> None:
    """Inside a kernel, calls `use` with what belongs to a head of an entry of the batch.

    Args:
        arrays: references (batch, heads of the group, ...), group by group.
        batch: the entry.
        head: its number among the heads of all groups.
        use: called once for each group, under the condition that the head is in it.
    """
    if len(arrays) == 1:
        use(arrays[0].at[batch, head])
        return
    first = 0
    for array in arrays:
        inside = (head >= first) & (head < first + array.shape[1])
        pl.when(inside)(lambda array=array, first=first: use(array.at[batch, head - first]))
        first += array.shape[1]
