"""Train a model of reduced width on a folder of data, as train_gpt.py trains: what the records share.

The folder holds one training shard and its tokenizer. It is that of SAMPLE_DATA (mix_train_000000.bin,
shuffled documents of technical and other English text, and the contest's tokenizer of 1,024 pieces) or that
of `make data` (the standard library's source). Training reads 16 places of the shard (or a multiple) side by
side; the last 2,048 tokens before each next of the 16 are held out. No validation split is read. A seed
stands for initial weights and for the place where training starts to read: runs of one seed see the same
tokens in the same order. Runs are limited by steps, never by the clock, so a busy machine changes nothing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

LANES, HELD_OUT = 16, 2_048  # places read side by side, tokens held out at the end of each
SEED_SHIFT = 60_000  # tokens from where one seed starts to read to where the next one does
STEPS = 300
WORKERS = 2
# The 512-wide shape at an eighth of its width: as many blocks, heads of 16 channels.
WIDTH = "MODEL_DIM=64 NUM_HEADS=4 BIGRAM_DIM=16 VE_DIM=16"
# Short: rates fall over the second half, momentum and average reach back as small a share of the run.
SCHEDULE = f"""ITERATIONS={STEPS} MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 WARMDOWN_ITERS={STEPS // 2}
    TRAIN_BATCH_TOKENS=1024 TRAIN_SEQ_LEN=128 MICRO_BATCH_SLOTS=1 DATA_LANES={LANES} VAL_BATCH_SIZE=8192
    VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=1 EVAL_STRIDE=128 NGRAM_CACHE=none
    MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=100
    EMA_DECAY=0.95 SWA_EVERY=5"""


def variables_of(text: str) -> dict[str, str]:
    """Return NAME=value pairs as a mapping; the last of a name wins."""
    return dict(pair.split("=", 1) for pair in text.split())


class Recorder(train_gpt.Log):
    """A log that keeps its events and writes nothing."""

    def __init__(self) -> None:
        self.files, self.events = [], []

    def event(self, event: str, line: str | None = None, **values: object) -> None:
        """Keep {"event": event, **values}."""
        self.events.append({"event": event, **values})

    def values(self, event: str, name: str) -> list:
        """Return one value of every event of a kind."""
        return [entry[name] for entry in self.events if entry["event"] == event]


class Shifted(train_gpt.TokenStream):
    """A training stream that starts `shift` tokens on in every lane, and reads lanes `stride` apart."""

    shift, stride = 0, 1

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start` of the shifted stream on."""
        lanes = self.settings.data_lanes
        lane, place = divmod(start, self.total // lanes)
        return super().read(lane * self.stride % lanes * (self.total // lanes) + place + self.shift, count)


def open_data(folder: Path, settings: train_gpt.Settings, stride: int = 1) -> train_gpt.Dataset:
    """Return the dataset of `settings`: its training stream, and held-out training tokens to score."""
    tokenizer = train_gpt.Tokenizer.load(*folder.glob("*.model"))
    stream = Shifted(train_gpt.find_shards(folder, "train"), settings)
    stream.stride = stride
    stream.shift = SEED_SHIFT * (settings.seed - 1)
    lane, tokens = stream.total // LANES, stream.shards[0]
    read = stream.shift + settings.iterations * settings.train_batch_tokens // settings.data_lanes
    room = stream.total // settings.data_lanes - HELD_OUT - 2 * settings.train_seq_len
    if settings.data_lanes % LANES or read >= room:
        raise SystemExit(f"error: {read} tokens of a lane reach the held-out ones after {room}; train less")
    held_out = np.concatenate([tokens[end - HELD_OUT : end] for end in lane * np.arange(1, LANES + 1)])
    target_bytes = tokenizer.target_bytes(held_out, exact=True)
    return train_gpt.Dataset(stream, held_out, target_bytes, tokenizer, None, {})


class Trained(NamedTuple):
    """What a training leaves: weights to export, what scored them, and the losses on the way."""

    weights: dict[str, torch.Tensor]
    settings: train_gpt.Settings
    dataset: train_gpt.Dataset
    process: train_gpt.Process
    log: Recorder
    parameters: int

    def loss(self, weights: dict[str, torch.Tensor]) -> float:
        """Return the loss of `weights` on the held-out tokens, nats per token."""
        model = train_gpt.GPT(dataclasses.replace(self.settings, mtp_num_heads=0))
        model.load_state_dict(weights)
        tokens, s = self.dataset.val_tokens, self.settings
        chunks = train_gpt.score_stream(model.logits, tokens, s, s.window, self.process, "score")
        table = train_gpt.gather_prices(chunks, len(tokens) - 1, 0, self.process)
        return train_gpt.account(table[0], table[1], self.dataset.target_bytes).val_loss

    def raw_loss(self) -> float:
        """Return the held-out loss of the weights without average or quantization."""
        return self.log.values("validation", "val_loss")[-1]

    def quantized(self, **changes: object) -> tuple[int, float]:
        """Return bytes of the artifact and loss of what it holds, with settings changed as named."""
        settings = dataclasses.replace(self.settings, **changes)
        data = train_gpt.pack_artifact(self.weights, settings, self.dataset.tokenizer, embed=False)
        return len(data), self.loss(train_gpt.unpack_artifact(data).weights)


def sample_folder() -> Path:
    """Return the folder of sample data, or end with a message."""
    if not (folder := os.environ.get("SAMPLE_DATA")):
        raise SystemExit("error: SAMPLE_DATA is not set; set it to the folder of sample data")
    return Path(folder)


def train_reduced(
    variables: dict[str, str], seed: int, folder: Path | None = None, stride: int = 1
) -> Trained:
    """Train once on `folder`, by default that of the sample data, with one thread."""
    torch.set_num_threads(1)
    settings = train_gpt.Settings.from_env({**variables, "SEED": str(seed)})
    with train_gpt.open_process({}, settings) as process:
        dataset, log = open_data(folder or sample_folder(), settings, stride), Recorder()
        weights, _ = train_gpt.train(dataset, settings, process, log, compiled=False)
    parameters = sum(weight.numel() for weight in weights.values())
    return Trained(weights, settings, dataset, process, log, parameters)


def run_all(work: Callable, jobs: Iterable[tuple], keep: Callable[[tuple, object], None]) -> None:
    """Call work(*job) for all jobs, WORKERS at a time, and keep(job, result) as each one ends."""
    with concurrent.futures.ProcessPoolExecutor(WORKERS) as pool:
        waiting = {pool.submit(work, *job): job for job in jobs}
        for done in concurrent.futures.as_completed(waiting):
            keep(waiting[done], done.result())


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON, every innermost list or mapping on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"[\[{][^][{}]*[]}]", lambda innermost: " ".join(innermost[0].split()), text)
    train_gpt.write_atomically(path, (text + "\n").encode())
