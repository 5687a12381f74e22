"""Distortions of images against what they say they are."""

from __future__ import annotations

import pytest
import torch

from streamlearn.augment import RandomAffine
from streamlearn.config import AugmentConfig

CPU = torch.device("cpu")


def distorted(x: torch.Tensor, **spec: float) -> torch.Tensor:
    """Return images under a distortion."""
    return RandomAffine(AugmentConfig(**spec), 0, CPU)(x)


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 6, 9), (5, 3, 6, 9)])
def test_no_distortion_is_the_identity(shape: tuple[int, ...]) -> None:
    """With every bound at 0 an image stays as it was."""
    x = torch.rand(shape)
    torch.testing.assert_close(distorted(x), x)


def test_a_shift_stays_within_its_pixels() -> None:
    """A single bright pixel moves by at most `shift` in each direction, and its light is kept."""
    x = torch.zeros(500, 9, 13)
    x[:, 4, 6] = 1
    seen = distorted(x, shift=2)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(500), rtol=1e-4, atol=1e-4)
    rows = (seen.sum(2) * torch.arange(9.0)).sum(1) - 4
    columns = (seen.sum(1) * torch.arange(13.0)).sum(1) - 6
    for moved in (rows, columns):
        assert 1.8 < float(moved.abs().max()) <= 2.001
        assert abs(float(moved.mean())) < 0.2


def test_a_rotation_keeps_distances_in_an_image_that_is_not_square() -> None:
    """A pixel turns around the centre: its distance from there stays, and its angle is within the bound."""
    x = torch.zeros(400, 11, 21)
    x[:, 5, 14] = 1  # four to the right of the centre
    seen = distorted(x, rotate=30)
    mass = seen.sum((1, 2))
    down = (seen.sum(2) * torch.arange(11.0)).sum(1) / mass - 5
    right = (seen.sum(1) * torch.arange(21.0)).sum(1) / mass - 10
    assert float((torch.hypot(down, right) - 4).abs().max()) < 0.15
    angle = torch.rad2deg(torch.atan2(down, right)).abs()
    assert 27 < float(angle.max()) < 31


def test_every_image_is_distorted_on_its_own_and_repeatably() -> None:
    """Images of a batch differ, the next batch differs, and the same seed gives the same."""
    x = torch.rand(1, 8, 8).repeat(4, 1, 1)
    one, other = RandomAffine(AugmentConfig(zoom=0.3), 0, CPU), RandomAffine(AugmentConfig(zoom=0.3), 0, CPU)
    first = one(x)
    assert len({image.numpy().tobytes() for image in first}) == 4
    assert torch.equal(first, other(x))
    assert not torch.equal(first, one(x))
