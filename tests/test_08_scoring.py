"""NEURAL SCORING: each target once, one account, learning after it. Alone: pytest tests/test_08_scoring.py"""

import math

import numpy as np
import pytest
import reference
import torch

import train_gpt
from train_gpt import (
    GPT,
    DataError,
    NonFiniteError,
    ScoredChunk,
    Settings,
    account,
    plan_windows,
    score_stream,
)

TOTALS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 97, 128, 1009]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(("seq_len", "stride"), [(8, 8), (8, 3), (8, 1), (16, 7), (1, 1), (2000, 64)])
def test_plan_is_the_plain_loops(total, seq_len, stride):
    plan = plan_windows(total, seq_len, stride)
    assert plan.dtype == np.int64
    assert plan.tolist() == [list(window) for window in reference.windows(total, seq_len, stride)]


@pytest.mark.parametrize("total", TOTALS)
def test_plan_prices_every_target_once_with_full_context(total):
    times = np.zeros(total, int)
    for start, first, stop in plan_windows(total, 16, 5):
        assert 0 <= start <= first < stop <= total
        assert stop - start <= 16
        assert first - start == (11 if first else 0)
        times[first:stop] += 1
    assert (times == 1).all()


def test_what_is_still_to_come_moves_no_window():
    whole = plan_windows(1009, 16, 5)
    for total in TOTALS:
        plan = plan_windows(total, 16, 5)
        assert (plan[:, :2] == whole[: len(plan), :2]).all()


def test_plan_of_the_contests_split_is_quick_and_complete():
    plan = plan_windows(62_021_632, 2048, 64)
    assert len(plan) == 969_057  # as the #779 log has it
    assert (plan[1:, 1] == plan[:-1, 2]).all()
    assert plan[-1, 2] == 62_021_632


def make_model(vocab_size=50, seq_len=16):
    torch.manual_seed(0)
    variables = {"RECIPE": "smoke", "VOCAB_SIZE": str(vocab_size), "TRAIN_SEQ_LEN": str(seq_len)}
    model = GPT(Settings.from_env({**variables, "EVAL_STRIDE": "1"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def priced(logits, tokens, window, stride, batch, process, vocab_size=50):
    """score_stream with `batch` windows of `window` tokens to a pass."""
    size = {
        "TRAIN_SEQ_LEN": str(window),
        "VAL_BATCH_SIZE": str(2 * batch * window),
        "EVAL_STRIDE": str(stride),
    }
    settings = Settings.from_env({"RECIPE": "smoke", "VOCAB_SIZE": str(vocab_size), **size})
    return score_stream(logits, tokens, settings, stride, process, "test")


def collect(stream):
    """Concatenate a stream's chunks in order of position."""
    chunks = list(stream)
    if not chunks:
        return None
    whole = ScoredChunk(*(torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True)))
    order = whole.positions.argsort()
    return ScoredChunk(*(part[..., order] for part in whole))


def one_by_one(model, tokens, seq_len, stride):
    """Price every target in a pass of its own, without padding or batches."""
    prices, entropies = [], []
    for start, first, stop in reference.windows(len(tokens) - 1, seq_len, stride):
        rows = (
            model.logits(torch.tensor(tokens[start:stop].astype(np.int64))[None])[0].double().log_softmax(-1)
        )
        for target in range(first, stop):
            row = rows[target - start].detach()
            prices.append(row[int(tokens[target + 1])].item())
            entropies.append(-(row.exp() * row).sum().item())
    return prices, entropies


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 40, 61])
@pytest.mark.parametrize("stride", [16, 5, 1])
def test_stream_equals_pricing_one_by_one(process, length, stride):
    model = make_model()
    tokens = np.random.default_rng(length).integers(0, 50, length).astype(np.uint16)
    whole = collect(priced(model.logits, tokens, 16, stride, 3, process))
    prices, entropies = one_by_one(model, tokens, 16, stride)
    assert whole.positions.tolist() == list(range(length - 1))
    assert whole.logp.tolist() == pytest.approx(prices, abs=2e-5)
    assert whole.entropy.tolist() == pytest.approx(entropies, abs=2e-5)


def test_stream_of_one_token_is_empty(process):
    assert collect(priced(make_model().logits, np.zeros(1, np.uint16), 16, 4, 3, process)) is None


def test_ranks_share_the_windows_and_change_nothing(process):
    model = make_model()
    tokens = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16)
    whole = collect(priced(model.logits, tokens, 16, 4, 5, process))
    shares = []
    for rank in range(3):
        share = train_gpt.Process(rank, 3, torch.device("cpu"))
        shares += list(priced(model.logits, tokens, 16, 4, 5, share))
    together = collect(shares)
    assert together.positions.equal(whole.positions)
    assert (together.logp - whole.logp).abs().max() < 1e-6


