"""What a kernel's machine code consists of: instructions with their kinds and source lines, and the loops among them.

Reads the text of nvdisasm (NVIDIA) and of the AMD assembler. A loop is a natural loop of the control flow graph, so
that blocks which the assembler moved out of line still count, and jumps back from there do not look like loops.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# (kind, pattern of the instruction's beginning); the first that matches counts. The order is that of the tables' rows.
_NVIDIA = (
    ("tensor core", r"[HIQBDO]G?MMA|UTC\w*MMA"),
    ("exponentials", r"MUFU\.EX2"),
    ("reciprocals and divisions", r"MUFU\.RCP|FCHK"),
    ("other special functions", r"MUFU"),
    ("moves", r"HFMA2(\.\w+)* \S+ -RZ, RZ|IMAD\.MOV|U?MOV|CS2R|S2U?R|R2UR|R2P|P2R|U?LDC|LDCU"),
    ("conversions", r"HADD2\.F32 \S+ -RZ|U?[FI]2\w+|FRND"),
    ("fused multiply-adds", r"[FHD]FMA2?"),
    ("multiplies", r"[FHD]MUL2?"),
    ("adds", r"[FHD]ADD2?"),
    ("max and min", r"[FH]MNMX[23]?"),
    ("shuffles", r"SHFL|REDUX|CREDUX|MOVM"),
    ("global loads (TMA)", r"UTMALDG|UBLKCP"),
    ("global loads (cp.async)", r"LDGSTS"),
    ("global loads", r"LDG?"),
    ("global stores", r"STG?|UTMASTG|UTMAREDG|REDG?|ATOMG?"),
    ("shared loads", r"LDSM?"),
    ("shared stores", r"STSM?|ATOMS"),
    ("tensor memory", r"LDTM|STTM|UTCCP|UTCSHIFT|UTCATOMSWS"),
    ("spills", r"LDL|STL"),
    ("barriers and waits", r"U?BAR|SYNCS|WARPSYNC|WARPGROUP|\w*DEPBAR|MEMBAR|FENCE|UTCBAR|ERRBAR|ARRIVES|UCGABAR\w*"),
    ("compares and selects", r"[FDH]SETP?2?|U?ISETP|U?SEL|FSEL|U?PLOP3|VOTEU?"),
    ("byte permutes", r"U?PRMT"),
    ("branches", r"BRA|BRXU?|JMP|JMX|BSSY|BSYNC|BREAK|EXIT|CALL|RET|NOP|BMOV|KILL"),
)
_AMD = (
    ("tensor core", r"v_s?w?mfma|v_s?wmma"),
    ("exponentials", r"v_exp"),
    ("reciprocals and divisions", r"v_rcp|v_div"),
    ("other special functions", r"v_(log|sqrt|rsq|sin|cos|ldexp|frexp)"),
    ("shuffles", r"ds_(b?permute|swizzle)|v_permlane|v_mov_b\d+_dpp"),
    ("moves", r"[sv]_(pk_)?mov|v_accvgpr|s_cmov|v_readfirstlane|v_swap"),
    ("conversions", r"v_cvt"),
    ("fused multiply-adds", r"v_(pk_)?(fma|fmac|mad|mac)_\w*(f16|f32|bf16|f64)|v_dot"),
    ("multiplies", r"v_(pk_)?mul_(legacy_)?(f16|f32|bf16|f64)"),
    ("adds", r"v_(pk_)?(add|sub|subrev)_(f16|f32|bf16|f64)"),
    ("max and min", r"v_(pk_)?(max|min|maximum|minimum)3?_(num_)?(f16|f32|bf16)|v_med3_f"),
    ("global loads (to LDS)", r"(buffer|global)_load.*\blds\b"),
    ("spills", r"scratch_(load|store)|buffer_(load|store).*\b(Folded|Spill|Reload)\b"),
    ("global loads", r"(global|buffer|flat|s|s_buffer)_load"),
    ("global stores", r"(global|buffer|flat)_(store|atomic)"),
    ("shared loads", r"ds_(read|load)"),
    ("shared stores", r"ds_(write|store)"),
    ("barriers and waits", r"s_(barrier|wait|nop|sleep|setprio|sched)"),
    ("compares and selects", r"[sv]_cmpx?_|v_cndmask|s_cselect|s_bitcmp"),
    ("byte permutes", r"v_perm_b32|v_alignb"),
    ("branches", r"s_(c?branch|endpgm|setpc|swappc|getpc)"),
)
OTHER = "integers and addresses"
KINDS = (*dict.fromkeys(kind for table in (_NVIDIA, _AMD) for kind, _ in table), OTHER)
_PATTERNS = {
    amd: [(kind, re.compile(f"(?:{pattern})" if amd else f"(?:{pattern})(?![A-Z0-9])")) for kind, pattern in table]
    for amd, table in ((False, _NVIDIA), (True, _AMD))
}


class Place(NamedTuple):
    """A source line, as the compiler recorded it."""

    file: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its text without address and predicate, its kind, its source lines, innermost first."""

    text: str
    kind: str
    places: tuple[Place, ...] = ()
    targets: tuple[str, ...] = ()  # labels that it may jump to
    falls_through: bool = True
    predicate: str = ""  # "@!P0"

    @property
    def opcode(self) -> str:
        """ "HGMMA.64x64x16.F32" """
        return self.text.split(maxsplit=1)[0]


