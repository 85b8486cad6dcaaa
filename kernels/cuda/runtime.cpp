// runtime.h on the CUDA runtime, which is linked statically and needs no CUDA library but the driver's, opened when the first of these is called.
#include "runtime.h"

#include <cuda_runtime.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "nvml.h"

namespace shardmesh::cuda {
namespace {

constexpr int kMajor = CUDART_VERSION / 1000, kMinor = CUDART_VERSION % 1000 / 10;
// Drivers of one major version run programs of all its minor ones.      CUDA compatibility guide
constexpr const char* kDriverNeeded = kMajor == 12 ? "525.60" : kMajor == 13 ? "580" : "a newer one";

Problem problem_of(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }
cudaStream_t raw(Stream stream) { return static_cast<cudaStream_t>(stream); }

struct GraphNodes {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  std::vector<cudaGraphNode_t> nodes, after;  // after: what the next node waits for
  std::vector<cudaGraphNode_t> kernels;
  Edges edges = Edges::Plain;
  int programmatic_edges = 0;
};
thread_local GraphNodes* building = nullptr;
GraphNodes* graph_of(Stream stream) { return building && stream == building ? building : nullptr; }

// Programmatic edges are for kernels compiled with the wait: PTX of an older architecture that the driver has made into code of this card has none.
bool waits_for_grids(const void* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= kProgrammaticEdgesSm;
}

// `to` may start when all blocks of `from` have started; both are kernels. *known is false where the driver has no such edges; it is a plain one then.
cudaError_t add_programmatic_edge(cudaGraph_t graph, cudaGraphNode_t from, cudaGraphNode_t to, bool* known) {
  cudaGraphEdgeData edge{};
  edge.from_port = cudaGraphKernelNodePortLaunchCompletion;
  edge.type = cudaGraphDependencyTypeProgrammatic;
#if CUDART_VERSION >= 13000
  const cudaError_t status = cudaGraphAddDependencies(graph, &from, &to, &edge, 1);
#else
  const cudaError_t status = cudaGraphAddDependencies_v2(graph, &from, &to, &edge, 1);
#endif
  *known = status != cudaErrorCallRequiresNewerDriver && status != cudaErrorNotSupported;
  if (*known) return status;
  cudaGetLastError();
#if CUDART_VERSION >= 13000
  return cudaGraphAddDependencies(graph, &from, &to, nullptr, 1);
#else
  return cudaGraphAddDependencies(graph, &from, &to, 1);
#endif
}

// `add` is a cudaGraphAdd...Node that lacks its first four arguments; `kernel`: what the node runs, null for other nodes.
template <typename Add>
cudaError_t add_node(GraphNodes* graph, const Add& add, const void* kernel = nullptr) {
  std::vector<cudaGraphNode_t> plain = graph->after, early;
  if (kernel && graph->edges == Edges::Programmatic && waits_for_grids(kernel)) {
    const auto first = std::stable_partition(plain.begin(), plain.end(), [&](cudaGraphNode_t n) { return std::find(graph->kernels.begin(), graph->kernels.end(), n) == graph->kernels.end(); });
    early.assign(first, plain.end());
    plain.erase(first, plain.end());
  }
  cudaGraphNode_t node = nullptr;
  cudaError_t status = add(&node, graph->graph, plain.data(), plain.size());
  for (size_t i = 0; i < early.size() && status == cudaSuccess; i++) {
    bool known = false;
    status = add_programmatic_edge(graph->graph, early[i], node, &known);
    graph->programmatic_edges += known;
  }
  if (status != cudaSuccess) return status;
  graph->nodes.push_back(node);
  if (kernel) graph->kernels.push_back(node);
  graph->after.assign(1, node);
  return cudaSuccess;
}

Problem copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, Stream stream) {
  if (GraphNodes* graph = graph_of(stream))
    return problem_of(add_node(graph, [&](auto... place) { return cudaGraphAddMemcpyNode1D(place..., to, from, bytes, kind); }));
  return problem_of(cudaMemcpyAsync(to, from, bytes, kind, raw(stream)));
}

std::atomic<bool> abandoned{false};

constexpr int kPollsOfWord = 2048;  // between two looks at the stream
constexpr int kPollsOfHost = 128;   // between two looks at what the host may queue

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

std::string find_card(Card* card) {
  const std::string needed = "CUDA " + std::to_string(kMajor) + "." + std::to_string(kMinor) + " needs the NVIDIA driver " + kDriverNeeded + " or later";
  // A kernel that waits for another card must not wait for its loading too (peer_memory.h). The driver reads this once, when it is opened.
  [[maybe_unused]] static const int eager = setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (driver == 0) return "no NVIDIA driver here (libcuda.so.1 was looked for); " + needed;
  if (status == cudaErrorInsufficientDriver) return "the driver here knows CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + " only; " + needed;
  if (status != cudaSuccess) return std::string("no card can be used: ") + cudaGetErrorString(status);
  if (count == 0) return "the NVIDIA driver knows no card";
  cudaDeviceProp properties;
  if (const cudaError_t read = cudaGetDeviceProperties(&properties, 0); read != cudaSuccess) return std::string("the card's properties cannot be read: ") + cudaGetErrorString(read);
  *card = {properties.name, properties.major * 10 + properties.minor, properties.multiProcessorCount, properties.totalGlobalMem};
  int kilohertz = 0, bits = 0;
  char bus_id[32] = "";
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, 0) == cudaSuccess && cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0) == cudaSuccess)
    card->bandwidth_bytes = 2.0 * 1000.0 * kilohertz * (bits / 8.0);  // two transfers a cycle
  if (cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, 0) == cudaSuccess) {
    const ManagementFacts facts = management_facts(bus_id);
    card->power_watts = facts.power_watts;
    card->driver = facts.driver;
  }
  if (card->sm < 80) return card->name + " is sm_" + std::to_string(card->sm) + "; sm_80 or later is needed";
  return "";
}