def test_later_tokens_change_no_earlier_price(process):
    model = make_model()
    tokens = np.random.default_rng(1).integers(0, 50, 90).astype(np.uint16)
    before = collect(priced(model.logits, tokens, 16, 4, 5, process)).logp
    for t in (1, 30, 47, 89):
        changed = tokens.copy()
        changed[t:] = (changed[t:] + 7) % 50
        after = collect(priced(model.logits, changed, 16, 4, 5, process)).logp
        assert after[: t - 1].equal(before[: t - 1])
        assert not after[t - 1 :].equal(before[t - 1 :])


def test_uniform_model_scores_exactly_log2_of_the_vocabulary(process):
    """With V = 64 a token costs 6 bits; 3 bytes a token make 2 bits per byte, to the last digit."""

    def uniform(ids, last):
        return torch.zeros(*ids[:, -last:].shape, 64)

    tokens = np.random.default_rng(2).integers(0, 64, 1001).astype(np.uint16)
    chunks = list(priced(uniform, tokens, 32, 8, 4, process, 64))
    for chunk in chunks:
        assert chunk.entropy.tolist() == pytest.approx([math.log(64)] * len(chunk.entropy), rel=1e-6)
    score = account_of(chunks, np.full(1000, 3), process)
    assert score.val_loss == pytest.approx(math.log(64), rel=1e-7)
    assert score.val_bpb == pytest.approx(2.0, rel=1e-7)


def account_of(chunks, sizes, process):
    """Account of a stream's chunks."""
    table = train_gpt.gather_prices(chunks, len(sizes), 0, process)
    return account(table[0], table[1], sizes)


def chunk_of(positions, logp):
    positions, logp = torch.tensor(positions), torch.tensor(logp)
    return ScoredChunk(positions, logp, torch.zeros_like(logp), logp[None][:0])


def test_a_figure_worked_by_hand(process):
    """Probabilities 1/2, 1/8, 1/4 cost 1 + 3 + 2 = 6 bits; over 4 + 0 + 5 = 9 bytes: 2/3 bit per byte."""
    chunks = chunk_of([2], [math.log(1 / 4)]), chunk_of([0, 1], [math.log(1 / 2), math.log(1 / 8)])
    score = account_of(chunks, np.array([4, 0, 5]), process)
    assert score.val_bpb == pytest.approx(2 / 3, rel=1e-7)
    assert score.val_loss == pytest.approx(2 * math.log(2), rel=1e-7)
    assert (score.tokens, score.bytes) == (3, 9)


@pytest.mark.parametrize(
    ("positions", "wrong"), [([0, 1], 1), ([0, 1, 1], 2), ([0, 1, 2, 2], 1), ([0, 1, 2, 0, 1, 2], 3), ([], 3)]
)
def test_account_refuses_targets_not_priced_exactly_once(process, positions, wrong):
    chunks = [chunk_of([position], [-1.0]) for position in positions]
    with pytest.raises(DataError, match=f"^{wrong} of 3 targets were not priced exactly once"):
        account_of(chunks, np.ones(3), process)


def test_account_counts_a_repeat_inside_one_chunk(process):
    with pytest.raises(DataError, match="1 of 2 targets"):
        account_of([chunk_of([0, 0, 1], [-1.0, -1.0, -1.0])], np.ones(2), process)


@pytest.mark.parametrize("bits", [8, 16])
def test_account_is_not_fooled_by_a_counter_that_wraps(process, bits):
    """257 prices of one target look like one to a counter of 8 bits, 65,537 to one of 16."""
    repeats = 2**bits + 1
    with pytest.raises(DataError, match="1 of 2 targets were not priced exactly once"):
        account_of([chunk_of([0] * repeats + [1], [-0.001] * (repeats + 1))], np.ones(2), process)


def test_a_plan_that_skips_or_repeats_is_caught(process, monkeypatch):
    """The two faults of public evaluators: a first window partly unscored, a last window scored again."""
    model, tokens = make_model(), np.arange(50, dtype=np.uint16)
    plan = plan_windows(49, 16, 4)

    def total_with(bad):
        monkeypatch.setattr(train_gpt, "plan_windows", lambda *_: bad)
        return account_of(priced(model.logits, tokens, 16, 4, 5, process), np.ones(49), process)

    total_with(plan)
    skipping = plan.copy()
    skipping[3, 1] += 1
    for bad in (skipping, np.concatenate((plan, plan[-1:]))):
        with pytest.raises(DataError, match="not priced exactly once"):
            total_with(bad)


