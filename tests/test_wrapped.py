"""Harmless requests in the wrappers of attacks: on the plane, in its table, and for claims."""

import pytest
import torch
from click.testing import CliRunner

from attacks.templates import ATTACK, TemplatesConfig
from cli import cli
from core.errors import AttackPlaneError
from core.files import read_rows
from core.models import ModelHandle
from core.prompt import Conversation, Renderer
from core.store import RunFolder
from evaluation.behaviours import counterparts, load_behaviours
from geometry.activations import collect
from pipeline.campaign import Plan, baseline_plans, campaign
from pipeline.plane import PlaneConfig, PlaneStage
from pipeline.runs import artifacts_of
from study.wrapped import by_behaviour, wrapped


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, tiny_folders):
    """A run with two classes on three harmful requests, and the directions of a tiny model."""
    path, spec = tmp_path_factory.mktemp("attacked") / "run", str(tiny_folders["qwen2"])
    behaviours = load_behaviours("demonstration", label="harmful", splits=("test",))[:3]
    plan = Plan(ATTACK, TemplatesConfig(("persona", "encoding")))
    campaign(path, behaviours, [*baseline_plans(plan), plan])
    arguments = ["directions", "--run", path, "--model", spec, "--resamples", 20]
    arguments += ["--estimator", "harc"]
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return path, spec


def test_each_attack_is_read_beside_its_matched_harmless_request(attacked):
    path, spec = attacked
    with RunFolder(path) as run:
        stage = PlaneStage(run, [spec], PlaneConfig())
        model = ModelHandle(spec)
        reading = stage.read(model)
        pairs = wrapped(reading, artifacts_of(run), run)
        other = counterparts(list(run.behaviours().values()))
        with pytest.raises(AttackPlaneError, match="no attack has a harmless counterpart"):
            wrapped(reading, [], run)
    assert {a.attack for a in pairs.artifacts} == {"persona"}  # an encoded request has none
    assert {a.behaviour_id for a in pairs.artifacts} == set(pairs.behaviours)
    for a, b in zip(pairs.artifacts, pairs.harmless, strict=True):
        assert other[a.behaviour_id] == b and b.label == "harmless"
    # the counterpart is what the same model reads of the same wrapper, and so is the point
    a, b = pairs.artifacts[1], pairs.harmless[1]
    texts = [a.with_request(b.request), b.request]
    render = Renderer(model.loaded).render
    prompts = [
        render(Conversation.of_prompt(t, request=b.request, suffix=None, system=a.system_prompt))
        for t in texts
    ]
    read = collect(model.loaded, prompts, ["wrapped", "plain"])
    for position in ("t_goal", "t_inst", "t_post_inst"):
        assert torch.allclose(pairs.counterpart[position][1], read.at(position)[0], atol=1e-4)
    point = next(p for p in stage.points if p.prompt_id == a.artifact_id and p.frame == "own")
    direction = stage.frame.harmfulness[point.layer].double()
    moved = (read.at("t_inst")[0] - read.at("t_inst")[1])[point.layer].double() @ direction
    assert point.wrapper_x == pytest.approx(float(moved), abs=1e-4) and point.wrapper
    plain = next(p for p in stage.points if p.attack == "plain")
    assert plain.wrapper is None and plain.moved is None


def test_the_plane_is_read_at_the_request_and_tells_the_wrappers_share(attacked):
    path, spec = attacked
    arguments = ["plane", "--run", path, "--target", spec, "--position", "t_goal"]
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "wrapper alone H, R" in result.output and "no point at t_goal" in result.output
    rows = read_rows(path / "plane.jsonl")
    assert {r["position"] for r in rows} == {"t_goal"}
    assert all(r["x"] == r["x_t_goal"] for r in rows)
    classes = {(c["class"], c["frame"]): c for c in read_rows(path / "plane_classes.jsonl")}
    persona = classes["persona", "own"]
    share = persona["wrapper"][0] / persona["displacement"][0]
    assert persona["wrapper_share"][0] == pytest.approx(share)
    assert classes["plain", "own"]["wrapper"] is None
    assert ("encoding", "own") not in classes  # it does not hold the request


def test_behaviours_count_once():
    values = torch.tensor([1.0, 3.0, 5.0])
    assert by_behaviour(["a", "b", "a"], values) == [3.0, 3.0]
