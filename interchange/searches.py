"""Readers of what suffix searches write: nanoGCG results, and logs of llm-attacks and PyRIT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import json_of
from core.rows import Row, is_finite
from interchange.foreign import (
    Foreign,
    Found,
    Hints,
    Reject,
    json_items,
    json_lines,
    texts,
)


def nanogcg(path: Path, hints: Hints) -> Found:
    """nanoGCG's GCGResult as JSON, one or several.

    The prompt that it was run with is a hint. ``{optim_str}`` marks the string's place in it.
    Without the marker the string follows directly, as in nanoGCG; white space at its beginning
    belongs to it.
    """
    if not hints.request or not hints.model:
        raise AttackPlaneError(
            "a nanoGCG result says neither prompt nor model",
            where=path,
            remedy="give prompt and model as it was run with",
        )
    for place, row in objects(path):
        if isinstance(row, Reject):
            yield row
            continue
        strings, losses = row.get("strings"), row.get("losses") or []
        best, faults, step = row.get("best_string"), [], None
        if not isinstance(losses, list) or not all(map(is_finite, losses)):
            yield Reject(place, "losses are not finite numbers")
            continue
        if isinstance(strings, list) and losses and len(strings) == len(losses):
            step = losses.index(min(losses))
            if best != strings[step]:
                faults.append("best_string is not the string of the lowest loss; that one is taken")
            best = strings[step]
        if not isinstance(best, str) or not best:
            yield Reject(place, "no best_string")
            continue
        marker = "{optim_str}"
        whole = hints.request if marker in hints.request else hints.request + marker
        loss = min(losses) if step is not None else row.get("best_loss")
        yield Foreign(
            place,
            whole.replace(marker, best),
            request=whole.replace(marker, "").strip(),
            attack="nanogcg",
            suffix=best,
            loss=float(loss) if is_finite(loss) else None,
            losses=[float(x) for x in losses] if step is not None else [],
            best_step=step,
            faults=faults,
        )


def objects(path: Path) -> Iterator[tuple[str, Row | Reject]]:
    """The object, the list's objects, or the lines' objects of a file."""
    with open(path, "rb") as file:
        first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first == b"[":
        for place, item in json_items(path, "item"):
            fine = isinstance(item, (dict, Reject))
            yield place, item if fine else Reject(place, f"a {type(item).__name__}, not an object")
        return
    try:
        whole = json_of(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        yield from json_lines(path)  # lines, or one broken object: each line says what is wrong
        return
    yield "item 1", whole if isinstance(whole, dict) else Reject("item 1", "not an object")


def gcg_log(path: Path, hints: Hints) -> Found:
    """Logs of llm-attacks, and of PyRIT's GCG which writes the same; the best string by loss.

    {"params", "controls", "losses", "tests"}

    ``tests`` names the goals that each control was tried on, so that a log of one goal after
    another is told from a universal one.
    """
    try:
        log = json_of(path.read_text(encoding="utf-8-sig"))
        params, controls, losses = log["params"], log["controls"], log["losses"]
        goals, targets = texts(params["goals"]), texts(params.get("targets") or [])
        tests = [
            texts([*tried] if isinstance(tried, dict) else tried)
            for tried in log.get("tests") or []
        ]
    except (ValueError, KeyError, TypeError) as error:
        yield Reject("the file", f"not a log of llm-attacks: {type(error).__name__}: {error}")
        return
    if not isinstance(controls, list) or not isinstance(losses, list):
        yield Reject("the file", "controls and losses are not lists")
        return
    if len(controls) != len(losses):
        yield Reject("the file", f"{len(controls)} controls and {len(losses)} losses")
        return
    best: dict[tuple[str, ...], int] = {}
    for i, (control, loss) in enumerate(zip(controls, losses, strict=True)):
        if not isinstance(control, str) or not is_finite(loss):
            yield Reject(
                f"control {i + 1}", f"not text with a finite loss: {str((control, loss))[:80]}"
            )
            continue
        tried = tuple(g for g in goals if g in tests[i]) if i < len(tests) else ()
        key = tried or tuple(goals)
        if key not in best or loss < losses[best[key]]:
            best[key] = i
    # of a progressive log only the largest set of goals counts: the suffixes before it are on the
    # way
    best = {key: i for key, i in best.items() if not any(set(key) < set(other) for other in best)}
    models = params.get("model_paths") or params.get("models")
    for key, i in best.items():
        for goal in key:
            number = goals.index(goal)
            yield Foreign(
                f"control {i + 1}",
                f"{goal} {controls[i]}",
                request=goal,
                target_string=targets[number] if number < len(targets) else None,
                attack="gcg" if len(key) == 1 else "gcg_universal",
                model=str(models[0]) if isinstance(models, list) and models else None,
                suffix=controls[i],
                loss=float(losses[i]),
            )
