"""Weights and records that are not what they should be: named in one line, and never computed with."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from slimmoe_jax import checkpoint, digests, evaluate, files, sharding, state
from slimmoe_jax.config import CheckpointConfig, DataConfig, InputError, MeshConfig, ModelConfig, TrainConfig
from slimmoe_jax.data import prepare, records

ROOT = Path(__file__).parent.parent
CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=32, layers=2, width=16, heads=2, head_dim=8, kv_heads=(2, 1), expert_hidden=16),
    mesh=MeshConfig(data=8),
    checkpoint=CheckpointConfig(keep_last=3),
)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of some size, which `read_only` turns into one."""
    place = tmp_path / "disk"
    place.mkdir()
    with contextlib.ExitStack() as mounted:

        def make(size="4m"):
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
            if done.returncode:
                pytest.skip("mounting takes root")
            mounted.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
            return place

        yield make


def read_only(place):
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


def python(folder, *words, limit="", **environment):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    words = [sys.executable, "-m", *map(str, words)]
    if limit:
        words = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *words]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(CONFIG.mesh)


@pytest.fixture(scope="module")
def fresh(mesh):
    return state.create(CONFIG, mesh)


def broken(current, value, where):
    """A state with one value of its parameters or its router changed."""
    if where == "router":
        return current.replace(router=current.router.replace(bias=current.router.bias.at[1, 2].set(value)))
    return current.replace(params=current.params | {"head": current.params["head"].at[3, :2].set(value)})


def save(folder, step, current):
    checkpoints = checkpoint.Checkpoints(folder, CONFIG)
    checkpoints.save(step, current, {"next_index": step}, CONFIG)
    checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, fresh):
    """Two good checkpoints."""
    folder = tmp_path_factory.mktemp("integrity") / "run"
    for step in (1, 2):
        save(folder, step, fresh)
    return folder


@pytest.mark.parametrize("value, where, named", [(np.nan, "params", "head"), (-np.inf, "router", "bias")])
def test_weights_that_are_not_finite_are_refused_by_name(run, fresh, mesh, tmp_path, value, where, named):
    shutil.copytree(run, tmp_path / "run")
    save(tmp_path / "run", 3, broken(fresh, value, where))
    with pytest.raises(InputError) as error:
        checkpoint.load_run(tmp_path / "run", mesh)
    count = "2 of 512" if where == "params" else "1 of 8"
    for words in (
        "checkpoints/3 holds weights that are not finite",
        named,
        f"{count} values",
        f"give an older one, {tmp_path}/run/2",
    ):
        assert words in str(error.value)
    assert checkpoint.load_run(tmp_path / "run" / "2", mesh).step == 2
    assert checkpoint.load_run(tmp_path / "run", mesh, finite=False).step == 3
    with pytest.raises(InputError, match="checkpoints/3 holds weights that are not finite .*: move it away to resume from step 2"):
        checkpoint.Checkpoints(tmp_path / "run", CONFIG).restore(CONFIG, mesh)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir(), "nothing is moved unasked"


def test_infinity_beside_the_weights_is_no_fault(fresh, mesh, tmp_path):
    spiked = fresh.replace(window=fresh.window.replace(losses=fresh.window.losses.at[0].set(np.inf)))
    save(tmp_path, 1, spiked)
    restored, _ = checkpoint.Checkpoints(tmp_path, CONFIG).restore(CONFIG, mesh)
    assert np.isinf(restored.window.losses[0])


def test_values_that_are_not_finite_are_counted_on_any_mesh(mesh):
    x = np.ones((16, 4), np.float32)
    x[[3, 9, 9], [0, 1, 2]] = np.nan, np.inf, -np.inf
    for placed in (jax.numpy.asarray(x), jax.device_put(x, sharding.batch_sharding(mesh))):
        assert digests.not_finite({"a": placed, "b": jax.numpy.ones(3, np.int32)}) == {"['a']": "3 of 64 values"}


# --- a training that removes checkpoints meanwhile -------------------------------------------------------------------


def rotating(monkeypatch, folder, gone, new, slowly=False):
    """Has a training remove one checkpoint and save another just before the first reading of weights."""
    read = checkpoint.Checkpoints.restore_weights

    def hooked(self, *arguments):
        if (path := folder / "checkpoints" / str(gone)).exists() and self.latest == gone:
            if new:
                shutil.copytree(path, path.with_name(str(new)))
            shutil.rmtree(path / "weights")
            threading.Timer(0.5 if slowly else 0.0, shutil.rmtree, [path]).start()
            if not slowly:
                while path.exists():
                    time.sleep(0.01)
        return read(self, *arguments)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore_weights", hooked)


@pytest.mark.parametrize("slowly", [False, True])
def test_a_checkpoint_that_is_removed_meanwhile_gives_way_to_the_newest(run, mesh, tmp_path, monkeypatch, slowly):
    shutil.copytree(run, tmp_path / "run")
    rotating(monkeypatch, tmp_path / "run", gone=2, new=7, slowly=slowly)
    assert checkpoint.load_run(tmp_path / "run", mesh).step == 7


