"""Fixed public features of images: what learning under noise need not pay for."""

import math

import torch
from torch.nn import functional

from fedapp.tasks import scattering

CHOICES = ("pixels", "oriented", "scattering")
LEAST = {"pixels": 1, "oriented": 8, "scattering": 8}  # pixels that an image must have each way
_MAPS = 17  # made of one channel
_CHUNK = 64  # images at a time: their 17 maps before pooling stay in a core's cache


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
    chunks = [_oriented(chunk) for chunk in images.split(_CHUNK)]
    return torch.cat(chunks)


def _oriented(images: torch.Tensor) -> torch.Tensor:
    n, channels, height, width = images.shape
    pixels = images.reshape(n * channels, 1, height, width)
    dx, dy = _derivatives(pixels)
    dxx, dxy = _derivatives(dx)
    _, dyy = _derivatives(dy)
    cos, sin = _directions(8, 2 * math.pi)  # an edge has two sides
    edges = cos * dx + sin * dy
    cos, sin = _directions(4, math.pi)  # a bar has none
    bars = cos * cos * dxx + 2 * cos * sin * dxy + sin * sin * dyy
    maps = torch.cat([pixels, edges.relu(), bars.relu(), (-bars).relu()], dim=1)
    pooled = functional.avg_pool2d(maps, kernel_size=6, stride=4, padding=1, count_include_pad=False)
    return functional.instance_norm(pooled).reshape(n, _MAPS * channels, *pooled.shape[2:])


def _derivatives(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences along the width and along the height, (n, 1, h, w) each."""
    padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return across, down


def _directions(count: int, turn: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `count` angles over `turn`, (count, 1, 1) each."""
    angles = torch.arange(count).mul(turn / count).reshape(-1, 1, 1)
    return angles.cos(), angles.sin()
