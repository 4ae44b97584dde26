"""Readers of other tools' files, one per format: path and hints in, prompts and rejects out.

Files are read as a stream.

Nothing is dropped in silence: what is no prompt comes out as a ``Reject`` with its place and
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError, nearest
from core.files import require_regular
from core.rows import is_finite
from interchange.foreign import (
    Foreign,
    Found,
    Hints,
    Reject,
    check_encoding,
    json_items,
    json_lines,
)
from interchange.searches import gcg_log, nanogcg
from interchange.tables import csv_file, json_array, jsonl, text_of

NOTHING = {
    "harmbench": Reject("the file", "no object {behaviour id: [prompt, ...]} with entries"),
    "jailbreakbench": Reject("the file", 'no entries under "jailbreaks"'),
    "adversariallm": Reject("the file", 'no entries under "runs"'),
}
"""Said of a document without what its format should hold."""


def harmbench(path: Path, hints: Hints) -> Found:
    """HarmBench ``test_cases.json``: {behaviour id: [prompt, ...]}.

    The requests come from the behaviours that are given beside it.
    """
    place = None
    for place, pair in json_items(path, "", pairs=True):
        if isinstance(pair, Reject):
            yield pair
            continue
        name, prompts = pair
        if not isinstance(prompts, list):
            yield Reject(place, f"{name}: a {type(prompts).__name__}, not a list of prompts")
            continue
        for number, prompt in enumerate(prompts, start=1):
            where = f"{place} ({name}), prompt {number}"
            if isinstance(prompt, str):
                yield Foreign(where, prompt, behaviour_id=name, variant=str(number))
            else:
                yield Reject(
                    where, f"a {type(prompt).__name__}, not text (multimodal cases are not served)"
                )
    if place is None:
        yield NOTHING["harmbench"]


def jailbreakbench(path: Path, hints: Hints) -> Found:
    """JailbreakBench artifacts: {"parameters", "jailbreaks": [{"index", "goal", "behavior",
    "prompt" or null, ...}]}."""
    said = next((v for _, v in json_items(path, "parameters") if isinstance(v, dict)), {})
    keep = ("jailbroken", "number_of_queries", "index")
    place = None
    for place, row in json_items(path, "jailbreaks.item"):
        if isinstance(row, Reject):
            yield row
        elif not isinstance(row, dict):
            yield Reject(place, f"a {type(row).__name__}, not an object")
        elif row.get("prompt") is None and "prompt" in row:
            yield Reject(
                place,
                f"{row.get('behavior')}: prompt is null, the tool found no attack",
                "no_prompt",
            )
        elif not isinstance(row.get("prompt"), str):
            yield Reject(place, "no text under prompt")
        else:
            yield Foreign(
                place,
                row["prompt"],
                request=text_of(row, "goal"),
                behaviour_id=text_of(row, "behavior"),
                category=text_of(row, "category") or "",
                attack=text_of(said, "method"),
                model=text_of(said, "model"),
                said={k: row[k] for k in keep if row.get(k) is not None},
            )
    if place is None:
        yield NOTHING["jailbreakbench"]


def _messages(value: Any) -> list[tuple[str, str]]:
    """(role, text) of a conversation as a list of {"role", "content"}; [] if it is none."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        return []
    turns = []
    for message in value:
        content = message.get("content")
        content = content.get("text") if isinstance(content, dict) else content
        turns.append((str(message.get("role")), content if isinstance(content, str) else ""))
    return turns


def adversariallm(path: Path, hints: Hints) -> Found:
    """AdversariaLLM ``run.json``: the step with the lowest loss of each run.

    {"config", "runs": [{"original_prompt", "steps": [...]}]}
    """
    config = next((v for _, v in json_items(path, "config") if isinstance(v, dict)), {})
    place = None
    for place, run in json_items(path, "runs.item"):
        if isinstance(run, Reject):
            yield run
            continue
        steps = run.get("steps") if isinstance(run, dict) else None
        if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps) or not steps:
            yield Reject(place, "no steps")
            continue
        losses = [float(s["loss"]) for s in steps if is_finite(s.get("loss"))]
        if len(losses) != len(steps):
            losses = []
        best = losses.index(min(losses)) if losses else len(steps) - 1
        sent, original = (
            _messages(steps[best].get("model_input")),
            _messages(run.get("original_prompt")),
        )
        users = [text for role, text in sent if role == "user"]
        if not users or not users[-1]:
            yield Reject(place, f"step {best}: no user message in model_input")
            continue
        faults = ["earlier turns of the conversation are left out"] if len(users) > 1 else []
        if any(role == "assistant" and text.strip() for role, text in sent):
            faults.append("the reply's beginning that the tool sent along is left out")
        ids = steps[best].get("model_input_tokens")
        whole = isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids)
        yield Foreign(
            place,
            users[-1],
            request=next((t for role, t in original if role == "user" and t), None),
            target_string=next((t for role, t in original if role == "assistant" and t), None),
            attack=text_of(config, "attack"),
            model=text_of(config, "model"),
            system=next((t for role, t in sent if role == "system" and t), None),
            loss=losses[best] if losses else None,
            losses=losses,
            best_step=best if losses else None,
            prompt_ids=ids if whole else None,
            faults=faults,
        )
    if place is None:
        yield NOTHING["adversariallm"]


