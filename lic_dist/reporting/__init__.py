"""Reporting: result files to curves, BD-rates and gains, tables, charts, and one page.

In: result files, ours or CompressAI's. Out: `report.html`, `results.md`, charts as PNG and SVG, files for other
programs. Imports what `evaluation` does, and `evaluation`.
"""
