import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import loop
from train.checkpoint import Checkpoints, abstract
from train.metrics import Meter
from train.sharding import make_mesh, state_shardings
from train.state import create_state, make_train_step


class Stream:
    """Batch number n is the number n, or NaN where wanted; the position is the state."""

    def __init__(self, bad=()):
        self.position, self.bad = 0, bad

    def __next__(self):
        self.position += 1
        return {"x": np.float32(np.nan if self.position in self.bad else self.position)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)

    def close(self):
        pass


OPTIMIZER = optax.adam(0.1)
MESH = make_mesh(1, devices=jax.devices()[:1])


def loss(params, frozen, batch, key):
    return jnp.sum(jnp.square(params["w"] - batch["x"] * jax.random.normal(key, (3,))))


STEP = jax.jit(
    make_train_step(loss, OPTIMIZER, learning_rate=lambda n: 0.1, ema_decay=0.9),
    donate_argnums=0,
)


def new_state():
    return create_state({"w": jnp.ones(3)}, {}, OPTIMIZER)


def run(folder, *, steps=10, bad=(), state=None, stream=None, every=2, **options):
    limits = {"save_every": 4, "skips_in_a_row": 3} | options.pop("limits", {})
    rows = Rows()
    with Checkpoints(folder) as checkpoints:
        final, reason = loop.run(
            new_state() if state is None else state,
            STEP,
            Stream(bad) if stream is None else stream,
            jax.device_put,
            limits=loop.Limits(steps=steps, **limits),
            checkpoints=checkpoints,
            meter=Meter(1, every),
            writers=[rows],
            show_progress=False,
            **options,
        )
        return final, reason, rows.rows, checkpoints.steps()


def restore(folder):
    shapes = jax.eval_shape(new_state)
    with Checkpoints(folder) as checkpoints:
        state, extra = checkpoints.restore(abstract(shapes, state_shardings(shapes, MESH)))
    stream = Stream()
    stream.set_state(extra["data"])
    return state, stream, extra


def assert_same(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def test_finishes_with_rows_and_checkpoints(tmp_path):
    state, reason, rows, saved = run(tmp_path, steps=9)
    assert reason == "finished"
    assert int(state.step) == 9
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]
    assert [row["steps"] for row in rows] == [2, 2, 2, 2, 1]
    assert saved == [8, 9]


def test_rows_hold_every_step_once(tmp_path):
    _, _, rows, _ = run(tmp_path / "a", steps=6, every=1)
    _, _, means, _ = run(tmp_path / "b", steps=6, every=3)
    losses = [row["loss"] for row in rows]
    np.testing.assert_allclose([row["loss"] for row in means], np.reshape(losses, (2, 3)).mean(1))


def test_stopping_and_resuming_changes_nothing(tmp_path):
    straight, _, rows, _ = run(tmp_path / "straight", steps=10, every=1)
    _, reason, first, _ = run(tmp_path / "parts", steps=6, every=1, extra=lambda: {"note": 1})
    assert reason == "finished"
    state, stream, extra = restore(tmp_path / "parts")
    assert extra == {"data": {"position": 6}, "note": 1}
    resumed, _, second, _ = run(tmp_path / "parts", steps=10, every=1, state=state, stream=stream)
    assert_same(resumed, straight)
    assert [row["loss"] for row in first + second] == [row["loss"] for row in rows]


def test_resuming_with_other_data_is_noticed(tmp_path):
    straight, *_ = run(tmp_path / "straight", steps=8)
    run(tmp_path / "parts", steps=4)
    state, _, _ = restore(tmp_path / "parts")
    resumed, *_ = run(tmp_path / "parts", steps=8, state=state, stream=Stream())
    assert not np.array_equal(resumed.params["w"], straight.params["w"])


def test_a_finished_run_does_nothing_more(tmp_path):
    run(tmp_path, steps=4)
    state, stream, _ = restore(tmp_path)
    state, reason, rows, saved = run(tmp_path, steps=4, state=state, stream=stream)
    assert (int(state.step), reason, rows, saved) == (4, "finished", [], [4])


def test_bad_batches_are_skipped_and_counted(tmp_path):
    state, reason, rows, _ = run(tmp_path, steps=8, bad=(3, 4, 6))
    assert reason == "finished"
    assert int(state.skipped) == 3
    assert [row["skipped"] for row in rows] == [0, 2, 3, 3]
    assert all(np.isfinite(row["loss"]) for row in rows if row["step"] != 4)
    assert rows[1]["loss"] is None  # steps 3 and 4 had none
    assert np.isfinite(state.params["w"]).all()


