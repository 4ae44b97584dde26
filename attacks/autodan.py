"""AutoDAN as an attack: its settings, and its seeds as a baseline.

The search itself is ``attacks/autodan_search.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attacks.baselines import SUFFIX_BASELINES, SuffixBaselinesConfig
from attacks.registry import ATTACKS, PAPER, QUICK, Attack, Speed
from attacks.result import AttackResult, Search, scored_result
from attacks.words import MARKER, read_seeds
from attacks.workbench import Progress, Task, Workbench, judge_first
from core.records import AUTODAN_SEED, PLAIN, content_hash, stream_seed
from core.rows import Row
from core.settings import check_settings, setting
from evaluation.judges import QUICK_JUDGE, Exchange, succeeded

if TYPE_CHECKING:  # attacks are listed, and their options shown, without torch
    from attacks.autodan_search import AutoDANState

PROMPT_TOKENS = 162
"""Rough length of a prompt and its target, for estimates only."""


def seeds_of(path: str | None) -> dict[str, str]:
    """Seed prompts by name."""
    return read_seeds(Path(path) if path else None)


@dataclass(frozen=True)
class AutoDANSeedConfig:
    seeds: str | None = setting(None, "Seed prompts [default: ours]")
    system_prompt: str | None = setting(None, "System prompt.", flag="--system")


@dataclass(frozen=True)
class AutoDANConfig:
    """Defaults are the paper's and its code's."""

    variant: str = setting(
        "hga", "ga: paragraph level only. hga: with the word level.", choices=("ga", "hga")
    )
    num_steps: int = setting(100, "Generations.", flag="--steps", low=0)
    population: int = setting(256, "Prompts per generation.", low=2)
    elite: float = setting(0.05, "Share that stays as it is.", low=0, high=1)
    crossover: float = setting(0.5, "Probability that a pair crosses over.", low=0, high=1)
    crossover_points: int = setting(5, "Cuts of a crossover.", low=0)
    mutation: float = setting(0.01, "Probability of a paraphrase.", low=0, high=1)
    paragraph_every: int = setting(5, "HGA: steps between two paragraph levels.", low=1)
    word_probability: float = setting(
        0.5, "Probability that an unknown word scores as the worst known one.", low=0, high=1
    )
    most_swaps: int = setting(5, "Synonyms per paragraph.", low=0)
    top_words: int | None = setting(
        None, "Words kept in the dictionary (30 in one port) [default: all]", low=1
    )
    word_level: bool = setting(
        True, "An ablation: HGA without its word level.", flag="--word-level/--no-word-level"
    )
    stop_on_success: bool = setting(
        True,
        "Stop at the first success by the judge.",
        flag="--stop-on-success/--no-stop-on-success",
    )
    reply_tokens: int = setting(64, "Tokens of the reply that is judged.", low=1)
    patience: int = setting(0, "Stop after so many steps without a lower loss; 0: never.", low=0)
    system_prompt: str | None = setting(None, "System prompt.", flag="--system")
    seeds: str | None = setting(
        None, 'Seed prompts: JSON lines {"name", "text" with {request}} [default: ours]'
    )
    mutator: str | None = setting(
        None, "Paraphrases by this model (a spec or http://HOST/v1#MODEL) [default: synonyms]"
    )
    judge: str = setting(QUICK_JUDGE, "Success test of each step's best.")

    def __post_init__(self) -> None:
        check_settings(self, "autodan")

    @property
    def elites(self) -> int:
        return max(1, int(self.population * self.elite))


def run_seeds(bench: Workbench, task: Task, config: AutoDANSeedConfig) -> Iterator[AttackResult]:
    """The seeds as they are: they explain most of AutoDAN's success in the literature."""
    for name, text in seeds_of(config.seeds).items():
        yield scored_result(
            bench.renderer,
            task.behaviour,
            AUTODAN_SEED,
            text.replace(MARKER, task.behaviour.request),
            variant=name,
            system=config.system_prompt,
            allow_trim=True,
        )


def name_of(config: AutoDANConfig) -> str:
    """The name of a variant in the artifacts."""
    return f"autodan_{config.variant}" + ("" if config.word_level else "_without_words")


