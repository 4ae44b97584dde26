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


def contexts(group: click.Group, context: click.Context) -> Iterator[click.Context]:
    """A context of every command that does something, below that of its group."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from contexts(command, click.Context(command, context, name))
        elif command is not None:
            yield command.make_context(name, [], parent=context, resilient_parsing=True)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    root = click.Context(cli, info_name="attack-plane", **cli.context_settings)
    for context in contexts(cli, root):
        words = context.command_path.removeprefix("attack-plane ")
        text = context.command.get_help(context).rstrip()
        parts.append(f"## {words}\n\n```text\n{text}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.read_text(encoding="utf-8") == text else "docs/reference/commands.md is old"
        )
    PAGE.write_text(text, encoding="utf-8")
