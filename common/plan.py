"""A plan: a call whose checks, choices, kernels and scratch memory are settled, for any number of calls of its kind."""

import weakref
from collections.abc import Callable

import torch

from common.replay import STREAM, NoRecipe, Recipe, on

MOST = 1024  # tensors that a plan remembers, of each kind


class Plan:
    """Made of a function of q, k, v, its tensors by name, and its other options; called with tensors of the same kinds.

    Kinds: shape, strides, dtype, device, and the address as far as 16 divides it. Contents are not looked at. Launches
    go straight to the driver: Triton's launch hooks do not see them.

    Of a tensor that it has met the plan knows what it is to a launch: a step whose keys and values are those of an
    earlier one, as those of each layer are, takes no more than to see that. Any other tensor is checked. Results and
    stream are each call's own.
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
        self._arguments, self._calls, self._streams = [], [], []  # of all launches, one after the other
        self._places = {source: [] for source in range(first + len(made))}  # (position, function of the tensor)
        for launch in recipe.launches:
            start = len(self._arguments)
            self._arguments += launch.arguments
            self._calls.append((launch.call, slice(start, len(self._arguments))))
            self._streams.append(start + STREAM)
            for position, source, argument in launch.places:
                if source in self._own:
                    self._arguments[start + position] = argument(self._own[source])
                else:
                    self._places[source].append((start + position, argument))
        self._met = [{} for _ in (*tensors, "out")]  # by id: reference, address, [(position, argument)]
        if recipe.device.type == "cuda":
            torch.cuda.current_stream(recipe.device).synchronize()  # zeros for whichever stream comes

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None, **more):
        recipe = self._recipe
        if recipe.current_device() != recipe.index:
            with on(recipe.device):
                return self(q, k, v, out=out, **more)
        if ((more or self._more) and more.keys() != self._more.keys()) or (out is None and self._make_out is None):
            self._refuse(more, out)
        tensors = [q, k, v]
        for name in self._more:
            tensors.append(more[name])
        if out is not None:
            tensors.append(out)
        arguments, i = self._arguments.copy(), 0  # another thread may be here too
        for met, x in zip(self._met, tensors, strict=False):
            found = met.get(id(x))
            if found is None or found[0]() is not x or found[1] != x.data_ptr():
                found = self._meet(i, x)
            for position, argument in found[2]:
                arguments[position] = argument
            i += 1
        made = {i: make() for i, make in self._make_more}
        if out is None:
            out = made[self._out] = self._make_out()
        for i, x in made.items():
            for position, argument in self._places[i]:
                arguments[position] = argument(x)
        stream = recipe.stream_of(recipe.index)
        for position in self._streams:
            arguments[position] = stream
        for call, own in self._calls:
            call(*arguments[own])
        return out if self._plain else recipe.result(made | {self._out: out})

    def _refuse(self, more: dict, out: torch.Tensor | None):
        """Say which tensors there must be besides q, k and v."""
        wanted, found = [*self._more], [*more]
        if self._make_out is None:
            wanted.append("out")
            found += [] if out is None else ["out"]
        wanted, found = ", ".join(wanted) or "none", ", ".join(found) or "none"
        raise ValueError(f"plan: its tensors besides q, k and v are {wanted}; this call has {found}")

    def _meet(self, i: int, x: torch.Tensor) -> tuple[weakref.ref, int, list]:
        """What is remembered of a call's tensor i, if it is of the right kind."""
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
        met = self._met[i]
        if len(met) >= MOST:  # their tensors have long gone
            met.clear()
        source = i if i < len(self._names) - 1 else self._out
        met[id(x)] = found = weakref.ref(x), x.data_ptr(), [(position, f(x)) for position, f in self._places[source]]
        return found


def _kind(x: torch.Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16
