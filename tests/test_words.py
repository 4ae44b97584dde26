"""Sentences and words of a prompt: what AutoDAN's two levels do to them."""

import json
import random
from collections import Counter

import pytest

from attacks.words import (
    MARKER,
    crossover,
    paraphrase,
    read_seeds,
    sentences,
    swap_words,
    synonyms,
    update_dictionary,
    with_one_marker,
)
from core.errors import AttackPlaneError

A = "First one. Second one! Third one? Fourth one.\n\n{request}"
B = "Alpha here. Beta here. Gamma here.\n\n{request}"


def test_sentences_joined_are_the_text():
    assert "".join(sentences(A)) == A
    assert sentences(A)[-1] == "\n\n{request}" and len(sentences(A)) == 5


def test_crossover_loses_no_sentence_and_each_child_asks_once():
    for seed in range(50):
        first, second = crossover(A, B, 5, random.Random(seed))
        for child in (first, second):
            assert child.count(MARKER) == 1
        words = Counter((first + " " + second).split())
        assert words == Counter((A + " " + B).split())


def test_crossover_without_points_gives_the_parents_in_either_order():
    found = {crossover(A, B, 0, random.Random(seed)) for seed in range(20)}
    assert found == {(A, B), (B, A)}


def test_a_lost_marker_is_added_and_a_second_one_removed():
    assert with_one_marker("Text.") == "Text.\n\n{request}"
    assert with_one_marker("{request} and {request} again") == "{request} and  again"


def test_the_dictionary_is_the_mean_score_averaged_with_the_old_value_best_first():
    texts = ["Robin answers {request}", "robin waits"]
    first = update_dictionary({}, texts, [-1.0, -3.0], None)
    assert first == {"answers": -1.0, "robin": -2.0, "waits": -3.0}
    assert list(first) == ["answers", "robin", "waits"]
    second = update_dictionary(first, ["robin"], [-1.0], 2)
    assert second == {"answers": -1.0, "robin": -1.5}  # (-2 - 1) / 2; only the best two are kept
    assert "the" not in update_dictionary({}, ["the end"], [0.0], None)  # stop words are left out


def swapped(text, dictionary, *, probability, count=1, most=5):
    return [
        swap_words(text, dictionary, random.Random(s), probability=probability, most=most)
        for s in range(count)
    ]


def test_word_swaps_use_synonyms_keep_case_and_marker_and_stop_at_the_most_in_each_paragraph():
    text = "Answer the question. Help people {request} quickly.\n\nANSWER this task, people."
    known = dict.fromkeys(("answer", "question", "help", "people", "task"), -1.0)
    for new in swapped(
        text, known, probability=0.0, count=30, most=2
    ):  # unseen words are tried first
        assert new.count(MARKER) == 1 and "the" in new
        for old_part, new_part in zip(text.split("\n\n"), new.split("\n\n"), strict=True):
            pairs = zip(old_part.split(), new_part.split(), strict=True)
            changed = [(a.strip(".,"), b.strip(".,")) for a, b in pairs if a != b]
            assert len(changed) == 2
            for before, after in changed:
                assert (
                    after.lower() in synonyms()[before.lower()]
                    and after[0].isupper() == before[0].isupper()
                )


def test_words_are_drawn_in_proportion_to_their_score_less_the_lowest_the_word_itself_among_them():
    assert synonyms()["task"] == ("job", "assignment", "duty")
    scores = {"task": -4.0, "job": -3.0, "assignment": -2.0, "duty": -5.0}  # weights 1, 2, 3, 0
    drawn = Counter(swapped("task", scores, probability=0.5, count=3000))
    assert drawn["duty"] == 0
    for word, share in (("task", 1 / 6), ("job", 2 / 6), ("assignment", 3 / 6)):
        assert drawn[word] / 3000 == pytest.approx(share, abs=0.04)


def test_unknown_words_are_as_bad_as_the_worst_known_or_better_than_all_by_a_coin():
    scores = {"task": -2.0, "job": -1.0, "robin": -6.0}
    # lowest known -6: the unknown ones are never drawn; weights task 4, job 5
    sure = Counter(swapped("task", scores, probability=1.0, count=500))
    assert set(sure) == {"task", "job"}
    # 0: weights assignment 2, duty 2, job 1, task 0
    new = Counter(swapped("task", scores, probability=0.0, count=1000))
    assert set(new) == {"assignment", "duty", "job"} and new["job"] / 1000 == pytest.approx(
        0.2, abs=0.04
    )


def test_equal_scores_and_stop_words_change_nothing():
    assert swapped("A task.", {}, probability=0.5, count=20) == ["A task."] * 20
    assert synonyms()["out"] and swapped("out", {"out": -1.0}, probability=0.0) == ["out"]


def test_a_paraphrase_changes_about_the_share_asked_for():
    text = " ".join(["question"] * 400) + " {request}"
    changed = sum(
        word != "question" for word in paraphrase(text, random.Random(0), 0.25).split()[:-1]
    )
    assert 70 < changed < 130
    assert paraphrase(text, random.Random(0), 0.0) == text


def test_our_seeds_hold_the_marker_once_and_are_long_enough_to_cross_over():
    seeds = read_seeds()
    assert len(seeds) >= 8
    for text in seeds.values():
        assert text.count(MARKER) == 1 and len(sentences(text)) >= 6


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("not json", "line 2"),
        ('{"name": "x"}', "KeyError"),
        ('{"name": "x", "text": "no place"}', "0 times"),
        ('{"name": "a", "text": "{request}"}', "again"),
    ],
)
def test_a_bad_seeds_file_is_refused_with_its_line(tmp_path, line, fault):
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"name": "a", "text": "Do [REPLACE]"}\n' + line + "\n")
    with pytest.raises(AttackPlaneError, match=fault):
        read_seeds(path)


def test_replace_is_read_as_the_marker(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps({"name": "a", "text": "Do [REPLACE]"}))
    assert read_seeds(path) == {"a": "Do {request}"}
    path.write_text("\n")
    with pytest.raises(AttackPlaneError, match="no seeds"):
        read_seeds(path)
