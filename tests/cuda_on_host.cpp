// What the tests need of the CUDA kernels compiled for the host beside the ops themselves.
#include "cuda/block.h"

// Turns the order of threads and blocks round, or back.
extern "C" void run_backwards(int64_t backwards) { resm::cuda::backwards = backwards != 0; }
