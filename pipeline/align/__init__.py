"""Two tokenizers on the same bytes: token bytes, aligned units, shared vocabulary, the student's view of scores."""
