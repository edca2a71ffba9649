"""report.html as a reader's browser takes it: parsed, with hostile text in every place where a model or a
file can write."""

import base64
import hashlib
import re
import resource
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_results as made
import made_rows
import pytest
from matplotlib.figure import Figure

from analysis.comparison import Failure, FormatScore
from errors import FrankenError
from reporting import figures, html_report, pages
from reporting.digests import digests, group_shifts
from reporting.marks import Words
from reporting.reports import compare_run

VOID = {"meta", "br", "img", "link", "input", "hr", "source", "wbr"}
SUITES = ("informed", "blind", "binary", "capability", "perplexity", "chat", "trigger")


class Page(HTMLParser):
    """Every element with its attributes, the text, and whether what was opened was closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.pieces, self.broken = [], [], [], []
        self.feed(html)
        self.close()
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append((tag, self.getpos()))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.pieces.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


BLANK = {"png": b"png", "pdf": b"pdf", "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>'}


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures are built but not rendered, which takes a second each."""
    monkeypatch.setattr(figures, "save", lambda figure, forms=(): BLANK)


def written(path, results, forms=html_report.FORMS, **manifest) -> tuple[Page, str, Path]:
    run, manifest = made.make(path, results, **manifest)
    html_report.write_html(run, manifest, compare_run(run, manifest), digests(run, manifest), forms)
    raw = (path / "report.html").read_bytes().decode("utf-8")
    page = Page(raw)
    assert not page.broken and not page.open, (page.broken, page.open)
    return page, raw, path


