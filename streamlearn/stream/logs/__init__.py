"""The logs that records come from: Kafka, SQLite, memory."""
