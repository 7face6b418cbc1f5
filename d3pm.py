"""Denoising diffusion on categories, in one file that needs only torch.

    q(x_t | x_s) = Cat(x_s Q_{s->t})            rows of Q_{s->t} = Q_{s+1} ... Q_t sum to 1       data -> noise
    p(x_s | x_t)   from the network's guess p(x_0 | x_t)                                        noise -> data
    -log p(x_0) <= KL(q(x_T|x_0) || p(x_T)) + sum_{t>1} KL(q(x_s|x_t,x_0) || p(x_s|x_t)) - log p(x_0|x_1)
                   ------- L_T ----------   ------------------ L_t -------------------   ---- L_0 -----

The bound is that of ddpm.py; only the noise differs: pixels or characters are redrawn, or masked.
L_t is the term of the step down from t, which the papers call L_{t-1}; that of t = 1 is L_0.

[A] Austin et al. 2021, arXiv 2107.03006       [Ho] Hoogeboom et al. 2021, 2102.05379
[U] Uria et al. 2014, 1310.1757 (any order)    [P] Peebles & Xie 2023, 2212.09748 (adaptive norm)

x0, xt        data and its noised version, int64 (B, ...) in 0..K-1
t, s          times, an int or int64 (B,), 0 <= s < t <= T; 0 is clean and T is noise
Q_{s->t}      (K, K); row i is q(x_t = . | x_s = i). Q_t is Q_{t-1->t}, Q_bar_t is Q_{0->t}
model         any callable model(xt, t) -> logits (..., K) of x_0

Every law is written for a step s -> t of any length, s = t - 1 when left out, so that a strided
chain is the same code on fewer times. Probabilities are exact: zero is zero, and its log is -inf.
Logs are natural; bounds and losses leave in bits per dimension, (B,).
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


# ---------------------------------------------------------------- schedules: arrays of betas

def cosine_betas(T):
    """alpha_bar_t = f(t) / f(0), f(t) = cos((t/T + 0.008) / 1.008 pi/2), [Ho] -> (T,) float64; for uniform noise.

    cos, where Gaussian diffusion has cos^2. beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.999.
    """
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2)
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def linear_betas(T, start=0.02, stop=1.0):
    """beta_t from start to stop in equal steps, [A] section 3.2 -> (T,) float64; for discretised Gaussian noise."""
    return torch.linspace(start, stop, T, dtype=torch.float64)


def mutual_information_betas(T):
    """beta_t = 1 / (T - t + 1), [A] section 3.2 -> (T,) float64; for masks: a share t / T is masked at t."""
    return 1 / torch.arange(T, 0, -1, dtype=torch.float64)


# ---------------------------------------------------------------- tables, times, rows

def _table(values):
    """float64 on the CPU in one move: mps has no float64."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _betas(betas):
    """As a table, or ValueError."""
    betas = _table(betas)
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas must be a list of numbers in (0, 1], got {betas}")
    return betas


def _check_times(T, s, t, gap=0):
    """ValueError unless 0 <= s <= t - gap and t <= T; s None is t - 1. What is on an accelerator is not read."""
    times = [time if isinstance(time, torch.Tensor) else torch.tensor(time, device="cpu")
             for time in (t, t - 1 if s is None else s)]
    if any(time.dtype != torch.int64 or time.ndim > 1 for time in times):
        raise ValueError(f"a time is an int or int64 (B,), got t = {t}, s = {s}")
    late, early = (time if time.device.type == "cpu" else torch.tensor(bound, device="cpu")
                   for time, bound in zip(times, (T, 0)))
    if not ((0 <= early) & (early <= late - gap) & (late <= T)).all():
        raise ValueError(f"need {gap} <= t <= T = {T} and 0 <= s < t, got t = {t}, s = {s}")


def _to(coefficient, x):
    """A float64 coefficient in x's dtype on x's device, in that order: no float64 may reach mps."""
    return coefficient.to(x.dtype).to(x.device)


def _pick(Q, x):
    """Row x of Q (B, K, K) or (1, K, K), for int x (B, ...) -> (B, ..., K)."""
    return Q[torch.arange(len(Q), device=x.device).reshape(-1, *[1] * (x.ndim - 1)), x].reshape(*x.shape, -1)


def _spread(shared, x, extra, K):
    """(..., K) in the default dtype: `shared` everywhere, and `extra` more at state x."""
    like, at = torch.empty(0, device=x.device), x[..., None]
    shared = _to(shared, like).expand(*x.shape, K)
    return shared.scatter(-1, at, shared.gather(-1, at) + _to(extra, like))


def _logaddexp(a, b):
    """log(exp(a) + exp(b)), and a itself where b is -inf: logaddexp of two -inf has no gradient."""
    return torch.where(b == -math.inf, a, torch.logaddexp(a, b.clamp(min=-1e30)))


# ---------------------------------------------------------------- transitions: what the noise does

