"""For fault tests: imports everything once, then for each line on stdin forks a process that runs one stage with a fault.

A line is JSON: `stage`, `arguments`, `fault` or none, and `at`. With `kill` and `full` that is the number of the change to
files, from 1, at which it comes: an open for writing, a rename, a removal, a link, a folder, anything below the working
directory; `kill` ends the process as SIGKILL does, `full` raises ENOSPC. With `kill inside` and `full inside` it is the size
in bytes that no file grows beyond: the kernel ends the process or refuses the write in the middle of it, whatever code writes.
Prints the exit status and how many changes there were. Nothing of torch or polars runs before a fork.
"""

import errno
import importlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from schemas.errors import OpdError
from stages.run import console
from stages.tools.cli import MODULES
from stages.tools.cli import STAGES as NAMES

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink"}
STAGES: dict[str, Any] = {name: importlib.import_module(MODULES[name]) for name in NAMES}


def main() -> None:
    """Serve until stdin ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os._exit(run(writer, **asked))
        os.close(writer)
        with os.fdopen(reader) as told:
            counted = told.read()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), counted or 0, flush=True)


def run(writer: int, stage: str, arguments: list[Any], fault: str | None, at: int) -> int:
    """In the child: 0 when the stage ended well, 2 after one line, 1 after a traceback, 9 when it was killed.

    What it said is in `output`, unless it was killed.
    """
    torch.set_num_threads(1)
    here, count = str(Path.cwd()), 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not isinstance(values[0], str | Path):
            return
        if event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = os.path.abspath(values[1] if event == "os.symlink" else values[0])  # noqa: PTH100 - leaves links as they are
        if not path.startswith(here) or path.endswith((".lock", "output")):
            return
        count += 1
        if fault == "kill" and count == at:
            os._exit(9)
        if fault == "full" and count >= at and event in ("open", "os.mkdir", "os.symlink"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    said = sys.stdout = sys.stderr = io.StringIO()
    console.console.file = console.out.file = said
    Path("output").unlink(missing_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault and fault.endswith("inside"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault == "kill inside" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, most))
    sys.addaudithook(hook)
    try:
        STAGES[stage].main(*(Path(one) if str(one).endswith(".yaml") else one for one in arguments))
    except OpdError as error:
        print(error)
        return 2
    except OSError as error:
        # As stages.run.console does it.
        print(error)
        return 2 if error.errno else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        os.write(writer, str(count).encode())
        Path("output").write_text(said.getvalue())
    return 0


if __name__ == "__main__":
    print("ready", flush=True)
    main()
