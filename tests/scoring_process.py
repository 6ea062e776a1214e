"""For kill tests: imports everything once, then for each line on stdin forks a process that scores all shards of a run.

Prints the child's process id, waits for it, prints its wait status. Nothing of torch runs before a fork.
"""

import os
import sys
from pathlib import Path

import torch  # noqa: F401 - imported before the fork, once
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from stages import scores


def main(config: str, shards: int) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                for shard in range(shards):
                    scores.main("round-0", shard, Path(config), None)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
