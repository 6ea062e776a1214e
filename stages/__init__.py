"""One thin entry per Snakemake rule and user command: parse, call, write."""
