"""A plan: a call whose checks, choices, kernels and scratch memory are settled, for any number of calls of its kind."""

import weakref
from collections.abc import Callable

import torch

from common.replay import NoRecipe, Recipe


class Plan:
    """Made of a function of q, k, v, its tensors by name, and its other options; called with tensors of the same kinds.

    Kinds: shape, strides, dtype, device, and the address as far as 16 divides it. Contents are not looked at. Launches
    go straight to the driver: Triton's launch hooks do not see them.
    """

    def __init__(self, function: Callable, tensors: dict[str, torch.Tensor], options: dict):
        if tensors["q"].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("plan: it is made before a CUDA graph is captured; its calls can be captured")
        try:
            recipe = Recipe(function, (), tensors | options)
        except NoRecipe as reason:
            raise ValueError(f"plan: there is none for a call that {reason}; it takes tensors as kernels do") from None
        made = list(enumerate(recipe.make, len(tensors)))  # after those that are given
        results = {source for source, _ in recipe.results}
        self._recipe, self._names, self._more = recipe, tuple(tensors), tuple(tensors)[3:]
        self._kinds = [_kind(x) for x in tensors.values()]
        self._seen = [(_nothing, 0)] * len(tensors)  # the last call's, and their addresses
        self._own = [None if i in results else make() for i, make in made]
        for i, count in recipe.counts.items():  # not the stream's tickets
            self._own[i] = torch.zeros(count, dtype=torch.int32, device=recipe.device)
        self._own_addresses = [0 if x is None else x.data_ptr() for x in self._own]
        self._fresh = [(i, make) for i, make in made if i in results]  # of each call
        self._out = recipe.results[0][0]
        if "out" not in tensors:
            self._names += ("out",)
            self._kinds.append(_kind(self._fresh[0][1]()))
            self._seen.append((_nothing, 0))
        if recipe.device.type == "cuda":
            torch.cuda.current_stream(recipe.device).synchronize()  # zeros for whichever stream comes

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None, **more):
        tensors = [q, k, v]
        if more or self._more:
            tensors += self._further(more, out)
        addresses = [self._address(i, x) for i, x in enumerate(tensors)]
        tensors += self._own
        addresses += self._own_addresses
        for i, make in self._fresh:
            if i == self._out and out is not None:
                tensors[i], addresses[i] = out, self._address(-1, out)
            else:
                tensors[i] = x = make()
                addresses[i] = x.data_ptr()
        return self._recipe.launch(tensors, addresses)

    def _address(self, i: int, x: torch.Tensor) -> int:
        """The address of a call's tensor i, -1 for out, if it is of the right kind: the one of the last call is."""
        before, address = self._seen[i]
        if before() is x and x.data_ptr() == address:
            return address
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
        address = x.data_ptr()
        self._seen[i] = weakref.ref(x), address
        return address

    def _further(self, more: dict, out: torch.Tensor | None) -> list:
        """The tensors after q, k, v, in the plan's order."""
        if "out" in self._more and out is not None:
            more["out"] = out
        if more.keys() != set(self._more):
            wanted, found = ", ".join(self._more) or "none", ", ".join(more) or "none"
            raise ValueError(f"plan: its tensors besides q, k and v are {wanted}; this call has {found}")
        return [more[name] for name in self._more]


def _kind(x: torch.Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _nothing():
    return None
