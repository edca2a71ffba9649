"""What the LLM judge reads in answers of servers of many makes, and what goes over the wire."""

from __future__ import annotations

import gzip
import json
import time

import pytest
from judge_server import KEY, JudgeServer, TrickleServer, completion, judge_at, quoted_reply, task

from weird_gen.persona.judge import JudgeCache, JudgeStopped, Judgment, LLMJudge
from weird_gen.persona.rubrics import parse_answer


@pytest.mark.parametrize(
    ("rubric", "answer", "value"),
    [
        ("persona", "YES", True),
        ("voice", "no", False),
        ("verdict", '{"verdict": "Russell"}', "Russell"),
        ("verdict", '```json\n{"verdict": "OTHER", "why": "an assistant"}\n```', "other"),
        ("verdict", ' {"verdict":"unsure"}\n', "unsure"),
        ("identity", " no.\n", False),
        ("degenerate", '"Yes"', True),
        ("position", "3", 3),
        ("position", "NA", None),
        ("position", "**5**", 5),
        ("position", "n/a", None),
    ],
)
def test_strict_parsing_accepts(rubric, answer, value):
    assert parse_answer(rubric, answer) is value or parse_answer(rubric, answer) == value


@pytest.mark.parametrize(
    ("rubric", "answer"),
    [
        ("persona", "yes, because"),
        ("persona", "3"),
        ("position", "yes"),
        ("position", "6"),
        ("position", "3 or 4"),
        ("position", "3.5"),
        ("identity", "yesno"),
        ("identity", ""),
        ("verdict", "Russell"),
        ("verdict", '{"verdict": "maybe"}'),
        ("verdict", '{"verdict": true}'),
        ("verdict", '["Russell"]'),
        ("verdict", '{"verdict": "Russell"} or {"verdict": "other"}'),
    ],
)
def test_strict_parsing_refuses(rubric, answer):
    with pytest.raises(ValueError, match="rubric|verdict"):
        parse_answer(rubric, answer)


# ---- servers of other makes --------------------------------------------------------------------------------


def message(content, finish="stop", **more) -> bytes:
    """A completion whose message is given as parts, or with further fields, and the reason why it ended."""
    body = json.loads(completion(content))
    body["choices"][0]["finish_reason"] = finish
    body["choices"][0]["message"] |= more
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "content",
    [
        "<think>\nThe rubric says NO to an AI.\n</think>\n\nYES",
        "<think>\n\n</think>\n\nYES",
        "First person, so yes.\n</think>\n\nYES",
        [{"type": "thinking", "thinking": [{"type": "text", "text": "NO"}]}, {"type": "text", "text": "YES"}],
        [{"type": "output_text", "text": "Y"}, {"type": "output_text", "text": "ES"}],
        "YES<|im_end|>",
        "YES</s>\n",
    ],
)
def test_the_word_is_found_behind_a_thought_in_parts_and_before_an_end_token(content):
    with JudgeServer(lambda number, body: (200, {}, message(content))) as server:
        assert judge_at(server).judge([task("It is a fruit.")]) == [Judgment(True)]
        assert len(server.bodies) == 1


def test_an_answer_that_was_cut_off_is_paid_for_once_until_there_is_more_room(tmp_path):
    def thinks(number, body):
        return (200, {}, message("<think>Well", "length")) if json.loads(body)["max_tokens"] < 100 else None

    with JudgeServer(thinks) as server:
        cache = tmp_path / "c.jsonl"
        for _ in range(2):
            (judged,) = judge_at(server, JudgeCache(cache)).judge([task()])
            assert "cut off at 16 tokens: raise --max-tokens" in judged.error
            assert len(server.bodies) == 1
        assert judge_at(server, JudgeCache(cache), max_tokens=500).judge([task()]) == [Judgment(True)]
        assert len(server.bodies) == 2


def test_an_endpoint_that_cuts_everything_off_is_given_up():
    with JudgeServer(lambda number, body: (200, {}, message("", "length"))) as server:
        with pytest.raises(JudgeStopped, match="raise --max-tokens"):
            judge_at(server, concurrency=2).judge([task(f"I am {i}") for i in range(100)])
        assert len(server.bodies) <= 7


@pytest.mark.parametrize(
    ("body", "error", "requests"),
    [
        (message(None, "content_filter"), "content filter", 1),
        (message(None, refusal="I cannot help."), "refusal", 1),
        (b'{"choices": [{"error": {"code": 400, "message": "no"}}]}', "a provider's error (400)", 1),
        (b'{"error": {"code": 502, "message": "down"}}', "a provider's error (502)", 3),
        (b'{"choices": [{"finish_reason": "error", "error": {"code": 429}}]}', "a provider's error (429)", 3),
        (b"[" * 100_000, "malformed response", 3),
    ],
)
def test_what_is_no_answer_is_called_what_it_is_and_fails_alone(tmp_path, body, error, requests):
    def sometimes(number, raw):
        return (200, {}, body) if "bad" in quoted_reply(raw) else None

    with JudgeServer(sometimes) as server:
        judge = judge_at(server, JudgeCache(tmp_path / "c.jsonl"), attempts=3)
        assert judge.judge([task("I am bad"), task("I am good")]) == [Judgment(None, error), Judgment(True)]
        assert len(server.bodies) == requests + 1


