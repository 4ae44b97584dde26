"""A tiny model that is trained here to refuse: carriers reopen it, and the commands tell the whole
story on it."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import cli
from core.files import read_rows
from core.models import ModelHandle, load
from core.prompt import Conversation, Renderer
from core.store import RunFolder
from evaluation.behaviours import load_behaviours
from evaluation.judges import Exchange, make_judge, outcomes
from evaluation.judges.reply_rules import is_degenerate
from evaluation.refusals import refusal_openings
from geometry.controls import Site, design, far_layer
from geometry.effects import differences
from geometry.interventions import ablation
from study.claims.registry import CLAIMS
from study.config import StudyConfig
from study.outcomes import measure
from study.replies import responses
from study.study import Study
from tests.conftest import make_model

SMALL = "demonstration-v1"
HELP = "Sure, here is a short plan for that, step by step."


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A four-layer Qwen2 trained on the demonstration requests: refusals after harmful ones, help
    after the others."""
    folder = make_model(tmp_path_factory.mktemp("refusing"), "qwen2")
    loaded = load(str(folder), "cpu")
    model, renderer = loaded.model, Renderer(loaded)
    refusal = refusal_openings(1)[0]
    rows, targets = [], []
    for b in load_behaviours(SMALL):
        reply = refusal if b.label == "harmful" else HELP
        prompt = renderer.render(Conversation.build(b.request), target=reply)
        ids = [*prompt.ids, *prompt.target_ids, *renderer.end_of_turn()]
        rows.append(ids)
        targets.append([-100] * len(prompt.ids) + ids[len(prompt.ids) :])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2 if "embed" in name else 0.4)
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    for step in range(320):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * (1 - step / 320)
        part = torch.randperm(len(rows), generator=g)[:48].tolist()
        longest = max(len(rows[i]) for i in part)
        ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in part])
        labels = torch.tensor([targets[i] + [-100] * (longest - len(rows[i])) for i in part])
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().requires_grad_(False)
    model.save_pretrained(folder)
    assert float(loss.detach()) < 0.1
    return str(folder)


CONFIG = StudyConfig(
    contrast=SMALL,
    held_out=SMALL,
    held_out_prompts=16,
    resamples=40,
    carrier_prompts=6,
    carrier_every=1,
    reply_tokens=24,
    refusals=1,
)


def test_the_trained_model_refuses_what_is_harmful_and_a_study_finds_what_it_hangs_on(
    refusing, tmp_path
):
    with RunFolder(tmp_path) as run:
        study = Study(run, ModelHandle(refusing), CONFIG)
        assert study.refusal_rate > 0.9 and study.estimator == "zhao"
        carrier = study.carrier("R")
        edit = ablation("R", carrier.vector[None], range(study.loaded.n_layers + 1))
        rows = measure(study, [edit], study.held_out("harmful")[:8], 24, "test")
        alone = [r for r in rows if r["mode"] == "none"]
        ablated = [r for r in rows if r["mode"] == "R"]
        assert sum(r["refused"] for r in alone) >= 6
        assert sum(r["d"] for r in ablated) < sum(r["d"] for r in alone) - 8 * 0.1
        assert all(r["kl"] == pytest.approx(0, abs=1e-5) for r in alone)
        replies = responses(study)
        assert not replies.forced and replies.refusal_paper.size >= 4
        lines = len(read_rows(tmp_path / "measured.jsonl"))
        # the same again is read, not run
        again = Study(run, ModelHandle(refusing), CONFIG)
        assert again.carrier("R").to_row() == study.carrier("R").to_row()
        assert measure(again, [edit], again.held_out("harmful")[:8], 24, "test") == rows
        assert len(read_rows(tmp_path / "measured.jsonl")) == lines


