"""The command report: was the source's prompt sent?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands.options import RUN
from commands.output import echo_table, json_option
from core.errors import AttackPlaneError
from core.rows import Row

if TYPE_CHECKING:
    from core.records import Replay


@click.command()
@RUN
@click.option("--attack", help="Only this attack.")
@click.option("--target", help="Only this target.")
@click.option(
    "--prompts", is_flag=True, help="Also a line for each prompt that was not sent as meant."
)
@json_option
def report(run: Path, attack: str | None, target: str | None, prompts: bool) -> None:
    """Tell failed transfer from another prompt sent.

    For each cell: whether the target got the prompt verbatim and with the source's tokens, and
    under which template and system prompt.

    \b
    Example:
      python cli.py report --run runs/first
    """
    from commands.tables.attacks import certificates_table
    from core.store import RunFolder
    from pipeline.matrices import require_whole
    from pipeline.runs import each_replay

    folder = RunFolder.existing(run)
    require_whole(folder)

    without = 0  # of the last pass over the replies

    def chosen() -> Iterator[Replay]:
        nonlocal without
        without = 0
        for r in each_replay(folder):
            if attack in (None, r.attack) and target in (None, r.target_model):
                without += not r.certificate
                if r.certificate:
                    yield r

    if next(chosen(), None) is None:
        raise AttackPlaneError(
            "no replays to report on",
            where=run,
            got=f"attack {attack or 'any'}, target {target or 'any'}",
            remedy="see the run's attacks and targets with show, or replay its prompts first",
        )
    names = ("artifact_id", "behaviour_id", "attack", "source_model", "target_model")
    rows = ({n: getattr(r, n) for n in names} | r.certificate for r in chosen())
    echo_table(certificates_table, chosen(), rows=rows)
    if without:
        click.echo(f"note: left out: {without} replies without a certificate", err=True)
    for r in chosen() if prompts else ():
        if r.certificate["sent_as_meant"] is False:
            where = f"{r.artifact_id}  {r.attack}  {r.behaviour_id}  {r.target_model}"
            click.echo(f"{where}: {difference(r.certificate)}")


def difference(certificate: Row) -> str:
    """How what was sent differs from what the source saw."""
    trimmed = "white space around it was removed"
    what = certificate.get("fault") or (
        "other token ids" if certificate.get("verbatim", True) else trimmed
    )
    if "content_tokens" in certificate:
        source = certificate.get("source_content_tokens") or "not known"
        what += f"; {certificate['content_tokens']} tokens, source {source}"
    return what


command = report
