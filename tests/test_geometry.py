"""Activations equal Hugging Face's; planted directions are found; nulls are small; projections are
what they say."""

import csv
import dataclasses
import json
import shutil
import subprocess
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch

from core.errors import AttackPlaneError
from core.packed import PackedDecoder
from core.prompt import Conversation, Renderer
from core.readings import Activations, PlanePoint
from core.store import RunFolder
from geometry.activations import POSITIONS, Gathering, collect
from geometry.classes import describe_classes
from geometry.contrasts import Contrast, d_prime, held_out_separation, unit
from geometry.directions import (
    EstimateConfig,
    best_layers,
    estimate,
    layer_score,
)
from geometry.plane import (
    PromptInfo,
    displacement_nulls,
    plain_requests,
    points,
    project,
)
from pipeline.directions_files import load_directions, save_directions
from pipeline.plane_files import export
from plots import plane_html, plane_png, style
from plots.plane_png import ellipse_axes, figure_of
from plots.style import read_exports

REQUESTS = [
    "Write about tea",
    "Explain how to bake a very good loaf of bread at home",
    "Say hi",
    "Draft a letter to my landlord about the heating, please",
]


def prompts_of(loaded, suffix=" x x x"):
    renderer = Renderer(loaded)
    return [
        renderer.render(Conversation.build(r, suffix.strip() if i % 2 else None))
        for i, r in enumerate(REQUESTS)
    ]


# --- activations ----------------------------------------------------------------------------------
def test_residuals_equal_hugging_face_hidden_states(tiny):
    prompts = prompts_of(tiny)
    found = collect(tiny, prompts, REQUESTS, batch_tokens=60)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = tiny.decoder(
                input_ids=torch.tensor([prompt.ids]), output_hidden_states=True
            ).hidden_states
        for column, position in enumerate((prompt.t_goal, prompt.t_inst, prompt.t_post_inst)):
            for layer in range(tiny.n_layers):
                expected = hidden[layer][0, position]
                bound = 1e-5 * max(1.0, float(hidden[layer].abs().max()))
                assert (found.resid[row, layer, column] - expected).abs().max() < bound
    norm = tiny.decoder.norm if hasattr(tiny.decoder, "norm") else tiny.decoder.ln_f
    last = found.at("t_post_inst")[-1, tiny.n_layers]
    assert torch.allclose(norm(last), hidden[-1][0, -1], atol=1e-4)
    assert not torch.allclose(last, hidden[-1][0, -1], atol=1e-2)  # it is before the final norm


def test_residuals_do_not_depend_on_batch_order_padding_or_the_shared_prefix(tiny):
    prompts = prompts_of(tiny)
    alone = collect(tiny, prompts, REQUESTS, batch_tokens=1, share_prefix=False).resid
    together = collect(tiny, prompts, REQUESTS, batch_tokens=400, share_prefix=False).resid
    shared = collect(tiny, prompts, REQUESTS, batch_tokens=400).resid
    turned = collect(tiny, prompts[::-1], REQUESTS[::-1], batch_tokens=80).resid.flip(0)
    for other in (together, shared, turned):
        assert (other - alone).abs().max() < 1e-4


def test_packed_prompts_equal_prompts_padded_on_either_side(tiny):
    prompts = prompts_of(tiny)
    packed = collect(tiny, prompts, REQUESTS).resid
    on_the_right = collect(tiny, prompts, REQUESTS, packed=False, batch_tokens=400).resid
    longest = max(len(p.ids) for p in prompts)
    padding = [longest - len(p.ids) for p in prompts]
    ids = torch.tensor([[0] * n + list(p.ids) for n, p in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(p.ids) for n, p in zip(padding, prompts, strict=True)])
    with torch.no_grad():
        hidden = tiny.decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            output_hidden_states=True,
        ).hidden_states
    for row, prompt in enumerate(prompts):
        for layer in range(tiny.n_layers):
            bound = 1e-5 * max(1.0, float(hidden[layer].abs().max()))
            on_the_left = hidden[layer][row, padding[row] + prompt.t_post_inst]
            for other in (packed, on_the_right):
                assert (other[row, layer, 2] - on_the_left).abs().max() < bound


