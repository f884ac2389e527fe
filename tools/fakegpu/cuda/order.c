// Order: streams, events, captures and graphs. Work is done the moment it is queued, so nothing ever has to wait; what is
// kept is what a capture forbids. Source: CUDA runtime API, "Stream Management", cudaStreamCaptureMode and
// cudaThreadExchangeStreamCaptureMode; CUDA programming guide, "Creating a Graph Using Stream Capture".
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "fake.h"

typedef struct Graph {
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;   // that began the capture
    bool invalid;       // by a call that a capture forbids
    int nodes[NODE_KINDS], overlapping;
    struct Graph *next;  // of those being captured
} Graph;

typedef struct Stream {
    Graph *graph;       // being captured
    bool origin;        // the capture began here
    bool blocking;      // the legacy stream waits for it
    bool unjoined;      // has work of a capture that its origin does not wait for yet
    long work;          // queued so far
    struct Stream *next;
} Stream;

typedef struct {
    Graph *graph;
    Stream *stream;
    long work;
    bool recorded;
    double milliseconds;
} Event;

static Stream legacy = {.blocking = true};
static Stream *streams = &legacy;
static Graph *captures;
static unsigned long long ids;
static __thread enum cudaStreamCaptureMode own_mode = cudaStreamCaptureModeGlobal;
static __thread bool in_step;

static Stream *of(cudaStream_t stream) { return (uintptr_t)stream <= 2 ? &legacy : (Stream *)stream; }

// Between 1 and 0 this thread replays a step, which asks for no memory and waits for nothing.
void fakegpu_step(int begins) { in_step = begins; }

// What a capture forbids while it lasts, by its mode and by that of the thread; the capture is lost.
static cudaError_t unsafe(const char *what) {
    bool forbidden = false;
    fake_lock();
    for (Graph *graph = captures; graph; graph = graph->next) {
        bool own = pthread_equal(graph->thread, pthread_self());
        bool conflicts = own_mode == cudaStreamCaptureModeGlobal
                             ? (own && graph->mode != cudaStreamCaptureModeRelaxed) ||
                                   (!own && graph->mode == cudaStreamCaptureModeGlobal)
                             : own_mode == cudaStreamCaptureModeThreadLocal && own &&
                                   graph->mode != cudaStreamCaptureModeRelaxed;
        if (conflicts) forbidden = graph->invalid = true;
    }
    fake_unlock();
    if (forbidden) return fake_violation(cudaErrorStreamCaptureUnsupported, "%s while a stream is captured", what);
    return cudaSuccess;
}

cudaError_t fake_stalls(const char *what) {
    if (in_step) fake_violation(cudaSuccess, "%s in a replayed step", what);
    return unsafe(what);
}

bool fake_work(cudaStream_t stream, Node node, bool overlaps, const char *name) {
    Stream *to = of(stream);
    bool stray = false;
    fake_lock();
    Graph *graph = to->graph;
    to->work++;
    if (graph) {
        graph->nodes[node]++;
        graph->overlapping += overlaps;
        to->unjoined = !to->origin;
    } else {
        for (Graph *other = captures; other; other = other->next)
            stray = stray || pthread_equal(other->thread, pthread_self());
    }
    fake_unlock();
    if (stray) fake_violation(cudaSuccess, "%s outside of the capture that this thread makes", name);
    return graph != NULL;
}

// Streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    Stream *made = calloc(1, sizeof *made);
    made->blocking = !(flags & cudaStreamNonBlocking);
    fake_lock();
    made->next = streams;
    streams = made;
    fake_unlock();
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }  // kept: an event may name it

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

// A call that cannot be made of a stream that is captured, whatever the modes.
static cudaError_t of_captured(Stream *stream, const char *what) {
    if (!stream->graph) return cudaSuccess;
    stream->graph->invalid = true;
    return fake_violation(cudaErrorStreamCaptureUnsupported, "%s of a stream that is captured", what);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    fake_log("wait stream");
    cudaError_t error = of_captured(of(stream), "cudaStreamSynchronize");
    return error ? error : fake_stalls("cudaStreamSynchronize");
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return of_captured(of(stream), "cudaStreamQuery"); }

cudaError_t cudaDeviceSynchronize(void) {
    fake_log("wait device");
    return fake_stalls("cudaDeviceSynchronize");
}

CUresult cuCtxSynchronize(void) { return (CUresult)cudaDeviceSynchronize(); }

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    if (!fake_work(stream, CHILD, false, "a host function")) function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
    cudaError_t error = of_captured(of(stream), "cudaStreamAddCallback");
    if (!error) callback(stream, cudaSuccess, data);
    return error;
}

// Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(Event));
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    Event *recorded = (Event *)event;
    Stream *on = of(stream);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    fake_lock();
    *recorded = (Event){on->graph, on, on->work, true, now.tv_sec * 1e3 + now.tv_nsec / 1e6};
    fake_unlock();
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

// Whether it was recorded in a capture: then it stands for a node, of which nothing can be asked.
static bool captured(Event *event) { return event->graph != NULL; }

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (captured((Event *)event)) return fake_violation(cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
    return unsafe("cudaEventQuery");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    fake_log("wait event");
    if (captured((Event *)event))
        return fake_violation(cudaErrorCapturedEvent, "cudaEventSynchronize of a captured event");
    return fake_stalls("cudaEventSynchronize");
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    Event *first = (Event *)begin, *second = (Event *)end;
    if (!first->recorded || !second->recorded || captured(first) || captured(second))
        return fake_violation(cudaErrorInvalidValue, "cudaEventElapsedTime of an event that was not recorded");
    double passed = second->milliseconds - first->milliseconds;
    *milliseconds = passed > 0.001 ? (float)passed : 0.001f;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    Event *awaited = (Event *)event;
    Stream *waiting = of(stream);
    if (!awaited->recorded) return cudaSuccess;
    bool alien = false;
    fake_lock();
    Graph *graph = awaited->graph;
    if (graph && !waiting->graph) {  // the stream joins the capture
        waiting->graph = graph;
        waiting->origin = false;
        waiting->unjoined = true;
    } else if (graph && waiting->graph == graph) {
        if (awaited->stream->work == awaited->work) awaited->stream->unjoined = false;
    } else if (waiting->graph) {
        alien = waiting->graph->invalid = true;
    }
    fake_unlock();
    if (alien) return fake_violation(cudaErrorStreamCaptureIsolation, "a captured stream waits for an event outside");
    return cudaSuccess;
}

// Captures

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    Stream *begun = of(stream);
    if (begun == &legacy) return fake_violation(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
    if (begun->graph) return fake_violation(cudaErrorIllegalState, "capture of a stream that is captured");
    Graph *graph = calloc(1, sizeof *graph);
    fake_lock();
    *graph = (Graph){.id = ++ids, .mode = mode, .thread = pthread_self(), .next = captures};
    captures = graph;
    begun->graph = graph;
    begun->origin = true;
    fake_unlock();
    fake_log("capture begins mode %d", mode);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *found) {
    Stream *ended = of(stream);
    Graph *graph = ended->graph;
    *found = NULL;
    if (!graph) return fake_error(cudaErrorIllegalState);
    if (graph->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(graph->thread, pthread_self()))
        return fake_violation(cudaErrorStreamCaptureWrongThread, "a capture ended by another thread");
    bool unjoined = false;
    fake_lock();
    for (Graph **place = &captures; *place; place = &(*place)->next)
        if (*place == graph) {
            *place = graph->next;
            break;
        }
    for (Stream *each = streams; each; each = each->next)
        if (each->graph == graph) {
            unjoined = unjoined || each->unjoined;
            each->graph = NULL;
            each->unjoined = each->origin = false;
        }
    fake_unlock();
    if (graph->invalid) return fake_error(cudaErrorStreamCaptureInvalidated);
    if (unjoined) return fake_violation(cudaErrorStreamCaptureUnjoined, "a stream that joined a capture was not joined");
    fake_log("capture ends kernels %d overlapping %d copies %d sets %d others %d", graph->nodes[KERNEL],
             graph->overlapping, graph->nodes[COPY], graph->nodes[SET], graph->nodes[CHILD]);
    *found = (cudaGraph_t)graph;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    Graph *graph = of(stream)->graph;
    *status = !graph           ? cudaStreamCaptureStatusNone
              : graph->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    Graph *held = of(stream)->graph;
    cudaStreamIsCapturing(stream, status);
    if (id) *id = held ? held->id : 0;
    if (graph) *graph = (cudaGraph_t)held;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = own_mode;
    own_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

// Graphs

static int size_of(const Graph *graph) {
    int size = 0;
    for (int node = 0; node < NODE_KINDS; node++) size += graph->nodes[node];
    return size;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    cudaError_t error = fake_stalls("cudaGraphInstantiate");
    if (error) return error;
    Graph *copy = malloc(sizeof *copy);
    *copy = *(Graph *)graph;
    *made = (cudaGraphExec_t)copy;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    fake_log("graph nodes %d", size_of((Graph *)graph));
    fake_work(stream, CHILD, false, "a graph");
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = size_of((Graph *)graph);
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies, cudaGraphEdgeData *edges,
                                         size_t *count) {
    *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }  // kept: an event may name it

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) { return cudaSuccess; }
