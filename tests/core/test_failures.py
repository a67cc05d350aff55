"""Whatever went wrong, in one line that names the setting or the place in the code."""

import sys
from pathlib import Path

import httpx
import pytest

from core.errors import SettingsError, words_of
from core.failures import explain, one_line
from core.mix import parse_mix
from task.training import DivergedError


def caught(raising):
    """Return an error as it is caught, with where it came from."""
    try:
        raising()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def raises(error):
    def raising():
        raise error

    return caught(raising)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write modules of the user's own, of names that no other test uses, and import one."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(module, **files):
        for path, source in files.items():
            file = tmp_path / f"{path.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        __import__(module)
        return sys.modules[module]

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_settings_error_says_it_all_alone():
    error = raises(SettingsError("data-dir: there is\nno folder"))
    expected = "data-dir: there is no folder"
    assert explain(error, {"model": "toy:net"}, "the run", "in round 3") == expected


def test_what_fails_in_our_code_is_told_with_its_place():
    line = explain(caught(lambda: parse_mix(8)), {}, "the run", "in round 3")
    what = "the run failed in round 3: AttributeError: 'int' object has no attribute 'split'"
    assert line.startswith(f"{what} (core/mix.py:")
    assert line.endswith(")")
    line = explain(caught(lambda: parse_mix(8)), {})
    assert line.startswith("AttributeError: 'int' object has no attribute 'split' (core/mix.py:")


def test_what_fails_elsewhere_is_told_with_the_deepest_place():
    error = raises(KeyError("w"))
    line = error.__traceback__.tb_next.tb_lineno
    assert explain(error, {}) == f"KeyError: 'w' ({Path(__file__).name}:{line})"
    assert explain(KeyError("w"), {}) == "KeyError: 'w'"


@pytest.mark.parametrize(("key", "call"), [("model", "net"), ("strategy", "Mine")])
def test_what_fails_in_the_users_code_names_its_setting(own, key, call):
    module = own("one_file", one_file=f"def {call}():\n    return 1 / 0")
    error = caught(getattr(module, call))
    settings = {key: f"one_file:{call}"}
    expected = f"{key}: 'one_file:{call}' failed"
    expected_end = "ZeroDivisionError: division by zero (one_file.py:2)"
    assert explain(error, settings, "the run", "in training") == (
        f"{expected} in training: {expected_end}"
    )
    # Also where nothing is said of what failed.
    assert explain(error, settings) == f"{expected}: {expected_end}"


def test_strategy_and_model_of_one_package_are_told_apart(own):
    """The one whose module is in it; where neither is, any of the two, and the helper's place."""
    helper = "def fail():\n    raise OSError('no disk')"
    call = "from kit import helper\n\n\ndef go():\n    helper.fail()"
    own(
        "kit.strategies", kit____init__="", kit__helper=helper, kit__models=call, kit__strategies=""
    )
    own("kit.models")
    settings = {"strategy": "kit.strategies:S", "model": "kit.models:net"}
    line = explain(caught(sys.modules["kit.models"].go), settings)
    assert line == "model: 'kit.models:net' failed: OSError: no disk (kit/helper.py:2)"
    line = explain(caught(sys.modules["kit.helper"].fail), settings)
    assert line == "strategy: 'kit.strategies:S' failed: OSError: no disk (kit/helper.py:2)"


def test_code_of_the_users_own_is_named_also_where_it_did_not_raise(own):
    """What it returned may be the cause."""
    own("beside", beside="")
    error = caught(lambda: parse_mix(8))
    line = explain(error, {"strategy": "beside:S", "model": "beside:net"}, "the run")
    assert line.startswith("the run failed: AttributeError: 'int' object has no")
    assert line.endswith(", with strategy 'beside:S' and model 'beside:net')")
    line = explain(error, {"strategy": "fedavg", "model": "beside:net"})
    assert line.endswith(", with model 'beside:net')")


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "fedavg", "model": "cnn"},
        {"strategy": "strategies:FedAvg", "model": "task.models:SmallCNN"},
        {"strategy": "no_such_module:S", "model": "no_such_module:net"},
        {"strategy": 7, "model": None},
    ],
)
def test_our_own_code_and_what_is_not_imported_are_not_the_users(settings):
    line = explain(caught(lambda: parse_mix(8)), settings)
    assert "with" not in line
    assert line.startswith("AttributeError")


def test_an_error_of_ours_needs_no_place():
    error = raises(DivergedError("training diverged: the loss of step 1 is nan"))
    expected = "training diverged: the loss of step 1 is nan"
    assert explain(error, {}) == expected
    assert explain(error, {}, "the run", "in round 1") == f"the run failed in round 1: {expected}"


@pytest.mark.parametrize("kind", [SettingsError, DivergedError])
def test_an_error_of_ours_without_words_needs_one(kind):
    line = explain(raises(kind()), {}, "the run")
    assert line.startswith(f"the run failed: {kind.__name__} (test_failures.py:")


def test_a_long_text_is_cut_and_the_place_is_not():
    line = explain(raises(RuntimeError("a" * 400 + "b" * 400)), {})
    assert line.startswith(f"RuntimeError: {'a' * 400} ... (test_failures.py:")
    assert explain(RuntimeError("a" * 400), {}) == f"RuntimeError: {'a' * 400}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("first\nsecond\r\n\tthird\u2028fourth\x85", "first second third fourth"),
        ("  around  ", "around"),
        ("\x1b[2Jclear\0\a", r"\x1b[2Jclear\x00\x07"),
        ("b\udcffd", r"b\xffd"),
        ("Grüße, 你好", "Grüße, 你好"),
    ],
)
def test_a_line_is_what_any_terminal_can_take(text, line):
    assert one_line(text) == line
    assert explain(RuntimeError(text), {}) == f"RuntimeError: {line}"


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


def test_an_error_that_cannot_say_what_it_is_is_named():
    said = "(a Mute without words, as its __str__ fails)"
    assert words_of(Mute()) == said
    assert explain(Mute(), {}, "the run") == f"the run failed: Mute: {said}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError(), "KeyError"),
        (SystemExit(), "SystemExit"),
        (SystemExit(3), "SystemExit: 3"),
        (ExceptionGroup("two", [KeyError("a"), KeyError("b")]), "ExceptionGroup: two (2 sub-"),
        (httpx.ConnectError("refused\n"), "the SuperLink cannot be reached: ConnectError: refused"),
        (httpx.ReadTimeout(""), "the SuperLink cannot be reached: ReadTimeout"),
    ],
)
def test_what_kinds_say(error, said):
    assert explain(error, {}, "the run", "in round 2").startswith(
        f"the run failed in round 2: {said}"
    )
