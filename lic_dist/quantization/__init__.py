"""Quantizers: rate tables, trellises, the exact search on CPU and GPU, and the record that describes a quantizer.

In: residuals, scale levels, a `QuantizerRecord`. Out: integers k, the decoder's levels, bits. k is the same on every
device. Imports the ground.
"""
