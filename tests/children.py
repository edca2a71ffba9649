"""Processes that tests start in order to send them signals."""

import signal


def default_signals() -> None:
    """Let a child end by the signals that its test sends it, however the tests themselves were started: by
    nohup they ignore SIGHUP, in a shell's background SIGINT, and children inherit that. Called in the child
    (`preexec_fn`)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
