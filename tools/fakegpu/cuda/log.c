// Errors, the log, and the one lock.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "fake.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last;

void fake_lock(void) { pthread_mutex_lock(&lock); }
void fake_unlock(void) { pthread_mutex_unlock(&lock); }

// One write a line, so that threads and children do not mix theirs.
static void written(const char *head, const char *format, va_list rest) {
    static __thread char line[1 << 16];
    int size = snprintf(line, sizeof line, "%s", head);
    size += vsnprintf(line + size, sizeof line - size - 1, format, rest);
    if (size > (int)sizeof line - 2) size = sizeof line - 2;
    line[size++] = '\n';
    if (*head) (void)!write(STDERR_FILENO, line, size);
    static FILE *file;
    static pid_t owner;
    const char *path = getenv("FAKEGPU_LOG");
    if (!path) return;
    pthread_mutex_lock(&lock);
    if (!file || owner != getpid()) {  // a forked child writes a file of its own
        char name[4096];
        snprintf(name, sizeof name, "%s.%d", path, getpid());
        file = fopen(name, "a");
        owner = getpid();
    }
    if (file) {
        fwrite(line, 1, size, file);
        fflush(file);
    }
    pthread_mutex_unlock(&lock);
}

void fake_log(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    written("", format, rest);
    va_end(rest);
}

// A line from the program itself.
void fakegpu_note(const char *text) { fake_log("%s", text); }
void fakegpu_violation(const char *text) { fake_violation(cudaSuccess, "%s", text); }

cudaError_t fake_error(cudaError_t error) {
    if (error) last = error;
    return error;
}

cudaError_t fake_violation(cudaError_t error, const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    written("VIOLATION ", format, rest);
    va_end(rest);
    return fake_error(error);
}

cudaError_t cudaGetLastError(void) {
    cudaError_t found = last;
    last = cudaSuccess;
    return found;
}

cudaError_t cudaPeekAtLastError(void) { return last; }

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "a captured stream was not joined"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
};

static const char *found(int code, bool name) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return name ? ERRORS[i].name : ERRORS[i].text;
    return "an error that the fake GPU has no words for";
}

const char *cudaGetErrorName(cudaError_t error) { return found(error, true); }
const char *cudaGetErrorString(cudaError_t error) { return found(error, false); }

// Codes of the driver are those of the runtime where the fake gives any.
CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = found(error, true);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = found(error, false);
    return CUDA_SUCCESS;
}
