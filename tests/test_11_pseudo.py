"""HASHED PSEUDO-SCORES: five rules, one engine, and their mass. Run alone: pytest tests/test_11_pseudo.py

The figures on FineWeb need SAMPLE_DATA, the folder of the sample shard and its recorded neural stream.
"""

import contextlib
import dataclasses
import math
import types

import numpy as np
import pytest
import reference
import torch
from test_03_data import write_shard

import train_gpt
from train_gpt import (
    PSEUDO_RULES,
    PseudoOracle,
    SettingError,
    Settings,
    TokenStream,
    pseudo_keys,
    pseudo_logits,
    pseudo_mass,
    pseudo_report,
    pseudo_rule,
    pseudo_stream,
    pseudo_totals,
)

RECORDED = [name for name, rule in PSEUDO_RULES.items() if not rule.gated]


def recorded(targets, vocab, seed=0):
    """A stream that repeats itself, and a made-up neural score: tokens, logp, entropy."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocab, targets + 1).astype(np.uint16)
    for _ in range(targets // 40):
        here, there, length = (*generator.integers(0, targets, 2), generator.integers(3, 15))
        tokens[there : there + length] = tokens[here : here + len(tokens[there : there + length])]
    rows = torch.from_numpy(3 * generator.standard_normal((targets, vocab))).log_softmax(dim=1).numpy()
    logp = rows[np.arange(targets), tokens[1:]].astype(np.float32)
    return tokens, logp, -(np.exp(rows) * rows).sum(axis=1).astype(np.float32)


def rule_settings(vocab, buckets=0, chunk=0, **more):
    return Settings(vocab_size=vocab, ngram_buckets=buckets, ngram_chunk_tokens=chunk, **more)


@pytest.mark.parametrize("rule", RECORDED)
@pytest.mark.parametrize("buckets", [1, 2, 64, 2**22])
@pytest.mark.parametrize(("targets", "vocab"), [(0, 5), (1, 5), (2, 5), (17, 3), (211, 5), (307, 40)])
def test_rules_are_the_dictionaries(rule, buckets, targets, vocab):
    """Prices, and sums over the vocabulary at the realised target's order."""
    tokens, logp, entropy = recorded(targets, vocab)
    settings, every = rule_settings(vocab, buckets, chunk=7), np.arange(targets)
    twin = reference.PseudoTwin(rule, tokens, logp, entropy, vocab, 7, buckets)
    assert pseudo_stream(rule, tokens, logp, entropy, settings).numpy() == pytest.approx(
        twin.prices, rel=1e-12
    )
    assert pseudo_totals(rule, tokens, entropy, settings, every).numpy() == pytest.approx(
        twin.totals, rel=1e-12
    )


@pytest.mark.parametrize("rule", RECORDED)
@pytest.mark.parametrize("chunk", [1, 1000, 0])
def test_any_chunk_is_the_dictionaries(rule, chunk):
    """Chunks of one target, of many, and the rule's own."""
    tokens, logp, entropy = recorded(1009, 8, seed=1)
    twin = reference.PseudoTwin(rule, tokens, logp, entropy, 8, chunk, 256)
    settings = rule_settings(8, 256, chunk)
    assert pseudo_stream(rule, tokens, logp, entropy, settings).numpy() == pytest.approx(
        twin.prices, rel=1e-12
    )
    expected = np.mean(twin.totals[9::10])  # targets 10, 20, ..., the first being 1
    assert pseudo_mass(rule, tokens, entropy, settings, 10) == pytest.approx(expected, rel=1e-12)


def test_long_chunks_are_the_bincounts():
    """Chunks long enough for one table at a time."""
    tokens, logp, entropy = recorded(50_021, 300, seed=2)
    prices = reference.pseudo_bincount(tokens, logp, entropy, 2**16, 8192)
    settings = rule_settings(300, 2**16, 8192)
    assert pseudo_stream("pr864", tokens, logp, entropy, settings).numpy() == pytest.approx(prices, rel=1e-12)


