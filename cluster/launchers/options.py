"""The options that launchers share: what a worker is to run, wherever it runs."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cluster.settings import CELERY_OVERRIDES


class WorkerOptions(BaseModel):
    """``cluster.start(4, concurrency=2)``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    concurrency: int = Field(default=1, ge=1, description="tasks that each worker runs at once")
    environment: dict[str, str] = Field(
        default={}, description="variables that workers get besides those they have"
    )
    output: bool = Field(default=True, description="show what workers print, on standard error")
    loglevel: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="WARNING", description="of the workers' logging"
    )

    @field_validator("loglevel", mode="before")
    @classmethod
    def _in_capitals(cls, loglevel: Any) -> Any:
        known = isinstance(loglevel, str) and loglevel.upper() in logging.getLevelNamesMapping()
        return loglevel.upper() if known else loglevel

    @field_validator("environment")
    @classmethod
    def _not_ours(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name:
                raise ValueError(f"{name!r} can't be the name of a variable")
            if "\0" in value:
                raise ValueError(f"the value of {name} has a null character")
            if name.startswith("CLUSTER_") or name in {*CELERY_OVERRIDES, "MP_MAIN_FILE"}:
                raise ValueError(f"{name} is the cluster's own")
        return environment
