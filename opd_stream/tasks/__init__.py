"""Tasks a student can be trained and graded on without leaving the machine."""
