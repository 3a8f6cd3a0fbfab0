"""Meshes of 8 fake devices train as one device does, and gather nothing but parameters."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxgen.layers import MESH_AXES, divide, partition_spec
from tests.train import commands
from tests.train.mesh_losses import CONTEXT, MESHES, ROWS
from train.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Losses of all meshes, and the compiled steps, in the order of the runs."""
    folder = tmp_path_factory.mktemp("meshes")
    commands.write_text(folder / "text")
    flags = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_module_re=jit_step"
    environment = commands.environment(folder) | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from there is not dumped
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    command = [sys.executable, "-m", "tests.train.mesh_losses", str(folder)]
    done = subprocess.run(
        command, cwd=commands.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
@pytest.mark.parametrize("attention", ["exact", "int8"])
def test_losses_are_those_of_one_device(folder, attention, mesh):
    losses = json.loads((folder / "losses.json").read_text())
    one = losses[f"{attention} one"]
    assert one[-1] < one[0] - 0.2
    # Sums in another order move a few INT8 codes by one, and Adam's first steps have the same size
    # for any gradient; so the difference grows with the learning rate.
    limit = {"exact": 2e-5, "int8": 1e-4}[attention]
    np.testing.assert_allclose(losses[f"{attention} {mesh}"], one, rtol=limit)
    np.testing.assert_allclose(losses[f"{attention} {mesh}"][0], one[0], rtol=1e-6)


def test_int8_attention_was_used(folder):
    losses = json.loads((folder / "losses.json").read_text())
    assert losses["int8 one"] != losses["exact one"]


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
@pytest.mark.parametrize("attention", ["exact", "int8"])
def test_no_step_gathers_its_batch(folder, attention, mesh):
    """Only parameters are gathered, and over `context` the numbers of documents (int32).

    With attention split by heads, what is exchanged of tokens goes by all-to-all.
    """
    runs = [f"{kind} {name}" for kind in ("exact", "int8") for name in MESHES]
    dumps = sorted((folder / "dump").glob("*jit_step.cpu_after_optimizations.txt"))
    assert len(dumps) == len(runs)
    program = dumps[runs.index(f"{attention} {mesh}")].read_text()
    gathered = re.findall(r"= (\w+)\[([0-9,]*)\]\S* all-gather\(", program)
    shapes = {tuple(map(int, shape.split(","))) for kind, shape in gathered if kind == "f32"}
    tensor, context = (MESHES[mesh].get(axis, 1) for axis in ("tensor", "context_parallel"))
    parameters = {(384, 64), (64, 64), (64, 32), (64, 128), (128, 64)}
    parts = {(rows // tensor, columns) for rows, columns in parameters}
    parts |= {(rows, columns // tensor) for rows, columns in parameters}
    assert shapes <= parts
    others = {(kind, shape) for kind, shape in gathered if kind != "f32"}
    assert others <= (
        {("s32", f"{ROWS * context * tensor // 8},{CONTEXT}")} if context > 1 else set()
    )
    assert bool(re.search(r" all-to-all\(", program)) == (context > 1)
    assert bool(shapes) == ("fsdp" in MESHES[mesh])


def test_one_table_says_what_divides_an_axis():
    mesh = make_mesh(2, 2)
    assert partition_spec("batch", None, "heads", mesh=mesh)[0] == ("data", "fsdp")
    assert set().union(*MESH_AXES.values()) == set(mesh.axis_names)


def test_without_a_mesh_nothing_is_divided():
    x = np.ones((3, 5))
    assert divide(x, "batch", "tokens") is x