def full(**changes):
    return made.everything(**changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything in it, whose first figure is really drawn: each takes most of a second."""
    results = [
        made.result("baseline_instruct", full()),
        made.result(
            "franken_instruct_first_32",
            full(
                binary=made.binary(drift=1.0, flattening=-0.3, effect=2.0),
                capability=made.capability([False] * 10),
            ),
        ),
        made.result(
            "mute",
            full(binary=made.binary(mass=0.001)),
            experiment__collapsed=True,
            experiment__notes=["collapsed: here it changes nothing"],
        ),
        made.result("broken"),
        *(
            made.result(
                f"window_base_{k}_{k + 5}",
                {"binary": binary, "perplexity": made.perplexity(nll)},
                experiment__sweep={
                    "kind": "window",
                    "source": "base",
                    "size": 5,
                    "start": k,
                    "stop": k + 5,
                    "dose": None,
                },
            )
            for k, binary, nll in (
                (0, made.binary(drift=-1.0), [2.0, 3.0, 2.5]),
                (5, made.binary(mass=None), [None, 2.0, 3.0]),
            )
        ),
    ]
    real, drawn = figures.save, []

    def first(figure, forms=("svg", "png", "pdf")):
        drawn.append(figure)
        return real(figure, forms) if len(drawn) == 1 else BLANK

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", first)
        return written(tmp_path_factory.mktemp("whole") / "run_y", results, html_report.EVERY_FORM)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(whole):
    page, raw, _ = whole
    tags = [tag for tag, _ in page.elements]
    assert (
        not set(tags) & {"link", "iframe", "object", "embed", "form", "base", "textarea", "input"}
        and tags.count("script") == tags.count("style") == 1
    )
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind in ("script", "style"):
        inside = re.search(f"<{kind}>(.*?)</{kind}>", raw, re.S)[1]
        assert (
            rules[f"{kind}-src"]
            == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
        )
    assert (
        rules["default-src"] == rules["connect-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        and rules["img-src"] == "data:"
    )
    addresses = [
        value
        for _, attrs in page.elements
        for key, value in attrs.items()
        if key in ("src", "href", "srcset", "data", "action")
    ]
    assert addresses and all(a.startswith(("#", "data:image/svg+xml;base64,")) for a in addresses)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]*", "", raw))
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on") or key == "style"]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert {a[1:] for a in addresses if a.startswith("#")} <= set(ids) and len(ids) == len(set(ids))


DRAWN = ("detection", "windows", "p_yes", "p_yes_perplexity", "capability", "kinds", "shifts")


@pytest.mark.parametrize(
    "named, swept, maps, first",
    [
        (9, 3, ["windows", "layers"], "detection"),
        (1, 3, ["windows", "layers"], "windows"),
        (1, 3, ["layers"], "layers"),
        (1, 3, [], "detection"),
    ],
)
def test_a_run_that_is_mostly_a_sweep_opens_with_its_map(named, swept, maps, first):
    rows = [made_rows.row(f"x{k}") for k in range(named)]
    rows += [made_rows.swept("window", k, k + 1, "does not report it", 0.0, 0.3, 20.0) for k in range(swept)]
    assert html_report.first_figure(rows, ["detection", *maps]) == first


def test_the_contents_lead_to_every_section_and_the_replies_come_first(whole):
    page, raw, _ = whole
    nav = raw[raw.index("<nav") : raw.index("</nav>")]
    targets = re.findall(r'href="#([\w-]+)"', nav)
    assert targets == re.findall(r'<h2 id="([\w-]+)"', raw) and len(targets) > 8
    body = raw[raw.index('id="experiment-franken_instruct_first_32"') :]
    order = [
        body.index(part) for part in ("Told that something", "Not told", "Yes/No probes", "What changed")
    ]
    assert order == sorted(order)


def test_figures_are_in_the_page_and_beside_it(whole):
    page, _, path = whole
    images = page.all("img")
    assert len(images) == len(DRAWN) and all(len(image["alt"]) > 20 for image in images)
    for uri in [image["src"] for image in images] + [page.all("source")[0]["srcset"]]:
        svg = base64.b64decode(uri.partition(",")[2]).decode()
        assert "<svg" in svg
        assert "<script" not in svg
        assert "http://www.w3.org/2000/svg" in svg
    assert [source["media"] for source in page.all("source")] == ["(max-width: 40rem)"] * len(DRAWN)
    assert {p.name for p in (path / "figures").iterdir()} == {
        f"{name}.{form}" for name in DRAWN for form in html_report.EVERY_FORM
    }
    png = (path / "figures" / "detection.png").read_bytes()
    # pixels of 300 to the inch
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") >= 6.5 * 300
    assert (path / "figures" / "detection.pdf").read_bytes().startswith(b"%PDF")


def test_everything_stands_in_its_order(whole):
    page = whole[0]
    order = [
        "smollm2-135m: can it tell",
        "run_y, 2026-01-02: 4 experiments, 2 in sweeps, on 30 layers",
        "the base side is a stand-in",
        "changed models",
        "reports it 1",
        "sweeps: 2 experiments",
        "Detection score with its 95% interval",
        "Results",
        "Windows of 5 layers of base",
        "How to read this",
        "P(Yes) alone is not evidence",
        "Where: windows of layers replaced",
        "P(Yes) on the published probe",
        "P(Yes) against perplexity",
        "Capability against perplexity",
        "Capability by kind",
        "How each group of questions moved",
        "Behind the verdicts",
        "Beside the published numbers",
        "Every experiment",
        "What changed",
        "Yes/No probes",
        "Told that",
        "Not told",
        "Time and memory",
        "What was run",
        "run_all.py --pair smollm2-135m",
    ]
    here = 0
    for words in order:
        here = page.text.find(words, here)
        assert here >= 0, words
    for needed in (
        "abc123",
        "torch 2.13.0",
        "a processor",
        "bfloat16",
        "cpu",
        "seed 0",
        "revision r1",
        "layer 10 of 64 became 4 of 30",
        "aa: back to the bit",
        "1.5 MB",
        "3 MB/s",
        "500 tokens in 2.0 s (250/s)",
        "not an answer",
        "collapsed",
        "failed: RuntimeError",
        "it broke",
        "Traceback: it broke",
    ):
        assert needed in page.text, needed


def table_rows(raw, name):
    return [
        re.sub(r"<[^>]*>", " ", row)
        for row in re.findall(r"<tr.*?</tr>", raw.replace("<wbr>", ""), re.S)
        if name in row
    ]


def test_detects_never_stands_alone(whole):
    _, raw, _ = whole
    first = table_rows(raw, "franken_instruct_first_32")[0]
    assert "reports it" in first
    assert "keyed answers stand at" in first
    assert "their log-odds more than controls" in first
    assert re.search(r'class="verdict reports-it"', raw) and "0 of 10" in raw
    behind = next(
        r
        for r in table_rows(raw, "franken_instruct_first_32")
        if "+2.00" in r and "reversed" not in r and "CI" not in r and "nats toward" in r
    )
    assert behind.count("reports it") == 2  # the verdict, and the call of the score alone


def test_too_little_data_stands_with_its_reason_and_numbers_that_are_set_back(
    tmp_path, no_drawing, monkeypatch
):
    """A score that would be called, of a model whose control answers do not tell what it is asked."""
    at_chance = made.binary()
    for probe in at_chance["probes"]:
        if probe["kind"] == "control":  # other questions' answers: both keys alike
            probe["keyed"] = "yes" if probe["id"].split("-")[1] in {f"q{k}" for k in range(5)} else "no"
    changed = made.binary(effect=2.0)
    for probe, before in zip(changed["probes"], at_chance["probes"], strict=True):
        probe["keyed"] = before["keyed"]
    results = [
        made.result("baseline_instruct", full(binary=at_chance)),
        made.result("unsure", full(binary=changed)),
        made.result("unasked", {"perplexity": made.perplexity([2.0, 3.0, 2.5])}),
    ]
    page, raw, _ = written(tmp_path / "run", results)
    unsure, unasked = (table_rows(raw, f"experiment-{name}")[0] for name in ("unsure", "unasked"))
    assert "controls answered too uncertainly" in unsure and "not judged" in unsure
    assert "keyed answers stand at" not in unsure and "Yes/No not asked" in unasked
    assert re.search(r'<td class="nowrap soft"[^>]*>\+2\.00 [^<]*, not judged</td>', raw)
    behind = re.findall(r'<tr class="dim">.*?</tr>', raw, re.S)
    assert len(behind) == 2 and all("unsure" in line for line in behind)
    assert "not judged" in behind[0] and "reports it" not in behind[0]  # beside the verdict, no other call
    assert "too little data 2 controls answered too uncertainly, Yes/No not asked" in " ".join(
        page.text.split()
    )


def test_an_auroc_above_chance_is_not_left_to_be_read_as_reports(tmp_path, no_drawing):
    """Scores that none of which is called may still rank above the placebos'."""
    results = [made.result("baseline_instruct", {"binary": made.binary()})]
    for control, effects in ((None, (0.03, 0.04, 0.05)), ("placebo", (0.0, 0.01, 0.02))):
        results += [
            made.result(f"{control}_{k}", {"binary": made.binary(effect=effect)}, experiment__control=control)
            for k, effect in enumerate(effects)
        ]
    page, *_ = written(tmp_path / "run", results)
    assert re.search(r"AUROC: *3 modified against 3 placebos: 1\.00", page.text), page.text[:1500]
    assert "None of 3 changed models reports its change" in page.text
    assert "may be above 0.5 where no model reports anything" in page.text


def test_published_numbers_stand_beside_ours_with_their_source(whole, tmp_path, no_drawing):
    page = whole[0]
    assert "2026-02-04" in page.text
    assert "7.6%" in page.text
    assert "2e-06%" in page.text
    assert "This run used another pair (smollm2-135m, 30 layers)" in page.text
    own = written(
        tmp_path / "run",
        [made.result("baseline_instruct", {"binary": made.binary()})],
        pair="qwen2.5-coder-32b",
        layers=64,
    )[0]
    assert "2e-06%" in own.text and "another pair" not in own.text
    own = {side: {"kind": "checkpoint", "path": f"~/models/{side}-x"} for side in ("instruct", "base")}
    nameless = written(
        tmp_path / "other",
        [made.result("baseline_instruct", {"binary": made.binary()})],
        pair=None,
        sources=own,
    )[0]
    assert "another pair (instruct-x with base-x, 30 layers)" in nameless.text
    assert "instruct-x with base-x: can it tell that it was changed?" in nameless.text
    assert "instruct: instruct-x; base: base-x." in nameless.text


def test_replies_stand_beside_the_baselines(tmp_path, no_drawing):
    results = [
        made.result("baseline_instruct", full(informed=made.free_text("informed", "As ever."))),
        made.result(
            "x",
            full(informed=made.free_text("informed", "All new."), capability=made.capability([False] * 10)),
        ),
    ]
    raw = written(tmp_path / "run", results)[1]
    later = raw[raw.index('<details id="experiment-x"') :]
    assert later.count("All new.") == 4
    assert later.count("As ever.") == 4
    assert later.count("<small>lost</small>") == 5
    earlier = raw[
        raw.index('<details id="experiment-baseline_instruct"') : raw.index('<details id="experiment-x"')
    ]
    assert earlier.count("As ever.") == 4 and "<b>baseline</b>" not in earlier


WINDOW = {"kind": "window", "source": "base", "size": 5, "start": 0, "stop": 5, "dose": None}
HOSTILE = (
    "</textarea></pre></details><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp;{{ 7*7 }}{%"
    " raw %}\ud800 \x00\x07\x1b[31m\x85 \u202egnp.exe \u200f\u2066\u200b\ufeff\u2028 שלום $x^2$ ]]>--><!--"
)


def hostile_result(name, text):
    made_up = full(
        informed=made.free_text("informed", text),
        blind=made.free_text("blind", text),
        binary=made.binary(effect=1.0, top=text),
        capability=made.capability([True, False] * 5, text),
        chat=made.chat(text),
        trigger=made.trigger(text=text),
    )
    made_up["capability"]["items"][0] |= {"id": text, "category": text, "detail": text, "prompt": text}
    made_up["capability"]["by_category"] = {text: {"correct": 1, "n": 2}}
    made_up["capability"]["code"] = text
    made_up["binary"]["probes"][0] |= {"text": text, "framing": text}
    made_up["binary"]["probes"][3]["id"] = text
    made_up["perplexity"]["texts"][0]["id"] = text
    made_up["trigger"]["behavior"]["questions"][0] |= {"id": text, "category": text, "prompt": text}
    made_up["trigger"]["behavior"]["rates"]["triggered"][text] = {
        "rows": [{text: 1.5}, {text: None}],
        "deep": [[[[[[[[[[text]]]]]]]]]],
    }
    made_up["chat"]["probes"][0] |= {"id": text, "mode": text, "prompt": text}
    return made.result(
        name,
        made_up,
        experiment__hypothesis=text,
        experiment__change=text,
        experiment__notes=[text],
        weights__modified=text,
        experiment__positions=[{"what": text, "asked_of_64": [text], "applied": text}],
        experiment__recipe={
            "slots": [{"mix": [[text, 0, 1.0]]}],
            "embed": text,
            "norm": "instruct",
            "head": "instruct",
        },
    )


def test_lm_eval_stands_in_a_table_with_every_metric_of_every_experiment(tmp_path, no_drawing):
    def asked(acc, **more):
        results = {"mill": {"acc": acc}, "<b>odd</b>": {"bits": None}, **more}
        return {
            "version": "0.4.9",
            "tasks": list(results),
            "limit": 5,
            "results": results,
            "n": dict.fromkeys(results, 5),
        }

    page, raw, _ = written(
        tmp_path / "run",
        [
            made.result("baseline_instruct", {"binary": made.binary(), "lm_eval": asked(0.75)}),
            made.result("odd", {"lm_eval": asked(0.125, late={"f1": 0.5})}),
            made.result("broken"),
        ],
    )
    section = raw[raw.index('<h2 id="lm-eval">') :]
    section = section[: section.index("<h2", 4)]
    assert {"href": "#lm-eval"} in page.all("a")
    rows = [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", section, re.S)
    ]
    assert rows == [
        ["experiment", "mill: acc", "&lt;b&gt;odd&lt;/b&gt;: bits", "late: f1"],
        ["baseline_instruct", "0.7500", "-", "-"],
        ["odd", "0.1250", "-", "0.5000"],
    ]
    assert "Version 0.4.9; documents of each task: mill (5)" in section
    assert 'id="lm-eval"' not in written(tmp_path / "other", [made.result("a", {"binary": made.binary()})])[1]


def test_hostile_text_stays_text(tmp_path, no_drawing):
    broken = made.result("broken")
    broken["error"] = {"type": HOSTILE, "message": HOSTILE, "traceback": HOSTILE}
    results = [made.result("baseline_instruct", full()), hostile_result("x", HOSTILE), broken]
    page, raw, _ = written(
        tmp_path / "run",
        results,
        pair=HOSTILE,
        notes=[HOSTILE],
        command=["run_all.py", HOSTILE],
        commit=HOSTILE,
        dtype=HOSTILE,
    )
    tags = [tag for tag, _ in page.elements]
    assert not set(tags) & {"textarea", "iframe"} and tags.count("script") == 1
    assert (
        all(set(image) == {"src", "alt"} for image in page.all("img"))
        and len([a for a in page.all("details") if "id" in a]) == 3
    )
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page.text
    assert "שלום" in page.text
    assert "⟨U+D800⟩" in page.text
    assert "⟨U+202E⟩gnp.exe" in page.text
    assert "␛[31m" in page.text
    assert not pages.HIDDEN.search(raw.replace(pages.TEMPLATES.joinpath("style.css").read_text(), ""))
    assert all(attrs["dir"] == "auto" for tag, attrs in page.elements if tag == "pre")


def test_endless_text_is_cut_and_says_so(tmp_path, no_drawing):
    endless = "a" * 10_000
    page, raw, _ = written(
        tmp_path / "run", [made.result("baseline_instruct", full()), hostile_result("x", endless)]
    )
    assert len(raw) < 600_000
    assert "[6,000 more characters]" in page.text
    assert "[9,970 more characters]" in page.text
    assert not re.search(f"a{{{pages.LONGEST_REPLY + 10},}}", page.text)


@pytest.mark.parametrize(
    ("suites", "baseline"),
    [((), True), *[((s,), True) for s in SUITES], (("binary", "perplexity"), False), (SUITES, False)],
)
def test_any_suites_with_or_without_a_baseline(tmp_path, no_drawing, suites, baseline):
    some = {name: suite for name, suite in full().items() if name in suites}
    changed = some | ({"binary": made.binary(drift=1)} if "binary" in suites else {})
    results = [
        made.result("x", changed),
        made.result("window_base_0_5", changed, experiment__sweep=WINDOW),
        made.result("broken"),
    ]
    if baseline:
        results.insert(0, made.result("baseline_instruct", some))
    page, raw, _ = written(tmp_path / "run", results)
    for suite, title in (
        ("informed", "Told that"),
        ("blind", "Not told"),
        ("binary", "Yes/No probes"),
        ("capability", "Capability"),
        ("trigger", "Trigger"),
    ):
        assert (f"<h3>{title}" in raw or f"<b>{title}" in raw) == (suite in suites), suite
    assert ("No baseline." in page.text) == (not baseline) and ("Behind the verdicts" in page.text) == (
        baseline and "binary" in suites
    )


@pytest.mark.parametrize("results", [[], ["broken"], ["baseline_instruct"]])
def test_runs_in_which_nothing_worked(tmp_path, results):
    page = written(tmp_path / "run", [made.result(name) for name in results])[0]
    assert "No baseline." in page.text
    assert page.text.count("failed: RuntimeError: it broke") == 2 * len(results)
    assert not page.all("img")


def test_every_number_may_be_undefined(tmp_path, no_drawing):
    nothing = full(binary=made.binary(mass=None), perplexity=made.perplexity([None] * 3))
    page = written(
        tmp_path / "run",
        [
            made.result("baseline_instruct", nothing),
            made.result("x", nothing),
            made.result("window_base_0_1", nothing, experiment__sweep=WINDOW),
        ],
    )[0]
    assert not re.search(r"\bNone\b(?! of 2 changed models)|\bnan\b", page.text)


def test_the_same_results_give_the_same_page(tmp_path, no_drawing):
    results = [
        made.result(name, {"binary": made.binary(effect=k), "chat": made.chat()})
        for k, name in enumerate(("baseline_instruct", "x"))
    ]
    pages = [written(tmp_path / folder / "run", results) for folder in ("a", "b")]
    assert pages[0][1] == pages[1][1]


def test_a_refusing_disk_is_one_line(tmp_path, no_drawing):
    run, manifest = made.make(tmp_path / "run", [made.result("baseline_instruct", full())])
    (run.path / "figures").write_text("in the way")
    with pytest.raises(FrankenError, match="cannot write figures"):
        html_report.write_html(run, manifest, compare_run(run, manifest), digests(run, manifest))
    assert not (run.path / "report.html").exists()


def test_a_disk_that_fills_up_leaves_the_figure_of_before(tmp_path, monkeypatch):
    """Files may grow to 4 kB here, as where the disk is full after so much of one."""
    monkeypatch.setattr(figures, "save", lambda figure, forms=(): {"svg": svg})
    svg = b"<svg>whole</svg>"
    html_report.save(tmp_path, "shifts", Figure())
    svg = b"<svg>" + b"x" * 20_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FrankenError, match="cannot write .*File too large"):
            html_report.save(tmp_path, "shifts", Figure())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {"shifts.svg": b"<svg>whole</svg>"}


