"""The quantization kernel for Hopper: INT8 codes of tiles, as they are, transposed, or both.

One launch quantizes several tensors, 256 tokens of a head at a time: every block of threads takes
its share of them and has the next ones copied to it meanwhile. Each warpgroup owns 64 tokens. Those
that share a scale find their largest entry, meet, round, and write. So every number is read from
global memory once, and the transposed and permuted copy that 8-bit products need on their right
costs no pass of its own.
"""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.products import COLUMN, WGMMA, columns, tile
from kernels_pallas.mosaic.team import COMPILER_PARAMS, ROWS, SHARED_MEMORY
from kernels_pallas.mosaic.tiles import largest_of_tile, round_to_codes, store_transposed
from kernels_pallas.sage_attention import schedule
from kernels_pallas.sage_attention.problem import TILE

_TINY = float(jnp.finfo(jnp.float32).tiny)


class Task(NamedTuple):
    """A tensor to be quantized; arithmetic as in `quantize.quantize`.

    Attributes:
        x: (batch, tokens, heads, head_dim), any float dtype; tokens a multiple of 8, head_dim 64 or
            128.
        block: tokens that share a scale, 128 or 256.
        plain: whether the codes are wanted as they are.
        transposed: whether they are wanted transposed.
        mean: float32 (batch, heads, head_dim), subtracted from tokens below the lengths.
        lengths: int32 (batch,), tokens at or beyond it become zero.
        other: like `x`: what `Codes.products` are asked for with.
    """

    x: jax.Array
    block: int
    plain: bool = True
    transposed: bool = True
    mean: jax.Array | None = None
    lengths: jax.Array | None = None
    other: jax.Array | None = None


class Codes(NamedTuple):
    """A tensor in INT8, tokens padded with zeros to whole tiles.

    Attributes:
        plain: int8 (batch, heads, tokens, head_dim), or None.
        transposed: int8 (batch, heads, head_dim, tokens), tokens permuted by
            `mosaic.products.permute`, or None.
        scale: float32 (batch, heads, tiles).
        products: float32 (2, batch, heads, tokens), for each token the sum of the products of its
            entries with those of another tensor, and with themselves; or None.
    """

    plain: Any
    transposed: Any
    scale: jax.Array
    products: Any


