"""What one asks of the tool itself, beside the stages: `opd <command>`."""
