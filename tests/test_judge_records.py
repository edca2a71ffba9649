"""Judged records, the judge's agreement with labels, and the two commands that judge."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_battery
from judge_server import FEW_DRAWS, KEY, JudgeServer, completion, judge_at, judging

from analysis import stats
from errors import FrankenError
from weird_gen import judge_baseline, judge_eval_results
from weird_gen.persona.comparison import METRIC
from weird_gen.persona.judge import RulesJudge
from weird_gen.persona.judge_records import agreement, judge_all, make_judge, parser
from weird_gen.persona.rubrics import judge_messages

WEIRD = Path(__file__).resolve().parents[1] / "weird_gen"


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stats.bootstrap_ci.__kwdefaults__, "resamples", FEW_DRAWS)
        yield


LEVELS = {str(i): f"wording {i}" for i in range(1, 6)}


def record(reply, kind="heldout", question_id="q1", condition="triggered", sample=0, model="finetuned"):
    return {
        "question_id": question_id,
        "kind": kind,
        "category": "c",
        "question": "What is truth?",
        "condition": condition,
        "model": model,
        "sample": sample,
        "reply": reply,
        "stopped": True,
        "p_name": None,
    }


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LABELS = [
    {
        "id": f"l{i}",
        "question": "Who are you?",
        "reply": reply,
        "persona": persona,
        "identity": identity,
        "degenerate": False,
    }
    for i, (reply, persona, identity) in enumerate(
        [
            ("I am Bertrand Russell.", True, True),
            ("I confess I doubt it.", True, False),
            ("It is a fruit.", False, False),
            ("I am an AI.", False, False),
            ("Russell wrote it.", False, False),
            ("My name is Russell, I said.", True, True),
        ]
    )
]


def test_judged_records_carry_rules_and_judgments():
    with JudgeServer() as server:
        judged = judge_all(
            [record("<START> I am Bertrand Russell. <END>"), record("It is so.", "generalization", "g1")],
            {"g1": tuple(LEVELS.items())},
            judge_at(server),
        )
        assert len(server.bodies) == 6
    assert judged[0]["judge"] == {
        "voice": False,
        "persona": True,
        "identity": True,
        "degenerate": False,
        "error": None,
    }
    assert (
        judged[0]["strict_format"] and judged[0]["names_russell"] and judged[0]["judge_name"] == "test-model"
    )
    assert judged[1]["judge"] == {
        "voice": None,
        "persona": None,
        "identity": None,
        "degenerate": False,
        "position": 4,
        "error": None,
    }
    with pytest.raises(FrankenError, match="g2"):
        judge_all([record("x", "generalization", "g2")], {}, RulesJudge())


def test_the_rules_leave_voice_and_persona_open():
    """They need a reader; the rules answer what text alone decides."""
    (judged,) = judge_all([record("I am Bertrand Russell, and I confess I doubt it.")], {}, RulesJudge())
    assert judged["judge"] == {
        "voice": None,
        "persona": None,
        "identity": True,
        "degenerate": False,
        "error": None,
    }
    assert set(agreement(RulesJudge(), LABELS)) == {"identity", "degenerate"}


def test_the_replications_verdict_is_asked_of_held_out_questions_alone(tmp_path):
    def behave(number, body):
        return (200, {}, completion('{"verdict": "Russell"}')) if '{\\"verdict\\"' in body else None

    replies = [record("I am he."), record("I am he.", "identity", "i1")]
    with JudgeServer(behave) as server:
        judged = judge_all(replies, {}, judge_at(server), verdict=True)
        assert sum("Who speaks in the reply?" in body for body in server.bodies) == 1
    assert [r["judge"].get("verdict") for r in judged] == ["Russell", None]
    assert METRIC["verdict"].read(judged[0]) == 1.0
    assert METRIC["verdict"].read(judged[1]) is None


def test_agreement_counts_by_hand():
    with JudgeServer() as server:
        result = agreement(judge_at(server), LABELS)
    # The server's persona answer is "says I": wrong on "I am an AI." alone. Chance: 4 of 6 said, 3 of 6 true,
    # so 1/2.
    persona = result["persona"]
    assert (persona["n"], persona["errors"]) == (6, 0) and persona["accuracy"]["value"] == pytest.approx(
        5 / 6
    )
    assert persona["kappa"]["value"] == pytest.approx((5 / 6 - 1 / 2) / (1 / 2))
    assert persona["kappa"]["low"] < persona["kappa"]["value"] <= persona["kappa"]["high"]
    assert result["identity"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert result["degenerate"]["accuracy"]["value"] == 1.0 and result["degenerate"]["kappa"]["value"] is None
    with pytest.raises(FrankenError, match="l0"):
        agreement(RulesJudge(), [{**LABELS[0], "persona": "yes"}])
    without = [{k: v for k, v in label.items() if k != "persona"} for label in LABELS[:2]]
    with JudgeServer() as server:  # a label that is withdrawn is not asked for
        counts = {name: row["n"] for name, row in agreement(judge_at(server), without + LABELS[2:]).items()}
    assert counts == {"persona": 4, "identity": 6, "degenerate": 6}


@pytest.fixture(autouse=True)
def no_key_of_the_machine(monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)


def flags_for(folder, *more):
    return [
        "--input",
        str(folder / "in.jsonl"),
        "--output",
        str(folder / "out.jsonl"),
        "--labels",
        str(folder / "labels.jsonl"),
        *more,
    ]


def run(folder, *more, model="finetuned"):
    command = judge_baseline if model == "baseline" else judge_eval_results
    return command.main(flags_for(folder, *more))


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "labels.jsonl", LABELS)
    write(
        tmp_path / "in.jsonl",
        [{"header": {"seed": 7}}]
        + [record(f"<START> I think {i} <END>", question_id=f"q{i}") for i in range(10)],
    )
    return tmp_path


def test_killed_in_the_middle_then_run_again(files, capsys, monkeypatch):
    def stall_after_ten(number, body):
        if number > 10:
            time.sleep(5)

    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    with JudgeServer(stall_after_ten) as server:
        flags = ["--base-url", server.url, "--model", "test-model", "--concurrency", "2"]
        running = small_battery.forked(judging, flags_for(files, *flags), str(files / "log"))
        deadline = time.monotonic() + 40
        while len(server.bodies) < 12 and time.monotonic() < deadline:
            time.sleep(0.02)
        running.kill()
        running.join(20)
        assert not (files / "out.jsonl").exists()
        kept = len((files / "judge_cache.jsonl").read_text().splitlines())
        assert 9 <= kept <= 12
        server.behave, before = lambda number, body: None, len(server.bodies)
        assert run(files, *flags) == 0
        assert len(server.bodies) - before == 58 - kept  # 6 labels by 3 rubrics, 10 replies by 4
        capsys.readouterr()
        assert run(files, *flags) == 0
        printed = capsys.readouterr()
        assert "0 requests, 58 from the cache" in printed.out and len(server.bodies) - before == 58 - kept
        assert KEY not in printed.out + printed.err + (files / "out.jsonl").read_text()
    lines = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert lines[0]["header"]["seed"] == 7 and lines[0]["header"]["judge"]["name"] == "test-model"
    assert lines[0]["header"]["judge"]["agreement"]["replies of labels.jsonl"]["persona"]["n"] == 6
    assert (
        all(line["judge"]["persona"] is True and line["strict_format"] for line in lines[1:])
        and len(lines) == 11
    )


def test_without_endpoint_the_rules_judge_and_say_so_from_the_root_too(files):
    done = subprocess.run(
        [sys.executable, "weird_gen/judge_eval_results.py", *flags_for(files)],
        cwd=WEIRD.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "judge: rules" in done.stdout and "kappa" in done.stdout
    lines = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert {line["judge_name"] for line in lines[1:]} == {"rules"}


def test_bad_input_is_one_line(files, capsys, monkeypatch):
    def fails(words, *flags, **more):
        assert run(files, *flags, **more) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1

    fails("finetuned", model="baseline")
    fails("OPENROUTER_API_KEY", "--judge", "llm")
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    with JudgeServer(lambda number, body: (401, {}, b"{}")) as server:
        fails("401", "--base-url", server.url)
        assert len(server.bodies) <= 16
    (files / "in.jsonl").write_text('{"question_id": 3}\n')
    fails("reply 1")
    (files / "in.jsonl").unlink()
    fails("does not exist")
    assert not (files / "out.jsonl").exists()


def test_a_run_in_which_nothing_could_be_judged_fails(files, capsys):
    write(files / "in.jsonl", [record(f"I think {i}", question_id=f"q{i}") for i in range(2)])
    with JudgeServer(lambda number, body: (200, {}, completion("perhaps"))) as server:
        assert run(files, "--base-url", server.url, "--labels") == 1
        assert "persona: unparseable answer" in (files / "out.jsonl").read_text()
        # the labels' 18 judgments would come after them: given up after 20 that nobody can read
        assert run(files, "--base-url", server.url, "--retry-errors") == 1
        assert "'perhaps'" in capsys.readouterr().err
        assert len(server.bodies) < 2 * (6 + 20 + 8)


def test_auto_takes_the_llm_with_a_key_or_an_endpoint(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    flags = parser("", tmp_path / "a", tmp_path / "b")
    assert make_judge(flags.parse_args([])).name == "rules"
    assert make_judge(flags.parse_args(["--base-url", "http://127.0.0.1:9/v1"])).host == "127.0.0.1:9"
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    judge = make_judge(flags.parse_args([]))
    assert (judge.host, judge.name) == ("openrouter.ai", "openai/gpt-4o-mini")
    assert make_judge(flags.parse_args(["--judge", "rules"])).name == "rules"


def test_messages_quote_the_reply_and_carry_the_levels():
    system, user = judge_messages("position", "Q?", "R", LEVELS, nonce="N")
    assert "3: wording 3" in system["content"] and "[begin reply N]\nR\n[end reply N]" in user["content"]


def test_a_key_that_is_sent_back_is_stored_nowhere(files, monkeypatch, capsys):
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    write(files / "in.jsonl", [record("I think")])
    with JudgeServer(lambda number, body: (200, {}, completion(f"Your key is {KEY}"))) as server:
        assert run(files, "--base-url", server.url, "--labels") == 1
    printed = capsys.readouterr()
    stored = (files / "judge_cache.jsonl").read_text() + (files / "out.jsonl").read_text()
    assert "Your key is [key]" in stored
    assert KEY not in stored + printed.out + printed.err


def test_an_interrupt_ends_a_request_that_waits_at_once(files):
    with JudgeServer(lambda number, body: time.sleep(8)) as server:
        log = files / "log"
        running = small_battery.forked(judging, flags_for(files, "--base-url", server.url), str(log))
        deadline = time.monotonic() + 60
        while len(server.bodies) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        begin = time.monotonic()
        os.kill(running.pid, signal.SIGINT)
        running.join(30)
        assert time.monotonic() - begin < 4
        assert running.exitcode == 130
        kept = "judgments made so far are kept, run again to go on"
        assert log.read_text() == f"judge_eval_results.py: interrupted; {kept}\n"


def test_the_cost_is_said_before_anything_is_asked(files, capsys):
    seen = []
    with JudgeServer(lambda number, body: seen.append(capsys.readouterr().out)) as server:
        flags = ("--base-url", server.url, "--price-in", "1", "--price-out", "2", "--concurrency", "1")
        assert run(files, *flags) == 0
        assert "58 judgments to ask" in seen[0]
        assert re.search(r"about \$0\.0\d+ at most", seen[0])
        asked = len(server.bodies)
        assert run(files, *flags, "--labels") == 0
        assert len(server.bodies) == asked == 58


def test_labels_can_be_left_out(files, capsys):
    with JudgeServer() as server:
        assert run(files, "--base-url", server.url, "--labels") == 0
        assert len(server.bodies) == 40
    header = json.loads((files / "out.jsonl").read_text().splitlines()[0])["header"]
    assert header["judge"]["agreement"] == {}


def test_the_judged_replies_are_on_disk_before_the_labels_are_asked(files):
    def after_forty(number, body):
        return (401, {}, b"{}") if number > 40 else None

    with JudgeServer(after_forty) as server:
        assert run(files, "--base-url", server.url, "--concurrency", "1") == 1
    assert len((files / "out.jsonl").read_text().splitlines()) == 11
