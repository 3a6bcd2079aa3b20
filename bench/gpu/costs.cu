// What a device takes for the mechanisms that a decoding step can be made of: launches, nodes of a
// graph, blocks that find nothing to do, conditional nodes, barriers, memory. costs.py compiles
// this with the nvcc of the machine and runs it; it stands alone and prints one JSON object, each
// row with its samples or with what kept it from being measured.
//
// A cost is a difference: a chain of many items against one of few, over the items more, so that
// what a launch and two events cost falls out. Every chain is dependent, item behind item.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr int kFew = 40;    // items of the short chain
constexpr int kMore = 200;  // and of the long one beyond it
constexpr int kWarmUp = 3;
constexpr int kRepeats = 25;
constexpr size_t kPhaseBytes = size_t{32} << 20;  // of a phase: about the Q matrix of an 8B model
constexpr size_t kMostBytes = size_t{1} << 30;
constexpr size_t kFetchedBytes = size_t{8} << 20;  // of a prefetch: small beside any L2 cache here
constexpr size_t kFetchedAtOnce = size_t{32} << 10;  // by one instruction
constexpr int64_t kWaitClocks = 30000;               // long beside what it takes to come
constexpr int kReadThreads = 256;
constexpr int kIdleThreads = 128;            // as the engine's products of few rows have
constexpr size_t kIdleShared = 16 << 10;     // likewise
constexpr uint32_t kNeverSum = 0x9e3779b9u;  // what the zeros that are read do not add up to
constexpr int kIfVersion = 12040;            // of runtime and driver
constexpr int kSwitchVersion = 12080;
constexpr int kProgrammaticVersion = 12030;  // edges of a graph that let kernels overlap

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#define CHECK(call) check(call, #call)

using Samples = std::vector<double>;

double median(Samples samples) {
  std::sort(samples.begin(), samples.end());
  const size_t half = samples.size() / 2;
  return samples.size() % 2 ? samples[half] : (samples[half - 1] + samples[half]) / 2;
}

// Kernels -----------------------------------------------------------------------------------------

// As the engine's kernels begin: wait for what is ahead, then let the next one begin.
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__global__ void empty_kernel() { await_inputs(); }

// A skipped layer's kernel: every block looks whether there is something to do, and leaves.
__global__ void __launch_bounds__(kIdleThreads) idle_kernel(const volatile int* flag, float* out) {
  extern __shared__ float room[];
  await_inputs();
  if (*flag == 0) return;
  room[threadIdx.x] = static_cast<float>(*flag);
  __syncthreads();
  out[blockIdx.x] = room[kIdleThreads - 1 - threadIdx.x];
}

__global__ void barrier_kernel(int count) {
  const auto grid = cooperative_groups::this_grid();
  for (int i = 0; i < count; ++i) grid.sync();
}

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Reads `count` times 16 bytes, four loads of a thread in flight; the first four, which depend on
// nobody, before it waits.
__global__ void __launch_bounds__(kReadThreads)
    read_kernel(const uint4* from, size_t count, uint32_t* out) {
  constexpr int kLoads = 4;
  const size_t step = static_cast<size_t>(gridDim.x) * kReadThreads;
  size_t i = static_cast<size_t>(blockIdx.x) * kReadThreads + threadIdx.x;
  uint32_t sum = 0;
  bool waited = false;
  for (; i < count; i += kLoads * step) {
    uint4 v[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      v[k] = i + k * step < count ? load_once(from + i + k * step) : uint4{0, 0, 0, 0};
    if (!waited) await_inputs();
    waited = true;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) sum += v[k].x + v[k].y + v[k].z + v[k].w;
  }
  if (!waited) await_inputs();
  if (sum == kNeverSum) *out = sum;
}

// Into the L2 cache: 128 bytes a thread, or, from compute capability 9.0 on, 32 KB.
__global__ void __launch_bounds__(kReadThreads) fetch_lines_kernel(const uint8_t* from) {
  const size_t i = static_cast<size_t>(blockIdx.x) * kReadThreads + threadIdx.x;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i * 128));
}
__global__ void fetch_bulk_kernel(const uint8_t* from) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                   from + static_cast<size_t>(blockIdx.x) * kFetchedAtOnce),
               "r"(static_cast<uint32_t>(kFetchedAtOnce)));
