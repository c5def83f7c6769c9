"""The Triton wing. Importing this package, its schedule and its budget needs no Triton; ``launch`` and the kernels do."""
