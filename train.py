"""Train, sample and measure the diffusion models of ddpm.py and d3pm.py.

    python train.py                                images by DDPM, sized for this machine
    python train.py --model d3pm --data docs       text by D3PM
    python train.py --sample 64                    new samples from the run's checkpoint
    python train.py --eval                         bits/dim on the test split, term by term
    torchrun --nproc-per-node=8 train.py           the same run on eight devices

In order: options, data, network and diffusion, checkpoints, training, sampling, evaluation, figures.
"""
import argparse
import csv
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
import threading
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
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import d3pm
import ddpm

try:
    import fcntl
except ImportError:                     # Windows has none: there two runs in one folder are not told apart
    fcntl = None

matplotlib.use("Agg")

FONTS = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}


def fail(message):
    """A user's mistake or the machine's fault: one line, from one process of each machine, and no traceback."""
    raise SystemExit(f"train.py: {message}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


# ---------------------------------------------------------------- options

# What a run's weights depend on: kept in the checkpoint, and a resumed run must agree with it.
SETTINGS = ("model data steps batch_size lr seed timesteps schedule prediction variance transition reverse "
            "levels size length width").split()

# Network, batch, steps and peak learning rate by what is trained and where.
UNET = {"cpu": dict(width=32, mults=(1, 2), blocks=1, attention=(1,), patch=2, batch_size=24, lr=5e-3, steps=6300),
        "gpu": dict(width=128, mults=(1, 2, 2), blocks=2, attention=(1, 2), batch_size=256, lr=5e-4, steps=50000)}
TRANSFORMER = {"cpu": dict(width=128, depth=4, batch_size=16, lr=5e-3, steps=9000),
               "gpu": dict(width=512, depth=8, heads=8, dropout=0.1, batch_size=256, lr=1e-3, steps=20000)}


def options(argv=None):
    """The command line as a namespace that lacks what was not given, so that a checkpoint can fill it in."""
    p = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=80),
        description="Train a diffusion model; or use one, with --sample or --eval.")
    add = p.add_argument
    add("--model", choices=["ddpm", "d3pm"], help="Gaussian or discrete noise (ddpm)")
    add("--data", metavar="D", help="fashion-mnist, mnist, cifar10, glyphs, docs, a folder of "
        "images or a .txt file (fashion-mnist; glyphs if it can't be had)")
    add("--data-dir", metavar="DIR", help="where data sets are, or go to (data)")
    add("--out", metavar="DIR", help="where the run lives (runs/<model>-<data>)")
    add("--steps", type=int, metavar="N", help="training steps (by model and device)")
    add("--batch-size", type=int, metavar="N", help="examples a step on all devices (by device)")
    add("--lr", type=float, help="peak learning rate (by model)")
    add("--seed", type=int, metavar="N", help="of weights, batches, noise, samples (0)")
    add("--device", help="cpu, cuda, cuda:1, mps (the best found)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (1000 at most)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--sample", type=int, metavar="N", help="write N samples of the run in --out")
    add("--sample-steps", type=int, metavar="N", help="of --sample (images 50) and --eval (100)")
    add("--eta", type=float, help="sample by DDIM: 0 no noise, 1 ancestral")
    add("--prompt", metavar="TEXT", help="text to complete; _ is a free place")
    add("--eval", type=int, nargs="?", const=1000, metavar="N", help="bits/dim on N test examples (1000)")
    add("--figures", action="store_true", help="write the pictures that need no training")
    add("--timesteps", type=int, metavar="T", help="length of the chain (1000; text: --length)")
    add("--schedule", choices=["cosine", "linear", "mutual"], help="betas (cosine; by --transition)")
    add("--prediction", choices=["eps", "x0", "v"], help="what ddpm's network estimates (v)")
    add("--variance", type=variance, metavar="V", help="of ddpm's reverse step: learned, or 0..1 (learned)")
    add("--transition", choices=["uniform", "absorbing", "gaussian"], help="noise of d3pm (uniform; text: absorbing)")
    add("--reverse", choices=["joint", "conditional"], help="(conditional; gaussian: joint)")
    add("--levels", type=int, metavar="K", help="grey levels of d3pm's images (256)")
    add("--size", type=int, metavar="N", help="pixels a side, for a folder of images (32)")
    add("--length", type=int, metavar="N", help="characters of an example of text (128)")
    add("--width", type=int, metavar="N", help="channels of the network (by device)")
    args = p.parse_args(argv)
    ranges = dict(seed=(0, 2 ** 40), eta=(0, 1), variance=(0, 1), levels=(2, 256), lr=(1e-9, 1e3))
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1, math.inf))
        if type(value) in (int, float) and not low <= value <= high:
            p.error(f"--{name.replace('_', '-')} must lie in {low:g}..{high:g}, got {value}")
    return args


def variance(text):
    """--variance: learned, or a number."""
    return text if text == "learned" else float(text)


def complete(args, data, device):
    """The whole configuration of a run: what was given, then defaults by model, data and device."""
    args.model = getattr(args, "model", "ddpm")
    text, discrete = data.chars is not None, args.model == "d3pm"
    if text and not discrete:
        fail(f"--data {data.name} is text: it needs --model d3pm")
    size = dict((TRANSFORMER if text else UNET)["cpu" if device.type == "cpu" else "gpu"])
    if not text:
        size["fourier"] = (0, 1, 2, 3) if discrete else (2, 4, 6)
    transition = getattr(args, "transition", "absorbing" if text else "uniform")
    schedule = dict(uniform="cosine", absorbing="mutual", gaussian="linear")[transition] if discrete else "cosine"
    length = getattr(args, "length", 128)
    config = dict(model=args.model, data=data.source, seed=0, timesteps=length if text else 1000, schedule=schedule)
    if discrete:
        config |= dict(transition=transition, reverse="joint" if transition == "gaussian" else "conditional")
        config |= dict(length=length) if text else dict(levels=256)
    else:
        config |= dict(prediction="v", variance="learned")
    config |= dict(size=data.shape[-1]) if data.folder else {}
    config |= {k: size.pop(k) for k in ("steps", "batch_size", "lr", "width")}
    given = {k: v for k, v in vars(args).items() if k in SETTINGS and k not in ("data", "model")}
    for name in given.keys() - config.keys():
        fail(f"--{name.replace('_', '-')} has no meaning for --model {args.model} on --data {data.name}")
    config |= given
    shape = [length] if text else list(data.shape)
    return config | dict(shape=shape, chars=data.chars, network=dict(size, width=config["width"]))


