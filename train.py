"""Train, sample and measure the diffusion models of ddpm.py and d3pm.py.

    python train.py                                images by DDPM, sized for this machine
    python train.py --plain                        the same as the papers have it, without this file's recipe
    python train.py --model d3pm --data docs       text by D3PM
    python train.py --sample 64                    new samples from the run's checkpoint
    python train.py --eval                         bits/dim on the test split, term by term
    torchrun --nproc-per-node=8 train.py           the same run on eight devices

In order: options; the run, one batch, the objective, the loop; sampling and evaluation; data and files.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import io
import json
import math
import os
import pathlib
import pydoc_data.topics
import shutil
import signal
import socket
import sys
import time
import zlib
from types import SimpleNamespace

# Threads of a CPU that others use too must soon sleep while they wait: spinning, a run can be ten times slower there.
# Some microseconds of it (GNU's OpenMP counts turns) spare most of the sleeps: half as fast again where no one else is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import d3pm
import ddpm

try:
    import fcntl
except ImportError:                     # Windows has none: there two runs in one folder are not told apart
    fcntl = None

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
FONTS = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}


def fail(message):
    """A user's mistake or the machine's fault: one line and no traceback. See main for several processes."""
    raise SystemExit(f"train.py: {f'rank {RANK}: ' if WORLD > 1 else ''}{message}")


# ---------------------------------------------------------------- options

# Network, batch, steps and peak learning rate by what is trained and where; mps takes the CPU's.
# On a GPU the U-Net takes 6.0 GFLOP an image forward and backward, 1.5e16 in all; the Transformer 4.2 an example and
# 3.2e15, and sees the 419,000 characters of docs 235 times.
UNET = {"cpu": dict(width=32, mults=(1, 2), blocks=1, attention=(1,), patch=2, batch_size=24, lr=5e-3, steps=6300),
        "gpu": dict(width=128, mults=(1, 2), blocks=2, attention=(1,), patch=2, batch_size=128, lr=1e-3, steps=20000)}
TRANSFORMER = {"cpu": dict(width=128, depth=4, batch_size=16, lr=5e-3, steps=9000),
               "gpu": dict(width=256, depth=6, dropout=0.1, batch_size=64, lr=2e-3, steps=12000)}
PIXELS = {"cpu": dict(batch_size=16, steps=3000), "gpu": dict(steps=12000)}        # where d3pm's U-Net differs
SCHEDULES = dict(uniform="cosine", absorbing="mutual", gaussian="linear")

# What a run's weights depend on beside its data: a resumed run must agree with it. Steps and lr may change.
SETTINGS = ("model batch_size seed dropout labels plain timesteps schedule prediction variance transition levels size "
            "length width").split()
# The options that have a meaning for each thing that can be asked for.
MEANINGFUL = dict(train=f"data data_dir out device resume save_every accumulate steps lr {' '.join(SETTINGS)}".split(),
                  sample="model data out device seed sample sample_steps variance eta temperature prompt label "
                         "guidance".split(),
                  eval="model data data_dir out device seed eval sample_steps variance".split())


def options(argv=None):
    """The command line as a dictionary of what was given; a checkpoint or `complete` knows the rest."""
    p = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=80),
        description="Train a diffusion model; or use one, with --sample or --eval.")
    p.error = fail
    add = p.add_argument
    add("--model", choices=["ddpm", "d3pm"], help="Gaussian or discrete noise (ddpm)")
    add("--data", metavar="D", help="fashion-mnist, mnist, cifar10, glyphs, docs, a folder of "
        "images or a .txt file (fashion-mnist; glyphs if it can't be had)")
    add("--data-dir", metavar="DIR", help="where data sets are, or go to (data)")
    add("--out", metavar="DIR", help="where the run lives (runs/<model>-<data>)")
    add("--steps", type=int, metavar="N", help="training steps (by model and device)")
    add("--batch-size", type=int, metavar="N", help="examples a step on all devices (by device)")
    add("--accumulate", type=int, metavar="N", help="parts of a batch, for less memory (1)")
    add("--lr", type=float, help="peak learning rate (by model)")
    add("--dropout", type=float, metavar="P", help="(0; text on a GPU 0.1)")
    add("--seed", type=int, metavar="N", help="of weights, batches, noise, samples (0)")
    add("--device", help="cpu, cuda, cuda:1, mps (the best found)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (1000 at most)")
    add("--resume", action="store_true", help="go on with the run in --out, or begin it")
    add("--plain", action="store_true", help="the papers' recipe: eps, uniform t, Adam")
    add("--labels", action="store_true", help="learn the classes of the data set too")
    add("--sample", type=int, metavar="N", help="write N samples of the run in --out")
    add("--sample-steps", type=int, metavar="N", help="of --sample (images 50) and --eval (100)")
    add("--eta", type=float, help="sample by DDIM: 0 no noise, 1 ancestral")
    add("--temperature", type=float, metavar="X", help="of d3pm's guess in samples (1)")
    add("--label", type=int, metavar="N", help="class of the samples (all, a row each)")
    add("--guidance", type=float, metavar="W", help="push samples towards their class (0)")
    add("--prompt", metavar="TEXT", help="text to complete; _ is a free place (or \N{MIDDLE DOT})")
    add("--eval", type=int, nargs="?", const=1000, metavar="N", help="bits/dim on N test examples (1000)")
    add("--timesteps", type=int, metavar="T", help="length of the chain (1000; text: --length)")
    add("--schedule", choices=["cosine", "linear", "mutual"], help="betas (cosine; by --transition)")
    add("--prediction", choices=["eps", "x0", "v"], help="what ddpm's network estimates (v)")
    add("--variance", type=variance, metavar="V", help="of ddpm's reverse step: learned, or 0..1 (learned)")
    add("--transition", choices=list(SCHEDULES), help="noise of d3pm (gaussian; text: absorbing)")
    add("--levels", type=int, metavar="K", help="grey levels of d3pm's images (256)")
    add("--size", type=int, metavar="N", help="pixels a side, for a folder of images (32)")
    add("--length", type=int, metavar="N", help="characters of an example of text (128)")
    add("--width", type=int, metavar="N", help="channels of the network (by device)")
    given = vars(p.parse_args(argv))
    check_meaning(given)
    for name in {"data", "data_dir", "out"} & given.keys():        # the shell leaves --out=~/x as it is
        given[name] = os.path.expanduser(given[name])
    return given


def variance(text):
    """--variance: learned, or a number."""
    return text if text == "learned" else float(text)


def check_meaning(given):
    """One line for a number out of its range, or an option that means nothing for what is asked."""
    ranges = dict(seed=(0, 2 ** 40), eta=(0, 1), variance=(0, 1), levels=(2, 256), lr=(1e-9, 1e3), dropout=(0, 0.9),
                  temperature=(0.01, 100), label=(0, math.inf), guidance=(-1, 100))
    asked = [use for use in ("sample", "eval") if use in given] or ["train"]
    for name, value in given.items():
        flag, (low, high) = f"--{name.replace('_', '-')}", ranges.get(name, (1, math.inf))
        if not any(name in MEANINGFUL[use] for use in asked):
            fail(f"{flag} has no meaning " + ("in training" if asked == ["train"] else f"with --{' --'.join(asked)}"))
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"{flag} must lie in {low:g}..{high:g}, got {value}")


def complete(given, data, device):
    """The whole configuration of a run: what was given, then defaults by model, data and device."""
    model, plain = given.get("model", "ddpm"), given.get("plain", False)
    text, discrete, place = data.chars is not None, model == "d3pm", "gpu" if device.type == "cuda" else "cpu"
    if text and not discrete:
        fail(f"--data {data.name} is text: it needs --model d3pm")
    if given.get("labels") and not data.classes:
        fail(f"--labels: {data.name} has no labels" + (", being text" if text else ""))
    network = dict(dropout=0.0) | (TRANSFORMER[place] if text else UNET[place])
    if not text:
        network |= dict(fourier=(0, 1, 2, 3) if discrete else (2, 4, 6)) | (PIXELS[place] if discrete else {})
    if plain:
        network |= dict(lr=1e-3) | ({} if text else dict(fourier=(), patch=1))
    length = given.get("length", 128)
    config = dict(model=model, data=data.source, fingerprint=data.fingerprint, seed=0, plain=plain, labels=False,
                  timesteps=length if text else 1000, schedule="cosine")
    config |= {name: network.pop(name) for name in ("steps", "batch_size", "lr", "width", "dropout")}
    if discrete:
        transition = given.get("transition", "absorbing" if text else "gaussian")
        config |= dict(transition=transition, schedule=SCHEDULES[transition])
        config |= dict(length=length) if text else dict(levels=256)
    else:
        config |= dict(prediction="eps" if plain else "v", variance="learned")
    config |= dict(size=data.train.shape[-1]) if data.folder else {}
    settings = {name: given[name] for name in ("steps", "lr", *SETTINGS) if name in given}
    for name in settings.keys() - config.keys():
        fail(f"--{name.replace('_', '-')} has no meaning for --model {model} on --data {data.name}")
    config |= settings
    if config.get("transition") == "absorbing" and config["schedule"] != "mutual":
        fail(f"--schedule {config['schedule']} leaves places without a mask at T: --transition absorbing needs mutual")
    shape = [length] if text else list(data.train.shape[1:])
    # Photos may be mirrored, but garments, digits and letters have a side.
    mirror = not text and (data.folder or shape[0] == 3)
    return config | dict(shape=shape, chars=data.chars, classes=data.classes if config["labels"] else [],
                         mirror=mirror, network=network)


# ---------------------------------------------------------------- the run

def build(config):
    """The network and the diffusion that a configuration describes."""
    T, size = config["timesteps"], config["network"] | dict(width=config["width"], dropout=config["dropout"])
    if config["classes"]:
        size["classes"] = len(config["classes"])
    try:
        if config["model"] == "ddpm":
            schedule = dict(cosine=ddpm.cosine_beta_schedule, linear=ddpm.linear_beta_schedule)[config["schedule"]]
            diffusion = ddpm.GaussianDiffusion(schedule(T), config["prediction"], config["variance"])
            C, H, W = config["shape"]
            return ddpm.UNet(C, 2 * C if config["variance"] == "learned" else C, **size), diffusion
        betas = dict(cosine=d3pm.cosine_betas, linear=d3pm.linear_betas, mutual=d3pm.mutual_information_betas)
        K = (len(config["chars"]) if config["chars"] else config["levels"]) + (config["transition"] == "absorbing")
        family = dict(uniform=d3pm.uniform_transition, absorbing=d3pm.absorbing_transition,
                      gaussian=d3pm.gaussian_transition)[config["transition"]]
        diffusion = d3pm.D3PM(family(K, betas[config["schedule"]](T)))
        if config["chars"]:
            return d3pm.Transformer(K, config["shape"], **size), diffusion
        C, mask = config["shape"][0], diffusion.transition.mask
        return d3pm.PixelLogits(ddpm.UNet(2 * C, C * d3pm.pixel_outputs(K), **size), K, mask), diffusion
    except KeyError:
        fail(f"--schedule {config['schedule']} is not for --model {config['model']}")
    except ValueError as error:
        fail(str(error))


class Stopped(Exception):
    """A signal came while a network was sampled or measured in training."""


class Run:
    """A configuration with the network and the diffusion that it describes, and what follows from them.

    net is trained; ema, the moving average of its weights, makes the samples and the bounds.
    """

    def __init__(self, config, device):
        torch.manual_seed(config["seed"])
        net, diffusion = build(config)
        self.config, self.device = config, device
        self.discrete, self.text = config["model"] == "d3pm", bool(config["chars"])
        self.unit = "bits/char" if self.text else "bits/dim"
        self.net, self.diffusion = net.to(device, memory_format=torch.channels_last), diffusion.to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        # Cards before compute capability 8 only emulate bfloat16.
        self.bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        self.optimizers = optimizers(self.net, config, self.bf16)
        self.step, self.rows, self.signals = 0, [], []                # rows of log.csv, signals to stop

    def state(self):
        """Everything that the next step depends on, for a checkpoint."""
        return dict(model=self.net.state_dict(), ema=self.ema.state_dict(), step=self.step, config=self.config,
                    optimizer=[optimizer.state_dict() for optimizer in self.optimizers], rows=self.rows)

    def load(self, state):
        self.net.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, moments in zip(self.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(moments)
        self.step, self.rows = int(state["step"]), state["rows"]

    def call(self, net, xt, t, y=None):
        """A network's output, computed in bfloat16 where the device has it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return net(xt, t) if y is None else net(xt, t, y)

    def model(self, y=None, guidance=0.0, temperature=1.0, exact=False):
        """ema as a model(xt, t): given labels y, guided, with its logits at a temperature; exact: all in float32."""
        def network(xt, t, y=None):
            if self.signals:
                raise Stopped
            out = (self.ema(xt, t) if y is None else self.ema(xt, t, y)) if exact else self.call(self.ema, xt, t, y)
            if self.discrete:
                return out if temperature == 1 else out / temperature
            return out if self.diffusion.variance == "learned" else out[:, :self.config["shape"][0]]

        if y is None:
            return network
        if guidance:
            return (d3pm if self.discrete else ddpm).guided(network, y, guidance)
        return lambda xt, t: network(xt, t, y)

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
        return split.unfold(0, self.config["length"], 1) if self.text else split


