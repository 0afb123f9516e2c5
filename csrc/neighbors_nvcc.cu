// The kernels, compiled by nvcc: it takes HIP sources only through a .cu file. Not named like one of them, because
// hipify would overwrite x.hip with what it makes of x.cu.
#define DIFFNL_CUDA  // for gpu.h: hipify would turn a test of nvcc's own macro into one of HIP's

#include "candidates_gpu.hip"
#include "cell_list_gpu.hip"
#include "count_pairs_gpu.hip"
#include "neighbors.hip"
#include "pair_vectors_gpu.hip"
#include "scan_gpu.hip"
#include "sorted_rows_gpu.hip"
