"""Forward passes: sampling, scoring, their engines, and the audit of what was scored."""
