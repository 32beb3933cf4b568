// Trains a small Mamba on a text, byte by byte, and lets it write from a state that does not grow.
//
//   08_mamba_lm                                        the King James Bible, 1000 steps, some two minutes
//   08_mamba_lm --text FILE --steps 2000 --threads 8
//   08_mamba_lm --prompt "And God said" --tokens 1000 --temperature 0.7
//
// The model is about as large as the decoder of 01_tiny_lm (0.50 million numbers, 0.48 there), trained by the same recipe on
// batches of the same size.  Before training its gradients are compared with differences, on a tiny model in double; after it,
// logits of whole sequences with those of the recurrence, token by token and in pieces.  Either failing ends it with 1.
//
// The last line is `validation_loss X`: nats per byte, over the same 256 windows of held-out text as in 01_tiny_lm.
#include "support/arguments.hpp"
#include "support/mamba.hpp"
#include "support/progress.hpp"
#include "support/text.hpp"

#include <eigenblocks/attention/cache_size.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include <cmath>
#include <cstdio>
#include <string>
#include <thread>

namespace {

using namespace example;

constexpr double kAllowed = 1e-4;  // difference of the two modes, of the largest logit

/// Every gradient of a tiny model against differences, in double.
bool gradients_hold() {
  const Mamba<double> model(
      {.vocab = 7, .width = 6, .layers = 2, .channels = 10, .states = 3, .taps = 3, .dt_rank = 2});
  MambaWeights<double> w = model.initial_weights(1), gradients;
  eb::Random random(2);
  for_each_mamba_parameter(w, [&](const std::string&, auto& p) {  // away from ones and zeros
    for (Index i = 0; i < p.size(); ++i) p.data()[i] += 0.2 * random.normal();
  });
  constexpr Index kSequences = 5;  // more than slices: one slice has two
  const std::vector<Index> ids = {3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 2, 4, 6, 3},
                           targets = {1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 2, 4, 6, 3, 3};
  Mamba<double>::Slices slices;
  model.train_step(w, ids, targets, kSequences, gradients, slices, {});
  const auto loss = [&] {
    const auto& logits = model.forward(w, ids, kSequences, slices[0]);
    return eb::cross_entropy(logits, std::span<const Index>(targets),
                             {.reduction = eb::Reduction::mean});
  };
  std::vector<Matrix<double>> expected;
  for_each_mamba_parameter(gradients, [&](const std::string&, auto& g) {
    expected.emplace_back(Eigen::Map<Matrix<double>>(g.data(), g.rows(), g.cols()));
  });
  std::size_t i = 0;
  Index numbers = 0;
  double worst = 0;
  bool holds = true;
  for_each_mamba_parameter(w, [&](const std::string& name, auto& p) {
    const auto result = eb::gradcheck(
        loss, Eigen::Map<Matrix<double>>(p.data(), p.rows(), p.cols()), expected[i++]);
    if (!result.passed) std::printf("gradient of %s: %s\n", name.c_str(), result.message().c_str());
    holds = holds && result.passed;
    worst = std::max(worst, result.worst);
    numbers += p.size();
  });
  std::printf("gradients of %lld numbers against differences: error / tolerance at most %.2g  %s\n",
              static_cast<long long>(numbers), worst, holds ? "holds" : "does NOT hold");
  return holds;
}

/// Logits of whole sequences, two in a batch, against those of the recurrence fed token by token and in uneven pieces.
bool modes_agree(const Mamba<float>& model, const MambaWeights<float>& w, const Batch& text) {
  constexpr std::size_t kSequences = 2;
  const std::size_t length = text.ids.size() / kSequences;
  Mamba<float>::Slice slice;
  const Matrix<float>& whole = model.forward(w, text.ids, Index(kSequences), slice);
  const double largest = static_cast<double>(whole.array().abs().maxCoeff());
  bool holds = std::isfinite(largest) && largest > 0;
  Matrix<float> logits;
  for (const bool in_pieces : {false, true}) {
    double difference = 0;
    for (std::size_t b = 0; b < kSequences; ++b) {
      auto state = model.state(w);
      for (std::size_t t = 0, piece = 1; t < length; t += piece) {
        piece = in_pieces ? std::min(length - t, 1 + (piece * 7) % 30) : 1;
        const std::size_t at = b * length + t;
        model.step(w, state, std::span(text.ids).subspan(at, piece), logits);
        const double here = static_cast<double>(
            (logits - whole.middleRows(Index(at), Index(piece))).array().abs().maxCoeff());
        if (!(here <= difference)) difference = here;  // keeps a NaN
      }
    }
    const bool within = difference <= kAllowed * largest;
    holds = holds && within;
    std::printf(
        "logits of %zu bytes at once and %s differ by %.1e at most, the largest is %.1f: %.1e "
        "(at most %.0e)  %s\n",
        text.ids.size(), in_pieces ? "in pieces  " : "one by one,", difference, largest,
        difference / largest, kAllowed, within ? "holds" : "does NOT hold");
  }
  return holds;
}

/// Continues the prompt: the prompt in one step, then one token at a time.
void write_text(const Mamba<float>& model, const MambaWeights<float>& w, const std::string& prompt,
                Index tokens, const eb::SamplingOptions& sampling, std::uint64_t seed) {
  std::vector<Index> ids;
  for (const char c : prompt) ids.push_back(static_cast<unsigned char>(c));
  eb::Random random(seed, 0);
  eb::SamplingWorkspace<float> workspace;
  Matrix<float> logits;
  auto state = model.state(w);
  std::string text = prompt;
  model.step(w, state, ids, logits);
  const double start = seconds();
  for (Index t = 0; t < tokens; ++t) {
    const auto last = logits.row(logits.rows() - 1);
    const Index next = sampling.temperature > 0
                           ? eb::sample_token(last, random.uniform(), sampling, workspace)
                           : eb::argmax(last);
    text += static_cast<char>(next);
    ids.assign(1, next);
    model.step(w, state, ids, logits);
  }
  const double spent = seconds() - start;
  std::printf("\n%s\n\n", text.c_str());
  if (tokens > 0) {
    std::printf("%.0f tokens/s, one at a time on one thread\n",
                static_cast<double>(tokens) / spent);
  }
  const MambaConfig& config = model.config();
  const auto per_token = static_cast<double>(
      eb::kv_cache_size(eb::KvCacheKind::mha,
                        {.layers = config.layers, .heads = 1, .head_dim = config.width}) *
      Index(sizeof(float)));
  const auto kib = [](double bytes) { return bytes / 1024; };
  const auto bytes = static_cast<double>(state.bytes());
  std::printf("state after %lld tokens: %.0f KiB, as before the first\n",
              static_cast<long long>(state.size()), kib(bytes));
  for (const Index context : {1024, 16384}) {
    const double cache = per_token * static_cast<double>(context);
    std::printf("keys and values of %5lld tokens, as wide and as deep: %.0f KiB, %.0f times that\n",
                static_cast<long long>(context), kib(cache), cache / bytes);
  }
}

int run(int argc, char** argv) {
  Arguments arguments(
      {{"text", EIGENBLOCKS_SOURCE_DIR "/examples/data/kjv.txt"},
       {"steps", "1000"},
       {"length", "64"},
       {"batch", "32"},
       {"seed", "1"},
       {"threads", std::to_string(std::max(1u, std::thread::hardware_concurrency()))},
       {"prompt", "In the beginning "},
       {"tokens", "400"},
       {"temperature", "0.8"},
       {"top-p", "0.95"}});
  arguments.parse(argc, argv);
  if (arguments.text("prompt").empty()) throw usage_error("--prompt must not be empty");
  TrainingPlan plan;
  plan.steps = arguments.integer("steps", 1);
  plan.length = arguments.integer("length", 1);
  plan.batch = arguments.integer("batch", 1);
  plan.seed = arguments.integer("seed", 0);
  const eb::SamplingOptions sampling{.temperature = arguments.real("temperature", 0),
                                     .top_p = arguments.real("top-p", 0)};
  if (sampling.top_p > 1) throw usage_error("--top-p must be at most 1");
  const Index tokens = arguments.integer("tokens", 0);
  const eb::thread_pool pool(static_cast<int>(arguments.integer("threads", 1)));
  const Corpus corpus = read_corpus(arguments.text("text"));
  require_length(corpus, plan.length, arguments.text("text"));

  if (!gradients_hold()) return 1;
  const Mamba<float> model(MambaConfig{});
  MambaTrainer trainer(model, plan);
  std::printf("training on %zu bytes of %s, %lld steps of %lld x %lld bytes\n",
              corpus.training.size(), arguments.text("text").c_str(),
              static_cast<long long>(plan.steps), static_cast<long long>(plan.batch),
              static_cast<long long>(plan.length));
  train(trainer, corpus, plan.steps, pool);

  // Longer than the training sequences where the text allows: the recurrence has no positions to run out of.
  const std::size_t longest = corpus.held_out.front().size();
  const Index length = std::min<Index>(300, static_cast<Index>(longest) - 2);
  Batch text;
  for (const Index at : {Index(0), static_cast<Index>(longest) - length - 1})
    text.add(corpus.held_out.front(), at, length);
  if (!modes_agree(model, trainer.weights(), text)) return 1;

  write_text(model, trainer.weights(), arguments.text("prompt"), tokens, sampling,
             static_cast<std::uint64_t>(plan.seed));
  const double loss = trainer.loss(validation_batch(corpus, 256, plan.length), plan.length, pool);
  std::printf("\nvalidation: %.4f bits per byte\nvalidation_loss %.4f\n", loss / std::log(2.0),
              loss);
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("08_mamba_lm", run, argc, argv); }
