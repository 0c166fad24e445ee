"""mypy's view of `nn.Module`: attributes that torch does not declare have the type that their owner gives them.

torch declares `Module.__getattr__` as `Tensor | Module`. Models of transformers and PEFT come as `nn.Module`, and their
`config`, `generate` or `base_model` are neither.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType


def _undeclared(context: AttributeContext) -> Type:
    default = context.default_attr_type
    names = {str(item).rpartition(".")[2] for item in default.items} if isinstance(default, UnionType) else set()
    return AnyType(TypeOfAny.special_form) if names == {"Tensor", "Module"} else default


class ModuleAttributes(Plugin):
    """Any for what only `Module.__getattr__` answers."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """The same hook for every attribute: classes that derive from Module bear any name."""
        return _undeclared


def plugin(version: str) -> type[Plugin]:
    """What mypy calls."""
    return ModuleAttributes
