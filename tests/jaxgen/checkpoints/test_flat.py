import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import export_flat, flat_shapes, load_flat
from jaxgen.models import (
    AttributeClassifier,
    AttributeClassifierConfig,
    TextEncoder,
    TextEncoderConfig,
)

TEXT = TextEncoderConfig(vocabulary_size=7, width=8, hidden_dim=4, pooled_dim=4)
CLASSIFIER = AttributeClassifierConfig(3, 2, 2, widths=(8, 8, 8))


@pytest.mark.parametrize(
    ("kind", "config", "inputs"),
    [
        (TextEncoder, TEXT, jnp.array([[2, 3, 0]])),
        (AttributeClassifier, CLASSIFIER, jnp.linspace(-1, 1, 192).reshape(1, 8, 8, 3)),
    ],
)
def test_round_trip_gives_the_same_outputs(kind, config, inputs):
    module = kind(config, rngs=nnx.Rngs(0))
    arrays = export_flat(module)
    create = lambda: kind(config, rngs=nnx.Rngs(1))
    assert arrays.keys() == flat_shapes(create).keys()
    loaded = load_flat(create, arrays)
    for key, array in export_flat(loaded).items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)
    run = nnx.jit(lambda module, inputs: module(inputs))
    first, second = run(module, inputs), run(loaded, inputs)
    if isinstance(first, dict):
        first, second = first["concept"], second["concept"]
    np.testing.assert_array_equal(first[0], second[0])


def test_keys_are_dotted_paths():
    shapes = flat_shapes(lambda: TextEncoder(TEXT, rngs=nnx.Rngs(0)))
    assert shapes["blocks.1.attention.heads.query.kernel"].shape == (8, 8)
    assert shapes["token_embedding.embedding"].shape == (7, 8)


def test_floats_are_converted_to_the_dtype_of_the_module():
    create = lambda: TextEncoder(TEXT, rngs=nnx.Rngs(0))
    half = {key: array.astype(jnp.bfloat16) for key, array in export_flat(create()).items()}
    assert {array.dtype for array in export_flat(load_flat(create, half)).values()} == {
        np.dtype(np.float32)
    }


def test_wrong_arrays_are_refused():
    create = lambda: TextEncoder(TEXT, rngs=nnx.Rngs(0))
    arrays = export_flat(create())
    del arrays["final_norm.scale"]
    with pytest.raises(ValueError, match=r"^file: .* missing \(1\): final_norm.scale$"):
        load_flat(create, arrays, source="file")
