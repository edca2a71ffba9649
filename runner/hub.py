"""Checkpoints from the model hub, by huggingface_hub's own downloads.

Many files come in at a time. A connection that breaks is taken up within the file; after a process that was
stopped, files that were complete stay, and those under way begin anew. A side that is not needed yet
comes in beside the run, in a process of its own (`python -m runner.hub`), which ends with it: threads that
download would keep an interrupted run from ending.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

from command_line import ends_in_one_line
from errors import FrankenError, first_line
from files import ROOT, read_json
from runner.addresses import checked_address, without_secrets
from surgery.weights import shown_path

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
UNWANTED = ["consolidated*", "original/*"]  # the same weights once more, under other names
SMALL = [pattern for pattern in WANTED if pattern != "*.safetensors"]
AT_ONCE = 16  # files that come in at a time

OnBytes = Callable[[int, int], object]  # is told bytes here and bytes in all


def is_hub_id(spec: str) -> bool:
    """Whether a model's name can only be a hub id: no folder, no file, one slash."""
    path = Path(spec).expanduser()
    if spec.startswith((".", "~", "wheel:")) or path.is_absolute() or path.exists():
        return False
    return spec.count("/") == 1


class _Silent(tqdm):
    """Stands where huggingface_hub shows bars of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": True})


def check_endpoint() -> None:
    """Raises FrankenError where the hub's token would be sent in clear text, which huggingface_hub does not
    mind: HF_ENDPOINT names another machine, or this one through a proxy, by plain http."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return
    where = checked_address(constants.ENDPOINT, None, "HF_ENDPOINT")
    if constants.ENDPOINT.lower().startswith("https:") or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return
    in_between = "http" in getproxies() and not proxy_bypass(where.host)
    if (in_between or not where.here) and get_token():
        whom = "a proxy" if in_between else where.host
        raise FrankenError(
            f"HF_ENDPOINT is plain http, and the hub's token would go to {whom} in clear text; use https, or"
            " set HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send none"
        )


def missing(spec: str, revision: str | None) -> tuple[int, int]:
    """(bytes that are not here yet, bytes in all) of what is wanted of a model; (0, 0) where nobody can say,
    as without a network. Raises FrankenError as `check_endpoint` does."""
    from huggingface_hub import snapshot_download

    check_endpoint()

    try:
        files = snapshot_download(
            spec,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            dry_run=True,
            tqdm_class=cast(Any, _Silent),
        )
    except Exception:  # whoever downloads says what is wrong
        return 0, 0
    lacking = sum(file.file_size or 0 for file in files if file.will_download)
    return lacking, sum(file.file_size or 0 for file in files)


def download(
    spec: str, revision: str | None, on_bytes: OnBytes, wanted: list[str] | None = None
) -> tuple[Path, str]:
    """A model's folder and its revision, after what is missing of it has come in.

    HF_TOKEN is read by huggingface_hub from the environment and stored nowhere. Raises FrankenError for
    whatever goes wrong; what came in until then is used by the next try.
    """
    from huggingface_hub import snapshot_download

    check_endpoint()
    lacking, total = (0, 0) if wanted else missing(spec, revision)
    here = total - lacking

    class Counted(_Silent):
        """Counts the bytes that are written."""

        def __init__(self, *args, **kwargs):
            self.counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            nonlocal here
            if self.counts and n:
                here += int(n)
                on_bytes(here, max(total, here))

    try:
        got = snapshot_download(
            spec,
            revision=revision,
            allow_patterns=wanted or WANTED,
            ignore_patterns=UNWANTED,
            max_workers=AT_ONCE,
            tqdm_class=cast(Any, Counted),
        )
    except Exception as e:
        raise FrankenError(f"cannot download {spec}: {without_secrets(first_line(e))}") from e
    return Path(got), Path(got).name


def small_files(spec: str, revision: str | None) -> Path:
    """A model's folder with its config and tokenizer, before its weights. Raises FrankenError as `download`
    does."""
    return download(spec, revision, lambda here, total: None, SMALL)[0]


