"""Random affine distortions of images."""

from __future__ import annotations

import pytest
import torch

from streamlearn.learning.augment import RandomAffine
from streamlearn.learning.config import AugmentConfig

CPU = torch.device("cpu")


def distorted(x: torch.Tensor, **spec: float) -> torch.Tensor:
    """Return distorted images, for the given bounds."""
    return RandomAffine(AugmentConfig(**spec), 0, CPU)(x)


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 6, 9), (5, 3, 6, 9)])
def test_bounds_of_zero_change_nothing(shape: tuple[int, ...]) -> None:
    """If every bound is 0, images stay as they are."""
    x = torch.rand(shape)
    torch.testing.assert_close(distorted(x), x)


def test_a_shift_stays_within_its_bound() -> None:
    """A single bright pixel moves by at most `shift` pixels in each direction, and keeps its brightness."""
    x = torch.zeros(500, 9, 13)
    x[:, 4, 6] = 1
    seen = distorted(x, shift=2)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(500), rtol=1e-4, atol=1e-4)
    rows = (seen.sum(2) * torch.arange(9.0)).sum(1) - 4
    columns = (seen.sum(1) * torch.arange(13.0)).sum(1) - 6
    for moved in (rows, columns):
        assert 1.8 < float(moved.abs().max()) <= 2.001
        assert abs(float(moved.mean())) < 0.2


def test_a_rotation_keeps_distances_in_a_non_square_image() -> None:
    """A pixel rotates around the centre: its distance from the centre stays the same, and its angle is within the bound."""
    x = torch.zeros(400, 11, 21)
    x[:, 5, 14] = 1  # four pixels to the right of the centre
    seen = distorted(x, rotate=30)
    mass = seen.sum((1, 2))
    down = (seen.sum(2) * torch.arange(11.0)).sum(1) / mass - 5
    right = (seen.sum(1) * torch.arange(21.0)).sum(1) / mass - 10
    assert float((torch.hypot(down, right) - 4).abs().max()) < 0.15
    angle = torch.rad2deg(torch.atan2(down, right)).abs()
    assert 27 < float(angle.max()) < 31


def test_images_get_different_repeatable_distortions() -> None:
    """The distortions differ within a batch and between batches; the same seed gives the same distortions."""
    x = torch.rand(1, 8, 8).repeat(4, 1, 1)
    one, other = RandomAffine(AugmentConfig(zoom=0.3), 0, CPU), RandomAffine(AugmentConfig(zoom=0.3), 0, CPU)
    first = one(x)
    assert len({image.numpy().tobytes() for image in first}) == 4
    assert torch.equal(first, other(x))
    assert not torch.equal(first, one(x))