class Transition(nn.Module):
    """What both kinds share: T, K, the stationary distribution (K,), and tables that stay float64.

    They follow .to(device), but not .half(), and they wait on the CPU for mps, which has no float64.
    """

    def __init__(self, **tables):
        super().__init__()
        self.device = torch.device("cpu")
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.K, self.mask = len(self.stationary), None
        if not ((self.stationary >= 0).all() and (self.stationary.sum() - 1).abs() < 1e-6):
            raise ValueError(f"stationary must be probabilities that sum to 1, got {self.stationary}")

    def _apply(self, fn, recurse=True):
        self.device = fn(torch.empty(0, device=self.device)).device
        for name, table in self._buffers.items():
            self._buffers[name] = table.to("cpu" if self.device.type == "mps" else self.device)
        return self

    def sample_prior(self, shape):
        """x_T drawn from the stationary distribution, int64 of the given shape."""
        pi = self.stationary.to(torch.get_default_dtype()).to(self.device)
        return torch.multinomial(pi, math.prod(shape), replacement=True).reshape(shape)

    def log_columns(self, x, s, t):
        """The log of columns."""
        return self.columns(x, s, t).log()


class MixingTransition(Transition):
    """Q_t = (1 - beta_t) I + beta_t 1 pi^T: stay, or be drawn anew from pi. No table of K x K.

    Such matrices multiply to their like: Q_{s->t} = a I + (1 - a) 1 pi^T, a = alpha_bar[t] / alpha_bar[s],
    alpha_bar_t = prod (1 - beta_i). So each row and column is one shared vector and one other entry.

    betas (T,) in (0, 1], stationary pi (K,). ValueError for others.
    """

    def __init__(self, betas, stationary):
        betas = _betas(betas)
        log_alpha_bar = F.pad(torch.log1p(-betas).cumsum(0), (1, 0))
        super().__init__(log_alpha_bar=log_alpha_bar, stationary=_table(stationary))
        self.T, self.reaches_all = len(betas), bool((self.stationary > 0).all())
        # All of pi on one state makes it a mask: data never holds it, and a place without it is still data.
        self.mask = int(self.stationary.argmax()) if self.stationary.max() == 1 else None

    @property
    def alpha_bar(self):
        """The share of places never redrawn up to t, (T+1,) float64; alpha_bar[0] = 1."""
        return self.log_alpha_bar.exp()

    def mix(self, s, t, ndim=0):
        """a = alpha_bar[t] / alpha_bar[s] and 1 - a, float64, () or (B, 1, ...) with ndim ones.

        s None is t - 1. 0 / 0 is 0, except at s = t: the identity.
        """
        _check_times(self.T, s, t)
        s = t - 1 if s is None else s
        s, t = (time.to(self.log_alpha_bar.device) if isinstance(time, torch.Tensor) else time for time in (s, t))
        log_a = self.log_alpha_bar[t] - self.log_alpha_bar[s]
        lost = log_a.isnan()
        log_a = log_a.masked_fill(lost & (s != t), -math.inf).masked_fill(lost & (s == t), 0.0)
        log_a = log_a.reshape(log_a.shape + (1,) * ndim) if log_a.ndim else log_a
        return log_a.exp(), -torch.expm1(log_a)

    def matrix(self, s, t):
        """Q_{s->t} for ints s <= t, (K, K) float64."""
        a, b = self.mix(s, t)
        return a * torch.eye(self.K, dtype=a.dtype, device=a.device) + b * self.stationary

    def rows(self, x, s, t):
        """q(x_t | x_s = x) for int x (...); x Q_{s->t} for probabilities x (..., K) -> (..., K)."""
        if x.is_floating_point():
            a, b = self.mix(s, t, x.ndim - 1)
            return _to(a, x) * x + _to(b * self.stationary, x) * x.sum(-1, keepdim=True)
        a, b = self.mix(s, t, x.ndim)
        return _spread(b * self.stationary, x, a, self.K)

    def columns(self, x, s, t):
        """q(x_t = x | x_s = k) for every k: the likelihood of each state, x int (...) -> (..., K)."""
        a, b = self.mix(s, t, x.ndim)
        return _spread(b * self.stationary[x.to(b.device)][..., None], x, a, self.K)

    def log_rows(self, x, s, t):
        """The log of rows, for int x (...) or log-probabilities x (..., K); small ones do not underflow."""
        if not x.is_floating_point():
            return self.rows(x, s, t).log()
        a, b = self.mix(s, t, x.ndim - 1)
        return _logaddexp(_to(a.log(), x) + x, _to((b * self.stationary).log(), x))

    def posterior_kl(self, log_guess, x0, xt, s, t):
        """KL of q(x_s|x_t,x_0) from the same with a guess (..., K) for x_0, in nats (...), 0 < s, no pi 0.

        Both are the likelihood of x_t times something: r = q(x_s|x_0), and u, its mean over the guess. In the
        logarithm the likelihood cancels: KL = E_q[log r - log u] + log(Z_u / Z_r), Z the normalisers. And only x_0
        and x_t differ from the other states, so that E_q is a mean under pi and two terms: one pass over K.
        """
        coefficients = *self.mix(0, s, x0.ndim - 1), *self.mix(s, t, x0.ndim - 1)
        (a, b, c, d), pi = (_to(v, log_guess) for v in coefficients), _to(self.stationary, log_guess)
        u = a[..., None] * log_guess.exp() + b[..., None] * pi
        u0, ut = (u.gather(-1, x[..., None])[..., 0] for x in (x0, xt))
        r0, rt = a + b * pi[x0], a * (x0 == xt) + b * pi[xt]
        f0, ft = (r0 / u0).log(), (rt / ut).log()
        mean_f = b.log() + (pi * pi.log()).sum() + pi[x0] * (r0 / (b * pi[x0])).log() - u.log() @ pi
        redrawn, Z = d * pi[xt], d * pi[xt] + c * rt
        return (redrawn * (a * f0 + b * mean_f) + c * rt * ft) / Z + ((redrawn + c * ut) / Z).log()

    def draw(self, x, s, t):
        """A draw of q(x_t | x_s = x), int64 (...), at O(1) a place."""
        _, b = self.mix(s, t, x.ndim - 1)
        return torch.where(torch.rand(x.shape, device=x.device) < _to(b, torch.empty(0, device=x.device)),
                           self.sample_prior(x.shape), x)


