"""What every group of options is made of."""

import os.path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.config import JsonDict

MAY_CHANGE: JsonDict = {"may_change": True}
"""Marks what a resumed run may have changed: it does not enter the result, or only as the user then wants."""

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path as text; ~ is the home directory."""


class Section(BaseModel):
    """A group of options: immutable, strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
