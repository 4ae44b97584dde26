"""Tables of directions, layers, interventions and claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from commands.tables.layout import Columns, Row, ends, text_of
from core.readings import Directions
from core.specs import short_spec
from study.verdicts import Check, Claim

if TYPE_CHECKING:
    from pipeline.sweep.plan import Part
    from study.experiment_plan import Stage


def directions_table(directions: Directions, layers: Sequence[int] | None = None) -> str:
    """Per layer: cosine with interval and nulls, separation with its nulls, layer score."""
    s = directions.statistics

    def number(name: str, form: str = ".2f") -> Callable[[Any], str]:
        return lambda layer: f"{float(s[name][layer]):{form}}"

    def score(layer: int) -> str:
        value = float(s["layer_score"][layer])
        return "-" if value != value else f"{value:.2f}"

    columns: Columns = [
        ("layer", str),
        ("cos(H,R)", number("cos_harmfulness_refusal", "+.2f")),
        (
            "interval",
            lambda layer: ends(s["cos_harmfulness_refusal_interval"][layer].tolist()),
        ),
        ("null: random", number("null_random_cos")),
        ("permuted", number("null_permuted_cos")),
        ("d'(H)", number("separation_harmfulness")),
        ("null", number("null_permuted_separation_harmfulness")),
        ("d'(R)", number("separation_refusal")),
        ("null", number("null_permuted_separation_refusal")),
        ("cos(harc,zhao)", number("cos_harc_zhao") if "cos_harc_zhao" in s else lambda _: "-"),
        ("score", score),
    ]
    counts = ", ".join(f"{k} {v}" for k, v in directions.sample_counts.items())
    title = f"{directions.model}: {directions.estimator} directions from {counts}"
    shown = range(directions.n_layers + 1) if layers is None else layers
    return f"{title}\n{text_of(columns, shown)}"


def directions_rows(directions: Directions) -> list[Row]:
    """One row per layer, with all of its statistics."""
    whose = {"model": directions.model, "estimator": directions.estimator}
    return [
        whose | {"layer": n} | {k: v[n] for k, v in directions.statistics.items()}
        for n in range(directions.n_layers + 1)
    ]


CRITERIA = ("eq6_paper", "eq6_code", "eq6_zhao", "eq6_prompt", "separation", "arditi")


def criteria_table(rows: Sequence[Row]) -> str:
    """Which layer each published criterion takes."""

    def taken(name: str) -> Callable[[Any], str]:
        return lambda r: "-" if r["layers"].get(name) is None else str(r["layers"][name])

    columns: Columns = [
        ("model", lambda r: short_spec(r["model"])),
        ("refuses", lambda r: f"{r['refusal_rate']:.0%}"),
        ("estimator", lambda r: r["estimator"]),
        *((name, taken(name)) for name in CRITERIA),
        (
            "best that pass arditi",
            lambda r: (
                ", ".join(f"{c['position']} layer {c['layer']}" for c in r["passed_arditi"][:3])
                or "none"
            ),
        ),
    ]
    return text_of(columns, rows)


def sizes_table(rows: Sequence[Row]) -> str:
    """Reliability of a direction by the number of prompts."""
    columns: Columns = [
        ("model", lambda r: short_spec(r["model"])),
        ("direction", lambda r: r["direction"]),
        ("layer", lambda r: str(r["layer"])),
        ("prompts a side", lambda r: str(r["n"])),
        ("cosine of two samples", lambda r: f"{r['cosine']:+.2f}"),
        ("interval", lambda r: ends(r["interval"])),
        ("null 95 %", lambda r: f"{r['null_95']:+.2f}"),
    ]
    return text_of(columns, rows)


def across_table(rows: Sequence[Row], layer: int) -> str:
    """Directions of several models of one width, at one layer."""
    columns: Columns = [
        ("models", lambda r: " and ".join(map(short_spec, r["models"]))),
        ("direction", lambda r: r["direction"]),
        ("layer", lambda r: str(r["layer"])),
        ("cosine", lambda r: f"{r['cosine']:+.2f}"),
        ("interval", lambda r: ends(r["interval"])),
        (
            "nulls' 95 %: random, permuted",
            lambda r: f"{r['null_random_95']:.2f}, {r['null_permuted_95']:.2f}",
        ),
    ]
    return text_of(columns, [r for r in rows if r["layer"] == layer])


SHOWN_OUTCOMES = {
    "harmful": ("complied", "neither", "d", "log_odds"),
    "harmless": ("refused", "d", "kl"),
    "pseudo_harmful": ("refused", "d"),
}
"""Outcomes in the table of effects, by label; the summary file has all."""


def effects_table(rows: Sequence[Row]) -> str:
    """Per intervention and outcome: alone, under it, and the effects against both controls."""

    def value(name: str) -> Callable[[Any], str]:
        return lambda r: "-" if r[name] is None else f"{r[name]:+.2f}"

    def lengths(r: Row) -> str:
        names = ("delta_norm", "controls_delta_norm", "matched_delta_norm")
        return ", ".join("-" if r[name] is None else f"{r[name]:.1f}" for name in names)

    columns: Columns = [
        ("model", lambda r: short_spec(r["model"])),
        ("intervention", lambda r: f"{r['operation']} {r['mode']} {r['strength']:g}"),
        ("prompts", lambda r: r["label"]),
        ("n", lambda r: str(r["n"])),
        ("outcome", lambda r: r["outcome"]),
        ("alone", lambda r: f"{r['alone']:.2f}"),
        ("value", lambda r: f"{r['value']:.2f}"),
        ("change", value("change")),
        ("interval", lambda r: ends(r["change_interval"])),
        ("- controls", value("effect_controls")),
        ("interval", lambda r: ends(r["effect_controls_interval"])),
        ("- matched", value("effect_matched")),
        ("interval", lambda r: ends(r["effect_matched_interval"])),
        ("moved: own, controls, matched", lengths),
    ]
    shown = [
        r
        for r in rows
        if r["outcome"] in SHOWN_OUTCOMES.get(r["label"], ()) and r["value"] is not None
    ]
    return text_of(columns, shown)


def _claimed(c: Check) -> str:
    if c.claimed == "within":
        return f"|.| < {c.threshold:.2f}"
    return f"{'>' if c.claimed == 'above' else '<'} {c.threshold:.2f}"


def _nulls(c: Check) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in c.nulls.items()) or "-"


def _holm(claim: Claim) -> str:
    return ", ".join(f"{p:.3f}" for p in claim.holm or ()) or "-"


def _known(c: Check) -> bool:
    return math.isfinite(c.value) and math.isfinite(c.low)


def claims_table(claims: Sequence[Claim]) -> str:
    """One line per check; the verdict stands with each claim's first line.

    Checks in brackets have no say in the verdict.
    """
    rows: list[tuple[Claim, Check | None, bool]] = []
    for claim in claims:
        rows += [(claim, check, n == 0) for n, check in enumerate(claim.checks)]
        if not claim.checks:
            rows.append((claim, None, True))

    def once(fill: Callable[[Claim], str]) -> Callable[[Any], str]:
        return lambda row: fill(row[0]) if row[2] else ""

    def of_check(fill: Callable[[Check], str]) -> Callable[[Any], str]:
        return lambda row: "" if row[1] is None else fill(row[1])

    columns: Columns = [
        ("claim", once(lambda claim: str(claim.number))),
        ("model", once(lambda claim: short_spec(claim.model))),
        ("verdict", once(lambda claim: claim.verdict)),
        ("p, against, by Holm", once(_holm)),
        ("check", lambda row: row[1].name if row[1] else "not measured"),
        ("estimate", of_check(lambda c: f"{c.value:+.2f}" if _known(c) else "-")),
        ("interval", of_check(lambda c: ends((c.low, c.high)) if _known(c) else "-")),
        ("claimed", of_check(_claimed)),
        ("nulls", of_check(_nulls)),
        ("n", of_check(lambda c: str(c.n))),
        ("p", of_check(lambda c: f"{c.p:.3f}")),
        ("p against", of_check(lambda c: f"{c.p_against:.3f}")),
        ("check says", of_check(lambda c: c.outcome if c.decides else f"({c.outcome})")),
        ("n for 80 %", of_check(lambda c: str(c.needed) if c.needed else "-")),
    ]
    held_back = [
        f"{claim.number} on {short_spec(claim.model)} is held back: {reason}"
        for claim in claims
        for reason in claim.held_back
    ]
    families = [
        f"Holm's correction on {short_spec(model)}: over {size} claims"
        for model, size in dict.fromkeys((c.model, c.family) for c in claims if c.holm)
    ]
    tests = [
        f"{number}. {check}: {test}"
        for number, check, test in dict.fromkeys(
            (claim.number, c.name, c.test) for claim in claims for c in claim.checks
        )
    ]
    return "\n".join([text_of(columns, rows), *held_back, *families, "tests", *tests])


def coupling_table(claims: Sequence[Claim]) -> str:
    """Coupling of the carriers, and effective ranks, where claim 2 was measured."""
    rows = [
        (c.model, name, of)
        for c in claims
        if c.number == 2
        for name, of in c.settings.get("coupling", {}).items()
    ]

    def number(name: str) -> Callable[[Any], str]:
        return lambda row: "" if row[2][name] is None else f"{row[2][name]:.2f}"

    columns: Columns = [
        ("model", lambda row: short_spec(row[0])),
        ("", lambda row: row[1]),
        ("estimate", lambda row: f"{row[2]['value']:+.3f}"),
        ("interval", lambda row: ends(row[2]["interval"])),
        ("random 95 %", number("null_random")),
        ("permuted 95 %", number("null_permuted")),
    ]
    return text_of(columns, rows)


def known_claims() -> list[Row]:
    """All claims: those of one model (``claims``) and those of trainings (``trajectory``)."""
    from study.claims.registry import CLAIMS
    from study.training_claims.registry import TRAINING_CLAIMS

    models = [
        {"claim": t.number, "command": "claims", "arms": [], "needs": ", ".join(t.needs)}
        | {"title": t.title}
        for t in CLAIMS.all().values()
    ]
    trainings = [
        {"claim": t.number, "command": "trajectory", "arms": [*t.arms], "needs": t.needs}
        | {"title": t.title}
        for t in TRAINING_CLAIMS.all().values()
    ]
    return sorted(models + trainings, key=lambda row: (row["claim"], row["command"]))


def claim_tests_table(rows: Sequence[Row]) -> str:
    columns: Columns = [
        ("claim", lambda row: str(row["claim"])),
        ("command", lambda row: row["command"]),
        ("arms", lambda row: ", ".join(row["arms"]) or "any"),
        ("needs", lambda row: row["needs"] or "a model"),
        ("title", lambda row: row["title"]),
    ]
    return text_of(columns, rows)


def plan_table(rows: Sequence[Row]) -> str:
    """What will be done on each model, and the minutes that it takes."""
    columns: Columns = [
        ("model", lambda row: short_spec(row["model"])),
        ("work", lambda row: row["what"]),
        ("so often", lambda row: f"{row['count']} {row['unit']}"),
        ("minutes", lambda row: f"{row['seconds'] / 60:.1f}"),
    ]
    total = sum(row["seconds"] for row in rows) / 60
    note = f"about {total:.0f} minutes; what the run has is not measured again"
    return f"{text_of(columns, rows)}\n{note}"


def stages_table(stages: Sequence[Stage]) -> str:
    """What an experiment will do, and the minutes that it takes."""
    columns: Columns = [
        ("step", lambda s: s.step),
        ("what", lambda s: s.what),
        ("how many", lambda s: str(s.count)),
        ("minutes each", lambda s: f"{s.each / 60:.1f}"),
        ("minutes", lambda s: f"{s.seconds / 60:.0f}"),
    ]
    return text_of(columns, stages)


def parts_table(parts: Sequence[Part]) -> str:
    """What a sweep will do, and the minutes that it takes."""
    columns: Columns = [
        ("part", lambda p: p.what),
        ("on", lambda p: p.source),
        ("prompts", lambda p: str(p.prompts)),
        ("minutes", lambda p: f"{p.seconds / 60:.1f}"),
    ]
    return text_of(columns, parts)
