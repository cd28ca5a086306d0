"""Measure speed: `make bench`. Writes records/bench/<processor or GPU>.json; timings live here, not in tests.

Per recipe: training tokens a second, the share of a step that the optimizers take, scoring tokens a second,
seconds and size of an artifact. For the exact cache: tokens a second and memory, from 1 to 16 million tokens.
For the hashed pseudo-scores: tokens a second of #864's rule, and of the same rule in straightforward numpy,
with one bincount over all buckets per chunk and table. For the codec: bytes a second and bits per byte of a
text coded by an artifact of the cpu recipe (ARTIFACT=<file>, or the newest one in runs/, or one trained for
a few steps), next to xz and PPMd on the same text. Machines are noisy: each figure is the median of
several repetitions, and what is compared is measured in one run.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reference  # noqa: E402

import train_gpt  # noqa: E402

try:
    import pyppmd  # of requirements-dev.txt
except ImportError:
    pyppmd = None

# Recipes at a batch that the machine at hand can take: (recipe, variables on a CPU, variables on a GPU).
CASES = (
    ("cpu", {}, {}),
    (
        "baseline",
        {"TRAIN_BATCH_TOKENS": "8192", "VAL_BATCH_SIZE": "65536"},
        {"TRAIN_BATCH_TOKENS": "524288", "VAL_BATCH_SIZE": "524288"},
    ),
)


CACHE_MILLIONS = (1, 2, 4, 8, 16)  # lengths of the streams that the exact cache is measured on, times 2**20
PASSAGE = 32  # tokens of a copied passage in the made-up stream
TEXT_BYTES, SHORT_STEPS = 100_000, 100  # of the text that is coded; of an artifact trained for that alone


def processor_name() -> str:
    """Return the GPU's or the processor's model name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def median_seconds(process: train_gpt.Process, repetitions: int, work) -> float:
    """Return the median time of `work()`, which runs once before the clock."""
    work()
    times = []
    for _ in range(repetitions):
        process.synchronize()
        start = time.perf_counter()
        work()
        process.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bench_recipe(recipe: str, variables: dict[str, str], process: train_gpt.Process) -> dict[str, object]:
    """Return the figures of one recipe on random tokens."""
    settings = train_gpt.Settings.from_env({"RECIPE": recipe, **variables})
    compiled = process.device.type == "cuda"
    torch.manual_seed(0)
    model = train_gpt.GPT(settings).to(process.device)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    optimizers, averages = train_gpt.Optimizers(model, settings, process), train_gpt.Averages(model, settings)
    rows = settings.train_batch_tokens // settings.micro_batch_slots // settings.train_seq_len
    shape = (rows, settings.train_seq_len + 1)
    batches = [
        torch.randint(0, settings.vocab_size, shape, dtype=torch.int32)
        for _ in range(settings.micro_batch_slots)
    ]

    def gather():
        optimizers.gather(forward, batches)

    def update():
        optimizers.step(1.0, 0.9)
        averages.update(1, 1.0)

    def step():
        gather()
        update()

    step_seconds, update_seconds = median_seconds(process, 5, step), median_seconds(process, 5, update)
    windows = 4 * settings.val_batch_size // settings.micro_batch_slots // settings.window
    count = settings.window + windows * settings.eval_stride
    tokens = np.random.default_rng(0).integers(0, settings.vocab_size, count + 1).astype(np.uint16)
    logits = torch.compile(model.logits, dynamic=False) if compiled else model.logits

    def score():
        stream = train_gpt.score_stream(logits, tokens, settings, settings.eval_stride, process, "score")
        return sum(float(chunk.logp.sum()) for chunk in stream)

    score_seconds = median_seconds(process, 3, score)
    tokenizer = train_gpt.Tokenizer(b'{"config": {"byte_offset": 4}}')
    start = time.perf_counter()
    weights = next(iter(averages.candidates().values()))
    artifact = train_gpt.pack_artifact(weights, settings, tokenizer, embed=False)
    return {
        "variables": variables,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_ms": 1000 * step_seconds,
        "train_tokens_per_second": settings.train_batch_tokens / step_seconds,
        "optimizer_share": update_seconds / step_seconds,
        "score_tokens_per_second": count / score_seconds,
        "artifact_seconds": time.perf_counter() - start,
        "artifact_bytes_untrained": len(artifact),
        "peak_gpu_mib": torch.cuda.max_memory_allocated() // 2**20 if compiled else None,
    }


