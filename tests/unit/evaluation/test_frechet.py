"""FID and CMMD against their reference formulas, written out."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from diffexpo.errors import DataError
from diffexpo.evaluation.frechet import cmmd, frechet_distance


def reference_fid(a, b):
    """The formula of Heusel et al. with a matrix square root."""
    covariances = [np.cov(rows, rowvar=False) for rows in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    moved = a.mean(axis=0) - b.mean(axis=0)
    return moved @ moved + np.trace(covariances[0] + covariances[1] - 2 * root)


def reference_cmmd(a, b, sigma=10.0):
    """All couples, one at a time."""
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))

    def mean(x, y):
        return np.mean([[math.exp(-((p - q) ** 2).sum() / (2 * sigma**2)) for q in y] for p in x])

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


@pytest.mark.parametrize("sizes", [(300, 200), (30, 25)], ids=["many", "few"])
def test_both_equal_their_formulas(sizes):
    generator = np.random.default_rng(2)
    a = generator.normal(size=(sizes[0], 12)) @ generator.normal(size=(12, 12)) + 1.0
    b = generator.normal(size=(sizes[1], 12)) * 2.0
    assert frechet_distance(a, b) == pytest.approx(reference_fid(a, b), rel=1e-6)
    assert cmmd(a[:40], b[:40]) == pytest.approx(reference_cmmd(a[:40], b[:40]), rel=1e-3)


def test_fewer_images_than_features_need_no_root_of_a_singular_matrix():
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=(6, 40)), generator.normal(size=(5, 40))
    assert frechet_distance(a, b) == pytest.approx(reference_fid(a, b), rel=1e-3)


def test_identities():
    a = np.random.default_rng(4).normal(size=(50, 8))
    shift = np.arange(8.0)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx(shift @ shift)
    assert frechet_distance(a, 2 * a) == pytest.approx(frechet_distance(2 * a, a))
    assert cmmd(a, a) == pytest.approx(0.0, abs=1e-9)
    assert cmmd(a, 3.0 * a) == pytest.approx(0.0, abs=1e-9), "only directions count"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, 3)), np.ones((4, 3)), "at least 2"),
        (np.ones((3, 3)), np.ones((3, 4)), r"\(3, 3\) and \(3, 4\)"),
        (np.full((3, 3), np.nan), np.ones((3, 3)), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, message):
    for distance in (frechet_distance, cmmd):
        with pytest.raises(DataError, match=message):
            distance(a, b)
    with pytest.raises(DataError, match="all zeros"):
        cmmd(np.zeros((2, 2)), np.ones((2, 2)))
