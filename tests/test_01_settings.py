"""SETTINGS: every rule broken once, every setting seen to act. Run alone: pytest tests/test_01_settings.py"""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from conftest import metrics_of, result_of

import train_gpt
from train_gpt import RECIPES, REFUSED_NAMES, SettingError, Settings

FIELDS = {field.name.upper(): field for field in dataclasses.fields(Settings)}


def test_defaults_need_no_environment():
    assert Settings.from_env({}) == Settings()
    assert Settings().changed() == {}


def test_from_env_reads_its_argument_only(monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "7")
    monkeypatch.setenv("RECIPE", "smoke")
    assert Settings.from_env({}) == Settings()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe):
    settings = Settings.from_env({"RECIPE": recipe})
    assert settings.recipe == recipe
    names = {pair.split("=")[0] for pair in RECIPES[recipe].split()}
    assert names == settings.changed().keys() - {"RECIPE"}, "a recipe's row states what differs, nothing else"


def test_hand_set_wins_over_recipe():
    row = Settings.from_env({"RECIPE": "smoke"})
    by_hand = Settings.from_env({"RECIPE": "smoke", "SEED": "5", "NUM_LAYERS": "2"})
    assert by_hand == dataclasses.replace(row, seed=5, num_layers=2)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NUM_LAYERS": "eight"}, ["NUM_LAYERS='eight'", "whole number", "default is 9"]),
        ({"NUM_LAYERS": "2.5"}, ["NUM_LAYERS='2.5'", "whole number"]),
        ({"NUM_LAYERS": ""}, ["NUM_LAYERS=''", "whole number"]),
        ({"MATRIX_LR": "fast"}, ["MATRIX_LR='fast'", "finite number"]),
        ({"MATRIX_LR": "nan"}, ["MATRIX_LR='nan'", "finite number"]),
        ({"MAX_WALLCLOCK_SECONDS": "inf"}, ["MAX_WALLCLOCK_SECONDS='inf'", "finite number"]),
        ({"TIE_EMBEDDINGS": "yes"}, ["TIE_EMBEDDINGS='yes'", "0 (off) or 1 (on)"]),
        ({"TIE_EMBEDDINGS": "true"}, ["TIE_EMBEDDINGS='true'", "0 (off) or 1 (on)"]),
        ({"RECIPE": "bigger"}, ["RECIPE='bigger'", "choose one of baseline, cpu, smoke, pr890"]),
        ({"ATTENTION": "flash"}, ["ATTENTION='flash'", "auto, sdpa, fa3, fa4"]),
        ({"COMPILE": "2"}, ["COMPILE='2'", "auto, 0, 1"]),
        ({"MATRIX_BITS": "7"}, ["MATRIX_BITS=7", "5, 6, 8"]),
        ({"ITERATIONS": "0"}, ["ITERATIONS=0", "a value from 1 to"]),
        ({"EMA_DECAY": "1"}, ["EMA_DECAY=1.0", "a value from 0.0 to 0.999999"]),
        ({"MATRIX_LR": "-0.1"}, ["MATRIX_LR=-0.1", "a value from 0.0 to 10.0"]),
        ({"VOCAB_SIZE": "70000"}, ["VOCAB_SIZE=70000", "a value from 2 to 65536"]),
        ({"NUM_HEADS": "6"}, ["MODEL_DIM=512", "multiple of NUM_HEADS", "6"]),
        ({"NUM_KV_HEADS": "3"}, ["NUM_HEADS=8", "multiple of NUM_KV_HEADS", "3"]),
        ({"MODEL_DIM": "24"}, ["MODEL_DIM=24", "even multiple of NUM_HEADS"]),
        ({"TRAIN_BATCH_TOKENS": "500000"}, ["TRAIN_BATCH_TOKENS=500000", "8192"]),
        ({"VAL_BATCH_SIZE": "1024"}, ["VAL_BATCH_SIZE=1024", "MICRO_BATCH_SLOTS windows", "8192"]),
        ({"EVAL_STRIDE": "2000"}, ["EVAL_STRIDE=2000", "at most the scoring window", "1024"]),
        ({"XSA_LAST_N": "10"}, ["XSA_LAST_N=10", "at most NUM_LAYERS", "9"]),
        ({"TTT_LAST_BLOCKS": "10"}, ["TTT_LAST_BLOCKS=10", "at most NUM_LAYERS", "9"]),
        (
            {"TTT_LAST_BLOCKS": "1", "TTT_CHUNK_TOKENS": "1023"},
            ["TTT_CHUNK_TOKENS=1023", "at least the scoring window", "1024"],
        ),
        ({"POLYAK_DECAY": "0.9"}, ["POLYAK_DECAY=0.9", "0 without (TTT_LAST_BLOCKS)"]),
        (
            {"TTT_FREEZE_BLOCKS": "2"},
            ["TTT_FREEZE_BLOCKS='2'", "set TTT_LAST_BLOCKS", "#779 and #834 count those", "#864 the first"],
        ),
        ({"QTTT": "1"}, ["QTTT='1'", "set TTT_LAST_BLOCKS"]),
        ({"VE_LAYERS": "3,9"}, ["VE_LAYERS='3,9'", "numbers below NUM_LAYERS", "9"]),
        ({"VE_LAYERS": "3,x"}, ["VE_LAYERS='3,x'", "numbers below NUM_LAYERS"]),
        ({"ROPE_DIMS": "66"}, ["ROPE_DIMS=66", "at most a head's channels", "64"]),
        ({"ROPE_DIMS": "3"}, ["ROPE_DIMS=3", "even"]),
        ({"AVERAGE": "mean", "EMA_DECAY": "0"}, ["EMA_DECAY=0.0", "above 0 for AVERAGE=mean"]),
        ({"SWA_SOURCE": "ema", "EMA_DECAY": "0"}, ["EMA_DECAY=0.0", "SWA_SOURCE=ema"]),
        ({"QAT_START": "late"}, ["QAT_START='late'", "off, step0, scale:<x> or time:<x>"]),
        ({"QAT_START": "scale:1.5"}, ["QAT_START='scale:1.5'", "x at most (1)"]),
        ({"QAT_START": "time:"}, ["QAT_START='time:'"]),
        ({"SOFT_ROUND_QAT": "1"}, ["QAT_START='off'", "on for SOFT_ROUND_QAT"]),
        ({"CROWN_Q_LAMBDA": "0.1"}, ["QAT_START='off'", "CROWN_Q_LAMBDA", "0.1"]),
        ({"LEAKY_RELU": "1"}, ["LEAKY_RELU='1'", "set MLP_ACTIVATION"]),
        ({"LATE_QAT_THRESHOLD": "0.5"}, ["LATE_QAT_THRESHOLD='0.5'", "set QAT_START"]),
        ({"NGRAM_BUCKETS": "3"}, ["NGRAM_BUCKETS=3", "a power of two", "0 (the rule's)"]),
        ({"NGRAM_BUCKETS": "4194303"}, ["NGRAM_BUCKETS=4194303", "a power of two"]),
        ({"GATE_HEAD": "1"}, ["GATE_HEAD=True", "on with PSEUDO=pr834 and only then (none)"]),
        ({"PSEUDO": "pr834"}, ["GATE_HEAD=False", "on with PSEUDO=pr834 and only then (pr834)"]),
        ({"PSEUDO": "pr886"}, ["PSEUDO='pr886'", "none, pr864, pr890, pr779, pr810, pr834"]),
        ({"NUM_LAYRES": "4"}, ["NUM_LAYRES='4'", "NUM_LAYERS"]),
        ({"ITERATION": "4"}, ["ITERATION='4'", "ITERATIONS"]),
        ({"EVAL_STRIDES": "4"}, ["EVAL_STRIDES='4'", "EVAL_STRIDE"]),
    ],
)
def test_broken_rules_name_variable_value_rule_and_remedy(variables, words):
    with pytest.raises(SettingError) as caught:
        Settings.from_env(variables)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FIELDS)
