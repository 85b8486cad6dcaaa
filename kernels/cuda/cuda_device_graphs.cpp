// Steps as graphs: which actions the card has as one piece, and which launches stand for several of them.
#include <algorithm>
#include <type_traits>

#include "cuda_device.h"

namespace shardmesh::cuda {

void CudaDevice::close_graphs() {
  for (const StepGraphs& graphs : graphs_)
    for (const Piece& piece : graphs.pieces) close_graph(piece.graph);
  graphs_.clear();
}

bool CudaDevice::is_device_only(ActionKind kind) const {
  switch (kind) {
    case ActionKind::ResolveTokens:
    case ActionKind::GatherRows:
    case ActionKind::ReceiveHidden:
    case ActionKind::SendHidden:
    case ActionKind::GatherLogits:
    case ActionKind::Sample:
    case ActionKind::SendTokens: return false;
    case ActionKind::LinearPartial:
    case ActionKind::AllReduce: return program().ranks == 1 || reduces_with_peers_;
    default: return true;
  }
}

void CudaDevice::build_graphs() {
  const int most = std::min(kGraphRowsMax, shard_.config().step_tokens_max);
  action_of_reduce_.resize(program().operations.size());
  for (size_t i = 0; i < shard_.actions().size(); i++)
    if (const Action* reduce = action_of(i, ActionKind::AllReduce)) action_of_reduce_[static_cast<size_t>(reduce->operation)] = i;
  building_ = true;
  lay_out(kGraphRowsMax, kGraphRowsMax, true);
  for (const int rows : kGraphRows) {
    StepGraphs graphs{std::min(rows, most), {}};
    build(&graphs);
    graphs_.push_back(std::move(graphs));
    if (rows >= most) break;
  }
  building_ = false;
  to_ = stream_;
  waited_ = true;
}

// Output rows that take several passes stay outside: such a step's layers are graphs, its tail is not.
void CudaDevice::build(StepGraphs* graphs) {
  StepRows rows{};
  rows.tokens = device_rows_.tokens = graphs->rows;
  rows_ = &rows;
  sum_rows_ = tail_rows_ = graphs->rows;
  if (reduces_with_peers_) peers_->follow({});
  const std::vector<Action>& actions = shard_.actions();
  const bool whole_tail = graphs->rows <= shard_.output_rows();
  const auto ends = [&](size_t i, size_t begin) { return i == actions.size() || !is_device_only(actions[i].kind) || (!whole_tail && i == shard_.tail_begin() && i > begin); };
  for (size_t begin = 0; begin < actions.size(); begin++) {
    if (ends(begin, begin) || (!whole_tail && begin >= shard_.tail_begin() && begin < shard_.tail_end())) continue;
    Piece piece{begin, begin, nullptr, false};
    Problem problem = open_graph(&piece.graph, edges_);
    to_ = stream_of(piece.graph);
    if (begin > 0 && program().ranks > 1 && fuses(graphs->rows) && norms(begin - 1)) piece.end++;  // reduce() does it
    while (!ends(piece.end, begin) && !problem) {
      const size_t fused = fuse(piece.end);
      if (fused == 0) run_action(piece.end);
      piece.end += std::max<size_t>(fused, 1);
    }
    if (piece.end < actions.size()) piece.reports = run_ahead_of_host(actions[piece.end]);
    if (!problem && broken()) problem = problem_.fault.c_str();
    if (!problem) problem = finish_graph(piece.graph);
    graphs->pieces.push_back(piece);
    if (problem) refuse("the graph of a step of " + std::to_string(graphs->rows) + " rows cannot be made: " + problem);
    begin = piece.end;
  }
  if (reduces_with_peers_) graphs->reductions = peers_->reductions();
  rows_ = nullptr;
}

// An action as StepRun runs it.
void CudaDevice::run_action(size_t index) {
  const Action& action = shard_.actions()[index];
  const int number = static_cast<int>(index);
  const Operation& o = operation(action.operation);
  switch (action.kind) {
    case ActionKind::Embed: return look_up(o);
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
  if (first.kind == ActionKind::AllReduce && reduces_with_peers_ && norms(index)) {
    const NormAfter norm = norm_after(index + 1, 0);
    reduce_with_peers(first.operation, &norm);
    return 2;
  }
  const Action* reduce = action_of(index + 1, ActionKind::AllReduce);
  if (first.kind == ActionKind::LinearPartial && p.ranks == 1 && reduce && are_quantized({first.operation})) {
    const Operation& sum = operation(reduce->operation);
    const bool normed = norms(index + 1);
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
      of_rows.nodes.push_back(node_count(piece.graph));
      of_rows.programmatic_edges.push_back(programmatic_edge_count(piece.graph));
    }
    facts.push_back(std::move(of_rows));
  }
  return facts;
}

}  // namespace shardmesh::cuda
