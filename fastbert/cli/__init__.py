"""The command line, `fastbert COMMAND`: arguments are in `__main__`, commands in modules of their names."""

from __future__ import annotations


class UsageError(Exception):
    """What the user asked for can't be done; the message, one line, says why."""
