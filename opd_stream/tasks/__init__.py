"""Tasks to train and evaluate on: problems, judges, and pass@k with its intervals."""