# ---------------------------------------------------------------- one batch

def batch(run, examples, labels=None):
    """x0, t, noise (for d3pm: xt) and labels of one step, each (B, ...); this process's part of them.

    They are drawn by (seed, step) for the whole batch, so that a run is the same however often it is stopped, and on
    any number of processes. A tenth of the labels is dropped, so that one network learns p(x) beside p(x | y).
    """
    config, device, B = run.config, run.device, run.config["batch_size"]
    torch.manual_seed(config["seed"] * 1_000_003 + run.step)
    index = torch.randint(len(examples), (B,), device=examples.device)
    x = examples[index]
    if x.device != device:
        x = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
    x0 = run.states(x)
    if config["mirror"]:
        x0 = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, x0, x0.flip(-1))
    t = times(run)
    noise = run.diffusion.q_sample(x0, t) if run.discrete else torch.randn_like(x0)
    part = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
    y = None
    if labels is not None:
        y = labels[index.to(labels.device)].masked_fill(torch.rand(B, device=device) < 0.1, -1)[part]
    if config["dropout"]:        # each process drops out units of its own
        torch.manual_seed((config["seed"] * 1_000_003 + run.step) * 4096 + RANK + 1)
    return x0[part], t[part], noise[part], y


def times(run):
    """t of a whole batch, int64 (B,) in 1..T.

    Papers: uniform. Recipe: stratified, one t in each of B equal shares, which is the same mean loss with less noise;
    and for v in proportion to 1/2 + alpha_bar_t: the error of eps is alpha_bar_t times that of v, so small t, where
    the bits are spent, come thrice as often as the largest, which decide the coarsest features of an image.
    """
    B, T, device = run.config["batch_size"], run.config["timesteps"], run.device
    if run.config["plain"]:
        return torch.randint(1, T + 1, (B,), device=device)
    share = (torch.arange(B, device=device) + torch.rand(1, device=device)) / B
    if run.config.get("prediction") != "v":
        return (share * T).long().clamp(max=T - 1) + 1
    mass = (0.5 + run.diffusion.alpha_bar[1:]).float().to(device).cumsum(0)
    return torch.searchsorted(mass, share * mass[-1], right=True).clamp(max=T - 1) + 1


# ---------------------------------------------------------------- the objective

# The loss that trains each of d3pm's families best: the cross-entropy, or the bound.
LOSSES = dict(uniform="loss_simple", absorbing="loss_vlb", gaussian="loss_vlb")


