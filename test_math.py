"""The proof sheet: every law of ddpm.py and d3pm.py, each with a property test.

The name of a test states a theorem, its docstring writes it, its body compares what the code
computes with what a definition says: Bayes' rule by enumeration or by quadrature, the chain walked
one step at a time, a matrix product, autograd, torch.distributions, a sum over every path, sampled
frequencies with their own error bar. Never with the closed form that the code itself uses.

Hypothesis draws the betas, T from 1, the two times 0 <= s < t <= T, the data and the seeds. Every
run draws the same examples; `EXAMPLES=10 pytest` draws ten times as many. All is float64 except
where a test says so, hence tolerances of 1e-9 unless a reason for another stands beside it.

Tests marked @machinery (errors, devices, networks, files) prove no law of diffusion; all others
stand in the README's table law -> function -> test.
"""

import ast
import copy
import functools
import itertools
import math
import os
import pickle
import re
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings, strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

import d3pm
import ddpm

HERE, INF = Path(__file__).parent, math.inf
EXAMPLES = int(os.environ.get("EXAMPLES", 1))
settings.register_profile("proof", max_examples=20 * EXAMPLES, derandomize=True, deadline=None,
                          database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("proof")
# For the tests that draw many samples or sum over every path: fewer examples, and no shrinking.
few = settings(max_examples=5 * EXAMPLES, phases=[Phase.explicit, Phase.generate])
torch.set_num_threads(1)
# The laws hold for any reals, far outside [-1, 1] too, where ddpm.py warns.
pytestmark = pytest.mark.filterwarnings("ignore:x0 reaches beyond")


class TorchRandom:
    """Hypothesis seeds torch's generator before each example, so that a failure can be replayed."""
    seed, getstate, setstate = torch.manual_seed, torch.get_rng_state, torch.set_rng_state


hypothesis.register_random(TorchRandom)


@pytest.fixture(autouse=True)
def law(request):
    """Each test runs in float64, and `equal` knows which law it is about; so does whatever the
    code raises: a law whose sides can't be computed does not hold."""
    equal.law = f"{request.function.__name__}\n    {request.function.__doc__}"
    test = request.node.obj

    @functools.wraps(test)
    def named(**arguments):
        try:
            test(**arguments)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{equal.law}\n    {error!r}") from error

    request.node.obj = named
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def equal(left, right, atol=1e-9, rtol=1e-9):
    """left = right within atol + rtol |right|, infinities too; else says the law and the error.

    Both may be tuples of quantities; a right side may be a number, a list or of narrower shape."""
    if isinstance(left, tuple):
        holds(len(left) == len(right), f"{len(left)} for {len(right)} quantities")
        for pair in zip(left, right):
            equal(*pair, atol, rtol)
        return
    left, right = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (left, right))
    fits = all(b in (1, a) for a, b in zip(left.shape[::-1], right.shape[::-1]))
    holds(fits and right.ndim <= left.ndim, f"shape {tuple(left.shape)} for {tuple(right.shape)}")
    error = torch.where(left == right, 0, (left - right).abs()).nan_to_num(nan=INF).flatten()
    right = right.expand_as(left).flatten()
    allowed = torch.where(right.isinf(), 0, rtol * right.abs())       # only infinity itself equals infinity
    excess = torch.where(error > 0, error - allowed, 0).nan_to_num(nan=INF)
    if (excess > atol).any():
        i = excess.argmax()
        holds(False, f"{left.flatten()[i]:.12g} should be {right[i]:.12g}, the worst error is "
                     f"{error[i]:.3g}, allowed atol {atol:g} and rtol {rtol:g}")


def holds(fact, otherwise="the law is false"):
    """For what is no comparison of numbers: the fact, else the law's name and formula."""
    assert fact, f"{equal.law}\n    {otherwise}"


def accepted(call):
    """The call's result; a ValueError means that it refuses what is legal."""
    try:
        return call()
    except ValueError as error:
        holds(False, f"refused: {error}")


def machinery(test):
    """Marks a test of what surrounds the laws; the README's table leaves it out."""
    test.machinery = True
    return test


# ---------------------------------------------------------------- strategies, all of them bounded

lengths = st.integers(1, 30) | st.integers(1, 4000)              # T of a schedule
rates = st.floats(1e-4, 0.99)           # betas: at 0.999 six steps would leave alpha_bar at 1e-18
reals = st.floats(-3, 3)
seeds = st.integers(1, 10 ** 6)         # of explicit generators; torch's own is seeded with 0
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)          # (B, ...)
predictions = st.sampled_from(["eps", "x0", "v"])
fractions = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@st.composite
def chains(draw, lowest=0, longest=6, n=2, beta=rates):
    """Arbitrary betas, and n times lowest <= s < ... < t <= T. T is often as short as it can be,
    and s = lowest, t = s + 1 and t = T are in many of the draws."""
    T = draw(st.integers(lowest + n - 1, longest))
    times = draw(st.sampled_from(list(itertools.combinations(range(lowest, T + 1), n))))
    return draw(st.lists(beta, min_size=T, max_size=T)), *times


@st.composite
def grids(draw, longest=6, beta=rates):
    """Betas, and a strided grid: an increasing list of times that ends at T."""
    T = draw(st.integers(1, longest))
    grid = [t for t in range(1, T) if draw(st.booleans())] + [T]
    return draw(st.lists(beta, min_size=T, max_size=T)), grid


def steps_of(grid):
    """The steps (s, t) of a grid, from the data upwards."""
    return list(zip([0] + grid, grid))


def normal(shape, seed):
    """Standard normal numbers of that shape, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(n, shape, seed):
    """Numbers below n of that shape, the same for the same seed."""
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


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


def at(t, x):
    """The time t as a network receives it: int64 (B,)."""
    return torch.full((len(x),), t)


def column(t, x):
    """(B,) -> (B, 1, ...) beside x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def quadrature(low, high, n=100):
    """Gauss-Legendre nodes and weights between low and high (tensors): two (n, ...) tensors."""
    i = torch.arange(1, n, dtype=torch.float64)
    off = i / (4 * i ** 2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))
    nodes, weights = (v.view(-1, *[1] * low.ndim) for v in (nodes, 2 * vectors[0] ** 2))
    return (low + high) / 2 + nodes * (high - low) / 2, weights * (high - low) / 2


def gradient(value, *leaves):
    """d (sum of value) / d leaf for each leaf, a tuple; 0 where the value does not depend on it."""
    value = value.sum() + sum(0 * leaf.sum() for leaf in leaves)
    return torch.autograd.grad(value, leaves, retain_graph=True)


def sampled(x, mean, var):
    """The draws x (N, ...) have this mean and variance, to five standard errors."""
    n, var = len(x), torch.as_tensor(var)
    equal((x.mean(0) - mean) / (var / n).sqrt(), 0, atol=5)
    equal((x.var(0) / var - 1) / math.sqrt(2 / n), 0, atol=5)


def frequencies(x, probs):
    """The share of each state among the draws x (int, any shape) is its probability, to five
    standard errors (and five draws, for the rare ones); what has probability 0 is never drawn."""
    n, probs = x.numel(), torch.as_tensor(probs)
    holds(0 <= x.min() and x.max() < len(probs), f"draws from {x.min()} to {x.max()}")
    share = torch.bincount(x.flatten(), minlength=len(probs)) / n
    margin = 5 * (probs * (1 - probs) / n).sqrt() + 5 / n * (probs > 0)
    equal((share - probs) / margin.clamp(min=1e-12), 0, atol=1)


# ================================================================ ddpm.py

def gaussian(betas, prediction="eps", variance=0, levels=256):
    betas = torch.tensor(betas, dtype=torch.float64)
    return ddpm.GaussianDiffusion(betas, prediction, variance, levels)


def walk(betas, s, t):
    """q(x_t | x_s) = N(k x_s, v), walked: x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps_i."""
    return walked(tuple(betas[s:t]))


@functools.cache
def walked(betas):
    k, v = 1.0, 0.0
    for beta in betas:
        k, v = math.sqrt(1 - beta) * k, (1 - beta) * v + beta
    return k, v


def noised(betas, t, x0, eps):
    """x_t, from x_0 and the noise."""
    k, v = walk(betas, 0, t)
    return k * x0 + math.sqrt(v) * eps


def coordinates(betas, t, x0, eps):
    """What each kind of network should say; v is the velocity d x_t / d phi, alpha_bar = cos^2."""
    k, v = walk(betas, 0, t)
    return {"eps": eps, "x0": x0, "v": k * eps - math.sqrt(v) * x0}


def estimate(betas, t, xt, said, prediction="eps", clip=False):
    """x_0 if the network said `said`: x_t = cos x_0 + sin eps and v = cos eps - sin x_0, solved."""
    cos, sin = walk(betas, 0, t)[0], math.sqrt(walk(betas, 0, t)[1])
    x0 = {"eps": (xt - sin * said) / cos, "x0": said, "v": cos * xt - sin * said}[prediction]
    return x0.clamp(-1, 1) if clip else x0


def network(x, t):
    """A smooth network that looks at x and at t."""
    return torch.sin(1.5 * x + 0.7 * column(t, x))


def guess(betas, t, xt, prediction="eps", clip=False):
    """That network's x0_hat."""
    return estimate(betas, t, xt, network(xt, at(t, xt)), prediction, clip)


def backwards(betas, s, t, xt, m, c=0.0):
    """Mean and variance of x_s given x_t, when x_0 ~ N(m, c): Gaussian conditioning.
    With c = 0 it is q(x_s | x_t, x_0 = m)."""
    (ks, vs), (k, v) = walk(betas, 0, s), walk(betas, s, t)
    prior_mean, prior_var = ks * m, ks ** 2 * c + vs
    gain = k * prior_var / (k ** 2 * prior_var + v)
    return prior_mean + gain * (xt - k * prior_mean), prior_var * v / (k ** 2 * prior_var + v)


def beta_tilde(betas, s, t):
    """Var q(x_s | x_t, x_0)."""
    return backwards(betas, s, t, 0.0, 0.0)[1]


def reverse_log_var(betas, s, t, f):
    """f log beta + (1 - f) log beta_tilde; at s = 0 the beta_tilde is that of the step above."""
    log_beta, above = math.log(walk(betas, s, t)[1]), (s, t) if s else (t, t + 1)
    log_tilde = log_beta if above[1] > len(betas) else math.log(beta_tilde(betas, *above))
    return f * log_beta + (1 - f) * log_tilde


def data_on(levels, shape, seed):
    """Data on the grid x_k = 2 k / (levels - 1) - 1."""
    return 2 * integers(levels, shape, seed).double() / (levels - 1) - 1


def log_bin(x, mean, log_std, levels=256):
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


def term(betas, s, t, x0, xt, x0_hat, f, levels=256):
    """The bound's term of the step s -> t, in bits per dimension, put together by hand."""
    log_std = torch.as_tensor(reverse_log_var(betas, s, t, f)) / 2
    if s == 0:
        return bits(-log_bin(x0, x0_hat, log_std, levels)[0])
    (mean, var), (mean_hat, _) = (backwards(betas, s, t, xt, x) for x in (x0, x0_hat))
    return bits(kl_divergence(Normal(mean, math.sqrt(var)), Normal(mean_hat, log_std.exp())))


def prior_term(betas, x0):
    """KL(q(x_T | x_0) || N(0, I)) in bits per dimension."""
    k, v = walk(betas, 0, len(betas))
    return bits(kl_divergence(Normal(k * x0, math.sqrt(v)), Normal(0.0, 1.0)))


def exact_for_gaussian_data(betas, m, c, grid):
    """The network (eps and learned variance) that knows x_0 ~ N(m, c), for the steps of a grid."""
    below = {t: s for s, t in steps_of(grid)}

    def model(x, t):
        t = int(t[0])
        (k, v), x0 = walk(betas, 0, t), backwards(betas, 0, t, x, m, c)[0]
        log_var = math.log(backwards(betas, below[t], t, 0.0, m, c)[1])
        small, large = (reverse_log_var(betas, below[t], t, f) for f in (0.0, 1.0))
        f = (log_var - small) / (large - small) if large != small else 1.0
        return torch.cat([(x - k * x0) / math.sqrt(v), torch.full_like(x, 2 * f - 1)], 1)
    return model


def slope(f, betas, i):
    """d f / d beta_i of a function of the list of betas, from four values: off by h^4."""
    h = 1e-3 * min(betas[i], 1 - betas[i])
    far, near, up, high = (f([*betas[:i], betas[i] + k * h, *betas[i + 1:]]) for k in (-2, -1, 1, 2))
    return (8 * (up - near) - (high - far)) / (12 * h)


class Labelled:
    """x_0 is one of n points, each place on its own; point i has the label i mod classes."""

    def __init__(self, points, betas, t, classes=2):
        self.points, self.labels = torch.tensor(points), torch.arange(len(points)) % classes
        self.betas, self.t, (self.k, self.v) = betas, t, walk(betas, 0, t)

    def log_q(self, x, y):
        """log q(x_t, x_0 = point i | y), y (B,) and -1 for no label, but for a constant: (..., n)."""
        y = column(y, x)[..., None]
        log_q = Normal(self.k * self.points, math.sqrt(self.v)).log_prob(x[..., None])
        return torch.where((y < 0) | (y == self.labels), log_q, -INF)

    def model(self, prediction):
        """The network that knows E[x_0 | x_t, y]."""
        def exact(x, t, y):
            x0 = (self.log_q(x, y).softmax(-1) * self.points).sum(-1)
            eps = (x - self.k * x0) / math.sqrt(self.v)
            return coordinates(self.betas, self.t, x0, eps)[prediction]
        return exact


# ---------------------------------------------------------------- schedules

@given(lengths)
@example(1)
@example(1000)
def test_linear_schedule_is_evenly_spaced(T):
    """beta_t = 1000 / T (1e-4 + (0.02 - 1e-4) (t - 1) / (T - 1)), at most 0.999."""
    shares = [0.0] if T == 1 else [i / (T - 1) for i in range(T)]
    equal(ddpm.linear_beta_schedule(T),
          [min(1000 / T * (1e-4 + (0.02 - 1e-4) * i), 0.999) for i in shares], atol=0, rtol=1e-12)


@given(lengths, st.none() | st.floats(1e-3, 0.1))
@example(1, None)
@example(1000, None)
def test_cosine_schedule_makes_alpha_bar_a_squared_cosine(T, s):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2), beta at most 0.999;
    s = 0.008 if left out."""
    betas = ddpm.cosine_beta_schedule(T) if s is None else ddpm.cosine_beta_schedule(T, s)
    s = 0.008 if s is None else s
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    equal(betas, [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)], atol=1e-13)


@given(lengths, st.sampled_from([ddpm.linear_beta_schedule, ddpm.cosine_beta_schedule]))
def test_schedules_grow_inside_0_1(T, schedule):
    """0 < beta_1 <= beta_2 <= ... <= beta_T < 1, and alpha_bar falls."""
    betas, alpha_bar = schedule(T), ddpm.GaussianDiffusion(schedule(T)).alpha_bar
    equal((betas, alpha_bar), (betas.clamp(1e-12, 0.999).sort().values,
                               alpha_bar.sort(descending=True).values), atol=0, rtol=0)


@given(chains())
def test_alpha_bar_is_the_product_of_the_alphas(chain):
    """alpha_bar_t = (1 - beta_1) ... (1 - beta_t), and alpha_bar_0 = 1."""
    betas = chain[0]
    equal(gaussian(betas).alpha_bar,
          [math.prod(1 - b for b in betas[:t]) for t in range(len(betas) + 1)])


# ---------------------------------------------------------------- forward process q

@given(chains(), arrays(), seeds)
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
    (betas, s, r, t), o, one, q = chain, 0 * x, torch.ones_like(x), gaussian(chain[0]).q_step
    mean = q(q(x, s, r, o), r, t, o)
    var = q(q(o, s, r, one), r, t, o) ** 2 + q(o, r, t, one) ** 2
    equal((mean, var), (q(x, s, t, o), q(o, s, t, one) ** 2))


@given(chains(lowest=1), arrays(), seeds)
def test_posterior_is_bayes_rule(chain, x0, seed):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0) at every x_s."""
    (betas, s, t), xt = chain, normal(x0.shape, seed)
    mean, log_var = gaussian(betas).q_posterior(x0, xt, t, s)
    xs = mean + (log_var / 2).exp() * normal((3, *x0.shape), seed + 1)
    (ks, vs), (k, v), (kt, vt) = walk(betas, 0, s), walk(betas, s, t), walk(betas, 0, t)
    posterior, marginal, step, start = (Normal(m, torch.as_tensor(var).sqrt()).log_prob(x) for
                                        m, var, x in [(mean, log_var.exp(), xs), (kt * x0, vt, xt),
                                                      (k * xs, v, xt), (ks * x0, vs, xs)])
    equal(posterior + marginal, step + start, atol=1e-7)         # they reach 1e5 where beta = 1e-4


@given(chains(), arrays(), seeds)
def test_time_zero_is_clean(chain, x0, seed):
    """q(x_0 | x_0) and q(x_0 | x_t, x_0) are points: mean x_0, log-variance -inf."""
    (betas, _, t), diffusion = chain, gaussian(chain[0])
    equal((*diffusion.q_marginal(x0, 0), *diffusion.q_posterior(x0, normal(x0.shape, seed), t, 0),
           diffusion.q_sample(x0, 0)), (x0, -INF, x0, -INF, x0), atol=1e-14)


@given(chains(), arrays(), seeds)
def test_left_out_s_is_the_step_before(chain, xt, seed):
    """s = t - 1 where s is left out: posterior, reverse step, bound, sampler; and x0_hat is clipped
    where nothing is said of it."""
    (betas, _, t), x0, d = chain, data_on(256, xt.shape, seed), gaussian(chain[0], variance=1)
    short, full = ((*d.q_posterior(x0, xt, *times), *d.p_reverse(network, xt, *times, **clip),
                    d.vlb_term(network, x0, xt, *times, **clip),
                    *d.p_sample(network, xt, *times, noise=x0, **clip))
                   for times, clip in (((t,), {}), ((t, t - 1), dict(clip=True))))
    equal(short, full, atol=0, rtol=0)


# ---------------------------------------------------------------- eps, x0, v and the score

@given(chains(), arrays(), seeds)
def test_eps_x0_and_v_are_coordinates_of_one_circle(chain, x0, seed):
    """x_t = cos(phi) x_0 + sin(phi) eps and v = d x_t / d phi, where cos(phi)^2 = alpha_bar_t."""
    (betas, _, t), eps, diffusion = chain, normal(x0.shape, seed), gaussian(chain[0])
    k, v = walk(betas, 0, t)
    phi = torch.full_like(x0, math.atan2(math.sqrt(v), k)).requires_grad_()
    xt = phi.cos() * x0 + phi.sin() * eps
    velocity, = gradient(xt, phi)
    equal((diffusion.predict_x0(xt, t, eps), diffusion.predict_eps(xt, t, x0),
           diffusion.predict_v(x0, eps, t)), (x0, eps, velocity),
          atol=1e-8)                                    # predict_x0 divides by cos, 1e-6 at worst


@given(chains(), arrays(), seeds)
def test_three_predictions_give_one_estimate(chain, x0, seed):
    """Networks that know eps, x_0 or v all give x0_hat = x_0 and the mean of q(x_s | x_t, x_0)."""
    (betas, s, t), eps = chain, normal(x0.shape, seed)
    xt, truth = noised(betas, t, x0, eps), coordinates(betas, t, x0, eps)
    reverse = [gaussian(betas, name).p_reverse(lambda x, t: truth[name], xt, t, s, clip=False)
               for name in truth]
    equal(tuple(x for mean, _, x0_hat in reverse for x in (mean, x0_hat)),
          (backwards(betas, s, t, xt, x0)[0], x0) * 3, atol=1e-8)


@given(chains(), arrays(), seeds)
def test_square_error_of_eps_is_alpha_bar_times_that_of_v(chain, x0, seed):
    """(eps - eps_hat)^2 = alpha_bar_t (v - v_hat)^2 where a network says v_hat."""
    (betas, _, t), eps, v_hat = chain, normal(x0.shape, seed), normal(x0.shape, seed + 1)
    xt, v = noised(betas, t, x0, eps), coordinates(betas, t, x0, eps)["v"]
    k, var = walk(betas, 0, t)
    eps_hat = -math.sqrt(var) * gaussian(betas, "v").score(lambda x, t: v_hat, xt, t)
    equal((eps - eps_hat) ** 2, k ** 2 * (v - v_hat) ** 2, atol=1e-8)


@given(chains(), st.lists(st.floats(-1, 1), min_size=1, max_size=4), arrays(), predictions)
def test_score_is_the_gradient_of_the_log_density(chain, data, xt, prediction):
    """score = grad log q(x_t) = -E[eps | x_t] / sqrt(1 - alpha_bar_t); x_0: one of n points."""
    (betas, _, t), data, leaf = chain, torch.tensor(data), xt.clone().requires_grad_()
    k, v = walk(betas, 0, t)

    def log_q(x):
        return Normal(k * data, math.sqrt(v)).log_prob(x[..., None])       # (..., n), each point's

    def exact(x, t_):
        x0 = (log_q(x).softmax(-1) * data).sum(-1)
        return coordinates(betas, t, x0, (x - k * x0) / math.sqrt(v))[prediction]

    equal(gaussian(betas, prediction).score(exact, xt, t),
          *gradient(log_q(leaf).logsumexp(-1), leaf), rtol=1e-7)


# ---------------------------------------------------------------- reverse process p

@given(chains(), arrays(), predictions, st.booleans())
def test_reverse_mean_is_the_posterior_mean_at_the_estimate(chain, xt, prediction, clip):
    """E p(x_s | x_t) = E q(x_s | x_t, x_0 = x0_hat), x0_hat clipped to [-1, 1] if asked to."""
    betas, s, t = chain
    x0_hat = guess(betas, t, xt, prediction, clip)
    mean, _, got = gaussian(betas, prediction).p_reverse(network, xt, t, s, clip)
    equal((got, mean), (x0_hat, backwards(betas, s, t, xt, x0_hat)[0]), atol=1e-8)


@given(chains(), arrays())
def test_reverse_mean_subtracts_the_noise_of_one_step(chain, xt):
    """[Ho et al. 2020, eq 11] mean = (x_t - beta eps_hat / sqrt(1 - alpha_bar_t)) / sqrt(alpha)."""
    betas, s, t = chain
    (k, beta), (_, v) = walk(betas, s, t), walk(betas, 0, t)
    equal(gaussian(betas).p_reverse(network, xt, t, s, clip=False)[0],
          (xt - beta / math.sqrt(v) * network(xt, at(t, xt))) / k, atol=1e-8)


