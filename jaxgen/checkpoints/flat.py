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

from jaxgen.checkpoints.safetensors_files import check_arrays
from jaxgen.layers import Settings


def export_flat(module: nnx.Module) -> dict[str, np.ndarray]:
    """Returns every variable of a module as a NumPy array, by dotted path."""
    variables = nnx.to_flat_state(nnx.state(module))
    return {_key(path): np.asarray(variable[...]) for path, variable in variables}


def flat_shapes(create: Callable[[], nnx.Module]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every variable of the module that `create` makes.

    Nothing is allocated: `create` runs abstractly.
    """
    variables = nnx.to_flat_state(nnx.state(nnx.eval_shape(create)))
    shapes = {_key(path): variable.get_raw_value() for path, variable in variables}
    return {key: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for key, shape in shapes.items()}


def load_flat[Module: nnx.Module](
    create: Callable[[], Module], arrays: Mapping[str, Any], source: str = "arrays"
) -> Module:
    """Makes a module with these arrays as its variables.

    Args:
        create: makes the module, for example `lambda: TextEncoder(config, rngs=nnx.Rngs(0))`; it
            runs abstractly, its initial values are never computed.
        arrays: one array for each variable, by dotted path; floats are converted to the dtype of
            the variable.
        source: what to call the arrays in an error, for example the path of their file.

    Raises:
        ValueError: missing, unused or misshapen arrays, all listed; or recorded settings
            (`jaxgen.layers.Settings`) that are not those of the module.
    """
    check_arrays(arrays, flat_shapes(create), source)
    graph, state = nnx.split(nnx.eval_shape(create))
    for path, variable in nnx.to_flat_state(state):
        check_settings(variable, arrays[_key(path)], f"{source}: {_key(path)}")
    filled = [
        (path, variable.replace(jnp.array(arrays[_key(path)], variable.dtype)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_settings(variable: nnx.Variable, array: Any, source: str) -> None:
    """Compares an array to be loaded with the settings that a variable records, if it does.

    Raises:
        ValueError: they differ; the message starts with `source` and names both.
    """
    if isinstance(variable, Settings):
        variable.check(array, source)


def _key(path: tuple[Any, ...]) -> str:
    """Joins a path with dots."""
    return ".".join(map(str, path))
