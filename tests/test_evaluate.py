"""Evaluation: scores against a full softmax, accuracy by hand, prompts, contamination, and the command as a user runs it."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from slimmoe_jax import config as config_lib
from slimmoe_jax import contamination, digests, evaluate, heldout, likelihood, model, routing, sharding, step, tasks
from slimmoe_jax.config import DataConfig, InputError, MeshConfig, ModelConfig, TrainConfig
from slimmoe_jax.data import prepare, records
from slimmoe_jax.data.multiple_choice import Question
from slimmoe_jax.likelihood import Pair, Score

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = ModelConfig(
    vocab_size=50, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(0.5, 0.0), expert_hidden=24,
    dropout=0.0, init_std=0.2,
)  # fmt: skip
MODEL = model.SlimMoE(CONFIG)
ROUTER = routing.RouterState.initial(CONFIG)


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(lambda key: model.init(MODEL, key))(jax.random.key(0)))


@jax.jit
def logits_of(params, tokens):
    return MODEL.apply({"params": params}, tokens, ROUTER).logits()


def mesh_of(devices):
    names = ("data", "fsdp", "expert")
    return jax.make_mesh((devices, 1, 1), names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices])


# --- log-likelihood --------------------------------------------------------------------------------------------------


def some_pairs(lengths=((3, 5), (70, 2), (1, 1), (7, 1), (63, 9), (5, 80))):
    rng = np.random.default_rng(0)
    return [Pair(rng.integers(0, 50, a).tolist(), rng.integers(0, 50, b).tolist()) for a, b in lengths]


def full_softmax(params, pair):
    """One sequence at a time, no padding, the whole softmax in double precision."""
    ids = np.array([[*pair.given, *pair.scored]], np.int32)
    logits = np.asarray(logits_of(params, ids)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = range(len(pair.given) - 1, ids.shape[1] - 1)
    greedy = [int(log_p[row].argmax()) == ids[0, row + 1] for row in rows]
    return sum(log_p[row, ids[0, row + 1]] for row in rows), all(greedy)


def test_scores_equal_the_full_softmax_whatever_the_batch_and_the_devices(params):
    pairs = some_pairs()
    given = pairs[3].given
    pairs.append(Pair(given, [int(logits_of(params, np.array([given + [0]], np.int32))[0, 6].argmax())]))
    expected = [full_softmax(params, pair) for pair in pairs]
    assert [greedy for _, greedy in expected].count(True) >= 1
    for devices, batch_size in ((1, 1), (8, 3)):
        scores = likelihood.Scorer(MODEL, params, ROUTER, mesh_of(devices), batch_size)(pairs)
        np.testing.assert_allclose([s.log_likelihood for s in scores], [value for value, _ in expected], rtol=1e-4)
        assert [s.greedy for s in scores] == [greedy for _, greedy in expected]


def test_few_widths_are_compiled():
    widths = {likelihood.padded([pair], 2)["tokens"].shape for pair in some_pairs()}
    assert widths == {(2, 64), (2, 128)}


def test_loss_by_position_adds_up_to_the_held_out_loss(params):
    rng = np.random.default_rng(0)
    batches = [{"tokens": rng.integers(0, 50, (8, 33), np.int32), "weight": np.array([1.0] * 6 + [0.0] * 2, np.float32)}] * 2
    mesh = sharding.make_mesh(MeshConfig())
    for masked, packed in ((False, False), (True, False), (False, True)):
        config = TrainConfig(model=CONFIG, data=DataConfig(document_mask=masked))
        if packed:  # two examples a record, the second half of each to be predicted, and padding at the end
            segments = np.array([[1] * 12 + [2] * 16 + [0] * 5] * 8, np.int32)
            targets = np.array([[0] * 6 + [1] * 6 + [0] * 8 + [1] * 8 + [0] * 5] * 8, np.int32)
            batches = [batch | {"segments": segments, "targets": targets} for batch in batches]
        with sharding.use(mesh):
            whole = heldout.score(jax.jit(step.make_eval_step(config, MODEL, 1)), params, ROUTER, batches, mesh, 4.0)
            position_step = jax.jit(heldout.make_position_step(config, MODEL, 1))
            nats, targets = position_step(params, ROUTER, sharding.put_batch(batches[0], mesh))
        assert abs(float(nats.sum() / targets.sum()) - whole.loss) < 1e-5
        if packed:
            assert whole.tokens == 2 * targets.sum() == 2 * 6 * 14
            assert targets.tolist() == [0] * 5 + [6] * 2 + [12] * 4 + [6] * 4 + [0] * 17, (
                "positions count from each example's start"
            )
            continue
        assert whole.tokens == 2 * targets.sum() == 2 * 6 * 32
        assert masked == bool(targets[0] > 6), "positions count from where a document starts"
        if not masked:
            first = jax.nn.log_softmax(logits_of(params, batches[0]["tokens"][:6, :1])[:, 0])
            np.testing.assert_allclose(nats[0], -first[jnp.arange(6), batches[0]["tokens"][:6, 1]].sum(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["powers", "equal"])
@pytest.mark.parametrize("length", [1, 2, 32, 100, 2048])
def test_position_bins_cover_each_position_once(kind, length):
    covered = [p for first, last in heldout.position_bins(length, kind) for p in range(first, last + 1)]
    assert covered == list(range(length))


# --- tasks -----------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text):
        return list(text.encode())


def question(query="Question: q", choices=("a", "b"), gold=0, subject=""):
    return Question(query, tuple(choices), gold, subject)


def task_of(*questions):
    return tasks.Task("hand", Path("hand.jsonl"), "", len(questions), (), tuple(questions))


class Known:
    """A scorer with a table from the continuation's text to its log-likelihood."""

    def __init__(self, table):
        self.table, self.prompts = table, []

    def __call__(self, pairs, label):
        self.prompts += [bytes(pair.given).decode() for pair in pairs]
        return [Score(self.table[bytes(pair.scored).decode()], False) for pair in pairs]


