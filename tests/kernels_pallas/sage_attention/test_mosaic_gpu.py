"""The Hopper kernels: in the interpreter on any machine, and on the GPU with `pytest -m gpu`."""

import functools
import random

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import explain, sage_attention
from kernels_pallas.mosaic import interpreted
from kernels_pallas.sage_attention import mosaic_gpu, reference, schedule, segments, vjp
from kernels_pallas.sage_attention.masking import Masking, Structure
from kernels_pallas.sage_attention.problem import Limits, Problem
from kernels_pallas.sage_attention.schedule import Schedule
from tests.conformance.attention import AttentionConformance, draw
from tests.conformance.exact_attention import allowed_pairs, relative_l2


def with_gradients(attend, inputs):
    """Output and gradients, each kernel running alone: callbacks of two at once can starve."""
    out, pullback = jax.vjp(attend, *map(jnp.asarray, inputs[:3]))
    return out, *pullback(jnp.asarray(inputs[3]).astype(out.dtype))


def like_the_kernels(*, smooth_values=False, smooth_keys=True, keys, **options):
    """The reference with the kernels' description of tiles."""

    def attend(query, key, value):
        lengths = {
            name: jnp.asarray(options.get(f"{side}_seq_lengths", [tokens]), jnp.int32)
            for name, side, tokens in (
                ("query_lengths", "query", query.shape[1]),
                ("key_lengths", "key_value", key.shape[1]),
            )
        }
        structure = Structure(options.get("is_causal", False), options.get("local_window_size"))
        settings = reference.Options(
            scale=options.get("scale", query.shape[-1] ** -0.5),
            structure=structure,
            tiling=mosaic_gpu.tiling_for(keys),
            smooth_values=smooth_values,
            smooth_keys=smooth_keys,
            product_dtype=jnp.float16 if query.dtype == jnp.float16 else jnp.bfloat16,
        )
        ids = None
        if "query_segment_ids" in options:
            names = ("query_segment_ids", "key_value_segment_ids")
            ids = tuple(jnp.asarray(options[name], jnp.int32) for name in names)
        masking = Masking(None, **lengths, segments=ids)
        return vjp.attention(reference, settings, query, key, value, None, masking)[0]

    return attend


