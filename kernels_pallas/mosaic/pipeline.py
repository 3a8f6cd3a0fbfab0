"""The frame of most kernels: a team of warpgroups computes, one more keeps copies going."""

# Pallas' decorators are typed more narrowly than they work.
# pyright: reportCallIssue=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic.team import COMPILER_PARAMS, Team


class Barriers(NamedTuple):
    """The barriers of a kernel.

    Attributes:
        fixed: for each warpgroup, its own tiles have arrived.
        shared: what all warpgroups read throughout has arrived, if there is such.
        met: all warpgroups are here; only if they ever meet.
        arrived: for each group of operands and each slot, they have arrived.
        free: for each group and slot, all warpgroups are done with them.
        stages: number of slots.
    """

    fixed: Any
    shared: Any
    met: Any
    arrived: Sequence[Any]
    free: Sequence[Any]
    stages: int

    def meet(self) -> None:
        """Waits for all warpgroups that compute; what they wrote to shared memory can be read."""
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def wait(self, group: int, slot: jax.Array) -> None:
        """Waits until the operands of a group have arrived."""
        plgpu.barrier_wait(self.arrived[group].at[slot])

    def done(self, group: int, slot: jax.Array) -> None:
        """Says that this warpgroup needs the operands of a group no more."""
        plgpu.barrier_arrive(self.free[group].at[slot])

    def fold(
        self, span: Any, own: Any, visit: Callable[..., Any], carry: Any, step: Any = 0
    ) -> Any:
        """Folds over tiles of a block that concern this warpgroup; lets the others pass.

        Args:
            span: the tiles of the block, a `Span`.
            own: those of the warpgroup, within `span`.
            visit: see `Span.fold`.
            carry: what to begin with.
            step: that of the first tile of `span`.
        """
        if own is span:
            return span.fold(visit, carry)
        self._skip(step, step + own.first - span.first)
        carry = own.fold(visit, carry)
        self._skip(step + own.last - span.first, step + span.last - span.first)
        return carry

    def _skip(self, first: jax.Array, last: jax.Array) -> None:
        @pl.loop(first, last)
        def _(step):
            for group in range(len(self.arrived)):
                self.wait(group, self.slot(step))
                self.done(group, self.slot(step))

    def slot(self, step: jax.Array) -> jax.Array:
        """Returns the slot of a step."""
        return lax.rem(step, jnp.int32(self.stages))


class Kernel(NamedTuple):
    """The parts in which kernels differ.

    Attributes:
        compute: what a computing warpgroup does.
        fetch: the sources of the tiles of a step, a group for each barrier.
        position: where in the problem a block of threads is.
        steps: number of steps there.
        share: copies what all warpgroups read throughout, with one of its last argument's
            functions for each tile; it is given what is read and what is written.
    """

    compute: Callable[..., None]
    fetch: Callable[..., Sequence[Sequence[Any]]]
    position: Callable[..., Any]
    steps: Callable[[Any], Any]
    share: Callable[..., None] = lambda refs, position, copies: None


def launch(
    operands: Any,
    kernel: Kernel,
    *,
    fixed: Sequence[Any],
    shared: Sequence[Any] = (),
    moving: Sequence[Sequence[Any]],
    stages: int,
    out_type: Sequence[jax.ShapeDtypeStruct],
    into: Sequence[jax.Array] = (),
    team: Team,
    grid: tuple[int, int, int],
    name: str,
    fixed_arrivals: int = 2,
    meets: bool = False,
) -> Sequence[jax.Array]:
    """Runs a kernel of a team and one warpgroup that keeps `stages` steps in flight.

    Args:
        operands: what the kernel reads, a pytree of arrays.
        kernel: what it does.
        fixed: shared memory that `kernel.compute` fills for itself.
        shared: more of it, filled from `kernel.share`; `compute` gets it after `fixed`.
        moving: shared memory for a step, a group for each barrier, with a leading axis `stages`.
        stages: steps in flight.
        out_type: what the kernel writes.
        into: arrays that it writes to besides, in place if nothing else reads them; what it does
            not write stays.
        team: the warpgroups that compute.
        grid: sizes of the axes "batch", "heads" and "block".
        name: what profiles show.
        fixed_arrivals: copies that a warpgroup makes to `fixed`.
        meets: whether the warpgroups wait for each other.

    Returns:
        What has `out_type`, then what `into` has become.
    """
    arrays, structure = jax.tree.flatten(operands)

    def body(*refs):
        x, outputs = structure.unflatten(refs[: len(arrays)]), refs[len(arrays) :]

        def scoped(fixed_sm, shared_sm, moving_sm, *barriers):
            barriers = Barriers(*barriers, stages)
            wg = lax.axis_index("wg")
            position = kernel.position(x, lax.axis_index("block"))

            @pl.when(wg < team.size)
            def _():
                plgpu.set_max_registers(team.registers, action="increase")
                memory = (*fixed_sm, *shared_sm)
                kernel.compute((x, outputs), memory, moving_sm, barriers, position)

            @pl.when(wg == team.size)
            def _():
                plgpu.set_max_registers(24, action="decrease")
                steps = kernel.steps(position)

                def issue(step, slot, *, reused):
                    sources = kernel.fetch(x, position, step)
                    groups = zip(sources, moving_sm, barriers.arrived, barriers.free, strict=True)
                    for source, target, arrived, free in groups:
                        if reused:
                            plgpu.barrier_wait(free.at[slot])
                        for gmem, smem in zip(source, target, strict=True):
                            plgpu.copy_gmem_to_smem(gmem, smem.at[slot], arrived.at[slot])

                for i in range(stages):
                    pl.when(i < steps)(lambda i=i: issue(jnp.int32(i), i, reused=False))
                copy_to = lambda smem: (
                    lambda gmem: plgpu.copy_gmem_to_smem(gmem, smem, barriers.shared)
                )
                kernel.share((x, outputs), position, [copy_to(smem) for smem in shared_sm])

                @pl.loop(stages, steps)
                def _(step):
                    issue(step, barriers.slot(step), reused=True)

        pl.run_scoped(
            scoped,
            tuple(fixed),
            tuple(shared),
            tuple(moving),
            plgpu.Barrier(num_arrivals=fixed_arrivals, num_barriers=team.size),
            plgpu.Barrier(num_arrivals=len(shared)) if shared else (),
            plgpu.Barrier(num_arrivals=team.size) if meets else (),
            tuple(plgpu.Barrier(num_arrivals=len(g), num_barriers=stages) for g in moving),
            (plgpu.Barrier(num_arrivals=team.size, num_barriers=stages),) * len(moving),
            collective_axes="wg",
        )

    body.__name__ = name  # what profiles show
    run = plgpu.kernel(
        body,
        out_type=() if into else tuple(out_type),
        grid=grid,
        grid_names=("batch", "heads", "block"),
        num_threads=team.size + 1,
        thread_name="wg",
        compiler_params=COMPILER_PARAMS,
    )
    if not into:
        return run(*arrays)
    # The state is local: references that outlive a call fail in scans that are rematerialized.
    fresh = (lax.empty(x.shape, x.dtype) for x in out_type)
    return pl.run_state(lambda refs: run(*arrays, *refs))((*fresh, *into))
