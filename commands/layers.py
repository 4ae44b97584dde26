"""The command layers: directions over positions and layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.options import open_model, quiet_libraries
from commands.output import echo_table, json_option
from commands.study_options import study_config, study_options, study_run


@click.command()
@study_options
@json_option
@quiet_libraries
def layers(run: Path | None, models: tuple[str, ...], **study: Any) -> None:
    """Profile directions over positions and layers.

    Separation, reliability, angles and nulls at every position and layer; response-side
    directions; the layer that each published criterion takes; several models of one width are
    compared. Writes layers_*.jsonl and layers.png.

    \b
    Example:
      python cli.py layers --run runs/claims --model embedded \\
          --model embedded+runs/demo/checkpoints/step-240
    """
    from commands.tables.study import across_table, criteria_table, sizes_table
    from study.layers import ACROSS, SELECTION, SIZES
    from study.layers import layers as stage

    config = study_config(study)
    result = stage(study_run(run, models, config), models, config, open_model=open_model)
    rows = result.rows
    echo_table(criteria_table, rows[SELECTION], title="layer by criterion")
    echo_table(sizes_table, rows[SIZES], title="\nreliability by sample size")
    if rows[ACROSS]:
        layer = rows[SIZES][0]["layer"]
        echo_table(across_table, rows[ACROSS], title="\nacross models", layer=layer)
    click.echo(result.files[-1])


command = layers
