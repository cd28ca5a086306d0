"""AUDIT: a score is a code length, or the run fails and says why. Run alone: pytest tests/test_12_audit.py

Saboteurs are scorers that went wrong as public ones did. Each changes one stage of the real pipeline, where
it can in the fast and the slow path alike, so that comparing the two is not what gives it away.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import text
import torch
from conftest import REPOSITORY, make_documents, metrics_of, result_of
from test_03_data import write_shard
from test_09_counts import random_tokens, settings_for
from test_10_mixture import counted_itself, neural_rows, stream_of

import train_gpt
from train_gpt import (
    GPT,
    AuditError,
    Gate,
    NeuralSteps,
    RangeDecoder,
    RangeEncoder,
    Score,
    Scorer,
    Settings,
    SlowCache,
    Tokenizer,
    frequencies,
    main,
    mix_prices,
    plan_chunks,
    recall,
)

EVERYTHING = {
    "BIGRAM_VOCAB_SIZE": "50",
    "SMEAR_GATE": "half",
    "VE_LAYERS": "1,2",
    "VALUE_RESIDUAL": "1",
    "GATED_ATTN": "1",
    "DTG_ENABLED": "1",
    "XSA_LAST_N": "2",
    "ROPE_DIMS": "4",
    "ROPE_NTK_LENGTH": "8",
    "LN_SCALE": "norm",
    "MLP_ACTIVATION": "leaky2",
    "TIE_EMBEDDINGS": "0",
}
VARIANTS = {
    "plain": {},
    "xor": EVERYTHING,
    "linear": {**EVERYTHING, "BIGRAM_HASH": "linear", "UNET_LONGER_HALF": "encoder", "LN_SCALE": "branch"},
    "enriched": {**EVERYTHING, "PRE_ENRICH_DIM": "24", "SMEAR_GATE": "twentieth", "LOGIT_SOFTCAP": "0"},
    "longer window": {**EVERYTHING, "TRAIN_SEQ_LEN": "8", "EVAL_SEQ_LEN": "16"},
    "stride is the window": {**EVERYTHING, "EVAL_STRIDE": "16"},
}


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_neural_steps_equal_full_passes(name, precision, process):
    """Every position, window moves included, in order and after jumps: the row of a pass over its window."""
    sizes = {"RECIPE": "smoke", "VOCAB_SIZE": "40", "TRAIN_SEQ_LEN": "16", "EVAL_STRIDE": "5"}
    settings = Settings.from_env({**sizes, "VAL_BATCH_SIZE": "256", **VARIANTS[name]})
    torch.manual_seed(0)
    model = GPT(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = random_tokens(40, 40, seed=3).numpy()
    steps = NeuralSteps(model.to(precision), settings, process)
    steps.memory = steps.memory.to(precision)
    # In float32 the sums over channels come in another order for one position than for all; in float64 what
    # is left is the rounding of the logits, which are float32 in any case.
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-6}[precision]
    plan = reference.windows(len(tokens) - 1, 16, settings.eval_stride)
    for target in [*range(len(tokens) - 1), 7, 30, 31, 2]:
        start = next(start for start, _, stop in plan if target < stop)
        ids = torch.tensor(tokens[start : target + 1].astype(np.int64))[None]
        padded = torch.nn.functional.pad(ids, (0, 16 - ids.size(1)))
        with torch.no_grad():
            logits = model.logits(padded)[0, ids.size(1) - 1]
        row = steps.row(tokens[: target + 1])
        assert np.exp(row).sum() == pytest.approx(1.0, abs=1e-12)
        assert np.abs(row - logits.double().log_softmax(0).numpy()).max() < tolerance, target


def marked(length):
    """Short documents of few words: markers everywhere."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 4, (length,), generator=generator)


STREAMS = {
    "random": (12, random_tokens(12, 200).long()),
    "one letter": (16, torch.full((330,), 7)),
    "all distinct": (200, torch.arange(200)),
    "markers": (5, marked(300)),
    "shorter than a context": (12, torch.tensor([5, 3, 5, 3])),
    "one token": (12, torch.tensor([5])),
    "two letters": (4, torch.arange(260) % 3),
    "bytes": (260, random_tokens(260, 150).long()),
    "large vocabulary": (5_000, random_tokens(5_000, 60).long()),
}


def prepared(vocab_size, tokens):
    """Return what a run would have at hand: settings, neural rows, prices, entropies, prices of proposals."""
    settings = settings_for(vocab_size, cache_max_order=8, cache_chunk_tokens=96)
    rows = neural_rows(tokens, vocab_size)
    proposals = recall(tokens, settings).proposals.numpy()
    proposed = np.zeros(proposals.shape)
    for family, expected in enumerate(proposals):
        for place, token in enumerate(expected.tolist()):
            proposed[family, place] = rows[place, token] if token < vocab_size else 0.0
    return settings, rows, *stream_of(tokens, rows), torch.tensor(proposed, dtype=torch.float32)


def mixed(tokens, settings, streams, total):
    """Return the fast path's mixture of the first `total` targets."""
    head = tokens[: total + 1]
    return mix_prices(head, recall(head, settings), *(stream[..., :total] for stream in streams), settings)


