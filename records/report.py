"""Renew every table and picture made from records: `python records/report.py [--keep RUN_DIR NAME]`.

Out: records/<NAME>/ (result.json, metrics.jsonl, run.log of a kept run), records/*.svg, and the text
between the `<!-- name -->` and `<!-- end -->` marks of README.md and records/README.md. No number in either
is typed by hand; a test runs this and fails where a mark's text is not what the records say.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
sys.path[:0] = [str(ROOT), str(RECORDS)]
import ablation  # noqa: E402

import train_gpt  # noqa: E402


def kept_run(name: str) -> tuple[dict, list[dict]]:
    """Return (result, metrics events) of a kept run."""
    lines = (RECORDS / name / "metrics.jsonl").read_text().splitlines()
    return json.loads((RECORDS / name / "result.json").read_text()), [json.loads(line) for line in lines]


def final_line() -> str:
    """Return the last line of the kept `make run`, and its size and times in a sentence."""
    result, _ = kept_run("cpu")
    last = (RECORDS / "cpu" / "run.log").read_text().splitlines()[-1]
    steps, xz, size = result["steps"], result["xz_bpb"], result["bytes"]
    return (
        f"```\n{last}\n```\n\n(recorded on two cores, which managed {steps} steps: a slower machine takes "
        f"fewer and ends higher; `xz -9e` needs {xz:.4f} bits per byte for the same {size:,} bytes)"
    )


def settings_table() -> str:
    """Return the settings as a table: variable, default, meaning."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(train_gpt.Settings):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        rule = field.metadata
        choices = f" ({', '.join(map(str, rule['choices']))})" if rule["choices"] else ""
        shown = f"`{default}`" if default != "" else "empty"
        rows.append(f"| `{field.name.upper()}` | {shown} | {rule['doc']}{choices} |")
    return "\n".join(rows)


def alternatives_table() -> str:
    """Return the table of what was tried for the cpu recipe."""
    results = json.loads((RECORDS / "cpu_alternatives.json").read_text())
    rows = [
        "| alternative | differs in | steps | bits per byte | without average |",
        "| --- | --- | --- | --- | --- |",
    ]
    ordered = sorted(results["alternatives"].items(), key=lambda item: item[1]["val_bpb"])
    for name, values in ordered:
        variables = " ".join(f"{key}={value}" for key, value in values["variables"].items())
        numbers = f"{values['steps']} | {values['val_bpb']:.4f} | {values['training_val_bpb']:.4f}"
        rows.append(f"| {name} | {f'`{variables}`' if variables else 'nothing'} | {numbers} |")
    return "\n".join(rows)


def bench_reports() -> list[dict]:
    """Return what `make bench` wrote on each processor."""
    return [json.loads(path.read_text()) for path in sorted((RECORDS / "bench").glob("*.json"))]


def bench_table() -> str:
    """Return the table of measured speeds by processor and recipe; a cell stays empty without its figure."""
    head = (
        "processor",
        "recipe",
        "batch, sequence",
        "tokens a second, training",
        "step",
        "optimizer's share",
    )
    rows = [f"| {' | '.join((*head, 'peak memory', 'scoring'))} |", "| --- " * 8 + "|"]
    for report in bench_reports():
        for recipe, v in report["recipes"].items():
            batch = f"{v['batch_tokens']:,} of {v['sequence_length']:,}" if "batch_tokens" in v else ""
            peak = f"{v['peak_mib']:,} MiB" if "peak_mib" in v else ""
            scoring = f"{v['score_tokens_per_second']:,.0f}" if "score_tokens_per_second" in v else ""
            rows.append(
                f"| {report['processor']}, {report['threads']} threads | {recipe} | {batch} | "
                f"{v['train_tokens_per_second']:,.0f} | {v['step_ms']:,.0f} ms | "
                f"{v['optimizer_share']:.0%} | {peak} | {scoring} |"
            )
    return "\n".join(rows)


def pseudo_table() -> str:
    """Return the table of #864's rule against straightforward numpy, by processor."""
    rows = ["| processor | #864's rule, tokens a second | one bincount per chunk and table | times |"]
    rows.append("| --- | --- | --- | --- |")
    for report in bench_reports():
        if v := report.get("pseudo"):
            speeds = f"{v['pseudo_tokens_per_second']:,.0f} | {v['bincount_tokens_per_second']:,.0f}"
            rows.append(f"| {report['processor']} | {speeds} | {v['times_faster']:.1f} |")
    return "\n".join(rows)


