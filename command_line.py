"""What every command of the harness shares: how it explains itself, how it names a model, and that it can be
interrupted."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import functools
import gc
import os
import queue
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, ParamSpec

from errors import FrankenError, nearest, one_line

Given = ParamSpec("Given")


class DefaultsThatSay(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option that has one; "(default: None)" says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default and action.default != 0 or action.default is False:
            return action.help
        return super()._get_help_string(action)


def path_given(text: str) -> Path:
    """An option's value as a path, for argparse. An empty one, as of a shell's variable that is not set,
    would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("has an empty value; leave it out for the default")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A parser, and what it makes parsers of commands of, in which a Path is never empty. A mistyped option
    is answered with the nearest."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register("type", Path, path_given)

    def error(self, message: str) -> NoReturn:
        """As argparse ends it, with the nearest option where one is mistyped."""
        what, _, words = message.partition("unrecognized arguments: ")
        wrong = next((word for word in words.split() if word.startswith("-")), None)
        if not what and wrong:
            message += nearest(wrong.partition("=")[0], _options(self))
        super().error(message)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """All options of a parser and of its commands'."""
    of_commands = [
        made
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for made in action.choices.values()
    ]
    return [*parser._option_string_actions, *(o for made in of_commands for o in _options(made))]


def parser_of(doc: str | None) -> Parser:
    """A command's parser, described by the first paragraph of its docstring."""
    return Parser(description=(doc or "").partition("\n\n")[0], formatter_class=DefaultsThatSay)


class _OneModel(argparse.Action):
    """Keeps the value; --pair beside --base or --instruct, whichever stands first, would go unread."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        said = [*getattr(namespace, "models_said", ()), "pair" if self.dest == "pair" else "path"]
        namespace.models_said = said
        if len(set(said)) > 1:
            raise FrankenError("--pair stands for both sides: give it, or --instruct with or without --base")


def add_model(model) -> None:
    """The options that say which pair is operated on, for a parser or a group of one."""
    model.add_argument(
        "--pair",
        action=_OneModel,
        default="qwen2.5-coder-32b",
        help=(
            "from the model hub: qwen2.5-coder-32b, -14b, -7b, -3b; from the package index:"
            " qwen2.5-coder-1.5b, qwen2.5-coder-0.5b, smollm2-135m (laptop size), which with -hub at the end"
            " come from the hub, too"
        ),
    )
    model.add_argument(
        "--base",
        action=_OneModel,
        help="path (a folder or a .gguf file) or hub id of a base checkpoint, with --instruct",
    )
    model.add_argument(
        "--instruct",
        "--model",
        action=_OneModel,
        help=(
            "path or hub id of the chat-tuned checkpoint, instead of --pair; without --base, what needs a"
            " base is left out"
        ),
    )
    model.add_argument(
        "--instruct-adapter", metavar="DIR", help="a LoRA adapter to merge into the instruct side first"
    )
    model.add_argument("--base-revision", help="revision of --base or of the pair's base side")
    model.add_argument("--instruct-revision", help="revision of --instruct or of the pair's instruct side")
    model.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=(
            "a further source of layers: a checkpoint or a LoRA adapter; adds experiments NAME_whole,"
            " NAME_early_half, ..."
        ),
    )
    model.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    model.add_argument(
        "--device-map",
        default="auto",
        choices=("auto", "cuda", "cpu", "balanced"),
        help="auto: one GPU if the model fits, else all of them; a small model also on a CPU",
    )
    model.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the base layers on the GPU too; default: if they fit",
    )


def refuse_empty(args: argparse.Namespace) -> None:
    """Raises FrankenError for an option with an empty value, as of a shell's variable that is not set: it
    would mean another model, text or folder than was meant."""
    several = ("source", "sweep", "experiments_file")
    empty = [
        name
        for name, value in vars(args).items()
        # argparse makes a list of the value of `--suites=--`
        if (value == "" and name != "size") or (value == [] and name not in several) or value == [[]]
    ]
    if empty:
        raise FrankenError(f"--{empty[0].replace('_', '-')} has an empty value; leave it out for none")


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, Ctrl-C and the other signals that end a run wait. For imports of a second that may be done
    again: an interrupted one leaves libraries in parts that do not fit each other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    ends = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    # by their handlers: one that another thread receives is handled in this one, whatever it blocks
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, a batch system's SIGTERM and a dropped connection's SIGHUP raise KeyboardInterrupt, as Ctrl-C
    does."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    def hang_up(signum, frame):
        for stream in (1, 2):  # the terminal is gone: writing there would fail
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise KeyboardInterrupt

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, no Ctrl-C is lost.

    Python runs a signal's handler wherever the main thread happens to be. Where that is a `__del__` or
    another callback of the garbage collector, it prints the KeyboardInterrupt as "ignored" and goes on. Here
    it is raised again a moment later, until it comes out.
    """
    main, ignored, before = threading.get_ident(), queue.SimpleQueue(), sys.unraisablehook
    ending = threading.Event()

    def raise_again() -> None:
        lost = False
        while not ending.is_set():
            try:
                what = ignored.get(timeout=0.01 if lost else None)
            except queue.Empty:  # it has been quiet since: several lost ones are one
                lost = False
                error = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), error)
                continue
            if what is not None and what.exc_type is KeyboardInterrupt:
                lost = True
            elif what is not None:
                before(what)

    watcher = threading.Thread(target=raise_again, daemon=True)
    watcher.start()
    sys.unraisablehook = ignored.put  # in C, so that no interrupt can come in the middle of it
    try:
        yield
    finally:
        sys.unraisablehook = before
        ending.set()
        ignored.put(None)
        watcher.join()
        while not ignored.empty():
            if (what := ignored.get()) is not None and what.exc_type is not KeyboardInterrupt:
                before(what)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For the first import of torch and what stands on it: collect no garbage meanwhile, and never look
    through what it made.

    Its million objects stay until the end, and to look through them again and again took 1.5 of the 8.5
    processor seconds of all imports. Nothing is done where torch has been imported already.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def ends_in_one_line(
    interrupted: str, command: str | None = None
) -> Callable[[Callable[Given, int]], Callable[Given, int]]:
    """A decorator for the `main` of every command: what cannot be done is one line on stderr, after the
    command's name, and the exit status 1.

    That is a FrankenError or an OSError; anything else is a fault of ours and stays a traceback. A Ctrl-C, of
    which none is lost, gives 130 and a line, too: the words of the KeyboardInterrupt, or `interrupted` if it
    has none. command: the name; by default that of the file in which `main` is.
    """

    def decorate(main: Callable[Given, int]) -> Callable[Given, int]:
        name = command or Path(main.__code__.co_filename).name

        @functools.wraps(main)
        def guarded(*args: Given.args, **flags: Given.kwargs) -> int:
            # Python looks through all objects as it ends, which with torch and transformers takes a second;
            # what is frozen it leaves to the system
            atexit.unregister(gc.freeze)
            atexit.register(gc.freeze)
            try:
                with interruptible():
                    return main(*args, **flags)
            except (FrankenError, OSError) as e:
                print(one_line(f"{name}: {e}"), file=sys.stderr)
                return 1
            except KeyboardInterrupt as e:
                print(one_line(f"{name}: {e if e.args else interrupted}"), file=sys.stderr)
                return 130

        return guarded

    return decorate
