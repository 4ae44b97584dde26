"""The command models: spec forms, what is cached, one model described."""

from __future__ import annotations

import click

from commands.options import quiet_libraries
from commands.output import echo_table, json_option


@click.command()
@click.argument("spec", required=False)
@click.option("--fetch", is_flag=True, help="Fetch and convert the embedded model now.")
@json_option
@quiet_libraries
def models(spec: str | None, fetch: bool) -> None:
    """List spec forms and cached models.

    With SPEC, load that model and describe it.

    \b
    Examples:
      python cli.py models
      python cli.py models --fetch
      python cli.py models 'embedded?dtype=float32'
    """
    from commands.tables.layout import plain_table
    from core.embedded import SHA256, cache_folder, embedded_folder, is_whole
    from core.hub import hub_cache
    from core.specs import FORMS

    if fetch:
        click.echo(embedded_folder())
        return
    if spec is not None:
        from core.models import load

        loaded = load(spec)
        click.echo(f"{loaded.describe()}, fingerprint {loaded.fingerprint}")
        return
    click.echo(f"forms: {FORMS}")
    click.echo(f"cache: {cache_folder()} (set ATTACK_PLANE_CACHE to move it)")
    rows = []
    for folder in sorted((cache_folder() / "converted").glob("*")):
        if is_whole(folder):
            size = sum(f.stat().st_size for f in folder.iterdir()) / 2**20
            name = "embedded" if folder.name == SHA256[:16] else "GGUF file"
            rows.append({"model": name, "from": folder.name, "MiB": round(size)})
    rows += [{"model": n, "from": "hub", "MiB": round(mib)} for n, mib in hub_cache()]
    echo_table(plain_table, rows, name="models")


command = models
