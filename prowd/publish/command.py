"""Results into the documentation: summary as JSON, tables in results.md, pictures."""

import json
import re
from pathlib import Path
from typing import Any

from core.errors import SettingsError
from core.files import read_regular
from core.reference import in_one_line
from prowd.publish import margins
from prowd.publish.table import to_json, to_markdown


def publish(output_dir: Path, docs: Path) -> list[Path]:
    """Put the results of a finished comparison into the documentation.

    What was published under the same title before stays, unless it was run again: so seeds can be
    run one after the other, and on several machines. Without its summary, it starts from nothing.

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
        If there is no table, results.md has no place for it, or what was published was evaluated
        in other rounds.
    """
    from prowd.publish.figures import draw  # matplotlib takes a second to import.

    name = output_dir.name
    source, page, folder = output_dir / "table.json", docs / "results.md", docs / "results"
    if not source.is_file():
        raise SettingsError(f"{source}: there is none; run prowd compare first")
    text = page.read_text() if page.is_file() else ""
    if not re.search(block(name), text, re.DOTALL):
        raise SettingsError(f"{page}: has no lines <!-- {name} --> and <!-- end of {name} -->")
    folder.mkdir(exist_ok=True)
    summary = folder / f"{name}.json"
    title, results = _read(source)
    if summary.is_file():
        results = _together(*_read(summary), title, results)
    if len({tuple(point["round"] for point in result["curve"]) for result in results}) > 1:
        raise SettingsError(f"{source}: evaluated in other rounds than what is in {summary}")
    summary.write_text(to_json(title, results))
    page.write_text(re.sub(block(name), lambda _: tables(summary), text, flags=re.DOTALL))
    written = [summary, page]
    for scenario in dict.fromkeys(result["scenario"] for result in results):
        written.append(folder / f"{name}-{scenario}.svg")
        draw(scenario, results, written[-1])
    return written


def block(name: str) -> str:
    """Return the pattern of an experiment's place in results.md."""
    return f"<!-- {re.escape(name)} -->.*<!-- end of {re.escape(name)} -->"


def tables(summary: Path) -> str:
    """Return the part of results.md for a summary: its tables between their two lines."""
    title, results = _read(summary)
    parts = [to_markdown(title, results)]
    parts += [table for table in [margins.to_markdown(results)] if table]
    text = "\n".join(parts)
    return f"<!-- {summary.stem} -->\n\n{text}\n<!-- end of {summary.stem} -->"


def _read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    try:
        content = json.loads(read_regular(path))
        title, results = content["title"], content["results"]
        # What the tables are made from.
        for result in results:
            for key in ("scenario", "system", "seed", "curve"):
                result[key]
        return title, results
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is no table of prowd compare: {in_one_line(error)}") from None


def _together(
    old_title: str, old: list[dict[str, Any]], title: str, new: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return old and new results, the seeds of a system one after the other."""
    kept = old if old_title == title else []
    systems = [(result["scenario"], result["system"]) for result in (*new, *kept)]
    places = {system: place for place, system in enumerate(dict.fromkeys(systems))}
    found = {(r["scenario"], r["system"], r["seed"]): r for r in (*kept, *new)}
    return [found[key] for key in sorted(found, key=lambda key: (places[key[:2]], key[2]))]
