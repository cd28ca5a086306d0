"""AVERAGING: closed form, off means off. Run alone: pytest tests/test_06_averaging.py"""

import pytest
import torch
from torch import nn

from train_gpt import Ema


def history(steps, decay):
    """Weights drawn at every step, and the Ema that saw them."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    seen = [module.weight.detach().clone()]
    ema = Ema(module, decay)
    for _ in range(steps):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        seen.append(module.weight.detach().clone())
        ema.update()
    return module, seen, ema


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_closed_form(steps):
    _, seen, ema = history(steps, 0.9)
    expected = 0.9**steps * seen[0]
    for k in range(1, steps + 1):
        expected = expected + 0.1 * 0.9 ** (steps - k) * seen[k]
    torch.testing.assert_close(ema.weights()["weight"], expected)
    assert ema.count == steps


def test_agrees_with_torch():
    torch.manual_seed(1)
    module = nn.Linear(4, 4)
    ema = Ema(module, 0.8)
    theirs = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    theirs.update_parameters(module)  # its first update copies
    for _ in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        ema.update()
        theirs.update_parameters(module)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(ema.weights()[name], parameter.detach())


def test_off_hands_out_the_weights_themselves():
    _, seen, ema = history(3, 0.0)
    assert ema.weights()["weight"].equal(seen[-1])
    assert ema.moved() == 0
    assert ema.count == 0


def test_small_changes_are_not_lost_and_training_is_not_touched():
    """With decay 0.999 a bfloat16 average would never move; the live weights must not move at all."""
    module, _, _ = history(0, 0.5)
    module = module.bfloat16()
    ema = Ema(module, 0.999)
    before = module.weight.detach().float().clone()
    with torch.no_grad():
        module.weight.mul_(1.01)
    live = module.weight.detach().clone()
    for _ in range(50):
        ema.update()
    assert ema.weights()["weight"].dtype == torch.float32
    assert not ema.weights()["weight"].equal(before)
    assert module.weight.detach().equal(live)
    assert 0 < ema.moved() < 0.01
