"""Faults that really happen: kill -9 all over a run, flipped bytes, a full disk, a disk that became read-only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from slimmoe_jax import checkpoint, digests, metrics, sharding, state
from slimmoe_jax.config import CheckpointConfig, InputError, MeshConfig, ModelConfig, TrainConfig

ROOT = Path(__file__).parent.parent
TINY = tiny.source(steps=40, checkpoint__every=1, eval__every=20, eval__sample_tokens=0)
CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=32, layers=2, width=16, heads=2, head_dim=8, kv_heads=(2, 1), expert_hidden=16),
    mesh=MeshConfig(data=8),
    checkpoint=CheckpointConfig(keep_last=2),
)


def environment():
    flags = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return os.environ | flags | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # every start here compiles the same programs


def train(folder, *flags, config="tiny.py"):
    words = [config if word == "tiny.py" else word for word in tiny.train_command(*flags)]
    return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)


def losses(run):
    return [row["loss"] for row in metrics.read_jsonl(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny config with its text, and a run of it that nothing happened to."""
    path = tmp_path_factory.mktemp("faults")
    tiny.write(path, TINY)
    done = train(path, "--workdir", "undisturbed")
    assert done.returncode == 0, done.stderr
    return path


# --- kill -9 ---------------------------------------------------------------------------------------------------------

# Trains in forked children, which start in a fraction of a second, and kills each after a random time. Prints the number of kills
# and, of those, how many hit a save on its way.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from slimmoe_jax import cli, train

def start(workdir, log):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["train", *sys.argv[3:], "--workdir", workdir]
    cli.run(train.main)

def rows(workdir):
    file = Path(workdir, "metrics.jsonl")
    return file.read_text().count("\\n") if file.exists() else 0

def kill(child, workdir, moment):
    "Kills some time after the child's first step, or after its start where the time is negative. Whether it was still running."
    before, deadline = rows(workdir), time.monotonic() - moment if moment < 0 else None
    while deadline is None or time.monotonic() < deadline:
        if deadline is None and rows(workdir) != before:
            deadline = time.monotonic() + moment
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True