def command(*args):
    """A command on the small set, where it does not name another."""
    options = {"claims": 3, "intervene": 3, "layers": 3, "directions": 1}.get(args[0], 0)
    small = ["--contrast", SMALL, "--held-out", SMALL, "--prompts", 16]
    args = [*args, *small[: 2 * options]]
    result = CliRunner().invoke(cli.cli, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def claimed(refusing, tmp_path_factory):
    """A run folder in which all claims were measured on that model, and what the command said."""
    path = tmp_path_factory.mktemp("claimed")
    few = ["--controls", 2, "--resamples", 40]
    return path, command("claims", "--run", path, "--model", refusing, *few)


def test_all_claims_are_measured_on_it_by_one_command(refusing, claimed):
    tmp_path, output = claimed
    rows = read_rows(tmp_path / "claims.jsonl")
    assert [r["number"] for r in rows] == sorted(map(int, CLAIMS.all()))
    assert {r["verdict"] for r in rows} <= {"holds", "refuted", "undecided"}
    first = rows[0]
    assert len(first["checks"]) == 5 and "held-out harmful prompts" in first["note"]
    assert first["checks"][0]["p"] >= 1 / 3  # the rank among two controls of each kind
    for row in rows:
        for check in row["checks"]:
            assert 0 < check["p"] <= 1 and check["test"] and check["n"] > 0
    coupling = rows[1]["settings"]["coupling"]
    assert {"C_cos", "C_sub", "C_layer", "HRCI v1", "HRCI v2"} < set(coupling)
    for name, of in coupling.items():
        low, high = of["interval"] or (of["value"], of["value"])
        assert low <= of["value"] <= high or "rank" in name  # of few rows a bootstrap has less
    assert "15. Directions at prompt and response positions agree" in output
    assert (tmp_path / "claims.png").stat().st_size > 10_000
    # nothing is measured twice, and a subset of the claims gives the same numbers
    lines = len(read_rows(tmp_path / "measured.jsonl"))
    command(
        "claims",
        "--run",
        tmp_path,
        "--model",
        refusing,
        "--controls",
        2,
        "--resamples",
        40,
        "--claims",
        "2,7",
    )
    assert len(read_rows(tmp_path / "measured.jsonl")) == lines
    assert read_rows(tmp_path / "claims.jsonl") == rows


def test_a_dry_run_tells_the_work_and_keeps_nothing(tiny_folders, tmp_path):
    model = ["--run", tmp_path / "run", "--model", str(tiny_folders["qwen2"]), "--controls", 2]
    output = command("claims", *model, "--dry-run")
    for work in ("own replies", "controls, searched", "reply inversion", "replies to attacked"):
        assert work in output
    # three kinds of two controls, of each the KL of four candidates on eight prompts
    assert "192 row" in output and "minutes; what the run has" in output
    assert not (tmp_path / "run").exists()
    fewer = command("claims", *model, "--dry-run", "--claims", 21)
    assert "reply inversion" not in fewer and "controls, searched" not in fewer


def test_without_a_run_folder_the_commands_share_one_of_their_own(
    tiny_folders, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_folders["qwen2"]), "--controls", 2, "--resamples", 20]
    output = command("claims", *model, "--claims", 2)
    command(
        "intervene",
        *model,
        "--mode",
        "R",
        "--limit",
        1,
        "--label",
        "harmful",
        "--max-new-tokens",
        2,
    )
    folders = list((tmp_path / "runs").iterdir())
    assert (
        len(folders) == 1
        and folders[0].name.startswith("study-")
        and str(folders[0].name) in output
    )
    assert (folders[0] / "claims.jsonl").exists() and (folders[0] / "interventions.jsonl").exists()


def test_layers_leaves_the_directions_of_a_run_as_they_were(tiny_folders, tmp_path):
    model = ["--run", tmp_path, "--model", tiny_folders["qwen2"]]
    command("directions", *model, "--estimator", "harc", "--resamples", 20)
    files = {path: path.read_bytes() for path in (tmp_path / "directions").iterdir()}
    command("layers", *model, "--resamples", 30)
    assert files == {path: path.read_bytes() for path in (tmp_path / "directions").iterdir()}
    with pytest.raises(AssertionError, match=r"directions\.resamples: the run has 20"):
        command("directions", *model, "--estimator", "harc", "--resamples", 30)


