"""What runs next: the rounds, the plan and the commands. Computes nothing on tensors."""
