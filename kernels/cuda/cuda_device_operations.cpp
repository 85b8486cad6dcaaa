// Operations as launches.
#include <algorithm>
#include <cstring>
#include <optional>

#include "cuda_device.h"
#include "weight_layout.h"

namespace shardmesh::cuda {
namespace {

constexpr int kHalfAttentionBlocks = 3;  // of a multiprocessor, where K or V is f16

}  // namespace

void CudaDevice::fetch_rows(int buffer, int first, int count) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(copy_to_host(row(buffer, first), values(buffer, first), (static_cast<size_t>(count - 1) * static_cast<size_t>(b.stride) + static_cast<size_t>(b.width)) * 4, stream_));
}

void CudaDevice::push_rows(int buffer, int first, int count) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(copy_to_card(values(buffer, first), row(buffer, first), (static_cast<size_t>(count - 1) * static_cast<size_t>(b.stride) + static_cast<size_t>(b.width)) * 4, stream_));
}

void CudaDevice::embed(const Operation& o, const int32_t* tokens) {
  if (broken()) return;
  send_tokens(tokens);
  if (!broken()) look_up(o);
}

// Of a step that is no graph.
void CudaDevice::send_tokens(const int32_t* tokens) {
  const size_t bytes = static_cast<size_t>(rows_->tokens) * 4;
  std::memcpy(tokens_host_.as<void>(), tokens, bytes);
  queue(copy_to_card(tokens_card_.as<void>(), tokens_host_.as<void>(), bytes, to_));
}

// The rows of the tokens that are on the card already.
void CudaDevice::look_up(const Operation& o) { look_up(o, *this, began_.as<uint64_t>()); }

// Of those whose weights `owner` has; `o`: its operation.
void CudaDevice::look_up(const Operation& o, const CudaDevice& owner, uint64_t* began) {
  const WeightSlice& slice = owner.program().weights[static_cast<size_t>(o.weight)];
  const CardMatrix& matrix = owner.matrices_[static_cast<size_t>(o.weight)];
  queue(cuda::embed(slice.type, slice.rows.size(), slice.columns.size(), matrix.phase, matrix.data.as<uint8_t>(), tokens_, candidates_.as<cuda::Candidate>(), began, rows_->tokens,
                    static_cast<int32_t>(o.vocabulary[static_cast<size_t>(owner.program().rank)].from), values(o.out), shard_.buffer(o.out).stride, to_));
}

// The rows that other ranks of this card have weights of: looked up there.
void CudaDevice::gather_rows(const Operation& o) {
  for (const CudaDevice* other : group_->ranks()) {
    const std::vector<Operation>& all = other->program().operations;
    const auto embed = std::find_if(all.begin(), all.end(), [&](const Operation& e) { return e.kind == OperationKind::Embed && e.out == o.out; });
    if (other != this && !broken()) look_up(*embed, *other, nullptr);
  }
}

void CudaDevice::norm(const Operation& o) {
  if (broken()) return;
  const Buffer& in = shard_.buffer(o.in);
  queue(rms_norm(values(o.in), in.stride, vector(o.weight), o.epsilon, in.width, rows_of(o.in), values(o.out), shard_.buffer(o.out).stride, nullptr, to_));
}

bool CudaDevice::quantize(int action, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(cuda::quantize(values(buffer), b.stride, rows_of(buffer), b.width, groups(buffer), to_, check_of(action, buffer)));
  return true;
}

bool CudaDevice::norm_quantized(int action, const Operation& o) {
  if (!card(o.out).only_groups) return Device::norm_quantized(action, o);
  const Buffer& in = shard_.buffer(o.in);
  if (!broken())
    queue(rms_norm(values(o.in), in.stride, vector(o.weight), o.epsilon, in.width, rows_of(o.in), nullptr, 0, groups(o.out), to_, check_of(action, o.out)));
  return true;
}

bool CudaDevice::activation_quantized(int action, const Operation& o) {
  if (!card(o.out).only_groups) return Device::activation_quantized(action, o);
  const Buffer& gate = shard_.buffer(o.in);
  if (!broken())
    queue(cuda::gated_activation(values(o.in), gate.stride, values(o.in2), shard_.buffer(o.in2).stride, gate.width, rows_of(o.in), o.activation, nullptr, 0,
                                 groups(o.out), to_, check_of(action, o.out)));
  return true;
}

