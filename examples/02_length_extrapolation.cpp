// Trains small decoders on texts of 64 bytes and asks them to read up to 16 times as much.
//
//   02_length_extrapolation                           trains three models, a few minutes, then evaluates them
//   02_length_extrapolation --save my                 keeps them in my_rope.safetensors, my_hwfa..., my_keynorm...
//   02_length_extrapolation --load my                 evaluates those
//   02_length_extrapolation --decoder tiny.safetensors  takes the RoPE model from 01_tiny_lm --save
//
// One model has plain RoPE and is read with every method that needs no training: interpolations of the frequencies (PI, NTK,
// YaRN), a sliding window, ReRoPE and Leaky ReRoPE, log n.  Two models are trained for it: HWFA (windows with RoPE, a full layer
// without positions, log n) and KeyNorm.  See kexue.fm 9675, 9706, 9708, 9728, 9603, 9859.
//
// Two metrics, in nats per byte.  same-target: the loss of the same 64 bytes, whatever precedes them; columns differ in the
// context alone.  mean: over all bytes of the context; long contexts contain other, partly easier text.
#include "support/arguments.hpp"
#include "support/llama.hpp"
#include "support/positioned_attention.hpp"
#include "support/progress.hpp"
#include "support/svg.hpp"
#include "support/text.hpp"
#include "support/trainer.hpp"

#include <eigenblocks/attention/hwfa.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/position/frequency_scaling.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>

