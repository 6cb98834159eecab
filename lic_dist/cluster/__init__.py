"""Use Ray from outside: jobs through its Jobs API, finetuning under Ray Train.

In: an experiment file, or an `Experiment`. Out: a job's id and state. Imports `config`, `engine` and `training`.
"""
