"""Generation: cached decoding against recomputation, sampling against transformers, streamed text, chat, and the command itself."""

import dataclasses
import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slimmoe_jax import generate, model, sampling
from slimmoe_jax.config import InputError, ModelConfig, RouterConfig
from slimmoe_jax.data import tokenizers
from slimmoe_jax.data.chat import Turn
from slimmoe_jax.generate import Weights
from slimmoe_jax.routing import RouterState
from slimmoe_jax.sampling import Sampling

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Large initial weights, so that the likeliest token leads by far and depends on the tokens before it.
CONFIG = ModelConfig(
    vocab_size=50, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0), expert_hidden=24, dropout=0.0,
    init_std=0.3,
)  # fmt: skip
CASES = {
    "top_k, multi-head": dict(router=RouterConfig(kind="top_k", renormalize=True), kv_heads=(4,)),
    "top_p, grouped by layer": dict(router=RouterConfig(kind="top_p", threshold=0.5), kv_heads=(2, 1)),
    "relu, multi-query": dict(router=RouterConfig(kind="relu", max_experts=4), kv_heads=(1,)),
    "bias, grouped by layer": dict(router=RouterConfig(kind="top_k", balance="bias"), kv_heads=(4, 2), rotary=(0.0, 0.5)),
}
PROMPTS = [[int(t) for t in np.random.default_rng(n).integers(0, 50, n)] for n in (5, 17, 9)]
NEW = 12


class Spelled:
    """Stands in for a tokenizer where only its end token matters."""

    def __init__(self, end_token):
        self.end_token = end_token


def weights_of(config, end_token=-1):
    params = nn.unbox(jax.jit(lambda key: model.init(model.SlimMoE(config), key))(jax.random.key(0)))
    router = RouterState.initial(config)
    router = router.replace(bias=jax.random.normal(jax.random.key(1), router.bias.shape))
    return Weights(model.SlimMoE(config), params, router, Spelled(end_token))


