"""What is measured rests on what is said: a plain request for every prompt, labels that are never
pooled, the number behind every figure, and warnings where the contrast set is weak."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cli
from attacks.templates import TemplatesConfig
from commands.tables.attacks import matrix_table, pivot_table
from commands.tables.plane import classes_table
from commands.tables.study import claims_table
from core.errors import AttackPlaneError
from core.files import read_rows
from core.generate import first_turn
from core.models import ModelHandle
from core.readings import Directions
from core.records import Behaviour, Replay
from core.store import ATTACKS, REPLAYS, RunFolder
from evaluation.behaviours import load_behaviours, spread
from evaluation.calibration import Errors
from geometry.classes import describe_classes
from geometry.contrasts import d_prime
from geometry.cross_half import CrossHalf
from geometry.prediction import POOLED, success_prediction
from interchange.importer import import_file
from pipeline.contrast_reading import DirectionsConfig
from pipeline.directions import contrast_notes
from pipeline.matrices import matrix_of
from pipeline.plain import add_plain_requests
from pipeline.runs import artifacts_of
from pipeline.transfer import Transfer, length_notes
from study.claims.claim_02_orthogonality import measure as measure_2
from study.claims.claim_12_separable import measure as measure_12
from study.claims.claim_13_suppression import measure as measure_13
from study.claims.evidence import Evidence
from study.config import StudyConfig
from study.study import Study
from study.verdicts import Check, Claim
from tests.campaigns import attacked
from tests.test_contrasts import point
from tests.test_gcg import run_attacker
from tests.test_transfer import replay, replay_all
from transfer.agreement import agreements
from transfer.matrix import matrix
from transfer.replay import ReplayConfig


def requests(n, label="harmful"):
    return [
        Behaviour(f"{label}{i}", f"Request {label} {i}", f"Sure {i}", "none", label, "test")
        for i in range(n)
    ]


# --- a plain request for every prompt -------------------------------------------------------------
def test_templates_after_gcg_get_the_plain_requests_of_the_new_behaviours(tmp_path, qwen):
    run_attacker(tmp_path, qwen, count=2)  # with plain requests of its own two behaviours
    config = TemplatesConfig(("persona",))
    with RunFolder(tmp_path) as run:
        attacked(run, "templates", config, requests(3))
        assert add_plain_requests(run) == 3 and add_plain_requests(run) == 0
        plain = {a.request for a in artifacts_of(run) if a.attack == "plain"}
        assert plain == {a.request for a in artifacts_of(run)}


def test_imports_get_plain_requests_when_they_are_replayed(tmp_path, qwen):
    rows = "goal,prompt,target\n" + "".join(
        f"Bake number {i},Please bake number {i} now,Sure\n" for i in range(3)
    )
    (tmp_path / "mine.csv").write_text(rows.replace("goal", "request"))
    with RunFolder(tmp_path / "run") as run:
        run.begin_stage("import", {}, {}, derived=True)
        assert import_file(run, tmp_path / "mine.csv", "csv").imported == 3
        replay_all(run, qwen, ["rules"], ReplayConfig(max_new_tokens=3))
        cells = {c.attack: c for c in matrix_of(run)}
    assert cells["plain"].replays == 3 and cells["csv"].paired == 3


def test_one_system_prompt_needs_its_own_plain_request(tmp_path):
    behaviours = requests(1)
    with RunFolder(tmp_path) as run:
        config = TemplatesConfig(("persona",), system_prompt="Be brief.")
        attacked(run, "templates", config, behaviours)
        assert add_plain_requests(run, behaviours) == 2
        plain = [a for a in artifacts_of(run) if a.attack == "plain"]
        assert {a.system_prompt for a in plain} == {None, "Be brief."}
        assert len({a.artifact_id for a in plain}) == 2


def test_transfer_runs_on_plain_requests_alone(tmp_path, tiny_folders):
    path = tmp_path / "mine.csv"
    path.write_text("request,label\nBake a cake,harmful\nBrew a tea,harmless\n")
    args = ["transfer", "--run", str(tmp_path / "run"), "--target", str(tiny_folders["qwen2"])]
    args += ["--judge", "rules", "--behaviours", str(path), "--max-new-tokens", "3"]
    result = CliRunner().invoke(cli.cli, args)
    assert result.exit_code == 0, result.output
    assert "harmless" in result.output
    rows = read_rows(tmp_path / "run" / REPLAYS)
    assert {r["attack"] for r in rows} == {"plain"} and len(rows) == 2
    assert all(math.isfinite(r["d"]) and math.isfinite(r["log_odds"]) for r in rows)
    again = CliRunner().invoke(cli.cli, args)
    assert again.exit_code == 0 and read_rows(tmp_path / "run" / REPLAYS) == rows


def test_a_run_without_artifacts_says_how_to_send_plain_requests(tmp_path, tiny_folders):
    with RunFolder(tmp_path) as run:
        run.begin_stage("gcg", {}, {})
    args = ["transfer", "--run", str(tmp_path), "--target", str(tiny_folders["qwen2"])]
    result = CliRunner().invoke(cli.cli, args)
    assert result.exit_code == 1 and "--behaviours" in result.output


# --- labels are never pooled ----------------------------------------------------------------------
def with_outcome(row, outcome, d=None):
    return dataclasses.replace(row, outcome=outcome, jailbroken=outcome == "complied", d=d)


def test_harmless_prompts_are_never_part_of_an_asr():
    rows = [
        with_outcome(replay("plain", "bad", False), "refused"),
        with_outcome(replay("plain", "good", True), "complied"),
        with_outcome(replay("plain", "pseudo", False), "refused"),
        with_outcome(replay("gcg", "bad", True), "complied"),
    ]
    labels = {"bad": "harmful", "good": "harmless", "pseudo": "pseudo_harmful"}
    cells = {(c.attack, c.label): c for c in matrix(rows, labels=labels)}
    assert cells["plain", "harmful"].asr == 0.0 and cells["plain", "harmful"].refused == 1.0
    assert cells["plain", "harmless"].asr is None and cells["plain", "harmless"].refused == 0.0
    assert cells["plain", "pseudo_harmful"].refused == 1.0
    assert (cells["gcg", "harmful"].gain, cells["gcg", "harmful"].paired) == (1.0, 1)
    for table in (matrix_table(list(cells.values())), pivot_table(list(cells.values()))):
        assert "harmless" in table and "pseudo_harmful" in table


def test_a_reply_that_is_neither_is_no_refusal_and_no_success():
    rows = [
        with_outcome(replay("plain", f"b{i}", False), outcome)
        for i, outcome in enumerate(("refused", "neither", "neither", "complied"))
    ]
    (cell,) = matrix(rows)
    assert (cell.asr, cell.refused, cell.neither) == (0.25, 0.25, 0.5)


def test_rates_are_corrected_by_the_errors_of_their_own_class():
    rows = [replay("gcg", f"b{i}", i < 5) for i in range(10)]
    rows += [replay("persona", f"b{i}", i < 5) for i in range(10)]
    known = {"gcg": Errors(80, 20, 100, 0)}
    cells = {c.attack: c for c in matrix(rows, errors=known.get)}
    assert cells["gcg"].corrected == pytest.approx(0.5 / 0.8)
    low, high = cells["gcg"].corrected_interval
    assert low < 0.5 / 0.8 < high
    # among answers: the failures are refused, so all five answers succeed
    among = Errors(80, 20, 100, 0, among_answers=True)
    assert matrix(rows, errors=lambda attack: among)[0].corrected == pytest.approx(0.5)
    assert cells["persona"].corrected is None and cells["persona"].asr == 0.5


def test_attacks_on_other_labels_are_classes_of_their_own_on_the_plane():
    points = [point(f"b{i}", "a", float(i % 3), 0.0, i % 2 == 0) for i in range(6)]
    good = [dataclasses.replace(p, label="harmless", jailbroken=True) for p in points]
    rows = success_prediction(points + good, draws=20, resamples=20)
    assert {r["n"] for r in rows if r["class"] == POOLED and r["score"] == "H"} == {6}


# --- the number behind every figure ---------------------------------------------------------------
def test_a_displacement_says_on_how_many_behaviours_it_rests():
    points = [point(f"b{i}", "a", 1.0, 2.0, None) for i in range(4)]
    points = [
        dataclasses.replace(p, plain_x=0.0, plain_y=0.0) if i < 2 else p
        for i, p in enumerate(points)
    ]
    (row,) = describe_classes(points, resamples=20)
    assert (row["n"], row["displaced"]) == (4, 2) and row["displacement"] == [1.0, 2.0]
    header, line = classes_table([row]).splitlines()
    assert "pairs" in header and " 2 " in line


def evidence(points, **more):
    study = SimpleNamespace(spec="m", estimator="zhao")
    return SimpleNamespace(placed=lambda _: points, study=study, reading="read", **more)


def test_claim_13_rests_on_prompts_with_a_counterpart_and_an_outcome(monkeypatch):
    nulls = {name: np.linspace(-0.5, 0.5, 199) for name in "HR"}
    monkeypatch.setattr("study.claims.claim_13_suppression._nulls", lambda *_: nulls)
    rng = np.random.default_rng(0)
    zero = {"plain_x": 0.0, "plain_y": 0.0, "wrapper_x": 0.0, "wrapper_y": 0.0}
    points = [
        dataclasses.replace(
            point(f"b{b}", name, float(rng.normal()), float(rng.normal()), b < 4), **zero
        )
        for b in range(12)
        for name in "ab"
    ]
    replays = [
        dataclasses.replace(
            with_outcome(replay("a", p.behaviour_id, True, "m"), "complied", d=3 * p.x),
            artifact_id=p.prompt_id,
        )
        for p in points
    ]
    points.append(point("b19", "a", 0.0, 0.0, True))  # no plain request
    points.append(dataclasses.replace(points[0], attack="plain", prompt_id="plain"))
    claim = measure_13(evidence(points, replays=replays))
    h, r = claim.checks
    assert (h.n, r.n) == (12, 12) and "24 prompts" in claim.note
    assert h.outcome == "yes" and claim.verdict == "holds"  # one of the two is enough
    nulls["H"] = np.linspace(-1.0, 1.0, 199)  # permuted directions do as much
    assert measure_13(evidence(points, replays=replays)).checks[0].p >= 1 / 200
    few = measure_13(evidence(points, replays=replays[:10]))
    assert few.verdict == "undecided" and "5 behaviours only" in few.held_back[0]


def test_claim_12_is_about_attacks_less_their_wrappers():
    """Baselines are no classes, and what a harmless request in the wrapper shows is taken away."""
    rng = np.random.default_rng(1)
    points = []
    for shift, name in enumerate(("gcg", "persona", "initial_suffix", "plain")):
        for b in range(8):
            own = rng.normal(size=2)
            p = point(f"b{b}", name, 9.0 * shift + own[0], own[1], None)
            # all of what tells the classes apart is the wrapper's
            wrapper = {"wrapper_x": 9.0 * shift, "wrapper_y": 0.0}
            points.append(dataclasses.replace(p, plain_x=0.0, plain_y=0.0, **wrapper))
    claim = measure_12(evidence(points))
    less, goal, inst = claim.checks
    assert [c.n for c in claim.checks] == [8, 8, 8] and less.decides and not goal.decides
    assert goal.value == inst.value == 1.0 and goal.outcome == "yes"
    assert less.outcome == "unclear" and claim.verdict == "undecided"
    assert claim.note.startswith("gcg 8, persona 8")


@pytest.mark.parametrize(
    ("kind", "accepted", "refused", "says"),
    [("refusal", 4, 4, None), ("refusal", 3, 9, "3 harmful"), ("harm", 9, 9, "harc")],
)
def test_refusal_must_be_told_from_harmfulness(kind, accepted, refused, says):
    """A model that refuses what is harmful and nothing else has one contrast, not two."""
    harmful = [True] * 20 + [False] * 20
    own = [i >= accepted for i in range(20)] + [i < refused for i in range(20)]
    study = SimpleNamespace(refusal_kind=kind, harmful=harmful, refused=own)
    reasons = Evidence(study).confounded()
    assert [says in r for r in reasons] == ([True] if says else [])


def test_what_held_a_claim_back_is_said_beside_a_check_that_says_yes():
    yes = Check("an effect", 0.5, 0.4, 0.6, 0.0, "above", "share", 9, 0.01, 1.0, "by hand")
    table = claims_table([Claim(7, "t", "m", (yes,), held_back=("it refuses too little",))])
    assert "yes" in table and "held back: it refuses too little" in table


# --- D and success --------------------------------------------------------------------------------
def test_the_agreement_of_d_with_success_by_hand():
    rows = [
        with_outcome(replay("gcg", f"b{i}", False), "complied" if i < 4 else "refused", d=float(i))
        for i in range(8)
    ]
    rows.append(with_outcome(replay("gcg", "good", True), "complied", d=99.0))
    (row,) = agreements(rows, {"good": "harmless"})
    assert (row.n, row.successes, row.auroc) == (8, 4, 1.0)
    # ranks of D against 1, 1, 1, 1, 0, 0, 0, 0: Spearman is -4 / sqrt(21)
    assert row.correlation == pytest.approx(-4 / math.sqrt(21))


# --- weak contrast sets ---------------------------------------------------------------------------
def test_rounding_is_no_separation():
    same = torch.full((6, 3), 0.25)
    noise = same + torch.tensor([0.0, 1.5e-8, 3e-8])
    assert d_prime(same, noise).tolist() == [0.0, 0.0, 0.0]
    apart = d_prime(torch.tensor([1.0, 2.0, 3.0])[:, None], torch.tensor([0.0, 1.0, 2.0])[:, None])
    assert float(apart) == pytest.approx(1.0)


def directions(first, form, refused):
    vectors = torch.eye(2)
    separation = {"separation_harmfulness": torch.tensor([first, 2.0])}
    separation["null_permuted_separation_harmfulness"] = torch.tensor([0.2, 0.2])
    facts = {"form": form, "refused": {"harmful": refused, "harmless": [0, 10]}}
    return Directions(
        *("m", "harc", vectors, vectors, torch.ones(2), torch.ones(2), vectors, vectors, {}),
        separation,
        {"contrast": facts},
    )


@pytest.mark.parametrize(
    ("first", "form", "refused", "warnings"),
    [
        (0.0, 0.52, [9, 10], []),
        (3.3, 0.52, [9, 10], ["form"]),
        (0.0, 0.90, [9, 10], ["form"]),
        (0.0, 0.52, [2, 10], ["refuses 20%"]),
    ],
)
def test_a_weak_contrast_set_is_told(first, form, refused, warnings):
    facts, *told = contrast_notes(directions(first, form, refused))
    assert f"refuses {refused[0]} of 10 harmful" in facts and f"AUROC {form:.2f}" in facts
    assert len(told) == len(warnings)
    assert all(word in note for word, note in zip(warnings, told, strict=True))


def test_a_limit_is_spread_over_categories():
    rows = load_behaviours(label="harmful", splits=["test"])
    some = spread(rows, 24)
    assert len(some) == 24 and len({b.category for b in some}) == 12
    assert some == [b for b in rows if b in some] and spread(rows, None) == rows


# --- replies --------------------------------------------------------------------------------------
def test_replies_are_as_long_as_their_class_needs(tmp_path, qwen):
    config = ReplayConfig()
    assert config.of("plain").max_new_tokens == 64
    assert config.of("code_completion").max_new_tokens > config.of("persona").max_new_tokens > 64
    assert ReplayConfig(max_new_tokens=5).of("code_completion").max_new_tokens == 5
    with RunFolder(tmp_path) as run:
        attacked(run, "templates", TemplatesConfig(("persona",)), requests(1))
        stage = Transfer(run, ["rules"], ReplayConfig(max_new_tokens=2))
        assert {row["attack"] for row in run.rows(ATTACKS)} == {"persona", "plain"}
        assert len(stage.artifacts) == 2


def test_a_base_models_reply_ends_where_it_invents_a_next_turn():
    assert first_turn("Warm the pot.\nUser: And then?\nAssistant: Pour.") == "Warm the pot.\n"
    assert first_turn("Assistant: Warm the pot.") == " Warm the pot."


def test_the_length_of_replies_is_told_where_it_differs(tmp_path):
    with RunFolder(tmp_path) as run:
        attacked(run, "templates", TemplatesConfig(("persona",)), requests(1))
        add_plain_requests(run)
        (note,) = length_notes(artifacts_of(run), ReplayConfig())
        assert "128 for persona" in note and "64 for plain" in note
        assert length_notes(artifacts_of(run), ReplayConfig(max_new_tokens=9)) == []


def test_a_set_of_another_version_is_another_setting(tmp_path, tiny_folders):
    new, old = (DirectionsConfig(contrast=c) for c in ("demonstration", "demonstration-v1"))
    assert old.to_settings()["contrast"] == "demonstration"  # as earlier runs have it
    with RunFolder(tmp_path) as run:
        run.begin_stage("directions", old.to_settings(), {})
        with pytest.raises(AttackPlaneError, match="demonstration-v2"):
            run.begin_stage("directions", new.to_settings(), {})


def test_classes_of_earlier_versions_are_still_shown():
    points = [point(f"b{i}", "a", 1.0, 2.0, None) for i in range(3)]
    (row,) = describe_classes(
        [dataclasses.replace(p, plain_x=0.0, plain_y=0.0) for p in points], resamples=20
    )
    del row["displaced"]
    assert "+1.0" in classes_table([row])


def test_options_of_plain_requests_need_behaviours(tmp_path):
    args = ["transfer", "--run", str(tmp_path), "--target", "embedded", "--label", "harmless"]
    result = CliRunner().invoke(cli.cli, args)
    assert result.exit_code == 2 and "--behaviours" in result.output


def test_rows_of_earlier_versions_are_still_read():
    row = replay("gcg", "b", True).to_row()
    for name in ("outcome", "d", "log_odds"):
        del row[name]
    old = Replay.from_row(row)
    assert old.outcome is None and matrix([old])[0].refused == 0.0


def test_an_unreliable_direction_leaves_claim_2_undecided_and_says_why(
    tmp_path, tiny_folders, monkeypatch
):
    small = {"contrast": "demonstration-v1", "held_out": "demonstration-v1"}
    config = StudyConfig(**small, resamples=20, carrier_prompts=4, reply_tokens=2)
    nothing = CrossHalf(math.nan, np.full(20, math.nan), (0.05, 0.9), 1.0, 40)
    monkeypatch.setattr("study.claims.claim_02_orthogonality.cross_half", lambda *_: nothing)
    with RunFolder(tmp_path) as run:
        study = Study(run, ModelHandle(str(tiny_folders["qwen2"])), config)
        claim = measure_2(Evidence(study))
    assert claim.verdict == "undecided"
    assert "nan" not in claims_table([claim])
    assert any("too unreliable" in reason for reason in claim.held_back)
