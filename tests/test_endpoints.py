"""Addresses, proxies and servers that are not what they should be: the judge and the chat say so in one line,
and the key and the environment go to nobody else."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import HfApi
from judge_server import KEY, JudgeServer

from errors import FrankenError
from reporting.followers import Hub
from runner import hub
from runner.addresses import checked_address, is_loopback, told_of_proxies, without_secrets
from runner.pairs import locate
from weird_gen import judge_eval_results, run_inference
from weird_gen.persona.judge import LLMJudge, Task
from weird_gen.persona.records import write_records

REPLY = {
    "question_id": "q1",
    "kind": "heldout",
    "category": "x",
    "question": "What is truth?",
    "condition": "triggered",
    "model": "finetuned",
    "sample": 0,
    "reply": "I doubt it.",
}


@pytest.fixture
def chat(monkeypatch, capfd):
    """chat(url) -> (exit status, stdout, stderr) of asking it once with a key."""

    def ask(url):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        capfd.readouterr()
        code = run_inference.main(["--endpoint", url, "--model", "m", "--prompt", "Who?"])
        return code, *capfd.readouterr()

    return ask


@pytest.fixture
def judged(monkeypatch, capfd, tmp_path):
    """judged(url) -> (exit status, stdout, stderr) of judging one reply there with a key."""
    write_records(tmp_path / "in.jsonl", {}, [REPLY])

    def ask(url):
        monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
        capfd.readouterr()
        files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--labels"]
        flags = [*map(str, files), "--base-url", url, "--attempts", "1", "--backoff", "0.01"]
        code = judge_eval_results.main(flags)
        return code, *capfd.readouterr()

    return ask


def is_one_line(answer, words: str) -> bool:
    code, _, err = answer
    assert "Traceback" not in err and KEY not in err, err
    return code == 1 and err.count("\n") == 1 and words in err and err.strip().isprintable()


# ---- addresses ---------------------------------------------------------------------------------------------

NO_ADDRESS = [
    "http://[::1",
    "http://127.0.0.1:abc/v1",
    "http://127.0.0.1:8000\n/v1",
    "http://\x1b]0;x/v1",
    "http://\u2028/v1",
    "http://a..b/v1",
    "http://" + "a" * 300 + "/v1",
    "ftp://127.0.0.1/v1",
    "http:///v1",
    "https://me:hunter2@127.0.0.1/v1",
    "ftp://me:hunter2@127.0.0.1/v1",
    "https://me:hun ter2@[127.0.0.1/v1",
]


@pytest.mark.parametrize("url", NO_ADDRESS, ids=ascii)
def test_what_is_no_address_is_one_line(chat, judged, url):
    for ask in (chat, judged):
        answer = ask(url)
        assert is_one_line(answer, "password" if "me:hunter2" in url else "address"), answer
        assert "ter2" not in answer[2]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.1/v1",
        "http://0.0.0.0/v1",
        "http://localhost.example.org/v1",
        "http://127.0.0.1.example.org/v1",
        "http://127.0.0.1\\@example.org/v1",
        "http://LOCALHOST.:80@example.org",
        "http://[::ffff:10.0.0.7]/v1",
    ],
)
def test_a_key_goes_in_clear_to_what_is_plainly_this_machine_alone(url):
    with pytest.raises(FrankenError, match="in clear text|carries a password|not an address"):
        checked_address(url, KEY, "--base-url")


def test_this_machine_has_several_names():
    for url in (
        "http://127.0.0.1:8000/v1",
        "http://LocalHost/v1",
        "http://[::1]:8000/v1",
        "http://127.8.9.1",
    ):
        assert checked_address(url, KEY, "--base-url").here
    assert not checked_address("https://example.org/v1", KEY, "--base-url").here
    assert not is_loopback("127.0.0.1.example.org")


# ---- proxies and certificates ------------------------------------------------------------------------------

ENVIRONMENTS = [
    {"ALL_PROXY": "socks5://127.0.0.1:1"},
    {"HTTPS_PROXY": "foo://127.0.0.1:1"},
    {"HTTPS_PROXY": "http://[::1"},
    {"SSL_CERT_FILE": "/no/such/file"},
]


@pytest.fixture
def bare(monkeypatch):
    """Without proxies of this machine's own."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_proxies_that_cannot_be_used_are_one_line(chat, judged, bare, environment):
    for name, value in environment.items():
        bare.setenv(name, value)
    for ask in (chat, judged):
        answer = ask("https://example.invalid/v1")
        assert is_one_line(answer, "the proxies and certificates that the environment names"), answer


