"""What a claim says: p-values in both directions, all checks or any of them, and Holm."""

import math

import numpy as np
import pytest

from geometry.cross_half import CrossHalf
from study.verdicts import (
    NEAR_ORTHOGONAL,
    Check,
    Claim,
    cosine_check,
    mean_check,
    with_holm,
)


def check(p, against, **more):
    return Check("c", 0.2, 0.1, 0.3, 0.0, "above", "share", 20, p, against, "by hand", **more)


YES, NO, UNCLEAR = check(0.01, 1.0), check(1.0, 0.001), check(0.2, 0.8)


def test_verdicts_need_all_checks_and_an_applicable_model():
    assert [c.outcome for c in (YES, NO, UNCLEAR)] == ["yes", "no", "unclear"]
    assert Claim(1, "t", "m", (YES, YES)).verdict == "holds"
    assert Claim(1, "t", "m", (YES, UNCLEAR)).verdict == "undecided"
    assert Claim(1, "t", "m", (YES, UNCLEAR, NO)).verdict == "refuted"
    assert Claim(1, "t", "m", (YES, NO.told())).verdict == "holds"
    assert Claim(1, "t", "m", (YES,), held_back=("no",)).verdict == "undecided"
    assert Claim(1, "t", "m", ()).verdict == "undecided"
    row = Claim(1, "t", "m", (YES, NO)).to_row()
    assert row["verdict"] == "refuted" and [c["outcome"] for c in row["checks"]] == ["yes", "no"]


def test_several_checks_pay_for_their_number_in_one_direction():
    both = Claim(1, "t", "m", (check(0.01, 0.9), check(0.04, 0.02)))
    assert (both.p, both.p_against) == (0.04, 0.04)
    either = Claim(1, "t", "m", (check(0.01, 0.9), check(0.04, 0.02)), any_of=True)
    assert (either.p, either.p_against) == (0.02, 0.9)


def test_holm_runs_over_the_applicable_claims_of_one_model():
    claims = [
        Claim(1, "t", "m", (check(0.02, 1.0),)),
        Claim(2, "t", "m", (check(0.04, 1.0),)),
        Claim(3, "t", "m", (check(0.001, 1.0),), held_back=("nothing to see",)),
        Claim(1, "t", "other", (check(0.04, 1.0),)),
    ]
    corrected = with_holm(claims)
    assert [c.verdict for c in claims[:2]] == ["holds", "holds"]
    assert [c.holm for c in corrected] == [(0.04, 1.0), (0.04, 1.0), None, (0.04, 1.0)]
    third = with_holm([*claims[:2], Claim(4, "t", "m", (check(0.03, 1.0),))])
    assert [c.verdict for c in third] == ["undecided"] * 3


def test_a_mean_has_its_interval_and_the_units_that_would_decide_it():
    rng = np.random.default_rng(0)
    c = mean_check("c", [*rng.normal(0.2, size=16), math.nan], unit="share")
    assert c.n == 16 and c.low <= c.value <= c.high and c.outcome == "unclear"
    assert c.needed and c.needed > 16
    assert mean_check("c", [], unit="share").outcome == "unclear"
    assert mean_check("c", rng.normal(2, size=16), unit="share").needed is None


def test_an_effect_within_the_margin_refutes_and_one_beyond_it_does_not():
    spread = np.linspace(-0.1, 0.1, 16)
    asked = {"unit": "u", "controls": {"made up": np.linspace(-0.3, 0.3, 99)}}
    assert mean_check("c", spread, **asked).outcome == "unclear"
    assert mean_check("c", spread, **asked, margin=0.2).outcome == "no"
    assert mean_check("c", 0.25 + spread, **asked, margin=0.2).outcome == "unclear"
    small = {"unit": "u", "margin": 0.3}  # above zero beyond doubt, and too small to count
    assert mean_check("c", spread + 0.15, **small).outcome == "no"
    assert mean_check("c", spread + 0.4, **small).outcome == "yes"
    below = mean_check("c", spread - 0.02, **asked, claimed="below", margin=0.2)
    assert below.outcome == "no" and "more or less than 0.20" in below.test
    assert mean_check("c", spread - 0.9, **asked, claimed="below", margin=0.2).outcome == "yes"


def test_what_is_small_needs_not_beat_controls_but_what_is_large_must():
    small, large = np.full(16, 0.01), np.full(16, 0.5) + np.linspace(-0.1, 0.1, 16)
    controls = np.linspace(-0.3, 0.3, 99)
    for claimed in ("within", "not above"):
        asked = {"unit": "u", "claimed": claimed, "threshold": 0.2}
        assert mean_check("c", small, **asked, controls={"made up": controls}).outcome == "yes"
        assert mean_check("c", large, **asked, controls={"made up": controls}).outcome == "no"
        assert (
            mean_check("c", large, **asked, controls={"made up": 3 * controls}).outcome == "unclear"
        )
    below = mean_check("c", -large, unit="u", claimed="not above", threshold=0.2)
    assert below.outcome == "yes"
    assert mean_check("c", -large, unit="u", claimed="within", threshold=0.2).outcome == "no"


def test_weak_controls_of_one_kind_do_not_dilute_another():
    values = np.full(16, 0.5) + np.linspace(-0.1, 0.1, 16)
    strong, weak = np.linspace(-1.0, 0.55, 99), np.linspace(-0.1, 0.1, 99)
    above = float((strong >= 0.5).sum())
    c = mean_check("c", values, unit="u", controls={"permuted": strong, "random": weak})
    assert c.p == pytest.approx((1 + above) / 100) and "99 permuted" in c.test
    unknown = mean_check("c", values, unit="u", controls={"k": [math.nan] * 9}, ranked=0.5)
    assert unknown.p == 1.0 and unknown.outcome == "unclear"


def test_a_cosine_is_near_orthogonal_alike_or_neither():
    def found(value, units=40, p=0.01):
        draws = value + np.linspace(-0.1, 0.1, 400)
        return CrossHalf(value, draws, (0.9, 0.9), p, units)

    def says(claimed, *args, **more):
        return cosine_check("c", found(*args, **more), claimed=claimed).outcome

    assert says("within", 0.0) == "yes" and says("within", 0.4) == "no"
    assert says("within", -0.4) == "no" and says("within", NEAR_ORTHOGONAL) == "unclear"
    assert says("above", 0.4) == "yes" and says("above", 0.0) == "no"
    assert says("above", 0.4, p=0.2) == "unclear"  # permuted labels do as much
    assert says("above", 0.4, units=11) == "unclear"  # too few for a bootstrap


@pytest.mark.parametrize("claimed", ["above", "below", "within", "not above"])
def test_nothing_is_decided_by_what_could_not_be_measured(claimed):
    nothing = CrossHalf(math.nan, np.full(50, math.nan), (0.0, 0.0), 1.0, 40)
    if claimed in ("above", "within"):
        c = cosine_check("c", nothing, claimed=claimed)
        assert c.outcome == "unclear" and c.needed is None
    assert mean_check("c", [math.nan] * 9, unit="u", claimed=claimed).outcome == "unclear"
