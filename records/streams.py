"""Measure the exact cache on recorded neural streams: `SAMPLE_DATA=<folder> python records/streams.py`.

A stream is tokens and, for each target, a neural model's log-probability and entropy; the folder's README
says where they come from. The constants of the cache were chosen on mix_tune; fineweb_val is only measured.
Writes records/streams.json: the default, parts switched off or changed, and what general-purpose compressors
make of the same text. Then #864's hashed rule with tables of 2**16 to 2**28 buckets, on fineweb_val and on a
longer made-up stream: pseudo-score, what its probabilities sum to, bits per byte after division by that sum,
and the exact cache beside them. `records/report.py` makes the tables and the picture.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
sys.path[:0] = [str(ROOT), str(RECORDS)]
import bench  # noqa: E402

import train_gpt  # noqa: E402

# What differs from the defaults, by name.
VARIANTS = {
    "default": {},
    "gate closed": {"CACHE_LR": "0"},
    "orders up to 5": {"CACHE_MAX_ORDER": "5"},
    "orders up to 8": {"CACHE_MAX_ORDER": "8"},
    "orders up to 32": {"CACHE_MAX_ORDER": "32"},
    "nothing by document": {"CACHE_DOCUMENT_ORDER": "0"},
    "by document up to order 6": {"CACHE_DOCUMENT_ORDER": "6"},
    "chunks of 2048": {"CACHE_CHUNK_TOKENS": "2048"},
    "one step a chunk": {"CACHE_STEPS": "1"},
    "three steps a chunk": {"CACHE_STEPS": "3"},
    "64 hidden units": {"CACHE_HIDDEN": "64"},
    "half the learning rate": {"CACHE_LR": "0.002"},
    "twice the learning rate": {"CACHE_LR": "0.008"},
}
# Bytes of the raw documents, and which variants are measured.
STREAMS = {
    "mix_tune": (879_686, tuple(VARIANTS)),
    "fineweb_val": (2_504_867, ("default", "nothing by document")),
}


BUCKETS = tuple(2**power for power in range(16, 29, 2))
SAMPLE = "2000"  # targets at which probabilities are summed over the vocabulary
LONG = 2**21  # targets of the made-up stream


def compressors(text: bytes) -> dict[str, float]:
    """Return bits per byte of general-purpose compressors."""
    import pyppmd

    ppmd = pyppmd.Ppmd7Encoder(16, 256 << 20)
    sizes = {
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "PPMd order 16": len(ppmd.encode(text) + ppmd.flush()),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def measure(folder: Path, name: str) -> dict[str, object]:
    """Return the figures of one stream."""
    path = folder / "fineweb_1024_bpe.model"
    tokens = np.fromfile(folder / f"{name}_000000.bin", "<u2", offset=1024).astype(np.int32)
    neural = np.load(folder / f"{name}_neural.npz")
    logp, entropy = (torch.from_numpy(neural[key]) for key in ("logp", "entropy"))
    text = train_gpt.Tokenizer.load(path).decode(tokens.tolist())
    size, variants = STREAMS[name]
    figures = {"tokens": len(logp), "bytes": size}
    figures["neural"] = -float(logp.double().sum()) / math.log(2) / size
    # Where the tokenizer has normalised the text, its bytes are not the documents': no fair comparison.
    figures["compressors"] = compressors(text) if len(text) == size else {}
    figures["variants"] = {}
    for variant in variants:
        settings = train_gpt.Settings.from_env(VARIANTS[variant])
        prices = train_gpt.mix_stream(torch.from_numpy(tokens), logp, entropy, settings)
        bpb = -float(prices.double().sum()) / math.log(2) / size
        figures["variants"][variant] = bpb
        print(f"{name} {variant}: {bpb:.4f}", flush=True)
    return figures


def long_stream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a made-up stream: tokens, and log-probability and entropy under their exact frequencies."""
    tokens = bench.repetitive_tokens(LONG + 1)
    edges = torch.arange(1, 1026, dtype=torch.float64).log() / math.log(1024)
    frequency = edges.diff()[:1023] / edges[1023]
    logp = frequency.log()[tokens[1:].long()].float()
    return tokens, logp, torch.full_like(logp, float(-(frequency * frequency.log()).sum()))


def sweep(tokens: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor, size: int) -> dict[str, object]:
    """Return #864's figures by number of buckets, and the exact cache's; `size` is the bytes of the text."""
    exact = train_gpt.mix_stream(tokens, logp, entropy, train_gpt.Settings())
    figures = {"exact": -float(exact.double().sum()) / math.log(2) / size, "rows": []}
    figures |= {"tokens": len(logp), "neural": -float(logp.double().sum()) / math.log(2) / size}
    target_bytes = np.full(len(logp), size / len(logp))
    for buckets in BUCKETS:
        variables = {"PSEUDO": "pr864", "NGRAM_BUCKETS": str(buckets), "PSEUDO_SAMPLE": SAMPLE}
        settings = train_gpt.Settings.from_env(variables)
        arrays = (part.numpy() for part in (tokens, logp, entropy))
        line, numbers = train_gpt.pseudo_report(*arrays, target_bytes, settings)
        figures["rows"].append({"buckets": buckets, **numbers})
        print(f"buckets {buckets}: {line}", flush=True)
    return figures


def main() -> int:
    """Measure every stream and write the JSON file."""
    folder = os.environ.get("SAMPLE_DATA")
    if not folder:
        print("error: SAMPLE_DATA is not set; set it to the folder of recorded streams", file=sys.stderr)
        return 2
    if importlib.util.find_spec("pyppmd") is None:
        print("error: PPMd is not installed; pip install pyppmd==1.3.1", file=sys.stderr)
        return 2
    report = {"streams": {name: measure(Path(folder), name) for name in STREAMS}}
    report["variables"] = VARIANTS
    tokens = np.fromfile(Path(folder) / "fineweb_val_000000.bin", "<u2", offset=1024).astype(np.int32)
    neural = np.load(Path(folder) / "fineweb_val_neural.npz")
    recorded = (torch.from_numpy(neural[key]) for key in ("logp", "entropy"))
    report["buckets"] = {"fineweb_val": sweep(torch.from_numpy(tokens), *recorded, STREAMS["fineweb_val"][0])}
    report["buckets"]["made-up"] = sweep(*long_stream(), LONG)
    train_gpt.write_atomically(RECORDS / "streams.json", (json.dumps(report, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
