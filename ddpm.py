"""Denoising diffusion with Gaussian noise, in one file that needs only torch.

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                       data -> noise
    p(x_s | x_t) = N(mean(x_t, t), sigma^2(x_t, t) I),  s = t - 1                      noise -> data
    -log p(x_0) <= KL(q(x_T|x_0) || p(x_T)) + sum_{t>1} KL(q(x_s|x_t,x_0) || p(x_s|x_t)) - log p(x_0|x_1)
                   ------- L_T ----------   ------------------ L_t -------------------   ---- L_0 -----

A network learns to tell what noise was added; running it backwards from pure noise draws new data.
L_t is the term of the step down from t, which the papers call L_{t-1}; that of t = 1 is L_0.

[H] Ho et al. 2020, arXiv 2006.11239           [N] Nichol & Dhariwal 2021, arXiv 2102.09672
[S] Song, Meng & Ermon 2020, 2010.02502 (DDIM) [E] Song & Ermon 2019, 1907.05600 (Langevin)
[V] Salimans & Ho 2022, 2202.00512 (v)         [K] Kingma et al. 2021, 2107.00630 (two times, waves)
[G] Ho & Salimans 2022, 2207.12598 (guidance)  [R] Lugmayr et al. 2022, 2201.09865 (RePaint)

x0, xt        data and its noised version, float (B, ...), data scaled to [-1, 1]
t, s          times, an int or int64 (B,), 0 <= s < t <= T; 0 is clean and T is noise
alpha_bar     (T+1,): the share of the signal's power left at t; alpha_bar[0] = 1
alpha, beta   of the step s -> t: alpha = alpha_bar[t] / alpha_bar[s], beta = 1 - alpha
eps           the noise in xt, standard normal, shaped like x0
model         any callable model(xt, t) -> (B, C, ...), or (B, 2C, ...) where the variance is learned

Every law is written for a step s -> t of any length, s = t - 1 when left out, so that a strided
chain [K] is the same code on fewer times. Logs are natural; bounds leave in bits per dimension.
"""
import math
import operator
import warnings

import torch
from torch import nn
from torch.nn import functional as F


# ---------------------------------------------------------------- schedules: arrays of betas

def linear_beta_schedule(T):
    """beta_t from 1e-4 to 0.02 in equal steps, [H] section 4 -> (T,) float64. Other T than 1000 scale both ends by
    1000 / T, as the code of [N] does, at most 0.999, so that the whole chain destroys about as much."""
    return (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999)


def cosine_beta_schedule(T, s=0.008):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), [N] eq. 17 -> (T,) float64.
    beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.999: the last step would destroy all."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# ---------------------------------------------------------------- two laws of Gaussians

