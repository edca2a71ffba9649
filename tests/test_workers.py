"""Runs spread over Ray workers: the order of jobs, lost workers, and the same results as from one process."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import small_battery
from cli_runs import FOUR, latest, refused, resumed, stamps, timeless

import run_all
from errors import FrankenError
from experiments import BASELINE, EXPERIMENTS, TWIN, select
from runner import crews, replica, schedule, workers
from runner import matched_noise as mn
from runner.pairs import GIB
from runner.results import Run

TESTS = str(Path(__file__).parent)


# ---- the order ---------------------------------------------------------------------------------------------


PERPLEXITY = {
    BASELINE: 10.0,
    "swap_adjacent_30_35": 11.0,
    "swap_distant_10_55": 400.0,
    "shuffle_all": None,
    "blend_linear": 10.01,
}


def named(name):
    return select([name], EXPERIMENTS)[0]


class FakeRecord:
    """What a schedule reads of a record, without a folder. Experiments measure what PERPLEXITY says."""

    def __init__(self, names, matched=True, done=()):
        self.plans = [named(name).plan(6) for name in names]
        self.twins = mn.Twins(6, SimpleNamespace(seed=0)) if matched else None
        self.finished = dict.fromkeys(names)
        self.kept, self.added = [], []
        for name in done:
            self.keep(named(name).plan(6))

    def keep(self, plan, status="done"):
        name = plan.experiment.name
        measured = {"perplexity": {"perplexity": PERPLEXITY.get(name, 1.0)}}
        self.finished[name] = {"status": status, "measurements": measured if status == "done" else {}}
        self.kept.append(name)
        if self.twins and name == BASELINE and status == "done":
            self.twins.known[0.0] = PERPLEXITY[name]

    def has_twin(self, plan):
        result = self.finished[plan.experiment.name]
        if not self.twins or not mn.wants(plan.experiment) or not result or result["status"] != "done":
            return False
        return not self.twins.refusal(result)

    def add_twin(self, name):
        self.added.append(name)
        self.finished.setdefault(name + TWIN, None)


def curve(fraction):
    """Perplexity under noise, rising."""
    return 10.0 * (1 + 100 * fraction**2)


def spread(record, workers=3, seed=0, answer=curve, loses=0.0):
    """Do all jobs with so many workers that finish in a random order. Returns the jobs as they were begun."""
    chance, made = random.Random(seed), schedule.Schedule(record)
    begun, at_work, open_ones = [], [], set()
    while True:
        while len(at_work) < workers and (job := made.next()) is not None:
            assert job.name not in open_ones, f"{job.name} is done twice at once"
            open_ones.add(job.name)
            begun.append(job)
            at_work.append(job)
        if not at_work:
            assert made.empty()
            return begun
        job = at_work.pop(chance.randrange(len(at_work)))
        open_ones.remove(job.name)
        if chance.random() < loses:
            begun.remove(job)
            assert made.lost(job) is None
        elif job.plan is None:
            made.measured(job, answer(job.fraction) if job.fraction else 10.0)
        else:
            record.keep(job.plan, "failed" if job.failed else "done")
            made.kept(job)


ALL = list(PERPLEXITY)


def test_what_comes_next_is_known_by_priority_and_without_measurements():
    """A worker keeps layers that these recipes begin with alike."""
    made = schedule.Schedule(record := FakeRecord(ALL))
    first = made.next()
    assert first.name == BASELINE and made.coming(9) == ()  # all others wait for its perplexity
    record.keep(first.plan)
    made.kept(first)
    order = [plan.recipe for plan in record.plans[1:]]
    assert made.coming(9) == tuple(order) and made.coming(2) == tuple(order[:2])
    second = made.next()
    record.keep(second.plan)
    made.kept(second)  # its twin is searched for: measurements, which have no recipe
    assert any(job.plan is None for job in made._queue) and made.coming(9) == tuple(order[1:])


@pytest.mark.parametrize("device, looked_at", [("cpu", 64), ("cuda", 0)])
def test_a_worker_tells_its_engine_what_may_come(monkeypatch, device, looked_at):
    engine = SimpleNamespace(live=SimpleNamespace(device=SimpleNamespace(type=device)), coming=())
    monkeypatch.setattr(workers, "run_experiment", lambda engine, *_: {"came": engine.coming})
    worker = workers.Worker(lambda: None, None, 1)
    monkeypatch.setattr(worker, "_engine", lambda: (engine, None))
    recipes = tuple(named(ALL[1]).plan(6).recipe for _ in range(70))
    assert worker.experiment(None, "", None, recipes) == {"came": recipes[:looked_at]}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_in_whatever_order_workers_finish_everything_is_done_once(count, seed):
    record = FakeRecord(ALL)
    begun = spread(record, count, seed)
    assert sorted(record.kept) == sorted([*ALL, *(f"{n}{TWIN}" for n in ALL[1:4])])
    fractions = [job.fraction for job in begun if job.plan is None]
    assert len(fractions) == len(set(fractions))
    twins = {job.plan.matched["of"]: job.plan for job in begun if job.plan and job.plan.matched}
    for name, plan in twins.items():
        expected = mn.bisect(PERPLEXITY[name], PERPLEXITY[BASELINE], curve)
        assert plan.matched["evaluations"] == [list(t) for t in expected]
    searched = {f for plan in twins.values() for f, _ in plan.matched["evaluations"]}
    assert set(fractions) == searched  # and nothing else is measured


@pytest.mark.parametrize("seed", range(10))
def test_lost_workers_change_nothing_of_what_is_done(seed):
    record = FakeRecord(ALL)
    spread(record, 3, seed, loses=0.1)
    assert sorted(record.kept) == sorted([*ALL, *(f"{n}{TWIN}" for n in ALL[1:4])])


def test_an_experiment_waits_for_the_reference_and_its_twin_for_the_experiment():
    made = schedule.Schedule(record := FakeRecord(ALL[1:] + [BASELINE]))
    first = made.next()
    assert first.name == BASELINE and made.next() is None
    record.keep(first.plan)
    made.kept(first)
    assert [made.next().name for _ in ALL[1:]] == ALL[1:] and made.next() is None


def test_without_a_baseline_the_unmodified_model_is_measured_first_and_once():
    begun = spread(FakeRecord(ALL[1:]))
    assert begun[0].fraction == 0.0
    assert [job.fraction for job in begun].count(0.0) == 1


def test_a_baseline_that_failed_is_no_reference():
    made = schedule.Schedule(record := FakeRecord(ALL))
    baseline = made.next()
    record.keep(baseline.plan, "failed")
    made.kept(baseline)
    assert made.next().fraction == 0.0


def test_without_matched_noise_nothing_waits_and_the_order_is_that_of_priority():
    made = schedule.Schedule(FakeRecord(ALL[::-1], matched=False))
    assert [made.next().name for _ in ALL] == ALL[::-1] and made.empty()


def test_what_is_on_disk_is_not_done_again_and_its_twin_is():
    record = FakeRecord(ALL, done=[BASELINE, "swap_distant_10_55"])
    begun = spread(record)
    names = [job.name for job in begun if job.plan]
    assert BASELINE not in names and "swap_distant_10_55" not in names
    assert f"swap_distant_10_55{TWIN}" in names


def test_a_search_that_cannot_be_measured_makes_a_twin_that_failed():
    record = FakeRecord(ALL[:2])
    begun = spread(record, answer=lambda fraction: schedule.Raised("OutOfMemoryError", "no memory"))
    (twin,) = [job for job in begun if job.plan and job.plan.matched]
    assert type(twin.failed.exception()).__name__ == "OutOfMemoryError"
    assert str(twin.failed.exception()) == "no memory"


def test_an_unmodified_model_that_cannot_be_measured_ends_the_run():
    made = schedule.Schedule(FakeRecord(ALL[1:]))
    with pytest.raises(
        FrankenError, match="unmodified model's perplexity cannot be measured: ValueError: no"
    ):
        made.measured(made.next(), schedule.Raised("ValueError", "no"))


def test_what_loses_three_workers_is_given_up():
    made = schedule.Schedule(FakeRecord(ALL[:1], matched=False))
    for _ in range(schedule.MOST_LOSSES - 1):
        assert made.lost(made.next()) is None
    job = made.next()
    assert made.lost(job) is job
    assert made.empty()
    noise = schedule.Job(0, fraction=0.5)
    made._losses[noise.name] = 2
    with pytest.raises(
        FrankenError, match="3 workers were lost while they measured perplexity with noise 0.5"
    ):
        made.lost(noise)


# ---- how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "free", "cards"),
    [(3, [80, 80], 1), (61, [79, 79], 1), (61, [40, 40, 40, 40], 2), (130, [79] * 8, 2), (400, [79, 79], 2)],
)
def test_a_model_takes_as_many_cards_as_hold_it(needed, free, cards):
    assert crews.cards_each(needed * GIB, [f * GIB for f in free]) == cards


class Model(replica.ModelOptions):
    """Options whose model weighs what the test says."""

    def weight_bytes(self):
        return 14 * GIB


def options(**changes):
    args = run_all.parse_arguments([])
    for name, value in changes.items():
        setattr(args, name, value)
    made = replica.ModelOptions.of(args)
    return Model(**{name: getattr(made, name) for name in made.__dataclass_fields__})


@pytest.fixture
def cards(monkeypatch):
    """cards(N, GiB): as if this machine had so many."""

    def have(count, free):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(crews.torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(crews.torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(crews, "card_memory", lambda: [free * GIB] * count)
        monkeypatch.setattr(crews, "has_ray", lambda: True)
        monkeypatch.setattr(crews, "available_memory", lambda device: [64 * GIB])

    return have


@pytest.mark.parametrize(
    ("count", "free", "wanted", "expected"),
    [
        (0, 0, None, None),  # no card: one process
        (1, 79, None, None),
        (2, 79, None, (2, 1)),  # one each
        (8, 16, None, (4, 2)),  # one for each group that holds the model
        (2, 16, None, None),  # it takes both: one process, over both
        (4, 79, 3, (3, 1)),
        (4, 79, 1, None),
        (0, 0, 4, (4, 0)),  # on processors
    ],
)
def test_by_default_there_is_a_worker_for_every_group_of_cards_that_holds_the_model(
    cards, count, free, wanted, expected
):
    cards(count, free)
    crew = crews.choose_crew(wanted, options())
    assert (crew and (crew.workers, crew.cards)) == expected


def test_more_workers_than_cards_or_memory_are_refused(cards):
    cards(2, 79)
    with pytest.raises(FrankenError, match="--workers 3: there are 2 GPUs, which is enough for 2"):
        crews.choose_crew(3, options())
    cards(4, 16)
    with pytest.raises(FrankenError, match="there are 4 GPUs and one model takes 2 of them, .* enough for 2"):
        crews.choose_crew(3, options())
    cards(0, 0)
    with pytest.raises(
        FrankenError, match="that many models need 77.0 GiB of memory and this machine has 64"
    ):
        crews.choose_crew(5, options())


def test_threads_are_shared_out_and_kept_by_a_run_that_goes_on(cards, monkeypatch):
    cards(0, 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(crews, "allowed_threads", lambda: 8)
    assert crews.choose_crew(4, options()).threads == 2
    assert crews.choose_crew(4, options(), threads=5).threads == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert crews.choose_crew(4, options()).threads == 8


def test_without_ray_workers_are_refused_in_a_line_that_says_what_to_install(go, monkeypatch):
    monkeypatch.setattr(crews, "has_ray", lambda: False)
    refused(
        go("--workers", "2"), "--workers 2 needs Ray, which is not installed: pip install -r requirements-"
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "[::1]:{}", "ray://127.0.0.1:{}"])
@pytest.mark.extra("ray")
def test_a_ray_that_is_not_there_is_said_at_once(go, monkeypatch, form):
    """Ray itself goes on trying for minutes. The port is one that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", form.format(port))
    began = time.monotonic()
    refused(go("--workers", 2, "--experiments", "baseline_instruct"), "cannot be joined: ")
    assert time.monotonic() - began < 40


