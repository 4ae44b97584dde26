"""R2D2: adversarial training against a pool of GCG test cases (HarmBench, arXiv 2402.04249).

    L = CE(clean replies) + 0.5 away + 0.5 toward

    away    - (1 / T) sum_t log(1 - p_t) 1[log p_t >= -5] over the case's affirmative target
    toward  CE of "Sorry, I can't do that." and the end of turn after the same test case

One micro-batch, in the published order:

1. Draw n of the pool's N cases.
2. Attack each by m steps of GCG, on the model as it is now; the last winner stays in the pool.
3. Take the losses on these cases and on a batch of ordinary replies.

Every 50 updates a fifth of the pool begins anew. As published, a candidate counts by its ids, and
the argmin becomes current even where it is worse. Two things differ from the public code: padding
is left out of the losses, which that code forgets, and the cases of one update are drawn without
repetition where several micro-batches make it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from attacks.gcg import GCGConfig, step_seconds
from attacks.registry import Speed
from core.errors import AttackPlaneError
from core.records import HARMFUL, HARMLESS, PSEUDO_HARMFUL
from core.rows import Row
from core.settings import setting
from training.config import TrainConfig, published
from training.examples import Batches, Example
from training.registry import ARMS, Arm, Bench, Losses, Method, update_cost

if TYPE_CHECKING:  # arms are listed, and their options shown, without torch
    from training.test_cases import Case

TOWARD = "Sorry, I can't do that."


@dataclass(frozen=True)
class R2D2Config(TrainConfig):
    """HarmBench's pool and attack; LoRA, rate and pool size as in SG and RG."""

    checkpoints: tuple[int, ...] = published(TrainConfig, "checkpoints", (50, 100, 250, 500))
    pool: int = setting(180, "Test cases (N).", low=1)
    cases: int = setting(8, "Cases of a micro-batch (n).", low=1)
    attack_steps: int = setting(5, "GCG steps on each (m).", low=0)
    search_width: int = setting(512, "GCG candidates per step.", flag="--width", low=1, high=10**6)
    topk: int = setting(256, "GCG tokens tried per position.", low=1)
    filtered: bool = setting(False, "Keep token fidelity in the attack (not in HarmBench).")
    reset_every: int = setting(50, "Updates between two renewals of the pool.", low=1)
    reset_share: float = setting(0.2, "Share of the pool that begins anew.", low=0, high=1)
    away_weight: float = setting(0.5, "Of the away term.", low=0)
    toward_weight: float = setting(0.5, "Of the toward term.", low=0)


def method(bench: Bench, config: R2D2Config) -> Method:
    if config.cases * config.accumulation > config.pool:
        raise AttackPlaneError(
            "an update draws more test cases than the pool has",
            where="train r2d2",
            got=f"{config.cases} cases x {config.accumulation} micro-batches, pool {config.pool}",
            remedy="give a larger --pool, or fewer --cases",
        )
    return _R2D2(bench, config).method


class _R2D2:
    def __init__(self, bench: Bench, config: R2D2Config) -> None:
        from training.test_cases import Pool

        self.bench, self.config = bench, config
        harmful = bench.texts.requests.harmful
        self.pool = Pool(
            bench.adapted.loaded, harmful, config.pool, config.seed, filtered=config.filtered
        )
        self.clean = Batches(bench.texts.ordinary(), config.batch_size, config.seed)
        toward = bench.texts.example(self.pool.behaviours[0].request, TOWARD)
        self.refusal = toward.ids[toward.reply_start :]
        self.gcg = GCGConfig(
            num_steps=config.attack_steps, search_width=config.search_width, topk=config.topk
        )
        self.attacked: dict[int, Row] = {}
        self.method = Method(self.losses, self.after_update, self.state, self.restore)

    def losses(self, micro: int) -> Iterator[Losses]:
        from training.losses import away_loss, reply_loss

        update, part = divmod(micro, self.config.accumulation)
        n = self.config.cases
        numbers = self.pool.drawn(update, n * self.config.accumulation)[part * n :][:n]
        reduced = self.config.precision == "bfloat16"
        with self.bench.clock.time("attack"), self.bench.adapted.merged(reduced=reduced):
            for number in numbers:
                self.pool.attack(number, update, self.gcg)
                self.attacked[number] = asdict(self.pool.cases[number])
        with self.bench.clock.time("forward"):
            cases = [self.pool.cases[number] for number in numbers]
            rows = [self._followed(case, self.pool.slot(case).target_ids) for case in cases]
            rows += [self._followed(case, self.refusal) for case in cases]
            out = self.bench.forward([*rows, *self.clean(micro)])
            losses = {
                "clean": reply_loss(*out.logits(range(2 * n, len(out.rows)))),
                "away": self.config.away_weight * away_loss(*out.logits(range(n))),
                "toward": self.config.toward_weight * reply_loss(*out.logits(range(n, 2 * n))),
            }
        yield losses

    def _followed(self, case: Case, reply: tuple[int, ...]) -> Example:
        """A test case and what is said after it."""
        slot = self.pool.slot(case)
        prompt = (*slot.before_ids, *case.suffix, *slot.after_ids)
        return Example((*prompt, *reply), len(prompt))

    def after_update(self, updates: int) -> Mapping[str, float]:
        for number, row in self.bench.devices.everyones(list(self.attacked.items())):
            self.pool.put(number, row)
        self.attacked = {}
        told = self.pool.summary()
        if updates % self.config.reset_every == 0:
            self.pool.begin_anew(updates, int(self.config.reset_share * self.config.pool))
        return told

    def state(self) -> Row:
        return {"pool": [asdict(case) for case in self.pool.cases]}

    def restore(self, row: Row) -> None:
        for number, case in enumerate(row["pool"]):
            self.pool.put(number, case)


def cost(config: R2D2Config, speed: Speed) -> float:
    """Each case is attacked, and followed by its target and by a refusal."""
    gcg = GCGConfig(search_width=config.search_width, topk=config.topk)
    attacks = config.num_steps * config.accumulation * config.cases * config.attack_steps
    learnt = config.batch_size + 2 * config.cases
    return attacks * step_seconds(gcg, speed) + update_cost(config, speed, learnt=learnt)


ARM = ARMS.add(
    Arm(
        name="r2d2",
        summary="Adversarial training against GCG test cases on the model as it is trained (R2D2).",
        config=R2D2Config,
        method=method,
        needs=(HARMFUL, HARMLESS, PSEUDO_HARMFUL),
        cost=cost,
        source="HarmBench, arXiv 2402.04249; pool and LoRA as in arXiv 2606.16349",
        small={
            "num_steps": 240,
            "checkpoints": (10, 25, 50, 100, 150, 240),
            "learning_rate": 2e-4,
            "pool": 32,
            "cases": 2,
            "attack_steps": 2,
            "search_width": 32,
            "topk": 64,
        },
        examples=("train r2d2 --out runs/r2d2 --preset small --seed 1",),
    )
)
