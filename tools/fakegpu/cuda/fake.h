// What the parts of the fake GPU share: memory that is real, streams and captures that are states, a log of all launches.
#pragma once
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "cuda.h"
#include "cuda_runtime_api.h"

// The device that is played: an H100 SXM. Source: CUDA C++ Programming Guide, technical specifications for 9.0.
enum {
    MULTIPROCESSORS = 132,
    WARP = 32,
    MAX_THREADS = 1024,
    MAX_GRID_YZ = 65535,
    REGISTERS = 65536,
    SHARED_DEFAULT = 48 << 10,
    SHARED_OPTIN = 227 << 10,
    SHARED_RESERVED = 1 << 10,
    SHARED_MULTIPROCESSOR = 228 << 10,
    L2_CACHE = 50 << 20,
    DRIVER_VERSION = 13000,
};
#define DEVICE_NAME "NVIDIA H100 80GB HBM3"
#define DEVICE_MEMORY (79ull << 30)
#define CONTEXT_MEMORY (500ull << 20)  // what a context takes of it

// One lock for all state. Held for moments only; never while a caller's function runs.
void fake_lock(void);
void fake_unlock(void);

// A line in the file named by FAKEGPU_LOG with this process's number behind, flushed at once; without it, nothing.
void fake_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
// The same, of what a GPU would refuse or a program should not do; also said on stderr. Returns `error`, remembered for
// cudaGetLastError.
cudaError_t fake_violation(cudaError_t error, const char *format, ...) __attribute__((format(printf, 2, 3)));
cudaError_t fake_error(cudaError_t error);  // remembered, where the program may well handle it

// memory.c
typedef enum { PAGEABLE, PINNED, DEVICE, FREED } Kind;
Kind fake_kind(const void *address);

// order.c
// For a call that asks the device for memory or waits for it: cudaSuccess, or the error where a capture forbids it. In a
// replayed step (fakegpu_step) it is a violation.
cudaError_t fake_stalls(const char *what);

typedef enum { KERNEL, COPY, SET, CHILD, NODE_KINDS } Node;
// Work on a stream: a node where the stream is being captured, and then true; a violation where the calling thread
// captures another one, for it would run once and never again.
bool fake_work(cudaStream_t stream, Node node, bool overlaps, const char *name);
