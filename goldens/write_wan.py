"""Writes golden files of the Wan2.1 video transformer, computed by diffusers.

Usage: write_wan.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

Each file holds `input.*`, `output` and `weights.*` (diffusers keys) of one tiny model in float32;
its configuration is JSON in the metadata. `wan_folder/transformer` is a model as diffusers saves
it; `wan_folder/example.safetensors` holds inputs and outputs, also those of the model in bfloat16.
`wan_folder/scheduler` is a scheduler as diffusers saves it; `wan_folder/sampling.safetensors` holds
what both make of noise and text, with guidance, in the loop of diffusers' `WanPipeline`.
The weights are random, those that training starts at zero or one included, so that no term of the
computation is hidden.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import save_file

COMMON = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 40,
}
# Patches of three different sides, as many kinds of channels, and an epsilon that can be seen.
PATCHES = {
    "patch_size": (2, 1, 3),
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 5,
    "cross_attn_norm": False,
    "eps": 1e-3,
}
MODELS = {"plain": ({}, (3, 6, 8)), "patches": (PATCHES, (4, 5, 6))}
SAMPLING = {"shift": 5.0, "steps": 4, "guidance_scale": 3.5}
FOLDER = ({"num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 20}, (2, 8, 4))


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter, with sizes that keep activations near one."""
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2 or name.endswith("scale_shift_table"):
            is_norm_weight = ".norm" in name and name.endswith(".weight")
            tensor.copy_(0.3 * noise + (1.0 if is_norm_weight else 0.0))
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)


def draw(options: dict, sizes: tuple[int, ...], seed: int):
    """Returns a random model, its configuration and inputs."""
    config = COMMON | options
    generator = torch.Generator().manual_seed(seed)
    model = WanTransformer3DModel(**config).eval()
    randomize(model, generator)
    inputs = {
        "latents": torch.randn(2, config["in_channels"], *sizes, generator=generator),
        "timestep": torch.tensor([3.25, 871.5]),
        "context": torch.randn(2, 5, config["text_dim"], generator=generator),
    }
    return model, config, inputs


def halve(model: torch.nn.Module) -> None:
    """Makes parameters bfloat16, except those that loading in bfloat16 keeps in float32."""
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()


@torch.no_grad()
def run(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Returns the velocity in float32, computed in `dtype`."""
    return model(
        hidden_states=inputs["latents"].to(dtype),
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["context"].to(dtype),
    ).sample.float()


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file."""
    metadata = metadata | {"diffusers": diffusers.__version__, "torch": torch.__version__}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes")


def write(name: str, folder: Path) -> None:
    """Writes one golden file."""
    model, config, inputs = draw(*MODELS[name], seed=sorted(MODELS).index(name))
    tensors = {f"input.{key}": value for key, value in inputs.items()}
    tensors |= {f"weights.{key}": value for key, value in model.state_dict().items()}
    tensors["output"] = run(model, inputs)
    save(folder / f"wan_{name}.safetensors", tensors, {"config": json.dumps(config)})


def write_folder(folder: Path) -> None:
    """Writes a model with diffusers' own `save_pretrained`, and an example of its output."""
    model, _, inputs = draw(*FOLDER, seed=2)
    model.save_pretrained(folder / "transformer")
    example = inputs | {"output": run(model, inputs)}
    halve(model)
    example["output_bfloat16"] = run(model, inputs, torch.bfloat16)
    save(folder / "example.safetensors", example, {})
    for path in (folder / "transformer").iterdir():
        path.chmod(0o644)
        print(f"{path}: {path.stat().st_size} bytes")


@torch.no_grad()
def sample(
    model: torch.nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, inputs: dict
) -> torch.Tensor:
    """Returns the latents that the scheduler's steps lead to."""
    latents, scale = inputs["noise"], SAMPLING["guidance_scale"]
    scheduler.set_timesteps(SAMPLING["steps"])
    for time in scheduler.timesteps:
        point = {"latents": latents, "timestep": time.expand(len(latents))}
        guided, away = (
            run(model, point | {"context": inputs[name]})
            for name in ("context", "negative_context")
        )
        latents = scheduler.step(away + scale * (guided - away), time, latents).prev_sample
    return latents


def write_sampling(folder: Path) -> None:
    """Writes a scheduler with diffusers' own `save_pretrained`, and latents sampled with it."""
    model, _, inputs = draw(*FOLDER, seed=2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SAMPLING["shift"])
    scheduler.save_pretrained(folder / "scheduler")
    generator = torch.Generator().manual_seed(3)
    names = {"noise": "latents", "context": "context", "negative_context": "context"}
    example = {
        name: torch.randn(inputs[like].shape, generator=generator) for name, like in names.items()
    }
    example["output"] = sample(model, scheduler, example)
    example["sigmas"] = scheduler.sigmas
    save(folder / "sampling.safetensors", example, {"sampling": json.dumps(SAMPLING)})
    path = folder / "scheduler/scheduler_config.json"
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for model_name in MODELS:
        write(model_name, target)
    write_folder(target / "wan_folder")
    write_sampling(target / "wan_folder")
