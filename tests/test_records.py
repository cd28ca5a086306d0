"""What the records' scripts measure and keep. Run alone: pytest tests/test_records.py"""

import json
import math
import statistics
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from text import shard_header

import train_gpt

sys.path.insert(0, str(REPOSITORY / "records"))
import ablation
import bench
import curves
import floor
import reduced

TINY = f"""{reduced.WIDTH} {reduced.SCHEDULE} VOCAB_SIZE=260 NUM_LAYERS=2 NUM_KV_HEADS=2 ITERATIONS=4
    WARMDOWN_ITERS=2 TRAIN_BATCH_TOKENS=1024 EMA_DECAY=0.5"""


def stored(script):
    return json.loads(script.RESULTS.read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like the sample data: random bytes as a shard, the tokenizer of pure bytes."""
    count = 16 * (reduced.HELD_OUT + 1_720)
    tokens = np.random.default_rng(0).integers(4, 260, count).astype("<u2")
    (tmp_path / "mix_train_000000.bin").write_bytes(shard_header(count) + tokens.tobytes())
    (tmp_path / "fineweb_1024_bpe.model").write_text('{"config": {"byte_offset": 4}}')
    monkeypatch.setenv("SAMPLE_DATA", str(tmp_path))
    monkeypatch.setattr(reduced, "SEED_SHIFT", 600)
    return tmp_path


def tiny(seed):
    return train_gpt.Settings.from_env(reduced.variables_of(f"{TINY} SEED={seed}"))


def test_held_out_tokens_are_never_trained_on(folder, monkeypatch):
    """Mark the held-out positions in the shard: no batch of any seed shows a mark, all scored tokens do."""
    path = folder / "mix_train_000000.bin"
    tokens = np.fromfile(path, "<u2", offset=1024) % 100 + 4
    tokens.reshape(16, -1)[:, -reduced.HELD_OUT :] += 100
    path.write_bytes(shard_header(len(tokens)) + tokens.astype("<u2").tobytes())
    for seed in (1, 2, 3):
        dataset = reduced.open_data(folder, tiny(seed))
        assert max(int(dataset.stream.batch(step, 0).max()) for step in range(5)) < 104
        assert len(dataset.val_tokens) == 16 * reduced.HELD_OUT and dataset.val_tokens.min() >= 104
    with pytest.raises(SystemExit, match="held-out"):
        reduced.open_data(folder, tiny(4))


def test_seeds_read_different_tokens_and_parts_the_same(folder):
    batches = [reduced.open_data(folder, tiny(seed)).stream.batch(0, 0) for seed in (1, 2)]
    assert not batches[0].equal(batches[1])
    gated = train_gpt.Settings.from_env(reduced.variables_of(f"{TINY} SEED=1 GATED_ATTN=1"))
    assert reduced.open_data(folder, gated).stream.batch(0, 0).equal(batches[0])


def test_a_stride_takes_every_lane_once(folder):
    """Lanes in another order: all of them, and each at its own place."""
    settings = train_gpt.Settings.from_env(reduced.variables_of(f"{TINY} SEED=2"))
    plain, mixed = (reduced.open_data(folder, settings, stride).stream for stride in (1, 5))
    first = [np.concatenate([stream.batch(step, 0) for step in (0, 1)]) for stream in (plain, mixed)]
    assert not (first[0] == first[1]).all()
    assert (first[0][np.arange(16) * 5 % 16] == first[1]).all()


def test_reduced_training_is_repeatable_and_scores_what_it_exports(folder):
    """Same variables and seed, same loss; random bytes cost about log 256; MTP heads stay out."""
    variables = reduced.variables_of(f"{TINY} MTP_NUM_HEADS=1 QAT_START=scale:0.75 MATRIX_BITS=6")
    trained = reduced.train_reduced(variables, seed=1)
    assert trained.loss(trained.weights) == reduced.train_reduced(variables, 1).loss(trained.weights)
    assert not any(name.startswith("mtp") for name in trained.weights)
    assert abs(trained.loss(trained.weights) - math.log(256)) < 1.0
    assert len(trained.log.values("train", "train_loss")) == 4 and trained.log.values("qat", "step") == [3]
    sizes, losses = zip(*(trained.quantized(matrix_bits=bits) for bits in (5, 8)), strict=True)
    assert sizes[0] < sizes[1] and losses[0] != losses[1]


def test_sample_data_must_be_named(monkeypatch):
    monkeypatch.delenv("SAMPLE_DATA", raising=False)
    with pytest.raises(SystemExit, match="SAMPLE_DATA is not set"):
        reduced.sample_folder()


def test_json_keeps_its_values_and_short_lines(tmp_path):
    content = {"text": "a b", "rows": [{"x": 1.5, "y": True}, {"x": 2}], "list": list(range(20))}
    reduced.write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert len((tmp_path / "x.json").read_text().splitlines()) == 8


def test_difference_is_paired_by_seed():
    """By hand: differences -1, -2, -3; the fourth seed has no partner."""
    results = {"base": {"losses": {"1": 10.0, "2": 20.0, "3": 30.0}}}
    results["part"] = {"losses": {"1": 9.0, "2": 18.0, "3": 27.0, "4": 0.0}}
    mean, error = ablation.difference(results, "part", "base")
    assert mean == -2.0 and error == pytest.approx(1 / math.sqrt(3))


def test_ablation_is_complete():
    """Every part is there with every seed, as the script describes it; of combinations whole ones alone."""
    results = stored(ablation)
    assert results["base"] == " ".join(ablation.BASE.split())
    assert results["variants"].keys() >= {"base", *ablation.PARTS}
    for name, entry in results["variants"].items():
        assert entry["changes"] == ablation.variants()[name]
        assert entry["losses"].keys() == entry["raw"].keys() >= set(map(str, ablation.SEEDS))
    for changes in ablation.variants().values():
        train_gpt.Settings.from_env(reduced.variables_of(f"{ablation.BASE} {changes}"))
    assert len(ablation.SEEDS) >= 3


def test_parts_that_were_combined_help_on_their_own():
    """By more than two standard errors, each of them."""
    results = stored(ablation)["variants"]
    for part in ablation.COMBINED:
        mean, error = ablation.difference(results, part, "base")
        assert mean < -2 * error


def test_floor_has_every_quantizer_with_and_without_training_for_it():
    rows = stored(floor)["rows"]
    found = {(row["bits"], row["floor"], row["qat"], row["seed"]) for row in rows}
    expected = [(*quantizer, qat) for quantizer in floor.QUANTIZERS for qat in (False, True)]
    assert found == {(*key, seed) for key in expected for seed in floor.SEEDS} and len(found) == len(rows)
    train_gpt.Settings.from_env(reduced.variables_of(floor.BASE))


@pytest.mark.parametrize("text", curves.TEXTS)
@pytest.mark.parametrize("recipe", curves.RECIPES)
def test_stored_curves_decrease_over_several_hundred_steps(recipe, text):
    """Smoothed over 50 steps the loss never rises by a tenth of a nat, and ends far below its start."""
    report = stored(curves)
    losses, every = report["texts"][text][recipe]["train_loss"], report["every"]
    assert len(losses) * every >= 300
    smooth = [statistics.mean(losses[at : at + 5]) for at in range(len(losses) - 4)]
    assert max(after - before for before, after in zip(smooth, smooth[5:], strict=False)) < 0.1
    assert smooth[-1] < smooth[0] - 1.0
    assert report["changes"] == " ".join(curves.CHANGES.split()) and report["stride"] == curves.STRIDE
    settings = train_gpt.Settings.from_env(curves.variables_of(recipe, text))
    assert settings.iterations == len(losses) * every


@pytest.mark.parametrize("on_gpu", [False, True])
def test_bench_has_a_batch_for_every_recipe(on_gpu):
    assert {"baseline", "cpu", *curves.RECIPES} <= set(bench.RECIPES)
    for recipe in bench.RECIPES:
        settings = bench.recipe_settings(recipe, on_gpu)
        if on_gpu:
            assert (settings.train_batch_tokens, settings.train_seq_len) == (98_304, 2_048)
            assert settings.micro_batch_slots == 1
        else:
            assert settings.train_batch_tokens <= 4_096


def test_bench_figures_of_a_small_model(process):
    """Quantization-aware training and the gate's oracle are part of what is measured."""
    variables = {"RECIPE": "smoke", "QAT_START": "step0", "PSEUDO": "pr834", "GATE_HEAD": "1"}
    figures = bench.bench_steps(train_gpt.Settings.from_env(variables), process)
    assert all(isinstance(value, int | float) and value > 0 for value in figures.values())
    assert figures["optimizer_share"] < 1 and figures["batch_tokens"] == 512
    seconds = figures["batch_tokens"] / figures["train_tokens_per_second"]
    assert figures["step_ms"] == pytest.approx(1000 * seconds)
