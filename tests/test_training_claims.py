"""Claims about trainings on made-up measures: each holds, is refuted, or is held back."""

import math
from dataclasses import replace

import pytest
from click.testing import CliRunner

import cli
from study.training_claims.evidence import ABOVE, BELOW, WITHIN, difference, level, trainings_of
from study.training_claims.registry import TRAINING_CLAIMS
from study.trajectory import training_claims


def row(measure, value, step, arm="sft", *, half=0.02, n=24, seed=0, variant="", null=None):
    """One row of ``trajectory``; ``half`` the width of its interval."""
    known = half is not None
    return {
        "model": f"{arm}-{step}",
        "arm": arm,
        "seed": seed,
        "method": f"{arm}{variant}",
        "variant": variant,
        "common": "same",
        "step": step,
        "measure": measure,
        "value": value,
        "low": value - half if known else None,
        "high": value + half if known else None,
        "null_random": null,
        "null_permuted": null,
        "unit": "",
        "n": n,
    }


def reference(measure, value, **more):
    return row(measure, value, 0, None, **more) | {"model": "base"}


def verdict(number, rows, predictions=()):
    """Of the first training of the claim's arms, without Holm's correction."""
    base = [] if rows[0]["model"] == "base" else [reference("nothing", 0.0)]
    every = training_claims([*base, *rows], predictions)
    return next(replace(c, holm=None) for c in every if c.number == number)


def course(arm, **ends):
    """Rows of two checkpoints: measure -> (first, last)."""
    names = {"asr": "ASR fixed", "over": "refused, pseudo_harmful", "hrci": "HRCI v2"}
    names |= {"follows": "instructions", "rank": "effective rank of R, rows of unit length"}
    names |= {"raw": "effective rank of R", "drift": "drift of R", "adaptive": "ASR adaptive"}
    names |= {"sub": "C_sub", "gcg": "ASR gcg"}
    return [
        row(names[name], value, step, arm)
        for name, values in ends.items()
        for step, value in zip((50, 500), values, strict=True)
    ]


def test_a_difference_is_tested_in_both_directions_by_hand():
    a, b = row("m", 0.3, 1, half=0.196), row("m", 0.1, 2, half=0.196)
    check = difference("d", a, b, claimed=ABOVE)
    z = 0.2 / math.hypot(0.1, 0.1)
    assert check.p == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))
    assert check.p_against == pytest.approx(1 - check.p) and check.n == 24
    assert difference("d", b, a, claimed=BELOW).p == pytest.approx(check.p)
    assert level("l", a, claimed=ABOVE, threshold=0.0).p == pytest.approx(0.00135, abs=1e-4)
    close = difference("d", a, a, claimed=WITHIN, threshold=0.5)
    assert close.outcome == "yes"
    assert difference("d", a, b, claimed=WITHIN, threshold=0.01).outcome == "unclear"
    far = row("m", 2.0, 3, half=0.1)
    assert difference("d", far, a, claimed=WITHIN, threshold=0.5).outcome == "no"
    few = difference("d", row("m", 1, 1, n=6), row("m", 0, 2, n=6), claimed=ABOVE)
    assert few.outcome == "unclear"  # six units decide nothing
    bare = difference("d", row("m", 1, 1, half=None), row("m", 0, 2, half=None), claimed=ABOVE)
    assert bare.outcome == "unclear" and bare.value == 1


def test_claim_3_needs_all_four_movements():
    published = course(
        "r2d2", sub=(0.4, 0.1), hrci=(0.4, 0.1), asr=(0.0, 0.25), over=(1.0, 0.2), follows=(0, 0.5)
    )
    assert verdict(3, published).verdict == "holds"
    other = course(
        "r2d2", sub=(0.4, 0.1), hrci=(0.4, 0.1), asr=(0.25, 0.0), over=(1.0, 0.2), follows=(0, 0.5)
    )
    assert verdict(3, other).verdict == "refuted"
    missing = verdict(3, course("r2d2", sub=(0.4, 0.1)))
    assert missing.verdict == "undecided" and "no 'ASR fixed'" in missing.held_back[0]


