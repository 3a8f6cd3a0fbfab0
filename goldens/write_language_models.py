"""Writes golden files of the transformers of SDAR and LLaDA.

Usage: write_language_models.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

Everything lies below `language_models`: tiny random models, each a folder as a released one, with
an `example.safetensors` of inputs and outputs. SDAR is Qwen3 with another mask, and LLaDA is Llama
without one, so both run here as these, with masks of four dimensions. `sdar` has the configuration
of the released SDAR, `qwen3_tied` is as transformers saves it, in shards, and `llada` has the keys
and the configuration of the released LLaDA.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

BLOCK = 4
SIZES = {
    "sdar": {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
    },
    "qwen3_tied": {
        "vocab_size": 61,
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-4,
        "tie_word_embeddings": True,
    },
    "llada": {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
    },
}
THETAS = {"sdar": 1000.0, "qwen3_tied": 50.0, "llada": 200.0}
MASKS = {"sdar": 90, "llada": 77}
LLADA_KEYS = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
LLADA_BLOCK_KEYS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


@torch.no_grad()
def draw(name: str):
    """Returns a random model in which no parameter is zero or one and every term shows."""
    rope = {"rope_type": "default", "rope_theta": THETAS[name]}
    kind, of = (
        (LlamaForCausalLM, LlamaConfig) if name == "llada" else (Qwen3ForCausalLM, Qwen3Config)
    )
    config = of(**SIZES[name], rope_parameters=rope, attn_implementation="eager")
    generator = torch.Generator().manual_seed(sorted(SIZES).index(name))
    model = kind(config).float().eval()
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1.0 + 0.3 * noise if tensor.ndim < 2 else noise / tensor.shape[1] ** 0.5)
    return model


def block_causal(tokens: int) -> torch.Tensor:
    """Which token sees which: its own block and those before."""
    blocks = torch.arange(tokens) // BLOCK
    return blocks[:, None] >= blocks[None, :]


def doubled(tokens: int) -> torch.Tensor:
    """The mask of training: a noisy copy of a text, which sees itself and the clean blocks before.

    The first half is the noisy copy, the second the clean text, which is block-causal.
    """
    blocks = torch.arange(tokens) // BLOCK
    same, before = blocks[:, None] == blocks[None, :], blocks[:, None] > blocks[None, :]
    noisy = torch.cat([same, before], dim=1)
    clean = torch.cat([torch.zeros_like(same), same | before], dim=1)
    return torch.cat([noisy, clean], dim=0)


def examples(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns ids, positions and masks by the name of the example."""
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(0, SIZES[name]["vocab_size"], (2, 12), generator=generator)
    line = torch.arange(12)[None]
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :5] = False  # padding on the left
    if name == "llada":
        full = torch.ones(1, 12, 12, dtype=torch.bool)
        return {"full": (tokens, line, full), "padded": (tokens, line, full & real[:, None])}
    causal = block_causal(12)[None]
    if name == "sdar":
        half = torch.arange(8)
        twice = torch.cat([half, half])[None]
        text = torch.randint(0, SIZES[name]["vocab_size"], (2, 16), generator=generator)
        return {"blocks": (tokens, line, causal), "doubled": (text, twice, doubled(8)[None])}
    # Padding sees itself: a row without any key has no defined output.
    padded = (causal & real[:, None]) | torch.eye(12, dtype=torch.bool)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return {"blocks": (tokens, line, causal), "padded": (tokens, positions, padded)}


@torch.no_grad()
def run(model, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the logits under a mask, which the model adds to its scores."""
    lowest = torch.finfo(torch.float32).min
    scores = torch.zeros(mask.shape).masked_fill(~mask, lowest)[:, None]
    scores = scores.expand(len(tokens), -1, -1, -1)
    positions = positions.expand(len(tokens), -1)
    options = {"position_ids": positions, "use_cache": False}
    logits = model(input_ids=tokens, attention_mask=scores, **options).logits
    causal = model(input_ids=tokens, **options).logits
    assert (logits - causal).abs().max() > 0.1, "the mask was ignored"
    return logits


def llada_key(key: str) -> str:
    """Translates a key of Llama into that of LLaDA."""
    if key in LLADA_KEYS:
        return LLADA_KEYS[key]
    _, _, number, part = key.removesuffix(".weight").split(".", 3)
    return f"model.transformer.blocks.{number}.{LLADA_BLOCK_KEYS[part]}.weight"


def sdar_config() -> dict:
    """Returns what the configuration of a released SDAR holds."""
    return SIZES["sdar"] | {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "flex_attention",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": BLOCK,
        "bos_token_id": 1,
        "debug": False,
        "eos_token_id": 1,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mask_token_id": MASKS["sdar"],
        "max_window_layers": 3,
        "micro_forward": False,
        "model_type": "sdar",
        "rope_scaling": None,
        "rope_theta": THETAS["sdar"],
        "skip_checkpoint": False,
        "sliding_window": None,
        "torch_dtype": "float32",
        "transformers_version": "4.52.4",
        "use_cache": False,
        "use_deepep": False,
        "use_sliding_window": False,
    }


def llada_config() -> dict:
    """Returns what the configuration of a released LLaDA holds."""
    sizes = SIZES["llada"]
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": sizes["hidden_size"],
        "embedding_dropout": 0.0,
        "embedding_size": sizes["vocab_size"],
        "eos_token_id": 1,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASKS["llada"],
        "max_sequence_length": sizes["max_position_embeddings"],
        "mlp_hidden_size": sizes["intermediate_size"],
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": sizes["num_attention_heads"],
        "n_kv_heads": sizes["num_key_value_heads"],
        "n_layers": sizes["num_hidden_layers"],
        "pad_token_id": 1,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": sizes["rms_norm_eps"],
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": THETAS["llada"],
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": sizes["vocab_size"],
        "weight_tying": False,
    }


def write(name: str, folder: Path) -> None:
    """Writes a model and its examples."""
    model = draw(name)
    folder.mkdir(parents=True)
    if name == "qwen3_tied":
        model.save_pretrained(folder, max_shard_size="20KB")
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        key_of, config = (
            (llada_key, llada_config()) if name == "llada" else (lambda key: key, sdar_config())
        )
        weights = {key_of(key): tensor.detach() for key, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")
    tensors = {}
    for example, (tokens, positions, mask) in examples(name).items():
        logits = run(model, tokens, positions, mask)
        values = {"tokens": tokens.int(), "positions": positions.int(), "mask": mask}
        values["logits"] = logits
        tensors |= {f"{example}.{key}": value.contiguous() for key, value in values.items()}
    about = {module.__name__: module.__version__ for module in (torch, transformers)}
    save_file(tensors, folder / "example.safetensors", {"about": json.dumps(about)})


if __name__ == "__main__":
    target_folder = Path(sys.argv[1]) / "language_models"
    shutil.rmtree(target_folder, ignore_errors=True)
    for model_name in SIZES:
        write(model_name, target_folder / model_name)
    for file in sorted(target_folder.rglob("*.*")):
        file.chmod(0o644)
        print(f"{file}: {file.stat().st_size} bytes")
