"""What each part of the references is worth: `SAMPLE_DATA=<folder> python records/ablation.py`.

One base model of reduced width, one part at a time, then the parts that helped together and that model
without each of them (records/reduced.py says how a model is trained and what is held out). Runs of one seed
see the same tokens, so what counts is the difference of two losses of one seed; its mean and standard error
over the seeds go into the table that `records/report.py` makes. Writes records/ablation.json after each
run; runs that it holds are not repeated.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys

import reduced

RESULTS = reduced.RECORDS / "ablation.json"
SEEDS = (1, 2, 3)
# Eleven blocks of the contest's baseline, at the learning rates of the references.
BASE = f"""{reduced.WIDTH} {reduced.SCHEDULE} NUM_LAYERS=11 NUM_KV_HEADS=2 MLP_MULT=2
    TIED_EMBED_LR=0.035 MATRIX_LR=0.025 SCALAR_LR=0.025"""
PARTS = {
    "bigram table, xor": "BIGRAM_VOCAB_SIZE=2048",
    "bigram table, linear": "BIGRAM_VOCAB_SIZE=2048 BIGRAM_HASH=linear",
    "smear gate, half": "SMEAR_GATE=half",
    "smear gate, twentieth": "SMEAR_GATE=twentieth",
    "value embeddings in blocks 9, 10": "VE_LAYERS=9,10",
    "value residual": "VALUE_RESIDUAL=1",
    "gated attention": "GATED_ATTN=1",
    "exclusive attention, last 4": "XSA_LAST_N=4",
    "exclusive attention, all": "XSA_LAST_N=11",
    "rotary on a quarter of the channels": "ROPE_DIMS=4",
    "scaled norms": "LN_SCALE=norm",
    "leaky relu, squared": "MLP_ACTIVATION=leaky2",
    "MLP of 3.5 widths": "MLP_MULT=3.5",
    "as many value heads as query heads": "NUM_KV_HEADS=4",
    "odd block in the first half": "UNET_LONGER_HALF=encoder",
    "pre-enrichment": "PRE_ENRICH_DIM=96",
    "token gate on blocks": "DTG_ENABLED=1",
    "a head for the token after": "MTP_NUM_HEADS=1",
    "overtone embedding": "EMBED_INIT=overtone",
    "orthogonal matrices": "MATRIX_INIT=orthogonal",
    "weight decay 0.04": "MUON_WD=0.04 ADAM_WD=0.04",
    "weight decay 0.4": "MUON_WD=0.4 ADAM_WD=0.4",
    "gradient clipping at 0.3": "GRAD_CLIP_NORM=0.3",
    "SWA": "AVERAGE=swa",
}
# Parts that help on their own, at the width of MLP that leaves the artifact below the contest's limit.
TOGETHER = "all that helped"
COMBINED = (
    "bigram table, xor",
    "smear gate, half",
    "value embeddings in blocks 9, 10",
    "value residual",
    "gated attention",
    "exclusive attention, all",
    "leaky relu, squared",
    "as many value heads as query heads",
    "gradient clipping at 0.3",
)
NARROWER = "MLP_MULT=2.5"
QUESTIONED = ("value embeddings in blocks 9, 10", "value residual")  # parts with much in common
CHANGED = {
    "all, half the value heads and an MLP of 3 widths": "NUM_KV_HEADS=2 MLP_MULT=3",
    "all, and a head for the token after": PARTS["a head for the token after"],
}


def variants() -> dict[str, str]:
    """Return every model to train by name, as what it changes in BASE."""
    together = {TOGETHER: COMBINED}
    together |= {f"all but: {part}": tuple(p for p in COMBINED if p != part) for part in QUESTIONED}
    combined = {name: " ".join((*map(PARTS.get, parts), NARROWER)) for name, parts in together.items()}
    changed = {name: f"{combined[TOGETHER]} {changes}" for name, changes in CHANGED.items()}
    return {"base": "", **PARTS, **combined, **changed}


def measure(name: str, seed: int) -> dict[str, float]:
    """Return the held-out losses of one training (exported, last weights) and its parameters."""
    trained = reduced.train_reduced(reduced.variables_of(f"{BASE} {variants()[name]}"), seed)
    losses = {"loss": trained.loss(trained.weights), "raw": trained.raw_loss()}
    return {key: round(loss, 5) for key, loss in losses.items()} | {"parameters": trained.parameters}


def difference(results: dict, name: str, reference: str) -> tuple[float, float]:
    """Return mean and standard error over the seeds of loss(name) - loss(reference), both of one seed."""
    losses, other = results[name]["losses"], results[reference]["losses"]
    pairs = [losses[seed] - other[seed] for seed in losses if seed in other]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
    return statistics.mean(pairs), error


def keep(report: dict, job: tuple[str, int], figures: dict[str, float]) -> None:
    """Take one result into `report` and write it."""
    name, seed = job
    entry = report["variants"].setdefault(name, {"changes": variants()[name], "losses": {}, "raw": {}})
    entry["parameters"] = figures["parameters"]
    entry["losses"][str(seed)], entry["raw"][str(seed)] = figures["loss"], figures["raw"]
    ordered = {key: report["variants"][key] for key in variants() if key in report["variants"]}
    reduced.write_json(RESULTS, report | {"variants": ordered})
    print(f"{name} seed:{seed} {figures}", flush=True)


def main() -> int:
    """Train what is missing; write the JSON file after each run."""
    report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    base = " ".join(BASE.split())
    known = report.get("variants", {}) if report.get("base") == base else {}
    known = {name: entry for name, entry in known.items() if variants().get(name) == entry["changes"]}
    report = {"base": base, "variants": known}
    jobs = sorted(
        ((name, seed) for seed in SEEDS for name in variants()), key=lambda job: job[0] not in PARTS
    )
    missing = [job for job in jobs if str(job[1]) not in known.get(job[0], {"losses": ()})["losses"]]
    reduced.run_all(measure, missing, functools.partial(keep, report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