def test_blocks_and_samples_change_no_sum(monkeypatch):
    tokens, _, entropy = recorded(500, 30)
    settings, at = rule_settings(30, 1024, 50), np.arange(500)
    for rule in RECORDED:
        whole = pseudo_totals(rule, tokens, entropy, settings, at)
        some = pseudo_totals(rule, tokens, entropy, settings, at[3::7])
        assert some.numpy() == pytest.approx(whole[3::7].numpy(), rel=1e-13)
        monkeypatch.setattr(train_gpt, "PSEUDO_BLOCK", 4000)
        blocks = pseudo_totals(rule, tokens, entropy, settings, at)
        assert blocks.numpy() == pytest.approx(whole.numpy(), rel=1e-13)
        monkeypatch.undo()


@pytest.mark.parametrize("rule", RECORDED)
def test_later_tokens_change_no_earlier_price(rule):
    tokens, logp, entropy = recorded(400, 6)
    settings = rule_settings(6, 2**12, 16)
    before = pseudo_stream(rule, tokens, logp, entropy, settings)
    for t in (1, 33, 250, 400):
        changed = tokens.copy()
        changed[t:] = (changed[t:] + 1) % 6
        after = pseudo_stream(rule, changed, logp, entropy, settings)
        assert after[: t - 1].tolist() == before[: t - 1].tolist()


@pytest.mark.parametrize("rule", RECORDED)
def test_without_collisions_the_mass_is_one(rule):
    """30 different n-grams in 4,194,304 buckets: F sums to C, which is what makes exact counts valid."""
    tokens, _, entropy = recorded(300, 3)
    settings = rule_settings(3, 0, 16, ngram_max_order=3)
    totals = pseudo_totals(rule, tokens, entropy, settings, np.arange(300))
    assert totals.numpy() == pytest.approx(np.ones(300), rel=1e-12)


def test_one_bucket_drives_the_score_to_zero_and_the_mass_to_the_vocabulary():
    tokens, logp, entropy = recorded(20_000, 256, seed=3)
    logp, entropy = np.full_like(logp, -math.log(256)), np.full_like(entropy, math.log(256))
    settings = rule_settings(256, 1, 1024)
    prices = pseudo_stream("pr864", tokens, logp, entropy, settings)[1024:]
    assert -prices.mean() / math.log(2) < 0.1  # bits a token, at least a byte each
    later = np.arange(1024, 20_000, 37)
    assert pseudo_totals("pr864", tokens, entropy, settings, later).mean() > 0.8 * 256


