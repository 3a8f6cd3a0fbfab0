"""Writes a whole Stable Diffusion 3 pipeline as diffusers saves it, and what it draws.

Usage: write_text_to_image_sd3.py FOLDER. Run by `goldens/make.sh` after `write_text_encoders.py`,
whose encoders and tokenizers it takes.

`sd3_pipeline` is a folder of a tiny random pipeline: SD3.5's transformer with qk-norm and dual
attention, a VAE, both CLIP models, T5, tokenizers and scheduler. `sd3_pipeline/example.safetensors`
holds first latents, the latents after 8 guided steps and the picture in [0, 1], and the same with
skip-layer guidance.
"""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from write_text_encoders import T5_TOKENS, make_pipeline

PROMPTS = ["a red cat in the snow!", "the hummingbird's house, by night (oil painting)"]
NEGATIVE = "a dark blue dog"
STEPS, GUIDANCE, SIDE = 8, 4.5, 32
SKIPPED = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_scale": 2.5,
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.6,
}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter, with sizes that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            is_scale = "norm" in name and name.endswith("weight")
            tensor.copy_(0.2 * noise + (1.0 if is_scale else 0.0))
        elif name == "pos_embed.pos_embed":
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model.eval()


def build(folder: Path) -> StableDiffusion3Pipeline:
    """Returns the pipeline."""
    pipeline = make_pipeline(folder / "text_encoders", with_t5=True)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=44,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = {name: getattr(pipeline, name) for name in (
        "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
        "tokenizer_3",
    )}  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=randomize(transformer, 1),
        vae=randomize(vae, 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )


def draw(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, **options) -> dict:
    """Returns the last latents and the picture."""
    common = {
        "prompt": PROMPTS,
        "negative_prompt": [NEGATIVE] * len(PROMPTS),
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": T5_TOKENS,
        **options,
    }
    last = pipeline(latents=latents.clone(), output_type="latent", **common).images
    picture = pipeline(latents=latents.clone(), output_type="pt", **common).images
    return {"latents": last, "picture": picture}


if __name__ == "__main__":
    target = Path(sys.argv[1]) / "sd3_pipeline"
    shutil.rmtree(target, ignore_errors=True)
    made = build(Path(sys.argv[1]))
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(target)
    start = torch.randn((2, 4, SIDE // 8, SIDE // 8), generator=torch.Generator().manual_seed(3))
    tensors = {"start": start}
    tensors |= draw(made, start)
    skipped = draw(made, start, **SKIPPED)
    tensors |= {f"{name}_skipped": tensor for name, tensor in skipped.items()}
    about = {"prompts": PROMPTS, "negative": NEGATIVE, "steps": STEPS, "guidance": GUIDANCE,
             "t5_tokens": T5_TOKENS, **SKIPPED, "diffusers": diffusers.__version__,
             "torch": torch.__version__}  # fmt: skip
    tensors = {name: tensor.contiguous().float() for name, tensor in tensors.items()}
    save_file(tensors, target / "example.safetensors", {"about": json.dumps(about)})
    for file in sorted(target.rglob("*.*")):
        file.chmod(0o644)
        print(f"{file}: {file.stat().st_size} bytes")
