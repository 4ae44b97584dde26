"""The stages' results as text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.records import BASELINES, AttackArtifact, Directions, Replay
from core.store import read_rows
from core.text import aligned, short_spec
from evaluation.asr import Interval
from geometry.directions import best_layers
from geometry.plane import CLASSES, SEPARABILITY, SUCCESS
from geometry.prediction import POOLED
from transfer.matrix import Cell


def attack_table(artifacts: Sequence[AttackArtifact]) -> str:
    """Loss of each attack's prompt, a row a behaviour; the lowest, where an attack has several prompts."""
    by_behaviour: dict[str, dict[str, AttackArtifact]] = {}
    for artifact in artifacts:
        own = by_behaviour.setdefault(artifact.behaviour_id, {})
        before = own.get(artifact.attack)
        if before is None or (artifact.loss is not None and artifact.loss < (before.loss or float("inf"))):
            own[artifact.attack] = artifact
    names = list(dict.fromkeys(a.attack for a in artifacts))
    rows: list[Sequence[str]] = [("loss (nats per target token)", *names, "best step", "token fidelity")]
    for behaviour, found in by_behaviour.items():
        losses = [
            "-" if name not in found or found[name].loss is None else f"{found[name].loss:.3f}"
            for name in names
        ]
        steps = [
            f"{a.best_step}" for a in found.values() if a.attack not in BASELINES and a.best_step is not None
        ]
        fidelity = all(a.token_fidelity is not False for a in found.values())
        rows.append((behaviour, *losses, ", ".join(steps) or "-", "holds" if fidelity else "BROKEN"))
    faults = [f"{a.behaviour_id}, {a.attack}: {fault}" for a in artifacts for fault in a.faults]
    return "\n".join([aligned(rows), *faults])


def classes_table(path: Path, *, frames: Sequence[str] = ("base", "own"), anchors: bool = True) -> str:
    """Where each class lies: centroid, and displacement from the plain request with its 95 % interval."""
    header = ("target", "frame", "class", "n", "jailbroken", "H", "R", "H moved", "R moved", "null H, R")
    rows: list[tuple[str, ...]] = [header]
    for c in read_rows(path / CLASSES):
        if c["frame"] not in frames or (c["kind"] == "anchor" and not anchors):
            continue
        moved = ["", ""]
        if c["displacement"]:
            ends = zip(c["displacement"], c["displacement_interval"], strict=True)
            moved = [f"{d:+.1f} [{low:+.1f}, {high:+.1f}]" for d, (low, high) in ends]
        null = ", ".join(
            f"{max(a, b):.1f}" for a, b in zip(c["null_random"] or [], c["null_permuted"] or [], strict=True)
        )
        judged = f"{c['jailbroken']}/{c['judged']}" if c["judged"] else "-"
        x, y = c["centroid"]
        where = (c["target"], c["frame"], c["class"], str(c["n"]), judged)
        rows.append((*where, f"{x:+.1f}", f"{y:+.1f}", *moved, null))
    return aligned(rows)


def matrix_table(cells: Sequence[Cell]) -> str:
    """The matrix as text: a row per attack, source and target."""

    def interval(value: Interval | None) -> str:
        return f"[{value[0]:.2f}, {value[1]:.2f}]" if value else ""

    header = ("attack", "source", "target", "n", "ASR", "bootstrap", "Wilson", "gain on plain", "", "")
    rows = [header]
    for c in cells:
        asr = "not judged" if c.replays else "missing"
        asr = asr if c.asr is None else f"{c.asr:.2f}"
        notes = [f"{c.missing} missing"] if c.missing else []
        if c.sent_as_meant is not None and c.sent_as_meant < c.replays:
            notes.append(f"{c.replays - c.sent_as_meant} not sent as meant")
        gain = "" if c.gain is None else f"{c.gain:+.2f}"
        rows.append(
            (
                *(c.attack, c.source, c.target, f"{c.judged}/{c.replays}", asr),
                *(interval(c.bootstrap), interval(c.wilson), gain, interval(c.gain_bootstrap)),
                ", ".join(notes),
            )
        )
    return aligned(rows)


def pivot_table(cells: Sequence[Cell]) -> str:
    """The matrix, a row an attack and source, a column a target: ASR with Wilson's interval, replies, what is missing."""
    targets = list(dict.fromkeys(c.target for c in cells))
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.attack, cell.source), {})[cell.target] = cell

    def shown(cell: Cell | None) -> str:
        if cell is None or (not cell.replays and cell.missing):
            return "missing"
        if cell.asr is None or cell.wilson is None:
            return "not judged"
        low, high = cell.wilson
        return f"{cell.asr:.2f} [{low:.2f}, {high:.2f}]" + (f" -{cell.missing}" if cell.missing else "")

    rows = [("ASR", "source", "prompts", *(short_spec(t) for t in targets))]
    for (attack, source), row in found.items():
        prompts = max(c.replays + c.missing for c in row.values())
        rows.append((attack, short_spec(source), str(prompts), *(shown(row.get(t)) for t in targets)))
    return aligned(rows)


