"""How accurate INT8 attention is on this device: `python -m kernels_pallas.accuracy --help`.

Prints relative L2 errors of output and gradients against float64 attention, for INT8 attention on
float32 inputs and for `jax.nn.dot_product_attention` on bfloat16 inputs, which is what INT8 stands
in for. Inputs are N(0, 1), drawn in float32; biased keys have channel means of that deviation.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.sage_attention import sage_attention

_TENSORS = ("O", "dQ", "dK", "dV")


def errors(
    tokens: int, head_dim: int, *, key_bias: float = 0.0, is_causal: bool = False, heads: int = 2
) -> dict[str, tuple[float, ...]]:
    """Measure relative L2 errors of (O, dQ, dK, dV), by name of the arithmetic.

    Args:
        tokens: number of queries and keys.
        head_dim: size of a head.
        key_bias: standard deviation of the mean of every channel of the keys.
        is_causal: mask the future.
        heads: number of heads.
    """
    rng = np.random.default_rng(tokens + head_dim)
    query, key, value, d_out = rng.standard_normal((4, 1, tokens, heads, head_dim), np.float32)
    key = key + np.float32(key_bias) * rng.standard_normal((1, 1, heads, head_dim), np.float32)
    inputs = (query, key, value, d_out)

    with jax.enable_x64(True):
        exact = _attend(_softmax_attention, inputs, jnp.float64, is_causal)
    contestants = {
        "int8": _attend(sage_attention, inputs, jnp.float32, is_causal),
        "bf16": _attend(jax.nn.dot_product_attention, inputs, jnp.bfloat16, is_causal),
    }
    return {
        name: tuple(
            float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))
            for actual, wanted in zip(tensors, exact, strict=True)
        )
        for name, tensors in contestants.items()
    }


def _softmax_attention(query, key, value, *, is_causal):
    """Attention as its definition reads, in the dtype of the inputs throughout."""
    scores = jnp.einsum("btnd,bsnd->bnts", query, key) / query.shape[-1] ** 0.5
    if is_causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores, axis=-1), value)


def _attend(attention, inputs, dtype, is_causal):
    """Output and gradients, as float64 numpy arrays."""

    @jax.jit
    def program(query, key, value, d_out):
        attend = functools.partial(attention, is_causal=is_causal)
        out, pullback = jax.vjp(attend, query, key, value)
        return out, *pullback(d_out)

    with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes dtypes for bfloat16
        tensors = program(*(jnp.asarray(x, dtype) for x in inputs))
    return [np.asarray(x).astype(np.float64) for x in tensors]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="Errors of INT8 attention against float64.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--key-bias", type=float, nargs="+", default=[0.0, 8.0])
    parser.add_argument("--causal", action="store_true", help="mask the future")
    arguments = parser.parse_args()
    header = ["tokens", "head_dim", "key bias"]
    header += [f"{name} {tensor}" for name in ("int8", "bf16") for tensor in _TENSORS]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for head_dim in arguments.head_dim:
        for key_bias in arguments.key_bias:
            for tokens in arguments.tokens:
                options = {"key_bias": key_bias, "is_causal": arguments.causal}
                measured = errors(tokens, head_dim, **options)
                cells = [f"{x:.4f}" for name in ("int8", "bf16") for x in measured[name]]
                print(f"| {tokens} | {head_dim} | {key_bias:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
