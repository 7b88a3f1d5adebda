"""Studies: their arms, what each mistake says, and that those which are shipped can run."""

import itertools
import re
from pathlib import Path

import pytest

from slimmoe_jax import config as config_lib
from slimmoe_jax import metrics, validation
from slimmoe_jax.config import InputError, ModelConfig, RouterConfig, TrainConfig, override
from slimmoe_jax.study import design
from slimmoe_jax.study.design import Study

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / "configs" / "ablations").glob("*.py") if path.name != "base.py")
AXES = {
    "attention": {"vgqa": {}, "mha": {"model.kv_heads": (12,)}},
    "router": {
        "top_p": {},
        "top_k": {"model.router.kind": "top_k"},
        "dense": {"model.experts": 1, "model.router.max_experts": 1},
    },
}


def make_study(**fields):
    return Study(**{"name": "s", "base": TrainConfig(), "axes": AXES} | fields)


def names(study):
    return [arm.name for arm in design.arms(study)]


def write(path, returned, head='"""A question?\n\nHypothesis: yes.\n"""'):
    """A study's file whose get_config() returns that expression."""
    imports = "from slimmoe_jax.config import InputError, TrainConfig\nfrom slimmoe_jax.study.design import Study"
    path.write_text(f"{head}\n{imports}\n\n\ndef get_config():\n    return {returned}\n")
    return path


# --- arms ------------------------------------------------------------------------------------------------------------


def test_every_combination_is_an_arm_once():
    """2 x 3 levels: six arms in the order of the product, the first of them the reference, with the changes of both levels."""
    arms = design.arms(make_study())
    assert [arm.name for arm in arms] == ["vgqa-top_p", "vgqa-top_k", "vgqa-dense", "mha-top_p", "mha-top_k", "mha-dense"]
    assert [arm.levels for arm in arms] == [
        {"attention": attention, "router": router} for attention, router in itertools.product(*AXES.values())
    ]
    assert arms[0].changes == {}
    assert arms[5].changes == {"model.kv_heads": (12,), "model.experts": 1, "model.router.max_experts": 1}


def test_the_reference_comes_first_and_the_rest_keep_their_order():
    assert names(make_study(reference=("mha", "top_p"))) == [
        "mha-top_p", "vgqa-top_p", "vgqa-top_k", "vgqa-dense", "mha-top_k", "mha-dense"
    ]  # fmt: skip


def test_listed_combinations_alone_are_arms():
    """In their order, the first the reference unless another is named."""
    listed = (("mha", "dense"), ("vgqa", "top_p"), ("mha", "top_k"))
    assert names(make_study(combinations=listed)) == ["mha-dense", "vgqa-top_p", "mha-top_k"]
    assert names(make_study(combinations=listed, reference=("mha", "top_k"))) == ["mha-top_k", "mha-dense", "vgqa-top_p"]


def test_an_arm_is_the_base_with_its_changes():
    """They reach every depth of the config, beside seed, name and folder; all else is the base's."""
    base = override(TrainConfig(), {"steps": 777, "seed": 9, "model.layers": 8, "model.kv_heads": (4,)})
    arm = {arm.name: arm for arm in design.arms(make_study(base=base))}["mha-dense"]
    changed = config_lib.differences(base, arm.config(base, 5, Path("a/b")))
    assert {name: new for name, (_, new) in changed.items()} == {
        "seed": 5, "name": "mha-dense", "workdir": "a/b", "model.kv_heads": (12,), "model.experts": 1, "model.router.max_experts": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.kv_heads": (5,)}, "model.kv_heads = 5 in layer 0 does not divide model.heads = 12"),
        ({"model.experts": 1}, "model.router.max_experts = 2 is more than model.experts = 1"),
        ({"model.kv_heds": (4,)}, "unknown field model.kv_heds: did you mean model.kv_heads?"),
        ({"stepz": 4}, "unknown field stepz"),
    ],
)
def test_an_arm_that_cannot_work_is_named(changes, message):
    arm = design.arms(make_study(axes={"a": {"odd": changes}, "b": {"good": {"model.layers": 32}}}))[0]
    with pytest.raises(InputError, match=f"^arm odd-good: .*{re.escape(message)}"):
        arm.config(TrainConfig(), 0, "w")


@pytest.mark.parametrize("changes", [{"model.router.kind": "topk"}, {"precision": "bf16"}, {"model.layers": "8"}, {"steps.x": 1}])
def test_a_value_of_the_wrong_kind_is_named(changes):
    """As it is where it comes from JSON or a flag; else the mistake is found when the arm's process has started."""
    arm = design.arms(make_study(axes={"a": {"odd": changes}}))[0]
    with pytest.raises(InputError, match="^arm odd: "):
        arm.config(TrainConfig(), 0, "w")


