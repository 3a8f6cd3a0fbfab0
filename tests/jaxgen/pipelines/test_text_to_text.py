import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import decoder_sharding, save_diffusion_lm_folder
from jaxgen.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from jaxgen.pipelines import Texts, TextToText
from jaxgen.pipelines.chat import CHATML, LLADA, ChatFormat
from jaxgen.pipelines.texts import text_of
from jaxgen.sampling import (
    BlockDiffusion,
    ResidualContext,
    TokenChoice,
    Unmasking,
    block_diffusion,
    decode,
)
from jaxgen.tokenizers import TextTokenizer

GOLDENS = Path(__file__).parents[2] / "goldens/text_tokenizers"
TOKENIZERS = {
    "sdar": TextTokenizer.from_folder(GOLDENS / "qwen"),
    "llada": TextTokenizer.from_folder(GOLDENS / "llada"),
}
MASKS = {"sdar": 461, "llada": 458}
ENDS = {"sdar": 458, "llada": 457}
ROWS = 466  # a few more than tokens, as in released models
MOST = 148
BLOCK = 8


def _config(kind, **changes):
    options = {
        "num_layers": 1,
        "width": 16,
        "num_heads": 2,
        "num_kv_heads": 1 if kind == "sdar" else 2,
        "head_dim": 8,
        "ffn_dim": 24,
        "vocabulary_size": ROWS,
        "mask_id": MASKS[kind],
        "qk_norm": kind == "sdar",
        "rope_theta": 100.0,
        "max_tokens": MOST,
    }
    return DiffusionLMConfig(**(options | changes))


def _model(kind, seed=2, **changes):
    """A random model that reads the text, is often sure, and now and then ends an answer."""
    model = DiffusionLM(_config(kind, **changes), rngs=nnx.Rngs(seed))
    random = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        values = random.normal(size=variable.shape)
        if path[-1] == "kernel":
            values *= (8.0 if path[0] == "head" else 2.5) * variable.shape[0] ** -0.5
        elif path[-1] == "scale":
            values = 1.0 + 0.3 * values
        else:
            values *= 0.5
        variable[...] = jnp.asarray(values, jnp.float32)
    model.head.kernel[:, ENDS[kind]] *= 1.8
    return model


@pytest.fixture(scope="module")
def models():
    return {kind: _model(kind) for kind in TOKENIZERS}


@pytest.fixture(scope="module")
def pipelines(models):
    return {
        kind: TextToText(model, TOKENIZERS[kind], block_length=BLOCK)
        for kind, model in models.items()
    }


@pytest.fixture(params=["sdar", "llada"])
def pipeline(request, pipelines):
    return pipelines[request.param]


PROMPTS = ["What is 5 + 7?", "The quick brown fox.", ""]


