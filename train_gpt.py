"""Train a small language model, write it as an artifact, read the artifact back, score it in bits per byte.

One file, read from top to bottom; every section uses only what stands above it.

    section                        comes in                  goes out
    1  SETTINGS                    environment mapping       Settings, frozen and checked
    2  PROCESS AND LOG             Settings, torchrun        Process (rank, device), Log, Clock
    3  DATA                        shards, tokenizer         token batches, validation tokens, bytes per token
    4  MODEL                       ids (B, T)                logits (B, T, V)
    5  OPTIMIZER                   gradients                 weights one step on
    6  AVERAGING                   weights of every step     averaged weights
    7  QUANTIZATION AND ARTIFACT   weights                   one file, and weights back from it
    8  NEURAL SCORING              model, tokens             ScoredChunk stream, account -> bits per byte
    9  EXACT COUNTS                tokens                    Recall: what was seen before each target
    10  MIXTURE                    ScoredChunks, Recall      prices of the mixture -> val_bpb
    11  HASHED PSEUDO-SCORES       recorded stream           figures that are no scores
    12  AUDIT AND CODEC            scorer, or a file         audit.json, receipt.bin; a file coded and back
    13  RUN                        all of the above          run folder, exit code

Launch; every setting is an environment variable:
    torchrun --standalone --nproc_per_node=8 train_gpt.py         8 GPUs, ten minutes
    EVAL_ONLY=runs/<RUN_ID>/artifact.bin python train_gpt.py      score an existing artifact
    CODEC=compress ARTIFACT=<artifact> INPUT=<file> OUTPUT=<file> python train_gpt.py
The last line of every complete run:
    final val_bpb:<8 decimals> val_loss:<8 decimals> artifact_bytes:<n> train_seconds:<s> eval_seconds:<s>
Units: nats inside, bits per byte of raw UTF-8 text in reports; sizes are bytes, 1 MB = 1,000,000 bytes.
Exit codes: 0 done, 2 setting, 3 artifact over the limit, 4 audit failed, 5 bad input file or data, 6 loss not
finite, 130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import zstandard
from torch import Tensor, distributed, nn
from tqdm import tqdm

# ============================================================================================================
# 1 SETTINGS. In: a mapping of environment variables, named as in the contest. Out: `Settings`, frozen,
# checked before the run looks at devices, files or the clock. Precedence: a variable set by hand, then what
# an artifact stores (EVAL_ONLY), then the recipe's row, then the default.
# ============================================================================================================


class RunError(Exception):
    """A failure the user can mend: one line that names the thing, its value, the rule and the remedy."""

    def __init_subclass__(cls, exit_code: int) -> None:
        cls.exit_code = exit_code


class SettingError(RunError, exit_code=2):
    """A setting, or a combination of settings, breaks a rule."""


class SizeError(RunError, exit_code=3):
    """Code and weights together exceed the contest's limit."""


class DataError(RunError, exit_code=5):
    """An input file (shard, tokenizer, manifest, artifact) is missing, damaged or of the wrong kind."""


class AuditError(RunError, exit_code=4):
    """The score is not a code length, or not that of the artifact."""


class NonFiniteError(RunError, exit_code=6):
    """A loss, a weight or a score is infinite or not a number."""


def require(holds: bool, fault: str) -> None:
    """Raise ValueError with the `fault` of what is read unless the condition `holds`."""
    if not holds:
        raise ValueError(fault)


# Shared by the five references and ours; by the five; by four of them and ours; by four; three; two:
COMMON = """TRAIN_SEQ_LEN=2048 WARMDOWN_ITERS=3500 TIED_EMBED_LR=0.035 MATRIX_LR=0.025 SCALAR_LR=0.025
    MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
    MUON_WD=0.04 ADAM_WD=0.04 QUANT_SEARCH=1"""
REFERENCE = f"{COMMON} QUANT_SCALE_FLOOR=1 FP16_MAX_NUMEL=65536 AUDIT=0"
LAYERS = """NUM_LAYERS=11 MLP_ACTIVATION=leaky2 SMEAR_GATE=half GRAD_CLIP_NORM=0.3 TRAIN_BATCH_TOKENS=786432
    VAL_LOSS_EVERY=4000 TRAIN_LOG_EVERY=500 AVERAGE=best"""
ELEVEN = f"{REFERENCE} {LAYERS} ROPE_DIMS=16 ROPE_NTK_LENGTH=1024"
WIDE = f"""{ELEVEN} NUM_KV_HEADS=8 MLP_MULT=3.5 LN_SCALE=norm VE_LAYERS=9,10 XSA_LAST_N=11
    MATRIX_INIT=scaled QAT_START=scale:0.5 MATRIX_BITS=5"""
PRUNED = f"""{WIDE} BIGRAM_VOCAB_SIZE=6144 MAX_WALLCLOCK_SECONDS=582 PRUNE_PCT=0.08 CROWN_Q_LAMBDA=0.01
    TTT_LAST_BLOCKS=1 TTT_CHUNK_TOKENS=1048576 TTT_BATCH_SEQS=256 TTT_LR=3e-5"""
RECIPES = {
    "baseline": "",  # the contest's, 9 layers, 17,059,912 parameters: every default
    # Two CPU cores, two minutes on the standard library's source; records/README.md says what was tried.
    "cpu": """DATA_PATH=./data/datasets/stdlib TOKENIZER_PATH=./data/datasets/stdlib/tokenizer.model
        VOCAB_SIZE=4000 NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=2 LOGIT_SOFTCAP=0
        ITERATIONS=100000 MAX_WALLCLOCK_SECONDS=120 WARMUP_STEPS=2 WARMDOWN_ITERS=320 TRAIN_BATCH_TOKENS=4096
        TRAIN_SEQ_LEN=256 MICRO_BATCH_SLOTS=2 DATA_LANES=32 TIED_EMBED_LR=0.02 MATRIX_LR=0.02 SCALAR_LR=0.02
        MUON_MOMENTUM=0.85 EMA_DECAY=0.98 TRAIN_LOG_EVERY=10 VAL_LOSS_EVERY=0 VAL_BATCH_SIZE=8192""",
    # Seconds, for tests: every stage runs, nothing is learned worth having.
    "smoke": """VOCAB_SIZE=384 NUM_LAYERS=3 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MAX_WALLCLOCK_SECONDS=0
        ITERATIONS=4 WARMUP_STEPS=1 WARMDOWN_ITERS=2 TRAIN_BATCH_TOKENS=512 TRAIN_SEQ_LEN=32 TRAIN_LOG_EVERY=2
        MICRO_BATCH_SLOTS=2 DATA_LANES=4 VAL_LOSS_EVERY=2 VAL_BATCH_SIZE=1024 EVAL_STRIDE=8 EMA_DECAY=0.8""",
    # The five reference submissions, by pull request of openai/parameter-golf: what their code does, not what
    # their READMEs say (779's, 834's: value residual, gated attention). Not so here: QAT has the exporter's
    # quantizer and reaches embeddings (pruning is the export's alone), SWA may be exported (890, 779, 834
    # drop it), held-out training tokens choose weights (864: validation text), the clipped norm is global
    # (864: local) and waits for the sums of gradients, gains are float32.
    "pr890": f"{WIDE} BIGRAM_VOCAB_SIZE=4096 EVAL_STRIDE=32 PSEUDO=pr890",
    "pr810": f"""{REFERENCE} NUM_LAYERS=10 MLP_MULT=3 SMEAR_GATE=twentieth BIGRAM_VOCAB_SIZE=2048
        BIGRAM_HASH=linear XSA_LAST_N=4 PRE_ENRICH_DIM=768 UNET_LONGER_HALF=encoder EMBED_INIT=overtone
        MUON_SCOPE=lookup MUON_WD_ORDER=after AVERAGE=mean QAT_START=step0 MATRIX_BITS=6 LOOKUP_BITS=6
        EMBED_BITS=16 COMPRESSOR=lzma PSEUDO=pr810""",
    "pr779": f"{PRUNED} PSEUDO=pr779",  # both leave 18 seconds of the clock to the export
    "pr834": f"{PRUNED} PSEUDO=pr834 GATE_HEAD=1",  # a learned gate weighs its hashed tables
    # Its seeds 42 and 2024 have BIGRAM_VOCAB_SIZE=1536. The first block's value-residual weights act here.
    "pr864": f"""{ELEVEN} MLP_MULT=3 BIGRAM_VOCAB_SIZE=1024 XSA_LAST_N=4 VALUE_RESIDUAL=1 GATED_ATTN=1
        MATRIX_INIT=orthogonal PARALLEL_MUON=1 MUON_SCOPE=matrix SWA_SOURCE=ema QAT_START=time:0.85
        MATRIX_BITS=6 LOOKUP_BITS=6 EMBED_BITS=16 PSEUDO=pr864""",
    # Our own, the default on CUDA: parts that helped at reduced width (records/README.md has the table).
    "record": f"""{COMMON} {LAYERS} NUM_KV_HEADS=8 MLP_MULT=2.5 BIGRAM_VOCAB_SIZE=4096 VE_LAYERS=9,10
        VALUE_RESIDUAL=1 GATED_ATTN=1 XSA_LAST_N=11 QAT_START=scale:0.5 MATRIX_BITS=5 PARALLEL_MUON=1""",
}

# Names of other submissions, and the setting here that stands for each.
REFUSED = """LEAKY_RELU:MLP_ACTIVATION MLP_MULT_ENCODER:MLP_MULT MLP_MULT_DECODER:MLP_MULT SWA_ENABLED:AVERAGE
    VE_ENABLED:VE_LAYERS USE_BIGRAMHASH:BIGRAM_VOCAB_SIZE USE_SMEARGATE:SMEAR_GATE INT6_LAST_N:MATRIX_BITS
    USE_VALUE_RESIDUAL:VALUE_RESIDUAL USE_GATED_ATTENTION:GATED_ATTN NGRAM_ORDER:NGRAM_MAX_ORDER
    QAT_ENABLED:QAT_START LATE_QAT_THRESHOLD:QAT_START USE_LATE_QAT:QAT_START QAT_TIME_FRAC:QAT_START
    NGRAM_ENABLED:PSEUDO NGRAM_EVAL:PSEUDO USE_MIXER:PSEUDO MIXER_HEAD:GATE_HEAD USE_EMA:EMA_DECAY
    RUN_CONFIG:RECIPE TTT_ONLY:EVAL_ONLY SKIP_SLIDING:EVAL_STRIDE NGRAM_ENT_BASE:NGRAM_ALPHA_MIN
    SWA_START_FRAC:SWA_START_SCALE WEIGHT_DECAY:MUON_WD+ADAM_WD GRAD_ACCUM_STEPS:MICRO_BATCH_SLOTS
    NGRAM_ENT_RANGE:NGRAM_ALPHA_MAX NGRAM_ALPHA:NGRAM_ALPHA_MIN+NGRAM_ALPHA_MAX USE_TTT:TTT_LAST_BLOCKS
    QTTT:TTT_LAST_BLOCKS TTT_MODE:TTT_LAST_BLOCKS USE_POLYAK:POLYAK_DECAY TTT_OPTIMIZER:TTT_LAST_BLOCKS
    BYTE_WEIGHTED_TTT:TTT_LAST_BLOCKS TTT_TEMPERATURE:PSEUDO NGRAM_ENTROPY_CENTER:PSEUDO MIXER_ETA:PSEUDO
    NGRAM_MIN_ORDER:PSEUDO NGRAM_TWO_PASS:PSEUDO ADAPTIVE_LR:TTT_LR"""
FREEZE = "TTT_LAST_BLOCKS, the blocks that adapt (#779 and #834 count those, #864 the first that do not),"
REFUSED_NAMES = {**dict(pair.split(":") for pair in REFUSED.split()), "TTT_FREEZE_BLOCKS": FREEZE}
OTHER_TOOLS = {"COMPILER", "MODEL_DIR", "DATASET_PATH", "OMP_NUM_THREADS"}  # close to settings' names


def setting(default, doc: str, low=None, high=math.inf, choices=None, stored: str = ""):
    """Return a dataclass field with its rule: inclusive range, allowed values, and what artifacts store:
    "shape" where the weights depend on it (it cannot differ), "scoring" where the score does (a default)."""
    rule = {"doc": doc, "low": low, "high": high, "choices": choices, "stored": stored}
    return dataclasses.field(default=default, metadata=rule)


def choice(options: str, doc: str, stored: str = ""):
    """Return a field whose value is one of the words of `options`, at first the first of them."""
    return setting(options.split()[0], doc, choices=tuple(options.split()), stored=stored)


