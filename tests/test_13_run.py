"""RUN: everything end to end, in this process and under torchrun. Run alone: pytest tests/test_13_run.py"""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, metrics_of, result_of, shell_environment
from test_02_process import torchrun
from test_03_data import write_shard

import train_gpt
from train_gpt import main

FINAL_LINE = re.compile(
    r"final val_bpb:(\d+\.\d{8}) val_loss:(\d+\.\d{8}) artifact_bytes:(\d+) "
    r"train_seconds:(\d+\.\d) eval_seconds:(\d+\.\d)"
)


def artifact_bytes(env):
    return (Path(env["RUN_DIR"]) / "artifact.bin").read_bytes()


def test_a_run_leaves_a_complete_folder(env, capsys):
    assert main({**env, "VAL_LOSS_EVERY": "2"}) == 0
    folder, result = Path(env["RUN_DIR"]), result_of(env)
    assert {path.name for path in folder.iterdir()} == {
        "run.log",
        "metrics.jsonl",
        "result.json",
        "artifact.bin",
    }
    printed = capsys.readouterr().out
    assert printed == (folder / "run.log").read_text()
    final = FINAL_LINE.fullmatch(printed.splitlines()[-1])
    assert final, printed.splitlines()[-1]
    assert float(final[1]) == pytest.approx(result["val_bpb"], abs=1e-8)
    assert float(final[2]) == pytest.approx(result["val_loss"], abs=1e-8)
    assert int(final[3]) == result["artifact_bytes"] == len(artifact_bytes(env))
    assert result["total_bytes"] == result["artifact_bytes"] + (REPOSITORY / "train_gpt.py").stat().st_size
    assert (result["exit_code"], result["seed"], result["steps"]) == (0, 1337, 4)
    assert result["hashes"].keys() >= {"val_sha256", "train_sha256", "tokenizer_sha256", "script_sha256"}
    assert [event["step"] for event in metrics_of(env, "validation")] == [0, 2, 4]
    assert [event["step"] for event in metrics_of(env, "train")] == [1, 2, 3, 4]
    assert re.search(r"^settings that differ from the defaults: RECIPE=smoke ", printed, re.M)
    assert re.search(r"^torch:\S+ python:\S+ device:cpu", printed, re.M)
    assert result["hashes"]["script_sha256"] in printed
    assert re.search(
        r"^step:2/4 val_loss:\d\.\d{4} val_bpb:\d\.\d{4} train_time:\d+ms step_avg:", printed, re.M
    )
    assert re.search(r"^reference: xz -9e on the same \d+ bytes: \d\.\d{4} bpb$", printed, re.M)
    before, after = (metrics_of(env, "validation")[i]["val_loss"] for i in (0, -1))
    assert before == pytest.approx(math.log(384), abs=0.05)
    assert after < before


def test_same_seed_gives_the_same_artifact_and_score(env, tmp_path):
    assert main(env) == 0
    again = {**env, "RUN_DIR": str(tmp_path / "again"), "RUN_ID": "another name"}
    assert main(again) == 0
    assert artifact_bytes(env) == artifact_bytes(again)
    assert result_of(env)["val_loss"] == result_of(again)["val_loss"]
    other = {**env, "RUN_DIR": str(tmp_path / "other"), "SEED": "2"}
    assert main(other) == 0
    assert artifact_bytes(env) != artifact_bytes(other)


def test_warm_up_leaves_no_trace(env, tmp_path):
    files = []
    for steps in ("0", "3"):
        run = {**env, "WARMUP_STEPS": steps, "RUN_DIR": str(tmp_path / steps)}
        assert main(run) == 0
        files.append(artifact_bytes(run))
    assert files[0] == files[1]


def test_validation_during_training_leaves_no_trace(env, tmp_path):
    files = []
    for every in ("0", "1"):
        run = {**env, "VAL_LOSS_EVERY": every, "RUN_DIR": str(tmp_path / every)}
        assert main(run) == 0
        files.append(artifact_bytes(run))
    assert files[0] == files[1]