def test_every_bound_is_checked(name):
    """One step outside each end of each range is refused, and the message names the variable."""
    field = FIELDS[name]
    outside = [field.metadata["low"] - 1] if field.metadata["low"] is not None else []
    outside += [field.metadata["high"] + 1] if field.metadata["high"] < math.inf else []
    outside += ["none of these"] if field.metadata["choices"] else []
    for value in outside:
        with pytest.raises(SettingError, match=f"^{name}="):
            dataclasses.replace(Settings(), **{field.name: value})


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_names_of_other_submissions_are_refused(name):
    with pytest.raises(SettingError, match=f"^{name}='1' is not a setting: set "):
        Settings.from_env({name: "1"})


def test_usual_environments_raise_no_false_alarm():
    usual = """
        PATH HOME LANG USER SHELL TERM PWD OLDPWD LOGNAME HOSTNAME SHLVL DISPLAY EDITOR PAGER TMPDIR
        RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME MASTER_ADDR MASTER_PORT
        TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES
        CUDA_HOME CUDA_PATH LD_LIBRARY_PATH NCCL_DEBUG NCCL_NET PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED
        VIRTUAL_ENV CONDA_PREFIX HF_HOME HF_TOKEN WANDB_MODE PYTORCH_CUDA_ALLOC_CONF TORCHINDUCTOR_CACHE_DIR
        SLURM_JOB_ID SLURM_PROCID XDG_RUNTIME_DIR SSH_CONNECTION GPG_TTY CI GITHUB_RUN_ID SAMPLE_DATA
        MAKEFLAGS MAKELEVEL MFLAGS http_proxy no_proxy PIP_INDEX_URL
    """
    assert Settings.from_env(dict.fromkeys(usual.split(), "x")) == Settings()


