"""Replacing the attention of a tiny video model, in two stages."""

import dataclasses
import json
import shlex
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from jax.experimental.compilation_cache import compilation_cache

from jaxgen.layers import SLA1Attention, SparseLinearAttention, exact_attention
from jaxgen.sampling import LogitNormal
from tests.train.video_fixtures import CLIPS, FRAMES, SIZE, TOKENIZER
from train import sla2, text_to_video_parts
from train.clips import ClipBatches
from train.configs import sla2_blocks, sla2_experiment
from train.configs.sla2_blocks import Blocks
from train.configs.sla2_experiment import Experiment, table
from train.run import Finished
from train.run_folder import ConfigChangedError
from train.sla2_config import METHODS, Config
from train.sla2_parts import (
    attention_factory,
    make_distillation_loss,
    make_router_optimizer,
    replace_attention,
    with_teacher,
)
from train.state import take_apart
from train.text_to_video_config import MODELS
from train.text_to_video_config import Config as VideoConfig
from train.text_to_video_parts import load_export, make_loss, make_models, save_export

SHAPE = (FRAMES, SIZE, SIZE)
ATTEND = "transformer.blocks.0.self_attention.attend."
TINY = dataclasses.replace(MODELS["tiny"], num_layers=1)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(tmp_path_factory):
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # of tests before, which had none
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_to_video_parts, "MODELS", {"tiny": TINY})
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A model that was never trained, but whose last layer is not zero."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = VideoConfig(model="tiny", precision="float32", frames=FRAMES, size=SIZE)
    models = make_models(config, TOKENIZER)
    for block in models.transformer.blocks:  # scores wide enough to choose among
        block.self_attention.query_norm.scale[...] *= 3.0
    kernel = models.transformer.final_projection.kernel
    random = np.random.default_rng(0)
    kernel[...] = 0.2 * random.normal(size=kernel.shape).astype(np.float32)
    card = {
        "name": "tiny", "steps": 0, "validation": None, "attribution": "drawn by nobody",
        "config": {"frames": FRAMES, "size": SIZE, "figures": None},
    }  # fmt: skip
    save_export(folder, models, TOKENIZER, card, "float32")
    return folder


def config(pretrained, folder, **changes):
    settings = {
        "pretrained": pretrained, "output": folder, "kept_fraction": 0.25, "block_q": 16,
        "block_k": 8, "precision": "float32", "router_steps": 6, "router_batch_size": 4,
        "router_learning_rate": 0.1, "steps": 4, "batch_size": 4, "learning_rate": 3e-3,
        "warmup_steps": 1, "workers": 0, "devices": 1, "log_every": 1, "validation_clips": 4,
        "validation_levels": 2, "samples": False, "export_dtype": "float32", "save_every": 1000,
    }  # fmt: skip
    return Config(**(settings | changes))


def run(settings, **options):
    return sla2.train(settings, clips=CLIPS, show_progress=False, **options)


@pytest.fixture(scope="module")
def straight(pretrained, tmp_path_factory):
    settings = config(pretrained, tmp_path_factory.mktemp("straight"))
    return settings, run(settings)


def replaced(settings):
    teacher, _, _ = load_export(settings.pretrained, precision="float32")
    return replace_attention(settings, teacher, SHAPE)


def arrays_of(settings):
    """The arrays of the export."""
    model = attention_factory(settings, TINY, 64)
    folder = settings.output / "export"
    return take_apart(load_export(folder, precision="float32", attend=model)[0])[1]


def test_both_stages_and_the_report(straight):
    settings, report = straight
    assert json.loads((settings.output / "report.json").read_text()) == report
    errors = report["attention_error"]
    assert errors.keys() == {"new", "least_squares", "stage1", "recalibrated"}
    assert errors["least_squares"] < errors["new"]
    assert errors["recalibrated"] < errors["stage1"]
    assert report["stage1"]["final_loss"] < report["stage1"]["first_loss"]
    assert report["finished"]["validation"] < report["at_start"]["validation"]
    assert report["stage2"]["steps"] == 4
    card = json.loads((settings.output / "export" / "card.json").read_text())
    new = {name: card.pop(name) for name in ("name", "attribution", "command")}
    assert new["name"] == "tiny-sla2"
    assert new["attribution"] == "drawn by nobody"
    assert "--kept-fraction 0.25" in new["command"]
    assert card == report


