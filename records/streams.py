"""Measure the exact cache on recorded neural streams: `SAMPLE_DATA=<folder> python records/streams.py`.

A stream is tokens and, for each target, a neural model's log-probability and entropy; the folder's README
says where they come from. The constants of the cache were chosen on mix_tune; fineweb_val is only measured.
Writes records/streams.json: the default, parts switched off or changed, and what general-purpose compressors
make of the same text; `records/report.py` makes the table.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import sys
from pathlib import Path

import numpy as np
import pyppmd
import torch

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
sys.path.insert(0, str(ROOT))
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


def compressors(text: bytes) -> dict[str, float]:
    """Return bits per byte of general-purpose compressors."""
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
        variables = {"VOCAB_SIZE": "1024", "TOKENIZER_PATH": str(path), **VARIANTS[variant]}
        settings = train_gpt.Settings.from_env(variables)
        prices = train_gpt.mix_stream(torch.from_numpy(tokens), logp, entropy, settings)
        bpb = -float(prices.double().sum()) / math.log(2) / size
        figures["variants"][variant] = bpb
        print(f"{name} {variant}: {bpb:.4f}", flush=True)
    return figures


def main() -> int:
    """Measure every stream and write the JSON file."""
    folder = os.environ.get("SAMPLE_DATA")
    if not folder:
        print("error: SAMPLE_DATA is not set; set it to the folder of recorded streams", file=sys.stderr)
        return 2
    report = {"streams": {name: measure(Path(folder), name) for name in STREAMS}}
    report["variables"] = VARIANTS
    train_gpt.write_atomically(RECORDS / "streams.json", (json.dumps(report, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
