"""From the command line's words to experiments and a protocol: named ones, sweeps, the user's own, the suites
asked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import experiments as ex
from errors import FrankenError, nearest
from experiments import SIZED, SWEEPS
from files import read_json
from planning.asked import Harness, check_installed, parse_suites, read_text
from planning.experiment import SHORT
from runner.known_pairs import Pair, refuse_nowhere

LONGEST_NAME = 100  # bytes of a source's name, which its experiments' files begin with
MOST_LAYERS = 10_000  # beyond it a config says nothing that a model could be; told when it is opened


def extra_sources(pairs_given: list[str]) -> dict[str, str]:
    """{name: path} of --source NAME=PATH. Raises FrankenError for another form or a reserved name."""
    sources = {}
    for text in pairs_given:
        name, _, path = text.partition("=")
        if not name.isidentifier() or not path or name in ("instruct", "base"):
            raise FrankenError(
                f"--source {text}: expected NAME=PATH with a plain name other than instruct and base"
            )
        if len(name.encode()) > LONGEST_NAME:
            raise FrankenError(f"--source {text[:40]}...: a name has at most {LONGEST_NAME} bytes")
        if name in sources:
            raise FrankenError(f"--source {text}: there are two sources called {name}")
        sources[name] = path
    return sources


def sweep_windows(args) -> tuple[list[int] | None, int | None]:
    """(sizes, step) of --sweep's blocks, None where nothing is said. Raises FrankenError for a sweep there is
    not, or sizes or a step that are no numbers."""
    for kind in args.sweep:
        if kind not in SWEEPS:
            raise FrankenError(f"--sweep {kind}: expected one of {', '.join(SWEEPS)}{nearest(kind, SWEEPS)}")
    for flag in ("size", "step"):
        text = getattr(args, flag)
        if text is not None and not set(SIZED) & set(args.sweep):
            raise FrankenError(f"--{flag} is about windows: it goes with --sweep {', '.join(SIZED)}")
        if text is not None and not all(
            part.isdecimal() and len(part) < 10 and int(part) > 0
            for part in (text.split(",") if flag == "size" else [text])
        ):
            raise FrankenError(
                f"--{flag} {text[:40]}: expected"
                f" {'whole layers, as in 1,4,8' if flag == 'size' else 'a whole number of layers'}"
            )
    return (
        [int(part) for part in args.size.split(",")] if args.size else None,
        int(args.step) if args.step else None,
    )


def known_experiments(args, n_layers: int) -> tuple[list, list, list, list]:
    """Everything with a name: (named, of further sources, of sweeps, of the user's files), on a model of this
    depth.

    The user's files are run once, whatever is called how often: what they define stays with `args`. Raises
    FrankenError for two experiments of one name in the files, and for what no file, source or sweep can be.
    """
    if not hasattr(args, "own_experiments"):
        args.own_experiments = [e for path in args.experiments_file for e in ex.load_file(path)]
    own = args.own_experiments
    sourced = [e for name in extra_sources(args.source) for e in ex.for_source(name)]
    sizes, step = sweep_windows(args)
    swept = {e.name: e for kind in args.sweep for e in ex.sweep(kind, n_layers, sizes, step)}
    known = {e.name: e for e in [*ex.EXPERIMENTS, *ex.GRIDS, *sourced, *swept.values()]}
    for e in own:  # results are kept by name
        if known.setdefault(e.name, e) is not e:
            raise ex.FrankenError(
                f"there are two experiments called {e.name!r}; rename the one in your experiments file"
            )
    return [*ex.EXPERIMENTS, *ex.GRIDS], sourced, list(swept.values()), own


def choose(args, n_layers: int, suites: ChosenSuites) -> list:
    """The experiments asked for, with what each is asked, the baseline first. Raises FrankenError for unknown
    names."""
    named, sourced, swept, own = known_experiments(args, n_layers)
    known = {e.name: e for e in [*named, *sourced, *swept, *own]}
    if args.experiments:
        chosen = ex.select(args.experiments, list(known.values()))
    elif args.all:
        chosen = list(ex.EXPERIMENTS)
    elif args.priority_limit:
        chosen = ex.EXPERIMENTS[: args.priority_limit]
    else:
        chosen = [] if own or sourced or swept else ex.EXPERIMENTS[:6]
    if not args.experiments:
        chosen = [*chosen, *sourced, *swept, *own]
    baseline = known[ex.BASELINE]
    if baseline not in chosen and not args.no_baseline:
        chosen = [baseline, *chosen]
    return ex.with_suites(
        list({e.name: e for e in chosen}.values()),
        suites.given,
        args.matched_noise,
        suites.also,
        SHORT if args.short else ex.EVERYTHING,
    )


def refuse_short(args) -> None:
    """Raises FrankenError for --short with --suites."""
    if args.short and args.suites is not None:
        raise FrankenError("--short and --suites both say what is asked; give one of them")


def settle_short(args, gpu: bool) -> None:
    """Decide --short where it is not said: experiments that are chosen by priority alone are asked the short
    form on a CPU, so that a first run takes minutes. Raises FrankenError for --short with --suites."""
    refuse_short(args)
    named = args.experiments or args.all or args.sweep or args.source or args.experiments_file
    if args.short is None:
        args.short = not (gpu or named or args.suites is not None)


def name_models(args, pair) -> None:
    """Keep with `args` by which names a mergekit configuration may mean this run's sources: those of the
    sources themselves, and the paths and hub ids that were given for them."""
    names = {"instruct": "instruct", "base": "base"} | {name: name for name in extra_sources(args.source)}
    given = [(pair.instruct, "instruct", args.instruct_revision or pair.instruct_revision)]
    given += [(pair.base, "base", args.base_revision or pair.base_revision)] if pair.base else []
    given += [(path, name, None) for name, path in extra_sources(args.source).items()]
    for spec, source, revision in given:
        names.setdefault(spec, source)
        if revision:
            names.setdefault(f"{spec}@{revision}", source)
        if Path(spec).expanduser().exists():
            names.setdefault(str(Path(spec).expanduser().absolute()), source)
    args.models = names


def make_plans(
    args, n_layers: int, sources: set[str], suites: ChosenSuites
) -> tuple[list[ex.Plan], list[str]]:
    """(plans of what is asked for and these sources can make, notes on what is left out).

    Which sources an experiment takes layers from, its recipe says. Raises FrankenError for one that is asked
    for by name and takes them from a source there is not, for one of the user's own whose source is neither a
    base side nor given, and if none is left.
    """
    plans, left_out, chosen = [], [], choose(args, n_layers, suites)
    mine = {e.name for e in args.own_experiments}
    for e in chosen:
        plan = e.plan(n_layers, args.seed, getattr(args, "models", None))
        if not (lacking := plan.recipe.sources - sources):
            plans.append(plan)
        elif args.experiments and e.name in args.experiments:
            raise FrankenError(_lacks(e.name, lacking))
        elif e.name in mine and (unknown := lacking - {"base"}):
            raise FrankenError(f"{_lacks(e.name, unknown)}{nearest(min(unknown), sources)}")
        else:
            left_out.append((e.name, lacking))
    if not plans:
        raise FrankenError(f"nothing is left to run: {_lacks(*left_out[0])}")
    names = ", ".join(name for name, _ in left_out)
    lacking = ", ".join(sorted(set().union(*(kinds for _, kinds in left_out))))
    notes = [f"left out, for want of a source {lacking}: {names}"] if left_out else []
    used = set().union(*(plan.recipe.sources for plan in plans))
    for name in extra_sources(args.source).keys() - used:
        own = ", ".join(e.name for e in ex.for_source(name))
        notes.append(f"none of these experiments takes layers from {name}; its own are {own}")
    return plans, notes


def _lacks(name: str, lacking: set[str]) -> str:
    side = "--base" if lacking == {"base"} else "--source"
    return f"{name} takes layers from {', '.join(sorted(lacking))}, which is not there; see {side}"


def known_sources(args, pair) -> set[str]:
    """Names of the sources that a run with this pair has."""
    return {"instruct", *(["base"] if pair.has_base else []), *extra_sources(args.source)}


def refuse_at_once(args, pair: Pair) -> ChosenSuites:
    """What is asked. Raises FrankenError for what the command line and small files beside it show to be
    wrong. Nothing is downloaded or loaded for it, and torch is not imported: a typo is told within a
    second."""
    if args.perplexity_file:
        read_text(args.perplexity_file)
    refuse_short(args)
    sweep_windows(args)
    suites = chosen_suites(args)
    refuse_beforehand(args, pair, suites)
    return suites


def refuse_models(args, pair: Pair) -> None:
    """Raises FrankenError for a side or a further source that is nowhere on this machine and cannot be on the
    hub."""
    for spec in (pair.instruct, pair.base):
        if spec is not None:
            refuse_nowhere(spec)
    for spec in extra_sources(args.source).values():
        if not (Path(spec) / "adapter_config.json").exists():
            refuse_nowhere(spec)


def refuse_beforehand(args, pair: Pair, suites: ChosenSuites) -> None:
    """Raises FrankenError for models, sources and experiments that there are not, or that do not fit each
    other."""
    name_models(args, pair)
    refuse_models(args, pair)
    sources = known_sources(args, pair)
    if (depth := pair.layers or local_depth(args)) is not None:
        make_plans(args, depth, sources, suites)
    elif not args.sweep:  # only the names of a sweep depend on the depth
        for e in choose(args, 1, suites):
            lacking = set()
            with contextlib.suppress(FrankenError):  # a recipe may not fit another depth than the model's
                plan = e.plan(ex.PUBLISHED_DEPTH, args.seed, args.models)
                lacking = plan.recipe.sources - sources
            if lacking and e.name in (args.experiments or ()):
                raise FrankenError(_lacks(e.name, lacking))


@dataclass(frozen=True)
class ChosenSuites:
    """What the command line says of the questions, read once.

    given: of --suites, None where it says nothing. also: of --also and --lm-eval, in order. harness: of
    --lm-eval, --include-path and --limit; its tasks are not looked up yet.
    """

    given: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    harness: Harness | None = None


def chosen_suites(args) -> ChosenSuites:
    """Raises FrankenError for a suite there is not, noise matched to nothing, and what goes without --lm-eval
    or cannot go with it: no tasks, a folder that is none, or no package."""
    given = parse_suites(args.suites) if args.suites is not None else None
    if args.matched_noise and given and "perplexity" not in given:
        raise FrankenError("--matched-noise matches perplexity, which is not among the suites given")
    also = parse_suites(args.also) if args.also is not None else ()
    harness = _harness(args)
    if harness is not None:
        also = tuple(dict.fromkeys((*also, "lm_eval")))
    return ChosenSuites(given, also, harness)


def _harness(args) -> Harness | None:
    if not args.lm_eval:
        if args.include_path or args.limit:
            raise FrankenError("--include-path and --limit go with --lm-eval")
        return None
    tasks = tuple(filter(None, (part.strip() for part in args.lm_eval.split(","))))
    if not tasks:
        raise FrankenError("--lm-eval names no task")
    if args.include_path and not Path(args.include_path).is_dir():
        raise FrankenError(f"--include-path {args.include_path}: there is no such folder")
    check_installed()
    return Harness(tasks, args.include_path, args.limit)


def look_up_tasks(chosen: ChosenSuites) -> None:
    """Raises FrankenError for tasks of --lm-eval that there are not."""
    if chosen.harness is not None:
        from suites.lm_harness import check_tasks  # here: it takes seconds, and few runs need it

        check_tasks(chosen.harness.tasks, chosen.harness.include_path)


def local_depth(args) -> int | None:
    """How many layers the checkpoint in the folder --instruct has, by its config; None where that is not
    known without loading or downloading."""
    try:
        layers = read_json(Path(args.instruct) / "config.json", nan=True).get("num_hidden_layers")
    except (FrankenError, TypeError, AttributeError):  # told in a line when it is opened
        return None
    return layers if isinstance(layers, int) and 0 < layers <= MOST_LAYERS else None


def make_protocol(args, plans: list, suites: ChosenSuites):
    """The run's evaluate.Protocol: its suites are all that any experiment is asked; each is asked its own of
    them."""
    import evaluate  # here: it takes seconds, and nothing that is refused before needs it

    wanted = {name for plan in plans for name in plan.experiment.suites} | {
        *((*(suites.given or ex.QUICK), *suites.also) if args.matched_noise else ())
    }
    protocol = evaluate.Protocol(
        tuple(name for name in evaluate.SUITES if name in wanted),
        args.samples,
        args.max_new_tokens,
        seed=args.seed,
        execute_code=args.execute_code,
        harness=suites.harness,
    )
    if "lm_eval" in protocol.suites and protocol.harness is None:
        raise FrankenError("the suite lm_eval needs tasks: --lm-eval TASKS")
    if args.perplexity_file:
        protocol = replace(protocol, texts=read_text(args.perplexity_file))
    return protocol
