"""Directions at every position and layer: how far can they be trusted, and which layer is taken?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.models import ModelHandle, OpenModel
from core.rows import Row
from core.statistics import auroc
from core.store import RunFolder
from geometry.carriers import candidates
from geometry.contrasts import SMALLEST_CLASS, Contrast, cosine, held_out_separation
from geometry.interventions import ablation, steering
from geometry.layers import DEPTH, Candidate, arditi_choice, choose, eq6
from geometry.resampling import (
    cosine_statistics,
    percentiles,
    permuted_sides,
    reliability,
    resampled,
    spearman_brown,
)
from geometry.rollout import rollout
from pipeline.runs import check_specs, write_rows
from plots import layers_png
from study.config import StudyConfig
from study.replies import responses
from study.study import Study

FIELD, PROFILE, SELECTION, SIZES, ACROSS = (
    f"layers_{name}.jsonl" for name in ("field", "profile", "selection", "sizes", "across")
)
HALVES = 100
"""Random splits of a reliability."""
ARDITI_PROMPTS = 8


@dataclass
class LayersResult:
    """Rows by file name (``FIELD``, ``PROFILE``, ``SELECTION``, ``SIZES``, ``ACROSS``)."""

    rows: dict[str, list[Row]]
    files: list[Path]


def layers(
    path: Path,
    specs: Sequence[str],
    config: StudyConfig,
    *,
    open_model: OpenModel = ModelHandle,
) -> LayersResult:
    """Measure every model, write ``layers_*.jsonl`` and ``layers.png``."""
    check_specs(specs)
    names = (FIELD, PROFILE, SELECTION, SIZES, ACROSS)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    known: dict[str, tuple[Contrast, Contrast]] = {}
    with RunFolder(path) as run:
        run.begin_stage("layers", asdict(config), {}, derived=True)
        for spec in specs:
            study = Study(run, open_model(spec), config)
            fingerprint = {spec: study.model.fingerprint}
            run.begin_stage("layers", asdict(config), fingerprint, derived=True)
            rows[FIELD] += field_rows(study)
            profile, selection = profile_rows(study)
            rows[PROFILE] += profile
            rows[SELECTION].append(selection)
            rows[SIZES] += size_rows(study)
            for other, pair in known.items():
                rows[ACROSS] += across_rows(study, other, pair)
            # copies: a view would keep the residuals of all positions
            h, r = (
                replace(c, resid=c.resid.clone())
                for c in (study.harmfulness, study.contrast("harm", "-1"))
            )
            known[spec] = h, r
            del study
        files = [write_rows(path / name, found) for name, found in rows.items()]
    return LayersResult(rows, [*files, layers_png.draw(path)])


def _generator(study: Study) -> torch.Generator:
    return torch.Generator().manual_seed(study.config.seed)


def _contrasts(study: Study) -> Iterator[tuple[str, str, Contrast]]:
    """(kind, position, contrast) of all contrasts that the model has enough prompts for."""
    for position in study.positions:
        yield "harmful - harmless", position, study.contrast("harm", position)
        by_reply = study.contrast("refusal", position)
        if by_reply.size >= SMALLEST_CLASS:
            yield "refused - accepted", position, by_reply


def field_rows(study: Study) -> list[Row]:
    """One row per kind, position and layer: length, AUROC, stability and reliability with nulls."""
    rows = []
    for kind, position, c in _contrasts(study):
        g, draws = _generator(study), study.config.resamples
        shuffled = permuted_sides([c], draws, g)[0]
        separation = c.separation(auroc)
        null = held_out_separation(c.resid, *shuffled, auroc).quantile(0.95, dim=0)
        stability = percentiles(cosine(resampled([c], draws, g)[0], c.direction))
        halves = reliability(c, c.size // 2, HALVES, g)
        chance = reliability(c, c.size // 2, HALVES, g, shuffle=True).quantile(0.95, dim=0)
        norm = c.difference.norm(dim=-1)
        for layer in range(study.loaded.n_layers + 1):
            r = float(halves[:, layer].mean())
            rows.append(
                {
                    "model": study.spec,
                    "kind": kind,
                    "position": position,
                    "layer": layer,
                    "n": [len(c.positive), len(c.negative)],
                    "alive": bool(c.alive[layer]),
                    "norm": float(norm[layer]),
                    "auroc": float(separation[layer]),
                    "auroc_null_95": float(null[layer]),
                    "stability": stability[layer].tolist(),
                    "split_half": r,
                    "split_half_interval": percentiles(halves)[layer].tolist(),
                    "split_half_null_95": float(chance[layer]),
                    "cosine_with_truth": spearman_brown(r),
                }
            )
    return rows


def arditi_table(study: Study) -> list[Candidate]:
    """Scores of harmful - harmless at every template position and layer that the rule may choose.

    On ``ARDITI_PROMPTS`` contrast prompts of each label, spread over categories.
    """
    n = study.loaded.n_layers
    field = {position: study.contrast("harm", position) for position in study.tail}
    tried = candidates(field, range(int(DEPTH * n)))

    def make() -> list[Row]:
        ablated = [ablation("arditi", c.vector[None], range(n + 1)) for c in tried]
        added = [steering("arditi", c.vector, [c.layer], c.norm) for c in tried]
        means = []
        for harmful, edits in ((True, ablated), (False, ablated), (False, added)):
            outcomes = rollout(
                study.loaded,
                study.some(harmful, ARDITI_PROMPTS),
                edits,
                refusal_tokens=study.openings.first_tokens,
                description="candidates of Arditi's rule",
            )
            scores = torch.tensor([[(o.log_odds, o.kl) for o in row] for row in outcomes])
            means.append(scores.double().mean(0))
        refusal, kl, steered = means[0][:, 0], means[1][:, 1], means[2][:, 0]
        return [
            asdict(Candidate(c.position, c.layer, *(float(s[i]) for s in (refusal, steered, kl))))
            for i, c in enumerate(tried)
        ]

    depends = [study.openings.first_tokens, study.set_identity, ARDITI_PROMPTS]
    return [Candidate(**row) for row in study.kept("arditi", depends, make)]


@dataclass
class _Profile:
    """Pairs of contrasts whose cosines are reported, and (layer,) scores by criterion."""

    pairs: dict[str, tuple[Contrast, Contrast]]
    scores: dict[str, Tensor]
    note: str = ""


def _profile(study: Study) -> _Profile:
    """What is known of the prompt side, and of the response side where there are replies."""
    h, r, own = study.harmfulness, study.contrast("harm", "-1"), study.refusal
    separation = (h.separation(auroc) + r.separation(auroc)) / 2
    profile = _Profile(
        {"H, R harc": (h, r)}, {"separation": separation, "eq6_prompt": study.prompt_score}
    )
    by_reply = study.contrast("refusal", "-1")
    if by_reply.size >= SMALLEST_CLASS:
        profile.pairs |= {"H, R zhao": (h, by_reply), "R harc, R zhao": (r, by_reply)}
    try:
        replies = responses(study)
    except AttackPlaneError as error:
        profile.note = f"no eq6: {error}"
        return profile
    paper, code = replies.refusal_paper, replies.refusal_code
    profile.pairs |= {
        "H prompt, H response": (h, replies.harmfulness),
        "R prompt, R response (paper)": (own, paper),
        "R prompt, R response (code)": (own, code),
    }
    variants = {"eq6_paper": (r, paper), "eq6_code": (r, code)}
    if study.refusal_kind == "refusal":
        variants["eq6_zhao"] = own, paper
    for name, (prompt, side) in variants.items():
        profile.scores[name] = eq6(
            h.direction, prompt.direction, replies.harmfulness.direction, side.direction
        )
    if replies.forced:
        profile.note = "refusals of the response side are ours, the model's own are too few"
    return profile


def profile_rows(study: Study) -> tuple[list[Row], Row]:
    """Statistics by layer, and the layer that each criterion of ``geometry/layers.py`` takes."""
    profile = _profile(study)
    statistics = {
        name: cosine_statistics(*pair, study.config.resamples, _generator(study))
        for name, pair in profile.pairs.items()
    }
    table = arditi_table(study)
    last = {c.layer: c for c in table if c.position == "-1"}
    rows = []
    for layer in range(study.loaded.n_layers + 1):
        row: Row = {"model": study.spec, "layer": layer}
        row["cosines"] = {name: _at(s, layer) for name, s in statistics.items()}
        row["scores"] = {
            name: float(score[layer]) if score[layer].isfinite() else None
            for name, score in profile.scores.items()
        }
        if layer in last:
            row["arditi"] = {k: getattr(last[layer], k) for k in ("kl", "steering", "refusal")}
        rows.append(row)
    chosen: dict[str, int | None] = dict(choose(profile.scores, study.loaded.n_layers))
    passed = arditi_choice(table, study.loaded.n_layers)
    chosen["arditi"] = passed[0].layer if passed else None
    selection = {
        "model": study.spec,
        "layers": chosen,
        "passed_arditi": [asdict(c) for c in passed],
        "estimator": study.estimator,
        "refusal_rate": study.refusal_rate,
        "note": profile.note,
    }
    return rows, selection


def _at(statistics: dict[str, Tensor], layer: int) -> Row:
    """A cosine's statistics at one layer, as plain numbers."""
    return {
        "value": float(statistics["value"][layer]),
        "interval": statistics["interval"][layer].tolist(),
        "null_permuted_95": float(statistics["null_permuted"][layer]),
        "null_random_95": float(statistics["null_random"][layer]),
    }


