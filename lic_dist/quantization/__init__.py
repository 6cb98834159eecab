"""Quantizers: rate tables, trellises, the exact search on CPU and GPU, and the record that says all of one.

In: scaled latents, levels of scales, a `QuantizerRecord`. Out: integers k, the decoder's levels, bits. Exact: the same
k on every device. Imports the ground.
"""
