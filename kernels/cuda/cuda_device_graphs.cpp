// Steps as graphs: which actions the card has as one piece, and which launches stand for several of them.
#include <algorithm>
#include <type_traits>

#include "cuda_device.h"

namespace shardmesh::cuda {

bool CudaDevice::is_device_only(ActionKind kind) const {
  switch (kind) {
    case ActionKind::ResolveTokens:
    case ActionKind::ReceiveHidden:
    case ActionKind::SendHidden:
    case ActionKind::GatherLogits:
    case ActionKind::Sample:
    case ActionKind::SendTokens: return false;
    case ActionKind::LinearPartial:
    case ActionKind::AllReduce: return program().ranks == 1 || reduces_with_peers_;
    case ActionKind::GatherRows: return group_ != nullptr;
    default: return true;
  }
}

// Where the piece ends that begins with an action; there, where none begins. Output rows that take several passes stay outside: such a step's layers are a piece, its tail is not.
size_t CudaDevice::piece_end(size_t begin, bool whole_tail) const {
  const std::vector<Action>& actions = shard_.actions();
  size_t end = begin;
  while (end < actions.size() && is_device_only(actions[end].kind) && (whole_tail || end < shard_.tail_begin() || end >= shard_.tail_end())) end++;
  return end;
}

// While one lives, launches of these ranks are nodes of graphs.
struct CudaDevice::Building {
  const Ranks& ranks;
  explicit Building(const Ranks& all) : ranks(all) {
    for (CudaDevice* rank : ranks) {
      rank->graphs_.clear();
      rank->building_ = true;
      rank->lay_out(kGraphRowsMax, kGraphRowsMax, true);
    }
  }
  ~Building() {
    for (CudaDevice* rank : ranks) {
      rank->building_ = false;
      rank->rows_ = nullptr;
      rank->to_ = rank->stream_;
      rank->waited_ = true;
    }
  }
  Building(const Building&) = delete;
  Building& operator=(const Building&) = delete;
};

void CudaDevice::build_graphs(const Ranks& ranks) {
  for (CudaDevice* rank : ranks) {
    const std::vector<Action>& actions = rank->shard_.actions();
    rank->action_of_reduce_.resize(rank->program().operations.size());
    for (size_t i = 0; i < actions.size(); i++)
      if (const Action* reduce = rank->action_of(i, ActionKind::AllReduce)) rank->action_of_reduce_[static_cast<size_t>(reduce->operation)] = i;
  }
  const int most = std::min(kGraphRowsMax, ranks.front()->shard_.config().step_tokens_max);
  const Building building(ranks);
  for (const int rows : kGraphRows) {
    build(ranks, std::min(rows, most));
    if (rows >= most) break;
  }
}

// Ranks that do it together have the same actions, as far as they do.
void CudaDevice::build(const Ranks& ranks, int row_count) {
  StepRows rows{};
  rows.tokens = row_count;
  for (CudaDevice* rank : ranks) {
    rank->rows_ = &rows;
    rank->device_rows_.tokens = row_count;
    rank->sum_rows_ = rank->tail_rows_ = row_count;
    rank->reductions_ = 0;
    if (rank->spins_with_peers()) rank->peers_->follow({});
    rank->graphs_.push_back({row_count, {}});
  }
  const CudaDevice& first = *ranks.front();
  const std::vector<Action>& actions = first.shard_.actions();
  const bool whole_tail = row_count <= first.shard_.output_rows();
  for (size_t begin = 0; begin < actions.size(); begin++) {
    const size_t end = first.piece_end(begin, whole_tail);
    if (end == begin) continue;
    Graph opened = nullptr;
    Problem problem = open_graph(&opened, first.edges_);
    const std::shared_ptr<void> graph(opened, [](Graph g) {
      if (!is_abandoned()) close_graph(g);
    });
    for (CudaDevice* rank : ranks) rank->to_ = stream_of(opened);
    const bool is_normed = begin > 0 && first.program().ranks > 1 && first.fuses_followers(row_count) && first.norms(begin - 1);  // reduce() does it
    std::vector<int> last(ranks.size(), -1);
    if (!problem) run_actions(ranks, begin + is_normed, end, opened, &last);
    bool reports = false;
    for (size_t r = 0; end < actions.size() && r < ranks.size(); r++) {
      come_after(opened, last[r] < 0 ? std::vector<int>() : std::vector<int>{last[r]});
      reports = ranks[r]->run_ahead_of_host(ranks[r]->shard_.actions()[end]);
    }
    const std::string fault = problem ? problem : fault_of(ranks);
    if (fault.empty()) problem = finish_graph(opened);
    if (!fault.empty() || problem) refuse("the graph of a step of " + std::to_string(row_count) + " rows cannot be made: " + (problem ? problem : fault));
    for (CudaDevice* rank : ranks) rank->graphs_.back().pieces.push_back({begin, end, graph, reports});
    begin = end;
  }
  for (CudaDevice* rank : ranks)
    if (rank->spins_with_peers()) rank->graphs_.back().reductions = rank->peers_->reductions();
}

// Does actions [begin, end) of all ranks: an action of each, then the next. In a graph a node waits for the one before it of its rank, and where it reads the sums of all
// ranks for those of all; `last`: the newest of each, -1 where there is none.
void CudaDevice::run_actions(const Ranks& ranks, size_t begin, size_t end, Graph graph, std::vector<int>* last) {
  for (size_t at = begin; at < end;) {
    const bool reads_all = ranks.front()->shard_.actions()[at].kind == ActionKind::AllReduce;
    const std::vector<int> before = graph ? *last : std::vector<int>();
    size_t done = 0;
    for (size_t r = 0; r < ranks.size(); r++) {
      CudaDevice& rank = *ranks[r];
      const int nodes = graph ? node_count(graph) : 0;
      if (graph) {
        std::vector<int> after;
        for (size_t other = 0; other < before.size(); other++)
          if (before[other] >= 0 && (reads_all || other == r)) after.push_back(before[other]);
        come_after(graph, after);
      }
      const size_t fused = graph ? rank.fuse(at) : 0;
      if (fused == 0) rank.run_action(at);
      if (rank.broken()) return;
      if (r > 0 && done != std::max<size_t>(fused, 1)) refuse("rank " + std::to_string(rank.program().rank) + " of this card launches other kernels than rank 0");
      done = std::max<size_t>(fused, 1);
      if (graph && node_count(graph) > nodes) (*last)[r] = node_count(graph) - 1;
    }
    at += done;
  }
}

// An action as StepRun runs it.
void CudaDevice::run_action(size_t index) {
  const Action& action = shard_.actions()[index];
  const int number = static_cast<int>(index);
  const Operation& o = operation(action.operation);
  switch (action.kind) {
    case ActionKind::Embed: return look_up(o);
    case ActionKind::GatherRows: return gather_rows(o);
    case ActionKind::RmsNorm: return action.buffer >= 0 ? static_cast<void>(norm_quantized(number, o)) : norm(o);
    case ActionKind::Quantize: return static_cast<void>(quantize(number, action.buffer));
    case ActionKind::Linear: return products(action.products);
    case ActionKind::LinearPartial: return partial_product(action.operation, nullptr);
    case ActionKind::AllReduce: {
      const float* const own[1] = {nullptr};
      return reduce(action.operation, 0, rows_->tokens, own);
    }
    case ActionKind::StoreKv: return static_cast<void>(store_kv(number, o));
    case ActionKind::Attention: return attention(o);
    case ActionKind::GatedActivation: return action.buffer >= 0 ? static_cast<void>(activation_quantized(number, o)) : gated_activation(o);
    case ActionKind::SelectRows:
      check_rows(number, o.in);
      return select_rows(o);
    default: return;  // rope goes with store_kv
  }
}

// ---------------------------------------------------------------- several actions as one launch

// Action `index` when it is of that kind.
const Action* CudaDevice::action_of(size_t index, ActionKind kind) const {
  const std::vector<Action>& actions = shard_.actions();
  return index < actions.size() && actions[index].kind == kind ? &actions[index] : nullptr;
}

bool CudaDevice::are_quantized(const std::vector<int>& operations) const {
  return std::all_of(operations.begin(), operations.end(), [&](int index) { return shard_.is_quantized(operation(index).weight); });
}

// `operations` with what follows them; `action`: the one whose output is quantised.
FusedProducts CudaDevice::fused(Then then, const std::vector<int>& operations, size_t action) {
  FusedProducts f{};
  f.then = then;
  f.count = static_cast<int>(operations.size());
  for (size_t i = 0; i < operations.size(); i++) {
    const Operation& o = operation(operations[i]);
    fused_trees_[i] = {0, static_cast<int>(o.segments.size())};
    f.product[i] = product(o, 1, &fused_trees_[i], o.out < 0 ? nullptr : values(o.out), o.out < 0 ? 0 : shard_.buffer(o.out).stride, 0);
  }
  f.arrivals = arrivals_.as<uint32_t>();
  if (const int buffer = action < shard_.actions().size() ? shard_.actions()[action].buffer : -1; buffer >= 0) {
    f.quantized = card(buffer).groups.as<ActivationGroup>();
    f.check = check_of(action, buffer);
  }
  return f;
}

// Whether the action behind reduction `index` is the norm of its result, which nobody reads but in its quantised form.
bool CudaDevice::norms(size_t index) const {
  const Action *reduce = action_of(index, ActionKind::AllReduce), *norm = action_of(index + 1, ActionKind::RmsNorm);
  return reduce && norm && norm->buffer >= 0 && card(norm->buffer).only_groups && operation(norm->operation).in == operation(reduce->operation).out;
}

NormAfter CudaDevice::norm_after(size_t action, int first_row) const {
  const Operation& o = operation(shard_.actions()[action].operation);
  return {vector(o.weight), o.epsilon, card(o.out).groups.as<ActivationGroup>(), first_row, check_of(action, o.out)};
}

// Adds the launch that does the actions from `index` on in one; returns how many it does, 0 when there is none.
size_t CudaDevice::fuse(size_t index) {
  const Program& p = program();
  if (!fuses(rows_->tokens)) return 0;
  const std::vector<Action>& actions = shard_.actions();
  const Action& first = actions[index];
  // An output that nobody reads but in its quantised form.
  const auto only_quantized = [&](const Action* action) { return action && action->buffer >= 0 && card(action->buffer).only_groups; };

  if (first.kind == ActionKind::Linear && are_quantized(first.products)) {
    if (!fuses_followers_) {
      if (first.products.size() < 2 || first.products.size() > static_cast<size_t>(kFusedProductsMax)) return 0;
      queue(linear_fused(fused(Then::Nothing, first.products, actions.size()), to_));
      return 1;
    }
    const Action* store = action_of(index + 3, ActionKind::StoreKv);
    if (first.products.size() == 3 && store && action_of(index + 1, ActionKind::Rope) && action_of(index + 2, ActionKind::Rope)) {
      const Operation &kv = operation(store->operation), &q = operation(store->operation - 2);
      if (operation(first.products[0]).out != q.out || operation(first.products[1]).out != kv.in || operation(first.products[2]).out != kv.in2) return 0;
      FusedProducts f = fused(Then::RopeStoreKv, first.products, actions.size());
      f.rope = rope_store(static_cast<int>(index + 3), kv);
      queue(linear_fused(f, to_));
      return 4;
    }
    const Action* activation = action_of(index + 1, ActionKind::GatedActivation);
    if (first.products.size() == 2 && only_quantized(activation)) {
      const Operation& o = operation(activation->operation);
      if (operation(first.products[0]).out != o.in || operation(first.products[1]).out != o.in2) return 0;
      FusedProducts f = fused(Then::Activation, first.products, index + 1);
      f.activation = o.activation;
      queue(linear_fused(f, to_));
      return 2;
    }
    return 0;
  }
  if (const Action* quantize = action_of(index + 1, ActionKind::Quantize); first.kind == ActionKind::Attention && only_quantized(quantize)) {
    const Operation& o = operation(first.operation);
    if (quantize->buffer != o.out) return 0;
    const AttentionShape& shape = shape_of(o);
    queue(attention_fused(attention_step(o), static_cast<int>(shape.host_runs.size()), card(o.out).groups.as<ActivationGroup>(), arrivals_.as<uint32_t>(),
                          card_facts_.multiprocessors * shape.tuning.warps, to_, check_of(index + 1, o.out)));
    return 2;
  }
  if (first.kind == ActionKind::AllReduce && reduces_with_peers_ && fuses_followers_ && norms(index)) {
    const NormAfter norm = norm_after(index + 1, 0);
    reduce_with_peers(first.operation, &norm);
    return 2;
  }
  const Action* reduce = action_of(index + 1, ActionKind::AllReduce);
  if (first.kind == ActionKind::LinearPartial && p.ranks == 1 && reduce && are_quantized({first.operation})) {
    const Operation& sum = operation(reduce->operation);
    const bool normed = fuses_followers_ && norms(index + 1);
    FusedProducts f = fused(normed ? Then::ResidualNorm : Then::Residual, {first.operation}, actions.size());
    f.product[0].out = values(sum.out);
    f.product[0].out_stride = shard_.buffer(sum.out).stride;
    f.product[0].bias = vector(sum.bias);
    if (normed) f.norm = norm_after(index + 2, 0);
    queue(linear_fused(f, to_));
    return normed ? 3 : 2;
  }
  return 0;
}

// What the card does for an action of the host. True: the graph ends with a report.
bool CudaDevice::run_ahead_of_host(const Action& action) {
  if (action.operation < 0) return false;
  const Operation& o = operation(action.operation);
  switch (action.kind) {
    case ActionKind::LinearPartial: partial_product(action.operation, nullptr); return false;  // the host asks for the sums where it wants them
    case ActionKind::GatherLogits:
    case ActionKind::Sample:
      find_candidates(o.in, action.kind == ActionKind::Sample ? 0 : static_cast<int32_t>(o.vocabulary[static_cast<size_t>(program().rank)].from));
      report();
      return true;
    default: return false;
  }
}

std::vector<GraphFacts> CudaDevice::graphs() const {
  std::vector<GraphFacts> facts;
  for (const StepGraphs& graphs : graphs_) {
    GraphFacts of_rows{graphs.rows, {}, {}, graphs.steps, graphs.steps_behind};
    for (const Piece& piece : graphs.pieces) {
      of_rows.nodes.push_back(node_count(piece.graph.get()));
      of_rows.programmatic_edges.push_back(programmatic_edge_count(piece.graph.get()));
    }
    facts.push_back(std::move(of_rows));
  }
  return facts;
}

}  // namespace shardmesh::cuda
