"""What a student loses, and what is kept of its teacher: against values worked out by hand, and against the defects
of FIRST's released code."""

import math

import pytest
import torch

from finetune.distill.loss import dense_kl, sparse_kl
from finetune.distill.sparse import Kept, drawn, narrowed, tail_at, top
from finetune.distill.trust import plain

VOCABULARY = 50
GENERATOR = torch.Generator().manual_seed(0)


def logits(rows: int = 6, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCABULARY, generator=GENERATOR)


def free_softmax(target, start, steps=4000):
    """The distribution (N, V) that loses least, by Adam."""
    student = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sparse_kl(student, *target).sum().backward()
        optimizer.step()
        schedule.step()
    return student.detach().softmax(-1)


def test_a_divergence_worked_out_by_hand():
    """q = (1/2, 1/4 | 1/4), s = (1/4, 1/4, 1/4, 1/4): ½ log 2 + ¼ log 1 + ¼ log ½."""
    target = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log()
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert sparse_kl(torch.zeros(1, 4), *target).item() == pytest.approx(expected, abs=1e-6)
    # Without a tail (random sampling): q = (2/3, 1/3), s as before.
    sampled = torch.tensor([[0, 1]]), torch.tensor([[2 / 3, 1 / 3]]).log()
    expected = 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3)
    assert sparse_kl(torch.zeros(1, 4), *sampled).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_a_student_that_is_its_teacher_loses_nothing_and_learns_nothing(k):
    student = logits().requires_grad_()
    target = plain(top(student.detach(), k), (1.0, 2.0))
    loss = sparse_kl(student, *target)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e-6
    other = logits().requires_grad_()
    sparse_kl(other, *target).sum().backward()
    assert other.grad.abs().max() > 0.01


def test_the_minimiser_over_a_free_softmax_is_the_teacher():
    teacher = logits()
    kept = top(teacher, 5)
    found = free_softmax(plain(kept, (1.0, 2.0)), logits())
    true = teacher.softmax(-1)
    assert (found.gather(1, kept.ids) - true.gather(1, kept.ids)).abs().max() < 1e-3
    assert (found.scatter(1, kept.ids, 0).sum(1) - true.scatter(1, kept.ids, 0).sum(1)).abs().max() < 1e-3
    whole = top(teacher, VOCABULARY)
    assert (free_softmax(plain(whole, (1.0, 2.0)), logits()) - true).abs().max() < 1e-3


def test_log_probabilities_are_not_taken_for_probabilities():
    """Renormalised as such, ℓ / Σℓ, they turn the ranking round: the least likely token would get the most."""
    teacher = torch.tensor([[4.0, 2.0, 1.0, 0.0, -2.0]])
    kept = top(teacher, 3)
    wrong = kept.logprobs / kept.logprobs.sum(-1, keepdim=True)
    assert wrong[0, 0] < wrong[0, 1] < wrong[0, 2]
    found = free_softmax(plain(kept, (1.0, 2.0)), torch.zeros(1, 5))
    assert found[0, 0] > found[0, 1] > found[0, 2]


def test_the_students_logits_are_not_taken_for_probabilities():
    """A second softmax would make any student nearly uniform, so that none could be as sure as its teacher."""
    teacher = torch.tensor([[8.0, 0.0, 0.0, 0.0]])
    target = plain(top(teacher, 2), (1.0, 2.0))
    assert sparse_kl(teacher, *target).item() < 1e-6
    assert sparse_kl(teacher.softmax(-1), *target).item() > 0.3
    assert free_softmax(target, torch.zeros(1, 4))[0, 0] == pytest.approx(teacher.softmax(-1)[0, 0].item(), abs=1e-3)


def test_the_minimiser_is_not_one_hot_on_the_teachers_first_choice():
    teacher = torch.tensor([[1.0, 0.6, 0.2, 0.0]])
    found = free_softmax(plain(top(teacher, 2), (1.0, 2.0)), torch.zeros(1, 4))
    assert found[0, 0] == pytest.approx(teacher.softmax(-1)[0, 0].item(), abs=1e-3)
    assert found[0, 0] < 0.5


def test_mass_outside_the_kept_tokens_is_punished():
    """Renormalised over the kept tokens these students are all alike."""
    teacher = torch.tensor([[3.0, 2.0, 0.0, 0.0, 0.0]])
    target = plain(top(teacher, 2), (1.0, 2.0))
    losses = [sparse_kl(torch.tensor([[3.0, 2.0, outside, 0.0, 0.0]]), *target).item() for outside in (0, 2, 4, 8)]
    assert losses[0] < 1e-6 and losses == sorted(losses) and losses[-1] > 3
    emptied = sparse_kl(torch.tensor([[3.0, 2.0, -9.0, -9.0, -9.0]]), *target).item()
    assert emptied > 0.01  # and so is too little of it


