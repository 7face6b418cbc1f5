"""Denoising diffusion on categories, in one file that needs only torch.

    q(x_t | x_s) = Cat(x_s Q_{s->t})            rows of Q_{s->t} = Q_{s+1} ... Q_t sum to 1       data -> noise
    p(x_s | x_t) ∝ sum over x_0 of q(x_s, x_t | x_0) p~(x_0),  0 <= s < t                       noise -> data
    -log p(x_0) <= KL(q(x_T|x_0) || p(x_T)) + sum_{t>1} KL(q(x_s|x_t,x_0) || p(x_s|x_t)) - log p(x_0|x_1)
                   ------- L_T ----------   ------------------ L_t -------------------   ---- L_0 -----

The network gives p~(x_0): what the other places tell of x_0. Each place has its own noise, so they tell nothing of
how x_t came about. Bayes' rule adds what x_t itself tells, q(x_t | x_0): at s = 0 p(x_0 | x_t) ∝ q(x_t | x_0) p~(x_0).
L_t is the term of the step down from t, which the papers call L_{t-1}; that of t = 1 is L_0.

[A] Austin et al. 2021, arXiv 2107.03006       [Ho] Hoogeboom et al. 2021, 2102.05379
[U] Uria et al. 2014, 1310.1757 (any order)    [C] Chen et al. 2023, 2310.00426 (adaLN-single)
[G] Ho & Salimans 2022, 2207.12598 (guidance)  [S] So et al. 2021, 2109.08668 (squared ReLU)

x0, xt        data and its noised version, int64 (B, ...) in 0..K-1
t, s          times, an int or int64 (B,), 0 <= s < t <= T; 0 is clean and T is noise
Q_{s->t}      (K, K); row i is q(x_t = . | x_s = i). Q_t is Q_{t-1->t}, Q_bar_t is Q_{0->t}
model         any callable model(xt, t) -> logits (..., K) of p~(x_0)

Every law is written for a step s -> t of any length, s = t - 1 when left out: a strided chain is the same code on
fewer times. Probabilities are exact: zero is zero, and its log is -inf. Logs are natural; bounds and losses leave in
bits per dimension, (B,).
"""
import math
import operator

import torch
from torch import nn
from torch.nn import functional as F


# ---------------------------------------------------------------- schedules: arrays of betas

def cosine_betas(T):
    """alpha_bar_t ∝ cos((t/T + 0.008) / 1.008 pi/2), [Ho], betas at most 0.999 -> (T,) float64; for uniform noise."""
    alpha_bar = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def linear_betas(T, start=None, stop=None):
    """Evenly spaced from 0.1 / T to 20 / T, at most 1 ([A]'s 1e-4..0.02 at T = 1000) -> (T,) float64; for discretised
    Gaussian noise. start and stop, if given, are taken as they are."""
    ends = 0.1 / T if start is None else start, 20 / T if stop is None else stop
    return torch.linspace(*ends, T, dtype=torch.float64).clamp(max=1 if stop is None else math.inf)


def mutual_information_betas(T):
    """beta_t = 1 / (T - t + 1), [A] section 3.2 -> (T,) float64; for masks: a share t / T is masked at t."""
    return 1 / torch.arange(T, 0, -1, dtype=torch.float64)


# ---------------------------------------------------------------- tables and logs

