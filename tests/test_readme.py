"""README and records: commands work, numbers are the records'. Run alone: pytest tests/test_readme.py"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, result_of, shell_environment

import train_gpt

sys.path.insert(0, str(REPOSITORY / "records"))
import report
import sweep

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("   ")[0]
    for block in re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
    for line in block.splitlines()
    if not line.startswith("final ")
]


def test_marked_blocks_and_picture_are_what_the_records_say():
    for path, content in report.outputs().items():
        assert path.read_text() == content, f"{path.name} is not up to date: run `python records/report.py`"
    assert len(re.findall(r"^<!-- (?!end)", README, re.M)) >= 2


def test_report_notices_a_number_changed_by_hand():
    assert (
        report.renewed(README.replace("| `ITERATIONS` | `20000` |", "| `ITERATIONS` | `20001` |")) == README
    )
    assert "| `ITERATIONS` | `20000` |" in README


def test_kept_run_is_a_complete_run_of_the_cpu_recipe():
    result, events = report.kept_run("cpu")
    assert (result["exit_code"], result["recipe"], result["world_size"]) == (0, "cpu", 1)
    assert result["settings"] == train_gpt.Settings.from_env({"RECIPE": "cpu"}).changed()
    assert result["bytes"] == json.loads(json.dumps(events[-1]))["bytes"]
    assert result["total_bytes"] < 16_000_000


def test_alternatives_are_those_of_the_sweep():
    results = json.loads((REPOSITORY / "records" / "cpu_alternatives.json").read_text())["alternatives"]
    assert {name: entry["variables"] for name, entry in results.items()} == sweep.ALTERNATIVES
    for variables in sweep.ALTERNATIVES.values():
        train_gpt.Settings.from_env({"RECIPE": "cpu", **variables})
    # One run each: what lies within 0.01 of the best cannot be told from it.
    assert results["cpu"]["val_bpb"] <= min(entry["val_bpb"] for entry in results.values()) + 0.01


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_what_exists(command):
    """Make targets resolve, scripts exist, variables are settings, pins are those of the requirements."""
    words = command.replace(";", " ").split("#")[0].split()
    if "make" in words:
        target = words[words.index("make") + 1]
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True)
    for word in words:
        if word.endswith(".py") or word.startswith("requirements"):
            assert (REPOSITORY / word).is_file()
        if re.fullmatch(r"[A-Z_]+=.*", word):
            assert word.split("=")[0].lower() in train_gpt.Settings.__dataclass_fields__
        if "==" in word:
            assert word in (REPOSITORY / "requirements-dev.txt").read_text()


def test_every_make_target_of_the_map_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    row = next(line for line in README.splitlines() if line.startswith("| `Makefile`"))
    for target in re.findall(r"`([a-z-]+)`", row):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_map_lists_the_repository():
    for path in re.findall(r"^\| `([\w./]+)` \| ", README.split("## Map")[1].split("##")[0], re.M):
        assert (REPOSITORY / path).exists()


def test_text_to_score_as_the_readme_says(corpus, env, tmp_path):
    """The README's own path for any text: data/text.py, then the variables that it printed."""
    folder = tmp_path / "my data"
    make = [sys.executable, "data/text.py", str(corpus), "--output", str(folder), "--vocab-size", "384"]
    done = subprocess.run(make, cwd=REPOSITORY, env=shell_environment({}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()[-1].removeprefix("use with ")
    variables = dict(pair.split("=", 1) for pair in shlex.split(printed))
    run = {"RECIPE": "smoke", "RUN_DIR": env["RUN_DIR"], "EVAL_STRIDE": "32", **variables}
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=REPOSITORY,
        env=shell_environment(run),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("final val_bpb:")
    assert result_of(env)["exit_code"] == 0


@pytest.mark.slow
def test_make_run_in_a_fresh_folder_with_spaces(tmp_path):
    """Everything from nothing: virtual environment, data, training (cut to 10 s), score."""
    copy = tmp_path / "a folder with spaces"
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name)
    environment = shell_environment({"MAX_WALLCLOCK_SECONDS": "10", "RUN_ID": "first"}, OMP_NUM_THREADS="2")
    done = subprocess.run(["make", "run"], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("final val_bpb:")
    assert json.loads((Path(copy) / "runs" / "first" / "result.json").read_text())["exit_code"] == 0