def test_accuracy_of_a_case_worked_out_by_hand():
    """Sum takes "no" (-4 > -5); a mean over tokens, which here are bytes with the space, "perhaps" (-5/8 > -4/3)."""
    first = question(choices=("no", "perhaps"), gold=1, subject="x")
    # " é" is 3 tokens and 2 bytes of text, " abc" 4 tokens and 3 bytes: -6/3 = -2 < -7.8/4 = -1.95, but -6/2 = -3 < -7.8/3 = -2.6.
    second = question(choices=("é", "abc"), gold=1, subject="x")
    third = question(choices=("u", "v", "w", "z"), gold=2, subject="y")
    known = Known({" no": -4, " perhaps": -5, " é": -6, " abc": -7.8, " u": -1, " v": -2, " w": -0.5, " z": -3})
    result = tasks.evaluate(task_of(first, second, third), known, Bytes(), 100)
    assert {way: row["value"] for way, row in result["accuracy"].items()} == {"sum": 1 / 3, "token": 1, "byte": 1}
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    one_of_one = result["subjects"]["y"]["accuracy"]["sum"]  # Wilson: 1 / (1 + 1.96^2) at the least
    assert one_of_one == pytest.approx({"value": 1, "low": 0.20655, "high": 1}, abs=1e-5)
    assert result["subjects"]["x"]["accuracy"]["sum"]["value"] == 0 and result["subjects"]["x"]["questions"] == 2
    assert result["answer_bits_per_byte"] == pytest.approx((5 + 7.8 + 0.5) / math.log(2) / (7 + 3 + 1))


def test_bytes_are_those_of_the_answer_without_the_space_before_it():
    """-4/2 > -2.5/1 though -4/3 < -2.5/2."""
    result = tasks.evaluate(task_of(question(choices=("x", "xy"), gold=1)), Known({" x": -2.5, " xy": -4}), Bytes(), 100)
    assert result["accuracy"]["byte"]["value"] == 1
    result = tasks.evaluate(task_of(question(choices=("x", "xy"), gold=1)), Known({" x": -2.5, " xy": -5.5}), Bytes(), 100)
    assert result["accuracy"]["byte"]["value"] == 0