def test_eval_only_gives_the_runs_number(env, tmp_path):
    """Without the recipe: what the model and the score depend on comes from the artifact."""
    assert main(env) == 0
    only = {name: env[name] for name in ("DATA_PATH", "AUDIT")}
    only |= {"EVAL_ONLY": str(Path(env["RUN_DIR"]) / "artifact.bin"), "RUN_DIR": str(tmp_path / "only")}
    assert main(only) == 0
    first, second = result_of(env), result_of(only)
    for name in ("val_loss", "val_bpb", "tokens", "bytes", "artifact_bytes"):
        assert first[name] == second[name]
    assert first["hashes"]["artifact_sha256"] == second["hashes"]["artifact_sha256"]
    assert not (tmp_path / "only" / "artifact.bin").exists()
    # A recipe whose training batch does not fit the artifact's sequence length is no obstacle to scoring.
    assert main({**only, "TRAIN_BATCH_TOKENS": "7"}) == 0


def test_eval_only_refuses_what_does_not_fit(env, tmp_path, capsys):
    assert main(env) == 0
    path = Path(env["RUN_DIR"]) / "artifact.bin"
    only = {
        "AUDIT": "0",
        "DATA_PATH": env["DATA_PATH"],
        "EVAL_ONLY": str(path),
        "RUN_DIR": str(tmp_path / "only"),
    }
    assert main({**only, "MODEL_DIM": "64"}) == 2
    assert "MODEL_DIM=64 contradicts the artifact's 32" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-5])
    assert main(only) == 5
    assert "SHA-256 does not match" in capsys.readouterr().err
    assert main({**only, "EVAL_ONLY": str(tmp_path / "none")}) == 5
    assert "not a valid artifact" in capsys.readouterr().err


def without_manifest(env, dataset_dir, tmp_path):
    """The same shards as published ones come: no manifest, the contest's table, no embedded tokenizer."""
    folder = tmp_path / "published"
    shutil.copytree(dataset_dir, folder, ignore=shutil.ignore_patterns("manifest.json"))
    return {**env, "DATA_PATH": str(folder)}


def test_without_manifest_the_artifact_names_its_tokenizer(env, dataset_dir, tmp_path, capsys):
    env = without_manifest(env, dataset_dir, tmp_path)
    assert main(env) == 0
    path = Path(env["RUN_DIR"]) / "artifact.bin"
    assert train_gpt.read_artifact(path).tokenizer is None
    only = {
        "EVAL_ONLY": str(path),
        "AUDIT": "0",
        "DATA_PATH": env["DATA_PATH"],
        "RUN_DIR": str(tmp_path / "only"),
    }
    assert main({**only, "TOKENIZER_PATH": env["TOKENIZER_PATH"]}) == 0
    other = tmp_path / "other.model"
    model = (dataset_dir / "tokenizer.model").read_bytes()
    other.write_bytes(model + b"\x12\x02\x18\x01")  # another trainer_spec: same pieces, another file
    capsys.readouterr()
    assert main({**only, "TOKENIZER_PATH": str(other)}) == 5
    assert "was made with another; set that" in capsys.readouterr().err


def test_oversized_artifact_is_kept_scored_and_reported(env, capsys):
    assert main({**env, "ARTIFACT_LIMIT_BYTES": "1000"}) == 3
    printed = capsys.readouterr()
    assert "over ARTIFACT_LIMIT_BYTES=1000" in printed.err
    assert FINAL_LINE.search(printed.out)
    assert result_of(env)["exit_code"] == 3
    assert result_of(env)["val_bpb"] > 0
    assert artifact_bytes(env)


def test_a_loss_that_is_not_finite_stops_the_run(env, capsys):
    env = {**env, "MATRIX_LR": "10", "SCALAR_LR": "10", "TIED_EMBED_LR": "10", "LOGIT_SOFTCAP": "10000"}
    env |= {"TIED_EMBED_INIT_STD": "10", "QK_GAIN_INIT": "100", "ADAM_EPS": "1e-16", "ITERATIONS": "200"}
    original = train_gpt.Optimizers.gather
    calls = []

    def broken(self, model, batches):
        calls.append(1)
        loss = original(self, model, batches)
        return loss * math.nan if len(calls) == 8 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Optimizers, "gather", broken)
        assert main(env) == 6
    message = capsys.readouterr().err
    words = r"step 7: train_loss is nan at matrix learning rate 10, the last good one was \d+\.\d{4}; lower"
    assert re.search(words, message)
    assert result_of(env)["exit_code"] == 6
    assert not (Path(env["RUN_DIR"]) / "artifact.bin").exists()


