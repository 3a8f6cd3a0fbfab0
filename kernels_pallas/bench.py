"""Time the kernels on your device: `python -m kernels_pallas.bench --help`.

Prints forward, backward and both in milliseconds and TOPS, beside exact attention in bfloat16
(cuDNN on a GPU, and tokamax where it is installed) in the same process, with everything that a call
does: smoothing, quantization, transposes. Operations are counted 4 * batch * heads * queries *
keys * head_dim forward, half of it with a causal mask, and 2.5 times that for the backward pass;
for sparse-linear attention as many as full attention has, so that its TOPS are effective ones.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import (
    explain,
    explain_sparse_linear_attention,
    sage_attention,
    sparse_linear_attention,
)

OPERATIONS = ("sage_attention", "sparse_linear_attention")
_SPARSE = OPERATIONS[1]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One line of the table."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    causal: bool
    sparsity: float | None = None

    def operations(self, name: str) -> float:
        """Multiplications and additions of a pass."""
        forward = 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim
        forward *= 0.5 if self.causal else 1.0
        return forward * {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[name]

    def record(self) -> dict[str, Any]:
        """Returns the fields of a record; sparsity where it is meant."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}


def milliseconds(function: Callable[..., Any], *arguments: Any, runs: int) -> float:
    """Median time of a call in a program of `runs` calls, over three groups of three programs.

    One program, as in a step of training: the time that Python takes for a call is not counted.
    """
    program = jax.jit(functools.partial(repeat, function, runs))
    jax.block_until_ready(program(*arguments))
    groups = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(3):
            result = program(*arguments)
        jax.block_until_ready(result)
        groups.append((time.perf_counter() - started) / (3 * runs))
    return 1e3 * statistics.median(groups)


def repeat(function: Callable[..., Any], runs: int, first: jax.Array, *rest: jax.Array) -> Any:
    """Calls a function several times, each time with one number taken from all earlier results.

    So no part of a call can be merged with another call, moved before it, or left out.
    """

    def call(_, carry):
        first, *others = lax.optimization_barrier((carry[0], *rest))
        results = function(first, *others)
        numbers = [x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(results)]
        number = jnp.tanh(sum(numbers)).astype(first.dtype)
        return first.at[(0,) * first.ndim].set(number), number

    return lax.fori_loop(0, runs, call, (first, jnp.zeros((), first.dtype)))[1]


def time_passes(
    attend: Callable[..., Any], inputs: Sequence[jax.Array], runs: int
) -> dict[str, float]:
    """Milliseconds of the forward pass, the backward pass, and both."""
    *operands, d_out = inputs
    pullback = jax.jit(lambda *operands: jax.vjp(attend, *operands)[1])(*operands)
    saved, structure = jax.tree.flatten(pullback)

    def backward(d_out, *saved):
        return jax.tree.unflatten(structure, saved)(d_out)

    return {
        "forward": milliseconds(attend, *operands, runs=runs),
        "backward": milliseconds(backward, d_out, *saved, runs=runs),
        "forward_backward": milliseconds(
            functools.partial(both_passes, attend), *inputs, runs=runs
        ),
    }


def both_passes(
    attend: Callable[..., Any], query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array
) -> Any:
    """The output and all gradients."""
    out, pullback = jax.vjp(attend, query, key, value)
    return out, pullback(d_out)


def mebibytes(attend: Callable[..., Any], inputs: Sequence[jax.Array]) -> float:
    """Most memory that both passes need, their inputs and results included."""
    program = jax.jit(functools.partial(both_passes, attend))
    memory = program.lower(*inputs).compile().memory_analysis()
    kinds = ("argument", "output", "temp")
    return sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds) / 2**20


