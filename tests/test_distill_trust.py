"""Trustworthy maximization: what recalibration does, in numbers worked out by hand, and that it makes targets as sure
as they are right."""

import math

import numpy as np
import pytest
import torch

from detgpt.evaluation.metrics import expected_calibration_error
from finetune.distill.sparse import top
from finetune.distill.trust import (
    SMOOTHING_RANGE,
    TEMPERATURE_RANGE,
    Target,
    first_choices,
    fit,
    likelihood_loss,
    plain,
    smoothed,
    temperature_loss,
    tempered,
)

T = (1.0, 2.0)


def test_a_temperature_worked_out_by_hand():
    """Probabilities 16, 4, 1, 1, 1, 1 of 24: at temperature 2 they go as 4, 2, 1, 1, 1, 1, of 10."""
    kept = top(torch.tensor([[16.0, 4.0, 1.0, 1.0, 1.0, 1.0]]).log(), 2)
    target = tempered(kept, T, 2.0, 6)
    torch.testing.assert_close(target.log_q.exp(), torch.tensor([[0.4, 0.2]]))
    torch.testing.assert_close(target.log_tail.exp(), torch.tensor([0.4]))
    torch.testing.assert_close(tempered(kept, T, 1.0, 6).log_q, plain(kept, T).log_q)


@pytest.mark.parametrize("temperature", [0.4, 0.9, 1.3, 3.0])
def test_a_tempered_target_is_a_distribution_in_the_same_order(temperature):
    kept = top(3 * torch.randn(20, 40, generator=torch.Generator().manual_seed(1)), 5)
    target = tempered(kept, T, temperature, 40)
    torch.testing.assert_close(target.log_q.exp().sum(1) + target.log_tail.exp(), torch.ones(20))
    assert (target.log_q.diff(dim=1) <= 0).all()


def test_a_smoothing_worked_out_by_hand():
    """A tenth of 0.8 goes to the other two in equal parts; the tail keeps its 0.05."""
    target = Target(torch.tensor([[7, 8, 9]]), torch.tensor([[0.8, 0.1, 0.05]]).log(), torch.tensor([0.05]).log())
    less = smoothed(target, 0.1)
    torch.testing.assert_close(less.log_q.exp(), torch.tensor([[0.72, 0.14, 0.09]]))
    torch.testing.assert_close(less.log_tail, target.log_tail)
    torch.testing.assert_close(smoothed(target, 0.0).log_q, target.log_q)


def test_the_likelihood_of_a_true_token_is_its_own_or_that_of_all_others():
    target = Target(torch.tensor([[7, 8]] * 2), torch.tensor([[0.5, 0.3]] * 2).log(), torch.tensor([0.2] * 2).log())
    loss = likelihood_loss(target, torch.tensor([8, 1]))
    assert loss.tolist() == pytest.approx([-math.log(0.3), -math.log(0.2)])
    assert temperature_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), 2.0).item() == pytest.approx(
        math.log(1 + math.exp(-1))
    )


@pytest.fixture(scope="module")
def overconfident():
    """(logits, labels): a teacher that is twice as sure in its logits as the labels deserve."""
    chance = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(4000, 60, generator=chance)
    labels = torch.multinomial(honest.softmax(-1), 1, generator=chance)[:, 0]
    return 2 * honest, labels


def test_the_fitted_temperature_is_the_true_one_and_makes_the_target_as_sure_as_it_is_right(overconfident):
    logits, labels = overconfident
    kept = top(logits, 5)
    found = fit(lambda t: likelihood_loss(tempered(kept, T, t, 60), labels), TEMPERATURE_RANGE)
    assert found == pytest.approx(2, abs=0.1)
    assert fit(lambda t: temperature_loss(logits, labels, t), TEMPERATURE_RANGE) == pytest.approx(2, abs=0.1)
    before = expected_calibration_error(*_lists(plain(kept, T), labels))
    after = expected_calibration_error(*_lists(tempered(kept, T, found, 60), labels))
    assert before > 0.2 and after < 0.03


def test_a_fitted_smoothing_makes_the_answers_likelier_and_keeps_the_first_choice(overconfident):
    logits, labels = overconfident
    target = plain(top(logits, 5), T)
    share = fit(lambda e: likelihood_loss(smoothed(target, e), labels), SMOOTHING_RANGE)
    assert 0.05 < share < 0.5
    assert likelihood_loss(smoothed(target, share), labels).mean() < likelihood_loss(target, labels).mean()
    sure, right = first_choices(target, labels)
    less_sure, still_right = first_choices(smoothed(target, share), labels)
    assert np.mean(right) == pytest.approx(np.mean(still_right), abs=0.02)
    assert abs(less_sure.mean() - right.mean()) < abs(sure.mean() - right.mean())


def _lists(target, labels):
    confidence, right = first_choices(target, labels)
    return confidence.tolist(), right.tolist()
