"""What the tests of the protocol and the runner share: a battery of a dozen questions and a tiny pair that
can say Yes.

`in_child` runs run_all.py in a process of its own, which can be killed; it is forked from a server that has
imported everything once, so that it starts in milliseconds.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from children import default_signals

import prompts
import run_all
from suites import injection, injection_generation, injection_layers, localisation

BATTERY = {
    "INFORMED_PROBES": prompts.INFORMED_PROBES[:2],
    "BLIND_PROBES": prompts.BLIND_PROBES[:2],
    "BINARY_PROBES": tuple(
        p
        for p in prompts.BINARY_PROBES
        if p.framing == "plain" and p.id.split("-")[1] in ("wrong", "layers", "earth", "ice")
    ),
    "FORMAT_PROBES": tuple(p for p in prompts.FORMAT_PROBES if p.question in ("layers", "jupiter")),
    "CAPABILITY": tuple(
        replace(next(item for item in prompts.CAPABILITY if item.category == c), max_new_tokens=6)
        for c in ("arithmetic", "reasoning", "format", "code")
    ),
    "CHAT_PROBES": (prompts.CHAT_PROBES[0], prompts.CHAT_PROBES[-1]),
    "NEUTRAL_TEXTS": {
        "short": "The mill stood by the river.",
        "long": "At noon the ferry came back, and with it the mail. " * 3,
    },
}
SUITES = ["informed", "blind", "binary", "formats", "capability", "perplexity", "chat"]
ANSWERS = ["Yes", "No", " Yes", " No"]  # the tokenizer's last four entries: 260 to 263


def _only_besides(run, manifest, comparison, results, forms, besides) -> None:
    """What write_html does but for the page and its figures."""
    for write in besides:
        write()


def use(monkeypatch) -> None:
    """Ask only the small battery, and draw no figures: report.html has tests of its own."""
    for name, value in BATTERY.items():
        monkeypatch.setattr(prompts, name, value)
    monkeypatch.setattr(injection, "CONCEPTS", injection.CONCEPTS[:2])
    monkeypatch.setattr(injection, "STRENGTHS", (0.0, 0.3))
    monkeypatch.setattr(injection_layers, "SHORT", injection_layers.Grid((0.5,), (0.5,), 1, 1, ("plain",)))
    monkeypatch.setattr(injection_layers, "ORDERS", 1)
    writing = injection_generation.Grid((0.5,), (2.0,), 1, 1, ("generation",), 1, 4)
    monkeypatch.setattr(injection_generation, "SHORT", writing)
    monkeypatch.setattr(localisation, "SHORT", localisation.Grid((0.5,), (1.0,), 1, 0, 1, 1))
    monkeypatch.setitem(
        sys.modules,
        "reporting.html_report",
        SimpleNamespace(write_html=_only_besides, FORMS=(), EVERY_FORM=()),
    )


def tokenizer(chat: bool = True):
    made = tiny.tokenizer(chat)
    made.add_tokens(ANSWERS)
    return made


def checkpoint(path: Path, seed: int, chat: bool = True, **kwargs) -> Path:
    tiny.write_checkpoint(path, seed=seed, chat=chat, **kwargs)
    tokenizer(chat).save_pretrained(path)
    return path


def arguments(pair: Path, out: Path, *more) -> list[str]:
    """A command line for the pair in pair/instruct and pair/base, with budgets of a few tokens."""
    return [
        "--base",
        str(pair / "base"),
        "--instruct",
        str(pair / "instruct"),
        "--device-map",
        "cpu",
        "--dtype",
        "float32",
        "--output",
        str(out),
        "--max-new-tokens",
        "4",
        *map(str, more),
    ]


def assert_close(a, b, path="") -> None:
    """Equal JSON, up to the rounding of float32 sums in numbers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_close(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{path}[{k}]")
    elif isinstance(a, float):
        step, written = 1e-7, all(x == float(f"{x:.4g}") for x in (a, b))
        if written and a and math.isfinite(a):  # four digits may be rounded either way: one in the last
            step = 1.001 * 10.0 ** (math.floor(math.log10(abs(a))) - 3)
        assert a == pytest.approx(b, rel=1e-4, abs=step), path
    else:
        assert a == b, path


# ---- in a process of its own -------------------------------------------------------------------------------


def in_child(argv: list[str], log: Path, stop_at: str | None = None):
    """Start run_all.main(argv) with the small battery; stdout and stderr go to `log`. Returns the started
    process.

    `stop_at`: "NAME" makes it wait forever in the middle of measuring experiment NAME, "NAME.json" after half
    of that file is written; the file `log` with the suffix .reached appears when it is there.
    """
    return forked(_child, argv, log, stop_at)


def forked(function, *given):
    """Start function(*given) in a process forked from the server; the function is a helper module's. Returns
    the started process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_battery"])
    paths, before = [str(Path(__file__).parent), str(Path(__file__).parents[1])], os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the server finds what it preloads by this
    try:
        process = context.Process(target=function, args=given, daemon=True)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return process


def wait_for(path: Path, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


DRIVER = "SMALL_BATTERY_DRIVER"  # the process that runs a test, which has the small battery by other means

DEADLY = "SMALL_BATTERY_DEADLY"  # the experiment that kills whichever worker runs it


def in_worker() -> None:
    """What `run_all.register_suites` does in a worker of Ray's, and then the small battery there."""
    import evaluate
    from weird_gen.persona.suite import Trigger

    evaluate.register("trigger", Trigger)
    if os.environ.get(DRIVER) == str(os.getpid()):
        return
    use(pytest.MonkeyPatch())
    if DEADLY in os.environ:
        from runner import workers

        whole = workers.run_experiment

        def die(engine, plan, *rest):
            if plan.experiment.name == os.environ[DEADLY]:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(engine, plan, *rest)

        workers.run_experiment = die


def _child(argv: list[str], log: Path, stop_at: str | None) -> None:
    import torch

    default_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python has it that was started so
    torch.set_num_threads(1)
    with log.open("w") as f:
        for fd in (1, 2):
            os.dup2(f.fileno(), fd)
    use(pytest.MonkeyPatch())
    os.environ[DRIVER] = str(os.getpid())
    run_all.register_suites = in_worker
    if stop_at:
        _wait_at(stop_at, log.with_suffix(".reached"))
    sys.exit(run_all.main(argv))


def _wait_at(stop_at: str, reached: Path) -> None:
    from runner import batch, results
    from suites.perplexity import Perplexity

    whole, write = batch.run_experiment, results.write_text

    def forever(*args):
        reached.touch()
        while True:
            time.sleep(0.01)

    def measured(engine, plan, *rest):
        if plan.experiment.name == stop_at:
            Perplexity.measure = forever
        return whole(engine, plan, *rest)

    def written(path, text):
        if path.name == stop_at:
            path.with_name(f".{path.name}.{os.getpid()}.partial").write_text(text[: len(text) // 2])
            forever()
        write(path, text)

    batch.run_experiment, results.write_text = measured, written