size_t free_bytes() {
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

std::vector<std::string> blas_libraries() { return {"libcublasLt.so.13", "libcublasLt.so.12"}; }

void* allocate(Place place, size_t bytes, const char* what) {
  void* memory = nullptr;
  const cudaError_t status = place == Place::Card ? cudaMalloc(&memory, bytes) : cudaMallocHost(&memory, bytes);
  if (status == cudaSuccess) return memory;
  cudaGetLastError();  // an allocation that failed leaves the card as it was
  throw std::runtime_error(no_room(place, bytes, what, cudaGetErrorString(status)));
}

void release(Place place, void* memory) {
  if (abandoned) return;
  if (place == Place::Card) cudaFree(memory);
  else cudaFreeHost(memory);
}

Problem open_stream(Stream* stream) {
  cudaStream_t created = nullptr;
  const cudaError_t status = cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking);
  *stream = created;
  return problem_of(status);
}
void close_stream(Stream stream) { cudaStreamDestroy(raw(stream)); }

Problem copy_to_card(void* card, const void* host, size_t bytes, Stream stream) { return copy(card, host, bytes, cudaMemcpyHostToDevice, stream); }
Problem copy_to_host(void* host, const void* card, size_t bytes, Stream stream) { return copy(host, card, bytes, cudaMemcpyDeviceToHost, stream); }
Problem fill(void* card, uint8_t value, size_t bytes, Stream stream) {
  GraphNodes* graph = graph_of(stream);
  if (!graph) return problem_of(cudaMemsetAsync(card, value, bytes, raw(stream)));
  cudaMemsetParams parameters{};
  parameters.dst = card;
  parameters.value = value;
  parameters.elementSize = 1;
  parameters.width = bytes;
  parameters.height = 1;
  return problem_of(add_node(graph, [&](auto... place) { return cudaGraphAddMemsetNode(place..., &parameters); }));
}

const char* queue_kernel(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments, void* stream) {
  if (shared_bytes > 48 * 1024) {  // more must be asked for, once for each kernel; asking again costs nothing that matters
    const cudaError_t asked = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (asked != cudaSuccess) return problem_of(asked);
  }
  GraphNodes* graph = graph_of(stream);
  if (!graph) return problem_of(cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, raw(stream)));
  cudaKernelNodeParams parameters{};
  parameters.func = const_cast<void*>(kernel);
  parameters.gridDim = grid;
  parameters.blockDim = block;
  parameters.sharedMemBytes = static_cast<unsigned>(shared_bytes);
  parameters.kernelParams = arguments;
  return problem_of(add_node(graph, [&](auto... place) { return cudaGraphAddKernelNode(place..., &parameters); }, kernel));
}

