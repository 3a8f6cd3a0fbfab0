"""What `decode` is called with, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.sampling import (
    BlockDiffusion,
    ResidualContext,
    TokenChoice,
    Unmasking,
    decode,
    decode_steps,
)
from tests.jaxgen.sampling.language_models import tiny_model


def test_ints_of_numpy_are_ints():
    prompts = jnp.zeros((2, 4), jnp.int32)
    wanted = decode(tiny_model(), prompts, BlockDiffusion(), new_tokens=3, seeds=5)
    decoder = BlockDiffusion(stop_ids=(), pad_id=np.int32(0))
    found = decode(tiny_model(), prompts, decoder, new_tokens=np.int64(3), seeds=np.uint8(5))
    assert (found.tokens == wanted.tokens).all()


@pytest.mark.parametrize(
    "residual",
    [
        ResidualContext(temperature=1e-40),
        ResidualContext(temperature=1e38, skip_mask_token=True),
        ResidualContext(init="dirichlet", concentration=1e-40),
    ],
    ids=repr,
)
def test_extreme_numbers_come_to_an_end(residual):
    decoder = BlockDiffusion(4, residual=residual)
    steps = decode_steps(tiny_model(), jnp.zeros((2, 5), jnp.int32), decoder, new_tokens=6)
    states = [state for state, _ in zip(steps, range(20), strict=False)]
    assert states[-1].done.all()
    assert np.isfinite(states[-1].residual.weight).all()


@pytest.mark.parametrize("sight", ["block_causal", "bidirectional"])
@pytest.mark.parametrize(
    "choice", [TokenChoice(), TokenChoice(0.5, top_p=0.9, confidence="sampled")]
)
def test_a_model_that_only_makes_nonsense_comes_to_an_end(sight, choice):
    model = tiny_model(3)
    model.final_norm.scale[...] = jnp.full_like(model.final_norm.scale[...], jnp.nan)
    decoder = BlockDiffusion(4, sight=sight, choice=choice, residual=ResidualContext())
    steps = decode_steps(model, jnp.zeros((2, 5), jnp.int32), decoder, new_tokens=6)
    states = [state for state, _ in zip(steps, range(20), strict=False)]
    assert states[-1].done.all()
    assert not (states[-1].tokens == model.config.mask_id).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": jnp.zeros((2, 4))}, r"ids \(batch, tokens\), got float32 of shape \(2, 4\)"),
        ({"prompts": jnp.zeros(4, jnp.int32)}, r"got int32 of shape \(4,\)"),
        ({"prompts": jnp.full((2, 4), 20)}, "ids below 20, got 20 to 20"),
        ({"prompts": jnp.full((2, 4), -1)}, "ids below 20, got -1 to -1"),
        ({"new_tokens": 0}, "new_tokens must be a positive int, got 0"),
        ({"new_tokens": 2.0}, "new_tokens must be a positive int, got 2.0"),
        ({"lengths": jnp.array([1])}, r"lengths must be ints of shape \(2,\), got int32 of \(1,\)"),
        ({"lengths": [2.7, 3.2]}, r"lengths must be ints of shape \(2,\), got float32"),
        ({"lengths": np.array([True, True])}, r"lengths must be ints of shape \(2,\), got bool"),
        ({"lengths": jnp.array([1, 5])}, "lengths must be from 0 to 4, got 1 to 5"),
        ({"lengths": jnp.array([-1, 2])}, "lengths must be from 0 to 4, got -1 to 2"),
        ({"seeds": jnp.arange(3)}, r"seeds must be an int or have shape \(2,\), got \(3,\)"),
        (
            {"decoder": BlockDiffusion(residual=ResidualContext(init="reference"))},
            "got reference=None",
        ),
        ({"reference": tiny_model(2)}, 'a reference model is for init="reference" only'),
        (
            {
                "decoder": BlockDiffusion(residual=ResidualContext(init="reference")),
                "reference": tiny_model(2, mask_id=16),
            },
            r"mask_id of the model, \(20, 17\), got \(20, 16\)",
        ),
        (
            {"decoder": BlockDiffusion(stop_ids=(3, 20))},
            r"stop_ids must be below 20, got \(3, 20\)",
        ),
        ({"decoder": BlockDiffusion(pad_id=20)}, r"pad_id must be below 20, got \(20,\)"),
        ({"decoder": BlockDiffusion(pad_id=-1)}, r"pad_id must be below 20, got \(-1,\)"),
        (
            {"decoder": BlockDiffusion(choice=TokenChoice(forbidden=(31,)))},
            r"forbidden must be below 20, got \(31,\)",
        ),
        (
            {"decoder": BlockDiffusion(choice=TokenChoice(deferred=(31,)))},
            r"deferred must be below 20, got \(31,\)",
        ),
        ({"decoder": BlockDiffusion(pad_id=17)}, "must not be the mask token, 17"),
        ({"decoder": BlockDiffusion(stop_ids=(1, 17))}, "must not be the mask token, 17"),
        (
            {"decoder": BlockDiffusion(choice=TokenChoice(forbidden=(*range(17), 18, 19)))},
            "forbidden must leave one of 20 tokens besides the mask to draw, got 19 tokens",
        ),
        ({"seeds": -1}, r"seeds must be from 0 to 2\*\*32 - 1, got -1 to -1"),
        ({"seeds": np.int64(-1)}, r"seeds must be from 0 to 2\*\*32 - 1, got -1 to -1"),
        ({"seeds": np.array([1, 2**32])}, r"seeds must be from 0 to .*, got 1 to 4294967296"),
        ({"seeds": 0.5}, "seeds must be ints, got float64"),
        ({"seeds": jnp.array([0.5, 0.7])}, "seeds must be ints, got float32"),
        ({"new_tokens": True}, "new_tokens must be a positive int, got True"),
        ({"decoder": BlockDiffusion(stop_ids=5)}, "stop_ids must be made of ints, got 5"),
        (
            {"decoder": BlockDiffusion(stop_ids=(2.5,))},
            r"stop_ids must be made of ints, got \(2.5,",
        ),
        ({"decoder": BlockDiffusion(pad_id=2.0)}, r"pad_id must be made of ints, got \(2.0,\)"),
        (
            {"decoder": BlockDiffusion(choice=TokenChoice(deferred=3))},
            "deferred must be made of ints, got 3",
        ),
        ({"decoder": BlockDiffusion(choice=None)}, "choice must be of type TokenChoice, got None"),
        ({"decoder": BlockDiffusion(unmasking=0.9)}, "must be of type Unmasking, got 0.9"),
        (
            {"decoder": BlockDiffusion(residual=True)},
            "residual must be of type ResidualContext or None, got True",
        ),
        (
            {"decoder": BlockDiffusion(unmasking=Unmasking("0.9"))},
            "unmasking.threshold must be a number, got '0.9'",
        ),
        (
            {"decoder": BlockDiffusion(choice=TokenChoice(jnp.ones(2)))},
            "choice.temperature must be a number, got Array",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(changes, message):
    arguments = {
        "model": tiny_model(), "prompts": jnp.zeros((2, 4), jnp.int32), "decoder": BlockDiffusion(),
        "new_tokens": 3, **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        decode(**arguments)
    with pytest.raises(ValueError, match=message):
        next(decode_steps(**arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 0}, "block_length must be a positive int, got block_length=0"),
        ({"block_length": 4.0}, "block_length must be a positive int, got block_length=4.0"),
        ({"block_length": True}, "block_length must be a positive int, got block_length=True"),
        ({"sight": "causal"}, "sight must be one of block_causal, bidirectional, got 'causal'"),
        ({"cache": "full"}, "cache must be one of none, prefix, dual, got 'full'"),
        ({"cache": "dual"}, "block_causal keeps earlier blocks .*, got cache='dual'"),
        (
            {"cfg_scale": 1.5},
            "cfg_scale is for sight='bidirectional' and must be None with 'block_causal', got 1.5",
        ),
        ({"cfg_scale": jnp.float32(2)}, "must be None with 'block_causal', got 2.0"),
        (
            {"sight": "bidirectional", "cfg_scale": -1.5},
            "cfg_scale must be -1 or more and finite, or None, got -1.5",
        ),
        ({"sight": "bidirectional", "cfg_scale": float("nan")}, "or None, got nan"),
        ({"sight": "bidirectional", "cfg_scale": float("inf")}, "or None, got inf"),
    ],
)
def test_wrong_decoders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockDiffusion(**options)
