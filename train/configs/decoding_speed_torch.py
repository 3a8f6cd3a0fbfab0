"""LLaDA-8B decoded by a plain PyTorch loop, to compare `train.configs.decoding_speed` with.

The same shapes, schedule and precision, written from the description of the method: at each step
the whole sequence is computed, without a cache, and the most confident token of the block is
settled. Attention is PyTorch's own; nothing is compiled unless --compile is given. Needs PyTorch
with CUDA, which jaxgen does not.

Command    python -m train.configs.decoding_speed_torch --output runs/decoding-speed-torch.json
Hardware   one H100 80 GB, PyTorch 2.11, bfloat16, 128 tokens after a prompt of 512
Outcome    batch 1 21.4 ms a step (46.6 tokens a second; with --block-logits 20.6 on another H100),
           batch 8 150 ms (53.3 tokens a second); results/decoding_speed_torch.json.
"""

import argparse
import importlib
import statistics
import time
from pathlib import Path
from typing import Any

from jaxgen.checkpoints import write_json
from jaxgen.models import DIFFUSION_LM_PRESETS, DiffusionLMConfig


def make_weights(torch: Any, config: DiffusionLMConfig, device: str, dtype: Any) -> dict[str, Any]:
    """Return random weights by name; a linear weight is (out, in)."""
    heads = config.num_heads * config.head_dim
    shapes = {"embedding": (config.vocabulary_size, config.width)}
    shapes["head"] = shapes["embedding"]
    for number in range(config.num_layers):
        for name in ("query", "key", "value"):
            shapes[f"{number}.{name}"] = (heads, config.width)
        shapes[f"{number}.output"] = (config.width, heads)
        shapes[f"{number}.gate"] = shapes[f"{number}.up"] = (config.ffn_dim, config.width)
        shapes[f"{number}.down"] = (config.width, config.ffn_dim)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, device=device, dtype=dtype) * max(shape) ** -0.5
    ones = torch.ones(config.width, device=device, dtype=dtype)
    for number in range(config.num_layers):
        weights[f"{number}.attention_norm"] = weights[f"{number}.mlp_norm"] = ones
    weights["final_norm"] = ones
    return weights


def hidden(torch: Any, config: DiffusionLMConfig, weights: dict[str, Any], tokens: Any) -> Any:
    """Return all tokens after the final norm."""
    functional = torch.nn.functional
    norm = lambda x, name: functional.rms_norm(x, (config.width,), weights[name], config.eps)
    batch, length = tokens.shape
    half = torch.arange(0, config.head_dim, 2, device=tokens.device) / config.head_dim
    angles = torch.outer(
        torch.arange(length, device=tokens.device), config.rope_theta ** (-half.float())
    )
    cos, sin = torch.cos(angles)[None, None], torch.sin(angles)[None, None]

    def rotate(x):
        first, second = x.float().chunk(2, dim=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(turned, dim=-1).to(x.dtype)

    x = weights["embedding"][tokens]
    for number in range(config.num_layers):
        y = norm(x, f"{number}.attention_norm")
        query, key, value = (
            (y @ weights[f"{number}.{name}"].T)
            .view(batch, length, config.num_heads, config.head_dim)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = functional.scaled_dot_product_attention(rotate(query), rotate(key), value)
        x = x + y.transpose(1, 2).reshape(batch, length, -1) @ weights[f"{number}.output"].T
        y = norm(x, f"{number}.mlp_norm")
        gated = functional.silu(y @ weights[f"{number}.gate"].T) * (y @ weights[f"{number}.up"].T)
        x = x + gated @ weights[f"{number}.down"].T
    return norm(x, "final_norm")


def answer(torch: Any, config: DiffusionLMConfig, weights: Any, prompts: Any, options: Any) -> Any:
    """Return prompts and answers, decoded block by block, one token a step."""
    batch, length = prompts.shape
    masks = prompts.new_full((batch, options.new_tokens), config.mask_id)
    tokens = torch.cat([prompts, masks], dim=1)
    compute = options.compute
    rows = torch.arange(batch, device=tokens.device)
    for start in range(length, length + options.new_tokens, options.block_length):
        block = slice(start, min(start + options.block_length, length + options.new_tokens))
        for _ in range(block.stop - block.start):
            x = compute(torch, config, weights, tokens)
            # The released loop computes the logits of all tokens; --block-logits spares them.
            x = x[:, block] if options.block_logits else x
            logits = (x @ weights["head"].T).float()
            logits = logits if options.block_logits else logits[:, block]
            allowed = logits.clone()
            allowed[..., config.mask_id] = -torch.inf
            best = allowed.argmax(dim=-1)
            sure = torch.softmax(logits, dim=-1).gather(-1, best[..., None])[..., 0]
            masked = tokens[:, block] == config.mask_id
            place = torch.where(masked, sure, -1.0).argmax(dim=-1)
            tokens[rows, start + place] = best[rows, place]
    return tokens


def main() -> None:
    """Take the options, time answers, print and write records."""
    parser = argparse.ArgumentParser(prog="python -m train.configs.decoding_speed_torch")
    parser.add_argument("--model", default="llada-8b", choices=list(DIFFUSION_LM_PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--block-logits", action="store_true", help="logits of the block alone")
    parser.add_argument("--compile", action="store_true", help="compile the model's pass")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise SystemExit("this comparison needs PyTorch with CUDA") from error
    config = DIFFUSION_LM_PRESETS[options.model]
    options.compute = torch.compile(hidden) if options.compile else hidden
    records = []
    with torch.inference_mode():
        weights = make_weights(torch, config, "cuda", torch.bfloat16)
        for batch in options.batches:
            shape = (batch, options.prompt_tokens)
            prompts = torch.randint(0, config.mask_id, shape, device="cuda")
            seconds = []
            for _ in range(options.runs + 1):  # the first one warms up
                torch.cuda.synchronize()
                started = time.perf_counter()
                answer(torch, config, weights, prompts, options)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            median = statistics.median(seconds[1:])
            records.append(
                {
                    "model": options.model,
                    "method": "torch",
                    "compiled": options.compile,
                    "block_logits": options.block_logits,
                    "batch": batch,
                    "prompt_tokens": options.prompt_tokens,
                    "new_tokens": options.new_tokens,
                    "ms_a_step": round(1000 * median / options.new_tokens, 3),
                    "tokens_per_second": round(batch * options.new_tokens / median, 1),
                    "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                }
            )
            print(records[-1], flush=True)
    if options.output is not None:
        write_json(options.output, records)


if __name__ == "__main__":
    main()
