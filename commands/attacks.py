"""The command attacks: which attacks there are, and what each needs."""

from __future__ import annotations

import click


@click.command()
def attacks() -> None:
    """List all attacks with what they need.

    \b
    Example:
      python cli.py attacks
    """
    from attacks.registry import ATTACKS
    from commands.tables.layout import text_of

    sources = {"none": "no model", "one": "a source model", "several": "source models"}
    columns = [
        ("attack", lambda a: a.name.replace("_", "-")),
        ("in a sweep", lambda a: ", ".join(a.forms) or a.name),
        ("needs", lambda a: sources[a.sources] + (", target strings" if a.needs_target else "")),
        ("presets", lambda a: ", ".join(a.presets)),
        ("what it does", lambda a: a.summary),
    ]
    click.echo(text_of(columns, [a for _, a in sorted(ATTACKS.all().items()) if a.command]))


command = attacks