class DenseTransition(Transition):
    """Any row-stochastic matrices (T, K, K). Two tables: Q_t and Q_bar_t, and the products of one strided grid.

    stationary None: the mean row of Q_bar_T, which is uniform where the matrices are doubly stochastic.
    ValueError where a row is not probabilities that sum to 1.
    """

    def __init__(self, matrices, stationary=None):
        Q = _table(matrices)
        if Q.ndim != 3 or Q.shape[1] != Q.shape[2] or not len(Q):
            raise ValueError(f"matrices must be (T, K, K), got {tuple(Q.shape)}")
        if not ((Q >= 0).all() and ((Q.sum(-1) - 1).abs() < 1e-6).all()):
            raise ValueError("each row of each matrix must be probabilities that sum to 1")
        eye = torch.eye(Q.shape[1], dtype=Q.dtype)
        Q_bar = torch.cat([eye[None], Q])
        for t in range(2, len(Q_bar)):
            Q_bar[t] = Q_bar[t - 1] @ Q_bar[t]
        pi = Q_bar[-1].mean(0) if stationary is None else _table(stationary)
        super().__init__(Q=torch.cat([eye[None], Q]), Q_bar=Q_bar, stationary=pi)
        self.T, self._products = len(Q), {}

    def matrix(self, s, t):
        """Q_{s->t} = Q_{s+1} ... Q_t for ints s <= t, (K, K) float64."""
        _check_times(self.T, s, t)
        if s == 0 or s == t:
            return self.Q_bar[t - s]
        if s == t - 1:
            return self.Q[t]
        if (s, t, self.device) not in self._products:
            if len(self._products) >= self.T:
                self._products.clear()
            self._products[s, t, self.device] = torch.linalg.multi_dot(list(self.Q[s + 1:t + 1]))
        return self._products[s, t, self.device]

    def _gather(self, x, s, t):
        """Q_{s->t} in x's dtype, (1, K, K) or (B, K, K). s None is t - 1; other tensors of times are read back."""
        if isinstance(t, int) and (s is None or isinstance(s, int)):
            Q = self.matrix(t - 1 if s is None else s, t)[None]
        elif s is None or isinstance(s, int) and s == 0:
            _check_times(self.T, s, t)
            Q = (self.Q if s is None else self.Q_bar)[t.to(self.Q.device)]
        else:
            pairs = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, (s, t))), dim=-1).reshape(-1, 2).tolist()
            Q = torch.stack([self.matrix(s, t) for s, t in pairs])
        return Q.to(x.dtype if x.is_floating_point() else torch.get_default_dtype()).to(x.device)

    def rows(self, x, s, t):
        """q(x_t | x_s = x) for int x (...); x Q_{s->t} for probabilities x (..., K) -> (..., K)."""
        Q = self._gather(x, s, t)
        return (x.reshape(len(Q), -1, self.K) @ Q).reshape(x.shape) if x.is_floating_point() else _pick(Q, x)

    def columns(self, x, s, t):
        """q(x_t = x | x_s = k) for every k: the likelihood of each state, x int (...) -> (..., K)."""
        return _pick(self._gather(x, s, t).mT, x)

    def log_rows(self, x, s, t):
        """The log of rows, for int x (...) or log-probabilities x (..., K).

        What stays in its state is added as logs, so that no state the noise can reach ends at -inf.
        """
        if not x.is_floating_point():
            return self.rows(x, s, t).log()
        Q = self._gather(x, s, t)
        stay = Q.diagonal(dim1=-2, dim2=-1)
        moved = (x.exp().reshape(len(Q), -1, self.K) @ (Q - torch.diag_embed(stay))).reshape(x.shape)
        log_moved = torch.where(moved > 0, torch.where(moved > 0, moved, 1.0).log(), -math.inf)
        return _logaddexp(log_moved, x + stay.log().reshape(-1, *[1] * (x.ndim - 2), self.K))

    def draw(self, x, s, t):
        """A draw of q(x_t | x_s = x), int64 (...)."""
        return categorical(self.log_rows(x, s, t))


