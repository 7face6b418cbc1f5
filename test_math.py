"""The proof sheet: every law of ddpm.py and d3pm.py, each with a property test.

The name of a test states a theorem, its docstring writes it, its body compares what the code
computes with what a definition says: Bayes' rule by enumeration or by quadrature, the chain walked
one step at a time, a matrix product, autograd, torch.distributions, a sum over every path, sampled
frequencies with their own error bar. Never with the closed form that the code itself uses.

Hypothesis draws the betas, T from 1, the two times 0 <= s < t <= T, the data and the seeds. Every
run draws the same examples; `EXAMPLES=10 pytest` draws ten times as many. All is float64 except
where a test says so, hence the tight tolerances: 1e-9 unless a reason for another stands there.

Tests marked @machinery (errors, devices, networks, files) prove no law of diffusion; all others
stand in the README's table.
"""

import ast
import itertools
import math
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
from torch.distributions import Normal, kl_divergence

import d3pm
import ddpm

torch.set_num_threads(1)
EXAMPLES = int(os.environ.get("EXAMPLES", 1))
settings.register_profile("proof", max_examples=20 * EXAMPLES, derandomize=True, deadline=None,
                          database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("proof")
few = settings(max_examples=5 * EXAMPLES)          # for the tests that sample or sum over paths
HERE = Path(__file__).parent
INF = math.inf


class TorchRandom:
    """Hypothesis seeds torch's generator before each example, so that a failure can be replayed."""
    seed, getstate, setstate = torch.manual_seed, torch.get_rng_state, torch.set_rng_state


hypothesis.register_random(TorchRandom)


@pytest.fixture(autouse=True)
def law(request):
    """Each test runs in float64, and `equal` knows which law it is about."""
    equal.law = f"{request.function.__name__}\n    {request.function.__doc__}"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def equal(left, right, atol=1e-9, rtol=1e-9):
    """left = right within atol + rtol |right|, infinities included; else the law and the worst error.

    Either side may be a tuple of quantities; the right side may be a number or a list, and its
    shape may be narrower than the left's."""
    if isinstance(left, tuple):
        assert len(left) == len(right), f"{equal.law}\n    {len(left)} for {len(right)} quantities"
        for l, r in zip(left, right):
            equal(l, r, atol, rtol)
        return
    left = torch.as_tensor(left, dtype=torch.float64).detach()
    right = torch.as_tensor(right, dtype=torch.float64).detach()
    fits = [b in (1, a) for a, b in zip(left.shape[::-1], right.shape[::-1])]
    assert all(fits) and right.ndim <= left.ndim, \
        f"{equal.law}\n    shape {tuple(left.shape)} should be {tuple(right.shape)}"
    error = torch.where(left == right, 0, (left - right).abs()).nan_to_num(nan=INF)
    excess = torch.where(left == right, -1, error - atol - rtol * right.abs()).nan_to_num(nan=INF)
    if (excess > 0).any():
        worst = int(excess.argmax())
        got, want = left.flatten()[worst].item(), right.expand_as(left).flatten()[worst].item()
        raise AssertionError(f"{equal.law}\n    is false: {got:.12g} should be {want:.12g}, "
                             f"worst error {error.flatten()[worst]:.3g} (allowed: atol {atol:g}, "
                             f"rtol {rtol:g})")


def machinery(test):
    """Marks a test of what surrounds the laws; the README's table leaves it out."""
    test.machinery = True
    return test


# ---------------------------------------------------------------- strategies, all of them bounded

betas = st.floats(1e-4, 0.99)           # at 0.999 six steps would leave alpha_bar at 1e-18
reals = st.floats(-3, 3)
seeds = st.integers(1, 10 ** 6)         # of explicit generators; torch's own is seeded with 0
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)          # (B, ...)
predictions = st.sampled_from(["eps", "x0", "v"])
fractions = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@st.composite
def chains(draw, lowest=0, longest=6, n=2, beta=betas):
    """Arbitrary betas and n increasing times lowest <= s < t <= T. T is as short as it can be,
    s = lowest, t = s + 1 and t = T in many of the draws."""
    T = draw(st.integers(lowest + n - 1, longest))
    times = draw(st.sampled_from(list(itertools.combinations(range(lowest, T + 1), n))))
    return draw(st.lists(beta, min_size=T, max_size=T)), *times


def normal(shape, seed):
    """Standard normal numbers of that shape, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arrays(shape=shapes):
    """Data of any rank, (B, ...)."""
    return st.builds(normal, shape, seeds)


# ---------------------------------------------------------------- definitions to compare with

def per_example(x):
    """(B, ...) -> (B,): the mean over everything but the batch."""
    return x.reshape(len(x), -1).mean(1)


def bits(nats):
    """(B, ...) nats -> (B,) bits per dimension."""
    return per_example(nats) / math.log(2)


def quadrature(low, high, n=100):
    """Gauss-Legendre nodes and weights between low and high (tensors): two (n, ...) tensors."""
    off = torch.arange(1, n, dtype=torch.float64)
    off = off / (4 * off ** 2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))
    nodes, weights = (v.view(-1, *[1] * low.ndim) for v in (nodes, 2 * vectors[0] ** 2))
    return (low + high) / 2 + nodes * (high - low) / 2, weights * (high - low) / 2


def sampled(x, mean, var):
    """The draws x (N, ...) have this mean and variance, to five standard errors."""
    n, var = len(x), torch.as_tensor(var)
    equal((x.mean(0) - mean) / (var / n).sqrt(), 0, atol=5)
    equal((x.var(0) / var - 1) / math.sqrt(2 / n), 0, atol=5)


def frequencies(x, probs):
    """The share of each state among the draws x (int, any shape) is its probability, to five
    standard errors (and five draws, for the rare ones); what has probability 0 is never drawn."""
    n, probs = x.numel(), torch.as_tensor(probs)
    share = torch.bincount(x.flatten(), minlength=len(probs)) / n
    margin = 5 * (probs * (1 - probs) / n).sqrt() + 5 / n * (probs > 0)
    equal((share - probs) / margin.clamp(min=1e-12), 0, atol=1)


# ================================================================ ddpm.py

def gaussian(betas, **options):
    return ddpm.GaussianDiffusion(torch.tensor(betas, dtype=torch.float64), **options)


def walk(betas, s, t):
    """q(x_t | x_s) = N(k x_s, v), walked: x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps_i."""
    k, v = 1.0, 0.0
    for beta in betas[s:t]:
        k, v = math.sqrt(1 - beta) * k, (1 - beta) * v + beta
    return k, v


def given_xt(betas, s, t, xt, m, c):
    """Mean and variance of x_s given x_t, when x_0 ~ N(m, c): Gaussian conditioning.
    With c = 0 it is q(x_s | x_t, x_0 = m)."""
    (ks, vs), (k, v) = walk(betas, 0, s), walk(betas, s, t)
    prior_mean, prior_var = ks * m, ks ** 2 * c + vs
    gain = k * prior_var / (k ** 2 * prior_var + v)
    return prior_mean + gain * (xt - k * prior_mean), prior_var * v / (k ** 2 * prior_var + v)


def reverse_log_var(betas, s, t, f):
    """f log beta + (1 - f) log beta_tilde; at s = 0 the beta_tilde is that of the step above."""
    log_beta, above = math.log(walk(betas, s, t)[1]), (t, t + 1) if s == 0 else (s, t)
    if above[1] > len(betas):
        return f * 0 + log_beta
    return f * log_beta + (1 - f) * math.log(given_xt(betas, *above, 0.0, 0.0, 0.0)[1])


def levels_of(shape, seed, levels):
    """Data on the grid x_k = 2 k / (levels - 1) - 1."""
    k = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed))
    return 2 * k.double() / (levels - 1) - 1


def log_bin(x, mean, log_std, levels):
    """log of the integral of N(mean, std^2) over the bin of level x, and its slope in the mean.

    The nodes lie where the density does: within 40 decay lengths of its highest point in the bin.
    The slope is E[(y - mean) / std^2] over the bin, as for every Gaussian."""
    x, mean, log_std = torch.broadcast_tensors(*map(torch.as_tensor, (x, mean, log_std)))
    std, half = log_std.exp(), 1 / (levels - 1)
    low = torch.where(x < -1 + half, -INF, (x - half - mean) / std)
    high = torch.where(x > 1 - half, INF, (x + half - mean) / std)
    peak = torch.zeros(()).clamp(low, high)
    reach = 40 / (3 + peak.abs())
    z, weight = quadrature(torch.maximum(low, peak - reach), torch.minimum(high, peak + reach))
    log_mass = weight.log() - z ** 2 / 2 - math.log(2 * math.pi) / 2
    return log_mass.logsumexp(0), (log_mass.softmax(0) * z).sum(0) / std


def network(x, t):
    """A smooth network that looks at x and at t."""
    return torch.sin(1.5 * x + 0.7 * t.view(-1, *[1] * (x.ndim - 1)))


def at(t, x):
    """The time t as a network receives it: int64 (B,)."""
    return torch.full((len(x),), t)


def estimate(betas, t, xt, said, prediction):
    """x_0 when the network said `said`: x_t = cos x_0 + sin eps and v = cos eps - sin x_0, solved."""
    cos, sin = walk(betas, 0, t)[0], math.sqrt(walk(betas, 0, t)[1])
    return {"eps": (xt - sin * said) / cos, "x0": said, "v": cos * xt - sin * said}[prediction]


def term(betas, s, t, x0, xt, x0_hat, f, levels=256):
    """The bound's term of the step s -> t, in bits per dimension, put together by hand."""
    log_std = torch.as_tensor(reverse_log_var(betas, s, t, f)) / 2
    if s == 0:
        return bits(-log_bin(x0, x0_hat, log_std, levels)[0])
    (mean, var), (mean_hat, _) = (given_xt(betas, s, t, xt, x, 0.0) for x in (x0, x0_hat))
    return bits(kl_divergence(Normal(mean, math.sqrt(var)), Normal(mean_hat, log_std.exp())))


# ---------------------------------------------------------------- schedules

@given(st.integers(1, 4000))
@example(1)
@example(1000)
def test_linear_schedule_is_evenly_spaced(T):
    """beta_t = 1000 / T (1e-4 + (0.02 - 1e-4) (t - 1) / (T - 1)), at most 0.999."""
    steps = [0.0] if T == 1 else [i / (T - 1) for i in range(T)]
    equal(ddpm.linear_beta_schedule(T),
          [min(1000 / T * (1e-4 + (0.02 - 1e-4) * i), 0.999) for i in steps], atol=0, rtol=1e-12)


@given(st.integers(1, 4000), st.none() | st.floats(1e-3, 0.1))
@example(1, None)
@example(1000, None)
def test_cosine_schedule_makes_alpha_bar_a_squared_cosine(T, s):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2), beta at most 0.999."""
    betas = ddpm.cosine_beta_schedule(T) if s is None else ddpm.cosine_beta_schedule(T, s)
    s = 0.008 if s is None else s
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    equal(betas, [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)], atol=1e-13)


@given(st.integers(1, 4000), st.sampled_from([ddpm.linear_beta_schedule,
                                              ddpm.cosine_beta_schedule]))
def test_schedules_grow_inside_0_1(T, schedule):
    """0 < beta_1 <= beta_2 <= ... <= beta_T < 1, and alpha_bar falls."""
    betas = schedule(T)
    alpha_bar = ddpm.GaussianDiffusion(betas).alpha_bar
    equal((betas, alpha_bar[1:].sort(descending=True).values),
          (betas.clamp(1e-12, 0.999).sort().values, alpha_bar[1:]), atol=0, rtol=0)


@given(chains())
def test_alpha_bar_is_the_product_of_the_alphas(chain):
    """alpha_bar_t = (1 - beta_1) ... (1 - beta_t), and alpha_bar_0 = 1."""
    betas, _, _ = chain
    equal(gaussian(betas).alpha_bar,
          [math.prod(1 - b for b in betas[:t]) for t in range(len(betas) + 1)], atol=0, rtol=1e-12)


# ---------------------------------------------------------------- forward process q

@given(chains(), arrays(), seeds)
@example(([0.3], 0, 1), normal((1,), 1), 1)
def test_transition_is_the_walked_chain(chain, xs, seed):
    """q(x_t | x_s) = N(sqrt(a) x_s, (1 - a) I), a = alpha_bar_t / alpha_bar_s."""
    (betas, s, t), noise = chain, normal(xs.shape, seed)
    k, v = walk(betas, s, t)
    equal(gaussian(betas).q_step(xs, s, t, noise), k * xs + math.sqrt(v) * noise)


@given(chains(), arrays(), seeds)
def test_marginal_is_the_chain_walked_from_the_data(chain, x0, seed):
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)."""
    (betas, _, t), noise, diffusion = chain, normal(x0.shape, seed), gaussian(chain[0])
    (mean, log_var), (k, v) = diffusion.q_marginal(x0, t), walk(betas, 0, t)
    equal((mean, log_var.exp(), diffusion.q_sample(x0, t, noise)),
          (k * x0, v, k * x0 + math.sqrt(v) * noise))


@given(chains(), arrays())
def test_time_zero_is_clean(chain, x0):
    """q(x_0 | x_0) is a point: mean x_0, log-variance -inf."""
    diffusion = gaussian(chain[0])
    equal((*diffusion.q_marginal(x0, 0), diffusion.q_sample(x0, 0)), (x0, -INF, x0), atol=0)


@few
@given(chains(), reals)
def test_sampled_chain_has_the_moments_of_the_closed_form(chain, x0):
    """x_t ~ q(x_t | x_{t-1}) ... q(x_1 | x_0), step by step, and in one draw of q(x_t | x_0)."""
    (betas, _, t), x, diffusion = chain, torch.full((20000,), x0), gaussian(chain[0])
    one_draw = diffusion.q_sample(x, t)
    for i in range(1, t + 1):
        x = diffusion.q_step(x, i - 1, i)
    k, v = walk(betas, 0, t)
    sampled(torch.stack([x, one_draw], 1), k * x0, v)


@given(chains(n=3), arrays())
def test_transitions_compose(chain, x):
    """q(x_t | x_s) is q(x_r | x_s) followed by q(x_t | x_r): means chain, variances add."""
    (betas, s, r, t), o, one, diffusion = chain, 0 * x, torch.ones_like(x), gaussian(chain[0])
    mean = diffusion.q_step(diffusion.q_step(x, s, r, o), r, t, o)
    var = diffusion.q_step(diffusion.q_step(o, s, r, one), r, t, o) ** 2 \
        + diffusion.q_step(o, r, t, one) ** 2
    equal((mean, var), (diffusion.q_step(x, s, t, o), diffusion.q_step(o, s, t, one) ** 2))