SAME = {"model.layers": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes": {}}, "study s has an axis without levels, or no axis"),
        ({"axes": AXES | {"empty": {}}}, "study s has an axis without levels, or no axis"),
        ({"seeds": ()}, "study s: seeds = []: give at least one, each once"),
        ({"seeds": (3, 1, 3)}, "study s: seeds = [3, 1, 3]: give at least one, each once"),
        ({"reference": ("mha", "relu")}, "study s: the reference mha-relu is not among its arms: name one of them"),
        (
            {"combinations": (("mha", "top_k"),), "reference": ("vgqa", "top_p")},
            "study s: the reference vgqa-top_p is not among its arms: name one of them",
        ),
        ({"combinations": (("mha", "relu"),)}, "study s: axis router has no level 'relu': it has top_p, top_k, dense"),
        ({"combinations": (("top_k", "mha"),)}, "study s: axis attention has no level 'top_k': it has vgqa, mha"),
        ({"combinations": (("mha",),)}, "study s: ('mha',) must have a level for each of attention, router"),
        ({"combinations": (("mha", "top_k", "x"),)}, "('mha', 'top_k', 'x') must have a level for each of attention, router"),
        (
            {"combinations": (("mha", "top_k"), ("vgqa", "top_k"), ("vgqa", "top_k"))},
            "study s: two arms are called vgqa-top_k: name the levels differently",
        ),
        ({"axes": {"a": {8: SAME}}}, "study s: (8,): name the levels in strings"),
        ({"axes": {"a": {"x": {"seed": 3}}}}, "study s: axis a changes seed, which each arm is given: leave it out"),
        ({"axes": {"a": {"x": SAME}, "b": {"y": SAME}}}, "study s: axis b changes model.layers, as another axis does"),
        ({"axes": {"a": {"x": {}, "z": SAME}, "b": {"y": SAME}}}, "study s: axis b changes model.layers, as another axis does"),
        *(
            ({"axes": {"a": {level: {}}}}, f"study s: level {level!r} names a folder: use letters, digits, '.', '_' and '+'")
            for level in ("..", "1/2", "a b", "a-b", "", "x\n", "ä")
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(InputError) as error:
        design.arms(make_study(**fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_and_its_whole_are_one_field():
    """Of a whole RouterConfig and a field of it one is lost, which one by the order of the axes."""
    axes = {"router": {"relu": {"model.router": RouterConfig(kind="relu")}}, "kind": {"top_k": {"model.router.kind": "top_k"}}}
    with pytest.raises(InputError, match="as another axis does"):
        design.arms(make_study(axes=axes))


def test_one_axis_may_change_a_field_in_each_of_its_levels():
    assert names(make_study(axes={"a": {"8": {"model.layers": 8}, "16": {"model.layers": 16}}})) == ["8", "16"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"combinations": tuple(itertools.product(*AXES.values()))[::-1]}, True),
        ({"combinations": tuple(itertools.product(*AXES.values()))[1:]}, False),
        ({"axes": {"attention": AXES["attention"]}}, False),
        ({"axes": {"attention": AXES["attention"], "one": {"level": {}}}}, False),
        ({"axes": AXES | {"one": {"level": {}}}}, True),
        ({"axes": AXES | {"third": {"a": {}, "b": {}}}}, True),
    ],
)
def test_factorial_is_two_axes_fully_crossed(fields, expected):
    """All combinations, listed or not; an axis of one level is none."""
    assert design.is_factorial(make_study(**fields)) is expected


# --- files -----------------------------------------------------------------------------------------------------------


STUDY = 'Study("s", TrainConfig(), {"a": {"x": {}, "y": {"steps": 5}}}%s)'


def test_a_file_is_a_study_with_its_docstring_for_a_hypothesis(tmp_path):
    study = design.load(write(tmp_path / "s.py", STUDY % ", seeds=(4, 2)"))
    assert (study.name, study.seeds, names(study)) == ("s", (4, 2), ["x", "y"])
    assert study.hypothesis == "A question?\n\nHypothesis: yes."
    assert design.load(str(write(tmp_path / "s.py", STUDY % ', hypothesis="no"'))).hypothesis == "no"
    assert design.load(write(tmp_path / "s.py", STUDY % "", head="")).hypothesis == ""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("TrainConfig()", "s.py: get_config() returned TrainConfig: it must return a Study"),
        ("None", "s.py: get_config() returned NoneType: it must return a Study"),
        ("1 / 0", "s.py: get_config() failed in line 10: ZeroDivisionError: division by zero"),
        ('Study("s", TrainConfig(steeps=1), {})', "s.py: get_config() failed in line 10: TypeError:"),
        ('Study("s")', "s.py: get_config() failed in line 10: TypeError:"),
        (STUDY % ", seeds=(1, 1)", "study s: seeds = [1, 1]"),
    ],
)
def test_files_that_are_no_study_are_refused(tmp_path, returned, message):
    with pytest.raises(InputError) as error:
        design.load(write(tmp_path / "s.py", returned))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_may_refuse_in_its_own_words(tmp_path):
    """Such as the base's that it loads: the message stands as it is."""
    path = write(tmp_path / "s.py", "0", head='raise __import__("slimmoe_jax.config").config.InputError("no base here")')
    with pytest.raises(InputError, match="^no base here$"):
        design.load(path)


