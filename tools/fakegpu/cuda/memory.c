// Memory: the device's is addresses alone, which no access reaches, so that a model of any size takes no memory of
// the host. Nothing is computed, so what the host reads back is zeros: the same in every run, finite, and a legal token,
// length and index. Only what it has copied there itself, up to 1 MiB, it gets back if it asks for just that.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "fake.h"

enum { GRANULE = 2 << 20 };               // what cudaMalloc rounds to: no two blocks share a granule
#define RANGE (1ull << 42)                // of device addresses, never reused: a stale one stays recognisable

typedef struct Block {
    uintptr_t begin;
    size_t size;
    Kind kind;
    struct Block *next;
} Block;

// What the host has copied to an address.
typedef struct Sent {
    uintptr_t at;
    size_t size;
    void *content;
    struct Sent *next;
} Sent;

enum { MOST_SENT = 1 << 20, BUCKETS = 1 << 14 };
static Sent *sent[BUCKETS];
static Block *blocks;
static size_t taken;
static uintptr_t range, range_next;

static void *device_address(size_t size) {
    if (!range) {
        void *reserved = mmap(NULL, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) return NULL;
        range = range_next = ((uintptr_t)reserved + GRANULE - 1) / GRANULE * GRANULE;
    }
    size = (size + GRANULE - 1) / GRANULE * GRANULE;
    if (range_next + size > range + RANGE - GRANULE) return NULL;
    range_next += size;
    return (void *)(range_next - size);
}

static void add(void *address, size_t size, Kind kind) {
    Block *block = malloc(sizeof *block);
    *block = (Block){(uintptr_t)address, size, kind, blocks};
    blocks = block;
    if (kind == DEVICE) taken += size;
}

// The block is taken out of the list; its size, or 0 where there is none.
static size_t drop(void *address) {
    for (Block **place = &blocks; *place; place = &(*place)->next) {
        Block *block = *place;
        if (block->begin != (uintptr_t)address) continue;
        size_t size = block->size;
        if (block->kind == DEVICE) taken -= size;
        *place = block->next;
        free(block);
        return size;
    }
    return 0;
}

Kind fake_kind(const void *address) {
    uintptr_t at = (uintptr_t)address;
    Kind kind = PAGEABLE;
    fake_lock();
    if (range && at >= range && at < range + RANGE) kind = FREED;
    for (Block *block = blocks; block; block = block->next)
        if (at >= block->begin && at < block->begin + block->size) {
            kind = block->kind;
            break;
        }
    fake_unlock();
    return kind;
}

cudaError_t cudaMalloc(void **address, size_t size) {
    cudaError_t error = fake_stalls("cudaMalloc");
    if (error) return error;
    fake_lock();
    *address = taken + size > DEVICE_MEMORY - CONTEXT_MEMORY ? NULL : device_address(size);
    if (*address) add(*address, size, DEVICE);
    fake_unlock();
    return *address ? cudaSuccess : fake_error(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void *address) {
    if (!address) return cudaSuccess;
    cudaError_t error = fake_stalls("cudaFree");
    if (error) return error;
    fake_lock();
    size_t size = drop(address);
    fake_unlock();
    return size ? cudaSuccess : fake_violation(cudaErrorInvalidValue, "cudaFree of %p, which is no block", address);
}

cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t stream) { return cudaMalloc(address, size); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaFree(address); }

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    cudaError_t error = fake_stalls("cudaHostAlloc");
    if (error) return error;
    *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*address == MAP_FAILED) return fake_error(cudaErrorMemoryAllocation);
    fake_lock();
    add(*address, size, PINNED);
    fake_unlock();
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) {
    fake_lock();
    size_t size = drop(address);
    fake_unlock();
    if (size) munmap(address, size);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) {
    fake_lock();
    add(address, size, PINNED);
    fake_unlock();
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) {
    fake_lock();
    drop(address);
    fake_unlock();
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = DEVICE_MEMORY;
    fake_lock();
    *available = DEVICE_MEMORY - CONTEXT_MEMORY - taken;
    fake_unlock();
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    static const enum cudaMemoryType TYPES[] = {
        [PAGEABLE] = cudaMemoryTypeUnregistered, [PINNED] = cudaMemoryTypeHost, [DEVICE] = cudaMemoryTypeDevice,
        [FREED] = cudaMemoryTypeUnregistered};
    Kind kind = fake_kind(address);
    memset(found, 0, sizeof *found);
    found->type = TYPES[kind];
    if (kind == DEVICE || kind == PINNED) found->devicePointer = (void *)address;
    if (kind == PINNED) found->hostPointer = (void *)address;
    return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *found, CUpointer_attribute attribute, CUdeviceptr address) {
    Kind kind = fake_kind((void *)address);
    if (kind == PAGEABLE || kind == FREED) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)found = address;
    else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned *)found = kind == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
        *(int *)found = 0;
    else
        return CUDA_ERROR_NOT_SUPPORTED;
    return CUDA_SUCCESS;
}