def _same(first, second):
    assert first.texts == second.texts
    for name in ("tokens", "lengths", "steps"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.passes == second.passes


def test_chatml_spelled_out():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "5 + 7?"},
    ]
    assert CHATML.text(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\n5 + 7?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert CHATML.tokens == ("<|im_start|>", "<|im_end|>")


def test_llada_spelled_out():
    messages = [
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "5 + 7?"},
    ]
    assert LLADA.text(messages) == (
        "<|startoftext|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n5 + 7?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    names = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    assert LLADA.tokens == names


def test_defaults_of_the_two_architectures(models):
    sdar = TextToText(models["sdar"], TOKENIZERS["sdar"])
    assert sdar.chat_format is CHATML
    assert sdar.default_decoder(20) == BlockDiffusion(
        block_length=64,
        sight="block_causal",
        unmasking=Unmasking(threshold=0.85),
        stop_ids=(458,),
        pad_id=456,
    )
    llada = TextToText(models["llada"], TOKENIZERS["llada"])
    assert llada.chat_format is LLADA
    assert llada.default_decoder(20) == BlockDiffusion(
        block_length=20, sight="bidirectional", stop_ids=(457, 461), pad_id=457
    )
    other = TextToText(models["llada"], TOKENIZERS["llada"], block_length=4, stop_ids=[7], pad_id=9)
    decoder = other.default_decoder(20)
    assert (decoder.block_length, decoder.stop_ids, decoder.pad_id) == (4, (7, 461), 9)


def test_answers_are_those_of_the_decoder(pipeline):
    answers = pipeline(PROMPTS, new_tokens=20)
    texts = [pipeline.chat_format.text([{"role": "user", "content": p}]) for p in PROMPTS]
    rows = [pipeline.tokenizer.encode(text) for text in texts]
    # With no padding to a multiple of 64.
    prompts = np.zeros((3, max(map(len, rows))), np.int32)
    for place, ids in zip(prompts, rows, strict=True):
        place[: len(ids)] = ids
    expected = decode(
        pipeline.model,
        jnp.asarray(prompts),
        pipeline.default_decoder(20),
        new_tokens=20,
        lengths=jnp.array([len(ids) for ids in rows]),
    )
    np.testing.assert_array_equal(answers.tokens, expected.tokens)
    np.testing.assert_array_equal(answers.lengths, expected.lengths)
    np.testing.assert_array_equal(answers.steps, expected.steps)
    assert answers.passes == expected.passes
    assert answers.tokens.shape == (3, 20)
    stops = pipeline.default_decoder(20).stop_ids
    for text, ids, length in zip(answers.texts, answers.tokens, answers.lengths, strict=True):
        ended = ids[length - 1] in stops
        assert text == pipeline.tokenizer.decode(ids[: length - ended])
        assert ended or length == 20
        assert all(ids[length:] == pipeline.pad_id)


def test_some_answers_end_early_and_some_do_not(pipelines):
    # Otherwise the test above would say less than it seems to.
    answers = [pipeline(PROMPTS, new_tokens=20) for pipeline in pipelines.values()]
    lengths = np.concatenate([one.lengths for one in answers])
    assert (lengths < 20).any()
    assert (lengths == 20).any()


def test_a_batch_equals_its_rows_alone(pipeline):
    together = pipeline(PROMPTS, new_tokens=20)
    for row, prompt in enumerate(PROMPTS):
        alone = pipeline(prompt, new_tokens=20)
        assert alone.texts == (together.texts[row],)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.steps[0] == together.steps[row]


def test_a_string_is_a_message_of_the_user(pipeline):
    message = {"role": "user", "content": PROMPTS[0]}
    expected = pipeline(PROMPTS[0], new_tokens=20)
    strings = ([PROMPTS[0]], (PROMPTS[0],), np.array([PROMPTS[0]]), np.array(PROMPTS[0]))
    for same in (*strings, [message], [[message]], ([message],)):
        _same(pipeline(same, new_tokens=20), expected)
    spelled = pipeline.chat_format.text([message])
    _same(pipeline(spelled, new_tokens=20, chat=False), expected)
    assert pipeline(PROMPTS[0], new_tokens=20, chat=False).texts != expected.texts


def test_special_tokens_are_left_out_of_texts(pipelines):
    tokenizer = TOKENIZERS["sdar"]
    ids = np.array([*tokenizer.encode("The<|im_start|> <think>"), 465, 458], np.int32)
    options = {"stop_ids": (458,), "mask_id": 461, "placeholder": "_"}
    assert text_of(ids, tokenizer, **options) == "The <think>"
    known = np.array([461, *tokenizer.encode("你"), 461, 461, *tokenizer.encode("a")], np.int32)
    assert text_of(known, tokenizer, **options) == "_你__a"
    assert text_of(np.full(3, 461, np.int32), tokenizer, **options) == "___"
    assert text_of(known[:0], tokenizer, **options) == ""


def test_a_stream_ends_with_the_answers_of_a_call(pipeline):
    expected = pipeline(PROMPTS, new_tokens=20)
    *before, last = pipeline.stream(PROMPTS, new_tokens=20)
    _same(last, expected)
    mask = pipeline.model.config.mask_id
    assert "\u2591" in before[0].texts[0]
    assert len(before) == last.passes  # and the state before the first one
    assert not any("\u2591" in text for text in last.texts)
    for one, other in zip(before, [*before[1:], last], strict=True):
        assert isinstance(one, Texts)
        assert (one.steps <= other.steps).all()
        # What is known stays, unless an earlier token ends the answer.
        known = (one.tokens != mask) & (np.arange(20) < other.lengths[:, None])
        np.testing.assert_array_equal(one.tokens[known], other.tokens[known])


def test_a_stream_shows_masks_up_to_the_end_of_the_block(pipeline):
    first = next(pipeline.stream(PROMPTS, new_tokens=20, placeholder="?"))
    texts = [pipeline.chat_format.text([{"role": "user", "content": p}]) for p in PROMPTS]
    lengths = [len(pipeline.tokenizer.encode(text)) for text in texts]
    causal = pipeline.model.config.qk_norm  # blocks are counted from the start of the prompt
    expected = [BLOCK - length % BLOCK if causal else BLOCK for length in lengths]
    assert first.texts == tuple("?" * count for count in expected)
    assert (first.tokens == pipeline.model.config.mask_id).all()


def test_a_stream_may_skip_passes(pipeline):
    everything = list(pipeline.stream(PROMPTS, new_tokens=20))
    some = list(pipeline.stream(PROMPTS, new_tokens=20, every=4))
    kept = [one for number, one in enumerate(everything[:-1]) if number % 4 == 0]
    assert [one.texts for one in some] == [one.texts for one in [*kept, everything[-1]]]


def test_similar_prompts_run_the_same_program(pipeline):
    pipeline(PROMPTS[0], new_tokens=20)
    programs = (block_diffusion._run, block_diffusion._first_state)
    count = [program._cache_size() for program in programs]
    pipeline("Other words of another length.", new_tokens=20, seed=5)
    decoder = pipeline.default_decoder(20)
    if decoder.unmasking.threshold is not None:
        decoder = dataclasses.replace(decoder, unmasking=Unmasking(threshold=0.5))
    pipeline("Third", new_tokens=20, decoder=decoder)
    assert [program._cache_size() for program in programs] == count
    pipeline("1" * 100, new_tokens=20, chat=False)
    assert [program._cache_size() for program in programs] == [one + 1 for one in count]


def test_seeds(pipeline):
    choice = TokenChoice(temperature=1.5)
    decoder = dataclasses.replace(pipeline.default_decoder(20), choice=choice)
    draw = lambda prompts, seed: pipeline(prompts, new_tokens=20, decoder=decoder, seed=seed)
    same = [PROMPTS[0]] * 3
    drawn = draw(same, 3)
    assert len(set(drawn.texts)) == 3
    _same(draw(same, 3), drawn)
    _same(draw(same, [3, 4, 5]), drawn)
    assert draw(same, [5, 3, 3]).texts == tuple(drawn.texts[row] for row in (2, 0, 0))
    assert draw(same[:1], 4).texts == drawn.texts[1:2]


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_residual_context(kind, models):
    model, tokenizer, reference = models[kind], TOKENIZERS[kind], _model(kind, 1)
    rcd = TextToText(model, tokenizer, block_length=BLOCK, residual=ResidualContext())
    assert rcd.default_decoder(8).residual == ResidualContext()
    plain = TextToText(model, tokenizer, block_length=BLOCK)(PROMPTS, new_tokens=20)
    cold = rcd(PROMPTS, new_tokens=20)
    warm = TextToText(model, tokenizer, block_length=BLOCK, reference=reference)
    assert warm.default_decoder(8).residual == ResidualContext(init="reference")
    warmed = warm(PROMPTS, new_tokens=20)
    assert len({plain.texts, cold.texts, warmed.texts}) == 3
    # A decoder of the caller's counts as it is, also next to a reference.
    _same(warm(PROMPTS, new_tokens=20, decoder=rcd.default_decoder(20)), cold)


def test_guidance_of_a_llada(models, pipelines, tmp_path):
    plain, options = pipelines["llada"], {"block_length": BLOCK}
    guided = TextToText(models["llada"], TOKENIZERS["llada"], cfg_scale=2.0, **options)
    decoder = dataclasses.replace(plain.default_decoder(20), cfg_scale=2.0)
    assert guided.default_decoder(20) == decoder
    answers = guided(PROMPTS, new_tokens=20)
    _same(plain(PROMPTS, new_tokens=20, decoder=decoder), answers)
    assert answers.texts != plain(PROMPTS, new_tokens=20).texts
    *_, last = guided.stream(PROMPTS, new_tokens=20)
    _same(last, answers)
    for row, prompt in enumerate(PROMPTS):
        assert guided(prompt, new_tokens=20).texts == (answers.texts[row],)
    folders = {kind: _folder(tmp_path / kind, kind, model) for kind, model in models.items()}
    options |= {"cfg_scale": 2.0, "dtype": jnp.float32}
    loaded = TextToText.from_pretrained(folders["llada"], **options)
    _same(loaded(PROMPTS, new_tokens=20), answers)
    message = "cfg_scale is for sight='bidirectional' and must be None with 'block_causal', got 2.0"
    with pytest.raises(ValueError, match=message):
        TextToText.from_pretrained(folders["sdar"], **options)
    with pytest.raises(
        ValueError, match="cfg_scale must be -1 or more and finite, or None, got -2"
    ):
        TextToText(models["llada"], TOKENIZERS["llada"], cfg_scale=-2)


def _folder(path, kind, model, **changes):
    save_diffusion_lm_folder(path, model)
    shutil.copytree(GOLDENS / ("qwen" if kind == "sdar" else kind), path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_from_a_folder_to_texts(kind, models, pipelines, tmp_path):
    ids = {"eos_token_id": [7, 457], "pad_token_id": 456}
    folder = _folder(tmp_path / "model-b8-chat", kind, models[kind], block_size=4, **ids)
    steps = []
    loaded = TextToText.from_pretrained(
        folder,
        block_length=None if kind == "sdar" else BLOCK,
        dtype=jnp.float32,
        progress=lambda *sizes: steps.append(sizes),
    )
    assert steps[-1][0] == steps[-1][1] > 0
    decoder = loaded.default_decoder(20)
    assert decoder.block_length == BLOCK
    assert decoder.stop_ids == ((7, 457, 458) if kind == "sdar" else (7, 457, 461))
    assert decoder.pad_id == 456
    expected = pipelines[kind](PROMPTS, new_tokens=20, decoder=decoder)
    _same(loaded(PROMPTS, new_tokens=20), expected)


def test_a_folder_with_a_reference_in_bfloat16(models, tmp_path):
    folder = _folder(tmp_path / "target", "sdar", models["sdar"], block_size=BLOCK)
    other = _model("sdar", 1, num_layers=2)
    save_diffusion_lm_folder(tmp_path / "reference", other)  # without a tokenizer
    loaded = TextToText.from_pretrained(folder, reference=tmp_path / "reference", attention="int8")
    for model in (loaded.model, loaded.reference):
        assert model.config.dtype == model.config.param_dtype == jnp.bfloat16
        assert model.config.attention == "int8"
    assert loaded.reference.config.num_layers == 2
    assert loaded.default_decoder(8).residual == ResidualContext(init="reference")
    assert TextToText.from_pretrained(folder)("Hi", new_tokens=4).lengths[0] > 0


def test_the_length_of_a_block_in_a_folder(models, tmp_path):
    folder = _folder(tmp_path / "SDAR", "sdar", models["sdar"])
    load = lambda path, **options: TextToText.from_pretrained(path, **options).block_length
    assert load(folder) is None
    _folder(folder, "sdar", models["sdar"], block_size=4)
    assert load(folder) == 4
    for name in ("RCD-SDAR-4B-b32-Thinking", "models--x--SDAR-4B-Chat-b32/snapshots/0a"):
        shutil.copytree(folder, tmp_path / name)
        assert load(tmp_path / name) == 32
        assert load(tmp_path / name, block_length=16) == 16
    shutil.copytree(folder, tmp_path / "SDAR-b")
    assert load(tmp_path / "SDAR-b") == 4
    shutil.copytree(folder, tmp_path / "sdar-b0")
    with pytest.raises(ValueError, match="sdar-b0: -b<number> in the name must be a positive int"):
        load(tmp_path / "sdar-b0")
    assert load(tmp_path / "sdar-b0", block_length=16) == 16


def test_weights_may_be_shared_by_devices(models, pipelines, tmp_path):
    import jax
    from jax.sharding import AxisType, Mesh

    folder = _folder(tmp_path, "sdar", models["sdar"], block_size=BLOCK)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(AxisType.Auto,))
    loaded = TextToText.from_pretrained(folder, dtype=jnp.float32, sharding=decoder_sharding(mesh))
    assert len(loaded.model.head.kernel[...].sharding.device_set) == 2
    expected = pipelines["sdar"](PROMPTS[:1], new_tokens=20, decoder=loaded.default_decoder(20))
    _same(loaded(PROMPTS[:1], new_tokens=20), expected)


def test_texts_in_a_notebook(pipelines):
    texts = Texts(
        ("a < b && <script>", "x"),
        np.zeros((2, 4), np.int32),
        np.array([3, 4], np.int32),
        np.array([2, 1], np.int32),
        5,
        1.25,
    )
    assert (len(texts), texts[1], list(texts)) == (2, "x", list(texts.texts))
    shown = texts._repr_html_()
    assert "a &lt; b &amp;&amp; &lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "0: 3 tokens, 2 steps" in shown
    assert repr(texts) == (
        "[0: 3 tokens, 2 steps]\na < b && <script>\n\n[1: 4 tokens, 1 steps]\nx\n\n"
        "(5 passes, 1.2 s)"
    )


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "message"),
    [
        ([], {}, ValueError, "prompts must hold at least one prompt, got none"),
        (3, {}, TypeError, "prompts must be a string, .* got int"),
        (np.array([3]), {}, TypeError, "a list of messages, got int at position 0"),
        (None, {}, TypeError, "prompts must be a string, .* got NoneType"),
        ({"role": "user"}, {}, TypeError, "prompts must be a string, .* got dict"),
        (["a", 3], {}, TypeError, "a list of messages, got int at position 1"),
        (["a", USER], {}, TypeError, "a list of messages, got dict at position 1"),
        (["a", []], {}, ValueError, "prompt 1: a conversation must have at least one message"),
        (["a", ["b"]], {}, TypeError, "prompt 1: a message must be a mapping, got str"),
        ([[USER, {"role": "user"}]], {}, ValueError, r"must have role and content, got \['role'\]"),
        ([USER | {"name": "x"}], {}, ValueError, "must have role and content, got "),
        ([USER | {"role": "tool"}], {}, ValueError, "one of system, user, assistant, got 'tool'"),
        ([USER | {"content": None}], {}, TypeError, "content must be a string, got NoneType"),
        (
            [USER, {"role": "assistant", "content": "b"}],
            {},
            ValueError,
            "the last message must be the user's, got one of 'assistant'",
        ),
        ([USER], {"chat": False}, ValueError, "messages need chat=True, got .* at position 0"),
        (["a", ""], {"chat": False}, ValueError, "prompt 1 has no tokens"),
        ("a", {"new_tokens": 0}, ValueError, "new_tokens must be positive, got 0"),
        ("a", {"new_tokens": 2.0}, TypeError, r"new_tokens must be an int, got 2\.0"),
        ("a", {"new_tokens": True}, TypeError, "new_tokens must be an int, got True"),
        (
            ["a", "1" * 100],
            {"new_tokens": 49, "chat": False},
            ValueError,
            r"prompt 1 has 100 tokens, which allows at most 48 new ones \(max_tokens=148\), got "
            "new_tokens=49",
        ),
        ("1" * 148, {"chat": False}, ValueError, "has 148 tokens, which allows no new ones"),
        ("a", {"decoder": "greedy"}, TypeError, "decoder must be a BlockDiffusion, got str"),
        ("a", {"decoder": BlockDiffusion(pad_id=500)}, ValueError, "pad_id must be below 466"),
        ("a", {"seed": -1}, ValueError, "seed must be an int from 0"),
        ("a", {"seed": [1, 2]}, ValueError, "got 2 seeds and 1 prompts"),
        (
            "a",
            {"decoder": BlockDiffusion(residual=ResidualContext(init="reference"))},
            ValueError,
            "needs a reference model",
        ),
    ],
)
def test_refusals(prompts, options, kind, message, pipelines):
    options = {"new_tokens": 8} | options
    with pytest.raises(kind, match=message):
        pipelines["sdar"](prompts, **options)
    with pytest.raises(kind, match=message):
        next(pipelines["sdar"].stream(prompts, **options))