def test_one_that_was_asked_for_is_said_to_be_gone(run, mesh, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    rotating(monkeypatch, tmp_path / "run", gone=2, new=7)
    with pytest.raises(InputError, match=r"checkpoints/2 is gone, .*checkpoint.keep_last.*: .* has steps \[1, 7\] now") as error:
        checkpoint.load_run(tmp_path / "run" / "2", mesh)
    assert "remove that folder" not in str(error.value)


def test_a_damaged_one_is_still_damaged_and_is_not_to_be_removed_under_a_training(run, mesh, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "weights")
    with pytest.raises(InputError, match="checkpoints/2 cannot be read .*: remove that folder to go on from step 1"):
        checkpoint.load_run(tmp_path / "run", mesh)
    code = "import sys, time; from pathlib import Path; from slimmoe_jax.locking import one_writer\n"
    code += "with one_writer(Path(sys.argv[1]), 'train', ''): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="cannot be read .*: a training is at work in this run: name another step, .*run/1"):
            checkpoint.load_run(tmp_path / "run", mesh)
    finally:
        holder.kill()
        holder.wait()


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Records of text, and packed ones."""
    folder = tmp_path_factory.mktemp("made")
    rows = [
        {"text": text, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
        for text in tiny.TEXTS
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for format in ("text", "chat"):
        data = DataConfig(
            source=str(folder / "rows.jsonl"), format=format, tokenizer="gpt2", context=256, validation_fraction=0.2,
            min_characters=0,
        )  # fmt: skip
        prepare.prepare(data, folder / format, workers=1)
    return folder


def changed(path, place, value, resum=False):
    """Writes one value into a file of records; with `resum`, into the manifest its new sum."""
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    if resum:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        for split in manifest["splits"].values():
            for file in split["files"]:
                file["sha256"] = records.sha256(path.parent / file["file"])
        (path.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "format, place, value, resum, message",
    [
        ("text", (0, 5), 7, False, "its sha256 is not the manifest's): restore it, or remove the folder and prepare"),
        ("text", -1, 65_535, False, "its sha256 is not the manifest's; it has tokens up to 65,535, where 50,256 is the most"),
        ("text", (0, 5), 50_257, True, "(it has tokens up to 50,257, where 50,256 is the most)"),
        ("chat", (0, 1, 3), 258, True, "(it has segments up to 258, where 257 is the most)"),
        ("chat", (0, 2, 3), 2, True, "(it has targets up to 2, where 1 is the most)"),
    ],
)
def test_records_that_are_not_those_that_were_prepared_are_refused(made, tmp_path, format, place, value, resum, message):
    shutil.copytree(made / format, tmp_path / "records")
    records.open_records(tmp_path / "records").verify()
    changed(tmp_path / "records" / "validation-000000.npy", place, value, resum)
    with pytest.raises(InputError) as error:
        records.open_records(tmp_path / "records").verify()
    assert "validation-000000.npy is damaged (" in str(error.value) and message in str(error.value)


def read_by(monkeypatch, found):
    """The files that a verification reads."""
    read, check = [], records.Records._check
    monkeypatch.setattr(records.Records, "_check", lambda self, path, *more: read.append(path.name) or check(self, path, *more))
    found.verify()
    monkeypatch.undo()
    return sorted(read)


def test_records_are_read_once_and_again_when_they_change(made, tmp_path, monkeypatch):
    shutil.copytree(made / "text", tmp_path / "records")
    found = records.open_records(tmp_path / "records")
    both = ["train-000000.npy", "validation-000000.npy"]
    assert read_by(monkeypatch, found) == both and read_by(monkeypatch, found) == []
    os.utime(tmp_path / "records" / both[0])
    assert read_by(monkeypatch, found) == both[:1] and read_by(monkeypatch, found) == []
    (tmp_path / "records" / "verified.json").write_text("[" * 100_000)
    assert read_by(monkeypatch, found) == both and read_by(monkeypatch, found) == []
    content, times = (tmp_path / "records" / both[0]).read_bytes(), os.stat(tmp_path / "records" / both[0])
    (tmp_path / "records" / both[0]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(tmp_path / "records" / both[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match="train-000000.npy is damaged"):
        found.verify()


def test_a_folder_that_cannot_be_written_to_is_remembered_elsewhere(made, small_disk, tmp_path, monkeypatch):
    place = small_disk()
    shutil.copytree(made / "text", place / "records")
    read_only(place)
    monkeypatch.setattr(records, "_ELSEWHERE", str(tmp_path / "cache"))
    found = records.open_records(place / "records")
    assert len(read_by(monkeypatch, found)) == 2
    monkeypatch.setattr(records, "_ELSEWHERE", str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 1 and read_by(monkeypatch, found) == []


# --- files and disks -------------------------------------------------------------------------------------------------


def test_json_that_is_nested_too_deep_or_not_finite_is_named(tmp_path):
    for text in ("[" * 100_000, "[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300):
        (tmp_path / "deep.json").write_text(text)
        with pytest.raises(ValueError):
            files.read_json(tmp_path / "deep.json")
    tree = json.loads('{"a": {"b": [1, NaN]}, "c": -Infinity, "d": 1e999, "e": 1' + "0" * 400 + ', "f": [], "g": 0.5}')
    assert files.not_finite(tree) == ["a.b[1]", "c", "d", "e"]
    assert files.with_nulls({"a": [float("nan"), 1], "b": float("inf")}) == {"a": [None, 1], "b": None}


def test_a_disk_without_room_for_one_checkpoint_is_refused(small_disk):
    place = small_disk("1m")
    checkpoint.check_room(place / "run", CONFIG)
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=512))  # 512 * (64 + 2 * 64 + 256 + ...) values
    with pytest.raises(
        InputError, match=r"one checkpoint of this model takes about [\d.]+MB, and its disk has 1.05MB free: make room"
    ):
        checkpoint.check_room(place / "deeper" / "run", wide)


def test_only_a_full_disk_is_to_be_made_room_on(fresh, tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path, CONFIG)
    for error, advice in (
        (OSError(28, "No space left on device"), "(No space left on device): make room; no checkpoint was saved before"),
        (
            ValueError("Failed writing: [OS error 27: File too large]"),
            "(File too large): raise the limit on file sizes (ulimit -f); no checkpoint was saved before",
        ),
        (UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "surrogates not allowed"), "): no checkpoint was saved before"),
    ):

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", refuse)
        with pytest.raises(InputError) as caught:
            checkpoints.save(1, fresh, {}, CONFIG)
        assert str(caught.value).endswith(advice)


def test_results_take_the_place_of_no_device_and_of_no_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    evaluate._write("new", (tmp_path / "link.json").resolve())
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: said.append((tmp_path / "pipe").read_text()))
    said = []
    reader.start()
    evaluate._write("said", tmp_path / "pipe")
    reader.join()
    assert said == ["said"] and (tmp_path / "pipe").is_fifo()


def test_results_that_cannot_be_written_are_refused_before_the_work(small_disk):
    place = small_disk()
    read_only(place)
    with pytest.raises(InputError, match="--out .*: its folder cannot be written to .Read-only file system.: name another file"):
        evaluate.parse(["--checkpoint", "run", "--out", str(place / "results.json")])


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of eight steps."""
    path = tiny.write(tmp_path_factory.mktemp("commands"), tiny.source(eval__every=0, eval__sample_tokens=0))
    done = train(path, "--workdir", "run")
    assert done.returncode == 0, done.stderr
    return path


def train(folder, *flags, **options):
    return python(folder, "slimmoe_jax.train", *tiny.train_command(*flags)[3:], **options)


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_one_line(folder):
    done = train(folder, "--workdir", "limited", limit=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "ERROR" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("error: a checkpoint could not be saved in") and "(File too large): raise the limit on file sizes" in last
    )
    assert "make room" not in done.stderr
    done = train(folder, "--workdir", "limited")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_garbled_records_are_refused_by_the_commands(folder):
    path = folder / "records" / "validation-000000.npy"
    content = path.read_bytes()
    changed(path, slice(None), 65_535)
    try:
        for words in (
            ["slimmoe_jax.evaluate", "--checkpoint", "run"],
            ["slimmoe_jax.evaluate", "--checkpoint", "run", "--records", "records"],
        ):
            done = python(folder, *words)
            assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
            assert "validation-000000.npy is damaged (its sha256 is not the manifest's; it has tokens up to 65,535" in done.stderr
        done = train(folder, "--workdir", "other")
        assert done.returncode == 2 and "validation-000000.npy is damaged" in done.stderr.splitlines()[-1], done.stderr
    finally:
        path.write_bytes(content)
    huge = python(folder, "slimmoe_jax.evaluate", "--checkpoint", "run", "--batch-size", 10**9, "--seed", 10**30)
    usual = python(folder, "slimmoe_jax.evaluate", "--checkpoint", "run")
    assert huge.returncode == usual.returncode == 0, huge.stderr + usual.stderr
    assert json.loads(huge.stdout)["loss"] == pytest.approx(json.loads(usual.stdout)["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_run_is_read_while_its_training_removes_checkpoints(folder, mesh):
    """A training that saves each step and keeps two; readers of the newest find one each time."""
    words = tiny.train_command("--workdir", "busy", "--steps", 150, "--checkpoint.every", 1, "--checkpoint.keep-last", 2)
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with (folder / "busy.log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
    steps = []
    try:
        while process.poll() is None and len(set(steps)) < 25:
            if checkpoint._numbered(folder / "busy" / "checkpoints"):
                steps.append(checkpoint.load_run(folder / "busy", mesh).step)
    finally:
        process.kill()
        process.wait()
    assert len(set(steps)) >= 10 and steps == sorted(steps), (steps, (folder / "busy.log").read_text())
    print(f"{len(steps)} readings of {len(set(steps))} checkpoints")
