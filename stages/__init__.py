"""One thin entry per Snakemake rule and user command: parse, call, write."""

import gc
import sys

if sys.argv[:1] == ["-m"]:
    # A stage's command, `python -m stages.<name>`: none of the million objects that importing torch and transformers makes is
    # garbage, and to look through them again and again takes a second. `console.run` turns collection on.
    gc.disable()
