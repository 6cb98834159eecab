"""Training under torch DDP: a base model end to end, and the decoder side from a cache. A killed job resumes exactly.

In: an `Experiment` and a store. Out: a checkpoint that carries its quantizer, and states to resume from. Imports
`building` and what it imports.
"""
