"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import tyro

Networks = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="FILE.py:NAME of networks that cannot be traced, as they were given to zoo import: no file holds their code. FILE.py is run."
    ),
]
