"""The command export: our prompts out."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import RUN
from commands.types import FilePath
from core.errors import AttackPlaneError


@click.command()
@RUN
@click.option("--format", "kind", type=click.Choice(["harmbench", "jailbreakbench"]), required=True)
@click.option("--out", type=FilePath(), required=True, help="File to write.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--attack", help="Only this attack [default: all but the baselines]")
@click.option("--source", help="Only artifacts of this source model.")
@click.option("--variant", help="Only this variant.")
@click.option(
    "--target", help="jailbreakbench: the model whose verdicts are written [default: the source]."
)
def export(
    run: Path,
    kind: str,
    out: Path,
    force: bool,
    attack: str | None,
    source: str | None,
    variant: str | None,
    target: str | None,
) -> None:
    """Export artifacts for other tools. Replies are never exported.

    \b
    Examples:
      python cli.py export --run runs/first --format harmbench --out test_cases.json
      python cli.py export --run runs/first --format jailbreakbench --attack gcg --out gcg.json
    """
    from core.files import write_new
    from core.records import BASELINES
    from core.store import RunFolder
    from interchange import exporter
    from pipeline.runs import artifacts_of, first_replies

    folder = RunFolder.existing(run)
    chosen = [
        a
        for a in artifacts_of(folder)
        if (a.attack == attack if attack else a.attack not in BASELINES)
        and source in (None, a.source_model)
        and variant in (None, a.variant)
    ]
    if not chosen:
        raise AttackPlaneError(
            "no artifact matches",
            where=run,
            got=f"attack {attack or 'any'}, source {source or 'any'}, variant {variant or 'any'}",
            remedy="see what the run holds with show",
        )
    if kind == "harmbench":
        text = exporter.harmbench(chosen)
    else:
        on = target or (chosen[0].source_model if chosen else None)
        replies = first_replies(folder)
        verdicts = {r.artifact_id: r.jailbroken for r in replies if r.target_model == on}
        attacked = {a.behaviour_id for a in artifacts_of(folder)}
        behaviours = {k: b for k, b in folder.behaviours().items() if k in attacked}
        text = exporter.jailbreakbench(chosen, behaviours, verdicts, target=target)
    write_new(out, text, apart_from=run, force=force)
    click.echo(f"{len(chosen)} prompts -> {out}")


command = export