namespace {

using namespace example;

using Attention = PositionedAttention<float>;
using Decoder = Llama<float, Attention>;
using Weights = LlamaWeights<float>;

constexpr Index kTrained = 64;           // bytes of a training sequence, L0
constexpr Index kWindow = kTrained / 2;  // of sliding window, ReRoPE and Leaky ReRoPE
constexpr std::array<Index, 5> kFactors = {1, 2, 4, 8, 16};
constexpr Index kHeadDim = LlamaConfig{}.width / LlamaConfig{}.heads;
constexpr double kBase = LlamaConfig{}.rope_base;

Decoder decoder(const std::function<PositionChoice(std::size_t layer)>& choose) {
  const LlamaConfig config;
  std::vector<Attention> layers;
  for (std::size_t i = 0; i < static_cast<std::size_t>(config.layers); ++i)
    layers.emplace_back(config.heads, config.kv_heads, choose(i));
  return Decoder(config, std::move(layers));
}
Decoder decoder(const PositionChoice& everywhere) {
  return decoder([&](std::size_t) { return everywhere; });
}

eb::RotaryFrequencies plain_frequencies() { return eb::rope_frequencies(kHeadDim, kBase); }

// ---- The models ----------------------------------------------------------------------------------

Decoder rope_model() { return decoder(PositionChoice{.rotary = plain_frequencies()}); }

Decoder keynorm_model(const eb::RotaryFrequencies& frequencies) {
  return decoder(PositionChoice{.rotary = frequencies, .key_norm = true});
}

Decoder hwfa_model() {
  const Index layers = LlamaConfig{}.layers;
  const eb::HwfaPlan plan = eb::hwfa_plan(layers, eb::hwfa_window(layers, kTrained));
  return decoder([&](std::size_t i) {
    const eb::HwfaLayer& layer = plan.layers[i];
    PositionChoice choice{.window = layer.window};
    if (layer.position == eb::HwfaPosition::rope) choice.rotary = plain_frequencies();
    if (layer.logn) {
      choice.logn_length = kTrained;
      choice.logn = eb::LognMode::plain;
    }
    return choice;
  });
}

// ---- The methods ---------------------------------------------------------------------------------

/// How a model is read when the context is `factor` times the training length.
struct Method {
  std::string name;
  const Weights* weights;
  std::function<Decoder(Index factor)> model;
  Stroke stroke;
};

std::vector<Method> methods(const Weights& rope, const Weights& hwfa, const Weights& keynorm) {
  const auto scaled = [](const auto& builder) {
    return [builder](Index k) {
      return decoder(PositionChoice{.rotary = builder(static_cast<double>(k))});
    };
  };
  const auto fixed = [](PositionChoice choice) {
    choice.rotary = plain_frequencies();
    return [choice](Index) { return decoder(choice); };
  };
  const auto yarn = [](double k) {
    return eb::yarn_frequencies(kHeadDim, kBase, {.factor = k, .original_max_position = kTrained});
  };
  const auto ntk_fixed = [](double k) {
    return eb::ntk_fixed_frequencies(kHeadDim, kBase, {.factor = k});
  };
  const auto leaky = [](Index k) {  // the farthest key stays within the training length
    return decoder(
        PositionChoice{.rotary = plain_frequencies(),
                       .relative = eb::leaky_rerope(kWindow, 2.0 * static_cast<double>(k))});
  };
  const auto keynorm_with = [](const auto& builder) {
    return [builder](Index k) { return keynorm_model(builder(static_cast<double>(k))); };
  };
  return {
      {"RoPE", &rope, [](Index) { return rope_model(); }, {"#000000", 2.5}},
      {"PI",
       &rope,
       scaled([](double k) { return eb::linear_frequencies(kHeadDim, kBase, {.factor = k}); }),
       {"#9e9e9e", 2}},
      {"NTK-aware",
       &rope,
       scaled([](double k) { return eb::ntk_aware_frequencies(kHeadDim, kBase, {.factor = k}); }),
       {"#c49a00", 2, "2 3"}},
      {"NTK-fixed", &rope, scaled(ntk_fixed), {"#c49a00", 2, "7 4"}},
      {"NTK-mixed",
       &rope,
       scaled([](double k) { return eb::ntk_mixed_frequencies(kHeadDim, kBase, {.factor = k}); }),
       {"#c49a00", 2}},
      {"YaRN", &rope, scaled(yarn), {"#d1495b", 2.5}},
      {"sliding window", &rope, fixed({.window = kWindow}), {"#6d597a", 2, "7 4"}},
      {"ReRoPE", &rope, fixed({.relative = eb::rerope(kWindow)}), {"#1f77b4", 2, "7 4"}},
      {"ReRoPE + log n",
       &rope,
       fixed({.relative = eb::rerope(kWindow), .logn_length = kTrained}),
       {"#1f77b4", 3}},
      {"Leaky ReRoPE", &rope, leaky, {"#1f77b4", 2, "2 3"}},
      {"HWFA", &hwfa, [](Index) { return hwfa_model(); }, {"#2a9d5c", 2.5}},
      {"KeyNorm",
       &keynorm,
       [](Index) { return keynorm_model(plain_frequencies()); },
       {"#e76f1c", 2.5}},
      {"KeyNorm + NTK-fixed", &keynorm, keynorm_with(ntk_fixed), {"#e76f1c", 2, "7 4"}},
      {"KeyNorm + YaRN", &keynorm, keynorm_with(yarn), {"#e76f1c", 2, "2 3"}},
  };
}

// ---- The measurement -----------------------------------------------------------------------------

struct Losses {
  double same_target = 0, mean = 0;
};

/// One column of the tables: the last factor * kTrained bytes of each window (every window ends in the bytes that are scored).
Losses evaluate(const Decoder& model, const Weights& weights, const Batch& windows, Index factor,
                const eb::thread_pool& pool) {
  constexpr auto kLongest = static_cast<std::size_t>(kFactors.back() * kTrained);
  const auto count = static_cast<Index>(windows.ids.size() / kLongest);
  const auto length = static_cast<std::size_t>(factor * kTrained);
  std::vector<Decoder::Slice> slices(static_cast<std::size_t>(ExecutorRef(pool).workers()));
  std::vector<Losses> each(static_cast<std::size_t>(count));
  ExecutorRef(pool).run(count, [&](Index window, int worker) {
    const std::size_t first = static_cast<std::size_t>(window + 1) * kLongest - length;
    const std::span ids(windows.ids.begin() + static_cast<std::ptrdiff_t>(first), length);
    const std::span targets(windows.targets.begin() + static_cast<std::ptrdiff_t>(first), length);
    const Matrix<float>& logits =
        model.forward(weights, ids, {}, slices[static_cast<std::size_t>(worker)]);
    each[static_cast<std::size_t>(window)] = {
        eb::cross_entropy(logits.bottomRows(kTrained), targets.last(kTrained)),
        eb::cross_entropy(logits, targets)};
  });
  Losses sum;
  for (const Losses& one : each) {
    sum.same_target += one.same_target / static_cast<double>(count);
    sum.mean += one.mean / static_cast<double>(count);
  }
  return sum;
}

struct Row {
  const Method* method;
  std::array<Losses, kFactors.size()> at;
};

// ---- What one sees -------------------------------------------------------------------------------

void print_table(const std::vector<Row>& rows, const char* metric, double Losses::*value) {
  std::printf("\n%s\n%-20s", metric, "context");
  for (const Index k : kFactors)
    std::printf("%6lld (%lldx)%s", static_cast<long long>(k * kTrained), static_cast<long long>(k),
                k < 10 ? " " : "");
  std::printf("\n");
  for (const Row& row : rows) {
    std::printf("%-20s", row.method->name.c_str());
    for (const Losses& losses : row.at) std::printf("%10.3f ", losses.*value);
    std::printf("\n");
  }
}

void write_csv(const std::vector<Row>& rows, const std::string& path) {
  std::ofstream file(path);
  file << "method,context,factor,same_target_loss,mean_loss\n";
  for (const Row& row : rows) {
    for (std::size_t i = 0; i < kFactors.size(); ++i) {
      file << row.method->name << ',' << kFactors[i] * kTrained << ',' << kFactors[i] << ','
           << format("%.5f,%.5f\n", row.at[i].same_target, row.at[i].mean);
    }
  }
  file.close();
  if (!file) throw usage_error("cannot write " + path);
}

/// One metric against the context, the name of each line at its right end.
void draw_panel(Svg& svg, double left, const std::vector<Row>& rows, const char* title,
                const char* subtitle, double Losses::*value) {
  constexpr double kPanelWidth = 400, kTop = 105, kHeight = 460;
  double low = 1e9, high = -1e9;
  for (const Row& row : rows) {
    for (const Losses& losses : row.at) {
      low = std::min(low, losses.*value);
      high = std::max(high, losses.*value);
    }
  }
  low = std::floor(low * 2) / 2;
  high = std::max(low + 0.5, std::ceil(high * 2) / 2);
  const auto x = [&](std::size_t i) {
    return left + kPanelWidth * static_cast<double>(i) / (kFactors.size() - 1.0);
  };
  const auto y = [&](double loss) { return kTop + kHeight * (high - loss) / (high - low); };

  svg.text(left, kTop - 42, title, {.size = 16, .bold = true});
  svg.text(left, kTop - 22, subtitle, {.size = 12, .colour = "#555"});
  for (double tick = low; tick < high + 0.01; tick += 0.5) {
    svg.line(left, y(tick), left + kPanelWidth, y(tick), {"#e4e4e4"});
    svg.text(left - 8, y(tick) + 4, format("%.1f", tick), {.size = 12, .anchor = "end"});
  }
  for (std::size_t i = 0; i < kFactors.size(); ++i) {
    svg.line(x(i), kTop, x(i), kTop + kHeight, {"#e4e4e4"});
    svg.text(x(i), kTop + kHeight + 18,
             format("%lld", static_cast<long long>(kFactors[i] * kTrained)), {.anchor = "middle"});
    svg.text(x(i), kTop + kHeight + 34, format("%lldx", static_cast<long long>(kFactors[i])),
             {.size = 11, .anchor = "middle", .colour = "#777"});
  }
  svg.text(left + kPanelWidth / 2, kTop + kHeight + 54, "context in bytes (logarithmic)",
           {.anchor = "middle"});

  std::vector<std::pair<double, const Row*>> labels;
  for (const Row& row : rows) {
    Svg::Points points;
    for (std::size_t i = 0; i < kFactors.size(); ++i)
      points.emplace_back(x(i), y(row.at[i].*value));
    svg.polyline(points, row.method->stroke);
    for (const auto& [px, py] : points)
      svg.circle(px, py, row.method->stroke.width + 0.5, row.method->stroke.colour);
    labels.emplace_back(points.back().second, &row);
  }
  // Labels in the order of the lines' ends, moved apart: first downwards, then back into the panel.
  std::sort(labels.begin(), labels.end());
  constexpr double kGap = 17;
  std::vector<double> place;
  for (const auto& label : labels)
    place.push_back(place.empty() ? label.first : std::max(label.first, place.back() + kGap));
  for (std::size_t i = place.size(); i-- > 0;)
    place[i] =
        std::min(place[i], kTop + kHeight - kGap * static_cast<double>(place.size() - 1 - i));
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const Method& method = *labels[i].second->method;
    const double end = left + kPanelWidth;
    svg.line(end + 5, labels[i].first, end + 22, place[i], {method.stroke.colour, 0.8});
    svg.text(end + 26, place[i] + 4,
             method.name + format("  %.2f", labels[i].second->at.back().*value),
             {.size = 12.5, .colour = method.stroke.colour});
  }
}