# ---------------------------------------------------------------- data

def load_data(source, data_dir, size=32, rank=0):
    """A data set by name or path: train and test as uint8 (N, C, H, W), or the characters' numbers (N,).

    None is Fashion-MNIST, or glyphs with one line saying so where it can't be had.
    """
    data = SimpleNamespace(name=source or "fashion-mnist", source=source or "fashion-mnist", chars=None, folder=False)
    if data.name == "glyphs":
        data.train, data.test = glyphs(20000, seed=1), glyphs(2000, seed=2)
    elif data.name in TORCHVISION:
        try:
            data.train, data.test = (torchvision_images(data.name, data_dir, train) for train in (True, False))
        except Exception as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if source is not None:
                fail(f"{data.name} can't be had ({why}). Put torchvision's files under "
                     f"{pathlib.Path(data_dir) / TORCHVISION[data.name]}, or choose another --data")
            if rank == 0:
                print(f"Fashion-MNIST can't be had ({why}): training on the built-in glyphs instead.", flush=True)
            return load_data("glyphs", data_dir)
    elif data.name == "docs" or pathlib.Path(source).is_file():
        text = "\n\n".join(pydoc_data.topics.topics.values()) if data.name == "docs" else read_text(source)
        known, numbers = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        data.name, data.chars, numbers = pathlib.Path(source).stem, "".join(map(chr, known)), torch.from_numpy(numbers)
        data.train, data.test = numbers.split([len(text) - len(text) // 10, len(text) // 10])
    elif pathlib.Path(source).is_dir():
        path = pathlib.Path(source).resolve()
        data.folder, data.name, data.source = True, path.name, str(path)
        images = torch.from_numpy(folder_images(path, pathlib.Path(data_dir), size))
        data.train, data.test = images[len(images) // 10:], images[:len(images) // 10 or 1]
    else:
        fail(f"--data {source} is neither a known data set ({', '.join(TORCHVISION)}, glyphs, docs) "
             "nor a file or folder")
    data.shape = None if data.chars else tuple(data.train.shape[1:])
    return data


def torchvision_images(name, data_dir, train):
    """A torchvision data set as uint8 (N, C, H, W): files that are there, else its download."""
    cls = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        found = cls(data_dir, train=train)
    except RuntimeError:
        download(lambda: cls(data_dir, download=True), pathlib.Path(data_dir))
        found = cls(data_dir, train=train)
    images = torch.as_tensor(found.data)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def download(fetch, folder, patience=12):
    """Run fetch; TimeoutError once no byte has come into the folder for `patience` seconds."""
    outcome, size, since = [], -1, time.monotonic()
    socket.setdefaulttimeout(patience)

    def work():
        try:
            outcome.append(fetch())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        now = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.exists() else 0
        size, since = (now, time.monotonic()) if now != size else (size, since)
        if time.monotonic() - since > patience:
            raise TimeoutError(f"no byte of the download for {patience} seconds")
    if isinstance(outcome[0], Exception):
        raise outcome[0]


def glyphs(n, seed):
    """n grey 28 x 28 letters and digits, uint8 (n, 1, 28, 28): matplotlib's fonts under small random distortions."""
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    generator, cells = torch.Generator().manual_seed(seed), []
    for file in sorted(FONTS.glob("DejaVuSans*.ttf")) + sorted(FONTS.glob("DejaVuSerif*.ttf")):
        if "Display" in file.name:
            continue
        font = ImageFont.truetype(str(file), 40)
        for c in characters:
            cell = Image.new("L", (56, 56))
            ImageDraw.Draw(cell).text((28, 28), c, font=font, fill=255, anchor="mm")
            cells.append(torch.from_numpy(np.array(cell)))
    cells = torch.stack(cells)[torch.randint(len(cells), (n,), generator=generator), None].float()
    noise = 2 * torch.rand(n, 6, generator=generator) - 1
    angle, scale, shear = 0.15 * noise[:, 0], 1 + 0.15 * noise[:, 1], 0.15 * noise[:, 2]
    turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    theta = torch.cat([turn * scale[:, None, None], 0.1 * noise[:, 3:5, None]], dim=2)
    grid = nn.functional.affine_grid(theta, (n, 1, 56, 56), align_corners=False)
    large = nn.functional.grid_sample(cells, grid, align_corners=False)
    return nn.functional.avg_pool2d(large, 2).round().to(torch.uint8)


def read_text(path):
    """The characters of a UTF-8 file."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text")
    if len(text) < 1000 or "\0" in text:
        fail(f"{path} is {'not text' if chr(0) in text else f'too short to learn from ({len(text)} characters)'}")
    return text


def folder_images(folder, data_dir, size):
    """All images below a folder, centre-cropped to size x size, as a memory-mapped uint8 (N, C, size, size)."""
    Image.MAX_IMAGE_PIXELS = None
    kinds = {kind for kind, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in kinds and f.is_file())
    if len(files) < 2:
        fail(f"{folder} holds {len(files)} images: at least 2 are needed (one is held out)")
    key = hashlib.sha1("".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns} " for f in files).encode()).hexdigest()
    cache = data_dir / f"{folder.name}-{size}-{key[:10]}.npy"
    if not cache.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        files = [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))]
        file, partial = files[0], cache.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            grey = all(Image.open(file).mode in ("1", "L", "LA", "I", "I;16", "I;16B") for file in files[:64])
            shape = (len(files), 1 if grey else 3, size, size)
            with open(partial, "wb") as out:        # not through a memory map: on a full disk that is a bus error
                np.lib.format.write_array_header_1_0(out, dict(descr="|u1", fortran_order=False, shape=shape))
                for i, file in enumerate(files):
                    out.write(square(file, size, "L" if grey else "RGB"))
                    done = i + 1
                    show(f"decoding {done} of {len(files)} images", done == len(files), live_only=done % 10000 > 0)
            os.replace(partial, cache)
        except (OSError, SyntaxError, ValueError) as error:
            fail(f"{getattr(error, 'filename', None) or file} can't be read or kept ({error}): mend it or take it out")
        finally:
            partial.unlink(missing_ok=True)
    return np.load(cache, mmap_mode="c")


def square(file, size, mode):
    """The bytes of one image, centre-cropped and scaled to (C, size, size)."""
    with Image.open(file) as image:
        if image.mode[0] in "IF":        # 16 bits and more, which convert would clip at 255
            deep = np.asarray(image, np.float32)
            white = max(deep.max(), 65535 if image.mode[0] == "I" else 1)
            image = Image.fromarray((deep * (255 / white)).clip(0, 255).astype(np.uint8))
        image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)
    return np.array(image).reshape(size, size, -1).transpose(2, 0, 1).tobytes()


def yardsticks(data, config):
    """What trivial models need, in bits/dim: how good is good."""
    if data.chars:
        return f"unigram {entropy(torch.bincount(data.train)):.2f} bits/char"
    K, D, each = config.get("levels", 256), data.train[0].numel(), 0
    for x in data.train[:20000].split(max(1, 10 ** 7 // D)):
        x = x.flatten(1).long() * K // 256 + K * torch.arange(D)
        each = each + torch.bincount(x.flatten(), minlength=K * D).reshape(D, K)
    return (f"the grey values' histogram {entropy(each.sum(0)):.2f} bits/dim, "
            f"each pixel's own histogram {entropy(each).mean():.2f}")


def entropy(counts):
    """Entropy in bits of histograms (..., K)."""
    return torch.distributions.Categorical(counts.double()).entropy() / math.log(2)


# ---------------------------------------------------------------- network and diffusion

class StateUNet(nn.Module):
    """ddpm's U-Net for D3PM images: states enter as grey values and a sign for the mask; logits (B, C, H, W, K).

    Up to 32 states have a logit each; more are a truncated logistic's (Austin et al. 2021, appendix A.8). These say
    what the other pixels tell, which is all that the joint step wants; for the conditional one Bayes' rule adds what
    x_t itself does, log q(x_t | x_0). Under masks that is known anyway.
    """

    def __init__(self, diffusion, channels, **size):
        super().__init__()
        self.K, self.mask = diffusion.K, diffusion.transition.mask
        bayes = self.mask is None and diffusion.reverse == "conditional"
        self.transition = diffusion.transition if bayes else None    # else its tables would be in the EMA and DDP too
        self.levels, self.each = self.K - (self.mask is not None), self.K if self.K <= 32 else 2
        self.unet = ddpm.UNet(2 * channels, self.each * channels, **size)

    def forward(self, xt, t):
        masked = torch.zeros_like(xt, dtype=torch.bool) if self.mask is None else xt == self.mask
        grey = (2 * xt.float() / (self.levels - 1) - 1).masked_fill(masked, 0.0)
        B, C, H, W = xt.shape
        out = self.unet(torch.cat([grey, masked.float()], dim=1), t).float()
        logits = out.reshape(B, C, self.each, H, W).movedim(2, -1)
        if self.K > 32:
            mean, log_scale = logits.unbind(-1)
            logits = d3pm.truncated_logistic(grey + mean, log_scale - 2, self.levels)
            logits = nn.functional.pad(logits, (0, self.K - self.levels))
        return logits + self.transition.log_columns(xt, 0, t) if self.transition else logits


def build(config):
    """The network and the diffusion that a configuration describes."""
    T, size = config["timesteps"], config["network"]
    try:
        if config["model"] == "ddpm":
            schedule = dict(cosine=ddpm.cosine_beta_schedule, linear=ddpm.linear_beta_schedule)[config["schedule"]]
            diffusion = ddpm.GaussianDiffusion(schedule(T), config["prediction"], config["variance"])
            C, H, W = config["shape"]
            net = ddpm.UNet(C, 2 * C if config["variance"] == "learned" else C, **size)
        else:
            betas = dict(cosine=d3pm.cosine_betas, linear=d3pm.linear_betas, mutual=d3pm.mutual_information_betas)
            family = getattr(d3pm, config["transition"] + "_transition")
            states = len(config["chars"]) if config["chars"] else config["levels"]
            K = states + (config["transition"] == "absorbing")
            diffusion = d3pm.D3PM(family(K, betas[config["schedule"]](T)), config["reverse"])
            net = (d3pm.Transformer(K, config["shape"], **size) if config["chars"]
                   else StateUNet(diffusion, config["shape"][0], **size))
    except KeyError:
        fail(f"--schedule {config['schedule']} is not for --model {config['model']}")
    except ValueError as error:
        fail(str(error))
    return net, diffusion


def states(x, config):
    """uint8 images or numbers of characters as the diffusion takes them: [-1, 1] for ddpm, int64 states for d3pm."""
    if config["model"] == "ddpm":
        return x.float() / 127.5 - 1
    return x.long() if config["chars"] else x.long() * config["levels"] // 256


def pictures(x, config):
    """The way back for images: uint8 (B, C, H, W). Masks become mid-grey."""
    if config["model"] == "ddpm":
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    grey = (x * 255 / (config["levels"] - 1)).round().clamp(0, 255)
    return grey.masked_fill(x >= config["levels"], 128).to(torch.uint8)


# ---------------------------------------------------------------- the screen and the other processes

def show(line, last=False, live_only=False):
    """A live line on a terminal, which the last one leaves standing; elsewhere a plain line, unless live_only."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="\n" if last else "", flush=True)
    elif last or not live_only:
        print(line, flush=True)


def find_device(name=None):
    """The device asked for, else the best one found: this process's own CUDA device, mps, or the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} can't be used here ({str(error).splitlines()[0]})")


def join_processes(device):
    """(rank, world) of this process under torchrun, (0, 1) without it."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Two backends: what the processes agree on between steps goes by gloo, on the CPU, and no GPU is waited for.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# ---------------------------------------------------------------- checkpoints

def save(path, state):
    """Write a checkpoint whole or not at all, and keep the one before as *.previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue(), keep=path.with_suffix(".previous.pt"))


def write_whole(path, content, keep=None):
    """Bytes into a temporary file, flushed to the disk, then renamed: path never holds half of them."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            shutil.copyfile(path, keep.with_suffix(".tmp"))
            os.replace(keep.with_suffix(".tmp"), keep)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def load(out):
    """The checkpoint of a run, on the CPU; one line where there is none or it can't be read."""
    path = out / "checkpoint.pt"
    if not path.exists():
        fail(f"no checkpoint in {out}: train first, or name the run with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net, _ = build(state["config"])
        net.load_state_dict(state["ema"])
        for optimizer, moments in zip(optimizers(net, 0.0), state["optimizer"], strict=True):
            optimizer.load_state_dict(moments)
        return state | dict(step=int(state["step"]))
    except OSError:
        raise
    except Exception:
        pass
    previous = path.with_suffix(".previous.pt")
    fail(f"{path} is damaged or not a checkpoint of train.py"
         + (f"; the one before is {previous}: copy it there" if previous.exists() else ""))


def restore(out, device, args):
    """Network with its EMA weights, diffusion and configuration of the run in `out`."""
    state = load(out)
    learned = state["config"].get("variance") == "learned"
    if not learned and getattr(args, "variance", None) == "learned":
        fail(f"the run in {out} has learnt no variance: --variance takes a number there")
    asked = {name: getattr(args, name) for name in ("variance", "reverse") if hasattr(args, name)}
    config = state["config"] | {k: v for k, v in asked.items() if k in state["config"]}
    (net, _), (_, diffusion), C = build(state["config"]), build(config), config["shape"][0]
    net.load_state_dict(state["ema"])
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if learned and config["variance"] != "learned":
        return lambda x, t: net(x, t)[:, :C], diffusion.to(device), config
    return net, diffusion.to(device), config


# ---------------------------------------------------------------- training

def learning_rate(step, steps, peak):
    """Linear warm-up over the first 2 % of the steps (at most 1000), and a straight line from the peak down to 0."""
    warm = min(1000, steps // 50 + 1)
    return peak * min((step + 1) / warm, 1 - step / steps)


def batch(step, config, diffusion, train, part):
    """The loss's arguments for one step, drawn by (seed, step) for the whole batch; this process's part of them.

    So a run is the same however often it is stopped, and on any number of processes. The times are
    stratified, one in each of batch_size equal shares: the same mean loss with less noise. They are
    uniform on 1..T but for v, where t is drawn in proportion to 1/2 + alpha_bar_t: the error of eps is alpha_bar_t
    times that of v. So small t, where the bits are spent, come thrice as often as the largest, which decide the
    coarsest features of an image.
    """
    torch.manual_seed(config["seed"] * 1_000_003 + step)
    B, T, device = config["batch_size"], config["timesteps"], diffusion.device
    if config["chars"]:
        start = torch.randint(len(train) - config["length"] + 1, (B, 1), device=train.device)
        x0 = train[start + torch.arange(config["length"], device=train.device)]
    else:
        x0 = train[torch.randint(len(train), (B,), device=train.device)]
    x0 = states(x0.to(device, non_blocking=True), config)
    share = (torch.arange(B, device=device) + torch.rand(1, device=device)) / B
    if config.get("prediction") == "v":
        mass = (0.5 + diffusion.alpha_bar[1:]).float().to(device).cumsum(0)
        t = torch.searchsorted(mass, share * mass[-1], right=True).clamp(max=T - 1) + 1
    else:
        t = (share * T).long().clamp(max=T - 1) + 1
    noise = torch.randn_like(x0) if config["model"] == "ddpm" else diffusion.q_sample(x0, t)
    return x0[part], t[part], noise[part]


def objective(config, diffusion, model, x0, t, noise):
    """The loss (B,) that train.py minimises: hybrid for ddpm; for d3pm the bound.

    Under uniform noise the conditional step wants what the cross-entropy wants, and that is the less noisy teacher.
    """
    if config["model"] == "ddpm":
        if config["variance"] != "learned":
            return diffusion.loss_simple(model, x0, t, noise)
        # Steps as long as those of --eval. The slope of the bound in f goes as log(beta / beta_tilde)^2, about 1 / t^2:
        # under one weight f would be learnt at small t alone. So it rises from the paper's 1e-3 to about 1.
        T = config["timesteps"]
        s = (t - math.ceil(T / 100)).clamp(min=1).minimum(t - 1)
        return diffusion.loss_hybrid(model, x0, t, noise, s, 1e-3 + (t / T) ** 2)
    simple = config["transition"] == "uniform" and config["reverse"] == "conditional"
    return (diffusion.loss_simple if simple else diffusion.loss_vlb)(model, x0, t, noise)


class Muon(torch.optim.Optimizer):
    """Matrices that step in all their directions alike: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.

    The averaged gradient has a few large singular values; set to 1, the rare directions learn as fast. Times
    0.2 sqrt(longer side) the step is of Adam's size and can have Adam's learning rate (Liu et al. 2025, 2502.16982).
    A convolution is the matrix (out, in height width). torch.optim.Muon takes 2 D weights alone and multiplies
    them in bfloat16, which most CPUs lack: there this one, in float32 and all of a size at once, is ten times as fast.
    """

    def __init__(self, weights, lr):
        sizes = {}
        for w in weights:
            sizes.setdefault(tuple(sorted((len(w), w[0].numel()))), []).append(w)
        super().__init__([dict(params=same) for same in sizes.values()], dict(lr=lr))
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
            steps = orthogonal(ahead.bfloat16() if ahead.is_cuda else ahead).to(ahead.dtype)
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


def optimizers(net, lr):
    """Muon for the matrices inside a network, Adam for its biases, norms and embeddings."""
    inside = [m.weight for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    rest = [p for p in net.parameters() if all(p is not w for w in inside)]
    return [Muon(inside, lr), torch.optim.Adam(rest, lr, betas=(0.9, 0.99), fused=True)]


def average(net):
    """The EMA of a network's weights; its decay warms up as (1 + n) / (10 + n), so that early weights are forgotten."""
    def update(averages, weights, _):
        n = ema.n_averaged.item()
        torch._foreach_lerp_(averages, weights, 1 - min(0.9999, (1 + n) / (10 + n)))

    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=update)
    ema.n_averaged = ema.n_averaged.cpu()        # torch reads it at each update: on a GPU that would wait
    return ema


def compiled(net, device, x, t):
    """torch.compile(net) where that works on this GPU, else net itself and one line."""
    if device.type != "cuda":
        return net
    try:
        fast = torch.compile(net)
        with torch.autocast("cuda", torch.bfloat16):
            fast(x, t).float().mean().backward()
        net.zero_grad()
        return fast
    except Exception as error:
        print(f"going on uncompiled: {str(error).splitlines()[0][:100]}", flush=True)
        return net


def prepare(args, out, device, rank):
    """The data, the configuration and, for --resume, the checkpoint of the run that was asked for."""
    state = load(out) if getattr(args, "resume", False) else None
    source = getattr(args, "data", state["config"]["data"] if state else None)
    size = getattr(args, "size", state["config"].get("size", 32) if state else 32)
    data = load_data(source, args.data_dir, size, rank)
    if state is None:
        config = complete(args, data, device)
    else:
        config = state["config"]
        asked = {k: v for k, v in vars(args).items() if k in SETTINGS} | dict(data=data.source)
        differ = [f"{k.replace('_', '-')} {config.get(k)} there, {v} here" for k, v in asked.items()
                  if config.get(k) != v]
        if differ or data.chars != config["chars"]:
            fail(f"{out} was trained with other settings ({'; '.join(differ) or 'the characters of the text'}): "
                 "leave them out, or choose another --out")
        if state["step"] >= config["steps"]:
            fail(f"the run in {out} has done its {config['steps']} steps: use it with --sample or --eval")
    found = f"{len(data.train)}-{zlib.crc32(data.train[:2000].contiguous().numpy()):08x}"
    if config.setdefault("fingerprint", found) != found:
        fail(f"the data of the run in {out} has changed since it began: bring it back, or choose another --out")
    if config["chars"] and min(len(data.train), len(data.test)) < config["length"]:
        fail(f"{data.name} is too short for --length {config['length']}")
    if hasattr(args, "prompt"):
        encode_prompt(args.prompt, config)
    return data, config, state


def prepare_in_turn(args, out, device, rank, world):
    """prepare, first where it may download or decode, then in one process of each other machine, then in the rest."""
    if world == 1:
        return prepare(args, out, device, rank)
    turn = 0 if rank == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for now in range(3):
        if now == turn:
            found = prepare(args, out, device, rank)
        dist.barrier()
    dist.all_gather_object(every := [None] * world, found[1])
    if any(config != found[1] for config in every):
        fail("the processes found different data: give them the same --data-dir")
    return found


def open_run(out, config):
    """The folder of a run, with its config.json, for this process alone: the lock goes when the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is being written to {out}: choose another --out")
    write_whole(out / "config.json", json.dumps(config, indent=1).encode())
    return lock


def train(args, out, device):
    """One run: new, or resumed from its checkpoint."""
    rank, world = join_processes(device)
    data, config, state = prepare_in_turn(args, out, device, rank, world)
    out = out or pathlib.Path(f"runs/{config['model']}-{data.name}")
    if state is None and (out / "checkpoint.pt").exists():
        fail(f"{out} already holds a run: go on with --resume, or choose another --out")
    B, steps, T = config["batch_size"], config["steps"], config["timesteps"]
    if B % world:
        fail(f"--batch-size {B} does not divide by {world} processes")

    torch.manual_seed(config["seed"])
    net, diffusion = build(config)
    net, diffusion = net.to(device, memory_format=torch.channels_last), diffusion.to(device)
    both, ema, start = optimizers(net, config["lr"]), average(net), 0
    if state:
        net.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        for optimizer, moments in zip(both, state["optimizer"]):
            optimizer.load_state_dict(moments)
        ema.n_averaged.fill_(state["step"])
        start = state["step"]
    examples = data.train.to(device) if data.train.numel() < 4e9 else data.train
    part = slice(rank * B // world, (rank + 1) * B // world)
    try:
        x0, t, noise = batch(start, config, diffusion, examples, part)
        objective(config, diffusion, net, x0[:1], t[:1], noise[:1])
    except ValueError as error:
        fail(f"{error}; see --size, --width, --levels and --length")
    fast = compiled(net, device, x0 if config["model"] == "d3pm" else noise, t)
    parallel = fast
    if world > 1:
        parallel = nn.parallel.DistributedDataParallel(fast, [device] if device.type == "cuda" else None)

    def model(xt, t):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return parallel(xt, t)

    if rank == 0:
        lock = open_run(out, config)            # held by its name until the end
        print(f"{config['model']} on {data.name} ({len(data.train):,} {'characters' if data.chars else 'images'}), "
              f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} million parameters, {device}"
              f"{f' x {world}' if world > 1 else ''}, batch {B}, steps {start} to {steps} -> {out}")
        print(f"yardsticks: {yardsticks(data, config)}; samples and bounds use the EMA weights", flush=True)
        if not config["chars"]:
            forward_picture(data.test[:1].to(device), [diffusion], config).save(out / "forward.png")

    asked = []                                               # signals to stop
    handlers = {n: signal.signal(n, lambda *_: asked.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    log_every, test_every = max(1, min(50, steps // 10)), max(1, steps // 5)
    save_every = getattr(args, "save_every", max(1, min(1000, steps // 10)))
    rows = [row for row in read_log(out) if int(row["step"]) <= start]
    losses = torch.zeros(2, 4, device=device)                # by quarter of t: sum and number
    bad = torch.full((), math.inf, device=device)            # the first step with a loss that is not finite
    since, clock = start, time.monotonic()

    for step in range(start, steps):
        x0, t, noise = batch(step, config, diffusion, examples, part)
        loss = objective(config, diffusion, model, x0, t, noise)
        net.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr = learning_rate(step, steps, config["lr"])
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        ema.update_parameters(net)
        loss, done = loss.detach(), step + 1
        losses += torch.zeros_like(losses).index_add(1, (t - 1) * 4 // T, torch.stack([loss, torch.ones_like(loss)]))
        bad = torch.where(loss.isfinite().all(), bad, bad.clamp(max=done))

        report, keep = done % log_every == 0 or done == steps, done % save_every == 0 or done == steps
        stopping = torch.tensor(bool(asked), dtype=torch.float)
        if world > 1:
            dist.all_reduce(stopping)
        if not (report or keep or stopping):
            continue
        # The one place that waits for the device. A bad gradient of a good loss shows in the weights.
        bad = torch.where(nn.utils.get_total_norm(list(net.parameters())).isfinite(), bad, bad.clamp(max=done))
        seen = losses.flatten().clone()
        if world > 1:
            dist.all_reduce(seen)
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        seen = seen.tolist()
        if math.isfinite(bad):
            fail(f"the loss is not finite at step {int(bad)}: {out} keeps the last good checkpoint; try a lower --lr")
        if report and rank == 0:
            sums, numbers, rate = seen[:4], seen[4:], (done - since) * B / (time.monotonic() - clock)
            row = dict(step=done, loss=sum(sums) / sum(numbers), lr=lr, rate=round(rate, 1), test_bits="")
            row |= {f"quarter{i + 1}": sums[i] / numbers[i] if numbers[i] else math.nan for i in range(4)}
            if done % test_every == 0 or done == steps:
                row["test_bits"] = held_out(ema.module, diffusion, data, config, out)
            rows.append(row)
            write_log(out, rows)
            left, quarters = int((steps - done) * B / rate), " ".join(f"{row[f'quarter{i}']:.3f}" for i in range(1, 5))
            bits = f"  test {row['test_bits']:.3f} bits/dim" if row["test_bits"] else ""
            show(f"step {done}/{steps}  loss {row['loss']:.4f} (by t {quarters})  {rate:.0f}/s  "
                 f"{left // 60}:{left % 60:02d} left{bits}", last=done == steps)
        if report:
            losses.zero_()
            since, clock = done, time.monotonic()
        if rank == 0 and (keep or stopping):
            save(out / "checkpoint.pt", dict(model=net.state_dict(), ema=ema.module.state_dict(),
                                             optimizer=[one.state_dict() for one in both], step=done, config=config))
        if stopping:
            fail(f"stopped at step {done}; go on with --resume")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if rank == 0:
        loss_figure(out)
        sample(ema.module.eval(), diffusion, config, out, 16 if config["chars"] else 64, args)
        print_written(out)
    if world > 1:
        dist.destroy_process_group()


def print_written(out):
    """The files of a run."""
    print(f"in {out}: " + ", ".join(sorted(file.name for file in out.glob("[!.]*"))))


def read_log(out):
    """The rows of log.csv, if there is one."""
    path = out / "log.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def write_log(out, rows):
    """log.csv anew, whole."""
    lines = [",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))]
    write_whole(out / "log.csv", ("\n".join(lines) + "\n").encode())


@torch.no_grad()
def held_out(net, diffusion, data, config, out):
    """Bits/dim of 32 test examples in 100 steps, and a grid of samples so far. The next step sets its own seed."""
    torch.manual_seed(0)
    x0 = states(test_examples(data, config, 32).to(diffusion.device), config)
    bits = diffusion.bits_per_dim(net.eval(), x0, 100)["total"].mean().item()
    if not config["chars"]:
        save_grid(out / "samples.png", pictures(draw(net, diffusion, config, 16, 20)[0], config))
    return bits


def test_examples(data, config, n):
    """The first n test images, or n windows spread over the test text."""
    if not config["chars"]:
        return data.test[:n]
    starts = torch.linspace(0, len(data.test) - config["length"], n).long()
    return data.test[starts[:, None] + torch.arange(config["length"])]


# ---------------------------------------------------------------- sampling

def draw(net, diffusion, config, n, steps, eta=None, known=None, frames=20):
    """n samples on the CPU, and about `frames` pairs (s, xs) on the way to them."""
    extra = dict(eta=eta) if config["model"] == "ddpm" else dict(known=known)

    def network(x, t):
        with torch.autocast(diffusion.device.type, torch.bfloat16, enabled=diffusion.device.type == "cuda"):
            return net(x, t)

    grid, kept = [0, *diffusion.timesteps(steps)], []
    for i, (s, xs, _) in enumerate(diffusion.sample_progressive(network, (n, *config["shape"]), steps, **extra)):
        if s == 0 or i % max(1, len(grid) // frames) == 0:
            kept.append((s, xs.cpu()))
    return kept[-1][1], kept


def sample(net, diffusion, config, out, n, args):
    """n samples into out, in chunks: samples.png, samples.gif and samples.npy; or samples.txt and samples.gif."""
    torch.manual_seed(getattr(args, "seed", config["seed"]))
    steps = getattr(args, "sample_steps", config["timesteps"] if config["chars"] else 50)
    known = encode_prompt(args.prompt, config) if hasattr(args, "prompt") else None
    chunk, parts = 64 if diffusion.device.type == "cpu" else 512, []
    for first in range(0, n, chunk):
        x0, frames = draw(net, diffusion, config, min(chunk, n - first), steps, getattr(args, "eta", None), known)
        parts.append(x0)
        if first == 0:
            film = frames
        show(f"sampled {min(first + chunk, n)} of {n}", last=first + chunk >= n, live_only=True)
    x0 = torch.cat(parts)
    if config["chars"]:
        texts = [f"--- {i + 1}\n{text}\n" for i, text in enumerate(decode(x0, config))]
        (out / "samples.txt").write_text("\n".join(texts), encoding="utf-8")
        save_gif(out / "samples.gif", [text_picture(decode(xs[:4], config)) for _, xs in film])
        for s, xs in dict(film[::max(1, len(film) // 6)] + film[-1:]).items():
            print(f"t = {s:4d}  {decode(xs[:1], config)[0][:70]!r}")
        return
    images = pictures(x0, config)
    np.save(raw := io.BytesIO(), images.permute(0, 2, 3, 1).numpy())
    write_whole(out / "samples.npy", raw.getvalue())
    save_grid(out / "samples.png", images[:64])
    save_gif(out / "samples.gif", [grid_picture(pictures(xs[:36], config)) for _, xs in film])


def decode(x, config):
    """Numbers of characters (B, L) as strings; a mask is shown as a middle dot."""
    characters = config["chars"] + "\N{MIDDLE DOT}"
    return ["".join(characters[i] for i in row) for row in x.tolist()]


def encode_prompt(prompt, config):
    """A prompt as the `known` of D3PM.sample, (L,): -1 where it says _ and after its end."""
    if not config["chars"]:
        fail("--prompt is for text, and this run is of images")
    strange = sorted(set(prompt) - set(config["chars"]) - {"_"})
    if strange or len(prompt) > config["length"]:
        fail(f"--prompt has characters that the run does not know: {strange}" if strange
             else f"--prompt is longer than the run's {config['length']} characters")
    return torch.tensor([-1 if c == "_" else config["chars"].index(c) for c in prompt.ljust(config["length"], "_")])


def grid_picture(images, columns=None):
    """uint8 (N, C, H, W) as one picture, square-ish if the columns are not given."""
    grid = torchvision.utils.make_grid(images, nrow=columns or math.ceil(len(images) ** 0.5), padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_grid(path, images):
    """grid_picture as a PNG, twice as large as life where that is small."""
    picture = grid_picture(images)
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


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(net, diffusion, config, out, n, args, data):
    """The bound on n test examples, term by term: eval.json, a table, terms.png and lossy.png."""
    torch.manual_seed(getattr(args, "seed", config["seed"]))
    steps, device = getattr(args, "sample_steps", 100), diffusion.device
    examples, parts = test_examples(data, config, n), []
    for chunk in examples.split(64 if device.type == "cpu" else 256):
        parts.append(diffusion.bits_per_dim(net, states(chunk.to(device), config), steps))
        show(f"bounds of {sum(len(part['total']) for part in parts)} of {len(examples)} examples", live_only=True)
    result = {key: torch.cat([part[key] for part in parts]).double().cpu() for key in parts[0]}
    grid, unit = diffusion.timesteps(steps), "bits/char" if config["chars"] else "bits/dim"
    terms, total = result["terms"].mean(0), result["total"]
    show(f"{config['model']} on {data.name}: {total.mean():.4f} {unit} +- {total.std() / len(total) ** 0.5:.4f} "
         f"on {len(total)} test examples, {len(grid)} steps", last=True)
    print(f"  L_T {result['prior'].mean():.4f}\n  L_t {terms[1:].sum():.4f} in {len(grid) - 1} terms, by quarter of t: "
          + " ".join(f"{quarter.sum():.4f}" for quarter in terms[1:].tensor_split(4)) + f"\n  L_0 {terms[0]:.4f}")
    print(f"  yardsticks: {yardsticks(data, config)}")
    error = result["x0_mse" if "x0_mse" in result else "x0_error"].mean(0)
    write_whole(out / "eval.json", json.dumps(dict(
        total=total.mean().item(), prior=result["prior"].mean().item(), steps=grid, terms=terms.tolist(),
        x0_mse_or_error=error.tolist(), examples=len(total), unit=unit)).encode())

    left, right = panels(2, (9, 3.2))
    lengths = torch.tensor(grid) - torch.tensor([0, *grid[:-1]])
    left.loglog(grid, (terms / lengths).clamp(min=1e-9), ".-", markersize=3)
    left.set(xlabel="t", ylabel=f"{unit} for a unit of t", title="the bound's terms: L_0 first")
    # Sent from T downwards, x_s costs L_T and the terms above it; from x_s the receiver guesses x0_hat.
    rate = result["prior"].mean() + terms.flip(0).cumsum(0)
    distortion = error.flip(0).sqrt() * 127.5 if "x0_mse" in result else 100 * error.flip(0)
    right.plot(torch.cat([result["prior"].mean()[None], rate[:-1]]), distortion, ".-", markersize=3)
    right.set(xlabel=f"rate, {unit}", title="progressive lossy compression",
              ylabel="root mean square error, of 255" if "x0_mse" in result else "places guessed wrong, %")
    save_figure(out / "terms.png")
    if not config["chars"]:
        lossy_pictures(net, diffusion, config, out / "lossy.png", states(examples[:8].to(device), config), grid)


def lossy_pictures(net, diffusion, config, path, x0, grid):
    """What a receiver who has x_t guesses, for eight test images (rows) and falling t (columns); last the image."""
    columns = []
    for t in [grid[i] for i in torch.linspace(len(grid) - 1, 0, 9).long().tolist()]:
        guess = diffusion.p_sample(net, diffusion.q_sample(x0, t), t)[1]       # x0_hat, or log p(x_0 | x_t)
        columns.append(pictures(guess if config["model"] == "ddpm" else guess.argmax(-1), config))
    images = torch.stack([*columns, pictures(x0, config)], dim=1).flatten(0, 1).cpu()
    grid_picture(images, columns=10).save(path)


# ---------------------------------------------------------------- figures

def panels(n, size):
    """n axes side by side, as a list."""
    return list(plt.subplots(1, n, figsize=size, layout="constrained", squeeze=False)[1][0])


def save_figure(path):
    """The figure drawn last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=110)
    plt.close()


def loss_figure(out):
    """loss.png from log.csv: the loss by quarter of t, and the held-out bound."""
    rows, (loss, bound) = read_log(out), panels(2, (9, 3))
    step = [int(row["step"]) for row in rows]
    for name in ("quarter1", "quarter2", "quarter3", "quarter4", "loss"):
        loss.semilogy(step, [float(row[name]) for row in rows], "k" if name == "loss" else "", label=name)
    loss.set(xlabel="step", title="training loss, by quarter of t")
    loss.legend(fontsize=7)
    seen = [row for row in rows if row["test_bits"]]
    bound.plot([int(row["step"]) for row in seen], [float(row["test_bits"]) for row in seen], "o-")
    bound.set(xlabel="step", title="bits/dim of 32 test examples, EMA weights")
    save_figure(out / "loss.png")


def forward_picture(x0, diffusions, config):
    """One image at ten times under each diffusion, a row each."""
    torch.manual_seed(0)
    x = states(x0, config)
    return grid_picture(torch.cat([pictures(diffusion.q_step(x, 0, t).cpu(), config) for diffusion in diffusions
                                   for t in torch.linspace(0, diffusion.T, 10).long().tolist()]), columns=10)


def figures(folder, data):
    """The README's pictures that need no training."""
    def strip(axis, chains, config):
        axis.imshow(forward_picture(data.test[:1], chains.values(), config), cmap="gray")
        axis.set_yticks([30 * i + 16 for i in range(len(chains))], chains)
        axis.set_xticks([30 * i + 16 for i in range(10)], [f"{i / 9:.2g}" for i in range(10)])
        axis.set(xlabel="t / T")

    T = 1000
    chains = {name: ddpm.GaussianDiffusion(betas(T), variance=0.0) for name, betas in
              (("linear", ddpm.linear_beta_schedule), ("cosine", ddpm.cosine_beta_schedule))}
    images, kept = panels(2, (11, 2.6))
    strip(images, chains, dict(model="ddpm"))
    for name, chain in chains.items():
        kept.plot(chain.alpha_bar, label=name)
    kept.set(xlabel="t", title="alpha_bar: share of the signal's power")
    kept.legend()
    save_figure(folder / "forward.png")

    ratio, weights, strides = panels(3, (13, 3))
    for n, height in ((1000, 3), (100, None), (50, 2), (10, 1)):
        grid = chains["cosine"].timesteps(n)
        noise = 1 - chains["cosine"].alpha_bar[grid]
        if n != 50:
            ratio.plot(grid[1:], noise[:-1] / noise[1:], label=f"{n} steps")
        if height:
            strides.plot(grid, [height] * n, "|", markersize=14)
    ratio.set(xlabel="t", title="beta_tilde / beta: the ends of the learned range")
    for name, chain in chains.items():
        alpha, noise_s = chain.alpha_bar[2:] / chain.alpha_bar[1:-1], 1 - chain.alpha_bar[1:-1]
        weights.semilogy(range(2, T + 1), (1 - alpha) / (2 * alpha * noise_s), label=name)
    weights.set(xlabel="t", title="the weight of ||eps - eps_hat||^2 that L_simple drops")
    strides.set(xlabel="t", yticks=[3, 2, 1], yticklabels=["1000 steps", "50", "10"], ylim=(0.3, 3.7),
                title="strided sampling: a list of times")
    ratio.legend(), weights.legend()
    save_figure(folder / "improved.png")

    [axis], mean, std, x = panels(1, (5, 3)), torch.tensor(0.4), torch.tensor(0.25), torch.linspace(-1, 1, 9)
    fine = torch.linspace(-1.4, 1.6, 300)
    density = torch.distributions.Normal(mean, std).log_prob(fine).exp()
    axis.plot(fine, density / 4, "k", label="density, scaled to a bin")
    axis.bar(x, ddpm.discretized_gaussian_log_likelihood(x, mean, std.log(), len(x)).exp(), 0.24, alpha=0.5,
             label="mass of a level's bin; the outer two are open")
    axis.set(xlabel="x_0", title="the decoder L_0, for 9 levels", ylim=(0, 0.5))
    axis.legend(fontsize=7, loc="upper left")
    save_figure(folder / "decoder.png")

    def families(K, T, masks=0):
        return dict(uniform=d3pm.uniform_transition(K, d3pm.cosine_betas(T)),
                    absorbing=d3pm.absorbing_transition(K + masks, d3pm.mutual_information_betas(T)),
                    gaussian=d3pm.gaussian_transition(K, d3pm.linear_betas(T)))

    K, T = 16, 100
    ring = torch.polar(torch.ones(K), 2 * math.pi * torch.arange(K) / K)
    near = d3pm.neighbour_transition(torch.view_as_real(ring), d3pm.linear_betas(T), 2)
    shown, times = families(K, T) | dict(neighbour=near), (50, 50, 1, 25)       # each where its shape is plain
    for axis, (name, family), t in zip(panels(4, (11, 3)), shown.items(), times):
        axis.imshow(family.matrix(0, t), cmap="magma", vmin=0, vmax=0.4)
        axis.set(title=f"{name}, Q_bar at t = {t}", xlabel="x_t", ylabel="x_0", xticks=[], yticks=[])
    save_figure(folder / "transitions.png")
    strip(panels(1, (9, 3.2))[0], {name: d3pm.D3PM(family) for name, family in families(256, T, masks=1).items()},
          dict(model="d3pm", chars=None, levels=256))
    save_figure(folder / "forward-d3pm.png")
    print(f"written to {folder}: " + ", ".join(sorted(f.name for f in folder.glob("*.png"))))


# ---------------------------------------------------------------- what was asked for

def main(argv=None):
    """Train, sample, evaluate or draw, as the command line says; every foreseeable fault ends in one line."""
    args = options(argv)
    args.data_dir = getattr(args, "data_dir", "data")
    out = pathlib.Path(args.out) if hasattr(args, "out") else None
    use = hasattr(args, "sample") or hasattr(args, "eval") or hasattr(args, "resume")
    if out is None and use:
        model, path = getattr(args, "model", "ddpm"), pathlib.Path(getattr(args, "data", "fashion-mnist")).resolve()
        out = pathlib.Path(f"runs/{model}-{path.name if path.is_dir() else path.stem}")
        if not hasattr(args, "data") and not out.exists():       # Fashion-MNIST could not be had then
            out = pathlib.Path(f"runs/{model}-glyphs")
    try:
        device = find_device(getattr(args, "device", None))
        if hasattr(args, "figures"):
            return figures(pathlib.Path("assets"), load_data(getattr(args, "data", None), args.data_dir))
        if not (hasattr(args, "sample") or hasattr(args, "eval")):
            return train(args, out, device)
        net, diffusion, config = restore(out, device, args)
        if hasattr(args, "sample"):
            sample(net, diffusion, config, out, args.sample, args)
        if hasattr(args, "eval"):
            data = load_data(getattr(args, "data", config["data"]), args.data_dir, config.get("size", 32))
            if bool(data.chars) != bool(config["chars"]) or not data.chars and list(data.shape) != config["shape"]:
                fail(f"{data.name} does not fit the run in {out}, which is of {config['data']}")
            if data.chars:                  # in the run's numbers
                strange = sorted(set(data.chars) - set(config["chars"]))
                if strange:
                    fail(f"{data.name} has characters that the run in {out} does not know: {strange}")
                if len(data.test) < config["length"]:
                    fail(f"{data.name} is too short: its last tenth must hold {config['length']} characters")
                number = torch.tensor([config["chars"].index(c) for c in data.chars])
                data.train, data.test, data.chars = number[data.train], number[data.test], config["chars"]
            evaluate(net, diffusion, config, out, args.eval, args, data)
        print_written(out)
    except KeyboardInterrupt:
        fail("interrupted")
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
