"""Train, sample and measure the diffusion models of ddpm.py and d3pm.py.

    python train.py                                images by DDPM, sized for this machine
    python train.py --plain                        the same closer to the papers: eps, uniform t, Adam
    python train.py --model d3pm --data docs       text by D3PM
    python train.py --sample 64                    new samples from the run's checkpoint
    python train.py --eval                         bits/dim on the test split, term by term
    torchrun --nproc-per-node=8 train.py           the same run on eight devices

In order: options; the run, one batch, the objective, the loop; sampling and evaluation; data, files, main.
To see how a diffusion model learns, read `batch`, `times`, `objective`, `train_step` and `loop` first.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import io
import json
import math
import os
import pathlib
import pydoc_data.topics
import signal
import socket
import sys
import time
import zlib
from types import SimpleNamespace

# Threads that spin while they wait slow a run up to tenfold on a CPU with other work, so they sleep. A short spin
# first (3000 turns, GNU's OpenMP) saves most sleeps: 1.5 times as fast on an idle CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure        # no pyplot: a notebook that imports this file keeps its backend
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import d3pm
import ddpm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))        # set by torchrun
FONTS = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}


def fail(message):
    """Ends the program in one line, without a traceback: a user's mistake, or the machine's fault."""
    raise SystemExit(f"train.py: {f'rank {RANK}: ' if WORLD > 1 else ''}{message}")


def need(condition, message):
    """Fails with the message unless the condition holds."""
    if not condition:
        fail(message)


def say(line):
    """A line on the screen, from one process."""
    if RANK == 0:
        print(line, flush=True)


# ---------------------------------------------------------------- options

# Sizes by network and device; mps takes the CPU's. The README has what a GPU's cost in FLOP.
UNET = {"cpu": dict(width=16, blocks=1, batch_size=24, lr=5e-3, steps=4200),
        "gpu": dict(width=64, blocks=2, batch_size=128, lr=1e-3, steps=14000)}
TRANSFORMER = {"cpu": dict(width=128, depth=4, batch_size=8, lr=8e-3, weight_decay=0.1, steps=8000),
               "gpu": dict(width=256, depth=6, batch_size=32, lr=2e-3, weight_decay=0.1, steps=12000, dropout=0.1)}
UNET_D3PM = {"cpu": dict(width=20, batch_size=16, steps=1500), "gpu": dict(steps=12000)}     # where it differs
SCHEDULES = dict(uniform="cosine", absorbing="mutual", gaussian="linear")

# Options of a run that a resumed run must agree with, and those that it may change.
FIXED = ("model batch_size seed dropout labels plain timesteps schedule prediction variance transition levels size "
         "length width").split()
FREE = "steps lr accumulate save_every".split()
# The options that mean something, by what is asked for; the ranges of numbers, 1 to infinity for the others.
MEANING = dict(train=["data", "data_dir", "out", "device", "resume", *FIXED, *FREE],
               sample=("model data out device seed sample sample_steps variance eta temperature prompt "
                       "confident label guidance").split(),
               eval="model data data_dir out device seed eval sample_steps variance guidance".split())
RANGES = dict(seed=(0, 2 ** 31), eta=(0, 1), variance=(0, 1), levels=(2, 256), lr=(1e-9, 1e3), dropout=(0, 0.9),
              temperature=(0.01, 100), label=(0, math.inf), guidance=(-1, 100))


def options(argv=None):
    """The command line as a dictionary of what was given; a checkpoint or `complete` knows the rest."""
    p = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=80),
        description="Train a diffusion model; or use one, with --sample or --eval.")
    p.error, add, path = fail, p.add_argument, os.path.expanduser

    def variance(text):
        return text if text == "learned" else float(text)

    add("--model", choices=["ddpm", "d3pm"], help="Gaussian or discrete noise (ddpm)")
    add("--data", type=path, metavar="D", help="fashion-mnist, mnist, cifar10, glyphs, docs, a folder of "
        "images or a .txt file (fashion-mnist; glyphs if it can't be had)")
    add("--data-dir", type=path, metavar="DIR", help="where data sets are, or go to (data)")
    add("--out", type=path, metavar="DIR", help="where the run lives (runs/<model>-<data>)")
    add("--steps", type=int, metavar="N", help="training steps (by model and device)")
    add("--batch-size", type=int, metavar="N", help="examples a step on all devices (by device)")
    add("--accumulate", type=int, metavar="N", help="parts of a batch, for less memory (1)")
    add("--lr", type=float, help="peak learning rate (by model)")
    add("--dropout", type=float, metavar="P", help="share of units left out (0; text on a GPU 0.1)")
    add("--seed", type=int, metavar="N", help="of weights, batches, noise, samples (0)")
    add("--device", help="cpu, cuda, cuda:1, mps (the best found)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (1000 at most)")
    add("--resume", action="store_true", help="go on with the run in --out, or begin it")
    add("--plain", action="store_true", help="closer to the papers: eps, uniform t, Adam")
    add("--labels", action="store_true", help="learn the data set's classes too")
    add("--sample", type=int, metavar="N", help="write N samples of the run in --out")
    add("--sample-steps", type=int, metavar="N", help="of --sample (images 50) and --eval (100)")
    add("--eta", type=float, help="sample by DDIM: 0 no noise, 1 ancestral")
    add("--temperature", type=float, metavar="X", help="of d3pm's guess when sampling (1)")
    add("--confident", action="store_true", help="sample the places it is surest of first")
    add("--label", type=int, metavar="N", help="class of the samples (all, a row each)")
    add("--guidance", type=float, metavar="W", help="towards the class, or away from early weights (0)")
    add("--prompt", metavar="TEXT", help="text to complete; _ (or \N{MIDDLE DOT}) is a free place")
    add("--eval", type=int, nargs="?", const=1000, metavar="N", help="bits/dim on N test examples (1000)")
    add("--timesteps", type=int, metavar="T", help="length of the chain (1000; text: --length)")
    add("--schedule", choices=["cosine", "linear", "mutual"], help="betas (cosine; by --transition)")
    add("--prediction", choices=["eps", "x0", "v"], help="what ddpm's network estimates (v)")
    add("--variance", type=variance, metavar="V", help="of ddpm's steps: learned, or 0..1 (learned)")
    add("--transition", choices=list(SCHEDULES), help="noise of d3pm (gaussian; text: absorbing)")
    add("--levels", type=int, metavar="K", help="grey levels of d3pm's images (256)")
    add("--size", type=int, metavar="N", help="pixels a side, for a folder of images (32)")
    add("--length", type=int, metavar="N", help="characters of an example of text (256)")
    add("--width", type=int, metavar="N", help="channels of the network (by device)")
    given = vars(p.parse_args(argv))
    uses = [use for use in ("sample", "eval") if use in given] or ["train"]
    situation = "in training" if uses == ["train"] else "with --" + " --".join(uses)
    for name, value in given.items():
        flag, (low, high) = f"--{name.replace('_', '-')}", RANGES.get(name, (1, math.inf))
        within = type(value) not in (int, float) or low <= value <= high
        need(any(name in MEANING[use] for use in uses), f"{flag} has no meaning {situation}")
        need(within, f"{flag} must lie in {low:g}..{high:g}, got {value}")
    return given


def complete(given, data, device):
    """The whole configuration of a run: defaults by model, data and device, then what was given."""
    model, text, plain = given.get("model", "ddpm"), data.chars is not None, given.get("plain", False)
    machine = "gpu" if device.type == "cuda" else "cpu"
    need(model == "d3pm" or not text, f"--data {data.name} is text: it needs --model d3pm")
    need(data.classes or "labels" not in given, f"--labels: {data.name} has no labels")
    config = dict(model=model, data=data.source, fingerprint=data.fingerprint, chars=data.chars, seed=0, plain=plain,
                  labels=False, dropout=0.0, schedule="cosine", mirror=False, accumulate=1)
    if text:
        length = given.get("length", 256)
        config |= TRANSFORMER[machine] | dict(length=length, timesteps=length, shape=[length])
    else:
        shape, waves = list(data.train.shape[1:]), (2, 4, 6) if model == "ddpm" else (0, 1, 2, 3)
        config |= UNET[machine] | dict(mults=(1, 2, 4), attention=(2,), fourier=() if plain else waves)
        config |= dict(timesteps=1000, shape=shape)
        config["mirror"] = data.folder or shape[0] == 3          # photos may be mirrored; garments and letters may not
    if model == "ddpm":
        config |= dict(prediction="eps" if plain else "v", variance="learned")
    else:
        transition = given.get("transition", "absorbing" if text else "gaussian")
        config |= dict(transition=transition, schedule=SCHEDULES[transition])
    if model == "d3pm" and not text:
        config |= UNET_D3PM[machine] | dict(levels=256)
    if plain:
        config |= dict(lr=1e-3, weight_decay=0.0)
    if data.folder:
        config["size"] = shape[-1]
    config["save_every"] = max(1, min(1000, given.get("steps", config["steps"]) // 10))
    settings = {name: given[name] for name in FIXED + FREE if name in given}
    foreign = " ".join(f"--{name.replace('_', '-')}" for name in settings if name not in config)
    need(not foreign, f"{foreign} has no meaning for --model {model} on --data {data.name}")
    config |= settings
    need(config.get("transition") != "absorbing" or config["schedule"] == "mutual",
         f"--schedule {config['schedule']} leaves places without a mask at T: --transition absorbing needs mutual")
    return config | dict(classes=data.classes if config["labels"] else [])


# ---------------------------------------------------------------- the run

def build(config):
    """The network and the diffusion that a configuration describes."""
    T, shape, schedule = config["timesteps"], config["shape"], config["schedule"]
    sizes = "width mults blocks attention fourier depth dropout".split()
    size = {name: config[name] for name in sizes if name in config} | dict(classes=len(config["classes"]))
    if config["model"] == "ddpm":
        betas = dict(cosine=ddpm.cosine_beta_schedule, linear=ddpm.linear_beta_schedule)
        need(schedule in betas, f"--schedule {schedule} is not for --model ddpm")
        outputs = 2 if config["variance"] == "learned" else 1
        return (ddpm.UNet(shape[0], outputs * shape[0], **size),
                ddpm.GaussianDiffusion(betas[schedule](T), config["prediction"], config["variance"]))
    betas = dict(cosine=d3pm.cosine_betas, linear=d3pm.linear_betas, mutual=d3pm.mutual_information_betas)
    family = getattr(d3pm, f"{config['transition']}_transition")
    K = (len(config["chars"]) if config["chars"] else config["levels"]) + (config["transition"] == "absorbing")
    diffusion = d3pm.D3PM(family(K, betas[schedule](T)))
    if config["chars"]:
        return d3pm.Transformer(K, shape, **size), diffusion
    unet = ddpm.UNet(2 * shape[0], shape[0] * d3pm.pixel_outputs(K), **size)
    return d3pm.PixelLogits(unet, K, diffusion.transition.mask), diffusion


class Run:
    """A configuration with the network and the diffusion that it describes, the run's folder `out` and its data.
    net is trained; ema, the moving average of its weights, makes the samples and the bounds; early is that average
    after an eighth of the steps, which guidance without labels pushes away from. In a checkpoint net is "model"."""

    def __init__(self, config, device, out, data=None):
        torch.manual_seed(config["seed"])
        net, diffusion = build(config)
        self.config, self.device, self.out, self.data = config, device, out, data
        self.discrete, self.text = config["model"] == "d3pm", bool(config["chars"])
        self.unit = "bits/char" if self.text else "bits/dim"
        self.net, self.diffusion = net.to(device, memory_format=torch.channels_last), diffusion.to(device)
        self.ema, self.early = (copy.deepcopy(self.net).eval().requires_grad_(False) for _ in range(2))
        # Cards before compute capability 8 only emulate bfloat16.
        self.bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        self.optimizers = optimizers(self.net, config, self.bf16)
        numbers = math.prod(config["shape"]) * (diffusion.K if self.discrete else 1)      # in an example
        self.chunk = min(64 if device.type == "cpu" else 512, max(1, 2 ** 26 // numbers))  # examples at once
        self.step, self.rows, self.signals = 0, [], []                     # rows of log.csv; signals to stop

    def call(self, net, xt, t, y=None, exact=False):
        """A network's output: in bfloat16 where the device computes that, unless it is to be exact."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and not exact):
            return net(xt, t, y)

    def model(self, y=None, guidance=0.0, temperature=1.0, exact=False):
        """ema as a model(xt, t): given labels y, guided, its logits at a temperature, exact without bfloat16.
        Without labels it is autoguided (Karras et al. 2024, 2406.02507): pushed away from the early weights, whose
        errors are much like those of ema, only larger."""
        channels = self.config["shape"][0]

        def network(xt, t, y=None, net=self.ema):
            if self.signals:                # to stop, while a run in training measures or samples
                raise KeyboardInterrupt
            out = self.call(net, xt, t, y, exact)
            if self.discrete:
                return out / temperature
            return out if self.diffusion.variance == "learned" else out[:, :channels]     # --variance 0.5, say

        def autoguided(xt, t):
            out = network(xt, t)
            push = guidance * (out - network(xt, t, net=self.early))
            if not self.discrete:
                push[:, channels:] = 0                           # the variance is ema's
            return out + push

        if not guidance:
            return functools.partial(network, y=y)
        return autoguided if y is None else (d3pm if self.discrete else ddpm).guided(network, y, guidance)

    def states(self, x):
        """uint8 images or numbers of characters as the diffusion takes them: [-1, 1] for ddpm, int64 for d3pm."""
        if not self.discrete:
            return x.float() / 127.5 - 1
        return x.long() if self.text else x.long() * self.config["levels"] // 256

    def pictures(self, x):
        """The way back for images: uint8 (B, C, H, W). Masks become mid-grey."""
        if not self.discrete:
            return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        grey = (x * 255 / (self.config["levels"] - 1)).round().clamp(0, 255)
        return grey.masked_fill(x >= self.config["levels"], 128).to(torch.uint8)

    def texts(self, x):
        """The way back for text: strings. A mask is shown as a middle dot."""
        characters = self.config["chars"] + "\N{MIDDLE DOT}"
        return ["".join(characters[i] for i in row) for row in x.tolist()]

    def examples(self, split):
        """A split's images, or all windows of its text, as a view (N, length)."""
        if not self.text:
            return split
        length = self.config["length"]
        need(len(split) >= length, f"the text is too short for --length {length}: a tenth of it is held out")
        return split.unfold(0, length, 1)

    def tests(self, n):
        """The first n test images, or n windows spread over the test text, as states; and their labels or None."""
        examples = self.examples(self.data.test)
        if self.text:
            examples = examples[torch.arange(n) * (len(examples) - 1) // max(1, n - 1)]
        y = self.data.test_labels[:n].to(self.device) if self.config["classes"] else None
        return self.states(examples[:n].to(self.device)), y

    def labels(self, n):
        """n labels in order, of each class as many; None for a run without labels."""
        classes = len(self.config["classes"])
        return torch.arange(n, device=self.device) * classes // n if classes else None


# ---------------------------------------------------------------- one batch

def batch(run, examples, labels=None):
    """x0, t, noise and labels y of one step, each (B, ...): this process's part of them. noise is what the losses
    take: eps for ddpm, x_t itself for d3pm. All are drawn by (seed, step) for the whole batch, so that a run is the
    same however often it is stopped, and on any number of processes. A tenth of the labels is dropped: one network
    learns p(x) beside p(x | y)."""
    config, device, B = run.config, run.device, run.config["batch_size"]
    seed = config["seed"] * 1_000_003 + run.step
    torch.manual_seed(seed)
    index = torch.randint(len(examples), (B,), device=examples.device)
    x = examples[index]
    if x.device != device and device.type == "cuda":
        x = x.pin_memory()
    x0 = run.states(x.to(device, non_blocking=True))
    if config["mirror"]:
        x0 = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, x0, x0.flip(-1))
    t = times(run)
    noise = run.diffusion.q_sample(x0, t) if run.discrete else torch.randn_like(x0)
    part, y = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD), None
    if labels is not None:
        dropped = torch.rand(B, device=device) < 0.1
        y = labels[index].to(device, non_blocking=True).masked_fill(dropped, -1)[part]
    if config["dropout"]:                   # each process leaves out units of its own
        torch.manual_seed(seed * 4096 + RANK + 1)
    return x0[part], t[part], noise[part], y


