"""The report in headless Chromium: no errors, no network, sorting, filter, pop-overs, a phone, the dark, on paper."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from alignprune_exp.report.blocks import blocks
from alignprune_exp.report.figures import save
from alignprune_exp.report.html import page
from alignprune_exp.report.tables import make_table, read_records
from alignprune_exp.suites import label, load_suite, option_names

RECORDS = Path(__file__).parents[1] / "results" / "records"
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH (Debian: apt-get install chromium)"),
]

# Appended to a copy of the page, which is opened in a frame, for windows are never narrower than 500 pixels.
DRIVER = """
<script>
addEventListener("load", async () => {
  const done = (() => { DO })();
  const style = getComputedStyle(document.body);
  const links = [...document.querySelectorAll("a")].map(link => link.getAttribute("href"));
  const buttons = [...document.querySelectorAll("[popovertarget]")];
  const opened = buttons.map(button => "#" + button.getAttribute("popovertarget"));
  const found = {
    done,
    links: links.length,
    opened: opened.length,
    dangling: [...links, ...opened].filter(link => !link.startsWith("#") || !document.getElementById(link.slice(1))),
    images: [...document.images].map(image => image.naturalWidth),
    drawn: [...document.querySelectorAll("svg")].map(drawing => drawing.getBoundingClientRect().width),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    wide: document.documentElement.scrollWidth,
    high: document.documentElement.scrollHeight,
    window: innerWidth,
    colours: [style.backgroundColor, style.color],
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
SORT = """
  const order = (body, place) => [...body.rows].map(row => row.cells[place].textContent);
  const tables = [...document.querySelectorAll("table")].filter(table => table.querySelector("thead button"));
  return tables.flatMap(table => [...table.querySelectorAll("thead button")].map((button, place) => {
    const body = table.tBodies[0], found = {head: button.textContent, before: order(body, place)};
    for (const way of ["up", "down"]) { button.click(); found[way] = order(body, place); }
    return found;
  }));
"""
FILTER = """
  const input = document.querySelector(".filter input"), suites = [...document.querySelectorAll(".suite")];
  const seen = () => suites.filter(suite => !suite.hidden).flatMap(suite =>
    [...suite.querySelectorAll("tbody tr")].filter(row => !row.hidden).map(row => row.cells[0].textContent));
  const type = text => {
    input.value = text;
    input.dispatchEvent(new Event("input"));
    return {rows: seen(), suites: suites.filter(suite => !suite.hidden).length,
            said: document.querySelector("output").textContent};
  };
  return {shown: document.querySelector(".filter").checkVisibility(), before: type(""), das: type("DAS"),
          two: type("full, seta"), none: type("no such method"), after: type("")};
"""
POPOVER = """
  const suite = document.querySelector(".suite");
  suite.open = true;
  const button = suite.querySelector("td [popovertarget]"), list = button.popoverTargetElement;
  const before = list.checkVisibility();
  button.click();
  const place = list.getBoundingClientRect(), link = list.querySelector("a"), row = document.querySelector(link.hash);
  const found = {before, open: list.checkVisibility(),
                 texts: [...list.querySelectorAll("li")].map(line => line.textContent),
                 inside: place.left >= 0 && place.right <= innerWidth && place.top >= 0 && place.bottom <= innerHeight,
                 folded: !row.checkVisibility({contentVisibilityAuto: true})};
  link.click();
  return {...found, gone: !list.checkVisibility(), row: row.textContent, id: link.textContent};
"""
UNFOLD = """
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const box = [...document.querySelectorAll(".suite .scroll")].find(box => box.scrollWidth > box.clientWidth + 100);
  if (!box) return null;
  const cells = [box.querySelector("tbody th"), box.querySelector("tbody td")];
  const left = () => cells.map(cell => cell.getBoundingClientRect().left), before = left();
  box.scrollLeft = 100;
  return {before, after: left()};
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
    path.write_text(page(tables, save(tables[0], folder)[0] | save(tables[1], folder)[0]))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of all published records, with the figures of the tables that stand first."""
    records = read_records([RECORDS])
    names = [(name, scale) for scale in ("cpu", "quick") for name in option_names("suite")]
    made = [make_table(load_suite(name, [f"scale={scale}"]), scale, records) for name, scale in names]
    made = [table for table in made if not table.long.empty]
    folder = tmp_path_factory.mktemp("whole")
    costs = [table for table in made if table.suite.name in ("equal_cost", "cost", "main")]
    return page(made, {name: picture for table in costs for name, picture in save(table, folder)[0].items()})


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

    def start(text, width=1280, scheme="light", do=""):
        (tmp_path / "driven.html").write_text(text + DRIVER.replace("DO", do))
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.format(width=width))
        colours = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
        done = chromium(frame.as_uri(), "--dump-dom", "--virtual-time-budget=5000", "--window-size=1500,1000", colours)
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
    found, console = drive(report.read_text(), do=SORT)
    assert console == []
    assert min(found["links"], found["opened"]) > 50
    assert found["dangling"] == []
    assert found["fetched"] == [name for name in found["fetched"] if name.startswith("data:")]
    assert len([width for width in found["drawn"] if width > 300]) >= 2
    for column in found["done"]:
        assert sorted(column["up"]) == sorted(column["down"]) == sorted(column["before"])
    numbers = [column for column in found["done"] if "–" in column["before"] and _numbers(column["before"])]
    assert any(len(set(_numbers(column["before"]))) > 1 for column in numbers)
    for column in numbers:
        for way, reverse in (("up", False), ("down", True)):
            known = _numbers(column[way])
            assert known == sorted(known, reverse=reverse)
            assert set(column[way][len(known) :]) == {"–"}
    texts = [column for column in found["done"] if not _numbers(column["before"])]
    assert any(column["up"] != column["before"] for column in texts)
    assert any(column["down"] != column["before"] for column in texts)
    for column in texts:
        assert column["up"] == sorted(column["before"])
        assert column["down"] == sorted(column["before"], reverse=True)


def _numbers(texts):
    """Return the numbers that cells begin with; missing cells have none."""
    return [float(match[0]) for text in texts if (match := re.match(r"[-+]?\d+(\.\d+)?", text))]


def test_the_page_fits_a_phone_folded_and_unfolded(drive, whole):
    found, console = drive(whole, 390)
    assert found["wide"] <= found["window"] == 390
    found, console = drive(whole, 390, do=UNFOLD)
    assert console == []
    assert found["wide"] <= found["window"] == 390
    before, after = found["done"]["before"], found["done"]["after"]
    assert after == [before[0], before[1] - 100]  # the names stay, and the numbers move


def test_the_page_opens_with_what_was_found_and_is_short(drive, whole):
    found, console = drive(whole, 1400)
    assert (console, found["window"]) == ([], 1400)
    assert found["high"] < 12 * 900
    assert found["wide"] <= 1400
    assert len(whole) < 2_000_000


def test_the_filter_leaves_the_lines_of_a_method(drive, report):
    found, console = drive(report.read_text(), do=FILTER)
    done = found["done"]
    assert console == []
    assert done["shown"]
    for name, words in (("das", ["das"]), ("two", ["full", "seta"])):
        wanted = [row for row in done["before"]["rows"] if any(word in row for word in words)]
        assert 0 < len(wanted) < len(done["before"]["rows"])
        assert done[name]["rows"] == wanted
        assert re.fullmatch(rf"in {done[name]['suites']} of {done['before']['suites']} suites", done[name]["said"])
    assert (done["none"]["rows"], done["none"]["suites"]) == ([], 0)
    assert done["after"] == done["before"]
    assert done["before"]["said"] == ""


@pytest.mark.parametrize("width", [390, 1400])
def test_a_number_opens_its_runs_and_these_lead_to_their_commands(drive, report, width):
    found, console = drive(report.read_text(), width, do=POPOVER)
    done = found["done"]
    assert console == []
    assert (done["before"], done["open"], done["inside"], done["folded"], done["gone"]) == (
        False,
        True,
        True,
        True,
        True,
    )
    assert done["texts"]
    assert all(re.fullmatch(r".+, seed \d: [\d.]+ % [0-9a-f]{12}", text.strip()) for text in done["texts"])
    assert done["row"].startswith(done["id"])
    assert "alignprune_exp" in done["row"]


def test_numbers_open_their_runs_without_the_pages_scripts(drive, report):
    text = re.sub(r"<script>.*?</script>", "", report.read_text(), flags=re.DOTALL)
    found, console = drive(text, do=POPOVER)
    assert console == []
    assert (found["done"]["before"], found["done"]["open"]) == (False, True)
    assert 'class="filter" hidden' in text


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
