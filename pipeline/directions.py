"""Directions of each model, from a contrast set and the model's own replies to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import ANEW, read_object
from core.models import ModelHandle, OpenModel
from core.readings import Directions
from core.rows import Row
from core.store import RunFolder
from evaluation.form import form_auroc
from geometry.directions import EstimateConfig, classes, estimate
from pipeline.contrast_reading import ContrastReading, DirectionsConfig, contrast_set
from pipeline.directions_files import directions_path, load_directions, save_directions
from pipeline.runs import check_specs

STAGE = "directions"


@dataclass
class DirectionsResult:
    """Directions by model and estimator, and why some are missing."""

    directions: list[Directions] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def directions(
    path: Path,
    specs: Sequence[str],
    estimators: Sequence[str],
    config: DirectionsConfig,
    *,
    open_model: OpenModel = ModelHandle,
) -> DirectionsResult:
    """Estimate and save directions of each model; those that the run has are read from it.

    With one estimator, a model that it cannot serve is an error; with several, a note.
    """
    check_specs(specs)
    behaviours = contrast_set(config)
    result = DirectionsResult()
    with RunFolder(path) as run:
        begin_directions(run, config)
        for spec in specs:
            reading = ContrastReading(run, open_model(spec), config, behaviours=behaviours)
            own = directions_of(reading, estimators)
            result.directions += own.directions
            result.notes += own.notes
    return result


def begin_directions(run: RunFolder, config: DirectionsConfig) -> None:
    """Write the stage's settings into the run's manifest.

    Raises:
        AttackPlaneError: the run's directions were made with other settings.
    """
    run.begin_stage(STAGE, config.to_settings(), {})


def begun_otherwise(reading: ContrastReading, estimator: str) -> bool:
    """Whether the run holds such directions that were made from something else."""
    run, spec = reading.run, reading.model.spec
    own = json.loads(json.dumps(reading.config.to_settings()))
    if run.manifest["stages"].get(STAGE, own) != own:
        return True
    there = directions_path(run.path, spec, estimator).exists()
    return there and not have_directions(run.path, spec, estimator, reading.made_from)


def directions_of(reading: ContrastReading, estimators: Sequence[str]) -> DirectionsResult:
    """One model's directions, made where the run lacks them."""
    run, spec, config = reading.run, reading.model.spec, reading.config
    run.begin_stage(STAGE, config.to_settings(), {spec: reading.model.fingerprint})
    result = DirectionsResult()
    for estimator in estimators:
        if not have_directions(run.path, spec, estimator, reading.made_from):
            try:
                classes(estimator, reading.harmful, reading.refused)
            except AttackPlaneError as error:
                if len(estimators) == 1:
                    raise
                result.notes.append(f"{spec}: no {estimator} directions. {error}")
                continue
            made = estimated(reading, estimator)
            save_directions(made, run.path, {"made_from": reading.made_from})
        there = load_directions(run.path, spec, estimator)
        result.directions.append(there)
        if len(result.directions) == 1:  # they are of one reading
            result.notes += contrast_notes(there)
    return result


def estimated(reading: ContrastReading, estimator: str) -> Directions:
    """One model's directions, in memory."""
    config = reading.config
    made = estimate(
        reading.activations,
        reading.harmful,
        estimator=estimator,
        refused=reading.refused,
        units=[b.unit for b in reading.behaviours],
        config=EstimateConfig(config.resamples, config.seed),
    )
    made.settings["system_prompt"] = config.system_prompt
    made.settings["template"] = config.template
    made.settings["contrast"] = contrast_facts(reading)
    return made


def contrast_facts(reading: ContrastReading) -> Row:
    """What the reader must know of the contrast set on this model.

    ``form``: held-out AUROC of telling the label from the form of the prompts alone. ``refused``:
    label -> [prompts that the model refuses, prompts that were judged].
    """
    texts = [b.request for b in reading.behaviours]
    last = [prompt.ids[prompt.t_inst] for prompt in reading.prompts]
    lengths = [len(prompt.content) for prompt in reading.prompts]
    groups = [b.unit for b in reading.behaviours]
    return {
        "form": form_auroc(texts, last, lengths, reading.harmful, groups),
        "refused": {
            "harmful": list(reading.refusals(harmful=True)),
            "harmless": list(reading.refusals(harmful=False)),
        },
    }


FORM_TELLS = 0.65
"""AUROC of form alone above which a direction may be one of form."""
FEW_REFUSED = 0.5
"""Share of harmful prompts refused below which a refusal direction is not one of refusal."""


def contrast_notes(directions: Directions) -> list[str]:
    """What the contrast set is worth on this model, in words, with warnings where it is weak."""
    facts = directions.settings.get("contrast")
    if not facts:
        return []
    (bad, of_bad), (good, of_good) = facts["refused"]["harmful"], facts["refused"]["harmless"]
    first = float(directions.statistics["separation_harmfulness"][0])
    null = float(directions.statistics["null_permuted_separation_harmfulness"][0])
    notes = [
        f"{directions.model} refuses {bad} of {of_bad} harmful and {good} of {of_good} harmless "
        f"contrast prompts; their form alone tells the label with AUROC {facts['form']:.2f}; "
        f"d' of H at layer 0 is {first:.2f}"
    ]
    if facts["form"] > FORM_TELLS or first > max(null, 1.0):
        notes.append(
            "warning: the form of these prompts gives the label away, so H may be a direction of "
            "form; use pairs of the same form, such as the set demonstration"
        )
    if bad < FEW_REFUSED * of_bad:
        notes.append(
            f"warning: this model refuses {bad / max(1, of_bad):.0%} of the harmful prompts, so R "
            "is hardly a direction of refusal; give a contrast set that it refuses more of"
        )
    return notes


def have_directions(path: Path, spec: str, estimator: str, made_from: str) -> bool:
    """Whether the run holds these directions, made from the same."""
    note = directions_path(path, spec, estimator).with_suffix(".json")
    if not note.exists():
        return False
    return read_object(note, "a note on directions", remedy=ANEW).get("made_from") == made_from
