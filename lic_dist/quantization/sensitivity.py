"""What an error of a latent costs the picture: the decoder's sensitivity, or the cost of errors that rounding makes.

The sensitivity S_c is the squared change of the picture for a unit change of a latent. It holds for small changes of
any sign. A decoder that takes small latents for noise hardly moves for them, and still loses what rounding them to zero
takes away: there errors cost several times S_c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sensitivities(
    g_s: Callable[[Tensor], Tensor],
    y_hat: Tensor,
    probes: int,
    generator: torch.Generator,
    batch: int = 4,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return S_c = diag(J^T J) of g_s, averaged over positions and images, and its standard error: float64 [M] each.

    y_hat float32 [B, M, h, w], decoded `batch` images at a time; the picture's values are in [0, 1], summed over pixels
    and colours. Hutchinson's estimator: the squared gradient of v^T g_s(y_hat), v ~ N(0, I), with `probes` draws an
    image (one backward pass each). The standard error is that of the mean over images, or over probes for one image.
    `generator` must be on y_hat's device. ValueError for a single draw, or where a gradient is not finite.
    """
    if y_hat.dim() != 4 or probes < 1 or len(y_hat) * probes < 2:
        raise ValueError("y_hat is [B, M, h, w], and B * probes >= 2 for a standard error")
    draws = []  # one [images of the batch, probes, M] a batch
    for part in torch.split(y_hat.detach(), batch):
        latent = part.clone(memory_format=torch.channels_last).requires_grad_(True)
        with torch.enable_grad():
            x_hat = g_s(latent)
        squares = []
        for probe in range(probes):
            v = torch.randn(x_hat.shape, generator=generator, device=x_hat.device, dtype=x_hat.dtype)
            with torch.enable_grad():
                along = (x_hat * v).sum()  # for the gradient of more than a number torch imports sympy, a second
            (gradient,) = torch.autograd.grad(along, latent, retain_graph=probe + 1 < probes)
            squares.append(gradient.double().square().mean(dim=(2, 3)).cpu())
        draws.append(torch.stack(squares, dim=1))
    by_draw = torch.cat(draws).numpy()
    if not np.isfinite(by_draw).all():
        raise ValueError("the decoder's gradient is not finite")
    independent = by_draw.mean(axis=1) if len(by_draw) > 1 else by_draw[0]
    return independent.mean(axis=0), independent.std(axis=0, ddof=1) / np.sqrt(len(independent))


def error_costs(
    g_s: Callable[[Tensor], Tensor], y_hat: Tensor, y: Tensor, x: Tensor, batch: int = 4
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return W_c, what a squared error of a latent of channel c adds to the squared error of the picture, averaged over
    the errors e = y_hat - y, and its standard error over images: float64 [M] each.

    y_hat and y float32 [B, M, h, w], B >= 2, as g_s takes them; x float32 [B, 3, H, W] in [0, 1]. With D the squared
    error of g_s(y_hat) summed over pixels and colours, W_c = E[dD/dy_hat e] / (2 E[e^2]): S_c where g_s is linear,
    g_s(y) is x, and errors are independent. It is 0 where errors help, or where there are none. One backward pass an
    image.
    ValueError for a single image, or where a gradient is not finite.
    """
    if y_hat.dim() != 4 or len(y_hat) < 2:
        raise ValueError("y_hat is [B, M, h, w], and B >= 2 for a standard error")
    products, squares = [], []
    for part, exact, picture in zip(*(torch.split(one.detach(), batch) for one in (y_hat, y, x)), strict=True):
        latent = part.clone(memory_format=torch.channels_last).requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((g_s(latent) - picture).square().sum(), latent)
        error = (part - exact).double()
        products.append((gradient * error).sum(dim=(2, 3)).cpu() / 2)
        squares.append(error.square().sum(dim=(2, 3)).cpu())
    product, square = torch.cat(products).numpy(), torch.cat(squares).numpy()
    if not np.isfinite(product).all():
        raise ValueError("the decoder's gradient is not finite")
    least = np.maximum(square.mean(axis=0), np.finfo(np.float64).tiny)
    costs = product.mean(axis=0) / least
    error_of = (product - costs * square).std(axis=0, ddof=1) / (least * np.sqrt(len(product)))
    return np.maximum(costs, 0), error_of
