"""The page of HTML, as the commands write it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from core.errors import SettingsError
from prowd.records import Record

_NO_MATPLOTLIB = "the report draws with matplotlib; pip install -e '.[figures]'"


def check_page() -> None:
    """Find out whether a page can be drawn.

    Raises
    ------
    SettingsError
        If matplotlib, which is an extra, is missing.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError(_NO_MATPLOTLIB)


def print_page(
    path: Path,
    title: str,
    records: Sequence[Record],
    named: Sequence[tuple[str, str, Record]] | None = None,
) -> None:
    """Write the page (`prowd.report.write_page`) and print where it is.

    Raises
    ------
    SettingsError
        If it cannot be drawn or written.
    """
    check_page()
    from prowd.report import write_page

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, title, records, named)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    print(path)
