// A packed matrix times one token: twins of `*_matvec` in localv4/kernels/kquant_operations.py.

#include "matvec.cuh"
#include "kquant_token.cuh"

MATVEC(q4k, SuperblockProducts<Q4K>)
MATVEC(q6, SuperblockProducts<Q6>)
MATVEC(q3, SuperblockProducts<Q3>)
MATVEC(q2, SuperblockProducts<Q2>)
MATVEC(iq2, SuperblockProducts<Iq2>)