@pytest.mark.parametrize(
    ("name", "message"), [("absent.py", "no config at "), (".", "no config at "), ("notes.txt", "notes.txt is not a config: give ")]
)
def test_files_that_are_not_there_or_not_python_are_refused(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("get_config")
    with pytest.raises(InputError) as error:
        design.load(tmp_path / name)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_run_file_takes_what_it_is_asked_for(tmp_path):
    """The same file is a config to one caller and a mistake to another; the module comes with it."""
    path = write(tmp_path / "c.py", "TrainConfig(steps=7)")
    config, module = config_lib.run_file(path, TrainConfig)
    assert config == TrainConfig(steps=7) == config_lib.load(path) and module.__doc__.startswith("A question?")
    with pytest.raises(InputError, match="returned TrainConfig: it must return a Study"):
        config_lib.run_file(path, Study)
    with pytest.raises(InputError, match="returned Study: it must return a TrainConfig"):
        config_lib.load(write(tmp_path / "s.py", STUDY % ""))


# --- cost ------------------------------------------------------------------------------------------------------------


def test_train_flops_by_hand():
    """3 steps of 4 sequences of 10 tokens; a token takes 6 FLOPs a matrix parameter that it meets, and half of full attention."""
    config = TrainConfig(steps=3)
    model = ModelConfig(
        vocab_size=50, layers=2, width=8, heads=4, head_dim=3, kv_heads=(4, 1), experts=4, expert_hidden=5,
        router=RouterConfig(target_experts=1.5),
    )  # fmt: skip
    config = override(config, {"model": model, "data.batch_size": 4, "data.context": 10})
    head, queries_and_out, keys_and_values, router = 50 * 8, 2 * 2 * 8 * 12, 2 * 8 * 3 * (4 + 1), 2 * 8 * 4
    experts = 2 * 1.5 * (2 * 8 * 5)  # up and down
    products = 2 * (2 * 12 * 10 / 2)  # queries by keys, and weights by values: 2 FLOPs x 4 heads of 3 x half the context
    attention = 2 * 3 * products  # in two layers, forward and twice as much back
    per_token = 6 * (head + queries_and_out + keys_and_values + router + experts) + attention
    assert design.train_flops(config) == pytest.approx(3 * 4 * 10 * per_token)
    assert design.train_flops(override(config, {"steps": 6})) == pytest.approx(2 * design.train_flops(config))


# --- the studies that are shipped ------------------------------------------------------------------------------------


def shipped_arms(path, tmp_path):
    """The study, and the config of each arm."""
    study = design.load(path)
    return study, {arm.name: arm.config(study.base, study.seeds[0], tmp_path / arm.name) for arm in design.arms(study)}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_studies_can_run(path, tmp_path):
    """Every arm is valid, has its changes and differs from all others; seeds allow for noise; the docstring says why and how."""
    study, configs = shipped_arms(path, tmp_path)
    assert study.name == path.stem and len(study.seeds) > 1
    assert "Hypothesis" in study.hypothesis
    assert f"python -m slimmoe_jax.ablate --config configs/ablations/{path.name}" in study.hypothesis
    for arm in design.arms(study):
        config = configs[arm.name]
        validation.validate(config)
        assert (config.name, config.seed, config.workdir) == (arm.name, study.seeds[0], str(tmp_path / arm.name))
        assert {field: config_lib.get(config, field) for field in arm.changes} == dict(arm.changes)
        assert config_lib.from_json(config_lib.to_json(config), "arm.json") == config, "the arm's process reads it from JSON"
    alike = {override(config, {"name": "", "workdir": ""}) for config in configs.values()}
    assert len(alike) == len(configs)


def test_studies_are_shipped():
    assert {"headline", "noise_floor"} <= {path.stem for path in SHIPPED}


def test_arms_that_are_said_to_cost_the_same_do(tmp_path):
    """Schedules of 16 kv heads; VGQA and GQA; a dense layer of the experts that are active, but for the router."""
    _, schedules = shipped_arms(ROOT / "configs/ablations/kv_schedules.py", tmp_path)
    assert len({cost(config) for config in schedules.values()}) == 1
    _, arms = shipped_arms(ROOT / "configs/ablations/headline.py", tmp_path)
    assert cost(arms["moe-vgqa-hybrid"]) == cost(arms["moe-gqa-hybrid"]) != cost(arms["moe-mha-hybrid"])
    _, routers = shipped_arms(ROOT / "configs/ablations/routers.py", tmp_path)
    for moe, dense in ((arms["moe-mqa-nope"], arms["dense-mqa-nope"]), (routers["top_2"], routers["dense_active"])):
        router = metrics.parameter_counts(moe.model)["routers"]
        assert metrics.active_parameters(moe.model) - router == metrics.active_parameters(dense.model)
    experts = [metrics.parameter_counts(routers[name].model)["experts"] for name in ("top_2", "dense_total")]
    assert experts[0] == experts[1]


def cost(config):
    cache = metrics.kv_cache_bytes_per_token(config.model)["vgqa"]
    return sum(metrics.parameter_counts(config.model).values()), design.train_flops(config), cache
