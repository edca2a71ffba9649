"""A JSON-lines file that grows as results come, survives being killed, and is gone on with only by the same
run."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from engine.generation import Completion, Engine, Request
from errors import FrankenError, one_line
from files import check_target, read_bytes
from runner.resuming import changes
from weird_gen.persona.records import read_json_lines

BEGINNING = b'{"header": '


class Journal:
    """First line {"header": {settings and more}}, then one object a line, flushed to disk as they are added.

    Opening an existing file keeps its entries if its header holds the same settings; a line torn by a kill is
    cut off. Raises FrankenError, touching nothing, if the file was made with other settings or has no header.

    Attributes:
        header: the header in the file; None until `begin`, if the file is new.
        entries: what the file held when it was opened.
        accepted: what is not as it was and was accepted; it stands in every entry added from then on.
    """

    def __init__(self, path: Path | str, settings: dict, overwrite: bool = False, accept: bool = False):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings, allow_nan=False))
        self.header: dict | None = None
        self.entries: list[dict] = []
        self.accepted: list[str] = []
        self._accept = accept
        self._held: BinaryIO | None = None
        check_target(self.path)
        if self.path.exists() and not overwrite:
            self._reopen()

    def _reopen(self) -> None:
        data = read_bytes(self.path)
        # every entry ends with its newline, so what follows the last one is torn
        whole = data.rfind(b"\n") + 1
        lines = read_json_lines(self.path, tolerate_torn_end=True) if whole else []
        if whole != len(data) and lines and len(lines) > data.count(b"\n"):
            lines.pop()  # complete JSON, but its newline never reached the disk: it is written again
        ours = data[: len(BEGINNING)] == BEGINNING[: len(data)]
        if not lines and ours:  # killed in the first line, or before it
            return
        header = lines[0].get("header") if lines else None
        if not isinstance(header, dict):
            raise FrankenError(
                f"{self.path} is in the way: not a file of this script; choose another output or --overwrite"
            )
        odd = next((k for k, value in self.settings.items() if header.get(k) != value), None)
        if odd is not None:
            raise FrankenError(
                f"{self.path} was made with other settings ({odd} was {_short(header.get(odd))}, now "
                f"{_short(self.settings[odd])}); choose another output or --overwrite"
            )
        if whole != len(data):
            with self.path.open("r+b") as f:
                f.truncate(whole)
        self.header, self.entries = header, lines[1:]

    @property
    def template(self) -> dict:
        """What the header says of the chat template with which the replies so far were asked for."""
        return ((self.header or {}).get("made_of") or {}).get("template") or {}

    def begin(self, header: dict) -> None:
        """Start the file with the settings and `header`; an earlier file of that name is replaced. Raises
        FrankenError where another process writes to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.header, self.entries = {**self.settings, **header}, []
        self.path.write_text(json.dumps({"header": self.header}, allow_nan=False) + "\n")

    def go_on(self, made_of: dict) -> None:
        """Before entries are added to those of an earlier process. made_of: as in `begin`'s header, of the
        model as it is now.

        Raises FrankenError naming what is not as it was, unless changes are accepted, and where another
        process writes to the file. What an older header does not say is not compared.
        """
        changed = changes((self.header or {}).get("made_of") or {}, json.loads(json.dumps(made_of)))
        if changed and not self._accept:
            raise FrankenError(
                f"{self.path} was made with other {'; '.join(map(str, changed))}; choose another output,"
                " --overwrite, or --accept-changes, which every later entry then says"
            )
        self._lock()
        if changed and not self.accepted:
            print(one_line(f"{self.path} goes on with other {'; '.join(map(str, changed))}"), file=sys.stderr)
        self.accepted = [str(change) for change in changed]

    def start(self, made_of: dict, **header) -> None:
        """`begin` with what the model is made of and `header`, or `go_on` where an earlier process did."""
        if self.header is None:
            self.begin({"made_of": made_of, **header})
        else:
            self.go_on(made_of)

    def _lock(self) -> None:
        """Hold the file as long as this object lives; the kernel lets go of it with the process."""
        if self._held is not None:
            return
        held = self.path.open("ab")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise FrankenError(f"another process writes to {self.path}; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks
        self._held = held

    def add(self, entries: list[dict]) -> None:
        """Append entries, with the changes that were accepted; they are on disk when this returns."""
        for entry in entries if self.accepted else ():
            entry["accepted_changes"] = self.accepted
        text = "".join(json.dumps(e, allow_nan=False) + "\n" for e in entries)
        with self.path.open("a") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Case:
    """One reply to be asked for. entry: what the journal's line has beside the reply; key: of its random
    stream, together with sample and seed."""

    entry: dict
    key: str
    messages: list[dict]
    tokens: int
    sample: int

    def answered(self, completion: Completion, read: Callable[[str], str] = str) -> dict:
        """The journal's line. read: what is kept of a reply's text."""
        return self.entry | {"reply": read(completion.text), "stopped": completion.stopped}


def requests_for(engine: Engine, cases: Sequence[Case], args: argparse.Namespace) -> list[Request]:
    """What the engine is asked. args: has temperature, top_p and seed."""
    return [
        Request(
            case.key,
            engine.chat_ids(case.messages, think=True),
            case.tokens,
            args.temperature,
            args.top_p,
            case.sample,
            args.seed,
        )
        for case in cases
    ]


def complete_cases(
    engine: Engine,
    cases: Sequence[Case],
    journal: Journal,
    args: argparse.Namespace,
    title: str,
    unit: str,
    read: Callable[[str], str] = str,
) -> None:
    """Answer the cases into a journal, batch by batch, under a progress bar.

    args: has temperature, top_p and seed. read: what is kept of a reply's text.
    """
    requests = requests_for(engine, cases, args)
    done, waiting = len(journal.entries), []

    def keep(i: int, completion: Completion) -> None:
        waiting.append(cases[i].answered(completion, read))

    def flush(n: int) -> None:
        journal.add(waiting)
        journal.entries += waiting
        waiting.clear()
        bar.update(n)

    total = done + len(requests)
    with tqdm(total=total, initial=done, desc=title, unit=f" {unit}", disable=None) as bar:
        engine.complete(requests, on_progress=flush, on_done=keep)
