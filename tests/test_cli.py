"""The command line, end to end on a tiny model: every stage, errors without tracebacks, exit
codes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli import cli

ROOT = Path(__file__).parent.parent
RULES = ("--judge", "rules")  # the default judge reads replies with a real model


def call(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def small_gcg(model, run, *more):
    return (
        "gcg",
        "--model",
        model,
        "--run",
        run,
        "--steps",
        4,
        "--width",
        6,
        "--topk",
        8,
        "--limit",
        2,
        "--suffix-length",
        4,
        "--save-every",
        1,
        *more,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folders):
    """One run through all stages on a tiny model, shared by the tests below."""
    path = tmp_path_factory.mktemp("cli") / "run"
    model = tiny_folders["qwen2"]
    outputs = {"gcg": call(*small_gcg(model, path))}
    outputs["transfer"] = call(
        "transfer", "--run", path, "--target", model, "--max-new-tokens", 3, *RULES
    )
    outputs["directions"] = call("directions", "--run", path, "--model", model, "--resamples", 20)
    outputs["plane"] = call("plane", "--run", path, "--target", model)
    return path, model, outputs


def test_no_bar_is_drawn_where_standard_error_is_no_terminal(run):
    _, _, outputs = run
    assert not [stage for stage, text in outputs.items() if "%|" in text]


def test_the_stages_write_the_run_folder_of_the_design(run):
    path, _, outputs = run
    for name in (
        "manifest.json",
        "attacks.jsonl",
        "replays.jsonl",
        "plane.csv",
        "plane.jsonl",
        "plane.parquet",
        "plane.png",
        "plane.html",
        "matrix.jsonl",
    ):
        assert (path / name).stat().st_size > 0, name
    assert list((path / "directions").glob("*.harc.safetensors"))
    assert (
        "ASR" in outputs["transfer"]
        and "cos(H,R)" in outputs["directions"]
        and "gcg" in outputs["plane"]
    )
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["stages"]) == {
        *("plain", "initial_suffix", "random_suffix", "gcg"),
        *("transfer", "directions", "plane"),
    }
    assert manifest["history"][0]["torch"] and manifest["models"]


def test_a_repeated_command_does_only_what_is_missing(run, monkeypatch):
    path, model, _ = run
    for name in (
        "transfer.replay.complete",
        "pipeline.contrast_reading.complete",
        "attacks.gcg_search.run_gcg",
        "pipeline.directions.estimate",
        "core.models.load_base",  # no weights are loaded either
    ):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("made again"))
    before = {p.name: p.read_bytes() for p in path.glob("*.jsonl")}
    call(*small_gcg(model, path))
    call("transfer", "--run", path, "--target", model, "--max-new-tokens", 3, *RULES)
    call("directions", "--run", path, "--model", model, "--resamples", 20)
    call("plane", "--run", path, "--target", model)
    assert {p.name: p.read_bytes() for p in path.glob("*.jsonl")} == before


def test_verify_passes_and_finds_a_tampered_artifact(run, tmp_path):
    path, _, _ = run
    assert "8 of 8 artifacts hold" in call("verify", "--run", path)
    copy = tmp_path / "copy"
    copy.mkdir()
    rows = [json.loads(line) for line in (path / "attacks.jsonl").read_text().splitlines()]
    rows[-1]["loss"] += 0.01
    told = {"artifact_id": "x", "source_model": "elsewhere", "provenance": {"format": "jsonl"}}
    rows.insert(2, rows[0] | told)  # an imported one, of a model that is not here
    (copy / "attacks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("manifest.json", "behaviours.jsonl"):
        (copy / name).write_text((path / name).read_text())
    output = call("verify", "--run", copy, code=3)
    assert "7 of 8 artifacts hold" in output and "1 more claim no loss" in output


def test_verify_of_nothing_is_an_error_and_a_prompt_that_cannot_be_rendered_is_a_fault(
    run, tmp_path
):
    path, _, _ = run
    (tmp_path / "manifest.json").write_text((path / "manifest.json").read_text())
    assert "no artifacts" in call("verify", "--run", tmp_path, code=1)
    row = json.loads((path / "attacks.jsonl").read_text().splitlines()[0])
    row["system_prompt"], row["source_model"] = "Be brief.", str(run[1].parent / "gemma3")
    (tmp_path / "attacks.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "behaviours.jsonl").write_text((path / "behaviours.jsonl").read_text())
    output = call("verify", "--run", tmp_path, code=3)
    assert "FAULT" in output and "System role not supported" in output


def test_the_plane_may_be_drawn_anew_at_another_layer(run):
    path, _, _ = run
    call("plane", "--run", path, "--layer", 1)
    layers = {json.loads(line)["layer"] for line in (path / "plane.jsonl").read_text().splitlines()}
    assert layers == {1}
    call("plane", "--run", path)


def test_directions_and_anchors_may_come_from_a_file_with_labels_and_no_splits(run, tmp_path):
    _, model, _ = run
    rows = [
        f"{'Harm' if i % 2 else 'Help'} number {i},{'harmful' if i % 2 else 'harmless'}"
        for i in range(16)
    ]
    (tmp_path / "contrast.csv").write_text("goal,label\n" + "\n".join(rows) + "\n")
    path, file = tmp_path / "run", tmp_path / "contrast.csv"
    call(*small_gcg(model, path))
    call(
        "directions",
        "--run",
        path,
        "--model",
        model,
        "--contrast",
        file,
        "--estimator",
        "harc",
        "--resamples",
        20,
    )
    output = call("plane", "--run", path, "--target", model, "--anchors", file)
    assert "harmless (anchor)  8" in output


def test_show_prints_losses_rates_and_classes(run):
    output = call("show", "--run", run[0])
    for word in ("token fidelity", "ASR", "H moved", "search_width=6"):
        assert word in output


def test_show_sums_up_many_prompts(run, monkeypatch):
    import commands.show

    rows = [json.loads(line) for line in (run[0] / "attacks.jsonl").read_text().splitlines()]
    gcg = [row for row in rows if row["attack"] == "gcg"]
    monkeypatch.setattr(commands.show, "LISTED", 3)
    found = {r["attack"]: r for r in rows_of("show", "--run", run[0]) if r["table"] == "prompts"}
    assert found["gcg"]["prompts"] == found["gcg"]["behaviours"] == len(gcg) == 2
    assert found["gcg"]["loss"] == pytest.approx(sum(r["loss"] for r in gcg) / 2)
    assert sum(r["prompts"] for r in found.values()) == len(rows)
    assert "mean loss" in call("show", "--run", run[0])


def test_a_plane_of_its_own_base_is_shown_once_and_few_prompts_decide_nothing(run):
    path = run[0]
    shown = call("show", "--run", path)
    table = shown[shown.index("wrapper alone") :]
    assert "too few" in table and " own " in table and " base " not in table
    assert (path / "plane.html").read_text().count(", own frame") >= 1
    assert "base frame" not in (path / "plane.html").read_text()


def test_another_configuration_in_the_same_run_is_refused(run):
    path, model, _ = run
    output = call(*small_gcg(model, path, "--seed", 1), code=1)
    assert "gcg.seed: the run has 0, this command 1" in output and "Traceback" not in output


def test_the_plane_of_a_target_without_directions_says_what_to_run(run, tiny_folders):
    output = call(
        "plane", "--run", run[0], "--target", tiny_folders["qwen3"], "--base", run[1], code=1
    )
    assert "estimate its directions in this run first" in output


def test_bad_input_is_a_clean_error(tmp_path):
    assert "forms: embedded" in call("gcg", "--model", "nonsense", code=1)
    assert "no run here" in call("show", "--run", tmp_path / "absent", code=1)
    assert "Usage" in call("transfer", "--run", tmp_path, code=2)


def test_the_reference_engine_refuses_what_it_cannot_do_before_it_writes(tmp_path, tiny_folders):
    arguments = ("--model", tiny_folders["qwen2"], "--run", tmp_path / "run", "--limit", 1)
    bad = call("nanogcg", *arguments, "--option", "buffer_size=four", code=2)
    assert "NAME=JSON" in bad
    bad = call("nanogcg", *arguments, "--option", "buffersize=4", code=1)
    assert "did you mean 'buffer_size'" in bad
    assert "--momentum" in call("nanogcg", *arguments, "--momentum", 0.5, code=2)
    # the same folder takes the mended command
    small = small_gcg(tiny_folders["qwen2"], tmp_path / "run")
    call(*small, "--exact", "--merge", 2, "--momentum", 0.5)


def test_debug_shows_the_error_itself():
    result = CliRunner().invoke(cli, ["--debug", "gcg", "--model", "nonsense"])
    assert type(result.exception).__name__ == "AttackPlaneError"
    nested = CliRunner().invoke(
        cli, ["--debug", "train", "sft", "--model", "nonsense", "--out", "x"]
    )
    assert type(nested.exception).__name__ == "AttackPlaneError"


def test_a_fault_of_ours_is_one_line_that_points_to_debug(monkeypatch):
    monkeypatch.setattr("core.models.parse_spec", lambda text: 1 / 0)
    output = call("gcg", "--model", "embedded", code=1)
    assert "ZeroDivisionError" in output and "--debug" in output and "Traceback" not in output


def walk(command, path=()):
    """(words, command) of every command that does something."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            yield from walk(child, (*path, name))
    else:
        yield path


