"""Measure speed, as ratios to a plain torch loop in the same run. `make bench` prints them and writes results.json."""
