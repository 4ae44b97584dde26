"""Other tools' prompts as artifacts of a run, row by row. Memory grows with the ids alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from core.errors import AttackPlaneError
from core.files import MEND, write_atomically
from core.records import NO_SOURCE, AttackArtifact, Behaviour, content_hash
from core.rows import Row
from core.store import ATTACKS, BEHAVIOURS, RunFolder
from core.text import is_text
from interchange.chat_templates import unwrap
from interchange.foreign import Foreign, Hints, Reject
from interchange.readers import check_readable, read_foreign

REJECTS = "import_rejects.jsonl"
SHOWN = 10


@dataclass
class ImportResult:
    """What came of a file.

    Every row of it is in exactly one count. Rejects are listed in ``import_rejects.jsonl``.
    """

    imported: int = 0
    known: int = 0
    """Already in the run, or twice in the file."""
    other_behaviours: int = 0
    """Left out since their request is not among the behaviours asked for."""
    bad: int = 0
    no_prompt: int = 0
    unwrapped: dict[str, int] = field(default_factory=dict)
    marked: int = 0
    """Kept with a fault, such as a chat template that could not be unwrapped."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Behaviour ids of the file that could not be kept -> those that stand for them."""
    first_rejects: list[Reject] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The result in words, a line a fact."""
        text = [f"{self.imported} prompts imported"]
        for count, what in (
            (self.known, "already there"),
            (self.other_behaviours, "of other behaviours, left out"),
            (self.no_prompt, "without a prompt: the tool found no attack"),
            (self.bad, "malformed"),
            (self.marked, "kept with a fault written into the artifact"),
        ):
            if count:
                text.append(f"{count} {what}")
        text += [
            f"{n} unwrapped from the chat template {form}" for form, n in self.unwrapped.items()
        ]
        if self.renamed:
            pairs = [f"{own} is {taken}" for own, taken in self.renamed.items()]
            more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
            text.append(
                "behaviour ids that another request has, or whose request has another id: "
                + ", ".join(pairs[:SHOWN])
                + more
            )
        text += [f"  {r.place}: {r.reason}" for r in self.first_rejects]
        left = self.bad + self.no_prompt - len(self.first_rejects)
        return text + ([f"  ... and {left} more, in {REJECTS}"] if left else [])


def request_key(request: str) -> str:
    """Requests that differ in case, white space or a last full stop are one behaviour."""
    return content_hash(re.sub(r"\s+", " ", request).strip().rstrip(".").lower())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "imported"


def check_file(run: Path, path: Path, kind: str) -> None:
    """Whether a file can be imported at all.

    Raises:
        AttackPlaneError: no such format or file, or it is a file of the run itself.
    """
    check_readable(path, kind)
    if path.resolve().is_relative_to(run.resolve()):
        raise AttackPlaneError(
            "a run's own file cannot be imported into it",
            where=path,
            remedy="its prompts are in the run already; name a file from elsewhere",
        )


def import_file(
    run: RunFolder,
    path: Path,
    kind: str,
    hints: Hints | None = None,
    *,
    behaviours: list[Behaviour] | None = None,
    only_these: bool = False,
    keep: Callable[[str], bool] | None = None,
) -> ImportResult:
    """Append a file's prompts to the run's artifacts.

    Args:
        behaviours: where requests and targets are looked up by id or by request, besides the run's
        own.
        only_these: leave out prompts of other behaviours.
        keep: given an artifact's id, whether it is taken; None: all are.

    Raises:
        AttackPlaneError: see ``check_file``.
    """
    check_file(run.path, path, kind)
    hints = hints or Hints()
    given = {b.behaviour_id for b in behaviours or []}
    noted = run.behaviours()
    index = Behaviours([*(behaviours or []), *noted.values()])
    seen = set(run.each_id(ATTACKS, "artifact_id"))
    result = ImportResult()
    forget_rejects(run, path, kind)
    with (
        run.appending(ATTACKS) as add_artifact,
        run.appending(BEHAVIOURS) as add_behaviour,
        run.appending(REJECTS) as add_reject,
    ):

        def reject(fault: Reject) -> None:
            result.bad += fault.kind == "bad"
            result.no_prompt += fault.kind == "no_prompt"
            if len(result.first_rejects) < SHOWN:
                result.first_rejects.append(fault)
            add_reject(
                {"file": path.name, "format": kind, "place": fault.place, "reason": fault.reason}
            )

        for record in read_foreign(path, kind, hints):
            if isinstance(record, Reject):
                reject(record)
                continue
            behaviour = index.find(record)
            if only_these and (behaviour is None or behaviour.behaviour_id not in given):
                result.other_behaviours += 1
                continue
            try:
                behaviour = behaviour or index.add(record, kind)
                artifact = _artifact(record, behaviour, kind, path, hints, result)
            except AttackPlaneError as error:
                reject(Reject(record.place, " ".join(str(error).split())))
                continue
            if index.renamed(record, behaviour, kind):
                result.renamed[record.behaviour_id or ""] = behaviour.behaviour_id
            if behaviour.behaviour_id not in noted:
                add_behaviour(behaviour.to_row())
                noted[behaviour.behaviour_id] = behaviour
            if keep and not keep(artifact.artifact_id):
                continue
            if artifact.artifact_id in seen:
                result.known += 1
                continue
            seen.add(artifact.artifact_id)
            add_artifact(artifact.to_row())
            result.imported += 1
            result.marked += bool(artifact.faults)
    return result


class _Rejected(TypedDict):
    file: str
    format: str


def forget_rejects(run: RunFolder, path: Path, kind: str) -> None:
    """Leave out what an earlier import of the same file rejected, since it is read anew."""
    rows = list(run.checked(REJECTS, _Rejected, MEND))
    kept = [row for row in rows if (row["file"], row["format"]) != (path.name, kind)]
    if len(kept) < len(rows):
        write_atomically(run.path / REJECTS, "".join(json.dumps(row) + "\n" for row in kept))


class Behaviours:
    """Behaviours by request and, for prompts that come without one, by id."""

    def __init__(self, behaviours: Sequence[Behaviour]) -> None:
        self.by_id = {b.behaviour_id: b for b in reversed(behaviours)}
        self.by_request = {request_key(b.request): b for b in reversed(behaviours)}

    def find(self, record: Foreign) -> Behaviour | None:
        """The behaviour of a prompt: the request decides, where there is one."""
        if record.request is not None:
            return self.by_request.get(request_key(record.request))
        return self.by_id.get(record.behaviour_id or "")

    @staticmethod
    def renamed(record: Foreign, behaviour: Behaviour, kind: str) -> bool:
        """Whether the file's own id of a new behaviour could not be kept."""
        own = f"{kind}-{record.behaviour_id}"
        new = behaviour.benchmark == kind
        return bool(record.behaviour_id) and new and behaviour.behaviour_id != own

    def add(self, record: Foreign, kind: str) -> Behaviour:
        """A new behaviour, under the tool's id, or under the request's hash if that id is taken."""
        if record.request is None:
            raise AttackPlaneError(
                "its request is not known",
                where=record.behaviour_id,
                remedy="give the behaviours file of that benchmark beside it",
            )
        key = request_key(record.request)
        name = f"{kind}-{record.behaviour_id or key[:12]}"
        if name in self.by_id:
            name = f"{kind}-{key[:12]}"
        given = (name, record.request, record.target_string, record.category)
        if not is_text(*given):
            raise AttackPlaneError("a text is no Unicode text", got="half of a surrogate pair")
        made = Behaviour(*given, "harmful", kind)
        self.by_id[name] = self.by_request[key] = made
        return made