def test_artifact_values_stand_between_recipe_and_hand():
    stored = Settings.from_env({"RECIPE": "smoke", "MODEL_DIM": "64", "EVAL_STRIDE": "4"}).stored_values()
    settings = Settings.from_env({"RECIPE": "smoke", "EVAL_STRIDE": "16"}, stored)
    assert settings.model_dim == 64
    assert settings.eval_stride == 16
    with pytest.raises(SettingError, match=r"^MODEL_DIM=32 contradicts the artifact's 64; unset MODEL_DIM"):
        Settings.from_env({"RECIPE": "smoke", "MODEL_DIM": "32"}, stored)


# A value per setting that must change something in a tiny run; a base where the setting needs company.
ACTS = {
    "RECIPE": "baseline",
    "SEED": "7",
    "ITERATIONS": "3",
    "WARMDOWN_ITERS": "4",
    "TRAIN_BATCH_TOKENS": "1024",
    "TRAIN_SEQ_LEN": "64",
    "MICRO_BATCH_SLOTS": "4",
    "DATA_LANES": "1",
    "VOCAB_SIZE": "400",
    "NUM_LAYERS": "2",
    "MODEL_DIM": "48",
    "NUM_HEADS": "8",
    "NUM_KV_HEADS": "4",
    "MLP_MULT": "1.5",
    "MLP_ACTIVATION": "leaky2",
    "TIE_EMBEDDINGS": "0",
    "LOGIT_SOFTCAP": "5",
    "ROPE_BASE": "100",
    "ROPE_DIMS": "4",
    "ROPE_NTK_LENGTH": "16",
    "XSA_LAST_N": "1",
    "VALUE_RESIDUAL": "1",
    "GATED_ATTN": "1",
    "DTG_ENABLED": "1",
    "LN_SCALE": "norm",
    "UNET_LONGER_HALF": "encoder",
    "BIGRAM_VOCAB_SIZE": "64",
    "BIGRAM_DIM": "8",
    "BIGRAM_HASH": "linear",
    "SMEAR_GATE": "half",
    "PRE_ENRICH_DIM": "16",
    "VE_LAYERS": "1",
    "VE_DIM": "8",
    "GATE_HEAD": "0",
    "MTP_NUM_HEADS": "1",
    "MTP_LOSS_WEIGHT": "5",
    "EMBED_INIT": "overtone",
    "MATRIX_INIT": "orthogonal",
    "QK_GAIN_INIT": "1",
    "TIED_EMBED_INIT_STD": "0.1",
    "TIED_EMBED_LR": "0.1",
    "EMBED_LR": "0.1",
    "HEAD_LR": "0.1",
    "MATRIX_LR": "0.1",
    "SCALAR_LR": "0.1",
    "MUON_MOMENTUM": "0.5",
    "MUON_MOMENTUM_WARMUP_START": "0.5",
    "MUON_MOMENTUM_WARMUP_STEPS": "2",
    "MUON_BACKEND_STEPS": "2",
    "MUON_WD": "0.5",
    "MUON_WD_ORDER": "after",
    "MUON_SCOPE": "lookup",
    "PARALLEL_MUON": "1",
    "ADAM_WD": "0.5",
    "BETA1": "0.5",
    "BETA2": "0.5",
    "ADAM_EPS": "0.1",
    "GRAD_CLIP_NORM": "0.01",
    "EMA_DECAY": "0",
    "AVERAGE": "swa",
    "SWA_SOURCE": "ema",
    "SWA_EVERY": "2",
    "SWA_START_SCALE": "0.6",
    "MATRIX_BITS": "5",
    "EMBED_BITS": "6",
    "LOOKUP_BITS": "5",
    "FP16_MAX_NUMEL": "600",
    "QUANT_SEARCH": "1",
    "QUANT_SCALE_FLOOR": "1",
    "PRUNE_PCT": "0.3",
    "QAT_START": "step0",
    "SOFT_ROUND_QAT": "1",
    "CROWN_Q_LAMBDA": "100",
    "COMPRESSOR": "lzma",
    "EVAL_SEQ_LEN": "16",
    "EVAL_STRIDE": "8",
    "TRAIN_LOG_EVERY": "1",
    "VAL_LOSS_EVERY": "1",
    "WARMUP_STEPS": "2",
    "MAX_WALLCLOCK_SECONDS": "0.001",
    "ARTIFACT_LIMIT_BYTES": "1000",
    "ATTENTION": "fa3",
    "COMPILE": "1",
    "VAL_BATCH_SIZE": "256",
    "DATA_PATH": "/nowhere",
    "TOKENIZER_PATH": "/nowhere/tokenizer.model",
    "EVAL_ONLY": "/nowhere/artifact.bin",
    "AUDIT": "1",
    "AUDIT_TARGET": "/nowhere/recorded.npz",
    "CODEC": "decompress",
    "ARTIFACT": "/nowhere/artifact.bin",
    "INPUT": "/nowhere/text",
    "OUTPUT": "elsewhere",
    "RUN_ID": "named",
    "RUN_DIR": "elsewhere",
    "TTT_LAST_BLOCKS": "1",
    "TTT_CHUNK_TOKENS": "64",
    "TTT_LR": "0.01",
    "TTT_EPOCHS": "2",
    "TTT_BATCH_SEQS": "4",
    "POLYAK_DECAY": "0.9",
    "NGRAM_CACHE": "none",
    "CACHE_MAX_ORDER": "2",
    "CACHE_DOCUMENT_ORDER": "0",
    "CACHE_CHUNK_TOKENS": "64",
    "CACHE_HIDDEN": "8",
    "CACHE_STEPS": "1",
    "CACHE_LR": "0.01",
    "PSEUDO": "pr864",
    "PSEUDO_SAMPLE": "10",
    "NGRAM_BUCKETS": "64",
    "NGRAM_CHUNK_TOKENS": "100",
    "NGRAM_MAX_ORDER": "3",
    "NGRAM_MIN_COUNT": "1",
    "NGRAM_ALPHA_MIN": "0.2",
    "NGRAM_ALPHA_MAX": "0.3",
    "NGRAM_ALPHA_CLIP": "0.3",
}
BASE = {"EMBED_LR": {"TIE_EMBEDDINGS": "0"}, "HEAD_LR": {"TIE_EMBEDDINGS": "0"}, "RUN_ID": {"RUN_DIR": ""}}
BASE |= {"EVAL_SEQ_LEN": {"EVAL_STRIDE": "8"}, "MICRO_BATCH_SLOTS": {}, "ADAM_EPS": {"WARMDOWN_ITERS": "0"}}
WITH_BIGRAMS = ("BIGRAM_DIM", "BIGRAM_HASH", "MUON_SCOPE", "LOOKUP_BITS")
BASE |= {name: {"BIGRAM_VOCAB_SIZE": "64"} for name in WITH_BIGRAMS}
BASE |= {"VE_DIM": {"VE_LAYERS": "1"}, "MTP_LOSS_WEIGHT": {"MTP_NUM_HEADS": "1"}}
BASE |= {"MUON_WD_ORDER": {"MUON_WD": "0.5"}, "QUANT_SEARCH": {"MATRIX_BITS": "5"}}
BASE |= {name: {"QAT_START": "step0"} for name in ("SOFT_ROUND_QAT", "CROWN_Q_LAMBDA")}
SWA = {"AVERAGE": "swa", "SWA_EVERY": "1", "SWA_START_SCALE": "2"}
BASE |= {"AVERAGE": SWA | {"AVERAGE": "ema"}, "SWA_SOURCE": SWA, "SWA_EVERY": SWA, "SWA_START_SCALE": SWA}
BASE |= {"TRAIN_LOG_EVERY": {"ITERATIONS": "12", "TRAIN_LOG_EVERY": "0"}}
LEARNING = {"TTT_LAST_BLOCKS": "2", "TTT_CHUNK_TOKENS": "256"}
BASE |= dict.fromkeys(
    ("TTT_CHUNK_TOKENS", "TTT_LR", "TTT_EPOCHS", "TTT_BATCH_SEQS", "POLYAK_DECAY"), LEARNING
)
PSEUDO = {"PSEUDO": "pr864", "NGRAM_CHUNK_TOKENS": "50"}
# With PSEUDO=pr834 or not at all: without it the run is refused; test_13_run.py sees what it does.
BASE |= {"GATE_HEAD": {"PSEUDO": "pr834", "GATE_HEAD": "1"}}
RULES = ("NGRAM_M", "NGRAM_B", "NGRAM_A", "NGRAM_CH", "PSEUDO_SAMPLE")
BASE |= {name: PSEUDO for name in ACTS if name.startswith(RULES)}
CODEC = ("CODEC", "ARTIFACT", "INPUT", "OUTPUT")
BASE |= {name: {"CODEC": "compress", "INPUT": "text", "OUTPUT": "coded"} for name in CODEC}