def objective(run, model, x0, t, noise):
    """The loss (B,) that train.py minimises."""
    diffusion, config = run.diffusion, run.config
    if run.discrete:
        loss = "loss_hybrid" if config["plain"] else LOSSES[config["transition"]]
        return getattr(diffusion, loss)(model, x0, t, noise)
    if config["variance"] != "learned":
        return diffusion.loss_simple(model, x0, t, noise)
    if config["plain"]:
        return diffusion.loss_hybrid(model, x0, t, noise)
    # Recipe: learn the variance of steps as long as those of --eval. The slope of the bound in the variance goes as
    # log(beta / beta_tilde)^2, about 1 / t^2, so that under one weight it would be learnt at small t alone. Hence a
    # weight that rises from the paper's 1e-3 to about 1.
    T = config["timesteps"]
    s = (t - math.ceil(T / 100)).clamp(min=1).minimum(t - 1)
    return diffusion.loss_hybrid(model, x0, t, noise, s, 1e-3 + (t / T) ** 2)


class Muon(torch.optim.Optimizer):
    """Matrices that step in all their directions alike: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.

    The averaged gradient has a few large singular values; set to 1, the rare directions learn as fast. Times
    0.2 sqrt(longer side) the step is of Adam's size and can have Adam's learning rate (Liu et al. 2025, 2502.16982).
    A convolution is the matrix (out, in height width). torch.optim.Muon takes 2 D weights alone and multiplies
    them in bfloat16, which most CPUs lack: there this one, in float32 and all of a size at once, is ten times as fast.
    """

    def __init__(self, weights, lr, dtype=torch.float32):
        sizes = {}
        for w in weights:
            sizes.setdefault(tuple(sorted((len(w), w[0].numel()))), []).append(w)
        super().__init__([dict(params=same_size) for same_size in sizes.values()], dict(lr=lr))
        self.dtype = dtype
        for w in weights:
            self.state[w]["mean"] = torch.zeros_like(w)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            tall, grads = [len(w) > w[0].numel() for w in weights], [w.grad for w in weights]
            means = [self.state[w]["mean"] for w in weights]
            torch._foreach_lerp_(means, grads, 0.1)
            ahead = [g.flatten(1) for g in torch._foreach_lerp(grads, means, 0.9)]          # Nesterov
            ahead = torch.stack([g.mT if high else g for g, high in zip(ahead, tall)])
            steps = orthogonal(ahead.to(self.dtype)).to(ahead.dtype)
            steps = [(step.mT if high else step).reshape(w.shape) for step, w, high in zip(steps, weights, tall)]
            torch._foreach_add_(weights, steps, alpha=-group["lr"] * 0.2 * ahead.shape[-1] ** 0.5)


