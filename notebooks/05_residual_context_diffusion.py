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
# # What a diffusion language model throws away
#
# A masked diffusion language model predicts all unknown tokens at once, settles those it is sure
# of, and drops the other predictions. Residual Context Diffusion
# ([arXiv 2601.22954](https://arxiv.org/abs/2601.22954)) feeds them back. This notebook watches a
# small model do sums, looks at what it knows and forgets, computes the residual by hand, and
# measures what feeding it back is worth. It uses the shipped pair `arithmetic-seqd` and
# `arithmetic-rcd` (4.9 million parameters), trained on the same problems for the same number of
# steps, in which RCD made three passes where the other made one, and runs on a CPU.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

from jaxgen.sampling import mix_residual
from train.decoding_history import TOKEN_NAMES, history, table_row
from train.decoding_sweep import residual_of, table_for
from train.diffusion_lm_parts import answer, load_export, make_decoder
from train.problems import EOS, MASK

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "pyproject.toml").exists())
TINY = "JAXGEN_TINY_NOTEBOOKS" in os.environ  # the tests set it: fewer problems
models, cards, decoders = {}, {}, {}
for name in ("seqd", "rcd"):
    models[name], cards[name] = load_export(
        ROOT / "weights" / f"arithmetic-{name}", precision="float32"
    )
    config = cards[name]["config"]
    decoders[name] = make_decoder(
        config["sight"], config["block_length"], 0.9, residual_of(cards[name])
    )

# %% [markdown]
# ## The problems
#
# A prompt is an expression; the answer does one operation after the other and ends with the
# result. A program checks every step, so accuracy is exact.

# %%
table = table_for(cards["rcd"], 32 if TINY else 96)
for problem in table.problems[:4]:
    print(problem.prompt, problem.solution)


# %% [markdown]
# ## Tokens appear
#
# `decode_steps` yields the state after every pass (`train.decoding_history` collects them). A token
# is settled when the model gives it more than 90 %, and at least one is at every step. Colors tell
# the step.


# %%
def steps_of(name, row):
    """An answer with its masks, before the first step and after each."""
    return history(models[name], table.prompts[row], decoders[name], table.layout.answer)


longest = np.argsort([-problem.level for problem in table.problems], kind="stable")[:3]
for row in longest:
    problem = table.problems[row]
    lines = "".join(table_row(name, problem, steps_of(name, row)) for name in models)
    display(HTML(f"<b>{problem.prompt}</b><table>{lines}</table>"))

# %% [markdown]
# ## What is dropped
#
# After a step, what does a model think of the places that are still masked? Each column is a place
# of one answer, each row a character; brighter is likelier. The bars below are how unsure the model
# is: the entropy of the prediction, as a share of the largest possible. Settled places are blank.

