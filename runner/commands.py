"""What can be done with one modified model outside a run: `python franken.py export | mergekit | chat`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import experiments as ex
from command_line import (
    DefaultsThatSay,
    Parser,
    add_model,
    ended_by_signals,
    ends_in_one_line,
    refuse_empty,
)
from errors import FrankenError, RecipeError, printable
from files import check_open_files, check_target, read_json, write_text
from planning import mergekit
from runner.choosing import (
    extra_sources,
    known_experiments,
    known_sources,
    local_depth,
    name_models,
    refuse_models,
)
from runner.exportable import SHARD_BYTES, Chosen, check_folder, refuse_inexpressible
from runner.known_pairs import choose_pair
from surgery.recipes import Recipe, describe_change, identity

if TYPE_CHECKING:
    import torch

    from runner.pairs import Located

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# torch, and what needs it, is imported by each command once all that can be refused without it is: a typo is
# told at once.


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="franken.py",
        description="Take one modified model out of the harness.",
        formatter_class=DefaultsThatSay,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what, formatter_class=DefaultsThatSay)
        _add_experiment(made)
        add_model(made.add_argument_group("model"))
        return made

    export = command("export", "Write a modified model as a Hugging Face checkpoint.")
    export.add_argument("folder", metavar="DIR", help="where the checkpoint goes; it must not hold anything")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    export.add_argument(
        "--max-shard-size",
        type=_size,
        default=SHARD_BYTES,
        metavar="BYTES",
        help="of one file, as 5GB or 500MB",
    )
    chat = command("chat", "Talk to a modified model at the terminal; /help there says what can be typed.")
    chat.add_argument("--max-new-tokens", type=int, default=400, help="of a reply")
    chat.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    yaml = command("mergekit", "Print a recipe as mergekit's YAML, or refuse it by name.")
    yaml.add_argument("--output", metavar="FILE", help="write it there")
    return p


def _add_experiment(p) -> None:
    p.add_argument(
        "name",
        metavar="NAME",
        help="an experiment (`python run_all.py --list`), or the .json of one that a run has measured",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--experiments-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file with EXPERIMENTS, which is run, or mergekit's YAML",
    )
    p.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KIND",
        help="where NAME is of a sweep; as in run_all.py",
    )
    p.add_argument("--size", metavar="N[,N...]", help="as in run_all.py")
    p.add_argument("--step", metavar="N", help="as in run_all.py")


def _size(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}
    digits = text.rstrip("KMGBkmgb")
    unit = text[len(digits) :].upper()
    if not digits.isdecimal() or int(digits) < 1 or unit not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB")
    return int(digits) * units[unit]


@ends_in_one_line("interrupted", "franken.py")
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    commands = {"export": export, "mergekit": as_mergekit, "chat": chat}
    check_open_files()
    refuse_empty(args)
    try:
        with ended_by_signals():
            return commands[args.command](args)
    except KeyboardInterrupt:
        if args.command == "chat":
            raise
        raise KeyboardInterrupt(f"interrupted; nothing is left of the {args.command}") from None


# ---- which experiment, on which model ----------------------------------------------------------------------


def chosen(args, layers: int) -> Chosen:
    """The experiment that is named, for a model of this depth.

    Raises FrankenError for an unknown name, and for a result whose recipe is of another depth's model.
    """
    if args.name.endswith(".json"):
        return _measured(args.name, layers)
    experiments = {e.name: e for part in known_experiments(args, layers) for e in part}
    experiment = ex.select([args.name], list(experiments.values()))[0]
    plan = experiment.plan(layers, args.seed, args.models)
    return Chosen(
        args.name, plan.recipe, plan.change, experiment.hypothesis, experiment.suites, experiment.control
    )


def _measured(path: str, layers: int) -> Chosen:
    """The recipe that a run's result holds: noise twins have no other name."""
    data = read_json(Path(path))
    try:
        entry = data["experiment"]
        name, recipe = str(entry["name"]), Recipe.from_json(entry["recipe"])
    except (KeyError, TypeError, RecipeError) as e:
        raise FrankenError(f"{path} is no experiment's result: {e!r}") from e
    if any(ref.layer >= layers for slot in recipe.slots for ref, _ in slot.mix):
        raise FrankenError(f"{path}: its recipe is of a deeper model than these {layers} layers")
    change = describe_change(recipe, identity(layers))
    return Chosen(name, recipe, change, str(entry.get("hypothesis") or ""), None, entry.get("control"))


def refused_beforehand(args, refuse) -> None:
    """Look at the experiment before anything is downloaded or loaded; `refuse(chosen)` raises FrankenError.

    Where the depth is not known yet, it is looked at as it is on 64 layers.
    """
    pair = choose_pair(args.pair, args.base, args.instruct)
    name_models(args, pair)
    refuse_models(args, pair)
    depth = pair.layers or local_depth(args)
    what = None
    if depth is not None:
        what = chosen(args, depth)
    elif not args.name.endswith(".json"):
        experiments = {e.name: e for part in known_experiments(args, 1) for e in part}
        if not args.sweep:
            ex.select([args.name], list(experiments.values()))
        with contextlib.suppress(FrankenError):  # a recipe may fit the model's depth alone
            what = chosen(args, ex.PUBLISHED_DEPTH)
    if what is None:
        return
    if lacking := what.recipe.sources - known_sources(args, pair):
        side = "--base" if lacking == {"base"} else "--source"
        raise FrankenError(
            f"{what.name} takes layers from {', '.join(sorted(lacking))}, which is not there; see {side}"
        )
    refuse(what)


