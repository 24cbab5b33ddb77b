"""What a compiled step needs of a device, read from XLA's own text: memory, and bytes that the devices exchange."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from mlcm_jax.training.compile_steps import StepMemory

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BITS = re.compile(r"\D+(\d+)")  # bf16, s32, f8e4m3fn: the first number is the width of an element

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_SCALAR = re.compile(r"[su]\d+\[\]")


class Instruction(NamedTuple):
    """One line of a computation; rest: what follows the opening bracket, operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str


def read_buffer_assignment(text: str) -> StepMemory:
    """The memory of a device from the buffer assignment that ``xla_dump_to`` writes for a TPU.

    Of its memories only the main one counts; constants, which are some kilobytes, do not.
    """
    arguments = temporaries = outputs = 0
    for size, what in re.findall(r"^allocation \d+: size (\d+), (.*)", text, re.MULTILINE):
        if re.match(r"color [1-9]", what):  # memory inside the chip
            continue
        if "parameter" in what:
            arguments += int(size)
        elif "preallocated-temp" in what:
            temporaries += int(size)
        elif "maybe-live-out" in what:
            outputs += int(size)
    return StepMemory(arguments, temporaries, arguments + temporaries + outputs)


def collective_bytes(hlo: str, traced_trips: float = 1.0) -> dict[str, float]:
    """Bytes that one execution moves through each kind of collective on a device, from the text of a compiled module.

    An operation counts with the whole array: what a gather returns, what a reduction takes. One in a loop counts as
    often as the loop turns (from 0, as XLA's and jax's own do; all branches of a conditional count).
    traced_trips: turns of a loop whose number is not in the program.
    """
    computations = dict(_computations(hlo))
    times = _executions(computations, traced_trips)
    channels: dict[str, tuple[str, float, int]] = {}
    for name, instructions in computations.items():
        types = {i.name: i.type for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-done")
            if kind not in COLLECTIVES:
                continue
            moved = _bytes(i.type)
            if kind == "reduce-scatter" and i.opcode == kind:
                moved = sum(_bytes(types[operand]) for operand in _operands(i.rest))
            if name.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter is a fusion of this name
                kind = "reduce-scatter"
            # A TPU spreads one gather over several fusions, which repeat it with its channel; it starts in the
            # outermost of them.
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = channel[1] if channel else f"{name}/{i.name}"
            before = channels.get(key, (kind, times(name), moved))
            channels[key] = (kind, min(before[1], times(name)), moved)
    totals: dict[str, float] = defaultdict(float)
    for kind, count, moved in channels.values():
        totals[kind] += count * moved
    return dict(sorted(totals.items()))


def _computations(hlo: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Instructions by computation; the entry's name is ""."""
    instructions: list[Instruction] = []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            instructions = []
            yield ("" if header[1] else header[2]), instructions
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(*found.groups()))


def _executions(computations: dict[str, list[Instruction]], traced_trips: float):
    """A function: how often a computation runs, by its name."""
    callers: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for caller, instructions in computations.items():
        for i in instructions:
            if i.opcode in ("async-update", "async-done"):  # their start has called it
                continue
            turns = _trips(i, computations, traced_trips) if i.opcode == "while" else 1.0
            listed = [name.strip().lstrip("%") for names in _CALLED_LISTS.findall(i.rest) for name in names.split(",")]
            for called in (*_CALLED.findall(i.rest), *listed):
                callers[called].append((caller, turns))

    @functools.cache
    def times(name: str) -> float:
        return 1.0 if name == "" else sum(turns * times(caller) for caller, turns in callers[name])

    return times


def _trips(loop: Instruction, computations: dict[str, list[Instruction]], traced_trips: float) -> float:
    """Turns of a loop: what XLA says, or else the one number that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return float(known[1])
    called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.rest))
    condition, body = computations[called["condition"]], computations[called["body"]]
    bounds = [_number(i) for i in condition if i.opcode == "constant" and _SCALAR.match(i.type)]
    return math.ceil(bounds[0] / _stride(condition, body)) if len(bounds) == 1 else traced_trips


def _stride(condition: list[Instruction], body: list[Instruction]) -> float:
    """What a turn adds to the counter that the condition compares: 2 where the TPU compiler has unrolled by two."""
    counter = next((i for i in condition if i.opcode == "get-tuple-element" and _SCALAR.match(i.type)), None)
    if counter is None or not body or body[-1].opcode != "tuple":
        return 1.0
    by_name = {i.name: i for i in body}
    index = re.search(r"index=(\d+)", counter.rest)
    result = by_name[_operands(body[-1].rest)[int(index[1]) if index else 0]]
    added = [_number(by_name[o]) for o in _operands(result.rest) if by_name[o].opcode == "constant"]
    return added[0] if result.opcode == "add" and added else 1.0


def _number(constant: Instruction) -> float:
    return float(constant.rest.split(")")[0])


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _bytes(type_: str) -> int:
    """Bytes of an array or of all arrays of a tuple."""
    total = 0
    for dtype, dims in _ARRAY.findall(type_):
        elements = 1
        for dim in dims.split(",") if dims else ():
            elements *= int(dim)
        bits = BITS.match(dtype)
        total += elements * (int(bits[1]) if bits else 8) // 8  # pred has a byte
    return total