def test_bad_training_token_stops_the_run_before_the_device(env, dataset_dir, tmp_path, capsys):
    folder = shutil.copytree(dataset_dir, tmp_path / "bad")
    path = next(folder.glob("*_train_*"))
    tokens = train_gpt.open_shard(path).copy()
    tokens[100] = 60_000
    write_shard(path, tokens)
    assert main({**env, "DATA_PATH": str(folder), "WARMUP_STEPS": "0", "ITERATIONS": "50"}) == 5
    assert "text_train_000000.bin: token id 60000 is not below VOCAB_SIZE=384" in capsys.readouterr().err
    assert result_of(env)["exit_code"] == 5


def test_wallclock_ends_training(env):
    assert main({**env, "ITERATIONS": "1000000", "MAX_WALLCLOCK_SECONDS": "0.5", "WARMDOWN_ITERS": "10"}) == 0
    result = result_of(env)
    assert 0 < result["steps"] < 1000
    assert 0.5 <= result["train_seconds"] < 5


def test_training_learns(env):
    """A hundred and fifty tiny steps get well below the entropy of the letters' frequencies."""
    assert main({**env, "ITERATIONS": "150", "WARMDOWN_ITERS": "75", "TRAIN_LOG_EVERY": "0"}) == 0
    result = result_of(env)
    assert result["val_loss"] < 4.5 < math.log(384)
    assert result["val_loss"] == pytest.approx(result["training_val_loss"], abs=0.6)


