"""OPTIMIZER: Muon against float64, schedules at corners. Run alone: pytest tests/test_05_optimizer.py"""

import numpy as np
import pytest
import reference
import torch
from torch import nn

import train_gpt
from train_gpt import GPT, Muon, Optimizers, Settings, parameter_groups


def settings_of(**changes):
    return Settings.from_env({"RECIPE": "smoke"} | changes)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 5), (5, 1)])
def test_orthogonalize_against_float64(shape):
    update = torch.randn(shape)
    got = train_gpt.orthogonalize(update, 5)
    np.testing.assert_allclose(got.numpy(), reference.newton_schulz(update.numpy(), 5), atol=2e-5)


def test_orthogonalize_brings_singular_values_near_one():
    values = torch.linalg.svdvals(train_gpt.orthogonalize(torch.randn(3, 32, 64), 5))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalize_takes_batches_and_zero():
    update = torch.randn(4, 6, 10)
    batch = train_gpt.orthogonalize(update, 5)
    for index in range(4):
        torch.testing.assert_close(batch[index], train_gpt.orthogonalize(update[index], 5))
    assert train_gpt.orthogonalize(torch.zeros(2, 3, 3), 5).abs().max() == 0


@pytest.mark.parametrize("parallel", ["0", "1"])
@pytest.mark.parametrize(("decay", "order"), [("0", "before"), ("0.1", "before"), ("0.1", "after")])
def test_muon_against_float64(process, decay, order, parallel):
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (8, 8)]
    matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    twins = [reference.MuonTwin(matrix.detach().numpy()) for matrix in matrices]
    settings = settings_of(MUON_WD=decay, MUON_WD_ORDER=order, PARALLEL_MUON=parallel)
    muon = Muon(matrices, settings, process)
    for step in range(4):
        for matrix, twin in zip(matrices, twins, strict=True):
            matrix.grad.normal_()
            twin.step(matrix.grad.numpy(), 0.05, 0.8 + 0.03 * step, float(decay), 5, order)
        muon.step(0.05, 0.8 + 0.03 * step)
    for matrix, twin in zip(matrices, twins, strict=True):
        np.testing.assert_allclose(matrix.detach().numpy(), twin.weight, atol=5e-5)


