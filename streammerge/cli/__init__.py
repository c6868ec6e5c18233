"""The batch door: arguments in, the library called, results on stdout, everything else on stderr, an exit code."""

from streammerge.cli.main import main, script

__all__ = ["main", "script"]
