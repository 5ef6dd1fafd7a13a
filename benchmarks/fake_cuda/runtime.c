/* libcudart for a machine without a GPU, so that a CUDA build of torch runs on it: memory is the host's, copies are
   made, kernels are not. `fake_cuda.py` compiles it with all other symbols that torch wants, which return 0. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { CAPABILITY = 9, PROCESSORS = 132, MOST_THREADS = 1024, A_BLOCK_S_SHARED_MEMORY = 227 << 10 };

int cudaGetDeviceCount(int *count) {
    *count = 1;
    return 0;
}
int cudaGetDevice(int *device) {
    *device = 0;
    return 0;
}
int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

/* Fields of CUDA 13's cudaDeviceProp by their offsets in bytes. */
int cudaGetDeviceProperties(char *properties, int device) {
    static const struct {
        int at, value;
    } ints[] = {
        {304, 65536},       /* regsPerBlock */
        {308, 32},          /* warpSize */
        {320, MOST_THREADS}, /* maxThreadsPerBlock */
        {324, MOST_THREADS}, /* maxThreadsDim */
        {328, MOST_THREADS},
        {332, 64},
        {336, 0x7fffffff}, /* maxGridSize */
        {340, 65535},
        {344, 65535},
        {360, CAPABILITY}, /* major */
        {384, PROCESSORS}, /* multiProcessorCount */
        {596, 50 << 20},   /* l2CacheSize */
        {604, 2048},       /* maxThreadsPerMultiProcessor */
        {632, 65536},      /* regsPerMultiprocessor */
    };
    static const struct {
        int at;
        size_t value;
    } sizes[] = {
        {288, (size_t)80 << 30},         /* totalGlobalMem */
        {296, 48 << 10},                 /* sharedMemPerBlock */
        {312, 0x7fffffff},               /* memPitch */
        {624, 228 << 10},                /* sharedMemPerMultiprocessor */
        {672, A_BLOCK_S_SHARED_MEMORY},  /* sharedMemPerBlockOptin */
    };
    memset(properties, 0, 1008);
    strcpy(properties, "no GPU, an H100's properties");
    for (size_t i = 0; i < sizeof ints / sizeof *ints; ++i)
        memcpy(properties + ints[i].at, &ints[i].value, sizeof(int));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i)
        memcpy(properties + sizes[i].at, &sizes[i].value, sizeof(size_t));
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = MOST_THREADS; break;
        case 10: *value = 32; break; /* threads of a warp */
        case 16: *value = PROCESSORS; break;
        case 75: *value = CAPABILITY; break;
        case 76: *value = 0; break;
        case 97: *value = A_BLOCK_S_SHARED_MEMORY; break;
        default: *value = 1;
    }
    return 0;
}
int cudaDeviceGetPCIBusId(char *name, int size, int device) {
    strncpy(name, "0000:00:00.0", size);
    return 0;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
int cudaFuncGetAttributes(int *attributes, const void *function) {
    memset(attributes, 0, 100);
    attributes[6] = MOST_THREADS;
    attributes[7] = 64; /* registers */
    attributes[8] = attributes[9] = 10 * CAPABILITY; /* versions of PTX and of the binary */
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count) {
    *count = 4;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count) {
    *count = 4;
    return 0;
}

static int allocate(void **memory, size_t size) { return posix_memalign(memory, 512, size ? size : 512); }
int cudaMalloc(void **memory, size_t size) { return allocate(memory, size); }
int cudaMallocAsync(void **memory, size_t size, void *stream) { return allocate(memory, size); }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return allocate(memory, size); }
int cudaFree(void *memory) {
    free(memory);
    return 0;
}
int cudaFreeAsync(void *memory, void *stream) { return cudaFree(memory); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemGetInfo(size_t *available, size_t *total) {
    *available = (size_t)70 << 30;
    *total = (size_t)80 << 30;
    return 0;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    memcpy(to, from, size);
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *memory, int value, size_t size) {
    memset(memory, value, size);
    return 0;
}
int cudaMemsetAsync(void *memory, int value, size_t size, void *stream) { return cudaMemset(memory, value, size); }
int cudaPointerGetAttributes(int *attributes, const void *pointer) {
    memset(attributes, 0, 32);
    attributes[0] = 2; /* memory of a device */
    memcpy(attributes + 2, &pointer, sizeof pointer);
    memcpy(attributes + 4, &pointer, sizeof pointer);
    return 0;
}

/* Handles are numbers that nothing looks behind. */
static int handle(void **result) {
    static size_t last = 8;
    *result = (void *)(last += 8);
    return 0;
}
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return handle(stream); }
int cudaEventElapsedTime(float *milliseconds) {
    *milliseconds = 0;
    return 0;
}
static int zero(int *result) {
    *result = 0;
    return 0;
}
int cudaStreamGetPriority(void *stream, int *priority) { return zero(priority); }
int cudaStreamIsCapturing(void *stream, int *status) { return zero(status); }
int cudaStreamGetCaptureInfo(void *stream, int *status) { return zero(status); }

const char *cudaGetErrorString(int error) { return "an error of the fake runtime"; }
const char *cudaGetErrorName(int error) { return "fakeError"; }
void *__cudaRegisterFatBinary(void *image) {
    static void *handles[2];
    return handles;
}
int __cudaInitModule(void) { return 1; }

int cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, name) : NULL;
    if (status) *status = *function ? 0 : 1;
    return 0;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

/* Of cuBLAS. */
int cublasCreate_v2(void **result) { return handle(result); }
int cublasLtCreate(void **result) { return handle(result); }
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int wanted, void *results,
    int *found) {
    *found = 1;
    return 0;
}