def test_a_loss_is_finite_where_a_student_is_sure_and_where_a_teacher_is():
    sure = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 60.0, 0.0, 0.0]]).requires_grad_()
    for teacher in (sure, torch.zeros(1, 4)):
        loss = sparse_kl(other, *plain(top(teacher, 2), (1.0, 2.0)))
        (gradient,) = torch.autograd.grad(loss.sum(), other)
        assert loss.isfinite().all() and gradient.isfinite().all() and loss.item() > 1


def test_half_precision_students_lose_what_others_do():
    student, target = logits(), plain(top(logits(), 5), (1.0, 2.0))
    rounded = student.bfloat16()
    torch.testing.assert_close(sparse_kl(rounded, *target), sparse_kl(rounded.float(), *target))


def test_the_whole_vocabularys_divergence_is_that_of_all_tokens_kept():
    student, teacher = logits(), logits()
    target = plain(top(teacher, VOCABULARY), (1.0, 2.0))
    torch.testing.assert_close(dense_kl(student, teacher), sparse_kl(student, *target), atol=1e-5, rtol=1e-5)


def test_what_is_kept_of_a_distribution():
    """Probabilities 4, 2, 1, 1 of 8; at temperature 2 the tail's are √(1/8) each."""
    kept = top(torch.tensor([[1.0, 4.0, 1.0, 2.0]]).log(), 2, (1.0, 2.0))
    assert kept.ids.tolist() == [[1, 3]]
    torch.testing.assert_close(kept.logprobs.exp(), torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(kept.tails.exp(), torch.tensor([[0.25, 2 * math.sqrt(1 / 8)]]))


def test_the_tail_at_any_temperature_comes_from_those_that_are_kept():
    teacher = logits(200)
    kept = top(teacher, 5)
    rest = teacher.log_softmax(-1).scatter(1, kept.ids, -torch.inf)
    for temperature, most in ((0.5, 0.03), (0.8, 0.03), (1.3, 0.02), (1.7, 0.02), (3.0, 0.02), (8.0, 0.02)):
        total = (teacher.log_softmax(-1) / temperature).logsumexp(1)
        true = ((rest / temperature).logsumexp(1) - total).exp()
        ours = tail_at(kept, (1.0, 2.0), temperature, VOCABULARY)
        found = (ours - torch.logaddexp((kept.logprobs / temperature).logsumexp(1), ours)).exp()
        assert (found - true).abs().mean() < most, temperature
    for place, temperature in enumerate((1.0, 2.0)):
        torch.testing.assert_close(tail_at(kept, (1.0, 2.0), temperature, VOCABULARY), kept.tails[:, place])
    with pytest.raises(ValueError, match="nothing is known of the tail"):
        tail_at(kept, (), 1.0, VOCABULARY)


def test_fewer_of_the_kept_tokens_are_what_would_have_been_kept():
    teacher = logits()
    for k in (5, 12):
        for ours, theirs in zip(narrowed(top(teacher, 12, (1.0, 2.0)), k, (1.0, 2.0)), top(teacher, k), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_random_draws_stand_for_the_whole_distribution_without_bias():
    """The mean of many estimates, and of their gradients, is the truth; that of the top tokens alone is not."""
    teacher = logits(1, scale=1.5)
    many = drawn(teacher.expand(40_000, -1), 5, torch.Generator().manual_seed(0))
    weights = many.logprobs.exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(40_000))
    mean = torch.zeros(VOCABULARY).scatter_add(0, many.ids.flatten(), weights.flatten()) / len(weights)
    assert (mean - teacher.softmax(-1)[0]).abs().max() < 0.005
    assert top(teacher, 5).logprobs.exp().sum() < 0.9
    student = torch.zeros(1, VOCABULARY, requires_grad=True)
    (full,) = torch.autograd.grad(dense_kl(student, teacher).sum(), student)
    (sampled,) = torch.autograd.grad(sparse_kl(student.expand(40_000, -1), *plain(many, ())).mean(), student)
    assert (full - sampled).abs().max() < 0.005


def test_draws_hang_on_their_generator_alone_and_count_each_token_once():
    teacher = logits(30, scale=4.0)
    one, other = (drawn(teacher, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.logprobs, other.logprobs)
    for ids, weights in zip(one.ids.tolist(), one.logprobs.tolist(), strict=True):
        counted = [token for token, weight in zip(ids, weights, strict=True) if weight > -math.inf]
        assert sorted(set(ids)) == sorted(counted)
    assert isinstance(one, Kept) and one.tails.shape == (30, 0)