wanted, seed = int(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
kills = saving = runs = 0
enough = lambda: kills >= wanted and (saving >= 3 or kills >= 4 * wanted)  # how many hit a save depends on the machine's speed
while not enough():
    runs += 1
    workdir = f"killed-{runs}"
    while not enough():
        moment = random.uniform(0.0, 0.6) if random.random() < 0.8 else -random.uniform(0.3, 3.0)
        if not kill(start(workdir, f"{workdir}.log"), workdir, moment):
            break
        kills += 1
        saving += any("tmp" in path.name for path in Path(workdir, "checkpoints").glob("*"))
    code = os.waitstatus_to_exitcode(os.waitpid(start(workdir, f"{workdir}.log"), 0)[1])
    assert code == 0, Path(f"{workdir}.log").read_text()[-3000:]
print(kills, saving, runs)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(folder):
    (folder / "killer.py").write_text(KILLER)
    words = [sys.executable, "killer.py", "30", "0", "--config", "tiny.py", "--compilation-cache", tiny.CACHE]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, saving, runs = map(int, done.stdout.split())
    print(f"{kills} kills, {saving} of them during a save, in {runs} runs")
    assert kills >= 30 and saving >= 3, "kills must hit saves for this to be a test"
    for run in range(1, runs + 1):
        assert losses(folder / f"killed-{run}") == losses(folder / "undisturbed")


# --- bytes that changed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(CONFIG.mesh)


@pytest.fixture(scope="module")
def run(tmp_path_factory, mesh):
    """A run with checkpoints of steps 1 and 2, which differ."""
    path = tmp_path_factory.mktemp("bytes") / "run"
    fresh = state.create(CONFIG, mesh)
    checkpoints = checkpoint.Checkpoints(path, CONFIG)
    for step in (1, 2):
        params = jax.tree.map(lambda leaf, step=step: leaf + step, fresh.params)
        checkpoints.save(step, fresh.replace(step=fresh.step + step, params=params), {"next_index": step}, CONFIG, 4.0 - step)
    checkpoints.close()
    return path


def restored(path, mesh):
    checkpoints = checkpoint.Checkpoints(path, CONFIG)
    try:
        found, data = checkpoints.restore(CONFIG, mesh)
        return jax.device_get(found), data, checkpoints.damaged
    finally:
        checkpoints.close()


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("fault", ["flipped", "truncated", "removed"])
def test_a_damaged_file_is_never_taken_for_a_whole_one(run, mesh, tmp_path, fault):
    """Whatever file of the newest checkpoint is damaged, wherever: what is restored is what was saved then, or the step before."""
    newest, data, damaged = restored(run, mesh)
    assert int(newest.step) == 2 and data == {"next_index": 2} and not damaged
    before = jax.tree.map(lambda leaf: leaf, newest)
    older = jax.device_get(checkpoint.Checkpoints(run).restore(CONFIG, mesh, 1)[0])
    rng = np.random.default_rng(["flipped", "truncated", "removed"].index(fault))
    files = [path.relative_to(run) for path in (run / "checkpoints" / "2").rglob("*") if path.is_file()]
    files.sort(key=lambda file: -(run / file).stat().st_size)  # the largest hold the arrays, others may go unread
    assert Path("checkpoints/2/metrics/metrics") in files
    fell_back = 0
    for file in [*files[:8], *files]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        content = bytearray((copy / file).read_bytes())
        if fault == "removed":
            (copy / file).unlink()
        elif content:
            place = int(rng.integers(len(content)))
            content[place] ^= 1 << int(rng.integers(8))
            (copy / file).write_bytes(content if fault == "flipped" else content[:place])
        found, data, damaged = restored(copy, mesh)
        if int(found.step) == 2:
            assert equal(found, before) and data == {"next_index": 2}, file
        else:
            fell_back += 1
            assert equal(found, older) and data == {"next_index": 1} and len(damaged) == 1 and "checkpoints/2 cannot" in damaged[0]
            assert (copy / "damaged" / "2").is_dir() and not (copy / "checkpoints" / "2").exists(), file
    print(f"{8 + len(files)} faults, {fell_back} times the checkpoint before")
    assert fell_back >= 3, "damage must be noticed for this to be a test"


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("content", ["", "{", "[3.0]", '{"validation_loss": null}', '{"validation_loss": 0.5}', None])
def test_a_damaged_validation_loss_costs_its_checkpoint_the_place_of_the_best(run, mesh, tmp_path, capsys, content, step):
    """The weights beside it are whole: they are resumed from, and kept."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoints" / str(step) / "metrics" / "metrics"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    checkpoint._warn.cache_clear()
    found, _, damaged = restored(tmp_path / "copy", mesh)
    assert int(found.step) == 2 and not damaged
    said = f"warning: the validation loss in {tmp_path / 'copy' / 'checkpoints' / str(step)} is damaged ("
    assert capsys.readouterr().err.count(said) == (content is not None)
    assert checkpoint.Checkpoints(run).best == 2 and checkpoint.Checkpoints(tmp_path / "copy").best == 3 - step
    assert checkpoint.load_run(tmp_path / "copy", mesh).step == 2


def test_a_config_that_changed_is_not_used(run, mesh, tmp_path):
    """Its weights would fit, and the model would be another."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoints" / "2" / "config" / "metadata"
    changed = path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0')
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(InputError, match="checkpoints/2 cannot be read .config is not what was saved.: remove that folder"):
        checkpoint.load_run(tmp_path / "copy", mesh)


@pytest.mark.parametrize(("name", "other"), [("layer_1", "layer_3"), ("weights", "weight3"), ("params", "parals")])
def test_a_damaged_digest_is_no_other_model(run, mesh, tmp_path, name, other):
    """A name in the digests with a flipped bit: the checkpoint is damaged, not of another config."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoints" / "2" / "digests" / "metadata"
    path.write_text(path.read_text().replace(name, other, 1))
    found, _, damaged = restored(tmp_path / "copy", mesh)
    assert int(found.step) == 1 and "(its digests are not what was saved)" in damaged[0]


def test_where_no_checkpoint_is_whole_nothing_is_moved(run, mesh, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    for file in (tmp_path / "copy" / "checkpoints").glob("*/data/*"):
        file.write_text("{")
    with pytest.raises(InputError, match="checkpoints/2 cannot be read"):
        restored(tmp_path / "copy", mesh)
    assert sorted(path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()) == ["1", "2"]


def test_digests_notice_any_bit_and_any_exchange_and_no_layout(mesh):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 6)).astype(np.float32)
    whole = digests.of_tree({"x": jax.numpy.asarray(x)})
    split = jax.device_put(x, sharding.batch_sharding(mesh))
    assert digests.of_tree({"x": split}) == whole
    for _ in range(200):
        bits = x.copy().view(np.uint32)
        bits[rng.integers(8), rng.integers(6)] ^= np.uint32(1) << np.uint32(rng.integers(32))
        assert digests.of_tree({"x": jax.numpy.asarray(bits.view(np.float32))}) != whole
    assert digests.of_tree({"x": jax.numpy.asarray(x[:, ::-1])}) != whole
    for kind in (np.bool_, np.int8, np.uint16, np.int32):
        assert digests.of_tree([jax.numpy.zeros(3, kind)]) != digests.of_tree([jax.numpy.ones(3, kind)])


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# The config with a reader that fills the disk, but for 300 kB, at its tenth batch.
FILLING = """
import importlib.util, shutil
from pathlib import Path
from slimmoe_jax.data import records

spec = importlib.util.spec_from_file_location("tiny", "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
get_config, following = tiny.get_config, records.Batches.__next__

def filling(self):
    disk = Path({disk!r})
    if self.get_state()["next_index"] == 9:
        (disk / "filler").write_bytes(b"\\0" * (shutil.disk_usage(disk).free - 300_000))
    return following(self)

records.Batches.__next__ = filling
"""
SAID = {
    "full": "one checkpoint of this model takes about",
    "fills up": "(No space left on device): make room",
    "read-only": "cannot be written to",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", SAID)
def test_a_disk_that_takes_no_more_costs_nothing(folder, small_disk, fault):
    """Training says so and stops; the old checkpoint is whole, and with the disk mended the run ends as if nothing had been."""
    run, filler = small_disk / "run", small_disk / "filler"
    assert train(folder, "--workdir", run, "--steps", "4").returncode == 0
    config = "tiny.py"
    if fault == "full":
        filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 300_000))
    elif fault == "fills up":
        config = "filling.py"
        (folder / config).write_text(FILLING.format(disk=str(small_disk)))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = train(folder, "--workdir", run, config=config)
    assert done.returncode == 2 and SAID[fault] in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    if fault != "read-only":
        filler.unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    done = train(folder, "--workdir", run)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    assert losses(run) == losses(folder / "undisturbed")


def test_a_write_that_finds_no_room_is_one_line(tmp_path):
    """Not only of checkpoints: any write of a command, such as that of a line of metrics."""
    failing = "lambda argv: open('/dev/full', 'w', buffering=1).write('a line of metrics\\n')"
    program = f"from slimmoe_jax import cli; cli.run({failing})"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    expected = "error: nothing more can be written (No space left on device): make room, and give the same command again\n"
    assert done.returncode == 2 and done.stderr == expected
