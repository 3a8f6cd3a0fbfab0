"""One file an experiment: what was run, on what, for how long, and what came out.

Each runs as `python -m train.configs.<name>` and resumes when it is run again.
"""