@given(chains(), arrays(), fractions, seeds)
@example(([0.5], 0, 1), normal((2, 1), 1), 0.0, 1)
@example(([0.5, 0.9], 0, 2), normal((2, 1), 1), 0.0, 1)
@example(([0.5, 0.9], 0, 1), normal((2, 1), 1), 0.0, 1)
def test_variance_lies_between_beta_tilde_and_beta(chain, xt, f, seed):
    """log sigma^2 = f log beta + (1 - f) log beta_tilde, for a fixed f and for f = (v + 1) / 2.
    Where s = 0 log beta_tilde, -inf, is borrowed from the step above, or at T from log beta."""
    (betas, s, t), xt = chain, xt.reshape(len(xt), -1)
    v = 2 * normal(xt.shape, seed)
    fixed = gaussian(betas, variance=f).p_reverse(network, xt, t, s)[1]
    learned = gaussian(betas, variance="learned").p_reverse(
        lambda x, t: torch.cat([x, v], 1), xt, t, s)[1]
    equal((fixed, learned), tuple(reverse_log_var(betas, s, t, f) for f in (f, (v + 1) / 2)))


@given(chains(lowest=1), reals)
def test_ends_of_the_range_are_exact_for_a_point_and_for_unit_data(chain, m):
    """Var[x_s | x_t] = beta_tilde if x_0 is one point, beta if x_0 ~ N(m, 1)."""
    betas, s, t = chain
    small, large = (gaussian(betas, variance=f).p_reverse(network, torch.ones(1), t, s)[1].exp()
                    for f in (0, 1))
    equal((small, large), tuple(backwards(betas, s, t, 1.0, m, c)[1] for c in (0.0, 1.0)))


@given(chains(lowest=1), reals, st.floats(0, 2))
def test_right_variance_lies_as_far_up_the_range_for_every_step(chain, m, c):
    """Var[x_s | x_t] = beta_tilde + g (beta - beta_tilde), g = Var[x_0 | x_t] / (1 - alpha_bar_t)
    whatever s is; x_0 ~ N(m, c)."""
    betas, s, t = chain
    small, large = (gaussian(betas, variance=f).p_reverse(network, torch.ones(1), t, s)[1].exp()
                    for f in (0, 1))
    g = backwards(betas, 0, t, 1.0, m, c)[1] / walk(betas, 0, t)[1]
    equal(small + g * (large - small), backwards(betas, s, t, 1.0, m, c)[1])


# ---------------------------------------------------------------- losses and bound

@given(reals, st.floats(-8, 4), reals, st.floats(-8, 4))
def test_normal_kl_is_the_integral_of_the_log_ratio(mean1, log_var1, mean2, log_var2):
    """KL(p || q) = E_p[log p - log q], for two Gaussians, in nats."""
    values = [torch.tensor(v) for v in (mean1, log_var1, mean2, log_var2)]
    p, q = (Normal(m, (log_var / 2).exp()) for m, log_var in (values[:2], values[2:]))
    x, weight = quadrature(p.mean - 12 * p.stddev, p.mean + 12 * p.stddev)
    integral = (weight * p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x))).sum()
    equal((ddpm.normal_kl(*values),) * 2, (integral, kl_divergence(p, q)), rtol=1e-8)


LEVELS = st.sampled_from([2, 3, 16, 256])


@given(reals, st.floats(-12, 6), LEVELS)
@example(-3.0, -12.0, 2)
def test_decoder_is_a_distribution_over_the_levels(mean, log_std, levels):
    """sum over k of P(x_k) = 1 for every mean and log_std: the outer two bins are open."""
    x = torch.linspace(-1, 1, levels)
    mean, log_std = torch.full_like(x, mean), torch.full_like(x, log_std)
    log_p = ddpm.discretized_gaussian_log_likelihood(x, mean, log_std, levels)
    equal(log_p.logsumexp(0), 0.0)


@given(reals, st.floats(-12, 6), LEVELS)
@example(0.0, -12.0, 256)
@example(3.0, -12.0, 3)
@example(0.0, 6.0, 256)
@example(0.0, 0.0, 2)                                   # the mean on the edge of a bin
def test_decoder_is_the_integral_of_the_density_over_the_bin(mean, log_std, levels):
    """log P(x_k) = log of the integral of N(mean, std^2) over x_k +- 1 / (levels - 1), and its
    slope in the mean, which far in both tails must still pull: 1e10 at the extremes here."""
    x = torch.linspace(-1, 1, levels)
    mean, log_std = torch.full_like(x, mean).requires_grad_(), torch.full_like(x, log_std)
    log_p = ddpm.discretized_gaussian_log_likelihood(x, mean, log_std, levels)
    equal((log_p, *gradient(log_p, mean)), log_bin(x, mean.detach(), log_std, levels),
          atol=1e-7, rtol=1e-6)                         # a bin of 1e-5 stds loses 5 digits


@given(chains(), arrays())
def test_prior_term_is_the_kl_to_unit_noise(chain, x0):
    """L_T = KL(q(x_T | x_0) || N(0, I)), in bits per dimension."""
    equal(gaussian(chain[0]).prior_kl(x0), prior_term(chain[0], x0))


@given(chains(lowest=1), arrays(), seeds, predictions, fractions, st.booleans())
def test_bound_term_is_the_kl_from_posterior_to_reverse(chain, x0, seed, prediction, f, clip):
    """L_t = KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in bits per dimension, for s > 0."""
    (betas, s, t), xt = chain, normal(x0.shape, seed)
    equal(gaussian(betas, prediction, f).vlb_term(network, x0, xt, t, s, clip),
          term(betas, s, t, x0, xt, guess(betas, t, xt, prediction, clip), f), rtol=1e-7)


@given(chains(), arrays(), seeds, fractions, st.sampled_from([2, 5, 256]), st.booleans())
def test_last_term_is_the_code_length_of_the_data(chain, xt, seed, f, levels, clip):
    """L_0 = -log p(x_0 | x_t): the level's bin under N(x0_hat, sigma^2), in bits per dimension."""
    (betas, _, t), x0 = chain, data_on(levels, xt.shape, seed)
    right = term(betas, 0, t, x0, xt, guess(betas, t, xt, "v", clip), f, levels)
    equal(gaussian(betas, "v", f, levels).vlb_term(network, x0, xt, t, 0, clip), right,
          atol=1e-7, rtol=1e-6)                         # the decoder's, see above


@given(chains(lowest=1), arrays(), seeds, fractions)
def test_kl_is_the_weighted_square_error_of_eps(chain, x0, seed, f):
    """L_t = w |eps - eps_hat|^2 nats, w = beta^2 / (2 sigma^2 alpha (1 - alpha_bar_t)), if
    sigma^2 = beta_tilde; another fixed one adds (r - 1 - log r) / 2, r = beta_tilde / sigma^2."""
    (betas, s, t), eps = chain, normal(x0.shape, seed)
    (k, beta), (_, vt), xt = walk(betas, s, t), walk(betas, 0, t), noised(betas, t, x0, eps)
    log_var = reverse_log_var(betas, s, t, f)
    w = beta ** 2 / (2 * math.exp(log_var) * k ** 2 * vt)
    log_r = math.log(beta_tilde(betas, s, t)) - log_var
    nats = w * (eps - network(xt, at(t, xt))) ** 2 + (math.exp(log_r) - 1 - log_r) / 2
    equal(gaussian(betas, variance=f).vlb_term(network, x0, xt, t, s, clip=False),
          bits(nats), rtol=1e-7)


@given(chains(), arrays(), seeds, predictions)
def test_simple_loss_is_the_square_error_of_the_prediction(chain, x0, seed, prediction):
    """L_simple = mean (target - network)^2, the target being eps, x_0 or v = d x_t / d phi."""
    (betas, _, t), eps = chain, normal(x0.shape, seed)
    said = network(noised(betas, t, x0, eps), at(t, x0))
    fixed = gaussian(betas, prediction).loss_simple(network, x0, t, eps)
    learned = gaussian(betas, prediction, "learned").loss_simple(
        lambda x, t: torch.cat([network(x, t), x], 1), x0[:, None], t, eps[:, None])
    right = per_example((coordinates(betas, t, x0, eps)[prediction] - said) ** 2)
    equal((fixed, learned), (right, right))


@given(chains(), arrays(), seeds, predictions, fractions)
def test_vlb_loss_is_T_times_the_term(chain, eps, seed, prediction, f):
    """loss_vlb = T L_t, nothing clipped, L_0 at t = 1; of a step s -> t it is T / (t - s) times its term."""
    (betas, s, t), x0 = chain, data_on(256, eps.shape, seed)
    xt, diffusion = noised(betas, t, x0, eps), gaussian(betas, prediction, f)
    for given, s in ((), t - 1), ((s,), s):
        right = term(betas, s, t, x0, xt, guess(betas, t, xt, prediction), f)
        equal(diffusion.loss_vlb(network, x0, t, eps, *given), len(betas) / (t - s) * right,
              atol=1e-7, rtol=1e-6)                     # at s = 0 the decoder's, see above


def losses_and_gradients(chain, shape, seed, prediction, s=None, **weight):
    """Each of the three losses, with its gradients in the two halves of a learned network."""
    (betas, _, t), shape = chain, (*shape, 2)
    diffusion, x0 = gaussian(betas, prediction, "learned"), data_on(256, shape, seed)
    for loss, extra in ((diffusion.loss_simple, {}), (diffusion.loss_vlb, dict(s=s)),
                        (diffusion.loss_hybrid, dict(s=s, **weight))):
        halves = [normal(shape, seed + i).requires_grad_() for i in (1, 2)]
        value = loss(lambda x, t: torch.cat(halves, 1), x0, t, normal(shape, seed), **extra)
        yield value, *gradient(value, *halves)


@given(chains(), shapes, seeds, predictions, st.floats(0, 2))
def test_hybrid_loss_adds_a_thousandth_of_the_bound(chain, shape, seed, prediction, weight):
    """L_hybrid = L_simple + 1e-3 T L_t, or of another step and weight; the variance learns from the
    bound alone."""
    each = weight * torch.arange(shape[0])
    for given, w in ({}, torch.tensor(1e-3)), (dict(s=chain[1], vlb_weight=each), each):
        (simple, _, none), (vlb, _, full), (hybrid, _, got) = losses_and_gradients(
            chain, shape, seed, prediction, **given)
        equal((hybrid, got, none), (simple + w * vlb, column(w.expand(shape[0]), got) * full, 0.0), rtol=1e-8)


@given(chains(), shapes, seeds, predictions)
def test_no_gradient_passes_the_stop(chain, shape, seed, prediction):
    """d L_hybrid / d mean = d L_simple / d mean exactly: T L_t trains the variance alone, and
    nothing where that is fixed."""
    (_, simple, _), _, (_, hybrid, _) = losses_and_gradients(chain, shape, seed, prediction)
    fixed, x0, said = gaussian(chain[0], prediction, 0.5), normal(shape, seed), \
        normal(shape, seed + 1).requires_grad_()
    one, both = (gradient(loss(lambda x, t: said, x0, chain[2], x0), said)[0]
                 for loss in (fixed.loss_simple, fixed.loss_hybrid))
    equal((hybrid - simple, both - one), (0.0, 0.0), atol=0)


@given(chains(lowest=1), seeds, predictions)
def test_bound_trains_the_mean_too(chain, seed, prediction):
    """d (T L_t) / d network is the full gradient: that of the KL written out, by autograd."""
    (betas, _, t), x0, said = chain, normal((2, 3), seed), normal((2, 3), seed + 1).requires_grad_()
    xt = noised(betas, t, x0, x0.flip(0))
    loss = gaussian(betas, prediction, 0.5).loss_vlb(lambda x, t: said, x0, t, x0.flip(0))
    right = term(betas, t - 1, t, x0, xt, estimate(betas, t, xt, said, prediction), 0.5)
    equal(gradient(loss, said), gradient(len(betas) * right, said), rtol=1e-7)


@few
@given(st.integers(2, 5), st.sampled_from(["loss_simple", "loss_vlb", "loss_hybrid"]))
def test_training_draws_every_time_alike_and_unit_noise(T, loss):
    """t ~ uniform{1..T}, both ends, each example its own; eps ~ N(0, I)."""
    seen, betas, x0 = [], [0.3] * T, torch.full((20000, 1), 0.5)
    accepted(lambda: getattr(gaussian(betas), loss)(lambda x, t: seen.append((x, t)) or x, x0))
    (xt, t), = seen
    frequencies(t - 1, torch.full((T,), 1 / T))
    for i in range(1, T + 1):
        sampled(xt[t == i], walk(betas, 0, i)[0] * 0.5, walk(betas, 0, i)[1])


def off_by(betas, x0, error):
    """A network (eps) that knows x_0 but says x0_hat = x_0 + error: its terms have no noise."""
    def model(x, t):
        k, v = (column(torch.tensor(c), x) for c in zip(*(walk(betas, 0, int(i)) for i in t)))
        return (x - k * (x0 + error)) / v.sqrt()
    return model


@given(grids(), shapes, seeds, fractions, st.booleans(), st.floats(-0.5, 0.5))
@example(([0.5], [1]), (1,), 1, 0.0, True, 0.1)
def test_bits_per_dim_adds_the_three_parts(chain, shape, seed, f, clip, error):
    """total = L_T + sum of L_t over the grid's steps, L_0 first, each at its own
    x_t ~ q(x_t | x_0); and x0_hat's square error."""
    (betas, grid), x0, seen = chain, data_on(256, shape, seed), []
    x0_hat = (x0 + error).clamp(-1, 1) if clip else x0 + error
    got = gaussian(betas, variance=f).bits_per_dim(off_by(betas, x0, error), x0, grid, clip)
    terms = torch.stack([term(betas, s, t, x0, x0, x0_hat, f) for s, t in steps_of(grid)], 1)
    prior, square = prior_term(betas, x0), per_example((x0_hat - x0) ** 2)
    equal((got["prior"], got["terms"], got["total"], got["x0_mse"]),
          (prior, terms, prior + terms.sum(1), square[:, None]),
          atol=1e-7, rtol=1e-5)       # x0_hat to eps and back loses digits where alpha_bar is 1e-12
    gaussian(betas).bits_per_dim(lambda x, t: seen.append(x) or x, torch.full((2000, 1), 0.5), grid)
    k, v = torch.tensor([walk(betas, 0, t) for t in grid]).T
    sampled(torch.cat(seen, 1), k * 0.5, v)


@given(grids(), shapes, seeds, fractions)
def test_mean_of_the_vlb_loss_over_t_is_the_sum_of_the_terms(chain, shape, seed, f):
    """(1 / T) sum over t of T L_t = L_0 + L_1 + ... : one random t is an unbiased estimate; and so
    for the bound of a grid, whose steps count by their length."""
    (betas, grid), x0 = chain, data_on(256, shape, seed)
    T, diffusion, model = len(betas), gaussian(betas, variance=f), off_by(betas, x0, 0.1)
    single = [diffusion.loss_vlb(model, x0, t) / T for t in range(1, T + 1)]
    strided = [diffusion.loss_vlb(model, x0, t, s=s) * (t - s) / T for s, t in steps_of(grid)]
    for losses, every in (single, range(1, T + 1)), (strided, grid):
        right = sum(term(betas, s, t, x0, x0, x0 + 0.1, f) for s, t in steps_of(list(every)))
        equal(sum(losses), right, atol=1e-7, rtol=1e-5)                 # the same loss of digits


@given(chains(longest=5, beta=st.floats(0.05, 0.9)), reals, st.floats(0.05, 4), reals)
def test_bound_is_tight_for_gaussian_data(chain, m, c, x0):
    """If x_0 ~ N(m, c), with the exact reverse step, the true q(x_T) as prior and the density for
    L_0, then L_T + sum of L_t + L_0 = -log p(x_0) at every x_0, for every T."""
    betas, T, data = chain[0], len(chain[0]), torch.full((2, 1), x0)
    c = 1.0 if T == 1 else c          # at T = 1 sigma^2 can only be beta, exact for unit variance
    exact, diffusion = exact_for_gaussian_data(betas, m, c, list(range(1, T + 1))), \
        gaussian(betas, variance="learned")
    k, v = walk(betas, 0, T)
    total = kl_divergence(Normal(torch.tensor(k * x0), math.sqrt(v)),
                          Normal(torch.tensor(k * m), math.sqrt(k * k * c + v)))
    for t in range(1, T + 1):         # a term is quadratic in eps: its mean is that over eps = +-1
        xt = noised(betas, t, data, torch.tensor([[1.0], [-1.0]]))
        mean, log_var, _ = diffusion.p_reverse(exact, xt, t, clip=False)
        total += diffusion.vlb_term(exact, data, xt, t, clip=False).mean() * math.log(2) if t > 1 \
            else -Normal(mean, (log_var / 2).exp()).log_prob(data).mean()
    equal(total, -Normal(m, math.sqrt(c)).log_prob(torch.tensor(x0)), atol=1e-7)


@few
@given(st.lists(st.floats(0.2, 0.9), min_size=1, max_size=3), st.floats(0.2, 1),
       st.sampled_from(["x0", "v"]), st.booleans())
def test_bound_is_never_below_minus_log_p(betas, f, prediction, clip):
    """L_T + sum of L_t + L_0 >= -log p(x_0), p(x_0) the integral over every path x_T ... x_1;
    and p sums to 1 over the levels."""
    x0, diffusion = torch.linspace(-1, 1, 5), gaussian(betas, prediction, f, 5)
    x, weight = quadrature(torch.tensor([-9.0]), torch.tensor([9.0]), 200)
    density = Normal(0.0, 1.0).log_prob(x).exp() * weight                     # (nodes, 1)
    mass, bound = density, diffusion.prior_kl(x0[:, None])
    for t in range(len(betas), 0, -1):
        mean, log_var, _ = diffusion.p_reverse(network, x, t, clip=clip)
        step = Normal(mean, (log_var / 2).exp()).log_prob(x.T).exp()          # p(x_s | x_t)
        mass = (step * mass).sum(0)[:, None] * weight if t > 1 else mass
        xt = noised(betas, t, x0, x).reshape(-1, 1)                           # (nodes * levels, 1)
        terms = diffusion.vlb_term(network, x0.repeat(len(x))[:, None], xt, t, clip=clip)
        bound = bound + (terms.view(-1, 5) * density).sum(0)
    p = (log_bin(x0, mean, log_var / 2, 5)[0].exp() * mass).sum(0)
    equal((p.sum(), (-p.log2() - bound).clamp(min=0)), (1.0, 0.0), atol=1e-6)


@given(chains(beta=st.floats(0.05, 0.9)), shapes, seeds, predictions, fractions)
@example(([0.3, 0.5, 0.7], 0, 3), (2, 3), 1, "eps", 0.3)
@example(([0.3, 0.5, 0.7], 0, 2), (2, 3), 1, "eps", 0.3)
@example(([0.3], 0, 1), (2, 3), 1, "v", 0.3)
def test_gradient_of_the_bound_in_the_betas_is_a_finite_difference(chain, shape, seed, prediction, f):
    """d L_t / d beta_i and d L_T / d beta_i are those of the terms written out, x_t moving with beta."""
    (betas, s, t), x0, eps = chain, data_on(256, shape, seed), normal(shape, seed)
    leaf = torch.tensor(betas).requires_grad_()
    d = ddpm.GaussianDiffusion(leaf, prediction, f)

    def by_hand(betas):
        xt = noised(betas, t, x0, eps)
        return term(betas, s, t, x0, xt, guess(betas, t, xt, prediction), f).sum()

    got = d.vlb_term(network, x0, d.q_sample(x0, t, eps), t, s, clip=False), d.prior_kl(x0)
    for value, right in zip(got, (by_hand, lambda betas: prior_term(betas, x0).sum())):
        equal(gradient(value, leaf)[0], [slope(right, betas, i) for i in range(len(betas))],
              atol=1e-6, rtol=1e-6)                             # rounding over h, 5e-5 at least


@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=6), shapes, seeds,
       st.sampled_from(["x0", "v"]), fractions | st.just("learned"))
@example([0.9] * 800, (1,), 1, "v", 0.0)                        # alpha_bar_T = 1e-800
def test_learned_noise_has_finite_gradients_at_every_time(betas, shape, seed, prediction, f):
    """Each loss, L_T, the posterior and q have finite gradients in the betas, also where a variance is 0."""
    leaf, T = torch.tensor(betas).requires_grad_(), len(betas)
    d, t = ddpm.GaussianDiffusion(leaf, prediction, f), torch.arange(1, T + 1)
    x0 = data_on(256, (T, *shape), seed)

    def model(x, t):
        return torch.cat([network(x, t)] * (2 if f == "learned" else 1), 1)

    values = [d.prior_kl(x0), d.q_step(x0, t, t), d.q_sample(x0, t - 1), d.q_posterior(x0, x0, t, t - 1)[0],
              d.q_posterior(x0, x0, t, 0)[1].exp(), d.loss_simple(model, x0, t), d.loss_vlb(model, x0, t),
              d.loss_vlb(model, x0, t, s=0), d.loss_hybrid(model, x0, t)]
    equal(torch.stack([gradient(value, leaf)[0] for value in values]).isfinite().double(), 1.0)


@given(st.floats(-0.9, 0.9), st.floats(-0.6, 0.6), st.floats(-2, 2))
@settings(max_examples=4 * EXAMPLES)
def test_small_steps_leave_the_two_ends_of_the_schedule(x0, bend, shift):
    """[Kingma et al. 2021] As T grows, L_2 + ... + L_T goes to the integral of E |x_0 - x0_hat|^2 d SNR / 2
    between the two ends, for a network that is told the noise level: its gradient in a bend of the schedule
    between them goes to 0 like 1 / T, in an end to the integrand there."""
    eps, weight = (v.view(-1, 1) for v in quadrature(torch.tensor(-8.0), torch.tensor(8.0), 60))
    weight = weight * Normal(0.0, 1.0).log_prob(eps).exp()

    def guess(x, alpha_bar):
        return torch.tanh(x + 2 * alpha_bar + shift)

    def gradients(T):
        leaves = first, last, inner = torch.tensor([-3.0, 3.0, bend]).requires_grad_().unbind()
        u = torch.linspace(0, 1, T)
        alpha_bar = torch.sigmoid(-(first + (last - first) * (u + inner * u * (1 - u))))
        betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
        d, t = ddpm.GaussianDiffusion(betas, "x0", 0), torch.arange(2, T + 1).repeat(len(eps))
        data, z = torch.full((len(t), 1), x0), eps.repeat_interleave(T - 1, 0)
        terms = d.vlb_term(lambda x, t: guess(x, d.alpha_bar[t][:, None]), data, d.q_sample(data, t, z), t)
        return gradient((terms * weight.repeat_interleave(T - 1)).sum() * math.log(2), *leaves)

    def integrand(log_snr):
        """d SNR / d log SNR E |x_0 - x0_hat|^2 / 2 at an end."""
        level = torch.sigmoid(torch.tensor(log_snr))
        error = x0 - guess(level.sqrt() * x0 + (1 - level).sqrt() * eps, level)
        return math.exp(log_snr) / 2 * (weight * error ** 2).sum()

    once, twice = gradients(100), gradients(200)
    limits = tuple(2 * b - a for a, b in zip(once, twice))              # what is left goes like 1 / T^2
    equal(limits, (-integrand(3.0), integrand(-3.0), 0.0), atol=5e-3, rtol=2e-3)


