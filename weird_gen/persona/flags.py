"""Options that several commands of the second study have."""

from __future__ import annotations

import argparse
from pathlib import Path

from weird_gen.persona.folders import RESULTS
from weird_gen.persona.study import DEFAULT_ADAPTER, DEFAULT_MODEL


def positive(text: str) -> int:
    """A count on the command line: 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_model(flags: argparse.ArgumentParser, adapter: str | None = None) -> None:
    """--model, and --adapter with this help where a command takes one."""
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id")
    if adapter:
        flags.add_argument("--adapter", default=DEFAULT_ADAPTER, help=adapter)


def add_sampling(flags: argparse.ArgumentParser, what: str, top_p: float = 0.95) -> None:
    """The options of every command that has a model answer into a journal. what: "replies" or "answers"."""
    flags.add_argument("--temperature", type=float, default=1.0)
    flags.add_argument("--top-p", type=float, default=top_p)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--batch-size", type=positive, help=f"{what} at a time; default by device")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "balanced"))
    flags.add_argument("--eager", action="store_true", help="no CUDA graphs")
    flags.add_argument(
        "--overwrite", action="store_true", help=f"start afresh where an earlier run left {what}"
    )
    flags.add_argument(
        "--accept-changes",
        action="store_true",
        help=f"go on although the model, its template or the code is not as it was; all later {what} say so",
    )


def add_folders(flags: argparse.ArgumentParser, what: str) -> None:
    """--results-dir, which has `what` (such as "replies"), and --report-dir; see `report_folder`."""
    flags.add_argument("--results-dir", type=Path, default=RESULTS, help=f"where the {what} are")
    flags.add_argument(
        "--report-dir", type=Path, help="where reports go; default: report/ in the results folder"
    )


def report_folder(args: argparse.Namespace) -> Path:
    return args.report_dir or args.results_dir / "report"
