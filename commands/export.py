"""The command export: our prompts out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands.options import RUN
from commands.types import FilePath
from core.errors import AttackPlaneError

if TYPE_CHECKING:
    from core.records import AttackArtifact
    from core.store import RunFolder

FORMATS = ("harmbench", "jailbreakbench", "inspect")


@click.command()
@RUN
@click.option("--format", "kind", type=click.Choice(FORMATS), required=True)
@click.option("--out", type=FilePath(), required=True, help="File to write.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--attack", help="Only this attack [default: all but the baselines]")
@click.option("--source", help="Only artifacts of this source model.")
@click.option("--variant", help="Only this variant.")
@click.option(
    "--target",
    help="jailbreakbench, inspect: the model whose verdicts are written [default: the source; the "
    "only target].",
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

    inspect is a log of Inspect: one sample for each reply of one target, with what the judges said.

    \b
    Examples:
      python cli.py export --run runs/first --format harmbench --out test_cases.json
      python cli.py export --run runs/first --format jailbreakbench --attack gcg --out gcg.json
      python cli.py export --run runs/first --format inspect --target embedded --out log.json
    """
    from core.files import write_new
    from core.records import BASELINES
    from core.store import RunFolder
    from interchange import exporter
    from pipeline.matrices import require_whole
    from pipeline.runs import artifacts_of

    folder = RunFolder.existing(run)
    require_whole(folder)
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
    elif kind == "inspect":
        text = log_of(folder, chosen, target)
    else:
        text = jailbreakbench_of(folder, chosen, target)
    write_new(out, text, apart_from=run, force=force)
    click.echo(f"{len(chosen)} prompts -> {out}")


def jailbreakbench_of(run: RunFolder, chosen: Sequence[AttackArtifact], target: str | None) -> str:
    """The chosen prompts with the verdicts on one target, as a file of JailbreakBench."""
    from interchange import exporter
    from pipeline.runs import artifacts_of, first_replies

    on = target or chosen[0].source_model
    own = [r for r in first_replies(run) if r.target_model == on]
    if target and not own:
        raise AttackPlaneError(
            "no replies of this target in the run",
            where=run.path,
            got=target,
            remedy="see its targets with show, or run transfer",
        )
    verdicts = {r.artifact_id: r.jailbroken for r in own}
    attacked = {a.behaviour_id for a in artifacts_of(run)}
    behaviours = {k: b for k, b in run.behaviours().items() if k in attacked}
    return exporter.jailbreakbench(chosen, behaviours, verdicts, target=target)


def log_of(run: RunFolder, chosen: Sequence[AttackArtifact], target: str | None) -> str:
    """The replies to the chosen prompts on one target, as a log of Inspect."""
    from interchange.inspect_log import inspect_log
    from pipeline.matrices import TRANSFER
    from pipeline.runs import replays_of

    of = {a.artifact_id: a for a in chosen}
    replays = [r for r in replays_of(run) if r.artifact_id in of]
    targets = dict.fromkeys(r.target_model for r in replays)
    if target is None and len(targets) == 1:
        (target,) = targets
    if target not in targets:
        raise AttackPlaneError(
            "a log of Inspect holds one target",
            where=run.path,
            got=target or f"{len(targets)} targets with replies to these prompts",
            remedy=f"give --target, one of {', '.join(targets)}" if targets else "run transfer",
        )
    settings = run.manifest["stages"].get(TRANSFER, {})
    own = [r for r in replays if r.target_model == target]
    return inspect_log(own, of, run.behaviours(), settings=settings)


command = export
