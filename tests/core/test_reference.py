"""`package.module:name`: what is imported, and how each mistake is named."""

import sys

import pytest

from core.errors import SettingsError
from core.options import Options
from core.reference import is_reference, load_class, load_reference, users_code


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of a name that no other test uses; return it."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{tmp_path.name.replace('-', '_')}"

    def write(source):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    sys.modules.pop(name, None)


def message_of(text):
    with pytest.raises(SettingsError) as caught:
        load_reference("model", text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_it_returns_what_the_module_holds(module):
    assert load_reference("model", f"{module('answer = 42')}:answer") == 42
    assert load_reference("model", "collections.abc:Mapping").__name__ == "Mapping"


@pytest.mark.parametrize(
    "text", [":", "a:", ":b", "a:b:c", "a.:b", ".a:b", "a/b:c", "a.py:b ", "a:b.c", "1a:b", "a:b()"]
)
def test_another_notation_is_refused(text):
    assert is_reference(text)
    assert message_of(text) == f"model: {text!r} is not written as package.module:name"


def test_what_cannot_be_imported_is_named(module):
    assert message_of("no_such_package.models:net") == (
        "model: 'no_such_package.models:net' cannot be imported (ModuleNotFoundError: No module "
        "named 'no_such_package'); it must be sent with the app "
        "(fab-include in pyproject.toml), or installed or on PYTHONPATH wherever the app runs"
    )
    broken = module("raise ValueError('first line\\nsecond')")
    assert f"'{broken}:x' cannot be imported (ValueError: first line);" in message_of(f"{broken}:x")


def test_a_name_that_is_not_there_is_told_with_the_file(module, tmp_path):
    name = module("")
    assert message_of(f"{name}:net") == f"model: {name} ({tmp_path / name}.py) has no 'net'"


class Base:
    Options = Options


def test_a_class_of_the_users_own_is_of_its_base_and_has_options(module):
    name = module("Good = Bare = other = None")
    load_reference("task", f"{name}:other")
    sys.modules[name].Good = type("Good", (Base,), {})
    sys.modules[name].Bare = type("Bare", (Base,), {"Options": dict})
    assert issubclass(load_class("task", f"{name}:Good", Base, "a.Base"), Base)
    for which, said in (
        ("other", f"task: '{name}:other' is no subclass of a.Base"),
        ("Bare", "task: Bare.Options is no subclass of core.options.Options"),
    ):
        with pytest.raises(SettingsError) as caught:
            load_class("task", f"{name}:{which}", Base, "a.Base")
        assert str(caught.value) == said


@pytest.mark.parametrize(
    ("advice", "line"),
    [
        ("", "model: 'm:f' fails: KeyError: 'one two'"),
        ("; try another", "model: 'm:f' fails (KeyError: 'one two'); try another"),
    ],
)
def test_what_users_code_raises_is_one_line(advice, line):
    with pytest.raises(SettingsError) as caught, users_code("model: 'm:f' fails", advice):
        raise KeyError("one two")
    assert str(caught.value) == line
    assert caught.value.__suppress_context__


def test_what_is_one_line_already_or_ends_the_process_passes():
    for error in (SettingsError("seed: wrong"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, users_code("model: 'm:f' fails"):
            raise error
        assert caught.value is error
