"""Functions of other packages replaced by ours and put back, all of them or none."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ._packages import require


class Hook(NamedTuple):
    """A function, static method or autograd.Function that is replaced.

    Args:
        module, name: where it is defined; `name` may be `Class.method`.
        parameters: the names that it takes, separated by blanks, in order; an autograd.Function's are those
            of its forward behind `ctx`.
        ours: what runs in its place; it gets the arguments by these names. Where it returns NotImplemented,
            what was there runs.
    """

    module: str
    name: str
    parameters: str
    ours: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> tuple[Any, str]:
        """The module or class that holds it, and its name there."""
        *holders, name = self.name.split(".")
        found = require(self.module)
        for holder in holders:
            found = getattr(found, holder)
        return found, name

    def fault(self) -> str | None:
        """Why this hook does not fit the package that is installed; None where it does."""
        try:
            function = getattr(*self.owner())
        except AttributeError:
            return f"{self} is missing"
        is_class = inspect.isclass(function)
        found = list(inspect.signature(function.forward if is_class else function).parameters)[is_class:]
        if found != self.parameters.split():
            return f"{self} takes ({', '.join(found)}), not ({', '.join(self.parameters.split())})"
        return None

    def replacement(self, original: Any) -> Any:
        """`ours`, with `original` behind it; for an autograd.Function a class with their `apply`."""
        is_class = inspect.isclass(original)
        run = original.apply if is_class else original
        takes = inspect.signature(original.forward if is_class else original)
        takes = takes.replace(parameters=list(takes.parameters.values())[is_class:])

        def call(*args: Any, **kwargs: Any) -> Any:
            found = self.ours(**takes.bind(*args, **kwargs).arguments)
            return run(*args, **kwargs) if found is NotImplemented else found

        if is_class:
            return type(original.__name__, (), {"apply": staticmethod(call), "__doc__": self.ours.__doc__})
        return functools.wraps(original)(call)


class Patch:
    """Hooks of one package, replaced until :meth:`undo` or to the end of a `with`."""

    def __init__(self, package: str, hooks: Sequence[Hook]) -> None:
        self.package, self.hooks = package, hooks
        # (hook, what its owner's namespace held, the function that was there, ours)
        self._replaced: list[tuple[Hook, Any, Any, Any]] = []
        self._depth = 0

    def apply(self) -> Patch:
        """Replace every hook; of nested calls the first counts, and the last `with` to end puts back.

        Raises:
            ImportError: the package is not installed.
            RuntimeError: a hook is missing or takes other arguments; each is named, and nothing is replaced.
        """
        if not self._replaced:
            faults = [fault for hook in self.hooks if (fault := hook.fault())]
            if faults:
                version = getattr(require(self.package), "__version__", "of unknown version")
                raise RuntimeError(
                    f"{self.package} {version} is not what this integration knows, and nothing was patched: "
                    + "; ".join(faults)
                )
            for hook in self.hooks:
                owner, name = hook.owner()
                stored, function = vars(owner)[name], getattr(owner, name)
                ours = hook.replacement(function)
                self._replaced.append((hook, stored, function, ours))
                setattr(owner, name, staticmethod(ours) if isinstance(stored, staticmethod) else ours)
                self._rename(function, ours)
        self._depth += 1
        return self

    def undo(self) -> None:
        """Put everything back, also in modules that were imported since."""
        for hook, stored, function, ours in reversed(self._replaced):
            owner, name = hook.owner()
            setattr(owner, name, stored)
            self._rename(ours, function)
        self._replaced, self._depth = [], 0

    def _rename(self, old: Any, new: Any) -> None:
        """In every module of the package that imported it by name, under whichever name."""
        for path, module in list(sys.modules.items()):
            if module is not None and (path + ".").startswith(self.package + "."):
                for name in [name for name, value in vars(module).items() if value is old]:
                    setattr(module, name, new)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self.undo()
