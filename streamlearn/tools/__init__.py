"""Tools around the daemon: publish samples, read tables, predict, report, and the demo."""