def test_pr810s_step_lets_old_tokens_fade():
    """The multiplier is 8 times an odd number: with 2**22 buckets orders 10 and 11 see what order 9 sees."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, 500))
    rows = pseudo_keys(PSEUDO_RULES["pr810"], tokens)[0][:, 20:]
    assert rows[9].equal(rows[7])
    assert rows[8].equal(rows[7])
    assert not rows[7].equal(rows[6])


@pytest.mark.parametrize(
    ("rule", "changes", "words"),
    [
        ("pr834", {}, ["PSEUDO=pr834", "gate", "choose one of pr864, pr890, pr779, pr810"]),
        ("pr999", {}, ["PSEUDO=pr999", "choose one of"]),
        ("pr890", {"ngram_max_order": 10}, ["NGRAM_MAX_ORDER=10", "pr890's orders, 2 to 9"]),
        ("pr864", {"ngram_max_order": 1}, ["NGRAM_MAX_ORDER=1", "pr864's orders, 2 to 15"]),
    ],
)
def test_what_cannot_be_done_is_refused(rule, changes, words):
    tokens, logp, entropy = recorded(20, 5)
    with pytest.raises(SettingError) as caught:
        pseudo_stream(rule, tokens, logp, entropy, Settings(**changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_setting_of_the_tables_replaces_one_number_of_the_rule():
    own = [field.name for field in dataclasses.fields(Settings) if field.name.startswith("ngram_")]
    own.remove("ngram_cache")
    assert len(own) == 7
    for name in own:
        value = 4 if Settings.__annotations__[name] == "int" else 0.5
        changed = pseudo_rule("pr864", Settings(**{name: value}))
        assert changed == PSEUDO_RULES["pr864"]._replace(**{name.removeprefix("ngram_"): value})
        assert changed != PSEUDO_RULES["pr864"]


def test_rules_are_those_of_the_setting_and_complete():
    field = next(field for field in dataclasses.fields(Settings) if field.name == "pseudo")
    assert set(field.metadata["choices"]) == {"none", *PSEUDO_RULES}
    for name in RECORDED:
        rule = PSEUDO_RULES[name]
        highest = pseudo_rule(name, Settings(ngram_max_order=len(rule.centers)))
        assert len(highest.weights) >= len(highest.centers)
        assert not highest.multipliers or len(highest.multipliers) >= highest.max_order
        tokens, logp, entropy = recorded(60, 4)
        pseudo_stream(name, tokens, logp, entropy, rule_settings(4, 64, 8, ngram_max_order=highest.max_order))


def test_report_shows_the_mass_and_is_no_code_length():
    tokens, logp, entropy = recorded(500, 20)
    settings = rule_settings(20, 16, 50, pseudo="pr890", pseudo_sample=100)
    at, sizes = np.arange(0, 500, 5), np.arange(500) % 3
    line, numbers = pseudo_report(tokens, logp, entropy, sizes, settings)
    twin = reference.PseudoTwin("pr890", tokens, logp, entropy, 20, 50, 16)
    prices, totals = np.array(twin.prices), np.array(twin.totals)[at]
    assert numbers["pseudo_bpb"] == pytest.approx(-prices.sum() / math.log(2) / sizes.sum())
    assert numbers["mass"] == pytest.approx(totals.mean())
    proper = -(prices[at] - np.log(totals)).sum() / math.log(2) / sizes[at].sum()
    assert numbers["renormalized_bpb"] == pytest.approx(proper)
    assert line == (
        f"pseudo pr890: {numbers['pseudo_bpb']:.4f} (not a code length: probabilities sum to "
        f"{numbers['mass']:.4g} on average; after renormalisation {proper:.4f} bpb)"
    )
    assert "val_bpb" not in line + repr(numbers)


def test_sample_is_spread_evenly_and_never_repeats(monkeypatch):
    asked = []
    monkeypatch.setattr(train_gpt, "pseudo_totals", lambda *parts: asked.append(parts[4]) or torch.ones(1))
    for total, count in ((1, 5), (5, 5), (7, 5), (10_297, 2_000)):
        tokens, logp, entropy = recorded(total, 3)
        settings = rule_settings(3, 16, 0, pseudo="pr864", pseudo_sample=count)
        pseudo_report(tokens, logp, entropy, np.ones(total, int), settings)
        at = asked.pop()
        assert len(at) == min(total, count)
        assert len(at) < 2 or (np.diff(at).min() >= 1 and np.ptp(np.diff(at)) <= 1)


@pytest.mark.parametrize("buckets", [1, 16, 2**20])
@pytest.mark.parametrize(
    ("targets", "vocab", "top"), [(0, 5, 0), (1, 5, 0), (2, 5, 0), (409, 11, 0), (200, 4, 3)]
)
def test_the_gate_weighs_all_orders_as_the_loops_do(buckets, targets, vocab, top):
    """Prices and sums of #834's evaluation; the first chunk is neural alone."""
    tokens, logp, entropy = recorded(targets, vocab, seed=4)
    gate = 2 * np.random.default_rng(5).standard_normal((targets, 7)).astype(np.float32)
    settings = rule_settings(vocab, buckets, chunk=50, ngram_max_order=top)
    prices, totals = reference.gated_prices(tokens, logp, gate, vocab, 50, buckets, top or 7)
    got = pseudo_stream("pr834", tokens, logp, entropy, settings, gate)
    assert got.dtype == torch.float64
    assert got.numpy() == pytest.approx(prices, rel=1e-12)
    assert got[:50].numpy() == pytest.approx(logp[:50].astype(np.float64), rel=1e-12)
    got = pseudo_totals("pr834", tokens, entropy, settings, np.arange(targets), beside=torch.from_numpy(gate))
    assert got.numpy() == pytest.approx(totals, rel=1e-12)
    if targets > 50:
        other = pseudo_stream("pr834", tokens, logp, entropy, settings, gate[:, ::-1].copy())
        assert abs(other.numpy() - prices).max() > 0.01  # sabotage: the gate's columns reversed