bool CudaDevice::check_rows(int action, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(cuda::check_rows(values(buffer), b.stride, rows_of(buffer), b.width, check_of(action, buffer), to_));
  return true;
}

Product CudaDevice::product(const Operation& o, int subtree_count, const Subtree* subtrees, float* out, int64_t out_stride, int64_t subtree_stride) const {
  const WeightSlice& slice = program().weights[static_cast<size_t>(o.weight)];
  const CardMatrix& matrix = matrices_[static_cast<size_t>(o.weight)];
  return {slice.type,        slice.rows.size(), slice.columns.size(), matrix.phase,
          matrix.data.as<uint8_t>(), card(o.in).groups.as<ActivationGroup>(), rows_of(o.in), static_cast<int>(o.segments.size()),
          o.segments.data(), subtree_count,     subtrees,             vector(o.bias),
          out,               out_stride,        subtree_stride,       matrix.tuning.decode_tiles,
          program().activations, values(o.in),  shard_.buffer(o.in).stride, card(o.in).bf16.as<Bf16Group>(),
          matrix.by_rows};
}

void CudaDevice::round_input(const Operation& o) {
  const Buffer& in = shard_.buffer(o.in);
  const Memory& bf16 = card(o.in).bf16;
  if (is_for_blas(o)) queue(round_bf16_rows(values(o.in), in.stride, rows_of(o.in), in.width, bf16.as<uint16_t>(), to_));
  else queue(round_bf16(values(o.in), in.stride, rows_of(o.in), in.width, bf16.as<Bf16Group>(), to_));
}

void CudaDevice::run(const Operation& o, const Product& product) {
  if (broken()) return;
  const bool few = product.tokens <= matrices_[static_cast<size_t>(o.weight)].tuning.decode_tokens_max;  // either product gives the same bits
  if (shard_.is_quantized(o.weight)) queue(few ? linear_decode(product, to_) : linear_prefill(product, to_));
  else if (is_for_blas(o)) run_blas(o, product);
  else if (is_bf16(o)) queue(few || product.by_rows ? linear_bf16_decode(product, to_) : linear_bf16_prefill(product, to_));
  else queue(few ? linear_float_decode(product, to_) : linear_float_prefill(product, to_));
}

// A subtree after the other: rows that pad the step to the number that was planned end where the next one begins.
void CudaDevice::run_blas(const Operation& o, const Product& product) {
  const std::vector<BlasPart>& parts = blas_parts(o);
  for (size_t s = 0; s < parts.size() && !broken(); s++)
    queue(blas_->run(parts[s].plan, parts[s].shape, operands(parts[s], o, product.out + static_cast<int64_t>(s) * product.subtree_stride), product.tokens, to_));
}

void CudaDevice::products(const std::vector<int>& operations) {
  std::optional<bool> rounded;  // for the library or for own kernels; they share their input
  for (const int index : operations) {
    if (broken()) return;
    const Operation& o = operation(index);
    if (is_bf16(o) && rounded != is_for_blas(o)) {
      round_input(o);
      rounded = is_for_blas(o);
    }
    const Subtree whole{0, static_cast<int>(o.segments.size())};
    run(o, product(o, 1, &whole, values(o.out), shard_.buffer(o.out).stride, 0));
  }
}

// With peers the sums leave at once: into the block of the exchange, which is ordinary memory to the card, or into memory that it writes directly.
void CudaDevice::partial_product(int index, uint8_t* block) {
  partial_ = block ? reinterpret_cast<float*>(block) : staging_;
  if (broken()) return;
  const Operation& o = operation(index);
  const std::vector<Subtree>& subtrees = shard_.own_subtrees(index);
  if (!is_ahead(index)) {
    if (is_bf16(o)) round_input(o);
    run(o, product(o, static_cast<int>(subtrees.size()), subtrees.data(), sums(), o.width, sum_rows_ * o.width));
  }
  if (program().ranks == 1 || building_ || reduces_with_peers_) return;
  const int64_t values = rows_->tokens * o.width;  // of a subtree, without the rows that pad
  for (size_t s = 0; s < subtrees.size() && !broken(); s++) {
    const int64_t i = static_cast<int64_t>(s);
    queue(copy_to_host(partial_ + i * values, sums() + i * sum_rows_ * o.width, static_cast<size_t>(values) * 4, to_));
  }
}

