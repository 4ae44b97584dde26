"""What changes in a model along its training: one row per checkpoint and measure.

1. The reference is studied first: its carriers, its directions, its residuals on the contrast set.
2. Each checkpoint is loaded once. R is by one estimator for all of them (harc, unless another is
   asked for): a model that refuses everything has no other, and what is compared must be one thing.
   Its carriers are searched anew, and measured are

    carriers   place, KL of ablating it and fall of D on held-out prompts
    coupling   C_cos, C_sub, C_layer, both HRCI (``study/coupling.py``)
    rank       effective rank of both fields, raw and of rows of unit length
    drift      from the reference: mean principal angle, cosine of the plane's directions
    beliefs    accuracy of the latent guard on held-out pairs (``geometry/beliefs.py``)
    leaning    outcome D on held-out harmful and harmless prompts
    plane      centroids of held-out prompts along the reference's H and R
    cosines    of held-out prompts with the reference's H and R: what HARC trains
    change     since the reference: its relative length, and its share outside the H-R plane

3. The behaviour state is that of ``evaluate`` in the same run, where it has been measured.
4. Prompts of the run that were optimised on checkpoints and replayed on others make the matrix of
   transfer, and what predicts it (``study/sparse_transfer.py``).
5. Claims about trainings are measured on all of it (``study/training_claims/``).

Results are kept under a hash of what they depend on; a stopped command goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.cards import card_of
from core.errors import AttackPlaneError
from core.files import write_atomically
from core.models import ModelHandle, OpenModel
from core.records import HARMFUL, HARMLESS
from core.rows import Row
from core.statistics import Numbers, bootstrap_mean
from core.store import RunFolder
from geometry.beliefs import beliefs, told_rightly
from geometry.change import inside_and_whole, null_outside
from geometry.contrasts import unit
from geometry.controls import edit
from geometry.directions import best_layers
from geometry.effects import by_behaviour, differences, pick, summary
from geometry.layers import MAX_KL, inner_layers
from pipeline.plane_files import as_parquet
from pipeline.runs import check_specs, write_rows
from plots import checkpoints_png, interventions_png
from plots.tradeoff_png import evaluation_rows
from study.anchors import anchor_row, published_rows
from study.behaviour_state import behaviour_state
from study.causal_sweep import UNIT as SLOPE
from study.causal_sweep import slopes, sweep
from study.config import StudyConfig
from study.coupling import Estimate, coupling, draw_fields, drift, row_of
from study.outcomes import measure, site_of
from study.reference import Reference, held_out_states
from study.sparse_transfer import matrix_rows, prediction_rows, transfers_in
from study.study import Study
from study.training_claims.evidence import over_seeds, trainings_of
from study.training_claims.registry import TRAINING_CLAIMS
from study.verdicts import Claim, with_holm

STAGE = "trajectory"
FILE, PARQUET = checkpoints_png.ROWS, "trajectory.parquet"
CLAIMS, TRANSFERS = "trajectory_claims.jsonl", checkpoints_png.TRANSFERS
PREDICTIONS, ANCHORS = "trajectory_predictions.jsonl", "trajectory_anchors.jsonl"
NATS = "nats per token"
VERSION = 1
"""Of the measures: raised where rows of before must be measured anew."""
BAND = 2
"""Layers of the cosines: HARC's K."""


