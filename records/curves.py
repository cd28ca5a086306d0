"""Train the five reference recipes at reduced width: `SAMPLE_DATA=<folder> python records/curves.py`.

On two texts: the sample data's mix of technical and other English, and the standard library's source as
data/text.py cuts it into tokens (`make data`). The recipes as they are but for width, batch, schedule
(records/reduced.py) and what their width forces: a quarter of each head rotates where theirs does, and no
matrix is small enough to stay float16. Quantization-aware training, averages and penalties act as in the
recipe. Writes records/curves.json: the training loss, a mean over every 10 steps, and the loss on held-out
training tokens after averaging and after quantization.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from pathlib import Path

import reduced

RESULTS = reduced.RECORDS / "curves.json"
RECIPES = ("pr890", "pr810", "pr779", "pr834", "pr864")
EVERY = 10  # steps of one point
# Far more places of the text side by side than a step reads, and those of a step far apart: a curve shows the
# model, not the documents.
STRIDE = 181
LENGTH = "ITERATIONS=400 WARMDOWN_ITERS=200 DATA_LANES=512"
CHANGES = f"{reduced.WIDTH} {reduced.SCHEDULE} {LENGTH} FP16_MAX_NUMEL=0 SEED=1"
TEXTS = ("mix", "stdlib")
STDLIB = "./data/datasets/stdlib"  # of data/text.py, 4,000 pieces
KV_HEADS = {"pr810": 2, "pr864": 2}  # half of the query heads; the others have as many


def variables_of(recipe: str, text: str) -> dict[str, str]:
    """Return the variables of a recipe at reduced width, with the vocabulary of one of TEXTS."""
    own = f"RECIPE={recipe} NUM_KV_HEADS={KV_HEADS.get(recipe, 4)}"
    own += " VOCAB_SIZE=4000" if text == "stdlib" else ""
    own += " ROPE_DIMS=0 PRE_ENRICH_DIM=96" if recipe == "pr810" else " ROPE_DIMS=4"
    return reduced.variables_of(f"{CHANGES} {own}")


def measure(recipe: str, text: str) -> dict[str, object]:
    """Return the curve and the final losses of one training."""
    folder = Path(reduced.ROOT, STDLIB) if text == "stdlib" else reduced.sample_folder()
    trained = reduced.train_reduced(variables_of(recipe, text), 1, folder, STRIDE)
    losses = trained.log.values("train", "train_loss")
    points = [statistics.mean(losses[at : at + EVERY]) for at in range(0, len(losses), EVERY)]
    size, quantized = trained.quantized()
    qat = trained.log.values("qat", "step")
    return {
        "train_loss": [round(point, 3) for point in points],
        "qat_step": qat[0] if qat else None,
        "parameters": trained.parameters,
        "held_out_loss": round(trained.loss(trained.weights), 4),
        "held_out_loss_quantized": round(quantized, 4),
        "artifact_bytes": size,
    }


def keep(report: dict, job: tuple[str, str], figures: dict[str, object]) -> None:
    """Take one recipe's figures on one text into `report` and write it."""
    recipe, text = job
    known = report["texts"].setdefault(text, {}) | {recipe: figures}
    report["texts"][text] = {name: known[name] for name in RECIPES if name in known}
    reduced.write_json(
        RESULTS, {"every": EVERY, "stride": STRIDE, "changes": " ".join(CHANGES.split())} | report
    )
    print(text, recipe, {name: value for name, value in figures.items() if name != "train_loss"}, flush=True)


def main(recipes: list[str]) -> int:
    """Train the named recipes, or all of them, on both texts; the others' figures are kept."""
    if unknown := set(recipes) - set(RECIPES):
        print(f"error: no recipe {sorted(unknown)}; choose from {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    report = {"texts": json.loads(RESULTS.read_text())["texts"] if RESULTS.is_file() else {}}
    jobs = [(recipe, text) for text in TEXTS for recipe in recipes or RECIPES]
    reduced.run_all(measure, jobs, functools.partial(keep, report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
