"""Quantize latents of your own, of any model with Gaussian entropy parameters: python examples/quantize_latents.py"""

import numpy as np

import lic_dist
from lic_dist.quantization.adaptation import adaptation_rounds, gaussian_record
from lic_dist.quantization.rates import level_index
from lic_dist.quantization.trellis import trellis

CHANNELS, POSITIONS = 64, 1024
WEIGHT, LMBDA = 0.02, 0.013  # squared gain of the decoder for each channel; price of distortion


def main() -> None:
    # Stand-ins for what your model gives: r = y - means and its scales, a lane a channel, [lanes, steps].
    generator = np.random.default_rng(0)
    scales = np.exp(generator.normal(-0.5, 1, (CHANNELS, POSITIONS))).astype(np.float32)
    r = generator.standard_normal(scales.shape, np.float32) * scales
    level = level_index(scales)  # rows of the rate tables

    weights = np.full(CHANNELS, WEIGHT)
    for name, machine, step, strength in (("sq", "sq", 1.0, 1.0), ("tcq", "tcq8", 0.66, 0.15)):
        record = gaussian_record(name, step, weights, lmbda=LMBDA, lambda_scale=strength, trellis=trellis(machine))
        *_, record = adaptation_rounds(record, [(r, level)], rounds=3)  # tables of what the quantizer really sends
        quantizer = lic_dist.Quantizer(record)
        k = quantizer.quantize(r, level)  # int16 [lanes, steps]: what is sent
        error = np.square(r - quantizer.dequantize(k, level)).mean()  # y_hat = means + that
        bits = float(quantizer.bits(k, level).sum()) / k.size
        print(f"{name}: {bits:.3f} bit a latent, squared error {error:.4f}")


if __name__ == "__main__":
    main()