static Sent **sent_to(const void *address) {
    Sent **place = &sent[(uintptr_t)address >> 4 & (BUCKETS - 1)];
    while (*place && (*place)->at != (uintptr_t)address) place = &(*place)->next;
    return place;
}

// Under the lock. content: NULL where it is no longer known.
static void send(void *to, const void *content, size_t size) {
    Sent **place = sent_to(to);
    if (!*place) {
        if (!content || size > MOST_SENT) return;
        *place = calloc(1, sizeof **place);
        (*place)->at = (uintptr_t)to;
    }
    Sent *kept = *place;
    kept->size = content && size <= MOST_SENT ? size : 0;
    if (!kept->size) return;
    kept->content = realloc(kept->content, size);
    memcpy(kept->content, content, size);
}

static void receive(void *to, const void *from, size_t size) {
    const Sent *kept = *sent_to(from);
    if (kept && kept->size == size)
        memcpy(to, kept->content, size);
    else
        memset(to, 0, size);
}

static cudaError_t copied(void *to, const void *from, size_t size, cudaStream_t stream, bool waits) {
    Kind target = fake_kind(to), source = fake_kind(from);
    if (target == FREED || source == FREED)
        return fake_violation(cudaErrorIllegalAddress, "copy of %zu bytes from or to freed memory", size);
    bool pageable = target == PAGEABLE || source == PAGEABLE;
    static const char *const NAMES[] = {[PAGEABLE] = "pageable", [PINNED] = "pinned", [DEVICE] = "device"};
    fake_log("copy %zu %s %s", size, NAMES[source], NAMES[target]);
    cudaError_t error = cudaSuccess;
    if (waits || pageable) error = fake_stalls(pageable ? "a copy of pageable memory" : "cudaMemcpy");
    if (error) return error;
    if (fake_work(stream, COPY, false, "copy")) return cudaSuccess;
    if (target != DEVICE && source != DEVICE) {
        memmove(to, from, size);
        return cudaSuccess;
    }
    fake_lock();
    if (source != DEVICE)
        send(to, from, size);
    else if (target != DEVICE)
        receive(to, from, size);
    else {
        const Sent *kept = *sent_to(from);
        send(to, kept && kept->size == size ? kept->content : NULL, size);
    }
    fake_unlock();
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return copied(to, from, size, 0, true);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copied(to, from, size, stream, false);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
    return copied(to, from, size, stream, false);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && !error; row++)
        error = copied((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, stream, false);
    return error;
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
    if (fake_kind(address) == FREED) return fake_violation(cudaErrorIllegalAddress, "memset of freed memory");
    if (!fake_work(stream, SET, false, "memset")) {
        fake_lock();
        send(address, NULL, 0);
        fake_unlock();
    }
    return cudaSuccess;
}

cudaError_t cudaMemset(void *address, int value, size_t size) { return cudaMemsetAsync(address, value, size, 0); }

// Symbols of device code hold nothing that the host reads back.
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    *address = (void *)symbol;
    return cudaSuccess;
}