def repetitive_tokens(count: int, vocab_size: int = 1024) -> torch.Tensor:
    """Return made-up tokens (count,) int32 that repeat as text does: frequent ones, and copied passages."""
    random = np.random.default_rng(0)
    tokens = (vocab_size ** random.random(count)).astype(np.int32) - 1
    for begin in range(4 * PASSAGE, count - PASSAGE, 2 * PASSAGE):
        source = random.integers(begin - PASSAGE)
        tokens[begin : begin + PASSAGE] = tokens[source : source + PASSAGE]
    return torch.from_numpy(tokens)


def bench_cache(millions: int, process: train_gpt.Process) -> dict[str, object]:
    """Return tokens a second of counting and of counting and mixing, and the memory that both took."""
    tokens = repetitive_tokens(millions * 2**20 + 1).to(process.device)
    settings = train_gpt.Settings()
    logp, entropy = torch.full((2, len(tokens) - 1), 3.0, device=process.device)

    def count():
        for _ in train_gpt.count_orders(tokens, range(2, 13), 1024):
            pass

    def count_and_mix():
        known = train_gpt.recall(tokens, settings)
        return train_gpt.mix_prices(tokens, known, -logp, entropy, None, settings)

    repetitions = 3 if millions == 1 else 1
    count_seconds = median_seconds(process, repetitions, count)
    both_seconds = median_seconds(process, repetitions, count_and_mix)
    on_gpu = process.device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {
        "tokens": len(tokens) - 1,
        "count_tokens_per_second": len(tokens) / count_seconds,
        "count_and_mix_tokens_per_second": len(tokens) / both_seconds,
        "seconds": both_seconds,
        "peak_mib": peak // 2**20,
    }