@dataclass
class Code:
    """A kernel's instructions in order; labels maps a label to the index of the instruction that follows it."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the indices of its instructions, in order, inner loops included."""

    body: tuple[int, ...]
    counts: Counter  # of kinds
    opcodes: Counter  # of opcodes, "HGMMA.64x64x16.F32"

    @property
    def size(self) -> int:
        return len(self.body)

    def has(self, prefix: str) -> int:
        """How many instructions have an opcode that starts so."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefix))


def kind_of(text: str, amd: bool = False) -> str:
    """The kind of an instruction, from its text without address and predicate."""
    return next((kind for kind, pattern in _PATTERNS[amd] if pattern.match(text)), OTHER)


# ---- reading


def read_nvidia(text: str) -> Code:
    """Code from `nvdisasm -c -gi`."""
    code, places, inlined = Code(), (), False
    for line in text.splitlines():
        if match := re.match(r"\s*//## File \"([^\"]*)\", line (\d+)(.*)", line):
            # callers follow on lines of their own, outwards, each but the last with "inlined at"
            places = (*(places if inlined else ()), Place(match[1], int(match[2])))
            inlined = "inlined at" in match[3]
        elif match := re.match(r"([\w.$]+):$", line):
            code.labels[match[1]] = len(code.instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)[\s;]*$", line):
            code.instructions.append(_nvidia(match[1], places))
    return code


def _nvidia(text: str, places: tuple[Place, ...]) -> Instruction:
    predicate = re.match(r"[{ ]*(@!?U?P\w+)\s+", text)
    bare = text[predicate.end() :] if predicate else text.lstrip("{ ")
    opcode = bare.split(maxsplit=1)[0].split(".")[0]
    targets = tuple(re.findall(r"\.L_x_\d+", bare)) if opcode in ("BRA", "BRX", "JMP", "JMX", "BSSY", "BRXU") else ()
    always = predicate is None or predicate[1] == "@PT"
    # "BRA.U !UP0, `(.L_x_1)" and "BRA P0, ..." carry their condition behind the opcode
    conditional = opcode == "BRA" and re.match(r"\S+\s+!?U?P\w+,", bare) is not None
    leaves = opcode in ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "BRXU", "KILL") and always and not conditional
    return Instruction(bare, kind_of(bare), places, targets, not leaves, predicate[1] if predicate else "")


def read_amd(text: str) -> Code:
    """Code from the assembler text of the AMD backend (`amdgcn`)."""
    code, files, places = Code(), {}, ()
    for line in text.splitlines():
        if match := re.match(r"\s*\.file\s+(\d+)\s+\"([^\"]*)\"(?:\s+\"([^\"]*)\")?", line):
            files[match[1]] = f"{match[2]}/{match[3]}" if match[3] else match[2]
        elif match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            places = (Place(files.get(match[1], "?"), int(match[2])),)
        elif match := re.match(r"(\.LBB\w+|[A-Za-z_][\w.$]*):", line):
            code.labels[match[1]] = len(code.instructions)
        elif re.match(r"\.Lfunc_end", line):
            break
        elif match := re.match(r"\t([a-z]\w+)(?:\s+(.*))?$", line):
            code.instructions.append(_amd(line.strip(), places))
    return code


def _amd(text: str, places: tuple[Place, ...]) -> Instruction:
    bare = text.split(";")[0].strip()
    opcode = bare.split(maxsplit=1)[0]
    targets = tuple(re.findall(r"\.LBB\w+", bare)) if "branch" in opcode else ()
    leaves = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
    return Instruction(bare, kind_of(text, amd=True), places, targets, not leaves)


# ---- loops


def loops_of(code: Code) -> list[Loop]:
    """The natural loops, in the order of their first instruction."""
    starts, successors = _blocks(code)
    predecessors = [[] for _ in starts]
    for block, nexts in enumerate(successors):
        for after in nexts:
            predecessors[after].append(block)
    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}  # header -> blocks
    for block, nexts in enumerate(successors):
        for header in nexts:
            if header in dominators[block]:
                bodies.setdefault(header, set()).update(_body(header, block, predecessors))
    ends = [*starts[1:], len(code.instructions)]
    found = []
    for _, blocks in sorted(bodies.items()):
        body = tuple(i for block in sorted(blocks) for i in range(starts[block], ends[block]))
        if len(body) > 1:  # code ends in a jump to itself
            inside = [code.instructions[i] for i in body]
            found.append(Loop(body, Counter(i.kind for i in inside), Counter(i.opcode for i in inside)))
    return found


def innermost(loops: list[Loop], kind: str) -> list[Loop]:
    """The loops with instructions of a kind that have no smaller one with them inside."""
    having = [loop for loop in loops if loop.counts[kind]]
    return [loop for loop in having if not any(set(other.body) < set(loop.body) for other in having)]


def main_loops(loops: list[Loop]) -> list[Loop]:
    """The innermost loops with tensor-core instructions; where there are none, exponentials (fp32, decoding)."""
    return innermost(loops, "tensor core") or innermost(loops, "exponentials")


def _blocks(code: Code) -> tuple[list[int], list[list[int]]]:
    """Basic blocks: the index of each one's first instruction, and the blocks that may follow each."""
    count = len(code.instructions)
    after_jumps = (i + 1 for i, instr in enumerate(code.instructions) if instr.targets or not instr.falls_through)
    starts = sorted({0, *(at for at in code.labels.values() if at < count), *(at for at in after_jumps if at < count)})
    block_at = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], count]
    successors = []
    for block, end in enumerate(ends):
        last = code.instructions[end - 1]
        nexts = [block_at[code.labels[t]] for t in last.targets if code.labels.get(t, count) < count]
        if last.falls_through and block + 1 < len(starts):
            nexts.append(block + 1)
        successors.append(nexts)
    return starts, successors


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that every way to it passes; blocks without a way to them have themselves alone."""
    reachable, todo = {0}, [0]
    while todo:
        new = [after for after in successors[todo.pop()] if after not in reachable]
        reachable.update(new)
        todo += new
    dominators = [set(reachable) if block in reachable else {block} for block in range(len(successors))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            before = [dominators[p] for p in predecessors[block] if p in reachable]
            new = set.intersection(*before) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _body(header: int, latch: int, predecessors: list[list[int]]) -> set[int]:
    """The blocks from which `latch` is reached without passing `header`."""
    body, todo = {header, latch}, [latch] if latch != header else []
    while todo:
        new = [p for p in predecessors[todo.pop()] if p not in body]
        body.update(new)
        todo += new
    return body
