"""What one step of HGA's word level does to the scores: the same population before and after, with
and without its dictionary.

    python -m benchmarks.autodan_words --model embedded+runs/demo/checkpoints/step-12 --limit 8

A population of 16 (the seeds and paraphrases of them) and two generations of the word level, so
that the dictionary has something to
say. Then from that same population: (a) one more step of the word level; (b) random synonyms for a
quarter of the words, without the dictionary; (c) off, the population as it is. Printed is the
change of the mean loss of the prompts that are not elites, and the share of them that got better,
means over behaviours with 95 % bootstrap intervals.
"""

from __future__ import annotations

import random

import click

from attacks.autodan import AutoDANConfig
from attacks.autodan_search import first_population, offline_mutation, word_level
from attacks.prompt_loss import PromptLoss
from attacks.words import paraphrase, read_seeds, update_dictionary
from core.models import load
from core.prompt import Renderer
from core.statistics import bootstrap_mean
from core.text import aligned
from evaluation.behaviours import load_behaviours

GENERATIONS = 3


def shown(values: list[float]) -> str:
    low, high = bootstrap_mean(values) or (float("nan"), float("nan"))
    return f"{sum(values) / len(values):+.3f} [{low:+.3f}, {high:+.3f}]"


@click.command()
@click.option("--model", default="embedded", help="Model spec.")
@click.option("--behaviours", default="demonstration", help="Behaviours with target strings.")
@click.option("--limit", type=click.IntRange(2), default=8)
def main(model: str, behaviours: str, limit: int) -> None:
    renderer = Renderer(load(model))
    config = AutoDANConfig(population=16, mutation=0.0)
    seeds = list(read_seeds().values())
    changes: dict[str, list[float]] = {"dictionary": [], "random synonyms": [], "off": []}
    better: dict[str, list[float]] = {name: [] for name in changes}
    chosen = [b for b in load_behaviours(behaviours, label="harmful") if b.target_string]
    for number, behaviour in enumerate(chosen[:: max(1, len(chosen) // limit)][:limit]):
        rng = random.Random(number)
        loss = PromptLoss(renderer, behaviour, None, seeds)
        population = first_population(seeds, config.population, offline_mutation, rng)
        dictionary: dict[str, float] = {}
        for _ in range(GENERATIONS):
            scores = [-value for value in loss.losses(population)]
            dictionary = update_dictionary(dictionary, population, scores, None)
            before = sorted(zip(scores, population, strict=True), reverse=True)
            population = word_level(population, scores, dictionary, config, offline_mutation, rng)
        # the best first in both: the elite, then the others in the same order
        old = [-score for score, _ in before][config.elites :]
        parents = [text for _, text in before][config.elites :]
        arms = {
            "dictionary": population[config.elites :],
            "random synonyms": [paraphrase(text, rng) for text in parents],
            "off": parents,
        }
        for name, texts in arms.items():
            new = loss.losses(texts)
            changes[name].append(sum(new) / len(new) - sum(old) / len(old))
            better[name].append(sum(a < b for a, b in zip(new, old, strict=True)) / len(old))
    rows = [
        (
            "step",
            "change of the mean loss (nats per target token)",
            "share of prompts that got better",
        )
    ]
    rows += [(name, shown(changes[name]), shown(better[name])) for name in changes]
    rows.append(
        (
            "dictionary - random",
            shown([a - b for a, b in zip(*list(changes.values())[:2], strict=True)]),
            "",
        )
    )
    click.echo(aligned(rows))


if __name__ == "__main__":
    main()
