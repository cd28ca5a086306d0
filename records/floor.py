"""What QUANT_SCALE_FLOOR and QAT do at 5 and 6 bits: `SAMPLE_DATA=<folder> python records/floor.py`.

A model of reduced width (records/reduced.py) is trained without quantization and written four times: at 5
and 6 bits, scales with and without the floor of 1 / largest integer. Then it is trained four times with
quantization-aware training for the last quarter, each time with the quantizer that writes it. Writes
records/floor.json after each training: bytes, and losses on held-out training tokens of the float weights
and of what the artifact holds.
"""

from __future__ import annotations

import functools
import sys

import reduced

RESULTS = reduced.RECORDS / "floor.json"
SEEDS = (1,)
# The parts of #864, percentiles searched; every matrix is quantized.
BASE = f"""{reduced.WIDTH} {reduced.SCHEDULE} NUM_LAYERS=11 NUM_KV_HEADS=2 MLP_MULT=3
    MLP_ACTIVATION=leaky2 BIGRAM_VOCAB_SIZE=1024 SMEAR_GATE=half ROPE_DIMS=4 XSA_LAST_N=4 VALUE_RESIDUAL=1
    GATED_ATTN=1 MATRIX_INIT=orthogonal MUON_WD=0.04 ADAM_WD=0.04 GRAD_CLIP_NORM=0.3
    TIED_EMBED_LR=0.035 MATRIX_LR=0.025 SCALAR_LR=0.025 QUANT_SEARCH=1 FP16_MAX_NUMEL=0"""
QUANTIZERS = [(bits, floor) for bits in (5, 6) for floor in (False, True)]


def measure(qat: tuple[int, bool] | None, seed: int) -> list[dict[str, object]]:
    """Return the figures of one training, through its own quantizer (`qat`) or through all of them (None)."""
    variables = reduced.variables_of(BASE)
    if qat:
        bits, floor = map(int, qat)
        variables |= {"QAT_START": "scale:0.5", "MATRIX_BITS": str(bits), "QUANT_SCALE_FLOOR": str(floor)}
    trained, rows = reduced.train_reduced(variables, seed), []
    plain = trained.loss(trained.weights)
    for bits, floor in [qat] if qat else QUANTIZERS:
        size, loss = trained.quantized(matrix_bits=bits, quant_scale_floor=floor)
        row = {"bits": bits, "floor": floor, "qat": bool(qat), "seed": seed, "bytes": size}
        rows.append(row | {"float": round(plain, 5), "quantized": round(loss, 5)})
    return rows


def keep(report: dict, job: tuple, rows: list[dict[str, object]]) -> None:
    """Take one training's rows into `report` and write it."""
    report["rows"] = sorted(report["rows"] + rows, key=lambda r: (r["bits"], r["floor"], r["qat"], r["seed"]))
    reduced.write_json(RESULTS, report)
    print(job, rows, flush=True)


def main() -> int:
    """Measure everything anew."""
    report = {"base": " ".join(BASE.split()), "rows": []}
    jobs = [(qat, seed) for seed in SEEDS for qat in (None, *QUANTIZERS)]
    reduced.run_all(measure, jobs, functools.partial(keep, report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
