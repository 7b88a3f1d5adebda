"""The generate command: streamed text, batches, chat, refusals."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny

from slimmoe_jax import generate
from slimmoe_jax.data import tokenizers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