def uniform_transition(K, betas):
    """Be drawn anew from all K states alike, [A] appendix A.2.1: doubly stochastic."""
    return MixingTransition(betas, torch.full((K,), 1 / K, dtype=torch.float64))


def absorbing_transition(K, betas, mask=None):
    """Turn into the mask and stay it, [A] appendix A.2.2. K counts the mask, which is state K - 1 if not given."""
    mask = K - 1 if mask is None else mask
    if not 0 <= mask < K:
        raise ValueError(f"the mask must be one of the states 0..{K - 1}, got {mask}")
    return MixingTransition(betas, F.one_hot(torch.tensor(mask), K).double())


def gaussian_transition(K, betas):
    """Move to near states, [A] appendix A.2.3: doubly stochastic, for ordinal data such as grey levels.

        Q_t[i, j] = exp(-4 (i - j)^2 / ((K - 1)^2 beta_t)) / sum_{n = -(K-1)}^{K-1} exp(-4 n^2 / ((K - 1)^2 beta_t))

    for i != j; the diagonal is what is left of 1.
    """
    n = torch.arange(-(K - 1), K, dtype=torch.float64)
    weights = torch.softmax(-4 * n ** 2 / ((K - 1) ** 2 * _betas(betas)[:, None]), dim=1)
    i = torch.arange(K)
    Q = weights[:, i[:, None] - i + K - 1]
    Q.diagonal(dim1=1, dim2=2).zero_()
    Q.diagonal(dim1=1, dim2=2).copy_(1 - Q.sum(-1))
    return DenseTransition(Q)


def neighbour_transition(embeddings, betas, k):
    """Move to states whose embeddings (K, D) are near, [A] appendix A.2.4: doubly stochastic, for words.

    Q_t = exp(beta_t R), the rates R = A - diag(A 1) with A = (G + G^T) / 2k and G[i, j] = 1 where j is one
    of the k nearest neighbours of i. ValueError for fewer than k + 1 embeddings.
    """
    embeddings, betas = _table(embeddings), _betas(betas)
    K = len(embeddings)
    if not 1 <= k < K:
        raise ValueError(f"k = {k} neighbours need at least k + 1 embeddings, got {K}")
    distance = torch.cdist(embeddings, embeddings).fill_diagonal_(math.inf)
    G = torch.zeros(K, K, dtype=torch.float64).scatter_(1, distance.topk(k, largest=False).indices, 1.0)
    A = (G + G.T) / (2 * k)
    Q = torch.matrix_exp(betas[:, None, None] * (A - torch.diag(A.sum(1)))).clamp(min=0)
    return DenseTransition(Q / Q.sum(-1, keepdim=True))


def categorical(log_p):
    """A draw from log-probabilities (..., K) -> int64 (...)."""
    return torch.multinomial(log_p.exp().flatten(0, -2), 1).reshape(log_p.shape[:-1])


def truncated_logistic(mean, log_scale, K):
    """Log-probabilities (..., K) of a logistic cut into K bins and renormalised, [A] appendix A.8.

    State k is the bin around 2k / (K - 1) - 1; mean and log_scale are (...). A bin's mass is sigmoid(high)
    - sigmoid(low) = sigmoid(high) sigmoid(-low) (1 - exp(low - high)), and the last factor is the same for all.
    """
    centre, half = torch.linspace(-1, 1, K, dtype=mean.dtype, device=mean.device), 1 / (K - 1)
    gap, inv_scale = centre - mean[..., None], torch.exp(-log_scale)[..., None]
    return torch.log_softmax(F.logsigmoid((gap + half) * inv_scale) + F.logsigmoid((half - gap) * inv_scale), dim=-1)


# ---------------------------------------------------------------- the diffusion

