"""What two processes of tests compile for each other before their first test: half of the search's and coder's loops.

Where numba's cache on disk holds them already this takes half a second.
"""

from __future__ import annotations

import numpy as np

from lic_dist.codec import rans
from lic_dist.quantization.adaptation import gaussian_record
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.trellis import CODE16, CODE32, CODE64, ECM8, SCALAR, VVC4
from lic_dist.quantization.viterbi import machine_loops


def compile_half(number: int) -> None:
    """Compile the first or the second half, 0 or 1."""
    r, level = np.zeros((64, 32), np.float32), np.zeros((64, 32), np.uint8)
    weights = np.full(32, 0.01, np.float32)
    if number == 0:
        for name, machine in (("tcq", ECM8), ("rdoq", SCALAR)):
            Quantizer(gaussian_record(name, 1.0, weights, 0.013, 0.3, machine)).quantize(r, level)
    else:
        for machine in (CODE64, CODE32, CODE16, VVC4):
            machine_loops(machine)
    interleaved = number == 1
    tables = gaussian_record("sq", 1.0, weights, 0.013).y_tables
    stream = rans.encode(level.astype(np.int16), level.astype(np.int32), tables, interleaved)
    for levels in (level, level.astype(np.int32)):
        rans.decode(stream, levels, tables, SCALAR, interleaved)
