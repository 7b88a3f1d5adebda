"""The config tree: shipped configs are valid, JSON and Python agree, and each mistake is named with its field."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from slimmoe_jax import cli, validation
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, ModelConfig, TrainConfig, override

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = [*sorted(FOLDER.glob("*.py")), FOLDER / "ablations" / "base.py"]  # the rest of which are studies


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_survive_json(path, tmp_path):
    config = config_lib.load(path)
    validation.validate(config)
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json") == config == config_lib.load(tmp_path)


def test_the_defaults_are_the_card():
    """16 layers, width 768, 4 experts of 1536, 12 heads, context 2048, GPT-2 vocabulary, dropout 0.1, float32."""
    config = TrainConfig()
    model = config.model
    assert (model.layers, model.width, model.experts, model.expert_hidden, model.heads) == (16, 768, 4, 1536, 12)
    assert (config.data.context, model.vocab_size, model.dropout, config.precision) == (2048, 50_257, 0.1, "float32")
    assert sum(model.layer_kv_heads) == 32 and model.layer_rotary == (1.0, 1.0, 1.0, 0.0) * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.kv_heads": (4, 5)}, "model.kv_heads = 5 in layer 1 does not divide model.heads = 12"),
        ({"model.kv_heads": (4, 4, 2)}, "model.kv_heads has 3 entries"),
        ({"model.rotary": (1.5,)}, "model.rotary = 1.5 in layer 0"),
        ({"model.head_dim": 63}, "model.head_dim = 63 is odd"),
        ({"model.dropout": 1.0}, "model.dropout = 1.0"),
        ({"model.layers": 0}, "model.layers = 0"),
        ({"model.router.max_experts": 5}, "model.router.max_experts = 5 is more than model.experts = 4"),
        ({"model.experts": 1}, "model.router.max_experts = 2 is more than model.experts = 1"),
        ({"model.router.target_experts": 2.5}, "a mean cannot exceed the maximum"),
        ({"model.router.target_experts": 0.5}, "top_p gives each token at least one expert"),
        ({"model.router.threshold": 0.0}, "model.router.threshold = 0.0"),
        ({"model.router.kind": "relu", "model.router.balance": "bias"}, "model.router.balance = bias"),
        ({"model.router.renormalize": True, "model.router.max_experts": 1, "model.router.target_experts": 1.0}, "renormalize"),
        ({"data.validation_fraction": 0.0}, "data.validation_fraction"),
        ({"data.tokenizer": "sentencepiece"}, "data.train_tokenizer"),
        ({"data.train_tokenizer": 300}, "set data.tokenizer to sentencepiece"),
        ({"optim.warmup_steps": 1_000}, "optim.warmup_steps = 1000 leaves nothing"),
        ({"optim.accumulate": 5}, "optim.accumulate = 5 does not divide data.batch_size = 32"),
        ({"optim.beta2": 1.0}, "optim.beta2 = 1.0"),
        ({"mesh.expert": 3}, "mesh.expert = 3 does not divide model.experts = 4"),
        ({"mesh.fsdp": 0}, "mesh.fsdp = 0"),
        ({"steps": 0}, "of the 0 steps of the schedule"),
        ({"log_every": 0}, "log_every = 0"),
        ({"eval.temperature": -1.0}, "eval.temperature = -1.0"),
    ],
)
def test_impossible_values_name_their_field(fields, message):
    validation.validate(TrainConfig())
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        validation.validate(override(TrainConfig(), fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": "many"}', "steps = 'many': must be int"),
        ('{"steps": true}', "steps = True: must be int"),
        ('{"stepz": 1}', "unknown field stepz: did you mean steps?"),
        ('{"model": {"kvheads": 1}}', "unknown field model.kvheads: did you mean model.kv_heads?"),
        ('{"model": {"kv_heads": 4}}', "model.kv_heads = 4: must be a list"),
        ('{"model": {"router": {"kind": "best"}}}', "model.router.kind = 'best': choose from top_k, top_p, relu"),
        ('{"model": 3}', "model must be an object"),
        ("[]", "the config must be an object"),
        ("{", "not readable JSON"),
    ],
)
def test_json_mistakes_name_their_field(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        config_lib.load(tmp_path / "config.json")
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def get_config(): return 3", "returned int"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(:", "SyntaxError"),
        ("from slimmoe_jax.config import *\ndef get_config(): return TrainConfig(stepz=1)", "stepz"),
    ],
)
def test_python_mistakes_are_one_message(tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(InputError) as error:
        config_lib.load(tmp_path / "c.py")
    assert message in str(error.value) and "c.py" in str(error.value)


def parse(*argv):
    return cli.train_config(argv, prog="train", description="")


def test_flags_are_typed_and_reach_every_level():
    config = parse("--model.kv-heads", "4", "1", "--model.router.kind", "top_k", "--optim.learning-rate", "1e-3", "--steps=200")
    assert config.model.kv_heads == (4, 1) and config.model.router.kind == "top_k"
    assert config.optim.learning_rate == 1e-3 and config.steps == 200
    assert config.optim.schedule_steps == 1_000, "--steps does not stretch the schedule"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.kv-heds", "4"], "--model.kv-heds"),
        (["--steps", "many"], "--steps"),
        (["--watchdog", "nan"], "--watchdog: 'nan' is not a whole number; it is described as"),
        (["--model.layers", "1e3"], "--model.layers: '1e3' is not a whole number"),
        (["--optim.learning-rate", "fast"], "--optim.learning-rate: 'fast' is not a number"),
        (["--name"], "Expected 1 values; for all flags run"),
        (["--model.router.kind", "best"], "top_k"),
        (["--config"], "--config needs a file"),
        (["--config", "notes.txt"], "no config at notes.txt"),
        (["stray"], "stray"),
    ],
)
def test_flag_mistakes_are_one_line(argv, message):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("TrainConfig(\n    model=ModelConfig(widht=8))", "failed in line 4: .*'widht': did you mean width[?]"),
        ("TrainConfig(zzz=1)", "failed in line 3: .*'zzz'$"),
        ("(", "failed in line 3: SyntaxError: "),
    ],
)
def test_a_config_that_fails_names_its_line(tmp_path, returned, message):
    path = tmp_path / "mine.py"
    path.write_text(f"from slimmoe_jax.config import *\ndef get_config():\n    return {returned}\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: get_config[(][)] {message}") as error:
        config_lib.load(path)
    assert "\n" not in str(error.value)


def test_the_bare_name_of_a_config_is_understood_in_the_error():
    with pytest.raises(InputError, match="^no config at quickstart: did you mean configs/quickstart.py[?]$"):
        config_lib.load("quickstart")


def test_records_have_a_folder_of_their_own_for_each_setting_that_shapes_them():
    data = TrainConfig().data
    same = dataclasses.replace(data, batch_size=1, workers=2)
    assert config_lib.records_dir(data) == config_lib.records_dir(same)
    changes = [{"source": "x"}, {"context": 9}, {"tokenizer": "t"}, {"min_characters": 1}, {"validation_fraction": 0.5}]
    folders = {config_lib.records_dir(dataclasses.replace(data, **change)) for change in [{}, *changes]}
    assert len(folders) == 1 + len(changes)


def test_differences_are_dotted():
    a, b = TrainConfig(), override(TrainConfig(), {"steps": 2, "model.router.max_experts": 1})
    assert config_lib.differences(a, b) == {"steps": (1000, 2), "model.router.max_experts": (2, 1)}
    assert json.dumps(config_lib.to_json(ModelConfig()))
