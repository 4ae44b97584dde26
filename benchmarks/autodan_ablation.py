"""What AutoDAN's parts do to the loss: paired by behaviour, from the artifacts of a run
(``sweep``).

    python -m benchmarks.autodan_ablation runs/attack_classes

Prints, per source, the mean fall of the loss below the best un-optimised seed for each variant, and
the differences between variants of their best losses, in nats per target token with 95 % bootstrap
intervals over behaviours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from pipeline.common import artifacts_of

from core.records import AttackArtifact
from core.statistics import bootstrap_mean
from core.store import RunFolder
from core.text import aligned

VARIANTS = ("autodan_ga", "autodan_hga", "autodan_hga_without_words")


def shown(values: list[float]) -> str:
    low, high = bootstrap_mean(values) or (float("nan"), float("nan"))
    return f"{sum(values) / len(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def best(artifact: AttackArtifact) -> float:
    assert artifact.best_step is not None
    return artifact.loss_history[artifact.best_step]


def main(path: Path) -> None:
    artifacts: dict[tuple[str, str], dict[str, AttackArtifact]] = {}
    for artifact in artifacts_of(RunFolder.existing(path)):
        if artifact.attack in VARIANTS:
            artifacts.setdefault((artifact.source_model, artifact.attack), {})[
                artifact.behaviour_id
            ] = artifact
    rows = [("source", "what", "n", "nats per target token")]
    for source in dict.fromkeys(source for source, _ in artifacts):
        for name in VARIANTS:
            own = artifacts.get((source, name), {})
            if own:
                falls = [best(a) - a.loss_history[0] for a in own.values()]
                rows.append((source, f"{name}, against its best seed", str(len(own)), shown(falls)))
        for name, other in (
            ("autodan_hga", "autodan_hga_without_words"),
            ("autodan_hga", "autodan_ga"),
        ):
            a, b = artifacts.get((source, name), {}), artifacts.get((source, other), {})
            both = [key for key in a if key in b]
            if both:
                rows.append(
                    (
                        source,
                        f"{name} - {other}",
                        str(len(both)),
                        shown([best(a[k]) - best(b[k]) for k in both]),
                    )
                )
    click.echo(aligned(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
