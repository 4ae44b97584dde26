"""Tables of the plane: classes, how they are told apart, who succeeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from commands.tables.layout import Columns, Row, ends, text_of
from core.statistics import FEW

TOO_FEW = "too few"


def classes_table(
    rows: Sequence[Row], *, frames: Sequence[str] = ("base", "own"), anchors: bool = True
) -> str:
    """Where each class lies: centroid, and displacement from the plain request.

    ``wrapper alone`` is the share of it that a harmless request in the same wrappers shows. A
    target whose frames are one is shown once.
    """

    def moved(axis: int) -> Callable[[Any], str]:
        def fill(c: Row) -> str:
            if not c["displacement"] or not c["displacement_interval"]:
                return ""
            if c.get("displaced", FEW) < FEW:  # rows of earlier versions do not say
                return TOO_FEW
            value = c["displacement"][axis]
            return f"{value:+.1f} {ends(c['displacement_interval'][axis], '+.1f')}"

        return fill

    def null(c: Row) -> str:
        pairs = zip(c["null_random"] or [], c["null_permuted"] or [], strict=True)
        return ", ".join(f"{max(a, b):.1f}" for a, b in pairs)

    def wrapper(c: Row) -> str:
        return ", ".join(f"{share:.0%}" for share in c.get("wrapper_share") or [])

    columns: Columns = [
        ("target", lambda c: c["target"]),
        ("frame", lambda c: c["frame"]),
        ("class", lambda c: c["class"]),
        ("n", lambda c: str(c["n"])),
        ("complied", lambda c: f"{c['jailbroken']}/{c['judged']}" if c["judged"] else "-"),
        ("H", lambda c: f"{c['centroid'][0]:+.1f}"),
        ("R", lambda c: f"{c['centroid'][1]:+.1f}"),
        ("pairs", lambda c: str(c.get("displaced", "")) if c["displacement"] else ""),
        ("H moved", moved(0)),
        ("R moved", moved(1)),
        ("null H, R", null),
        ("wrapper alone H, R", wrapper),
    ]
    own = {(c["target"], c["class"]): c["centroid"] for c in rows if c["frame"] == "own"}
    moved_to = {c["target"] for c in rows if own.get((c["target"], c["class"])) != c["centroid"]}
    shown = [
        c
        for c in rows
        if c["frame"] in frames
        and (anchors or c["kind"] != "anchor")
        and (c["frame"] == "own" or c["target"] in moved_to or "own" not in frames)
    ]
    return text_of(columns, shown)


def separability_table(rows: Sequence[Row], *, frames: Sequence[str] = ("own",)) -> str:
    """How well the classes are told apart on held-out behaviours."""
    columns: Columns = [
        ("target", lambda r: r["target"]),
        ("frame", lambda r: r["frame"]),
        (
            "told apart",
            lambda r: "all classes" if r["class"] == "all" else f"{r['class']} from plain",
        ),
        ("n", lambda r: str(r["n"])),
        ("accuracy", lambda r: f"{r['accuracy']:.2f}" if r["n"] >= FEW else TOO_FEW),
        ("interval", lambda r: ends(r["interval"], ".2f")),
        ("chance", lambda r: f"{r['chance']:.2f}"),
        ("null mean, 95 %", lambda r: f"{r['null_mean']:.2f}, {r['null_95']:.2f}"),
        ("p", lambda r: f"{r['p']:.3f}"),
    ]
    return text_of(columns, [r for r in rows if r["frame"] in frames])


def success_table(rows: Sequence[Row], *, frames: Sequence[str] = ("own",)) -> str:
    """How well the place on the plane says which prompts of a class succeed (pooled AUROC)."""
    columns: Columns = [
        ("target", lambda r: r["target"]),
        ("frame", lambda r: r["frame"]),
        ("success by less", lambda r: r["score"]),
        ("n", lambda r: str(r.get("n", ""))),
        ("successes, failures", lambda r: f"{r['successes']}, {r['failures']}"),
        (
            "AUROC",
            lambda r: f"{r['auroc']:.2f}" if r["successes"] + r["failures"] >= FEW else TOO_FEW,
        ),
        ("interval", lambda r: ends(r["interval"], ".2f")),
        ("null 95 %", lambda r: f"{r['null_95']:.2f}"),
    ]
    return text_of(columns, [r for r in rows if r["frame"] in frames and r["class"] == "pooled"])
