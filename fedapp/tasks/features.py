"""Fixed public features of images: what learning under noise need not pay for."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedapp.jit import jit
from fedapp.tasks import scattering

Floats = NDArray[np.float32]
CHOICES = ("pixels", "oriented", "scattering")
LEAST = {"pixels": 1, "oriented": 8, "scattering": 8}  # pixels that an image must have each way
_MAPS = 17  # made of one channel


def features(choice: str, images: torch.Tensor) -> torch.Tensor:
    """What a task makes of its images (n, channels, h, w): "pixels" are themselves, the others see below."""
    if choice == "scattering":
        return scattering.scattering(images)
    return oriented(images) if choice == "oriented" else images


def features_shape(choice: str, channels: int, height: int, width: int) -> tuple[int, int, int]:
    """The shape that `features` gives one image."""
    if choice == "pixels":
        return channels, height, width
    maps = scattering.MAPS if choice == "scattering" else _MAPS
    return maps * channels, height // 4, width // 4


def oriented(images: torch.Tensor) -> torch.Tensor:
    """Where an image has edges and bars of which direction: maps of a quarter of its height and width.

    Of each channel 17 maps: brightness, the first derivative in eight directions, and the second derivative
    in four, its two signs apart; half-wave rectified, averaged over 6 x 6 pixels in steps of 4, and scaled
    to mean 0 and variance 1 map by map. float32 (n, channels, h, w) -> (n, 17 * channels, h // 4, w // 4)
    for h and w from 8. Nothing here is learned or depends on other examples, so that differential privacy
    pays nothing for it; under clipping and noise such features beat learned ones.

    Sources: Tramer and Boneh 2021, "Differentially private learning needs better features" (with
    scattering networks); Dalal and Triggs 2005, "Histograms of oriented gradients"; Freeman and Adelson
    1991, "Steerable filters", for derivatives in any direction from those along the axes.
    """
    n, channels, height, width = images.shape
    pooled = np.empty((n * channels, _MAPS, height // 4, width // 4), np.float32)
    _pooled(images.reshape(n * channels, height, width).numpy(), _weights(), pooled)
    maps = functional.instance_norm(torch.from_numpy(pooled))
    return maps.reshape(n, _MAPS * channels, height // 4, width // 4)


def _weights() -> Floats:
    """What the derivatives count in each of four directions, (5, 4): dx and dy of edges, the rest of bars."""
    turn = np.arange(4) * math.pi / 4
    rows = [np.cos(turn), np.sin(turn), np.cos(turn) ** 2, np.sin(2 * turn), np.sin(turn) ** 2]
    return np.stack(rows).astype(np.float32)


@jit
def _pooled(images: Floats, weights: Floats, pooled: Floats) -> None:
    """The maps of images (n, h, w), averaged into (n, 17, h // 4, w // 4).

    Compiled, since start-up waits for it, and without Python's lock: imports go on meanwhile.
    """
    n, h, w = images.shape
    planes = np.empty((6, h + 2, w + 2), np.float32)  # the image, dx, dy, dxx, dxy, dyy; each in a frame
    maps = np.empty((_MAPS, w), np.float32)  # of one row of pixels
    sums = np.empty((2, _MAPS, w), np.float32)  # over the rows of a window; no row lies in three
    for i in range(n):
        for a in range(h):
            for b in range(w):
                planes[0, a + 1, b + 1] = images[i, a, b]
        _derivatives(planes[0], planes[1], planes[2])
        _derivatives(planes[2], planes[4], planes[5])  # dyx, which is dxy but for rounding
        _derivatives(planes[1], planes[3], planes[4])
        for a in range(h):
            _maps(planes[:, a + 1, 1:-1], weights, maps)
            for row in range(max(0, (a - 1) // 4), min((a + 5) // 4, h // 4)):
                first, last = max(0, 4 * row - 1), min(4 * row + 4, h - 1)
                if first <= a <= last:
                    _add(maps, sums[row % 2], a == first)
                if a == last:
                    _average(sums[row % 2], last + 1 - first, pooled[i, :, row])


@jit
def _derivatives(x: Floats, across: Floats, down: Floats) -> None:
    """Central differences of x (h, w), along the width and along the height. All have a frame of one pixel.

    That of x is filled here with the nearest pixels, those of the others are left as they are.
    """
    h, w = x.shape[0] - 1, x.shape[1] - 1
    for a in range(1, h):
        x[a, 0], x[a, w] = x[a, 1], x[a, w - 1]
    for b in range(1, w):
        x[0, b], x[h, b] = x[1, b], x[h - 1, b]
    for a in range(1, h):
        for b in range(1, w):
            across[a, b] = x[a, b + 1] - x[a, b - 1]
            down[a, b] = x[a + 1, b] - x[a - 1, b]


@jit
def _maps(planes: Floats, weights: Floats, maps: Floats) -> None:
    """The 17 maps of one row, before pooling: planes (6, w) -> maps (17, w)."""
    x, dx, dy, dxx, dxy, dyy = planes
    zero = np.float32(0)
    for b in range(len(x)):
        maps[0, b] = x[b]
    for k in range(4):
        for b in range(len(x)):
            edge = weights[0, k] * dx[b] + weights[1, k] * dy[b]
            maps[1 + k, b], maps[5 + k, b] = max(edge, zero), max(-edge, zero)  # an edge has two sides
        for b in range(len(x)):
            bar = weights[2, k] * dxx[b] + weights[3, k] * dxy[b] + weights[4, k] * dyy[b]
            maps[9 + k, b], maps[13 + k, b] = max(bar, zero), max(-bar, zero)


@jit
def _add(maps: Floats, sums: Floats, first: bool) -> None:
    """Add a row's maps to a window's sums, or begin them; (17, w) both."""
    for k in range(maps.shape[0]):
        for b in range(maps.shape[1]):
            sums[k, b] = maps[k, b] if first else sums[k, b] + maps[k, b]


@jit
def _average(sums: Floats, rows: int, pooled: Floats) -> None:
    """Sums of so many rows (17, w) -> the windows' averages (17, w // 4)."""
    for col in range(pooled.shape[1]):
        first, last = max(0, 4 * col - 1), min(4 * col + 4, sums.shape[1] - 1)
        for k in range(_MAPS):
            total = np.float32(0)
            for b in range(first, last + 1):
                total += sums[k, b]
            pooled[k, col] = total / np.float32(rows * (last + 1 - first))