def test_shifts_of_groups_by_hand():
    before, after = made.binary(), made.binary(drift=1.0, effect=0.5)
    after["probes"][0]["log_odds"] = None  # introspective, keyed yes: left out of its group
    found = group_shifts(before, after)
    assert found == pytest.approx(
        {
            ("introspective", "yes"): 1.5,
            ("introspective", "no"): 0.5,
            ("control", "yes"): 1.0,
            ("control", "no"): 1.0,
        }
    )


def test_a_large_run_keeps_each_experiments_replies_on_a_page_of_its_own(tmp_path, no_drawing, monkeypatch):
    """The small run's page has every reply; the large one's links to them, and each page has what it had."""
    hostile = "<script>alert(1)</script> only here"
    results = [
        made.result("baseline_instruct", full()),
        made.result("swap_a", full(informed=made.free_text("informed", hostile))),
    ]
    _, small, _ = written(tmp_path / "small", results)
    monkeypatch.setattr(html_report, "LARGE", 1)
    page, large, path = written(tmp_path / "large", results)
    assert "only here" in small and "only here" not in large and len(large) < len(small)
    assert not (tmp_path / "small" / "replies").exists()
    assert sorted(p.name for p in (path / "replies").iterdir()) == ["baseline_instruct.html", "swap_a.html"]
    for name in ("baseline_instruct", "swap_a"):
        assert f'href="replies/{name}.html"' in large and f'id="experiment-{name}"' in large
    own = (path / "replies" / "swap_a.html").read_text()
    assert not Page(own).broken and "../report.html#experiment-swap_a" in own
    assert "only here" in own and "<script>alert" not in own and "Content-Security-Policy" in own
    body = re.search(r'<details id="experiment-swap_a".*?\n</details>', small, re.S)[0]
    assert body.partition(">")[2][:2000] in own


