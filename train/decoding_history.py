"""How an answer came about: its tokens after each step, and text in the colors of their steps."""

import html
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32

from jaxgen.models import DiffusionLM
from jaxgen.sampling import BlockDiffusion, answers_of, decode_steps
from train.problem_data import verdict
from train.problems import CHARACTERS, EOS, MASK, Problem

TOKEN_NAMES = ("end", "mask", *CHARACTERS.replace(" ", "␣").replace("\n", "⏎"))
"""What is shown of every token."""


def history(
    model: DiffusionLM,
    prompt: Int[np.ndarray, " prompt"],
    decoder: BlockDiffusion,
    new_tokens: int,
) -> list[Int32[np.ndarray, " answer"]]:
    """Returns an answer before the first step and after each, masks where nothing is settled.

    Args:
        model: predicts tokens.
        prompt: one problem's.
        decoder: how it is answered.
        new_tokens: tokens of the answer.
    """
    width, states = jnp.array([len(prompt)]), []
    for state in decode_steps(model, jnp.asarray(prompt)[None], decoder, new_tokens=new_tokens):
        if int(state.steps[0]) == len(states):  # no pass that only stores keys and values
            tokens = answers_of(state, decoder, width, new_tokens).tokens[0]
            states.append(np.asarray(tokens))
    return states


def colored(states: Sequence[Int[np.ndarray, " answer"]]) -> str:
    """Returns HTML: an answer up to its end, each character in the color of its step.

    Args:
        states: the answer before the first step and after each; dark is early, bright is late.
    """
    import matplotlib

    colors, spans = matplotlib.colormaps["viridis"], []
    for place, token in enumerate(states[-1]):
        if token == EOS:
            break
        step = next(number for number, tokens in enumerate(states) if tokens[place] != MASK)
        shade = [int(255 * part) for part in colors(step / (len(states) - 1))[:3]]
        ink = "black" if sum(shade) > 380 else "white"
        style = f"background:rgb({shade[0]},{shade[1]},{shade[2]});color:{ink}"
        spans.append(f'<span style="{style}">{html.escape(TOKEN_NAMES[token])}</span>')
    return f"<code>{''.join(spans)}</code>"


def table_row(name: str, problem: Problem, states: Sequence[Int[np.ndarray, " answer"]]) -> str:
    """Returns a row of an HTML table: who answers, in how many steps, right or wrong, and how.

    Args:
        name: of the model.
        problem: what is answered.
        states: the answer before the first step and after each.
    """
    right = "right" if verdict(problem, states[-1]).correct else "wrong"
    cells = html.escape(name), f"{len(states) - 1} steps, {right}", colored(states)
    return f"<tr>{''.join(f'<td>{cell}' for cell in cells)}"