void draw(const std::vector<Row>& rows, const std::string& path) {
  Svg svg(1310, 650);
  svg.text(55, 32, "Read up to 16 times more than trained on (64 bytes): lower is better",
           {.size = 20, .bold = true});
  draw_panel(svg, 55, rows, "Loss on the same last 64 bytes, nats per byte",
             "only the context before them grows", &Losses::same_target);
  draw_panel(svg, 685, rows, "Mean loss over all bytes of the context, nats per byte",
             "longer contexts contain other, partly easier text", &Losses::mean);
  svg.save(path);
}

/// The orderings this experiment is about, on the same-target loss.  True when all hold.
bool check_orderings(const std::vector<Row>& rows) {
  const auto loss = [&](const char* name, Index factor) {
    const auto row = std::find_if(rows.begin(), rows.end(),
                                  [&](const Row& r) { return r.method->name == name; });
    const auto column = std::find(kFactors.begin(), kFactors.end(), factor) - kFactors.begin();
    return row->at[static_cast<std::size_t>(column)].same_target;
  };
  bool all = true;
  const auto claim = [&](const std::string& words, double less, double more) {
    const bool holds = less < more;
    all = all && holds;
    std::printf("  %-44s %.3f < %.3f  %s\n", words.c_str(), less, more,
                holds ? "holds" : "does NOT hold");
  };
  std::printf("\nOrderings (same-target loss)\n");
  claim("4x: ReRoPE + log n < YaRN", loss("ReRoPE + log n", 4), loss("YaRN", 4));
  claim("4x: YaRN < NTK-mixed", loss("YaRN", 4), loss("NTK-mixed", 4));
  claim("4x: NTK-mixed < RoPE", loss("NTK-mixed", 4), loss("RoPE", 4));
  claim("16x: ReRoPE + log n < 1x + 0.2", loss("ReRoPE + log n", 16), loss("RoPE", 1) + 0.2);
  claim("16x: 1x + 1.5 < RoPE", loss("RoPE", 1) + 1.5, loss("RoPE", 16));
  return all;
}