@given(chains(lowest=1), arrays(), seeds)
def test_posterior_is_bayes_rule(chain, x0, seed):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0) at every x_s."""
    (betas, s, t), xt = chain, normal(x0.shape, seed)
    mean, log_var = gaussian(betas).q_posterior(x0, xt, t, s)
    xs = mean + (log_var / 2).exp() * normal((3, *x0.shape), seed + 1)
    (ks, vs), (k, v), (kt, vt) = walk(betas, 0, s), walk(betas, s, t), walk(betas, 0, t)
    density = [Normal(m, math.sqrt(var)).log_prob(x) for m, var, x in
               [(kt * x0, vt, xt), (k * xs, v, xt), (ks * x0, vs, xs)]]
    equal(Normal(mean, (log_var / 2).exp()).log_prob(xs) + density[0], density[1] + density[2],
          atol=1e-7)                                    # the densities reach 1e5 where beta = 1e-4


@given(chains(), arrays(), seeds)
def test_posterior_at_time_zero_is_the_data(chain, x0, seed):
    """q(x_0 | x_t, x_0) is a point: mean x_0, log-variance -inf."""
    betas, _, t = chain
    equal(gaussian(betas).q_posterior(x0, normal(x0.shape, seed), t, 0), (x0, -INF), atol=1e-15)


@given(chains(), arrays(), seeds)
def test_left_out_s_is_the_step_before(chain, x0, seed):
    """s = t - 1 where s is left out: posterior, reverse step, bound, sampler."""
    (betas, _, t), xt = chain, normal(x0.shape, seed)
    diffusion, x0 = gaussian(betas, variance=1), levels_of(x0.shape, seed, 256)
    full, short = ([*diffusion.q_posterior(x0, xt, *times), *diffusion.p_reverse(network, xt, *times),
                    diffusion.vlb_term(network, x0, xt, *times),
                    *diffusion.p_sample(network, xt, *times, noise=x0)]
                   for times in ((t, t - 1), (t,)))
    equal(tuple(short), tuple(full), atol=0, rtol=0)


# ---------------------------------------------------------------- eps, x0, v and the score

@given(chains(), arrays(), seeds)
def test_eps_x0_and_v_are_coordinates_of_one_circle(chain, x0, seed):
    """x_t = cos(phi) x_0 + sin(phi) eps and v = d x_t / d phi, where cos(phi)^2 = alpha_bar_t."""
    (betas, _, t), eps, diffusion = chain, normal(x0.shape, seed), gaussian(chain[0])
    k, v = walk(betas, 0, t)
    phi = torch.full_like(x0, math.atan2(math.sqrt(v), k)).requires_grad_()
    xt = phi.cos() * x0 + phi.sin() * eps
    velocity, = torch.autograd.grad(xt.sum(), phi)
    equal((diffusion.predict_x0(xt, t, eps), diffusion.predict_eps(xt, t, x0),
           diffusion.predict_v(x0, eps, t)), (x0, eps, velocity),
          atol=1e-8)                                    # predict_x0 divides by cos, 1e-6 at worst


@given(chains(), arrays(), seeds)
def test_three_predictions_give_one_estimate(chain, x0, seed):
    """Networks that know eps, x_0 or v all give x0_hat = x_0 and the mean of q(x_s | x_t, x_0)."""
    (betas, s, t), eps = chain, normal(x0.shape, seed)
    k, sin = walk(betas, 0, t)[0], math.sqrt(walk(betas, 0, t)[1])
    xt, truth = k * x0 + sin * eps, {"eps": eps, "x0": x0, "v": k * eps - sin * x0}
    reverse = [gaussian(betas, prediction=name, variance=0).p_reverse(
        lambda x, t: truth[name], xt, t, s, clip=False) for name in truth]
    equal(tuple(x for mean, _, x0_hat in reverse for x in (mean, x0_hat)),
          (given_xt(betas, s, t, xt, x0, 0.0)[0], x0) * 3, atol=1e-8)


@given(chains(), st.lists(st.floats(-1, 1), min_size=1, max_size=4), arrays(), predictions)
def test_score_is_the_gradient_of_the_log_density(chain, data, xt, prediction):
    """score = grad log q(x_t) = -E[eps | x_t] / sqrt(1 - alpha_bar_t); here x_0 is one of n points."""
    (betas, _, t), data = chain, torch.tensor(data)
    k, v = walk(betas, 0, t)

    def log_q(x):
        return Normal(k * data, math.sqrt(v)).log_prob(x[..., None])       # (..., n), each point's

    def exact(x, t):
        x0 = (log_q(x).softmax(-1) * data).sum(-1)
        eps = (x - k * x0) / math.sqrt(v)
        return {"eps": eps, "x0": x0, "v": k * eps - math.sqrt(v) * x0}[prediction]

    x = xt.clone().requires_grad_()
    gradient, = torch.autograd.grad(log_q(x).logsumexp(-1).sum(), x)
    equal(gaussian(betas, prediction=prediction, variance=0).score(exact, xt, t), gradient,
          rtol=1e-7)


# ---------------------------------------------------------------- reverse process p

@given(chains(), arrays(), seeds, predictions, st.booleans())
def test_reverse_mean_is_the_posterior_mean_at_the_estimate(chain, xt, seed, prediction, clip):
    """E p(x_s | x_t) = E q(x_s | x_t, x_0 = x0_hat), x0_hat clipped to [-1, 1] if asked to."""
    betas, s, t = chain
    x0_hat = estimate(betas, t, xt, network(xt, at(t, xt)), prediction)
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    mean, _, guess = gaussian(betas, prediction=prediction, variance=1).p_reverse(
        network, xt, t, s, clip)
    equal((guess, mean), (x0_hat, given_xt(betas, s, t, xt, x0_hat, 0.0)[0]))


@given(chains(), arrays(), predictions)
def test_reverse_mean_subtracts_the_noise_of_one_step(chain, xt, prediction):
    """[Ho et al. 2020, eq. 11] mean = (x_t - beta / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha)."""
    (betas, s, t), diffusion = chain, gaussian(chain[0], prediction="eps", variance=1)
    (k, beta), (_, v) = walk(betas, s, t), walk(betas, 0, t)
    equal(diffusion.p_reverse(network, xt, t, s, clip=False)[0],
          (xt - beta / math.sqrt(v) * network(xt, at(t, xt))) / k, atol=1e-8)


@given(chains(), arrays(), fractions, seeds)
@example(([0.5], 0, 1), normal((2, 1), 1), 0.0, 1)
@example(([0.5, 0.9], 0, 2), normal((2, 1), 1), 0.0, 1)
@example(([0.5, 0.9], 0, 1), normal((2, 1), 1), 0.0, 1)
def test_variance_lies_between_beta_tilde_and_beta(chain, xt, f, seed):
    """log sigma^2 = f log beta + (1 - f) log beta_tilde, for a fixed f and for f = (v + 1) / 2.

    Where s = 0 the log beta_tilde, -inf, is borrowed from the step above, at t = T from log beta."""
    (betas, s, t), xt = chain, xt.reshape(len(xt), -1)
    v = 2 * normal(xt.shape, seed)
    fixed = gaussian(betas, variance=f).p_reverse(network, xt, t, s)[1]
    learned = gaussian(betas, variance="learned").p_reverse(
        lambda x, t: torch.cat([x, v], 1), xt, t, s)[1]
    equal((fixed, learned), (torch.full_like(xt, reverse_log_var(betas, s, t, f)),
                             torch.as_tensor(reverse_log_var(betas, s, t, (v + 1) / 2))))


@given(chains(lowest=1), reals)
def test_ends_of_the_range_are_exact_for_a_point_and_for_unit_data(chain, m):
    """Var[x_s | x_t] = beta_tilde if x_0 is one point, beta if x_0 ~ N(m, 1)."""
    (betas, s, t), xt = chain, torch.ones(1, 1)
    small, large = (gaussian(betas, variance=f).p_reverse(network, xt, t, s)[1].exp()
                    for f in (0, 1))
    equal((small, large), tuple(given_xt(betas, s, t, 1.0, m, c)[1] for c in (0.0, 1.0)))


# ---------------------------------------------------------------- losses and bound

@given(reals, st.floats(-8, 4), reals, st.floats(-8, 4))
def test_normal_kl_is_the_integral_of_the_log_ratio(mean1, log_var1, mean2, log_var2):
    """KL(p || q) = E_p[log p - log q], for two Gaussians, in nats."""
    values = [torch.tensor(v) for v in (mean1, log_var1, mean2, log_var2)]
    p, q = (Normal(m, (log_var / 2).exp()) for m, log_var in (values[:2], values[2:]))
    x, weight = quadrature(p.mean - 12 * p.stddev, p.mean + 12 * p.stddev)
    integral = (weight * p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x))).sum()
    equal(ddpm.normal_kl(*values).expand(2), torch.stack([integral, kl_divergence(p, q)]), rtol=1e-8)


LOG_STDS = st.floats(-12, 6)


@given(reals, LOG_STDS, st.sampled_from([2, 3, 16, 256]))
@example(0.0, -12.0, 256)
@example(-3.0, -12.0, 2)
def test_decoder_is_a_distribution_over_the_levels(mean, log_std, levels):
    """sum over k of P(x_k) = 1 for every mean and log_std: the outer two bins are open."""
    x = torch.linspace(-1, 1, levels)
    log_p = ddpm.discretized_gaussian_log_likelihood(
        x, torch.full_like(x, mean), torch.full_like(x, log_std), levels)
    equal(log_p.logsumexp(0), 0.0)


@given(reals, LOG_STDS, st.sampled_from([2, 3, 16, 256]))
@example(0.0, -12.0, 256)
@example(3.0, -12.0, 3)
@example(0.0, 6.0, 256)
def test_decoder_is_the_integral_of_the_density_over_the_bin(mean, log_std, levels):
    """log P(x_k) = log of the integral of N(mean, std^2) from x_k - h to x_k + h, h = 1 / (levels - 1).

    And its slope in the mean, which far in both tails must still pull: 1e10 at the extremes here."""
    x = torch.linspace(-1, 1, levels)
    mean, log_std = torch.full_like(x, mean).requires_grad_(), torch.full_like(x, log_std)
    log_p = ddpm.discretized_gaussian_log_likelihood(x, mean, log_std, levels)
    slope, = torch.autograd.grad(log_p.sum(), mean)
    equal((log_p, slope), log_bin(x, mean.detach(), log_std, levels),
          atol=1e-7, rtol=1e-6)                         # a bin of 1e-5 stds loses 5 digits


@given(chains(), shapes, seeds)
def test_prior_term_is_the_kl_to_unit_noise(chain, shape, seed):
    """L_T = KL(q(x_T | x_0) || N(0, I)), in bits per dimension."""
    (betas, _, _), x0 = chain, normal(shape, seed)
    k, v = walk(betas, 0, len(betas))
    equal(gaussian(betas).prior_kl(x0), bits(kl_divergence(Normal(k * x0, math.sqrt(v)),
                                                           Normal(0.0, 1.0))))


@given(chains(lowest=1), arrays(), seeds, predictions, fractions, st.booleans())
def test_bound_term_is_the_kl_from_posterior_to_reverse(chain, x0, seed, prediction, f, clip):
    """L_t = KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in bits per dimension, for s > 0."""
    (betas, s, t), xt = chain, normal(x0.shape, seed)
    x0_hat = estimate(betas, t, xt, network(xt, at(t, xt)), prediction)
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    equal(gaussian(betas, prediction=prediction, variance=f).vlb_term(network, x0, xt, t, s, clip),
          term(betas, s, t, x0, xt, x0_hat, f), rtol=1e-7)


@given(chains(), shapes, seeds, fractions, st.sampled_from([2, 5, 256]), st.booleans())
def test_last_term_is_the_code_length_of_the_data(chain, shape, seed, f, levels, clip):
    """L_0 = -log p(x_0 | x_t): the level's bin under N(x0_hat, sigma^2), in bits per dimension."""
    (betas, _, t), x0, xt = chain, levels_of(shape, seed, levels), normal(shape, seed)
    x0_hat = estimate(betas, t, xt, network(xt, at(t, xt)), "v")
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    diffusion = gaussian(betas, prediction="v", variance=f, levels=levels)
    equal(diffusion.vlb_term(network, x0, xt, t, 0, clip),
          term(betas, 0, t, x0, xt, x0_hat, f, levels), atol=1e-7, rtol=1e-6)


@given(chains(lowest=1), arrays(), seeds, fractions)
def test_kl_is_the_weighted_square_error_of_eps(chain, x0, seed, f):
    """L_t = w |eps - eps_hat|^2 nats, w = beta^2 / (2 sigma^2 alpha (1 - alpha_bar_t)), if
    sigma^2 = beta_tilde; another fixed sigma^2 adds (r - 1 - log r) / 2, r = beta_tilde / sigma^2."""
    (betas, s, t), eps = chain, normal(x0.shape, seed)
    (k, beta), (kt, vt) = walk(betas, s, t), walk(betas, 0, t)
    xt, log_var = kt * x0 + math.sqrt(vt) * eps, reverse_log_var(betas, s, t, f)
    w = beta ** 2 / (2 * math.exp(log_var) * k ** 2 * vt)
    log_r = reverse_log_var(betas, s, t, 0.0) - log_var
    square = w * (eps - network(xt, at(t, xt))) ** 2
    equal(gaussian(betas, variance=f).vlb_term(network, x0, xt, t, s, clip=False),
          bits(square + (math.exp(log_r) - 1 - log_r) / 2), rtol=1e-7)


@given(chains(), arrays(), seeds, predictions)
def test_simple_loss_is_the_square_error_of_the_prediction(chain, x0, seed, prediction):
    """L_simple = mean (target - network)^2, the target being eps, x_0 or v = d x_t / d phi."""
    (betas, _, t), eps = chain, normal(x0.shape, seed)
    k, sin = walk(betas, 0, t)[0], math.sqrt(walk(betas, 0, t)[1])
    target = {"eps": eps, "x0": x0, "v": k * eps - sin * x0}[prediction]
    said = network(k * x0 + sin * eps, at(t, x0))
    losses = (gaussian(betas, prediction=prediction, variance=1).loss_simple(network, x0, t, eps),
              gaussian(betas, prediction=prediction).loss_simple(
                  lambda x, t: torch.cat([network(x, t), x], 1), x0[:, None], t, eps[:, None]))
    equal(losses, (per_example((target - said) ** 2),) * 2)


@given(chains(), shapes, seeds, predictions, fractions)
def test_vlb_loss_is_T_times_the_term(chain, shape, seed, prediction, f):
    """loss_vlb = T L_t, nothing clipped; L_0 at t = 1."""
    (betas, _, t), x0, eps = chain, levels_of(shape, seed, 256), normal(shape, seed)
    k, v = walk(betas, 0, t)
    xt = k * x0 + math.sqrt(v) * eps
    x0_hat = estimate(betas, t, xt, network(xt, at(t, xt)), prediction)
    equal(gaussian(betas, prediction=prediction, variance=f).loss_vlb(network, x0, t, eps),
          len(betas) * term(betas, t - 1, t, x0, xt, x0_hat, f), atol=1e-7, rtol=1e-6)


def hybrid_parts(chain, shape, seed, prediction):
    """Values of the three losses and their gradients in the two halves of a learned network."""
    (betas, _, t), shape = chain, (*shape, 2)
    diffusion, x0 = gaussian(betas, prediction=prediction), levels_of(shape, seed, 256)
    halves = [normal(shape, seed + i).requires_grad_() for i in (1, 2)]
    losses = [loss(lambda x, t: torch.cat(halves, 1), x0, t, normal(shape, seed))
              for loss in (diffusion.loss_simple, diffusion.loss_vlb, diffusion.loss_hybrid)]
    return losses, [torch.autograd.grad(loss.sum(), halves, materialize_grads=True)
                    for loss in losses]


@given(chains(), shapes, seeds, predictions)
def test_hybrid_loss_adds_a_thousandth_of_the_bound(chain, shape, seed, prediction):
    """L_hybrid = L_simple + 1e-3 T L_t; the variance learns from the bound alone."""
    (simple, vlb, hybrid), ((_, none), (_, full), (_, got)) = hybrid_parts(
        chain, shape, seed, prediction)
    equal((hybrid, got, none), (simple + 1e-3 * vlb, 1e-3 * full, 0.0), rtol=1e-8)


@given(chains(), shapes, seeds, predictions)
def test_no_gradient_passes_the_stop(chain, shape, seed, prediction):
    """d L_hybrid / d mean = d L_simple / d mean exactly: T L_t trains the variance, not the mean."""
    _, ((simple, _), _, (hybrid, _)) = hybrid_parts(chain, shape, seed, prediction)
    equal(hybrid - simple, 0.0, atol=0)


@given(chains(lowest=1), seeds, predictions)
def test_bound_trains_the_mean_too(chain, seed, prediction):
    """d (T L_t) / d network is the full gradient: here of the KL written out, by autograd."""
    (betas, _, t), x0, said = chain, normal((2, 3), seed), normal((2, 3), seed + 1).requires_grad_()
    k, v = walk(betas, 0, t)
    xt = k * x0 + math.sqrt(v) * x0.flip(0)
    loss = gaussian(betas, prediction=prediction, variance=0.5).loss_vlb(
        lambda x, t: said, x0, t, x0.flip(0))
    right = len(betas) * term(betas, t - 1, t, x0, xt, estimate(betas, t, xt, said, prediction), 0.5)
    equal(*torch.autograd.grad(loss.sum(), said), *torch.autograd.grad(right.sum(), said), rtol=1e-7)


@few
@given(st.integers(1, 5), st.sampled_from(["loss_simple", "loss_vlb", "loss_hybrid"]))
@example(1, "loss_simple")
def test_training_draws_every_time_alike_and_unit_noise(T, loss):
    """t ~ uniform{1..T}, both ends, each example its own; eps ~ N(0, I)."""
    seen, betas = [], [0.3] * T
    x0 = torch.full((20000, 1), 0.5)
    getattr(gaussian(betas, variance=1), loss)(lambda x, t: seen.append((x, t)) or x, x0)
    (xt, t), = seen
    frequencies(t - 1, torch.full((T,), 1 / T))
    for i in range(1, T + 1):
        k, v = walk(betas, 0, i)
        sampled(xt[t == i], k * 0.5, v)


