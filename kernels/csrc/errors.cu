// Names for the error codes that the launches return.
#include "common.cuh"

BATON_EXPORT const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
