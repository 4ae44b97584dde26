"""A wheel, installed outside the clone, runs on its own: its commands, its API, its data files.

The dependencies come from the environment that runs the tests; nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.test_imports import FLOORS

ROOT = Path(__file__).parent.parent
QUICKSTART = """
import attack_plane as ap
assert ap.__file__.startswith({prefix!r}), ap.__file__
model = ap.load("embedded")
config = ap.GCGConfig(num_steps=2, search_width=8, topk=16)
request = ap.behaviours(label="harmful", splits="test")[0]
result = ap.gcg(model, request, config=config)
wrapped = ap.templates(request)
assert len(ap.replay([result], model, max_new_tokens=2)) == 1
harmful, harmless = (ap.behaviours(label=k, splits="train")[:6] for k in ("harmful", "harmless"))
directions = ap.directions(model, harmful, harmless, resamples=20)
ap.plot_plane(ap.project([result, *wrapped], directions)).savefig("plane.png")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    apart = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=apart)  # builds leave files behind
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--wheel-dir", folder, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = [p.parent for p in ROOT.glob("*/**/__init__.py") if ".venv" not in p.parts]
    outside = {"tests", "benchmarks", "build"}
    for package in packages:
        where = package.relative_to(ROOT)
        if where.parts[0] not in outside:
            for file in package.glob("*.py"):
                assert file.relative_to(ROOT).as_posix() in names
    for data in (ROOT / "attacks" / "data", ROOT / "evaluation" / "data"):
        for file in data.glob("*.*"):
            assert file.relative_to(ROOT).as_posix() in names


@pytest.mark.slow
@pytest.mark.embedded
def test_it_runs_in_an_environment_of_its_own(wheel, embedded, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)

    def call(*command):
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = tmp_path / "env" / "bin" / "attack-plane"
    assert "embedded" in call(program, "models")
    table = call(program, "gcg", "--limit", "1", "--steps", "2", "--run", "runs/first")
    assert "gcg" in table and (tmp_path / "runs" / "first" / "attacks.jsonl").exists()
    call(python, "-c", QUICKSTART.format(prefix=str(site)))
    assert (tmp_path / "plane.png").stat().st_size > 10_000


def test_every_package_of_the_house_is_in_the_wheel():
    listed = ConfigParser()
    listed.read(ROOT / "setup.cfg")
    packages = set(listed["options"]["packages"].split())
    rooms = {*FLOORS} - {"cli", "attack_plane"}
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in rooms
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert packages == there
