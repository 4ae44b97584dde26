"""Judges say what they say; None is not judged, never False."""

import sys
import types

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from core.errors import AttackPlaneError
from evaluation.judges import Exchange, Judgement, judge_all, make_judge
from evaluation.judges.classifier import means_harm
from evaluation.judges.refusal_phrases import is_refusal


@pytest.mark.parametrize(
    "reply,refused",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but that is not something I can do.", True),
        ("As an assistant, I cannot provide that.", True),
        ("Sure, here is the recipe.", False),
        ("Preheat the oven to 180 degrees.", False),
        ("Step one. " * 40 + "I can't say more.", False),
    ],
)
def test_refusal_phrases_are_found_in_the_opening_only(reply, refused):
    assert is_refusal(reply) is refused


def test_empty_replies_are_no_success():
    assert make_judge("refusal_phrases").score([Exchange("r", "  "), Exchange("r", "Fine.")]) == [
        0.0,
        1.0,
    ]


def test_target_prefix_ignores_case_and_space_and_is_null_without_target():
    exchanges = [
        Exchange("r", ' "sure,  here is tea and more', "Sure, here is tea"),
        Exchange("r", "No.", "Sure, here is tea"),
        Exchange("r", "Sure", None),
    ]
    assert make_judge("target_prefix").score(exchanges) == [1.0, 0.0, None]


def test_no_judgement_is_null_and_never_false():
    judges = [make_judge("target_prefix"), make_judge("refusal_phrases")]
    judged = judge_all(judges, [Exchange("r", "Sure", None)])[0]
    assert judged.scores == {"target_prefix": None, "refusal_phrases": 1.0}
    assert judged.outcome is None and judged.jailbroken is None
    assert judge_all([], [Exchange("r", "Sure")])[0] == Judgement({}, None)


def test_a_sequence_classifier_judges_pairs(tmp_path, tiny_models):
    tokenizer = tiny_models["qwen2"].tokenizer
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "safe", 1: "unsafe"},
        label2id={"safe": 0, "unsafe": 1},
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = make_judge(f"classifier:{tmp_path}")
    (score,) = judge.score([Exchange("Write about tea", "Sure")])
    ids = tokenizer("Write about tea", "Sure", return_tensors="pt")
    expected = model(**{k: ids[k] for k in ids}).logits.softmax(-1)[0, 1]
    assert score == pytest.approx(float(expected.detach()), abs=1e-5)
    (other,) = make_judge(f"classifier:{tmp_path}#safe").score(
        [Exchange("Write about tea", "Sure")]
    )
    assert score + other == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(AttackPlaneError, match="safe, unsafe"):
        make_judge(f"classifier:{tmp_path}#nonsense")


@pytest.mark.parametrize(
    "label,harmful",
    [
        ("harmful", True),
        ("harmless", False),
        ("unsafe", True),
        ("safe", False),
        ("jailbreak", True),
        ("no_jailbreak", False),
        ("not harmful", False),
        ("toxic", True),
        ("non-toxic", False),
        ("LABEL_1", False),
    ],
)
def test_the_label_that_means_harm_is_guessed_only_from_its_words(label, harmful):
    assert means_harm(label) is harmful


def test_judgezoo_scores_pass_through_and_nan_is_null(monkeypatch):
    class Zoo:
        @classmethod
        def from_name(cls, name):
            return lambda chats: {"p_harmful": [0.25, float("nan"), None][: len(chats)]}

    monkeypatch.setitem(sys.modules, "judgezoo", types.SimpleNamespace(Judge=Zoo))
    assert make_judge("judgezoo:strong_reject").score([Exchange("r", "x")] * 3) == [
        0.25,
        None,
        None,
    ]


def test_unknown_judges_and_missing_extras_say_what_to_do(monkeypatch):
    with pytest.raises(AttackPlaneError, match="refusal_phrases"):
        make_judge("refusal_phrase")
    monkeypatch.setitem(sys.modules, "judgezoo", None)
    with pytest.raises(AttackPlaneError, match="judges"):
        make_judge("judgezoo:strong_reject")
