"""grpo.py against naive float64 loops, torch.distributions, finite differences and exact laws."""

import math
import statistics
import sys

import pytest
import torch
from conftest import ROOT
from torch.distributions import Categorical, Normal, kl_divergence

from grpo import (
    chunked_token_log_probs,
    clipped_loss,
    completion_mask,
    gaussian_kl,
    group_advantages,
    k3_kl,
    sde_step,
    token_log_probs,
)

sys.path.insert(0, str(ROOT / "gpu"))

from memory import LiveBytes  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- advantages ----


def test_advantages_equal_a_loop():
    rewards = [[0.1, 0.9, 0.4], [0.2, 0.35, 0.0], [0.6, 1.0, 0.8]]  # a row is a group
    advantages, kept = group_advantages(torch.tensor(rewards), eps=0.05)
    for i, group in enumerate(rewards):
        for j, reward in enumerate(group):
            expected = (reward - statistics.fmean(group)) / (statistics.pstdev(group) + 0.05)
            assert advantages[i, j].item() == pytest.approx(expected, abs=1e-5)
    assert kept.shape == (3, 1) and kept.all()


def test_flat_groups_are_exactly_zero_and_left_out():
    rewards = torch.tensor([[0.3, 0.319, 0.31], [0.3, 0.321, 0.31]])  # ranges 0.019 and 0.021
    advantages, kept = group_advantages(rewards)
    assert kept.tolist() == [[False], [True]]
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).any()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[0.1], [0.3]], "groups, G"),
        ([0.1, 0.3], "groups, G"),
        ([[0.1, math.nan]], "NaN"),
        ([[0.1, math.inf]], "infinite"),
    ],
)
def test_advantage_errors(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards))


# ---- completion mask ----


@pytest.mark.parametrize(
    ("row", "ends", "expected"),
    [
        ([5, 6, 2, 2, 2], [2], [1, 1, 1, 0, 0]),  # pad = end: the first is kept
        ([5, 3, 6, 2, 0], [2, 3], [1, 1, 0, 0, 0]),  # several end ids
        ([5, 6, 7, 8, 9], [2, 3], [1, 1, 1, 1, 1]),  # truncated
    ],
)
def test_completion_mask_cases(row, ends, expected):
    mask = completion_mask(torch.tensor([row]), ends)
    assert mask.dtype == torch.bool
    assert mask[0].tolist() == [bool(value) for value in expected]


# ---- token log-probs ----

both_ways = pytest.mark.parametrize("function", [token_log_probs, chunked_token_log_probs])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_logits(dtype=torch.float32, shape=(3, 21, 11)):
    return (3 * torch.randn(shape)).to(dtype), torch.randint(0, shape[2], shape[:2])


@both_ways
@both_dtypes
def test_token_log_probs_equal_a_loop(function, dtype):
    logits, ids = make_logits(dtype)
    log_probs = function(logits, ids, temperature=0.7)
    assert log_probs.dtype == torch.float32
    for b, rows in enumerate(logits.double().tolist()):
        for t, row in enumerate(rows):
            total = math.fsum(math.exp(value / 0.7) for value in row)
            expected = row[ids[b, t]] / 0.7 - math.log(total)
            assert log_probs[b, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_level": -0.1},
        {"velocity": torch.zeros(1, 4, 1)},
        {"next_sample": torch.zeros(2, 4, 3)},
    ],
)
def test_a_step_that_cannot_be_is_refused(change):
    zeros = torch.zeros(1, 4, 3)
    given = {"velocity": zeros, "sample": zeros, "next_sample": zeros}
    given |= {"sigma": 0.8, "sigma_next": 0.6, "noise_level": 0.7}
    with pytest.raises(ValueError, match="need 1 >= sigma|align them"):
        sde_step(**given | change)


@both_ways
@pytest.mark.parametrize("shape", [(3, 20), (2, 21)])
def test_logits_and_ids_of_different_lengths_are_refused(function, shape):
    logits, _ = make_logits()
    with pytest.raises(ValueError):
        function(logits, torch.zeros(shape, dtype=torch.long))


