#!/usr/bin/env python3
"""Run surgeries on a model pair and ask every resulting model the same questions. `--help` lists the
options."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys

from command_line import (
    DefaultsThatSay,
    Parser,
    add_model,
    ended_by_signals,
    ends_in_one_line,
    importing,
    refuse_empty,
)
from errors import FrankenError, first_line, many, printable
from files import check_open_files
from runner.settings import COUNTS, SETTINGS, resume_command, resume_settings, started

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

DESCRIPTION = "Frankenmodel: change a model's weights and ask whether it can tell."


def _add_choice(what) -> None:
    """Which experiments are run."""
    what.add_argument("--experiments", nargs="+", metavar="NAME", help="these experiments, in this order")
    what.add_argument(
        "--priority-limit",
        type=int,
        metavar="N",
        help="the N experiments of highest priority (6 if nothing is chosen); see --short",
    )
    what.add_argument("--all", action="store_true", help="all named experiments")
    what.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KIND",
        help=(
            "window (base layers, see --size), replace (one layer by the base's), delete or double (single"
            " layers, or blocks of --size), repeat (every block [start, stop) on a grid of --step once more),"
            " parallel (blocks side by side), noise, blend (doses on all layers); repeatable"
        ),
    )
    what.add_argument(
        "--size",
        metavar="N[,N...]",
        help=(
            "layers in a block of --sweep window or parallel (4 if not given), delete or double (1), repeat"
            " (any)"
        ),
    )
    what.add_argument(
        "--step",
        metavar="N",
        help="layers from one block to the next (its size if not given); --sweep repeat: of the grid (4)",
    )
    what.add_argument(
        "--matched-noise",
        action="store_true",
        help=(
            "for every experiment that raises perplexity by more than 1%%, also NAME__matched_noise: noise"
            " tuned to the same perplexity"
        ),
    )
    what.add_argument(
        "--experiments-file",
        action="append",
        default=[],
        metavar="FILE",
        help=(
            "a Python file with EXPERIMENTS = [Experiment(...), ...], which is run; or a mergekit"
            " configuration (.yaml: passthrough, linear, slerp), which is read"
        ),
    )
    what.add_argument(
        "--no-baseline",
        action="store_true",
        help="do not add baseline_instruct, against which shifts are measured",
    )


def _add_questions(what) -> None:
    """What they are asked."""
    what.add_argument(
        "--suites",
        help=(
            "introspection, capability, perplexity, chat, trigger, quick (binary, perplexity), short (quick,"
            " informed), all, or single suites; comma-separated. If not given: placebos and sweeps quick, the"
            " injection its own, everything else all"
        ),
    )
    what.add_argument(
        "--short",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=(
            "ask only how something is noticed, in words and by Yes or No, and perplexity; default: on a CPU,"
            " where experiments are chosen by priority alone"
        ),
    )
    what.add_argument(
        "--also",
        metavar="SUITES",
        help=(
            "ask every experiment these suites besides, where they can be asked: phases (one model begins a"
            " conversation, the other answers it; same depth only), activations"
        ),
    )
    what.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help=(
            "ask every experiment these tasks of EleutherAI's lm-evaluation-harness besides, comma-separated"
            " (needs lm-eval)"
        ),
    )
    what.add_argument(
        "--include-path", metavar="DIR", help="with --lm-eval: a folder of further tasks, which may be code"
    )
    what.add_argument("--limit", type=int, metavar="N", help="with --lm-eval: documents of each task at most")
    what.add_argument("--samples", type=int, default=1, help="replies per free-text probe")
    what.add_argument("--max-new-tokens", type=int, default=80, help="budget of a free-text reply")
    what.add_argument(
        "--thinking",
        choices=("off", "on"),
        default="off",
        help="on: a model that can think before it answers does so in its replies",
    )
    what.add_argument("--seed", type=int, default=0)
    what.add_argument(
        "--perplexity-file", help="measure perplexity on this UTF-8 text instead of the built-in ones"
    )
    code = what.add_mutually_exclusive_group()
    code.add_argument(
        "--execute-code",
        action="store_true",
        help=(
            "run code answers instead of only parsing them, in bubblewrap: no other process, no network, no"
            " file but the interpreter's and the system's, nothing to write to; without bubblewrap it is"
            " refused"
        ),
    )
    code.add_argument(
        "--execute-code-unsandboxed",
        action="store_const",
        const="unsandboxed",
        dest="execute_code",
        help=(
            "run code answers in a process with limits alone: keeps off mistakes, not code written to escape,"
            " which can end or slow any process of yours"
        ),
    )


def _add_run(run) -> None:
    run.add_argument("--output", default="results", help="a folder run_<time> is made in it")
    run.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with an interrupted run; its settings are taken from its manifest",
    )
    run.add_argument(
        "--accept-changes",
        action="store_true",
        help=(
            "with --resume: go on although something that numbers depend on (weights, tokenizer, batch size,"
            " code, ...) is not as it was; every later result says so"
        ),
    )
    run.add_argument(
        "--batch-size", type=int, help="most rows decoded at once; shrinks by itself when memory is short"
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="replies that no batch changes, to the bit: slower, --batch-size has no effect",
    )
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=(
            "spread the experiments over N loaded models, by Ray: on this machine, or on those that"
            " RAY_ADDRESS joins. If not given: one for each GPU or group of GPUs that the model needs, where"
            " there are several and Ray is installed; 1: one process without Ray"
        ),
    )
    run.add_argument(
        "--inspect-log",
        action="store_true",
        help="also write each experiment as a log of Inspect, inspect/NAME.eval (needs inspect-ai)",
    )
    run.add_argument(
        "--log",
        choices=("trackio", "wandb", "tensorboard"),
        help="also send each experiment's numbers, and the verdicts at the end, to a tracker (needs it)",
    )
    run.add_argument(
        "--push",
        metavar="USER/NAME",
        help="also send the run's folder to a dataset repository of the model hub after every experiment"
        " (HF_TOKEN; made private where it is new)",
    )
    run.add_argument("--list", action="store_true", help="list the experiments and exit")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="what would run, what moves, memory and time estimates; loads and downloads nothing",
    )
    run.add_argument(
        "--for",
        dest="machine",
        metavar="MACHINE",
        help="with --dry-run: plan for another machine, h200-141gb, h100-80gb, a100-80gb, 2x40gb, ...",
    )


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=DESCRIPTION, formatter_class=DefaultsThatSay)
    add_model(p.add_argument_group("model"))
    what = p.add_argument_group("what to run")
    _add_choice(what)
    _add_questions(what)
    _add_run(p.add_argument_group("the run"))
    return p


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = make_parser()
    args = p.parse_args(argv)
    if args.machine and not args.dry_run:
        p.error("--for plans for another machine: it goes with --dry-run")
    for name in COUNTS:
        if (value := getattr(args, name)) is not None and not 1 <= value < 2**31:
            p.error(f"--{name.replace('_', '-')} must be at least 1, and below 2^31")
    if not 0 <= args.seed < 2**63:
        p.error("--seed must be at least 0 and below 2^63")
    return args


def register_suites() -> None:
    """Offer the suites of studies that stand above `evaluate`."""
    import evaluate
    from weird_gen.persona.suite import Trigger

    evaluate.register("trigger", Trigger)


@ends_in_one_line("interrupted before any experiment began")
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if not first_of_many(args):
            return 0
        check_open_files()
        refuse_empty(args)
        if args.accept_changes and not args.resume:
            raise FrankenError("--accept-changes goes with --resume")
        if args.list:
            return list_experiments(args)
        if args.resume and args.dry_run:
            raise FrankenError("--dry-run plans a new run; --resume takes its settings from an old one")
        if args.dry_run:
            return plan(args)
        return execute(args)
    except BrokenPipeError:  # `--list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if run := getattr(args, "begun", None):
            words = f"interrupted; go on with: {resume_command(run, args)}"
            raise KeyboardInterrupt(words) from None
        raise


# What `torchrun` and `accelerate launch` tell the processes that they start, and libraries within them.
LAUNCHED = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(ACCELERATE|FSDP|TORCHELASTIC)_\w+)"
)


def first_of_many(args) -> bool:
    """Whether this process is to do the run: of several that `torchrun` or `accelerate launch` started, the
    first one, which spreads the work itself. What they say to libraries is taken back.

    Raises FrankenError where they are on several machines.
    """
    world, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if world > 1 and world != _number("LOCAL_WORLD_SIZE", 0):
        raise FrankenError(
            "processes on several machines do not share a run: type `ray start --head` on one machine, `ray"
            " start --address=THAT_MACHINE:6379` on the others, then RAY_ADDRESS=THAT_MACHINE:6379 python"
            f" run_all.py --workers {world} ..."
        )
    if world > 1 and rank:
        return False
    for name in filter(LAUNCHED.fullmatch, list(os.environ)):
        del os.environ[name]
    if world < 2:
        return True
    if args.workers is None and args.device_map == "cpu":
        args.workers = world
    print(
        f"note: this is 1 of {world} processes, and the one that does the run; `python run_all.py --workers"
        " N` does the same without a launcher",
        file=sys.stderr,
    )
    return True


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default


def list_experiments(args) -> int:
    """Print all that has a name, in order of priority; with --sweep also its experiments, at the pair's
    depth."""
    from runner.choosing import known_experiments, local_depth, sweep_windows
    from runner.known_pairs import choose_pair

    sweep_windows(args)
    layers = 1
    if args.sweep:  # only a sweep depends on the depth
        layers = choose_pair(args.pair, args.base, args.instruct).layers or local_depth(args)
    if layers is None:
        from runner.estimate import model_shape  # here: it takes seconds

        layers = model_shape(args)[0]
    known = known_experiments(args, layers)
    for k, e in enumerate([e for part in known for e in part], 1):
        print(printable(f"{k:3} {e.name:32} {e.group:12} {e.control or '-':10} {e.hypothesis}"))
    return 0


def followers_of(args):
    """What --log, --push and --inspect-log ask for. Raises FrankenError before anything is loaded."""
    from reporting.followers import Follower, Followers, Hub, Tracker
    from reporting.inspect_log import InspectLogs

    made: list[Follower] = [InspectLogs()] if args.inspect_log else []
    made += [Tracker(args.log)] if args.log else []
    made += [Hub(args.push)] if args.push else []  # last: it sends what the others wrote
    return Followers(made)


def plan(args) -> int:
    """Print the plan that --dry-run asks for."""
    from runner.choosing import refuse_at_once
    from runner.known_pairs import choose_pair
    from runner.machines import machine

    if args.machine:
        machine(args.machine)
    suites = refuse_at_once(args, choose_pair(args.pair, args.base, args.instruct))
    from runner.estimate import dry_run  # here: torch takes seconds to import, a typo is told at once

    register_suites()
    return dry_run(args, suites)


def execute(args) -> int:
    from datetime import datetime

    from questions import sandbox
    from runner import resuming
    from runner.choosing import refuse_at_once
    from runner.known_pairs import PAIRS, choose_pair
    from runner.results import Run, check_writable, write_json

    # 1. what is asked, of a new run or one to go on with, and whether it can be done; without torch, which
    # takes seconds to import: a typo is told at once
    run = manifest = None
    then, changed = {}, []
    if args.resume:
        run, manifest = Run.resume(args.resume)
        run.refuse_packed()
        with run.alone():  # told before a second model is loaded beside the first; held once this one is
            pass
        resume_settings(args, args.resume, manifest, make_parser()._actions)
        then = resuming.recorded(manifest)
    depends_on = resuming.known_before(args)
    changed += resuming.changes(then, depends_on)
    resuming.refuse(args.resume, changed, args.accept_changes)  # before a user's file is run
    pair = PAIRS.get(args.pair) if not (args.base or args.instruct) else None
    sandbox.check(args.execute_code)
    suites = refuse_at_once(args, choose_pair(args.pair, args.base, args.instruct))
    check_writable(run.path / "experiments" if run else args.output)
    followers = followers_of(args)  # a missing package or token is told before anything is loaded
    with importing():
        import torch
        from tqdm import tqdm

        from experiments import TWIN
        from files import read_json
        from reporting.reports import write_reports
        from runner.batch import Alone, Record
        from runner.choosing import look_up_tasks, make_plans, make_protocol, settle_short
        from runner.crews import choose_crew
        from runner.estimate import short_hint
        from runner.manifest import commit, new_manifest, protocol_json
        from runner.replica import ModelOptions
        from runner.workers import Fleet

    register_suites()
    look_up_tasks(suites)
    on_gpu = torch.cuda.is_available() and args.device_map != "cpu"
    unsaid = args.short is None and not on_gpu and not run
    settle_short(args, on_gpu)
    # 2. who does the work, the plans that fit the model's depth, and what is loaded
    threads = then.get("threads") if isinstance(then.get("threads"), int) else None
    options = ModelOptions.of(args)
    crew = choose_crew(args.workers, options, threads)
    with Fleet(crew, options, register_suites) if crew else Alone(options, threads) as workers:
        shape = workers.open()
        plans, left_out = make_plans(args, shape.layers, set(shape.sources), suites)
        protocol = make_protocol(args, plans, suites)
        loaded = workers.prepare(protocol, started(manifest) or datetime.now())
        notes = [*loaded.notes, *left_out]
        if args.short:
            notes.append(
                "experiments are asked the short form, without capability; --no-short asks everything"
            )
        # 3. the manifest: written for a new run, compared for one that goes on
        recorded = protocol_json(protocol)
        depends_on |= loaded.depends_on
        if run is None or manifest is None:
            manifest = new_manifest(
                settings={name: getattr(args, name) for name in SETTINGS},
                protocol=recorded,
                prompts_sha256=loaded.prompts_sha256,
                template=loaded.template,
                experiments=[p.experiment.name for p in plans],
                pair=args.pair if pair else None,
                notes=notes,
                sources=loaded.sources,
                layers=loaded.layers,
                dtype=loaded.dtype,
                devices=list(loaded.devices),
                original_fingerprint=loaded.fingerprint,
                depends_on=depends_on,
                load_seconds=loaded.seconds,
                self_check=loaded.checked,
                hardware=loaded.hardware,
            )
            if crew:
                manifest["workers"] = crew.to_json()
            run = Run.create(args.output, manifest)
        else:
            names = [n for n in manifest["experiments"] if not n.endswith(TWIN)]
            if names != [p.experiment.name for p in plans]:
                raise FrankenError(f"{args.resume} was made with other experiments; start a new run")
            changed = resuming.changes(then, depends_on)
            changed += resuming.protocol_changes(manifest["protocol"], recorded)
            if manifest["original_fingerprint"] != loaded.fingerprint:
                before = manifest["original_fingerprint"]
                changed.append(resuming.Change("weights", before, loaded.fingerprint))
            before = manifest.get("prompts_sha256", loaded.prompts_sha256)
            if before != loaded.prompts_sha256:
                changed.append(resuming.Change("prompts", before, loaded.prompts_sha256))
            resuming.refuse(args.resume, changed, args.accept_changes)
            if lacking := resuming.not_recorded(then, depends_on):
                notes.append(lacking)
            if "prompts_sha256" not in manifest:
                notes.append("this run is older than the record of its prompts: they are not compared")
        args.begun = run.path
        hint = short_hint(args, shape.layers, plans, protocol, suites) if unsaid else None
        if hint:
            notes = [*notes, hint]  # not in the manifest, whose notes are about the results
        # 4. the batch, and the reports whichever way it ends
        for note in notes:
            print(printable(f"note: {note}"), file=sys.stderr)
        where = f"{crew.workers} workers, each on " if crew else ""
        print(
            printable(
                f"{many(len(plans), 'experiment')} on {where}torch.{loaded.dtype} {', '.join(loaded.devices)}"
                f"; loaded in {loaded.seconds:.1f} s; results in {run.path}"
            ),
            file=sys.stderr,
        )
        manifest_then, kept = manifest, run
        followers.tell(lambda who: who.begin(kept, manifest_then))
        try:
            with ended_by_signals():
                with run.alone():
                    if changed:
                        entry = resuming.entry(changed, commit())
                        manifest["resumed"] = [*manifest.get("resumed", []), entry]
                        write_json(run.manifest_path, manifest)
                    twins = workers.twins(protocol, suites.given, suites.also) if args.matched_noise else None
                    record = Record(run, manifest, plans, loaded.fingerprint, twins, changed)
                    followers.say = tqdm.write
                    record.on_kept = lambda result: followers.tell(lambda who: who.experiment(result))
                    failed = workers.run(record)
                print(printable(write_reports(run)))
                compared = read_json(run.path / "comparison.json")
                followers.tell(lambda who: who.end(compared))
        except KeyboardInterrupt:
            return interrupted(run, manifest, args)
        except FrankenError as e:
            with contextlib.suppress(FrankenError):  # the first error is the one to tell
                write_reports(run)
            raise FrankenError(
                f"{e}; finished experiments are kept; once mended: {resume_command(run.path, args)}"
            ) from e
    if failed:
        print(
            f"{failed} of {many(len(manifest['experiments']), 'experiment')} failed; their errors are in"
            f" {run.path / 'experiments'}",
            file=sys.stderr,
        )
    for name, reason in followers.failed.items():
        print(
            printable(f"{name} failed in the end: {reason}; the run is whole in {run.path}"), file=sys.stderr
        )
    return 1 if failed or followers.failed else 0


def interrupted(run, manifest: dict, args) -> int:
    """Say what is done and how to go on, and make the pages of what there is; the exit status.

    The pages take seconds, which is what an interrupted run still waits for: not where nothing stands beside
    the unmodified model yet.
    """
    from experiments import BASELINE
    from reporting.reports import write_reports

    names = manifest["experiments"]
    finished = [name for name in names if run.file(name).exists()]
    pages = f"`python report.py {shlex.quote(str(run.path))}` makes them"
    print(
        f"\nInterrupted. {len(finished)} of {many(len(names), 'experiment')} are finished and kept; go on"
        f" with:\n  {resume_command(run.path, args)}",
        file=sys.stderr,
    )
    if not set(finished) - {BASELINE}:
        return 130
    print(
        "Making the pages of these, which takes some seconds; Ctrl-C again leaves them out.", file=sys.stderr
    )
    try:
        with ended_by_signals():
            write_reports(run)
    except KeyboardInterrupt:
        print(f"Interrupted again: the run's pages are not finished; {pages}.", file=sys.stderr)
    except FrankenError as e:
        print(f"The run's pages could not be made ({e}); {pages}.", file=sys.stderr)
    except Exception as e:  # a library that was interrupted while it was imported is there in part
        print(printable(f"The run's pages could not be made ({first_line(e)}); {pages}."), file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
