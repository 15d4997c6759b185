"""The fixed features of images: what they show, and that each image is looked at alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedapp.tasks.features import features, features_shape, oriented
from fedapp.tasks.scattering import coefficients, scattering

EDGES, BRIGHT, DARK = slice(1, 9), slice(9, 13), slice(13, 17)


def at_centre(image: torch.Tensor) -> torch.Tensor:
    """Which of the 17 maps stand out at the centre of an image (28, 28)."""
    return oriented(image.reshape(1, 1, 28, 28))[0, :, 3, 3] > 0.1


@pytest.mark.parametrize("turn", range(4))
def test_an_edge_shows_in_its_own_direction_and_the_two_beside_it(turn: int) -> None:
    image = torch.zeros(28, 28)
    image[:, 14:] = 1  # brighter to the right
    found = at_centre(torch.rot90(image, -turn))  # clockwise, as the directions go
    expected = torch.zeros(8, dtype=torch.bool)
    expected[[(2 * turn + k) % 8 for k in (-1, 0, 1)]] = True
    assert torch.equal(found[EDGES], expected)


def test_a_line_shows_in_the_second_derivative_across_it_by_its_sign() -> None:
    image = torch.zeros(28, 28)
    image[:, 13] = 1
    bright, dark = at_centre(image), at_centre(1 - image)
    assert bright[DARK][0]
    assert not bright[DARK][2]
    assert torch.equal(bright[DARK], dark[BRIGHT])
    assert torch.equal(at_centre(image.T)[DARK], bright[DARK][[2, 3, 0, 1]])


@given(st.integers(0, 2**32 - 1), st.integers(20, 33), st.integers(20, 33), st.sampled_from([1, 3]))
@settings(max_examples=25, deadline=None)
def test_each_image_is_looked_at_alone_and_whatever_its_brightness_and_contrast(
    seed: int, height: int, width: int, channels: int
) -> None:
    images = 10 * torch.rand(70, channels, height, width, generator=torch.Generator().manual_seed(seed))
    before = images.clone()
    maps = oriented(images)
    assert torch.equal(images, before)
    assert torch.allclose(oriented(images[66:67]), maps[66:67], atol=1e-4)
    assert torch.allclose(oriented(3 * images + 5), maps, atol=1e-2)
    assert torch.allclose(maps.mean(dim=(2, 3)), torch.zeros(70, 17 * channels), atol=1e-4)
    assert float(maps.var(dim=(2, 3), correction=0).max()) <= 1.001


@pytest.mark.parametrize(("choice", "maps"), [("oriented", 51), ("scattering", 243)])
def test_blank_images_and_none_at_all(choice: str, maps: int) -> None:
    assert torch.isfinite(features(choice, torch.ones(2, 3, 8, 8))).all()
    assert features(choice, torch.ones(0, 3, 32, 32)).shape == (0, maps, 8, 8)


@pytest.mark.parametrize(("choice", "maps"), [("oriented", 51), ("scattering", 243)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 11), (12, 33), (31, 19)])
def test_maps_are_a_quarter_as_high_and_wide(choice: str, maps: int, height: int, width: int) -> None:
    shape = features(choice, torch.rand(2, 3, height, width)).shape
    assert shape == (2, *features_shape(choice, 3, height, width)) == (2, maps, height // 4, width // 4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (31, 19)])
def test_oriented_maps_are_what_their_docstring_says(height: int, width: int) -> None:
    images = torch.rand(3, 1, height, width)

    def along(x: torch.Tensor, axis: int) -> torch.Tensor:
        framed = functional.pad(x, (1, 1, 1, 1), mode="replicate")
        before, after = (framed.narrow(axis, at, x.shape[axis]) for at in (0, 2))
        return (after - before).narrow(5 - axis, 1, x.shape[5 - axis])

    def derivative(x: torch.Tensor, turn: float) -> torch.Tensor:
        return math.cos(turn) * along(x, 3) + math.sin(turn) * along(x, 2)

    edges = [derivative(images, k * math.pi / 4) for k in range(8)]
    bars = [derivative(derivative(images, k * math.pi / 4), k * math.pi / 4) for k in range(4)]
    maps = torch.cat([images, *[m.relu() for m in (*edges, *bars)], *[(-m).relu() for m in bars]], dim=1)
    pooled = functional.avg_pool2d(maps, kernel_size=6, stride=4, padding=1, count_include_pad=False)
    assert torch.allclose(oriented(images), functional.instance_norm(pooled), atol=1e-4)


def test_pixels_stay_as_they_are() -> None:
    images = torch.rand(2, 3, 9, 9)
    assert features("pixels", images) is images
    assert features_shape("pixels", 3, 9, 9) == (3, 9, 9)


# --- scattering --------------------------------------------------------------------------------------------

# kymatio 0.3.0, Scattering2D(J=2, shape=(28, 22), L=8) on the image of the test below: all 81 maps in row 2,
# column 4, in 1e-7. (kymatio takes pi for 3.1415 in its filters' norms, so each filter makes 3e-5 more.)
KYMATIO = """
4876268  860407  625520  626406  479548  549855  560013  589291  850002  510392  177228
 253418  231236  195444  236068  380741  559345  117962   71372   70976   81744   63755
  40204   39919   80831   76585   52696   77215  123255   73619   39444   41617   94032
  27110   22107   42641   60377   59784   31821   51284   48993   21039   81579   88833
  76502   60729   21918   31363   41247   28110   24515   55623   72774   49471   72237
  38291   49936   23607   29173   35648   44412   44300   30372   66068   67165   58180
  27383   38169   37865   68099   69632   77732   34984   90402   93675   74778   69422
  60339   59670  106284  111819
