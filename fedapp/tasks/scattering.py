"""The wavelet scattering transform of images, of order 2 at two scales: fixed features, nothing learned."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

MAPS = 81  # made of one channel: 1 + 8 * 2 + 8 * 8
_ANGLES = 8
_GROUPS = 27  # of one channel's maps, three neighbours each, which are normalised together
_LEAST_VARIANCE = 8e-5  # is added to a group's: the usual 1e-5 of pixels from 0 to 1, for deviations of 0.353
_CHUNK = 16  # images at a time: what is made of them stays in a core's cache


def scattering(images: torch.Tensor) -> torch.Tensor:
    """Scattering coefficients, normalised image by image in 27 groups of three neighbouring maps.

    float32 (n, channels, h, w) -> (n, 81 * channels, h // 4, w // 4), for h and w from 8. Groups have mean 0
    and variance 1, less where an image has little contrast, so that next to nothing is not blown up. Nothing
    here is learned or depends on other examples, so that differential privacy pays nothing for it. Source:
    Tramer and Boneh 2021, "Differentially private learning needs better features": group normalisation
    without parameters, with 27 groups for Fashion-MNIST, as in the code they published.
    """
    return torch.cat([_normalised(coefficients(chunk)) for chunk in images.split(_CHUNK)])


def coefficients(images: torch.Tensor) -> torch.Tensor:
    """The scattering coefficients themselves, (n, channels, h, w) -> (n, 81 * channels, h // 4, w // 4).

    Of each channel a local mean; the local means of the moduli of Morlet wavelets at 2 scales and 8 angles,
    the finer scale first; those of the moduli of these 8 finer moduli at the coarser scale, its 8 angles
    innermost. Images are mirrored at their borders. Sources: Bruna and Mallat 2013, "Invariant scattering
    convolution networks"; filters, padding and order of maps are those of kymatio 0.3, Scattering2D(J=2, L=8)
    (Andreux et al. 2020).
    """
    n, channels, height, width = images.shape
    shape = (n, MAPS * channels, height // 4, width // 4)
    if not n:
        return images.new_zeros(shape)  # which a Fourier transform refuses
    bank = _bank(height, width)
    x = functional.pad(images, bank.border, mode="reflect").flatten(0, 1).unsqueeze(1)
    spectrum = torch.fft.fft2(x)
    fine = torch.fft.ifft2(spectrum * bank.fine).abs()
    coarse = _half(spectrum, bank.coarse)
    both = _half(torch.fft.fft2(fine).unsqueeze(2), bank.coarse).flatten(1, 2)
    whole, halved = torch.cat([x, fine], dim=1), torch.cat([coarse, both], dim=1)
    (down, along), (down_half, along_half) = bank.means
    means = torch.cat([down @ whole @ along, down_half @ halved @ along_half], dim=1)
    return means.reshape(shape)


def _normalised(maps: torch.Tensor) -> torch.Tensor:
    return functional.group_norm(maps, maps.shape[1] // MAPS * _GROUPS, eps=_LEAST_VARIANCE)


def _half(spectrum: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Moduli of filtered maps at half their height and width: (..., 1, h, w) -> (..., 8, h // 2, w // 2)."""
    h, w = filters.shape[-2] // 2, filters.shape[-1] // 2
    corners = [(slice(i * h, i * h + h), slice(j * w, j * w + w)) for i in (0, 1) for j in (0, 1)]
    first, *others = (spectrum[..., y, x] * filters[..., y, x] for y, x in corners)
    moduli: torch.Tensor = torch.fft.ifft2(sum(others, start=first)).abs()
    return moduli


@dataclass(frozen=True)
class _Bank:
    """The filters for images of one size.

    border: pixels on the left, right, top and bottom. fine, coarse: spectra of wavelets, (8, h, w).
    means: matrices that take local means down the height and along the width, of whole and of halved maps.
    """

    border: tuple[int, int, int, int]
    fine: torch.Tensor
    coarse: torch.Tensor
    means: tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@cache
def _bank(height: int, width: int) -> _Bank:
    h, w = (4 * (side // 4 + 2) for side in (height, width))
    top, left = (h - height) // 2, (w - width) // 2
    fine, coarse = (
        np.stack([_morlet(h, w, scale, (3 - turn) * math.pi / _ANGLES) for turn in range(_ANGLES)])
        for scale in (1, 2)
    )
    return _Bank(
        (left, w - width - left, top, h - height - top),
        _tensor(fine),
        _tensor(coarse / 4),  # folding a spectrum onto its quarter takes the mean
        (_means(h, w, 4), _means(h, w, 2)),
    )


def _means(h: int, w: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _tensor(_mean(h, step)), _tensor(_mean(w, step).T)


def _tensor(array: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _morlet(h: int, w: int, scale: int, angle: float) -> NDArray[np.float64]:
    """The spectrum (h, w) of a wave along an angle under an elliptic Gaussian, its mean taken out."""
    y, x = np.meshgrid(np.arange(-2 * h, 3 * h), np.arange(-2 * w, 3 * w), indexing="ij")
    along, across = y * math.cos(angle) + x * math.sin(angle), x * math.cos(angle) - y * math.sin(angle)
    sigma, slant = 0.8 * scale, 4 / _ANGLES
    gauss = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    gauss *= slant / (2 * math.pi * sigma**2)
    wave = gauss * np.exp(0.75j * math.pi / scale * along)
    wavelet = wave - wave.sum() / gauss.sum() * gauss
    periodic = wavelet.reshape(5, h, 5, w).sum(axis=(0, 2))
    spectrum: NDArray[np.float64] = np.fft.fft2(periodic).real
    return spectrum


def _mean(size: int, step: int) -> NDArray[np.float64]:
    """Local means in steps of four pixels, (size // 4 - 2, size * step // 4): the border's are left out.

    A Gaussian, which in two dimensions is one along each; of halved maps, at the lower half of frequencies.
    """
    sigma = 1.6
    x = np.arange(-2 * size, 3 * size)
    gauss = np.exp(-(x**2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    spectrum = np.fft.fft(gauss.reshape(5, size).sum(axis=0)).real
    length = size * step // 4
    kept = np.fft.ifft(np.concatenate([spectrum[: length // 2], spectrum[size - length // 2 :]])).real
    starts = step * np.arange(1, size // 4 - 1)
    rows: NDArray[np.float64] = kept[(starts[:, None] - np.arange(length)) % length]
    return rows