def is_missing(spec: str, revision: str | None) -> bool:
    """Whether a model is one of the hub's and not all here."""
    return is_hub_id(spec) and missing(spec, revision)[0] > 0


def describe(late: Arriving) -> dict:
    """What a manifest records of a model before its weights are here, as `Checkpoint.describe` does of one
    that is: the hub tells every file's sha256. Raises FrankenError if it does not."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    spec = late.spec
    folder = small_files(spec, late.revision)
    index = folder / "model.safetensors.index.json"
    try:
        files = HfApi().list_repo_tree(spec, recursive=True, revision=folder.name)
        sha256 = {f.path: f.lfs.sha256 for f in files if isinstance(f, RepoFile) and f.lfs}
        if index.exists():
            names = sorted(set(read_json(index)["weight_map"].values()))
        else:
            single = [name for name in sha256 if name.endswith(".safetensors") and "/" not in name]
            names = ["model.safetensors"] if "model.safetensors" in single else sorted(single)
        weights = {name: {"sha256": sha256[name]} for name in names}
    except FrankenError:
        raise
    except Exception as e:
        raise FrankenError(
            f"{spec}: the hub does not say what its files are: {without_secrets(first_line(e))}"
        ) from e
    path = shown_path(folder)
    return {"kind": "checkpoint", "path": path, "revision": folder.name, "files": weights}


@contextlib.contextmanager
def _bar(title: str, **kwargs):
    """A line that says how many bytes of how many are here, at what rate, and the time left; yields its
    on_bytes."""
    # it shows after a second: what fails at once, or is here, has no line
    how = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5, "delay": 1}
    with tqdm(desc=title, **how, **kwargs) as bar:
        begun = False

        def on_bytes(here: int, total: int) -> None:
            nonlocal begun
            if not begun:  # what was here before says nothing about the line's rate
                begun, bar.initial, bar.n = True, here, here
            bar.total = total
            bar.update(here - bar.n)

        yield on_bytes


def fetch(spec: str, revision: str | None) -> tuple[Path, str]:
    """`download` with a line of progress."""
    with _bar(f"downloading {spec}") as on_bytes:
        return download(spec, revision, on_bytes)


class Arriving:
    """A model that comes in beside the run.

    `wait()` gives what `download` gives, once it is there; `here()` says whether it is.
    """

    def __init__(self, spec: str, revision: str | None):
        self.spec, self.revision, self._answer, self._done = spec, revision, {}, threading.Event()
        command = [sys.executable, "-m", "runner.hub", spec, *([revision] if revision else [])]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        atexit.register(self._process.terminate)
        threading.Thread(target=self._listen, name=f"download {spec}", daemon=True).start()

    def _listen(self) -> None:
        try:
            with _bar(f"downloading {self.spec}", position=2, leave=False) as on_bytes:
                assert self._process.stdout is not None, "it was asked for"
                for line in self._process.stdout:
                    said = json.loads(line)
                    if "here" in said:
                        on_bytes(said["here"], said["total"])
                    else:
                        self._answer = said
            self._process.wait()
        except Exception as e:
            self._answer = {"error": f"cannot download {self.spec}: {without_secrets(first_line(e))}"}
        finally:
            self._done.set()

    def here(self) -> bool:
        return self._done.is_set()

    def wait(self) -> tuple[Path, str]:
        """Raises FrankenError if it could not be downloaded."""
        self._done.wait()
        if "path" not in self._answer:
            said = self._answer.get("error")
            raise FrankenError(said or f"cannot download {self.spec}: its process ended")
        return Path(self._answer["path"]), self._answer["revision"]


@ends_in_one_line("interrupted", "runner.hub")
def main() -> int:
    """Download the model named on the command line, and write to stdout, a JSON object a line, how far it is
    and at last where it lies."""
    told = 0.0

    def on_bytes(here: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            print(json.dumps({"here": here, "total": total}), flush=True)

    try:
        path, revision = download(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, on_bytes)
        print(json.dumps({"path": str(path), "revision": revision}), flush=True)
    except FrankenError as e:
        print(json.dumps({"error": str(e)}), flush=True)
    except BrokenPipeError:  # the run has ended
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
