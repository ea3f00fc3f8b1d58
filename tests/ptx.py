"""The PTX that kernels hold as inline assembly, run on the CPU, whole warps at a time.

As much of PTX as they use: straight lines, and a branch forward to the end that all threads of a warp take together.
"""

import functools
import re

import numpy as np
import torch

THREADS = 32
TO = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


_fullmatch = functools.cache(re.fullmatch)  # of opcodes, a few of which come again and again


def _max(a, b):
    return np.fmax(a, b)  # a number wins over NaN


def _exp2(x):
    subnormal = np.float32(np.finfo(np.float32).tiny)
    result = np.exp2(np.where(np.abs(x) < subnormal, np.float32(0), x))
    return np.where(result < subnormal, np.float32(0), result)


ARITHMETIC = {
    "add.f32": np.add, "sub.f32": np.subtract, "mul.f32": np.multiply, "max.f32": _max, "max.NaN.f32": np.maximum,
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32), "ex2.approx.ftz.f32": _exp2,
    "setp.gtu.f32": lambda a, b: ~(a <= b), "setp.eq.f32": np.equal, "setp.neu.f32": lambda a, b: ~(a == b),
    "selp.f32": lambda a, b, p: np.where(p, a, b), "or.pred": np.logical_or, "mov.f32": lambda a: a,
}  # fmt: skip


@functools.cache
def _program(text: str) -> tuple:
    """[(predicate or None, opcode, operands)]"""
    lines = [line.strip() for line in re.sub(r"[{}]\s*$|^\s*[{}]", "", text.strip()).replace("DONE:", "").split(";")]
    program = []
    for line in filter(None, lines):
        guard, opcode, rest = re.fullmatch(r"(?:@(!?\w+)\s+)?(\S+)\s+(.*)", line, re.DOTALL).groups()
        if opcode != ".reg":
            program.append((guard, opcode, tuple(re.findall(r"\{[^}]*\}|[^,\s]+", rest))))
    return tuple(program)


def _packed(low, high, to: str) -> np.ndarray:
    """Two float32 as one register of twice their bits, `low` in the lower half."""
    pair = torch.from_numpy(np.stack([low, high], -1).astype(np.float32))
    if TO[to].itemsize == 1:
        largest = torch.finfo(TO[to]).max
        pair = pair.clamp(-largest, largest)
    return pair.to(TO[to]).view(torch.int32 if TO[to].itemsize == 2 else torch.int16).numpy()[..., 0]


def _permuted(a, b, selector: int) -> np.ndarray:
    """prmt: each four bits of the selector pick a byte of a (0 to 3) or of b (4 to 7)."""
    b = np.broadcast_to(np.asarray(b).astype(np.int32), a.shape)
    parts = np.concatenate([np.ascontiguousarray(x)[..., None].view(np.uint8) for x in (a, b)], -1)
    return np.ascontiguousarray(parts[..., [selector >> 4 * i & 7 for i in range(4)]]).view(np.int32)[..., 0]


def _halves(x: np.ndarray, of: str) -> np.ndarray:
    """Two numbers of 8 bits as two float16 in one register."""
    numbers = torch.from_numpy(np.ascontiguousarray(x)[..., None].view(np.uint8)).view(TO[of])
    return numbers.to(torch.float16).numpy().view(np.int32)[..., 0]


def run(text: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What the operands $0 .. hold at the end. inputs: float32 [warps, 32] each, the operands after the outputs.

    AssertionError where a register is read that nobody has written, or a warp's threads do not branch together.
    """
    warps = len(inputs[0])
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    here, finished = np.arange(warps), []

    def read(name):
        if name in registers:
            return registers[name]
        if name.startswith("0f"):
            return np.frombuffer(bytes.fromhex(name[2:]), ">f4").astype(np.float32)
        assert re.fullmatch(r"-?\d+(\.\d+)?", name), f"{name} is read before anything is written to it"
        return np.float32(name)

    with np.errstate(all="ignore"):
        for guard, opcode, operands in _program(text):
            if opcode == "bra":
                taken = read(guard.lstrip("!")) ^ guard.startswith("!")
                assert (taken == taken[:, :1]).all(), "threads of a warp part"
                leave, stay = taken[:, 0], ~taken[:, 0]
                finished.append((here[leave], {name: x[leave] for name, x in registers.items()}))
                registers, here = {name: x[stay] for name, x in registers.items()}, here[stay]
                if not len(here):
                    break
                continue
            assert guard is None, f"@{guard} {opcode}"
            target, *names = operands
            if opcode == "vote.sync.any.pred":
                value = np.broadcast_to(read(names[0]).any(1, keepdims=True), (len(here), THREADS))
            elif opcode == "shfl.sync.bfly.b32":
                value = read(names[0])[:, np.arange(THREADS) ^ int(names[1])]
            elif match := _fullmatch(r"cvt\.rn\.(?:satfinite\.)?(\w+)x2\.f32", opcode):
                value = _packed(read(names[1]), read(names[0]), match[1])
            elif opcode == "mov.b32" and target.startswith("{"):
                halves = np.ascontiguousarray(read(names[0]))[..., None].view(np.int16)
                for half, name in enumerate(target.strip("{}").split(", ")):
                    registers[name] = halves[..., half]
                continue
            elif opcode == "prmt.b32":
                value = _permuted(read(names[0]), read(names[1]), int(names[2], 16))
            elif opcode == "and.b32":
                value = read(names[0]) & np.array(int(names[1], 16), np.uint32).view(np.int32)
            elif match := _fullmatch(r"cvt\.rn\.f16x2\.(e\dm\d)x2", opcode):
                value = _halves(read(names[0]), match[1])
            elif opcode == "mov.b32" and names[0].startswith("{"):
                low, high = (read(name) for name in names[0].strip("{}").split(", "))
                value = np.stack([low, high], -1).astype(np.int16).view(np.int32)[..., 0]
            else:
                value = ARITHMETIC[opcode](*map(read, names))
            whole = np.shape(value) == (len(here), THREADS)
            registers[target] = value if whole else np.broadcast_to(value, (len(here), THREADS))
    finished.append((here, registers))
    result = []
    for i in range(outputs):
        parts = [(rows, found[f"${i}"]) for rows, found in finished if len(rows)]
        whole = np.empty((warps, THREADS), parts[0][1].dtype)
        for rows, part in parts:
            whole[rows] = part
        result.append(whole)
    return result


def elementwise(text: str, args: list[torch.Tensor], outputs: int) -> list[torch.Tensor]:
    """inline_asm_elementwise with pack 2 on tensors [rows, 4] of an accumulator: threads have rows r and r + 8."""

    def split(x):  # [rows, 4] -> two of [warps, 32]
        return x.reshape(-1, 2, 8 * 4).unbind(1)

    found = run(text, 2 * outputs, [np.ascontiguousarray(x) for arg in args for x in split(arg.float())])
    pairs = zip(found[::2], found[1::2], strict=True)
    return [torch.from_numpy(np.stack(pair, 1)).reshape(args[0].shape) for pair in pairs]


def on_pairs(text: str, x: torch.Tensor, dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """inline_asm_elementwise with pack 2 on a tensor of 16-bit numbers, whose results have 16 bits too."""
    registers = x.contiguous().view(torch.int32).reshape(-1, THREADS).numpy()
    found = run(text, len(dtypes), [registers])
    return [torch.from_numpy(y.copy()).view(dtype).reshape(x.shape) for y, dtype in zip(found, dtypes, strict=True)]
