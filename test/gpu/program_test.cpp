// Exported programs (exported_model.h) through the CUDA executor, without Node, against the reference executor by memcmp: the matrix of cuts, chunks and mixed ranks, and a
// rank that is killed in the middle of a step. Linked with the kernels of a card (test/gpu) or with the emulated machine (test/kernels).
//
//   program_test [--small] [--no-kill] FILE...; program_test --tuning MODEL [FILE]     each prints "ok NAME", "FAIL NAME: what" or "skip REASON", a line each; exit status 1 when one failed
//     --small      short prompts, one chunking a cut: for compute-sanitizer and the emulated machine
//     --no-kill    without the rank that is killed (compute-sanitizer follows no child)
//     --tuning     one model with every value and row that tuning may choose, and those of FILE (kernels/cuda/tuning.h)
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <stdexcept>
#include <thread>

#include "../../kernels/cuda/tuning.h"
#include "../../kernels/runner/cuda_part.h"
#include "workload.h"

using namespace shardmesh;

namespace {

constexpr int64_t kPatientMs = 120'000, kKillMs = 2'000;

int failures = 0, cases = 0;

void test_case(const std::string& name, const std::function<std::string()>& body) {
  std::string what;
  try {
    what = body();
  } catch (const std::exception& error) {
    what = error.what();
  }
  cases++;
  if (!what.empty()) failures++;
  std::printf("%s %s%s%s\n", what.empty() ? "ok" : "FAIL", name.c_str(), what.empty() ? "" : ": ", what.c_str());
  std::fflush(stdout);
}

std::string difference(const std::vector<uint8_t>& want, const std::vector<uint8_t>& found) {
  if (want.size() != found.size()) return std::to_string(found.size()) + " bytes of results, the reference has " + std::to_string(want.size());
  if (std::memcmp(want.data(), found.data(), want.size()) == 0) return "";
  const size_t at = static_cast<size_t>(std::mismatch(want.begin(), want.end(), found.begin()).first - want.begin());
  return "byte " + std::to_string(at) + " of " + std::to_string(want.size()) + " of its results is not the reference's";
}

struct Settings {
  bool small = false, kill = true, tuning = false;
  int prompt(const ExportedModel& model) const { return small ? std::min(40, model.prompt_tokens) : model.prompt_tokens; }
  int decode() const { return small ? 3 : 12; }
  // So many that a rank is killed before they are over.
  int decode_of_kill() const { return small ? 8 : 400; }
};

MeshOptions options_for(const Workload& workload) {
  MeshOptions options;
  options.threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 16u));
  options.kv_blocks = static_cast<int>(workload.blocks(options.block_tokens)) + 3;
  for (const WorkloadSequence& s : workload.sequences) options.step_tokens_max = std::max(options.step_tokens_max, 2 * static_cast<int>(s.prompt.size()));
  return options;
}

std::vector<uint8_t> results_of(const ExportedModel& model, const ExportedCut& cut, const LocalMesh::KindOf& kind_of, const Workload& workload, int chunk,
                                const std::string& cuda_tuning = "", bool one_card = false) {
  MeshOptions options = options_for(workload);
  options.cuda_tuning = cuda_tuning;
  options.one_card = one_card;
  LocalMesh mesh(model, cut, kind_of, options);
  mesh.open_segments();
  mesh.connect({});
  return run_workload(mesh, workload, chunk, options, kPatientMs);
}

LocalMesh::KindOf all_of(const char* kind) {
  return [kind](PeerAddress) { return std::string(kind); };
}

// ---------------------------------------------------------------- a rank in a process of its own

struct Child {
  pid_t pid = -1;
  FILE *to = nullptr, *from = nullptr;