def located(args) -> Located:
    """The sources that the command line names, on disk."""
    from runner.pairs import open_sources

    return open_sources(
        choose_pair(args.pair, args.base, args.instruct),
        args.base_revision,
        args.instruct_revision,
        extra_sources(args.source),
        args.instruct_adapter,
    )


# ---- the commands ------------------------------------------------------------------------------------------


def export(args) -> int:
    """Write a checkpoint; what cannot be one is refused before anything is loaded."""
    folder = Path(args.folder)
    check_folder(folder, args.overwrite)
    refused_beforehand(args, lambda c: refuse_inexpressible(c.name, c.recipe, c.suites, c.control))
    import torch

    from runner.export import Exporter
    from runner.manifest import commit, versions
    from runner.pairs import GIB, pick_dtype
    from runner.threads import set_threads

    set_threads()
    sources = located(args)
    what = chosen(args, len(sources.sources["instruct"].layers))
    refuse_inexpressible(what.name, what.recipe, what.suites, what.control)
    device = "cuda" if torch.cuda.is_available() and args.device_map != "cpu" else "cpu"
    exporter = Exporter(
        sources,
        None if args.dtype == "auto" else pick_dtype(args.dtype, device),
        pick_dtype("auto", device),
        torch.device(device),
    )
    provenance = {
        "command": ["franken.py", *("DIR" if word == args.folder else word for word in args.words)],
        "seed": args.seed,
        "device": device,
        "commit": commit(),
        "versions": versions(),
    }
    for note in sources.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    with contextlib.suppress(FrankenError):  # where mergekit has no words for it
        provenance["mergekit"] = mergekit_yaml(sources, what.recipe, exporter.pick_dtype(what.recipe))
    done = exporter.write(what, folder, args.overwrite, args.max_shard_size, provenance)
    print(
        printable(
            f"{what.name} is in {done.folder}: {len(what.recipe)} layers, {done.bytes / GIB:.2f} GiB in"
            f" {done.files} file{'s' if done.files > 1 else ''}, {str(done.dtype).removeprefix('torch.')},"
            f" fingerprint {done.fingerprint}"
        )
    )
    return 0


HUB_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)$")


def mergekit_yaml(sources: Located, recipe: Recipe, dtype: torch.dtype) -> str:
    """The recipe for mergekit: models of the hub by their ids, others by their folders.

    Raises FrankenError naming what mergekit does not do.
    """
    from surgery.weights import Checkpoint

    models, layers = {}, {}
    for name, source in sources.sources.items():
        if not isinstance(source, Checkpoint):
            continue
        path = str(source.path.absolute())
        hub = HUB_SNAPSHOT.search(path)
        models[name] = f"{hub['owner']}/{hub['name']}@{hub['revision']}" if hub else path
        layers[name] = len(source.layers)
        if not hub and ("+" in path or "@" in path):
            raise FrankenError(f"mergekit cannot name the folder {path}: + and @ mean something to it")
    return mergekit.to_yaml(recipe, models, layers, str(dtype).removeprefix("torch."))


def as_mergekit(args) -> int:
    """Print the YAML; no weights are read but what a first conversion of the pair needs."""
    if args.output is not None:
        check_target(args.output)
    refused_beforehand(args, lambda c: refuse_inexpressible(c.name, c.recipe, c.suites, c.control))
    import torch

    from runner.pairs import pick_dtype

    sources = located(args)
    what = chosen(args, len(sources.sources["instruct"].layers))
    dtype = pick_dtype(args.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype == "auto":
        dtype = next(iter(sources.sources["instruct"].layers[0].values())).dtype
    try:
        text = mergekit_yaml(sources, what.recipe, dtype)
    except FrankenError as e:
        raise FrankenError(f"{what.name} cannot be written for mergekit: {e}") from e
    if args.output is not None:
        write_text(Path(args.output), text)
    else:
        print(printable(text), end="")
    return 0


def chat(args) -> int:
    """Talk to the model; what cannot be applied is refused before it is loaded."""
    if args.max_new_tokens < 1 or not 0 <= args.temperature <= 100:
        raise FrankenError("a reply has at least one token, and a temperature from 0 to 100")
    refused_beforehand(args, lambda c: None)
    from engine.generation import Engine
    from runner.chat import Chat, talk
    from runner.pairs import open_pair
    from runner.threads import set_threads

    set_threads()
    opened = open_pair(
        args.pair,
        args.base,
        args.instruct,
        args.base_revision,
        args.instruct_revision,
        extra_sources(args.source),
        args.dtype,
        args.device_map,
        args.resident,
        args.instruct_adapter,
    )
    for note in opened.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    engine = Engine(opened.live, opened.tokenizer, opened.stop_ids)
    layers = len(opened.live.original)
    talking = Chat(
        engine,
        lambda name: chosen(argparse.Namespace(**(vars(args) | {"name": name})), layers),
        args.max_new_tokens,
        args.temperature,
        args.seed,
    )
    if args.name != ex.BASELINE:
        talking.apply(ex.BASELINE)  # what /undo goes back to
    print(printable(talking.apply(args.name)), file=sys.stderr)
    return talk(talking)
