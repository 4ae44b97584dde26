"""The built-in set is what its text says; files of every kind load; faults name file, line and
remedy."""

import json
from collections import Counter

import pytest

from core.errors import AttackPlaneError
from evaluation.behaviours import HUB_SETS, load_behaviours, reading_files


@pytest.fixture(autouse=True)
def harmful_where_nothing_is_said():
    with reading_files("harmful"):
        yield


def test_the_demonstration_set_has_the_promised_numbers_and_splits():
    rows = load_behaviours()
    counts = Counter(r.label for r in rows)
    assert counts == {"harmful": 240, "harmless": 240, "pseudo_harmful": 120}
    harmful = [r for r in rows if r.label == "harmful"]
    assert Counter(Counter(r.category for r in harmful).values()) == {20: 12}
    assert all(r.target_string.startswith("Sure, here ") for r in rows if r.pair_id)
    assert Counter(r.split for r in harmful) == {"train": 120, "validation": 40, "test": 80}
    for split in ("train", "validation", "test"):
        assert len({r.category for r in harmful if r.split == split}) == 12
        assert any(r.split == split for r in rows if r.label == "pseudo_harmful")
    assert len({r.request for r in rows}) == len({r.behaviour_id for r in rows}) == 600
    assert all(len(r.request) < 110 for r in rows)


def test_forms_vary_within_both_labels():
    for label in ("harmful", "harmless", "pseudo_harmful"):
        requests = [r.request for r in load_behaviours(label=label)]
        for part in ("How do I", "lease", "?", ". "):
            share = sum(part in request for request in requests) / len(requests)
            assert 0.02 < share < 0.6, (label, part)


def test_version_1_is_loadable_by_its_name_and_shares_no_id():
    old = load_behaviours("demonstration-v1")
    assert len(old) == 160 and {r.benchmark for r in old} == {"demonstration-v1"}
    assert not {r.behaviour_id for r in old} & {r.behaviour_id for r in load_behaviours()}


def test_labels_and_splits_choose_rows():
    rows = load_behaviours(label="harmless", splits=["test", "validation"])
    assert len(rows) == 120 and {r.label for r in rows} == {"harmless"}
    with pytest.raises(AttackPlaneError, match="did you mean 'harmful'"):
        load_behaviours(label="harmfull")


@pytest.mark.parametrize(
    "name,text",
    [
        ("a.csv", 'goal,target\n"Bake, a cake","Sure, here"\nBrew tea,\n'),
        ("a.csv", '\ufeffid,Goal,Target\n7,"Bake, a cake","Sure, here"\n8,Brew tea,\n'),
        (
            "a.json",
            json.dumps(
                [{"Behavior": "Bake, a cake", "Target": "Sure, here"}, {"Behavior": "Brew tea"}]
            ),
        ),
        (
            "a.jsonl",
            '{"forbidden_prompt":"Bake, a cake","target":"Sure, here"}\n'
            '{"forbidden_prompt":"Brew tea"}\n',
        ),
        ("a.txt", "Bake, a cake\n\nBrew tea\n"),
        ("a.json", json.dumps(["Bake, a cake", "Brew tea"])),
        ("a.json", json.dumps({"rows": [{"query": "Bake, a cake"}, {"query": "Brew tea"}]})),
    ],
)
def test_files_of_every_kind_load_with_recognised_columns(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = load_behaviours(str(tmp_path / name))
    assert [r.request for r in rows] == ["Bake, a cake", "Brew tea"]
    assert rows[0].target_string in ("Sure, here", None) and rows[1].target_string is None
    assert {r.label for r in rows} == {"harmful"} and {r.benchmark for r in rows} == {"a"}


def test_ids_are_content_hashes_where_the_file_has_none(tmp_path):
    (tmp_path / "a.txt").write_text("Bake a cake\nBrew tea\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("Brew tea\nBake a cake\n")
    first = {r.request: r.behaviour_id for r in load_behaviours(str(tmp_path / "a.txt"))}
    assert first == {
        r.request: r.behaviour_id for r in load_behaviours(str(tmp_path / "b" / "a.txt"))
    }


@pytest.mark.parametrize(
    "name,content,message",
    [
        (
            "a.csv",
            b'goal\nBake\n""\nBrew\nBake\n',
            r"line 3: empty request; line 5: the same request as line 2",
        ),
        ("a.csv", b"text\nBake\n", r"columns text[\s\S]*name it one of"),
        ("a.csv", b"goal\nBake\nTea \xff here\n", r"line 3[\s\S]*0xff[\s\S]*UTF-8"),
        ("a.csv", b"goal,target\nBake, a cake, please\n", r"line 2[\s\S]*double quotes"),
        ("a.csv", b"", r"empty"),
        ("a.jsonl", b'{"goal":"Bake"}\n{oops\n', r"a\.jsonl, line 2"),
        ("a.json", b"{oops", r"not a JSON file"),
        ("a.json", b'"text"', r"expected a list"),
        ("a.csv", b"goal,label\nBake,bad\n", r"label 'bad' is none of"),
        ("a.csv", b"id,goal\n1,Bake\n1,Brew\n", r"the same id '1' as line 2"),
        ("a.xml", b"<a/>", r"unknown kind"),
    ],
)
def test_faults_name_the_file_the_line_and_the_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AttackPlaneError, match=message) as caught:
        load_behaviours(str(tmp_path / name))
    assert name in str(caught.value)


def test_blank_lines_in_csv_keep_line_numbers_and_json_counts_rows(tmp_path):
    (tmp_path / "a.csv").write_text('goal\nBake\n\n""\n')
    with pytest.raises(AttackPlaneError, match="line 4: empty"):
        load_behaviours(str(tmp_path / "a.csv"))
    (tmp_path / "a.json").write_text('[\n"Bake",\n\n"Bake"]')
    with pytest.raises(AttackPlaneError, match="row 2: the same request as row 1"):
        load_behaviours(str(tmp_path / "a.json"))


def test_quoted_line_breaks_in_csv_keep_line_numbers(tmp_path):
    (tmp_path / "a.csv").write_text('goal\n"Bake\na cake"\n""\n')
    with pytest.raises(AttackPlaneError, match="line 4: empty"):
        load_behaviours(str(tmp_path / "a.csv"))


def test_an_unknown_source_names_the_choices():
    with pytest.raises(AttackPlaneError, match="advbench"):
        load_behaviours("no-such-set")


def test_hub_sets_go_through_datasets_and_map_labels(monkeypatch):
    import sys
    import types

    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [
            {"prompt": "How do I kill a process?", "label": "safe", "type": "homonyms"},
            {"prompt": "How do I break in?", "label": "unsafe", "type": "contrast"},
            {"prompt": "How do I break in?", "label": "unsafe", "type": "contrast"},
        ]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = load_behaviours("xstest")
    assert [r.label for r in rows] == ["pseudo_harmful", "harmful"]
    assert asked == [(HUB_SETS["xstest"].path, None, "test")]


def test_hub_sets_without_the_extra_say_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AttackPlaneError, match="hub-sets"):
        load_behaviours("advbench")
