"""Join run folders: prompts and replies by id, behaviours, settings and provenance.

Nothing is written before all folders have been read and found to agree. A row that several folders
hold alike is taken once; two different rows of one id are refused. What stages make of all rows
together (directions, plane, matrix) is not joined: the stages make it anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import each_row, write_atomically
from core.records import AttackArtifact, Behaviour, Record, Replay, content_hash
from core.rows import Row
from core.store import ATTACKS, BEHAVIOURS, FAILURES, REPLAYS, RunFolder, id_in
from interchange.importer import REJECTS
from pipeline.calibrate import ERRORS
from pipeline.matrices import failures_of, require_whole
from pipeline.sweep.shards import shard_of

JOINED: dict[str, tuple[str, type[Record]]] = {
    BEHAVIOURS: ("behaviour_id", Behaviour),
    ATTACKS: ("artifact_id", AttackArtifact),
    REPLAYS: ("replay_id", Replay),
}
"""The files that are joined, the ids of their rows, and what their rows are."""


LEFT = (ERRORS, REJECTS)
"""What a run may hold besides, that no stage makes anew."""
DERIVED = ("plane", "layers", "intervene", "import")
"""Stages whose settings may differ: what they write is not joined."""


@dataclass
class MergeResult:
    """Rows that were added, by file, and what the reader should know."""

    added: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def merge(path: Path, folders: Sequence[Path]) -> MergeResult:
    """Join ``folders`` into the run at ``path``, which may hold rows already; may be repeated.

    Raises:
        AttackPlaneError: no run, the run itself among them, other settings of a stage, other files
            of a model, shards of other numbers, or two rows of one id.
    """
    result = MergeResult()
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = [RunFolder.existing(folder) for folder in folders]
    for folder in folders:
        if path.resolve().is_relative_to(folder.resolve()):
            raise AttackPlaneError(
                "a run cannot be merged into itself or into a folder in it",
                where=path,
                got=f"among the folders to be joined: {folder}",
                remedy="give --run another folder",
            )
    result.notes += _shards(path, folders)
    with RunFolder(path) as run, ExitStack() as held:
        for one in runs:  # a run that is still being written would be joined in part
            held.enter_context(one)
        manifest = _manifest([run, *runs])
        hashes = {name: _agreeing(name, [run, *runs]) for name in JOINED}
        for one in runs:
            require_whole(one)
        failures = {json.dumps(row): None for one in [run, *runs] for row in failures_of(one)}
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        for name in JOINED:
            result.added[name] = _join(name, run, runs, set(hashes[name]))
        if failures:
            write_atomically(path / FAILURES, "".join(f"{row}\n" for row in failures))
            result.notes.append(f"{len(failures)} cells failed; the sweep tries them again")
    if len({json.dumps(run.manifest["history"][-1:]) for run in runs}) > 1:
        result.notes.append("made with different versions: see the history in the manifest")
    for folder in folders:
        if any((folder / "state").glob("*.json")):
            result.notes.append(f"{folder} has searches in progress: finish it, and merge again")
        left = [name for name in LEFT if (folder / name).exists()]
        if left:
            result.notes.append(f"not joined: {', '.join(left)} of {folder}")
    return result


def _shards(path: Path, folders: Sequence[Path]) -> list[str]:
    """What is to be said of the shards among the folders."""
    if shard_of(path):
        raise AttackPlaneError(
            "other runs would be merged into a shard",
            where=path,
            remedy="give --run another folder; the shard is one of those to be joined",
        )
    shards = {folder: shard for folder in folders if (shard := shard_of(folder))}
    counts = {shard.of for shard in shards.values()}
    if len(counts) > 1:
        raise AttackPlaneError(
            "shards of different numbers",
            got=", ".join(f"{s.number}/{s.of}" for s in shards.values()),
        )
    there = {shard.number for shard in shards.values()}
    missing = [str(n) for n in range(1, max(counts, default=0) + 1) if n not in there]
    if not missing:
        return []
    return [f"shards {', '.join(missing)} of {counts.pop()} are missing: merge them too"]


def _manifest(runs: Sequence[RunFolder]) -> Row:
    """One manifest of all; the settings of each stage and the files of each model must agree."""
    manifests = [run.manifest for run in runs]
    whole: Row = {**manifests[0], "stages": {}, "models": {}, "history": []}
    for run, one in zip(runs, manifests, strict=True):
        for kind in ("stages", "models"):
            for name, value in one[kind].items():
                if kind == "stages" and name in DERIVED:
                    continue
                if whole[kind].setdefault(name, value) != value:
                    what = "settings" if kind == "stages" else "files"
                    raise AttackPlaneError(
                        f"the runs have other {what} of {name}",
                        where=run.path,
                        got=str(value)[:200],
                        remedy=f"the others have {str(whole[kind][name])[:200]}",
                    )
        whole["history"] += [entry for entry in one["history"] if entry not in whole["history"]]
    return whole


def _agreeing(name: str, runs: Sequence[RunFolder]) -> dict[str, str]:
    """Hash of each row by its id, over the first of the runs; rows of one id must be alike."""
    key, kind = JOINED[name]
    known: dict[str, str] = {}
    first: dict[str, str] = {}
    for run in runs:
        for line, row in run.each_row(name):
            place = f"{run.path / name}, line {line}"
            own, found = id_in(row, key, place), content_hash(row)
            kind.from_row(row, place)
            if known.setdefault(own, found) != found:
                raise AttackPlaneError(
                    "two different rows of one id",
                    where=place,
                    got=own,
                    remedy="the runs were made from different things: merge only one of them",
                )
        if run is runs[0]:
            first = dict(known)
    return first


def _join(name: str, run: RunFolder, runs: Sequence[RunFolder], have: set[str]) -> int:
    """Append the rows that the run lacks; how many."""
    count, (key, _) = 0, JOINED[name]
    if not any((one.path / name).exists() for one in runs):
        return 0
    with run.appending(name) as add:
        for one in runs:
            for _, row in each_row(one.path / name):
                if row[key] not in have:
                    have.add(row[key])
                    add(row)
                    count += 1
    return count
