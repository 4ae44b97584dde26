"""Coupling and drift against planted angles; checkpoints over steps by one command."""

import json
import math
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

import cli
from core.cards import write_card
from core.files import read_rows
from core.models import load
from evaluation.behaviours import load_behaviours
from geometry.beliefs import beliefs, told_rightly
from geometry.contrasts import between
from geometry.controls import Site, design
from plots import checkpoints_png, interventions_png
from plots.checkpoints_png import methods
from study.behaviour_state import behaviour_state
from study.causal_sweep import slopes
from study.coupling import coupling, draw_fields, drift

PAIRS, LAYERS, D = 60, 4, 24
E = torch.eye(D)


def planted(axes_h, axes_r, noise=0.1, seed=0):
    """A model whose fields differ along these axes, one layer after the other.

    ``axes_*``: (layer, d_model) differences of class means of H at t_inst and R at -1.
    """
    generator = torch.Generator().manual_seed(seed)

    def contrast(axes):
        sides = noise * torch.randn(2, PAIRS, LAYERS, D, generator=generator)
        return between(sides[0] + axes, sides[1])

    fields = {"H": {"t_inst": contrast(axes_h)}, "R": {"-1": contrast(axes_r)}}
    carriers = {"H": SimpleNamespace(position="t_inst", layer=1)}
    carriers["R"] = SimpleNamespace(position="-1", layer=3)
    return SimpleNamespace(
        field=fields.__getitem__,
        carrier=carriers.__getitem__,
        loaded=SimpleNamespace(d_model=D),
        config=SimpleNamespace(seed=0),
    )


def turned(axes, degrees, into):
    """Every row turned by an angle towards another one, orthogonal to it."""
    angle = math.radians(degrees)
    return math.cos(angle) * axes + math.sin(angle) * into


def test_a_coupling_that_falls_by_construction_is_measured_as_falling():
    h = E[0].expand(LAYERS, D)
    found = []
    for degrees in (30, 60, 85):
        model = planted(h, turned(h, degrees, E[1].expand(LAYERS, D)))
        found.append(coupling(model, draw_fields([model], 60, 0)))
        c_cos = found[-1]["C_cos"]
        assert c_cos.value == pytest.approx(math.cos(math.radians(degrees)), abs=0.06)
        assert c_cos.interval[0] < math.cos(math.radians(degrees)) < c_cos.interval[1]
        assert found[-1]["C_layer"].value == math.exp(-0.5)  # layers 1 and 3
        v1, v2 = found[-1]["HRCI v1"].value, found[-1]["HRCI v2"].value
        c_sub = found[-1]["C_sub"].value
        assert v1 == pytest.approx(0.4 * c_cos.value + 0.4 * c_sub + 0.2 * math.exp(-0.5))
        assert v2 == pytest.approx(0.5 * c_cos.value + 0.5 * c_sub)
    assert found[0]["C_cos"].interval[0] > found[1]["C_cos"].interval[1]
    assert found[1]["C_cos"].interval[0] > found[2]["C_cos"].interval[1]
    assert found[0]["C_cos"].value > found[0]["C_cos"].null_permuted > found[2]["C_cos"].value
    assert found[0]["effective rank of H"].value == pytest.approx(1.0, abs=0.2)


def test_a_rotation_by_a_known_angle_gives_that_drift():
    axes = 3 * torch.stack([E[0], E[1], E[2], E[0]])
    into = 3 * torch.stack([E[5], E[6], E[7], E[5]])
    reference = planted(axes, axes, noise=0.05)
    for degrees in (0, 20, 70):
        model = planted(turned(axes, degrees, into), axes, noise=0.05, seed=1)
        found = drift(draw_fields([model, reference], 40, 0), layer=2)
        assert found["drift of H"].value == pytest.approx(degrees, abs=2.5)
        assert found["drift of R"].value < 2.5
        cosine = found["cosine of H with the reference's"]
        true = math.cos(math.radians(degrees))
        assert cosine.value == pytest.approx(true, abs=0.02)
        assert cosine.interval[0] - 1e-3 <= true <= cosine.interval[1] + 1e-3
    same = drift(draw_fields([reference, reference], 40, 0), layer=2)
    assert same["drift of H"].value < 0.1  # arc cosines of rounded ones


def test_beliefs_by_hand():
    contrast = between(E[0].expand(3, 13, D), E[1].expand(3, 13, D))
    resid = torch.stack([2 * E[0], E[1], E[0] + E[1], E[2]])[:, None].expand(4, 13, D)
    expected = [1.0, -1.0, 0.0, 0.0]
    assert beliefs(contrast, resid).tolist() == pytest.approx(expected)
    right = told_rightly(torch.tensor([0.2, -0.1]), torch.tensor([-0.3, 0.4]))
    assert right.tolist() == [0.5, -0.5]


def test_slopes_by_hand():
    def rows(kind, slope, draws=1):
        return [
            {"label": "harmful", "mode": "R", "kind": kind, "strength": s, "behaviour_id": b}
            | {"draw": n, "d": offset + slope * s + (100 if abs(s) > 1 else 0)}
            for s in (-2.0, -1.0, 0.0, 1.0, 2.0)
            for b, offset in (("a", 0.0), ("b", 3.0))
            for n in range(draws)
        ]

    every = rows("intervention", 0.5) + rows("matched", 0.1, 2)
    found = {name: values for name, values in slopes(every) if values}
    assert found["slope of D by R, harmful"] == pytest.approx([0.5, 0.5])
    assert found["slope of D by R, harmful, beyond controls"] == pytest.approx([0.4, 0.4])


