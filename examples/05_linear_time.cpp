// Attention in linear time: how long Transformer-VQ and full attention take over growing texts, and what quantised keys cost.
//
//   05_linear_time                                    up to 32768 tokens, then two decoders trained on the King James Bible
//   05_linear_time --longest 131072 --rounds 5
//   05_linear_time --train 0                          the times alone
//
// Times: one head of 64 channels, 512 codes, window 512 (the paper's setting), processor time of one thread, median of rounds in
// which both take turns.  `vq + bias` has Transformer-XL's relative bias, as the paper's layer; `vq` computes what full attention
// does, but for the codewords.  The exponent is the slope of log time over log T: 1 is linear, 2 quadratic.
//
// Losses: a byte decoder of gated attention units, once with quantised keys (codebooks by moving averages, commitment loss
// 1e-4) and once, all else alike, with the keys as they are.  `validation_loss` is the mean over 256 held-out windows, nats per
// byte.  Without --steps the program ends with 1 unless the two are within 0.05.  Source: arXiv 2309.16354.
#include "support/arguments.hpp"
#include "support/gated_decoder.hpp"
#include "support/progress.hpp"
#include "support/svg.hpp"
#include "support/text.hpp"

#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/vq_attention.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <string>
#include <thread>

namespace {

using namespace example;

constexpr double kAllowed = 0.05;  // nats per byte between the two models

// ---- Times ---------------------------------------------------------------------------------------

struct Timing {
  Index tokens = 0;
  double vq = 0, vq_bias = 0, full = 0;  // seconds
};

template <class F>
double processor_seconds(F&& f) {
  const std::clock_t start = std::clock();
  f();
  return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Timing time_attention(Index tokens, Index rounds, std::uint64_t seed) {
  constexpr Index kDim = 64, kCodes = 512, kMemory = 512;
  eb::Random random(seed);
  const double width =
      std::pow(static_cast<double>(kDim), -0.25);  // of normalised queries and keys
  const auto matrix = [&](Index rows, double stddev) {
    return Matrix<float>(eb::normal_matrix<float>(random, rows, kDim, stddev));
  };
  const Matrix<float> q = matrix(tokens, width), k = matrix(tokens, width), v = matrix(tokens, 1),
                      codebook = matrix(kCodes, width);
  const eb::VqBias<float> bias{matrix(1, width), matrix(1, width), matrix(kMemory + 1, width)};
  const eb::VqAttentionOptions options{.block_len = kMemory, .mem_len = kMemory};
  Matrix<float> out(tokens, kDim);
  std::vector<double> vq, vq_bias, full;
  for (Index round = 0; round <= rounds; ++round) {
    const double a =
        processor_seconds([&] { eb::vq_attention_forward(q, k, v, codebook, out, options); });
    const double b =
        processor_seconds([&] { eb::vq_attention_forward(q, k, v, codebook, out, options, bias); });
    const double c = processor_seconds([&] {
      eb::attention_forward(q, k, v, out, {.scale = 1.0}, eb::attention_rule(eb::causal()));
    });
    if (round == 0 && rounds > 1) continue;  // warms up
    vq.push_back(a);
    vq_bias.push_back(b);
    full.push_back(c);
  }
  return {tokens, median(vq), median(vq_bias), median(full)};
}

/// Slope of log time over log tokens by least squares.
double exponent(const std::vector<Timing>& timings, double Timing::*seconds) {
  double n = 0, x = 0, y = 0, xx = 0, xy = 0;
  for (const Timing& t : timings) {
    const double lx = std::log(static_cast<double>(t.tokens)), ly = std::log(t.*seconds);
    n += 1;
    x += lx;
    y += ly;
    xx += lx * lx;
    xy += lx * ly;
  }
  return (n * xy - x * y) / (n * xx - x * x);
}

void print_timings(const std::vector<Timing>& timings) {
  std::printf("\nprocessor time of one thread, microseconds per token; ratio = full / vq\n");
  std::printf("%8s %10s %10s %10s %8s %12s\n", "T", "full", "vq", "vq + bias", "ratio",
              "ratio (bias)");
  for (const Timing& t : timings) {
    const double scale = 1e6 / static_cast<double>(t.tokens);
    std::printf("%8lld %10.2f %10.2f %10.2f %8.2f %12.2f\n", static_cast<long long>(t.tokens),
                t.full * scale, t.vq * scale, t.vq_bias * scale, t.full / t.vq, t.full / t.vq_bias);
  }
  if (timings.size() > 1) {
    std::printf("%8s %10.2f %10.2f %10.2f\n", "exponent", exponent(timings, &Timing::full),
                exponent(timings, &Timing::vq), exponent(timings, &Timing::vq_bias));
  }
}

// ---- Losses --------------------------------------------------------------------------------------

struct Model {
  const char* name;
  Keys keys;
  std::string colour;
  std::vector<std::pair<Index, double>> curve = {};  // step, running training loss
  double validation = 0;
};

void train_model(Model& model, const TrainingPlan& plan, const Corpus& corpus,
                 const Batch& held_out, ExecutorRef executor) {
  GatedTrainer trainer({.keys = model.keys}, plan);
  const double start = seconds();
  double shown = start, running = 0;
  const Index every = std::max<Index>(1, plan.steps / 100);
  while (trainer.step() < plan.steps) {
    const Index step = trainer.step();
    const double loss = trainer.train(training_batch(corpus, static_cast<std::uint64_t>(plan.seed),
                                                     step, plan.batch, plan.length),
                                      executor);
    running = step == 0 ? loss : 0.95 * running + 0.05 * loss;
    if (step % every == 0) model.curve.emplace_back(step + 1, running);
    if (seconds() - shown > 5.0 || trainer.step() == plan.steps) {
      shown = seconds();
      std::printf("%-14s step %5lld/%lld  loss %.3f  %.0f tokens/s\n", model.name,
                  static_cast<long long>(trainer.step()), static_cast<long long>(plan.steps),
                  running,
                  static_cast<double>(trainer.step() * plan.batch * plan.length) / (shown - start));
      std::fflush(stdout);
    }
  }
  if (model.keys == Keys::quantised)
    std::printf("%-14s %.0f %% of the codes are in use\n", model.name, 100 * trainer.live_codes());
  model.validation = trainer.loss(held_out, executor);
}

// ---- What one sees -------------------------------------------------------------------------------

struct Panel {
  double left, top, width, height;
};

void draw_times(Svg& svg, const Panel& p, const std::vector<Timing>& timings) {
  struct Line {
    const char* name;
    double Timing::*seconds;
    Stroke stroke;
  };
  std::vector<Line> lines = {{"full", &Timing::full, {"#000000", 2.5}},
                             {"vq + bias", &Timing::vq_bias, {"#1f77b4", 2, "7 4"}},
                             {"vq", &Timing::vq, {"#1f77b4", 2.5}}};
  std::sort(lines.begin(), lines.end(), [&](const Line& a, const Line& b) {  // labels from the top
    return timings.back().*a.seconds > timings.back().*b.seconds;
  });
  double low = 1e9, high = 0;
  for (const Timing& t : timings) {
    low = std::min(low, 1e3 * std::min(t.vq, t.full));
    high = std::max(high, 1e3 * std::max(t.vq_bias, t.full));
  }
  const double bottom = std::floor(std::log10(low)),
               top = std::max(bottom + 1, std::ceil(std::log10(high)));
  const double span = std::max<double>(1, static_cast<double>(timings.size()) - 1);
  const auto x = [&](std::size_t i) { return p.left + p.width * static_cast<double>(i) / span; };
  const auto y = [&](double ms) {
    return p.top + p.height * (top - std::log10(ms)) / (top - bottom);
  };
  svg.text(p.left, p.top - 42, "Time of attention over a text, milliseconds",
           {.size = 16, .bold = true});
  svg.text(p.left, p.top - 22,
           "one head of 64, 512 codes, window 512, one thread; both axes logarithmic",
           {.size = 12, .colour = "#555"});
  for (double tick = bottom; tick < top + 0.5; tick += 1) {
    const double at = y(std::pow(10, tick));
    svg.line(p.left, at, p.left + p.width, at, {"#e4e4e4"});
    svg.text(p.left - 8, at + 4, format("%g", std::pow(10, tick)), {.size = 12, .anchor = "end"});
  }
  for (std::size_t i = 0; i < timings.size(); ++i) {
    svg.line(x(i), p.top, x(i), p.top + p.height, {"#e4e4e4"});
    svg.text(x(i), p.top + p.height + 18, format("%lld", static_cast<long long>(timings[i].tokens)),
             {.size = 12, .anchor = "middle"});
    svg.text(x(i), p.top + p.height + 34, format("%.1fx", timings[i].full / timings[i].vq),
             {.size = 11, .anchor = "middle", .colour = "#777"});
  }
  svg.text(p.left + p.width / 2, p.top + p.height + 54, "tokens; below: full / vq",
           {.anchor = "middle"});
  double above = -1e9;
  for (const Line& line : lines) {
    Svg::Points points;
    for (std::size_t i = 0; i < timings.size(); ++i)
      points.emplace_back(x(i), y(1e3 * timings[i].*line.seconds));
    svg.polyline(points, line.stroke);
    for (const auto& [px, py] : points) svg.circle(px, py, 3, line.stroke.colour);
    above = std::max(points.back().second, above + 17);  // labels apart
    svg.text(p.left + p.width + 8, above + 4, line.name,
             {.size = 12.5, .colour = line.stroke.colour});
  }
}

void draw_losses(Svg& svg, const Panel& p, const std::vector<Model>& models, Index steps) {
  double low = 1e9, high = 0;
  for (const Model& model : models) {
    for (const auto& [step, loss] : model.curve) {
      low = std::min(low, loss);
      high = std::max(high, loss);
    }
  }
  low = std::floor(low * 2) / 2;
  high = std::max(low + 0.5, std::ceil(high * 2) / 2);
  const auto y = [&](double loss) { return p.top + p.height * (high - loss) / (high - low); };
  svg.text(p.left, p.top - 42, "Training loss, nats per byte", {.size = 16, .bold = true});
  svg.text(p.left, p.top - 22, "gated attention units; all alike but the keys",
           {.size = 12, .colour = "#555"});
  for (double tick = low; tick < high + 0.01; tick += 0.5) {
    svg.line(p.left, y(tick), p.left + p.width, y(tick), {"#e4e4e4"});
    svg.text(p.left - 8, y(tick) + 4, format("%.1f", tick), {.size = 12, .anchor = "end"});
  }
  svg.text(p.left + p.width, p.top + p.height + 18,
           format("%lld steps", static_cast<long long>(steps)), {.size = 12, .anchor = "end"});
  double line = 20;
  for (const Model& model : models) {
    Svg::Points points;
    for (const auto& [step, loss] : model.curve) {
      points.emplace_back(p.left + p.width * static_cast<double>(step) / static_cast<double>(steps),
                          y(loss));
    }
    svg.polyline(points, {model.colour, 2});
    svg.text(p.left + p.width - 8, p.top + line,
             format("%s: validation loss %.3f", model.name, model.validation),
             {.size = 12.5, .anchor = "end", .colour = model.colour});
    line += 18;
  }
}

// ---- The program ---------------------------------------------------------------------------------

int run(int argc, char** argv) {
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments(
      {{"text", EIGENBLOCKS_SOURCE_DIR "/examples/data/kjv.txt"},
       {"steps", "500"},
       {"seed", "1"},
       {"threads", std::to_string(std::max(1u, std::thread::hardware_concurrency()))},
       {"longest", "32768"},
       {"rounds", "3"},
       {"train", "1"},
       {"out", (here.empty() ? "." : here) + "/linear_time"}});
  arguments.parse(argc, argv);
  TrainingPlan plan{.length = 256, .batch = 8};
  plan.steps = arguments.integer("steps", 1);
  plan.seed = arguments.integer("seed", 0);
  const bool full = !arguments.given("steps"), learn = arguments.integer("train", 0) != 0;
  const auto unless_short = [&](const char* name, Index least, Index brief) {
    return full || arguments.given(name) ? Index{arguments.integer(name, least)} : brief;
  };
  const Index longest = unless_short("longest", 1024, 2048), rounds = unless_short("rounds", 1, 1);
  const int threads = static_cast<int>(arguments.integer("threads", 1));
  const std::string out = arguments.text("out");
  Corpus corpus;
  if (learn) {
    corpus = read_corpus(arguments.text("text"));
    require_length(corpus, plan.length, arguments.text("text"));
  }

  std::vector<Timing> timings;
  for (Index tokens = 1024; tokens <= longest; tokens *= 2) {
    timings.push_back(time_attention(tokens, rounds, static_cast<std::uint64_t>(plan.seed)));
    std::printf("timed %lld tokens\n", static_cast<long long>(tokens));
    std::fflush(stdout);
  }
  print_timings(timings);

  std::vector<Model> models;
  double difference = 0;
  if (learn) {
    const eb::thread_pool pool(threads);
    const Batch held_out = validation_batch(corpus, full ? 256 : 4, plan.length);
    models = {{"full attention", Keys::exact, "#000000"}, {"vq", Keys::quantised, "#1f77b4"}};
    std::printf("\ntraining on %zu bytes, %lld steps of %lld x %lld\n", corpus.training.size(),
                static_cast<long long>(plan.steps), static_cast<long long>(plan.batch),
                static_cast<long long>(plan.length));
    for (Model& model : models) train_model(model, plan, corpus, held_out, pool);
    difference = models[1].validation - models[0].validation;
    std::printf("\n");
    for (const Model& model : models)
      std::printf("validation_loss %-14s %.4f\n", model.name, model.validation);
    std::printf("difference %+.4f (at most %.2f)  %s\n", difference, kAllowed,
                difference <= kAllowed ? "holds" : "does NOT hold");
  }

  Svg svg(learn ? 1240 : 640, 560);
  draw_times(svg, {60, 80, 460, 400}, timings);
  if (learn) draw_losses(svg, {700, 80, 460, 400}, models, plan.steps);
  svg.save(out + ".svg");
  std::printf("\nwrote %s.svg\n", out.c_str());
  return full && learn && !(difference <= kAllowed) ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("05_linear_time", run, argc, argv); }