@both_ways
@both_dtypes
def test_token_log_probs_have_the_gradient_of_a_categorical(function, dtype):
    logits, ids = make_logits(dtype)
    weights = torch.randn(ids.shape)
    logits.requires_grad_()
    (function(logits, ids, temperature=1.3) * weights).sum().backward()
    exact = logits.detach().double().requires_grad_()
    (Categorical(logits=exact / 1.3).log_prob(ids) * weights).sum().backward()
    assert logits.grad.dtype == dtype
    rounding = 0 if dtype == torch.float32 else 2**-8  # of bf16
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=rounding + 1e-5)


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [(chunked_token_log_probs, 2, 16), (token_log_probs, 32, 48)],
)
def test_token_log_probs_memory_at_a_real_vocabulary(function, forward, backward):
    """In fp32 copies of the logits of one row, of 16. Chunked, backward: twice the bf16 gradient,
    because the rows' gradients are put together at the end.
    """
    with torch.device("meta"):  # computes nothing
        logits = torch.zeros(16, 4, 151_936, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(16, 4, dtype=torch.long)
    row = 4 * 151_936 * 4  # bytes
    with LiveBytes([logits]) as counter:
        log_probs = function(logits, ids)
        assert counter.peak == pytest.approx(forward * row, rel=0.05)
        log_probs.sum().backward()
    assert counter.peak == pytest.approx(backward * row, rel=0.05)


# ---- clipped loss ----


def naive_loss(new, old, advantages, mask, count, low, high):
    total = 0.0
    for b in range(len(new)):
        for t in range(len(new[b])):
            if mask[b][t]:
                rho = math.exp(new[b][t] - old[b][t])
                inside = max(1 - low, min(1 + high, rho))
                total -= min(rho * advantages[b], inside * advantages[b])
    return total / count


def test_clipped_loss_and_gradient_equal_a_loop():
    new = torch.randn(4, 6, requires_grad=True)
    old = new.detach() + 0.3 * torch.randn(4, 6)
    advantages = torch.tensor([1.5, -0.7, 0.4, -1.2])
    mask = torch.rand(4, 6) < 0.7
    fixed = [x.double().tolist() for x in (old, advantages)]
    loss, _ = clipped_loss(new, old, advantages[:, None], mask, 17, 0.15, 0.25)
    loss.backward()
    values = new.detach().double().tolist()
    assert loss.item() == pytest.approx(naive_loss(values, *fixed, mask, 17, 0.15, 0.25), abs=1e-6)
    for b in range(4):
        for t in range(6):
            sides = []
            for shift in (1e-5, -1e-5):
                moved = [list(row) for row in values]
                moved[b][t] += shift
                sides.append(naive_loss(moved, *fixed, mask, 17, 0.15, 0.25))
            assert new.grad[b, t].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_stops_the_gradient_on_one_side_of_each_sign(sign):
    ratios = torch.tensor([[0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0]])
    new = ratios.log().requires_grad_()
    mask = torch.ones(1, 7, dtype=torch.bool)
    loss, stats = clipped_loss(new, torch.zeros(1, 7), torch.tensor([[sign]]), mask, 7)
    loss.backward()
    stopped = ratios[0] > 1.28 if sign > 0 else ratios[0] < 0.8
    assert (new.grad[0] == 0).tolist() == stopped.tolist()
    expected = -sign * ratios[0][~stopped] / 7
    torch.testing.assert_close(new.grad[0][~stopped], expected)
    assert stats["clipped_high"] == pytest.approx(2 / 7 if sign > 0 else 0)
    assert stats["clipped_low"] == pytest.approx(0 if sign > 0 else 2 / 7)
    assert stats["ratio"] == pytest.approx(ratios.mean().item(), abs=1e-6)
    assert stats["ratio_error"] == pytest.approx(1.0, abs=1e-6)


def test_padding_may_hold_anything():
    new = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    old = torch.tensor([[-1.1, -2.0, -math.inf]])
    mask = torch.tensor([[True, False, False]])
    loss, stats = clipped_loss(new, old, torch.tensor([[1.0]]), mask, 1)
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1), abs=1e-6)
    assert new.grad[0].tolist() == [pytest.approx(-math.exp(0.1), abs=1e-6), 0, 0]
    assert stats["ratio"] == pytest.approx(math.exp(0.1), abs=1e-6)
    assert stats["ratio_error"] == pytest.approx(math.exp(0.1) - 1, abs=1e-6)


def test_clipped_loss_errors():
    square = torch.zeros(3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="need"):  # would broadcast along the tokens
        clipped_loss(square, square, torch.ones(3), mask, 9)
    with pytest.raises(ValueError, match="need"):  # would broadcast the old log-probs
        clipped_loss(square, square[:1], torch.ones(3, 1), mask, 9)
    with pytest.raises(ValueError, match="count > 0"):
        clipped_loss(square, square, torch.ones(3, 1), ~mask, 0)
    for bad in (math.nan, 100.0):
        with pytest.raises(FloatingPointError, match="rho"):
            clipped_loss(square + bad, square, torch.ones(3, 1), mask, 9)


