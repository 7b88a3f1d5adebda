"""The main job as a user runs it: resume, devices, accumulation, signals, bad input. Runs real processes on tiny models."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from slimmoe_jax import cli, metrics
from slimmoe_jax import train as train_lib
from slimmoe_jax.config import InputError
from slimmoe_jax.data import tokenizers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = tiny.source()

ORDER = """
import sys
from slimmoe_jax import host, step, train

events, compiled, read = [], step.jit_train_step, train.Log.step

def noting_runs(*arguments):
    run = compiled(*arguments)
    return lambda *inputs: (events.append("run"), run(*inputs))[1]

def noting_reads(*arguments, **more):
    events.append("read")
    read(*arguments, **more)

step.jit_train_step, train.Log.step = noting_runs, noting_reads
train.main(sys.argv[1:])
print(*events if host.keep_freed_memory() else ["not here"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny config and its text; every run of this module happens in it."""
    return tiny.write(tmp_path_factory.mktemp("train"), TINY)


def environment(devices=1, **more):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"} | more


def train(folder, *flags, devices=1, **more):
    done = subprocess.run(tiny.train_command(*flags), cwd=folder, env=environment(devices, **more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(folder, run):
    rows = metrics.read_jsonl(folder / run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once, in order"
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def reference(folder):
    """Eight steps without interruption."""
    stderr = train(folder, "--workdir", "whole")
    assert "python -m slimmoe_jax.generate --checkpoint whole" in stderr
    return losses(folder, "whole")


def weights(folder, run):
    import jax

    from slimmoe_jax import checkpoint, sharding
    from slimmoe_jax.config import MeshConfig

    loaded = checkpoint.load_run(folder / run, sharding.make_mesh(MeshConfig()))
    return jax.tree.leaves(jax.device_get((loaded.params, loaded.router)))


def test_a_run_learns_and_records_what_users_rely_on(folder, reference):
    assert reference[-1] < reference[0]
    row = metrics.read_jsonl(folder / "whole" / "metrics.jsonl")[-1]
    assert {"loss", "tokens_per_second", "mfu", "validation_loss", "validation_bits_per_byte", "sample"} <= row.keys()
    for name in ("load_entropy", "max_violation", "dropped", "experts_per_token", "router_entropy", "dead_experts"):
        assert len(row[name]) == 2, f"{name} has a value for each layer"
    assert json.loads((folder / "whole" / "config.json").read_text())["model"]["width"] == 32


def test_a_step_that_is_done_is_read_before_the_next_begins(folder, reference):
    """Else its time would be that of two, and the next one's, read at a checkpoint, nothing."""
    program = [sys.executable, "-c", ORDER, *tiny.train_command("--workdir", "read")[3:]]
    done = subprocess.run(program, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "not here" in done.stdout:
        pytest.skip("an accelerator, or no glibc: steps run while the next is prepared")
    assert done.stdout.split() == ["run", "read"] * 8


def test_resume_is_bitwise(folder, reference):
    """Five steps, a new process, three more: with dropout on, in mid-epoch, off the checkpoint interval."""
    train(folder, "--workdir", "cut", "--steps", "5")
    assert "resuming cut from step 5" in train(folder, "--workdir", "cut")
    assert losses(folder, "cut") == reference
    for a, b in zip(weights(folder, "cut"), weights(folder, "whole"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_resume_is_bitwise_with_accumulation_on_several_devices_and_as_users_compile(folder, reference):
    flags = ("--optim.accumulate", "2", "--mesh.fsdp", "2", "--mesh.expert", "2")
    options = {"devices": 4, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    train(folder, "--workdir", "whole-split", *flags, **options)
    train(folder, "--workdir", "cut-split", "--steps", "3", *flags, **options)
    train(folder, "--workdir", "cut-split", *flags, **options)
    assert losses(folder, "cut-split") == losses(folder, "whole-split")
    for a, b in zip(weights(folder, "cut-split"), weights(folder, "whole-split"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--model.router.kind", "relu", "--optim.schedule", "wsd", "--optim.skip-sigma", "3", "--optim.skip-window", "4"),
        ("--model.router.kind", "top_k", "--model.router.balance", "bias", "--data.mix", "0.5:text:text.jsonl"),
    ],
    ids=["ReLU router, WSD, skip window", "selection bias, mixture"],
)
def test_resume_is_bitwise_with_every_controller(folder, flags):
    name = flags[1]
    train(folder, "--workdir", f"whole-{name}", *flags)
    train(folder, "--workdir", f"cut-{name}", "--steps", "5", *flags)
    train(folder, "--workdir", f"cut-{name}", *flags)
    assert losses(folder, f"cut-{name}") == losses(folder, f"whole-{name}")
    for a, b in zip(weights(folder, f"cut-{name}"), weights(folder, f"whole-{name}"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_moves_to_eight_devices_and_back(folder, reference):
    for steps, devices, mesh in (("3", 1, []), ("6", 8, ["--mesh.fsdp", "2", "--mesh.expert", "2"]), ("8", 1, [])):
        train(folder, "--workdir", "moved", "--steps", steps, *mesh, devices=devices)
    np.testing.assert_allclose(losses(folder, "moved"), reference, atol=1e-5)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_saves_and_a_second_one_changes_nothing(folder, reference, number):
    name = f"stopped-{number.name}"
    process = subprocess.Popen(
        tiny.train_command("--workdir", name), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    path = folder / name / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= 1):
        time.sleep(0.005)
    process.send_signal(number)
    time.sleep(0.02)  # the step that runs is finished first, then the checkpoint is written: this meets one of the two
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 128 + number and f"stopped by {number.name}" in stderr, stderr
    assert "Traceback" not in stderr
    train(folder, "--workdir", name)
    assert losses(folder, name) == reference


def test_eight_devices_give_the_losses_of_one(folder, reference):
    """Data, fsdp and expert axes at once; dropout included, since its bits do not depend on the mesh."""
    train(folder, "--workdir", "eight", "--mesh.fsdp", "2", "--mesh.expert", "2", devices=8)
    np.testing.assert_allclose(losses(folder, "eight"), reference, atol=1e-5)


def test_accumulation_gives_the_losses_of_the_undivided_batch(folder):
    """The balance loss too: its counts are those of the global batch."""
    flags = ("--model.dropout", "0", "--model.router.balance-weight", "1.0", "--steps", "4")
    train(folder, "--workdir", "at-once", *flags)
    train(folder, "--workdir", "in-parts", "--optim.accumulate", "4", *flags)
    np.testing.assert_allclose(losses(folder, "in-parts"), losses(folder, "at-once"), atol=1e-5)


def test_weights_start_another_run(folder, reference):
    assert "starting from the weights of whole, step 8" in train(
        folder, "--workdir", "next", "--init-from", "whole", "--steps", "1"
    )
    assert losses(folder, "next")[0] < reference[0]


def test_a_stage_on_conversations_and_text_inherits_its_tokenizer_and_resumes_exactly(folder, reference):
    """Packed records mixed with text, dropout on, cut in mid-epoch."""
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n * n}."}]} for n in range(90)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--init-from", "whole", "--data.source", "chat.jsonl", "--data.format", "chat", "--data.mix", "0.5:text:text.jsonl"]
    flags += ["--data.records", "chats", "--data.tokenizer", "inherit", "--data.train-tokenizer", "0", "--eval.prompt", "3?"]
    stderr = train(folder, "--workdir", "stage", *flags)
    assert "starting from the weights of whole, step 8" in stderr and "--chat" in stderr
    assert json.loads((folder / "stage" / "config.json").read_text())["data"]["tokenizer"] == "whole/tokenizer.model"
    sample = metrics.read_jsonl(folder / "stage" / "metrics.jsonl")[-1]["sample"]
    assert sample.startswith("<|user|>\n3?") and "<|assistant|>" in sample, "the sample answers in the format of training"
    train(folder, "--workdir", "cut-stage", "--steps", "5", *flags)
    train(folder, "--workdir", "cut-stage", *flags)
    assert losses(folder, "cut-stage") == losses(folder, "stage")
    for a, b in zip(weights(folder, "cut-stage"), weights(folder, "stage"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.kv-heads", "3"], "model.kv_heads = 3 in layer 0 does not divide"),
        (["--model.kv-heds", "2"], "--model.kv-heds"),
        (["--steps", "many"], "--steps"),
        (["--model.router.max-experts", "5"], "model.router.max_experts = 5 is more than model.experts"),
        (["--model.vocab-size", "301"], "model.vocab_size = 301"),
        (["--data.context", "64"], "data.context = 32, not 64"),
        (["--data.source", "absent.jsonl", "--data.records", "elsewhere"], "absent.jsonl does not exist"),
        (["--workdir", "whole", "--model.width", "64"], "model.width = 32"),
        (["--init-from", "nowhere"], "holds no run"),
        (["--data.tokenizer", "inherit", "--data.train-tokenizer", "0"], "name it with --init-from"),
        (["--init-from", "nowhere", "--data.tokenizer", "inherit", "--data.train-tokenizer", "0"], "holds no run"),
        (["--data.mix", "stdlib"], "write WEIGHT:SOURCE"),
        (["--model.attention", "cudnn"], "needs an NVIDIA GPU"),
        (["--config", "absent.py"], "--config is given twice"),
        (["--data.format", "chat"], "records holds other records than the config asks for (data.format = text, not chat)"),
        (["--eval.prompt", ""], "eval.prompt is empty"),
        (["--workdir", "text.jsonl/run"], "text.jsonl is a file"),
        (["--data.train-tokenizer", "299"], "data.train_tokenizer = 299 does not go with model.vocab_size = 300"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, reference, flags, message, monkeypatch, capsys):
    before = sorted(str(path) for path in folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train", "--config", "tiny.py", "--workdir", "bad", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(train_lib.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1 and stderr.startswith("error: ") and message in stderr
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_bad_input_ends_the_command_with_2(folder):
    done = subprocess.run(
        tiny.train_command("--model.kv-heads", "3"), cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: model.kv_heads = 3") and done.stderr.count("\n") == 1


def test_a_run_that_is_done_is_left_as_it_is(folder, reference):
    before = (folder / "whole" / "config.json").read_text()
    assert "has its 8 steps already" in train(folder, "--workdir", "whole", "--steps", "3")
    assert (folder / "whole" / "config.json").read_text() == before


def test_a_config_must_be_named(capsys):
    twice = ["--config", "a.py", "--config=b.py"]
    for words, message in (
        ([], "--config is missing"),
        (["configs/quickstart.py"], "--config"),
        (twice, "--config is given twice"),
    ):
        with pytest.raises(InputError, match=message):
            train_lib.main(words)


def test_another_tokenizer_is_refused_though_its_size_fits(folder, reference):
    text = "\n".join(json.dumps({"text": f"{n} other words entirely {n * n} " * 9}) for n in range(120))
    (folder / "other.jsonl").write_text(text)
    common = ["--data.source", "other.jsonl", "--data.records", "other"]
    train(folder, "--workdir", "other-run", "--steps", "3", *common)
    refused(folder, "made with another tokenizer", "--init-from", "whole", *common)


def refused(folder, message, *flags):
    """Runs the command, which ends with one line that holds the message."""
    done = subprocess.run(tiny.train_command(*flags), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


@pytest.fixture
def trained(tmp_path):
    """A folder of its own with a run of four steps."""
    tiny.write(tmp_path, TINY)
    train(tmp_path, "--workdir", "run", "--steps", "4")
    return tmp_path


def change_text(folder):
    """Other text of the same size under the same name."""
    text = (folder / "text.jsonl").read_text()
    (folder / "text.jsonl").write_text(text.replace("word", "rowd"))


def test_records_of_a_source_that_has_changed_are_refused(trained):
    change_text(trained)
    refused(trained, "records holds other records than the config asks for (the source has changed since)", "--workdir", "new")
    assert not (trained / "new").exists()
    (trained / "text.jsonl").unlink()  # what cannot be looked at is compared by its name
    train(trained, "--workdir", "new", "--steps", "1")


def test_records_of_a_tokenizer_that_has_changed_are_refused(trained):
    one, other = trained / "my.model", trained / "other.model"
    one.write_bytes((trained / "run" / "tokenizer.model").read_bytes())
    tokenizers.train_sentencepiece([f"zebra{n % 9} giraffe{n}" for n in range(300)], 300, other)
    flags = ("--data.tokenizer", "my.model", "--data.train-tokenizer", "0", "--data.records", "mine", "--steps", "2")
    train(trained, "--workdir", "one", *flags)
    one.write_bytes(other.read_bytes())
    refused(
        trained, "mine holds other records than the config asks for (the tokenizer has changed since", "--workdir", "two", *flags
    )


def test_a_run_resumes_on_the_records_it_had_and_no_others(trained):
    change_text(trained)
    tokenizer = ("--data.tokenizer", "run/tokenizer.model", "--data.train-tokenizer", "0")
    train(trained, "--workdir", "fresh", "--steps", "1", "--data.records", "changed", *tokenizer)
    manifest = trained / "changed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train_tokenizer": 0', '"train_tokenizer": 300'))  # as if trained for them
    refused(trained, "run was trained on other records of text.jsonl", "--workdir", "run", "--data.records", "changed")
    assert losses(trained, "run") and len(losses(trained, "run")) == 4


def test_a_moved_folder_of_records_is_still_the_runs(trained):
    (trained / "records").rename(trained / "moved")
    assert "resuming run from step 4" in train(trained, "--workdir", "run", "--steps", "5", "--data.records", "moved")


def test_a_run_resumes_in_another_folder_by_the_same_command_and_by_its_config(trained, tmp_path_factory):
    """By the same command the text is there again, and gives the same records; by its own config the old one is read."""
    other = tiny.write(tmp_path_factory.mktemp("other"), TINY)
    train(other, "--workdir", trained / "run", "--steps", "5")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = tiny.train_command("--workdir", trained / "run", "--steps", "6")
    command[command.index("tiny.py")] = str(trained / "run" / "config.json")
    done = subprocess.run(command, cwd=elsewhere, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(losses(trained, "run")) == 6 and not list(elsewhere.iterdir())
    train(other, "--workdir", trained / "run", "--steps", "7")
    train(trained, "--workdir", "run", "--steps", "8")
    assert len(losses(trained, "run")) == 8


def test_clipping_may_be_turned_off_and_on_in_a_resume(trained):
    assert "resuming run from step 4" in train(trained, "--workdir", "run", "--steps", "5", "--optim.clip-norm", "0")
    assert "resuming run from step 5" in train(trained, "--workdir", "run", "--steps", "6", "--optim.clip-norm", "0.5")
    assert len(losses(trained, "run")) == 6


def test_a_run_is_evaluated_from_any_folder_and_on_its_own_records(trained, tmp_path_factory):
    def evaluate(cwd):
        words = [sys.executable, "-m", "slimmoe_jax.evaluate", "--checkpoint", str(trained / "run"), "--batches", "2"]
        return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True)

    here, elsewhere = evaluate(trained), evaluate(tmp_path_factory.mktemp("elsewhere"))
    assert here.returncode == elsewhere.returncode == 0, elsewhere.stderr
    assert json.loads(here.stdout)["loss"] == json.loads(elsewhere.stdout)["loss"]
    path = trained / "records" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["validation"]["files"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    done = evaluate(trained)
    assert done.returncode == 2 and "was trained on other records" in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, reference):
    subprocess.run(["cp", "-r", "whole", "damaged"], cwd=folder, check=True)
    for file in (folder / "damaged" / "checkpoints" / "8" / "weights").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    stderr = train(folder, "--workdir", "damaged")
    assert "checkpoints/8 cannot be read" in stderr and "set aside in damaged/damaged" in stderr and "from step 4" in stderr
    assert losses(folder, "damaged") == losses(folder, "whole")
    for a, b in zip(weights(folder, "damaged"), weights(folder, "whole"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (folder / "damaged" / "damaged" / "8" / "weights").is_dir() and (folder / "damaged" / "checkpoints" / "8").is_dir()


def test_dry_run_plans_the_card_model_and_writes_nothing(tmp_path):
    config = os.path.join(ROOT, "configs", "pretrain.py")
    arguments = [sys.executable, "-m", "slimmoe_jax.train", "--config", config, "--dry-run"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "250,284,288" in done.stdout and not list(tmp_path.iterdir())
    for words in ("active matrix parameters", "causal", "PaLM", "MHA", "NoPE", "tokens a step", "Memory"):
        assert words in done.stdout


def test_flops_follow_the_published_arithmetic():
    """Top-2 with four kv heads everywhere: 987 MFLOPs a token causal, 1,138 in PaLM's convention."""
    from slimmoe_jax.config import ModelConfig

    flops = metrics.train_flops_per_token(ModelConfig(kv_heads=(4,)), 2_048, experts=2)
    assert round(flops["causal"] / 1e6) == 987 and round(flops["palm"] / 1e6) == 1138