@given(rates, st.lists(reals, min_size=1, max_size=3), st.integers(0, 255))
def test_one_step_is_a_variational_autoencoder(beta, said, level):
    """T = 1: total = KL(N(sqrt(1 - beta) x_0, beta) || N(0, 1)) - log p(x_0 | x_1)."""
    said, x0 = torch.tensor([said]), torch.full((1, len(said)), 2 * level / 255 - 1)
    encoder = Normal(math.sqrt(1 - beta) * x0, math.sqrt(beta))
    decoder = log_bin(x0, said.clamp(-1, 1), torch.tensor(math.log(beta) / 2))[0]
    equal(gaussian([beta], "x0").bits_per_dim(lambda x, t: said, x0)["total"],
          bits(kl_divergence(encoder, Normal(0.0, 1.0)) - decoder), atol=1e-7, rtol=1e-6)


# ---------------------------------------------------------------- samplers

@given(chains(), arrays(), seeds, predictions, fractions, st.booleans())
def test_ancestral_step_draws_from_the_reverse_process(chain, xt, seed, prediction, f, clip):
    """x_s = mean + sigma z; on reaching 0 no noise is added: x_0 = x0_hat."""
    (betas, s, t), z = chain, normal(xt.shape, seed)
    x0_hat = guess(betas, t, xt, prediction, clip)
    sigma = math.exp(reverse_log_var(betas, s, t, f) / 2) if s else 0.0
    equal(gaussian(betas, prediction, f).p_sample(network, xt, t, s, z, clip=clip),
          (backwards(betas, s, t, xt, x0_hat)[0] + sigma * z, x0_hat), atol=1e-8)


@given(chains(), arrays(), seeds, predictions, fractions, st.booleans())
def test_ddim_step_turns_towards_the_estimate(chain, xt, seed, prediction, eta, clip):
    """[Song et al. 2020, eq. 12] x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2)
    eps_hat + sigma z, sigma^2 = eta^2 beta_tilde; eps_hat belongs to the clipped x0_hat."""
    betas, s, t = chain
    (ks, vs), (kt, vt) = walk(betas, 0, s), walk(betas, 0, t)
    x0_hat, var = guess(betas, t, xt, prediction, clip), eta ** 2 * beta_tilde(betas, s, t)
    eps_hat, z = (xt - kt * x0_hat) / math.sqrt(vt), normal(xt.shape, seed)
    xs = ks * x0_hat + math.sqrt(vs - var) * eps_hat + math.sqrt(var) * z
    equal(gaussian(betas, prediction, 0.3).p_sample(network, xt, t, s, z, eta, clip), (xs, x0_hat),
          atol=1e-8)


@given(chains(), arrays(), seeds, st.booleans())
def test_ddim_at_eta_one_is_ancestral_with_beta_tilde(chain, xt, seed, clip):
    """eta = 1: x_s ~ q(x_s | x_t, x0_hat), DDPM's step with the small variance."""
    (betas, s, t), z, diffusion = chain, normal(xt.shape, seed), gaussian(chain[0])
    mean, var = backwards(betas, s, t, xt, guess(betas, t, xt, clip=clip))
    equal(tuple(diffusion.p_sample(network, xt, t, s, z, eta, clip)[0] for eta in (1.0, None)),
          (mean + math.sqrt(var) * z,) * 2, atol=1e-8)


@given(chains(), arrays(), fractions)
def test_ddim_keeps_the_marginals(chain, x0, eta):
    """If x0_hat = x_0 then x_t ~ q(x_t | x_0) goes to x_s ~ q(x_s | x_0), whatever eta."""
    (betas, s, t), o, one, diffusion = chain, 0 * x0, torch.ones_like(x0), gaussian(chain[0], "x0")

    def xs(x0, eps, z):
        xt = noised(betas, t, x0, eps)
        return diffusion.p_sample(lambda x, t: x0, xt, t, s, z, eta, clip=False)[0]

    ks, vs = walk(betas, 0, s)
    equal((xs(x0, o, o), xs(o, one, o) ** 2 + xs(o, o, one) ** 2), (ks * x0, vs))


@few
@given(chains(lowest=1), reals, fractions, st.sampled_from([None, 0.5]))
def test_step_noise_is_standard_normal(chain, xt, f, eta):
    """Where no noise is given, x_s has the variance sigma^2 of the step around its mean."""
    (betas, s, t), x = chain, torch.full((20000, 1), xt)
    step = gaussian(betas, variance=f).p_sample
    mean, _ = step(network, x[:1], t, s, torch.zeros(1, 1), eta)
    var = eta ** 2 * beta_tilde(betas, s, t) if eta else math.exp(reverse_log_var(betas, s, t, f))
    sampled(step(network, x, t, s, eta=eta)[0], mean[0], var)


@given(grids(), shapes, seeds, st.sampled_from([None, 0.0, 0.7]), st.booleans())
def test_sampler_walks_the_grid_down_to_clean_data(chain, shape, seed, eta, clip):
    """x_T, then one reverse step for each neighbour pair of 0 = S_0 < S_1 < ... < S_n = T."""
    (betas, grid), seen, diffusion = chain, [], gaussian(chain[0], variance=0.5)
    said = [] if clip else [clip]                           # clipped if nothing is said
    torch.manual_seed(seed)
    s, xs, x0_hat = zip(*diffusion.sample_progressive(
        lambda x, t: seen.append((x, t)) or network(x, t), shape, grid, eta, *said))
    torch.manual_seed(seed)
    last, (inputs, times) = diffusion.sample(network, shape, grid, eta, *said), zip(*seen)
    right = [guess(betas, t, x, clip=clip) for x, t in zip(inputs, grid[::-1])]
    equal((list(s), torch.stack(times)[:, 0], torch.stack([*inputs[1:], last]), torch.stack(x0_hat),
           last), ([0, *grid][-2::-1], grid[::-1], torch.stack(xs), torch.stack(right), right[-1]),
          atol=1e-8)


@few
@given(grids(), st.sampled_from(["sample", "langevin"]))
def test_sampling_starts_from_unit_noise(chain, sampler):
    """x_T ~ N(0, I)."""
    seen = []
    getattr(gaussian(chain[0]), sampler)(lambda x, t: seen.append(x) or x, (20000, 1), chain[1])
    sampled(seen[0], 0.0, 1.0)


@given(grids(), shapes, predictions)
def test_deterministic_ddim_is_a_function_of_the_noise(chain, shape, prediction):
    """eta = 0: x_S = sqrt(alpha_bar_S) x0_hat + sqrt(1 - alpha_bar_S) eps_hat down the grid."""
    (betas, grid), seen = chain, []
    result = gaussian(betas, prediction).sample(
        lambda x, t: seen.append(x) or network(x, t), shape, grid, eta=0.0, clip=False)
    x = seen[0]
    for s, t in steps_of(grid)[::-1]:
        (ks, vs), (kt, vt) = walk(betas, 0, s), walk(betas, 0, t)
        x0_hat = guess(betas, t, x, prediction)
        x = ks * x0_hat + math.sqrt(vs / vt) * (x - kt * x0_hat)
    equal(result, x, atol=1e-6, rtol=1e-6)     # dividing by sqrt(alpha_bar) magnifies at each step


@few
@given(st.floats(-0.8, 0.8), st.floats(0.02, 3), st.sampled_from([[1, 3, 4], [2, 4], [1, 2, 3, 4]]))
def test_sampler_with_the_exact_denoiser_returns_gaussian_data(m, c, grid):
    """x_0 ~ N(m, c) in, N(m, c) out, at every stride: with E[eps | x_t] and the exact variance.
    (At s = 0 no noise is added: the result is E[x_0 | x_t], short of c by Var[x_0 | x_t].)"""
    betas = [0.3, 0.5, 0.9, 1 - 1e-7]
    x0 = gaussian(betas, variance="learned").sample(
        exact_for_gaussian_data(betas, m, c, grid), (20000, 1), grid, clip=False)
    sampled(x0, m, c - backwards(betas, 0, grid[0], 0.0, m, c)[1])


@few
@given(st.floats(-1, 1), st.floats(0.1, 3))
def test_ddim_without_noise_follows_the_probability_flow(m, c):
    """eta = 0, x_0 ~ N(m, c): as T grows x_0 -> m + sqrt(c / (alpha_bar_T c + 1 - alpha_bar_T))
    (x_T - sqrt(alpha_bar_T) m), the error falling like 1 / T; encoding goes the same way up."""
    errors = []
    for T in (100, 200):
        betas, seen = [6 / T] * T, []

        def exact(x, t):
            (k, v), x0 = walk(betas, 0, int(t[0])), backwards(betas, 0, int(t[0]), x, m, c)[0]
            return seen.append(x) or (x - k * x0) / math.sqrt(v)

        x0, (k, v) = gaussian(betas).sample(exact, (8, 1), eta=0.0, clip=False), walk(betas, 0, T)
        flow = m + math.sqrt(c / (k * k * c + v)) * (seen[0] - k * m)
        errors.append((x0 - flow).abs().max())
        up = gaussian(betas).ddim_encode(exact, flow)
        equal((x0, up), (flow, seen[0]), atol=12 / T * (1 + 1 / c))
    equal(errors[1] / errors[0], 0.5, atol=0.15)


@given(grids(), arrays())
def test_encoding_is_ddim_run_backwards(chain, x0):
    """x_t = sqrt(alpha_bar_t) x0_hat + sqrt(1 - alpha_bar_t) eps_hat, where eps_hat is taken at
    (x_s, t) and x0_hat = (x_s - sqrt(1 - alpha_bar_s) eps_hat) / sqrt(alpha_bar_s)."""
    (betas, grid), x = chain, x0
    for s, t in steps_of(grid):
        (ks, vs), (kt, vt), eps = walk(betas, 0, s), walk(betas, 0, t), network(x, at(t, x))
        x = kt * (x - math.sqrt(vs) * eps) / ks + math.sqrt(vt) * eps
    equal(gaussian(betas).ddim_encode(network, x0, grid), x, atol=1e-8)


@given(grids(), arrays())
def test_encoding_and_decoding_are_inverse_when_eps_depends_on_t_alone(chain, x0):
    """From x_T = ddim_encode(x_0), eta = 0 leads back to x_0: the two differ only in where they
    take eps_hat."""
    def clock(x, t):
        return 0 * x + torch.cos(column(t, x).double())

    (betas, grid), diffusion = chain, gaussian(chain[0])
    x = diffusion.ddim_encode(clock, x0, grid)
    for s, t in steps_of(grid)[::-1]:
        x, _ = diffusion.p_sample(clock, x, t, s, eta=0.0, clip=False)
    equal(x, x0, atol=1e-7)


@few
@given(st.lists(rates, min_size=1, max_size=3), st.floats(-1, 1), st.floats(0.3, 0.7))
def test_langevin_settles_at_the_noised_data(betas, x0, snr):
    """x <- x + h score + sqrt(2 h) z, h = 2 snr^2 (1 - alpha_bar_t), for one data point: it settles
    at N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) / (1 - snr^2)), q(x_t | x_0) as snr -> 0."""
    seen, down = [], list(range(len(betas), 0, -1))

    def exact(x, t):
        k, v = walk(betas, 0, int(t[0]))
        return seen.append((x, int(t[0]))) or (x - k * x0) / math.sqrt(v)

    result = gaussian(betas).langevin(exact, (10000, 1), corrector_steps=80, snr=snr)
    for t, (x, _) in zip(down, seen[80::80]):                 # what each level leaves to the next
        k, v = walk(betas, 0, t)
        sampled(x, k * x0, v / (1 - snr ** 2))
    equal(([t for _, t in seen[:-1:80]], seen[-1][1], result), (down, 1, x0))


@few
@given(st.floats(-1, 1))
def test_langevin_takes_one_small_step_a_level_unless_told(x0):
    """snr = 0.16: once u <- (1 - 2 snr^2) u + 2 snr z, where u = (x - sqrt(alpha_bar) x_0) /
    sqrt(1 - alpha_bar)."""
    seen, (k, v) = [], walk([0.3], 0, 1)
    gaussian([0.3]).langevin(
        lambda x, t: seen.append((x - k * x0) / math.sqrt(v)) or seen[-1], (20000, 1))
    start, end = seen
    sampled(end - (1 - 2 * 0.16 ** 2) * start, 0.0, (2 * 0.16) ** 2)


@given(grids(), arrays(), seeds, st.sampled_from([None, 0.0, 0.7]), st.booleans())
def test_held_places_of_gaussian_data_end_as_they_are(chain, x0, seed, eta, clip):
    """x_0 comes out exactly where it is known, and a number wherever it is NaN; nothing held, nothing changed."""
    (betas, grid), free = chain, integers(2, x0.shape, seed) == 1
    d, known = gaussian(betas, variance=0.5), torch.where(free, math.nan, x0)
    result, x, y = (d.sample(network, x0.shape, grid, eta, clip, known=k) for k in (known, x0[:1], known.float()))
    equal((torch.where(free, x0, result), x, torch.where(free, 0, y), result.isfinite().double()),
          (x0, x0[:1].expand_as(x), torch.where(free, 0, x0.float()), 1.0), atol=0, rtol=0)


@few
@given(st.floats(-1, 1), st.sampled_from([[1, 3, 4], [2, 4], [1, 2, 3, 4]]))
def test_held_places_follow_q_and_leave_independent_ones_alone(x0, grid):
    """x_0 ~ N(0, I), the second place held: it is drawn from q(x_s | x_0) at each s, T included, apart from all
    else; the first is drawn as if nothing were held. So it is exact where the places are independent."""
    betas, seen = [0.3, 0.2, 0.5, 0.4], []
    exact, n = exact_for_gaussian_data(betas, 0.0, 1.0, grid), 20000
    last = gaussian(betas, variance="learned").sample(lambda x, t: seen.append(x) or exact(x, t), (n, 2), grid,
                                                      clip=False, known=torch.tensor([math.nan, x0]))
    before = torch.zeros(n)
    for t, x in zip(grid[::-1], seen):
        k, v = walk(betas, 0, t)
        sampled(x, torch.tensor([0.0, k * x0]), torch.tensor([1.0, v]))
        z = (x[:, 1] - k * x0) / math.sqrt(v)
        equal(torch.stack([x[:, 0] * z, before * z]).mean(1) * math.sqrt(n), 0.0, atol=5)
        before = z
    sampled(last[:, 0], 0.0, 1 - backwards(betas, 0, grid[0], 0.0, 0.0, 1.0)[1])
    equal(last[:, 1], x0, atol=0)


# ---------------------------------------------------------------- guidance

weights = st.sampled_from([0.0, -1.0]) | st.floats(-2, 4)
POINTS = st.lists(st.floats(-1, 1), min_size=2, max_size=5)


@given(chains(), POINTS, arrays(), seeds, predictions, weights)
def test_guided_score_is_that_of_the_sharpened_density(chain, points, xt, seed, prediction, w):
    """score = grad log q(x_t) + (1 + w) grad log q(y | x_t), x_0 one of n points with labels, y -1 for none."""
    (betas, _, t), leaf, y = chain, xt.clone().requires_grad_(), integers(3, (len(xt),), seed) - 1
    data = Labelled(points, betas, t)
    log_q = data.log_q(leaf, 0 * y - 1).logsumexp(-1)
    log_label = data.log_q(leaf, y).logsumexp(-1) - log_q                   # log q(y | x_t)
    equal(gaussian(betas, prediction).score(ddpm.guided(data.model(prediction), y, w), xt, t),
          *gradient(log_q + (1 + w) * log_label, leaf), rtol=1e-7)


@given(shapes, seeds, st.booleans(), weights)
def test_guidance_pushes_the_prediction_alone_in_one_call(shape, seed, learned, w):
    """(1 + w) m(x, t, y) - w m(x, t, -1) for the prediction, m(x, t, y) for the variance; w = 0 is the network
    given y and w = -1 the one without, exactly; one call, on 2B examples."""
    shape, calls = (*shape, 2) if learned else shape, []
    x, t, y = normal(shape, seed), 1 + integers(9, shape[:1], seed), integers(4, shape[:1], seed) - 1

    def model(x, t, y):
        calls.append((len(x), *y.tolist()))
        halves = [torch.sin((2 + i) * x + column(t * (y + 2), x)) for i in range(1 + learned)]
        return torch.cat(halves, 1) if learned else halves[0]

    got = ddpm.guided(model, y, w)(x, t)
    equal(torch.tensor(calls), [[2 * len(x), *y.tolist(), *[-1] * len(x)]])
    pairs = [v.chunk(1 + learned, 1) if learned else (v,) for v in (got, model(x, t, y), model(x, t, 0 * y - 1))]
    (got, *variance), (given, *share), (without, *_) = pairs
    right = {0.0: given, -1.0: without}.get(w, (1 + w) * given - w * without)
    equal((got, *variance), (right, *share), *[(0, 0), ()][w not in (0.0, -1.0)])


@few
@given(grids(longest=4, beta=st.floats(0.05, 0.9)), POINTS, st.sampled_from(["x0", "v"]), st.sampled_from([0.0, 1.0]))
def test_labels_lower_the_bound(chain, points, prediction, f):
    """The mean over (x_0, y) of the bound given y is at most that of the bound without, each with the exact
    E[x_0 | x_t, y]: what is known of y need not be guessed."""
    betas, grid = chain
    points = (torch.tensor(points) * 127.5 + 127.5).round() / 127.5 - 1                 # on the 256 levels
    eps, weight = (v.view(-1, 1) for v in quadrature(torch.tensor(-8.0), torch.tensor(8.0), 100))
    weight = (weight * Normal(0.0, 1.0).log_prob(eps).exp()).expand(-1, len(points)).reshape(-1)
    x0 = points.repeat(len(eps))[:, None]
    bounds = []
    for labelled in (True, False):
        total = 0.0
        for s, t in steps_of(grid):
            data = Labelled(points.tolist(), betas, t)
            y = data.labels.repeat(len(eps)) if labelled else torch.full((len(x0),), -1)
            xt = noised(betas, t, x0, eps.expand(-1, len(points)).reshape(-1, 1))
            model = ddpm.guided(data.model(prediction), y, 0.0)
            total += (weight * gaussian(betas, prediction, f).vlb_term(model, x0, xt, t, s)).sum()
        bounds.append(total)
    equal((bounds[0] - bounds[1]).clamp(min=0), 0.0)


# ---------------------------------------------------------------- numbers, batches, devices, errors

@given(st.sampled_from([ddpm.linear_beta_schedule, ddpm.cosine_beta_schedule,
                        lambda T: torch.full((T,), 1e-4)]),
       st.sampled_from([1, 10, 1000, 4000]), st.data())
def test_float32_coefficients_are_exact_to_1e_5(schedule, T, data):
    """Every coefficient that reaches float32 data is the walked chain's to 1e-5; T up to 4000."""
    t = data.draw(st.sampled_from([1, T]) | st.integers(1, T))
    s = data.draw(st.sampled_from([0, t - 1]) | st.integers(0, t - 1))
    d, betas = ddpm.GaussianDiffusion(schedule(T), "x0", 0.3), schedule(T).tolist()
    one, o = torch.ones(1, 1, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.float32)
    (k, v), (kt, vt), sin = walk(betas, s, t), walk(betas, 0, t), walk(betas, 0, t)[1] ** 0.5
    pairs = [(d.q_step(one, s, t, o), k), (d.q_step(o, s, t, one), v ** 0.5),
             (d.q_sample(one, t, o), kt), (d.q_sample(o, t, one), sin),
             (d.q_posterior(one, o, t, s)[0], backwards(betas, s, t, 0.0, 1.0)[0]),
             (d.q_posterior(o, one, t, s)[0], backwards(betas, s, t, 1.0, 0.0)[0]),
             (d.q_posterior(o, o, t, s)[1].exp(), beta_tilde(betas, s, t)),
             (d.q_marginal(o, t)[1].exp(), vt),
             (d.predict_x0(one, t, o), 1 / kt), (d.predict_x0(o, t, one), -sin / kt),
             (d.predict_eps(one, t, o), 1 / sin), (d.predict_eps(o, t, one), -kt / sin),
             (d.predict_v(one, o, t), -sin), (d.predict_v(o, one, t), kt),
             (d.p_reverse(lambda x, t: x, o, t, s)[1].exp(),
              math.exp(reverse_log_var(betas, s, t, 0.3)))]
    left, right = zip(*pairs)
    holds({x.dtype for x in left} == {torch.float32}, "float32 went in and something else came out")
    equal(left, right, atol=0, rtol=1e-5)


def own_times(T, seed):
    """Three times s < t <= T, one for each example."""
    s = integers(T, (3,), seed)
    return s, s + 1 + integers(10 ** 6, (3,), seed + 1) % (T - s)


def alone_and_together(laws, s, t):
    """The laws of three examples as one batch, and of each alone; times are ints or (B,), mixed."""
    together = laws(slice(None), s, t) + laws(slice(None), 0, t)
    alone = [laws(slice(i, i + 1), int(s[i]), int(t[i])) + laws(slice(i, i + 1), 0, t[i:i + 1])
             for i in range(3)]
    return together, tuple(torch.cat(values) for values in zip(*alone))


@given(st.lists(rates, min_size=1, max_size=6), arrays(st.just((3, 2, 2))), seeds)
def test_each_gaussian_example_has_its_own_time(betas, x, seed):
    """f(x, s, t)_i = f(x_i, s_i, t_i): no example sees another."""
    x0, z, weight = data_on(256, x.shape, seed), normal(x.shape, seed), torch.tensor([0.1, 0.2, 0.4])
    d = gaussian(betas, variance="learned")

    def model(x, t):
        return torch.cat([network(x, t), network(2 * x, t)], 1)

    def laws(i, s, t):
        a, b, c = x0[i], x[i], z[i]
        return (d.q_step(b, s, t, c), *d.q_marginal(a, t), d.q_sample(a, t, c), d.prior_kl(a),
                *d.q_posterior(a, b, t, s), d.predict_x0(b, t, c), d.predict_eps(b, t, a),
                d.predict_v(a, c, t), d.score(model, b, t), *d.p_reverse(model, b, t, s),
                d.vlb_term(model, a, b, t, s), d.loss_simple(model, a, t, c),
                d.loss_vlb(model, a, t, c, s), d.loss_hybrid(model, a, t, c, s, weight[i]),
                *d.p_sample(model, b, t, s, c), *d.p_sample(model, b, t, s, c, eta=0.5))

    equal(*alone_and_together(laws, *own_times(len(betas), seed)), atol=1e-12)