def codec_table() -> str:
    """Return the table of the codec: speed, and size beside general-purpose compressors on the same text."""
    head = ("processor", "artifact", "bytes", "compress, bytes a second", "decompress", "bits per byte")
    rows = [f"| {' | '.join((*head, 'PPMd order 16', 'xz -9e'))} |", "| --- " * 8 + "|"]
    for report in bench_reports():
        if v := report.get("codec"):
            speeds = (f"{v[f'{way}_bytes_per_second']:,.0f}" for way in ("compress", "decompress"))
            sizes = (f"{v[f'{coder}_bits_per_byte']:.4f}" for coder in ("coded", "ppmd", "xz"))
            cells = (report["processor"], v["artifact"], f"{v['bytes']:,}", *speeds, *sizes)
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def ablation_table() -> str:
    """Return the table of parts at reduced width: each against the base, then all but each against all."""
    results = json.loads((RECORDS / "ablation.json").read_text())["variants"]
    rows = ["| model | loss | difference | standard error | last weights | parameters |", "| --- " * 6 + "|"]
    single = [name for name in results if name in ablation.PARTS]
    single.sort(key=lambda name: ablation.difference(results, name, "base")[0])
    together = [name for name in results if name not in ablation.PARTS and name != "base"]
    for name in ["base", *single, *together]:
        values = results[name]
        loss, raw = (statistics.mean(values[key].values()) for key in ("losses", "raw"))
        reference = "base" if name in ("base", *single, ablation.TOGETHER) else ablation.TOGETHER
        mean, error = ablation.difference(results, name, reference)
        change = f"{mean:+.4f} | {error:.4f}" if name != "base" else " | "
        rows.append(f"| {name} | {loss:.4f} | {change} | {raw:.4f} | {values['parameters']:,} |")
    return "\n".join(rows)


def floor_table() -> str:
    """Return the table of the quantizers: means over the seeds, with the gap that quantization leaves."""
    table = json.loads((RECORDS / "floor.json").read_text())["rows"]
    rows = [
        "| bits | floor | trained for it | bytes | float loss | quantized loss | gap |",
        "| --- " * 7 + "|",
    ]
    for key in dict.fromkeys((row["bits"], row["floor"], row["qat"]) for row in table):
        same = [row for row in table if (row["bits"], row["floor"], row["qat"]) == key]
        size, plain, loss = (statistics.mean(row[k] for row in same) for k in ("bytes", "float", "quantized"))
        floor, qat = ("on" if value else "off" for value in key[1:])
        figures = f"{size:,.0f} | {plain:.4f} | {loss:.4f} | {loss - plain:+.4f}"
        rows.append(f"| {key[0]} | {floor} | {qat} | {figures} |")
    return "\n".join(rows)


def adaptation_table() -> str:
    """Return the table of test-time training at reduced width."""
    variants = json.loads((RECORDS / "adaptation.json").read_text())["variants"]
    rows = ["| what adapts | loss | difference | seconds |", "| --- " * 4 + "|"]
    for name, v in variants.items():
        change = f"{v['loss'] - variants['off']['loss']:+.4f}" if name != "off" else ""
        rows.append(f"| {name} | {v['loss']:.4f} | {change} | {v['seconds']:.1f} |")
    return "\n".join(rows)


def curves_table() -> str:
    """Return the table of the five recipes at reduced width."""
    texts = json.loads((RECORDS / "curves.json").read_text())["texts"]
    head = ("text", "recipe", "parameters", "quantized from step", "held-out loss", "after quantization")
    rows = [f"| {' | '.join((*head, 'artifact'))} |", "| --- " * 7 + "|"]
    for text, recipes in texts.items():
        for name, v in recipes.items():
            losses = f"{v['held_out_loss']:.4f} | {v['held_out_loss_quantized']:.4f}"
            size = f"{v['artifact_bytes']:,} bytes"
            rows.append(f"| {text} | {name} | {v['parameters']:,} | {v['qat_step']} | {losses} | {size} |")
    return "\n".join(rows)