def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise; tensors or numbers."""
    mean1, log_var1, mean2, log_var2 = _at_least_float32(mean1, log_var1, mean2, log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + torch.exp(log_var1 - log_var2)
                  + (mean1 - mean2) ** 2 * torch.exp(-log_var2))


def _at_least_float32(*values):
    """Tensors of them: in float16 1 / sigma^2 overflows, and neither it nor bfloat16 has erfcx."""
    tensors = [torch.as_tensor(value) for value in values]
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _log_ndtr(x):
    """log of the standard normal's CDF; torch.special's own does not exist on mps."""
    left, right = torch.where(x < 0, x, 0.0) / math.sqrt(2), torch.where(x < 0, 0.0, x) / math.sqrt(2)
    return torch.special.erfcx(-left).log() - left ** 2 + torch.erf(right).log1p() - math.log(2)


def discretized_gaussian_log_likelihood(x, mean, log_std, levels=256):
    """log of the mass that N(mean, std^2) puts on the bin of x, [H] eq. 13; nats, elementwise.
    The levels are x_k = 2k / (levels - 1) - 1 and bin k is x_k +- 1 / (levels - 1), the outer two open, so that
    the masses sum to 1. It and its gradient are finite far in both tails, in float32 for log_std above -44."""
    x, mean, log_std = _at_least_float32(x, mean, log_std)
    half, inv_std = 1 / (levels - 1), torch.exp(-log_std)
    # A bin right of the mean is mirrored to the left one, where Phi is small and differences keep digits.
    centre, width = -(x - mean).abs() * inv_std, 2 * half * inv_std
    low, high = centre - width / 2, centre + width / 2
    # Where Phi barely changes over the bin: density times width, to second order in the width.
    narrow = width * (1 + centre.abs()) < 1e-2
    density = (-centre ** 2 / 2 - math.log(2 * math.pi) / 2 + math.log(2 * half) - log_std
               + width ** 2 * (centre ** 2 - 1) / 24)
    gap = torch.where(narrow, torch.full_like(centre, -1.0), _log_ndtr(low) - _log_ndtr(high))
    inside = torch.where(narrow, density, _log_ndtr(high) + torch.log(-torch.expm1(gap)))
    outer = _log_ndtr((half - x.sign() * (x - mean)) * inv_std)
    return torch.where(x.abs() > 1 - half, outer, inside)


# ---------------------------------------------------------------- the diffusion

class GaussianDiffusion(nn.Module):
    """The chain and its laws. It holds one table and no network.

    betas       (T,) in (0, 1): linear_beta_schedule(T), cosine_beta_schedule(T), or your own. They may require
                grad: a chain built anew at each step, GaussianDiffusion(torch.sigmoid(parameters)), learns
                them by loss_vlb + prior_kl, [H] section 2
    prediction  what the network estimates: "eps" [H], "x0", "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 [V]
    variance    sigma^2 = beta^f beta_tilde^(1 - f): a number f in [0, 1] (0: beta_tilde, 1: beta), or "learned":
                the network returns 2C channels, the second C being 2f - 1, as in the code of [N]
    levels      number of values a data channel can take, for the decoder L_0

    Raises ValueError for other betas, prediction or variance, and for a time outside 1..T; warns of data far
    outside [-1, 1]. Tensors on a GPU are not checked, to avoid waiting for it."""

    def __init__(self, betas, prediction="eps", variance="learned", levels=256):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        good = (betas > 0) & (betas < 1)
        if betas.ndim != 1 or not len(betas) or not good.all():
            raise ValueError(f"betas must be (T,) in (0, 1), got {tuple(betas.shape)}: {betas[~good].tolist()[:3]}")
        if prediction not in ("eps", "x0", "v"):
            raise ValueError(f'prediction must be "eps", "x0" or "v", got {prediction!r}')
        if variance != "learned" and not (isinstance(variance, (int, float)) and 0 <= variance <= 1):
            raise ValueError(f'variance must be "learned" or a number in [0, 1], got {variance!r}')
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.T, self.prediction, self.variance, self.levels = len(betas), prediction, variance, levels
        self.device = torch.device("cpu")
        # The log keeps every digit of 1 - alpha_bar[t] / alpha_bar[s], however small or long the step.
        self.register_buffer("log_alpha_bar", F.pad(torch.log1p(-betas).cumsum(0), (1, 0)), persistent=False)

    @property
    def alpha_bar(self):
        """alpha_bar_t = prod_{i <= t} (1 - beta_i), (T+1,) float64, [H] section 2."""
        return self.log_alpha_bar.exp()

    def _apply(self, fn, recurse=True):
        """Follow .to(device), but stay float64 under .half(); mps has no float64: the table waits on the CPU."""
        self.device = fn(torch.empty(0, device=self.device)).device
        self.log_alpha_bar = self.log_alpha_bar.to("cpu" if self.device.type == "mps" else self.device)
        return self

    def _times(self, x, t, s=None, gap=1):
        """t and s (None: t - 1) as int64 (B,) on x's device; ValueError unless 0 <= s <= t - gap, t <= T."""
        try:
            t, s = (time if time is None or isinstance(time, torch.Tensor) else torch.as_tensor(time, device="cpu")
                    for time in (t, s))
            s = t - 1 if s is None else s
            if any(time.dtype != torch.int64 or time.shape not in ((), x.shape[:1]) for time in (t, s)):
                raise TypeError
        except (AttributeError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"a time is an int or int64 (B,) = {tuple(x.shape[:1])}, got t = {t}, s = {s}") from None
        # A time on a GPU is not read, to avoid waiting: s = 0 or t = T, legal with any other, is checked in its place.
        late, early = (time if time.device.type == "cpu" else torch.tensor(bound, device="cpu")
                       for time, bound in ((t, self.T), (s, 0)))
        if not ((0 <= early) & (early <= late - gap) & (late <= self.T)).all():
            raise ValueError(f"need {gap} <= t <= T = {self.T} and 0 <= s < t, got t = {t}, s = {s}")
        return [time.to(x.device).expand(len(x)) if time.ndim or time.device.type != "cpu"
                else torch.full(x.shape[:1], int(time), device=x.device) for time in (t, s)]

    def _step(self, x, t, s=0):
        """alpha and beta of q(x_t | x_s) = N(sqrt(alpha) x_s, beta I), float64 (B, 1, ...); at s = 0 the bars."""
        if self.device.type == "mps":
            t, s = (time.cpu() if isinstance(time, torch.Tensor) else time for time in (t, s))
        log_alpha = (self.log_alpha_bar[t] - self.log_alpha_bar[s]).reshape(-1, *[1] * (x.ndim - 1))
        log_alpha = log_alpha.clamp(min=-700)               # an alpha of 0 would have a root of infinite slope
        return log_alpha.exp(), -torch.expm1(log_alpha)

    def _scales(self, x, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), t in 1..T, in x's dtype, (B, 1, ...)."""
        alpha_bar, var_t = self._step(x, self._times(x, t)[0])
        return _to(alpha_bar.sqrt(), x), _to(var_t.sqrt(), x)

    # -------- forward process q

    def q_step(self, xs, s, t, noise=None):
        """A draw of q(x_t | x_s) = N(sqrt(alpha) x_s, beta I), [H] eq. 2 for s = t - 1, (B, ...)."""
        t, s = self._times(xs, t, s, gap=0)
        alpha, beta = self._step(xs, t, s)
        noise = torch.randn_like(xs) if noise is None else noise
        return _to(alpha.sqrt(), xs) * xs + _to(_smooth(torch.sqrt, beta), xs) * noise

    def q_marginal(self, x0, t):
        """Mean and log variance of q(x_t | x_0), [H] eq. 4, each (B, ...)."""
        t, _ = self._times(x0, t, 0, gap=0)
        alpha_bar, var_t = self._step(x0, t)
        return _to(alpha_bar.sqrt(), x0) * x0, _to(var_t.log(), x0).expand_as(x0)

    def q_sample(self, x0, t, noise=None):
        """A draw of q(x_t | x_0): sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, [H] eq. 4, (B, ...)."""
        _check_scale(x0)
        return self.q_step(x0, 0, t, noise)

    def q_posterior(self, x0, xt, t, s=None):
        """Mean and log variance (beta_tilde) of q(x_s | x_t, x_0), [H] eq. 6-7, each (B, ...).
        Bayes' rule given x_0: q(x_t|x_s) q(x_s|x_0) / q(x_t|x_0). At s = 0 the point x_0, with log variance -inf."""
        t, s = self._times(xt, t, s)
        (alpha, beta), (alpha_bar_s, var_s), (_, var_t) = self._step(xt, t, s), self._step(xt, s), self._step(xt, t)
        mean = _to(alpha_bar_s.sqrt() * beta / var_t, xt) * x0 + _to(alpha.sqrt() * var_s / var_t, xt) * xt
        return mean, _to(_smooth(torch.log, self._beta_tilde(xt, t, s)), xt).expand_as(mean)

    def _beta_tilde(self, x, t, s):
        """beta_tilde = beta (1 - alpha_bar_s) / (1 - alpha_bar_t), the posterior's variance, float64 (B, 1, ...)."""
        return self._step(x, t, s)[1] * self._step(x, s)[1] / self._step(x, t)[1]

    # -------- four coordinates of one estimate: x0, eps, v, score

    def _target(self, x, t):
        """(a, b) where the network's target is a x0 + b eps; numbers, or (B, 1, ...)."""
        signal, sigma = self._scales(x, t)
        return {"eps": (0, 1), "x0": (1, 0), "v": (-sigma, signal)}[self.prediction]

    def predict_x0(self, xt, t, eps):
        """x0 = (xt - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), [H] eq. 15, (B, ...)."""
        signal, sigma = self._scales(xt, t)
        return (xt - sigma * eps) / signal

    def predict_eps(self, xt, t, x0):
        """eps = (xt - sqrt(alpha_bar) x0) / sqrt(1 - alpha_bar), [H] eq. 4 solved for eps, (B, ...)."""
        signal, sigma = self._scales(xt, t)
        return (xt - signal * x0) / sigma

    def predict_v(self, x0, eps, t):
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, [V] section 4, (B, ...)."""
        signal, sigma = self._scales(x0, t)
        return signal * eps - sigma * x0

    def _network(self, model, xt, t):
        """One call of the network -> its prediction and its variance output (or None), in xt's dtype."""
        out, learned = model(xt, t).to(xt.dtype), self.variance == "learned"
        due = (len(xt), 2 * xt.shape[1], *xt.shape[2:]) if learned and xt.ndim > 1 else tuple(xt.shape)
        if out.shape != due or learned and xt.ndim == 1:
            raise ValueError(f"variance={self.variance!r} needs a network that returns {due} "
                             f"for data {tuple(xt.shape)}, got {tuple(out.shape)}")
        return out.chunk(2, dim=1) if learned else (out, None)

    def _estimate(self, out, xt, t):
        """x0_hat and eps_hat from the network's prediction: two linear equations in two unknowns.
            xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps,    out = a x0 + b eps"""
        (a, b), (signal, sigma) = self._target(xt, t), self._scales(xt, t)
        det = b * signal - a * sigma
        return (b * xt - sigma * out) / det, (signal * out - a * xt) / det

    def score(self, model, xt, t):
        """grad log q(x_t) = -E[eps | x_t] / sqrt(1 - alpha_bar_t), (B, ...): denoising score matching [E]."""
        t, _ = self._times(xt, t)
        _, eps_hat = self._estimate(self._network(model, xt, t)[0], xt, t)
        return -eps_hat / self._scales(xt, t)[1]

    # -------- reverse process p

    def p_reverse(self, model, xt, t, s=None, clip=True):
        """Mean and log variance of p(x_s | x_t), and x0_hat; each (B, ...). The mean is q_posterior's with x0_hat for
        x_0 ([H] eq. 11 when the network predicts eps); clip keeps x0_hat in [-1, 1].
        log sigma^2 = f log beta + (1 - f) log beta_tilde, [N] eq. 15: beta_tilde is right where the data are one
        point, beta where they are unit Gaussian."""
        t, s = self._times(xt, t, s)
        out, share = self._network(model, xt, t)
        x0_hat, _ = self._estimate(out, xt, t)
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        mean, _ = self.q_posterior(x0_hat, xt, t, s)
        # At s = 0 beta_tilde is 0 and has no log: that of the step above, t -> t + 1, is taken, as in the code of
        # [N] (t = 2 for t = 1). At t = T there is no step above, and beta is taken.
        upper, lower = torch.where(s == 0, (t + 1).clamp(max=self.T), t), torch.where(s == 0, t, s)
        beta, beta_tilde = self._step(xt, t, s)[1], self._beta_tilde(xt, upper, lower)
        log_beta_tilde = torch.where(beta_tilde > 0, beta_tilde, beta).log()
        f = self.variance if share is None else (share + 1) / 2
        log_var = f * _to(beta.log() - log_beta_tilde, xt) + _to(log_beta_tilde, xt)
        return mean, log_var.expand_as(mean), x0_hat

    # -------- losses and the bound

    def prior_kl(self, x0):
        """L_T = KL(q(x_T|x_0) || N(0, I)), [H] eq. 5, bits per dimension (B,)."""
        return _per_example(normal_kl(*self.q_marginal(x0, self.T), 0.0, 0.0)) / math.log(2)

    def vlb_term(self, model, x0, xt, t, s=None, clip=True):
        """One term of the bound, [H] eq. 5, bits per dimension (B,): KL(q(x_s|x_t,x_0) || p(x_s|x_t)), and where
        s = 0 the decoder L_0 = -log p(x_0|x_t). For s > 0 and sigma^2 = beta_tilde the KL is w ||eps - eps_hat||^2
        nats, w = beta^2 / (2 sigma^2 alpha (1 - alpha_bar_t)), [H] eq. 12; another fixed sigma adds a constant."""
        return self._vlb_term(model, x0, xt, t, s, clip)[0]

    def _vlb_term(self, model, x0, xt, t, s, clip):
        """The term and the x0_hat that it rests on."""
        t, s = self._times(xt, t, s)
        mean, log_var, x0_hat = self.p_reverse(model, xt, t, s, clip)
        # At s = 0 q is a point and the KL is +inf. where drops it, and its gradient is finite.
        kl = _per_example(normal_kl(*self.q_posterior(x0, xt, t, s), mean, log_var))
        nll = -_per_example(discretized_gaussian_log_likelihood(x0, mean, log_var / 2, self.levels))
        return torch.where(s == 0, nll, kl) / math.log(2), x0_hat

    def _noised(self, x0, t, noise):
        """t uniform on 1..T and noise standard normal where not given, and the xt that they make."""
        t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device) if t is None else self._times(x0, t)[0]
        noise = torch.randn_like(x0) if noise is None else noise
        return t, noise, self.q_sample(x0, t, noise)

    def _square_error(self, prediction, x0, noise, t):
        """Mean of ||a x0 + b eps - prediction||^2 over the dimensions, (B,)."""
        a, b = self._target(x0, t)
        return _per_example((a * x0 + b * noise - prediction).square())

    def loss_simple(self, model, x0, t=None, noise=None):
        """L_simple: the mean square error of the prediction, [H] eq. 14, (B,)."""
        t, noise, xt = self._noised(x0, t, noise)
        prediction, _ = self._network(model, xt, t)
        return self._square_error(prediction, x0, noise, t)

    def loss_vlb(self, model, x0, t=None, noise=None, s=None):
        """T L_t, a one-sample estimate of L_0 + sum L_t; bits per dimension (B,), full gradient. For a longer step
        s -> t it is T / (t - s) times its term; its mean over a grid's steps, drawn with probability (t - s) / T, is
        the bound on that grid."""
        t, noise, xt = self._noised(x0, t, noise)
        t, s = self._times(x0, t, s)
        return self.T * self.vlb_term(model, x0, xt, t, s, clip=False) / (t - s)

    def loss_hybrid(self, model, x0, t=None, noise=None, s=None, vlb_weight=1e-3):
        """L_simple + 1e-3 T L_t, [N] eq. 16, (B,); s as in loss_vlb, vlb_weight in place of 1e-3, a number or (B,).
        The bound trains the variance alone (a fixed one not at all): the prediction stands behind a stop-gradient
        there, since the bound's steep weights would make the gradient of the mean noisy."""
        t, noise, xt = self._noised(x0, t, noise)
        prediction, share = self._network(model, xt, t)
        frozen = prediction.detach() if share is None else torch.cat([prediction.detach(), share], dim=1)
        vlb = self.loss_vlb(lambda xt, t: frozen, x0, t, noise, s)
        return self._square_error(prediction, x0, noise, t) + vlb_weight * vlb

    @torch.no_grad()
    def bits_per_dim(self, model, x0, steps=None, clip=True):
        """The whole bound on -log2 p(x0) / D, with one draw of x_t for each term; no gradient. -> dict in bits per
        dimension: total (B,) = prior (B,) + terms.sum(1); terms (B, n) in the order S_1..S_n, so that terms[:, 0]
        is L_0; and x0_mse (B, n), the mean square error of x0_hat."""
        terms, mse, grid = [], [], [0, *self.timesteps(steps)]
        for s, t in zip(grid, grid[1:]):
            term, x0_hat = self._vlb_term(model, x0, self.q_sample(x0, t), t, s, clip)
            terms.append(term)
            mse.append(_per_example((x0_hat - x0).square()))
        prior, terms = self.prior_kl(x0), torch.stack(terms, dim=1)
        return dict(total=prior + terms.sum(1), prior=prior, terms=terms, x0_mse=torch.stack(mse, dim=1))

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
    def p_sample(self, model, xt, t, s=None, noise=None, eta=None, clip=True):
        """One reverse step -> a draw of x_s, and the x0_hat that it rests on, (B, ...). No noise is added at s = 0.
        eta None: ancestral, p(x_s | x_t) with the model's own variance, [H] algorithm 2. 0 <= eta <= 1: DDIM, [S]
        eq. 12 with sigma^2 = eta^2 beta_tilde (eq. 16): 0 adds no noise, 1 is ancestral with beta_tilde; eps_hat is
        taken from the clipped x0_hat."""
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta must be None or in [0, 1], got {eta}")
        t, s = self._times(xt, t, s)
        noise = torch.randn_like(xt) if noise is None else noise
        mean, log_var, x0_hat = self.p_reverse(model, xt, t, s, clip)
        if eta is None:
            alive = (s > 0).reshape(-1, *[1] * (xt.ndim - 1))
            return mean + alive * torch.exp(log_var / 2) * noise, x0_hat
        (alpha_bar_s, var_s), variance = self._step(xt, s), eta ** 2 * self._beta_tilde(xt, t, s)
        eps_hat = self.predict_eps(xt, t, x0_hat)
        mean = _to(alpha_bar_s.sqrt(), xt) * x0_hat + _to((var_s - variance).sqrt(), xt) * eps_hat
        return mean + _to(variance.sqrt(), xt) * noise, x0_hat

    def _hold(self, xs, known, s):
        """xs with the held places (known is no NaN) drawn anew from q(x_s | x_0), at s = 0 x_0 itself."""
        if known is None:
            return xs
        fits = known.ndim <= xs.ndim and all(n in (1, m) for n, m in zip(known.shape[::-1], xs.shape[::-1]))
        if not fits or not known.is_floating_point():
            raise ValueError(f"known must be float {tuple(xs.shape)}, got {known.dtype} {tuple(known.shape)}")
        known = known.to(xs).expand(xs.shape)
        return torch.where(known.isnan(), xs, self.q_sample(known, s))

    @torch.no_grad()
    def sample_progressive(self, model, shape, steps=None, eta=None, clip=True, known=None):
        """Yields (s, xs, x0_hat) after every step, from noise at T down to a sample at s = 0.
        known, float of the data's shape and NaN where free, holds places (inpainting): they are drawn anew from
        q(x_s | x_0) at each s, and end as they are. Exact where places are independent, approximate elsewhere: the
        free ones of x_s are drawn without seeing the held ones of x_s. [R] mends it by going back and forth."""
        grid = [0, *self.timesteps(steps)]
        xs = self._hold(torch.randn(shape, device=self.device), known, self.T)
        for s, t in zip(grid[-2::-1], grid[::-1]):
            xs, x0_hat = self.p_sample(model, xs, t, s, eta=eta, clip=clip)
            xs = self._hold(xs, known, s)
            yield s, xs, x0_hat

    def sample(self, model, shape, steps=None, eta=None, clip=True, known=None):
        """New data x0 of the given shape (B, ...), float, by ancestral sampling or DDIM; see p_sample and above."""
        for _, x0, _ in self.sample_progressive(model, shape, steps, eta, clip, known):
            pass
        return x0

    @torch.no_grad()
    def ddim_encode(self, model, x0, steps=None):
        """x_T from x_0, (B, ...): DDIM with eta = 0 run backwards, [S] section 4.3; no clipping. eps_hat is taken at
        (x_s, t), where the step down from t takes it: the way back is exact where it is the same at x_s and x_t."""
        xs, grid = x0, [0, *self.timesteps(steps)]
        for s, t in zip(grid, grid[1:]):
            t, s = self._times(xs, t, s)
            _, eps_hat = self._estimate(self._network(model, xs, t)[0], xs, t)
            (alpha, _), (_, var_s), (_, var_t) = self._step(xs, t, s), self._step(xs, s), self._step(xs, t)
            xs = _to(alpha.sqrt(), xs) * (xs - _to(var_s.sqrt(), xs) * eps_hat) + _to(var_t.sqrt(), xs) * eps_hat
        return xs

    @torch.no_grad()
    def langevin(self, model, shape, steps=None, corrector_steps=1, snr=0.16):
        """Annealed Langevin dynamics with the score, [E] algorithm 1 -> x0 of the given shape (B, ...).
            x <- x + h score(x, t) + sqrt(2 h) z,    h = 2 snr^2 (1 - alpha_bar_t)
        corrector_steps times at each t, from T down: the corrector of Song et al. 2021 (2011.13456, appendix G), with
        ||z|| / ||score|| at its mean and without the factor alpha of their code. At the end x0_hat, the mean of x_0
        given x, takes off the last noise."""
        x, grid = torch.randn(shape, device=self.device), self.timesteps(steps)
        for t in grid[::-1]:
            h = 2 * snr ** 2 * self._step(x, t)[1]
            for _ in range(corrector_steps):
                x = x + _to(h, x) * self.score(model, x, t) + _to((2 * h).sqrt(), x) * torch.randn_like(x)
        t, _ = self._times(x, grid[0], 0)
        return self._estimate(self._network(model, x, t)[0], x, t)[0]


