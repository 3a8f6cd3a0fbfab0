"""The quantization kernel against the quantizer of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.mosaic import interpreted
from kernels_pallas.mosaic.products import permute
from kernels_pallas.quantize import quantize
from kernels_pallas.sage_attention import schedule
from kernels_pallas.sage_attention.quantize_sm90 import Task, quantize_tiles


def draw(seed, dtype, shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def check(task, codes):
    """Every code, scale and sum of one task."""
    x, tokens = task.x.astype(jnp.float32), task.x.shape[1]
    below = jnp.ones(tokens, bool)[None]
    if task.lengths is not None:
        below = jnp.arange(tokens)[None] < task.lengths[:, None]
    smooth = x if task.mean is None else x - task.mean[:, None]
    smooth = jnp.where(below[..., None, None], smooth, 0)
    padded = -(-tokens // task.block) * task.block
    smooth = jnp.pad(smooth, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))).swapaxes(1, 2)
    tiles = smooth.reshape(*smooth.shape[:2], -1, task.block, smooth.shape[3])
    expected = quantize(tiles, tile_axes=(3, 4))
    rounded = np.asarray(expected.codes.reshape(smooth.shape), np.int32)
    np.testing.assert_allclose(codes.scale, expected.scale[..., 0, 0], rtol=1e-6)
    for found in (codes.plain, codes.transposed):
        if found is codes.transposed and found is not None:
            rounded = permute(rounded.swapaxes(2, 3))
        if found is not None:
            difference = np.abs(np.asarray(found, np.int32) - rounded)
            # The kernel multiplies by the inverse of the scale: ties may fall the other way.
            assert difference.max() <= 1
            assert difference.mean() < 1e-3  # 16-bit numbers have ties
    assert (codes.plain is not None, codes.transposed is not None) == (task.plain, task.transposed)
    if task.other is not None:
        other = task.other.astype(jnp.float32)
        for sums, factor in zip(codes.products, (other, x), strict=True):
            wanted = jnp.sum(x * factor, axis=-1).swapaxes(1, 2)
            np.testing.assert_allclose(sums[..., :tokens], wanted, rtol=1e-4, atol=1e-4)


def check_all(dtype, dim, block, tokens, *, interpret):
    query, key, value, other = (
        draw(i, dtype, (2, n, heads, dim))
        for i, (n, heads) in enumerate(
            ((tokens, 2), (tokens + 72, 1), (tokens + 72, 1), (tokens, 2))
        )
    )
    tasks = [
        Task(query, 128, lengths=jnp.array([tokens - 9, 3])),
        Task(key, block, mean=jnp.mean(key, axis=1, dtype=jnp.float32)),
        Task(value, block, plain=False),
    ]
    last = Task(query, 128, plain=False, other=other)
    for task, codes in zip(tasks, quantize_tiles(tasks, interpret=interpret), strict=True):
        check(task, codes)
    check(last, quantize_tiles([last], interpret=interpret)[0])


@pytest.mark.parametrize(
    ("dtype", "dim", "block"),
    [(jnp.bfloat16, 128, 256), (jnp.float16, 64, 128), (jnp.float32, 64, 256)],
)
def test_three_tensors_in_one_launch(monkeypatch, dtype, dim, block):
    """On two processors, so that each works through several tiles and uses its memory again."""
    monkeypatch.setattr(schedule, "processors", lambda: 2)
    with interpreted():
        check_all(dtype, dim, block, 304, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_on_the_gpu(dtype, dim, block):
    check_all(dtype, dim, block, 304, interpret=False)
    check_all(dtype, dim, block, 16384, interpret=False)
