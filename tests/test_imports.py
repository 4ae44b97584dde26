"""Who may import whom: the floors of the design, held by walking the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    "core",
    "interchange",
    "plots",
    "evaluation",
    "geometry",
    "attacks",
    "training",
    "transfer",
    "pipeline",
    "study",
    "attack_plane",
    "commands",
    "cli",
)
"""From the ground up: a room knows only the rooms below it. What stands beside the house, such as
benchmarks and tests, may know all of it and is known by none."""
APART = {"interchange": {"plots"}, "plots": {"interchange"}, "attack_plane": {"commands"}}
"""Rooms that do not know each other although one stands on a lower floor."""
BESIDE = {"benchmarks", "tests", "examples"}


def files_of(room):
    folder = ROOT / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_the_rooms_below_it(room):
    below = set(FLOORS[: FLOORS.index(room)]) - APART.get(room, set())
    for path in files_of(room):
        ours = imported(path) & {*FLOORS, *BESIDE} - {room}
        assert ours <= below, f"{path}: {ours - below}"


def test_every_package_of_the_house_has_a_floor():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms - {"tests", "benchmarks"} <= set(FLOORS)


def test_no_two_modules_of_a_room_import_each_other_in_a_circle():
    graph = {}
    for room in FLOORS:
        for path in files_of(room):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            at_import = ast.parse(path.read_text()).body
            graph[name] = {
                other
                for node in at_import
                if isinstance(node, ast.ImportFrom) and node.module
                for other in [node.module, *(f"{node.module}.{n.name}" for n in node.names)]
            }
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*above, name))
        done.add(name)

    for name in graph:
        if not name.endswith("judges"):  # the package's front door imports its registry only
            visit(name, ())


def test_from_pretrained_stands_only_where_models_are_opened():
    found = {
        path.relative_to(ROOT).as_posix()
        for room in FLOORS
        for path in files_of(room)
        if ".from_pretrained(" in path.read_text()
    }
    # the worker is a program of another environment
    assert found <= {"core/weights.py", "core/embedded.py", "attacks/data/nanogcg_worker.py"}


def test_every_from_pretrained_refuses_code_from_files():
    for name in ("core/weights.py", "core/embedded.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                owner = getattr(node.func.value, "id", "")
                words = {word.arg: word.value for word in node.keywords}
                if owner.startswith("Auto"):
                    assert words["trust_remote_code"].value is False, f"{name}: {node.lineno}"


def test_importing_sets_up_no_logging_and_the_front_doors_load_no_torch():
    code = (
        "import sys, logging, cli, attack_plane\n"
        "import commands.root as root\n"
        "root.attack_commands()\n"
        "assert 'torch' not in sys.modules\n"
        "assert not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_commands_print():
    for room in FLOORS[: FLOORS.index("commands")]:
        for path in files_of(room):
            if "data" in path.parts:
                continue
            text = path.read_text()
            assert "click" not in imported(path), path
            calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
            assert not [c for c in calls if getattr(c.func, "id", "") == "print"], path


def test_files_and_functions_stay_short():
    for room in FLOORS:
        for path in files_of(room):
            lines = path.read_text().splitlines()
            limit = 350
            assert len(lines) <= limit, f"{path}: {len(lines)} lines"
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.FunctionDef) and room != "commands":
                    docstring = ast.get_docstring(node) is not None
                    first = node.body[1] if docstring and len(node.body) > 1 else node.body[0]
                    body = (node.end_lineno or 0) - first.lineno + 1
                    assert body <= 60, f"{path}: {node.name} has {body} lines"