def test_every_command_has_help_with_an_example_within_100_columns():
    paths = list(walk(cli))
    assert len(paths) > 18
    for path in paths:
        output = call(*path, "--help")
        assert "Example" in output and f"python cli.py {path[0]}" in output, path
        assert max(map(len, output.splitlines())) <= 100, path


def test_models_lists_the_forms(tiny_folders):
    assert "ORG/NAME" in call("models")
    assert "GPT2LMHeadModel, 3 layers" in call("models", tiny_folders["gpt2"])


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path, tiny_folders, monkeypatch):
    from core.store import RunFolder

    model = tiny_folders["qwen2"]
    call(*small_gcg(model, tmp_path / "whole"))
    save = RunFolder.save_state

    def interrupted(self, name, state):
        save(self, name, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", interrupted)
        assert "goes on from here" in call(*small_gcg(model, tmp_path / "stopped"), code=130)
    call(*small_gcg(model, tmp_path / "stopped"))
    name = "attacks.jsonl"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("model,size", [("qwen2", (150, 48)), ("embedded", (14, 12))])
def test_kill_9_ten_times_at_random_moments_gives_the_same_file(
    tmp_path, tiny_folders, request, model, size
):
    if model == "embedded":
        request.getfixturevalue("embedded")
    spec = str(tiny_folders.get(model, model))
    arguments = [
        "--steps",
        str(size[0]),
        "--width",
        str(size[1]),
        "--topk",
        "64",
        "--limit",
        "2",
        "--save-every",
        "2",
    ]

    def start(run):
        command = [sys.executable, "cli.py", "gcg", "--model", spec, "--run", str(run), *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - begun
    expected = (tmp_path / "whole" / "attacks.jsonl").read_bytes()
    generator, kills, runs = random.Random(0), 0, 0
    while kills < 10:  # a run that ends before its next kill is compared, and another is begun
        process = start(tmp_path / f"killed-{runs}")
        state = tmp_path / f"killed-{runs}" / "state"
        try:
            assert process.wait(timeout=generator.uniform(0.1, 0.5) * seconds) == 0
            assert (tmp_path / f"killed-{runs}" / "attacks.jsonl").read_bytes() == expected
            runs += 1
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += any(state.glob("*.json"))  # counts where a behaviour was under way
    assert start(tmp_path / f"killed-{runs}").wait() == 0
    assert (tmp_path / f"killed-{runs}" / "attacks.jsonl").read_bytes() == expected


def test_every_command_can_be_quiet_and_draws_no_bar_into_a_file(tmp_path):
    from core.progress import bar
    from tests.test_hostile import every_command

    for name, command in every_command():
        assert [p.name for p in command.params].count("quiet") == 1, name
    with bar(3, "work", "step") as shown:  # standard error is no terminal here
        assert shown.disable
    listed = CliRunner().invoke(cli, ["attacks", "--quiet"])
    assert listed.exit_code == 0 and "gcg-universal" in listed.output


def rows_of(*arguments):
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_prints_the_rows_of_every_table_and_nothing_else(run):
    path, model, _ = run
    shown = rows_of("show", "--run", path)
    assert {row["table"] for row in shown} == {"attack", "matrix", "classes"}
    assert {r["loss"] for r in shown if r["table"] == "attack"} == {
        json.loads(line)["loss"] for line in (path / "attacks.jsonl").read_text().splitlines()
    }
    reported = rows_of("report", "--run", path)
    assert {r["target_model"] for r in reported} == {str(model)} and "reply" not in reported[0]
    layers = rows_of("directions", "--run", path, "--model", model, "--resamples", 20)
    assert [r["layer"] for r in layers[:3]] == [0, 1, 2] and "null_random_cos" in layers[0]
    assert {r["claim"] for r in rows_of("claims", "--list")} == set(range(1, 22))
    assert "gcg-universal" in {r["attack"] for r in rows_of("attacks")}


def test_a_command_that_prints_a_table_takes_json():
    from tests.test_hostile import every_command

    taking = {name[0] for name, c in every_command() if any(p.name == "json" for p in c.params)}
    sources = (ROOT / "commands").glob("*.py")
    printing = {p.stem for p in sources if "echo_table(" in p.read_text()} - {"output", "attack"}
    assert printing <= taking, printing - taking


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "cli.py", "models"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "error" not in process.communicate()[1]


@pytest.mark.parametrize(
    "arguments",
    [
        *(["show", "--run"], ["report", "--run"], ["models"], ["templates", "--list"]),
        *(["--help"], ["attacks"], ["gcg", "--help"], ["train", "--help"]),
    ],
)
def test_what_only_reads_does_not_wait_for_torch(arguments, tmp_path):
    made = CliRunner().invoke(
        cli, ["templates", "--run", str(tmp_path), "--limit", "1", "--class", "persona"]
    )
    assert made.exit_code == 0
    told = arguments + [str(tmp_path)] * (arguments[-1] == "--run")
    code = (
        "import sys, cli\ntry:\n    cli.cli(sys.argv[1:])\nfinally:\n"
        "    print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *told], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
