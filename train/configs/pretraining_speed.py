"""How fast is the 325M model pretrained with INT8 attention, and how fast with exact attention?

Command    python -m train.configs.pretraining_speed --help
           python -m train.configs.pretraining_speed --json pretraining_speed.json
           python -m train.configs.pretraining_speed --remat none --no-across-documents
Hardware   one H100 and one H200, jax 0.11.2
Outcome    results/pretraining_speed.json; tokens/s and MFU at a context of 4,096, on the H200:
           keep_products                       exact 190,640 47.2 %, INT8 188,019 46.5 %, 0.986
           --remat none                        exact 194,329 48.1 %, INT8 188,682 46.7 %, 0.971
           --remat none --no-across-documents  exact 164,485 40.7 %, INT8 186,508 46.2 %, 1.134
           and on the H100:
           --remat none --no-across-documents  exact 155,953 38.6 %, INT8 175,559 43.5 %, 1.126

The text is bytes, in a vocabulary as large as the preset's, 50,304, so that the head costs what it
costs. Tokens attend to the documents before theirs, as in SageBwd's experiments; with
--no-across-documents they do not, which is the default of `train.language_model`.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax

from jaxgen.checkpoints import write_json
from jaxgen.models.language_model import Remat
from train.language_model import train
from train.language_model_config import Config, preset


@dataclasses.dataclass(frozen=True)
class Speed:
    """Train for some steps with each kind of attention and compare their speed."""

    model: str = "325m"
    """Preset."""
    context: int = 4096
    """Tokens of a row."""
    batch_size: int = 16
    """Rows of an update."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other."""
    remat: Remat = "keep_products"
    """What the backward pass computes again."""
    scan: bool = False
    """Loop over the blocks: compiles sooner, but copies what the backward pass needs."""
    chunk: int = 8192
    """Positions whose logits are computed at a time."""
    across_documents: bool = True
    """Attend to the documents before one's own, as in SageBwd's experiments."""
    steps: int = 30
    """Steps, of which the last ten are timed."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation."""
    data: Path | None = None
    """Text; None: Python source found on this machine."""
    json: Path | None = None
    """File for the results."""

    def config(self, attention: str, output: Path) -> Config:
        """Return the options of one training."""
        return Config(
            output=output,
            model=self.model,
            attention="int8" if attention == "int8" else "exact",
            remat=self.remat,
            scan=self.scan,
            chunk=self.chunk,
            vocabulary_multiple=preset(self.model).vocabulary_size,
            context=self.context,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            across_documents=self.across_documents,
            precision=self.precision,
            data=self.data,
            steps=self.steps,
            warmup_steps=self.steps // 2,
            log_every=10,
            validate_every=0,
        )


def measure(speed: Speed, *, show_progress: bool = True) -> list[dict[str, Any]]:
    """Return for each kind of attention tokens a second and MFU over the last ten steps."""
    found = []
    for attention in ("exact", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            config = speed.config(attention, Path(folder))
            row = train(config, show_progress=show_progress).rows[-1]
        names = ("tokens_per_second", "mfu", "loss", "memory_gib")
        found.append(
            {"attention": attention, "remat": config.remat, "context": speed.context}
            | {"across_documents": speed.across_documents}
            | {name: row.get(name) for name in names}
            | {"model": speed.model, "batch_size": speed.batch_size}
            | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        )
    return found


def main() -> None:
    """Take the options of the command line, measure, print, and write the JSON file."""
    import tyro

    speed = tyro.cli(Speed, prog="python -m train.configs.pretraining_speed")
    found = measure(speed)
    if speed.json:
        write_json(speed.json, found)
    for result in found:
        print(
            f"{result['attention']:>6} {result['tokens_per_second']:12,.0f} tokens/s "
            f"MFU {result['mfu']:.1%}"
        )
    exact, integer = (result["tokens_per_second"] for result in found)
    print(f"INT8 is {integer / exact:.3f} times as fast as exact attention")


if __name__ == "__main__":
    main()
