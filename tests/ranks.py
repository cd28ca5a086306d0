"""Runs under torchrun: what several ranks must agree on. Rank 0 writes one JSON object to argv[1]."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import os

import train_gpt


def main():
    settings = train_gpt.Settings.from_env({"RECIPE": "smoke", "MUON_WD": "0.1"})
    with train_gpt.open_process(os.environ, settings) as process:
        report = {"world_size": process.world_size}
        report["sum"] = process.sum(torch.tensor([1.0 + process.rank, 10.0])).tolist()
        report["elapsed"] = process.agree(100.0 + 50 * process.rank, None)
        report["shared"] = process.share(f"from rank {process.rank}")
        failure = train_gpt.DataError("shard 7 is bad") if process.rank == process.world_size - 1 else None
        try:
            process.agree(0.0, failure)
        except train_gpt.DataError as error:
            report["failure"] = str(error)
        torch.manual_seed(0)
        model = train_gpt.GPT(settings)
        optimizers = train_gpt.Optimizers(model, settings, process)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            slots = torch.randint(0, 384, (2, 4, 33), generator=generator, dtype=torch.int32)
            loss = optimizers.gather(model, list(slots[process.rank :: process.world_size]))
            optimizers.step(1.0, 0.9)
        report["loss"] = float(loss)
        report["weights"] = [float(p.detach().double().abs().sum()) for p in model.parameters()]
        texts = [None] * process.world_size
        texts = [process.share(json.dumps(report["weights"]))]
        report["same_weights"] = process.sum(
            torch.tensor([float(texts[0] == json.dumps(report["weights"]))])
        ).item()
        if process.is_main:
            Path(sys.argv[1]).write_text(json.dumps(report))


main()