def test_tensors_and_arrays_give_the_same():
    tokens, logp, entropy = recorded(300, 9)
    gate, settings = np.zeros((300, 7), np.float32), rule_settings(9, 256, 20, pseudo="pr834", gate_head=True)
    tensors = [
        torch.from_numpy(part.astype(np.int64 if part is tokens else part.dtype)) for part in (tokens, logp)
    ]
    arrays = pseudo_stream("pr834", tokens, logp, entropy, settings, gate)
    assert pseudo_stream(
        "pr834", *tensors, torch.from_numpy(entropy), settings, torch.from_numpy(gate)
    ).equal(arrays)
    line, numbers = pseudo_report(tokens, logp, entropy, np.ones(300, np.uint16), settings, beside=gate)
    assert line.startswith("pseudo pr834: ")
    assert numbers["pseudo_bpb"] == pytest.approx(-arrays.mean().item() / math.log(2))
    mass = pseudo_mass("pr834", tokens, entropy, settings, 1, gate)
    assert mass == pytest.approx(numbers["mass"])


def run_model(rule, **more):
    """A small model whose weights matter, as a run with PSEUDO=rule would score it; settings, model."""
    shape = {"RECIPE": "smoke", "VOCAB_SIZE": "40", "TRAIN_SEQ_LEN": "16", "VAL_BATCH_SIZE": "256"}
    shape |= {"PSEUDO": rule, "NGRAM_BUCKETS": "64", "NGRAM_CHUNK_TOKENS": "30", "EVAL_STRIDE": "5", **more}
    settings = Settings.from_env({**shape, "GATE_HEAD": str(int(rule == "pr834"))})
    torch.manual_seed(0)
    model = train_gpt.GPT(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return settings, model


def scored(settings, model, tokens, ranks=1, lost=()):
    """Return what `ranks` ranks but those `lost` hand over: logp, entropy (N,), the rest (N, K)."""
    rule, parts, logits = PSEUDO_RULES[settings.pseudo], [], pseudo_logits(model)
    for rank in set(range(ranks)) - set(lost):
        share = train_gpt.Process(rank, ranks, torch.device("cpu"))
        alone = types.SimpleNamespace(
            rank=rank, world_size=ranks, device=share.device, sum=lambda table: table
        )
        stream = list(train_gpt.score_stream(logits, tokens, settings, 5, share, "test"))
        parts.append(train_gpt.gather_prices(stream, len(tokens) - 1, rule.beside, alone))
    _, logp, entropy, *beside = sum(parts)
    return logp, entropy, torch.stack(beside, dim=1) if beside else None


@pytest.mark.parametrize("rule", PSEUDO_RULES)
def test_one_and_eight_ranks_give_the_same(rule):
    """Each rank scores its windows, all of it is handed over and one rank walks the stream."""
    settings, model = run_model(rule, PRE_ENRICH_DIM="24" if rule == "pr810" else "0")
    tokens = recorded(333, 40, seed=7)[0]
    sizes, found = np.ones(333, np.int64), []
    for ranks, lost in ((1, ()), (8, ()), (8, (5,))):
        logp, entropy, beside = scored(settings, model, tokens, ranks, lost)
        numbers = pseudo_report(tokens, logp, entropy, sizes, settings, beside)[1]
        found.append([numbers[name] for name in ("pseudo_bpb", "mass", "renormalized_bpb")])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] != pytest.approx(found[0], rel=1e-3)  # sabotage: one rank's share is lost on the way


@pytest.mark.parametrize("cheat", [False, True])
def test_pr779s_temperature_is_the_loops(monkeypatch, cheat):
    """Prices and sums at the adaptive temperature of each row; the saboteur leaves the entropy unscaled."""
    settings, model = run_model("pr779", TIED_EMBED_INIT_STD="0.5")
    tokens = recorded(200, 40, seed=8)[0]
    logp, entropy, beside = scored(settings, model, tokens)
    plan, expected = reference.windows(200, 16, 5), np.zeros((2, 200))
    for start, first, stop in plan:
        rows = model.logits(torch.tensor(tokens[start:stop].astype(np.int64))[None])[0].detach().double()
        for t in range(first, stop):
            row, expected[1, t] = reference.cooled_row(rows[t - start].numpy(), 0.98)
            expected[0, t] = row[tokens[t + 1]]
    assert abs(expected[1] - entropy.numpy()).max() > 1e-3  # the temperature acts
    if cheat:
        beside = torch.cat((beside[:, :2], entropy[:, None]), dim=1)
    numbers = pseudo_report(tokens, logp, entropy, np.ones(200, np.int64), settings, beside=beside)[1]
    twin = reference.PseudoTwin("pr779", tokens, *expected, 40, 30, 64)
    want = [-np.mean(twin.prices) / math.log(2), np.mean(twin.totals)]
    got = [numbers["pseudo_bpb"], numbers["mass"]]
    assert (got == pytest.approx(want, rel=1e-5)) is not cheat
    plain = reference.PseudoTwin("pr779", tokens, logp.numpy(), entropy.numpy(), 40, 30, 64)
    recorded_prices = pseudo_stream("pr779", tokens, logp, entropy, settings)
    assert recorded_prices.numpy() == pytest.approx(plain.prices, rel=1e-12)  # recorded: no temperature


