"""What runs inside the sandbox, by the standard library alone: `pipeline.measure.sandbox` hands its text to a Python there.

A process gives up what it could do else, then has one of three roles:

- `program`: runs a text as a program; its input and output are those of the process.
- `candidate`: runs a text as a module, then answers what the tests ask of it.
- `tests`: runs tests; the names that they use and don't define are the candidate's, which is asked over a pipe.

Tests and candidate are two processes in two sandboxes, and what crosses between them is plain data: the candidate sees what it
is called with, never what is expected, and what it gives is compared where none of its code is. So it can't pass by leaving
early, by printing, by objects that equal everything, or by changing the interpreter. An object of a class of its own stays
where it is, and the tests hold a `Remote` of it, which equals no plain data and does no arithmetic with it. What methods of
such an object return is the candidate's word, and so is whether two of them are equal.
"""

import ast
import builtins
import collections
import ctypes
import decimal
import fractions
import importlib
import json
import os
import resource
import struct
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LINE = 1 << 24
"""Bytes that one message may have."""
MODULES = "math re itertools functools collections random string json copy datetime heapq bisect operator typing"
"""What tests may use without importing it."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 24, 38, 22
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""What seccomp calls a machine, and its column of DENIED."""
CLONE = (56, 220)
CLONE3 = 435
NEW_NAMESPACES = 0x7E020000
DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "socket": (41, 198),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "memfd_create": (319, 279),  # this and the next three hold memory that no limit of a process counts
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
}
"""System calls that no answer needs: other processes, the network, namespaces, memory outside the limits, the kernel."""


def main(settings: dict[str, Any]) -> None:
    """Give up what isn't needed, as `settings` has it, then do what `settings["role"]` says."""
    if settings["binds"] is not None:
        enclose(settings["binds"], settings["scratch"])
        if child := os.fork():  # the namespace's first process, which ends it, is none of the candidate's
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    with os.fdopen(settings["job"], encoding="utf-8") as job:
        text = job.read()
    give_up(settings)
    role, channel = settings["role"], settings["channel"]
    if role == "program":
        exec(compile(text, "response.py", "exec"), vars(_module("__main__")))  # noqa: S102
    elif role == "candidate":
        Candidate(text, *channel).serve()
    else:
        verdict = judged(text, *channel)
        os.write(1, json.dumps(verdict).encode())


def enclose(binds: Sequence[tuple[str, str]], scratch: int) -> None:
    """Make a root of nothing but `binds`, read-only, `/dev/null` and a `/tmp` of `scratch` bytes, in a new mount namespace.

    Args:
        binds: (path, "") of what to show at its own path, or (path, target) of a symbolic link.
    """
    root = Path("/tmp")  # noqa: S108 - in a mount namespace of its own
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path, target in [*binds, ("/dev/null", "")]:
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        if target:
            place.symlink_to(target)
            continue
        if Path(path).is_dir():
            place.mkdir()
        else:
            place.touch()
        _mount(path, place, None, MS_BIND | MS_REC)
        if path != "/dev/null":
            kept = os.statvfs(place).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            _mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)
    (root / "tmp").mkdir()
    _mount("tmpfs", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={scratch}")
    _mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    library = ctypes.CDLL(None, use_errno=True)
    for done in (library.syscall(_pivot_root(), b".", b"."), library.umount2(b".", 2)):
        if done:
            raise OSError(ctypes.get_errno(), "no new root")
    os.chdir("/tmp")  # noqa: S108


def _mount(source: str | None, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [text.encode() if text is not None else None for text in (source, str(target), kind)]
    if ctypes.CDLL(None, use_errno=True).mount(*given, ctypes.c_ulong(flags), data.encode() if data else None):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def _pivot_root() -> int:
    return DENIED["pivot_root"][ARCHITECTURES[os.uname().machine][1]]


def give_up(settings: dict[str, Any]) -> None:
    """Drop capabilities and, as root, the user; set limits; let no system call of DENIED through."""
    library = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
    library.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    machine = os.uname().machine
    if machine in ARCHITECTURES:
        code = b"".join(struct.pack("HBBI", *line) for line in _filter(*ARCHITECTURES[machine]))
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
        if library.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
            raise OSError(ctypes.get_errno(), "seccomp")


def _filter(architecture: int, column: int) -> list[tuple[int, int, int, int]]:
    """A BPF program: EPERM for DENIED and for clones into new namespaces, ENOSYS for clone3, whose flags it can't see."""
    load, equal, at_least, any_of, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x32
    lines += [(equal, 0, 1, CLONE3), (give, 0, 0, unknown)]
    for numbers in DENIED.values():
        lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    lines += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_of, 0, 1, NEW_NAMESPACES), (give, 0, 0, refuse)]
    return [*lines, (give, 0, 0, allow)]