def orthogonal(x):
    """Matrices (N, rows, columns >= rows) with the same singular vectors, and all singular values near 1.

    Newton and Schulz's iteration with Jordan's coefficients, which trade exactness for speed: a singular value above
    2 % of the matrix's norm ends between 0.68 and 1.21. Three steps taught as well as the usual five.
    """
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(3):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def optimizers(net, config, bf16=False):
    """Papers: Adam. Recipe: Muon for the matrices inside a network, Adam for its biases, norms and embeddings."""
    if config["plain"]:
        return [torch.optim.Adam(net.parameters(), config["lr"], fused=True)]
    inside = [m.weight for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    rest = [p for p in net.parameters() if all(p is not w for w in inside)]
    return [Muon(inside, config["lr"], torch.bfloat16 if bf16 else torch.float32),
            torch.optim.Adam(rest, config["lr"], betas=(0.9, 0.99), fused=True)]


def learning_rate(step, steps, peak):
    """Linear warm-up over the first 2 % of the steps (at most 1000), and a straight line from the peak down to 0."""
    warm = min(1000, steps // 50 + 1)
    return peak * min((step + 1) / warm, 1 - step / steps)


# ---------------------------------------------------------------- the loop

def train(given, device):
    """One run: new, or resumed from its checkpoint."""
    data, config, state, out = in_turn(lambda: prepare(given, device))
    accumulate, B = given.get("accumulate", 1), config["batch_size"]
    if B % (WORLD * accumulate):
        fail(f"--batch-size {B} does not divide by {WORLD} processes times --accumulate {accumulate}")
    run = Run(config, device)
    if state:
        restore(run, state, out / "checkpoint.pt")
    examples, labels = run.examples(data.train), data.train_labels if config["classes"] else None
    if data.train.nbytes < 1e9:
        examples = run.examples(data.train.to(device))
    labels = None if labels is None else labels.to(device)
    parts = batch(run, examples, labels)
    check_fit(run, *(None if part is None else part[:1] for part in parts))
    lock = open_run(out, config) if RANK == 0 else None        # the lock goes when this name does
    introduce(run, data, out)
    network = compiled(run, *(None if part is None else part[:len(part) // accumulate] for part in parts))
    save_every = given.get("save_every", max(1, min(1000, config["steps"] // 10)))
    loop(run, network, data, examples, labels, out, accumulate, save_every)
    if RANK == 0:
        attempt(loss_figure, run, out / "loss.png")
        classes = len(config["classes"])
        sample(run, out, 16 if run.text else classes * max(2, 64 // classes) if classes else 64, {})
        print_written(out)
        lock.close()
    if WORLD > 1:
        dist.destroy_process_group()


def loop(run, network, data, examples, labels, out, accumulate, save_every):
    """From run.step to the last step: train; now and then report, measure and save."""
    steps = run.config["steps"]
    log_every, test_every = max(1, min(50, steps // 10)), max(1, min(2000, steps // 5))
    losses, since, clock = Losses(run), run.step, time.monotonic()
    with noted_signals(run.signals):
        while run.step < steps:
            x0, t, noise, y = batch(run, examples, labels)
            loss, lr = train_step(run, network, accumulate, x0, t, noise, y)
            run.step += 1
            losses.add(run.step, t, loss)

            last = run.step == steps
            measure = last or run.step % test_every == 0
            report = measure or run.step % log_every == 0
            save, stop = last or run.step % save_every == 0, any_process(run.signals)
            if not (report or save or stop):
                continue
            row, best = dict(step=run.step) | losses.read(run), False         # the one place that waits for the device
            if report and RANK == 0:
                rate = (run.step - since) * run.config["batch_size"] / max(time.monotonic() - clock, 1e-9)
                row |= dict(lr=lr, rate=round(rate, 1), test_bits=held_out(run, data, out) if measure else "")
                best = row["test_bits"] != "" and all(row["test_bits"] <= old["test_bits"] for old in run.rows
                                                      if old["test_bits"] != "")
                run.rows.append(row)
                attempt(write_log, run.rows, out / "log.csv")
                show(report_line(run, row), last=last)
            if report:
                losses.clear()
                since, clock = run.step, time.monotonic()
            if RANK == 0 and (save or stop or best):
                saved = attempt(save_checkpoint, run, out, best)
                if not saved and (last or stop):
                    fail(f"{out / 'checkpoint.pt'} can't be written: the run is lost after its last checkpoint")
            if stop:
                fail(f"stopped at step {run.step}" + (", the last: --sample draws from it" if last
                                                     else "; go on with --resume"))


def train_step(run, network, accumulate, x0, t, noise, y):
    """One step of the optimisers and of the average -> the losses (B,) and the learning rate."""
    run.net.zero_grad()
    losses = []
    for i in range(accumulate):            # the gradient of the whole batch, from parts that need less memory
        part = slice(i * len(t) // accumulate, (i + 1) * len(t) // accumulate)

        def model(xt, t):
            return run.call(network, xt, t, None if y is None else y[part])

        loss = objective(run, model, x0[part], t[part], noise[part])
        (loss.mean() / accumulate).backward()
        losses.append(loss.detach())
    nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    lr = learning_rate(run.step, run.config["steps"], run.config["lr"])
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    average(run.ema, run.net, run.step)
    return torch.cat(losses), lr


@torch.no_grad()
def average(ema, net, step):
    """One step of the EMA; its decay warms up as (1 + n) / (10 + n), so that early weights are forgotten."""
    decay = min(0.9999, (1 + step) / (10 + step)) if step else 0.0
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


class Losses:
    """The loss by quarter of t and the first step where it is not finite, kept on the device until they are read."""

    def __init__(self, run):
        self.T = run.config["timesteps"]
        self.sums = torch.zeros(2, 4, device=run.device)                    # of the losses, and their number
        self.bad = torch.full((), math.inf, device=run.device)

    def add(self, step, t, loss):
        both = torch.stack([loss, torch.ones_like(loss)])
        self.sums += torch.zeros_like(self.sums).index_add(1, (t - 1) * 4 // self.T, both)
        self.bad = torch.where(loss.isfinite().all(), self.bad, self.bad.clamp(max=step))

    def read(self, run):
        """The means over all processes, "" for a quarter without examples; a loss that is not finite ends the run."""
        finite = nn.utils.get_total_norm(list(run.net.parameters())).isfinite()     # a bad gradient of a good loss
        bad, sums = torch.where(finite, self.bad, self.bad.clamp(max=run.step)), self.sums.flatten()
        if WORLD > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        sums, bad = sums.tolist(), bad.item()
        if math.isfinite(bad):
            fail(f"the loss is not finite at step {int(bad)}: the last good checkpoint is kept; try a lower --lr")
        means = {f"quarter{i + 1}": sums[i] / sums[4 + i] if sums[4 + i] else "" for i in range(4)}
        return dict(loss=sum(sums[:4]) / sum(sums[4:])) | means

    def clear(self):
        self.sums.zero_()


@torch.no_grad()
def held_out(run, data, out):
    """Bits of 32 test examples in 100 steps, and samples so far; "" if a signal comes. The next step seeds itself."""
    torch.manual_seed(0)
    x0, y = test_examples(run, data, 32)
    try:
        bits = run.diffusion.bits_per_dim(run.model(y, exact=True), x0, 100)["total"].mean().item()
        x0, _ = draw(run, 4 if run.text else 16, 64 if run.text else 20)
    except Stopped:
        return ""
    if run.text:
        attempt(write_texts, run, x0, out)
    else:
        attempt(save_grid, run.pictures(x0), out / "samples.png")
    return bits


def test_examples(run, data, n):
    """The first n test images, or n windows spread over the test text, as states; and their labels or None."""
    examples, labels = run.examples(data.test), data.test_labels if run.config["classes"] else None
    if run.text:
        examples = examples[torch.arange(n) * (len(examples) - 1) // max(1, n - 1)]
    return (run.states(examples[:n].to(run.device)), None if labels is None else labels[:n].to(run.device))


def report_line(run, row):
    """One line about a row of the log."""
    left = int((run.config["steps"] - run.step) * run.config["batch_size"] / row["rate"]) if row["rate"] else 0
    quarters = " ".join("-" if row[f"quarter{i}"] == "" else f"{row[f'quarter{i}']:.3f}" for i in range(1, 5))
    bits = f"  test {row['test_bits']:.3f} {run.unit}" if row["test_bits"] != "" else ""
    return (f"step {run.step}/{run.config['steps']}  loss {row['loss']:.4f} (by t {quarters})  {row['rate']:.0f}/s  "
            f"{left // 60}:{left % 60:02d} left{bits}")


def introduce(run, data, out):
    """What is trained, in two lines, and an image on its way to noise."""
    if RANK:
        return
    config, parameters = run.config, sum(p.numel() for p in run.net.parameters())
    print(f"{config['model']} on {data.name} ({len(data.train):,} {'characters' if run.text else 'images'}), "
          f"{parameters / 1e6:.2f} million parameters, {run.device}{f' x {WORLD}' if WORLD > 1 else ''}, "
          f"batch {config['batch_size']}, steps {run.step} to {config['steps']} -> {out}")
    print(f"yardsticks: {yardsticks(run, data)}; samples and bounds use the EMA weights", flush=True)
    if not run.text:
        torch.manual_seed(0)
        x0 = run.states(data.test[:1].to(run.device))
        noisy = [run.diffusion.q_step(x0, 0, t) for t in torch.linspace(0, run.diffusion.T, 10).long().tolist()]
        attempt(save_grid, run.pictures(torch.cat(noisy)).cpu(), out / "forward.png", 10)


def check_fit(run, x0, t, noise, y):
    """One line if the network does not take such data."""
    try:
        with torch.no_grad():
            objective(run, lambda xt, t: run.call(run.net, xt, t, y), x0, t, noise)
    except ValueError as error:
        fail(f"{error}; see --size, --width, --levels and --length")


def compiled(run, x0, t, noise, y):
    """The network for training: for several processes wrapped, on a GPU compiled, else as it is."""
    network = run.net
    if WORLD > 1:
        network = nn.parallel.DistributedDataParallel(network, [run.device] if run.device.type == "cuda" else None)
    if run.device.type != "cuda":
        return network
    show("compiling (a minute or two)", last=True)
    try:
        fast = torch.compile(network)        # the wrapped network, so that its communication overlaps with the backward pass
        run.call(fast, noise, t, y).float().mean().backward()
        return fast
    except Exception as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        show(f"going on uncompiled: {first_line(error)[:100]}", last=True)
        return network


# ---------------------------------------------------------------- several processes, and signals

def join(device, store):
    """Make this process one of torchrun's group."""
    if WORLD == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Two backends: what the processes agree on between steps goes by gloo, on the CPU, and no GPU is waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK,
                            world_size=WORLD, timeout=datetime.timedelta(days=1))


def any_process(signals):
    """Whether a signal has come to any process; all of them get the same answer."""
    if WORLD == 1:
        return bool(signals)
    count = torch.tensor(float(len(signals)))
    dist.all_reduce(count)
    return bool(count)


def in_turn(prepare):
    """prepare(), first where it may download or decode, then in one process of each other machine, then in the rest."""
    if WORLD == 1:
        return prepare()
    turn = 0 if RANK == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for now in range(3):
        if now == turn:
            data, config, state, out = prepare()
        dist.all_reduce(torch.zeros(1))        # by gloo: the others wait here
    configs = [None] * WORLD
    dist.all_gather_object(configs, config)
    if any(other != config for other in configs):
        fail("the processes found different data: give them the same --data-dir")
    return data, config, state, out


@contextlib.contextmanager
def noted_signals(signals):
    """Ctrl-C, SIGTERM and SIGHUP are noted in the list, so that the loop can save before it ends."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    if handlers.get(getattr(signal, "SIGHUP", None)) == signal.SIG_IGN:        # under nohup
        del handlers[signal.SIGHUP]
    for number in handlers:
        signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- sampling

@torch.no_grad()
def draw(run, n, steps, model=None, frames=20, **extra):
    """n samples on the CPU, and about `frames` pairs (s, xs) on the way to them."""
    film, count = [], len(run.diffusion.timesteps(steps)) + 1
    model = model or run.model(all_labels(run, n))
    for i, (s, xs, _) in enumerate(run.diffusion.sample_progressive(model, (n, *run.config["shape"]), steps, **extra)):
        if s == 0 or i % max(1, count // frames) == 0:
            film.append((s, xs.cpu()))
    return film[-1][1], film


def all_labels(run, n):
    """n labels in order, of each class as many; None for a run without labels."""
    classes = len(run.config["classes"])
    return torch.arange(n, device=run.device) * classes // n if classes else None


def check_sampling(run, given, out):
    """One line for an option of --sample that means nothing for this run."""
    for name, means in dict(eta=not run.discrete, temperature=run.discrete, variance=not run.discrete,
                            prompt=run.text, label=run.config["classes"], guidance=run.config["classes"]).items():
        if name in given and not means:
            why = dict(eta="for ddpm", variance="for ddpm", temperature="for d3pm", prompt="for text").get(
                name, "for a run that was trained with --labels")
            fail(f"--{name} is {why}, and the run in {out} is another")
    classes = run.config["classes"]
    if given.get("label", 0) >= max(1, len(classes)):
        names = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
        fail(f"--label must be one of 0..{len(classes) - 1} ({names}), got {given['label']}")


def sample(run, out, n, given):
    """n samples into out, in chunks: as text, or as pictures with samples.npy (and labels.npy); and their film."""
    torch.manual_seed(given.get("seed", run.config["seed"]))
    steps = given.get("sample_steps", run.config["timesteps"] if run.text else 50)
    extra = {"eta": given["eta"]} if "eta" in given else {}
    if "prompt" in given:
        extra["known"] = encode_prompt(run, given["prompt"])
    y = all_labels(run, n)
    if "label" in given:
        y = torch.full_like(y, given["label"])
    chunk, samples, film = chunk_size(run, 512), [], []
    for first in range(0, n, chunk):
        last = min(first + chunk, n)
        model = run.model(None if y is None else y[first:last], given.get("guidance", 0.0),
                          given.get("temperature", 1.0))
        x0, frames = draw(run, last - first, steps, model, **extra)
        samples.append(x0)
        film = film or frames
        show(f"sampled {last} of {n}", last=last == n, live_only=True)
    x0 = torch.cat(samples)
    if run.text:
        write_texts(run, x0, out)
        save_gif(out / "samples.gif", [text_picture(run.texts(xs[:4])) for _, xs in film])
        for s, xs in dict(film[::max(1, len(film) // 6)] + film[-1:]).items():
            print(f"t = {s:4d}  {run.texts(xs[:1])[0][:70]!r}")
        return
    images = run.pictures(x0)
    save_array(out / "samples.npy", images.permute(0, 2, 3, 1))
    save_gif(out / "samples.gif", [grid_picture(run.pictures(xs[:36])) for _, xs in film])
    if y is None or "label" in given:
        save_grid(images[:64], out / "samples.png")
    else:                                                               # a row for each class
        rows = [(y.cpu() == label).nonzero()[:8, 0] for label in y.unique().tolist()]
        columns = min(map(len, rows))
        save_grid(images[torch.cat([row[:columns] for row in rows])], out / "samples.png", columns)
    if y is not None:
        save_array(out / "labels.npy", y.cpu())


def chunk_size(run, most):
    """How many examples to sample or measure at a time."""
    numbers = math.prod(run.config["shape"]) * (run.diffusion.K if run.discrete else 1)
    return min(64 if run.device.type == "cpu" else most, max(1, 2 ** 26 // numbers))


def encode_prompt(run, prompt):
    """A prompt as the `known` of D3PM.sample, (L,): -1 at a free place and after its end.

    A free place is written _, or a middle dot where the text itself has underscores.
    """
    chars, length = run.config["chars"], run.config["length"]
    free = "_" if "_" not in chars else "\N{MIDDLE DOT}"
    unknown = sorted(set(prompt) - set(chars) - {free})
    if unknown:
        fail(f"--prompt has characters that the run does not know: {unknown} (a free place is {free})")
    if len(prompt) > length:
        fail(f"--prompt is longer than the run's {length} characters")
    return torch.tensor([-1 if c == free else chars.index(c) for c in prompt.ljust(length, free)])


def write_texts(run, x0, out):
    """samples.txt."""
    texts = [f"--- {i + 1}\n{text}\n" for i, text in enumerate(run.texts(x0))]
    write_whole(out / "samples.txt", "\n".join(texts).encode())


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def bounds(run, x0, y, steps):
    """bits_per_dim of the examples x0 given y, in chunks, float64 on the CPU."""
    parts, chunk = [], chunk_size(run, 256)
    for first in range(0, len(x0), chunk):
        model = run.model(None if y is None else y[first:first + chunk], exact=True)
        parts.append(run.diffusion.bits_per_dim(model, x0[first:first + chunk], steps))
        show(f"bounds of {min(first + chunk, len(x0))} of {len(x0)} examples", live_only=True)
    return {key: torch.cat([part[key] for part in parts]).double().cpu() for key in parts[0]}


def evaluate(run, out, data, n, given):
    """The bound on n test examples, term by term: a table, eval.json, terms.png and lossy.png."""
    torch.manual_seed(given.get("seed", run.config["seed"]))
    x0, y = test_examples(run, data, n)
    grid = run.diffusion.timesteps(given.get("sample_steps", 100))
    result = bounds(run, x0, y, grid)
    terms, total, error = result["terms"].mean(0), result["total"], result["x0_error" if run.discrete else "x0_mse"]
    spread = f" +- {total.std() / len(total) ** 0.5:.4f}" if len(total) > 1 else ""
    show(f"{run.config['model']} on {data.name}: {total.mean():.4f} {run.unit}{spread} on {len(total)} test examples, "
         f"{len(grid)} steps" + ("" if y is None else ", given their labels"), last=True)
    quarters = " ".join(f"{quarter.sum():.4f}" if len(quarter) else "-" for quarter in terms[1:].tensor_split(4))
    print(f"  L_T {result['prior'].mean():.4f}\n  L_t {terms[1:].sum():.4f} in {len(grid) - 1} terms, by quarter of t: "
          f"{quarters}\n  L_0 {terms[0]:.4f}\n  yardsticks: {yardsticks(run, data)}")
    record = dict(total=total.mean().item(), prior=result["prior"].mean().item(), steps=grid, terms=terms.tolist(),
                  x0_mse_or_error=error.mean(0).tolist(), examples=len(total), unit=run.unit)
    if y is not None:
        record["total_without_labels"] = bounds(run, x0, None, grid)["total"].mean().item()
        show(f"  without labels {record['total_without_labels']:.4f} {run.unit}", last=True)
    write_whole(out / "eval.json", json.dumps(record).encode())
    terms_figure(run, result["prior"].mean(), terms, error.mean(0), grid, out / "terms.png")
    if not run.text:
        lossy_picture(run, x0[:8], None if y is None else y[:8], grid, out / "lossy.png")


def panels(n, size):
    """A figure and its n axes side by side. No pyplot: a notebook that imports this file keeps its backend."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def terms_figure(run, prior, terms, error, grid, path):
    """The bound's terms, the share of bits below t, and progressive lossy compression."""
    figure, (left, middle, right) = panels(3, (13, 3.2))
    lengths = torch.tensor(grid) - torch.tensor([0, *grid[:-1]])
    left.loglog(grid, (terms / lengths).clamp(min=1e-9), ".-", markersize=3)
    left.set(xlabel="t", ylabel=f"{run.unit} for a unit of t", title="the bound's terms: L_0 first")
    middle.semilogx(grid, 100 * terms.cumsum(0) / (terms.sum() + prior), ".-", markersize=3)
    middle.set(xlabel="t", ylabel="% of all bits", ylim=(0, 103), title="bits of the steps up to t")
    # Sent from T downwards, x_s costs L_T and the terms above it; from x_s the receiver guesses x0_hat.
    rate = prior + torch.cat([torch.zeros(1), terms.flip(0).cumsum(0)[:-1]])
    right.plot(rate, 100 * error.flip(0) if run.discrete else error.flip(0).sqrt() * 127.5, ".-", markersize=3)
    right.set(xlabel=f"rate, {run.unit}", title="progressive lossy compression",
              ylabel="places guessed wrong, %" if run.discrete else "root mean square error, of 255")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def lossy_picture(run, x0, y, grid, path):
    """What a receiver who has x_t guesses, for test images (rows) and falling t (columns); last the image."""
    columns, times = [], [grid[i] for i in torch.linspace(len(grid) - 1, 0, 9).long().tolist()]
    for t in times:
        guess = run.diffusion.p_sample(run.model(y), run.diffusion.q_sample(x0, t), t)[1]  # x0_hat, or log p(x_0 | x_t)
        columns.append(run.pictures(guess.argmax(-1) if run.discrete else guess))
    grid = grid_picture(torch.stack([*columns, run.pictures(x0)], dim=1).flatten(0, 1).cpu(), 10)
    picture = Image.new("RGB", (2 * grid.width, 2 * grid.height + 20), "white")
    picture.paste(grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST), (0, 20))
    for i, title in enumerate([f"t={t}" for t in times] + ["data"]):
        ImageDraw.Draw(picture).text((i * picture.width // 10 + 6, 4), title, fill="black")
    picture.save(path)


def loss_figure(run, path):
    """The loss by quarter of t, and the held-out bound."""
    figure, (loss, bound) = panels(2, (9, 3))
    for name in ("quarter1", "quarter2", "quarter3", "quarter4", "loss"):
        rows = [row for row in run.rows if row[name] != ""]
        loss.semilogy([row["step"] for row in rows], [row[name] for row in rows], "k" if name == "loss" else "", label=name)
    loss.set(xlabel="step", title="training loss, by quarter of t")
    loss.legend(fontsize=7)
    rows = [row for row in run.rows if row["test_bits"] != ""]
    bound.plot([row["step"] for row in rows], [row["test_bits"] for row in rows], "o-")
    bound.set(xlabel="step", title=f"{run.unit} of 32 test examples, EMA weights")
    figure.savefig(path, dpi=110)


def yardsticks(run, data):
    """What trivial models need: how good is good. For large images from fewer of them and of their pixels."""
    if run.text:
        return f"unigram {entropy(torch.bincount(data.train)):.2f} bits/char"
    K, D = run.config.get("levels", 256), data.train[0].numel()
    images = data.train[:min(20000, max(1000, 4 * 10 ** 8 // D))].flatten(1)[:, ::1 + D // 4096]
    counts = torch.zeros(images.shape[1], K, dtype=torch.int64)
    for x in images.split(max(1, 10 ** 7 // len(counts))):
        x = x.long() * K // 256 + K * torch.arange(len(counts))
        counts += torch.bincount(x.flatten(), minlength=counts.numel()).reshape(counts.shape)
    return (f"the grey values' histogram {entropy(counts.sum(0)):.2f} bits/dim, "
            f"each pixel's own histogram {entropy(counts).mean():.2f}")


def entropy(counts):
    """Entropy in bits of histograms (..., K)."""
    return torch.distributions.Categorical(counts.double()).entropy() / math.log(2)


# ---------------------------------------------------------------- data

def load_data(source, data_dir, size=32):
    """A data set by name or path: train and test as uint8 (N, C, H, W), or the characters' numbers (N,).

    None is Fashion-MNIST, or glyphs with one line saying so where it can't be had. chars are a text's characters in
    order, or None; train_labels and test_labels int64 (N,) and classes their names, or None and [].
    """
    name, data_dir = source or "fashion-mnist", pathlib.Path(data_dir)
    data = SimpleNamespace(name=name, source=name, chars=None, folder=False, train_labels=None, test_labels=None,
                           classes=[], fingerprint=None)
    if name in TORCHVISION:
        try:
            load_torchvision(data, data_dir)
        except Exception as error:
            if source is not None:
                fail(f"{name} can't be had ({first_line(error)}). Put torchvision's files under "
                     f"{data_dir / TORCHVISION[name]}, or choose another --data")
            show(f"Fashion-MNIST can't be had ({first_line(error)}): training on the built-in glyphs instead.", last=True)
            return load_data("glyphs", data_dir)
    elif name == "glyphs":
        load_glyphs(data)
    elif name == "docs" or pathlib.Path(name).is_file():
        load_text(data)
    elif pathlib.Path(name).is_dir():
        load_folder(data, data_dir, size)
    else:
        fail(f"--data {name} is neither a known data set ({', '.join(TORCHVISION)}, glyphs, docs) nor a file or folder")
    if data.fingerprint is None:
        crc = 0
        for part in (data.train, data.test, data.train_labels):
            crc = crc if part is None else zlib.crc32(part.contiguous().numpy(), crc)
        data.fingerprint = f"{len(data.train)}-{crc:08x}"
    return data


def load_torchvision(data, data_dir):
    """Files that are there, else torchvision's download, which is given up when no byte comes for some seconds."""
    splits, cls, patience = [], getattr(torchvision.datasets, TORCHVISION[data.name]), socket.getdefaulttimeout()
    for train in (True, False):
        try:
            splits.append(cls(data_dir, train=train))
        except RuntimeError:
            socket.setdefaulttimeout(7)            # torchvision tries two addresses
            try:
                splits.append(cls(data_dir, train=train, download=True))
            finally:
                socket.setdefaulttimeout(patience)
    images = [torch.as_tensor(split.data) for split in splits]
    images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous() for x in images]
    (data.train, data.test), data.classes = images, list(splits[0].classes)
    data.train_labels, data.test_labels = (torch.as_tensor(split.targets).long() for split in splits)


def load_glyphs(data):
    """Grey 28 x 28 letters and digits: matplotlib's fonts under small random distortions."""
    data.classes = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    cells = []
    for file in sorted(FONTS.glob("DejaVuSans*.ttf")) + sorted(FONTS.glob("DejaVuSerif*.ttf")):
        if "Display" in file.name:
            continue
        font = ImageFont.truetype(str(file), 40)
        for c in data.classes:
            cell = Image.new("L", (56, 56))
            ImageDraw.Draw(cell).text((28, 28), c, font=font, fill=255, anchor="mm")
            cells.append(torch.from_numpy(np.array(cell)))
    cells = torch.stack(cells)
    data.train, data.train_labels = distorted(cells, 20000, len(data.classes), seed=1)
    data.test, data.test_labels = distorted(cells, 2000, len(data.classes), seed=2)


def distorted(cells, n, classes, seed):
    """n of the cells (N, 56, 56), turned, scaled, sheared and moved at random: uint8 (n, 1, 28, 28), and labels."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(cells), (n,), generator=generator)
    noise = 2 * torch.rand(n, 6, generator=generator) - 1
    angle, scale, shear = 0.15 * noise[:, 0], 1 + 0.15 * noise[:, 1], 0.15 * noise[:, 2]
    turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    theta = torch.cat([turn * scale[:, None, None], 0.1 * noise[:, 3:5, None]], dim=2)
    grid = nn.functional.affine_grid(theta, (n, 1, 56, 56), align_corners=False)
    large = nn.functional.grid_sample(cells[index, None].float(), grid, align_corners=False)
    return nn.functional.avg_pool2d(large, 2).round().to(torch.uint8), index % classes


def load_text(data):
    """The characters of docs or of a UTF-8 file as numbers, a byte each where there are up to 256."""
    def pieces():
        if data.name == "docs":
            yield "\n\n".join(pydoc_data.topics.topics.values())
            return
        with open(path, encoding="utf-8-sig") as file:
            while piece := file.read(2 ** 20):
                yield piece

    def codes(text):
        return np.frombuffer(text.encode("utf-32-le"), np.uint32)

    path, known, n = pathlib.Path(data.name).resolve(), set(), 0
    try:
        for piece in pieces():
            known.update(piece)
            n += len(piece)
    except UnicodeDecodeError:
        fail(f"{data.name} is not UTF-8 text")
    if n < 1000 or "\0" in known:
        fail(f"{data.name} is {'not text' if chr(0) in known else f'too short to learn from ({n} characters)'}")
    chars = "".join(sorted(known))
    numbers = np.zeros(ord(chars[-1]) + 1, np.uint8 if len(chars) <= 256 else np.int16 if len(chars) < 2 ** 15 else np.int32)
    numbers[codes(chars)] = np.arange(len(chars))
    numbers = torch.from_numpy(np.concatenate([numbers[codes(piece)] for piece in pieces()]))
    data.chars, (data.train, data.test) = chars, numbers.split([n - n // 10, n // 10])
    if data.name != "docs":
        data.name, data.source = path.stem, str(path)


def load_folder(data, data_dir, size):
    """All images below a folder, decoded once into a file that is mapped; the sub-folders are their classes."""
    folder = pathlib.Path(data.name).resolve()
    data.folder, data.name, data.source = True, folder.name, str(folder)
    files = image_files(folder)
    stamps = [(os.fsencode(file), os.stat(folder / file)) for file in files]
    key = hashlib.sha1(b"".join(b"%s %d %d " % (name, stat.st_size, stat.st_mtime_ns) for name, stat in stamps))
    cache = data_dir / f"{folder.name}-{size}-{key.hexdigest()[:10]}.pixels"
    if not cache.with_suffix(".json").exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        decode(folder, files, size, cache)
    found = json.loads(cache.with_suffix(".json").read_text())
    if found["left_out"]:
        show(f"left out {len(found['left_out'])} of {len(files)} files, which can't be read as images: "
             + ", ".join(found["left_out"][:5]) + (", ..." if len(found["left_out"]) > 5 else ""), last=True)
    n, labels = found["images"], found["labels"]
    if n < 2:
        fail(f"{folder} holds {n} images: at least 2 are needed (one is held out)")
    images = torch.from_numpy(np.memmap(cache, np.uint8, "c", shape=(n, 3, size, size)))[:, :1 if found["grey"] else 3]
    tests = max(1, n // 10)
    data.test, data.train, data.fingerprint = images[:tests], images[tests:], found["fingerprint"]
    data.classes = sorted({label for label in labels if label})
    if data.classes:
        labels = torch.tensor([data.classes.index(label) if label else -1 for label in labels])
        data.test_labels, data.train_labels = labels[:tests], labels[tests:]


def image_files(folder):
    """Paths in a folder that look like images, in order; links are followed, hidden files and runs are no data."""
    kinds = {kind for kind, name in Image.registered_extensions().items() if name in Image.OPEN}
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        is_run = "config.json" in names and {"checkpoint.pt", "log.csv", ".lock"} & set(names)
        if real in seen or is_run:                        # a link to a folder above would go round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.relpath(os.path.join(place, name), folder) for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in kinds]
    return sorted(file for file in files if os.path.isfile(os.path.join(folder, file)))


class Decoded(torch.utils.data.Dataset):
    """The images of a folder as uint8 (3, size, size), or None where a file can't be read as one."""

    def __init__(self, folder, files, size):
        self.folder, self.files, self.size = folder, files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return square(os.path.join(self.folder, self.files[i]), self.size)
        except Exception:
            return None


def decode(folder, files, size, cache):
    """Decode the files in a random order into `cache`, and write what they are into a .json beside it."""
    files = [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))]
    workers = min(16, os.cpu_count() or 1) if len(files) > 1000 else 0        # to start them takes a while
    loader = torch.utils.data.DataLoader(Decoded(folder, files, size), 64, num_workers=workers, collate_fn=list)
    partial, labels, left_out, crc, grey, done = unique_name(cache), [], [], 0, True, 0
    try:
        with open(partial, "wb") as out:        # not through a memory map: on a full disk that is a bus error
            for images in loader:
                for file, image in zip(files[done:], images):
                    if image is None:
                        left_out.append(printable(file))
                        continue
                    out.write(image.tobytes())
                    crc, grey = zlib.crc32(image.tobytes(), crc), grey and bool((image == image[:1]).all())
                    labels.append(printable(file.split(os.sep)[0]) if os.sep in file else "")
                done += len(images)
                show(f"decoding {done} of {len(files)} images", last=done == len(files), live_only=done % 6400 > 0)
        found = dict(images=len(labels), grey=grey, labels=labels, left_out=left_out,
                     fingerprint=f"{len(labels)}-{crc:08x}")
        os.replace(partial, cache)
        write_whole(cache.with_suffix(".json"), json.dumps(found).encode())
    finally:
        partial.unlink(missing_ok=True)


def square(file, size):
    """One image, upright, centre-cropped and scaled: uint8 (3, size, size), three times the same where it is grey."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)        # cameras store how they were held
        if image.mode[0] in "IF":                # 16 bits and more, or floats, which convert would cut at 255
            image = Image.fromarray(to_8_bits(np.asarray(image, np.float32), image.mode == "F"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.array(image).transpose(2, 0, 1))


def to_8_bits(values, floats):
    """Deep grey values as uint8, over the first usual range that holds them, else over their own."""
    finite = values[np.isfinite(values)]
    low, high = finite.min(), finite.max()        # ValueError where there is none: no picture
    usual = [(0, 1), (-1, 1)] if floats else [(0, 2 ** bits - 1) for bits in (8, 10, 12, 14, 16)]
    low, high = next(((a, b) for a, b in usual if a <= low and high <= b), (low, high))
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / max(high - low, 1e-12))
    return scaled.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- files

def find_folder(given):
    """Where the run that the options name lives."""
    if "out" in given:
        return pathlib.Path(given["out"])
    path = pathlib.Path(given.get("data", "fashion-mnist")).resolve()
    out = pathlib.Path(f"runs/{given.get('model', 'ddpm')}-{path.name if path.is_dir() else path.stem}")
    # Fashion-MNIST could not be had if there is no run of it.
    return out if "data" in given or out.exists() else out.with_name(f"{given.get('model', 'ddpm')}-glyphs")


def prepare(given, device):
    """The data, the configuration, the checkpoint (or None) and the folder of the run that was asked for."""
    out, state, old = find_folder(given), None, {}
    if "resume" in given and (out / "checkpoint.pt").exists():
        state = load(out / "checkpoint.pt")
        old = state["config"]
    data = load_data(given.get("data", old.get("data")), given.get("data_dir", "data"),
                     given.get("size", old.get("size", 32)))
    if state is None:
        config = complete(given, data, device)
        out = pathlib.Path(given.get("out", f"runs/{config['model']}-{data.name}"))
        if (out / "checkpoint.pt").exists():
            fail(f"{out} already holds a run: go on with --resume, or choose another --out")
    else:
        differ = [f"{name.replace('_', '-')} {old.get(name)} there, {given[name]} here" for name in SETTINGS
                  if name in given and given[name] != old.get(name)]
        if differ:
            fail(f"{out} was trained with other settings ({'; '.join(differ)}): leave them out, or choose another --out")
        if data.fingerprint != old["fingerprint"]:
            fail(f"the data of the run in {out} has changed since it began: bring it back, or choose another --out")
        config = old | dict(data=data.source, steps=given.get("steps", old["steps"]), lr=given.get("lr", old["lr"]))
        if state["step"] >= config["steps"]:
            fail(f"the run in {out} has done its {state['step']} steps: --steps N trains longer, --sample and --eval use it")
    if data.chars and min(len(data.train), len(data.test)) < config["length"]:
        fail(f"{data.name} is too short for --length {config['length']}")
    return data, config, state, out


def load(path):
    """A checkpoint, on the CPU; one line where there is none or it can't be read."""
    if not path.exists():
        fail(f"no checkpoint in {path.parent}: train first, or name the run with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:
        previous = path.with_suffix(".previous.pt")
        fail(f"{path} is damaged or not a checkpoint of train.py"
             + (f"; the one before is {previous}: copy it there" if previous.exists() else ""))
    if not isinstance(state, dict) or not {"model", "ema", "step", "config"} <= state.keys():
        fail(f"{path} is not a checkpoint of train.py")
    if not {"rows", "optimizer"} <= state.keys() or "classes" not in state["config"]:
        fail(f"{path} was written by an earlier version of train.py: use it with that, or train anew")
    return state


def restore(run, state, path):
    """The weights of a checkpoint into a run."""
    try:
        run.load(state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        fail(f"{path} is of another version of train.py, with another network ({first_line(error)})")


def load_run(given, device):
    """The run to sample or measure, with its best weights: those of the last checkpoint, unless older ones were better."""
    out = find_folder(given)
    path, state = out / "checkpoint.pt", load(out / "checkpoint.pt")
    measured = [row["test_bits"] for row in state["rows"] if row["test_bits"] != ""]
    if measured and min(measured) < measured[-1] and (out / "best.pt").exists():
        path, state = out / "best.pt", load(out / "best.pt")
    config = state["config"]
    if given.get("model", config["model"]) != config["model"]:
        fail(f"the run in {out} is of {config['model']}, not of {given['model']}")
    run = Run(config, device)
    restore(run, state, path)
    check_sampling(run, given, out)
    if "variance" in given:
        if given["variance"] == "learned" != config["variance"]:
            fail(f"the run in {out} has learnt no variance: --variance takes a number there")
        run.diffusion = build(config | dict(variance=given["variance"]))[1].to(device)
    show(f"EMA weights of step {run.step}, from {path}", last=True)
    return run, out


def test_data(run, given, out):
    """The data to measure a run on: its own, unchanged, or other data of its kind."""
    config = run.config
    data = load_data(given.get("data", config["data"]), given.get("data_dir", "data"), config.get("size", 32))
    if bool(data.chars) != run.text or not run.text and list(data.train.shape[1:]) != config["shape"]:
        fail(f"{data.name} does not fit the run in {out}, which is of {config['data']}")
    if data.fingerprint != config["fingerprint"]:
        if data.source == config["data"]:
            fail(f"the data of the run in {out} has changed since it began, and so has its test split: bring it back")
        show(f"{data.name} is not the run's own data, and the run may have been trained on some of it", last=True)
    if run.text:
        unknown = sorted(set(data.chars) - set(config["chars"]))
        if unknown:
            fail(f"{data.name} has characters that the run in {out} does not know: {unknown}")
        if len(data.test) < config["length"]:
            fail(f"{data.name} is too short: its last tenth must hold {config['length']} characters")
        data.test = torch.tensor([config["chars"].index(c) for c in data.chars])[data.test.long()]
    if config["classes"] and data.classes != config["classes"]:
        data.test_labels = torch.full((len(data.test),), -1)
    return data


def open_run(out, config):
    """The folder of a run, with its config.json, for this process alone: the lock goes when the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is being written to {out}: choose another --out")
    except OSError:                        # a file system without locks
        pass
    write_whole(out / "config.json", json.dumps(config, indent=1).encode())
    return lock


def save_checkpoint(run, out, best):
    """checkpoint.pt, with the one before as checkpoint.previous.pt, and as best.pt if it is the best so far."""
    buffer = io.BytesIO()
    torch.save(run.state(), buffer)
    write_whole(out / "checkpoint.pt", buffer.getbuffer(), keep=out / "checkpoint.previous.pt")
    if best:
        link(out / "checkpoint.pt", out / "best.pt")


def write_whole(path, content, keep=None):
    """Bytes into a temporary file, flushed to the disk, then renamed: path never holds half of them."""
    temporary = unique_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def link(path, name):
    """A second name for a file, which costs no second write; a copy where the file system has no links."""
    temporary = unique_name(name)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)


def unique_name(path):
    """A name beside path that no other process writes to."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def attempt(write, *arguments):
    """Write something that training can go on without: a full disk is a warning. -> whether it worked"""
    try:
        write(*arguments)
        return True
    except OSError as error:
        show(f"warning: {error.filename or 'a file of the run'}: {error.strerror or error}; going on", last=True)
        return False


def write_log(rows, path):
    """log.csv anew, whole: it is for reading, and what a run needs of it is in its checkpoint."""
    names = ["step", "loss", "lr", "rate", "test_bits", "quarter1", "quarter2", "quarter3", "quarter4"]
    lines = [names] + [[str(row[name]) for name in names] for row in rows]
    write_whole(path, "".join(",".join(line) + "\n" for line in lines).encode())


def save_array(path, x):
    """A tensor as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, x.numpy())
    write_whole(path, buffer.getbuffer())


def grid_picture(images, columns=None):
    """uint8 (N, C, H, W) as one picture, square-ish if the columns are not given."""
    grid = torchvision.utils.make_grid(images, nrow=columns or math.ceil(len(images) ** 0.5), padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_grid(images, path, columns=None):
    """grid_picture as a PNG, twice as large as life where that is small."""
    picture = grid_picture(images, columns)
    scale = 2 if picture.width < 400 else 1
    picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST).save(path)


def save_gif(path, frames):
    """Pictures as a GIF that rests on the last."""
    frames = [frame.quantize(16) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100] * (len(frames) - 1) + [3000], loop=0)


def text_picture(texts, columns=64):
    """Strings as a picture of typed text, each wrapped at so many columns."""
    rows = [line for text in texts for part in [text.replace("\n", " ")]
            for line in [part[i:i + columns] for i in range(0, len(part), columns)] + [""]]
    font = ImageFont.truetype(str(FONTS / "DejaVuSansMono.ttf"), 14)
    picture = Image.new("L", (int(columns * font.getlength("x")) + 16, 19 * len(rows)), 255)
    for i, row in enumerate(rows):
        ImageDraw.Draw(picture).text((8, 19 * i + 8), row, font=font, fill=0)
    return picture


def print_written(out):
    """The files of a run."""
    print(f"in {out}: " + ", ".join(sorted(file.name for file in out.glob("[!.]*"))))


# ---------------------------------------------------------------- what was asked for

def show(line, last=False, live_only=False):
    """A live line on a terminal, which the last one leaves standing; elsewhere a plain line, unless live_only."""
    if RANK:
        return
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line if last else line[:width]:<{width}}", end="\n" if last else "", flush=True)
    elif last or not live_only:
        print(line, flush=True)


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(name):
    """A file's name with the bytes that are not UTF-8 written out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def find_device(name=None):
    """The device that was asked for, else the best one found; it must run a kernel, not only be there."""
    found = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if found == "cuda":
            found = f"cuda:{os.environ.get('LOCAL_RANK', RANK % torch.cuda.device_count())}"
        device = torch.device(found)
        torch.ones(1, device=device).add(1).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ArithmeticError) as error:
        if name is not None:
            fail(f"--device {name} can't be used here ({first_line(error)})")
        show(f"{found} can't be used here ({first_line(error)}): going on with the CPU", last=True)
        return torch.device("cpu")


def command(given, store):
    """Train, sample or evaluate."""
    device = find_device(given.get("device"))
    if not {"sample", "eval"} & given.keys():
        join(device, store)
        train(given, device)
    elif RANK == 0:
        run, out = load_run(given, device)
        if "sample" in given:
            sample(run, out, given["sample"], given)
        if "eval" in given:
            evaluate(run, out, test_data(run, given, out), given["eval"], given)
        print_written(out)


def explain(error):
    """A foreseeable fault as one line, or None."""
    text = first_line(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError):
        return f"{printable(error.filename)}: {error.strerror or text}" if error.filename else text
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return ("out of memory: try a smaller --batch-size, or --accumulate 2, which takes the same steps in less memory "
                f"({text[:100]})")
    if WORLD > 1 and isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
        return f"another process has ended ({text[:100]})"
    return None


def main(argv=None):
    """Do what the command line says; every foreseeable fault ends in one line, which one process says."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                        # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):        # characters that the terminal lacks are written out
            stream.reconfigure(errors="backslashreplace")
    store = None
    try:
        if WORLD > 1:
            store = next(dist.rendezvous("env://"))[0]
        command(options(argv), store)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit):
            if not error.code:
                raise
            line = error.code
        elif explain(error) is None:
            raise
        else:
            line = f"train.py: {f'rank {RANK}: ' if WORLD > 1 else ''}{explain(error)}"
        if store is not None and store.add("faults", 1) > 1:        # another process has said what went wrong
            line = 1
        raise SystemExit(line) from None


if __name__ == "__main__":
    main()