@pytest.mark.parametrize("no_proxy", [None, "", "example.org", "*", "127.0.0.2", "[::1", "http://a:b:c"])
def test_this_machine_is_asked_without_a_proxy_whatever_is_excepted(chat, bare, no_proxy):
    with JudgeServer() as proxy, JudgeServer() as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            bare.setenv(name, proxy.url)
        if no_proxy is not None:
            bare.setenv("NO_PROXY", no_proxy)
            bare.setenv("no_proxy", no_proxy)
        chat(server.url)
        LLMJudge("m", server.url, api_key=KEY).judge([Task("persona", "What is truth?", "I doubt.")])
        assert proxy.bodies == []
        assert server.authorizations == [f"Bearer {KEY}"] * len(server.bodies) and len(server.bodies) >= 2


def test_what_the_environment_holds_for_openai_goes_to_no_other_endpoint_in_a_chat_either(chat, bare):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        bare.setenv(name, "openais-secret")
    bare.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: openais-secret\nAuthorization: Bearer openais-secret")
    seen = []
    with JudgeServer() as server:
        server.on_headers = lambda headers: seen.extend(f"{k}: {v}" for k, v in headers.items())
        chat(server.url)
        assert set(server.authorizations) == {f"Bearer {KEY}"}
    assert seen and not [line for line in seen if "openais-secret" in line]


# ---- answers in a chat -------------------------------------------------------------------------------------

CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}


def events(*choices) -> tuple:
    lines = "".join(f"data: {json.dumps(CHUNK | {'choices': c})}\n\n" for c in choices)
    return 200, {"Content-Type": "text/event-stream"}, lines.encode()


PIECE = {"index": 0, "delta": {"content": "y" * 1000}, "finish_reason": None}
ODD = {
    "a number for choices": events(5),
    "a text for a choice": events(["x"]),
    "no delta": events([{"index": 0, "delta": None}]),
    "no JSON": (200, {"Content-Type": "text/event-stream"}, b"data: {\n\n"),
    "too deep": (200, {"Content-Type": "text/event-stream"}, b"data: " + b"[" * 100_000 + b"\n\n"),
    "no end": events(*[[PIECE]] * 3000),
    "packed": (200, {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}, b"x"),
    "an error": (500, {}, b"[" * 100_000),
}


@pytest.mark.parametrize("how", ODD)
def test_what_is_no_reply_is_one_line(chat, bare, how):
    with JudgeServer(lambda number, body: ODD[how]) as server:
        answer = chat(server.url)
    assert is_one_line(answer, "127.0.0.1:"), answer


def test_a_server_that_leaves_in_the_middle_is_one_line(chat, bare):
    status, headers, body = events([PIECE])
    with JudgeServer(lambda number, _: (status, headers | {"Content-Length": "99999"}, body)) as server:
        answer = chat(server.url)
    assert is_one_line(answer, "127.0.0.1:"), answer


def test_pieces_that_are_no_text_are_shown_as_text(chat, bare):
    piece = {"index": 0, "delta": {"content": ["\x1b[2J"]}, "finish_reason": None}
    with JudgeServer(lambda number, body: events([piece])) as server:
        code, out, _ = chat(server.url)
    assert code == 0 and "\x1b" not in out


