"""The types that all layers share: errors, labels, samples, positions, tasks, deliveries, progress, states."""
