"""The comparators' own mathematics; what they share with the package is tested there."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from comparators import audit, mc_dropout, ssn, temperature
from comparators.judge import bootstrap, differences, judge_case
from comparators.protocol import Run as BenchmarkRun
from comparators.protocol import configuration, model_of, over_volume

from medseg_diff.checkpoint import build
from medseg_diff.config import Config
from medseg_diff.config_file import parse_config
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.layouts import Dataset

NAMES = {0: "background", 1: "core", 2: "shell"}


def config_of(kind: str, dims: int = 3) -> Config:
    data = {"root": "nowhere", "spacing_mm": [1, 1, 1], "spatial_dims": dims, "size": [16] * dims, "axis": 1}
    content = {"data": data, "network": {"kind": kind, "widths": [8, 8, 8, 8]}, "train": {"precision": "fp32"}}
    return parse_config(content, "test")


def volume_of(shape: tuple[int, int, int] = (13, 17, 18)) -> Volume:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (1, *shape), generator=generator, dtype=torch.uint8)
    return Volume("case", torch.randn(1, *shape, generator=generator), labels, ())


def model(network: torch.nn.Module, config: Config):
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model_of(network, config, Dataset(Path(), "test", NAMES, ("MR",), (), "MR"))


class TestStochasticNetwork:
    def test_likelihood_is_that_of_enumerated_masks(self):
        """Over all masks of four voxels the likelihoods of a mixture add up to 1, and each is what products say."""
        logits = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(0))
        total = 0.0
        for labels in itertools.product((0, 1), repeat=4):
            found = ssn.negative_log_likelihood(logits, torch.tensor([labels]))
            p = logits.softmax(2)[:, 0].numpy()
            by_hand = np.mean([np.prod([p[m, label, i] for i, label in enumerate(labels)]) for m in range(3)])
            assert math.exp(-4 * found) == pytest.approx(by_hand, rel=1e-5)
            total += by_hand
        assert total == pytest.approx(1)

    def test_draws_have_the_covariance_of_their_parameters(self):
        """Factors tie voxels together, the diagonal does not."""
        generator = torch.Generator().manual_seed(0)
        parameters = torch.randn(1, 2 * (2 + ssn.RANK), 3, generator=generator)
        drawn = ssn.draw_logits(parameters, 100_000, generator)[:, 0].flatten(1).numpy()
        grouped = parameters[0].reshape(2 + ssn.RANK, 6).numpy()
        covariance = grouped[2:].T @ grouped[2:] + np.diag(np.exp(grouped[1]))
        assert drawn.mean(0) == pytest.approx(grouped[0], abs=0.06)
        assert np.cov(drawn.T) == pytest.approx(covariance, abs=0.25)

    def test_samples_repeat_by_seed_and_their_probabilities_add_up(self):
        config = config_of("unet")
        net = model(ssn.build(config, 1, 3), config)
        first, again, other = (ssn.predict(net, volume_of(), 9, seed) for seed in (1, 1, 2))
        assert first[0].sum(0) == pytest.approx(1, abs=1e-5)
        assert (first[1] == again[1]).all()
        assert (first[1] != other[1]).any()
        assert first[1].shape == (9, 13, 17, 18)


def test_dropout_stays_active_in_prediction_and_its_mean_is_the_input():
    config = config_of("unet")
    net = model(mc_dropout.build(config, 1, 3), config)
    assert not net.network.training
    probabilities, samples = mc_dropout.predict(net, volume_of(), 3, 0)
    assert (samples[0] != samples[1]).any()
    assert probabilities.sum(0) == pytest.approx(1, abs=1e-5)
    dropped = mc_dropout.Dropout()(torch.ones(2000, 16, 1, 1, 1))
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert (dropped == 0).float().mean() == pytest.approx(mc_dropout.SHARE, abs=0.01)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_over_a_volume_is_what_inference_makes_of_it(dims: int):
    from comparators import ours

    config = config_of("unet", dims)
    net = model(build(config, 1, 3), config)
    volume = volume_of()
    found = over_volume(net.network, config, volume.image).softmax(0).numpy()
    assert found == pytest.approx(ours.predict(net, volume, 0, 0)[0], abs=1e-5)


def test_temperature_of_a_fold_ignores_its_own_cases():
    """Honest probabilities but for the cases of fold 0, which say the opposite: they alone don't feel them."""
    rng = np.random.default_rng(0)
    cases, references = [], []
    for index in range(10):
        p = rng.uniform(0.02, 0.98, (12, 12, 12)).astype(np.float32)
        drawn = rng.random(p.shape) < p
        cases.append(np.stack([1 - p, p]))
        references.append((drawn if index % temperature.FOLDS else ~drawn).astype(np.uint8))
    found = temperature.cross_fitted(cases, references)
    assert found[0] == pytest.approx(1, abs=0.1)
    assert all(t > 1.3 for t in found[1:])


