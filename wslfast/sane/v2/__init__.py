"""Support for ``sane`` 2.x, the group's rewrite of 2026 (package ``sane`` of WeightCLIP)."""
