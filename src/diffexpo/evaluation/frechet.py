"""How far drawn images are from real ones as sets: Fréchet distance (FID) and CMMD, with NumPy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.errors import DataError

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_CHUNK = 1024


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features; of Inception's it is FID.

        d = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^{1/2})

    with means m and unbiased covariances C. With centred rows A, B the last trace is the nuclear norm of
    A B^T / sqrt((n - 1)(m - 1)), which needs no square root of a singular matrix.

    Args:
        a, b: Features (n, d) and (m, d), n, m >= 2.
    Returns:
        A number >= 0; a set against itself is 0 up to rounding, and against itself moved by v it is |v|^2.
        It is biased upwards for small sets: compare sets of equal sizes only, and say n with it.
    Raises:
        DataError: other shapes, fewer than two rows, or numbers that are not finite.
    Source: Heusel et al. (2017), arXiv 1706.08500, eq. 6.
    """
    left, right = _features(a, b, "frechet_distance")
    centred_left, centred_right = left - left.mean(axis=0), right - right.mean(axis=0)
    scale = np.sqrt((len(left) - 1) * (len(right) - 1))
    if min(len(left), len(right)) > left.shape[1]:
        # R^T R = A^T A, so the factors of QR have the same product with far fewer rows.
        centred_left, centred_right = np.linalg.qr(centred_left, "r"), np.linalg.qr(centred_right, "r")
    cross = np.linalg.svd(centred_left @ centred_right.T, compute_uv=False).sum() / scale
    spread = (centred_left**2).sum() / (len(left) - 1) + (centred_right**2).sum() / (len(right) - 1)
    moved = ((left.mean(axis=0) - right.mean(axis=0)) ** 2).sum()
    return float(max(moved + spread - 2 * cross, 0.0))


def cmmd(a: ArrayLike, b: ArrayLike, *, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE) -> float:
    """Squared maximum mean discrepancy of two sets of features under a Gaussian kernel, times 1000.

        CMMD = 1000 (mean k(a, a') + mean k(b, b') - 2 mean k(a, b)),  k(x, y) = exp(-|x - y|^2 / (2 sigma^2))

    Args:
        a, b: Features (n, d) and (m, d), each row normalised to length 1 here; all couples count, an item
            with itself too (the biased estimate, as published).
        sigma: Width of the kernel; 10 as published.
        scale: Factor of the result; 1000 as published.
    Returns:
        A number >= 0; a set against itself is 0.
    Raises:
        DataError: as `frechet_distance`, or a row of zeros.
    Source: Jayasumana et al. (2024), arXiv 2401.09603, with CLIP ViT-L/14-336 image embeddings.
    """
    left, right = (_unit(rows) for rows in _features(a, b, "cmmd"))
    parts = (
        _kernel_mean(left, left, sigma),
        _kernel_mean(right, right, sigma),
        _kernel_mean(left, right, sigma),
    )
    return float(max(scale * (parts[0] + parts[1] - 2 * parts[2]), 0.0))


def _kernel_mean(left: np.ndarray, right: np.ndarray, sigma: float) -> float:
    total = 0.0
    for start in range(0, len(left), _CHUNK):
        part = left[start : start + _CHUNK]
        # Rows have length 1: |x - y|^2 = 2 - 2 x y.
        total += float(np.exp((part @ right.T - 1.0) / sigma**2).sum())
    return total / (len(left) * len(right))


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms == 0).any():
        raise DataError("cmmd: a feature vector is all zeros and has no direction; check the embedder")
    unit: np.ndarray = rows / norms
    return unit


def _features(a: ArrayLike, b: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    shapes = f"features of shapes {left.shape} and {right.shape}"
    if (
        left.ndim != 2
        or right.ndim != 2
        or left.shape[1:] != right.shape[1:]
        or min(len(left), len(right)) < 2
    ):
        raise DataError(f"{name}: {shapes}; expected (n, d) and (m, d) with n and m at least 2")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError(f"{name}: {shapes} hold numbers that are not finite; check the embedder")
    return left, right