def compare(inputs, *, bound=3e-3, jit=False, **options):
    """The kernels against the reference with the same tiles, which runs on the CPU.

    Where exponentials differ in the last bit, a code is sometimes rounded the other way.

    Args:
        inputs: query, key, value and cotangent of the output.
        bound: on the relative L2 difference of output and gradients.
        jit: whether to compile one program; interpreted kernels have to run one by one.
        options: of `sage_attention`.
    """
    wrap = jax.jit if jit else lambda function: function
    lengths = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    options = {name: x for name, x in options.items() if name not in lengths}
    ours = functools.partial(sage_attention, implementation="mosaic_gpu", **options)
    actual = wrap(
        lambda inputs, lengths: with_gradients(functools.partial(ours, **lengths), inputs)
    )(inputs, lengths)
    theirs = functools.partial(like_the_kernels, keys=inputs[1].shape[1], **options)
    for side, x in (("query", inputs[0]), ("key_value", inputs[1])):  # constants would be folded
        lengths.setdefault(f"{side}_seq_lengths", np.array([x.shape[1]]))
    with jax.default_device(jax.devices("cpu")[0]):  # compiles in a second
        expected = wrap(lambda inputs, lengths: with_gradients(theirs(**lengths), inputs))(
            inputs, lengths
        )
    for name, one, other in zip("oqkv", actual, expected, strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        # What cancels exactly in one may leave rounding in the other: dQ where one key is seen.
        floor = 1e-6 * np.sqrt(one.size) * max(1.0, np.abs(inputs[3]).max())
        # What nearly cancels is the rounding of products: dK where one key is seen.
        if np.linalg.norm(other) < 0.02 * (size := np.linalg.norm(expected[3])):
            floor += 1e-3 * size
        assert np.linalg.norm(one - other) <= bound * np.linalg.norm(other) + floor, name


def packed(documents, **options):
    """Options for sequences of documents of these lengths."""
    ids = np.stack([np.repeat(np.arange(len(sizes)), sizes) for sizes in documents])
    return {"query_segment_ids": ids, "key_value_segment_ids": ids, **options}


CASES = {
    "plain": ({"queries": 128}, {}),
    "odd lengths": ({"queries": 77, "keys": 201, "heads": 4, "kv_heads": 2, "dim": 40}, {}),
    "keys end in the middle of a tile": ({"queries": 70, "keys": 192}, {}),
    "causal": ({"queries": 200, "dim": 128}, {"is_causal": True}),
    "biased keys, no multiple of 8": ({"queries": 64, "keys": 63, "key_bias": 8.0}, {}),
    "causal, more keys": ({"queries": 70, "keys": 300}, {"is_causal": True}),
    "causal, more queries": ({"queries": 300, "keys": 70}, {"is_causal": True}),
    "window": ({"queries": 300, "heads": 1}, {"local_window_size": (40, 10)}),
    "window behind": (
        {"queries": 330, "keys": 140, "heads": 1},
        {"is_causal": True, "local_window_size": (60, 60)},
    ),
    "lengths": (
        {"batch": 3, "queries": 140, "heads": 1},
        {
            "query_seq_lengths": np.array([140, 30, 0]),
            "key_value_seq_lengths": np.array([3, 140, 70]),
        },
    ),
    "segments": (
        {"batch": 2, "queries": 700, "heads": 2, "kv_heads": 1},
        packed([[150, 1, 249, 300], [640, 60]]),
    ),
    "segments, causal": (
        {"queries": 600, "heads": 1, "dim": 128},
        packed([[130, 270, 200]], is_causal=True),
    ),
    "segments in any order": (
        {"queries": 150, "keys": 333, "heads": 1},
        {
            "query_segment_ids": np.random.default_rng(0).integers(0, 4, (1, 150)),
            "key_value_segment_ids": np.random.default_rng(1).integers(1, 5, (1, 333)),
        },
    ),
    "segments, lengths and a window": (
        {"batch": 2, "queries": 300, "heads": 1},
        packed([[100, 200], [250, 50]], local_window_size=(90, 20))
        | {"query_seq_lengths": np.array([300, 170])},
    ),
    "one token": ({"queries": 1}, {}),
    "smooth values": ({"queries": 130}, {"smooth_values": True}),
    "keys as they are": ({"queries": 130}, {"smooth_keys": False}),
    "keys as they are, causal": ({"queries": 300}, {"smooth_keys": False, "is_causal": True}),
    "scale": ({"queries": 130}, {"scale": 0.3}),
    "negative scale": ({"queries": 130}, {"scale": -0.2, "is_causal": True}),
    "scale of zero": ({"queries": 130}, {"scale": 0.0}),
}


class TestInterpreted:
    @pytest.mark.parametrize("name", CASES)
    def test_agrees_with_the_reference(self, name):
        shapes, options = CASES[name]
        with interpreted(detect_races=False):
            compare(draw(5, **shapes), **options)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_sixteen_bits(self, dtype):
        inputs = [jnp.asarray(x).astype(dtype) for x in draw(7, queries=130, heads=1)]
        with interpreted(detect_races=False):
            out = sage_attention(*inputs[:3], implementation="mosaic_gpu")
            assert out.dtype == dtype
            compare(inputs, bound=8e-3)  # both round to the 8 bits of bfloat16

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
    def test_traced_scale(self, dtype):
        query, key, value, d_out = (jnp.asarray(x).astype(dtype) for x in draw(9, queries=70))

        def loss(scale, query):
            out = sage_attention(query, key, value, scale=scale, implementation="mosaic_gpu")
            return jnp.sum((out * d_out).astype(jnp.float32))

        with interpreted(detect_races=False):
            traced = jax.grad(loss, argnums=(0, 1))(jnp.float32(0.2), query)
            gradient = jax.grad(loss, argnums=1)(0.2, query)
        assert traced[1].dtype == dtype
        assert relative_l2(traced[1], gradient) <= 0.01
        step = jnp.float32(0.02)
        with interpreted(detect_races=False):
            slope = (loss(0.2 + step, query) - loss(0.2 - step, query)) / (2 * step)
        assert abs(traced[0] - slope) <= 0.1 * abs(slope) + 0.05 * np.sqrt(query.size)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_no_races(self, monkeypatch, is_causal):
        """Long enough for all of shared memory to be used again; a race would raise."""
        monkeypatch.setattr(schedule, "processors", lambda: 2)
        inputs = draw(11, queries=800, keys=1300, heads=1, kv_heads=1)
        attend = functools.partial(sage_attention, implementation="mosaic_gpu", is_causal=is_causal)
        with interpreted():
            with_gradients(attend, inputs)

    def test_nan_in_padding_does_not_leak_and_visible_nan_is_not_hidden(self):
        query, key, value, d_out = draw(13, queries=130, heads=1)
        attend = functools.partial(
            sage_attention,
            implementation="mosaic_gpu",
            query_seq_lengths=np.array([100]),
            key_value_seq_lengths=np.array([90]),
        )
        fill = lambda x, length, value: np.where(np.arange(130)[:, None, None] < length, x, value)
        with interpreted(detect_races=False):
            clean = with_gradients(attend, (query, key, value, d_out))
            dirty = with_gradients(
                attend,
                [
                    fill(x, length, np.nan).astype(np.float32)
                    for x, length in ((query, 100), (key, 90), (value, 90), (d_out, 100))
                ],
            )
            jax.tree.map(np.testing.assert_array_equal, clean, dirty)
            key[0, 5, 0, 0] = np.inf
            assert not np.isfinite(attend(query, key, value)[:, :100]).any()

    @pytest.mark.parametrize("sigma", [3.0, 10.0, 30.0])
    def test_scores_of_large_spread(self, sigma):
        """There the scores' own rounding shows: a code above 127 would wrap around."""
        query, key, value, d_out = draw(21, queries=200, heads=1, dim=128)
        inputs = [np.float32(sigma) * query, np.float32(sigma) * key, value, d_out]
        with interpreted(detect_races=False):
            compare(inputs)

    @pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-9, 1e4])
    def test_extreme_magnitudes(self, magnitude):
        inputs = [np.float32(magnitude) * x for x in draw(15, queries=70, heads=1)]
        attend = functools.partial(sage_attention, implementation="mosaic_gpu", is_causal=True)
        with interpreted(detect_races=False):
            results = with_gradients(attend, inputs)
        assert all(np.isfinite(x).all() for x in results)
        if magnitude in (0.0, 1e-9):  # there the scores vanish, but nothing underflows
            expected = with_gradients(like_the_kernels(keys=70, is_causal=True), inputs)
            for actual, wanted in zip(results, expected, strict=True):
                floor = 1e-6 * np.linalg.norm(inputs[2])
                assert np.linalg.norm(actual - wanted) <= 3e-3 * np.linalg.norm(wanted) + floor

    def test_vmap_and_residual(self):
        inputs = draw(17, batch=2, queries=70, heads=1)
        attend = functools.partial(
            sage_attention, implementation="mosaic_gpu", return_residual=True
        )
        with interpreted(detect_races=False):
            out, lse = attend(*inputs[:3])
            mapped = jax.vmap(attend)(*(x[:, None] for x in inputs[:3]))
            np.testing.assert_array_equal(mapped[0][:, 0], out)
            np.testing.assert_array_equal(mapped[1][:, 0], lse)
        expected = sage_attention(*inputs[:3], implementation="xla", return_residual=True)[1]
        np.testing.assert_allclose(lse, expected, atol=0.05)

    def test_checkpoint_that_keeps_the_residuals(self):
        """With the policy the backward pass of a rematerialized layer runs no forward kernel."""
        inputs = draw(19, queries=70, heads=1)
        policy = jax.checkpoint_policies.save_only_these_names(vjp.RESIDUALS)
        attend = functools.partial(sage_attention, implementation="xla")
        loss = lambda query: jnp.sum(attend(query, *inputs[1:3]) ** 2)
        scans = lambda f: str(jax.make_jaxpr(jax.grad(f))(inputs[0])).count("scan[")
        assert scans(jax.checkpoint(loss, policy=policy)) == scans(loss)
        assert scans(jax.checkpoint(loss)) > scans(loss)

    @hypothesis.settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.differing_executors],
    )
    @hypothesis.given(data=st.data())
    def test_fuzz(self, data):
        with interpreted(detect_races=False):
            choose = lambda options: data.draw(st.sampled_from(options))
            inputs, options = draw_case(choose, [1, 63, 64, 65, 129, 257])
            compare(inputs, **options)


