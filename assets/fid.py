"""Score a run's samples of Fashion-MNIST.

    python assets/fid.py RUN                FID of RUN/samples.npy, and which labels of RUN/labels.npy were met
    python assets/fid.py RUN --nearest      RUN/nearest.png: ten samples over their nearest training images
    python assets/fid.py                    what real training images score: the floor

FID is the Frechet distance (Heusel et al. 2017, arXiv 1706.08500) between the features of the samples and of the
10,000 test images. The features are those of a small classifier, fidnet_fashion.pt: three convolutions, 94k
parameters, 64 features, right on 92.8 % of the test images. Such FIDs can't be compared with those under the
Inception network. They fall as the number of samples grows: compare equal numbers.
"""
import argparse
import math
import pathlib
import sys

import numpy as np
import torch
from PIL import Image
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train import load_data


class Classifier(nn.Module):
    """uint8 (N, 1, 28, 28) -> features (N, 64) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                                nn.MaxPool2d(2)) for channels, out in ((1, 32), (32, 64), (64, 64))]
        self.conv, self.feat, self.head = nn.Sequential(*blocks), nn.Linear(64 * 9, 64), nn.Linear(64, 10)

    def forward(self, images):
        features = self.feat(self.conv(images.float() / 127.5 - 1).flatten(1)).relu()
        return features, self.head(features)


@torch.no_grad()
def classify(net, images):
    """Features, float64 (N, 64), and the class that the classifier finds likeliest, int64 (N,)."""
    features, logits = zip(*[net(batch) for batch in images.split(500)])
    return torch.cat(features).double(), torch.cat(logits).argmax(1)


def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, 64): the distance of two Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues, and C_a C_b has those of the symmetric
    C_a^(1/2) C_b C_a^(1/2).
    """
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def entropy(classes):
    """Bits of the histogram of classes: log2(10) = 3.32 where all ten are found alike often."""
    share = torch.bincount(classes, minlength=10) / len(classes)
    return torch.distributions.Categorical(share).entropy() / math.log(2)


def read(path, dtype, *shape):
    """The file's array of two or more things of such a shape, as a tensor; else one line and the end."""
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"fid.py: {path} can't be read ({error})")
    if array.dtype != dtype or array.shape[1:] != shape or len(array) < 2:
        sys.exit(f"fid.py: {path} must hold two or more {dtype} {shape}, got {array.dtype} {array.shape}")
    return torch.from_numpy(array)


def floor(net, train, reference):
    """What real training images score."""
    for n in (2000, 500):
        generator = torch.Generator().manual_seed(0)
        draws = [train[torch.randperm(len(train), generator=generator)[:n]] for _ in range(5)]
        fids = torch.stack([frechet(classify(net, draw)[0], reference) for draw in draws])
        print(f"{n} training images: FID {fids.mean():.3f}, mean of 5 draws, standard deviation {fids.std():.3f}")


def nearest(samples, data, path):
    """Ten samples over the training images nearest to them as a picture; and the distances of 100."""
    flat = data.train.flatten(1).float()
    (distance, index), (usual, _) = (torch.cdist(images[:100].flatten(1).float(), flat).min(1)
                                     for images in (samples, data.test))
    rows = [torch.cat([*images[:10, 0]], dim=1) for images in (samples, data.train[index])]
    picture = Image.fromarray(torch.cat(rows).numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)
    print(f"{path}: the nearest training image is {distance.mean() / 28:.1f} of 255 away (root mean square of the "
          f"pixels, mean of {len(distance)} samples), from a test image {usual.mean() / 28:.1f}")


def main():
    parser = argparse.ArgumentParser(description="Score a run's samples of Fashion-MNIST.")
    parser.add_argument("run", nargs="?", type=pathlib.Path, help="the run's folder (left out: real images)")
    parser.add_argument("--nearest", action="store_true", help="write RUN/nearest.png")
    parser.add_argument("--data-dir", default="data", help="where Fashion-MNIST is, or goes to (data)")
    args = parser.parse_args()
    if args.run:
        samples = read(args.run / "samples.npy", "uint8", 28, 28, 1).permute(0, 3, 1, 2)
    data, net = load_data("fashion-mnist", args.data_dir), Classifier().eval()
    net.load_state_dict(torch.load(HERE / "fidnet_fashion.pt", weights_only=True))
    reference = classify(net, data.test)[0]

    if not args.run:
        return floor(net, data.train, reference)
    features, classes = classify(net, samples)
    print(f"{len(samples)} samples: FID {frechet(features, reference):.3f}, "
          f"entropy of the classes {entropy(classes):.3f} bits")
    if (args.run / "labels.npy").exists():
        labels = read(args.run / "labels.npy", "int64")
        if len(labels) != len(samples):
            sys.exit(f"fid.py: {len(labels)} labels for {len(samples)} samples")
        print(f"hit rate: {(classes == labels).double().mean():.1%} are of the class that their label asked for")
    if args.nearest:
        nearest(samples, data, args.run / "nearest.png")


if __name__ == "__main__":
    main()
