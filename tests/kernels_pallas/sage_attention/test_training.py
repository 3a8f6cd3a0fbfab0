"""Training through the kernels: rematerialized layers, scanned over; losses of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import sage_attention
from kernels_pallas.sage_attention import vjp

KEEP = jax.checkpoint_policies.save_only_these_names(vjp.RESIDUALS)


def model(implementation, policy, mesh=None):
    """The loss of residual attention layers that denoise a sequence."""
    attend = functools.partial(sage_attention, is_causal=True, implementation=implementation)
    if mesh is not None:
        split = jax.P("data")
        attend = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split)

    def layer(x, weights):
        normal = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        heads = (*x.shape[:2], x.shape[2] // 64, 64)
        query, key, value = ((normal @ weights[i]).reshape(heads) for i in range(3))
        return x + attend(query, key, value).reshape(x.shape) @ weights[3], None

    def loss(weights, x, target):
        out, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights)
        return jnp.mean((out - target) ** 2)

    return loss


def losses(implementation, *, layers, policy, mesh=None, tokens=1024, width=256, steps=10):
    """Trains; returns the loss of every step. A mesh splits the batch."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    target = normal(2, tokens, width).cumsum(axis=1) / np.sqrt(tokens)
    x, weights = target + 0.5 * normal(*target.shape), normal(layers, 4, width, width) / width**0.5
    weights = weights.at[:, 3].divide(layers)
    if mesh is not None:
        everywhere, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
        x, target = jax.device_put((x, target), split)
        weights = jax.device_put(weights, everywhere)
    step = jax.jit(jax.value_and_grad(model(implementation, policy, mesh)))
    found = []
    for _ in range(steps):
        value, gradient = step(weights, x, target)
        weights -= 0.3 * gradient
        found.append(float(value))
    return np.array(found)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("policy", "kernels"), [(KEEP, 5), (None, 5 + 2)])
def test_a_layer_that_keeps_the_residuals_runs_no_forward_kernel_again(policy, kernels):
    """Lowered as for an H100, so nothing runs; two kernels are the forward pass."""
    shapes = [(12, 4, 128, 128), (2, 200, 128), (2, 200, 128)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = jax.jit(jax.grad(model("mosaic_gpu", policy))).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == kernels


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 12])
@pytest.mark.parametrize("policy", [None, KEEP])
def test_losses_are_those_of_the_reference(layers, policy):
    kernels = losses("mosaic_gpu", layers=layers, policy=policy)
    assert kernels[-1] < kernels[0]
    reference = losses("xla", layers=layers, policy=policy)
    np.testing.assert_allclose(kernels, reference, rtol=5e-3)


def _two_devices():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


def test_reference_trains_alike_on_two_devices():
    """On the CPU, with fake devices; the kernels do so in the next test, on two GPUs."""
    arguments = {"layers": 2, "policy": KEEP, "tokens": 128, "width": 128, "steps": 3}
    two = losses("xla", mesh=_two_devices(), **arguments)
    np.testing.assert_allclose(two, losses("xla", **arguments), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 12])
def test_losses_on_two_gpus_are_those_of_the_reference_on_one(layers):
    kernels = losses("mosaic_gpu", layers=layers, policy=KEEP, mesh=_two_devices())
    one = losses("mosaic_gpu", layers=layers, policy=KEEP)
    np.testing.assert_allclose(kernels, one, rtol=1e-4)
    reference = losses("xla", layers=layers, policy=KEEP)
    print(f"{layers} layers: two GPUs {kernels}, one {one}, reference {reference}")
    np.testing.assert_allclose(kernels, reference, rtol=5e-3)


@pytest.mark.gpu
def test_peak_memory_is_close_to_that_of_cudnn():
    shape = jax.ShapeDtypeStruct((1, 32768, 16, 128), jnp.bfloat16)

    def peak(attend):
        def run(query, key, value, d_out):
            out, pullback = jax.vjp(attend, query, key, value)
            return out, pullback(d_out)

        memory = jax.jit(run).lower(*[shape] * 4).compile().memory_analysis()
        return sum(
            getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")
        )

    exact = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    assert peak(functools.partial(sage_attention, implementation="mosaic_gpu")) <= 1.25 * peak(
        exact
    )