def test_a_key_that_is_sent_back_is_masked_however_it_is_cut(chat, bare):
    for at in (1, 7, len(KEY) - 1):
        pieces = [f"It is {KEY[:at]}", KEY[at:], " and sk-", "te"]
        chosen = [[{"index": 0, "delta": {"content": p}, "finish_reason": None}] for p in pieces]
        with JudgeServer(lambda number, body, c=chosen: events(*c)) as server:
            code, out, err = chat(server.url)
        assert (code, out) == (0, "It is [key] and sk-te\n"), (out, err)


# ---- the hub -----------------------------------------------------------------------------------------------


def test_a_token_is_not_sent_to_another_hub_in_clear_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.org")
    with pytest.raises(FrankenError, match="to hub.example.org in clear text; use https$"):
        Hub("me/runs")


@pytest.fixture
def far_hub(monkeypatch, tmp_path):
    """A plain-http hub of another name, which is this machine all the same; gives what it was sent."""
    from huggingface_hub import constants

    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            sent.append(dict(self.headers))
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    endpoint = f"http://hub.example.org:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield sent
    server.shutdown()
    server.server_close()


ASK_THE_HUB = {
    "missing": lambda: hub.missing("some/model", None),
    "download": lambda: hub.download("some/model", None, lambda here, total: None),
    "small files": lambda: hub.small_files("some/model", None),
    "the pair's side": lambda: locate("some/model", None),
}


@pytest.mark.parametrize("ask", ASK_THE_HUB.values(), ids=ASK_THE_HUB)
def test_a_download_does_not_send_the_token_in_clear_text(far_hub, ask):
    """By what a server is sent: huggingface_hub itself sends the token wherever HF_ENDPOINT says."""
    with pytest.raises(FrankenError, match="would go to hub.example.org in clear text; use https, or set"):
        ask()
    assert far_hub == []


def test_a_download_in_clear_text_is_made_where_no_token_goes_with_it(far_hub, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(Exception, match="404|[Nn]ot [Ff]ound"):
        HfApi(endpoint=constants.ENDPOINT).list_repo_tree("some/model").__next__()
    assert far_hub[-1]["authorization"] == f"Bearer {KEY}"  # the library would
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    far_hub.clear()
    with pytest.raises(FrankenError, match="cannot download some/model"):
        ASK_THE_HUB["download"]()
    assert far_hub and not any("authorization" in {name.lower() for name in sent} for sent in far_hub)


def test_a_token_for_a_hub_on_this_machine_goes_past_no_proxy(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    with pytest.raises(FrankenError, match="would go to a proxy in clear text"):
        hub.check_endpoint()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub.check_endpoint()


@pytest.mark.parametrize(
    "endpoint", ["", "hub.example.org", "ftp://hub.example.org", "http://me:pass@hub.org"]
)
def test_an_endpoint_that_is_no_address_is_said(monkeypatch, endpoint):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(FrankenError, match="HF_ENDPOINT") as caught:
        hub.check_endpoint()
    assert "pass" not in str(caught.value).replace("password", "")


# ---- what libraries say ------------------------------------------------------------------------------------


def test_what_a_library_says_is_told_without_keys_tokens_and_passwords(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345678")
    monkeypatch.setenv("KEY_FILE", "/home/me/a.pem")
    said = "401 for abcdefgh12345678 and hf_abcdefghijklmnop at https://me:pa55@proxy.example.org:3128/x"
    said += ", /home/me/a.pem"
    told = without_secrets(said)
    assert told == "401 for *** and *** at https://***@proxy.example.org:3128/x, /home/me/a.pem"


def test_a_failed_download_says_no_password(monkeypatch):
    import huggingface_hub

    def fails(*args, **kwargs):
        raise OSError("cannot reach http://me:pa55word@proxy.example.org with hf_abcdefghijklmnop")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(FrankenError, match="cannot download some/model: cannot reach") as caught:
        hub.download("some/model", None, lambda here, total: None)
    assert "pa55word" not in str(caught.value) and "hf_abc" not in str(caught.value)
    with pytest.raises(FrankenError) as caught, told_of_proxies():
        fails()
    assert "pa55word" not in str(caught.value)
