"""The code of a page under docs/, taken out of it to be run."""

import re
import shlex
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.common.config import parse_config_args

PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Section:
    """What stands under one heading of a page.

    Attributes
    ----------
    files : dict of str to str
        Python and TOML blocks by the name in their first line, a comment.
    commands : list of list of str
        Commands of the bash blocks, by words.
    """

    files: dict[str, str]
    commands: list[list[str]]

    def write(self, folder: Path) -> None:
        """Write the files."""
        for name, source in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(source)

    @property
    def run_config(self) -> dict:
        """What the section's one `flwr run` is given, as Flower reads it."""
        [command] = [words for words in self.commands if words[:2] == ["flwr", "run"]]
        return parse_config_args([command[command.index("--run-config") + 1]])


def section(page: str, title: str) -> Section:
    """Read a section of a page: from its heading to the next of any level."""
    text = (PROJECT / "docs" / page).read_text()
    # A comment in code begins with a # too.
    [part] = re.findall(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ [A-Z]|\Z)", text, re.S | re.M)
    files = re.findall(r"```(?:python|toml)\n# (\S+\.(?:py|toml))\n(.*?)```", part, re.S)
    blocks = part.count("```python") + part.count("```toml")
    assert blocks == len(files), f"a block of {title!r} has no name"
    scripts = re.findall(r"```bash\n(.*?)```", part, re.S)
    lines = "".join(scripts).replace("\\\n", "").splitlines()
    return Section(dict(files), [shlex.split(line) for line in lines])


@contextmanager
def importable(folder: Path, *packages: str):
    """Let modules be imported from a folder, and forget the packages afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
            del sys.modules[name]