Problem synchronise(Stream stream) { return problem_of(cudaStreamSynchronize(raw(stream))); }

Problem wait_for(const uint32_t* word, uint32_t value, Stream stream, int64_t deadline_ns, bool spin, const std::function<void()>& meanwhile) {
  const auto is_here = [&] { return has_counted_to(value, word); };
  if (meanwhile) meanwhile();
  for (uint64_t polls = 1; !is_here(); polls++) {
    if (!spin) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
    if (meanwhile && polls % kPollsOfHost == 0) meanwhile();
    if (polls % kPollsOfWord != 0) continue;
    const cudaError_t status = cudaStreamQuery(raw(stream));
    if (status == cudaSuccess) return is_here() ? nullptr : "the card has done everything and reported nothing";
    if (status != cudaErrorNotReady) return problem_of(status);
    if (now_ns() > deadline_ns) return "the card has not finished in time";
  }
  return nullptr;
}

bool settles(Stream stream, int64_t deadline_ns, bool spin) {
  while (cudaStreamQuery(raw(stream)) == cudaErrorNotReady) {
    if (now_ns() > deadline_ns) return false;
    if (!spin) std::this_thread::yield();
  }
  return true;
}

std::string lost_card() {
  cudaGetLastError();  // a fault that stays is not forgotten by asking
  const cudaError_t status = cudaStreamQuery(cudaStreamLegacy);
  return status == cudaSuccess || status == cudaErrorNotReady ? "" : cudaGetErrorString(status);
}

void abandon_card() { abandoned = true; }
bool is_abandoned() { return abandoned; }

Problem open_graph(Graph* graph, Edges edges) {
  auto* nodes = new GraphNodes;
  nodes->edges = edges;
  *graph = building = nodes;
  return problem_of(cudaGraphCreate(&nodes->graph, 0));
}

void come_after(Graph graph, const std::vector<int>& nodes) {
  auto& g = *static_cast<GraphNodes*>(graph);
  g.after.clear();
  for (const int node : nodes) g.after.push_back(g.nodes[static_cast<size_t>(node)]);
}

int node_count(Graph graph) { return static_cast<int>(static_cast<GraphNodes*>(graph)->nodes.size()); }
int programmatic_edge_count(Graph graph) { return static_cast<GraphNodes*>(graph)->programmatic_edges; }

// An uploaded graph is launched the first time as fast as later. It is there when this returns: the stream that launches it does not wait for the legacy one.
Problem finish_graph(Graph graph) {
  auto& g = *static_cast<GraphNodes*>(graph);
  building = nullptr;
  cudaError_t status = cudaGraphInstantiate(&g.executable, g.graph, 0);
  if (status == cudaSuccess) status = cudaGraphUpload(g.executable, cudaStreamLegacy);
  return problem_of(status == cudaSuccess ? cudaStreamSynchronize(cudaStreamLegacy) : status);
}

Problem launch_graph(Graph graph, Stream stream) { return problem_of(cudaGraphLaunch(static_cast<GraphNodes*>(graph)->executable, raw(stream))); }

void close_graph(Graph graph) {
  auto* g = static_cast<GraphNodes*>(graph);
  if (building == g) building = nullptr;
  if (g->executable) cudaGraphExecDestroy(g->executable);
  if (g->graph) cudaGraphDestroy(g->graph);
  delete g;
}

// From pageable memory cudaMemcpy may return when the bytes are staged, in front of their last hop, and our stream does not wait for the default one.
Problem copy_now(void* card, const void* host, size_t bytes) {
  const cudaError_t status = cudaMemcpy(card, host, bytes, cudaMemcpyHostToDevice);
  return problem_of(status == cudaSuccess ? cudaStreamSynchronize(cudaStreamLegacy) : status);
}

}  // namespace shardmesh::cuda