def times(run):
    """t of a whole batch, int64 (B,) in 1..T. Papers: uniform. Recipe: stratified, and skewed for v.
    Stratified: each of B equal parts of [0, 1) gives one t, so the mean loss is the same and less noisy. Skewed: t is
    drawn in proportion to 1/2 + alpha_bar_t, which adds the loss of v to that of eps, alpha_bar_t times as large.
    Small t, where the bits are spent, come thrice as often as the largest, which decide the coarsest features."""
    B, T, device = run.config["batch_size"], run.config["timesteps"], run.device
    if run.config["plain"]:
        return torch.randint(1, T + 1, (B,), device=device)
    u = (torch.arange(B, device=device) + torch.rand(1, device=device)) / B
    skewed = run.config.get("prediction") == "v"
    density = 0.5 + run.diffusion.alpha_bar[1:] if skewed else torch.ones(T, device=device)
    mass = density.float().to(device).cumsum(0)
    return torch.searchsorted(mass, u * mass[-1], right=True).clamp(max=T - 1) + 1


# ---------------------------------------------------------------- the objective

def objective(run, model, x0, t, noise):
    """The loss (B,) that a run minimises: L_simple for a variance that is fixed, the papers' hybrid loss for --plain,
    and else the recipe's."""
    diffusion, config, T = run.diffusion, run.config, run.config["timesteps"]
    if not run.discrete and config["variance"] != "learned":
        return diffusion.loss_simple(model, x0, t, noise)
    if config["plain"]:
        return diffusion.loss_hybrid(model, x0, t, noise)
    if run.text:                            # T / t times the cross-entropy is the bound under masks: halfway there
        return (T / t) ** 0.5 * diffusion.loss_simple(model, x0, t, noise)
    if run.discrete:
        return term_weights(diffusion.transition)[t - 1] * diffusion.loss_vlb(model, x0, t, noise)
    # The variance is learnt for steps t -> s as long as --eval's, T / 100 (only t = 1 goes to s = 0, the decoder). Its
    # gradient falls about as 1 / t^2, and under one weight only small t would learn it: so the bound's weight rises
    # with t, from the paper's 1e-3 to 1.
    s = (t - math.ceil(T / 100)).clamp(min=1).minimum(t - 1)
    return diffusion.loss_hybrid(model, x0, t, noise, s, 1e-3 + (t / T) ** 2)


