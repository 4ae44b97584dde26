"""One file adds an attack, a judge or a claim: everything that reads the registries sees it."""

import json

import pytest
from click.testing import CliRunner

from attacks.plain import PlainConfig
from attacks.registry import ATTACKS, Attack, find_attack
from cli import cli
from core.errors import AttackPlaneError
from core.files import read_rows
from core.registry import Registry, load_plugin
from evaluation.judges import JUDGES, make_judge
from study.claims.registry import CLAIMS

ATTACK = '''
"""Ask politely."""
from collections.abc import Iterator
from dataclasses import dataclass

from attacks.registry import ATTACKS, Attack
from attacks.result import prompt_result
from core.settings import check_settings, setting


@dataclass(frozen=True)
class PoliteConfig:
    times: int = setting(1, "How often please is said.", low=1)

    def __post_init__(self):
        check_settings(self, "polite")


def run(bench, task, config):
    request = task.behaviour.request
    yield prompt_result(task.behaviour, "polite", "Please. " * config.times + request)


ATTACKS.add(
    Attack(
        name="polite",
        summary="Say please.",
        config=PoliteConfig,
        run=run,
        cost=lambda config, count, speed: 60.0 * count,
        examples=("polite --times 2",),
    )
)
'''
JUDGE = '''
"""Success is a long reply; LENGTH is in characters."""
from evaluation.judges import JUDGES, JudgeKind


class Long:
    threshold = 0.5

    def __init__(self, length):
        self.name, self.length = f"long:{length}", int(length)

    def score(self, exchanges):
        return [float(len(e.reply) >= self.length) for e in exchanges]


JUDGES.add(JudgeKind("long", Long, "LENGTH"))
'''
CLAIM = '''
"""Claim 99: the model has layers."""
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import mean_check


def measure(evidence):
    layers = [float(evidence.study.loaded.n_layers)] * 8
    return TEST.claim(evidence, (mean_check("layers", layers, unit="layers"),), "a toy")


TEST = CLAIMS.add(ClaimTest(number=99, title="It has layers", measure=measure))
'''


@pytest.fixture
def plugins(tmp_path):
    """The three files, and their declarations gone afterwards."""
    paths = {}
    for name, text in (("polite", ATTACK), ("long", JUDGE), ("layers", CLAIM)):
        paths[name] = tmp_path / f"toy_{name}.py"
        paths[name].write_text(text)
    yield paths
    ATTACKS.remove("polite")
    JUDGES.remove("long")
    CLAIMS.remove("99")


SMALL = "demonstration-v1"


