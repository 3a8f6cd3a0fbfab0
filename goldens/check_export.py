"""Checks that diffusers loads a model exported by jaxgen and computes the same velocity.

Usage: check_export.py FOLDER, written by `goldens/export_mmdit.py`.
"""

import sys
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file


@torch.no_grad()
def check(folder: Path) -> None:
    """Raises SystemExit if the weights do not load completely or the outputs differ."""
    model, info = SD3Transformer2DModel.from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise SystemExit(f"diffusers does not accept the export: {problems}")
    example = load_file(folder / "example.safetensors")
    output = model.eval()(
        hidden_states=example["latents"],
        timestep=example["timestep"],
        encoder_hidden_states=example["context"],
        pooled_projections=example["pooled"],
    ).sample
    error = float((output - example["output"]).abs().max() / example["output"].abs().max())
    if error > 1e-5:
        raise SystemExit(f"diffusers computes another velocity: relative error {error:.1e}")
    print(f"diffusers loads the export; relative error of the velocity {error:.1e}")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
