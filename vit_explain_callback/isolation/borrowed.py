"""Stand-ins for objects that are not copied as a whole: one copies attributes on access, one raises on any use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from vit_explain_callback.isolation.twin import Twin


class Borrowed:
    """Passes for an object in the object's own methods, and copies each attribute on first access.

    Attributes that are never accessed are never copied: records, files, metrics and caches of a LightningModule.

    Args:
        twin: Makes the copies.
        source: The object, which is never written to.
    """

    __slots__ = ("__dict__", "__weakref__", "_borrowed_by", "_borrowed_from")

    def __init__(self, twin: Twin, source: Any) -> None:
        object.__setattr__(self, "_borrowed_by", twin)
        object.__setattr__(self, "_borrowed_from", source)
        if isinstance(source, nn.Module):
            vars(self)["training"] = False

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._borrowed_from)

    def __bool__(self) -> bool:
        kind = type(self._borrowed_from)
        if hasattr(kind, "__bool__"):
            return bool(kind.__bool__(self))
        return len(self) > 0 if hasattr(kind, "__len__") else True

    def __getattr__(self, name: str) -> Any:
        source, kind = self._borrowed_from, type(self._borrowed_from)
        of_kind = _in_class(kind, name)
        if hasattr(type(of_kind), "__set__"):  # a property goes before an attribute
            return of_kind.__get__(self, kind)
        for held in (vars(source), *(vars(source).get(part, {}) for part in ("_parameters", "_buffers", "_modules"))):
            if name in held:
                vars(self)[name] = self._borrowed_by.attribute(name, held[name])
                return vars(self)[name]
        if of_kind is not _NOWHERE:
            return of_kind.__get__(self, kind) if hasattr(type(of_kind), "__get__") else of_kind
        fallback = _in_class(kind, "__getattr__")
        if fallback is _NOWHERE:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return fallback(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        of_kind = _in_class(type(self._borrowed_from), name)
        if hasattr(type(of_kind), "__set__"):
            of_kind.__set__(self, value)
        else:
            vars(self)[name] = value

    def __delattr__(self, name: str) -> None:
        getattr(self, name)
        del vars(self)[name]

    def get_submodule(self, target: str) -> nn.Module:
        """A copy of one submodule only."""
        if not target:
            return self  # type: ignore[return-value]
        submodule: nn.Module = self._borrowed_by.copy(self._borrowed_from.get_submodule(target))
        return submodule


class Uncopied:
    """Stands for an object that cannot be copied: any use of it raises.

    Args:
        kind: Name of the object's class.
    """

    def __init__(self, kind: str) -> None:
        self.__dict__["_kind"] = kind

    def __repr__(self) -> str:
        return f"<no copy of {self.__dict__['_kind']}>"

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        return _refuse(self, name)


_NOWHERE = object()


def _special(name: str) -> Any:
    """A method that Python looks up in the class only."""

    def method(self: Borrowed, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self._borrowed_from), name)(self, *args, **kwargs)

    return method


for _name in ("call", "len", "getitem", "setitem", "iter", "contains", "enter", "exit"):
    setattr(Borrowed, f"__{_name}__", _special(f"__{_name}__"))


def _in_class(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _NOWHERE)


def _refuse(value: Any, *_: Any, **__: Any) -> Any:
    kind = object.__getattribute__(value, "__dict__")["_kind"]
    raise TypeError(f"{kind} cannot be copied, so it cannot be used while the model is explained")


for _name in (
    "call",
    "iter",
    "next",
    "len",
    "bool",
    "getitem",
    "setitem",
    "contains",
    "enter",
    "exit",
    "index",
    "add",
    "iadd",
    "setattr",
    "delattr",
):
    setattr(Uncopied, f"__{_name}__", _refuse)
