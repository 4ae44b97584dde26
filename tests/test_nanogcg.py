"""nanogcg as a reference engine: its faults are named, ours do not have them, and a worker that
fails is a clear error."""

import dataclasses
import os
import sys

import pytest
import torch

from attacks import nanogcg
from attacks import nanogcg_engine as module
from attacks.gcg_search import run_gcg
from attacks.nanogcg import NanoGCGConfig
from attacks.nanogcg_engine import INTERPRETER, faults_of, older_config, reference, scored_ids
from attacks.objective import TargetLoss
from core.embedded import cache_folder
from core.errors import AttackPlaneError
from core.store import RunFolder
from tests.campaigns import attacked
from tests.test_gcg import SMALL, allowed_of, behaviours, slot_of

TINY = NanoGCGConfig(num_steps=6, search_width=12, topk=16, suffix_length=6)


def test_a_newer_config_keeps_its_rope_settings_in_the_older_form():
    newer = {
        "hidden_size": 8,
        "dtype": "float32",
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
    }
    assert older_config(newer) == {
        "hidden_size": 8,
        "torch_dtype": "float32",
        "rope_theta": 1e5,
        "rope_scaling": None,
    }
    scaled = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    assert older_config(scaled) == {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }


class Told:
    """Stands in for a worker: tells a loss and whether greedy decoding matches."""

    def __init__(self, loss, match):
        self.answer = {"loss": loss, "match": match}

    def ask(self, **request):
        return self.answer


def faults(told, *, reported=1.0, stopped=False, rendered=(1, 2, 3, 4), options=None):
    result = {
        "before_ids": [1],
        "after_ids": [3],
        "target_ids": [4],
        "best_loss": reported,
        "stopped": stopped,
    }
    return faults_of(
        told, result, scored := scored_ids(result, [2]), scored == rendered, options or {}, 1e-3
    )


def test_each_fault_of_a_result_is_named_with_its_evidence():
    assert faults(Told(1.0, True)) == []
    assert "ids" in faults(Told(1.0, True), rendered=(1, 9, 3, 4))[0]
    (fault,) = faults(Told(1.5, True))
    assert "best_loss does not belong" in fault and "1.5000" in fault
    assert (
        faults(Told(1.5, True), options={"use_mellowmax": True}) == []
    )  # no likelihood to compare
    early = {"early_stop": True}
    assert "does not match" in faults(Told(1.0, False), stopped=True, options=early)[0]
    assert faults(Told(1.0, True), stopped=True, options=early) == []
    assert faults(Told(1.0, False), stopped=False, options=early) == []


def worker(tmp_path, monkeypatch, body):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import json, sys\nfor line in sys.stdin:\n    request = json.loads(line)\n    {body}\n"
    )
    monkeypatch.setattr(module, "WORKER", script)
    monkeypatch.setenv(INTERPRETER, sys.executable)


def test_a_worker_that_dies_or_complains_is_an_error_that_says_so(tmp_path, qwen, monkeypatch):
    worker(tmp_path, monkeypatch, "sys.exit(7)")
    with pytest.raises(AttackPlaneError, match="exit status 7"), reference(qwen):
        pass
    worker(tmp_path, monkeypatch, "print(json.dumps({'error': 'no such model'}), flush=True)")
    with pytest.raises(AttackPlaneError, match="no such model"), reference(qwen):
        pass


def test_a_model_that_the_older_transformers_computes_otherwise_is_refused(
    tmp_path, qwen, monkeypatch
):
    worker(tmp_path, monkeypatch, "print(json.dumps({'loaded': {}, 'loss': 123.0}), flush=True)")
    with pytest.raises(AttackPlaneError, match="another loss"), reference(qwen):
        pass


def test_operations_of_a_step_are_counted_from_what_it_feeds(qwen):
    slot = slot_of(qwen)
    size = sum(p.numel() for p in qwen.model.parameters())
    fed = len(slot.initial_ids) + len(slot.after_ids) + len(slot.target_ids)
    cached, whole = {"search_width": 3}, {"search_width": 3, "use_prefix_cache": False}
    assert module.operations_of(slot, cached) == size * fed * (3 * 2 + 2 + 4)
    assert module.operations_of(slot, whole) == size * (fed + len(slot.before_ids)) * 12


