"""The sandbox of generated code: what escapes is tried for real, behind every kind of walls that can be built here.

A planted secret, a planted process, a listening server and a folder outside stand for the machine. Each attempt is a program
that tries to reach one of them, or to use the machine up, or to pass tests that it doesn't pass.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.measure import sandbox
from pipeline.measure.code_tests import Asserts, Cases, read_tests
from pipeline.measure.sandbox import WALLS, Confined, Limits, Walls
from schemas.errors import OpdError

LIMITS = Limits(20, 256)
TESTS = "assert double(21) == 42\nassert double(4) == 8"
FAILS = "def double(x): return 0\n"
SECRET = "opd-planted-secret-4711"
QUICK = {
    *("a file by its path", "a loopback server", "the environment", "every process"),
    *("memory", "threads", "output", "leaves with success", "equals everything", "answers for itself"),
    *("values", "kinds", "exceptions", "objects"),
}
"""What the fast tests try; the others are as quick, but many."""


def cases(table: dict[str, object]) -> list[object]:
    """The names of a table, those that aren't QUICK marked slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in table]


USABLE = {way: sandbox.probe(way) for way in WALLS}


@pytest.fixture(params=WALLS, ids=lambda way: way.name.replace(" ", "-"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Walls:
    """Each kind of walls that holds here."""
    if problem := USABLE[request.param]:
        pytest.skip(f"{request.param.name}: {problem}")
    monkeypatch.setattr(sandbox, "walls", lambda: request.param)
    return request.param


@dataclass
class Outside:
    """What is planted on the machine."""

    folder: Path
    port: int
    connected: list[object]
    victim: "subprocess.Popen[bytes]"

    def filled(self, text: str) -> str:
        """A program with its places, and what every attempt may use."""
        for name, value in {
            "FOLDER": str(self.folder),
            "PORT": str(self.port),
            "VICTIM": str(self.victim.pid),
            "PARENT": str(os.getpid()),
            "REPO": str(Path(__file__).parents[1]),
        }.items():
            text = text.replace(f"@{name}@", value)
        return text


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    monkeypatch.setenv("OPD_SECRET", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    for place in (tmp_path, tmp_path / "secret"):
        place.chmod(0o777)
    connected: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connected.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        victim = subprocess.Popen(["sleep", "60"])
        yield Outside(tmp_path, server.getsockname()[1], connected, victim)
        victim.kill()
        victim.wait()


LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
READS = {
    "a file by its path": "print(open('@FOLDER@/secret').read())",
    "/etc/passwd": "print(open('/etc/passwd').read())",
    "/etc/shadow": "print(open('/etc/shadow').read())",
    "a home": "import os; print([n for n in os.listdir('/root') if n not in ('.pyenv',)] or 1/0)",
    "a symbolic link to it": "import os; os.symlink('@FOLDER@/secret', '/tmp/l'); print(open('/tmp/l').read())",
    "a hard link to it": "import os; os.link('@FOLDER@/secret', '/tmp/l'); print(open('/tmp/l').read())",
    "up from the root": "print(open('/../../../..@FOLDER@/secret').read())",
    "the root of process 1": "print(open('/proc/1/root@FOLDER@/secret').read())",
    "the memory of the parent": "print(len(open('/proc/@PARENT@/mem', 'rb').read(1)))",
    "open files of processes": "import os; print([os.readlink('/proc/self/fd/' + n) for n in os.listdir('/proc/self/fd')])",
    "by libc": LIBC + "fd = libc.open(b'@FOLDER@/secret', 0)\nassert fd >= 0\nimport os; print(os.read(fd, 99))",
    "the old root by a raw mount": LIBC
    + "import os; os.mkdir('/tmp/m')\n"
    + "assert libc.mount(b'proc', b'/tmp/m', b'proc', 0, None) == 0\nprint(os.listdir('/tmp/m'))",
    "out of chroot": "import os; os.mkdir('/tmp/c'); os.chroot('/tmp/c')\n"
    "for _ in range(64): os.chdir('..')\nos.chroot('.'); print(open('@FOLDER@/secret').read())",
    "a new user namespace": LIBC + "assert libc.unshare(0x10000000) == 0; print('in')",
    "a clone in a new user namespace": LIBC
    + "import os, signal\nn = 56 if os.uname().machine == 'x86_64' else 220\n"
    + "pid = libc.syscall(n, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)\nassert pid >= 0; print('in')",
    "the namespace of the parent": LIBC
    + "import os\nassert libc.setns(os.pidfd_open(@PARENT@), 0x40000000) == 0; print('in')",
    "the environment": "import os; print({k: v for k, v in os.environ.items() if k not in ('PWD', 'LC_CTYPE')} or 1/0)",
    "the environment of the parent": "print(open('/proc/@PARENT@/environ').read())",
    "our package": "import sys; sys.path.append('@REPO@'); import pipeline; print(pipeline)",
    "installed packages": "import numpy; print(numpy)",
    "a loopback server": "import socket; print(socket.create_connection(('127.0.0.1', @PORT@), 2))",
    "a datagram": "import socket; print(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)))",
    "a name server": "import socket; print(socket.getaddrinfo('localhost.invalid', 80))",
    "the host by vsock": "import socket; print(socket.socket(40, socket.SOCK_STREAM))",
    "raw sockets": "import socket; print(socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))",
    "root": "import os; os.setuid(0); os.seteuid(0); print(open('/etc/passwd').read())",
    "another user": "import os; os.setresuid(12345, 12345, 12345); print('changed')",
    "a shell": "import subprocess; print(subprocess.run(['/bin/sh', '-c', 'cat @FOLDER@/secret'], check=True))",
    "tracing": LIBC + "import os\nassert libc.ptrace(16, os.getppid(), 0, 0) == 0; print('traced')",
    "the parent's memory by a call": LIBC
    + "import os\nbuffer = ctypes.create_string_buffer(8)\n"
    + "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
    + "v = V(ctypes.addressof(buffer), 8)\n"
    + "assert libc.process_vm_readv(os.getppid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0) > 0; print('read')",
    "a planted process": "import os; os.kill(@VICTIM@, 9); print('killed')",
    "the parent": "import os; os.kill(@PARENT@, 0); print('there')",
    "every process": "import os\nassert os.getpid() <= 8  # else this is no namespace of its own\nos.kill(-1, 9)\n"
    "print('killed') if os.path.exists('@FOLDER@') else 1/0",
    "a device": "import os; os.mknod('/tmp/d', 0o60666, os.makedev(8, 0)); print(open('/tmp/d', 'rb').read(9))",
    "a new name of the host": "import ctypes\nassert ctypes.CDLL(None).sethostname(b'owned', 5) == 0; print('owned')",
    "higher limits": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1)); print('raised')",
    "shared memory that no limit counts": LIBC + "assert libc.shmget(0, 1 << 30, 0o1600) >= 0; print('made')",
    "a file in memory that no limit counts": "import os; print(os.memfd_create('x'))",
}
"""Programs that print only if they reach what they shouldn't."""


@pytest.mark.parametrize("attempt", cases(READS))
def test_nothing_outside_is_reached(way: Walls, outside: Outside, attempt: str) -> None:
    ended = Confined("program", outside.filled(READS[attempt]), LIMITS).end()
    assert ended.output == "" and ended.why, ended
    assert not ended.why.startswith(("timed out", "SyntaxError", "NameError")), ended
    assert SECRET not in ended.why and not outside.connected and outside.victim.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["write", "inherited"])