def easyjailbreak(path: Path, hints: Hints) -> Found:
    """EasyJailbreak JSONL: {"query", "jailbreak_prompt" with {query}, "reference_responses",
    "eval_results", ...}."""
    for place, row in json_lines(path):
        if isinstance(row, Reject):
            yield row
            continue
        query, template = text_of(row, "query"), row.get("jailbreak_prompt")
        if query is None:
            yield Reject(place, "no text under query")
        elif template is not None and not isinstance(template, str):
            yield Reject(place, "jailbreak_prompt is not text")
        else:
            references, results = row.get("reference_responses"), row.get("eval_results")
            target = references[0] if isinstance(references, list) and references else None
            yield Foreign(
                place,
                (template or "{query}").replace("{query}", query),
                request=query,
                target_string=target if isinstance(target, str) else None,
                attack=text_of(row, "attack", "method"),
                said={"eval_results": results} if results else {},
            )


def garak(path: Path, hints: Hints) -> Found:
    """garak ``report.jsonl``: completed attempts.

    The hit log is refused: it holds only hits, so it gives no rate.
    """
    model, begun = None, {}
    for place, row in json_lines(path):
        if isinstance(row, Reject):
            yield row
            continue
        kind = row.get("entry_type")
        if kind is None:
            raise AttackPlaneError(
                "this looks like garak's hit log, which holds only hits",
                where=f"{path}, {place}",
                got=", ".join(sorted(row)),
                remedy="give the run's report.jsonl",
            )
        if kind == "start_run setup":
            model = text_of(row, "plugins.target_name", "plugins.model_name")
        if kind != "attempt":
            continue
        if row.get("status") != 2:  # an attempt is written again when it is complete
            begun[str(row.get("uuid"))] = place
            continue
        begun.pop(str(row.get("uuid")), None)
        prompt, system, faults = row.get("prompt"), None, []
        if isinstance(prompt, dict):
            turns = _messages(prompt.get("turns"))
            users = [text for role, text in turns if role == "user"]
            system = next((text for role, text in turns if role == "system" and text), None)
            faults = ["earlier turns of the conversation are left out"] if len(users) > 1 else []
            prompt = users[-1] if users else prompt.get("text")
        if not isinstance(prompt, str) or not prompt.strip():
            yield Reject(place, "an attempt without a text prompt")
            continue
        scores = row.get("detector_results")
        yield Foreign(
            place,
            prompt,
            # garak's goal is the probe's aim, not a request: the prompt is all there is
            request=prompt,
            category=str(row.get("probe_classname") or ""),
            attack=str(row.get("probe_classname") or "garak"),
            model=model,
            system=system,
            faults=faults,
            said={
                "goal": row.get("goal"),
                **({"detector_results": scores} if isinstance(scores, dict) else {}),
            },
        )
    for place in begun.values():
        yield Reject(place, "an attempt that was never completed")


READERS: dict[str, Callable[[Path, Hints], Found]] = {
    "harmbench": harmbench,
    "jailbreakbench": jailbreakbench,
    "adversariallm": adversariallm,
    "nanogcg": nanogcg,
    "easyjailbreak": easyjailbreak,
    "llm-attacks": gcg_log,
    "pyrit-gcg": gcg_log,
    "garak": garak,
    "jsonl": jsonl,
    "json": json_array,
    "csv": csv_file,
}


def read_foreign(path: Path, kind: str, hints: Hints) -> Found:
    """Prompts and rejects of one file.

    Raises:
        AttackPlaneError: see ``check_readable``; hints that a format needs.
    """
    check_readable(path, kind)
    return READERS[kind](path, hints)


def check_readable(path: Path, kind: str) -> None:
    """Whether there is such a format, and a file in UTF-8.

    Raises:
        AttackPlaneError: there is not.
    """
    if kind not in READERS:
        raise AttackPlaneError("unknown format", got=kind, remedy=nearest(kind, READERS))
    require_regular(path)
    check_encoding(path)