def _table(values):
    """float64 on the CPU in one move: mps has no float64."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _like(table, x):
    """A float64 table in x's dtype (the default one for int x), then on x's device: no float64 may reach mps."""
    return table.to(x.dtype if x.is_floating_point() else torch.get_default_dtype()).to(x.device)


def _betas(betas):
    """As a table, or ValueError."""
    betas = _table(betas)
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas must be a list of numbers in (0, 1], got {betas}")
    return betas


def _readable(x):
    """False for a tensor on an accelerator: it is not checked, to avoid waiting for the device."""
    return not isinstance(x, torch.Tensor) or x.device.type == "cpu"


def _logaddexp(a, b):
    """log(exp(a) + exp(b)), and a itself where b is -inf: logaddexp of two -inf has no gradient."""
    return torch.where(b == -math.inf, a, torch.logaddexp(a, b.clamp(min=-1e30)))


def _one_hot(x, K):
    """States (...) -> (..., K), True at x."""
    return x[..., None] == torch.arange(K, device=x.device)


def _kl(log_q, log_p):
    """Sum over the states of q log(q / p), (..., K) -> (...), where 0 log 0 is 0."""
    return (log_q.exp() * (log_q - log_p).masked_fill(log_q == -math.inf, 0.0)).sum(-1)


def _per_example(x):
    """(B, ...) -> (B,): the mean over all but the batch, which may be empty."""
    return x.reshape(len(x), math.prod(x.shape[1:])).mean(1)


def categorical(p):
    """A draw from weights (..., K) -> int64 (...), by running sums: on a CPU ten times as fast as torch.multinomial."""
    below = p.cumsum(-1)
    share = torch.rand(p.shape[:-1], dtype=p.dtype, device=p.device)[..., None] * below[..., -1:]
    return (below <= share).sum(-1)


# ---------------------------------------------------------------- transitions: what the noise does

class Transition(nn.Module):
    """One kind of noise: its laws for int states x (...), from float64 tables.

    T, K, stationary (K,), mask (None without one)
    matrix(s, t)              Q_{s->t} for ints s <= t, (K, K) float64
    rows(x, s, t)             q(x_t | x_s = x), (..., K); for probabilities x (..., K): x Q_{s->t}
    columns(x, s, t)          q(x_t = x | x_s = k) for every k, (..., K): the likelihood of each state
    log_rows, log_columns     their logs; log_rows takes log-probabilities x (..., K)
    draw(x, s, t)             a draw of q(x_t | x_s = x), int64 (...)"""

    def __init__(self, T, **tables):
        super().__init__()
        self.device = torch.device("cpu")
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.T, self.K, self.mask = T, len(self.stationary), None
        if not ((self.stationary >= 0).all() and (self.stationary.sum() - 1).abs() < 1e-6):
            raise ValueError(f"stationary must be probabilities that sum to 1, got {self.stationary}")

    def _apply(self, fn, recurse=True):
        """Follow .to(device), but stay float64 under .half(); for mps, which has no float64, stay on the CPU."""
        self.device = fn(torch.empty(0, device=self.device)).device
        for name, table in self._buffers.items():
            self._buffers[name] = table.to("cpu" if self.device.type == "mps" else self.device)
        return self

    def times(self, s, t, gap=0):
        """s (None: t - 1) and t, each an int or int64 () or (B,), the tensors on the device of the tables.
        ValueError unless 0 <= s <= t - gap and t <= T."""
        try:
            s = t - 1 if s is None else s
            s, t = (time if isinstance(time, torch.Tensor) else operator.index(time) for time in (s, t))
            if any(isinstance(time, torch.Tensor) and (time.dtype != torch.int64 or time.ndim > 1) for time in (s, t)):
                raise TypeError
        except TypeError:
            raise ValueError(f"a time is an int or int64 (B,), got t = {t}, s = {s}") from None
        low, high = s if _readable(s) else 0, t if _readable(t) else self.T
        if not torch.as_tensor((0 <= low) & (low <= high - gap) & (high <= self.T), device="cpu").all():
            raise ValueError(f"need {gap} <= t <= T = {self.T} and 0 <= s < t, got t = {t}, s = {s}")
        return [time.to(self.stationary.device) if isinstance(time, torch.Tensor) else time for time in (s, t)]

    def sample_prior(self, shape):
        """x_T drawn from the stationary distribution, int64 of the given shape."""
        pi, n = _like(self.stationary, torch.empty(0, device=self.device)), math.prod(shape)
        return torch.multinomial(pi, max(n, 1), replacement=True)[:n].reshape(shape)

    def draw(self, x, s, t):
        return categorical(self.rows(x, s, t))

    def posterior_kl(self, x0, log_guess, xt, s, t):
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats (...), p being q with a guess (..., K) for x_0. At s = 0, where
        q is the point x_0, it is the cross-entropy -log p(x_0 | x_t), by Bayes' rule."""
        earlier, t = self.times(s, t, gap=1)
        log_columns = self.log_columns(xt, s, t)
        log_p = (log_columns + self.log_rows(log_guess, 0, earlier)).log_softmax(-1)
        log_q = (log_columns + self.log_rows(x0, 0, earlier)).log_softmax(-1)
        return _kl(log_q, log_p)


