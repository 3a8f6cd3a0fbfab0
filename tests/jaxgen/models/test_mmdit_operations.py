"""The model of operations: the published sizes of Stable Diffusion 3 at 1024 x 1024."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxgen.models import MMDIT_PRESETS, MMDiT
from jaxgen.models.mmdit_operations import mmdit_operations


@pytest.mark.parametrize(
    ("name", "trillions"), [("sd3.5-large", 31.1), ("sd3-medium", 8.90), ("sd3.5-medium", 11.24)]
)
def test_a_pass_at_1024_pixels(name, trillions):
    found = mmdit_operations(MMDIT_PRESETS[name], 4096, 333) / 1e12
    assert found == pytest.approx(trillions, abs=0.06)


@pytest.mark.parametrize(("share", "cost"), [(0.1, 0.167), (0.3, 0.352), (0.5, 0.537)])
def test_a_masked_pass_as_a_share_of_a_whole_one(share, cost):
    config = MMDIT_PRESETS["sd3.5-large"]
    masked = mmdit_operations(config, 4096, 333, round(share * 4096))
    assert masked / mmdit_operations(config, 4096, 333) == pytest.approx(cost, abs=1e-3)


@pytest.mark.parametrize(("share", "cost"), [(0.1, 0.092), (0.3, 0.278), (0.5, 0.463)])
def test_a_masked_pass_that_remembers_the_text(share, cost):
    config = MMDIT_PRESETS["sd3.5-large"]
    masked = mmdit_operations(config, 4096, 333, round(share * 4096), keep_text=True)
    assert masked / mmdit_operations(config, 4096, 333) == pytest.approx(cost, abs=1e-3)


def test_all_active_is_a_whole_pass():
    config = MMDIT_PRESETS["sd3.5-medium"]
    assert mmdit_operations(config, 64, 16, 64) == mmdit_operations(config, 64, 16)


def test_the_compiled_program_does_as_many():
    config = dataclasses.replace(
        MMDIT_PRESETS["sd3.5-medium"], num_layers=3, num_heads=2, sample_size=16,
        pos_embed_max_size=8, dual_attention_layers=(0, 1), joint_attention_dim=16,
        pooled_projection_dim=16,
    )  # fmt: skip
    graph, state = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))
    shapes = [(1, 16, 16, 16), (1,), (1, 21, 16), (1, 16)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    run = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
    counted = run.lower(state, *inputs).compile().cost_analysis()["flops"]
    # Norms, softmax, GELU and embeddings come on top; much in a model as narrow as this one.
    assert 1.0 < counted / mmdit_operations(config, 64, 21) < 1.35
