"""What the model writes by itself and under refusal ablation, and the contrasts of both.

Replies under ablation are harmful continuations in the sense of HARC 2607.00572. They stay in the
run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.errors import NothingToMeasure
from core.generate import complete
from core.prompt import Conversation
from core.records import Behaviour
from evaluation.judges import COMPLIED, REFUSED
from evaluation.refusals import refusal_openings
from geometry.activations import RESPONSE, collect
from geometry.contrasts import SMALLEST_CLASS, Contrast
from geometry.interventions import ablation
from geometry.rollout import rollout
from study.study import Study


@dataclass(frozen=True)
class Responses:
    """Response-side residuals of harmful continuations, refusals and benign replies.

    They stand on the sides of contrasts.

    ``forced``: the refusals are our texts after the prompt, since the model's own are too few.
    """

    harmfulness: Contrast
    refusal_paper: Contrast
    refusal_code: Contrast
    forced: bool


def replies_to(study: Study, behaviours: Sequence[Behaviour]) -> list[str]:
    """Own greedy replies to other behaviours than the contrast set's."""

    return replies_of(study, [(b.request, study.config.system_prompt) for b in behaviours])


def replies_of(study: Study, requests: Sequence[tuple[str, str | None]]) -> list[str]:
    """Own greedy replies to (user content, system prompt) pairs."""

    def make() -> list[str]:
        texts = [p.text for p in study.prompts_of(requests)]
        tokens = study.config.reply_tokens
        return complete(
            study.renderer, texts, max_new_tokens=tokens, batch_size=32, description="own replies"
        )

    depends = [study.config.reply_tokens, [list(r) for r in requests], *study.unusual_template]
    return study.kept("replies", depends, make)


def ablated_replies(study: Study) -> list[str]:
    """Replies to the contrast prompts with the refusal carrier ablated at all layers."""
    carrier = study.carrier("R")

    def make() -> list[str]:
        every = range(study.loaded.n_layers + 1)
        edit = ablation("R", carrier.vector[None], every, outputs=study.config.outputs)
        rows = rollout(
            study.loaded,
            study.prompts,
            [edit],
            max_new_tokens=study.config.reply_tokens,
            description="replies under ablation",
        )
        return [study.text(row[0].reply) for row in rows]

    depends = [*study.set_identity, study.place(carrier), *study.how]
    return study.kept("replies under ablation", depends, make)


def response_residuals(
    study: Study, requests: Sequence[tuple[str, str | None]], replies: Sequence[str]
) -> torch.Tensor:
    """(reply, layer, d_model): mean over the first 32 tokens of each reply to (user content, system
    prompt)."""
    prompts = [
        study.renderer.render(Conversation(content, system=system), target=reply, allow_trim=True)
        for (content, system), reply in zip(requests, replies, strict=True)
    ]
    ids = [str(i) for i in range(len(prompts))]
    read = collect(study.loaded, prompts, ids, positions=(RESPONSE,), description="replies")
    return read.at(RESPONSE)


def _by_outcome(study: Study) -> dict[str, list[tuple[Behaviour, str]]]:
    """(behaviour, reply) pairs: harmful continuations, own refusals, benign replies.

    Benign replies are made under the same ablation as the continuations, so that what the ablation
    does to a text is on both sides.
    """

    def kept(replies: Sequence[str], harmful: bool, what: str) -> list[tuple[Behaviour, str]]:
        every = zip(study.behaviours, replies, study.harmful, strict=True)
        pairs = [(b, reply) for b, reply, h in every if h is harmful]
        said = study.outcomes(pairs)
        return [pair for pair, outcome in zip(pairs, said, strict=True) if outcome == what]

    ablated = ablated_replies(study)
    return {
        "continuation": kept(ablated, True, COMPLIED),
        "refusal": kept(study.replies, True, REFUSED),
        "benign": kept(ablated, False, COMPLIED),
    }


def responses(study: Study) -> Responses:
    """Response-side contrasts.

    Raises:
        NothingToMeasure: too few harmful continuations or benign replies.
    """
    kinds = _by_outcome(study)
    forced = len(kinds["refusal"]) < SMALLEST_CLASS
    if forced:
        harmful = [b for b, h in zip(study.behaviours, study.harmful, strict=True) if h]
        texts = refusal_openings(8)
        kinds["refusal"] = [(b, texts[i % len(texts)]) for i, b in enumerate(harmful)]
    for name, pairs in kinds.items():
        if len(pairs) < SMALLEST_CLASS:
            raise NothingToMeasure(
                f"too few {name} replies for the response side", where=study.spec, got=len(pairs)
            )
    items = [pair for pairs in kinds.values() for pair in pairs]
    requests = [(b.request, study.config.system_prompt) for b, _ in items]
    resid = response_residuals(study, requests, [reply for _, reply in items])
    units = tuple(b.unit for b, _ in items)
    ends = [len(kinds["continuation"]), len(kinds["refusal"]), len(kinds["benign"])]
    continuation, refusal, benign = torch.arange(len(items)).split(ends)
    return Responses(
        Contrast("harmful continuation - benign", resid, continuation, benign, units),
        Contrast("refusal - harmful continuation", resid, refusal, continuation, units),
        Contrast("refusal - helpful", resid, refusal, benign, units),
        forced,
    )
