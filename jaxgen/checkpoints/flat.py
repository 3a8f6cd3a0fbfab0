"""Modules as flat dictionaries of arrays: the layout of the files of our own models.

A key is the path of attribute names and list positions, for example
`blocks.0.attention.heads.query.kernel`. Arrays keep the layout of JAX: a kernel is (in, out).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxgen.checkpoints.placement import Placement, Progress, choose_sharding, place, reporting
from jaxgen.checkpoints.safetensors_files import check_arrays
from jaxgen.checkpoints.safetensors_format import num_bytes
from jaxgen.layers import Settings


class UnreadArray:
    """A variable in another layout, which leaves its devices when it is used: to be saved.

    Attributes:
        shape: its shape there.
        dtype: its dtype.
    """

    def __init__(
        self,
        variable: nnx.Variable,
        shape: tuple[int, ...],
        turn: Callable[[np.ndarray], np.ndarray],
    ):
        self.shape, self.dtype = shape, variable.dtype
        self._variable, self._turn = variable, turn

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        # An array of JAX keeps what it was once converted to, so another one is converted.
        return self._turn(np.asarray(jnp.array(self._variable[...]), dtype))


def export_flat(module: nnx.Module) -> dict[str, np.ndarray]:
    """Returns every variable of a module as a NumPy array, by dotted path."""
    variables = nnx.to_flat_state(nnx.state(module))
    return {_key(path): np.asarray(variable[...]) for path, variable in variables}


def flat_shapes(create: Callable[[], nnx.Module]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every variable of the module that `create` makes.

    Nothing is allocated: `create` runs abstractly.
    """
    return _shapes(nnx.eval_shape(create))


def load_flat[Module: nnx.Module](
    create: Callable[[], Module],
    arrays: Mapping[str, Any],
    source: str = "arrays",
    *,
    sharding: Placement = None,
    progress: Progress = None,
) -> Module:
    """Makes a module with these arrays as its variables.

    All is checked before the first array is read; then one after the other is read, converted and
    put in its place, so that the host holds little more than the module.

    Args:
        create: makes the module, for example `lambda: TextEncoder(config, rngs=nnx.Rngs(0))`; it
            runs abstractly, its initial values are never computed.
        arrays: one array for each variable, by dotted path; floats are converted to the dtype of
            the variable.
        source: what to call the arrays in an error, for example the path of their file.
        sharding: where the variables go: a sharding for all, or a function from dotted path and
            shape to one; the default device if None.
        progress: called with the bytes loaded and those of all; True for a bar on stderr.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed; recorded settings
            (`jaxgen.layers.Settings`) that are not those of the module; or a sharding that does
            not fit.
    """
    module = nnx.eval_shape(create)
    check_arrays(arrays, _shapes(module), source)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        check_settings(variable, arrays[_key(path)], f"{source}: {_key(path)}")
    return fill(module, arrays.__getitem__, source, sharding=sharding, progress=progress)


def fill[Module: nnx.Module](
    module: Module,
    read: Callable[[str], Any],
    source: str = "arrays",
    *,
    sharding: Placement = None,
    progress: Progress = None,
) -> Module:
    """Returns an abstract module with values, which are read one at a time.

    Args:
        module: what `nnx.eval_shape` returned; it stays as it is.
        read: returns the array of a dotted path. It has the shape of the variable and is converted
            to its dtype; it is released before the next one is read.
        source: as for `load_flat`.
        sharding: likewise.
        progress: likewise.

    Raises:
        ValueError: a sharding that does not fit its variable; nothing has been read then.
    """
    graph, state = nnx.split(module)
    variables = nnx.to_flat_state(state)
    shapes = _shapes(module)
    places = {
        path: choose_sharding(sharding, path, shape.shape, source) for path, shape in shapes.items()
    }
    filled = []
    with reporting(progress, sum(map(num_bytes, shapes.values()))) as report:
        for position, variable in variables:
            path = _key(position)
            array = place(read(path), shapes[path].dtype, places[path])
            filled.append((position, variable.replace(array)))
            report(num_bytes(shapes[path]))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_settings(variable: nnx.Variable, array: Any, source: str) -> None:
    """Compares an array to be loaded with the settings that a variable records, if it does.

    Raises:
        ValueError: they differ; the message starts with `source` and names both.
    """
    if isinstance(variable, Settings):
        variable.check(array, source)


def _shapes(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every variable of an abstract module, by dotted path."""
    variables = nnx.to_flat_state(nnx.state(module))
    shapes = {_key(path): variable.get_raw_value() for path, variable in variables}
    return {key: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for key, shape in shapes.items()}


def _key(path: tuple[Any, ...]) -> str:
    """Joins a path with dots."""
    return ".".join(map(str, path))
