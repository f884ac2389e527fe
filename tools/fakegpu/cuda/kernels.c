// Launches: the limits of the device are checked, and then nothing is computed. torch's kernels come by the runtime,
// under the names that its fat binaries register; Triton's by the driver, as cubins, of which are read the registers of a
// thread and the sizes of the parameters (.nv.info, as `cuobjdump -elf` prints it).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fake.h"

static const char *refusal(dim3 grid, dim3 block, size_t shared, size_t most_shared, int registers) {
    unsigned long threads = (unsigned long)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ)
        return "a grid out of range";
    if (!threads || threads > MAX_THREADS || block.z > 64) return "a block out of range";
    if (shared > most_shared) return "more shared memory than the kernel may take";
    if (registers * ((threads + WARP - 1) / WARP * WARP) > REGISTERS) return "more registers than a block may take";
    return NULL;
}

static cudaError_t launched(const char *name, dim3 grid, dim3 block, size_t shared, size_t most_shared, int registers,
                            cudaStream_t stream, bool overlaps) {
    enum cudaStreamCaptureStatus status;
    cudaStreamIsCapturing(stream, &status);
    fake_log("launch %s grid %u %u %u threads %u shared %zu overlaps %d captured %d", name, grid.x, grid.y, grid.z,
             block.x * block.y * block.z, shared, overlaps, status != cudaStreamCaptureStatusNone);
    const char *why = refusal(grid, block, shared, most_shared, registers);
    if (why)
        return fake_violation(cudaErrorInvalidConfiguration, "launch of %s with %s: grid %u %u %u, block %u %u %u, %zu of "
                              "%zu bytes shared, %d registers a thread", name, why, grid.x, grid.y, grid.z, block.x,
                              block.y, block.z, shared, most_shared, registers);
    fake_work(stream, KERNEL, overlaps, name);
    return cudaSuccess;
}

// torch's

typedef struct Named {
    const void *host;
    const char *name;
    size_t most_shared;
    struct Named *next;
} Named;

enum { BUCKETS = 1 << 16 };
static Named *names[BUCKETS];  // some 100,000

