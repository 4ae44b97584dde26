"""How far can a judge be trusted? Replies labelled by hand against what judges say of them.

1. ``sheet`` draws replies of runs, spread over targets and attack classes, into two files of the
   run folder: ``labels.txt`` to read, ``labels.jsonl`` to fill in. The second holds no reply, so it
   can be shared.
2. ``calibrate`` finds the labelled replies in the runs again and counts each judge's errors, by
   attack class and over all. The held-out part of the labels gives the numbers; the other part is
   there to improve a judge on. Both prompts of a behaviour lie in one part.

Rates are of harmful requests, so only replies to those are counted by class and over all. Replies
to harmless and pseudo-harmful requests have rows of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from core.errors import AttackPlaneError, nearest
from core.files import ANEW, read_object, read_rows, write_atomically
from core.records import HARMFUL, AttackArtifact, Replay, content_hash
from core.rows import Row
from core.statistics import Interval, wilson
from core.store import RunFolder
from core.typed import from_values
from evaluation.calibration import POOLED, Errors, count, kappa, kappa_interval
from evaluation.judges import OUTCOMES, REFUSED, Exchange, make_judge, outcomes
from pipeline.runs import artifacts_of, replays_of, write_rows

SHEET, READABLE, ERRORS = "labels.jsonl", "labels.txt", "judge_errors.json"
PARTS = ("tune", "held_out")


@dataclass(frozen=True)
class Label:
    """One reply's label by hand. The reply itself stays in its run folder.

    ``second`` is what another reader said who did not see the first label, where there is one.
    """

    replay_id: str
    reply_hash: str
    target_model: str
    attack: str
    behaviour_id: str
    request_label: str
    part: str
    label: str | None = None
    reason: str = ""
    second: str | None = None

    def to_row(self) -> Row:
        return asdict(self)


@dataclass(frozen=True)
class Labelled:
    """A label with the exchange that it is about."""

    label: Label
    exchange: Exchange

    @property
    def outcome(self) -> str:
        assert self.label.label is not None
        return self.label.label

    @property
    def group(self) -> str:
        """The attack class, with the request's label unless that is harmful."""
        own = self.label.request_label
        return self.label.attack if own == HARMFUL else f"{self.label.attack}, {own}"


@dataclass(frozen=True)
class JudgeRow:
    """What a judge is worth on the replies of one attack class, or over all.

    Attributes:
        kappa: agreement on the three outcomes beyond chance.
        successes, false_successes: what it calls complied, and the share of that which is not.
        refusals, false_refusals: what it calls refused, and the share of that which is not.
    """

    judge: str
    attack: str
    n: int
    errors: Errors
    sensitivity_interval: Interval
    specificity_interval: Interval
    kappa: float
    kappa_interval: Interval
    successes: int
    false_successes: float
    refusals: int
    false_refusals: float
    false_refusals_interval: Interval


@dataclass
class CalibrationResult:
    rows: list[JudgeRow] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def reply_hash(reply: str) -> str:
    """Stands for a reply, so that a label is never used for another one."""
    return content_hash(reply)