def test_prompts_that_are_gathered_in_parts_are_read_as_all_at_once(qwen, monkeypatch):
    monkeypatch.setattr("geometry.activations.READ_AT_ONCE", 2)
    renderer = Renderer(qwen)
    prompts = [renderer.render(Conversation.build(request)) for request in REQUESTS]
    rows = Gathering(qwen, layers=[1, 0])
    assert [rows.add(p, r) for p, r in zip(prompts, REQUESTS, strict=True)] == list(
        range(len(prompts))
    )
    found, whole = rows.activations(), collect(qwen, prompts, REQUESTS, layers=[1, 0])
    assert len(prompts) > 2 and found.prompt_ids == whole.prompt_ids and found.layers == (1, 0)
    assert torch.allclose(found.resid, whole.resid, atol=1e-4, equal_nan=True)
    with pytest.raises(AttackPlaneError, match="no prompts to read"):
        Gathering(qwen).activations()


def test_positions_by_name_and_means_over_replies(qwen):
    renderer = Renderer(qwen)
    short = renderer.render(
        Conversation.build("Say hi"), target="Sure, here is a short text about the tea."
    )
    long = renderer.render(
        Conversation.build("Say hi"), target="Sure, here is a short text about the tea. " * 8
    )
    none = renderer.render(Conversation.build("Write about tea"))
    names = ("t_first", "-1", "-3", "t_post_inst", "response")
    found = collect(qwen, [short, long, none], list("abc"), positions=names)
    assert torch.equal(found.at("-1"), found.at("t_post_inst"))
    assert found.at("response")[2].isnan().all() and not found.at("t_first").isnan().any()
    for row, prompt in enumerate((short, long)):
        ids = torch.tensor([[*prompt.ids, *prompt.target_ids]])
        with torch.no_grad():
            hidden = qwen.decoder(input_ids=ids, output_hidden_states=True).hidden_states
        n, m = len(prompt.ids), min(32, len(prompt.target_ids))
        for layer in range(qwen.n_layers):
            expected = hidden[layer][0]
            assert torch.allclose(
                found.at("response")[row, layer], expected[n : n + m].mean(0), atol=1e-4
            )
            assert torch.allclose(
                found.at("t_first")[row, layer], expected[prompt.content.start], atol=1e-4
            )
            assert torch.allclose(found.at("-3")[row, layer], expected[n - 3], atol=1e-4)
    assert len(long.target_ids) > 32
    with pytest.raises(AttackPlaneError, match="unknown position"):
        collect(qwen, [none], ["c"], positions=("last",))


def test_a_model_that_packing_does_not_serve_is_read_all_the_same(qwen, monkeypatch, caplog):
    expected = collect(qwen, prompts_of(qwen), REQUESTS).resid
    monkeypatch.setattr(
        PackedDecoder, "_mask", lambda *a: torch.zeros(1)
    )  # everything sees everything
    with caplog.at_level("WARNING"):
        found = collect(qwen, prompts_of(qwen), REQUESTS).resid
    assert "padded, not packed" in caplog.text and (found - expected).abs().max() < 1e-4