#endif
}

__global__ void wait_kernel() {
  const int64_t begin = clock64();
  while (clock64() - begin < kWaitClocks) {
  }
}

// Graphs ------------------------------------------------------------------------------------------

class Graph {
 public:
  explicit Graph(cudaGraph_t made) : graph_(made) {
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph_, 0);
    if (status != cudaSuccess) {
      cudaGraphDestroy(graph_);
      check(status, "cudaGraphInstantiate");
    }
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(exec_);
    cudaGraphDestroy(graph_);
  }
  cudaGraphExec_t exec() const { return exec_; }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

class Device {
 public:
  Device() {
    CHECK(cudaGetDeviceProperties(&properties_, 0));
    CHECK(cudaRuntimeGetVersion(&runtime_));
    CHECK(cudaDriverGetVersion(&driver_));
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin_));
    CHECK(cudaEventCreate(&end_));
    CHECK(cudaMalloc(&flag_, sizeof(int)));
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    bytes_ = std::min(kMostBytes, free / 4) / kPhaseBytes * kPhaseBytes;
    if (bytes_ < 2 * kPhaseBytes) throw std::runtime_error("too little device memory is free");
    CHECK(cudaMalloc(&memory_, bytes_));
    CHECK(cudaMemset(memory_, 0, bytes_));
    CHECK(cudaMalloc(&out_, 4096 * sizeof(float)));
    CHECK(cudaDeviceSynchronize());  // the stream waits for no other
  }

  const cudaDeviceProp& properties() const { return properties_; }
  int runtime() const { return runtime_; }
  int driver() const { return driver_; }
  cudaStream_t stream() const { return stream_; }
  int* flag() const { return flag_; }
  float* out() const { return out_; }
  uint8_t* memory() const { return memory_; }
  size_t bytes() const { return bytes_; }
  unsigned processors() const { return static_cast<unsigned>(properties_.multiProcessorCount); }

  void set_flag(int value) const {
    CHECK(cudaMemcpy(flag_, &value, sizeof value, cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
  }

  // Microseconds between two events around what `queue` puts into the stream.
  double time(const std::function<void()>& queue) const {
    CHECK(cudaEventRecord(begin_, stream_));
    queue();
    CHECK(cudaEventRecord(end_, stream_));
    CHECK(cudaStreamSynchronize(stream_));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    return 1e3 * ms;
  }

  // Microseconds an item: queue(count) puts a chain of that many into the stream.
  Samples each(const std::function<void(int)>& queue, int few = kFew, int more = kMore) const {
    Samples samples;
    for (int i = 0; i < kWarmUp + kRepeats; ++i) {
      const double small = time([&] { queue(few); }), large = time([&] { queue(few + more); });
      if (i >= kWarmUp) samples.push_back((large - small) / more);
    }
    return samples;
  }

  // The same of chains in graphs.
  Samples each_node(const std::function<cudaGraph_t(int)>& make, int few = kFew,
                    int more = kMore) const {
    const Graph small(make(few)), large(make(few + more));
    return each(
        [&](int count) {
          CHECK(cudaGraphLaunch(count == few ? small.exec() : large.exec(), stream_));
        },
        few, more);
  }

  // A graph of what `queue` puts into the stream.
  cudaGraph_t capture(const std::function<void()>& queue) const {
    CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      queue();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    CHECK(cudaStreamEndCapture(stream_, &graph));
    return graph;
  }

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared,
              bool overlap, Args... args) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, kernel, args...));
  }

  void require(int version, const char* what) const {
    if (runtime_ >= version && driver_ >= version) return;
    const auto dotted = [](int v) {
      return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
    };
    throw std::runtime_error(std::string(what) + " need CUDA " + dotted(version) +
                             "; the toolkit is " + dotted(runtime_) + ", the driver's " +
                             dotted(driver_));
  }

  void require_overlap() const {
    require(kProgrammaticVersion, "programmatic edges");
    if (properties_.major < 9)
      throw std::runtime_error("programmatic dependent launch needs compute capability 9.0");
  }

 private:
  cudaDeviceProp properties_ = {};
  int runtime_ = 0, driver_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  int* flag_ = nullptr;
  float* out_ = nullptr;
  uint8_t* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Throws if a captured graph of a chain lost the edges that let its kernels overlap.
