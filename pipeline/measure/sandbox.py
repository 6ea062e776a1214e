"""A sandbox for generated code: processes of their own, which see nothing of the machine and have limits.

By bubblewrap (`bwrap`) or else util-linux's `unshare`, as root or not: new namespaces of users (as root another user instead),
processes, network, IPC, host name and mounts. The root holds Python and the system's libraries, read-only, `/dev/null` and a
small `/tmp`; there is no /proc, no network and no environment. `pipeline.measure.sandboxed` then gives up the rest from within.
"""

import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from schemas.errors import OpdError, excerpt

INSIDE = Path(__file__).with_name("sandboxed.py")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
PROCESSES = 8
"""That a sandbox may have, threads counted."""
WRITTEN_MB = 8
"""That a file may hold, the output too."""
SCRATCH_MB = 32
"""That all files in its `/tmp` may hold."""
OPEN_FILES = 64
STARTED_SECONDS = 20
"""A sandbox that doesn't start in this time isn't usable."""


@dataclass(frozen=True)
class Limits:
    """Of a sandbox: seconds on the clock, and memory of each process in MB."""

    seconds: float
    memory_mb: int


@dataclass(frozen=True)
class Ended:
    """How a confined process ended: `why` in words, empty when all was well, and what it wrote."""

    why: str
    output: str


