"""The slow tests of train.py: real runs, real faults, and every command of the README.

    pytest .ci/test_train.py
"""
import contextlib
import fcntl
import io
import json
import math
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "assets"))
import figures  # noqa: E402
import train  # noqa: E402  it stands one folder above

torch.set_num_threads(1)        # as in the processes that `command` starts: sums over other parts round otherwise

TINY = "--width 8 --batch-size 4 --timesteps 8 --steps 10 --save-every 1".split()
TEXT = "".join(random.Random(0).choices("abcde \n", k=3000))


@pytest.fixture
def home(tmp_path):
    """A folder with a small data set in torchvision's layout, a text, and images of several sizes and modes."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 80), ("t10k", 20)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "images").mkdir()
    for i, mode in enumerate(["RGB", "L", "P", "RGBA", "LA", "CMYK"] * 4):
        name = f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), np.uint8)).convert(mode).save(tmp_path / "images" / name)
    return tmp_path


def command(home, *args, launcher=(sys.executable,), script=ROOT / "train.py", **options):
    """train.py in the folder `home` as a process of its own: to be killed, limited or launched by torchrun."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1") | options.pop("env", {})
    return subprocess.Popen([*launcher, str(script), *map(str, args)], cwd=home, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def stand_in(**config):
    """What batch, times and objective need of a run."""
    config = dict(model="ddpm", prediction="eps", variance="learned", seed=0, batch_size=4000, timesteps=4, plain=False,
                  mirror=False, dropout=0.0) | config
    diffusion = train.ddpm.GaussianDiffusion(torch.tensor([0.1, 0.3, 0.5, 0.9]), config["prediction"])
    return SimpleNamespace(config=config, device=torch.device("cpu"), discrete=False, text=False, step=0,
                           diffusion=diffusion, states=lambda x: x.float())


@pytest.mark.parametrize("prediction, plain", [("eps", False), ("v", False), ("v", True)])
def test_small_times_of_v_are_drawn_more_often(prediction, plain):
    """In proportion to 1/2 + alpha_bar_t for v, and all times alike for eps and by the papers' recipe."""
    run = stand_in(prediction=prediction, plain=plain)
    _, t, _, _ = train.batch(run, torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    weight = torch.ones(4) if plain or prediction == "eps" else 0.5 + torch.tensor([0.9, 0.63, 0.315, 0.0315])
    share = torch.bincount(t, minlength=5)[1:] / len(t)
    off = (share - weight / weight.sum()).abs().max()
    assert 0 < off < 0.04 if plain else off < 2 / len(t), f"shares of 1..4 are {share.tolist()}"


@pytest.mark.parametrize("family", ["gaussian", "uniform", "absorbing"])
def test_terms_are_weighed_by_the_information_that_their_step_destroys(family):
    """I(x_0; x_t) = sum_ij q_j(i) / K log(q_j(i) / mean_j q_j(i)); weight ~ (share destroyed + 0.02)^-1/2, mean 1."""
    T, levels, masks = 7, 5, family == "absorbing"
    betas = train.d3pm.mutual_information_betas(T) if masks else torch.linspace(0.01, 0.4, T)
    chain, told = getattr(train.d3pm, f"{family}_transition")(levels + masks, betas), []
    for t in range(T + 1):
        rows = chain.matrix(0, t)[:levels].tolist()
        mean = [sum(row[i] for row in rows) / levels for i in range(levels + masks)]
        told.append(sum(q / levels * math.log(q / m) for row in rows for q, m in zip(row, mean) if q))
    weight = [(T * (a - b) / told[0] + 0.02) ** -0.5 for a, b in zip(told, told[1:])]
    weight = torch.tensor([w * T / sum(weight) for w in weight])
    assert torch.allclose(train.term_weights(chain), weight, rtol=1e-5)
    assert masks == torch.allclose(weight, torch.ones(T))


def test_text_learns_by_the_mean_of_cross_entropy_and_bound():
    """Their geometric mean: under masks the bound's term is T / t times the cross-entropy, so sqrt(T / t) times it."""
    T, K = 9, 5
    diffusion = train.d3pm.D3PM(train.d3pm.absorbing_transition(K, train.d3pm.mutual_information_betas(T)))
    run = SimpleNamespace(config=dict(timesteps=T, plain=False), diffusion=diffusion, discrete=True, text=True)
    torch.manual_seed(0)
    x0, t, table = torch.randint(K - 1, (T, 30)), torch.arange(1, T + 1), torch.randn(K, K)
    xt = diffusion.q_sample(x0, t)
    xt[:, 0] = K - 1                        # at least one mask
    args = (lambda xt, t: table[xt], x0, t, xt)
    due = (diffusion.loss_simple(*args) * diffusion.loss_vlb(*args)).sqrt()
    assert torch.allclose(train.objective(run, *args), due, rtol=1e-5) and (due > 0).all()


def test_new_draws_leave_the_old_ones_alone():
    """Dropped labels and left-out units change no image, time or noise; a tenth of the labels is dropped."""
    images, labels = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2), torch.tensor([5, 6, 7])
    old, new = train.batch(stand_in(), images), train.batch(stand_in(dropout=0.5), images, labels)
    assert all(torch.equal(a, b) for a, b in zip(old[:3], new[:3])) and old[3] is None
    y = torch.where(new[3] < 0, new[0][:, 0, 0, 0] / 4 + 5, new[3].float())
    assert torch.equal(y, new[0][:, 0, 0, 0] / 4 + 5), "each label is its image's, or -1"
    assert 0.07 < (new[3] == -1).float().mean() < 0.13
    train.batch(stand_in(dropout=0.5, seed=2 ** 31), images)               # the largest seed that there is
    mirrored, _, _, _ = train.batch(stand_in(mirror=True), images)
    turned = (mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, 1]).float().mean()
    assert 0.45 < turned < 0.55