@pytest.fixture(scope="module")
def weights():
    return weights_of(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(network, params, router, tokens):
    return network.apply({"params": params}, tokens, router).logits()


def uncached(weights, prompt, new_tokens):
    """Greedy decoding that runs the whole sequence anew for every token. Padding on the right, since the model is causal."""
    ids = list(prompt)
    for _ in range(new_tokens):
        row = np.zeros((1, 96), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.asarray(full_logits(*weights[:3], row))[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_of_an_unequal_batch_equals_recomputation(case):
    weights = weights_of(dataclasses.replace(CONFIG, **CASES[case]))
    expected = [uncached(weights, prompt, NEW) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 6, "the comparison needs varied tokens"
    greedy = Sampling(temperature=0.0)
    assert generate.generate_batch(weights, PROMPTS, greedy, new_tokens=NEW, seed=0) == expected
    assert list(generate.stream_tokens(weights, PROMPTS[1], greedy, new_tokens=NEW, seed=0)) == expected[1]


def test_decoding_goes_past_the_rounded_lengths(weights):
    """More new tokens than one unit of room, and a prompt that fills its padding."""
    (tokens,) = generate.generate_tokens(weights, [list(range(16))], Sampling(0.0), new_tokens=70, seed=0)
    assert tokens.shape == (1, 70) and list(tokens[0]) == uncached(weights, range(16), 70)


def test_nothing_comes_after_the_end_token(weights):
    plain = [uncached(weights, prompt, NEW) for prompt in PROMPTS]
    end = plain[0][4]
    expected = [row[: row.index(end)] if end in row else row for row in plain]
    ending, greedy = weights._replace(tokenizer=Spelled(end)), Sampling(temperature=0.0)
    assert generate.generate_batch(ending, PROMPTS, greedy, new_tokens=NEW, seed=0) == expected
    assert list(generate.stream_tokens(ending, PROMPTS[0], greedy, new_tokens=NEW, seed=0)) == expected[0]
    (tokens,) = generate.generate_tokens(ending, PROMPTS, greedy, new_tokens=NEW, seed=0)
    assert tokens.shape[1] > len(expected[0]) + 1, "another row goes on, or the next line shows nothing"
    assert (tokens[0, len(expected[0]) :] == end).all()
    (tokens,) = generate.generate_tokens(ending, PROMPTS[:1], greedy, new_tokens=NEW, seed=0)
    assert tokens.shape[1] == len(expected[0]) + 1, "decoding stops once every row has ended"


def test_samples_follow_the_seed_whatever_the_chunk(weights):
    def sample(seed, chunk=0, prompts=PROMPTS):
        settings = Sampling(temperature=1.5, top_p=0.95)
        return np.concatenate(list(generate.generate_tokens(weights, prompts, settings, new_tokens=NEW, seed=seed, chunk=chunk)), 1)

    np.testing.assert_array_equal(sample(3), sample(3, chunk=5))
    np.testing.assert_array_equal(sample(3)[:1], sample(3, prompts=PROMPTS[:1]))
    assert (sample(3) != sample(4)).any()
    same = sample(3, prompts=[PROMPTS[0]] * 3)
    assert (same[0] != same[1]).any(), "equal prompts of a batch are sampled independently"


def test_each_token_is_drawn_anew(weights):
    """So hot that every token is as likely: one draw used again and again would give one token again and again."""
    (row,) = generate.generate_batch(weights, PROMPTS[:1], Sampling(temperature=1e4), new_tokens=NEW, seed=0)
    assert len(set(row)) > NEW // 2


def test_changing_the_settings_compiles_nothing(weights):
    def run(settings, new_tokens, seed):
        generate.generate_batch(weights, PROMPTS, settings, new_tokens=new_tokens, seed=seed)

    run(Sampling(0.7, 5, 0.9, 0.1, 1.2), NEW, 0)
    sizes = generate.prefill._cache_size(), generate.decode._cache_size()
    run(Sampling(0.0), NEW, 1)
    run(Sampling(1.3, 0, 0.5, 0.0, 1.0), NEW + 5, -7)
    assert (generate.prefill._cache_size(), generate.decode._cache_size()) == sizes


# --- sampling --------------------------------------------------------------------------------------------------------

FILTERS = [
    dict(top_k=5),
    dict(top_k=1),
    dict(top_k=1_000),
    dict(top_p=0.9),
    dict(top_p=0.3),
    dict(top_p=1e-4),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8),
    dict(temperature=0.5, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.5),
    dict(temperature=2.0, top_k=50, top_p=0.6, min_p=0.3, repetition_penalty=1.1),
]


def theirs(logits, seen_ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The logits after transformers' own processors, in the order in which its `generate` applies them."""
    torch, process = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    processors = [process.RepetitionPenaltyLogitsProcessor(repetition_penalty), process.TemperatureLogitsWarper(temperature)]
    processors += [process.TopKLogitsWarper(top_k)] if top_k else []
    processors += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [process.MinPLogitsWarper(min_p)] if min_p else []
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(torch.tensor(seen_ids), scores)
    return scores.numpy()


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_filters_are_those_of_transformers(values):
    rng = np.random.default_rng(0)
    logits, seen_ids = 3 * rng.standard_normal((6, 200)).astype(np.float32), rng.integers(0, 200, (6, 40))
    seen = np.zeros((6, 200), bool)
    np.put_along_axis(seen, seen_ids, True, axis=1)
    settings = Sampling(**{"temperature": 1.0} | values)

    @jax.jit
    def ours(settings):
        return sampling.keep_likely(sampling.penalise(logits, seen, settings.repetition_penalty) / settings.temperature, settings)

    expected = theirs(logits, seen_ids, **values)
    np.testing.assert_array_equal(np.isinf(ours(settings)), np.isinf(expected))
    np.testing.assert_allclose(ours(settings), expected, rtol=1e-5)


def test_samples_have_the_distribution_that_the_filters_leave():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (20_000, 4))
    keys, seen = jax.random.split(jax.random.key(0), 20_000), jnp.zeros(many.shape, bool)
    tokens = jax.jit(sampling.choose)(many, seen, Sampling(temperature=1.0, top_p=0.75), keys)
    shares = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.015)  # 0.5 and 0.3, rescaled to sum to 1


def test_the_repetition_penalty_counts_prompt_and_new_tokens_but_no_padding(weights):
    """So strong that greedy decoding never repeats a token; token 0, which pads the shorter prompts, stays free."""
    rows = generate.generate_batch(weights, PROMPTS, Sampling(0.0, repetition_penalty=1e6), new_tokens=NEW, seed=0)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len({*row} - {*prompt}) == NEW
    tokens, positions = generate.pad_left([[7, 8]])
    d = generate.prefill(*weights[:3], tokens, positions, Sampling(0.0), np.uint32(0), room=64, end_token=-1)
    assert set(np.flatnonzero(d.seen[0])) == {7, 8, int(d.tokens[0, 0])}


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        (dict(temperature=-0.1), "--temperature"),
        (dict(temperature=float("nan")), "--temperature"),
        (dict(top_k=-1), "--top-k"),
        (dict(top_p=0.0), "--top-p"),
        (dict(top_p=1.1), "--top-p"),
        (dict(min_p=-0.1), "--min-p"),
        (dict(min_p=1.5), "--min-p"),
        (dict(repetition_penalty=0.0), "--repetition-penalty"),
    ],
)
def test_settings_without_meaning_are_refused(values, flag):
    with pytest.raises(InputError, match=flag):
        sampling.check(Sampling(**values))


