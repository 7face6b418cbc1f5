"""The slow tests of train.py: real runs, real faults, and every command of the README.

    pytest .ci/test_train.py
"""
import contextlib
import io
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


def command(home, *args, launcher=(sys.executable,), **options):
    """train.py in the folder `home` as a process of its own: to be killed, limited or launched by torchrun."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1") | options.pop("env", {})
    return subprocess.Popen([*launcher, str(ROOT / "train.py"), *map(str, args)], cwd=home, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_small_times_of_v_are_drawn_more_often(prediction):
    """In proportion to 1/2 + alpha_bar_t for v, and all times alike for eps."""
    B, betas = 4000, torch.tensor([0.1, 0.3, 0.5, 0.9])
    config = dict(model="ddpm", prediction=prediction, seed=0, batch_size=B, timesteps=4, chars=None)
    diffusion = train.ddpm.GaussianDiffusion(betas, prediction)
    _, t, _ = train.batch(0, config, diffusion, torch.zeros(3, 1, 2, 2, dtype=torch.uint8), slice(B))
    weight = {"eps": torch.ones(4), "v": 0.5 + torch.tensor([0.9, 0.63, 0.315, 0.0315])}[prediction]
    share = torch.bincount(t, minlength=5)[1:] / B
    assert (share - weight / weight.sum()).abs().max() < 2 / B, f"shares of 1..4 are {share.tolist()}"


@pytest.mark.parametrize("rows, columns", [(1, 9), (8, 8), (32, 288)])
def test_orthogonal_sets_singular_values_near_1_and_keeps_their_vectors(rows, columns):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(5, n, rows))[0] for n in (rows, columns))
    sigma = torch.logspace(0, -1, rows) * 7        # the last is 3.6 % of the norm, for 32
    found = U.mT @ train.orthogonal(U * sigma @ V.mT) @ V
    values = found.diagonal(dim1=1, dim2=2)
    assert ((0.68 < values) & (values < 1.21)).all(), f"singular values {values.min():.3f} to {values.max():.3f}"
    assert (found - values.diag_embed()).abs().max() < 1e-4


def test_muon_is_torchs_own():
    """Three steps on wide, tall and equal matrices; torch multiplies in bfloat16, with errors of a percent."""
    torch.manual_seed(0)
    shapes = [(6, 20), (6, 20), (20, 6), (8, 8), (8, 2, 3, 3), (64, 2, 3, 3)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours[-1].data = ours[-1].data.to(memory_format=torch.channels_last)
    before = [w.detach().clone().flatten(1) for w in ours]
    theirs = [torch.nn.Parameter(w.clone()) for w in before]
    mine = train.Muon(ours, 0.1)
    other = torch.optim.Muon(theirs, 0.1, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw",
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
    muon, adam = ([id(p) for group in one.param_groups for p in group["params"]] for one in train.optimizers(net, 0.1))
    assert sorted(muon + adam) == sorted(map(id, net.parameters()))
    assert set(adam) == {id(p) for p in net.parameters() if p.ndim == 1}


@pytest.mark.parametrize("T, stride", [(1, 1), (50, 1), (1000, 10), (1001, 11)])
def test_variance_is_trained_for_the_steps_of_a_hundred_and_at_every_time(T, stride):
    """Steps as long as T / 100, but s = 0 from t = 1 alone, as on every grid; weight 0.001 + (t / T)^2."""
    t = torch.arange(1, T + 1)
    seen = SimpleNamespace(loss_hybrid=lambda model, x0, t, noise, s, weight: (s, weight))
    s, weight = train.objective(dict(model="ddpm", variance="learned", timesteps=T), seen, None, None, t, None)
    assert s.tolist() == [0, *(max(1, i - stride) for i in range(2, T + 1))]
    torch.testing.assert_close(weight, torch.tensor([0.001 + (i / T) ** 2 for i in range(1, T + 1)]))


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
    line = str(end.value.code) if end.value.code != 2 else error.getvalue().strip().splitlines()[-1]
    assert line.startswith("train.py: ") and "\n" not in line, line
    return line


def torchrun(home, *args):
    """train.py on two processes, to its end -> what they printed on the two streams."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    return command(home, *args, launcher=launcher).communicate(timeout=300)


def one_line(process):
    """A process that ends in one clear line and without a traceback -> that line."""
    out, err = process.communicate(timeout=400)
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert process.returncode != 0 and "Traceback" not in err and len(lines) == 1, out + err
    return lines[0]


