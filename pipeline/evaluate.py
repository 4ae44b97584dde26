"""What a checkpoint costs and gains: robustness, usability, capability and integrity, one row each.

1. Frozen prompts of given runs, and plain requests of every label, are replayed on every model
   (``pipeline/transfer.py``).
2. GCG attacks every model anew, on a few behaviours (*adaptive*): what was optimised against
   another model understates what can be done to this one.
3. Capability and integrity are measured on the model itself (``pipeline/capability.py``).
4. Rows are made from all of it, and written whole each time.

What takes long is kept: replies and prompts in the run folder, the rest under a hash of what it
depends on. Over-refusal is never measured on requests that a checkpoint was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from attacks.gcg import ATTACK as GCG
from attacks.gcg import GCGConfig
from core.cards import base_of, card_of
from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.records import (
    BASELINES,
    HARMFUL,
    LABELS,
    PLAIN,
    AttackArtifact,
    Behaviour,
    Replay,
    content_hash,
)
from core.rows import Row
from core.served import is_served
from core.specs import canonical_name, short_spec
from core.statistics import wilson
from core.store import ATTACKS, REPLAYS, RunFolder
from evaluation.behaviours import DEMONSTRATION, load_behaviours, load_held_out, spread
from evaluation.budget import EvaluateConfig
from evaluation.calibration import known_errors
from evaluation.judges.reply_rules import is_degenerate
from evaluation.usability import (
    DEGREES,
    FULL,
    NONE,
    refusal_degree,
    refuse_overlap,
    trained_requests,
)
from pipeline.campaign import Plan, campaign
from pipeline.capability import Measures, require_tasks
from pipeline.matrices import require_whole
from pipeline.runs import artifacts_of, check_specs, replays_of, write_rows
from pipeline.transfer import Transfer, transfer
from plots.tradeoff_png import ROWS, draw, evaluation_rows
from transfer.matrix import matrix
from transfer.replay import ReplayConfig

STAGE, ADAPTIVE = "evaluate", "adaptive"
ADAPTIVE_TOPK = 64
FIXED = "fixed"
"""All fixed-source attacks together."""
UNKNOWN = "adaptive ASR, D, perplexity, KL, tasks and change inside"
"""What is not known of a served model: it takes weights."""


@dataclass
class EvaluateResult:
    """One row per model, files, and what the reader should know."""

    rows: list[Row] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """What is asked of the models.

    Attributes:
        attacks: run folders whose attacked prompts are replayed.
        usability: further sets whose harmless and pseudo-harmful requests are asked, such as
            ``xstest``.
        tasks: of lm-evaluation-harness; ``task_limit``: examples of each.
    """

    behaviours: str = DEMONSTRATION
    attacks: tuple[Path, ...] = ()
    usability: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    config: EvaluateConfig = EvaluateConfig()


def evaluate(
    path: Path,
    models: Sequence[str],
    asked: Evaluation,
    *,
    base: str | None = None,
    open_model: OpenModel = ModelHandle,
    on_model: Callable[[str], None] = lambda spec: None,
) -> EvaluateResult:
    """Evaluate models into a run folder; a stopped evaluation goes on.

    Args:
        base: what KL and change are measured from; None: the first model without its adapter.

    Raises:
        AttackPlaneError: over-refusal would be measured on what a model was trained on.
    """
    check_specs(models, served=True)
    here = [spec for spec in models if not is_served(spec)]
    base = base or base_of([*here, *models][0])
    held_out = load_held_out(asked.behaviours)
    requests = _requests(asked, held_out)
    for spec in models:
        ordinary = [b.request for b in requests if b.label != HARMFUL]
        refuse_overlap(ordinary, card_of(spec).get("trained_on", ()), f"evaluate {spec}")
    result = EvaluateResult()
    config = asked.config
    replays = ReplayConfig(config.max_new_tokens)
    with RunFolder(path) as run:
        run.begin_stage(
            STAGE,
            {**asdict(config), "base": base},
            {},
            empty=lambda: run.lacks(REPLAYS),
        )
        attacked = _take_attacks(run, asked, result.notes)
        stage = Transfer(run, asked.judges, replays, behaviours=requests)
        require_tasks(asked.tasks)
        measures = Measures(run, open_model(base), config, asked.tasks, asked.task_limit)

        def not_sent(artifact: AttackArtifact, error: Exception) -> None:
            result.notes.append(f"not sent: {artifact.attack} {artifact.behaviour_id}. {error}")

        wanted = attacked | _plain_ids(run, requests)
        before = {row["model"]: row for row in evaluation_rows(path)}
        for handle in map(open_model, models):
            spec = handle.spec
            on_model(spec)
            stage.replay_on(handle, not_sent)
            own: list[Replay] = []
            if handle.server:
                result.notes.append(f"{spec} is served: {UNKNOWN} are not known")
            else:
                own = _attack_anew(path, handle, asked, held_out, replays)
            measured = measures.of(handle)
            replies = [
                r for r in replays_of(run) if r.target_model == spec and r.artifact_id in wanted
            ]
            row = _row(run, spec, requests, replies, own, asked.judges[0])
            result.notes += _seen_in_training(run, spec, [*replies, *own])
            result.rows.append({**row, **measured, "fingerprint": handle.fingerprint})
            handle.release()
            before[spec] = result.rows[-1]
            write_rows(path / ROWS, before.values())
        write_rows(path / ROWS, result.rows)
    result.files = [path / ROWS, draw(path)]
    return result


def _requests(asked: Evaluation, held_out: Sequence[Behaviour]) -> list[Behaviour]:
    """The plain requests: held out, of every label, and those of further sets."""
    chosen = [
        b
        for label in LABELS
        for b in spread([b for b in held_out if b.label == label], asked.config.plain)
    ]
    for source in asked.usability:
        chosen += [b for b in load_behaviours(source) if b.label != HARMFUL]
    if not any(b.label == HARMFUL for b in chosen):
        raise AttackPlaneError(
            "no harmful requests to measure robustness on", where=f"evaluate, {asked.behaviours}"
        )
    return chosen


def _plain_ids(run: RunFolder, requests: Sequence[Behaviour]) -> set[str]:
    """The plain requests of this evaluation: one artifact for each."""
    own = {b.behaviour_id for b in requests}
    plain = [a for a in artifacts_of(run) if a.attack == PLAIN and a.behaviour_id in own]
    return set({a.behaviour_id: a.artifact_id for a in reversed(plain)}.values())


def _take_attacks(run: RunFolder, asked: Evaluation, notes: list[str]) -> set[str]:
    """Copy attacked prompts of other runs into this one, so many per class; their ids."""
    have = {a.artifact_id for a in artifacts_of(run)}
    taken: set[str] = set()
    for path in asked.attacks:
        other = RunFolder.existing(path)
        known = other.behaviours()
        by_class: dict[str, list[AttackArtifact]] = {}
        require_whole(other)
        for a in artifacts_of(other):
            if a.attack not in BASELINES and known[a.behaviour_id].label == HARMFUL:
                by_class.setdefault(a.attack, []).append(a)
        if not by_class:
            notes.append(f"{path} has no attacked prompts of harmful requests")
        for artifacts in by_class.values():
            behaviours = [known[i] for i in dict.fromkeys(a.behaviour_id for a in artifacts)]
            kept = spread(behaviours, asked.config.per_class)
            run.note_behaviours(kept)
            first = {a.behaviour_id: a for a in reversed(artifacts)}  # one prompt per behaviour
            for b in kept:
                artifact = first[b.behaviour_id]
                taken.add(artifact.artifact_id)
                if artifact.artifact_id not in have:
                    run.append(ATTACKS, artifact.to_row())
                    have.add(artifact.artifact_id)
    return taken


def adaptive_config(config: EvaluateConfig) -> GCGConfig:
    """GCG as it attacks every model anew."""
    return GCGConfig(
        num_steps=config.adaptive_steps, search_width=config.adaptive_width, topk=ADAPTIVE_TOPK
    )


def _attack_anew(
    path: Path,
    handle: ModelHandle,
    asked: Evaluation,
    held_out: Sequence[Behaviour],
    replays: ReplayConfig,
) -> list[Replay]:
    """Replies of the model to GCG prompts that were made on it."""
    config = asked.config
    if not config.adaptive:
        return []
    own = f"{canonical_name(short_spec(handle.spec))}-{content_hash(handle.spec, 8)}"
    folder = path / ADAPTIVE / own
    harmful = [b for b in held_out if b.label == HARMFUL and b.target_string]
    behaviours = spread(harmful, config.adaptive)
    if not behaviours:
        return []
    plan = Plan(GCG, adaptive_config(config), (handle,))
    campaign(folder, behaviours, [plan], seed=config.seed, open_model=lambda _: handle)
    transfer(folder, [handle.spec], asked.judges, replays, open_model=lambda _: handle)
    return [r for r in replays_of(RunFolder(folder)) if r.attack == GCG.name]


def _seen_in_training(run: RunFolder, spec: str, replays: Sequence[Replay]) -> list[str]:
    """A note where harmful requests of these replies were trained on: their ASR flatters."""
    behaviours = run.behaviours()
    asked = {behaviours[r.behaviour_id] for r in replays if r.behaviour_id in behaviours}
    harmful = [b.request for b in asked if b.label == HARMFUL]
    seen = trained_requests(harmful, card_of(spec).get("trained_on", ()))
    if not seen:
        return []
    return [
        f"{spec} was trained on {len(seen)} of the {len(harmful)} harmful requests: its success "
        "rates are not held out"
    ]


# --- rows -----------------------------------------------------------------------------------------
def _row(
    run: RunFolder,
    spec: str,
    requests: Sequence[Behaviour],
    replays: Sequence[Replay],
    adaptive: Sequence[Replay],
    judge: str,
) -> Row:
    """Everything that is said of one model."""
    card = card_of(spec)
    plain = [r for r in replays if r.attack == PLAIN]
    return {
        "model": spec,
        "arm": card.get("arm"),
        "step": card.get("step", 0),
        "seed": card.get("seed"),
        "training": [card.get("base"), card.get("settings")],
        "robustness": _robustness(run, replays, adaptive, judge),
        "usability": _usability(plain, requests),
        "degenerate": _share([is_degenerate(r.reply) for r in plain]),
    }


def _robustness(
    run: RunFolder, replays: Sequence[Replay], adaptive: Sequence[Replay], judge: str
) -> Row:
    """Attack class -> rates of harmful requests; ``fixed`` pools the fixed-source classes."""
    labels = {i: b.label for i, b in run.behaviours().items()}
    harmful = [r for r in replays if labels.get(r.behaviour_id) == HARMFUL]
    fixed = [r for r in harmful if r.attack not in BASELINES]
    renamed = [replace(r, source_model="any") for r in harmful]
    renamed += [replace(r, attack=FIXED, source_model="any") for r in fixed]
    renamed += [replace(r, attack=ADAPTIVE, source_model="any") for r in adaptive]
    cells = matrix(
        renamed,
        labels=labels,
        errors=lambda name: known_errors(judge, GCG.name if name == ADAPTIVE else name),
    )
    keys = ("behaviours", "asr", "wilson", "corrected", "corrected_interval", "refused", "d")
    return {c.attack: {key: c.to_row()[key] for key in keys} for c in cells}


def _usability(plain: Sequence[Replay], requests: Sequence[Behaviour]) -> Row:
    """Set and label -> shares of full, partial and no refusals, with Wilson's interval of full."""
    replies = {r.behaviour_id: r for r in plain}
    groups: dict[str, list[Replay]] = {}
    labels: dict[str, str] = {}
    for b in requests:
        if b.behaviour_id in replies:
            own = b.label if b.benchmark.startswith(DEMONSTRATION) else f"{b.benchmark} {b.label}"
            groups.setdefault(own, []).append(replies[b.behaviour_id])
            labels[own] = b.label
    rows: Row = {}
    for name, group in groups.items():
        degrees = [refusal_degree(r.reply) for r in group]
        counts = {degree: degrees.count(degree) for degree in DEGREES}
        leanings = [r.d for r in group if r.d is not None]
        rows[name] = {
            "label": labels[name],
            "n": len(group),
            **{degree: counts[degree] / len(group) for degree in DEGREES},
            "full_wilson": wilson(counts[FULL], len(group)),
            "refused_wilson": wilson(len(group) - counts[NONE], len(group)),
            "d": sum(leanings) / len(leanings) if leanings else None,
            "degenerate": _share([is_degenerate(r.reply) for r in group]),
        }
    return rows


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