# --- text ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "Plain words, then  two spaces \n and a line.",
    " leading space and trailing ",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f4bb na\u00efve \u20ac5 \u2581 \ufffd!",
    "ends in a replacement character \ufffd",
]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    words = (f"word{n * 7 % 50} is a line of text number {n}" for n in range(200))
    tokenizers.train_sentencepiece(words, 300, path)
    return tokenizers.load(str(path))


@pytest.fixture(scope="module", params=["gpt2", "sentencepiece"])
def tokenizer(request):
    return tokenizers.load("gpt2") if request.param == "gpt2" else request.getfixturevalue("sentencepiece")


def pieces_of(tokenizer, ids, strip=False):
    stream = generate.TextStream(tokenizer, strip)
    return [*(stream.push(token) for token in ids), stream.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert sum(map(bool, pieces)) > len(ids) // 4, "text comes as it is made, not all at the end"
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces), "no half of a character is shown"
    assert "".join(pieces_of(tokenizer, ids, strip=True)) == text.strip()


def test_streamed_pieces_of_any_tokens_add_up(tokenizer):
    """What an untrained model says: bytes that are no text, cut anywhere."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 260, 40).tolist()  # in both vocabularies mostly single bytes
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)
        assert "".join(pieces_of(tokenizer, ids, strip=True)) == tokenizer.decode(ids).strip()


def test_the_newest_tokens_are_kept_and_leave_room():
    ids = list(range(100))
    assert generate.newest(ids, 100, 90) == ids, "a prompt that the context holds is not cut"
    assert generate.newest(ids, 80, 30) == ids[50:]
    assert generate.newest(ids, 80, 500) == ids[60:], "half of the context stays"
    assert generate.newest(ids, 1, 5) == ids[99:]


# --- chat ------------------------------------------------------------------------------------------------------------


def conversation(exchanges, system=True):
    turns = [Turn("system", "You are brief.")] if system else []
    for n in range(exchanges):
        turns += [Turn("user", f"question {n}"), Turn("assistant", f"answer {n}")]
    return [*turns, Turn("user", "the newest question")]


@pytest.mark.parametrize("system", [True, False])
def test_the_context_slides_over_whole_exchanges(sentencepiece, system):
    turns = conversation(4, system)
    spelled = "".join(f"<|{turn.role}|>\n{turn.content}\n" for turn in turns) + "<|assistant|>\n"
    whole, prompt = generate.fit_history(turns, sentencepiece, 10_000)
    assert whole == turns and sentencepiece.decode(prompt).split() == spelled.split()
    lengths = []
    for room in range(len(prompt), 0, -1):
        try:
            kept, ids = generate.fit_history(turns, sentencepiece, room)
        except InputError as error:
            assert "room for" in str(error) and lengths[-1] == 1 + system, "refused only when nothing more can go"
            break
        assert len(ids) <= room
        assert kept == turns[:system] + turns[len(turns) - len(kept) + system :], "the system's turn and the newest ones"
        assert kept[system].role == "user"
        lengths.append(len(kept))
    assert sorted(set(lengths), reverse=True) == [8 + 1 + system - 2 * n for n in range(5)], "one exchange goes at a time"


# --- the command -----------------------------------------------------------------------------------------------------

TINY = tiny.source(
    steps=2, data__context=64, optim__warmup_steps=1, checkpoint__every=1_000, eval__every=0, eval__batches=1, eval__sample_tokens=0
)


def command(folder, *arguments, stdin="", module="generate"):
    environment = os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    arguments = [sys.executable, "-m", f"slimmoe_jax.{module}", *arguments]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, input=stdin)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of two steps in `tiny`."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write(folder, TINY)
    done = command(folder, "--config", "tiny.py", "--workdir", "tiny", "--compilation-cache", tiny.CACHE, module="train")
    assert done.returncode == 0, done.stderr
    return folder


def test_prompts_stream_alone_and_are_separated_in_a_batch(run):
    flags = ["--checkpoint", "tiny", "--temperature", "0", "--tokens", "20"]
    alone = command(run, *flags, "--prompt", "word1 word2")
    assert alone.returncode == 0 and alone.stdout.startswith("word1 word2") and not alone.stderr, alone.stderr
    batch = command(run, *flags, "--prompt", "word1 word2", "--prompt", "Document 3: word\u00e9")
    assert batch.returncode == 0, batch.stderr
    first, second = batch.stdout.removeprefix("--- 1 of 2 ---\n").split("--- 2 of 2 ---\n")
    assert first == alone.stdout and second.startswith("Document 3: word\u00e9")


def test_long_prompts_slide_and_say_so(run):
    done = command(run, "--checkpoint", "tiny", "--tokens", "40", "--prompt", "word " * 100)
    assert done.returncode == 0 and done.stdout.startswith("word " * 100), done.stderr
    cut, beyond = done.stderr.splitlines()
    assert "exceed the context of 64: the model sees the newest 32" in cut and "may exceed the context of 64" in beyond


def test_chat_answers_each_line_and_slides(run):
    lines = ["Hello", "", "x" * 200, *("And then?" for _ in range(4))]
    flags = ["--checkpoint", "tiny", "--chat", "--system", "Be.", "--tokens", "12", "--top-k", "40", "--seed", "1"]
    done = command(run, *flags, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "> " not in done.stdout.split("\n")[0], "a pipe gets no prompt"
    said = done.stderr.splitlines()
    assert sum("room for 52" in line for line in said) == 1, "the turn that is too long is refused, and the chat goes on"
    assert sum("oldest exchanges are left out" in line for line in said) == 1, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a"], "--checkpoint is missing"),
        (["--checkpoint", "absent", "--prompt", "a"], "absent holds no run"),
        (["--checkpoint", "tiny/7", "--prompt", "a"], "no checkpoint 7"),
        (["--checkpoint", "tiny"], "give --prompt TEXT, or --chat"),
        (["--checkpoint", "tiny", "--prompt", ""], "the prompt is empty"),
        (["--checkpoint", "tiny", "--prompt", "a", "--chat"], "--prompt does not go with --chat"),
        (["--checkpoint", "tiny", "--prompt", "a", "--system", "b"], "add --chat"),
        (["--checkpoint", "tiny", "--prompt", "a", "--top-p", "1.5"], "--top-p = 1.5"),
        (["--checkpoint", "tiny", "--prompt", "a", "--tokens", "0"], "--tokens = 0"),
        (["--checkpoint", "tiny", "--prompt", "a", "--tokens", "many"], "--tokens"),
        (["--checkpoint", "tiny", "--chat", "--tokens", "64"], "leaves no room"),
    ],
)
def test_bad_input_is_one_line(run, monkeypatch, capsys, flags, message):
    """In this process, which is faster; the exit code and the line are those of the command."""
    from slimmoe_jax import cli

    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(generate.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_bad_input_of_the_command_is_one_line(run):
    done = command(run, "--checkpoint", "tiny", "--prompt", "a", "--min-p", "2")
    assert done.returncode == 2 and done.stderr.startswith("error: --min-p = 2.0") and done.stderr.count("\n") == 1
