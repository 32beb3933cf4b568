// Feeds a signal to HiPPO memories and draws what they remember of it.
//
//   06_hippo_memory                                        270 years of monthly numbers, examples/data/cycles.csv
//   06_hippo_memory --signal speech.wav                    WAV, or a table with --column NAME or NUMBER
//   06_hippo_memory --samples 20000 --states 256 --out .   the first samples only; the largest memory; where the pictures go
//
// LegS keeps N Legendre coefficients of the whole past and is told no time scale; each sample costs O(N) (ssm/legs.hpp).  LegT and
// Fourier keep the last stretch (a quarter of the signal) in N numbers, as linear time-invariant systems (ssm/recurrence.hpp).
// Afterwards each reconstructs its stretch from its N numbers alone (ssm/basis.hpp).
//
// Errors are root mean squares relative to the standard deviation of the signal: 1 is what its mean would give.  N has to reach about
// pi times the number of cycles; from there the error falls to what is noise, i.e. more cycles than N can hold.
#include "support/arguments.hpp"
#include "support/signal.hpp"
#include "support/svg.hpp"

#include <eigenblocks/ssm/basis.hpp>
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/legs.hpp>
#include <eigenblocks/ssm/recurrence.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace example;
namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

/// The middles of `count` samples in [0, 1].
Vector<double> middles(Index count) {
  Vector<double> s(count);
  for (Index i = 0; i < count; ++i)
    s[i] = (static_cast<double>(i) + 0.5) / static_cast<double>(count);
  return s;
}

/// Root mean square of the difference on the last rows of u, relative to their standard deviation.
double error_of(const Matrix<double>& past, const Matrix<double>& u) {
  const auto stretch = u.bottomRows(past.rows());
  const double spread = (stretch.array() - stretch.mean()).matrix().norm();
  return (past - stretch).norm() / (spread > 0 ? spread : 1.0);
}

Matrix<double> reconstruct(eb::HippoMeasure measure, const Matrix<double>& c, Index samples) {
  Matrix<double> past(samples, 1);
  eb::hippo_reconstruct(measure, middles(samples), c, past);
  return past;
}

/// The whole past from N coefficients, fed sample by sample.
Matrix<double> legs_past(const Matrix<double>& u, Index states) {
  auto memory =
      eb::legs_memory<double>({.states = states, .timing = eb::LegsTiming::consistent}, 1);
  eb::legs_step(memory, u);
  return reconstruct(eb::HippoMeasure::legs, memory.coefficients, u.rows());
}

/// The same from the exact projection, which sees the signal as a whole.
Matrix<double> projected_past(const Matrix<double>& u, Index states) {
  Matrix<double> c(states, 1);
  eb::legs_project(u, c);
  return reconstruct(eb::HippoMeasure::legs, c, u.rows());
}

/// The last `window` samples from the N states of a sliding window.
Matrix<double> window_past(eb::HippoMeasure measure, const Matrix<double>& u, Index states,
                           Index window) {
  const eb::Hippo hippo =
      eb::hippo_matrix(measure, states, {.window = static_cast<double>(window)});
  const Matrix<double> b = hippo.b;
  eb::Discretized d = eb::discretize(hippo.a, b, 1.0, {.method = eb::Discretization::zoh});
  const eb::LtiSystem<double> system{std::move(d.a), std::move(d.b), Matrix<double>(0, states), {}};
  auto state = eb::lti_state(system);
  Matrix<double> none(u.rows(), 0);
  eb::lti_step(system, state, u, none);
  return reconstruct(measure, state.x.transpose(), window);
}

// ---- Pictures -----------------------------------------------------------------------------------

struct Panel {
  double left, top, width, height;
  double first, last, low, high;  // samples and values at its edges
  double x(double sample) const { return left + width * (sample - first) / (last - first); }
  double y(double value) const { return top + height * (high - value) / (high - low); }
};