@pytest.mark.parametrize("rows, columns", [(1, 9), (8, 8), (32, 288)])
def test_orthogonal_sets_singular_values_near_1_and_keeps_their_vectors(rows, columns):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(5, n, rows))[0] for n in (rows, columns))
    sigma = torch.logspace(0, -1, rows) * 7        # the last is 3.6 % of the norm, for 32
    found = U.mT @ train.orthogonal(U * sigma @ V.mT) @ V
    values = found.diagonal(dim1=1, dim2=2)
    assert ((0.68 < values) & (values < 1.21)).all(), f"singular values {values.min():.3f} to {values.max():.3f}"
    assert (found - values.diag_embed()).abs().max() < 1e-4


@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_muon_is_torchs_own(weight_decay):
    """Three steps on wide, tall and equal matrices; torch multiplies in bfloat16, with errors of a percent."""
    torch.manual_seed(0)
    shapes = [(6, 20), (6, 20), (20, 6), (8, 8), (8, 2, 3, 3), (64, 2, 3, 3)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours[-1].data = ours[-1].data.to(memory_format=torch.channels_last)
    before = [w.detach().clone().flatten(1) for w in ours]
    theirs = [torch.nn.Parameter(w.clone()) for w in before]
    mine = train.Muon(ours, 0.1, weight_decay)
    other = torch.optim.Muon(theirs, 0.1, momentum=0.9, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw",
                             ns_steps=3)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1).clone()
        mine.step(), other.step()
    for a, b, start, shape in zip(ours, theirs, before, shapes):
        moved, due = a.detach().flatten(1) - start, b.detach() - start
        assert (moved - due).norm() < 0.03 * due.norm(), f"{shape}: off by {(moved - due).norm() / due.norm():.3f}"


def test_every_weight_has_one_optimiser():
    net = train.ddpm.UNet(1, 2, width=8, mults=(1, 2), attention=(1,))
    muon, adam = ([id(p) for group in one.param_groups for p in group["params"]] for one in train.optimizers(net, dict(lr=0.1, plain=False)))
    assert sorted(muon + adam) == sorted(map(id, net.parameters()))
    assert train.optimizers(net, dict(lr=0.1, plain=False, weight_decay=0.3))[0].weight_decay == 0.3
    assert set(adam) == {id(p) for p in net.parameters() if p.ndim == 1}


@pytest.mark.parametrize("T, stride", [(1, 1), (50, 1), (1000, 10), (1001, 11)])
def test_variance_is_trained_for_the_steps_of_a_hundred_and_at_every_time(T, stride):
    """Steps as long as T / 100, but s = 0 from t = 1 alone, as on every grid; weight 0.001 + (t / T)^2."""
    t = torch.arange(1, T + 1)
    run = stand_in(timesteps=T)
    run.diffusion = SimpleNamespace(loss_hybrid=lambda model, x0, t, noise, s=None, weight=1e-3: (s, weight))
    s, weight = train.objective(run, None, None, t, None)
    assert s.tolist() == [0, *(max(1, i - stride) for i in range(2, T + 1))]
    torch.testing.assert_close(weight, torch.tensor([0.001 + (i / T) ** 2 for i in range(1, T + 1)]))
    run.config["plain"] = True
    assert train.objective(run, None, None, t, None) == (None, 1e-3), "the papers: single steps, one weight"


def run(home, *args):
    """A command that succeeds, in this process (which spares the imports) -> what it printed."""
    said = io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(said):
        train.main([str(arg) for arg in args])
    return said.getvalue()


def refused(home, *args):
    """A command that ends in one clear line, in this process -> that line."""
    error = io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        with pytest.raises(SystemExit) as end:
            train.main([str(arg) for arg in args])
    line = str(end.value.code)
    assert line.startswith("train.py: ") and "\n" not in line, line
    return line