@dataclass
class TrajectoryResult:
    """Rows of all checkpoints, the reference first; what follows from them; files and notes."""

    rows: list[Row] = field(default_factory=list)
    transfers: list[Row] = field(default_factory=list)
    predictions: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    anchors: list[Row] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def trajectory(
    path: Path,
    reference: str,
    specs: Sequence[str],
    config: StudyConfig,
    *,
    sweeps: bool = False,
    anchors: Sequence[str] = (),
    open_model: OpenModel = ModelHandle,
) -> TrajectoryResult:
    """Measure every checkpoint against the reference, write rows and pictures.

    Args:
        sweeps: steer every checkpoint by its carriers too (``study/causal_sweep.py``).
        anchors: aligned models that are reopened by their carriers (``study/anchors.py``).
        reference: what drift is measured from, usually the base model; the first row.
    """
    check_specs([reference, *specs, *anchors])
    result = TrajectoryResult()
    asked = config
    if config.estimator == "auto":  # each checkpoint would choose its own
        config = replace(config, estimator="harc")
    with RunFolder(path) as run:
        settings = config.to_settings() | {"reference": reference}
        run.begin_stage(STAGE, settings, {})
        states = {row["model"]: row for row in evaluation_rows(path)}
        first = Study(run, open_model(reference), config)
        anchor = Reference(first)
        steered: list[Row] = []
        for spec in dict.fromkeys([reference, *specs]):
            study = first if spec == reference else Study(run, open_model(spec), config)
            run.begin_stage(STAGE, settings, {spec: study.model.fingerprint})
            rows = of_checkpoint(study, anchor)
            if sweeps:
                swept = sweep(study)
                steered += summary(swept)
                rows += [_mean("slope", name, d, SLOPE) for name, d in slopes(swept)]
            rows += behaviour_state(states.get(spec), study.model.fingerprint, result.notes)
            whose = _whose(spec) | {"estimator": study.estimator}
            result.rows += [whose | row for row in rows]
            if study is not first:
                study.model.release()
        result.files = [write_rows(path / FILE, result.rows), path / PARQUET]
        table = as_parquet(list(result.rows[0]), result.rows, dict.get)
        write_atomically(path / PARQUET, table)
        for spec in dict.fromkeys(anchors):
            study = Study(run, open_model(spec), asked)
            run.begin_stage(STAGE, settings, {spec: study.model.fingerprint})
            result.anchors.append(anchor_row(study))
            study.model.release()
        if anchors:
            result.files.append(write_rows(path / ANCHORS, [*published_rows(), *result.anchors]))
        if sweeps:
            result.files.append(write_rows(path / interventions_png.ROWS, steered))
        transfers = transfers_in(run, result.rows)
        if transfers is not None:
            result.transfers = matrix_rows(transfers)
            result.predictions = prediction_rows(transfers, result.rows, config.seed)
            result.files.append(write_rows(path / TRANSFERS, result.transfers))
            result.files.append(write_rows(path / PREDICTIONS, result.predictions))
        result.claims = training_claims(result.rows, result.predictions)
        result.files.append(write_rows(path / CLAIMS, (c.to_row() for c in result.claims)))
    result.files += checkpoints_png.draw(path)
    if sweeps:
        result.files += interventions_png.draw_each(path, "trajectory_sweep")
    return result


def training_claims(rows: Sequence[Row], predictions: Sequence[Row]) -> list[Claim]:
    """Every claim about trainings, on every training of its arms."""
    trainings = trainings_of(rows, predictions)
    tests = sorted(TRAINING_CLAIMS.all().values(), key=lambda test: test.number)
    found = []
    for test in tests:
        own = [t for t in trainings.all if test.about(t)]
        claims = [test.on(t, trainings) for t in own]
        found += [*claims, *over_seeds(own, claims)]
    return with_holm(found)


def _whose(spec: str) -> Row:
    card = card_of(spec)
    method = card.get("method") or card.get("settings")  # cards of before had no method
    own = {"arm": card.get("arm"), "seed": card.get("seed"), "method": method}
    own["common"] = card.get("common")
    variant = " ".join(f"{k}={v}" for k, v in card.get("variant", {}).items())
    return {"model": spec, **own, "variant": variant, "step": card.get("step", 0)}


def of_checkpoint(study: Study, anchor: Reference) -> list[Row]:
    """Everything that is measured inside one checkpoint."""

    def make() -> list[Row]:
        return list(_Checkpoint(study, anchor).rows())

    reference = anchor.study

    held_out = [b.request for label in (HARMFUL, HARMLESS) for b in study.held_out(label)]
    depends: list[Any] = [study.search_identity("H"), study.search_identity("R"), held_out]
    depends += [study.config.resamples, study.config.seed]
    depends += [reference.model.fingerprint, reference.estimator_identity]
    depends += [VERSION, asdict(study.openings)]
    return study.kept("trajectory", depends, make)


