"""Values that cannot work are one line that names them, at once: before anything is compiled, written or looped over."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from slimmoe_jax import config as config_lib
from slimmoe_jax import metrics, summary, validation
from slimmoe_jax.config import DataConfig, InputError, ModelConfig, TrainConfig, flat, override
from slimmoe_jax.metrics import JsonlWriter
from slimmoe_jax.study.design import Arm

FIELDS = flat(TrainConfig())
WHOLE = [name for name, value in FIELDS.items() if type(value) is int] + ["model.kv_heads"]
FLOATS = [name for name, value in FIELDS.items() if type(value) is float] + ["model.rotary"]
TEXTS = [name for name, value in FIELDS.items() if isinstance(value, str)] + ["data.mix"]


def with_value(name, value, config=None):
    """The config with a value that Python put there, of whatever type."""
    config = config or TrainConfig()
    first, _, rest = name.partition(".")
    new = with_value(rest, value, getattr(config, first)) if rest else (value,) if first in ("kv_heads", "rotary", "mix") else value
    return dataclasses.replace(config, **{first: new})


def refusal(config):
    """What `validate` says, one line; empty where it takes the config, whose plan is then made. Both within a second."""
    started, said = time.monotonic(), ""
    try:
        validation.validate(config)
        assert "Parameters" in summary.plan(config, 8)
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 600
    assert time.monotonic() - started < 1
    return said


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_have_bounds(name):
    assert refusal(TrainConfig()) == ""
    for value in (10**9, -1, True, 8.0, "8", np.int64(8)):
        said = refusal(with_value(name, value))
        assert said or (type(value) is int and (name, value) == ("mesh.data", -1)) or value == 10**9, value
    for value in (10**18, 2**63, 10**5000, -(10**5000)):
        assert name in refusal(with_value(name, value)), "however large, it is named"


def test_each_whole_number_has_a_most():
    assert set(WHOLE) <= set(validation.MOST), "a new field needs a bound"


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_finite_in_float32(name):
    for value in (math.inf, -math.inf, math.nan, 1e308, 1e39, -1e39, 1e-320, 1e-39, 10**400, True, "0.1", np.float32(0.5), None):
        assert name in refusal(with_value(name, value)), value
    for value in (3e38, -1.0, 1e-37, 0.0, 1):
        refusal(with_value(name, value))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed = -1: give a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296: give a whole number from 0 to 4294967295"),
        ({"seed": 2**32 - 1, "data.mix": ("1:stdlib",)}, "from 0 to 4294967294 .*data.mix"),
        ({"optim.beta1": 1 - 1e-9}, "optim.beta1 = 0.999999999: "),  # 1 in float32: 0 / 0 in AdamW
        ({"model.dropout": 1 - 1e-12}, "model.dropout = 0.999999999999: "),
        ({"optim.learning_rate": 1e30, "optim.final_fraction": 1e30}, "optim.final_fraction"),
        ({"data.mix": ("1e308:stdlib",)}, r"data.mix = 1e308:stdlib: give a weight from 1e-06 to 1e\+06"),  # Grain overflows
        ({"data.mix": ("1e-300:stdlib",)}, "data.mix = 1e-300:stdlib"),  # Grain never reads it
        ({"model.layers": 10_000, "model.kv_heads": (1,), "model.experts": 2**16}, r"some 1.5e\+15 parameters, 24,747 TB"),
        ({"data.context": 2**20, "data.batch_size": 2**12}, "data.batch_size x data.context = 4096 x 1048576 is 4,294,967,296"),
        ({"model.layers": 10**9}, "^model.layers = 1000000000: give at most 10,000$"),
    ],
)
def test_what_cannot_work_names_its_field(fields, message):
    said = refusal(override(TrainConfig(), fields))
    assert re.search(message, said), said


def test_the_largest_seeds_work():
    for seed, mix in ((2**32 - 1, ()), (2**32 - 2, ("1:stdlib",))):
        assert refusal(override(TrainConfig(), {"seed": seed, "data.mix": mix})) == ""


@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(gated=True, experts=64), ModelConfig(kv_heads=(1,), layers=60)])
def test_the_bound_on_parameters_counts_about_as_the_plan_does(model, monkeypatch):
    monkeypatch.setattr(validation, "MOST_PARAMETERS", 0)
    counted = float(re.search(r"some (\S+) parameters", refusal(TrainConfig(model=model)))[1])
    assert counted == pytest.approx(sum(metrics.parameter_counts(model).values()), rel=0.15)


def test_a_batch_of_more_records_than_there_are():
    validation.check_batch(DataConfig(batch_size=531), 531)
    with pytest.raises(InputError, match="^data.batch_size = 532 is more than the 531 training records"):
        validation.check_batch(DataConfig(batch_size=532), 531)


def test_the_levels_and_seeds_of_a_study_are_checked():
    for changes, seed, message in (
        ({"optim.learning_rate": math.nan}, 0, "arm a: optim.learning_rate = nan"),
        ({"model.layers": 10**9}, 0, "arm a: model.layers = 1000000000"),
        ({}, -1, "arm a: seed = -1"),
        ({}, True, "arm a: seed = True"),
    ):
        with pytest.raises(InputError, match=message):
            Arm("a", {"axis": "a"}, changes).config(TrainConfig(), seed, "out")


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_utf8(name):
    start = "1:" if name == "data.mix" else ""
    for value in (f"{start}r\udcfcn", f"{start}\ud800", f"{start}a\0b", b"bytes", 3):
        said = refusal(with_value(name, value))
        assert name in said
        assert said.isprintable(), "what it shows cannot command a terminal"


def test_paths_can_be_paths():
    assert "255" not in refusal(TrainConfig(workdir="a" * 255))
    for name, value in (("workdir", "a" * 256), ("name", "ü" * 128), ("init_from", "a/" * 2_001), ("data.source", "b" * 300)):
        assert f"{name} = " in refusal(with_value(name, value)), name
    for name in ("data.source", "data.tokenizer", "data.records", "compilation_cache"):
        assert "no such user" in refusal(with_value(name, "~nobody-of-this-name/x")), name
    assert "no such user" in refusal(with_value("data.mix", "1:~nobody-of-this-name/x"))


def test_the_current_folder_counts_only_where_it_matters(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/r\xfcn"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    assert refusal(TrainConfig()).startswith(r"the current folder = ") and r"\udcfc" in refusal(TrainConfig())
    assert refusal(TrainConfig(workdir=str(tmp_path / "run"))) == ""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert refusal(TrainConfig()) == "the current folder is gone: change to one that exists"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"optim": {"learning_rate": NaN}}', "optim.learning_rate = nan: must be a finite number"),
        (b'{"optim": {"learning_rate": -Infinity}}', "optim.learning_rate = -inf"),
        (b'{"optim": {"learning_rate": 1e999}}', "optim.learning_rate = inf"),
        (b'{"optim": {"learning_rate": 1%s}}' % (b"0" * 400), r"optim.learning_rate = 1000.*\.\.\.: must be float"),
        (b'{"steps": 1%s}' % (b"0" * 5000), "not readable JSON"),
        (b'{"name": %s%s}' % (b"[" * 100_000, b"]" * 100_000), "not readable JSON .*nested too deep"),
        (b'{"name": %s%s}' % (b"[" * 900, b"]" * 900), "not readable JSON .*nested too deep"),
        (b'{"name": "r\xfcn"}', "not readable JSON"),
        (b'{"mesh": {"%s": 1}}' % (b"x" * 10**5), "unknown field mesh.xxx"),
    ],
)
def test_json_that_cannot_be_a_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        config_lib.load(tmp_path / "config.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_json_is_utf8_whatever_the_locale(tmp_path):
    config = override(TrainConfig(), {"eval.prompt": "Größe 你好"})
    config_lib.save(config, tmp_path / "config.json")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "config.json").write_text(json.dumps(config_lib.to_json(config), ensure_ascii=False), encoding="utf-8")
    program = "import sys\nfrom slimmoe_jax import config\nprint(ascii([config.load(path).eval.prompt for path in sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.json"), str(tmp_path / "raw" / "config.json")],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == ascii(["Größe 你好"] * 2), done.stderr


def test_paths_too_long_to_look_for_are_read_as_they_are(tmp_path):
    long = "x" * 5_000
    tree = {"data": {"records": long, "source": long, "mix": [f"1:{long}"]}, "init_from": long}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "records.json").write_text(json.dumps({"folder": str(tmp_path), "records": []}))
    assert config_lib.load(tmp_path).data.records == long


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return TrainConfig(steps='8')", "steps = '8': must be int"),
        ("return TrainConfig(steps=True)", "steps = True: must be int"),
        ("return TrainConfig(steps=np.int64(8))", "steps = np.int64[(]8[)]: must be int"),
        ("return TrainConfig(steps=10 ** 5000.0)", "OverflowError"),
        ("return TrainConfig(steps=None)", "steps = None: must be int"),
        ("return TrainConfig(model=3)", "model must be an object, not int"),
        ("return TrainConfig(model=OptimConfig())", "model must be an object, not OptimConfig"),
        ("return TrainConfig(model=ModelConfig(kv_heads=3))", "model.kv_heads = 3: must be a list"),
        ("return TrainConfig(model=ModelConfig(rotary=(math.nan,)))", "model.rotary = nan: must be a finite number"),
        ("return TrainConfig(model=ModelConfig(router=RouterConfig(kind='best')))", "model.router.kind = 'best': choose from"),
        ("return TrainConfig(model=ModelConfig(router=RouterConfig(kind=np.arange(3))))", "model.router.kind = array"),
        ("return TrainConfig(data=DataConfig(mix='1:stdlib'))", "data.mix = '1:stdlib': must be a list"),
        ("sys.exit(3)", "ended the process with exit code 3"),
        ("return get_config()", "failed in line 6: RecursionError"),
        ("raise ValueError('first\\nsecond')", "failed in line 6: ValueError: first$"),
        ("return 1 / 0", "failed in line 6: ZeroDivisionError"),
    ],
)
def test_python_that_cannot_be_a_config(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(f"import math, sys\nimport numpy as np\nfrom slimmoe_jax.config import *\n\ndef get_config():\n    {body}\n")
    with pytest.raises(InputError, match=message) as error:
        config_lib.load(path)
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"x = '\xfc'", b"x = 1\0", b"(" * 10_000, b"\xff\xfe", b"-" * 100_000 + b"1"])
def test_python_that_is_none_is_one_message(tmp_path, content):
    (tmp_path / "mine.py").write_bytes(content)
    with pytest.raises(InputError, match="mine.py: get_config") as error:
        config_lib.load(tmp_path / "mine.py")
    assert "\n" not in str(error.value)


def test_python_lists_become_tuples(tmp_path):
    """A list cannot be hashed, and a model's config is a constant of compiled programs."""
    (tmp_path / "mine.py").write_text(
        "from slimmoe_jax.config import *\ndef get_config(): return TrainConfig(model=ModelConfig(kv_heads=[4], rope_theta=1000))"
    )
    model = config_lib.load(tmp_path / "mine.py").model
    assert model.kv_heads == (4,) and type(model.rope_theta) is float and hash(model)
    assert "model.kv_heads = [4]: must be a tuple" in refusal(TrainConfig(model=ModelConfig(kv_heads=[4])))


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------

