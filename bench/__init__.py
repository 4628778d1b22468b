"""Benchmarks of condlr_ext: every operation is described once, its results are checked, then it is timed.

Run from a checkout by `python -m bench`:

- registry.py defines operations, problems and providers; cases/ holds them.
- session.py measures rows within a time limit by runner.py and timing.py, on the device of machine.py or cuda.py, after
  prepare.py has built and tested what a CUDA run needs.
- records.py keeps the measurements as JSON lines; tables.py, markdown.py, compare.py, revisions.py, plot.py and tune.py
  read them.
"""
