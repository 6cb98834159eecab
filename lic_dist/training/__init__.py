"""Training: a base model end to end, and the decoder side from a cache, under torch DDP, exact over any kill.

In: an `Experiment` and a store. Out: a checkpoint that carries its quantizer, states to go on from. Imports what
`building` does, and `building`.
"""
