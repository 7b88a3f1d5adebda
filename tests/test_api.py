"""The package as a library: its documentation's examples, and the same answers as the commands give."""

import doctest
import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest

import slimmoe_jax
from slimmoe_jax import api, cli, decoding, evaluate, generate, train
from slimmoe_jax.config import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = """
from slimmoe_jax.config import *

def get_config():
    return TrainConfig(
        name="quickstart", steps=3, log_every=1,
        model=ModelConfig(
            vocab_size=384, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0), expert_hidden=24,
            init_std=0.2,
        ),
        data=DataConfig(
            source="text.jsonl", tokenizer="sentencepiece", train_tokenizer=384, context=64, batch_size=8, validation_fraction=0.05
        ),
        optim=OptimConfig(warmup_steps=1),
        eval=EvalConfig(every=0, batches=1, sample_tokens=0),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs/quickstart is that of the quickstart's command, but for its size."""
    path, before = tmp_path_factory.mktemp("api"), os.getcwd()
    (path / "tiny.py").write_text(CONFIG)
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    os.chdir(path)
    try:
        train.main(["--config", "tiny.py"])
        yield path
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def trained(folder):
    return slimmoe_jax.load("runs/quickstart")


def test_the_documentations_examples_run(folder):
    done = doctest.testmod(api, optionflags=doctest.ELLIPSIS)
    assert done.attempted >= 6 and done.failed == 0


def test_importing_the_package_does_not_import_jax():
    """The data tools start without it, and so does `--help`."""
    program = "import sys, slimmoe_jax; print('jax' in sys.modules, slimmoe_jax.load.__name__, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "load", "True"]
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        slimmoe_jax.lod  # noqa: B018


def test_it_generates_what_the_command_prints(folder, trained, capsys):
    flags = ["--checkpoint", "runs/quickstart", "--prompt", "def f", "--tokens", "7", "--temperature", "0.9", "--seed", "3"]
    generate.main(flags)
    said = trained.generate("def f", tokens=7, temperature=0.9, seed=3)
    assert said.startswith("def f") and len(said) > 5
    assert capsys.readouterr().out == said + "\n"
    assert trained.generate(["def f", "a"], tokens=7, temperature=0)[0] == trained.generate("def f", tokens=7, temperature=0)


def test_greedy_generation_follows_apply(trained):
    """One token after another, by the likeliest of the logits of the whole text so far."""
    ids, end = trained.encode("def f")[0].tolist(), trained.tokenizer.end_token
    for _ in range(5):
        padded = np.pad([ids], ((0, 0), (0, 16 - len(ids))))  # where no token looks: one program serves all lengths
        ids.append(int(trained.apply(padded).logits()[0, len(ids) - 1].argmax()))
    expected = trained.tokenizer.decode(decoding.until_end(ids, end))
    assert trained.generate("def f", tokens=5, temperature=0) == expected


def test_it_evaluates_as_the_command_does(folder, trained, monkeypatch):
    words = ["evaluate", "--checkpoint", "runs/quickstart", "--batches", "2", "--out", "out.json", "--by-position"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    assert not stop.value.code
    command, library = json.loads((folder / "out.json").read_text()), trained.evaluate(batches=2, by_position="powers")
    library = json.loads(json.dumps(library))
    for result in (command, library):
        result.pop("date")
    assert command.pop("command").startswith("python -m slimmoe_jax.evaluate") and command == library


def test_it_answers_a_conversation(trained, monkeypatch):
    """As the chat does: its turns up to the newest, then the assistant's header."""
    asked = []
    monkeypatch.setattr(decoding, "generate_batch", lambda weights, prompts, *_, **__: asked.extend(prompts) or [[5, 6]])
    messages = [("system", "Brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 2")]
    reply = trained.chat([{"role": role, "content": content} for role, content in messages], tokens=4)
    assert reply == trained.tokenizer.decode([5, 6]).strip()
    (prompt,) = asked
    kept = trained.tokenizer.decode([i for i in prompt if i != trained.tokenizer.end_token])
    assert kept.endswith("<|user|>\n2 + 2\n<|assistant|>\n")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.generate(""), "the prompt is empty"),
        (lambda t: t.generate("a", temperature=-1), "temperature"),
        (lambda t: t.generate("a", tokens=-1), "tokens = -1: give at least 1"),
        (lambda t: t.chat([{"role": "user", "content": "a"}], tokens=0), "tokens = 0: give at least 1"),
        (lambda t: t.generate("a", tokens=10**11), "tokens = 100000000000: give at most 1,000,000"),
        (lambda t: t.generate("a", tokens=2.5), "tokens = 2.5: give a whole number"),
        (lambda t: t.generate("a", seed=-1), "seed = -1: give at least 0"),
        (lambda t: t.generate("a", seed=2**32), "seed = 4294967296: give at most 4,294,967,295"),
        (lambda t: t.generate("a", top_k=10**11), "top-k = 100000000000"),
        (lambda t: t.generate("a", top_p=float("nan")), "top-p = nan"),
        (lambda t: t.generate([]), "there is no prompt"),
        (lambda t: t.generate(["a", 3]), "prompt = 3: give text"),
        (lambda t: t.generate("caf\udce9"), r"prompt = .* is not valid UTF-8"),
        (lambda t: t.chat([{"role": "user", "content": "\ud800"}], tokens=4), "messages = .* is not valid UTF-8"),
        (lambda t: t.chat([{"role": "user", "content": "a"}], tokens=64), "tokens = 64 leaves no room for a prompt"),
        (lambda t: t.chat([{"role": "user", "content": "a"}], tokens=4, seed=-1), "seed = -1"),
        (lambda t: t.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "without a turn of the user"),
        (lambda t: t.chat([{"role": "robot", "content": "a"}]), "role 'robot'"),
        (lambda t: t.evaluate("missing.jsonl"), "missing.jsonl"),
        (lambda t: t.evaluate(batches=-1), "--batches -1"),
        (lambda t: slimmoe_jax.load("nowhere"), "nowhere holds no run"),
    ],
)
def test_mistakes_are_one_line(trained, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(trained)
    assert "\n" not in str(error.value)
