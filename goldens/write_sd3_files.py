"""Writes the files of tiny SD3 transformers, as folders of diffusers and as original single files.

Usage: write_sd3_files.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

`sd3_files/NAME/transformer` is a model as diffusers saves it: like SD3-Medium (`plain`), like
SD3.5-Large in bfloat16 (`qk_norm`), like SD3.5-Medium in shards with an index (`dual`).
`sd3_files/NAME/single_file.safetensors` holds the same weights in the key layout of the original
single files, in `plain` with a tensor of the other parts of a pipeline; that of `qk_norm` has keys
without a prefix. diffusers' own conversion of each is compared with the model before it is written.
`sd3_files/NAME/example.safetensors` holds inputs and the output in float32.
The weights are random, those that training starts at zero or one included, so that no term of the
computation is hidden.
"""

import sys
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from write_mmdit import randomize

COMMON = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 7,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "caption_projection_dim": 8,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
}
QK_NORM = {"qk_norm": "rms_norm"}
MODELS = {
    "plain": {},
    "qk_norm": QK_NORM | {"num_layers": 2, "num_attention_heads": 3, "caption_projection_dim": 12},
    "dual": QK_NORM | {"dual_attention_layers": (0, 1)},
}
PREFIX = "model.diffusion_model."
OTHER_PARTS = {
    "first_stage_model.decoder.conv_in.bias": torch.ones(3),
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": torch.ones(2),
}


def to_original(weights: dict, num_layers: int, dual_attention_layers: tuple) -> dict:
    """Writes weights of diffusers as the authors of the model do."""
    original = {"pos_embed": weights["pos_embed.pos_embed"]}

    def both(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            original[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]

    def fuse(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            original[f"{theirs}.{kind}"] = torch.cat([weights[f"{name}.{kind}"] for name in ours])

    def shift_first(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            scale, shift = weights[f"{ours}.{kind}"].chunk(2)
            original[f"{theirs}.{kind}"] = torch.cat([shift, scale])

    both("x_embedder.proj", "pos_embed.proj")
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        both(f"t_embedder.mlp.{number}", f"time_text_embed.timestep_embedder.{name}")
        both(f"y_embedder.mlp.{number}", f"time_text_embed.text_embedder.{name}")
    both("context_embedder", "context_embedder")
    both("final_layer.linear", "proj_out")
    shift_first("final_layer.adaLN_modulation.1", "norm_out.linear")
    for number in range(num_layers):
        block = f"transformer_blocks.{number}"
        image, text = (f"joint_blocks.{number}.{part}_block" for part in ("x", "context"))
        last = number == num_layers - 1
        attentions = [(f"{image}.attn", "attn", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))]
        added = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        attentions.append((f"{text}.attn", "attn", *added))
        if number in dual_attention_layers:
            attentions.append((f"{image}.attn2", "attn2", *attentions[0][2:]))
        for theirs, name, projections, norms in attentions:
            fuse(f"{theirs}.qkv", *(f"{block}.{name}.{part}" for part in projections))
            for letter, norm in zip("qk", norms, strict=True):
                if f"{block}.{name}.{norm}.weight" in weights:
                    weight = weights[f"{block}.{name}.{norm}.weight"]
                    original[f"{theirs}.ln_{letter}.weight"] = weight
        both(f"{image}.attn.proj", f"{block}.attn.to_out.0")
        if number in dual_attention_layers:
            both(f"{image}.attn2.proj", f"{block}.attn2.to_out.0")
        both(f"{image}.adaLN_modulation.1", f"{block}.norm1.linear")
        modulation = f"{text}.adaLN_modulation.1", f"{block}.norm1_context.linear"
        if last:
            shift_first(*modulation)
        else:
            both(*modulation)
            both(f"{text}.attn.proj", f"{block}.attn.to_add_out")
        for part, name in ((image, "ff"), (text, "ff_context")):
            if not (last and part == text):
                both(f"{part}.mlp.fc1", f"{block}.{name}.net.0.proj")
                both(f"{part}.mlp.fc2", f"{block}.{name}.net.2")
    return original


@torch.no_grad()
def write(name: str, folder: Path) -> None:
    """Writes the files of one model."""
    config = COMMON | MODELS[name]
    generator = torch.Generator().manual_seed(100 + sorted(MODELS).index(name))
    model = SD3Transformer2DModel(**config).eval()
    randomize(model, generator)
    if name == "qk_norm":
        model = model.bfloat16()
    shards = {"max_shard_size": "30KB"} if name == "dual" else {}
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "transformer", **shards)

    weights = {key: value.clone() for key, value in model.state_dict().items()}
    original = to_original(weights, config["num_layers"], config.get("dual_attention_layers", ()))
    if name != "qk_norm":
        original = {f"{PREFIX}{key}": value for key, value in original.items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[key], value) for key, value in weights.items())
    if name == "plain":
        original |= OTHER_PARTS
    single_file = folder / "single_file.safetensors"
    save_file({key: value.contiguous() for key, value in original.items()}, single_file)

    model = model.float()
    inputs = {
        "latents": torch.randn(2, config["in_channels"], 8, 12, generator=generator),
        "timestep": torch.tensor([3.25, 871.5]),
        "context": torch.randn(2, 5, config["joint_attention_dim"], generator=generator),
        "pooled": torch.randn(2, config["pooled_projection_dim"], generator=generator),
    }
    output = model(
        hidden_states=inputs["latents"],
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["context"],
        pooled_projections=inputs["pooled"],
    ).sample
    save_file(inputs | {"output": output}, folder / "example.safetensors")
    for path in sorted(folder.rglob("*.*")):
        path.chmod(0o644)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    for model_name in MODELS:
        write(model_name, Path(sys.argv[1]) / "sd3_files" / model_name)
