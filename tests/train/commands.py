"""The real command `python -m train.language_model` on a little text, as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = (sys.executable, "-m", "train.language_model")


def write_text(folder: Path) -> Path:
    """Some files that are easy to predict, each with a letter of its own."""
    folder.mkdir()
    for number in range(40):
        letter = "abcdefgh"[number % 8]
        (folder / f"{number:02d}.txt").write_text(f"{letter}{letter.upper()} " * (10 + number))
    return folder


def arguments(output: Path, text: Path, **changes: object) -> list[str]:
    """Command line of a run that takes seconds."""
    options = {
        "output": output, "data": text, "model": "tiny", "precision": "float32", "context": 32,
        "batch_size": 4, "steps": 40, "warmup_steps": 2, "learning_rate": 1e-2, "devices": 1,
        "held_out": 0.2, "log_every": 1, "save_every": 4, "validate_every": 0,
    } | changes  # fmt: skip
    return [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def environment(cache: Path) -> dict[str, str]:
    """Processes on the CPU that share a cache of compiled programs and of encoded text."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAXGEN_CACHE": str(cache / "text"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }


def start(command, words, cache: Path) -> subprocess.Popen[str]:
    """Start a command of a run; what it prints goes to a pipe."""
    return subprocess.Popen(
        [*command, *words],
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def run(command, words, cache: Path, timeout: float = 240) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it printed to stderr."""
    process = start(command, words, cache)
    try:
        printed = process.communicate(timeout=timeout)[1]
    finally:
        process.kill()
    return process.returncode, printed


def saved_steps(output: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
