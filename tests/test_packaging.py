"""What is installed: the wheel's files, its commands outside a checkout, what it says of itself, and what it depends on."""

import ast
import configparser
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import slimmoe_jax
from slimmoe_jax import __main__ as listing
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError
from slimmoe_jax.study import design

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slimmoe_jax"
# Programs that commands start.
INNER = {"study.arm", "conversion.parity"}
# Grain reads absl's flags, and so has to be told that they are parsed.
THROUGH_OTHERS = {"absl-py": "grain"}


def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def python(*words, cwd, path=None):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


# --- commands and configs --------------------------------------------------------------------------------------------


def test_every_command_is_listed_with_its_docstring(capsys):
    guarded = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text() and path.parent.name != "__pycache__"
    }
    assert set(guarded) - {"__main__"} == {*listing.COMMANDS, *INNER}
    listing.main([])
    printed = capsys.readouterr().out.splitlines()
    for name in listing.COMMANDS:
        first = guarded[name].read_text().removeprefix('"""').split("\n")[0].removesuffix('"""')
        assert [line.split(None, 1) for line in printed].count([name, first]) == 1


def test_the_list_needs_no_jax(tmp_path):
    code = "import runpy, sys; sys.argv = ['slimmoe_jax']\n"
    code += "try: runpy.run_module('slimmoe_jax', run_name='__main__')\n"
    code += "except SystemExit as stop: print(stop.code, 'jax' in sys.modules)"
    done = python("-c", code, cwd=tmp_path, path=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_a_version_and_a_command_that_is_none(capsys):
    listing.main(["--version"])
    assert capsys.readouterr().out == f"slimmoe_jax {slimmoe_jax.__version__}\n"
    with pytest.raises(InputError, match="trian is no command: choose from data.prepare, train, evaluate"):
        listing.main(["trian"])


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/quickstart.py") == config_lib.load(ROOT / "configs" / "quickstart.py")
    assert design.load("./configs/ablations/headline.py") == design.load(ROOT / "configs" / "ablations" / "headline.py")
    for file in (ROOT / "configs").rglob("*.py"):
        assert config_lib.find(file.relative_to(ROOT)).samefile(file)


def test_a_config_of_ones_own_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs" / "quickstart.py"
    mine.parent.mkdir()
    mine.write_text("from slimmoe_jax.config import TrainConfig\n\n\ndef get_config():\n    return TrainConfig(steps=7)\n")
    assert config_lib.load("configs/quickstart.py").steps == 7
    assert config_lib.load("configs/pretrain.py") == config_lib.load(ROOT / "configs" / "pretrain.py")


@pytest.mark.parametrize("load", [config_lib.load, design.load])
def test_a_config_that_nobody_has_ends_with_those_there_are(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load("configs/another.py")
    message = str(caught.value)
    assert message.startswith("no config at configs/another.py") and "\n" not in message
    shipped = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.py")}
    assert set(message.split("it has ")[1].split(", ")) == shipped
    with pytest.raises(InputError, match=re.escape("did you mean configs/quickstart.py?")):
        load("configs/quikstart.py")
    with pytest.raises(InputError, match="no config at elsewhere/quickstart.py: give a Python file"):
        load("elsewhere/quickstart.py")


# --- what the package says of itself ---------------------------------------------------------------------------------


def test_every_folder_of_code_is_a_package_of_the_wheel():
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    configs = {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {".".join(("slimmoe_jax", *folder.parts)) for folder in configs}
    assert set(setup()["options"]["packages"].split()) == expected


def test_changelog_and_citation_are_of_this_version():
    version = slimmoe_jax.__version__
    first = re.search(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert first and cited and first[1] == cited[1] == version


def requirements(*extras):
    """Names of distributions."""
    parser = setup()
    texts = [parser["options"]["install_requires"]] + [parser["options.extras_require"][extra] for extra in extras]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    return {canonical(Requirement(line).name) for line in lines}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def nodes():
    return [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]


def imported():
    """Distributions whose modules the package imports."""
    found = {alias.name for node in nodes() if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes() if isinstance(node, ast.ImportFrom) and not node.level}
    others = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"slimmoe_jax"}
    distributions = importlib.metadata.packages_distributions()
    return {canonical(distributions.get(name, [name])[0]) for name in others}


def named():
    """Modules that the package looks for by a string."""
    words = {node.value for node in nodes() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {canonical(word.split(".")[0]) for word in words}


def test_what_is_imported_is_required():
    library_extras = [extra for extra in setup()["options.extras_require"] if extra not in ("test", "docs")]
    assert imported() - THROUGH_OTHERS.keys() <= requirements(*library_extras)
    assert set(THROUGH_OTHERS.values()) <= requirements()


def test_what_is_required_is_used():
    assert requirements("hf", "eval", "slurm") <= imported() | named()


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a checkout may hold an older build, whose files would come along."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("slimmoe_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-c", "from setuptools.build_meta import build_wheel; build_wheel('dist')", cwd=source)
    assert not done.returncode, done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_code_configs_and_licence_alone(wheel):
    code = {str(f.relative_to(ROOT)) for suffix in ("py", "jinja") for f in PACKAGE.rglob(f"*.{suffix}")}
    configs = {f"slimmoe_jax/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.py")}
    archive = zipfile.ZipFile(wheel)
    about, inside = f"slimmoe_jax-{slimmoe_jax.__version__}.dist-info", set(archive.namelist())
    assert {name for name in inside if not name.startswith(about)} == code | configs
    assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{about}/")).metadata
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Version"] == slimmoe_jax.__version__
    assert {"cuda12", "cuda13", "test", "eval", "hf", "slurm"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.slow
def test_the_wheel_runs_outside_a_checkout(installed, tmp_path):
    code = "import slimmoe_jax; from slimmoe_jax import config; print(slimmoe_jax.__file__, config.find('configs/quickstart.py'))"
    shipped = installed / "slimmoe_jax"
    assert python("-c", code, cwd=tmp_path, path=installed).stdout.split() == [
        str(shipped / "__init__.py"),
        str(shipped / "configs" / "quickstart.py"),
    ]
    listed = python("-m", "slimmoe_jax", cwd=tmp_path, path=installed)
    assert listed.returncode == 0 and listed.stdout == listing.listing() + "\n"

    def run(*words):
        return python("-m", *words, cwd=tmp_path, path=installed)

    plan = run("slimmoe_jax", "train", "--config", "configs/quickstart.py", "--dry-run")
    assert plan.returncode == 0 and re.search(r"total +2,305,152", plan.stdout), plan.stderr
    study = run("slimmoe_jax.ablate", "--config", "configs/ablations/headline.py", "--dry-run")
    assert study.returncode == 0 and "dense-mqa-nope" in study.stdout, study.stderr
    wrong = run("slimmoe_jax.data.prepare", "--config", "configs/quikstart.py")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "configs/quickstart.py" in wrong.stderr
    assert not list(tmp_path.iterdir())
