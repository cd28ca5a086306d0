"""EXACT COUNTS: equal to a dictionary's, blind to what comes. Run alone: pytest tests/test_09_counts.py"""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from train_gpt import SettingError, Settings, count_families, exact_counts, line_up, recall


def settings_for(vocab_size, **more):
    return Settings.from_env(
        {
            "VOCAB_SIZE": str(vocab_size),
            **{k.upper(): str(v) for k, v in more.items()},
        }
    )


def random_tokens(vocab_size, length, seed=0):
    """Random tokens with long repeats, so that every order finds something."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (length,), generator=generator, dtype=torch.int32)
    return torch.cat((tokens, tokens[: length // 2], tokens[length // 4 :]))


def rows_of(counts):
    return [tuple(row) for row in torch.stack(counts).T.tolist()]


STREAMS = {
    "empty": torch.empty(0, dtype=torch.int32),
    "one token": torch.tensor([3], dtype=torch.int32),
    "two tokens": torch.tensor([3, 3]),
    "constant": torch.full((97,), 2),
    "all distinct": torch.arange(101),
    "alternating": torch.arange(60) % 2,
}


@pytest.mark.parametrize("vocab_size", [4, 256, 1024, 8192])
def test_counts_are_a_dictionarys(vocab_size):
    tokens = random_tokens(vocab_size, 211)
    for order in range(2, 13):
        counts = exact_counts(tokens, order, vocab_size)
        assert {column.dtype for column in counts} == {torch.int32}
        assert rows_of(counts) == reference.ngram_counts(tokens.tolist(), order), order


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("order", [2, 3, 7, 12])
def test_awkward_streams(name, order):
    tokens = STREAMS[name]
    counts = exact_counts(tokens, order, 1024)
    assert counts._fields == ("full", "context", "distinct", "last")
    assert all(column.shape == (max(len(tokens) - 1, 0),) for column in counts)
    assert rows_of(counts) == reference.ngram_counts(tokens.tolist(), order)


def test_counts_on_real_text(sample_data):
    tokens = np.fromfile(sample_data / "fineweb_val_000000.bin", "<u2", offset=1024)[:20_000].astype(np.int64)
    for order in range(2, 13):
        counts = exact_counts(torch.from_numpy(tokens), order, 1024)
        assert rows_of(counts) == reference.ngram_counts(tokens.tolist(), order), order


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(2, 9))
def test_any_stream(tokens, order):
    counts = exact_counts(torch.tensor(tokens, dtype=torch.int64), order, 4)
    assert rows_of(counts) == reference.ngram_counts(tokens, order)


def test_two_step_sort_changes_nothing(monkeypatch):
    tokens = random_tokens(300, 500)
    expected = [rows_of(exact_counts(tokens, order, 300)) for order in range(2, 9)]

    def two_steps(group, target):
        return line_up(group + 2**62, target)  # group and place no longer fit one word

    monkeypatch.setattr(train_gpt, "line_up", two_steps)
    assert [rows_of(exact_counts(tokens, order, 300)) for order in range(2, 9)] == expected


def test_no_state_and_no_order_below_2():
    tokens = random_tokens(16, 100)
    first = [rows_of(exact_counts(tokens, order, 16)) for order in (5, 3)]
    assert first[0] != first[1]
    assert [rows_of(exact_counts(tokens, order, 16)) for order in (5, 3)] == first
    for order in (1, 0, -3):
        with pytest.raises(SettingError, match="2 at least"):
            exact_counts(tokens, order, 16)


def test_counts_of_all_targets_add_up_to_the_contexts():
    """What makes the price of the target alone a probability: the sum over v of F(v) is C."""
    tokens = random_tokens(5, 60)
    for place in (10, 61, len(tokens) - 1):
        for order in (2, 3, 5):
            total = 0
            for token in range(5):
                changed = torch.cat((tokens[:place], torch.tensor([token], dtype=torch.int32)))
                counts = exact_counts(changed, order, 5)
                total += int(counts.full[-1])
            assert total == int(counts.context[-1])


def families_of(tokens, settings):
    return {
        name: torch.stack((*counts, hits, age))
        for name, (counts, hits, age) in count_families(tokens, settings)
    }


def test_families_are_those_of_the_dictionary():
    """Every family's counts against the slow mixture's tables, documents included."""
    vocab_size, settings = 12, settings_for(12, cache_max_order=8, cache_document_order=4)
    tokens = random_tokens(vocab_size, 300, seed=3)
    found = families_of(tokens, settings)
    slow = reference.SlowMixture(vocab_size, (2, 3, 4, 5, 6, 8), 4, 2, 1, 0.0, 10**9)
    order = [f"order{n}" for n in (2, 3, 4, 5, 6, 8)]
    names = ["order2", "document2", "order3", "document3", "order4", "document4", *order[3:]]
    assert list(found) == names
    flat = np.full(vocab_size, -np.log(vocab_size))
    for place, token in enumerate(tokens.tolist()):
        if place:
            for name, key in zip(names, slow.contexts(), strict=True):
                history, hits, last_place = slow.tables.get(key, ([], 0, place))
                full, last = history.count(token), history[-1] if history else -1
                expected = [full, len(history), len(set(history)), last, hits, place - last_place]
                assert found[name][:, place - 1].tolist() == expected, (name, place)
            slow.row(flat, 1.0)
        slow.reveal(token, flat[token])


@pytest.mark.parametrize("t", [1, 2, 40, 150, 299])
def test_later_tokens_change_nothing_that_a_weight_may_know(t):
    """Codes and proposals of target t stand before token t; its price and all later ones do not."""
    settings, tokens = settings_for(12, cache_max_order=8), random_tokens(12, 200, seed=5)
    changed = tokens.clone()
    changed[t:] = (changed[t:] + 5) % 12
    before, after = (recall(stream, settings) for stream in (tokens, changed))
    assert before.proposals[:, :t].equal(after.proposals[:, :t])
    for name, (codes, *prices) in before.families.items():
        other_codes, *other_prices = after.families[name]
        assert codes[:, :t].equal(other_codes[:, :t])
        for one, other in zip(prices, other_prices, strict=True):
            assert one[: t - 1].equal(other[: t - 1])


def test_codes_hold_the_largest_split():
    assert train_gpt.CODE_LOG * np.log1p(2**30) < 255


def test_one_context_may_be_most_of_the_stream():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack(
        (torch.zeros(150, dtype=torch.int64), torch.randint(0, 9, (150,), generator=generator))
    )
    tokens = tokens.T.flatten()
    for order in (2, 3, 4):
        counts = exact_counts(tokens, order, 9)
        assert rows_of(counts) == reference.ngram_counts(tokens.tolist(), order), order