@functools.cache
def term_weights(transition):
    """(T,): weights of the terms of D3PM's bound on images, 1 on average; under masks all are 1.
    L_t is roughly the information on x_0 that step t destroys, computed here for one pixel with x_0 uniform. Under
    Gaussian noise a fifth of the steps destroys three quarters of it (16 levels) or more, and the others, which
    decide the coarse features, would hardly be learnt. So each term is divided by the root of what its step destroys
    (plus 0.02, which bounds the weight): the terms come closer to each other, as L_simple does for Gaussian data."""
    levels = transition.K - (transition.mask is not None)                   # the mask, the last state, is no data
    tables = (transition.matrix(0, t)[:levels] for t in range(transition.T + 1))
    entropy = torch.special.entr            # -p log p
    information = torch.stack([entropy(Q.mean(0)).sum() - entropy(Q).sum(1).mean() for Q in tables])
    destroyed = -transition.T * information.diff().clamp(max=0) / information[0]            # 1 on average
    weight = (destroyed + 0.02) ** -0.5
    return (weight / weight.mean()).float().to(transition.device)


class Muon(torch.optim.Optimizer):
    """Momentum for matrices, its singular values set to 1: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    An averaged gradient has a few large singular values; with all at 1, rare directions learn as fast. Times
    0.2 sqrt(longer side) the step is of Adam's size and can have Adam's learning rate (Liu et al. 2025, 2502.16982).
    A convolution is the matrix (out, in height width). torch.optim.Muon takes 2 D weights alone and multiplies
    them in bfloat16, which most CPUs lack: in float32 and all of a size at once, this one is tenfold faster there."""

    def __init__(self, weights, lr, weight_decay=0.0, dtype=torch.float32):
        sizes = {}
        for w in weights:
            sizes.setdefault(tuple(sorted((len(w), w[0].numel()))), []).append(w)
        super().__init__([dict(params=same_size) for same_size in sizes.values()], dict(lr=lr))
        self.weight_decay, self.dtype = weight_decay, dtype
        for w in weights:
            self.state[w]["mean"] = torch.zeros_like(w)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            grads, means = [w.grad for w in weights], [self.state[w]["mean"] for w in weights]
            tall = [len(w) > w[0].numel() for w in weights]
            torch._foreach_lerp_(means, grads, 0.1)                     # _foreach: of a list, in one call
            ahead = [g.flatten(1) for g in torch._foreach_lerp(grads, means, 0.9)]          # Nesterov
            ahead = torch.stack([g.mT if is_tall else g for g, is_tall in zip(ahead, tall)])
            steps = orthogonal(ahead.to(self.dtype)).to(ahead.dtype)
            steps = [(step.mT if is_tall else step).reshape(w.shape) for step, w, is_tall in zip(steps, weights, tall)]
            torch._foreach_mul_(weights, 1 - group["lr"] * self.weight_decay)
            torch._foreach_add_(weights, steps, alpha=-group["lr"] * 0.2 * ahead.shape[-1] ** 0.5)