def test_account_refuses_scores_without_meaning(process):
    with pytest.raises(NonFiniteError, match="nan nats"):
        account_of([chunk_of([0], [float("nan")])], np.ones(1), process)
    with pytest.raises(DataError, match="have no bytes"):
        account_of([chunk_of([0], [-1.0])], np.zeros(1), process)


def test_float64_sums_of_many_small_prices(process):
    """Ten million prices of 0.1 nats in chunks: float32 sums would be off in the fourth digit."""
    price, places = torch.full((1_000_000,), -0.1), torch.arange(10_000_000).split(1_000_000)
    chunks = (ScoredChunk(positions, price, price, price[None][:0]) for positions in places)
    score = account_of(chunks, np.ones(10_000_000, np.int8), process)
    assert score.val_loss == pytest.approx(float(-price[0].double()), rel=1e-12)


# Test-time training: scored, then learned from, chunk by chunk.

ADAPTING = {
    "RECIPE": "smoke",
    "VOCAB_SIZE": "50",
    "TRAIN_SEQ_LEN": "8",
    "EVAL_STRIDE": "3",
    "VAL_BATCH_SIZE": "32",  # two rows a pass
    "TTT_BATCH_SEQS": "3",
    "BIGRAM_VOCAB_SIZE": "20",
    "VE_LAYERS": "1",
    "TTT_LAST_BLOCKS": "1",
    "TTT_CHUNK_TOKENS": "40",
    "TTT_LR": "0.02",
    "SEED": "1",
}
SIZES = np.random.default_rng(9).integers(0, 5, 50)


def sizes_of(tokens):
    """Bytes of tokens but the first, some of them none."""
    return SIZES[tokens[1:]]


def noisy_model(settings):
    """A model whose attention and gates do something."""
    torch.manual_seed(0)
    model = GPT(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adapted(tokens, process, total=None, **changes):
    """Return prices of tokens, their model, and the learner."""
    settings = Settings.from_env(ADAPTING | changes)
    model = noisy_model(settings)
    learner = train_gpt.TestTimeTraining(model, settings, process, sizes_of, total or len(tokens) - 1)
    stream = score_stream(
        model.logits, tokens, settings, settings.eval_stride, process, "test", None, learner
    )
    return collect(stream).logp, model, learner


def text_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 50, length).astype(np.uint16)


VARIED = {
    "one block": {},
    "all blocks": {"TTT_LAST_BLOCKS": "3"},
    "three epochs": {"TTT_EPOCHS": "3"},
    "long steps": {"TTT_BATCH_SEQS": "100"},
    "average": {"POLYAK_DECAY": "0.7", "TTT_EPOCHS": "2"},
    "chunks that rows do not fill": {"TTT_CHUNK_TOKENS": "45"},
    "chunks of one window": {"TTT_CHUNK_TOKENS": "8"},
    "long chunks": {"TTT_CHUNK_TOKENS": "100"},
}


@pytest.mark.parametrize("length", [2, 9, 41, 42, 131])
@pytest.mark.parametrize("name", VARIED)
def test_test_time_training_is_the_slow_twins(process, name, length):
    tokens = text_of(length)
    prices, model, learner = adapted(tokens, process, **VARIED[name])
    settings = learner.settings
    expected = reference.adapted_prices(model.double(), tokens, sizes_of(tokens), settings)
    # Adam divides gradients by their size, so what float32 rounds away shows.
    assert prices.tolist() == pytest.approx(expected, abs=2e-4)
    plain, chunk = one_by_one(model, tokens, 8, 3)[0], settings.ttt_chunk_tokens
    assert prices[:chunk].tolist() == pytest.approx(plain[:chunk], abs=2e-5)
    assert length <= chunk + 3 or np.abs(np.subtract(prices, plain)).max() > 0.01


def test_the_model_comes_back_as_it_was_and_may_be_scored_again(process):
    tokens = text_of(131)
    first, model, learner = adapted(tokens, process, POLYAK_DECAY="0.5")
    assert 0.001 < learner.moved < 1
    kept = noisy_model(learner.settings).state_dict()
    assert all(weight.equal(kept[name]) for name, weight in model.state_dict().items())
    stream = (model.logits, tokens, learner.settings, 3, process, "test", None, learner)
    assert collect(score_stream(*stream)).logp.equal(first)


def test_learners_of_one_model_and_streams_cut_short_change_nothing(process):
    """Each stream starts from the artifact's weights with gradients and moments of its own."""
    tokens = text_of(131)
    expected, model, learner = adapted(tokens, process)
    other = train_gpt.TestTimeTraining(model, learner.settings, process, sizes_of, 130)
    stream = (model.logits, tokens, learner.settings, 3, process, "test", None)
    assert collect(score_stream(*stream, learner)).logp.equal(expected)
    assert collect(score_stream(*stream, other)).logp.equal(expected)
    cut = score_stream(*stream, learner)
    for _ in range(20):
        next(cut)
    cut.close()
    assert not all(live.equal(kept) for live, kept in zip(learner.live, learner.kept, strict=True))
    assert collect(score_stream(*stream, learner)).logp.equal(expected)


