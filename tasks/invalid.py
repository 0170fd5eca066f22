"""What pydantic finds wrong, in one line: where, what, and the nearest valid choice."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from tasks.errors import nearest


def first_line(error: ValidationError, root: type[BaseModel]) -> str:
    """`key: what is wrong (got value)` of the first error, with the nearest valid name."""
    first = error.errors(include_url=False)[0]
    known, fields = _resolve(root, first["loc"])
    key = ".".join(map(str, first["loc"][: known + 1])) or "top level"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(first['loc'][known]), fields)}"
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    got = first["input"]
    hint = (
        nearest(got, first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        if first["type"] == "literal_error" and isinstance(got, str)
        else ""
    )
    return f"{key}: {first['msg'].lower().removeprefix('input ')}, got {got!r}{hint}"


def _resolve(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[int, list[str]]:
    """How many parts of `loc` lead through sections, and the fields of the innermost one."""
    depth = 0
    while depth < len(loc) - 1:
        field = model.model_fields.get(str(loc[depth]))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model, depth = inner, depth + 1
    return depth, list(model.model_fields)