def bench_growth() -> list[dict[str, object]]:
    """Return the cache's figures for 1 to 16 million tokens, each measured in a process of its own."""
    figures = []
    for millions in CACHE_MILLIONS:
        command = [sys.executable, __file__, "--cache", str(millions)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures.append(json.loads(done.stdout))
        print("bench:cache " + " ".join(f"{k}:{v:.4g}" for k, v in figures[-1].items()), flush=True)
    return figures


def bench_pseudo(process: train_gpt.Process) -> dict[str, float]:
    """Return the speed of #864's rule, the straightforward version's, and how many times faster it is."""
    settings, rule = train_gpt.Settings(), train_gpt.PSEUDO_RULES["pr864"]
    generator, count = np.random.default_rng(0), 2**20
    tokens = (1024 * generator.random(count + 1) ** 3).astype(
        np.uint16
    )  # some tokens far oftener than others
    logp, entropy = np.full(count, -3.0, np.float32), 6 * generator.random(count, np.float32)

    stream = torch.as_tensor(tokens, dtype=torch.int32, device=process.device)

    def engine():
        train_gpt.pseudo_stream("pr864", stream, logp, entropy, settings)

    def straightforward():
        reference.pseudo_bincount(tokens, logp, entropy, rule.buckets, rule.chunk_tokens)

    seconds = median_seconds(process, 5, engine), median_seconds(process, 3, straightforward)
    return {
        "pseudo_tokens_per_second": count / seconds[0],
        "bincount_tokens_per_second": count / seconds[1],
        "times_faster": seconds[1] / seconds[0],
    }


def cpu_artifact(folder: Path) -> tuple[Path, str]:
    """Return an artifact of the cpu recipe and where it is from; trained in `folder` where there is none."""
    if named := os.environ.get("ARTIFACT"):
        return Path(named), "named by ARTIFACT"
    runs = sorted((ROOT / "runs").glob("*/artifact.bin"), key=lambda path: -path.stat().st_mtime)
    for path in runs:
        result = json.loads((path.parent / "result.json").read_text())
        if (result["recipe"], result["exit_code"]) == ("cpu", 0):
            return path, f"{result['steps']} steps, val_bpb {result['val_bpb']:.4f}"
    variables = {"RECIPE": "cpu", "ITERATIONS": str(SHORT_STEPS), "MAX_WALLCLOCK_SECONDS": "0"}
    variables |= {"WARMDOWN_ITERS": str(SHORT_STEPS // 2), "RUN_DIR": str(folder)}
    in_script(variables)
    return folder / "artifact.bin", f"{SHORT_STEPS} steps, trained for this"


def in_script(variables: dict[str, str]) -> str:
    """Return the last line of the script, run in a process of its own."""
    command, environment = [sys.executable, "train_gpt.py"], {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def bench_codec() -> dict[str, object]:
    """Return speed and size of the codec on the first validation documents of the standard library."""
    recipe = train_gpt.Settings.from_env({"RECIPE": "cpu"})
    shard = train_gpt.find_shards(ROOT / recipe.data_path, "val")[0]
    tokenizer = train_gpt.Tokenizer.load(ROOT / recipe.tokenizer_path)
    text = tokenizer.decode(train_gpt.open_shard(shard)[:TEXT_BYTES].tolist())[:TEXT_BYTES]
    with tempfile.TemporaryDirectory() as name:
        artifact, origin = cpu_artifact(Path(name) / "run")
        source, coded, back = (Path(name) / file for file in ("text", "coded", "back"))
        source.write_bytes(text)
        speeds = {}
        for work, start, end in (("compress", source, coded), ("decompress", coded, back)):
            files = {"ARTIFACT": str(artifact), "INPUT": str(start), "OUTPUT": str(end)}
            line = in_script({"RECIPE": "cpu", "CODEC": work, **files})
            speeds[work] = len(text) / float(line.split("seconds:")[1])
        if back.read_bytes() != text:
            raise RuntimeError(f"{artifact} does not give the text back")
        sizes = {"coded": coded.stat().st_size}
    sizes["xz"] = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    if pyppmd:
        sizes["ppmd"] = len(pyppmd.compress(text, max_order=16, mem_size=2**26))
    figures: dict[str, object] = {"artifact": origin, "bytes": len(text)}
    figures |= {f"{work}_bytes_per_second": speed for work, speed in speeds.items()}
    return figures | {f"{coder}_bits_per_byte": 8 * size / len(text) for coder, size in sizes.items()}


def figures_line(figures: dict[str, object]) -> str:
    """Return the numbers among `figures` as text."""
    return " ".join(f"{k}:{v:.4g}" for k, v in figures.items() if isinstance(v, int | float))


def main() -> int:
    """Measure every case, print a line each, write the JSON file."""
    with train_gpt.open_process({}, train_gpt.Settings()) as process:
        name, on_gpu = processor_name(), process.device.type == "cuda"
        report = {
            "processor": name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "recipes": {},
        }
        report["cache"] = bench_growth()
        for recipe, on_cpu_variables, on_gpu_variables in CASES:
            figures = bench_recipe(recipe, on_gpu_variables if on_gpu else on_cpu_variables, process)
            report["recipes"][recipe] = figures
            print(f"bench:{recipe} {figures_line(figures)}", flush=True)
        report["pseudo"] = bench_pseudo(process)
        print(f"bench:pseudo {figures_line(report['pseudo'])}", flush=True)
    report["codec"] = bench_codec()
    print(f"bench:codec {figures_line(report['codec'])}", flush=True)
    path = ROOT / "records" / "bench" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    train_gpt.write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cache"]:
        with train_gpt.open_process({}, train_gpt.Settings()) as this:
            print(json.dumps(bench_cache(int(sys.argv[2]), this)))
        sys.exit(0)
    sys.exit(main())
