"""Pictures from the command line."""

from pathlib import Path

import pytest
from PIL import Image

from jaxgen.pipelines import generate
from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, TStitch

ROOT = Path(__file__).parents[3]
PIPELINE = ROOT / "tests/goldens/sd3_pipeline"


def policy(*arguments):
    return generate.policy_of(generate.parser().parse_args(["model", "a cat", *arguments]))


def test_samplers_by_name():
    assert policy() == Alone()
    assert policy("--small", "other") == HybridStitch()
    small = ("--small", "other", "--sampler")
    assert policy(*small, "small") == Alone("small")
    assert policy(*small, "large") == Alone()
    assert policy(*small, "t-stitch", "--end", "0.4") == TStitch(0.4)
    assert policy(*small, "srdiffusion", "--end", "0.5") == SRDiffusion(0.5)
    chosen = policy(*small, "hybrid", "--start", "0.1", "--end", "0.9", "--share", "0.5")
    assert chosen == HybridStitch(0.1, 0.9, 0.5)


@pytest.mark.parametrize("small", [False, True])
def test_draws_with_stable_diffusion(tmp_path, small, capsys):
    output = tmp_path / "out.png"
    arguments = [str(PIPELINE), "a red cat", "a dog", "--height", "32", "--width", "32",
                 "--steps", "4", "--dtype", "float32", "--output", str(output)]  # fmt: skip
    if small:
        arguments += ["--small", str(PIPELINE), "--start", "0.5", "--end", "0.75", "--scan"]
    generate.main(arguments)
    with Image.open(output) as picture:
        assert picture.width > 200
    assert "2 pictures in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a cat"], "there is no folder|nowhere"),
        ([str(PIPELINE), "a cat", "--sampler", "hybrid"], "--sampler hybrid needs --small"),
        ([str(PIPELINE), "a cat", "--height", "33", "--dtype", "float32"], "multiple of 16"),
        ([str(PIPELINE), "a cat", "--sampler", "best"], "invalid choice: 'best'"),
    ],
)
def test_errors_say_what_to_do_and_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(arguments)
    assert ended.value.code == 2
    assert any(part in capsys.readouterr().err for part in message.split("|"))


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(["--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out
