"""The matrix of a run: success rates by attack, source and target, from its replays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict

from core.errors import AttackPlaneError
from core.files import ANEW, each_row
from core.records import HARMFUL
from core.rows import Row
from core.store import ATTACKS, BEHAVIOURS, FAILURES, REPLAYS, RunFolder, id_in
from evaluation.calibration import Errors, known_errors, package_errors
from pipeline.calibrate import errors_of_run
from pipeline.runs import each_artifact, each_replay, write_rows
from transfer.matrix import Cell, matrix

TRANSFER, MATRIX = "transfer", "matrix.jsonl"


def judges_of(run: RunFolder) -> list[str]:
    """Names of the judges that replies of this run were judged by; the first decides.

    Raises:
        AttackPlaneError: the manifest says something else there.
    """
    judges: Any = run.manifest["stages"].get(TRANSFER, {}).get("judges", [])
    if not isinstance(judges, list) or not all(isinstance(name, str) for name in judges):
        raise AttackPlaneError(
            "judges: not a list of names",
            where=f"{run.path / 'manifest.json'}, {TRANSFER}",
            got=repr(judges)[:100],
            remedy="restore the file, or choose another run folder",
        )
    return judges


def _known_errors(run: RunFolder) -> Callable[[str], Errors | None]:
    """What is known of the first judge's errors, by attack class.

    Errors that were counted in this run stand before those of the package's labels.
    """
    judges = judges_of(run)
    table = {**package_errors(), **(errors_of_run(run.path) or {})}
    return lambda attack: known_errors(judges[0], attack, table) if judges else None


def error_notes(run: RunFolder) -> list[str]:
    """Says where no rate can be corrected, since the judge's errors are not known."""
    judges = judges_of(run)
    if judges and _known_errors(run)("") is None:
        return [f"the errors of the judge {judges[0]} are not known: rates are raw only"]
    return []


def labels_of(run: RunFolder) -> dict[str, str]:
    """Behaviour id -> label, of the behaviours that the run knows."""
    return {name: b.label for name, b in run.behaviours().items()}


def require_whole(run: RunFolder) -> None:
    """Whether every reply has its prompt in the run, and every prompt and reply its behaviour.

    Rows are looked at only so far: their fields are checked where they are read.

    Raises:
        AttackPlaneError: a file was deleted or cut: rates would be of fewer than there were.
    """
    behaviours, prompts = set(run.behaviours()), set[str]()

    def ids_of(file: str) -> Iterator[tuple[str, str, str]]:
        """Of each row its place, its prompt and its behaviour."""
        for line, row in each_row(run.path / file):
            place = f"{run.path / file}, line {line}"
            yield place, id_in(row, "artifact_id", place), id_in(row, "behaviour_id", place)

    for place, prompt, behaviour in ids_of(ATTACKS):
        prompts.add(prompt)
        _require(behaviour in behaviours, BEHAVIOURS, behaviour, place)
    for place, prompt, behaviour in ids_of(REPLAYS):
        _require(prompt in prompts, ATTACKS, prompt, place)
        _require(behaviour in behaviours, BEHAVIOURS, behaviour, place)


def _require(known: bool, file: str, name: str, place: str) -> None:
    if not known:
        raise AttackPlaneError(
            "the run refers to a row that it does not hold",
            where=place,
            got=f"{name!r}, which {file} has not",
            remedy=f"restore {file}, or remove this row and those like it",
        )


def expected_prompts(run: RunFolder) -> dict[tuple[str, str, str], int]:
    """How many prompts each (attack, source, label) has or, after failures, should have."""
    labels = labels_of(run)
    there = [(a.attack, a.source_model, a.behaviour_id, a.variant) for a in each_artifact(run)]
    failed = {
        (r["attack"], r["source"], r.get("behaviour", ""), r.get("variant"))
        for r in failures_of(run)
        if r["stage"] == "attack"
    }
    expected = Counter(
        (attack, source, labels.get(behaviour, HARMFUL)) for attack, source, behaviour, _ in there
    )
    expected.update(
        (attack, source, labels.get(behaviour, HARMFUL))
        for attack, source, behaviour, _ in failed.difference(there)
    )
    return dict(expected)


class Failure(TypedDict):
    """A cell that failed; what else its row says depends on the stage."""

    stage: str
    reason: str
    attack: NotRequired[str]
    source: NotRequired[str]
    behaviour: NotRequired[str]
    variant: NotRequired[str | None]


def failures_of(run: RunFolder) -> list[Row]:
    """The cells that failed.

    Raises:
        AttackPlaneError: a row that is none.
    """
    rows = list(run.checked(FAILURES, Failure, ANEW))
    for row in rows:
        if row["stage"] == "attack" and not {"attack", "source"} <= row.keys():
            where = run.path / FAILURES
            raise AttackPlaneError("not a failed cell", where=where, got=[*row], remedy=ANEW)
    return rows


def matrix_of(run: RunFolder, targets: Sequence[str] = ()) -> list[Cell]:
    """The matrix of a run. Prompts that could not be made are missing in it."""
    return matrix(
        each_replay(run),
        expected_prompts(run),
        labels=labels_of(run),
        errors=_known_errors(run),
        targets=targets,
    )


def write_matrix(run: RunFolder, targets: Sequence[str] = ()) -> list[Cell]:
    """The matrix of a run, also into ``matrix.jsonl``."""
    cells = matrix_of(run, targets)
    write_rows(run.path / MATRIX, (cell.to_row() for cell in cells))
    return cells