class TestBootstrap:
    def test_interval_of_a_known_mean(self):
        """Independent cases: the normal interval, 1.96 / sqrt(n) to either side."""
        apart = np.random.default_rng(0).normal(0.3, 1, (1, 400))
        low, high = bootstrap(apart, draws=4000)
        assert low == pytest.approx(apart.mean() - 1.96 / 20, abs=0.01)
        assert high == pytest.approx(apart.mean() + 1.96 / 20, abs=0.01)

    def test_seeds_that_differ_widen_it(self):
        """A seed's cases stand or fall together; the cases alone would say nothing of it."""
        apart = np.repeat([[-1.0], [0.0], [1.0]], 40, axis=1)
        low, high = bootstrap(apart, draws=2000)
        assert low < -0.6
        assert high > 0.6

    def test_pairs_are_of_the_same_case_and_seed(self):
        """Cases of unlike difficulty cancel, in whatever order they come; what one side lacks is left out."""

        def result(shift: float, names: str) -> dict:
            return {"cases": [{"name": n, "dice/a": ord(n) / 200 + shift, "dice/b": 0.0, "crps/a": 9.0} for n in names]}

        found = differences([result(0.2, "abc"), result(0.4, "abc")], [result(0.0, "cba"), result(0.0, "dcba")], "dice")
        assert found == pytest.approx(np.array([[0.1] * 3, [0.2] * 3]))


def test_a_case_is_judged_by_its_samples():
    """Two cubes, drawn too small and too large by one layer each time: everything by hand."""
    reference = np.zeros((12, 12, 12), np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    small, large = reference.copy(), reference.copy()
    small[5] = 0
    large[6, 2:6, 2:6] = 1
    probabilities = np.stack([reference == 0, reference == 1]).astype(np.float32)
    volume = Volume("case", torch.zeros(1, 12, 12, 12), torch.from_numpy(reference[None]), ())
    names = {0: "background", 1: "core"}
    found = judge_case(probabilities, np.stack([small, large]), volume, names, (1.0, 1.0, 1.0))
    assert found["dice/core"] == 1
    assert found["one_sample/core"] == pytest.approx((2 * 48 / 112 + 2 * 64 / 144) / 2)
    assert found["agreement/core"] == pytest.approx(2 * 48 / 128)
    assert found["coverage/core"] == 1
    assert found["width/core"] == pytest.approx(0.9 * 32 / 64)
    assert found["ged2/core"] == pytest.approx((1 - 48 / 64) + (1 - 64 / 80) - (1 - 48 / 80))
    alone = judge_case(probabilities, None, volume, names, (1.0, 1.0, 1.0))
    assert (alone["width/core"], alone["crps/core"], alone["agreement/core"]) == (0, 0, 1)


class TestAudit:
    @pytest.fixture(scope="class")
    def net(self):
        config = config_of("conditional")
        return model(build(config, 1, 3), config)

    def test_at_pure_noise_the_denoiser_sees_no_state(self, net):
        from comparators.ours import predict

        config, volume = net.about.config, volume_of()
        plain = predict(net, volume, 3, 0)[1].copy()
        with audit.replaced(net, audit.noise(config, 0)):
            assert (predict(net, volume, 3, 0)[1] == plain).all()
        x_0 = audit.coarse_mask(volume.labels[0], (13, 17, 18), config, 3)
        with audit.replaced(net, audit.forced(x_0, config, 0)):
            assert (predict(net, volume, 3, 0)[1] != plain).any()
        assert (predict(net, volume, 3, 0)[1] == plain).all(), "nothing is left behind"

    def test_noise_has_the_variance_of_the_state(self, net):
        config = net.about.config
        level, scale = torch.tensor([0.7]), config.diffusion.scale
        found, _ = audit.noise(config, 0)(torch.empty(1, 1, 3, 40, 40, 40), level)
        signal = torch.where(torch.rand(found.shape) < 0.5, scale, -scale)
        state = audit.input_scale_wiener(level[0], scale) * audit.add_noise(signal, torch.randn(found.shape), level[0])
        assert found.std() == pytest.approx(float(state.std()), rel=0.02)


def test_runs_that_differ_are_kept_apart(tmp_path: Path):
    base = {"method": "unet", "config": "hippocampus", "seed": 0, "minutes": 7.0, "data": tmp_path, "work": tmp_path}
    changes = [{}, {"seed": 1}, {"minutes": 0.7}, {"labelled": 10}, {"cases": 3}, {"samples": 16}, {"method": "ssn"}]
    runs = [BenchmarkRun(**{**base, **change}) for change in changes]
    assert len({run.path for run in runs}) == len(runs)
    assert runs[0].trained == runs[4].trained == runs[5].trained, "one training serves every way to judge it"
    assert configuration(runs[1]).seed == 1
