"""Measure speed: `make bench`. Writes records/bench/<processor or GPU>.json; timings live here, not in tests.

Per recipe, in a process of its own: tokens a second of a training step, the optimizers' share of it, peak
memory; for two of them scoring tokens a second, seconds and size of an artifact. For the exact cache:
tokens a second and memory, from 1 to 16 million tokens. For the hashed pseudo-scores: tokens a second of
#864's rule, and of the same rule in straightforward numpy, with one bincount over all buckets per chunk and
table. For the codec: bytes a second and bits per byte of a text coded by an artifact of the cpu recipe
(ARTIFACT=<file>, or the newest one in runs/, or one trained for a few steps), next to xz and PPMd on the same
text. Machines are noisy: each figure is the median of several repetitions, and what is compared is measured
in one run.
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

# Every recipe but the tests' own: on a GPU with the batch that one of the contest's 8 GPUs gets, on a CPU
# with one short sequence, `cpu` there as it is. The JSON file has batch and sequence beside each figure.
RECIPES = [name for name in train_gpt.RECIPES if name != "smoke"]
ON_GPU = "MICRO_BATCH_SLOTS=1 TRAIN_BATCH_TOKENS=98304 TRAIN_SEQ_LEN=2048 VAL_BATCH_SIZE=98304"
ON_CPU = "MICRO_BATCH_SLOTS=1 TRAIN_BATCH_TOKENS=1024 TRAIN_SEQ_LEN=1024 VAL_BATCH_SIZE=2048"
SCORED = ("cpu", "baseline")  # recipes whose scoring and artifact are measured as well
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


def peak_mib(process: train_gpt.Process) -> int:
    """Return the most memory that this process has had: the GPU's, where there is one."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def in_own_process(*arguments: str) -> dict[str, object]:
    """Return the figures that this script prints with `arguments`: memory is then theirs alone."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


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


def recipe_settings(recipe: str, on_gpu: bool) -> train_gpt.Settings:
    """Return a recipe's settings with the batch that it is measured at."""
    batch = ON_GPU if on_gpu else ("" if recipe == "cpu" else ON_CPU)
    pairs = dict(pair.split("=") for pair in batch.split())
    return train_gpt.Settings.from_env({"RECIPE": recipe, **pairs})


def training_loss(model: train_gpt.GPT, settings: train_gpt.Settings, process: train_gpt.Process):
    """Return the loss that most steps of a recipe compute, compiled on a GPU, as `train_gpt.train` does."""
    quantized = settings.qat_start == "step0"
    loss = train_gpt.QuantizationAware(model, settings) if quantized else model
    if process.device.type == "cuda":
        loss = torch.compile(loss, dynamic=False, fullgraph=True)
    return train_gpt.PseudoOracle(settings, process).beside(loss) if settings.gate_head else loss


def bench_steps(settings: train_gpt.Settings, process: train_gpt.Process) -> dict[str, object]:
    """Return what a training step costs on random tokens: time, the optimizers' share of it, memory."""
    on_gpu = process.device.type == "cuda"
    torch.manual_seed(0)
    model = train_gpt.GPT(settings).to(process.device)
    loss = training_loss(model, settings, process)
    groups = train_gpt.parameter_groups(model, settings)
    optimizers, averages = (
        train_gpt.Optimizers(*groups, settings, process),
        train_gpt.Averages(model, settings),
    )
    rows = settings.train_batch_tokens // settings.micro_batch_slots // settings.train_seq_len
    shape = (settings.micro_batch_slots, rows, settings.train_seq_len + 1)
    batches = list(torch.randint(0, settings.vocab_size, shape, dtype=torch.int32))
    halves = []
    for _ in range(11 if on_gpu else 3):
        process.synchronize()
        start = time.perf_counter()
        optimizers.gather(loss, batches)
        process.synchronize()
        middle = time.perf_counter()
        optimizers.step(1.0, 0.9)
        averages.update(1, 1.0)
        process.synchronize()
        halves.append((middle - start, time.perf_counter() - middle))
    gradient_seconds, update_seconds = map(statistics.median, zip(*halves[1:], strict=True))
    seconds = gradient_seconds + update_seconds
    return {
        "batch_tokens": settings.train_batch_tokens,
        "sequence_length": settings.train_seq_len,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_ms": 1000 * seconds,
        "train_tokens_per_second": settings.train_batch_tokens / seconds,
        "optimizer_share": update_seconds / seconds,
        "peak_mib": peak_mib(process),
    }


