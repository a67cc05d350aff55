"""Results into the documentation: summary as JSON, tables in results.md, pictures."""

import json
import re
from pathlib import Path

from experiments import margins
from experiments.table import to_markdown
from task.errors import SettingsError


def publish(output_dir: Path, docs: Path) -> list[Path]:
    """Put the results of a finished comparison into the documentation.

    Parameters
    ----------
    output_dir : Path
        Where `prowd compare` wrote; its name is the experiment's.
    docs : Path
        Folder with results.md; the tables replace what stands between the lines
        ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Returns
    -------
    list of Path
        Files written.

    Raises
    ------
    SettingsError
        If there is no table, or results.md has no place for it.
    """
    from experiments.figures import draw  # matplotlib is an extra

    name = output_dir.name
    source, page, folder = output_dir / "table.json", docs / "results.md", docs / "results"
    if not source.is_file():
        raise SettingsError(f"{source}: there is none; run prowd compare first")
    text = page.read_text()
    if not re.search(block(name), text, re.DOTALL):
        raise SettingsError(f"{page}: has no lines <!-- {name} --> and <!-- end of {name} -->")
    folder.mkdir(exist_ok=True)
    summary = folder / f"{name}.json"
    summary.write_text(source.read_text())
    page.write_text(re.sub(block(name), lambda _: tables(summary), text, flags=re.DOTALL))
    results = json.loads(summary.read_text())["results"]
    written = [summary, page]
    for scenario in dict.fromkeys(result["scenario"] for result in results):
        written.append(folder / f"{name}-{scenario}.svg")
        draw(scenario, results, written[-1])
    return written


def block(name: str) -> str:
    """Return the pattern of an experiment's place in results.md."""
    return f"<!-- {re.escape(name)} -->.*<!-- end of {re.escape(name)} -->"


def tables(summary: Path) -> str:
    """Return what stands in results.md for a summary: its tables between their two lines."""
    content = json.loads(summary.read_text())
    parts = [to_markdown(content["title"], content["results"])]
    parts += [table for table in [margins.to_markdown(content["results"])] if table]
    text = "\n".join(parts)
    return f"<!-- {summary.stem} -->\n\n{text}\n<!-- end of {summary.stem} -->"
