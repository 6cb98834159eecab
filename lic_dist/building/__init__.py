"""Build a cache from an experiment: scan, plan, calibrate, then write shards through an engine.

In: an `Experiment`. Out: a store with its groups, quantizer records, a `BuildReport`. Imports `config`, `data`,
`models`, `quantization`, `cache`, `codec` and `engine`.
"""