class Gone(BaseException):
    """The other side is no longer there, or makes no sense; tests can't catch it by accident."""


class Peer:
    """One side of the two that ask each other to do things. While it waits for an answer it answers what it is asked itself."""

    def __init__(self, reads: int, writes: int, does: dict[str, Callable[..., Any]]) -> None:
        self._in, self._out = os.fdopen(reads, "rb"), os.fdopen(writes, "wb")
        self._does = does
        self._mine: list[Any] = []

    def ask(self, what: str, *args: Any, **named: Any) -> Any:
        """What the other side's operation gives, or the exception that it ends with. Raises Gone."""
        self._send(
            {"ask": what, "args": [self.pack(a) for a in args], "named": {k: self.pack(v) for k, v in named.items()}}
        )
        try:
            while "ask" in (message := self._receive()):
                self._answer(message)
            if "raised" in message:
                raise _exception(str(message["raised"]), str(message["text"]))
            for argument, changed in zip(args, message["changed"], strict=True):
                if changed is not None:
                    _become(argument, self.unpack(changed))
            return self.unpack(message["value"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            if "raised" in message:
                raise
            raise Gone from error

    def serve(self) -> None:
        """Answer until the other side has gone."""
        while True:
            self._answer(self._receive())

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            args = [self.unpack(a) for a in message["args"]]
            value = self._does[message["ask"]](*args, **{k: self.unpack(v) for k, v in message["named"].items()})
            changed = [self.pack(a) if type(a) in (list, dict, set) else None for a in args]
            reply = {"value": self.pack(value), "changed": changed}
        except Gone:
            raise
        except BaseException as error:  # also what a program leaves by
            reply = {"raised": type(error).__name__, "text": str(error)[:300]}
        self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except OSError as error:
            raise Gone from error

    def _receive(self) -> dict[str, Any]:
        line = self._in.readline(LINE)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise Gone from error
        if not line.endswith(b"\n") or not isinstance(message, dict):
            raise Gone
        return message

    def pack(self, value: Any) -> Any:  # noqa: PLR0911 - a kind each
        """JSON of plain data, its type kept, but not that of a subclass; of anything else a number that stands for it."""
        if value is None or isinstance(value, bool | str):
            return value if value is None or isinstance(value, bool) else str.__str__(value)
        if isinstance(value, int):
            return ["int", int.__format__(value, "x")]
        if isinstance(value, float):
            return float.__float__(value)
        for kind in LEAVES:
            if isinstance(value, LEAVES[kind][0]):
                return [kind, LEAVES[kind][1](value)]
        for kind, of in CONTAINERS.items():
            if isinstance(value, of):
                return [kind, [self.pack(item) for item in of.__iter__(value)]]
        if isinstance(value, dict):
            return ["dict", [[self.pack(k), self.pack(v)] for k, v in dict.items(value)]]
        if type(value) is Remote:
            return ["yours", _number(value)]
        self._mine.append(value)
        return ["mine", len(self._mine) - 1]

    def unpack(self, packed: Any) -> Any:
        """What `pack` of the other side stands for."""
        if not isinstance(packed, list):
            return packed
        kind, value = packed
        if kind == "int":
            return int(value, 16)
        if kind in LEAVES:
            return LEAVES[kind][2](value)
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.unpack(item) for item in value)
        if kind == "dict":
            return {self.unpack(k): self.unpack(v) for k, v in value}
        return Remote(self, value) if kind == "mine" else self._mine[value]


LEAVES: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "complex": (complex, complex.__repr__, complex),
    "decimal": (decimal.Decimal, decimal.Decimal.__str__, decimal.Decimal),
    "fraction": (fractions.Fraction, fractions.Fraction.__str__, fractions.Fraction),
}
CONTAINERS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}


