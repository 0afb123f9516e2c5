// The kernels, compiled by nvcc: it takes HIP sources only through a .cu file. Not named like one of them, because
// hipify would overwrite x.hip with what it makes of x.cu.
#include "cell_list_gpu.hip"
#include "hip_on_cuda.h"
#include "neighbors.hip"
#include "pair_vectors_gpu.hip"
#include "sorted_rows_gpu.hip"
