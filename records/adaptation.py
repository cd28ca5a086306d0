"""What test-time training is worth at reduced width: `SAMPLE_DATA=<folder> python records/adaptation.py`.

One model with the parts of #779 (records/curves.py says how its width is reduced) is trained, written, read
back, and scored on held-out *training* tokens: as it is, and learning from each chunk once it is priced.
Writes records/adaptation.json: loss in nats per token, without the cache, and the seconds that it took.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import curves
import numpy as np
import reduced
import torch

import train_gpt

RESULTS = reduced.RECORDS / "adaptation.json"
# Chunks of 16 windows, steps of 8: the held-out text makes 16 chunks of it, #779's split makes 60.
LEARNING = {"ttt_last_blocks": 1, "ttt_chunk_tokens": 2_048, "ttt_batch_seqs": 8}
VARIANTS = {
    "off": {"ttt_last_blocks": 0},
    "one block, rate 0.00003": {"ttt_lr": 3e-5},
    "one block, rate 0.0005": {"ttt_lr": 5e-4},
    "one block, rate 0.002": {"ttt_lr": 2e-3},
    "one block, rate 0.01": {"ttt_lr": 1e-2},
    "all blocks, rate 0.0005": {"ttt_lr": 5e-4, "ttt_last_blocks": 11},
    "all blocks, rate 0.002": {"ttt_lr": 2e-3, "ttt_last_blocks": 11},
    "one block, rate 0.002, three passes": {"ttt_lr": 2e-3, "ttt_epochs": 3},
    "one block, rate 0.002, averaged at 0.9": {"ttt_lr": 2e-3, "polyak_decay": 0.9},
}


def score(trained: reduced.Trained, weights: dict[str, torch.Tensor], changes: dict) -> dict[str, float]:
    """Return loss and seconds of scoring the held-out tokens with settings changed as named."""
    settings = dataclasses.replace(trained.settings, **{**LEARNING, **changes})
    model, dataset, started = train_gpt.GPT(settings), trained.dataset, time.perf_counter()
    model.load_state_dict(weights)
    exact = dataset._replace(manifest={})  # bytes as they are counted above
    lessons = (exact.size_of, len(dataset.val_tokens) - 1) if settings.ttt_last_blocks else None
    scorer = train_gpt.Scorer(model, settings, trained.process, lessons=lessons)
    prices = scorer.prices(np.asarray(dataset.val_tokens))
    loss = -float(prices.astype(np.float64).mean())
    return {"loss": round(loss, 5), "seconds": round(time.perf_counter() - started, 2)}


def main() -> int:
    """Train once, score every variant, write the JSON file."""
    variables = curves.variables_of("pr779", "mix") | {"TTT_LAST_BLOCKS": "0"}
    trained = reduced.train_reduced(variables, 1)
    data = train_gpt.pack_artifact(trained.weights, trained.settings, trained.dataset.tokenizer, embed=False)
    weights = train_gpt.unpack_artifact(data).weights
    variants = {}
    for name, changes in VARIANTS.items():
        variants[name] = {"changes": changes, **score(trained, weights, changes)}
        print(name, variants[name], flush=True)
    targets = len(trained.dataset.val_tokens) - 1
    reduced.write_json(RESULTS, {"targets": targets, "learning": LEARNING, "variants": variants})
    return 0


if __name__ == "__main__":
    sys.exit(main())