def test_routers_learn_in_the_first_stage_only_and_ratios_in_both(straight):
    settings, _ = straight
    after = arrays_of(settings)
    before = replaced(settings).arrays
    for name in ("query_router", "key_router"):
        assert np.abs(after[ATTEND + name] - before[ATTEND + name]).max() > 1e-3
    # What the second stage gets is what the first exports; it freezes the routers.
    again = {}

    def capture(stage, plan, stream, **options):
        again[stage.output.name] = plan
        arrays = plan.make()
        return Finished(stage.output, stage.steps, 0, "finished", 0.0, 1, [], arrays, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sla2, "carry_out", capture)
        run(dataclasses.replace(settings, output=settings.output / "captured"))
    routers = {ATTEND + "query_router", ATTEND + "key_router"}
    mixing = {ATTEND + "mixing_logits"}
    assert again["stage1"].trained == routers | mixing
    assert again["stage2"].trained == again["stage2"].skeleton.trained - routers
    assert np.abs(after[mixing.copy().pop()] - before[mixing.copy().pop()]).max() > 1e-3


def test_a_basis_learns_in_the_first_stage_as_fast_as_the_ratios(pretrained, tmp_path):
    settings = config(pretrained, tmp_path, learn_basis=True)
    found = replaced(settings)
    assert found.bases == {ATTEND + "head_basis"}
    assert found.bases < found.routers  # so the second stage freezes it
    optimizer = make_router_optimizer(
        settings, found.routers - found.bases, lambda count: jnp.float32(0.1)
    )
    params = {name: found.arrays[name] for name in found.routers | set(found.mixing)}
    gradients = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # as a step does
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    size = {name: float(jnp.abs(x).max()) for name, x in updates.items()}
    assert size[ATTEND + "head_basis"] == pytest.approx(size[ATTEND + "mixing_logits"])
    assert size[ATTEND + "query_router"] == pytest.approx(0.1 * size[ATTEND + "mixing_logits"])


def test_stopping_in_the_second_stage_and_resuming_gives_the_same(straight, tmp_path):
    settings = dataclasses.replace(straight[0], output=tmp_path)

    def interrupt(row):
        if row["step"] == 1 and (tmp_path / "stage2").exists():
            signal.raise_signal(signal.SIGTERM)

    assert run(settings, on_row=interrupt) == "SIGTERM"
    assert not (tmp_path / "report.json").exists()
    resumed = run(settings)
    for name in ("attention_error", "at_start", "finished"):
        assert resumed[name] == straight[1][name]
    ours = arrays_of(settings)
    for name, array in arrays_of(straight[0]).items():
        np.testing.assert_array_equal(ours[name], array)


def test_a_time_limit_stops_between_steps(pretrained, tmp_path):
    settings = config(pretrained, tmp_path, time_limit=0.0)
    assert run(settings) == "time limit"
    assert (tmp_path / "stage1" / "checkpoints" / "1").exists()
    assert not (tmp_path / "stage2").exists()


