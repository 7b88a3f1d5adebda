"""What is measured of a run, against the plainest way to it; and the report of one run and of two."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import checkpoint, cli, metrics, report, sharding, state, train
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    InputError,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    TrainConfig,
)
from slimmoe_jax.data import records as records_lib
from slimmoe_jax.study import figures, measure, pages
from slimmoe_jax.study.measure import Effort

CONTEXT = 24  # of which 4 times are not a multiple of the widths that are computed
SMALL = Effort(stream_rows=5, probe_rows=2, batch_rows=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


def small_config(folder, name, **changes):
    config = TrainConfig(
        name=name, workdir=str(folder / name), steps=6, log_every=2, compilation_cache="",
        model=ModelConfig(
            vocab_size=600, layers=2, width=16, heads=2, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0), expert_hidden=16,
            dropout=0.0, router=RouterConfig(kind="top_k", max_experts=2),
        ),
        data=DataConfig(
            source="stdlib", records=str(folder / "records"), tokenizer="sentencepiece", train_tokenizer=600, context=CONTEXT,
            batch_size=8, validation_fraction=0.02,
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(every=3, keep_last=3, keep_best=False),
        eval=EvalConfig(every=0, batches=2, sample_tokens=0),
    )  # fmt: skip
    return config_lib.override(config, changes)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def run(folder, mesh):
    config = small_config(folder, "moe")
    assert train.train(config, mesh) == 0
    return folder / "moe"


@pytest.fixture(scope="module")
def dense(folder, mesh, run):
    config = small_config(folder, "dense", **{"model.experts": 1, "model.router.max_experts": 1, "seed": 1})
    assert train.train(config, mesh) == 0
    return folder / "dense"


@pytest.fixture(scope="module")
def texts(folder):
    path = folder / "texts.jsonl"
    rows = [{"text": f"{word} " * 400, "source": f"{word}/part"} for word in ("print", "class")] + [
        {"text": "short", "source": "x"}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def measured(run, mesh, texts):
    return measure.measure(run, mesh, dataclasses.replace(SMALL, texts=str(texts)))


def stream_by_hand(run):
    """[5, 97]: four consecutive held-out records each, spread over the split, read from its files."""
    manifest = json.loads((run.parent / "records" / "manifest.json").read_text())
    files = [np.load(run.parent / "records" / file["file"]) for file in manifest["splits"]["validation"]["files"]]
    held_out = np.concatenate(files)
    starts = [int(n) for n in np.linspace(0, len(held_out) - 4, 5)]
    return np.stack([held_out[start : start + 4].ravel()[: 4 * CONTEXT + 1] for start in starts]).astype(np.int32)


def test_loss_by_position_is_that_of_the_plain_model_on_longer_text(run, mesh, measured):
    loaded, tokens = checkpoint.load_run(run, mesh), stream_by_hand(run)
    out = state.build_model(loaded.config).apply({"params": loaded.params}, tokens[:, :-1], loaded.router)
    log_probabilities = jax.nn.log_softmax(out.logits())
    nats = -np.asarray(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))[..., 0]
    for name, first, last in (("loss_1x", 0, 24), ("loss_2x", 24, 48), ("loss_4x", 48, 96)):
        assert measured[name] == pytest.approx(nats[:, first:last].mean(), rel=1e-4)
    for row in measured["by_position"]:
        assert row["loss"] == pytest.approx(nats[:, row["first"] : row["last"] + 1].mean(), rel=1e-4)
    places = [place for row in measured["by_position"] for place in range(row["first"], row["last"] + 1)]
    assert places == list(range(4 * CONTEXT))


def test_routing_is_that_of_the_plain_model(run, mesh, measured):
    loaded, tokens = checkpoint.load_run(run, mesh), stream_by_hand(run)
    model = state.build_model(loaded.config)
    chosen = np.asarray(model.apply({"params": loaded.params}, tokens[:, :-1], loaded.router).chosen)
    assert chosen.shape == (2, 5, 4 * CONTEXT, 4) and (chosen.sum(axis=-1) == 2).all()
    assert all(row["experts"] == 2 for row in measured["experts_by_frequency"])
    earlier = checkpoint.load_run(run / "3", mesh)
    before = np.asarray(model.apply({"params": earlier.params}, tokens[:, :-1], earlier.router).chosen)
    share = (chosen & before).sum() / chosen.sum()
    assert [row["step"] for row in measured["saturation"]] == [3]
    assert measured["saturation"][0]["mean"] == pytest.approx(share, abs=1e-3)


def test_sources_are_told_apart_by_their_routing(measured):
    found = measured["by_source"]
    assert found["sources"] == ["class", "print"]  # "x" has too little text
    load = np.array(found["load"])
    assert load.shape == (2, 2, 4)
    np.testing.assert_allclose(load.sum(axis=-1), 1, atol=1e-4)
    assert 0 <= found["specialisation"] <= 1


def test_training_is_summed_up(run, measured):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert measured["validation_loss"] == rows[-1]["validation_loss"] and measured["step"] == 6
    assert measured["tokens"] == 6 * 8 * CONTEXT and measured["skipped"] == 0
    assert measured["seconds"] > 0 and measured["peak_memory_bytes"] > 1e8
    # A single row of the log is the last tenth of three.
    assert measured["max_violation"] == pytest.approx(np.mean(rows[-1]["max_violation"]), rel=1e-5)


def test_a_report_is_written_and_its_measures_are_kept(run, texts, monkeypatch, capsys):
    assert report.main([str(run), "--texts", str(texts)]) == 0
    assert "report.html" in capsys.readouterr().out
    text, html = ((run / "report" / f"report.{form}").read_text() for form in ("md", "html"))
    assert "# Run: moe" in text and "Load of the experts by layer and step: moe." in text
    assert html.count("data:image/png;base64,") == text.count("![") >= 8

    def again(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(measure, "measure", again)
    assert report.main([str(run), "--texts", str(texts)]) == 0


def test_runs_side_by_side_say_what_differs(run, dense, folder):
    assert report.main([str(run), str(dense), "--out", str(folder / "both")]) == 0
    text = (folder / "both" / "report.md").read_text()
    assert "# Runs: moe, dense" in text
    assert "| `model.experts` | 4 | 1 |" in text and "| `seed` | 0 | 1 |" in text and "`workdir`" not in text
    assert re.search(r"\| dense \| [\d.]+ \| [+-][\d.]+ \|", text)  # a difference, and no interval of one seed


def test_bad_input_is_one_line(run, folder, tmp_path):
    for argv, message in (
        ([], "no run is named"),
        ([str(run), str(run)], "named twice"),
        ([str(tmp_path)], "no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            report.main(argv)


def refused(capsys, *argv):
    """The line of a refusal with exit code 2, the last behind any remarks."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["report", *map(str, argv)])
        patch.setattr(sys, "stderr", sys.stderr)  # which the command wraps
        cli.run(report.main)
    *remarks, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("error: "), error
    assert not any(line.startswith(("error: ", "Traceback")) for line in remarks), remarks
    return error


