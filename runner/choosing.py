"""From the command line's words to experiments and a protocol: named ones, sweeps, the user's own, the suites
asked."""

from __future__ import annotations

import evaluate
import experiments as ex
from errors import FrankenError
from experiments import SWEEPS


def extra_sources(pairs_given: list[str]) -> dict[str, str]:
    """{name: path} of --source NAME=PATH. Raises FrankenError for another form or a reserved name."""
    found = {}
    for text in pairs_given:
        name, _, path = text.partition("=")
        if not name.isidentifier() or not path or name in ("instruct", "base"):
            raise FrankenError(
                f"--source {text}: expected NAME=PATH with a plain name other than instruct and base"
            )
        if name in found:
            raise FrankenError(f"--source {text}: there are two sources called {name}")
        found[name] = path
    return found


def sweep_windows(args) -> tuple[list[int], int | None]:
    """(sizes, step) of --sweep window. Raises FrankenError for a sweep there is not, or sizes or a step that
    are no numbers."""
    for kind in args.sweep:
        if kind not in SWEEPS:
            raise FrankenError(f"--sweep {kind}: expected one of {', '.join(SWEEPS)}")
    for flag in ("size", "step"):
        text = getattr(args, flag)
        if text is not None and "window" not in args.sweep:
            raise FrankenError(f"--{flag} is about windows: it goes with --sweep window")
        if text is not None and not all(
            part.isdecimal() and int(part) > 0 for part in (text.split(",") if flag == "size" else [text])
        ):
            raise FrankenError(
                f"--{flag} {text}: expected"
                f" {'whole layers, as in 1,4,8' if flag == 'size' else 'a whole number of layers'}"
            )
    return [int(part) for part in (args.size or "4").split(",")], args.step and int(args.step)


def known_experiments(args, n_layers: int) -> tuple[list, list, list, list]:
    """Everything with a name: (named, of further sources, of sweeps, of the user's files), on a model of this
    depth.

    Raises FrankenError for two experiments of one name in the files, and for what no file, source or sweep
    can be.
    """
    own = [e for path in args.experiments_file for e in ex.load_file(path)]
    sourced = [e for name in extra_sources(args.source) for e in ex.for_source(name)]
    sizes, step = sweep_windows(args)
    windows = (
        [w for size in sizes for w in ex.window_sweep(size, n_layers, stride=step)]
        if "window" in args.sweep
        else []
    )
    # in this order the layers below a window need not be computed again
    windows.sort(key=lambda w: w.sweep["start"])
    swept = {
        e.name: e for kind in args.sweep for e in (windows if kind == "window" else ex.sweep(kind, n_layers))
    }
    known = {e.name: e for e in [*ex.EXPERIMENTS, *sourced, *swept.values()]}
    for e in own:  # results are kept by name
        if known.setdefault(e.name, e) is not e:
            raise ex.FrankenError(
                f"there are two experiments called {e.name!r}; rename the one in your experiments file"
            )
    return ex.EXPERIMENTS, sourced, list(swept.values()), own


def choose(args, n_layers: int) -> list:
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
    return ex.with_suites(list({e.name: e for e in chosen}.values()), given_suites(args), args.matched_noise)


def given_suites(args) -> tuple[str, ...] | None:
    """What --suites says, None where it says nothing. Raises FrankenError for a suite there is not, or noise
    matched to nothing."""
    given = evaluate.parse_suites(args.suites) if args.suites is not None else None
    if args.matched_noise and given and "perplexity" not in given:
        raise FrankenError("--matched-noise matches perplexity, which is not among the suites given")
    return given


def make_protocol(args, plans: list):
    """The run's evaluate.Protocol: its suites are all that any experiment is asked; each is asked its own of
    them."""
    wanted = {name for plan in plans for name in plan.experiment.suites} | {
        *((given_suites(args) or ex.QUICK) if args.matched_noise else ())
    }
    texts = {"texts": evaluate.read_text(args.perplexity_file)} if args.perplexity_file else {}
    return evaluate.Protocol(
        tuple(name for name in evaluate.SUITES if name in wanted),
        args.samples,
        args.max_new_tokens,
        seed=args.seed,
        execute_code=args.execute_code,
        **texts,
    )