@machinery
def test_gaussian_tables_stay_float64_and_out_of_checkpoints():
    """.half() and the like leave the tables float64; the state dictionary is empty."""
    diffusion, x = gaussian([1e-4, 0.3]), torch.ones(1, 1)
    before = diffusion.q_posterior(x, x, 2)
    for module in (diffusion.half(), diffusion.bfloat16(), diffusion.float()):
        holds(module.alpha_bar.dtype == torch.float64 and not module.state_dict())
        equal(module.q_posterior(x, x, 2), before, atol=0, rtol=0)


def on_meta(shape, *values):
    """The values are there, on the device without numbers, and of that shape."""
    holds({(v.device.type, tuple(v.shape)) for v in values} == {("meta", shape)},
          f"{[(v.device.type, tuple(v.shape)) for v in values]} for meta {shape}")


@machinery
@pytest.mark.parametrize("variance", ["learned", 0.5])
def test_gaussian_diffusion_runs_on_another_device(variance):
    """Losses, bound and samplers stay on the data's device (meta: shapes without numbers)."""
    d, outs = gaussian([0.1] * 3, variance=variance).to("meta"), 4 if variance == "learned" else 2
    layer = torch.nn.Conv2d(2, outs, 3, padding=1, device="meta")
    x, t = torch.zeros(3, 2, 8, 8, device="meta"), torch.ones(3, dtype=torch.int64, device="meta")

    def net(x, t):
        return layer(x)

    bound = d.bits_per_dim(net, x, 2)
    on_meta((3,), bound["total"], bound["prior"], d.loss_hybrid(net, x), d.loss_vlb(net, x, 2),
            d.loss_simple(net, x, t), d.prior_kl(x), d.vlb_term(net, x, x, 3, 1))
    on_meta((3, 2), bound["terms"], bound["x0_mse"])
    on_meta((3, 2, 8, 8), *d.q_marginal(x, 0), *d.q_posterior(x, x, t, 0), *d.p_reverse(net, x, t),
            d.score(net, x, t), d.q_step(x, 0, t), d.sample(net, x.shape, 2),
            d.ddim_encode(net, x, 2), d.langevin(net, x.shape, 2),
            d.sample(net, x.shape, [3], eta=0.5), d.sample(net, x.shape, 2, known=x[:1]),
            d.sample(ddpm.guided(lambda x, t, y: net(x, t), t, 1.0), x.shape, 2),
            *[v for step in d.sample_progressive(net, x.shape, [1, 3]) for v in step[1:]])


@machinery
def test_learned_noise_runs_on_another_device_and_fixed_noise_is_copied():
    """Betas that require grad go to meta with their graph; without grad there is no graph, and copies work."""
    leaf, x = torch.tensor([0.1] * 3).requires_grad_(), torch.zeros(2, 4, device="meta")
    d = ddpm.GaussianDiffusion(leaf, variance=0.5).to("meta")
    on_meta((2,), d.loss_vlb(network, x) + d.prior_kl(x))
    fixed = gaussian([0.1] * 3)
    for other in (copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        equal(other.alpha_bar, fixed.alpha_bar, atol=0)
    holds(d.half().alpha_bar.requires_grad and not fixed.alpha_bar.requires_grad)


@machinery
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", [ddpm.linear_beta_schedule, ddpm.cosine_beta_schedule])
def test_losses_take_half_precision(dtype, schedule):
    """Finite losses and gradients at every t of T = 4000, where 1 / sigma^2 is above the largest float16."""
    d, t, weight = ddpm.GaussianDiffusion(schedule(4000)), torch.arange(1, 4001), torch.ones((), dtype=dtype)
    x0, weight = data_on(256, (4000, 2), 1).to(dtype), weight.requires_grad_()
    for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid):
        value = loss(lambda x, t: torch.cat([weight * x, x], 1), x0, t)
        equal(torch.stack([*value, *gradient(value.float().mean(), weight)]).isfinite().double(), 1.0)
    equal(ddpm.discretized_gaussian_log_likelihood(x0, x0, x0), ddpm.discretized_gaussian_log_likelihood(
        *[x0.float()] * 3), atol=0)


@machinery
@pytest.mark.parametrize("shape", [(0,), (0, 2), (0, 2, 4, 4)])
def test_a_batch_of_none_has_losses_of_none(shape):
    """B = 0: shapes (0,) and (0, n) come out, and no error."""
    x0, d = torch.zeros(shape), gaussian([0.1] * 3, variance=0.5)
    bound = d.bits_per_dim(network, x0, 2)
    shapes = [v.shape for v in (d.loss_simple(network, x0), d.loss_vlb(network, x0), d.loss_hybrid(network, x0),
                                bound["total"], bound["terms"].sum(1), d.vlb_term(network, x0, x0, 3))]
    holds(set(shapes) == {(0,)} and bound["terms"].shape == (0, 2) and d.sample(network, shape).shape == shape)


@machinery
@given(st.integers(1, 9))
def test_times_and_grids_may_be_numpys_and_torchs(T):
    """A number of steps, a grid and a time are what they are in any integer type."""
    d, x, z = gaussian([0.1] * T), torch.ones(2, 3), torch.ones(2, 3)
    for number in (np.int64(T), np.int32(T), np.array(T), torch.tensor(T, dtype=torch.int32)):
        equal(d.timesteps(number), d.timesteps(T))
    for grid in (np.array([T]), torch.tensor([T]), (torch.tensor(T),), [np.int64(T)], range(T, T + 1)):
        equal(d.timesteps(grid), [T])
    for t in (np.int64(T), [T, T], np.array([T, T]), torch.tensor(T), torch.tensor([T, T])):
        equal(d.q_sample(x, t, z), d.q_sample(x, T, z), atol=0)


@machinery
def test_data_on_another_scale_are_noticed():
    """Pixels of 0..255, or 0..2, warn in losses, in the bound and where they are held; [-1, 1] does not."""
    d, x = gaussian([0.1] * 3, variance=0.5), data_on(256, (2, 3), 1)
    calls = d.loss_simple, d.loss_vlb, d.loss_hybrid, d.bits_per_dim, \
        lambda network, x: d.sample(network, x.shape, known=x)
    for call in calls:
        for scaled in (127.5 * x + 127.5, x + 1):
            with pytest.warns(UserWarning, match=r"\[-1, 1\]"):
                call(network, scaled)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(network, x)


@machinery
def test_gaussian_measurements_carry_no_gradient():
    """bits_per_dim and the samplers only measure: nothing of the network's graph is kept."""
    weight, d, x = torch.ones(()).requires_grad_(), gaussian([0.1] * 3), torch.ones(2, 2)

    def model(x, t):
        return weight * x

    results = [*d.bits_per_dim(model, x).values(), d.sample(model, (2, 2)), d.ddim_encode(model, x),
               d.langevin(model, (2, 2)), *d.p_sample(model, x, 2)]
    holds(not any(r.requires_grad for r in results))


def refuses(call, words):
    """The call raises a ValueError that says these words."""
    try:
        call()
    except ValueError as error:
        holds(re.search(words, str(error)), f"the message should say {words!r}: {error}")
    except Exception as error:
        holds(False, f"{error!r} instead of a ValueError")
    else:
        holds(False, "nothing was raised")


def unlabelled(x, t, y):
    return x


def labelled(y):
    """A guided model with these labels."""
    return ddpm.guided(unlabelled, torch.tensor(y), 1.0)


X = torch.zeros(2, 4)
GAUSSIAN_ERRORS = {
    "betas of 0": ("betas", lambda d: gaussian([0.0, 0.1])),
    "betas of 1": ("betas", lambda d: gaussian([0.1, 1.0])),
    "one bad beta among good ones": ("betas.*1.5", lambda d: gaussian([0.1, 1.5, 0.2])),
    "one beta that is no number": ("betas.*nan", lambda d: gaussian([0.1, math.nan, 0.2])),
    "betas that are no numbers": ("betas", lambda d: gaussian([math.nan])),
    "no betas": ("betas", lambda d: gaussian([])),
    "betas in a square": ("betas", lambda d: gaussian([[0.1, 0.1], [0.1, 0.1]])),
    "an unknown prediction": ("prediction.*mean", lambda d: gaussian([0.1], "mean")),
    "an unknown variance": ("variance.*small", lambda d: gaussian([0.1], variance="small")),
    "a variance above 1": ("variance.*1.5", lambda d: gaussian([0.1], variance=1.5)),
    "a variance below 0": ("variance.*-0.5", lambda d: gaussian([0.1], variance=-0.5)),
    "one level": ("levels", lambda d: gaussian([0.1], levels=1)),
    "t = 0": ("1 <= t.*0", lambda d: d.p_reverse(network, X, 0)),
    "t = T + 1": ("T = 4.*5", lambda d: d.vlb_term(network, X, X, 5)),
    "t below 0": ("t.*-1", lambda d: d.q_posterior(X, X, -1)),
    "t = T + 1 for q": ("T = 4.*5", lambda d: d.q_sample(X, 5)),
    "t below 0 for q": ("-1", lambda d: d.q_marginal(X, -1)),
    "a batch of times with a 0": ("0", lambda d: d.p_sample(network, X, torch.tensor([1, 0]))),
    "a batch of times above T":
        ("T = 4.*5", lambda d: d.loss_vlb(network, X, torch.tensor([5, 1]))),
    "a loss at 0": ("0", lambda d: d.loss_simple(network, X, 0)),
    "a hybrid loss above T": ("T = 4.*5", lambda d: d.loss_hybrid(network, X, 5)),
    "a score at 0": ("0", lambda d: d.score(network, X, 0)),
    "x0 at 0": ("0", lambda d: d.predict_x0(X, 0, X)),
    "eps at 0": ("0", lambda d: d.predict_eps(X, 0, X)),
    "v above T": ("T = 4.*5", lambda d: d.predict_v(X, X, 5)),
    "half a time": ("1.5", lambda d: d.q_sample(X, 1.5)),
    "times that are floats": ("int", lambda d: d.q_sample(X, torch.tensor([1.0, 2.0]))),
    "a time in words": ("now", lambda d: d.q_sample(X, "now")),
    "no time": ("None", lambda d: d.q_sample(X, None)),
    "a list of half times": ("1.5", lambda d: d.q_sample(X, [1.5, 2.0])),
    "a list of times for another batch": ("3", lambda d: d.loss_vlb(network, X, [1, 2, 3])),
    "times in a column": ("B", lambda d: d.q_sample(X, torch.tensor([[1], [2]]))),
    "times for another batch": ("3", lambda d: d.q_sample(X, torch.tensor([1, 2, 3]))),
    "s = t": ("s < t", lambda d: d.p_reverse(network, X, 2, 2)),
    "s above t": ("s < t", lambda d: d.q_posterior(X, X, torch.tensor([1, 2]), 2)),
    "s below 0": ("-1", lambda d: d.vlb_term(network, X, X, 2, -1)),
    "eta above 1": ("eta.*1.1", lambda d: d.p_sample(network, X, 2, eta=1.1)),
    "eta below 0": ("eta.*-0.1", lambda d: d.p_sample(network, X, 2, eta=-0.1)),
    "no steps": ("steps", lambda d: d.timesteps(0)),
    "an empty grid": ("steps", lambda d: d.timesteps([])),
    "a grid that stops short of T": ("T = 4", lambda d: d.bits_per_dim(network, X, [1, 3])),
    "half a number of steps": ("steps.*2.5", lambda d: d.timesteps(2.5)),
    "a grid of fractions": ("steps.*1.5", lambda d: d.timesteps([1.5, 4.0])),
    "a grid in words": ("steps.*all", lambda d: d.timesteps("all")),
    "known numbers that are whole": ("known.*int64", lambda d: d.sample(network, (2, 4), known=X.long())),
    "known numbers of another shape": (r"known.*\(3,\)", lambda d: d.sample(network, (2, 4), known=torch.zeros(3))),
    "known numbers with one dimension more": ("known", lambda d: d.sample(network, (2, 4), known=X[None])),
    "a label for another batch": ("labels.*2", lambda d: d.score(labelled([0]), X, 1)),
    "labels that are floats": ("labels.*int64", lambda d: d.score(labelled([0.0, 1.0]), X, 1)),
    "labels below -1": ("labels.*-2", lambda d: d.score(labelled([0, -2]), X, 1)),
    "labels that are no tensor": ("labels.*7", lambda d: d.score(ddpm.guided(unlabelled, 7, 1.0), X, 1)),
    "a grid that starts at 0": ("steps", lambda d: d.sample(network, (2, 4), [0, 4])),
    "a grid that stays": ("steps", lambda d: d.langevin(network, (2, 4), [2, 2, 4])),
    "C channels where 2C are due":
        ("8", lambda d: gaussian([0.1], variance="learned").loss_hybrid(network, X)),
    "2C channels where C are due":
        (r"\(2, 4\)", lambda d: d.sample(lambda x, t: torch.cat([x, x], 1), (2, 4))),
    "a prediction of another size": (r"\(2, 4\)", lambda d: d.loss_simple(lambda x, t: x[:1], X)),
}


@machinery
@pytest.mark.parametrize("case", GAUSSIAN_ERRORS)
def test_gaussian_errors_are_one_clear_line(case):
    """What a caller can get wrong raises ValueError and says what was got."""
    words, call = GAUSSIAN_ERRORS[case]
    refuses(lambda: call(gaussian([0.1] * 4, variance=0.5)), words)


# ---------------------------------------------------------------- the U-Net

def tiny_unet(channels=1, out_channels=1, **options):
    return ddpm.UNet(channels, out_channels, **{
        **dict(width=8, mults=(1, 2), blocks=1, attention=(1,), heads=2), **options})


@machinery
@given(st.integers(0, 4000), st.integers(1, 8))
def test_times_are_embedded_as_waves(t, half):
    """cos(w_i t), sin(w_i t) with w_i = 10000^(-i / n), i = 0..n-1: in both files, the paper's."""
    angles = [10000 ** (-i / half) * t for i in range(half)]
    waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    for file in (ddpm, d3pm):
        equal(file.timestep_embedding(torch.tensor([t]), 2 * half)[0], waves, atol=1e-3)  # float32


@machinery
@given(seeds, st.sets(st.integers(0, 6), min_size=1))
def test_unet_can_see_waves_of_its_input(seed, exponents):
    """fourier=(n, ...) gives the network sin(2^n pi x) and cos(2^n pi x) beside x."""
    waves = awake(tiny_unet(1, 1, fourier=tuple(exponents)))
    plain = tiny_unet(1 + 2 * len(exponents), 1)
    plain.load_state_dict(waves.state_dict())
    x, t = normal((2, 1, 4, 4), seed), torch.tensor([1, 2])
    seen = [x] + [f(math.pi * 2 ** n * x) for n in tuple(exponents) for f in (torch.sin, torch.cos)]
    equal(waves(x, t), plain(torch.cat(seen, 1), t))


@machinery
@given(seeds)
def test_unet_block_is_two_convolutions_beside_a_skip(seed):
    """skip(x) + conv(silu(a norm(conv(silu(norm(x)))) + b)), a - 1 and b from the time; a fresh
    block that keeps the channels is the identity."""
    x, emb, fresh = normal((2, 4, 3, 3), seed), normal((2, 5), seed), ddpm.ResBlock(4, 4, 5, 0.0, 2)
    block, silu = awake(ddpm.ResBlock(4, 6, 5, 0.0, 0)), torch.nn.functional.silu
    scale, b = block.time(emb)[..., None, None].chunk(2, 1)
    h = silu(block.norm2(block.conv1(silu(block.norm1(x)))) * (1 + scale) + b)
    equal((block(x, emb), fresh(x, emb)), (block.skip(x) + block.conv2(h), x))


@machinery
@given(seeds)
def test_unet_attention_is_a_softmax_weighted_mean(seed):
    """x + W sum over j of softmax_j(q_i k_j / sqrt(d)) v_j in each head; i, j are places."""
    layer, x = awake(ddpm.Attention(4, heads=2)), normal((2, 4, 2, 3), seed)
    q, k, v = layer.qkv(layer.norm(x)).reshape(2, 3, 2, 2, 6).unbind(1)        # (B, head, d, place)
    weights = torch.einsum("bhdi,bhdj->bhij", q, k).div(math.sqrt(2)).softmax(-1)
    mean = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(x.shape)
    equal(layer(x), x + layer.out(mean))


def awake(net):
    """The network in float64 with all its weights drawn anew, so that no zero hides a path."""
    torch.manual_seed(0)
    for p in net.double().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@machinery
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=6 * EXAMPLES)
def test_unet_keeps_the_shape(batch, channels, size, depth, learned):
    """(B, C, H, W) -> (B, C or 2C, H, W), for every H and W that the levels divide; at first 0."""
    out, step = channels * (1 + learned), 2 ** (depth - 1)
    net = tiny_unet(channels, out, mults=(1, 2, 2)[:depth], attention=(depth - 1,))
    x = normal((batch, channels, size * step, step), 1)
    equal(net(x, torch.arange(batch)), torch.zeros(batch, out, *x.shape[2:]), atol=0)


@machinery
@pytest.mark.parametrize("shape", [(1, 1, 7, 8), (1, 1, 8, 7), (1, 2, 8, 8), (8, 8)])
def test_unet_says_which_sizes_it_takes(shape):
    """H and W must divide by 2^levels, the channels must be those promised: ValueError."""
    refuses(lambda: tiny_unet()(torch.zeros(shape), torch.ones(shape[0])), "divisible by 2")


@machinery
@pytest.mark.parametrize("sizes", [
    dict(attention=(-1,)), dict(attention=(2,)), dict(width=9, mults=(1,), attention=()), dict(width=0),
    dict(mults=()), dict(mults=(1, 0)), dict(heads=3), dict(heads=0), dict(blocks=-1), dict(classes=-1)])
def test_unet_says_which_sizes_there_are(sizes):
    """A size that does not fit is refused when the network is made."""
    refuses(lambda: tiny_unet(**sizes), "width.*attention.*heads")


@machinery
@pytest.mark.parametrize("y", [[0, 1, 4], [0, -2, 1], [0, 1], [[0], [1], [2]], [0.0, 1.0, 2.0], 1])
def test_unet_says_which_labels_it_takes(y):
    """Labels are int64 (B,) in -1..classes-1: without classes -1 is the only one, which changes nothing."""
    x, t, net = torch.zeros(3, 1, 8, 8), torch.tensor([1, 2, 3]), awake(tiny_unet())
    refuses(lambda: tiny_unet(classes=4)(x, t, torch.tensor(y)), "labels must be int64.*4")
    refuses(lambda: net(x, t, torch.tensor([0, -1, -1])), "labels.*classes, 0")
    equal(net(x, t, torch.full((3,), -1)), net(x, t), atol=0)


@machinery
@given(seeds)
@settings(max_examples=5 * EXAMPLES)
def test_unet_labels_shift_the_time_embedding(seed):
    """Each class has its own row, -1 (which is also meant by no y) another; a fresh network, and one without
    classes, are the same for all."""
    net, fresh, plain = awake(tiny_unet(classes=3)), tiny_unet(classes=3), tiny_unet()
    x, t, rows = normal((4, 1, 8, 8), seed), torch.tensor([5, 2, 5, 2]), net.label.weight
    y = integers(4, (4,), seed) - 1
    plain.load_state_dict({name: p for name, p in net.state_dict().items() if name != "label.weight"})
    plain.double().time.register_forward_hook(lambda module, inputs, out: out + torch.stack([rows[i + 1] for i in y]))
    equal((net(x, t, y), net(x, t)), (plain(x, t), net(x, t, torch.full((4,), -1))))
    holds(not fresh.label.weight.any() and plain.label is None and len({*map(str, rows.tolist())}) == 4)


@machinery
def test_unet_without_classes_draws_the_weights_of_one_with():
    """From the same seed: the table of labels is made last, and nothing of the plain network changes."""
    weights = []
    for classes in (0, 5):
        torch.manual_seed(1)
        weights.append(tiny_unet(classes=classes).state_dict())
    equal(*(tuple(w[name] for name in weights[0]) for w in weights), atol=0)


@machinery
def test_unet_runs_on_another_device():
    """Nothing in it is made on the CPU: data on meta come out on meta, with labels and without."""
    x, t = torch.zeros(3, 2, 8, 8, device="meta"), torch.ones(3, dtype=torch.int64, device="meta")
    net = tiny_unet(2, 4, classes=3).to("meta")
    on_meta((3, 4, 8, 8), tiny_unet(2, 4).to("meta")(x, t), net(x, t), net(x, t, t), ddpm.guided(net, t, 1.0)(x, t))


@machinery
def test_unet_examples_do_not_see_each_other():
    """Changing one example, its time or its label changes no other's output, guided or not."""
    net, x, t = awake(tiny_unet(classes=3)), normal((3, 1, 8, 8), 1), torch.tensor([1, 2, 3])
    other = torch.cat([x[:1], normal((2, 1, 8, 8), 2)])
    y, labels = torch.tensor([1, 2, -1]), torch.tensor([1, 0, 0])
    equal((net(other, torch.tensor([1, 9, 7]), labels)[0], ddpm.guided(net, labels, 2.0)(x, t)[0]),
          (net(x, t, y)[0], ddpm.guided(net, y, 2.0)(x, t)[0]), atol=1e-12)


@machinery
def test_unet_uses_every_weight_every_pixel_and_the_time():
    """No gradient is 0: of any parameter, of any pixel far from the one seen; t and y matter."""
    net, x, t = awake(tiny_unet(classes=1)), normal((2, 1, 8, 8), 1).requires_grad_(), torch.tensor([3, 7])
    out = net(x, t, torch.tensor([-1, 0]))
    (out * normal(out.shape, 2)).sum().backward(retain_graph=True)
    far, = gradient(out[0, 0, 0, 0], x)
    unused = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    holds(not unused, f"not used: {unused}")
    for other in (net(x, t + 1, torch.tensor([-1, 0])), net(x, t, torch.tensor([0, -1]))):
        holds((far[0] != 0).all() and (other != out).all(), "a pixel, the time or the label is not used")