@pytest.mark.parametrize("cheat", [None, "whole stream", "reversed"])
def test_pr810s_confidence_is_the_loops(cheat):
    """What pre-enrichment moves, over its maximum in the chunk, in prices and sums alike."""
    more = {"SMEAR_GATE": "twentieth", "BIGRAM_VOCAB_SIZE": "30", "BIGRAM_HASH": "linear"}
    settings, model = run_model("pr810", PRE_ENRICH_DIM="24", **more)
    tokens = recorded(200, 40, seed=9)[0]
    logp, entropy, beside = scored(settings, model, tokens)
    weights = {name: weight.detach().double().numpy() for name, weight in model.named_parameters()}
    moved = np.zeros(200)
    for start, first, stop in reference.windows(200, 16, 5):
        found = reference.moved_by_enrichment(weights, settings, tokens[start:stop].astype(np.int64))
        moved[first:stop] = found[first - start :]
    assert beside[:, 0].numpy() == pytest.approx(moved, rel=1e-4)
    twin = reference.PseudoTwin("pr810", tokens, logp, entropy, 40, 30, 64, moved)
    if cheat == "whole stream":  # every chunk has the stream's maximum at its first target
        beside = beside.clone()
        beside[::30] = beside.max()
    if cheat == "reversed":
        beside = beside.flip(0)
    got = pseudo_stream("pr810", tokens, logp, entropy, settings, beside).numpy()
    totals = pseudo_totals("pr810", tokens, entropy, settings, np.arange(200), beside=beside).numpy()
    assert (got == pytest.approx(twin.prices, rel=1e-4)) is (cheat is None)
    assert (totals == pytest.approx(twin.totals, rel=1e-4)) is (cheat is None)
    without = pseudo_stream("pr810", tokens, logp, entropy, settings)
    nothing = pseudo_stream("pr810", tokens, logp, entropy, settings, torch.zeros(200, 1))
    assert without.equal(nothing)  # a model without pre-enrichment moves nothing: 0.5


def test_what_travels_beside_the_logits_changes_none():
    for rule, described in PSEUDO_RULES.items():
        model = run_model(rule)[1]
        ids = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(1))
        rows = pseudo_logits(model)(ids, 5)
        assert rows.shape == (2, 5, 40 + described.beside) and rows.dtype == torch.float32
        assert rows[..., :40].equal(model.logits(ids, 5))


def oracle_case(folder, monkeypatch):
    """Two shards, blocks of 53 tokens, a batch of two rows; settings and stream."""
    generator = np.random.default_rng(6)
    shards = [generator.integers(0, 9, size).astype(np.uint16) for size in (400, 301)]
    for number, shard in enumerate(shards):
        write_shard(folder / f"x_train_{number}.bin", shard)
    monkeypatch.setattr(train_gpt, "ORACLE_BLOCK", 53)
    more = {"RECIPE": "smoke", "PSEUDO": "pr834", "GATE_HEAD": "1", "NGRAM_BUCKETS": "64", "VOCAB_SIZE": "9"}
    settings = Settings.from_env(more)
    return shards, settings, TokenStream(sorted(folder.glob("*.bin")), settings)


