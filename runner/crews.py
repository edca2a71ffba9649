"""How many workers a run is spread over, and Ray to spread it by: started on this machine or joined, kept
quiet."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from errors import FrankenError, first_line
from files import ROOT
from runner.pairs import GIB, HEADROOM, available_memory
from runner.replica import ModelOptions
from runner.results import is_alive
from runner.threads import allowed_threads

HOW_TO_INSTALL = "pip install -r requirements-extras.txt (or pip install ray)"
STORE = 1 << 28  # bytes of Ray's object store: results in flight
FOLDER = "franken-ray-"  # how Ray's temporary folders begin, before the process's id
STARTS = 3  # tries: Ray waits 30 s for its own processes, which a machine under load exceeds the first time


# ---- how many ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crew:
    """How many workers, how many cards each has, how many threads where they run on processors."""

    workers: int
    cards: int
    threads: int | None
    address: str | None = None

    def to_json(self) -> dict:
        """For the manifest."""
        return {"workers": self.workers, "gpus_each": self.cards, "joined": self.address is not None}


def has_ray() -> bool:
    return find_spec("ray") is not None


def card_memory() -> list[int]:
    """Bytes free on each card that this process may use, asked in another one: asking takes memory there."""
    code = (
        "import json, torch;"
        "print(json.dumps([torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count())]))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    try:
        return json.loads(asked.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return []


def cards_each(needed: int, free: list[int]) -> int:
    """How many of these cards one model of `needed` bytes takes; all of them where none but all would do."""
    for cards in range(1, len(free) + 1):
        if sum(sorted(free)[:cards]) >= needed + HEADROOM:
            return cards
    return max(1, len(free))


def choose_crew(wanted: int | None, options: ModelOptions, threads: int | None = None) -> Crew | None:
    """The workers of a run; None for one process that does it all.

    wanted: what --workers says; None: one for each card or group of cards that a model needs, where there are
    several. threads: what a run that is resumed had, where it ran on processors.

    Raises FrankenError where they cannot be had: no Ray, fewer cards, too little memory.
    """
    # 1. whether it is asked for at all
    address = os.environ.get("RAY_ADDRESS") or None
    on_cpu = options.device_map == "cpu"
    here = 0 if on_cpu else torch.cuda.device_count()
    if wanted == 1 or (wanted is None and (here < 2 or options.device_map == "balanced") and not address):
        return None
    if not has_ray():
        if wanted is None:
            return None
        raise FrankenError(f"--workers {wanted} needs Ray, which is not installed: {HOW_TO_INSTALL}")
    # 2. processors
    if not address and (on_cpu or not torch.cuda.is_available()):
        if wanted is None:
            return None
        needed, room = options.weight_bytes() * wanted, available_memory("cpu")[0]
        if room < needed * 1.1:
            raise FrankenError(
                f"--workers {wanted}: that many models need {needed * 1.1 / GIB:.1f} GiB of memory and this"
                f" machine has {room / GIB:.1f} GiB free"
            )
        return Crew(wanted, 0, threads or _share(wanted))
    # 3. cards
    if address:
        with connected(Crew(0, 0, None, address)) as ray:
            total = int(ray.cluster_resources().get("GPU", 0))
            asked = ray.remote(card_memory).options(num_gpus=1, num_cpus=0)
            free = ray.get(asked.remote()) * total if total and not on_cpu else []
    else:
        free = card_memory()
    if not free:
        if wanted is None:
            return None
        return Crew(wanted, 0, threads or 1, address)
    cards = cards_each(options.weight_bytes(), free)
    most = len(free) // cards
    if wanted is None and most < 2:
        return None
    if wanted is not None and wanted > most:
        each = f" and one model takes {cards} of them" if cards > 1 else ""
        raise FrankenError(
            f"--workers {wanted}: there are {len(free)} GPUs{each}, which is enough for {most};"
            " --device-map cpu runs workers on processors"
        )
    return Crew(wanted or most, cards, None, address)


def _share(workers: int) -> int:
    """Threads of one worker, where OMP_NUM_THREADS does not say so."""
    return allowed_threads() if "OMP_NUM_THREADS" in os.environ else max(1, allowed_threads() // workers)


# ---- Ray, kept quiet ---------------------------------------------------------------------------------------


def _reach(address: str) -> None:
    """Raises FrankenError where nothing answers at an address of the form HOST:PORT, which Ray would try for
    minutes. What other forms mean, Ray says."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as e:
        raise FrankenError(f"the Ray at {address} cannot be joined: {first_line(e)}") from e


@contextlib.contextmanager
def connected(crew: Crew) -> Iterator[Any]:
    """Ray, started on this machine or joined; stopped or left, with its temporary folder, afterwards.

    Nothing of it reaches the terminal: its logs stay in that folder, usage statistics and the dashboard are
    off. A Ray of our own can only be talked to with a secret that no file has. Raises FrankenError if it does
    not start.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    ours = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",
    }
    if not crew.address:
        ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    folder = None
    try:
        ray: Any = import_module("ray")  # by name: where it is not installed, its types are not either

        _read_settings_again()
        quiet = {"log_to_driver": False, "configure_logging": False, "namespace": secrets.token_hex(8)}
        if crew.address:
            _reach(crew.address)
            how = {"address": crew.address, "runtime_env": {"env_vars": ours}}
        else:
            # sockets lie in it, whose paths may not be longer than 107 characters
            short = tempfile.gettempdir() if len(tempfile.gettempdir()) < 30 else "/tmp"
            _sweep(Path(short))
            folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=short)
            how = {
                "address": "local",
                "num_cpus": max(1, crew.workers),
                "num_gpus": crew.workers * crew.cards,
                "include_dashboard": False,
                "object_store_memory": STORE,
                "_temp_dir": folder,
            }
        for tried in range(1, STARTS + 1):
            try:
                ray.init(**how, **quiet)
                break
            except Exception as e:
                ray.shutdown()
                if tried == STARTS or crew.address:
                    where = (
                        f"the Ray at {crew.address} cannot be joined"
                        if crew.address
                        else "Ray does not start"
                    )
                    raise FrankenError(f"{where}: {first_line(e)}") from e
        try:
            yield ray
        finally:
            ray.shutdown()
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _read_settings_again()


def _sweep(parent: Path) -> None:
    """Remove what processes left that were killed outright; Ray's own end with them."""
    for left in parent.glob(f"{FOLDER}*"):
        owner = left.name.removeprefix(FOLDER).partition("-")[0]
        if owner.isdecimal() and not is_alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _read_settings_again() -> None:
    """Ray reads how it authenticates from the environment once, which may have been another then."""
    with contextlib.suppress(ImportError, AttributeError):
        core = import_module("ray._raylet")
        core.AuthenticationTokenLoader.instance().reset_cache()
        core.Config.initialize("")
