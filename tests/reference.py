"""Slow, obvious twins of what train_gpt.py does fast. Written differently on purpose; float64 throughout."""

import copy
import itertools
import math

import numpy as np
import torch


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

    def step(self, gradient, lr, momentum, decay, steps, order="before"):
        gradient = np.array(gradient, dtype=np.float64)
        self.buffer = momentum * self.buffer + gradient
        direction = newton_schulz(gradient + momentum * self.buffer, steps)
        rows, columns = self.weight.shape
        scale = math.sqrt(max(1, rows / columns))
        if order == "before":
            self.weight = (1 - lr * decay) * self.weight - lr * scale * direction
        else:
            self.weight = (1 - lr * decay) * (self.weight - lr * scale * direction)


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
        plan.append((done + stride - seq_len if done else 0, done, stop))
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


def ngram_counts(tokens, order):
    """Counts of every target by a dictionary of histories: (full, context, distinct, last) each."""
    histories, rows = {}, []
    for place in range(1, len(tokens)):
        if place < order - 1:
            rows.append((0, 0, 0, -1))
            continue
        history = histories.setdefault(tuple(tokens[place - order + 1 : place]), [])
        target = tokens[place]
        rows.append((history.count(target), len(history), len(set(history)), history[-1] if history else -1))
        history.append(target)
    return rows


