"""Minimal aligned units of one response by brute force, written from the formula (design, section 3).

Tokens of both sides are the nodes of a graph, tokens that overlap in bytes are connected, and the connected components
in byte order are the units. A component is comparable if both sides have tokens in it and it ends within the longest
prefix on which student, teacher and response agree. Everything from the first component that isn't, a sampled stop
included, is one masked unit, which ends where the student's bytes end. A token without bytes overlaps nothing: the
student's (a special token within the response) is comparable to nothing, the teacher's (the space that some tokenizers
put in front of a text) goes with the token after it.
"""

from itertools import accumulate, takewhile

Unit = tuple[str, int, int, int, int, int, int]
"""(kind, s_start, s_len, t_start, t_len, byte_start, byte_end)"""
Node = tuple[str, int]
"""(side, index of the token)"""


def reference_units(student: list[bytes], teacher: list[bytes], response: bytes, stop: bool) -> list[Unit]:
    """Units of a response; `student` is without the final stop, `stop` says whether one was sampled."""
    s_bytes, t_bytes = b"".join(student), b"".join(teacher)
    agreed = agreed_bytes(s_bytes, t_bytes, response)
    units: list[Unit] = []
    s_done = t_done = done = 0
    for members, start, end in components(student, teacher):
        s_len, t_len = (sum(side == wanted for side, _ in members) for wanted in "st")
        if not s_len or not t_len or end > agreed:
            break
        units.append(("1:1" if s_len == t_len == 1 else "n:m", s_done, s_len, t_done, t_len, start, end))
        s_done, t_done, done = s_done + s_len, t_done + t_len, end
    s_left, t_left = len(student) - s_done, len(teacher) - t_done
    if s_left or t_left:
        units.append(("masked", s_done, s_left + stop, t_done, t_left, done, len(s_bytes)))
    elif stop:
        units.append(("stop", s_done, 1, t_done, 0, done, done))
    return units


def agreed_bytes(*texts: bytes) -> int:
    """Length of the longest prefix that all share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def components(student: list[bytes], teacher: list[bytes]) -> list[tuple[list[Node], int, int]]:
    """Connected components of the overlap graph in byte order: their tokens, first byte and end."""
    span: dict[Node, tuple[int, int]] = {}
    for side, tokens in (("s", student), ("t", teacher)):
        ends = list(accumulate(map(len, tokens)))
        span |= {(side, i): (end - len(token), end) for i, (token, end) in enumerate(zip(tokens, ends, strict=True))}
    parent = {node: node for node in span}

    def root(node: Node) -> Node:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    first_at: dict[int, Node] = {}  # the token that holds a byte; a second one overlaps it
    for node, (start, end) in span.items():
        for byte in range(start, end):
            parent[root(node)] = root(first_at.setdefault(byte, node))
    for i, token in enumerate(teacher[:-1]):
        if not token:
            parent[root(("t", i))] = root(("t", i + 1))
    members: dict[Node, list[Node]] = {}
    for node in span:
        members.setdefault(root(node), []).append(node)
    found = [(group, min(span[n][0] for n in group), max(span[n][1] for n in group)) for group in members.values()]
    return sorted(found, key=lambda component: component[1:])
