"""Measures what was learned and what was forgotten: probes of held-out samples, and the accuracy matrix."""
