// A packed matrix times one token: twins of `*_matvec` in localv4/kernels/formats.py.

#include "matvec.cuh"

MATVEC(mx4, BlockProducts<Mx4>)
MATVEC(q4, BlockProducts<Q4>)
MATVEC(q8, BlockProducts<Q8>)
