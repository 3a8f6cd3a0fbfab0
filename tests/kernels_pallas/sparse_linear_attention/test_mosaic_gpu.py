"""The kernels against the reference: interpreted on a CPU, with race detection; on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import explain_sparse_linear_attention, sparse_linear_attention
from kernels_pallas.mosaic import interpreted
from kernels_pallas.sparse_linear_attention import head_groups

NAMES = ("out", "query", "key", "value", "logits")


def draw(seed, *, batch=1, queries, keys, heads=1, dim, dtype="bfloat16"):
    """Query, key, value, mixing logits and a cotangent; keys have a mean."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    narrow = lambda *shape: normal(*shape).astype(dtype)
    key = (normal(batch, keys, heads, dim) + normal(1, 1, 1, dim)).astype(dtype)
    return (
        narrow(batch, queries, heads, dim),
        key,
        narrow(batch, keys, heads, dim),
        normal(heads, -(-queries // 128)),
        narrow(batch, queries, heads, dim),
    )


def program(implementation, **options):
    """Output and all gradients, compiled."""
    attend = functools.partial(sparse_linear_attention, implementation=implementation, **options)

    @jax.jit
    def run(*inputs):
        *operands, d_out = inputs
        out, pullback = jax.vjp(attend, *operands)
        return out, *pullback(d_out)

    return run


def compare(found, wanted, dtype):
    bound = 1e-2 if dtype == "bfloat16" else 2e-3
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        x, y = (np.asarray(array, np.float64) for array in (x, y))
        assert np.isfinite(x).all(), name
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y), name


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        ({"queries": 200, "keys": 300, "dim": 64, "heads": 2}, {"kept_fraction": 0.5}, "bfloat16"),
        ({"queries": 136, "keys": 256, "dim": 128}, {"kept_fraction": 0.3}, "float16"),
        (
            {"queries": 77, "keys": 259, "dim": 64},
            {"kept_fraction": 0.5, "quantize": False, "smooth_features": False},
            "float16",
        ),
    ],
)
def test_interpreted(shape, options, dtype):
    inputs = draw(0, dtype=dtype, **shape)
    with interpreted():
        found = program("mosaic_gpu", **options)(*inputs)
    compare(found, program("xla", **options)(*inputs), dtype)


@pytest.fixture
def grouped(monkeypatch):
    """Cuts heads into groups even where their matrices are small."""
    monkeypatch.setattr(head_groups, "_LARGE", 0)


def test_groups_of_heads():
    assert head_groups.cut(12, 2**26) == (range(12),)
    assert head_groups.cut(12, 2**26 + 1) == tuple(range(i, i + 3) for i in (0, 3, 6, 9))
    assert head_groups.cut(7, 2**30) == (range(1), range(1, 3), range(3, 5), range(5, 7))
    assert head_groups.cut(3, 2**30) == (range(1), range(1, 2), range(2, 3))


def test_interpreted_in_groups_of_heads(grouped):
    inputs = draw(2, queries=100, keys=260, dim=64, heads=3)
    options = {"kept_fraction": 0.5}
    with interpreted():
        found = program("mosaic_gpu", **options)(*inputs)
    compare(found, program("xla", **options)(*inputs), "bfloat16")


@pytest.mark.parametrize("compile_whole", [False, True])
def test_a_pullback_may_be_called_again(compile_whole):
    # The backward pass writes where a residual was, so it must write into a copy of it.
    *operands, gradient = draw(3, queries=130, keys=200, dim=64)
    attend = functools.partial(
        sparse_linear_attention, kept_fraction=0.4, implementation="mosaic_gpu"
    )

    def twice(gradient, *operands):
        _, pull = jax.vjp(attend, *operands)
        return pull(gradient), pull(gradient)

    with interpreted():
        first, second = (jax.jit(twice) if compile_whole else twice)(gradient, *operands)
    for one, other in zip(first, second, strict=True):
        assert np.isfinite(np.asarray(one, np.float32)).all()
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (one, other)))