def draw_inputs(size: tuple[int, int, int, int]) -> list[jax.Array]:
    """Query, key, value and the gradient of the output, normal, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    # Drawn in float32: drawn in bfloat16, normals take few values and round too well.
    return [jax.random.normal(key, size).astype(jnp.bfloat16) for key in keys]


def exact_attention(shape: Shape) -> dict[str, Callable[..., jax.Array]]:
    """What is timed beside ours, named after its field in the records."""
    on_gpu = jax.devices()[0].platform == "gpu"
    theirs = {
        "cudnn_ms" if on_gpu else "exact_ms": functools.partial(
            jax.nn.dot_product_attention, implementation="cudnn" if on_gpu else "xla"
        )
    }
    if on_gpu and importlib.util.find_spec("tokamax"):
        tokamax = importlib.import_module("tokamax")
        theirs["tokamax_ms"] = functools.partial(
            tokamax.dot_product_attention, implementation="mosaic"
        )
    return {name: functools.partial(f, is_causal=shape.causal) for name, f in theirs.items()}


def attention(shape: Shape, implementation: Any) -> Callable[..., Any]:
    """What is timed: INT8 attention or, where there is a sparsity, sparse-linear attention."""
    if shape.sparsity is None:
        return functools.partial(
            sage_attention, is_causal=shape.causal, implementation=implementation
        )
    return functools.partial(
        sparse_linear_attention,
        mixing_logits=jnp.full((shape.heads,), 2.0),
        kept_fraction=round(1.0 - shape.sparsity, 6),
        implementation=implementation,
    )


def measure(shape: Shape, implementation: Any, runs: int) -> list[dict[str, Any]]:
    """Times one shape and returns a record for each pass."""
    inputs = draw_inputs((shape.batch, shape.tokens, shape.heads, shape.head_dim))
    ours, memory = attention(shape, implementation), {}
    with jax.numpy_dtype_promotion("standard"):  # jax.nn relies on it for 16 bits
        ms = time_passes(ours, inputs, runs)
        theirs = {
            name: time_passes(attend, inputs, runs)
            for name, attend in exact_attention(shape).items()
        }
        if shape.sparsity is not None:
            exact = next(iter(exact_attention(shape).values()))
            for name, attend in (("mib", ours), ("exact_mib", exact)):
                memory[name] = round(mebibytes(attend, inputs), 1)
    return [
        {
            "op": "sage_attention" if shape.sparsity is None else _SPARSE,
            "pass": name,
            **shape.record(),
            "ms": round(ms[name], 3),
            **{field: round(times[name], 3) for field, times in theirs.items()},
            "ratio": round(next(iter(theirs.values()))[name] / ms[name], 3),
            "tops": float(f"{shape.operations(name) / ms[name] / 1e9:.4g}"),
            **(memory if name == "forward_backward" else {}),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
        }
        for name in ms
    ]


def _commit() -> str | None:
    """The commit of the code that runs, if it is a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as lines of text."""
    lines = [
        f"{'shape':>22} {'mask':>7} {'pass':>17} {'ms':>9} {'exact':>9} {'ratio':>6} {'TOPS':>7}"
        f"{' tokamax':>10}"
    ]
    for record in records:
        shape = ", ".join(str(record[name]) for name in ("batch", "tokens", "heads", "head_dim"))
        exact = record.get("cudnn_ms", record.get("exact_ms"))
        lines.append(
            f"{shape:>22} {_mask(record):>7} {record['pass']:>17} "
            f"{record['ms']:9.3f} {exact:9.3f} {record['ratio']:6.2f} {record['tops']:7.1f}"
            + (f" {record['tokamax_ms']:9.3f}" if "tokamax_ms" in record else "")
        )
    return "\n".join(lines)


def _mask(record: dict[str, Any]) -> str:
    """What is left of all pairs of queries and keys."""
    if record.get("sparsity"):
        return f"{record['sparsity']:.0%}"
    return "causal" if record["causal"] else "full"


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The records of one operation as a table for a document: a line a shape, two passes beside."""
    sparse = any("sparsity" in record for record in records)
    second = "backward" if sparse else "forward_backward"
    title = "sparsity" if sparse else "mask", "backward" if sparse else "both passes"
    lines = [
        f"| batch, tokens, heads, head_dim | {title[0]} | forward | cuDNN | ratio | {title[1]} "
        "| cuDNN | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shapes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        size = ", ".join(str(record[name]) for name in ("batch", "tokens", "heads", "head_dim"))
        shapes.setdefault((size, _mask(record)), {})[record["pass"]] = record
    for cells, passes_of_shape in shapes.items():
        cells = [*cells]
        for name in ("forward", second):
            record = passes_of_shape[name]
            exact = record.get("cudnn_ms", record.get("exact_ms"))
            cells += [f"{record['ms']:.2f} ms", f"{exact:.2f} ms", f"{record['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws TOPS over the number of tokens, a panel for each pass."""
    import matplotlib.figure

    names = list(dict.fromkeys(record["pass"] for record in records))
    figure = matplotlib.figure.Figure(figsize=(5 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        lines: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
        for record in records:
            if record["pass"] == name:
                kind = record["batch"], record["head_dim"], _mask(record)
                lines.setdefault(kind, []).append(record)
        for (batch, head_dim, mask), line in lines.items():
            tokens = [record["tokens"] for record in line]
            label = f"head_dim {head_dim}, {mask}"
            label += f", batch {batch}" if batch > 1 else ""
            (drawn,) = axes.plot(tokens, [r["tops"] for r in line], marker="o", label=label)
            exact = [r["tops"] / r["ratio"] for r in line]
            axes.plot(tokens, exact, marker="o", linestyle=":", color=drawn.get_color())
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens", ylabel="TOPS", title=name.replace("_", " + "))
        axes.grid(alpha=0.3)
    labels = panels[0].get_legend_handles_labels()
    title = "dotted: exact, in bfloat16"
    figure.legend(*labels, loc="outside lower center", ncols=4, fontsize="small", title=title)
    figure.savefig(path, dpi=120)


def _shapes(options: argparse.Namespace) -> list[Shape]:
    """What was asked for, in order."""
    masks = {"full": [False], "causal": [True], "both": [False, True]}[options.mask]
    sparsities = [None]
    if options.op == _SPARSE:
        masks, sparsities = [False], options.sparsity
    return [
        Shape(options.batch, tokens, options.heads, head_dim, causal, sparsity)
        for tokens, head_dim, causal, sparsity in itertools.product(
            options.tokens, options.head_dim, masks, sparsities
        )
    ]


def _measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all shapes; what was measured is written at once, should the rest be cut off."""
    shapes = _shapes(options)
    size = (shapes[0].batch, shapes[0].tokens, shapes[0].heads, shapes[0].head_dim)
    operands, how = [jax.ShapeDtypeStruct(size, jnp.bfloat16)] * 3, {}
    if options.op == _SPARSE:
        operands.append(jax.ShapeDtypeStruct((shapes[0].heads,), jnp.float32))
        how["kept_fraction"] = round(1.0 - options.sparsity[0], 6)
    describe = explain_sparse_linear_attention if options.op == _SPARSE else explain
    print(describe(*operands, implementation=options.implementation, **how), file=sys.stderr)
    records = []
    for shape in shapes:
        records += measure(shape, options.implementation, options.runs)
        print(table(records[-3:]).split("\n", 1)[1], file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.bench",
        description="Time our attention beside exact bfloat16 attention on this device.",
    )
    add = functools.partial(parser.add_argument, metavar="N")
    parser.add_argument("op", choices=OPERATIONS, help="what to time")
    add("--batch", type=int, default=1, help="sequences")
    add("--heads", type=int, default=16, help="heads")
    add("--tokens", type=int, nargs="+", default=[4096, 16384, 32768], help="lengths")
    add("--head-dim", type=int, nargs="+", default=[64, 128], help="sizes of a head")
    parser.add_argument(
        "--sparsity",
        type=float,
        nargs="+",
        default=[0.97, 0.95],
        metavar="X",
        help="of sparse-linear attention: shares of blocks without softmax attention",
    )
    add("--runs", type=int, default=10, help="calls in a program")
    parser.add_argument(
        "--mask", choices=("full", "causal", "both"), default="both", help="which masks"
    )
    parser.add_argument("--implementation", help="mosaic_gpu or xla; default: the first that works")
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="measure nothing, show these records again"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TOPS over tokens as PNG")
    options = parser.parse_args(arguments)
    if min(options.batch, options.heads, options.runs, *options.tokens, *options.head_dim) < 1:
        parser.error("batch, heads, runs, tokens and head-dim must be at least 1")
    if not all(0 <= sparsity < 1 for sparsity in options.sparsity):
        parser.error(f"sparsity must be from 0 to less than 1, got {options.sparsity}")

    if options.records:
        records = json.loads(options.records.read_text(encoding="utf-8"))
        records = [record for record in records if record.get("op", options.op) == options.op]
    else:
        records = _measure_all(options)
    print(markdown(records) if options.markdown else table(records))
    if options.plot:
        plot(records, options.plot)


if __name__ == "__main__":
    main()