void check_programmatic(cudaGraph_t graph) {
#if CUDART_VERSION >= 12030
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const auto edges_of = cudaGraphGetEdges;
#else
  const auto edges_of = cudaGraphGetEdges_v2;
#endif
  CHECK(edges_of(graph, nullptr, nullptr, nullptr, &count));
  std::vector<cudaGraphNode_t> from(count), to(count);
  std::vector<cudaGraphEdgeData> edges(count);
  CHECK(edges_of(graph, from.data(), to.data(), edges.data(), &count));
  for (const auto& edge : edges)
    if (edge.type != cudaGraphDependencyTypeProgrammatic)
      throw std::runtime_error("the capture made plain edges of programmatic ones");
#else
  (void)graph;
#endif
}

// A chain of `count` launches, in a graph; launch(i, overlap) puts one into the stream.
cudaGraph_t chain(const Device& device, int count, bool overlap,
                  const std::function<void(int, bool)>& launch) {
  cudaGraph_t graph = device.capture([&] {
    for (int i = 0; i < count; ++i) launch(i, overlap);
  });
  if (overlap) check_programmatic(graph);
  return graph;
}

Samples chained(const Device& device, bool overlap, const std::function<void(int, bool)>& launch,
                int few = kFew, int more = kMore) {
  if (overlap) device.require_overlap();
  return device.each_node([&](int count) { return chain(device, count, overlap, launch); }, few,
                          more);
}

// Conditional nodes -------------------------------------------------------------------------------

#if CUDART_VERSION >= 12040

// Decides, as a router does: the branch is what the flag in device memory says.
__global__ void decide_kernel(cudaGraphConditionalHandle handle, const volatile int* flag) {
  cudaGraphSetConditional(handle, static_cast<unsigned>(*flag));
}

cudaGraphNode_t add_kernel(cudaGraph_t graph, const cudaGraphNode_t* after, void* kernel,
                           void** arguments) {
  cudaKernelNodeParams params = {};
  params.func = kernel;
  params.gridDim = dim3(1);
  params.blockDim = dim3(1);
  params.kernelParams = arguments;
  cudaGraphNode_t node = nullptr;
  CHECK(cudaGraphAddKernelNode(&node, graph, after, after == nullptr ? 0 : 1, &params));
  return node;
}

// `count` pairs of a kernel that decides and a conditional node with `bodies` bodies, an empty
// kernel each.
cudaGraph_t conditionals(const Device& device, int count, cudaGraphConditionalNodeType type,
                         unsigned bodies) {
  cudaGraph_t graph = nullptr;
  CHECK(cudaGraphCreate(&graph, 0));
  try {
    cudaGraphNode_t last = nullptr;
    for (int i = 0; i < count; ++i) {
      cudaGraphConditionalHandle handle;
      CHECK(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault));
      const volatile int* flag = device.flag();
      void* arguments[] = {&handle, &flag};
      last = add_kernel(graph, i == 0 ? nullptr : &last, reinterpret_cast<void*>(decide_kernel),
                        arguments);
      cudaGraphNodeParams params = {};
      params.type = cudaGraphNodeTypeConditional;
      params.conditional.handle = handle;
      params.conditional.type = type;
      params.conditional.size = bodies;
      cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
      CHECK(cudaGraphAddNode(&node, graph, &last, nullptr, 1, &params));
#else
      CHECK(cudaGraphAddNode(&node, graph, &last, 1, &params));
#endif
      for (unsigned b = 0; b < bodies; ++b)
        add_kernel(params.conditional.phGraph_out[b], nullptr,
                   reinterpret_cast<void*>(empty_kernel), nullptr);
      last = node;
    }
  } catch (...) {
    cudaGraphDestroy(graph);
    throw;
  }
  return graph;
}