def bench_scoring(settings: train_gpt.Settings, process: train_gpt.Process) -> dict[str, object]:
    """Return scoring tokens a second, and seconds and size of an artifact, of untrained weights."""
    model = train_gpt.GPT(settings).to(process.device)
    windows = 4 * settings.val_batch_size // settings.micro_batch_slots // settings.window
    count = settings.window + windows * settings.eval_stride
    tokens = np.random.default_rng(0).integers(0, settings.vocab_size, count + 1).astype(np.uint16)
    on_gpu = process.device.type == "cuda"
    logits = torch.compile(model.logits, dynamic=False) if on_gpu else model.logits

    def score():
        stream = train_gpt.score_stream(logits, tokens, settings, settings.eval_stride, process, "score")
        return sum(float(chunk.logp.sum()) for chunk in stream)

    score_seconds = median_seconds(process, 3, score)
    tokenizer = train_gpt.Tokenizer(b'{"config": {"byte_offset": 4}}')
    start = time.perf_counter()
    artifact = train_gpt.pack_artifact(dict(model.named_parameters()), settings, tokenizer, embed=False)
    return {
        "score_tokens_per_second": count / score_seconds,
        "artifact_seconds": time.perf_counter() - start,
        "artifact_bytes_untrained": len(artifact),
    }


def bench_recipe(recipe: str, process: train_gpt.Process) -> dict[str, object]:
    """Return the figures of one recipe."""
    settings = recipe_settings(recipe, process.device.type == "cuda")
    figures = bench_steps(settings, process)
    return figures | (bench_scoring(settings, process) if recipe in SCORED else {})


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
        for _, *lines in train_gpt.count_lines(tokens, 12, 1024):
            train_gpt.count_line(*lines, tokens)

    def count_and_mix():
        known = train_gpt.recall(tokens, settings)
        return train_gpt.mix_prices(tokens, known, -logp, entropy, None, settings)

    repetitions = 3 if millions == 1 else 1
    count_seconds = median_seconds(process, repetitions, count)
    both_seconds = median_seconds(process, repetitions, count_and_mix)
    return {
        "tokens": len(tokens) - 1,
        "count_tokens_per_second": len(tokens) / count_seconds,
        "count_and_mix_tokens_per_second": len(tokens) / both_seconds,
        "seconds": both_seconds,
        "peak_mib": peak_mib(process),
    }


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


def bench_growth() -> list[dict[str, object]]:
    """Return the cache's figures for 1 to 16 million tokens, each measured in a process of its own."""
    figures = []
    for millions in CACHE_MILLIONS:
        figures.append(in_own_process("--cache", str(millions)))
        print(f"bench:cache {figures_line(figures[-1])}", flush=True)
    return figures


def main() -> int:
    """Measure every case, print a line each, write the JSON file."""
    with train_gpt.open_process({}, train_gpt.Settings()) as process:
        name = processor_name()
        report = {
            "processor": name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "recipes": {},
        }
        report["cache"] = bench_growth()
        for recipe in RECIPES:
            report["recipes"][recipe] = in_own_process("--recipe", recipe)
            print(f"bench:{recipe} {figures_line(report['recipes'][recipe])}", flush=True)
        report["pseudo"] = bench_pseudo(process)
        print(f"bench:pseudo {figures_line(report['pseudo'])}", flush=True)
    report["codec"] = bench_codec()
    print(f"bench:codec {figures_line(report['codec'])}", flush=True)
    path = ROOT / "records" / "bench" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    train_gpt.write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] in (["--cache"], ["--recipe"]):
        with train_gpt.open_process({}, train_gpt.Settings()) as this:
            cache = sys.argv[1] == "--cache"
            print(
                json.dumps(bench_cache(int(sys.argv[2]), this) if cache else bench_recipe(sys.argv[2], this))
            )
        sys.exit(0)
    sys.exit(main())
