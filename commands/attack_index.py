"""Which attacks have a command, read from their sources without importing them.

A list of commands must not wait for torch. ``attacks/registry.py`` says what an attack is.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import attacks


@cache
def declared_commands() -> dict[str, str]:
    """Name -> summary of each attack of the package that has a command of its own."""
    summaries = {}
    for path in sorted(Path(attacks.__path__[0]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "= ATTACKS.add(" not in text:
            continue
        tree = ast.parse(text)
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Attack":
                given = {word.arg: _value(word.value, constants) for word in node.keywords}
                if given.get("command") is not False and given["name"]:
                    summaries[str(given["name"])] = str(given["summary"])
    return summaries


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """A constant, or one of the module's own by name; None for anything else."""
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    return node.value if isinstance(node, ast.Constant) else None