@pytest.mark.parametrize("name", STREAMS)
def test_slow_cache_equals_the_fast_path_and_the_reference(name):
    vocab_size, tokens = STREAMS[name]
    settings, rows, *streams = prepared(vocab_size, tokens)
    fast, past = mixed(tokens, settings, streams, len(rows)).logp, tokens.numpy()
    slow = SlowCache(past[:1], streams[0][:0], mixed(tokens, settings, streams, 0), settings)
    orders, sizes = (2, 3, 4, 5, 6, 8), (settings.cache_hidden, 2, settings.cache_lr, 96)
    proposers = ("order2", "order3", "order4", "order6", "document2")
    twin = reference.SlowMixture(vocab_size, orders, 4, *sizes, proposers)
    twin.reveal(int(past[0]), 0.0)
    for place, row in enumerate(rows):
        got = slow.predict(past[: place + 1], row)
        assert got.sum() == pytest.approx(1.0, abs=1e-9) and got.min() > 0
        target = int(past[place + 1])
        assert math.log(got[target]) == pytest.approx(float(fast[place]), abs=1e-5), place
        if vocab_size < train_gpt.EMBED_ROWS:  # the reference's token table does not wrap around
            expected = twin.row(row, -float((np.exp(row) * row).sum()))
            assert np.abs(got - expected).max() < 1e-9, place
            twin.reveal(target, row[target])


@pytest.mark.parametrize("name", ["random", "one letter", "markers", "bytes"])
def test_a_prefix_counted_when_asked_for_equals_one_counted_from_the_start(name):
    """A slow cache that starts at a chunk of the gate knows what the one that saw everything knows."""
    vocab_size, tokens = STREAMS[name]
    settings, rows, *streams = prepared(vocab_size, tokens)
    past = tokens.numpy()
    begins = [chunk.start for chunk in plan_chunks(len(rows), 96)]
    assert len(begins) > 3
    whole = SlowCache(past[:1], streams[0][:0], mixed(tokens, settings, streams, 0), settings)
    late, compared = None, 0
    for place, row in enumerate(rows):
        if place == begins[-2]:
            mixture = mixed(tokens, settings, streams, place)
            late = SlowCache(past[: place + 1], streams[0][:place], mixture, settings)
        expected = whole.predict(past[: place + 1], row)
        if late:
            got = late.predict(past[: place + 1], row)
            assert np.abs(np.log(got) - np.log(expected)).max() < 1e-5, place
            ours, theirs = (list(map(vars, cache.now[1])) for cache in (late, whole))
            assert ours == theirs, place
            compared += 1
    assert compared > 60


def coded(rows, tokens):
    """Return the bytes of tokens after distributions, and what a decoder makes of them."""
    encoder = RangeEncoder()
    for row, token in zip(rows, tokens, strict=True):
        encoder.encode(frequencies(row), token)
    data = encoder.finish()
    decoder = RangeDecoder(data)
    return data, [decoder.decode(frequencies(row)) for row in rows]


