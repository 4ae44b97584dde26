"""Write docs/reference/commands.md from the commands themselves.

python docs/generate.py           # write it
python docs/generate.py --check   # exit with 1 where the file is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import cli  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "commands.md"
HEAD = """# Commands

This page is generated from the commands by `python docs/generate.py`; a test compares it with them.

Every command goes on where it was stopped, and does only what is missing. Exit codes: 0 done,
1 error, 2 wrong usage, 3 verification failed, 130 stopped (the same command goes on).

"""


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """(words, command) of every command that does something."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        elif command is not None:
            yield " ".join((*path, name)), command


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for words, command in commands(cli):
        with command.make_context(words, [], resilient_parsing=True, max_content_width=100) as ctx:
            text = ctx.command.get_help(ctx).replace("Usage: ", "Usage: attack-plane ", 1)
        parts.append(f"## {words}\n\n```text\n{text.rstrip()}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.read_text(encoding="utf-8") == text else "docs/reference/commands.md is old"
        )
    PAGE.write_text(text, encoding="utf-8")
