#include "cpu_device.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace shardmesh {
namespace {

// Values of gate and up of a block of columns, for all tokens of a step: they should stay in a second-level cache, beside the activations that they are made from.
constexpr size_t kGatedBlockBytes = size_t{256} << 10;
constexpr size_t gated_group_bytes(int tokens) { return static_cast<size_t>(tokens) * 2 * 32 * 4; }

// Threads share the rows of a product in blocks, each a multiple of the strips that kernels read at once.
int64_t row_block(int tokens) { return tokens == 1 ? 64 : 32; }
int row_blocks(int64_t rows, int tokens) { return static_cast<int>((rows + row_block(tokens) - 1) / row_block(tokens)); }

// How many items are worth a chunk of their own, each of so many weights: some 4 µs, where a core multiplies 100 values in a ns and fetches 32 weights.
int chunk_items(double weights, int tokens) { return static_cast<int>(std::max(1.0, 400'000.0 / (weights * std::max(3, tokens)))); }
int chunk_blocks(const Activations& in) { return chunk_items(static_cast<double>(row_block(in.tokens) * in.columns), in.tokens); }

// Parts of attention over several rows, for each thread.
constexpr int kAttentionParts = 4;

// Blocks [first, last) of the rows of a product.
void multiply_blocks(const KernelSet& kernels, LinearArguments a, int first, int last) {
  const int64_t block = row_block(a.in.tokens);
  a.first_row = first * block;
  a.row_count = std::min(a.weight->rows, last * block) - a.first_row;
  a.out += a.first_row;
  kernels.linear(a, {0, 1});
}

}  // namespace

CpuDevice::CpuDevice(const Shard& shard, ThreadTeam& team) : Device(shard), kernels_(shard.kernels()), team_(team) {
  const Program& p = shard.program();
  const ExecutorConfig& c = shard.config();

  // Weights: one arena in program order.
  matrices_.resize(p.weights.size());
  std::vector<size_t> offsets;
  size_t at = 0;
  for (size_t i = 0; i < p.weights.size(); i++) {
    offsets.push_back(at);
    if (p.weights[i].use == WeightUse::Vector) continue;
    PackedMatrix& m = matrices_[i];
    const MatrixSource source = shard.source_of(static_cast<int>(i), nullptr);
    m.type = source.type;
    m.rows = source.rows;
    m.columns = source.columns;
    m.bytes = kernels_.packed_bytes(source);
    at += align_to_line(m.bytes);
  }
  weight_memory_ = Memory(at, "the weights of this shard");
  for (size_t i = 0; i < p.weights.size(); i++) matrices_[i].data = weight_memory_.data() + offsets[i];

  kv_memory_ = Memory(static_cast<size_t>(p.kv.layers) * static_cast<size_t>(c.kv_blocks) * shard.kv_layout().block_bytes, "the KV cache (kvBlocks)");

  // Buffers, with the quantised form of those that a quantised product reads, and what the host lays down between operations.
  struct Room { size_t values, quantized; };
  std::vector<Room> rooms;
  size_t bytes = 0;
  for (size_t i = 0; i < p.buffers.size(); i++) {
    const Buffer& b = shard.buffer(static_cast<int>(i));
    rooms.push_back({bytes, 0});
    bytes += align_to_line(static_cast<size_t>(b.rows) * static_cast<size_t>(b.stride) * 4);
    if (!b.quantized) continue;
    rooms.back().quantized = bytes;
    bytes += align_to_line(kernels_.activation_bytes(p.activations, b.rows, b.width));
  }
  const size_t staging_at = bytes;
  bytes += align_to_line(shard.staging_bytes());
  const size_t received_at = bytes;
  bytes += align_to_line(shard.received_bytes());
  buffer_memory_ = Memory(bytes + kLineBytes, "the buffers of a step (stepTokensMax)");
  for (size_t i = 0; i < rooms.size(); i++) {
    const Buffer& b = shard.buffer(static_cast<int>(i));
    host_.push_back({reinterpret_cast<float*>(buffer_memory_.data() + rooms[i].values), b.stride});
    quantized_.push_back(b.quantized ? buffer_memory_.data() + rooms[i].quantized : nullptr);
  }
  staging_ = reinterpret_cast<float*>(buffer_memory_.data() + staging_at);
  if (shard.received_bytes() > 0) received_ = reinterpret_cast<float*>(buffer_memory_.data() + received_at);

  // Scratch of attention and gated products, for each thread.
  for (const Action& a : shard.actions())
    if (a.kind == ActionKind::GatedProducts) scratch_stride_ = align_to_line(std::max(kGatedBlockBytes, gated_group_bytes(c.step_tokens_max)));
  for (const Operation& o : p.operations)
    if (o.kind == OperationKind::Attention) scratch_stride_ = std::max(scratch_stride_, align_to_line(kernels_.attention_scratch_bytes(o.heads, o.head_size, c.step_tokens_max)));
  scratch_bytes_ = scratch_stride_ * static_cast<size_t>(c.threads) + kLineBytes;
  scratch_storage_ = std::make_unique<uint8_t[]>(scratch_bytes_);
  scratch_ = reinterpret_cast<uint8_t*>(align_to_line(reinterpret_cast<uintptr_t>(scratch_storage_.get())));
}

WeightReport CpuDevice::load_matrix(int weight, const MatrixSource& source) {
  PackedMatrix& matrix = matrices_[static_cast<size_t>(weight)];
  kernels_.pack(source, &matrix, Part{0, 1});
  return {matrix.repack_error, matrix.bytes};
}

uint8_t* CpuDevice::kv_layer(int layer) const {
  return kv_memory_.data() + static_cast<size_t>(layer) * static_cast<size_t>(shard_.config().kv_blocks) * shard_.kv_layout().block_bytes;
}

Activations CpuDevice::activations(int buffer) const {
  const Buffer& b = shard_.buffer(buffer);
  return {row(buffer, 0), b.stride, rows_of(buffer), b.width, quantized_[static_cast<size_t>(buffer)], shard_.program().activations};
}

Activations CpuDevice::quantized_by(int action, int buffer) const {
  Activations result = activations(buffer);
  result.meets_bytes = shard_.actions()[static_cast<size_t>(action)].meets_bytes;
  return result;
}

LinearArguments CpuDevice::whole_product(int index, const Subtree& all) const {
  const Operation& o = shard_.program().operations[static_cast<size_t>(index)];
  return {&matrices_[static_cast<size_t>(o.weight)], activations(o.in), all.count, o.segments.data(), 1, &all, shard_.vector(o.bias), row(o.out, 0), shard_.buffer(o.out).stride, 0};
}

void CpuDevice::embed(const Operation& o, const int32_t* tokens) {
  const Range own = o.vocabulary[static_cast<size_t>(shard_.program().rank)];
  const PackedMatrix& matrix = matrices_[static_cast<size_t>(o.weight)];
  share(team_, static_cast<double>(rows_->tokens) * static_cast<double>(matrix.columns), [&](Part part) {
    for (int t = part.index; t < rows_->tokens; t += part.count)
      if (tokens[t] >= own.from && tokens[t] < own.to) kernels_.read_row(matrix, tokens[t] - own.from, row(o.out, t));
  });
}

void CpuDevice::norm(const Operation& o) {
  const Buffer& in = shard_.buffer(o.in);
  const Buffer& out = shard_.buffer(o.out);
  const int rows = rows_of(o.in);
  share(team_, rows == 1 ? 0 : 2.0 * rows * static_cast<double>(in.width), [&](Part part) {
    kernels_.rms_norm(row(o.in, 0), in.stride, shard_.vector(o.weight), o.epsilon, in.width, rows, row(o.out, 0), out.stride, part);
  });
}

template <typename Work>
bool CpuDevice::share_finite(int action, double cost, const Work& work) {
  std::atomic<bool> finite{true};
  share(team_, cost, [&](Part part) {
    if (!work(part)) finite = false;
  });
  return note_finite(action, finite);
}

bool CpuDevice::note_finite(int action, bool finite) {
  if (!finite) problem_ = {action, -1, ""};
  return finite;
}

bool CpuDevice::quantize(int action, int buffer) {
  const Activations in = quantized_by(action, buffer);
  return share_finite(action, 4.0 * in.tokens * static_cast<double>(in.columns), [&](Part part) { return kernels_.quantize_activations(in, part); });
}

// Whole rows of a thread: what it has normed it quantises at once.
bool CpuDevice::norm_quantized(int action, const Operation& o) {
  const Activations out = quantized_by(action, o.out);
  const int64_t in_stride = shard_.buffer(o.in).stride;
  return share_finite(action, out.tokens == 1 ? 0 : 6.0 * out.tokens * static_cast<double>(out.columns), [&](Part part) {
    bool finite = true;
    for (int t = out.tokens * part.index / part.count; t < out.tokens * (part.index + 1) / part.count; t++) {
      const Part row_t{t, out.tokens};
      kernels_.rms_norm(row(o.in, 0), in_stride, shard_.vector(o.weight), o.epsilon, out.columns, out.tokens, row(o.out, 0), out.x_stride, row_t);
      finite &= kernels_.quantize_activations(out, row_t);
    }
    return finite;
  });
}

// Products that read the same buffer, so of the same columns: their rows are one row of blocks.
void CpuDevice::products(const std::vector<int>& operations) {
  const Activations in = activations(shard_.program().operations[static_cast<size_t>(operations[0])].in);
  int blocks = 0;
  double cost = 0;
  for (const int index : operations) {
    const PackedMatrix& m = matrices_[static_cast<size_t>(shard_.program().operations[static_cast<size_t>(index)].weight)];
    blocks += row_blocks(m.rows, in.tokens);
    cost += static_cast<double>(m.rows) * static_cast<double>(m.columns);
  }
  share_items(team_, cost, blocks, chunk_blocks(in), [&](Chunk chunk) {
    int before = 0;
    for (const int index : operations) {
      const Subtree all{0, static_cast<int>(shard_.program().operations[static_cast<size_t>(index)].segments.size())};
      const LinearArguments product = whole_product(index, all);
      const int own = row_blocks(product.weight->rows, in.tokens), first = std::max(chunk.first - before, 0), last = std::min(chunk.last - before, own);
      if (first < last) multiply_blocks(kernels_, product, first, last);
      before += own;
    }
  });
}

// A thread takes its columns in blocks whose values stay in its cache between product, activation and quantising.
bool CpuDevice::gated_products(int action, const std::vector<int>& gate_and_up, const Operation& o) {
  const Activations whole = quantized_by(action, o.out);
  const Subtree all[2] = {{0, static_cast<int>(shard_.program().operations[static_cast<size_t>(gate_and_up[0])].segments.size())},
                          {0, static_cast<int>(shard_.program().operations[static_cast<size_t>(gate_and_up[1])].segments.size())}};
  const LinearArguments products[2] = {whole_product(gate_and_up[0], all[0]), whole_product(gate_and_up[1], all[1])};
  const int64_t groups = whole.columns / 32, block_groups = std::max<int64_t>(1, static_cast<int64_t>(kGatedBlockBytes / gated_group_bytes(whole.tokens)));
  const double cost = 2.0 * static_cast<double>(whole.columns) * static_cast<double>(products[0].in.columns) + 20.0 * whole.tokens * static_cast<double>(whole.columns);
  std::atomic<bool> finite{true};
  const int grain = std::max(2, chunk_items(2.0 * 32 * static_cast<double>(products[0].in.columns), whole.tokens));
  share_items(team_, cost, static_cast<int>(groups), grain, [&](Chunk chunk) {
    float* const values = reinterpret_cast<float*>(scratch_ + static_cast<size_t>(chunk.thread) * scratch_stride_);
    for (int64_t group = chunk.first; group < chunk.last; group += block_groups) {
      const int64_t first = group * 32, width = std::min(block_groups, chunk.last - group) * 32;
      for (int i = 0; i < 2; i++) {
        LinearArguments product = products[i];
        product.first_row = first;
        product.row_count = width;
        product.out = values + i * width;
        product.out_stride = 2 * width;
        kernels_.linear(product, {0, 1});
      }
      kernels_.gated_activation(values, 2 * width, values + width, 2 * width, width, whole.tokens, o.activation, values, 2 * width, {0, 1});
      Activations block = whole;
      block.x = values;
      block.x_stride = 2 * width;
      block.first_column = first;
      block.column_count = width;
      if (!kernels_.quantize_activations(block, {0, 1})) finite = false;
    }
  });
  return note_finite(action, finite);
}

void CpuDevice::partial_product(int index, uint8_t* block) {
  const Operation& o = shard_.program().operations[static_cast<size_t>(index)];
  const std::vector<Subtree>& subtrees = shard_.own_subtrees(index);
  partial_ = block ? reinterpret_cast<float*>(block) : staging_;
  const Activations in = activations(o.in);
  const LinearArguments arguments{&matrices_[static_cast<size_t>(o.weight)], in, static_cast<int>(o.segments.size()), o.segments.data(), static_cast<int>(subtrees.size()),
                                  subtrees.data(), nullptr, partial_, o.width, in.tokens * o.width};
  share_items(team_, static_cast<double>(o.width) * static_cast<double>(in.columns), row_blocks(o.width, in.tokens), chunk_blocks(in),
              [&](Chunk chunk) { multiply_blocks(kernels_, arguments, chunk.first, chunk.last); });
}

void CpuDevice::reduce(int index, int first_row, int rows, const float* const* sums) {
  const Operation& o = shard_.program().operations[static_cast<size_t>(index)];
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], count = 0;
  const float* nodes[kSegmentsMax];
  int64_t strides[kSegmentsMax];
  for (int r = 0; r < shard_.program().ranks; r++) {
    const float* values = sums[r] ? sums[r] : partial_ + first_row * residual.width;
    const int64_t apart = (sums[r] ? rows : rows_->tokens) * residual.width;
    for (const Subtree& s : shard_.subtrees(index)[static_cast<size_t>(r)]) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      nodes[count] = values;
      strides[count] = residual.width;
      values += apart;
      count++;
    }
  }
  share(team_, static_cast<double>(rows) * static_cast<double>(residual.width) * (count + 1), [&](Part part) {
    kernels_.finish_tree(o.cut.units, count, lo, hi, nodes, strides, shard_.vector(o.bias), row(o.out, first_row), residual.stride, residual.width, rows, part);
  });
}

void CpuDevice::rope(int index) {
  const Operation& o = shard_.program().operations[static_cast<size_t>(index)];
  const Buffer& b = shard_.buffer(o.out);
  const RopeTable table = shard_.rope_table(index);
  share(team_, rows_->tokens == 1 ? 0 : 4.0 * rows_->tokens * static_cast<double>(b.width),
        [&](Part part) { kernels_.rope(row(o.out, 0), b.stride, o.heads, o.head_size, table, *rows_, part); });
}

bool CpuDevice::store_kv(int action, const Operation& o) {
  const Buffer& k = shard_.buffer(o.in);
  const Buffer& v = shard_.buffer(o.in2);
  return share_finite(action, 12.0 * rows_->tokens * static_cast<double>(k.width), [&](Part part) {
    return kernels_.store_kv(row(o.in, 0), k.stride, row(o.in2, 0), v.stride, shard_.kv_layout(), kv_layer(o.layer), *rows_, part);
  });
}

void CpuDevice::attention(const Operation& o) {
  const Buffer& q = shard_.buffer(o.in);
  double keys = 0;
  for (int t = 0; t < rows_->tokens; t++) keys += rows_->positions[t] + 1;
  const int parts = team_.size() * (rows_->tokens >= 2 * team_.size() ? kAttentionParts : 1);
  share_items(team_, keys * static_cast<double>(q.width), parts, 1, [&](Chunk chunk) {
    const AttentionArguments arguments{row(o.in, 0), q.stride, row(o.out, 0), shard_.buffer(o.out).stride, o.heads, o.kv_head.data(), static_cast<float>(o.scale), o.window,
                                       &shard_.kv_layout(), kv_layer(o.layer), rows_, scratch_ + static_cast<size_t>(chunk.thread) * scratch_stride_};
    for (int i = chunk.first; i < chunk.last; i++) kernels_.attention(arguments, Part{i, parts});
  });
}

void CpuDevice::gated_activation(const Operation& o) {
  const Buffer& gate = shard_.buffer(o.in);
  const int rows = rows_of(o.in);
  share(team_, 16.0 * rows * static_cast<double>(gate.width), [&](Part part) {
    kernels_.gated_activation(row(o.in, 0), gate.stride, row(o.in2, 0), shard_.buffer(o.in2).stride, gate.width, rows, o.activation, row(o.out, 0), shard_.buffer(o.out).stride, part);
  });
}

bool CpuDevice::check_rows(int action, int buffer) {
  for (int t = 0; t < rows_of(buffer); t++) {
    if (kernels_.all_finite(row(buffer, t), shard_.buffer(buffer).width)) continue;
    problem_ = {action, t, ""};
    return false;
  }
  return true;
}

void CpuDevice::select_rows(const Operation& o) {
  for (int r = 0; r < tail_rows_; r++) std::memcpy(row(o.out, r), row(o.in, outputs_[r].row), static_cast<size_t>(shard_.buffer(o.in).width) * 4);
}

}  // namespace shardmesh
