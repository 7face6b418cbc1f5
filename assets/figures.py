"""Draw the README's pictures.

    python assets/figures.py             those that need no training, into the folder of this file
    python assets/figures.py RUN         after train.py --eval: RUN/terms.png and, for images, RUN/lossy.png
"""
import argparse
import json
import math
import pathlib
import sys

import torch
from matplotlib import colormaps, colors
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import d3pm
import ddpm
import train


def axes(width, height, rows=1, columns=1):
    """A figure of so many inches, and its axes as a list."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure, path):
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def strip(axis, chains, x0, grey):
    """An image (1, 1, H, W) at ten times of each chain, a row each. grey(x): 0 black, 1 white, 2 a mask."""
    rows = []
    for chain in chains.values():
        times = [chain.T * i // 9 for i in range(10)]
        path = [x0]
        for s, t in zip(times, times[1:]):
            path.append(chain.q_step(path[-1], s, t))
        rows.append(torch.cat([F.pad(grey(x)[0, 0], (2, 2, 2, 2), value=1) for x in path], dim=1))
    side = len(rows[0])
    axis.imshow(torch.cat(rows), cmap=colormaps["gray"].with_extremes(over="tab:blue"), vmin=0, vmax=1,
                interpolation="nearest")
    axis.set_yticks([side * (i + 0.5) for i in range(len(chains))], chains)
    axis.set_xticks([side * (i + 0.5) for i in range(10)], [f"{i / 9:.2g}" for i in range(10)])
    axis.set(xlabel="t / T")


def forward(image):
    """forward.png: what the two schedules leave of an image, and of its power."""
    T = 1000
    chains = {"linear": ddpm.GaussianDiffusion(ddpm.linear_beta_schedule(T)),
              "cosine": ddpm.GaussianDiffusion(ddpm.cosine_beta_schedule(T))}
    figure, (images, power) = axes(11, 2.6, columns=2)
    strip(images, chains, image / 127.5 - 1, lambda x: (x.clamp(-1, 1) + 1) / 2)
    for name, chain in chains.items():
        power.plot(chain.alpha_bar, label=name)
    power.set(xlabel="t", title="alpha_bar: share of the signal's power")
    power.legend()
    save(figure, HERE / "forward.png")


def improved():
    """improved.png: the range of the learned variance, the weight that L_simple drops, and grids of times."""
    T = 1000
    figure, (ratio, weight, grids) = axes(13, 3.2, columns=3)
    cosine = ddpm.GaussianDiffusion(ddpm.cosine_beta_schedule(T))
    noise = 1 - cosine.alpha_bar
    for step in (1, 20, 100):
        ratio.plot(range(step + 1, T + 1), noise[1:-step] / noise[step + 1:],
                   label=f"t - s = {step}, as in {T // step} steps")
    ratio.set(xlabel="t", title="beta_tilde / beta, the ends of the range")
    ratio.legend(loc="lower right")
    for name, betas in ("linear", ddpm.linear_beta_schedule(T)), ("cosine", ddpm.cosine_beta_schedule(T)):
        alpha_bar = (1 - betas).cumprod(0)              # steps t-1 -> t for t = 2..T, at sigma^2 = beta_tilde
        beta, alpha, noise_s = betas[1:], 1 - betas[1:], 1 - alpha_bar[:-1]
        weight.semilogy(range(2, T + 1), beta / (2 * alpha * noise_s), label=name)
    weight.set(xlabel="t", title="weight of |eps - eps_hat|^2 in the bound")
    weight.legend()
    for height, n in enumerate((10, 50, 1000)):
        grids.plot(cosine.timesteps(n), [height] * n, "|", color=f"C{2 - height}", markersize=14)
    grids.set(xlabel="t", yticks=range(3), yticklabels=["10", "50", "1000 steps"], ylim=(-0.7, 2.7),
              title="grids of fewer steps")
    save(figure, HERE / "improved.png")


def decoder():
    """decoder.png: a Gaussian near white, cut into the bins of 9 levels."""
    levels, mean, std = 9, torch.tensor(0.8), torch.tensor(0.25)
    x, width = torch.linspace(-1, 1, levels), 2 / (levels - 1)
    mass = ddpm.discretized_gaussian_log_likelihood(x, mean, std.log(), levels).exp()
    line = torch.linspace(-1.2, 1.8, 400)
    density = width * torch.distributions.Normal(mean, std).log_prob(line).exp()
    figure, [axis] = axes(6, 3.4)
    axis.bar(x, mass, 0.96 * width, color=["C1"] + (levels - 2) * ["C0"] + ["C1"], alpha=0.5)
    axis.plot(line, density, "k", label="density times the width of a bin")
    beyond = line > 1 + width / 2
    axis.fill_between(line[beyond], density[beyond], color="C1", hatch="///", alpha=0.5,
                      label="beyond the last level: counted in its open bin")
    axis.set(xlabel="x_0", xticks=x[::2].tolist(), ylabel="probability", ylim=(0, 0.6),
             title="L_0: the mass of each of 9 levels, mean 0.8")
    axis.legend(fontsize=8, loc="upper left")
    save(figure, HERE / "decoder.png")


def transitions():
    """transitions.png: Q_bar of four families, early and halfway, on one logarithmic scale."""
    K, T = 16, 100
    ring = torch.polar(torch.ones(K), 2 * math.pi * torch.arange(K) / K)
    betas = d3pm.linear_betas(T, 0.1 / T, 20 / T)
    families = {"uniform": d3pm.uniform_transition(K, d3pm.cosine_betas(T)),
                "absorbing": d3pm.absorbing_transition(K, d3pm.mutual_information_betas(T)),
                "gaussian": d3pm.gaussian_transition(K, betas),
                "neighbour: points on a ring,\nthe last one beside the first":
                    d3pm.neighbour_transition(torch.view_as_real(ring), betas, 2)}
    figure, panels = axes(11, 5.6, rows=2, columns=4)
    norm, cmap = colors.LogNorm(1e-4, 1), colormaps["magma"].with_extremes(bad="black")
    for i, t in enumerate((10, 50)):
        for axis, (name, family) in zip(panels[4 * i:], families.items()):
            image = axis.imshow(family.matrix(0, t), cmap=cmap, norm=norm)
            axis.set(title="" if i else name, xticks=[], yticks=[], xlabel="x_t", ylabel=f"x_0 (t = {t})")
    figure.suptitle(f"Q_bar_t = q(x_t | x_0), K = {K} states, T = {T}")
    figure.colorbar(image, ax=panels, extend="min", shrink=0.8, label="probability")
    save(figure, HERE / "transitions.png")


def forward_d3pm(image):
    """forward-d3pm.png: what three families of noise leave of an image of 256 levels."""
    K, T = 256, 100
    chains = {"uniform": d3pm.uniform_transition(K, d3pm.cosine_betas(T)),
              "absorbing\n(mask: blue)": d3pm.absorbing_transition(K + 1, d3pm.mutual_information_betas(T)),
              "gaussian": d3pm.gaussian_transition(K, d3pm.linear_betas(T, 0.1 / T, 20 / T))}
    figure, [axis] = axes(9, 3.2)
    strip(axis, {name: d3pm.D3PM(family) for name, family in chains.items()}, image.long(),
          lambda x: (x / (K - 1)).masked_fill(x == K, 2))
    save(figure, HERE / "forward-d3pm.png")


def guidance():
    """guidance.png: the README's table of weights as three curves."""
    table = (HERE.parent / "README.md").read_text(encoding="utf-8").split("| guidance $w$")[1].split("\n\n")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    w, *columns = zip(*[[float(cell.strip(" %")) for cell in row] for row in cells])
    figure, panels = axes(11, 2.6, columns=3)
    titles = ("FID", "% called their label", "bits/dim given the label")
    for axis, title, ddpm_column, d3pm_column in zip(panels, titles, columns[:3], (*columns[3:], None)):
        axis.plot(w, ddpm_column, "o-", label="DDPM")
        if d3pm_column:
            axis.plot(w, d3pm_column, "s--", label="D3PM, 16 levels")
        axis.set(title=title, xlabel="guidance w")
    panels[0].legend()
    save(figure, HERE / "guidance.png")