class SlowMixture:
    """The exact cache token by token: dictionaries, whole distributions, autograd, float64 throughout.

    `row()` is the distribution of the next token, given the neural model's row; then `reveal` the token.
    `proposers`: families whose last continuation's neural price is a feature too, after the longest order's.
    """

    def __init__(self, vocab_size, orders, inside, hidden, steps, rate, chunk, proposers=None):
        self.vocab_size, self.proposers = vocab_size, proposers
        self.orders, self.inside, self.steps, self.chunk = orders, inside, steps, chunk
        self.tables, self.tokens, self.document = {}, [], 0
        self.families = len(orders) + sum(order <= inside for order in orders)
        features = 6 * self.families + 7
        if proposers is not None:
            names = [f"order{n}" for n in orders] + [f"document{n}" for n in orders if n <= inside]
            features += 1 + len(set(names) & set(proposers))
        noise = torch.randn(hidden, features, generator=torch.Generator().manual_seed(0))
        shapes = [(features, hidden), (vocab_size + 1, hidden), (vocab_size + 1, hidden)]
        shapes += [(hidden, 1 + 2 * self.families), (1 + 2 * self.families,)]
        self.parameters = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        self.parameters[0] = (noise / math.sqrt(features)).double().T.contiguous()
        self.parameters[-1][0] = 4.0
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.adam = torch.optim.Adam(self.parameters, lr=rate, betas=(0.9, 0.99), eps=1e-8)
        self.prices, self.lead, self.pending, self.chunk_end = [], 0.0, [], 0

    def contexts(self):
        """Keys of all families for the next token, None where a context is incomplete."""
        keys, tokens = [], self.tokens
        for order in self.orders:
            context = tuple(tokens[len(tokens) - order + 1 :]) if len(tokens) >= order - 1 else None
            keys.append(context and ("order", context))
            if order <= self.inside:
                first = len(tokens) - order + 1
                keys.append(context and ("document", self.document, context) if first >= 0 else None)
        return keys

    def look_up(self, logp_row, entropy):
        """Return features, token rows, evidence and distributions of all experts (experts, V)."""
        features, experts, known, longest, neighbour = [], [], [True], self.vocab_size, -1
        experts.append(np.exp(np.asarray(logp_row, dtype=np.float64)))
        counts, points, proposed = [], [], []
        log = lambda number: round(12 * math.log1p(number)) / 48  # noqa: E731
        kinds = ((kind, n) for n in self.orders for kind in ("order", "document"))
        kinds = [f"{kind}{n}" for kind, n in kinds if kind == "order" or n <= self.inside]
        for key, name in zip(self.contexts(), kinds, strict=True):
            entry = self.tables.get(key)
            if self.proposers is not None and name in self.proposers:
                proposed.append(None if entry is None else entry[0][-1])
            if entry is None:
                features += [0.0] * 6
                counts.append(np.zeros(self.vocab_size))
                points.append(np.zeros(self.vocab_size))
                neighbour = -1
                continue
            history, hits, place = entry
            count, last = np.bincount(history, minlength=self.vocab_size), history[-1]
            total = len(history)
            hit = (48 * hits + total // 2) // total / 48
            features += [log(total), log((count > 0).sum()), log(len(self.tokens) - place)]
            features += [float(total == 1), hit, float(last == neighbour)]
            counts.append(count / total)
            points.append(np.eye(self.vocab_size)[last])
            neighbour = last
            if key[0] == "order":
                longest = last
        for place in range(self.families):
            known.append(features[6 * place] > 0)
        late = ([0.0] * 16 + self.prices)[-16:]
        shared = [1.0, entropy / 4 - 1, math.exp(-entropy)] + [late[-lag] / 4 for lag in (1, 2, 3)]
        shared.append(sum(late) / 16 / 2)
        if self.proposers is not None:
            proposed.insert(0, longest if longest < self.vocab_size else None)
            shared += [0.0 if token is None else logp_row[token] / 4 for token in proposed]
        features += [max(value, -6.0) for value in shared]
        known += known[1:]
        return features, (self.tokens[-1], longest), known, np.stack(experts + counts + points)

    def weights(self, features, rows, known):
        """Return the gate's weights (n, experts)."""
        into, newest, proposed, out, bias = self.parameters
        hidden = (features @ into + newest[rows[:, 0]] + proposed[rows[:, 1]]).relu()
        return (hidden @ out + bias).masked_fill(~known, -math.inf).softmax(dim=1)

    def row(self, logp_row, entropy):
        """Return the distribution of the next token, (V,) float64."""
        features, rows, known, experts = self.look_up(logp_row, entropy)
        self.now = (features, rows, known, experts)
        with torch.no_grad():
            weights = self.weights(
                torch.tensor([features], dtype=torch.float64), torch.tensor([rows]), torch.tensor([known])
            )[0]
        self.gated = weights.numpy() @ experts
        trust = 1 / (1 + math.exp(-self.lead))
        return (1 - trust) * experts[0] + trust * self.gated

    def reveal(self, token, logp):
        """Take in the token that was priced; learn when a chunk is full."""
        if self.tokens:
            features, rows, known, experts = self.now
            self.pending.append((features, rows, known, experts[:, token]))
            self.lead += math.log(self.gated[token]) - math.log(experts[0][token])
            self.prices.append(float(logp))
            done = len(self.prices)
            if done >= (self.chunk_end or max(64, min(self.chunk, 0))):
                self.learn()
                self.chunk_end = done + max(64, min(self.chunk, done // 4), done // 4096)
            for key in self.contexts():
                if key is not None:
                    history, hits, _ = self.tables.setdefault(key, [[], 0, 0])
                    hits += bool(history) and history[-1] == token
                    self.tables[key] = [[*history, token], hits, len(self.tokens)]
        self.tokens.append(token)
        self.document += token == 1

    def learn(self):
        """Take the steps on the chunk that has just been priced."""
        features, rows, known, prices = zip(*self.pending, strict=True)
        features, prices = torch.tensor(features, dtype=torch.float64), torch.tensor(np.array(prices))
        for _ in range(self.steps):
            self.adam.zero_grad()
            weights = self.weights(features, torch.tensor(rows), torch.tensor(known))
            (-(weights * prices).sum(dim=1).log().mean()).backward()
            self.adam.step()
        self.pending = []


def normed(x):
    """x over the root of its mean square, along the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1.19e-7)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bigram_row(ids, position, rows, form):
    """Row of the bigram table at one position, in plain integers."""
    token = int(ids[position])
    if form == "linear":
        before = int(ids[position - 1]) if position else 0
        return (92821 * before + token) % rows
    if position == 0:
        return rows - 1
    return ((36313 * token) ^ (27191 * int(ids[position - 1]))) % (rows - 1)


def rotate_some(x, base, channels, ntk_length):
    """Rotary embedding of the first `channels` of x (T, D), with the base stretched beyond ntk_length."""
    length = len(x)
    if ntk_length and length > ntk_length:
        base = base * (length / ntk_length) ** (channels / (channels - 2))
    return np.concatenate((rotate(x[:, :channels], base), x[:, channels:]), axis=1)


def without_own_value(y, v):
    """Outputs y (H, T, D) less their part along the value at the same position, head by head."""
    result = y.copy()
    for head in range(len(y)):
        own = v[head // (len(y) // len(v))]
        for t in range(y.shape[1]):
            unit = own[t] / max(math.sqrt(own[t] @ own[t]), 1e-12)
            result[head, t] = y[head, t] - (y[head, t] @ unit) * unit
    return result


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def looked_up(w, table, rows):
    """Rows of a table through its projection, and its scale if it has one."""
    return float(w.get(f"{table}.scale", 1.0)) * (
        w[f"{table}.embed.weight"][rows] @ w[f"{table}.proj.weight"].T
    )


def model_logits(w, s, ids):
    """Logits (T, V) of one sequence by a model with weights w (name -> float64 array) and Settings s.

    Follows the description of each part, not the script: one sequence, one block after the other, lists of
    positions where the script shifts tensors.
    """
    heads, kv_heads, dim = s.num_heads, s.num_kv_heads, s.model_dim
    x = w["tok_emb.weight"][ids]
    if s.bigram_vocab_size:
        rows = [bigram_row(ids, t, s.bigram_vocab_size, s.bigram_hash) for t in range(len(ids))]
        x = x + looked_up(w, "bigram", rows)
    x = x if s.pre_enrich_dim else normed(x)
    if s.smear_gate != "off":
        share = sigmoid(w["smear_gate"])
        x = np.array([(1 - share) * x[t] + share * (x[t - 1] if t else 0 * x[t]) for t in range(len(x))])
    if s.pre_enrich_dim:
        x = normed(gelu(x @ w["pre_enrich.0.weight"].T) @ w["pre_enrich.2.weight"].T)
    x0, pushed, first_value = x, [], None
    encoder = math.ceil(s.num_layers / 2) if s.unet_longer_half == "encoder" else s.num_layers // 2
    layers = [int(text) for text in s.ve_layers.split(",") if text]
    for layer in range(s.num_layers):
        b = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"blocks.{layer}.")}
        if layer >= encoder and pushed:
            x = x + w["skip_weights"][layer - encoder] * pushed.pop()
        damping = 1 / math.sqrt(layer + 1)
        on_norm = damping if s.ln_scale == "norm" else 1
        on_branch = damping if s.ln_scale == "branch" else 1
        start = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
        h = on_norm * normed(start)
        v = h @ b["attn.c_v.weight"].T
        if layer in layers:
            v = v + w["ve_layer_scales"][layers.index(layer)] * looked_up(w, "ve_shared", ids)
        if s.value_residual:
            first_value = v if first_value is None else first_value
            v = b["attn.vr_lambda"][0] * first_value + b["attn.vr_lambda"][1] * v
        q, k = h @ b["attn.c_q.weight"].T, h @ b["attn.c_k.weight"].T
        q, k, v = (
            z.reshape(len(ids), count, -1).transpose(1, 0, 2)
            for z, count in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
        turn = (s.rope_base, s.rope_dims or s.head_dim, s.rope_ntk_length)
        q = np.array([b["attn.q_gain"][i] * rotate_some(normed(q[i]), *turn) for i in range(heads)])
        k = np.array([rotate_some(normed(k[i]), *turn) for i in range(kv_heads)])
        y = attention(q, k, v)
        if layer >= s.num_layers - s.xsa_last_n:
            y = without_own_value(y, v)
        if s.gated_attn:
            gates = sigmoid(h @ b["attn.attn_gate.weight"].T + b["attn.attn_gate.bias"])
            y = np.array([y[i] * gates[:, i : i + 1] for i in range(heads)])
        y = y.transpose(1, 0, 2).reshape(len(ids), dim) @ b["attn.proj.weight"].T
        z = start + on_branch * b["attn_scale"] * y
        h = on_norm * normed(z) @ b["mlp.fc.weight"].T
        h = np.where(h > 0, h, 0.5 * h if s.mlp_activation == "leaky2" else 0) ** 2
        z = z + on_branch * b["mlp_scale"] * (h @ b["mlp.proj.weight"].T)
        if s.dtg_enabled:
            z = start + sigmoid(start @ b["dtg_gate.weight"].T + b["dtg_gate.bias"]) * (z - start)
        x = z
        if layer < encoder:
            pushed.append(x)
    logits = normed(x) @ w["tok_emb.weight"].T
    return s.logit_softcap * np.tanh(logits / s.logit_softcap)


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


def cooled_row(logits, tau):
    """#779's adaptive temperature for one row of logits: log-probabilities at it, and their entropy."""
    row = logits - np.log(np.exp(logits).sum())
    entropy = -sum(math.exp(x) * x for x in row)
    temperature = min(max(1 - (1 - tau) * (1 - entropy / math.log(len(row))), 0.9), 1.05)
    row = logits / temperature
    row = row - np.log(np.exp(row).sum())
    return row, -sum(math.exp(x) * x for x in row)


def moved_by_enrichment(w, s, ids):
    """#810's pe_delta (T,) of one sequence: length of W2 gelu(W1 x) - x, x the smeared embedding."""
    x = w["tok_emb.weight"][ids]
    if s.bigram_vocab_size:
        rows = [bigram_row(ids, t, s.bigram_vocab_size, s.bigram_hash) for t in range(len(ids))]
        x = x + looked_up(w, "bigram", rows)
    if s.smear_gate != "off":
        share = sigmoid(w["smear_gate"])
        x = np.array([(1 - share) * x[t] + share * (x[t - 1] if t else 0 * x[t]) for t in range(len(x))])
    enriched = gelu(x @ w["pre_enrich.0.weight"].T) @ w["pre_enrich.2.weight"].T
    return np.sqrt(((enriched - x) ** 2).sum(axis=1))


class PseudoTwin:
    """A hashed evaluator with a dictionary per table, one target at a time: `prices`, `totals`."""

    def __init__(self, rule, tokens, logp, entropy, vocab, chunk=None, buckets=None, moved=None):
        self.rule, self.tokens, self.vocab = rule, [int(token) for token in tokens], vocab
        self.top, own_chunk, self.floor, self.center, self.factor, self.low, self.high = PSEUDO_FACTS[rule]
        self.buckets, chunk = buckets or 4194304, chunk or own_chunk
        self.context = {n: {} for n in self.center}
        self.full = {n: {} for n in self.center}
        self.prices, self.totals, self.boost = [], [], 1.0
        for first in range(1, len(tokens), chunk):
            targets = range(first, min(first + chunk, len(tokens)))
            self.stored = first - 1
            for t in targets:
                if moved is not None:  # #810's confidence, from what pre-enrichment moves
                    self.boost = 0.5 + moved[t - 1] / max(moved[u - 1] for u in targets)
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
        if self.rule == "pr779" and self.stored == 0:
            return 0.0
        share = 1 / (1 + math.exp(-2 * (entropy - self.center.get(n, 4.0))))
        factor = self.factor.get(n, 2.0) if self.factor else 1.0
        alpha = factor * (self.low + (self.high - self.low) * share) * self.boost
        return min(alpha, 0.95 if self.factor else 1.0)

    def ratio(self, n, count, t, target):
        if n == 0:
            return 1 / self.vocab
        return min(self.full[n].get(self.keys(n, t, target)[1], 0), count) / count

    def price(self, t, logp, entropy):
        n, count = self.match(t, self.tokens[t])
        alpha = self.alpha(n, entropy)
        mixed = (1 - alpha) * math.exp(logp) + alpha * self.ratio(n, count, t, self.tokens[t])
        self.prices.append(math.log(max(mixed, self.floor)))
        total = 1 - alpha + alpha * sum(self.ratio(n, count, t, v) for v in range(self.vocab))
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


def gated_prices(tokens, logp, gate, vocab, chunk, buckets, top=7):
    """#834's evaluation with a dictionary per table: log-prices and sums over the vocabulary."""
    tables, prices, totals = {}, [], []
    tokens = [int(token) for token in tokens]

    def keys(n, t, target):
        h = 0
        for k in range(n - 1):
            h ^= tokens[t - n + 1 + k] * PSEUDO_PRIMES[k]
        return (n, "context", h % buckets), (n, "pair", (h ^ target * PSEUDO_PRIMES[n - 1]) % buckets)

    for first in range(1, len(tokens), chunk):
        targets = range(first, min(first + chunk, len(tokens)))
        for t in targets:
            experts = {1: [math.exp(logp[t - 1]), 1.0]}  # order: price of the target, sum over all targets
            for n in range(2, top + 1):
                count = tables.get(keys(n, t, 0)[0], 0) if t >= n - 1 else 0
                if count >= 2:
                    row = [min(tables.get(keys(n, t, v)[1], 0), count) / count for v in range(vocab)]
                    experts[n] = [row[tokens[t]], sum(row)]
            exponents = {n: math.exp(float(gate[t - 1][n - 1])) for n in experts}
            weights = {n: 0.95 * x / sum(exponents.values()) for n, x in exponents.items()}
            weights[1] += 0.05
            prices.append(math.log(max(sum(weights[n] * experts[n][0] for n in experts), 1e-12)))
            totals.append(sum(weights[n] * experts[n][1] for n in experts))
        for t in targets:
            for n in range(2, min(top, t + 1) + 1):
                for key in keys(n, t, tokens[t]):
                    tables[key] = tables.get(key, 0) + 1
    return np.array(prices), np.array(totals)


def oracle_ratios(shards, batch, block, buckets, top=7):
    """#834's training tables by dictionary: ratio min(F, C) / C by (row, position, order), -1 where C < 2.

    As there, order n prices from input j = n - 1 of a row on, though j = n - 2 has a whole context, too."""
    stream = [int(token) for shard in shards for token in shard]
    tables, result = {}, np.full((len(batch), len(batch[0]) - 1, top - 1), -1.0)

    def keys(n, words):
        h = 0
        for word, prime in zip(words[:-1], PSEUDO_PRIMES, strict=False):
            h ^= word * prime
        return (n, "context", h % buckets), (n, "pair", (h ^ words[-1] * PSEUDO_PRIMES[n - 1]) % buckets)

    for begin in range(0, len(stream), block):
        part = stream[begin : begin + block]
        for n in range(2, top + 1):
            for start in range(len(part) - n + 1):
                for key in keys(n, part[start : start + n]):
                    tables[key] = tables.get(key, 0) + 1
    for b, row in enumerate(batch):
        for t in range(1, len(row)):
            for n in range(2, min(top, t) + 1):
                context, pair = (
                    tables.get(key, 0) for key in keys(n, [int(x) for x in row[t - n + 1 : t + 1]])
                )
                if context >= 2:
                    result[b, t - 1, n - 2] = min(pair, context) / context
    return result


def adapted_prices(model, tokens, sizes, settings):
    """Price tokens one window at a time by a model that learns from every chunk once it is priced.

    Plain autograd, torch.optim and lists; `sizes` are the bytes of all tokens but the first."""
    s, model = settings, copy.deepcopy(model)
    total, T, C = len(tokens) - 1, s.window, s.ttt_chunk_tokens
    tokens = torch.as_tensor(tokens.astype("int64"))
    sizes = torch.as_tensor(sizes.astype("float64"))
    queries = [f"blocks.{i}.attn.c_q.weight" for i in range(s.num_layers)][s.num_layers - s.ttt_last_blocks :]
    adaptive = {n: p for n, p in model.named_parameters() if n in queries or "scale" in n}
    trained = {n: p.detach().clone() for n, p in adaptive.items()}
    average = {n: p.detach().clone() for n, p in adaptive.items()}
    adam = torch.optim.AdamW(adaptive.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    chunks, prices = math.ceil(total / C), []
    plan = windows(total, T, s.eval_stride)
    for chunk in range(chunks):
        for start, first, stop in plan:
            if first // C == chunk:
                rows = model.logits(tokens[start:stop][None])[0].double().log_softmax(-1)
                prices += [rows[i - start, tokens[i + 1]].item() for i in range(first, stop)]
        if chunk == chunks - 1:
            break
        for name, parameter in adaptive.items():
            parameter.data.copy_(trained[name])
        begins = [min(begin, C - T) + chunk * C for begin in range(0, C, T)]
        adam.param_groups[0]["lr"] = s.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))
        for _ in range(s.ttt_epochs):
            for at in range(0, len(begins), s.ttt_batch_seqs):
                nats, weights = 0.0, 0.0
                for begin in begins[at : at + s.ttt_batch_seqs]:
                    row = model.logits(tokens[begin : begin + T][None])[0].double().log_softmax(-1)
                    for i in range(T):
                        nats = nats - row[i, tokens[begin + i + 1]] * sizes[begin + i]
                        weights += float(sizes[begin + i])
                adam.zero_grad()
                (nats / max(weights, 1.0)).backward()
                torch.nn.utils.clip_grad_norm_(adaptive.values(), 1.0)
                adam.step()
                for name, parameter in adaptive.items():
                    average[name].mul_(s.polyak_decay).add_(parameter.detach(), alpha=1 - s.polyak_decay)
        for name, parameter in adaptive.items():
            trained[name].copy_(parameter.detach())
            parameter.data.copy_(average[name])
    return prices