def draw_case(choose, lengths, heads=2):
    """Inputs and options of every kind; `choose` picks one of a sequence."""
    queries, keys = choose(lengths), choose(lengths)
    kv_heads, group = choose(range(1, heads + 1)), choose(range(1, heads + 1))
    batch, dim = choose([1, 2]), choose([8, 64, 72, 128])
    options = {"is_causal": choose([False, True])}
    if choose([False, True]):
        options["local_window_size"] = (choose(lengths), choose(lengths))
    for name, most in (("query_seq_lengths", queries), ("key_value_seq_lengths", keys)):
        if choose([False, True]):
            options[name] = np.array([choose(range(most + 1)) for _ in range(batch)])
    if choose([False, False, True]):
        rng = np.random.default_rng(choose(range(100)))
        documents = choose([1, 2, 6])
        ids = [rng.integers(0, documents, (batch, n)) for n in (queries, keys)]
        if choose([False, True, True]):
            ids = [np.sort(x) for x in ids]
        options["query_segment_ids"], options["key_value_segment_ids"] = ids
    inputs = draw(
        choose(range(100)),
        batch=batch,
        queries=queries,
        keys=keys,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=dim,
        key_bias=choose([0.0, 8.0]),
    )
    return inputs, options


class TestSchedule:
    @pytest.mark.parametrize("window", [{}, {"right": 0}, {"left": 9, "right": 0}], ids=str)
    @pytest.mark.parametrize("ragged_keys", [True, False])
    @pytest.mark.parametrize(("processors", "blocks"), [(132, 3), (4, 3), (4, 4), (5, 7), (1, 2)])
    def test_each_block_has_one_worker(self, monkeypatch, processors, blocks, ragged_keys, window):
        monkeypatch.setattr(schedule, "processors", lambda: processors)
        problem = Problem(
            batch=2, queries=500, keys=500, heads=3, kv_heads=1, head_dim=64, dtype=jnp.float32,
            scale=1.0, ragged_keys=ragged_keys, **window,
        )  # fmt: skip
        dealt = Schedule.of(problem, blocks)
        assert dealt.workers == (6 * blocks if ragged_keys else min(processors, 6 * blocks))
        shares = [
            [
                tuple(map(int, dealt.place(jnp.int32(item), jnp.int32(worker))))
                for item in range(int(dealt.rounds(jnp.int32(worker))))
            ]
            for worker in range(dealt.workers)
        ]
        assert sorted(place for share in shares for place in share) == [
            (b, h, block) for b in range(2) for h in range(3) for block in range(blocks)
        ]
        work = [sum(1 + block if dealt.longest_first else 1 for *_, block in x) for x in shares]
        assert max(work) - min(work) <= (blocks if dealt.longest_first else 1)


