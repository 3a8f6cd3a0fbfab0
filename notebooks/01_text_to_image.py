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
# # Text to image, through INT8 attention
#
# This notebook draws emoji from captions with a small diffusion transformer (the MMDiT of Stable
# Diffusion 3), looks at what guidance and seeds do, swaps the attention for INT8, and trains a
# model of its own for a moment. It runs on a laptop CPU: `make setup`, then choose the
# environment `.venv` as its kernel.

# %%
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxgen as jg

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "pyproject.toml").exists())
TINY = "JAXGEN_TINY_NOTEBOOKS" in os.environ  # the tests set it: fewer steps, shorter training
STEPS = 2 if TINY else 28
jax.devices()

# %% [markdown]
# ## Draw
#
# A model is a folder with safetensors and JSON. Calling it compiles one program for text encoder,
# guidance and all sampling steps; the second call with other captions reuses it.

# %%
WEIGHTS = ROOT / "weights" / "openmoji-large"
model = jg.TextToImage.from_pretrained(WEIGHTS)
captions = [
    "woman firefighter dark skin tone",
    "fox",
    "man detective medium skin tone",
    "rocket",
    "person with beard dark skin tone",
    "volcano",
    "woman health worker light skin tone",
    "cat with wry smile",
]
for attempt in ("with compilation", "again"):
    start = time.perf_counter()
    pictures = model(captions, steps=STEPS, seed=3)
    print(f"{attempt}: {time.perf_counter() - start:.1f} s")
jg.image_grid(pictures, captions, columns=4, picture_size=88)

# %% [markdown]
# What the model was trained on, and what it reached, stands in its card:

# %%
card = model.card
{
    name: card.get(name)
    for name in ("data", "pictures_trained_on", "steps", "hardware", "final_loss")
}

# %% [markdown]
# ## Combinations that training never contained
#
# Some pairs of concept and skin tone were held out. The model has seen the concept in other tones
# and the tone on other concepts, never both together.

# %%
from train import openmoji

emojis = openmoji.load(64)
held_out = emojis.test
rows = np.linspace(0, len(held_out) - 1, 8).astype(int)
unseen = [held_out.captions[row] for row in rows]
jg.image_grid(model(unseen, steps=STEPS, seed=0), unseen, columns=4, picture_size=88)

# %% [markdown]
# The real ones, for comparison:

# %%
jg.image_grid(held_out.images[rows], unseen, columns=4, picture_size=88)

# %% [markdown]
# ## A smaller model
#
# `openmoji-small` shares the text encoder of `openmoji-large` and draws faster, and worse.

# %%
small = jg.TextToImage.from_pretrained(ROOT / "weights" / "openmoji-small")
columns = []
for one in (model, small):
    one(captions, steps=STEPS)  # compiles
    start = time.perf_counter()
    columns.append(one(captions, steps=STEPS))
    print(f"{(time.perf_counter() - start) / len(captions):.3f} s a picture")
jg.image_grid(np.concatenate(columns), captions * 2, columns=8, picture_size=88)

# %% [markdown]
# ## Guidance
#
# Guidance moves every step away from what the model would draw without a caption. It is an input of
# the compiled program: changing it does not compile again.

# %%
scales = [0.0, 1.0, 2.0, 4.0, 8.0]
one = [captions[0]] * 4
columns = [model(one, steps=STEPS, guidance_scale=scale, seed=[0, 1, 2, 3]) for scale in scales]
jg.image_grid(
    np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:]),
    headings=[f"guidance {scale:g}" for scale in scales],
    picture_size=88,
)

# %% [markdown]
# ## INT8 attention
#
# `sage_attention` has the signature of `jax.nn.dot_product_attention`. Queries, keys, values and
# probabilities are rounded to 8 bits, and so are the gradients: six of seven matrix products run on
# integers. The errors are small, and from about a thousand tokens on they stay the same.

# %%
keys = jax.random.split(jax.random.key(0), 4)
query, key, value, cotangent = (jax.random.normal(k, (1, 512, 4, 64)) for k in keys)


def output_and_gradients(attend):
    out, pullback = jax.vjp(lambda *inputs: attend(*inputs, is_causal=True), query, key, value)
    return out, *pullback(cotangent)


pairs = zip(
    ("output", "dQ", "dK", "dV"),
    output_and_gradients(jg.sage_attention),
    output_and_gradients(jax.nn.dot_product_attention),
    strict=True,
)
for name, int8, exact in pairs:
    print(f"{name:>6}: relative error {jnp.linalg.norm(int8 - exact) / jnp.linalg.norm(exact):.4f}")

# %% [markdown]
# The same weights, sampled through INT8 attention:

# %%
int8_model = jg.TextToImage.from_pretrained(WEIGHTS, attention="int8")
exact_and_int8 = np.concatenate([pictures[:4], int8_model(captions[:4], steps=STEPS, seed=3)])
jg.image_grid(exact_and_int8, [*captions[:4], *["INT8 attention"] * 4], columns=4, picture_size=88)

# %% [markdown]
# ## Train
#
# The training script is a function, too. Here a smaller model learns people at 32 pixels, with INT8
# attention forward and backward, for as long as `time_limit` says.

# %%
from train.text_to_image import train
from train.text_to_image_config import Config

folder = tempfile.TemporaryDirectory()
result = train(
    Config(
        output=Path(folder.name) / "run",
        model="tiny" if TINY else "openmoji-32",
        subset="people",
        attention="int8",
        precision="float32",
        batch_size=32,
        steps=20 if TINY else 150,
        warmup_steps=10,
        learning_rate=2e-3,
        ema_decay=0.98,
        log_every=5,
        sample_every=0,
    ),
    show_progress=False,
)
plt.figure(figsize=(6, 3))
plt.plot([row["step"] for row in result.rows], [row["loss"] for row in result.rows])
plt.xlabel("step")
plt.ylabel("flow matching loss")
plt.grid(alpha=0.3)

# %% [markdown]
# What it draws after so short a time:

# %%
jg.image_grid(
    result.pipeline(captions[::2], steps=STEPS, guidance_scale=2.0), captions[::2], columns=4
)

# %%
folder.cleanup()