@pytest.mark.parametrize(("right", "questions"), [(500, 2000), (30, 120), (0, 7), (7, 7)])
def test_the_interval_of_an_accuracy_is_where_the_score_test_just_accepts(right, questions):
    """Wilson: the rates p from which the count is no more than 1.96 of p's own standard errors away."""
    for p in tasks.interval(right, questions):
        assert abs(right - questions * p) == pytest.approx(1.959964 * math.sqrt(questions * p * (1 - p)), abs=1e-5)
    low, high = tasks.interval(right, questions)
    assert 0 <= low < high <= 1


def test_prompts_in_both_styles_and_with_examples():
    asked, other = question("Question: Which?", ("no", "yes"), 0), question("Question: Before?", ("p", "q"), 1)
    shots = tasks.Shots(1, (asked, other))
    known = Known(dict.fromkeys((" no", " yes", " A", " B"), -1.0))
    tasks.evaluate(task_of(asked), known, Bytes(), 1000, shots=shots)
    assert known.prompts == ["Question: Before?\nAnswer: q\n\nQuestion: Which?\nAnswer:"] * 2
    known.prompts.clear()
    tasks.evaluate(task_of(asked), known, Bytes(), 1000, style="letters", shots=shots)
    listed = "Question: Before?\nA. p\nB. q\nAnswer: B\n\nQuestion: Which?\nA. no\nB. yes\nAnswer:"
    assert known.prompts == [listed] * 2


def test_examples_depend_on_the_seed_and_the_question_and_never_are_the_question():
    pool = tuple(question(f"Question: {n}", subject="ab"[n % 2]) for n in range(20))
    shots = tasks.Shots(5, pool, seed=3)
    chosen = [shots.of(n, asked) for n, asked in enumerate(pool)]
    assert chosen == [tasks.Shots(5, pool, seed=3).of(n, asked) for n, asked in enumerate(pool)]
    assert chosen != [tasks.Shots(5, pool, seed=4).of(n, asked) for n, asked in enumerate(pool)]
    for asked, examples in zip(pool, chosen, strict=True):
        assert len(set(examples)) == 5 and asked not in examples
        assert {example.subject for example in examples} == {asked.subject}
    mixed = tasks.Shots(12, pool).of(0, pool[0])
    assert {example.subject for example in mixed} == {"a", "b"}, "where one subject has too few"
    with pytest.raises(InputError, match="only 19 questions"):
        tasks.Shots(20, pool).of(0, pool[0])


def test_what_does_not_fit_is_dropped_then_cut_and_counted():
    asked = question("Question: " + "w" * 20, ("long answer", "a"), 0)  # a prompt of 38 bytes, answers of at most 12
    pool = tuple(question(f"Question: {n}", ("p", "q"), 1) for n in range(3))  # 21 bytes each, solved, and 2 between
    known = Known({" long answer": -1.0, " a": -2.0})

    def run(context):
        known.prompts.clear()
        result = tasks.evaluate(task_of(asked), known, Bytes(), context, shots=tasks.Shots(3, pool))
        assert len(set(known.prompts)) == 1, "all choices see the same prompt"
        assert all(len(prompt) + 12 <= context + 1 for prompt in known.prompts)
        return [result[key] for key in ("examples_dropped", "prompts_cut", "tokens_cut")], known.prompts[0]

    whole = 38 + 3 * 23
    assert run(whole + 11)[0] == [0, 0, 0]
    counts, prompt = run(whole + 10)
    assert counts == [1, 0, 0] and prompt.count("Answer: q\n\n") == 2 and prompt.endswith("\nAnswer:")
    counts, prompt = run(30)
    assert counts == [3, 1, 38 - 19] and prompt == "wwwwwwwwwww\nAnswer:"
    with pytest.raises(InputError, match="no question of hand.jsonl fits"):
        run(11)
    short = question("Question: s", ("a", "a"), 0)
    result = tasks.evaluate(task_of(asked, short), Known({" a": -1.0}), Bytes(), 11)
    assert result["too_long"] == 1 and result["questions"] == 1


