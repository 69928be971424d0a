"""Whether a kernel multiplies strides in 32 bits, where `row * stride` would overflow.

What comes from a stride is followed through Triton's intermediate representation (TTIR), one
operation a line, until it is widened; no product of 32 bits may take it.
"""

from __future__ import annotations

import re

VALUE = r"%[\w.$-]+(?:#\d+)?"
STRIDE = re.compile(r"%(\w*(?:stride|rank|rows)): i32\b")  # rows and a rank are strides, too
OPERATION = re.compile(r"(%[\w.$-]+)(?::\d+)? = (\w+\.\w+)(.*)")
CARRIED = re.compile(rf"({VALUE}) = ({VALUE})")
LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
NARROW = re.compile(r"i32>?$")
SAME = (  # operations whose result is as wide as what they take
    *("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans"),
    *("arith.addi", "arith.subi", "arith.muli", "arith.divsi", "arith.remsi"),
    *("arith.minsi", "arith.maxsi", "arith.select"),
)


def narrow_strides(ttir: str) -> list[str]:
    """The arguments that enter a product of 32 bits, or a call that can't be followed."""
    origins: dict[str, set[str]] = {}  # by value, the strides that it comes from
    wrong: set[str] = set()
    for line in LOCATION.sub("", ttir).splitlines():
        if "tt.func" in line:
            origins = {f"%{name}": {name} for name in STRIDE.findall(line)}
            continue
        found = OPERATION.search(line)
        result, operation, rest = found.groups() if found else ("", "", line)
        own = set().union(*(origins.get(value, set()) for value in re.findall(VALUE, rest)))
        if operation == "scf.for":
            _carry(result, rest, origins)
        elif "tt.call" in line:
            wrong |= own
        elif operation in SAME and NARROW.search(rest.strip()):
            origins[result] = own
            wrong |= own if operation == "arith.muli" else set()
    return sorted(wrong)


def _carry(result: str, rest: str, origins: dict[str, set[str]]) -> None:
    """What a loop starts with goes on to its own values and its results."""
    pairs = CARRIED.findall(rest)
    for inner, initial in pairs:
        origins[inner] = origins.get(initial, set())
    carried = [initial for _, initial in pairs[1:]]  # after the loop's counter
    for index, initial in enumerate(carried):
        origins[f"{result}#{index}" if len(carried) > 1 else result] = origins.get(initial, set())
