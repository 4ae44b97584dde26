"""Which attacks have a command, read from their sources without importing them.

A list of commands must not wait for torch. ``attacks/registry.py`` says what an attack is.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import attacks


@cache
def declared_commands() -> dict[str, str]:
    """Name -> summary of each attack of the package that has a command of its own."""
    summaries = {}
    for path in sorted(Path(attacks.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Attack":
                given = {
                    word.arg: word.value.value
                    for word in node.keywords
                    if isinstance(word.value, ast.Constant)
                }
                if given.get("command", True):
                    summaries[str(given["name"])] = str(given["summary"])
    return summaries