void CudaDevice::reduce(int index, int first_row, int rows, const float* const* sums) {
  if (broken()) return;
  if (reduces_with_peers_) return reduce_with_peers(index);
  const Operation& o = operation(index);
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], count = 0;
  const float* nodes[kSegmentsMax];
  int64_t strides[kSegmentsMax];
  const int64_t piece = rows * residual.width;
  float *host = sums_host_.as<float>(), *there = received_sums_.as<float>();
  for (int r = 0; r < program().ranks; r++) {
    const std::vector<Subtree>& subtrees = shard_.subtrees(index)[static_cast<size_t>(r)];
    const size_t values_of_rank = subtrees.size() * static_cast<size_t>(piece);
    const float* from = sums[r] ? there : this->sums() + first_row * residual.width;
    const int64_t apart = sums[r] ? piece : sum_rows_ * residual.width;
    for (const Subtree& s : subtrees) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      nodes[count] = from;
      strides[count] = residual.width;
      from += apart;
      count++;
    }
    if (!sums[r]) continue;
    const float* source = sums[r];  // of the wire: in received(), which the card reads directly
    if (host) {
      std::memcpy(host, sums[r], values_of_rank * 4);
      source = host;
      host += values_of_rank;
    }
    queue(copy_to_card(there, source, values_of_rank * 4, to_));
    there += values_of_rank;
  }
  if (broken()) return;
  float* out = values(o.out, first_row);
  // In front of a graph whose first node would be the norm.
  const size_t action = program().ranks > 1 && step_graphs_ && fuses_followers(step_graphs_->rows) ? action_of_reduce_[static_cast<size_t>(index)] : 0;
  if (action > 0 && norms(action))
    queue(finish_tree_norm(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), out, residual.stride, residual.width, rows, norm_after(action + 1, first_row), arrivals_.as<uint32_t>(), to_));
  else queue(finish_tree(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), out, residual.stride, residual.width, rows, to_));
}

// The sums of all ranks lie on this card, where their products have written them. `norm`: null, or the one behind it in the same launch.
void CudaDevice::reduce_with_ranks(int index, const NormAfter* norm) {
  const Operation& o = operation(index);
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], count = 0;
  const float* nodes[kSegmentsMax];
  int64_t strides[kSegmentsMax];
  for (int r = 0; r < program().ranks; r++) {
    const float* from = group_->ranks()[static_cast<size_t>(r)]->sums_of(reductions_);
    for (const Subtree& s : shard_.subtrees(index)[static_cast<size_t>(r)]) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      nodes[count] = from;
      strides[count] = residual.width;
      from += sum_rows_ * residual.width;
      count++;
    }
  }
  reductions_++;
  float* const out = values(o.out);
  if (norm)
    queue(finish_tree_norm(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), out, residual.stride, residual.width, rows_->tokens, *norm, arrivals_.as<uint32_t>(), to_));
  else queue(finish_tree(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), out, residual.stride, residual.width, rows_->tokens, to_));
}

// Own sums lie where the peers read them. `norm`: null, or the one behind it in the same launch.
void CudaDevice::reduce_with_peers(int index, const NormAfter* norm) {
  if (group_) return reduce_with_ranks(index, norm);
  const Operation& o = operation(index);
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], owner[kSegmentsMax], count = 0, fewest = kSegmentsMax;
  for (int r = 0; r < program().ranks; r++) {
    const std::vector<Subtree>& subtrees = shard_.subtrees(index)[static_cast<size_t>(r)];
    fewest = std::min(fewest, static_cast<int>(subtrees.size()));
    for (const Subtree& s : subtrees) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      owner[count] = r;
      count++;
    }
  }
  queue(peers_->reduce({o.cut.units, count, lo, hi, owner, vector(o.bias), values(o.out), residual.stride, residual.width, rows_->tokens}, count - fewest, index, to_, norm, arrivals_.as<uint32_t>()));
}

bool CudaDevice::store_kv(int action, const Operation& o) {
  if (!broken()) queue(rope_store_kv(rope_store(action, o), to_));
  return true;
}