def test_the_counter_survives_resuming(tmp_path):
    run(tmp_path, steps=4, bad=(2,))
    state, _, _ = restore(tmp_path)
    assert int(state.skipped) == 1


def test_aborts_after_too_many_bad_batches_in_a_row(tmp_path):
    message = "aborted at step 7: .* in 3 steps in a row; the newest checkpoint is step 4"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, steps=20, bad=(2, 5, 6, 7, 8, 9))
    state, *_ = restore(tmp_path)
    assert int(state.step) == 4


def spiking(folder, bad):
    """Steps whose gradients are the batch: 1, or what `bad` says for a position."""

    class Ones(Stream):
        def __next__(self):
            self.position += 1
            return {"x": np.float32(bad.get(self.position, 1.0))}

    def linear(params, frozen, batch, key):
        return batch["x"] * jnp.sum(params["w"])

    step = make_train_step(
        linear, OPTIMIZER, learning_rate=lambda n: 0.1, ema_decay=0.9, spike_factor=4.0
    )
    with Checkpoints(folder) as checkpoints:
        return loop.run(
            new_state(),
            jax.jit(step),
            Ones(),
            jax.device_put,
            limits=loop.Limits(steps=60, save_every=52, skips_in_a_row=3),
            checkpoints=checkpoints,
            meter=Meter(1, 1),
            show_progress=False,
        )


def test_spiking_steps_are_skipped_and_counted(tmp_path):
    state, reason = spiking(tmp_path, {20: 99.0, 54: 99.0, 55: 99.0, 58: 99.0})
    assert reason == "finished"
    assert int(state.skipped) == 3  # the one at step 20 is too early


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((9.0, 9.0, 9.0), "the gradient norm was spiking"),
        ((np.nan, np.inf, np.nan), "loss or gradients were not finite"),
        (
            (9.0, np.nan, 9.0),
            "loss or gradients were not finite or the gradient norm was spiking",
        ),
    ],
)
def test_aborting_says_what_was_wrong_with_the_updates(tmp_path, values, reason):
    bad = {53: 9.0} | dict(zip((55, 56, 57), values, strict=True))
    message = f"aborted at step 57: {reason} in 3 steps in a row; the newest checkpoint is step 52"
    with pytest.raises(FloatingPointError, match=message):
        spiking(tmp_path, bad)


def test_hooks_run_on_time_and_at_the_end(tmp_path):
    seen = []
    hook = loop.Hook(3, lambda step, state: seen.append((step, int(state.step))))
    never = loop.Hook(0, lambda step, state: pytest.fail("a hook that is switched off"))
    run(tmp_path, steps=7, hooks=[hook, never])
    assert seen == [(3, 3), (6, 6), (7, 7)]


def test_stops_at_the_deadline_and_saves(tmp_path):
    limits = {"deadline": time.monotonic() + 0.3}
    slowly = loop.Hook(1, lambda step, state: time.sleep(0.02))
    state, reason, rows, saved = run(tmp_path, steps=10_000, limits=limits, hooks=[slowly])
    assert reason == "time limit"
    done = int(state.step)
    assert 1 <= done <= 30
    assert saved[-1] == done
    assert rows[-1]["step"] == done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(row):
        if row["step"] == 6:
            signal.raise_signal(number)

    straight, *_ = run(tmp_path / "straight", steps=12)
    state, reason, _, saved = run(tmp_path / "parts", steps=12, on_row=interrupt)
    assert reason == number.name
    done = int(state.step)
    assert 6 < done <= 6 + loop.STEPS_IN_FLIGHT + 1
    assert saved[-1] == done
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    state, stream, _ = restore(tmp_path / "parts")
    resumed, *_ = run(tmp_path / "parts", steps=12, state=state, stream=stream)
    assert_same(resumed, straight)


def test_second_signal_acts_as_before():
    # A shell starts background jobs with SIGINT ignored, and the tests may be one.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        second_signal_raises()
    finally:
        signal.signal(signal.SIGINT, inherited)


def second_signal_raises():
    with loop.watch_signals() as received:
        assert received() is None
        signal.raise_signal(signal.SIGINT)
        assert received() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, steps=2)[1]))
    thread.start()
    thread.join()
    assert results == ["finished"]


def test_reads_metrics_late_to_keep_the_device_busy(tmp_path):
    stream, positions = Stream(), []

    def on_row(row):
        positions.append((row["step"], stream.position))

    run(tmp_path, steps=8, every=1, stream=stream, on_row=on_row, limits={"save_every": 100})
    ahead = loop.STEPS_IN_FLIGHT
    # The first step is waited for, because it compiles; the last ones because training ends.
    assert positions == [(1, 1)] + [(n, min(n + ahead, 8)) for n in range(2, 9)]
