"""The large and the small model on different devices, or divided over several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, TStitch, hybrid, stitch
from jaxgen.sampling.devices import bring, home_of, live_apart
from tests.jaxgen.sampling.test_stages import PATCHES, SIGMAS, noise, pair, run

FIRST, SECOND, THIRD, FOURTH = jax.devices()[:4]
POLICIES = [
    Alone(),
    Alone("small"),
    TStitch(0.25),
    SRDiffusion(5),
    SRDiffusion(threshold=0.5),
    HybridStitch(2, 6),
    HybridStitch(2, 6, score="model_diff"),
    HybridStitch(2, 8, score="v_diff", blend=1),
    HybridStitch(2, 7, refresh=2),
    HybridStitch(2, 7, refresh=2, update=True),
    HybridStitch(1, 7, refresh=2, update=True, score="model_diff"),
]


def on(model, place):
    """A model with its text and all else at another place."""
    return jax.device_put(model, place)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_models_on_different_devices_draw_what_they_draw_on_one(policy):
    large, small = pair()
    apart = [on(large, SECOND), on(small, THIRD)]
    steps = {}
    for name, models in (("one", [large, small]), ("two", apart)):
        steps[name] = list(stitch(*models, policy, noise(), SIGMAS, every=3))
    for one, two in zip(steps["one"], steps["two"], strict=True):
        assert (one.step, one.stage) == (two.step, two.stage)
        np.testing.assert_allclose(one.latents, two.latents, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.estimate, two.estimate, rtol=1e-5, atol=1e-5)
        if one.mask is None:
            assert two.mask is None
        else:
            np.testing.assert_array_equal(one.mask, two.mask)


def test_scores_of_the_user_may_come_from_anywhere():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, PATCHES)), jnp.float32)
    policy = HybridStitch(2, 6, score="user")
    large, small = pair()
    expected = run(policy, [large, small], scores=scores)
    models = [on(large, SECOND), on(small, THIRD)]
    np.testing.assert_allclose(run(policy, models, scores=scores), expected, rtol=1e-4, atol=1e-5)
    far = on(scores, FOURTH)
    np.testing.assert_allclose(run(policy, models, scores=far), expected, rtol=1e-4, atol=1e-5)


def test_each_model_computes_on_its_own_device():
    large, small = pair()
    models = [on(large, SECOND), on(small, THIRD)]
    where = [
        progress.latents.devices()
        for progress in stitch(*models, HybridStitch(2, 6), noise(), SIGMAS)
    ]
    assert where == [{SECOND}, {SECOND}, {THIRD}]
    assert hybrid.predict(models[1], on(noise(), THIRD), SIGMAS[0]).devices() == {THIRD}


def test_a_sharded_pair_and_one_beside_a_single_device():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=[FIRST, SECOND])
    large, small = pair()
    over = lambda x: NamedSharding(mesh, jax.P("data" if x.shape and x.shape[0] % 2 == 0 else None))
    policy = HybridStitch(2, 6, refresh=2)
    expected = run(policy, [large, small])
    repeated = NamedSharding(mesh, jax.P())
    divided = [
        dataclasses.replace(
            on(model, repeated), weights=jax.tree.map(lambda x: on(x, over(x)), model.weights)
        )
        for model in (large, small)
    ]
    np.testing.assert_allclose(run(policy, divided), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        run(policy, [divided[0], on(small, THIRD)]), expected, rtol=1e-4, atol=1e-5
    )


def test_text_goes_to_where_the_weights_are():
    guided, _ = pair()
    assert home_of(guided.weights) == SingleDeviceSharding(FIRST)
    assert guided.text.context.devices() == {FIRST}
    assert home_of({}) is None
    assert home_of({"a": np.ones(2)}) is None
    assert not live_apart(SingleDeviceSharding(FIRST), None)
    assert not live_apart(SingleDeviceSharding(FIRST), SingleDeviceSharding(FIRST))
    x = jnp.ones(3)
    assert bring(x, None) is x
