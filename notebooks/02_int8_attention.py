# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How accurate is INT8 attention that trains?
#
# `sage_attention` rounds queries, keys, values, probabilities and their gradients to 8 bits. This
# notebook measures what that costs: over the spread of the scores as in the paper (SageBwd,
# arXiv 2603.02170, Table 1), over the length, with biased keys and values, and on the activations
# of a trained transformer. It runs on a laptop CPU; the arithmetic is the same on a GPU.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxgen as jg
from kernels_pallas import explain, sage_attention

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "pyproject.toml").exists())
TINY = "JAXGEN_TINY_NOTEBOOKS" in os.environ  # the tests set it: shorter sequences
TENSORS = ("O", "dQ", "dK", "dV")

# %% [markdown]
# Which implementation this device takes, and why:

# %%
array = jax.ShapeDtypeStruct((1, 1024, 16, 128), jnp.bfloat16)
explain(array, array, array, is_causal=True)

# %% [markdown]
# ## The measure
#
# Output and gradients of INT8 attention on float32 inputs, and of exact attention in bfloat16,
# which is what INT8 stands in for; both against float64. The error is ‖a - b‖ / ‖b‖.


# %%
def exact_attention(query, key, value, is_causal=False):
    scores = jnp.einsum("btnd,bsnd->bnts", query, key) / np.sqrt(query.shape[-1])
    if is_causal:
        seen = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores), value)


def gradients(attend, inputs, dtype):
    *operands, d_out = (jnp.asarray(x).astype(dtype) for x in inputs)
    out, pullback = jax.vjp(attend, *operands)
    return [np.asarray(x, np.float64) for x in (out, *pullback(d_out))]


def errors(inputs, **options):
    """Relative L2 of (O, dQ, dK, dV): INT8, and exact attention in bfloat16."""
    causal = {"is_causal": options.get("is_causal", False)}
    with jax.enable_x64(True):
        wanted = gradients(lambda *x: exact_attention(*x, **causal), inputs, jnp.float64)
    int8 = gradients(lambda *x: sage_attention(*x, **options), inputs, jnp.float32)
    bf16 = gradients(lambda *x: jax.nn.dot_product_attention(*x, **causal), inputs, jnp.bfloat16)
    return [
        [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(actual, wanted, strict=True)]
        for actual in (int8, bf16)
    ]


def draw(seed, tokens, head_dim=64, heads=2):
    normal = np.random.default_rng(seed).standard_normal
    return [normal((1, tokens, heads, head_dim), np.float32) for _ in range(4)]


# %% [markdown]
# ## The spread of the scores
#
# Queries and keys of standard deviation sigma. The scores then spread by sigma², and rounding Q
# and K shifts them by more than softmax forgives: this, not the length, is what INT8 attention
# cannot take. QK-norm keeps sigma near 1.

# %%
published = {
    1: (0.0160, 0.0184, 0.0220, 0.0159),
    3: (0.0389, 0.0758, 0.0777, 0.0387),
    5: (0.0603, 0.2014, 0.2007, 0.0605),
    8: (0.0972, 0.4666, 0.4699, 0.0973),
    10: (0.1161, 0.6648, 0.6684, 0.1157),
}
measured = {}
for sigma in published:
    query, key, value, d_out = draw(sigma + 64, 128 if TINY else 1024)
    measured[sigma], _ = errors([sigma * query, sigma * key, value, d_out], is_causal=True)
    pairs = zip(TENSORS, measured[sigma], strict=True)
    print(f"sigma {sigma:>2}:", *(f"{name} {error:.4f}" for name, error in pairs))

figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True)
for i, (name, panel) in enumerate(zip(TENSORS, axes, strict=True)):
    panel.plot(list(published), [measured[s][i] for s in published], "o-", label="here")
    panel.plot(list(published), [published[s][i] for s in published], "x:", label="paper")
    panel.set(title=name, xlabel="sigma of Q and K", yscale="log")
    panel.grid(which="both", alpha=0.3)
axes[0].set_ylabel("relative L2")
_ = axes[0].legend()

# %% [markdown]
# ## The length
#
# Scales belong to tiles, so errors do not grow with the number of tokens.

