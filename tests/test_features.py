"""The fixed features of images: what they show, and that each image is looked at alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapp.tasks.features import features, features_shape, oriented

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


def test_blank_images_and_none_at_all() -> None:
    assert torch.isfinite(oriented(torch.ones(2, 3, 8, 8))).all()
    assert oriented(torch.ones(0, 3, 32, 32)).shape == (0, 51, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 11), (12, 33), (31, 19)])
def test_maps_are_a_quarter_as_high_and_wide(height: int, width: int) -> None:
    maps = oriented(torch.rand(2, 3, height, width))
    assert (
        maps.shape == (2, *features_shape("oriented", 3, height, width)) == (2, 51, height // 4, width // 4)
    )


def test_pixels_stay_as_they_are() -> None:
    images = torch.rand(2, 3, 9, 9)
    assert features("pixels", images) is images
    assert features_shape("pixels", 3, 9, 9) == (3, 9, 9)