def test_a_judge_sees_the_target_and_may_not_know(tiny_folders, tmp_path):
    with RunFolder(tmp_path) as run:
        config = replace(CONFIG, judge="target_prefix")
        study = Study(run, ModelHandle(str(tiny_folders["qwen2"])), config)
        first, second = study.held_out("harmful")[:2]
        said = study.outcomes([(first, f"{first.target_string} and so on"), (second, "I cannot")])
        assert said == ["complied", "refused"]
    rows = [{"behaviour_id": n, "complied": c} for n, c in (("a", 1), ("b", None), ("c", 0))]
    alone = [{"behaviour_id": n, "complied": 0} for n in "abc"]
    assert differences(rows, alone, "complied") == {"a": 1.0, "c": 0.0}


def test_replies_are_made_only_where_the_estimator_depends_on_them(
    tiny_folders, tmp_path, monkeypatch
):
    made = lambda *_, **__: pytest.fail("replies were made")  # noqa: E731
    monkeypatch.setattr("pipeline.contrast_reading.complete", made)
    with RunFolder(tmp_path) as run:
        config = replace(CONFIG, estimator="harc")
        study = Study(run, ModelHandle(str(tiny_folders["qwen2"])), config)
        assert study.estimator == "harc" and study.refusal_kind == "harm"


def test_layers_and_intervene_on_two_models(refusing, claimed, tiny_folders):
    tmp_path = claimed[0]  # replies and directions are there
    other = str(tiny_folders["qwen2"])
    output = command(
        "layers", "--run", tmp_path, "--model", refusing, "--model", other, "--resamples", 40
    )
    for name in (
        "layer by criterion",
        "separation",
        "arditi",
        "reliability by sample size",
        "across models",
    ):
        assert name in output
    selection = read_rows(tmp_path / "layers_selection.jsonl")
    assert [s["model"] for s in selection] == [refusing, other]
    assert {"eq6_prompt", "separation", "arditi"} <= set(selection[0]["layers"])
    # the toy was taught one opening: an ablation that was chosen on others may leave no replies
    assert "eq6_paper" in selection[0]["layers"] or "no eq6" in selection[0]["note"]
    field = read_rows(tmp_path / "layers_field.jsonl")
    assert {r["position"] for r in field} >= {"t_goal", "t_inst", "-1", "-2"}
    assert {r["kind"] for r in field if r["model"] == refusing} == {
        "harmful - harmless",
        "refused - accepted",
    }
    across = read_rows(tmp_path / "layers_across.jsonl")
    assert {r["direction"] for r in across} == {"H", "R"} and all(
        abs(r["cosine"]) <= 1 for r in across
    )
    output = command(
        "intervene",
        "--run",
        tmp_path,
        "--model",
        refusing,
        "--mode",
        "R",
        "--mode",
        "H+R",
        "--strength",
        0.5,
        "--strength",
        1,
        "--controls",
        2,
        "--limit",
        3,
        "--max-new-tokens",
        6,
    )
    assert "ablate H+R 0.5" in output and (tmp_path / "interventions.png").exists()
    rows = read_rows(tmp_path / "interventions.jsonl")
    assert {r["kind"] for r in rows} == {
        "none",
        "intervention",
        "random",
        "matched",
        "wrong_layer",
        "wrong_position",
    }
    assert all("reply" not in r for r in rows)
    for r in rows:
        own = [
            o
            for o in rows
            if (o["behaviour_id"], o["mode"], o["strength"], o["kind"])
            == (r["behaviour_id"], r["mode"], r["strength"], "intervention")
        ]
        if r["kind"] == "matched":
            assert r["delta_norm"] == pytest.approx(own[0]["delta_norm"], rel=1e-4)
    output = command(
        "intervene",
        "--run",
        tmp_path,
        "--model",
        refusing,
        "--operation",
        "steer",
        "--mode",
        "R",
        "--sweep",
        "--controls",
        2,
        "--limit",
        2,
        "--label",
        "harmless",
        "--max-new-tokens",
        4,
    )
    summary = [
        r for r in read_rows(tmp_path / "interventions_summary.jsonl") if r["outcome"] == "refusal"
    ]
    assert [r["strength"] for r in summary] == [-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0]
    zero = next(r for r in summary if r["strength"] == 0)
    assert zero["change"] == pytest.approx(0, abs=1e-6) and zero["delta_norm"] == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["claims", "--claims", "3"], "no such claim here"),
        (["claims", "--claims", "one"], "expected numbers"),
        (["intervene", "--layers", "99"], "no such layer"),
        (["intervene", "--layers", "a"], "expected layers"),
        (["intervene", "--where", "nowhere"], "unknown position"),
        (["layers", "--model", "no-such"], "not a model spec"),
        (["claims", "--claims", "1", "--contrast", "no.csv"], "no.csv"),
        (
            ["layers", "--estimator", "zhao", "--contrast", SMALL],
            "too few replies for the zhao estimator",
        ),
    ],
)
def test_bad_input_is_told_with_a_remedy(args, says, tiny_folders, tmp_path):
    model = [] if "no-such" in args else ["--model", str(tiny_folders["qwen2"])]
    result = CliRunner().invoke(cli.cli, [*args, "--run", str(tmp_path), *model])
    assert result.exit_code in (1, 2) and says in result.output, result.output


