"""The protocol: one live model in, one dictionary of measurements out; the list of suites and the loop over
them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import prompts
from engine.chat_template import ChatTemplate
from engine.generation import Engine
from errors import FrankenError, first_line
from planning.asked import parse_suites, read_text  # noqa: F401  offered here too
from suites import injection_generation, injection_layers, localisation
from suites.activations import Activations
from suites.base import Protocol, Suite
from suites.binary import Binary
from suites.capability import Capability
from suites.chat import Chat
from suites.formats import Formats
from suites.free_text import FreeText
from suites.injection import SHORT, Injection
from suites.injection_generation import InjectionGeneration
from suites.injection_layers import InjectionLayers
from suites.lm_harness import LmEval
from suites.localisation import Localisation
from suites.perplexity import Perplexity
from suites.phases import Phases

# What makes each suite, by the name under which it is asked. What stands above this module registers its own.
SUITES: dict[str, Callable[[], Suite]] = {
    "informed": lambda: FreeText(prompts.INFORMED_PROBES),
    "blind": lambda: FreeText(prompts.BLIND_PROBES),
    "binary": Binary,
    "formats": Formats,
    "capability": Capability,
    "perplexity": Perplexity,
    "chat": Chat,
    "injection": Injection,
    "injection_short": lambda: Injection(**SHORT),
    "phases": Phases,
    "activations": Activations,
    "lm_eval": LmEval,
    "injection_layers": InjectionLayers,
    "injection_layers_grid": lambda: InjectionLayers(injection_layers.GRID),
    "injection_generation": InjectionGeneration,
    "injection_generation_grid": lambda: InjectionGeneration(injection_generation.GRID),
    "localisation": Localisation,
    "localisation_grid": lambda: Localisation(localisation.GRID),
}


def register(name: str, make: Callable[[], Suite]) -> None:
    """Offer a further suite under a name that `prompts.SUITES` lists. Raises ValueError for one that it does
    not."""
    if name not in prompts.SUITES:
        raise ValueError(f"prompts.SUITES does not list {name!r}")
    SUITES[name] = make


def check_tokenizer(tokenizer, protocol: Protocol, template: ChatTemplate | None = None) -> None:
    """Raises FrankenError if no experiment could be measured: no token for an answer, or a chat template that
    fails, is random or leaves out what it is given (see ChatTemplate.check)."""
    template = template or ChatTemplate(tokenizer)
    suites = [SUITES[name]() for name in protocol.suites]
    try:
        for turns in dict.fromkeys([("user",), *(suite.turns for suite in suites)]):
            template.check(*turns)
        for suite in suites:
            suite.check_tokenizer(tokenizer)
    except Exception as e:  # a tokenizer is the checkpoint's and may raise anything
        raise FrankenError(f"these questions cannot be asked: {first_line(e)}") from e


def prompts_sha256(engine: Engine, protocol: Protocol) -> str:
    """SHA-256 (hex) over the token ids of what the protocol asks: every reply's prompt, and every text of
    `Suite.work` as a user's turn, through tokenizer and chat template. Two engines with equal ones ask
    alike."""
    digest = hashlib.sha256()
    for name in protocol.suites:
        suite = SUITES[name]()
        texts = dict.fromkeys(suite.work(protocol).texts)
        sequences = [request.prompt_ids for request in suite.requests(engine, protocol)]
        sequences += [engine.chat_ids([{"role": "user", "content": text}]) for text in texts]
        if len(suite.turns) > 1:
            turns = [{"role": role, "content": f"The {role} speaks."} for role in suite.turns]
            sequences.append(engine.chat_ids(turns))
        for ids in sequences:
            digest.update(f"{len(ids)}:{','.join(map(str, ids))};".encode())
    return digest.hexdigest()


def evaluate(
    engine: Engine, protocol: Protocol, on_progress: Callable[[str, int, int], None] | None = None
) -> tuple[dict, dict]:
    """Ask the engine's model everything the protocol says.

    on_progress(what, done, total) reports generated replies, then measured suites. Returns ({suite:
    measurements}, {phase: seconds}); a short form's measurements stand under the name of the whole.
    """
    suites = {name: SUITES[name]() for name in protocol.suites}
    wanted = {name: suite.requests(engine, protocol) for name, suite in suites.items()}
    everything = [request for requests in wanted.values() for request in requests]
    writers, done, begin = ", ".join(n for n, r in wanted.items() if r), 0, time.perf_counter()

    def progress(n: int) -> None:
        nonlocal done
        done += n
        if on_progress:
            on_progress(f"replies for {writers}", done, len(everything))

    if on_progress and everything:
        on_progress(f"replies for {writers}", 0, len(everything))
    replies = engine.complete(everything, progress)
    seconds = {"replies": time.perf_counter() - begin}
    results, first = {}, 0
    for k, (name, suite) in enumerate(suites.items()):
        begin, count = time.perf_counter(), len(wanted[name])
        if on_progress:
            on_progress(name, k, len(suites))
        results[suite.recorded_as or name] = suite.measure(engine, protocol, replies[first : first + count])
        first += count
        seconds[name] = time.perf_counter() - begin
    return results, {name: round(value, 4) for name, value in seconds.items()}
