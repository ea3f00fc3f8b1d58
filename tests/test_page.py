"""The page in headless Chromium: it draws itself without errors or requests, and does what it says when clicked.

Chromium loads the page in frames of several widths, which a script on the same server clicks through and reports on.
"""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading

import diff_setting
import pytest

from bench import page, version_diff
from common.lineage import FAMILIES, versions_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1400,1000 --remote-debugging-port=0"
).split()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")

# Runs before the page's own script: what goes wrong is kept.
WATCH = """<script>
window.problems = [];
addEventListener("error", event => problems.push(String(event.message)));
addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => problems.push(`refused ${event.blockedURI}`));
</script>"""
HARNESS = """<!doctype html><link rel="icon" href="data:,"><body><script type="module">
const wait = ms => new Promise(done => setTimeout(done, ms));

/** A click where the element's middle is, if that is really the element there. */
async function click(frame, element) {
  element.scrollIntoView({block: "center", behavior: "instant"});
  await wait(50);
  const box = element.getBoundingClientRect();
  const hit = frame.contentDocument.elementFromPoint(box.left + box.width / 2, box.top + Math.min(box.height / 2, 12));
  const Mouse = frame.contentWindow.MouseEvent;
  hit.dispatchEvent(new Mouse("click", {bubbles: true, cancelable: true, view: frame.contentWindow}));
  await wait(50);
  return element.contains(hit);
}

async function visit(width, hash) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = "index.html" + hash;
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; });
  for (let tries = 0; tries < 100 && !frame.contentDocument.querySelector("svg"); tries++) await wait(100);
  await wait(200);
  const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
  const step = page.getElementById("prefill/v2"), report = {width};
  const overflow = () => root.scrollWidth - view.innerWidth;
  report.overflow = [overflow()];
  report.svgs = page.querySelectorAll("svg").length;
  report.svg_text = [...page.querySelectorAll("svg text")].map(text => text.textContent).join(" ");
  report.background = view.getComputedStyle(page.body).backgroundColor;

  // a source line marks instructions
  const lines = [...step.querySelectorAll('.compiled[data-side="1"]')];
  const line = lines.find(cell => cell.textContent.includes("acc = acc * alpha"));
  report.clicked = await click(frame, line);
  const marked = () => [...step.querySelectorAll(".listing li.marked")];
  report.marked = marked().length;
  report.marked_texts = [...new Set(marked().map(item => item.textContent.split(" ")[0]))];
  report.lists = [...step.querySelectorAll(".list")].map(list => list.querySelectorAll("li.marked").length);
  report.status = step.querySelector("[role=status]").textContent;
  report.picked = [...step.querySelectorAll(".cell.picked")].map(cell => cell.textContent);
  report.overflow.push(overflow());

  // an instruction marks its line
  const mufu = [...step.querySelectorAll(".list:last-child li")].find(item => item.textContent.includes("MUFU.EX2"));
  report.instruction_clicked = await click(frame, mufu);
  report.line_of_exp = [...step.querySelectorAll('.cell.picked[data-side="1"]')].map(cell => cell.textContent);

  // the keyboard
  const focusable = step.querySelector('.compiled[tabindex="0"]');
  focusable.focus();
  const before = report.status;
  for (const key of ["ArrowDown", "ArrowDown", "Enter"])
    page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  report.by_key = step.querySelector("[role=status]").textContent;
  report.keyboard = page.activeElement.classList.contains("picked") && report.by_key !== before;

  // folded lines, comments left out
  const fold = step.querySelector(".fold"), rows = step.querySelectorAll(".row").length;
  await click(frame, fold);
  report.unfolded = step.querySelectorAll(".row").length - rows;
  await click(frame, page.getElementById("code-only"));
  const code = [...step.querySelectorAll(".row .code")].map(code => code.textContent);
  report.docstrings_left = code.filter(text => text.includes('"' + '""')).length;
  await click(frame, page.getElementById("code-only"));

  // any two versions
  const article = page.getElementById("prefill/compare");
  const text = () => article.querySelector(".pair").textContent;
  const show = (index, value) => {
    const select = article.querySelectorAll("select")[index];
    select.value = value;
    select.dispatchEvent(new view.Event("change", {bubbles: true}));
    return text();
  };
  report.any_two = [show(1, "v3"), show(0, "v2"), show(0, "v1")].map(text => text.slice(0, 400));
  report.hash = view.location.hash;
  report.overflow.push(overflow());
  view.location.hash = "#prefill/v1..v2";
  await wait(100);
  report.shared_link = [...article.querySelectorAll("select")].map(select => select.value);
  report.top = Math.round(article.getBoundingClientRect().top);
  const texts = cell => [...cell.querySelectorAll("span")].map(span => span.textContent);
  report.table = [...step.querySelectorAll("tbody tr")].map(row => [...row.cells].slice(1).map(texts));
  report.resources = view.performance.getEntriesByType("resource").map(entry => entry.name);
  report.problems = view.problems;
  frame.remove();
  return report;
}

const reports = [];
try {
  for (const width of [1280, 400]) reports.push(await visit(width, "#prefill/v2"));
} catch (error) { reports.push({problems: [String(error.stack)]}); }
await fetch("result", {method: "POST", body: JSON.stringify(reports)});
</script>"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made-up records, so that there are charts."""
    folder = tmp_path_factory.mktemp("results")
    diff_setting.made_up_records(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version_diff, "RESULTS", folder)
        diff_setting.with_tiles_of(patch)
        diff_setting.compile_everything()
        yield