"""


def test_scattering_coefficients_are_kymatios() -> None:
    i, j = np.mgrid[:28, :22]
    image = torch.from_numpy(((3 * i * i + 5 * j + i * j) % 17 / 16).astype(np.float32))
    found = coefficients(image.reshape(1, 1, 28, 22))[0, :, 2, 4].double().numpy()
    expected = (
        np.array(KYMATIO.split(), np.float64) / 1e7 / (np.pi / 3.1415) ** np.repeat([1, 2, 3], [1, 16, 64])
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("turn", range(8))
def test_a_wave_shows_in_the_wavelet_of_its_scale_and_angle(scale: int, turn: int) -> None:
    i, j = np.mgrid[:32, :32]
    angle = (3 - turn) * np.pi / 8
    wave = np.cos(0.75 * np.pi / 2**scale * (i * np.cos(angle) + j * np.sin(angle)))
    found = coefficients(torch.from_numpy(wave.astype(np.float32)).reshape(1, 1, 32, 32))
    assert int(found[0, 1:17, 3, 3].argmax()) == 8 * scale + turn


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_scattering_scales_with_contrast_and_brightness_moves_the_mean_alone(
    seed: int, contrast: float, brightness: float
) -> None:
    images = torch.rand(20, 1, 12, 17, generator=torch.Generator().manual_seed(seed))
    maps, moved = coefficients(images), coefficients(brightness - contrast * images)
    assert torch.allclose(moved[:, 1:], contrast * maps[:, 1:], atol=1e-4)
    assert torch.allclose(moved[:, 0], brightness - contrast * maps[:, 0], atol=1e-4)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_scattering_brings_no_two_images_further_apart(seed: int) -> None:
    """Of images that repeat, whose borders add nothing: four pixels a coefficient, so a factor of 2."""
    first, second = torch.randn(2, 1, 1, 40, 40, generator=torch.Generator().manual_seed(seed))
    apart = 2 * float((coefficients(first) - coefficients(second))[..., 2:-2, 2:-2].norm())
    assert apart <= float((first - second).norm())


def test_scattering_moves_with_the_image_and_hardly_heeds_one_pixel() -> None:
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    still, one, four = (coefficients(noise[..., :60, by : 60 + by])[..., 4:-4, 4:-4] for by in (0, 1, 4))
    assert torch.allclose(four[..., :-1], still[..., 1:], atol=1e-4)  # but for what the borders add
    assert not torch.allclose(four, still, atol=1e-2)
    change = float((one - still)[:, 1:].norm() / still[:, 1:].norm())
    pixels = float((noise[..., 1:] - noise[..., :-1]).norm() / noise.norm())
    assert change < 0.25 < 1.2 < pixels


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_scattering_looks_at_each_image_alone_and_normalises_in_27_groups(seed: int, channels: int) -> None:
    images = 100 * torch.randn(20, channels, 16, 20, generator=torch.Generator().manual_seed(seed))
    before = images.clone()
    maps = scattering(images)
    assert torch.equal(images, before)
    assert torch.allclose(scattering(images[17:18]), maps[17:18], atol=1e-4)
    groups = maps.reshape(20, 27 * channels, -1)
    assert groups.shape[2] == 3 * 4 * 5
    assert torch.allclose(groups.mean(dim=2), torch.zeros(20, 27 * channels), atol=1e-4)
    variance = groups.var(dim=2, correction=0)
    assert 0.99 < float(variance.min()) <= float(variance.max()) <= 1.001  # eps takes some of a flat group
