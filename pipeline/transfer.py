"""Frozen prompts on targets: replies, verdicts, the matrix of success rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from core.errors import AttackPlaneError
from core.generate import BATCH
from core.models import ModelHandle, OpenModel
from core.progress import bar as progress_bar
from core.records import AttackArtifact, Behaviour
from core.store import REPLAYS, RunFolder
from evaluation.judges import Judge, judge_kind, make_judge
from pipeline.matrices import TRANSFER, error_notes, labels_of, write_matrix
from pipeline.plain import add_plain_requests
from pipeline.runs import artifacts_of, check_specs, each_replay
from transfer.agreement import Agreement, agreements
from transfer.matrix import Cell
from transfer.replay import NotSent, ReplayConfig, sendings
from transfer.served import replies_of


@dataclass
class TransferResult:
    """The matrix of rates, how D agrees with success, and what the reader should know."""

    cells: list[Cell] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Transfer:
    """The stage within one run folder: its artifacts, judges and settings.

    Judges are made when a reply is first judged, since some of them load a model.
    """

    def __init__(
        self,
        run: RunFolder,
        judges: Sequence[str],
        config: ReplayConfig,
        batch_size: int = BATCH,
        *,
        behaviours: Sequence[Behaviour] = (),
        system_prompt: str | None = None,
        add_plain: bool = True,
    ) -> None:
        for spec in judges:
            judge_kind(spec)
        self.run, self.config, self.batch_size = run, config, batch_size
        self.settings = {**config.of_one, "judges": list(judges)}
        self._specs, self.made_judges = judges, list[Judge]()
        self._begin({})
        self.added = add_plain_requests(run, behaviours, system_prompt) if add_plain else 0
        self.artifacts = artifacts_of(run)

    def begin(self, target: ModelHandle) -> None:
        """Write a target into the manifest; one whose files have changed is refused."""
        self._begin({target.spec: target.fingerprint})

    def _begin(self, models: dict[str, str]) -> None:
        empty = partial(self.run.lacks, REPLAYS)
        self.run.begin_stage(TRANSFER, self.settings, models, empty=empty)

    def replay_on(self, target: ModelHandle, not_sent: NotSent | None = None) -> int:
        """Make the replies that the run lacks on one target; returns how many those are."""
        self.begin(target)
        done = set(self.run.each_id(REPLAYS, "replay_id"))
        wanted = sendings(self.artifacts, self.config)
        missing = [
            sending
            for sending in wanted
            if sending.replay_id(target.spec, target.fingerprint, self.config) not in done
        ]
        if not missing:
            return 0
        self.made_judges = self.made_judges or [make_judge(spec) for spec in self._specs]
        batches = replies_of(
            target.server or target.loaded,
            missing,
            self.made_judges,
            self.config,
            batch_size=self.batch_size,
            not_sent=not_sent,
        )
        bar = progress_bar(
            len(wanted),
            f"replay on {target.spec[-40:]}",
            "reply",
            initial=len(wanted) - len(missing),
            leave=None,
        )
        count = 0
        with bar:
            for rows in batches:
                for row in rows:
                    self.run.append(REPLAYS, row.to_row())
                bar.update(len(rows))
                count += len(rows)
        return count


def transfer(
    path: Path,
    targets: Sequence[str],
    judges: Sequence[str],
    config: ReplayConfig,
    *,
    behaviours: Sequence[Behaviour] = (),
    system_prompt: str | None = None,
    batch_size: int = BATCH,
    open_model: OpenModel = ModelHandle,
) -> TransferResult:
    """Replay every artifact of a run on every target, and write the matrix.

    The plain requests of ``behaviours`` under ``system_prompt`` are sent too; with them the run may
    be new. Every attacked request gets its plain request.
    """
    check_specs(targets, served=True)
    result = TransferResult()
    with RunFolder(path) if behaviours else RunFolder.existing(path) as run:
        stage = Transfer(
            run, judges, config, batch_size, behaviours=behaviours, system_prompt=system_prompt
        )
        if not stage.artifacts:
            raise AttackPlaneError(
                "no artifacts in this run",
                where=path,
                remedy="make some first, with `gcg`, or send plain requests: --behaviours",
            )
        if stage.added and not behaviours:
            result.notes.append(f"{stage.added} plain requests were missing and are added")
        result.notes += length_notes(stage.artifacts, config)

        def not_sent(artifact: AttackArtifact, error: Exception) -> None:
            what = f"{artifact.attack} {artifact.behaviour_id} {artifact.artifact_id}"
            result.notes.append(f"not sent: {what}. {error}")

        for spec in targets:
            stage.replay_on(open_model(spec), not_sent)
        result.cells = write_matrix(run)
        result.agreements = agreements(each_replay(run), labels_of(run))
        result.notes += error_notes(run)
    return result


def length_notes(artifacts: Sequence[AttackArtifact], config: ReplayConfig) -> list[str]:
    """How long the replies to each class are, where that is not the same for all."""
    lengths: dict[int, list[str]] = {}
    for name in dict.fromkeys(a.attack for a in artifacts):
        lengths.setdefault(config.of(name).max_new_tokens or 0, []).append(name)
    if len(lengths) < 2:
        return []
    text = "; ".join(f"{n} for {', '.join(names)}" for n, names in lengths.items())
    return [f"new tokens of a reply: {text}"]