def test_rows_of_all_schemas_and_files_are_read_and_bad_ones_counted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    plain = {"query": "Question: q", "choices": ["a", "b"], "gold": 1}
    mmlu = {"question": "q", "subject": "s", "choices": ["a", "b"], "answer": "B"}
    lines = [json.dumps(plain), json.dumps(mmlu), json.dumps({"train": mmlu | {"answer": 1}}), "", "{broken"]
    lines += [json.dumps(plain | {"gold": 2}), json.dumps(plain | {"choices": ["\ud800", "b"]})]
    text = "\n".join(lines).encode()
    (tmp_path / "t.jsonl").write_bytes(text)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "t.jsonl.zst").write_bytes(zstandard.compress(text))
    for suffix in ("", ".gz", ".zst"):
        task = tasks.read(tmp_path / f"t.jsonl{suffix}")
        assert task.name == "t" and task.rows == 6
        assert task.questions == (
            question(gold=1), question(gold=1, subject="s"), question(gold=1, subject="s"),
        )  # fmt: skip
        assert [text.partition(":")[0] for text in task.invalid] == ["row 5", "row 6", "row 7"]
        assert "not JSON" in task.invalid[0] and "gold = 2" in task.invalid[1] and "not Unicode" in task.invalid[2]
    pq.write_table(pa.Table.from_pylist([{"train": mmlu | {"answer": n % 2}} for n in range(5)]), tmp_path / "p.parquet")
    assert [q.gold for q in tasks.read(tmp_path / "p.parquet").questions] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["eval/arc_easy", "eval/piqa", "eval/boolq", "mcq_val"])
def test_real_files_are_read_whole(name):
    folder = os.environ.get("SLIMMOE_DATA")
    if not folder:
        pytest.skip("SLIMMOE_DATA is not set")
    task = tasks.read(f"{folder}/{name}.jsonl.zst")
    assert len(task.questions) == task.rows > 300 and not task.invalid


# --- contamination ---------------------------------------------------------------------------------------------------


def make_run(folder, source, init_from="", split=""):
    folder.mkdir(parents=True)
    config = TrainConfig(init_from=str(init_from), data=DataConfig(source=source, split=split, records=str(folder / "none")))
    config_lib.save(config, folder / "config.json")
    return config


def test_contamination_is_found_along_the_chain_of_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "pretrain", "hub:HuggingFaceFW/fineweb-edu:sample-10BT")
    make_run(tmp_path / "v1", "hub:HuggingFaceH4/ultrachat_200k", "pretrain/best")
    make_run(tmp_path / "v2", "hub:cais/mmlu:auxiliary_train", tmp_path / "v1" / "500")
    last = make_run(tmp_path / "v3", "hub:teknium/OpenHermes-2.5", "v2/checkpoints/70")
    behind, lost = contamination.stages(tmp_path / "v3", last)
    assert [Path(stage.run).name for stage in behind] == ["v3", "v2", "v1", "pretrain"] and not lost
    file = tmp_path / "task.jsonl"
    file.write_text("{}")
    for name in ("arc_easy", "ARC-Challenge", "openbookqa", "obqa_test", "race", "mctest", "mc_test"):
        reason = contamination.contaminated_by(name, file, behind)
        assert "v2 was trained on hub:cais/mmlu:auxiliary_train" in reason, name
        assert not contamination.contaminated_by(name, file, behind[2:]), "before that stage it was clean"
    for name in ("piqa", "boolq", "march", "embrace", "mmlu"):
        assert not contamination.contaminated_by(name, file, behind), name


@pytest.mark.parametrize(
    "source", ["/mirror/cais/mmlu/all", "mcq.jsonl.zst", "hub:someone/mmlu-copy", "/d/auxiliary_train.parquet"]
)
def test_mirrors_of_auxiliary_train_are_known_by_their_names(tmp_path, source):
    behind, _ = contamination.stages(tmp_path / "run", make_run(tmp_path / "run", source))
    assert contamination.contaminated_by("arc_easy", tmp_path, behind)


def test_a_checkpoint_that_forgot_where_it_came_from_is_helped_by_its_folder(tmp_path):
    make_run(tmp_path / "first", "hub:cais/mmlu")
    make_run(tmp_path / "second", "stdlib", tmp_path / "first")
    behind, _ = contamination.stages(tmp_path / "second", TrainConfig())
    assert contamination.contaminated_by("arc_easy", tmp_path, behind)