def torchrun(home, *args, script=ROOT / "train.py"):
    """train.py on two processes, to its end -> what they printed on the two streams."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    return command(home, *args, launcher=launcher, script=script).communicate(timeout=300)


def one_line(process):
    """A process that ends in one clear line and without a traceback -> that line."""
    out, err = process.communicate(timeout=400)
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert process.returncode != 0 and "Traceback" not in err and len(lines) == 1, out + err
    return lines[0]


def weights(out, name="checkpoint.pt"):
    """Everything in a checkpoint that must be equal, as one dict of tensors."""
    state = torch.load(out / name, weights_only=True)
    flat = {f"{part}.{k}": v for part in ("model", "ema", "early") for k, v in state[part].items()}
    for kind, one in enumerate(state["optimizer"]):
        for i, moments in one["state"].items():
            flat |= {f"optimizer.{kind}.{i}.{k}": v for k, v in moments.items()}
    return flat | {"step": torch.tensor(state["step"])}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, such as {different[:3]}"


MODELS = {"ddpm": ["--data", "fashion-mnist"], "d3pm-image": ["--model", "d3pm", "--data", "fashion-mnist", "--levels", 8],
          "labels": ["--model", "d3pm", "--data", "fashion-mnist", "--levels", 40, "--labels", "--dropout", 0.1],
          "d3pm-text": ["--model", "d3pm", "--data", "text.txt", "--length", 16]}


@pytest.mark.parametrize("kind", ["ddpm", "d3pm-text", "labels"])
def test_killed_five_times_and_resumed_is_the_unbroken_run(home, kind):
    """kill -9 at five random moments, then --resume: the same weights, averages and optimiser, bit for bit."""
    args, moments = [*MODELS[kind], *TINY, "--steps", 40], random.Random(1)
    run(home, *args, "--out", "whole")
    for _ in range(5):
        resume = ["--resume"] if (home / "broken" / "checkpoint.pt").exists() else []
        process, before = command(home, *args, "--out", "broken", *resume), time.monotonic()
        written = home / "broken" / "log.csv"
        seen = written.stat().st_mtime_ns if written.exists() else 0
        while process.poll() is None and time.monotonic() - before < 300:
            if written.exists() and written.stat().st_mtime_ns != seen:
                break
            time.sleep(0.01)
        time.sleep(moments.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if torch.load(home / "broken" / "checkpoint.pt", weights_only=True)["step"] < 40:
        run(home, *args, "--out", "broken", "--resume")
    assert_equal(weights(home / "whole"), weights(home / "broken"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_says_where_and_goes_on(home, number):
    """Ctrl-C, SIGTERM and SIGHUP write a checkpoint at the step they stop at."""
    args = [*MODELS["ddpm"], *TINY, "--steps", 30, "--save-every", 30]
    run(home, *args, "--out", "whole")
    process = command(home, *args, "--out", "stopped")
    while not (home / "stopped" / "log.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert re.search(r"stopped at step \d+; go on with --resume", err) and "Traceback" not in err, err
    run(home, "--data", "fashion-mnist", "--out", "stopped", "--resume")
    assert_equal(weights(home / "whole"), weights(home / "stopped"))


@pytest.mark.parametrize("kind", ["ddpm", "d3pm-image"])
def test_two_processes_are_one(home, kind):
    """Under torchrun the gradient is that of the whole batch, within float error; only the first process speaks."""
    args = [*MODELS[kind], *TINY, "--steps", 1]
    run(home, *args, "--out", "one")
    said, err = torchrun(home, *args, "--out", "two")
    assert "batch 4" in said and said.count("->") == 1, said + err
    # After one step the optimisers' means are shares of the clipped gradient. The weights would not do: both divide
    # by the gradient's size, and so blow up the float error of those that should be 0.
    one, two = ({k: v for k, v in weights(home / out).items() if k.endswith((".mean", "exp_avg"))}
                for out in ("one", "two"))
    scale, worst = max(v.abs().max() for v in one.values()), max((one[k] - two[k]).abs().max() for k in one)
    assert one.keys() == two.keys() and scale > 0 and worst < 1e-5 * scale, (worst, scale)


def test_two_processes_go_on_with_what_one_began(home):
    """A checkpoint of one process, resumed by two: the weights of the unbroken run, within float error."""
    run(home, *MODELS["ddpm"], *TINY, "--lr", 1e-4, "--out", "one", "--save-every", 10)
    (home / "two").mkdir()
    shutil.copy(home / "one" / "checkpoint.previous.pt", home / "two" / "checkpoint.pt")
    torchrun(home, "--out", "two", "--resume")
    (one, two), half = (weights(home / out) for out in ("one", "two")), weights(home / "one", "checkpoint.previous.pt")
    names = [k for k in one if k.startswith("model.")]
    worst, moved = (max((a[k] - b[k]).abs().max() for k in names) for a, b in ((one, two), (one, half)))
    assert two["step"] == 10 and half["step"] == 8 and worst < 0.02 * moved, (worst, moved)


def test_a_fault_of_one_process_is_said_once_with_its_rank(home):
    """Rank 1 has no memory left at its third step: one line, which names it, and what to do."""
    (home / "faulty.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
step = train.train_step
def faulty(run, *parts):
    if train.RANK == 1 and run.step == 2:
        raise train.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return step(run, *parts)
train.train_step = faulty
train.main()
""")
    _, err = torchrun(home, *MODELS["ddpm"], *TINY, "--out", "run", script=home / "faulty.py")
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and "rank 1" in lines[0] and "--accumulate" in lines[0], err
    assert not re.search(r"File .*train.py", err), err


@pytest.mark.parametrize("kind", ["ddpm", "labels"])
def test_accumulated_parts_are_one_batch(home, kind):
    """The same gradient, within float error, from one and from two parts; dropout would draw other units."""
    args = [*MODELS[kind], *TINY, "--steps", 1, *(["--dropout", 0] if kind == "labels" else [])]
    run(home, *args, "--out", "one")
    run(home, *args, "--accumulate", 2, "--out", "two")
    one, two = ({k: v for k, v in weights(home / out).items() if k.endswith((".mean", "exp_avg"))}
                for out in ("one", "two"))
    scale, worst = max(v.abs().max() for v in one.values()), max((one[k] - two[k]).abs().max() for k in one)
    assert one.keys() == two.keys() and scale > 0 and worst < 1e-5 * scale, (worst, scale)
    assert "divide" in refused(home, *args, "--accumulate", 3, "--out", "three")


def test_a_run_goes_on(home):
    """--resume begins a run, goes on with more steps and another rate, and never repeats a done one."""
    args = [*MODELS["ddpm"], *TINY, "--out", "run", "--resume"]
    run(home, *args)
    assert "10 steps: --steps N" in refused(home, *args)
    said = run(home, "--out", "run", "--resume", "--steps", 15, "--lr", 1e-4)
    assert "steps 10 to 15" in said and weights(home / "run")["step"] == 15
    assert "other settings (width 8 there, 16 here)" in refused(home, "--out", "run", "--resume", "--steps", 20, "--width", 16)
    assert [line.split(",")[0] for line in (home / "run" / "log.csv").read_text().split()[1:]] == list(map(str, range(1, 16)))


