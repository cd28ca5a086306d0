"""Compare settings of the cpu recipe on held-out training documents: `python records/sweep.py [NAME ...]`.

Each alternative is one full run under the recipe's wall clock, one after the other on an otherwise quiet
machine, on a dataset whose validation documents stay away (data/text.py --tune). Writes
records/cpu_alternatives.json after each run; names given on the command line are run again, the others kept.
`records/report.py` makes the table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
RESULTS = RECORDS / "cpu_alternatives.json"
# What differs from the cpu recipe, by name.
ALTERNATIVES = {
    "cpu": {},
    "softcap 30": {"LOGIT_SOFTCAP": "30"},
    "contest learning rates": {"TIED_EMBED_LR": "0.05", "MATRIX_LR": "0.04", "SCALAR_LR": "0.04"},
    "vocabulary 2048": {"VOCAB_SIZE": "2048"},
    "vocabulary 8192": {"VOCAB_SIZE": "8192"},
    "width 192": {"MODEL_DIM": "192", "NUM_HEADS": "3", "NUM_KV_HEADS": "3"},
    "batch 2048": {"TRAIN_BATCH_TOKENS": "2048", "WARMDOWN_ITERS": "640"},
    "momentum 0.95": {"MUON_MOMENTUM": "0.95"},
}


def run_alternative(name: str) -> dict[str, object]:
    """Train and score one alternative; return its numbers."""
    variables = ALTERNATIVES[name]
    sys.path.insert(0, str(ROOT))
    from train_gpt import Settings

    vocab_size = Settings.from_env({"RECIPE": "cpu", **variables}).vocab_size
    data = Path("data/datasets") / f"stdlib_tune_{vocab_size}"
    make = [sys.executable, "data/text.py", "--tune", "--output", str(data), "--vocab-size", str(vocab_size)]
    subprocess.run(make, cwd=ROOT, check=True)
    run_dir = Path("runs/sweep") / name.replace(" ", "-")
    paths = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model"), "RUN_DIR": str(run_dir)}
    environment = {**os.environ, "RECIPE": "cpu", **variables, **paths}
    subprocess.run([sys.executable, "train_gpt.py"], cwd=ROOT, env=environment, check=True)
    result = json.loads((ROOT / run_dir / "result.json").read_text())
    kept = (
        "val_bpb",
        "training_val_bpb",
        "steps",
        "train_seconds",
        "eval_seconds",
        "artifact_bytes",
        "xz_bpb",
    )
    return {"variables": variables, **{key: result[key] for key in kept}}


def main(names: list[str]) -> int:
    """Run the named alternatives, or all of them, and write the results."""
    unknown = set(names) - ALTERNATIVES.keys()
    if unknown:
        print(f"error: no alternative {sorted(unknown)}; choose from {list(ALTERNATIVES)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"alternatives": {}}
    results |= {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    for name in names or ALTERNATIVES:
        results["alternatives"][name] = run_alternative(name)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