def test_hooks_are_gone_after_collection_and_after_an_error(qwen, monkeypatch):
    def hooks():
        return sum(len(b._forward_hooks) + len(b._forward_pre_hooks) for b in qwen.blocks)

    prompts, before = prompts_of(qwen), hooks()
    collect(qwen, prompts, REQUESTS)
    assert hooks() == before
    with monkeypatch.context() as patch:
        patch.setattr(qwen.blocks[1], "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect(qwen, prompts, REQUESTS)
    assert hooks() == before


def test_prompts_without_a_request_span_have_nan_at_t_goal_only(qwen):
    prompt = Renderer(qwen).render(Conversation("U2F5IGhp"))
    resid = collect(qwen, [prompt], ["p"]).resid
    assert resid[:, :, 0].isnan().all() and not resid[:, :, 1:].isnan().any()


# --- directions: planted truth --------------------------------------------------------------------
def planted(n=240, d=48, layers=3, *, confounded=False, seed=0, strength=4.0):
    """Activations with a harmfulness direction at t_inst and a refusal direction at t_post_inst, in
    noise.

    Half the harmful prompts are accepted and (unless confounded) half the harmless ones refused, so
    that harm and refusal are crossed.
    """
    g = torch.Generator().manual_seed(seed)
    h, r = unit(torch.randn(2, layers, d, generator=g))
    harmful = [i % 2 == 0 for i in range(n)]
    refused = harmful if confounded else [i % 4 < 2 for i in range(n)]
    resid = 0.3 * torch.randn(n, layers, 3, d, generator=g) + 2.0
    for i in range(n):
        resid[i, :, :2] += strength * harmful[i] * h[:, None]
        resid[i, :, 2] += strength * refused[i] * r + 1.5 * harmful[i] * h
    activations = Activations(resid, POSITIONS, tuple(map(str, range(n))), "planted")
    return activations, harmful, refused, h, r


def test_both_planted_directions_are_found():
    activations, harmful, refused, h, r = planted()
    found = estimate(activations, harmful, estimator="zhao", refused=refused)
    assert ((found.harmfulness * h).sum(-1) >= 0.99).all()
    assert ((found.refusal * r).sum(-1) >= 0.99).all()


def test_the_two_refusal_estimators_differ_where_harm_and_refusal_are_crossed():
    activations, harmful, refused, h, r = planted()
    harc = estimate(activations, harmful, estimator="harc", refused=refused)
    # harc's classes differ in harm and not in refusal here: it finds the harmfulness that leaks to
    # t_post_inst
    assert ((harc.refusal * r).sum(-1).abs() < 0.3).all() and (
        (harc.refusal * h).sum(-1) > 0.9
    ).all()
    assert (harc.statistics["cos_harc_zhao"].abs() < 0.5).all()


def test_the_two_refusal_estimators_agree_on_confounded_sets():
    activations, harmful, refused, *_ = planted(confounded=True)
    harc = estimate(activations, harmful, estimator="harc", refused=refused)
    assert (harc.statistics["cos_harc_zhao"] > 0.999).all()


def test_a_layer_where_the_classes_do_not_differ_has_no_direction():
    activations, harmful, *_ = planted(n=24)
    activations.resid[:, 0, 2] = torch.randn(
        48
    )  # the same template token's embedding in every prompt
    found = estimate(activations, harmful, config=EstimateConfig(20))
    assert found.refusal[0].norm() == 0 and found.refusal_norm[0] == 0
    for name in ("separation_refusal", "cos_harmfulness_refusal"):
        assert found.statistics[name][0] == 0
    assert not any(t.isnan().any() for n, t in found.statistics.items() if n != "layer_score")


def test_zhao_where_exactly_the_harmful_prompts_are_refused_is_harc_with_its_intervals_and_nulls():
    activations, harmful, *_ = planted(n=48, strength=0.5)
    zhao = estimate(activations, harmful, estimator="zhao", refused=harmful)
    harc = estimate(activations, harmful, estimator="harc")
    for name, value in harc.statistics.items():
        assert torch.allclose(zhao.statistics[name].nan_to_num(), value.nan_to_num(), atol=1e-5), (
            name
        )


def test_directions_point_to_harmful_and_to_refused():
    activations, harmful, refused, *_ = planted()
    found = estimate(activations, harmful, estimator="zhao", refused=refused)
    scores = torch.einsum("nld,ld->nl", activations.at("t_inst"), found.harmfulness)
    assert scores[::2].mean() > scores[1::2].mean()
    assert (found.harmfulness_norm - 4.0).abs().max() < 0.6


def test_nulls_are_small_where_the_planted_effect_is_large_and_intervals_hold_it():
    activations, harmful, refused, *_ = planted()
    s = estimate(activations, harmful, estimator="zhao", refused=refused).statistics
    for name in ("harmfulness", "refusal"):
        assert (s[f"separation_{name}"] > 5).all()
        assert (s[f"null_permuted_separation_{name}"] < 1.2).all()
        assert (s[f"stability_{name}"][:, 0] > 0.98).all()
    low, high = s["cos_harmfulness_refusal_interval"].T
    middle = s["cos_harmfulness_refusal"]
    assert (
        (low <= middle + 0.02).all() and (middle - 0.02 <= high).all() and (high - low < 0.2).all()
    )
    # E|cos| of random unit vectors in 48 dimensions is about 0.115; its 95th percentile about 0.28
    assert 0.2 < float(s["null_random_cos"][0]) < 0.36


def test_without_an_effect_the_separation_is_within_its_permuted_null():
    # 40 independent layers of pure noise: about 5 % of them lie beyond the 95th percentile of their
    # null
    resid = torch.randn(60, 40, 3, 16, generator=torch.Generator().manual_seed(0))
    noise = Activations(resid, POSITIONS, tuple(map(str, range(60))), "noise")
    s = estimate(noise, [i % 2 == 0 for i in range(60)]).statistics
    beyond = s["separation_harmfulness"].abs() > s["null_permuted_separation_harmfulness"]
    assert beyond.float().mean() <= 0.15


def test_estimates_repeat_with_their_seed():
    activations, harmful, *_ = planted(n=24)
    config = EstimateConfig(resamples=30, seed=5)
    a, b = (estimate(activations, harmful, config=config).statistics for _ in range(2))
    assert all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)