def parse_setting(field: dataclasses.Field, text: str):
    """Return `text` as the type of `field`; a bool is 0 or 1 and nothing else, a number is finite."""
    rule = {"bool": "0 (off) or 1 (on)", "int": "a whole number", "float": "a finite number"}.get(field.type)
    convert = {"bool": {"0": False, "1": True}.__getitem__, "int": int, "float": float}.get(field.type, str)
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        if isinstance(value := convert(text), str) or math.isfinite(value):
            return value
    raise SettingError(f"{field.name.upper()}={text!r} is not {rule}; the default is {field.default}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run. `Settings()` is the contest's baseline; `Settings.from_env` reads a mapping."""

    # run and files
    recipe: str = setting("baseline", "named row of overrides", choices=tuple(RECIPES))
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of *_train_*.bin and *_val_*.bin")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "tokenizer of the shards")
    run_id: str = setting("", "name of the run; empty: recipe, seed and time of start")
    run_dir: str = setting("", "folder for log, metrics, result and artifact; empty: runs/<RUN_ID>")
    eval_only: str = setting("", "artifact to score instead of training one")
    audit: bool = setting(True, "prove that the score is a code length, into audit.json")
    audit_target: str = setting("", "recorded distributions of another evaluator, to audit instead")
    codec: str = choice("none compress decompress", "turn INPUT into OUTPUT by ARTIFACT instead")
    artifact: str = setting("", "artifact of CODEC")
    input: str = setting("", "file that CODEC reads")
    output: str = setting("", "file that CODEC writes")
    seed: int = setting(1337, "seed of every random number", 0, 2**31 - 1)
    compile: str = choice("auto 0 1", "torch.compile; auto: on CUDA only")
    attention: str = choice("auto sdpa fa3 fa4", "attention kernel")
    artifact_limit_bytes: int = setting(16_000_000, "limit for code and weights together", 1)
    # training
    iterations: int = setting(20_000, "optimizer steps at most", 1)
    max_wallclock_seconds: float = setting(600.0, "training clock at most; 0: no limit", 0.0)
    warmup_steps: int = setting(20, "steps before the clock, undone: they prime compiler and caches", 0)
    warmdown_iters: int = setting(1_200, "steps of the final linear decay of the learning rates", 0)
    train_batch_tokens: int = setting(524_288, "tokens of one step over all ranks", 1, 2**30)
    train_seq_len: int = setting(1_024, "tokens of one training sequence", 1, 2**17, stored="scoring")
    micro_batch_slots: int = setting(8, "micro-batches of one step, shared out over the ranks", 1, 4_096)
    data_lanes: int = setting(1, "places where the training stream is read side by side", 1, 2**20)
    train_log_every: int = setting(200, "steps between train_loss lines; 0: first ten only", 0)
    val_loss_every: int = setting(1_000, "steps between validations; 0: after the last step only", 0)
    val_batch_size: int = setting(524_288, "validation tokens of MICRO_BATCH_SLOTS forward passes", 1, 2**30)
    # model
    vocab_size: int = setting(1_024, "tokens in the vocabulary", 2, 2**16, stored="shape")
    num_layers: int = setting(9, "transformer blocks", 1, 256, stored="shape")
    model_dim: int = setting(512, "width of the residual stream", 2, 2**14, stored="shape")
    num_heads: int = setting(8, "query heads", 1, 1_024, stored="shape")
    num_kv_heads: int = setting(4, "key and value heads (grouped-query attention)", 1, 1_024, stored="shape")
    mlp_mult: float = setting(2.0, "MLP width over MODEL_DIM", 0.01, 64.0, stored="shape")
    mlp_activation: str = choice("relu2 leaky2", "relu or leaky relu (slope 0.5), squared", "shape")
    tie_embeddings: bool = setting(True, "output matrix is the embedding", stored="shape")
    logit_softcap: float = setting(30.0, "c in c * tanh(logits / c); 0: off", 0.0, 1e4, stored="shape")
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", 1.0, 1e9, stored="shape")
    rope_dims: int = setting(0, "channels of a head that rotate; 0: all", 0, 512, stored="shape")
    rope_ntk_length: int = setting(0, "length from which ROPE_BASE grows; 0: never", 0, 2**17, stored="shape")
    xsa_last_n: int = setting(0, "last blocks with exclusive self attention", 0, 256, stored="shape")
    value_residual: bool = setting(False, "values mix with the first block's", stored="shape")
    gated_attn: bool = setting(False, "a gate per token and head on attention", stored="shape")
    dtg_enabled: bool = setting(False, "a gate per token on each block's change", stored="shape")
    ln_scale: str = choice("off norm branch", "1 / sqrt(block's place) on norms or branches", "shape")
    unet_longer_half: str = choice("decoder encoder", "half that has the odd block", "shape")
    bigram_vocab_size: int = setting(0, "rows of the hashed bigram table; 0: none", 0, 2**20, stored="shape")
    bigram_dim: int = setting(128, "width of the bigram table", 1, 2**14, stored="shape")
    bigram_hash: str = choice("xor linear", "form of hash and table; xor: scaled, starts at zero", "shape")
    smear_gate: str = choice("off half twentieth", "initial share of the token before", "shape")
    pre_enrich_dim: int = setting(0, "width of the MLP before the blocks; 0: none", 0, 2**14, stored="shape")
    ve_layers: str = setting("", "blocks with a value embedding, as in 9,10", stored="shape")
    ve_dim: int = setting(128, "width of the value embedding", 1, 2**14, stored="shape")
    gate_head: bool = setting(False, "a learned gate over hashed tables, for PSEUDO=pr834", stored="shape")
    mtp_num_heads: int = setting(0, "training-only heads for tokens further ahead", 0, 64)
    mtp_loss_weight: float = setting(0.2, "weight of their mean loss", 0.0, 100.0)
    qk_gain_init: float = setting(1.5, "initial gain of each query head", 0.0, 100.0)
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding", 0.0, 10.0)
    embed_init: str = choice("normal overtone", "spectrum of the initial embedding")
    matrix_init: str = choice("uniform orthogonal scaled", "scaled: orthogonal, projections of tables less")
    # optimizer
    tied_embed_lr: float = setting(0.05, "Adam, embedding when tied", 0.0, 10.0)
    embed_lr: float = setting(0.6, "Adam, embedding when not tied", 0.0, 10.0)
    head_lr: float = setting(0.008, "Adam, output matrix when not tied", 0.0, 10.0)
    matrix_lr: float = setting(0.04, "Muon, matrices of the blocks", 0.0, 10.0)
    scalar_lr: float = setting(0.04, "Adam, gains, scales and mixes", 0.0, 10.0)
    muon_momentum: float = setting(0.95, "Muon momentum after its ramp", 0.0, 0.9999)
    muon_momentum_warmup_start: float = setting(0.85, "Muon momentum at step 0", 0.0, 0.9999)
    muon_momentum_warmup_steps: int = setting(500, "length of the momentum ramp in steps", 0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 50)
    muon_wd: float = setting(0.0, "decoupled weight decay of Muon matrices", 0.0, 10.0)
    muon_wd_order: str = choice("before after", "decay of Muon matrices: before or after their update")
    muon_scope: str = choice("projection lookup matrix", "last of matrix, projection, lookup that Muon takes")
    parallel_muon: bool = setting(False, "sums of gradients are scattered over the ranks")
    adam_wd: float = setting(0.0, "decoupled weight decay of all other parameters", 0.0, 10.0)
    beta1: float = setting(0.9, "Adam, first moment", 0.0, 0.9999)
    beta2: float = setting(0.95, "Adam, second moment", 0.0, 0.999999)
    adam_eps: float = setting(1e-8, "Adam, denominator", 1e-16, 1.0)
    grad_clip_norm: float = setting(0.0, "global norm of the averaged gradient at most; 0: off", 0.0)
    # averaging
    ema_decay: float = setting(0.997, "exponential average of the weights; 0: off", 0.0, 0.999999)
    average: str = choice("ema swa mean best", "weights to export; best: on held-out training tokens")
    swa_source: str = choice("raw ema", "what SWA averages")
    swa_every: int = setting(50, "steps between its snapshots", 1)
    swa_start_scale: float = setting(0.2, "learning-rate scale below which they are taken", 0.0, 2.0)
    # quantization and artifact
    matrix_bits: int = setting(8, "bits of a quantized block matrix", choices=(5, 6, 8))
    embed_bits: int = setting(8, "bits of embedding and output matrix", choices=(5, 6, 8, 16))
    lookup_bits: int = setting(8, "bits of bigram and value tables", choices=(5, 6, 8, 16))
    fp16_max_numel: int = setting(0, "matrices up to so many elements stay float16", 0)
    quant_search: bool = setting(False, "clip each row at the percentile of least error")
    quant_scale_floor: bool = setting(False, "scales are 1 / largest integer at least")
    prune_pct: float = setting(0.0, "share of a quantized matrix's smallest weights made 0", 0.0, 0.99)
    qat_start: str = setting("off", "quantization-aware training: off, step0, scale:<x> or time:<x>")
    soft_round_qat: bool = setting(False, "its rounding is soft and hardens, instead of straight-through")
    crown_q_lambda: float = setting(0.0, "weight of its penalty on wide rows", 0.0, 1e6)
    compressor: str = choice("zstd lzma", "of the artifact")
    # scoring
    eval_seq_len: int = setting(0, "tokens of a scoring window; 0: TRAIN_SEQ_LEN", 0, 2**17, stored="scoring")
    eval_stride: int = setting(64, "targets priced by each window but the first", 1, 2**17, stored="scoring")
    ttt_last_blocks: int = setting(0, "last blocks whose queries adapt; 0: none", 0, 256, stored="scoring")
    ttt_chunk_tokens: int = setting(32_768, "targets priced before they adapt", 1, stored="scoring")
    ttt_lr: float = setting(0.0005, "AdamW, what adapts, falling to 0", 0.0, 1.0, stored="scoring")
    ttt_epochs: int = setting(1, "passes over each priced chunk", 1, 1_000, stored="scoring")
    ttt_batch_seqs: int = setting(32, "windows of one of its steps", 1, 2**20, stored="scoring")
    polyak_decay: float = setting(0.0, "average of what adapts; 0: off", 0.0, 0.999999, stored="scoring")
    # hashed pseudo-scores; 0 is the rule's own value
    pseudo: str = choice("none pr864 pr890 pr779 pr810 pr834", "hashed evaluator to show")
    pseudo_sample: int = setting(20_000, "targets at which the pseudo-probabilities are summed", 1)
    ngram_buckets: int = setting(0, "buckets of each hashed table, a power of two; 0: the rule's", 0, 2**30)
    ngram_chunk_tokens: int = setting(0, "targets between updates of the tables; 0: the rule's", 0)
    ngram_max_order: int = setting(0, "longest hashed n-gram; 0: the rule's", 0)
    ngram_min_count: int = setting(0, "count that makes a context match; 0: the rule's", 0)
    ngram_alpha_min: float = setting(0.0, "weight of the tables at entropy 0; 0: the rule's", 0.0, 1.0)
    ngram_alpha_max: float = setting(0.0, "weight of the tables at high entropy; 0: the rule's", 0.0, 1.0)
    ngram_alpha_clip: float = setting(0.0, "weight times the order's factor at most; 0: the rule's", 0.0, 1.0)
    # exact n-gram cache
    ngram_cache: str = choice("exact none", "cache that the final score mixes in", "scoring")
    cache_max_order: int = setting(16, "longest n-gram of the cache", 2, 64, stored="scoring")
    cache_document_order: int = setting(4, "longest per document too; 0: none", 0, 64, stored="scoring")
    cache_chunk_tokens: int = setting(512, "targets between updates of the gate", 1, 2**20, stored="scoring")
    cache_hidden: int = setting(32, "hidden units of the gate", 1, 4_096, stored="scoring")
    cache_steps: int = setting(2, "Adam steps on each priced chunk", 1, 100, stored="scoring")
    cache_lr: float = setting(0.004, "Adam, gate; 0: the gate stays closed", 0.0, 1.0, stored="scoring")

    @classmethod
    def from_env(cls, mapping: Mapping[str, str], stored: Mapping[str, object] | None = None) -> Settings:
        """Return the settings of `mapping` on top of an artifact's `stored` values; raises SettingError."""
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        for name in sorted(mapping.keys() - fields.keys() - OTHER_TOOLS):
            if remedy := REFUSED_NAMES.get(name) or " ".join(get_close_matches(name, fields, 1, 0.85)):
                raise SettingError(f"{name}={mapping[name]!r} is not a setting: set {remedy} or unset it")
        row = dict(pair.split("=", 1) for pair in RECIPES.get(mapping.get("RECIPE", cls.recipe), "").split())
        stored, values = stored or {}, {}
        for name, field in fields.items():
            if name in mapping or (name in row and field.name not in stored):
                values[field.name] = value = parse_setting(field, mapping.get(name, row.get(name)))
                if field.metadata["stored"] == "shape" and value != (kept := stored.get(field.name, value)):
                    raise SettingError(f"{name}={value!r} contradicts the artifact's {kept!r}; unset {name}")
        return cls(**{**stored, **values})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (doc, low, high, choices, _) = getattr(self, field.name), field.metadata.values()
            rule = f"one of {', '.join(map(str, choices))}" if choices else f"a value from {low} to {high}"
            if not (value in choices if choices else low is None or low <= value <= high):
                raise SettingError(f"{field.name.upper()}={value!r} is not allowed ({doc}): choose {rule}")
        s, head, slots = self, self.head_dim, self.micro_batch_slots
        trains, missing = s.codec == "none" and not s.eval_only, "" in (s.artifact, s.input, s.output)
        row, val_row = slots * s.train_seq_len if trains else 1, slots * s.window
        qat = re.fullmatch(r"off|step0|(scale|time):(0\.\d+|1)", s.qat_start)
        no_ema = not s.ema_decay and (s.average == "mean" or s.swa_source == "ema")
        no_qat = s.qat_start == "off" and (s.soft_round_qat or s.crown_q_lambda)
        short_chunk = s.ttt_last_blocks and s.ttt_chunk_tokens < s.window
        gated = s.pseudo == "pr834" or (s.gate_head and not trains)
        for name, broken, rule, number in (
            ("CODEC", s.codec != "none" and missing, "none, or have files", "ARTIFACT, INPUT and OUTPUT"),
            ("MODEL_DIM", s.model_dim % (2 * s.num_heads), "an even multiple of NUM_HEADS", s.num_heads),
            ("NUM_HEADS", s.num_heads % s.num_kv_heads, "a multiple of NUM_KV_HEADS", s.num_kv_heads),
            ("MODEL_DIM", head > 512, "at most 512 times NUM_HEADS", s.num_heads),
            ("TRAIN_BATCH_TOKENS", s.train_batch_tokens % row, "a multiple of slots times sequence", row),
            ("VAL_BATCH_SIZE", s.val_batch_size < val_row, "at least MICRO_BATCH_SLOTS windows", val_row),
            ("NGRAM_BUCKETS", s.ngram_buckets.bit_count() > 1, "a power of two or 0", "the rule's"),
            ("GATE_HEAD", s.gate_head != gated, "on with PSEUDO=pr834 and only then", s.pseudo),
            ("EVAL_STRIDE", s.eval_stride > s.window, "at most the scoring window", s.window),
            ("XSA_LAST_N", s.xsa_last_n > s.num_layers, "at most NUM_LAYERS", s.num_layers),
            ("TTT_LAST_BLOCKS", s.ttt_last_blocks > s.num_layers, "at most NUM_LAYERS", s.num_layers),
            ("TTT_CHUNK_TOKENS", short_chunk, "at least the scoring window", s.window),
            ("POLYAK_DECAY", s.polyak_decay and not s.ttt_last_blocks, "0 without", "TTT_LAST_BLOCKS"),
            ("VE_LAYERS", s.value_layers[-1:] >= (s.num_layers,), "numbers below NUM_LAYERS", s.num_layers),
            ("ROPE_DIMS", s.rope_dims % 2 or s.rope_dims > head, "even, at most a head's channels", head),
            ("MTP_NUM_HEADS", s.mtp_num_heads >= s.train_seq_len, "below TRAIN_SEQ_LEN", s.train_seq_len),
            ("EMA_DECAY", no_ema, "above 0 for AVERAGE=mean and SWA_SOURCE=ema", s.average),
            ("QAT_START", not qat, "off, step0, scale:<x> or time:<x> with x at most", 1),
            ("QAT_START", no_qat, "on for SOFT_ROUND_QAT and CROWN_Q_LAMBDA", s.crown_q_lambda),
        ):
            if broken:
                raise SettingError(f"{name}={vars(s)[name.lower()]!r} must be {rule} ({number}); change one")

    head_dim = property(lambda self: self.model_dim // self.num_heads, doc="Channels of one attention head.")
    window = property(lambda self: self.eval_seq_len or self.train_seq_len, doc="Tokens of a scoring window.")

    @property
    def value_layers(self) -> tuple[float, ...]:
        """Blocks with a value embedding, in order; what is not a number lies beyond every model."""
        return tuple(sorted({int(x) if x.isdecimal() else math.inf for x in self.ve_layers.split(",") if x}))

    def stored_values(self, kinds: tuple[str, ...] = ("shape", "scoring")) -> dict[str, object]:
        """Return what an artifact keeps: the settings its weights or its score depend on."""
        return {f.name: vars(self)[f.name] for f in dataclasses.fields(self) if f.metadata["stored"] in kinds}

    def changed(self) -> dict[str, object]:
        """Return the settings that differ from the defaults, by variable name."""
        return {name.upper(): value for name, value in vars(self).items() if value != getattr(Settings, name)}


# ============================================================================================================
# 2 PROCESS AND LOG. In: torchrun's variables, the run folder. Out: `Process` (rank, device, sums over ranks),
# `Log` (console, run.log, metrics.jsonl), `Clock`. Rank 0 alone writes; ranks agree on time and failure over
# a CPU channel, so agreeing never waits for the GPU.
# ============================================================================================================


class Process(NamedTuple):
    """This process among its ranks. With one rank every method is the identity."""

    rank: int
    world_size: int
    device: torch.device

    is_main = property(lambda self: self.rank == 0, doc="True on the one rank that writes.")

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place, and return it."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def own(self, bank: Tensor) -> Tensor:
        """Return this rank's slice of a bank whose length the number of ranks divides."""
        return bank.chunk(self.world_size)[self.rank]

    def start_sum(self, bank: Tensor, own_only: bool) -> list:
        """Start adding `bank` (`own_only`: `own(bank)` alone) over all ranks; wait for the handles."""
        if self.world_size > 1 and own_only:
            return [distributed.reduce_scatter(self.own(bank), [*bank.chunk(self.world_size)], async_op=True)]
        return [distributed.all_reduce(bank, async_op=True)] if self.world_size > 1 else []

    def start_gather(self, bank: Tensor) -> list:
        """Start filling `bank` with every rank's own slice; wait for the handles."""
        parts = list(bank.chunk(self.world_size))
        return [distributed.all_gather(parts, self.own(bank).clone(), async_op=True)] if parts[1:] else []

    def share(self, value: object) -> list:
        """Return every rank's `value`, by rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise on every rank the RunError or OSError that one meets in the body: nobody waits for it."""
        failure = None
        try:
            yield
        except (RunError, OSError) as error:
            failure = error
        if self.sum(torch.tensor(float(failure is not None))):
            raise next(error for error in self.share(failure) if error)

    def synchronize(self) -> None:
        """Wait until the device has done everything it was given."""
        torch.get_device_module(self.device).synchronize(self.device)

    def precision(self) -> contextlib.AbstractContextManager:
        """Return the context of a forward pass: bfloat16 autocast on CUDA; float32 on CPU, faster there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def progress(self, total: int, label: str) -> tqdm:
        """Return a progress bar that shows on rank 0's terminal only."""
        return tqdm(range(total), desc=label, leave=False, disable=None if self.is_main else True)


@contextlib.contextmanager
def open_process(mapping: Mapping[str, str], settings: Settings) -> Iterator[Process]:
    """Yield this process, in torchrun's group if there is one; SettingError if ranks cannot share slots."""
    given = [mapping.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    rank, world_size, local_rank = map(int, given) if all(given) else (0, 1, 0)
    slots, gpus = settings.micro_batch_slots, torch.cuda.is_available() and torch.cuda.device_count()
    if slots % world_size:
        raise SettingError(f"WORLD_SIZE={world_size} must divide MICRO_BATCH_SLOTS={slots}; change one")
    if gpus and local_rank >= gpus:
        raise SettingError(f"LOCAL_RANK={local_rank} has no GPU of {gpus}; lower --nproc_per_node")
    if gpus:
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(not gpus)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with contextlib.ExitStack() as stack:
        if world_size > 1:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
            stack.callback(distributed.destroy_process_group)
        yield Process(rank, world_size, torch.device("cuda", local_rank) if gpus else torch.device("cpu"))


class Log:
    """Lines for people (console and run.log) and one JSON object per event (metrics.jsonl); rank 0 only."""

    def __init__(self, process: Process, folder: Path) -> None:
        self.folder, names = folder, ("run.log", "metrics.jsonl") if process.is_main else ()
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self.files = [open(folder / name, "w", encoding="utf-8", buffering=1) for name in names]

    def line(self, text: str) -> None:
        """Write `text` to the console and to run.log."""
        if self.files and text:
            tqdm.write(text)
            sys.stdout.flush()
            self.files[0].write(text + "\n")

    def event(self, event: str, line: str | None = None, **values: object) -> None:
        """Write {"event": event, **values} for programs, and `line`, or else the values, for people."""
        shown = " ".join(f"{k}:{round(v, 6) if isinstance(v, float) else v}" for k, v in values.items())
        self.line(f"{event}: {shown}" if line is None else line)
        if self.files:
            self.files[1].write(json.dumps({"event": event, **values}) + "\n")

    def step(self, event: str, step: int, total: int, train_time_ms: float, **values: float) -> None:
        """Write a step's numbers in the contest's line shape."""
        line = f"step:{step}/{total} " + " ".join(f"{name}:{value:.4f}" for name, value in values.items())
        line += f" train_time:{train_time_ms:.0f}ms step_avg:{train_time_ms / max(step, 1):.2f}ms"
        self.event(event, line, step=step, train_time_ms=train_time_ms, **values)


class Clock:
    """A running stopwatch. It waits for the device at start and stop: queued work counts where it belongs."""

    def __init__(self, process: Process) -> None:
        self.process, self.total_ms = process, 0.0
        self.start()

    def start(self) -> None:
        """Go on."""
        self.process.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Stop; time passes uncounted until the next start."""
        self.process.synchronize()
        self.total_ms, self.started = self.read_ms(), math.inf

    def read_ms(self) -> float:
        """Return rank 0's milliseconds so far on every rank, without waiting for the device."""
        elapsed_ms = self.total_ms + 1000.0 * max(0.0, time.perf_counter() - self.started)
        return self.process.sum(torch.tensor(elapsed_ms * self.process.is_main, dtype=torch.float64)).item()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then rename: `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)


# ============================================================================================================
# 3 DATA. In: shard files, a tokenizer, perhaps a manifest.json of data/text.py. Out: `Dataset`: training
# batches as a pure function of (step, slot), validation tokens, the bytes of each target: those of the raw
# documents, which a manifest states. Headers, lengths and token ids are checked before the device sees them.
# ============================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
MARKER_ID = 1  # begin-of-document token of the contest's shards and of data/text.py
WORD_START = "\u2581"  # SentencePiece writes a space like this


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards_sha256(paths: list[Path]) -> str:
    """Return the SHA-256 over the SHA-256s of a split's shards, in name order."""
    return hashlib.sha256("".join(map(file_sha256, paths)).encode()).hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """Return a shard's tokens, memory-mapped uint16; raises DataError naming the file and its fault."""
    magic, version, tokens = struct.unpack("<3i", np.fromfile(path, np.uint8, 12).tobytes().ljust(12, b"\0"))
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        rule = f"{SHARD_MAGIC} or shard version {version} is not {SHARD_VERSION}"
        raise DataError(f"{path}: magic number {magic} is not {rule}; make the shard anew")
    if (size := path.stat().st_size) != (expected := SHARD_HEADER_BYTES + 2 * tokens):
        raise DataError(f"{path}: {size} bytes are not the {expected} of its {tokens} tokens; get it anew")
    return np.memmap(path, "<u2", "r")[SHARD_HEADER_BYTES // 2 :]


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of `split` ("train" or "val") in name order; raises DataError without any."""
    if paths := sorted(folder.glob(f"*_{split}_*.bin")):
        return paths
    remedy = "run `python data/text.py` (any text) or `python data/fineweb.py` (the contest's)"
    raise DataError(f"DATA_PATH={folder}: no *_{split}_*.bin shard there; {remedy}, or set DATA_PATH")


def check_token_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    """Return `tokens` of `path`; raises DataError where a token id is not in the vocabulary."""
    if (largest := int(tokens.max(initial=0))) >= vocab_size:
        raise DataError(f"{path}: token id {largest} is not below VOCAB_SIZE={vocab_size}; mend one of them")
    return tokens


class TokenStream:
    """Training tokens as one endless stream over all shards; a batch is a pure function of its number.
    Equal lanes are read side by side: sequence q is row q // lanes of lane q % lanes (one: the contest)."""

    def __init__(self, paths: list[Path], settings: Settings) -> None:
        self.settings, self.paths, self.shards = settings, paths, [open_shard(path) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total, lanes = int(self.ends[-1]), settings.data_lanes
        if self.total == 0:
            raise DataError(f"{paths[0]}: the training shards are empty; bring more text")
        if self.total // lanes <= settings.train_seq_len:
            rule = f"not above TRAIN_SEQ_LEN={settings.train_seq_len}; lower TRAIN_SEQ_LEN or DATA_LANES"
            raise SettingError(f"DATA_LANES={lanes}: {self.total} training tokens over the lanes are {rule}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start` on, int32; the first shard follows the last."""
        start %= self.total
        index = int(np.searchsorted(self.ends, start, side="right"))
        ids = self.shards[index][start - int(self.ends[index]) :][:count].astype(np.int32)
        check_token_ids(ids, self.settings.vocab_size, self.paths[index])
        return ids if len(ids) == count else np.append(ids, self.read(start + len(ids), count - len(ids)))

    def batch(self, step: int, slot: int) -> Tensor:
        """Return micro-batch `slot` of `step`: (B, T + 1) int32, inputs and targets overlapping by T."""
        s = self.settings
        rows = s.train_batch_tokens // s.micro_batch_slots // s.train_seq_len
        q = np.arange(rows) + (step * s.micro_batch_slots + slot) * rows
        starts = q % s.data_lanes * (self.total // s.data_lanes) + q // s.data_lanes * s.train_seq_len
        return torch.from_numpy(np.stack([self.read(int(start), s.train_seq_len + 1) for start in starts]))


class Tokenizer:
    """Bytes to token ids and back, exactly, by a SentencePiece model or the contest's pure byte tokenizer;
    `source` is the content of the .model or .json file. Raises ValueError where it is neither."""

    def __init__(self, source: bytes) -> None:
        self.source, self.sha256, self.model = source, hashlib.sha256(source).hexdigest(), None
        try:
            if source.startswith(b"{"):
                markers = int(json.loads(source)["config"]["byte_offset"])
                self.pieces = [b""] * min(max(markers, 0), 2**16) + [bytes([value]) for value in range(256)]
            elif source:
                self.model = sentencepiece.SentencePieceProcessor(model_proto=source)
                self.pieces = [self._piece(token) for token in range(self.model.vocab_size())]
            require(MARKER_ID < len(self.pieces) <= 2**16 and not self.pieces[MARKER_ID], "no marker 1")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError("neither a SentencePiece model with marker 1 nor pure bytes") from error
        self.byte_ids = {p[0]: token for token, p in reversed([*enumerate(self.pieces)]) if len(p) == 1}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the tokenizer at `path`; raises DataError where it is missing or not a tokenizer."""
        try:
            return cls(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"TOKENIZER_PATH={path}: {error}; set it to the shards' own") from error

    def _piece(self, token: int) -> bytes:
        """Return a token's raw bytes: markers none, byte pieces one, others text with U+2581 as space."""
        marker = self.model.is_control(token) or self.model.is_unknown(token) or self.model.is_unused(token)
        text = "" if marker else self.model.id_to_piece(token).replace(WORD_START, " ")
        return bytes.fromhex(text[3:5]) if self.model.is_byte(token) else text.encode()

    def target_bytes(self, tokens: np.ndarray, exact: bool) -> np.ndarray:
        """Return the bytes of tokens (N + 1,) but the first, uint16 (N,): raw (`exact`), or the contest's
        (build_sentencepiece_luts): a leading space behind a marker is free, an inner U+2581 has 3."""
        size = np.array([len(piece) for piece in self.pieces], dtype=np.uint16)
        if exact or self.model is None:
            return size[tokens[1:]]
        texts = [self.model.id_to_piece(token) if piece else "" for token, piece in enumerate(self.pieces)]
        spaced, inner = np.array([(t[:1] == WORD_START, t.count(WORD_START, 1)) for t in texts], np.uint16).T
        return (size + 2 * inner)[tokens[1:]] - (spaced[tokens[1:]] & (size == 0)[tokens[:-1]])

    def encode(self, data: bytes) -> list[int]:
        """Return ids that decode to exactly `data`: byte pieces where the model would normalise it."""
        ids = self.model.encode(data) if self.model else self._encode_bytes(data)
        if self.decode(ids) == data:
            return ids
        ids = []
        # White space but single spaces goes alone: normalisation would join it to the word that follows.
        for part in re.split(rb"([^\S ]+| {2,})", data):
            found, done = self.model.encode(part, return_type="offset_mapping", return_bytes=True), 0
            for token, (start, end) in zip(found["ids"], found["offsets"], strict=True):
                if self.pieces[token] == part[start:end]:
                    ids += [*self._encode_bytes(part[done:start]), token]
                    done = end
            ids += self._encode_bytes(part[done:])
        return ids

    def _encode_bytes(self, data: bytes) -> list[int]:
        if missing := set(data) - self.byte_ids.keys():
            raise DataError(f"the tokenizer has no piece for byte {min(missing)}; use one with byte fallback")
        return [self.byte_ids[value] for value in data]

    def decode(self, ids) -> bytes:
        """Return the bytes of a sequence of token ids; markers give none."""
        return b"".join(map(self.pieces.__getitem__, ids))


class Dataset(NamedTuple):
    """What a run reads; `stream` is None where nothing is trained, `manifest` for shards without one."""

    stream: TokenStream | None
    val_tokens: np.ndarray  # (N + 1,) uint16
    target_bytes: np.ndarray  # (N,) uint16, bytes of each validation target
    tokenizer: Tokenizer
    manifest: dict | None
    hashes: dict[str, str]

    def size_of(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bytes (N,) of `tokens` (N + 1,) but the first, counted as those of the split are."""
        return self.tokenizer.target_bytes(tokens, exact=self.manifest is not None)


def read_manifest(path: Path, hashes: dict[str, str], val_bytes: int) -> dict:
    """Return a manifest.json of data/text.py, its training split in `hashes`; DataError for a false one."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        val, other, tokenizer = manifest["splits"]["val"], manifest["splits"]["train"], manifest["tokenizer"]
        stated = {"tokenizer_sha256": tokenizer["sha256"], "val_sha256": val["sha256"]}
        if (stated, val["bytes"]) != (hashes, val_bytes):
            fault = f"another tokenizer or other shards: {val['bytes']} raw val bytes, {val_bytes} in tokens"
            raise DataError(f"{path} states {fault}; set TOKENIZER_PATH to it or make the shards anew")
        hashes["train_sha256"], _ = other["sha256"], tokenizer["trained_here"]
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of data/text.py ({error!r}); make it anew") from error


def load_dataset(settings: Settings, carried: Tokenizer | None = None) -> Dataset:
    """Open and check all of DATA_PATH; `carried`: an artifact's tokenizer. Raises DataError, SettingError."""
    folder, path = Path(settings.data_path), Path(settings.data_path, "manifest.json")
    paths, tokenizer = find_shards(folder, "val"), carried or Tokenizer.load(Path(settings.tokenizer_path))
    if (size := len(tokenizer.pieces)) != settings.vocab_size:
        raise SettingError(f"VOCAB_SIZE={settings.vocab_size} is not the tokenizer's {size} pieces; set that")
    shards = [check_token_ids(open_shard(shard), settings.vocab_size, shard) for shard in paths]
    if len(val_tokens := np.concatenate(shards)) < 2:
        raise DataError(f"{paths[0]}: {len(val_tokens)} validation tokens leave nothing to score; bring more")
    target_bytes = tokenizer.target_bytes(val_tokens, exact=path.exists())
    hashes = {"val_sha256": shards_sha256(paths), "tokenizer_sha256": tokenizer.sha256}
    manifest = read_manifest(path, hashes, int(target_bytes.sum())) if path.exists() else None
    stream = None if settings.eval_only else TokenStream(find_shards(folder, "train"), settings)
    return Dataset(stream, val_tokens, target_bytes, tokenizer, manifest, hashes)


# ============================================================================================================
# 4 MODEL. In: token ids (B, T). Out: logits (B, T, V); the one body is `GPT.logits`, called by training,
# scoring and everything later. Letters: B batch, T time, H query heads, K key/value heads, D channels,
# V vocabulary. Parameter names are the contest's. Guards causality: no position sees a later one.
# ============================================================================================================

GATES = 7  # logits of #834's gate: the neural price, then orders 2 ... 7
ROLES = {"tok_emb": "embedding", "lm_head": "head", "embed": "lookup", "proj": "projection"}
linear = functools.partial(nn.Linear, bias=False)  # matrices have no bias, gates have


def rms_norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, without a learned gain."""
    return F.rms_norm(x, (x.size(-1),), eps=1.19e-7).to(x.dtype)  # the default varies with version and dtype


def rotary_tables(length: int, dims: int, base: float, ntk_length: int = 0) -> Tensor:
    """Return cos and sin (arXiv 2104.09864), (2, length, dims / 2); beyond `ntk_length` the base grows."""
    base *= max(1.0, length / (ntk_length or length)) ** (dims / max(dims - 2, 1))
    speeds = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * speeds
    return torch.stack((angles.cos().float(), angles.sin().float()))


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the first R channels of x (B, H, T, D) by position; channel i pairs with channel i + R / 2."""
    cos, sin = rotary[:, : x.size(-2)].to(x.dtype)
    first, second, still = x.tensor_split((cos.size(-1), 2 * cos.size(-1)), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, still), dim=-1)


def gate(inputs: int, outputs: int, bias: float | list[float]) -> nn.Linear:
    """Return a linear layer that starts as its bias, whatever comes in: for gates sigmoid(layer(x))."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    layer.bias.data.copy_(torch.tensor(bias))
    return layer


def pseudo_weights(gate: Tensor, matched: Tensor) -> Tensor:
    """Return #834's weights (..., 1 + O): softmax of `gate` where `matched`, 5 % for the neural price."""
    known = F.pad(matched, (1, 0), value=True)
    weights = 0.95 * gate[..., : known.size(-1)].masked_fill(~known, -math.inf).softmax(dim=-1)
    return torch.cat((0.05 + weights[..., :1], weights[..., 1:]), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised, gained queries; its output starts at zero."""

    def __init__(self, settings: Settings, exclusive: bool) -> None:
        super().__init__()
        self.exclusive, self.head_dim, s, D = exclusive, settings.head_dim, settings, settings.model_dim
        widths = (D, s.num_kv_heads * s.head_dim, s.num_kv_heads * s.head_dim, D)
        self.c_q, self.c_k, self.c_v, self.proj = (linear(D, width) for width in widths)
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))
        self.vr_lambda = nn.Parameter(torch.full((2,), 0.5)) if s.value_residual else None
        self.attn_gate = gate(D, s.num_heads, 4.0) if s.gated_attn else None

    def forward(self, x: Tensor, rotary: Tensor, extra=0.0, first=None, memory=None) -> tuple:
        """Return the attention branch for x (B, T, D), and the first block's values (B, T, K * D / H).

        `extra` is added to this block's values; `memory`, (2, B, K, past + T, D / H), is filled up."""
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x) + extra
        first = v if first is None else first
        if self.vr_lambda is not None:
            v = self.vr_lambda[0].to(v.dtype) * first + self.vr_lambda[1].to(v.dtype) * v
        q, k, v = (flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for flat in (q, k, v))
        q = apply_rotary(rms_norm(q), rotary) * self.q_gain.to(q.dtype)[:, None, None]  # (B, H, T, D / H)
        k = apply_rotary(rms_norm(k), rotary)  # (B, K, T, D / H)
        if memory is not None:
            memory[..., -x.size(1) :, :] = torch.stack((k, v))
        k, values = (k, v) if memory is None else memory.to(q.dtype)
        # A single new position sees all that there is.
        y = F.scaled_dot_product_attention(q, k, values, is_causal=k.size(2) == x.size(1), enable_gqa=True)
        if self.exclusive:  # exclusive self attention: less the part of y along the own value
            unit, grouped = F.normalize(v, dim=-1, eps=1e-12)[:, :, None], y.unflatten(1, (v.size(1), -1))
            y = (grouped - (grouped * unit).sum(dim=-1, keepdim=True) * unit).flatten(1, 2)
        if self.attn_gate is not None:
            y = y * torch.sigmoid(self.attn_gate(x)).mT[..., None]
        return self.proj(y.transpose(1, 2).flatten(2)), first


class Block(nn.Module):
    """Attention and MLP (squared relu) on a residual stream that can take in the embedding again."""

    def __init__(self, settings: Settings, layer: int) -> None:
        super().__init__()
        s, D, hidden = settings, settings.model_dim, max(1, round(settings.mlp_mult * settings.model_dim))
        self.attn = Attention(s, exclusive=layer >= s.num_layers - s.xsa_last_n)
        self.mlp = nn.ModuleDict({"fc": linear(D, hidden), "proj": linear(hidden, D)})
        self.slope = {"relu2": 0.0, "leaky2": 0.5}[s.mlp_activation]
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(D)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
        scales = {s.ln_scale: (layer + 1) ** -0.5}
        self.norm_scale, self.branch_scale = scales.get("norm", 1.0), scales.get("branch", 1.0)
        self.dtg_gate = gate(D, 1, 2.0) if s.dtg_enabled else None

    def forward(self, x: Tensor, x0: Tensor, *carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the stream after this block and the first values; x, x0 (embedding) are (B, T, D)."""
        start = self.resid_mix[0].to(x.dtype) * x + self.resid_mix[1].to(x.dtype) * x0
        branch, first = self.attn(self.norm_scale * rms_norm(start), *carried)
        x = start + (self.branch_scale * self.attn_scale).to(x.dtype) * branch
        inner = F.leaky_relu(self.mlp.fc(self.norm_scale * rms_norm(x)), self.slope).square()
        x = x + (self.branch_scale * self.mlp_scale).to(x.dtype) * self.mlp.proj(inner)
        if self.dtg_gate is not None:
            x = start + torch.sigmoid(self.dtg_gate(start.detach())) * (x - start)
        return x, first


class Lookup(nn.Module):
    """A small table, a projection to the width where it is added, and perhaps (not None) a scale."""

    def __init__(self, rows: int, dim: int, width: int, std: float, scale: float | None) -> None:
        super().__init__()
        self.embed, self.proj = nn.Embedding(rows, dim), linear(dim, width)
        nn.init.normal_(self.embed.weight, std=std)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale))

    def forward(self, indices: Tensor) -> Tensor:
        """Return (B, T, width) for indices (B, T)."""
        x = self.proj(self.embed(indices))
        return x if self.scale is None else self.scale.to(x.dtype) * x


def bigram_indices(ids: Tensor, rows: int, form: str) -> Tensor:
    """Return the row of the bigram table for each token of ids (B, T) and the one before it, if any."""
    previous = F.pad(ids[:, :-1], (1, 0))
    if form == "linear":
        return (92_821 * previous + ids) % rows
    mixed = ((36_313 * ids) ^ (27_191 * previous)) % max(rows - 1, 1)
    return F.pad(mixed[:, 1:], (1, 0), value=rows - 1)


def parameter_role(name: str, parameter: Tensor) -> str:
    """Return "embedding", "head", "lookup" (another table), "projection" (of one), "matrix" or "scalar"."""
    if parameter.ndim != 2 or not name.endswith(".weight") or "gate" in name:
        return "scalar"
    return ROLES.get(name.removeprefix("bigram.").removeprefix("ve_shared.")[: -len(".weight")], "matrix")


class GPT(nn.Module):
    """The contest's transformer: U-Net skips from the first half of the blocks to the second."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, s, kv_dim = settings, settings, settings.num_kv_heads * settings.head_dim
        D, V, E = s.model_dim, s.vocab_size, s.pre_enrich_dim
        self.num_encoder = (s.num_layers + (s.unet_longer_half == "encoder")) // 2
        self.tok_emb = nn.Embedding(V, D)
        nn.init.normal_(self.tok_emb.weight, std=s.tied_embed_init_std)
        self.blocks = nn.ModuleList(Block(s, layer) for layer in range(s.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(s.num_layers // 2, D))
        self.lm_head = None if s.tie_embeddings else linear(D, V)
        self.mtp_heads = nn.ModuleList(linear(D, V) for _ in range(s.mtp_num_heads))
        start = {"xor": (0.0, 0.05), "linear": (0.01, None)}[s.bigram_hash]
        self.bigram = Lookup(s.bigram_vocab_size, s.bigram_dim, D, *start) if s.bigram_vocab_size else None
        self.ve_shared = Lookup(V, s.ve_dim, kv_dim, 0.01, 0.1) if s.value_layers else None
        self.ve_layer_scales = nn.Parameter(torch.ones(len(s.value_layers))) if s.value_layers else ()
        share = {"off": None, "half": 0.0, "twentieth": -3.0}[s.smear_gate]
        self.smear_gate = None if share is None else nn.Parameter(torch.full((D,), share))
        self.pre_enrich = nn.Sequential(linear(D, E), nn.GELU(), linear(E, D)) if E else None
        if s.embed_init == "overtone":
            u, spectrum, v = torch.linalg.svd(self.tok_emb.weight.data, full_matrices=False)
            self.tok_emb.weight.data.copy_(u * (spectrum[0] * torch.arange(1, len(spectrum) + 1) ** -0.5) @ v)
        for name, parameter in self.named_parameters():  # zero: what writes to the stream or to logits
            role = parameter_role(name, parameter)
            if re.search(r"(attn|mlp)\.proj\.weight$|^lm_head|^mtp_", name):
                nn.init.zeros_(parameter)
            elif role in ("matrix", "projection") and s.matrix_init != "uniform":
                scaled = role == "projection" and s.matrix_init == "scaled"
                nn.init.orthogonal_(parameter, (2 * s.num_layers) ** -0.5 if scaled else 1.0)
        self.gate_head = gate(D, GATES, [2.0] + (GATES - 1) * [0.0]) if s.gate_head else None
        length, dims = max(s.train_seq_len, s.window), s.rope_dims or s.head_dim
        self.rotary = nn.Buffer(rotary_tables(length, dims, s.rope_base, s.rope_ntk_length), persistent=False)

    def smeared(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of ids with bigrams and a learned share of the position before."""
        s, x = self.settings, self.tok_emb(ids)
        if self.bigram is not None:
            x = x + self.bigram(bigram_indices(ids, s.bigram_vocab_size, s.bigram_hash))
        x = rms_norm(x) if self.pre_enrich is None else x
        if self.smear_gate is not None:
            x = x + torch.sigmoid(self.smear_gate) * (F.pad(x[:, :-1], (0, 0, 1, 0)) - x)
        return x

    def hidden(self, ids: Tensor, last: int | None = None, memory=None, seen: int = 0) -> Tensor:
        """Return the normed output of the blocks (B, T, D) for ids (B, T), or of the last positions only.

        `memory` (layers, 2, B, K, window, D / H) holds keys and values of the first `seen` ids, 0 or T - 1,
        from the call before, and takes in those of the others, for which alone there is an output."""
        s, device, near = self.settings, ids.device.type, max(seen - 2, 0)
        x = self.smeared(ids[:, near:])[:, seen - near :]  # bigrams and smear reach two positions back
        x = x if self.pre_enrich is None else rms_norm(self.pre_enrich(x))
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        rotary, x0, first, skips = self.rotary[:, seen:], x, None, []
        shared = None if self.ve_shared is None else self.ve_shared(ids[:, seen:])
        extra = {i: w.to(x.dtype) * shared for i, w in zip(s.value_layers, self.ve_layer_scales, strict=True)}
        for index, block in enumerate(self.blocks):
            if index >= self.num_encoder and skips:
                x = x + self.skip_weights[index - self.num_encoder].to(x.dtype) * skips.pop()
            past = None if memory is None else memory[index, ..., : ids.size(1), :]
            x, first = block(x, x0, rotary, extra.get(index, 0.0), first, past)
            if index < self.num_encoder:
                skips.append(x)
        return rms_norm(x if last is None else x[:, x.size(1) - last :])

    def capped(self, x: Tensor, head: nn.Module | None) -> Tensor:
        """Return float32 logits (B, T, V) of x (B, T, D) under an output layer; None: the embedding."""
        weight, cap = (head or self.tok_emb).weight, self.settings.logit_softcap
        return cap * torch.tanh(F.linear(x / cap, weight).float()) if cap else F.linear(x, weight).float()

    def logits(self, ids: Tensor, last: int | None = None, *memory) -> Tensor:
        """Return logits (B, T, V) in float32 for ids (B, T), or (B, last, V) for the last positions only."""
        return self.capped(self.hidden(ids, last, *memory), self.lm_head)

    def pseudo_loss(self, x: Tensor, logits: Tensor, targets: Tensor, ratios: Tensor) -> Tensor:
        """Return the mean pseudo-price of targets (B, T) in nats, by ratios (B, T, O) of `PseudoOracle`."""
        neural = torch.exp(-F.cross_entropy(logits, targets.flatten(), reduction="none")).view_as(targets)
        weights = pseudo_weights(self.gate_head(x).float(), ratios >= 0)
        prices = weights[..., 0] * neural + (weights[..., 1:] * ratios).sum(dim=-1)
        return -prices.clamp(min=1e-12).log().mean()

    def forward(self, ids: Tensor, targets: Tensor, ratios: Tensor | None = None) -> Tensor:
        """Return the mean cross entropy in nats of targets (B, T) after ids (B, T).

        MTP heads add theirs, 1, 2, ... targets further ahead (arXiv 2404.19737); #834's gate adds a tenth."""
        x, loss = self.hidden(ids), 0.0
        for ahead, head in enumerate((self.lm_head, *self.mtp_heads)):
            logits = self.capped(x[:, : x.size(1) - ahead], head).flatten(0, 1)
            weight = self.settings.mtp_loss_weight / len(self.mtp_heads) if ahead else 1.0
            loss = loss + weight * F.cross_entropy(logits, targets[:, ahead:].flatten())
            if ratios is not None and not ahead:
                loss = loss + 0.1 * self.pseudo_loss(x, logits, targets, ratios)
        return loss


def attention_results(settings: Settings, device: torch.device) -> list[Tensor]:
    """Return output and gradients, in float32, of one small causal attention in bfloat16."""
    torch.manual_seed(0)
    s, heads = settings, (settings.num_heads, settings.num_kv_heads, settings.num_kv_heads)
    inputs = [torch.randn(2, n, 128, s.head_dim, device=device).bfloat16().requires_grad_() for n in heads]
    output = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    return [x.detach().float() for x in (output, *torch.autograd.grad(output.float().square().sum(), inputs))]


def select_attention(settings: Settings, process: Process, log: Log) -> None:
    """Choose the kernel under attention, log which and why; one works if it agrees with PyTorch's own."""
    asked, reasons = settings.attention, []
    names = {"auto": ("fa3", "fa4"), "sdpa": ()}.get(asked, (asked,))
    for name in names if process.device.type == "cuda" else ():
        try:
            torch.backends.cuda.enable_cudnn_sdp(False)  # PyTorch would prefer cuDNN to the kernel under test
            expected = attention_results(settings, process.device)
            torch.nn.attention.activate_flash_attention_impl(name.upper())
            pairs = zip(attention_results(settings, process.device), expected, strict=True)
            share = torch.stack([(got - want).norm() / want.norm() for got, want in pairs]).max()
            if not share < 0.02:
                raise RuntimeError(f"differs from PyTorch's kernel by {share:.3g} of its norm")
            log.line(f"attention:{name} reason:agrees with PyTorch's own kernel")
            return
        except Exception as error:  # prototype kernels may fail in any way; the next one is tried
            getattr(torch.nn.attention, "restore_flash_attention_impl", lambda: None)()
            torch.backends.cuda.enable_cudnn_sdp(True)
            reasons.append(f"{name}: {type(error).__name__}: {str(error).split(chr(10))[0]}")
    if asked in ("fa3", "fa4"):
        text = f"ATTENTION={asked} does not work here ({'; '.join(reasons) or 'there is no CUDA device'})"
        raise SettingError(f"{text}; install requirements-gpu.txt or use ATTENTION=auto")
    log.line(f"attention:sdpa reason:{'; '.join(reasons) or 'PyTorch picks its kernel'}")


# ============================================================================================================
# 5 OPTIMIZER. In: gradients of slots, summed over ranks. Out: weights one step on. Muon (Newton-Schulz) for
# the blocks' matrices, AdamW for the rest; every parameter is in exactly one group. Schedules are pure
# functions of step and clock. The step queues work and never waits for the device.
# ============================================================================================================


def learning_rate_scale(step: int, elapsed_ms: float, settings: Settings, before_ms: float = 0.0) -> float:
    """Return the factor on every learning rate: 1, then linear to 0 over the last WARMDOWN_ITERS steps.

    Under a wall-clock limit in ms, a step being the mean so far (parameter-golf), `before_ms` not counted."""
    remaining, warmdown = settings.iterations - step, settings.warmdown_iters
    if settings.max_wallclock_seconds:
        remaining = 1000.0 * settings.max_wallclock_seconds - elapsed_ms
        warmdown *= (elapsed_ms - before_ms) / max(step, 1)
    return min(1.0, max(0.0, remaining / warmdown)) if warmdown > 0 else 1.0


def quantization_starts(step: int, elapsed_ms: float, scale: float, settings: Settings) -> bool:
    """Return whether QAT_START is reached: `scale` below x, or share x of time (or ITERATIONS) used up."""
    kind, _, threshold = settings.qat_start.partition(":")
    at, limit_ms = float(threshold or 0), 1000.0 * settings.max_wallclock_seconds
    used = elapsed_ms / limit_ms if limit_ms else step / settings.iterations
    return {"off": False, "step0": True, "scale": scale < at, "time": used >= at}[kind]


def momentum_at(step: int, settings: Settings) -> float:
    """Return Muon's momentum at `step`: linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    steps = settings.muon_momentum_warmup_steps
    ramp = min(step / steps, 1.0) if steps else 1.0
    return (1 - ramp) * settings.muon_momentum_warmup_start + ramp * settings.muon_momentum


def orthogonalize(update: Tensor, steps: int) -> Tensor:
    """Return matrices (..., R, C) whose singular values Newton-Schulz (Muon's quintic) has brought near 1."""
    tall = update.size(-2) > update.size(-1)
    x = (update.mT if tall else update).to(torch.bfloat16 if update.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x.mT if tall else x


class Bank(NamedTuple):
    """Matrices of one shape as one batch, padded with zeros until the number of ranks divides it."""

    matrices: list[nn.Parameter]
    gradient: Tensor  # (padded, R, C), in a step the update; the matrices' .grad are its first slices
    momentum: Tensor  # (padded / ranks, R, C), this rank's own
    arriving: list  # handles of sums or updates under way

    def arrived(self) -> Bank:
        """Wait for the sums or updates under way and return the bank."""
        while self.arriving:
            self.arriving.pop().wait()
        return self


class Muon:
    """Keller Jordan's Muon; matrices of one shape go as one batch, shared out over the ranks.

    buffer = momentum * buffer + gradient; u = orthogonalize(gradient + momentum * buffer);
    p = (1 - lr * decay) * p - lr * sqrt(max(1, rows / columns)) * u. Gradients are summed while AdamW steps
    (unless clipped), updates travel while other banks are worked on, PARALLEL_MUON (#864) scatters sums."""

    def __init__(self, matrices: list[nn.Parameter], settings: Settings, process: Process) -> None:
        self.settings, self.process, self.banks = settings, process, []
        groups = [[m for m in matrices if m.shape == s] for s in dict.fromkeys(m.shape for m in matrices)]
        for group in sorted(groups, key=lambda group: -len(group) * group[0].numel()):
            gradient = group[0].new_zeros(len(group) + -len(group) % process.world_size, *group[0].shape)
            self.banks.append(Bank(group, gradient, torch.zeros_like(process.own(gradient)), []))
            for matrix, view in zip(group, gradient, strict=False):
                matrix.grad = view

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Update every matrix from its gradient, which the update overwrites."""
        s, decay = self.settings, 1 - lr * self.settings.muon_wd
        for bank in self.banks:
            gradient = self.process.own(bank.arrived().gradient)
            bank.momentum.mul_(momentum).add_(gradient)
            gradient.copy_(orthogonalize(gradient.add(bank.momentum, alpha=momentum), s.muon_backend_steps))
            bank.arriving.extend(self.process.start_gather(bank.gradient))
        for bank in self.banks:
            rate = lr * max(1.0, bank.gradient.size(1) / bank.gradient.size(2)) ** 0.5
            if s.muon_wd and s.muon_wd_order == "before":
                torch._foreach_mul_(bank.matrices, decay)
            torch._foreach_add_(bank.arrived().matrices, [m.grad for m in bank.matrices], alpha=-rate)
            if s.muon_wd and s.muon_wd_order == "after":
                torch._foreach_mul_(bank.matrices, decay)


def parameter_groups(model: GPT, settings: Settings) -> tuple[list[dict], list[nn.Parameter]]:
    """Return AdamW's groups, each with its `base_lr`, and Muon's matrices: every parameter once."""
    s, embed_lr = settings, settings.tied_embed_lr if settings.tie_embeddings else settings.embed_lr
    rates = {"embedding": embed_lr, "lookup": embed_lr, "head": s.head_lr, "scalar": s.scalar_lr}
    named = [(parameter_role(name, parameter), parameter) for name, parameter in model.named_parameters()]
    roles = {role: [p for own, p in named if own == role] for role in (*rates, "projection", "matrix")}
    order = ("matrix", "projection", "lookup")
    matrices = [p for role in order[: order.index(s.muon_scope) + 1] for p in roles.pop(role)]
    return [{"params": roles[r], "base_lr": rates.get(r, s.scalar_lr)} for r in roles if roles[r]], matrices


class Optimizers:
    """Both optimizers; AdamW's gradients are a buffer that ends with the loss: one sum averages them all."""

    def __init__(self, groups: list[dict], matrices: list, settings: Settings, process: Process) -> None:
        self.settings, self.process, s = settings, process, settings
        others = [p for group in groups for p in group["params"]]
        sizes = [parameter.numel() for parameter in others]
        self.flat = torch.zeros(sum(sizes) + 1, device=process.device)
        for parameter, view in zip(others, self.flat[:-1].split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)
        options = {"eps": s.adam_eps, "weight_decay": s.adam_wd, "fused": process.device.type == "cuda"}
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(s.beta1, s.beta2), **options)
        self.muon = Muon(matrices, s, process)

    def gather(self, model, batches: list[Tensor]) -> Tensor:
        """Fill the gradient buffers from the micro-batches of all ranks; return the mean loss, ()."""
        torch._foreach_zero_([self.flat, *(bank.gradient for bank in self.muon.banks)])
        for batch in batches:
            ids = batch.to(self.process.device, non_blocking=True).long()
            with self.process.precision():
                loss = model(ids[..., :-1], ids[..., 1:]) / self.settings.micro_batch_slots
            loss.backward()
            self.flat[-1] += loss.detach()
        for bank in self.muon.banks:
            bank.arriving.extend(self.process.start_sum(bank.gradient, self.settings.parallel_muon))
        return self.process.sum(self.flat)[-1].clone()

    def step(self, scale: float, momentum: float) -> None:
        """Clip, then update every parameter; `scale` multiplies every learning rate."""
        if limit := self.settings.grad_clip_norm:
            own = [self.process.own(bank.arrived().gradient) for bank in self.muon.banks]
            square = sum((gradient.square().sum() for gradient in own), self.flat.new_zeros(()))
            square = self.process.sum(square)
            norm = (square + self.flat[:-1].square().sum()).sqrt()
            torch._foreach_mul_([*own, self.flat[:-1]], (limit / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.adam.step()
        self.muon.step(self.settings.matrix_lr * scale, momentum)


# ============================================================================================================
# 6 AVERAGING. In: the weights after every step. Out: the weights that are exported. Averages live on the
# training device, in float32: in bfloat16 small changes would be rounded away. What entered and how far the
# weights moved is logged, so an average that does nothing is seen.
# ============================================================================================================


class Averages:
    """EMA and SWA of the weights, both float32; what AVERAGE does not use is not collected.

    ema = decay * ema + (1 - decay) * weights after every step. swa = mean of the snapshots of weights or EMA
    taken every SWA_EVERY steps once the learning-rate scale is below SWA_START_SCALE (arXiv 1803.05407)."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings, self.updates, self.snapshots, self.swa = settings, 0, 0, {}
        self.live = {name: parameter.detach() for name, parameter in model.named_parameters()}
        used = settings.ema_decay and (settings.average, settings.swa_source) != ("swa", "raw")
        self.ema = {name: p.float().clone() for name, p in self.live.items()} if used else {}

    def update(self, step: int, scale: float) -> None:
        """Take in the weights as they are after `step` steps, the last at learning-rate scale `scale`."""
        s, live, ema = self.settings, [p.float() for p in self.live.values()], list(self.ema.values())
        if ema:
            torch._foreach_lerp_(ema, live, 1 - s.ema_decay)
            self.updates += 1
        if s.average != "ema" and scale < s.swa_start_scale and step % s.swa_every == 0:
            self.swa = self.swa or {name: torch.zeros_like(p).float() for name, p in self.live.items()}
            self.snapshots += 1
            source = ema if s.swa_source == "ema" else live
            torch._foreach_lerp_(list(self.swa.values()), source, 1 / self.snapshots)

    def candidates(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights to export by name, all under AVERAGE=best; for an empty average its source."""
        average, ema = self.settings.average, self.ema or self.live
        found = {"raw": self.live, "ema": ema, "swa": self.swa or ema}
        if average == "mean":
            return {"mean": {name: (weight + found["swa"][name]) / 2 for name, weight in ema.items()}}
        return found if average == "best" else {average: found[average]}

    def moved(self, weights: dict[str, Tensor]) -> float:
        """Return |weights - live weights| / |live weights| over all parameters."""
        new, live = (nn.utils.parameters_to_vector(of.values()).double() for of in (weights, self.live))
        return float((new - live).norm() / live.norm())


# ============================================================================================================
# 7 QUANTIZATION AND ARTIFACT. In: weights. Out: one file, and the weights that come back from it. The file
# describes itself: magic, version, JSON header (settings, tensors, tokenizer), one zstd frame or xz stream,
# SHA-256 of all before it. A file that is not exactly right is refused before what it claims is allocated.
# ============================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION, XZ_MAGIC = b"GOLFGPT\n", 1, b"\xfd7zXZ\0"
PREFIX = struct.Struct("<8s2I")  # magic, version, length of the header
MAX_PAYLOAD_BYTES = 2**30
BITS = {"int8": 8, "int6": 6, "int5": 5}  # kinds of quantized tensors
COLUMNS = ("int8", "float16", "float32")  # NumPy types of all that is stored, in the order of the file
STORED = {**dict.fromkeys(BITS, COLUMNS[:2]), "float16": COLUMNS[1:2], "float32": COLUMNS[2:]}  # by kind
PERCENTILES = (1.0, 0.99999, 0.9999, 0.9995, 0.999)  # of a row's absolute values, where QUANT_SEARCH clips
ARTIFACT_FAULTS = (ValueError, KeyError, TypeError, SettingError, zstandard.ZstdError, lzma.LZMAError)


def restore_rows(integers: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weights that `quantize_rows` stood for."""
    return integers.float() * scale.float()[:, None]


def quantize_rows(weight: Tensor, bits: int, search=False, floor=False) -> tuple[Tensor, Tensor]:
    """Return (integers int8 (R, C), scales float16 (R,)) of a weight (R, C): symmetric, one scale per row.
    Restored values are off by half a scale at most, unless `search` clips a row at the percentile of least
    squared error. `floor` keeps scales at 1 / limit at least: coarser, compresses better."""
    limit, weight = 2 ** (bits - 1) - 1, weight.float()

    def integers(scale: Tensor) -> Tensor:
        return (weight / scale.float()[:, None]).round().clamp(-limit, limit)

    places = [(1 - p) * (weight.size(1) - 1) for p in (PERCENTILES if search else (1.0,))]
    top = weight.abs().topk(min(int(max(places)) + 2, weight.size(1)), dim=1).values
    clips = [torch.lerp(top[:, int(x)], top[:, min(int(x) + 1, top.size(1) - 1)], x % 1) for x in places]
    # (percentiles, R); 2^-24 is the least positive float16.
    scales = (torch.stack(clips) / limit).clamp(min=1 / limit if floor else 2.0**-24).to(torch.float16)
    if search:
        errors = torch.stack([(restore_rows(integers(s), s) - weight).square().sum(dim=1) for s in scales])
        scales = scales.gather(0, errors.argmin(dim=0, keepdim=True))
    return integers(scales[0]).to(torch.int8), scales[0]


def prune(weight: Tensor, share: float) -> Tensor:
    """Return `weight` with the `share` of its entries that are smallest in absolute value set to 0."""
    count = int(share * weight.numel())
    return weight.where(weight.abs() > weight.abs().flatten().kthvalue(count).values, 0) if count else weight


def tensor_kind(name: str, tensor: Tensor, settings: Settings) -> str:
    """Return how a parameter is stored: matrices and tables quantized, gains and mixes in float32."""
    role, s = parameter_role(name, tensor), settings
    bits = {"lookup": s.lookup_bits, "embedding": s.embed_bits, "head": s.embed_bits}.get(role, s.matrix_bits)
    table = "float16" if bits == 16 or tensor.numel() <= s.fp16_max_numel else f"int{bits}"
    return "float32" if role == "scalar" else table


class QuantizationAware(nn.Module):
    """The loss of the model that the artifact will hold; gradients pass straight through (arXiv 1308.3432) or
    a soft rounding that hardens. Matrices of one (bits, width) are quantized at once: a small graph."""

    def __init__(self, model: GPT, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings, self.groups = model, settings, {}
        for name, parameter in model.named_parameters():
            if (kind := tensor_kind(name, parameter, settings)) in BITS:
                self.groups.setdefault((BITS[kind], parameter.size(1)), []).append(name)
        if not self.groups and settings.qat_start != "off":
            raise SettingError(f"QAT_START={settings.qat_start} finds no matrix; lower FP16_MAX_NUMEL")
        self.register_buffer("sharpness", torch.ones_like(model.tok_emb.weight[0, 0]), persistent=False)

    def sharpen(self, scale: float) -> None:
        """Set how hard the soft rounding is at learning-rate scale `scale` (spec of #779, #834)."""
        kind, _, threshold = self.settings.qat_start.partition(":")
        self.sharpness.fill_(1 + 15 * max(0.0, 1 - scale / (float(threshold) if kind == "scale" else 1.0)))

    def round_trip(self, weight: Tensor, bits: int) -> Tensor:
        """Return `weight` (R, C) as the artifact would give it back, with a gradient to it."""
        s, limit = self.settings, 2 ** (bits - 1) - 1
        integers, scale = quantize_rows(weight.detach(), bits, s.quant_search, s.quant_scale_floor)
        if not s.soft_round_qat:
            return restore_rows(integers, scale) + (weight - weight.detach())
        scaled = weight / scale.float()[:, None]
        below = scaled.detach().floor()
        step = torch.tanh(self.sharpness * (scaled - below - 0.5)) / torch.tanh(self.sharpness / 2)
        return restore_rows((below + 0.5 + 0.5 * step).clamp(-limit, limit), scale)

    def quantized(self) -> dict[str, Tensor]:
        """Return all matrices that the artifact quantizes as it would give them back, by name."""
        weights: dict[str, Tensor] = {}
        for (bits, _), names in self.groups.items():
            live = [self.model.get_parameter(name) for name in names]
            rows = self.round_trip(torch.cat(live), bits).split([len(p) for p in live])
            weights |= dict(zip(names, rows, strict=True))
        return weights

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the loss of the quantized model, as GPT.forward, and CROWN-Q (#779) on top:
        CROWN_Q_LAMBDA / 12 * sum over matrices of mean(w^2 d^2), d = largest |w| of the row / limit."""
        s, loss = self.settings, torch.func.functional_call(self.model, self.quantized(), inputs)
        for name, p in self.model.named_parameters() if s.crown_q_lambda else ():
            if parameter_role(name, p) in ("matrix", "projection"):
                steps = p.detach().abs().amax(dim=1, keepdim=True) / (2 ** (s.matrix_bits - 1) - 1)
                loss = loss + s.crown_q_lambda / 12 * (p * steps).square().mean()
        return loss

    @torch.no_grad()
    def effect(self) -> dict[str, float]:
        """Return how many matrices are quantized, the share of weights that this changes, and by how much."""
        weights = self.quantized()
        old = torch.cat([self.model.get_parameter(name).flatten() for name in weights]).double()
        change = (torch.cat([weight.flatten() for weight in weights.values()]) - old).abs()
        numbers = {"matrices": len(weights), "weights_changed": float((change > 0).double().mean())}
        return numbers | {"mean_relative_change": float(change.sum() / old.abs().sum())}


def byte_planes(array: np.ndarray) -> bytes:
    """Return all first bytes, then all second bytes, ...: floats compress better that way."""
    return array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def from_byte_planes(data: bytes, dtype: np.dtype) -> np.ndarray:
    """Undo `byte_planes`."""
    return np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1).T.copy().reshape(-1).view(dtype)


def compress_smallest(payload: bytes, compressor: str = "zstd") -> bytes:
    """Return the shortest of a few zstd frames, each with content size and checksum, or an xz stream."""
    if compressor == "lzma":
        return lzma.compress(payload, preset=6)
    # No level is best on quantized weights: 22 varies by several percent, 1 (Huffman almost alone) is steady.
    base = zstandard.ZstdCompressionParameters.from_level
    options = {"source_size": len(payload), "write_checksum": True}
    ways = [base(level, **options) for level in (1, 19, 22)] + [base(19, min_match=7, **options)]
    return min((zstandard.ZstdCompressor(compression_params=way).compress(payload) for way in ways), key=len)


class Artifact(NamedTuple):
    """What comes back from an artifact file."""

    settings: dict[str, object]
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None  # embedded; None where the file only names it by hash
    tokenizer_sha256: str
    sha256: str
    size: int


def pack_artifact(weights: dict[str, Tensor], settings: Settings, tokenizer: Tokenizer, embed: bool) -> bytes:
    """Return the artifact file; `embed`: with the tokenizer itself. NonFiniteError beyond float16's range."""
    s, tensors, arrays = settings, [], []
    for name, tensor in weights.items():
        kind, tensor = tensor_kind(name, tensor, s), tensor.detach().float().cpu()
        parts = (tensor.half() if kind == "float16" else tensor,)
        if kind in BITS:
            parts = quantize_rows(prune(tensor, s.prune_pct), BITS[kind], s.quant_search, s.quant_scale_floor)
        if not parts[-1].isfinite().all():
            raise NonFiniteError(f"{name}: a weight is infinite or no number; lower the learning rates")
        tensors.append([name, list(tensor.shape), kind])
        arrays += [part.numpy().reshape(-1) for part in parts]
    columns = [[array for array in arrays if array.dtype == name] for name in COLUMNS]
    embedded = tokenizer.source if embed else b""
    payload = b"".join(byte_planes(np.concatenate(column)) for column in columns if column) + embedded
    named = {"sha256": tokenizer.sha256, "bytes": len(embedded)}
    header = {"settings": s.stored_values(), "tensors": tensors, "tokenizer": named}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    prefix = PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text))
    body = prefix + text + compress_smallest(payload, s.compressor)
    return body + hashlib.sha256(body).digest()


def expand_frame(frame: bytes, size: int) -> bytes:
    """Return the `size` bytes of a zstd frame or xz stream; raises ValueError where it holds others."""
    if frame.startswith(XZ_MAGIC):
        data = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**28).decompress(frame, max_length=size + 1)
    else:
        # Read in pieces: memory grows with what is really there, not with what the frame claims.
        data, reader = bytearray(), zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(frame)
        while len(data) <= size and (piece := reader.read(2**20)):
            data += piece
    require(len(data) == size, f"its frame does not hold the {size} bytes that its header needs")
    return bytes(data)


def unpack_artifact(data: bytes) -> Artifact:
    """Return the content of an artifact file that is right in everything; raises one of ARTIFACT_FAULTS."""
    require(data.startswith(ARTIFACT_MAGIC), "it does not start with an artifact's magic bytes")
    require(hashlib.sha256(data[:-32]).digest() == data[-32:], "its SHA-256 does not match: cut or altered")
    _, version, length = PREFIX.unpack_from(data)
    require(version == ARTIFACT_VERSION, f"format version {version}, this script reads {ARTIFACT_VERSION}")
    header = json.loads(data[PREFIX.size : PREFIX.size + length])
    values, tensors, parts = dict(header["settings"]), header["tensors"], []
    held, kinds = ({k: type(v) for k, v in of.items()} for of in (values, Settings().stored_values()))
    require(held == kinds, "its header does not hold the settings that this script stores")
    settings = Settings(**values, eval_only="artifact", val_batch_size=2**30)  # batches that break no rule
    with torch.device("meta"):  # shapes without memory
        shapes = [[name, list(parameter.shape)] for name, parameter in GPT(settings).named_parameters()]
    require([entry[:2] for entry in tensors] == shapes, "its tensors are not those of its settings' model")
    named, embedded = header["tokenizer"]["sha256"], header["tokenizer"]["bytes"]
    for name, shape, kind in tensors:
        known = kind in STORED and (kind not in BITS or len(shape) == 2)
        require(known, f"tensor {name} is stored as {kind!r}, which this script does not know")
        parts += zip(STORED[kind], (math.prod(shape), *shape[:1]), strict=False)  # integers, a scale per row
    counts = {np.dtype(name): [count for column, count in parts if column == name] for name in COLUMNS}
    sizes = [dtype.itemsize * sum(lengths) for dtype, lengths in counts.items()]
    possible = type(embedded) is int and 0 <= embedded <= sum(sizes) + embedded <= MAX_PAYLOAD_BYTES
    require(possible, f"its header needs {sum(sizes)} and {embedded!r} bytes, which no artifact has")
    payload, columns, weights = expand_frame(data[PREFIX.size + length : -32], sum(sizes) + embedded), {}, {}
    *planes, source = struct.unpack("{}s{}s{}s{}s".format(*sizes, embedded), payload)
    for (dtype, lengths), plane in zip(counts.items(), planes, strict=True):
        columns[dtype.name] = iter(torch.from_numpy(from_byte_planes(plane, dtype)).split(lengths))
    for name, shape, kind in tensors:
        flat, *scales = (next(columns[column]) for column in STORED[kind])
        weights[name] = restore_rows(flat.reshape(shape), *scales) if scales else flat.reshape(shape).float()
    tokenizer = Tokenizer(source) if source else None
    require(not source or tokenizer.sha256 == named, "its tokenizer is not the one its header names")
    return Artifact(values, weights, tokenizer, named, hashlib.sha256(data).hexdigest(), len(data))


def read_artifact(path: Path) -> Artifact:
    """Read and check an artifact file; raises DataError naming the file and what is wrong with it."""
    try:
        require(path.stat().st_size <= MAX_PAYLOAD_BYTES, "its bytes are more than any artifact has")
        return unpack_artifact(path.read_bytes())
    except (*ARTIFACT_FAULTS, OSError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a valid artifact ({error}); get it anew") from error


# ============================================================================================================
# 8 NEURAL SCORING. In: a model and a token stream. Out: `ScoredChunk`s, and from them, by `account` alone,
# val_loss and val_bpb. `plan_windows` prices every target exactly once, whatever the total; `account` counts
# and refuses otherwise. Nats become bits here and nowhere else.
# ============================================================================================================


def plan_windows(total: int, seq_len: int, stride: int) -> np.ndarray:
    """Return the scoring windows of `total` targets, (windows, 3) int64: start, first, stop.

    A window reads inputs start ... stop - 1 (at most seq_len) and prices targets first ... stop - 1, counted
    from 0; target i follows input i. The first window prices all of its targets, each later one the next
    `stride`, with as much context as fits: what is still to come moves no start."""
    firsts = np.concatenate(([0] * (total > 0), np.arange(seq_len, total, stride))).astype(np.int64)
    starts = np.where(firsts > 0, firsts + stride - seq_len, 0)
    return np.stack((starts, firsts, np.append(firsts[1:], total)[: len(firsts)]), axis=1)


class ScoredChunk(NamedTuple):
    """Some targets and their price, on the device, (n,) each; target i of the stream is tokens[i + 1]."""

    positions: Tensor  # int64, which targets
    logp: Tensor  # float32, log-probability of the target in nats
    entropy: Tensor  # float32, entropy of the whole distribution in nats
    beside: Tensor  # (K, n) float32: log-probabilities of proposals, 0 for none, then further columns


def score_windows(logits, tokens: np.ndarray, plan: np.ndarray, settings, process, label) -> Iterator[tuple]:
    """Yield targets (n,) that windows of `plan` price, their rows of log-probabilities (n, V), and the rest.

    `logits(ids, last)` is GPT.logits or `pseudo_logits`, perhaps compiled. Every pass has one of two shapes:
    opening windows hand out all positions, later ones the last few; short batches are padded."""
    seq_len, opening = settings.window, plan[:, 1] == 0
    batch = settings.val_batch_size // settings.micro_batch_slots // seq_len
    later = int((seq_len + plan[:, 0] - plan[:, 1])[~opening].max(initial=1))
    opens = opening | (later == seq_len)
    with process.progress(len(plan), label) as bar:
        for windows, last in ((plan[opens], seq_len), (plan[~opens], later)):
            size = min(batch, len(windows))
            for begin in range(0, len(windows), max(size, 1)):
                start, first, stop = windows[begin : begin + size].T[:, :, None]
                inputs = start + np.arange(seq_len)  # (size, seq_len)
                ids = np.where(inputs < stop, tokens[inputs.clip(max=len(tokens) - 1)], 0).astype(np.int32)
                ids = np.concatenate((ids, np.zeros((size - len(ids), seq_len), np.int32)))
                kept = inputs[:, seq_len - last :]
                wanted = np.flatnonzero((kept >= first) & (kept < stop))
                arrays = (ids, wanted, kept.reshape(-1)[wanted])
                inputs, picked, positions = (torch.from_numpy(x).to(process.device) for x in arrays)
                with torch.inference_mode(), process.precision():
                    scores = logits(inputs.long(), last).flatten(0, 1).index_select(0, picked)
                    rows, rest = scores.tensor_split((settings.vocab_size,), dim=-1)
                    rows = rows.log_softmax(dim=-1)
                yield positions, rows, rest
                bar.update(len(start))


class TestTimeTraining:
    """A model that learns from targets already priced (#779, #834): queries of its last blocks, all scales.

    After chunk k of n, but the last: AdamW at TTT_LR * (1 + cos(pi k / (n - 1))) / 2 on sum(nll * bytes) /
    sum(bytes) of TTT_BATCH_SEQS windows a step, shared out over the ranks. What scores is a = POLYAK_DECAY *
    a + (1 - POLYAK_DECAY) * weights. n is that of `total` targets, a number that a decoder is told."""

    def __init__(self, model: GPT, settings: Settings, process: Process, size_of, total: int) -> None:
        """`size_of(tokens)`: bytes of all tokens but the first, as in the account."""
        self.model, self.settings, self.process, self.size_of = model, settings, process, size_of
        self.last = max((total - 1) // settings.ttt_chunk_tokens, 1)
        blocks = range(settings.num_layers)[-settings.ttt_last_blocks :]
        names = {f"blocks.{block}.attn.c_q.weight" for block in blocks}
        named = model.requires_grad_(False).named_parameters()
        self.adaptive = [p.requires_grad_() for name, p in named if "scale" in name or name in names]
        self.live = [parameter.detach() for parameter in self.adaptive]
        self.kept, self.trained, self.average = ([p.clone() for p in self.live] for _ in range(3))
        self.reset()

    def reset(self) -> None:
        """Forget all that was learned, but `moved`: by how much it changed one weight at most."""
        self.moved = max(float(change.abs().max()) for change in torch._foreach_sub(self.live, self.kept))
        changes = {"adam_wd": 0.0, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "grad_clip_norm": 1.0}
        groups = [{"params": self.adaptive, "base_lr": self.settings.ttt_lr}]
        self.optimizers = Optimizers(groups, [], dataclasses.replace(self.settings, **changes), self.process)
        for weights in (self.live, self.trained, self.average):
            torch._foreach_copy_(weights, self.kept)

    def loss(self, share: float, ids: Tensor, targets: Tensor) -> Tensor:
        """Return share * sum(nll * bytes); ids and targets (2, B, T) are token ids, then their bytes."""
        nll = F.cross_entropy(self.model.logits(ids[0]).flatten(0, 1), targets[0].flatten(), reduction="none")
        return share * (nll * targets[1].flatten()).sum()

    def learn(self, tokens: np.ndarray, chunk: int) -> None:
        """Adapt to chunk number `chunk` of `tokens`, of which no target is still to be priced."""
        s, process, length = self.settings, self.process, self.settings.ttt_chunk_tokens
        tokens = tokens[chunk * length : (chunk + 1) * length + 1].astype(np.int32)
        pairs = np.stack((tokens, np.append(0, self.size_of(tokens)).astype(np.int32)))
        starts = np.arange(0, length, s.window).clip(max=length - s.window)
        rows = torch.from_numpy(pairs[:, starts[:, None] + np.arange(s.window + 1)])  # (2, rows, T + 1)
        batch = s.val_batch_size // s.micro_batch_slots // s.window
        torch._foreach_copy_(self.live, self.trained)
        for step in rows.split(s.ttt_batch_seqs, dim=1) * s.ttt_epochs:
            share = s.micro_batch_slots / max(int(step[1, :, 1:].sum()), 1)
            own = step.split(batch, dim=1)[process.rank :: process.world_size]
            self.optimizers.gather(functools.partial(self.loss, share), own)
            self.optimizers.step((1 + math.cos(math.pi * chunk / self.last)) / 2, 0.0)
            torch._foreach_lerp_(self.average, self.live, 1 - s.polyak_decay)
        torch._foreach_copy_(self.trained, self.live)
        torch._foreach_copy_(self.live, self.average)


def score_stream(logits, tokens, settings, stride, process, label, proposals=None, learner=None) -> Iterator:
    """Yield this rank's ScoredChunks of all targets of `tokens` (N + 1,); `proposals` (K, N) are priced too.

    `learner`, of the model behind `logits`, learns from each chunk once all of its windows are scored."""
    _ = learner and learner.reset()
    total, size = len(tokens) - 1, settings.ttt_chunk_tokens
    plan, ends = plan_windows(total, settings.window, stride), range(size, total, size) if learner else ()
    asked = torch.from_numpy(tokens[None, 1:].astype(np.int32)).to(process.device)
    asked = asked if proposals is None else torch.cat((asked, proposals))  # (1 + K, N)
    for chunk, part in enumerate(np.split(plan, np.searchsorted(plan[:, 1], ends))):
        own = part[process.rank :: process.world_size]
        for positions, rows, rest in score_windows(logits, tokens, own, settings, process, label):
            ids = asked.index_select(1, positions).long()
            known, entropy = ids < rows.shape[1], -(rows.exp() * rows).sum(dim=-1)
            priced, beside = rows.gather(1, ids.where(known, 0).t()).t() * known, rest.t().float()
            yield ScoredChunk(positions, priced[0], entropy, torch.cat((priced[1:], beside)))
        if chunk < len(ends):
            learner.learn(tokens, chunk)
    _ = learner and learner.reset()


def bits_per_byte(nats: float, size: int) -> float:
    """Return the bits per byte of a text of `size` bytes that costs `nats`."""
    return float(nats) / math.log(2) / int(size)


class Score(NamedTuple):
    """The account of a scored stream."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    tokens: int
    bytes: int


def gather_prices(chunks: Iterable[ScoredChunk], total: int, rows: int, process: Process) -> Tensor:
    """Return what all ranks scored, by position, (3 + rows, total) float32: times, logp, entropy, beside."""
    table = torch.zeros((3 + rows, total), device=process.device)
    for chunk in chunks:
        columns = (torch.ones_like(chunk.logp), chunk.logp, chunk.entropy, *chunk.beside)
        table.index_add_(1, chunk.positions, torch.stack(columns).float())
    return process.sum(table)


def account(times: Tensor, logp: Tensor, target_bytes: np.ndarray) -> Score:
    """Return the account of targets (N,) with prices `logp` and `target_bytes`; the sum is in float64.

    Raises DataError unless `times` has each target priced once, NonFiniteError where the sum is no number."""
    nats, size, wrong = -logp.double().sum().item(), int(target_bytes.sum()), int((times != 1).sum())
    if wrong:
        raise DataError(f"{wrong} of {len(times)} targets were not priced exactly once; mend the plan")
    if not math.isfinite(nats):
        raise NonFiniteError(f"the score is {nats} nats; the artifact's weights are unusable, train anew")
    if size == 0:
        raise DataError("the validation targets have no bytes; set TOKENIZER_PATH to the shards' own")
    return Score(nats / len(times), bits_per_byte(nats, size), len(times), size)


# ============================================================================================================
# 9 EXACT COUNTS. In: the token stream. Out: for every target and every context family (an order, or an order
# inside the document) how often context and target occurred before, as numbers small enough to keep for a
# whole split. Counting is sorting: no hash, no collision, and a place sees every place before it and nothing
# else. Equal contexts stand side by side in a `Line`, in order of time; a count is a rank in it.
# ============================================================================================================

ORDER_LADDER = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)  # orders that price; the chain counts all
CODE_ONE, CODE_LOG = 48, 12  # a feature of 1.0 and log(1 + count) = 1 as codes: any count fits 8 bits
PROPOSERS = ("order2", "order3", "order4", "order6", "document2")  # families whose last token is a proposal

# Targets (n,) int64, equal contexts side by side, earlier ones first; which are the first of theirs, bool.
Line = tuple[Tensor, Tensor]


class Counts(NamedTuple):
    """What one order knows; all (N,) int32; entry i is for target tokens[i + 1]."""

    full: Tensor  # earlier occurrences of context and target together
    context: Tensor  # earlier occurrences of the context
    distinct: Tensor  # different tokens seen after the context
    last: Tensor  # the token after the context's last occurrence, -1 if there is none


def begins(values: Tensor) -> Tensor:
    """Return where `values` (n,) differ from the one before, (n,) bool; the first does."""
    return torch.cat((values.new_ones(min(len(values), 1), dtype=torch.bool), values[1:] != values[:-1]))


def line_up(group: Tensor, target: Tensor) -> Line:
    """Return `target` as a line by `group`; within a group it must be ascending already.

    On a CPU group and target share a 64-bit word where they fit, numpy's fastest sort; else in two steps."""
    bits = len(target) and int(target.max()).bit_length()
    if group.device.type != "cpu" or (bits and int(group.max()) >= 2 ** (63 - bits)):
        group, order = torch.sort(group, stable=True)
        return target.index_select(0, order), begins(group)
    word = (group << bits | target).numpy()
    word.sort()
    target = torch.from_numpy(word & (2**bits - 1))
    word >>= bits
    return target, begins(torch.from_numpy(word))


def count_line(line: Line, pairs: Line, tokens: Tensor) -> tuple[Counts, Tensor, Tensor]:
    """Return what a family knows, by its line and the line of its (context, target) pairs; (N,) int32 each.

    After the counts: how often the context's last continuation came again, tokens since the context did."""
    target, place = line[0], torch.arange(len(line[0]), dtype=torch.int32, device=tokens.device)
    start, pair_start = (place.where(first, 0).cummax(0).values for _, first in (line, pairs))
    seen, blank = place - start, torch.zeros_like(tokens[1:], dtype=torch.int32)

    def earlier(flags: Tensor) -> Tensor:
        before = flags.cumsum(0, dtype=torch.int32) - flags.int()
        return blank.index_copy(0, target, before - before.index_select(0, start))

    full = blank.index_copy(0, pairs[0], place - pair_start)
    token = tokens.index_select(0, target + 1).int()
    before, known = token.roll(1), seen > 0
    last = (blank - 1).index_copy_(0, target, before.where(known, -1))
    age = blank.index_copy(0, target, ((target - target.roll(1)) * known).int())
    distinct, hits = earlier(full.index_select(0, target) == 0), earlier((token == before) & known)
    return Counts(full, blank.index_copy(0, target, seen), distinct, last), hits, age


def count_lines(tokens: Tensor, top: int, vocab_size: int) -> Iterator[tuple[int, Line, Line]]:
    """Yield (order, line, line of (context, target) pairs) for the orders 2 ... top of `tokens` (N + 1,).

    Sorted by the token that follows, the line of order n becomes that of order n + 1. Contexts that occur
    once have no evidence and leave: long orders cost next to nothing."""
    target, first = line_up(tokens.long(), torch.arange(len(tokens), device=tokens.device))
    for order in range(2, top + 1):
        # first.roll(-1): is the next place another context's? Behind the last comes first[0], which is true.
        kept = ~(first & first.roll(-1)) & (target < len(tokens) - 1)
        target, first = target[kept], first[kept]
        pairs = line_up(first.cumsum(0) * vocab_size + tokens.index_select(0, target + 1), target)
        yield order, (target, first), pairs
        target, first = pairs[0] + 1, pairs[1]


def exact_counts(tokens: Tensor, order: int, vocab_size: int) -> Counts:
    """Return the exact counts of one order: `tokens` (N + 1,) int32 or int64, each (N,) on their device.

    The context of target tokens[i + 1] is the order - 1 tokens before it. Where it is incomplete or was never
    seen: 0, 0, 0, -1. Contexts run across document markers. Raises SettingError for an order below 2."""
    for length, *lines in count_lines(tokens, order, vocab_size):
        if length == order:
            return count_line(*lines, tokens)[0]
    raise SettingError(f"order={order} must be 2 at least; a context has one token or more")


def count_families(tokens: Tensor, settings: Settings) -> Iterator[tuple[str, tuple[Counts, Tensor, Tensor]]]:
    """Yield (name, its count_line) for every context family of `tokens` (N + 1,) int32."""
    document = (tokens[:-1] == MARKER_ID).cumsum(0, dtype=torch.int32)
    for order, *lines in count_lines(tokens, settings.cache_max_order, settings.vocab_size):
        if order in ORDER_LADDER:
            yield f"order{order}", count_line(*lines, tokens)
        if order <= settings.cache_document_order:
            split = [(target, first | begins(document.index_select(0, target))) for target, first in lines]
            yield f"document{order}", count_line(*split, tokens)


class Recall(NamedTuple):
    """All that the mixture needs of the counts of a stream of N targets, in few bytes per target."""

    # By name: codes (6, N) uint8, what a weight may know; prices (N,): full / context; last is the target.
    families: dict[str, tuple[Tensor, Tensor, Tensor]]
    proposals: Tensor  # (K, N) int32: tokens that the cache expects, vocab_size where it expects none


def encode_evidence(counts: Counts, hits, age, neighbour: Tensor | int, log_code: Tensor) -> Tensor:
    """Return what is known of a family before the target is, (6, N) uint8 in units of 1 / CODE_ONE.

    Logarithms (by the table `log_code` (N + 1,) uint8) of count, distinct continuations and age; seen once;
    how often the last continuation was right; whether it is the `neighbour`'s too."""
    _, seen, distinct, last = counts
    logs = [log_code.index_select(0, number) for number in (seen, distinct, age)]
    right = (CODE_ONE * hits.long() + seen // 2) // seen.clamp(min=1)
    flags = (CODE_ONE * (seen == 1), right, CODE_ONE * ((seen > 0) & (last == neighbour)))
    return torch.stack(logs + [flag.to(torch.uint8) for flag in flags])


def recall(tokens: Tensor, settings: Settings) -> Recall:
    """Count all families of `tokens` (N + 1,) and keep what the mixture needs."""
    tokens, families, proposals = tokens.int(), {}, []
    numbers = torch.arange(max(len(tokens), 1), dtype=torch.float64, device=tokens.device)
    log_code = (CODE_LOG * numbers.log1p()).round().to(torch.uint8)
    longest, neighbour = settings.vocab_size, -1  # before the first family
    for name, evidence in count_families(tokens, settings):
        full, context, _, last = evidence[0]
        codes = encode_evidence(*evidence, neighbour, log_code)
        families[name] = (codes, full / context.clamp(min=1), last == tokens[1:])
        if name in PROPOSERS:
            proposals.append(last.where(context > 0, settings.vocab_size))
        if name.startswith("order"):
            longest = last.where(context > 0, longest)
        neighbour = last
        del evidence, full, context, last  # large, and the next family is counted before they are replaced
    return Recall(families, torch.stack([longest, *proposals]))


# ============================================================================================================
# 10 MIXTURE. In: prices and entropies of the neural model, `Recall`. Out: prices of the mixture. Every expert
# is a distribution; weights come from a small network that sees what was known before the target was, and
# learns from a chunk of targets once it is priced. So the price of the target alone is a normalised
# probability: weights do not depend on the target, and counts over all targets add up to the context's.
# ============================================================================================================

EMBED_ROWS, RECENT = 4_096, 16  # of the gate: rows of token tables, where ids wrap; targets in a mean price


class Chunk(NamedTuple):
    """Some targets as the gate sees them: features, then the prices that it may only use afterwards."""

    features: Tensor  # (features, n) float32
    rows: Tensor  # (2, n) int64: newest token and the longest context's proposal, for the token tables
    masked: Tensor  # (experts, n) bool: no evidence
    prices: Tensor  # (experts, n) float32: probability of the target, the neural model's first


class Gate:
    """Weights of the experts: softmax of one hidden layer over features, learned from priced chunks."""

    def __init__(self, features: int, experts: int, settings: Settings, device: torch.device) -> None:
        hidden, rows = settings.cache_hidden, min(settings.vocab_size + 1, EMBED_ROWS)
        shapes = [(hidden, features), (experts, hidden), (experts, 1), (hidden, rows), (hidden, rows)]
        sizes = [first * second for first, second in shapes]
        self.steps, self.rate, self.updates = settings.cache_steps, settings.cache_lr, 0
        self.flat, self.gradient, self.moment1, self.moment2 = torch.zeros(4, sum(sizes), device=device)
        parts = (whole.split(sizes) for whole in (self.flat, self.gradient))
        self.weights, self.gradients = (list(map(Tensor.view, part, shapes)) for part in parts)
        noise = torch.randn(shapes[0], generator=torch.Generator().manual_seed(0))
        self.weights[0].copy_(noise / math.sqrt(features))
        self.weights[2][0] = 4.0  # the neural model's logit, against 0 for each expert with evidence

    def forward(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return the hidden layer (hidden, n) and the experts' weights (experts, n); no price is read."""
        into, out, bias, *tables = self.weights
        hidden = into @ chunk.features
        for table, rows in zip(tables, chunk.rows, strict=True):
            hidden += table.index_select(1, rows)
        logits = torch.addmm(bias, out, hidden.clamp_(min=0))
        return hidden, logits.masked_fill_(chunk.masked, -math.inf).softmax(dim=0)

    def learn(self, chunk: Chunk, forward: tuple[Tensor, Tensor]) -> None:
        """Take CACHE_STEPS steps of Adam (Kingma and Ba 2015) on a chunk's mean price; `forward` is its pass.

        The gradient of -log sum(w p) by the logits is w minus the experts' posterior w p / sum(w p)."""
        for step in range(self.steps):
            hidden, weights = self.forward(chunk) if step else forward
            joint = weights * chunk.prices
            delta = weights.sub_(joint.div_(joint.sum(dim=0))).div_(joint.shape[1])
            into, out, bias, *tables = self.gradients
            back = (self.weights[1].t() @ delta).mul_(hidden > 0)
            torch.mm(back, chunk.features.t(), out=into)
            torch.mm(delta, hidden.t(), out=out)
            torch.sum(delta, dim=1, keepdim=True, out=bias)
            for table, rows in zip(tables, chunk.rows, strict=True):
                table.zero_().index_add_(1, rows, back)
            self.updates += 1
            self.moment1.lerp_(self.gradient, 0.1)
            self.moment2.mul_(0.99).addcmul_(self.gradient, self.gradient, value=0.01)
            spread = (self.moment2 / (1 - 0.99**self.updates)).sqrt_().add_(1e-8)
            self.flat.addcdiv_(self.moment1, spread, value=-self.rate / (1 - 0.9**self.updates))


def plan_chunks(total: int, most: int) -> Iterator[slice]:
    """Yield the chunks of `total` targets: shares of what is known, `most` for long.

    The first have 64 targets: early prices learn from few."""
    begin = 0
    while begin < total:
        length = max(64, min(most, begin // 4), begin // 4_096)
        yield slice(begin, min(begin + length, total))
        begin += length


def shared_features(logp: Tensor, entropy: Tensor, proposed: Tensor | None) -> Tensor:
    """Return features (features, N) that no family owns; `logp` (N,) enters one target late at least."""
    late = [F.pad(logp, (lag, 0))[: len(logp)] / 4 for lag in (1, 2, 3)]
    sums = F.pad(logp.double().cumsum(0), (RECENT + 1, 0))
    mean = (sums[RECENT:-1] - sums[: -RECENT - 1]).float() / RECENT
    rows = [torch.ones_like(entropy), entropy / 4 - 1, torch.exp(-entropy), *late, mean / 2]
    return torch.stack(rows + list(proposed / 4 if proposed is not None else [])).clamp(min=-6)


def never_worse(logp: Tensor, gated: Tensor) -> Tensor:
    """Return the Bayesian mixture (N,) float32 of both prices: at most log 2, one bit, over the neural."""
    neural = logp.double()
    lead = (gated - neural).cumsum(0) - (gated - neural)  # of the gate, over all targets before
    return torch.logaddexp(F.logsigmoid(-lead) + neural, F.logsigmoid(lead) + gated).float()


class Mixture(NamedTuple):
    """Prices of a stream, what the weights were on average, and the state behind the last target."""

    logp: Tensor  # (N,) float32, nats
    weights: dict[str, float]  # mean weight of the neural model and of each family
    gate: Gate | None
    lead: float  # of the gate over the neural model in nats, over all targets


class Scored(NamedTuple):
    """A stream scored by all ranks."""

    table: Tensor  # of `gather_prices`: times, neural price, entropy, prices of proposals, what stood beside
    mixture: Mixture


def mix_prices(tokens, known: Recall, logp, entropy, proposed, settings: Settings) -> Mixture:
    """Return the mixture's prices of the targets of `tokens` (N + 1,).

    `logp`, `entropy` (N,) float32 of the neural model; `proposed` (K, N), perhaps None: its view of
    known.proposals. Goes left to right: prices a chunk, then learns from it."""
    shared, families = shared_features(logp, entropy, proposed), len(known.families)
    all_codes, shares, hits = zip(*known.families.values(), strict=True)
    network = Gate(6 * families + len(shared), 1 + 2 * families, settings, logp.device)
    usage, neural = torch.zeros(1 + 2 * families, device=logp.device), logp.exp()
    gated = torch.empty_like(logp, dtype=torch.float64)
    for part in plan_chunks(len(logp), settings.cache_chunk_tokens):
        codes = torch.cat([code[:, part] for code in all_codes])
        masked = ((codes[::6] == 0) | (settings.cache_lr == 0)).repeat(2, 1)
        prices = torch.stack([price[part].float() for price in (neural, *shares, *hits)])
        features = torch.cat([codes.float() / CODE_ONE, shared[:, part]])
        rows = torch.stack([tokens[part], known.proposals[0, part]]).long() % network.weights[3].shape[1]
        chunk = Chunk(features, rows, F.pad(masked, (0, 0, 1, 0)), prices)
        forward = network.forward(chunk)
        usage += forward[1].sum(dim=1)
        weights = forward[1].double()
        cache = (weights[1:] * prices[1:]).sum(dim=0).log()
        gated[part] = torch.logaddexp(weights[0].log() + logp[part], cache) - weights.sum(dim=0).log()
        network.learn(chunk, forward)
    mean = (torch.cat((usage[:1], usage[1:].view(2, -1).sum(dim=0))) / max(len(logp), 1)).tolist()
    weights = dict(zip(("neural", *known.families), mean, strict=True))
    return Mixture(never_worse(logp, gated), weights, network, float((gated - logp.double()).sum()))


def mix_stream(tokens: Tensor, logp: Tensor, entropy: Tensor, settings: Settings) -> Tensor:
    """Return the log-probabilities (N,) float32 of the targets of a recorded stream, tokens (N + 1,)."""
    tokens, logp, entropy = map(torch.as_tensor, (tokens, logp, entropy))
    return mix_prices(tokens, recall(tokens, settings), logp, entropy, None, settings)[0]


def gain_interval(saved: np.ndarray, target_bytes: np.ndarray, document: np.ndarray) -> list[float]:
    """Return the 95 % bootstrap interval over documents of bits saved per byte; all (N,) per target."""
    bits, size = (np.bincount(document, values) for values in (saved, target_bytes))
    random = np.random.default_rng(0)
    draws = (random.integers(len(bits), size=len(bits)) for _ in range(1_000))
    drawn = [bits[picked].sum() / max(size[picked].sum(), 1.0) for picked in draws]
    return np.quantile(drawn, (0.025, 0.975)).tolist()


# ============================================================================================================
# 11 HASHED PSEUDO-SCORES. In: a recorded stream: tokens, log-probability and entropy of each target. Out:
# what the hashed evaluators of five submissions make of it, what their "probabilities" sum to. Each looks up
# the realised target alone in tables whose buckets many n-grams share, so the sum is not 1 and the figure is
# no code length. Nothing of it reaches the ledger, and all that may see a target says `pseudo`.
# Legend: O orders 2 ... max_order, N targets, Q asked targets, K candidates for each of them.
# ============================================================================================================

# At a time: targets times vocabulary asked for (bounds memory, changes nothing), training tokens counted.
PSEUDO_BLOCK, ORACLE_BLOCK = 2**21, 10_000_000
# Multipliers of an n-gram's tokens, oldest first; #864 and #890 each go on from #779's.
HASH_779 = (36313, 27191, 51647, 81929, 131071, 174763, 233017)
HASH_864 = (*HASH_779, 283721, 347237, 409891, 479909, 557927, 631553, 716279, 811207)
HASH_890 = (*HASH_779, 299993, 350377)
# By level (0: no match, 1: order 2, 2: order 3, ...): entropy in nats at which alpha is halfway; its factor.
CENTERS_864 = tuple(3.25 - 0.25 * level for level in range(15))
CENTERS_890 = (0.0, 4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 2.8, 2.6)
CENTERS_810 = (0.0, 4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 3.0, 3.0, 2.7, 2.5)
WEIGHTS_864 = (0.0, 0.3, 0.3, 0.97) + (2.0,) * 11
WEIGHTS_810 = (0.0, 0.30, 0.45, 1.0, 1.88, 1.88) + (2.0,) * 5


class PseudoRule(NamedTuple):
    """One submission's evaluator as data; the first seven are settings, too."""

    max_order: int
    chunk_tokens: int  # targets priced between two updates of the tables
    buckets: int  # of each table, a power of two
    min_count: int  # of a context that matches
    alpha_min: float
    alpha_max: float
    alpha_clip: float
    floor: float  # smallest probability of a target
    centers: tuple[float, ...]
    multipliers: tuple[int, ...] = HASH_779  # (): a polynomial instead
    weights: tuple[float, ...] = (0.0,) + (1.0,) * 8
    beside: int = 0  # columns of `pseudo_logits` that it needs: gate logits, temperature or confidence
    gap: int = 0  # newest tokens that a context leaves out; above 0 a match needs F > 0, too
    gated: bool = False  # a learned gate weighs all orders that match; there is no alpha


PSEUDO_RULES = {
    "pr864": PseudoRule(9, 65_536, 2**22, 2, 0.05, 0.6, 0.95, 1e-10, CENTERS_864, HASH_864, WEIGHTS_864),
    "pr890": PseudoRule(9, 32, 2**22, 2, 0.05, 0.6, 1.0, 1e-30, CENTERS_890, HASH_890, gap=1),
    # Without a match the ratio is 1 / V, for all rules; here alone it has weight.
    "pr779": PseudoRule(7, 2**20, 2**22, 2, 0.05, 0.6, 1.0, 1e-12, (4.0,) * 7, HASH_779, (1.0,) * 7, 3),
    # No code of it survives: clip, smallest count, table size and floor are guesses.
    "pr810": PseudoRule(11, 2**14, 2**22, 2, 0.2, 0.75, 0.95, 1e-20, CENTERS_810, (), WEIGHTS_810, beside=1),
    "pr834": PseudoRule(7, 2**20, 2**20, 2, 0.0, 0.0, 0.0, 1e-12, (0.0,) * 7, gated=True, beside=GATES),
}


def pseudo_rule(name: str, settings: Settings, gated: bool = False) -> PseudoRule:
    """Return the rule `name` with settings above 0 in place of its own; `gated`: gate logits are at hand."""
    names = [name for name, rule in PSEUDO_RULES.items() if gated or not rule.gated]
    if name not in names:
        raise SettingError(f"PSEUDO={name} is no rule without gate logits; choose one of {', '.join(names)}")
    rule, s = PSEUDO_RULES[name], settings
    own = (s.ngram_max_order, s.ngram_chunk_tokens, s.ngram_buckets, s.ngram_min_count)
    own += (s.ngram_alpha_min, s.ngram_alpha_max, s.ngram_alpha_clip)
    rule = PseudoRule(*(value or usual for value, usual in zip(own, rule, strict=False)), *rule[len(own) :])
    if not (top := len(rule.centers)) >= rule.max_order >= 2:
        raise SettingError(f"NGRAM_MAX_ORDER={rule.max_order}: choose one of {name}'s orders, 2 to {top}")
    return rule


def pseudo_logits(model: GPT):
    """Return GPT.logits with columns for what rule PSEUDO needs of the same pass: (B, last, V + rule.beside).

    #834: the logits of its gate. #810: how far pre-enrichment moves the smeared embedding, its L2 norm. #779:
    T = 1 - 0.02 (1 - H / ln V), H being the entropy; log sum of p^(1 / T); entropy at temperature T."""
    name = model.settings.pseudo

    def logits(ids: Tensor, last: int | None = None) -> Tensor:
        x = model.hidden(ids, last)
        logits, beside = model.capped(x, model.lm_head), torch.zeros_like(x[..., : PSEUDO_RULES[name].beside])
        if name == "pr834":
            beside = model.gate_head(x)
        elif name == "pr779":
            rows = logits.log_softmax(dim=-1)
            heat = 0.98 - 0.02 / math.log(rows.size(-1)) * (rows.exp() * rows).sum(dim=-1, keepdim=True)
            whole = (rows / heat).logsumexp(dim=-1, keepdim=True)
            rows = rows / heat - whole
            beside = torch.cat((heat, whole, -(rows.exp() * rows).sum(dim=-1, keepdim=True)), dim=-1)
        elif name == "pr810" and model.pre_enrich is not None:
            smeared = model.smeared(ids)[:, -x.size(1) :]
            beside = (model.pre_enrich(smeared) - smeared).float().norm(dim=-1, keepdim=True)
        return torch.cat((logits, beside.float()), dim=-1)

    return logits


def pseudo_pairs(rule: PseudoRule, contexts: Tensor, targets: Tensor) -> Tensor:
    """Return the bucket of each context (O, ...) with its target (...), or with each of (1, K) targets."""
    if not rule.multipliers:
        return contexts * 1_000_003 + targets & rule.buckets - 1
    factors = targets.new_tensor(rule.multipliers[1 : rule.max_order]).view(-1, *[1] * targets.ndim)
    return torch.bitwise_xor(factors * targets, contexts).bitwise_and_(rule.buckets - 1)


def pseudo_keys(rule: PseudoRule, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the buckets of each target's context and of both together, (O, ..., N), of tokens (..., N + 1).

    Order n has n - 1 tokens t_k, k = 0 the oldest: XOR of t_k * multiplier_k, or #810's polynomial, whose
    even step lets old tokens fade away. Buckets are low bits, which overflow leaves alone. An n-gram that
    would begin before the tokens has the spare bucket, number `rule.buckets`."""
    orders, total = rule.max_order - 1, tokens.size(-1) - 1
    padded = F.pad(tokens, (orders + rule.gap, 0))
    contexts = padded.new_zeros(orders, *tokens.shape[:-1], total)
    fold = Tensor.bitwise_xor_ if rule.multipliers else lambda key, term: key.mul_(265_443_576).add_(term)
    for k in range(orders):
        terms = padded * rule.multipliers[k] if rule.multipliers else padded
        for row in range(k, orders):
            fold(contexts[row], terms[..., orders - row + k :][..., :total])
    pairs = pseudo_pairs(rule, contexts.bitwise_and_(rule.buckets - 1), tokens[..., 1:])
    for row in range(orders):
        contexts[row, ..., : row + rule.gap] = pairs[row, ..., : row + rule.gap] = rule.buckets
    return contexts, pairs


def pseudo_fill(tables: Tensor, keys: Tensor) -> None:
    """Count keys (O, N) in tables (O, buckets + 1); the spare bucket stays empty."""
    # More at a time would be shared out over threads, which wait for each other.
    for new in keys.split(2**15, dim=1):
        tables.scatter_add_(1, new.long(), tables.new_ones(1, 1).expand_as(new))
    tables[:, -1] = 0


def pseudo_counts(keys: Tensor, seen: Tensor, asked: Tensor, buckets: int) -> Tensor:
    """Return how full the buckets `asked` (O, Q, K) were, int32, once the first `seen` (Q,) keys were stored.

    `keys` (O, N) are the buckets that the stream's targets fill, a table per order; `seen` is ascending."""
    counts = torch.empty_like(asked, dtype=torch.int32)
    stops, lengths = (part.tolist() for part in seen.unique_consecutive(return_counts=True))
    # Long chunks: one table at a time, which stays in the processor's cache. Short ones: fewer calls.
    height = 1 if asked[0].numel() >= 4096 * len(stops) else len(keys)
    tables = torch.empty(height, buckets + 1, dtype=torch.int32, device=keys.device)
    for new, *queries in zip(*(part.split(height) for part in (keys, asked, counts)), strict=True):
        stored = 0
        tables.zero_()
        for stop, query, found in zip(stops, *(part.split(lengths, 1) for part in queries), strict=True):
            pseudo_fill(tables, new[:, stored:stop])
            torch.gather(tables, 1, query.flatten(1).long(), out=found.view(height, -1))
            stored = stop
    return counts


def pseudo_mixture(name: str, tokens, entropy, settings: Settings, beside, at, whole=False):
    """Return weight (Q, 1) and share (Q, K) of the targets `at`, ascending: price = weight * p + share.

    Column 0 is the realised target; if `whole`, the tokens 0 ... V - 1 follow. C counts contexts, F contexts
    with a target, as the tables stand when it is priced; a ratio is min(F, C) / C. A gate weighs the ratios
    of all orders whose C suffices; for the other rules the highest such order counts, by alpha."""
    rule, V = pseudo_rule(name, settings, beside is not None), settings.vocab_size
    # An array is copied, for PyTorch warns of memory-mapped ones.
    ids = tokens.int() if torch.is_tensor(tokens) else torch.from_numpy(tokens.astype(np.int32))
    keys, chunk = pseudo_keys(rule, ids), torch.arange(len(ids) - 1, device=ids.device) // rule.chunk_tokens
    seen = chunk[at] * rule.chunk_tokens
    asked, asked_pairs = (part[:, at, None] for part in keys)
    if whole:
        every = torch.arange(V, dtype=torch.int32, device=ids.device)[None]
        asked_pairs = torch.cat((asked_pairs, pseudo_pairs(rule, asked, every)), dim=2)
    contexts = pseudo_counts(keys[0], seen, asked, rule.buckets)
    pairs = pseudo_counts(keys[1], seen, asked_pairs, rule.buckets)
    matched, like = contexts >= rule.min_count, {"dtype": torch.float64, "device": ids.device}
    if rule.gated:
        ratios = torch.minimum(pairs, contexts).double() / contexts.clamp(min=1)
        weights = pseudo_weights(torch.as_tensor(beside, **like)[at], matched[:, :, 0].t()).t()[:, :, None]
        return weights[0], (weights[1:] * ratios).sum(dim=0)
    if rule.gap:
        matched &= pairs[:, :, :1] > 0  # peeks at the target
    steps = torch.arange(1, rule.max_order, dtype=torch.int8, device=ids.device)[:, None, None]
    level = (matched * steps).amax(dim=0).long()  # (Q, 1): 0 is no match, 1 is order 2
    row = (level - 1).clamp(min=0)[None]
    context, pair = (counts.gather(0, row.expand_as(counts[:1]))[0] for counts in (contexts, pairs))
    ratio = torch.where(level > 0, torch.minimum(pair, context).double() / context, 1 / V)
    centers, weights = (torch.tensor(curve, **like) for curve in (rule.centers, rule.weights))
    curve = torch.sigmoid(2 * (torch.as_tensor(entropy, **like)[at, None] - centers[level]))
    alpha = weights[level] * (rule.alpha_min + (rule.alpha_max - rule.alpha_min) * curve)
    if beside is not None and name == "pr810":
        moved = torch.as_tensor(beside, **like)[:, 0]
        # The chunk's maximum looks ahead, as the reference's of a batch does. 0 / 0 is no pre-enrichment.
        most = torch.zeros_like(moved).scatter_reduce(0, chunk, moved, "amax")[chunk[at]]
        alpha = alpha * (0.5 + (moved[at] / most).nan_to_num(0.5))[:, None]
    alpha = alpha.clamp(max=rule.alpha_clip) * (seen > 0)[:, None]  # the first chunk is neural alone
    return 1 - alpha, alpha * ratio


def pseudo_stream(rule: str, tokens, logp, entropy, settings: Settings, beside=None) -> Tensor:
    """Return the pseudo log-probability of each target (N,), float64 nats, of a recorded stream.

    Tensors or arrays: `tokens` (N + 1,); `logp`, `entropy` (N,) of the neural score in nats; `beside` (N, K)
    of `pseudo_logits`, without which pr834 is refused and pr810's confidence is 0.5. Chunk k is the targets
    1 + k * C ... (k + 1) * C; its n-grams enter the tables once all of it is priced. Raises SettingError."""
    weight, share = pseudo_mixture(rule, tokens, entropy, settings, beside, slice(None))
    neural = torch.as_tensor(logp).to(share).exp()[:, None]
    return (weight * neural + share)[:, 0].clamp(min=PSEUDO_RULES[rule].floor).log()


def pseudo_totals(rule: str, tokens, entropy, settings: Settings, at, beside=None) -> Tensor:
    """Return what the pseudo-probabilities of the whole vocabulary sum to, (Q,) float64, before the floor.

    `at` (Q,), ascending, are targets counted from 0. #890's order, which depends on the target, is the
    realised target's for the whole vocabulary."""
    parts = np.array_split(at, 1 + len(at) * settings.vocab_size // PSEUDO_BLOCK)
    found = (pseudo_mixture(rule, tokens, entropy, settings, beside, part, True) for part in parts)
    return torch.cat([weight[:, 0] + share[:, 1:].sum(dim=1) for weight, share in found])


def pseudo_mass(rule: str, tokens, entropy, settings: Settings, every: int, beside=None) -> float:
    """Return the mean of `pseudo_totals` over the targets every, 2 * every, ..., the first being 1."""
    at = np.arange(every, len(tokens), every) - 1
    return float(pseudo_totals(rule, tokens, entropy, settings, at, beside).mean())


def pseudo_report(tokens, logp, entropy, target_bytes, settings: Settings, beside=None):
    """Return what rule PSEUDO makes of a recorded stream, as a line and as numbers; see `pseudo_stream`.

    Mass, and bits per byte after division by each target's sum, are of PSEUDO_SAMPLE of the targets."""
    rule, count = settings.pseudo, min(len(target_bytes), settings.pseudo_sample)
    at = np.arange(count) * len(target_bytes) // count
    if beside is not None and rule == "pr779":
        logp, entropy = logp / beside[:, 0] - beside[:, 1], beside[:, 2]
    nats = -pseudo_stream(rule, tokens, logp, entropy, settings, beside)
    totals = pseudo_totals(rule, tokens, entropy, settings, at, beside)
    bpb, mass = bits_per_byte(nats.sum(), target_bytes.sum()), float(totals.mean())
    proper = bits_per_byte((nats[at] + totals.log()).sum(), target_bytes[at].sum())
    why = f"probabilities sum to {mass:.4g} on average; after renormalisation {proper:.4f} bpb"
    numbers = {"rule": rule, "pseudo_bpb": bpb, "mass": mass, "renormalized_bpb": proper}
    return f"pseudo {rule}: {bpb:.4f} (not a code length: {why})", numbers


class PseudoOracle:
    """The tables that #834's gate learns from: n-grams of all training tokens, the batch's own among them.

    The ranks share blocks of tokens; n-grams across blocks are left out, as in the reference, which counted
    the headers of shards as tokens, too."""

    def __init__(self, settings: Settings, process: Process) -> None:
        self.rule, self.process = pseudo_rule(settings.pseudo, settings, gated=True), process
        tables = 2 * self.rule.max_order - 2  # of contexts, then of pairs
        self.tables = torch.zeros(tables, self.rule.buckets + 1, dtype=torch.int64, device=process.device)

    def count(self, stream: TokenStream) -> None:
        """Count all tokens of `stream`; raises on every rank the DataError or OSError that one meets."""
        with self.process.together():
            for start in range(0, stream.total, ORACLE_BLOCK)[self.process.rank :: self.process.world_size]:
                block = torch.from_numpy(stream.read(start, min(ORACLE_BLOCK, stream.total - start)))
                pseudo_fill(self.tables, torch.cat(pseudo_keys(self.rule, block.to(self.process.device))))
        self.process.sum(self.tables)

    def ratios(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return min(F, C) / C by order of targets after ids, (B, T) each: (B, T, O) float32; -1: none."""
        keys = torch.cat(pseudo_keys(self.rule, torch.cat((ids, targets[:, -1:]), dim=1)))
        counts = self.tables.gather(1, keys.flatten(1)).view(2, -1, *targets.shape).movedim(1, 2)
        context, pair = counts.triu(1)  # the reference leaves out a context that begins with the row, too
        return (pair.minimum(context) / context).where(context >= self.rule.min_count, -1.0).transpose(1, 2)

    def beside(self, loss):
        """Return `loss` (of a GPT or what wraps it) as a function of ids and targets that looks ratios up."""
        return lambda ids, targets: loss(ids, targets, self.ratios(ids, targets))


# ============================================================================================================
# 12 AUDIT AND CODEC. In: a scorer in two calls: `prices(tokens)`, the fast path, and `predict(past)`, a
# distribution that is fixed before its target is known. Out: audit.json and receipt.bin, which prove that the
# printed score is a code length; or any file, compressed by an artifact, and back. The slow path goes token
# by token in float64: key/value cache, dictionaries, autograd; it shares no counting or gating code with the
# fast one. Encoder and decoder make the same calls in the same order: one last bit off would break decoding.
# ============================================================================================================

CODEC_MAGIC, CODEC_VERSION = b"GOLFTXT\n", 1
CODEC_PREFIX = struct.Struct("<8sI32sQQ32s")  # magic, version, artifact, tokens, raw bytes, their SHA-256
HEAD_TARGETS, LATE_TARGETS = 512, 1_024  # targets of a receipt's two spans
AUDIT_HEAD, AUDIT_SPREAD, FLIPS = 4_096, 8, 3  # first targets priced again, short spans, futures altered


class NeuralSteps:
    """The neural model one target at a time; its key/value cache is filled anew where the window moves."""

    def __init__(self, model: GPT, settings: Settings, process: Process, lessons=None) -> None:
        self.settings, self.process, self.place, self.learned = settings, process, (0, 0), 0
        self.model = copy.deepcopy(model) if lessons else model
        self.learner = lessons and TestTimeTraining(self.model, settings, process, *lessons)
        shape = (settings.num_layers, 2, 1, settings.num_kv_heads, settings.window, settings.head_dim)
        self.memory = torch.zeros(shape, device=process.device)

    def row(self, past: np.ndarray) -> np.ndarray:
        """Return log-probabilities (V,) float64 of the token after `past`, in the window of the score.

        `past` begins with that of the call before: what was learned from it is kept."""
        s, stop = self.settings, len(past)
        start = max(((stop - 1 - s.window) // s.eval_stride + 1) * s.eval_stride, 0)
        chunk = (start + s.window - s.eval_stride) // s.ttt_chunk_tokens  # of the window's first target
        while self.learner and self.learned < chunk:
            self.learner.learn(past, self.learned)
            self.learned += 1
        seen = stop - 1 - start if self.place == (start, stop - 1) else 0
        ids = torch.from_numpy(past[start:].astype(np.int64))[None].to(self.process.device)
        with torch.inference_mode(), self.process.precision():
            logits = self.model.logits(ids, 1, self.memory, seen)
        self.place = (start, stop)
        return logits[0, 0].double().log_softmax(dim=0).cpu().numpy()


class Followers:
    """What followed one context so far: how often each token, and the last one, where, how often again."""

    def __init__(self) -> None:
        self.counts, self.total, self.hits, self.last, self.place = {}, 0, 0, -1, 0

    def add(self, token: int, place: int) -> None:
        """Take in the token that followed at target `place`."""
        self.hits += token == self.last
        self.counts[token] = self.counts.get(token, 0) + 1
        self.total, self.last, self.place = self.total + 1, token, place


class SlowCache:
    """Sections 9 and 10 once more, one target at a time: whole distributions, gradients by autograd.

    Starts where the gate begins a chunk, from what a decoder has there: the tokens `past`, the neural prices
    of those targets, and the fast path's `mixture` of them."""

    def __init__(self, past: np.ndarray, prices: Tensor, mixture: Mixture, settings: Settings) -> None:
        self.settings, self.prefix, self.table = settings, past, {}
        self.places = functools.cache(lambda token: np.flatnonzero(past[:-1] == token))
        self.families = {name: int(re.sub(r"\D", "", name)) - 1 for name in list(mixture.weights)[1:]}
        self.opened = int(np.flatnonzero(past == MARKER_ID).max(initial=0))  # where the document begins
        self.recent = [0.0] * RECENT + prices[-RECENT:].tolist()
        self.lead, self.pending, self.now, gate = mixture.lead, [], None, mixture.gate
        self.shapes, steps = [weight.shape for weight in gate.weights], torch.tensor(float(gate.updates))
        self.flat, first, second = (x.double().cpu() for x in (gate.flat, gate.moment1, gate.moment2))
        self.adam = torch.optim.Adam([self.flat.requires_grad_()], settings.cache_lr, (0.9, 0.99))
        self.adam.state[self.flat] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}

    def followers(self, name: str, past: np.ndarray) -> Followers:
        """Return what followed the context of family `name`; the prefix is counted when first asked for."""
        length = self.families[name]
        context, start = past[-length:], self.opened if name.startswith("document") else -1
        key = (length, start, context.tobytes())  # a context that is still too short never comes again
        if key not in self.table:
            entry = self.table[key] = Followers()
            places = self.places(int(context[-1]))
            places = places[places >= max(length - 1, start)]
            for back, token in enumerate(context[::-1]):
                places = places[self.prefix[places - back] == token]
            for place in places.tolist():
                entry.add(int(self.prefix[place + 1]), place)
        return self.table[key]

    def look(self, past: np.ndarray, row: np.ndarray) -> tuple[list, list, list, list]:
        """Return features, rows of the token tables, masked experts, what followed each family's context."""
        known = {name: self.followers(name, past) for name in self.families}
        now, neighbour, longest, codes = len(past) - 1, -1, -1, []
        for name, entry in known.items():
            seen, last = entry.total, entry.last
            numbers = (seen, len(entry.counts), now - entry.place if seen else 0)
            codes += [round(CODE_LOG * math.log1p(number)) for number in numbers]
            codes += [CODE_ONE * (seen == 1), (CODE_ONE * entry.hits + seen // 2) // max(seen, 1)]
            codes += [CODE_ONE * (seen > 0 and last == neighbour)]
            longest, neighbour = last if seen and name.startswith("order") else longest, last
        proposals = [longest, *(entry.last for name, entry in known.items() if name in PROPOSERS)]
        entropy, recent = -float((np.exp(row) * row).sum()), self.recent[-RECENT:]
        shared = [1.0, entropy / 4 - 1, math.exp(-entropy), *(recent[-lag] / 4 for lag in (1, 2, 3))]
        shared += [sum(recent) / RECENT / 2, *(row[t] / 4 if t >= 0 else 0.0 for t in proposals)]
        features = [code / CODE_ONE for code in codes] + [max(x, -6.0) for x in shared]
        masked = [entry.total == 0 or self.settings.cache_lr == 0 for entry in known.values()]
        rows = [int(past[-1]), longest % (len(row) + 1)]  # no proposal has the row behind the vocabulary
        return features, rows, [False, *masked, *masked], list(known.values())

    def weigh(self, features, rows, masked) -> Tensor:
        """Return the experts' weights (n, experts) for lists of what `look` returns."""
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        into, out, bias, newest, proposed = map(Tensor.view, parts, self.shapes)
        rows = torch.tensor(rows) % newest.shape[1]
        hidden = torch.tensor(features, dtype=torch.float64) @ into.t()
        hidden = torch.relu(hidden + newest.t()[rows[:, 0]] + proposed.t()[rows[:, 1]])
        return (hidden @ out.t() + bias[:, 0]).masked_fill(torch.tensor(masked), -math.inf).softmax(dim=1)

    def predict(self, past: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the distribution (V,) of the token after `past`, one longer than at the last call.

        `row`: the neural log-probabilities."""
        if self.now:
            self.reveal(int(past[-1]), len(past) - 2)
        *facts, known = self.look(past, row)
        with torch.inference_mode():
            own, *weights = self.weigh(*([fact] for fact in facts))[0].tolist()
        neural = np.exp(row)
        gated = own * neural
        for entry, share, right in zip(known, weights, weights[len(known) :], strict=False):
            if entry.total:
                gated[list(entry.counts)] += share / entry.total * np.fromiter(entry.counts.values(), float)
                gated[entry.last] += right
        self.now = (facts, known, row, gated)
        trust = (1 + math.tanh(self.lead / 2)) / 2
        return (1 - trust) * neural + trust * gated

    def reveal(self, token: int, place: int) -> None:
        """Take in the token at target `place`, the last predicted; learn where a chunk ends."""
        facts, known, row, gated = self.now
        shares = [entry.counts.get(token, 0) / max(entry.total, 1) for entry in known]
        prices = [math.exp(row[token]), *shares, *(float(entry.last == token) for entry in known)]
        self.pending.append((*facts, prices))
        self.lead += math.log(gated[token]) - row[token]
        self.recent.append(float(row[token]))
        for entry in known:
            entry.add(token, place)
        self.opened = place + 1 if token == MARKER_ID else self.opened
        begin = place + 1 - len(self.pending)
        if place + 1 - begin == max(64, min(self.settings.cache_chunk_tokens, begin // 4), begin // 4_096):
            *facts, prices = zip(*self.pending, strict=True)
            for _ in range(self.settings.cache_steps):
                self.adam.zero_grad()
                joint = self.weigh(*facts) * torch.tensor(prices, dtype=torch.float64)
                (-joint.sum(dim=1).log().mean()).backward()
                self.adam.step()
            self.pending = []


class Scorer:
    """The run's scorer: all prices of a stream at once, or one distribution after the other."""

    def __init__(self, model: GPT, settings, process, logits=None, lessons=None, starts=None) -> None:
        """`logits`: `model.logits`, perhaps compiled, for the fast path; `lessons`: last two parameters of
        TestTimeTraining, else nothing is learned; `starts`: Scored of the first targets, by their number."""
        self.lessons = lessons
        self.learner = lessons and TestTimeTraining(model, settings, process, *lessons)
        self.model, self.settings, self.process, self.starts = model, settings, process, starts or {}
        self.logits, self.past, self.slow, self.neural = logits or model.logits, None, None, None

    def score(self, tokens: np.ndarray, table: Tensor | None = None, beside: int = 0) -> Scored:
        """Score all targets of `tokens` (N + 1,) on all ranks; `table`: what the neural model said of them.

        Counting needs only tokens and comes first: what it expects, the model prices as well. Rank 0 mixes,
        so the score does not depend on the number of ranks."""
        s, process = self.settings, self.process
        ids = torch.from_numpy(tokens.astype(np.int32)).to(process.device)
        known = recall(ids, s) if s.ngram_cache == "exact" else None
        proposals = known.proposals if known else ids.new_empty((0, len(ids) - 1))
        if table is None:
            stream = (self.logits, tokens, s, s.eval_stride, process, "score", proposals, self.learner)
            table = gather_prices(score_stream(*stream), len(ids) - 1, len(proposals) + beside, process)
        mixture = Mixture(table[1] * process.is_main, {"neural": 1.0}, None, 0.0)
        if known and process.is_main:
            mixture = mix_prices(ids, known, *table[1:3], table[3 : 3 + len(proposals)], s)
        return Scored(table, mixture._replace(logp=process.sum(mixture.logp)))

    def prices(self, tokens: np.ndarray) -> np.ndarray:
        """Return the log-probability (N,) of every target of `tokens` (N + 1,), in nats."""
        return self.score(tokens).mixture.logp.cpu().numpy()

    def predict(self, past: np.ndarray) -> np.ndarray:
        """Return the distribution (V,) float64 of the token after `past`, by the slow path.

        Unless `past` goes on from the last call's, the slow path starts where the gate's chunk began."""
        first, exact, self.past, before = len(past), self.settings.ngram_cache == "exact", past, self.past
        if not np.array_equal(past[:-1], before):
            if exact:
                begin = max(c.start for c in plan_chunks(len(past), self.settings.cache_chunk_tokens))
                first = begin + 1
                scored = self.starts.get(begin) or self.score(past[:first])
                self.slow = SlowCache(past[:first], scored.table[1], scored.mixture, self.settings)
            if self.neural is None or not np.array_equal(past[:first][: len(before)], before):
                self.neural = NeuralSteps(self.model, self.settings, self.process, self.lessons)
            self.neural.place = (0, 0)
        for stop in range(first, len(past) + 1):
            row = self.neural.row(past[:stop])
            row = self.slow.predict(past[:stop], row) if exact else np.exp(row)
        return row


def frequencies(row: np.ndarray) -> np.ndarray:
    """Return how often each token would occur among 2^24, (V,) int64: at least once, in proportion to `row`.

    The one place where a probability becomes an integer; encoder and decoder both call it."""
    if not (np.isfinite(row).all() and row.min() >= 0):
        raise AuditError("a distribution is negative, infinite or no number; mend the scorer")
    return (row * (2**24 - len(row))).astype(np.int64) + 1


class RangeEncoder:
    """Range coder on integers (Martin 1979): 64 bits of range, all that was coded as one long number."""

    def __init__(self) -> None:
        self.number, self.bytes, self.range = 0, 8, 2**64 - 1

    def encode(self, counts: np.ndarray, token: int) -> None:
        """Code `token`, whose part of the range is counts[token] of counts.sum()."""
        unit = self.range // int(counts.sum())
        self.number, self.range = self.number + unit * int(counts[:token].sum()), unit * int(counts[token])
        while self.range < 2**56:
            self.number, self.bytes, self.range = self.number << 8, self.bytes + 1, self.range << 8

    def finish(self) -> bytes:
        """Return all that was coded."""
        return self.number.to_bytes(self.bytes, "big")


class RangeDecoder:
    """What `RangeEncoder` coded, token by token; behind the end of the data it reads zeros."""

    def __init__(self, data: bytes) -> None:
        self.rest, self.range = iter(data[8:]), 2**64 - 1
        self.code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")

    def decode(self, counts: np.ndarray) -> int:
        """Return the next token; `counts` are what the encoder had."""
        ends = counts.cumsum()
        unit = self.range // int(ends[-1])
        token = min(int(np.searchsorted(ends, self.code // unit, side="right")), len(counts) - 1)
        self.code, self.range = self.code - unit * int(ends[token] - counts[token]), unit * int(counts[token])
        while self.range < 2**56:
            self.code, self.range = self.code << 8 | next(self.rest, 0), self.range << 8
        return token


def encode_targets(predict, tokens: np.ndarray, targets) -> tuple[bytes, np.ndarray]:
    """Code `targets` of `tokens`; return the bytes, and of each row its sum and the target's part, (n, 2)."""
    encoder, seen = RangeEncoder(), []
    for target in targets:
        row, token = predict(tokens[: target + 1]), int(tokens[target + 1])
        encoder.encode(frequencies(row), token)
        seen.append((row.sum(), row[token]))
    return encoder.finish(), np.array(seen).reshape(-1, 2)


def decode_targets(predict, tokens: np.ndarray, targets, data: bytes) -> None:
    """Fill `targets` into `tokens`, in place, one after the other; `predict` sees those before."""
    decoder = RangeDecoder(data)
    for target in targets:
        tokens[target + 1] = decoder.decode(frequencies(predict(tokens[: target + 1])))


def compress_text(data: bytes, scorer: Scorer, tokenizer: Tokenizer, artifact: str) -> bytes:
    """Return `data` as a file that only the artifact of this SHA-256 opens; its targets follow a marker."""
    tokens = np.array([MARKER_ID, *tokenizer.encode(data)], dtype=np.uint16)
    coded, _ = encode_targets(scorer.predict, tokens, scorer.process.progress(len(tokens) - 1, "compress"))
    sizes = (bytes.fromhex(artifact), len(tokens) - 1, len(data), hashlib.sha256(data).digest())
    body = CODEC_PREFIX.pack(CODEC_MAGIC, CODEC_VERSION, *sizes) + coded
    return body + hashlib.sha256(body).digest()


def decompress_text(packed: bytes, scorer: Scorer, tokenizer: Tokenizer, artifact: str) -> bytes:
    """Return what `compress_text` was given; raises ValueError where file and artifact do not go together."""
    require(packed.startswith(CODEC_MAGIC), "it is not a file that CODEC=compress wrote")
    require(hashlib.sha256(packed[:-32]).digest() == packed[-32:], "it is truncated or altered")
    _, version, named, count, size, sha256 = CODEC_PREFIX.unpack_from(packed)
    require(version == CODEC_VERSION, f"format version {version}, this script reads version {CODEC_VERSION}")
    require(named.hex() == artifact, f"it was made with artifact {named.hex()}, this one is {artifact}")
    require(count <= size <= MAX_PAYLOAD_BYTES, f"its header claims {count} tokens for {size} bytes")
    tokens = np.full(count + 1, MARKER_ID, dtype=np.uint16)
    with scorer.process.progress(count, "decompress") as targets:
        decode_targets(scorer.predict, tokens, targets, packed[CODEC_PREFIX.size : -32])
    data = tokenizer.decode(tokens[1:].tolist())
    same = len(data) == size and hashlib.sha256(data).digest() == sha256
    require(same, "it decodes to something else, with other settings or on a machine that rounds differently")
    return data


def deviation(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference; the largest number where shapes differ or a number is none."""
    same = got.shape == expected.shape and np.isfinite(got).all()
    return float(np.abs(got - expected).max(initial=0.0)) if same else sys.float_info.max


def audit_spans(predict, again, tokens: np.ndarray, prices: np.ndarray, spans) -> tuple[dict, list[bytes]]:
    """Return condition -> [deviation, tolerance], and the receipt of each span: its targets, coded.

    `predict` encodes, `again` decodes; `prices` (N,) in nats are what the account took in."""
    rows, coded, wrong, excess = [np.empty((0, 3))], [], 0, 0.0
    for targets in spans:
        data, seen = encode_targets(predict, tokens, targets)
        bits = -float(prices[targets].sum()) / math.log(2)
        decoded = tokens[: targets[-1] + 2].copy()  # nothing behind the span is at hand
        decoded[np.add(targets, 1)] = MARKER_ID
        decode_targets(again, decoded, targets, data)
        wrong += (decoded != tokens[: len(decoded)]).sum()
        excess = max(excess, abs(8 * len(data) - bits) - 0.001 * bits)
        rows.append(np.column_stack((seen, prices[targets])))
        coded.append(data)
    sums, slow, fast = np.concatenate(rows).T
    found = {"normalised": [deviation(sums, np.ones_like(sums)), 1e-9], "decodes": [float(wrong), 0.0]}
    found |= {"fast is slow": [deviation(np.log(slow), fast), 1e-5], "coded size": [excess, 128.0]}
    return found, coded


def audit_causal(prices, head: np.ndarray, vocab_size: int) -> float:
    """Return the largest change of a price in `prices(head)` when tokens at or behind it change."""
    random, before, changes = np.random.default_rng(0), prices(head), [0.0]
    for target in ((len(head) - 1) * (np.arange(FLIPS) + random.random(FLIPS)) / FLIPS).astype(int).tolist():
        altered = head.astype(np.int64)
        altered[target + 1 :] += random.integers(1, vocab_size, len(head) - 1 - target)
        flipped = prices((altered % vocab_size).astype(head.dtype))
        changes.append(deviation(flipped[:target], before[:target]))
    return max(changes)


def load_model(artifact: Artifact, settings: Settings, process: Process) -> GPT:
    """Return a fresh model with the shape and the weights of `artifact`, on the device.

    From here on every pass gives the same bits each time: a decoder depends on it."""
    torch.use_deterministic_algorithms(True, warn_only=process.device.type == "cuda")
    shape = {name: artifact.settings[name] for name in settings.stored_values(("shape",))}
    model = GPT(dataclasses.replace(settings, mtp_num_heads=0, **shape)).to(process.device)
    model.load_state_dict(artifact.weights)
    return model


def documents(tokens: np.ndarray) -> set[bytes]:
    """Return the documents of a shard, each from its marker on."""
    return {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == MARKER_ID)) if len(part) > 1}


def audit_data(dataset: Dataset, score: Score, folder: Path) -> dict[str, list[float]]:
    """Return condition -> [deviation, tolerance] of the bytes and documents of the validation split."""
    tokens, pieces, found = dataset.val_tokens, dataset.tokenizer.pieces, {}
    length, spaced = np.array([len(p) for p in pieces]), np.array([p.startswith(b" ") for p in pieces])
    size = int(length[tokens[1:]].sum())
    if dataset.manifest:
        own, paths = documents(tokens), folder.glob("*_train_*.bin")
        found["disjoint"] = [sum(len(own & documents(open_shard(path))) for path in paths), 0]
    elif dataset.tokenizer.model:  # in the contest a space behind a marker is free, but for pure bytes
        size -= int((spaced[tokens[1:]] & (length[tokens[:-1]] == 0)).sum())
    return found | {"bytes": [abs(size - score.bytes), 0]}


def audit_report(found: dict[str, list[float]], log: Log, started: float, **more: object) -> str:
    """Write audit.json; return "passed" or the broken conditions. `started`: of time.perf_counter."""
    # JSON knows no infinity; what is no number counts as the largest.
    found = {name: (min(sys.float_info.max, value), most) for name, (value, most) in found.items()}
    off = {name: f"off by {v:.3g} (at most {most:g})" for name, (v, most) in found.items() if v > most}
    report = {"passed": not off, "broken": list(off), "seconds": time.perf_counter() - started}
    report |= {"conditions": {n: {"deviation": v, "tolerance": m} for n, (v, m) in found.items()}, **more}
    write_atomically(log.folder / "audit.json", (json.dumps(report, indent=2) + "\n").encode())
    verdict = ", ".join(f"{name} is {by}" for name, by in off.items()) or "passed"
    measured = ", ".join(f"{name} {value:.2g}" for name, (value, _) in found.items())
    log.event("audit", f"audit: {verdict} ({measured}) seconds:{report['seconds']:.1f}", **report)
    return verdict


def audit_recorded(settings: Settings, log: Log) -> str:
    """Audit AUDIT_TARGET, an .npz file; return "passed" or what is broken. Raises DataError.

    It holds tokens (N + 1,), prices (N,) in nats and bytes (N,) of all targets, val_bpb (), and, of some
    targets (M,), counted from 0 and ascending, logp (M, V)."""
    started, tokenizer = time.perf_counter(), Tokenizer.load(Path(settings.tokenizer_path))
    names = ("tokens", "prices", "bytes", "targets", "logp", "val_bpb")
    try:
        with np.load(settings.audit_target) as file:
            tokens, prices, size, targets, logp, val_bpb = map(file.__getitem__, names)
        each = len(tokens) - 1
        require(prices.shape == size.shape == (each,), f"prices and bytes are not {each} each")
        require(len(targets) > 0 and (np.diff(targets) > 0).all(), "it has no target, or they do not ascend")

        def predict(past: np.ndarray) -> np.ndarray:
            return np.exp(logp[np.searchsorted(targets, len(past) - 1)].astype(np.float64))

        found, _ = audit_spans(predict, predict, tokens, prices, [targets])
        rules = [int(tokenizer.target_bytes(tokens, exact).sum()) for exact in (True, False)]
        found["ledger"] = [abs(bits_per_byte(-prices.sum(dtype=float), size.sum()) - float(val_bpb)), 1e-6]
        found["coverage"] = [int((~np.isfinite(prices)).sum()), 0]
    except (*ARTIFACT_FAULTS, OSError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"AUDIT_TARGET={settings.audit_target}: {error}; README.md describes it") from error
    found["normalised"][1] = 1e-6  # of rows in float32
    found["bytes"] = [min(abs(int(size.sum()) - rule) for rule in rules), 0]
    log.line(f"audit: val_bpb {float(val_bpb):.8f}, {len(targets)} of {each} prices are held against rows")
    return audit_report(found, log, started, val_bpb=float(val_bpb), targets=each, rows=len(targets))


def audit_run(scorer: Scorer, scored: Scored, score: Score, path, dataset: Dataset, log: Log, trained) -> str:
    """Prove on the artifact at `path` that `score` is a code length; return "passed" or what is broken.

    Writes audit.json and receipt.bin beside each other. Two fresh scorers of the file on disk take the parts
    of encoder and decoder; of the run they get the neural prices of targets before the late span alone, from
    which the gate's state at the start of each span is worked out anew, once for both.
    `trained`: how many steps, and the hash of the first held-out batch that weights were chosen on."""
    s, tokens, started = scorer.settings, dataset.val_tokens, time.perf_counter()
    artifact, alone = read_artifact(path), Process(0, 1, scorer.process.device)
    model, prices, total = load_model(artifact, s, alone), scored.mixture.logp.cpu().numpy(), len(tokens) - 1
    begins = [chunk.start for chunk in plan_chunks(total, s.cache_chunk_tokens)]
    border = next((b for b in begins if b >= 2 * total // 3 + LATE_TARGETS // 2), total)
    late = max(border - LATE_TARGETS // 2, min(HEAD_TARGETS, total))
    spread = [range(b, late)[:8] for b in begins[:: len(begins) // AUDIT_SPREAD + 1] if b >= HEAD_TARGETS]
    # In ascending order what test-time training learned is learned again once.
    spans = [*filter(len, (range(late)[:HEAD_TARGETS], *spread, range(late, total)[:LATE_TARGETS]))]

    def fresh(logits=None, starts=None, **changes: object) -> Scorer:
        return Scorer(model, dataclasses.replace(s, **changes), alone, logits, scorer.lessons, starts)

    starts, head = {max(b for b in begins if b <= span[0]) for span in spans}, tokens[: AUDIT_HEAD + 1]
    starts = {begin: fresh().score(tokens[: begin + 1], scored.table[:, :begin]) for begin in starts}
    encoder, decoder = (fresh(starts=starts).predict for _ in range(2))
    found, coded = audit_spans(encoder, decoder, tokens, prices, spans)
    brisk = fresh(ttt_chunk_tokens=min(s.ttt_chunk_tokens, max(s.window, AUDIT_HEAD // 4)))
    found["causal"] = [audit_causal(brisk.prices, head, s.vocab_size), 1e-6]
    found["prefix"] = [deviation(fresh().prices(head), prices[: len(head) - 1]), 1e-5]
    if alone.device.type == "cuda":  # in bfloat16 a step of one token and a batch round differently
        found["fast is slow"][1] = found["prefix"][1] = 0.5
    neural, closed = fresh(ngram_cache="none").prices(head), fresh(cache_lr=0.0).prices(head)
    flat = fresh(lambda ids, last: ids.new_zeros((len(ids), last, s.vocab_size)).float(), ngram_cache="none")
    found["gate closed"] = [deviation(closed, neural), 0.0]
    found["uniform"] = [deviation(flat.prices(head), np.full_like(neural, -math.log(s.vocab_size))), 1e-6]
    found["coverage"] = [int((scored.table[0] != 1).sum()), 0]
    found["ledger"] = [abs(score.val_bpb - bits_per_byte(-prices.sum(dtype=float), score.bytes)), 1e-6]
    used = {name: weight.cpu().numpy() for name, weight in scorer.model.state_dict().items()}
    found["artifact"] = [max(deviation(used[n], w.numpy()) for n, w in artifact.weights.items()), 0.0]
    if dataset.stream:
        held_out = hashlib.sha256(dataset.stream.batch(trained["steps"], 0).numpy()).hexdigest()
        found["selection"] = [int(trained["held_out_sha256"] != held_out), 0]
    found |= audit_data(dataset, score, Path(s.data_path))
    pairs = [(spans[at], coded[at]) for at in (0, -1)[: len(spans)]]
    write_atomically(log.folder / "receipt.bin", b"".join(data for _, data in pairs))
    receipt = [{"first": span[0], "targets": len(span), "bytes": len(data)} for span, data in pairs]
    return audit_report(found, log, started, receipt=receipt)


def run_codec(settings: Settings, process: Process, artifact: Artifact) -> None:
    """Compress or decompress INPUT to OUTPUT with `artifact`; on one thread, for the same bits each time."""
    torch.set_num_threads(1)
    target, start = Path(settings.output).resolve(), time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    used = [Path(name).resolve() for name in (settings.input, settings.artifact)]
    if target in used or (target.exists() and not target.is_file()) or not os.access(target.parent, os.W_OK):
        raise SettingError(f"OUTPUT={settings.output} is INPUT, ARTIFACT, no plain file or locked; change it")
    tokenizer = artifact.tokenizer or Tokenizer.load(Path(settings.tokenizer_path))
    if tokenizer.sha256 != artifact.tokenizer_sha256:
        raise DataError(f"TOKENIZER_PATH={settings.tokenizer_path} is not the artifact's tokenizer; set that")
    scorer = Scorer(load_model(artifact, settings, process), settings, process)
    packs, data = settings.codec == "compress", Path(settings.input).read_bytes()
    try:
        result = (compress_text if packs else decompress_text)(data, scorer, tokenizer, artifact.sha256)
    except (ValueError, struct.error) as error:
        raise DataError(f"INPUT={settings.input}: {error}; name another file or artifact") from error
    write_atomically(target, result)
    text, coded = (data, result) if packs else (result, data)
    bits, seconds = 8 * len(coded) / max(len(text), 1), time.perf_counter() - start
    line = f"{settings.codec}: {len(text)} bytes of text, {len(coded)} coded"
    print(f"{line}, bits_per_byte:{bits:.4f} seconds:{seconds:.1f}")


# ============================================================================================================
# 13 RUN. In: the environment. Out: a run folder (run.log, metrics.jsonl, result.json, artifact.bin), one last
# line, an exit code. Weights go from `train` through the artifact's file to `evaluate`: what is scored is
# always what was read back from disk.
# ============================================================================================================


class LossWatch:
    """Reads each step's loss a few steps late, and stops the run at one that is not finite."""

    def __init__(self) -> None:
        self.pending, self.last_good = [], math.nan

    def push(self, step: int, matrix_lr: float, loss: Tensor) -> None:
        """Queue the loss of `step`, which ran at Muon's rate `matrix_lr`; read those that are old enough."""
        copy = loss.to("cpu", non_blocking=True)  # pinned memory: the host goes on
        copied = torch.cuda.current_stream().record_event() if loss.is_cuda else None
        self.pending.append((f"step {step}", f"at matrix learning rate {matrix_lr:.6g}", copy, copied))
        self.drain(keep=2)  # the host never waits for the step it just queued

    def drain(self, keep: int = 0) -> float:
        """Read all but the newest `keep` losses; return the last one read. Raises NonFiniteError."""
        while len(self.pending) > keep:
            step, rate, loss, copied = self.pending.pop(0)
            _ = copied and copied.synchronize()
            if not math.isfinite(loss):
                state = f"{step}: train_loss is {loss:f} {rate}, the last good one was {self.last_good:.4f}"
                raise NonFiniteError(f"{state}; lower the learning rates, or set GRAD_CLIP_NORM")
            self.last_good = float(loss)
        return self.last_good


def load_batches(stream: TokenStream, step: int, process: Process) -> list[Tensor]:
    """Return this rank's micro-batches of `step`: slot s belongs to rank s mod world size."""
    slots = range(process.rank, stream.settings.micro_batch_slots, process.world_size)
    with process.together():
        batches = [stream.batch(step, slot) for slot in slots]
    return [batch.pin_memory() for batch in batches] if process.device.type == "cuda" else batches


def warm_up(model: GPT, losses, stream: TokenStream, process: Process, log: Log) -> None:
    """Prime compiler and caches by WARMUP_STEPS real steps of each of `losses`, then restore the weights."""
    saved = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings, steps = stream.settings, stream.settings.warmup_steps
    optimizers = Optimizers(*parameter_groups(model, settings), settings, process)
    for step in range(steps * len(losses)):
        optimizers.gather(losses[step // steps], load_batches(stream, step, process))
        optimizers.step(1.0, settings.muon_momentum)
        log.line(f"warmup_step:{step + 1}/{steps * len(losses)}")
    model.load_state_dict(saved)


def choose_weights(averages: Averages, model: GPT, batches: list, process: Process, log: Log) -> tuple:
    """Return the candidate of least loss on `batches`, training tokens after the last step's; their hash."""
    candidates, slots = averages.candidates(), averages.settings.micro_batch_slots
    numbers = {"ema_updates": averages.updates, "swa_snapshots": averages.snapshots}
    pairs = [(ids[:, :-1], ids[:, 1:]) for ids in (batch.to(process.device).long() for batch in batches)]
    for name, weights in candidates.items() if len(candidates) > 1 else ():
        with torch.no_grad(), process.precision():
            total = sum(torch.func.functional_call(model, weights, pair).double() for pair in pairs)
        numbers[f"held_out_train_loss_{name}"] = float(process.sum(total)) / slots
    chosen = min(candidates, key=lambda name: numbers.get(f"held_out_train_loss_{name}", 0.0))
    log.event("average", chosen=chosen, moved=averages.moved(candidates[chosen]), **numbers)
    kept = {name: weight for name, weight in candidates[chosen].items() if not name.startswith("mtp_heads.")}
    return kept, {"held_out_sha256": hashlib.sha256(batches[0].numpy()).hexdigest()}


def train(dataset: Dataset, settings: Settings, process: Process, log: Log, compiled: bool) -> tuple:
    """Train to ITERATIONS or MAX_WALLCLOCK_SECONDS, all ranks alike; return weights to export and numbers."""
    torch.manual_seed(settings.seed)
    model, stream, total = GPT(settings).to(process.device), dataset.stream, settings.iterations
    log.line(f"model_params:{sum(parameter.numel() for parameter in model.parameters())}")
    aware = QuantizationAware(model, settings)
    modules = {"off": [model], "step0": [aware]}.get(settings.qat_start, [model, aware])
    losses = [torch.compile(m, dynamic=False, fullgraph=True) if compiled else m for m in modules]
    logits = torch.compile(model.logits, dynamic=False) if compiled else model.logits
    oracle = PseudoOracle(settings, process) if settings.gate_head else None
    losses = [oracle.beside(loss) for loss in losses] if oracle else losses
    warm_up(model, losses, stream, process, log)
    optimizers = Optimizers(*parameter_groups(model, settings), settings, process)
    averages, clock, watch = Averages(model, settings), Clock(process), LossWatch()
    quantized, before_ms, every = False, 0.0, settings.train_log_every
    if oracle:
        oracle.count(stream)
        process.synchronize()
        before_ms = clock.read_ms()
        log.event("oracle", tokens=stream.total, seconds=before_ms / 1000)
    for step in process.progress(total + 1, "train"):
        batches, elapsed_ms = load_batches(stream, step, process), clock.read_ms()
        finished = step == total or elapsed_ms >= (1000.0 * settings.max_wallclock_seconds or math.inf)
        if step and (finished or step <= 10 or (every and step % every == 0)):
            log.step("train", step, total, elapsed_ms, train_loss=watch.drain())
        if finished or (settings.val_loss_every and step % settings.val_loss_every == 0):
            clock.stop()
            chunks = score_stream(logits, dataset.val_tokens, settings, settings.window, process, "validate")
            table = gather_prices(chunks, len(dataset.target_bytes), 0, process)
            val_loss, val_bpb, *_ = account(*table[:2], dataset.target_bytes)
            log.step("validation", step, total, clock.total_ms, val_loss=val_loss, val_bpb=val_bpb)
            if finished:
                break
            clock.start()
        scale = learning_rate_scale(step, elapsed_ms, settings, before_ms)
        if not quantized and quantization_starts(step, elapsed_ms, scale, settings):
            quantized = True
            log.event("qat", step=step, scale=scale, **aware.effect())
        aware.sharpen(scale)
        loss = optimizers.gather(losses[-1 if quantized else 0], batches)
        optimizers.step(scale, momentum_at(step, settings))
        averages.update(step + 1, scale)
        watch.push(step + 1, settings.matrix_lr * scale, loss)
    weights, numbers = choose_weights(averages, model, batches, process, log)
    numbers |= {"steps": step, "train_seconds": clock.total_ms / 1000, "train_loss": watch.last_good}
    return weights, numbers | {"training_val_loss": val_loss, "training_val_bpb": val_bpb}


def log_cache(scored: Scored, dataset: Dataset, log: Log) -> dict[str, object]:
    """Log what the cache gained over the neural prices: by document, by family, along the stream."""
    bits = -torch.stack((scored.table[1], scored.mixture.logp)).double().cpu().numpy() / math.log(2)  # (2, N)
    size, markers = dataset.target_bytes.astype(np.float64), dataset.val_tokens[:-1] == MARKER_ID
    alone, mixed = (bits.sum(axis=1) / size.sum()).tolist()
    # The first document is number 0, marker or not.
    interval = np.round(gain_interval(bits[0] - bits[1], size, np.cumsum(markers) - markers[0]), 6).tolist()
    numbers = {"neural_bpb": alone, "cache_gain_bpb": alone - mixed, "cache_gain_interval": interval}
    numbers["cache_weights"] = {name: round(mean, 6) for name, mean in scored.mixture.weights.items()}
    log.event("cache", cache_bpb=mixed, **numbers)
    curve = np.cumsum(bits, axis=1) / np.cumsum(size).clip(min=1e-9)
    for end in np.linspace(0, len(size), 64 + 1).astype(int)[1:].tolist():
        log.event("curve", "", tokens=end, neural_bpb=curve[0, end - 1], cache_bpb=curve[1, end - 1])
    return numbers


def evaluate(artifact, dataset, settings, process, log, compiled, path, trained) -> dict[str, object]:
    """Return the numbers of the artifact's score on the validation split; a pseudo-score is logged only."""
    tokens, rule, clock = dataset.val_tokens, PSEUDO_RULES.get(settings.pseudo), Clock(process)
    model = load_model(artifact, settings, process)
    body = model.logits if settings.pseudo == "none" else pseudo_logits(model)
    logits = torch.compile(body, dynamic=False) if compiled else body
    lessons = (dataset.size_of, len(tokens) - 1) if settings.ttt_last_blocks else None
    scorer = Scorer(model, settings, process, logits, lessons)
    scored = scorer.score(tokens, beside=rule.beside if rule else 0)
    score = account(scored.table[0], scored.mixture.logp, dataset.target_bytes)
    clock.stop()  # what follows describes the score, or is none
    numbers = score._asdict() | {"eval_seconds": clock.total_ms / 1000}
    with process.together():
        if not process.is_main:
            return numbers
        if settings.ngram_cache == "exact":
            numbers |= log_cache(scored, dataset, log)
        if learner := scorer.learner:
            log.event("ttt", parameters=sum(p.numel() for p in learner.live), largest_change=learner.moved)
        log.event("score", window=settings.window, stride=settings.eval_stride, **score._asdict())
        if rule:
            beside, neural = scored.table[-rule.beside :].t() if rule.beside else None, scored.table[1:3]
            line, figures = pseudo_report(tokens, *neural, dataset.target_bytes, settings, beside)
            log.event("pseudo", line, **figures)
        if dataset.manifest and score.bytes <= 8_000_000:  # above, xz would take minutes
            text = dataset.tokenizer.decode(tokens.tolist())
            numbers["xz_bpb"] = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
            log.line(f"reference: xz -9e on the same {len(text)} bytes: {numbers['xz_bpb']:.4f} bpb")
        if settings.audit:
            numbers["audit"] = audit_run(scorer, scored, score, path, dataset, log, trained)
    return numbers


def run(settings: Settings, process: Process, log: Log, artifact: Artifact | None) -> dict[str, object]:
    """Do the whole run, or score `artifact` if there is one; return all final numbers. Raises RunError."""
    script_sha256, path = file_sha256(Path(__file__)), Path(settings.eval_only or log.folder / "artifact.bin")
    changed = " ".join(f"{name}={value}" for name, value in settings.changed().items()) or "none"
    log.event("settings", f"settings that differ from the defaults: {changed}", **vars(settings))
    cuda = process.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"cpu with {torch.get_num_threads()} threads"
    log.line(f"torch:{torch.__version__} python:{sys.version.split()[0]} device:{device}")
    log.line(f"script_sha256:{script_sha256} run_dir:{log.folder}")
    if settings.audit_target:
        return {"audit": audit_recorded(settings, log)}
    compiled = settings.compile == "1" or (cuda and settings.compile == "auto")
    if compiled and not cuda and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SettingError("COMPILE=1 needs a C++ compiler on a CPU; install g++ or set COMPILE=0")
    dataset = load_dataset(settings, artifact and artifact.tokenizer)
    if settings.pseudo != "none":
        pseudo_rule(settings.pseudo, settings, settings.gate_head)  # refused before the work, or never
    select_attention(settings, process, log)
    numbers: dict[str, object] = {"steps": 0, "train_seconds": 0.0}
    if artifact is None:
        weights, numbers = train(dataset, settings, process, log, compiled)
        with process.together():
            if process.is_main:
                embed = bool(dataset.manifest and dataset.manifest["tokenizer"]["trained_here"])
                write_atomically(path, pack_artifact(weights, settings, dataset.tokenizer, embed))
        artifact = read_artifact(path)
    if artifact.tokenizer_sha256 != dataset.tokenizer.sha256:
        raise DataError(f"TOKENIZER_PATH={settings.tokenizer_path}: {path} was made with another; set that")
    sizes = {"artifact_bytes": artifact.size, "code_bytes": os.path.getsize(__file__)}
    sizes["total_bytes"] = sum(sizes.values())
    log.event("artifact", **sizes, limit_bytes=settings.artifact_limit_bytes)
    result = evaluate(artifact, dataset, settings, process, log, compiled, path, numbers) | numbers | sizes
    result["hashes"] = {"artifact_sha256": artifact.sha256, "script_sha256": script_sha256, **dataset.hashes}
    score = "final val_bpb:{val_bpb:.8f} val_loss:{val_loss:.8f} artifact_bytes:{artifact_bytes}"
    seconds = "train_seconds:{train_seconds:.1f} eval_seconds:{eval_seconds:.1f}"
    log.event("result", f"{score} {seconds}".format(**result), **result)
    return result


def failure_of(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the one line for an error; code 1 is a bug and keeps its traceback."""
    if isinstance(error, RunError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        return DataError.exit_code, f"{error.filename}: {error.strerror}; free the place or name another"
    if isinstance(error, torch.OutOfMemoryError):
        return SettingError.exit_code, "TRAIN_BATCH_TOKENS is too large for the GPU; raise MICRO_BATCH_SLOTS"
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args or [signal.SIGINT])[0], "interrupted; nothing half-written is left"
    return 1, repr(error)


def run_and_record(settings: Settings, process: Process, artifact: Artifact | None, notice: str) -> None:
    """Run, and write result.json whatever happens; raises SizeError and AuditError once all is recorded."""
    run_id = settings.run_id or f"{settings.recipe}-seed{settings.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(settings.run_dir or f"runs/{process.share(run_id)[0]}")
    if settings.eval_only and Path(settings.eval_only).resolve().parent == run_dir.resolve():
        raise SettingError(f"RUN_DIR={run_dir} holds the artifact's own run; name another folder")
    log = Log(process, run_dir)
    for name in ("result.json", "artifact.bin", "audit.json", "receipt.bin") if process.is_main else ():
        (run_dir / name).unlink(missing_ok=True)
    log.line(notice)
    record: dict[str, object] = {"exit_code": 0, "run_id": run_id, "recipe": settings.recipe}
    record |= {"seed": settings.seed, "world_size": process.world_size, "settings": settings.changed()}
    try:
        record |= run(settings, process, log, artifact)
        if (size := record.get("total_bytes", 0)) > (limit := settings.artifact_limit_bytes):
            raise SizeError(f"{size} bytes of code and weights, over ARTIFACT_LIMIT_BYTES={limit}; shrink it")
        if (verdict := record.get("audit", "passed")) != "passed":
            raise AuditError(f"the score is not proven: {verdict}; see audit.json")
    except BaseException as error:
        record["exit_code"], record["error"] = failure_of(error)
        raise
    finally:
        if process.is_main:
            write_atomically(run_dir / "result.json", (json.dumps(record, indent=2) + "\n").encode())


def main(environment: Mapping[str, str]) -> int:
    """Run what `environment` asks for and return the exit code."""
    device, recipe = ("a", "record") if torch.cuda.is_available() else ("no", "cpu")
    notice = f"RECIPE is not set and there is {device} CUDA device: RECIPE={recipe}"
    notice, environment = "" if "RECIPE" in environment else notice, {"RECIPE": recipe, **environment}
    try:
        path = environment.get("EVAL_ONLY" if environment.get("CODEC", "none") == "none" else "ARTIFACT")
        artifact = read_artifact(Path(path)) if path else None
        settings = Settings.from_env(environment, artifact and artifact.settings)
        with open_process(environment, settings) as process:
            if settings.codec == "none":
                run_and_record(settings, process, artifact, notice)
            elif process.is_main:
                run_codec(settings, process, artifact)
        return 0
    except (RunError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        code, message = failure_of(error)
    if environment.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(5)  # torchrun ends all ranks once one has ended: rank 0 speaks first
    return code


def interrupt(number: int, _: object) -> None:
    """Turn the first SIGINT or SIGTERM into an interrupt that stages clean up after; ignore the rest."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: None)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt)
    sys.exit(main(os.environ))
