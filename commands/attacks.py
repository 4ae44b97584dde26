"""The command attacks: which attacks there are, and what each needs."""

from __future__ import annotations

import click

from commands.output import echo_table, json_option


@click.command()
@json_option
def attacks() -> None:
    """List all attacks with what they need.

    \b
    Example:
      python cli.py attacks
    """
    from attacks.registry import ATTACKS
    from commands.tables.layout import plain_table

    sources = {"none": "no model", "one": "a source model", "several": "source models"}
    rows = [
        {
            "attack": a.name.replace("_", "-"),
            "in a sweep": ", ".join(a.forms) or a.name,
            "needs": sources[a.sources]
            + ("" if a.reads_weights or a.sources == "none" else ", served or not")
            + (", target strings" if a.needs_target else ""),
            "presets": ", ".join(a.presets),
            "what it does": a.summary,
        }
        for _, a in sorted(ATTACKS.all().items())
        if a.command
    ]
    echo_table(plain_table, rows, name="attacks")


command = attacks