  Child(const std::string& file, const std::string& cut, int rank, bool small) {
    int down[2], up[2];
    if (pipe(down) != 0 || pipe(up) != 0) throw std::runtime_error("no pipe");
    const std::string number = std::to_string(rank);
    pid = fork();
    if (pid < 0) throw std::runtime_error("no process");
    if (pid == 0) {
      dup2(down[0], 0);
      dup2(up[1], 1);
      for (const int fd : {down[0], down[1], up[0], up[1]}) close(fd);
      execl("/proc/self/exe", "program_test", "--rank", number.c_str(), cut.c_str(), file.c_str(), small ? "small" : "whole", nullptr);
      _exit(127);
    }
    close(down[0]);
    close(up[1]);
    to = fdopen(down[1], "w");
    from = fdopen(up[0], "r");
  }
  ~Child() {
    stop(SIGKILL);
    std::fclose(to);
    std::fclose(from);
  }
  std::string line() {
    char text[400];
    if (!std::fgets(text, sizeof text, from)) throw std::runtime_error("the other rank's process has ended");
    text[std::strcspn(text, "\n")] = 0;
    return text;
  }
  void stop(int signal) {
    if (pid < 0) return;
    kill(pid, signal);
    waitpid(pid, nullptr, 0);
    pid = -1;
  }
};

// "STAGE RANK PID FD BYTES"
std::string text_of(const RankSegment& s) {
  return std::to_string(s.address.stage) + " " + std::to_string(s.address.rank) + " " + std::to_string(s.segment.pid) + " " + std::to_string(s.segment.fd) + " " + std::to_string(s.segment.bytes);
}
RankSegment segment_of(const std::string& text) {
  RankSegment s{};
  if (std::sscanf(text.c_str(), "%d %d %d %d %zu", &s.address.stage, &s.address.rank, &s.segment.pid, &s.segment.fd, &s.segment.bytes) != 5) throw std::runtime_error("not a segment: " + text);
  return s;
}

// The child: joins rank 0, does every step, and says so after each.
int run_rank(int rank, const std::string& cut_name, const std::string& file, bool small) {
  const ExportedModel model = read_exported_model(file);
  Settings settings;
  settings.small = small;
  const Workload workload = Workload::mixed(model, 40, settings.decode_of_kill());
  const MeshOptions options = options_for(workload);
  LocalMesh mesh(model, *model.cut_named(cut_name), [rank](PeerAddress a) { return a.rank == rank ? "cuda" : ""; }, options);
  std::printf("%s\n", text_of(mesh.open_segments().front()).c_str());
  std::fflush(stdout);
  char line[400];
  if (!std::fgets(line, sizeof line, stdin)) return 1;
  mesh.connect({segment_of(line)});
  mesh.on_done = [](PeerAddress, const StepDone& done) {
    std::printf("%u\n", done.step);
    std::fflush(stdout);
  };
  std::printf("connected\n");
  std::fflush(stdout);
  const std::vector<StepInput> steps = steps_of(workload, 17, options, kPatientMs);
  mesh.open(slots_of(workload));
  for (const StepInput& step : steps) mesh.submit(step);
  for (const StepInput& step : steps) mesh.wait(step.step);
  return std::fgets(line, sizeof line, stdin) ? 1 : 0;  // until rank 0 has read its last sums and lets go
}