static Named *named(const void *host) {
    static Named unknown = {.name = "a kernel without a name", .most_shared = SHARED_OPTIN};
    for (Named *each = names[((uintptr_t)host >> 4) % BUCKETS]; each; each = each->next)
        if (each->host == host) return each;
    return &unknown;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size, int constant,
                       int global) {}

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *warp) {
    Named *made = malloc(sizeof *made);
    Named **place = &names[((uintptr_t)host >> 4) % BUCKETS];
    *made = (Named){host, name, SHARED_DEFAULT, *place};
    *place = made;
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(void **kernel, const void *host) {
    *kernel = (void *)host;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    Named *kernel = named(host);
    return launched(kernel->name, grid, block, shared, kernel->most_shared, 0, stream, false);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel((const void *)kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *host, void **arguments) {
    return cudaLaunchKernel(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                            config->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    return cudaLaunchKernel(host, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *host) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = MAX_THREADS;
    found->numRegs = 32;
    found->ptxVersion = found->binaryVersion = 90;
    found->maxDynamicSharedSizeBytes = (int)named(host)->most_shared;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > SHARED_OPTIN) return fake_violation(cudaErrorInvalidValue, "%d bytes of shared memory asked for", value);
    named(host)->most_shared = value;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *host, int threads,
                                                                   size_t shared, unsigned flags) {
    *count = 2048 / (threads ? threads : 1);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *host, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, host, threads, shared, 0);
}

// Triton's

enum { MOST_PARAMETERS = 256 };
typedef struct {
    char name[512];
    size_t most_shared;
    int registers, stack, num_parameters;
    uint16_t sizes[MOST_PARAMETERS];
} Cubin;

// Entries of a cubin's .nv.info sections: a format (4: sized data), a number, a size, data.
enum { SIZED = 4, PARAMETER = 0x17, STACK = 0x23, REGISTER_COUNT = 0x2f };

static void read_info(Cubin *cubin, const uint8_t *info, size_t size) {
    for (size_t at = 0; at + 4 <= size;) {
        uint8_t format = info[at], number = info[at + 1];
        uint16_t length;
        memcpy(&length, info + at + 2, sizeof length);
        if (format != SIZED) length = 0;
        const uint8_t *data = info + at + 4;
        at += 4 + length;
        if (at > size) return;
        uint32_t words[3] = {0};
        memcpy(words, data, length < sizeof words ? length : sizeof words);
        if (format != SIZED) continue;
        if (number == REGISTER_COUNT) cubin->registers = words[1];
        if (number == STACK) cubin->stack = words[1];
        if (number == PARAMETER) {
            int ordinal = words[1] & 0xffff;
            if (ordinal >= MOST_PARAMETERS) continue;
            cubin->sizes[ordinal] = words[2] >> 18;
            if (ordinal >= cubin->num_parameters) cubin->num_parameters = ordinal + 1;
        }
    }
}

// ELF, 64 bits: the section headers, and of each name and place.
static void read_cubin(Cubin *cubin, const uint8_t *image) {
    if (memcmp(image, "\177ELF", 4)) return;
    uint64_t headers, name_offset;
    uint16_t each, count, names_at;
    memcpy(&headers, image + 0x28, 8);
    memcpy(&each, image + 0x3a, 2);
    memcpy(&count, image + 0x3c, 2);
    memcpy(&names_at, image + 0x3e, 2);
    memcpy(&name_offset, image + headers + names_at * each + 0x18, 8);
    for (int section = 0; section < count; section++) {
        const uint8_t *header = image + headers + section * each;
        uint32_t name;
        uint64_t offset, size;
        memcpy(&name, header, 4);
        memcpy(&offset, header + 0x18, 8);
        memcpy(&size, header + 0x20, 8);
        if (!strncmp((const char *)image + name_offset + name, ".nv.info", 8)) read_info(cubin, image + offset, size);
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    cudaError_t error = fake_stalls("cuModuleLoadData");
    if (error) return (CUresult)error;
    Cubin *cubin = calloc(1, sizeof *cubin);
    cubin->most_shared = SHARED_DEFAULT;
    read_cubin(cubin, image);
    *module = (CUmodule)cubin;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return (CUresult)fake_violation(cudaErrorInvalidValue, "cuModuleLoad of %s, which is no file", path);
    fseek(file, 0, SEEK_END);
    size_t size = ftell(file);
    rewind(file);
    void *image = calloc(size + 64, 1);
    size = fread(image, 1, size, file);
    fclose(file);
    CUresult result = cuModuleLoadData(module, image);
    free(image);
    return result;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }  // its functions may be launched still

// A cubin of Triton's holds one function.
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    Cubin *cubin = (Cubin *)module;
    snprintf(cubin->name, sizeof cubin->name, "%s", name);
    fake_log("load %s registers %d stack %d", name, cubin->registers, cubin->stack);
    *function = (CUfunction)cubin;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    Cubin *cubin = (Cubin *)function;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = MAX_THREADS; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = cubin->registers; break;
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = cubin->stack; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = (int)cubin->most_shared; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value > SHARED_OPTIN)
        return (CUresult)fake_violation(cudaErrorInvalidValue, "%d bytes of shared memory asked for", value);
    ((Cubin *)function)->most_shared = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// The parameters of a launch, in hexadecimal; and whether one of them is an address in memory that was freed.
static bool parameters(const Cubin *cubin, void **values, char *text, size_t room) {
    bool stale = false;
    size_t size = 0;
    for (int i = 0; i < cubin->num_parameters && size + 24 < room; i++) {
        uint64_t value = 0;
        memcpy(&value, values[i], cubin->sizes[i] < 8 ? cubin->sizes[i] : 8);
        size += snprintf(text + size, room - size, " %llx", (unsigned long long)value);
        stale = stale || (cubin->sizes[i] == 8 && fake_kind((void *)value) == FREED);
    }
    return stale;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **values, void **extra) {
    Cubin *cubin = (Cubin *)function;
    bool overlaps = false;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            overlaps = config->attrs[i].value.programmaticStreamSerializationAllowed;
    dim3 grid = {config->gridDimX, config->gridDimY, config->gridDimZ};
    dim3 block = {config->blockDimX, config->blockDimY, config->blockDimZ};
    static __thread char text[8000];
    *text = '\0';
    if (values && parameters(cubin, values, text, sizeof text))
        return (CUresult)fake_violation(cudaErrorIllegalAddress, "launch of %s with an address of freed memory:%s",
                                        cubin->name, text);
    if (getenv("FAKEGPU_LOG_PARAMETERS")) fake_log("parameters %s%s", cubin->name, text);
    return (CUresult)launched(cubin->name, grid, block, config->sharedMemBytes, cubin->most_shared, cubin->registers,
                              (cudaStream_t)config->hStream, overlaps);
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **values,
                        void **extra) {
    CUlaunchConfig config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&config, function, values, extra);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **values) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, values, NULL);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t shared) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    return CUDA_SUCCESS;
}