class MixingTransition(Transition):
    """Q_t = (1 - beta_t) I + beta_t 1 pi^T: stay, or be drawn anew from pi. No table of K x K.
    Such matrices multiply to their like: Q_{s->t} = a I + b 1 pi^T, a = alpha_bar[t] / alpha_bar[s], b = 1 - a,
    alpha_bar_t = prod_{i <= t} (1 - beta_i). ValueError for betas outside (0, 1]."""

    def __init__(self, betas, stationary):
        betas = _betas(betas)
        log_alpha_bar = F.pad(torch.log1p(-betas).cumsum(0), (1, 0))
        # A finite log of 0, which falls with each step: what is lost stays lost (a = 0), and Q_{t->t} = I (a = 1).
        log_alpha_bar = torch.maximum(log_alpha_bar, -1e5 * torch.arange(len(log_alpha_bar)))
        super().__init__(len(betas), log_alpha_bar=log_alpha_bar, stationary=_table(stationary))
        # All of pi on one state makes it a mask: data never holds it, and a place without it is still data.
        self.mask = int(self.stationary.argmax()) if self.stationary.max() == 1 else None
        self.reaches_all = bool((self.stationary > 1e-30).all())                # so that 1 / pi is finite in float32

    def mix(self, s, t, x):
        """a, b and pi of Q_{s->t} in the dtype of x (B, ...), a and b shaped to be multiplied with it."""
        s, t = self.times(s, t)
        log_a = self.log_alpha_bar[t] - self.log_alpha_bar[s]
        log_a = log_a[(..., *[None] * (x.ndim - 1))]
        return [_like(v, x) for v in (log_a.exp(), -torch.expm1(log_a), self.stationary)]

    def matrix(self, s, t):
        return self.rows(torch.eye(self.K, dtype=torch.float64, device=self.stationary.device), s, t)

    def rows(self, x, s, t):
        p = x if x.is_floating_point() else _one_hot(x, self.K)
        a, b, pi = self.mix(s, t, p)
        return a * p + b * pi * p.sum(-1, keepdim=True)

    def log_rows(self, x, s, t):
        if not x.is_floating_point():
            return self.rows(x, s, t).log()
        a, b, pi = self.mix(s, t, x)
        return _logaddexp(a.log() + x, (b * pi).log())

    def columns(self, x, s, t):
        same = _one_hot(x, self.K)
        a, b, pi = self.mix(s, t, same)
        redrawn = b * pi[x][..., None]
        return torch.where(same, a + redrawn, redrawn)

    def log_columns(self, x, s, t):
        return self.columns(x, s, t).log()

    def posterior_kl(self, x0, log_guess, xt, s, t):
        """The same KL in one pass over K, for pi without zeros.
        Let pi R be q(x_s | x_0), and pi U its mean over the guess. With q(x_t | x_s) = d pi[x_t] + c [x_s = x_t],
            q(x_s | x_t, x_0) = R (d pi + c [x_s = x_t]) / Z_R,    Z_R = d + c R[x_t],    p likewise with U for R
            KL = (d E(log R - log U) + c R[x_t] (log R[x_t] - log U[x_t])) / Z_R + log Z_U - log Z_R
        where E, the mean under pi R, needs one sum over K, that of pi log U: R is b but for x_0."""
        s, t = self.times(s, t, gap=1)
        guess0, guess_t = (log_guess.gather(-1, x[..., None])[..., 0] for x in (x0, xt))
        (a, b, pi), (c, d, _) = self.mix(0, s, guess0), self.mix(s, t, guess0)
        if self.mask is not None:
            # A cross-entropy: a place masked at t shows x_0 at s with probability
            # (alpha_bar[s] - alpha_bar[t]) / (1 - alpha_bar[t]), and a place that is not masked costs nothing.
            shown = a * d / self.mix(0, t, guess0)[1]
            return torch.where(xt == self.mask, -shown * guess0, 0.0)
        if not self.reaches_all:
            return super().posterior_kl(x0, log_guess, xt, s, t)
        R0, Rt = b + a / pi[x0], b + a * (x0 == xt) / pi[xt]
        log_U0, log_Ut = (_logaddexp(a.log() + guess - pi[x].log(), b.log())
                          for guess, x in ((guess0, x0), (guess_t, xt)))
        mean_log_R = (a + b * pi[x0]) * R0.log() + (1 - pi[x0]) * torch.xlogy(b, b)
        mean_log_U = a * log_U0
        if not (isinstance(s, int) and s == 0):
            # Where an example has s = 0 all the same, U may underflow, but b = 0.
            U = a[..., None] / pi * log_guess.exp() + (b[..., None] + torch.finfo(pi.dtype).tiny)
            mean_log_U = mean_log_U + b * (U.log() @ pi)
        at_xt = torch.xlogy(Rt, Rt) - Rt * log_Ut
        Z_R, log_Z_U = d + c * Rt, torch.logaddexp(d.log(), c.log() + log_Ut)
        return (d * (mean_log_R - mean_log_U) + c * at_xt) / Z_R + log_Z_U - Z_R.log()

    def draw(self, x, s, t):
        _, b, _ = self.mix(s, t, x)
        return torch.where(torch.rand(x.shape, device=x.device) < b, self.sample_prior(x.shape), x)


