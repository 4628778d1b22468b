"""Benchmarks: every op described once, its providers checked against float64, then timed in turn: `python -m bench`.

registry.py says what an op, a provider and a row are; linear_algebra.py, layers.py, steps.py, training.py, inference.py
and scaling.py describe the ops, operations.py lists them; runner.py measures rows on a device (machine.py, cuda.py) and
records.py keeps them as JSON lines; tables.py, compare.py, revisions.py and plot.py read these; command.py is the
command line.
"""