def orthogonal(x):
    """Matrices (N, rows, columns >= rows) with the same singular vectors, and all singular values near 1.
    Newton and Schulz's iteration with Jordan's coefficients, which trade exactness for speed: a singular value above
    2 % of the matrix's norm ends between 0.68 and 1.21. Three steps taught as well as the usual five."""
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(3):                      # x <- 3.4445 x + (-4.7750 G + 2.0315 G^2) x with G = x x^T
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def optimizers(net, config, bf16=False):
    """Papers: Adam. Recipe: Muon for all Linear and Conv2d weights, Adam for biases, norms, embeddings and tables."""
    if config["plain"]:
        return [torch.optim.Adam(net.parameters(), config["lr"], fused=True)]
    matrices = [m.weight for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    rest = [p for p in net.parameters() if all(p is not w for w in matrices)]
    return [Muon(matrices, config["lr"], config.get("weight_decay", 0), torch.bfloat16 if bf16 else torch.float32),
            torch.optim.Adam(rest, config["lr"], betas=(0.9, 0.99), fused=True)]


def learning_rate(step, steps, peak):
    """Linear warm-up over the first 2 % of the steps (at most 1000), and a straight line from the peak down to 0."""
    warm = min(1000, steps // 50 + 1)
    return peak * min((step + 1) / warm, 1 - step / steps)


# ---------------------------------------------------------------- the loop

QUARTERS = [f"quarter{i}" for i in range(1, 5)]           # the losses are logged by quarter of t


def train(given, device):
    """One run, from its start or its checkpoint to its samples."""
    run = prepare_in_turns(given, device)
    data, classes = run.data, len(run.config["classes"])
    examples = run.examples(data.train.to(device) if data.train.nbytes < 1e9 else data.train)
    labels = data.train_labels.to(examples.device) if classes else None
    network = compiled(run, *batch(run, examples, labels)[1:])
    with (begin(run) if RANK == 0 else contextlib.nullcontext()), collect_signals(run.signals):
        loop(run, network, examples, labels)
        if WORLD > 1:
            dist.destroy_process_group()
        if RANK == 0:
            attempt(loss_figure, run)
            n = 16 if run.text else 64
            sample(run, classes * max(2, n // classes) if classes else n, {})                 # whole rows of a class
    return run


def prepare_in_turns(given, device):
    """The run with its data, which are downloaded or decoded once on each machine; the same on all processes."""
    turn = 0 if RANK == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for now in range(3):
        if now == turn:
            run = prepare(given, device)
        any_process([])                     # the others wait here
    configs = [run.config] * WORLD
    if WORLD > 1:
        dist.all_gather_object(configs, run.config)
    need(all(config == run.config for config in configs), "the processes found different data: see --data-dir")
    return run


@contextlib.contextmanager
def collect_signals(signals):
    """Signals to stop go into a list, which the loop looks at after each step."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}       # Windows lacks SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN or number == signal.SIGINT:         # nohup has SIGHUP ignored
            signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(run):
    """Makes the run's folder, config.json and forward.png, and says what is trained. -> the folder's lock, a file that
    is held while it is open: no other run may write there"""
    config, data, out, T = run.config, run.data, run.out, run.diffusion.T
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is being written to {out}: choose another --out")
    except (ImportError, OSError):          # on Windows and on a file system without locks two runs aren't told apart
        pass
    write(out / "config.json", [json.dumps(config, indent=1).encode()])
    say(f"{config['model']} on {data.name} ({len(data.train):,} {'characters' if run.text else 'images'}), "
        f"{sum(p.numel() for p in run.net.parameters()) / 1e6:.2f} million parameters, "
        f"{run.device}{f' x {WORLD}' if WORLD > 1 else ''}, "
        f"batch {config['batch_size']}, steps {run.step} to {config['steps']} -> {out}")
    say(f"yardsticks: {yardsticks(run)}; samples and bounds use the EMA weights")
    if not run.text:
        torch.manual_seed(0)
        x0 = run.states(data.test[:1].to(run.device))
        noisy = torch.cat([run.diffusion.q_step(x0, 0, i * T // 9) for i in range(10)])
        attempt(grid_picture(run.pictures(noisy), 10, least=400).save, out / "forward.png")
    return lock


def loop(run, network, examples, labels):
    """From run.step to the last step: train; now and then report, measure and save."""
    config, steps, T, B = run.config, run.config["steps"], run.config["timesteps"], run.config["batch_size"]
    log_every, test_every = max(1, min(50, steps // 10)), max(1, min(2000, steps // 5))
    sums, since, clock = torch.zeros(2, 4, device=run.device), run.step, time.monotonic()
    while run.step < steps:
        x0, t, noise, y = batch(run, examples, labels)
        losses, lr = train_step(run, network, x0, t, noise, y)
        # By quarter of t: the losses' sum and number. They stay on the device until they are reported.
        sums += torch.zeros_like(sums).index_add(1, (t - 1) * 4 // T, torch.stack([losses, torch.ones_like(losses)]))
        run.step += 1

        last, best = run.step == steps, False
        measure = last or run.step % test_every == 0
        report = measure or run.step % log_every == 0
        save = last or run.step % config["save_every"] == 0
        stop = any_process(run.signals)
        if not (report or save or stop):
            continue
        loss, quarters = mean_losses(run, sums, since)        # waits for the device, which an ordinary step does not
        if report and RANK == 0:
            rate = (run.step - since) * B / max(time.monotonic() - clock, 1e-9)
            bits = held_out(run) if measure else ""
            best = bits != "" and all(bits <= row["test_bits"] for row in run.rows if row["test_bits"] != "")
            log(run, dict(step=run.step, loss=loss, lr=lr, rate=round(rate, 1), test_bits=bits) | quarters)
        if report:
            sums.zero_()
            since, clock = run.step, time.monotonic()
        if RANK == 0 and (save or stop or best):
            saved = attempt(save_checkpoint, run, best)
            need(saved or not (last or stop), f"{run.out}/checkpoint.pt can't be written: the last steps are lost")
        if stop:
            fail(f"stopped at step {run.step}{', the last' if last else '; go on with --resume'}")


def train_step(run, network, x0, t, noise, y):
    """One step of the optimisers and of the average -> the losses (B,) and the learning rate."""
    run.net.zero_grad()
    losses, n = [], run.config["accumulate"]
    labels = [None] * n if y is None else y.chunk(n)
    for x0, t, noise, y in zip(x0.chunk(n), t.chunk(n), noise.chunk(n), labels):     # the same gradient, less memory
        loss = objective(run, functools.partial(run.call, network, y=y), x0, t, noise)
        (loss.mean() / n).backward()
        losses.append(loss.detach())
    nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    lr = learning_rate(run.step, run.config["steps"], run.config["lr"])
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    average(run.ema, run.net, run.step)
    if run.step < run.config["steps"] // 8:
        run.early.load_state_dict(run.ema.state_dict())
    return torch.cat(losses), lr


@torch.no_grad()
def average(ema, net, step):
    """One step of the EMA: decay (1 + step) / (10 + step), at most 0.9999, forgets early weights; at first a copy."""
    decay = min(0.9999, (1 + step) / (10 + step)) if step else 0.0
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def mean_losses(run, sums, since):
    """The mean loss, and by quarter of t, "" where one is empty; the run ends if they are not finite."""
    norm = nn.utils.get_total_norm(list(run.net.parameters()))    # not finite after a bad gradient of a good loss
    numbers = torch.cat([sums.flatten(), norm.detach()[None]])
    if WORLD > 1:
        dist.all_reduce(numbers)
    *numbers, norm = numbers.tolist()
    need(math.isfinite(sum(numbers) + norm), f"the loss is not finite at step {run.step}, or since step {since + 1}: "
         "the last good checkpoint is kept; try a lower --lr")
    quarters = {name: numbers[i] / numbers[i + 4] if numbers[i + 4] else "" for i, name in enumerate(QUARTERS)}
    return sum(numbers[:4]) / sum(numbers[4:]), quarters


def log(run, row):
    """Adds a row to log.csv, and says it."""
    run.rows.append(row)
    lines = [row.keys(), *(old.values() for old in run.rows)]
    attempt(write, run.out / "log.csv", [f"{','.join(map(str, line))}\n".encode() for line in lines])
    quarters = " ".join(f"{row[name]:.3f}" if row[name] != "" else "-" for name in QUARTERS)
    seconds = (run.config["steps"] - run.step) * run.config["batch_size"] / max(row["rate"], 0.1)
    say(f"step {run.step}/{run.config['steps']}  loss {row['loss']:.4f} (by t {quarters})  {row['rate']:.0f}/s  "
        f"{datetime.timedelta(seconds=int(seconds))} left"
        + (f"  test {row['test_bits']:.3f} {run.unit}" if row["test_bits"] != "" else ""))


@torch.no_grad()
def held_out(run):
    """Bits of 32 test examples in 100 steps, always with the same noise; writes samples too. "" if a signal comes.
    There is no third split: best.pt is chosen by these examples, which --eval measures too. The noise of training is
    not touched, as each batch has a seed."""
    torch.manual_seed(0)
    x0, y = run.tests(32)
    n, steps = (4, 64) if run.text else (16, 20)
    try:
        bits = run.diffusion.bits_per_dim(run.model(y, exact=True), x0, 100)["total"].mean().item()
        film = draw(run, run.model(run.labels(n)), n, steps)
    except KeyboardInterrupt:
        return ""
    attempt(save_samples, run, film[-1])
    return bits


def compiled(run, t, xt, y):
    """The network for training: with several processes wrapped, on a GPU compiled, else as it is.
    The wrapped network is compiled, so that gradients of the last layers are sent while the first are computed. It is
    compiled now, by one call on something of a batch's shape; the gradients of it are cleared by the first step."""
    network, cuda, n = run.net, run.device.type == "cuda", len(t) // run.config["accumulate"]
    if WORLD > 1:
        network = nn.parallel.DistributedDataParallel(network, [run.device] if cuda else None)
    if not cuda:
        return network
    say("compiling: a minute or two")
    try:
        fast = torch.compile(network)
        run.call(fast, xt[:n], t[:n], None if y is None else y[:n]).float().mean().backward()
        return fast
    except Exception as error:
        if "out of memory" in str(error):
            raise
        say(f"going on uncompiled: {first_line(error)[:100]}")
        return network


def any_process(signals):
    """Whether a signal has come to any process: one answer for all, by gloo, which waits for no GPU."""
    count = torch.tensor(float(len(signals)))
    if WORLD > 1:
        dist.all_reduce(count)
    return bool(count)


# ---------------------------------------------------------------- sampling and evaluation

@torch.no_grad()
def draw(run, model, n, steps, confident=False, **how):
    """n samples as a film, a list of at most 40 states on the way from noise, on the CPU; the last are the samples."""
    film, steps, shape = [], run.diffusion.timesteps(steps), (n, *run.config["shape"])
    if confident:
        return [run.diffusion.sample_any_order(model, shape, "confident", **how).cpu()]
    for i, (s, xs, _) in enumerate(run.diffusion.sample_progressive(model, shape, steps, **how)):
        if s == 0 or i % max(1, (len(steps) + 1) // 20) == 0:
            film.append(xs.cpu())
    return film


def chunks(n, size, what):
    """0..n-1 in slices of a size, with a line for each tenth that is done."""
    for first in range(0, n, size):
        end = min(first + size, n)
        yield slice(first, end)
        if end * 10 // n > first * 10 // n:
            say(f"{what} {end} of {n}")


def sample(run, n, given):
    """n samples into the run's folder, in chunks, as the options ask for them."""
    torch.manual_seed(given.get("seed", run.config["seed"]))
    steps = given.get("sample_steps", run.config["timesteps"] if run.text else 50)
    how = {name: given[name] for name in ("eta", "confident") if name in given}
    how |= {"known": encode_prompt(run, given["prompt"])} if "prompt" in given else {}
    y, samples, film = run.labels(n), [], []
    if "label" in given:
        y = torch.full_like(y, given["label"])
    for part in chunks(n, run.chunk, "sampled"):
        model = run.model(None if y is None else y[part], given.get("guidance", 0), given.get("temperature", 1))
        frames = draw(run, model, part.stop - part.start, steps, **how)
        samples.append(frames[-1])
        film = film or frames
    save_samples(run, torch.cat(samples), film, y)


def encode_prompt(run, prompt):
    """A prompt as the `known` of D3PM.sample, (L,): -1 at a free place and after its end.
    _ and the middle dot are free places, unless the run's text has them: then they stand for themselves."""
    chars, length = run.config["chars"], run.config["length"]
    unknown = sorted(set(prompt) - set(chars) - {"_", "\N{MIDDLE DOT}"})
    need(not unknown, f"--prompt has characters that the run does not know: {unknown}")
    need(len(prompt) <= length, f"--prompt is longer than the run's {length} characters")
    return torch.tensor([chars.find(c) for c in prompt] + [-1] * (length - len(prompt)))


def save_samples(run, x0, film=(), y=None):
    """samples.txt, or samples.png with a row for each class of y; with a film samples.gif too, and of images
    samples.npy and labels.npy."""
    if run.text:
        texts = [f"--- {i + 1}\n{text}\n" for i, text in enumerate(run.texts(x0))]
        write(run.out / "samples.txt", ["\n".join(texts).encode()])
        frames = [text_picture(run.texts(xs[:4])) for xs in film]
    else:
        images, shown, columns = run.pictures(x0), torch.arange(min(64, len(x0))), None
        classes = [] if y is None else y.unique().tolist()
        if len(classes) > 1:
            rows = [(y.cpu() == label).nonzero()[:8, 0] for label in classes]
            columns = min(len(row) for row in rows)
            shown = torch.cat([row[:columns] for row in rows])
        grid_picture(images[shown], columns, least=400).save(run.out / "samples.png")
        for name, array in dict(samples=images.permute(0, 2, 3, 1), labels=y).items():
            if film and array is not None:
                np.save(run.out / f"{name}.npy", array.cpu().numpy())
        frames = [grid_picture(run.pictures(xs[:36])) for xs in film]
    if film:                                # it rests on the last
        frames = [frame.quantize(16) for frame in frames]
        frames[0].save(run.out / "samples.gif", save_all=True, append_images=frames[1:], loop=0,
                       duration=[100] * (len(frames) - 1) + [3000])


def grid_picture(images, columns=None, least=0):
    """uint8 (N, C, H, W) as one picture, square-ish if no columns are given, doubled if narrower than `least`."""
    columns = columns or math.ceil(len(images) ** 0.5)
    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    return ImageOps.scale(picture, 2 if picture.width < least else 1, Image.Resampling.NEAREST)


def text_picture(texts, columns=64):
    """Strings as a picture of typed text, each wrapped at so many columns."""
    lines = [text.replace("\n", " ")[i:i + columns] for text in texts for i in range(0, len(text) + columns, columns)]
    font = ImageFont.truetype(str(FONTS / "DejaVuSansMono.ttf"), 14)
    picture = Image.new("L", (int(columns * font.getlength("x")) + 16, 19 * len(lines)), 255)
    ImageDraw.Draw(picture).multiline_text((8, 8), "\n".join(lines), font=font, fill=0, spacing=6)
    return picture


@torch.no_grad()
def bounds(run, x0, y, steps, guidance):
    """bits_per_dim of x0 given y, in chunks: each entry (B, ...), float64."""
    parts = []
    for part in chunks(len(x0), run.chunk, "bounds"):
        model = run.model(None if y is None else y[part], guidance, exact=True)
        parts.append(run.diffusion.bits_per_dim(model, x0[part], steps))
    return {key: torch.cat([part[key] for part in parts]).double().cpu() for key in parts[0]}


def evaluate(run, n, given):
    """The bound on n test examples, given their labels and without: a table, and term by term in eval.json."""
    torch.manual_seed(given.get("seed", run.config["seed"]))
    (x0, y), guidance = run.tests(n), given.get("guidance", 0)
    grid = run.diffusion.timesteps(given.get("sample_steps", 100))
    bits = bounds(run, x0, y, grid, guidance)
    total, prior, terms, error = (values.mean(0) for values in bits.values())
    windows = len(run.data.test) // run.config["length"] if run.text else len(x0)         # those beyond overlap others
    n = min(len(x0), windows)
    spread = f" +- {bits['total'].std() / n ** 0.5:.4f}" if n > 1 else ""
    told = ("" if y is None else ", given their labels") + (f", with guidance {guidance:g}" if guidance else "")
    quarters = " ".join(f"{quarter.sum():.4f}" if len(quarter) else "-" for quarter in terms[1:].tensor_split(4))
    say(f"{run.config['model']} on {run.data.name}: {total:.4f} {run.unit}{spread} on {len(x0)} test examples, "
        f"{len(grid)} steps{told}\n  L_T {prior:.4f}\n"
        f"  L_t {terms[1:].sum():.4f} in {len(grid) - 1} terms, by quarter of t: {quarters}\n  L_0 {terms[0]:.4f}\n"
        f"  yardsticks: {yardsticks(run)}")
    record = dict(total=total.item(), prior=prior.item(), steps=grid, terms=terms.tolist(),
                  x0_mse_or_error=error.tolist(), examples=len(x0), unit=run.unit, guidance=guidance)
    if y is not None:
        without = bounds(run, x0, None, grid, 0)["total"].mean().item()
        record["total_without_labels"] = without
        say(f"  without labels {without:.4f} {run.unit}")
    write(run.out / "eval.json", [json.dumps(record).encode()])
    say(f"  written: {run.out / 'eval.json'}; python assets/figures.py {run.out} draws it")


def loss_figure(run):
    """loss.png: the loss by quarter of t, and the held-out bound."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in (*QUARTERS, "loss", "test_bits"):
        axis, style = (right, "o-") if name == "test_bits" else (left, "k" if name == "loss" else "")
        rows = [row for row in run.rows if row[name] != ""]
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=name)
    left.set(xlabel="step", title="training loss, by quarter of t", yscale="log")
    left.legend(fontsize=7)
    right.set(xlabel="step", title=f"{run.unit} of 32 test examples, EMA weights")
    figure.savefig(run.out / "loss.png", dpi=110)


def yardsticks(run):
    """What trivial models need: how good is good. Of large images a part of them and of their pixels is counted."""
    def entropy(counts):
        return torch.distributions.Categorical(counts.double()).entropy() / math.log(2)

    train = run.data.train
    if run.text:
        return f"unigram {entropy(torch.bincount(train)):.2f} bits/char"
    K, D = run.config.get("levels", 256), train[0].numel()
    images = train[:min(20000, max(1000, 4 * 10 ** 8 // D))].flatten(1)[:, ::1 + D // 4096]
    counts = torch.stack([torch.bincount(pixel.long() * K // 256, minlength=K) for pixel in images.T])
    return (f"the grey values' histogram {entropy(counts.sum(0)):.2f} bits/dim, "
            f"each pixel's own histogram {entropy(counts).mean():.2f}")


# ---------------------------------------------------------------- data

def load_data(source, data_dir, size=32):
    """A data set by name or path: train and test as uint8 (N, C, H, W), or the characters' numbers (N,).
    None is Fashion-MNIST, or glyphs with one line saying so where it can't be had. chars are a text's characters in
    order, or None; train_labels and test_labels int64 (N,) and classes their names, or None and []. source finds the
    data again, fingerprint (how many, and a checksum) tells whether they are the same."""
    name, data_dir = source or "fashion-mnist", pathlib.Path(data_dir)
    data = SimpleNamespace(name=name, source=name, chars=None, folder=False, train_labels=None, test_labels=None,
                           classes=[], fingerprint=None)
    if name in TORCHVISION:
        try:
            load_torchvision(data, data_dir)
        except Exception as error:
            need(source is None, f"{name} can't be had ({first_line(error)}). Put torchvision's files under "
                 f"{data_dir / TORCHVISION[name]}, or choose another --data")
            say(f"Fashion-MNIST can't be had ({first_line(error)}): training on the built-in glyphs instead.")
            return load_data("glyphs", data_dir)
    elif name == "glyphs":
        load_glyphs(data)
    elif name == "docs" or pathlib.Path(name).is_file():
        load_text(data)
    else:
        known = f"{', '.join(TORCHVISION)}, glyphs, docs"
        need(pathlib.Path(name).is_dir(), f"--data {name} is neither a known data set ({known}) nor a file or folder")
        load_folder(data, data_dir, size)
    if not data.fingerprint:
        crc = zlib.crc32(data.test.contiguous().numpy(), zlib.crc32(data.train.contiguous().numpy()))
        data.fingerprint = f"{len(data.train)}-{crc:08x}"
    return data


def load_torchvision(data, data_dir):
    """Files that are there, else torchvision's download, which is given up when no byte comes for some seconds."""
    cls, patience = getattr(torchvision.datasets, TORCHVISION[data.name]), socket.getdefaulttimeout()
    socket.setdefaulttimeout(7)             # torchvision tries two addresses
    try:
        splits = [cls(data_dir, train=train, download=True) for train in (True, False)]
    finally:
        socket.setdefaulttimeout(patience)
    images = [torch.as_tensor(split.data) for split in splits]
    data.train, data.test = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous() for x in images]
    data.train_labels, data.test_labels = [torch.as_tensor(split.targets).long() for split in splits]
    data.classes = list(splits[0].classes)


def load_glyphs(data):
    """Grey 28 x 28 letters and digits: matplotlib's fonts, turned, scaled, sheared and moved a little at random."""
    data.classes, cells = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"), []
    for file in sorted(set(FONTS.glob("DejaVuS[ae]*.ttf")) - set(FONTS.glob("*Display.ttf"))):     # Sans, Serif
        font = ImageFont.truetype(str(file), 40)
        for c in data.classes:
            cell = Image.new("L", (56, 56))
            ImageDraw.Draw(cell).text((28, 28), c, font=font, fill=255, anchor="mm")
            cells.append(torch.from_numpy(np.array(cell)))
    splits = []
    for n, seed in ((20000, 1), (2000, 2)):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(cells), (n,), generator=generator)
        noise = 2 * torch.rand(n, 6, generator=generator) - 1            # angle, scale, shear, x, y; the sixth is spare
        angle, scale, shear = 0.15 * noise[:, 0], 1 + 0.15 * noise[:, 1], 0.15 * noise[:, 2]
        turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
        theta = torch.cat([turn * scale[:, None, None], 0.1 * noise[:, 3:5, None]], dim=2)
        grid = nn.functional.affine_grid(theta, (n, 1, 56, 56), align_corners=False)
        large = nn.functional.grid_sample(torch.stack(cells)[index, None].float(), grid, align_corners=False)
        splits.append((nn.functional.avg_pool2d(large, 2).round().to(torch.uint8), index % len(data.classes)))
    (data.train, data.train_labels), (data.test, data.test_labels) = splits


def load_text(data):
    """The characters of docs or of a UTF-8 file as numbers, a byte each where there are up to 256."""
    text, path = "\n\n".join(pydoc_data.topics.topics.values()), pathlib.Path(data.name).resolve()
    if data.name != "docs":
        data.name, data.source = path.stem, str(path)
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    data.chars = "".join(sorted(set(text)))
    binary = any(c == "\0" or "\udc80" <= c <= "\udcff" for c in data.chars)       # surrogates: undecodable bytes
    need(not binary, f"{path} is not UTF-8 text")
    need(len(text) >= 1000, f"{path} is too short to learn from ({len(text)} characters)")
    number = {c: i for i, c in enumerate(data.chars)}
    kind = np.uint8 if len(number) <= 256 else np.int16 if len(number) < 2 ** 15 else np.int32
    numbers, tests = np.fromiter(map(number.get, text), kind, len(text)), len(text) // 10
    data.train, data.test = torch.from_numpy(numbers).split([len(text) - tests, tests])


def load_folder(data, data_dir, size):
    """All images below a folder in a random order, decoded once into a file; the sub-folders are their classes."""
    folder = pathlib.Path(data.name).resolve()
    data.folder, data.name, data.source, files = True, folder.name, str(folder), image_files(folder)
    stats = [(file, os.stat(folder / file)) for file in files]
    key = zlib.crc32(ascii([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]).encode())
    pixels, facts_file = [data_dir / f"{folder.name}-{size}-{key:08x}.{kind}" for kind in ("pixels", "about.json")]
    if not facts_file.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        facts = dict(labels=[], left_out=[], grey=True, crc=0)
        write(pixels, decode(folder, files, size, facts))
        write(facts_file, [json.dumps(facts).encode()])
    facts = json.loads(facts_file.read_text())
    labels, left_out, n = facts["labels"], facts["left_out"], len(facts["labels"])
    if left_out:
        say(f"left out {len(left_out)} of {len(files)} files that can't be read as images: {', '.join(left_out[:5])}")
    need(n >= 2, f"{folder} holds {n} images: at least 2 are needed (one is held out)")
    images, tests = torch.from_numpy(np.memmap(pixels, np.uint8, "c", shape=(n, 3, size, size))), max(1, n // 10)
    data.test, data.train = images[:, :1 if facts["grey"] else 3].split([tests, n - tests])
    data.classes, data.fingerprint = sorted(set(labels) - {""}), f"{n}-{facts['crc']:08x}"
    labels = torch.tensor([data.classes.index(label) if label else -1 for label in labels])
    data.test_labels, data.train_labels = labels.split([tests, n - tests])


def image_files(folder):
    """Paths below a folder that look like images, in order; links are followed, hidden files and runs are no data."""
    kinds = {kind for kind, name in Image.registered_extensions().items() if name in Image.OPEN}
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real, is_run = os.path.realpath(place), {"config.json", ".lock"} <= set(names)
        if real in seen or is_run:          # a link to a folder above would go round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [pathlib.Path(place, name) for name in names if not name.startswith(".")]
        files += [os.path.relpath(path, folder) for path in paths if path.suffix.lower() in kinds and path.is_file()]
    return sorted(files)


def decode(folder, files, size, facts):
    """Yields the pixels of each file that can be read, as bytes, in a random order. Fills `facts`: their labels and
    checksum, whether all are grey, and the files left out."""
    files = [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(16, cpus) if len(files) > 1000 else 0                             # to start them takes a while
    images = torch.utils.data.DataLoader([str(folder / file) for file in files], batch_size=None, num_workers=workers,
                                         collate_fn=functools.partial(square, size=size))
    for _, file, image in zip(chunks(len(files), 1, "decoding"), files, images):
        name = os.fsencode(file).decode(errors="backslashreplace")
        if image is None:
            facts["left_out"].append(name)
        else:
            pixels = image.tobytes()
            facts["crc"] = zlib.crc32(pixels, facts["crc"])
            facts["labels"].append(name.split(os.sep)[0] if os.sep in name else "")
            facts["grey"] = facts["grey"] and bool((image == image[:1]).all())
            yield pixels


def square(file, size):
    """An image, upright, centre-cropped and scaled: uint8 (3, size, size), or None where it can't be read."""
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)               # cameras store how they were held
            if image.mode[0] in "IF":       # 16 bits and more, or floats, which convert would cut at 255
                image = Image.fromarray(to_8_bits(np.asarray(image, np.float32), image.mode == "F"))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return np.array(image).transpose(2, 0, 1)
    except Exception:
        return None


def to_8_bits(values, floats):
    """Deep grey values as uint8, over the first usual range that holds them, else over their own."""
    finite = values[np.isfinite(values)]
    low, high = finite.min(), finite.max()                       # ValueError where there is none: no image
    usual = [(0, 1), (-1, 1)] if floats else [(0, 2 ** bits - 1) for bits in (8, 10, 12, 14, 16)]
    low, high = next(((a, b) for a, b in usual if a <= low and high <= b), (low, high))
    shares = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return (255 * shares).astype(np.uint8)


# ---------------------------------------------------------------- files

def find_folder(given):
    """Where the run that the options name lives."""
    model, path = given.get("model", "ddpm"), pathlib.Path(given.get("data", "fashion-mnist")).resolve()
    out = pathlib.Path(given.get("out", f"runs/{model}-{path.name if path.is_dir() else path.stem}"))
    glyphs = pathlib.Path(f"runs/{model}-glyphs")               # in place of Fashion-MNIST where it can't be had
    return glyphs if not given.keys() & {"out", "data"} and not out.exists() and glyphs.exists() else out


def prepare(given, device):
    """The run with its data: with --resume that of the checkpoint, if there is one."""
    out = find_folder(given)
    if "resume" in given and (out / "checkpoint.pt").exists():
        run = load(out / "checkpoint.pt", device)
        old = run.config
        differ = [f"{name.replace('_', '-')} {old.get(name)} there, {given[name]} here" for name in FIXED
                  if name in given and given[name] != old.get(name)]
        need(not differ, f"{out} has other settings ({'; '.join(differ)}): leave them out, or choose another --out")
        find_data(run, given)
        old |= dict(data=run.data.source) | {name: given[name] for name in FREE if name in given}
        need(run.step < old["steps"], f"the run in {out} has done its {run.step} steps: --steps N trains longer")
    else:
        data = load_data(given.get("data"), given.get("data_dir", "data"), given.get("size", 32))
        config = complete(given, data, device)
        out = pathlib.Path(given.get("out", f"runs/{config['model']}-{data.name}"))
        done = (out / "checkpoint.pt").exists() or (out / "best.pt").exists()
        need(not done, f"{out} already holds a run: --resume its checkpoint.pt, or choose another --out")
        try:                                # one call, so that sizes that don't fit are told now
            run = Run(config, device, out, data)
            run.diffusion.loss_simple(run.net, run.tests(1)[0])
        except ValueError as error:
            fail(f"{error}; see --size, --width, --levels and --length")
    B, parts = run.config["batch_size"], WORLD * run.config["accumulate"]
    need(B % parts == 0, f"--batch-size {B} does not divide by {parts}: --accumulate times the processes")
    return run


def find_data(run, given):
    """Gives a run its data, wherever they are now; they must be what it began with."""
    source = given.get("data", run.config["data"])
    run.data = load_data(source, given.get("data_dir", "data"), run.config.get("size", 32))
    need((run.data.fingerprint, run.data.chars) == (run.config["fingerprint"], run.config["chars"]),
         f"{run.data.source} is not the data of the run in {run.out}, or has changed since it began: bring that back, "
         "or choose another --out")


def load(path, device):
    """The run in a checkpoint; one line where there is none or it can't be read."""
    need(path.exists(), f"no checkpoint in {path.parent}: train first, or name the run with --out")
    previous = path.with_name("checkpoint.previous.pt")
    advice = f"; the one before is {previous}: copy it there" if previous.exists() else ""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):          # a broken disk or a full memory is no damage of the file
        raise
    except Exception:
        fail(f"{path} is damaged or no checkpoint{advice}")
    try:
        run = Run(state["config"], device, path.parent)
        run.step, run.rows = state["step"], state["rows"]
        run.net.load_state_dict(state["model"])
        run.ema.load_state_dict(state["ema"])
        run.early.load_state_dict(state["early"])
        for optimizer, moments in zip(run.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(moments)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        if "out of memory" in str(error):
            raise
        fail(f"{path} is of another version of train.py, or no checkpoint of it ({first_line(error)})")
    return run


def load_run(given, device):
    """The run to use: best.pt, the weights of the best held-out bound, or checkpoint.pt before there is one."""
    out = find_folder(given)
    path = out / "best.pt" if (out / "best.pt").exists() else out / "checkpoint.pt"
    run = load(path, device)
    say(f"EMA weights of step {run.step}, from {path}")
    classes, config = run.config["classes"], run.config
    means = dict(eta=not run.discrete, variance=not run.discrete, temperature=run.discrete, prompt=run.text,
                 confident=config.get("transition") == "absorbing", label=classes,
                 model=given.get("model") == config["model"])
    for name in means.keys() & given.keys():
        need(means[name], f"--{name} has no meaning for the run in {out}, which is of {config['model']} on "
             f"{config['data']} with{'' if classes else 'out'} --labels")
    eighth = config["steps"] // 8
    need(classes or not given.get("guidance") or run.step > eighth, "--guidance without labels pushes away from the "
         f"weights of step {eighth}, and these are of step {run.step}: train further with --resume")
    need(not {"confident", "sample_steps"} <= given.keys(), "--confident takes a step a place: no --sample-steps")
    names = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
    need(given.get("label", -1) < len(classes), f"--label must be one of {names}, got {given.get('label')}")
    if "variance" in given:
        need(config["variance"] == "learned" or given["variance"] != "learned",
             f"the run in {out} has learnt no variance: --variance takes a number there")
        run.diffusion.variance = given["variance"]
    return run


def save_checkpoint(run, best):
    """checkpoint.pt, the one before as checkpoint.previous.pt, and the best so far as best.pt."""
    buffer, path = io.BytesIO(), run.out / "checkpoint.pt"
    torch.save(dict(model=run.net.state_dict(), ema=run.ema.state_dict(), early=run.early.state_dict(), step=run.step,
                    config=run.config, rows=run.rows, optimizer=[o.state_dict() for o in run.optimizers]), buffer)
    if path.exists():
        link(path, run.out / "checkpoint.previous.pt")
    write(path, [buffer.getbuffer()])
    if best:
        link(path, run.out / "best.pt")


def link(path, other):
    """A second path to a file, which costs no second write; a copy where the file system has no links."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        other.write_bytes(path.read_bytes())


def write(path, pieces):
    """Bytes in pieces into a temporary file, flushed to the disk, then renamed: path never holds half of them."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def attempt(save, *arguments):
    """Save something that training can go on without: a full disk is a warning. -> whether it worked"""
    try:
        save(*arguments)
        return True
    except OSError as error:
        say(f"warning: {error.filename or save.__name__}: {error.strerror or error}; going on")
        return False


# ---------------------------------------------------------------- what was asked for

def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def find_device(name=None):
    """The device that was asked for, else the best one there is; it must run a kernel, not only be there."""
    kind = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        local = os.environ.get("LOCAL_RANK", RANK % max(1, torch.cuda.device_count()))
        device = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        torch.ones(1, device=device).add(1).item()
        return device
    except (RuntimeError, AssertionError) as error:
        need(name is None, f"--device {name} can't be used here ({first_line(error)})")
        say(f"{kind} can't be used here ({first_line(error)}): going on with the CPU")
        return torch.device("cpu")


def command(given, store):
    """Train, sample or evaluate."""
    device = find_device(given.get("device"))
    if not {"sample", "eval"} & given.keys():
        if WORLD > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # gloo is for what the processes agree on between steps, on the CPU: no GPU is waited for
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK,
                                    world_size=WORLD, timeout=datetime.timedelta(days=1))
        run = train(given, device)
    else:
        need(WORLD == 1, "--sample and --eval run on one process: leave torchrun out")
        run = load_run(given, device)
        if "sample" in given:
            sample(run, given["sample"], given)
        if "eval" in given:
            find_data(run, given)
            evaluate(run, given["eval"], given)
    say(f"in {run.out}: {', '.join(sorted(file.name for file in run.out.glob('[!.]*')))}")


def main(argv=None):
    """Do what the command line says; every foreseeable fault ends in one line, which one process says."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed by >&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                      # what the terminal can't show is written out
            stream.reconfigure(errors="backslashreplace")
    store = None
    try:
        if WORLD > 1:
            need({"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(), "for several processes, start them by torchrun")
            store = next(dist.rendezvous("env://"))[0]
        try:
            command(options(argv), store)
        except KeyboardInterrupt:
            fail("interrupted")
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else first_line(error))
        except (MemoryError, RuntimeError) as error:
            line, text = first_line(error)[:100], str(error)
            if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
                fail(f"out of memory: try a smaller --batch-size, or --accumulate 2 ({line})")
            if WORLD > 1 and ("gloo" in text or isinstance(error, dist.DistError)):
                fail(f"another process has ended ({line})")
            raise                           # a mistake in the code keeps its traceback
    except SystemExit as end:
        faults = store.add("faults", 1) if store is not None and end.code else 1
        raise SystemExit(end.code if faults == 1 else 1) from None               # else another process has said it


if __name__ == "__main__":
    main()