# ---- KL ----


def make_categoricals():
    return [(1.5 * torch.randn(7)).double() for _ in range(2)]


def test_k3_is_unbiased_for_the_exact_kl():
    logits, ref_logits = make_categoricals()
    policy, reference = Categorical(logits=logits), Categorical(logits=ref_logits)
    tokens = policy.sample((100_000,))
    k3 = k3_kl(policy.log_prob(tokens), reference.log_prob(tokens)).double()
    standard_error = k3.std().item() / math.sqrt(len(tokens))
    exact = kl_divergence(policy, reference).item()
    assert exact > 20 * standard_error  # so the test has power
    assert k3.mean().item() == pytest.approx(exact, abs=4 * standard_error)


def test_k3s_gradient_is_that_of_the_forward_kl():
    """Expectation over all 7 tokens, exactly: it is not the gradient of the KL that k3 measures."""
    logits, ref_logits = make_categoricals()
    logits.requires_grad_()
    policy, reference = Categorical(logits=logits), Categorical(logits=ref_logits)
    tokens = torch.arange(7)
    expected_k3 = (
        policy.probs.detach() * k3_kl(policy.log_prob(tokens), reference.log_prob(tokens))
    ).sum()
    (gradient,) = torch.autograd.grad(expected_k3, logits, retain_graph=True)
    (forward,) = torch.autograd.grad(kl_divergence(reference, policy), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad(kl_divergence(policy, reference), logits)
    torch.testing.assert_close(gradient, forward, atol=1e-5, rtol=0)
    assert (gradient - reverse).abs().max() > 0.05


def test_k3_is_finite_and_has_no_gradient_above_the_bound():
    log_prob = torch.zeros(2, requires_grad=True)
    k3 = k3_kl(log_prob, torch.tensor([100.0, 4.0]), bound=3.0)
    k3.sum().backward()
    assert k3.tolist() == pytest.approx([math.exp(3) - 4] * 2, rel=1e-5)
    assert log_prob.grad.tolist() == [0, 0]
    assert k3_kl(torch.zeros(1), torch.full((1,), 100.0)).isfinite().all()


def test_gaussian_kl_is_that_of_torch():
    mean, mean_ref = torch.randn(2, 5, 4, 3, 3).bfloat16()
    kl = gaussian_kl(mean, mean_ref, 0.3)
    exact = kl_divergence(Normal(mean.double(), 0.3), Normal(mean_ref.double(), 0.3))
    torch.testing.assert_close(kl.double(), exact.flatten(1).mean(1), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="ODE"):  # where std is 0
        gaussian_kl(mean, mean_ref, 0.0)


# ---- flow step ----

MEAN, STD = 1.5, 0.5  # of x0 in one dimension; eps is standard normal


def marginal(sigma):
    """Mean and variance of x_sigma = (1 - sigma) x0 + sigma eps."""
    return (1 - sigma) * MEAN, ((1 - sigma) * STD) ** 2 + sigma**2


def velocity_at(x, sigma):
    """E[eps - x0 | x_sigma = x] by linear regression: both are jointly Gaussian with x_sigma."""
    mean, variance = marginal(sigma)
    covariance = sigma - (1 - sigma) * STD**2
    return -MEAN + covariance / variance * (x - mean)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.3, 0.1), (1.0, 0.75)])
def test_sde_mean_is_the_reverse_sde_in_score_form(sigma, sigma_next):
    """dx = (v - s^2 / 2 * score) dt + s dw, with the exact score of the Gaussian marginal."""
    x = torch.randn(64, 1)
    velocity = velocity_at(x, sigma)
    _, _, mean, std = sde_step(velocity, x, sigma, sigma_next, 0.7)
    below_one = sigma_next if sigma == 1 else sigma
    s = 0.7 * math.sqrt(sigma / (1 - below_one))
    center, variance = marginal(sigma)
    score = -(x.double() - center) / variance
    dt = sigma_next - sigma
    expected = x.double() + (velocity.double() - s**2 / 2 * score) * dt
    torch.testing.assert_close(mean.double(), expected, atol=1e-5, rtol=1e-5)
    assert std == pytest.approx(s * math.sqrt(-dt))


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_sde_and_ode_have_the_flows_marginals(noise_level):
    samples, steps = 20_000, 360
    center, variance = marginal(0.95)
    x = center + math.sqrt(variance) * torch.randn(samples, 1)
    start = x
    for step in range(steps):
        sigma, sigma_next = 0.95 - 0.9 * step / steps, 0.95 - 0.9 * (step + 1) / steps
        x, *_ = sde_step(velocity_at(x, sigma), x, sigma, sigma_next, noise_level)
        if (step + 1) % 90 == 0:  # sigma 0.725, 0.5, 0.275, 0.05
            center, variance = marginal(sigma_next)
            assert x.mean().item() == pytest.approx(center, abs=4 * math.sqrt(variance / samples))
            tolerance = 4 * variance * math.sqrt(2 / samples)
            assert x.var().item() == pytest.approx(variance, abs=tolerance)
    correlation = torch.corrcoef(torch.cat([start, x], 1).T)[0, 1].item()
    assert correlation > 0.9999 if noise_level == 0 else correlation < 0.5  # noise was really drawn


