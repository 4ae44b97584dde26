"""Tables of attacks, success rates and what was sent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from commands.tables.layout import Columns, ends, text_of
from core.records import BASELINES, HARMFUL, AttackArtifact, Replay
from core.rows import Row
from core.specs import short_spec
from core.statistics import Interval
from transfer.agreement import Agreement
from transfer.matrix import Cell


def attack_table(artifacts: Sequence[AttackArtifact]) -> str:
    """Loss of each attack's prompt, one row per behaviour; the lowest of several prompts."""
    by_behaviour: dict[str, dict[str, AttackArtifact]] = {}
    for artifact in artifacts:
        own = by_behaviour.setdefault(artifact.behaviour_id, {})
        before = own.get(artifact.attack)
        lower = artifact.loss is not None and (
            before is None or before.loss is None or artifact.loss < before.loss
        )
        if before is None or lower:
            own[artifact.attack] = artifact

    def loss(name: str) -> Callable[[Any], str]:
        def fill(own: dict[str, AttackArtifact]) -> str:
            value = own[name].loss if name in own else None
            return "-" if value is None else f"{value:.3f}"

        return fill

    def best_steps(own: dict[str, AttackArtifact]) -> str:
        optimised = [a for a in own.values() if a.attack not in BASELINES]
        return ", ".join(str(a.best_step) for a in optimised if a.best_step is not None) or "-"

    def fidelity(own: dict[str, AttackArtifact]) -> str:
        return "holds" if all(a.token_fidelity is not False for a in own.values()) else "BROKEN"

    columns: Columns = [
        ("loss (nats per target token)", lambda own: next(iter(own.values())).behaviour_id),
        *((name, loss(name)) for name in dict.fromkeys(a.attack for a in artifacts)),
        ("best step", best_steps),
        ("token fidelity", fidelity),
    ]
    faults = [f"{a.behaviour_id}, {a.attack}: {fault}" for a in artifacts for fault in a.faults]
    return "\n".join([text_of(columns, by_behaviour.values()), *faults])


def attack_rows(artifacts: Sequence[AttackArtifact]) -> list[Row]:
    """What the table is made of, without prompts."""
    names = [
        *("artifact_id", "attack", "variant", "behaviour_id", "source_model"),
        *("loss", "best_step", "token_fidelity", "faults"),
    ]
    return [{name: getattr(a, name) for name in names} for a in artifacts]


def prompt_sums(artifacts: Iterable[AttackArtifact]) -> list[Row]:
    """One row per source and attack: prompts, behaviours, mean and lowest loss, broken tokens."""
    rows: dict[tuple[str, str], Row] = {}
    behaviours: dict[tuple[str, str], set[str]] = {}
    for a in artifacts:
        key = (a.source_model, a.attack)
        behaviours.setdefault(key, set()).add(a.behaviour_id)
        row = rows.setdefault(
            key,
            {"source": a.source_model, "attack": a.attack, "prompts": 0, "behaviours": 0}
            | {"scored": 0, "loss": 0.0, "lowest": math.inf, "broken": 0},
        )
        row["prompts"] += 1
        row["broken"] += a.token_fidelity is False
        if a.loss is not None:
            row["loss"] += (a.loss - row["loss"]) / (row["scored"] + 1)  # the mean so far
            row["scored"] += 1
            row["lowest"] = min(row["lowest"], a.loss)
    return [row | {"behaviours": len(behaviours[key])} for key, row in rows.items()]


def prompts_table(rows: Sequence[Row]) -> str:
    """The sums of many prompts."""

    def loss(name: str) -> Callable[[Any], str]:
        return lambda r: f"{r[name]:.3f}" if r["scored"] else "-"

    columns: Columns = [
        ("source", lambda r: short_spec(r["source"])),
        ("attack", lambda r: r["attack"]),
        ("prompts", lambda r: str(r["prompts"])),
        ("behaviours", lambda r: str(r["behaviours"])),
        ("mean loss (nats per target token)", loss("loss")),
        ("lowest", loss("lowest")),
        ("tokens not kept", lambda r: str(r["broken"])),
    ]
    return text_of(columns, rows)


def counts_line(artifacts: Sequence[AttackArtifact]) -> str:
    """How many prompts each class has, for attacks whose prompts have no loss."""
    counts: dict[str, int] = {}
    for artifact in artifacts:
        counts[artifact.attack] = counts.get(artifact.attack, 0) + 1
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def matrix_table(cells: Sequence[Cell]) -> str:
    """One row per attack, source, target and label of the request."""

    def success(c: Cell) -> str:
        if c.label != HARMFUL:
            return ""
        if c.asr is None:
            return "not judged" if c.replays else "missing"
        return f"{c.asr:.2f} {ends(c.wilson, '.2f')}"

    def share(name: str) -> Callable[[Any], str]:
        return lambda c: "" if getattr(c, name) is None else f"{getattr(c, name):.2f}"

    def corrected(c: Cell) -> str:
        if c.corrected is None:
            return ""
        return f"{c.corrected:.2f} {ends(c.corrected_interval, '.2f')}"

    def gain(c: Cell) -> str:
        return "" if c.gain is None else f"{c.gain:+.2f} {ends(c.gain_bootstrap, '.2f')}"

    def at_k(c: Cell) -> str:
        if not c.at_k:
            return ""
        last = c.at_k[-1]
        return f"{last['asr']:.2f} {ends(last['bootstrap'], '.2f')} at {last['k']}"

    def notes(c: Cell) -> str:
        faults = [f"{c.missing} missing"] if c.missing else []
        if c.sent_as_meant is not None and c.sent_as_meant < c.replays:
            faults.append(f"{c.replays - c.sent_as_meant} not sent as meant")
        return ", ".join(faults)

    columns: Columns = [
        ("attack", lambda c: c.attack),
        ("source", lambda c: short_spec(c.source)),
        ("target", lambda c: short_spec(c.target)),
        ("prompts", lambda c: c.label),
        ("n", lambda c: f"{c.judged}/{c.replays}"),
        ("ASR, Wilson", success),
        ("corrected", corrected),
        *([("one of k replies", at_k)] if any(c.at_k for c in cells) else []),
        ("refused", share("refused")),
        ("neither", share("neither")),
        ("D", lambda c: "" if c.d is None else f"{c.d:+.2f}"),
        ("gain on plain", gain),
        ("pairs", lambda c: str(c.paired) if c.gain is not None else ""),
        ("", notes),
    ]
    return text_of(columns, cells)


