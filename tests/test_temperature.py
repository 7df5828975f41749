import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from medseg_diff.diffusion.masks import IGNORED
from medseg_diff.uncertainty import temperature
from medseg_diff.uncertainty.calibration import Calibration
from medseg_diff.uncertainty.temperature import TemperedLoss, tempered


def world(seed: int, sharpness: float, voxels: int = 60_000) -> tuple[torch.Tensor, np.ndarray]:
    """Labels drawn from a softmax, and the same logits made sharper than they should be."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(3 * rng.normal(size=(3, voxels))).float()
    p = logits.softmax(0).double().numpy()
    labels = (rng.random(voxels) > p.cumsum(0)).sum(0).clip(max=2).astype(np.uint8)
    shape = (40, 50, 30)
    return (sharpness * logits).softmax(0).reshape(3, *shape), labels.reshape(shape)


def test_it_is_a_softmax_of_divided_logits():
    logits = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 5
    found = tempered(logits.softmax(0), 1.7)
    torch.testing.assert_close(found, (logits / 1.7).softmax(0))
    assert torch.equal(found.argmax(0), logits.argmax(0))
    certain = torch.tensor([1.0, 0.0])[:, None]
    assert torch.equal(tempered(certain, 3.0), certain)


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 1.3, 2.5])
def test_it_finds_by_how_much_a_network_is_too_sure(sharpness):
    loss = TemperedLoss()
    for seed in (0, 1):
        loss.add(*world(seed, sharpness))
    found, before, after = loss.best()
    assert found == pytest.approx(sharpness, rel=0.02)
    assert after <= before
    assert sharpness == 1.0 or after < before - 1e-3


def test_it_is_the_minimum_of_the_loss_that_evaluation_reports(monkeypatch):
    """Counted in parts, it is what scipy finds with all voxels at hand, and the NLL that `evaluate` counts."""
    p, labels = world(0, 1.9)
    monkeypatch.setattr(temperature, "VOXELS_AT_ONCE", 7001)
    loss = TemperedLoss()
    loss.add(p, labels)
    found, before, after = loss.best()

    def nll(log_t: float) -> float:
        calibration = Calibration()
        calibration.add(tempered(p, math.exp(log_t)).numpy(), labels)
        return calibration.measures().nll

    exact = minimize_scalar(nll, bounds=(math.log(0.25), math.log(4)), method="bounded", options={"xatol": 1e-5})
    assert found == pytest.approx(math.exp(exact.x), rel=2e-3)
    assert before == pytest.approx(nll(0), rel=1e-5)
    assert after == pytest.approx(exact.fun, rel=1e-4)


def test_certain_errors_cost_as_much_as_evaluation_says():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = TemperedLoss()
    loss.add(p, np.array([0, 0]))
    assert loss.sums / 2 == pytest.approx(np.full(33, -math.log(1e-6) / 2))


def test_a_network_that_is_always_right_goes_to_the_sharp_end():
    p = torch.tensor([[0.8, 0.3], [0.2, 0.7]])
    loss = TemperedLoss()
    loss.add(p, np.array([0, 1]))
    assert loss.best()[0] == 0.25


def test_nothing_counted_is_said():
    with pytest.raises(ValueError, match="add a case"):
        TemperedLoss().best()


def test_what_is_to_be_ignored_is_not_counted():
    p = torch.rand(2, 20, 6, generator=torch.Generator().manual_seed(0)).softmax(0)
    reference = np.random.default_rng(1).integers(0, 2, (20, 6)).astype(np.uint8)
    whole, half = TemperedLoss(), TemperedLoss()
    whole.add(p, np.where(np.arange(20)[:, None] < 10, reference, np.uint8(IGNORED)))
    half.add(p[:, :10], reference[:10])
    assert whole.voxels == half.voxels == 60
    np.testing.assert_allclose(whole.sums, half.sums)
