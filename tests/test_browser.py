"""report.html in a real headless browser, at the width of a desktop and of a phone: nothing in the console,
nothing runs that a model wrote, no sideways scrolling, tables sort. Skipped where no Chromium is found."""

import base64
import functools
import hashlib
import html
import importlib.resources
import json
import re
from pathlib import Path

import made_results as made
import made_study
import pytest
from browsing import BROWSER, browse

from reporting import figures, html_report
from reporting.columns import EXPERIMENT_COLUMNS
from reporting.digests import digests
from reporting.reports import compare_run

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or chrome found: report.html is not seen in a browser"
)
HOSTILE = (
    "</pre><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><svg onload='window.pwned ="
    " 3'></svg>"
)

# Runs after the page's own script, and tells the page around it what it finds.
PROBE = (Path(__file__).parent / "browser_probe.js").read_text()


# A window of headless Chromium is at least 500 pixels wide, a frame is as narrow as it is told.
FRAME = """<!doctype html><title></title>
<script>addEventListener("message", (event) => {{ document.title = event.data; }});</script>
<iframe src="probed.html" width="{}" height="{}" style="border: 0"></iframe>"""


# Checks of accessibility by Deque's axe-core, as a package of the index carries it.
AXE = Path(str(importlib.resources.files("axe_core_python"))) / "axe.min.js"


def sha256(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def blank(figure, forms=()) -> dict[str, bytes]:
    """An empty box of a figure's size, instead of drawing it."""
    width, height = 72 * figure.get_size_inches()
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="{height}pt"/>'
    return {"png": b"", "pdf": b"", "svg": svg.encode()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run with everything in it, whose model answers with scripts; figures are empty boxes of the right
    size."""

    run, manifest, comparison = made_study.study(
        tmp_path_factory.mktemp("browser") / "run_z", layers=12, text=HOSTILE
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", blank)
        html_report.write_html(run, manifest, comparison, digests(run, manifest))
    return run.path / "report.html", comparison


@pytest.fixture(scope="module")
def probed(study, tmp_path_factory):
    """What PROBE finds in a copy of the page whose policy also allows PROBE, and the console's lines, by
    (width, height)."""
    return functools.cache(
        lambda width, height, **how: _probed(study, tmp_path_factory.mktemp("probed"), width, height, **how)
    )


def _probed(
    study, tmp_path, width: int, height: int, dark: bool = False, axe: bool = False
) -> tuple[dict, list[str]]:
    raw = study[0].read_text(encoding="utf-8")
    for script in [AXE.read_text(encoding="utf-8"), PROBE] if axe else [PROBE]:
        raw = raw.replace("script-src ", f"script-src {sha256(script)} ", 1)
        head, body, tail = raw.rpartition("</body>")
        raw = f"{head}<script>{script}</script>{body}{tail}"
    (tmp_path / "probed.html").write_text(raw, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width, height))
    dom, console = browse(tmp_path / "frame.html", tmp_path / "profile", 1400, 1000, dark)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1])), console


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_desktop_and_phone(probed, width, height):
    found, console = probed(width, height)
    assert console == [] and found["loaded"] == []
    # also with everything unfolded
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["open"] <= width
    assert found["pwned"] is None and found["scripts"] == 2  # the page's and the probe
    # the figure begins on the first screen, in the form for its width
    assert found["first"] == (width < 640) and found["figure"] < height
    assert len(found["images"]) == 12 and min(found["images"]) > 100
    assert found["opened"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A page with every kind of section, of as few experiments as that takes: axe looks at each element."""
    results = [
        made.result("baseline_instruct", made.everything()),
        made.result("swap_distant_10_55", made.everything(binary=made.binary(drift=1.0, effect=2.0))),
        made.result("placebo_mlp_1", {"binary": made.binary()}, experiment__control="placebo"),
    ]
    run, manifest = made.make(tmp_path_factory.mktemp("small") / "run", results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", blank)
        html_report.write_html(run, manifest, compare_run(run, manifest), digests(run, manifest))
    return (run.path / "report.html",)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_axe_finds_nothing_serious_with_everything_unfolded(small, tmp_path, width, dark):
    found, _ = _probed(small, tmp_path, width, 844, dark=dark, axe=True)
    assert found["dark"] == dark and (found["paper"] == "rgb(255, 255, 255)") != dark
    assert [finding for finding in found["axe"] if finding[1] in ("serious", "critical")] == []
    assert not {"landmark-one-main", "heading-order", "page-has-heading-one", "region"} & {
        finding[0] for finding in found["axe"]
    }


def test_what_scrolls_is_reached_by_the_keyboard_and_keeps_its_names(probed):
    found, _ = probed(390, 844)
    assert found["regions"] and found["sticky"] == "sticky"


def test_tables_sort_by_number_and_by_name(study, probed):
    found, _ = probed(1280, 800)
    assert found["buttons"] == found["heads"] > 100 and found["focused"]
    rows = [row for row in study[1].experiments if not row.control and not row.sweep]
    numbers = [row.perplexity.perplexity for row in rows]
    assert list(map(float, found["before"])) == numbers != sorted(numbers)
    (first, up), (second, down) = found["sorted"]
    assert (first, second) == ("ascending", "descending")
    assert list(map(float, up)) == sorted(numbers) and list(map(float, down)) == sorted(numbers, reverse=True)
    assert [re.sub(r"\d( \d)*$", "", n)[:8] for n in found["names"]] == [
        re.sub(r"\d( \d)*$", "", n)[:8] for n in sorted(r.name for r in rows)
    ]
    assert found["states"] == ["ascending"] + [None] * (len(EXPERIMENT_COLUMNS) - 1)


def test_the_policy_is_what_stops_scripts(study, tmp_path):
    """With the policy's hash spoiled, and a script and a request added, none of them runs and the console
    says so."""
    raw = study[0].read_text(encoding="utf-8").replace("script-src 'sha256-", "script-src 'sha256-AAAA", 1)
    page = tmp_path / "spoiled.html"
    page.write_text(
        raw.replace(
            "</body>",
            "<script>document.title = 'ran'</script><img src='https://localhost/x.png' onerror='1'></body>",
        ),
        encoding="utf-8",
    )
    dom, console = browse(page, tmp_path / "profile", 1280, 800)
    # no buttons, and yet a whole table
    assert "<title>ran</title>" not in dom and 'th class="n">perplexity</th>' in dom
    assert len(console) >= 3 and all("Content Security Policy" in line for line in console)