// Rank 1 is killed while steps run: rank 0 says who is missing; with a new process in its place, a new epoch gives the reference's bits.
std::string check_kill(const std::string& file, const ExportedModel& model, const ExportedCut& cut, const Settings& settings) {
  const Workload workload = Workload::mixed(model, 40, settings.decode_of_kill());
  const MeshOptions options = options_for(workload);
  const std::vector<uint8_t> want = results_of(model, *model.cut_named("1 rank"), all_of("reference"), workload, 1000);
  LocalMesh mesh(model, cut, [](PeerAddress a) { return a.rank == 0 ? "cuda" : ""; }, options);
  const auto join = [&](Child& child) {
    const RankSegment theirs = segment_of(child.line());
    std::fprintf(child.to, "%s\n", text_of(mesh.open_segments().front()).c_str());
    std::fflush(child.to);
    mesh.connect({theirs});
    if (const std::string said = child.line(); said != "connected") throw std::runtime_error("the other rank says: " + said);
  };
  {
    Child child(file, cut.name, 1, settings.small);
    join(child);
    mesh.open(slots_of(workload));
    for (const StepInput& step : steps_of(workload, 17, options, kKillMs)) mesh.submit(step);
    while (std::stoi(child.line()) < 5) {}
    child.stop(SIGKILL);
    const StepFailure failure = mesh.wait_for_failure(60'000);
    if (failure.code != FailureCode::WaitTimeout && failure.code != FailureCode::LinkLost) return "the step that lost its peer failed otherwise: " + failure.message;
    if (!failure.has_peer || failure.peer.rank != 1) return "rank 1 is not named: " + failure.message;
    mesh.abort("a new epoch begins");
  }
  Child child(file, cut.name, 1, settings.small);
  join(child);
  return difference(want, run_workload(mesh, workload, 17, options, kPatientMs));
}

// ---------------------------------------------------------------- tuning

std::string tuning_text(const cuda::ProductTuning& product, const cuda::AttentionTuning& attention, int fused_tokens_max, cuda::Fusion fusion, cuda::Edges edges) {
  return "{\"version\": 1, \"cards\": [{\"sm\": null, \"card\": null, \"measured\": null, \"products\": [{\"type\": null, \"bytesMax\": null, \"decodeTokensMax\": " +
         std::to_string(product.decode_tokens_max) + ", \"decodeTiles\": " + std::to_string(product.decode_tiles) + "}], \"attention\": [{\"headSize\": null, \"splitRowsMax\": " +
         std::to_string(attention.split_rows_max) + ", \"warps\": " + std::to_string(attention.warps) + "}], \"fusedTokensMax\": " + std::to_string(fused_tokens_max) +
         ", \"fusion\": \"" + cuda::name_of(fusion) + "\", \"graphEdges\": \"" + cuda::name_of(edges) + "\"}]}";
}

struct TuningCase {
  cuda::ProductTuning product;
  cuda::AttentionTuning attention;
  int fused_tokens_max;
  cuda::Fusion fusion;
  cuda::Edges edges;
};

// Every value that `shardmesh tune` chooses from at least once, every row of the built-in table and of `file` as if it fitted everything, and a file that is all of it.
std::vector<TuningCase> tuning_cases(const std::string& file) {
  std::vector<TuningCase> cases;
  const auto pick = [](const auto& choices, size_t i) { return choices[i % std::size(choices)]; };
  for (size_t i = 0; i < 5; i++)
    cases.push_back({{pick(cuda::kDecodeTokensMaxChoices, i), pick(cuda::kDecodeTilesChoices, i)}, {pick(cuda::kSplitRowsChoices, 4 - i), pick(cuda::kAttentionWarpsChoices, i)},
                     pick(cuda::kFusedTokensChoices, 4 - i), pick(cuda::kFusionChoices, i / 2), pick(cuda::kEdgesChoices, i)});
  for (const std::string& text : {std::string(cuda::kTuningTable), file}) {
    if (text.empty()) continue;
    for (const cuda::TuningRows& rows : cuda::parse_tuning(text))
      for (size_t i = 0; i < std::max(rows.products.size(), rows.attention.size()); i++)
        cases.push_back({rows.products[std::min(i, rows.products.size() - 1)].tuning, rows.attention[std::min(i, rows.attention.size() - 1)].tuning,
                         rows.fused_tokens_max.value_or(cuda::kFusedTokensMax), rows.fusion.value_or(cuda::Fusion::Whole), rows.edges.value_or(cuda::Edges::Plain)});
  }
  return cases;
}

void check_tuning(const std::string& model_file, const std::string& tuning_file, const Settings& settings) {
  const ExportedModel model = read_exported_model(model_file);
  std::string file;
  if (!tuning_file.empty()) {
    std::ifstream in(tuning_file);
    file.assign(std::istreambuf_iterator<char>(in), {});
    if (file.empty()) throw std::runtime_error(tuning_file + ": cannot be read, or is empty");
  }
  // The longest prompt, whatever --small says: a context is split from its second span on.
  const Workload workload = Workload::mixed(model, model.prompt_tokens, settings.decode());
  const std::vector<uint8_t> want = results_of(model, model.cuts.front(), all_of("reference"), workload, 1000);
  for (const TuningCase& c : tuning_cases(file))
    test_case(model.name + " - decode products up to " + std::to_string(c.product.decode_tokens_max) + " tokens in blocks of " + std::to_string(c.product.decode_tiles) + " tiles, contexts split for " +
                  std::to_string(c.attention.split_rows_max) + " rows, " + std::to_string(c.attention.warps) + " warps of attention, fused for " + std::to_string(c.fused_tokens_max) + " rows (" + cuda::name_of(c.fusion) + "), " +
                  cuda::name_of(c.edges) + " edges: the reference's bits",
              [&] { return difference(want, results_of(model, model.cuts.front(), all_of("cuda"), workload, 27, tuning_text(c.product, c.attention, c.fused_tokens_max, c.fusion, c.edges))); });
  if (!file.empty()) test_case(model.name + " - the file's own choices: the reference's bits", [&] { return difference(want, results_of(model, model.cuts.front(), all_of("cuda"), workload, 27, file)); });
}

// ---------------------------------------------------------------- the matrix

bool has_ranks(const ExportedCut& cut) {
  return std::any_of(cut.programs.begin(), cut.programs.end(), [](const Program& program) { return program.ranks > 1; });
}

void check_model(const std::string& file, const Settings& settings) {
  const ExportedModel model = read_exported_model(file);
  const ExportedCut& whole = model.cuts.front();
  const Workload workload = Workload::mixed(model, settings.prompt(model), settings.decode());
  std::vector<uint8_t> want;
  test_case(model.name + " - the reference gives many different results", [&] {
    want = results_of(model, whole, all_of("reference"), workload, 1000);
    return std::set<uint8_t>(want.begin(), want.end()).size() > 100 ? "" : "its bytes are too much alike to tell anything";
  });
  const auto same = [&](const ExportedCut& cut, const std::string& who, const LocalMesh::KindOf& kind_of, int chunk, bool one_card = false) {
    test_case(model.name + " - " + cut.name + ", " + who + ", chunks of " + std::to_string(chunk) + ": the reference's bits",
              [&] { return difference(want, results_of(model, cut, kind_of, workload, chunk, "", one_card)); });
  };
  const int chunks[] = {settings.prompt(model), 70, 33, 41};
  for (size_t i = 0; i < model.cuts.size() && (!settings.small || i < 2); i++) {
    same(model.cuts[i], "CUDA", all_of("cuda"), chunks[i % 4]);
    if (has_ranks(model.cuts[i])) same(model.cuts[i], "CUDA in one graph", all_of("cuda"), chunks[i % 4], true);
    if (model.cuts[i].programs.size() > 1 && !settings.small)
      same(model.cuts[i], "CUDA and CPU by turns", [](PeerAddress a) { return (a.stage + a.rank) % 2 == 0 ? "cuda" : "cpu"; }, 64);
  }
  if (!settings.small) same(whole, "CUDA", all_of("cuda"), 9);
  if (const ExportedCut* two = model.cut_named("2 ranks"); two && settings.kill)
    test_case(model.name + " - 2 ranks in 2 processes: one is killed in a step, the other names it, and the next epoch has the reference's bits",
              [&] { return check_kill(file, model, *two, settings); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 6 && std::string(argv[1]) == "--rank") return run_rank(std::stoi(argv[2]), argv[3], argv[4], std::string(argv[5]) == "small");
  signal(SIGPIPE, SIG_IGN);
  Settings settings;
  std::vector<std::string> files;
  for (int i = 1; i < argc; i++) {
    const std::string given = argv[i];
    if (given == "--small") settings.small = true;
    else if (given == "--no-kill") settings.kill = false;
    else if (given == "--tuning") settings.tuning = true;
    else files.push_back(given);
  }
  if (files.empty()) {
    std::fprintf(stderr, "program_test: no file; usage: program_test [--small] [--no-kill] FILE... | program_test --tuning MODEL [FILE]\n");
    return 2;
  }
  const CudaFacts facts = cuda_facts();
  if (!facts.absent.empty()) {
    std::printf("skip %s\n", facts.absent.c_str());
    return 0;
  }
  std::printf("card %s, sm_%d\n", facts.name.c_str(), facts.sm);
  const auto began = std::chrono::steady_clock::now();
  for (const std::string& file : files) {
    try {
      if (settings.tuning) {
        check_tuning(files.front(), files.size() > 1 ? files[1] : "", settings);
        break;
      }
      check_model(file, settings);
    } catch (const std::exception& error) {
      test_case(file, [&] { return error.what(); });
    }
  }
  std::printf("%d cases, %d failed, %.1f s\n", cases, failures, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  return failures ? 1 : 0;
}
