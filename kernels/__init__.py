"""Triton kernels of :mod:`l2l_fast`, shipped as ``l2l_fast.kernels``; they know of tensors only.

A *tile* is 64 coordinates: the work of the four warps of a program at a time. :mod:`.tile` and :mod:`.scaled` say
how the state of a tile lies in memory, :mod:`.cell` holds the arithmetic, :mod:`.step` and :mod:`.backward` the
kernels.
"""

if __name__ != "l2l_fast.kernels":
    # Beside the repository's root on sys.path, `import kernels` may be meant for the package of that name, which others
    # look for and do without. An error would be theirs too, so this is a module in which nothing can be found.
    __path__ = []
