"""The command import: other tools' prompts in."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import RUN, file_options, quiet_libraries
from commands.types import FilePath
from core.errors import AttackPlaneError


@click.command("import")
@RUN
@click.argument("file", type=FilePath())
@click.option(
    "--format",
    "kind",
    required=True,
    help="harmbench, jailbreakbench, adversariallm, nanogcg, easyjailbreak, llm-attacks, "
    "pyrit-gcg, garak, jsonl, json (an array of objects) or csv.",
)
@click.option(
    "--behaviours",
    help="Behaviours file or set where requests and targets are looked up by id or request.",
)
@click.option(
    "--only-these", is_flag=True, help="Leave out prompts of other behaviours than those."
)
@click.option(
    "--prompt",
    help="nanogcg: the prompt that it was run with ({optim_str} marks the string's place).",
)
@click.option(
    "--map",
    "pairs",
    multiple=True,
    metavar="FIELD=KEY",
    help="jsonl, json, csv: the file's own name of a field (prompt, request, behaviour_id, "
    "target_string, category, attack, model, system, suffix); repeatable.",
)
@click.option("--model", help="The source model, where the file does not say it (any name).")
@click.option("--attack", help="Name of the attack class instead of the file's own.")
@click.option("--target-string", help="Target string, where the file has none.")
@file_options
@quiet_libraries
def import_(
    run: Path,
    file: Path,
    kind: str,
    behaviours: str | None,
    only_these: bool,
    prompt: str | None,
    pairs: tuple[str, ...],
    model: str | None,
    attack: str | None,
    target_string: str | None,
) -> None:
    """Import another tool's prompts as artifacts.

    Chat templates baked into prompts are unwrapped. Malformed rows are counted and listed in
    import_rejects.jsonl.

    \b
    Examples:
      python cli.py import --run runs/first --format jailbreakbench \\
          artifacts/GCG/white_box/vicuna-13b-v1.5.json
      python cli.py import --run runs/first --format harmbench test_cases.json \\
          --behaviours harmbench_behaviors.csv
      python cli.py import --run runs/first --format nanogcg result.json \\
          --prompt 'Tell me ...' --model embedded
      python cli.py import --run runs/first --format json set.json \\
          --map prompt=query --map request=prompt
    """
    from core.store import RunFolder
    from evaluation.behaviours import load_behaviours
    from interchange.foreign import Hints
    from interchange.importer import check_file, import_file

    if only_these and not behaviours:
        raise click.UsageError("--only-these needs --behaviours")
    check_file(run, file, kind)
    known = load_behaviours(behaviours) if behaviours else []
    hints = Hints(prompt, model, attack, target_string, columns_of(pairs))
    with RunFolder(run) as folder:
        folder.begin_stage("import", {}, {}, derived=True)
        result = import_file(folder, file, kind, hints, behaviours=known, only_these=only_these)
    click.echo("\n".join(result.lines()))
    if not result.imported + result.known:
        raise AttackPlaneError(
            "nothing was imported",
            where=file,
            remedy="see the reasons above, and whether --format and --behaviours fit the file"
            if result.lines()[1:]
            else f"it holds no rows of the format {kind}",
        )


def columns_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """``("prompt=query",)`` -> {"prompt": "query"}."""
    from interchange.tables import FIELDS

    columns = {}
    for pair in pairs:
        field, _, key = pair.partition("=")
        if field in columns or field not in FIELDS or not key.strip():
            raise click.BadParameter(
                f"{pair!r}: expected FIELD=KEY, each once, with one of {', '.join(FIELDS)}",
                param_hint="--map",
            )
        columns[field] = key.strip()
    return columns


command = import_