def test_a_run_without_a_checkpoint_is_named(run, tmp_path, capsys):
    """Killed, or still training, before its first one; or weights alone, which convert makes."""
    for name, folders in (("begun", ["checkpoints"]), ("bare", [])):
        for folder in folders:
            (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(run / "config.json", tmp_path / name)
        for runs in ([tmp_path / name], [run, tmp_path / name, "--out", tmp_path / "out"]):
            assert refused(capsys, *runs) == f"error: {tmp_path / name} has no checkpoint yet: wait for its first, or train it"
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(["config.json", *folders])
    shutil.copytree(run, tmp_path / "weights", ignore=shutil.ignore_patterns("metrics.jsonl"))
    assert "weights has weights but no metrics.jsonl" in refused(capsys, tmp_path / "weights")
    assert not (tmp_path / "out").exists()


def test_a_damaged_log_or_result_is_one_line_or_is_measured_again(run, tmp_path, capsys, monkeypatch):
    whole = shutil.copytree(run, tmp_path / "whole", ignore=shutil.ignore_patterns("report"))
    kept = json.loads((whole / "result.json").read_text())
    damages = ("[]", "[" * 100_000, "NaN", "", '"text"', json.dumps(kept | {"loss_1x": float("nan")}))
    damages += tuple(json.dumps(kept | {name: "x"}) for name in ("probes", "by_position", "parameters", "classes", "saturation"))
    measured = []
    monkeypatch.setattr(measure, "measure", lambda *_: measured.append(1) or kept)
    monkeypatch.setattr(pages, "run_report", lambda shown, out: out)
    for text in damages:
        (whole / "result.json").write_text(text)
        assert report.main([str(whole)]) == 0
        assert "result.json is damaged (" in capsys.readouterr().err
    assert len(measured) == len(damages) and json.loads((whole / "result.json").read_text()) == kept
    assert report.main([str(whole)]) == 0 and len(measured) == len(damages), "a whole one is kept"
    log = whole / "metrics.jsonl"
    rows = log.read_text()
    for text in ("", "\ufffe{", "[1]\n", '{"step": 1}\n', '{"step": "x", "tokens_per_second": []}\n'):
        log.write_text(text)
        assert "metrics.jsonl has no row of a training step" in refused(capsys, whole)
    log.write_text('[1]\n{"step": 1, "tokens_per_second": {}, "load": 3}\n' + rows)
    assert report.main([str(whole)]) == 0


def test_a_log_that_others_have_written_to_is_drawn(run, tmp_path):
    """Rows of other forms between those of the run, in what pages and figures read."""
    rows = metrics.read_jsonl(run / "metrics.jsonl")
    strange = [
        {"step": 1, "tokens_per_second": 1.0, "load": load, "loss": "x", "max_violation": [None]} for load in ([[1]], "x", None)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*strange, *rows]))
    config = config_lib.load(run)
    found = measure.training(tmp_path, config, 6)
    assert found["validation_loss"] == rows[-1]["validation_loss"]
    assert measure.curve(tmp_path, config)["loss"].tolist() == [row["loss"] for row in rows]
    assert figures.load_maps(figures.Shown({}, config, tmp_path)) is not None
    figures.plt.close("all")


