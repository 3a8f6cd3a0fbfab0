"""Tiny language models, the same transformer in NumPy, and decoding as one would write it down.

Nothing here is fast or general: one text at a time, in float64, every token computed every time.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.models import DiffusionLM, DiffusionLMConfig

VOCABULARY, MASK, PAD = 20, 17, 0  # the mask is not the last token, as in the released models
WIDTH = 16


def config_of(**changes):
    return DiffusionLMConfig(
        **{
            "num_layers": 2, "width": WIDTH, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
            "ffn_dim": 24, "vocabulary_size": VOCABULARY, "mask_id": MASK, "qk_norm": True,
            "rope_theta": 100.0, **changes,
        }
    )  # fmt: skip


@functools.cache
def tiny_model(seed=0, sharpness=3.0, **changes):
    """A random model whose predictions depend on the text and are sharp here and flat there.

    Logits have a standard deviation of about `sharpness`.
    """
    config = config_of(**changes)
    random = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: DiffusionLM(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        if path[-1] == "kernel":
            values *= (sharpness if path[0] == "head" else 2.0) * variable.shape[0] ** -0.5
        if path[-1] == "scale":
            values = 1.0 + 0.3 * values
            values *= 2.0 if path[-2] in ("query_norm", "key_norm") else 1.0
        if path[0] == "embedding":
            values *= 0.5
        return variable.replace(jnp.asarray(values.astype(np.float32), variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def softmax(logits):
    """In float64."""
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def entropy(probabilities):
    """In nats."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(axis=-1)


