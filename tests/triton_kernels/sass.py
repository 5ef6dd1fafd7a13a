"""Reads of uniform registers that no path to them has set, in the machine code of a kernel: wrong code of an assembler.

`test_compilation` looks for them in all that is compiled for Hopper. Only what uses uniform registers is understood.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
ZERO = 63  # URZ
NONE = frozenset()
LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
PREDICATE = re.compile(r"@!?U?P[T\d]+\s+")
REGISTER = re.compile(r"UR(\d+)(\.64)?")
SETS_UNIFORM = ("U", "S2UR", "R2UR", "CS2UR", "VOTEU", "REDUX", "LDCU")  # how the names of these begin


class Instruction(NamedTuple):
    text: str
    reads: frozenset[int]
    sets: frozenset[int]


def disassembled(cubin):
    """The text of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVDISASM, "-c", "-ndf", file.name]  # without its analysis: the same text, sooner
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reads_of_nothing(text):
    """The instructions that read a uniform register which is not set on any path, each with the registers' numbers."""
    instructions, labels = _parsed(text)
    set_before = [None] * len(instructions)  # registers that some path has set
    set_before[0] = NONE
    pending = [0]
    while pending:
        i = pending.pop()
        after = set_before[i] | instructions[i].sets
        for successor in _successors(i, instructions, labels):
            known = set_before[successor]
            if known is None or not after <= known:
                set_before[successor] = after | (known or NONE)
                pending.append(successor)
    found = []
    for instruction, known in zip(instructions, set_before, strict=True):
        if known is not None and (missing := instruction.reads - known - {ZERO}):
            found.append((instruction.text, sorted(missing)))
    return found


def _parsed(text):
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(_instruction(instruction[1]))
    return instructions, labels


def _instruction(text):
    if "UR" not in text:
        return Instruction(text, NONE, NONE)
    name, _, rest = PREDICATE.sub("", text).partition(" ")
    operands = [operand.strip() for operand in re.split(r",(?![^\[]*\])", rest)] if rest else []
    sets = set()
    if name.startswith(SETS_UNIFORM):
        first = next((i for i, operand in enumerate(operands) if not re.fullmatch(r"U?P[T\d]+", operand)), None)
        if first is not None and (register := re.fullmatch(r"UR(\d+)", operands[first])):
            width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            sets.update(range(int(register[1]), int(register[1]) + width))
            operands = operands[first + 1 :]
    reads = set()
    for operand in operands:
        for register in REGISTER.finditer(operand):
            number = int(register[1])
            reads.update(range(number, number + _width(name, operand, register)))
        if "gdesc[" in operand and re.match(r"R\d+", operands[1]):
            number = int(
                REGISTER.search(operand)[1]
            )  # a product whose first factor is in registers: the second's alone
            reads -= {number, number + 1}
    return Instruction(text, frozenset(reads), frozenset(sets))


def _width(name, operand, register):
    """How many registers are read by that name of the first."""
    if "gdesc[" in operand:
        return 4
    return 2 if "desc[" in operand or register[2] or (name.startswith(SETS_UNIFORM) and ".64" in name) else 1


def _successors(i, instructions, labels):
    text = instructions[i].text
    following = [i + 1] if i + 1 < len(instructions) else []
    if jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", text):
        is_conditional = text.startswith("@") or "UP" in text
        return [labels[jump[1]], *(following if is_conditional else [])]
    return [] if "EXIT" in text and not text.startswith("@") else following
