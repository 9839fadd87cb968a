"""The command line: `fastbert verify | bench | profile | embed | tune | info`. Arguments are in `__main__`, commands in modules."""

from __future__ import annotations


class UsageError(Exception):
    """What the user asked for can't be done; the message, one line, says why."""