def run(bench: Workbench, task: Task, config: AutoDANConfig) -> Iterator[AttackResult]:
    """One evolved prompt for one request."""
    from attacks.autodan_search import AutoDANState, mutation_by, offline_mutation, run_autodan
    from attacks.prompt_loss import PromptLoss

    behaviour, seeds = task.behaviour, list(seeds_of(config.seeds).values())
    saved = bench.states.load(task.key)

    def on_step(state: AutoDANState) -> None:
        if state.step % task.save_every == 0:
            bench.states.save(task.key, lambda: asdict(state))
        best = state.losses[state.best_step]
        task.on_step(Progress(state.step, config.num_steps, state.losses[-1], best))

    def is_success(text: str, reply: str) -> bool:
        prompt = text.replace(MARKER, behaviour.request)
        exchange = Exchange(behaviour.request, reply, behaviour.target_string, prompt)
        return succeeded(bench.judge(config.judge), [exchange])[0]

    state = run_autodan(
        PromptLoss(bench.renderer, behaviour, config.system_prompt, seeds),
        seeds,
        config,
        seed=stream_seed(bench.seed, behaviour.behaviour_id, config.variant),
        mutate=mutation_by(bench.chat(config.mutator)) if config.mutator else offline_mutation,
        is_success=is_success,
        state=AutoDANState(**saved) if saved else None,
        on_step=on_step,
    )
    snapshots = [(step, text.replace(MARKER, behaviour.request)) for step, text in state.bests]
    yield scored_result(
        bench.renderer,
        behaviour,
        name_of(config),
        state.best.replace(MARKER, behaviour.request),
        system=config.system_prompt,
        search=Search(state.losses, state.best_step, snapshots=snapshots),
        allow_trim=True,
        provenance={
            "prompts_scored": len(seeds) + sum(state.scored),
            "success": state.success,
            "scoring": {"operations": state.operations},
        },
    )


def identity(bench: Workbench, config: AutoDANConfig, name: str) -> Row:
    """The settings, with the seeds by their text and the mutator by its weights."""
    values = asdict(config)
    judge = values.pop("judge")
    return {
        **values,
        "seeds": content_hash(seeds_of(config.seeds)),
        "mutator": bench.chat(config.mutator).identity if config.mutator else None,
        "judge": judge if config.stop_on_success else None,
    }


def baselines(config: AutoDANConfig) -> list[tuple[str, Any]]:
    """The plain request and the seeds."""
    system = config.system_prompt
    plain = SuffixBaselinesConfig(names=(PLAIN,), system_prompt=system)
    return [
        (SUFFIX_BASELINES, plain),
        (AUTODAN_SEED, AutoDANSeedConfig(config.seeds, system)),
    ]


def cost(config: AutoDANConfig, count: int, speed: Speed) -> float:
    """Seconds: a generation is scored anew in every step, and its best one's reply judged."""
    new = config.population * PROMPT_TOKENS * speed.token
    if not config.word_level:
        new /= config.paragraph_every
    # one reply alone takes about half of a batch's step
    test = config.reply_tokens * speed.decoding_step / 2 if config.stop_on_success else 0.0
    return count * config.num_steps * (new + test)


ATTACKS.add(
    Attack(
        name=AUTODAN_SEED,
        summary="AutoDAN's seed prompts, not optimised: what AutoDAN is compared with.",
        config=AutoDANSeedConfig,
        run=run_seeds,
        cost=lambda config, count, speed: (
            len(seeds_of(config.seeds)) * count * PROMPT_TOKENS * speed.token
        ),
        sources="one",
        needs_target=True,
        keys=lambda config, behaviour, bench: [
            (AUTODAN_SEED, name) for name in seeds_of(config.seeds)
        ],
        identity=lambda bench, config, name: {
            "seeds": content_hash(seeds_of(config.seeds)),
            "system_prompt": config.system_prompt,
        },
        command=False,
    )
)
ATTACK = ATTACKS.add(
    Attack(
        name="autodan",
        summary="Evolve readable prompts from seed prompts (AutoDAN).",
        config=AutoDANConfig,
        run=run,
        cost=cost,
        presets={PAPER: {}, QUICK: {"num_steps": 10, "population": 16, "mutation": 0.1}},
        forms={
            "autodan_ga": {"variant": "ga"},
            "autodan_hga": {"variant": "hga"},
            "autodan_hga_without_words": {"variant": "hga", "word_level": False},
        },
        sources="one",
        needs_target=True,
        check=judge_first,
        keys=lambda config, behaviour, bench: [(name_of(config), None)],
        identity=identity,
        baselines=baselines,
        steps=lambda config: config.num_steps,
        unit="step",
        save_every=1,
        examples=(
            "autodan --limit 2",
            "autodan --variant ga --no-stop-on-success",
            "autodan --mutator http://localhost:8000/v1#NAME",
        ),
    )
)
