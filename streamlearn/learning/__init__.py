"""What learns: the learner, its update, and what they need."""