def quantize_tiles(tasks: Sequence[Task], *, interpret: bool) -> list[Codes]:
    """Runs the kernel.

    Args:
        tasks: what is quantized, all of one dtype and head_dim.
        interpret: whether the kernel runs in the interpreter.
    """
    tasks = [_with_lengths(task) for task in tasks]
    dtype, dim = tasks[0].x.dtype, tasks[0].x.shape[3]
    memory = _Memory.of(tasks)
    rows, stages = memory.rows, memory.stages
    inputs, outputs = [_inputs(task) for task in tasks], [_outputs(task) for task in tasks]
    shares = [_share(task, rows) for task in tasks]  # batch, heads, parts of a head
    ends = list(itertools.accumulate(batch * heads * parts for batch, heads, parts in shares))
    starts, workers = [0, *ends[:-1]], min(ends[-1], schedule.processors() * memory.residents)

    def kernel(refs, memory_sm, barriers):
        refs = iter(refs)
        of_inputs = [{name: next(refs) for name in arrays} for arrays in inputs]
        of_outputs = [{name: next(refs) for name in shapes} for shapes in outputs]
        x_sm, other_sm, plain_sm, transposed_sm, products_sm, scratch, largest_sm = memory_sm
        arrived, met = barriers
        wg, me = lax.axis_index("wg"), lax.axis_index("worker")
        own = pl.ds(wg * ROWS, ROWS)

        def meet():
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def for_task_of(job, action):
            """Calls the action with a task, its references, and where in it the job is."""

            def call(i):
                (heads, parts), index = map(jnp.int32, shares[i][1:]), job - starts[i]
                part, index = lax.rem(index, parts), lax.div(index, parts)
                at = lax.div(index, heads), lax.rem(index, heads), part * rows
                action(tasks[i], of_inputs[i], of_outputs[i], at)

            for i in range(len(tasks)):
                pl.when((job >= starts[i]) & (job < ends[i]))(functools.partial(call, i))

        def fetch(job, slot):
            def start(task, inputs, outputs, at):
                del outputs
                b, h, here = *at[:2], pl.ds(at[2], rows)
                copy = lambda source, target: plgpu.copy_gmem_to_smem(
                    source.at[b, here, h], target.at[slot], arrived.at[slot]
                )
                copy(inputs["x"], x_sm)
                if task.other is not None:
                    copy(inputs["other"], other_sm)

            for_task_of(job, start)

        def quantize(slot, task, inputs, outputs, at):
            b, h, first = at
            start, group = first + wg * ROWS, lax.div(wg, jnp.int32(task.block // ROWS))
            if task.mean is not None:
                offset = plgpu.load(inputs["mean"].at[b, h], layout=COLUMN, optimized=False)
            plgpu.barrier_wait(arrived.at[slot])
            values = plgpu.load(x_sm.at[slot, own], layout=WGMMA).astype(jnp.float32)
            if task.mean is not None:
                values -= columns(offset, values.shape)
            if task.lengths is not None:
                row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
                values = jnp.where(row < inputs["lengths"][b] - start, values, 0.0)
            largest_sm[wg] = largest_of_tile(values, scratch.at[wg], interpret=interpret)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            meet()  # The largest entries are there, and what was written before is gone.

            if task.other is not None:
                others = plgpu.load(other_sm.at[slot, own], layout=WGMMA).astype(jnp.float32)
                for i, factor in enumerate((others, values)):
                    products_sm.at[i, own][...] = jnp.sum(values * factor, axis=1)
            members = [group * (task.block // ROWS) + i for i in range(task.block // ROWS)]
            largest = functools.reduce(jnp.maximum, [largest_sm[i] for i in members])
            scale = largest * (1.0 / 127.0)
            scale = jnp.where(scale < jnp.inf, jnp.maximum(scale, _TINY), jnp.nan)
            codes = round_to_codes(values * (1.0 / scale), interpret=interpret)
            if task.plain:
                plain_sm[own] = codes.astype(jnp.int8)
            half, inside = lax.div(wg, jnp.int32(2)), lax.rem(wg, jnp.int32(2))
            if task.transposed:
                store_transposed(codes, transposed_sm.at[half], inside, interpret=interpret)
            plgpu.commit_smem()
            meet()

            there = first + half * TILE
            tokens, target = pl.ds(half * TILE, TILE), pl.ds(there, TILE)

            @pl.when((inside == 0) & (there < outputs["scale"].shape[2] * task.block))
            def _():
                copy = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)
                if task.plain:
                    copy(plain_sm.at[tokens], outputs["plain"].at[b, h, target])
                if task.transposed:
                    copy(transposed_sm.at[half], outputs["transposed"].at[b, h, :, target])
                if task.other is not None:
                    for i in range(2):
                        copy(products_sm.at[i, tokens], outputs["products"].at[i, b, h, target])
                plgpu.commit_smem_to_gmem_group()

            @pl.when((wg == members[0]) & (there < outputs["scale"].shape[2] * task.block))
            def _():
                outputs["scale"][b, h, lax.div(there, jnp.int32(task.block))] = scale

        mine = lax.div(ends[-1] - 1 - me, jnp.int32(workers)) + 1
        for i in range(stages):
            pl.when((wg == 0) & (i < mine))(lambda i=i: fetch(me + i * workers, i))

        @pl.loop(0, mine)
        def _(step):
            job, slot = me + step * workers, lax.rem(step, jnp.int32(stages))
            for_task_of(job, functools.partial(quantize, slot))
            following = job + stages * workers
            pl.when((wg == 0) & (step + stages < mine))(lambda: fetch(following, slot))

        plgpu.wait_smem_to_gmem(0)

    def sage_attention_quantize(*refs):
        arrivals = 2 if any(task.other is not None for task in tasks) else 1
        pl.run_scoped(
            functools.partial(kernel, refs),
            memory.description(dtype, dim),
            (
                plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
                plgpu.Barrier(num_arrivals=rows // ROWS),
            ),
            collective_axes="wg",
        )

    results = iter(
        plgpu.kernel(
            sage_attention_quantize,
            out_type=tuple(shape for shapes in outputs for shape in shapes.values()),
            grid=(workers,),
            grid_names=("worker",),
            num_threads=rows // ROWS,
            thread_name="wg",
            compiler_params=COMPILER_PARAMS,
        )(*(array for arrays in inputs for array in arrays.values()))
    )
    found = ({name: next(results) for name in shapes} for shapes in outputs)
    return [Codes(**{"plain": None, "transposed": None, "products": None, **x}) for x in found]


class _Memory(NamedTuple):
    """Shared memory of a block of threads.

    Attributes:
        rows: tokens it works on at once.
        stages: how often there is room for what is copied to it.
        residents: blocks that share a processor.
        other, plain, transposed: whether there is room for these.
    """

    rows: int
    stages: int
    residents: int
    other: bool
    plain: bool
    transposed: bool

    @classmethod
    def of(cls, tasks: Sequence[Task]):
        other = any(task.other is not None for task in tasks)
        plain, transposed = (any(t.plain for t in tasks), any(t.transposed for t in tasks))
        assert not other or len(tasks) == 1
        rows = max(task.block for task in tasks)
        residents = 1 if other else 256 // rows  # registers suffice for so many
        tile_bytes = rows * tasks[0].x.shape[3]
        stage = tile_bytes * (1 + other) * tasks[0].x.dtype.itemsize
        fixed = tile_bytes * (plain + transposed) + 4096
        stages = (SHARED_MEMORY // residents - fixed) // stage
        if stages == 0:
            stages, residents = 1, 1
        return cls(rows, min(stages, 3), residents, other, plain, transposed)

    def description(self, dtype, dim):
        """Returns the arguments of `run_scoped`."""
        nothing, shape = plgpu.SMEM((8,), jnp.int8), (self.stages, self.rows, dim)
        warpgroups = self.rows // ROWS
        return (
            tile(shape, dtype),
            tile(shape, dtype) if self.other else nothing,
            tile((self.rows, dim), jnp.int8) if self.plain else nothing,
            tile((self.rows // TILE, dim, TILE), jnp.int8) if self.transposed else nothing,
            plgpu.SMEM((2, self.rows), jnp.float32) if self.other else nothing,
            plgpu.SMEM((warpgroups, 4), jnp.float32),
            plgpu.SMEM((warpgroups,), jnp.float32),
        )


def _with_lengths(task: Task) -> Task:
    """Where a mean is subtracted, padding needs a length too."""
    batch, tokens = task.x.shape[:2]
    if task.lengths is None and task.mean is not None and tokens % task.block:
        return task._replace(lengths=jnp.full((batch,), tokens, jnp.int32))
    return task


def _share(task: Task, rows: int) -> tuple[int, int, int]:
    batch, tokens, heads, _ = task.x.shape
    return batch, heads, -(-tokens // rows)


def _inputs(task: Task) -> dict[str, jax.Array]:
    arrays = {name: getattr(task, name) for name in ("x", "mean", "lengths", "other")}
    return {name: array for name, array in arrays.items() if array is not None}


def _outputs(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    batch, tokens, heads, dim = task.x.shape
    tiles = -(-tokens // task.block)
    padded = tiles * task.block
    shapes = {"scale": jax.ShapeDtypeStruct((batch, heads, tiles), jnp.float32)}
    if task.plain:
        shapes["plain"] = jax.ShapeDtypeStruct((batch, heads, padded, dim), jnp.int8)
    if task.transposed:
        shapes["transposed"] = jax.ShapeDtypeStruct((batch, heads, dim, padded), jnp.int8)
    if task.other is not None:
        shapes["products"] = jax.ShapeDtypeStruct((2, batch, heads, padded), jnp.float32)
    return shapes
