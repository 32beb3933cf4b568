// golden_runner: the library against values of the official implementations.
//
//   golden_runner [--float] [--only OP]... [--list]
//
// Directories come from EIGENBLOCKS_GOLDEN_DIR (separated by ':'), by default the source's tests/golden; they are
// searched recursively.  support/golden_run.hpp says what counts as passed, failed and skipped, support/golden.hpp how
// numbers are compared.  Exit code 0 exactly when nothing failed, 2 for arguments that make no sense.
#include "support/golden.hpp"
#include "support/golden_run.hpp"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

/// The one table of ops that wait for a later issue.  It shrinks with each issue and ends empty.
std::map<std::string, int, std::less<>> later_ops() {
  constexpr struct {
    int issue;
    const char* ops;
  } kLater[] = {
      {8, "sp_encode sp_lattice"},
      {9,
       "vq ste_general vq_ema_update kmeans vq_usage fsq fsq_decode residual_vq simvq emo_loss "
       "emo_soft fourier_pdf fourier_nll fourier_sample simplex_project entmax frank_wolfe "
       "exp_gradient projected_gradient mad_gaussian mad_moments patchify unpatchify patchify3d "
       "patch_embed flow_matching"},
      {10,
       "msign polar_express tied_bigram lora_forward lora_ga_init lora_pro_grad monarch_multiply "
       "monarch_project monarch_solve monarch_dft lr_of_batch steps_examples "
       "noise_scale_two_batch noise_scale_per_example optimal_lr_quadratic"},
  };
  std::map<std::string, int, std::less<>> issue_of;
  for (const auto& row : kLater) {
    std::istringstream names(row.ops);
    for (std::string name; names >> name;) issue_of[name] = row.issue;
  }
  return issue_of;
}

golden::Registry all_ops() {
  golden::Registry registry;
  register_attention(registry);
  register_attention_rules(registry);
  register_mha(registry);
  register_mla(registry);
  register_linear(registry);
  register_nn(registry);
  register_llama(registry);
  register_ring(registry);
  register_rope(registry);
  register_rope_nd(registry);
  register_rerope(registry);
  register_rope_frequencies(registry);
  register_optim_structured(registry);
  register_quantize_losses(registry);
  register_vq(registry);
  register_scan(registry);
  register_fft(registry);
  register_hippo(registry);
  register_s4(registry);
  register_lru(registry);
  register_rnn(registry);
  register_selective_scan(registry);
  return registry;
}

golden::RowRegistry all_rows() {
  golden::RowRegistry rows;
  register_tokenize(rows);
  register_lattice(rows);
  return rows;
}

std::vector<std::filesystem::path> golden_directories() {
  const char* listed = std::getenv("EIGENBLOCKS_GOLDEN_DIR");
  std::istringstream text(listed && *listed ? listed : EIGENBLOCKS_SOURCE_DIR "/tests/golden");
  std::vector<std::filesystem::path> directories;
  for (std::string name; std::getline(text, name, ':');) {
    if (!name.empty()) directories.emplace_back(name);
  }
  return directories;
}

void list(const golden::Registry& registry, const golden::RowRegistry& rows,
          const std::map<std::string, int, std::less<>>& later) {
  for (const auto& [name, op] : registry.ops()) {
    if (op.in_float) {
      std::printf("%s\n", name.c_str());
    } else {
      std::printf("%s (double only: %s)\n", name.c_str(), op.double_reason.c_str());
    }
  }
  for (const auto& [name, handler] : rows.ops()) std::printf("%s (rows)\n", name.c_str());
  for (const auto& [name, issue] : later) std::printf("%s (issue %d)\n", name.c_str(), issue);
}

int refuse(const std::string& what) {
  std::fprintf(stderr,
               "golden_runner: %s\nusage: golden_runner [--float] [--only OP]... [--list]\n",
               what.c_str());
  return 2;
}

int run(const std::vector<std::string>& arguments) {
  const golden::Registry registry = all_ops();
  const golden::RowRegistry rows = all_rows();
  auto later = later_ops();
  // A table that claims what is already done would hide the day its handler gets lost.
  const auto done = [&later](const std::string& name) {
    if (later.erase(name)) {
      std::fprintf(stderr,
                   "golden_runner: op %s has a handler, take it off the table of later ops\n",
                   name.c_str());
    }
  };
  for (const auto& [name, op] : registry.ops()) done(name);
  for (const auto& [name, handler] : rows.ops()) done(name);
  golden::Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--float") {
      options.in_float = true;
    } else if (arguments[i] == "--list") {
      list(registry, rows, later);
      return 0;
    } else if (arguments[i] == "--only" && i + 1 < arguments.size()) {
      const std::string& name = arguments[++i];
      if (!registry.ops().contains(name) && !rows.ops().contains(name) && !later.contains(name))
        return refuse("unknown op " + name);
      options.only.insert(name);
    } else {
      return refuse("cannot make sense of " + arguments[i]);
    }
  }
  options.directories = golden_directories();
  golden::Runner runner(
      registry, std::move(later), std::move(options),
      [](const std::string& line) {
        std::printf("%s\n", line.c_str());
        std::fflush(stdout);  // a crash in a handler must not swallow the lines before it
      },
      rows);
  return runner.run().failed == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "golden_runner: %s\n", error.what());
    return 1;
  }
}
