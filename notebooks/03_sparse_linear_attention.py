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
# # Attention to a twentieth of the video
#
# SLA2 ([arXiv 2602.12675](https://arxiv.org/abs/2602.12675)) gives softmax attention to a few
# blocks of keys, linear attention to all others, and mixes the two. This notebook opens a small
# video model that was fine-tuned this way and looks at which blocks its routers choose, what is
# lost at which sparsity, what it draws, and what it saves. It runs on a laptop CPU: the fast
# kernels are for Hopper GPUs, elsewhere the same arithmetic runs in plain `jnp`.
#
# `moving-emoji` draws clips of 16 frames of 64 x 64 pixels, 4,096 tokens, with full attention;
# `moving-emoji-sla2` is the same model after its attention was replaced, 5 % of the blocks kept.

# %%
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from matplotlib_inline.backend_inline import set_matplotlib_formats

import jaxgen as jg
from jaxgen.layers import exact_attention
from jaxgen.models.wan import cube_order
from jaxgen.pipelines import TextToVideo
from train.moving_emoji import contact_sheet, save_gif
from train.text_to_video_config import Config
from train.text_to_video_parts import open_clips, to_floats

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "pyproject.toml").exists())
TINY = "JAXGEN_TINY_NOTEBOOKS" in os.environ  # the tests set it: fewer steps, layers and points
set_matplotlib_formats("jpeg", pil_kwargs={"quality": 75})
full = TextToVideo.from_pretrained(ROOT / "weights" / "moving-emoji")
sla2 = TextToVideo.from_pretrained(ROOT / "weights" / "moving-emoji-sla2")
clip = open_clips(Config(figures=48, size=64))["validation"][4]
print(clip["caption"])
contact_sheet(clip["video"])

# %% [markdown]
# ## What the layers see
#
# We put noise over the clip and let the fine-tuned model predict, and keep queries, keys and values
# of every layer. Its attention modules are replaced by functions that remember what they are given.

# %%
SIGMA = 0.6
layers = [block.self_attention.attend for block in sla2.transformer.blocks]
seen = {}


def remember(number):
    def attend(query, key, value):
        seen[number] = query, key, value
        return layers[number](query, key, value)

    return attend


for number, block in enumerate(sla2.transformer.blocks):
    block.self_attention.attend = remember(number)
tokens = jnp.asarray(sla2.tokenizer.encode([clip["caption"]]))
context, _ = sla2.text_encoder(tokens)
clean = to_floats(clip["video"])[None]
noise = jax.random.normal(jax.random.key(0), clean.shape)
noisy = (1 - SIGMA) * clean + SIGMA * noise
sla2.transformer(noisy, jnp.full(1, 1000 * SIGMA), context)
for block, layer in zip(sla2.transformer.blocks, layers, strict=True):
    block.self_attention.attend = layer
first = layers[0]
batch, length, heads, head_dim = seen[0][0].shape
print(f"{len(seen)} layers of {heads} heads of {head_dim}, {length} tokens, blocks of")
print(f"{first.block_q} queries x {first.block_k} keys, {first.kept_fraction:.0%} of them kept")

# %% [markdown]
# ## How much attention falls on a twentieth of the keys?
#
# Sparse attention lives on concentration. For every head: the share of the softmax weight that lies
# in the best 5 % of the blocks, chosen by someone who knows the weights; and in those that the
# router chose, which sees only the means of blocks.