def test_an_environment_that_cannot_be_made_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv(INTERPRETER, raising=False)
    monkeypatch.setenv("ATTACK_PLANE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "REQUIREMENTS", ("no such requirement",))
    monkeypatch.setattr(
        module.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1})
    )
    with pytest.raises(AttackPlaneError, match=INTERPRETER):
        module.interpreter()
    assert not (tmp_path / "nanogcg-0.3.0" / "complete").exists()


@pytest.mark.parametrize("at", [2, 8])  # in the middle, and only after the last step
def test_stopping_on_a_match_returns_the_suffix_that_matches(qwen, monkeypatch, at):
    slot = slot_of(qwen)
    config = dataclasses.replace(SMALL, num_steps=8, search_width=2, topk=400)
    seen = []
    run_gcg(
        TargetLoss(qwen, slot),
        slot,
        config,
        allowed_of(qwen),
        seed=2,
        on_step=lambda s: seen.append(s.suffix_ids),
    )
    wanted = seen[at - 1]

    def greedy(self, logits):
        return self.scorer._current.tolist() == wanted

    monkeypatch.setattr(TargetLoss, "_greedy", greedy)
    objective = TargetLoss(qwen, slot)
    config = dataclasses.replace(config, stop_on_match=True)
    state = run_gcg(objective, slot, config, allowed_of(qwen), seed=2)
    assert state.step == at and state.best_ids == wanted
    assert state.best_loss == pytest.approx(
        float(objective.losses(torch.tensor([wanted]))[0]), abs=1e-5
    )


def test_a_match_is_seen_where_greedy_decoding_gives_the_target(qwen):
    slot = slot_of(qwen)
    ids = [*slot.before_ids, *slot.initial_ids, *slot.after_ids]
    for _ in slot.target_ids:
        ids.append(int(qwen.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = tuple(ids[-len(slot.target_ids) :])
    suffix = torch.tensor(slot.initial_ids)
    for target, expected in ((greedy, True), ((*greedy[:-1], greedy[-1] ^ 1), False)):
        objective = TargetLoss(qwen, dataclasses.replace(slot, target_ids=target))
        objective.token_gradient(suffix)
        assert objective.matches is expected
        for path in ("packed", "cached", "plain"):
            other = TargetLoss(qwen, dataclasses.replace(slot, target_ids=target), path=path)
            other.share(suffix)
            assert other.matches is expected


@pytest.mark.parametrize("field", ["stop_loss", "momentum", "merge"])
def test_what_nanogcg_does_not_have_is_no_setting_of_it_and_options_are_checked(field):
    where = "nanogcg"
    with pytest.raises(AttackPlaneError, match=field):
        nanogcg.ATTACK.make_config({field: 1}, where=where)
    with pytest.raises(AttackPlaneError, match="buffer_size"):
        NanoGCGConfig(options={"buffersize": 3})


@pytest.mark.slow
def test_nanogcg_itself_makes_verified_artifacts_and_its_buffer_fault_is_found(
    tmp_path, tiny_models
):
    if not (cache_folder() / "nanogcg-0.3.0" / "complete").is_file() and not os.environ.get(
        INTERPRETER
    ):
        pytest.skip("nanogcg's environment is not there (python cli.py nanogcg makes it)")
    loaded = tiny_models["qwen2"]
    with RunFolder(tmp_path / "good") as run:
        config = dataclasses.replace(TINY, num_steps=3)
        artifacts = attacked(run, "nanogcg", config, behaviours(2), loaded, seed=1)
    made = [a for a in artifacts if a.attack == nanogcg.NAME]
    assert len(made) == 2
    for artifact in made:
        assert len(artifact.loss_history) == 4
        if artifact.token_fidelity:
            assert artifact.loss == pytest.approx(
                artifact.loss_history[artifact.best_step], abs=1e-4
            )
        else:
            assert any("ids" in fault for fault in artifact.faults)
    with RunFolder(tmp_path / "buffer") as run:
        # a random candidate is mostly worse than the initial suffix, which the buffer keeps; the
        # loss is the candidate's
        options = {"buffer_size": 1, "filter_ids": False}
        small = {"num_steps": 1, "search_width": 1, "topk": 300}
        config = dataclasses.replace(TINY, **small, options=options)
        made = attacked(run, "nanogcg", config, behaviours(6), loaded, seed=1)
        worse = [
            a for a in made if a.attack == nanogcg.NAME and a.loss_history[1] > a.loss_history[0]
        ]
        assert worse
        assert all(any("best_loss does not belong" in fault for fault in a.faults) for a in worse)
