"""Talk to a modified model at the terminal, and change it in between.

What the model writes is untrusted text: it is shown as `errors.printable` spells it, a piece at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from engine.generation import Engine, Request
from errors import FrankenError, printable
from runner.export import Chosen

HELP = """\
/apply NAME  become another experiment's model; the conversation goes on
/undo        become the model before that again
/reset       forget the conversation
/recipe      what is changed now
/quit        end (or Ctrl-D)"""
UNDECIDED = "\ufffd"  # ends the text of a character of which not all bytes are there yet


class Chat:
    """A conversation with a live model.

    Args:
        find: the experiment of a name; raises FrankenError for an unknown one.
        budget: most tokens of a reply. temperature: 0 is greedy. seed: of the replies' random numbers.
    """

    def __init__(
        self,
        engine: Engine,
        find: Callable[[str], Chosen],
        budget: int = 400,
        temperature: float = 0.7,
        seed: int = 0,
    ):
        self.engine, self.find = engine, find
        self.budget, self.temperature, self.seed = budget, temperature, seed
        self.messages: list[dict] = []
        self.models: list[Chosen] = []  # that were applied; the last one runs
        self.turns = 0

    def apply(self, name: str) -> str:
        """Become an experiment's model; what changed, in a line.

        Raises FrankenError, and changes nothing, for a recipe that this model cannot hold.
        """
        chosen = self.find(name)
        surgery = self.engine.live.apply(chosen.recipe)
        self.models.append(chosen)
        return f"{chosen.name}: {chosen.change or 'nothing changes'} ({surgery.seconds:.2f} s)"

    def undo(self) -> str:
        """Become what was there before the last `apply`; to the bit, as every recipe is."""
        if len(self.models) < 2:
            raise FrankenError("there is nothing to undo")
        self.engine.live.apply(self.models[-2].recipe)
        self.models.pop()
        return f"back to {self.models[-1].name}"

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the model's answer as they are generated; the turn joins the conversation when it ends or
        is broken off.

        Raises FrankenError for a conversation longer than the model reads; it is then as before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.engine.chat_ids(asked, think=True)
        room = self.engine.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise FrankenError(
                f"the conversation is {len(prompt)} tokens long, more than the model reads; /reset"
            )
        self.turns += 1
        request = Request(
            f"chat-{self.turns}", prompt, min(self.budget, room), self.temperature, 0.95, seed=self.seed
        )
        ids: list[int] = []
        shown = ""
        try:
            for token in self.engine.stream(request):
                ids.append(token)
                whole = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
                if not whole.endswith(UNDECIDED) and whole.startswith(shown):
                    yield whole[len(shown) :]
                    shown = whole
        finally:
            whole = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            self.messages = [*asked, {"role": "assistant", "content": whole}]
        if whole.startswith(shown):
            yield whole[len(shown) :]

    def command(self, line: str) -> str | None:
        """What a line that begins with / does, in text; None ends the chat. Raises FrankenError."""
        word, _, rest = line.partition(" ")
        if word == "/apply":
            if not rest.strip():
                raise FrankenError("/apply needs an experiment's name; `python run_all.py --list` shows them")
            return self.apply(rest.strip())
        if word == "/undo":
            return self.undo()
        if word == "/reset":
            self.messages = []
            return "the conversation is forgotten"
        if word == "/recipe":
            return f"{self.models[-1].name}: {self.engine.live.recipe}"
        if word in ("/quit", "/exit"):
            return None
        return HELP


def talk(chat: Chat) -> int:
    """Read lines from stdin and answer them until they end. Ctrl-C breaks off a reply, or ends the chat
    between two."""
    terminal = sys.stdin.isatty()
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input(printable(f"{chat.models[-1].name}> ") if terminal else "").strip()
        except EOFError:
            return 0
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return 0
                print(printable(said), flush=True)
            elif line:
                answer(chat, line)
        except FrankenError as e:
            print(f"franken.py: {e}", file=sys.stderr, flush=True)


def answer(chat: Chat, line: str) -> None:
    """Print a reply as it comes."""
    try:
        for piece in chat.reply(line):
            print(printable(piece), end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print("\n(broken off)", file=sys.stderr, flush=True)
