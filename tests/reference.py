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