@pytest.mark.parametrize(("sigma", "sigma_next", "noise_level"), [(0.8, 0.6, 0.0), (0.2, 0.0, 0.7)])
def test_without_noise_it_is_eulers_step(sigma, sigma_next, noise_level):
    velocity, x, given = torch.randn(3, 4, 2, 3)
    dt = sigma_next - sigma
    next_sample, log_prob, mean, std = sde_step(velocity, x, sigma, sigma_next, noise_level)
    assert log_prob is None and std == 0
    assert torch.equal(next_sample, x + dt * velocity)
    assert torch.equal(mean, next_sample)
    replayed, log_prob, _, _ = sde_step(velocity, x, sigma, sigma_next, noise_level, given)
    assert log_prob is None and torch.equal(replayed, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_gives_the_same_log_prob_bitwise(dtype):
    velocity, x = torch.randn(2, 6, 4, 8, 8).to(dtype)
    sampled = sde_step(velocity, x, 0.7, 0.6, 0.8)
    replayed = sde_step(velocity, x, 0.7, 0.6, 0.8, next_sample=sampled[0])
    for first, second in zip(sampled[:3], replayed[:3]):
        assert first.dtype == second.dtype == torch.float32
        assert torch.equal(first, second)
    other = sde_step(velocity + 0.1, x, 0.7, 0.6, 0.8, next_sample=sampled[0])
    assert not torch.equal(other[1], sampled[1])


def test_log_prob_is_the_mean_of_normals_and_so_is_its_gradient():
    velocity, x, given = torch.randn(3, 5, 2, 3)
    velocity.requires_grad_()
    _, log_prob, mean, std = sde_step(velocity, x, 0.7, 0.6, 0.8, given)
    exact = Normal(mean.double(), std).log_prob(given.double()).flatten(1).mean(1)
    torch.testing.assert_close(log_prob.double(), exact, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(log_prob.sum(), velocity, retain_graph=True)
    (expected,) = torch.autograd.grad(exact.sum(), velocity)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert gradient.abs().min() > 0


def test_sampling_with_gradient_scores_as_replay_does():
    """A gradient through the action too would cancel to zero."""
    velocity, x = torch.randn(2, 5, 4)
    velocity.requires_grad_()
    next_sample, log_prob, *_ = sde_step(velocity, x, 0.7, 0.6, 0.8)
    _, replayed, *_ = sde_step(velocity, x, 0.7, 0.6, 0.8, next_sample.detach())
    (gradient,) = torch.autograd.grad(log_prob.sum(), velocity)
    (expected,) = torch.autograd.grad(replayed.sum(), velocity)
    assert torch.equal(gradient, expected)
    assert gradient.abs().max() > 0.01


def test_noise_of_a_generator_does_not_depend_on_the_batch():
    velocity, x = torch.randn(2, 3, 4, 2)

    def step(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sde_step(velocity[rows], x[rows], 0.7, 0.6, 0.8, generator=generators)[0]

    assert torch.equal(step([0, 1, 2])[2:], step([2]))
    same = [torch.Generator().manual_seed(5) for _ in range(3)]
    next_sample, _, mean, _ = sde_step(velocity, x, 0.7, 0.6, 0.8, generator=same)
    noise = next_sample - mean
    torch.testing.assert_close(noise[0], noise[1], atol=1e-6, rtol=0)


def test_sde_step_errors():
    x = torch.zeros(2, 3)
    for sigma, sigma_next in [(0.5, 0.5), (1.1, 0.9), (0.5, -0.1)]:
        with pytest.raises(ValueError, match="sigma"):
            sde_step(x, x, sigma, sigma_next, 0.7)
    with pytest.raises(ValueError):
        sde_step(x, x, 0.5, 0.4, 0.7, generator=[torch.Generator()])