# %%
row = int(longest[0])
states = steps_of("seqd", row)
known = states[len(states) // 3]
shown = int(np.argmax(states[-1] == EOS)) + 1  # places up to the end of the text
prompt = table.prompts[row]
ids = jnp.asarray(np.concatenate([prompt, known]))[None]
block = cards["seqd"]["config"]["block_length"]
blocks = jnp.arange(ids.shape[1]) // block
sees = (blocks[:, None] >= blocks[None])[None]  # a token sees its block and those before
masked = np.asarray(ids[0] == MASK)


def predict(name):
    """What a model thinks of every place: logits, probabilities, entropy."""
    logits = models[name](ids, mask=sees)[0]
    p = np.asarray(jax.nn.softmax(logits))
    return logits, p, -(p * np.log(p + 1e-30)).sum(-1) / np.log(p.shape[-1])


_, probabilities, entropy = predict("seqd")
places = slice(len(prompt), len(prompt) + shown)
open_places = masked[places]
figure, panels = plt.subplots(
    2, 1, figsize=(10, 5), sharex=True, layout="constrained", height_ratios=(4, 1)
)
heat = np.where(open_places[:, None], probabilities[places], np.nan).T
panels[0].imshow(heat, aspect="auto", cmap="magma", vmin=0, vmax=1)
panels[0].set_yticks(range(len(TOKEN_NAMES)), TOKEN_NAMES, fontsize=6)
panels[1].bar(range(shown), np.where(open_places, entropy[places], 0.0))
panels[1].set_xticks(
    range(shown), [TOKEN_NAMES[token] if token != MASK else "·" for token in known[:shown]]
)
panels[1].set_ylabel("entropy")
_ = panels[0].set_title(table.problems[row].prompt)

# %% [markdown]
# Many predictions are far from nothing: the model knows that a digit must come, or hesitates
# between two. The next step starts from masks again and must find all that anew.
#
# ## The residual, by hand
#
# At a place that is still masked, RCD replaces the embedding of the mask by a mix:
#
# $$(1-\alpha)\,E_{mask} + \alpha \sum_j p_j E_j.$$
#
# In the paper, $\alpha = H(p) / \log V$: the less sure, the more is fed back. This model learned
# with $\alpha = 1$: an open place shows the others its whole prediction, and no mask.

# %%
model = models["rcd"]
embeddings = model.input_table()
logits, probabilities, entropy = predict("rcd")
context = residual_of(cards["rcd"])
weight = {"entropy": entropy, "one": np.ones_like(entropy)}[context.weighting][:, None]
expected = (1 - weight) * embeddings[MASK] + weight * (probabilities @ embeddings)
residual = context.residual(logits, embeddings, MASK)
mixed = mix_residual(model.embed(ids)[0], jnp.asarray(masked), residual)
apart = np.abs(np.asarray(mixed) - np.where(masked[:, None], expected, model.embed(ids)[0])).max()
print(f"largest difference to ResidualContext: {apart:.1e}")

# %% [markdown]
# What does it change? The same tokens, once with masks and once with the residual of the model's
# own prediction:

# %%
again = np.asarray(jax.nn.softmax(model(mixed[None], mask=sees)[0]))
sure = [(p.max(-1) > 0.9)[places][open_places].sum() for p in (probabilities, again)]
print(
    f"{open_places.sum()} open places; surer than 90 %: {sure[0]} with masks, "
    f"{sure[1]} with the residual"
)

# %% [markdown]
# ## What it is worth
#
# A lower threshold settles more tokens a step and makes more mistakes. Accuracy over tokens a
# step, for the model that was trained without residual (SeqD), for RCD, and for the RCD model when
# nothing is fed back.

# %%
lines = {
    "SeqD": (models["seqd"], None),
    "RCD": (models["rcd"], residual_of(cards["rcd"])),
    "RCD, nothing fed back": (models["rcd"], None),
}
thresholds = (0.5, 0.9) if TINY else (0.5, 0.7, 0.9, 0.98)
plt.figure(figsize=(7, 4), layout="constrained")
for name, (model, residual) in lines.items():
    points = []
    for threshold in thresholds:
        decoder = make_decoder(config["sight"], config["block_length"], threshold, residual)
        points.append(answer(model, table, decoder, batch_size=96).summary())
    across = [point["tokens_per_step"] for point in points]
    plt.plot(across, [100 * point["accuracy"] for point in points], "o-", label=name)
    best = max(points, key=lambda point: point["accuracy"])
    print(f"{name:>22}: best {best['accuracy']:.1%} in {best['steps']:.1f} steps")
plt.xlabel("tokens a step")
plt.ylabel("accuracy, %")
plt.grid(alpha=0.3)
_ = plt.legend()

# %% [markdown]
# Two things are seen here. The model that learned with residuals is better even when nothing is fed
# back: all three of its passes learned from each problem. With strict thresholds the residual then
# saves steps. So few problems show no more; with more of them and more seeds, with Sudokus, and
# where RCD loses: `docs/residual_context.md`.
#
# ## Try next
#
# * `residual_of(cards["rcd"], temperature=2.0, temper_vector=True)` feeds back a softer prediction.
# * `residual_of(cards["rcd"], restart=3)` begins with masks at every third step, as the model
#   learned from residuals of two passes. It costs some of these sums and helps Sudokus
#   (`docs/residual_context.md`).
# * `ResidualContext(init="self")` makes a plain pass before the first step of each block.
# * `ResidualContext(source="top1")` feeds back the likeliest token only.
# * Train your own pair: `python -m train.diffusion_lm --help`.
