"""Choose the kernels' settings for your GPU: `python -m kernels_pallas.tune --help`.

Times forward with backward for every candidate and stores the fastest for each head_dim, which
later calls on such a GPU use. The settings change no result, only its time.
"""

import argparse
import datetime
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels_pallas import explain, sage_attention
from kernels_pallas.bench import both_passes, draw_inputs, milliseconds
from kernels_pallas.sage_attention.tuning import Tuning, file_for, using


def measure(tuning: Tuning, size: tuple[int, int, int, int], runs: int) -> float:
    """Milliseconds of forward with backward at (batch, tokens, heads, head_dim), no mask."""
    attend = functools.partial(sage_attention, implementation="mosaic_gpu")
    with using(tuning):
        return milliseconds(functools.partial(both_passes, attend), *draw_inputs(size), runs=runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and store."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.tune",
        description="Time the settings of INT8 attention on this GPU and store the fastest.",
    )
    add = functools.partial(parser.add_argument, metavar="N", type=int)
    add("--tokens", default=16384, help="length of the sequence")
    add("--heads", default=16, help="number of heads")
    add("--head-dim", nargs="+", default=[64, 128], choices=(64, 128), help="sizes of a head")
    add("--runs", default=5, help="calls in a program")
    add("--stages", nargs="+", default=[2, 3, 4], help="tiles in flight to try")
    add("--stagger", nargs="+", default=[0, 1000, 2000, 3000], help="nanoseconds to try")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: where later calls look for it"
    )
    options = parser.parse_args(arguments)
    array = jax.ShapeDtypeStruct((1, options.tokens, options.heads, 64), jnp.bfloat16)
    if not (answer := explain(array, array, array)).endswith("'mosaic_gpu'"):
        parser.error(f"nothing to tune here: {answer}")

    kind = jax.devices()[0].device_kind
    output = options.output or file_for(kind)
    stored = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    choices = stored.get("sage_attention", {})
    for head_dim in options.head_dim:
        size = (1, options.tokens, options.heads, head_dim)
        times = {}
        for stages, stagger in itertools.product(options.stages, options.stagger):
            tuning = Tuning(stages, stagger)
            times[tuning] = measure(tuning, size, options.runs)
            print(f"head_dim {head_dim}, {stages} stages, {stagger} ns: {times[tuning]:.3f} ms")
        best = min(times, key=lambda tuning: times[tuning])
        choices[str(head_dim)] = {"stages": best.stages, "stagger": best.stagger}
        print(f"head_dim {head_dim}: best {best}")
    stored = {"device": kind, "date": datetime.date.today().isoformat(), "sage_attention": choices}
    output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"stored in {output}")


if __name__ == "__main__":
    main()