# %%
lengths = [64, 128] if TINY else [64, 256, 1024, 2048]
lines = np.array([errors(draw(tokens, tokens)) for tokens in lengths])  # length, kind, tensor
plt.figure(figsize=(5, 3))
for i, name in enumerate(TENSORS):
    plt.plot(lengths, lines[:, 0, i], "o-", label=f"INT8 {name}")
plt.plot(lengths, lines[:, 1].max(axis=1), "k:", label="worst of bfloat16")
plt.xscale("log", base=2)
plt.ylim(bottom=0)
plt.xlabel("tokens")
plt.ylabel("relative L2")
plt.grid(alpha=0.3)
_ = plt.legend(fontsize="small")

# %% [markdown]
# ## Biased keys and values
#
# Trained models have channels whose mean is far above their spread; here the means have a standard
# deviation of 4. Keys are smoothed already, `smooth_values=True` does the same for values: the bias
# costs INT8 attention nothing, while it makes bfloat16 several times less accurate than it was.

# %%
query, key, value, d_out = draw(0, 128 if TINY else 1024, head_dim=128)
rng = np.random.default_rng(1)
key = key + 4 * rng.standard_normal((1, 1, 2, 128), np.float32)
value = value + 4 * rng.standard_normal((1, 1, 2, 128), np.float32)
biased = [query, key, value, d_out]
for name, kind in (("INT8", 0), ("bfloat16", 1)):
    figures = errors(biased, smooth_values=True)[kind]
    print(f"{name:>9}:", *(f"{n} {e:.4f}" for n, e in zip(TENSORS, figures, strict=True)))

# %% [markdown]
# ## A trained transformer
#
# Queries, keys, values and the gradients of the outputs in every block of `openmoji-large`, caught
# while it looks at noisy pictures of its training set.

# %%
from jaxgen.sampling import flow_matching_loss, timestep_of
from train import openmoji

model = jg.TextToImage.from_pretrained(ROOT / "weights" / "openmoji-large")
emojis = openmoji.load(64, limit=64)
pictures = jnp.asarray(emojis.images[: 2 if TINY else 8], jnp.float32) / 127.5 - 1
context, pooled = model.text_encoder(
    jnp.asarray(model.tokenizer.encode(emojis.captions[: len(pictures)]))
)


probes, caught = [], []


def recorder(query, key, value):
    """Exact attention that notes its operands; a probe added to its output gets the gradient."""
    caught.append((query, key, value))
    return jax.nn.dot_product_attention(query, key, value) + probes[len(caught) - 1]


for block in model.transformer.blocks:
    block.attention.attend = recorder


def loss(new_probes):
    probes[:], caught[:] = new_probes, []
    velocity = lambda noisy, sigma: model.transformer(noisy, timestep_of(sigma), context, pooled)
    value = flow_matching_loss(velocity, pictures, jax.random.key(0)).mean()
    return value, tuple(caught)


shapes = [query.shape for query, _, _ in jax.eval_shape(loss, [0.0] * 99)[1]]
d_outs, operands_of = jax.grad(loss, has_aux=True)([jnp.zeros(shape) for shape in shapes])

print("block   spread of Q, K   INT8: O dQ dK dV              bfloat16: O dQ dK dV")
worst = []
for index, (operands, d_out) in enumerate(zip(operands_of, d_outs, strict=True)):
    inputs = [np.asarray(x) for x in (*operands, d_out)]
    int8, bf16 = errors(inputs, smooth_values=True)
    worst.append(int8)
    spread = (x.std() for x in inputs[:2])
    print(
        f"{index:>5}  ", *(f"{s:6.2f}" for s in spread), "  ",
        *(f"{e:.4f}" for e in int8), "     ", *(f"{e:.4f}" for e in bf16),
    )  # fmt: skip

# %% [markdown]
# The output is closer than on random numbers, because part of it is the mean of the values,
# which is not rounded; the gradients are as far off as there, but for one block's dQ.

# %%
plt.figure(figsize=(5, 3))
for i, name in enumerate(TENSORS):
    plt.plot([row[i] for row in worst], "o-", label=name)
plt.xlabel("block")
plt.ylabel("relative L2, INT8")
plt.ylim(bottom=0)
plt.grid(alpha=0.3)
_ = plt.legend()