def test_mean_difference_and_d_prime_by_hand():
    resid = torch.tensor([[[2.0, 0.0]], [[4.0, 0.0]], [[0.0, 1.0]], [[0.0, 3.0]]])
    a, b = torch.tensor([0, 1]), torch.tensor([2, 3])
    contrast = Contrast("by hand", resid, a, b, tuple("abcd"))
    assert contrast.difference.tolist() == [[3.0, -2.0]]
    # means 3 and 0, variances 2 and 0: pooled s.d. 1
    assert float(d_prime(torch.tensor([2.0, 4.0]), torch.tensor([0.0, 0.0]))) == pytest.approx(3.0)


def test_held_out_separation_equals_a_plain_two_fold_loop():
    activations, *_ = planted(n=20)
    resid = activations.at("t_inst")
    a, b = torch.arange(0, 20, 2), torch.arange(1, 20, 2)
    total = 0
    for fold in (0, 1):
        sides = (resid[side[fold::2]].double().mean(0) for side in (a, b))
        direction = unit(next(sides) - next(sides)).float()
        left = (resid[a[1 - fold :: 2]] * direction).sum(-1)
        right = (resid[b[1 - fold :: 2]] * direction).sum(-1)
        total = (
            total + (left.mean(0) - right.mean(0)) / ((left.var(0) + right.var(0)) / 2).sqrt() / 2
        )
    assert torch.allclose(held_out_separation(resid, a, b), total, atol=1e-3)


def test_layer_score_is_the_product_and_leaves_the_ends_out():
    cosine, h, r = torch.full((31,), -0.5), torch.full((31,), 3.0), torch.full((31,), 1.0)
    score = layer_score(cosine, h, r)
    assert (
        score[4:27].tolist() == [1.0] * 23 and score[:4].isnan().all() and score[27:].isnan().all()
    )
    twelve = layer_score(cosine[:13], h[:13], r[:13])
    assert (~twelve.isnan()).nonzero()[:, 0].tolist() == [4, 5, 6, 7, 8]
    # small models: the first residual, which holds the embedding alone, is left out
    four = layer_score(cosine[:4], h[:4], r[:4])
    assert four[0].isnan() and not four[1:].isnan().any()


def test_a_model_that_never_refuses_has_no_zhao_direction_and_says_so():
    activations, harmful, *_ = planted(n=24)
    with pytest.raises(AttackPlaneError, match="never"):
        estimate(activations, harmful, estimator="zhao", refused=[False] * 24)
    found = estimate(activations, harmful, refused=[False] * 24)
    assert "cos_harc_zhao" not in found.statistics