def test_only_queries_of_the_last_blocks_and_scales_adapt(process, monkeypatch):
    changed = {}

    def learn(self, tokens, chunk):
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        original(self, tokens, chunk)
        after = self.model.state_dict()
        changed[chunk] = {name for name, weight in before.items() if not weight.equal(after[name])}

    original = train_gpt.TestTimeTraining.learn
    monkeypatch.setattr(train_gpt.TestTimeTraining, "learn", learn)
    adapted(text_of(131), process, TTT_LAST_BLOCKS="2")
    scales = {f"blocks.{block}.{name}_scale" for block in range(3) for name in ("attn", "mlp")}
    scales |= {"bigram.scale", "ve_shared.scale", "ve_layer_scales"}
    expected = scales | {"blocks.1.attn.c_q.weight", "blocks.2.attn.c_q.weight"}
    assert changed == {0: expected, 1: expected, 2: expected}  # of four chunks the last is never learned


def flips(price, tokens, places):
    """Return how far prices of earlier targets move when all tokens behind a target change."""
    before, moved = price(tokens), []
    for target in places:
        altered = tokens.copy()
        altered[target + 1 :] = (altered[target + 1 :] + 7) % 50
        moved.append(float((price(altered) - before)[:target].abs().max()))
    return moved


def test_later_tokens_change_no_earlier_price_of_a_model_that_learns(process, monkeypatch):
    """Bit for bit, wherever the change is: inside a chunk, at its first and its last target."""
    tokens, places = text_of(131), [1, 39, 40, 41, 50, 79, 80, 119, 125]
    price = lambda tokens: adapted(tokens, process, TTT_EPOCHS="2", POLYAK_DECAY="0.5")[0]  # noqa: E731
    assert flips(price, tokens, places) == [0.0] * len(places)

    altered = tokens.copy()
    altered[10] = (altered[10] + 1) % 50
    prices, others = price(tokens), price(altered)
    assert not prices[60:].equal(others[60:])  # but what was learned from changes what comes

    learn = train_gpt.TestTimeTraining.learn
    monkeypatch.setattr(
        train_gpt.TestTimeTraining, "learn", lambda self, tokens, chunk: learn(self, tokens, chunk + 1)
    )
    text = text_of(161)
    assert max(flips(price, text, places)) > 1e-3  # the saboteur: a chunk is learned before it is priced


def test_how_much_is_still_to_come_changes_no_price_once_it_is_stated(process):
    """The rate falls over the chunks of the whole; a stream cut short learns at the same rates."""
    tokens = text_of(131)
    whole = adapted(tokens, process)[0]
    for length in (2, 40, 41, 60, 81, 100):
        part = adapted(tokens[: length + 1], process, total=130)[0]
        assert part.tolist() == pytest.approx(whole[:length].tolist(), abs=1e-6)


def test_a_rate_of_zero_is_no_training(process):
    tokens = text_of(131)
    settings = Settings.from_env(ADAPTING)
    plain = collect(score_stream(noisy_model(settings).logits, tokens, settings, 3, process, "test")).logp
    parts = [adapted(tokens, process, TTT_LR="0")[0], plain]
    assert parts[0].tolist() == pytest.approx(parts[1].tolist(), abs=1e-6)


SWITCHES = {
    "TTT_LAST_BLOCKS": "2",
    "TTT_CHUNK_TOKENS": "32",
    "TTT_LR": "0.01",
    "TTT_EPOCHS": "2",
    "TTT_BATCH_SEQS": "2",
    "POLYAK_DECAY": "0.5",
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_setting_of_test_time_training_acts(process, name):
    tokens = text_of(131)
    assert not adapted(tokens, process)[0].allclose(adapted(tokens, process, **{name: SWITCHES[name]})[0])


@pytest.mark.parametrize(("slots", "batch"), [("1", "8"), ("1", "64"), ("4", "32")])
def test_how_a_step_is_cut_into_passes_changes_nothing(process, slots, batch):
    """An artifact is scored alike on any machine: sizes of passes are no part of the score."""
    tokens, changes = text_of(131), {"MICRO_BATCH_SLOTS": slots, "VAL_BATCH_SIZE": batch}
    assert adapted(tokens, process)[0].allclose(adapted(tokens, process, **changes)[0], atol=1e-4)
