"""AVERAGING: closed form, off means off. Run alone: pytest tests/test_06_averaging.py"""

import pytest
import torch
from torch import nn

from train_gpt import Averages, Settings


def settings_of(decay, **changes):
    return Settings.from_env({"RECIPE": "smoke", "EMA_DECAY": str(decay)} | changes)


def history(steps, decay, scales=None, **changes):
    """Weights drawn at every step, and the averages that saw them."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    seen = [module.weight.detach().clone()]
    averages = Averages(module, settings_of(decay, **changes))
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        seen.append(module.weight.detach().clone())
        averages.update(step, scales[step - 1] if scales else 1.0)
    return module, seen, averages


def weights_of(averages):
    """The one candidate, its weight matrix."""
    (weights,) = averages.candidates().values()
    return weights["weight"]


def ema_of(seen, decay, steps):
    expected = decay**steps * seen[0]
    for k in range(1, steps + 1):
        expected = expected + (1 - decay) * decay ** (steps - k) * seen[k]
    return expected


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_closed_form(steps):
    _, seen, averages = history(steps, 0.9)
    torch.testing.assert_close(weights_of(averages), ema_of(seen, 0.9, steps))
    assert averages.updates == steps
    assert averages.snapshots == 0
    assert averages.swa == {}


def test_agrees_with_torch():
    torch.manual_seed(1)
    module = nn.Linear(4, 4)
    averages = Averages(module, settings_of(0.8))
    theirs = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    theirs.update_parameters(module)  # its first update copies
    for step in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        averages.update(step, 1.0)
        theirs.update_parameters(module)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(averages.candidates()["ema"][name], parameter.detach())


# Scales of seven steps; with SWA_EVERY=2 and SWA_START_SCALE=0.5 the snapshots are those after steps 4 and 6.
SCALES = (1.0, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SWA = {"SWA_EVERY": "2", "SWA_START_SCALE": "0.5"}


@pytest.mark.parametrize("source", ["raw", "ema"])
@pytest.mark.parametrize("average", ["swa", "mean", "best"])
def test_swa_is_the_mean_of_its_snapshots(source, average):
    _, seen, averages = history(7, 0.9, SCALES, AVERAGE=average, SWA_SOURCE=source, **SWA)
    snapshots = [seen[4], seen[6]] if source == "raw" else [ema_of(seen, 0.9, 4), ema_of(seen, 0.9, 6)]
    swa, ema = (snapshots[0] + snapshots[1]) / 2, ema_of(seen, 0.9, 7)
    assert averages.snapshots == 2
    expected = {"raw": seen[-1], "ema": ema, "swa": swa, "mean": (swa + ema) / 2}
    found = averages.candidates()
    assert list(found) == (["raw", "ema", "swa"] if average == "best" else [average])
    for name, weights in found.items():
        torch.testing.assert_close(weights["weight"], expected[name])


def test_what_is_not_used_is_not_collected():
    assert history(7, 0.9, SCALES, **SWA)[2].swa == {}
    averages = history(7, 0.9, SCALES, AVERAGE="swa", **SWA)[2]
    assert averages.ema == {}
    assert averages.updates == 0


def test_swa_without_snapshots_is_the_ema_or_the_weights():
    _, seen, averages = history(3, 0.9, AVERAGE="mean", **SWA)
    torch.testing.assert_close(weights_of(averages), ema_of(seen, 0.9, 3))
    assert averages.snapshots == 0
    _, seen, averages = history(3, 0.9, AVERAGE="swa", **SWA)
    assert weights_of(averages).equal(seen[-1])


def test_off_hands_out_the_weights_themselves():
    _, seen, averages = history(3, 0.0)
    assert weights_of(averages).equal(seen[-1])
    assert averages.moved(averages.candidates()["ema"]) == 0
    assert averages.updates == 0


def test_small_changes_are_not_lost_and_training_is_not_touched():
    """With decay 0.999 a bfloat16 average would never move; the live weights must not move at all."""
    module, _, _ = history(0, 0.5)
    module = module.bfloat16()
    averages = Averages(module, settings_of(0.999, AVERAGE="mean", SWA_EVERY="1", SWA_START_SCALE="2"))
    before = module.weight.detach().float().clone()
    with torch.no_grad():
        module.weight.mul_(1.01)
    live = module.weight.detach().clone()
    for step in range(50):
        averages.update(step, 1.0)
    for average in (averages.ema, averages.swa):
        assert average["weight"].dtype == torch.float32
        assert not average["weight"].equal(before)
        assert 0 <= averages.moved(average) < 0.01
    assert module.weight.detach().equal(live)
    assert averages.moved(averages.ema) > 0