class D3PM(nn.Module):
    """The chain and its laws over a transition family. It holds no network.

    reverse   how p(x_s|x_t) comes from the network's p(x_0|x_t):
      "joint"        proportional to the sum over x_0 of q(x_s, x_t|x_0) p(x_0|x_t), [A] eq. 4. x_t enters twice, so
                     it is exact for p(x_0|x_t) / q(x_t|x_0), what the other places say of x_0
      "conditional"  the sum over x_0 of q(x_s|x_t,x_0) p(x_0|x_t): exact when p(x_0|x_t) is, so that the bound and
                     the cross-entropy want the same network
    For masks the two are one. Dense families allow only "joint", as q(x_t|x_0) underflows there: ValueError.

    ValueError too for a time outside 1..T or a state outside 0..K-1 (for data: the mask), unless it is in a
    tensor on an accelerator: reading it would stall the device.
    """

    def __init__(self, transition, reverse="joint"):
        super().__init__()
        if reverse not in ("joint", "conditional"):
            raise ValueError(f'reverse must be "joint" or "conditional", got {reverse!r}')
        if reverse == "conditional" and isinstance(transition, DenseTransition):
            raise ValueError('reverse="conditional" divides by q(x_t|x_0), which underflows in a dense family: '
                             'use reverse="joint"')
        self.transition, self.reverse, self.T, self.K = transition, reverse, transition.T, transition.K

    @property
    def device(self):
        """Where the tables are, and where samplers draw."""
        return self.transition.device

    def _states(self, x, data=True):
        """x, after ValueError for what is no state (where it can be read without waiting)."""
        if x.dtype != torch.int64:
            raise ValueError(f"states must be int64, got {x.dtype}")
        if x.device.type == "cpu" and x.numel():
            if x.min() < 0 or x.max() >= self.K:
                raise ValueError(f"states must lie in 0..{self.K - 1}, got {x.min()}..{x.max()}")
            if data and self.transition.mask is not None and (x == self.transition.mask).any():
                raise ValueError(f"data holds state {self.transition.mask}, which is the mask")
        return x

    def _times(self, x, t, s=None):
        """t and s (None: t - 1) as int64 (B,) on x's device."""
        _check_times(self.T, s, t, gap=1)
        if any(isinstance(time, torch.Tensor) and time.shape not in ((), x.shape[:1]) for time in (t, s)):
            raise ValueError(f"a time is an int or int64 (B,) = {tuple(x.shape[:1])}, got t = {t}, s = {s}")
        return [time.to(x.device).expand(len(x)) if isinstance(time, torch.Tensor)
                else torch.full(x.shape[:1], time, device=x.device) for time in (t, t - 1 if s is None else s)]

    # -------- forward process q

    def q_step(self, xs, s, t):
        """A draw of q(x_t | x_s) = Cat(row x_s of Q_{s->t}), [A] eq. 2 for s = t - 1, int64 (B, ...)."""
        return self.transition.draw(self._states(xs, data=False), s, t)

    def q_probs(self, x0, t):
        """q(x_t | x_0) = row x_0 of Q_bar_t, [A] eq. 3, probabilities (B, ..., K)."""
        return self.transition.rows(self._states(x0), 0, t)

    def q_sample(self, x0, t):
        """A draw of q(x_t | x_0), int64 (B, ...)."""
        return self.transition.draw(self._states(x0), 0, t)

    def q_posterior(self, x0, xt, t, s=None):
        """Log-probabilities of q(x_s | x_t, x_0), [A] eq. 3, (B, ..., K).

        Bayes' rule with x_0 in the condition: q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0). x0 is int (B, ...), or
        log-probabilities (B, ..., K) to average q(x_s | x_0) over. -inf everywhere for an impossible pair.
        """
        _check_times(self.T, s, t, gap=1)
        x0 = x0 if x0.is_floating_point() else self._states(x0)
        log_p = (self.transition.log_columns(self._states(xt, data=False), s, t)
                 + self.transition.log_rows(x0, 0, t - 1 if s is None else s))
        total = log_p.logsumexp(-1, keepdim=True)
        return log_p - total.masked_fill(total == -math.inf, 0.0)

    # -------- reverse process p

    def _predict(self, model, xt, t):
        """Log-probabilities of p(x_0 | x_t), (B, ..., K), from one call of the network.

        With masks, x_t itself tells much: no x_0 is the mask, and a place that is not masked is x_0.
        """
        logits = model(self._states(xt, data=False), self._times(xt, t)[0])
        if logits.shape != (*xt.shape, self.K):
            raise ValueError(f"the network must return logits {(*xt.shape, self.K)}, got {tuple(logits.shape)}")
        logits, mask = logits.to(torch.promote_types(logits.dtype, torch.float32)), self.transition.mask
        if mask is None:
            return logits.log_softmax(-1)
        states = torch.arange(self.K, device=xt.device)
        masked, known = (xt == mask)[..., None], xt[..., None] == states
        return logits.masked_fill(torch.where(masked, states == mask, ~known), -math.inf).log_softmax(-1)

    def _guess(self, log_p0, xt, t):
        """What the reverse step averages q(x_s | x_t, x_0) over, log-probabilities of x_0."""
        if self.reverse == "joint":
            return log_p0
        likelihood = self.transition.log_columns(xt, 0, t)
        return (log_p0 - likelihood.masked_fill(likelihood == -math.inf, 0.0)).log_softmax(-1)

    def _reverse(self, log_p0, xt, t, s):
        """Log-probabilities of p(x_s | x_t) from those of p(x_0 | x_t)."""
        settled = self._times(xt, t, s)[1].reshape(-1, *[1] * (xt.ndim - 1)) == 0
        if self.transition.mask is not None:
            # A place without a mask stays as it is, even a known one, at times when q would have masked it.
            settled = settled | (xt != self.transition.mask)
        return torch.where(settled[..., None], log_p0, self.q_posterior(self._guess(log_p0, xt, t), xt, t, s))

    def p_reverse(self, model, xt, t, s=None):
        """Log-probabilities of p(x_s | x_t), [A] eq. 4, (B, ..., K); at s = 0 p(x_0 | x_t) itself."""
        return self._reverse(self._predict(model, xt, t), xt, t, s)

    # -------- losses and the bound

    def prior_kl(self, x0):
        """L_T = KL(q(x_T | x_0) || stationary), [A] eq. 1, bits per dimension (B,).

        Infinite for masks that do not cover everything at T.
        """
        log_q = self.transition.log_rows(self._states(x0), 0, self.T)
        return _bits(_kl(log_q, _to(self.transition.stationary.log(), log_q)))

    def vlb_term(self, model, x0, xt, t, s=None):
        """One term of the bound, KL(q(x_s | x_t, x_0) || p(x_s | x_t)), [A] eq. 1, bits per dimension (B,).

        At s = 0, where q is the point x_0, that is L_0 = -log p(x_0 | x_t).
        """
        return self._vlb_term(self._predict(model, xt, t), x0, xt, t, s)

    def _vlb_term(self, log_p0, x0, xt, t, s=None):
        if isinstance(self.transition, MixingTransition) and self.transition.reaches_all:
            t, s = self._times(xt, t, s)
            kl = self.transition.posterior_kl(self._guess(log_p0, xt, t), self._states(x0), xt, s.clamp(min=1), t)
            return torch.where(s == 0, self._cross_entropy(log_p0, x0), _bits(kl))
        if self.transition.mask is None:
            return _bits(_kl(self.q_posterior(x0, xt, t, s), self._reverse(log_p0, xt, t, s)))
        # For masks the KL is a cross-entropy: a masked place shows its x_0 at s with probability
        # (alpha_bar[s] - alpha_bar[t]) / (1 - alpha_bar[t]), whatever x_0 is; one without a mask costs nothing.
        t, s = self._times(xt, t, s)
        shown = self.transition.mix(0, s)[0] * self.transition.mix(s, t)[1] / self.transition.mix(0, t)[1]
        return _to(shown, log_p0) * self._cross_entropy(log_p0, x0)

    def _cross_entropy(self, log_p0, x0):
        """-log p(x_0 | x_t), bits per dimension (B,)."""
        return _bits(-log_p0.gather(-1, self._states(x0)[..., None])[..., 0])

    def _noised(self, x0, t, xt):
        """t uniform on 1..T and xt from q(x_t | x_0) where not given."""
        t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device) if t is None else t
        return t, self.q_sample(x0, t) if xt is None else xt

    def loss_simple(self, model, x0, t=None, xt=None):
        """Cross-entropy of x_0, bits per dimension (B,)."""
        t, xt = self._noised(x0, t, xt)
        return self._cross_entropy(self._predict(model, xt, t), x0)

    def loss_vlb(self, model, x0, t=None, xt=None):
        """T L_t, a one-sample estimate of L_0 + sum L_t; bits per dimension (B,)."""
        t, xt = self._noised(x0, t, xt)
        return self.T * self.vlb_term(model, x0, xt, t)

    def loss_hybrid(self, model, x0, t=None, xt=None, ce_weight=1e-3):
        """L_t + ce_weight times the cross-entropy of x_0, bits per dimension (B,): [A]'s code.

        In its eq. 5 L_vb is the whole sum, T times the mean of this L_t.
        """
        t, xt = self._noised(x0, t, xt)
        log_p0 = self._predict(model, xt, t)
        return self._vlb_term(log_p0, x0, xt, t) + ce_weight * self._cross_entropy(log_p0, x0)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, steps=None):
        """The whole bound on -log2 p(x0) / D, with one draw of x_t for each term; no gradient.

        -> dict in bits per dimension: total (B,) = prior (B,) + terms.sum(1); terms (B, n) in the order
        S_1..S_n, so that terms[:, 0] is L_0; and x0_error (B, n), the share of places guessed wrong.
        """
        terms, errors, grid = [], [], [0, *self.timesteps(steps)]
        for s, t in zip(grid, grid[1:]):
            xt = self.q_sample(x0, t)
            log_p0 = self._predict(model, xt, t)
            terms.append(self._vlb_term(log_p0, x0, xt, t, s))
            errors.append((log_p0.argmax(-1) != x0).to(log_p0.dtype).reshape(len(x0), -1).mean(1))
        prior, terms = self.prior_kl(x0), torch.stack(terms, dim=1)
        return dict(total=prior + terms.sum(1), prior=prior, terms=terms, x0_error=torch.stack(errors, dim=1))

    # -------- samplers

    def timesteps(self, steps=None):
        """The grid S_1 < ... < S_n = T, a list of ints.

        steps is None (all of 1..T), a number n (n evenly spaced times, both ends kept), or an
        increasing list that ends at T. ValueError for anything else.
        """
        T, n = self.T, self.T if steps is None else steps
        if isinstance(n, int):
            n = min(n, T)
            grid = [1 + (2 * i * (T - 1) + n - 1) // (2 * (n - 1)) for i in range(n)] if n > 1 else [T] * n
        else:
            grid = [int(t) for t in n]
        if not grid or grid[0] < 1 or grid[-1] != T or any(s >= t for s, t in zip(grid, grid[1:])):
            raise ValueError(f"steps must be a number >= 1 or times that increase to T = {T}, got {steps}")
        return grid

    @torch.no_grad()
    def p_sample(self, model, xt, t, s=None):
        """One reverse step -> a draw of x_s, int64 (B, ...), and log p(x_0 | x_t), (B, ..., K). Drawn at s = 0 too."""
        log_p0 = self._predict(model, xt, t)
        return categorical(self._reverse(log_p0, xt, t, s)), log_p0

    def _hold(self, xs, known, s):
        """xs with the known places (known >= 0) put in: as they are among masks, else noised to time s."""
        if known is None:
            return xs
        if known.device.type == "cpu":
            self._states(known[known >= 0])
        known = known.to(xs.device).expand(xs.shape)
        data = known.clamp(min=0)
        return torch.where(known >= 0, data if self.transition.mask is not None else self.q_sample(data, s), xs)

    @torch.no_grad()
    def sample_progressive(self, model, shape, steps=None, known=None):
        """Yields (s, xs, log p(x_0|x_t)) after every step, from noise at T down to a sample at s = 0.

        known, int64 and -1 where free, holds places fixed: infilling for text, inpainting for images.
        """
        grid = [0, *self.timesteps(steps)]
        xs = self._hold(self.transition.sample_prior(shape), known, self.T)
        for s, t in zip(grid[-2::-1], grid[::-1]):
            xs, log_p0 = self.p_sample(model, xs, t, s)
            xs = self._hold(xs, known, s)
            yield s, xs, log_p0

    def sample(self, model, shape, steps=None, known=None):
        """New data x0, int64 of the given shape (B, ...), with the known places as they are."""
        for _, x0, _ in self.sample_progressive(model, shape, steps, known):
            pass
        return x0

    @torch.no_grad()
    def sample_any_order(self, model, shape, order=None, known=None):
        """One place a step, each drawn given all before it: an autoregressive model in any order [U].

        order is a permutation of the D places of an example, (D,) or (B, D), random when left out. With
        T = D the network sees as many masks as time tells it. ValueError unless the family is absorbing.
        """
        mask = self.transition.mask
        if mask is None:
            raise ValueError("any-order sampling needs absorbing_transition: other noise has no masks to fill")
        xs = self._hold(torch.full(shape, mask, device=self.device), known, self.T)
        flat = xs.reshape(len(xs), -1)
        D = flat.shape[1]
        if order is not None and order.device.type == "cpu" and not (order.sort().values == torch.arange(D)).all():
            raise ValueError(f"order must hold each place 0..{D - 1} once, got {order.tolist()}")
        order = torch.rand(flat.shape, device=self.device).argsort(1) if order is None else order.expand(flat.shape)
        for place in order.to(self.device).split(1, dim=1):
            masked = flat == mask
            t = (masked.sum(1) * self.T / D).ceil().long().clamp(1, self.T)
            log_p0 = self._predict(model, flat.reshape(shape), t).reshape(len(xs), D, self.K)
            drawn = categorical(log_p0.gather(1, place[..., None].expand(-1, -1, self.K)))
            flat = flat.scatter(1, place, drawn)
        return flat.reshape(shape)


def _kl(log_q, log_p):
    """Sum over the states of q log(q / p), (..., K) -> (...) nats, where 0 log 0 is 0."""
    return torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0.0).sum(-1)