def off_by(betas, x0, error):
    """A network (eps) that knows x_0 but says x0_hat = x_0 + error: its terms have no noise."""
    def model(x, t):
        kv = [walk(betas, 0, int(i)) for i in t]
        k, v = (torch.tensor(c).view(-1, *[1] * (x.ndim - 1)) for c in zip(*kv))
        return (x - k * (x0 + error)) / v.sqrt()
    return model


@st.composite
def grids(draw, longest=6):
    """Betas, and a strided grid: an increasing list of times that ends at T."""
    T = draw(st.integers(1, longest))
    grid = [t for t in range(1, T) if draw(st.booleans())] + [T]
    return draw(st.lists(betas, min_size=T, max_size=T)), grid


@given(grids(), shapes, seeds, fractions, st.booleans(), st.floats(-0.5, 0.5))
@example(([0.5], [1]), (1,), 1, 0.0, True, 0.1)
def test_bits_per_dim_adds_the_three_parts(chain, shape, seed, f, clip, error):
    """total = L_T + sum of L_t over the grid's steps, L_0 first; and the mean square error of x0_hat."""
    (betas, grid), x0 = chain, levels_of(shape, seed, 256)
    x0_hat = (x0 + error).clamp(-1, 1) if clip else x0 + error
    diffusion = gaussian(betas, variance=f)
    got = diffusion.bits_per_dim(off_by(betas, x0, error), x0, grid, clip)
    terms = torch.stack([term(betas, s, t, x0, 0 * x0, x0_hat, f) for s, t in
                         zip([0] + grid, grid)], 1)
    k, v = walk(betas, 0, len(betas))
    prior = bits(kl_divergence(Normal(k * x0, math.sqrt(v)), Normal(0.0, 1.0)))
    equal((got["prior"], got["terms"], got["total"], got["x0_mse"]),
          (prior, terms, prior + terms.sum(1), per_example((x0_hat - x0) ** 2)[:, None]),
          atol=1e-7, rtol=1e-5)       # estimate -> eps -> estimate loses digits where alpha_bar is 0


@given(chains(), shapes, seeds, fractions)
def test_mean_of_the_vlb_loss_over_t_is_the_sum_of_the_terms(chain, shape, seed, f):
    """(1 / T) sum over t of T L_t = L_0 + L_1 + ... : one random t is an unbiased estimate."""
    (betas, _, _), x0 = chain, levels_of(shape, seed, 256)
    T, diffusion, model = len(betas), gaussian(betas, variance=f), off_by(betas, x0, 0.1)
    losses = torch.stack([diffusion.loss_vlb(model, x0, t) for t in range(1, T + 1)])
    sums = sum(term(betas, t - 1, t, x0, 0 * x0, x0 + 0.1, f) for t in range(1, T + 1))
    equal(losses.mean(0), sums, atol=1e-7, rtol=1e-5)


@given(st.integers(1, 300), st.integers(1, 320))
@example(1, 1)
@example(1000, 50)
@example(1000, 2)
@example(1000, 999)
def test_strided_grid_is_even_and_keeps_both_ends(T, n):
    """S_i = 1 + (i - 1) (T - 1) / (n - 1) to the nearest whole, halves up; all of 1..T if n >= T."""
    even = [T] if n == 1 else list(range(1, T + 1)) if n >= T else \
        [math.floor(1 + Fraction(i * (T - 1), n - 1) + Fraction(1, 2)) for i in range(n)]
    diffusion = gaussian([0.1] * T)
    equal((diffusion.timesteps(n), diffusion.timesteps(), diffusion.timesteps(even)),
          (even, list(range(1, T + 1)), even), atol=0)


@few
@given(chains(), shapes, seeds)
def test_strided_chain_at_full_stride_is_the_chain(chain, shape, seed):
    """With S = 1..T the strided bound and samples are the ordinary ones."""
    (betas, _, _), x0 = chain, levels_of(shape, seed, 256)
    T, diffusion, results = len(betas), gaussian(betas, variance=0), []
    for steps in (None, T, list(range(1, T + 1))):
        torch.manual_seed(seed)
        bound = diffusion.bits_per_dim(network, x0, steps)
        results += [(bound["total"], bound["terms"], diffusion.sample(network, shape, steps))]
    equal(results[1] + results[2], results[0] * 2, atol=0, rtol=0)


@given(chains(longest=5, beta=st.floats(0.05, 0.9)), reals, st.floats(0.05, 4), reals)
@example(([0.5, 0.5], 0, 1), 1.0, 1.0, 0.0)
def test_bound_is_tight_for_gaussian_data(chain, m, c, x0):
    """If x_0 ~ N(m, c), with the exact reverse step, the true q(x_T) as prior and the density for
    L_0, then L_T + sum of L_t + L_0 = -log p(x_0) at every x_0, for every T."""
    (betas, _, _), T = chain, len(chain[0])
    c = 1.0 if T == 1 else c          # at T = 1 sigma^2 can only be beta, exact for unit variance

    def exact(x, t):
        t = int(t[0])
        mean, _ = given_xt(betas, 0, t, x, m, c)
        (k, v), (_, want) = walk(betas, 0, t), given_xt(betas, t - 1, t, 0.0, m, c)
        small, large = (reverse_log_var(betas, t - 1, t, f) for f in (0.0, 1.0))
        f = (math.log(want) - small) / (large - small) if large != small else 1.0
        return torch.cat([(x - k * mean) / math.sqrt(v), torch.full_like(x, 2 * f - 1)], 1)

    diffusion, data, total = gaussian(betas), torch.full((2, 1), x0), 0.0
    for t in range(1, T + 1):         # each term is a square in eps: its mean is that over eps = +-1
        k, v = walk(betas, 0, t)
        xt = k * data + math.sqrt(v) * torch.tensor([[1.0], [-1.0]])
        mean, log_var, _ = diffusion.p_reverse(exact, xt, t, clip=False)
        total += diffusion.vlb_term(exact, data, xt, t, clip=False).mean() * math.log(2) if t > 1 \
            else -Normal(mean, (log_var / 2).exp()).log_prob(data).mean()
    k, v = walk(betas, 0, T)
    prior = kl_divergence(Normal(torch.tensor(k * x0), math.sqrt(v)),
                          Normal(torch.tensor(k * m), math.sqrt(k * k * c + v)))
    equal(prior + total, -Normal(m, math.sqrt(c)).log_prob(torch.tensor(x0)), atol=1e-7)


@few
@given(st.lists(st.floats(0.2, 0.9), min_size=1, max_size=3), fractions,
       st.sampled_from(["x0", "v"]), st.booleans())
def test_bound_is_never_below_minus_log_p(betas, f, prediction, clip):
    """L_T + sum of L_t + L_0 >= -log p(x_0), p(x_0) the integral over every path x_T ... x_1, x_0;
    and p sums to 1 over the levels."""
    T, levels, x0 = len(betas), 5, torch.linspace(-1, 1, 5)
    diffusion = gaussian(betas, prediction=prediction, variance=max(f, 0.2), levels=levels)
    x, weight = quadrature(torch.tensor([-9.0]), torch.tensor([9.0]), 200)
    density = Normal(0.0, 1.0).log_prob(x).exp() * weight                     # (nodes, 1)
    mass, noise = density.clone(), x
    bound = diffusion.prior_kl(x0[:, None])
    for t in range(T, 0, -1):
        mean, log_var, _ = diffusion.p_reverse(network, x, t, clip=clip)
        if t > 1:
            mass = (Normal(mean, (log_var / 2).exp()).log_prob(x.T).exp() * mass).sum(0)[:, None] \
                * weight
        k, v = walk(betas, 0, t)
        xt = (k * x0 + math.sqrt(v) * noise).reshape(-1, 1)                   # (nodes * levels, 1)
        terms = diffusion.vlb_term(network, x0.repeat(len(x))[:, None], xt, t, clip=clip)
        bound = bound + (terms.view(-1, levels) * density).sum(0)
    p = (log_bin(x0, mean, log_var / 2, levels)[0].exp() * mass).sum(0)
    equal((p.sum(), (-p.log2() - bound).clamp(min=0)), (1.0, 0.0), atol=1e-6)


@given(betas, st.lists(reals, min_size=1, max_size=3), st.integers(0, 255))
def test_one_step_is_a_variational_autoencoder(beta, said, level):
    """T = 1: total = KL(N(sqrt(1 - beta) x_0, beta) || N(0, 1)) - log p(x_0 | x_1)."""
    said = torch.tensor([said])
    x0 = torch.full_like(said, 2 * level / 255 - 1)
    encoder = Normal(math.sqrt(1 - beta) * x0, math.sqrt(beta))
    decoder = log_bin(x0, said.clamp(-1, 1), torch.tensor(math.log(beta) / 2), 256)[0]
    diffusion = gaussian([beta], prediction="x0", variance=0)
    equal(diffusion.bits_per_dim(lambda x, t: said, x0)["total"],
          bits(kl_divergence(encoder, Normal(0.0, 1.0)) - decoder), atol=1e-7, rtol=1e-6)


# ---------------------------------------------------------------- samplers

@given(chains(), arrays(), seeds, predictions, fractions, st.booleans())
def test_ancestral_step_draws_from_the_reverse_process(chain, xt, seed, prediction, f, clip):
    """x_s = mean + sigma z; on reaching 0 no noise is added: x_0 = x0_hat."""
    (betas, s, t), z = chain, normal(xt.shape, seed)
    x0_hat = estimate(betas, t, xt, network(xt, at(t, xt)), prediction)
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    sigma = math.exp(reverse_log_var(betas, s, t, f) / 2) if s else 0.0
    diffusion = gaussian(betas, prediction=prediction, variance=f)
    equal(diffusion.p_sample(network, xt, t, s, z, clip=clip),
          (given_xt(betas, s, t, xt, x0_hat, 0.0)[0] + sigma * z, x0_hat), atol=1e-8)


@given(chains(), arrays(), seeds, predictions, fractions, st.booleans())
def test_ddim_step_turns_towards_the_estimate(chain, xt, seed, prediction, eta, clip):
    """[Song et al. 2020, eq. 12] x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2)
    eps_hat + sigma z, sigma^2 = eta^2 beta_tilde; eps_hat belongs to the clipped x0_hat."""
    (betas, s, t), z, (kt, vt) = chain, normal(xt.shape, seed), walk(chain[0], 0, chain[2])
    x0_hat = estimate(betas, t, xt, network(xt, at(t, xt)), prediction)
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    (ks, vs), var = walk(betas, 0, s), eta ** 2 * given_xt(betas, s, t, 0.0, 0.0, 0.0)[1]
    xs = ks * x0_hat + math.sqrt(vs - var) * (xt - kt * x0_hat) / math.sqrt(vt) + math.sqrt(var) * z
    diffusion = gaussian(betas, prediction=prediction, variance=0.3)
    equal(diffusion.p_sample(network, xt, t, s, z, eta, clip), (xs, x0_hat), atol=1e-8)


@given(chains(), arrays(), seeds, st.booleans())
def test_ddim_at_eta_one_is_ancestral_with_beta_tilde(chain, xt, seed, clip):
    """eta = 1: x_s ~ q(x_s | x_t, x0_hat), DDPM's step with the small variance."""
    (betas, s, t), z = chain, normal(xt.shape, seed)
    diffusion = gaussian(betas, variance=0)
    xs, x0_hat = diffusion.p_sample(network, xt, t, s, z, 1.0, clip)
    mean, var = given_xt(betas, s, t, xt, x0_hat, 0.0)
    equal((xs, diffusion.p_sample(network, xt, t, s, z, None, clip)[0]),
          (mean + math.sqrt(var) * z,) * 2, atol=1e-8)


@given(chains(), arrays(), fractions)
def test_ddim_keeps_the_marginals(chain, x0, eta):
    """If x0_hat = x_0 then x_t ~ q(x_t | x_0) goes to x_s ~ q(x_s | x_0), whatever eta."""
    (betas, s, t), o, one = chain, 0 * x0, torch.ones_like(x0)
    (kt, vt), (ks, vs) = walk(betas, 0, t), walk(betas, 0, s)
    diffusion = gaussian(betas, prediction="x0", variance=0)

    def xs(x0, eps, z):
        return diffusion.p_sample(lambda x, t: x0, kt * x0 + math.sqrt(vt) * eps, t, s, z, eta,
                                  clip=False)[0]

    equal((xs(x0, o, o), xs(o, one, o) ** 2 + xs(o, o, one) ** 2), (ks * x0, vs))


@few
@given(chains(lowest=1), reals, fractions, st.sampled_from([None, 0.5]))
def test_step_noise_is_standard_normal(chain, xt, f, eta):
    """Without `noise`, x_s - mean has the variance sigma^2 of the step."""
    (betas, s, t), xt = chain, torch.full((20000, 1), xt)
    x0_hat, tilde = torch.tensor(0.3), given_xt(betas, s, t, 0.0, 0.0, 0.0)[1]
    diffusion = gaussian(betas, prediction="x0", variance=f)
    xs, _ = diffusion.p_sample(lambda x, t: 0 * x + 0.3, xt, t, s, eta=eta)
    mean, (ks, vs), (kt, vt) = given_xt(betas, s, t, xt[0], x0_hat, 0.0)[0], walk(betas, 0, s), \
        walk(betas, 0, t)
    if eta is None:
        return sampled(xs, mean, math.exp(reverse_log_var(betas, s, t, f)))
    mean = ks * x0_hat + math.sqrt(vs - eta ** 2 * tilde) * (xt[0] - kt * x0_hat) / math.sqrt(vt)
    sampled(xs, mean, eta ** 2 * tilde)


@given(grids(), shapes, seeds, st.sampled_from([None, 0.0, 0.7]), st.booleans())
def test_sampler_walks_the_grid_down_to_clean_data(chain, shape, seed, eta, clip):
    """x_T, then one reverse step for each neighbour pair of 0 = S_0 < S_1 < ... < S_n = T."""
    (betas, grid), seen = chain, []
    diffusion = gaussian(betas, variance=0.5)

    def model(x, t):
        seen.append((x, t))
        return network(x, t)

    torch.manual_seed(seed)
    s, xs, x0_hat = zip(*diffusion.sample_progressive(model, shape, grid, eta, clip))
    torch.manual_seed(seed)
    last = diffusion.sample(network, shape, grid, eta, clip)
    inputs, times = zip(*seen)
    guesses = [estimate(betas, t, x, network(x, at(t, x)), "eps") for x, t in
               zip(inputs, grid[::-1])]
    guesses = [g.clamp(-1, 1) if clip else g for g in guesses]
    equal((list(s), torch.stack(times)[:, 0], torch.stack([*inputs[1:], last]), torch.stack(x0_hat),
           last), (([0] + grid[:-1])[::-1], grid[::-1], torch.stack(xs), torch.stack(guesses),
                   guesses[-1]), atol=1e-8)


@given(grids(), shapes, predictions)
def test_deterministic_ddim_is_a_function_of_the_noise(chain, shape, prediction):
    """eta = 0: x_S = sqrt(alpha_bar_S) x0_hat + sqrt(1 - alpha_bar_S) eps_hat down the whole grid."""
    (betas, grid), seen = chain, []
    result = gaussian(betas, prediction=prediction, variance=1).sample(
        lambda x, t: seen.append(x) or network(x, t), shape, grid, eta=0.0, clip=False)
    x = seen[0]
    for s, t in zip(([0] + grid[:-1])[::-1], grid[::-1]):
        (ks, vs), (kt, vt) = walk(betas, 0, s), walk(betas, 0, t)
        x0_hat = estimate(betas, t, x, network(x, at(t, x)), prediction)
        x = ks * x0_hat + math.sqrt(vs / vt) * (x - kt * x0_hat)
    equal(result, x, atol=1e-6, rtol=1e-6)     # dividing by sqrt(alpha_bar) magnifies at each step