def weights(out, name="checkpoint.pt"):
    """Everything in a checkpoint that must be equal, as one dict of tensors."""
    state = torch.load(out / name, weights_only=True)
    flat = {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}
    for kind, one in enumerate(state["optimizer"]):
        for i, moments in one["state"].items():
            flat |= {f"optimizer.{kind}.{i}.{k}": v for k, v in moments.items()}
    return flat | {"step": torch.tensor(state["step"])}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, such as {different[:3]}"


MODELS = {"ddpm": ["--data", "fashion-mnist"], "d3pm-image": ["--model", "d3pm", "--data", "fashion-mnist", "--levels", 8],
          "d3pm-text": ["--model", "d3pm", "--data", "text.txt", "--length", 16]}


@pytest.mark.parametrize("kind", ["ddpm", "d3pm-text"])
def test_killed_five_times_and_resumed_is_the_unbroken_run(home, kind):
    """kill -9 at five random moments, then --resume: the same weights, EMA and optimiser, bit for bit."""
    args, moments = [*MODELS[kind], *TINY, "--steps", 40], random.Random(1)
    run(home, *args, "--out", "whole")
    for attempt in range(5):
        resume = ["--resume"] if (home / "broken" / "checkpoint.pt").exists() else []
        process, before = command(home, *args, "--out", "broken", *resume), time.monotonic()
        written = home / "broken" / "log.csv"
        seen = written.stat().st_mtime_ns if written.exists() else 0
        while process.poll() is None and time.monotonic() - before < 60:
            if written.exists() and written.stat().st_mtime_ns != seen:
                break
            time.sleep(0.01)
        time.sleep(moments.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if torch.load(home / "broken" / "checkpoint.pt", weights_only=True)["step"] < 40:
        run(home, *args, "--out", "broken", "--resume")
    assert_equal(weights(home / "whole"), weights(home / "broken"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_where_and_goes_on(home, number):
    """Ctrl-C and SIGTERM write a checkpoint at the step they stop at."""
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
    run(home, *MODELS["ddpm"], *TINY, "--lr", 1e-4, "--save-every", 5, "--out", "one")
    (home / "two").mkdir()
    shutil.copy(home / "one" / "checkpoint.previous.pt", home / "two" / "checkpoint.pt")
    torchrun(home, "--out", "two", "--resume")
    (one, two), half = (weights(home / out) for out in ("one", "two")), weights(home / "one", "checkpoint.previous.pt")
    names = [k for k in one if k.startswith("model.")]
    worst, moved = (max((a[k] - b[k]).abs().max() for k in names) for a, b in ((one, two), (one, half)))
    assert two["step"] == 10 and half["step"] == 5 and worst < 0.02 * moved, (worst, moved)


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
    said = run(home, "--out", "run", "--eval", 6, "--sample-steps", 4)
    assert re.search(r"L_T .*\n.*L_t .*\n.*L_0 ", said) and (home / "run" / "terms.png").exists()
    state = torch.load(home / "run" / "checkpoint.pt", weights_only=True)
    assert {"model", "ema", "step", "config"} <= state.keys() and not any(k.startswith("module.") for k in state["ema"])


def test_a_folder_of_images_trains(home):
    """Any size and mode, 16 bits too, decoded once into one file; the second run finds it. No change goes unseen."""
    deep = np.full((20, 20), 65535 // 2, np.uint16)
    (home / "deep").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(deep).save(home / "deep" / name)
    shades = train.load_data(str(home / "deep"), home / "data", 16).train
    assert shades.shape == (2, 1, 16, 16) and (shades == 127).all(), "half of 16 bits is half of 8"
    args = ["--data", "images", "--size", 16, *TINY]
    assert "decoding" in run(home, *args, "--out", "a")
    assert "decoding" not in run(home, *args, "--out", "b")
    assert_equal(weights(home / "a"), weights(home / "b"))
    run(home, *args[:-1], "5", "--steps", 4, "--out", "c")
    (home / "images" / "broken.png").write_bytes(b"no image")
    assert "broken.png" in refused(home, *args, "--out", "d")
    (home / "images" / "broken.png").unlink()
    shutil.copy(home / "images" / "0.png", home / "images" / "new.png")
    state = torch.load(home / "c" / "checkpoint.pt", weights_only=True)
    state["config"]["steps"] = 8
    torch.save(state, home / "c" / "checkpoint.pt")
    assert "has changed" in refused(home, "--out", "c", "--resume")


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
    assert "lr" in refused(home, "--out", "good", "--resume", "--lr", "0.5")
    assert "has done its 10 steps" in refused(home, "--out", "good", "--resume")
    assert_equal(before, weights(home / "good"))

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    assert "checkpoint" in one_line(command(home, *MODELS["ddpm"], *TINY, "--width", 16, "--out", "full", preexec_fn=small_files))
    assert not list((home / "full").glob("*.tmp")) and not (home / "full" / "checkpoint.pt").exists()
    (home / "file").write_text("")
    assert "file" in refused(home, *MODELS["ddpm"], *TINY, "--out", "file/run")

    checkpoint = home / "good" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for damaged in (content[:len(content) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        assert "damaged" in refused(home, "--out", "good", "--sample", 1)
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    assert "not a checkpoint" in refused(home, "--out", "good", "--resume")
    weights(home / "good", "checkpoint.previous.pt")

    images = home / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])
    assert "can't be had" in refused(home, *MODELS["ddpm"], *TINY, "--out", "cut")


WRONG = {
    "--steps 0": "must lie in", "--lr -1": "must lie in", "--seed -1": "must lie in", "--eta 2": "must lie in",
    "--levels 1 --model d3pm": "must lie in", "--prompt x --data glyphs": "for text", "--wrong 1": "unrecognized", "--model vae": "invalid choice",
    "--data nothing": "neither a known data set", "--data empty": "0 images", "--data binary.bin": "text",
    "--data blank.txt": "too short", "--data text.txt": "needs --model d3pm", "--device tpu": "can't be used",
    "--variance 2 --data glyphs": "variance", "--variance big --data glyphs": "variance",
    "--levels 4 --data glyphs": "no meaning", "--width 7 --data glyphs": "divide",
    "--data images --size 17": "divisible", "--model d3pm --data text.txt --length 5000": "too short",
    "--model d3pm --transition gaussian --reverse conditional --data glyphs --levels 8": "joint",
    "--sample 3 --out nowhere": "no checkpoint", "--eval --out nowhere": "no checkpoint",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_gets_one_clear_line(home, wrong):
    """Said before any training, with what to do."""
    (home / "empty").mkdir()
    (home / "blank.txt").write_text("")
    (home / "binary.bin").write_bytes(bytes(range(256)) * 10)
    line = refused(home, *wrong.split(), *(["--timesteps", 8] if "--out" not in wrong else []))
    assert WRONG[wrong] in line, line
    assert not (home / "runs").exists(), "nothing is written for a command that can't be carried out"


def test_what_a_run_does_not_know(home):
    """Other characters in a prompt or in the text of --eval, or images where it had text; some of its own will do."""
    run(home, *MODELS["d3pm-text"], *TINY, "--out", "run")
    assert "does not know" in refused(home, "--out", "run", "--sample", 1, "--prompt", "abXY")
    (home / "other.txt").write_text("xyz " * 1000)
    (home / "part.txt").write_text("edcba" * 1000)
    assert "does not know" in refused(home, "--out", "run", "--eval", 2, "--data", "other.txt")
    assert "does not fit" in refused(home, "--out", "run", "--eval", 2, "--data", "fashion-mnist")
    assert "on part" in run(home, "--out", "run", "--eval", 2, "--data", "part.txt")


def test_help_fits_a_screen(home):
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(["--help"])
    lines = said.getvalue().splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_every_command_of_the_readme_runs(home):
    """Each `python train.py` line of its bash blocks, in order, with tiny values after it."""
    shutil.copytree(ROOT / "assets", home / "assets")
    shutil.copy(ROOT / "README.md", home)
    lines = [shlex.split(line, comments=True) for block in readme_blocks("bash") for line in block.splitlines()]
    commands = [words[2:] for words in lines if words[:2] == ["python", "train.py"]]
    assert len(commands) > 10
    for words in commands:
        if {"--sample", "--eval"} & set(words):
            words = ["3" if word.isdigit() and int(word) > 3 else word for word in words]
            run(home, *words, *(["3"] if words[-1] == "--eval" else []), "--sample-steps", 2)
        else:
            run(home, *words, *([] if "--figures" in words else TINY))
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