def test_a_changed_experiment_and_other_settings_are_refused(straight):
    settings, _ = straight
    with pytest.raises(ConfigChangedError, match=r"learning_rate: 0\.1 before, 0\.2 now"):
        run(dataclasses.replace(settings, router_learning_rate=0.2))
    with pytest.raises(ValueError, match=r"kept_fraction is 0\.25 there and 0\.5 here"):
        arrays_of(dataclasses.replace(settings, kept_fraction=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_is_and_trains(pretrained, tmp_path, monkeypatch, method):
    settings = config(pretrained, tmp_path, method=method)
    plans = {}

    def capture(stage, plan, stream, **options):
        plans[stage.output.name] = plan
        arrays = plan.make()
        return Finished(stage.output, stage.steps, 0, "finished", 0.0, 1, [], arrays, None)

    constant = {"validation": 1.0, "held_out": 1.0}
    monkeypatch.setattr(sla2, "carry_out", capture)
    monkeypatch.setattr(sla2, "Validation", lambda *_, **__: lambda *_: constant)
    monkeypatch.setattr(sla2, "attention_errors", lambda *_: [0.5])
    monkeypatch.setattr(sla2, "calibrated", lambda config, replaced, arrays, batch: arrays)
    report = run(settings)
    assert (report["method"], report["finished"]) == (method, constant)
    trained = {
        stage: {name.removeprefix(ATTEND) for name in plan.trained if ATTEND in name}
        for stage, plan in plans.items()
    }
    expected = {
        "full": {"stage2": set()},
        "sparse": {"stage2": set()},
        "sla1": {"stage2": {"proj_l.weight", "proj_l.bias"}},
        "sla1-fitted": {stage: {"proj_l.weight", "proj_l.bias"} for stage in ("stage1", "stage2")},
        "sla2-untrained-router": {"stage1": {"mixing_logits"}, "stage2": {"mixing_logits"}},
        "sla2-fixed-alpha": {"stage1": {"query_router", "key_router"}, "stage2": set()},
    }
    both = {"stage1": {"query_router", "key_router", "mixing_logits"}, "stage2": {"mixing_logits"}}
    assert trained == expected.get(method, both)
    assert len(plans["stage2"].trained) > 20  # everything else
    layer = attention_factory(settings, TINY, 64)(0)
    kinds = {"full": type(exact_attention)} | dict.fromkeys(("sla1", "sla1-fitted"), SLA1Attention)
    assert type(layer) is kinds.get(method, SparseLinearAttention)
    if isinstance(layer, SparseLinearAttention):
        alpha = {"sparse": 1.0, "sla2-fixed-alpha": 0.5}.get(method, 0.8808)
        assert float(jax.nn.sigmoid(layer.mixing_logits[0, 0])) == pytest.approx(alpha, abs=1e-4)
        assert layer.quantize == (method != "sla2-without-qat")
        assert layer.query_router.ndim == 2
        own = attention_factory(dataclasses.replace(settings, per_head_routers=True), TINY, 64)(0)
        assert own.query_router.shape[0] == TINY.num_heads


def test_tokens_may_be_put_in_another_order(pretrained, tmp_path):
    clip = next(ClipBatches(CLIPS["train"], TOKENIZER, batch_size=2, seed=0))
    errors = {}
    for method in ("full", "sparse"):
        for cube in (None, (2, 2, 2)):
            settings = config(pretrained, tmp_path, method=method, token_cube=cube)
            student = replaced(settings)
            made = student.evaluation.join(student.arrays).transformer.config.token_cube
            assert made == (cube or (1, 1, 1))
            loss = make_loss(student.stage2, LogitNormal())
            errors[method, cube] = float(loss(student.arrays, {}, clip, jax.random.key(0)))
    assert errors["full", None] == pytest.approx(errors["full", (2, 2, 2)], rel=1e-5)
    assert errors["sparse", None] != pytest.approx(errors["sparse", (2, 2, 2)], rel=1e-3)


def test_one_compiled_block_gives_the_same_in_the_second_stage(pretrained, tmp_path):
    clip = next(ClipBatches(CLIPS["train"], TOKENIZER, batch_size=2, seed=0))
    found = []
    for scan in (False, True):
        student = replaced(config(pretrained, tmp_path, scan_stage2=scan))
        assert student.stage2.join(student.arrays).transformer.config.scan == scan
        params = {name: student.arrays[name] for name in student.stage2.trained}
        rest = {name: array for name, array in student.arrays.items() if name not in params}
        loss = jax.jit(jax.value_and_grad(make_loss(student.stage2, LogitNormal())))
        found.append(loss(params, rest, clip, jax.random.key(0)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *found)
    assert np.abs(found[0][1][ATTEND.replace("attend", "value") + "kernel"]).max() > 0


def test_distillation_starts_at_zero_for_the_teacher_itself(pretrained, tmp_path):
    settings = config(pretrained, tmp_path, method="full")
    teacher, weights = take_apart(load_export(pretrained, precision="float32")[0])
    student = replaced(settings)
    loss = make_distillation_loss(student.stage2, teacher, LogitNormal())
    batch = next(ClipBatches(CLIPS["train"], TOKENIZER, batch_size=2, seed=0))
    arrays = with_teacher(student.arrays, weights)
    compiled = jax.jit(loss)
    assert compiled(arrays, {}, batch, jax.random.key(0)) < 1e-10
    name = "transformer.blocks.0.self_attention.value.kernel"
    other = compiled(arrays | {name: 1.5 * arrays[name]}, {}, batch, jax.random.key(0))
    assert other > 1e-6


def test_the_experiment_skips_what_is_done_and_prints_a_table(pretrained, tmp_path, monkeypatch):
    done = []

    def train(settings, **options):
        done.append((settings.method, settings.kept_fraction, settings.seed))
        if len(done) == 5:
            return "time limit"
        losses = {"validation": 0.5 + settings.seed, "held_out": 0.75}
        report = {
            "method": settings.method, "kept_fraction": settings.kept_fraction,
            "attention_error": {} if settings.method == "full" else {"new": 0.5, "stage1": 0.25},
            "at_start": losses, "finished": losses, "seed": settings.seed,
        }  # fmt: skip
        if settings.method == "sla2":
            worse = 1.02 + 0.02 * settings.seed
            report["finished"] = {name: worse * loss for name, loss in losses.items()}
        settings.output.mkdir(parents=True)
        (settings.output / "report.json").write_text(json.dumps(report))
        return report

    monkeypatch.setattr(sla2_experiment.sla2, "train", train)
    experiment = Experiment(
        config(pretrained, Path("unused")), tmp_path, ("sla2", "full"), (0.05, 0.1), (0, 1)
    )
    first = sla2_experiment.carry_out(experiment)
    assert done == [("sla2", 0.05, 0), ("sla2", 0.1, 0), ("full", 1.0, 0), ("sla2", 0.05, 1),
                    ("sla2", 0.1, 1)]  # fmt: skip
    assert len(first) == 4
    reports = sla2_experiment.carry_out(experiment)
    assert len(done) == 7
    assert len(reports) == 6
    assert table(reports).splitlines()[2:] == [
        "| full | 100% | 2 |  | 1.00000 ± 0.70711 | 1.00000 ± 0.70711 |  | 0.75000 ± 0.00000 |  |",
        *(
            f"| sla2 | {kept} | 2 | 0.25000 ± 0.00000 | 1.00000 ± 0.70711 | 1.03500 ± 0.74246 "
            "| +3.00 ± 1.41 % | 0.77250 ± 0.01061 | +3.00 ± 1.41 % |"
            for kept in ("5.0%", "10%")
        ),
    ]
    assert (tmp_path / "table.md").read_text() == table(reports)
    limited = dataclasses.replace(experiment, seeds=(2,), time_limit=0.0)
    assert len(sla2_experiment.carry_out(limited)) == 6
    assert len(done) == 7


def test_the_documented_table_is_that_of_the_records():
    root = Path(__file__).parents[2]
    reports = json.loads((root / "train/configs/results/sla2_experiment.json").read_text())
    assert table(reports) in (root / "docs" / "sparse_linear_attention.md").read_text()


def test_sizes_of_blocks_are_compared(pretrained, tmp_path):
    blocks = Blocks(
        config(pretrained, tmp_path), ("16x8:1,1,1", "8x4:2,2,2"), kept_fractions=(0.25, 0.9)
    )
    records = sla2_blocks.measure(blocks, clips=CLIPS)
    sizes = [(record["block_q"], record["block_k"], record["kept_fraction"]) for record in records]
    assert sizes[1:] == [(16, 8, 0.25), (16, 8, 0.9), (8, 4, 0.25), (8, 4, 0.9)]
    cubes = [record["token_cube"] for record in records[1:]]
    assert cubes == [(1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2)]
    assert records[0]["error"] == 0
    assert 0 < records[2]["error"] < records[1]["error"] < 1
    assert 0 < records[4]["error"] < records[3]["error"] < 1
    changes = [abs(record["loss"] - records[0]["loss"]) for record in records]
    assert 0 < changes[2] < changes[1]
    shown = [
        {"block_q": 32, "block_k": 16, "token_cube": (4, 2, 2), "kept_fraction": 0.05,
         "error": 0.125, "loss": loss}
        for loss in (0.5, 0.6)
    ]  # fmt: skip
    assert sla2_blocks.table(shown).splitlines()[2:] == [
        "| full attention |  |  |  | 0.5000 |  |",
        "| 32 x 16 | 4 x 2 x 2 | 5% | 0.125 | 0.6000 | +20 % |",
    ]
    for wrong in ("32", "32x16", "32x16:2,2", "ax16:1,1,1"):
        with pytest.raises(ValueError, match=f'like "32x16:4,2,2", got {wrong!r}'):
            Blocks(config(pretrained, tmp_path), (wrong,))


def test_command_lines(pretrained, monkeypatch, capsys):
    original = config(pretrained, Path("out"), method="sla1", complement=False, time_limit=3.5)
    words = shlex.split(original.command())
    assert words[:3] == ["python", "-m", "train.sla2"]
    assert tyro.cli(Config, args=words[3:]) == original
    flags = [
        "--each.pretrained",
        str(pretrained),
        "--each.steps",
        "70",
        "--methods",
        "sla1",
        "full",
    ]
    experiment = tyro.cli(Experiment, args=flags)
    assert (experiment.each.steps, experiment.methods) == (70, ("sla1", "full"))

    monkeypatch.setattr("sys.argv", words[2:])
    monkeypatch.setattr(sla2, "train", lambda config: "SIGINT")
    with pytest.raises(SystemExit) as caught:
        sla2.main()
    assert caught.value.code == 130
    names = ("method", "kept_fraction", "seed", "attention_error", "at_start", "finished")
    monkeypatch.setattr(sla2, "train", lambda config: dict.fromkeys(names, 1) | {"more": 2})
    sla2.main()
    assert json.loads(capsys.readouterr().out) == dict.fromkeys(names, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sla3"}, "method must be one of full, sparse, sla1, .* got 'sla3'"),
        ({"kept_fraction": 0.0}, "kept_fraction must be more than 0 and at most 1, got 0.0"),
        ({"objective": "gan"}, r"objective must be one of \('diffusion', 'distillation'\)"),
        ({"router_steps": -1}, "router_steps must be at least 0, got router_steps=-1"),
    ],
)
def test_refuses_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(pretrained=Path("unused"), **changes)
    with pytest.raises(ValueError, match=r"methods must be among .*, got \['sla3'\]"):
        Experiment(Config(pretrained=Path("unused")), methods=("sla3",))
