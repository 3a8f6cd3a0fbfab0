"""How many operations a pass of the MMDiT takes; matrix products only."""

from jaxgen.models.mmdit import MMDiTConfig


def mmdit_operations(
    config: MMDiTConfig,
    patches: int,
    text_tokens: int,
    active: int | None = None,
    *,
    keep_text: bool = False,
) -> int:
    """Return the multiplications and additions of one pass for one picture.

    Modulation, embeddings and softmax are left out; they are a few per cent.

    Args:
        config: Of the model.
        patches: Of the picture.
        text_tokens: In its context.
        active: Patches that a masked pass predicts; all if None.
        keep_text: The pass does not run the text tokens, it remembers their keys and values.
    """
    active = patches if active is None else active
    width, depth, dual = config.width, config.num_layers, len(config.dual_attention_layers)
    running = 0 if keep_text else text_tokens
    queries = active + running
    # Query, key, value and output, and an MLP four times as wide; the last block's text has
    # neither output projection nor MLP.
    linear = 2 * 12 * width**2 * depth * queries - 2 * 9 * width**2 * running
    joint = 4 * queries * (patches + text_tokens) * width * depth
    second = dual * (2 * 4 * width**2 * active + 4 * active * patches * width)
    return linear + joint + second
