// What a decoder remembers of its context, and what that costs: memory, speed, and how much of the text it sees.
//
//   04_cache_tradeoff                          contexts of 1k, 4k, 16k and 64k tokens, cache_tradeoff.csv and .svg
//   04_cache_tradeoff --contexts 1k,8k --repeats 9 --kv-heads 4 --train-length 2048 --out FILE (without ending)
//
// First the arithmetic of arXiv 2405.04434, table 1: cached numbers per token.  Then one model size, that of DeepSeek-V2-Lite
// (27 layers, width 2048, 16 heads of 128), with its attention made in six ways, decoded on this machine in float32:
//   MHA | MQA | GQA        16, 1 or --kv-heads heads of keys and values
//   MLA                    a latent of 512 and a rope key of 64 per token, absorbed form
//   HWFA                   26 layers see a window, the last one all (kexue.fm 9603); 16 heads of keys and values
//   Transformer-VQ         the last 513 keys, and 512 counts and means for all that came before (arXiv 2309.16354)
// Timed is one token through one attention layer, on one thread, in processor time: with its projections, and the attention over
// the cache alone (MLA: over its latents).
// Times 27 (HWFA: 26 windows + 1 full) this is the model's attention; feed-forward layers, the same for all, are left out.
#include "support/arguments.hpp"
#include "support/svg.hpp"

#include <eigenblocks/attention/cache_size.hpp>
#include <eigenblocks/attention/hwfa_layer.hpp>
#include <eigenblocks/attention/mla.hpp>
#include <eigenblocks/attention/vq.hpp>
#include <eigenblocks/core/random.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

namespace {

using namespace example;
namespace eb = eigenblocks;
using eb::Index;

constexpr Index kLayers = 27, kWidth = 2048, kHeads = 16, kDim = 128, kRank = 512, kRope = 64;
constexpr Index kCodes = 512, kMemory = 512;
constexpr double kScalar = sizeof(float);

// ---- The arithmetic ------------------------------------------------------------------------------

/// 34560 -> 34 560.
std::string grouped(Index n) {
  const std::string digits = format("%lld", static_cast<long long>(n));
  std::string text;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ' ';
    text += digits[i];
  }
  return text;
}

void print_sizes() {
  using enum eb::KvCacheKind;
  const auto row = [](const char* model, const char* how, eb::KvCacheKind kind,
                      const eb::KvCacheSizeOptions& sizes) {
    eb::KvCacheSizeOptions one = sizes;
    one.layers = 1;
    std::printf("  %-28s %-6s %10s %7lld %12s\n", model, how,
                grouped(eb::kv_cache_size(kind, one)).c_str(), static_cast<long long>(sizes.layers),
                grouped(eb::kv_cache_size(kind, sizes)).c_str());
  };
  std::printf("Cached numbers per token, heads of 128 channels (arXiv 2405.04434, table 1)\n");
  std::printf("  %-28s %-6s %10s %7s %12s\n", "model", "", "per layer", "layers", "per token");
  row("DeepSeek-V2, 128 heads", "MLA", mla, {.layers = 60, .kv_rank = 512, .rope_dim = 64});
  row("the same heads", "MHA", mha, {.layers = 60, .heads = 128, .head_dim = 128});
  row("the same heads", "GQA-8", gqa, {.layers = 60, .kv_heads = 8, .head_dim = 128});
  row("the same heads", "MQA", mqa, {.layers = 60, .head_dim = 128});
  row("DeepSeek-V2-Lite, 16 heads", "MLA", mla,
      {.layers = kLayers, .kv_rank = kRank, .rope_dim = kRope});
  row("the same heads", "MHA", mha, {.layers = kLayers, .heads = kHeads, .head_dim = kDim});
}

// ---- One layer of each kind, with a filled cache -------------------------------------------------

/// Processor time, which other programs on the machine disturb less than they do the clock on the wall.
double seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