#endif

enum class Branch { kIf, kSwitch };

// A conditional node's own time: with the kernel that decides, less a kernel node's.
Samples conditional(const Device& device, Branch branch, int value, double kernel_node) {
  device.require(branch == Branch::kIf ? kIfVersion : kSwitchVersion,
                 branch == Branch::kIf ? "IF nodes" : "SWITCH nodes");
  if (!(kernel_node > 0)) throw std::runtime_error("a kernel node's own time is not known");
#if CUDART_VERSION >= 12040
  cudaGraphConditionalNodeType type = cudaGraphCondTypeIf;
#if CUDART_VERSION >= 12080
  if (branch == Branch::kSwitch) type = cudaGraphCondTypeSwitch;
#endif
  device.set_flag(value);
  Samples samples = device.each_node(
      [&](int count) { return conditionals(device, count, type, branch == Branch::kIf ? 1 : 2); });
  for (double& sample : samples) sample -= kernel_node;
  return samples;
#else
  (void)value;
  throw std::runtime_error("compiled without conditional nodes");
#endif
}

// Rows --------------------------------------------------------------------------------------------

struct Row {
  std::string key;
  std::string unit;
  Samples samples;
  std::string said;
};

class Rows {
 public:
  // Measures; what goes wrong becomes the row's words. Returns the median, 0 where there is none.
  double add(const std::string& key, const char* unit, const std::function<Samples()>& measure) {
    Row row{key, unit, {}, ""};
    try {
      row.samples = measure();
    } catch (const std::exception& error) {
      row.said = error.what();
    }
    rows_.push_back(row);
    return row.samples.empty() ? 0.0 : median(row.samples);
  }

  void print(const Device& device) const {
    std::printf("{\"device\": \"%s\", \"runtime\": %d, \"driver\": %d, \"rows\": [",
                escaped(device.properties().name).c_str(), device.runtime(), device.driver());
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Row& row = rows_[i];
      std::printf("%s\n {\"key\": \"%s\", \"unit\": \"%s\", \"said\": \"%s\", \"samples\": [",
                  i == 0 ? "" : ",", escaped(row.key).c_str(), row.unit.c_str(),
                  escaped(row.said).c_str());
      for (size_t j = 0; j < row.samples.size(); ++j)
        std::printf("%s%.6g", j == 0 ? "" : ", ", row.samples[j]);
      std::printf("]}");
    }
    std::printf("\n]}\n");
  }

 private:
  static std::string escaped(const std::string& text) {
    std::string made;
    for (const char c : text) {
      if (c == '"' || c == '\\') made += '\\';
      made += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return made;
  }

  std::vector<Row> rows_;
};

void launches(const Device& device, Rows& rows) {
  const auto empty = [&](int, bool overlap) { device.launch(empty_kernel, 1, 32, 0, overlap); };
  rows.add("stream_launch", "us", [&] {
    return device.each([&](int count) {
      for (int i = 0; i < count; ++i) empty(i, false);
    });
  });
  const double node = rows.add("kernel_node", "us", [&] { return chained(device, false, empty); });
  rows.add("kernel_node_overlap", "us", [&] { return chained(device, true, empty); });
  for (const bool overlap : {false, true}) {
    for (const unsigned blocks : {1u, 132u, 1000u, 4000u}) {
      const std::string key = "idle_" + std::to_string(blocks) + (overlap ? "_overlap" : "");
      rows.add(key, "us", [&] {
        device.set_flag(0);
        return chained(device, overlap, [&](int, bool o) {
          device.launch(idle_kernel, blocks, kIdleThreads, kIdleShared, o, device.flag(),
                        device.out());
        });
      });
    }
  }
  rows.add("if_not_taken", "us", [&] { return conditional(device, Branch::kIf, 0, node); });
  rows.add("if_taken", "us", [&] { return conditional(device, Branch::kIf, 1, node); });
  rows.add("switch_none", "us", [&] { return conditional(device, Branch::kSwitch, 2, node); });
  rows.add("switch_taken", "us", [&] { return conditional(device, Branch::kSwitch, 1, node); });
}