def _bits(nats):
    """(B, ...) nats -> (B,) bits per dimension."""
    return nats.reshape(len(nats), -1).mean(1) / math.log(2)


# ---------------------------------------------------------------- the network

def timestep_embedding(t, dim, max_period=10000):
    """Sines and cosines of t at dim / 2 frequencies, Vaswani et al. 2017 section 3.5: (B,) -> (B, dim)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero(module):
    """The module with its parameters set to 0: a block starts as the identity, the network as 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def rotate(x):
    """x (..., N, dim) with pairs of features turned by angles that grow with the place, Su et al. 2021, 2104.09864.

    The product of a query and a key then depends on how far apart their places are.
    """
    N, half = x.shape[-2], x.shape[-1] // 2
    angles = timestep_embedding(torch.arange(N, device=x.device), 2 * half, max_period=1000).to(x.dtype)
    cos, sin = angles.chunk(2, dim=-1)
    a, b = x[..., :half], x[..., half:2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half:]], dim=-1)


class Block(nn.Module):
    """On (B, N, width): a look at the nearest places, self-attention, and a two-layer network.

    Time scales, shifts and gates the last two [P]. The look is a convolution in each channel: what stands next to a
    place tells most about it, and attention alone finds that out late.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.near = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.time = zero(nn.Linear(width, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, emb):
        B, N, C = x.shape
        x = x + self.near(x.mT).mT
        scale1, shift1, gate1, scale2, shift2, gate2 = self.time(emb)[:, None].chunk(6, dim=-1)
        h = self.norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).reshape(B, N, C)
        x = x + gate1 * self.dropout(self.out(h))
        h = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(h))


class Transformer(nn.Module):
    """What diffusion leaves free, the architecture: model(xt, t) -> logits (B, ..., K) of x_0.

    shape     of one example: (L,) tokens, each a place, or (C, H, W), where patch x patch pixels are a place
    width, depth, heads   of the bidirectional blocks

    ValueError where a size does not divide. Its first output is 0: all states alike.
    """

    def __init__(self, K, shape, width=256, depth=6, heads=4, patch=4, dropout=0.0):
        super().__init__()
        if width % heads or len(shape) == 3 and (shape[1] % patch or shape[2] % patch):
            raise ValueError(f"heads={heads} must divide width={width}, and patch={patch} H and W of {tuple(shape)}")
        if len(shape) not in (1, 3):
            raise ValueError(f"shape must be (L,) or (C, H, W), got {tuple(shape)}")
        self.K, self.shape, self.width = K, tuple(shape), width
        self.patch = patch if len(shape) == 3 else 1
        cells = shape[0] * patch ** 2 if len(shape) == 3 else 1
        places = math.prod(shape) // cells
        self.embed = nn.Embedding(K, width if cells == 1 else 16)
        self.enter = nn.Linear(cells * self.embed.embedding_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(places, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), zero(nn.Linear(width, cells * K))

    def forward(self, x, t):
        if x.shape[1:] != self.shape:
            raise ValueError(f"this Transformer takes (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        B, p = len(x), self.patch
        emb = self.time(timestep_embedding(t, self.width).to(self.position.dtype))
        if len(self.shape) == 3:
            C, H, W = self.shape
            x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        h = self.enter(self.embed(x).reshape(B, len(self.position), -1)) + self.position
        for block in self.blocks:
            h = block(h, emb)
        logits = self.out(self.norm(h))                                    # (B, places, cells K)
        if len(self.shape) == 3:
            logits = logits.reshape(B, H // p, W // p, C, p, p, self.K).permute(0, 3, 1, 4, 2, 5, 6)
        return logits.reshape(B, *self.shape, self.K)


# ---------------------------------------------------------------- a toy on two letters

def main():
    """Words of two letters, learnt in seconds: prints each word's learnt probability beside the true one."""
    torch.manual_seed(0)
    K, T, n, steps = 4, 20, 20000, 800
    true = torch.tensor([[8, 1, 0, 1], [0, 6, 2, 0], [1, 0, 9, 0], [3, 0, 0, 5]]) / 36
    model = Transformer(K, (2,), width=32, depth=1, heads=1)
    diffusion = D3PM(uniform_transition(K, cosine_betas(T)), reverse="conditional")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def data(n):
        word = torch.multinomial(true.flatten(), n, replacement=True)
        return torch.stack([word // K, word % K], dim=1)

    for step in range(1, steps + 1):
        loss = diffusion.loss_vlb(model, data(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  bound {loss.item():.3f} bits/letter")

    x0 = diffusion.sample(model, (n, 2))
    learnt = torch.bincount(x0[:, 0] * K + x0[:, 1], minlength=K * K).reshape(K, K) / n
    print("\nlearnt / true, in percent")
    for i in range(K):
        print("   ".join(f"{'abcd'[i]}{'abcd'[j]} {100 * learnt[i, j]:5.1f} / {100 * true[i, j]:4.1f}" for j in range(K)))
    entropy = torch.distributions.Categorical(true.flatten()).entropy() / math.log(2) / 2
    bound = diffusion.bits_per_dim(model, data(n))["total"].mean()
    print(f"\nbound {bound:.3f} bits/letter, entropy {entropy:.3f}: the gap is what T = {T} factorised steps lose")


if __name__ == "__main__":
    main()
