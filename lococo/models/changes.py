"""What is changed in a model, so that all of it can be put back."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclasses.dataclass
class Changes:
    """Hooks, attributes and views of configs that were put into a model.

    Attributes
    ----------
    hooks : list of RemovableHandle
    attributes : list
        Modules and the names of attributes that were set, whether the instance had one of its own, and that one.
    configs : list
        Modules whose config is seen through a view, with the config and the view.
    attentions : list
        Configs whose attention reads otherwise through their view, with the view and what it was before.
    """

    hooks: list[RemovableHandle] = dataclasses.field(default_factory=list)
    attributes: list[tuple[nn.Module, str, bool, Any]] = dataclasses.field(default_factory=list)
    configs: list[tuple[Any, Any, Any]] = dataclasses.field(default_factory=list)
    attentions: list[tuple[Any, Any, Any]] = dataclasses.field(default_factory=list)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute and remember whether the instance had one of its own."""
        self.attributes.append((module, name, name in vars(module), vars(module).get(name)))
        setattr(module, name, value)

    def view_config(self, module: Any, view: Any) -> None:
        """Let a module see its config through a view."""
        self.configs.append((module, module.config, view))
        if view._attn_implementation != module.config._attn_implementation:
            self.attentions.append((module.config, view, module.config._attn_implementation))
        module.config = view

    def show_configs(self, through_views: bool) -> None:
        """Let modules see their configs through their views, or as they are."""
        for module, config, view in self.configs:
            module.config = view if through_views else config

    def undo(self) -> None:
        """Take everything out again."""
        for hook in self.hooks:
            hook.remove()
        for module, name, had_own, value in reversed(self.attributes):
            if had_own:
                setattr(module, name, value)
            else:
                vars(module).pop(name, None)  # it may have been deleted since
        self.show_configs(through_views=False)
        for config, view, attention in self.attentions:
            if config._attn_implementation == view._attn_implementation:  # read from the view, and set again
                config._attn_implementation = attention
