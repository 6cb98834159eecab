"""A cache from an experiment: scan, plan, calibration, then shards through an engine.

In: an `Experiment`. Out: a store with its groups, records, a `BuildReport`. Imports `config`, `data`, `models`,
`quantization`, `cache`, `codec` and `engine`.
"""