@dataclass(frozen=True)
class Walls:
    """A way to confine a process: which program does it, and whether by a user namespace or, as root, by another user."""

    program: Literal["bwrap", "unshare"]
    other_user: bool

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.program} ({'another user' if self.other_user else 'a user namespace'})"

    def command(self, python: Sequence[str]) -> list[str]:
        """What runs a command line within them. Raises OpdError when the program isn't there."""
        found = shutil.which(self.program)
        if found is None:
            raise OpdError(f"no {self.program}")
        if self.program == "unshare":
            setpriv = shutil.which("setpriv")
            if setpriv is None:
                raise OpdError("no setpriv")
            kinds = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
            user = [] if self.other_user else ["--user", "--map-root-user"]
            return [setpriv, "--pdeathsig", "KILL", found, *user, *kinds, *python]
        kept = ["SETUID", "SETGID", "SETPCAP"] if self.other_user else []
        user = [] if self.other_user else ["--unshare-user"]
        shown = [
            part
            for path, target in binds()
            for part in (
                *(
                    str(part)
                    for above in reversed(PurePath(path).parents[:-1])
                    for part in ("--perms", "755", "--dir", above)
                ),
                *(("--symlink", target, path) if target else ("--ro-bind", path, path)),
            )
        ]
        return [
            *(found, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", *user),
            *("--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"),
            *(part for capability in kept for part in ("--cap-add", f"CAP_{capability}")),
            *(*shown, "--perms", "755", "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"),
            *("--perms", "1777", "--size", str(SCRATCH_MB << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"),  # noqa: S108
            *("--remount-ro", "/", "--", *python),
        ]


WALLS = tuple(Walls(program, other) for program in ("bwrap", "unshare") for other in (True, False))
"""Ways to confine, best first."""


@functools.cache
def walls() -> Walls:
    """The first of WALLS that holds here: a process within it has shown that it sees nothing and that its limits hold.

    Raises:
        OpdError: none does. Code is then not run at all.
    """
    told = []
    for way in WALLS:
        problem = probe(way)
        if problem is None:
            return way
        told.append(f"{way.name}: {problem}")
    raise OpdError(
        "`evaluate.scorer: code` runs generated code only in a sandbox, and none can be made here: install bubblewrap "
        "(apt-get install bubblewrap) on Linux with user namespaces, or as root with CAP_SYS_ADMIN; tried "
        + "; ".join(told)
    )


PROBE = """
import json, os, socket
try:
    interfaces = [name for _, name in socket.if_nameindex()]
except PermissionError:
    interfaces = []  # no socket at all
forked = 0
try:
    while forked < 64:
        if os.fork() == 0:
            os.read(0, 1) or os._exit(0)
            os._exit(0)
        forked += 1
except OSError:
    pass
print(json.dumps({"interfaces": interfaces, "pid": os.getpid(), "forked": forked, "root": sorted(os.listdir("/"))}))
"""


def probe(way: Walls) -> str | None:
    """Why a way to confine can't be used here; None when it can."""
    if not hasattr(os, "memfd_create") or (way.other_user and os.geteuid() != 0):
        return "not root" if sys.platform == "linux" else "not Linux"
    reads, writes = os.pipe()  # what the probe's processes wait for
    try:
        ended = Confined("program", PROBE, Limits(STARTED_SECONDS, 256), way=way, stdin=reads).end()
    except OpdError as error:
        return str(error)
    finally:
        os.close(reads)
        os.close(writes)
    if ended.why:
        return ended.why
    seen = json.loads(ended.output)
    shut = seen["pid"] <= 4 and {"lo"}.issuperset(seen["interfaces"]) and TOP.issuperset(seen["root"])
    if seen["forked"] >= PROCESSES:
        return f"the number of processes isn't limited ({seen['forked']} were started)"
    return None if shut else f"what a process in it sees isn't confined: {seen}"


class Confined:
    """A process in the sandbox: `role` of `pipeline.measure.sandboxed`, over a text.

    Args:
        stdin: its input, or a file descriptor of it.
        channel: file descriptors, (reads, writes), by which the candidate and its tests ask each other.
    Raises:
        OpdError: the way to confine isn't there.
    """

    def __init__(
        self,
        role: Literal["program", "candidate", "tests"],
        text: str,
        limits: Limits,
        way: Walls | None = None,
        stdin: bytes | int = b"",
        channel: tuple[int, int] | None = None,
    ) -> None:
        way = way or walls()
        self._limits, self._deadline = limits, time.monotonic() + limits.seconds
        self._files = [_memory(text.encode("utf-8", "replace")), _memory(), _memory()]
        job, self._out, self._err = self._files
        if isinstance(stdin, bytes):
            self._files.append(stdin := _memory(stdin))
        settings = {
            "role": role,
            "job": job,
            "channel": channel,
            "binds": binds() if way.program == "unshare" else None,
            "scratch": SCRATCH_MB << 20,
            # A user of its own for each, so that no two count each other's processes or may signal each other.
            "uid": (1 << 30) + secrets.randbelow(1 << 30) if way.other_user else None,
            "limits": {
                "RLIMIT_AS": limits.memory_mb << 20,
                "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
                "RLIMIT_FSIZE": WRITTEN_MB << 20,
                "RLIMIT_NPROC": PROCESSES,
                "RLIMIT_NOFILE": OPEN_FILES,
                "RLIMIT_CORE": 0,
            },
        }
        python = [_python(), "-I", "-S", "-B", "-X", "utf8", "-c", INSIDE.read_text(), json.dumps(settings)]
        try:
            self._process = subprocess.Popen(
                way.command(python),
                stdin=stdin,
                stdout=self._out,
                stderr=self._err,
                pass_fds=(job, *(channel or ())),
                env={},
                cwd="/",
                start_new_session=True,  # no signal of our terminal, and no way to it
            )
        except BaseException:
            self._close()
            raise

    def end(self, at_once: bool = False) -> Ended:
        """Wait for its end, and end all that it started; when its time is up, or `at_once`, by force."""
        seconds = self._limits.seconds
        try:
            status = self._process.wait(0 if at_once else max(0.0, self._deadline - time.monotonic()))
            why = _told(status, self._text(self._err))
        except subprocess.TimeoutExpired:
            why = f"timed out after {seconds:g} s"
        finally:
            self._process.kill()  # its namespace, and all that is in it, goes with it
            self._process.wait()
        output = self._text(self._out)
        self._close()
        return Ended(why, output)

    def _text(self, file: int) -> str:
        return os.pread(file, WRITTEN_MB << 20, 0).decode("utf-8", "replace")

    def _close(self) -> None:
        for file in self._files:
            os.close(file)


def _told(status: int, errors: str) -> str:
    """An exit in words: the last line of a traceback if there is one."""
    if status == 0:
        return ""
    last = (errors.strip().splitlines() or [""])[-1].strip()
    number = -status if status < 0 else status - 128
    if number in [known.value for known in signal.Signals]:
        name = signal.Signals(number).name
        return f"ended by {name}" + (" (processor time)" if name == "SIGXCPU" else "")
    return excerpt(last, 200) if last else f"exited with status {status}"


def _memory(content: bytes = b"") -> int:
    """A file in memory, at its start."""
    file = os.memfd_create("opd")
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _python() -> str:
    """The interpreter itself, without a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def binds() -> tuple[tuple[str, str], ...]:
    """What is shown of the machine, read-only: (path, "") or (path, target) of a symbolic link."""
    wanted = [sys.base_prefix, sys.base_exec_prefix, _python(), *LIBRARIES]
    found: list[tuple[str, str]] = []
    for path in sorted(dict.fromkeys(wanted)):
        covered = any(path.startswith(f"{above}/") and not target for above, target in found)
        if not covered and Path(path).exists():
            found.append((path, str(Path(path).readlink()) if Path(path).is_symlink() else ""))
    return tuple(found)


TOP = {"dev", "tmp", *(path.split("/")[1] for path in (sys.base_prefix, sys.base_exec_prefix, _python(), *LIBRARIES))}
"""What its root may hold."""