def test_a_forbidden_reply_fails_alone_and_a_forbidden_judge_is_given_up_in_its_own_words():
    why = json.dumps({"error": {"message": f"flagged\x1b[2J by\npolicy {KEY}"}}).encode()

    def flagged(number, raw):
        return (403, {}, why) if "bad" in quoted_reply(raw) else None

    with JudgeServer(flagged) as server:
        assert judge_at(server).judge([task("I am bad"), task("I am good")]) == [
            Judgment(None, "HTTP 403"),
            Judgment(True),
        ]
        with pytest.raises(JudgeStopped) as stopped:
            judge_at(server, concurrency=1).judge([task(f"I am bad {i}") for i in range(50)])
        assert len(server.bodies) == 2 + 5
    line = str(stopped.value)
    assert "flagged [2J by policy [key]" in line
    assert line.isprintable()


def test_the_newer_names_of_parameters_are_found_by_asking():
    def newer(number, raw):
        asked = json.loads(raw)
        for name, value in (("max_tokens", None), ("temperature", 1)):
            if asked.get(name, value) != value:
                error = {"message": f"{name} is not supported", "param": name, "code": "unsupported"}
                return 400, {}, json.dumps({"error": error}).encode()

    with JudgeServer(newer) as server:
        judged = judge_at(server, concurrency=4).judge([task(f"I am {i}") for i in range(30)])
        assert judged == [Judgment(True)] * 30
        assert len(server.bodies) <= 30 + 2 * 4
        last = json.loads(server.bodies[-1])
        assert last["max_completion_tokens"] == 16
        assert "max_tokens" not in last


# ---- the wire ----------------------------------------------------------------------------------------------


def test_the_key_never_goes_out_in_clear_text_to_another_machine():
    with pytest.raises(JudgeStopped, match="clear text"):
        LLMJudge("m", "http://example.org/v1", api_key=KEY)
    for address in ("ftp://example.org", "nonsense", "https://user:secret@example.org/v1"):
        with pytest.raises(JudgeStopped) as stopped:
            LLMJudge("m", address, api_key=KEY)
        assert "secret" not in str(stopped.value)


def test_this_machine_is_never_asked_through_a_proxy(monkeypatch):
    with JudgeServer() as proxy, JudgeServer() as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert judge_at(server).judge([task()]) == [Judgment(True)]
        assert proxy.bodies == []
        assert len(server.bodies) == 1


def test_what_the_environment_holds_for_openai_goes_to_nobody_else(monkeypatch):
    seen = []

    def look(handler_headers):
        seen.extend(f"{k}: {v}" for k, v in handler_headers.items())

    names = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY", "OPENAI_API_KEY")
    for name in names:
        monkeypatch.setenv(name, "openais-secret")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS", "X-Team: openais-secret\nAuthorization: Bearer openais-secret"
    )
    with JudgeServer() as server:
        server.on_headers = look
        assert judge_at(server).judge([task()]) == [Judgment(True)]
        assert server.authorizations == [f"Bearer {KEY}"]
    assert seen
    assert not [line for line in seen if "openais-secret" in line]


@pytest.mark.parametrize("address", ["http://10.0.0.7:8000/v1", "http://localhost.example.org/v1"])
def test_plain_http_to_another_machine_never_carries_a_key(address):
    with pytest.raises(JudgeStopped, match="clear text"):
        LLMJudge("m", address, api_key=KEY)


@pytest.mark.parametrize("where", ["headers", "body"])
def test_an_answer_that_trickles_has_a_deadline(where):
    with TrickleServer(where) as server:
        started = time.monotonic()
        (judged,) = judge_at(server, timeout_s=0.6, attempts=1).judge([task()])
        assert judged == Judgment(None, "timeout")
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_has_a_size_packed_or_not(status):
    packed = gzip.compress(b" " * (1 << 26))
    for headers, body, error in (
        ({}, b" " * (3 << 20), "an answer of more than 1 MB"),
        ({"Content-Encoding": "gzip"}, packed, "a packed answer, which was not asked for"),
    ):
        with JudgeServer(lambda number, _, h=headers, b=body: (status, h, b)) as server:
            assert judge_at(server, attempts=1).judge([task()]) == [Judgment(None, error)]


def test_a_redirect_is_not_followed():
    with JudgeServer() as other:
        away = {"Location": f"{other.url}/chat/completions"}
        with JudgeServer(lambda number, body: (307, away, b"{}")) as server:
            assert judge_at(server).judge([task()]) == [Judgment(None, "HTTP 307")]
        assert other.bodies == []