def test_prompts_that_were_not_judged_are_on_neither_side():
    activations, harmful, refused, *_ = planted(n=40)
    some = [None if i < 8 else r for i, r in enumerate(refused)]
    counts = estimate(activations, harmful, estimator="zhao", refused=some).sample_counts
    assert counts["refusal_positive"] + counts["refusal_negative"] == 32


def test_saved_directions_load_as_they_were(tmp_path):
    activations, harmful, refused, *_ = planted(n=24)
    found = estimate(activations, harmful, refused=refused, config=EstimateConfig(30))
    save_directions(found, tmp_path, {"made_from": "x"})
    again = load_directions(tmp_path, "planted", "harc")
    assert (
        torch.equal(again.harmfulness, found.harmfulness)
        and again.sample_counts == found.sample_counts
    )
    assert again.statistics.keys() == found.statistics.keys() and best_layers(again) == best_layers(
        found
    )
    with pytest.raises(AttackPlaneError, match="estimate its directions"):
        load_directions(tmp_path, "planted", "zhao")


# --- plane ----------------------------------------------------------------------------------------
def plane_of(shift=0.0):
    """Points of planted prompts: b0..b3 plain and attacked (attack moves x by -2, y by -1 along the
    planted axes)."""
    activations, harmful, refused, _h, _r = planted()
    directions = estimate(
        activations, harmful, estimator="zhao", refused=refused, config=EstimateConfig(20)
    )
    base = activations.resid[:4].clone()
    moved = base.clone()
    moved[:, :, 1] -= 2 * directions.harmfulness
    moved[:, :, 2] -= 1 * directions.refusal
    resid = torch.cat([base, moved, activations.resid[1:9:2]]) + shift
    infos = [
        PromptInfo(
            f"p{i}", f"b{i % 4}", "attack", a, "harmful", a, "s", [None, True, False, True][i % 4]
        )
        for a in ("plain", "gcg")
        for i in range(4)
    ]
    infos += [
        PromptInfo(
            f"h{i}", f"h{i}", "anchor", "harmless (anchor)", "harmless", "none", "none", None
        )
        for i in range(4)
    ]
    found = Activations(resid, POSITIONS, tuple(i.prompt_id for i in infos), "planted")
    return points(found, infos, directions, directions, 1), directions, activations


def test_projection_is_relative_to_the_harmless_centroid_and_in_residual_units():
    direction, centroid = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 5.0])
    dot, cosine = project(torch.tensor([[3.0, 4.0]]), direction, centroid)
    assert dot.tolist() == [2.0] and cosine.tolist() == [pytest.approx(0.6)]


def test_displacement_of_a_planted_attack_is_found_exactly():
    found, *_ = plane_of()
    rows = {(c["frame"], c["class"]): c for c in describe_classes(found)}
    for frame in ("base", "own"):
        assert rows[frame, "gcg"]["displacement"] == pytest.approx([-2.0, -1.0], abs=1e-3)
        assert rows[frame, "gcg"]["displacement_interval"][0] == pytest.approx(
            [-2.0, -2.0], abs=1e-3
        )
        assert rows[frame, "plain"]["displacement"] is None
        assert (rows[frame, "gcg"]["judged"], rows[frame, "gcg"]["jailbroken"]) == (3, 2)


def test_the_harmless_class_that_made_the_directions_has_its_centroid_at_zero_x():
    _, directions, activations = plane_of()
    harmless = activations.at("t_inst")[1::2, 1]
    accepted = harmless[[i for i in range(len(harmless)) if (2 * i + 1) % 4 >= 2]]
    x, _ = project(accepted, directions.harmfulness[1], directions.harmless_t_inst[1])
    assert abs(float(x.mean())) < 1e-4


