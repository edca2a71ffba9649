"""Kills, full disks, corrupted files, hostile checkpoints and pages: many of each, drawn from a fixed seed.

`pytest -m fault -n 0` runs it and prints what it counted: how often something was tried, how many finished
results were lost, and how many wrong ones were taken for right. docs/reliability.md keeps the counts of one
run.
"""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import made_study
import pytest
import small_battery
import torch
from browsing import BROWSER, browse
from cli_runs import FOUR, latest, read, resealed, timeless
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

import report
import run_all
from errors import FrankenError
from reporting import figures, html_report
from reporting.digests import digests
from runner import packing
from runner.pairs import open_pair, read_config
from runner.results import Run
from runner.self_check import check_code

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1800)]
KILLS, FLIPS, EDITS, CHECKPOINTS = 24, 120, 200, 75


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


@pytest.fixture
def count(record_property):
    """count(what, tried, lost, wrong) keeps a line for the end of the session."""

    def keep(what: str, tried: int, lost: int = 0, wrong: int = 0) -> None:
        record_property("faults", f"{what}: {tried} tried, {lost} lost, {wrong} wrong")
        assert (lost, wrong) == (0, 0)

    return keep


# ---- kills -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seconds(pair, tmp_path_factory) -> float:
    """How long a run of FOUR takes in a child on this machine, as busy as it is."""
    folder = tmp_path_factory.mktemp("seconds")
    child = small_battery.in_child(small_battery.arguments(pair, folder, *FOUR), folder / "log")
    small_battery.wait_for(folder / "log", child, 120)
    begin = time.monotonic()
    child.join()
    return time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_killed_at_any_moment_goes_on_where_it_was(pair, four, tmp_path, count, number, seconds):
    """Each child goes on with the run that the last one left, and is killed at any time of its own."""
    draw, expected = random.Random(int(number)), timeless(four)
    tried = lost = wrong = whole = 0
    run, argv = None, small_battery.arguments(pair, tmp_path / "out", *FOUR)
    while tried < KILLS // 4:
        before = read_bytes(run)
        log = tmp_path / f"log{tried}_{whole}"
        child = small_battery.in_child(["--resume", str(run)] if run else argv, log)
        small_battery.wait_for(log, child, 120)
        child.join(draw.uniform(0, 1.1 * seconds))
        if child.is_alive():
            os.kill(child.pid, number)
            tried += 1
        child.join(120)
        assert "Traceback" not in log.read_text(), log.read_text()[-2000:]
        run = latest(tmp_path / "out") if any((tmp_path / "out").glob("run_*")) else None
        if run and not (run / "manifest.json").exists():
            shutil.rmtree(run)  # killed between the folder and its manifest: nothing was finished
            run = None
        lost += sum(read_bytes(run).get(name) != content for name, content in before.items())
        if run and len(read_bytes(run)) == 4:
            wrong += timeless(run) != expected
            whole += 1
            shutil.rmtree(run)
            run = None
    if run:
        assert run_all.main(["--resume", str(run)]) == 0
        wrong += timeless(run) != expected
    assert not list((tmp_path / "out").rglob(".*.partial")) or number == signal.SIGKILL
    count(f"runs ended by {signal.Signals(number).name}", tried, lost, wrong)


def read_bytes(run: Path | None) -> dict[str, bytes]:
    """Every finished result of a run, byte for byte."""
    return {file.name: file.read_bytes() for file in (run / "experiments").glob("*.json")} if run else {}


# ---- disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_any_write_loses_nothing(pair, four, tmp_path, monkeypatch, capfd, count, call):
    real, expected, tried, wrong, lost = getattr(os, call), timeless(four), 0, 0, 0
    for after in range(1, 12):
        out, calls = tmp_path / str(after), []

        def failing(*args, after=after, calls=calls):
            calls.append(args)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as m:
            m.setattr(os, call, failing)
            code = run_all.main(small_battery.arguments(pair, out, *FOUR))
        if len(calls) <= after:
            break
        tried += 1
        assert code == 1 and "Traceback" not in capfd.readouterr().err
        run = latest(out)
        before = read_bytes(run)
        assert run_all.main(["--resume", str(run)]) == 0
        lost += sum(read_bytes(run)[name] != content for name, content in before.items())
        wrong += timeless(run) != expected
    count(f"disks full at {call}", tried, lost, wrong)


# ---- files -------------------------------------------------------------------------------------------------


def damage(data: bytes, draw: random.Random) -> bytes:
    """The bytes with something done to them that disks, copies and editors do."""
    at = draw.randrange(len(data))
    length = min(draw.choice([1, 4, 100, 4096]), len(data) - at)
    return draw.choice(
        [
            data[:at],
            data[:at] + bytes(length) + data[at + length :],
            data[:at] + data[at + length :],
            data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
            data[:at] + data[at : at + length] * 2 + data[at + length :],
            data[:at] + draw.randbytes(length) + data[at + length :],
        ]
    )


