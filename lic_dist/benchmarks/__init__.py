"""Measurements beside named baselines, each in one run.

In: a few options. Out: tables and figures as plain data. Imports every room but `app`; nothing imports it but `app`.
"""
