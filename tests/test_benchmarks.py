"""The benchmarks' logic, at sizes where a time means nothing: tables are whole, predictions are right, checks stop the program."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from slimmoe_jax import config as config_lib

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def table(text):
    """The rows of the one table in what a benchmark printed, each a dictionary or, of equal columns, a list; numbers finite."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rule) == {"---"} and rows
    for row in rows:
        assert len(row) == len(head)
        assert not re.search(r"\b(nan|inf)\b", " ".join(row))
        assert all(math.isfinite(number(cell)) for cell in row if re.match(r"[-+\d]", cell))
    return head, rows


def number(cell):
    """The first number of a cell."""
    return float(re.match(r"[-+]?[\d,]+(\.\d+)?", cell)[0].replace(",", ""))


def test_gpu_benchmarks_need_no_packages_that_gpu_images_lack():
    lacking = ("tyro", "grain", "datasets", "torch", "transformers")
    program = f"""
import sys
class Lacking:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {lacking}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Lacking())
sys.path.insert(0, {str(BENCHMARKS)!r})
import growth, decode, precision
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=BENCHMARKS.parent)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,4},{1,5}}, ", 2),
        ("replica_groups=[2,4]<=[8], ", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2'}, ", 4),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([8,8]T(1,0)) {'axis_0','axis_2'}, ", 16),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}, ", 2),
        ("replica_groups={}, ", 32),
        ("source_target_pairs={{0,1}}, ", 32),
    ],
)
def test_groups_of_collectives_are_counted(load, monkeypatch, groups, size):
    monkeypatch.setattr(sys, "argv", ["collectives", "--devices", "32"])
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # which the program sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    collectives = load("collectives")
    line = f"  %x = (f32[4,8]{{1,0}}, bf16[8]{{0}}) all-gather(%y), {groups}metadata={{}}"
    assert collectives.collectives(line) == {("all-gather", size): [144]}
    with pytest.raises(ValueError, match="unknown form"):
        collectives.group_size("replica_groups=other")


# --- growth ----------------------------------------------------------------------------------------------------------


def tiny(config):
    """A model that compiles in a second."""
    changes = {"model.layers": 2, "model.width": 16, "model.head_dim": 8, "model.heads": 2, "model.expert_hidden": 16}
    return config_lib.override(config, changes | {"model.vocab_size": 64, "data.context": 16, "data.batch_size": 2})


def test_growth_predicts_time_as_computed_by_hand(load, monkeypatch):
    growth = load("growth")
    base = growth.base_config(gpu=False)
    # width 128, 4 heads of 32, 2 kv heads, 2 of 4 experts of 256, vocabulary 4,096, context 256
    head = 4_096 * 128
    layer = 2 * 128 * 128 + 2 * 128 * 2 * 32 + 128 * 4 + 2 * (2 * 128 * 256)
    square = 12 * 128 * 256
    blocks = square * (1 + 2 + 3 + 4) / 16  # of it, four blocks of queries compute so much
    tokens = 4 * 256
    for layers in (2, 4):
        expected = tokens * (6 * (head + layers * layer) + layers * blocks)
        assert growth.step_flops(growth.sized(base, "layers", layers)) == expected
    ratio = (6 * (head + 4 * layer) + 4 * blocks) / (6 * (head + 2 * layer) + 2 * blocks)
    assert ratio == pytest.approx(1.4582, abs=1e-4)
    assert growth.step_flops(growth.sized(base, "batch", 8)) == 2 * growth.step_flops(base)
    assert growth.step_flops(growth.sized(base, "experts", 8)) == growth.step_flops(base) + tokens * 6 * 4 * (128 * 4)  # routers
    monkeypatch.setattr(growth.attention, "resolve_kernel", lambda *_: "cudnn")  # half the square
    assert growth.step_flops(base) == tokens * (6 * (head + 4 * layer) + 4 * square / 2)


def test_growth_predicts_memory_as_computed_by_hand(load):
    growth = load("growth")
    base = growth.base_config(gpu=False)
    two, four = (growth.step_memory(growth.sized(base, "batch", batch)) for batch in (2, 4))
    parameters = 2 * 4_096 * 128 + 4 * (2 * 128 * 128 + 2 * 128 * 2 * 32 + 128 * 4 + 4 * 2 * 128 * 256) + 128 * (2 * 4 + 1)
    fixed = 16 * parameters + 2 * 4 * 4_096 * 128  # weights, gradient, two moments; the head's gradient in a tile
    assert (two - fixed) * 2 == four - fixed  # all else goes with the tokens
    assert four / two == pytest.approx(1.4542, abs=1e-4)


def test_growth_starts_at_half_and_doubles(load):
    growth = load("growth")
    for gpu in (False, True):
        base = growth.base_config(gpu)
        for axis in growth.AXES:
            start = growth.start_of(base, axis)
            assert growth.sized(base, axis, start if axis == "experts" else 2 * start) == base
    assert sum(growth.metrics.parameter_counts(growth.base_config(gpu=True).model).values()) == 250_284_288


def test_growth_prints_a_row_for_each_size(load, capsys, monkeypatch):
    growth = load("growth")
    base = tiny(growth.base_config(gpu=False))
    monkeypatch.setattr(growth, "base_config", lambda gpu: base)
    growth.main(["--axes", "batch", "--doublings", "1", "--repeats", "2"])
    head, (first, second) = table(capsys.readouterr().out)
    assert (first[:2], second[:2]) == (["batch", "1"], ["batch", "2"])
    assert first[3] == "" and number(second[head.index("theory x")]) == 2
    assert number(second[3]) > 0 and number(second[6]) > 1


def test_growth_refuses_to_time_a_step_that_fails(load):
    growth = load("growth")
    base = tiny(growth.base_config(gpu=False))
    broken = dataclasses.replace(base, model=dataclasses.replace(base.model, init_std=float("nan")))
    with pytest.raises(SystemExit, match="not finite"):
        growth.measure([broken], repeats=1)


def test_growth_measures_a_row_in_a_process_of_its_own(load, capfd, monkeypatch):
    growth = load("growth")
    monkeypatch.setenv("XLA_FLAGS", "")
    (found,) = growth.measure_apart([tiny(growth.base_config(gpu=False))], repeats=2)
    assert len(found["seconds"]) == 2 and found["memory"] > 0 and found["peak"] == 0  # a CPU counts none
    failed = subprocess.CompletedProcess([], returncode=1, stdout="")
    monkeypatch.setattr(growth.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="exit code 1"):
        growth.measure_apart([growth.base_config(gpu=False)], repeats=1)

    def full(*_):
        raise growth.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(growth, "measure", full)
    assert growth.measure_one(json.dumps(config_lib.to_json(growth.base_config(gpu=False))), repeats=1) is None


# --- decode ----------------------------------------------------------------------------------------------------------

VARIANTS = ["--variants", "--layers", "2", "--width", "64", "--head-dim", "8", "--vocabulary", "64", "--prompt", "8"]
VARIANTS += ["--new", "4", "--repeats", "1"]


def test_decode_compares_variants(load, capsys, monkeypatch):
    decode = load("decode")
    monkeypatch.setattr(decode, "BATCHES", (2,))
    decode.main(VARIANTS)
    head, rows = table(capsys.readouterr().out)
    found = {row[head.index("attention")]: number(row[head.index("kv bytes a token")]) for row in rows}
    one = 2 * 8 * 4  # a key and a value of 8 numbers in float32
    assert found == {"MHA": one * 2 * 8, "GQA": one * 2 * 4, "VGQA": one * (4 + 1), "MQA": one * 2}
    counted = decode.metrics.kv_cache_bytes_per_token
    wrong = lambda config, itemsize: {**counted(config, itemsize), "vgqa": 1}  # noqa: E731
    monkeypatch.setattr(decode.metrics, "kv_cache_bytes_per_token", wrong)
    with pytest.raises(SystemExit, match="bytes a token"):
        decode.main(VARIANTS)
    assert "|---" not in capsys.readouterr().out


@pytest.mark.parametrize("layers, schedule", [(16, "4422111111112244"), (8, "42111124"), (32, 2 * "4422111111112244")])
def test_decode_keeps_the_cards_schedule(load, layers, schedule):
    decode = load("decode")
    args = decode.parse(["--variants", "--layers", str(layers)])
    assert "".join(map(str, decode.variants(args)["VGQA"].layer_kv_heads)) == schedule


def test_decode_compares_with_transformers_only_what_agrees(load, capsys, monkeypatch):
    pytest.importorskip("transformers")
    decode = load("decode")
    monkeypatch.setattr(decode, "BATCHES", (1,))
    argv = ["--layers", "1", "--width", "128", "--vocabulary", "64", "--prompt", "4", "--new", "4", "--repeats", "1"]
    decode.main(argv)
    _, rows = table(capsys.readouterr().out)
    assert {row[1].split(",")[0] for row in rows} == {"slimmoe_jax", "transformers"}
    convert = decode.names.to_theirs
    monkeypatch.setattr(decode.names, "to_theirs", lambda *args: {name: -1.5 * w for name, w in convert(*args).items()})
    with pytest.raises(SystemExit, match="tokens differ"):
        decode.main(argv)
    assert "|---" not in capsys.readouterr().out


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of documents, enough for records of both splits."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.jsonl"
    words = "the of a model expert token <|endoftext|> layer, and 1905 routes through naïve heads\n\n".split(" ")
    documents = (" ".join(draw.choices(words, k=400)) for _ in range(400))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def test_data_measures_a_peer_with_the_same_tokens(load, text, capsys, monkeypatch):
    data = load("data")
    monkeypatch.setattr(data, "READ_SECONDS", 0.05)
    monkeypatch.setattr(data, "PREPARE", ((1, 1),))
    monkeypatch.setattr(data, "READERS", (0,))
    sides = data.encoders()
    monkeypatch.setattr(data, "encoders", lambda: sides)
    argv = ["--source", str(text), "--megabytes", "1", "--characters", "0.1"]
    data.main(argv)
    head, rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows[:3]] == [data.OURS, data.FAST, data.PEER] and number(rows[2][2]) == 1
    assert len(rows) == 5 and all(number(row[1]) > 0 for row in rows)
    monkeypatch.setattr(data, "encoders", lambda: sides | {data.PEER: lambda texts: [ids[1:] for ids in sides[data.OURS](texts)]})
    with pytest.raises(SystemExit, match="differ"):
        data.main(argv)
    assert "|---" not in capsys.readouterr().out


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_run(text, tmp_path, monkeypatch):
    """A config file of a run that takes seconds."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.py"
    path.write_text(
        "from slimmoe_jax.config import *\n"
        "def get_config():\n"
        "    model = ModelConfig(layers=1, width=16, heads=2, head_dim=8, kv_heads=(1,), rotary=(1.0,), expert_hidden=16)\n"
        f"    data = DataConfig(source={str(text)!r}, context=32, batch_size=2, validation_fraction=0.05)\n"
        "    return TrainConfig(model=model, data=data, optim=OptimConfig(warmup_steps=1, schedule_steps=9))\n"
    )
    return path