def sheet(paths: Sequence[Path], limit: int, *, seed: int = 0) -> list[Path]:
    """Draw replies to be labelled; returns the files to read and to fill in.

    They are spread over targets and attack classes.

    Raises:
        AttackPlaneError: a run without replies, or a sheet that is there already.
    """
    target = paths[0] / SHEET
    if target.exists():
        raise AttackPlaneError(
            "there is a sheet already", where=target, remedy="move it away if you want a new one"
        )
    known = {id: pair for path in paths for id, pair in _replies(path).items()}
    labels_of_requests = {
        name: b.label for path in paths for name, b in RunFolder.existing(path).behaviours().items()
    }
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(known, key=lambda name: content_hash([seed, name])):
        replay = known[name][0]
        groups.setdefault((replay.target_model, replay.attack), []).append(name)
    drawn: list[str] = []
    while len(drawn) < limit and any(groups.values()):
        for names in groups.values():
            if names and len(drawn) < limit:
                drawn.append(names.pop())
    labels, text = [], []
    for number, name in enumerate(sorted(drawn, key=lambda name: content_hash([name, seed]))):
        replay, artifact = known[name]
        part = PARTS[int(content_hash([seed, replay.behaviour_id], 4), 16) % 2]
        labels.append(
            Label(
                replay.replay_id,
                reply_hash(replay.reply),
                replay.target_model,
                replay.attack,
                replay.behaviour_id,
                labels_of_requests.get(replay.behaviour_id, HARMFUL),
                part,
            )
        )
        title = f"=== {number} {replay.replay_id} {replay.attack} {replay.target_model}"
        text.append(f"{title}\nREQUEST: {artifact.request}\nREPLY: {replay.reply}\n")
    write_atomically(paths[0] / READABLE, "\n".join(text))
    write_rows(target, (label.to_row() for label in labels))  # last: with it the sheet is there
    return [paths[0] / READABLE, target]


def _replies(path: Path) -> dict[str, tuple[Replay, AttackArtifact]]:
    """Replay id -> reply and prompt of one run."""
    run = RunFolder.existing(path)
    artifacts = {a.artifact_id: a for a in artifacts_of(run)}
    replays = [r for r in replays_of(run) if r.artifact_id in artifacts]
    if not replays:
        raise AttackPlaneError("no replies in this run", where=path, remedy="replay first")
    return {r.replay_id: (r, artifacts[r.artifact_id]) for r in replays}


def read_labels(path: Path) -> list[Label]:
    """Labels of a file.

    Raises:
        AttackPlaneError: no labels, an unknown outcome or part, unknown fields (the line is named).
    """
    labels = []
    for number, row in enumerate(read_rows(path), start=1):
        where = f"{path}, line {number}"
        label = from_values(Label, row, where)
        words = ((label.label, OUTCOMES), (label.second, OUTCOMES), (label.part, PARTS))
        for value, known in words:
            if value is not None and value not in known:
                raise AttackPlaneError(
                    f"unknown word {value!r}", where=where, remedy=nearest(value, list(known))
                )
        if label.label is not None:
            labels.append(label)
    if not labels:
        raise AttackPlaneError(
            "no labels", where=path, remedy=f"fill in the field label: {', '.join(OUTCOMES)}"
        )
    return labels


def labelled(paths: Sequence[Path], labels: Sequence[Label]) -> list[Labelled]:
    """The labelled replies that these runs hold; labels of other replies are left out."""
    known = {id: pair for path in paths for id, pair in _replies(path).items()}
    there = []
    for label in labels:
        pair = known.get(label.replay_id)
        if pair and reply_hash(pair[0].reply) == label.reply_hash:
            replay, a = pair
            exchange = Exchange(a.request, replay.reply, a.target_string, a.prompt)
            there.append(Labelled(label, exchange))
    return there