def terms(run, bound, path):
    """terms.png: the bound's terms, their cumulative share, and progressive lossy compression."""
    grid, prior, values = bound["steps"], bound["prior"], torch.tensor(bound["terms"])
    figure, (left, middle, right) = axes(13, 3.2, columns=3)
    left.loglog(grid, (values / torch.tensor([0, *grid]).diff()).clamp(min=1e-9), ".-", markersize=3)
    left.set(xlabel="t", ylabel=f"{bound['unit']} for a unit of t", title="the bound's terms: L_0 first")
    middle.semilogx(grid, 100 * values.cumsum(0) / (values.sum() + prior), ".-", markersize=3)
    middle.set(xlabel="t", ylabel="% of the bound", ylim=(0, 103), title="share of the steps up to t")
    # Sent from T downwards, x_s costs L_T and the terms above it; from x_s the receiver guesses x0_hat.
    rate, error = prior + values.flip(0).cumsum(0) - values.flip(0), torch.tensor(bound["x0_mse_or_error"]).flip(0)
    right.plot(rate, 100 * error if run.discrete else error.sqrt() * 127.5, ".-", markersize=3)
    right.set(xlabel=f"rate, {bound['unit']}", title="progressive lossy compression",
              ylabel="places guessed wrong, %" if run.discrete else "root mean square error, of 255")
    save(figure, path)