def test_a_log_ends_for_a_report_at_the_checkpoint(run, tmp_path):
    """As of a run that is still training."""
    rows = metrics.read_jsonl(run / "metrics.jsonl")
    later = [row | {"step": 8, "validation_loss": 0.5} for row in rows[-1:]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *later]))
    found = measure.training(tmp_path, config_lib.load(run), 6)
    assert (found["step"], found["validation_loss"]) == (6, rows[-1]["validation_loss"])
    with pytest.raises(InputError, match="no evaluation up to step 4"):
        measure.training(tmp_path, config_lib.load(run), 4)


def test_a_run_that_diverged_is_said_to_have_diverged(run, mesh, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row | {"validation_loss": None}) + "\n" for row in rows))
    with pytest.raises(InputError, match="diverged: its validation loss at step 6 is not finite"):
        measure.training(tmp_path, config_lib.load(run), 6)
    monkeypatch.setattr(measure, "_asked", lambda *_: {"loss_1x": 1.0, "probes": [{"nats": math.inf}]})
    with pytest.raises(InputError, match=r"diverged: probes\S* at step 6 is not finite"):
        measure.measure(run, mesh, SMALL)


HOLD = """
import sys, pathlib
from slimmoe_jax import locking
with locking.one_writer(pathlib.Path(sys.argv[1]), "train", "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_is_being_trained_is_left_alone(run, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report", "result.json"))
    monkeypatch.setattr(pages, "run_report", lambda shown, out: out)
    monkeypatch.setattr(measure, "measure", lambda *_: {"step": 6})
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(copy)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
        line = refused(capsys, copy)
        assert f"another process is at work in {copy}" in line and "train: process" in line and "give --out DIR" in line
        assert report.main([str(copy), "--out", str(tmp_path / "out")]) == 0
        assert "copy: what is measured is not kept (another process is at work there)" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
        holder.communicate()
    assert report.main([str(copy), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((copy / "result.json").read_text())["step"] == 6 and "not kept" not in capsys.readouterr().err


def test_where_a_report_cannot_go_is_said_before_anything_is_measured(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report", "result.json"))
    (copy / "report").touch()
    assert f"{copy / 'report'} is no folder" in refused(capsys, copy)
    assert "not valid UTF-8" in refused(capsys, copy, "--out", tmp_path / "r\udcfc")
    os.rename(copy, tmp_path / "r\udcfc")
    assert "not valid UTF-8: rename the folder" in refused(capsys, tmp_path / "r\udcfc")


def test_text_that_cannot_be_measured_is_refused(run, mesh, folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "no source"}\n')
    with pytest.raises(InputError, match="without text or source"):
        measure.measure(run, mesh, dataclasses.replace(SMALL, texts=str(tmp_path / "rows.jsonl")))
    (tmp_path / "rows.jsonl").write_text('{"text": 5, "source": "number"}\n')
    with pytest.raises(InputError, match="without text or source"):
        measure._by_source(Effort(texts=str(tmp_path / "rows.jsonl")), None, 8, None)
    (tmp_path / "few.jsonl").write_text('{"text": "little", "source": "one"}\n')
    with pytest.raises(InputError, match="fewer than two sources"):
        measure.measure(run, mesh, dataclasses.replace(SMALL, texts=str(tmp_path / "few.jsonl")))


def test_fewer_records_are_those_at_the_start(run, folder):
    whole = records_lib.open_records(folder / "records").split("train")
    part = whole.first(10)
    assert len(part) == 10 < len(whole)
    np.testing.assert_array_equal(part.read(np.arange(10)), whole.read(np.arange(10)))
    seen = records_lib.batches(part, 4, seed=0)
    numbers = np.concatenate([next(seen)["records"] for _ in range(10)])
    assert sorted(numbers) == sorted(list(range(10)) * 4)  # four epochs, each of every record once