void draw_curve(Svg& svg, const Panel& panel, const Matrix<double>& values, Index begin,
                const Stroke& stroke) {
  // Not more points than the eye sees: the smallest and the largest of each column of pixels, in order of time.
  const Index columns = static_cast<Index>(panel.width), count = values.rows();
  const Index step = std::max<Index>(1, count / columns);
  Svg::Points points;
  for (Index i = 0; i < count; i += step) {
    const Index n = std::min(step, count - i);
    Index at[2] = {0, 0};
    values.col(0).segment(i, n).minCoeff(&at[0]);
    values.col(0).segment(i, n).maxCoeff(&at[1]);
    std::sort(at, at + 2);
    for (int k = 0; k < (n > 1 ? 2 : 1); ++k) {
      points.emplace_back(panel.x(static_cast<double>(begin + i + at[k]) + 0.5),
                          panel.y(std::clamp(values(i + at[k], 0), panel.low, panel.high)));
    }
  }
  svg.polyline(points, stroke);
}

void draw_frame(Svg& svg, const Panel& p, const std::string& title, const std::string& note) {
  svg.text(p.left, p.top - 26, title, {.size = 16, .bold = true});
  svg.text(p.left, p.top - 9, note, {.size = 12, .colour = "#555"});
  svg.line(p.left, p.top + p.height, p.left + p.width, p.top + p.height, {"#999"});
  svg.line(p.left, p.top, p.left, p.top + p.height, {"#999"});
  for (const double value : {p.low, p.high})
    svg.text(p.left - 6, p.y(value) + 4, format("%.3g", value),
             {.size = 11, .anchor = "end", .colour = "#777"});
  for (int i = 0; i <= 4; ++i) {
    const double sample = std::lerp(p.first, p.last, i / 4.0);
    svg.text(p.x(sample), p.top + p.height + 15, format("%.0f", sample),
             {.size = 11, .anchor = "middle", .colour = "#777"});
  }
}

struct Line {
  std::string name, colour;
  std::vector<double> errors;  ///< for each N
};

void draw_errors(Svg& svg, const Panel& p, const std::vector<Index>& sizes,
                 const std::vector<Line>& lines) {
  svg.text(p.left, p.top - 26, "Error against the number of coefficients N",
           {.size = 16, .bold = true});
  svg.text(p.left, p.top - 9, "relative to the standard deviation; both axes logarithmic",
           {.size = 12, .colour = "#555"});
  const auto y = [&](double error) {
    return p.y(std::clamp(std::log10(std::max(error, 1e-12)), p.low, p.high));
  };
  const auto x = [&](Index n) { return p.x(std::log2(static_cast<double>(n))); };
  for (double decade = p.low; decade <= p.high; ++decade) {
    svg.line(p.left, p.y(decade), p.left + p.width, p.y(decade), {"#e4e4e4"});
    svg.text(p.left - 6, p.y(decade) + 4, format("%g", std::pow(10.0, decade)),
             {.size = 11, .anchor = "end", .colour = "#777"});
  }
  for (const Index n : sizes) {
    svg.text(x(n), p.top + p.height + 15, format("%lld", static_cast<long long>(n)),
             {.size = 11, .anchor = "middle", .colour = "#777"});
  }
  double legend = p.top + 6;
  for (const Line& line : lines) {
    Svg::Points points;
    for (std::size_t i = 0; i < line.errors.size(); ++i)
      points.emplace_back(x(sizes[i]), y(line.errors[i]));
    svg.polyline(points, {line.colour, 2});
    for (const auto& [px, py] : points) svg.circle(px, py, 3, line.colour);
    svg.line(p.left + p.width + 24, legend, p.left + p.width + 54, legend, {line.colour, 2});
    svg.text(p.left + p.width + 60, legend + 4, line.name);
    legend += 22;
  }
}

