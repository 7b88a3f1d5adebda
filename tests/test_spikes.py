"""Steps that go wrong: not-a-number and spikes leave the state as it was, are counted and named, and a batch can be run again."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slimmoe_jax import dump, metrics, optim, sharding, spikes, state, step
from slimmoe_jax.config import InputError, MeshConfig, ModelConfig, OptimConfig, TrainConfig

ROOT = Path(__file__).parent.parent
CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=40, layers=2, width=16, heads=2, head_dim=8, kv_heads=(2, 1), expert_hidden=16, dropout=0.0),
    optim=OptimConfig(skip_window=8, skip_sigma=6.0, warmup_steps=1, learning_rate=1e-3),
)


def test_sigmas_are_numpys_over_the_window():
    rng = np.random.default_rng(0)
    window, losses, norms = spikes.Window.empty(8), [], []
    for n, (loss, norm) in enumerate(rng.standard_normal((20, 2)).astype(np.float32)):
        found = [float(value) for value in spikes.sigmas(window, loss, norm)]
        recent = np.array(losses[-8:]), np.array(norms[-8:])
        expected = [(v - r.mean()) / r.std() if n >= 4 else 0.0 for v, r in zip((loss, norm), recent, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        window = spikes.push(window, loss, norm, found[0])
        losses.append(loss)
        norms.append(norm)
    assert int(window.count) == 20 and int(window.spikes) == 0
    window = spikes.push(window, jnp.float32(100), jnp.float32(1), jnp.float32(8.0))
    assert float(spikes.score(window)) == pytest.approx(1 / 21)


@pytest.fixture(scope="module")
def stepper():
    """A compiled step, and a state after ten steps on random tokens."""
    mesh = sharding.make_mesh(MeshConfig(data=8))
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=8))
    current = state.create(config, mesh)
    run = jax.jit(step.make_train_step(config, state.build_model(config), optim.make(config), end_token=0))
    rng = np.random.default_rng(0)

    def on(current, tokens):
        with sharding.use(mesh):
            return run(current, sharding.put_batch({"tokens": tokens.astype(np.int32)}, mesh))

    for _ in range(10):
        current, values = on(current, rng.integers(0, 40, (8, 17)))
    assert not bool(values["skipped"]) and int(current.window.count) == 10
    return on, current


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(stepper, value):
    run, current = stepper
    head = current.params["head"].at[0, 0].set(value)
    broken = current.replace(params=current.params | {"head": head})
    after, values = run(broken, np.ones((8, 17)))
    assert bool(values["skipped"]) and int(after.step) == int(broken.step) + 1
    assert equal(jax.tree.map(np.nan_to_num, after.params), jax.tree.map(np.nan_to_num, broken.params))
    assert equal((after.opt_state, after.router, after.window), (broken.opt_state, broken.router, broken.window))


def test_a_spike_is_left_out_where_that_is_asked_for_and_enters_the_window(stepper):
    run, current = stepper
    # A batch far from what the window saw: with the output layer scaled up, its loss is a multiple of those before.
    spiky = current.replace(params=current.params | {"head": current.params["head"] * 30})
    after, values = run(spiky, np.ones((8, 17)))
    assert np.isfinite(values["loss"]) and bool(values["skipped"]) and float(values["loss_sigma"]) > 6
    assert equal((after.params, after.opt_state, after.router), (spiky.params, spiky.opt_state, spiky.router))
    assert int(after.window.count) == int(current.window.count) + 1 and int(after.window.spikes) == int(current.window.spikes) + 1
    assert float(values["spike_score"]) == pytest.approx(int(after.window.spikes) / 11)


# --- in a run --------------------------------------------------------------------------------------------------------

TINY = tiny.source(steps=70, optim__skip_window=24, checkpoint__every=10, eval__every=0, eval__sample_tokens=0)
# A config is Python: these are the same, with a reader that fails in its own way at one step.
PATCHED = """
import importlib.util, time
import numpy as np
from slimmoe_jax.data import records

spec = importlib.util.spec_from_file_location("tiny", "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
get_config, following = tiny.get_config, records.Batches.__next__
"""
STALLED = f"""{PATCHED}
def stalled_reader(self):
    if self.get_state()["next_index"] == 4:
        time.sleep(600)
    return following(self)

records.Batches.__next__ = stalled_reader
"""
SPIKED = f"""{PATCHED}
def spiked(self):
    rows = following(self)
    if self.get_state()["next_index"] == 61:
        rows["tokens"] = np.random.default_rng(0).integers(250, 300, rows["tokens"].shape).astype(np.int32)
    return rows

records.Batches.__next__ = spiked
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("spikes"), TINY)
    for name, text in (("stalled.py", STALLED), ("spiked.py", SPIKED)):
        (path / name).write_text(text)
    return path