def test_without_ray_several_cards_run_one_process(cards, monkeypatch):
    cards(2, 79)
    monkeypatch.setattr(crews, "has_ray", lambda: False)
    assert crews.choose_crew(None, options()) is None


# ---- what is shown and compared ----------------------------------------------------------------------------


def hand(number, state, job=None, doing=None):
    made = workers.Hand(number, None)
    made.state, made.job = state, job
    made.doing = doing or workers.Doing("")
    return made


def shown(hands, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    fleet = workers.Fleet(crews.Crew(len(hands), 0, 1), options(), lambda: None)
    fleet.hands, lines = hands, []
    fleet._show(SimpleNamespace(set_description_str=lines.append))
    return lines[0]


def test_the_progress_line_says_what_every_worker_does(monkeypatch):
    plan = named("blend_linear").plan(6)
    job = schedule.Job(0, plan)
    hands = [hand(1, "working", job, workers.Doing("binary", 1, 7)), hand(2, "loading"), hand(3, "idle")]
    assert shown(hands, 200, monkeypatch) == "1 blend_linear: binary 1/7 | 2 loading | 3 idle"
    assert shown(hands, 70, monkeypatch) == "1 blend_linear | 2 loading | 3 idle"
    many = [hand(k, "working", job) for k in range(64)]
    assert shown(many, 80, monkeypatch).startswith("64 working: 0 blend_linear | 1 blend_linear")


def test_what_a_worker_says_is_escaped(monkeypatch):
    plan = named("blend_linear").plan(6)
    doing = workers.Doing("\x1b]0;owned\x07", 1, 2)
    line = shown([hand(1, "working", schedule.Job(0, plan), doing)], 200, monkeypatch)
    assert "\x1b" not in line and "\x07" not in line and "owned" in line


def test_a_worker_with_other_weights_or_questions_is_told_from_the_first():
    first = replica.Loaded(
        (), {}, 6, "float32", ("cpu",), "aa", "bb", {"moment": None}, {"devices": ["H100"]}, {}, {}, 1.0
    )
    assert replica.differences(first, first) == []
    other = replace(first, fingerprint="cc", depends_on={"devices": ["A100"]}, seconds=9.0, notes=("x",))
    assert [c.what for c in replica.differences(first, other)] == ["devices", "weights"]


# ---- torchrun and accelerate launch ------------------------------------------------------------------------


def test_of_processes_that_torchrun_or_accelerate_start_the_first_does_the_run(monkeypatch, capfd):
    ran = []
    monkeypatch.setattr(run_all, "execute", lambda args: ran.append(args.workers) or 0)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_all.main(["--device-map", "cpu"]) == 0 and ran == []
    monkeypatch.setenv("RANK", "0")
    assert run_all.main(["--device-map", "cpu"]) == 0 and ran == [4]
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    assert "1 of 4 processes" in capfd.readouterr().err


def test_what_a_launcher_says_to_libraries_is_taken_back_from_its_only_process_too(monkeypatch):
    monkeypatch.setattr(run_all, "execute", lambda args: 0)
    said = ("RANK", "LOCAL_RANK", "ROLE_WORLD_SIZE", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID")
    for name in said:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_all.main(["--device-map", "cpu"]) == 0
    assert not {*said, "WORLD_SIZE"} & set(os.environ) and "PATH" in os.environ


@pytest.mark.parametrize("more", [{"LOCAL_WORLD_SIZE": "8"}, {}], ids=["torchrun", "a cluster's own"])
def test_processes_of_several_machines_are_told_what_to_type(monkeypatch, capfd, more):
    for name, value in {"WORLD_SIZE": "16", **more, "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    code = run_all.main(["--pair", "smollm2-135m"])
    refused((code, *capfd.readouterr()), "ray start --head")


# ---- with Ray ----------------------------------------------------------------------------------------------


@pytest.fixture
def battery(monkeypatch):
    """The small battery, here and in every worker."""
    small_battery.use(monkeypatch)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [TESTS, before])))
    monkeypatch.setenv(small_battery.DRIVER, str(os.getpid()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(run_all, "register_suites", small_battery.in_worker)


def worker_processes(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Of Ray's that work for this process (or that one), those that hold a model."""
    below = (of or psutil.Process()).children(recursive=True)
    out = []
    for process in below:
        try:
            if any(word.startswith("ray::Worker") for word in process.cmdline()):
                out.append(process)
        except psutil.Error:
            continue
    return out


def without_times(path: Path) -> dict:
    """A run's comparison without what the clock decides."""

    def strip(value):
        if isinstance(value, dict):
            return {
                k: strip(v) for k, v in value.items() if "seconds" not in k and k not in ("created", "run")
            }
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads((path / "comparison.json").read_text()))


@pytest.mark.extra("ray")
@pytest.mark.timeout(900)
def test_two_workers_give_what_one_process_gives(go, tmp_path, battery, four):
    code, out, err = go(*FOUR, "--workers", "2")
    assert code == 0, err
    run = latest(tmp_path / "out")
    assert timeless(run) == timeless(four)
    assert json.loads((run / "manifest.json").read_text())["workers"] == {
        "workers": 2,
        "gpus_each": 0,
        "joined": False,
    }
    assert "4 experiments on 2 workers, each on torch.float32 cpu" in err and "blend_linear" in out
    assert not worker_processes() and not list(Path("/tmp").glob(f"{crews.FOLDER}{os.getpid()}-*"))


SIX = ["--experiments", "swap_adjacent_30_35", "swap_distant_10_55", "perturb_all_5pct", "blend_linear"]
SIX += ["placebo_both_1", "shuffle_all", "--matched-noise"]


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_workers_one_of_them_killed_give_what_one_process_gives(go, tmp_path, battery, monkeypatch):
    code, out, err = go(*SIX, out="one")
    assert code == 0, err
    killed, keep = [], workers.Record.keep

    def kill_once(record, plan, result):
        kept = keep(record, plan, result)
        if not killed and record.run.path.parent.name == "four":
            victim = worker_processes()[-1]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)
        return kept

    monkeypatch.setattr(workers.Record, "keep", kill_once)
    code, out_four, err = go(*SIX, "--workers", "4", out="four")
    assert code == 0, err
    assert len(killed) == 1
    one, four = latest(tmp_path / "one"), latest(tmp_path / "four")
    assert timeless(four) == timeless(one)
    names = [json.loads((run / "manifest.json").read_text())["experiments"] for run in (one, four)]
    assert names[0] == names[1] and len(names[0]) > 7
    assert without_times(four) == without_times(one)
    assert {f.name for f in one.iterdir()} == {f.name for f in four.iterdir()}
    assert not list(Path("/tmp").glob("franken-ray-*")) or not worker_processes()
    words = [line for line in err.replace("\r", "\n").splitlines() if "ray" in line.lower()]
    assert [w for w in words if "run_" not in w] == []  # Ray itself says nothing


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_interrupted_goes_on_with_another_number_of_workers(
    pair, four, tmp_path, battery, capfd, monkeypatch
):
    log = tmp_path / "log"
    argv = small_battery.arguments(pair, tmp_path / "out", *FOUR, "--workers", "2")
    process = small_battery.in_child(argv, log)
    end = time.monotonic() + 300
    while not list((tmp_path / "out").glob("run_*/experiments/*.json")):
        assert process.is_alive() and time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.02)
    theirs = worker_processes(psutil.Process(process.pid))
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    run = latest(tmp_path / "out")
    assert process.exitcode == 130 and "go on with:" in log.read_text()
    assert theirs and not [p for p in theirs if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    kept = stamps(run)
    assert 1 <= len(kept) <= 4
    code, _, err = resumed(run, capfd, "--workers", "3")
    assert code == 0, err
    assert {k: v for k, v in stamps(run).items() if k in kept} == kept
    assert timeless(run) == timeless(four)
    for name in list(stamps(run))[:2]:
        (run / "experiments" / name).unlink()
    code, _, err = resumed(run, capfd)  # and one process
    assert code == 0, err
    assert timeless(run) == timeless(four)


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_kills_every_worker_is_recorded_as_failed_and_the_rest_is_done(
    go, tmp_path, battery, monkeypatch, four
):
    monkeypatch.setenv(small_battery.DEADLY, "blend_linear")
    code, _, err = go(*FOUR, "--workers", "2")
    run = latest(tmp_path / "out")
    assert code == 1, err
    result = Run(run).load("blend_linear")
    assert result["error"]["type"] == "WorkerLost" and not result["weights"]["exact"]
    assert err.count("was lost (its process ended); blend_linear is run again") == 2
    found, expected = timeless(run), timeless(four)
    assert {k: v for k, v in found.items() if k != "blend_linear"} == {
        k: v for k, v in expected.items() if k != "blend_linear"
    }


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pair_that_cannot_be_loaded_is_refused_in_one_line(pair, tmp_path, battery, capfd):
    shutil.copytree(pair, tmp_path / "pair")
    (tmp_path / "pair" / "instruct" / "tokenizer.json").write_text("{}")
    capfd.readouterr()
    argv = small_battery.arguments(tmp_path / "pair", tmp_path / "out", *FOUR, "--workers", "2")
    refused((run_all.main(argv), *capfd.readouterr()), "cannot load the tokenizer")


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
    "accelerate, one process": ["accelerate", "launch", "--num_processes", "1"],
}


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("words", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_run_by_a_real_launcher_is_one_run_with_its_processes_as_workers(pair, tmp_path, words):
    script = Path(sys.executable).with_name(words[0])
    if not script.exists():
        pytest.skip(f"no {words[0]} command here")
    asked = ["--experiments", "swap_adjacent_30_35", "--suites", "perplexity"]
    argv = small_battery.arguments(pair, tmp_path / "out", *asked)
    done = subprocess.run(
        [script, *words[1:], "run_all.py", *argv],
        cwd=Path(TESTS).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "out").glob("run_*")
    assert len(list(run.glob("experiments/*.json"))) == 2 and done.stdout.count("\nswap_adjacent_30_35 ") == 1
    crew = json.loads((run / "manifest.json").read_text()).get("workers")
    assert (crew and crew["workers"]) == (None if "1" in words else 2)
    assert done.stderr.count("this is 1 of 2 processes") == (0 if "1" in words else 1)


@pytest.fixture
def two_machines(monkeypatch):
    """Two machines of one processor each, as Ray sees them: its head and another node, both on this one. The
    address of the head stands in RAY_ADDRESS; returns both processes."""
    script = Path(sys.executable).with_name("ray")
    if not script.exists():
        pytest.skip("no ray command here")
    port, folder = 20000 + os.getpid() % 20000, Path(f"/tmp/fr{os.getpid()}")
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = [f"--port={port}", "--head", "--include-dashboard=false", f"--temp-dir={folder}"]
    started: list[subprocess.Popen] = []
    try:
        for k, more in enumerate((head, [f"--address={address}"])):
            command = [script, "start", *more, "--num-cpus=1", "--disable-usage-stats", "--block"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            started.append(process)
            end = time.monotonic() + 200
            while len(list(folder.glob("session_latest/sockets/raylet*"))) <= k:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.5)
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield started
    finally:
        for process in started[::-1]:
            process.terminate()
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_on_two_machines_are_joined_and_one_machine_may_go(
    go, tmp_path, battery, monkeypatch, four, two_machines
):
    seen, keep = [], workers.Record.keep

    def end_the_second(record, plan, result):
        kept = keep(record, plan, result)
        if not seen:
            seen.append([len(worker_processes(psutil.Process(node.pid))) for node in two_machines])
            two_machines[1].terminate()
        return kept

    monkeypatch.setattr(workers.Record, "keep", end_the_second)
    monkeypatch.setattr(workers.Fleet, "run", waiting_for_all(workers.Fleet.run))
    code, _, err = go(*FOUR, "--workers", "2")
    assert code == 0, err
    assert seen == [[1, 1]]  # a worker on each
    assert timeless(latest(tmp_path / "out")) == timeless(four)


def waiting_for_all(run):
    """Fleet.run, begun when every worker is loaded, so that each has something to do."""

    def waited(fleet, record):
        fleet.wait_for_all()
        return run(fleet, record)

    return waited


@pytest.mark.extra("ray")
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_with_real_weights_give_what_one_process_gives(tmp_path, capfd, monkeypatch, smollm2):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for out, more in (("one", []), ("two", ["--workers", "2"])):
        argv = ["--pair", "smollm2-135m", "--device-map", "cpu", "--suites", "perplexity", *more]
        argv += ["--experiments", "swap_adjacent_31_32", "--output", str(tmp_path / out)]
        assert run_all.main(argv) == 0, capfd.readouterr().err
    one, two = (timeless(latest(tmp_path / out)) for out in ("one", "two"))
    assert one == two and len(one) == 2