def streams_table() -> str:
    """Return the table of the exact cache's variants on recorded streams."""
    streams = json.loads((RECORDS / "streams.json").read_text())["streams"]
    rows = ["| | " + " | ".join(streams) + " |", "| --- |" + " --- |" * len(streams)]
    rows.append("| neural model alone | " + " | ".join(f"{s['neural']:.4f}" for s in streams.values()) + " |")
    names = list(dict.fromkeys(name for s in streams.values() for name in s["variants"]))
    for kind, labels in (("variants", names), ("compressors", ("PPMd order 16", "xz -9e"))):
        for name in labels:
            values = (s[kind].get(name) for s in streams.values())
            cells = " | ".join("" if value is None else f"{value:.4f}" for value in values)
            rows.append(f"| {'cache: ' * (kind == 'variants')}{name} | {cells} |")
    return "\n".join(rows)


def growth_table() -> str:
    """Return the table of the exact cache's time and memory by length of the stream."""
    rows = [
        "| processor | tokens | counting, tokens a second | counting and mixing | seconds | peak memory |"
    ]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for report in bench_reports():
        for v in report.get("cache", []):
            rows.append(
                f"| {report['processor']} | {v['tokens']:,} | {v['count_tokens_per_second']:,.0f} | "
                f"{v['count_and_mix_tokens_per_second']:,.0f} | {v['seconds']:.1f} | {v['peak_mib']:,} MiB |"
            )
    return "\n".join(rows)


def buckets_table() -> str:
    """Return the table of #864's rule by number of buckets."""
    rows = [
        "| stream | buckets | pseudo-score | sum of probabilities | after division | exact cache | neural |"
    ]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, stream in json.loads((RECORDS / "streams.json").read_text())["buckets"].items():
        for row in stream["rows"]:
            figures = f"{row['pseudo_bpb']:.4f} | {row['mass']:.1f} | {row['renormalized_bpb']:.4f}"
            beside = f"{stream['exact']:.4f} | {stream['neural']:.4f}"
            rows.append(f"| {name} | 2^{row['buckets'].bit_length() - 1} | {figures} | {beside} |")
    return "\n".join(rows)


def buckets_svg() -> str:
    """Return the picture of #864's rule on fineweb_val: pseudo-score and sum of probabilities."""
    stream = json.loads((RECORDS / "streams.json").read_text())["buckets"]["fineweb_val"]
    rows = stream["rows"]
    powers = [row["buckets"].bit_length() - 1 for row in rows]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 310" font-family="sans-serif"']
    parts.append(' font-size="12"><rect width="760" height="310" fill="white"/>')
    panels = (
        (50, "pseudo-score and exact cache, bits per byte", "pseudo_bpb", stream["exact"]),
        (430, "sum of the pseudo-probabilities (1 is a probability)", "mass", 1.0),
    )
    for left, title, key, level in panels:
        top = 1.1 * max(level, *(row[key] for row in rows))
        x = [left + 290 * index / max(len(rows) - 1, 1) for index in range(len(rows))]
        line = " ".join(f"{at:.1f},{260 - 215 * row[key] / top:.1f}" for at, row in zip(x, rows, strict=True))
        parts.append(f'<text x="{left}" y="22" font-size="14">{title}</text>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="#c05621" stroke-width="2"/>')
        y = 260 - 215 * level / top
        parts.append(f'<line x1="{left}" x2="{left + 290}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2b6cb0"/>')
        for at, row, power in zip(x, rows, powers, strict=True):
            height = 252 - 215 * row[key] / top
            parts.append(f'<text x="{at:.1f}" y="278" text-anchor="middle">2^{power}</text>')
            parts.append(f'<text x="{at:.1f}" y="{height:.1f}" text-anchor="middle">{row[key]:.3g}</text>')
    return "".join(parts) + "</svg>\n"


def curves_svg() -> str:
    """Return the picture of the five recipes' training losses at reduced width, a panel for each text."""
    report = json.loads((RECORDS / "curves.json").read_text())
    lines = [figures["train_loss"] for recipes in report["texts"].values() for figures in recipes.values()]
    steps = report["every"] * max(map(len, lines))
    top, bottom = math.ceil(max(map(max, lines))), math.floor(min(map(min, lines)))
    width, height, base = 280, 220, 260
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 310" font-family="sans-serif"']
    parts.append(' font-size="12"><rect width="760" height="310" fill="white"/>')
    for left, (text, recipes) in zip((40, 370), report["texts"].items(), strict=True):
        title = f"{text}: training loss, nats per token, mean of {report['every']} steps"
        parts.append(f'<text x="{left}" y="22">{title}</text>')
        for loss in range(bottom, top + 1):
            y = base - height * (loss - bottom) / (top - bottom)
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
        for step in range(0, steps + 1, 100):
            x = left + width * step / steps
            parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{step}</text>')
        parts.append(f'<text x="{left + width / 2}" y="{base + 38}" text-anchor="middle">steps</text>')
        for place, (name, figures) in enumerate(recipes.items()):
            colour, points = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280")[place], []
            for index, loss in enumerate(figures["train_loss"]):
                x = left + width * report["every"] * (index + 0.5) / steps
                points.append(f"{x:.1f},{base - height * (loss - bottom) / (top - bottom):.1f}")
            parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>')
            parts.append(f'<text x="690" y="{60 + 20 * place}" fill="{colour}">{name}</text>')
    return "".join(parts) + "</svg>\n"


