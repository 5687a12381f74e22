"""The stream: logs (Kafka, embedded, memory), what their records mean, and batches as a function of the log alone."""