def observe(env, monkeypatch, tmp_path):
    """Run and return everything a user could notice, times left out."""
    monkeypatch.chdir(tmp_path)
    seen = {"compiled": 0, "passes": 0, "scattered": False}
    chunk = train_gpt.ScoredChunk

    def count_compile(function, **_):
        seen["compiled"] += 1
        return function

    def count_pass(*values):
        seen["passes"] += 1
        return chunk(*values)

    start_sum = train_gpt.Process.start_sum

    def watch_sum(process, bank, own_only):
        seen["scattered"] |= own_only
        return start_sum(process, bank, own_only)

    monkeypatch.setattr(train_gpt.Process, "start_sum", watch_sum)
    monkeypatch.setattr(train_gpt.torch, "compile", count_compile)
    monkeypatch.setattr(train_gpt, "ScoredChunk", count_pass)
    seen["exit"] = train_gpt.main(env)
    seen["folders"] = sorted(p.parent.name for p in tmp_path.rglob("result.json"))
    run_dirs = [p.parent for p in tmp_path.rglob("result.json")]
    seen["coded"] = sorted(
        p.name for p in tmp_path.glob("*") if p.is_file() and p.read_bytes().startswith(train_gpt.CODEC_MAGIC)
    )
    if run_dirs and seen["exit"] == 0:
        env = {**env, "RUN_DIR": str(run_dirs[0])}
        result = result_of(env)
        artifact = train_gpt.read_artifact(run_dirs[0] / "artifact.bin")
        seen["weights"] = [tensor.numpy().tobytes() for tensor in artifact.weights.values()]
        seen["numbers"] = [result[name] for name in ("val_loss", "val_bpb", "steps", "train_loss")]
        seen["events"] = [len(metrics_of(env, event)) for event in ("train", "validation")]
        log = (run_dirs[0] / "run.log").read_text()
        seen["lines"] = [re.sub(r"[\d.]+", "", line) for line in log.splitlines() if "average:" in line]
        seen["audited"] = (run_dirs[0] / "audit.json").exists()
        seen["header"] = (run_dirs[0] / "artifact.bin").read_bytes()[-40:]
        if (settings := Settings.from_env(env)).pseudo != "none":
            tokens, sizes = np.arange(500) ** 2 % 37 % 11, np.ones(499)
            stream, gate = (tokens, -2 * sizes, 3 * sizes, sizes), np.zeros((499, 7))
            gate = {"beside": gate} if settings.gate_head else {}
            seen["pseudo"] = train_gpt.pseudo_report(*stream, settings, **gate)
        seen["warmup"] = (run_dirs[0] / "run.log").read_text().count("warmup_step:")
    for run_dir in run_dirs:
        (run_dir / "result.json").unlink()
    return seen


@pytest.fixture(scope="module")
def observed_bases():
    return {}


def test_every_setting_is_in_the_table():
    assert ACTS.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", ACTS)
def test_every_setting_acts(name, env, monkeypatch, tmp_path, observed_bases, tiny_artifact):
    (tmp_path / "text").write_bytes(b"text to code")
    base = {
        **env,
        "RUN_DIR": "run",
        "WARMUP_STEPS": "0",
        "ARTIFACT": str(tiny_artifact),
        **BASE.get(name, {}),
    }
    key = json.dumps({k: v for k, v in base.items() if "tmp" not in v})
    if key not in observed_bases:
        observed_bases[key] = observe(base, monkeypatch, tmp_path)
        monkeypatch.undo()
    assert observed_bases[key]["exit"] == 0
    assert observe({**base, name: ACTS[name]}, monkeypatch, tmp_path) != observed_bases[key]
