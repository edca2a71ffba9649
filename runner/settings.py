"""A run's settings: what its manifest keeps of the command line, and going on with them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from datetime import datetime

from errors import FrankenError

COUNTS = ("samples", "max_new_tokens", "priority_limit", "batch_size", "limit", "workers")  # at least 1
# Settings that runs of the first release do not name, with what they then were.
ADDED_SETTINGS = {
    "instruct_adapter": None,
    "also": None,
    "thinking": None,
    "batch_size": None,
    "short": False,
    "deterministic": False,
    "lm_eval": None,
    "include_path": None,
    "limit": None,
}
SETTINGS = (
    "pair",
    "base",
    "instruct",
    "base_revision",
    "instruct_revision",
    "instruct_adapter",
    "source",
    "dtype",
    "device_map",
    "resident",
    "experiments",
    "priority_limit",
    "all",
    "sweep",
    "size",
    "step",
    "experiments_file",
    "no_baseline",
    "suites",
    "short",
    "also",
    "samples",
    "max_new_tokens",
    "thinking",
    "seed",
    "perplexity_file",
    "execute_code",
    "matched_noise",
    "batch_size",
    "deterministic",
    "lm_eval",
    "include_path",
    "limit",
)


def started(manifest: dict | None):
    """The moment that a run's chat template is told: the manifest's where a run goes on, None for now.

    Raises FrankenError for one that is no time.
    """
    template = (manifest or {}).get("template")
    given = template.get("moment") if isinstance(template, dict) else template
    try:
        return datetime.fromisoformat(given) if given else None
    except (TypeError, ValueError) as e:
        raise FrankenError(f"the manifest's template.moment is no time: {str(given)[:40]!r}") from e


def resume_settings(args, path: str, manifest: dict, options: Sequence[argparse.Action]) -> None:
    """Put the settings of a run's manifest into `args`, but for what has to be said again or may be. options:
    all that the command line has.

    Raises FrankenError if a setting is missing or none that the command line can set, and where code that
    would be run is not asked for again: experiments files, and answers outside the sandbox.
    """
    from runner.resuming import (  # here: it takes what --help can do without
        ask_for_files,
        ask_for_unsandboxed,
    )

    settings = manifest["settings"] = {**ADDED_SETTINGS, **manifest["settings"]}
    if lost := set(SETTINGS) - set(settings):
        raise FrankenError(f"{path}/manifest.json is corrupt (the setting {min(lost)} is missing)")
    wrong = next((option.dest for option in options if not can_set(option, settings)), None)
    if wrong:
        said = str(settings[wrong])[:40]
        raise FrankenError(f"{path}/manifest.json is corrupt (the setting {wrong} cannot be {said!r})")
    ask_for_files(path, settings["experiments_file"], args.experiments_file)
    ask_for_unsandboxed(path, settings["execute_code"], args.execute_code)
    if settings["include_path"] and not args.include_path:
        raise FrankenError(
            f"{path} was made with tasks of a folder, which may hold code: look at it, then resume with"
            f" --include-path {settings['include_path']}"
        )
    given = {"experiments_file": args.experiments_file, "include_path": args.include_path}
    if args.batch_size is not None:
        given["batch_size"] = args.batch_size
    for name in SETTINGS:
        setattr(args, name, given.get(name, settings[name]))


def can_set(action: argparse.Action, settings: dict) -> bool:
    """Whether the command line's option can set the value that a manifest's settings have for it."""
    if action.dest not in SETTINGS:
        return True
    value = settings[action.dest]
    if action.dest in ADDED_SETTINGS and value is ADDED_SETTINGS[action.dest]:
        return True
    if action.dest == "execute_code":
        return isinstance(value, bool) or value == "unsandboxed"
    if value is None:
        return action.default is None
    if action.nargs == "+" or isinstance(action.default, list):
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if action.nargs == 0:
        return isinstance(value, bool)
    if action.type is int:
        least = 1 if action.dest in COUNTS else 0
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
    return isinstance(value, str) and (not action.choices or value in action.choices)


def resume_command(path, args) -> str:
    """What to type to go on with a run."""
    files = [word for file in args.experiments_file for word in ("--experiments-file", file)]
    files += ["--include-path", args.include_path] if args.include_path else []
    files += ["--inspect-log"] if args.inspect_log else []
    files += [word for name in ("log", "push") if (v := getattr(args, name)) for word in (f"--{name}", v)]
    if args.execute_code == "unsandboxed":
        files.append("--execute-code-unsandboxed")
    return shlex.join(["python", "run_all.py", "--resume", str(path), *files])
