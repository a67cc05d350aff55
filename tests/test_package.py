"""The package `prowd`: its names, and that no other modules stand in for its own."""

import ast
import tomllib
from pathlib import Path

import pytest
from own_process import python

import client_app
import prowd
import quant
import strategies

PROJECT = Path(__file__).parents[1]
OWN = (
    "core",
    "quant",
    "privacy",
    "task",
    "exchange",
    "strategies",
    "client_app",
    "server_app",
)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder of a user's that has modules of all the names that prowd uses."""
    folder = tmp_path_factory.mktemp("theirs")
    for number, name in enumerate(OWN):
        code = "THEIRS = True\n"
        if number % 2:
            (folder / f"{name}.py").write_text(code)
        else:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(code)
    return folder


def test_the_command_runs_where_a_user_has_folders_of_its_names(elsewhere):
    done = python("-m", "prowd", "report", "no-run", cwd=elsewhere)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prowd: no-run: there is no such folder\n"


def test_the_library_runs_where_a_user_has_folders_of_its_names(elsewhere):
    code = "from prowd import ProWD, answer, load_dataset, quantize_state; import task; "
    code += "print(ProWD.__module__, quantize_state.__module__, task.__path__[0])"
    done = python("-c", code, cwd=elsewhere)
    assert done.stdout.split() == [
        "strategies.prowd.strategy",
        "quant.update",
        str(PROJECT / "task"),
    ]


@pytest.mark.parametrize("name", ["task", "strategies"])
def test_a_users_module_that_is_imported_already_is_named(elsewhere, name):
    done = python("-c", f"import {name}; import prowd", cwd=elsewhere)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: prowd: {name!r} is {elsewhere / name}")
    assert "import prowd before it, or give that module another name" in last


def test_all_public_names_are_there_and_are_the_same_things():
    for package in (quant, strategies, client_app):
        for name in package.__all__:
            assert name in prowd.__all__
            assert getattr(prowd, name) is getattr(package, name)
    assert len(set(prowd.__all__)) == len(prowd.__all__)
    for name in prowd.__all__:
        getattr(prowd, name)


def test_no_two_packages_have_one_public_name_for_two_things():
    packages = (quant, strategies, client_app)
    found = {}
    for package in packages:
        for name in package.__all__:
            thing = getattr(package, name)
            assert found.setdefault(name, thing) is thing, name


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'prowd' has no attribute 'ProWDD'"):
        _ = prowd.ProWDD


def test_the_version_is_the_projects():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert prowd.__version__ == settings["project"]["version"]


def test_the_packages_are_those_that_are_shipped():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(wheel) == sorted(["prowd", *OWN])
    from core.reference import PACKAGES

    assert sorted(PACKAGES) == sorted(wheel)


def test_importing_it_imports_nothing_heavy():
    done = python(
        "-c", "import sys, prowd; print({'torch', 'flwr'} & sys.modules.keys())", cwd=PROJECT
    )
    assert done.stdout.strip() == "set()"


def test_the_app_for_flower_brings_it():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert "prowd/__init__.py" in settings["tool"]["flwr"]["app"]["fab-include"]


def test_its_docstring_uses_names_that_exist():
    example = ast.parse((PROJECT / "prowd" / "__init__.py").read_text())
    text = ast.get_docstring(example)
    line = text.split("``")[1]
    for alias in ast.parse(line).body[0].names:
        assert hasattr(prowd, alias.name)