def test_nothing_outside_is_changed(way: Walls, outside: Outside, name: str) -> None:
    """No file is written outside; files that the parent has open aren't there."""
    kept = (outside.folder / "open").open("w")
    os.set_inheritable(kept.fileno(), True)
    text = {
        "write": "import os\nfor p in ('@FOLDER@/new', '/new', '/usr/new', '/etc/new', '/lib/new', '@REPO@/new', '/dev/new'):\n"
        "    try: open(p, 'w').write('x'); print('wrote', p)\n    except OSError: pass\n",
        "inherited": "import os\nfor fd in range(3, 1024):\n    try: os.write(fd, b'owned'); print('wrote', fd)\n"
        "    except OSError: pass\n",
    }[name]
    ended = Confined("program", outside.filled(text), LIMITS).end()
    assert ended == sandbox.Ended("", ""), ended
    kept.close()
    assert (outside.folder / "open").read_text() == "" and {p.name for p in outside.folder.iterdir()} == {
        "open",
        "secret",
    }


BOMBS = {
    "an endless loop": ("while True: pass", "timed out after 1.5 s"),
    "a long sleep": ("import time; time.sleep(1e6)", "timed out after 1.5 s"),
    "heedless of signals": (
        "import signal\nfor n in set(range(1, 32)) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "timed out after 1.5 s",
    ),
    "forks": ("import os\nfor _ in range(500): os.fork()\nprint('many')", "BlockingIOError"),
    "threads": (
        "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "RuntimeError: can't start new thread",
    ),
    "memory": ("x = bytearray(1 << 40)", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "output": ("while True: print('x' * 100000)", "OSError: [Errno 27] File too large"),
    "a large file": (
        "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "OSError: [Errno 27] File too large",
    ),
    "many files": (
        "for n in range(1000): open(f'/tmp/{n}', 'wb').write(bytes(1 << 22))",
        "OSError: [Errno 28] No space left",
    ),
    "open files": ("x = [open('/dev/null') for _ in range(999)]", "OSError: [Errno 24] Too many open files"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "the stack": (
        "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return f([*map(f, [x])])\nf(1)",
        "ended by SIGSEGV",
    ),
    "an abort": ("import os; os.abort()", "ended by SIGABRT"),
    "an exit": ("import sys; sys.exit(3)", "exited with status 3"),
}


@pytest.mark.parametrize("bomb", cases(BOMBS))
def test_nothing_is_used_up(way: Walls, bomb: str) -> None:
    text, why = BOMBS[bomb]
    before = time.monotonic()
    ended = Confined("program", text, Limits(1.5 if "timed" in why else 20, 256)).end()
    assert why in ended.why, ended
    assert time.monotonic() - before < 20 and len(ended.output) <= sandbox.WRITTEN_MB << 20


@pytest.mark.parametrize("ends", [pytest.param("by itself", marks=pytest.mark.slow), "by force"])
def test_no_process_outlives_the_sandbox(way: Walls, ends: str) -> None:
    """A daemon (fork, setsid, fork) and its name among the machine's processes."""
    mark = f"opd-daemon-{os.getpid()}-{time.time_ns()}"
    text = (
        f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(30)', '{mark}'])\n"
        f"    os._exit(0)\ntime.sleep({0.5 if ends == 'by itself' else 30})\n"
    )
    confined = Confined("program", text, Limits(2, 256))
    seen = False
    until = time.monotonic() + 1.8
    while not seen and time.monotonic() < until:
        seen = bool(named(mark))
        time.sleep(0.02)
    ended = confined.end()
    assert seen and (not ended.why if ends == "by itself" else ended.why.startswith("timed out")), ended
    until = time.monotonic() + 5
    while named(mark) and time.monotonic() < until:
        time.sleep(0.02)
    assert not named(mark)


def named(mark: str) -> list[str]:
    """Processes with this as their last argument."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with contextlib.suppress(OSError):
                line = (place / "cmdline").read_bytes().split(b"\0")
                found += [place.name] if line[-2:-1] == [mark.encode()] else []
    return found


SPAWNS = """
import os, sys, time
from pipeline.measure import sandbox
[way] = [way for way in sandbox.WALLS if way.name == sys.argv[1]]
sandbox.Confined("program", "import os, sys; os.execv(sys.executable, "
    "[sys.executable, '-I', '-S', '-c', 'import time; time.sleep(30)', '%s'])" % sys.argv[2], sandbox.Limits(60, 256), way=way)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_sandbox_ends_with_us(way: Walls) -> None:
    """Killed, we can end nothing; the kernel does."""
    mark = f"opd-orphan-{os.getpid()}-{time.time_ns()}"
    ours = subprocess.Popen([sys.executable, "-c", SPAWNS, way.name, mark], cwd=Path(__file__).parents[1])
    until = time.monotonic() + 20
    while not named(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert named(mark)
    ours.kill()
    ours.wait()
    until = time.monotonic() + 5
    while named(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not named(mark)


CHEATS = {
    "leaves with success": ("import sys; sys.exit(0)", "SystemExit"),
    "leaves at once": ("import os; os._exit(0)", "it ended before the tests did"),
    "leaves when called": ("import os\ndef double(x): os._exit(0)", "it ended before the tests did"),
    "leaves by an exception that tests expect": (
        "def double(x): raise AssertionError('passed')",
        "RuntimeError: AssertionError",
    ),
    "equals everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef double(x): return Any()",
        "AssertionError",
    ),
    "is an integer that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef double(x): return Any(0)",
        "AssertionError",
    ),
    "changes built-ins": (
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.__build_class__ = None\ndef double(x): return True",
        "AssertionError",
    ),
    "meddles with the frames that call it": (
        "import ctypes, sys\ndef double(x):\n    for frame in [sys._getframe(i) for i in range(4)]: frame.f_locals.clear()\n"
        "    return 0",
        "AssertionError",
    ),
    "prints a verdict": (
        'import os\nfor fd in range(9):\n    try: os.write(fd, b\'{"passed": 2, "why": ""}\\n\')\n    except OSError: pass\n'
        + FAILS,
        "",
    ),
    "answers for itself": (
        "import os\nfor fd in range(3, 12):\n"
        '    try: os.write(fd, b\'{"value": ["list", []], "changed": []}\\n\' * 9)\n    except OSError: pass\nos._exit(0)',
        "",
    ),
    "answers nonsense": (
        "import os\nfor fd in range(3, 12):\n    try: os.write(fd, b'[[[[\\n' * 9)\n    except OSError: pass\nos._exit(0)",
        "it ended before the tests did",
    ),
    "reads the tests": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, str) and '42' in o and 'double(21)' in o]\n"
        "def double(x): return {21: 42, 4: 8}[x] if found else 0",
        "AssertionError",
    ),
    "reads the pipe": (
        "import os\ndef double(x):\n    seen = b''\n    for fd in range(3, 12):\n        try:\n"
        "            os.set_blocking(fd, False)\n"
        "            seen += os.read(fd, 9999)\n        except OSError: pass\n    return 42 if b'42' in seen else 0",
        "AssertionError",
    ),
    "asks the tests for more": (
        "import sys\ndef double(x):\n    peer = next(f.f_locals['self'] for f in [sys._getframe(i) for i in range(1, 4)]"
        " if 'self' in f.f_locals)\n    return peer.ask('__getattr__', 0, '__globals__')",
        "",
    ),
    "replaces the module of the tests": (
        "import sys\nsys.modules['math'] = None\nlen = abs = sorted = lambda *_: 42\ndef double(x): return -1",
        "AssertionError",
    ),
    "never answers": ("def double(x):\n    while True: pass", "timed out after 2 s"),
    "uses memory when called": ("def double(x): return bytearray(1 << 40)", "MemoryError"),
    "gives endlessly": ("def double(x):\n    return 'x' * (1 << 27)", ""),
    "does not define it": ("x = 1", "NameError: name 'double' is not defined"),
    "isn't Python": ("def double(x) return", "SyntaxError"),
    "waits for input": ("input()", "EOFError"),
}


