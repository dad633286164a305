"""A teacher with another tokenizer: its scores, brought to the tokens of the student."""