@few
@given(st.floats(-0.8, 0.8), st.floats(0.02, 3), st.sampled_from([[1, 3, 4], [2, 4], None]))
def test_sampler_with_the_exact_denoiser_returns_gaussian_data(m, c, steps):
    """x_0 ~ N(m, c) in, N(m, c) out, at every stride: with E[eps | x_t] and the exact variance.
    (At s = 0 no noise is added: the result is E[x_0 | x_t], short of c by Var[x_0 | x_t].)"""
    betas, grid = [0.3, 0.5, 0.9, 1 - 1e-7], steps or [1, 2, 3, 4]

    def exact(x, t):
        t = int(t[0])
        s, (k, v) = max([0] + [r for r in grid if r < t]), walk(betas, 0, t)
        mean, want = given_xt(betas, 0, t, x, m, c)[0], given_xt(betas, s, t, 0.0, m, c)[1]
        small, large = (reverse_log_var(betas, s, t, f) for f in (0.0, 1.0))
        f = (math.log(want) - small) / (large - small) if large != small else 1.0
        return torch.cat([(x - k * mean) / math.sqrt(v), torch.full_like(x, 2 * f - 1)], 1)

    x0 = gaussian(betas).sample(exact, (20000, 1), steps, clip=False)
    sampled(x0, m, c - given_xt(betas, 0, grid[0], 0.0, m, c)[1])


@few
@given(st.floats(-1, 1), st.floats(0.1, 3))
def test_ddim_without_noise_follows_the_probability_flow(m, c):
    """eta = 0, x_0 ~ N(m, c): as T grows x_0 -> m + sqrt(c / (alpha_bar_T c + 1 - alpha_bar_T))
    (x_T - sqrt(alpha_bar_T) m), with an error that falls like 1 / T; encoding goes the same way up."""
    errors = []
    for T in (100, 200):
        betas = [6 / T] * T

        def exact(x, t):
            (k, v), x0 = walk(betas, 0, int(t[0])), given_xt(betas, 0, int(t[0]), x, m, c)[0]
            return (x - k * x0) / math.sqrt(v)

        diffusion, seen, (k, v) = gaussian(betas, variance=0), [], walk(betas, 0, T)
        x0 = diffusion.sample(lambda x, t: seen.append(x) or exact(x, t), (8, 1), eta=0.0, clip=False)
        flow = m + math.sqrt(c / (k * k * c + v)) * (seen[0] - k * m)
        errors.append((x0 - flow).abs().max())
        up = diffusion.ddim_encode(exact, flow)
        equal((x0, up), (flow, seen[0]), atol=12 / T * (1 + 1 / c))
    equal(errors[1] / errors[0], 0.5, atol=0.15)


@given(grids(), arrays())
def test_encoding_is_ddim_run_backwards(chain, x0):
    """x_t = sqrt(alpha_bar_t) x0_hat + sqrt(1 - alpha_bar_t) eps_hat, with eps_hat = network(x_s, t)
    and x0_hat = (x_s - sqrt(1 - alpha_bar_s) eps_hat) / sqrt(alpha_bar_s)."""
    (betas, grid), x = chain, x0
    for s, t in zip([0] + grid, grid):
        (ks, vs), (kt, vt), eps = walk(betas, 0, s), walk(betas, 0, t), network(x, at(t, x))
        x = kt * (x - math.sqrt(vs) * eps) / ks + math.sqrt(vt) * eps
    equal(gaussian(betas, variance=1).ddim_encode(network, x0, grid), x, atol=1e-8)


@given(grids(), arrays())
def test_encoding_and_decoding_are_inverse_when_eps_depends_on_t_alone(chain, x0):
    """sample(x_T = ddim_encode(x_0), eta = 0) = x_0: the two differ only in where eps_hat is taken."""
    (betas, grid), diffusion = chain, gaussian(chain[0], variance=1)

    def clock(x, t):
        return 0 * x + torch.cos(t.double()).view(-1, *[1] * (x.ndim - 1))

    x = diffusion.ddim_encode(clock, x0, grid)
    for s, t in zip(([0] + grid[:-1])[::-1], grid[::-1]):
        x, _ = diffusion.p_sample(clock, x, t, s, eta=0.0, clip=False)
    equal(x, x0, atol=1e-7)


@few
@given(st.lists(betas, min_size=1, max_size=3), st.floats(-1, 1), st.floats(0.3, 0.7))
def test_langevin_settles_at_the_noised_data(betas, x0, snr):
    """x <- x + h score + sqrt(2 h) z, h = 2 snr^2 (1 - alpha_bar_t), for one data point: it settles
    at N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) / (1 - snr^2)), q(x_t | x_0) as snr -> 0."""
    seen = []

    def exact(x, t):
        seen.append((x, int(t[0])))
        k, v = walk(betas, 0, int(t[0]))
        return (x - k * x0) / math.sqrt(v)

    result = gaussian(betas, variance=0).langevin(exact, (10000, 1), corrector_steps=80, snr=snr)
    levels = [seen[80 * i] for i in range(1, len(betas) + 1)]      # what each level left to the next
    for (x, _), t in zip(levels, range(len(betas), 0, -1)):
        k, v = walk(betas, 0, t)
        sampled(x, k * x0, v / (1 - snr ** 2))
    equal(([t for _, t in seen[:-1:80]], result), (list(range(len(betas), 0, -1)), x0))


# ---------------------------------------------------------------- numbers, batches, devices, errors

SCHEDULES = {"linear": ddpm.linear_beta_schedule, "cosine": ddpm.cosine_beta_schedule,
             "constant": lambda T: torch.full((T,), 1e-4)}


@given(st.sampled_from(list(SCHEDULES)), st.sampled_from([1, 10, 1000, 4000]), st.data())
def test_float32_coefficients_are_exact_to_1e_5(name, T, data):
    """Every coefficient that reaches float32 data is within 1e-5 of the walked chain's, T up to 4000."""
    t = data.draw(st.sampled_from([1, T]) | st.integers(1, T))
    s = data.draw(st.sampled_from([0, t - 1]) | st.integers(0, t - 1))
    betas, one = SCHEDULES[name](T), torch.ones(1, 1, dtype=torch.float32)
    d, o, betas = ddpm.GaussianDiffusion(betas, "x0", 0.3), 0 * one, betas.tolist()
    (k, v), (ks, vs), (kt, vt) = walk(betas, s, t), walk(betas, 0, s), walk(betas, 0, t)
    left = (d.q_step(one, s, t, o), d.q_step(o, s, t, one), d.q_sample(one, t, o),
            d.q_sample(o, t, one), d.q_posterior(one, o, t, s)[0], d.q_posterior(o, one, t, s)[0],
            d.q_marginal(o, t)[1].exp(), d.q_posterior(o, o, t, s)[1].exp(),
            d.predict_x0(one, t, o), d.predict_x0(o, t, one), d.predict_eps(one, t, o),
            d.predict_eps(o, t, one), d.predict_v(one, o, t), d.predict_v(o, one, t),
            d.p_reverse(lambda x, t: x, o, t, s)[1].exp())
    assert all(x.dtype == torch.float32 for x in left), equal.law
    right = (k, v ** 0.5, kt, vt ** 0.5, given_xt(betas, s, t, 0.0, 1.0, 0.0)[0],
             given_xt(betas, s, t, 1.0, 0.0, 0.0)[0], vt, given_xt(betas, s, t, 0.0, 0.0, 0.0)[1],
             1 / kt, -vt ** 0.5 / kt, vt ** -0.5, -kt / vt ** 0.5, -vt ** 0.5, kt,
             math.exp(reverse_log_var(betas, s, t, 0.3)))
    equal(left, tuple(map(float, right)), atol=0, rtol=1e-5)


@given(st.lists(betas, min_size=3, max_size=6), arrays(st.just((3, 2, 2))), seeds)
def test_each_gaussian_example_has_its_own_time(betas, x, seed):
    """f(x, s, t)_i = f(x_i, s_i, t_i): no example sees another; times are ints or (B,), mixed."""
    pick, diffusion = torch.Generator().manual_seed(seed), gaussian(betas)
    s = torch.randint(len(betas), (3,), generator=pick)
    t = s + 1 + (torch.rand(3, generator=pick) * (len(betas) - s)).long()
    x0, z = levels_of(x.shape, seed, 256), normal(x.shape, seed)

    def model(x, t):
        return torch.cat([network(x, t), network(2 * x, t)], 1)

    def laws(i, s, t):
        d, a, b, c = diffusion, x0[i], x[i], z[i]
        return (d.q_step(b, s, t, c), *d.q_marginal(a, t), d.q_sample(a, t, c),
                *d.q_posterior(a, b, t, s), d.predict_x0(b, t, c), d.predict_eps(b, t, a),
                d.predict_v(a, c, t), d.score(model, b, t), *d.p_reverse(model, b, t, s),
                d.prior_kl(a), d.vlb_term(model, a, b, t, s), d.loss_simple(model, a, t, c),
                d.loss_vlb(model, a, t, c), d.loss_hybrid(model, a, t, c),
                *d.p_sample(model, b, t, s, c), *d.p_sample(model, b, t, s, c, eta=0.5))

    single = [laws(slice(i, i + 1), int(s[i]), int(t[i])) for i in range(3)]
    start = [laws(slice(i, i + 1), 0, t[i:i + 1]) for i in range(3)]
    equal(laws(slice(None), s, t) + laws(slice(None), 0, t),
          tuple(torch.cat(v) for v in [*zip(*single), *zip(*start)]), atol=1e-12)


@machinery
def test_gaussian_tables_stay_float64_and_out_of_checkpoints():
    """.half() and the like leave the tables float64; the state dictionary is empty."""
    diffusion, x = gaussian([1e-4, 0.3]), torch.ones(1, 1)
    before = diffusion.q_posterior(x, x, 2)
    for module in (diffusion.half(), diffusion.bfloat16(), diffusion.float()):
        assert module.alpha_bar.dtype == torch.float64 and not module.state_dict(), equal.law
        equal(module.q_posterior(x, x, 2), before, atol=0, rtol=0)


@machinery
@pytest.mark.parametrize("variance", ["learned", 0.5])
def test_gaussian_diffusion_runs_on_another_device(variance):
    """Losses, bound and samplers stay on the data's device (meta: shapes without numbers)."""
    d = gaussian([0.1] * 4, variance=variance).to("meta")
    net = tiny_unet(2, 4 if variance == "learned" else 2).to("meta")
    x = torch.zeros(3, 2, 8, 8, device="meta")
    t = torch.ones(3, dtype=torch.int64, device="meta")
    bound = d.bits_per_dim(net, x, 2)
    per_batch = [loss(net, x, time) for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid)
                 for time in (None, 2, t)] + [d.prior_kl(x), bound["total"], bound["prior"]]
    images = [*d.q_marginal(x, 0), *d.q_posterior(x, x, t, 0), *d.p_reverse(net, x, t),
              d.score(net, x, t), d.q_step(x, 0, t), d.sample(net, x.shape, 2),
              d.sample(net, x.shape, eta=0.5), d.ddim_encode(net, x), d.langevin(net, x.shape),
              *[v for step in d.sample_progressive(net, x.shape, [1, 4]) for v in step[1:]]]
    assert {(v.device.type, v.shape) for v in per_batch} == {("meta", (3,))}, equal.law
    assert {(v.device.type, v.shape) for v in images} == {("meta", x.shape)}, equal.law
    assert bound["terms"].shape == bound["x0_mse"].shape == (3, 2), equal.law


@machinery
def test_bounds_and_samplers_of_gaussian_diffusion_carry_no_gradient():
    """bits_per_dim and the samplers only measure: nothing of the network's graph is kept."""
    weight, d, x = torch.ones(()).requires_grad_(), gaussian([0.1] * 3, variance=1), torch.ones(2, 2)
    results = [*d.bits_per_dim(lambda x, t: weight * x, x).values(),
               d.sample(lambda x, t: weight * x, (2, 2)), d.ddim_encode(lambda x, t: weight * x, x),
               d.langevin(lambda x, t: weight * x, (2, 2))]
    assert not any(r.requires_grad for r in results), equal.law


X = torch.zeros(2, 4)
GAUSSIAN_ERRORS = {
    "betas of 0": (lambda d: gaussian([0.0, 0.1]), "betas"),
    "betas of 1": (lambda d: gaussian([0.1, 1.0]), "betas"),
    "betas below 0": (lambda d: gaussian([-0.1]), "betas"),
    "betas that are no numbers": (lambda d: gaussian([math.nan]), "betas"),
    "no betas": (lambda d: gaussian([]), "betas"),
    "betas in a square": (lambda d: ddpm.GaussianDiffusion(torch.full((2, 2), 0.1)), "betas"),
    "an unknown prediction": (lambda d: gaussian([0.1], prediction="mean"), "prediction.*mean"),
    "an unknown variance": (lambda d: gaussian([0.1], variance="small"), "variance.*small"),
    "a variance above 1": (lambda d: gaussian([0.1], variance=1.5), "variance.*1.5"),
    "a variance below 0": (lambda d: gaussian([0.1], variance=-0.5), "variance.*-0.5"),
    "one level": (lambda d: gaussian([0.1], levels=1), "levels"),
    "t = 0": (lambda d: d.p_reverse(network, X, 0), "t.*0"),
    "t = T + 1": (lambda d: d.vlb_term(network, X, X, 5), "T = 4.*5"),
    "t below 0": (lambda d: d.q_posterior(X, X, -1), "t.*-1"),
    "t = T + 1 for q": (lambda d: d.q_sample(X, 5), "T = 4.*5"),
    "t below 0 for q": (lambda d: d.q_marginal(X, -1), "-1"),
    "a batch of times with a 0": (lambda d: d.p_sample(network, X, torch.tensor([1, 0])), "0"),
    "a batch of times above T": (lambda d: d.loss_vlb(network, X, torch.tensor([5, 1])), "T = 4.*5"),
    "a loss at 0": (lambda d: d.loss_simple(network, X, 0), "0"),
    "a hybrid loss above T": (lambda d: d.loss_hybrid(network, X, 5), "T = 4.*5"),
    "a score at 0": (lambda d: d.score(network, X, 0), "0"),
    "x0 at 0": (lambda d: d.predict_x0(X, 0, X), "0"),
    "eps at 0": (lambda d: d.predict_eps(X, 0, X), "0"),
    "v above T": (lambda d: d.predict_v(X, X, 5), "T = 4.*5"),
    "half a time": (lambda d: d.q_sample(X, 1.5), "1.5"),
    "times that are floats": (lambda d: d.q_sample(X, torch.tensor([1.0, 2.0])), "int"),
    "times for another batch": (lambda d: d.q_sample(X, torch.tensor([1, 2, 3])), "3"),
    "s = t": (lambda d: d.p_reverse(network, X, 2, 2), "s < t"),
    "s above t": (lambda d: d.q_posterior(X, X, torch.tensor([1, 2]), 2), "s < t"),
    "s below 0": (lambda d: d.vlb_term(network, X, X, 2, -1), "-1"),
    "eta above 1": (lambda d: d.p_sample(network, X, 2, eta=1.1), "eta.*1.1"),
    "eta below 0": (lambda d: d.p_sample(network, X, 2, eta=-0.1), "eta.*-0.1"),
    "no steps": (lambda d: d.timesteps(0), "steps"),
    "an empty grid": (lambda d: d.timesteps([]), "steps"),
    "a grid that stops short of T": (lambda d: d.bits_per_dim(network, X, [1, 3]), "T = 4"),
    "a grid that starts at 0": (lambda d: d.sample(network, (2, 4), [0, 4]), "steps"),
    "a grid that stays": (lambda d: d.langevin(network, (2, 4), [2, 2, 4]), "steps"),
    "C channels where 2C are due": (lambda d: gaussian([0.1]).loss_hybrid(network, X), "8"),
    "2C channels where C are due":
        (lambda d: d.sample(lambda x, t: torch.cat([x, x], 1), (2, 4)), r"\(2, 4\)"),
    "a prediction of another size": (lambda d: d.loss_simple(lambda x, t: x[:1], X), r"\(2, 4\)"),
}


@machinery
@pytest.mark.parametrize("case", GAUSSIAN_ERRORS)
def test_gaussian_errors_are_one_clear_line(case):
    """What a caller can get wrong raises ValueError and says what was got."""
    call, words = GAUSSIAN_ERRORS[case]
    with pytest.raises(ValueError, match=words):
        call(gaussian([0.1] * 4, variance=0.5))


# ---------------------------------------------------------------- the U-Net

def tiny_unet(channels=1, out_channels=1, **options):
    return ddpm.UNet(channels, out_channels, **{
        **dict(width=8, mults=(1, 2), blocks=1, attention=(1,), heads=2), **options})