def curve_svg() -> str:
    """Return the picture of the kept cpu run: training loss over the clock, final score beside xz."""
    result, events = kept_run("cpu")
    points = [(e["train_time_ms"] / 1000, e["train_loss"]) for e in events if e["event"] == "train"]
    seconds, top = max(x for x, _ in points), max(y for _, y in points)
    left, width, height, base = 60, 420, 220, 260

    def place(x: float, y: float) -> str:
        return f"{left + width * x / seconds:.1f},{base - height * y / top:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    grid = "".join(
        f'<line x1="{left}" x2="{left + width}" y1="{base - height * y / top:.1f}" '
        f'y2="{base - height * y / top:.1f}" stroke="#ddd"/>'
        f'<text x="{left - 8}" y="{base - height * y / top + 4:.1f}" text-anchor="end">{y}</text>'
        for y in range(0, int(top) + 1, 2)
    )
    ticks = "".join(
        f'<text x="{left + width * x / seconds:.1f}" y="{base + 18}" text-anchor="middle">{x}</text>'
        for x in range(0, int(seconds) + 1, 30)
    )
    bars, largest = "", max(result["val_bpb"], result["xz_bpb"])
    for index, (label, value) in enumerate((("this run", result["val_bpb"]), ("xz -9e", result["xz_bpb"]))):
        x, tall = 560 + 90 * index, height * value / largest * 0.9
        colour = ("#2b6cb0", "#a0aec0")[index]
        bars += f'<rect x="{x}" y="{base - tall:.1f}" width="60" height="{tall:.1f}" fill="{colour}"/>'
        bars += f'<text x="{x + 30}" y="{base + 18}" text-anchor="middle">{label}</text>'
        bars += f'<text x="{x + 30}" y="{base - tall - 6:.1f}" text-anchor="middle">{value:.3f}</text>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 310" font-family="sans-serif" '
        'font-size="12"><rect width="760" height="310" fill="white"/>'
        f'<text x="{left}" y="22" font-size="14">training loss, nats per token</text>'
        f'{grid}{ticks}<text x="{left + width / 2}" y="{base + 38}" text-anchor="middle">seconds</text>'
        f'<polyline points="{line}" fill="none" stroke="#2b6cb0" stroke-width="2"/>'
        '<text x="545" y="22" font-size="14">validation, bits per byte</text>'
        f"{bars}</svg>\n"
    )


BLOCKS = {
    "final line": final_line,
    "settings": settings_table,
    "alternatives": alternatives_table,
    "bench": bench_table,
    "pseudo": pseudo_table,
    "codec": codec_table,
    "streams": streams_table,
    "buckets": buckets_table,
    "growth": growth_table,
    "ablation": ablation_table,
    "curves": curves_table,
    "floor": floor_table,
    "adaptation": adaptation_table,
}


def renewed(text: str) -> str:
    """Return `text` with every marked block made anew."""

    def block(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def outputs() -> dict[Path, str]:
    """Return every file this script writes, with its content."""
    pages = [ROOT / "README.md", RECORDS / "README.md"]
    return {page: renewed(page.read_text()) for page in pages} | {
        RECORDS / "cpu_run.svg": curve_svg(),
        RECORDS / "buckets.svg": buckets_svg(),
        RECORDS / "curves.svg": curves_svg(),
    }


def main(argv: list[str]) -> int:
    """Keep a run if asked to, then write all outputs."""
    if argv[:1] == ["--keep"] and len(argv) == 3:
        target = RECORDS / argv[2]
        target.mkdir(exist_ok=True)
        for name in ("result.json", "metrics.jsonl", "run.log"):
            shutil.copyfile(Path(argv[1]) / name, target / name)
    elif argv:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    for path, content in outputs().items():
        train_gpt.write_atomically(path, content.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