RopeStore CudaDevice::rope_store(int action, const Operation& o) {
  const int index = static_cast<int>(&o - program().operations.data());
  const Operation& q = operation(index - 2);
  const int number = shard_.rope_table_number(index - 2);
  const Table& table = tables_[static_cast<size_t>(number)];
  const RopeTable host = shard_.rope_table_of(number);
  return {values(q.out), shard_.buffer(q.out).stride, q.heads, values(o.in), shard_.buffer(o.in).stride, values(o.in2), shard_.buffer(o.in2).stride,
          {host.dimensions, host.half_style, table.cosine.as<float>(), table.sine.as<float>()}, shard_.kv_layout(), kv_layer(o.layer), device_rows_, check_of(action, o.in)};
}

uint8_t* CudaDevice::kv_layer(int layer) const {
  return kv_.as<uint8_t>() + static_cast<size_t>(layer) * static_cast<size_t>(shard_.config().kv_blocks) * shard_.kv_layout().block_bytes;
}

AttentionStep CudaDevice::attention_step(const Operation& o) const {
  const AttentionShape& shape = shape_of(o);
  return {values(o.in),      shard_.buffer(o.in).stride, values(o.out), shard_.buffer(o.out).stride, o.heads,          static_cast<float>(o.scale), o.window, shard_.kv_layout(),
          kv_layer(o.layer), device_rows_,               shape.runs.as<HeadRun>(), shape.work,       shape.work_count, partials_.as<float>(),       shape.first_slot};
}

void CudaDevice::attention(const Operation& o) {
  if (broken()) return;
  const AttentionStep step = attention_step(o);
  if (has_integer_kv()) queue(cuda::attention(step, card_facts_.multiprocessors * shape_of(o).tuning.warps, to_));
  else queue(attention_f16(step, card_facts_.multiprocessors * kHalfAttentionBlocks, to_));
  if (!broken() && (building_ || shape_of(o).plan.first_slot.back() > 0)) queue(attention_join(step, to_));
}

void CudaDevice::gated_activation(const Operation& o) {
  if (broken()) return;
  const Buffer& gate = shard_.buffer(o.in);
  queue(cuda::gated_activation(values(o.in), gate.stride, values(o.in2), shard_.buffer(o.in2).stride, gate.width, rows_of(o.in), o.activation, values(o.out), shard_.buffer(o.out).stride, nullptr,
                               to_));
}

void CudaDevice::select_rows(const Operation& o) {
  if (broken()) return;
  if (!building_) {
    int32_t* which = select_host_.as<int32_t>();
    for (int r = 0; r < tail_rows_; r++) which[r] = outputs_[r].row;
    queue(copy_to_card(select_card_.as<void>(), which, static_cast<size_t>(tail_rows_) * 4, to_));
  }
  const Buffer& in = shard_.buffer(o.in);
  const int32_t* from = building_ ? selected_ : select_card_.as<int32_t>();
  if (!broken()) queue(cuda::select_rows(values(o.in), in.stride, from, tail_rows_, in.width, values(o.out), shard_.buffer(o.out).stride, to_));
}

void CudaDevice::find_candidates(int buffer, int32_t first_token) {
  if (broken() || (!building_ && ahead_ && ahead_->reports)) return;
  if (!building_) {
    HeadRow* settings = settings_host_.as<HeadRow>();
    for (int r = 0; r < tail_rows_; r++) settings[r] = {candidate_rows_[r].temperature, candidate_rows_[r].key.low, candidate_rows_[r].key.high};
    queue(copy_to_card(settings_card_.as<void>(), settings, static_cast<size_t>(tail_rows_) * sizeof(HeadRow), to_));
  }
  const Buffer& logits = shard_.buffer(buffer);
  const HeadRow* settings = building_ ? settings_ : settings_card_.as<HeadRow>();
  if (!broken())
    queue(head_candidates(values(buffer), logits.stride, tail_rows_, logits.width, first_token, settings, candidates_.as<cuda::Candidate>(), maxima_.as<float>(),
                          {head_parts_.as<cuda::Candidate>(), head_maxima_.as<float>(), arrivals_.as<uint32_t>()}, to_));
  reported_candidates_ = tail_rows_;
}

}  // namespace shardmesh::cuda