class TestSpans:
    """The tiles that are visited, and those that need a mask, against the mask itself."""

    @pytest.mark.parametrize("left", [None, 0, 70])
    @pytest.mark.parametrize("right", [None, 0, 30])
    @pytest.mark.parametrize(("queries", "keys"), [(300, 300), (100, 500), (500, 100)])
    def test_spans(self, queries, keys, left, right):
        problem = Problem(
            batch=1, queries=queries, keys=keys, heads=1, kv_heads=1, head_dim=64,
            dtype=jnp.float32, scale=1.0, left=left, right=right, ragged_keys=True,
        )  # fmt: skip
        everything = 10_000
        window = tuple(everything if side is None else side for side in (left, right))
        allowed = allowed_pairs((1, 1, queries, keys), window=window)[0, 0]
        for rows, block in ((128, 256), (128, 64)):
            for row in range(0, queries, rows):
                span = problem.keys_seen(row, rows, queries, keys, block)
                self.check(span, allowed[row : row + rows], block)
            for column in range(0, keys, rows):
                span = problem.queries_seeing(column, rows, queries, keys, block)
                self.check(span, allowed[:, column : column + rows].T, block)

    @pytest.mark.parametrize("in_order", [True, False])
    @pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (70, 30)])
    def test_spans_of_segments(self, left, right, in_order):
        rng, (queries, keys) = np.random.default_rng(3), (700, 500)
        ids = [rng.integers(*bounds, (1, n)) for bounds, n in (((0, 5), queries), ((1, 6), keys))]
        if in_order:
            ids = [np.sort(x) for x in ids]
        lengths = [np.array([600]), np.array([480])]
        ids, lengths = ([jnp.asarray(x, jnp.int32) for x in pair] for pair in (ids, lengths))
        matches = segments.match(ids, lengths)
        description = segments.describe(ids, lengths, matches)
        problem = Problem(
            batch=1, queries=queries, keys=keys, heads=1, kv_heads=1, head_dim=64,
            dtype=jnp.float32, scale=1.0, left=left, right=right, segmented=True,
            ragged_queries=True, ragged_keys=True,
        )  # fmt: skip
        window = tuple(10_000 if side is None else side for side in (left, right))
        allowed = allowed_pairs((1, 1, queries, keys), window=window)[0, 0][:600, :480]
        allowed = allowed & (np.asarray(ids[0])[0, :600, None] == np.asarray(ids[1])[0, None, :480])
        skipped = 0
        for rows, block in ((192, 256), (128, 64), (64, 128)):
            for row in range(0, 600, rows):
                limits = Limits.of(description.keys, 0, row, rows)
                span = problem.keys_seen(row, rows, 600, 480, block, limits)
                self.check(span, allowed[row : row + rows], block)
                skipped += -(-480 // block) - int(span.last - span.first)
            for column in range(0, 480, rows):
                limits = Limits.of(description.queries, 0, column, rows)
                span = problem.queries_seeing(column, rows, 600, 480, block, limits)
                self.check(span, allowed[:, column : column + rows].T, block)
        assert skipped >= 10 or not in_order
        seen = [allowed.any(axis=1 - i) for i in (0, 1)]
        sides = (matches[0], left, right, seen[0]), (matches[1], right, left, seen[1])
        for side, before, after, expected in sides:
            found = np.asarray(segments.reached(side, before, after))[0]
            assert not found[expected.size :].any()
            assert (found[: expected.size] >= expected).all()
            if in_order:
                np.testing.assert_array_equal(found[: expected.size], expected)

    def check(self, span, allowed, block):
        first, inner_first, inner_last, last = map(int, span[:4])
        assert 0 <= first <= inner_first <= inner_last <= last
        tiles = [allowed[:, i : i + block] for i in range(0, allowed.shape[1], block)]
        for index, tile in enumerate(tiles):
            assert first <= index < last or not tile.any()
            if inner_first <= index < inner_last:
                assert tile.all()


class TestRefusals:
    def test_each_names_what_is_allowed(self):
        query, key, value, _ = draw(23, queries=70, dim=64)
        attend = functools.partial(sage_attention, implementation="mosaic_gpu")
        with pytest.raises(NotImplementedError, match=r"needs an NVIDIA H100 or H200, this is cpu"):
            attend(query, key, value)
        with interpreted(detect_races=False):
            with pytest.raises(NotImplementedError, match="takes no bias; causal masks, local"):
                attend(query, key, value, jnp.zeros((1, 1, 70, 70)))
            with pytest.raises(NotImplementedError, match="takes no mask; causal masks"):
                attend(query, key, value, mask=jnp.ones((1, 1, 70, 70), bool))
            for dim in (36, 136):
                query, key, value, _ = draw(23, queries=70, dim=dim)
                with pytest.raises(
                    NotImplementedError, match=f"multiple of 8 up to 128, got {dim}"
                ):
                    attend(query, key, value)

    def test_explain(self):
        query, key, value, _ = draw(29, queries=70)
        assert explain(query, key, value).startswith(
            "sage_attention runs as 'xla', not as 'mosaic_gpu': it needs an NVIDIA H100"
        )
        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (query, key, value)]
        with interpreted(detect_races=False):
            assert explain(*shapes, is_causal=True) == "sage_attention runs as 'mosaic_gpu'"
            mask = jax.ShapeDtypeStruct((1, 1, 70, 70), jnp.bool_)
            assert "'xla', not as 'mosaic_gpu': it takes no mask" in explain(*shapes, mask=mask)
        with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
            explain(query, key, value, causal=True)

    def test_other_gpus_are_named(self):
        class Ampere:
            platform, device_kind, compute_capability = "gpu", "NVIDIA A100", "8.0"

        reason = mosaic_gpu.unsupported(64, has_bias=False, has_mask=False, device=Ampere())
        assert reason == "it needs compute capability 9.0 (H100, H200), NVIDIA A100 has 8.0"


