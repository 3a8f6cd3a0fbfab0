"""Exact attention and its gradients in float64 numpy: the judge of every implementation."""

import numpy as np


def allowed_pairs(
    shape, *, mask=None, is_causal=False, query_lengths=None, key_lengths=None, window=None
):
    """Bool (batch, heads, queries, keys), with the semantics of jax.nn.dot_product_attention."""
    batch, _, queries, keys = shape
    t, s = np.arange(queries)[:, None], np.arange(keys)[None, :]
    allowed = np.ones(shape, bool)
    if is_causal:
        allowed &= s <= t
    if window is not None:
        allowed &= (s >= t - window[0]) & (s <= t + window[1])
    if mask is not None:
        allowed &= np.asarray(mask)
    for b in range(batch):
        if query_lengths is not None:
            allowed[b, :, int(query_lengths[b]) :] = False
        if key_lengths is not None:
            allowed[b, :, :, int(key_lengths[b]) :] = False
    return allowed


def exact_attention(query, key, value, d_out, *, bias=None, scale=None, d_lse=None, **masks):
    """Output, log-sum-exp and the gradients of query, key, value and scores, all float64.

    A query that attends to nothing gets zeros; its log-sum-exp is minus infinity.
    """
    q, k, v, d_out = (np.asarray(x).astype(np.float64) for x in (query, key, value, d_out))
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = dim**-0.5 if scale is None else scale
    allowed = allowed_pairs((batch, heads, queries, keys), **masks)
    scores = scale * np.einsum("btnd,bsnd->bnts", q, k)
    if bias is not None:
        scores = scores + np.asarray(bias).astype(np.float64)
    scores = np.where(allowed, scores, -np.inf)
    largest = np.max(scores, axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0]
    p /= np.where(total == 0, 1, total)
    out = np.einsum("bnts,bsnd->btnd", p, v)
    dp = np.einsum("btnd,bsnd->bnts", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    if d_lse is not None:
        ds += p * np.asarray(d_lse).astype(np.float64).transpose(0, 2, 1)[..., None]
    per_group = lambda x: x.reshape(batch, keys, kv_heads, group, dim).sum(3)
    dq = scale * np.einsum("bnts,bsnd->btnd", ds, k)
    dk = per_group(scale * np.einsum("bnts,btnd->bsnd", ds, q))
    dv = per_group(np.einsum("bnts,btnd->bsnd", p, d_out))
    return out, lse.transpose(0, 2, 1), (dq, dk, dv, ds)


def relative_l2(actual, expected):
    """‖actual − expected‖ / ‖expected‖."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def cosine(actual, expected):
    """Cosine of the angle between two arrays seen as vectors."""
    actual, expected = np.asarray(actual, np.float64).ravel(), np.asarray(expected).ravel()
    return actual @ expected / max(np.linalg.norm(actual) * np.linalg.norm(expected), 1e-30)
