"""Paths and messages as a user reads them."""

import errno
import os
import pwd
from pathlib import Path

import pytest

from core.errors import SettingsError
from core.files import printable, reason, user_path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/Bär 1.png", "/data/Bär 1.png"),
        (os.fsdecode(b"/a/\xff\xe9.png"), "/a/\\xff\\xe9.png"),
        ("a\nb\rc\td\x1b[31m\0", "a\\nb\\rc\\td\\x1b[31m\\x00"),
        ("a\u2028b\u202ec", "a\\u2028b\\u202ec"),
        (Path("/x"), "/x"),
    ],
)
def test_names_are_shown_in_one_line_that_any_terminal_takes(text, shown):
    assert printable(text) == shown
    printable(text).encode()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "/a\nb"), "Permission denied"),
        (ValueError("one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (ValueError("\n"), "ValueError"),
        (EOFError(), "EOFError"),
    ],
)
def test_reason_is_one_line_without_the_path(error, said):
    assert reason(error) == said


def test_path_of_a_setting_is_from_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert user_path("data-dir", "~/x") == Path("/home/ada/x")
    assert user_path("data-dir", Path("/x/~")) == Path("/x/~")


def test_path_without_a_home_is_refused(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    for path, home in (("~/x", "~"), ("~no-such-user-here/x", "~no-such-user-here")):
        with pytest.raises(SettingsError) as caught:
            user_path("data-dir", path)
        assert str(caught.value).startswith(
            f"data-dir: {path}: no home folder is known for {home}; allowed: a path, absolute"
        )


def test_path_with_a_nul_is_refused():
    with pytest.raises(SettingsError, match=r"^data-dir: /a\\x00b holds a NUL"):
        user_path("data-dir", "/a\0b")