def test_precision_prints_and_writes_the_curves(load, small_run, capsys, monkeypatch, tmp_path):
    precision = load("precision")
    sizes = ["--steps", "4", "--windows", "2", "--seeds", "3", "5", "8"]
    precision.main(["--config", str(small_run), "--out", str(tmp_path / "curves.csv"), *sizes])
    head, rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1 to 2", "3 to 4"]
    lines = np.array(list(csv.reader((tmp_path / "curves.csv").open()))[1:], float)
    assert lines[:, :2].tolist() == [[seed, n] for seed in (3, 5, 8) for n in (1, 2, 3, 4)]
    curves = lines[:, 2:].reshape(3, 2, 2, 3).mean(axis=2)  # seeds, windows, runs
    for window, row in enumerate(rows):
        assert number(row[1]) == pytest.approx(curves[:, window, 0].mean(), abs=1e-4)
        for cell, run in zip(row[2:], (1, 2), strict=True):
            gaps = curves[:, window, run] - curves[:, window, 0]
            low, high = scipy.stats.t.interval(0.95, 2, gaps.mean(), gaps.std(ddof=1) / 3**0.5)
            assert [number(part) for part in cell.split(" ± ")] == pytest.approx([gaps.mean(), (high - low) / 2], abs=1e-4)
    first = lines[lines[:, 1] == 1][:, 2:]
    assert (first[:, 1] != first[:, 0]).all() and (first[:, 2] != first[:, 0]).all()
    # The same weights and batches in a row, others in the next.
    assert np.abs(first - first[:, :1]).max() < 0.01 < np.ptp(first[:, 0])


def test_precision_stops_where_a_loss_is_no_number(load, small_run, capsys, monkeypatch):
    precision = load("precision")
    monkeypatch.setattr(precision.Training, "losses", lambda *_, **__: (np.full(4, np.nan), 1.0))
    with pytest.raises(SystemExit, match="float32, seed 7: the loss of step 1 is not finite"):
        precision.main(["--config", str(small_run), "--steps", "4", "--windows", "2", "--seeds", "7"])
    assert "|---" not in capsys.readouterr().out


def test_precision_reads_the_same_batches_for_the_same_seed(load):
    precision = load("precision")

    class Split:
        def __len__(self):
            return 10

        def batch(self, numbers):
            return {"tokens": numbers}

    def first(seed):
        reader = precision.batches(Split(), 4, seed)
        return [next(reader)["tokens"].tolist() for _ in range(4)]

    assert first(0) == first(0) != first(1)
    assert len(set(first(0)[0] + first(0)[1])) == 8  # nothing twice in an epoch