def agreements_table(rows: Sequence[Agreement]) -> str:
    """How well outcome D says which prompts succeed, target by target."""
    columns: Columns = [
        ("D and success", lambda r: short_spec(r.target)),
        ("n", lambda r: str(r.n)),
        ("successes", lambda r: str(r.successes)),
        ("rank correlation", lambda r: f"{r.correlation:+.2f} {ends(r.correlation_interval)}"),
        (
            "AUROC of success by -D",
            lambda r: "-" if r.auroc is None else f"{r.auroc:.2f} {ends(r.auroc_interval, '.2f')}",
        ),
    ]
    return text_of(columns, rows)


def pivot_table(cells: Sequence[Cell], *, corrected: bool = False) -> str:
    """One row per attack, source and label, one column per target.

    ASR of harmful requests, refusal rate of the others, each with Wilson's interval. With
    ``corrected``: ASR less the judge's errors, with an interval that carries them.
    """
    rows: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for cell in cells:
        if cell.label == HARMFUL or not corrected:
            rows.setdefault((cell.label, cell.attack, cell.source), {})[cell.target] = cell

    def rate(c: Cell) -> tuple[float | None, Interval | None]:
        if corrected:
            return c.corrected, c.corrected_interval
        return (c.asr, c.wilson) if c.label == HARMFUL else (c.refused, c.refused_wilson)

    def shown(target: str) -> Callable[[Any], str]:
        def fill(row: dict[str, Cell]) -> str:
            c = row.get(target)
            if c is None or (not c.replays and c.missing):
                return "missing"
            value, interval = rate(c)
            if value is None:
                return "not known" if corrected else "not judged"
            return f"{value:.2f} {ends(interval, '.2f')}" + (f" -{c.missing}" if c.missing else "")

        return fill

    def first(row: dict[str, Cell]) -> Cell:
        return next(iter(row.values()))

    def title(row: dict[str, Cell]) -> str:
        label = first(row).label
        if label != HARMFUL:
            return f"refused, {label}"
        return "ASR, corrected" if corrected else "ASR"

    columns: Columns = [
        ("attack", lambda row: first(row).attack),
        ("source", lambda row: short_spec(first(row).source)),
        ("rate", title),
        ("prompts", lambda row: str(max(c.replays + c.missing for c in row.values()))),
        *((short_spec(t), shown(t)) for t in dict.fromkeys(c.target for c in cells)),
    ]
    return text_of(columns, rows.values())


@dataclass
class Certificates:
    """What the certificates of one cell say together."""

    replays: int = 0
    true: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    tokens: tuple[int, int] | None = None
    hashes: dict[str, set[str]] = field(default_factory=dict)

    def add(self, certificate: Row) -> None:
        self.replays += 1
        for name, value in certificate.items():
            if isinstance(value, bool):
                self.true[name] += value
                self.known[name] += 1
            elif name == "content_tokens" and value is not None:
                low, high = self.tokens or (value, value)
                self.tokens = min(low, value), max(high, value)
        for name in ("template_hash", "system_prompt_hash"):
            self.hashes.setdefault(name, set()).add((certificate.get(name) or "none")[:8])


def certificates_table(replays: Iterable[Replay]) -> str:
    """The transfer report: per attack, source and target, whether the source's prompt was sent."""
    groups: dict[tuple[str, str, str], Certificates] = {}
    for r in replays:
        if r.certificate:
            key = (r.attack, r.source_model, r.target_model)
            groups.setdefault(key, Certificates()).add(r.certificate)

    def share(name: str) -> Callable[[Any], str]:
        def fill(item: tuple[Any, Certificates]) -> str:
            known = item[1].known[name]
            return f"{item[1].true[name]}/{known}" if known else "not known"

        return fill

    def tokens(item: tuple[Any, Certificates]) -> str:
        ends = item[1].tokens
        return f"{ends[0]} to {ends[1]}" if ends else "not known"

    def hashes(name: str) -> Callable[[Any], str]:
        return lambda item: ", ".join(sorted(item[1].hashes[name]))

    columns: Columns = [
        ("attack", lambda item: item[0][0]),
        ("source", lambda item: item[0][1]),
        ("target", lambda item: item[0][2]),
        ("replays", lambda item: str(item[1].replays)),
        ("as meant", share("sent_as_meant")),
        ("verbatim", share("verbatim")),
        ("same ids", share("same_ids")),
        ("same vocabulary", share("same_vocabulary")),
        ("same template", share("same_template")),
        ("content tokens", tokens),
        ("template", hashes("template_hash")),
        ("system prompt", hashes("system_prompt_hash")),
    ]
    return text_of(columns, groups.items())
