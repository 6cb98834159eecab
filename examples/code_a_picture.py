"""Code a picture to bytes and back: python examples/code_a_picture.py PICTURE [MODEL [QUANTIZER]]"""

import sys

import numpy as np
from PIL import Image

import lic_dist


def main(picture: str, model: str = "base-0.013", quantizer: str = "tcq32") -> None:
    codec = lic_dist.open_codec(model, quantizer)  # a checkpoint's path or a shipped name; a quantizer that it carries
    image = np.asarray(Image.open(picture).convert("RGB"))  # uint8 [H, W, 3]
    encoded = codec.encode(image)
    decoded = lic_dist.open_decoder(encoded.data, model).decode(encoded.data)  # the file says which quantizer
    assert np.array_equal(decoded, codec.picture(encoded))  # bit for bit what the encoder expected

    error = np.square(image.astype(float) - decoded).mean()
    bpp = 8 * len(encoded.data) / image[..., 0].size
    print(f"{len(encoded.data)} bytes, {bpp:.4f} bpp, {10 * np.log10(255**2 / error):.2f} dB")


if __name__ == "__main__":
    main(*sys.argv[1:])
