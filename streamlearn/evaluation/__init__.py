"""What was learned and what was forgotten: held-out probes, and the accuracy matrix that they fill."""