# ================================================================ d3pm.py

MIXING = ["uniform", "absorbing", "mixing"]                 # Q = (1 - beta) I + beta 1 pi^T
SMOOTH = ["uniform", "mixing", "gaussian", "dense"]         # without zeros
SPARSE = ["neighbour", "sparse"]                            # dense tables with zeros
FAMILIES = [*SMOOTH, "absorbing", *SPARSE]
every_family = pytest.mark.parametrize("name", FAMILIES)    # each gets the same examples
mild = st.floats(0.02, 0.99)                                # discrete betas; the last may be 1
scales = st.sampled_from([1.0, 30.0, 1e4])                  # of logits


def one_step_matrices(name, K, betas, seed):
    """Q (T, K, K) by the family's definition, and the call that makes the same transition."""
    beta, eye = torch.tensor(betas, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    rate = beta[:, None, None]
    if name in MIXING:
        pi = {"uniform": torch.full((K,), 1 / K, dtype=torch.float64), "absorbing": eye[seed % K],
              "mixing": normal((K,), seed).softmax(0)}[name]
        return (1 - rate) * eye + rate * pi, {
            "uniform": lambda: d3pm.uniform_transition(K, beta),
            "absorbing": lambda: d3pm.absorbing_transition(K, beta, seed % K),
            "mixing": lambda: d3pm.MixingTransition(beta, pi)}[name]
    if name == "gaussian":                                  # Austin et al. 2021, appendix A.2.3
        n, i = range(1 - K, K), range(K)
        weights = [[math.exp(-4 * m ** 2 / ((K - 1) ** 2 * b)) for m in n] for b in betas]
        Q = torch.tensor([[[w[a - b + K - 1] / sum(w) * (a != b) for b in i] for a in i]
                          for w in weights], dtype=torch.float64)
        return Q + torch.diag_embed(1 - Q.sum(2)), lambda: d3pm.gaussian_transition(K, beta)
    if name == "neighbour":                                 # appendix A.2.4: Q = exp(beta R)
        points, k = normal((K, 2), seed), 1 + seed % (K - 1)
        R, power, Q = neighbour_rates(points, k), eye.expand(len(betas), K, K), 0
        for n in range(1, 60):                              # the series; beta |R| is below 4
            Q, power = Q + power, power @ R * rate / n
        return Q, lambda: d3pm.neighbour_transition(points, beta, k)
    scores = 2 * normal((len(betas), K, K), seed)           # any matrices; sparse: with exact zeros
    if name == "sparse":
        scores = scores.masked_fill((normal(scores.shape, seed + 1) < 0) & (eye == 0), -INF)
    return scores.softmax(-1), lambda: d3pm.DenseTransition(scores.softmax(-1))


def neighbour_rates(points, k):
    """R = A - diag(A 1), A = (G + G^T) / 2k, G[i, j] = 1 where j is one of i's k nearest others."""
    near = (points[:, None] - points).norm(dim=-1).argsort(1)[:, 1:k + 1]
    G = torch.zeros(len(points), len(points)).double().scatter(1, near, 1.0)
    A = (G + G.T) / (2 * k)
    return A - torch.diag(A.sum(1))


class Chain:
    """A transition of the named family, its matrices by definition, and all laws by enumeration."""

    def __init__(self, name, K, betas, seed):
        self.name, self.K, self.T, self.betas = name, K, len(betas), betas
        self.Q, make = one_step_matrices(name, K, betas, seed)
        self.mask = seed % K if name == "absorbing" else None
        self.states = torch.tensor([k for k in range(K) if k != self.mask])       # those of data
        self.transition = accepted(make)
        self.diffusion = d3pm.D3PM(self.transition)

    def __repr__(self):
        return f"Chain({self.name}, K={self.K}, betas={self.betas}, {self.mask=})"

    def path(self, s, t):
        """Q_{s->t} = Q_{s+1} ... Q_t, multiplied out."""
        result = torch.eye(self.K, dtype=torch.float64)
        for Q in self.Q[s:t]:
            result = result @ Q
        return result

    def data(self, shape, seed):
        """Any x_0 of that shape; the mask is no data."""
        return self.states[integers(len(self.states), shape, seed)]

    def draw(self, shape, t, seed):
        """Any x_0 of that shape, and some x_t of positive probability."""
        x0, pick = self.data(shape, seed), torch.Generator().manual_seed(seed + 1)
        q = self.path(0, t)[x0].flatten(0, -2)
        return x0, torch.multinomial(q, 1, generator=pick).view(x0.shape)

    def pairs(self, t):
        """Every (x_0, x_t) that can be, each (N, 1), and q(x_t | x_0) (N,)."""
        q, held = self.path(0, t), torch.isin(torch.arange(self.K), self.states)
        x0, xt = ((q > 0) & held[:, None]).nonzero().T
        return x0[:, None], xt[:, None], q[x0, xt]

    def joint(self, s, t):
        """log q(x_s, x_t | x_0), (K, K, K) by [x_t, x_0, x_s], every product written out."""
        return (self.path(0, s)[None] * self.path(s, t).T[:, None]).log()

    def posterior(self, x0, xt, s, t):
        """log q(x_s | x_t, x_0) by enumeration, (..., K); -inf everywhere if the pair cannot be."""
        return normalised(self.joint(s, t)[xt, x0])

    def guess(self, model, xt, t):
        """log p~(x_0), what the network says of x_0: the softmax of its logits without the mask."""
        logits = model(xt, at(t, xt) if isinstance(t, int) else t)
        return normalised(logits.masked_fill(torch.arange(self.K) == self.mask, -INF)
                          if self.mask is not None else logits)

    def denoised(self, model, xt, t):
        """log p(x_0 | x_t), Bayes' rule by enumeration: q(x_t | x_0) p~(x_0), t an int or (B,)."""
        q = self.path(0, t).T[xt] if isinstance(t, int) else \
            torch.stack([self.path(0, int(i)).T[x] for i, x in zip(t, xt)])
        return normalised(q.log() + self.guess(model, xt, t))

    def reverse(self, guess, xt, s, t):
        """log p(x_s | x_t): the sum over x_0 of q(x_s, x_t | x_0) p~(x_0), in logs, normalised."""
        return normalised((self.joint(s, t)[xt] + guess[..., None]).logsumexp(-2))

    def kl(self, guess, x0, xt, s, t):
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats at each place, summed over x_s."""
        q, p = self.posterior(x0, xt, s, t), self.reverse(guess, xt, s, t)
        return torch.where(q == -INF, 0, q.exp() * (q - p)).sum(-1)

    def prior_nats(self, pi):
        """KL(q(x_T | x_0) || pi) for each x_0, (K,)."""
        q = self.path(0, self.T)
        return torch.where(q == 0, 0, q * (q / pi).log()).sum(1)

    def expected_terms(self, model, grid, loss=None):
        """For each x_0, in nats: the mean of L_0 + L_1 + ... over every x_t on the grid, (K,)."""
        total = torch.zeros(self.K)
        for s, t in steps_of(grid):
            x0, xt, weight = self.pairs(t)
            terms = loss(model, x0, t, xt) if loss else self.diffusion.vlb_term(model, x0, xt, t, s)
            total = total.index_add(0, x0[:, 0], weight * terms * math.log(2))
        return total


def normalised(log_p):
    """Log-probabilities (..., K) out of their sums; -inf everywhere stays so."""
    return log_p - log_p.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)


def case_of(K, betas, seed, times, name):
    """The chain of the named family, and its times."""
    return Chain(name, K, betas, seed), *times


@st.composite
def categories(draw, lowest=0, n=2, longest=4):
    """case, and case(name) is a chain of that family with n times, as in chains()."""
    betas, *times = draw(chains(lowest, longest, n, mild))
    betas[-1] = draw(st.sampled_from([betas[-1], 1.0]))
    return functools.partial(case_of, draw(st.integers(2, 5)), betas, draw(seeds), times)


@st.composite
def strided(draw):
    """case, and case(name) is a chain of that family with a grid; beta_T = 1, so that masks cover
    all in the end."""
    betas, grid = draw(grids(4, mild))
    return functools.partial(case_of, draw(st.integers(2, 4)), betas[:-1] + [1.0], draw(seeds), [grid])


def table(chain, seed, scale=1.0):
    """A network whose logits depend on x_t at the place, on t and on the example's other places."""
    logits, context = normal((chain.T + 1, chain.K, chain.K), seed), normal((chain.K,), seed + 1)
    scale = min(scale, 30.0) if chain.name in SPARSE else scale   # p~ Q underflows: see float32 below

    def model(x, t):
        others = column(per_example(x.double()), x)[..., None]
        return scale * (logits[column(t, x), x] + others * context)
    return model


def source(chain, seed, n=1):
    """A distribution of n tokens, (K,) * n; what holds the mask has probability 0."""
    scores = 1.5 * normal((chain.K,) * n, seed)
    for place in range(n if chain.mask is not None else 0):
        scores = scores.index_fill(place, torch.tensor(chain.mask), -INF)
    return scores.flatten().softmax(0).view(scores.shape)


def exact_denoiser(chain, p0):
    """Logits of what the other places tell of x_0, by Bayes' rule: with one token p0 (K,) alone,
    with two of joint law p0 (K, K) its sum over the other place's x_0, weighed by q(x_t | x_0)."""
    def model(x, t):
        q = chain.path(0, int(t[0])).T
        p = p0.expand(*x.shape, chain.K) if p0.ndim == 1 else \
            torch.stack([q[x[:, 1]] @ p0.T, q[x[:, 0]] @ p0], 1)
        return p.log().clamp(min=-1e5)
    return model                                            # logits are finite; e^-1e5 is 0


# ---------------------------------------------------------------- schedules

@given(lengths)
@example(1)
@example(1000)
def test_cosine_betas_make_alpha_bar_a_cosine(T):
    """alpha_bar_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 pi / 2), beta at most 0.999."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) for t in range(T + 1)]
    equal(d3pm.cosine_betas(T), [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)],
          atol=1e-13)


@given(lengths, st.floats(0.01, 0.5), st.floats(0.5, 1))
@example(1, 0.1, 0.9)
@example(10, 0.1, 0.9)
@example(1000, 0.02, 1.0)
def test_linear_betas_are_evenly_spaced(T, start, stop):
    """beta_t = start + (stop - start) (t - 1) / (T - 1); the ends are 0.1 / T and 20 / T where not
    given (1e-4 and 0.02 at T = 1000), with no beta above 1."""
    def line(start, stop):
        return [min(start + (stop - start) * i / max(T - 1, 1), 1) for i in range(T)]

    equal((d3pm.linear_betas(T, start, stop), d3pm.linear_betas(T), d3pm.linear_betas(T, start),
           d3pm.linear_betas(T, stop=stop)),
          (line(start, stop), line(0.1 / T, 20 / T), line(start, 20 / T), line(0.1 / T, stop)))
    equal(d3pm.linear_betas(3, 0.5, 1.5), [0.5, 1.0, 1.5])              # no schedule, but what was asked for


@given(lengths)
@example(1)
def test_mutual_information_betas_mask_a_share_of_t_over_T(T):
    """beta_t = 1 / (T - t + 1), so that q(x_t = mask | x_0) = t / T."""
    betas, t = d3pm.mutual_information_betas(T), torch.arange(T + 1)
    masked = d3pm.absorbing_transition(3, betas).rows(0 * t, 0, t)[:, 2]
    equal((betas, masked), ([1 / (T - i) for i in range(T)], t / T))


# ---------------------------------------------------------------- transitions

@every_family
@given(categories())
def test_each_step_is_the_matrix_of_its_family(name, case):
    """Q_t as Austin et al. 2021 define it: redrawn from pi, a discretised Gaussian, exp(beta R)."""
    chain, *_ = case(name)
    Q = torch.stack([chain.transition.matrix(t - 1, t) for t in range(1, chain.T + 1)])
    equal(Q, chain.Q)


@every_family
@given(categories())
def test_rows_are_probabilities(name, case):
    """Every Q_{s->t} has rows that sum to 1, and nothing in it is negative."""
    chain, s, t = case(name)
    Q = chain.transition.matrix(s, t)
    equal((Q.sum(1), Q.clamp(min=0)), (1.0, Q), atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "gaussian", "neighbour"])
@given(categories())
def test_symmetric_noise_is_doubly_stochastic(name, case):
    """Uniform, Gaussian and neighbour: columns sum to 1 too, so that uniform is stationary."""
    chain, s, t = case(name)
    equal((chain.transition.matrix(s, t).sum(0), chain.transition.stationary), (1.0, 1 / chain.K))


@every_family
@given(categories())
def test_stationary_distribution_is_kept(name, case):
    """pi Q_{s->t} = pi; for any other matrices pi is the mean row of Q_bar_T, or what is given."""
    chain, s, t = case(name)
    pi, own = chain.transition.stationary, chain.Q[0, 0]
    if name in ("dense", "sparse"):
        given_pi = d3pm.DenseTransition(chain.Q, own).stationary
        equal((pi, given_pi), (chain.path(0, chain.T).mean(0), own))
    else:
        equal((pi @ chain.transition.matrix(s, t), pi.sum()), (pi, 1.0))


@every_family
@given(categories())
def test_many_steps_are_the_product_of_the_matrices(name, case):
    """Q_{s->t} = Q_{s+1} Q_{s+2} ... Q_t, in this order; Q_{t->t} = I. In the mixing families
    alpha_bar_t = (1 - beta_1) ... (1 - beta_t) is the share never redrawn."""
    chain, *_ = case(name)
    times = list(itertools.combinations_with_replacement(range(chain.T + 1), 2))  # every s <= t
    if name in MIXING:
        equal(chain.transition.log_alpha_bar.exp(),
              [math.prod(1 - b for b in chain.betas[:i]) for i in range(chain.T + 1)])
    equal(*(torch.stack([Q(s, t) for s, t in times]) for Q in (chain.transition.matrix, chain.path)))


@every_family
@given(categories(n=3))
def test_transitions_of_categories_compose(name, case):
    """Q_{s->r} Q_{r->t} = Q_{s->t} for any s < r < t."""
    chain, s, r, t = case(name)
    Q = chain.transition.matrix
    equal(Q(s, r) @ Q(r, t), Q(s, t))


@given(mild, seeds)
def test_what_is_lost_stays_lost(beta, seed):
    """Where alpha_bar has reached 0, every later step redraws: Q_{s->t} = 1 pi^T, 0 / 0 being 0,
    but for Q_{t->t} = I."""
    pi = normal((3,), seed).softmax(0)
    Q = d3pm.MixingTransition([beta, 1.0, beta, beta], pi).matrix
    equal(torch.stack([Q(0, 2), Q(1, 3), Q(2, 3), Q(2, 4), Q(3, 4)]), pi)
    equal((Q(2, 2), Q(3, 3)), (torch.eye(3), torch.eye(3)))


@every_family
@given(categories(), shapes, seeds)
def test_rows_and_columns_are_those_of_the_matrix(name, case, shape, seed):
    """rows: q(x_t = . | x_s = x), or p Q_{s->t}, p any weights; columns: q(x_t = x | x_s = .);
    the logs of all these, where p sums to 1."""
    chain, s, t = case(name)
    x, tr = integers(chain.K, shape, seed), chain.transition
    weights = normal((*shape, chain.K), seed).exp()
    p = weights.softmax(-1)
    for a, b in [(s, t), (at(s, x), at(t, x)), (s, at(t, x)), (at(s, x), t), (t, t), (at(t, x), t), (0, t)]:
        Q = chain.path(*(time if isinstance(time, int) else int(time[0]) for time in (a, b)))
        equal((tr.rows(x, a, b), tr.rows(weights, a, b), tr.columns(x, a, b)), (Q[x], weights @ Q, Q.T[x]))
        equal((tr.log_rows(x, a, b), tr.log_rows(p.log(), a, b), tr.log_columns(x, a, b)),
              (Q[x].log(), (p @ Q).log(), Q.T[x].log()))


# ---------------------------------------------------------------- forward process q

@every_family
@given(categories(), shapes, seeds)
def test_marginal_is_the_row_of_the_product(name, case, shape, seed):
    """q(x_t | x_0) = row x_0 of Q_1 ... Q_t, and x_0 itself at t = 0."""
    chain, _, t = case(name)
    x0 = chain.data(shape, seed)
    equal((chain.diffusion.q_probs(x0, t), chain.diffusion.q_probs(x0, 0)),
          (chain.path(0, t)[x0], torch.eye(chain.K)[x0]))


@every_family
@few
@given(categories(), seeds)
def test_draws_have_the_frequencies_of_the_row(name, case, seed):
    """q_sample ~ row x_0 of Q_bar_t, q_step ~ row x_s of Q_{s->t}, and x_T is drawn from pi."""
    (chain, s, t), seen = case(name), []
    x0, xs = int(chain.data((), seed)), seed % chain.K
    frequencies(chain.diffusion.q_sample(torch.full((20000,), x0), t), chain.path(0, t)[x0])
    frequencies(chain.diffusion.q_step(torch.full((100, 200), xs), s, t), chain.path(s, t)[xs])
    chain.diffusion.sample(lambda x, t: seen.append(x) or table(chain, seed)(x, t), (20000,), 1)
    frequencies(seen[0], chain.transition.stationary)


@every_family
@given(categories())
def test_posterior_is_bayes_rule_by_enumeration(name, case):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) for every pair (x_0, x_t);
    -inf everywhere for a pair that cannot be; s = t - 1 if left out."""
    chain, s, t = case(name)
    x0, xt = torch.cartesian_prod(chain.states, torch.arange(chain.K)).T
    equal((chain.diffusion.q_posterior(x0, xt, t, s), chain.diffusion.q_posterior(x0, xt, t)),
          (chain.posterior(x0, xt, s, t), chain.posterior(x0, xt, t - 1, t)))


@every_family
@given(categories(), shapes, seeds)
def test_posterior_of_an_uncertain_x0_is_bayes_rule_too(name, case, shape, seed):
    """If x_0 ~ p: q(x_s | x_t) is proportional to the sum over x_0 of q(x_s, x_t | x_0) p(x_0)."""
    chain, s, t = case(name)
    xt, prior = chain.draw(shape, t, seed)[1], (3 * normal((*shape, chain.K), seed)).log_softmax(-1)
    equal(chain.diffusion.q_posterior(prior, xt, t, s),
          normalised((chain.joint(s, t)[xt] + prior[..., None]).logsumexp(-2)), atol=1e-8)


# ---------------------------------------------------------------- reverse process p

@every_family
@given(categories(), shapes, seeds, scales)
def test_reverse_step_sums_over_x0(name, case, shape, seed, scale):
    """p(x_s | x_t) ~ sum over x_0 of q(x_s, x_t | x_0) p~(x_0), p~ the softmax of the logits, at
    every s (t - 1 if left out). In logs, for logits of 1e4 too."""
    chain, s, t = case(name)
    xt, model = chain.draw(shape, t, seed)[1], table(chain, seed, scale)
    guess = chain.guess(model, xt, t)
    equal((chain.diffusion.p_reverse(model, xt, t, s), chain.diffusion.p_reverse(model, xt, t)),
          (chain.reverse(guess, xt, s, t), chain.reverse(guess, xt, t - 1, t)), atol=1e-8)


@every_family
@given(categories(), shapes, seeds, scales)
def test_p_x0_is_bayes_rule_on_what_the_network_says(name, case, shape, seed, scale):
    """p(x_0 | x_t) = q(x_t | x_0) p~(x_0) / sum over x_0, and the step down to s = 0 is that."""
    chain, _, t = case(name)
    xt, model = chain.draw(shape, t, seed)[1], table(chain, seed, scale)
    right = chain.denoised(model, xt, t)
    equal((chain.diffusion.p_x0(model, xt, t), chain.diffusion.p_reverse(model, xt, t, 0)),
          (right, right), atol=1e-8)


@pytest.mark.parametrize("name", SMOOTH)
@given(categories(), shapes, seeds)
def test_a_network_of_x0_given_xt_is_used_less_the_likelihood(name, case, shape, seed):
    """Logits log p(x_0 | x_t) - log q(x_t | x_0): then p_x0 is p(x_0 | x_t) itself, and p(x_s | x_t)
    is the sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t)."""
    chain, s, t = case(name)
    xt, net, d = chain.draw(shape, t, seed)[1], table(chain, seed), chain.diffusion
    log_p0 = net(xt, at(t, xt)).log_softmax(-1)
    mixed = torch.stack([chain.posterior(torch.full_like(xt, k), xt, s, t) for k in range(chain.K)], -2)

    def model(x, t):
        return net(x, t) - d.transition.log_columns(x, 0, t)

    equal((d.p_x0(model, xt, t), d.p_reverse(model, xt, t, s)),
          (log_p0, (mixed + log_p0[..., None]).logsumexp(-2)), atol=1e-8)


@given(strided(), shapes, seeds)
def test_masks_keep_what_is_seen_and_are_never_data(case, shape, seed):
    """p(x_0 = mask | x_t) = 0; a place that is not masked never was: p(x_s | x_t) is the point x_t,
    at every t, also where all should be masked by then (a known place)."""
    chain, grid = case("absorbing")
    xt, model = integers(chain.K, shape, seed), table(chain, seed)
    seen = xt != chain.mask
    for s, t in steps_of(grid):                             # all should be masked at the last t
        p, p0 = (chain.diffusion.p_reverse(model, xt, t, s).exp() for s in (s, 0))
        equal((p[seen], p0[seen], p0[..., chain.mask], p.sum(-1), p0.sum(-1)),
              (*[torch.eye(chain.K)[xt[seen]]] * 2, 0.0, 1.0, 1.0), atol=1e-12)


@every_family
@given(categories(), seeds)
def test_exact_denoiser_gives_the_exact_reverse_process(name, case, seed):
    """One token, p~ its law p(x_0), as no other place tells more: sum over x_t of q(x_t) p(x_s | x_t)
    = q(x_s) at every s < t, so the chain run backwards returns the data."""
    chain, s, t = case(name)
    p0 = source(chain, seed)
    qs, qt = p0 @ chain.path(0, s), p0 @ chain.path(0, t)
    held = qt > 1e-12
    xt = torch.arange(chain.K)[held][:, None]
    p = chain.diffusion.p_reverse(exact_denoiser(chain, p0), xt, t, s)[:, 0].exp()
    bayes = (chain.path(s, t) * qs[:, None]).T / qt[:, None]                       # q(x_s | x_t)
    equal((p, qt[held] @ p), (bayes[held], qs))


@every_family
@given(categories(), seeds)
def test_exact_denoiser_of_two_tokens_is_what_the_other_one_tells(name, case, seed):
    """Two correlated places, p~ at each what the other's x_t tells of x_0 (leave one out): p(x_s | x_t)
    is q(x_s | x_t) of each place given both, summed over every pair of x_0, at every s."""
    chain, s, t = case(name)
    p0, (Q, q) = source(chain, seed, 2), (chain.path(0, s), chain.path(0, t))
    xt = torch.cartesian_prod(torch.arange(chain.K), torch.arange(chain.K))
    xt = xt[torch.einsum("ab,ai,bj->ij", p0, q, q).flatten() > 1e-12]             # those that can be
    like, step = q.T[xt], chain.path(s, t).T[xt]                                  # (N, place, K)
    right = torch.stack([torch.einsum("ab,as,ns,nb->ns", p0, Q, step[:, 0], like[:, 1]),
                         torch.einsum("ab,bs,ns,na->ns", p0, Q, step[:, 1], like[:, 0])], 1)
    equal(chain.diffusion.p_reverse(exact_denoiser(chain, p0), xt, t, s).exp(),
          right / right.sum(-1, keepdim=True))


# ---------------------------------------------------------------- losses and bound

@every_family
@given(categories(), shapes, seeds)
def test_prior_term_of_categories_is_the_kl_to_stationary(name, case, shape, seed):
    """L_T = KL(q(x_T | x_0) || pi) in bits per dimension; infinite if a mask may be missing."""
    chain, *_ = case(name)
    x0 = chain.data(shape, seed)
    equal(chain.diffusion.prior_kl(x0), bits(chain.prior_nats(chain.transition.stationary)[x0]))


@every_family
@given(categories(), shapes, seeds, scales)
def test_bound_term_of_categories_is_the_summed_kl(name, case, shape, seed, scale):
    """L_t = sum over x_s of q log(q / p), q = q(x_s | x_t, x_0) and p = p(x_s | x_t), in bits per
    dimension; at s = 0 that is L_0 = -log p(x_0 | x_t). Finite for logits of 1e4."""
    chain, s, t = case(name)
    (x0, xt), model = chain.draw(shape, t, seed), table(chain, seed, scale)
    guess = chain.guess(model, xt, t)
    kl, of_one = chain.kl(guess, x0, xt, s, t), chain.kl(guess, x0, xt, t - 1, t)
    code = -chain.denoised(model, xt, t).gather(-1, x0[..., None])[..., 0]
    equal((chain.diffusion.vlb_term(model, x0, xt, t, s), chain.diffusion.vlb_term(model, x0, xt, t),
           chain.diffusion.vlb_term(model, x0, xt, t, 0), chain.transition.posterior_kl(x0, guess, xt, s, t)),
          (bits(kl), bits(of_one), bits(code), kl), atol=1e-8, rtol=1e-8)


@given(categories(), shapes, seeds)
def test_bound_of_masks_is_a_weighted_masked_cross_entropy(case, shape, seed):
    """L_t = (alpha_bar_s - alpha_bar_t) / (1 - alpha_bar_t) times -log p~(x_0) at the masked places,
    s = 0 included, whatever the network says of the places that are not masked."""
    chain, s, t = case("absorbing")
    (x0, xt), model, other = chain.draw(shape, t, seed), table(chain, seed), table(chain, seed + 2)
    kept_s, kept_t = (math.prod(1 - b for b in chain.betas[:i]) for i in (s, t))
    masked = xt == chain.mask
    logits = model(xt, at(t, xt)).masked_fill(torch.arange(chain.K) == chain.mask, -INF)
    nll = -Categorical(logits=logits).log_prob(x0)
    equal(chain.diffusion.vlb_term(
        lambda x, t: torch.where(masked[..., None], model(x, t), other(x, t)), x0, xt, t, s),
        bits((kept_s - kept_t) / (1 - kept_t) * nll * masked))


@given(st.integers(1, 50), seeds)
def test_masks_at_an_even_rate_weigh_by_one_over_t(T, seed):
    """With t / T masked (mutual information betas) the weight of the step t - 1 -> t is 1 / t: T L_t
    is the cross-entropy over t / T at every T, as in continuous time (Sahoo et al. 2024, MDLM)."""
    diffusion = d3pm.D3PM(d3pm.absorbing_transition(4, d3pm.mutual_information_betas(T)))
    x0, t, logits = integers(3, (T, 1), seed), torch.arange(1, T + 1), normal((T, 1, 4), seed)
    equal(diffusion.loss_vlb(lambda x, t: logits, x0, t, torch.full((T, 1), 3)),
          bits(-Categorical(logits=logits[..., :3]).log_prob(x0)) / (t / T))


@pytest.mark.parametrize("name", ["uniform", "absorbing", "mixing", "neighbour"])
@settings(max_examples=4 * EXAMPLES)
@given(st.sampled_from([1, 2, 3]), seeds)
def test_bound_in_small_steps_is_the_kl_of_jump_rates(name, quarter, seed):
    """T L_t at t = u T tends to the sum over x != x_t of r log(r / r~) - r + r~, with an error of order
    1 / T: r and r~ are the rates at which q and p jump from x_t to x, R[x, x_t] q_u(x) / q_u(x_t), q_u
    given x_0 or averaged over p~, R the forward rates (UDLM, Schiff et al. 2024; masks: MDLM)."""
    def betas(T):                                           # rates of 1 + u: alpha_bar = e^{-u - u^2 / 2}
        rises = [(i - 0.5) / T ** 2 + 1 / T for i in range(1, T + 1)]
        return rises if name == "neighbour" else [-math.expm1(-rise) for rise in rises]

    u, n, K, values = quarter / 4, 128, 3, []
    for T in (n, 2 * n):
        chain = Chain(name, K, betas(T), seed)
        x0, xt, _ = chain.pairs(int(u * T))
        logits = table(Chain(name, K, [0.5], seed), seed, 0.3)(xt, at(1, xt))
        values.append(chain.diffusion.loss_vlb(lambda x, t: logits, x0, int(u * T), xt))
    jump = neighbour_rates(normal((K, 2), seed), 1 + seed % (K - 1)) if name == "neighbour" else \
        chain.transition.stationary - torch.eye(K)          # where dQ / du at s = t leads
    q = torch.linalg.matrix_exp((u + u ** 2 / 2) * jump)                           # q_u(x | x_0)
    guess = chain.guess(lambda x, t: logits, xt, 1).exp()[:, 0]
    r, r_hat = ((1 + u) * jump[:, xt[:, 0]].T * p / p.gather(1, xt) for p in (q[x0[:, 0]], guess @ q))
    other = torch.arange(K) != xt
    rate = torch.where(other & (r > 0), r * (r / r_hat).log(), 0) + torch.where(other, r_hat - r, 0)
    limit = rate.sum(1) / math.log(2)
    equal(2 * values[1] - values[0], limit, atol=30 / n ** 2, rtol=30 / n ** 2)   # order 1 / n cancels


@every_family
@given(categories(), shapes, seeds, st.floats(0, 2))
def test_losses_of_categories_are_the_bound_and_the_cross_entropy(name, case, shape, seed, weight):
    """loss_simple = CE = -log p(x_0 | x_t), loss_vlb = T L_t, loss_hybrid = L_t + w CE (1e-3)."""
    chain, _, t = case(name)
    (x0, xt), model, d = chain.draw(shape, t, seed), table(chain, seed), chain.diffusion
    ce = bits(-chain.denoised(model, xt, t).gather(-1, x0[..., None]))
    term = bits(chain.kl(chain.guess(model, xt, t), x0, xt, t - 1, t))
    equal((d.loss_simple(model, x0, t, xt), d.loss_vlb(model, x0, t, xt),
           d.loss_hybrid(model, x0, t, xt), d.loss_hybrid(model, x0, t, xt, ce_weight=weight)),
          (ce, chain.T * term, term + 1e-3 * ce, term + weight * ce), rtol=1e-8)


@every_family
@given(categories(), seeds)
def test_bound_of_categories_trains_by_its_full_gradient(name, case, seed):
    """d loss / d logits is that of the sums written out, by autograd."""
    chain, _, t = case(name)
    (x0, xt), logits = chain.draw((2, 3), t, seed), normal((2, 3, chain.K), seed).requires_grad_()
    guess, d = logits[..., chain.states].softmax(-1), chain.diffusion             # without the mask
    p0, p = ((chain.joint(s, t).exp()[xt][..., chain.states, :] * guess[..., None]).sum(-2)
             for s in (0, t - 1))
    p0, p = p0 / p0.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    q = chain.posterior(x0, xt, t - 1, t).exp()
    ce, term = -p0.gather(-1, x0[..., None]).log().sum(), -(q[q > 0] * p[q > 0].log()).sum()
    left = [loss(lambda x, t: logits, x0, t, xt) * 3 * math.log(2)
            for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid)]
    right = [ce, chain.T * term, term + 1e-3 * ce]
    equal(*(tuple(gradient(v, logits)[0] for v in side) for side in (left, right)), rtol=1e-7)