class DenseTransition(Transition):
    """Any row-stochastic matrices (T, K, K). Two tables: Q_t and Q_bar_t, and the products of one strided grid.
    stationary None: the mean row of Q_bar_T. ValueError where a row is not probabilities that sum to 1."""

    def __init__(self, matrices, stationary=None):
        Q = _table(matrices)
        if Q.ndim != 3 or Q.shape[1] != Q.shape[2] or not len(Q):
            raise ValueError(f"matrices must be (T, K, K), got {tuple(Q.shape)}")
        if not ((Q >= 0).all() and ((Q.sum(-1) - 1).abs() < 1e-6).all()):
            raise ValueError("each row of each matrix must be probabilities that sum to 1")
        Q = torch.cat([torch.eye(Q.shape[1], dtype=Q.dtype)[None], Q])
        Q_bar = Q.clone()
        for t in range(2, len(Q)):
            Q_bar[t] = Q_bar[t - 1] @ Q[t]
        pi = Q_bar[-1].mean(0) if stationary is None else _table(stationary)
        super().__init__(len(Q) - 1, Q=Q, Q_bar=Q_bar, stationary=pi)
        self._products = {}

    def matrix(self, s, t):
        s, t = self.times(s, t)
        if s == 0 or s == t:
            return self.Q_bar[t - s]
        if s == t - 1:
            return self.Q[t]
        key = s, t, self.device
        if key not in self._products:
            if len(self._products) >= self.T:
                self._products.clear()
            self._products[key] = torch.linalg.multi_dot(list(self.Q[s + 1:t + 1]))
        return self._products[key]

    def _matrices(self, s, t):
        """Q_{s->t} for each example, float64 (B, K, K), or (1, K, K) for ints.
        One look-up where s is None (t - 1) or 0; other times are read back, which waits for an accelerator."""
        earlier, t = self.times(s, t)
        if s is None or isinstance(earlier, int) and earlier == 0:
            return (self.Q if s is None else self.Q_bar)[t].reshape(-1, self.K, self.K)
        times = (torch.as_tensor(time, device="cpu").reshape(-1) for time in (earlier, t))
        pairs = zip(*(time.tolist() for time in torch.broadcast_tensors(*times)))
        return torch.stack([self.matrix(s, t) for s, t in pairs])

    def _pick(self, Q, x):
        """Row x of Q (B, K, K) or (1, K, K) -> (B, ..., K)."""
        example = torch.arange(len(Q), device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return _like(Q, x)[example, x].reshape(*x.shape, self.K)

    def rows(self, x, s, t):
        Q = self._matrices(s, t)
        return torch.einsum("b...i,bij->b...j", x, _like(Q, x)) if x.is_floating_point() else self._pick(Q, x)

    def log_rows(self, x, s, t):
        """Finite wherever the noise reaches, however small the log-probabilities x: where the sum underflows, the
        diagonal's term alone is kept, as a log, with 1e-30 for an entry of 0."""
        Q = self._matrices(s, t)
        if not x.is_floating_point():
            return self._pick(Q.log(), x)
        if isinstance(t, int) and t == 0:
            return x
        total, tiny = torch.einsum("b...i,bij->b...j", x.exp(), _like(Q, x)), torch.finfo(x.dtype).tiny
        stay = Q.diagonal(dim1=1, dim2=2).clamp(min=1e-30) * (Q.sum(1) > 0)
        log_stay = _like(stay.log(), x).reshape(-1, *[1] * (x.ndim - 2), self.K)
        return torch.where(total > tiny, total.clamp(min=tiny).log(), x + log_stay)

    def columns(self, x, s, t):
        return self._pick(self._matrices(s, t).mT, x)

    def log_columns(self, x, s, t):
        """Taken in float64, where far states have not yet underflowed."""
        return self._pick(self._matrices(s, t).log().mT, x)


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
    Q_t[i, j] = w(i - j) where i != j, with w(n) ∝ exp(-4 n^2 / ((K - 1)^2 beta_t)) and sum 1 over n = -(K-1)..K-1."""
    n = torch.arange(-(K - 1), K, dtype=torch.float64)
    weights = torch.softmax(-4 * n ** 2 / ((K - 1) ** 2 * _betas(betas)[:, None]), dim=1)
    Q = weights[:, torch.arange(K)[:, None] - torch.arange(K) + K - 1]
    Q.diagonal(dim1=1, dim2=2).add_(1 - Q.sum(-1))
    return DenseTransition(Q)


def neighbour_transition(embeddings, betas, k):
    """Move to states whose embeddings (K, D) are near, [A] appendix A.2.4: doubly stochastic, for words.
    Q_t = exp(beta_t R), rates R = A - diag(A 1), A = (G + G^T) / 2k, G[i, j] = 1 for i's k nearest neighbours j."""
    embeddings, betas, K = _table(embeddings), _betas(betas), len(embeddings)
    if not 1 <= k < K:
        raise ValueError(f"k = {k} neighbours need at least k + 1 embeddings, got {K}")
    distance = torch.cdist(embeddings, embeddings).fill_diagonal_(math.inf)
    G = torch.zeros(K, K, dtype=torch.float64).scatter_(1, distance.topk(k, largest=False).indices, 1.0)
    A = (G + G.T) / (2 * k)
    Q = torch.matrix_exp(betas[:, None, None] * (A - torch.diag(A.sum(1)))).clamp(min=0)
    return DenseTransition(Q / Q.sum(-1, keepdim=True))


def truncated_logistic(mean, log_scale, K):
    """Log-probabilities (..., K) of a logistic cut into K bins and renormalised, [A] appendix A.8.
    State k is the bin around 2k / (K - 1) - 1; mean and log_scale are (...). A bin's mass is sigmoid(high)
    - sigmoid(low) = sigmoid(high) sigmoid(-low) (1 - exp(low - high)), and the last factor is the same for all."""
    centre, half = torch.linspace(-1, 1, K, dtype=mean.dtype, device=mean.device), 1 / (K - 1)
    gap, inv_scale = centre - mean[..., None], torch.exp(-log_scale)[..., None]
    return torch.log_softmax(F.logsigmoid((gap + half) * inv_scale) + F.logsigmoid((half - gap) * inv_scale), dim=-1)


# ---------------------------------------------------------------- the diffusion

class D3PM(nn.Module):
    """The chain and its laws over a transition family. It holds no network.
    ValueError for a time outside 1..T or a state outside 0..K-1 (for data: the mask), but not on an accelerator."""

    def __init__(self, transition):
        super().__init__()
        self.transition, self.T, self.K = transition, transition.T, transition.K

    @property
    def device(self):
        """Where the tables are, and where samplers draw."""
        return self.transition.device

    def _states(self, x, data=True):
        """x, or ValueError if it holds what is no state."""
        if x.dtype != torch.int64:
            raise ValueError(f"states must be int64, got {x.dtype}")
        if _readable(x) and x.numel():
            if x.min() < 0 or x.max() >= self.K:
                raise ValueError(f"states must lie in 0..{self.K - 1}, got {x.min()}..{x.max()}")
            if data and self.transition.mask is not None and (x == self.transition.mask).any():
                raise ValueError(f"data holds state {self.transition.mask}, which is the mask")
        return x

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
        """Log-probabilities of q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0), [A] eq. 3, (B, ..., K).
        x0 is int (B, ...), or log-probabilities (B, ..., K) to average over. -inf for an impossible pair."""
        earlier, _ = self.transition.times(s, t, gap=1)
        x0 = x0 if x0.is_floating_point() else self._states(x0)
        log_columns = self.transition.log_columns(self._states(xt, data=False), s, t)
        log_p = log_columns + self.transition.log_rows(x0, 0, earlier)
        return log_p.log_softmax(-1).masked_fill(log_p == -math.inf, -math.inf)      # not NaN for an impossible pair

    # -------- reverse process p

    def _guess(self, model, xt, t):
        """log p~(x_0), what the other places tell, (B, ..., K): the softmax of the logits, and never the mask."""
        _, t = self.transition.times(None, t, gap=1)
        t = t if isinstance(t, torch.Tensor) else torch.full((), t, device=xt.device)
        if t.shape not in ((), xt.shape[:1]):
            raise ValueError(f"a time is an int or int64 (B,) = {tuple(xt.shape[:1])}, got t = {t}, s = {t - 1}")
        logits = model(self._states(xt, data=False), t.to(xt.device).expand(len(xt)))
        if logits.shape != (*xt.shape, self.K):
            raise ValueError(f"the network must return logits {(*xt.shape, self.K)}, got {tuple(logits.shape)}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.transition.mask is not None:
            logits = logits.masked_fill(torch.arange(self.K, device=xt.device) == self.transition.mask, -math.inf)
        return logits.log_softmax(-1)

    def _reverse(self, log_guess, xt, t, s=None):
        """p_reverse from log p~(x_0)."""
        log_p = self.q_posterior(log_guess, xt, t, s)
        if self.transition.mask is None:
            return log_p
        # By Bayes' rule what is not masked is x_0. Set here for a known place at T, where the rule would be 0 / 0.
        return torch.where((xt == self.transition.mask)[..., None], log_p, _one_hot(xt, self.K).log())

    def p_x0(self, model, xt, t):
        """Log-probabilities of p(x_0 | x_t) ∝ q(x_t | x_0) p~(x_0), (B, ..., K): p_reverse down to s = 0."""
        return self.p_reverse(model, xt, t, 0)

    def p_reverse(self, model, xt, t, s=None):
        """Log-probabilities of p(x_s | x_t) ∝ sum over x_0 of q(x_s, x_t | x_0) p~(x_0), [A] eq. 4, (B, ..., K).
        Exact, at every s, for the leave-one-out denoiser, p~(x_0) ∝ p(x_0 | x_t) / q(x_t | x_0). A network that says
        p(x_0 | x_t) itself is used as lambda xt, t: net(xt, t) - transition.log_columns(xt, 0, t); with masks as is."""
        return self._reverse(self._guess(model, xt, t), xt, t, s)

    # -------- losses and the bound

    def prior_kl(self, x0):
        """L_T = KL(q(x_T | x_0) || stationary), [A] eq. 1, bits per dimension (B,); infinite without full masking."""
        log_q = self.transition.log_rows(self._states(x0), 0, self.T)
        return _per_example(_kl(log_q, _like(self.transition.stationary.log(), log_q))) / math.log(2)

    def vlb_term(self, model, x0, xt, t, s=None):
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), [A] eq. 1, bits per dimension (B,); at s = 0: -log p(x_0 | x_t)."""
        return self._vlb_term(self._guess(model, xt, t), x0, xt, t, s)

    def _vlb_term(self, log_guess, x0, xt, t, s=None):
        return _per_example(self.transition.posterior_kl(self._states(x0), log_guess, xt, s, t)) / math.log(2)

    def _noised(self, x0, t, xt):
        """t uniform on 1..T and xt from q(x_t | x_0) where not given."""
        t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device) if t is None else t
        return t, self.q_sample(x0, t) if xt is None else xt

    def loss_simple(self, model, x0, t=None, xt=None):
        """Cross-entropy of x_0, -log p(x_0 | x_t), bits per dimension (B,)."""
        t, xt = self._noised(x0, t, xt)
        return self.vlb_term(model, x0, xt, t, 0)

    def loss_vlb(self, model, x0, t=None, xt=None):
        """T L_t, a one-sample estimate of L_0 + sum L_t; bits per dimension (B,)."""
        t, xt = self._noised(x0, t, xt)
        return self.T * self.vlb_term(model, x0, xt, t)

    def loss_hybrid(self, model, x0, t=None, xt=None, ce_weight=1e-3):
        """L_t + ce_weight times the cross-entropy of x_0, as in [A]'s code (its eq. 5 has the whole sum for L_t)."""
        t, xt = self._noised(x0, t, xt)
        log_guess = self._guess(model, xt, t)
        return self._vlb_term(log_guess, x0, xt, t) + ce_weight * self._vlb_term(log_guess, x0, xt, t, 0)

    @torch.no_grad()
    def bits_per_dim(self, model, x0, steps=None):
        """The whole bound on -log2 p(x0) / D, with one draw of x_t for each term; no gradient.
        -> dict: total (B,) = prior (B,) + terms.sum(1), terms (B, n) in the order S_1..S_n, terms[:, 0] being L_0, and
        x0_error (B, n), the share of places guessed wrong."""
        terms, errors, grid = [], [], [0, *self.timesteps(steps)]
        for s, t in zip(grid, grid[1:]):
            xt = self.q_sample(x0, t)
            log_guess = self._guess(model, xt, t)
            terms.append(self._vlb_term(log_guess, x0, xt, t, s))
            wrong = self._reverse(log_guess, xt, t, 0).argmax(-1) != x0
            errors.append(_per_example(wrong.to(log_guess.dtype)))
        prior, terms = self.prior_kl(x0), torch.stack(terms, dim=1)
        return dict(total=prior + terms.sum(1), prior=prior, terms=terms, x0_error=torch.stack(errors, dim=1))

    # -------- samplers

    def timesteps(self, steps=None):
        """The grid S_1 < ... < S_n = T, a list of ints. steps is None (all of 1..T), a number n (n evenly spaced
        times, both ends kept), or an increasing list that ends at T; ValueError for anything else."""
        T, steps = self.T, steps.tolist() if hasattr(steps, "tolist") else steps
        try:
            if steps is None or hasattr(steps, "__index__"):
                n = T if steps is None else min(T, operator.index(steps))
                grid = [1 + (2 * i * (T - 1) + n - 1) // (2 * (n - 1)) for i in range(n)] if n > 1 else [T] * n
            else:
                grid = [operator.index(t) for t in steps]
        except TypeError:
            grid = []
        if not grid or grid[0] < 1 or grid[-1] != T or any(s >= t for s, t in zip(grid, grid[1:])):
            raise ValueError(f"steps must be a number >= 1 or times that increase to T = {T}, got {steps}")
        return grid

    @torch.no_grad()
    def p_sample(self, model, xt, t, s=None):
        """One reverse step -> a draw of x_s, int64 (B, ...), and log p(x_0 | x_t), (B, ..., K). Drawn at s = 0 too."""
        log_guess = self._guess(model, xt, t)
        return categorical(self._reverse(log_guess, xt, t, s).exp()), self._reverse(log_guess, xt, t, 0)

    def _hold(self, xs, known, s):
        """xs with the known places (known >= 0) put in: as they are among masks, else noised to time s."""
        if known is None:
            return xs
        if _readable(known):
            self._states(known[known >= 0])
        known = known.to(xs.device).expand(xs.shape)
        data = known.clamp(min=0)
        return torch.where(known >= 0, data if self.transition.mask is not None else self.q_sample(data, s), xs)

    @torch.no_grad()
    def sample_progressive(self, model, shape, steps=None, known=None):
        """Yields (s, xs, log p(x_0|x_t)) after every step, down to a sample at s = 0. known: int64, -1 where free."""
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
        """Masks only: one place a step, each drawn given all before it, as an autoregressive model in any order [U].
        order is a permutation of the D places of an example, (D,) or (B, D), random when left out; or "confident":
        next comes the place that the network is surest of, which biases the draws towards what is common."""
        mask, D, confident = self.transition.mask, math.prod(shape[1:]), isinstance(order, str)
        if mask is None:
            raise ValueError("any-order sampling needs absorbing_transition: other noise has no masks to fill")
        flat = self._hold(torch.full(shape, mask, device=self.device), known, self.T).reshape(-1, D)
        if order is None or confident and order == "confident":
            order = torch.rand(flat.shape, device=self.device).argsort(1)
        elif confident or _readable(order) and not (order.sort().values == torch.arange(D)).all():
            raise ValueError(f'order must be "confident" or hold each place 0..{D - 1} once')
        example = torch.arange(len(flat), device=self.device)
        for place in order.to(self.device).expand(flat.shape).T:
            t = ((flat == mask).sum(1) * self.T / D).ceil().long().clamp(1, self.T)       # the time with as many masks
            log_p0 = self.p_x0(model, flat.reshape(shape), t).reshape(*flat.shape, self.K)
            if confident:
                place = log_p0.amax(-1).masked_fill(flat != mask, -math.inf).argmax(1)
            flat = flat.index_put((example, place), categorical(log_p0[example, place].exp()))
        return flat.reshape(shape)


# ---------------------------------------------------------------- guidance

def guided(model, y, weight):
    """A model(xt, t) out of model(xt, t, y): logits pushed towards the labels y, int64 (B,), [G] eq. 6.
    Its p~(x_0) ∝ p(x_0 | rest) p(y | x_0, rest)^(1 + weight): weight 0 is the network given y, -1 without a label."""
    def pushed(xt, t):
        logits = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, -1)]))
        with_label, without = logits.chunk(2)
        return (1 + weight) * with_label - weight * without

    return pushed


