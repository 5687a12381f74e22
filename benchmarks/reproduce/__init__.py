"""Published tables, run through the project's own stream and learner. `make reproduce` writes docs/results.md."""
