#!/usr/bin/env python3
"""Run surgeries on a model pair and ask every resulting model the same questions. `--help` lists the options."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

DESCRIPTION = "Frankenmodel: change a model's weights and ask whether it can tell."


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = p.add_argument_group("model")
    model.add_argument("--pair", default="qwen2.5-coder-32b", help="qwen2.5-coder-32b, smollm2-135m (laptop size, from the package index), smollm2-135m-hub")
    model.add_argument("--base", help="path or hub id of a base checkpoint, with --instruct instead of --pair")
    model.add_argument("--instruct", help="path or hub id of the chat-tuned checkpoint")
    model.add_argument("--base-revision", help="revision of --base or of the pair's base side")
    model.add_argument("--instruct-revision", help="revision of --instruct or of the pair's instruct side")
    model.add_argument("--source", action="append", default=[], metavar="NAME=PATH", help="a further source of layers: a checkpoint or a LoRA adapter; adds experiments NAME_whole, NAME_early_half, ...")
    model.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    model.add_argument("--device-map", default="auto", choices=("auto", "cuda", "cpu", "balanced"), help="auto: one GPU if the model fits, else all of them; a small model also on a CPU")
    model.add_argument("--resident", action=argparse.BooleanOptionalAction, default=None, help="keep the base layers on the GPU too; default: if they fit")
    what = p.add_argument_group("what to run")
    what.add_argument("--experiments", nargs="+", metavar="NAME", help="these experiments, in this order")
    what.add_argument("--priority-limit", type=int, metavar="N", help="the N experiments of highest priority (6 if nothing is chosen)")
    what.add_argument("--all", action="store_true", help="all named experiments")
    what.add_argument("--sweep", action="append", default=[], metavar="KIND", help="window (base layers, see --size), replace (one layer by the base's), delete or double (one layer), noise, blend (doses on all layers); repeatable")
    what.add_argument("--size", metavar="N[,N...]", help="--sweep window: layers in a window (4 if not given)")
    what.add_argument("--step", metavar="N", help="--sweep window: layers from one window to the next (its size if not given)")
    what.add_argument("--matched-noise", action="store_true", help="for every experiment that raises perplexity by more than 1%%, also NAME__matched_noise: noise tuned to the same perplexity")
    what.add_argument("--experiments-file", action="append", default=[], metavar="FILE.py", help="a Python file with EXPERIMENTS = [Experiment(...), ...]; it is run")
    what.add_argument("--no-baseline", action="store_true", help="do not add baseline_instruct, against which shifts are measured")
    what.add_argument("--suites", help="introspection, capability, perplexity, chat, trigger, quick (binary, perplexity), all, or single suites; comma-separated. "
                      "If not given: placebos and sweeps quick, the injection its own, everything else all")
    what.add_argument("--samples", type=int, default=1, help="replies per free-text probe")
    what.add_argument("--max-new-tokens", type=int, default=80, help="budget of a free-text reply")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--perplexity-file", help="measure perplexity on this UTF-8 text instead of the built-in ones")
    what.add_argument("--execute-code", action="store_true", help="run code answers in a limited process instead of only parsing them")
    run = p.add_argument_group("the run")
    run.add_argument("--output", default="results", help="a folder run_<time> is made in it")
    run.add_argument("--resume", metavar="DIR", help="go on with an interrupted run; its settings are taken from its manifest")
    run.add_argument("--batch-size", type=int, help="most rows decoded at once; shrinks by itself when memory is short")
    run.add_argument("--list", action="store_true", help="list the experiments and exit")
    run.add_argument("--dry-run", action="store_true", help="what would run, what moves, memory and time estimates; loads and downloads nothing")
    args = p.parse_args(argv)
    for name in ("samples", "max_new_tokens", "priority_limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def extra_sources(pairs_given: list[str]) -> dict[str, str]:
    """{name: path} of --source NAME=PATH. Raises FrankenError for another form or a reserved name."""
    from weights import FrankenError

    found = {}
    for text in pairs_given:
        name, _, path = text.partition("=")
        if not name.isidentifier() or not path or name in ("instruct", "base"):
            raise FrankenError(f"--source {text}: expected NAME=PATH with a plain name other than instruct and base")
        if name in found:
            raise FrankenError(f"--source {text}: there are two sources called {name}")
        found[name] = path
    return found


def sweep_windows(args) -> tuple[list[int], int | None]:
    """(sizes, step) of --sweep window. Raises FrankenError for a sweep there is not, or sizes or a step that are no numbers."""
    from experiments import SWEEPS
    from weights import FrankenError

    for kind in args.sweep:
        if kind not in SWEEPS:
            raise FrankenError(f"--sweep {kind}: expected one of {', '.join(SWEEPS)}")
    for flag in ("size", "step"):
        text = getattr(args, flag)
        if text is not None and "window" not in args.sweep:
            raise FrankenError(f"--{flag} is about windows: it goes with --sweep window")
        if text is not None and not all(part.isdecimal() and int(part) > 0 for part in (text.split(",") if flag == "size" else [text])):
            raise FrankenError(f"--{flag} {text}: expected {'whole layers, as in 1,4,8' if flag == 'size' else 'a whole number of layers'}")
    return [int(part) for part in (args.size or "4").split(",")], args.step and int(args.step)


def known_experiments(args, n_layers: int) -> tuple[list, list, list, list]:
    """Everything with a name: (named, of further sources, of sweeps, of the user's files), on a model of this depth.

    Raises FrankenError for two experiments of one name in the files, and for what no file, source or sweep can be.
    """
    import experiments as ex

    own = [e for path in args.experiments_file for e in ex.load_file(path)]
    sourced = [e for name in extra_sources(args.source) for e in ex.for_source(name)]
    sizes, step = sweep_windows(args)
    windows = [w for size in sizes for w in ex.window_sweep(size, n_layers, stride=step)] if "window" in args.sweep else []
    windows.sort(key=lambda w: w.sweep["start"])  # in this order the layers below a window need not be computed again
    swept = {e.name: e for kind in args.sweep for e in (windows if kind == "window" else ex.sweep(kind, n_layers))}
    known = {e.name: e for e in [*ex.EXPERIMENTS, *sourced, *swept.values()]}
    for e in own:  # results are kept by name
        if known.setdefault(e.name, e) is not e:
            raise ex.FrankenError(f"there are two experiments called {e.name!r}; rename the one in your experiments file")
    return ex.EXPERIMENTS, sourced, list(swept.values()), own


def choose(args, n_layers: int) -> list:
    """The experiments asked for, with what each is asked, the baseline first. Raises FrankenError for unknown names."""
    import experiments as ex

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
    """What --suites says, None where it says nothing. Raises FrankenError for a suite there is not, or noise matched to nothing."""
    import evaluate
    from weights import FrankenError

    given = evaluate.parse_suites(args.suites) if args.suites is not None else None
    if args.matched_noise and given and "perplexity" not in given:
        raise FrankenError("--matched-noise matches perplexity, which is not among the suites given")
    return given


def set_threads() -> None:
    """As many threads as this process may use: its affinity and its container's quota, unless OMP_NUM_THREADS is set."""
    import torch

    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    torch.set_num_threads(min(allowed, torch.get_num_threads()))


def peak_memory() -> int:
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return max(torch.cuda.max_memory_allocated(k) for k in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_experiment(engine, plan, protocol, original: str, on_progress=None, find=None) -> dict:
    """Apply one plan, measure, go back, prove it. Whatever goes wrong inside is part of the result, not raised.

    `find(plan, on_progress)`, if given, measures first what the plan's recipe is to be, and returns the whole plan.
    """
    from dataclasses import asdict, replace

    import torch

    from evaluate import evaluate
    from franken import Surgery
    from generation import Timing
    from results import SCHEMA_VERSION

    live, begin = engine.live, time.perf_counter()
    engine.timing, surgery, undo = Timing(), Surgery(), Surgery()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    measurements, error, modified, restored, phases = {}, None, None, None, {}
    try:
        plan = find(plan, on_progress) if find else plan
        surgery = live.apply(plan.recipe)
        modified = live.fingerprint()
        measurements, phases = evaluate(engine, replace(protocol, suites=plan.experiment.suites or protocol.suites), on_progress)
    except Exception as e:
        error = {"type": type(e).__name__, "message": str(e)[:2000], "traceback": "".join(traceback.format_exception(e)[-3:])[-4000:]}
        measurements = {}
    try:
        undo = live.apply(live.original)
        restored = live.fingerprint()
    except Exception as e:
        error = error or {"type": type(e).__name__, "message": f"going back failed: {e}"[:2000]}
    timing = asdict(engine.timing)
    rate = timing["decode_tokens"] / timing["decode_seconds"] if timing["decode_seconds"] else None
    performance = {
        "seconds": time.perf_counter() - begin, "surgery_seconds": surgery.seconds, "restore_seconds": undo.seconds,
        "bytes_moved": surgery.bytes_moved, "bytes_streamed": surgery.bytes_streamed, "bytes_computed": surgery.bytes_computed,
        "prefill_seconds": timing["prefill_seconds"], "prefill_tokens": timing["prefill_tokens"],
        "decode_seconds": timing["decode_seconds"], "decode_tokens": timing["decode_tokens"], "decode_tokens_per_second": rate,
        "peak_memory_bytes": peak_memory(), "out_of_memory": timing["out_of_memory"], "suites": phases,
        "max_batch": engine.max_batch, "graph_captures": timing["captures"], "capture_seconds": timing["capture_seconds"]}
    return {"schema_version": SCHEMA_VERSION, "status": "failed" if error else "done", "experiment": plan.to_json(),
            "weights": {"original": original, "modified": modified, "restored": restored, "exact": restored == original},
            "measurements": measurements, "error": error, "performance": performance}


def run_batch(run, manifest: dict, engine, plans: list, protocol, original: str, matcher=None) -> int:
    """Run what has not been run yet. Returns how many experiments failed, over the whole run.

    With a matched_noise.Matcher, every experiment that is no control is followed by its noise twin, whose name is
    added to the manifest as soon as it is known that there will be one. Raises FrankenError if a result on disk is
    corrupt or of another recipe, if going back was not exact or if results cannot be written; KeyboardInterrupt on
    Ctrl-C or SIGTERM.
    """
    from tqdm import tqdm

    from experiments import BASELINE, TWIN
    from matched_noise import wants
    from results import write_json
    from weights import FrankenError

    def stop(signum, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)  # a batch system's kill ends a run as cleanly as Ctrl-C
    finished = {name: run.load(name) for name in manifest["experiments"]}  # all checked before anything runs
    for plan in plans:
        result = finished[plan.experiment.name]
        for what in ("recipe", "suites"):  # a user's file may have changed since
            if result and result["experiment"].get(what) != plan.to_json()[what]:
                raise FrankenError(f"{run.file(plan.experiment.name)} was made with {'another recipe' if what == 'recipe' else 'other suites'} of that name; start a new run")
    bar = tqdm(total=len(finished), initial=sum(r is not None for r in finished.values()), unit="experiment", dynamic_ncols=True)

    def measure(plan, find=None) -> dict:
        name = plan.experiment.name
        bar.set_description(name)
        with tqdm(total=1, leave=False, position=1, dynamic_ncols=True, mininterval=0.5) as inner:
            def progress(what, done, total):
                inner.total, inner.n = total, done
                inner.set_description(f"  {name}: {what}")

            result = run_experiment(engine, plan, protocol, original, progress, find)
        if matcher and wants(plan.experiment) and result["status"] == "done" and (note := matcher.refusal(result)):
            result["experiment"]["notes"].append(note)
        run.save(result)
        if result["error"]:
            first_line = (result["error"]["message"].splitlines() or [""])[0]
            tqdm.write(f"{name} failed: {result['error']['type']}: {first_line}", file=sys.stderr)
        if not result["weights"]["exact"]:
            raise FrankenError(f"after {name} the weights are not back to the original (fingerprint {result['weights']['restored']}, "
                               f"expected {original}); the run stops")
        bar.update()
        return result

    try:
        for plan in plans:
            name = plan.experiment.name
            matched = matcher is not None and wants(plan.experiment)
            if matched and not finished[name]:
                matcher.unmodified()  # before the experiment, so that none is lost if this fails
            result = finished[name] = finished[name] or measure(plan)
            if matcher and name == BASELINE and "perplexity" in result["measurements"]:
                matcher.known[0.0] = result["measurements"]["perplexity"]["perplexity"]
            if not matched or result["status"] != "done" or finished.get(name + TWIN) or matcher.refusal(result):
                continue
            if name + TWIN not in manifest["experiments"]:
                manifest["experiments"].insert(manifest["experiments"].index(name) + 1, name + TWIN)
                write_json(run.manifest_path, manifest)
                bar.total += 1
            finished[name + TWIN] = measure(matcher.twin(plan, result["measurements"]["perplexity"]["perplexity"]), matcher.find)
    finally:
        bar.close()
        signal.signal(signal.SIGTERM, previous)
    return sum(r["status"] == "failed" for r in finished.values())


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from weights import FrankenError

    try:
        if args.list:
            return list_experiments(args)
        if args.dry_run:
            from estimate import dry_run

            return dry_run(args)
        return execute(args)
    except FrankenError as e:
        print(f"run_all.py: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run_all.py: interrupted before any experiment began", file=sys.stderr)
        return 130


def list_experiments(args) -> int:
    """Print all that has a name, in order of priority; with --sweep also its experiments, at the pair's depth."""
    layers = 1
    if args.sweep:
        from estimate import model_shape  # takes seconds to import, and only a sweep depends on the depth

        layers = model_shape(args)[0]
    known = known_experiments(args, layers)
    for k, e in enumerate([e for part in known for e in part], 1):
        print(f"{k:3} {e.name:32} {e.group:12} {e.control or '-':10} {e.hypothesis}")
    return 0


def make_protocol(args, plans: list):
    """The run's evaluate.Protocol: its suites are all that any experiment is asked; each is asked its own of them."""
    import evaluate
    import experiments

    wanted = {name for plan in plans for name in plan.experiment.suites} | {*((given_suites(args) or experiments.QUICK) if args.matched_noise else ())}
    texts = {"texts": evaluate.read_text(args.perplexity_file)} if args.perplexity_file else {}
    return evaluate.Protocol(tuple(name for name in evaluate.SUITES if name in wanted), args.samples, args.max_new_tokens, seed=args.seed,
                             execute_code=args.execute_code, **texts)


SETTINGS = ("pair", "base", "instruct", "base_revision", "instruct_revision", "source", "dtype", "device_map", "resident",
            "experiments", "priority_limit", "all", "sweep", "size", "step", "experiments_file", "no_baseline", "suites", "samples",
            "max_new_tokens", "seed", "perplexity_file", "execute_code", "matched_noise")


def execute(args) -> int:
    import evaluate
    from experiments import TWIN
    from matched_noise import Matcher
    from pairs import PAIRS, open_pair
    from report import write_reports
    from results import Run, check_writable, new_manifest, protocol_json
    from weights import FrankenError

    run = manifest = None
    if args.resume:
        run, manifest = Run.resume(args.resume)
        if lost := set(SETTINGS) - set(manifest["settings"]):
            raise FrankenError(f"{run.manifest_path} is corrupt (the setting {min(lost)} is missing)")
        for name in SETTINGS:
            setattr(args, name, manifest["settings"][name])
    if args.perplexity_file:
        evaluate.read_text(args.perplexity_file)
    pair = PAIRS.get(args.pair) if not (args.base or args.instruct) else None
    sweep_windows(args)
    given = given_suites(args)
    if pair or not args.sweep:  # only the names of a sweep depend on the depth
        choose(args, pair.layers if pair else 1)  # unknown names are refused before anything is downloaded or loaded
    check_writable(run.path / "experiments" if run else args.output)
    set_threads()
    begin = time.perf_counter()
    opened = open_pair(args.pair, args.base, args.instruct, args.base_revision, args.instruct_revision, extra_sources(args.source),
                       args.dtype, args.device_map, args.resident)
    live = opened.live
    plans = [e.plan(len(live.original), args.seed) for e in choose(args, len(live.original))]
    protocol = make_protocol(args, plans)
    evaluate.check_tokenizer(opened.tokenizer, protocol)
    original = live.fingerprint()
    load_seconds = time.perf_counter() - begin
    from generation import Engine

    engine = Engine(live, opened.tokenizer, opened.stop_ids, args.batch_size)
    recorded = protocol_json(protocol)
    if manifest is None:
        manifest = new_manifest(
            settings={name: getattr(args, name) for name in SETTINGS}, protocol=recorded, experiments=[p.experiment.name for p in plans],
            pair=args.pair if pair else None, notes=opened.notes, sources=opened.sources, layers=len(live.original), dtype=str(live.dtype).removeprefix("torch."),
            devices=[str(d) for d in engine.devices], original_fingerprint=original, load_seconds=load_seconds)
        run = Run.create(args.output, manifest)
    else:
        for what, then, now in (("weights", manifest["original_fingerprint"], original), ("protocol", manifest["protocol"], recorded),
                                ("experiments", [n for n in manifest["experiments"] if not n.endswith(TWIN)], [p.experiment.name for p in plans])):
            if then != now:
                raise FrankenError(f"{args.resume} was made with other {what}; start a new run")
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(plans)} experiments on {live.dtype} {', '.join(map(str, engine.devices))}; loaded in {load_seconds:.1f} s; results in {run.path}", file=sys.stderr)
    resume = f"python run_all.py --resume {shlex.quote(str(run.path))}"
    try:
        failed = run_batch(run, manifest, engine, plans, protocol, original, Matcher(engine, protocol, given) if args.matched_noise else None)
    except KeyboardInterrupt:
        print(f"\nInterrupted. Finished experiments are kept; go on with:\n  {resume}", file=sys.stderr)
        write_reports(run)
        return 130
    except FrankenError as e:
        with contextlib.suppress(FrankenError):  # the first error is the one to tell
            write_reports(run)
        raise FrankenError(f"{e}; finished experiments are kept; once mended: {resume}") from e
    print(write_reports(run))
    if failed:
        print(f"{failed} of {len(manifest['experiments'])} experiments failed; their errors are in {run.path / 'experiments'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