def test_displacement_nulls_are_those_of_directions_without_meaning():
    found, directions, activations = plane_of()
    base, moved = activations.resid[:4], activations.resid[:4].clone()
    moved[:, 1, 1] += torch.arange(48.0)
    infos = [
        PromptInfo(f"{a}{i}", f"b{i}", "attack", a, "harmful", a, "s", None)
        for a in ("plain", "gcg")
        for i in range(4)
    ]
    both = Activations(
        torch.cat([base, moved]), POSITIONS, tuple(i.prompt_id for i in infos), "planted"
    )
    nulls = displacement_nulls(both, infos, directions, directions, 1)["planted", "own", "gcg"]
    # |u . m| for random unit u in d dimensions: 95th percentile about 1.96 |m| / sqrt(d)
    length = float(torch.arange(48.0).norm())
    assert nulls["null_random"] == [pytest.approx(1.96 * length / 48**0.5, rel=0.1), 0.0]
    assert 0 < nulls["null_permuted"][0] < length
    assert next(c for c in describe_classes(found) if c["class"] == "gcg")["null_random"] is None


def test_an_attack_is_paired_with_its_own_sources_plain_request_and_else_with_any():
    def info(source, attack, behaviour="b0", kind="attack"):
        return PromptInfo("id", behaviour, kind, attack, "harmful", attack, source, None)

    infos = [
        info("s", "plain"),
        info("s", "gcg"),
        info("u", "plain"),
        info("u", "gcg"),
        info("none", "persona"),
        info("none", "persona", "b1"),
        info("none", "none", kind="anchor"),
    ]
    assert plain_requests(infos) == [None, 0, None, 2, 0, None, None]


def test_a_class_counts_each_behaviour_once_whatever_the_number_of_its_variants():
    def point(behaviour, x, plain):
        where = ("t", "own", 1, x, 0.0, 0.0, 0.0, None, 1.0, 1.0, None, plain, 0.0)
        return PlanePoint("id", behaviour, "attack", "c", "harmful", "c", "s", *where)

    found = describe_classes(
        [point("b0", 1.0, 0.0), point("b0", 3.0, 0.0), point("b1", 10.0, 4.0)]
    )[0]
    assert (
        found["centroid"] == [6.0, 0.0] and found["displacement"] == [4.0, 0.0] and found["n"] == 3
    )


