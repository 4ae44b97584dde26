"""The form of the demonstration set does not give its labels away; a form that does is found."""

import numpy as np
import pytest

from evaluation.behaviours import load_behaviours
from evaluation.form import form_auroc, form_features


def pairs_of(source, tokenizer):
    rows = [b for b in load_behaviours(source) if b.label != "pseudo_harmful"]
    ids = [tokenizer(b.request, add_special_tokens=False).input_ids for b in rows]
    return rows, ids


def measured(rows, ids, **more):
    return form_auroc(
        [b.request for b in rows],
        [row[-1] for row in ids],
        [len(row) for row in ids],
        [b.label == "harmful" for b in rows],
        [b.pair_id or b.behaviour_id for b in rows],
        **more,
    )


def test_form_alone_does_not_tell_harmful_from_harmless(embedded):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    rows, ids = pairs_of("demonstration", embedded.tokenizer)
    assert measured(rows, ids) <= 0.55
    x = form_features([b.request for b in rows], [r[-1] for r in ids], [len(r) for r in ids])
    y = np.array([b.label == "harmful" for b in rows])
    folds = GroupKFold(5, shuffle=True, random_state=0)
    said = cross_val_predict(
        LogisticRegression(max_iter=2000),
        x,
        y,
        groups=[b.pair_id for b in rows],
        cv=folds,
        method="decision_function",
    )
    assert roc_auc_score(y, said) <= 0.55


def test_the_two_of_a_pair_have_one_last_token_and_nearly_one_length(embedded):
    rows, ids = pairs_of("demonstration", embedded.tokenizer)
    by_pair = {}
    for row, tokens in zip(rows, ids, strict=True):
        by_pair.setdefault(row.pair_id, {})[row.label] = (row, tokens)
    assert len(by_pair) == 240
    for pair in by_pair.values():
        (bad, bad_ids), (good, good_ids) = pair["harmful"], pair["harmless"]
        assert bad_ids[-1] == good_ids[-1] and abs(len(bad_ids) - len(good_ids)) <= 2
        assert bad.request.split()[0] == good.request.split()[0]
        assert (bad.split, bad.category) == (good.split, good.category)


def test_a_form_that_tells_the_label_is_found():
    texts = [f"How do I bake number {i}?" for i in range(20)] + [f"Bake {i}" for i in range(20)]
    harmful = [True] * 20 + [False] * 20
    told = form_auroc(texts, [1] * 20 + [2] * 20, [6] * 20 + [2] * 20, harmful, list(range(40)))
    assert told == pytest.approx(1.0)


def test_form_features_are_scaled_and_constants_left_out():
    features = form_features(["Bake it.", "Bake that one", "Sing"], [1, 2, 2], [3, 4, 1])
    assert features.std(0) == pytest.approx(np.ones(features.shape[1]))