@pytest.mark.parametrize("packed", [False, True], ids=["files", "archive"])
def test_damaged_results_are_refused_or_right(finished, capfd, count, packed):
    """Every experiment is then read: it is what it was, or one line says that it is not."""
    draw, whole = random.Random(7), read(finished)
    if packed:
        Run(finished).pack()
    files = [p for p in finished.rglob("*") if p.is_file() and p.name in ("texts.json", packing.ARCHIVE)]
    files += sorted((finished / "experiments").glob("*.json"))
    tried = wrong = refused = 0
    for _ in range(FLIPS):
        file = draw.choice(files)
        content = file.read_bytes()
        changed = damage(content, draw)
        if changed == content:
            continue
        file.write_bytes(changed)
        tried += 1
        run = Run(finished)
        for name, expected in whole.items():
            try:
                wrong += run.load(name) != expected
            except FrankenError as e:
                refused += 1
                assert "\n" not in str(e)
        file.write_bytes(content)
    assert refused >= tried // 2
    count(f"damaged {'archives' if packed else 'results and texts'}", tried, 0, wrong)


def test_damaged_runs_make_no_traceback(finished, capfd, count):
    draw, tried = random.Random(11), 0
    files = sorted(p for p in finished.rglob("*.json"))
    for _ in range(FLIPS // 4):
        file = draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(damage(content, draw))
        capfd.readouterr()
        code = report.main([str(finished)])
        out, err = capfd.readouterr()
        assert "Traceback" not in err and (code == 0 or (code, out, len(err.splitlines())) == (1, "", 1)), err
        tried += 1
        file.write_bytes(content)
    count("reports over a damaged run", tried)


VALUES = [
    0,
    -1,
    1,
    3,
    10**9,
    10**13,
    10**400,
    1e-300,
    1e300,
    True,
    None,
    "",
    "x" * 10_000,
    [],
    {},
    [[]],
    "\ud800",
    "../..",
]


def edited(text: str, draw: random.Random) -> str:
    """A JSON file with one value somewhere replaced, removed or doubled."""
    whole = json.loads(text)
    place = whole
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
            if draw.random() < 0.2:
                del place[key]
            else:
                place[key] = draw.choice(VALUES)
            break
        place = place[key]
    return json.dumps(whole)


@pytest.mark.parametrize("how", ["report", "resume"])
def test_runs_with_values_of_another_kind_make_no_traceback(four, tmp_path, monkeypatch, capfd, count, how):
    """Files that are whole and say something else, as those of a received run may; results are sealed."""
    draw, tried, refused = random.Random(how), 0, 0
    if how == "report":
        svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt"/>'
        monkeypatch.setitem(sys.modules, "reporting.html_report", html_report)
        monkeypatch.setattr(figures, "save", lambda figure, forms=(): {"png": b"", "pdf": b"", "svg": svg})
    for _ in range(EDITS if how == "report" else EDITS // 4):
        run = shutil.copytree(four, tmp_path / "copy")
        results = sorted((run / "experiments").glob("*.json"))
        if how == "resume":
            results.pop().unlink()
        file = draw.choice([run / "manifest.json", draw.choice(results)])
        text = edited(file.read_text(), draw)
        file.write_text(text if file.name == "manifest.json" else resealed(text))
        capfd.readouterr()
        if how == "report":
            code = report.main([str(run)])
        else:
            code = run_all.main(["--resume", str(run), *draw.choice([[], ["--accept-changes"]])])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        if code == 1 and how == "report":
            assert (out, len(err.splitlines())) == ("", 1), err
        refused += code == 1
        tried += 1
        shutil.rmtree(run)
    count(f"values of another kind in a run, {how} ({refused} refused)", tried)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"],
)
def test_damaged_checkpoints_open_as_they_are_or_are_one_line(pair, tmp_path, count, name):
    """Whatever opens is run: it answers, or is refused in one line as well."""
    draw, tried, opened = random.Random(name), 0, 0
    whole = (pair / "instruct" / name).read_bytes() if (pair / "instruct" / name).exists() else b"{}"
    folder = shutil.copytree(pair / "instruct", tmp_path / "model")
    for _ in range(CHECKPOINTS // 5):
        if name.endswith(".json") and len(whole) > 2 and draw.random() < 0.7:
            (folder / name).write_text(edited(whole.decode(), draw))
        else:
            (folder / name).write_bytes(damage(whole, draw))
        tried += 1
        try:
            open_pair(instruct=str(folder), device_map="cpu", dtype="float32")
            opened += 1
        except FrankenError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000
    count(f"checkpoints with a damaged {name} ({opened} opened)", tried)


MOST_MEMORY = 8 << 30  # bytes of a child that checks a family


def checked(name: str, folder: Path) -> str:
    """What the check at load says of a family's default config: why it is refused, or nothing.

    In a process of its own: what one family takes or breaks is not the next one's.
    """
    said, tell = multiprocessing.Pipe(duplex=False)

    def check() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
        try:
            try:
                config = AutoConfig.for_model(name).get_text_config()
            except Exception:  # the config's own
                config = read_config(folder)
            check_code(config, torch.device("cpu"))
            tell.send("")
        except FrankenError as e:
            tell.send(str(e))

    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(300)
    child.kill()
    assert said.poll(), f"{name} ended with status {child.exitcode}"
    return said.recv()


def test_every_family_of_the_installed_transformers_is_right_or_refused_in_one_line(tmp_path, count):
    """At the sizes of its own default config, made small by the check at load, which compares it with
    transformers' own forward pass; some of those configs make no model in transformers either, and a few
    types have no default config: a file that says nothing but the type is read then."""
    refusals = {}
    for name in sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        refusals[name] = checked(name, tmp_path)
        assert "\n" not in refusals[name] and len(refusals[name]) < 2000, name
    refused = sum(map(bool, refusals.values()))
    count(f"families of transformers ({len(refusals) - refused} run, {refused} refused)", len(refusals))


# ---- pages -------------------------------------------------------------------------------------------------

DO = "document.documentElement.dataset.pwned=1"
PAGES = [
    f"<script>{DO}</script>",
    f"</script><script>{DO}</script>",
    f"</pre></td></table><script>{DO}</script>",
    f"<img src=x onerror='{DO}'>",
    f'<img src=x onerror="{DO}">',
    f"<svg onload={DO}>",
    f"<svg><script>{DO}</script></svg>",
    f"<svg><animate onbegin={DO} attributeName=x dur=1s>",
    f"<body onload={DO}>",
    f"<iframe srcdoc='<script>parent.{DO}</script>'></iframe>",
    f"<iframe src='javascript:parent.{DO}'></iframe>",
    f"<a href='javascript:{DO}'>click</a>",
    f"<details open ontoggle={DO}>",
    f"<input autofocus onfocus={DO}>",
    f"<video><source onerror={DO}></video>",
    f"<style>@import 'http://127.0.0.1:9/x.css';</style><script>{DO}</script>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<base href='http://127.0.0.1:9/'><link rel=stylesheet href=x.css>",
    f"<template><script>{DO}</script></template><noscript><img src=x onerror={DO}></noscript>",
    f"<!--><script>{DO}</script>-->",
    f"<![CDATA[><script>{DO}</script>]]>",
    f"{{{{ [].__class__ }}}}{{% for x in y %}}<script>{DO}</script>",
    f"' onmouseover={DO} autofocus onfocus={DO} x='",
    f'" onmouseover="{DO}" autofocus onfocus="{DO}" x="',
    f"&lt;script&gt;{DO}&lt;/script&gt;",
    f"\u202e<script>{DO}</script>\u2066",
    f"\x00<scr\x00ipt>{DO}</scr\x00ipt>",
    f"+ADw-script+AD4-{DO}+ADw-/script+AD4-",
    f"<math><mtext></form><form><mglyph><style></math><img src onerror={DO}>",
    f"<object data='data:text/html,<script>parent.{DO}</script>'></object>",
    f"<form action='javascript:{DO}'><button autofocus onfocus={DO}>",
    f"\ud800<script>{DO}</script>\udfff",
]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome found")
def test_no_page_runs_or_loads_what_a_model_wrote(tmp_path, monkeypatch, count):
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt"/>'
    monkeypatch.undo()
    monkeypatch.setattr(figures, "save", lambda figure, forms=(): {"png": b"", "pdf": b"", "svg": svg})
    ran = loaded = 0
    for k, text in enumerate(PAGES):
        run, manifest, comparison = made_study.study(tmp_path / f"run_{k}", layers=6, text=text)
        manifest |= {"notes": [text], "pair": text}
        html_report.write_html(run, manifest, comparison, digests(run, manifest))
        dom, console = browse(run.path / "report.html", tmp_path / f"profile_{k}", 1280, 800)
        root = re.search(r"<html[^>]*>", dom)
        assert root and "no script" not in root[0]
        ran += "data-pwned" in root[0]
        loaded += any("127.0.0.1" in line or "Refused" in line for line in console)
    count("hostile pages in Chromium", len(PAGES), 0, ran + loaded)
