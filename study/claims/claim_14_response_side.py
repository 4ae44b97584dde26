"""Claim 14: on successful attacks response-side H is above benign although prompt-side H is not.

Benign is the same wrapper with the matched harmless request in it, and what the model replies to
that. At the study's layer, in differences by behaviour:

    response side   mean over the first 32 tokens of the reply, along the response-side H; above 0
    prompt side     t_inst, along the prompt-side H; not above a quarter of the gap between the
                    harmful and the harmless contrast prompts

Both are ranked among directions of permuted labels: what those show too decides nothing. At t_goal
only words before the request can suppress anything; it is told for attacks that have such words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.judges import COMPLIED
from geometry.contrasts import Contrast
from geometry.resampling import permuted
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.replies import replies_of, response_residuals
from study.verdicts import ABOVE, NOT_ABOVE, Check, Claim, mean_check
from study.wrapped import by_behaviour

MARGIN = 0.25
"""Of the contrast set's gap between harmful and harmless: less counts as not above benign."""
DRAWS = 999
"""Directions of permuted labels."""
FEWEST = 3
"""Behaviours with a successful attack."""


def measure(evidence: Evidence) -> Claim:
    study, layer = evidence.study, evidence.study.layer
    responses, pairs = evidence.responses, evidence.wrapped
    won = successful(evidence)
    chosen = [i for i, a in enumerate(pairs.artifacts) if a.artifact_id in won]
    contents, requests = [], []
    for i in chosen:
        a, b = pairs.artifacts[i], pairs.harmless[i]
        content = a.with_request(b.request)
        assert content is not None  # or it would not be among the pairs
        contents.append((content, a.system_prompt))
        requests.append(b)
    replies = replies_of(study, contents)
    said = study.outcomes(zip(requests, replies, strict=True))
    kept = [n for n, outcome in enumerate(said) if outcome == COMPLIED]
    rows = [chosen[n] for n in kept]
    names = [pairs.behaviours[i] for i in rows]
    if len(set(names)) < FEWEST:
        why = f"successful attacks on {len(set(names))} behaviours only, with a benign counterpart"
        return TEST.claim(evidence, (), held_back=[why])
    attacked = [(pairs.artifacts[i].prompt, pairs.artifacts[i].system_prompt) for i in rows]
    texts = [won[pairs.artifacts[i].artifact_id] for i in rows] + [replies[n] for n in kept]
    both = [*attacked, *(contents[n] for n in kept)]
    said_states = response_residuals(study, both, texts)[:, layer].double()
    response = said_states[: len(rows)] - said_states[len(rows) :]
    inst, goal = (pairs.moved(p, layer)[torch.tensor(rows)] for p in ("t_inst", "t_goal"))
    checks = [
        _check(evidence, "response-side H", responses.harmfulness, response, names, ABOVE),
        _check(evidence, "prompt-side H", study.harmfulness, inst, names, NOT_ABOVE),
    ]
    behind = [k for k, i in enumerate(rows) if pairs.artifacts[i].begins_before_request]
    if behind:
        chosen_names = [names[k] for k in behind]
        at_goal = _check(
            evidence, "H at t_goal", study.harmfulness, goal[behind], chosen_names, NOT_ABOVE
        )
        checks.append(at_goal.told())
    note = f"layer {layer}; {len(rows)} successful attacks on {len(set(names))} behaviours"
    return TEST.claim(evidence, tuple(checks), note)


def successful(evidence: Evidence) -> dict[str, str]:
    """Artifact id -> reply of the attacks that succeeded with a reply that complies."""
    won = [(a, r.reply) for a, r in evidence.answered if r.jailbroken]
    said = evidence.study.outcomes(won)
    return {
        a.artifact_id: reply
        for (a, reply), outcome in zip(won, said, strict=True)
        if outcome == COMPLIED
    }


def _check(
    evidence: Evidence,
    side: str,
    contrast: Contrast,
    moved: Tensor,
    names: list[str],
    claimed: str,
) -> Check:
    """The mean over behaviours of what ``moved`` (prompt, d_model) has along a direction."""
    layer = evidence.study.layer
    generator = torch.Generator().manual_seed(evidence.study.config.seed)
    dealt = permuted([contrast.at_layer(layer)], DRAWS, generator)[0][:, 0].double()
    means = torch.tensor([by_behaviour(names, along) for along in (moved @ dealt.T).T])
    gap = float(contrast.difference[layer].norm())
    return mean_check(
        f"{side}, successful attacks - benign in the same wrapper",
        by_behaviour(names, moved @ contrast.direction[layer].double()),
        unit="residual units",
        claimed=claimed,
        threshold=MARGIN * gap if claimed == NOT_ABOVE else 0.0,
        controls={"permuted": means.mean(1).tolist()},
    )


TEST = CLAIMS.add(
    ClaimTest(
        number=14,
        title="On successful attacks response-side H is above benign although prompt-side H is not",
        measure=measure,
        needs=("attacks", "responses"),
    )
)