@every_family
@given(categories(), shapes, seeds, scales)
def test_extreme_logits_have_finite_losses_and_gradients(name, case, shape, seed, scale):
    """|L| < inf and |dL / d logits| < inf for any finite logits and every x_t that can be."""
    chain, _, t = case(name)
    (x0, xt), d, values = chain.draw(shape, t, seed), chain.diffusion, []
    for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid):
        logits = (scale * normal((*shape, chain.K), seed)).requires_grad_()
        value = loss(lambda x, t: logits, x0, t, xt)
        values += [value, *gradient(value, logits)]
    equal(torch.cat([v.flatten() for v in values]).isfinite().double(), 1.0)


@pytest.mark.parametrize("sure_of", ["x0", "another state", "any state"])
@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian", "neighbour", "never stay"])
def test_sure_networks_have_finite_losses_in_float32(name, sure_of):
    """The same for 256 levels in float32, betas from 1e-4 and logits of 1e4, where p~ Q and the far
    entries of Q underflow, at every t; for each x_t that can be, however rare."""
    torch.set_default_dtype(torch.float32)
    d, values = d3pm.D3PM(accepted(lambda: wide_transition(name))), []
    x0, t = integers(255, (6, 50), 1), torch.tensor([1, 2, 3] * 2)
    can_be = torch.stack([d.transition.matrix(0, int(i))[x] > 0 for i, x in zip(t, x0)])
    rare = torch.multinomial(can_be.flatten(0, 1).double(), 1).view(6, 50)        # q may be 1e-300
    xt = torch.where(torch.arange(50) < 25, d.q_sample(x0, t), rare)
    state = {"x0": x0, "another state": (x0 + 100) % 255, "any state": integers(255, (6, 50), 2)}[sure_of]
    for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid):
        logits = 1e4 * torch.nn.functional.one_hot(state, 256).float()
        logits += 1e3 * normal((6, 50, 256), 3).float() * (sure_of == "any state")
        value = loss(lambda x, t: logits.requires_grad_(), x0, t, xt)
        values += [value, *gradient(value, logits)]
    equal(torch.cat([v.flatten() for v in values]).isfinite().double(), 1.0)


@functools.cache
def wide_transition(name):
    """256 states, three steps."""
    betas = [1e-4, 1e-3, 1.0 if name in MIXING else 0.02]
    return {"uniform": lambda: d3pm.uniform_transition(256, betas),
            "absorbing": lambda: d3pm.absorbing_transition(256, betas),
            "gaussian": lambda: d3pm.gaussian_transition(256, betas),
            "neighbour": lambda: d3pm.neighbour_transition(normal((256, 4), 1), betas, 5),
            "never stay": lambda: d3pm.DenseTransition((1 - torch.eye(256)).expand(3, -1, -1) / 255)}[name]()


@given(seeds, scales)
def test_what_is_lost_costs_nothing(seed, scale):
    """Where alpha_bar_s = 0, x_s says nothing of x_0: q(x_s | x_t, x_0) = p(x_s | x_t), so L_t = 0
    and dL / d logits = 0, also for a state k with pi_k = 0, which has q(x_s = k) = 0."""
    d = d3pm.D3PM(d3pm.MixingTransition([0.5, 1.0, 0.5], torch.tensor([0.3, 0.7, 0.0])))
    x0, xt = integers(3, (2, 3), seed), integers(2, (2, 3), seed + 1)
    logits = (scale * normal((2, 3, 3), seed)).requires_grad_()
    loss = d.loss_vlb(lambda x, t: logits, x0, 3, xt)
    equal((loss, *gradient(loss, logits)), (0.0, 0.0))


@given(seeds)
def test_a_state_that_noise_never_gives_was_always_there(seed):
    """If pi_k = 0 and x_t = k then x_s = k: p(x_s | x_t) is the point k, whatever the network says."""
    d = d3pm.D3PM(d3pm.MixingTransition([0.5, 0.5], torch.tensor([0.3, 0.7, 0.0])))
    xt, logits = torch.full((2, 3), 2), normal((2, 3, 3), seed)
    equal((d.p_reverse(lambda x, t: logits, xt, 2, 1).exp(), d.p_x0(lambda x, t: logits, xt, 2).exp()),
          (torch.eye(3)[2], torch.eye(3)[2]))


@few
@given(st.integers(2, 5), st.sampled_from(["loss_simple", "loss_vlb", "loss_hybrid"]))
def test_training_on_categories_draws_every_time_alike(T, loss):
    """t ~ uniform{1..T}, both ends, each example its own; x_t ~ q(x_t | x_0)."""
    chain, seen, x0 = Chain("mixing", 3, [0.3] * T, 5), [], torch.full((20000, 1), 2)
    accepted(lambda: getattr(chain.diffusion, loss)(
        lambda x, t: seen.append((x, t)) or torch.zeros(*x.shape, 3), x0))
    (xt, t), = seen
    frequencies(t - 1, torch.full((T,), 1 / T))
    for i in range(1, T + 1):
        frequencies(xt[t == i], chain.path(0, i)[2])


@every_family
@settings(max_examples=8 * EXAMPLES)
@given(strided(), seeds)
def test_bits_per_dim_of_categories_adds_the_three_parts(name, case, seed):
    """total = L_T + sum of L_t over the grid's steps, L_0 first, each at its own
    x_t ~ q(x_t | x_0), and the share of places where the likeliest x_0 is wrong."""
    (chain, grid), seen = case(name), []
    model, x0 = table(chain, seed), chain.data((2, 3), seed)
    got = chain.diffusion.bits_per_dim(lambda x, t: seen.append((x, t)) or model(x, t), x0, grid)
    terms = torch.stack([bits(chain.kl(chain.guess(model, x, t), x0, x, s, int(t[0])))
                         for (x, t), (s, _) in zip(seen, steps_of(grid))], 1)
    wrong = torch.stack([per_example((chain.denoised(model, x, t).argmax(-1) != x0).double())
                         for x, t in seen], 1)
    prior = bits(chain.prior_nats(chain.transition.stationary)[x0])
    equal((torch.stack([t for _, t in seen], 1), got["prior"], got["terms"], got["total"],
           got["x0_error"]), (torch.tensor(grid), prior, terms, prior + terms.sum(1), wrong),
          rtol=1e-8)
    seen.clear()
    chain.diffusion.bits_per_dim(lambda x, t: seen.append(x) or model(x, t),
                                 x0[:1, :1].expand(2000, 1), grid)
    for x, t in zip(seen, grid):
        frequencies(x, chain.path(0, t)[x0[0, 0]])


@every_family
@given(strided(), seeds)
def test_bound_is_the_entropy_for_one_token(name, case, seed):
    """One token, the exact denoiser, the true q(x_T) as prior: L_T + sum of L_t + L_0 = -log p(x_0)
    at every x_0, whatever the noise and the grid; its mean over the data is the entropy."""
    chain, grid = case(name)
    p0 = source(chain, seed)
    bound = chain.prior_nats(p0 @ chain.path(0, chain.T)) \
        + chain.expected_terms(exact_denoiser(chain, p0), grid)
    held = p0 > 0
    equal((bound[held], p0[held] @ bound[held]), (-p0[held].log(), Categorical(p0).entropy()),
          atol=1e-8)


@every_family
@few
@given(strided(), seeds)
def test_bound_of_categories_is_never_below_minus_log_p(name, case, seed):
    """L_T + sum of L_t + L_0 >= -log p(x_0) for two tokens and any network, p(x_0) the sum over
    every path x_T ... x_1; and p sums to 1."""
    chain, _ = case(name)
    K, d, model = chain.K, chain.diffusion, table(chain, seed)
    x = torch.cartesian_prod(torch.arange(K), torch.arange(K))                    # every (x_1, x_2)
    x0 = torch.cartesian_prod(chain.states, chain.states)
    p, bound = chain.transition.stationary[x].prod(1), 2 * d.prior_kl(x0)
    for t in range(chain.T, 0, -1):
        step = d.p_reverse(model, x, t).exp()                                     # (x_t, place, K)
        p = p @ (step[:, 0, x[:, 0]] * step[:, 1, x[:, 1]])
        weights = chain.path(0, t)[x0[:, None], x].prod(-1)                       # q(x_t | x_0)
        terms = d.vlb_term(model, x0.repeat_interleave(len(x), 0), x.repeat(len(x0), 1), t)
        bound = bound + 2 * torch.where(weights == 0, 0, weights * terms.view(weights.shape)).sum(1)
    p0 = p[x0[:, 0] * K + x0[:, 1]]
    equal((p0.sum(), (-p0.log2() - bound).clamp(min=0)), (1.0, 0.0), atol=1e-8)


def gap_of_two_tokens(chain, p0):
    """The mean bound minus the entropy, nats: joint law p0 (K, K), x_T ~ pi, the exact denoiser."""
    x0, xt = p0.nonzero(), torch.cartesian_prod(torch.arange(chain.K), torch.arange(chain.K))
    p, d = p0[p0 > 0], chain.diffusion
    total = p @ (p.log() + 2 * math.log(2) * d.prior_kl(x0))
    for t in range(1, chain.T + 1):
        weights = chain.path(0, t)[x0[:, None], xt].prod(-1)                      # q(x_t | x_0)
        pair, noised = (weights > 0).nonzero().T
        terms = d.vlb_term(exact_denoiser(chain, p0), x0[pair], xt[noised], t)
        total += (p[pair] * weights[pair, noised]) @ terms * 2 * math.log(2)
    return total


def mutual_information(p0):
    p, independent = p0[p0 > 0], (p0.sum(1)[:, None] * p0.sum(0))[p0 > 0]
    return p @ (p / independent).log()


@given(st.lists(mild, max_size=4), seeds)
def test_two_tokens_lose_their_mutual_information_where_they_appear_at_once(betas, seed):
    """Masks, two tokens, the exact denoiser: bound - entropy = I(x_1; x_2) P(both unmasked in one
    step), P = sum of (alpha_bar_s - alpha_bar_t)^2: the factorised reverse step is all it loses."""
    chain = Chain("absorbing", 4, betas + [1.0], seed)
    p0, kept = source(chain, seed, 2), [math.prod(1 - b for b in chain.betas[:t]) for t in range(chain.T + 1)]
    equal(gap_of_two_tokens(chain, p0),
          mutual_information(p0) * sum((a - b) ** 2 for a, b in zip(kept, kept[1:])))


@pytest.mark.parametrize("name", ["uniform", "mixing"])
@settings(few, max_examples=3 * EXAMPLES)
@given(seeds)
def test_gap_of_two_tokens_shrinks_with_more_steps(name, seed):
    """Any noise: bound - entropy = I(x_1; x_2) at T = 1, then falls towards 0 with finer steps."""
    chains = [Chain(name, 3, [1 / (T - t) for t in range(T)], seed) for T in (1, 2, 4, 8, 16, 32)]
    p0 = source(chains[0], seed, 2)
    gaps = torch.stack([gap_of_two_tokens(chain, p0) for chain in chains])
    left = gaps[-1] / gaps[0]
    equal((gaps[0], gaps.sort(descending=True).values, left.clamp(0, 0.15)),
          (mutual_information(p0), gaps, left), atol=1e-8)


@every_family
@given(st.integers(2, 4), seeds)
def test_one_step_of_categories_is_a_variational_autoencoder(name, K, seed):
    """T = 1: E total = KL(q(x_1 | x_0) || pi) - E log p(x_0 | x_1)."""
    chain = Chain(name, K, [1.0 if name == "absorbing" else 0.7], seed)
    model, x0, x1 = table(chain, seed), chain.states, torch.arange(K)
    log_p = chain.denoised(model, x1[:, None], 1)[:, 0]                           # (x_1, x_0)
    decoder = torch.where(chain.Q[0] == 0, 0, chain.Q[0] * log_p.T).sum(1)
    left = chain.diffusion.prior_kl(x0[:, None]) * math.log(2)
    left = left + chain.expected_terms(model, [1])[x0]
    equal(left, (chain.prior_nats(chain.transition.stationary) - decoder)[x0])


@every_family
@given(categories(), seeds)
def test_mean_of_the_vlb_loss_of_categories_is_the_sum_of_the_terms(name, case, seed):
    """(1 / T) sum over t of E[T L_t] = E[L_0] + E[L_1] + ..., so one random t is unbiased."""
    chain, *_ = case(name)
    model, right = table(chain, seed), torch.zeros(chain.K)
    losses = chain.expected_terms(model, list(range(1, chain.T + 1)), chain.diffusion.loss_vlb)
    for t in range(1, chain.T + 1):
        x0, xt, weight = chain.pairs(t)
        terms = chain.kl(chain.guess(model, xt, t), x0, xt, t - 1, t)[:, 0]
        right = right.index_add(0, x0[:, 0], weight * terms)
    equal(losses / chain.T, right, rtol=1e-8)


# ---------------------------------------------------------------- labels and guidance

@given(seeds, st.sampled_from([0.0, -1.0]) | st.floats(-1, 4))
def test_guided_guess_is_raised_by_the_probability_of_the_label(seed, weight):
    """p~(x_0) ~ p(x_0 | rest) p(y | x_0, rest)^(1 + w), rest the other place: given y at w = 0, without
    a label at w = -1 or y = -1; in one call on a doubled batch."""
    law, seen = normal((3, 3, 2), seed).exp(), []                                 # p(x_0, rest, y)
    x, t, y = integers(3, (6, 2), seed), torch.arange(1, 7), torch.tensor([-1, 0, 1] * 2)
    unlabelled = law.sum(2)                                                       # (x_0, rest)

    def model(x, t, y):
        seen.append((x, t, y))
        given_y = law[:, x.flip(1), y.clamp(min=0)[:, None]]                      # (x_0, B, place)
        return torch.where(y[:, None] < 0, unlabelled[:, x.flip(1)], given_y).log().movedim(0, -1)

    left = d3pm.guided(model, y, weight)(x, t).softmax(-1)
    label = law / unlabelled[..., None]                                           # p(y | x_0, rest)
    label = torch.where(y[:, None] < 0, 1.0, label[:, x.flip(1), y.clamp(min=0)[:, None]])
    right = (unlabelled[:, x.flip(1)] * label ** (1 + weight)).movedim(0, -1)
    equal(left, right / right.sum(-1, keepdim=True))
    (xs, ts, ys), = seen
    holds(len(xs) == 12 and sorted(zip(ts.tolist(), ys.tolist())) ==
          sorted([*zip(t.tolist(), y.tolist()), *[(int(i), -1) for i in t]]), "not each example with and without")