void barriers(const Device& device, Rows& rows) {
  for (const unsigned per_processor : {1u, 4u}) {
    rows.add("grid_barrier_" + std::to_string(per_processor), "us", [&] {
      if (device.properties().cooperativeLaunch == 0)
        throw std::runtime_error("the device has no cooperative launch");
      return device.each([&](int count) {
        void* arguments[] = {&count};
        CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(barrier_kernel),
                                          dim3(device.processors() * per_processor), dim3(256),
                                          arguments, 0, device.stream()));
      });
    });
  }
}

void memory(const Device& device, Rows& rows) {
  const size_t half = device.bytes() / 2;
  // GB/s out of microseconds for so many bytes.
  const auto rate = [](Samples samples, double bytes) {
    for (double& sample : samples) sample = bytes / sample / 1e3;
    return samples;
  };
  const auto read = [&](size_t begin, size_t bytes, bool overlap) {
    device.launch(read_kernel, device.processors() * 8, kReadThreads, 0, overlap,
                  reinterpret_cast<const uint4*>(device.memory() + begin), bytes / sizeof(uint4),
                  reinterpret_cast<uint32_t*>(device.out()));
  };
  rows.add("copy", "GB/s", [&] {
    const Samples samples = device.each(
        [&](int count) {
          for (int i = 0; i < count; ++i)
            CHECK(cudaMemcpyAsync(device.memory() + half, device.memory(), half,
                                  cudaMemcpyDeviceToDevice, device.stream()));
        },
        2, 8);
    return rate(samples, 2.0 * static_cast<double>(half));
  });
  const double bandwidth = rows.add("read", "GB/s", [&] {
    const Samples samples = device.each(
        [&](int count) {
          for (int i = 0; i < count; ++i) read(0, device.bytes(), false);
        },
        2, 8);
    return rate(samples, static_cast<double>(device.bytes()));
  });
  for (const char* kind : {"none", "lines", "bulk"}) {
    const std::string by = kind;
    rows.add("fetched_" + by, "us", [&] {
      if (by == "bulk" && device.properties().major < 9)
        throw std::runtime_error("bulk prefetches need compute capability 9.0");
      const auto fetched = static_cast<int>(device.bytes() / kFetchedBytes);
      return chained(
          device, false,
          [&](int i, bool) {
            const size_t begin = static_cast<size_t>(i % fetched) * kFetchedBytes;
            const uint8_t* from = device.memory() + begin;
            if (by == "bulk") {
              device.launch(fetch_bulk_kernel, kFetchedBytes / kFetchedAtOnce, 1, 0, false, from);
            } else {
              device.launch(fetch_lines_kernel,
                            by == "none" ? 1 : kFetchedBytes / 128 / kReadThreads, kReadThreads, 0,
                            false, from);
            }
            device.launch(wait_kernel, 1, 1, 0, false);
            read(begin, kFetchedBytes, false);
          },
          fetched, fetched);
    });
  }
  // Pieces in turn: before one comes again, all of memory has gone through the cache.
  const auto pieces = static_cast<int>(device.bytes() / kPhaseBytes);
  for (const bool overlap : {false, true}) {
    rows.add(overlap ? "phase_overlap" : "phase", "us", [&] {
      if (!(bandwidth > 0)) throw std::runtime_error("the bandwidth of reading is not known");
      Samples samples = chained(
          device, overlap,
          [&](int i, bool o) {
            read(static_cast<size_t>(i % pieces) * kPhaseBytes, kPhaseBytes, o);
          },
          pieces, 2 * pieces);
      for (double& sample : samples) sample -= static_cast<double>(kPhaseBytes) / (1e3 * bandwidth);
      return samples;
    });
  }
}

}  // namespace

int main() {
  try {
    const Device device;
    Rows rows;
    launches(device, rows);
    barriers(device, rows);
    memory(device, rows);
    rows.print(device);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
