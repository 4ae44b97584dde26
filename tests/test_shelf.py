"""Models that stay loaded between stages: each once, the oldest goes first, none too many."""

from __future__ import annotations

import gc

import click
import pytest

from commands.options import open_model
from core.shelf import Shelf, _bytes
from tests.conftest import make_model

FAMILIES = ("qwen2", "llama", "gemma2")


@pytest.fixture
def specs(tiny_folders) -> list[str]:
    return [str(tiny_folders[family]) for family in FAMILIES]


def _stage(shelf: Shelf, specs: list[str]) -> None:
    """Asks for each model, uses it, and lets it go."""
    for spec in specs:
        handle = shelf(spec)
        assert handle.loaded.spec == spec
        handle.release()
    gc.collect()


def _names(told, specs) -> list[str]:
    return [FAMILIES[specs.index(model)] for model in told]


@pytest.fixture
def told() -> list[str]:
    return []


def _shelf(told: list[str], most: int | None = None) -> Shelf:
    return Shelf(lambda model: told.append(model.spec), most)


def test_each_is_loaded_once_where_there_is_room(specs, told):
    shelf = _shelf(told)
    for _ in range(3):
        _stage(shelf, specs)
    assert told == specs


def test_the_one_asked_for_longest_ago_goes_first(specs, told):
    sizes = [_bytes(Shelf()(spec).loaded) for spec in specs]
    shelf = _shelf(told, sum(sizes) - 1)
    _stage(shelf, [specs[0], specs[1], specs[0], specs[2], specs[0], specs[1]])
    # llama went for gemma2; qwen2, which was asked for since, did not
    assert _names(told, specs) == ["qwen2", "llama", "gemma2", "llama"]


def test_what_is_larger_than_the_room_goes_with_its_stage_and_nothing_goes_for_it(specs, told):
    sizes = {spec: _bytes(Shelf()(spec).loaded) for spec in specs}
    small, large = min(specs, key=sizes.get), max(specs, key=sizes.get)
    assert sizes[small] < sizes[large]
    shelf = _shelf(told, sizes[large] - 1)
    for _ in range(2):
        _stage(shelf, [small, large])
    assert told == [small, large, large]


def test_two_models_in_use_at_once_are_loaded_once_each_whatever_the_room(specs, told):
    shelf = _shelf(told, 0)
    first, second = shelf(specs[0]), shelf(specs[1])
    for _ in range(3):
        assert first.loaded is not second.loaded
    assert shelf(specs[0]).loaded is first.loaded
    assert told == specs[:2]


def test_of_files_that_have_changed_the_model_is_loaded_anew(tmp_path, told):
    spec = str(make_model(tmp_path / "model", "llama", seed=0))
    shelf = _shelf(told)
    before = shelf(spec).loaded
    make_model(tmp_path / "model", "llama", seed=1)
    after = shelf(spec).loaded
    assert after.fingerprint != before.fingerprint and told == [spec, spec]


def test_a_command_has_one_shelf_and_the_next_another(specs, capsys):
    with click.Context(click.Command("one")) as root, click.Context(root.command, parent=root):
        first = open_model(specs[0]).loaded
        assert open_model(specs[0]).loaded is first
    with click.Context(click.Command("two")):
        assert open_model(specs[0]).loaded is not first
    assert capsys.readouterr().out.count(f"{specs[0]}: ") == 2