def awake(net, seed=0):
    """The network in float64 with all its weights drawn anew, so that no zero hides a path."""
    torch.manual_seed(seed)
    for p in net.double().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@machinery
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(1, 2), st.integers(1, 3),
       st.booleans())
@settings(max_examples=8 * EXAMPLES)
def test_unet_keeps_the_shape(batch, channels, size, patch, depth, learned):
    """(B, C, H, W) -> (B, C or 2C, H, W), for every H and W that the levels divide; at first 0."""
    out, step = channels * (1 + learned), patch * 2 ** (depth - 1)
    net = tiny_unet(channels, out, mults=(1, 2, 2)[:depth], attention=(depth - 1,), patch=patch)
    x = normal((batch, channels, size * step, step), 1)
    equal(net(x, torch.arange(batch)), torch.zeros(batch, out, *x.shape[2:]), atol=0)


@machinery
@pytest.mark.parametrize("shape", [(1, 1, 7, 8), (1, 1, 8, 7), (1, 2, 8, 8), (8, 8)])
def test_unet_says_which_sizes_it_takes(shape):
    """H and W must divide by 2^levels, the channels must be those promised: ValueError."""
    with pytest.raises(ValueError, match="divisible by 2"):
        tiny_unet()(torch.zeros(shape), torch.ones(shape[0], dtype=torch.int64))


@machinery
def test_unet_examples_do_not_see_each_other():
    """Changing one example, or its time, changes no other's output."""
    net, x, t = awake(tiny_unet()), normal((3, 1, 8, 8), 1), torch.tensor([1, 2, 3])
    other = torch.cat([x[:1], normal((2, 1, 8, 8), 2)])
    equal(net(other, torch.tensor([1, 9, 7]))[0], net(x, t)[0], atol=1e-12)


@machinery
def test_unet_uses_every_weight_every_pixel_and_the_time():
    """No gradient is 0: of any parameter, of any pixel far from the one looked at; and t matters."""
    net, x, t = awake(tiny_unet()), normal((2, 1, 8, 8), 1).requires_grad_(), torch.tensor([3, 7])
    out = net(x, t)
    (out * normal(out.shape, 2)).sum().backward(retain_graph=True)
    assert all(p.grad.abs().sum() > 0 for p in net.parameters()), equal.law
    far, = torch.autograd.grad(out[0, 0, 0, 0], x)
    assert (far[0] != 0).all() and (net(x, t + 1) != out).all(), equal.law


# ================================================================ d3pm.py

FAMILIES = ["uniform", "absorbing", "mixing", "gaussian", "neighbour", "dense", "sparse"]
MIXING = FAMILIES[:3]                                       # those with one row for all: "conditional"
mild = st.floats(0.02, 0.99)                                # discrete betas; the last may be 1
ways = st.sampled_from(["joint", "conditional"])


class Chain:
    """A transition of the named family, and its one-step matrices Q (T, K, K) by their definitions."""

    def __init__(self, name, K, betas, seed):
        self.name, self.K, self.T, self.mask = name, K, len(betas), None
        beta, eye = torch.tensor(betas, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
        if name in MIXING:
            pi = {"uniform": torch.full((K,), 1 / K, dtype=torch.float64), "absorbing": eye[seed % K],
                  "mixing": normal((K,), seed).softmax(0)}[name]
            self.Q = (1 - beta[:, None, None]) * eye + beta[:, None, None] * pi
            self.mask = seed % K if name == "absorbing" else None
        elif name == "gaussian":                            # Austin et al. 2021, appendix A.2.3
            def weight(n, b):
                return math.exp(-4 * n ** 2 / ((K - 1) ** 2 * b))
            self.Q = torch.tensor([[[weight(i - j, b) for j in range(K)] for i in range(K)]
                                   for b in betas], dtype=torch.float64)
            self.Q /= torch.tensor([sum(weight(n, b) for n in range(1 - K, K)) for b in betas],
                                   dtype=torch.float64)[:, None, None]
            self.Q += torch.diag_embed(1 - self.Q.sum(2))
        elif name == "neighbour":                           # appendix A.2.4: rates, then exp(beta R)
            points, k = normal((K, 2), seed), 1 + seed % (K - 1)
            near = (points[:, None] - points).norm(dim=-1).argsort(1)[:, 1:k + 1]
            near = torch.zeros(K, K, dtype=torch.float64).scatter(1, near, 1.0)
            rates = (near + near.T) / (2 * k)
            values, vectors = torch.linalg.eigh(rates - torch.diag(rates.sum(1)))
            self.Q = (vectors * (beta[:, None, None] * values).exp()) @ vectors.T
        else:                                               # any matrices; sparse: with exact zeros
            kept = eye + (normal((len(betas), K, K), seed + 1) > 0) * (name == "sparse")
            scores = 2 * normal((len(betas), K, K), seed)
            self.Q = (scores if name == "dense" else scores.masked_fill(kept == 0, -INF)).softmax(-1)
        self.transition = {
            "uniform": lambda: d3pm.uniform_transition(K, beta),
            "absorbing": lambda: d3pm.absorbing_transition(K, beta, seed % K),
            "mixing": lambda: d3pm.MixingTransition(beta, pi),
            "gaussian": lambda: d3pm.gaussian_transition(K, beta),
            "neighbour": lambda: d3pm.neighbour_transition(points, beta, k),
        }.get(name, lambda: d3pm.DenseTransition(self.Q))()
        self.states = torch.tensor([k for k in range(K) if k != self.mask])       # those of data

    def __repr__(self):
        return f"Chain({self.name!r}, K={self.K}, T={self.T}, mask={self.mask})"

    def path(self, s, t):
        """Q_{s->t} = Q_{s+1} ... Q_t, multiplied out."""
        result = torch.eye(self.K, dtype=torch.float64)
        for Q in self.Q[s:t]:
            result = result @ Q
        return result

    def data(self, shape, seed):
        """Any x_0 of that shape; the mask is no data."""
        draw = torch.randint(len(self.states), shape, generator=torch.Generator().manual_seed(seed))
        return self.states[draw]

    def pairs(self, t):
        """Every (x_0, x_t) that can be, each (N, 1), and q(x_t | x_0) (N,)."""
        q, held = self.path(0, t), torch.isin(torch.arange(self.K), self.states)
        x0, xt = ((q > 0) & held[:, None]).nonzero().T
        return x0[:, None], xt[:, None], q[x0, xt]

    def likely(self, x0, t, seed):
        """Some x_t of positive probability for each x_0."""
        q = self.path(0, t)[x0].flatten(0, -2)
        return torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed)).view(x0.shape)

    def joint(self, s, t):
        """log q(x_s, x_t | x_0), (K, K, K) by [x_t, x_0, x_s], every product written out."""
        return (self.path(0, s)[None] * self.path(s, t).T[:, None]).log()

    def posterior(self, x0, xt, s, t):
        """log q(x_s | x_t, x_0) by enumeration, (..., K); -inf everywhere if the pair cannot be."""
        joint = self.joint(s, t)[xt, x0]
        return joint - joint.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)

    def denoised(self, logits, xt):
        """log p(x_0 | x_t): softmax; among masks what x_t tells is kept, and the mask is no data."""
        if self.mask is None:
            return logits.log_softmax(-1)
        hidden = logits.clone()
        hidden[..., self.mask] = -INF
        kept = torch.eye(self.K).log()[xt]
        return torch.where((xt == self.mask)[..., None], hidden.log_softmax(-1), kept)

    def reverse(self, log_p0, xt, s, t, way):
        """log p(x_s | x_t), the sum over x_0 written out in logs so that nothing underflows."""
        if s == 0:
            return log_p0
        table = self.joint(s, t)[xt]                                              # (..., x_0, x_s)
        if way == "conditional":
            table = table - table.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
        table = (table + log_p0[..., None]).logsumexp(-2)
        return table - table.logsumexp(-1, keepdim=True)

    def term(self, log_p0, x0, xt, s, t, way):
        """The bound's term of the step s -> t in bits per dimension, the KL summed over x_s."""
        q, p = self.posterior(x0, xt, s, t), self.reverse(log_p0, xt, s, t, way)
        return bits(torch.where(q == -INF, 0, q.exp() * (q - p)).sum(-1))


@st.composite
def categories(draw, names=FAMILIES, lowest=0, n=2, longest=4):
    """A chain of any family and n times, as in chains()."""
    betas, *times = draw(chains(lowest, longest, n, mild))
    betas[-1] = draw(st.sampled_from([betas[-1], 1.0]))
    return Chain(draw(st.sampled_from(names)), draw(st.integers(2, 5)), betas, draw(seeds)), *times


def table(chain, seed, scale=1.0):
    """A network with logits that depend on x_t at the place, on t, and on the example's other places."""
    logits, context = normal((chain.T + 1, chain.K, chain.K), seed), normal((chain.K,), seed + 1)

    def model(x, t):
        t, others = (v.view(-1, *[1] * (x.ndim - 1)) for v in (t, per_example(x.double())))
        return scale * (logits[t, x] + others[..., None] * context)
    return model


# ---------------------------------------------------------------- schedules

@given(st.integers(1, 2000))
@example(1)
@example(1000)
def test_cosine_betas_make_alpha_bar_a_cosine(T):
    """alpha_bar_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 pi / 2), beta at most 0.999."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) for t in range(T + 1)]
    equal(d3pm.cosine_betas(T), [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)],
          atol=1e-13)


@given(st.integers(2, 2000), st.floats(0.01, 0.5), st.floats(0.5, 1))
def test_linear_betas_are_evenly_spaced(T, start, stop):
    """beta_t = start + (stop - start) (t - 1) / (T - 1), from 0.02 to 1 if nothing else is said."""
    steps = [i / (T - 1) for i in range(T)]
    equal((d3pm.linear_betas(T, start, stop), d3pm.linear_betas(T)),
          ([start + (stop - start) * i for i in steps], [0.02 + 0.98 * i for i in steps]), rtol=1e-12)


@given(st.integers(1, 1000))
@example(1)
def test_mutual_information_betas_mask_a_share_of_t_over_T(T):
    """beta_t = 1 / (T - t + 1), so that alpha_bar_t = 1 - t / T."""
    betas = d3pm.mutual_information_betas(T)
    chain = d3pm.absorbing_transition(3, betas)
    masked = chain.rows(torch.zeros(T + 1, dtype=torch.int64), 0, torch.arange(T + 1))[:, 2]
    equal((betas, masked), ([1 / (T - t + 1) for t in range(1, T + 1)],
                            [t / T for t in range(T + 1)]))


# ---------------------------------------------------------------- transitions

@given(categories())
def test_each_step_is_the_matrix_of_its_family(case):
    """Q_t as Austin et al. 2021 define it: redrawn from pi, or a discretised Gaussian, or exp(beta R)."""
    chain, _, t = case
    equal(chain.transition.matrix(t - 1, t), chain.Q[t - 1])


@given(categories())
def test_rows_are_probabilities(case):
    """Every Q_{s->t} has rows that sum to 1, and nothing in it is negative."""
    chain, s, t = case
    Q = chain.transition.matrix(s, t)
    equal((Q.sum(1), Q.clamp(min=0)), (1.0, Q), atol=1e-12)


@given(categories(["uniform", "gaussian", "neighbour"]))
def test_symmetric_noise_is_doubly_stochastic(case):
    """Uniform, Gaussian and neighbour: columns sum to 1 too, so that uniform is stationary."""
    chain, s, t = case
    equal((chain.transition.matrix(s, t).sum(0), chain.transition.stationary), (1.0, 1 / chain.K))


@given(categories())
def test_stationary_distribution_is_kept(case):
    """pi Q_{s->t} = pi; for matrices of one's own pi is the mean row of Q_bar_T, or what one says."""
    chain, s, t = case
    pi, Q = chain.transition.stationary, chain.transition.matrix(s, t)
    if chain.name in ("dense", "sparse"):
        own = d3pm.DenseTransition(chain.Q, chain.Q[0, 0]).stationary
        equal((pi, own), (chain.path(0, chain.T).mean(0), chain.Q[0, 0]))
    else:
        equal((pi @ Q, pi.sum()), (pi, 1.0))


@given(categories())
def test_many_steps_are_the_product_of_the_matrices(case):
    """Q_{s->t} = Q_{s+1} Q_{s+2} ... Q_t, in this order; Q_{t->t} = I."""
    chain, s, t = case
    equal((chain.transition.matrix(s, t), chain.transition.matrix(0, t),
           chain.transition.matrix(t, t)), (chain.path(s, t), chain.path(0, t), torch.eye(chain.K)))


@given(mild, seeds)
def test_what_is_lost_stays_lost(beta, seed):
    """Where alpha_bar has reached 0, every later step redraws: Q_{s->t} = 1 pi^T, 0 / 0 being 0."""
    pi = normal((3,), seed).softmax(0)
    chain = d3pm.MixingTransition([beta, 1.0, beta, beta], pi)
    equal(torch.stack([chain.matrix(s, t) for s, t in [(0, 2), (1, 3), (2, 3), (2, 4), (3, 4)]]), pi)


@given(categories(n=3))
def test_transitions_of_categories_compose(case):
    """Q_{s->r} Q_{r->t} = Q_{s->t} for any s < r < t."""
    chain, s, r, t = case
    Q = chain.transition.matrix
    equal(Q(s, r) @ Q(r, t), Q(s, t))


@given(categories(), shapes, seeds)
def test_rows_and_columns_are_those_of_the_matrix(case, shape, seed):
    """rows: q(x_t = . | x_s = x), or p Q_{s->t}; columns: q(x_t = x | x_s = .)."""
    chain, s, t = case
    x = torch.randint(chain.K, shape, generator=torch.Generator().manual_seed(seed))
    p, Q, batch = normal((*shape, chain.K), seed).softmax(-1), chain.path(s, t), at(t, x)
    kinds = [(s, t), (at(s, x), batch), (s, batch), (at(s, x), t)]
    equal(tuple(v for i, j in kinds for v in (chain.transition.rows(x, i, j),
                                             chain.transition.rows(p, i, j),
                                             chain.transition.columns(x, i, j))),
          (Q[x], p @ Q, Q.T[x]) * 4)


# ---------------------------------------------------------------- forward process q

@given(categories(), shapes, seeds)
def test_marginal_is_the_row_of_the_product(case, shape, seed):
    """q(x_t | x_0) = row x_0 of Q_1 ... Q_t, and x_0 itself at t = 0."""
    (chain, _, t), diffusion = case, d3pm.D3PM(case[0].transition)
    x0 = chain.data(shape, seed)
    equal((diffusion.q_probs(x0, t), diffusion.q_probs(x0, 0)),
          (chain.path(0, t)[x0], torch.eye(chain.K)[x0]))


@few
@given(categories(), st.integers(0, 4))
def test_draws_have_the_frequencies_of_the_row(case, start):
    """q_sample ~ row x_0 of Q_bar_t, q_step ~ row x_s of Q_{s->t}, x_T's prior ~ stationary."""
    (chain, s, t), diffusion = case, d3pm.D3PM(case[0].transition)
    x0, xs = torch.full((20000,), chain.states[start % len(chain.states)]), \
        torch.full((100, 200), start % chain.K)
    frequencies(diffusion.q_sample(x0, t), chain.path(0, t)[x0[0]])
    frequencies(diffusion.q_step(xs, s, t), chain.path(s, t)[xs[0, 0]])
    seen = []
    diffusion.sample(lambda x, t: seen.append(x) or torch.zeros(*x.shape, chain.K), (20000,), 1)
    frequencies(seen[0], chain.transition.stationary)