def test_run_id_names_the_folder(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = {name: value for name, value in env.items() if name != "RUN_DIR"}
    assert main({**env, "RUN_ID": "mine"}) == 0
    assert (tmp_path / "runs" / "mine" / "result.json").is_file()
    assert main(env) == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert any(re.fullmatch(r"smoke-seed1337-\d{8}-\d{6}", name) for name in names)


def test_without_cuda_the_cpu_recipe_is_taken_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main({"RUN_DIR": str(tmp_path / "run")}) == 5
    printed = capsys.readouterr()
    assert "RECIPE is not set and there is no CUDA device: RECIPE=cpu" in printed.out
    assert "python data/text.py" in printed.err


def test_setting_errors_come_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main({"NUM_LAYRES": "3"}) == 2
    assert capsys.readouterr().err == "error: NUM_LAYRES='3' is not a setting: set NUM_LAYERS or unset it\n"
    assert main({"NUM_LAYRES": "3", "RANK": "1"}) == 2
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_unexpected_errors_leave_their_traces_too(env, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train_gpt, "evaluate", fail)
    with pytest.raises(ZeroDivisionError):
        main(env)
    assert result_of(env)["exit_code"] == 1
    assert "a bug" in result_of(env)["error"]


def test_two_ranks_train_and_score_as_one(env, tmp_path):
    env |= {"VAL_LOSS_EVERY": "2", "GRAD_CLIP_NORM": "0.5"}
    one, two = ({**env, "RUN_DIR": str(tmp_path / name)} for name in ("one", "two"))
    assert main(one) == 0
    done = torchrun(2, "train_gpt.py", env=two)
    assert done.returncode == 0, done.stderr
    assert len(FINAL_LINE.findall(done.stdout)) == 1
    losses = [[e["train_loss"] for e in metrics_of(run, "train")] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    first, second = result_of(one), result_of(two)
    assert second["world_size"] == 2
    assert second["val_loss"] == pytest.approx(first["val_loss"], abs=2e-3)
    # The score itself depends on the ranks by float32 rounding only: the same artifact, scored by one rank.
    only = {
        "EVAL_ONLY": str(Path(two["RUN_DIR"]) / "artifact.bin"),
        "AUDIT": "0",
        "DATA_PATH": env["DATA_PATH"],
    }
    assert main({**only, "RUN_DIR": str(tmp_path / "only"), "EVAL_STRIDE": "32"}) == 0
    again = result_of({"RUN_DIR": str(tmp_path / "only")})
    assert again["val_loss"] == pytest.approx(second["val_loss"], abs=1e-6)


def test_two_ranks_learn_what_they_score_as_one(env, tmp_path):
    """Test-time training, and the audit of it: rank 0 alone goes through all that both have learned."""
    learning = {"TTT_LAST_BLOCKS": "1", "TTT_CHUNK_TOKENS": "128", "TTT_LR": "0.02", "POLYAK_DECAY": "0.5"}
    assert main(env) == 0
    artifact = str(Path(env["RUN_DIR"]) / "artifact.bin")
    plain = result_of(env)["val_loss"]
    env |= {**learning, "EVAL_ONLY": artifact}
    one, two = ({**env, "RUN_DIR": str(tmp_path / name)} for name in ("one", "two"))
    assert main(one) == 0
    done = torchrun(2, "train_gpt.py", env={**two, "AUDIT": "1"})
    assert done.returncode == 0, done.stderr
    losses = [result_of(run)["val_loss"] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert abs(plain - losses[0]) > 1e-4
    assert metrics_of(two, "ttt")[0]["largest_change"] > 1e-3


@pytest.mark.parametrize("warmup", ["0", "3"])
def test_a_fault_on_one_rank_is_one_message_on_all(env, dataset_dir, tmp_path, warmup):
    """Only rank 1 reads the bad token; rank 0 says it, both end with code 5, nobody hangs."""
    folder = shutil.copytree(dataset_dir, tmp_path / "bad")
    path = next(folder.glob("*_train_*"))
    tokens = train_gpt.open_shard(path).copy()
    settings = train_gpt.Settings.from_env(env)
    stream = train_gpt.TokenStream([path], settings)
    row = stream.batch(2, 1)[0].numpy()  # slot 1 of step 2 is rank 1's
    place = next(p for p in range(len(tokens)) if np.array_equal(tokens[p : p + 33], row))
    tokens[place + 16] = 60_000
    write_shard(path, tokens)
    run = {**env, "DATA_PATH": str(folder), "WARMUP_STEPS": warmup}
    done = torchrun(2, "train_gpt.py", env=run)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "token id 60000 is not below VOCAB_SIZE=384" in done.stderr
    assert 'train_gpt.py", line' not in done.stderr
    assert result_of(env)["exit_code"] == 5


def start(env):
    """Start a run in a process of its own and wait until it trains."""
    command = [sys.executable, "train_gpt.py"]
    options = {"cwd": REPOSITORY, "env": shell_environment(env), "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, **options)
    metrics = Path(env["RUN_DIR"]) / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 4' in metrics.read_text()):
        assert run.poll() is None
        time.sleep(0.1)
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_cleanly(env, number, code):
    env = {**env, "ITERATIONS": "10000000"}
    run = start(env)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    assert "Traceback" not in errors
    assert result_of(env)["exit_code"] == code
    assert {path.name for path in Path(env["RUN_DIR"]).iterdir()} == {
        "run.log",
        "metrics.jsonl",
        "result.json",
    }


def test_a_second_signal_does_not_break_the_cleaning_up(env):
    env = {**env, "ITERATIONS": "10000000"}
    run = start(env)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        run.send_signal(number)
        time.sleep(0.002)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == result_of(env)["exit_code"]
    assert run.returncode in (130, 143)
    assert "Traceback" not in errors


def test_a_setting_error_under_torchrun_is_one_message(env):
    done = torchrun(2, "train_gpt.py", env={**env, "NUM_LAYRES": "3"})
    assert done.stderr.count("error: NUM_LAYRES='3' is not a setting: set NUM_LAYERS") == 1


def test_two_ranks_stop_at_the_same_step_and_score_an_artifact(env, tmp_path):
    run = {**env, "ITERATIONS": "1000000", "MAX_WALLCLOCK_SECONDS": "1", "WARMDOWN_ITERS": "10"}
    done = torchrun(2, "train_gpt.py", env=run)
    assert done.returncode == 0, done.stderr
    first = result_of(run)
    assert 1 <= first["train_seconds"] < 10
    only = {
        "EVAL_ONLY": str(Path(env["RUN_DIR"]) / "artifact.bin"),
        "AUDIT": "0",
        "DATA_PATH": env["DATA_PATH"],
    }
    only |= {"RECIPE": "smoke", "RUN_DIR": str(tmp_path / "only"), "EVAL_STRIDE": "32"}
    done = torchrun(2, "train_gpt.py", env=only)
    assert done.returncode == 0, done.stderr
    assert result_of(only)["val_loss"] == pytest.approx(first["val_loss"], abs=1e-9)


def test_places_that_cannot_be_written_are_named_in_one_line(env, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        assert main({**env, "RUN_DIR": str(place)}) == 5
        message = capsys.readouterr().err
        assert message.startswith(f"error: {place}")
        assert message.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_a_message_and_leaves_no_artifact(env, monkeypatch, capsys):
    original = train_gpt.write_atomically

    def write(path, data):
        if path.name == "artifact.bin":
            raise OSError(28, "No space left on device", str(path))
        original(path, data)

    monkeypatch.setattr(train_gpt, "write_atomically", write)
    assert main(env) == 5
    assert "artifact.bin: No space left on device" in capsys.readouterr().err
    assert result_of(env)["exit_code"] == 5


def test_a_failed_rerun_leaves_no_old_artifact(env):
    assert main(env) == 0
    assert main({**env, "TOKENIZER_PATH": "/nowhere"}) == 5
    assert not (Path(env["RUN_DIR"]) / "artifact.bin").exists()


def test_scoring_an_artifact_keeps_its_own_run(env, capsys):
    assert main(env) == 0
    before = result_of(env)
    only = {"EVAL_ONLY": str(Path(env["RUN_DIR"]) / "artifact.bin"), **env}
    assert main(only) == 2
    assert "holds the artifact's own run" in capsys.readouterr().err
    assert result_of(env) == before
    assert artifact_bytes(env)


def test_the_model_that_is_scored_comes_from_the_artifact_alone(env, process):
    """Settings of another shape than the artifact's play no part in its score."""
    assert main(env) == 0
    settings = train_gpt.Settings.from_env(env)
    path = Path(env["RUN_DIR"]) / "artifact.bin"
    artifact, dataset = train_gpt.read_artifact(path), train_gpt.load_dataset(settings)
    other = train_gpt.Settings.from_env({**env, "NUM_LAYERS": "2", "ROPE_BASE": "50", "LOGIT_SOFTCAP": "3"})
    log = train_gpt.Log(train_gpt.Process(1, 2, process.device), Path("unused"))
    inputs = (process, log, False, path, {})
    scores = [train_gpt.evaluate(artifact, dataset, s, *inputs) for s in (settings, other)]
    assert scores[0]["val_loss"] == scores[1]["val_loss"] == result_of(env)["val_loss"]


def test_compile_without_a_compiler_is_refused(env, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_gpt, "load_dataset", lambda *_: pytest.fail("too late"))
    assert main({**env, "COMPILE": "1"}) == result_of(env)["exit_code"] == 2
    message = "error: COMPILE=1 needs a C++ compiler on a CPU; install g++ or set COMPILE=0\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_too_little_memory_on_the_gpu_is_a_setting_to_mend(env, stage, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt, stage, fail)
    assert main(env) == result_of(env)["exit_code"] == 2
    message = "TRAIN_BATCH_TOKENS is too large for the GPU; raise MICRO_BATCH_SLOTS"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert result_of(env)["error"] == message


def held_out_losses(line):
    return dict(re.findall(r"held_out_train_loss_(\w+):(\S+)", line))


def test_weights_are_chosen_on_training_tokens_that_were_not_trained_on(env, monkeypatch):
    """The log's losses are those of the batch after the last step; the least one's weights are written."""
    swa = {
        "AVERAGE": "best",
        "SWA_EVERY": "2",
        "SWA_START_SCALE": "2",
        "ITERATIONS": "9",
        "WARMDOWN_ITERS": "5",
    }
    kept = {}
    original = train_gpt.Averages.candidates

    def keep(self):
        kept.update(original(self))
        return original(self)

    monkeypatch.setattr(train_gpt.Averages, "candidates", keep)
    assert main({**env, **swa, "MATRIX_BITS": "8"}) == 0
    settings = train_gpt.Settings.from_env({**env, **swa})
    stream = train_gpt.load_dataset(settings).stream
    model = train_gpt.GPT(settings)
    expected = {}
    for name, weights in kept.items():
        model.load_state_dict(weights)
        batches = [stream.batch(9, slot).long() for slot in range(2)]
        expected[name] = sum(model(ids[:, :-1], ids[:, 1:]).item() for ids in batches) / 2
    (event,) = metrics_of(env, "average")
    for name in ("raw", "ema", "swa"):
        assert event[f"held_out_train_loss_{name}"] == pytest.approx(expected[name], abs=1e-6)
    assert event["chosen"] == min(expected, key=expected.get)
    assert (event["ema_updates"], event["swa_snapshots"]) == (9, 4)
    artifact = train_gpt.read_artifact(Path(env["RUN_DIR"]) / "artifact.bin")
    for name, tensor in artifact.weights.items():
        assert (tensor - kept[event["chosen"]][name]).abs().max() < 0.05


def test_an_average_says_what_entered_and_how_far_it_moved(env):
    mean = {"AVERAGE": "mean", "SWA_EVERY": "1", "SWA_START_SCALE": "0.9"}
    assert main({**env, **mean}) == 0
    log = (Path(env["RUN_DIR"]) / "run.log").read_text()
    assert re.search(r"^average: chosen:mean moved:0\.\d+ ema_updates:4 swa_snapshots:1$", log, re.M)


def test_two_ranks_choose_as_one(env, tmp_path):
    env |= {"AVERAGE": "best", "SWA_EVERY": "1", "SWA_START_SCALE": "2", "PARALLEL_MUON": "1"}
    env |= {"QAT_START": "scale:0.9", "MATRIX_BITS": "5", "BIGRAM_VOCAB_SIZE": "50"}
    one, two = ({**env, "RUN_DIR": str(tmp_path / name)} for name in ("one", "two"))
    assert main(one) == 0
    done = torchrun(2, "train_gpt.py", env={**two, "AUDIT": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "audit.json").read_text())["conditions"]["selection"]
    (first,), (second,) = metrics_of(one, "average"), metrics_of(two, "average")
    assert first["chosen"] == second["chosen"]
    for name, value in first.items():
        if name.startswith("held_out"):
            assert second[name] == pytest.approx(value, abs=1e-3)
    assert result_of(two)["val_loss"] == pytest.approx(result_of(one)["val_loss"], abs=5e-3)


def test_quantization_aware_training_closes_the_gap(env, tmp_path):
    """Paired: same seed, same tokens; at 5 bits the loss that quantization costs shrinks with it on."""
    gaps = []
    for start in ("off", "scale:0.9"):
        run = {**env, "QAT_START": start, "MATRIX_BITS": "5", "EMBED_BITS": "5", "EMA_DECAY": "0"}
        run |= {"ITERATIONS": "300", "WARMDOWN_ITERS": "200", "TRAIN_LOG_EVERY": "0", "MODEL_DIM": "48"}
        run |= {"RUN_DIR": str(tmp_path / start.replace(":", ""))}
        assert main(run) == 0
        result = result_of(run)
        gaps.append(result["val_loss"] - result["training_val_loss"])
        (event,) = metrics_of(run, "qat") or [None]
        assert (event is None) == (start == "off")
    assert event["step"] == 121
    assert event["weights_changed"] > 0.9
    assert event["mean_relative_change"] > 0.02
    assert gaps[1] < 0.6 * gaps[0]


GATED = {"PSEUDO": "pr834", "GATE_HEAD": "1", "NGRAM_BUCKETS": "4096"}


def test_the_gate_learns_beside_the_model(env, monkeypatch):
    """#834 at a small width: the oracle is counted on the clock, the mixer's loss falls, the gate is kept."""
    narrow = {"MODEL_DIM": "32", "NUM_LAYERS": "3", "VE_LAYERS": "1,2", "XSA_LAST_N": "3", "VE_DIM": "8"}
    narrow |= {"RECIPE": "pr834", "NUM_HEADS": "4", "NUM_KV_HEADS": "4", "ROPE_DIMS": "4", "BIGRAM_DIM": "8"}
    narrow |= {
        "BIGRAM_VOCAB_SIZE": "64",
        "TRAIN_SEQ_LEN": "32",
        "TRAIN_BATCH_TOKENS": "512",
        "VOCAB_SIZE": "384",
    }
    narrow |= {"MICRO_BATCH_SLOTS": "2", "VAL_BATCH_SIZE": "1024", "ITERATIONS": "40", "WARMDOWN_ITERS": "30"}
    narrow |= {"MAX_WALLCLOCK_SECONDS": "0", "WARMUP_STEPS": "1", "DATA_LANES": "4", "QAT_START": "scale:0.5"}
    narrow |= {"MUON_MOMENTUM": "0.9", "MUON_MOMENTUM_WARMUP_START": "0.85", "FP16_MAX_NUMEL": "0"}
    losses, original = [], train_gpt.GPT.pseudo_loss

    def watch(self, *inputs):
        loss = original(self, *inputs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(train_gpt.GPT, "pseudo_loss", watch)
    env = {**env, **narrow, "NGRAM_BUCKETS": "4096"}
    assert main(env) == 0
    trained = losses[4:]  # after the warm-up of both graphs, on tables still empty
    assert len(trained) == 80
    assert max(losses[:4]) > math.log(384) - 0.1
    assert sum(trained[-10:]) < 0.8 * sum(trained[:10])
    (event,) = metrics_of(env, "oracle")
    assert event["tokens"] == train_gpt.load_dataset(train_gpt.Settings.from_env(env)).stream.total
    assert 0 < event["seconds"] < result_of(env)["train_seconds"]
    assert metrics_of(env, "qat")[0]["step"] > 20
    weights = train_gpt.read_artifact(Path(env["RUN_DIR"]) / "artifact.bin").weights
    assert weights["gate_head.weight"].abs().max() > 0
    assert weights["gate_head.bias"].shape == (7,)


def test_an_artifact_with_a_gate_is_scored_alone(env, tmp_path):
    assert main({**env, **GATED}) == 0
    only = {
        "EVAL_ONLY": str(Path(env["RUN_DIR"]) / "artifact.bin"),
        "AUDIT": "0",
        "DATA_PATH": env["DATA_PATH"],
    }
    assert main({**only, "RUN_DIR": str(tmp_path / "only")}) == 0
    again = result_of({"RUN_DIR": str(tmp_path / "only")})
    assert again["val_loss"] == result_of(env)["val_loss"]


def test_the_gate_changes_the_training_of_the_blocks(env, tmp_path):
    """The same seed: equal blocks at the start, other ones after four steps; 1 and 2 ranks agree."""
    plain, gated = ({**env, "RUN_DIR": str(tmp_path / name)} for name in ("plain", "gated"))
    assert main(plain) == 0
    assert main({**gated, **GATED}) == 0
    one, other = (train_gpt.read_artifact(Path(run["RUN_DIR"]) / "artifact.bin") for run in (plain, gated))
    name = "blocks.1.mlp.fc.weight"
    assert not one.weights[name].equal(other.weights[name])
    two = {**env, **GATED, "RUN_DIR": str(tmp_path / "two")}
    done = torchrun(2, "train_gpt.py", env=two)
    assert done.returncode == 0, done.stderr
    losses = [[e["train_loss"] for e in metrics_of(run, "train")] for run in (gated, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert metrics_of(two, "oracle")[0]["tokens"] == metrics_of(gated, "oracle")[0]["tokens"]


@pytest.mark.slow
def test_the_gate_compiles_into_one_graph_per_loss(env, tmp_path, monkeypatch):
    """Lookups stay outside, nothing is compiled once the clock runs, and the losses are the plain ones."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    runs, graphs = [], []
    original = train_gpt.PseudoOracle.count
    monkeypatch.setattr(
        train_gpt.PseudoOracle,
        "count",
        lambda self, stream: graphs.append(counters["stats"]["unique_graphs"]) or original(self, stream),
    )
    for choice in ("0", "1"):
        run = {**env, **GATED, "COMPILE": choice, "QAT_START": "scale:0.9", "RUN_DIR": str(tmp_path / choice)}
        assert main(run) == 0
        runs.append([event["train_loss"] for event in metrics_of(run, "train")])
    assert graphs == [0, 2]
    assert runs[1] == pytest.approx(runs[0], abs=1e-3)


@pytest.mark.slow
def test_switching_quantization_on_compiles_nothing_inside_the_clock(env, monkeypatch):
    """Both graphs exist before the averages (and then the clock) start, and nothing is compiled after."""
    from torch._dynamo.utils import counters

    graphs = []
    original = train_gpt.Optimizers.gather

    def count(self, model, batches):
        loss = original(self, model, batches)
        graphs.append(counters["stats"]["unique_graphs"])
        return loss

    monkeypatch.setattr(train_gpt.Optimizers, "gather", count)
    torch._dynamo.reset()
    counters.clear()
    env |= {"COMPILE": "1", "QAT_START": "scale:0.9", "WARMUP_STEPS": "1", "MATRIX_BITS": "5"}
    assert main({**env, "ITERATIONS": "6"}) == 0
    assert graphs == [1, 2, 2, 2, 2, 2, 2, 2]
    assert metrics_of(env, "qat")[0]["step"] == 5


SUBMISSIONS = ("pr890", "pr810", "pr779", "pr834", "pr864")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SUBMISSIONS)
def test_a_submission_runs_end_to_end_at_full_size(recipe, dataset_dir, tmp_path):
    """Two steps of small batches: trained, quantized, written, read back, scored; minutes, within 16 GiB."""
    env = {"RECIPE": recipe, "DATA_PATH": str(dataset_dir), "RUN_DIR": str(tmp_path / "run")}
    env |= {"TOKENIZER_PATH": str(dataset_dir / "tokenizer.model"), "VOCAB_SIZE": "384"}
    env |= {"ITERATIONS": "2", "MAX_WALLCLOCK_SECONDS": "0", "WARMUP_STEPS": "0", "MICRO_BATCH_SLOTS": "1"}
    env |= {
        "TRAIN_BATCH_TOKENS": "2048",
        "VAL_BATCH_SIZE": "2048",
        "EVAL_STRIDE": "2048",
        "VAL_LOSS_EVERY": "0",
    }
    env |= {"SWA_EVERY": "1", "SWA_START_SCALE": "2", "WARMDOWN_ITERS": "4"}
    env |= {"QAT_START": "time:0.5"} if recipe == "pr864" else {}
    env |= {"TTT_CHUNK_TOKENS": "2048"} if recipe in ("pr779", "pr834") else {}
    code = "import resource, sys, os, train_gpt; code = train_gpt.main(os.environ); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    command = [sys.executable, "-c", code]
    environment = shell_environment(env, OMP_NUM_THREADS="2")
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, final, kilobytes = done.stdout.splitlines()
    assert FINAL_LINE.fullmatch(final)
    assert int(kilobytes) < 16 * 2**20
    assert metrics_of(env, "qat")
    learned = [event["parameters"] for event in metrics_of(env, "ttt")]
    assert learned == {"pr779": [273_412], "pr834": [273_412]}.get(recipe, [])
    assert metrics_of(env, "average")[0]["swa_snapshots"] == 2
    assert math.isfinite(result_of(env)["val_loss"])
    assert result_of(env)["total_bytes"] < 16_000_000


@pytest.mark.slow
def test_compiled_run_scores_like_the_plain_one(env, tmp_path):
    """torch.compile on the CPU: needs a C++ compiler and about a minute."""
    results = []
    for choice in ("0", "1"):
        run = {**env, "COMPILE": choice, "RUN_DIR": str(tmp_path / choice)}
        assert main(run) == 0
        results.append(result_of(run)["val_loss"])
    assert results[1] == pytest.approx(results[0], abs=1e-3)


@pytest.mark.gpu
def test_cuda_run_is_proven(env):
    """Slow path and receipt on CUDA, test-time training among what a decoder goes through again."""
    learning = {"TTT_LAST_BLOCKS": "1", "TTT_CHUNK_TOKENS": "256", "TTT_LR": "0.003"}
    assert main({**env, **learning, "ITERATIONS": "20", "AUDIT": "1"}) == 0


@pytest.mark.gpu
def test_cuda_run(env):
    assert main({**env, "ITERATIONS": "20"}) == 0
    assert result_of(env)["val_loss"] < math.log(384)


def test_result_is_json_that_any_reader_takes(env):
    assert main(env) == 0
    text = (Path(env["RUN_DIR"]) / "result.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["exit_code"] == 0


@pytest.mark.parametrize("rule", ["pr864", "pr890", "pr779", "pr810", "pr834"])
def test_a_pseudo_score_follows_the_score_and_never_stands_for_it(env, capsys, rule):
    more = {"PSEUDO": rule, "NGRAM_CHUNK_TOKENS": "50", "NGRAM_BUCKETS": "64", "PSEUDO_SAMPLE": "40"}
    assert main({**env, **more, "GATE_HEAD": str(int(rule == "pr834"))}) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith(f"pseudo {rule}: "))
    assert re.fullmatch(
        rf"pseudo {rule}: \d+\.\d{{4}} \(not a code length: probabilities sum to [\d.e+]+ on average; "
        r"after renormalisation \d+\.\d{4} bpb\)",
        lines[place],
    )
    assert any(line.startswith("score: ") for line in lines[:place])
    assert FINAL_LINE.fullmatch(lines[-1])
    (event,) = metrics_of(env, "pseudo")
    assert event.keys() == {"event", "rule", "pseudo_bpb", "mass", "renormalized_bpb"}
    assert event["mass"] > 1.5
    assert "pseudo_bpb" not in json.dumps(result_of(env))


def test_quantization_aware_training_without_a_matrix_is_refused(env, capsys):
    more = {"QAT_START": "step0", "FP16_MAX_NUMEL": "1000000", "EMBED_BITS": "16"}
    assert main({**env, **more}) == 2
    assert "QAT_START=step0 finds no matrix; lower FP16_MAX_NUMEL" in capsys.readouterr().err
    assert main({**env, **more, "QAT_START": "off"}) == 0
