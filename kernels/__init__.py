"""Triton kernels of :mod:`l2l_fast`, shipped as ``l2l_fast.kernels``."""

if __name__ != "l2l_fast.kernels":
    raise ImportError("import l2l_fast.kernels: the folder 'kernels' is not a package of its own")