@pytest.mark.parametrize("kind", ["ddpm", "d3pm-text"])
def test_a_run_is_measured_five_times(home, kind):
    """630 steps do not divide by 50: the held-out bits and the samples come all the same."""
    run(home, *MODELS[kind], *TINY, "--steps", 630, "--save-every", 630, "--batch-size", 2, "--out", "run")
    rows = [line.split(",") for line in (home / "run" / "log.csv").read_text().splitlines()]
    measured = [int(row[0]) for row in rows[1:] if row[rows[0].index("test_bits")]]
    assert measured == [126, 252, 378, 504, 630]


def test_the_best_weights_are_kept_and_used(home):
    """best.pt has checkpoint.pt's form; it is used, also once later weights are worse, and said to be."""
    run(home, *MODELS["ddpm"], *TINY, "--out", "run")
    assert_equal(weights(home / "run"), weights(home / "run", "best.pt"))
    assert "step 10, from run/best.pt" in run(home, "--out", "run", "--sample", 1, "--sample-steps", 2)
    state = torch.load(home / "run" / "checkpoint.pt", weights_only=True)
    state["rows"].append(state["rows"][-1] | dict(step=11, test_bits=1e3))
    (home / "run" / "checkpoint.pt").unlink()                # best.pt is another name of that file
    torch.save(state | dict(step=11), home / "run" / "checkpoint.pt")
    assert "step 10, from run/best.pt" in run(home, "--out", "run", "--eval", 2, "--sample-steps", 2)


def test_a_signal_is_noticed_while_samples_are_drawn(home):
    """The held-out measurement gives up, and the loop saves."""
    data, cpu = train.load_data("fashion-mnist", home / "data"), torch.device("cpu")
    here = train.Run(train.complete(dict(timesteps=8, width=8), data, cpu), cpu, home, data)
    assert train.held_out(here) > 0
    here.signals.append(signal.SIGTERM)
    assert train.held_out(here) == ""


def test_early_weights_are_the_average_after_an_eighth(home, monkeypatch):
    """Or, where a run is resumed with so few steps that its eighth is over, the average when it was stopped."""
    averages, step, stop = [], train.train_step, None

    def watched(run, *batch):
        result = step(run, *batch)
        averages.append({k: v.clone() for k, v in run.ema.state_dict().items()})
        if len(averages) == stop:
            run.signals.append(signal.SIGTERM)
        return result

    monkeypatch.setattr(train, "train_step", watched)
    run(home, *MODELS["ddpm"], *TINY, "--out", "run", "--steps", 24)
    state = torch.load(home / "run" / "checkpoint.pt", weights_only=True)
    assert_equal(state["early"], averages[2])
    assert_equal(state["ema"], averages[23])
    for name in ("checkpoint.pt", "best.pt"):
        (home / "run" / name).unlink(missing_ok=True)
    torch.save(state | dict(step=3), home / "run" / "checkpoint.pt")
    assert "of step 3: train further" in refused(home, "--out", "run", "--sample", 1, "--guidance", 1)
    assert "of step 3" in run(home, "--out", "run", "--sample", 1, "--guidance", 0, "--sample-steps", 2)
    averages.clear()
    stop = 6
    assert "stopped at step 6" in refused(home, *MODELS["ddpm"], *TINY, "--out", "short", "--steps", 100)
    run(home, "--out", "short", "--resume", "--steps", 10)
    assert_equal(torch.load(home / "short" / "checkpoint.pt", weights_only=True)["early"], averages[5])


@pytest.mark.parametrize("kind, options", [("ddpm", {}), ("ddpm", dict(variance=0.5)), ("d3pm", dict(levels=8))])
def test_guidance_without_labels_pushes_away_from_the_early_weights(home, kind, options):
    """Early weights + (1 + w) times what training changed since; a learned variance is that of the last weights."""
    data, cpu = train.load_data("fashion-mnist", home / "data"), torch.device("cpu")
    here = train.Run(train.complete(dict(model=kind, width=8) | options, data, cpu), cpu, home, data)
    for net in (here.ema, here.early):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    t = torch.tensor([3, 700])
    xt = torch.randint(8, (2, 1, 28, 28)) if kind == "d3pm" else torch.randn(2, 1, 28, 28)
    last, early = here.ema(xt, t), here.early(xt, t)
    due = early + 3.5 * (last - early)
    if kind == "ddpm" and not options:
        due = torch.cat([due[:, :1], last[:, 1:]], 1)
    assert torch.allclose(here.model(None, 2.5)(xt, t), due, rtol=1e-4, atol=1e-5)
    assert torch.equal(here.model(None, 0.0)(xt, t), last)


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_is_used(home, kind):
    """Training, --sample, --eval: every file that the README names is written and loads."""
    text = kind == "d3pm-text"
    said = run(home, *MODELS[kind], *TINY, "--out", "run")
    assert re.search(r"million parameters.*-> run", said) and "yardsticks" in said
    made = run(home, "--out", "run", "--sample", 5, "--sample-steps", 3, "--seed", 7)
    files = {"samples.txt"} if text else {"samples.npy", "samples.png"}
    assert files | {"samples.gif", "config.json", "log.csv", "loss.png"} <= {f.name for f in (home / "run").iterdir()}
    assert "samples.gif" in made
    if text:
        first = (home / "run" / "samples.txt").read_text()
        run(home, "--out", "run", "--sample", 5, "--sample-steps", 3, "--seed", 7)
        assert first == (home / "run" / "samples.txt").read_text(), "the same seed, the same samples"
        run(home, "--out", "run", "--sample", 1, "--prompt", "ab__cd")
        assert re.search(r"--- 1\nab..cd", (home / "run" / "samples.txt").read_text(), re.S)
    else:
        images = np.load(home / "run" / "samples.npy")
        assert images.dtype == np.uint8 and images.shape == (5, 28, 28, 1)
    if kind == "labels":
        assert np.load(home / "run" / "labels.npy").tolist() == [0, 2, 4, 6, 8]
        run(home, "--out", "run", "--sample", 3, "--sample-steps", 3, "--label", 7, "--guidance", 1, "--temperature", 0.5)
        assert np.load(home / "run" / "labels.npy").tolist() == [7, 7, 7]
        assert "0 T-shirt/top" in refused(home, "--out", "run", "--sample", 1, "--label", 10)
    else:
        assert "--labels" in refused(home, "--out", "run", "--sample", 1, "--label", 7)
    wrong = dict(ddpm=["--temperature", 0.5]).get(kind, ["--eta", 0])
    assert "has no meaning for the run in run" in refused(home, "--out", "run", "--sample", 1, *wrong)
    assert "nan" not in run(home, "--out", "run", "--eval", 1, "--sample-steps", 2)
    said = run(home, "--out", "run", "--eval", 6, "--sample-steps", 4)
    assert ("without labels" in said) == (kind == "labels") and ("bits/char" in said) == text
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()):
        figures.main(["run"])
    assert (home / "run" / "terms.png").exists() and (home / "run" / "lossy.png").exists() != text
    bound = json.loads((home / "run" / "eval.json").read_text())
    assert "with guidance 2" in run(home, "--out", "run", "--eval", 6, "--sample-steps", 4, "--guidance", 2)
    guided = json.loads((home / "run" / "eval.json").read_text())
    assert (bound["guidance"], guided["guidance"]) == (0, 2) and guided["total"] != bound["total"]
    assert ("total_without_labels" in bound) == (kind == "labels")
    if kind == "labels":
        assert guided["total_without_labels"] == bound["total_without_labels"], "without a label there is no guidance"
    assert re.search(r"L_T .*\n.*L_t .*\n.*L_0 ", said) and (home / "run" / "eval.json").exists()
    state = torch.load(home / "run" / "checkpoint.pt", weights_only=True)
    assert {"model", "ema", "step", "config"} <= state.keys() and not any(k.startswith("module.") for k in state["ema"])


