"""The trainer: streaming batches, objectives, the student's forward pass, the loop and its checkpoints."""