@every_family
@given(strided(), seeds)
def test_labels_save_what_they_tell_of_the_data(name, case, seed):
    """One token, the exact denoiser told a label y or not: L_0 + L_1 + ... over the data is lower with it,
    by I(x_0; y) - I(x_T; y), what it tells of the data and no longer of the noise."""
    chain, grid = case(name)
    p = source(chain, seed)[:, None] * normal((chain.K, 3), seed).softmax(1)      # p(x_0, y)

    def terms(p0):
        return p0 @ chain.expected_terms(exact_denoiser(chain, p0), grid)

    labelled = sum(p_y.sum() * terms(p_y / p_y.sum()) for p_y in p.T)
    equal(terms(p.sum(1)) - labelled,
          mutual_information(p) - mutual_information(chain.path(0, chain.T).T @ p), atol=1e-8)


# ---------------------------------------------------------------- samplers

@every_family
@few
@given(strided(), seeds)
def test_step_draws_from_the_reverse_process(name, case, seed):
    """x_s ~ p(x_s | x_t), at s = 0 too, where that is p(x_0 | x_t), whose log comes along."""
    chain, grid = case(name)
    model, (s, t) = table(chain, seed), steps_of(grid)[seed % len(grid)]
    xt = chain.draw((1, 1), t, seed)[1]
    xs, log_p0 = chain.diffusion.p_sample(model, xt.expand(20000, 1), t, s)
    frequencies(xs, chain.reverse(chain.guess(model, xt, t), xt, s, t)[0, 0].exp())
    equal(log_p0, chain.denoised(model, xt, t)[0, 0], atol=1e-8)


@every_family
@few
@given(strided(), seeds)
def test_sampler_with_the_exact_denoiser_returns_the_data(name, case, seed):
    """One token: x_T ~ q(x_T), then p(x_s | x_t) down any grid: x_0 has the data's frequencies."""
    chain, grid = case(name)
    p0, transition = source(chain, seed), chain.transition
    if name not in MIXING:                                  # the prior is the true q(x_T)
        transition = d3pm.DenseTransition(chain.Q, p0 @ chain.path(0, chain.T))
    frequencies(d3pm.D3PM(transition).sample(exact_denoiser(chain, p0), (20000, 1), grid), p0)


@every_family
@given(strided(), seeds)
def test_sampler_of_categories_walks_the_grid_down_to_clean_data(name, case, seed):
    """x_T, then one reverse step for each neighbour pair of 0 = S_0 < S_1 < ... < S_n = T."""
    (chain, grid), seen = case(name), []
    model = table(chain, seed)
    torch.manual_seed(seed)
    s, xs, log_p0 = zip(*chain.diffusion.sample_progressive(
        lambda x, t: seen.append((x, t)) or model(x, t), (2, 3), grid))
    torch.manual_seed(seed)
    last, (inputs, times) = chain.diffusion.sample(model, (2, 3), grid), zip(*seen)
    right = torch.stack([chain.denoised(model, x, t) for x, t in seen])
    equal((list(s), torch.stack(times), torch.stack([*inputs[1:], last]), torch.stack(log_p0)),
          ([0, *grid][-2::-1], torch.tensor(grid[::-1])[:, None], torch.stack(xs), right), atol=1e-8)


@every_family
@few
@given(strided(), seeds)
def test_known_places_are_held(name, case, seed):
    """What is known stays so in x_0; on the way down it is noised to the time, or shown."""
    (chain, grid), seen = case(name), []
    model, known = table(chain, seed), torch.tensor([int(chain.data((), seed)), -1])
    x0 = chain.diffusion.sample(lambda x, t: seen.append((x, int(t[0]))) or model(x, t), (20000, 2),
                                grid, known)
    for x, t in seen:
        frequencies(x[:, 0], chain.path(0, t if chain.mask is None else 0)[known[0]])
    equal(x0[:, 0], known[0])


@given(seeds)
@settings(max_examples=3 * EXAMPLES)
def test_masks_in_small_steps_are_any_order_autoregression(seed):
    """As T grows the bound of masks becomes the mean over all orders of -log p(x_i | those before),
    for any network that does not look at t: autoregressive models are a corner of D3PM."""
    T, K, mask, logits, x0 = 2000, 3, 2, normal((3, 3, 3, 3, 3), seed), integers(2, (3,), seed)

    def model(x, t=None):
        return logits[x[:, 0], x[:, 1], x[:, 2]]                                  # (B, place, K)

    def nats(x, place):
        return -Categorical(logits=model(x[None])[0, place, :2]).log_prob(x0[place])

    orders = list(itertools.permutations(range(3)))
    autoregressive = sum(nats(x0.index_fill(0, torch.tensor(order[i:]), mask), order[i])
                         for order in orders for i in range(3)) / len(orders)
    hidden = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)             # every pattern
    t = torch.arange(1, T + 1).repeat_interleave(len(hidden))
    hidden, share = hidden.repeat(T, 1), (t / T)[:, None]
    terms = d3pm.D3PM(d3pm.absorbing_transition(K, d3pm.mutual_information_betas(T))).vlb_term(
        model, x0.expand(len(t), 3), torch.where(hidden, mask, x0), t)
    equal((torch.where(hidden, share, 1 - share).prod(1) * terms).sum() * 3 * math.log(2),
          autoregressive, atol=0, rtol=10 / T)


@few
@given(seeds, st.sampled_from([None, [0, 1], [1, 0]]), st.integers(0, 2))
def test_one_place_a_step_loses_nothing(seed, order, mask):
    """Any order: with the exact p(x_i | the places seen) the draws have the law of both tokens;
    each step fills one place, and the network is told how many masks are left."""
    p0, seen = (1.5 * normal((4,), seed)).softmax(0).view(2, 2), []
    states = torch.tensor([k for k in range(3) if k != mask])
    number = torch.zeros(3, dtype=torch.int64).scatter(0, states, torch.tensor([0, 1]))

    def exact(x, t):
        other = x.flip(1)                                   # what the other place shows
        told = torch.stack([p0.T[number[other[:, 0]]], p0[number[other[:, 1]]]], 1)
        p = torch.where((other == mask)[..., None], torch.stack([p0.sum(1), p0.sum(0)]), told)
        seen.append((x, t))
        return torch.zeros(*x.shape, 3).scatter(-1, states.expand_as(p), p.log())

    diffusion = d3pm.D3PM(d3pm.absorbing_transition(3, d3pm.mutual_information_betas(2), mask))
    x0 = diffusion.sample_any_order(exact, (20000, 2), order and torch.tensor(order))
    left = torch.stack([(x == mask).sum(1) for x, _ in seen])
    frequencies(2 * number[x0[:, 0]] + number[x0[:, 1]], p0.flatten())
    first = (seen[1][0][:, 0] == mask).long()               # the place that was filled first
    frequencies(first, [0.5, 0.5] if order is None else [order[1], order[0]])
    equal((left, torch.stack([t for _, t in seen])), (torch.tensor([[2], [1]]), left))


@few
@given(seeds, st.sampled_from([3, 4, 10]))
def test_any_order_keeps_what_is_known(seed, T):
    """Known places stay, the others follow p(x_i | known); the network is told the first time t
    by which the share that is masked, m / D <= t / T, would be."""
    diffusion = d3pm.D3PM(d3pm.absorbing_transition(3, d3pm.mutual_information_betas(T)))
    p, known, seen = (1.5 * normal((2,), seed)).softmax(0), torch.tensor([[-1, 1], [0, -1]]), []
    logits = torch.nn.functional.pad(p.log(), (0, 1))
    x0 = diffusion.sample_any_order(
        lambda x, t: seen.append((x, t)) or logits.expand(*x.shape, 3), (10000, 2, 2), known=known)
    first = torch.tensor([min(t for t in range(1, T + 1) if m * T <= 4 * t) for m in range(5)])
    for x, t in seen:
        equal(t, first[(x == 2).sum((1, 2))])
    frequencies(x0[:, known == -1], p)
    equal(x0[:, known >= 0], [1, 0])


@few
@given(seeds)
def test_the_surest_place_comes_first(seed):
    """Confident order: of the masked places next comes that with the largest max_k p(x_i = k | the places seen)."""
    logits, seen, mask = normal((3, 3, 3, 3, 2), seed), [], 2
    diffusion = d3pm.D3PM(d3pm.absorbing_transition(3, d3pm.mutual_information_betas(3)))

    def model(x, t):
        seen.append(x)
        return torch.nn.functional.pad(logits[x[:, 0], x[:, 1], x[:, 2]], (0, 1))

    seen.append(diffusion.sample_any_order(model, (20, 3), "confident", torch.tensor([-1, -1, seed % 2])))
    for step, (x, after) in enumerate(zip(seen, seen[1:])):
        for before, now in zip(x.tolist(), after.tolist()):
            masked = [i for i in range(3) if before[i] == mask]
            sure = [Categorical(logits=logits[tuple(before)][i]).probs.max() for i in masked]
            filled = [i for i in range(3) if now[i] != before[i]]
            assert filled == ([masked[int(torch.stack(sure).argmax())]] if step < 2 else [])


def logistic_bins(mean, log_scale, K):
    """log of the integral of the logistic density over each x_k +- 1 / (K - 1), (...) -> (..., K)."""
    x, scale, half = torch.linspace(-1, 1, K), log_scale.exp()[..., None], 1 / (K - 1)
    low, high = ((x + side - mean[..., None]) / scale for side in (-half, half))
    peak = torch.zeros(()).clamp(low, high)                 # the density falls like exp(-|z|)
    z, weight = quadrature(torch.maximum(low, peak - 40), torch.minimum(high, peak + 40), 300)
    return (weight.log() - z.abs() - 2 * torch.log1p((-z.abs()).exp())).logsumexp(0)


@given(st.lists(reals, min_size=1, max_size=3), st.floats(-12, 12), st.integers(2, 6))
@example([0.5], -12.0, 5)
@example([3.0], 12.0, 5)
def test_truncated_logistic_is_the_logistic_density_cut_into_bins(mean, log_scale, K):
    """p(k) ~ integral of the logistic density over x_k +- 1 / (K - 1), x_k = 2 k / (K - 1) - 1."""
    mean, log_scale = torch.tensor(mean), torch.full((len(mean),), log_scale)
    equal(d3pm.truncated_logistic(mean, log_scale, K),
          logistic_bins(mean, log_scale, K).log_softmax(-1), atol=1e-7)


# ---------------------------------------------------------------- numbers, batches, devices, errors

@given(st.sampled_from([d3pm.cosine_betas, d3pm.mutual_information_betas,
                        lambda T: torch.full((T,), 1e-4)]),
       st.sampled_from([1, 10, 1000, 4000]), st.data())
def test_float32_probabilities_are_exact_to_1e_5(schedule, T, data):
    """Every entry of Q_{s->t} = a I + (1 - a) 1 pi^T in float32 is the walked chain's to 1e-5 of
    its own size, for T up to 4000; exact zeros are zero."""
    t = data.draw(st.sampled_from([1, T]) | st.integers(1, T))
    s = data.draw(st.sampled_from([0, t - 1]) | st.integers(0, t - 1))
    k, redrawn = walk(schedule(T).tolist(), s, t)           # k^2 walks as the share that stays does
    torch.set_default_dtype(torch.float32)
    for family in (d3pm.uniform_transition, d3pm.absorbing_transition):
        chain, x = family(3, schedule(T)), torch.arange(3)
        left = (chain.rows(x, s, t), chain.columns(x, s, t), chain.log_rows(x, s, t).exp(),
                chain.log_columns(x, s, t).exp())
        Q = k ** 2 * torch.eye(3, dtype=torch.float64) + redrawn * chain.stationary
        holds({v.dtype for v in left} == {torch.float32}, "the default dtype was float32")
        equal(left, (Q, Q.T, Q, Q.T), atol=1e-30, rtol=1e-5)


@every_family
@settings(max_examples=8 * EXAMPLES)
@given(seeds)
def test_each_example_of_categories_has_its_own_time(name, seed):
    """f(x, s, t)_i = f(x_i, s_i, t_i): no example sees another."""
    chain, (s, t) = Chain(name, 4, [0.2, 0.5, 0.3, 0.7], seed), own_times(4, seed)
    drawn = [chain.draw((1, 2, 2), int(i), seed + int(i)) for i in t]
    (x0, xt), model, d = map(torch.cat, zip(*drawn)), table(chain, seed), chain.diffusion

    def laws(i, s, t):
        a, b = x0[i], xt[i]
        return (d.q_probs(a, t), d.q_posterior(a, b, t, s), d.p_x0(model, b, t), d.p_reverse(model, b, t, s),
                d.prior_kl(a), d.vlb_term(model, a, b, t, s), d.loss_simple(model, a, t, b),
                d.loss_vlb(model, a, t, b), d.loss_hybrid(model, a, t, b))

    equal(*alone_and_together(laws, s, t), atol=1e-12)


@machinery
@pytest.mark.parametrize("family", [d3pm.uniform_transition, d3pm.absorbing_transition])
def test_a_vocabulary_of_50257_needs_no_square_table(family):
    """A token costs O(K): the K x K table alone would take 20 GB."""
    torch.set_default_dtype(torch.float32)
    K, d = 50257, d3pm.D3PM(family(50257, d3pm.cosine_betas(10)))
    x0, logits = torch.tensor([[3, K - 2]]), torch.zeros(1, 2, K).requires_grad_()
    loss = d.loss_hybrid(lambda x, t: logits, x0, 5, torch.tensor([[K - 1, K - 1]]))
    loss.sum().backward()
    holds(logits.grad.isfinite().all() and loss.isfinite().all())
    holds(sum(b.numel() for b in d.buffers()) < 10 * K, "the tables are larger than O(K)")


@machinery
@every_family
def test_category_tables_stay_float64_and_out_of_checkpoints(name):
    """.half() and the like leave the tables float64; two at most if dense; none is saved."""
    chain = Chain(name, 4, [0.2, 0.5], 1)
    d = d3pm.D3PM(chain.transition).half()
    square = sum(b.numel() >= 2 * 4 * 4 for b in d.buffers())
    holds({b.dtype for b in d.buffers()} == {torch.float64} and not d.state_dict())
    holds(square <= (0 if name in MIXING else 2), f"{square} tables of T x K x K")
    equal(d.q_probs(chain.states, 2), chain.path(0, 2)[chain.states])


@machinery
@every_family
def test_discrete_diffusion_runs_on_another_device(name):
    """Losses, bound and samplers stay on the data's device (meta: shapes without numbers)."""
    d = d3pm.D3PM(Chain(name, 5, [0.1] * 3 + [1.0], 4).transition).to("meta")
    x, t = (torch.ones(shape, dtype=torch.int64, device="meta") for shape in ((3, 6), (3,)))
    net = d3pm.guided(tiny_transformer((6,), classes=3).to("meta"), t, 1.0)
    bound = d.bits_per_dim(net, x, 2)
    on_meta((3,), bound["total"], bound["prior"], d.loss_hybrid(net, x), d.loss_vlb(net, x, 2),
            d.loss_simple(net, x, t), d.prior_kl(x), d.vlb_term(net, x, x, 3, 1))
    on_meta((3, 2), bound["terms"], bound["x0_error"])
    on_meta((3, 6), d.q_sample(x, 2), d.q_step(x, 0, t), d.sample(net, (3, 6), 2),
            d.sample(net, (3, 6), known=torch.full((6,), -1, device="meta")),
            *[step[1] for step in d.sample_progressive(net, (3, 6))],
            *[d.sample_any_order(net, (3, 6)) for _ in range(name == "absorbing")])
    on_meta((3, 6, 5), d.q_probs(x, t), d.q_posterior(x, x, t), d.p_x0(net, x, t), d.p_reverse(net, x, t, 0),
            d.p_sample(net, x, t)[1])


@machinery
def test_discrete_measurements_carry_no_gradient():
    """bits_per_dim and the samplers only measure: nothing of the network's graph is kept."""
    weight, d = torch.ones(3).requires_grad_(), Chain("absorbing", 3, [0.5, 1.0], 2).diffusion

    def model(x, t):
        return weight.expand(*x.shape, 3)

    results = [*d.bits_per_dim(model, torch.zeros(2, 2, dtype=torch.int64)).values(),
               d.p_sample(model, torch.full((2, 2), 2), 2)[1],
               *[log_p for _, _, log_p in d.sample_progressive(model, (2, 2))]]
    holds(not any(r.requires_grad for r in results))


def alike(x, t):
    """A network that takes all 3 states for alike."""
    return torch.zeros(*x.shape, 3)


@machinery
@pytest.mark.parametrize("uniform", [0.0, 1 - 2 ** -53])
def test_what_has_probability_0_is_not_drawn_at_the_ends_of_the_uniform_draw(uniform, monkeypatch):
    """torch.rand may return 0 itself: the first and last states are drawn only where they can be."""
    Q, x = torch.tensor([[[0.0, 0.5, 0.5, 0.0]] * 4]), torch.arange(4)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, uniform, **options))
    equal(d3pm.D3PM(d3pm.DenseTransition(Q)).q_sample(x, 1), 1 if uniform == 0 else 2)


@few
@given(seeds, st.floats(0.1, 10))
def test_draws_follow_their_weights(seed, scale):
    """categorical draws k with probability w_k / sum w, whatever the sum."""
    p = (1.5 * normal((4,), seed)).softmax(0) * torch.tensor([1.0, 1.0, 0.0, 1.0])
    frequencies(d3pm.categorical((scale * p).expand(2, 10000, 4)).flatten(), p / p.sum())


@machinery
def test_what_underflows_in_a_matrix_product_keeps_the_diagonal_s_term():
    """log(p Q) where p Q = 0 in floats: the log of p_k Q_kk; a state that no row gives has log 0."""
    Q = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]])
    log_p = torch.tensor([[0.0, -1000.0, -1000.0]])
    equal(d3pm.DenseTransition(Q).log_rows(log_p, 0, 1), [[0.0, -1000.0 - math.log(2), -INF]])


@machinery
@every_family
def test_whole_numbers_of_any_kind_are_times_and_steps(name):
    """Times and numbers of steps may be int, np.int64, or a tensor without dimensions."""
    chain, results = Chain(name, 3, [0.3, 0.2, 1.0], 2), []
    (x0, xt), d, model = chain.draw((2, 2), 3, 1), chain.diffusion, table(chain, 1)
    for number in (int, np.int64, torch.tensor):
        s, t = number(1), number(3)
        results.append(accepted(lambda: (
            d.q_probs(x0, t), d.q_posterior(x0, xt, t, s), d.p_reverse(model, xt, t, s), d.p_x0(model, xt, t),
            d.vlb_term(model, x0, xt, t, s), d.loss_hybrid(model, x0, t, xt), d.loss_simple(model, x0, t, xt),
            d.transition.matrix(1, 3), d.timesteps(number(2)), d.bits_per_dim(model, x0, number(2))["prior"])))
    equal(results[1] + results[2], results[0] * 2)


@machinery
@every_family
def test_no_examples_give_no_losses(name):
    """A batch of 0 has losses and bounds of shape (0,), and samples of shape (0, ...)."""
    d, x = Chain(name, 3, [0.3, 1.0], 1).diffusion, torch.zeros(0, 4, dtype=torch.int64)
    bound = d.bits_per_dim(alike, x)
    losses = [d.loss_simple(alike, x), d.loss_vlb(alike, x), d.loss_hybrid(alike, x), d.prior_kl(x),
              d.vlb_term(alike, x, x, 2, 0), bound["total"]]
    holds({tuple(v.shape) for v in losses} == {(0,)} and bound["terms"].shape == (0, 2), "not of shape (0,)")
    holds(d.sample(alike, (0, 4)).shape == (0, 4) and d.p_x0(alike, x, 1).shape == (0, 4, 3))


@machinery
@every_family
def test_logits_of_half_precision_are_counted_in_float32(name):
    """bfloat16 logits, as under autocast, give the losses of the same logits in float32."""
    torch.set_default_dtype(torch.float32)
    (x0, xt), d = Chain(name, 4, [0.3, 0.5], 1).draw((2, 3), 2, 1), Chain(name, 4, [0.3, 0.5], 1).diffusion
    logits = normal((2, 3, 4), 1).bfloat16()
    left, right = ([loss(lambda x, t: values, x0, 2, xt) for loss in (d.loss_simple, d.loss_vlb, d.loss_hybrid)]
                   for values in (logits, logits.float()))
    holds({v.dtype for v in left} == {torch.float32}, "the loss is not in float32")
    equal(tuple(left), tuple(right), atol=0, rtol=0)


@machinery
def test_there_is_one_reverse_step():
    """reverse= is no argument, like any other that is unknown: TypeError."""
    transition = d3pm.uniform_transition(3, [0.1])
    for call in (lambda: d3pm.D3PM(transition, reverse="joint"), lambda: d3pm.D3PM(transition, other=1)):
        with pytest.raises(TypeError):
            call()


def masked(mask=1):
    return d3pm.D3PM(d3pm.absorbing_transition(3, [0.1], mask))


def dense():
    return d3pm.D3PM(d3pm.gaussian_transition(3, [0.1] * 4))