GOOD = [b'{"step": %d, "loss": %d.5}' % (step, step) for step in range(1, 7)]
DAMAGE = {
    "not an object": b"3",
    "no step": b'{"loss": 1.0}',
    "a step that is none": b'{"step": "4"}',
    "a step below zero": b'{"step": -4}',
    "NUL bytes": b"\0" * 40,
    "no UTF-8": b'{"step": 4, "sample": "r\xfcn"}',
    "nested": b"[" * 100_000,
    "cut off": b'{"step": 4, "lo',
    "NaN": b'{"step": 4, "loss": NaN}',
    "beyond floats": b'{"step": 4, "loss": 1e999}',
    "empty": b"",
    "a step far ahead": b'{"step": 4000, "loss": 1.0}',
    "a step far behind": b'{"step": 1, "loss": 1.0}',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_is_set_aside_and_the_rest_kept(tmp_path, capsys, kind):
    path, lines = tmp_path / "metrics.jsonl", [*GOOD[:3], DAMAGE[kind], *GOOD[3:]]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [row["step"] for row in metrics.read_jsonl(path)] == [1, 2, 3, 4, 5, 6]
    assert metrics.read_jsonl(path)[3]["loss"] == 4.5
    assert capsys.readouterr().err == f"{path}: 1 damaged line (line 4) is left out\n", "once, however often it is read"
    assert path.read_bytes() == b"\n".join(lines) + b"\n", "reading changes nothing"

    writer = JsonlWriter(path, 5)
    writer.write({"step": 6, "loss": float("nan")})
    writer.close()
    assert path.read_bytes() == b"\n".join([*GOOD[:5], b'{"step": 6, "loss": null}']) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == DAMAGE[kind] + b"\n"
    assert capsys.readouterr().err == f"{path}: 1 damaged line (line 4) is moved to {path}.damaged\n"


@pytest.mark.parametrize("torn", [b'{"step": 7, "lo', b"\0" * 40, b""])
def test_a_torn_last_line_is_nothing_to_speak_of(tmp_path, capsys, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(GOOD) + b"\n" + torn)
    assert len(metrics.read_jsonl(path)) == 6 and metrics.last_row(path)["step"] == 6
    JsonlWriter(path, 6).close()
    assert path.read_bytes() == b"\n".join(GOOD) + b"\n"
    assert os.listdir(tmp_path) == ["metrics.jsonl"] and capsys.readouterr().err == ""


def test_of_steps_written_twice_the_later_stay(tmp_path, capsys):
    """As where two processes wrote to one file."""
    path, earlier = tmp_path / "metrics.jsonl", [b'{"step": %d, "loss": 0.0}' % step for step in (3, 4)]
    path.write_bytes(b"\n".join([*GOOD[:2], *earlier, *GOOD[2:]]) + b"\n")
    JsonlWriter(path, 6).close()
    assert path.read_bytes() == b"\n".join(GOOD) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(earlier) + b"\n"
    assert "2 damaged lines (the first is line 3) are moved to" in capsys.readouterr().err


def test_the_last_row_is_found_behind_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.last_row(path) is None
    path.write_bytes(b"\n".join([*GOOD, *list(DAMAGE.values())[:-2]]) + b"\n")  # but for steps that nothing tells from good ones
    assert metrics.last_row(path) == {"step": 6, "loss": 6.5}
    path.write_bytes(DAMAGE["nested"])
    assert metrics.last_row(path) is None


def test_metrics_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for read in (metrics.read_jsonl, lambda path: JsonlWriter(path, 1)):
        with pytest.raises(InputError, match="metrics.jsonl cannot be read"):
            read(tmp_path / "metrics.jsonl")


def test_what_is_not_finite_is_null(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write({"step": 1, "a": np.float32("inf"), "b": np.array([1, np.nan]), "c": {"d": (math.nan, 2.0)}})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": [1.0, null], "c": {"d": [null, 2.0]}}\n'


# --- the commands ----------------------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (["--seed", "-1"], {}, "seed = -1: give a whole number from 0 to 4294967295"),
        (["--optim.learning-rate", "inf"], {}, "optim.learning_rate = inf"),
        (["--model.layers", "1000000000", "--dry-run"], {}, "model.layers = 1000000000: give at most 10,000"),
        (["--eval.prompt", b"caf\xe9"], {}, r"eval.prompt = caf\udce9 is not valid UTF-8"),
        (["--eval.prompt", "Größe"], ASCII, "this terminal's encoding is ascii"),
        (["--workdir", b"r\xfcn"], {}, r"workdir = r\udcfcn is not valid UTF-8: rename the file or folder"),
        (["--workdir", "rün"], ASCII, "this terminal's encoding is ascii"),
        (["--data.batch-size", "100000"], {}, "data.batch_size = 100000 is more than the "),
    ],
)
def test_the_command_says_so_and_makes_no_run(tmp_path, flags, variables, message):
    tiny.write(tmp_path, tiny.source())
    words = [*map(os.fsencode, tiny.train_command()), *(word if isinstance(word, bytes) else word.encode() for word in flags)]
    environment = os.environ | variables | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=100)
    said = done.stderr.decode().splitlines()
    assert done.returncode == 2 and said[-1].startswith("error: ") and message in said[-1], said
    assert "Traceback" not in done.stderr.decode()
    assert not [*tmp_path.rglob("checkpoints"), *tmp_path.rglob("config.json")]


@pytest.mark.slow
def test_a_run_with_damaged_metrics_resumes(tmp_path):
    tiny.write(tmp_path, tiny.source())
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(tiny.train_command("--workdir", "run", "--steps", "4"), cwd=tmp_path, env=environment, check=True)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\0" * 30, *lines[1:], b"[" * 10**5]) + b"\n")
    done = subprocess.run(
        tiny.train_command("--workdir", "run"), cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "run/metrics.jsonl: 2 damaged lines (the first is line 2) are moved to run/metrics.jsonl.damaged" in done.stderr
    assert path.read_bytes().splitlines()[:4] == lines
    assert [row["step"] for row in metrics.read_jsonl(path)] == list(range(1, 9))
