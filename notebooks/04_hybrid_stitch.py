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
# # Two models draw one picture
#
# A large and a small diffusion transformer that share latents and noise levels can share the steps
# of one picture. This notebook looks at where and when two such models differ, and builds up
# HybridStitch from that: the large model begins, then both work by region, then the small one
# finishes. It uses the pair `openmoji-large` and `openmoji-small` and runs on a laptop CPU.
#
# **HybridStitch here is a reconstruction** from the abstract of
# [arXiv 2603.07815](https://arxiv.org/abs/2603.07815): how regions are found, what is
# remembered and when stages end are our choices (`docs/hybrid_stitch.md`), and the numbers below
# are not the paper's.

# %%
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib_inline.backend_inline import set_matplotlib_formats

import jaxgen as jg
from jaxgen.layers import patchify
from jaxgen.models.mmdit_operations import mmdit_operations
from jaxgen.pipelines import StitchedTextToImage
from jaxgen.pipelines.noise import draw_normal
from jaxgen.pipelines.text_to_image import encode_captions, to_pixels
from jaxgen.sampling import (
    Alone,
    Guided,
    HybridStitch,
    SRDiffusion,
    TStitch,
    active_count,
    relative_cost,
    stitch,
)
from jaxgen.sampling.regions import highest, patch_scores
from train.scores import peak_signal_to_noise

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "pyproject.toml").exists())
TINY = "JAXGEN_TINY_NOTEBOOKS" in os.environ  # the tests set it: fewer steps and pictures
STEPS = 10 if TINY else 28
captions = ["castle", "rocket", "tiger face", "woman firefighter dark skin tone"]
if TINY:
    captions = captions[:2]
LARGE = ROOT / "weights" / "openmoji-large"
pair = StitchedTextToImage(
    jg.TextToImage.from_pretrained(LARGE),
    jg.TextToImage.from_pretrained(ROOT / "weights" / "openmoji-small"),
)
set_matplotlib_formats("jpeg", pil_kwargs={"quality": 70})  # pictures of noise are large as PNG

# %% [markdown]
# ## What each model draws alone
#
# A policy says who predicts which step; `Alone` is the simplest. Both models start from the same
# noise.

# %%
alone = {name: pair(captions, policy=Alone(name), steps=STEPS) for name in ("large", "small")}
jg.image_grid(
    np.concatenate(list(alone.values())),
    [f"{name} model" for name in alone for _ in captions],
    headings=captions,
    picture_size=88,
)

# %% [markdown]
# People are common in OpenMoji, and the small model draws them almost as well; a castle overtaxes
# it. What does a step cost? `Guided` is a model with its text and guidance, which makes a step two
# passes. For one picture:


# %%
def guided(model, guidance_scale=4.0):
    tokens = jnp.asarray(model.tokenizer.encode(captions))
    halves = encode_captions(model.text_encoder, tokens)
    return Guided.of(model.transformer, *halves, guidance_scale)


def seconds(function, *inputs, runs=5):
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - began)
    return min(times)


