"""Harmless requests in the wrappers of attacks."""

import dataclasses

import pytest
import torch

from core.errors import AttackPlaneError
from core.models import ModelHandle
from core.records import AttackArtifact
from core.store import RunFolder
from study.config import StudyConfig
from study.study import Study
from study.wrapped import by_behaviour, content_with, counterparts, wrapped


def artifact(behaviour, prompt):
    return AttackArtifact(
        artifact_id=f"a-{behaviour.behaviour_id}",
        behaviour_id=behaviour.behaviour_id,
        attack="persona",
        source_model="none",
        request=behaviour.request,
        prompt=prompt,
        suffix=None,
        suffix_ids=None,
        target_string="Sure",
        loss=None,
        loss_history=[],
        best_step=None,
        seed=0,
        config_hash="x",
        token_fidelity=None,
    )


@pytest.fixture
def study(tiny_folders, tmp_path):
    with RunFolder(tmp_path) as run:
        yield Study(run, ModelHandle(str(tiny_folders["qwen2"])), StudyConfig())


def test_each_attack_is_read_beside_its_matched_harmless_request(study):
    harmful = study.held_out("harmful")[:3]
    made = [artifact(b, f"You are Max. {b.request} Begin now.") for b in harmful]
    rewritten = artifact(harmful[0], "In the past, how was it done?")
    pairs = wrapped(study, [*made, rewritten])
    assert [a.artifact_id for a in pairs.artifacts] == [a.artifact_id for a in made]
    other = counterparts(study)
    assert [b.request for b in pairs.harmless] == [other[b.behaviour_id].request for b in harmful]
    assert all(b.pair_id == h.pair_id for b, h in zip(pairs.harmless, harmful, strict=True))
    # the counterpart is what the same model reads of the same wrapper
    again = dataclasses.replace(
        made[1],
        prompt=f"You are Max. {pairs.harmless[1].request} Begin now.",
        request=pairs.harmless[1].request,
    )
    by_hand = study.residuals(study.prompts_of([(again.prompt, None)]), "t_post_inst")[0]
    assert torch.allclose(pairs.counterpart["t_post_inst"][1], by_hand, atol=1e-4)
    # at t_goal nothing but the request differs
    moved = pairs.moved("t_goal", 2)
    assert moved.shape == (3, study.loaded.d_model) and float(moved.norm(dim=1).min()) > 0
    with pytest.raises(AttackPlaneError, match="no attack has a harmless counterpart"):
        wrapped(study, [rewritten])


def test_a_request_is_replaced_wherever_it_stands(study):
    b = study.held_out("harmful")[0]
    twice = artifact(b, f"{b.request}? {b.request}!")
    assert content_with(twice, "Brew tea") == "Brew tea? Brew tea!"
    assert content_with(artifact(b, "something else"), "Brew tea") is None


def test_behaviours_count_once():
    values = torch.tensor([1.0, 3.0, 5.0])
    assert by_behaviour(["a", "b", "a"], values) == [3.0, 3.0]