# ---------------------------------------------------------------- networks

def pixel_outputs(K):
    """How many numbers PixelLogits needs for a pixel's channel: a logit a state up to K = 32, else mean and scale."""
    return K if K <= 32 else 2


class PixelLogits(nn.Module):
    """Any image network as a network for D3PM: model(xt, t) -> logits (B, C, H, W, K) of p~(x_0).
    net maps (B, 2C, H, W), grey values in [-1, 1] and then 1 where masked, to (B, C pixel_outputs(K), H, W). Above 32
    states its output is a truncated logistic around x_t, [A] appendix A.8. mask is None or K - 1, else ValueError."""

    def __init__(self, net, K, mask=None):
        super().__init__()
        if mask not in (None, K - 1):
            raise ValueError(f"the mask must be None or the last state, {K - 1}, got {mask}")
        self.net, self.K, self.levels = net, K, K - (mask is not None)

    def forward(self, xt, t, y=None):
        B, C, H, W = xt.shape
        masked = xt >= self.levels
        grey = (2 * xt.float() / (self.levels - 1) - 1).masked_fill(masked, 0.0)
        x = torch.cat([grey, masked.float()], dim=1)
        out = (self.net(x, t) if y is None else self.net(x, t, y)).float()
        logits = out.reshape(B, C, pixel_outputs(self.K), H, W).movedim(2, -1)
        if self.K <= 32:
            return logits
        mean, log_scale = logits.unbind(-1)
        return F.pad(truncated_logistic(grey + mean, log_scale - 2, self.levels), (0, self.K - self.levels))


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
    """Rotary position embedding (RoPE, Su et al. 2021, 2104.09864) of queries or keys x (..., N, dim)."""
    N, half = x.shape[-2], x.shape[-1] // 2
    angles = timestep_embedding(torch.arange(N, device=x.device), 2 * half, max_period=1000).to(x.dtype)
    cos, sin = angles.chunk(2, dim=-1)
    a, b = x[..., :half], x[..., half:2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half:]], dim=-1)