class Remote:
    """An object of the other side. What is done with it is done there."""

    __slots__ = ("_number", "_peer")
    __hash__ = object.__hash__

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __eq__(self, other: object) -> Any:
        return type(other) is Remote and bool(object.__getattribute__(self, "_peer").ask("__eq__", self, other))


def _number(remote: Remote) -> int:
    return int(object.__getattribute__(remote, "_number"))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "__call__": lambda function, *args, **named: function(*args, **named),
    "__getattr__": getattr,
    "__setattr__": setattr,
    "__getitem__": lambda value, key: value[key],
    "__setitem__": lambda value, key, item: value.__setitem__(key, item),
    "__len__": len,
    "__iter__": iter,
    "__next__": next,
    "__bool__": bool,
    "__str__": str,
    "__repr__": repr,
    "__int__": int,
    "__float__": float,
    "__instancecheck__": lambda kind, value: isinstance(value, kind),
    "__eq__": lambda a, b: bool(a == b),
}
"""What tests can do with an object of the candidate's; nothing tells it a value that it is compared with."""


def _forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *args, **named: object.__getattribute__(self, "_peer").ask(name, self, *args, **named)


for _name in OPERATIONS.keys() - {"__eq__"}:
    setattr(Remote, _name, _forwarded(_name))


def _become(mine: Any, other: Any) -> None:
    """Change a list, dict or set that was passed to what the call made of it."""
    if type(mine) is list and type(other) is list:
        mine[:] = other
    elif type(mine) is type(other) and type(mine) in (dict, set):
        mine.clear()
        mine.update(other)


def _exception(name: str, text: str) -> Exception:
    """The built-in exception of that name; another is a RuntimeError that tells it."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (AssertionError, UnicodeDecodeError):
        try:
            return kind(text)
        except TypeError:
            pass
    return RuntimeError(f"{name}: {text}" if text else name)


class Candidate(Peer):
    """Runs a program as a module, and then does with it what the tests ask for."""

    def __init__(self, text: str, reads: int, writes: int) -> None:
        super().__init__(reads, writes, OPERATIONS | {"run": self._run, "name": self._name})
        self._text = text
        self._module = _module("response")

    def _run(self) -> list[str]:
        """Run it; the names that it then has."""
        exec(compile(self._text, "response.py", "exec"), vars(self._module))  # noqa: S102
        return [
            name
            for name, value in vars(self._module).items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)
        ]

    def _name(self, name: str) -> Any:
        return vars(self._module)[name]


def judged(text: str, reads: int, writes: int) -> dict[str, Any]:
    """Run tests on the candidate at the other end.

    A built-in's name is the candidate's only where the tests use no other name of it, so `len` stays `len`.

    Returns:
        {"passed": how many asserts were passed, "why": why not all, ""} or {"gone": true} when the candidate went.
    """
    passed = []
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    peer = Peer(reads, writes, {"__call__": OPERATIONS["__call__"]})
    try:
        names = used & set(peer.ask("run"))
        own = {name for name in names if not hasattr(builtins, name)}
        scope: dict[str, Any] = {name: importlib.import_module(name) for name in MODULES.split()}
        scope |= {name: peer.ask("name", name) for name in own or names}
        scope |= {"__name__": "tests", "_passed_": lambda: passed.append(1)}
        counted = ast.fix_missing_locations(_Counting().visit(tree))
        exec(compile(counted, "tests", "exec"), scope)  # noqa: S102
    except Gone:
        return {"gone": True}
    except BaseException as error:  # tests may end by anything
        return {"passed": len(passed), "why": _where(text, error)}
    return {"passed": len(passed), "why": "" if passed else "no assert was reached"}


class _Counting(ast.NodeTransformer):
    """Counts asserts that are passed."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [node, ast.parse("_passed_()").body[0]]


def _where(text: str, error: BaseException) -> str:
    """What a test ended with, and its line."""
    line, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests":
            line = text.splitlines()[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{told}, at {line}" if line else told


def _module(name: str) -> types.ModuleType:
    """An empty module for a program, which finds what Python's own start would have given it."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    sys.argv = ["response.py"]
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
