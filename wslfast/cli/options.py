"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Union

import tyro

Networks = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="FILE.py:NAME of networks that cannot be traced, as they were given to zoo import: no file holds their code. FILE.py is run."
    ),
]


def _number_or_none(given: list[str]) -> float | None:
    return None if given[0].lower() == "none" else float(given[0])


NumberOrNone = Annotated[
    Union[float, None],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|none",  # as TOML files spell it
        instance_from_str=_number_or_none,
        is_instance=lambda value: value is None or isinstance(value, (int, float)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]