# Forward and two backward kernels, quantization of Q, K and V together, and of dO.
KERNELS = 5


@pytest.mark.usefixtures("hopper")
class TestLowering:
    """Mosaic's layout inference accepts the kernels; no GPU is needed to see that."""

    def lower(self, attend, *shapes, sharding=None):
        inputs = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
        loss = lambda *x: jnp.sum(attend(*x).astype(jnp.float32) ** 2)
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*inputs)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    @pytest.mark.parametrize("dim", [40, 64, 128])
    @pytest.mark.parametrize(
        "options", [{}, {"is_causal": True}, {"local_window_size": (9, 0)}], ids=str
    )
    def test_all_kernels(self, dim, options):
        attend = functools.partial(sage_attention, **options)
        text = self.lower(attend, (2, 200, 4, dim), (2, 333, 2, dim), (2, 333, 2, dim))
        assert text.count("mosaic_gpu_v2") == KERNELS

    def test_segments(self):
        ids = jnp.zeros((2, 200), jnp.int32)
        attend = functools.partial(
            sage_attention, is_causal=True, query_segment_ids=ids, key_value_segment_ids=ids
        )
        assert self.lower(attend, *[(2, 200, 4, 64)] * 3).count("mosaic_gpu_v2") == KERNELS

    @pytest.mark.parametrize("name", ["plain", "causal", "window", "lengths", "segments"])
    def test_x64_mode(self, name):
        """Where integers have 64 bits unless told otherwise; the interpreter cannot run it."""
        shapes, options = CASES[name]
        with jax.enable_x64(True):
            query, key, value, _ = draw(5, **shapes)
            attend = functools.partial(sage_attention, **options)
            text = self.lower(attend, query.shape, key.shape, value.shape)
        assert text.count("mosaic_gpu_v2") == KERNELS

    @pytest.mark.parametrize("spec", [jax.P("data"), jax.P(None, None, "data")], ids=str)
    def test_shard_map_over_batch_or_heads_needs_no_collective(self, spec):
        types = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("data",), axis_types=types, devices=jax.devices()[:2])
        attend = jax.shard_map(
            functools.partial(sage_attention, is_causal=True),
            mesh=mesh,
            in_specs=(spec,) * 3,
            out_specs=spec,
        )
        text = self.lower(attend, *[(2, 200, 2, 64)] * 3, sharding=jax.NamedSharding(mesh, spec))
        assert text.count("mosaic_gpu_v2") == KERNELS
        for collective in ("all_gather", "all_reduce", "all_to_all", "collective_permute"):
            assert collective not in text