# %%
@jax.jit
def weight_of_blocks(query, key):
    """Softmax weight on each block of keys, mean of a block of queries; one head."""
    weights = jax.nn.softmax(query @ (key - key.mean(0)).T / np.sqrt(head_dim), axis=-1)
    cut = weights.reshape(-1, first.block_q, length // first.block_k, first.block_k)
    return cut.sum(axis=3).mean(axis=1)


shown = [0, 5] if TINY else range(len(layers))
best, routed = np.zeros((2, len(shown), heads))
chosen = {}
for row, number in enumerate(shown):
    query, key, _ = seen[number]
    chosen[number] = np.asarray(layers[number].route(query, key))[0]
    for head in range(heads):
        weight = np.asarray(weight_of_blocks(query[0, :, head], key[0, :, head]))
        kept = chosen[number][head].sum(axis=1)[0]
        best[row, head] = np.sort(weight, axis=1)[:, -kept:].sum(axis=1).mean()
        routed[row, head] = (weight * chosen[number][head]).sum(axis=1).mean()
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
for panel, values, title in zip(panels, (best, routed), ("the best 5 %", "as routed"), strict=True):
    panel.imshow(values, vmin=0, vmax=1, cmap="viridis")
    for (row, head), share in np.ndenumerate(values):
        panel.text(head, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
    panel.set(title=title, xlabel="head", yticks=range(len(shown)), yticklabels=shown)
panels[0].set_ylabel("layer")
print(f"mean of all heads: best {best.mean():.0%}, routed {routed.mean():.0%}")

# %% [markdown]
# Routers find most of what there is to find. But many heads of this small model average over much
# of the clip: more than half of their weight lies outside, and linear attention has to stand in
# for it. Large video models attend more sharply.

# %% [markdown]
# ## Where the routers look
#
# One block of queries, outlined, and the tokens that its heads attend to by softmax: the brighter,
# the more heads chose them.

# %%
GRID = 16, 16, 16  # frames, rows and columns of patches of 4 x 4 pixels
order = cube_order(GRID, sla2.transformer.config.token_cube)


def on_the_video(values, size):
    """Values of blocks of tokens as (frames, rows, columns)."""
    placed = np.zeros(length)
    placed[order] = np.repeat(values, size)
    return placed.reshape(GRID)


figures = np.abs(clip["video"][8].astype(int) - clip["video"][8, 0, 0]).sum(axis=-1)
row, column = np.unravel_index(figures.argmax(), figures.shape)
place = np.zeros(GRID, bool)
place[8, row // 4, column // 4] = True
block = int(np.argmax(place.reshape(-1)[order]) // first.block_q)
own = on_the_video(np.arange(length // first.block_q) == block, first.block_q)
frames = range(1, 16, 3) if TINY else range(0, 16, 2)
looked = list(shown)[:: 1 if TINY else 2]
grid, panels = plt.subplots(
    len(looked), len(frames), figsize=(10, 1.3 * len(looked)), layout="constrained"
)
for panel_row, number in zip(panels, looked, strict=True):
    count = on_the_video(chosen[number][:, block].sum(axis=0), first.block_k)
    for panel, frame in zip(panel_row, frames, strict=True):
        light = np.kron(0.25 + 0.75 * np.minimum(count[frame] / 3, 1), np.ones((4, 4)))[..., None]
        panel.imshow((clip["video"][frame] * light).astype(np.uint8))
        if own[frame].any():
            panel.contour(np.kron(own[frame], np.ones((4, 4))), [0.5], colors="red")
        panel.set(xticks=[], yticks=[])
    panel_row[0].set_ylabel(f"layer {number}")
for panel, frame in zip(panels[0], frames, strict=True):
    panel.set_title(f"frame {frame}", fontsize="small")

# %% [markdown]
# The whole map of a layer: blocks of queries down, blocks of keys across, both in the order of the
# tokens, cube by cube. Bright where several heads chose the pair.

# %%
across = min(4, len(shown))
grid, panels = plt.subplots(
    -(-len(shown) // across), across, figsize=(10, 0.8 * len(shown)), layout="constrained"
)
for panel, number in zip(np.ravel(panels), shown, strict=True):
    panel.imshow(chosen[number].sum(axis=0), cmap="magma", vmax=heads, aspect="auto")
    panel.set_title(f"layer {number}", fontsize="small")
    panel.set(xticks=[], yticks=[])

# %% [markdown]
# ## What is lost at which sparsity
#
# The distance from full attention on the same queries, keys and values, over the share of the
# blocks that gets softmax attention. For the mixture, the ratios are set by least squares at each
# sparsity, as they are before training. The dashed line is linear attention alone.

# %%
fractions = (0.05, 0.3) if TINY else (0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.7)


def distance(result, wanted):
    return float(jnp.linalg.norm(result - wanted) / jnp.linalg.norm(wanted))


def mixed(layer, logits, inputs):
    """What the layer gives with other mixing logits."""
    changed = layer.with_options(quantize=False)
    changed.mixing_logits[...] = jnp.broadcast_to(logits, layer.mixing_logits.shape)
    return changed(*inputs)


grid, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
for panel, number in zip(panels, (0, 2, 5), strict=True):
    inputs, layer = seen[number], layers[number]
    wanted = exact_attention(*inputs)
    sparse, both = [], []
    for fraction in fractions:
        other = layer.with_options(kept_fraction=fraction)
        sparse.append(distance(mixed(other, 40.0, inputs), wanted))
        both.append(distance(mixed(other, other.calibrate_mixing(*inputs), inputs), wanted))
    linear = distance(mixed(layer.with_options(kept_fraction=0.01), -40.0, inputs), wanted)
    panel.plot(fractions, sparse, "o-", label="chosen blocks alone")
    panel.plot(fractions, both, "o-", label="SLA2")
    panel.axhline(linear, color="gray", linestyle="--", label="linear alone")
    panel.set(title=f"layer {number}", xlabel="share of blocks kept", xscale="log")
    panel.minorticks_off()
    panel.set_xticks(fractions, [f"{fraction:.0%}" for fraction in fractions])
    panel.grid(alpha=0.3)
panels[0].set_ylabel("relative error")
panels[0].legend(fontsize="small")

# %% [markdown]
# ## What that costs the model
#
# Validation losses after 800 steps of fine-tuning, over that of full attention after the same
# steps: means and standard deviations of the seeds in `train/configs/results/sla2_experiment.json`
# (`python -m train.configs.sla2_experiment --help`).

# %%
results = ROOT / "train" / "configs" / "results" / "sla2_experiment.json"
reports = json.loads(results.read_text())
loss = {(r["method"], r["kept_fraction"], r["seed"]): r["finished"]["validation"] for r in reports}
names = {"sparse": "chosen blocks alone", "sla1": "SLA", "sla2": "SLA2"}
kept = sorted({fraction for method, fraction, _ in loss if method == "sla2"})
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for place, (method, name) in enumerate(names.items()):
    excess = [
        [
            100 * (value / loss["full", 1.0, seed] - 1)
            for (other, share, seed), value in loss.items()
            if (other, share) == (method, fraction)
        ]
        for fraction in kept
    ]
    at = np.arange(len(kept)) + 0.27 * (place - 1)
    spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in excess]
    heights = [np.mean(values) if values else 0 for values in excess]
    axes.bar(at, heights, 0.25, yerr=spread, capsize=3, label=name)
axes.set_xticks(range(len(kept)), [f"{fraction:.0%} kept" for fraction in kept])
axes.set_ylabel("loss over full attention, %")
axes.legend()
axes.grid(axis="y", alpha=0.3)

# %% [markdown]
# ## What it draws
#
# The same captions and noise, full attention above, SLA2 with 5 % of the blocks below.

# %%
captions = ["an airplane stays beside a growing taco on a blue gradient"]
if not TINY:
    captions.append("a strawberry moves right in front of a bouncing cucumber on orange checks")
drawn = {
    name: model(captions, steps=1 if TINY else 28, seed=3)
    for name, model in (("full attention", full), ("SLA2", sla2))
}
for number, caption in enumerate(captions):
    rows = np.concatenate([clips[number, ::2] for clips in drawn.values()])
    labels = [name if n == 0 else "" for name in drawn for n in range(8)]
    print(caption)
    display(jg.image_grid(rows, labels, columns=8, picture_size=88))

# %%
side_by_side = np.concatenate([np.concatenate(list(clips), axis=2) for clips in drawn.values()], 1)
moving = Path("sla2_clips.gif")
save_gif(np.repeat(np.repeat(side_by_side, 2, axis=1), 2, axis=2), moving)
display(Image(data=moving.read_bytes(), format="gif"))
moving.unlink()

# %% [markdown]
# ## What it saves
#
# On an H100, with the kernels, for 12 heads of 128: milliseconds of the operator as a whole
# (routing, feature maps and quantization included) beside cuDNN's full attention, from the records
# of `python -m kernels_pallas.bench sparse_linear_attention`.

# %%
records = json.loads((ROOT / "kernels_pallas" / "results" / "h100.json").read_text())
records = [r for r in records if r["op"] == "sparse_linear_attention"]
lengths = sorted({r["tokens"] for r in records})
sparsities = sorted({r["sparsity"] for r in records})
grid, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for panel, name in zip(panels, ("forward", "backward"), strict=True):
    time = {(r["tokens"], r["sparsity"]): r for r in records if r["pass"] == name}
    at, width = np.arange(len(lengths)), 0.8 / (1 + len(sparsities))
    cudnn = [np.mean([time[n, s]["cudnn_ms"] for s in sparsities]) for n in lengths]
    panel.bar(at, cudnn, width, color="gray", label="cuDNN, full")
    for place, sparsity in enumerate(sparsities, start=1):
        ours = [time[n, sparsity]["ms"] for n in lengths]
        bars = panel.bar(at + place * width, ours, width, label=f"SLA2, {sparsity:.0%} sparse")
        faster = [f"{full / mine:.1f}" for full, mine in zip(cudnn, ours, strict=True)]
        panel.bar_label(bars, faster, fontsize=8)
    panel.set_xticks(at + width, [f"{n:,}" for n in lengths])
    panel.set(yscale="log", title=f"{name}; numbers: times as fast", xlabel="tokens")
panels[0].set_ylabel("ms")
panels[0].legend(fontsize="small")