def test_a_folder_of_images_trains(home):
    """Any size and mode, decoded once into one file; the second run finds it, even if the folder has moved."""
    args = ["--size", 16, *TINY]
    assert "decoding" in run(home, "--data", "images", *args, "--out", "a")
    assert "decoding" not in run(home, "--data", "images", *args, "--out", "b")
    assert_equal(weights(home / "a"), weights(home / "b"))
    (home / "images").rename(home / "moved")
    run(home, "--data", "moved", "--out", "a", "--resume", "--steps", 12)
    run(home, "--out", "a", "--eval", 1, "--sample-steps", 2)
    shutil.copy(home / "moved" / "0.png", home / "moved" / "new.png")
    assert "has changed" in refused(home, "--out", "a", "--resume", "--steps", 15)
    assert "has changed" in refused(home, "--out", "a", "--eval", 1)


def folder(home, name, **images):
    """A folder of pictures; x_tif is x.tif. -> the data set of it, 16 pixels a side."""
    (home / name).mkdir()
    for file, image in images.items():
        image.save(home / name / file.replace("_", "."), **image.info)
    return train.load_data(str(home / name), home / "data", 16)


def test_pictures_lie_as_a_viewer_shows_them(home):
    """Four files with four orientations of EXIF, all of one scene."""
    scene, shown = np.zeros((16, 16), np.uint8), {}
    scene[:8, :8] = 255
    for orientation, stored in {1: scene, 3: scene[::-1, ::-1], 6: np.rot90(scene), 8: np.rot90(scene, -1)}.items():
        image = Image.fromarray(np.ascontiguousarray(stored))
        image.info["exif"] = Image.Exif()
        image.info["exif"][0x0112] = orientation
        shown[f"{orientation}_png"] = image
    data = folder(home, "photos", **shown)
    for x in torch.cat([data.train, data.test]):
        assert torch.equal(x[0], torch.from_numpy(scene)), x


def test_deep_pictures_keep_their_range(home):
    """16 bits, 12 bits in 16, floats in -1..1, in other units and with a NaN, all from black to white; half is half."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    with_nan = ramp.copy()
    with_nan[3, 3] = np.nan
    deep = dict(a_png=(ramp * 65535).astype(np.uint16), b_png=(ramp * 4095).astype(np.uint16), c_tif=2 * ramp - 1, d_tif=ramp,
                e_tif=with_nan, f_tif=1000 * ramp - 300)
    data = folder(home, "deep", **{name: Image.fromarray(pixels) for name, pixels in deep.items()})
    for x in torch.cat([data.train, data.test]):
        x = x.flatten()[torch.arange(256) != 3 * 16 + 3].int()
        due = torch.arange(256)[torch.arange(256) != 3 * 16 + 3]
        assert (x - due).abs().max() <= 1, x.tolist()
    half = folder(home, "half", **{f"{i}_png": Image.fromarray(np.full((20, 20), 65535 // 2, np.uint16)) for i in range(2)})
    assert (half.train == 127).all()


def test_grey_is_one_channel(home):
    """Grey floats, GIFs, palettes and even RGB; one coloured picture makes it three."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    kinds = dict(a_tif=grey.convert("F"), b_gif=grey, c_png=grey.convert("P"), d_png=grey.convert("RGB"), e_png=grey.convert("LA"))
    assert folder(home, "grey", **kinds).train.shape[1] == 1
    assert folder(home, "mixed", **kinds, f_png=Image.new("RGB", (16, 16), "red")).train.shape[1] == 3