S = torch.tensor([[0, 1], [1, 0]])
DISCRETE_ERRORS = {
    "betas of 0": ("betas", lambda d: d3pm.uniform_transition(3, [0.0])),
    "betas above 1": ("betas", lambda d: d3pm.absorbing_transition(3, [1.1])),
    "no betas": ("betas", lambda d: d3pm.gaussian_transition(3, [])),
    "betas that are no numbers":
        ("betas", lambda d: d3pm.neighbour_transition(torch.ones(4, 2), [math.nan], 1)),
    "a beta of 0 among good ones": ("betas", lambda d: d3pm.uniform_transition(3, [0.1, 0.0, 0.2])),
    "a beta above 1 among good ones": ("betas", lambda d: d3pm.gaussian_transition(3, [0.1, 1.1])),
    "a beta below 0 among good ones": ("betas", lambda d: masked() and d3pm.MixingTransition(
        [0.5, -0.1], torch.tensor([0.5, 0.5]))),
    "a beta that is no number among good ones":
        ("betas", lambda d: d3pm.neighbour_transition(normal((4, 2), 1), [0.1, math.nan], 1)),
    "betas in a square": ("betas", lambda d: d3pm.uniform_transition(3, [[0.1, 0.1], [0.1, 0.1]])),
    "a mask that is no state": ("mask.*3", lambda d: masked(3)),
    "a mask below 0": ("mask.*-1", lambda d: masked(-1)),
    "a stationary above 1": ("1", lambda d: d3pm.MixingTransition([0.1], torch.tensor([0.9, 0.9]))),
    "a stationary below 1": ("1", lambda d: d3pm.MixingTransition([0.1], torch.tensor([0.4, 0.4]))),
    "a negative stationary":
        ("prob", lambda d: d3pm.MixingTransition([0.1], torch.tensor([1.5, -0.5]))),
    "rows above 1": ("row", lambda d: d3pm.DenseTransition(torch.ones(1, 2, 2))),
    "rows below 1": ("row", lambda d: d3pm.DenseTransition(torch.eye(2)[None] / 2)),
    "one bad row among good ones":
        ("row", lambda d: d3pm.DenseTransition(torch.tensor([[[1.0, 0.0], [0.5, 0.4]]]))),
    "columns that sum to 1, rows that do not":
        ("row", lambda d: d3pm.DenseTransition(torch.tensor([[[0.5, 0.2], [0.5, 0.8]]]))),
    "negative entries":
        ("row", lambda d: d3pm.DenseTransition(torch.tensor([[[2.0, -1.0], [0.0, 1.0]]]))),
    "a matrix alone": ("T, K, K", lambda d: d3pm.DenseTransition(torch.eye(2))),
    "matrices that are not square": ("T, K, K", lambda d: d3pm.DenseTransition(torch.ones(1, 3, 2) / 2)),
    "no matrices": ("T, K, K", lambda d: d3pm.DenseTransition(torch.ones(0, 2, 2))),
    "few embeddings": ("k = 3", lambda d: d3pm.neighbour_transition(torch.ones(3, 2), [0.1], 3)),
    "no neighbours": ("k = 0", lambda d: d3pm.neighbour_transition(torch.ones(3, 2), [0.1], 0)),
    "a state K": (r"0\.\.2", lambda d: d.q_sample(S + 2, 1)),
    "a state below 0": (r"0\.\.2", lambda d: d.loss_vlb(alike, S - 1)),
    "a state K in x_t": (r"0\.\.2", lambda d: d.p_reverse(alike, S + 2, 1)),
    "a known state K": (r"0\.\.2", lambda d: d.sample(alike, (2, 2), known=torch.tensor([3, -1]))),
    "a known mask": ("mask", lambda d: masked().sample(alike, (2, 2), known=torch.tensor([1, -1]))),
    "states that are floats": ("int64", lambda d: d.q_probs(S.double(), 1)),
    "data that holds the mask": ("mask", lambda d: masked().loss_simple(alike, S)),
    "a mask in a posterior's data": ("mask", lambda d: masked().q_posterior(S, S, 1)),
    "logits of a wrong size": ("3", lambda d: d.loss_vlb(lambda x, t: torch.zeros(2, 2, 4), S)),
    "logits of too few places": ("3", lambda d: d.sample(lambda x, t: torch.zeros(2, 3), (2, 2))),
    "t = 0": ("1 <= t.*0", lambda d: d.p_reverse(alike, S, 0)),
    "t = T + 1": ("T = 4.*5", lambda d: d.vlb_term(alike, S, S, 5)),
    "t below 0": ("-1", lambda d: d.q_posterior(S, S, -1)),
    "a batch of times with a 0": ("0", lambda d: d.p_sample(alike, S, torch.tensor([1, 0]))),
    "a loss above T": ("T = 4.*5", lambda d: d.loss_hybrid(alike, S, torch.tensor([5, 1]))),
    "a cross-entropy at 0": ("1 <= t.*0", lambda d: d.loss_simple(alike, S, 0, S)),
    "q beyond T": ("T = 4.*5", lambda d: d.q_sample(S, 5)),
    "q before 0": ("-1", lambda d: d.q_probs(S, -1)),
    "q beyond T by a table": ("T = 4.*5", lambda d: dense().q_probs(S, torch.tensor([1, 5]))),
    "q before 0 by a table": ("-1", lambda d: dense().q_sample(S, torch.tensor([-1, 1]))),
    "a step backwards by a table": ("s < t", lambda d: dense().q_step(S, torch.tensor([3, 1]), 2)),
    "a matrix beyond T": ("T = 4.*5", lambda d: d.transition.matrix(0, 5)),
    "a matrix backwards": ("s = 3", lambda d: d.transition.matrix(3, 2)),
    "a table's matrix backwards": ("s = 3", lambda d: dense().transition.matrix(3, 2)),
    "times that are floats": ("int", lambda d: d.q_sample(S, torch.tensor([1.0, 2.0]))),
    "half a time": ("1.5", lambda d: d.q_sample(S, 1.5)),
    "a time of 2.0": ("int.*2.0", lambda d: d.loss_vlb(alike, S, 2.0, S)),
    "a list of times": (r"int.*\[1, 2\]", lambda d: d.loss_vlb(alike, S, [1, 2], S)),
    "a list of s": (r"int.*\[0, 0\]", lambda d: d.p_reverse(alike, S, 2, [0, 0])),
    "a square of times": ("int", lambda d: d.p_x0(alike, S, torch.ones(2, 2, dtype=torch.int64))),
    "a square of times for q": ("int", lambda d: d.q_sample(S, torch.ones(2, 2, dtype=torch.int64))),
    "times for another batch": ("2", lambda d: d.p_x0(alike, S, torch.tensor([1, 2, 3]))),
    "s = t": ("s < t", lambda d: d.p_reverse(alike, S, 2, 2)),
    "a term from t to t": ("s < t", lambda d: d.vlb_term(alike, S, S, 2, 2)),
    "a table's term from t to t": ("s < t", lambda d: dense().vlb_term(alike, S, S, 2, 2)),
    "s above t": ("s < t", lambda d: d.q_posterior(S, S, torch.tensor([1, 3]), 2)),
    "s below 0": ("-1", lambda d: d.vlb_term(alike, S, S, 2, -1)),
    "no steps": ("steps", lambda d: d.timesteps(0)),
    "steps below 0": ("steps", lambda d: d.timesteps(-1)),
    "steps of 2.0": ("steps.*2.0", lambda d: d.sample(alike, (2, 2), 2.0)),
    "a grid of floats": ("steps", lambda d: d.timesteps([1.0, 2.5, 4.0])),
    "an empty grid": ("steps", lambda d: d.timesteps([])),
    "a grid that stops short of T": ("T = 4", lambda d: d.bits_per_dim(alike, S, [1, 3])),
    "a grid beyond T": ("T = 4", lambda d: d.bits_per_dim(alike, S, [1, 5])),
    "a grid that starts at 0": ("steps", lambda d: d.sample(alike, (2, 2), [0, 4])),
    "a grid that stays": ("steps", lambda d: d.sample(alike, (2, 2), [2, 2, 4])),
    "any order without masks": ("absorbing", lambda d: d.sample_any_order(alike, (2, 2))),
    "an order that leaves a place out":
        ("order", lambda d: masked().sample_any_order(alike, (2, 2), torch.tensor([0, 0]))),
    "an order of no name": ("order.*confident", lambda d: masked().sample_any_order(alike, (2, 2), "surest")),
    "pixels whose mask is not the last state": ("mask.*3.*1", lambda d: d3pm.PixelLogits(None, 4, 1)),
}


@machinery
@pytest.mark.parametrize("case", DISCRETE_ERRORS)
def test_discrete_errors_are_one_clear_line(case):
    """What a caller can get wrong raises ValueError and says what was got."""
    words, call = DISCRETE_ERRORS[case]
    refuses(lambda: call(d3pm.D3PM(d3pm.uniform_transition(3, [0.1] * 4))), words)


# ---------------------------------------------------------------- networks: pixels, the Transformer

@machinery
@pytest.mark.parametrize("K, mask", [(2, None), (16, None), (17, 16), (32, 31), (33, None), (33, 32),
                                     (256, None), (257, 256)])
def test_pixel_logits_are_the_network_s_own_or_a_logistic_around_x_t(K, mask):
    """The network sees grey values 2 x / (levels - 1) - 1, 0 at a mask, then planes of 1 where a mask is.
    Up to 32 states its outputs are the logits; above, a pixel's two are mean - x_t and log scale + 2."""
    levels, seen, n = K - (mask is not None), [], K if K <= 32 else 2
    xt, t, y, out = integers(K, (2, 3, 2, 1), 1), torch.tensor([1, 2]), torch.tensor([0, -1]), normal((2, 3 * n, 2, 1), 2)
    xt[0, 0] = torch.tensor([[0], [K - 1]])
    model = d3pm.PixelLogits(lambda *inputs: seen.append(inputs) or out, K, mask)
    logits, with_label = model(xt, t), model(xt, t, y)
    hidden = xt == (-1 if mask is None else mask)
    grey = torch.where(hidden, 0.0, 2 * xt / (levels - 1) - 1)
    per_state = out.view(2, 3, n, 2, 1)                                           # float32 from here on
    right = per_state.movedim(2, -1) if K <= 32 else logistic_bins(
        grey + per_state[:, :, 0], per_state[:, :, 1] - 2, levels).log_softmax(-1)
    holds(d3pm.pixel_outputs(K) == n and logits.shape == (2, 3, 2, 1, K) and logits.isfinite().all())
    equal((logits[..., :right.shape[-1]], with_label), (right, logits), atol=1e-4, rtol=1e-5)
    equal((seen[0][0], seen[0][1], seen[1][2]), (torch.cat([grey, hidden.double()], 1), t, y), atol=1e-6)
    holds([len(inputs) for inputs in seen] == [2, 3], "a label is passed on where there is one, and only there")


def tiny_transformer(shape, depth=2, classes=0):
    return d3pm.Transformer(5, shape, width=8, depth=depth, heads=2, patch=2, classes=classes)


@machinery
@pytest.mark.parametrize("shape", [(6,), (2, 4, 4)])
def test_transformer_takes_a_label_for_each_example(shape):
    """y int64 (B,), each example its own, -1 where there is none; None is -1 throughout. At first labels
    tell nothing; without classes there is no table, and -1 is the only label."""
    fresh, plain, t = tiny_transformer(shape, classes=3), awake(tiny_transformer(shape)), torch.ones(4).long()
    x, y, none = integers(5, (1, *shape), 1).expand(4, *shape), torch.tensor([-1, 0, 1, 2]), torch.full((4,), -1)
    names = {name for name, _ in fresh.named_parameters()} - {name for name, _ in plain.named_parameters()}
    holds(len(names) == 1 and not fresh.get_parameter(*names).any(), f"{names} hold the labels, at first 0")
    net = awake(fresh)
    out = net(x, t, y)
    alone = torch.cat([net(x[:1], t[:1], y[i:i + 1]) for i in range(4)])
    equal((out, net(x, t), plain(x, t)), (alone, net(x, t, none), plain(x, t, none)), atol=1e-12)
    equal(net(x, t)[0], out[0], atol=1e-12)
    holds(all((out[i] != out[j]).any() for i in range(4) for j in range(i)), "two labels are alike")


@machinery
@pytest.mark.parametrize("classes, y, words", [
    (3, torch.tensor([0, 3]), r"-1\.\.2.*3"), (3, torch.tensor([-2, 0]), r"-1\.\.2.*-2"),
    (3, torch.tensor([0.0, 1.0]), "int64"), (3, torch.tensor([1]), r"\(2,\)"), (3, torch.tensor(1), r"\(2,\)"),
    (3, torch.tensor([[0], [1]]), r"\(2,\)"), (0, torch.tensor([0, -1]), r"-1\.\.-1.*0")])
def test_transformer_says_which_labels_it_takes(classes, y, words):
    """Labels are int64 (B,) in -1..classes - 1: ValueError in one line."""
    net = tiny_transformer((6,), classes=classes)
    refuses(lambda: net(torch.zeros(2, 6).long(), torch.tensor([1, 2]), y), words)


@machinery
@pytest.mark.parametrize("shape", [(1,), (6,), (1, 4, 4), (3, 2, 6)])
def test_transformer_gives_logits_for_every_place(shape):
    """(B, L) tokens -> (B, L, K), (B, C, H, W) images -> (B, C, H, W, K); at first 0."""
    out = tiny_transformer(shape)(torch.zeros(2, *shape, dtype=torch.int64), torch.tensor([1, 2]))
    equal(out, torch.zeros(2, *shape, 5), atol=0)


@machinery
@pytest.mark.parametrize("shape, x", [((1, 5, 4), ()), ((1, 4, 5), ()), ((4, 4), ()),
                                      ((4,), (2, 5)), ((1, 4, 4), (2, 1, 4, 6))])
def test_transformer_says_which_shapes_it_takes(shape, x):
    """Patches must divide H and W, and data must have the shape promised: ValueError."""
    x0, t = torch.zeros(x, dtype=torch.int64), torch.tensor([1, 2])
    refuses(lambda: tiny_transformer(shape)(x0, t), re.escape(str(x or shape)))


@machinery
@pytest.mark.parametrize("shape", [(6,), (2, 4, 4)])
def test_transformer_examples_do_not_see_each_other(shape):
    """Changing one example, or its time, changes no other's output."""
    net, x, other = awake(tiny_transformer(shape)), *(integers(5, (3, *shape), i) for i in (1, 2))
    other[0] = x[0]
    equal(net(other, torch.tensor([1, 9, 7]))[0], net(x, torch.tensor([1, 2, 3]))[0], atol=1e-12)


@machinery
@pytest.mark.parametrize("shape", [(6,), (2, 4, 4)])
def test_transformer_uses_every_weight_every_place_and_the_time(shape):
    """Bidirectional: each place sees every other, before and after; each has its own position."""
    net, x, t = awake(tiny_transformer(shape)), integers(5, (1, *shape), 1), torch.tensor([3])
    out = net(x, t)
    (out * normal(out.shape, 2)).sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    holds(not unused, f"not used: {unused}")
    for place in range(x.numel()):
        changed = (x + (torch.arange(x.numel()) == place).view(x.shape)) % 5
        holds((net(changed, t) != out).all(), f"some place does not see place {place}")
    same = net(0 * x, t).view(-1, 5)
    holds(len(same.unique(dim=0)) == len(same), "two places look alike")
    holds((net(x, t + 1) != out).all(), "the time is not used")


@machinery
@given(seeds, st.integers(0, 3), st.integers(0, 3), st.integers(0, 4))
def test_rotated_products_depend_on_the_distance_alone(seed, i, j, shift):
    """rotate(q)_i . rotate(k)_j = rotate(q)_{i + n} . rotate(k)_{j + n}; q . k at i = j."""
    q, k = (d3pm.rotate(v.expand(8, 6)) for v in normal((2, 1, 6), seed))
    products = torch.stack([q[i] @ k[j], q[i] @ k[i]])
    equal(products, [q[i + shift] @ k[j + shift], q[0] @ k[0]], atol=1e-5)   # angles in float32


@machinery
@given(seeds)
def test_transformer_block_is_a_near_look_then_attention_then_two_layers(seed):
    """x + conv(x) in each channel over 5 places, x + g1 attention(a1 norm(x) + b1), then x + g2 mlp(a2 norm(x) + b2)
    with mlp(h) = down(relu(up(h))^2); scales a, shifts b and gates g are the time's and the block's own, and 1, 0, 1
    if these are 0; and a fresh block is the convolution alone, its last layers being 0."""
    x, time, fresh = normal((2, 3, 8), seed), normal((2, 6, 8), seed + 1), d3pm.Block(8, 2, 0.0).double()
    block = awake(d3pm.Block(8, 2, 0.0))
    a1, b1, g1, a2, b2, g2 = (time + block.table + torch.tensor([1, 0, 1, 1, 0, 1])[:, None])[:, :, None].unbind(1)
    near = torch.stack([sum(block.near.weight[:, 0, 2 + j - i] * x[:, j] for j in range(3)) for i in range(3)], 1)
    x0, x = x, x + near + block.near.bias
    q, k, v = block.qkv(block.norm(x) * a1 + b1).view(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = (d3pm.rotate(q) @ d3pm.rotate(k).mT / 2).softmax(-1)                # (B, head, N, N)
    h = x + g1 * block.out((weights @ v).transpose(1, 2).reshape(2, 3, 8))
    hidden = block.up(block.norm(h) * a2 + b2)
    equal((block(x0, time), fresh(x0, time)),
          (h + g2 * block.down(torch.where(hidden > 0, hidden ** 2, 0)), x0 + fresh.near(x0.mT).mT))
    tables = [fresh.table, *tiny_transformer((3,)).modulation.parameters()]
    holds(not any(table.any() for table in tables), "a fresh network scales, shifts or gates")


@machinery
@given(st.integers(0, 1), st.integers(0, 3), st.integers(0, 5))
def test_transformer_patches_go_back_where_they_came_from(c, i, j):
    """With no blocks between, a changed pixel (c, i, j) changes its own patch alone."""
    net, t = awake(tiny_transformer((2, 4, 6), depth=0)), torch.tensor([1])
    x, right = torch.zeros(1, 2, 4, 6, dtype=torch.int64), torch.zeros(2, 4, 6)
    x[0, c, i, j], i, j = 1, i // 2 * 2, j // 2 * 2
    right[:, i:i + 2, j:j + 2] = 1
    equal((net(x, t) != net(0 * x, t)).any(-1)[0].double(), right, atol=0)


# ================================================================ both files, and the README

def both(T):
    """The two kinds of diffusion with T steps."""
    return gaussian([0.5 / T] * T), d3pm.D3PM(d3pm.uniform_transition(3, [0.5 / T] * T))


@given(st.integers(1, 300), st.integers(1, 320))
@example(1000, 50)
@example(1000, 2)
@example(1000, 999)
def test_strided_grid_is_even_and_keeps_both_ends(T, n):
    """S_i = 1 + (i - 1) (T - 1) / (n - 1) to the nearest whole, halves up; 1..T if n >= T."""
    even = [T] if n == 1 else list(range(1, T + 1)) if n >= T else \
        [math.floor(1 + Fraction(i * (T - 1), n - 1) + Fraction(1, 2)) for i in range(n)]
    for d in both(T):
        equal((d.timesteps(n), d.timesteps(even), d.timesteps()), (even, even, [*range(1, T + 1)]))


@few
@given(st.integers(1, 6), seeds)
def test_strided_chain_at_full_stride_is_the_chain(T, seed):
    """With S = 1..T the strided bound and samples are the ordinary ones, draw for draw."""
    discrete = table(Chain("uniform", 3, [0.5] * T, 1), seed)
    data = data_on(256, (2, 3), seed), integers(3, (2, 3), seed)
    for d, model, x0 in zip(both(T), (network, discrete), data):
        results = []
        for steps in (None, T, list(range(1, T + 1))):
            torch.manual_seed(seed)
            terms = d.bits_per_dim(model, x0, steps)["terms"]
            results.append((terms, d.sample(model, (2, 3), steps)))
        equal(results[1] + results[2], results[0] * 2, atol=0, rtol=0)


@machinery
@pytest.mark.parametrize("T", [1, 3])
def test_both_ends_of_time_are_legal(T):
    """t = 1 and t = T for every law, t = 0 for q: no end of the chain is refused."""
    x0 = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    for d, model, x in zip(both(T), (network, alike), x0):
        for t in (1, T, torch.tensor([1, T])):
            for call in (d.loss_simple, d.loss_vlb, d.loss_hybrid):
                equal(accepted(lambda: call(model, x, t)).isfinite().double(), 1.0)
        equal(accepted(lambda: d.q_sample(x, 0)), x)


@machinery
@pytest.mark.parametrize("name", ["ddpm.py", "d3pm.py"])
def test_each_file_needs_only_torch(name):
    """Copied alone into an empty folder it still imports: torch, and what comes with Python."""
    nodes = list(ast.walk(ast.parse((HERE / name).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    needed = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    holds(needed == {"torch"}, f"{name} needs {needed}")


@machinery
def test_both_files_name_the_same_laws_in_the_same_order():
    """A reader can lay one beside the other."""
    gaussian, discrete = ([name for name in vars(kind) if callable(getattr(kind, name))
                           and name[0] != "_"] for kind in (ddpm.GaussianDiffusion, d3pm.D3PM))
    shared = [name for name in gaussian if name in discrete]
    holds(shared == [name for name in discrete if name in gaussian] and len(shared) >= 13,
          f"{gaussian} beside {discrete}")


def definitions(name):
    """Every function, class and method of a file (`Class.method`), and its line."""
    for node in ast.parse((HERE / name).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{method.name}", method.lineno) for method in node.body
                        if isinstance(method, ast.FunctionDef))


def readme_table():
    """The rows (law, function, test) of the README's table."""
    holds((HERE / "README.md").exists(), "README.md is missing, and with it the table of laws")
    lines = iter((HERE / "README.md").read_text().splitlines())
    header = re.compile(r"\|\s*law\s*\|\s*function\s*\|\s*test\s*\|\s*")
    holds(any(header.fullmatch(line) for line in lines), "README.md has no table of the laws")
    rows = itertools.takewhile(lambda line: line.strip().startswith("|"), lines)
    rows = [re.split(r"(?<!\\)\|", row.strip().strip("|")) for row in rows][1:]
    holds(rows and all(len(row) == 3 for row in rows), "a row needs three cells (\\mid for a bar)")
    return rows


@machinery
def test_every_function_in_the_readme_table_stands_where_it_says():
    """The function cells name what ddpm.py or d3pm.py define, and their links point to its line."""
    known = {file: dict(definitions(file)) for file in ("ddpm.py", "d3pm.py")}
    for _, functions, test in readme_table():
        names = re.findall(r"`([\w.]+)`", functions)
        missing = [name for name in names if not any(name in lines for lines in known.values())]
        holds(names and not missing, f"{missing or 'no function'} beside {test}")
        for name, file, line in re.findall(r"\[`([\w.]+)`\]\(([\w.]+)#L(\d+)\)", functions):
            holds(known[file].get(name) == int(line), f"{name} is not at {file}#L{line}")


@machinery
def test_every_law_is_in_the_readme_table():
    """The test cells are exactly the tests of this sheet that prove a law."""
    named = {name for row in readme_table() for name in re.findall(r"\btest_\w+", row[2])}
    laws = {name for name, test in globals().items()
            if name.startswith("test_") and not hasattr(test, "machinery")}
    holds(not named - laws, f"no law tests of test_math.py: {sorted(named - laws)}")
    holds(not laws - named, f"missing from the README's table: {sorted(laws - named)}")