models = {name: guided(getattr(pair, name)) for name in alone}
velocity = jax.jit(lambda model, latents, sigma: model.velocity(latents, sigma))
sigmas = pair.large.schedule.sigmas(STEPS)
count, side = len(captions), pair.large.transformer.config.sample_size
noise = draw_normal(
    jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32), shape=(side, side, 3)
)
step_time = {name: seconds(velocity, model, noise, sigmas[0]) for name, model in models.items()}
text_tokens = pair.large.text_encoder.config.max_tokens
configs = {name: getattr(pair, name).transformer.config for name in alone}
patches = (configs["large"].sample_size // configs["large"].patch_size) ** 2
operations = {name: mmdit_operations(c, patches, text_tokens) for name, c in configs.items()}
print("model  blocks  width  operations  measured")
for name, config in configs.items():
    milliseconds = 1000 * step_time[name] / count
    print(
        f"{name}  {config.num_layers:>6}  {config.width:>5}"
        f"  {2 * operations[name] / 1e9:>7.2f} G  {milliseconds:>5.0f} ms"
    )
for what, ratio in (
    ("operations", operations["large"] / operations["small"]),
    ("time", step_time["large"] / step_time["small"]),
):
    print(f"large over small, {what}: {ratio:.1f}")

# %% [markdown]
# ## Where and when they differ
#
# We follow the large model from noise to picture, and ask the small one at each step what it would
# have predicted from the same latents. From a velocity $v$ at noise level $\sigma$ follows an
# estimate of the clean picture, $\hat x = x - \sigma v$.

# %%
large, small = models.values()
latents, by_large, by_small = [noise], [], []
for i in range(STEPS):
    by_large.append(velocity(large, latents[i], sigmas[i]))
    by_small.append(velocity(small, latents[i], sigmas[i]))
    latents.append(latents[i] + (sigmas[i + 1] - sigmas[i]) * by_large[i])
difference = [jnp.abs(one - other) for one, other in zip(by_large, by_small, strict=True)]

# %% [markdown]
# First row: the latents. Then what each model takes the finished picture to be, and how far their
# velocities are apart; one color scale for all steps.


# %%
def pixels(array):
    return np.asarray(to_pixels(array))


def bare(panel):
    panel.set(xticks=[], yticks=[])
    return panel


def over_the_steps(picture):
    shown = np.unique(np.linspace(0, STEPS - 1, 10).astype(int))
    rows = "latents", "large", "small", "difference"
    figure, panels = plt.subplots(4, len(shown), figsize=(10, 4.4), layout="constrained")
    for column, i in zip(panels.T, shown, strict=True):
        column[0].set_title(f"step {i}\n$\\sigma$ = {sigmas[i]:.2f}", fontsize="small")
        column[0].imshow(pixels(latents[i])[picture])
        for panel, prediction in ((column[1], by_large), (column[2], by_small)):
            panel.imshow(pixels(latents[i] - sigmas[i] * prediction[i])[picture])
        heat = column[3].imshow(
            difference[i][picture].mean(axis=-1), cmap="magma", vmin=0, vmax=1.2
        )
    for panel, row in zip(panels[:, 0], rows, strict=True):
        panel.set_ylabel(row)
    for panel in panels.flat:
        bare(panel)
    figure.colorbar(heat, ax=panels[3].tolist(), shrink=0.9)


over_the_steps(0)

# %%
over_the_steps(1)

# %% [markdown]
# The large model knows these pictures by heart: it sees a castle in pure noise. The small one does
# not, but once the latents show the outline, it follows. They part at outlines and details, and
# hardly in the background. In the last step they differ everywhere, at a noise level at which that
# moves nothing any more.
#
# A step moves the latents by its length $|\Delta\sigma|$ times the velocity, so what a disagreement
# does to the picture is its size times that length. `shift=3` makes late steps the longest, but for
# the very last one.

# %%
lengths = np.asarray(sigmas[:-1] - sigmas[1:])
per_step = np.stack([d.mean(axis=(1, 2, 3)) for d in difference])  # step, picture
figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for caption, line in zip(captions, per_step.T, strict=True):
    panels[0].plot(line, label=caption)
    panels[1].plot(lengths * line)
panels[0].set(xlabel="step", ylabel="mean |difference|")
panels[1].set(xlabel="step", ylabel="step length · mean |difference|")
panels[0].legend(fontsize="small")
for panel in panels:
    panel.grid(alpha=0.3)
shares = (lengths[:, None] * per_step)[STEPS // 2 :].sum(0) / (lengths[:, None] * per_step).sum(0)
print(f"second half of the steps: {shares.mean():.0%} of all disagreement")

# %% [markdown]
# ## The mask
#
# When the hybrid stage begins, every patch gets a score, and the 30 % with the highest scores stay
# with the large model. Two scores:
#
# * `x0_diff` (default): how much the large model's estimate of the clean picture changed between
#   its last two steps. Costs nothing.
# * `model_diff`: how much both models' velocities differ. One pass of the small model more.
#
# The sampler tells which patches it chose:

# %%
policies = {score: HybridStitch(score=score) for score in ("x0_diff", "model_diff")}
first_of = {
    score: next(
        preview
        for preview in pair.stream(captions, policy=policy, steps=STEPS, every=1)
        if preview.mask is not None
    )
    for score, policy in policies.items()
}
start = first_of["x0_diff"].stage.first
masks = {score: preview.mask for score, preview in first_of.items()}
print(f"the hybrid stage begins at step {start} of {STEPS}, at noise level {sigmas[start]:.2f}")

# %% [markdown]
# The same scores by hand, from the predictions of the last step before it, and what the masks leave
# of the picture as the large model sees it then:

# %%
last = start - 1
estimates = [x - sigma * v for x, sigma, v in zip(latents, sigmas, by_large, strict=False)]
scores = {
    "x0_diff": patch_scores(estimates[last] - estimates[last - 1], large.patch_size),
    "model_diff": patch_scores(difference[last], large.patch_size),
}
grid = (count, *masks["x0_diff"].shape[1:])
active = active_count(patches, HybridStitch().share)
for score, values in scores.items():
    mine = np.zeros((count, patches), bool)
    np.put_along_axis(mine, np.asarray(highest(values, active)), True, axis=1)
    print(f"{score}: {np.mean(mine.reshape(grid) == masks[score]):.1%} of the patches as sampled")


def masked_picture(picture, mask):
    """Chosen patches bright, the others dim."""
    size = picture.shape[0] // mask.shape[0]
    keep = np.kron(mask, np.ones((size, size)))[..., None]
    return (picture * (0.4 + 0.6 * keep)).astype(np.uint8)


figure, panels = plt.subplots(count, 6, figsize=(9, 1.55 * count), layout="constrained")
seen = pixels(estimates[last])
for n, row in enumerate(panels):
    row[0].imshow(pixels(latents[start])[n])
    row[1].imshow(seen[n])
    for k, score in enumerate(scores):
        row[2 + 2 * k].imshow(scores[score][n].reshape(grid[1:]), cmap="magma")
        row[3 + 2 * k].imshow(masked_picture(seen[n], masks[score][n]))
titles = "latents", "large's estimate", "x0_diff", "its 30 %", "model_diff", "its 30 %"
for panel, title in zip(panels[0], titles, strict=True):
    panel.set_title(title, fontsize="medium")
for panel in panels.flat:
    bare(panel)

# %% [markdown]
# Are these the right patches? With hindsight: how much of the squared distance between the two
# finished pictures lies in them. Patches chosen by lot would cover 30 %.

# %%
finished = [patchify(jnp.float32(pictures), large.patch_size) for pictures in alone.values()]
error = np.asarray(jnp.square(finished[0] - finished[1]).sum(axis=-1))
for score, mask in masks.items():
    covered = (error * mask.reshape(count, -1)).sum(1) / error.sum(1)
    each = (f"{c} {x:.0%}" for c, x in zip(captions, covered, strict=True))
    print(f"{score:>10}: mean {covered.mean():.0%};", ", ".join(each))
common = (masks["x0_diff"] & masks["model_diff"]).sum() / masks["x0_diff"].sum()
print(f"patches that both chose: {common:.0%}")

# %% [markdown]
# `x0_diff` follows what the large model is still making up its mind about, here mostly the rim of
# the figure. `model_diff` asks the question that matters, where the small model would do something
# else, and covers far more of what goes wrong: it is worth its one small pass.

# %% [markdown]
# ## Remembered keys and values
#
# The large model now computes 30 % of the tokens. Their queries still need something to attend to:
# what a roof looks like depends on the wall below it. So the last whole pass keeps the keys and
# values of all tokens in every block, those of the tokens that go on last, and a masked pass
# overwrites these only.
#
# With a fresh memory, a masked pass gives what the whole pass gives for these patches:

# %%
keep = jax.jit(lambda model, latents, sigma: model.velocity_and_cache(latents, sigma))
region_of = jax.jit(lambda model, rows, memory: model.region(rows, memory))
masked = jax.jit(lambda model, *inputs: model.masked(*inputs))
rows = highest(scores["x0_diff"], active)


def chosen(array):
    """Values of the chosen patches."""
    return jnp.take_along_axis(patchify(array, large.patch_size), rows[..., None], axis=1)


def relative(actual, wanted):
    return float(jnp.linalg.norm(actual - wanted) / jnp.linalg.norm(wanted))


whole, memory = keep(large, latents[last], sigmas[last])
region = region_of(large, rows, memory)
parts, _ = masked(large, latents[last], sigmas[last], region)
print(f"{parts.shape[1]} of {patches} patches, relative error {relative(parts, chosen(whole)):.1e}")
megabytes = sum(x.nbytes for x in jax.tree.leaves(memory)) / count / 1e6
print(f"memory: {megabytes:.1f} MB a picture, both halves of guidance, float32")

# %% [markdown]
# Later the memory is out of date, as the picture outside of the mask goes on. How wrong does the
# masked pass get, and would it do without a memory? For that, a model whose attention drops all
# keys of tokens outside of the mask:

# %%
deaf_model = jg.TextToImage.from_pretrained(LARGE)
heard = active + text_tokens


def attend_to_heard(query, key, value):
    return jax.nn.dot_product_attention(query, key[:, -heard:], value[:, -heard:])


for block in deaf_model.transformer.blocks:
    block.attention.attend = attend_to_heard
deaf = guided(deaf_model)

steps_after = range(last, STEPS)
lines = {"remembered once": [], "renewed every 3 steps": [], "nothing outside": [], "small": []}
once = renewed = region
for i in steps_after:
    wanted = chosen(by_large[i])
    if (i - last) % 3 == 0:
        renewed = region_of(large, rows, keep(large, latents[i], sigmas[i])[1])
    parts, once = masked(large, latents[i], sigmas[i], once)
    lines["remembered once"].append(relative(parts, wanted))
    parts, renewed = masked(large, latents[i], sigmas[i], renewed)
    lines["renewed every 3 steps"].append(relative(parts, wanted))
    parts, _ = masked(deaf, latents[i], sigmas[i], region)
    lines["nothing outside"].append(relative(parts, wanted))
    lines["small"].append(relative(chosen(by_small[i]), wanted))

plt.figure(figsize=(8, 3.2), layout="constrained")
for (name, line), style in zip(lines.items(), ("o-", ".-", "s-", "k:"), strict=True):
    label = "small model, for comparison" if name == "small" else name
    plt.plot(steps_after, line, style, label=label, markersize=4)
end = round(HybridStitch().end * STEPS)
plt.axvspan(start, end - 1, alpha=0.12, label="hybrid stage by default")
plt.xlabel("step")
plt.ylabel("relative error in the mask")
plt.ylim(bottom=0)
plt.grid(alpha=0.3)
_ = plt.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

# %% [markdown]
# Without the other tokens the large model is worse than the small one. With remembered ones it
# stays ahead until late, though the error grows with every step; `HybridStitch(refresh=3)` renews
# them, at the price of a whole pass each time. This is measured along the large model's own path;
# in a hybrid stage the small model moves the rest of the picture.
#
# What a masked pass costs:

# %%
fraction = mmdit_operations(configs["large"], patches, text_tokens, active) / operations["large"]
part_time = seconds(masked, large, noise, sigmas[0], region)
print(
    f"masked over whole: {fraction:.2f} in operations, {part_time / step_time['large']:.2f} in time"
)

# %% [markdown]
# ## Stages, as they happen
#
# A policy is a plan of stages:

# %%
policy = HybridStitch(score="model_diff")
policy.stages(STEPS)

# %% [markdown]
# `stitch` carries it out. It is a generator that yields the latents after every so many steps, so a
# notebook can show the picture while it is drawn (run this cell to see it move; here is its end).
# `pair.stream(captions, policy=policy, every=1)` does the same with finished pixels.

# %%
begin = jg.image_grid(pixels(noise), captions, columns=count, picture_size=88)
handle = display(begin, display_id=True)
path, history = [noise], []
for progress in stitch(large, small, policy, noise, sigmas, every=1):
    path.append(progress.latents)
    history.append(progress)
    title = f"step {progress.step}: {progress.stage.kind}"
    shown = pixels(progress.latents)
    handle.update(jg.image_grid(shown, [title] * count, columns=count, picture_size=88))

# %% [markdown]
# The same as a timeline. Below the latents stands the estimate of the clean picture that the step
# used, in the hybrid stage with the small model's patches dimmed.

# %%
COLORS = {"large": "tab:blue", "hybrid": "tab:purple", "small": "tab:orange"}


def timeline(picture, columns=10):
    figure = plt.figure(figsize=(10, 3), layout="constrained")
    layout = figure.add_gridspec(3, columns, height_ratios=[0.35, 1, 1])
    bar = figure.add_subplot(layout[0, :])
    for stage in policy.stages(STEPS):
        bar.barh(0, stage.last - stage.first, left=stage.first, color=COLORS[stage.kind])
        middle = (stage.first + stage.last) / 2
        bar.text(middle, 0, stage.kind, color="white", ha="center", va="center")
    bar.set(xlim=(0, STEPS), yticks=[], xticks=range(0, STEPS + 1, 2))
    for k in range(columns):
        i = int((k + 0.5) * STEPS / columns)
        step = path[i + 1] - path[i]
        estimate = path[i] - sigmas[i] * step / (sigmas[i + 1] - sigmas[i])
        shown, mask = pixels(estimate)[picture], history[i].mask
        if mask is not None:
            shown = masked_picture(shown, np.asarray(mask[picture]).reshape(grid[1:]))
        for row, image in ((1, pixels(path[i])[picture]), (2, shown)):
            panel = bare(figure.add_subplot(layout[row, k]))
            panel.imshow(image)
            if row == 1:
                panel.set_title(f"step {i}", fontsize="small")
            if k == 0:
                panel.set_ylabel("latents" if row == 1 else "estimate")


timeline(0)

# %% [markdown]
# ## The samplers side by side
#
# T-Stitch lets the small model begin, SRDiffusion lets it finish. To be fair they get the share of
# large steps that costs as many operations as HybridStitch with its defaults. A last row keeps the
# hybrid stage to the end, which costs more. Nothing compiles here: boundaries of stages are inputs
# of programs that ran above. Read the times with care: they are the better
# of two runs.

# %%
ratio = operations["small"] / operations["large"]
budget = relative_cost(HybridStitch(), STEPS, ratio, fraction)
share = (budget - ratio) / (1 - ratio)  # of large steps, if the others are small ones
samplers = {
    "large": Alone(),
    "T-Stitch": TStitch(1 - share),
    "SRDiffusion": SRDiffusion(share),
    "HybridStitch": HybridStitch(),
    "HybridStitch, model_diff": HybridStitch(score="model_diff"),
    "the same, to the end": HybridStitch(end=1.0, score="model_diff"),
    "small": Alone("small"),
}
drawn, took = {}, {name: [] for name in samplers}
for _ in range(2):  # in turn, as other programs on the machine disturb the clock
    for name, sampler in samplers.items():
        began = time.perf_counter()
        drawn[name] = pair(captions, policy=sampler, steps=STEPS)
        took[name].append(time.perf_counter() - began)
took = {name: min(times) for name, times in took.items()}
psnr = {name: peak_signal_to_noise(pictures, drawn["large"]) for name, pictures in drawn.items()}
print(f"{'':>24}  operations  time   PSNR to large's picture, dB (mean, each)")
for name in drawn:
    cost = relative_cost(samplers[name], STEPS, ratio, fraction)
    each = " ".join(f"{x:5.1f}" for x in psnr[name]) if name != "large" else ""
    mean = f"{psnr[name].mean():5.1f} " if name != "large" else "  the same"
    print(f"{name:>24}  {cost:>10.2f}  {took[name] / took['large']:.2f}  {mean} {each}")

# %%
figure, panels = plt.subplots(
    count, len(drawn), figsize=(10, 1.55 * count), layout="constrained", squeeze=False
)
for column, (name, pictures) in zip(panels.T, drawn.items(), strict=True):
    column[0].set_title(name.replace(", ", ",\n"), fontsize="small")
    for panel, picture, decibels in zip(column, pictures, psnr[name], strict=True):
        bare(panel).imshow(picture)
        if name != "large":
            panel.set_xlabel(f"{decibels:.1f} dB", fontsize="small")

# %%
plt.figure(figsize=(7, 3.2), layout="constrained")
for name in drawn:
    if name != "large":
        cost = relative_cost(samplers[name], STEPS, ratio, fraction)
        plt.plot(1 / cost, psnr[name].mean(), "o", label=name)
plt.xlabel("speed-up in operations")
plt.ylabel("mean PSNR, dB")
plt.grid(alpha=0.3)
_ = plt.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

# %% [markdown]
# What to make of this:
#
# * **T-Stitch wins by far, and that says more about the models than about the methods.** The large
#   model has learned these pictures by heart. Whatever the small one began, its late steps turn it
#   into the picture that it knows, and late steps are long. The others end with the small model,
#   which spoils in those steps what it does not know. A model that invents pictures decides the
#   composition early; there T-Stitch should end up with another picture than the large model's,
#   and leaving the start to the large one should pay. That was not measured here.
# * At an equal number of operations, HybridStitch with `x0_diff` is no better than SRDiffusion, its
#   simpler baseline. With `model_diff` it is, by about 1 dB on these four pictures: the choice of
#   patches matters. Where the small model is good anyway, as for the firefighter, nothing is
#   gained.
# * Keeping the large model on 30 % of the patches to the end helps more, and costs more.
# * PSNR to the large model's picture asks for the same picture, not for a good one.
#   `python -m train.stitching` compares on many captions, with accuracy and Frechet distance.
# * Measured times follow operations, but a step has parts that do not shrink; other programs on the
#   machine disturb them, too.
#
# ## Try next
#
# * `HybridStitch(refresh=3, update=True)`: patches are chosen anew when the memory is renewed.
# * `share=0.5`, `blend=1` (regions fade out), `opening=3` (compact regions): look at the masks.
# * `score="user"` with `pair(..., scores=array)`, an array (batch, rows, columns): let the large
#   model finish the faces, or what you point at.
# * `HybridStitch(start=10, end=10)` must equal `SRDiffusion(10)`: does it, bit by bit?
# * `SRDiffusion()` finds its switch while sampling. Where is it for these captions?
# * `pair(..., guidance_scale=(4.0, 2.0))`: other guidance for the small model.
#
# The same with Stable Diffusion, given folders as diffusers writes them and a GPU:
#
# ```python
# from jaxgen.pipelines import StableDiffusion3
#
# pipeline = StableDiffusion3.from_pretrained("sd3.5-large", small="sd3-medium")
# policy = HybridStitch(start=0.22, end=0.52, share=0.3, score="model_diff")
# for preview in pipeline.stream("a red cat in the snow", policy=policy, steps=50, every=5):
#     display(jg.image_grid(preview.pictures))
# ```
#
# Released weights have not been tried with this yet (see the README), so begin with what this
# notebook begins with: what each model draws alone, and where the two differ.
