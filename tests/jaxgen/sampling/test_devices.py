"""The large and the small model on different devices, or divided over several."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from jaxgen.sampling import Alone, Guided, HybridStitch, SRDiffusion, TStitch, hybrid, stitch
from jaxgen.sampling.devices import Home, bring, home_of, live_apart, meet
from jaxgen.sampling.state import State
from tests.jaxgen.sampling.test_stages import MODELS, PATCHES, SIGMAS, noise, pair, run, text_of

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


def mesh_of(*devices):
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


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


@pytest.mark.parametrize("places", [(None, None), (SECOND, THIRD)])
@pytest.mark.parametrize("policy", [HybridStitch(2, 6), TStitch(0.25), SRDiffusion(3)], ids=str)
def test_released_models_are_gone(policy, places):
    models = [
        jax.tree.map(lambda x: x + 0, model) if place is None else on(model, place)
        for model, place in zip(pair(), places, strict=True)
    ]
    alive = {
        name: weakref.ref(jax.tree.leaves(model.weights)[0])
        for name, model in zip(("large", "small"), models, strict=True)
    }
    released = {}

    def release(name):
        gc.collect()
        released[name] = alive[name]() is None

    for _ in stitch(models.pop(0), models.pop(0), policy, noise(), SIGMAS, release=release):
        pass
    assert released == {"large": True, "small": True}


def test_the_memory_is_used_up_by_a_hybrid_stage_on_two_devices():
    policy = HybridStitch(0, 0, share=0.3, refresh=2)
    large, small = (on(model, place) for model, place in zip(pair(), (SECOND, THIRD), strict=True))
    state = on(State.start(noise()), SECOND)
    state, memory = hybrid.remember(large, None, state, SIGMAS, 1, None, policy=policy)
    given = jax.tree.leaves(memory.region)
    hybrid.mix_apart(large, small, state, memory, SIGMAS, 2, 4, 2, policy=policy)
    assert all(leaf.is_deleted() for leaf in given)


def test_noise_that_is_divided_or_elsewhere():
    mesh = mesh_of(FIRST, SECOND)
    divided = on(noise(), NamedSharding(mesh, jax.P("data")))
    elsewhere = on(noise(), FOURTH)
    for policy in (Alone(), TStitch(0.25), HybridStitch(2, 6)):
        expected = run(policy)
        for start in (divided, elsewhere):
            np.testing.assert_allclose(run(policy, start=start), expected, rtol=1e-4, atol=1e-5)
    far = on(pair()[0], SECOND)
    start = on(noise(), FIRST)
    np.testing.assert_allclose(run(Alone(), [far, None], start), run(Alone()), rtol=1e-4, atol=1e-5)
    both = [on(model, SECOND) for model in pair()]
    np.testing.assert_allclose(
        run(HybridStitch(2, 6), both, start), run(HybridStitch(2, 6)), rtol=1e-4, atol=1e-5
    )


def test_meshes_of_the_same_devices_in_another_order():
    places = [
        NamedSharding(mesh_of(*devices), jax.P()) for devices in ((FIRST, SECOND), (SECOND, FIRST))
    ]
    models = [on(model, place) for model, place in zip(pair(), places, strict=True)]
    for policy in (TStitch(0.25), HybridStitch(2, 6)):
        np.testing.assert_allclose(run(policy, models), run(policy), rtol=1e-4, atol=1e-5)


def test_weights_of_which_only_some_are_on_a_mesh():
    mesh = mesh_of(FIRST, SECOND)
    model = MODELS["large"]
    graph, weights = nnx.split(model)
    matrices = jax.tree.map(
        lambda x: on(x, NamedSharding(mesh, jax.P())) if x.ndim > 1 else x, weights
    )
    home = home_of(matrices)
    assert home == (NamedSharding(mesh, jax.P()), True)
    guided = Guided.of(nnx.merge(graph, matrices), text_of(0, 2), text_of(1, 2), 3.0)
    np.testing.assert_allclose(run(Alone(), [guided, None]), run(Alone()), rtol=1e-4, atol=1e-5)


def test_homes():
    place = SingleDeviceSharding(FIRST)
    weights = {"a": jnp.ones(2)}
    assert home_of(weights) == Home(place, False)
    assert home_of(on(weights, SECOND)) == Home(SingleDeviceSharding(SECOND), True)
    assert home_of({}) is None
    assert home_of({"a": np.ones(2)}) is None
    assert not live_apart(home_of(weights), None)
    assert not live_apart(home_of(weights), Home(place, True))
    assert live_apart(home_of(weights), home_of(on(weights, SECOND)))
    x = jnp.ones(3)
    assert bring(x, None) is x
    assert meet(x, home_of(weights)) is x
    assert meet(x, home_of(on(weights, SECOND))).devices() == {SECOND}
    seen = []
    jax.jit(lambda weights: seen.append(home_of(weights)))(weights)
    assert seen == [None]