def test_a_large_runs_page_grows_by_little_with_each_experiment(tmp_path, monkeypatch):
    """Their replies lie beside it, and figures keep as many lines as can be looked over."""
    monkeypatch.setattr(html_report, "LARGE", 1)
    monkeypatch.setattr(figures, "MOST", 5)
    pages_of = []
    for count in (10, 30):
        results = [made.result("baseline_instruct", full())]
        results += [made.result(f"swap_{k}", full()) for k in range(1, count)]
        run, manifest = made.make(tmp_path / str(count), results)
        html_report.write_html(run, manifest, compare_run(run, manifest), digests(run, manifest))
        pages_of.append((run.path / "report.html").read_text())
        assert f"5 of {count} experiments have a line of their own in figures" in pages_of[-1]
    assert (len(pages_of[1]) - len(pages_of[0])) / 20 < 9000


# ---- what figures leave out --------------------------------------------------------------------------------


def captions_of(rows) -> dict[str, tuple]:
    """{figure: (what draws it, its caption)} of a run of these rows."""
    manifest = {"layers": 30, "pair": "smollm2-135m", "sources": {}}
    described = html_report._figures(manifest, made_rows.comparison(rows), {})
    return {name: (draw, caption) for name, draw, _, caption in described}


def test_a_figure_says_how_many_it_leaves_out_and_why():
    """As many as have no line in it, the unmodified model and the controls aside."""
    weak = made_rows.found_score(0.4, call="reports it")
    rows = [
        made_rows.row("baseline_instruct", None),
        made_rows.row("said", "does not report it", 0.1),
        made_rows.row("said_too", "answers drift towards Yes", 0.2),
        made_rows.row("unsure", "too little data", detection=weak),
        made_rows.row("unasked", "too little data", detection=None, p=None, published_probe=None),
        made_rows.row("broken_1", "broken", None),
        made_rows.row("broken_2", "broken", None, p=None, published_probe=None),
        made_rows.row("f", "broken", status="failed", error=Failure("E", "m")),
        made_rows.quick("placebo_mlp_1", control="placebo"),
    ]
    uncertain, unasked = "controls answered too uncertainly", "Yes/No not asked"
    figures_of = captions_of(rows)
    for name, drawn, said in (
        (
            "side_by_side",
            ["said", "said_too"],
            f" Left out: 2 with too little data ({uncertain}, {unasked}), 2 broken, 1 failed.",
        ),
        (
            "detection",
            ["said", "said_too", "unsure"],
            f" Without a score: 1 with too little data ({unasked}), 2 broken, 1 failed.",
        ),
        (
            "p_yes",
            ["baseline_instruct", "said", "said_too", "unsure", "broken_1"],
            f" Left out: 1 with too little data ({unasked}), 1 broken, 1 failed.",
        ),
    ):
        draw, caption = figures_of[name]
        (axes, *_) = draw().axes
        artists = [word for artist in axes.artists if isinstance(artist, Words) for word in artist.words]
        shown = [word.text for word in artists if word.within == "line" and word.place[0] == 0]
        assert sorted(set(shown) - {"1 placebo"}) == sorted(drawn), name
        assert caption.endswith(said), caption
    assert "Not asked" not in figures_of["capability"][1]
    whole = captions_of([row for row in rows if "said" in row.name])
    assert not [
        n for n in figures_of if n != "shifts" and re.search("Left out|Without a score:", whole[n][1])
    ]
    # without its digests, of which this figure is drawn
    assert whole["shifts"][1].endswith(" Left out: 2 that were not asked for it.")


def test_figures_of_sweeps_and_formats_say_what_has_no_score():
    swept = [
        made_rows.swept("window", 0, 4, "broken", None, 0.5, 99.0),
        made_rows.swept("delete", 3, 4, "does not report it", 0.1, 0.5, 30.0),
        made_rows.swept("noise", None, None, "too little data", None, 0.5, 30.0, dose=0.2),
    ]
    few = FormatScore(0, 0, "too little data", None, None, None, 1, lacking="too few control questions")
    rows = [
        made_rows.row("baseline_instruct", None),
        made_rows.row("asked", formats={"letters": few, "rating": replace(few, call="broken", lacking=None)}),
        made_rows.row("not_asked", capability=None),
        *swept,
    ]
    captions = {name: caption for name, (_, caption) in captions_of(rows).items()}
    assert captions["windows"].endswith(" Without a detection score: 1 broken.")
    assert captions["dose"].endswith(
        " Without a detection score: 1 with too little data (controls answered too uncertainly)."
    )
    assert captions["layers"].endswith("hatched: broken.")
    assert captions["formats"].endswith(
        " Not asked: 1. Without a score in a format: 1 with too little data (too few control questions), 1"
        " broken."
    )
    assert captions["capability"].endswith(" Not asked: 1.")
