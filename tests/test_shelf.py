"""Models that stay loaded between stages: each once, the oldest goes first, none too many."""

from __future__ import annotations

import click
import pytest

from commands.options import open_model
from core.shelf import Shelf, _Kept

FAMILIES = ("qwen2", "llama", "gemma2")


def _size(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.model.parameters())


@pytest.fixture
def specs(tiny_folders) -> list[str]:
    return [str(tiny_folders[family]) for family in FAMILIES]


def _opened(shelf: Shelf, specs: list[str]) -> None:
    for spec in specs:  # as stages do: ask, use, release
        handle = shelf(spec)
        assert handle.loaded.spec == spec
        handle.release()


def test_each_is_loaded_once_where_there_is_room(specs):
    told = []
    shelf = Shelf(told.append)
    for _ in range(3):
        _opened(shelf, specs)
    assert [m.spec for m in told] == specs


def test_the_one_asked_for_longest_ago_goes_first(specs):
    told = []
    probe = Shelf()
    sizes = [_size(probe(spec).loaded) for spec in specs]
    shelf = Shelf(told.append, most=sum(sizes[:2]) + max(sizes[:2]) - 1)  # two, and not a third
    _opened(shelf, [specs[0], specs[1], specs[0], specs[2], specs[0], specs[1]])
    names = [FAMILIES[specs.index(m.spec)] for m in told]
    assert names[:3] == ["qwen2", "llama", "gemma2"]
    assert names[3:] == ["llama"]  # it went for gemma2; qwen2, which was asked for since, did not


def test_room_is_made_before_the_next_one_is_loaded(specs, monkeypatch):
    kept = []
    shelf = Shelf(most=0)
    plain = _Kept._load

    def load(handle):
        kept.append([h.bytes for h in shelf._handles.values() if h.bytes])
        return plain(handle)

    monkeypatch.setattr(_Kept, "_load", load)
    _opened(shelf, specs)
    assert kept == [[], [], []]
    assert shelf(specs[-1]).bytes > 0  # one alone may be larger than the room


def test_a_model_that_went_is_loaded_again_and_is_the_same(specs):
    shelf = Shelf(most=0)
    first = shelf(specs[0])
    before = first.loaded
    _opened(shelf, specs[1:])
    assert first.bytes == 0
    assert first.loaded is not before
    assert first.loaded.fingerprint == before.fingerprint


def test_a_command_has_one_shelf_and_the_next_another(specs, capsys):
    with click.Context(click.Command("one")) as root, click.Context(root.command, parent=root):
        first = open_model(specs[0])
        assert first.loaded and open_model(specs[0]) is first
    with click.Context(click.Command("two")):
        assert open_model(specs[0]) is not first
    assert capsys.readouterr().out.count(f"{specs[0]}: ") == 1
