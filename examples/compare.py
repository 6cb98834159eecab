"""Compare result files: python examples/compare.py ANCHOR FILE ...

Files are those of `lic-dist evaluate`, or CompressAI's JSON; ANCHOR is a curve's name in the report, such as "base sq".
"""

import sys
from pathlib import Path

import lic_dist


def main(anchor_name: str, *files: str) -> None:
    curves = {curve.name: curve for curve in lic_dist.read_curves([Path(file) for file in files])}
    if anchor_name not in curves:
        raise SystemExit(f"no curve is named {anchor_name!r}; there are {', '.join(map(repr, curves))}")
    anchor = curves.pop(anchor_name)
    for name, curve in curves.items():
        rates = ", ".join(f"{one.bpp:.3f} bpp {one.psnr:.2f} dB" for one in curve.figures)
        try:
            print(f"{name}: BD-rate {lic_dist.bd_rate(anchor, curve):+.2f} % against {anchor_name}; {rates}")
        except lic_dist.LicError as error:  # of fewer than four points, say
            print(f"{name}: no BD-rate ({error.message}); {rates}")


if __name__ == "__main__":
    main(*sys.argv[1:])