def test_controls_of_a_sweep_push_to_both_sides():
    site = Site((E[0], E[1]), {}, (3,), (), length=5.0)
    pushed = {
        s: design("R", "steer", s, site, controls=1, seed=0)[1].shift for s in (-1.0, 0.0, 1.0)
    }
    assert torch.equal(pushed[-1.0], -pushed[1.0]) and not pushed[0.0].any()
    assert pushed[1.0].norm() == pytest.approx(5.0)


def test_ways_of_training_are_told_apart_and_seeds_joined():
    rows = [
        {"arm": arm, "method": method}
        for arm, method in ((None, None), ("sft", "a"), ("harc", "b"), ("sft", "a"), ("harc", "c"))
    ]
    assert methods(rows) == {("sft", "a"): "sft", ("harc", "b"): "harc 1", ("harc", "c"): "harc 2"}


def test_the_behaviour_of_a_changed_checkpoint_is_left_out():
    cell = {"none": 0.5, "full": 0.25, "refused_wilson": [0.3, 0.7], "full_wilson": [0.1, 0.5]}
    rate = {"asr": 0.2, "wilson": [0.1, 0.4], "behaviours": 8}
    rate |= {"corrected": 0.15, "corrected_interval": [0.0, 0.3]}
    row = {
        "model": "m",
        "fingerprint": "f",
        "robustness": {"fixed": rate, "adaptive": rate | {"asr": None}},
        "usability": {"harmless": cell | {"n": 12, "d": -0.4}},
        "kl": 0.1,
        "instructions": 0.3,
        "instructions_wilson": [0.2, 0.4],
        "instructions_n": 120,
    }
    notes = []
    state = {r["measure"]: r["value"] for r in behaviour_state(row, "f", notes)}
    assert state == {
        "ASR fixed": 0.2,
        "ASR fixed, corrected": 0.15,
        "instructions": 0.3,
        "refused, harmless": 0.5,
        "refused in full, harmless": 0.25,
        "D, harmless": -0.4,
        "kl": 0.1,
    }
    assert behaviour_state(row, "g", notes) == [] and "has changed" in notes[0]
    assert behaviour_state(None, "f", notes) == [] and len(notes) == 1


def adapter(model, folder, seed):
    """A LoRA folder with random weights."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(load(str(model), "cpu").model, config).save_pretrained(folder)
    return folder


def few_pairs(folder):
    """Twelve pairs of requests for directions, four others."""
    by_label = {
        label: load_behaviours("demonstration-v1", label=label) for label in ("harmful", "harmless")
    }
    paths = []
    for name, part in (("contrast", slice(0, 12)), ("held_out", slice(12, 16))):
        rows = [
            {"goal": b.request, "label": label}
            for label, behaviours in by_label.items()
            for b in behaviours[part]
        ]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_checkpoints_are_measured_by_one_command_and_once(tiny_folders, tmp_path, monkeypatch):
    folder = adapter(tiny_folders["qwen2"], tmp_path / "step-5", seed=5)
    write_card(folder, {"arm": "sft", "step": 5, "seed": 0, "method": "m", "trained_on": []})
    spec = f"{tiny_folders['qwen2']}+{folder}"
    run = tmp_path / "run"
    args = ["trajectory", "--run", run, "--reference", tiny_folders["qwen2"], "--resamples", 20]
    contrast, held_out = few_pairs(tmp_path)
    args += ["--contrast", contrast, "--held-out", held_out, "--prompts", 4]
    args += ["--model", spec]
    args += ["--sweep", "--anchors", spec]
    result = CliRunner().invoke(cli.cli, list(map(str, args)))
    assert result.exit_code == 0, result.output
    rows = read_rows(run / "trajectory.jsonl")
    assert [r["step"] for r in rows if r["measure"] == "C_cos"] == [0, 5]
    drifts = [r["value"] for r in rows if r["measure"] == "drift of H"]
    assert drifts[0] < 0.1 < drifts[1]
    families = {r["family"] for r in rows}
    measured = {"carriers", "leaning", "coupling", "rank", "drift", "beliefs", "plane", "cosines"}
    assert families == measured | {"change", "slope"}
    assert (run / "trajectory_sweep_2.png").stat().st_size > 10_000
    anchors = read_rows(run / "trajectory_anchors.jsonl")
    assert [a["published"] for a in anchors] == [True, True, False]
    assert 0 <= anchors[2]["R-H"] <= 1 and 0 <= anchors[2]["angle"] <= 180 and anchors[2]["n"] == 4
    outside = [r for r in rows if r["measure"] == "share outside H-R"]
    assert len(outside) == 1 and all(0 < r["low"] <= r["value"] <= r["high"] <= 1 for r in outside)
    for family in families:
        assert (run / f"trajectory_{family}.png").stat().st_size > 5_000
    assert len(pq.read_table(run / "trajectory.parquet")) == len(rows)
    lines = (run / "measured.jsonl").read_text().splitlines()
    monkeypatch.setattr(checkpoints_png, "draw", lambda path: [])  # pictures take most of it
    monkeypatch.setattr(interventions_png, "draw_each", lambda path, name: [])
    again = CliRunner().invoke(cli.cli, list(map(str, args)))
    assert again.exit_code == 0 and read_rows(run / "trajectory.jsonl") == rows
    assert (run / "measured.jsonl").read_text().splitlines() == lines
    assert [json.loads(line)["what"] for line in lines].count("trajectory") == 2
    adapter(tiny_folders["qwen2"], folder, seed=6)  # the same spec, other weights
    refused = CliRunner().invoke(cli.cli, list(map(str, args)))
    assert refused.exit_code == 1 and spec in refused.output and "remedy" in refused.output
    assert read_rows(run / "trajectory.jsonl") == rows