def test_a_lost_stage_is_named_and_a_cycle_ends(tmp_path):
    config = make_run(tmp_path / "late", "stdlib", tmp_path / "gone" / "best")
    assert contamination.stages(tmp_path / "late", config)[1] == str(tmp_path / "gone" / "best")
    make_run(tmp_path / "a", "stdlib", tmp_path / "b")
    behind, lost = contamination.stages(tmp_path / "b", make_run(tmp_path / "b", "stdlib", tmp_path / "a"))
    assert [Path(stage.run).name for stage in behind] == ["b", "a"] and not lost


def test_training_on_the_very_file_contaminates(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/own.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text('{"query": 1}')
    (tmp_path / "other.jsonl").write_text('{"query": 2}')
    mixed = TrainConfig(data=DataConfig(source="stdlib", mix=(f"0.5:multiple_choice:{tmp_path}/data/own.jsonl",)))
    config_lib.save(mixed, tmp_path / "config.json")
    for source in (str(tmp_path / "data/own.jsonl"), str(tmp_path / "data"), mixed):
        config = source if source is mixed else TrainConfig(data=DataConfig(source=source))
        behind, _ = contamination.stages(tmp_path, config)
        assert contamination.contaminated_by("own", tmp_path / "data/own.jsonl", behind)
        assert contamination.contaminated_by("copy", tmp_path / "copy.jsonl", behind), "a copy is the same questions"
        assert not contamination.contaminated_by("other", tmp_path / "other.jsonl", behind)


# --- the command -----------------------------------------------------------------------------------------------------

TINY = """
from slimmoe_jax.config import *

def get_config():
    return TrainConfig(
        name="tiny", steps=2, compilation_cache="~/.cache/slimmoe_jax/xla-tests",
        model=ModelConfig(vocab_size=300, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0),
                          expert_hidden=32),
        data=DataConfig(source="mmlu.jsonl", text_field="question", records="records", tokenizer="sentencepiece",
                        train_tokenizer=300, context=32, batch_size=8, validation_fraction=0.1),
        optim=OptimConfig(warmup_steps=1),
        eval=EvalConfig(every=0, batches=2, sample_tokens=0),
    )
"""


def python(folder, *words):
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps on text drawn from questions, and two files of questions."""
    path = tmp_path_factory.mktemp("evaluate")
    (path / "tiny.py").write_text(TINY)
    rows = [
        {"question": f"Which is number {n}, after " + " ".join(f"word{(n * 7 + i) % 50}" for i in range(60)) + "?"}
        for n in range(120)
    ]
    (path / "mmlu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks_rows = [{"query": f"Question: {n} and?", "choices": [f"word{n}", "word", "x"], "gold": n % 3} for n in range(14)]
    (path / "arc.jsonl").write_text("\n".join(map(json.dumps, tasks_rows)) + "\n{bad\n")
    subjects = [row | {"subject": "ab"[n >= 10]} for n, row in enumerate(tasks_rows)]
    (path / "other.jsonl").write_text("\n".join(map(json.dumps, subjects)))
    (path / "empty.jsonl").write_text("")
    done = python(path, "slimmoe_jax.train", "--config", "tiny.py", "--workdir", "run", "--mesh.data", "2")
    assert done.returncode == 0, done.stderr
    return path


def test_the_command_prints_a_table_and_json_with_its_provenance(folder):
    words = ["--checkpoint", "run", "--tasks", "arc.jsonl", "other.jsonl", "--shots", "1", "--by-position", "--seed", "1"]
    done = python(folder, "slimmoe_jax.evaluate", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["command"] == "python -m slimmoe_jax.evaluate " + " ".join(words)
    assert result["step"] == 2 and result["versions"]["jax"] == jax.__version__ and len(result["weights_sha256"]) == 64
    assert result["tokenizer"]["fingerprint"] == json.loads((folder / "run" / "tokenizer.json").read_text())["fingerprint"]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"])) and 0 < result["bits_per_byte"] < 8
    assert [row["first"] for row in result["by_position"]] == [0, 1, 2, 4, 8, 16]
    assert sum(row["targets"] for row in result["by_position"]) == result["tokens"]
    arc, other = result["tasks"]
    assert (arc["questions"], arc["invalid"], arc["rows"]) == (14, 1, 15) and arc["chance"] == pytest.approx(1 / 3)
    assert "mmlu.jsonl" in arc["contaminated_by"] and "contaminated_by" not in other
    assert {name: row["questions"] for name, row in other["subjects"].items()} == {"a": 10, "b": 4} and arc["sha256"] != other[
        "sha256"
    ]
    for words in (
        "\n  a  ",
        "1 subject(s) of fewer than 10 questions",
        "arc*",
        "arc is contaminated",
        "1 of 15 rows are no questions: row 15: not JSON",
        "perplexity",
        "33.3%",
    ):
        assert words in done.stderr
    again = python(folder, "slimmoe_jax.evaluate", "--checkpoint", "run/2", "--out", "held.json")
    assert again.returncode == 0 and not again.stdout, again.stderr
    held = json.loads((folder / "held.json").read_text())
    assert held["weights_sha256"] == result["weights_sha256"] and "tasks" not in held and "by_position" not in held
    assert held["loss"] == pytest.approx(result["loss"], abs=1e-5) and held["tokens"] == result["tokens"]


def test_the_fingerprint_is_of_names_types_and_values(params):
    whole = digests.fingerprint(params, ROUTER)
    assert whole == digests.fingerprint(jax.tree.map(np.asarray, params), ROUTER)
    assert whole != digests.fingerprint(params | {"head": params["head"].at[0, 0].add(1e-6)}, ROUTER)
    assert whole != digests.fingerprint(params, ROUTER.replace(threshold=ROUTER.threshold + 0.1))


def test_two_flags_may_stand_without_a_value():
    args = evaluate.parse(["--checkpoint", "run", "--held-out", "--tasks", "a", "b", "--by-position"])
    assert args.held_out and args.by_position == "powers" and args.tasks == ("a", "b")
    assert evaluate.parse(["--by-position", "equal", "--checkpoint", "run"]).by_position == "equal"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "absent.jsonl"], "absent.jsonl is not a file"),
        (["--tasks", "empty.jsonl"], "empty.jsonl holds no question (it is empty)"),
        (["--tasks", "mmlu.jsonl"], "mmlu.jsonl holds no question (the first of 120 rows, row 1: "),
        (["--tasks", "tiny.py"], "must end in one of .jsonl"),
        (["--tasks", "arc.jsonl", "--style", "essay"], "--style"),
        (["--tasks", "arc.jsonl", "--shots", "-1"], "--shots -1"),
        (["--tasks", "arc.jsonl", "--shots-from", "other.jsonl"], "--shots-from needs --shots"),
        (["--shots", "2"], "--tasks"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--out", "absent/results.json"], "--out absent/results.json"),
        (["--out", "run"], "--out run is a folder"),
        (["--checkpoint", "absent"], "holds no run"),
        (["--checkpoint", ""], "--checkpoint is missing"),
        (["--records", "absent"], "absent holds no records"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, flags, message):
    """In this process, through the same wrapper as the command's; one of them as a process below."""
    from slimmoe_jax import cli

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", "run", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out
    assert output.err.count("\n") == 1 and output.err.startswith("error: ") and message in output.err


def test_the_process_ends_with_2_on_bad_input(folder):
    done = python(folder, "slimmoe_jax.evaluate", "--checkpoint", "run", "--tasks", "absent.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "absent.jsonl" in done.stderr


def test_held_out_questions_are_those_of_no_training_record(tmp_path):
    rows = [{"question": f"Which is number {n}?", "subject": "", "choices": [f"{n}", f"{n + 1}"], "answer": 0} for n in range(200)]
    (tmp_path / "mcq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(source=str(tmp_path / "mcq.jsonl"), format="multiple_choice", context=64, validation_fraction=0.2)
    manifest = prepare.prepare(data, tmp_path / "records", workers=1)
    task = tasks.held_out(data)
    assert len(task.questions) == manifest["splits"]["validation"]["documents"] > 10 and task.rows == 200
    found = records.open_records(tmp_path / "records")
    text = found.tokenizer().decode(found.split("train").batch(np.arange(len(found.split("train"))))["tokens"].ravel())
    assert "Which is number" in text and not any(question.query in text for question in task.questions)
    with pytest.raises(InputError, match="data.format = text, which holds no questions"):
        tasks.held_out(DataConfig())