def separability_table(path: Path, *, frames: Sequence[str] = ("own",)) -> str:
    """How well the classes are told apart on held-out behaviours: all together, and each from the plain request."""
    header = ("target", "frame", "told apart", "n", "accuracy", "interval", "chance", "null mean, 95 %", "p")
    rows: list[tuple[str, ...]] = [header]
    for r in read_rows(path / SEPARABILITY):
        if r["frame"] in frames:
            what = "all classes" if r["class"] == "all" else f"{r['class']} from plain"
            low, high = r["interval"]
            rows.append(
                (
                    *(
                        r["target"],
                        r["frame"],
                        what,
                        str(r["n"]),
                        f"{r['accuracy']:.2f}",
                        f"[{low:.2f}, {high:.2f}]",
                    ),
                    *(f"{r['chance']:.2f}", f"{r['null_mean']:.2f}, {r['null_95']:.2f}", f"{r['p']:.3f}"),
                )
            )
    return aligned(rows)


def success_table(path: Path, *, frames: Sequence[str] = ("own",)) -> str:
    """How well the place on the plane says which prompts of a class succeed: AUROC pooled within classes; "" without any."""
    rows = [("target", "frame", "success by less", "successes, failures", "AUROC", "interval", "null 95 %")]
    for r in read_rows(path / SUCCESS):
        if r["frame"] in frames and r["class"] == POOLED:
            low, high = r["interval"]
            rows.append((r["target"], r["frame"], r["score"], f"{r['successes']}, {r['failures']}", f"{r['auroc']:.2f}",
                         f"[{low:.2f}, {high:.2f}]", f"{r['null_95']:.2f}"))  # fmt: skip
    return aligned(rows) if len(rows) > 1 else ""


def certificates_table(replays: Sequence[Replay]) -> str:
    """The transfer report: per attack, source and target, whether what was sent is what the source model saw."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in replays:
        if r.certificate:
            groups.setdefault((r.attack, r.source_model, r.target_model), []).append(r.certificate)
    header = ("attack", "source", "target", "replays", "as meant", "verbatim", "same ids", "same vocabulary",
              "same template", "content tokens", "template", "system prompt")  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for key, found in groups.items():

        def share(name: str, found: list[dict[str, Any]] = found) -> str:
            known = [c[name] for c in found if c.get(name) is not None]
            return f"{sum(known)}/{len(known)}" if known else "not known"

        tokens = [c["content_tokens"] for c in found if "content_tokens" in c] or [0]
        systems = {c.get("system_prompt_hash") or "none" for c in found}
        rows.append(
            (
                *key,
                str(len(found)),
                *(
                    share(n)
                    for n in ("sent_as_meant", "verbatim", "same_ids", "same_vocabulary", "same_template")
                ),
                f"{min(tokens)} to {max(tokens)}",
                ", ".join(sorted({c["template_hash"][:8] for c in found if "template_hash" in c})),
                ", ".join(sorted(systems))[:24],
            )
        )
    return aligned(rows)


def directions_table(found: Directions, only_best: int | None = None) -> str:
    """Per layer: angles, their interval and nulls, separation and its nulls, layer score."""
    shown = best_layers(found, only_best) if only_best else range(found.n_layers + 1)
    s = found.statistics
    lines = [
        f"{found.model}: {found.estimator} directions from "
        + ", ".join(f"{k} {v}" for k, v in found.sample_counts.items()),
        "layer  cos(H,R)  interval         null: random, permuted   d'(H)  null   d'(R)  null   cos(harc,zhao)  score",
    ]
    for layer in shown:
        low, high = s["cos_harmfulness_refusal_interval"][layer].tolist()
        zhao = f"{float(s['cos_harc_zhao'][layer]):14.2f}" if "cos_harc_zhao" in s else f"{'-':>14}"
        score = float(s["layer_score"][layer])
        lines.append(
            f"{layer:5d}  {float(s['cos_harmfulness_refusal'][layer]):+8.2f}  [{low:+.2f}, {high:+.2f}]"
            f"  {float(s['null_random_cos'][layer]):12.2f}, {float(s['null_permuted_cos'][layer]):8.2f}"
            f"  {float(s['separation_harmfulness'][layer]):6.2f} {float(s['null_permuted_separation_harmfulness'][layer]):5.2f}"
            f"  {float(s['separation_refusal'][layer]):6.2f} {float(s['null_permuted_separation_refusal'][layer]):5.2f}"
            f"  {zhao}  {'-' if score != score else f'{score:.2f}':>5}"
        )
    return "\n".join(lines)
