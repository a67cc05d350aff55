"""What the project promises as a whole: one environment, layers that import downward only."""

import ast
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())

# Folder: what it may import of the project's own.
MAY_IMPORT = {
    "core": {"core"},
    "quant": {"core", "quant"},
    "privacy": {"core", "privacy", "quant"},
    "task": {"core", "quant", "task"},
    "exchange": {"core", "exchange", "privacy", "quant"},
    "strategies": {"core", "exchange", "privacy", "quant", "strategies"},
    "client_app": {"client_app", "core", "exchange", "privacy", "quant", "task"},
    "server_app": {"core", "exchange", "privacy", "quant", "server_app", "strategies", "task"},
}
MAY_IMPORT["prowd"] = {*MAY_IMPORT, "prowd"}
# Floors that know nothing of Flower.
WITHOUT_FLOWER = ("core", "privacy", "quant", "task")


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement).group(0)


def test_a_run_uses_the_installed_packages():
    """Each dependency is overridden with a marker that never holds, or uv would install it anew.

    Those of the extras too: uv looks up all of them, and a run without a network would fail.
    """
    overrides = PYPROJECT["tool"]["uv"]["override-dependencies"]
    assert all(entry.endswith("; python_version < '0'") for entry in overrides)
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    dependencies = [PYPROJECT["project"]["dependencies"], *extras]
    named = {name_of(entry) for entries in dependencies for entry in entries}
    assert {name_of(entry) for entry in overrides} == named


def test_flower_is_the_one_whose_private_functions_are_wrapped():
    """`exchange.pulling` ends a run under a version that no longer calls them."""
    [flower] = [
        r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "flwr"
    ]
    assert version("flwr") in flower.specifier
    assert all(known in flower.specifier for known in ("1.41.0", "1.42.9"))
    assert "1.43.0" not in flower.specifier


@pytest.fixture
def continuous_integration(tmp_path):
    """Run .ci/run as root, with stubs for what it calls and for what apt-get should bring."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "chmod", "dirname", "mkdir", "mktemp", "rm", "tail"):
        (programs / name).symlink_to(shutil.which(name))
    ends_well = "#!/bin/bash\n"
    stubs = {
        "id": "echo 0\n",
        "apt-get": "echo 'E: Unable to fetch some archives'; exit 100\n",
        "python3": 'mkdir -p "$3/bin"\n',
        "pytest": "echo tested $*\n",
        **dict.fromkeys(("pip", "ruff", "mypy", "caddy", "ip", "docker-compose", "chromium"), ""),
    }
    for name, script in stubs.items():
        (programs / name).write_text(ends_well + script)
        (programs / name).chmod(0o755)

    def run():
        return subprocess.run(
            [PROJECT / ".ci" / "run"], env={"PATH": str(programs)}, capture_output=True, text=True
        )

    run.programs = programs
    return run


def test_continuous_integration_runs_the_tests(continuous_integration):
    done = continuous_integration()
    assert (done.returncode, done.stdout) == (0, "tested\ntested -m deployment\n"), done.stderr


@pytest.mark.parametrize("program", ["caddy", "ip", "docker-compose", "chromium"])
def test_continuous_integration_fails_if_a_program_could_not_be_fetched(
    continuous_integration, program
):
    (continuous_integration.programs / program).unlink()
    done = continuous_integration()
    assert (done.returncode, done.stdout) == (1, "")
    reason = f".ci/run: {program} is missing after its installation, so tests would be skipped"
    assert done.stderr.splitlines()[-1] == reason
    assert "E: Unable to fetch some archives" in done.stderr


def test_continuous_integration_without_roots_rights_does_without(continuous_integration):
    programs = continuous_integration.programs
    (programs / "id").write_text("#!/bin/bash\necho 1000\n")
    for program in ("caddy", "ip", "docker-compose", "chromium"):
        (programs / program).unlink()
    assert continuous_integration().returncode == 0


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_down_only(folder):
    files = sorted((PROJECT / folder).glob("**/*.py"))
    assert files
    for path in files:
        for module in imports_of(path):
            top = module.partition(".")[0]
            assert top not in MAY_IMPORT or top in MAY_IMPORT[folder], f"{path}: {module}"
            if folder in WITHOUT_FLOWER:
                assert top not in ("flwr", "ray"), f"{path}: {module}"


def test_contributing_names_all_checks_that_continuous_integration_runs():
    page = (PROJECT / "CONTRIBUTING.md").read_text()
    [block] = re.findall(r"Its parts, in yours:\n\n```bash\n(.*?)```", page, re.S)
    assert (PROJECT / ".ci" / "run").read_text().endswith(f"\n{block}")


# What Flower documents, and its error codes.
FLOWER_DOCUMENTS = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.common.constant",
    "flwr.common.logger",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}


def test_few_files_use_what_flower_does_not_document():
    """Any version of Flower may change it: two wrap it and check themselves, one only uses it."""
    folders = {*MAY_IMPORT, "benchmarks"}
    found = {
        str(path.relative_to(PROJECT))
        for folder in folders
        for path in (PROJECT / folder).glob("**/*.py")
        for name in imports_of(path)
        if name.split(".")[0] == "flwr" and name not in FLOWER_DOCUMENTS
    }
    # The last two measure what Flower itself aggregates with, and masks with.
    assert found == {
        "prowd/compare/patient_flwr.py",
        "exchange/pulling.py",
        "exchange/undocumented.py",
        "benchmarks/aggregation.py",
        "benchmarks/secure.py",
    }


def set_of_a_strategy(path):
    """What a file sets of a strategy's attributes, or of its nodes': where and which."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "...", ast.Store())]
        for target in (part for whole in targets for part in ast.walk(whole)):
            if isinstance(target, ast.Attribute) and not isinstance(target.ctx, ast.Load):
                owner = ast.unparse(target.value).split("(")[0].split(".")
                if "strategy" in owner:
                    yield f"{path.name}:{node.lineno}: {ast.unparse(target)}"


def test_no_attribute_of_a_strategy_is_set_from_outside():
    """All that it is handed stands in its StrategyContext."""
    folders = ("server_app", "exchange", "prowd", "benchmarks", "tests")
    files = [path for folder in folders for path in (PROJECT / folder).glob("**/*.py")]
    assert len(files) > 100
    assert [found for path in files for found in set_of_a_strategy(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "strategy.predict = f",
        "run.strategy.nodes.most_examples = 3",
        "one, strategy.seed = 1, 2",
        "strategy.seed += 1",
        "strategy.seed: int = 1",
        "setattr(strategy, 'seed', 1)",
        "del self.strategy.seed",
    ],
)
def test_however_an_attribute_is_set_it_is_found(tmp_path, line):
    (file := tmp_path / "file.py").write_text(f"strategy = make()\nstrategy.f(strategy.x)\n{line}")
    assert [found.split(": ")[0] for found in set_of_a_strategy(file)] == ["file.py:3"]