int run(int argc, char** argv) {
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments({{"signal", EIGENBLOCKS_SOURCE_DIR "/examples/data/cycles.csv"},
                       {"column", ""},
                       {"samples", "100000"},
                       {"states", "256"},
                       {"out", here.empty() ? "." : here}});
  arguments.parse(argc, argv);
  const Index most = static_cast<Index>(arguments.integer("states", 8));
  if (most > 1024) throw usage_error("--states " + arguments.text("states") + ": at most 1024");
  const Signal signal = read_signal(arguments.text("signal"), arguments.text("column"));
  const Index samples = std::min(static_cast<Index>(signal.values.size()),
                                 static_cast<Index>(arguments.integer("samples", 16)));
  if (samples < 16) throw usage_error(arguments.text("signal") + " has fewer than 16 samples");
  const Matrix<double> u = Eigen::Map<const Matrix<double>>(signal.values.data(), samples, 1);
  const Index window = samples / 4;
  std::printf("%s: %s, %lld samples", arguments.text("signal").c_str(), signal.name.c_str(),
              static_cast<long long>(samples));
  if (signal.samples_per_second > 0) std::printf(" at %.0f Hz", signal.samples_per_second);
  std::printf("\n\n        whole past                  last %lld samples\n",
              static_cast<long long>(window));
  std::printf("%6s  %10s %12s   %10s %10s %10s\n", "N", "LegS", "projection", "LegS", "LegT",
              "Fourier");

  std::vector<Index> sizes;
  for (Index n = 8; n <= most; n *= 2) sizes.push_back(n);
  std::vector<Line> lines = {{"LegS, whole past", "#d1495b", {}},
                             {"exact projection, whole past", "#b8a13c", {}},
                             {"LegS, last quarter", "#8e5ea2", {}},
                             {"LegT, window of a quarter", "#1f77b4", {}},
                             {"Fourier, window of a quarter", "#2a9d4e", {}}};
  std::vector<Matrix<double>> whole, legt, fourier;
  for (const Index n : sizes) {
    whole.push_back(legs_past(u, n));
    legt.push_back(window_past(eb::HippoMeasure::legt, u, n, window));
    fourier.push_back(window_past(eb::HippoMeasure::fourier, u, n, window));
    const double errors[] = {error_of(whole.back(), u), error_of(projected_past(u, n), u),
                             error_of(whole.back().bottomRows(window), u), error_of(legt.back(), u),
                             error_of(fourier.back(), u)};
    for (std::size_t i = 0; i < 5; ++i) lines[i].errors.push_back(errors[i]);
    std::printf("%6lld  %10.4f %12.4f   %10.4f %10.4f %10.4f\n", static_cast<long long>(n),
                errors[0], errors[1], errors[2], errors[3], errors[4]);
    std::fflush(stdout);
  }

  const double margin = 0.08 * (u.maxCoeff() - u.minCoeff()) + 1e-9;
  const double low = u.minCoeff() - margin, high = u.maxCoeff() + margin;
  const double end = static_cast<double>(samples);
  Svg svg(1240, 1010);
  svg.text(60, 36, "What " + signal.name + " leaves in memory", {.size = 22, .bold = true});
  const std::size_t small = sizes.size() > 4 ? sizes.size() - 4 : 0, large = sizes.size() - 1;
  const auto name = [&](const char* measure, std::size_t i) {
    return format("%s, N = %lld", measure, static_cast<long long>(sizes[i]));
  };
  const Panel past{60, 100, 1140, 220, 0, end, low, high};
  draw_frame(svg, past, "LegS: the whole past from N numbers",
             "grey the signal, blue " + name("LegS", small) + ", red " + name("LegS", large) +
                 "; the abscissa counts samples");
  draw_curve(svg, past, u, 0, {"#bbbbbb", 1});
  draw_curve(svg, past, whole[small], 0, {"#1f77b4", 2});
  draw_curve(svg, past, whole[large], 0, {"#d1495b", 1.2});
  const Panel last{60, 410, 1140, 220, static_cast<double>(samples - window), end, low, high};
  draw_frame(svg, last, "Sliding windows: the last quarter from N numbers",
             "grey the signal, blue " + name("LegT", small) + ", green " + name("Fourier", small) +
                 ", red " + name("LegS (whole past)", small) + "; Fourier needs both ends to meet");
  draw_curve(svg, last, u.bottomRows(window), samples - window, {"#bbbbbb", 1});
  draw_curve(svg, last, whole[small].bottomRows(window), samples - window, {"#d1495b", 1.5});
  draw_curve(svg, last, legt[small], samples - window, {"#1f77b4", 1.5});
  draw_curve(svg, last, fourier[small], samples - window, {"#2a9d4e", 1.5});
  double least = 0;
  for (const Line& line : lines) {
    for (const double error : line.errors) least = std::min(least, std::log10(error + 1e-12));
  }
  draw_errors(svg,
              {60, 720, 800, 240, 3, std::log2(static_cast<double>(sizes.back())) + 0.1,
               std::floor(least), 0.5},
              sizes, lines);
  const std::string path = arguments.text("out") + "/hippo_memory.svg";
  svg.save(path);
  std::printf("\nwrote %s\n", path.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("06_hippo_memory", run, argc, argv); }
