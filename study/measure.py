"""Which published claims hold on these models? One run folder, JSON lines and a picture.

1. Claims about attacks take the run's own prompts; a run without any gets the prompt-level attacks
   on the held-out harmful behaviours first.
2. Each model is loaded once. While it is there, it replies to the prompts, its directions are
   estimated, its plane is read, and every claim is measured on it.
3. The matrix, the plane, ``claims.jsonl`` and ``claims.png`` are written; claims of other models
   and numbers stay in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from attacks.templates import ATTACK as TEMPLATES
from attacks.templates import TemplatesConfig
from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.records import HARMFUL, AttackArtifact
from core.store import ATTACKS, REPLAYS, RunFolder
from core.typed import from_values
from evaluation.behaviours import load_behaviours, spread
from evaluation.judges import DEFAULT_JUDGES, QUICK_JUDGE
from pipeline.campaign import Plan, baseline_plans, campaign
from pipeline.contrast_reading import contrast_set
from pipeline.directions import begin_directions
from pipeline.matrices import TRANSFER, judges_of, labels_of, write_matrix
from pipeline.plane import PlaneConfig, PlaneStage
from pipeline.runs import artifacts_of, check_specs, each_replay, first_replies, write_rows
from pipeline.transfer import Transfer
from plots import claims_png
from study.claims.evidence import CONTROLS, Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.config import StudyConfig
from study.plan import Piece, plan
from study.study import Study
from study.verdicts import Claim, claim_of, with_holm
from transfer.agreement import Agreement, agreements
from transfer.matrix import Cell
from transfer.replay import ReplayConfig

CLAIMS_FILE, STAGE = "claims.jsonl", "claims"
OWN_ATTACKS = "claims_attacks"
CLASSES = (
    "nested_fiction",
    "code_completion",
    "persuasion",
    "persona",
    "refusal_suppression",
    "past_tense",
)
"""Prompt-level attacks that a run without prompts gets."""


@dataclass
class ClaimsResult:
    claims: list[Claim] = field(default_factory=list)
    matrix: list[Cell] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)


def chosen_tests(numbers: Sequence[int]) -> list[ClaimTest]:
    """The claims of these numbers, all without any.

    Raises:
        AttackPlaneError: a number that no claim has.
    """
    known = {test.number: test for test in CLAIMS.all().values()}
    unknown = [n for n in numbers if n not in known]
    if unknown:
        there = ", ".join(map(str, sorted(known)))
        raise AttackPlaneError(
            "no such claim here", got=unknown, remedy=f"claims that can be measured: {there}"
        )
    return [known[n] for n in sorted(numbers or known)]


def claims(
    path: Path,
    specs: Sequence[str],
    numbers: Sequence[int],
    config: StudyConfig,
    *,
    controls: int = CONTROLS,
    open_model: OpenModel = ModelHandle,
) -> ClaimsResult:
    """Measure the claims ``numbers`` on every model; ``controls`` of each kind."""
    check_specs(specs)
    tests = chosen_tests(numbers)
    on_attacks = any(test.needs_attacks for test in tests)
    with RunFolder(path) as run:  # a refusal comes before hours of work
        run.begin_stage(STAGE, config.to_settings(), {})
        if on_attacks:  # the plane reads the run's directions
            begin_directions(run, config.directions)
    if on_attacks:
        make_attacks(path, config, open_model)
    with RunFolder(path) as run:
        stage = _Claims(run, specs, tests, config, on_attacks, controls)
        models = [open_model(spec) for spec in specs]
        for model in models:
            stage.measure(model)
            model.release()
        return stage.write(models)


def planned(
    path: Path,
    specs: Sequence[str],
    numbers: Sequence[int],
    config: StudyConfig,
    *,
    controls: int = CONTROLS,
    open_model: OpenModel = ModelHandle,
) -> dict[str, list[Piece]]:
    """By model: the pieces of work of ``claims`` and how long they will take; nothing is kept."""
    check_specs(specs)
    tests = chosen_tests(numbers)
    pieces = {}
    for spec in specs:
        with TemporaryDirectory() as folder:
            scratch = Path(folder)
            if (path / ATTACKS).exists():
                shutil.copy(path / ATTACKS, scratch / ATTACKS)
            with RunFolder(scratch) as run:
                model = open_model(spec)
                pieces[spec] = plan(Study(run, model, config), tests, controls, len(CLASSES))
                model.release()
    return pieces


def make_attacks(path: Path, config: StudyConfig, open_model: OpenModel) -> None:
    """Prompt-level attacks on the held-out harmful behaviours, in a run without prompts."""
    with RunFolder(path) as run:
        ours = not (path / ATTACKS).exists() or OWN_ATTACKS in run.manifest["stages"]
        if ours:  # noted first: what a stopped command has begun the same command finishes
            run.begin_stage(OWN_ATTACKS, {"templates": list(CLASSES)}, {})
    if ours:
        splits = config.held_out_splits
        behaviours = load_behaviours(config.held_out, label="harmful", splits=splits)
        behaviours = spread(behaviours, config.held_out_prompts)
        plan = Plan(TEMPLATES, TemplatesConfig(CLASSES, system_prompt=config.system_prompt))
        plans = [*baseline_plans(plan), plan]
        campaign(path, behaviours, plans, seed=config.seed, open_model=open_model)


class _Claims:
    """The stage within one run folder."""

    def __init__(
        self,
        run: RunFolder,
        specs: Sequence[str],
        tests: Sequence[ClaimTest],
        config: StudyConfig,
        on_attacks: bool,
        controls: int,
    ) -> None:
        self.controls = controls
        self.run, self.specs, self.tests, self.config = run, specs, tests, config
        self.result = ClaimsResult()
        self.transfer = self.plane = None
        if on_attacks:
            self.transfer = Transfer(run, *_replay_settings(run, config))
            drawn = PlaneConfig(anchors=config.held_out, anchor_splits=config.held_out_splits)
            self.plane = PlaneStage(run, specs, drawn)
            self.seen = self._contrast_behaviours()

    def _contrast_behaviours(self) -> set[str]:
        """Ids of attacked behaviours that directions were estimated on: nothing is claimed
        there."""
        known = {b.request for b in contrast_set(self.config.directions)}
        seen = {a.behaviour_id for a in artifacts_of(self.run) if a.request in known}
        if seen:
            self.result.notes.append(
                f"note: {len(seen)} attacked behaviours are contrast prompts and are left out of "
                "the claims about attacks"
            )
        return seen

    def measure(self, model: ModelHandle) -> None:
        """Everything that is asked of one model."""
        study = Study(self.run, model, self.config)
        stage = {model.spec: model.fingerprint}
        self.run.begin_stage(STAGE, self.config.to_settings(), stage)
        if any(not test.needs_attacks for test in self.tests):
            study.held_out("harmful"), study.held_out("harmless")  # a refusal before the work
        evidence = Evidence(study, self.controls)
        if self.transfer and self.plane:
            self.transfer.replay_on(model, self._not_sent)
            _ = study.directions  # the plane needs them in the run
            reading = self.plane.read(model)
            evidence = Evidence(study, self.controls, *self._attacked(model.spec), reading)
        self.result.claims += [test.on(evidence) for test in self.tests]

    def _attacked(self, spec: str) -> tuple[list, list, list]:
        """Artifacts, replies and points of harmful behaviours that no direction has seen."""
        assert self.plane is not None
        labels = labels_of(self.run)
        out = self.seen | {name for name, label in labels.items() if label != HARMFUL}
        own = [
            p
            for p in self.plane.points
            if (p.target, p.kind, p.frame) == (spec, "attack", "own") and p.behaviour_id not in out
        ]
        artifacts = [a for a in artifacts_of(self.run) if a.behaviour_id not in out]
        return artifacts, list(first_replies(self.run)), own

    def _not_sent(self, artifact: AttackArtifact, error: Exception) -> None:
        what = f"{artifact.attack} {artifact.behaviour_id} {artifact.artifact_id}"
        self.result.notes.append(f"not sent: {what}. {error}")

    def write(self, models: Sequence[ModelHandle]) -> ClaimsResult:
        """Matrix and plane, then the claims beside those of other models and numbers."""
        result, path = self.result, self.run.path
        if self.plane:
            result.matrix = write_matrix(self.run)
            result.agreements = agreements(each_replay(self.run), labels_of(self.run))
            self.plane.write(models)
            result.notes += self.plane.result.notes
        measured = {(c.number, c.model) for c in result.claims}
        before = [
            claim_of(row, f"{path / CLAIMS_FILE}, line {line}")
            for line, row in self.run.each_row(CLAIMS_FILE)
        ]
        kept = [c for c in before if (c.number, c.model) not in measured]
        every = sorted(with_holm([*kept, *result.claims]), key=lambda c: c.number)
        order = [model.spec for model in models]
        result.claims = [c for c in every if (c.number, c.model) in measured]
        result.claims.sort(key=lambda c: (c.number, order.index(c.model)))
        rows = [c.to_row() for c in every]
        result.files = [write_rows(path / CLAIMS_FILE, rows), claims_png.draw(path)]
        return result


def _replay_settings(run: RunFolder, config: StudyConfig) -> tuple[tuple[str, ...], ReplayConfig]:
    """Judges and settings of the run's replies; those of the study where it has none."""
    stages = run.manifest["stages"]
    if (run.path / REPLAYS).exists() and TRANSFER in stages:
        where = f"{run.path / 'manifest.json'}, {TRANSFER}"
        before = {k: v for k, v in stages[TRANSFER].items() if k != "judges"}
        return tuple(judges_of(run)), from_values(ReplayConfig, before, where)
    judges = DEFAULT_JUDGES if config.judge == QUICK_JUDGE else (config.judge, "target_prefix")
    return judges, ReplayConfig(None, 0.0, config.seed)