def test_held_out_prompts_must_not_be_among_the_contrast_prompts(refusing, tmp_path):
    result = CliRunner().invoke(
        cli.cli,
        [
            "claims",
            "--run",
            str(tmp_path),
            "--model",
            refusing,
            "--claims",
            "1",
            "--contrast",
            SMALL,
            "--held-out",
            str(write_all(tmp_path)),
        ],
    )
    assert result.exit_code == 1 and "held-out prompts are among" in result.output


def write_all(folder):
    path = folder / "all.jsonl"
    rows = [
        {"goal": b.request, "label": b.label}
        for b in load_behaviours(SMALL)
        if b.label != "pseudo_harmful"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- designs and outcomes -------------------------------------------------------------------------
def test_a_design_holds_its_intervention_and_all_its_controls():
    h, r, other = torch.eye(8)[:3]
    site = Site(
        (h, r), {"wrong_layer": (other, h), "wrong_position": (r, other)}, (0, 1, 2), (), length=5.0
    )
    found = design("R", "ablate", 1.0, site, controls=2, seed=0)
    assert [e.kind for e in found] == [
        "intervention",
        "random",
        "random",
        "matched",
        "matched",
        "wrong_layer",
        "wrong_position",
    ]
    assert (
        torch.equal(found[0].read[0], r)
        and torch.equal(found[5].read[0], h)
        and torch.equal(found[6].read[0], other)
    )
    assert all(e.follows is found[0] for e in found[3:5])
    steered = design("H+R", "steer", 2.0, site, controls=2, seed=0)
    assert torch.allclose(steered[0].shift, 10.0 * (h + r) / 2**0.5) and steered[0].strength == 2.0
    assert all(e.shift.norm() == pytest.approx(10.0, rel=1e-5) for e in steered)
    one = design(
        "R", "steer", 1.0, Site((h, r), {"wrong_layer": (other, h)}, (3,), (7,)), controls=2, seed=0
    )
    moved = one[-1]
    assert (
        moved.kind == "wrong_layer"
        and moved.layers == (7,)
        and torch.equal(moved.shift, one[0].shift)
    )
    # other modes of a seed have the same random directions
    again = design("H", "ablate", 1.0, site, controls=2, seed=0)
    assert torch.equal(again[1].read, found[1].read)
    assert far_layer(3, 30) == 18 and far_layer(19, 30) == 4


def test_degenerate_replies_are_told_from_text():
    assert is_degenerate("") and is_degenerate("1 2 3 4 !!! ###") and is_degenerate("tea cup " * 12)
    assert not is_degenerate("Sure.") and not is_degenerate(HELP)
    assert not is_degenerate(
        "First, boil the water. Then pour it over the leaves and wait for four minutes."
    )
    replies = ["I'm sorry, but no.", HELP, " ", "tea cup " * 12]
    said = outcomes(make_judge("refusal_phrases"), [Exchange("r", reply) for reply in replies])
    assert said == ["refused", "complied", "neither", "complied"]
    assert outcomes(make_judge("rules"), [Exchange("r", r) for r in replies])[3] == "neither"
