"""The adversarial term of a distortion: a discriminator of patches, trained beside the decoder and against it.

A cache fixes the rate, and a decoder of those bits may give up fidelity for pictures that look like photographs
(Kirmemis and Tekalp 2021, arXiv 2104.14836; the trade-off is that of Blau and Michaeli 2019, arXiv 1901.07821). It
minimizes 255^2 MSE + w A, for several w a curve; A is the hinge loss of a discriminator of patches (Lim and Ye 2017,
arXiv 1705.02894; Isola et al. 2017, arXiv 1611.07004):

    decoder          A = -mean D(x_hat)
    discriminator    mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))

D sees pictures alone, not y_hat: perception is the distance of the distributions of x and x_hat, content is held by the
distortion, and every family has the same discriminator. It sees of them what decoders lose, each pixel less the mean
around it: in 60 steps its loss fell from 2 to 1.3, on whole pictures to 1.99. It is bounded by spectral normalization
(Miyato et al. 2018, arXiv 1802.05957), which costs no second derivative. One power iteration follows each step,
whatever the parts and ranks that the batch is taken in: both sides' gradients are those of the global batch at the
weights before the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu, pad, relu
from torch.nn.utils.parametrizations import spectral_norm

from lic_dist.training.distributed import Ranks

WIDTHS = (32, 64, 128)  # channels of the layers that halve the sides
SLOPE = 0.2
AROUND = 5  # pixels a side of the mean that is taken off
CONTRAST, GAIN = 8.0, 8.0  # of what is left, and of the scores, so that normalized layers reach the hinge
BETAS = 0.0, 0.9  # of Adam: no momentum, since what is learnt from moves (Miyato et al. 2018)
FASTER = 4.0  # the discriminator's learning rate over the decoder's largest (Heusel et al. 2017, arXiv 1706.08500)


class PatchDiscriminator(nn.Module):
    """Scores of patches: pictures float32 [B, 3, H, W] in [0, 1] -> float32 [B, 1, H/8, W/8], each of 58x58 pixels.

    314,000 parameters, 7 kMAC a pixel. In evaluation mode, as `Adversary` has it, a call changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((3, *WIDTHS), WIDTHS, strict=False)
        halving = [nn.Conv2d(inner, outer, 4, stride=2, padding=1) for inner, outer in sizes]
        last = WIDTHS[-1]
        layers = [*halving, nn.Conv2d(last, last, 3, padding=1), nn.Conv2d(last, 1, 3, padding=1)]
        for layer in layers:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        mean = avg_pool2d(pad(x, 4 * (AROUND // 2,), mode="reflect"), AROUND, 1)
        found = CONTRAST * (x - mean)
        for layer in self.layers[:-1]:
            found = leaky_relu(layer(found), SLOPE)
        scores: Tensor = GAIN * self.layers[-1](found)
        return scores

    @torch.no_grad()
    def iterate(self) -> None:
        """Bring the estimates of the largest singular values one power iteration nearer to those of the weights."""
        self.train()
        for layer in self.layers:
            layer.weight  # noqa: B018  # reading it iterates
        self.eval()


class Adversary:
    """The discriminator of a job, its optimizer, and `weight`, that of the term in units of 255^2 MSE.

    Its first weights follow from the seed; all later ones from `state_dict`, the weights of the decoder and the batch.
    """

    def __init__(self, weight: float, lr: float, seed: int, device: torch.device) -> None:
        self.weight = weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PatchDiscriminator().to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=FASTER * lr, betas=BETAS)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def term(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return the decoder's loss of a part of its batch, a scalar, and keep the pictures until `gradients`."""
        self.seen.append((x, x_hat.detach()))
        self.network.requires_grad_(False)
        return -self.weight * self.network(x_hat).mean()

    def gradients(self, ranks: Ranks) -> float:
        """Compute the discriminator's gradients over the pictures kept on all ranks, each rank's parts of one size.

        Returns its loss, which is not finite on any rank where the loss or a gradient is not on one.
        """
        self.network.requires_grad_(True)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=ranks.device)
        for x, x_hat in self.seen:
            real, made = self.network(torch.cat([x, x_hat])).chunk(2)
            loss = (relu(1 - real).mean() + relu(1 + made).mean()) / len(self.seen)
            loss.backward()
            total += loss.detach()
        self.seen = []
        values = torch.cat([total.reshape(1), *(one.grad.flatten() for one in self.parameters)])
        ranks.average(values)
        for one, value in zip(self.parameters, values[1:].split([one.numel() for one in self.parameters]), strict=True):
            one.grad = value.view_as(one)
        return float(values[0] + 0 * values.sum())

    def step(self) -> None:
        """Step along the gradients, and iterate the spectral norms once."""
        self.optimizer.step()
        self.network.iterate()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, singular vectors and moments, as plain data and tensors."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
