"""Real runs with all trackers and no network, read back with each tool's own reader and compared with `metrics.jsonl`."""

import contextlib
import html
import io
import json
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

import matplotlib
import numpy as np
import pytest
import tiny
from PIL import Image

from slimmoe_jax import cli, metrics, trackers, validation
from slimmoe_jax import train as train_lib
from slimmoe_jax.config import InputError, TrainConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALL = ("tensorboard", "trackio", "wandb")
TINY = tiny.source(trackers=ALL, eval__every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny config and its text; every run of this module happens in it."""
    return tiny.write(tmp_path_factory.mktemp("trackers"), TINY)


def environment(folder, **more):
    """No account, whatever this machine has, and trackio's database in the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    kept |= {"XLA_FLAGS": "", "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    kept |= {"NETRC": str(folder / "netrc"), "WANDB_CONFIG_DIR": str(folder / "wandb-config")}
    return kept | {"TRACKIO_DIR": str(folder / "trackio")} | more


def train(folder, *flags, **more):
    done = subprocess.run(tiny.train_command(*flags), cwd=folder, env=environment(folder, **more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(folder):
    """Six steps whose last checkpoint is lost, and a resume from the fourth: steps 5 and 6 are done twice."""
    first = train(folder, "--workdir", "run", "--steps", "6", WANDB_MODE="offline")
    shutil.rmtree(folder / "run" / "checkpoints" / "6")
    second = train(folder, "--workdir", "run")
    assert "resuming run from step 4" in second.stderr
    assert "warning" not in first.stderr + second.stderr and "Traceback" not in first.stderr + second.stderr
    assert first.stdout + second.stdout == "", "tools keep their advertisements"
    assert "wandb records offline (its mode is offline)" in first.stderr
    assert "wandb records offline (no key is set: wandb login)" in second.stderr
    rows = metrics.read_jsonl(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    return rows


def by_layer(row):
    return {name: values for name, values in row.items() if isinstance(values, list) and not isinstance(values[0], list)}


def expected(rows):
    """What the tools should show, {tag: {step: value}}, spelt from the rows."""
    curves = {}
    for row in rows:
        values = {"train/loss": row["loss"], "train/grad_norm": row["grad_norm"], "train/learning_rate": row["learning_rate"]}
        values |= {"routing/threshold": row["threshold"], "train/skipped": float(row["skipped"])}
        for name, layers in by_layer(row).items():
            values[f"routing/{name}"] = sum(layers) / 2
            values[f"layers/{name}/layer_00"], values[f"layers/{name}/layer_01"] = layers
        if "validation_loss" in row:
            values |= {"validation/loss": row["validation_loss"], "validation/bits_per_byte": row["validation_bits_per_byte"]}
        for tag, value in values.items():
            curves.setdefault(tag, {})[row["step"]] = value
    assert {"layers/experts_per_token/layer_01", "routing/load_entropy", "validation/loss"} <= curves.keys()
    return curves


def same(shown, rows):
    """Each step once, in order, with the values of metrics.jsonl; `shown` is {tag: [(step, value)]}."""
    for tag, values in expected(rows).items():
        assert [step for step, _ in shown[tag]] == list(values), f"{tag}: each step once"
        np.testing.assert_allclose([value for _, value in shown[tag]], list(values.values()), rtol=1e-5, atol=1e-12, err_msg=tag)
    for name in ("tokens_per_second", "mfu", "mfu_palm", "peak_memory_bytes"):
        assert [step for step, _ in shown[f"performance/{name}"]] == list(range(1, 9))


def pictures_are_alike(png, row):
    """The rows of metrics.jsonl are rounded, which may move a colour to its neighbour."""
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)
    assert np.abs(shown - trackers.routing_map(row)).max() < 8


def samples(rows):
    return {row["step"]: row["sample"] for row in rows if "sample" in row}


def test_tensorboard_shows_the_run(folder, run):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    shown = {tag: [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    same(shown, run)
    times = [value for _, value in shown["performance/tokens_per_second"]]
    np.testing.assert_allclose(times, [row["tokens_per_second"] for row in run], rtol=1e-5, err_msg="repeated steps are replaced")
    text = {step: value.item().decode() for step, value in shown["sample"]}
    assert text == {step: "\n".join("    " + line for line in value.split("\n")) for step, value in samples(run).items()}
    assert [step for step, _ in shown["routing_map"]] == [2, 4, 6, 8]
    pictures_are_alike(shown["routing_map"][-1][1][2], run[-1])
    info = parse_session_start_info_plugin_data(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    assert info.hparams["model.width"].number_value == 32 and info.hparams["model.kv_heads"].string_value == "[2, 1]"


@pytest.mark.slow
def test_tensorboards_server_shows_each_step_once(folder, run):
    """It loads event files by a program of its own, which has its own way to forget what was taken back."""
    port = free_port()
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "run"), "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            shown = {tag: scalars_served(port, tag) for tag in ("train/loss", "layers/load_entropy/layer_01")}
        finally:
            server.terminate()
    for tag, values in shown.items():
        assert [step for step, _ in values] == list(range(1, 9))
        np.testing.assert_allclose([value for _, value in values], list(expected(run)[tag].values()), rtol=1e-5)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def scalars_served(port, tag):
    """[(step, value)], once the server has read the files."""
    address = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=tensorboard&tag={tag}"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError):
            points = json.load(urllib.request.urlopen(address))
            if len(points) >= 8:
                return [(step, value) for _, step, value in points]
        time.sleep(0.2)
    raise AssertionError("the server did not show the run in a minute")


def trackio_rows(place, run=""):
    """(step, values as JSON) of one of its runs, or of all of them, in the order in which they came."""
    with contextlib.closing(sqlite3.connect(place / "slimmoe_jax.db")) as database:
        return database.execute(
            "select step, metrics from metrics where run_name = ?1 or ?1 = '' order by rowid", (run,)
        ).fetchall()


def test_trackio_shows_the_run(folder, run):
    """Read by trackio itself in a process of its own, whose folder is set before it is imported."""
    code = "import json, trackio; print(json.dumps([(r.name, r.config) for r in trackio.Api().runs('slimmoe_jax')]))"
    said = subprocess.run([sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True, check=True).stdout
    ((name, config),) = json.loads(said.splitlines()[-1])
    assert name.startswith("run-") and config["model.width"] == 32 and config["model.router.kind"] == "top_p"
    logged = trackio_rows(folder / "trackio", name)
    shown = {}
    for step, values in logged:
        for tag, value in json.loads(values).items():
            shown.setdefault(tag, []).append((step, value))
    same(shown, run)
    assert {step: value["_value"].removeprefix("    ") for step, value in shown["sample"]} == samples(run)
    assert [step for step, _ in shown["routing_map"]] == [2, 4, 6, 8]
    pictures_are_alike((folder / "trackio" / "media" / shown["routing_map"][-1][1]["file_path"]).read_bytes(), run[-1])


def wandb_records(path):
    """The records of a .wandb file, a log of LevelDB's format whose records are W&B's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32_768 - place % 32_768 < 7:  # a block's end that holds no header
            place += 32_768 - place % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_holds_the_run(folder, run):
    shown, ids, config = {}, set(), {}
    files = sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one a start"
    for path in files:
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                for tag, value in items.items():
                    shown.setdefault(tag, []).append((items["_step"], value))
    ((_, project, name),) = ids
    assert (project, name) == ("slimmoe_jax", "run") and config["model"]["kv_heads"] == [2, 1]
    same(shown, run)
    files = {path.name: path for path in (folder / "run" / "wandb").glob("offline-run-*/files/media/*/*")}
    text = {step: files[os.path.basename(path)].read_text() for step, path in shown["sample.path"]}
    for step, sample in samples(run).items():
        assert f"<pre>{html.escape(sample)}</pre>" in text[step]
    pictures_are_alike(files[os.path.basename(shown["routing_map.path"][-1][1])].read_bytes(), run[-1])


@pytest.mark.parametrize("name", ALL)
def test_a_missing_library_is_one_line_and_writes_nothing(folder, name, monkeypatch, capsys):
    (folder / "bare" / name).mkdir(parents=True)  # as W&B leaves behind: a folder is no library
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, name, None)
    words = ["train", "--config", "tiny.py", "--workdir", "bad", "--trackers", name]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.run(train_lib.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1
    assert stderr == f'error: trackers = {name}: {name} is not installed: pip install "slimmoe_jax[track]", or leave it out\n'
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(folder / "bare")])
    with pytest.raises(InputError, match="is not installed"):
        trackers.check(TrainConfig(trackers=(name,)))
    assert sorted(folder.rglob("*")) == before


def test_unknown_trackers_are_named():
    for value, message in ((("mlflow",), "trackers = mlflow: choose from tensorboard, trackio, wandb"), ("wandb", "is a text")):
        with pytest.raises(InputError, match=message):
            validation.validate(TrainConfig(trackers=value))


class Failing:
    """Holds what it got, and fails at a step or at its end."""

    def __init__(self, at):
        self.at, self.steps, self.closed = at, [], False

    def write(self, row):
        if row["step"] == self.at:
            raise OSError(28, "No space left\non device")
        self.steps.append(row["step"])

    def close(self):
        self.closed = True
        if self.at == "end":
            raise ConnectionError("gone")


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(folder, run, monkeypatch, capsys):
    made = {"tensorboard": Failing(3), "trackio": Failing("end"), "wandb": Failing(None)}
    makers = {name: lambda config, workdir, start, name=name: made[name] for name in ALL}
    monkeypatch.setattr(trackers, "TRACKERS", makers)
    monkeypatch.chdir(folder)
    flags = ["--steps", "4", "--watchdog", "0", "--eval.every", "0", "--eval.sample-tokens", "0"]
    assert train_lib.main(["--config", "tiny.py", "--workdir", "failing", *flags]) == 0
    stderr = capsys.readouterr().err
    assert (made["tensorboard"].steps, made["trackio"].steps, made["wandb"].steps) == ([1, 2], [1, 2, 3, 4], [1, 2, 3, 4])
    assert [line for line in stderr.splitlines() if "warning" in line] == [
        "warning: tracker tensorboard failed at step 3 (OSError: [Errno 28] No space left on device) and is left out;"
        " metrics.jsonl goes on",
        "warning: tracker trackio failed at its end (ConnectionError: gone) and is left out; metrics.jsonl goes on",
    ]
    assert made["wandb"].closed and not made["tensorboard"].closed
    assert len(metrics.read_jsonl(folder / "failing" / "metrics.jsonl")) == 4


def test_a_tracker_that_cannot_start_is_left_out(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    recorder = trackers.Recorder(TrainConfig(trackers=("tensorboard",)), tmp_path, 0)
    recorder.write({"step": 1, "loss": 2.0})
    recorder.close()
    assert "warning: tracker tensorboard cannot start" in capsys.readouterr().err
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_records_offline(folder):
    code = """
import pathlib
from slimmoe_jax import trackers
from slimmoe_jax.config import TrainConfig
pathlib.Path("unreached").mkdir()
recorder = trackers.Recorder(TrainConfig(trackers=("wandb",)), pathlib.Path("unreached"), 0)
recorder.write({"step": 1, "loss": 2.0})
recorder.close()
"""
    nowhere = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(folder, **nowhere), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "wandb records offline (it cannot be reached: " in done.stderr, done.stderr
    (path,) = (folder / "unreached" / "wandb").glob("offline-run-*/*.wandb")
    history = [record.history for record in wandb_records(path) if record.WhichOneof("record_type") == "history"]
    assert [json.loads(item.value_json) for item in history[0].item if "train/loss" in (item.key, *item.nested_key)] == [2.0]


def test_a_run_that_begins_anew_is_another_run_and_one_that_goes_on_is_the_same(tmp_path):
    first = trackers.Mark.of(tmp_path, "wandb", 0)
    assert [first.passes(step) for step in (1, 2, 3)] == [True] * 3
    again = trackers.Mark.of(tmp_path, "wandb", 2)
    assert again.run == first.run and [again.passes(step) for step in (3, 4)] == [False, True]
    assert trackers.Mark.of(tmp_path, "trackio", 2).passes(3), "one that joins a run later gets all from there on"
    anew = trackers.Mark.of(tmp_path, "wandb", 0)
    assert anew.run != first.run and anew.passes(1)


def test_scalars_keep_what_is_not_finite_and_leave_out_what_is_unknown():
    row = {"step": 3, "loss": np.float32("nan"), "peak_memory_bytes": None, "sample": "text", "load": np.ones((2, 4))}
    shown = trackers.scalars(row)
    assert list(shown) == ["train/loss"] and np.isnan(shown["train/loss"])


def test_the_routing_map_has_layers_down_and_experts_across():
    """All choices of layer 0 on its last expert, of layer 1 on its first: bright at the upper right and at the lower left."""
    load = np.array([[0.0, 0, 0, 1], [1, 0, 0, 0]])
    picture = trackers.routing_map({"step": 1, "validation_loss": 1.0, "load": load, "experts_histogram": np.eye(2, 3)})
    height, width, _ = picture.shape
    brightest = np.array(matplotlib.colormaps["cividis"](1.0)[:3]) * 255
    bright = np.abs(picture[:, : int(0.5 * width), :3] - brightest).max(axis=-1) < 2
    rows, columns = np.nonzero(bright)
    upper = rows < np.median(rows)
    assert columns[upper].min() > columns[~upper].max() and upper.mean() == pytest.approx(0.5, abs=0.05)
    assert trackers.routing_map({"step": 1, "load": load, "experts_histogram": np.eye(2, 3)}) is None, "only at evaluations"
    assert trackers.routing_map({"step": 1, "validation_loss": 1.0}) is None, "a dense model has no routing"


@pytest.mark.slow
def test_of_two_processes_only_the_first_writes(folder, run):
    """Both are asked to track; each of the tools gets one run, with each step once."""
    coordinator = f"127.0.0.1:{free_port()}"
    started = []
    for process in range(2):
        words = ["--coordinator", coordinator, "--processes", "2", "--process", str(process), "--workdir", "two"]
        env = environment(folder, TRACKIO_DIR=str(folder / "trackio-two"))
        started.append(subprocess.Popen(tiny.train_command(*words), cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n---\n".join(said)
    assert "trackio run two-" in said[0] and "track" not in said[1] and "wandb" not in said[1]
    assert len(list((folder / "two" / "tensorboard").iterdir())) == 1
    assert len(list((folder / "two" / "wandb").glob("offline-run-*"))) == 1
    assert [step for step, _ in trackio_rows(folder / "trackio-two")] == list(range(1, 9))
