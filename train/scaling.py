"""What several devices of one host give: `python -m train.scaling --help`.

Command    NCCL_NVLS_ENABLE=0 python -m train.scaling --output runs/scaling.json
Hardware   two H200, jax 0.11.2; 504 s
Outcome    results/scaling.json: the 325M model with INT8 attention 2.00 times as fast on two as on
           one data parallel and 2.08 with FSDP; the first loss of tensor parallel within 5.9e-5 of
           one device's, of context parallel the same; INT8 attention over 65,536 tokens 134.6 ms
           on one, 69.8 on two with INT8 on the wire and 69.3 without; losses of a run that changes
           its devices within 1e-4; a picture by HybridStitch 4.50 s on one and 3.85 with a model on
           each, with models that loop over their blocks. With --cases hybrid --stitching.no-scan on
           two H100: 4.11 and 3.48, results/scaling_without_scan.json.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxgen.checkpoints import parse_json_object, write_json
from train.scaling_cases import CASES, Record, Scaling

TITLES: Mapping[str, str] = {
    "weak": "as many rows a device",
    "losses": "the same losses",
    "context": "one long sequence",
    "resume": "a run that changes its devices",
    "hybrid": "two diffusion models",
}
"""Cases in words."""


def measure(scaling: Scaling, known: Collection[str] = ()) -> Iterator[tuple[str, list[Record]]]:
    """Yield each case and its records, as it is done; those in `known` are left out."""
    for case in scaling.cases:
        if case in known:
            continue
        started = time.monotonic()
        records = CASES[case](scaling)
        print(f"{case}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        yield case, records


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """Keep programs for the time being, unless JAX keeps them anyway: runs share some of them."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        compilation_cache.reset_cache()  # or what was found out without a folder stays so
        jax.config.update("jax_compilation_cache_dir", folder)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


def table(found: Mapping[str, list[Record]]) -> str:
    """Return a Markdown table."""
    lines = ["| case | way | devices | result |", "| --- | --- | --- | --- |"]
    for case, records in found.items():
        for record in records:
            cells = TITLES[case], record["way"], str(record["devices"]), _result(case, record)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _result(case: str, record: Record) -> str:
    match case:
        case "weak":
            speed = f"{record['tokens_per_second']:,.0f} tokens/s"
            return f"{speed}, {record['of_ideal']:.1%} of devices x one"
        case "context":
            return f"{record['ms']:.1f} ms, relative difference {record['error']:.1e}"
        case "hybrid":
            return f"{record['seconds_a_picture']:.2f} s a picture"
        case "losses":
            first = f"first loss differs by {record['difference']:.1e}"
            norm = f"its gradient's norm by {record['gradient_difference']:.1e} of it"
            return f"{first}, {norm}, five updates later {record['later']:.1e}"
        case _:
            return f"largest difference of a loss {record['difference']:.1e}"


def plot(found: Mapping[str, list[Record]], path: Path) -> None:
    """Draw the cases that are about time, each as bars."""
    import matplotlib.figure

    values = {"weak": "tokens_per_second", "context": "ms", "hybrid": "seconds_a_picture"}
    labels = {"weak": "tokens a second", "context": "ms", "hybrid": "seconds a picture"}
    timed = [case for case in values if case in found]
    if not timed:
        return
    figure = matplotlib.figure.Figure(figsize=(4 * len(timed), 3.2), layout="constrained")
    for panel, case in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed, strict=True):
        names = [record["way"].replace(" ", "\n", 1) for record in found[case]]
        panel.bar(names, [record[values[case]] for record in found[case]])
        panel.set(title=TITLES[case], ylabel=labels[case])
        panel.tick_params("x", labelsize="small")
    figure.savefig(path, dpi=120)


def _about(scaling: Scaling) -> dict[str, Any]:
    """What decides the records of a case, whatever cases are asked for."""
    settings = json.loads(json.dumps(dataclasses.asdict(scaling), default=str))
    del settings["cases"], settings["output"]
    return {
        "settings": settings,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def measured(scaling: Scaling) -> dict[str, list[Record]]:
    """Return the cases that are in the output already.

    Raises:
        ValueError: The file is no record, or one with other settings of these cases, of other
            devices or another jax.
        OSError: It cannot be read.
    """
    if scaling.output is None or not scaling.output.exists():
        return {}
    record = parse_json_object(scaling.output.read_bytes(), str(scaling.output))
    cases = record.get("cases")
    if not isinstance(cases, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{scaling.output} is no record of train.scaling; choose another --output")
    wanted = _about(scaling)
    wanted |= wanted.pop("settings")
    if "hybrid" not in cases:
        del wanted["stitching"]
    there = record | record["settings"]
    other = [f"{name} = {there.get(name)}" for name in wanted if there.get(name) != wanted[name]]
    if other:
        raise ValueError(
            f"{scaling.output} was measured with {', '.join(other)}; choose another --output"
        )
    return cases


def save(scaling: Scaling, found: Mapping[str, list[Record]]) -> None:
    """Write settings and records to the output, if there is one, and the plot beside it."""
    if scaling.output is None:
        return
    result = _about(scaling) | {"cases": found}
    write_json(scaling.output, result)
    plot(found, scaling.output.with_suffix(".png"))


def main() -> None:
    """Take the options, carry out the cases, print the table."""
    import tyro

    scaling = tyro.cli(Scaling, prog="python -m train.scaling")
    try:
        found = measured(scaling)
        save(scaling, found)  # or it would turn out after minutes that it cannot be written
    except (OSError, ValueError) as error:
        sys.exit(f"train.scaling: {error}")
    with compiling_once():
        for case, records in measure(scaling, found):
            found[case] = records
            save(scaling, found)
    print(table(found))


if __name__ == "__main__":
    main()
