"""Continual-learning methods: mathematics on tensors, in four slots."""