def command(folder, module, *flags):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", f"slimmoe_jax.{module}", *map(str, flags)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def train(folder, *flags, config="tiny.py"):
    return command(folder, "train", "--config", config, "--compilation-cache", tiny.CACHE, *flags)


def test_a_run_that_blows_up_stops_with_a_batch_that_can_be_run_again(folder):
    done = train(folder, "--workdir", "blown", "--optim.learning-rate", "1e30", "--optim.skip-limit", "3")
    assert done.returncode == 2 and "3 steps in a row up to" in done.stderr.splitlines()[-1], done.stderr
    named = re.findall(r"step (\d+): loss or gradient is not finite; the update is left out; records ([\d, ]+)", done.stderr)
    assert len(named) >= 3 and all(len(records.split(", ")) == 8 for _, records in named)
    again = command(folder, "dump", "--dump", "blown/dump")
    assert again.returncode == 0, again.stderr
    assert "nan" in again.stdout.splitlines()[0], again.stdout
    replayed = dump.replay(folder / "blown" / "dump")
    assert sorted(replayed.records) == sorted(map(int, dict(named)[str(replayed.step)].split(", ")))
    with pytest.raises(InputError, match="dump holds no run .there is no such folder.: give the folder of a training run"):
        dump.replay(folder / "dump")
    with pytest.raises(InputError, match="batch-.*npz is missing or damaged"):
        (folder / "blown" / "dump" / f"batch-{replayed.step}.npz").write_bytes(b"PK")
        dump.replay(folder / "blown" / "dump")


def test_a_replay_is_exact(folder, monkeypatch, tmp_path):
    """A dumped step that was fine has, run again, the loss and gradient that it had."""
    done = train(folder, "--workdir", "fine", "--steps", "12")
    assert done.returncode == 0, done.stderr
    from slimmoe_jax import checkpoint
    from slimmoe_jax import config as config_lib
    from slimmoe_jax.data import records as records_lib

    config = config_lib.load(folder / "fine")
    mesh = sharding.make_mesh(MeshConfig())
    monkeypatch.chdir(folder)
    opened = records_lib.open_records("records")
    current, data_state = checkpoint.Checkpoints(folder / "fine").restore(config, mesh, 10)
    batches = records_lib.batches(opened.split("train"), 8, seed=config.seed)
    batches.set_state(data_state)
    dump.write(tmp_path / "dump", config, opened.tokenizer(), current, 11, next(batches))
    replayed = dump.replay(tmp_path / "dump")
    row = metrics.read_jsonl(folder / "fine" / "metrics.jsonl")[10]
    assert row["step"] == replayed.step == 11
    assert replayed.loss == pytest.approx(row["loss"], rel=1e-5) and replayed.grad_norm == pytest.approx(row["grad_norm"], rel=1e-4)
    assert np.mean(list(replayed.records.values())) == pytest.approx(row["loss"], rel=0.2)


def test_an_injected_spike_is_skipped_where_that_is_asked_for(folder):
    """Tokens that the text never has, at step 61: with skipping, the loss after it is where it was."""
    with_skipping = train(
        folder,
        "--workdir",
        "with",
        "--optim.clip-norm",
        "0",
        "--optim.schedule-steps",
        "1000",
        "--optim.skip-sigma",
        "6",
        config="spiked.py",
    )
    without = train(folder, "--workdir", "without", "--optim.clip-norm", "0", "--optim.schedule-steps", "1000", config="spiked.py")
    assert with_skipping.returncode == without.returncode == 0, with_skipping.stderr + without.stderr
    rows = {run: metrics.read_jsonl(folder / run / "metrics.jsonl") for run in ("with", "without")}
    assert [row["step"] for row in rows["with"] if row["skipped"]] == [61]
    assert not any(row["skipped"] for row in rows["without"])
    assert rows["with"][60]["loss_sigma"] > 6 and rows["with"][60]["loss"] == rows["without"][60]["loss"]
    assert rows["with"][-1]["spike_score"] > 0 and rows["with"][-1]["logit_max"]
    assert "step 61: loss" in with_skipping.stderr and "or its gradient is a spike" in with_skipping.stderr
    after = {run: np.mean([row["loss"] for row in rows[run][61:70]]) for run in rows}  # over the same batches
    assert after["with"] < after["without"] - 0.03, f"the spike did no harm that skipping spared: {after}"


def test_a_stalled_reader_ends_the_run_with_its_stacks(folder):
    done = train(folder, "--workdir", "stalled", "--watchdog", "20", config="stalled.py")
    assert done.returncode == 1 and "Timeout (0:00:20)!" in done.stderr and "stalled_reader" in done.stderr, done.stderr
