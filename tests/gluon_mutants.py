"""Gluon kernels with a piece missing: each wait, release, count and phase left out, or changed, by itself."""

import ast
import pathlib

import common.hopper

HOPPER = pathlib.Path(common.hopper.__file__)
NEEDED = ("release", "wait_for_kernel_before", "wait_full", "skip", "fence_async_shared", "tma.store_wait",
          "mbarrier.wait", "mbarrier.arrive", "mbarrier.expect")  # fmt: skip
REWRITES = {  # of text in common/hopper.py
    "the producer's phase inverted": ("((i // SLOTS) & 1) ^ 1", "(i // SLOTS) & 1"),
    "the consumer's phase inverted": ("(i // SLOTS) & 1, pred=pred)", "((i // SLOTS) & 1) ^ 1, pred=pred)"),
    "half the bytes expected": ("block_type.nbytes", "block_type.nbytes // 2"),
    "twice the bytes expected": ("block_type.nbytes", "block_type.nbytes * 2"),
    "full waits for two arrivals": ("mbarrier.init(full.index(i), count=1)", "mbarrier.init(full.index(i), count=2)"),
    "empty is never initialised": ("mbarrier.init(empty.index(i), count=ARRIVALS)", "pass"),
    "full and empty swapped": ("return bufs, full, empty", "return bufs, empty, full"),
    "the bytes arrive at the next slot": ("full.index(slot), bufs", "full.index((i + 1) % SLOTS), bufs"),
    "all blocks in one slot": ("bufs.index(slot)", "bufs.index(0)"),
}


def _calls(node, *names) -> list[ast.Call]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) in names]


def _without(lines: list[str], statements: list[ast.stmt], *texts: str) -> str:
    """The source with other text in the place of statements that follow each other."""
    return "".join([*lines[: statements[0].lineno - 1], *texts, *lines[statements[-1].end_lineno :]])


def mutants(path: pathlib.Path, needed=NEEDED, rewrites=()) -> dict[str, str]:
    """What each change to a file of kernels is called -> the changed source. A change touches one statement, or two.

    needed: calls that are left out, each by itself. rewrites: name -> (text, other text), beside those above.
    """
    source = path.read_text()
    rewrites = dict(rewrites) | (REWRITES if path == HOPPER else {})
    found, lines = {}, source.splitlines(keepends=True)

    def add(function, name, statements, *texts):
        name, indent = f"{function.name}: {name}", " " * statements[0].col_offset
        name += f" ({sum(n.startswith(name) for n in found) + 1})" * (name in found)
        found[name] = _without(lines, statements, *(f"{indent}{text}\n" for text in texts))

    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
            continue
        bodies = [getattr(n, part, []) for n in ast.walk(function) for part in ("body", "orelse")]
        bodies = [body for body in bodies if isinstance(body, list)]  # statements, not the arms of an expression
        for before, node in [pair for body in bodies for pair in zip([None, *body], body, strict=False)]:
            text = ast.unparse(node)
            if isinstance(node, ast.Expr) and _calls(node, *needed):
                add(function, f"without {text}", [node], "pass")
                if _calls(node, "release") and before is not None and _calls(before, "warpgroup_mma_wait"):
                    add(function, f"{text} before the wait", [before, node], text, ast.unparse(before))
            elif isinstance(node, ast.Assign):
                for call in _calls(node, "warpgroup_mma_wait"):
                    call.args[0] = ast.Constant(call.args[0].value + 1)
                    add(function, ast.unparse(call), [node], ast.unparse(node))
                for call in _calls(node, "allocate_ring"):
                    arrivals = ast.unparse(call.args[2])
                    for change in ("+ 1", "- 1"):
                        call.args[2] = ast.Name(f"{arrivals} {change}")
                        add(function, ast.unparse(call), [node], ast.unparse(node))
                    call.args[2] = ast.Name(arrivals)
        if function.name == "producer":
            function.decorator_list, swap = [], {"k_desc": "v_desc", "v_desc": "k_desc"}
            for name in [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]:
                name.id = swap.get(name.id, name.id)
            add(function, "K in V's ring, V in K's", [function], ast.unparse(function))
    return found | {name: source.replace(*texts) for name, texts in rewrites.items() if texts[0] in source}
