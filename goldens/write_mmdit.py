"""Writes golden files of the SD3 transformer: inputs, weights and output computed by diffusers.

Usage: write_mmdit.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

Each file holds `input.*`, `output` and `weights.*` (diffusers keys) of one tiny model in float32;
its configuration is JSON in the metadata. The weights are random, those that training starts at
zero or one included, so that no term of the computation is hidden.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

COMMON = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "caption_projection_dim": 8,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
}
LATENTS = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 8,
}
PIXELS = {
    "sample_size": 16,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "pos_embed_max_size": 6,
}
MODELS = {
    "plain": (LATENTS, (8, 12)),
    "qk_norm": (LATENTS | {"qk_norm": "rms_norm"}, (12, 6)),
    "dual": (LATENTS | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)}, (6, 10)),
    "pixels": (PIXELS | {"qk_norm": "rms_norm", "num_layers": 2}, (16, 12)),
}


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter and the position table, with sizes that keep activations near one."""
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            tensor.copy_(0.3 * noise + (1.0 if ".norm_" in name else 0.0))
        elif name == "pos_embed.pos_embed":
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)


@torch.no_grad()
def write(name: str, folder: Path) -> None:
    """Writes one golden file."""
    options, (height, width) = MODELS[name]
    config = COMMON | options
    generator = torch.Generator().manual_seed(sorted(MODELS).index(name))
    model = SD3Transformer2DModel(**config).eval()
    randomize(model, generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "latents": normal(2, config["in_channels"], height, width),
        "timestep": torch.tensor([3.25, 871.5]),
        "context": normal(2, 5, config["joint_attention_dim"]),
        "pooled": normal(2, config["pooled_projection_dim"]),
    }
    output = model(
        hidden_states=inputs["latents"],
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["context"],
        pooled_projections=inputs["pooled"],
    ).sample
    tensors = {f"input.{key}": value for key, value in inputs.items()} | {"output": output}
    tensors |= {f"weights.{key}": value for key, value in model.state_dict().items()}
    path = folder / f"mmdit_{name}.safetensors"
    metadata = {
        "config": json.dumps(config),
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes, output {tuple(output.shape)}")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for model_name in MODELS:
        write(model_name, target)
