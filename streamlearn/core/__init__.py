"""What every other package shares; nothing in here imports another package of streamlearn."""
