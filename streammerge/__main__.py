"""`python -m streammerge`."""

from streammerge.cli import script

script()
