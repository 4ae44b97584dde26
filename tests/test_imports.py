"""Who may import whom: the rule of the design, held by walking the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "core",
    "evaluation",
    "attacks",
    "transfer",
    "geometry",
    "training",
    "interchange",
    "plots",
    "benchmarks",
)
ALLOWED = {
    "core": set(),
    "evaluation": {"core"},
    "attacks": {"core"},
    "geometry": {"core"},
    "interchange": {"core"},
    "plots": {"core"},
    "transfer": {"core", "evaluation"},
    "training": {"core", "attacks", "geometry"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_the_design_allows(room):
    for path in (ROOT / room).glob("**/*.py"):
        ours = (imported(path) & {*ROOMS, "cli", "commands", "pipeline"}) - {room}
        assert ours <= ALLOWED[room], f"{path}: {ours - ALLOWED[room]}"


def test_nothing_imports_benchmarks_or_the_command_line():
    for room in ALLOWED:
        for path in (ROOT / room).glob("**/*.py"):
            assert not imported(path) & {"benchmarks", "cli", "commands", "pipeline", "tests"}, path


def test_from_pretrained_stands_only_in_the_model_modules():
    # peft's adapters are opened in core/models.py too; GGUF files are converted beside it; the
    # reference engine's worker is a program of another environment
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("*/*.py")
        if path.parent.name in ROOMS and ".from_pretrained(" in path.read_text()
    }
    assert found <= {"core/models.py", "core/embedded.py", "attacks/reference_worker.py"}


def test_importing_a_module_sets_up_no_logging_and_the_command_line_starts_without_torch():
    import subprocess
    import sys

    code = (
        "import sys, logging, cli; assert 'torch' not in sys.modules; assert not "
        "logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_stay_short():
    long = {
        str(p.relative_to(ROOT)): n
        for room in [*ALLOWED, "commands", "pipeline"]
        for p in (ROOT / room).glob("*.py")
        if (n := len(p.read_text().splitlines())) > 350
    }
    assert not long