@torch.no_grad()
def lossy(run, grid, path):
    """lossy.png: what a receiver who has x_t guesses, for test images (rows) and falling t (columns); then the data."""
    torch.manual_seed(0)
    x0, y = run.tests(8)
    columns, times = [], [grid[i] for i in torch.linspace(len(grid) - 1, 0, 9).long().tolist()]
    for t in times:
        guess = run.diffusion.p_sample(run.model(y), run.diffusion.q_sample(x0, t), t)[1]  # x0_hat, or log p(x_0|x_t)
        columns.append(run.pictures(guess.argmax(-1) if run.discrete else guess))
    rows = train.grid_picture(torch.stack([*columns, run.pictures(x0)], dim=1).flatten(0, 1), 10)
    picture = ImageOps.expand(ImageOps.scale(rows, 2, Image.Resampling.NEAREST), (0, 20, 0, 0), fill="white")
    for i, title in enumerate([f"t={t}" for t in times] + ["data"]):
        ImageDraw.Draw(picture).text((i * picture.width // 10 + 6, 4), title, fill="black")
    picture.save(path)
    print(f"written: {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the README's pictures.")
    parser.add_argument("run", nargs="?", type=pathlib.Path, help="a run's folder (left out: what needs no training)")
    parser.add_argument("--data-dir", default="data", help="where Fashion-MNIST is, or goes to (data)")
    args = parser.parse_args(argv)
    if args.run:
        given = dict(out=str(args.run), data_dir=args.data_dir)
        run = train.load_run(given, torch.device("cpu"))
        out = run.out
        if not (out / "eval.json").exists():
            sys.exit(f"figures.py: no eval.json in {out}: python train.py --out {out} --eval comes first")
        bound = json.loads((out / "eval.json").read_text())
        terms(run, bound, out / "terms.png")
        if not run.text:
            train.find_data(run, given)
            lossy(run, bound["steps"], out / "lossy.png")
        return
    image = train.load_data(None, args.data_dir).test[:1]
    torch.manual_seed(0)
    forward(image)
    improved()
    decoder()
    transitions()
    forward_d3pm(image)
    guidance()


if __name__ == "__main__":
    main()