// ---- The program ---------------------------------------------------------------------------------

/// Weights of one model, loaded or trained.
Weights obtain(const char* name, const Decoder& model, Index steps, const Arguments& arguments,
               const Corpus& corpus, const eb::thread_pool& pool) {
  TrainingPlan plan;
  plan.steps = steps;
  plan.length = kTrained;
  plan.seed = arguments.integer("seed", 0);
  Trainer<float, Attention> trainer(model, plan);
  const auto file = [&](const std::string& prefix) { return prefix + "_" + name + ".safetensors"; };
  const std::string &load = arguments.text("load"), &given = arguments.text("decoder"),
                    &save = arguments.text("save");
  if (!given.empty() && name == std::string("rope")) {
    trainer.load(given, false);
  } else if (!load.empty()) {
    trainer.load(file(load), false);
  } else {
    std::printf("training %s: %lld steps of %lld x %lld bytes\n", name,
                static_cast<long long>(plan.steps), static_cast<long long>(plan.batch),
                static_cast<long long>(plan.length));
    train(trainer, corpus, plan.steps, pool);
  }
  if (!save.empty()) trainer.save(file(save), false);
  return trainer.weights();
}

int run(int argc, char** argv) {
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments(
      {{"text", EIGENBLOCKS_SOURCE_DIR "/examples/data/kjv.txt"},
       {"steps", "1000"},
       {"windows", "40"},
       {"seed", "1"},
       {"threads", std::to_string(std::max(1u, std::thread::hardware_concurrency()))},
       {"save", ""},
       {"load", ""},
       {"decoder", ""},
       {"out", (here.empty() ? "." : here) + "/length_extrapolation"}});
  arguments.parse(argc, argv);
  const Index steps = arguments.integer("steps", 1);
  const bool full = !arguments.given("steps");
  const Index windows = full || arguments.given("windows") ? arguments.integer("windows", 1) : 2;
  const eb::thread_pool pool(static_cast<int>(arguments.integer("threads", 1)));
  const double start = seconds();

  const Corpus corpus = read_corpus(arguments.text("text"));
  constexpr Index kLongest = kFactors.back() * kTrained;
  require_length(corpus, kLongest, arguments.text("text"));
  const Index fewer = std::max<Index>(1, steps * 6 / 10);
  const Weights rope = obtain("rope", rope_model(), steps, arguments, corpus, pool);
  const Weights hwfa = obtain("hwfa", hwfa_model(), fewer, arguments, corpus, pool);
  const Weights keynorm =
      obtain("keynorm", keynorm_model(plain_frequencies()), fewer, arguments, corpus, pool);

  const Batch held_out = validation_batch(corpus, windows, kLongest);
  const std::vector<Method> all = methods(rope, hwfa, keynorm);
  std::vector<Row> rows;
  for (const Method& method : all) {
    Row row{&method, {}};
    for (std::size_t i = 0; i < kFactors.size(); ++i) {
      row.at[i] = evaluate(method.model(kFactors[i]), *method.weights, held_out, kFactors[i], pool);
    }
    std::printf("evaluated %s, %.0f s since the start\n", method.name.c_str(), seconds() - start);
    std::fflush(stdout);
    rows.push_back(row);
  }

  std::printf(
      "\n%zu windows of held-out text, nats per byte; HWFA and KeyNorm trained fewer steps\n",
      held_out.ids.size() / static_cast<std::size_t>(kLongest));
  print_table(rows, "Metric: loss on the same last 64 bytes, after contexts of growing length",
              &Losses::same_target);
  print_table(rows, "Metric: mean loss over all bytes of the context", &Losses::mean);
  const std::string out = arguments.text("out");
  write_csv(rows, out + ".csv");
  draw(rows, out + ".svg");
  std::printf("\nwrote %s.csv and %s.svg\n", out.c_str(), out.c_str());
  const bool hold = check_orderings(rows);
  return full && !hold ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  return example::run_program("02_length_extrapolation", run, argc, argv);
}