def test_claim_4_compares_with_permuted_labels_and_the_reference():
    low = [row("C_sub", 0.01, s, null=0.1) for s in (50, 500)]
    asr = [reference("ASR fixed", 0.2), *course("sft", asr=(0.5, 0.6))]
    assert verdict(4, asr + low).verdict == "holds"
    high = [row("C_sub", 0.3, s, null=0.1) for s in (50, 500)]
    assert verdict(4, asr + high).verdict == "refuted"


def test_claims_8_to_11_on_one_training():
    moved = [row(f"layer of {k}", v, s, half=None) for k in "HR" for s, v in ((50, 25), (500, 7))]
    assert verdict(8, moved).verdict == "undecided"  # one search per checkpoint decides nothing
    assert verdict(8, moved).checks[0].value == -18
    assert verdict(9, course("sft", rank=(40.0, 40.5), raw=(10, 7))).verdict == "holds"
    assert verdict(9, course("sft", rank=(40.0, 20.0), raw=(10, 10))).verdict == "refuted"
    drifted = course("sft", drift=(5.0, 30.0), asr=(0.4, 0.42))
    assert verdict(10, drifted).verdict == "holds"
    robust = course("sft", drift=(5.0, 30.0), asr=(0.6, 0.1))
    assert verdict(10, robust).verdict == "refuted"
    same = course("sft", drift=(5.0, 5.001), asr=(0.4, 0.42))
    assert "surely drifted" in verdict(10, same).held_back[0]
    safe = course("sft", drift=(5.0, 30.0), asr=(0.0, 0.01))
    assert "no attack succeeds" in verdict(10, safe).held_back[0]
    attacked = course("sft", adaptive=(0, 0.7), gcg=(0, 0.1), asr=(0, 0.1))
    assert verdict(11, attacked).verdict == "holds"
    few = [row("ASR adaptive", 0.7, 500, n=6), row("ASR gcg", 0.1, 500), row("ASR fixed", 0.1, 500)]
    assert verdict(11, few).verdict == "undecided"


def test_claims_16_and_18_look_for_the_control_training():
    real = [
        row(f"harmful with {k}", v, s, "harc") for k in "HR" for s, v in ((50, 0.2), (500, 0.6))
    ]
    before = [reference(f"harmful with {k}", 0.1) for k in "HR"]
    held = verdict(16, before + real)
    assert held.verdict == "undecided" and "directions=permuted" in held.held_back[0]

    def control(value):
        own = {"variant": "directions=permuted"}
        return [row(f"harmful with {k}", value, s, "harc", **own) for k in "HR" for s in (50, 500)]

    assert verdict(16, before + real + control(0.3)).verdict == "holds"
    assert verdict(16, before + real + control(0.9)).verdict == "refuted"
    # a control is told no claim about HARC, and a training of other settings is no control
    names = [c.model for c in training_claims(before + real + control(0.3), []) if c.number == 16]
    assert names == ["harc, seed 0 (harc)"]
    other = [r | {"common": "other"} for r in control(0.3)]
    assert verdict(16, before + real + other).verdict == "undecided"
    both = course("harc", over=(0.2, 0.2))
    single = [
        row("refused, pseudo_harmful", 0.5, s, "harc", variant="positions=t_inst")
        for s in (50, 500)
    ]
    assert verdict(18, both + single).verdict == "holds"


def test_claims_17_and_19_on_harc():
    before = [reference("ASR fixed", 0.4), reference("refused, pseudo_harmful", 0.1)]
    assert verdict(17, before + course("harc", asr=(0.1, 0.1), over=(0.1, 0.1))).verdict == "holds"
    costly = before + course("harc", asr=(0.1, 0.1), over=(0.3, 0.5))
    assert verdict(17, costly).verdict == "refuted"

    def change(arm, share, kl):
        return [
            row("share outside H-R", share, 500, arm, null=0.99),
            row("kl", kl, 500, arm, half=None, n=None),
        ]

    near = change("harc", 0.7, 0.10) + change("dpo", 0.9, 0.12) + change("sft", 0.3, 2.0)
    found = verdict(19, near)
    assert found.verdict == "holds" and "dpo, seed 0 step 500" in found.checks[0].name
    far = verdict(19, change("harc", 0.7, 0.1) + change("sft", 0.3, 2.0))
    assert "within a factor of 2" in far.held_back[0]


