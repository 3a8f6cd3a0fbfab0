"""Pictures from the terminal: `python -m jaxgen.pipelines.generate --help`.

Draws with a model trained here, with Stable Diffusion 3 or 3.5, or with a pair of either.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.pictures import image_grid
from jaxgen.pipelines.stable_diffusion_3 import StableDiffusion3
from jaxgen.pipelines.stitched import StitchedTextToImage
from jaxgen.pipelines.text_to_image import TextToImage
from jaxgen.sampling import Alone, HybridStitch, Policy, SRDiffusion, TStitch

_EXAMPLES = """examples:
  python -m jaxgen.pipelines.generate weights/openmoji-large "red apple" "dog face"
  python -m jaxgen.pipelines.generate weights/openmoji-large --small weights/openmoji-small \\
      "woman firefighter dark skin tone" --sampler hybrid --steps 50
  python -m jaxgen.pipelines.generate stable-diffusion-3.5-large "a red cat in the snow" \\
      --small stable-diffusion-3-medium --height 1024 --width 1024 --dtype bfloat16
"""
SAMPLERS = ("large", "small", "t-stitch", "srdiffusion", "hybrid")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m jaxgen.pipelines.generate",
        description="Draw pictures for captions and write them as one PNG.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("model", type=Path, help="folder of a model trained here, or of Stable Diffusion 3")
    add("prompts", nargs="+", help="captions, a picture each")
    add("--small", type=Path, help="folder of a smaller model that shares the steps")
    add("--sampler", choices=SAMPLERS, help="who predicts; hybrid with --small, else large")
    add("--start", type=float, default=0.22, help="share of the steps before the hybrid stage")
    add("--end", type=float, default=0.52, help="share of the steps before its end, or the switch")
    add("--share", type=float, default=0.3, help="of the patches the large model goes on with")
    add("--output", type=Path, default=Path("pictures.png"), help="PNG to write (pictures.png)")
    add("--steps", type=int, default=28, help="Euler steps (28)")
    add("--guidance", type=float, default=4.5, help="guidance scale (4.5)")
    add("--seed", type=int, default=0, help="of the noise (0)")
    add("--negative", default="", help="what Stable Diffusion is led away from")
    add("--height", type=int, default=1024, help="of Stable Diffusion's pictures (1024)")
    add("--width", type=int, default=1024, help="likewise (1024)")
    add("--dtype", default="bfloat16", help="of weights and computation (bfloat16)")
    add("--attention", choices=("exact", "int8"), default="exact", help="arithmetic (exact)")
    add("--scan", action="store_true", help="compile a block of Stable Diffusion instead of all")
    add("--no-t5", action="store_true", help="leave T5 out")
    return made


def policy_of(arguments: argparse.Namespace) -> Policy:
    """Return the policy that the arguments name.

    Raises:
        ValueError: A sampler that needs a small model without one.
    """
    sampler = arguments.sampler or ("large" if arguments.small is None else "hybrid")
    if sampler != "large" and arguments.small is None:
        raise ValueError(f"--sampler {sampler} needs --small, the folder of a smaller model")
    match sampler:
        case "large" | "small":
            return Alone(sampler)
        case "t-stitch":
            return TStitch(arguments.end)
        case "srdiffusion":
            return SRDiffusion(arguments.end)
        case _:
            return HybridStitch(arguments.start, arguments.end, arguments.share)


def draw(arguments: argparse.Namespace) -> np.ndarray:
    """Load the models and return one picture a caption."""
    policy = policy_of(arguments)
    common: dict[str, Any] = {"dtype": arguments.dtype, "attention": arguments.attention}
    options: dict[str, Any] = {
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "seed": arguments.seed,
    }
    if (arguments.model / "model_index.json").exists():
        pipeline = StableDiffusion3.from_pretrained(
            arguments.model,
            small=arguments.small,
            with_t5=not arguments.no_t5,
            scan=arguments.scan,
            **common,
        )
        sizes = {"height": arguments.height, "width": arguments.width}
        negative = arguments.negative
        return pipeline(
            arguments.prompts, policy=policy, negative_prompts=negative, **sizes, **options
        )
    large = TextToImage.from_pretrained(arguments.model, **common)
    if arguments.small is None:
        return large(arguments.prompts, **options)
    small = TextToImage.from_pretrained(arguments.small, **common)
    return StitchedTextToImage(large, small)(arguments.prompts, policy=policy, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, write the picture, and say how long it took; errors end with code 2."""
    made = parser()
    parsed = made.parse_args(arguments)
    started = time.perf_counter()
    try:
        pictures = draw(parsed)
        image_grid(pictures, parsed.prompts, picture_size=max(112, pictures.shape[2])).save(
            parsed.output
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        made.error(str(error))
    seconds = time.perf_counter() - started
    print(
        f"{len(pictures)} pictures in {seconds:.1f} s with loading and compiling, on "
        f"{jax.devices()[0].device_kind}: {parsed.output}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