@pytest.fixture(scope="module")
def data(results):
    return page.page_data()


@pytest.fixture(scope="module")
def html(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "page_data", lambda arch, device: data)  # which takes seconds: once is enough
        return page.write_page(tmp_path_factory.mktemp("page"))


def chromium(folder, profile, *flags: str) -> tuple[list[dict], list[str]]:
    """What the harness reports, and the paths that were asked of the server."""
    (folder / "harness.html").write_text(HARNESS)
    asked, reports, reported = [], [], threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_request(self, *_):
            asked.append(self.path)

        def do_POST(self):
            reports.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            reported.set()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/harness.html"
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            assert reported.wait(120), f"no report; asked for {asked}"
        finally:
            os.killpg(browser.pid, signal.SIGTERM)
            browser.communicate(timeout=30)
            server.shutdown()
    return reports, asked


@pytest.fixture(scope="module")
def visits(html, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    (folder / "index.html").write_text(html.read_text().replace("<head>", "<head>" + WATCH, 1))
    reports, asked = chromium(folder, tmp_path_factory.mktemp("profile"))
    return {report.get("width"): report for report in reports}, asked


def test_it_is_one_file_that_names_no_other(html):
    text = html.read_text()
    assert list(html.parent.iterdir()) == [html]
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"(?!data:)", text)
    assert not re.search(r"@import|url\((?!data:)", text[: text.index('type="application/json"')])
    assert str(version_diff.ROOT) not in text


def test_it_has_every_version_and_pair(data):
    assert [family["name"] for family in data["families"]] == list(FAMILIES)
    for family in data["families"]:
        assert [version["name"] for version in family["versions"]] == [v.name for v in versions_of(family["name"])]
        assert list(family["pairs"]) == [f"{a}..{b}" for a, b in diff_setting.pairs_of(family["name"])]
        for version in family["versions"]:
            assert version["kernels"] and any(any(kernel["in_loop"]) for kernel in version["kernels"])


def test_without_records_it_says_so(results, tmp_path, monkeypatch):
    monkeypatch.setattr(version_diff, "RESULTS", tmp_path / "none")
    gatherers = [version_diff.Gatherer(family) for family in FAMILIES]
    assert all(page.ladder(gatherer) is None for gatherer in gatherers)
    prefill = page.family_data(gatherers[0], None)
    assert prefill["ladder"] is None
    assert "No records of prefill yet" in page.render({"kinds": [], "families": [prefill]})


@needs_chromium
def test_it_loads_without_errors_or_requests(visits):
    reports, asked = visits
    assert sorted(reports) == [400, 1280], reports
    for report in reports.values():
        assert report["problems"] == [] and report["resources"] == []
        assert report["svgs"] > 2 and "ceiling" in report["svg_text"] and "fp16 D=128 full" in report["svg_text"]
    assert set(asked) == {"/harness.html", "/index.html", "/result"}


@needs_chromium
def test_nothing_scrolls_sideways(visits):
    for report in visits[0].values():
        assert max(report["overflow"]) <= 0


@needs_chromium
def test_a_source_line_marks_instructions(visits):
    for width, report in visits[0].items():
        assert report["clicked"] and report["marked"] > 0
        assert any(text.startswith("FMUL") for text in report["marked_texts"])
        assert (
            all(report["lists"]) if width > 800 else report["lists"][1]
        )  # both versions, where both are beside each other
        assert re.search(r"v2 line \d+: \d+ instructions, \d+ in the main loop \(\d+ multiplies", report["status"])
        assert any("acc = acc * alpha" in text for text in report["picked"])


@needs_chromium
def test_an_instruction_marks_its_line(visits):
    for report in visits[0].values():
        assert report["instruction_clicked"]
        assert any("tl.exp(" in text for text in report["line_of_exp"])


@needs_chromium
def test_keyboard_and_folds(visits):
    for report in visits[0].values():
        assert report["keyboard"], report["by_key"]
        assert report["unfolded"] > 0 and report["docstrings_left"] == 0


@needs_chromium
def test_the_pickers_change_the_diff(visits):
    for report in visits[0].values():
        assert report["any_two"][0] == report["any_two"][2] != report["any_two"][1]
        assert "Idea of v1" in report["any_two"][2] and "Idea of v3" in report["any_two"][2]
        assert report["hash"] == "#prefill/v1..v3"
        assert report["shared_link"] == ["v1", "v2"] and 0 <= report["top"] < 120


@needs_chromium
def test_the_page_shows_the_terminals_numbers(visits):
    """Both have them from one function."""
    rows = version_diff.gather(version_diff.Request("prefill", "v1", "v2"))["machine_code"]["table"]["rows"]
    wanted = [[[row["shown"][0]], *map(list, zip(row["shown"][1:], row["change"], strict=True))] for row in rows]
    for report in visits[0].values():
        assert report["table"] == wanted


@needs_chromium
def test_dark(visits, html, tmp_path):
    """The colours follow the system's."""
    (tmp_path / "index.html").write_text(html.read_text())
    dark, _ = chromium(tmp_path, tmp_path / "profile", "--force-dark-mode")
    colours = visits[0][1280]["background"], dark[0]["background"]
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert light > 700 and dark < 150
