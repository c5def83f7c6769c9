"""The ground floor of wslfast, imported as ``wslfast.kernels``: layer records, the readable twins, the fast paths.

Imports nothing of wslfast, and neither Triton nor a GPU is needed to import it.
"""
