"""Measurements against named baselines, all in one run.

In: a few options. Out: tables, and figures as plain data. Imports every room but `app`, and only `app` imports it.
"""
