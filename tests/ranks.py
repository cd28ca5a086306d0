"""Runs under torchrun: what several ranks must agree on. Rank 0 writes one JSON object to argv[1]."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import os

import train_gpt

SMOKE = {"RECIPE": "smoke", "MUON_WD": "0.1"}
OPTIMIZERS = {
    "plain": {},
    "clipped": {"GRAD_CLIP_NORM": "0.05"},
    "parallel": {"PARALLEL_MUON": "1", "MUON_WD_ORDER": "after"},
    "parallel clipped": {"PARALLEL_MUON": "1", "GRAD_CLIP_NORM": "0.05"},
    "parallel quantized": {"PARALLEL_MUON": "1", "QAT_START": "step0", "BIGRAM_VOCAB_SIZE": "40"},
}


def train(settings, process):
    """Take four steps; return the loss, all weights, and on how many ranks they are equal to rank 0's."""
    torch.manual_seed(0)
    model = train_gpt.GPT(settings)
    loss_of = model if settings.qat_start == "off" else train_gpt.QuantizationAware(model, settings)
    optimizers = train_gpt.Optimizers(*train_gpt.parameter_groups(model, settings), settings, process)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        slots = torch.randint(0, 384, (2, 4, 33), generator=generator, dtype=torch.int32)
        loss = optimizers.gather(loss_of, list(slots[process.rank :: process.world_size]))
        optimizers.step(1.0, 0.9)
    weights = json.dumps({name: p.detach().flatten().tolist() for name, p in model.named_parameters()})
    same = process.sum(torch.tensor([float(process.share(weights)[0] == weights)])).item()
    return {"loss": float(loss), "weights": json.loads(weights), "same": same}


def main():
    settings = train_gpt.Settings.from_env(SMOKE)
    with train_gpt.open_process(os.environ, settings) as process:
        report = {"world_size": process.world_size}
        report["sum"] = process.sum(torch.tensor([1.0 + process.rank, 10.0])).tolist()
        report["elapsed"] = process.share(100.0 + 50 * process.rank)[0]
        report["shared"] = process.share(f"from rank {process.rank}")[0]
        failure = train_gpt.DataError("shard 7 is bad") if process.rank == process.world_size - 1 else None
        try:
            with process.together():
                if failure:
                    raise failure
        except train_gpt.DataError as error:
            report["failure"] = str(error)
        for name, changes in OPTIMIZERS.items():
            report[name] = train(train_gpt.Settings.from_env(SMOKE | changes), process)
        if process.is_main:
            Path(sys.argv[1]).write_text(json.dumps(report))


main()