def test_interpreted_forward_alone():
    *operands, _ = draw(1, queries=100, keys=200, dim=64)
    attend = functools.partial(sparse_linear_attention, kept_fraction=0.4)
    with interpreted():
        found = attend(*operands, implementation="mosaic_gpu")
    wanted = attend(*operands, implementation="xla")
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, wanted)), atol=2e-2)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("quantize", [True, False])
def test_lowers_for_a_hopper_gpu(dim, quantize):
    shape = jax.ShapeDtypeStruct((1, 32760, 2, dim), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((2, 256), jnp.float32)
    traced = program("mosaic_gpu", quantize=quantize).trace(*[shape] * 3, logits, shape)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 6


@pytest.mark.usefixtures("hopper", "grouped")
def test_groups_of_heads_lower_wherever_people_put_attention():
    shape = jax.ShapeDtypeStruct((2, 1024, 5, 64), jnp.bfloat16)
    attend = functools.partial(
        sparse_linear_attention, mixing_logits=jnp.zeros(5), implementation="mosaic_gpu"
    )
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.P("data")

    def layers(query, key, value):
        step = jax.checkpoint(lambda x, _: (attend(x, key, value), None))
        return jax.lax.scan(step, query, None, length=2)[0]

    for function in (
        layers,
        jax.vmap(lambda *x: attend(*(y[None] for y in x))[0]),
        jax.shard_map(attend, mesh=mesh, in_specs=(split,) * 3, out_specs=split),
    ):
        loss = lambda *x, f=function: jnp.sum(f(*x).astype(jnp.float32) ** 2)
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*[shape] * 3)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        # Four for the gradient of keys and values.
        assert text.count("mosaic_gpu_v2") >= 9


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 512, 1, 64), {"selection": "soft"}, "it has no soft choice"),
        ((1, 512, 1, 80), {}, "head_dim must be 64 or 128, got 80"),
        ((1, 512, 1, 64), {"block_q": 64}, "must be 128 and 64, got 64 and 64"),
        ((1, 512, 1, 64), {"kept_fraction": 1.0}, "it keeps all blocks"),
        ((1, 512, 1, 64), {"gradient_scores": "int8"}, "it has no gradient_scores='int8'"),
        ((1, 512, 1, 64), {"scale": -1.0}, "scale must be positive, got -1.0"),
    ],
)
def test_what_it_does_not_take(shape, options, reason):
    array, logits = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((1,), "float32")
    text = explain_sparse_linear_attention(array, array, array, logits, **options)
    assert text.startswith("sparse_linear_attention runs as 'xla', not as 'mosaic_gpu':")
    assert reason in text
    with pytest.raises(NotImplementedError, match=reason):
        explain_sparse_linear_attention(
            array, array, array, logits, implementation="mosaic_gpu", **options
        )


@pytest.mark.usefixtures("hopper")
def test_takes_what_it_supports():
    array, logits = jax.ShapeDtypeStruct((1, 999, 2, 128), "bfloat16"), jnp.zeros(2)
    text = explain_sparse_linear_attention(array, array, array, logits)
    assert text == "sparse_linear_attention runs as 'mosaic_gpu'"


def drawn(seed):
    """A shape and options that the kernels take."""
    rng = np.random.default_rng(1000 + seed)
    queries, keys = (int(n) for n in rng.integers(1, 1500, 2))
    keys = max(keys, 130)  # at least three blocks
    shape = {
        "batch": int(rng.integers(1, 3)),
        "queries": queries,
        "keys": keys,
        "heads": int(rng.integers(1, 4)),
        "dim": int(rng.choice([64, 128])),
        "dtype": str(rng.choice(["bfloat16", "float16"])),
    }
    options = {
        "kept_fraction": float(rng.uniform(0.02, 0.95)),
        "quantize": bool(rng.random() < 0.7),
        "smooth_features": bool(rng.random() < 0.7),
    }
    blocks = -(-keys // 64)
    if int(options["kept_fraction"] * blocks) >= blocks:
        options["kept_fraction"] = 0.5
    return shape, options


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_drawn_shapes_and_equal_bits(seed, monkeypatch):
    shape, options = drawn(seed)
    if seed % 2:
        monkeypatch.setattr(head_groups, "_LARGE", 0)
    inputs = draw(seed, **shape)
    run = program("mosaic_gpu", **options)
    found, again = run(*inputs), run(*inputs)
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = program("xla", **options)(*jax.device_put(inputs, jax.devices("cpu")[0]))
    compare(found, wanted, shape["dtype"])
    for name, x, y in zip(NAMES, found, again, strict=True):
        assert (np.asarray(x) == np.asarray(y)).all(), name
