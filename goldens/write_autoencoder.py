"""Writes golden files of the image autoencoder (AutoencoderKL), computed by diffusers.

Usage: write_autoencoder.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

`autoencoder_folder/vae` is a model like that of Stable Diffusion 3, but tiny, as diffusers saves
it; `autoencoder_folder/single_file.safetensors` holds the same weights, and one of another part,
in the key layout of the original single files. `autoencoder_quant.safetensors` holds another model
as `weights.*` (diffusers keys), its configuration as JSON in the metadata.
The latter and `autoencoder_folder/examples.safetensors` hold pairs of inputs and outputs of two
resolutions: `N.images` and `N.mean`, `N.logvar`; `N.latents`, scaled as for diffusion, and
`N.decoded`; `0.decoded_bfloat16` is the model in bfloat16.
The weights are random, those that training starts at zero or one included, so that no term of the
computation is hidden.
"""

import json
import re
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

COMMON = {"act_fn": "silu", "sample_size": 32, "force_upcast": True}
STABLE_DIFFUSION_3 = {
    "block_out_channels": (4, 8, 8),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Every number of channels is another, and those of the levels do not grow.
QUANT = {
    "in_channels": 2,
    "out_channels": 5,
    "block_out_channels": (9, 15, 6),
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 3,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
SIZES = ((2, 16, 24), (1, 36, 20))
# The original names of modules, by the present ones; {} are numbers.
ORIGINAL = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.down_blocks.{}.resnets.{}.norm1": "encoder.down.{}.block.{}.norm1",
    "encoder.down_blocks.{}.resnets.{}.conv1": "encoder.down.{}.block.{}.conv1",
    "encoder.down_blocks.{}.resnets.{}.norm2": "encoder.down.{}.block.{}.norm2",
    "encoder.down_blocks.{}.resnets.{}.conv2": "encoder.down.{}.block.{}.conv2",
    "encoder.down_blocks.{}.resnets.{}.conv_shortcut": "encoder.down.{}.block.{}.nin_shortcut",
    "encoder.down_blocks.{}.downsamplers.0.conv": "encoder.down.{}.downsample.conv",
    "encoder.mid_block.resnets.0": "encoder.mid.block_1",
    "encoder.mid_block.attentions.0.group_norm": "encoder.mid.attn_1.norm",
    "encoder.mid_block.attentions.0.to_q": "encoder.mid.attn_1.q",
    "encoder.mid_block.attentions.0.to_k": "encoder.mid.attn_1.k",
    "encoder.mid_block.attentions.0.to_v": "encoder.mid.attn_1.v",
    "encoder.mid_block.attentions.0.to_out.0": "encoder.mid.attn_1.proj_out",
    "encoder.mid_block.resnets.1": "encoder.mid.block_2",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.mid_block.resnets.0": "decoder.mid.block_1",
    "decoder.mid_block.attentions.0.group_norm": "decoder.mid.attn_1.norm",
    "decoder.mid_block.attentions.0.to_q": "decoder.mid.attn_1.q",
    "decoder.mid_block.attentions.0.to_k": "decoder.mid.attn_1.k",
    "decoder.mid_block.attentions.0.to_v": "decoder.mid.attn_1.v",
    "decoder.mid_block.attentions.0.to_out.0": "decoder.mid.attn_1.proj_out",
    "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.up_blocks.{}.resnets.{}.norm1": "decoder.up.{}.block.{}.norm1",
    "decoder.up_blocks.{}.resnets.{}.conv1": "decoder.up.{}.block.{}.conv1",
    "decoder.up_blocks.{}.resnets.{}.norm2": "decoder.up.{}.block.{}.norm2",
    "decoder.up_blocks.{}.resnets.{}.conv2": "decoder.up.{}.block.{}.conv2",
    "decoder.up_blocks.{}.resnets.{}.conv_shortcut": "decoder.up.{}.block.{}.nin_shortcut",
    "decoder.up_blocks.{}.upsamplers.0.conv": "decoder.up.{}.upsample.conv",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
}


@torch.no_grad()
def draw(options: dict, seed: int) -> tuple[AutoencoderKL, torch.Generator]:
    """Returns a model with random parameters that keep activations near one, and a generator."""
    levels = len(options["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    generator = torch.Generator().manual_seed(seed)
    model = AutoencoderKL(**COMMON, **blocks, **options).eval()
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            tensor.copy_(0.3 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model, generator


@torch.no_grad()
def examples(model: AutoencoderKL, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns inputs and outputs."""
    config, tensors = model.config, {}
    factor = 2 ** (len(config.block_out_channels) - 1)
    for number, (batch, height, width) in enumerate(SIZES):
        images = 2.0 * torch.rand(batch, config.in_channels, height, width, generator=generator)
        small = (batch, config.latent_channels, height // factor, width // factor)
        latents = torch.randn(small, generator=generator)
        found = model.encode(images - 1.0).latent_dist
        made = {
            "images": images - 1.0,
            "mean": found.mean,
            "logvar": found.logvar,
            "latents": latents,
            "decoded": model.decode(unscale(latents, config)).sample,
        }
        tensors |= {f"{number}.{name}": tensor for name, tensor in made.items()}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    latents = unscale(tensors["0.latents"], config).bfloat16()
    tensors["0.decoded_bfloat16"] = model.decode(latents).sample.float()
    return tensors


def unscale(latents: torch.Tensor, config) -> torch.Tensor:
    """What the pipelines of diffusers do before they decode."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


def to_original(model: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Returns the weights in the layout of the original single files, checked with diffusers."""
    levels, tensors = len(model.config.block_out_channels), {}
    for key, tensor in model.state_dict().items():
        for present, original in ORIGINAL.items():
            pattern = re.escape(present).replace(r"\{\}", r"(\d+)") + r"\.(.+)"
            if found := re.fullmatch(pattern, key):
                *numbers, rest = found.groups()
                if original.startswith("decoder.up."):
                    numbers[0] = levels - 1 - int(numbers[0])
                name = f"first_stage_model.{original.format(*numbers)}.{rest}"
                is_projection = ".attentions." in key and tensor.ndim == 2
                tensors[name] = tensor[:, :, None, None] if is_projection else tensor
                break
        else:
            raise SystemExit(f"{key} has no original name")
    again = convert_ldm_vae_checkpoint(tensors, model.config)
    state = model.state_dict()
    if again.keys() != state.keys() or any(not again[key].equal(state[key]) for key in state):
        raise SystemExit("diffusers does not turn the original layout into the same weights")
    return tensors


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file."""
    metadata = metadata | {"diffusers": diffusers.__version__, "torch": torch.__version__}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes")


def write_folder(folder: Path) -> None:
    """Writes the model like that of Stable Diffusion 3."""
    model, generator = draw(STABLE_DIFFUSION_3, seed=0)
    model.save_pretrained(folder / "vae")
    for path in (folder / "vae").iterdir():
        path.chmod(0o644)
        print(f"{path}: {path.stat().st_size} bytes")
    other = {"model.diffusion_model.x_embedder.proj.bias": torch.zeros(2)}
    save(folder / "single_file.safetensors", to_original(model) | other, {})
    save(folder / "examples.safetensors", examples(model, generator), {})


def write_quant(folder: Path) -> None:
    """Writes the model with quant convolutions."""
    model, generator = draw(QUANT, seed=1)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    tensors = {f"weights.{key}": value.clone() for key, value in model.state_dict().items()}
    tensors |= examples(model, generator)
    save(folder / "autoencoder_quant.safetensors", tensors, {"config": json.dumps(config)})


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_folder(target / "autoencoder_folder")
    write_quant(target)
