"""Scalar and trellis-coded quantizers, their integer rate tables, and the quantizer record."""