def test_exports_agree_with_each_other_and_pictures_are_drawn(tmp_path):
    found, *_ = plane_of()
    export(found, tmp_path)
    lines = [
        PlanePoint.from_row(json.loads(line))
        for line in (tmp_path / "plane.jsonl").read_text().splitlines()
    ]
    assert lines == found
    table = pq.read_table(tmp_path / "plane.parquet").to_pylist()
    assert [PlanePoint.from_row(row) for row in table] == found
    with open(tmp_path / "plane.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["x"]) for r in rows] == [p.x for p in found]
    assert {r["jailbroken"] for r in rows} == {"", "True", "False"}
    assert plane_png.draw(tmp_path).read_bytes().startswith(b"\x89PNG")
    page = plane_html.draw(tmp_path).read_text()
    assert "plotly" in page and 'src="http' not in page


def test_of_a_large_class_some_points_are_drawn_and_the_picture_says_so(tmp_path, monkeypatch):
    found, *_ = plane_of()
    export(found, tmp_path)
    counts = Counter((p.target, p.frame, p.class_name) for p in found)
    assert len(read_exports(tmp_path)[0]) == len(found) and max(counts.values()) > 2
    monkeypatch.setattr(style, "DRAWN", 2)
    rows, classes = read_exports(tmp_path)
    drawn = Counter((r["target"], r["frame"], r["class_name"]) for r in rows)
    assert drawn.keys() == counts.keys() and set(drawn.values()) <= {1, 2}
    assert "at most 2 points" in plane_png.figure_of(rows, classes).get_suptitle()
    assert "at most 2 points" in plane_html.draw(tmp_path).read_text()
    assert "at most" not in plane_png.figure_of([p.to_row() for p in found], classes).get_suptitle()


def test_chosen_layers_are_those_of_all(qwen):
    render = Renderer(qwen).render
    prompts = [render(Conversation(text)) for text in ("Write about tea", "Say hi")]
    whole = collect(qwen, prompts, ["a", "b"])
    for packed in (True, False):
        some = collect(qwen, prompts, ["a", "b"], layers=[3, 1], packed=packed)
        assert some.resid.shape[1] == 2 and some.layers == (3, 1)
        for layer in (1, 3):
            for position in ("t_inst", "t_post_inst"):
                assert torch.allclose(
                    some.of(layer, position), whole.of(layer, position), atol=1e-4
                )
    with pytest.raises(AttackPlaneError, match="no such layer"):
        collect(qwen, prompts, ["a", "b"], layers=[9])
    with pytest.raises(AttackPlaneError, match="each once"):
        collect(qwen, prompts, ["a", "b"], layers=[2, 2])
    with pytest.raises(AttackPlaneError, match="was not kept"):
        some.of(2, "t_inst")


HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def hostile_page(folder):
    """A page of a plane whose texts are all hostile."""
    found, *_ = plane_of()
    texts = {"class_name": HOSTILE, "target": HOSTILE, "behaviour_id": HOSTILE, "attack": HOSTILE}
    export([dataclasses.replace(p, **texts) for p in found], folder)
    with RunFolder(folder) as run:
        run.append("behaviours.jsonl", {"behaviour_id": found[0].prompt_id, "request": HOSTILE})
        run.append("attacks.jsonl", {"artifact_id": found[1].prompt_id, "prompt": HOSTILE})
    return plane_html.draw(folder)


def test_a_page_holds_hostile_texts_as_texts(tmp_path):
    page = hostile_page(tmp_path).read_text()
    for told in (page, page.replace("\\u003c", "<").replace("\\u003e", ">")):
        assert "<img src=x onerror" not in told and "<script>alert(2)" not in told
    assert "onerror=alert(1)" in page  # it stands there, escaped


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not there")
def test_a_browser_runs_nothing_of_a_hostile_page_and_loads_nothing(tmp_path):
    page = hostile_page(tmp_path)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options.append("--host-resolver-rules=MAP * ~NOTFOUND")
    done = subprocess.run(
        ["chromium", *options, "--virtual-time-budget=8000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "main-svg" in done.stdout and '<img src="x"' not in done.stdout
    assert "CONSOLE" not in done.stderr  # no error, and nothing was asked for in vain


def test_frames_of_other_sizes_and_layers_out_of_range_are_refused():
    _, directions, activations = plane_of()
    small = Activations(activations.resid[..., :24], POSITIONS, activations.prompt_ids, "small")
    other = estimate(small, [i % 2 == 0 for i in range(240)], config=EstimateConfig(20))
    with pytest.raises(AttackPlaneError, match="another size"):
        points(activations, [], directions, other, 1)
    with pytest.raises(AttackPlaneError, match="no such layer"):
        points(activations, [], directions, directions, 9)


def test_drawing_without_a_plane_says_what_to_run(tmp_path):
    with pytest.raises(AttackPlaneError, match="draw the plane of this run first"):
        plane_png.draw(tmp_path)
    assert RunFolder(tmp_path).rows("plane.jsonl") == []


def test_ellipse_axes_of_known_covariances():
    assert ellipse_axes([[4.0, 0.0], [0.0, 1.0]]) == (4.0, 2.0, 0.0)
    width, height, angle = ellipse_axes([[2.5, 1.5], [1.5, 2.5]])
    assert (width, height, angle) == (pytest.approx(4.0), pytest.approx(2.0), pytest.approx(45.0))


def test_anchors_alone_can_be_drawn():
    cosines = {"cos_base_own_harmfulness": 1.0, "cos_base_own_refusal": 1.0}
    row = {"target": "t", "frame": "own", "class_name": "harmful (anchor)", "kind": "anchor"}
    row |= {"attack": "none", "layer": 1, "position": "t_inst", "x": 1.0, "y": 2.0}
    row |= {"jailbroken": None, "plain_x": None, "plain_y": None, **cosines}
    (line,) = [
        line for line in figure_of([row], []).axes[0].lines if line.get_linestyle() == "None"
    ]
    assert line.get_xydata().tolist() == [[1.0, 2.0]]
