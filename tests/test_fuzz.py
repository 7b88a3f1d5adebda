"""Whatever a file holds, a reader succeeds or says in one line what is wrong: never a traceback, never a hang."""

import datetime
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from slimmoe_jax import config as config_lib
from slimmoe_jax import convert, validation
from slimmoe_jax.config import DataConfig, InputError, ModelConfig, TrainConfig
from slimmoe_jax.conversion import configs
from slimmoe_jax.data import prepare, records, tokenizers

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

LIMITS = dict(deadline=datetime.timedelta(seconds=20), database=None, suppress_health_check=list(hypothesis.HealthCheck))
SETTINGS = hypothesis.settings(max_examples=500, derandomize=True, **LIMITS)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged_bytes(draw, content):
    """The content with a few bytes changed, left out or put in, or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "insert", "delete", "cut", "random"]))
        if kind == "insert" or not content:
            content[place:place] = draw(st.binary(max_size=5))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 20))]
        elif kind == "cut":
            del content[place:]
        else:
            content[place] = draw(st.integers(0, 255)) if kind == "random" else content[place] ^ 1 << draw(st.integers(0, 7))
    return bytes(content)


@st.composite
def damaged_json(draw, tree):
    """The tree with one value, wherever it is, replaced or left out or with a neighbour that nobody knows."""
    tree = json.loads(json.dumps(tree))
    node, path = tree, []
    while isinstance(node, (dict, list)) and node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        path.append((node, key))
        node = node[key]
        if draw(st.booleans()):
            break
    parent, key = path[-1]
    match draw(st.sampled_from(["replace", "delete", "add"])):
        case "delete":
            del parent[key]
        case "add" if isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = draw(JSON)
        case _:
            parent[key] = draw(JSON)
    return json.dumps(tree).encode()


def one_line(read):
    """Runs a reader; what it says is one line that is not empty."""
    try:
        read()
    except InputError as error:
        message = " ".join(str(error).split())
        assert message
        return True
    return False


def try_all(examples, read):
    """Tries the examples; damage must be noticed now and then, or nothing was tried."""
    refused = []
    SETTINGS(hypothesis.given(examples)(lambda content: refused.append(one_line(lambda: read(content)))))()
    assert sum(refused) > 5
    print(f"{len(refused)} inputs, {sum(refused)} refused")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of small records."""
    path = tmp_path_factory.mktemp("fuzz")
    rows = [{"text": f"Document {n}: " + " ".join(f"word{(n * 7 + i) % 50}" for i in range(40))} for n in range(60)]
    (path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(
        source=str(path / "text.jsonl"), tokenizer="sentencepiece", train_tokenizer=300, context=32, validation_fraction=0.1
    )
    prepare.prepare(data, path / "records", workers=1)
    return path


@pytest.mark.parametrize("strategy", [damaged_bytes, damaged_json], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["config", "manifest", "tokenizer", "hugging face config"])
def test_json_files(prepared, tmp_path, name, strategy):
    if name == "config":
        path, content = tmp_path / "config.json", config_lib.to_json(TrainConfig())

        def read():
            validation.validate(config_lib.load(path))

    elif name == "manifest":
        folder = tmp_path / "records"
        shutil.copytree(prepared / "records", folder)
        path, content = folder / "manifest.json", json.loads((folder / "manifest.json").read_text())

        def read():
            opened = records.open_records(folder, 32, ModelConfig(vocab_size=300))
            next(records.batches(opened.split("train"), 2, seed=0))

    elif name == "tokenizer":
        folder = tmp_path / "run"
        tokenizers.save(tokenizers.saved(prepared / "records"), folder)
        path, content = folder / "tokenizer.json", json.loads((folder / "tokenizer.json").read_text())

        def read():
            tokenizers.saved(folder, 300)

    else:
        path = tmp_path / "config.json"
        router = {"threshold": np.float32(0.4), "l1_weight": np.float32(1e-8)}
        content = configs.to_hf(TrainConfig(), tokenizers.load("gpt2"), router, "float32")

        def read():
            model, context = configs.from_hf(convert._json(path), str(path))
            validation.validate(TrainConfig(model=model, data=DataConfig(context=context)))

    examples = strategy(json.dumps(content).encode() if strategy is damaged_bytes else content)

    def attempt(changed):
        path.write_bytes(changed)
        read()

    try_all(examples, attempt)


@pytest.mark.parametrize("format", ["text", "chat", "multiple_choice"])
def test_rows_of_jsonl(tmp_path, format):
    def row(n):
        return {
            "text": {"text": f"some text that is long enough, number {n}, for several records of sixteen tokens each"},
            "chat": {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello"}]},
            "multiple_choice": {"query": f"Question: {n}?", "choices": ["a", "b"], "gold": 1},
        }[format]

    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    good = [json.dumps(row(n)).encode() for n in range(40)]
    data = DataConfig(source=str(path), format=format, tokenizer="gpt2", context=24, validation_fraction=0.3)

    def attempt(changed):
        shutil.rmtree(out, ignore_errors=True)
        path.write_bytes(b"\n".join([*good, changed, changed]))
        prepare.prepare(data, out, workers=1)

    refused = []
    examples = damaged_json(row(0)) | damaged_bytes(good[0])
    settings = hypothesis.settings(SETTINGS, max_examples=60)
    settings(hypothesis.given(examples)(lambda content: refused.append(one_line(lambda: attempt(content)))))()
    assert len(refused) >= 60 and sum(refused) < 30, "bad rows are counted, and the rest of the data used"
    print(f"{len(refused)} inputs, {sum(refused)} refused")


def test_safetensors(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    numpy_io.save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}, path)
    content = path.read_bytes()

    def attempt(changed):
        path.write_bytes(changed)
        convert.read_tensors(tmp_path)

    try_all(damaged_bytes(content), attempt)


def test_an_index_cannot_leave_its_folder(tmp_path):
    for held in ({"a": "../secret"}, {"a": "/etc/passwd"}, {}, None, {"a": 3}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
        with pytest.raises(InputError, match="outside its folder|missing or damaged"):
            convert.read_tensors(tmp_path)


def test_a_manifest_cannot_leave_its_folder(prepared, tmp_path):
    shutil.copytree(prepared / "records", tmp_path / "records")
    manifest = json.loads((tmp_path / "records" / "manifest.json").read_text())
    for file in ("../train.npy", "/tmp/train.npy", "deeper/train.npy"):
        manifest["splits"]["train"]["files"][0]["file"] = file
        (tmp_path / "records" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="outside its folder"):
            records.open_records(tmp_path / "records")


# --- the corpus of the coverage-guided fuzzer --------------------------------------------------------------------------

_SPEC = importlib.util.spec_from_file_location("fuzz_run", Path(__file__).parent / "fuzz" / "run.py")
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_the_corpus_crashes_no_reader(reader):
    """Small inputs of every kind, and those that once crashed a reader."""
    assert fuzz.replay(reader) >= 1


@st.composite
def damaged_lines(draw, content):
    """JSON, or lines of JSON, of which one has a value replaced, left out or added; other content is damaged in its bytes."""
    lines = content.splitlines()
    number = draw(st.integers(0, max(len(lines) - 1, 0)))
    try:
        lines[number] = draw(damaged_json(json.loads(lines[number])))
    except (ValueError, IndexError):
        return draw(damaged_bytes(content))
    return b"\n".join(lines)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damage_crashes_no_reader(reader, tmp_path):
    """The corpus with damage that Hypothesis picks; `--hypothesis-profile long` tries more, other ones with each seed."""
    inputs = [file.read_bytes() for file in sorted((fuzz.CORPUS / reader).iterdir())]
    long = hypothesis.settings.get_current_profile_name() == "long"
    settings = hypothesis.settings(max_examples=5_000 if long else 100, derandomize=not long, **LIMITS)
    attempt = fuzz.READERS[reader](tmp_path)
    examples = st.sampled_from(inputs).flatmap(lambda content: damaged_bytes(content) | damaged_lines(content))
    refused = []
    settings(hypothesis.given(examples)(lambda content: refused.append(fuzz.checked(attempt, content))))()
    assert len(refused) >= settings.max_examples
    print(f"{len(refused)} inputs, {sum(refused)} refused")