@pytest.mark.gpu
class TestOnTheGpu(AttentionConformance):
    implementation = "mosaic_gpu"
    wide_scores_error = 0.0265  # the reference with tiles of 128: 0.02625
    # These pass masks or biases, which the kernels refuse.
    test_masks_of_every_shape = None
    test_segments_are_a_mask = None
    test_bias_and_its_gradient = None
    test_a_bias_that_shifts_a_whole_row_changes_nothing = None
    test_visible_nan_and_infinity_are_not_hidden = None
    test_fully_masked_rows = None
    test_nan_in_padding_does_not_leak = None
    test_head_dims = None  # among them 256

    @pytest.mark.parametrize("dim", [8, 24, 40, 80, 96, 120])
    def test_head_dims_up_to_128(self, dim):
        self.check(draw(13, queries=130, dim=dim))

    @pytest.mark.parametrize("name", CASES)
    def test_agrees_with_the_reference(self, name):
        shapes, options = CASES[name]
        compare(draw(5, **shapes), jit=True, **options)

    @pytest.mark.parametrize("first", range(0, 200, 8))
    def test_agrees_with_the_reference_on_drawn_shapes(self, first):
        """200 programs. Compiling takes the time: run tests side by side, `pytest -m gpu -n 14`."""
        failures = []
        for seed in range(first, first + 8):
            lengths = [1, 2, 31, 64, 65, 127, 200, 257, 700, 1025]
            inputs, options = draw_case(random.Random(seed).choice, lengths, heads=3)
            try:
                compare(inputs, jit=True, **options)
            except AssertionError as error:
                shapes = [x.shape for x in inputs[:2]]
                failures.append(f"{seed}, {shapes}, {options}: {str(error).splitlines()[0]}")
        assert not failures, "\n".join(failures)