class Plain:
    """The transformer of a `DiffusionLM` in float64, for one text and from its parameters alone."""

    def __init__(self, model):
        self.config = model.config
        get = lambda array: np.asarray(array[...], np.float64)
        self.table = get(model.embedding.embedding)
        self.final = get(model.final_norm.scale)
        self.head = self.table.T if model.head is None else get(model.head.kernel)
        self.layers = []
        for block in model.blocks:
            attention, mlp = block.attention, block.mlp
            layer = {
                "norm": get(block.attention_norm.scale),
                "mlp_norm": get(block.mlp_norm.scale),
                "query_norm": attention.query_norm and get(attention.query_norm.scale),
                "key_norm": attention.key_norm and get(attention.key_norm.scale),
            }
            layer |= {n: get(getattr(attention, n).kernel) for n in ("query", "key", "value")}
            layer["output"] = get(attention.output.kernel)
            layer |= {n: get(getattr(mlp, n).kernel) for n in ("gate", "up", "down")}
            self.layers.append(layer)

    def __call__(self, inputs, seen, positions=None, kept=None, frozen=None):
        """Logits of all tokens, and each layer's keys and values.

        Args:
            inputs: ids, or embeddings (tokens, width).
            seen: seen[i, j] says whether token i may see token j.
            positions: of the tokens; 0, 1, 2, ... if None.
            kept: keys and values of an earlier call.
            frozen: True for tokens whose keys and values are those of `kept`.
        """
        inputs = np.asarray(inputs)
        x = self.table[inputs] if inputs.ndim == 1 else inputs.astype(np.float64)
        count, size = len(x), self.config.head_dim
        positions = np.arange(count) if positions is None else np.asarray(positions)
        written = []
        for number, layer in enumerate(self.layers):
            normed = self._norm(x, layer["norm"])
            query, key, value = (
                (normed @ layer[name]).reshape(count, -1, size)
                for name in ("query", "key", "value")
            )
            if self.config.qk_norm:
                query = self._norm(query, layer["query_norm"])
                key = self._norm(key, layer["key_norm"])
            query, key = self._turn(query, positions), self._turn(key, positions)
            if kept is not None:
                key = np.where(frozen[:, None, None], kept[number][0], key)
                value = np.where(frozen[:, None, None], kept[number][1], value)
            written.append((key, value))
            group = query.shape[1] // key.shape[1]
            heads = np.zeros_like(query)
            for head in range(query.shape[1]):
                scores = query[:, head] @ key[:, head // group].T / np.sqrt(size)
                heads[:, head] = softmax(np.where(seen, scores, -1e300)) @ value[:, head // group]
            x = x + heads.reshape(count, -1) @ layer["output"]
            normed = self._norm(x, layer["mlp_norm"])
            gate = normed @ layer["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ layer["up"])) @ layer["down"]
        return self._norm(x, self.final) @ self.head, written

    def _norm(self, x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config.eps) * scale

    def _turn(self, x, positions):
        half = x.shape[-1] // 2
        angles = positions[:, None] * self.config.rope_theta ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)


@functools.cache
def plain(model):
    """The NumPy twin of a model."""
    return Plain(model)


def quota_of(total, steps, step):
    """LLaDA: num_transfer_tokens = masks // steps, and one more for the first masks % steps."""
    numbers = [total // steps] * steps
    for i in range(total % steps):
        numbers[i] += 1
    return numbers[step]


def settled_by_hand(rule, sure, masked, step, total):
    """SDAR and Fast-dLLM, word for word."""
    quota = 1
    if rule.steps is not None and step < rule.steps:
        quota = max(quota_of(total, rule.steps, step), 1)
    order = sorted(np.flatnonzero(masked), key=lambda i: -sure[i])
    if rule.threshold is None:
        chosen = order[:quota]
    elif rule.inclusive:  # the most confident always, plus all at or above the threshold
        chosen = order[:quota] + [i for i in order if sure[i] >= rule.threshold]
    else:  # all strictly above if at least the quota are, else the quota's most confident
        high = [i for i in order if sure[i] > rule.threshold]
        chosen = high if len(high) >= quota else order[:quota]
    result = np.zeros(len(masked), bool)
    result[chosen] = True
    return result


@dataclasses.dataclass
class Answer:
    """What a decoder written down by hand finds, and how long each of its blocks took."""

    tokens: list
    length: int
    steps: list
    states: list


def decode_by_hand(model, prompt, decoder, new_tokens, reference=None, first_residual=None):
    """Decodes one prompt greedily: full passes with dense masks.

    Keys and values are kept only where that is what the method is: "prefix" and "dual" keep those
    of the first pass of each block. With guidance there is a second pass, whose prompt is masks.
    """
    twin, block = plain(model), decoder.block_length
    causal, context = decoder.sight == "block_causal", decoder.residual
    begin, end = len(prompt), len(prompt) + new_tokens
    if causal:
        end = -(-end // block) * block  # whole blocks, counted from the start of the prompt
    tokens = np.array([*prompt, *[MASK] * (end - begin)])
    masked = np.arange(end) >= begin  # not by token: prompts may contain the mask
    place, steps, states = np.arange(end), [], []
    numbers = place // block
    seen = numbers[:, None] >= numbers if causal else np.ones((end, end), bool)
    asked, scale = place < begin, decoder.cfg_scale

    def predict(twin, x, kept=(None, None), frozen=None):
        """Logits, and the keys and values of both passes; `x` are embeddings."""
        logits, written = twin(x, seen, kept=kept[0], frozen=frozen)
        if scale is None:
            return logits, (written, None)
        x = np.where(asked[:, None], twin.table[MASK], x)
        without, others = twin(x, seen, kept=kept[1], frozen=frozen)
        return without + (scale + 1) * (logits - without), (written, others)

    for start in range(begin // block * block if causal else begin, end, block):
        inside = (place >= start) & (place < start + block)
        total, step, kept = (masked & inside).sum(), 0, (None, None)
        while (masked & inside).any():
            frozen = {"none": place < 0, "prefix": place < start, "dual": ~inside}[decoder.cache]
            if step == 0 or (
                context is not None and context.restart and step % context.restart == 0
            ):
                weight, vector = np.zeros(end), np.zeros((end, twin.table.shape[1]))
                if context is not None and context.init == "self":
                    logits = predict(twin, twin.table[tokens], kept, frozen)[0]
                    weight, vector = fed_back(context, logits, twin.table)
                elif context is not None and context.init == "reference":
                    first = plain(reference)
                    logits = predict(first, first.table[tokens])[0]
                    weight, vector = fed_back(context, logits, twin.table)
                elif first_residual is not None:
                    weight, vector = np.broadcast_to(first_residual[0], end), first_residual[1]
            x = twin.table[tokens]
            mixed = (1 - weight)[:, None] * twin.table[MASK] + weight[:, None] * vector
            x = np.where((masked & inside)[:, None], mixed, x)
            logits, written = predict(twin, x, kept, frozen)
            kept = written if step == 0 else kept
            shares = softmax(logits)
            shares[:, [MASK, *decoder.choice.forbidden]] = -1.0
            settled = settled_by_hand(
                decoder.unmasking, shares.max(axis=1), masked & inside, step, total
            )
            tokens = np.where(settled, shares.argmax(axis=1), tokens)
            masked &= ~settled
            if context is not None:
                weight, vector = fed_back(context, logits, twin.table)
            step += 1
            states.append(tokens)
        steps.append(step)
        if np.isin(tokens[begin : start + block], decoder.stop_ids).any():
            break
    answer = tokens[begin : begin + new_tokens]
    stops = np.flatnonzero(np.isin(answer, decoder.stop_ids))
    length = stops[0] + 1 if len(stops) else new_tokens
    answer = [*answer[:length], *[decoder.pad_id] * (new_tokens - length)]
    return Answer([int(token) for token in answer], int(length), steps, states)


def fed_back(context, logits, table):
    """Weights and vectors of predictions: equations 1 to 3, the weight tempered, entropy only."""
    assert context.weighting in ("entropy", "fixed")
    assert context.source == "full"
    share = entropy(softmax(logits / float(context.temperature))) / np.log(len(table))
    weight = share if context.weighting == "entropy" else np.full_like(share, context.fixed_weight)
    return weight, softmax(logits) @ table
