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
