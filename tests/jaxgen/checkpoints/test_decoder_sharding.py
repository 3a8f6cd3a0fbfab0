"""Where the parameters of a language model go on a mesh."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.checkpoints import (
    decoder_sharding,
    export_diffusion_lm,
    flat_shapes,
    load_safetensors,
    save_diffusion_lm_folder,
)
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLM
from tests.jaxgen.checkpoints.diffusion_lm_files import (
    WEIGHTS,
    error_of,
    load_golden,
    logits_of,
    mesh_of,
    weights_of,
)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embedding.embedding", (80, 32), ("tensor", "fsdp")),
        ("head.kernel", (32, 80), ("fsdp", "tensor")),
        ("blocks.10.attention.query.kernel", (32, 32), ("fsdp", "tensor")),
        ("blocks.10.attention.key.kernel", (32, 16), ("fsdp", "tensor")),
        ("blocks.10.attention.value.kernel", (32, 16), ("fsdp", "tensor")),
        ("blocks.10.attention.output.kernel", (32, 32), ("tensor", "fsdp")),
        ("blocks.10.mlp.gate.kernel", (32, 44), ("fsdp", "tensor")),
        ("blocks.10.mlp.up.kernel", (32, 44), ("fsdp", "tensor")),
        ("blocks.10.mlp.down.kernel", (44, 32), ("tensor", "fsdp")),
        ("blocks.10.attention.query_norm.scale", (8,), ()),
        ("blocks.10.mlp_norm.scale", (32,), ()),
        ("final_norm.scale", (32,), ()),
        ("embedding.embedding", (81, 32), (None, "fsdp")),
        ("blocks.10.mlp.up.kernel", (33, 45), (None, None)),
    ],
)
def test_every_parameter_is_split_where_it_should(path, shape, spec):
    mesh = mesh_of(fsdp=2, tensor=2)
    assert decoder_sharding(mesh)(path, shape) == NamedSharding(mesh, PartitionSpec(*spec))
    # Axes under other names, and a mesh without one of them.
    other = {"fsdp": "data", "tensor": "model", None: None}
    mesh = mesh_of(data=2, model=2)
    renamed = PartitionSpec(*(other[axis] for axis in spec))
    assert decoder_sharding(mesh, fsdp="data", tensor="model")(path, shape).spec == renamed
    only = PartitionSpec(*(axis if axis == "tensor" else None for axis in spec))
    assert decoder_sharding(mesh_of(tensor=2))(path, shape).spec == only
    assert decoder_sharding(mesh)(path, shape).is_fully_replicated


def test_two_axes_are_needed():
    with pytest.raises(ValueError, match="fsdp and tensor must be two axes, got 'x' for both"):
        decoder_sharding(mesh_of(x=4), fsdp="x", tensor="x")


@functools.cache
def _released_shapes(name):
    config = dataclasses.replace(DIFFUSION_LM_PRESETS[name], param_dtype=jnp.bfloat16)
    return flat_shapes(lambda: DiffusionLM(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("name", ["llada-8b", "sdar-8b"])
def test_four_devices_hold_a_quarter_each(name, axes):
    place, held, total = decoder_sharding(mesh_of(**axes)), 0, 0
    for path, shape in _released_shapes(name).items():
        assert shape.dtype == jnp.bfloat16
        total += 2 * math.prod(shape.shape)
        held += 2 * math.prod(place(path, shape.shape).shard_shape(shape.shape))
    assert 16e9 < total < 16.4e9
    assert total / 4 <= held < total / 4 + 1e6  # the norms


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}])
def test_a_model_on_four_devices_computes_the_same(axes):
    sharding = decoder_sharding(mesh_of(**axes))
    model = load_golden("sdar", sharding=sharding)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        wanted = sharding(".".join(map(str, path)), variable.shape)
        assert variable[...].sharding == wanted
    gate = model.blocks[0].mlp.gate.kernel[...]
    assert {piece.data.size for piece in gate.addressable_shards} == {gate.size // 4}
    for key, array in export_diffusion_lm(model).items():
        np.testing.assert_array_equal(array, weights_of("sdar")[key], err_msg=key)
    found, wanted = logits_of("sdar", "blocks", model)
    assert error_of(found, wanted) <= 3e-6


def test_a_sharded_model_is_saved_as_another(tmp_path):
    model = load_golden("llada", sharding=decoder_sharding(mesh_of(fsdp=2, tensor=2)))
    save_diffusion_lm_folder(tmp_path, model)
    saved = load_safetensors(tmp_path / WEIGHTS)
    for key, array in weights_of("llada").items():
        np.testing.assert_array_equal(saved[key], array, err_msg=key)