@given(categories())
def test_posterior_is_bayes_rule_by_enumeration(case):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) for every pair (x_0, x_t);
    -inf everywhere for a pair that cannot be."""
    (chain, s, t), diffusion = case, d3pm.D3PM(case[0].transition)
    x0 = chain.states.repeat_interleave(chain.K)
    xt = torch.arange(chain.K).repeat(len(chain.states))
    equal(diffusion.q_posterior(x0, xt, t, s), chain.posterior(x0, xt, s, t))


@given(categories(), shapes, seeds)
@example((Chain("absorbing", 3, [0.5, 0.5], 1), 1, 2), (2, 3), 1)
def test_posterior_of_an_uncertain_x0_is_bayes_rule_too(case, shape, seed):
    """If x_0 ~ p: q(x_s | x_t) is proportional to the sum over x_0 of q(x_s, x_t | x_0) p(x_0)."""
    (chain, s, t), diffusion = case, d3pm.D3PM(case[0].transition)
    xt = chain.likely(chain.data(shape, seed), t, seed + 1)
    prior = (3 * normal((*shape, chain.K), seed)).log_softmax(-1)
    weights = (chain.joint(s, t)[xt] + prior[..., None]).logsumexp(-2)
    equal(diffusion.q_posterior(prior, xt, t, s), weights - weights.logsumexp(-1, keepdim=True),
          atol=1e-8)


# ---------------------------------------------------------------- reverse process p

@given(categories(), shapes, seeds, st.sampled_from([1.0, 1e4]), ways)
def test_reverse_step_sums_over_x0(case, shape, seed, scale, way):
    """joint: p(x_s | x_t) ~ sum of q(x_s, x_t | x_0) p(x_0 | x_t); conditional: sum of
    q(x_s | x_t, x_0) p(x_0 | x_t); at s = 0 p(x_0 | x_t) itself. For logits up to 1e4 and beyond."""
    chain, s, t = case
    way = way if chain.name in MIXING else "joint"
    xt = chain.likely(chain.data(shape, seed), t, seed + 1)
    model = table(chain, seed, scale)
    log_p0 = chain.denoised(model(xt, at(t, xt)), xt)
    equal(d3pm.D3PM(chain.transition, way).p_reverse(model, xt, t, s),
          chain.reverse(log_p0, xt, s, t, way), atol=1e-8)


@given(categories(["absorbing"]), shapes, seeds)
def test_masks_keep_what_is_seen_and_are_never_data(case, shape, seed):
    """p(x_0 = mask | x_t) = 0, and p(x_0 | x_t) is the point x_t where x_t is not masked."""
    chain, _, t = case
    xt = chain.likely(chain.data(shape, seed), t, seed + 1)
    p = d3pm.D3PM(chain.transition).p_reverse(table(chain, seed), xt, t, 0).exp()
    equal((p[..., chain.mask], p[xt != chain.mask], p.sum(-1)),
          (0.0, torch.eye(chain.K)[xt[xt != chain.mask]], 1.0), atol=1e-12)


@given(categories(["absorbing"]), shapes, seeds)
def test_both_reverse_steps_are_one_for_masks(case, shape, seed):
    """joint = conditional: q(x_t | x_0) is the same for every x_0 that a mask may hide."""
    chain, s, t = case
    xt = chain.likely(chain.data(shape, seed), t, seed + 1)
    joint, conditional = (d3pm.D3PM(chain.transition, way).p_reverse(table(chain, seed), xt, t, s)
                          for way in ("joint", "conditional"))
    equal(joint, conditional)


def source(chain, seed):
    """A distribution of data over the K states; the mask has probability 0."""
    scores = 1.5 * normal((chain.K,), seed)
    if chain.mask is not None:
        scores[chain.mask] = -INF
    return scores.softmax(0)


def exact_denoiser(chain, p0, way, first=1):
    """One token: logits of p(x_0 | x_t) by Bayes' rule; for the joint step above s = 0 those of
    p(x_0 | x_t) / q(x_t | x_0), what the other places say: with one token p(x_0)."""
    def model(x, t):
        t = int(t[0])
        bayes = p0.log() + chain.path(0, t).T[x].log()
        return (bayes if way == "conditional" or t == first else p0.log().expand(bayes.shape)) \
            .clamp(min=-1e5)                                # logits are finite; e^-1e5 is 0
    return model


@given(categories(), seeds, ways)
def test_exact_denoiser_gives_the_exact_reverse_process(case, seed, way):
    """sum over x_t of q(x_t) p(x_s | x_t) = q(x_s): conditional with p(x_0 | x_t), joint with
    p(x_0 | x_t) / q(x_t | x_0), at every s < t; so the chain run backwards returns the data."""
    chain, s, t = case
    way, p0 = way if chain.name in MIXING else "joint", source(chain, seed)
    qs, qt, xt = p0 @ chain.path(0, s), p0 @ chain.path(0, t), torch.arange(chain.K)
    model = exact_denoiser(chain, p0, way, first=t if s == 0 else 0)
    p = d3pm.D3PM(chain.transition, way).p_reverse(model, xt, t, s).exp()
    bayes = (chain.path(s, t) * qs[:, None]).T / qt[:, None]                       # q(x_s | x_t)
    equal((p[qt > 1e-12], qt[qt > 1e-12] @ p[qt > 1e-12]), (bayes[qt > 1e-12], qs))


# ---------------------------------------------------------------- losses and bound

@given(categories(), shapes, seeds)
def test_prior_term_of_categories_is_the_kl_to_stationary(case, shape, seed):
    """L_T = KL(q(x_T | x_0) || stationary) in bits per dimension; infinite if a mask may be missing."""
    chain, _, _ = case
    x0 = chain.data(shape, seed)
    q, pi = chain.path(0, chain.T)[x0], chain.transition.stationary
    right = bits(torch.where(q == 0, 0, q * (q / pi).log()).sum(-1))
    equal(d3pm.D3PM(chain.transition).prior_kl(x0), right)


@given(categories(), shapes, seeds, st.sampled_from([1.0, 1e4]), ways)
def test_bound_term_of_categories_is_the_summed_kl(case, shape, seed, scale, way):
    """L_t = sum over x_s of q log(q / p), q = q(x_s | x_t, x_0) and p = p(x_s | x_t), in bits per
    dimension; at s = 0 that is L_0 = -log p(x_0 | x_t). Finite for logits of 1e4."""
    chain, s, t = case
    way = way if chain.name in MIXING else "joint"
    x0, model = chain.data(shape, seed), table(chain, seed, scale)
    xt = chain.likely(x0, t, seed + 1)
    log_p0 = chain.denoised(model(xt, at(t, xt)), xt)
    equal(d3pm.D3PM(chain.transition, way).vlb_term(model, x0, xt, t, s),
          chain.term(log_p0, x0, xt, s, t, way), rtol=1e-8)


@given(categories(["absorbing"]), shapes, seeds)
def test_bound_of_masks_is_a_weighted_masked_cross_entropy(case, shape, seed):
    """L_t = (alpha_bar_s - alpha_bar_t) / (1 - alpha_bar_t) times -log p(x_0) at the masked places,
    s = 0 included, whatever the network says of the places that are not masked."""
    chain, s, t = case
    x0, model, other = chain.data(shape, seed), table(chain, seed), table(chain, seed + 2)
    xt = chain.likely(x0, t, seed + 1)
    masked = xt == chain.mask
    logits = model(xt, at(t, xt)).clone()
    logits[..., chain.mask] = -INF
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, -2), x0.flatten(), reduction="none")
    kept_s, kept_t = (math.prod(1 - q for q in chain.Q[:i, x0[(0,) * x0.ndim], chain.mask].tolist())
                      for i in (s, t))
    elsewhere = d3pm.D3PM(chain.transition).vlb_term(
        lambda x, t: torch.where(masked[..., None], model(x, t), other(x, t)), x0, xt, t, s)
    equal(elsewhere, bits((kept_s - kept_t) / (1 - kept_t) * nll.view(x0.shape) * masked))


@given(st.integers(1, 50), seeds)
def test_masks_at_an_even_rate_weigh_by_one_over_t(T, seed):
    """With t / T masked (mutual information betas) the weight of the step t - 1 -> t is 1 / t."""
    chain = Chain("absorbing", 4, [1 / (T - t + 1) for t in range(1, T + 1)], 3)
    x0, t, model = chain.data((T, 1), seed), torch.arange(1, T + 1), table(chain, seed)
    log_p0 = chain.denoised(model(0 * x0 + 3, t), 0 * x0 + 3)
    diffusion = d3pm.D3PM(d3pm.absorbing_transition(4, d3pm.mutual_information_betas(T)))
    equal(diffusion.vlb_term(model, x0, 0 * x0 + 3, t), bits(-log_p0.gather(-1, x0[..., None])) / t)


@given(categories(), shapes, seeds, ways, st.floats(0, 2))
def test_losses_of_categories_are_the_bound_and_the_cross_entropy(case, shape, seed, way, weight):
    """loss_simple = CE = -log p(x_0 | x_t), loss_vlb = T L_t, loss_hybrid = L_t + weight CE (1e-3)."""
    chain, _, t = case
    way = way if chain.name in MIXING else "joint"
    diffusion, x0, model = d3pm.D3PM(chain.transition, way), chain.data(shape, seed), table(chain, seed)
    xt = chain.likely(x0, t, seed + 1)
    log_p0 = chain.denoised(model(xt, at(t, xt)), xt)
    ce, term = bits(-log_p0.gather(-1, x0[..., None])), chain.term(log_p0, x0, xt, t - 1, t, way)
    equal((diffusion.loss_simple(model, x0, t, xt), diffusion.loss_vlb(model, x0, t, xt),
           diffusion.loss_hybrid(model, x0, t, xt),
           diffusion.loss_hybrid(model, x0, t, xt, ce_weight=weight)),
          (ce, chain.T * term, term + 1e-3 * ce, term + weight * ce), rtol=1e-8)


@given(categories(["uniform", "mixing", "gaussian", "neighbour", "dense"]), seeds, ways)
def test_bound_of_categories_trains_by_its_full_gradient(case, seed, way):
    """d loss / d logits, by autograd through the enumerated sums, for the bound and both losses."""
    chain, _, t = case
    way = way if chain.name in MIXING else "joint"
    diffusion, x0 = d3pm.D3PM(chain.transition, way), chain.data((2, 3), seed)
    xt, logits = chain.likely(x0, t, seed + 1), normal((2, 3, chain.K), seed).requires_grad_()
    log_p0 = logits.log_softmax(-1)
    ce, term = bits(-log_p0.gather(-1, x0[..., None])), chain.term(log_p0, x0, xt, t - 1, t, way)
    left = [loss(lambda x, t: logits, x0, t, xt) for loss in
            (diffusion.loss_simple, diffusion.loss_vlb, diffusion.loss_hybrid)]
    left, right = (tuple(torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in side)
                   for side in (left, (ce, chain.T * term, term + 1e-3 * ce)))
    equal(left, right, rtol=1e-7)


@given(categories(), shapes, seeds, ways, st.sampled_from([1.0, 1e2, 1e4]))
def test_extreme_logits_have_finite_losses_and_gradients(case, shape, seed, way, scale):
    """|L| < inf and |dL / d logits| < inf for any finite logits and every x_t that can be."""
    chain, _, t = case
    diffusion = d3pm.D3PM(chain.transition, way if chain.name in MIXING else "joint")
    x0 = chain.data(shape, seed)
    xt, logits = chain.likely(x0, t, seed + 1), scale * normal((*shape, chain.K), seed)
    values = []
    for loss in (diffusion.loss_simple, diffusion.loss_vlb, diffusion.loss_hybrid):
        leaf = logits.clone().requires_grad_()
        value = loss(lambda x, t: leaf, x0, t, xt)
        values += [value, *torch.autograd.grad(value.sum(), leaf)]
    equal(torch.cat([v.flatten() for v in values]).isfinite().all(), 1.0)


@few
@given(st.integers(1, 5), st.sampled_from(["loss_simple", "loss_vlb", "loss_hybrid"]))
def test_training_on_categories_draws_every_time_alike(T, loss):
    """t ~ uniform{1..T}, both ends, each example its own; x_t ~ q(x_t | x_0)."""
    chain, seen = Chain("mixing", 3, [0.3] * T, 5), []
    x0 = torch.full((20000, 1), 2)
    getattr(d3pm.D3PM(chain.transition), loss)(
        lambda x, t: seen.append((x, t)) or torch.zeros(*x.shape, 3), x0)
    (xt, t), = seen
    frequencies(t - 1, torch.full((T,), 1 / T))
    for i in range(1, T + 1):
        frequencies(xt[t == i], chain.path(0, i)[2])


@st.composite
def strided(draw, names=FAMILIES):
    """A chain of any family whose x_T is noise for certain (beta_T = 1), and a grid."""
    betas, grid = draw(grids(longest=4))
    return Chain(draw(st.sampled_from(names)), draw(st.integers(2, 4)), betas[:-1] + [1.0],
                 draw(seeds)), grid


@few
@given(strided(), seeds, ways)
def test_bits_per_dim_of_categories_adds_the_three_parts(case, seed, way):
    """total = L_T + sum of L_t over the grid's steps, L_0 first, each at its own x_t ~ q(x_t | x_0);
    and the share of places where the likeliest x_0 is wrong."""
    (chain, grid), seen = case, []
    way = way if chain.name in MIXING else "joint"
    model, x0 = table(chain, seed), chain.data((2, 3), seed)
    got = d3pm.D3PM(chain.transition, way).bits_per_dim(
        lambda x, t: seen.append((x, t)) or model(x, t), x0, grid)
    guesses = [chain.denoised(model(x, t), x) for x, t in seen]
    terms = torch.stack([chain.term(p, x0, x, s, t, way) for p, (x, _), s, t in
                         zip(guesses, seen, [0] + grid, grid)], 1)
    wrong = torch.stack([per_example((p.argmax(-1) != x0).double()) for p in guesses], 1)
    q, pi = chain.path(0, chain.T)[x0], chain.transition.stationary
    prior = bits(torch.where(q == 0, 0, q * (q / pi).log()).sum(-1))
    equal((torch.stack([t for _, t in seen], 1), got["prior"], got["terms"], got["total"],
           got["x0_error"]), (torch.tensor(grid), prior, terms, prior + terms.sum(1), wrong), rtol=1e-8)


def expected_terms(chain, diffusion, model, grid):
    """For each x_0, in nats: E[L_0] + ... + E[L_t], the mean over every x_t on the grid; (K,)."""
    total = torch.zeros(chain.K)
    for s, t in zip([0] + grid, grid):
        x0, xt, weight = chain.pairs(t)
        terms = diffusion.vlb_term(model, x0, xt, t, s) * math.log(2)
        total = total.index_add(0, x0[:, 0], weight * terms)
    return total


@given(strided(), seeds, ways)
def test_bound_is_the_entropy_for_one_token(case, seed, way):
    """One token, the exact denoiser, the true q(x_T) as prior: L_T + sum of L_t + L_0 = -log p(x_0)
    at every x_0, whatever the noise and the grid; its mean over the data is the entropy."""
    (chain, grid), p0 = case, source(case[0], seed)
    way = way if chain.name in MIXING else "joint"
    diffusion = d3pm.D3PM(chain.transition, way)
    q = chain.path(0, chain.T)
    prior = torch.where(q == 0, 0, q * (q / (p0 @ q)).log()).sum(1)
    bound = prior + expected_terms(chain, diffusion, exact_denoiser(chain, p0, way, grid[0]), grid)
    held = p0 > 0
    equal((bound[held], p0[held] @ bound[held]),
          (-p0[held].log(), torch.distributions.Categorical(p0).entropy()), atol=1e-8)


@few
@given(categories(longest=3), seeds, ways)
def test_bound_of_categories_is_never_below_minus_log_p(case, seed, way):
    """L_T + sum of L_t + L_0 >= -log p(x_0) for two tokens and any network, p(x_0) the sum over every
    path x_T ... x_1; and p sums to 1."""
    chain, T = case[0], case[0].T
    chain = Chain(chain.name, min(chain.K, 3), [0.3, 0.6, 1.0][3 - T:], seed)
    diffusion = d3pm.D3PM(chain.transition, way if chain.name in MIXING else "joint")
    model, K = table(chain, seed), chain.K
    x = torch.cartesian_prod(torch.arange(K), torch.arange(K))                    # every (x_1, x_2)
    p, pi = torch.zeros(K * K), chain.transition.stationary
    p = pi[x].prod(1)
    held = (x != (-1 if chain.mask is None else chain.mask)).all(1)
    bound = 2 * diffusion.prior_kl(x[held])
    for t in range(T, 0, -1):
        step = diffusion.p_reverse(model, x, t).exp()                             # (x_t, place, K)
        weights = chain.path(0, t)[x[held][:, None], x[None]].prod(-1)            # (x_0, x_t)
        terms = diffusion.vlb_term(model, x[held].repeat_interleave(K * K, 0),
                                   x.repeat(int(held.sum()), 1), t).view(weights.shape)
        bound = bound + 2 * torch.where(weights == 0, 0, weights * terms).sum(1)
        p = p @ (step[:, 0, x[:, 0]] * step[:, 1, x[:, 1]])
    equal((p.sum(), p[held].sum(), (-p[held].log2() - bound).clamp(min=0)), (1.0, 1.0, 0.0), atol=1e-8)


@given(st.lists(st.floats(0.02, 0.99), min_size=0, max_size=4), seeds)
def test_two_tokens_lose_their_mutual_information_where_they_appear_at_once(betas, seed):
    """Masks, two tokens, the exact denoiser: bound - entropy = I(x_1; x_2) P(both unmasked in one
    step), P = sum of (alpha_bar_s - alpha_bar_t)^2: the factorised reverse step is the only loss."""
    chain = Chain("absorbing", 4, betas + [1.0], 3)
    p0, gap = (1.5 * normal((9,), seed)).softmax(0).view(3, 3), pair_gap
    alone = p0.sum(1)[:, None] * p0.sum(0)
    kept = [math.prod(1 - b for b in (betas + [1.0])[:t]) for t in range(chain.T + 1)]
    equal(gap(chain, p0, "joint"),
          (p0 * (p0 / alone).log()).sum() * sum((a - b) ** 2 for a, b in zip(kept, kept[1:])))


def pair_gap(chain, p0, way):
    """Two tokens with the joint law p0 (n, n), the exact denoiser: the mean bound minus the entropy, nats."""
    n, diffusion, total = len(p0), d3pm.D3PM(chain.transition, way), 0.0
    x0 = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    xt = torch.cartesian_prod(torch.arange(chain.K), torch.arange(chain.K))

    def exact(x, t):
        q = chain.path(0, int(t[0]))[:n].T[x]                                     # (B, place, x_0)
        return torch.nn.functional.pad(torch.stack(
            [(p0 * q[:, 0, :, None] * q[:, 1, None, :]).sum(d).log() for d in (2, 1)], 1),
            (0, chain.K - n), value=-1e5).clamp(min=-1e5)

    for t in range(1, chain.T + 1):
        weights = chain.path(0, t)[x0[:, None], xt[None]].prod(-1)                # (x_0, x_t)
        terms = diffusion.vlb_term(exact, x0.repeat_interleave(len(xt), 0), xt.repeat(len(x0), 1), t)
        terms = torch.where(weights == 0, 0, weights * terms.view(weights.shape)).sum(1)
        total += (p0.flatten() * terms).sum() * 2 * math.log(2)
    return total + (p0.flatten() * 2 * math.log(2) * diffusion.prior_kl(x0)).sum() \
        + (p0 * p0.log()).sum()


@few
@given(seeds, st.sampled_from(["uniform", "mixing"]))
def test_gap_of_two_tokens_shrinks_with_more_steps(seed, name):
    """Any noise: bound - entropy = I(x_1; x_2) at T = 1, then falls towards 0 as the steps grow finer."""
    p0 = (1.5 * normal((9,), seed)).softmax(0).view(3, 3)
    gaps = torch.stack([pair_gap(Chain(name, 3, [1 / (T - t + 1) for t in range(1, T + 1)], seed), p0,
                                 "conditional") for T in (1, 2, 4, 8, 16, 32)])
    information = (p0 * (p0 / (p0.sum(1)[:, None] * p0.sum(0))).log()).sum()
    equal((gaps[0], gaps.sort(descending=True).values, (gaps[-1] / gaps[0]).clamp(0, 0.15)),
          (information, gaps, gaps[-1] / gaps[0]), atol=1e-8)


@given(strided(), seeds)
def test_one_step_of_categories_is_a_variational_autoencoder(case, seed):
    """T = 1: E total = KL(q(x_1 | x_0) || prior) - E log p(x_0 | x_1)."""
    chain = Chain(case[0].name, case[0].K, [0.7 if case[0].mask is None else 1.0], seed)
    diffusion, model = d3pm.D3PM(chain.transition), table(chain, seed)
    code, pi, x1 = chain.Q[0], chain.transition.stationary, torch.arange(chain.K)
    kl = torch.where(code == 0, 0, code * (code / pi).log()).sum(1)
    log_p = chain.denoised(model(x1[:, None], at(1, x1)), x1[:, None])[:, 0]
    decode = -torch.where(code == 0, 0, code * log_p.T).sum(1)
    x0 = chain.states
    equal(diffusion.prior_kl(x0[:, None]) * math.log(2) + expected_terms(chain, diffusion, model, [1])[x0],
          (kl + decode)[x0])


@given(categories(), seeds)
def test_mean_of_the_vlb_loss_of_categories_is_the_sum_of_the_terms(case, seed):
    """(1 / T) sum over t of E[T L_t] = E[L_0] + E[L_1] + ... : one random t is an unbiased estimate."""
    (chain, _, _), total = case, torch.zeros(case[0].K)
    diffusion, model = d3pm.D3PM(chain.transition), table(case[0], seed)
    for t in range(1, chain.T + 1):
        x0, xt, weight = chain.pairs(t)
        total = total.index_add(0, x0[:, 0], weight * diffusion.loss_vlb(model, x0, t, xt) / chain.T)
    sums = torch.zeros(chain.K)
    for t in range(1, chain.T + 1):
        x0, xt, weight = chain.pairs(t)
        log_p0 = chain.denoised(model(xt, at(t, xt)), xt)
        sums = sums.index_add(0, x0[:, 0], weight * chain.term(log_p0, x0, xt, t - 1, t, "joint"))
    equal(total, sums, rtol=1e-8)


@few
@given(categories(), seeds)
def test_strided_chain_of_categories_at_full_stride_is_the_chain(case, seed):
    """With S = 1..T the strided bound and samples are the ordinary ones."""
    (chain, _, _), results = case, []
    diffusion, x0 = d3pm.D3PM(chain.transition), chain.data((2, 3), seed)
    for steps in (None, chain.T, list(range(1, chain.T + 1))):
        torch.manual_seed(seed)
        results += [(diffusion.bits_per_dim(table(chain, seed), x0, steps)["terms"],
                     diffusion.sample(table(chain, seed), (2, 3), steps), diffusion.timesteps(steps))]
    equal(results[1] + results[2], (*results[0][:2], list(range(1, chain.T + 1))) * 2, rtol=0, atol=0)


@given(st.integers(1, 300), st.integers(1, 320))
@example(1000, 50)
@example(1000, 2)
@example(1000, 999)
def test_strided_grid_of_categories_is_even_and_keeps_both_ends(T, n):
    """S_i = 1 + (i - 1) (T - 1) / (n - 1) to the nearest whole, halves up; all of 1..T if n >= T."""
    even = [T] if n == 1 else list(range(1, T + 1)) if n >= T else \
        [math.floor(1 + Fraction(i * (T - 1), n - 1) + Fraction(1, 2)) for i in range(n)]
    diffusion = d3pm.D3PM(d3pm.uniform_transition(3, [0.1] * T))
    equal((diffusion.timesteps(n), diffusion.timesteps(), diffusion.timesteps(even)),
          (even, list(range(1, T + 1)), even), atol=0)


# ---------------------------------------------------------------- samplers

@few
@given(strided(), seeds, ways)
def test_step_draws_from_the_reverse_process(case, seed, way):
    """x_s ~ p(x_s | x_t), at s = 0 too, where it is p(x_0 | x_t); and log p(x_0 | x_t) comes along."""
    (chain, grid), t = case, case[1][-1]
    way, s = way if chain.name in MIXING else "joint", ([0] + grid)[-2]
    xt, model = torch.full((20000, 1), int(chain.likely(chain.data((1,), seed), t, seed))), \
        table(chain, seed)
    xs, log_p0 = d3pm.D3PM(chain.transition, way).p_sample(model, xt, t, s)
    right = chain.denoised(model(xt[:1], at(t, xt[:1])), xt[:1])
    frequencies(xs, chain.reverse(right, xt[:1], s, t, way)[0, 0].exp())
    equal(log_p0, right, atol=1e-8)


@few
@given(strided(), seeds, ways)
def test_sampler_with_the_exact_denoiser_returns_the_data(case, seed, way):
    """One token: x_T ~ q(x_T), then p(x_s | x_t) down any grid: x_0 has the data's frequencies."""
    (chain, grid), p0 = case, source(case[0], seed)
    way, transition = way if chain.name in MIXING else "joint", chain.transition
    if chain.name not in MIXING:                            # the prior is the true q(x_T)
        transition = d3pm.DenseTransition(chain.Q, p0 @ chain.path(0, chain.T))
    diffusion = d3pm.D3PM(transition, way)
    frequencies(diffusion.sample(exact_denoiser(chain, p0, way, grid[0]), (100, 200), grid), p0)


