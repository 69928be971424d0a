"""`dudi ablate`: a grid of methods x settings x seeds, resumable, with one report.

methods.py has the methods, grid.py the grid and its cells, shared.py what cells have in common
(warm starts, teachers, their responses), cell.py trains and evaluates one, workers.py runs them in
processes, tuning.py chooses learning rates on the validation split, statistics.py, results.py and
report.py say what came out.
"""