def _to(coefficient, x):
    """A float64 coefficient in x's dtype on x's device, in that order: no float64 may reach mps."""
    return coefficient.to(x.dtype).to(x.device)


def _smooth(f, x):
    """f(x), f being sqrt or log and x >= 0, where the slope at 0 is taken as 0: infinity times 0 would be NaN."""
    return torch.where(x > 0, f(torch.where(x > 0, x, 1)), f(torch.zeros_like(x)))


def _per_example(x):
    """(B, ...) -> (B,): the mean over all but the batch, which may be empty."""
    return x.reshape(len(x), math.prod(x.shape[1:])).mean(1)


def _check_scale(x0):
    """Warns of data plainly not scaled to [-1, 1]; not on a GPU, to avoid waiting for it."""
    if x0.device.type == "cpu" and (x0.abs() > 1.1).any():
        warnings.warn("x0 reaches beyond [-1, 1], the range that the noise, clip and the decoder are made for")


# ---------------------------------------------------------------- guidance

def _labels(y, x, classes=math.inf):
    """y; ValueError unless it is int64 (B,) in -1..classes-1, the numbers not being read on a GPU."""
    fits = isinstance(y, torch.Tensor) and y.dtype == torch.int64 and y.shape == x.shape[:1]
    if not fits or y.device.type == "cpu" and not ((-1 <= y) & (y < classes)).all():
        raise ValueError(f"labels must be int64 {tuple(x.shape[:1])}, -1 or below the number of classes, {classes}, "
                         "got " + str(y).replace("\n", ""))
    return y