class _Checkpoint:
    """The measures of one checkpoint, family by family."""

    def __init__(self, study: Study, anchor: Reference) -> None:
        reference = anchor.study
        if study.loaded.d_model != reference.loaded.d_model:
            raise AttackPlaneError(
                "a checkpoint of another width",
                where=study.spec,
                got=f"{study.loaded.d_model}, the reference {reference.loaded.d_model}",
                remedy="give checkpoints of the reference",
            )
        self.study, self.anchor, self.reference = study, anchor, reference

    @cached_property
    def _read(self) -> dict[str, list[Tensor]]:
        mine = self.study is self.reference
        return self.anchor.read if mine else held_out_states(self.study)

    def rows(self) -> Iterator[Row]:
        yield from self._carriers()
        config = self.study.config
        drawn = draw_fields([self.study, self.reference], config.resamples, config.seed)
        pairs = self.study.harmfulness.size
        for name, found in coupling(self.study, drawn).items():
            yield row_of("rank" if "rank" in name else "coupling", name, found, "", pairs)
        for name, found in drift(drawn, self.reference.layer).items():
            yield row_of("drift", name, found, "" if "cosine" in name else "degrees", pairs)
        yield from self._beliefs()
        yield from self._plane()
        yield from self._change()

    def _carriers(self) -> Iterator[Row]:
        """Where the carriers are, and what ablating them does to held-out prompts."""
        study = self.study
        site, made_from = site_of(study, None)
        edits = [edit(mode, "ablate", 1.0, site.vectors, site.layers, site) for mode in ("H", "R")]
        bad, good = (
            measure(study, edits, study.held_out(label), 0, made_from)
            for label in (HARMFUL, HARMLESS)
        )
        for kind in ("H", "R"):
            carrier = study.carrier(kind)
            kl = list(by_behaviour(pick(good, mode=kind), "kl").values())
            fall = list(differences(pick(bad, mode=kind), pick(bad, mode="none"), "d").values())
            place = {"position": carrier.position, "admissible": float(np.mean(kl)) <= MAX_KL}
            layer = Estimate(float(carrier.layer))
            yield row_of("carriers", f"layer of {kind}", layer, "layer") | place
            yield _mean("carriers", f"KL, {kind} ablated", kl, "nats")
            yield _mean("carriers", f"D, {kind} ablated - alone", fall, NATS)
        for label, rows in ((HARMFUL, bad), (HARMLESS, good)):
            d = list(by_behaviour(pick(rows, mode="none"), "d").values())
            yield _mean("leaning", f"D on {label} prompts", d, NATS)

    def _beliefs(self) -> Iterator[Row]:
        for kind, contrast, position in (
            ("H", self.study.harmfulness, "t_inst"),
            ("R", self.study.refusal, "t_post_inst"),
        ):
            harmful, harmless = (beliefs(contrast, side) for side in self._read[position])
            right = told_rightly(harmful, harmless) + 0.5
            yield _mean("beliefs", f"{kind} tells held-out pairs", right.tolist(), "accuracy")
            for label, values in ((HARMFUL, harmful), (HARMLESS, harmless)):
                yield _mean("beliefs", f"belief by {kind} of {label} prompts", values.tolist(), "")

    def _change(self) -> Iterator[Row]:
        """How much of the change since the reference lies outside its H-R plane."""
        layers = list(inner_layers(self.study.loaded.n_layers))
        inside, whole, size = [], [], []
        directions = [c.direction for c, _ in self.anchor.axes.values()]
        for mine, theirs in zip(self._read.values(), self.anchor.read.values(), strict=True):
            before = torch.cat(theirs)
            change = torch.cat(mine) - before
            parts = inside_and_whole(change, *directions)
            inside.append(parts[0][:, layers])
            whole.append(parts[1][:, layers])
            size.append(change[:, layers].norm(dim=-1) / before[:, layers].norm(dim=-1))
        yield _mean("change", "relative change", torch.cat(size, 1).mean(1).tolist(), "")
        if not float(torch.cat(whole).sum()):  # the reference itself
            return
        within, all_of_it = torch.cat(inside, 1), torch.cat(whole, 1)

        def share(rows: Tensor | slice) -> float:
            return float((1 - within[rows].sum(0) / all_of_it[rows].sum(0)).nanmean())

        generator = torch.Generator().manual_seed(self.study.config.seed)
        n = len(within) // 2
        pairs = torch.randint(n, (self.study.config.resamples, n), generator=generator)
        drawn = [share(torch.cat([p, p + n])) for p in pairs]
        low, high = np.quantile(drawn, (0.025, 0.975))
        null = null_outside(self.study.loaded.d_model)
        found = Estimate(share(slice(None)), (float(low), float(high)), null)
        yield row_of("change", "share outside H-R", found, "", n)

    def _plane(self) -> Iterator[Row]:
        """Held-out prompts along the reference's H and R: projection and cosine.

        Projections are at its layer, from its own harmless contrast prompts. Cosines are those that
        HARC trains, a mean over the ``BAND`` best layers.
        """
        reference = self.anchor.study
        layer, band = reference.layer, best_layers(reference.directions, BAND)
        benign = torch.tensor([not h for h in reference.harmful])
        for kind, (contrast, position) in self.anchor.axes.items():
            v = contrast.direction.double()
            centre = reference.reading.activations.of(layer, position)[benign].double().mean(0)
            for label, side in zip((HARMFUL, HARMLESS), self._read[position], strict=True):
                along = (side[:, layer].double() - centre) @ v[layer]
                yield _mean("plane", f"{label} along {kind}", along.tolist(), "residual units")
                cosines = (unit(side[:, band].double()) * v[band]).sum(-1).mean(1)
                yield _mean("cosines", f"{label} with {kind}", cosines.tolist(), "")


def _mean(family: str, name: str, values: Numbers, unit: str) -> Row:
    found = Estimate(float(np.mean(values)), bootstrap_mean(values))
    return row_of(family, name, found, unit, len(values))