@pytest.mark.parametrize("cheat", cases(CHEATS))
def test_no_tests_are_passed_by_other_means(way: Walls, cheat: str) -> None:
    text, why = CHEATS[cheat]
    verdict = Asserts(TESTS).judge(text, Limits(2 if "timed" in why else 20, 256))
    assert not verdict.passed and verdict.why and why in verdict.why, verdict


def test_what_equals_everything_would_pass_in_one_process() -> None:
    """The reference for the cheats: in the tests' own interpreter this one passes."""
    scope: dict[str, object] = {}
    exec(CHEATS["equals everything"][0] + "\n" + TESTS, scope)


HONEST = {
    "values": (
        "def double(x): return 2 * x",
        "assert double(21) == 42\nassert double(-1.5) == -3.0\nassert double('a') == 'aa'",
    ),
    "kinds": (
        "from fractions import Fraction\nfrom decimal import Decimal\nfrom collections import Counter, deque, namedtuple\n"
        "def give(n): return [(1,), [1], {1}, frozenset({1}), {1: (2,)}, b'\\x00', 1j, None, Fraction(1, 3), Decimal('0.1'),\n"
        "    Counter('aab'), deque([1]), namedtuple('P', 'a b')(1, 2), 10**5000, float('inf'), '\\ud800', True][n]",
        "from fractions import Fraction\nfrom decimal import Decimal\nfrom collections import deque\n"
        "wanted = [(1,), [1], {1}, frozenset({1}), {1: (2,)}, b'\\x00', 1j, None, Fraction(1, 3), Decimal('0.1'),\n"
        "    {'a': 2, 'b': 1}, deque([1]), (1, 2), 10**5000, float('inf'), '\\ud800', True]\n"
        "for n, value in enumerate(wanted):\n    assert give(n) == value, n\n"
        "assert give(16) is True and type(give(0)) is tuple",
    ),
    "nearly": (
        "def third(): return 1 / 3",
        "assert math.isclose(third(), 0.3333, abs_tol=1e-3)\nassert abs(third() - .3333) < 1e-3",
    ),
    "exceptions": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
        "try:\n    f(-1)\nexcept ValueError as error:\n"
        "    assert 'negative' in str(error)\nelse:\n    assert False\nassert f(1) == 1",
    ),
    "objects": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)\n"
        "    def __eq__(self, other): return self.items == other.items",
        "s, t = Stack(), Stack()\ns.push(3)\nassert len(s) == 1 and s.items == [3] and isinstance(s, Stack) and s != t\n"
        "assert s.pop() == 3\nassert s == t\nassert not isinstance(3, Stack)",
    ),
    "generators and callbacks": (
        "def twice(f, xs):\n    for x in xs: yield f(f(x))\ndef adder(n): return lambda x: x + n",
        "assert list(twice(lambda x: x + 1, [1, 2])) == [3, 4]\nassert adder(2)(3) == 5\n"
        "assert sorted(twice(abs, {-1})) == [1]",
    ),
    "changes its argument": (
        "def order(xs): xs.sort()",
        "xs = [3, 1, 2]\nassert order(xs) is None\nassert xs == [1, 2, 3]",
    ),
    "dataclasses and annotations": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "def shift(p: P, by: int) -> P: return P(p.x + by)",
        "assert shift(P(1), 2) == P(3)\nassert shift(P(1), 2).x == 3",
    ),
    "a built-in's name": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    "a built-in of the tests": ("def len(x): return 3\ndef pair(): return [1, 2]", "assert len(pair()) == 2"),
    "a main guard and prints": (
        "print('hello')\ndef f(): return 1\nif __name__ == '__main__':\n    f(1, 2)",
        "assert f() == 1",
    ),
}


