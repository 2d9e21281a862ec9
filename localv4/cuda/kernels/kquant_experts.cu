// The experts of one token: twins of `*_gate_up` and `*_down` in localv4/kernels/kquant_operations.py.

#include "experts.cuh"
#include "kquant_token.cuh"

EXPERTS(q4k, SuperblockProducts<Q4K>)
EXPERTS(q6, SuperblockProducts<Q6>)
EXPERTS(q3, SuperblockProducts<Q3>)
EXPERTS(q2, SuperblockProducts<Q2>)
EXPERTS(iq2, SuperblockProducts<Iq2>)