@pytest.mark.parametrize(("vocab_size", "sharpness"), [(2, 1), (2, 30), (16, 3), (300, 1), (300, 20), (1, 1)])
def test_coder_is_as_short_as_constrictions_and_the_ideal(vocab_size, sharpness):
    constriction = pytest.importorskip("constriction")
    random = np.random.default_rng(0)
    logits = sharpness * random.normal(size=(3_000, vocab_size))
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    rows /= rows.sum(axis=1, keepdims=True)
    tokens = (random.random((3_000, 1)) > rows.cumsum(axis=1)[:, :-1]).sum(axis=1)
    data, back = coded(rows, tokens.tolist())
    assert back == tokens.tolist()
    ideal = -np.log2(rows[np.arange(3_000), tokens]).sum()
    assert abs(8 * len(data) - ideal) <= 0.0005 * ideal + 128
    if vocab_size > 1:
        referee, family = constriction.stream.queue.RangeEncoder(), constriction.stream.model.Categorical
        referee.encode(tokens.astype(np.int32), family(perfect=False), rows.astype(np.float32))
        assert abs(8 * len(data) - referee.num_bits()) <= 0.0005 * ideal + 128


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_carry_runs_through_hundreds_of_bytes(last):
    """Intervals around one half keep the coder in doubt: 7f ff ff ... until the last token decides."""
    encoder, point, rows = RangeEncoder(), 2**63, []
    for _ in range(400):
        unit = encoder.range // 2**24
        first, width = max(point // unit - 500, 1), 1_000
        rows.append(np.array([first, width, 2**24 - first - width]))
        done = encoder.bytes
        encoder.encode(rows[-1], 1)
        point = (point - unit * first) << 8 * (encoder.bytes - done)
    assert b"\xff" * 500 in encoder.finish()
    rows.append(np.full(3, 2**24 // 3))
    encoder.encode(rows[-1], last)
    data = encoder.finish()
    assert (b"\0" * 500 in data) == (last == 2)
    decoder = RangeDecoder(data)
    assert [decoder.decode(row) for row in rows] == [1] * 400 + [last]


@pytest.mark.parametrize("vocab_size", [1, 2, 257, 1_024, 65_536])
def test_frequencies_are_whole_positive_and_fit(vocab_size):
    random = np.random.default_rng(1)
    rows = [np.full(vocab_size, 1 / vocab_size), *np.eye(2, vocab_size)[: min(vocab_size, 2)]]
    rows += [random.dirichlet(np.full(vocab_size, scale)) for scale in (0.001, 1.0, 100.0)]
    for row in rows:
        counts = frequencies(row)
        assert counts.dtype == np.int64 and counts.shape == row.shape
        assert counts.min() >= 1 and counts.sum() <= 2**24
        assert np.abs(counts / 2**24 - row).max() <= (vocab_size + 1) / 2**24
        assert (counts == frequencies(row.copy())).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_frequencies_of_what_is_no_distribution_are_refused(value):
    with pytest.raises(AuditError, match="negative, infinite or no number"):
        frequencies(np.array([0.5, value]))


def test_damaged_bytes_decode_to_something_and_never_hang():
    rows = np.random.default_rng(2).dirichlet(np.ones(30), 200)
    data, _ = coded(rows, [3] * 200)
    for damaged in (b"", data[:7], data[:40], bytes(255 - byte for byte in data), b"\xff" * 300):
        decoder = RangeDecoder(damaged)
        assert all(0 <= decoder.decode(frequencies(row)) < 30 for row in rows)


# Runs with AUDIT=1 on a few hundred tokens that byte pieces and a second document are part of.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with datasets and artifacts of runs with AUDIT=0.

    "pieces": pieces that may span spaces, with a manifest; "bytes": pure bytes; "words": pieces that are at
    most a word and no manifest, as published shards are."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "corpus").mkdir()
    for index, document in enumerate(make_documents(120, words=56)):
        (folder / "corpus" / f"{index:03d}.txt").write_bytes(
            document + f"\u2603 {chr(0x4E00 + index)}".encode()
        )
    (folder / "bytes.json").write_text('{"config": {"byte_offset": 4}}')
    words, markers = make_documents(40, words=56), {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    train = train_gpt.sentencepiece.SentencePieceTrainer.train
    options = {"vocab_size": 360, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2, **markers}
    options |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    lines = iter(" ".join(document.decode().split()) for document in words)
    train(sentence_iterator=lines, model_prefix=str(folder / "words"), **options)
    tokenizers = {"pieces": ["--vocab-size", "384"], "bytes": ["--tokenizer", str(folder / "bytes.json")]}
    tokenizers["words"] = ["--tokenizer", str(folder / "words.model")]
    for name, options in tokenizers.items():
        assert text.main([str(folder / "corpus"), "--output", str(folder / name), *options]) == 0
    (folder / "words" / "manifest.json").unlink()
    for name, run in (("pieces", "trained"), ("words", "published")):
        assert main({**variables(folder, name), "AUDIT": "0", "RUN_DIR": str(folder / run)}) == 0
    return folder


def variables(world, name="pieces"):
    """Variables of a training run on one of the datasets."""
    (tokenizer,) = (world / name).glob("tokenizer.*")
    sizes = {"RECIPE": "smoke", "NUM_LAYERS": "2", "EVAL_STRIDE": "24", "VAL_LOSS_EVERY": "0"}
    sizes["CACHE_CHUNK_TOKENS"] = "64"  # the slow path starts where a chunk does: few targets to walk
    sizes["VOCAB_SIZE"] = str(len(Tokenizer.load(tokenizer).pieces))
    return {**sizes, "DATA_PATH": str(world / name), "TOKENIZER_PATH": str(tokenizer)}


@pytest.fixture
def small_spans(monkeypatch):
    """As few targets as show what is to be shown: the late span still crosses an update of the gate."""
    for name, value in (("HEAD_TARGETS", 24), ("LATE_TARGETS", 32), ("AUDIT_SPREAD", 1)):
        monkeypatch.setattr(train_gpt, name, value)


@pytest.fixture
def training(world, tmp_path, small_spans):
    """Variables of a run that trains."""
    return {**variables(world), "RUN_DIR": str(tmp_path / "run")}


@pytest.fixture
def scoring(training, world):
    """Variables of a run that scores the artifact at hand."""
    return {**training, "EVAL_ONLY": str(world / "trained" / "artifact.bin")}


def report_of(env):
    """Return audit.json of the run that `env` asked for, as any reader of JSON takes it."""
    text = (Path(env["RUN_DIR"]) / "audit.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def last_stage(patch, weigh):
    """Add a stage behind the mixture, in both paths: probabilities become weight * probability + share.

    `weigh(settings, ids, at, candidates)` returns weight and share of the targets `at`, share's first column
    for the realised ones, the next ones for the tokens 0 ... candidates - 1."""
    score, predict = Scorer.score, Scorer.predict

    def cheat_score(self, tokens, table=None, beside=0):
        scored = score(self, tokens, table, beside)
        ids = torch.from_numpy(tokens.astype(np.int32))
        if len(ids) == 1:
            return scored
        weight, share = weigh(self.settings, ids, torch.arange(len(ids) - 1), 0)
        prices = weight[:, 0] * scored.mixture.logp.double().exp() + share[:, 0]
        return scored._replace(mixture=scored.mixture._replace(logp=prices.log().float()))

    def cheat_predict(self, past):
        row = predict(self, past)
        ids = torch.from_numpy(np.append(past, 0).astype(np.int32))
        weight, share = weigh(self.settings, ids, torch.tensor([len(past) - 1]), len(row))
        return (weight.expand_as(share) * torch.from_numpy(np.append(0.0, row)) + share)[0, 1:].numpy()

    patch.setattr(Scorer, "score", cheat_score)
    patch.setattr(Scorer, "predict", cheat_predict)


def hashed(rule, buckets):
    """A pull request's hashed tables, by section 11's code."""

    def weigh(settings, ids, at, candidates):
        sizes = {"ngram_buckets": buckets, "ngram_chunk_tokens": 32, "pseudo": rule}
        settings, entropy = dataclasses.replace(settings, **sizes), np.full(len(ids) - 1, 3.0)
        return train_gpt.pseudo_mixture(rule, ids, entropy, settings, None, at, candidates > 0)

    return lambda patch, env: last_stage(patch, weigh)


def order_by_target(patch, env):
    """Backoff of #890: the highest order whose hashed table has the target, target by target."""

    def weigh(settings, ids, at, candidates):
        rule = train_gpt.pseudo_rule("pr890", dataclasses.replace(settings, ngram_buckets=2**13))
        contexts, pairs = train_gpt.pseudo_keys(rule, ids)
        asked, wanted, seen = contexts[:, at, None], pairs[:, at, None], at // 32 * 32
        if candidates:
            every = torch.arange(candidates, dtype=torch.int32)[None]
            wanted = torch.cat((wanted, train_gpt.pseudo_pairs(rule, asked, every)), dim=2)
        full = train_gpt.pseudo_counts(pairs, seen, wanted, rule.buckets)
        context = train_gpt.pseudo_counts(contexts, seen, asked, rule.buckets).expand_as(full)
        places = torch.arange(1, rule.max_order)[:, None, None]
        level = (((context >= 2) & (full > 0)) * places).amax(dim=0)
        row = (level - 1).clamp(min=0)[None]
        context, full = context.gather(0, row)[0], full.gather(0, row)[0]
        alpha = torch.where(level > 0, 0.4, 0.0).double()
        return 1 - alpha, alpha * torch.minimum(full, context) / context.clamp(min=1)

    last_stage(patch, weigh)


def gate_that_reads_the_target(patch, env):
    """Instead of trusting whichever was ahead so far, take whichever is better for this target."""
    predict = SlowCache.predict

    def cheat_predict(self, past, row):
        predict(self, past, row)
        return np.maximum(np.exp(row), self.now[3])

    patch.setattr(train_gpt, "never_worse", lambda logp, gated: torch.maximum(logp.double(), gated).float())
    patch.setattr(SlowCache, "predict", cheat_predict)


def cache_with_the_target(patch, env):
    """Counts include the token that is priced; the slow path cannot do the same, it does not have it."""
    patch.setattr(train_gpt, "count_line", counted_itself(train_gpt.count_line))


def cache_with_every_target(patch, env):
    """The same where both paths do it: every candidate is counted before it is priced."""

    def weigh(settings, ids, at, candidates):
        counts = train_gpt.exact_counts(ids, 3, settings.vocab_size)
        context = counts.context[at, None].double()
        full, tokens = counts.full[at, None], ids.tolist()
        if candidates:
            later = zip(tokens, tokens[1:], tokens[2:-1], strict=False)
            found = [third for *pair, third in later if pair == tokens[-3:-1]]
            known = torch.bincount(torch.tensor(found, dtype=torch.int64), minlength=candidates)
            full = torch.cat((full, known[None]), dim=1)
        return torch.full_like(context, 0.7), 0.3 * (full + 1) / (context + 1)

    last_stage(patch, weigh)


def chunk_updated_first(patch, env):
    """The gate learns from a chunk, then prices it."""
    forward, learn = Gate.forward, Gate.learn

    def eager(self, chunk):
        self.forward = lambda chunk: forward(self, chunk)
        learn(self, chunk, forward(self, chunk))
        del self.forward
        return forward(self, chunk)

    patch.setattr(Gate, "forward", eager)
    patch.setattr(Gate, "learn", lambda *_: None)


def two_passes(patch, env):
    """The cache is filled with the whole stream, then the stream is scored with it."""
    recall = train_gpt.recall

    def cheat(tokens, settings):
        families, proposals = recall(torch.cat((tokens, tokens)), settings)
        first = len(tokens)
        parts = {name: [values[..., first:] for values in family] for name, family in families.items()}
        return train_gpt.Recall(parts, proposals[:, first:])

    patch.setattr(train_gpt, "recall", cheat)


def unchecked_account(times, logp, target_bytes):
    """An evaluator's sums without the check: nats and tokens of whatever was priced."""
    nats, prices, size = -float(logp.double().sum()), int(times.sum()), int(target_bytes.sum())
    return Score(nats / prices, nats / math.log(2) / size, prices, size)


def planned(change):
    """Another plan of windows."""

    def cheat(patch, env):
        plan_windows = train_gpt.plan_windows
        patch.setattr(train_gpt, "plan_windows", lambda *sizes: change(plan_windows(*sizes)))

    return cheat


def without_first_targets(plan):
    plan[:1, 1] += 5
    return plan


last_window_twice = planned(lambda plan: np.concatenate((plan, plan[-1:])))
first_window_partly = planned(without_first_targets)


def unchecked(saboteur):
    """The saboteur with the account's own check off."""

    def cheat(patch, env):
        saboteur(patch, env)
        patch.setattr(train_gpt, "account", unchecked_account)

    return cheat


def bytes_by(extra):
    """Other bytes of some targets, whatever the manifest states."""

    def cheat(patch, env):
        target_bytes, read_manifest = Tokenizer.target_bytes, train_gpt.read_manifest
        stated = json.loads((Path(env["DATA_PATH"]) / "manifest.json").read_text())["splits"]["val"]["bytes"]

        def counted(self, tokens, exact):
            return target_bytes(self, tokens, exact) + extra(self, tokens[1:])

        patch.setattr(Tokenizer, "target_bytes", counted)
        patch.setattr(train_gpt, "read_manifest", lambda path, hashes, _: read_manifest(path, hashes, stated))

    return cheat


def space_twice(tokenizer, targets):
    return np.array([piece.startswith(b" ") for piece in tokenizer.pieces])[targets]


def three_bytes(tokenizer, targets):
    return 2 * np.isin(targets, list(tokenizer.byte_ids.values()))


def sentinels_as_text(tokenizer, targets):
    return len("<s>") * (targets == train_gpt.MARKER_ID)


def trained_on_the_chunk_first(patch, env):
    """Test-time training in the wrong order: a step on eight windows, then their price."""
    score_windows = train_gpt.score_windows

    def cheat(logits, tokens, plan, settings, process, label):
        model = getattr(logits, "__self__", None)
        kept = {name: weight.clone() for name, weight in model.state_dict().items()} if model else {}
        for begin in range(0, len(plan), 8):
            part = plan[begin : begin + 8]
            ids = tokens[part[0, 1] : part[-1, 2] + 1].astype(np.int64)
            if rows := len(ids) // 33 * bool(model):
                ids = torch.from_numpy(ids[: rows * 33]).view(rows, 33)
                gradients = torch.autograd.grad(model(ids[:, :-1], ids[:, 1:]), list(model.parameters()))
                with torch.no_grad():
                    torch._foreach_add_(list(model.parameters()), gradients, alpha=-0.5)
            yield from score_windows(logits, tokens, part, settings, process, label)
        _ = model and model.load_state_dict(kept)

    patch.setattr(train_gpt, "score_windows", cheat)


LEARNING = {"TTT_LAST_BLOCKS": "1", "TTT_CHUNK_TOKENS": "96", "TTT_LR": "0.01", "POLYAK_DECAY": "0.5"}


def next_chunk_learned_too(patch, env):
    """The real test-time training, one chunk ahead wherever that chunk is at hand."""
    learn = train_gpt.TestTimeTraining.learn

    def cheat(self, tokens, chunk):
        learn(self, tokens, chunk)
        if len(tokens) > (chunk + 2) * self.settings.ttt_chunk_tokens:
            learn(self, tokens, chunk + 1)

    patch.setattr(train_gpt.TestTimeTraining, "learn", cheat)
    env |= LEARNING


def sums_to_102_percent(patch, env):
    """Two experts whose weights add up to 1.02, in both paths."""
    never_worse, predict = train_gpt.never_worse, SlowCache.predict
    patch.setattr(train_gpt, "never_worse", lambda *prices: never_worse(*prices) + math.log(1.02))
    patch.setattr(SlowCache, "predict", lambda *inputs: 1.02 * predict(*inputs))


def future_normaliser(patch, env):
    """Logits less half their mean over the window, later positions included; each row still sums to 1."""
    capped = GPT.capped

    def cheat(self, x, head):
        logits = capped(self, x, head)
        return logits - 0.5 * logits.mean(dim=1, keepdim=True)

    patch.setattr(GPT, "capped", cheat)


def other_weights(patch, env):
    """The weights before quantization are scored, the artifact holds those after it."""
    choose_weights, evaluate, kept = train_gpt.choose_weights, train_gpt.evaluate, {}

    def keep(*inputs):
        weights, numbers = choose_weights(*inputs)
        kept.update(weights)
        return weights, numbers

    patch.setattr(train_gpt, "choose_weights", keep)
    cheat = lambda artifact, *rest: evaluate(artifact._replace(weights=dict(kept)), *rest)  # noqa: E731
    patch.setattr(train_gpt, "evaluate", cheat)


def chosen_on_validation(patch, env):
    """Of the averages, the one that is best on the text to be scored."""
    choose_weights = train_gpt.choose_weights
    (shard,) = Path(env["DATA_PATH"]).glob("*_val_*.bin")
    tokens = torch.from_numpy(train_gpt.open_shard(shard)[: 4 * 33].astype(np.int32)).view(2, 2, 33)

    def cheat(averages, model, batches, process, log):
        return choose_weights(averages, model, list(tokens), process, log)

    patch.setattr(train_gpt, "choose_weights", cheat)


# Saboteur, the condition that must be broken, whether the slow path has the cheat too.
SABOTEURS = {
    "one-bucket table": (hashed("pr864", 1), "normalised", True),
    "hashed table with target-only weight": (hashed("pr864", 64), "normalised", True),
    "gate that reads the target": (gate_that_reads_the_target, "normalised", True),
    "order chosen by the target": (order_by_target, "normalised", True),
    "cache that includes the token being scored": (cache_with_the_target, "fast is slow", False),
    "the same in both paths": (cache_with_every_target, "normalised", True),
    "chunk updated before it is priced": (chunk_updated_first, "causal", False),
    "two-pass rescoring": (two_passes, "causal", False),
    "last window scored twice": (unchecked(last_window_twice), "coverage", False),
    "first window partly unscored": (unchecked(first_window_partly), "coverage", False),
    "leading space counted twice": (bytes_by(space_twice), "bytes", False),
    "byte fallback counted as three bytes": (bytes_by(three_bytes), "bytes", False),
    "sentinels counted as text": (bytes_by(sentinels_as_text), "bytes", False),
    "test-time training on the chunk before scoring": (trained_on_the_chunk_first, "causal", False),
    "the next chunk learned before it is scored": (next_chunk_learned_too, "causal", False),
    "unnormalised mixture that sums to 1.02": (sums_to_102_percent, "normalised", True),
    "normaliser taken from future positions": (future_normaliser, "causal", False),
    "score of a model other than the artifact": (other_weights, "artifact", False),
    "weights chosen on validation": (chosen_on_validation, "selection", False),
}
TRAIN = {"score of a model other than the artifact", "weights chosen on validation"}


@pytest.mark.parametrize("name", SABOTEURS)
def test_the_audit_names_what_a_saboteur_broke(name, training, scoring, monkeypatch, capsys):
    saboteur, condition, both_paths = SABOTEURS[name]
    env = training if name in TRAIN else scoring
    saboteur(monkeypatch, env)
    assert main(env) == 4
    report, result = report_of(env), result_of(env)
    assert not report["passed"]
    assert condition in report["broken"]
    assert both_paths is False or "fast is slow" not in report["broken"]
    *_, message = capsys.readouterr().err.splitlines()
    assert message == f"error: {result['error']}"
    assert f"{condition} is off by " in message and message.endswith("see audit.json")
    print(name, report["broken"])


def test_validation_text_among_the_training_text_is_named(scoring, world, tmp_path):
    folder = shutil.copytree(world / "pieces", tmp_path / "overlap")
    (train,), (val,) = (folder.glob(f"*_{split}_*.bin") for split in ("train", "val"))
    documents = train_gpt.open_shard(val)
    second = np.flatnonzero(documents == train_gpt.MARKER_ID)[1]
    write_shard(train, np.concatenate((train_gpt.open_shard(train), documents[second:])))
    assert main({**scoring, "DATA_PATH": str(folder)}) == 4
    assert report_of(scoring)["broken"] == ["disjoint"]


def test_an_artifact_altered_after_it_was_scored_is_named(training, monkeypatch):
    """The proof is about the file that is left, whatever was read before."""
    audit_run = train_gpt.audit_run

    def replace(scorer, scored, score, path, dataset, *rest):
        weights = {name: 1.01 * weight for name, weight in scorer.model.state_dict().items()}
        path.write_bytes(train_gpt.pack_artifact(weights, scorer.settings, dataset.tokenizer, True))
        return audit_run(scorer, scored, score, path, dataset, *rest)

    monkeypatch.setattr(train_gpt, "audit_run", replace)
    assert main(training) == 4
    assert {"artifact", "fast is slow"} <= set(report_of(training)["broken"])


@pytest.mark.parametrize("saboteur", [last_window_twice, first_window_partly])
def test_the_account_itself_refuses_such_plans(saboteur, scoring, monkeypatch, capsys):
    saboteur(monkeypatch, scoring)
    assert main(scoring) == 5
    assert "targets were not priced exactly once" in capsys.readouterr().err


HONEST = {
    "other orders": {"CACHE_MAX_ORDER": "6", "CACHE_DOCUMENT_ORDER": "0"},
    "other chunks": {"CACHE_CHUNK_TOKENS": "80", "CACHE_STEPS": "1"},
    "other seed": {"SEED": "5", "AVERAGE": "best", "SWA_EVERY": "1", "SWA_START_SCALE": "2"},
    "no cache": {"NGRAM_CACHE": "none"},
    "closed gate": {"CACHE_LR": "0"},
    "test-time training": LEARNING,
    "test-time training of all queries, no cache": {
        **LEARNING,
        "TTT_LAST_BLOCKS": "2",
        "NGRAM_CACHE": "none",
    },
}


@pytest.mark.parametrize("name", [*HONEST, "pure bytes", "the contest's bytes"])
def test_honest_variants_pass(name, training, scoring, world):
    env = {**(training if name == "other seed" else scoring), **HONEST.get(name, {})}
    if name == "pure bytes":
        env = {**training, **variables(world, "bytes")}
    if name == "the contest's bytes":
        env |= {**variables(world, "words"), "EVAL_ONLY": str(world / "published" / "artifact.bin")}
    assert main(env) == 0
    report = report_of(env)
    assert report["passed"] and report["broken"] == []
    if "TTT_LAST_BLOCKS" in env:
        (event,) = metrics_of(env, "ttt")
        assert 1e-4 < event["largest_change"] < 1
    assert ("selection" in report["conditions"]) == ("EVAL_ONLY" not in env)
    assert ("disjoint" in report["conditions"]) == (name != "the contest's bytes")


def test_the_contests_table_is_no_count_of_bytes_where_pieces_span_spaces(scoring, world, tmp_path):
    """It takes a space inside a piece for the three bytes of U+2581; without a manifest this is found."""
    folder = tmp_path / "published"
    shutil.copytree(world / "pieces", folder, ignore=shutil.ignore_patterns("manifest.json"))
    assert main({**scoring, "DATA_PATH": str(folder)}) == 4
    assert report_of(scoring)["broken"] == ["bytes"]


def test_a_space_behind_a_marker_is_a_byte_of_pure_bytes(world, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(world / "bytes", folder, ignore=shutil.ignore_patterns("manifest.json"))
    (val,) = folder.glob("*_val_*.bin")
    write_shard(val, np.array([1, 4 + 32, 4 + 65, 1, 4 + 32, 4 + 66], dtype=np.uint16))
    dataset = train_gpt.load_dataset(
        Settings.from_env({**variables(world, "bytes"), "DATA_PATH": str(folder)})
    )
    score = Score(1.0, 1.0, 5, int(dataset.target_bytes.sum()))
    assert train_gpt.audit_data(dataset, score, folder) == {"bytes": [0.0, 0.0]}


CONDITIONS = {
    "normalised": 1e-9,
    "fast is slow": 1e-5,
    "decodes": 0.0,
    "coded size": 128.0,
    "causal": 1e-6,
    "prefix": 1e-5,
    "gate closed": 0.0,
    "uniform": 1e-6,
    "coverage": 0.0,
    "ledger": 1e-6,
    "artifact": 0.0,
    "selection": 0.0,
    "disjoint": 0.0,
    "bytes": 0.0,
}


def test_a_passed_audit_leaves_its_measurements_and_a_receipt(training, capsys):
    """The first span of the receipt comes back from artifact and receipt alone."""
    assert main(training) == 0
    folder, report = Path(training["RUN_DIR"]), report_of(training)
    conditions = report["conditions"]
    assert result_of(training)["audit"] == "passed"
    assert f"run_dir:{folder}" in (folder / "run.log").read_text()
    assert {name: entry["tolerance"] for name, entry in conditions.items()} == CONDITIONS
    assert all(0 <= entry["deviation"] <= entry["tolerance"] for entry in conditions.values())
    assert report["seconds"] > 0
    printed = capsys.readouterr().out
    assert all(f"{name} {entry['deviation']:.2g}" in printed for name, entry in conditions.items())
    first, late = report["receipt"]
    data = (folder / "receipt.bin").read_bytes()
    assert len(data) == first["bytes"] + late["bytes"]
    assert (first["first"], first["targets"], late["targets"]) == (0, 24, 32)

    artifact = train_gpt.read_artifact(folder / "artifact.bin")
    settings = Settings.from_env({"RECIPE": "smoke"}, artifact.settings)
    alone = train_gpt.Process(0, 1, torch.device("cpu"))
    scorer = Scorer(train_gpt.load_model(artifact, settings, alone), settings, alone)
    tokens, decoder = [train_gpt.MARKER_ID], RangeDecoder(data[: first["bytes"]])
    for _ in range(first["targets"]):
        tokens.append(decoder.decode(frequencies(scorer.predict(np.array(tokens, dtype=np.uint16)))))

    dataset = train_gpt.load_dataset(Settings.from_env(training))
    assert tokens == dataset.val_tokens[:25].tolist()
    text = dataset.tokenizer.decode(dataset.val_tokens.tolist())
    assert artifact.tokenizer.decode(tokens) == text[: len(artifact.tokenizer.decode(tokens))]
    chunks = plan_chunks(len(dataset.target_bytes), settings.cache_chunk_tokens)
    begins = [chunk.start for chunk in chunks]
    assert any(late["first"] < begin < late["first"] + late["targets"] for begin in begins)
    assert late["first"] >= 2 * len(dataset.target_bytes) // 3 - late["targets"]


def test_a_failed_audit_comes_after_everything_is_saved(training, monkeypatch, capsys):
    sums_to_102_percent(monkeypatch, training)
    assert main(training) == 4
    names = {path.name for path in Path(training["RUN_DIR"]).iterdir()}
    assert names == {"run.log", "metrics.jsonl", "result.json", "artifact.bin", "audit.json", "receipt.bin"}
    result, printed = result_of(training), capsys.readouterr()
    assert result["exit_code"] == 4 and result["val_bpb"] > 0
    assert result["error"].startswith("the score is not proven: normalised is off by 0.02 (at most 1e-09)")
    assert printed.err == f"error: {result['error']}\n"
    assert "audit: normalised is off by 0.02" in printed.out
    assert printed.out.splitlines()[-1].startswith("final val_bpb:")


def test_without_audit_there_is_none_and_no_old_one(scoring, monkeypatch):
    assert main(scoring) == 0
    sums_to_102_percent(monkeypatch, scoring)
    assert main({**scoring, "AUDIT": "0"}) == 0
    assert {path.name for path in Path(scoring["RUN_DIR"]).iterdir()} == {
        "run.log",
        "metrics.jsonl",
        "result.json",
    }


def test_a_run_that_ends_in_numbers_of_no_size_still_leaves_json(scoring, monkeypatch):
    monkeypatch.setattr(train_gpt, "deviation", lambda *_: math.inf)
    assert main(scoring) == 4
    assert report_of(scoring)["conditions"]["causal"]["deviation"] > 1e308


@pytest.mark.parametrize("total", [1, 2, 23, 25, 70])
def test_streams_shorter_than_the_spans_are_proven_too(total, scoring, world, tmp_path):
    folder = shutil.copytree(world / "words", tmp_path / "short")
    (val,) = folder.glob("*_val_*.bin")
    write_shard(val, train_gpt.open_shard(val)[: total + 1].copy())
    env = {**scoring, **variables(world, "words"), "DATA_PATH": str(folder)}
    env["EVAL_ONLY"] = str(world / "published" / "artifact.bin")
    assert main(env) == 0, report_of(env)["broken"]
    assert sum(span["targets"] for span in report_of(env)["receipt"]) <= total


# What somebody else's evaluator recorded.


@pytest.fixture(scope="module")
def evaluator(world):
    """What a scorer says of the validation tokens, as an evaluator of another make would record it."""
    env = {**variables(world), "EVAL_ONLY": str(world / "trained" / "artifact.bin"), "AUDIT": "0"}
    settings = Settings.from_env(env)
    dataset, alone = train_gpt.load_dataset(settings), train_gpt.Process(0, 1, torch.device("cpu"))
    artifact = train_gpt.read_artifact(Path(env["EVAL_ONLY"]))
    scorer = Scorer(train_gpt.load_model(artifact, settings, alone), settings, alone)
    targets = np.array([*range(30), *range(200, 210)])
    tokens, prices = np.array(dataset.val_tokens), scorer.prices(dataset.val_tokens)
    rows = np.log([scorer.predict(tokens[: target + 1]) for target in targets]).astype(np.float32)
    size = dataset.target_bytes
    val_bpb = -float(prices.astype(np.float64).sum()) / math.log(2) / int(size.sum())
    names = ("tokens", "prices", "bytes", "targets", "logp", "val_bpb")
    return dict(zip(names, (tokens, prices, size, targets, rows, np.array(val_bpb)), strict=True))


@pytest.fixture
def recorded(evaluator, training, tmp_path):
    """A function that records the evaluator with changes and audits the file; returns the exit code."""

    def audit(**changes):
        np.savez(tmp_path / "recorded.npz", **{**evaluator, **changes})
        return main({**training, "AUDIT_TARGET": str(tmp_path / "recorded.npz")})

    return audit


def test_a_recorded_evaluator_passes(recorded, training, evaluator, capsys):
    assert recorded() == 0
    report, printed = report_of(training), capsys.readouterr().out
    assert report["passed"] and result_of(training)["audit"] == "passed"
    total = len(evaluator["prices"])
    assert (report["rows"], report["targets"], report["val_bpb"]) == (40, total, float(evaluator["val_bpb"]))
    assert f"40 of {total} prices are held against rows" in printed
    expected = {"normalised", "fast is slow", "decodes", "coded size", "coverage", "ledger", "bytes"}
    assert report["conditions"].keys() == expected
    assert report["conditions"]["normalised"]["tolerance"] == 1e-6
    assert all(f"{name} {entry['deviation']:.2g}" in printed for name, entry in report["conditions"].items())
    assert not (Path(training["RUN_DIR"]) / "artifact.bin").exists()
    assert recorded(logp=evaluator["logp"].astype(np.float64), bytes=evaluator["bytes"].astype(np.int64)) == 0


def test_the_readme_describes_conditions_and_the_recorded_file(evaluator):
    readme = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").split("### The audit")[1].split("## Map")[0]
    )
    assert all(f"`{name}`" in readme for name in [*CONDITIONS, *evaluator])


def bent(values, change, places=slice(None)):
    values = values.copy()
    values[places] = change(values[places])
    return values


RECORDED = {
    "rows that sum to 1.02": ("logp", lambda rows: rows + math.log(1.02), "normalised"),
    "one row that does not": ("logp", lambda rows: bent(rows, lambda row: row + 1e-5, 7), "normalised"),
    "a price that is not the row's": ("prices", lambda p: bent(p, lambda x: x + 0.01, 3), "fast is slow"),
    "a price that is no number": ("prices", lambda p: bent(p, lambda x: x * math.nan, 150), "ledger"),
    "a target without a price": ("prices", lambda p: bent(p, lambda x: x * math.nan, 150), "coverage"),
    "bytes that are none of the text": ("bytes", lambda size: bent(size, lambda x: x + 1, 5), "bytes"),
    "another figure": ("val_bpb", lambda bpb: bpb - 0.001, "ledger"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_false_record_is_refused_by_name(name, recorded, training, evaluator, capsys):
    key, change, condition = RECORDED[name]
    assert recorded(**{key: change(evaluator[key])}) == 4
    assert condition in report_of(training)["broken"]
    assert f"{condition} is off by " in capsys.readouterr().err


UNREADABLE = {
    "missing prices": ({"prices": slice(0, -5)}, "are not"),
    "missing bytes": ({"bytes": slice(0, -5)}, "are not"),
    "no distribution": ({"targets": slice(0, 0), "logp": slice(0, 0)}, "no target"),
    "targets that do not ascend": ({"targets": slice(None, None, -1)}, "do not ascend"),
    "missing rows": ({"logp": slice(0, 20)}, "out of bounds"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_incomplete_record_is_refused(name, recorded, training, evaluator, capsys):
    cuts, words = UNREADABLE[name]
    assert recorded(**{key: evaluator[key][cut] for key, cut in cuts.items()}) == 5
    message = capsys.readouterr().err
    assert message.startswith("error: AUDIT_TARGET=") and message.count("\n") == 1
    assert words in message and "README.md describes it" in message
    assert not (Path(training["RUN_DIR"]) / "audit.json").exists()


def test_unknown_targets_and_tokens_are_refused(recorded, evaluator, capsys):
    assert recorded(targets=bent(evaluator["targets"], lambda _: 10**6, -1)) == 5
    assert recorded(tokens=bent(evaluator["tokens"], lambda _: 5_000, 100)) == 5
    assert recorded(targets=evaluator["targets"] + 0.5) == 5
    assert recorded(prices=np.array([{}] * len(evaluator["prices"]), dtype=object)) == 5
    assert recorded(val_bpb=evaluator["prices"]) == 5
    assert capsys.readouterr().err.count("README.md describes it") == 5


@pytest.mark.parametrize(
    "damage", ["wrong keys", "truncated", "altered", "not an archive", "empty", "absent"]
)
def test_a_damaged_record_is_refused(damage, evaluator, training, tmp_path, capsys):
    path = tmp_path / "recorded.npz"
    names = {"prices": "nats"} if damage == "wrong keys" else {}
    np.savez_compressed(path, **{names.get(name, name): value for name, value in evaluator.items()})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    contents = {"truncated": data[: len(data) // 2], "altered": data, "not an archive": b"text", "empty": b""}
    if damage in contents:
        path.write_bytes(contents[damage])
    if damage == "absent":
        path.unlink()
    assert main({**training, "AUDIT_TARGET": str(path)}) == 5
    message = capsys.readouterr().err
    assert message.startswith(f"error: AUDIT_TARGET={path}: ") and message.count("\n") == 1
    assert result_of(training)["exit_code"] == 5


def test_futures_are_altered_in_every_third_of_the_head():
    """The first of them lies inside the first window, where no later flip shows what happens."""
    seen = []

    def prices(tokens):
        seen.append(tokens)
        return np.zeros(len(tokens) - 1)

    head = np.random.default_rng(1).integers(2, 50, train_gpt.AUDIT_HEAD + 1).astype(np.uint16)
    assert train_gpt.audit_causal(prices, head, 50) == 0
    firsts = [int(np.flatnonzero(altered != head)[0]) - 1 for altered in seen[1:]]
    assert [first * 3 // train_gpt.AUDIT_HEAD for first in firsts] == [0, 1, 2]
    assert all(
        (altered[first + 1 :] != head[first + 1 :]).all()
        for altered, first in zip(seen[1:], firsts, strict=True)
    )
    assert train_gpt.audit_causal(lambda tokens: np.full(len(tokens) - 1, float(tokens[-1])), head, 50) > 0


def test_the_decoder_has_nothing_behind_its_span():
    """A scorer that looks at the array its past is cut from writes what cannot be read again."""
    tokens = np.random.default_rng(0).integers(2, 50, 200).astype(np.uint16)

    def peeks(past):
        row = np.full(50, 0.5 / 50)
        row[(past if past.base is None else past.base)[-1]] += 0.5
        return row

    prices = np.log([peeks(tokens[: target + 1])[tokens[target + 1]] for target in range(199)])
    found, _ = train_gpt.audit_spans(peeks, peeks, tokens, prices, [range(20, 90)])
    assert found["fast is slow"][0] < 1e-12
    assert found["decodes"][0] > 0