def test_oracle_is_the_dictionary_and_headers_are_no_tokens(tmp_path, process, monkeypatch):
    shards, settings, stream = oracle_case(tmp_path, monkeypatch)
    oracle, batch = PseudoOracle(settings, process), stream.batch(1, 0).long()[:2]
    assert (oracle.ratios(batch[:, :-1], batch[:, 1:]) == -1).all()
    oracle.count(stream)
    got = oracle.ratios(batch[:, :-1], batch[:, 1:])
    want = reference.oracle_ratios(shards, batch.numpy(), 53, 64)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (want[:, 6:] >= 0).mean() > 0.9  # from position n - 1 on order n has a ratio
    assert (want[0] >= 0).argmax(axis=0).tolist() == [1, 2, 3, 4, 5, 6]
    # Bigrams: one for each token but the first of each of 14 blocks, in both kinds of table.
    assert oracle.tables.sum(dim=1)[[0, 6]].tolist() == [701 - 14] * 2
    wrong = reference.oracle_ratios(shards, batch.numpy(), 701, 64)
    assert abs(got.numpy() - wrong).max() > 1e-3  # sabotage: n-grams across blocks


def test_ranks_share_the_blocks_and_hold_the_same_tables(tmp_path, process, monkeypatch):
    _, settings, stream = oracle_case(tmp_path, monkeypatch)
    whole, parts = PseudoOracle(settings, process), []
    whole.count(stream)
    for rank in range(3):
        alone = types.SimpleNamespace(rank=rank, world_size=3, device=process.device, sum=lambda x: x)
        alone.together = contextlib.nullcontext
        parts.append(PseudoOracle(settings, alone))
        parts[-1].count(stream)
        assert 0 < parts[-1].tables.sum() < whole.tables.sum()
    assert sum(part.tables for part in parts).equal(whole.tables)


def test_oracle_says_on_every_rank_which_token_is_bad(tmp_path, process, monkeypatch):
    _, settings, stream = oracle_case(tmp_path, monkeypatch)
    stream.shards[1] = stream.shards[1].copy()
    stream.shards[1][7] = 9
    with pytest.raises(train_gpt.DataError, match="token id 9 is not below VOCAB_SIZE=9"):
        PseudoOracle(settings, process).count(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RECORDED)
def test_gpu_counts_what_the_cpu_counts(rule):
    tokens, logp, entropy = recorded(5000, 50)
    settings, at = rule_settings(50, 2**12, 300), np.arange(0, 5000, 7)
    here = pseudo_stream(rule, tokens, logp, entropy, settings)
    stream = torch.as_tensor(tokens, dtype=torch.int32, device="cuda")
    there = pseudo_stream(rule, stream, logp, entropy, settings)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=0)
    here = pseudo_totals(rule, tokens, entropy, settings, at)
    there = pseudo_totals(rule, stream, entropy, settings, at)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def fineweb(sample_data):
    """Tokens, logp, entropy of the sample of FineWeb, and its bytes."""
    tokens = np.asarray(train_gpt.open_shard(sample_data / "fineweb_val_000000.bin"))
    with np.load(sample_data / "fineweb_val_neural.npz") as stream:
        return tokens, stream["logp"], stream["entropy"], 2_504_867


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        ("pr864", {"ngram_buckets": 4_194_304}, 2.25240),
        ("pr864", {"ngram_buckets": 65_536}, 0.45599),
        ("pr890", {"ngram_buckets": 4_194_304}, 1.95729),
        ("pr779", {"ngram_buckets": 4_194_304, "ngram_chunk_tokens": 65_536}, 2.12509),
    ],
)
def test_figures_on_fineweb(fineweb, rule, changes, expected):
    tokens, logp, entropy, size = fineweb
    prices = pseudo_stream(rule, tokens, logp, entropy, Settings(**changes))
    assert -prices.sum() / math.log(2) / size == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("buckets", "expected"), [(4_194_304, 12.0253), (65_536, 663.466)])
def test_mass_on_fineweb(fineweb, buckets, expected):
    tokens, _, entropy, _ = fineweb
    mass = pseudo_mass("pr864", tokens, entropy, Settings(ngram_buckets=buckets), 50)
    assert mass == pytest.approx(expected, rel=1e-4)


def test_one_bucket_on_fineweb(fineweb):
    tokens, logp, entropy, size = fineweb
    settings = Settings(ngram_buckets=1, ngram_chunk_tokens=1024)
    prices = pseudo_stream("pr864", tokens, logp, entropy, settings)[1024:]
    assert -prices.sum() / math.log(2) / size < 0.1
    later = np.arange(1024, len(prices), 500)
    assert pseudo_totals("pr864", tokens, entropy, settings, later).mean() > 0.8 * 1024
