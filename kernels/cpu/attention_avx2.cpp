// Attention and KV writing of the avx2 set: attention_lanes16.h over lanes16_avx2.h.
#include "lanes16_avx2.h"
// Lanes and Dots are parameters of what follows.
#include "attention_dots_avx2.h"
#include "attention_lanes16.h"
#include "operations.h"

namespace shardmesh::avx2 {

bool store_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, const KvLayout& layout, uint8_t* cache, const StepRows& rows, Part part) {
  return store_kv_parts(k, k_stride, v, v_stride, layout, cache, rows, part);
}

size_t attention_scratch_bytes(int, int head_size, int) { return scratch_at(head_size, nullptr, nullptr); }

void attention(const AttentionArguments& arguments, Part part) { attention_parts(arguments, part); }

}  // namespace shardmesh::avx2