class Block(nn.Module):
    """On (B, N, width): depthwise convolution, then self-attention and a two-layer network under adaLN-single, [C].
    modulation (B, 6, width), scales, shifts and gates from the time, is the same for all blocks; each adds a table of
    its own. The convolution is this file's addition: the nearest places tell most, and attention learns that late."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.near = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), zero(nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, 4 * width), zero(nn.Linear(4 * width, width))

    def forward(self, x, modulation):
        B, N, C = x.shape
        x = x + self.near(x.mT).mT
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.table)[:, :, None].unbind(1)
        h = self.norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).reshape(B, N, C)
        x = x + (1 + gate1) * self.dropout(self.out(h))
        h = self.norm(x) * (1 + scale2) + shift2
        return x + (1 + gate2) * self.dropout(self.down(F.relu(self.up(h)).square()))        # squared ReLU, [S]


class Transformer(nn.Module):
    """A bidirectional Transformer: model(xt, t, y=None) -> logits (B, ..., K) of p~(x_0), all 0 at the start.
    shape is one example's: (L,) tokens, or (C, H, W), where patch x patch pixels are one place. Labels y are int64
    (B,) in 0..classes-1, or -1 for none, as everywhere if left out. ValueError for sizes or labels that do not fit."""

    def __init__(self, K, shape, width=256, depth=6, heads=4, patch=4, dropout=0.0, classes=0):
        super().__init__()
        if len(shape) not in (1, 3):
            raise ValueError(f"shape must be (L,) or (C, H, W), got {tuple(shape)}")
        # Tokens are handled as an image of one row, in patches of one pixel.
        self.image, self.patch = ((1, 1, *shape), 1) if len(shape) == 1 else (tuple(shape), patch)
        C, H, W = self.image
        if width % 2 or width % heads or H % self.patch or W % self.patch:
            raise ValueError(f"width={width} must be even and a multiple of heads={heads}, and H and W of "
                             f"{tuple(shape)} multiples of patch={patch}")
        self.K, self.shape, self.width, self.classes = K, tuple(shape), width, classes
        cells = C * self.patch ** 2
        self.embed = nn.Embedding(K, width if cells == 1 else 16)
        self.enter = nn.Linear(cells * self.embed.embedding_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(C * H * W // cells, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), zero(nn.Linear(width, cells * K))
        self.label = zero(nn.Embedding(classes + 1, width)) if classes else None         # row 0: no label

    def forward(self, x, t, y=None):
        if x.shape[1:] != self.shape:
            raise ValueError(f"this Transformer takes (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if y is not None and (y.dtype != torch.int64 or y.shape != x.shape[:1]
                              or _readable(y) and not ((-1 <= y) & (y < self.classes)).all()):
            raise ValueError(f"labels must be int64 ({len(x)},) in -1..{self.classes - 1}, got {y}")
        (C, H, W), p = self.image, self.patch
        emb = self.time(timestep_embedding(t, self.width).to(self.position.dtype))
        if self.label is not None:
            emb = emb + self.label(torch.zeros_like(t) if y is None else y + 1)
        modulation = self.modulation(emb).unflatten(1, (6, self.width))
        x = x.reshape(-1, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        h = self.enter(self.embed(x).flatten(3).flatten(1, 2)) + self.position
        for block in self.blocks:
            h = block(h, modulation)
        logits = self.out(self.norm(h)).reshape(-1, H // p, W // p, C, p, p, self.K)
        return logits.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, *self.shape, self.K)


# ---------------------------------------------------------------- a toy on two letters

def main():
    """Words of two letters, learnt in seconds: prints each word's learnt probability beside the true one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    K, T, n, steps = 4, 20, 20000, 800
    true = torch.tensor([[8, 1, 0, 1], [0, 6, 2, 0], [1, 0, 9, 0], [3, 0, 0, 5]]).flatten() / 36

    def words(n):
        word = torch.multinomial(true, n, replacement=True)
        return torch.stack([word // K, word % K], dim=1)

    model = Transformer(K, (2,), width=32, depth=1, heads=1)
    diffusion = D3PM(uniform_transition(K, cosine_betas(T)))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = diffusion.loss_vlb(model, words(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  bound {loss.item():.3f} bits/letter")

    learnt = torch.bincount(diffusion.sample(model, (n, 2)) @ torch.tensor([K, 1]), minlength=K * K) / n
    cells = [f"{'abcd'[i // K]}{'abcd'[i % K]} {100 * learnt[i]:5.1f} / {100 * true[i]:4.1f}" for i in range(K * K)]
    print("\nlearnt / true, in percent", *("   ".join(cells[i:i + K]) for i in range(0, K * K, K)), sep="\n")
    bound = diffusion.bits_per_dim(model, words(n))["total"].mean()
    entropy = torch.distributions.Categorical(true).entropy() / math.log(2) / 2
    print(f"\nbound {bound:.3f} bits/letter, entropy {entropy:.3f}: the gap is what T = {T} factorised steps lose")


if __name__ == "__main__":
    main()