def guided(model, y, weight):
    """A model(xt, t) out of model(xt, t, y), pushed towards the labels y, int64 (B,), [G] eq. 6.
    Its prediction is (1 + weight) times that given y minus weight times that without a label, in one call on a
    doubled batch; a learned variance is that given y. The score is then grad log q(x_t) + (1 + weight) grad
    log q(y | x_t): weight 0 is the network given y, -1 without. The network learns both where a tenth of y is -1."""
    def pushed(xt, t):
        out = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([_labels(y, xt), torch.full_like(y, -1)]))
        with_label, without = out.chunk(2)
        prediction = (1 + weight) * with_label - weight * without
        if out.shape[1:] == xt.shape[1:]:
            return prediction
        return torch.cat([prediction.chunk(2, dim=1)[0], with_label.chunk(2, dim=1)[1]], dim=1)     # 2C channels

    return pushed


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


def norm(channels):
    """GroupNorm with up to 8 groups, not [H]'s 32: a group of one or two channels would lose their contrast."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class Attention(nn.Module):
    """x + self-attention over the H W places of x (B, C, H, W)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        # The fused kernel wants a place's features side by side: without .contiguous() torch takes a slower one.
        h = F.scaled_dot_product_attention(*qkv.mT.contiguous().unbind(1))  # (B, heads, H W, C / heads)
        return x + self.out(h.mT.reshape(B, C, H, W))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), FiLM by time at the second norm [N]; then attention."""

    def __init__(self, cin, cout, time_dim, dropout, heads):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * cout)
        self.norm2, self.dropout = norm(cout), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout, heads) if heads else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.attention(self.skip(x) + self.conv2(self.dropout(h)))


class UNet(nn.Module):
    """The network of [H] and [N]: model(xt, t) on (B, channels, H, W) -> (B, out_channels, H, W).

    width       channels at the finest level; each level halves the resolution of the one above
    mults       a level's channels as a multiple of width
    blocks      residual blocks a level on the way down; one more on the way up
    attention   the levels, counted from 0 at the finest, that have self-attention, of `heads` heads
    fourier     exponents n of inputs sin and cos(2^n pi x) beside x, [K]: they show noise finer than a grey level
    classes     number of labels; y is int64 (B,), -1 where there is no label, as everywhere if left out

    H and W must divide by 2^(len(mults) - 1). ValueError for sizes that do not fit, and for labels outside
    -1..classes-1. Its first output is 0."""

    def __init__(self, channels, out_channels, width=64, mults=(1, 2, 2), blocks=2, attention=(1, 2),
                 heads=4, dropout=0.0, fourier=(), classes=0):
        super().__init__()
        widths, time_dim, last = [width * m for m in mults], 4 * width, len(mults) - 1
        if (width % 2 or not widths or min(channels, out_channels, heads, blocks + 1, classes + 1, *widths) < 1
                or any(level not in range(last + 1) or widths[level] % heads for level in attention)):
            raise ValueError(f"need positive sizes, an even {width=}, {attention=} among the levels 0..{last}, and "
                             f"{heads=} that divide their channels, {widths}")
        self.channels, self.width, self.divisor, self.classes = channels, width, 2 ** last, classes
        self.waves = [2 ** n * math.pi for n in fourier]

        def block(cin, level, attends=True):
            return ResBlock(cin, widths[level], time_dim, dropout, heads if attends and level in attention else 0)

        self.time = nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.stem = nn.Conv2d(channels * (1 + 2 * len(self.waves)), width, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(c, level))
                skips.append(c := w)
            if level < last:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, last), block(c, last, attends=False)])
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), level))
                c = w
            if level:
                self.up.append(nn.Upsample(scale_factor=2))
        self.out = nn.Sequential(norm(c), nn.SiLU(), zero(nn.Conv2d(c, out_channels, 3, padding=1)))
        self.label = zero(nn.Embedding(classes + 1, time_dim)) if classes else None      # row 0: no label

    def forward(self, x, t, y=None):
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(f"this U-Net takes (B, {self.channels}, H, W) with H and W divisible by "
                             f"{self.divisor}, got {tuple(x.shape)}")
        emb = self.time(timestep_embedding(t, self.width).to(self.stem.weight.dtype))
        y = None if y is None else _labels(y, x, self.classes)
        if self.classes:
            emb = emb + self.label(torch.zeros_like(t) if y is None else y + 1)
        x = torch.cat([x, *[wave(w * x) for w in self.waves for wave in (torch.sin, torch.cos)]], dim=1)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        h = self.middle[1](self.middle[0](h, emb), emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, ResBlock) else layer(h)
        return self.out(h)


# ---------------------------------------------------------------- a toy in two dimensions

def main():
    """Five points on a ring, learnt in seconds: draws the samples as they come out of the noise."""
    torch.set_num_threads(1)                                # for so small a network more are slower
    torch.manual_seed(0)
    T, n, sigma, steps, batch = 50, 2000, 0.05, 1000, 256
    ring = 0.7 * torch.view_as_real(torch.polar(torch.ones(5), torch.arange(5) * 2 * math.pi / 5))

    def data(n):
        x0 = ring[torch.randint(5, (n,))] + sigma * torch.randn(n, 2)
        return ((x0 + 1) * 127.5).round() / 127.5 - 1

    layers = nn.Sequential(nn.Linear(14 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), zero(nn.Linear(128, 4)))
    def model(xt, t):
        waves = [wave(k * math.pi * xt) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)]
        return layers(torch.cat([4 * xt, *waves, timestep_embedding(20 * t, 32)], dim=1))

    diffusion = GaussianDiffusion(cosine_beta_schedule(T))
    optimizer = torch.optim.Adam(layers.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = diffusion.loss_hybrid(model, data(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    bits = {name: value.mean(0) for name, value in diffusion.bits_per_dim(model, data(n)).items()}
    print(f"\nbound {bits['total']:.2f} bits/dim (L_T {bits['prior']:.3f} + L_t {bits['terms'][1:].sum():.2f} + "
          f"L_0 {bits['terms'][0]:.2f}); all 256 levels alike would cost 8\n")
    shown = {s: xs for s, xs, _ in diffusion.sample_progressive(model, (n, 2)) if s in (T - 1, 25, 10, 0)}
    counts = [torch.histogramdd(xs.flip(1), bins=[10, 20], range=[-1.0, 1.0, -1.0, 1.0]).hist for xs in shown.values()]
    print("".join(f"x_{s:<21}" for s in shown))
    for rows in zip(*counts):
        print("   ".join("".join(" .:+#"[min(4, (int(count) + 9) // 10)] for count in row) for row in rows))
    distance, nearest = torch.cdist(shown[0], ring).min(dim=1)
    shares = " ".join(f"{share:.2f}" for share in torch.bincount(nearest, minlength=5) / n)
    print(f"\nsamples within 3 sigma of a point: {(distance < 3 * sigma).float().mean():.0%} (true: 99%); "
          f"shares of the points: {shares} (true: 0.20)")


if __name__ == "__main__":
    main()
