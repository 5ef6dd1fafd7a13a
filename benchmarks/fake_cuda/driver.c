/* libcuda for a machine without a GPU: what Triton calls of it succeeds and does nothing. A pointer of the host is one
   of the device. `fake_cuda.py` and tests/triton_kernels/test_without_gpu.py compile it. */
#include <stddef.h>

enum { A_BLOCK_S_SHARED_MEMORY = 227 << 10, MOST_THREADS = 1024, DEVICE_POINTER = 3 };

#define DOES_NOTHING(name) \
    int name(void) { return 0; }
DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuDevicePrimaryCtxGetState)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuLaunchCooperativeKernel)
DOES_NOTHING(cuLaunchKernel)
DOES_NOTHING(cuLaunchKernelEx)
DOES_NOTHING(cuModuleLoadDataEx)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
DOES_NOTHING(cuOccupancyMaxActiveClusters)
DOES_NOTHING(cuPointerGetAttributes)
DOES_NOTHING(cuTensorMapEncodeIm2col)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuDriverGetVersion)
DOES_NOTHING(cuLinkAddData_v2)
DOES_NOTHING(cuLinkComplete)
DOES_NOTHING(cuLinkCreate_v2)

/* Handles are numbers that nothing looks behind. */
static int handle(void **result) {
    *result = (void *)8;
    return 0;
}
int cuCtxGetCurrent(void **context) { return handle(context); }
int cuDevicePrimaryCtxRetain(void **context, int device) { return handle(context); }
int cuModuleGetFunction(void **function, void *module, const char *name) { return handle(function); }
int cuModuleLoad(void **module, const char *file) { return handle(module); }
int cuModuleLoadData(void **module, const void *image) { return handle(module); }

int cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = A_BLOCK_S_SHARED_MEMORY; /* which Triton asks for before it loads a kernel */
    return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? MOST_THREADS : 0;
    return 0;
}
int cuGetErrorString(int error, const char **text) {
    *text = "an error of the fake driver";
    return 0;
}
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
    *(unsigned long long *)value = attribute == DEVICE_POINTER ? pointer : 0;
    return 0;
}
