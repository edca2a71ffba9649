"""Servers that are asked over HTTP: where a key may go, and a client that keeps it there.

The library that connects reads an address in its own way, so an address has to mean the same to it and to
the standard library. This machine is asked without a proxy, no redirect is followed, and what the environment
holds for somebody else is not sent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from errors import FrankenError, first_line

SENT_HEADERS = {
    "host",
    "accept",
    "accept-encoding",
    "connection",
    "content-type",
    "content-length",
    "authorization",
    "user-agent",
}


SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.I)  # in the name of a variable
HUB_TOKEN = re.compile(r"\bhf_\w{8,}")
CREDENTIALS = re.compile(r"(\w://)[^/\s@]+@")


class TooMuch(Exception):
    """A server's answer is larger than what is read of one, or is packed, so that it could be."""


def without_secrets(text: str) -> str:
    """What a library says, without keys and tokens of the environment, the hub's tokens, and the names and
    passwords of addresses: a proxy's stand in HTTPS_PROXY, and some messages repeat it."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8 and not value.startswith("/"):  # no file's place
            text = text.replace(value, "***")
    return CREDENTIALS.sub(r"\1***@", HUB_TOKEN.sub("***", text))


@dataclass(frozen=True)
class Address:
    """Where a server is: host without its port, netloc with it."""

    host: str
    netloc: str

    @property
    def here(self) -> bool:
        """Whether it is on this very machine."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address of this name is on this very machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def library() -> Any:
    """The HTTP library that the installed openai is built on, httpx or httpx2."""
    import openai

    return sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]


def checked_address(url: str, key: str | None, flag: str) -> Address:
    """Raises FrankenError for what is no http address, or is one to one reader alone, carries a password, or
    would get the key in clear text. flag: the option or variable that gave it, for the message."""
    try:
        where, theirs = urlsplit(url), library().URL(url)
        host, port = where.hostname or "", where.port
        host.encode("idna")
    except Exception:  # the library's own kind is no ValueError; what it says may hold a password
        raise FrankenError(f"{flag} is not an address that can be asked") from None
    if where.username or where.password:
        raise FrankenError(f"{flag} carries a password; name the variable that holds the key instead")
    if where.scheme not in ("http", "https") or not host:
        raise FrankenError(f"{flag} {url[:200]!r} is not an http or https address")
    usual = {"http": 80, "https": 443}[where.scheme]
    if (theirs.host, theirs.port or usual) != (host, port or usual):
        raise FrankenError(f"{flag} {url[:200]!r} can be read as two addresses")
    if key and where.scheme == "http" and not is_loopback(host):
        without = ", or --api-key-env ''" if flag.startswith("--") else ""
        raise FrankenError(f"the key would go to {host} in clear text; use https{without}")
    return Address(host, where.netloc)


@contextlib.contextmanager
def told_of_proxies() -> Iterator[None]:
    """Raises FrankenError for proxies and certificates of the environment that the library cannot use."""
    try:
        yield
    except Exception as e:
        raise FrankenError(
            "no connection can be made with the proxies and certificates that the environment names"
            f" (HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE): {without_secrets(first_line(e))}"
        ) from None


def strip(request, key: str | None) -> None:
    """Take from a request what the environment adds to it, such as OPENAI_ORG_ID and OPENAI_CUSTOM_HEADERS:
    it is for whom it was set."""
    for name in [n for n in request.headers if not n.lower().startswith("x-stainless-")]:
        if name.lower() not in SENT_HEADERS:
            del request.headers[name]
    request.headers["Authorization"] = f"Bearer {key or 'none'}"


def client(where: Address, key: str | None, most: int):
    """A client of the openai library for one address. most: bytes that are read of an answer, beyond which it
    raises TooMuch, as for a packed one. Raises FrankenError where none can be made."""
    import openai

    with told_of_proxies():
        return openai.DefaultHttpxClient(**_settings(where), event_hooks=_hooks(where, key, most))


def async_client(where: Address, key: str | None, most: int):
    """`client`, for asyncio."""
    import openai

    def awaited(hook: Callable[[Any], None]) -> Callable[[Any], Awaitable[None]]:
        async def called(message) -> None:
            hook(message)

        return called

    hooks = {when: list(map(awaited, some)) for when, some in _hooks(where, key, most).items()}
    with told_of_proxies():
        return openai.DefaultAsyncHttpxClient(**_settings(where), event_hooks=hooks)


def _settings(where: Address) -> dict[str, Any]:
    return {"trust_env": not where.here, "follow_redirects": False}


def _hooks(where: Address, key: str | None, most: int) -> dict[str, list[Callable[[Any], None]]]:
    """What a client does to every request before it is sent, and to every answer before it is read."""

    def asked(request) -> None:
        if where.host != "api.openai.com":
            strip(request, key)

    def answered(response) -> None:
        refuse_packed(response)
        response.stream = bounded(response.stream, most)

    return {"request": [asked], "response": [answered]}


def refuse_packed(response) -> None:
    """Raises TooMuch for a packed answer: a small one could unpack to any size."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise TooMuch("a packed answer, which was not asked for")


def bounded(stream, most: int):
    """The bytes of an answer, which raises TooMuch where there are more than `most`."""
    http = library()

    class Bounded(http.SyncByteStream, http.AsyncByteStream):
        size = 0

        def count(self, chunk: bytes) -> bytes:
            self.size += len(chunk)
            if self.size > most:
                raise TooMuch(f"an answer of more than {most >> 20} MB")
            return chunk

        def __iter__(self):
            for chunk in stream:
                yield self.count(chunk)

        async def __aiter__(self):
            async for chunk in stream:
                yield self.count(chunk)

        def close(self):
            stream.close()

        async def aclose(self):
            await stream.aclose()

    return Bounded()
