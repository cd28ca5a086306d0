"""Slow, obvious twins of what train_gpt.py does fast. Written differently on purpose; float64 throughout."""

import itertools
import math

import numpy as np


def newton_schulz(matrix, steps):
    """One matrix at a time, float64, as the Muon write-up states it."""
    x = np.array(matrix, dtype=np.float64)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps).T
    x /= math.sqrt((x * x).sum()) + 1e-7
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x


class MuonTwin:
    """Muon for one matrix."""

    def __init__(self, weight):
        self.weight = np.array(weight, dtype=np.float64)
        self.buffer = np.zeros_like(self.weight)

    def step(self, gradient, lr, momentum, decay, steps):
        gradient = np.array(gradient, dtype=np.float64)
        self.buffer = momentum * self.buffer + gradient
        direction = newton_schulz(gradient + momentum * self.buffer, steps)
        rows, columns = self.weight.shape
        scale = math.sqrt(max(1, rows / columns))
        self.weight = (1 - lr * decay) * self.weight - lr * scale * direction


def attention(q, k, v):
    """Causal attention with one loop per head and position; q (H, T, D), k and v (K, T, D)."""
    heads, length, dim = q.shape
    output = np.zeros_like(q)
    for head in range(heads):
        group = head // (heads // k.shape[0])
        for t in range(length):
            scores = np.array([q[head, t] @ k[group, s] / math.sqrt(dim) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            output[head, t] = sum(w * v[group, s] for s, w in enumerate(weights))
    return output


def rotate(x, base):
    """Rotary embedding of x (T, D) by complex multiplication: channel i pairs with channel i + D / 2."""
    length, dim = x.shape
    half = dim // 2
    numbers = x[:, :half] + 1j * x[:, half:]
    for t in range(length):
        for i in range(half):
            numbers[t, i] *= np.exp(-1j * t * base ** (-2 * i / dim))
    return np.concatenate((numbers.real, numbers.imag), axis=1)


def windows(total, seq_len, stride):
    """Scoring windows by a plain loop: (start, first, stop)."""
    plan, done = [], 0
    while done < total:
        stop = min(total, seq_len if done == 0 else done + stride)
        plan.append((max(0, stop - seq_len), done, stop))
        done = stop
    return plan


def contest_bytes(model, ids):
    """Bytes of ids[1:], counted token by token as the contest does it."""
    count = 0
    for previous, token in itertools.pairwise(ids):
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            continue
        if model.is_byte(token):
            count += 1
            continue
        piece = model.id_to_piece(token)
        marker = model.is_control(previous) or model.is_unknown(previous) or model.is_unused(previous)
        if piece.startswith("\u2581"):
            count += 0 if marker else 1
            piece = piece[1:]
        count += len(piece.encode())
    return count


PSEUDO_PRIMES = [36313, 27191, 51647, 81929, 131071, 174763, 233017]
PSEUDO_FACTS = {  # orders, chunk, floor, center and factor by order, range of alpha and its clip
    "pr864": (
        9,
        65536,
        1e-10,
        {n: 3 - (n - 2) / 4 for n in range(2, 10)},
        {2: 0.3, 3: 0.3, 4: 0.97},
        0.05,
        0.6,
    ),
    "pr890": (9, 32, 1e-30, {9: 2.6, 8: 2.8, 7: 3, 6: 3.2, 5: 3.5, 4: 3.8, 3: 4.2, 2: 4.5}, {}, 0.05, 0.6),
    "pr779": (7, 1048576, 1e-12, dict.fromkeys(range(2, 8), 4.0), {}, 0.05, 0.6),
    "pr810": (
        *(11, 16384, 1e-20),
        {11: 2.5, 10: 2.7, 9: 3, 8: 3, 7: 3, 6: 3.2, 5: 3.5, 4: 3.8, 3: 4.2, 2: 4.5},
        {2: 0.3, 3: 0.45, 4: 1.0, 5: 1.88, 6: 1.88},
        *(0.2, 0.75),
    ),
}


class PseudoTwin:
    """A hashed evaluator with a dictionary per table, one target at a time: `prices`, `totals`."""

    def __init__(self, rule, tokens, logp, entropy, vocab, rows=None, chunk=None, buckets=None):
        self.rule, self.tokens, self.vocab, self.rows = rule, [int(token) for token in tokens], vocab, rows
        self.top, own_chunk, self.floor, self.center, self.factor, self.low, self.high = PSEUDO_FACTS[rule]
        self.buckets, chunk = buckets or 4194304, chunk or own_chunk
        self.context = {n: {} for n in self.center}
        self.full = {n: {} for n in self.center}
        self.prices, self.totals = [], []
        for first in range(1, len(tokens), chunk):
            targets = range(first, min(first + chunk, len(tokens)))
            self.stored = first - 1
            for t in targets:
                self.price(t, float(logp[t - 1]), float(entropy[t - 1]))
            for t in targets:
                for n in self.center:
                    if (keys := self.keys(n, t, self.tokens[t])) is not None:
                        for table, key in zip((self.context[n], self.full[n]), keys, strict=True):
                            table[key] = table.get(key, 0) + 1

    def keys(self, n, t, target):
        """Buckets of order n's context and of context with target; None where it begins before the stream."""
        last = t - 1 if self.rule == "pr890" else t
        if last - (n - 1) < 0:
            return None
        words = self.tokens[last - (n - 1) : last]
        if self.rule == "pr810":
            h = 0
            for word in words:
                h = (h * 265443576 + word) % self.buckets
            return h, (h * 1000003 + target) % self.buckets
        primes = PSEUDO_PRIMES + {"pr890": [299993, 350377], "pr864": [283721, 347237]}.get(self.rule, [])
        h = 0
        for word, prime in zip(words, primes, strict=False):
            h ^= word * prime
        return h % self.buckets, (h ^ (target * primes[n - 1])) % self.buckets

    def match(self, t, target):
        """Return (order, C) that price `target` at t, order 0 for none."""
        for n in sorted(self.center, reverse=True):
            if (keys := self.keys(n, t, target)) is not None:
                count = self.context[n].get(keys[0], 0)
                if count >= 2 and (self.rule != "pr890" or self.full[n].get(keys[1], 0) > 0):
                    return n, count
        return 0, 0

    def alpha(self, n, entropy):
        if n == 0 and self.rule != "pr779":
            return 0.0
        if self.rule == "pr779" and self.stored < 100:
            return 0.0
        share = 1 / (1 + math.exp(-2 * (entropy - self.center.get(n, 4.0))))
        factor = self.factor.get(n, 2.0) if self.factor else 1.0
        return min(factor * (self.low + (self.high - self.low) * share), 0.95 if self.factor else 1.0)

    def ratio(self, n, count, t, target):
        if n == 0:
            return 1 / self.vocab
        return min(self.full[n].get(self.keys(n, t, target)[1], 0), count) / count

    def price(self, t, logp, entropy):
        n, count = self.match(t, self.tokens[t])
        alpha = self.alpha(n, entropy)
        mixed = (1 - alpha) * math.exp(logp) + alpha * self.ratio(n, count, t, self.tokens[t])
        self.prices.append(math.log(max(mixed, self.floor)))
        if self.rows is None:
            total = 1 - alpha + alpha * sum(self.ratio(n, count, t, v) for v in range(self.vocab))
        else:
            total = 0.0
            for v in range(self.vocab):
                n, count = self.match(t, v)
                alpha = self.alpha(n, entropy)
                total += (1 - alpha) * math.exp(self.rows[t - 1][v]) + alpha * self.ratio(n, count, t, v)
        self.totals.append(total)


def pseudo_bincount(tokens, logp, entropy, buckets, chunk):
    """#864's rule in straightforward numpy, one bincount over all buckets a chunk and table: for speed."""
    primes, centers = [*PSEUDO_PRIMES, 283721, 347237], [3 - row / 4 for row in range(8)]
    weights, tokens = [0.3, 0.3, 0.97, 2, 2, 2, 2, 2], tokens.astype(np.int64)
    contexts, fulls = np.zeros((8, buckets), np.int64), np.zeros((8, buckets), np.int64)
    prices = np.exp(logp.astype(np.float64))
    for first in range(1, len(tokens), chunk):
        stop, keys = min(first + chunk, len(tokens)), []
        matched = np.zeros(stop - first, bool)
        for n in range(9, 1, -1):
            t = np.arange(max(first, n - 1), stop)
            hashed = np.zeros(len(t), np.int64)
            for k in range(n - 1):
                hashed ^= tokens[t - (n - 1) + k] * primes[k]
            context, full = hashed & (buckets - 1), (hashed ^ tokens[t] * primes[n - 1]) & (buckets - 1)
            keys.append((n, context, full))
            count = contexts[n - 2][context]
            hit = (count >= 2) & ~matched[t - first]
            t, count = t[hit], count[hit]
            ratio = np.minimum(fulls[n - 2][full[hit]], count) / count
            share = 1 / (1 + np.exp(-2 * (entropy[t - 1].astype(np.float64) - centers[n - 2])))
            alpha = np.clip(weights[n - 2] * (0.05 + 0.55 * share), 0, 0.95)
            prices[t - 1] = (1 - alpha) * prices[t - 1] + alpha * ratio
            matched[t - first] = True
        for n, context, full in keys:
            contexts[n - 2] += np.bincount(context, minlength=buckets)
            fulls[n - 2] += np.bincount(full, minlength=buckets)
    return np.log(np.maximum(prices, 1e-10))
