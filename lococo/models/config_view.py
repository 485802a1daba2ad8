"""A model's config as the patched model sees it: the same in all but the attention implementation.

Others may hold the config, too: a second model made from it, a trainer that builds a reference model. They must not
find there what only a patched model understands.
"""

from __future__ import annotations

import functools
from typing import Any


def config_view(config: Any, attention: str | None = None, parts: dict[str, Any] | None = None) -> Any:
    """A config that reads differently in a few places; all else is read from, and everything is written to, ``config``.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    attention : str, optional
        What its attention implementation reads, a name in Transformers' ``AttentionInterface``. None: that of
        ``config``.
    parts : dict, optional
        Views of configs inside this one, by attribute.
    """
    parts = parts or {}
    view = object.__new__(_view_class(type(config), attention, tuple(parts)))
    object.__setattr__(view, "__dict__", vars(config))
    object.__setattr__(view, "lococo_config", config)
    object.__setattr__(view, "lococo_parts", parts)
    return view


@functools.cache
def _view_class(base: Any, attention: str | None, parts: tuple[str, ...]) -> Any:
    def reduce(view: Any, protocol: Any) -> tuple:
        return config_view, (view.lococo_config, attention, view.lococo_parts)

    def part(name: str) -> property:
        return property(
            lambda view: getattr(view, "lococo_parts", vars(view))[name],
            lambda view, value: vars(view).__setitem__(name, value),
        )

    members: dict[str, Any] = {
        "__slots__": ("lococo_config", "lococo_parts"),
        "__reduce_ex__": reduce,
        **{name: part(name) for name in parts},
    }
    if attention is not None:
        members["_attn_implementation"] = property(lambda view: attention, base._attn_implementation.fset)
    return type(base)(base.__name__, (base,), members)


def view_around(config: Any, inner: Any, inner_view: Any) -> Any:
    """A view of a config that holds ``inner_view`` in the place of ``inner``; None if ``inner`` is not in it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of a model with several parts, a vision tower and a decoder for one.
    """
    parts = {}
    for name, value in vars(config).items():
        if value is inner:
            parts[name] = inner_view
        elif hasattr(value, "get_text_config"):
            found = view_around(value, inner, inner_view)
            if found is not None:
                parts[name] = found
    return config_view(config, parts=parts) if parts else None