@pytest.mark.parametrize("name", cases(HONEST))
def test_honest_programs_pass(name: str) -> None:
    program, tests = HONEST[name]
    scope: dict[str, object] = {"__name__": __name__, "math": math}
    if name != "a built-in of the tests":
        exec(program + "\n" + tests, scope)  # Python's own verdict
    verdict = Asserts(tests).judge(program, LIMITS)
    assert verdict.passed and verdict.why.startswith("passed "), verdict


@pytest.mark.parametrize(
    ("program", "passes", "why"),
    [
        ("print(int(input()) * 2)", True, "passed 2 cases"),
        ("print(int(input()) * 2, end=' \\n\\n')", True, "passed 2 cases"),
        ("import sys; print(*(2 * int(x) for x in sys.stdin)); sys.exit(0)", True, "passed 2 cases"),
        ("if __name__ == '__main__': print(int(input()) + 2)", False, "case 2: printed '5', expected '6'"),
        ("print(4)\nexit(1)", False, "case 1: exited with status 1"),
        ("print(4)\nraise KeyError('x')", False, "case 1: KeyError: 'x'"),
        ("print(input)", False, "case 1: printed '<built-in function input>', expected '4'"),
        pytest.param(
            *("import time; print(4, flush=True); time.sleep(99)", False, "case 1: timed out after 2 s"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_cases(program: str, passes: bool, why: str) -> None:
    verdict = Cases((("2\n", "4\n"), ("3\n", "6\n"))).judge(program, Limits(2 if "timed" in why else 20, 256))
    assert (verdict.passed, verdict.why) == (passes, why)


@pytest.mark.parametrize(
    ("reference", "tests"),
    [
        ("assert f(1) == 2", Asserts("assert f(1) == 2")),
        ('["assert f(1) == 2", "assert f(2) == 3"]', Asserts("assert f(1) == 2\nassert f(2) == 3")),
        (str(["assert f(1) == 'a'"]), Asserts("assert f(1) == 'a'")),
        ('[{"input": "1\\n", "output": "2\\n"}]', Cases((("1\n", "2\n"),))),
        ('{"inputs": ["1", "2"], "outputs": ["2", "3"]}', Cases((("1", "2"), ("2", "3")))),
        ('{"1": "2"}', Cases((("1", "2"),))),
        ('{"input": "1", "output": "2"}', Cases((("1", "2"),))),
        ('{"inputs": "1", "outputs": ["2"]}', Cases((("1", "2"),))),
        ('{"inputs": "1", "outputs": 2}', None),
        ('{"inputs": ["1"], "outputs": ["2"], "difficulty": "hard"}', Cases((("1", "2"),))),
        ('{"inputs": ["1", "2"], "outputs": ["2"]}', None),
        ('[{"input": "1", "output": "2", "testtype": "functional"}]', None),
        (
            "def check(candidate):\n    assert candidate(1) == 2",
            Asserts("def check(candidate):\n    assert candidate(1) == 2\ncheck(f)\n"),
        ),
        ("it returns 3", None),
        ("f(1) == 2", None),
        ("42", None),
        ("[]", None),
        ("{}", None),
    ],
)
def test_references_of_tests(reference: str, tests: object) -> None:
    assert read_tests(reference, entry_point="f") == tests


def test_tests_that_are_not_reached_prove_nothing() -> None:
    """HumanEval's `check` without a call of it."""
    assert not Asserts("def check(candidate):\n    assert candidate(1) == 2").judge("def f(x): return 2", LIMITS).passed


def test_without_walls_no_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    sandbox.walls.cache_clear()
    with pytest.raises(OpdError, match=r"install bubblewrap .* tried bwrap .*: no(t root| bwrap); .*unshare .*"):
        Confined("program", "print(1)", LIMITS)
    sandbox.walls.cache_clear()


def test_walls_that_let_processes_multiply_are_not_used() -> None:
    """In a user namespace that root makes the kernel counts no processes."""
    if os.geteuid() != 0:
        pytest.skip("not root: namespaces of other users count")
    for way in WALLS:
        if not way.other_user:
            why = USABLE[way] or "isn't limited"
            assert any(told in why for told in ("isn't limited", "not permitted", f"no {way.program}"))


AS_ANOTHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pipeline.measure.sandbox import WALLS, Limits, probe, walls
from pipeline.measure.code_tests import Asserts
problems = {way.name: probe(way) for way in WALLS}
import pipeline.measure.sandbox as sandbox
verdicts = {}
for way in WALLS:
    if problems[way.name] is None:
        sandbox.walls = lambda: way
        verdicts[way.name] = [Asserts("assert f(2) == 4").judge(text, Limits(20, 256)).passed for text in
            ("def f(x): return 2 * x", "def f(x): return 0", "import os; os._exit(0)")]
print(json.dumps([problems, verdicts]))
"""


@pytest.mark.slow
def test_as_another_user_than_root(tmp_path: Path) -> None:
    """User namespaces, by bwrap and by unshare, with the system's Python: root's own may be closed to others."""
    python = Path("/usr/bin/python3.11")
    if os.geteuid() != 0 or not python.exists() or not shutil.which("setpriv"):
        pytest.skip("takes root, /usr/bin/python3.11 and setpriv")
    here = Path(__file__).parents[1]
    folder = Path("/var/tmp") / f"opd-sandbox-{os.getpid()}"
    try:
        for name in (
            "pipeline/__init__.py",
            "pipeline/measure/__init__.py",
            "schemas/__init__.py",
            "schemas/errors.py",
            "schemas/secrets.py",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((here / name).read_bytes())
        for name in ("sandbox", "sandboxed", "code_tests"):
            shutil.copy(here / f"pipeline/measure/{name}.py", folder / "pipeline/measure")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        found = subprocess.run(
            [*nobody, python, "-B", "-c", AS_ANOTHER, folder],
            capture_output=True,
            text=True,
            timeout=120,
            cwd="/",
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert found.returncode == 0, found.stderr
    problems, verdicts = json.loads(found.stdout)
    if not verdicts:
        pytest.skip(f"no user namespaces here: {problems}")
    assert all(verdict == [True, False, False] for verdict in verdicts.values()), (problems, verdicts)
    assert len(verdicts) == 2 or any(problems[way.name] for way in WALLS if not way.other_user)