def test_muon_agrees_with_torch_optim(process):
    """PyTorch's own Muon rounds to bfloat16 inside; a tenth of an update's size is its rounding."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.empty(16, 8))
    theirs.data.copy_(ours.data)
    muon = Muon([ours], settings_of(MUON_WD="0.1"), process)
    torch_muon = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original")
    for _ in range(3):
        ours.grad.normal_()
        theirs.grad = ours.grad.clone()
        muon.step(0.05, 0.9)
        torch_muon.step()
    assert (ours - theirs).abs().max() < 3 * 0.1 * 0.05 * 2**0.5


def model_and_optimizers(process, **changes):
    torch.manual_seed(0)
    settings = settings_of(**changes)
    model = GPT(settings)
    return model, Optimizers(*parameter_groups(model, settings), settings, process)


@pytest.mark.parametrize("tied", ["0", "1"])
def test_every_parameter_moves_once(process, tied):
    model, optimizers = model_and_optimizers(process, TIE_EMBEDDINGS=tied)
    adam = [p for group in optimizers.adam.param_groups for p in group["params"]]
    muon = [p for bank in optimizers.muon.banks for p in bank.matrices]
    assert len(adam) + len(muon) == len(list(model.parameters())) == len({id(p) for p in adam + muon})
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):  # output matrices start at zero: what lies behind them moves later
        batches = [torch.randint(0, 384, (4, 33), dtype=torch.int32) for _ in range(2)]
        optimizers.gather(model, batches)
        optimizers.step(1.0, 0.9)
    still = [
        name for (name, p), old in zip(model.named_parameters(), before, strict=True) if p.detach().equal(old)
    ]
    assert still == []


def test_learning_rates_by_role(process):
    changes = {"TIED_EMBED_LR": "0.5", "EMBED_LR": "0.25", "HEAD_LR": "0.125", "SCALAR_LR": "0.0625"}
    for tied, expected in (("1", [0.5, 0.0625]), ("0", [0.25, 0.125, 0.0625])):
        _, optimizers = model_and_optimizers(process, TIE_EMBEDDINGS=tied, **changes)
        optimizers.step(0.5, 0.9)
        assert [group["lr"] for group in optimizers.adam.param_groups] == [rate / 2 for rate in expected]


def test_gather_averages_gradients_and_loss_over_slots(process):
    model, optimizers = model_and_optimizers(process)
    batches = [torch.randint(0, 384, (4, 33), dtype=torch.int32) for _ in range(2)]
    loss = optimizers.gather(model, batches)
    gathered = [p.grad.clone() for p in model.parameters()]
    whole = torch.cat(batches).long()
    expected = model(whole[:, :-1], whole[:, 1:])
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, want in zip(gathered, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_global_norm(process, monkeypatch):
    model, optimizers = model_and_optimizers(process, GRAD_CLIP_NORM="0.5")
    monkeypatch.setattr(optimizers.muon, "step", lambda *_: None)  # its update overwrites the gradient
    for size, expected in ((10.0, 0.5), (0.1, 0.1)):
        for parameter in model.parameters():
            parameter.grad.normal_()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for gradients in (optimizers.flat[:-1], *(bank.gradient for bank in optimizers.muon.banks)):
            gradients *= size / norm
        optimizers.step(0.0, 0.9)
        after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert after.item() == pytest.approx(expected, rel=1e-4)


def test_learning_rate_by_steps():
    settings = settings_of(ITERATIONS="100", WARMDOWN_ITERS="40", MAX_WALLCLOCK_SECONDS="0")
    scales = [train_gpt.learning_rate_scale(step, 1e9, settings) for step in (0, 59, 60, 80, 99, 100)]
    assert scales == pytest.approx([1, 1, 1, 0.5, 0.025, 0])
    assert train_gpt.learning_rate_scale(99, 0, settings_of(WARMDOWN_ITERS="0")) == 1


def test_learning_rate_by_clock():
    """At 10 ms a step, 40 steps of warmdown fill the last 400 ms of the second."""
    settings = settings_of(ITERATIONS="100000", WARMDOWN_ITERS="40", MAX_WALLCLOCK_SECONDS="1")
    scales = [
        train_gpt.learning_rate_scale(step, 10.0 * step, settings) for step in (0, 1, 59, 60, 80, 99, 100)
    ]
    assert scales == pytest.approx([1, 1, 1, 1, 0.5, 0.025, 0])
    assert train_gpt.learning_rate_scale(7, 1500.0, settings) == 0
    # A slower machine starts to decay earlier in steps, at the same place in time left.
    assert train_gpt.learning_rate_scale(20, 600.0, settings) == pytest.approx(400 / (40 * 30))


def test_muon_momentum_ramp():
    settings = settings_of(
        MUON_MOMENTUM="0.9", MUON_MOMENTUM_WARMUP_START="0.5", MUON_MOMENTUM_WARMUP_STEPS="10"
    )
    assert [train_gpt.momentum_at(s, settings) for s in (0, 5, 10, 99)] == pytest.approx([0.5, 0.7, 0.9, 0.9])
    assert train_gpt.momentum_at(0, settings_of(MUON_MOMENTUM_WARMUP_STEPS="0")) == 0.95


@pytest.mark.parametrize(
    ("scope", "muon"),
    [("matrix", set()), ("projection", {"projection"}), ("lookup", {"projection", "lookup"})],
)
def test_muon_scope(process, scope, muon):
    """Tables that Muon leaves go with the embedding, projections with the scalars (spec of #864)."""
    parts = {"BIGRAM_VOCAB_SIZE": "16", "VE_LAYERS": "1", "TIED_EMBED_LR": "0.5", "SCALAR_LR": "0.25"}
    model, optimizers = model_and_optimizers(process, MUON_SCOPE=scope, **parts)
    taken = {id(p) for bank in optimizers.muon.banks for p in bank.matrices}
    rates = {id(p): g["base_lr"] for g in optimizers.adam.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        role = train_gpt.parameter_role(name, p)
        assert (id(p) in taken) == (role in muon | {"matrix"}), name
        if id(p) not in taken:
            assert rates[id(p)] == {"lookup": 0.5, "embedding": 0.5}.get(role, 0.25), name


def test_quantization_starts():
    def starts(when, step, elapsed_ms, scale, **changes):
        return train_gpt.quantization_starts(step, elapsed_ms, scale, settings_of(QAT_START=when, **changes))

    assert not starts("off", 99, 1e9, 0.0)
    assert starts("step0", 0, 0.0, 1.0)
    assert [starts("scale:0.5", 0, 0.0, scale) for scale in (1.0, 0.5, 0.49)] == [False, False, True]
    clock = {"MAX_WALLCLOCK_SECONDS": "10"}
    assert [starts("time:0.85", 0, ms, 1.0, **clock) for ms in (0, 8_499, 8_500)] == [False, False, True]
    assert [starts("time:0.5", step, 1e9, 1.0, ITERATIONS="10") for step in (4, 5)] == [False, True]


def test_what_came_before_the_first_step_is_no_part_of_a_steps_time():
    """20 s of counting, then steps of 100 ms under a limit of 600 s: the same decay as 580 s without it."""
    settings = Settings.from_env({"MAX_WALLCLOCK_SECONDS": "600", "WARMDOWN_ITERS": "3500"})
    shorter = Settings.from_env({"MAX_WALLCLOCK_SECONDS": "580", "WARMDOWN_ITERS": "3500"})
    for step in (0, 1, 50, 2299, 2301, 4000, 5799):
        scale = train_gpt.learning_rate_scale(step, 20_000 + 100.0 * step, settings, 20_000.0)
        assert scale == pytest.approx(train_gpt.learning_rate_scale(step, 100.0 * step, shorter))
    assert train_gpt.learning_rate_scale(1, 20_100.0, settings, 20_000.0) == 1.0
    assert train_gpt.learning_rate_scale(1, 20_100.0, settings) < 0.01
