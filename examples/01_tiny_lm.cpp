// Trains a small LLaMA-style decoder on a text, byte by byte, and lets it write.
//
//   01_tiny_lm                                        the King James Bible, 1000 steps, one or two minutes
//   01_tiny_lm --text FILE --steps 2000 --save my.safetensors
//   01_tiny_lm --load my.safetensors --prompt "In the beginning" --temperature 0.7
//   01_tiny_lm --stop 400 --save half.safetensors     stops early; then
//   01_tiny_lm --resume half.safetensors              goes on, to the same bits as an uninterrupted run
//
// The last line is `validation_loss X`: nats per byte, the mean over all targets of 256 windows of the training length, spread
// evenly over the held-out blocks.
#include "support/arguments.hpp"
#include "support/llama.hpp"
#include "support/progress.hpp"
#include "support/text.hpp"
#include "support/trainer.hpp"

#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include <cstdio>
#include <filesystem>
#include <string>
#include <thread>

namespace {

using namespace example;

double validation_loss(const Llama<float>& model, const LlamaWeights<float>& weights,
                       const Corpus& corpus, Index length) {
  Llama<float>::Slice slice;
  return mean_loss(validation_batch(corpus, 256, length), length, {},
                   [&](std::span<const Index> ids, int) -> const Matrix<float>& {
                     return model.forward(weights, ids, {}, slice);
                   });
}

/// Continues the prompt with the cache of keys and values: the prompt in one step, then one token at a time.
std::string write_text(const Llama<float>& model, const LlamaWeights<float>& weights,
                       const std::string& prompt, Index tokens, const eb::SamplingOptions& sampling,
                       std::uint64_t seed) {
  std::vector<Index> ids;
  for (const char c : prompt) ids.push_back(static_cast<unsigned char>(c));
  auto state = model.state(static_cast<Index>(ids.size()) + tokens);
  eb::Random random(seed, 0);
  eb::SamplingWorkspace<float> workspace;
  Matrix<float> logits;
  std::string text = prompt;
  for (Index t = 0; t < tokens; ++t) {
    model.step(weights, state, ids, logits);
    const auto last = logits.row(logits.rows() - 1);
    const Index next = sampling.temperature > 0
                           ? eb::sample_token(last, random.uniform(), sampling, workspace)
                           : eb::argmax(last);
    text += static_cast<char>(next);
    ids.assign(1, next);
  }
  return text;
}

int run(int argc, char** argv) {
  const std::string folder = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments(
      {{"text", EIGENBLOCKS_SOURCE_DIR "/examples/data/kjv.txt"},
       {"steps", "1000"},
       {"stop", "0"},
       {"length", "64"},
       {"batch", "32"},
       {"seed", "1"},
       {"threads", std::to_string(std::max(1u, std::thread::hardware_concurrency()))},
       {"save", (folder.empty() ? "." : folder) + "/tiny_lm.safetensors"},
       {"load", ""},
       {"resume", ""},
       {"prompt", "In the beginning "},
       {"tokens", "400"},
       {"temperature", "0.8"},
       {"top-p", "0.95"}});
  arguments.parse(argc, argv);
  const std::string &load = arguments.text("load"), &resume = arguments.text("resume");
  if (!load.empty() && !resume.empty()) throw usage_error("--load and --resume exclude each other");
  if (arguments.text("prompt").empty()) throw usage_error("--prompt must not be empty");

  TrainingPlan plan;
  if (!resume.empty()) {
    plan = Trainer<float>::saved_plan(resume);
    if (arguments.given("steps")) plan.steps = arguments.integer("steps", 1);
  } else {
    plan.steps = arguments.integer("steps", 1);
    plan.length = arguments.integer("length", 1);
    plan.batch = arguments.integer("batch", 1);
    plan.seed = arguments.integer("seed", 0);
  }
  const eb::SamplingOptions sampling{.temperature = arguments.real("temperature", 0),
                                     .top_p = arguments.real("top-p", 0)};
  if (sampling.top_p > 1) throw usage_error("--top-p must be at most 1");
  const Index stop = arguments.integer("stop", 0), tokens = arguments.integer("tokens", 0);
  const eb::thread_pool pool(static_cast<int>(arguments.integer("threads", 1)));

  const Corpus corpus = read_corpus(arguments.text("text"));
  require_length(corpus, plan.length, arguments.text("text"));
  const Llama<float> model(LlamaConfig{});
  Trainer<float> trainer(model, plan);
  if (!load.empty()) trainer.load(load, false);
  if (!resume.empty()) trainer.load(resume, true);

  if (load.empty()) {
    std::printf("training on %zu bytes of %s, %lld steps of %lld x %lld bytes\n",
                corpus.training.size(), arguments.text("text").c_str(),
                static_cast<long long>(plan.steps), static_cast<long long>(plan.batch),
                static_cast<long long>(plan.length));
    train(trainer, corpus, stop > 0 ? std::min(stop, plan.steps) : plan.steps, pool);
    trainer.save(arguments.text("save"), true);
    std::printf("saved %s\n", arguments.text("save").c_str());
  }
  // Rotary positions beyond the training length are unknown to the model.  With a window of half that length it never meets
  // one, and writes texts of any length from a cache of fixed size.
  const Llama<float> writer(LlamaConfig{.window_left = std::max<Index>(1, plan.length / 2) - 1});
  const std::string text = write_text(writer, trainer.weights(), arguments.text("prompt"), tokens,
                                      sampling, static_cast<std::uint64_t>(plan.seed));
  std::printf("\n%s\n\n", text.c_str());
  std::printf("validation_loss %.4f\n",
              validation_loss(model, trainer.weights(), corpus, plan.length));
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("01_tiny_lm", run, argc, argv); }
