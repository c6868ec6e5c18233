"""Signals that somebody ignores before us: a shell that starts us in the background, `nohup`, a job runner.

Our commands leave alone what was ignored when they began, so that children of such a process would wait for ever.
"""

from __future__ import annotations

import signal

from streammerge.cli.signals import HANDLED


def listen() -> None:
    """Let the children of this process be ended by signals, as if a person had started them."""
    for number in HANDLED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
