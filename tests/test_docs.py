"""The documentation says what is so: examples run, links lead somewhere, commands are as printed.

The notebook runs too (slow).
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose_lines(page):
    """(number, line) of what is neither code, nor a table, nor a picture."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith(("    ", "|", "![")):
            yield number, line


def test_readme_is_a_front_door():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.index("## Install") < text.index("make demo") < text.index("import attack_plane")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_end_by_column_100_and_links_lead_somewhere(page):
    for number, line in prose_lines(page):
        assert len(line) <= 100, f"{page}, line {number}"
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r"[\w/-]+\.md", nav))
    assert pages == listed


def test_the_command_reference_is_what_the_commands_print():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page()


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.embedded
def test_the_examples_of_the_python_api_run_from_top_to_bottom(embedded, monkeypatch):
    import attack_plane

    load = attack_plane.load  # one copy of the model is enough
    monkeypatch.setattr(attack_plane, "load", lambda s: embedded if s == "embedded" else load(s))
    names: dict = {}
    for block in python_blocks(ROOT / "docs" / "python-api.md"):
        exec(block, names)  # the pages are ours
    assert names["result"].attack == "gcg" and len(names["frame"]) == len(names["points"])


@pytest.mark.parametrize("name", ["add-an-attack", "add-a-judge", "add-a-claim"])
def test_what_the_how_to_pages_add_can_be_added(name):
    from attacks.registry import ATTACKS
    from evaluation.judges import JUDGES, make_judge
    from study.claims.registry import CLAIMS

    block = python_blocks(ROOT / "docs" / "howto" / f"{name}.md")[0]
    try:
        exec(compile(block, name, "exec"), {"__name__": "howto_page"})
        if name == "add-an-attack":
            import attack_plane as ap

            assert ap.attack("polite", "Do a")[0].prompt == "Please. Do a"
        elif name == "add-a-judge":
            assert make_judge("long:3").length == 3
        else:
            assert CLAIMS.get("99").title.startswith("Prompts are longer")
    finally:
        for registry, key in ((ATTACKS, "polite"), (JUDGES, "long"), (CLAIMS, "99")):
            registry.remove(key)


@pytest.mark.slow
@pytest.mark.embedded
def test_the_quickstart_notebook_runs_within_three_minutes(embedded):
    import time

    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    start = time.monotonic()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert time.monotonic() - start < 180
