"""PROCESS AND LOG: ranks agree, rank 0 writes. Run alone: pytest tests/test_02_process.py (uses torchrun)"""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, shell_environment

import train_gpt

OPTIMIZERS = ("plain", "clipped", "parallel", "parallel clipped", "parallel quantized")  # of ranks.py


def torchrun(ranks, *arguments, env=None, **keywords):
    """Run a script on several ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    options = {"capture_output": True, "text": True, "cwd": REPOSITORY} | keywords
    return subprocess.run([*command, *arguments], env=shell_environment(env or {}), **options)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports of tests/ranks.py on one rank and on two."""
    found = []
    for ranks in (1, 2):
        path = tmp_path_factory.mktemp("ranks") / "report.json"
        done = torchrun(ranks, "tests/ranks.py", str(path))
        assert done.returncode == 0, done.stderr
        found.append(json.loads(path.read_text()))
    return found


def test_sums_times_and_texts_are_shared(reports):
    assert reports[0]["sum"] == [1.0, 10.0]
    assert reports[1]["sum"] == [3.0, 20.0]
    assert reports[1]["elapsed"] == 100.0
    assert reports[1]["shared"] == "from rank 0"


def test_one_rank_failing_fails_every_rank(reports):
    assert reports[0]["failure"] == reports[1]["failure"] == "shard 7 is bad"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_take_the_same_steps_as_one(reports, name):
    """Plain and parallel Muon, with banks that need padding (three layers), with the global norm clipped."""
    one, two = (report[name] for report in reports)
    assert two["same"] == 2.0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for key, values in one["weights"].items():
        assert two["weights"][key] == pytest.approx(values, abs=1e-4), key


def test_parallel_muon_is_plain_muon(reports):
    for report in reports:
        assert report["parallel clipped"] == report["clipped"]


def test_open_process_refuses_ranks_that_do_not_share_out():
    settings = train_gpt.Settings.from_env({"RECIPE": "smoke"})
    with (
        pytest.raises(train_gpt.SettingError, match="WORLD_SIZE=3 must divide MICRO_BATCH_SLOTS=2"),
        train_gpt.open_process({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, settings),
    ):
        pass


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "8"}, {"RANK": "3"}])
def test_one_process_needs_no_torchrun(variables):
    settings = train_gpt.Settings.from_env({"RECIPE": "smoke"})
    with train_gpt.open_process(variables, settings) as process:
        assert (process.rank, process.world_size) == (0, 1)


def test_log_writes_on_rank_0_only(tmp_path, capsys):
    for rank in (0, 1):
        log = train_gpt.Log(train_gpt.Process(rank, 2, torch.device("cpu")), tmp_path / str(rank))
        log.step("train", 5, 10, 1000.0, train_loss=2.0)
    line = "step:5/10 train_loss:2.0000 train_time:1000ms step_avg:200.00ms"
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (line + "\n", "")
    assert (tmp_path / "0" / "run.log").read_text() == line + "\n"
    event = json.loads((tmp_path / "0" / "metrics.jsonl").read_text())
    assert event == {"event": "train", "step": 5, "train_time_ms": 1000.0, "train_loss": 2.0}
    assert not (tmp_path / "1").exists()


def test_clock_counts_only_while_it_runs(process):
    clock = train_gpt.Clock(process)
    clock.start()
    time.sleep(0.02)
    clock.stop()
    first = clock.read_ms()
    time.sleep(0.05)
    assert clock.read_ms() == first >= 20
    clock.start()
    time.sleep(0.02)
    assert clock.read_ms() >= first + 20


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    train_gpt.write_atomically(path, b"old")
    monkeypatch.setattr(train_gpt.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        train_gpt.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_progress_shows_on_rank_0s_terminal_only(process, monkeypatch):
    assert process.progress(10, "train").disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with process.progress(10, "train") as bar:
        assert not bar.disable
    assert train_gpt.Process(1, 2, process.device).progress(10, "train").disable