@given(strided(), seeds, ways)
def test_sampler_of_categories_walks_the_grid_down_to_clean_data(case, seed, way):
    """x_T, then one reverse step for each neighbour pair of 0 = S_0 < S_1 < ... < S_n = T."""
    (chain, grid), seen, model = case, [], table(case[0], seed)
    diffusion = d3pm.D3PM(chain.transition, way if chain.name in MIXING else "joint")
    torch.manual_seed(seed)
    s, xs, log_p0 = zip(*diffusion.sample_progressive(
        lambda x, t: seen.append((x, t)) or model(x, t), (2, 3), grid))
    torch.manual_seed(seed)
    last = diffusion.sample(model, (2, 3), grid)
    inputs, times = zip(*seen)
    equal((list(s), torch.stack(times)[:, 0], torch.stack([*inputs[1:], last]),
           torch.stack(log_p0)),
          (([0] + grid[:-1])[::-1], grid[::-1], torch.stack(xs),
           torch.stack([chain.denoised(model(x, t), x) for x, t in seen])), atol=1e-8)


@few
@given(strided(), seeds, ways)
def test_known_places_are_held(case, seed, way):
    """known >= 0 stays as it is in x_0; on the way down it is noised to the time, or shown among masks."""
    (chain, grid), seen = case, []
    diffusion = d3pm.D3PM(chain.transition, way if chain.name in MIXING else "joint")
    known = torch.tensor([int(chain.data((1,), seed)), -1])
    model = table(chain, seed)
    x0 = diffusion.sample(lambda x, t: seen.append((x, int(t[0]))) or model(x, t), (20000, 2), grid,
                          known)
    for x, t in seen:
        frequencies(x[:, 0], torch.eye(chain.K)[known[0]] if chain.mask is not None
                    else chain.path(0, t)[known[0]])
    equal(x0[:, 0], known[0])


@given(seeds)
@settings(max_examples=3 * EXAMPLES)
def test_masks_in_small_steps_are_any_order_autoregression(seed):
    """As T grows the bound of masks becomes the mean over all orders of -log p(x_i | those before),
    for any network that does not look at t: autoregressive models are a corner of D3PM."""
    D, T, K = 3, 2000, 3
    chain, logits = Chain("absorbing", K, [1.0], 2), normal((K,) * D + (D, K), seed)
    x0 = chain.data((D,), seed)

    def log_p(x):                                           # (B, D) -> log p(x_0 = this x0 | x), (B, D)
        table = chain.denoised(logits[x[:, 0], x[:, 1], x[:, 2]], x)
        return table.gather(-1, x0.expand(len(x), D)[..., None])[..., 0]

    orders = list(itertools.permutations(range(D)))
    autoregressive = -sum(log_p(torch.where(torch.isin(torch.arange(D), torch.tensor(
        order[i:])), K - 1, x0)[None])[0, order[i]] for order in orders for i in range(D)) / len(orders)
    masked = torch.cartesian_prod(*[torch.tensor([False, True])] * D)              # every pattern
    t, rows = torch.arange(1, T + 1).repeat_interleave(len(masked)), masked.repeat(T, 1)
    xt, share = torch.where(rows, K - 1, x0), (t / T)[:, None]
    weight = torch.where(rows, share, 1 - share).prod(1)
    diffusion = d3pm.D3PM(d3pm.absorbing_transition(K, d3pm.mutual_information_betas(T)))
    terms = diffusion.vlb_term(lambda x, t: logits[x[:, 0], x[:, 1], x[:, 2]],
                               x0.expand(len(xt), D), xt, t)
    equal((weight * terms).sum() * D * math.log(2), autoregressive, atol=0, rtol=10 / T)


@few
@given(seeds, st.sampled_from([None, [0, 1], [1, 0]]), st.integers(0, 2))
def test_one_place_a_step_loses_nothing(seed, order, mask):
    """Any order: with the exact p(x_i | the places seen) the draws have the joint law of both tokens;
    each step fills one place, and the network is told how many masks are left."""
    p0, seen = (1.5 * normal((4,), seed)).softmax(0).view(2, 2), []
    states = torch.tensor([k for k in range(3) if k != mask])
    number = torch.zeros(3, dtype=torch.int64).scatter(0, states, torch.tensor([0, 1]))

    def exact(x, t):
        seen.append((x, t))
        other = x.flip(1)                                   # what the other place shows
        joint = torch.stack([p0.T[number[other[:, 0]]], p0[number[other[:, 1]]]], 1)
        alone = torch.stack([p0.sum(1), p0.sum(0)])
        p = torch.where((other == mask)[..., None], alone, joint)
        return torch.zeros(*x.shape, 3).scatter(-1, states.expand(*x.shape, 2), p.log())

    diffusion = d3pm.D3PM(d3pm.absorbing_transition(3, d3pm.mutual_information_betas(2), mask))
    x0 = diffusion.sample_any_order(exact, (20000, 2), order and torch.tensor(order))
    left = torch.stack([(x == mask).sum(1) for x, _ in seen])
    frequencies(2 * number[x0[:, 0]] + number[x0[:, 1]], p0.flatten())
    if order:
        equal(seen[1][0][:, order[1]], mask)
    equal((left, torch.stack([t for _, t in seen])), ([[2], [1]], left))


@few
@given(seeds)
def test_any_order_keeps_what_is_known(seed):
    """Known places stay, the others follow p(x_i | known)."""
    chain = Chain("absorbing", 3, [1 / (3 - t + 1) for t in range(1, 4)], 2)
    p, known = (1.5 * normal((2,), seed)).softmax(0), torch.tensor([[-1, 1], [0, -1]])
    x0 = d3pm.D3PM(chain.transition).sample_any_order(
        lambda x, t: torch.nn.functional.pad(p.log(), (0, 1)).expand(*x.shape, 3), (10000, 2, 2),
        known=known)
    frequencies(x0[:, known == -1], p)
    equal(x0[:, known >= 0], [1, 0])


@given(st.lists(reals, min_size=1, max_size=3), st.floats(-12, 12), st.integers(2, 6))
@example([0.5], -12.0, 5)
@example([3.0], 12.0, 5)
def test_truncated_logistic_is_the_logistic_density_cut_into_bins(mean, log_scale, K):
    """p(k) ~ integral of the logistic density over x_k +- 1 / (K - 1), x_k = 2 k / (K - 1) - 1."""
    mean, log_scale = torch.tensor(mean), torch.full((len(mean),), log_scale)
    x, scale, half = torch.linspace(-1, 1, K), log_scale.exp()[:, None], 1 / (K - 1)
    low, high = ((x + side - mean[:, None]) / scale for side in (-half, half))
    peak = torch.zeros(()).clamp(low, high)                 # the density falls like exp(-|z|)
    z, weight = quadrature(torch.maximum(low, peak - 40), torch.minimum(high, peak + 40), 300)
    mass = (weight.log() - z.abs() - 2 * torch.log1p((-z.abs()).exp())).logsumexp(0)
    equal(d3pm.truncated_logistic(mean, log_scale, K), mass.log_softmax(-1), atol=1e-7)


# ---------------------------------------------------------------- numbers, batches, devices, errors

@given(st.sampled_from([d3pm.cosine_betas, d3pm.mutual_information_betas, lambda T: torch.full(
    (T,), 1e-4)]), st.sampled_from([1, 10, 1000, 4000]), st.data())
def test_float32_probabilities_are_exact_to_1e_5(schedule, T, data):
    """Q_{s->t} = a I + (1 - a) 1 pi^T in float32 is within 1e-5 of the walked chain's, T up to 4000,
    each entry by its own size; exact zeros are zero."""
    t = data.draw(st.sampled_from([1, T]) | st.integers(1, T))
    s = data.draw(st.sampled_from([0, t - 1]) | st.integers(0, t - 1))
    betas, x = schedule(T), torch.arange(3)
    stay, redrawn = walk(betas.tolist(), s, t)              # its square walks as 1 - beta does
    torch.set_default_dtype(torch.float32)
    for chain in (d3pm.uniform_transition(3, betas), d3pm.absorbing_transition(3, betas)):
        Q = stay ** 2 * torch.eye(3) + redrawn * chain.stationary
        rows, columns = chain.rows(x, s, t), chain.columns(x, s, t)
        assert rows.dtype == columns.dtype == torch.float32, equal.law
        equal((rows, columns), (Q, Q.T), atol=1e-30, rtol=1e-5)