def test_what_is_no_picture_is_left_out(home):
    """Bad names, a Mac's shadows, links (even in circles), cut files and runs: counted, named, and the rest trains."""
    images, away = home / "images", home / "away"
    away.mkdir()
    Image.new("RGB", (20, 20), "blue").save(away / "linked.png")
    Image.new("RGB", (20, 20), "green").save(os.fsencode(images) + b"/caf\xe9.png")
    (images / "._x.jpg").write_bytes(b"resource fork")
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:-200])
    (images / "none.png").write_bytes(b"")
    (images / "link").symlink_to(away)
    (images / "circle").symlink_to(images)
    said = run(home, "--data", "images", "--size", 16, *TINY, "--out", "images/run")
    assert "left out 2 of 28" in said and "cut.png" in said and "none.png" in said
    assert "images/run" in said and "(24 images)" in said, said
    run(home, "--out", "images/run", "--data", "images", "--resume", "--steps", 12)


@pytest.mark.parametrize("n", [2, 3, 9, 20])
def test_held_out_pictures_are_held_out(home, n):
    data = folder(home, "few", **{f"{i}_png": Image.new("L", (16, 16), 10 * i) for i in range(n)})
    assert len(data.test) == max(1, n // 10) and len(data.train) == n - len(data.test)
    assert not set(data.test.flatten().tolist()) & set(data.train.flatten().tolist())


def test_subfolders_are_classes_and_decoding_in_parallel_is_the_same(home):
    """More pictures than one process decodes, in two classes and without one."""
    for name in ("cats", "dogs"):
        (home / "many" / name).mkdir(parents=True)
    for i in range(1002):
        place = ("cats", "dogs", ".")[i % 3]
        Image.new("L", (4, 4), {"cats": 50, "dogs": 150, ".": 250}[place]).save(home / "many" / place / f"{i}.png")
    data = train.load_data(str(home / "many"), home / "data", 4)
    assert data.classes == ["cats", "dogs"] and len(data.train) == 902 and len(data.test) == 100
    for split, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert torch.equal(split[:, 0, 0, 0], torch.tensor([50, 150, 250], dtype=torch.uint8)[labels])


@pytest.mark.parametrize("source, classes", [("fashion-mnist", 10), ("glyphs", 62)])
def test_labels_are_those_of_the_images(home, source, classes):
    data = train.load_data(source, home / "data")
    assert len(data.classes) == classes and len(data.train_labels) == len(data.train)
    assert 0 <= data.train_labels.min() and data.train_labels.max() < classes
    if source == "glyphs":                # a full stop's worth of ink in l, the most in W and M
        ink = [data.train[data.train_labels == data.classes.index(c)].float().mean() for c in "lMW"]
        assert ink[0] < 0.5 * min(ink[1:])


def test_text_as_it_is_written(home):
    """A byte order mark is no character; a prompt's underscores are held where the text has them; windows end in time."""
    (home / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    bom, plain = (train.load_data(str(home / name), home / "data") for name in ("bom.txt", "text.txt"))
    assert bom.chars == plain.chars and torch.equal(bom.train, plain.train) and plain.train.element_size() == 1
    fake = SimpleNamespace(config=dict(chars="_abc", length=6))
    assert train.encode_prompt(fake, "_a\N{MIDDLE DOT}c").tolist() == [0, 1, -1, 3, -1, -1]
    fake = SimpleNamespace(config=dict(chars="abc", length=4))
    assert train.encode_prompt(fake, "_a\N{MIDDLE DOT}").tolist() == [-1, 0, -1, -1]
    long = torch.zeros(1, dtype=torch.uint8).expand(20_000_003)
    seen = SimpleNamespace(text=True, config=dict(classes=[]), device="cpu", states=lambda x: x,
                           examples=lambda split: split.unfold(0, 16, 1), data=SimpleNamespace(test=long))
    for n in (1, 2, 777):
        assert len(train.Run.tests(seen, n)[0]) == n


@pytest.mark.parametrize("shell", ["PYTHONIOENCODING=cp1252 {} 2>&1 | cat", "LC_ALL=POSIX PYTHONUTF8=0 {}", "{} >&-"])
def test_any_screen_will_do(home, shell):
    """Characters that it lacks are written out, and without one the run goes on."""
    (home / "greek.txt").write_text("\u03b1\u03b2\u03b3\u2192 " * 300, encoding="utf-8")
    args = shlex.join(map(str, [sys.executable, ROOT / "train.py", "--model", "d3pm", "--data", "greek.txt", "--length", 16,
                                *TINY, "--steps", 2, "--out", "run"]))
    subprocess.run(["bash", "-c", shell.format(args)], cwd=home, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=200)
    assert (home / "run" / "samples.txt").read_text(encoding="utf-8")


def test_a_log_that_cannot_be_written_or_read_stops_nothing(home):
    (home / "run" / "log.csv").mkdir(parents=True)
    said = run(home, *MODELS["ddpm"], *TINY, "--out", "run")
    assert "warning: run/log.csv" in said and (home / "run" / "loss.png").exists()
    (home / "run" / "log.csv").rmdir()
    (home / "run" / "log.csv").write_text("step;loss\n1;")
    run(home, "--out", "run", "--resume", "--steps", 12)
    assert (home / "run" / "log.csv").read_text().count("\n") == 13


def test_a_full_disk_is_a_warning(home, monkeypatch):
    """No space at steps 3 to 6, and then some: the run goes on, and nothing is left over."""
    save = train.save_checkpoint

    def full(run, best):
        if 3 <= run.step <= 6:
            monkeypatch.setattr(os, "fsync", no_space)
        try:
            save(run, best)
        finally:
            monkeypatch.setattr(os, "fsync", fsync)

    def no_space(file):
        raise OSError(28, "No space left on device")

    fsync = os.fsync
    monkeypatch.setattr(train, "save_checkpoint", full)
    said = run(home, *MODELS["ddpm"], *TINY, "--out", "run")
    assert said.count("warning: run/checkpoint.pt: No space left on device; going on") == 4
    assert weights(home / "run")["step"] == 10 and weights(home / "run", "checkpoint.previous.pt")["step"] == 9
    assert not list((home / "run").glob("*.tmp"))


def test_small_faults_of_a_machine(home, monkeypatch):
    """A file system without locks, a clock that stands, out of memory at any step, a rank without its local one."""
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(train.time, "monotonic", lambda: 1.0)
    monkeypatch.setenv("HOME", str(home))
    said = run(home, *MODELS["ddpm"], *TINY, "--timesteps", 2, "--out=~/tilde")
    assert (home / "tilde" / "checkpoint.pt").exists() and not (home / "~").exists()
    assert "nan" not in said and re.search(r"by t \S+ - \S+ -\)", said), "a chain of two steps has two quarters"
    monkeypatch.setattr(train, "average", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):                # a mistake in the code has its traceback
        run(home, *MODELS["ddpm"], *TINY, "--out", "mistake")

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "average", no_memory)
    line = refused(home, *MODELS["ddpm"], *TINY, "--out", "large")
    assert "--batch-size" in line and "--accumulate" in line
    process = command(home, *MODELS["ddpm"], *TINY, "--out", "alone", env=dict(RANK="0", WORLD_SIZE="1"))
    assert process.communicate(timeout=200)[1] == "" and process.returncode == 0


def test_importing_leaves_a_notebook_alone():
    done = subprocess.run([sys.executable, "-c", "import sys, train; assert 'matplotlib.pyplot' not in sys.modules"], cwd=ROOT)
    assert done.returncode == 0


def test_plain_is_the_papers_recipe(home):
    run(home, *MODELS["ddpm"], *TINY, "--plain", "--out", "run")
    state = torch.load(home / "run" / "checkpoint.pt", weights_only=True)
    assert state["config"] | dict(prediction="eps", fourier=()) == state["config"]
    assert len(state["optimizer"]) == 1 and "exp_avg" in state["optimizer"][0]["state"][0]


def test_two_runs_do_not_share_a_folder(home):
    """The second is refused while the first one writes; a killed one lets go."""
    args = [*MODELS["ddpm"], *TINY, "--steps", 100000, "--save-every", 100000, "--out", "run"]
    process = command(home, *args)
    while not (home / "run" / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    assert "another run" in refused(home, *args)
    process.kill()
    process.communicate()
    run(home, *MODELS["ddpm"], *TINY, "--out", "run")


def test_no_network_falls_back_to_glyphs(home):
    """A network that swallows everything costs at most 15 seconds; a data set asked for by name is an error."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env, begin = dict(http_proxy=proxy, https_proxy=proxy), time.monotonic()
        process = command(home, *TINY, "--data-dir", "empty", "--out", "run", env=env)
        for line in process.stdout:
            if "glyphs" in line:
                break
        waited = time.monotonic() - begin
        process.kill()
        process.communicate()
        assert "glyphs" in line and waited < 25, f"{waited:.0f} seconds, some of them for Python's imports"
        process = command(home, *TINY, "--data", "mnist", "--data-dir", "empty", env=env)
        assert "Put torchvision's files under" in one_line(process)


def test_faults_end_in_one_line_and_lose_nothing(home):
    """A loss that is not finite, a full disk, a folder that can't be written, damaged files."""
    args = [*MODELS["ddpm"], *TINY, "--out", "run"]
    line = refused(home, *args, "--lr", "1000", "--width", 32)
    assert re.search(r"not finite at step \d+", line), line
    if (home / "run" / "checkpoint.pt").exists():
        assert all(v.isfinite().all() for v in weights(home / "run").values())
    run(home, *MODELS["ddpm"], *TINY, "--out", "good")
    before = weights(home / "good")
    assert "already holds a run" in refused(home, *MODELS["ddpm"], *TINY, "--out", "good")
    assert "batch-size 4 there, 8 here" in refused(home, "--out", "good", "--resume", "--batch-size", 8)
    assert "has done its 10 steps" in refused(home, "--out", "good", "--resume")
    assert_equal(before, weights(home / "good"))

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    assert "checkpoint.pt can't be written" in one_line(command(home, *MODELS["ddpm"], *TINY, "--width", 16, "--out", "full", preexec_fn=small_files))
    assert not list((home / "full").glob("*.tmp")) and not (home / "full" / "checkpoint.pt").exists()
    (home / "file").write_text("")
    assert "file" in refused(home, *MODELS["ddpm"], *TINY, "--out", "file/run")

    checkpoint = home / "good" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for damaged in (content[:len(content) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        assert "damaged" in refused(home, "--out", "good", "--sample", 1)
    checkpoint.write_bytes(content)
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | dict(config=state["config"] | dict(width=16)), checkpoint)
    line = refused(home, "--out", "good", "--sample", 1)
    assert "another version" in line and "Error(s)" in line and "damaged" not in line, line       # torch's first line
    torch.save({k: v for k, v in state.items() if k != "rows"}, checkpoint)
    line = refused(home, "--out", "good", "--resume")
    assert "another version" in line and "'rows'" in line, line
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    assert "no checkpoint of it" in refused(home, "--out", "good", "--resume")
    weights(home / "good", "checkpoint.previous.pt")

    images = home / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])
    assert "can't be had" in refused(home, *MODELS["ddpm"], *TINY, "--out", "cut")


WRONG = {
    "--steps 0": "must lie in", "--lr -1": "must lie in", "--seed -1": "must lie in", "--eta 2 --sample 1": "must lie in",
    f"--seed {2 ** 31 + 1}": "must lie in",
    "--levels 1 --model d3pm": "must lie in", "--dropout 1": "must lie in", "--wrong 1": "unrecognized",
    "--model vae": "invalid choice", "--data nothing": "neither a known data set", "--data empty": "0 images",
    "--data binary.bin": "not UTF-8", "--data zeros.txt": "not UTF-8",
    "--data blank.txt": "too short", "--data text.txt": "needs --model d3pm",
    "--device tpu": "can't be used", "--variance 2 --data glyphs": "variance",
    "--variance big --data glyphs": "invalid variance value",
    "--levels 4 --data glyphs": "no meaning", "--size 16 --data glyphs": "no meaning", "--width 7 --data glyphs": "--width",
    "--data images --size 17": "--size", "--model d3pm --data text.txt --length 5000": "too short",
    "--model d3pm --transition absorbing --schedule cosine --data glyphs": "mutual",
    "--schedule mutual --data glyphs": "not for --model ddpm", "--labels --model d3pm --data text.txt": "no labels",
    "--labels --data images": "no labels", "--eta 0": "no meaning in training", "--prompt x": "no meaning in training",
    "--label 1": "no meaning in training", "--temperature 0.5": "no meaning in training",
    "--sample 3": "no checkpoint in runs/ddpm-fashion-mnist",
    "--sample 3 --out nowhere": "no checkpoint", "--eval --out nowhere": "no checkpoint",
    **{f"--sample 2 --{option} --out nowhere": "no meaning with --sample" for option in (
        "steps 500", "lr 0.1", "levels 4", "width 8", "timesteps 8", "schedule cosine", "prediction v", "size 8", "resume",
        "transition uniform", "labels", "plain", "dropout 0.1", "accumulate 2", "batch-size 2", "save-every 2", "length 9")},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_gets_one_clear_line(home, wrong):
    """Said before any training, with what to do."""
    (home / "empty").mkdir()
    (home / "blank.txt").write_text("")
    (home / "binary.bin").write_bytes(bytes(range(1, 256)) * 10)
    (home / "zeros.txt").write_bytes(b"ab\0" * 1000)
    line = refused(home, *wrong.split(), *(["--timesteps", 8] if "--out" not in wrong and "--sample" not in wrong else []))
    assert WRONG[wrong] in line, line
    assert not (home / "runs").exists(), "nothing is written for a command that can't be carried out"


def test_what_a_run_does_not_know(home):
    """Other characters in a prompt, other data in --eval or --resume."""
    run(home, *MODELS["d3pm-text"], *TINY, "--out", "run")
    assert "does not know" in refused(home, "--out", "run", "--sample", 1, "--prompt", "abXY")
    assert "a step a place" in refused(home, "--out", "run", "--sample", 1, "--confident", "--sample-steps", 3)
    run(home, "--out", "run", "--sample", 1, "--confident", "--prompt", "ab_")
    assert "\nab" in (home / "run" / "samples.txt").read_text()
    (home / "part.txt").write_text("edcba" * 1000)
    for asked in (["--eval", 2], ["--resume", "--steps", 20]):
        for other in ("part.txt", "fashion-mnist"):
            assert "is not the data of the run in run" in refused(home, "--out", "run", *asked, "--data", other)


def test_the_error_of_a_text_bound_counts_windows_that_do_not_overlap(home):
    """The last 300 of 3,000 characters hold 18 windows of 16: more of them say nothing new."""
    run(home, *MODELS["d3pm-text"], *TINY, "--out", "run")
    few, many = (float(re.search(r"\+- (\S+)", run(home, "--out", "run", "--eval", n, "--sample-steps", 2))[1])
                 for n in (16, 160))
    assert 0.5 < many / few < 2


def test_help_fits_a_screen(home):
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(["--help"])
    lines = said.getvalue().splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_every_command_of_the_readme_runs(home):
    """Each line of its bash blocks that trains or uses a run, in order, with tiny values after it."""
    shutil.copytree(ROOT / "assets", home / "assets")
    shutil.copy(ROOT / "README.md", home)
    lines = [shlex.split(line, comments=True) for block in readme_blocks("bash") for line in block.splitlines()]
    assert all((ROOT / words[1]).exists() for words in lines if words[:1] == ["python"]), "a program that is not there"
    commands = [words[1:] for words in lines if words[:1] == ["python"]]
    assert len(commands) > 10
    for program, *words in commands:
        if program == "assets/figures.py" and words:
            with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()):
                figures.main(words)
        elif program != "train.py":
            continue
        elif {"--sample", "--eval"} & set(words):
            words = ["3" if word.isdigit() and int(word) > 3 else word for word in words]
            steps = [] if "--confident" in words else ["--sample-steps", 2]
            run(home, *words, *(["3"] if words[-1] == "--eval" else []), *steps)
        else:
            run(home, *words, *TINY)
    made = [pathlib.Path(words[1]) for words in lines if words[:1] == ["cp"]]
    assert all((home / file).exists() for file in made), made


def test_every_snippet_of_the_readme_runs(home):
    """The python blocks, one after the other in one process, beside the run that they load."""
    run(home, *MODELS["ddpm"], *TINY, "--out", "runs/ddpm-fashion-mnist")
    for block in readme_blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=home, capture_output=True, text=True, timeout=300,
                              env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_every_link_of_the_readme_resolves():
    """Files exist; a line link points at the definition that it names; no picture is over 1 MB."""
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(((?!http)[^)#]*)", readme) + re.findall(r'src="((?!http)[^"]+)"', readme):
        assert not target or (ROOT / target).exists(), target
    for file in (ROOT / "assets").iterdir():
        assert file.stat().st_size < 1 << 20 and f"assets/{file.name}" in readme, file