def _artifact(
    record: Foreign, behaviour: Behaviour, kind: str, path: Path, hints: Hints, result: ImportResult
) -> AttackArtifact:
    inner = unwrap(record.prompt)
    model = hints.model or record.model or NO_SOURCE
    attack = slug(hints.attack or record.attack or kind)
    system = record.system or inner.system
    texts = (inner.content, behaviour.request, model, attack, system, record.target_string)
    if not is_text(*texts, record.category, record.suffix, record.variant, *record.faults):
        raise AttackPlaneError("a text is no Unicode text", got="half of a surrogate pair")
    faults = [*record.faults, *([inner.fault] if inner.fault else [])]
    said: Row = {"format": kind, "file": path.name, "place": record.place, **record.said}
    if inner.form:
        result.unwrapped[inner.form] = result.unwrapped.get(inner.form, 0) + 1
        said["unwrapped"] = inner.form
    target = hints.target_string or record.target_string or behaviour.target_string
    about = [kind, attack, model, behaviour.request, inner.content, system]
    return AttackArtifact(
        artifact_id=content_hash(["import", *about]),
        behaviour_id=behaviour.behaviour_id,
        attack=attack,
        source_model=model,
        request=behaviour.request,
        prompt=inner.content,
        suffix=record.suffix if record.suffix and record.suffix in inner.content else None,
        suffix_ids=None,
        target_string=target,
        loss=record.loss,
        loss_history=record.losses,
        best_step=record.best_step,
        seed=0,
        config_hash=content_hash([kind, path.name]),
        token_fidelity=None,
        system_prompt=system,
        faults=faults,
        variant=record.variant,
        rendering={"prompt_ids": record.prompt_ids} if record.prompt_ids else None,
        provenance=said,
    )