def test_a_stream_refuses_before_its_first_answer(pipelines):
    stream = pipelines["sdar"].stream
    for every in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"every must be a positive int, got {every}"):
            stream("a", every=every)
    with pytest.raises(TypeError, match="placeholder must be a string, got 3"):
        stream("a", placeholder=3)
    with pytest.raises(ValueError, match="prompts must hold"):
        stream([])


def test_room_for_the_longest_answer(pipelines):
    answer = pipelines["sdar"]("1" * 128, new_tokens=20, chat=False)
    assert answer.tokens.shape == (1, 20)


def test_without_a_chat_format(models):
    tokenizer = TextTokenizer(TOKENIZERS["sdar"].backend)
    odd = ChatFormat("<|user|>", "\n", "<|end|>")
    with pytest.raises(ValueError, match=r"it does not of '<\|user\|>', '<\|end\|>'"):
        TextToText(models["sdar"], tokenizer, chat_format=odd)
    named = ChatFormat("<|im_start|>", "\n", "</s>")
    assert named.tokens == ("<|im_start|>", "</s>")
    with pytest.raises(ValueError, match="it does not of '</s>'"):
        TextToText(models["sdar"], tokenizer, chat_format=named)
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    # In the vocabulary, but texts are split there.
    vocabulary = {"a": 0, "b": 1, "<|im_start|>": 2, "<|im_end|>": 3}
    plain = TextTokenizer(Tokenizer(kinds.BPE(vocabulary, [])))
    with pytest.raises(ValueError, match=r"it does not of '<\|im_start\|>', '<\|im_end\|>'"):
        TextToText(models["sdar"], plain, chat_format=CHATML)
    pipeline = TextToText(models["sdar"], plain, block_length=BLOCK)
    assert (pipeline.stop_ids, pipeline.pad_id) == ((), 0)
    with pytest.raises(ValueError, match="tokens of a chat format that is known"):
        pipeline("a", new_tokens=8)


