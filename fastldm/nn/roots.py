"""What users may give as a model: a module, or a pipeline of them."""

from __future__ import annotations

from torch import nn

from fastldm.errors import InputTypeError


def roots(model: object) -> dict[str, nn.Module]:
    """The modules of a pipeline (anything with `components`) by name; a module itself under "".

    Raises:
        InputTypeError: for anything else, a pipeline without a module among them.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if isinstance(components, dict):
        modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        if modules:
            return modules
    given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise InputTypeError(
        f"model must be one nn.Module or one pipeline with modules, an instance, got {given}"
    )
