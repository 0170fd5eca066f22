"""What a person fills in to start a flow: the forms in Prefect's UI are made from this."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from models import FAMILIES
from tasks.data.config import DatasetConfig, plain
from tasks.errors import nearest

DATASETS = get_args(DatasetConfig.model_fields["name"].annotation)
DataSet = Annotated[str, Field(json_schema_extra={"enum": list(DATASETS)})]
Family = Annotated[str, Field(json_schema_extra={"enum": sorted(FAMILIES)})]
KEEP = "Left empty: as in params.yaml."


class Amount(BaseModel):
    """How long each family trains; the same for all."""

    model_config = ConfigDict(extra="forbid")

    unit: Literal["steps", "images", "minutes", "flops"] = Field("steps", title="Unit")
    amount: float = Field(title="Amount", gt=0)


class CompareSettings(BaseModel):
    """What to compare. Everything left empty stays as `params.yaml` has it."""

    model_config = ConfigDict(extra="forbid")

    dataset: DataSet | None = Field(None, title="Data set", description=KEEP)
    path: str | None = Field(
        None, title="Path of the data", description=f"As the worker can read it. {KEEP}"
    )
    families: Annotated[list[Family], Field(min_length=1)] | None = Field(
        None, title="Families", description=f"The models to train and compare. {KEEP}"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, title="Seeds", description=f"Each family is trained with each. {KEEP}"
    )
    budget: Amount | None = Field(None, title="Budget", description=KEEP)
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        title="Other settings",
        description='Dotted keys of params.yaml, as in {"train.batch_size": 32}.',
    )

    @field_validator("dataset")
    @classmethod
    def _known_data(cls, name: str | None) -> str | None:
        return _known(name, DATASETS, "data set") if name else None

    @field_validator("families")
    @classmethod
    def _known_families(cls, names: list[str] | None) -> list[str] | None:
        return [_known(name, FAMILIES, "family") for name in names] if names else None

    def changes(self) -> dict[str, Any]:
        """As dotted keys of `params.yaml`; `overrides` have the last word."""
        changes: dict[str, Any] = plain(self.dataset) if self.dataset else {}
        if self.path:
            changes["dataset.path"] = self.path
        if self.families:
            changes["families"] = self.families
        if self.seeds:
            changes["seeds"] = self.seeds
        if self.budget:
            amount, unit = self.budget.amount, self.budget.unit
            whole = unit in ("steps", "images") and amount == int(amount)
            changes["train.budget"] = {unit: int(amount) if whole else amount}
        return {**changes, **self.overrides}


def _known(name: str, choices: Any, what: str) -> str:
    if name not in choices:
        raise ValueError(f"unknown {what} '{name}'{nearest(name, choices)}")
    return name