def test_parts_must_fit(models):
    model, tokenizer = models["sdar"], TOKENIZERS["sdar"]
    small = DiffusionLM(_config("sdar", vocabulary_size=461, mask_id=3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has ids up to 461, the model only 461 tokens"):
        TextToText(small, tokenizer)
    for reference in (small, models["llada"]):
        with pytest.raises(
            ValueError, match=r"vocabulary_size and mask_id of the model, \(466, 46"
        ):
            TextToText(model, tokenizer, reference=reference)
    with pytest.raises(ValueError, match="go together"):
        TextToText(model, tokenizer, residual=ResidualContext(init="reference"))
    with pytest.raises(ValueError, match="go together"):
        TextToText(model, tokenizer, reference=model, residual=ResidualContext())
    with pytest.raises(ValueError, match="block_length must be a positive int, got "):
        TextToText(model, tokenizer, block_length=0)
    for options in ({"pad_id": 461}, {"stop_ids": [461]}):
        with pytest.raises(ValueError, match="must not be the mask token, 461"):
            TextToText(model, tokenizer, **options)
    with pytest.raises(ValueError, match=r"stop_ids must be below 466, got \(466, 458\)"):
        TextToText(model, tokenizer, stop_ids=[466])
    with pytest.raises(ValueError, match="pad_id must be made of ints, got "):
        TextToText(model, tokenizer, pad_id="x")


def test_parts_of_the_wrong_type(models, tmp_path):
    model, tokenizer = models["sdar"], TOKENIZERS["sdar"]
    with pytest.raises(TypeError, match="model must be a DiffusionLM, got str"):
        TextToText("model", tokenizer)
    with pytest.raises(TypeError, match="tokenizer must be a TextTokenizer, got Tokenizer"):
        TextToText(model, tokenizer.backend)
    with pytest.raises(TypeError, match="reference must be a DiffusionLM or None, got str"):
        TextToText(model, tokenizer, reference="model")
    for stops in (5, "12", ["<|im_end|>"], [[5]], np.array(5), np.array([5.0])):
        with pytest.raises(TypeError, match="stop_ids must be a sequence of ints, got "):
            TextToText(model, tokenizer, stop_ids=stops)
    for make in (jnp.array, np.array, tuple, set):
        assert TextToText(model, tokenizer, stop_ids=make([5])).stop_ids == (5, 458)
    folder = _folder(tmp_path / "model", "sdar", model)
    (folder / "model.safetensors").unlink()  # refused before weights are read
    load = lambda **options: TextToText.from_pretrained(folder, **options)
    for make in (lambda **options: TextToText(model, tokenizer, **options), load):
        with pytest.raises(TypeError, match="residual must be a ResidualContext or None, got True"):
            make(residual=True)
        with pytest.raises(TypeError, match="chat_format must be a ChatFormat, got 'chatml'"):
            make(chat_format="chatml")
        with pytest.raises(ValueError, match="one id of each token of the chat format"):
            make(chat_format=LLADA)
    with pytest.raises(TypeError, match="progress must be callable, True, False or None, got 'b"):
        load(progress="bar")


def test_the_masks_of_model_and_tokenizer_must_be_the_same(models, tmp_path):
    load = TextToText.from_pretrained
    folder = _folder(tmp_path, "sdar", models["sdar"], mask_token_id=463)
    with pytest.raises(ValueError, match="tokenizer, 461, must be that of the model, 463"):
        load(folder)
    for mask_id in (461, 463):
        assert load(folder, mask_id=mask_id).model.config.mask_id == mask_id


def test_folders_are_refused(models, tmp_path):
    load = TextToText.from_pretrained
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "nowhere")
    folder = _folder(tmp_path / "model", "sdar", models["sdar"])
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load(folder, reference=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        load(GOLDENS / "qwen")
    # Before any weights are read.
    other = _folder(tmp_path / "other", "llada", models["llada"])
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"mask_id of the model, \(466, 461\), got \(466, 458\)"):
        load(folder, reference=other)
    with pytest.raises(ValueError, match="go together"):
        load(other, residual=ResidualContext(init="reference"))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer\.json"):
        load(other)
    for changes, message in (
        ({"block_size": 0}, r"config\.json: block_size must be a positive int, got 0"),
        ({"eos_token_id": 466}, r"config\.json: eos_token_id must be ids below 466, got 466"),
        ({"eos_token_id": ["a"]}, r"eos_token_id must be ids below 466, got \['a'\]"),
        ({"pad_token_id": -1}, "pad_token_id must be ids below 466, got -1"),
        ({"pad_token_id": 461}, "must not be the mask"),
    ):
        broken = _folder(tmp_path / "broken", "sdar", models["sdar"], **changes)
        with pytest.raises(ValueError, match=message):
            load(broken)("a", new_tokens=8)
