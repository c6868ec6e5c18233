"""The command as a process: `python -m streammerge`, and what is installed as `streammerge`."""

import signal
from typing import NoReturn


def script() -> NoReturn:
    """Run the command. What it imports takes a while; until it begins, SIGINT ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from streammerge.cli import script

    script()


if __name__ == "__main__":
    script()
