"""The report in headless Chromium: no errors, no network, sorting, links, a phone, the dark, and on paper."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from alignprune_exp.report.figures import save
from alignprune_exp.report.html import page
from alignprune_exp.report.tables import blocks, label, make_table, read_records
from alignprune_exp.suites import load_suite

RECORDS = Path(__file__).parents[1] / "results" / "records"
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH (Debian: apt-get install chromium)"),
]

# Appended to a copy of the page, which is opened in a frame, for windows are never narrower than 500 pixels.
DRIVER = """
<script>
addEventListener("load", () => {
  const order = (body, place) => [...body.rows].map(row => row.cells[place].textContent);
  const tables = [...document.querySelectorAll("table")].filter(table => table.querySelector("th button"));
  const columns = tables.flatMap(table => [...table.querySelectorAll("th button")].map((button, place) => {
    const body = table.tBodies[0], found = {head: button.textContent, before: order(body, place)};
    for (const way of ["up", "down"]) { button.click(); found[way] = order(body, place); }
    return found;
  }));
  const style = getComputedStyle(document.body);
  const links = [...document.querySelectorAll("a")].map(link => link.getAttribute("href"));
  const found = {
    columns,
    links: links.length,
    dangling: links.filter(link => !link.startsWith("#") || !document.getElementById(link.slice(1))),
    images: [...document.images].map(image => image.naturalWidth),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    wide: document.documentElement.scrollWidth,
    window: innerWidth,
    colours: [style.backgroundColor, style.color],
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
FRAME = """
<!doctype html>
<iframe src="driven.html" style="border: 0; width: {width}px; height: 844px"></iframe>
<script>
addEventListener("message", event =>
  document.body.append(Object.assign(document.createElement("pre"), {{id: "found", textContent: event.data}})));
</script>
"""


@pytest.fixture(scope="module")
def tables():
    """Tables of the published records; the first of them lacks one cell."""
    records = read_records([RECORDS])
    suites = [load_suite(name, ["scale=quick"]) for name in ("controls", "main", "hard")]
    made = [table for suite in suites if not (table := make_table(suite, "quick", records)).long.empty]
    made.sort(key=lambda table: -len(table.long))
    largest = made[0].suite
    row, column = made[0].long.iloc[0][["row", "column"]]
    for cell in largest.cells:
        if (label(cell.axes, largest.rows), label(cell.axes, largest.columns)) == (row, column):
            records.pop(cell.config_id, None)
    return [make_table(largest, "quick", records), *made[1:]]


@pytest.fixture(scope="module")
def report(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(page(tables, save(tables[0], folder)[0]))
    return path


@pytest.fixture
def chromium(tmp_path):
    def start(url, *flags):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", *flags, url]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    return start


@pytest.fixture
def drive(chromium, tmp_path):
    """Open a page in a frame; return what the driver found, and what the console said."""

    def start(text, width=1280, scheme="light"):
        (tmp_path / "driven.html").write_text(text + DRIVER)
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.format(width=width))
        colours = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
        done = chromium(frame.as_uri(), "--dump-dom", "--virtual-time-budget=5000", colours)
        found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]))
        return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return start


def test_what_would_be_wrong_with_a_page_is_noticed(drive):
    bad = "<a href=#nowhere>x</a><img src=http://example.org/a.png><div style='width: 2000px'>x</div>"
    found, console = drive(f"{bad}<script>nonsense()</script>", 390)
    assert any("nonsense is not defined" in line for line in console)
    assert found["dangling"] == ["#nowhere"]
    assert found["images"] == [0]
    assert found["fetched"] == ["http://example.org/a.png"]
    assert found["wide"] > found["window"] == 390


def test_the_page_opens_sorts_and_links_without_a_network(drive, report):
    found, console = drive(report.read_text())
    assert console == []
    assert found["links"] > 50
    assert found["dangling"] == []
    assert found["fetched"] == [name for name in found["fetched"] if name.startswith("data:")]
    assert found["images"]
    assert all(found["images"])
    for column in found["columns"]:
        assert sorted(column["up"]) == sorted(column["down"]) == sorted(column["before"])
    numbers = [column for column in found["columns"] if "–" in column["before"] and _numbers(column["before"])]
    assert any(len(set(_numbers(column["before"]))) > 1 for column in numbers)
    for column in numbers:
        for way, reverse in (("up", False), ("down", True)):
            known = _numbers(column[way])
            assert known == sorted(known, reverse=reverse)
            assert set(column[way][len(known) :]) == {"–"}
    texts = [column for column in found["columns"] if not _numbers(column["before"])]
    assert any(column["up"] != column["before"] for column in texts)
    assert any(column["down"] != column["before"] for column in texts)
    for column in texts:
        assert column["up"] == sorted(column["before"])
        assert column["down"] == sorted(column["before"], reverse=True)


def _numbers(texts):
    """Return the numbers that cells begin with; missing cells have none."""
    return [float(match[0]) for text in texts if (match := re.match(r"[-+]?\d+(\.\d+)?", text))]


def test_the_page_fits_a_phone(drive, report):
    found, _ = drive(report.read_text(), 390)
    assert found["wide"] <= found["window"] == 390


def test_the_page_is_dark_where_the_reader_wants_it(drive, report):
    light, dark = (drive(report.read_text(), scheme=scheme)[0]["colours"] for scheme in ("light", "dark"))
    assert _brightness(light[0]) > 200 > 60 > _brightness(light[1])
    assert _brightness(dark[0]) < 60 < 200 < _brightness(dark[1])


def _brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not there (Debian: poppler-utils)")
def test_the_page_prints_with_its_tables(chromium, report, tables, tmp_path):
    paper = tmp_path / "report.pdf"
    chromium(report.as_uri(), f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert paper.stat().st_size > 10_000
    text = subprocess.run(["pdftotext", "-layout", paper, "-"], capture_output=True, text=True, check=True).stdout
    for table in tables:
        assert f"{table.suite.name}, scale=quick" in text
        for block in blocks(table)[:2]:
            assert block.title in text
            for row in block.body:
                for cell in row[1:]:
                    assert cell.text.split()[0] in text