@given(st.sampled_from(FAMILIES), ways, seeds)
def test_each_example_of_categories_has_its_own_time(name, way, seed):
    """f(x, s, t)_i = f(x_i, s_i, t_i): no example sees another; times are ints or (B,), mixed."""
    pick, chain = torch.Generator().manual_seed(seed), Chain(name, 4, [0.2, 0.5, 0.3, 0.7], seed)
    s = torch.randint(4, (3,), generator=pick)
    t = s + 1 + (torch.rand(3, generator=pick) * (4 - s)).long()
    x0, model = chain.data((3, 2, 2), seed), table(chain, seed)
    xt = torch.cat([chain.likely(x[None], int(i), seed) for x, i in zip(x0, t)])
    d = d3pm.D3PM(chain.transition, way if name in MIXING else "joint")

    def laws(i, s, t):
        a, b = x0[i], xt[i]
        return (d.q_probs(a, t), d.q_posterior(a, b, t, s), d.p_reverse(model, b, t, s),
                d.prior_kl(a), d.vlb_term(model, a, b, t, s), d.loss_simple(model, a, t, b),
                d.loss_vlb(model, a, t, b), d.loss_hybrid(model, a, t, b))

    single = [laws(slice(i, i + 1), int(s[i]), int(t[i])) for i in range(3)]
    start = [laws(slice(i, i + 1), 0, t[i:i + 1]) for i in range(3)]
    equal(laws(slice(None), s, t) + laws(slice(None), 0, t),
          tuple(torch.cat(v) for v in [*zip(*single), *zip(*start)]), atol=1e-12)


@machinery
@pytest.mark.parametrize("family", [d3pm.uniform_transition, d3pm.absorbing_transition])
def test_a_vocabulary_of_50257_needs_no_square_table(family):
    """A token costs O(K): the K x K table alone would take 20 GB."""
    torch.set_default_dtype(torch.float32)
    K, d = 50257, d3pm.D3PM(family(50257, d3pm.cosine_betas(10)))
    x0, logits = torch.tensor([[3, K - 2]]), torch.zeros(1, 2, K).requires_grad_()
    loss = d.loss_hybrid(lambda x, t: logits, x0, 5, torch.tensor([[K - 1, K - 1]]))
    loss.sum().backward()
    tables = sum(b.numel() for b in d.buffers())
    assert logits.grad.isfinite().all() and loss.isfinite().all() and tables < 10 * K, equal.law


@machinery
def test_category_tables_stay_float64_and_out_of_checkpoints():
    """.half() and the like leave the tables float64; at most two for any matrices; none is saved."""
    for name in FAMILIES:
        chain = Chain(name, 4, [0.2, 0.5], 1)
        d = d3pm.D3PM(chain.transition).half()
        square = [b for b in d.buffers() if b.numel() >= 2 * 4 * 4]
        assert {b.dtype for b in d.buffers()} == {torch.float64}, equal.law
        assert not d.state_dict() and len(square) <= (0 if name in MIXING else 2), equal.law
        equal(d.q_probs(chain.states, 2), chain.path(0, 2)[chain.states])


@machinery
@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian", "neighbour"])
def test_discrete_diffusion_runs_on_another_device(name):
    """Losses, bound and samplers stay on the data's device (meta: shapes without numbers)."""
    d = d3pm.D3PM(Chain(name, 5, [0.1] * 3 + [1.0], 4).transition).to("meta")
    net = d3pm.Transformer(5, (6,), width=8, depth=1, heads=2).to("meta")
    x = torch.zeros(3, 6, dtype=torch.int64, device="meta")
    t, known = torch.ones(3, dtype=torch.int64, device="meta"), torch.full((6,), -1, device="meta")
    bound = d.bits_per_dim(net, x, 2)
    per_batch = [loss(net, x, time) for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid)
                 for time in (None, 2, t)] + [d.prior_kl(x), bound["total"], bound["prior"]]
    states = [d.q_sample(x, 2), d.q_step(x, 0, t), d.sample(net, (3, 6), 2),
              d.sample(net, (3, 6), known=known), *[step[1] for step in d.sample_progressive(net, (3, 6))]]
    states += [d.sample_any_order(net, (3, 6))] if name == "absorbing" else []
    logits = [d.q_probs(x, t), d.q_posterior(x, x, t), d.p_reverse(net, x, t, 0), d.p_sample(net, x, t)[1]]
    assert {(v.device.type, v.shape) for v in per_batch} == {("meta", (3,))}, equal.law
    assert {(v.device.type, v.shape) for v in states} == {("meta", (3, 6))}, equal.law
    assert {(v.device.type, v.shape) for v in logits} == {("meta", (3, 6, 5))}, equal.law
    assert bound["terms"].shape == bound["x0_error"].shape == (3, 2), equal.law


def flat(x, t):
    """A network that takes all 3 states for alike."""
    return torch.zeros(*x.shape, 3)


S = torch.tensor([[0, 1], [1, 0]])
DISCRETE_ERRORS = {
    "betas of 0": (lambda d: d3pm.uniform_transition(3, [0.0]), "betas"),
    "betas above 1": (lambda d: d3pm.absorbing_transition(3, [1.1]), "betas"),
    "no betas": (lambda d: d3pm.gaussian_transition(3, []), "betas"),
    "betas that are no numbers": (lambda d: d3pm.neighbour_transition(torch.ones(4, 2), [math.nan], 1),
                                  "betas"),
    "a mask that is no state": (lambda d: d3pm.absorbing_transition(3, [0.1], mask=3), "mask.*3"),
    "a mask below 0": (lambda d: d3pm.absorbing_transition(3, [0.1], mask=-1), "mask.*-1"),
    "a stationary above 1": (lambda d: d3pm.MixingTransition([0.1], torch.tensor([0.9, 0.9])), "1"),
    "a negative stationary": (lambda d: d3pm.MixingTransition([0.1], torch.tensor([1.5, -0.5])), "prob"),
    "rows above 1": (lambda d: d3pm.DenseTransition(torch.ones(1, 2, 2)), "row"),
    "negative entries": (lambda d: d3pm.DenseTransition(torch.tensor([[[2.0, -1.0], [0, 1]]])), "row"),
    "a matrix alone": (lambda d: d3pm.DenseTransition(torch.eye(2)), r"T, K, K"),
    "too few embeddings": (lambda d: d3pm.neighbour_transition(torch.ones(3, 2), [0.1], 3), "k = 3"),
    "no neighbours": (lambda d: d3pm.neighbour_transition(torch.ones(3, 2), [0.1], 0), "k = 0"),
    "an unknown reverse": (lambda d: d3pm.D3PM(d.transition, "both"), "reverse.*both"),
    "dense and conditional":
        (lambda d: d3pm.D3PM(d3pm.gaussian_transition(3, [0.1]), "conditional"), "conditional"),
    "a state K": (lambda d: d.q_sample(S + 2, 1), "0..2"),
    "a state below 0": (lambda d: d.loss_vlb(flat, S - 1), "0..2"),
    "a state K in x_t": (lambda d: d.p_reverse(flat, S + 2, 1), "0..2"),
    "states that are floats": (lambda d: d.q_probs(S.float(), 1), "int64"),
    "data that holds the mask":
        (lambda d: d3pm.D3PM(d3pm.absorbing_transition(3, [0.1], 1)).loss_simple(flat, S), "mask"),
    "a mask in a posterior's data": (lambda d: d3pm.D3PM(d3pm.absorbing_transition(3, [0.1], 1))
                                     .q_posterior(S, S, 1), "mask"),
    "logits of a wrong last size": (lambda d: d.loss_vlb(lambda x, t: torch.zeros(*x.shape, 4), S), "3"),
    "logits of too few places": (lambda d: d.sample(lambda x, t: torch.zeros(2, 3), (2, 2)), "3"),
    "t = 0": (lambda d: d.p_reverse(flat, S, 0), "t.*0"),
    "t = T + 1": (lambda d: d.vlb_term(flat, S, S, 5), "T = 4.*5"),
    "t below 0": (lambda d: d.q_posterior(S, S, -1), "-1"),
    "a batch of times with a 0": (lambda d: d.p_sample(flat, S, torch.tensor([1, 0])), "0"),
    "a loss above T": (lambda d: d.loss_hybrid(flat, S, torch.tensor([5, 1])), "T = 4.*5"),
    "q beyond T": (lambda d: d.q_sample(S, 5), "T = 4.*5"),
    "q before 0": (lambda d: d.q_probs(S, -1), "-1"),
    "a matrix beyond T": (lambda d: d.transition.matrix(0, 5), "T = 4.*5"),
    "a matrix backwards": (lambda d: d.transition.matrix(3, 2), "s"),
    "times that are floats": (lambda d: d.q_sample(S, torch.tensor([1.0, 2.0])), "int"),
    "s = t": (lambda d: d.p_reverse(flat, S, 2, 2), "s < t"),
    "s below 0": (lambda d: d.vlb_term(flat, S, S, 2, -1), "-1"),
    "no steps": (lambda d: d.timesteps(0), "steps"),
    "an empty grid": (lambda d: d.timesteps([]), "steps"),
    "a grid that stops short of T": (lambda d: d.bits_per_dim(flat, S, [1, 3]), "T = 4"),
    "a grid that starts at 0": (lambda d: d.sample(flat, (2, 2), [0, 4]), "steps"),
    "a grid that stays": (lambda d: d.sample(flat, (2, 2), [2, 2, 4]), "steps"),
    "any order without masks": (lambda d: d.sample_any_order(flat, (2, 2)), "absorbing"),
    "a known place of no state": (lambda d: d.sample(flat, (2, 2), known=torch.tensor([3, -1])), "0..2"),
}


@machinery
@pytest.mark.parametrize("case", DISCRETE_ERRORS)
def test_discrete_errors_are_one_clear_line(case):
    """What a caller can get wrong raises ValueError and says what was got."""
    call, words = DISCRETE_ERRORS[case]
    with pytest.raises(ValueError, match=words):
        call(d3pm.D3PM(d3pm.uniform_transition(3, [0.1] * 4)))


# ---------------------------------------------------------------- the Transformer

def tiny_transformer(shape, K=5, **options):
    return d3pm.Transformer(K, shape, **{**dict(width=8, depth=2, heads=2, patch=2), **options})


@machinery
@pytest.mark.parametrize("shape", [(1,), (6,), (1, 4, 4), (3, 2, 6)])
def test_transformer_gives_logits_for_every_place(shape):
    """(B, L) tokens -> (B, L, K), (B, C, H, W) images -> (B, C, H, W, K); at first 0."""
    out = tiny_transformer(shape)(torch.zeros(2, *shape, dtype=torch.int64), torch.tensor([1, 2]))
    equal(out, torch.zeros(2, *shape, 5), atol=0)


@machinery
@pytest.mark.parametrize("shape, x", [((1, 5, 4), None), ((1, 4, 5), None), ((4, 4), None),
                                      ((4,), (2, 5)), ((1, 4, 4), (2, 1, 4, 6))])
def test_transformer_says_which_shapes_it_takes(shape, x):
    """Patches must divide H and W, and data must have the shape promised: ValueError."""
    with pytest.raises(ValueError, match=r"\("):
        tiny_transformer(shape)(torch.zeros(x, dtype=torch.int64), torch.tensor([1, 2]))


@machinery
@pytest.mark.parametrize("shape", [(6,), (2, 4, 4)])
def test_transformer_examples_do_not_see_each_other(shape):
    """Changing one example, or its time, changes no other's output."""
    net, t = awake(tiny_transformer(shape)), torch.tensor([1, 2, 3])
    x, other = (torch.randint(5, (3, *shape)) for _ in range(2))
    other[0] = x[0]
    equal(net(other, torch.tensor([1, 9, 7]))[0], net(x, t)[0], atol=1e-12)


@machinery
@pytest.mark.parametrize("shape", [(6,), (2, 4, 4)])
def test_transformer_uses_every_weight_every_place_and_the_time(shape):
    """Bidirectional: each place sees every other, before and after; each has its own position."""
    net, x = awake(tiny_transformer(shape)), torch.randint(5, (1, *shape))
    out = net(x, torch.tensor([3]))
    (out * normal(out.shape, 2)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters()), equal.law
    for place in range(x.numel()):
        changed = x.clone().view(-1)
        changed[place] = (changed[place] + 1) % 5
        assert (net(changed.view(x.shape), torch.tensor([3])) != out).all(), equal.law
    same = net(torch.zeros_like(x), torch.tensor([3])).view(-1, 5)
    assert len(same.unique(dim=0)) == len(same) and (net(x, torch.tensor([4])) != out).all(), equal.law


@machinery
def test_transformer_patches_go_back_where_they_came_from():
    """With one place a patch and no mixing, a change of pixel (c, i, j) changes its own patch alone."""
    net = awake(tiny_transformer((2, 4, 6), depth=0))
    x = torch.zeros(1, 2, 4, 6, dtype=torch.int64)
    x[0, 1, 2, 3] = 1
    moved = (net(x, torch.tensor([1])) != net(0 * x, torch.tensor([1]))).any(-1)[0]
    right = torch.zeros(2, 4, 6)
    right[:, 2:4, 2:4] = 1
    equal(moved.double(), right, atol=0)


# ================================================================ the files, and the README

def imports(name):
    """The top-level names of all modules that a file imports."""
    for node in ast.walk(ast.parse((HERE / name).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


@machinery
@pytest.mark.parametrize("name", ["ddpm.py", "d3pm.py"])
def test_each_file_needs_only_torch(name):
    """Copied alone into an empty folder it still imports: torch, and what comes with Python."""
    assert set(imports(name)) - set(sys.stdlib_module_names) == {"torch"}, equal.law


@machinery
def test_both_files_name_the_same_laws_in_the_same_order():
    """A reader can lay one beside the other."""
    gaussian, discrete = ([name for name, value in vars(kind).items() if callable(value)
                           and not name.startswith("_")] for kind in (ddpm.GaussianDiffusion, d3pm.D3PM))
    shared = [name for name in gaussian if name in discrete]
    assert shared == [name for name in discrete if name in gaussian] and len(shared) >= 13, equal.law


def definitions(name):
    """Every function, class and method of a file (`Class.method`), and its line."""
    for node in ast.parse((HERE / name).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{m.name}", m.lineno) for m in node.body
                        if isinstance(m, ast.FunctionDef))


def laws_of_the_readme():
    """The rows of the README's table | law | function | test |."""
    readme = HERE / "README.md"
    assert readme.exists(), "README.md is missing: it holds the table law -> function -> test"
    lines = iter(readme.read_text().splitlines())
    for line in lines:
        if re.fullmatch(r"\|\s*law\s*\|\s*function\s*\|\s*test\s*\|", line.strip()):
            rows = itertools.takewhile(lambda line: line.strip().startswith("|"), lines)
            return [re.split(r"(?<!\\)\|", row.strip().strip("|")) for row in rows][1:]
    raise AssertionError("README.md has no table with the header | law | function | test |")


@machinery
def test_every_function_in_the_readme_table_stands_where_it_says():
    """The function cell names what ddpm.py or d3pm.py define, and its links point to that line."""
    known = {file: dict(definitions(file)) for file in ("ddpm.py", "d3pm.py")}
    for row in laws_of_the_readme():
        names = re.findall(r"`([\w.]+)`", row[-2])
        assert len(row) == 3 and names, f"{row} names no function"
        missing = [name for name in names if not any(name in lines for lines in known.values())]
        assert not missing, f"{missing} are in neither file"
        for name, file, line in re.findall(r"\[`([\w.]+)`\]\(([\w.]+)#L(\d+)\)", row[-2]):
            assert known[file].get(name) == int(line), f"{name} is not at {file}:{line}"


@machinery
def test_every_law_is_in_the_readme_table():
    """Its test cells are exactly the tests of this sheet that prove a law, each once at least."""
    named = {name for row in laws_of_the_readme() for name in re.findall(r"\btest_\w+", row[-1])}
    laws = {name for name, test in globals().items()
            if name.startswith("test_") and not hasattr(test, "machinery")}
    assert not named - laws, f"{sorted(named - laws)} are no law tests of test_math.py"
    assert not laws - named, f"{sorted(laws - named)} are missing from the README's table"