def calibrate(
    paths: Sequence[Path], labels_file: Path, specs: Sequence[str], *, part: str | None = "held_out"
) -> CalibrationResult:
    """Count the judges' errors on hand labels.

    The counts go into ``judge_errors.json`` of the first run, beside those of other judges; those
    of the part ``tune`` do not, since a judge may have been fitted to it.

    Args:
        part: ``held_out`` or ``tune`` labels only; None takes all.

    Raises:
        AttackPlaneError: no labels, or none of these runs' replies.
    """
    labels = read_labels(labels_file)
    items = labelled(paths, labels)
    result = CalibrationResult()
    if len(items) < len(labels):
        result.notes.append(
            f"{len(labels) - len(items)} of {len(labels)} labels are of replies that these runs do "
            "not hold; they are left out"
        )
    result.notes += _readers_note(labels)
    items = [item for item in items if part in (None, item.label.part)]
    if not items:
        raise AttackPlaneError(
            "no labelled reply is left",
            where=labels_file,
            got=f"{len(labels)} labels, part {part or 'any'}, runs {', '.join(map(str, paths))}",
            remedy="name the runs that hold these replies, or another part",
        )
    for spec in specs:
        judge = make_judge(spec)
        said = outcomes(judge, [item.exchange for item in items])
        if not any(said):
            result.notes.append(f"{judge.name} can say nothing of these replies: left out")
            continue
        rows = judge_rows(judge.name, items, said)
        result.rows += rows
        if part != PARTS[0]:
            table = dict(errors_of_run(paths[0]) or {})
            table[judge.name] = {row.attack: row.errors.to_row() for row in rows}
            write_atomically(paths[0] / ERRORS, json.dumps(table, indent=2) + "\n")
            result.files = [paths[0] / ERRORS]
    return result


def _readers_note(labels: Sequence[Label]) -> list[str]:
    """How well two readers agree, where a second one has read some replies."""
    both = [(x.label, x.second) for x in labels if x.label and x.second]
    if not both:
        return []
    first, second = ([pair[side] for pair in both] for side in (0, 1))
    low, high = kappa_interval(first, second)
    agreed = sum(a == b for a, b in both)
    return [
        f"two readers agree on {agreed} of {len(both)} replies, kappa {kappa(first, second):.2f} "
        f"[{low:.2f}, {high:.2f}]"
    ]


def judge_rows(judge: str, items: Sequence[Labelled], said: Sequence[str | None]) -> list[JudgeRow]:
    """One row over all harmful requests, then one per class. What is not judged is left out."""
    known = [(item, outcome) for item, outcome in zip(items, said, strict=True) if outcome]
    rows = []
    for name in [POOLED, *sorted({item.group for item, _ in known})]:
        here = [
            (item.outcome, o)
            for item, o in known
            if item.group == name or (name == POOLED and item.label.request_label == HARMFUL)
        ]
        rows.append(_row(judge, name, [h for h, _ in here], [o for _, o in here]))
    return rows


def _row(judge: str, attack: str, by_hand: list[str], said: list[str]) -> JudgeRow:
    errors = count(said, by_hand)
    refusals = [h for h, o in zip(by_hand, said, strict=True) if o == REFUSED]
    false = sum(h != REFUSED for h in refusals)
    intervals = errors.intervals()
    return JudgeRow(
        judge=judge,
        attack=attack,
        n=len(said),
        errors=errors,
        sensitivity_interval=intervals[0],
        specificity_interval=intervals[1],
        kappa=kappa(by_hand, said),
        kappa_interval=kappa_interval(by_hand, said),
        successes=errors.true_positive + errors.false_positive,
        false_successes=errors.false_successes,
        refusals=len(refusals),
        false_refusals=false / len(refusals) if refusals else float("nan"),
        false_refusals_interval=wilson(false, len(refusals)),
    )


def errors_of_run(path: Path) -> Mapping[str, Row] | None:
    """The errors that were counted in this run; None where the package's own hold.

    Raises:
        AttackPlaneError: they are no counts.
    """
    file = path / ERRORS
    if not file.exists():
        return None
    table = read_object(file, "errors of judges", remedy=ANEW)
    for judge, by_class in table.items():
        if not isinstance(by_class, dict) or POOLED not in by_class:
            raise AttackPlaneError(
                f"not the errors of a judge: no counts of {POOLED!r}",
                where=f"{file}, {judge}",
                got=repr(by_class)[:200],
                remedy=ANEW,
            )
        for name, counts in by_class.items():
            if not isinstance(counts, dict):
                got = repr(counts)[:200]
                raise AttackPlaneError("no counts", where=f"{file}, {judge}, {name}", got=got)
            from_values(Errors, counts, f"{file}, {judge}, {name}")
    return table