def test_claims_5_and_6_read_what_predicts_transfer():
    def prediction(arm, name, rho, interval, p):
        own = {"targets": arm, "predictor": name, "rho": rho, "interval": interval, "p": p}
        return own | {"of": "raw", "n_targets": 5, "n_trainings": 5}

    arms = [reference("C_cos", 0.1)]
    arms += [row("C_cos", 0.1, s, arm) for arm in ("r2d2", "sft") for s in (50, 500)]
    rows = [
        prediction("r2d2", "HRCI v2", 0.96, (0.8, 1.0), 0.01),
        prediction("sft", "HRCI v2", 0.03, (-0.2, 0.2), 0.9),
        prediction("sft", "drift of R", 0.6, (0.3, 0.9), 0.01),
        prediction("sft", "ASR fixed", 0.1, (-0.5, 0.6), 0.7),
    ]
    claims = {(c.number, c.model): c for c in training_claims(arms, rows)}
    assert claims[5, "r2d2, seed 0"].checks[0].outcome == "yes"
    assert claims[5, "sft, seed 0"].checks[0].outcome == "yes"
    assert claims[6, "sft, seed 0"].p == pytest.approx(0.02)  # one of two is enough
    assert claims[5, "sft, seed 0"].held_back == ()
    few = [r | {"n_trainings": 1} for r in rows]
    one = {(c.number, c.model): c for c in training_claims(arms, few)}
    assert one[5, "r2d2, seed 0"].checks[0].outcome == "unclear"
    assert "four targets" in {c.number: c for c in training_claims(arms, [])}[6].held_back[0]


def test_trainings_are_told_apart_by_seed_and_variant():
    rows = [
        reference("C_cos", 0.1),
        row("C_cos", 0.1, 50, "harc", seed=0),
        row("C_cos", 0.1, 50, "harc", seed=1),
        row("C_cos", 0.1, 50, "harc", seed=0, variant="opened=True"),
    ]
    names = [t.name for t in trainings_of(rows).all]
    assert names[1] == "harc, seed 1" and len(set(names)) == 3


def test_seeds_are_the_units_of_a_way_of_training():
    def seeds(n, last):
        return [
            row(f"layer of {kind}", value, step, "sft", half=None, seed=seed)
            for seed in range(n)
            for kind in "HR"
            for step, value in ((50, 25), (500, last + seed % 2))
        ]

    base = [reference("nothing", 0.0)]
    five = {c.model: c for c in training_claims(base + seeds(5, 7), []) if c.number == 8}
    assert five["sft, seed 0"].verdict == "undecided"
    assert five["sft, 5 seeds"].p == 1 / 32 and five["sft, 5 seeds"].verdict == "holds"
    two = {c.model: c for c in training_claims(base + seeds(2, 7), []) if c.number == 8}
    assert two["sft, 2 seeds"].verdict == "undecided"


def test_a_second_model_without_a_card_is_not_the_reference():
    rows = [reference("ASR fixed", 0.2), *course("sft", sub=(0.1, 0.1), asr=(0.5, 0.6))]
    other = row("ASR fixed", 0.9, 0, None) | {"model": "another"}
    trainings = trainings_of([*rows, other])
    assert trainings.all[0].of_reference("ASR fixed")["value"] == 0.2


def test_all_claims_are_listed_with_what_they_need():
    result = CliRunner().invoke(cli.cli, ["claims", "--list"])
    assert result.exit_code == 0
    numbers = {int(line.split()[0]) for line in result.output.splitlines()[1:]}
    assert numbers == set(range(1, 22))
    assert {t.number for t in TRAINING_CLAIMS.all().values()} == {
        *range(3, 7),
        *range(8, 12),
        *range(16, 20),
    }