def size_rows(study: Study) -> list[Row]:
    """Reliability at the study's layer from n prompts a side, up to half of them."""
    rows = []
    for name, c in (("H", study.harmfulness), ("R", study.refusal)):
        for size in sorted(
            {n for n in (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n <= c.size // 2}
            | {c.size // 2}
        ):
            g = _generator(study)
            values = reliability(c, size, HALVES, g)[:, study.layer]
            null = reliability(c, size, HALVES, g, shuffle=True)[:, study.layer]
            rows.append(
                {
                    "model": study.spec,
                    "direction": name,
                    "layer": study.layer,
                    "n": size,
                    "cosine": float(values.mean()),
                    "interval": percentiles(values[:, None])[0].tolist(),
                    "null_95": float(null.quantile(0.95)),
                }
            )
    return rows


def across_rows(study: Study, other: str, theirs: tuple[Contrast, Contrast]) -> list[Row]:
    """Cosines of this model's harc directions with those of another model of equal width.

    They go layer by layer, up to the depth of the shallower one.
    """
    if theirs[0].resid.shape[2] != study.loaded.d_model:
        return []
    rows = []
    for name, mine, their in zip(
        "HR", (study.harmfulness, study.contrast("harm", "-1")), theirs, strict=True
    ):
        depth = min(mine.resid.shape[1], their.resid.shape[1])
        cut = [c.up_to(depth) for c in (mine, their)]
        s = cosine_statistics(cut[0], cut[1], study.config.resamples, _generator(study))
        rows += [
            {
                "models": [other, study.spec],
                "direction": name,
                "layer": layer,
                "cosine": float(s["value"][layer]),
                "interval": s["interval"][layer].tolist(),
                "null_permuted_95": float(s["null_permuted"][layer]),
                "null_random_95": float(s["null_random"][layer]),
            }
            for layer in range(depth)
        ]
    return rows