def call(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_an_attack_in_one_file_has_a_command_a_sweep_an_estimate_and_the_api(
    plugins, tmp_path, tiny_folders
):
    model, plugin = tiny_folders["qwen2"], ("--plugin", plugins["polite"])
    assert "polite" in call(*plugin, "--help")
    assert "How often please is said" in call(*plugin, "polite", "--help")
    output = call(*plugin, "polite", "--run", tmp_path / "run", "--limit", 1, "--times", 2)
    assert "polite 1" in output
    (tmp_path / "sweep.toml").write_text(f"""
run = "{tmp_path}/swept"
sources = []
targets = ["{model}"]
judges = ["rules"]
[behaviours]
limit = 3
[attacks.polite]
times = 3
[replay]
max_new_tokens = 2
[directions]
contrast = "demonstration-v1"
reply_tokens = 2
resamples = 20
""")
    output = call(*plugin, "sweep", tmp_path / "sweep.toml")
    plan = output[: output.index("estimated time")]
    (line,) = [line.split() for line in plan.splitlines() if line.startswith("polite")]
    assert line == ["polite", "none", "3", "3.0"]  # three prompts, a minute each
    plain, cell = read_rows(tmp_path / "swept" / "matrix.jsonl")
    assert cell["attack"] == "polite" and cell["replays"] == 3
    assert plain["attack"] == "plain" and plain["replays"] == cell["paired"] == 3
    assert "polite" in call("report", "--run", tmp_path / "swept")
    import attack_plane as ap

    (result,) = ap.attack("polite", "Write about tea")
    assert result.prompt == "Please. Write about tea"


def test_a_judge_in_one_file_judges_replies_and_directions(plugins, tmp_path, tiny_folders):
    model, plugin = tiny_folders["qwen2"], ("--plugin", plugins["long"])
    call("templates", "--run", tmp_path / "run", "--limit", 1, "--class", "persona")
    arguments = ("--run", tmp_path / "run", "--target", model, "--max-new-tokens", 4)
    call(*plugin, "transfer", *arguments, "--judge", "long:1")
    assert all(r["judgements"] for r in read_rows(tmp_path / "run" / "replays.jsonl"))
    counts = {}
    for judge in ("long:1", "long:100000"):
        small = ("--model", model, "--resamples", 20, "--judge", judge, "--contrast", SMALL)
        call(*plugin, "directions", "--run", tmp_path / judge, *small)
        (note,) = (tmp_path / judge / "directions").glob("*.harc.json")
        assert json.loads(note.read_text())["sample_counts"]["refusal_positive"] == 48
        counts[judge] = list((tmp_path / judge / "directions").glob("*.zhao.json"))
    # every reply is a success, or every reply a refusal: neither leaves two classes
    assert counts == {"long:1": [], "long:100000": []}


def test_another_judge_changes_the_directions(plugins, tmp_path, tiny_folders):
    load_plugin(plugins["long"])
    model = tiny_folders["qwen2"]
    small = ("--model", model, "--resamples", 20, "--contrast", SMALL)
    call("directions", "--run", tmp_path / "a", *small)
    (row,) = read_rows(tmp_path / "a" / "contrast.jsonl")
    lengths = sorted(len(reply) for reply in row["replies"].values())
    for name, at in (("low", 24), ("high", 72)):
        judge = f"long:{lengths[at]}"
        call(
            "directions", "--run", tmp_path / name, *small, "--judge", judge, "--estimator", "zhao"
        )
    counts = []
    for name in ("low", "high"):
        (note,) = (tmp_path / name / "directions").glob("*.zhao.json")
        counts.append(json.loads(note.read_text())["sample_counts"]["refusal_positive"])
    assert 0 < counts[0] < counts[1] < 96


def test_a_claim_in_one_file_is_measured_with_the_others(plugins, tmp_path, tiny_folders):
    model, plugin = tiny_folders["qwen2"], ("--plugin", plugins["layers"])
    small = ("--run", tmp_path, "--model", model, "--resamples", 20, "--controls", 2)
    output = call(*plugin, "claims", *small, "--claims", 99)
    assert "99. It has layers" in output and "holds" in output
    (row,) = read_rows(tmp_path / "claims.jsonl")
    assert row["number"] == 99 and row["checks"][0]["value"] == 3.0


def test_forms_of_an_attack_are_found_and_unknown_names_are_named():
    attack, fixed = find_attack("autodan_ga")
    assert attack.name == "autodan" and fixed == {"variant": "ga"}
    with pytest.raises(AttackPlaneError, match="did you mean 'gcg'"):
        find_attack("gcgg")
    with pytest.raises(AttackPlaneError, match="did you mean 'refusal_phrases'"):
        make_judge("refusal_phrase")
    with pytest.raises(AttackPlaneError, match="write classifier:MODEL"):
        make_judge("classifier")


def test_two_things_cannot_have_one_name_and_a_broken_plugin_is_told(tmp_path):
    class Thing:
        def __init__(self, name):
            self.name = name

    registry = Registry("thing", "core")
    one = registry.add(Thing("a"))
    assert registry.add(one) is one
    with pytest.raises(AttackPlaneError, match="two things have one name"):
        registry.add(Thing("a"))
    with pytest.raises(AttackPlaneError, match="no such plugin"):
        load_plugin(tmp_path / "absent.py")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(AttackPlaneError, match="ZeroDivisionError"):
        load_plugin(tmp_path / "broken.py")
    output = call("--plugin", tmp_path / "broken.py", "models", code=1)
    assert "the plugin cannot be loaded" in output


def test_every_attack_says_what_it_is_and_its_presets_make_configs():
    for name, attack in ATTACKS.all().items():
        assert attack.summary.endswith(".") and attack.sources in ("none", "one", "several"), name
        for preset in attack.presets:
            attack.make_config({}, where="test", preset=preset)
        assert attack.on_cpu in attack.presets or len(attack.presets) == 1, name
        for form in attack.forms:
            assert find_attack(form)[0] is attack
        if attack.command:
            assert attack.examples, name
    assert ATTACKS.all()["gcg"].on_cpu == "fast"
    assert "auto: fast on a CPU" in " ".join(call("gcg", "--help").split())
    assert "auto: quick on a CPU" in " ".join(call("adc", "--help").split())


def test_every_file_that_declares_is_found_and_no_other_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_things"
    package.mkdir()
    (package / "__init__.py").write_text("")
    head = "from types import SimpleNamespace as Thing\nfrom some_things import ALL as THINGS\n"
    (package / "one.py").write_text(f'{head}THINGS.add(Thing(name="first"))\n')
    (package / "two.py").write_text(f'{head}OWN = THINGS.add(Thing(name="second"))\n')
    (package / "slow.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import some_things

    some_things.ALL = Registry("thing", "some_things")
    assert sorted(some_things.ALL.all()) == ["first", "second"]
    assert some_things.ALL.get("second").name == "second"


def test_a_preset_with_an_unknown_setting_is_refused_when_it_is_declared():
    with pytest.raises(AttackPlaneError, match="num_stepz"):
        Attack(
            name="mine",
            summary="Mine.",
            config=PlainConfig,
            run=lambda *_: iter(()),
            presets={"paper": {}, "quick": {"num_stepz": 3}},
        )
