"""Where the samples of a run are answered: here, or by workers elsewhere.

`executor.py` is the seam: a run hands units of work to an executor and takes an outcome a sample back,
in whatever order. `units.py` says what these are, `worker.py` turns one into the other, and is the same
wherever it runs. `local.py` and `on_ray.py` are executors; `pool.py` and `actor.py` are what the latter
and its workers do. None of them writes: the run does (`harness.runner`).
"""
