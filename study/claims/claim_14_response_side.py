"""Claim 14: on successful attacks response-side H is above benign although prompt-side H is not.

At the study's layer: successful attacks against held-out harmless prompts and the model's replies
to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.errors import AttackPlaneError
from core.records import BASELINES, AttackArtifact
from geometry.contrasts import Contrast, unit
from geometry.resampling import permuted, upper
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.replies import replies_to, response_residuals
from study.verdicts import Check, Claim, difference_check

MARGIN = 0.25
"""Of the contrast set's gap between harmful and harmless: less counts as not above benign."""
RANDOM_DRAWS = 2000


def measure(evidence: Evidence) -> Claim:
    study, layer = evidence.study, evidence.study.layer
    try:
        responses = evidence.responses
    except AttackPlaneError as error:
        return TEST.claim(evidence, (), held_back=[str(error)])
    won = successful(evidence)
    units = [a.behaviour_id for a, _ in won]
    if len(set(units)) < 3:
        return TEST.claim(evidence, (), held_back=[f"{len(won)} successful attacks: too few"])
    system = study.config.system_prompt
    benign = study.held_out("harmless")
    replies = replies_to(study, benign)
    said = study.outcomes(zip(benign, replies, strict=True))
    there = [i for i, outcome in enumerate(said) if outcome == "complied"]
    requests = [(a.prompt, a.system_prompt) for a, _ in won]
    requests += [(benign[i].request, system) for i in there]
    texts = [reply for _, reply in won] + [replies[i] for i in there]
    response = response_residuals(study, requests, texts)[:, layer].split([len(won), len(there)])
    attacked = study.prompts_of([(a.prompt, a.system_prompt) for a, _ in won])
    plain = study.prompts_of([(b.request, system) for b in benign])
    prompt = study.residuals([*attacked, *plain])[:, layer].split([len(won), len(plain)])
    seed, draws = study.config.seed, study.config.resamples
    checks = (
        _check(
            "response-side H, successful attacks - benign",
            _Sides(responses.harmfulness, response[0], response[1], units, layer),
            "above",
            seed,
            draws,
        ),
        _check(
            "prompt-side H, successful attacks - benign",
            _Sides(study.harmfulness, prompt[0], prompt[1], units, layer),
            "below",
            seed,
            draws,
        ),
    )
    note = f"layer {layer}; {len(won)} successful attacks on {len(set(units))} behaviours"
    return TEST.claim(evidence, checks, note)


def successful(evidence: Evidence) -> list[tuple[AttackArtifact, str]]:
    """(artifact, reply) of the attacks that succeeded with a reply that complies."""
    by_id = {a.artifact_id: a for a in evidence.artifacts}
    won = [
        (by_id[r.artifact_id], r.reply)
        for r in evidence.replays
        if r.target_model == evidence.study.spec
        and r.jailbroken
        and r.attack not in BASELINES
        and r.artifact_id in by_id
    ]
    said = evidence.study.outcomes(won)
    return [pair for pair, outcome in zip(won, said, strict=True) if outcome == "complied"]


class _Sides:
    """Attacked and benign residuals (n, d_model) at one layer; attacked ones by behaviour."""

    def __init__(
        self,
        contrast: Contrast,
        attacked: torch.Tensor,
        benign: torch.Tensor,
        units: Sequence[str],
        layer: int,
    ) -> None:
        rows = {u: [i for i, v in enumerate(units) if v == u] for u in dict.fromkeys(units)}
        self.contrast, self.layer = contrast, layer
        self.attacked = torch.stack([attacked[r].double().mean(0) for r in rows.values()])
        self.benign = benign.double()
        self.gap = self.attacked.mean(0) - self.benign.mean(0)
        self.direction = contrast.direction[layer].double()

    def nulls(self, seed: int, draws: int) -> dict[str, float]:
        """95th percentiles of the gap along directions that mean nothing."""
        generator = torch.Generator().manual_seed(seed)
        dealt = permuted([self.contrast], draws, generator)[0][:, self.layer].double()
        random = unit(torch.randn(RANDOM_DRAWS, len(self.gap), generator=generator)).double()
        return {
            "random_95": float(upper(random @ self.gap)),
            "permuted_95": float(upper(dealt @ self.gap)),
        }


def _check(name: str, sides: _Sides, claimed: str, seed: int, draws: int) -> Check:
    nulls = sides.nulls(seed, draws)
    classes = float(sides.contrast.difference[sides.layer].norm())
    threshold, refuted_at = (
        (max(nulls.values()), 0.0) if claimed == "above" else (MARGIN * classes, None)
    )
    return difference_check(
        name,
        (sides.attacked @ sides.direction).tolist(),
        (sides.benign @ sides.direction).tolist(),
        unit="residual units",
        threshold=threshold,
        claimed=claimed,
        nulls=nulls,
        refuted_at=refuted_at,
    )


TEST = CLAIMS.add(
    ClaimTest(
        number=14,
        title="On successful attacks response-side H is above benign although prompt-side H is not",
        measure=measure,
        needs_attacks=True,
    )
)
