"""The schedule against PyTorch's OneCycleLR, the optimizers against PyTorch's and timm's, and that both train."""

import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from timm.optim import Lars
from torch.nn import functional as F

from alignprune_exp.config import MODEL, OPTIMIZER
from alignprune_exp.optim import OPTIMIZERS, one_cycle, set_progress

CONF = Path(__file__).parents[1] / "conf" / "optimizer"


def _config(name="sgd", **changes):
    return OPTIMIZER.read(yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes)


def _parameters():
    return [torch.nn.Parameter(torch.zeros(2))]


SETTINGS = [
    {},
    {"lr": 5.2, "cycle_momentum": True},
    {"pct_start": 0.1, "div": 2.0, "final_div": 1.0, "cycle_momentum": True},
    {"pct_start": 0.75, "div": 10.0, "final_div": 100.0, "momentum": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_cycle_equals_pytorchs_where_both_have_gone_as_far(settings):
    config, steps = _config(**settings), 400
    sgd = torch.optim.SGD(_parameters(), lr=1.0, momentum=config.momentum)
    pytorchs = torch.optim.lr_scheduler.OneCycleLR(
        sgd,
        config.lr,
        total_steps=steps,
        pct_start=config.pct_start,
        div_factor=config.div,
        final_div_factor=config.final_div,
        cycle_momentum=config.cycle_momentum,
    )
    peak = config.pct_start * steps - 1  # PyTorch counts the steps of its two phases from here
    for step in range(steps):
        if step <= peak:
            progress = config.pct_start * step / peak
        else:
            progress = config.pct_start + (1 - config.pct_start) * (step - peak) / (steps - 1 - peak)
        group = sgd.param_groups[0]
        assert one_cycle(progress, config) == pytest.approx((group["lr"], group["momentum"]), rel=1e-6, abs=1e-12)
        if step + 1 < steps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it wants optimizer.step() first
                pytorchs.step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_schedule_starts_peaks_and_ends_where_it_should_and_stays_between(settings):
    config = _config(**settings)
    start, end = config.lr / config.div, config.lr / config.div / config.final_div
    assert one_cycle(0.0, config)[0] == pytest.approx(start)
    assert one_cycle(config.pct_start, config)[0] == pytest.approx(config.lr)
    assert one_cycle(1.0, config)[0] == pytest.approx(end)
    lrs, momenta = zip(*(one_cycle(k / 1000, config) for k in range(1001)), strict=True)
    assert all(math.isfinite(lr) and 0 < lr <= config.lr * (1 + 1e-9) for lr in lrs)
    assert min(lrs) >= min(start, end) * (1 - 1e-9)
    if config.cycle_momentum:
        assert (momenta[0], min(momenta), momenta[-1]) == pytest.approx((0.95, 0.85, 0.95), abs=1e-4)
    else:
        assert set(momenta) == {config.momentum}


def test_set_progress_reaches_every_parameter_group():
    config = _config(cycle_momentum=True)
    sgd = torch.optim.SGD([{"params": _parameters()}, {"params": _parameters()}], lr=1.0, momentum=0.9)
    lr = set_progress(sgd, 0.6, config)
    expected_lr, expected_momentum = one_cycle(0.6, config)
    assert lr == expected_lr
    assert [(g["lr"], g["momentum"]) for g in sgd.param_groups] == [(expected_lr, expected_momentum)] * 2


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_weight_decay_is_on_all_parameters(name):
    network = MODEL.make(MODEL.read({"name": "small_cnn", "width": 4, "norm": "batch"}), 1, 10)
    optimizer = OPTIMIZER.make(_config(name), network.parameters())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 5e-4 for p in group["params"]}
    assert decayed == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_optimizer_as_configured_trains_on_digits_within_forty_steps(name):
    digits = load_digits()
    x = torch.tensor(digits.images[:512] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target[:512])
    torch.manual_seed(0)
    network, config = MODEL.make(MODEL.read({"name": "small_cnn", "width": 16, "norm": "batch"}), 1, 10), _config(name)
    optimizer = OPTIMIZER.make(config, network.parameters())
    losses = []
    for step in range(40):
        set_progress(optimizer, step / 40, config)
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < losses[0] / 2


SHAPES = [(3, 4), (5,), (), (2, 3, 2, 2)]
FIRST_ZERO = 1  # its gradient is 0 at first, and another parameter is 0 itself


def _walk(optimizer, parameters, cycles, steps=6):
    """Take steps of random gradients at rates that change; return what the parameters were after each."""
    draw, config, seen = torch.Generator().manual_seed(1), _config(lr=2.0, cycle_momentum=cycles), []
    for step in range(steps):
        set_progress(optimizer, step / steps, config)
        for k, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=draw) * (step > 0 or k != FIRST_ZERO)
            if k == 2 and step == 3:
                p.grad = None
        optimizer.step()
        seen.append([p.detach().clone() for p in parameters])
    return seen


def _start():
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw) * (shape != (5,))) for shape in SHAPES]


def _reference(name, parameters, decay):
    common = {"lr": 1.0, "momentum": 0.9, "weight_decay": decay}
    return (
        Lars(parameters, foreach=False, **common)
        if name == "lars"
        else torch.optim.SGD(parameters, nesterov=True, foreach=False, **common)
    )


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("cycles", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_the_optimizers_have_the_bits_of_pytorchs_sgd_and_timms_lars(name, cycles, decay):
    ours, theirs = _start(), _start()
    optimizer = OPTIMIZERS[name](ours, lr=1.0, momentum=0.9, weight_decay=decay)
    expected = _walk(_reference(name, theirs, decay), theirs, cycles)
    for found, one in zip(_walk(optimizer, ours, cycles), expected, strict=True):
        assert all(map(torch.equal, found, one))
    assert not torch.equal(expected[0][0], expected[-1][0])


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_rates_that_are_tensors_are_set_in_place_and_stay_where_they_are_when_a_state_is_loaded(name):
    ours, theirs = _start(), _start()
    optimizer, plain = (OPTIMIZERS[name](each, lr=1.0, momentum=0.9, weight_decay=0.01) for each in (ours, theirs))
    rates = {"lr": torch.tensor(1.0), "momentum": torch.tensor(0.9)}
    optimizer.param_groups[0].update(rates)
    for found, one in zip(_walk(optimizer, ours, True), _walk(plain, theirs, True), strict=True):
        for mine, other in zip(found, one, strict=True):
            torch.testing.assert_close(mine, other)
    optimizer.load_state_dict(plain.state_dict())
    assert all(optimizer.param_groups[0][key] is rate for key, rate in rates.items())
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], plain.state[other]["momentum_buffer"])
