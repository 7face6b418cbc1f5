"""Score a run's samples of Fashion-MNIST.

    python assets/fid.py RUN                FID of RUN/samples.npy; and how many are what RUN/labels.npy asked for
    python assets/fid.py                    the floor: what real training images score
    python assets/fid.py RUN --nearest      RUN/nearest.png: samples over their nearest training images

FID is the Frechet distance (Heusel et al. 2017, arXiv 1706.08500) between the features of samples and of the 10,000
test images. The features are those of a small classifier, fidnet_fashion.pt: three convolutions, 94k parameters,
64 features, right on ACCURACY % of the test images. So the numbers can't be compared with FIDs under the Inception
network; and since they fall with the number of samples, compare equal numbers.
"""
import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from train import load_data  # noqa: E402  (before torch: it sets how threads wait)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402


class Classifier(nn.Module):
    """uint8 (N, 1, 28, 28) -> features (N, 64) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(*[
            nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                          nn.MaxPool2d(2)) for channels, out in ((1, 32), (32, 64), (64, 64))])
        self.feat, self.head = nn.Linear(64 * 3 * 3, 64), nn.Linear(64, 10)

    def forward(self, images):
        features = self.feat(self.conv(images.float() / 127.5 - 1).flatten(1)).relu()
        return features, self.head(features)
