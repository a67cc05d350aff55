"""The report in a real browser, at the widths of a telephone and a desk, in light and in dark."""

import json
import shutil
import subprocess

import pytest
from run_records import write_run

from prowd.records import find_runs, read_record
from prowd.report.page import write_page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium (apt-get install chromium)"
)

NARROW, WIDE = 400, 1400
# Chromium's windows are no narrower than 500 pixels, a frame can be. The page forbids scripts in
# itself: this one looks at it from around.
_AROUND = """<!doctype html><body style="margin:0"><iframe src="{page}"
style="border:0;width:{width}px;height:1000px"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const view = page.defaultView, style = view.getComputedStyle(root);
  const figures = [...page.querySelectorAll("[role=img]")];
  const box = element => element.getBoundingClientRect();
  const touch = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  const tables = [...page.querySelectorAll(".scroll")];
  const scale = matrix => Math.hypot(matrix.a, matrix.b);
  const found = {{
    client: root.clientWidth, scroll: root.scrollWidth,
    titles: figures.map(f => f.ariaLabel.split(". ")[0]),
    texts: figures.flatMap(f => [...f.querySelectorAll("text")].map(t =>
      parseFloat(view.getComputedStyle(t).fontSize) * scale(t.getScreenCTM()))),
    outside: figures.filter(f => [...f.querySelectorAll("text")].some(t =>
      box(t).right > root.clientWidth + 1 || box(t).left < -1)).map(f => f.ariaLabel),
    touching: figures.filter(f => {{
      const boxes = [...f.querySelectorAll("text")].map(box);
      return boxes.some((a, i) => boxes.slice(i + 1).some(b => touch(a, b)));
    }}).map(f => f.ariaLabel),
    tables: Object.fromEntries(tables.map(t => [t.ariaLabel, {{
      scrolls: t.scrollWidth > t.clientWidth, sign: view.getComputedStyle(t).backgroundImage,
      rights: [...t.querySelectorAll("tbody tr")].map(r => [...r.cells].map(c => box(c).right)),
    }}])),
    columns: new Set(figures.map(f => box(f).left)).size,
    surface: view.getComputedStyle(page.body).backgroundColor,
    ink: view.getComputedStyle(figures[0].querySelector("text")).fill,
    strokes: [...new Set(figures.flatMap(f => [...f.querySelectorAll("path")].map(p =>
      view.getComputedStyle(p).stroke)))].filter(s => s.startsWith("rgb(")),
    grid: style.getPropertyValue("--cd9dee3").trim(),
  }};
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}};
</script>"""


def look(page, tmp_path, width, scheme="light"):
    """Open a page in a frame; return what is found in it, and what the console said."""
    around = tmp_path / "around.html"
    around.write_text(_AROUND.format(page=page.as_uri(), width=width))
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", "--log-level=0"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={max(width, 500)},1000",
            f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}",
            *("--dump-dom", around.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "FOUND" in done.stdout, done.stderr
    text = done.stdout.partition("FOUND")[2].partition("END")[0]
    return json.loads(text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")), console


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, "Digits", [read_record(folder) for folder in find_runs([runs])])
    return path


def luminance(color):
    channels = [int(c) / 255 for c in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Contrast ratio of the Web Content Accessibility Guidelines."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "light"), (WIDE, "dark")])
def test_the_page_can_be_read(page, tmp_path, width, scheme):
    found, console = look(page, tmp_path, width, scheme)
    assert console == []
    assert found["client"] in (width, width - 15)  # Beside a scroll bar.
    assert found["scroll"] == found["client"]
    assert len(found["titles"]) == 15
    assert "Weights of the 3-bit group, round 4: prowd" in found["titles"]
    assert found["outside"] == []
    assert found["touching"] == []
    assert min(found["texts"]) >= 11
    assert found["columns"] == (1 if width == NARROW else 3)
    assert (luminance(found["surface"]) < 0.1) == (scheme == "dark")
    assert contrast(found["ink"], found["surface"]) >= 7
    lines = [s for s in found["strokes"] if s != as_rgb(found["grid"])]
    assert len(lines) >= 4
    assert min(contrast(line, found["surface"]) for line in lines) >= 3


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """A page of long names and reasons, with spreads."""
    folder = tmp_path_factory.mktemp("long")
    reason = (
        "RuntimeError: DefaultCPUAllocator cannot allocate 1234567890 bytes of /long/" + "x" * 80
    )
    system = "ProWD with server momentum and a ladder from every width " + "y" * 40
    for seed in (0, 1):
        ends = ("failed", reason) if seed else "completed"
        write_run(folder / f"{'z' * 60}-{seed}", "prowd", seed, ends=ends, left_out={"1": reason})
    records = [read_record(run) for run in find_runs([folder])]
    write_page(folder / "report.html", "T", records, [("digits", system, r) for r in records])
    return folder / "report.html"


def test_on_a_telephone_neither_accuracies_nor_reasons_are_off_screen(long_page, tmp_path):
    found, _ = look(long_page, tmp_path, NARROW)
    tables = found["tables"]
    for name in ("Runs", "Clients left out and why"):
        assert not tables[name]["scrolls"]
        assert max(right for row in tables[name]["rights"] for right in row) <= found["client"]
    # The system, two widths and their average; bytes, rounds and seeds are a swipe away.
    accuracy = tables["Accuracy, digits"]
    assert all(right <= found["client"] for row in accuracy["rights"] for right in row[:4])
    assert accuracy["scrolls"]
    assert accuracy["sign"].count("linear-gradient") == 4


def as_rgb(color):
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:7], 16)})"


def test_what_is_too_wide_or_forbidden_would_be_seen(page, tmp_path):
    """The check itself: a page that overflows, and a script that the page does not let run."""
    spoiled = tmp_path / "spoiled.html"
    bad = "<div style='width:3000px'>.</div><script>document.title = 'run'</script></main>"
    spoiled.write_text(page.read_text().replace("</main>", bad))
    found, console = look(spoiled, tmp_path, WIDE)
    assert found["scroll"] >= 3000
    assert any("Content Security Policy" in line for line in console)