/// Median time of f, which is called a few times more while that costs next to nothing.
double median_seconds(Index repeats, const std::function<void()>& f) {
  f();
  std::vector<double> times;
  const double start = seconds();
  while (static_cast<Index>(times.size()) < repeats ||
         (seconds() - start < 0.05 && times.size() < 1000)) {
    const double begin = seconds();
    f();
    times.push_back(seconds() - begin);
  }
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

/// Seconds of a token: the whole layer, and its attention over the cache alone.
struct Pace {
  double layer = 0, attention = 0;
  friend Pace operator+(const Pace& a, const Pace& b) {
    return {a.layer + b.layer, a.attention + b.attention};
  }
  friend Pace operator*(Index n, const Pace& a) {
    return {static_cast<double>(n) * a.layer, static_cast<double>(n) * a.attention};
  }
};

eb::Matrix<float> weights(eb::Random& random, Index rows, Index cols) {
  return eb::normal_matrix<float>(random, rows, cols, 0.02);
}

/// One layer that decodes; fill(n) brings its cache to n tokens.
class LayerBench {
 public:
  virtual ~LayerBench() = default;
  virtual void fill(Index tokens) = 0;
  virtual Pace pace(Index repeats) = 0;
};

class MhaBench final : public LayerBench {
 public:
  MhaBench(const eb::Mha<float>& layer, Index most)
      : layer_(layer), state_(eb::mha_state(layer, most)) {
    const Index kv = layer.options().kv_heads * kDim, q = kHeads * kDim;
    eb::Random random(1);
    weights_.w_q = weights(random, kWidth, q);
    weights_.w_k = weights(random, kWidth, kv);
    weights_.w_v = weights(random, kWidth, kv);
    weights_.w_o = weights(random, q, kWidth);
    rows_ = eb::normal_matrix<float>(random, 256, kv);
    x_ = eb::normal_matrix<float>(random, 1, kWidth);
  }
  void fill(Index tokens) override {
    while (state_.size() < tokens) {
      const auto block = rows_.topRows(std::min(rows_.rows(), tokens - state_.size()));
      state_.cache.append(block, block);
    }
  }
  Pace pace(Index repeats) override {
    const Index tokens = state_.size() - 1;
    state_.truncate(tokens);  // the token that asks is one of the context
    Pace pace;
    pace.layer = median_seconds(repeats, [&] {
      eb::mha_step(layer_, weights_, state_, x_, y_);
      state_.truncate(tokens);
    });
    const eb::MhaSaved<float>& s = state_.scratch;
    pace.attention = median_seconds(repeats, [&] {
      layer_.with_rule([&](const auto& rule) {
        eb::attention_step(state_.cache, s.q, s.k, s.v, out_, layer_.shape(), rule);
      });
      state_.truncate(tokens);
    });
    eb::mha_step(layer_, weights_, state_, x_, y_);
    return pace;
  }

 private:
  eb::Mha<float> layer_;
  eb::MhaState<float> state_;
  eb::MhaWeights<float> weights_;
  eb::Matrix<float> rows_, x_, y_{1, kWidth}, out_{1, kHeads*kDim};
};

class MlaBench final : public LayerBench {
 public:
  explicit MlaBench(Index most)
      : layer_({.heads = kHeads,
                .nope_dim = kDim,
                .rope_dim = kRope,
                .value_dim = kDim,
                .kv_rank = kRank}),
        state_(eb::mla_state(layer_, most)) {
    eb::Random random(2);
    weights_.w_q = weights(random, kWidth, kHeads * (kDim + kRope));
    weights_.w_dkv = weights(random, kWidth, kRank + kRope);
    weights_.w_ukv = weights(random, kRank, kHeads * 2 * kDim);
    weights_.w_o = weights(random, kHeads * kDim, kWidth);
    rows_ = eb::normal_matrix<float>(random, 256, kRank + kRope);
    x_ = eb::normal_matrix<float>(random, 1, kWidth);
  }
  void fill(Index tokens) override {
    while (state_.size() < tokens)
      state_.cache.append(rows_.topRows(std::min(rows_.rows(), tokens - state_.size())));
  }
  Pace pace(Index repeats) override {
    const Index tokens = state_.size() - 1;
    state_.truncate(tokens);
    Pace pace;
    pace.layer = median_seconds(repeats, [&] {
      eb::mla_step(layer_, weights_, state_, x_, y_, eb::MlaForm::absorbed);
      state_.truncate(tokens);
    });
    eb::mla_step(layer_, weights_, state_, x_, y_, eb::MlaForm::absorbed);
    pace.attention = median_seconds(repeats, [&] {
      eb::latent_attention(state_.cache, state_.absorbed, out_, kHeads, layer_.scale());
    });
    return pace;
  }

 private:
  eb::Mla<float> layer_;
  eb::MlaState<float> state_;
  eb::MlaWeights<float> weights_;
  eb::Matrix<float> rows_, x_, y_{1, kWidth}, out_{1, kHeads*kRank};
};

/// From 4k tokens on its state does not grow and its work stays the same, so it is not fed more than that.
class VqBench final : public LayerBench {
 public:
  VqBench() : layer_({.heads = kHeads, .key_dim = kDim, .value_dim = kDim, .mem_len = kMemory}) {
    eb::Random random(3);
    const Index width = kHeads * kDim;
    for (eb::Matrix<float>* w :
         {&weights_.w_q, &weights_.w_k, &weights_.w_v, &weights_.w_g, &weights_.w_r})
      *w = weights(random, kWidth, width);
    weights_.w_o = weights(random, width, kWidth);
    weights_.u = weights(random, kHeads, kDim);
    weights_.v_bias = weights(random, kHeads, kDim);
    codebook_ = eb::normal_matrix<float>(random, kHeads * kCodes, kDim, 0.3);
    rows_ = eb::normal_matrix<float>(random, 512, width, 0.3);
    x_ = eb::normal_matrix<float>(random, 1, kWidth);
    state_ = eb::vq_layer_state(layer_, weights_, codebook_);
  }
  void fill(Index tokens) override {
    eb::Matrix<float> out(rows_.rows(), rows_.cols());
    while (state_.attention.tokens < std::min<Index>(tokens, 4096)) {
      const Index n = std::min(rows_.rows(), tokens - state_.attention.tokens);
      const auto block = rows_.topRows(n);
      eb::vq_attention_step(state_.attention, block, block, block, codebook_, out.topRows(n),
                            layer_.attention(), state_.bias);
    }
  }
  Pace pace(Index repeats) override {
    Pace pace;
    pace.layer = median_seconds(
        repeats, [&] { eb::vq_layer_step(layer_, weights_, codebook_, state_, x_, y_); });
    pace.attention = median_seconds(repeats, [&] {
      eb::vq_attention_step(state_.attention, state_.q, state_.k, state_.v, codebook_, out_,
                            layer_.attention(), state_.bias);
    });
    return pace;
  }
  std::size_t bytes() const { return state_.attention.bytes(); }

 private:
  eb::VqLayer<float> layer_;
  eb::VqLayerWeights<float> weights_;
  eb::VqLayerState<float> state_;
  eb::Matrix<float> codebook_, rows_, x_, y_{1, kWidth}, out_{1, kHeads*kDim};
};

// ---- The six kinds -------------------------------------------------------------------------------

struct Point {
  Index context = 0;
  double bytes = 0;     ///< of all caches
  Pace pace;            ///< of all layers
  double attended = 0;  ///< keys that a query meets, mean over the layers
};

struct Kind {
  std::string name, sees;
  Stroke stroke;
  double bytes_per_token = 0;  ///< of context, once windows are full
  std::vector<Point> points = {};
};

struct Plan {
  std::vector<Index> contexts;
  Index repeats = 5, kv_heads = 8, train_length = 4096;
};

Point point(Index context, double bytes, const Pace& pace, double attended) {
  std::printf(".");
  std::fflush(stdout);
  return {context, bytes, pace, attended};
}

Kind heads_kind(const Plan& plan, const char* name, Index kv_heads, const Stroke& stroke) {
  const Index scalars = eb::kv_cache_size(
      eb::KvCacheKind::gqa, {.layers = kLayers, .kv_heads = kv_heads, .head_dim = kDim});
  Kind kind{name, "every token, in every layer", stroke, kScalar * static_cast<double>(scalars)};
  MhaBench bench(eb::Mha<float>({.heads = kHeads, .kv_heads = kv_heads, .head_dim = kDim}, nullptr,
                                plan.contexts.back() + 1),
                 plan.contexts.back() + 1);
  for (const Index n : plan.contexts) {
    bench.fill(n);
    const auto tokens = static_cast<double>(n);
    kind.points.push_back(
        point(n, kind.bytes_per_token * tokens, kLayers * bench.pace(plan.repeats), tokens));
  }
  return kind;
}

Kind mla_kind(const Plan& plan) {
  const Index scalars = eb::kv_cache_size(eb::KvCacheKind::mla,
                                          {.layers = kLayers, .kv_rank = kRank, .rope_dim = kRope});
  Kind kind{"MLA",
            "every token, in every layer",
            {"#2ca02c", 2.5},
            kScalar * static_cast<double>(scalars)};
  MlaBench bench(plan.contexts.back() + 1);
  for (const Index n : plan.contexts) {
    bench.fill(n);
    const auto tokens = static_cast<double>(n);
    kind.points.push_back(
        point(n, kind.bytes_per_token * tokens, kLayers * bench.pace(plan.repeats), tokens));
  }
  return kind;
}

Kind hwfa_kind(const Plan& plan) {
  const Index window = eb::hwfa_window(kLayers, plan.train_length), most = plan.contexts.back() + 1;
  const eb::HwfaPlan hybrid = eb::hwfa_plan(kLayers, window);
  const auto layers = eb::hwfa_layers<float>(
      hybrid,
      {.heads = kHeads, .kv_heads = kHeads, .head_dim = kDim, .logn_length = plan.train_length},
      nullptr, most);
  Kind kind{"HWFA",
            format("%lld layers the last %lld tokens (together %lld), one layer every token",
                   static_cast<long long>(kLayers - 1), static_cast<long long>(window),
                   static_cast<long long>(hybrid.receptive_field())),
            {"#d62728", 2.5},
            kScalar * 2 * kHeads * kDim * static_cast<double>(hybrid.full_layers())};
  MhaBench windowed(layers.front(), 0), full(layers.back(), most);
  for (const Index n : plan.contexts) {
    windowed.fill(n);
    full.fill(n);
    const auto tokens = static_cast<double>(n);
    const double seen = static_cast<double>(kLayers - 1) * static_cast<double>(std::min(n, window));
    kind.points.push_back(
        point(n, kScalar * static_cast<double>(hybrid.cache_scalars(n, kHeads, kDim)),
              (kLayers - 1) * windowed.pace(plan.repeats) + full.pace(plan.repeats),
              (seen + tokens) / static_cast<double>(kLayers)));
  }
  return kind;
}

Kind vq_kind(const Plan& plan) {
  Kind kind{"Transformer-VQ",
            format("the last %lld tokens; all before them as %lld means",
                   static_cast<long long>(kMemory + 1), static_cast<long long>(kCodes)),
            {"#9467bd", 2.5}};
  VqBench bench;
  for (const Index n : plan.contexts) {
    bench.fill(n);
    const Index seen = std::min(n, kMemory + 1) + std::clamp<Index>(n - kMemory - 1, 0, kCodes);
    kind.points.push_back(point(n,
                                static_cast<double>(kLayers) * static_cast<double>(bench.bytes()),
                                kLayers * bench.pace(plan.repeats), static_cast<double>(seen)));
  }
  return kind;
}

// ---- Tables --------------------------------------------------------------------------------------

std::string amount(double bytes) {
  const char* units[] = {"B", "KB", "MB", "GB", "TB"};
  std::size_t at = 0;
  for (; bytes >= 1000 && at < 4; ++at) bytes /= 1024;
  return format(bytes < 10 && at > 0 ? "%.1f %s" : "%.0f %s", bytes, units[at]);
}
std::string length_name(Index n) {
  return n % 1024 == 0 ? format("%lldk", static_cast<long long>(n / 1024))
                       : format("%lld", static_cast<long long>(n));
}
std::string speed(double tokens) { return format(tokens < 9.95 ? "%.1f" : "%.0f", tokens); }

void print_table(const std::string& title, const std::vector<Kind>& kinds,
                 const std::function<std::string(const Kind&, const Point&)>& cell) {
  std::printf("\n%s\n  %-16s", title.c_str(), "context");
  for (const Point& p : kinds.front().points) std::printf("%10s", length_name(p.context).c_str());
  for (const Kind& kind : kinds) {
    std::printf("\n  %-16s", kind.name.c_str());
    for (const Point& p : kind.points) std::printf("%10s", cell(kind, p).c_str());
  }
  std::printf("\n");
}

void print_results(const std::vector<Kind>& kinds) {
  std::printf("\nBytes per token of context, all %lld layers, float32; what a query sees\n",
              static_cast<long long>(kLayers));
  for (const Kind& kind : kinds) {
    std::printf("  %-16s %10s   %s\n", kind.name.c_str(),
                grouped(static_cast<Index>(kind.bytes_per_token)).c_str(), kind.sees.c_str());
  }
  print_table("Cache of the model", kinds,
              [](const Kind&, const Point& p) { return amount(p.bytes); });
  print_table("Tokens per second, attention layers with their projections", kinds,
              [](const Kind&, const Point& p) { return speed(1 / p.pace.layer); });
  print_table("Tokens per second, attention over the cache alone", kinds,
              [](const Kind&, const Point& p) { return speed(1 / p.pace.attention); });
  print_table("Keys (or means) that a query meets in a layer, mean over the layers", kinds,
              [](const Kind&, const Point& p) { return format("%.0f", p.attended); });
}

void write_csv(const std::vector<Kind>& kinds, const std::string& path) {
  std::ofstream file(path);
  file << "kind,context,bytes_per_token,cache_bytes,tokens_per_second,"
          "attention_tokens_per_second,keys_met\n";
  for (const Kind& kind : kinds) {
    for (const Point& p : kind.points) {
      file << format("%s,%lld,%.0f,%.0f,%.3f,%.3f,%.1f\n", kind.name.c_str(),
                     static_cast<long long>(p.context), kind.bytes_per_token, p.bytes,
                     1 / p.pace.layer, 1 / p.pace.attention, p.attended);
    }
  }
  file.close();
  if (!file) throw usage_error("cannot write " + path);
}

// ---- The picture ---------------------------------------------------------------------------------

constexpr double kTop = 135, kPanelWidth = 390, kHeight = 400;

/// Both axes logarithmic; every kind's name stands at the end of its line.
void draw_panel(Svg& svg, double left, const std::vector<Kind>& kinds, const std::string& title,
                const std::string& subtitle, const std::function<double(const Point&)>& value,
                const std::function<std::string(double)>& tick_name) {
  double low = 1e300, high = 0;
  for (const Kind& kind : kinds) {
    for (const Point& p : kind.points) {
      low = std::min(low, value(p));
      high = std::max(high, value(p));
    }
  }
  // Ticks at powers of 4, which are round in bytes and in tokens alike.
  const double first = std::floor(std::log2(low) / 2), last = std::ceil(std::log2(high) / 2);
  const std::vector<Point>& points = kinds.front().points;
  const double from = std::log2(static_cast<double>(points.front().context)),
               to = std::log2(static_cast<double>(points.back().context));
  const auto x = [&](Index context) {
    return left +
           (to > from ? kPanelWidth * (std::log2(static_cast<double>(context)) - from) / (to - from)
                      : kPanelWidth / 2);
  };
  const auto y = [&](double v) {
    return kTop + kHeight * (last - std::log2(v) / 2) / std::max(last - first, 1.0);
  };
  svg.text(left, kTop - 42, title, {.size = 17, .bold = true});
  svg.text(left, kTop - 22, subtitle, {.size = 12.5, .colour = "#555"});
  for (double tick = first; tick <= last; ++tick) {
    const double at = std::exp2(2 * tick);
    svg.line(left, y(at), left + kPanelWidth, y(at), {"#e4e4e4"});
    svg.text(left - 8, y(at) + 4, tick_name(at), {.size = 12, .anchor = "end"});
  }
  for (const Point& p : points) {
    svg.line(x(p.context), kTop, x(p.context), kTop + kHeight, {"#e4e4e4"});
    svg.text(x(p.context), kTop + kHeight + 18, length_name(p.context),
             {.size = 12, .anchor = "middle"});
  }
  svg.text(left + kPanelWidth / 2, kTop + kHeight + 40, "context in tokens",
           {.size = 12.5, .anchor = "middle", .colour = "#555"});
  std::vector<std::pair<double, const Kind*>> ends;
  for (const Kind& kind : kinds) {
    Svg::Points line;
    for (const Point& p : kind.points) line.emplace_back(x(p.context), y(value(p)));
    svg.polyline(line, kind.stroke);
    for (const auto& [px, py] : line) svg.circle(px, py, 3.2, kind.stroke.colour);
    ends.emplace_back(line.back().second, &kind);
  }
  std::stable_sort(ends.begin(), ends.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  const double end = x(points.back().context);
  double free = kTop - 10;
  for (const auto& [at, kind] : ends) {
    const double place = std::max(at, free);
    svg.line(end + 5, at, end + 18, place, {kind->stroke.colour, 0.8});
    svg.text(end + 21, place + 4, kind->name, {.size = 12.5, .colour = kind->stroke.colour});
    free = place + 16;
  }
}

void draw(const std::vector<Kind>& kinds, const std::string& path) {
  constexpr double kPanel = 575;
  Svg svg(3 * kPanel + 45, kTop + kHeight + 65);
  svg.text(35, 34, "What a decoder remembers of its context, and what that costs",
           {.size = 23, .bold = true});
  svg.text(35, 58,
           format("attention of one model size (%lld layers, width %lld, %lld heads of %lld), one "
                  "thread, float32; both axes logarithmic",
                  static_cast<long long>(kLayers), static_cast<long long>(kWidth),
                  static_cast<long long>(kHeads), static_cast<long long>(kDim)),
           {.colour = "#555"});
  draw_panel(
      svg, 85, kinds, "Memory of the caches", "all layers; lower is better",
      [](const Point& p) { return p.bytes; }, amount);
  draw_panel(
      svg, 85 + kPanel, kinds, "Decoding, tokens per second",
      "attention layers with projections, without feed-forward; higher is better",
      [](const Point& p) { return 1 / p.pace.layer; },
      [](double tokens) { return format("%.4g", tokens); });
  draw_panel(
      svg, 85 + 2 * kPanel, kinds, "Attended length",
      "keys, or means of keys, that a query meets in a layer; mean over the layers",
      [](const Point& p) { return p.attended; },
      [](double keys) { return length_name(static_cast<Index>(keys)); });
  svg.save(path);
}

// ---- Options -------------------------------------------------------------------------------------

constexpr Index kMostContext = 256 * 1024;  // 4 GB of MHA for the one layer that is timed

std::vector<Index> parse_contexts(const std::string& text) {
  std::vector<Index> contexts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    Index n = 0;
    const auto [rest, error] = std::from_chars(item.data(), item.data() + item.size(), n);
    const std::string unit(rest, item.data() + item.size());
    const bool fits =
        error == std::errc{} && (unit.empty() || unit == "k") && n >= 1 && n <= kMostContext;
    if (unit == "k") n *= 1024;
    if (!fits || n > kMostContext) {
      throw usage_error("--contexts " + text + ": \"" + item +
                        "\" is not a length such as 4k or 4096, from 1 to 256k");
    }
    if (!contexts.empty() && n <= contexts.back())
      throw usage_error("--contexts " + text + ": lengths must grow from one to the next");
    contexts.push_back(n);
    begin = end + 1;
  }
  return contexts;
}

int run(int argc, char** argv) {
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments({{"contexts", "1k,4k,16k,64k"},
                       {"repeats", "5"},
                       {"kv-heads", "8"},
                       {"train-length", "4096"},
                       {"out", (here.empty() ? "." : here) + "/cache_tradeoff"}});
  arguments.parse(argc, argv);
  const Plan plan{.contexts = parse_contexts(arguments.text("contexts")),
                  .repeats = arguments.integer("repeats", 1),
                  .kv_heads = arguments.integer("kv-heads", 1),
                  .train_length = arguments.integer("train-length", 36)};
  if (kHeads % plan.kv_heads != 0) {
    throw usage_error(format("--kv-heads %lld must divide the %lld heads",
                             static_cast<long long>(plan.kv_heads),
                             static_cast<long long>(kHeads)));
  }
  print_sizes();
  std::printf("\nOne size: %lld layers, width %lld, %lld heads of %lld.  Timing ",
              static_cast<long long>(kLayers), static_cast<long long>(kWidth),
              static_cast<long long>(kHeads), static_cast<long long>(kDim));
  std::vector<Kind> kinds;
  kinds.push_back(heads_kind(plan, "MHA", kHeads, {"#333333", 2.5}));
  kinds.push_back(heads_kind(plan,
                             format("GQA-%lld", static_cast<long long>(plan.kv_heads)).c_str(),
                             plan.kv_heads, {"#1f77b4", 2.5}));
  kinds.push_back(heads_kind(plan, "MQA", 1, {"#17a2b8", 2.5}));
  kinds.push_back(mla_kind(plan));
  kinds.push_back(hwfa_kind(plan));
  kinds.push_back(vq_kind(plan));
  std::printf("\n");
  print_results(kinds);
  const std::string& out = arguments.text("out");
  write_csv(kinds, out + ".csv");
  draw(kinds, out + ".svg");
  std::printf("\nwrote %s.csv and %s.svg\n", out.c_str(), out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return example::run_program("04_cache_tradeoff", run, argc, argv);
}
