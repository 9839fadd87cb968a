"""The command line: `fastbert verify | bench | info`. Arguments are in `__main__`, each command in its own module."""

from __future__ import annotations


class UsageError(Exception):
    """What the user asked for can't be done; the message, one line, says why."""
