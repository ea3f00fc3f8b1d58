"""A plan: a call whose checks, choices, kernels and scratch memory are settled, for any number of calls of its kind."""

import weakref
from collections.abc import Callable

import torch

from common.replay import NoRecipe, Recipe, on


class Plan:
    """Made of a function of q, k, v, its tensors by name, and its other options; called with tensors of the same kinds.

    Kinds: shape, strides, dtype, device, and the address as far as 16 divides it. Contents are not looked at. Launches
    go straight to the driver: Triton's launch hooks do not see them.

    The launches are kept with the last call's tensors settled in them. A tensor that is the last call's, where it was,
    takes no more than to see that; any other is checked and takes its place. Results and stream are each call's own.
    """

    def __init__(self, function: Callable, tensors: dict[str, torch.Tensor], options: dict):
        if tensors["q"].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("plan: it is made before a CUDA graph is captured; its calls can be captured")
        outs = {"out": tensors["out"]} if "out" in tensors else {}
        tensors = {name: x for name, x in tensors.items() if name != "out"}
        try:
            recipe = Recipe(function, (), tensors | outs | options)
        except NoRecipe as reason:
            raise ValueError(f"plan: there is none for a call that {reason}; it takes tensors as kernels do") from None
        first = len(tensors) + len(outs)  # the numbers of those that a call makes follow those that it is given
        made, results = dict(enumerate(recipe.make, first)), {source for source, _ in recipe.results}
        self._recipe, self._names = recipe, (*tensors, "out")
        self._more = {name: i for i, name in enumerate(tensors) if i >= 3}
        self._out = recipe.results[0][0]
        self._make_out = made.get(self._out)  # None: each call gives one
        self._make_more = [(i, make) for i, make in made.items() if i in results and i != self._out]
        with on(recipe.device):
            self._kinds = [_kind(x) for x in (*tensors.values(), *(outs.values() or [self._make_out()]))]
            self._own = {i: make() for i, make in made.items() if i not in results}
            for i, count in recipe.counts.items():  # not the stream's tickets
                self._own[first + i] = torch.zeros(count, dtype=torch.int32, device=recipe.device)
        self._plain = recipe.single and recipe.results[0][1] is None  # what is returned is out itself
        still_open = {self._out, *(i for i, _ in self._make_more)}
        launches = [launch.only(still_open).settled(self._own) for launch in recipe.launches]
        gone = weakref.ref(set())
        self._last = [gone] * len(tensors), [0] * len(tensors), launches  # its tensors, their addresses
        self._last_out = gone, 0
        if recipe.device.type == "cuda":
            torch.cuda.current_stream(recipe.device).synchronize()  # zeros for whichever stream comes

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None, **more):
        recipe = self._recipe
        if recipe.current_device() != recipe.index:
            with on(recipe.device):
                return self(q, k, v, out=out, **more)
        if ((more or self._more) and more.keys() != self._more.keys()) or (out is None and self._make_out is None):
            self._refuse(more, out)
        before, addresses, launches = last = self._last  # once: another thread may be here too
        others = {}  # than the last call's; a reference gives None when its tensor has gone
        if before[0]() is not q or q is None or q.data_ptr() != addresses[0]:
            others[0] = q
        if before[1]() is not k or k is None or k.data_ptr() != addresses[1]:
            others[1] = k
        if before[2]() is not v or v is None or v.data_ptr() != addresses[2]:
            others[2] = v
        for name, i in self._more.items():
            x = more[name]
            if before[i]() is not x or x is None or x.data_ptr() != addresses[i]:
                others[i] = x
        if others:
            launches = self._settled(last, others)
        if out is None:
            out = self._make_out()
        else:
            before, address = self._last_out
            if before() is not out or out.data_ptr() != address:
                self._last_out = self._checked(-1, out)
        results = {self._out: out}
        for i, make in self._make_more:
            results[i] = make()
        stream = recipe.stream_of(recipe.index)
        for launch in launches:
            launch.run(results, stream)
        return out if self._plain else recipe.result(results)

    def _refuse(self, more: dict, out: torch.Tensor | None):
        """Say which tensors there must be besides q, k and v."""
        wanted, found = [*self._more], [*more]
        if self._make_out is None:
            wanted.append("out")
            found += [] if out is None else ["out"]
        wanted, found = ", ".join(wanted) or "none", ", ".join(found) or "none"
        raise ValueError(f"plan: its tensors besides q, k and v are {wanted}; this call has {found}")

    def _settled(self, last: tuple[list, list, list], others: dict[int, torch.Tensor]) -> list:
        """The launches on that call's tensors but for these, which take their places; this is the last call now."""
        before, addresses, launches = last
        before, addresses = before.copy(), addresses.copy()
        for i, x in others.items():
            before[i], addresses[i] = self._checked(i, x)
        launches = [launch.settled(others) for launch in launches]
        self._last = before, addresses, launches
        return launches

    def _checked(self, i: int, x: torch.Tensor) -> tuple[weakref.ref, int]:
        """A reference to a call's tensor i, -1 for out, and its address, if it is of the right kind."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{self._names[i]}: must be a torch.Tensor, it is {type(x).__name__}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{self._names[i]}: requires grad, and there is no backward; detach() it")
        kind, found = self._kinds[i], _kind(x)
        if found != kind:
            names = ("shape", "strides", "dtype", "device", "address modulo 16")
            name, is_, was = next(each for each in zip(names, found, kind, strict=True) if each[1] != each[2])
            is_, was = (list(value) if isinstance(value, tuple) else value for value in (is_, was))
            raise ValueError(f"{self._names[i]}: this plan is for {name} {was}, not {is_}; make another plan")
        return weakref.ref(x), x.data_ptr()


def _kind(x: torch.Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16
